"""Declarations of operations, and the decision which arrays a framework traces."""

import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.arrays.conversion import convert_inputs
from qm_cupy.autodiff import dispatch
from qm_cupy.autodiff.operations import OPERATIONS, like_first

torch = pytest.importorskip("torch")


@pytest.fixture
def table(monkeypatch):
    """A copy of the operator table; declarations of a test end with the test."""
    for operations in (OPERATIONS,):
        monkeypatch.setattr(dispatch, "OPERATIONS", {**operations})


# The vector-Jacobian product of `scaled` below. Its option is misspelt.
def scaled_vjp(gradient, x, *, factr=1.0):
    return gradient * factr


@pytest.mark.usefixtures("table")
class TestDeclarations:
    """A declaration must name the arguments of its function, no more and no fewer."""

    def test_every_argument_is_declared(self):  # `factor` is missing
        with pytest.raises(TypeError, match=r"`scaled` declares .* but takes"):

            @dispatch.operation(
                differentiable=("x",), dtype="stored", shapes=like_first
            )
            def scaled(x, *, factor=1.0):
                return x

    def test_nothing_else_is_declared(self):  # "tokenz" is not an argument
        with pytest.raises(TypeError, match=r"`scaled` declares .*tokenz.* but takes"):

            @dispatch.operation(
                differentiable=("tokenz",), dtype="stored", shapes=like_first
            )
            def scaled(x):
                return x

    def test_a_product_with_another_argument_is_refused(self):
        @dispatch.operation(
            differentiable=("x",),
            options=("float factor",),
            dtype="stored",
            shapes=like_first,
        )
        def scaled(x, *, factor=1.0):
            convert_back, x = convert_inputs({"x": x})
            return convert_back(x * factor)

        # The operation works; only a request for its gradient finds the mistake.
        assert (scaled(np.ones(3), factor=2.0) == 2).all()
        declared = dispatch.OPERATIONS["scaled"]
        with pytest.raises(TypeError, match=r"`scaled_vjp` takes \['factr'\]"):
            declared.run_vjp([np.ones(3)], np.ones(3), 3.0)

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_every_product_takes_arguments_of_its_operation(self, name):
        declared = OPERATIONS[name]
        if declared.differentiable:
            assert declared.vjp_arguments(declared.find_vjp())


def test_tensors_that_require_grad_are_traced():
    plain, grad = torch.ones(3), torch.ones(3, requires_grad=True)
    assert dispatch.tracing_framework((np.ones(3), None, 2, "word", plain)) is None
    assert dispatch.tracing_framework((plain, grad)) == "torch"
    assert dispatch.tracing_framework(((grad, plain),)) == "torch"  # like a `Merged`
    # torch records no gradients here, so the functions work on the tensors' values.
    with torch.no_grad():
        assert dispatch.tracing_framework((plain, grad)) is None


def test_tracebacks_show_functions_by_their_names():
    """A decorator must not hide the name of a function in a traceback."""
    names = {f.__code__.co_name for f in (qm.merge_tokens, qm.saliency, qm.quickmerge)}
    assert names == {"merge_tokens", "saliency", "quickmerge"}

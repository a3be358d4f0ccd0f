"""Limits instead of K under torch and JAX: no shape of labels depends on K."""

import functools

import numpy as np
import pytest

import qm_cupy as qm

TOKENS = np.random.default_rng(3).standard_normal((2, 12, 4))
LIMITS = {
    "max_error": {"max_error": 0.3, "method": "ward"},
    "max_distance": {"max_distance": 0.8},
    "neighbours": {"max_distance": 1.0, "method": "contiguous"},
    "protect": {
        "max_error": 0.2,
        "method": "ward",
        "protect": TOKENS[..., 0] > 1,
    },
}
limits = pytest.mark.parametrize("name", LIMITS)


def call_of(name, convert):
    """Return a function of tokens, and the labels that it must give."""
    options = {
        key: convert(x) if getattr(x, "ndim", 0) else x
        for key, x in LIMITS[name].items()
    }
    wanted = qm.cluster_tokens(TOKENS, **LIMITS[name])
    assert 0 < wanted.max() < 11
    return functools.partial(qm.cluster_tokens, **options), wanted


@limits
def test_torch(name):
    torch = pytest.importorskip("torch")
    function, wanted = call_of(name, torch.as_tensor)
    tokens = torch.tensor(TOKENS, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    exported = torch.export.export(Module(), (tokens.detach(),)).module()
    results = function(tokens), compiled(tokens), exported(tokens.detach())
    for labels in results:
        assert labels.dtype == torch.int32
        assert not labels.requires_grad
        np.testing.assert_array_equal(labels.numpy(), wanted)


@limits
def test_jax(name):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        function, wanted = call_of(name, jax.numpy.asarray)
        tokens = jax.numpy.asarray(TOKENS)
        for call in (function, jax.jit(function)):
            labels = call(tokens)
            assert labels.dtype == np.int32
            np.testing.assert_array_equal(labels, wanted)


def test_counts_may_be_traced():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    counts = np.array([3, 5])
    wanted = qm.cluster_tokens(TOKENS, counts)
    compiled = torch.compile(qm.cluster_tokens, fullgraph=True, backend="aot_eager")
    got = compiled(torch.tensor(TOKENS), torch.tensor(counts))
    np.testing.assert_array_equal(got.numpy(), wanted)
    with jax.enable_x64(True):
        got = jax.jit(qm.cluster_tokens)(TOKENS, counts)
        np.testing.assert_array_equal(got, wanted)
        got = jax.jit(qm.cluster_tokens)(TOKENS, 3)
        np.testing.assert_array_equal(got, qm.cluster_tokens(TOKENS, 3))


@pytest.mark.parametrize("number", [1, np.float32(1), np.array(1.0)])
def test_numbers_of_any_real_type(number):
    torch = pytest.importorskip("torch")
    tokens = torch.tensor(TOKENS, requires_grad=True)
    got = qm.cluster_tokens(tokens, max_distance=number)
    wanted = qm.cluster_tokens(TOKENS, max_distance=1.0)
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_limits_are_static():
    jax = pytest.importorskip("jax")
    with pytest.raises(
        TypeError, match="`max_distance` is a JAX tracer, but its value"
    ):
        jax.jit(lambda x, d: qm.cluster_tokens(x, max_distance=d))(TOKENS, 0.5)


def test_exactly_one_of_three_when_traced():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="exactly one of `num_groups`, `max_error`"):
        qm.cluster_tokens(torch.tensor(TOKENS, requires_grad=True))

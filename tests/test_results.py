"""`Merged`: its methods, and how frameworks and Python's copies treat it."""

import copy
import pickle

import numpy as np
import pytest
from conftest import to_library, to_numpy

import qm_cupy as qm

NUM_GROUPS = 4


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((2, 9, 6)).astype(np.float32)  # (B, N, D)


@pytest.fixture
def mask():
    return np.arange(9) < np.array([[9], [6]])  # (B, N)


@pytest.fixture
def values(rng):
    return rng.standard_normal((2, 3, 9, 5)).astype(np.float32)  # (B, H, N, d)


def merge(tokens, **options):
    saliency = np.linspace(0.1, 1, tokens.shape[-2], dtype=np.float32)
    saliency = np.broadcast_to(saliency, tokens.shape[:-1]).copy()
    return qm.quickmerge(tokens, NUM_GROUPS, saliency=saliency, **options)


def converted(library, merged):
    return qm.Merged(*(to_library(library, x) for x in merged))


def assert_equal(got, wanted):
    got = to_numpy(got)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted, strict=True)


class TestUnmerge:
    def test_each_token_is_that_of_its_group(self, library, tokens, mask):
        wanted = merge(tokens, mask=mask)
        got = to_numpy(converted(library, wanted).unmerge())
        assert got.dtype == tokens.dtype
        for b, n in np.ndindex(2, 9):
            group = wanted.labels[b, n]
            token = wanted.tokens[b, group] if mask[b, n] else np.zeros(6)
            np.testing.assert_array_equal(got[b, n], token)

    def test_one_sequence(self, tokens):
        merged = merge(tokens[0])
        assert_equal(merged.unmerge(), merged.tokens[merged.labels])


class TestValid:
    def test_groups_of_size_0_are_padding(self, library, tokens):
        merged = qm.quickmerge(tokens, np.array([4, 2]))
        valid = converted(library, merged).valid
        assert_equal(valid, np.array([[True] * 4, [True, True, False, False]]))


class TestApply:
    def test_the_tokens_themselves(self, library, tokens, mask):
        wanted = merge(tokens, mask=mask)
        merged = converted(library, wanted)
        assert_equal(merged.apply(to_library(library, tokens)), wanted.tokens)

    def test_heads(self, library, tokens, values, mask):
        plan = merge(tokens, mask=mask)
        got = converted(library, plan).apply(to_library(library, values))
        assert tuple(got.shape) == (2, 3, NUM_GROUPS, 5)
        for head in range(3):
            # The weighted means, in float64, one head after another.
            wanted = weighted_means(values[:, head], plan)
            np.testing.assert_allclose(to_numpy(got)[:, head], wanted, rtol=1e-5)

    def test_heads_of_one_sequence(self, tokens, values):
        plan = merge(tokens[0])
        got = plan.apply(values[0])
        wanted = [plan.apply(head) for head in values[0]]
        np.testing.assert_array_equal(got, wanted)
        assert got.flags.c_contiguous

    # The heads of a cache are often a transposed view of (B, N, H, d).
    def test_strided_heads(self, tokens, values):
        plan = merge(tokens)
        strided = np.ascontiguousarray(values.swapaxes(1, 2)).swapaxes(1, 2)
        np.testing.assert_array_equal(plan.apply(strided), plan.apply(values))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_the_dtype_is_that_of_the_values(self, tokens, values, dtype):
        if dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        x = values.astype(dtype)
        got = merge(tokens).apply(x)
        assert got.dtype == x.dtype

    def test_padding_of_groups(self, tokens):
        plan = qm.quickmerge(tokens, np.array([4, 2]))
        merged = plan.apply(tokens)
        np.testing.assert_array_equal(merged, plan.tokens)
        assert not merged[1, 2:].any()

    def test_a_plan_of_numpy_is_converted(self, library, tokens, values):
        plan = merge(tokens)
        for x in (tokens, values):
            y = to_library(library, x)
            got = plan.apply(y)
            assert type(got) is type(y)
            assert_equal(got, plan.apply(x))

    def test_padding_is_not_read(self, library, tokens, values, mask):
        plan = merge(tokens, mask=mask)
        wanted = plan.apply(tokens), plan.apply(values)
        tokens, values = tokens.copy(), values.copy()
        tokens[~mask] = np.nan
        values.swapaxes(1, 2)[~mask] = np.nan
        plan.mass[~mask] = np.nan
        plan = converted(library, plan)
        assert_equal(plan.apply(to_library(library, tokens)), wanted[0])
        assert_equal(plan.apply(to_library(library, values)), wanted[1])

    def test_an_empty_batch(self, tokens):
        plan = merge(tokens[:0])
        assert plan.apply(tokens[:0]).shape == (0, NUM_GROUPS, 6)
        assert plan.apply(np.ones((0, 3, 9, 5))).shape == (0, 3, NUM_GROUPS, 5)

    @pytest.mark.parametrize(
        "shape",
        [
            (9,),
            (9, 6),
            (2, 8, 6),
            (3, 9, 6),
            (2, 3, 8, 6),
            (3, 2, 9, 6),
            (1, 2, 3, 9, 6),
        ],
    )
    def test_another_shape(self, tokens, shape):
        message = r"\(B, N, D\) or \(B, H, N, d\) with \(B, N\) = \(2, 9\)"
        with pytest.raises(ValueError, match=message) as error:
            merge(tokens).apply(np.ones(shape))
        assert f"got {shape}" in str(error.value)

    @pytest.mark.parametrize("shape", [(9,), (8, 6), (3, 8, 6), (2, 3, 9, 6)])
    def test_another_shape_of_one_sequence(self, tokens, shape):
        message = r"\(N, D\) or \(H, N, d\) with \(N\) = \(9,\)"
        with pytest.raises(ValueError, match=message) as error:
            merge(tokens[0]).apply(np.ones(shape))
        assert f"got {shape}" in str(error.value)

    def test_errors_name_the_argument(self, tokens, values):
        plan = merge(tokens)
        with pytest.raises(TypeError, match=r"`x` must be float16.*got int64"):
            plan.apply(np.ones((2, 9, 6), np.int64))
        with pytest.raises(TypeError, match="`x` must be an array, got list"):
            plan.apply([[1.0]])
        values[1, 2, 3, 4] = np.nan
        message = r"`x` must be finite, got nan at index \(1, 2, 3, 4\)"
        with pytest.raises(ValueError, match=message):
            plan.apply(values)

    def test_libraries_do_not_mix(self, tokens):
        pytest.importorskip("torch")
        plan = converted("torch", merge(tokens))
        with pytest.raises(TypeError, match="one library, got `x` of numpy"):
            plan.apply(tokens)

    def test_kernels(self, kernels, tokens, values):
        plan = merge(tokens)
        for x in (tokens, values):
            got = plan.apply(x)
            heads = x[:, None] if x.ndim == 3 else x
            wanted = np.stack(
                [weighted_means(heads[:, h], plan) for h in range(heads.shape[1])], 1
            )
            np.testing.assert_allclose(got, wanted.reshape(got.shape), rtol=1e-5)


def weighted_means(x, plan):
    """Return the weighted mean of each group, (B, K, D), in float64."""
    member = plan.labels[..., None] == np.arange(plan.tokens.shape[-2])  # (B, N, K)
    weight = member * plan.mass.astype(np.float64)[..., None]
    total = np.swapaxes(weight, -1, -2) @ x.astype(np.float64)
    return total / weight.sum(axis=-2)[..., None]


class TestRepr:
    def test_one_line(self, library, tokens):
        batch, single = merge(tokens), merge(tokens[0])
        assert repr(converted(library, batch)) == (
            f"Merged(2 × 9 tokens → 2 × 4 groups, width 6, float32, {library})"
        )
        assert repr(converted(library, single)) == (
            f"Merged(9 tokens → 4 groups, width 6, float32, {library})"
        )

    def test_other_objects_in_the_fields(self):
        # Frameworks put placeholders, shardings or axes into a tree.
        assert repr(qm.Merged(0, 1, None, 3, "x")) == "Merged(0, 1, None, 3, 'x')"


class TestTuple:
    def test_the_fields(self):
        fields = ("tokens", "labels", "sizes", "positions", "mass")
        assert qm.Merged._fields == fields

    @pytest.mark.parametrize(
        "again",
        [
            copy.copy,
            copy.deepcopy,
            lambda merged: pickle.loads(pickle.dumps(merged)),
            lambda merged: merged._replace(),
            lambda merged: qm.Merged(**merged._asdict()),
        ],
        ids=["copy", "deepcopy", "pickle", "replace", "asdict"],
    )
    def test_copies(self, tokens, again):
        merged = merge(tokens)
        same = again(merged)
        assert type(same) is qm.Merged
        for x, y in zip(same, merged, strict=True):
            np.testing.assert_array_equal(x, y, strict=True)
        np.testing.assert_array_equal(same.unmerge(), merged.unmerge())

    def test_replaced_tokens(self, tokens):
        merged = merge(tokens)
        halved = merged._replace(tokens=merged.tokens / 2)
        np.testing.assert_array_equal(halved.unmerge(), merged.unmerge() / 2)


class TestTorch:
    def test_gradients(self, tokens, values):
        torch = pytest.importorskip("torch")
        plan = merge(tokens.astype(np.float64))
        for array in (tokens[..., :2], values[:, :2, :, :2]):  # few numbers
            for merged in (plan, converted("torch", plan)):
                x = torch.tensor(array, dtype=torch.float64, requires_grad=True)
                assert torch.autograd.gradcheck(merged.apply, (x,))

    def test_gradients_of_the_weights_and_of_the_merged_tokens(self, tokens, values):
        torch = pytest.importorskip("torch")
        plan = converted("torch", merge(tokens.astype(np.float64)))
        plan = plan._replace(
            mass=plan.mass.requires_grad_(), tokens=plan.tokens.requires_grad_()
        )
        plan.apply(torch.tensor(values)).sum().backward()
        assert plan.mass.grad.abs().sum() > 0
        plan.unmerge().sum().backward()
        # The gradient of a merged token counts the tokens of its group.
        sizes = plan.sizes[..., None].expand(plan.tokens.shape).double()
        torch.testing.assert_close(plan.tokens.grad, sizes)

    @pytest.mark.slow("compiles torch's graph")
    def test_compiled(self, tokens, values):
        torch = pytest.importorskip("torch")
        tokens, values = torch.tensor(tokens), torch.tensor(values)
        plan = merge(to_numpy(tokens))

        def function(tokens, values):
            merged = qm.quickmerge(tokens, NUM_GROUPS)
            results = merged.unmerge(), merged.apply(values), merged.valid
            return merged, *results, merged.apply(tokens), plan.apply(values)

        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, wanted = compiled(tokens, values), function(tokens, values)
        assert type(got[0]) is qm.Merged
        for x, y in zip((*got[0], *got[1:]), (*wanted[0], *wanted[1:]), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.slow("compiles torch's graph")
    def test_compiled_gradients(self, tokens, values):
        torch = pytest.importorskip("torch")
        tokens, values = (torch.tensor(x).requires_grad_() for x in (tokens, values))

        def function(tokens, values):
            merged = qm.quickmerge(tokens, NUM_GROUPS)
            return merged.unmerge().square().sum() + merged.apply(values).square().sum()

        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for x, y in zip(
            torch.autograd.grad(compiled(tokens, values), (tokens, values)),
            torch.autograd.grad(function(tokens, values), (tokens, values)),
            strict=True,
        ):
            torch.testing.assert_close(x, y)

    def test_a_tree(self, tokens):
        torch = pytest.importorskip("torch")
        merged = converted("torch", merge(tokens))
        doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, merged)
        assert type(doubled) is qm.Merged
        assert torch.equal(doubled.sizes, 2 * merged.sizes)


class TestJax:
    def test_jit(self, tokens, values):
        jax = pytest.importorskip("jax")
        plan = merge(tokens)

        @jax.jit
        def function(tokens, values):
            merged = qm.quickmerge(tokens, NUM_GROUPS)
            assert repr(merged).endswith("width 6, float32, jax)")  # no values exist
            results = merged.unmerge(), merged.apply(values), merged.valid
            return merged, *results, plan.apply(values)

        merged, *results = function(tokens, values)
        assert type(merged) is qm.Merged
        wanted = qm.quickmerge(tokens, NUM_GROUPS)
        wanted_results = (
            wanted.unmerge(), wanted.apply(values), wanted.valid, plan.apply(values),
        )  # fmt: skip
        for x, y in zip((*merged, *results), (*wanted, *wanted_results), strict=True):
            assert_equal(x, y)

    def test_gradients(self, tokens, values):
        jax = pytest.importorskip("jax")
        check_grads = pytest.importorskip("jax.test_util").check_grads
        plan = merge(tokens.astype(np.float64))
        with jax.enable_x64(True):
            for merged in (plan, converted("jax", plan)):

                def function(x, merged=merged):
                    return merged.apply(jax.numpy.asarray(x))  # it moves x in NumPy

                x = values.astype(np.float64)
                settings = {"eps": 1e-5, "rtol": 1e-6, "atol": 1e-8}
                check_grads(function, (x,), order=1, modes=["rev"], **settings)

    def test_a_tree(self, tokens):
        jax = pytest.importorskip("jax")
        doubled = jax.tree.map(lambda x: 2 * x, merge(tokens))
        assert type(doubled) is qm.Merged

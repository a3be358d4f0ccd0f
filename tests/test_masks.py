"""Masks and protected tokens, as people pass them, for every function that takes them.

A mask may be boolean or contain the integers 0 and 1, and may be (N,) or (B, N). What
lies under padding is not read. Protected tokens are booleans or positions.
"""

import inspect

import numpy as np
import pytest
from conftest import to_library, to_numpy

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS

BATCH, NUM_TOKENS, DIM, HEADS = 3, 9, 4, 2
MASK = np.arange(NUM_TOKENS) < 7
PADDED = ~MASK


def draw(*shape):
    return np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)


def padded(x, axes, value):
    """Return a copy of x with a value in the padded tokens of some axes."""
    x = x.copy()
    for axis in axes:
        np.moveaxis(x, axis, 0)[PADDED] = value
    return x


TOKENS = draw(BATCH, NUM_TOKENS, DIM)
SCORES = draw(BATCH, NUM_TOKENS)
HEAD_SCORES = draw(BATCH, HEADS, NUM_TOKENS)
HEAD_TOKENS = draw(BATCH, HEADS, NUM_TOKENS, DIM)
ATTENTION = draw(BATCH, HEADS, NUM_TOKENS, NUM_TOKENS)
LABELS = np.broadcast_to(np.arange(NUM_TOKENS) % 3, SCORES.shape).astype(np.int32)
TREE = qm.linkage(TOKENS, mask=np.broadcast_to(MASK, SCORES.shape))
PRIOR = qm.MLPPrior.init(DIM)

# Each call: a function of (arrays, mask), and the arrays with their axes of tokens.
CALLS = {
    "attention_entropy": (
        lambda a, m: qm.attention_entropy(a, mask=m), (ATTENTION, (-2, -1)),
    ),
    "attention_entropy_vjp": (
        lambda g, a, m: qm.attention_entropy_vjp(g, a, mask=m),
        (HEAD_SCORES, (-1,)), (ATTENTION, (-2, -1)),
    ),
    "attention_received": (
        lambda a, m: qm.attention_received(a, mask=m), (ATTENTION, (-2, -1)),
    ),
    "attention_received, query": (
        lambda q, k, m: qm.attention_received(query=q, key=k, mask=m),
        (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)),
    ),
    "attention_received_vjp": (
        lambda g, a, m: qm.attention_received_vjp(g, a, mask=m),
        (HEAD_SCORES, (-1,)), (ATTENTION, (-2, -1)),
    ),
    "attention_mass": (
        lambda r, h, m: qm.attention_mass(r, h, causal=True, mask=m),
        (HEAD_SCORES, (-1,)), (HEAD_SCORES, (-1,)),
    ),
    "attention_mass_vjp": (
        lambda g, r, h, m: qm.attention_mass_vjp(g, r, h, mask=m),
        (SCORES, (-1,)), (HEAD_SCORES, (-1,)), (HEAD_SCORES, (-1,)),
    ),
    "query_key_entropy": (
        lambda q, k, m: qm.query_key_entropy(q, k, mask=m),
        (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)),
    ),
    "query_key_entropy_vjp": (
        lambda g, q, k, m: qm.query_key_entropy_vjp(g, q, k, causal=True, mask=m),
        (HEAD_SCORES, (-1,)), (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)),
    ),
    "self_attention_entropy": (
        lambda x, m: qm.self_attention_entropy(x, mask=m), (TOKENS, (-2,)),
    ),
    "self_attention_entropy_vjp": (
        lambda g, x, m: qm.self_attention_entropy_vjp(g, x, mask=m),
        (SCORES, (-1,)), (TOKENS, (-2,)),
    ),
    "saliency": (lambda h, m: qm.saliency(h, mask=m), (HEAD_SCORES, (-1,))),
    "saliency_vjp": (
        lambda g, h, m: qm.saliency_vjp(g, h, mask=m),
        (SCORES, (-1,)), (HEAD_SCORES, (-1,)),
    ),
    "norm_saliency": (lambda x, m: qm.norm_saliency(x, mask=m), (TOKENS, (-2,))),
    "norm_saliency_vjp": (
        lambda g, x, m: qm.norm_saliency_vjp(g, x, mask=m),
        (SCORES, (-1,)), (TOKENS, (-2,)),
    ),
    "gumbel_softmax": (lambda s, m: qm.gumbel_softmax(s, mask=m), (SCORES, (-1,))),
    "gumbel_softmax, hard": (
        lambda s, m: qm.gumbel_softmax(s, hard=2, mask=m), (SCORES, (-1,)),
    ),
    "gumbel_softmax_vjp": (
        lambda g, s, m: qm.gumbel_softmax_vjp(g, s, mask=m),
        (SCORES, (-1,)), (SCORES * 2, (-1,)),
    ),
    "select_tokens": (lambda s, m: qm.select_tokens(s, 3, mask=m), (SCORES, (-1,))),
    "norm_budget": (lambda x, m: qm.norm_budget(x, 0.7, mask=m), (TOKENS, (-2,))),
    "norm_mass": (lambda x, m: qm.norm_mass(x, 3, mask=m), (TOKENS, (-2,))),
    "linkage": (
        lambda x, w, m: qm.linkage(x, "ward", mass=w, mask=m),
        (TOKENS, (-2,)), (SCORES, (-1,)),
    ),
    "cut_linkage": (lambda t, m: qm.cut_linkage(t, num_groups=3, mask=m), (TREE, ())),
    **{
        f"cluster_tokens, {method}": (
            lambda x, m, method=method: qm.cluster_tokens(x, 3, method=method, mask=m),
            (TOKENS, (-2,)),
        )
        for method in METHODS
    },
    "cluster_tokens, mass": (
        lambda x, w, m: qm.cluster_tokens(x, 3, mass=w, metric="euclidean", mask=m),
        (TOKENS, (-2,)), (SCORES, (-1,)),
    ),
    "cluster_tokens, max_error": (
        lambda x, m: qm.cluster_tokens(x, max_error=0.1, method="ward", mask=m),
        (TOKENS, (-2,)),
    ),
    "reconstruction_error": (
        lambda x, m: qm.reconstruction_error(x, x[:, :3], mask=m), (TOKENS, (-2,)),
    ),
    "reconstruction_error_vjp": (
        lambda x, m: qm.reconstruction_error_vjp(x[:, 0, 0], x, x[:, :3], mask=m),
        (TOKENS, (-2,)),
    ),
    "fidelity_loss": (
        lambda x, m: qm.fidelity_loss(x, x[:, :3], mask=m), (TOKENS, (-2,)),
    ),
    "fidelity_loss_vjp": (
        lambda x, m: qm.fidelity_loss_vjp(1.0, x, x[:, :3], mask=m), (TOKENS, (-2,)),
    ),
    "quickmerge": (lambda x, m: qm.quickmerge(x, 3, mask=m), (TOKENS, (-2,))),
    "quickmerge, ratio": (lambda x, m: qm.quickmerge(x, 0.5, mask=m), (TOKENS, (-2,))),
    "quickmerge, error": (
        lambda x, m: qm.quickmerge(x, max_error=0.1, mask=m), (TOKENS, (-2,)),
    ),
    "quickmerge, nearest": (
        lambda x, m: qm.quickmerge(x, 3, method="nearest", protect=[0], mask=m),
        (TOKENS, (-2,)),
    ),
    "quickmerge, attention": (
        lambda x, a, m: qm.quickmerge(x, 3, attention=a, mask=m),
        (TOKENS, (-2,)), (ATTENTION, (-2, -1)),
    ),
    "quickmerge, query": (
        lambda x, q, m: qm.quickmerge(x, 3, query=q, key=q, causal=True, mask=m),
        (TOKENS, (-2,)), (HEAD_TOKENS, (-2,)),
    ),
    "quickmerge, hidden_states": (
        lambda x, m: qm.quickmerge(x, 3, hidden_states=(x, x), mask=m),
        (TOKENS, (-2,)),
    ),
    "quickmerge, saliency": (
        lambda x, s, m: qm.quickmerge(x, 3, saliency=s, mask=m),
        (TOKENS, (-2,)), (SCORES, (-1,)),
    ),
    "quickmerge, weights": (
        lambda x, s, m: qm.quickmerge(x, 3, weights=s, mask=m),
        (TOKENS, (-2,)), (SCORES, (-1,)),
    ),
    "quickmerge, mass": (
        lambda x, m: qm.quickmerge(x, 3, weights="mass", noise_seed=1, mask=m),
        (TOKENS, (-2,)),
    ),
    "attend": (
        lambda q, k, b, m: qm.attend(q[:, :, :3], k, k, bias=b, mask=m),
        (HEAD_TOKENS, ()), (HEAD_TOKENS * 2, (-2,)), (HEAD_SCORES, (-1,)),
    ),
    **{
        f"score_keys, {how}": (
            lambda q, k, m, how=how: qm.score_keys(
                q, k, values=k if how == "expected" else None, how=how, mask=m
            ),
            (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)),
        )
        for how in ("received", "snapkv", "expected", "rms", "last", "max")
    },
    "evict": (
        lambda k, s, m: qm.evict(k, k, 3, scores=s, mask=m),
        (HEAD_TOKENS, (-2,)), (HEAD_SCORES, (-1,)),
    ),
    "match_attention": (
        lambda q, k, b, m: qm.match_attention(q, k, k, 3, bias=b, mask=m),
        (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)), (HEAD_SCORES, (-1,)),
    ),
    "merge_kv_cache": (
        lambda q, k, a, b, m: qm.merge_kv_cache(
            k, k, 3, query=q, attention=a, bias=b, sinks=0, recent=1, mask=m
        ),
        (HEAD_TOKENS, (-2,)), (HEAD_TOKENS * 2, (-2,)),
        (HEAD_SCORES, (-1,)), (HEAD_SCORES, (-1,)),
    ),
    "merge_kv_cache, other queries": (
        lambda q, k, m: qm.merge_kv_cache(
            k, k, 3, query=q, causal=False, sinks=0, recent=1, mask=m
        ),
        (HEAD_TOKENS, ()), (HEAD_TOKENS * 2, (-2,)),
    ),
    "choose_merge": (
        lambda x, m: qm.choose_merge(x, [{"method": "ward"}], PRIOR, budget=3, mask=m),
        (TOKENS, (-2,)),
    ),
}  # fmt: skip


def results(call, mask, value=0.0):
    """Return the results of a call as a list, with a value under the padding."""
    function, *arrays = CALLS[call]
    result = function(*(padded(x, axes, value) for x, axes in arrays), mask)
    return leaves(result)


def leaves(result):
    if isinstance(result, tuple):
        return [x for part in result for x in leaves(part)]
    return [np.asarray(result)]


def assert_same(actual, wanted):
    for x, y in zip(actual, wanted, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_every_function_with_a_mask_is_tested():
    names = {name.split(",")[0] for name in CALLS}
    with_mask = {
        name
        for name in qm.__all__
        if inspect.isfunction(getattr(qm, name))
        and "mask" in inspect.signature(getattr(qm, name)).parameters
    }
    assert with_mask == names


@pytest.mark.parametrize("call", CALLS)
class TestEveryFunction:
    @pytest.mark.parametrize("dtype", [bool, np.int64, np.int32, np.uint8, np.int8])
    def test_masks_of_integers_and_of_one_axis(self, call, dtype):
        batch = np.repeat(MASK[None], BATCH, axis=0)
        wanted = results(call, batch)
        assert_same(results(call, batch.astype(dtype)), wanted)
        assert_same(results(call, MASK.astype(dtype)), wanted)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_padding_is_not_read(self, call, value):
        assert_same(results(call, MASK, value), results(call, MASK))

    def test_other_masks_are_refused(self, call):
        with pytest.raises(TypeError, match=r"`mask` must be boolean .* got float32"):
            results(call, MASK.astype(np.float32))
        wrong = MASK.astype(np.int64)
        wrong[2] = 2
        with pytest.raises(ValueError, match=r"only 0 and 1 .* got 2 at index \(2,\)"):
            results(call, wrong)
        with pytest.raises(ValueError, match=r"`mask` must have shape .* got \(8,\)"):
            results(call, MASK[:8])
        with pytest.raises(ValueError, match=r"`mask` must have shape .* got \(1, 9\)"):
            results(call, MASK[None])
        with pytest.raises(ValueError, match="must leave at least one token"):
            results(call, 0 * MASK.astype(np.int64))


def test_labels_of_padding_are_not_read():
    labels = np.where(MASK, LABELS, -1)
    for value in (np.nan, np.inf):
        x, w = padded(TOKENS, (-2,), value), padded(SCORES, (-1,), value)
        clean = np.where(MASK[:, None], TOKENS, 0), np.where(MASK, SCORES, 0)
        assert_same(
            [qm.merge_tokens(x, labels, 3, mass=w)],
            [qm.merge_tokens(clean[0], labels, 3, mass=clean[1])],
        )
        assert_same(
            [qm.reconstruction_error(x, TOKENS[:, :3], labels=labels)],
            [qm.reconstruction_error(clean[0], TOKENS[:, :3], labels=labels)],
        )


class TestLibraries:
    """The same masks for arrays of every library, traced or not."""

    def test_masks(self, library):
        x = to_library(library, TOKENS)
        wanted = qm.quickmerge(TOKENS, 0.5, mask=MASK)
        for mask in (MASK, MASK.astype(np.int64), np.repeat(MASK[None], BATCH, 0)):
            merged = qm.quickmerge(x, 0.5, mask=to_library(library, mask))
            assert_same([to_numpy(y) for y in merged], [*wanted])

    def test_positions(self, library):
        x = to_library(library, TOKENS)
        flags = np.isin(np.arange(NUM_TOKENS), [0, NUM_TOKENS - 1])
        wanted = qm.quickmerge(TOKENS, 4, protect=flags)
        positions = np.array([0, 8], np.int32)
        for protect in (
            [0, -1],
            (0, 8),
            range(0, 9, 8),
            to_library(library, positions),
            to_library(library, flags),
            to_library(library, np.repeat(flags[None], BATCH, axis=0)),
        ):
            merged = qm.quickmerge(x, 4, protect=protect)
            assert_same([to_numpy(y) for y in merged], [*wanted])
            labels = qm.cluster_tokens(x, 4, protect=protect)
            assert_same([to_numpy(labels)], [wanted.labels])

    def test_while_torch_records(self):
        torch = pytest.importorskip("torch")
        x = torch.tensor(TOKENS, requires_grad=True)
        wanted = qm.quickmerge(TOKENS, 0.5, protect=[0], mask=MASK)
        for mask in (torch.tensor(MASK), torch.tensor(MASK).int()):
            merged = qm.quickmerge(x, 0.5, protect=[0], mask=mask)
            assert_same([y.detach().numpy() for y in merged], [*wanted])
            merged.tokens.sum().backward()
        with pytest.raises(ValueError, match="only 0 and 1"):
            qm.quickmerge(x, 3, mask=torch.arange(9))
        with pytest.raises(TypeError, match=r"got torch\.float32"):
            qm.quickmerge(x, 3, mask=torch.ones(9))
        wanted = qm.quickmerge(TOKENS, 4, protect=[0, -1], mask=MASK)
        for protect in (torch.tensor([0, 6]), np.array([0, -1]), [0, -1]):
            merged = qm.quickmerge(x, 4, protect=protect, mask=torch.tensor(MASK))
            assert_same([y.detach().numpy() for y in merged], [*wanted])
        for function in (qm.quickmerge, qm.cluster_tokens):
            with pytest.raises(TypeError, match="got a list of bools"):
                function(x, 4, protect=[True] + 8 * [False])

    def test_while_torch_compiles(self):
        torch = pytest.importorskip("torch")
        x, mask = torch.tensor(TOKENS), torch.tensor(MASK).int()
        merge = torch.compile(
            lambda x, m: qm.quickmerge(x, 4, protect=[0, -1], mask=m).labels,
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        wanted = qm.quickmerge(TOKENS, 4, protect=[0, -1], mask=MASK).labels
        np.testing.assert_array_equal(merge(x, mask), wanted)
        with pytest.raises(ValueError, match="only 0 and 1"):
            merge(x, 2 * mask)

    def test_while_jax_traces(self):
        jax = pytest.importorskip("jax")
        wanted = qm.quickmerge(TOKENS, 0.5, protect=[0], mask=MASK)
        for mask in (MASK, MASK.astype(np.int32)):
            merged = jax.jit(
                lambda x, m=mask: qm.quickmerge(x, 0.5, protect=[0], mask=m)
            )(TOKENS)
            assert_same([np.asarray(y) for y in merged], [*wanted])
        with pytest.raises(ValueError, match="only 0 and 1"):
            jax.jit(lambda x: qm.quickmerge(x, 3, mask=np.arange(9)))(TOKENS)
        merge = jax.jit(
            lambda x, m: qm.quickmerge(x, 4, protect=[0, -1], mask=m).labels
        )
        wanted = qm.quickmerge(TOKENS, 4, protect=[0, -1], mask=MASK).labels
        np.testing.assert_array_equal(merge(TOKENS, MASK.astype(np.int32)), wanted)
        with pytest.raises(Exception, match="only 0 and 1"):  # from the callback
            np.asarray(merge(TOKENS, 2 * MASK.astype(np.int32)))


class TestProtect:
    @pytest.mark.parametrize("function", [qm.quickmerge, qm.cluster_tokens])
    @pytest.mark.parametrize(
        ("protect", "error", "message"),
        [
            ([9], ValueError, r"positions within 0..8 \(-1 is the last token\), got 9"),
            ([-10], ValueError, "within 0..8 .* got -10"),
            ([0, -9], ValueError, r"distinct positions; .* got \[0, -9\]"),
            # An integer mask would be read as positions.
            (MASK.astype(np.int64), ValueError, r"a mask must be boolean .*astype"),
            (np.ones((3, 9), int), TypeError, r"got int64 of shape \(3, 9\)"),
            ([0.5], TypeError, "integer positions, got float"),
            ([True] * 9, TypeError, "got a list of bools"),
            (MASK.astype(float), TypeError, "got float64"),
            (MASK[:5], ValueError, r"`protect` must have shape .* got \(5,\)"),
            ("0", TypeError, "`protect` must be a boolean array or a list of pos"),
        ],
    )
    def test_errors(self, function, protect, error, message):
        with pytest.raises(error, match=message):
            function(TOKENS, 4, protect=protect)

    def test_the_error_names_the_argument_of_the_caller(self):
        with pytest.raises(ValueError, match="`budget` must be at least 4 for"):
            qm.quickmerge(TOKENS, 3, protect=[0, 1, 2])
        with pytest.raises(ValueError, match="`num_groups` must be at least 4 for"):
            qm.cluster_tokens(TOKENS, 3, protect=[0, 1, 2])

    @pytest.mark.parametrize("traced", [False, True])
    def test_positions_count_tokens_without_padding(self, traced):
        """The first and the last token of each document, wherever its padding is."""
        masks = np.stack([np.arange(9) >= 3, np.arange(9) < 5, np.arange(9) % 2 == 0])
        x = TOKENS
        if traced:
            torch = pytest.importorskip("torch")
            x = torch.tensor(x, requires_grad=True)
        mask = masks if not traced else torch.tensor(masks)
        first, last = [3, 0, 0], [8, 4, 8]
        flags = np.zeros((BATCH, NUM_TOKENS), bool)
        flags[range(BATCH), first] = flags[range(BATCH), last] = True
        wanted = qm.quickmerge(TOKENS, 3, protect=flags, mask=masks)
        merged = qm.quickmerge(x, 3, protect=[0, -1], mask=mask)
        np.testing.assert_array_equal(merged.labels, wanted.labels)
        labels = qm.cluster_tokens(x, 3, protect=[0, -1], mask=mask)
        np.testing.assert_array_equal(labels, wanted.labels)
        message = "has position 5, but sequence 1 has 5 tokens"
        with pytest.raises(ValueError, match=message):
            qm.quickmerge(x, 3, protect=[5], mask=mask)

    @pytest.mark.parametrize("traced", [False, True])
    def test_errors_name_the_argument_of_quickmerge(self, traced):
        x, weights = TOKENS, -SCORES
        if traced:
            torch = pytest.importorskip("torch")
            x, weights = torch.tensor(x, requires_grad=True), torch.tensor(weights)
        for budget, options, message in (
            (3, {"protect": [0, 1, 2]}, "`budget` must be at least 4"),
            (10, {}, r"`budget` must lie in 1..9 \(its tokens\), got 10"),
            (2**70, {}, f"`budget` must lie in .* got {2**70}"),
            (3, {"weights": weights}, "`weights` must be ≥ 0"),
            (3, {"saliency": weights}, "`saliency` must be ≥ 0"),
            (3, {"temperature": 0.0}, "`temperature` must lie in"),
            (3, {"sequence_offset": -1}, "`sequence_offset` must"),
            (3, {"causal": True}, "`causal` applies to `attention`, or"),
        ):
            with pytest.raises(ValueError, match=message):
                qm.quickmerge(x, budget, **options)

    def test_the_budget_counts_protected_tokens(self):
        labels = qm.cluster_tokens(TOKENS, 4, protect=[0, -1])
        assert labels.max() == 3
        for row in labels:
            for position in (0, -1):
                assert np.count_nonzero(row == row[position]) == 1

"""Selection by alignment: the scores, the selected merge, and wrong arguments."""

import ml_dtypes
import numpy as np
import ptx
import pytest
from conftest import assert_close, to_library, to_numpy

import qm_cupy as qm

PRIOR = qm.MLPPrior.init(5, hidden_dim=16, seed=3)  # of width D = 5
WAYS = [{"method": "average"}, {"method": "ward", "budget": 9}, {"method": "single"}]


# Sums of steps: neighbours are similar, as in real sequences, so methods differ.
@pytest.fixture
def walks(rng):
    return rng.standard_normal((6, 30, 5)).cumsum(1)  # (B, N, D)


def score(tokens, merged, alpha, gamma):
    """Return alpha * loss + max(0, error - (1 - gamma)^2) of one sequence.

    Padded groups are left out first.
    """
    valid = merged.tokens[merged.sizes > 0]
    rebuilt = valid[merged.labels[merged.labels >= 0]]
    x = tokens[merged.labels >= 0]
    error = ((x - rebuilt) ** 2).sum() / (x**2).sum()
    loss = qm.alignment_loss(valid, PRIOR).total
    return alpha * loss + max(0.0, error - (1 - gamma) ** 2)


@pytest.mark.parametrize("masked", [False, True])
def test_every_sequence_gets_the_lowest_score(walks, rng, masked):
    mask = rng.random((6, 30)) < 0.8 if masked else None
    got = qm.choose_merge(
        walks, WAYS, PRIOR, alpha=0.02, gamma=0.9, mask=mask, budget=6
    )
    merges = [qm.quickmerge(walks, **{"budget": 6, **w}, mask=mask) for w in WAYS]
    # Each sequence alone, from the merges that `quickmerge` gives for each
    # candidate.
    for b in range(6):
        candidates = [qm.Merged(*(x[b] for x in m)) for m in merges]
        wanted = [score(walks[b], m, 0.02, 0.9) for m in candidates]
        np.testing.assert_allclose(got.scores[:, b], wanted, rtol=1e-6)
        best = candidates[int(np.argmin(wanted))]
        assert got.best[b] == np.argmin(wanted)
        # A candidate with a smaller K is padded to the largest K of all.
        count = len(best.sizes)
        np.testing.assert_array_equal(got.merged.tokens[b, :count], best.tokens)
        np.testing.assert_array_equal(got.merged.sizes[b, :count], best.sizes)
        np.testing.assert_array_equal(got.merged.positions[b, :count], best.positions)
        for name in ("labels", "mass"):
            np.testing.assert_array_equal(
                getattr(got.merged, name)[b], getattr(best, name)
            )
        assert not got.merged.tokens[b, count:].any()
        assert not got.merged.sizes[b, count:].any()
        assert (got.merged.positions[b, count:] == -1).all()
    assert got.best.dtype == np.int32
    assert len(set(got.best.tolist())) > 1  # otherwise one candidate is always best


def test_bfloat16_stays_bfloat16(walks, monkeypatch):
    """CuPy's `where` and `pad` cannot be trusted with it: `where` gives float32."""

    def without_bfloat16(function):
        def call(*args, **options):
            dtypes = [getattr(x, "dtype", None) for x in args]
            assert ml_dtypes.bfloat16 not in dtypes
            return function(*args, **options)

        return call

    tokens = walks.astype(ml_dtypes.bfloat16)
    ptx.install(monkeypatch)
    for name in ("where", "pad"):
        # The interpreted kernels use NumPy for CuPy, so a call of either is seen
        # here.
        monkeypatch.setattr(np, name, without_bfloat16(getattr(np, name)))
    got = qm.choose_merge(tokens, WAYS, PRIOR, alpha=0.02, gamma=0.9, budget=6)
    assert got.merged.tokens.dtype == ml_dtypes.bfloat16
    merges = [qm.quickmerge(tokens, **{"budget": 6, **way}) for way in WAYS]
    assert len(set(got.best.tolist())) > 1
    for b, best in enumerate(got.best):
        # Bits of the merge itself: a detour through float32 would round again.
        wanted = merges[best].tokens[b]
        np.testing.assert_array_equal(got.merged.tokens[b, : len(wanted)], wanted)


def test_weights_of_two_dtypes(walks):
    """The weights of the candidates are float32 and float64; the result is float64."""
    tokens = walks.astype(np.float32)
    states = walks[..., ::-1]  # float64, so the weights of this candidate are too
    ways = [{"method": "contiguous"}, {"hidden_states": states, "method": "ward"}]
    for order in ([0, 1], [1, 0]):
        candidates = [ways[i] for i in order]
        got = qm.choose_merge(tokens, candidates, PRIOR, alpha=0.02, budget=6)
        assert len(set(got.best.tolist())) > 1
        assert got.merged.mass.dtype == np.float64
        for b, best in enumerate(got.best):
            wanted = qm.quickmerge(tokens, 6, **candidates[best])
            np.testing.assert_array_equal(got.merged.mass[b], wanted.mass[b])


# Three equal candidates: the order decides, so that results are reproducible.
def test_equal_scores_go_to_the_first(walks):
    got = qm.choose_merge(walks, [{}, {}, {}], PRIOR, budget=4)
    assert not got.best.any()
    np.testing.assert_array_equal(got.scores[0], got.scores[2])


# One sequence returns without the batch axis.
def test_one_sequence_is_a_batch_of_one(walks):
    alone = qm.choose_merge(walks[2], WAYS, PRIOR, budget=6)
    batch = qm.choose_merge(walks[2:3], WAYS, PRIOR, budget=6)
    assert alone.scores.shape == (3,)
    assert alone.best.shape == ()
    assert_close(alone.scores, batch.scores[:, 0])
    for x, y in zip(alone.merged, batch.merged, strict=True):
        assert_close(x, y[0])


def test_any_library(walks, library):
    wanted = qm.choose_merge(walks, WAYS, PRIOR, budget=6)
    tokens = to_library(library, walks)
    got = qm.choose_merge(tokens, WAYS, PRIOR, budget=6)
    pairs = zip(
        (*got.merged, got.scores, got.best),
        (*wanted.merged, wanted.scores, wanted.best),
        strict=True,
    )
    for x, y in pairs:
        assert type(x) is type(tokens)
        assert to_numpy(x).dtype == y.dtype
        np.testing.assert_array_equal(to_numpy(x), y)


@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_by_kernels(walks, kernels, monkeypatch):
    wanted = qm.choose_merge(walks, WAYS[:2], PRIOR, budget=6)
    ptx.install(monkeypatch)
    prior = qm.MLPPrior(PRIOR.forward, PRIOR.backward)
    with qm.use_kernels(kernels):
        got = qm.choose_merge(walks, WAYS[:2], prior, budget=6)
    np.testing.assert_array_equal(got.best, wanted.best)
    assert_close(got.scores, wanted.scores)
    assert_close(got.merged.tokens, wanted.merged.tokens)


@pytest.mark.parametrize(
    # In each case one argument of a valid call is replaced.
    ("change", "error", "message"),
    [
        ({"candidates": []}, ValueError, "at least one"),
        (
            {"candidates": {"noise_seed": 1}},
            TypeError,
            "sequence of mappings, got dict",
        ),
        ({"candidates": iter([{}])}, TypeError, "sequence of mappings"),
        ({"candidates": [{}, 3]}, TypeError, r"`candidates\[1\]` must be a mapping"),
        ({"candidates": [{"tau": 1}]}, TypeError, r"candidates\[0\]`.*got tau"),
        ({"candidates": [{"mask": None}]}, TypeError, "got mask"),
        ({"candidates": [{"seed": 1}]}, TypeError, "noise_seed.*got seed"),
        ({"candidates": [{"method": "magic"}]}, ValueError, "`method`"),
        ({"budget": 99}, ValueError, "`budget`"),
        ({"alpha": -1}, ValueError, "`alpha`"),
        ({"gamma": 2}, ValueError, "`gamma`"),
        ({"tokens": None}, TypeError, "`tokens`"),
    ],
)
def test_wrong_arguments(walks, change, error, message):
    arguments = {"tokens": walks, "candidates": WAYS, "prior": PRIOR, "budget": 6}
    with pytest.raises(error, match=message):
        qm.choose_merge(**{**arguments, **change})


def test_a_budget_is_needed(walks):
    with pytest.raises(ValueError, match=r"`candidates\[0\]` has no `budget`"):
        qm.choose_merge(walks, WAYS, PRIOR)


# A `Merged` stands for its tokens wherever a prior reads them.
def test_the_loss_of_one_merged_sequence(walks):
    merged = qm.quickmerge(walks[0], 6)
    assert_close(
        qm.alignment_loss(merged, PRIOR), qm.alignment_loss(merged.tokens, PRIOR)
    )
    fitted = PRIOR.fit(merged).predict(walks[0])
    assert_close(fitted, PRIOR.fit(merged.tokens).predict(walks[0]))

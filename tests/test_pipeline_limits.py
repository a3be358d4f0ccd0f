"""`quickmerge` with a limit instead of a budget, and ratios under `torch.compile`."""

import numpy as np
import pytest
from conftest import to_library, to_numpy

import qm_cupy as qm

TOKENS = np.random.default_rng(0).standard_normal((2, 24, 6)).cumsum(axis=1)
TOKENS[1] *= np.linspace(0.1, 2, 6)
LIMITS = [
    {"max_error": 0.05},
    {"max_error": 0.05, "protect": [0, -1]},
    {"max_error": 0.5, "metric": "euclidean"},
    {"max_distance": 0.1},
    {"max_distance": 0.3, "method": "contiguous"},
    {"max_distance": 0.0},
    {"max_distance": float("inf"), "method": "single"},
]


def relative_error(tokens, labels):
    """Return Σ |u - mean|² / N of one sequence's unit tokens u, in plain loops."""
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    total = 0.0
    for group in range(labels.max() + 1):
        members = unit[labels == group]
        total += ((members - members.mean(axis=0)) ** 2).sum()
    return total / len(tokens)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_a_limit_gives_the_groups_of_cluster_tokens(library, limit):
    options = {"method": "ward" if "max_error" in limit else "average"} | limit
    labels = qm.cluster_tokens(TOKENS, **options)
    counts = labels.max(axis=-1) + 1
    wanted = qm.quickmerge(TOKENS, counts, **_without_limits(options))
    merged = qm.quickmerge(to_library(library, TOKENS), **limit)
    np.testing.assert_array_equal(to_numpy(merged.labels), labels)
    for actual, field in zip(merged, wanted, strict=True):
        np.testing.assert_array_equal(to_numpy(actual), field)
    # One sequence has the same groups.
    single = qm.quickmerge(TOKENS[1], **limit)
    np.testing.assert_array_equal(single.labels, labels[1])
    assert single.tokens.shape == (counts[1], 6)


def _without_limits(options):
    return {x: y for x, y in options.items() if x not in ("max_error", "max_distance")}


@pytest.mark.parametrize("max_error", [0.01, 0.05, 0.2])
def test_the_error_is_within_its_limit_and_one_group_fewer_exceeds_it(max_error):
    merged = qm.quickmerge(TOKENS, max_error=max_error)
    for x, labels in zip(TOKENS, merged.labels, strict=True):
        assert relative_error(x, labels) <= max_error
        fewer = qm.cluster_tokens(x, int(labels.max()), method="ward")
        assert relative_error(x, fewer) > max_error


def test_masses_weight_the_error():
    """A heavy token keeps a group of its own that a light token loses."""
    tokens = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    light, heavy = np.array([1.0, 1.0, 0.01]), np.array([1.0, 1.0, 9.0])
    options = {"max_error": 0.02, "weighted_linkage": True}
    assert qm.quickmerge(tokens, weights=light, **options).labels.max() == 0
    assert qm.quickmerge(tokens, weights=heavy, **options).labels.max() == 1


def test_attention_and_limits():
    attention = np.random.default_rng(1).dirichlet(np.ones(24), (2, 3, 24))
    merged = qm.quickmerge(TOKENS, attention=attention, max_error=0.1)
    mass = merged.mass
    labels = qm.cluster_tokens(TOKENS, max_error=0.1, method="ward", mass=mass)
    np.testing.assert_array_equal(merged.labels, labels)


@pytest.mark.parametrize("factor", [0.01, 1.0, 300.0])
def test_the_unit_of_weights_does_not_change_a_distance(factor):
    """The heights of ward grow with the masses, and weights have no unit."""
    attention = np.random.default_rng(1).dirichlet(np.ones(24), (2, 3, 24))
    wanted = qm.quickmerge(TOKENS, max_distance=0.4, attention=attention)
    assert 1 < wanted.valid.sum() < 40
    weights = wanted.mass * factor
    options = {"method": "ward", "weighted_linkage": True, "max_distance": 0.4}
    merged = qm.quickmerge(TOKENS, weights=weights, **options)
    np.testing.assert_array_equal(merged.labels, wanted.labels)
    # Equal weights give the groups of no weights.
    equal = qm.quickmerge(TOKENS, weights=np.full((2, 24), factor), **options)
    plain = qm.quickmerge(TOKENS, max_distance=0.4, method="ward")
    np.testing.assert_array_equal(equal.labels, plain.labels)
    # Padding has no weight, so it does not change the mean.
    mask = np.arange(24) < 17
    masked = qm.quickmerge(TOKENS, weights=weights, mask=mask, **options)
    alone = qm.quickmerge(TOKENS[:, :17], weights=weights[:, :17], **options)
    np.testing.assert_array_equal(masked.labels[:, :17], alone.labels)


class TestTraced:
    @pytest.mark.parametrize("limit", LIMITS[:5], ids=str)
    def test_torch(self, limit):
        torch = pytest.importorskip("torch")
        x = torch.tensor(TOKENS, requires_grad=True)
        wanted = qm.quickmerge(TOKENS, **limit)
        merged = qm.quickmerge(x, **limit)
        np.testing.assert_array_equal(merged.labels, wanted.labels)
        np.testing.assert_array_equal(merged.tokens.detach(), wanted.tokens)
        (gradient,) = torch.autograd.grad(merged.tokens.square().sum(), x)
        assert gradient.isfinite().all()
        assert gradient.any()

    def test_torch_compile(self):
        torch = pytest.importorskip("torch")
        compiled = torch.compile(
            lambda x: qm.quickmerge(x, max_error=0.05), fullgraph=True,
            backend="aot_eager",
        )  # fmt: skip
        for scale in (1.0, 0.5):  # another number of groups, without recompilation
            x = torch.tensor(TOKENS)
            x[..., 0] *= scale
            wanted = qm.quickmerge(x, max_error=0.05)
            for actual, field in zip(compiled(x), wanted, strict=True):
                assert torch.equal(actual, field)

    def test_a_merge_is_applied_while_torch_compiles(self):
        torch = pytest.importorskip("torch")
        x, mask = torch.tensor(TOKENS), torch.arange(24) < torch.tensor([[24], [15]])
        for options in ({"max_error": 0.05}, {"budget": 0.3, "mask": mask}):
            merge = lambda x, o=options: qm.quickmerge(x, **o).apply(x)  # noqa: E731
            compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), merge(x))

    def test_jax(self):
        jax = pytest.importorskip("jax")
        with pytest.raises(TypeError, match=r"needs a `budget` while JAX traces: .*"):
            jax.jit(lambda x: qm.quickmerge(x, max_error=0.1))(TOKENS)

    @pytest.mark.slow("compiles several times")
    @pytest.mark.parametrize("dynamic", [True, None])
    @pytest.mark.parametrize("masked", [False, True])
    def test_shares_of_changing_lengths(self, dynamic, masked):
        torch = pytest.importorskip("torch")

        def merge(x, ratio):
            mask = torch.arange(x.shape[1]) < x.shape[1] - 3 if masked else None
            return qm.quickmerge(x, ratio, mask=mask).tokens

        torch.compiler.reset()
        compiled = torch.compile(
            merge, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for length, ratio in (
            (24, 0.29),
            (17, 0.29),
            (9, 0.29),
            (20, 0.5),
            (24, 1 / 3),
        ):
            x = torch.tensor(TOKENS[:, :length])
            assert torch.equal(compiled(x, ratio), merge(x, ratio))


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({}, ValueError, "exactly one of `budget`, .* got none"),
            ({"budget": 3, "max_error": 0.1}, ValueError,
             "got `budget` and `max_error`"),
            ({"max_distance": 1, "max_error": 0.1}, ValueError,
             "got `max_error` and `max_distance`"),
            ({"max_error": 0.1, "method": "average"}, ValueError,
             '`max_error` is for method="ward", got .* or `budget`'),
            ({"max_distance": 0.1, "method": "bipartite"}, ValueError,
             '`max_distance` is not for method="bipartite".* or `budget`'),
            ({"max_distance": 0.1, "method": "nearest"}, ValueError,
             '`max_distance` is not for method="nearest"'),
            ({"max_error": -1}, ValueError, "`max_error` must lie in"),
            ({"max_distance": float("nan")}, ValueError, "`max_distance` must lie in"),
            ({"max_error": "0.1"}, TypeError, "`max_error` must be a number, got str"),
            ({"budget": 3, "protect": 0}, TypeError, r"such as \[0\], got int"),
        ],
    )  # fmt: skip
    def test_messages(self, options, error, message):
        with pytest.raises(error, match=message):
            qm.quickmerge(TOKENS, **options)

    def test_out_needs_a_budget(self):
        merged = qm.quickmerge(TOKENS, 3)
        with pytest.raises(ValueError, match="`out` needs a `budget`"):
            qm.quickmerge(TOKENS, max_error=0.1, out=merged)


class TestChooseMerge:
    def test_limits_of_candidates(self):
        prior = qm.MLPPrior.init(6)
        candidates = [{"max_error": 0.05}, {"method": "contiguous"}, {"budget": 0.5}]
        choice = qm.choose_merge(TOKENS, candidates, prior, max_distance=0.3)
        wanted = [
            qm.quickmerge(TOKENS, max_error=0.05),
            qm.quickmerge(TOKENS, max_distance=0.3, method="contiguous"),
            qm.quickmerge(TOKENS, 0.5),
        ]
        for i, best in enumerate(choice.best):
            np.testing.assert_array_equal(
                choice.merged.labels[i], wanted[best].labels[i]
            )

    def test_nan_is_not_the_best_score(self):
        class Wild:
            def predict(self, tokens, **_):
                wild = tokens.shape[-2] == 8
                return np.full_like(tokens, np.nan) if wild else 0 * tokens

        candidates = [{"budget": 4}, {"budget": 8}, {"budget": 6}]
        choice = qm.choose_merge(TOKENS, candidates, Wild())
        assert np.isnan(choice.scores[1]).all()
        assert (choice.best == np.argmin(choice.scores[[0, 2]], axis=0) * 2).all()
        with pytest.raises(ValueError, match="NaN for every candidate of sequence 0"):
            qm.choose_merge(TOKENS, [{"budget": 8}], Wild())

    def test_a_candidate_without_an_amount(self):
        with pytest.raises(
            ValueError, match=r"`candidates\[0\]` has no `budget`, `max"
        ):
            qm.choose_merge(TOKENS, [{}], qm.MLPPrior.init(6))

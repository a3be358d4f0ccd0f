"""`match_attention` compared with its equations, and with SciPy's least squares."""

import cache_oracle as oracle
import numpy as np
import pytest
from conftest import to_library, to_numpy
from kernel_cases import dtypes

import qm_cupy as qm

LOW, HIGH = np.exp([-3, 3])


def cache(rng, dtype=np.float64, leading=(2, 2), num_queries=8, num_entries=20):
    """Return query, keys and values; two heads of queries read each key head."""
    heads = leading if len(leading) < 2 else (*leading[:-1], 2 * leading[-1])
    shapes = (
        (*heads, num_queries, 6),
        (*leading, num_entries, 6),
        (*leading, num_entries, 3),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def equations(query, keys, values, kept, bias=None):
    """Return M / y (G T, K) and Y (G T, d_v) of one key head."""
    a = oracle.attention_of_heads(query, keys, bias)
    # The rows of all query heads belong to one system.
    a = a.reshape(-1, len(keys))
    return a[:, kept], a @ np.asarray(values, np.float64)


def heads_of(x, index):
    """Return the query heads (G, T, d) that read a key head."""
    if len(index) < 2:
        return x[index][None]
    return x[(*index[:-1], slice(2 * index[-1], 2 * index[-1] + 2))]


def residual(matrix, weights):
    return float(((matrix @ weights - 1) ** 2).sum())


# 16 equations for 5 unknowns, and for 18: then the solver uses the dual.
@pytest.mark.parametrize("budget", [5, 18])
@pytest.mark.parametrize("leading", [(), (2,), (2, 2), (2, 1, 2)])
def test_solves_its_equations(rng, budget, leading):
    scipy = pytest.importorskip("scipy.optimize")
    query, keys, values = cache(rng, leading=leading)
    bias = rng.standard_normal(keys.shape[:-1])
    scores = rng.random(keys.shape[:-1])
    got = qm.match_attention(
        query, keys, values, budget, scores=scores, bias=bias, ridge=0.01
    )
    # The fit changes biases and values only.
    plain = qm.evict(keys, values, budget, scores=scores, bias=bias)
    for x, y in zip(got[3:], plain[3:], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(got.keys, plain.keys)
    for index in np.ndindex(leading):
        kept = got.positions[index]
        matrix, target = equations(
            heads_of(query, index), keys[index], values[index], kept, bias[index]
        )
        # The bias of a kept entry is its own one plus log w.
        weights = np.exp(got.bias[index] - bias[index][kept])
        assert weights.min() >= LOW * (1 - 1e-9)
        assert weights.max() <= HIGH * (1 + 1e-9)
        ones = np.ones(len(matrix))
        # SciPy's active-set method is exact, but slow.
        best = scipy.lsq_linear(matrix, ones, (LOW, HIGH), method="bvls").x
        # Weights of 1 are the start of the solver.
        start = residual(matrix, np.ones(budget))
        assert residual(matrix, weights) <= residual(matrix, best) + 5e-3 * start
        # The values solve the ridge regression: its gradient is 0.
        # Attention to the kept keys with the fitted bias.
        x = matrix * weights
        x /= x.sum(axis=1, keepdims=True)
        # λ is relative to the squared norm of X.
        strength = 0.01 * (x * x).sum()
        gradient = x.T @ (x @ got.values[index] - target)
        # Half of the gradient of the penalty.
        gradient += strength * (got.values[index] - values[index][kept])
        np.testing.assert_allclose(gradient, 0, atol=1e-9)


def test_all_entries_need_no_fit(rng):
    query, keys, values = cache(rng)
    # Weights of 1 and the values themselves are exact.
    got = qm.match_attention(query, keys, values, 20)
    np.testing.assert_allclose(got.bias, 0, atol=1e-9)
    np.testing.assert_allclose(got.values, values, atol=1e-9)
    np.testing.assert_array_equal(got.keys, keys)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_queries", [8, 30])  # also more than there are keys
def test_queries_of_another_text_attend_to_all_entries(rng, masked, num_queries):
    query, keys, values = cache(rng, num_queries=num_queries)
    mask = None
    if masked:
        mask = np.ones((2, 20), bool)
        mask[0, [0, 7, 19]] = False
    got = qm.match_attention(query, keys, values, 6, mask=mask, causal=False)
    # Causal queries of entries that nothing attends to, which follow the others.
    more = [
        np.concatenate([x, np.ones((2, 2, num_queries, x.shape[-1]))], -2)
        for x in (keys, values)
    ]
    bias = np.zeros((2, 2, 20 + num_queries))
    bias[..., 20:] = -np.inf
    if masked:
        mask = np.concatenate([mask, np.ones((2, num_queries), bool)], -1)
    wanted = qm.match_attention(query, *more, 6, bias=bias, mask=mask)
    # The fit stops after some steps, at which the order of sums shows.
    for x, y in zip(got[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got.positions, wanted.positions)


def test_repeated_entries_by_hand():
    """One of two equal keys is kept: it must count twice, with the mean value."""
    keys = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    values = np.array([[0.0], [4.0], [7.0]])
    scores = np.array([1.0, 0.0, 1.0])
    # Three heads of queries, because one equation has many solutions.
    query = np.array([[[[2.0, 0.0]], [[-1.0, 2.0]], [[0.0, 3.0]]]])
    got = qm.match_attention(
        query, keys[None, None], values[None, None], 2, scores=scores[None, None],
        ridge=1e-9,
    )  # fmt: skip
    np.testing.assert_allclose(np.exp(got.bias[0, 0]), [2, 1], rtol=1e-2)
    np.testing.assert_allclose(got.values[0, 0, :, 0], [2, 7], rtol=1e-2)


@dtypes
def test_is_nearer_to_attention_than_eviction(rng, dtype):
    query, keys, values = cache(rng, dtype, num_queries=64, num_entries=200)
    # Other queries than those of the fit, of the same distribution.
    later = rng.standard_normal((2, 4, 10, 6)).astype(dtype)
    exact, z = qm.attend(later, keys, values)
    scores = qm.score_keys(query, keys, how="rms")
    fitted = qm.match_attention(query, keys, values, 50)
    assert fitted.keys.dtype == fitted.values.dtype == dtype
    assert fitted.bias.dtype == (np.float64 if dtype == np.float64 else np.float32)
    kept = qm.evict(keys, values, 50, scores=scores)
    np.testing.assert_array_equal(fitted.keys, kept.keys)  # "rms" is the default
    errors = []
    for short in (fitted, kept):
        output, own = qm.attend(later, short.keys, short.values, bias=short.bias)
        difference = np.linalg.norm((output.astype(float) - exact).ravel())
        errors.append((difference, np.abs(own - z).mean()))
    # The output, then log-sum-exp.
    assert errors[0][0] < 0.6 * errors[1][0]
    assert errors[0][1] < 0.5 * errors[1][1]


@pytest.mark.parametrize("where", [[0, 1], [18, 19], [0, 9, 14, 19]])
def test_mask_has_the_result_of_removing_the_padding(rng, where):
    query, keys, values = cache(rng)
    mask = np.ones((2, 20), bool)
    # Padding before, after and between the entries.
    mask[0, where] = False
    keys[0][:, where], values[0][:, where] = np.nan, np.inf
    query[0][:, [j - 12 for j in where if j >= 12]] = np.nan
    got = qm.match_attention(query, keys, values, 6, mask=mask, sinks=1, recent=1)
    present = mask[0]
    short = qm.match_attention(
        query[:1][:, :, present[12:]], keys[:1][:, :, present],
        values[:1][:, :, present], 6, sinks=1, recent=1,
    )  # fmt: skip
    for name in ("keys", "values", "bias", "sizes"):
        np.testing.assert_allclose(
            getattr(got, name)[0], getattr(short, name)[0], rtol=1e-9, atol=1e-12
        )
    # Positions count the padding.
    np.testing.assert_array_equal(
        got.positions[0], np.flatnonzero(present)[short.positions[0]]
    )


def test_heads_may_keep_different_numbers(rng):
    query, keys, values = cache(rng)
    got = qm.match_attention(query, keys, values, np.array([3, 8]))
    np.testing.assert_array_equal(got.sizes.sum(axis=-1), [[3, 8], [3, 8]])
    assert np.isneginf(got.bias[:, 0, 3:]).all()
    assert not got.values[:, 0, 3:].any()
    # A head does not depend on the budget of the others.
    alone = qm.match_attention(query[:, :2], keys[:, :1], values[:, :1], 3)
    np.testing.assert_allclose(got.values[:, :1, :3], alone.values, atol=1e-12)


def test_absent_entries_are_not_read(rng):
    query, keys, values = cache(rng, leading=(1,))
    bias = np.zeros((1, 20))
    # Such an entry is padding, as in a `KVCache`.
    bias[0, 4] = -np.inf
    short = np.delete(np.arange(20), 4)
    keys[0, 4], values[0, 4] = np.nan, np.nan
    got = qm.match_attention(query, keys, values, 6, bias=bias)
    wanted = qm.match_attention(query, keys[:, short], values[:, short], 6)
    np.testing.assert_allclose(got.values, wanted.values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.bias, wanted.bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_huge_inputs_have_finite_results(rng, dtype):
    huge = 0.9 * float(np.finfo(dtype).max)
    arrays = (np.clip(x, -1, 1) * dtype(huge) for x in cache(rng, dtype))
    got = qm.match_attention(*arrays, 6)
    assert all(np.isfinite(x).all() for x in got[:3])


@dtypes
def test_fitted_values_do_not_overflow(dtype):
    """Fitted values of ±6e4 would exceed the range of float16."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        query, keys, values = cache(rng, leading=(), num_queries=6, num_entries=12)
        # Nearly the largest numbers of float16.
        values = np.where(values > 0, 6.5e4, -6.5e4)
        arrays = (x.astype(dtype) for x in (query, keys, values))
        got = qm.match_attention(*arrays, 3, ridge=1e-9)
        assert np.isfinite(got.values.astype(np.float64)).all()


def test_results_are_in_the_library_of_the_input(rng, library):
    arrays = cache(rng, np.float32)
    got = qm.match_attention(*(to_library(library, x) for x in arrays), 6)
    wanted = qm.match_attention(*arrays, 6)
    for x, y in zip(got, wanted, strict=True):
        assert type(x) is type(to_library(library, arrays[0]))
        np.testing.assert_array_equal(to_numpy(x), y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ridge": 0}, ValueError, "`ridge` must lie in"),
        ({"ridge": "1"}, TypeError, "`ridge` must be"),
        ({"budget": 21}, ValueError, "`budget` must lie in 1..20"),
        ({"budget": None}, TypeError, "`budget` must be an integer"),
        ({"scores": np.ones(19)}, ValueError, "`scores` must have shape"),
        ({"scores": np.ones(20, int)}, TypeError, "`scores` must be float16"),
        ({"scores": np.full(20, np.nan)}, ValueError, "`scores` must be finite"),
        ({"query": np.ones((21, 6))}, ValueError, "T ≤ N = 20"),
        ({"query": np.full((8, 6), np.nan)}, ValueError, "`query` must be finite"),
        ({"query": None}, TypeError, "`query` must be"),
        ({"keys": np.full((20, 6), np.nan)}, ValueError, "`keys` must be finite"),
        ({"protect": range(5), "budget": 4}, ValueError, "must be at least"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {
        "query": np.ones((8, 6)), "keys": np.ones((20, 6)), "values": np.ones((20, 3)),
        "budget": 6,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        qm.match_attention(**{**arguments, **change})

"""`score_keys` compared with float64 loops."""

import cache_oracle as oracle
import numpy as np
import pytest
from conftest import assert_close, to_library, to_numpy
from kernel_cases import dtypes

import qm_cupy as qm
from qm_cupy.caches.score_keys import HOWS

hows = pytest.mark.parametrize("how", HOWS)


def arrays(rng, dtype=np.float64, leading=(2,), group=2, num_queries=5, num_keys=9):
    """Return query, keys and values; `group` heads of queries read each key head."""
    # Only layouts with an axis of heads may have more of them.
    queries = (*leading[:-1], leading[-1] * group) if len(leading) > 1 else leading
    shapes = (
        (*queries, num_queries, 6),
        (*leading, num_keys, 6),
        (*leading, num_keys, 3),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def score(query, keys, values, how, **options):
    if how == "expected":
        options["values"] = values
    return qm.score_keys(query, keys, how=how, **options)


def wanted(query, keys, values, how, bias=None):
    """Return the scores of one key head, which reads query heads (G, T, d)."""
    function = getattr(oracle, f"score_{how}")
    if how == "expected":
        return function(query, keys, values, bias)
    return function(query, keys, bias)


@hows
@dtypes
def test_matches_the_oracle(rng, how, dtype):
    query, keys, values = arrays(rng, dtype, (2, 2))
    # A bias adds to the scores of a key for every query.
    bias = rng.standard_normal((2, 2, 9))
    got = score(query, keys, values, how, bias=bias)
    assert got.shape == (2, 2, 9)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    for b, h in np.ndindex(2, 2):
        # Query heads 2 h and 2 h + 1 read key head h.
        heads = query[b, 2 * h : 2 * h + 2]
        one = wanted(heads, keys[b, h], values[b, h], how, bias[b, h])
        assert_close(got[b, h], one, dtype)


@pytest.mark.parametrize(
    ("how", "num_queries", "num_keys"), [("snapkv", 80, 90), ("rms", 300, 301)]
)
def test_only_the_last_queries_count(rng, how, num_queries, num_keys):
    query, keys, values = arrays(rng, np.float64, (1, 1), 1, num_queries, num_keys)
    got = score(query, keys, values, how)
    # Earlier queries must not change anything.
    last = query[:, :, -64:] if how == "snapkv" else query[:, :, -256:]
    np.testing.assert_allclose(
        got, score(last, keys, values, how), rtol=1e-12, atol=1e-15
    )
    # The oracle takes the last queries itself.
    assert_close(got[0, 0], wanted(query[0], keys[0, 0], None, how))


def test_scores_by_hand():
    # Each query attends equally to the keys it sees: 1/2 of 2 keys, then 1/3 of 3.
    keys = np.zeros((3, 2))
    query = np.ones((2, 2))
    np.testing.assert_allclose(qm.score_keys(query, keys), [5 / 12, 5 / 12, 1 / 3])
    np.testing.assert_allclose(qm.score_keys(query, keys, how="last"), 3 * [1 / 3])
    rms = np.sqrt(np.array([1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9]) / 2)
    np.testing.assert_allclose(qm.score_keys(query, keys, how="rms"), rms)
    # The entries of both queries get the score of the first one, a fifth of 5 / 12.
    np.testing.assert_allclose(
        qm.score_keys(query, keys, how="snapkv"), 3 * [(5 / 12) / 5]
    )
    # Equal queries have no covariance, so attention is 1/3.
    values = np.array([[1.0], [2.0], [0.0]])
    expected = (1 / 3 + 0.02 / 3) * values[:, 0]
    np.testing.assert_allclose(
        qm.score_keys(query, keys, values=values, how="expected"), expected
    )


@hows
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_queries", [5, 30])  # also more than there are keys
def test_queries_of_another_text_attend_to_all_entries(rng, how, masked, num_queries):
    query, keys, values = arrays(rng, np.float64, (2, 2), num_queries=num_queries)
    bias = rng.standard_normal((2, 2, 9))
    mask = None
    if masked:
        mask = np.ones((2, 9), bool)
        mask[0, [0, 4, 8]] = False
        keys[0, :, [0, 4, 8]] = values[0, :, [0, 4, 8]] = np.nan
    got = score(query, keys, values, how, bias=bias, mask=mask, causal=False)
    if how == "expected":  # queries and keys have no order in its oracle
        for b, h in np.ndindex(2, 2):
            present = slice(None) if mask is None else mask[b]
            entries = (x[b, h][present] for x in (keys, values))
            one = wanted(
                query[b, 2 * h : 2 * h + 2], *entries, how, bias[b, h][present]
            )
            assert_close(got[b, h][present], one)
        return
    # Causal queries of entries that nothing attends to, which follow the others.
    absent = np.full((2, 2, num_queries), -np.inf)
    longer = np.concatenate([keys, np.ones((2, 2, num_queries, 6))], -2)
    if mask is not None:
        mask = np.concatenate([mask, np.ones((2, num_queries), bool)], -1)
    causal = qm.score_keys(
        query, longer, how=how, bias=np.concatenate([bias, absent], -1), mask=mask
    )
    assert_close(got, causal[..., :9])


@hows
@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (2, 3, 2)])
def test_every_layout_is_a_stack_of_heads(rng, how, leading):
    query, keys, values = arrays(rng, leading=leading)
    got = score(query, keys, values, how)
    assert got.shape == keys.shape[:-1]
    for index in np.ndindex(leading):
        # Without an axis of heads, the index of a sequence is that of its head.
        heads = index
        if len(leading) > 1:
            heads = *index[:-1], slice(2 * index[-1], 2 * index[-1] + 2)
        one = query[heads].reshape(-1, *query.shape[-2:])
        assert_close(got[index], wanted(one, keys[index], values[index], how))


@hows
@pytest.mark.parametrize("where", [[0, 1], [7, 8], [0, 4, 5, 8]])
def test_mask_has_the_result_of_removing_the_padding(rng, how, where):
    query, keys, values = arrays(rng, np.float64, (2, 2))
    mask = np.ones((2, 9), bool)
    mask[0, where] = False
    # A read of padding would make the scores NaN.
    keys[0][:, where], values[0][:, where] = np.nan, np.inf
    padded_rows = [j - 4 for j in where if j >= 4]  # queries are those of 4..8
    query[0][:, padded_rows] = np.nan
    # Queries of padding are left out as well.
    got = score(query, keys, values, how, mask=mask)
    assert not got[0][:, where].any()
    present, rows = mask[0], mask[0, 4:]
    # The same sequence without the padded entries and queries.
    short = [query[:1, :, rows], keys[:1][:, :, present], values[:1][:, :, present]]
    assert_close(got[0][:, present], score(*short, how)[0])
    assert_close(got[1], score(query[1:], keys[1:], values[1:], how)[0])


@hows
def test_results_are_in_the_library_of_the_input(rng, how, library):
    inputs = arrays(rng, np.float32, (2, 2))
    got = score(*(to_library(library, x) for x in inputs), how)
    assert type(got) is type(to_library(library, inputs[0]))
    np.testing.assert_array_equal(to_numpy(got), score(*inputs, how))


@hows
def test_layout_of_the_memory_does_not_change_bits(rng, how):
    inputs = arrays(rng, np.float32, (2, 2))
    # Every second element of a longer row.
    strided = (np.repeat(x, 2, axis=-1)[..., ::2] for x in inputs)
    np.testing.assert_array_equal(score(*strided, how), score(*inputs, how))


@hows
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_huge_inputs_have_finite_scores(rng, how, dtype):
    huge = 0.9 * float(np.finfo(dtype).max)
    query, keys, values = (
        # Products of such numbers overflow float32.
        np.clip(x, -1, 1) * dtype(huge)
        for x in arrays(rng, dtype, (2, 2))
    )
    got = score(query, keys, values, how)
    assert np.isfinite(got).all()
    assert got.min() >= 0


@hows
def test_one_entry(rng, how):
    query, keys, values = arrays(rng, num_queries=1, num_keys=1)
    got = score(query, keys, values, how)
    # All attention is that of one entry; 1 + 0.02 of the expected one.
    size = np.linalg.norm(values, axis=-1) * 1.02 if how == "expected" else 1
    assert_close(got, np.ones((2, 1)) * size)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"how": "best"}, ValueError, "`how` must be"),
        ({"how": "expected"}, TypeError, "needs `values`"),
        ({"values": np.ones((9, 3))}, TypeError, "does not use `values`"),
        ({"query": np.ones((10, 6))}, ValueError, "T ≤ N = 9"),
        ({"query": np.ones((5, 7))}, ValueError, "`query` must have shape"),
        ({"query": np.full((5, 6), np.nan)}, ValueError, "`query` must be finite"),
        ({"keys": np.full((9, 6), np.inf)}, ValueError, "`keys` must be finite"),
        ({"keys": np.ones((9, 6), int)}, TypeError, "`keys` must be float16"),
        ({"query": np.ones((5, 6), np.float32)}, TypeError, "float64 like `keys`"),
        ({"bias": np.full(9, np.nan)}, ValueError, "finite or -inf"),
        ({"mask": np.zeros(9, bool)}, ValueError, "at least one token"),
        ({"scale": 0.0}, ValueError, "`scale` must lie in"),
        ({"causal": 1}, TypeError, "`causal` must be True or False"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    arguments = {"query": np.ones((5, 6)), "keys": np.ones((9, 6)), **change}
    with pytest.raises(error, match=message):
        qm.score_keys(**arguments)

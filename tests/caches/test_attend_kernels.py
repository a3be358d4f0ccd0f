"""The kernels of attention with biases, of its columns, and of rotations.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). The expected values are float64 loops (cache_oracle.py).
"""

import cache_oracle as oracle
import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, mask_of, optimized, random, sizes
from seam import cuda

import qm_cupy as qm
from qm_cupy.caches.attention_columns import attention_columns
from qm_cupy.caches.rotary import rotate

pytestmark = pytest.mark.usefixtures("kernels")
# The head widths of queries and of values for each N.
WIDTHS = {1: (1, 1), 31: (17, 3), 32: (64, 64), 33: (100, 40), 127: (8, 72),
          128: (16, 33), 129: (33, 16), 257: (24, 8)}  # fmt: skip


def inputs(dtype, num_keys, num_queries, group=2):
    """Return arrays of 2 sequences with 2 heads of keys: query, keys, values, bias."""
    dim, value_dim = WIDTHS.get(num_keys, (16, 8))
    query = random((2, 2 * group, num_queries, dim), dtype, 1)
    keys = random((2, 2, num_keys, dim), dtype, 2)
    values = random((2, 2, num_keys, value_dim), dtype, 3)
    bias = random((2, 2, num_keys), np.float32, 4)
    if num_keys > 1:  # a key without attention
        bias[:, 0, num_keys // 2] = -np.inf
    return query, keys, values, bias


def check(got, query, keys, values, bias, mask, causal):
    """Compare with the oracle, head by head, without padding."""
    output, z = got
    num_queries, num_keys = query.shape[-2], keys.shape[-2]
    group = query.shape[1] // keys.shape[1]
    for b, h in np.ndindex(query.shape[:2]):
        valid = np.ones(num_keys, bool) if mask is None else mask[b]
        of_key = b, h // group
        # The oracle is slow, so look at three queries.
        for i in {0, num_queries // 2, num_queries - 1}:
            end = num_keys - num_queries + i + 1 if causal else num_keys
            seen = np.flatnonzero(valid[:end])
            if not len(seen):
                assert not output[b, h, i].any()
                assert np.isneginf(z[b, h, i])
                continue
            wanted, wanted_z = oracle.attend(
                query[b, h, i : i + 1], keys[of_key][seen], values[of_key][seen],
                None if bias is None else bias[of_key][seen],
            )  # fmt: skip
            column = "computed" if query.dtype == np.float32 else "stored"
            assert_close(output[b, h, i], wanted[0], query.dtype, column)
            assert_close(z[b, h, i], wanted_z[0], query.dtype)


@dtypes
@sizes
def test_attend(dtype, num_tokens):
    num_queries = max(1, num_tokens // 16)
    query, keys, values, bias = inputs(dtype, num_tokens, num_queries)
    mask = mask_of(3, num_tokens)[:2]
    for causal, b, m in ((False, None, None), (True, bias, None), (True, bias, mask)):
        if m is not None and not m.any(axis=-1).all():
            m = None
        got = qm.attend(query, keys, values, bias=b, causal=causal, mask=m)
        check(got, query, keys, values, b, m, causal)


@optimized
@dtypes
@pytest.mark.parametrize(("num_keys", "num_queries"), [(513, 1), (1300, 3)])
def test_blocks_for_the_parts_of_the_keys_do_not_change_bits(
    dtype, num_keys, num_queries, monkeypatch, launches
):
    query, keys, values, bias = inputs(dtype, num_keys, num_queries)
    mask = np.ones((2, num_keys), bool)
    mask[0, :520], mask[1, 500:] = False, False  # parts without keys
    for options in ({}, {"bias": bias, "causal": True}, {"bias": bias, "mask": mask}):
        launches.clear()
        monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(1, 48 << 10))
        whole = qm.attend(query, keys, values, **options)
        assert "join_parts" not in launches
        monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(132, 48 << 10))
        parts = qm.attend(query, keys, values, **options)
        assert "join_parts" in launches
        for x, y in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(x, y)
    check(parts, query, keys, values, bias, mask, False)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_and_absent_keys(causal):
    """NaN under the mask is not read, and a least float as a bias is that of no key."""
    query, keys, values, bias = inputs(np.float32, 300, 5)
    mask = np.random.default_rng(5).random((2, 300)) < 0.6
    bias[:, 1, ::3] = np.finfo(np.float32).min
    for x in (keys, values, bias):
        x[np.broadcast_to(~mask[:, None], x.shape[:3])] = np.nan
    options = {"bias": bias, "mask": mask, "causal": causal}
    got = qm.attend(query, keys, values, **options)
    for b, h in np.ndindex(2, 4):
        seen = mask[b] & ~(bias[b, h // 2] < -1e30)
        for i in (0, 4):
            rows = seen & (np.arange(300) <= (295 + i if causal else 299))
            one = (x[b, h // 2][rows] for x in (keys, values, bias))
            wanted, wanted_z = oracle.attend(query[b, h, i : i + 1], *one)
            assert_close(got[0][b, h, i], wanted[0], np.float32, "computed")
            assert_close(got[1][b, h, i], wanted_z[0], np.float32)


@pytest.mark.parametrize("name", ["attend", "attention_columns"])
def test_a_head_has_the_bits_it_has_alone(name):
    """Layers, sequences and heads of queries change only where the rows are."""
    rng = np.random.default_rng(3)
    query = rng.standard_normal((2, 3, 6, 2, 20)).astype(np.float32)  # (L, B, H, T, d)
    keys, values = rng.standard_normal((2, 2, 3, 2, 70, 20)).astype(np.float32)
    bias = rng.standard_normal((2, 3, 2, 70)).astype(np.float32)

    def call(q, k, v, b):
        output, z = qm.attend(q, k, v, bias=b, causal=True)
        if name == "attend":
            return output, z
        return (qm_columns(q, k, z, b, True, 2),)

    whole = call(query, keys, values, bias)
    for n, s, h in np.ndindex(2, 3, 2):
        heads = slice(3 * h, 3 * h + 3)
        one = (x[n, s : s + 1, h : h + 1] for x in (keys, values, bias))
        for x, y in zip(whole, call(query[n, s : s + 1, heads], *one), strict=True):
            of_head = x[n, s, heads] if name == "attend" else x[n, s, h : h + 1]
            np.testing.assert_array_equal(of_head, y[0])


@dtypes
def test_attend_of_wide_heads(dtype):
    """A head wider than the optimized kernel can hold runs the basic kernel."""
    query, keys = random((3, 300), dtype, 1, 0.1), random((40, 300), dtype, 2)
    values = random((40, 290), dtype, 3)
    output, z = qm.attend(query, keys, values)
    wanted, wanted_z = oracle.attend(query, keys, values)
    assert_close(output, wanted, dtype, "computed" if dtype == np.float32 else "stored")
    assert_close(z, wanted_z, dtype)


@dtypes
@sizes
def test_attention_columns(dtype, num_tokens):
    num_queries = max(1, num_tokens // 16)
    query, keys, values, bias = inputs(dtype, num_tokens, num_queries)
    # Power 0 is the largest attention.
    for power, causal, b in (
        (1, True, None), (2, False, bias), (0, True, bias), (0, False, None),
    ):  # fmt: skip
        _, z = qm.attend(query, keys, values, bias=b, causal=causal)
        z[0, 0] = -np.inf  # this head's queries do not count
        got = qm_columns(query, keys, z, b, causal, power)
        for s, h in np.ndindex(keys.shape[:2]):
            wanted = 0
            for g in range(2):
                if (s, 2 * h + g) == (0, 0):
                    continue
                q = query[s, 2 * h + g]
                own = np.zeros(num_tokens) if b is None else b[s, h]
                # The scores of one head of queries, and the sums of its rows.
                rows = np.array(
                    oracle.scores(q, keys[s, h], own, q.shape[1] ** -0.5, causal)
                )
                sums = np.array([oracle.log_sum_exp(row) for row in rows])
                weights = np.exp(rows - sums[:, None])
                if power:
                    wanted = wanted + (weights**power).sum(axis=0)
                else:
                    wanted = np.maximum(wanted, weights.max(axis=0))
            np.testing.assert_allclose(got[s, h], wanted, rtol=2e-4, atol=1e-6)


def qm_columns(query, keys, z, bias, causal, power):
    return attention_columns(
        query, keys, z, bias=bias, causal=causal, scale=query.shape[-1] ** -0.5,
        power=power,
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_rotate(dtype, interleaved, pairs):
    x = random((2, 3, 40, 17), dtype, 1)
    positions = np.random.default_rng(2).integers(0, 500, (2, 3, 40))
    inv_freq = 10_000.0 ** -(np.arange(pairs) / pairs)
    got = rotate(x, positions, inv_freq, interleaved, 1.5)
    assert got.dtype == dtype
    for index in np.ndindex(2, 3):
        wanted = oracle.rotate(x[index], positions[index], inv_freq, interleaved)
        wanted[:, : 2 * pairs] *= 1.5
        column = "stored" if np.dtype(dtype).itemsize == 2 else "computed"
        assert_close(got[index], wanted, dtype, column)
    back = rotate(
        got.astype(np.float64), positions, inv_freq, interleaved, 1.5, inverse=True
    )
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}
    np.testing.assert_allclose(
        back, x.astype(float), atol=tolerance[np.dtype(dtype).name]
    )

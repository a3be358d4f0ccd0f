"""`attend`, `join_attention` and `fold_bias` compared with float64 loops."""

import cache_oracle as oracle
import ml_dtypes
import numpy as np
import pytest
from conftest import assert_close, to_library, to_numpy
from kernel_cases import dtypes

import qm_cupy as qm


def head(rng, dtype=np.float64, num_queries=5, num_keys=9, dim=6, value_dim=3):
    shapes = (num_queries, dim), (num_keys, dim), (num_keys, value_dim)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


class TestAttend:
    @dtypes
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("num_queries", [1, 5, 9])
    def test_matches_the_oracle(self, rng, dtype, causal, num_queries):
        query, keys, values = head(rng, dtype, num_queries)
        bias = rng.standard_normal(9)
        # This key gets no attention.
        bias[2] = -np.inf
        output, z = qm.attend(query, keys, values, bias=bias, causal=causal)
        wanted, wanted_z = oracle.attend(query, keys, values, bias, causal=causal)
        assert output.dtype == dtype
        assert z.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert_close(
            output, wanted, dtype, "stored" if dtype != np.float32 else "computed"
        )
        assert_close(z, wanted_z, dtype)

    def test_a_bias_of_log_n_counts_a_key_n_times(self, rng):
        query, keys, values = head(rng)
        # Key j occurs j + 1 times.
        repeated = np.repeat(np.arange(9), np.arange(1, 10))
        wanted, wanted_z = qm.attend(query, keys[repeated], values[repeated])
        got, z = qm.attend(query, keys, values, bias=np.log(np.arange(1, 10)))
        assert_close(got, wanted)
        assert_close(z, wanted_z)

    @pytest.mark.parametrize("leading", [(), (3,), (2, 2), (2, 3, 2)])
    def test_every_layout_is_a_stack_of_heads(self, rng, leading):
        heads = leading[-1:] if len(leading) > 1 else ()
        query = rng.standard_normal((*leading[: len(leading) - len(heads)],
                                     *(2 * h for h in heads), 4, 6))  # fmt: skip
        keys, values = rng.standard_normal((2, *leading, 7, 6))
        output, z = qm.attend(query, keys, values, causal=True)
        assert output.shape == query.shape
        assert z.shape == query.shape[:-1]
        for index in np.ndindex(query.shape[:-2]):
            # Two heads of queries read each head of keys.
            # The head of keys that this head of queries reads.
            of_key = (*index[:-1], index[-1] // 2) if heads else index
            one = qm.attend(query[index], keys[of_key], values[of_key], causal=True)
            np.testing.assert_array_equal(output[index], one[0])
            np.testing.assert_array_equal(z[index], one[1])

    @pytest.mark.parametrize("causal", [False, True])
    def test_mask_has_the_result_of_removing_the_padding(self, rng, causal):
        query = rng.standard_normal((2, 4, 3, 6))
        keys, values = rng.standard_normal((2, 2, 2, 9, 6))
        mask = np.ones((2, 9), bool)
        mask[0, [0, 4, 5]] = False
        # Only padding has these values, so none of them may be read.
        keys[0, :, [0, 4]], values[0, :, 5] = np.nan, np.inf
        output, z = qm.attend(query, keys, values, mask=mask, causal=causal)
        for b in range(2):
            present = mask[b]
            one, one_z = qm.attend(
                query[b : b + 1], keys[b : b + 1][..., present, :],
                values[b : b + 1][..., present, :], causal=causal,
            )  # fmt: skip
            np.testing.assert_array_equal(output[b], one[0])
            np.testing.assert_array_equal(z[b], one_z[0])

    def test_a_query_without_keys_has_output_0(self, rng):
        query, keys, values = head(rng)
        bias = np.full(9, -np.inf)
        output, z = qm.attend(query, keys, values, bias=bias)
        assert not output.any()
        assert np.isneginf(z).all()

    def test_the_least_float_as_a_bias_is_that_of_no_key(self, rng):
        """Masks of models have it instead of -inf."""
        query, keys, values = head(rng, np.float32)
        bias = np.full(9, np.finfo(np.float32).min, np.float32)
        output, z = qm.attend(query, keys, values, bias=bias)
        assert not output.any()
        assert np.isneginf(z).all()
        bias[3] = 0
        output, z = qm.attend(query, keys, values, bias=bias)
        np.testing.assert_allclose(output, np.tile(values[3], (5, 1)), rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_huge_scores_select_the_largest(self, dtype):
        query = np.full((1, 4), 6e4 if dtype == np.float16 else 3e38, dtype)
        # The products overflow the dtype; their difference does not matter.
        keys = np.stack([query[0], query[0] / 2]).astype(dtype)
        output, z = qm.attend(query, keys, np.eye(2, dtype=dtype))
        np.testing.assert_array_equal(output, [[1, 0]])
        assert not np.isnan(z).any()

    def test_many_keys_need_several_blocks(self, rng):
        query, keys, values = head(rng, num_queries=700, num_keys=900)
        output, z = qm.attend(query, keys, values, causal=True)
        # The first row, one in a later block, and the last one.
        rows = [0, 300, 699]
        for i in rows:
            end = 900 - 700 + i + 1
            wanted, wanted_z = oracle.attend(query[i : i + 1], keys[:end], values[:end])
            assert_close(output[i], wanted[0])
            assert_close(z[i], wanted_z[0])

    def test_layout_of_the_memory_does_not_change_bits(self, rng):
        query, keys, values = head(rng, np.float32)
        wanted = qm.attend(query, keys, values)
        # Every second element of longer rows.
        strided = (np.repeat(x, 2, axis=1)[:, ::2] for x in (query, keys, values))
        for x, y in zip(qm.attend(*strided), wanted, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_results_are_in_the_library_of_the_input(self, rng, library):
        query, keys, values = head(rng, np.float32)
        arrays = [to_library(library, x) for x in (query, keys, values)]
        output, z = qm.attend(*arrays)
        assert type(output) is type(arrays[0])
        wanted, wanted_z = qm.attend(query, keys, values)
        np.testing.assert_array_equal(to_numpy(output), wanted)
        np.testing.assert_array_equal(to_numpy(z), wanted_z)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"query": np.ones((10, 6)), "causal": True}, ValueError, "T ≤ N = 9"),
            ({"query": np.ones((5, 7))}, ValueError, "`query` must have shape"),
            ({"query": np.ones((5, 6), np.float32)}, TypeError, "float64 like `keys`"),
            ({"values": np.ones((8, 3))}, ValueError, "`values` must have the axes"),
            ({"values": np.ones((9, 3), np.float32)}, TypeError, "`values` must be"),
            ({"bias": np.ones(8)}, ValueError, "`bias` must have shape"),
            ({"bias": np.full(9, np.nan)}, ValueError, "finite or -inf"),
            ({"bias": np.full(9, np.inf)}, ValueError, "finite or -inf"),
            ({"bias": np.ones(9, int)}, TypeError, "`bias` must be float16"),
            ({"keys": np.full((9, 6), np.nan)}, ValueError, "`keys` must be finite"),
            ({"mask": np.zeros(9, bool)}, ValueError, "at least one token"),
            ({"scale": 0}, ValueError, "`scale` must lie in"),
            ({"causal": 1}, TypeError, "`causal` must be True or False"),
        ],
    )
    def test_wrong_input_is_named(self, rng, change, error, message):
        query, keys, values = head(rng)
        arguments = {"query": query, "keys": keys, "values": values, **change}
        with pytest.raises(error, match=message):
            qm.attend(**arguments)


class TestJoinAttention:
    @dtypes
    def test_parts_give_the_result_of_the_whole(self, rng, dtype):
        query, keys, values = head(rng, dtype)
        bias = rng.standard_normal(9)
        # All keys at once.
        wanted, wanted_z = oracle.attend(query, keys, values, bias)
        parts = [slice(0, 4), slice(4, 5), slice(5, 9)]
        results = [qm.attend(query, keys[p], values[p], bias=bias[p]) for p in parts]
        output, z = qm.join_attention(*zip(*results, strict=True))
        assert output.dtype == dtype
        assert_close(z, wanted_z, dtype)
        # Each part is rounded once more.
        tolerance = {
            "float16": 2e-3,
            "bfloat16": 2e-2,
            "float32": 2e-6,
            "float64": 1e-12,
        }
        np.testing.assert_allclose(
            output.astype(float), wanted, atol=tolerance[np.dtype(dtype).name]
        )

    def test_parts_without_keys_do_not_count(self, rng):
        query, keys, values = head(rng)
        one = qm.attend(query, keys, values)
        none = qm.attend(query, keys, values, bias=np.full(9, -np.inf))
        for x, y in zip(
            qm.join_attention(*zip(none, one, strict=True)), one, strict=True
        ):
            np.testing.assert_array_equal(x, y)
        output, z = qm.join_attention(*zip(none, none, strict=True))
        assert not output.any()
        assert np.isneginf(z).all()

    def test_wrong_input_is_named(self, rng):
        output, z = qm.attend(*head(rng))
        with pytest.raises(ValueError, match="one array for each part, got 2 and 1"):
            qm.join_attention([output, output], [z])
        with pytest.raises(ValueError, match="got 0 and 0"):
            qm.join_attention([], [])
        with pytest.raises(ValueError, match=r"`log_sum_exps\[1\]` must have shape"):
            qm.join_attention([output, output], [z, z[:3]])
        with pytest.raises(TypeError, match=r"`outputs\[1\]` must be float64"):
            qm.join_attention([output, output.astype(np.float32)], [z, z])
        with pytest.raises(ValueError, match="finite or -inf, got nan"):
            qm.join_attention([output], [z * np.nan])


class TestFoldBias:
    @dtypes
    @pytest.mark.parametrize("scale", [None, 0.02, 3.0])
    def test_products_contain_the_bias(self, rng, dtype, scale):
        query, keys, _ = head(rng, dtype, dim=16)
        bias = rng.normal(scale=3, size=9)
        wide_query, wide_keys = qm.fold_bias(query, keys, bias, scale=scale)
        assert wide_query.shape[1] == wide_keys.shape[1] == 24
        assert wide_keys.dtype == dtype
        c = 16**-0.5 if scale is None else scale
        got = wide_query.astype(float) @ wide_keys.astype(float).T * c
        wanted = query.astype(float) @ keys.astype(float).T * c + bias
        bits = {"float16": 22, "bfloat16": 16, "float32": 46, "float64": 50}
        # Two numbers of this dtype hold the bias.
        error = 2.0 ** -bits[np.dtype(dtype).name] * np.abs(bias).max()
        np.testing.assert_allclose(got, wanted, atol=error + 1e-14)

    def test_absent_keys_get_no_attention(self, rng):
        query, keys, values = head(rng, np.float32)
        bias = np.zeros(9)
        bias[:4] = -np.inf
        c = 6**-0.5
        wide_query, wide_keys = qm.fold_bias(query, keys, bias)
        got, _ = qm.attend(wide_query, wide_keys, values, scale=c)
        wanted, _ = qm.attend(query, keys[4:], values[4:], scale=c)
        assert_close(got, wanted, np.float32)

    def test_wrong_input_is_named(self, rng):
        query, keys, _ = head(rng)
        with pytest.raises(ValueError, match="`bias` must have shape"):
            qm.fold_bias(query, keys, np.zeros(3))
        with pytest.raises(TypeError, match="`query` must be float64"):
            qm.fold_bias(query.astype(ml_dtypes.bfloat16), keys, np.zeros(9))

"""`attention_received` compared with hand-worked values and with the oracle.

The oracle (oracle.py) computes one head of N tokens with plain float64 loops.
"""

import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import assert_close
from oracle_arrays import softmax

import qm_cupy as qm

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


def masked_attention(rng, shape, causal=False):
    """Return random attention probabilities (..., N, N), with zeros if causal."""
    allowed = np.tri(shape[-1], dtype=bool) if causal else True
    return softmax(rng.standard_normal(shape), allowed)


class TestOfAttention:
    def test_hand_worked_values(self):
        attention = np.array([[1.0, 0.0], [0.5, 0.5]])
        # Token 0 receives (1 + 0.5) / 2, token 1 receives (0 + 0.5) / 2.
        assert_close(qm.attention_received(attention), [0.75, 0.25])

    def test_hand_worked_causal_values(self):
        attention = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
        # The tokens have 3, 2 and 1 queries: 1.75 / 3, 0.75 / 2 and 0.5 / 1.
        got = qm.attention_received(attention, causal=True)
        assert_close(got, [1.75 / 3, 0.375, 0.5])

    def test_entries_above_the_diagonal_are_ignored(self, rng):
        attention = masked_attention(rng, (300, 300), causal=True)
        wanted = qm.attention_received(attention, causal=True)
        above = attention + np.triu(np.ones((300, 300)), 1)
        np.testing.assert_array_equal(qm.attention_received(above, causal=True), wanted)

    def test_hand_worked_padding(self):
        # Token 1 is padding: of the rest, token 0 receives (0.9 + 0.2) / 2, and token 2
        # receives (0.1 + 0.8) / 2. With a causal mask, token 2 has one query.
        attention = np.array([[0.9, 0, 0.1], [0.3, 0.3, 0.4], [0.2, 0, 0.8]])
        attention[1] = attention[:, 1] = np.nan
        mask = np.array([True, False, True])
        assert_close(qm.attention_received(attention, mask=mask), [0.55, 0, 0.45])
        got = qm.attention_received(attention, mask=mask, causal=True)
        assert_close(got, [0.55, 0, 0.8])

    @dtypes
    @causal_or_not
    # 300 tokens are more than one block of 256 rows.
    @pytest.mark.parametrize("num_tokens", [1, 33, 300])
    def test_matches_the_oracle(self, rng, dtype, num_tokens, causal):
        attention = masked_attention(rng, (num_tokens, num_tokens)).astype(dtype)
        got = qm.attention_received(attention, causal=causal)
        assert got.dtype == np.result_type(dtype, np.float32)
        wanted = oracle.attention_received(attention, causal)
        # The sums of 16-bit probabilities are in float32.
        exact = np.float64 if dtype is np.float64 else np.float32
        assert_close(got, wanted, exact)

    @pytest.mark.parametrize("leading", [(), (2,), (3, 2), (3, 2, 4)])
    def test_every_matrix_has_its_own_result(self, rng, leading):
        attention = masked_attention(rng, (*leading, 5, 5))
        got = qm.attention_received(attention)
        assert got.shape == (*leading, 5)
        for index in np.ndindex(leading):
            assert_close(got[index], oracle.attention_received(attention[index]))

    def test_sum_is_one(self, rng):
        attention = masked_attention(rng, (2, 3, 70, 70))
        assert_close(qm.attention_received(attention).sum(-1), np.ones((2, 3)))

    def test_one_token_receives_all(self):
        attention = np.zeros((40, 40), np.float32)
        attention[:, 7] = 1
        wanted = np.arange(40) == 7
        np.testing.assert_array_equal(qm.attention_received(attention), wanted)

    def test_negative_entries_are_refused_unless_they_are_padding(self):
        attention = np.array([[1.5, -0.5], [0.5, 0.5]])
        with pytest.raises(
            ValueError, match=r"`attention` must be ≥ 0, got -0.5 at index \(0, 1\)"
        ):
            qm.attention_received(attention)
        got = qm.attention_received(attention, mask=np.array([True, False]))
        assert_close(got, [1.5, 0])
        # Another entry that is NaN must not hide a negative one.
        attention = np.full((3, 3), np.nan)
        attention[:2, :2] = [[1, -1], [0.5, 0.5]]
        with pytest.raises(ValueError, match="`attention` must be ≥ 0"):
            qm.attention_received(attention, mask=np.arange(3) < 2)
        attention[0, 1] = np.inf
        with pytest.raises(ValueError, match=r"must be finite, got inf at .* \(0, 1\)"):
            qm.attention_received(attention, mask=np.arange(3) < 2)


class TestOfQueriesAndKeys:
    def test_hand_worked_values(self):
        # Scores of 0 and log 3: row 0 of A is (1/4, 3/4), row 1 is (1/2, 1/2).
        query, key = np.array([[1.0], [0.0]]), np.array([[0.0], [np.log(3)]])
        got = qm.attention_received(query=query, key=key)
        assert_close(got, [0.375, 0.625])
        # With a causal mask, row 0 is (1, 0), and token 1 has one query.
        got = qm.attention_received(query=query, key=key, causal=True)
        assert_close(got, [0.75, 0.5])

    @dtypes
    @causal_or_not
    @pytest.mark.parametrize("num_tokens", [1, 33, 300])
    def test_matches_the_oracle(self, rng, dtype, num_tokens, causal):
        query, key = rng.standard_normal((2, num_tokens, 7)).astype(dtype)
        got = qm.attention_received(query=query, key=key, causal=causal)
        assert got.dtype == np.result_type(dtype, np.float32)
        wanted = oracle.query_key_received(query, key, causal)
        exact = np.float64 if dtype is np.float64 else np.float32
        assert_close(got, wanted, exact)

    @causal_or_not
    @pytest.mark.parametrize("leading", [(), (2,), (3, 2), (3, 2, 4)])
    def test_equals_the_result_of_the_softmax(self, rng, leading, causal):
        query, key = rng.standard_normal((2, *leading, 9, 4))
        scores = query @ np.swapaxes(key, -1, -2) * 2.5
        allowed = np.tri(9, dtype=bool) if causal else True
        wanted = qm.attention_received(softmax(scores, allowed), causal=causal)
        pair = {"query": query, "key": key}
        got = qm.attention_received(**pair, scale=2.5, causal=causal)
        assert got.shape == (*leading, 9)
        assert_close(got, wanted)

    @causal_or_not
    def test_mask_has_the_bits_of_removing_the_padding(self, rng, causal):
        query, key = rng.standard_normal((2, 3, 2, 4, 8, 5)).astype(np.float32)
        mask = np.ones((2, 8), bool)
        mask[0, [0, 3, 4]] = False  # padding in front and in between
        # Padding is not read: neither NaN nor a huge value has an effect.
        query[:, 0, :, 3] = key[:, 0, :, 0] = np.nan
        key[:, 0, :, 4] = 3e38
        got = qm.attention_received(query=query, key=key, causal=causal, mask=mask)
        assert got.dtype == np.float32
        for b in range(2):
            # The same tokens without the padding, in the same order
            pair = {
                name: np.ascontiguousarray(x[:, b : b + 1][..., mask[b], :])
                for name, x in {"query": query, "key": key}.items()
            }
            wanted = qm.attention_received(**pair, causal=causal)
            np.testing.assert_array_equal(got[:, b : b + 1][..., mask[b]], wanted)
            assert not got[:, b][..., ~mask[b]].any()

    def test_sum_is_one(self, rng):
        query, key = rng.standard_normal((2, 3, 300, 4)).astype(np.float32)
        got = qm.attention_received(query=query, key=key)
        assert_close(got.sum(-1), np.ones(3), np.float32)

    @pytest.mark.parametrize("size", [1e3, 1e12, 1e25])
    def test_huge_scores_choose_the_largest(self, size):
        """Scores of up to 1e50 need float64; each row attends to one key."""
        token = np.array([[1.0, 0], [1, 0], [0, 1]], np.float32) * np.float32(size)
        got = qm.attention_received(query=token, key=token)
        # Rows 0 and 1 attend to both equal keys, row 2 to itself.
        np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)
        got = qm.attention_received(query=token, key=token, causal=True)
        np.testing.assert_allclose(got, [1.5 / 3, 0.5 / 2, 1], rtol=1e-6)
        too_large = token.astype(float) * 1e160
        with pytest.raises(ValueError, match="too large: their attention scores"):
            qm.attention_received(query=too_large, key=too_large)

    def test_shapes_and_dtypes_must_agree(self, rng):
        query = rng.standard_normal((4, 3))
        with pytest.raises(ValueError, match="`key` must have shape"):
            qm.attention_received(query=query, key=query[:3])
        with pytest.raises(TypeError, match="`key` must be float64 like `query`"):
            qm.attention_received(query=query, key=query.astype(np.float32))
        with pytest.raises(ValueError, match="`scale` must lie in"):
            qm.attention_received(query=query, key=query, scale=0)
        query[1, 2] = np.nan
        with pytest.raises(ValueError, match="`query` must be finite, got nan"):
            qm.attention_received(query=query, key=query, mask=np.arange(4) < 3)


@pytest.mark.parametrize("vjp", [False, True], ids=["", "vjp"])
class TestErrors:
    def call(self, vjp, *args, **options):
        if vjp:
            return qm.attention_received_vjp(np.ones(2), *args, **options)
        return qm.attention_received(*args, **options)

    def test_exactly_one_source(self, vjp):
        x, wanted = (
            np.ones((2, 2)),
            "pass either `attention`, or `query` and `key`, got ",
        )
        with pytest.raises(TypeError, match=f"{wanted}neither"):
            self.call(vjp)
        with pytest.raises(TypeError, match=f"{wanted}`attention` and `query`"):
            self.call(vjp, x, query=x)
        with pytest.raises(TypeError, match=f"{wanted}`query`$"):
            self.call(vjp, query=x)
        with pytest.raises(TypeError, match=f"{wanted}`key`$"):
            self.call(vjp, key=x)

    def test_options(self, vjp):
        x = np.full((2, 2), 0.5)
        with pytest.raises(TypeError, match="`scale` applies to `query` and `key` onl"):
            self.call(vjp, x, scale=1.0)
        for source in ({"attention": x}, {"query": x, "key": x}):
            with pytest.raises(TypeError, match="`causal` must be True or False"):
                self.call(vjp, **source, causal=1)
            with pytest.raises(TypeError, match="`mask` must be boolean"):
                self.call(vjp, **source, mask=np.ones(2))
            with pytest.raises(ValueError, match="`mask` must leave at least one tok"):
                self.call(vjp, **source, mask=np.zeros(2, bool))

    def test_shapes(self, vjp):
        with pytest.raises(ValueError, match=r"must have shape \(N, N\) = \(3, 3\)"):
            self.call(vjp, np.ones((3, 2)))
        with pytest.raises(ValueError, match=r"`attention` must have shape \(N, N\), "):
            self.call(vjp, np.ones(3))
        with pytest.raises(TypeError, match="`attention` must be float16, "):
            self.call(vjp, np.ones((2, 2), int))


class TestVjp:
    def test_hand_worked_values(self):
        gradient, attention = np.array([3.0, 4.0]), np.full((2, 2), 0.5)
        by_attention, *others = qm.attention_received_vjp(gradient, attention)
        assert others == [None, None]
        assert_close(by_attention, [[1.5, 2], [1.5, 2]])
        got, _, _ = qm.attention_received_vjp(gradient, attention, causal=True)
        # Token 1 has one query.
        assert_close(got, [[1.5, 0], [1.5, 4]])

    def test_hand_worked_values_of_queries_and_keys(self):
        # The scores are 0 and log 3, so row 0 of A is (1/4, 3/4) and row 1 (1/2, 1/2).
        query, key = np.array([[1.0], [0.0]]), np.array([[0.0], [np.log(3)]])
        pair = {"query": query, "key": key}
        none, by_query, by_key = qm.attention_received_vjp(np.array([2.0, 0]), **pair)
        assert none is None
        # h = (1, 0), so G_i = A_i0 (1 - A_i0) (1, -1) = 3/16 (1, -1), 1/4 (1, -1).
        assert_close(by_query, [[-3 / 16 * np.log(3)], [-np.log(3) / 4]])
        assert_close(by_key, [[3 / 16], [-3 / 16]])

    def test_equal_gradients_have_no_effect_on_scores(self, rng):
        """Without a causal mask, the sum of r is 1 for all scores."""
        query, key = rng.standard_normal((2, 300, 4))
        got = qm.attention_received_vjp(np.ones(300), query=query, key=key)
        for x in got[1:]:
            np.testing.assert_allclose(x, 0, atol=1e-15)

    @causal_or_not
    def test_more_rows_than_a_block(self, rng, causal):
        query, key = rng.standard_normal((2, 300, 4))
        gradient = rng.standard_normal(300)
        allowed = np.tri(300) if causal else np.ones((300, 300))
        a = softmax(query @ key.T / 2, allowed.astype(bool))
        h = gradient / allowed.sum(0)
        g = a * (h - (a @ h)[:, None]) / 2  # c G with c = 1/√4
        _, by_query, by_key = qm.attention_received_vjp(
            gradient, query=query, key=key, causal=causal
        )
        assert_close(by_query, g @ key)
        assert_close(by_key, g.T @ query)

    def test_padding_may_be_nan(self, rng):
        query, key = rng.standard_normal((2, 5, 3)).astype(np.float32)
        mask, gradient = np.array([1, 0, 1, 1, 0], bool), rng.standard_normal(5)
        rest = {"query": query[mask], "key": key[mask]}
        wanted = qm.attention_received_vjp(gradient[mask], **rest)
        query[~mask] = key[~mask] = gradient[~mask] = np.nan
        got = qm.attention_received_vjp(gradient, query=query, key=key, mask=mask)
        for x, y in zip(got[1:], wanted[1:], strict=True):
            np.testing.assert_array_equal(x[mask], y)
            assert not x[~mask].any()
        attention = np.where(mask & mask[:, None], 0.5, np.nan)
        by_attention, _, _ = qm.attention_received_vjp(gradient, attention, mask=mask)
        assert_close(by_attention[mask][:, mask], np.tile(gradient[mask] / 3, (3, 1)))
        assert not by_attention[~mask].any()
        assert not by_attention[:, ~mask].any()

    def test_torch_needs_the_gradient_of_one_input_only(self, rng):
        torch = pytest.importorskip("torch")
        query, key = (torch.tensor(x) for x in rng.standard_normal((2, 7, 3)))
        key.requires_grad_()
        gradient = torch.tensor(rng.standard_normal(7))
        qm.attention_received(query=query, key=key).backward(gradient)
        pair = {"query": query, "key": key.detach()}
        _, _, wanted = qm.attention_received_vjp(gradient, **pair)
        torch.testing.assert_close(key.grad, wanted, rtol=0, atol=0)
        with pytest.raises(TypeError, match="pass either `attention`, or `query` and"):
            qm.attention_received(query=query, key=key, attention=key)

    @pytest.mark.parametrize("source", ["attention", "pair"])
    def test_jax_compiles_it(self, rng, source):
        jax = pytest.importorskip("jax")
        x = abs(rng.standard_normal((2, 5, 5))).astype(np.float32)
        sources = {"attention": {"attention": x}, "pair": {"query": x, "key": x}}
        names = list(sources[source])

        def call(*arrays):
            return qm.attention_received(**dict(zip(names, arrays, strict=True)))

        arrays = [jax.numpy.asarray(x) for _ in names]
        wanted = qm.attention_received(**sources[source])
        np.testing.assert_array_equal(jax.jit(call)(*arrays), wanted)

        def loss(*arrays):
            return (call(*arrays) ** 2).sum()

        got = jax.grad(loss, argnums=tuple(range(len(names))))(*arrays)
        gradients = qm.attention_received_vjp(2 * wanted, **sources[source])
        present = [g for g in gradients if g is not None]
        for x, y in zip(got, present, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)

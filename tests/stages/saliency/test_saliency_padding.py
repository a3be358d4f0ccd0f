"""Padding is never read: whatever lies there, results have the same bits.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx).
"""

import numpy as np
import pytest
from oracle_arrays import softmax

import qm_cupy as qm

B, H, N, D = 2, 3, 6, 4
MASK = np.array([[True, False, True, True, False, True], [False] + 5 * [True]])
BAD = [np.nan, np.inf, -np.inf, -7.0, 3e38]


def cases(rng):
    """Return function, vjp, arrays, the number of axes N of each array, and options."""
    attention = softmax(rng.standard_normal((B, H, N, N)))
    query, key = rng.standard_normal((2, B, H, N, D))
    received, entropy = rng.random((2, B, H, N))
    pair = {"query": query, "key": key}
    return {
        "attention_entropy": (
            qm.attention_entropy,
            qm.attention_entropy_vjp,
            {"attention": attention},
            {},
        ),
        "query_key_entropy": (qm.query_key_entropy, qm.query_key_entropy_vjp, pair, {}),
        "query_key_entropy, causal": (
            *(qm.query_key_entropy, qm.query_key_entropy_vjp, pair),
            {"causal": True},
        ),
        "query_key_entropy, groups": (
            *(qm.query_key_entropy, qm.query_key_entropy_vjp),
            {"query": query, "key": key[:, :1]},
            {},
        ),
        "self_attention_entropy": (
            qm.self_attention_entropy,
            qm.self_attention_entropy_vjp,
            {"tokens": query},
            {},
        ),
        "attention_received": (
            qm.attention_received,
            qm.attention_received_vjp,
            {"attention": attention},
            {},
        ),
        "attention_received, pair": (
            qm.attention_received,
            qm.attention_received_vjp,
            pair,
            {"causal": True},
        ),
        "saliency": (qm.saliency, qm.saliency_vjp, {"entropy": entropy}, {}),
        "saliency, high": (
            *(qm.saliency, qm.saliency_vjp, {"entropy": entropy[:, 0]}),
            {"salient": "high"},
        ),
        "attention_mass": (
            qm.attention_mass,
            qm.attention_mass_vjp,
            {"received": received, "entropy": entropy},
            {},
        ),
        "attention_mass, causal": (
            *(qm.attention_mass, qm.attention_mass_vjp),
            {"received": received[:, 0], "entropy": entropy[:, 0]},
            {"causal": True},
        ),
        "norm_saliency": (
            *(qm.norm_saliency, qm.norm_saliency_vjp, {"tokens": query[:, 0]}),
            {},
        ),
    }


NAMES = list(cases(np.random.default_rng(0)))


def padded(name, x, bad):
    """Return a copy of an array with `bad` in its padding."""
    x = x.copy()
    last = 1 if name in ("entropy", "received", "gradient") else 2
    mask = MASK[:, None] if x.ndim - last > 1 else MASK  # (B, 1, N)
    rows = np.broadcast_to(~mask, x.shape[: x.ndim - last + 1])
    x[rows] = bad
    if name == "attention":
        np.swapaxes(x, -1, -2)[rows] = bad
    return x


def check(rng, name, bad, dtype=np.float64):
    function, vjp, arrays, options = cases(rng)[name]
    arrays = {k: x.astype(dtype) for k, x in arrays.items()}
    options = {"mask": MASK, **options}
    wanted = function(**arrays, **options)
    gradient = rng.standard_normal(wanted.shape).astype(dtype)
    gradients = vjp(gradient, **arrays, **options)
    filled = {k: padded(k, x, bad) for k, x in arrays.items()}
    got = function(**filled, **options)
    np.testing.assert_array_equal(got, wanted)
    # Padding has the result 0.
    assert not got[
        np.broadcast_to(~(MASK[:, None] if got.ndim > 2 else MASK), got.shape)
    ].any()
    by_filled = vjp(padded("gradient", gradient, bad), **filled, **options)
    for x, y in zip(_several(by_filled), _several(gradients), strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)


def _several(x):
    return [y for y in (x if isinstance(x, tuple) else (x,)) if y is not None]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_any_value_in_padding_has_the_same_bits(rng, name, bad):
    check(rng, name, bad)
    check(rng, name, bad, np.float32)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_read_no_padding(kernels, rng, name, dtype, bad):
    with np.errstate(over="ignore"):  # 3e38 in float16 is infinite
        check(rng, name, bad, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_integers_or_of_one_row(rng, name):
    function, vjp, arrays, options = cases(rng)[name]
    wanted = function(**arrays, mask=MASK, **options)
    gradient = rng.standard_normal(wanted.shape)
    by_wanted = _several(vjp(gradient, **arrays, mask=MASK, **options))
    for dtype in (np.int64, np.int32, np.uint8):
        mask = MASK.astype(dtype)
        np.testing.assert_array_equal(function(**arrays, mask=mask, **options), wanted)
        got = _several(vjp(gradient, **arrays, mask=mask, **options))
        for x, y in zip(got, by_wanted, strict=True):
            np.testing.assert_array_equal(x, y)
    # (N,) is the mask of every sequence.
    every = np.broadcast_to(MASK[0], MASK.shape)
    wanted = function(**arrays, mask=every, **options)
    got = function(**arrays, mask=MASK[0].astype(int), **options)
    np.testing.assert_array_equal(got, wanted)
    by_wanted = _several(vjp(gradient, **arrays, mask=every, **options))
    got = _several(vjp(gradient, **arrays, mask=MASK[0], **options))
    for x, y in zip(got, by_wanted, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_tokens_are_still_checked(rng, name):
    function, vjp, arrays, options = cases(rng)[name]
    gradient = np.ones(function(**arrays, **options).shape)
    for k, x in arrays.items():
        wrong = x.copy()  # token 2 is not padding
        wrong[(..., 2) if k in ("entropy", "received") else (..., 2, slice(None))] = (
            np.inf
        )
        for call in (function, lambda **a: vjp(gradient, **a)):
            with pytest.raises(ValueError, match=f"`{k}` must be finite, got inf"):
                call(**{**arrays, k: wrong}, mask=MASK, **options)


def test_masked_rows_of_a_model(rng):
    """With the mask of the model, padded columns are 0: rows have the sum 1 without.

    Then both functions see the same attention. Without it, the entropy is that of the
    rest of the row, and the attention that goes to padding is lost.
    """
    scores = rng.standard_normal((B, N, N))
    masked = softmax(scores, np.broadcast_to(MASK[:, None], scores.shape))
    plain = softmax(scores)
    options = {"mask": MASK}
    entropy = qm.attention_entropy(masked, **options)
    np.testing.assert_allclose(entropy, qm.attention_entropy(plain, **options))
    received = qm.attention_received(masked, **options)
    np.testing.assert_allclose(received.sum(-1), 1)
    lost = qm.attention_received(plain, **options)
    kept = np.stack([plain[b][m][:, m].sum() / m.sum() for b, m in enumerate(MASK)])
    np.testing.assert_allclose(lost.sum(-1), kept)
    assert (kept < 0.95).all()

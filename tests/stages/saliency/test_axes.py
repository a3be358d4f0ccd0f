"""The axes of every function of this folder: the forms of arrays, and tuples of layers.

There are L layers, B sequences, H heads and N tokens. B, H and L differ from each
other, so an axis that is read as another one gives another shape or another value.
"""

import re

import numpy as np
import pytest
from conftest import to_library, to_numpy
from oracle_arrays import softmax

import qm_cupy as qm

L, B, H, N, D = 2, 3, 4, 5, 6
# The leading axes of one sequence, a batch, one layer of heads, and layers of heads
LEADING = [(), (B,), (B, H), (L, B, H)]
MASK = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])


def of_pair(x, **options):
    return qm.query_key_entropy(x, 2 - x, **options)


def received_of_pair(x, **options):
    return qm.attention_received(query=x, key=2 - x, **options)


def mass_of(x, **options):
    return qm.attention_mass(x, x + 1, **options)


MATRIX = {  # results (..., N), from the last axes of the argument
    "attention_entropy": (qm.attention_entropy, (N, N)),
    "query_key_entropy": (of_pair, (N, D)),
    "self_attention_entropy": (qm.self_attention_entropy, (N, D)),
    "attention_received": (qm.attention_received, (N, N)),
    "attention_received, pair": (received_of_pair, (N, D)),
}
ROW = {"saliency": qm.saliency, "attention_mass": mass_of}  # results (N,) or (B, N)
matrix = pytest.mark.parametrize("name", MATRIX)
row = pytest.mark.parametrize("name", ROW)


def draw(rng, shape):
    """Return probabilities, which are also valid tokens and entropies."""
    return softmax(rng.standard_normal(shape))


def one_by_one(function, x, mask):
    """Return the results of all matrices, each from a call with one sequence."""
    results = np.empty(x.shape[:-1])
    for index in np.ndindex(x.shape[:-2]):
        # B is the only axis of a batch, and the last but one of heads.
        b = index[-2] if len(index) > 1 else index[0] if index else 0
        results[index] = function(x[index], mask=None if mask is None else mask[b])
    return results


@matrix
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("masked", [False, True])
def test_every_matrix_has_the_mask_of_its_sequence(rng, name, leading, masked):
    function, last = MATRIX[name]
    x, mask = draw(rng, (*leading, *last)), MASK if masked else None
    got = function(x, mask=mask if leading or mask is None else mask[0])
    np.testing.assert_array_equal(got, one_by_one(function, x, mask))


@matrix
def test_a_tuple_gives_a_tuple(rng, name):
    """Of layers with different numbers of heads, and of other forms."""
    function, last = MATRIX[name]
    x = draw(rng, (L, B, H, *last))
    # Heads may differ; so may the form, (B, N, N) or (B, H, N, N).
    layers = x[0], x[1][:, :2], x[1][:, 0]
    key = tuple(2 - layer for layer in layers)
    calls = {
        of_pair: lambda mask: qm.query_key_entropy(layers, key, mask=mask),
        received_of_pair: lambda mask: qm.attention_received(
            query=layers, key=key, mask=mask
        ),
    }
    for mask in (None, MASK, MASK[0]):
        got = calls.get(function, lambda mask: function(layers, mask=mask))(mask)
        assert isinstance(got, tuple)
        for result, layer in zip(got, layers, strict=True):
            np.testing.assert_array_equal(result, function(layer, mask=mask))


def mean_of_heads(x):
    """Return (L, B, N) of layers (B, N) or (B, H, N)."""
    return np.stack([y.mean(1) if y.ndim == 3 else y for y in x])


def by_hand(name, x, mask):
    """Return the result (B, N) of layers: heads are averaged first, then layers."""
    valid = np.ones((B, N), bool) if mask is None else np.broadcast_to(mask, (B, N)) > 0
    means = mean_of_heads(x)
    if name == "attention_mass":
        return means.mean(0) * np.exp(-(means.mean(0) + 1)) * valid
    out = np.zeros((B, N))
    for b in range(B):
        y = means[:, b, valid[b]]
        low, high = y.min(-1, keepdims=True), y.max(-1, keepdims=True)
        out[b, valid[b]] = 1 - ((y - low) / (high - low)).mean(0)
    return out


def call(name, layers, **options):
    """Call a function of `ROW` with a tuple."""
    if name == "saliency":
        return qm.saliency(layers, **options)
    return qm.attention_mass(layers, tuple(x + 1 for x in layers), **options)


@row
@pytest.mark.parametrize("mask", [None, MASK, MASK[0]], ids=["full", "BN", "N"])
def test_rows_of_every_form(rng, name, mask):
    x = draw(rng, (L, B, H, N))
    for array, layers in (
        (x, tuple(x)),
        (x[0], (x[0],)),
        (x[0, :, 0], (x[0, :, 0],)),
    ):
        got = ROW[name](array, mask=mask)
        np.testing.assert_allclose(got, by_hand(name, layers, mask), rtol=1e-12)
        # A tuple has the bits of the array, whatever the form.
        np.testing.assert_array_equal(call(name, layers, mask=mask), got)
    one = mask if mask is None or mask.ndim == 1 else mask[1]
    got = ROW[name](x[0, 1, 2], mask=one)  # (N,)
    assert got.shape == (N,)
    np.testing.assert_array_equal(call(name, (x[0, 1, 2],), mask=one), got)
    batch = ROW[name](x[:, 1:2, 2:3], mask=one)  # the same, as layers of a batch of one
    tuples = call(name, (x[0, 1, 2], x[1, 1, 2]), mask=one)
    np.testing.assert_array_equal(tuples, batch[0])


@row
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layers_may_have_different_heads(rng, name, dtype):
    x = draw(rng, (L, B, H, N)).astype(dtype)
    layers = x[0], x[1][:, :3], x[1][:, 1]
    got = call(name, layers, mask=MASK)
    assert got.dtype == np.result_type(dtype, np.float32)
    wanted = by_hand(name, [y.astype(float) for y in layers], MASK)
    tolerance = 1e-12 if dtype == np.float64 else 2e-3 if dtype == np.float16 else 1e-5
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


@row
@pytest.mark.parametrize("heads", [[H, H], [H, 3], [H, None]])
def test_gradients_of_a_tuple(rng, name, heads):
    """The loss is linear in a small step, along every layer."""
    x = draw(rng, (L, B, H, N))
    layers = tuple(
        y[:, 0] if n is None else y[:, :n] for y, n in zip(x, heads, strict=True)
    )
    gradient = rng.standard_normal((B, N))
    options = {"mask": MASK}
    if name == "saliency":
        by_layer = qm.saliency_vjp(gradient, layers, **options)
    else:
        others = tuple(y + 1 for y in layers)
        gradients = qm.attention_mass_vjp(gradient, layers, others, **options)
        by_layer = [r + h for r, h in zip(*gradients, strict=True)]
    for i, layer in enumerate(layers):
        assert by_layer[i].shape == layer.shape
        assert by_layer[i].flags.c_contiguous
        step = 1e-6 * rng.standard_normal(layer.shape)
        ends = [
            (gradient * call(name, (*layers[:i], y, *layers[i + 1 :]), **options)).sum()
            for y in (layer + step, layer - step)
        ]
        slope = (ends[0] - ends[1]) / 2
        assert slope == pytest.approx((by_layer[i] * step).sum(), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("single", [False, True])
def test_gradients_of_a_tuple_have_the_bits_of_the_stack(rng, single):
    x = draw(rng, (L, B, H, N))
    gradient = rng.standard_normal((B, N))
    if single:
        x, gradient = x[:, :1, :1], gradient[:1]
    layers = tuple(x[:, 0, 0]) if single else tuple(x)
    g = gradient[0] if single else gradient
    for got, wanted in (
        (qm.saliency_vjp(g, layers), qm.saliency_vjp(gradient, x)),
        *zip(
            qm.attention_mass_vjp(g, layers, layers),
            qm.attention_mass_vjp(gradient, x, x),
            strict=True,
        ),
    ):
        assert [y.shape for y in got] == [y.shape for y in layers]
        np.testing.assert_array_equal(np.stack(got).reshape(x.shape), wanted)


@matrix
def test_gradients_of_tuples_of_matrices(rng, name):
    last = MATRIX[name][1]
    x = draw(rng, (L, B, H, *last))
    layers = x[0], x[1][:, :2]
    gradient = tuple(rng.standard_normal(y.shape[:-1]) for y in layers)
    pair = {"query": layers, "key": tuple(2 - y for y in layers)}
    vjp, arguments = {
        "attention_entropy": (qm.attention_entropy_vjp, {"attention": layers}),
        "query_key_entropy": (qm.query_key_entropy_vjp, pair),
        "self_attention_entropy": (qm.self_attention_entropy_vjp, {"tokens": layers}),
        "attention_received": (qm.attention_received_vjp, {"attention": layers}),
        "attention_received, pair": (qm.attention_received_vjp, pair),
    }[name]
    got = vjp(gradient, **arguments, mask=MASK)
    for i in range(L):
        one = {k: v[i] for k, v in arguments.items()}
        wanted = vjp(gradient[i], **one, mask=MASK)
        if not isinstance(wanted, tuple):
            np.testing.assert_array_equal(got[i], wanted)
            continue
        for x, y in zip(got, wanted, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                np.testing.assert_array_equal(x[i], y)


def test_tuples_of_every_library(rng, library):
    x = draw(rng, (L, B, H, N, N)).astype(np.float32)
    layers = tuple(to_library(library, y) for y in (x[0], x[1][:, :2]))
    mask = to_library(library, MASK.astype(np.int64))
    entropy = qm.attention_entropy(layers, mask=mask)
    received = qm.attention_received(layers, mask=mask)
    wanted = [qm.attention_entropy(y, mask=MASK) for y in (x[0], x[1][:, :2])]
    for got, y in zip(entropy, wanted, strict=True):
        assert type(got) is type(layers[0])
        np.testing.assert_array_equal(to_numpy(got), y)
    scores, mass = (
        qm.saliency(entropy, mask=mask),
        qm.attention_mass(received, entropy, mask=mask),
    )
    assert type(scores) is type(mass) is type(layers[0])
    np.testing.assert_array_equal(
        to_numpy(scores), qm.saliency(tuple(wanted), mask=MASK)
    )
    by_layer = qm.saliency_vjp(scores, entropy, mask=mask)
    assert [type(y) for y in by_layer] == [type(y) for y in layers]


WRONG_TUPLES = [
    (
        lambda x: qm.attention_entropy([x, x]),
        TypeError,
        "a list: pass `tuple(attention)`",
    ),
    (
        lambda x: qm.attention_entropy(()),
        ValueError,
        "at least one layer, got an empty",
    ),
    (
        lambda x: qm.attention_entropy((x, None)),
        TypeError,
        "`attention[1]` must be an array, got None: a model returns its attention only "
        'if it is loaded with `attn_implementation="eager"`',
    ),
    (
        lambda x: qm.attention_entropy((x, x[None, None])),
        ValueError,
        "`attention[1]` must be one layer, with at most 4 axes, got shape "
        "(1, 1, 3, 5, 5)",
    ),
    (
        lambda x: qm.attention_entropy((x, 3)),
        TypeError,
        "`attention[1]` must be an arr",
    ),
    (
        lambda x: qm.query_key_entropy((x, x), x),
        TypeError,
        "`key` must be a tuple of 2 layers like `query`, got ndarray",
    ),
    (
        lambda x: qm.query_key_entropy((x, x), (x,)),
        ValueError,
        "`key` must have 2 layers like `query`, got 1",
    ),
    (
        lambda x: qm.attention_entropy_vjp(x[..., 0], (x,)),
        TypeError,
        "`gradient` must be a tuple of 1 layers like `attention`, got ndarray",
    ),
    (lambda x: qm.saliency([x[0]]), TypeError, "got a list: pass `tuple(entropy)`"),
    (lambda x: qm.saliency(()), ValueError, "`entropy` must have at least one layer"),
    (
        lambda x: qm.saliency((x[0], x[0, :, :4])),
        ValueError,
        "`entropy[1]` must have (B, N) = (5, 5) like `entropy[0]`, got shape (5, 4)",
    ),
    (
        lambda x: qm.saliency((x[0], x[0, 0])),
        ValueError,
        "`entropy[1]` must have (B, N) = (5, 5) like `entropy[0]`, got shape (5,)",
    ),
    (
        lambda x: qm.saliency((x[None], x[None])),
        ValueError,
        "`entropy[0]` must be one layer, of shape (N), (B, N) or (B, H, N), got "
        "(1, 3, 5, 5)",
    ),
    (
        lambda x: qm.attention_mass((x, x), (x, x[:, :2])),
        ValueError,
        "`entropy[1]` must have shape (3, 5, 5) like `received[1]`, got (3, 2, 5)",
    ),
    (lambda x: qm.attention_mass((x,), x), TypeError, "`entropy` must be a tuple of 1"),
    (lambda x: qm.saliency(x, mask=(x,)), TypeError, "`mask`"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_TUPLES)
def test_wrong_tuples_are_refused(rng, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(draw(rng, (3, 5, 5)))


def shapes(last):
    return "), (".join(
        ", ".join(leading + last) for leading in ("", "B", "BH")
    ), ", ".join("LBH" + last)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        *(
            (call, f"`{name}` must have shape ({some}) or ({others}), got {shape}")
            for name, last, calls in (
                ("attention", "NN", (qm.attention_entropy, qm.attention_received)),
                ("query", "Nd", (lambda x: qm.query_key_entropy(x, x),)),
                ("tokens", "ND", (qm.self_attention_entropy,)),
                ("entropy", "N", (qm.saliency,)),
                ("received", "N", (lambda x: qm.attention_mass(x, x),)),
            )
            for some, others in (shapes(last),)
            for shape in ((), (2,) * 6)
            for call in (lambda c=c, s=shape: c(np.ones(s)) for c in calls)
        ),
        *(
            (
                lambda s=shape: qm.attention_entropy(np.ones(s)),
                f"`attention` must have shape ({letters}) = {(*shape[:-1], 4)}, got "
                f"{shape}",
            )
            for letters, shape in (
                ("N, N", (4, 5)),
                ("B, N, N", (2, 4, 5)),
                ("B, H, N, N", (2, 3, 4, 5)),
                ("L, B, H, N, N", (6, 2, 3, 4, 5)),
            )
        ),
        *(
            (
                lambda q=query, k=key: qm.query_key_entropy(np.ones(q), np.ones(k)),
                f"`key` must have shape ({letters}) = {query} like `query`{heads}, got "
                f"{key}",
            )
            for letters, query, key, heads in (
                ("N, d", (4, 5), (3, 5), ""),
                ("B, N, d", (2, 4, 5), (3, 4, 5), ""),
                (
                    *("B, H, N, d", (2, 6, 4, 5), (2, 4, 4, 5)),
                    ", or a number of heads that divides H",
                ),
                (
                    *("B, H, N, d", (2, 6, 4, 5), (2, 4, 5)),
                    ", or a number of heads that divides H",
                ),
                (
                    *("L, B, H, N, d", (7, 2, 6, 4, 5), (7, 1, 6, 4, 5)),
                    ", or a number of heads that divides H",
                ),
            )
        ),
        *(
            (
                lambda s=shape: qm.attention_mass(np.ones(s), np.ones(s)[..., 1:]),
                f"`entropy` must have shape ({letters}) = {shape}, got "
                f"{(*shape[:-1], 4)}",
            )
            for letters, shape in (
                ("N", (5,)),
                ("B, N", (2, 5)),
                ("B, H, N", (2, 3, 5)),
                ("L, B, H, N", (6, 2, 3, 5)),
            )
        ),
    ],
)
def test_errors_name_the_axes(call, wanted):
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        call()

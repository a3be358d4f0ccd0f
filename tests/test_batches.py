"""A document has the same bits alone and in any batch, wherever its padding is.

The functions run on the CPU. The neighbours of the document in a batch have other
lengths and much larger or smaller values, and padding is NaN.
"""

import ml_dtypes
import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy.stages.clustering.checks import WEIGHTED_METHODS
from qm_cupy.stages.clustering.cluster_tokens import METHODS

D, HEADS, HEAD_DIM, K = 12, 2, 8, 5
DTYPES = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=[np.dtype(t).name for t in DTYPES]
)
lengths = pytest.mark.parametrize("num_tokens", [37, 300])
# Axes of tokens are negative, counted from the end.
TOKEN_AXES = {
    "tokens": (-2,), "query": (-2,), "key": (-2,), "attention": (-2, -1),
    "entropy": (-1,), "scores": (-1,), "weights": (-1,), "gradient": (-1,),
}  # fmt: skip


def document(num_tokens, dtype, seed=0, scale=1.0):
    """Return the arrays of one document; `scale` multiplies tokens, queries, keys."""
    rng = np.random.default_rng(seed)
    rows, heads = (num_tokens,), (HEADS, num_tokens)
    largest = float(ml_dtypes.finfo(dtype).max) / 8
    scale = min(scale, largest)
    arrays = {
        "tokens": scale * rng.standard_normal((num_tokens, D)),
        "query": min(scale, largest**0.5) * rng.standard_normal((*heads, HEAD_DIM)),
        "key": min(scale, largest**0.5) * rng.standard_normal((*heads, HEAD_DIM)),
        "attention": rng.dirichlet(np.ones(num_tokens), heads),
        "entropy": rng.random(heads),
        "scores": rng.random(rows),
        "weights": rng.random(rows),
        "gradient": rng.standard_normal(rows),
    }
    return {name: x.astype(dtype) for name, x in arrays.items()}


def spread(x, axes, valid):
    """Return x with padding of NaN, so that its tokens are where `valid` is True."""
    shape = list(x.shape)
    for axis in axes:
        shape[axis] = len(valid)
    out = np.full(shape, np.nan, x.dtype)
    index = [slice(None)] * x.ndim
    position = np.flatnonzero(valid)
    if len(axes) == 1:
        index[axes[0]] = position
        out[tuple(index)] = x
    else:
        out[..., position[:, None], position] = x
    return out


def batch_of(documents, masks):
    """Return the arrays of a batch, and its mask."""
    arrays = {
        name: np.stack(
            [spread(d[name], axes, m) for d, m in zip(documents, masks, strict=True)]
        )
        for name, axes in TOKEN_AXES.items()
    }
    return arrays | {"mask": np.stack(masks)}


def masks_of_document(num_tokens):
    """Yield masks of the document, in sequences of several lengths."""
    everywhere = np.ones(num_tokens, np.bool_)
    yield "right", np.pad(everywhere, (0, 9))
    yield "left", np.pad(everywhere, (9, 0))
    middle = np.ones(num_tokens + 9, np.bool_)
    middle[3:12] = False
    yield "middle", middle
    scattered = np.ones(2 * num_tokens, np.bool_)
    scattered[np.random.default_rng(1).permutation(2 * num_tokens)[:num_tokens]] = False
    yield "scattered", scattered


def batches(num_tokens, dtype):
    """Yield batches with the document in them, its index, and where its tokens are."""
    own = document(num_tokens, dtype)
    whole = np.ones(num_tokens, np.bool_)
    # Without padding: alone with a batch axis, and beside other documents.
    huge = document(num_tokens, dtype, 1, scale=1e30)
    tiny = document(num_tokens, dtype, 2, scale=1e-6)
    yield "batch of one", {**batch_of([own], [whole]), "mask": None}, 0, whole
    for index in range(3):
        documents = [huge, tiny]
        documents.insert(index, own)
        arrays = {**batch_of(documents, [whole] * 3), "mask": None}
        yield f"index {index}", arrays, index, whole
    for name, valid in masks_of_document(num_tokens):
        length = len(valid)
        longer = document(length, dtype, 3, scale=1e30)
        short = document(K + 1, dtype, 4, scale=100.0)
        masks = [np.ones(length, np.bool_), valid, np.arange(length) <= K]
        yield name, batch_of([longer, own, short], masks), 1, valid


def bits(x):
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.itemsize}")


def check(call, num_tokens, dtype, axis_of_tokens=-1):
    """Compare the results of `call` for the document alone and in every batch.

    `axis_of_tokens` is the axis of tokens in the results, or None if there is none.
    """
    alone = call({**document(num_tokens, dtype), "mask": None})
    assert all(np.isfinite(x.astype(np.float64)).all() for x in alone)
    for name, arrays, index, valid in batches(num_tokens, dtype):
        in_batch = call(arrays)
        for x, y in zip(alone, in_batch, strict=True):
            own = y[index]
            if axis_of_tokens is not None:
                own = np.compress(valid, own, axis_of_tokens)
            np.testing.assert_array_equal(bits(x), bits(own), err_msg=name)


SOURCES = {
    "uniform": {},
    "saliency": {"hidden_states": "tokens"},
    "saliency of attention": {"attention": "attention"},
    "attention": {"attention": "attention"},
    "attention, queries": {"query": "query", "key": "key"},
    "mass": {},
    "mass of attention": {"attention": "attention"},
}


def merge(arrays, **options):
    """Return merged tokens, labels, sizes and mass of `quickmerge`."""
    return qm.quickmerge(arrays["tokens"], K, mask=arrays["mask"], **options)


def check_merge(num_tokens, dtype, source, **options):
    def call(arrays):
        sources = {name: arrays[key] for name, key in SOURCES[source].items()}
        word = source.partition(",")[0].partition(" of")[0]
        return merge(arrays, weights=word, **sources, **options)

    alone = call({**document(num_tokens, dtype), "mask": None})
    for name, arrays, index, valid in batches(num_tokens, dtype):
        got = qm.Merged(*(x[index] for x in call(arrays)))
        position = np.flatnonzero(valid)
        wanted = alone._replace(positions=position[alone.positions].astype(np.int32))
        own = got._replace(labels=got.labels[valid], mass=got.mass[valid])
        for field, x, y in zip(qm.Merged._fields, wanted, own, strict=True):
            np.testing.assert_array_equal(bits(x), bits(y), err_msg=f"{name}: {field}")


@dtypes
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("method", METHODS)
def test_quickmerge(method, metric, source, dtype):
    check_merge(37, dtype, source, method=method, metric=metric)


@dtypes
@pytest.mark.parametrize("source", SOURCES)
def test_quickmerge_of_long_documents(source, dtype):
    """More tokens than one block of rows of the references."""
    check_merge(300, dtype, source)


@dtypes
@pytest.mark.parametrize("method", WEIGHTED_METHODS)
def test_weighted_linkage(method, dtype):
    check_merge(37, dtype, "attention", method=method, weighted_linkage=True)


STAGES = {
    "attention_entropy": lambda a: qm.attention_entropy(a["attention"], mask=a["mask"]),
    "query_key_entropy": lambda a: qm.query_key_entropy(
        a["query"], a["key"], mask=a["mask"]
    ),
    "query_key_entropy, causal": lambda a: qm.query_key_entropy(
        a["query"], a["key"], causal=True, mask=a["mask"]
    ),
    "self_attention_entropy": lambda a: qm.self_attention_entropy(
        a["tokens"], mask=a["mask"]
    ),
    "attention_received": lambda a: qm.attention_received(
        a["attention"], mask=a["mask"]
    ),
    "attention_received, causal": lambda a: qm.attention_received(
        query=a["query"], key=a["key"], causal=True, mask=a["mask"]
    ),
    "attention_received, queries": lambda a: qm.attention_received(
        query=a["query"], key=a["key"], mask=a["mask"]
    ),
    "attention_mass": lambda a: qm.attention_mass(
        a["entropy"], a["entropy"], causal=True, mask=a["mask"]
    ),
    "saliency": lambda a: qm.saliency(a["entropy"], mask=a["mask"]),
    "norm_saliency": lambda a: qm.norm_saliency(a["tokens"], mask=a["mask"]),
    "gumbel_softmax": lambda a: qm.gumbel_softmax(
        a["scores"], seed=None, mask=a["mask"]
    ),
    "gumbel_softmax, hard": lambda a: qm.gumbel_softmax(
        a["scores"], hard=K, seed=None, mask=a["mask"]
    ),
    "cluster_tokens": lambda a: qm.cluster_tokens(a["tokens"], K, mask=a["mask"]),
}


@dtypes
@lengths
@pytest.mark.parametrize("name", STAGES)
def test_stage(name, num_tokens, dtype):
    def call(arrays):
        if arrays["mask"] is None and arrays["tokens"].ndim == 2:
            # One document with heads needs the axis B.
            arrays = {k: x if x is None else x[None] for k, x in arrays.items()}
            return (STAGES[name](arrays)[0],)
        return (STAGES[name](arrays),)

    check(call, num_tokens, dtype)


MEASURES = {
    "norm_budget": lambda a: qm.norm_budget(a["tokens"], mask=a["mask"]),
    "norm_mass": lambda a: qm.norm_mass(a["tokens"], K, mask=a["mask"]),
}


@dtypes
@lengths
@pytest.mark.parametrize("name", MEASURES)
def test_measure(name, num_tokens, dtype):
    check(lambda a: (np.asarray(MEASURES[name](a)),), num_tokens, dtype, None)


GRADIENTS = {
    "attention_entropy_vjp": lambda a, g: qm.attention_entropy_vjp(
        g, a["attention"], mask=a["mask"]
    ),
    "query_key_entropy_vjp": lambda a, g: qm.query_key_entropy_vjp(
        g, a["query"], a["key"], mask=a["mask"]
    ),
    "self_attention_entropy_vjp": lambda a, g: qm.self_attention_entropy_vjp(
        g[:, 0], a["tokens"], mask=a["mask"]
    ),
    "attention_received_vjp": lambda a, g: qm.attention_received_vjp(
        g, query=a["query"], key=a["key"], mask=a["mask"]
    )[1:],
    "saliency_vjp": lambda a, g: qm.saliency_vjp(g[:, 0], a["entropy"], mask=a["mask"]),
    "norm_saliency_vjp": lambda a, g: qm.norm_saliency_vjp(
        g[:, 0], a["tokens"], mask=a["mask"]
    ),
    "gumbel_softmax_vjp": lambda a, g: qm.gumbel_softmax_vjp(
        g[:, 0], a["scores"], seed=None, mask=a["mask"]
    ),
    "attention_mass_vjp": lambda a, g: qm.attention_mass_vjp(
        g[:, 0], a["entropy"], a["entropy"], mask=a["mask"]
    ),
}


@dtypes
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name, dtype):
    def call(arrays):
        if arrays["mask"] is None and arrays["tokens"].ndim == 2:
            arrays = {k: x if x is None else x[None] for k, x in arrays.items()}
            results = GRADIENTS[name](arrays, heads(arrays))
            results = results if isinstance(results, tuple) else (results,)
            return [x[0] for x in results]
        results = GRADIENTS[name](arrays, heads(arrays))
        return results if isinstance(results, tuple) else (results,)

    def heads(arrays):  # the same gradient for every head, (B, H, N)
        return np.repeat(arrays["gradient"][:, None], HEADS, axis=1)

    num_tokens = 37
    alone = call({**document(num_tokens, dtype), "mask": None})
    for name_of_batch, arrays, index, valid in batches(num_tokens, dtype):
        for x, y in zip(alone, call(arrays), strict=True):
            own = y[index]
            if name == "attention_entropy_vjp":
                own = own[:, valid][:, :, valid]
            elif own.ndim > 1 and own.shape[-1] != len(valid):
                own = np.compress(valid, own, -2)
            else:
                own = np.compress(valid, own, -1)
            np.testing.assert_array_equal(bits(x), bits(own), name_of_batch)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("name", STAGES)
def test_a_document_in_a_batch_of_kernels(name, dtype, kernels):
    """Without padding, kernels give the bits of the document alone too."""
    for name_of_batch, arrays, index, _ in batches(37, dtype):
        if name_of_batch.startswith("batch"):
            alone = STAGES[name](arrays)
        if name_of_batch.startswith("index"):
            own = STAGES[name](arrays)[index]
            np.testing.assert_array_equal(
                bits(alone[0]), bits(own), err_msg=name_of_batch
            )

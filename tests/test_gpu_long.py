"""Long sequences on a GPU: every way of clustering past every change of its launch.

Blocks, shared memory and cooperation depend on N; each method is held against the
reference where these change. ``QM_CUPY_LONG`` names the lengths N.
"""

import functools
import os

import ml_dtypes
import numpy as np
import pytest
from gpu_parity import as_given, marks, on_host
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS

pytestmark = marks

SIZES = [
    int(n) for n in os.environ.get("QM_CUPY_LONG", "600,1100,1600,4096").split(",")
]
DIM = 16
# Tokens whose group may differ where sums are in float32: of distances that are nearly
# equal, another one may be the least.
FLIPPED = 0.01


@functools.cache
def tokens_of(num_tokens):
    """Return tokens (2, N, D) that every dtype holds exactly; K = N // 3."""
    x = np.random.default_rng(num_tokens).standard_normal((2, num_tokens, DIM))
    return x.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float64)


@functools.cache
def labels_of(num_tokens, method):
    return qm.cluster_tokens(tokens_of(num_tokens), num_tokens // 3, method=method)


def first_members(labels):
    """Return the position of the first token of each token's group, (B, N)."""
    return np.array([np.unique(x, return_index=True)[1][x] for x in labels])


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_clustering(method, num_tokens, gpu_kernels, gpu_dtype):
    tokens, num_groups = tokens_of(num_tokens), num_tokens // 3
    given = as_given(tokens, "cupy", gpu_dtype)
    labels = on_host(qm.cluster_tokens(given, num_groups, method=method))
    wanted = first_members(labels_of(num_tokens, method))
    got = first_members(labels)
    for sequence in labels:
        np.testing.assert_array_equal(np.unique(sequence), np.arange(num_groups))
        last = np.unique(sequence[::-1], return_index=True)[1]
        assert (np.diff(last) < 0).all()  # groups are in the order of their last token
    allowed = 0 if gpu_dtype == np.float64 else FLIPPED
    assert (got != wanted).mean() <= allowed


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_quickmerge(method, num_tokens, gpu_kernels):
    """The pipeline at that length, with protected tokens, padding and a K of each."""
    tokens = tokens_of(num_tokens)
    mask = np.ones(tokens.shape[:2], np.bool_)
    mask[1, num_tokens // 2 :] = False
    protect = np.zeros_like(mask)
    protect[:, 0] = True
    counts = mask.sum(-1) // 4
    given = {"tokens": tokens, "mask": mask, "protect": protect, "budget": counts}
    wanted = qm.quickmerge(**given, method=method)
    on_gpu = {k: as_given(x, "cupy", np.dtype("f8")) for k, x in given.items()}
    got = qm.quickmerge(**on_gpu, method=method)
    for name in ("labels", "sizes", "positions"):
        x, y = getattr(got, name), getattr(wanted, name)
        np.testing.assert_array_equal(on_host(x), y, err_msg=name)
    for name in ("tokens", "saliency", "mass"):
        x, y = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(on_host(x), y, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("num_tokens", [n for n in SIZES if n < 2000])
@pytest.mark.parametrize("dim", [96, 267])  # of whole chunks, or not; many steps
def test_optimized_tiles_of_every_shape_give_the_same_bits(
    dim, num_tokens, gpu_dtype, launches, monkeypatch
):
    shared = cuda.current_device().shared_bytes
    tokens = np.random.default_rng(dim).standard_normal((2, num_tokens, dim))
    x = as_given(tokens, "cupy", gpu_dtype)
    calls = {
        "self_attention_states": lambda: qm.self_attention_entropy(x),
        "query_key_entropy": lambda: qm.query_key_entropy(x, x, causal=True),
        "cosine_similarity": lambda: qm.cosine_similarity(x),
        "nearest_anchors": lambda: qm.reconstruction_error(x, x[:, ::3]),
    }
    monkeypatch.setattr(cuda, "_WIDE_COST", 0)  # whether it pays or not
    for kernel, call in calls.items():
        found = {}
        # Whole tiles; half ones; then wide ones and kept queries, where there is room.
        for device in ((1, 0), (10_000, 0), (1, shared)):
            monkeypatch.setattr(
                cuda, "current_device", lambda now=device: cuda.Device(*now)
            )
            launches.clear()
            got = on_host(call())
            (name,) = (name for name in launches if name.startswith(kernel))
            found[name] = got
        if kernel != "query_key_entropy":
            assert {kernel, f"{kernel}_half"} <= set(found)
        for name, got in found.items():
            np.testing.assert_array_equal(got, found[kernel], name)

"""Long sequences on a GPU: every clustering method at lengths where launches change.

Blocks, shared memory and cooperation depend on N. Each method is compared with the
reference on both sides of these changes. ``QM_CUPY_LONG`` names the lengths N.
"""

import functools
import os

import ml_dtypes
import numpy as np
import pytest
from gpu_parity import as_argument, marks, on_host
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS

pytestmark = marks

SIZES = [
    int(n) for n in os.environ.get("QM_CUPY_LONG", "600,1100,1600,4096").split(",")
]
DIM = 16  # small, because the reference runs at every length
# The fraction of tokens whose group may differ if sums are in float32: of nearly equal
# distances, another one may be the smallest.
FLIPPED = 0.01


@functools.cache
def tokens_of(num_tokens):
    """Return tokens (2, N, D) that every dtype represents exactly; K = N // 3.

    The input is then the same in every dtype, so one reference is enough.
    """
    x = np.random.default_rng(num_tokens).standard_normal((2, num_tokens, DIM))
    # Rounds to 8 bits.
    return x.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float64)


@functools.cache
def labels_of(num_tokens, method):
    return qm.cluster_tokens(tokens_of(num_tokens), num_tokens // 3, method=method)


def first_members(labels):
    # Groups may be numbered differently; their first members identify them.
    """Return the position of the first token of each token's group, (B, N)."""
    return np.array([np.unique(x, return_index=True)[1][x] for x in labels])


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_clustering(method, num_tokens, gpu_kernels, gpu_dtype):
    tokens, num_groups = tokens_of(num_tokens), num_tokens // 3
    argument = as_argument(tokens, "cupy", gpu_dtype)
    labels = on_host(qm.cluster_tokens(argument, num_groups, method=method))
    wanted = first_members(labels_of(num_tokens, method))
    got = first_members(labels)
    for sequence in labels:
        np.testing.assert_array_equal(np.unique(sequence), np.arange(num_groups))
        # The last member is the first one of the reversed sequence.
        last = np.unique(sequence[::-1], return_index=True)[1]
        assert (np.diff(last) < 0).all()  # groups are in the order of their last token
    allowed = 0 if gpu_dtype == np.float64 else FLIPPED
    assert (got != wanted).mean() <= allowed


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_quickmerge(method, num_tokens, gpu_kernels):
    """The pipeline at these lengths, with protected tokens, padding and K each."""
    tokens = tokens_of(num_tokens)
    mask = np.ones(tokens.shape[:2], np.bool_)
    mask[1, num_tokens // 2 :] = False
    protect = np.zeros_like(mask)
    protect[:, 0] = True
    counts = mask.sum(-1) // 4
    inputs = {"tokens": tokens, "mask": mask, "protect": protect, "budget": counts}
    wanted = qm.quickmerge(**inputs, method=method)
    on_gpu = {k: as_argument(x, "cupy", np.dtype("f8")) for k, x in inputs.items()}
    # In float64 no distance is near enough to another one for a different label.
    got = qm.quickmerge(**on_gpu, method=method)
    for name in ("labels", "sizes", "positions"):
        x, y = getattr(got, name), getattr(wanted, name)
        np.testing.assert_array_equal(on_host(x), y, err_msg=name)
    for name in ("tokens", "mass"):
        x, y = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(on_host(x), y, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("num_tokens", [n for n in SIZES if n < 2000])
@pytest.mark.parametrize("dim", [96, 267])  # whole chunks, or a remainder; many steps
def test_optimized_tiles_of_every_shape_give_the_same_bits(
    dim, num_tokens, gpu_dtype, launches, monkeypatch
):
    shared = cuda.current_device().shared_bytes
    tokens = np.random.default_rng(dim).standard_normal((2, num_tokens, dim))
    x = as_argument(tokens, "cupy", gpu_dtype)
    calls = {
        "self_attention_states": lambda: qm.self_attention_entropy(x),
        "query_key_entropy": lambda: qm.query_key_entropy(x, x, causal=True),
        "query_key_received": lambda: qm.attention_received(
            query=x, key=x, causal=True
        ),
        "cosine_similarity": lambda: qm.cosine_similarity(x),
        "nearest_anchors": lambda: qm.reconstruction_error(x, x[:, ::3]),
    }
    monkeypatch.setattr(cuda, "_WIDE_COST", 0)  # select wide tiles even if slower
    for kernel, call in calls.items():
        results = {}
        # Whole tiles; half tiles; then wide ones and kept queries, if they fit.
        for device in ((1, 0), (10_000, 0), (1, shared)):
            monkeypatch.setattr(
                cuda, "current_device", lambda limits=device: cuda.Device(*limits)
            )
            launches.clear()
            got = on_host(call())
            # One kernel with any suffix must have run, or the test would compare
            # nothing.
            (name,) = (name for name in launches if name.startswith(kernel))
            results[name] = got
        if not kernel.startswith("query_key"):
            assert {kernel, f"{kernel}_half"} <= set(results)
        for name, got in results.items():
            np.testing.assert_array_equal(got, results[kernel], name)

"""Groups by Euclidean distance on interpreted kernels, against the NumPy reference.

The interpreter in tests/ptx runs the compiled kernels on the CPU.
"""

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import dtypes

import qm_cupy as qm
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES
from qm_cupy.stages.clustering.metrics import centered_tokens_cuda

methods = pytest.mark.parametrize("method", METHODS)
every_kernel = pytest.mark.parametrize("kernels", ["optimized", "basic"])
linkages = pytest.mark.parametrize("method", LINKAGES)


def batch_of(dtype, num_tokens=40, dim=12):
    """Return tokens of very different lengths with NaN under padding, and masks."""
    rng = np.random.default_rng(num_tokens)
    tokens = rng.standard_normal((3, num_tokens, dim))
    tokens *= rng.lognormal(size=(3, num_tokens, 1))
    tokens = tokens.astype(dtype)
    mask = np.ones((3, num_tokens), np.bool_)
    mask[1] = np.arange(num_tokens) >= num_tokens // 3
    mask[2] = rng.random(num_tokens) < 0.7
    tokens[~mask] = np.nan
    protect = np.zeros((3, num_tokens), np.bool_)
    protect[:, [num_tokens // 2, num_tokens - 1]] = True
    return tokens, mask, protect, rng.random((3, num_tokens)) + 0.05


def on_cpu(tokens):
    """Return the same values in a dtype that the reference accepts."""
    return tokens.astype(np.float64)


def without_nan(tokens, mask):
    """Return the tokens for the reference, which refuses NaN under padding."""
    return np.where(mask[..., None], on_cpu(tokens), 0)


@dtypes
@methods
@pytest.mark.parametrize("options", ["mask", "mask protect", "mask mass ragged"])
@every_kernel
def test_cluster_tokens(interpreted, kernels, dtype, method, options):
    tokens, mask, protect, mass = batch_of(dtype)
    num_groups = np.array([7, 12, 9]) if "ragged" in options else 9
    arguments = {"method": method, "metric": "euclidean", "mask": mask}
    if "protect" in options:
        arguments["protect"] = protect
    if "mass" in options and method in ("average", "ward"):
        arguments["mass"] = mass
    wanted = qm.cluster_tokens(without_nan(tokens, mask), num_groups, **arguments)
    got = interpreted(
        qm.cluster_tokens, tokens, num_groups, **arguments, kernels=kernels
    )
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@every_kernel
def test_steps_of_the_matching(interpreted, kernels, dtype, metric, step):
    tokens, mask, protect, _ = batch_of(dtype)
    options = {"mask": mask, "protect": protect, "metric": metric, "step": step}
    counts = np.array([12, 9, 15])
    wanted = qm.cluster_tokens(
        without_nan(tokens, mask), counts, method="bipartite", **options
    )
    got = interpreted(
        qm.cluster_tokens,
        tokens,
        counts,
        method="bipartite",
        **options,
        kernels=kernels,
    )
    np.testing.assert_array_equal(got, wanted)


@linkages
@dtypes
@pytest.mark.parametrize("num_tokens", [2, 33, 129])
@every_kernel
def test_heights(interpreted, kernels, dtype, method, num_tokens):
    tokens, mask, _, mass = batch_of(dtype, num_tokens)
    options = {"metric": "euclidean", "mask": mask}
    if method in ("average", "ward"):
        options["mass"] = mass
    wanted = qm.linkage(without_nan(tokens, mask), method, **options)
    got = interpreted(qm.linkage, tokens, method, **options, kernels=kernels)
    rtol = 1e-9 if dtype == np.float64 else 2e-3
    scale = wanted[np.isfinite(wanted[..., 2]), 2].max()
    np.testing.assert_allclose(got[..., 2], wanted[..., 2], rtol, atol=rtol * scale)
    np.testing.assert_array_equal(got[..., 2] == np.inf, wanted[..., 2] == np.inf)
    assert (np.diff(got[0, :, 2]) >= 0).all()


@linkages
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@every_kernel
def test_tokens_far_from_the_origin(interpreted, kernels, dtype, method):
    """Without centring, products of float32 tokens would have errors of about 10."""
    tokens = np.random.default_rng(0).standard_normal((1, 30, 12)) + 1000
    tokens = tokens.astype(dtype)
    got = interpreted(qm.linkage, tokens, method, metric="euclidean", kernels=kernels)
    wanted = qm.linkage(on_cpu(tokens), method, metric="euclidean")
    rtol = 1e-4 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(got[..., 2], wanted[..., 2], rtol=rtol)


@every_kernel
@methods
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_protected_outlier_changes_no_group(interpreted, kernels, dtype, method):
    """An attention sink is often a hundred times as long as the other tokens."""
    rng = np.random.default_rng(3)
    centres = 3 * rng.standard_normal((4, 16))
    tokens = np.repeat(centres, 5, axis=0) + 0.3 * rng.standard_normal((20, 16))
    tokens = np.concatenate([1000 * tokens[:1], tokens])[None].astype(dtype)
    protect = (np.arange(21) == 0)[None]
    options = {"method": method, "metric": "euclidean", "protect": protect}
    wanted = qm.cluster_tokens(on_cpu(tokens), 9, **options)
    got = interpreted(qm.cluster_tokens, tokens, 9, **options, kernels=kernels)
    np.testing.assert_array_equal(got, wanted)


@every_kernel
@methods
@pytest.mark.parametrize("value", [0, 1, 300])
def test_equal_tokens(interpreted, kernels, method, value):
    tokens = np.full((2, 20, 5), value, np.float16)
    labels = interpreted(
        qm.cluster_tokens, tokens, 6, method=method, metric="euclidean", kernels=kernels
    )
    assert [len(set(row)) for row in labels.tolist()] == [6, 6]
    if method in LINKAGES:
        tree = interpreted(
            qm.linkage, tokens, method, metric="euclidean", kernels=kernels
        )
        assert (tree[..., 2] == 0).all()


@every_kernel
def test_equal_tokens_among_others_have_distance_zero(interpreted, kernels):
    tokens = np.repeat(batch_of(np.float32)[0][:1, :9], 4, axis=1)
    for method in LINKAGES:
        tree = interpreted(
            qm.linkage, tokens, method, metric="euclidean", kernels=kernels
        )
        assert (tree[0, :27, 2] == 0).all()
        assert (tree[0, 27:, 2] > 0).all()


@dtypes
@every_kernel
def test_centered_tokens(interpreted, kernels, dtype):
    tokens, mask, *_ = batch_of(dtype)
    got = interpreted(centered_tokens_cuda, tokens, mask, kernels=kernels)
    x = without_nan(tokens, mask)
    mean = x.sum(axis=1, keepdims=True) / mask.sum(axis=1)[:, None, None]
    wanted = np.where(mask[..., None], x - mean, 0)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    # The mean is rounded to the dtype of the tokens.
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got, wanted, atol=2 * eps * np.abs(mean).max(), rtol=eps)


@every_kernel
def test_empty_batch(interpreted, kernels):
    for method in METHODS:
        tokens = np.zeros((0, 4, 3), np.float32)
        labels = interpreted(
            qm.cluster_tokens,
            tokens,
            2,
            method=method,
            metric="euclidean",
            kernels=kernels,
        )
        assert labels.shape == (0, 4)

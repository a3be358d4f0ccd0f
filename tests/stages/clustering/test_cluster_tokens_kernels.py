"""The public clustering functions, interpreted, against NumPy's own."""

import ml_dtypes
import numpy as np
import oracle_arrays
import ptx
import pytest
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering import linkage_cuda
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.linkage import LINKAGES

KERNELS = ["optimized", "basic"]
DTYPES = [np.float16, np.float32, np.float64]
dtypes = pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def interpreted(monkeypatch):
    """Return a function that calls another one, whose kernels are interpreted."""

    def call(function, *args, kernels="optimized", device=(5, 0), **options):
        with monkeypatch.context() as patch, qm.use_kernels(kernels):
            ptx.install(patch)
            patch.setattr(linkage_cuda, "LINKAGE_THREADS", {4: 64, 8: 64})
            patch.setattr(cuda, "current_device", lambda: cuda.Device(*device))
            return function(*args, **options)

    return call


def batch_of(dtype, num_tokens=40, dim=12):
    """Three sequences: full, padded on the left, and with holes."""
    rng = np.random.default_rng(num_tokens)
    tokens = rng.standard_normal((3, num_tokens, dim)).astype(dtype)
    mask = np.ones((3, num_tokens), np.bool_)
    mask[1] = np.arange(num_tokens) >= num_tokens // 3
    mask[2] = rng.random(num_tokens) < 0.7
    protect = np.zeros((3, num_tokens), np.bool_)
    protect[:, [num_tokens // 2, num_tokens - 1]] = True
    mass = rng.random((3, num_tokens)) + 0.05
    return tokens, mask, protect, mass


def on_cpu(tokens):
    """Return what NumPy can take: the same values."""
    narrow = tokens.dtype == ml_dtypes.bfloat16
    return tokens.astype(np.float32) if narrow else tokens


@dtypes
@every_kernel
@methods
@pytest.mark.parametrize("options", ["plain", "mask", "mask protect", "protect ragged"])
def test_cluster_tokens(dtype, kernels, method, options, interpreted):
    tokens, mask, protect, mass = batch_of(dtype)
    num_groups = np.array([7, 12, 9]) if "ragged" in options else 9
    given = {"method": method}
    if "mask" in options:
        given["mask"] = mask
    if "protect" in options:
        given["protect"] = protect
    if "ragged" in options and method in ("average", "ward"):
        given["mass"] = mass
    wanted = qm.cluster_tokens(on_cpu(tokens), num_groups, **given)
    got = interpreted(qm.cluster_tokens, tokens, num_groups, kernels=kernels, **given)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)
    if "ragged" not in options:
        one = {k: v[2] if k in ("mask", "protect") else v for k, v in given.items()}
        alone = interpreted(
            qm.cluster_tokens, tokens[2], num_groups, kernels=kernels, **one
        )
        np.testing.assert_array_equal(alone, wanted[2])


@methods
@pytest.mark.parametrize("order", ["last", "first"])
def test_orders(method, order, interpreted):
    tokens, mask, *_ = batch_of(np.float32, 33)
    given = {"method": method, "order": order, "mask": mask}
    wanted = qm.cluster_tokens(tokens, 6, **given)
    got = interpreted(qm.cluster_tokens, tokens, 6, **given)
    np.testing.assert_array_equal(got, wanted)


@every_kernel
def test_given_anchors(kernels, interpreted):
    tokens, mask, *_ = batch_of(np.float32)
    anchors = np.stack([np.flatnonzero(row)[[20, 3, 8, 11]] for row in mask])
    given = {"method": "nearest", "anchors": anchors, "mask": mask}
    wanted = qm.cluster_tokens(tokens, 4, **given)
    got = interpreted(qm.cluster_tokens, tokens, 4, kernels=kernels, **given)
    np.testing.assert_array_equal(got, wanted)


@every_kernel
@pytest.mark.parametrize("method", LINKAGES)
def test_linkage_and_its_cuts(kernels, method, interpreted):
    tokens, mask, _, mass = batch_of(np.float32)
    given = {"mask": mask}
    if method in ("average", "ward"):
        given["mass"] = mass
    wanted = qm.linkage(tokens, method, **given)
    got = interpreted(qm.linkage, tokens, method, kernels=kernels, **given)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got[..., 2], wanted[..., 2], rtol=1e-5)
    np.testing.assert_array_equal(got[..., [0, 1, 3]], wanted[..., [0, 1, 3]])
    for cut in ({"num_groups": 5}, {"num_groups": np.array([1, 9, 4])}):
        labels = qm.cut_linkage(wanted, mask=mask, **cut)
        found = interpreted(qm.cut_linkage, wanted, mask=mask, kernels=kernels, **cut)
        np.testing.assert_array_equal(found, labels)
    if method == "ward":
        for max_error in (0, 0.1, 0.4, 0.9, 2):
            cut = given | {"max_error": max_error}
            labels = qm.cut_linkage(wanted, **cut)
            found = interpreted(qm.cut_linkage, wanted, kernels=kernels, **cut)
            np.testing.assert_array_equal(found, labels)
    one = {k: v[0] for k, v in given.items()}
    alone = interpreted(qm.linkage, tokens[0], method, kernels=kernels, **one)
    np.testing.assert_array_equal(alone, got[0])


def test_a_batch_that_does_not_fit_goes_in_parts(interpreted, monkeypatch):
    tokens, mask, protect, mass = batch_of(np.float32)
    given = {"mask": mask, "protect": protect, "mass": mass, "method": "ward"}
    counts = np.array([5, 8, 11])
    whole = interpreted(qm.cluster_tokens, tokens, counts, **given)
    monkeypatch.setattr(linkage_cuda, "_SMALL", 0)
    each = 40 * 40 * 4
    taken = []
    cosines = linkage_cuda.cosine_similarity_cuda
    monkeypatch.setattr(
        linkage_cuda,
        "cosine_similarity_cuda",
        lambda x: (taken.append(len(x)), cosines(x))[1],
    )

    def in_parts(free):
        patch.setattr(cuda, "free_memory", lambda: free)
        return qm.cluster_tokens(tokens, counts, **given)

    with monkeypatch.context() as patch:
        ptx.install(patch)
        np.testing.assert_array_equal(in_parts(3 * each), whole)
        assert taken == [2, 1]
        with pytest.raises(MemoryError, match=r"40 tokens takes .* merge fewer tokens"):
            in_parts(each - 1)


@methods
def test_nothing_is_read_back(method, interpreted, monkeypatch):
    """On a GPU a look at an array would make the CPU wait for it."""

    class Unread(np.ndarray):
        def __bool__(self):
            raise AssertionError("read back")

        __int__ = __float__ = __index__ = __iter__ = __bool__

    tokens, mask, protect, _ = batch_of(np.float32)
    given = {"mask": mask.view(Unread), "protect": protect.view(Unread)}
    monkeypatch.setattr(cuda, "_bring_in", lambda name, x: x)
    got = interpreted(qm.cluster_tokens, tokens.view(Unread), 9, method=method, **given)
    assert got.shape == (3, 40)


@methods
def test_empty_batches_and_single_tokens(method, interpreted):
    for shape in ((0, 5, 3), (2, 1, 3), (1, 3)):
        tokens = np.ones(shape, np.float32)
        got = interpreted(qm.cluster_tokens, tokens, 1, method=method)
        assert got.shape == shape[:-1]
        assert (got == 0).all()


@pytest.mark.parametrize("method", ["average", "ward", "complete"])
def test_quality_is_not_traded(method, interpreted):
    """Squared error of the groups as SciPy's, to 1e-4, on half precision too."""
    rng = np.random.default_rng(3)
    topics = rng.standard_normal((12, 16))
    tokens = topics[rng.integers(0, 12, (2, 96))] + rng.standard_normal((2, 96, 16))
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        given = on_cpu(tokens.astype(dtype))
        labels = qm.cluster_tokens(given, 24, method=method)
        found = interpreted(qm.cluster_tokens, tokens.astype(dtype), 24, method=method)
        unit = oracle_arrays.unit(given)
        wanted = qm.reconstruction_error(
            unit, qm.merge_tokens(unit, labels, 24), labels=labels
        )
        got = qm.reconstruction_error(
            unit, qm.merge_tokens(unit, found, 24), labels=found
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

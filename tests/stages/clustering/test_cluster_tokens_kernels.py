"""The public clustering functions on interpreted kernels, against the NumPy reference.

The interpreter in tests/ptx runs the compiled kernels on the CPU.
"""

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
from qm_cupy.stages.clustering.metrics import METRICS

KERNELS = ["optimized", "basic"]
DTYPES = [np.float16, np.float32, np.float64]
dtypes = pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
every_kernel = pytest.mark.parametrize("kernels", KERNELS)
methods = pytest.mark.parametrize("method", METHODS)


def batch_of(dtype, num_tokens=40, dim=12):
    """Return three sequences: full, padded on the left, and with holes."""
    rng = np.random.default_rng(num_tokens)
    tokens = rng.standard_normal((3, num_tokens, dim)).astype(dtype)
    mask = np.ones((3, num_tokens), np.bool_)
    mask[1] = np.arange(num_tokens) >= num_tokens // 3
    mask[2] = rng.random(num_tokens) < 0.7
    protect = np.zeros((3, num_tokens), np.bool_)
    protect[:, [num_tokens // 2, num_tokens - 1]] = True
    mass = rng.random((3, num_tokens)) + 0.05  # none near 0
    return tokens, mask, protect, mass


def on_cpu(tokens):
    """Return the same values in a dtype that the reference accepts."""
    is_bfloat16 = tokens.dtype == ml_dtypes.bfloat16
    return tokens.astype(np.float32) if is_bfloat16 else tokens


@dtypes
@every_kernel
@methods
@pytest.mark.parametrize("options", ["plain", "mask", "mask protect", "protect ragged"])
def test_cluster_tokens(dtype, kernels, method, options, interpreted):
    tokens, mask, protect, mass = batch_of(dtype)
    num_groups = np.array([7, 12, 9]) if "ragged" in options else 9
    arguments = {"method": method}
    if "mask" in options:
        arguments["mask"] = mask
    if "protect" in options:
        arguments["protect"] = protect
    if "ragged" in options and method in ("average", "ward"):
        arguments["mass"] = mass
    wanted = qm.cluster_tokens(on_cpu(tokens), num_groups, **arguments)
    got = interpreted(
        qm.cluster_tokens, tokens, num_groups, kernels=kernels, **arguments
    )
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)
    # A sequence has the same labels in a batch and without the batch axis.
    if "ragged" not in options:
        sequence_arguments = {
            k: v[2] if k in ("mask", "protect") else v for k, v in arguments.items()
        }
        sequence_labels = interpreted(
            qm.cluster_tokens,
            tokens[2],
            num_groups,
            kernels=kernels,
            **sequence_arguments,
        )
        np.testing.assert_array_equal(sequence_labels, wanted[2])


@every_kernel
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", [*LINKAGES, "contiguous"])
@pytest.mark.parametrize("options", ["plain", "mask", "mask protect mass"])
def test_limits_instead_of_k(kernels, method, metric, options, interpreted):
    tokens, mask, protect, mass = batch_of(np.float32)
    mass[:, 20] = 9  # a protected token: its mass counts in the divisor only
    arguments = {"method": method, "metric": metric}
    arrays = {"mask": mask, "protect": protect, "mass": mass}
    names = set(options.split()) - {"plain"}
    if method not in ("average", "ward"):
        names -= {"mass"}
    arguments |= {name: arrays[name] for name in names}
    # Distances of unit tokens are at most 2; those of the tokens are larger.
    unit = 3 if metric == "euclidean" else 1
    limits = [{"max_distance": unit * x} for x in (0, 0.45, 0.75, 1.1, 2.3, np.inf)]
    if method == "ward":
        limits += [{"max_error": unit**2 * x} for x in (0, 0.1, 0.4, 0.9, np.inf)]
    several = set()
    for limit in limits:
        wanted = qm.cluster_tokens(tokens, **arguments, **limit)
        got = interpreted(
            qm.cluster_tokens, tokens, kernels=kernels, **arguments, **limit
        )
        np.testing.assert_array_equal(got, wanted)
        several |= set(wanted.max(axis=-1))
    assert len(several) > 3  # the limits give different K


@every_kernel
@pytest.mark.parametrize("method", [*LINKAGES, "contiguous"])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_tokens_merge_at_distance_zero(kernels, method, metric, interpreted):
    tokens = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    tokens = np.repeat(tokens, [60, 1, 40], axis=0)
    options = {"method": method, "metric": metric, "max_distance": 0}
    got = interpreted(qm.cluster_tokens, tokens, kernels=kernels, **options)
    np.testing.assert_array_equal(got, np.repeat([0, 1, 2], [60, 1, 40]))


@methods
@pytest.mark.parametrize("order", ["last", "first"])
def test_groups_in_the_order_of_last_and_first_members(method, order, interpreted):
    tokens, mask, *_ = batch_of(np.float32, 33)
    options = {"method": method, "order": order, "mask": mask}
    wanted = qm.cluster_tokens(tokens, 6, **options)
    got = interpreted(qm.cluster_tokens, tokens, 6, **options)
    np.testing.assert_array_equal(got, wanted)


@every_kernel
def test_nearest_with_anchors_of_the_caller(kernels, interpreted):
    tokens, mask, *_ = batch_of(np.float32)
    # Valid tokens of each sequence, in an order that is not sorted.
    anchors = np.stack([np.flatnonzero(row)[[20, 3, 8, 11]] for row in mask])
    options = {"method": "nearest", "anchors": anchors, "mask": mask}
    wanted = qm.cluster_tokens(tokens, 4, **options)
    got = interpreted(qm.cluster_tokens, tokens, 4, kernels=kernels, **options)
    np.testing.assert_array_equal(got, wanted)


@every_kernel
@pytest.mark.parametrize("method", LINKAGES)
def test_linkage_and_its_cuts(kernels, method, interpreted):
    tokens, mask, _, mass = batch_of(np.float32)
    options = {"mask": mask}
    if method in ("average", "ward"):
        options["mass"] = mass
    wanted = qm.linkage(tokens, method, **options)
    got = interpreted(qm.linkage, tokens, method, kernels=kernels, **options)
    assert got.dtype == np.float64
    # Heights differ by rounding (float32 cosines); merges and sizes are equal.
    np.testing.assert_allclose(got[..., 2], wanted[..., 2], rtol=1e-5)
    np.testing.assert_array_equal(got[..., [0, 1, 3]], wanted[..., [0, 1, 3]])
    for cut in ({"num_groups": 5}, {"num_groups": np.array([1, 9, 4])}):
        labels = qm.cut_linkage(wanted, mask=mask, **cut)
        result = interpreted(qm.cut_linkage, wanted, mask=mask, kernels=kernels, **cut)
        np.testing.assert_array_equal(result, labels)
    for distance in (0, wanted[0, 20, 2], np.inf):
        cut = {"max_distance": distance, "mask": mask}
        labels = qm.cut_linkage(wanted, **cut)
        result = interpreted(qm.cut_linkage, wanted, kernels=kernels, **cut)
        np.testing.assert_array_equal(result, labels)
    sequence_options = {k: v[0] for k, v in options.items()}
    sequence_tree = interpreted(
        qm.linkage, tokens[0], method, kernels=kernels, **sequence_options
    )
    np.testing.assert_array_equal(sequence_tree, got[0])


def test_a_batch_that_does_not_fit_runs_in_parts(interpreted, monkeypatch):
    tokens, mask, protect, mass = batch_of(np.float32)
    options = {"mask": mask, "protect": protect, "mass": mass, "method": "ward"}
    counts = np.array([5, 8, 11])
    whole = interpreted(qm.cluster_tokens, tokens, counts, **options)
    # Without this limit, small batches run in one launch, whatever memory is free.
    monkeypatch.setattr(linkage_cuda, "_SMALL", 0)
    bytes_per_sequence = 40 * 40 * 4  # float32 cosines
    batch_sizes = []
    similarities = linkage_cuda.similarities_cuda

    def counted(tokens, *args, **options):
        batch_sizes.append(len(tokens))
        return similarities(tokens, *args, **options)

    monkeypatch.setattr(linkage_cuda, "similarities_cuda", counted)

    def in_parts(free):
        patch.setattr(cuda, "free_memory", lambda: free)
        return qm.cluster_tokens(tokens, counts, **options)

    with monkeypatch.context() as patch:
        ptx.install(patch)
        # Cosines get three quarters of the free memory, here that of three sequences.
        # So two sequences fit at once.
        np.testing.assert_array_equal(in_parts(3 * bytes_per_sequence), whole)
        assert batch_sizes == [2, 1]
        with pytest.raises(MemoryError, match=r"40 tokens takes .* merge fewer tokens"):
            in_parts(bytes_per_sequence - 1)


@methods
def test_no_value_is_read_back_to_the_cpu(method, interpreted, monkeypatch):
    """The CPU does not read values of arrays: on a GPU, it would wait for them."""

    # An array whose values cannot become Python numbers.
    class Unread(np.ndarray):
        def __bool__(self):
            raise AssertionError("read back")

        __int__ = __float__ = __index__ = __iter__ = __bool__

    tokens, mask, protect, _ = batch_of(np.float32)
    options = {"mask": mask.view(Unread), "protect": protect.view(Unread)}
    monkeypatch.setattr(cuda, "_to_numpy_or_cupy", lambda name, x: x)
    got = interpreted(
        qm.cluster_tokens, tokens.view(Unread), 9, method=method, **options
    )
    assert got.shape == (3, 40)


@methods
def test_empty_batches_and_single_tokens(method, interpreted):
    for shape in ((0, 5, 3), (2, 1, 3), (1, 3)):
        tokens = np.ones(shape, np.float32)
        got = interpreted(qm.cluster_tokens, tokens, 1, method=method)
        assert got.shape == shape[:-1]
        assert (got == 0).all()


@pytest.mark.parametrize("method", ["average", "ward", "complete"])
def test_groups_are_as_good_as_those_of_scipy(method, interpreted):
    """The squared error equals that of the reference to 1e-4, in 16 bits too.

    The CPU reference computes the dendrogram with SciPy.
    """
    rng = np.random.default_rng(3)
    topics = rng.standard_normal((12, 16))
    # Each token is a topic with noise of the same size. So there are groups, but they
    # overlap.
    tokens = topics[rng.integers(0, 12, (2, 96))] + rng.standard_normal((2, 96, 16))
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        stored = on_cpu(tokens.astype(dtype))
        labels = qm.cluster_tokens(stored, 24, method=method)
        result = interpreted(qm.cluster_tokens, tokens.astype(dtype), 24, method=method)
        # Labels may differ if distances are nearly equal. The error must not.
        unit = oracle_arrays.unit(stored)
        wanted = qm.reconstruction_error(
            unit, qm.merge_tokens(unit, labels, 24), labels=labels
        )
        got = qm.reconstruction_error(
            unit, qm.merge_tokens(unit, result, 24), labels=result
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-4)

"""Every public function on a GPU against the NumPy reference; needs CuPy and a GPU.

``QM_CUPY_NO_POOL=1`` takes CuPy's memory pool away, so that compute-sanitizer sees the
bounds of each array, and leaves only one small size.
"""

import os
import warnings

import numpy as np
import pytest
from conftest import TOLERANCE

import qm_cupy as qm
from qm_cupy.clustering import LINKAGES, METHODS


def _import_cupy():
    """Return CuPy, or None, and why there is no GPU to test on, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy's, of a CUDA that it cannot find
            import cupy
    except ImportError as error:
        return None, f"needs CuPy: {error}"
    available = cupy.is_available()
    return cupy, None if available else "needs a GPU: cupy.is_available() is False"


cupy, missing = _import_cupy()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing is not None, reason=str(missing)),
    pytest.mark.filterwarnings("default"),  # a driver's warning is no fault of ours
]

NO_POOL = os.environ.get("QM_CUPY_NO_POOL") == "1"
SIZES = [33] if NO_POOL else [1, 33, 128, 257]
WIDTHS = {1: 1, 33: 37, 128: 64, 257: 72}  # D: whole vectors of 16 bytes, and not
# What comes out where it is not all sums: t(okens), s(ums), i(ntegers), d(endrograms),
# g(radients, in the dtype of what they belong to).
RESULTS = {
    "merge_tokens": "t",
    "unmerge_tokens": "t",
    "select_tokens": "i",
    "group_sizes": "i",
    "group_positions": "i",
    "alignment_loss": "sss",
    "alignment_loss, transformer": "sss",
    "attention_entropy_vjp": "g",
    "query_key_entropy_vjp": "gg",
    "query_key_entropy_vjp, causal": "gg",
    "self_attention_entropy_vjp": "g",
    "saliency_vjp": "g",
    "norm_saliency_vjp": "g",
    "cut_linkage": "i",
    "cut_linkage, max_error": "i",
    **{f"linkage, {method}": "d" for method in LINKAGES},
    **{f"cluster_tokens, {method}": "i" for method in METHODS},
    "quickmerge": "tiiiss",  # the fields of Merged
    "gumbel_softmax_vjp": "g",
    "saliency_mass_vjp": "gg",
    "merge_tokens_vjp": "gg",
    "unmerge_tokens_vjp": "g",
    "alignment_loss_vjp": "gssssssss",  # the tokens', and those of two MLPs
    "reconstruction_error_vjp": "gg",
    "reconstruction_error_vjp, nearest": "gg",
    "fidelity_loss_vjp": "gg",
}


def alignment_loss_vjp(forward, backward, total, **arguments):
    """Return the gradients in a row, of losses' gradients that are arguments alike."""
    by_merged, weights = qm.alignment_loss_vjp((forward, backward, total), **arguments)
    return by_merged, *weights[0], *weights[1]


def calls(num_tokens, masked=False, ragged=False):
    """Return, by name, a public function and the arguments of a call on NumPy arrays.

    Three sequences; with `ragged`, K differs between them.
    """
    rng = np.random.default_rng(num_tokens)
    batch, dim = 3, WIDTHS[num_tokens]
    mask = None
    if masked:  # on the left, and in between
        mask = rng.random((batch, num_tokens)) < 0.7
        mask[0] = np.arange(num_tokens) >= num_tokens // 3
        mask[:, -1] = True
    valid = np.full(batch, num_tokens) if mask is None else mask.sum(-1)
    counts = np.maximum(valid // np.array([3, 4, 5]), 1)
    most = int(counts.max()) if ragged else int(counts.min())
    num_groups = counts if ragged else most
    below = counts[:, None] if ragged else most
    labels = rng.integers(0, below, (batch, num_tokens)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.1] = -1
    tokens = rng.standard_normal((batch, num_tokens, dim))
    merged = rng.standard_normal((batch, most, dim))
    score, other, mass = rng.random((3, batch, num_tokens))
    mass[labels == 0] = 0  # a group that takes the plain mean
    shape = (2, batch, 2, num_tokens)  # (L, B, H, N)
    attention = rng.random((*shape, num_tokens))
    attention[..., ::3] = 0
    query, key = rng.standard_normal((2, *shape, min(dim, 64)))
    entropy = rng.random(shape)
    by_row, by_place = rng.standard_normal(shape), rng.standard_normal(score.shape)
    prior = qm.MLPPrior.init(dim, hidden_dim=50)
    transformer = qm.TransformerPrior.init(dim, hidden_dim=48, num_heads=3)
    padded = {"mask": mask}
    grouped = {"labels": labels, "num_groups": num_groups}
    softmax = {"saliency": score, "seed": 7, **padded}
    protect = np.zeros((batch, num_tokens), np.bool_)
    protect[:, -1] = num_tokens > 9
    tree = qm.linkage(tokens, "ward", **padded)
    weighed = {"tokens": tokens, **padded}
    rebuilt = {"tokens": tokens, "merged": merged}
    if ragged:  # so that padding rebuilds no token
        rebuilt["num_groups"] = num_groups
    slope, slopes = rng.standard_normal(), rng.standard_normal((3, batch))
    by_score = {"gradient": rng.standard_normal((batch, num_tokens))}
    by_token = {"gradient": rng.standard_normal(tokens.shape)}
    by_merged = {"gradient": rng.standard_normal(merged.shape)}
    return {
        "attention_entropy": (qm.attention_entropy, {"attention": attention, **padded}),
        "query_key_entropy": (
            qm.query_key_entropy,
            {"query": query, "key": key, **padded},
        ),
        "query_key_entropy, causal": (
            qm.query_key_entropy,
            {"query": query, "key": key, "causal": True, **padded},
        ),
        "self_attention_entropy": (
            qm.self_attention_entropy,
            {"tokens": tokens, **padded},
        ),
        "saliency": (qm.saliency, {"entropy": entropy, **padded}),
        "norm_saliency": (qm.norm_saliency, {"tokens": tokens, **padded}),
        "attention_entropy_vjp": (
            qm.attention_entropy_vjp,
            {"gradient": by_row, "attention": attention, **padded},
        ),
        "query_key_entropy_vjp": (
            qm.query_key_entropy_vjp,
            {"gradient": by_row, "query": query, "key": key, **padded},
        ),
        "query_key_entropy_vjp, causal": (
            qm.query_key_entropy_vjp,
            {
                **{"gradient": by_row, "query": query, "key": key},
                **{"causal": True, **padded},
            },
        ),
        "self_attention_entropy_vjp": (
            qm.self_attention_entropy_vjp,
            {"gradient": by_place, "tokens": tokens, **padded},
        ),
        "saliency_vjp": (
            qm.saliency_vjp,
            {"gradient": by_place, "entropy": entropy, **padded},
        ),
        "norm_saliency_vjp": (
            qm.norm_saliency_vjp,
            {"gradient": by_place, "tokens": tokens, **padded},
        ),
        "gumbel_softmax": (qm.gumbel_softmax, softmax),
        "gumbel_softmax, hard": (qm.gumbel_softmax, {**softmax, "hard": num_groups}),
        "saliency_mass": (
            qm.saliency_mass,
            {"saliency": score, "probabilities": other},
        ),
        "select_tokens": (
            qm.select_tokens,
            {"scores": score, "num_groups": num_groups, **padded},
        ),
        "cosine_similarity": (qm.cosine_similarity, {"tokens": tokens}),
        **{
            f"linkage, {method}": (
                qm.linkage,
                {
                    "method": method,
                    **weighed,
                    **({"mass": other} if method in ("average", "ward") else {}),
                },
            )
            for method in LINKAGES
        },
        "cut_linkage": (
            qm.cut_linkage,
            {"dendrogram": tree, "num_groups": num_groups, **padded},
        ),
        "cut_linkage, max_error": (
            qm.cut_linkage,
            {"dendrogram": tree, "max_error": 0.3, **padded},
        ),
        **{
            f"cluster_tokens, {method}": (
                qm.cluster_tokens,
                {
                    "tokens": tokens,
                    "num_groups": num_groups,
                    "method": method,
                    "protect": protect,
                    **padded,
                },
            )
            for method in METHODS
        },
        "merge_tokens": (qm.merge_tokens, {"tokens": tokens, **grouped, "mass": mass}),
        "unmerge_tokens": (qm.unmerge_tokens, {"merged": merged, "labels": labels}),
        "group_sizes": (qm.group_sizes, grouped),
        "group_positions": (qm.group_positions, grouped),
        "alignment_loss": (
            qm.alignment_loss,
            {"merged": merged, "prior": prior, "num_groups": num_groups},
        ),
        "alignment_loss, transformer": (
            qm.alignment_loss,
            {"merged": merged, "prior": transformer, "num_groups": num_groups},
        ),
        "norm_mass": (
            qm.norm_mass,
            {"tokens": tokens, "num_groups": num_groups, **padded},
        ),
        "reconstruction_error": (
            qm.reconstruction_error,
            {**rebuilt, "labels": labels, **padded},
        ),
        "reconstruction_error, nearest": (
            qm.reconstruction_error,
            {**rebuilt, **padded},
        ),
        "fidelity_loss": (qm.fidelity_loss, {**rebuilt, "labels": labels, **padded}),
        "quickmerge": (
            qm.quickmerge,
            {"tokens": tokens, "budget": num_groups, **padded},
        ),
        "gumbel_softmax_vjp": (qm.gumbel_softmax_vjp, {**by_score, **softmax}),
        "saliency_mass_vjp": (
            qm.saliency_mass_vjp,
            {**by_score, "saliency": score, "probabilities": other},
        ),
        "merge_tokens_vjp": (
            qm.merge_tokens_vjp,
            {**by_merged, "tokens": tokens, **grouped, "mass": mass},
        ),
        "unmerge_tokens_vjp": (qm.unmerge_tokens_vjp, {**by_token, **grouped}),
        "alignment_loss_vjp": (
            alignment_loss_vjp,
            {
                **dict(zip(("forward", "backward", "total"), slopes, strict=True)),
                **{"merged": merged, "prior": prior, "num_groups": num_groups},
            },
        ),
        "reconstruction_error_vjp": (
            qm.reconstruction_error_vjp,
            {"gradient": slopes[0], **rebuilt, "labels": labels, **padded},
        ),
        "reconstruction_error_vjp, nearest": (
            qm.reconstruction_error_vjp,
            {"gradient": slopes[0], **rebuilt, **padded},
        ),
        "fidelity_loss_vjp": (
            qm.fidelity_loss_vjp,
            {"gradient": slope, **rebuilt, "labels": labels, **padded},
        ),
    }


NAMES = list(calls(1))


@pytest.fixture(autouse=True, scope="module")
def memory():
    if NO_POOL:
        cupy.cuda.set_allocator(None)
    yield
    if NO_POOL:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)


@pytest.fixture(params=["basic", "optimized"])
def kernels(request):
    with qm.use_kernels(request.param):
        yield request.param


@pytest.fixture(params=["cupy", "torch", "jax"])
def library(request):
    if request.param == "torch":
        need_torch()
    if request.param == "jax":
        # Or JAX takes most of the memory for itself, when it is first used.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("this JAX has no CUDA")
    return request.param


def need_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return torch


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")  # from where NumPy knows bfloat16
    return np.dtype(request.param)


def as_numpy(x, dtype):
    """Round to `dtype`; what NumPy has no functions for is held in float32."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    return x.astype(dtype).astype(np.float32 if dtype.name == "bfloat16" else dtype)


def as_given(x, library, dtype, strided=False):
    """Give an array to the GPU, floating ones in `dtype`; other arguments stay."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind == "f":
        x = x.astype(dtype)
    if strided:
        x = np.repeat(x, 2, axis=-1)
    if library == "cupy":
        given = cupy.asarray(x)
    elif library == "jax":
        import jax

        with jax.enable_x64(True):
            given = jax.numpy.asarray(x)
    else:
        import torch

        if x.dtype.name == "bfloat16":  # which torch does not take from NumPy
            given = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        else:
            given = torch.from_numpy(x).cuda()
    return given[..., ::2] if strided else given


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


def on_host(x):
    if type(x).__module__.startswith("torch"):
        x = x.cpu()
        return (
            x.float() if x.dtype.is_floating_point and x.itemsize == 2 else x
        ).numpy()
    return x.get() if isinstance(x, cupy.ndarray) else np.asarray(x)


def result_kinds(name, dtype):
    """Return the dtype of each result and its column in the table of tolerances."""
    accumulation = "float64" if dtype == np.float64 else "float32"
    tokens, sums = (dtype.name, "stored"), (accumulation, "computed")
    gradients = tokens if dtype.itemsize == 2 else (dtype.name, "computed")
    kinds = {"t": tokens, "s": sums, "i": ("int32", None), "d": ("float64", "heights")}
    kinds["g"] = gradients
    return [kinds[letter] for letter in RESULTS.get(name, "s")]


def run(call, library, dtype, strided=False):
    function, arguments = call
    given = {k: as_given(x, library, dtype, strided) for k, x in arguments.items()}
    return leaves(function(**given))


def check(name, got, call, library, dtype):
    """Hold results against the reference: values, dtype, kind, place and layout."""
    function, arguments = call
    wanted = leaves(function(**{k: as_numpy(x, dtype) for k, x in arguments.items()}))
    assert len(got) == len(wanted)
    # Both sides round, and what comes at the end of a pipeline has rounded often.
    room = 20 if name == "quickmerge" else 2
    kinds = result_kinds(name, dtype)
    for x, y, (kind, column) in zip(got, wanted, kinds, strict=True):
        assert type(x).__module__.split(".")[0].removesuffix("lib") == library
        assert str(x.dtype).removeprefix("torch.") == kind
        assert tuple(x.shape) == np.shape(y)
        if library == "torch":
            assert x.is_cuda
            assert x.is_contiguous()
        elif library == "jax":
            assert x.device.platform == "gpu"
        else:
            assert x.flags.c_contiguous
        if column == "heights":  # rows of nearly equal ones may change places
            np.testing.assert_allclose(on_host(x)[..., 2], y[..., 2], 2e-5, 2e-6)
        elif kind == "int32":
            np.testing.assert_array_equal(on_host(x), y)
        else:
            tolerance = room * getattr(TOLERANCE[dtype.name], column)
            found = on_host(x).astype(np.float64)
            np.testing.assert_allclose(found, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, num_tokens, masked, kernels, dtype):
    call = calls(num_tokens, masked)[name]
    check(name, run(call, "cupy", dtype), call, "cupy", dtype)


@pytest.mark.parametrize("name", NAMES)
def test_num_groups_per_sequence(name, library, kernels, dtype):
    call = calls(33, masked=True, ragged=True)[name]
    check(name, run(call, library, dtype), call, library, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(name, library, kernels, dtype):
    call = calls(33, masked=True)[name]
    check(name, run(call, library, dtype, strided=True), call, library, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name, kernels, dtype):
    function, arguments = calls(33)[name]
    axis = {"attention": 1, "query": 1, "key": 1, "entropy": 1}  # (L, B, …)
    arguments = {
        k: np.take(x, [], axis=axis.get(k, 0)) if isinstance(x, np.ndarray) else x
        for k, x in arguments.items()
    }
    call = function, arguments
    check(name, run(call, "cupy", dtype), call, "cupy", dtype)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_run(name, kernels, dtype):
    call = calls(SIZES[-1], masked=True)[name]
    first, again = run(call, "cupy", dtype), run(call, "cupy", dtype)
    for x, y in zip(first, again, strict=True):
        assert on_host(x).tobytes() == on_host(y).tobytes()


@pytest.mark.parametrize("name", ["cosine_similarity", "alignment_loss"])
def test_tf32_is_near_the_reference(name):
    function, arguments = call = calls(SIZES[-1])[name]
    with qm.allow_tf32():
        got = run(call, "cupy", np.dtype("f4"))
    tolerance = TOLERANCE["tf32"].computed
    for x, y in zip(got, leaves(function(**arguments)), strict=True):
        np.testing.assert_allclose(on_host(x), y, rtol=tolerance, atol=tolerance)


# Work is captured into a CUDA graph: while a stream captures, the driver refuses every
# wait for it and every touch of the legacy default stream, so neither can hide. The
# stream is not "non-blocking", which would let the latter pass.


def capture(function):
    """Return the result of a captured call, empty still, and how to fill it."""
    stream = cupy.cuda.Stream()
    cupy.cuda.Device().synchronize()  # the inputs come from another stream
    with stream:
        for _ in range(2):  # compiles the kernels and fills the stream's memory pool
            function()
        stream.synchronize()
        stream.begin_capture()
        try:
            result = function()
        finally:
            graph = stream.end_capture()

    def replay():
        graph.launch(stream)
        stream.synchronize()

    return result, replay


needs_pool = pytest.mark.skipif(NO_POOL, reason="a graph cannot allocate without pool")


@needs_pool
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_no_host_synchronisation(name, masked, kernels):
    function, arguments = calls(33, masked)[name]
    given = {k: as_given(x, "cupy", np.dtype("f4")) for k, x in arguments.items()}
    wanted = leaves(function(**given))
    got, replay = capture(lambda: leaves(function(**given)))
    for x in got:
        x[...] = 7  # memory comes back from the pool with the last result in it
    cupy.cuda.Device().synchronize()
    replay()
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x.get(), y.get())


@needs_pool
def test_a_host_synchronisation_would_be_caught():
    x = cupy.arange(3)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"[cC]apture"):
        capture(lambda: int(x.sum()))


GRAPHED = [method for method in METHODS if not (NO_POOL and method in LINKAGES)]


def sequences(seed):
    """Return tokens (2, 257, 64), or fewer without a pool, of float32."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, SIZES[-1], 64)).astype(np.float32)


def same_results(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert on_host(x).tobytes() == on_host(y).tobytes()


@pytest.mark.parametrize("method", GRAPHED)
def test_a_workspace_allocates_once(method, kernels):
    x, workspace = cupy.asarray(sequences(0)), qm.Workspace()
    wanted = qm.quickmerge(x, 9, method=method)
    out = qm.quickmerge(x * 2, 9, method=method, workspace=workspace)
    assert workspace.nbytes > 0
    qm.quickmerge(x * 3, 9, method=method, out=out, workspace=workspace)
    held = workspace.nbytes

    def refuse(size):
        raise AssertionError(f"{size} bytes are allocated")

    with cupy.cuda.using_allocator(refuse):
        got = qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)
    assert got is out
    assert workspace.nbytes == held
    same_results(got, wanted)


@pytest.mark.parametrize("method", GRAPHED)
def test_a_graph_replays_with_new_inputs(method, kernels):
    x, workspace = cupy.asarray(sequences(0)), qm.Workspace()
    out = qm.quickmerge(x, 9, method=method, workspace=workspace)

    def call():
        return qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)

    _, replay = capture(call)
    for seed in (1, 2):
        x[...] = cupy.asarray(sequences(seed))
        cupy.cuda.Device().synchronize()
        replay()
        wanted = qm.quickmerge(cupy.asarray(sequences(seed)), 9, method=method)
        same_results(out, wanted)


@pytest.mark.parametrize("method", GRAPHED)
def test_a_graph_of_torch_replays_with_new_inputs(method, kernels):
    torch = need_torch()
    x, workspace = torch.from_numpy(sequences(0)).cuda(), qm.Workspace()
    out = qm.quickmerge(x, 9, method=method, workspace=workspace)
    qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qm.quickmerge(x, 9, method=method, out=out, workspace=workspace)
    for seed in (1, 2):
        new = torch.from_numpy(sequences(seed)).cuda()
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        same_results(out, qm.quickmerge(new, 9, method=method))


def sleep():
    """Keep CuPy's current stream busy for a tenth of a second or so."""
    code = """extern "C" __global__ void wait(long long cycles) {
        for (long long start = clock64(); clock64() - start < cycles;) {}
    }"""
    cupy.RawKernel(code, "wait")((1,), (1,), (np.int64(200_000_000),))


def test_a_slow_producer_is_waited_for():
    """In its own stream, and through DLPack's `stream` from another one."""

    class Producer:
        """Speaks DLPack alone, with its work on a side stream."""

        def __dlpack_device__(self):
            return x.__dlpack_device__()

        def __dlpack__(self, *, stream=None, **options):
            with side:  # CuPy lets `stream` wait for the current one
                return x.__dlpack__(stream=stream, **options)

    values = cupy.asarray(sequences(1))
    x = cupy.zeros_like(values)
    wanted = qm.norm_saliency(values).get()
    side, ours = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    for given, stream in ((x, side), (Producer(), ours)):
        x[...] = 0
        cupy.cuda.Device().synchronize()
        with side:
            sleep()
            x[...] = values
            slow = side.record()
        with stream:
            got = qm.norm_saliency(given)
            assert not slow.done  # the call has not waited: the stream does
            np.testing.assert_array_equal(got.get(), wanted)


def test_torch_is_worked_for_in_its_current_stream():
    """Its other stream, which waits for that one, does not read too early."""
    torch = need_torch()
    values = torch.from_numpy(sequences(1)).cuda()
    x = torch.zeros_like(values)
    wanted = qm.norm_saliency(values).cpu()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.copy_(values)
        slow = side.record_event()
        got = qm.norm_saliency(x)
        assert not slow.query()  # the call has not waited
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got.cpu(), wanted)

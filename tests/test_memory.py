"""The memory of calls on a CPU: estimates, measurements, and the refusal before work.

tracemalloc measures the peak of all arrays of NumPy, also those that SciPy makes.
"""

import re
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import qm_cupy as qm
from qm_cupy import host_memory
from qm_cupy.arrays.checks import check_finite_values
from qm_cupy.memory import quickmerge_bytes
from qm_cupy.sources import NO_SOURCES
from qm_cupy.stages.clustering.checks import WEIGHTED_METHODS
from qm_cupy.stages.clustering.cluster_tokens import METHODS
from qm_cupy.stages.clustering.clustering_memory import (
    clustering_bytes,
    sequence_bytes,
    similarity_bytes,
)

SLACK = 8e6  # bytes
DTYPES = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
# Few wide tokens, many narrow ones, and batches.
SHAPES = (120, 30_000), (2500, 8), (1000, 12), (12, 400, 1000)
rng = np.random.default_rng(0)


def peak_of(call):
    """Return the most bytes of arrays that exist at the same time in a call."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before


def check(call, estimate):
    measured = peak_of(call)
    assert measured <= estimate <= 1.5 * measured + SLACK


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """Import SciPy before anything is measured."""
    qm.quickmerge(np.ones((8, 2)), 2, weights="mass")


def tokens_of(shape, dtype):
    return rng.standard_normal(shape, np.float32).astype(dtype)


class TestQuickmerge:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
    @pytest.mark.parametrize("method", METHODS)
    def test_methods(self, method, dtype, shape):
        tokens, groups = tokens_of(shape, dtype), shape[-2] // 4
        options = {"method": method}
        estimate = quickmerge_bytes(shape, dtype, groups, **options)
        check(lambda: qm.quickmerge(tokens, groups, **options), estimate)

    @pytest.mark.parametrize("metric", ["cosine", "euclidean"])
    @pytest.mark.parametrize("shape", [(120, 30_000), (2500, 8)], ids=str)
    @pytest.mark.parametrize("method", METHODS)
    def test_metrics(self, method, shape, metric):
        tokens, groups = tokens_of(shape, np.float32), shape[-2] // 4
        estimate = quickmerge_bytes(shape, np.float32, groups, method=method)
        options = {"method": method, "metric": metric}
        check(lambda: qm.quickmerge(tokens, groups, **options), estimate)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("method", WEIGHTED_METHODS)
    @pytest.mark.parametrize("equal", [False, True])
    def test_masses(self, method, shape, equal):
        """If all tokens are pairs of equal tokens, a round merges half of them."""
        tokens, groups = tokens_of(shape, np.float32), shape[-2] // 4
        if equal:
            tokens[..., 1::2, :] = tokens[..., ::2, :]
        weights = rng.random(shape[:-1], np.float32) + 0.1
        options = {"method": method, "weights": weights, "weighted_linkage": True}
        estimate = quickmerge_bytes(shape, np.float32, groups, **options)
        check(lambda: qm.quickmerge(tokens, groups, **options), estimate)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
    @pytest.mark.parametrize("weights", ["saliency", "mass"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_saliency(self, weights, dtype, shape, masked):
        """The clustering needs little memory here. Padding is NaN."""
        tokens, groups = tokens_of(shape, dtype), shape[-2] // 4
        options = {"method": "contiguous", "weights": weights}
        estimate = quickmerge_bytes(shape, dtype, groups, masked=masked, **options)
        if masked:
            options["mask"] = np.arange(shape[-2]) < shape[-2] - 1
            tokens[..., -1, :] = np.nan
        options["noise_seed"] = 1
        check(lambda: qm.quickmerge(tokens, groups, **options), estimate)

    @pytest.mark.parametrize("step", [1, 20, 59])
    def test_steps(self, step):
        tokens = tokens_of((120, 30_000), np.float32)
        options = {"method": "bipartite", "step": step}
        estimate = quickmerge_bytes(tokens.shape, tokens.dtype, 58, **options)
        check(lambda: qm.quickmerge(tokens, 58, **options), estimate)

    @pytest.mark.parametrize("groups", [1, 500, 1000])
    @pytest.mark.parametrize("method", ["nearest", "bipartite", "contiguous"])
    def test_budgets(self, method, groups):
        tokens = tokens_of((2, 1000, 1000), np.float16)
        estimate = quickmerge_bytes(tokens.shape, tokens.dtype, groups, method=method)
        check(lambda: qm.quickmerge(tokens, groups, method=method), estimate)
        unknown = quickmerge_bytes(tokens.shape, tokens.dtype, method=method)
        assert unknown >= estimate

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
    @pytest.mark.parametrize("weights", ["saliency", "mass"])
    def test_many_narrow_tokens(self, weights, dtype):
        """Arrays with one number for each token need most."""
        tokens = tokens_of((3, 50_000, 2), dtype)
        scores = rng.random(tokens.shape[:-1], np.float32)
        options = {"method": "contiguous", "weights": weights}
        estimate = quickmerge_bytes(
            tokens.shape, dtype, 49_000,
            sources=NO_SOURCES._replace(saliency=scores), **options,
        )  # fmt: skip
        options |= {"saliency": scores, "noise_seed": 1}
        check(lambda: qm.quickmerge(tokens, 49_000, **options), estimate)

    @pytest.mark.parametrize("method", ["ward", "contiguous", "nearest"])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("source", ["attention", "layers", "query", "hidden"])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_sources(self, source, method, causal, masked, dtype):
        batch, num_tokens, heads = 2, 1200, 3
        tokens = tokens_of((batch, num_tokens, 16), dtype)
        passed = {}
        if source in ("attention", "layers"):
            shape = batch, heads, num_tokens, num_tokens
            attention = rng.random(shape, np.float32).astype(dtype)
            attention = np.tril(attention) if causal else attention
            if masked:
                attention[..., -1:] = np.nan
            passed["attention"] = attention
            if source == "layers":
                passed["attention"] = attention, attention[:, :1]
        elif source == "query":  # keys have fewer heads
            passed["query"] = tokens_of((batch, 2 * heads, num_tokens, 200), dtype)
            passed["key"] = tokens_of((batch, heads, num_tokens, 200), dtype)
        else:
            states = tokens_of((batch, num_tokens, 2000), dtype)
            passed["hidden_states"] = states, states
        options = {"method": method}
        estimate = quickmerge_bytes(
            tokens.shape, dtype, 300, sources=NO_SOURCES._replace(**passed),
            masked=masked, **options,
        )  # fmt: skip
        if masked:
            options["mask"] = np.arange(num_tokens) < num_tokens - 1
        if source != "hidden":
            options["causal"] = causal
        check(lambda: qm.quickmerge(tokens, 300, **passed, **options), estimate)

    @pytest.mark.slow("merges 5000 tokens four times")
    @pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
    @pytest.mark.parametrize("masses", [False, True])
    @pytest.mark.parametrize("method", WEIGHTED_METHODS)
    def test_resident_memory(self, method, masses):
        """The operating system measures about the same."""
        code = f"""if True:
            import numpy as np, qm_cupy as qm
            from qm_cupy.memory import quickmerge_bytes
            def status(name):
                lines = open("/proc/self/status").read().splitlines()
                return next(int(x.split()[1]) * 1024 for x in lines if name in x)
            tokens = np.random.default_rng(0).standard_normal((5000, 8))
            options = {{"method": {method!r}, "weighted_linkage": {masses}}}
            if {masses}:
                options["weights"] = np.linspace(1, 2, 5000)
            qm.quickmerge(tokens[:100], 9, method={method!r})  # imports SciPy
            before = status("VmRSS")
            qm.quickmerge(tokens, 500, **options)
            estimate = quickmerge_bytes(tokens.shape, tokens.dtype, 500, **options)
            print(status("VmHWM") - before, estimate)
        """
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        measured, estimate = map(int, output.split())
        assert measured <= estimate + SLACK / 2  # the allocator keeps some memory
        assert estimate <= 1.5 * measured


class TestStages:
    @pytest.mark.parametrize("shape", [(120, 30_000), (2500, 8), (200, 50, 30)])
    @pytest.mark.parametrize("mass", [False, True])
    def test_linkage(self, shape, mass):
        tokens = tokens_of(shape, np.float32)
        options = {"mass": rng.random(shape[:-1])} if mass else {}
        rows = 32 * tokens.size // shape[-1]
        estimate = rows + sequence_bytes(*shape[-2:], "average", weighted=mass)
        check(lambda: qm.linkage(tokens, **options), estimate)

    @pytest.mark.parametrize("shape", [(120, 30_000), (2500, 8), (200, 50, 30)])
    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_cosine_similarity(self, shape, dtype):
        tokens = tokens_of(shape, dtype)
        _, estimate = similarity_bytes(shape, tokens.dtype)
        check(lambda: qm.cosine_similarity(tokens), estimate)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("method", METHODS)
    def test_cluster_tokens(self, method, masked):
        tokens = tokens_of((2, 1500, 200), np.float32)
        mask = np.arange(1500) < 1499 if masked else None
        estimate = clustering_bytes(
            tokens.shape, tokens.dtype, method, num_groups=300, copied=masked,
            by_norms=method == "nearest",
        )  # fmt: skip
        options = {"method": method, "mask": mask}
        check(lambda: qm.cluster_tokens(tokens, 300, **options), estimate)


TOKENS = tokens_of((6000, 4), np.float32)
BATCH = np.broadcast_to(TOKENS[:100], (8000, 100, 4))
WINDOWS = "cut the sequence into windows"
OTHER = f'pass `method="contiguous"` or "nearest", or {WINDOWS}'
FEWER = "pass fewer sequences per call"
REFUSED = {
    "quickmerge": (
        lambda: qm.quickmerge(TOKENS, 9),
        f"`quickmerge` of 6,000 tokens needs 0.3 GB of memory, but only 0.2 GB are "
        f"available: {OTHER}",
    ),
    "masses": (
        lambda: qm.quickmerge(
            TOKENS, 9, weights=np.ones(6000, np.float32), weighted_linkage=True
        ),
        OTHER,
    ),
    "nearest": (lambda: qm.quickmerge(TOKENS, 5990, method="nearest"), WINDOWS),
    "batch": (lambda: qm.quickmerge(np.ones((10**6, 5, 1), np.float16), 1), FEWER),
    "cluster_tokens": (lambda: qm.cluster_tokens(TOKENS, 9), OTHER),
    "linkage": (
        lambda: qm.linkage(TOKENS),
        f'use `cluster_tokens` with `method="contiguous"`, or {WINDOWS}',
    ),
    "cosine_similarity": (
        lambda: qm.cosine_similarity(np.concatenate([TOKENS] * 2)), WINDOWS,
    ),
    "similarities": (lambda: qm.cosine_similarity(BATCH * 2), FEWER),
}  # fmt: skip


class TestRefusal:
    @pytest.mark.parametrize("name", REFUSED)
    def test_before_the_work(self, monkeypatch, name):
        call, words = REFUSED[name]
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 2 * 10**8)

        def refused():
            with pytest.raises(MemoryError, match=re.escape(words) + "$") as error:
                call()
            assert len(str(error.value)) < 300

        assert peak_of(refused) < 100e6  # of the 0.3 GB

    def test_tensors_with_gradients(self, monkeypatch):
        """The operators of torch have the check too."""
        torch = pytest.importorskip("torch")
        tokens = torch.from_numpy(TOKENS.copy()).requires_grad_()
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 2 * 10**8)
        with pytest.raises(MemoryError, match="`cluster_tokens` of 6,000 tokens"):
            qm.quickmerge(tokens, 9)

    def test_enough_or_unknown(self, monkeypatch):
        for available in (2**40, None):
            monkeypatch.setattr(host_memory, "available_bytes", lambda x=available: x)
            host_memory.check_memory(10**12, "a call", "wait")
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 10**12)
        host_memory.check_memory(10**12, "a call", "wait")
        with pytest.raises(MemoryError, match=r"needs 1000\.0 GB of memory, but only"):
            host_memory.check_memory(10**12 + 1, "a call", "wait")

    def test_small_calls_read_no_limits(self, monkeypatch):
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 / 0)
        qm.quickmerge(TOKENS[:1000], 9, weights="mass")

    @pytest.mark.skipif(sys.platform != "linux", reason="has no such limit")
    def test_the_limit_of_a_process(self):
        code = """if True:
            import resource, numpy as np, qm_cupy as qm
            import scipy.cluster.hierarchy, scipy.sparse
            tokens = np.random.default_rng(0).standard_normal((20000, 2))
            resource.setrlimit(resource.RLIMIT_AS, (2 ** 31, 2 ** 31))
            try:
                qm.quickmerge(tokens, 9)
            except MemoryError as error:
                print(error)
            print(len(qm.quickmerge(tokens, 9, method="contiguous").tokens))
        """
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        assert re.fullmatch(
            r"`quickmerge` of 20,000 tokens needs 3\.2 GB of memory, but only [01]\.\d "
            r"GB are available: .*\n9\n",
            output,
        )


class TestChecksInParts:
    """Large arrays are checked in parts, which need little memory."""

    SHAPES = ((1, 2, 900, 900), (4, 700, 600), (2_000_000, 1), (3, 1_500_000), (2**21,))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_first_wrong_entry(self, shape):
        x = np.ones(shape, np.float16)  # the sum overflows, so every entry is checked
        first = tuple(n // 2 for n in shape)
        last = tuple(n - 1 for n in shape)
        x[first] = x[last] = np.nan
        assert peak_of(lambda: first_error(x, None)) < 5e6
        assert first_error(x, None) == first
        keep = np.ones(shape[-1], np.bool_)
        keep[first[-1]] = shape[-1] == 1
        assert first_error(x, keep) == (first if shape[-1] == 1 else last)
        assert first_error(x, np.zeros((), np.bool_)) is None
        x[first] = x[last] = 1
        assert first_error(x, None) is None


def first_error(x, mask):
    """Return the index in the error of `check_finite_values`, or None."""
    try:
        check_finite_values("x", x, mask)
    except ValueError as error:
        index = str(error).partition("at index ")[2]
        return tuple(map(int, re.findall(r"\d+", index)))
    return None

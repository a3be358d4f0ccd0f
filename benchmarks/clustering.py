"""Measure clustering: its rounds and bytes, and its time beside other libraries.

    python benchmarks/clustering.py [--quick] [--json PATH]

All contenders run in one process and take turns, so that a slow phase of the machine
affects all of them. Times are medians. On a CPU they depend on the number of cores.
With a GPU and CuPy, times are the GPU's. Libraries that are not installed are skipped.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # without an install

from report import write_json
from workload import cupy, torch

import kernels  # benchmarks/kernels.py, which times calls on a GPU
import qm_cupy as qm

try:
    from sklearn.cluster import AgglomerativeClustering
except ImportError:
    AgglomerativeClustering = None
try:  # ToMe's own code, which is installed from its repository
    from tome.merge import bipartite_soft_matching
except ImportError:
    bipartite_soft_matching = None

PATIENCE = 10  # seconds; a contender stops after the call that exceeds them


class Case(NamedTuple):
    """Sequences (B, N, D), each of which is clustered into K groups."""

    title: str
    batch: int
    num_tokens: int
    dim: int
    num_groups: int

    def tokens(self) -> np.ndarray:
        """Return tokens around N / 16 random centres, so that clusters exist."""
        rng = np.random.default_rng(0)
        topics = rng.standard_normal((max(self.num_tokens // 16, 1), self.dim))
        topic_of_token = rng.integers(0, len(topics), (self.batch, self.num_tokens))
        noise = rng.standard_normal((self.batch, self.num_tokens, self.dim))
        return (topics[topic_of_token] + noise).astype(np.float32)


CASES = (
    Case("8 sequences of 4096, D = 1024, to a fifth", 8, 4096, 1024, 819),
    Case("a sequence of 1024, D = 1024, to a fifth", 1, 1024, 1024, 204),
    Case("1000 documents of 300, D = 128, to a third", 1000, 300, 128, 100),
)
QUICK = (Case("2 sequences of 256, D = 64, to a fifth", 2, 256, 64, 51),)


class Work(NamedTuple):
    """The cost of one sequence: rounds, and matrix values that are read or written."""

    rounds: int
    values: int


def count_work(tokens: np.ndarray, num_groups: int) -> Work:
    """Count the work of kernels/optimized/linkage.cu by running its rounds in NumPy.

    The method is average linkage. A round merges every two clusters that are each
    other's nearest. The rounds end when the N - K lowest merges are known.
    """
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    # E(A, C), the sum of 1 - cos over all pairs, adds up when clusters merge:
    # E(A u B, C) = E(A, C) + E(B, C). The distance is E / (size of A * size of C).
    sums = 1 - unit @ unit.T  # (N, N)
    size = np.ones(len(tokens), np.float32)
    heights: list[float] = []
    rounds, values = 0, 2 * len(tokens) ** 2  # read every cosine, write its distance
    while True:
        distance = sums / (size[:, None] * size)
        np.fill_diagonal(distance, np.inf)
        nearest = distance.argmin(axis=-1)
        least = distance.min(axis=-1)
        # Later merges are at least as high as the least distance now, so merges up to
        # that height are final.
        if np.sum(np.array(heights) <= least.min()) >= len(tokens) - num_groups:
            return Work(rounds, values)
        index = np.arange(len(size))
        # Reciprocal nearest neighbours; each pair is listed once, by its lower index.
        first = np.flatnonzero((nearest[nearest] == index) & (index < nearest))
        second = nearest[first]
        heights += least[first].tolist()
        touched = np.zeros(len(size), np.bool_)
        touched[first] = touched[second] = True
        # A row is searched again if its cluster is new or lost its nearest cluster.
        searched = touched[nearest] | touched
        kept = np.delete(index, second)
        many, rows, joined = len(kept), int(searched[kept].sum()), len(first)
        # In order: the rows that are searched again, the second row of every pair that
        # merges, and (the last two terms) the values that change in rows.
        values += rows * many + joined * many + 2 * many * joined + joined * many
        sums[first] += sums[second]
        sums[:, first] += sums[:, second]
        size[first] += size[second]
        sums, size = sums[np.ix_(kept, kept)], size[kept]
        rounds += 1


def in_scipy(tokens: np.ndarray, num_groups: int) -> np.ndarray:
    """Return SciPy's labels of one sequence, by average linkage of cosines."""
    tree = hierarchy.linkage(pdist(tokens, "cosine"), "average")
    return hierarchy.fcluster(tree, num_groups, "maxclust")


def on_cpu(case: Case) -> dict[str, Callable[[], Any]]:
    """Return each contender's call, which clusters all sequences of a case."""
    tokens, num_groups = case.tokens(), case.num_groups

    def all_cores() -> Any:
        # The time includes starting the pool and sending it the sequences.
        with multiprocessing.get_context("fork").Pool() as pool:
            jobs = [(x, num_groups) for x in tokens]
            return pool.starmap(in_scipy, jobs)

    runs: dict[str, Callable[[], Any]] = {
        "SciPy": lambda: [in_scipy(x, num_groups) for x in tokens],
        "qm_cupy": lambda: qm.cluster_tokens(tokens, num_groups),
        "qm_cupy, ward": lambda: qm.cluster_tokens(tokens, num_groups, method="ward"),
    }
    if case.batch > 1 and hasattr(os, "fork"):
        runs["SciPy, all cores"] = all_cores
    if AgglomerativeClustering is not None:
        # The full tree, as SciPy builds it too; scikit-learn could stop at K groups.
        model = AgglomerativeClustering(
            num_groups, metric="cosine", linkage="average", compute_full_tree=True
        )
        runs["scikit-learn"] = lambda: [model.fit_predict(x) for x in tokens]
    for method in ("nearest", "bipartite", "contiguous"):
        runs[f"qm_cupy, {method}"] = lambda method=method: qm.cluster_tokens(
            tokens, num_groups, method=method
        )
    return runs


def on_gpu(case: Case) -> dict[str, Callable[[], Any]]:
    """Return each contender's call on a GPU, in float16."""
    tokens = cupy.asarray(case.tokens()).astype(np.float16)
    num_groups = case.num_groups
    runs: dict[str, Callable[[], Any]] = {}
    for method in ("average", "ward", "complete", "single", "nearest", "bipartite"):
        runs[f"qm_cupy, {method}"] = lambda method=method: qm.cluster_tokens(
            tokens, num_groups, method=method
        )
    if case.num_tokens <= 1024:

        def basic() -> Any:
            with qm.use_kernels("basic"):
                return qm.cluster_tokens(tokens, num_groups)

        runs["qm_cupy, average, basic"] = basic
        runs["qm_cupy, contiguous"] = lambda: qm.cluster_tokens(
            tokens, num_groups, method="contiguous"
        )
    if torch is not None:
        x = torch.from_dlpack(tokens)
        unit = torch.nn.functional.normalize(x, dim=-1)
        anchors = unit[:, :num_groups].transpose(1, 2)
        runs["torch, nearest of K: bmm + argmax"] = lambda: torch.bmm(
            unit, anchors
        ).argmax(dim=-1)
        if bipartite_soft_matching is not None:
            # One step of ToMe merges at most half of the tokens.
            step = min(case.num_tokens - num_groups, case.num_tokens // 2)
            runs["ToMe, one step"] = lambda: bipartite_soft_matching(x, step)[0](x)
    return runs


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each contender; contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(times[name]) > PATIENCE:
                continue
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args()
    has_gpu = cupy is not None and cupy.is_available()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
    if has_gpu:
        machine = ", ".join(f"{k} {v}" for k, v in kernels.machine().items())
    print(machine)
    report: dict[str, Any] = {"machine": machine, "cases": {}}
    for case in QUICK if options.quick else CASES:
        print(case.title, file=sys.stderr, flush=True)
        # The rounds depend on the tokens; the first sequence stands for all of them.
        work = count_work(case.tokens()[0], case.num_groups)
        row: dict[str, Any] = {
            "rounds of the first sequence": work.rounds,
            "bytes of the values, at least": 4 * work.values * case.batch,
        }
        if has_gpu:
            timings = kernels.measure(on_gpu(case), 5 if options.quick else 11)
            row |= {"ms": timings["ms"], "errors": timings["errors"]}
        else:
            row["ms"] = measure(on_cpu(case), 3 if options.quick else 5)
        report["cases"][case.title] = row
        size = 4e-9 * work.values * case.batch  # float32 values, in GB
        print(f"{case.title}: {work.rounds} rounds, at least {size:.2f} GB moved")
        for name, ms in row["ms"].items():
            print(f"    {name:<40}{ms:>12.3f} ms")
        for name, error in row.get("errors", {}).items():
            print(f"    {name}: {error}")
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()

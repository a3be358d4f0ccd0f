"""The whole of `quickmerge` against its peers: time, memory, growth, and does it pay?

    python benchmarks/pipeline.py [--quick] [--json PATH] [--plot PATH]
                                  [--width D] [--depth L] [--after LAYERS] [--seconds S]

Tokens are 16 x 16 patches of a photograph (matplotlib's own) at random places, in
raster order, less their mean, N from 196 to 16,384, merged to a quarter. On the CPU in
float32; on a GPU, where there is one, in float16. Contenders run in one process, in
turn: medians. One that would take longer than `--seconds` for a call, judged by the
size before, is not run.

Then the question that decides: with a transformer of `--depth` pre-norm layers of this
width (torch's, with its fused attention), merged after layer `--after`, how much time
do the layers behind it save, over that of merging? Layers to break even = time of
merging / (a layer's time for N tokens - that for N / 4).
"""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import cbook
from PIL import Image
from report import median_seconds, write_json
from scipy.cluster import hierarchy

import qm_cupy as qm
from qm_cupy._progress import progress

try:
    import torch
except ImportError:
    torch = None

PATCH = 16  # pixels; 768 numbers
SHARE = 4  # N / K
HEAD = 64  # width of a head of the transformer
GROWTH_FROM = 500  # tokens: below, calls are overhead

Contender = Callable[[Any, int], Any]
Report = dict[str, Any]


def patches(batch: int, num_tokens: int, width: int) -> np.ndarray:
    """Return tokens (B, N, D), D at most 768."""
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        picture = np.asarray(file.convert("RGB"), dtype=np.float32) / 255
    windows = np.lib.stride_tricks.sliding_window_view(picture, (PATCH, PATCH, 3))
    windows = windows.reshape(-1, PATCH, PATCH, 3)
    rng = np.random.default_rng(0)
    places = [rng.choice(len(windows), num_tokens, replace=False) for _ in range(batch)]
    tokens = windows[np.sort(places)].reshape(batch, num_tokens, -1)[..., :width]
    return tokens - tokens.mean(axis=1, keepdims=True)


# ------------------------------------------------------------------- contenders


def by_norms(x: Any, num_groups: int) -> Any:
    return qm.quickmerge(x, num_groups, saliency=qm.norm_saliency(x))


def by_matching(x: Any, num_groups: int) -> Any:
    return qm.quickmerge(x, num_groups, method="bipartite")


def reference_semantics(x: Any, num_groups: int) -> Any:
    """The paper's stages as its authors' code strings them together, in torch."""
    from sklearn.cluster import AgglomerativeClustering

    found = []
    for tokens in x:
        attention = torch.softmax(tokens @ tokens.T / tokens.shape[1] ** 0.5, dim=-1)
        attention = attention.float()
        entropy = -(attention * torch.log(attention + 1e-8)).sum(dim=-1)
        low, high = entropy.min(), entropy.max()
        score = 1 - (entropy - low) / (high - low)
        noise = -torch.log(-torch.log(torch.rand_like(score).clamp_min(1e-20)))
        chosen = torch.softmax((score + noise) / 0.1, dim=-1)
        mass = chosen * score + (1 - chosen) * 0.01
        model = AgglomerativeClustering(num_groups, metric="cosine", linkage="average")
        labels = torch.from_numpy(model.fit_predict(tokens.float().cpu().numpy()))
        labels = labels.to(tokens.device)
        merged = []
        for group in range(num_groups):
            members = labels == group
            weights = mass[members][:, None].to(tokens.dtype)
            merged.append((tokens[members] * weights).sum(0) / weights.sum())
        found.append(torch.stack(merged))
    return torch.stack(found)


def tome(x: Any, num_groups: int) -> Any:
    """ToMe's matching by tokens, in one place until K are left, in torch."""
    sizes = torch.ones(*x.shape[:2], 1, device=x.device, dtype=x.dtype)
    while x.shape[1] > num_groups:
        merges = min(x.shape[1] - num_groups, x.shape[1] // 2)
        unit = x / x.norm(dim=-1, keepdim=True)
        best, target = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        source, stay = order[:, :merges], order[:, merges:].sort(dim=1).values
        into = target[..., None].gather(1, source)

        total = _matched(x * sizes, source, stay, into)
        sizes = _matched(sizes, source, stay, into)
        x = total / sizes
    return x


def _matched(x: Any, source: Any, stay: Any, into: Any) -> Any:
    wide = (-1, -1, x.shape[-1])
    even, odd = x[:, ::2], x[:, 1::2]
    sums = odd.scatter_add(1, into.expand(*wide), even.gather(1, source.expand(*wide)))
    return torch.cat([even.gather(1, stay.expand(*wide)), sums], dim=1)


def ward_pooling(x: Any, num_groups: int) -> Any:
    """What multi-vector search does: SciPy's ward on unit vectors, plain means."""
    host = x if isinstance(x, np.ndarray) else x.float().cpu().numpy()
    found = []
    for tokens in host:
        unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        tree = hierarchy.linkage(unit, "ward")
        labels = hierarchy.fcluster(tree, num_groups, "maxclust") - 1
        sums = np.zeros((num_groups, tokens.shape[1]), tokens.dtype)
        np.add.at(sums, labels, tokens)
        counts = np.bincount(labels, minlength=num_groups)
        found.append(sums / np.maximum(counts, 1)[:, None])
    return np.stack(found)


def contenders() -> dict[str, Contender]:
    found: dict[str, Contender] = {
        "quickmerge": qm.quickmerge,
        "quickmerge, saliency of norms": by_norms,
        "quickmerge, bipartite": by_matching,
        "SciPy, ward pooling": ward_pooling,
    }
    if torch is not None:
        found["torch, ToMe's matching"] = tome
    if torch is not None and importlib.util.find_spec("sklearn"):
        found["torch + scikit-learn, the paper's stages"] = reference_semantics
    return found


def stages(x: Any, num_groups: int) -> dict[str, Callable[[], Any]]:
    """Return what `quickmerge` does, a stage at a time."""
    entropy = qm.self_attention_entropy(x)

    def mass() -> Any:
        score = qm.saliency(entropy)
        return qm.saliency_mass(score, qm.gumbel_softmax(score, seed=0))

    weights, labels = mass(), qm.cluster_tokens(x, num_groups)

    def merge() -> Any:
        merged = qm.merge_tokens(x, labels, num_groups, mass=weights)
        sizes = qm.group_sizes(labels, num_groups)
        return merged, sizes, qm.group_positions(labels, num_groups)

    return {
        "entropy": lambda: qm.self_attention_entropy(x),
        "saliency, Gumbel, mass": mass,
        "clustering": lambda: qm.cluster_tokens(x, num_groups),
        "merging": merge,
    }


# ---------------------------------------------------------------------- machine


class Machine:
    """Where tokens lie, and how work there is waited for and weighed."""

    def __init__(self) -> None:
        self.gpu = bool(torch is not None and torch.cuda.is_available())
        cpu = f"{platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}"
        self.name = torch.cuda.get_device_name() if self.gpu else cpu

    def put(self, x: np.ndarray, for_torch: bool) -> Any:
        if self.gpu:
            return torch.from_numpy(x).half().cuda()
        return torch.from_numpy(x) if for_torch else x

    def waited(self, call: Callable[[], Any]) -> Callable[[], Any]:
        if not self.gpu:
            return call

        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Return how many kernels a call launches, on a GPU."""
        if not self.gpu:
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        return sum(
            event.count
            for event in profile.key_averages()
            if event.device_type == on_gpu and not event.key.startswith("Mem")
        )

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the most bytes a call holds above what was held before it.

        On a GPU the allocations' sum over both pools; on Linux the resident set, whose
        mark is reset before; elsewhere unknown.
        """
        if self.gpu:
            return self._peak_on_gpu(call)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)

    def _peak_on_gpu(self, call: Callable[[], Any]) -> int:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = cupy.get_default_memory_pool().total_bytes()
        call()
        torch.cuda.synchronize()
        ours = cupy.get_default_memory_pool().total_bytes() - kept
        return int(torch.cuda.max_memory_allocated() - before + ours)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")


# ------------------------------------------------------------------ measurements


def measure_calls(
    machine: Machine, sizes: list[tuple[int, int]], width: int, seconds: float
) -> list[Report]:
    """Time, launches and memory of every contender for every (B, N)."""
    found: list[Report] = []
    last: dict[str, tuple[int, float]] = {}
    every = contenders()
    with progress(len(sizes), sys.stderr, "sizes") as shown:
        for done, (batch, num_tokens) in enumerate(sizes):
            tokens, num_groups = patches(batch, num_tokens, width), num_tokens // SHARE
            calls = {}
            for name, contender in every.items():
                work, taken = last.get(name, (1, 0.0))
                if taken * batch * num_tokens**2 / work > seconds:
                    continue
                x = machine.put(tokens, name.startswith("torch"))
                call = machine.waited(lambda x=x, f=contender, k=num_groups: f(x, k))
                if name not in last:
                    call()  # warms up: libraries, and kernels on a GPU
                calls[name] = call
            repeats = max(1, min(9, 12288 // (batch * num_tokens)))
            medians = median_seconds(calls, repeats)
            row: Report = {"batch": batch, "num_tokens": num_tokens, "contenders": {}}
            for name, taken in medians.items():
                last[name] = batch * num_tokens**2, taken
                row["contenders"][name] = {
                    "seconds": taken,
                    "launches": machine.launches(calls[name]),
                    "peak_bytes": machine.peak_bytes(calls[name]),
                }
            x = machine.put(tokens, for_torch=False)
            parts = stages(x, num_groups).items()
            waited = {name: machine.waited(stage) for name, stage in parts}
            row["stages"] = median_seconds(waited, repeats)
            found.append(row)
            shown(done + 1)
    return found


def growth(rows: list[Report], name: str) -> float | None:
    """Return the exponent of the time's growth over N, for one sequence."""
    points = [
        (row["num_tokens"], row["contenders"][name]["seconds"])
        for row in rows
        if row["batch"] == 1
        and row["num_tokens"] > GROWTH_FROM
        and name in row["contenders"]
    ]
    if len(points) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def layer(machine: Machine, width: int) -> Callable[[Any], Any]:
    """Return a pre-norm transformer layer of random weights, of torch's own parts."""
    functional, heads = torch.nn.functional, max(width // HEAD, 1)
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        scaled = rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[1]))
        return machine.put(scaled, for_torch=True)

    qkv, out = weights(3 * width, width), weights(width, width)
    wide, narrow = weights(4 * width, width), weights(width, 4 * width)

    def run(x: Any) -> Any:
        batch, count, _ = x.shape
        parts = functional.linear(functional.layer_norm(x, (width,)), qkv)
        parts = parts.view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + functional.linear(read.transpose(1, 2).reshape(x.shape), out)
        hidden = functional.linear(functional.layer_norm(x, (width,)), wide)
        return x + functional.linear(functional.gelu(hidden), narrow)

    return run


def measure_layers(machine: Machine, rows: list[Report], width: int) -> None:
    """Add to each row the seconds of a layer for N tokens and for K."""
    run = layer(machine, width)
    with torch.no_grad(), progress(len(rows), sys.stderr, "layers") as shown:
        for done, row in enumerate(rows):
            batch, num_tokens = row["batch"], row["num_tokens"]
            x = machine.put(patches(batch, num_tokens, width), for_torch=True)
            few = x[:, : num_tokens // SHARE].contiguous()
            calls = {
                "unmerged": machine.waited(lambda x=x: run(x)),
                "merged": machine.waited(lambda x=few: run(x)),
            }
            for call in calls.values():
                call()
            repeats = max(3, min(9, 12288 // (batch * num_tokens)))
            row["layer"] = median_seconds(calls, repeats)
            shown(done + 1)


def layers_to_break_even(row: Report, name: str) -> float:
    saved = row["layer"]["unmerged"] - row["layer"]["merged"]
    merging: float = row["contenders"][name]["seconds"]
    return merging / saved if saved > 0 else np.inf


def break_even(rows: list[Report], name: str, layers: int) -> tuple[float, str]:
    """Return the N from which merging pays for one sequence, and say it.

    Between two measured N by the logarithms of N and of the layers that it takes.
    """
    ours = [r for r in rows if r["batch"] == 1 and name in r["contenders"]]
    needed = np.array([layers_to_break_even(row, name) for row in ours])
    sizes = np.array([row["num_tokens"] for row in ours])
    losing = np.flatnonzero(needed > layers)
    if len(losing) == 0:
        return float(sizes[0]), f"at every N from {sizes[0]}"
    last = losing[-1]
    if last == len(sizes) - 1:
        return np.inf, f"not at N = {sizes[-1]}"
    if not np.isfinite(needed[last]):
        return float(sizes[last + 1]), f"from N = {sizes[last + 1]}"
    ratios = np.log(needed[last : last + 2] / layers)
    part = ratios[0] / (ratios[0] - ratios[1])
    between = np.log(sizes[last : last + 2])
    found = float(np.exp(between[0] + part * (between[1] - between[0])))
    return found, f"from N = {found:.0f}"


# ----------------------------------------------------------------------- tables


def column_titles(rows: list[Report]) -> str:
    sizes = [f"{row['batch']} x {row['num_tokens']}" for row in rows]
    return "".join(f"{size:>12}" for size in sizes)


def print_calls(rows: list[Report], names: list[str]) -> None:
    heads = column_titles(rows)
    for title, field, scale in (
        ("milliseconds a call", "seconds", 1e3),
        ("kernels a call", "launches", 1),
        ("MB held above the input", "peak_bytes", 1e-6),
    ):
        cells = {name: [r["contenders"].get(name) for r in rows] for name in names}
        if not any(c and c[field] is not None for row in cells.values() for c in row):
            continue
        print(f"\n{title + ', B x N':<40}{heads}" + "   growth" * (scale == 1e3))
        for name, row in cells.items():
            texts = [f"{scale * c[field]:.4g}" if c else "-" for c in row]
            exponent = growth(rows, name) if scale == 1e3 else None
            last = f"   N^{exponent:.2f}" if exponent else ""
            print(f"{name:<40}" + "".join(f"{t:>12}" for t in texts) + last)
    print(f"\n{'share of each stage of quickmerge':<40}{heads}")
    for stage in rows[0]["stages"]:
        shares = [r["stages"][stage] / sum(r["stages"].values()) for r in rows]
        print(f"{stage:<40}" + "".join(f"{s:>12.0%}" for s in shares))


def print_break_even(rows: list[Report], names: list[str], layers: int) -> Report:
    heads = column_titles(rows)
    print(f"\n{'milliseconds of a layer, B x N':<40}{heads}")
    for which, title in (("unmerged", "N tokens"), ("merged", f"N / {SHARE} tokens")):
        print(
            f"{title:<40}" + "".join(f"{1e3 * r['layer'][which]:>12.4g}" for r in rows)
        )
    print(f"\n{'layers to break even':<40}{heads}   with {layers} layers it pays")
    found: Report = {}
    for name in names:
        needed = [
            f"{layers_to_break_even(r, name):.3g}" if name in r["contenders"] else "-"
            for r in rows
        ]
        found[name], said = break_even(rows, name, layers)
        print(f"{name:<40}" + "".join(f"{t:>12}" for t in needed) + f"   {said}")
    return {n: x if np.isfinite(x) else None for n, x in found.items()}


def plot(report: Report, path: Path) -> None:
    """Draw time and layers to break even over N, and the share of each stage."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in report["rows"] if row["batch"] == 1]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for n, (name, marker) in enumerate(zip(report["growth"], "osDd^v", strict=False)):
        here = [row for row in rows if name in row["contenders"]]
        sizes = [row["num_tokens"] for row in here]
        style = {"marker": marker, "label": name, "color": f"C{n}"}
        taken = [1e3 * row["contenders"][name]["seconds"] for row in here]
        axes[0].plot(sizes, taken, **style)
        if "layer" in rows[0]:
            needed = [layers_to_break_even(row, name) for row in here]
            axes[1].plot(sizes, needed, **style)
    axes[0].set(title="milliseconds a call", yscale="log")
    axes[1].set(title="layers behind it, to break even", yscale="log")
    for axis in axes[:2]:
        axis.set(xscale="log", xlabel="tokens N")
        axis.set_xticks([row["num_tokens"] for row in rows])
        axis.set_xticklabels([str(row["num_tokens"]) for row in rows])
        axis.minorticks_off()
    below = np.zeros(len(rows))
    names = [str(row["num_tokens"]) for row in rows]
    for stage, (hatch, grey) in zip(
        rows[0]["stages"],
        (("", "0.25"), ("//", "0.85"), ("", "0.6"), ("..", "0.95")),
        strict=True,
    ):
        whole = [sum(row["stages"].values()) for row in rows]
        shares = np.array([r["stages"][stage] for r in rows]) / whole * 100
        style = {"hatch": hatch, "color": grey, "edgecolor": "black"}
        axes[2].bar(names, shares, bottom=below, label=stage, **style)
        below += shares
    axes[2].set(title="share of each stage, %", xlabel="tokens N", ylim=(0, 100))
    for axis, place, columns in ((axes[0], "left", 3), (axes[2], "right", 2)):
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc=f"outside lower {place}", ncols=columns)
    figure.savefig(path, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--plot", type=Path, help="draw them here, a PNG")
    parser.add_argument("--width", type=int, default=768, help="D, at most 768")
    parser.add_argument("--depth", type=int, default=12, help="layers of the model")
    parser.add_argument("--after", type=int, default=3, help="layers before the merge")
    parser.add_argument("--seconds", type=float, default=30, help="the most for a call")
    options = parser.parse_args()
    width = 64 if options.quick else options.width
    if not HEAD <= width <= 768 or width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD} up to 768, got {width}")
    if not 0 <= options.after < options.depth:
        parser.error(f"--after must be in [0, {options.depth}), got {options.after}")
    sizes = [(1, 196), (1, 576), (1, 1024), (1, 4096), (1, 16384), (8, 196), (8, 1024)]
    sizes = [(1, 64), (1, 128), (2, 64)] if options.quick else [*sizes, (8, 4096)]
    machine = Machine()
    names, layers = list(contenders()), options.depth - options.after
    print(f"qm_cupy {qm.__version__}, {machine.name}; D = {width}, K = N / {SHARE}")
    rows = measure_calls(machine, sizes, width, options.seconds)
    report: Report = {"machine": machine.name, "width": width, "rows": rows}
    report["growth"] = {name: growth(rows, name) for name in names}
    print_calls(rows, names)
    if torch is None:
        print("does it pay? that takes torch")
    else:
        measure_layers(machine, rows, width)
        report["layers"] = layers
        report["break_even"] = print_break_even(rows, names, layers)
    if options.plot:
        plot(report, options.plot)
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()

"""Speed of a language model that reads merged caches, and the time of merging.

    python benchmarks/lm_speed.py [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct (smollm2.py). Its cache has N random entries in every
layer and head: times do not depend on their values, except those of the linkage, which
are longer for random keys than for real ones. One token at a time is decoded from

- transformers' own cache with all entries,
- a `MergedCache` with a quarter, and with a tenth of them.

The contenders take turns, and the figures are medians with their quartiles. The time of
merging has two parts: `merge_kv_cache` for all layers together, and the attention that
each entry received, which the model does not return. From 32,768 entries on, only the
attention of the last queries is used (`mass="last"`). A merge pays after (time of
merging) / (time saved at each token) new tokens.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import torch
from cache_reading import Shortened, filled_cache, layers_of, mean_received
from machine import cpu
from report import write_json

import qm_cupy as qm

Report = dict[str, Any]
SIZES = 1024, 2048, 4096, 8192, 32768
NO_RECEIVED = 32768  # from this length on, the attention of all queries is not computed
BUDGETS = 0.25, 0.1
STEPS = 11  # tokens that each contender decodes
NUM_QUERIES = 256


def random_layers(model: Any, num_entries: int) -> tuple[list[Shortened], Any]:
    """Return the entries of all layers, and the queries of the last tokens."""
    config = model.config
    heads, group = config.num_key_value_heads, config.num_attention_heads
    dim = config.hidden_size // group
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    layers = [
        Shortened(
            draw(1, heads, num_entries, dim),
            draw(1, heads, num_entries, dim),
            torch.zeros(1, heads, num_entries, device=model.device),
        )
        for _ in range(config.num_hidden_layers)
    ]
    queries = draw(config.num_hidden_layers, 1, group, NUM_QUERIES, dim)
    return layers, queries


def merged(
    layers: list[Shortened], queries: Any, received: Any, inv_freq: Any, budget: float
) -> list[Shortened]:
    """Return the entries of all layers after a merge with one budget."""
    cache = qm.merge_kv_cache(
        torch.stack([x.keys for x in layers]),
        torch.stack([x.values for x in layers]),
        budget,
        query=queries,
        attention=received,
        inv_freq=inv_freq,
        per_layer=True,
    )
    return layers_of(cache)


def whole_cache(model: Any, layers: list[Shortened]) -> Any:
    """Return transformers' own cache with all entries."""
    with smollm2.other_kernels():
        from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def bytes_of(layers: list[Shortened]) -> int:
    """Return the bytes of keys, values and biases."""
    return sum(x.numel() * x.element_size() for layer in layers for x in layer)


@torch.no_grad()
def decoding(model: Any, caches: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Return the quartiles of the seconds for a token, from each cache in turn."""
    token = torch.tensor([[1]], device=model.device)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(steps + 1):
        for name, cache in caches.items():
            _, seconds = timed(partial(model, token, cache=cache))
            if step:  # the first is a warm-up
                times[name].append(seconds)
    return {
        name: np.quantile(taken, (0.25, 0.5, 0.75)).tolist()
        for name, taken in times.items()
    }


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a function, and the seconds that it took."""
    synchronize()
    start = time.perf_counter()
    result = run()
    synchronize()
    return result, time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(model: Any, num_entries: int, steps: int = STEPS) -> Report:
    """Print and return the figures for caches of N entries."""
    config = model.config
    inv_freq = model.model.rotary_emb.inv_freq.double().cpu().numpy()
    layers, queries = random_layers(model, num_entries)
    received, seconds_received = None, 0.0
    if num_entries < NO_RECEIVED:
        # The time for random queries of all tokens, layer by layer.
        shape = 1, config.num_attention_heads, num_entries, queries.shape[-1]
        every = torch.randn(shape, device=model.device)

        def receive() -> Any:
            return torch.stack([mean_received(every, x.keys) for x in layers])

        received, seconds_received = timed(receive)
    caches, report = {"all": whole_cache(model, layers)}, {"entries": num_entries}
    report["bytes"] = {"all": bytes_of(layers)}
    report["merge seconds"] = {}
    report["received seconds"] = seconds_received
    for budget in BUDGETS:
        arguments = layers, queries, received, inv_freq, budget
        shorter, seconds = timed(partial(merged, *arguments))
        name = str(budget)
        caches[name] = filled_cache(model, shorter, num_entries)
        report["bytes"][name] = bytes_of(shorter)
        report["merge seconds"][name] = seconds
    report["token seconds"] = decoding(model, caches, steps)
    add_gains(report)
    return report


def add_gains(report: Report) -> None:
    """Add and print the speed-up of each budget, and after how many tokens it pays."""
    seconds = {name: x[1] for name, x in report["token seconds"].items()}
    report["speed-up"], report["pays after"] = {}, {}
    print(
        f"{report['entries']:6d} entries: {1 / seconds['all']:6.2f} tokens/s, "
        f"{report['bytes']['all'] / 2**20:.0f} MiB; attention received in "
        f"{report['received seconds']:.1f} s",
        flush=True,
    )
    for name, taken in report["merge seconds"].items():
        saved = seconds["all"] - seconds[name]
        total = taken + report["received seconds"]
        report["speed-up"][name] = seconds["all"] / seconds[name]
        report["pays after"][name] = total / saved if saved > 0 else None
        after = f"{total / saved:.0f} tokens" if saved > 0 else "never"
        print(
            f"  to {float(name):4.0%}: {1 / seconds[name]:6.2f} tokens/s "
            f"(× {report['speed-up'][name]:.2f}), "
            f"{report['bytes'][name] / 2**20:.0f} MiB, merged in {taken:.1f} s, "
            f"pays after {after}",
            flush=True,
        )


def main() -> None:
    """Measure caches of several lengths."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a random model, briefly")
    parser.add_argument("--json", type=Path, help="write the results to a file")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}, {threads} threads")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    report: Report = {
        "device": device,
        "machine": cpu(),
        "torch": torch.__version__,
        "torch threads": threads,
        "load of the machine": load,  # other processes make times longer
        "sizes": [],
    }
    sizes = (512, 1024) if options.quick else SIZES
    model = smollm2.random_model() if options.quick else smollm2.load()[0]
    if torch.cuda.is_available():
        model = model.cuda()
    for num_entries in sizes:
        report["sizes"].append(speed(model, num_entries, 3 if options.quick else STEPS))
        if options.json:
            write_json(options.json, report)


if __name__ == "__main__":
    main()

"""Parts of benchmarks/pipeline.py: tokens of a photograph, contenders, a layer."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from guard import one_line, say
from machine import Machine, torch_or_none
from scipy.cluster import hierarchy

import qm_cupy as qm

torch = torch_or_none()

PATCH = 16  # pixels; a patch has 16 x 16 x 3 = 768 numbers
HEAD = 64  # width of a head of the transformer
OURS = "quickmerge", "quickmerge, the paper's stages", "quickmerge, bipartite"

Contender = Callable[[Any, int], Any]


@functools.cache
def photograph() -> np.ndarray:
    """Return matplotlib's photograph in [0, 1], or a picture of waves without it."""
    # gpu.sh requires neither matplotlib nor Pillow.
    try:
        from matplotlib import cbook
        from PIL import Image

        path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"), dtype=np.float32) / 255
    except Exception as error:
        say(f"the tokens come from waves, not the photograph: {one_line(error)}")
    y, x, c = np.ogrid[:600, :512, :3]
    waves = np.sin(x / 37 + c) * np.sin(y / 23) + np.sin((x + y) / 5) / 8
    return (waves / 4 + 0.5).astype(np.float32)


@functools.lru_cache(maxsize=1)  # several calls in a row ask for the same size
def patches(batch: int, num_tokens: int, width: int) -> np.ndarray:
    """Return tokens (B, N, D) with D at most 768, the same array for the same sizes."""
    windows = np.lib.stride_tricks.sliding_window_view(photograph(), (PATCH, PATCH, 3))
    windows = windows[:, :, 0]  # (rows, columns, PATCH, PATCH, 3), a view
    rows, columns = windows.shape[:2]
    rng, count = np.random.default_rng(0), rows * columns
    positions = [rng.choice(count, num_tokens, replace=False) for _ in range(batch)]
    # Sorted positions are in raster order.
    selected = windows[
        np.divmod(np.sort(positions), columns)
    ]  # (B, N, PATCH, PATCH, 3)
    tokens = selected.reshape(batch, num_tokens, -1)[..., :width]
    return tokens - tokens.mean(axis=1, keepdims=True)


def by_mass(x: Any, num_groups: int) -> Any:
    """Return `quickmerge` with the paper's stages: saliency, noise and mass."""
    return qm.quickmerge(x, num_groups, weights="mass", noise_seed=0)


def by_matching(x: Any, num_groups: int) -> Any:
    """Return `quickmerge` by bipartite matching."""
    return qm.quickmerge(x, num_groups, method="bipartite")


def reference_semantics(x: Any, num_groups: int) -> Any:
    """Return the paper's stages in torch, in the order of the authors' code."""
    from sklearn.cluster import AgglomerativeClustering

    sequences = []
    for tokens in x:  # one sequence at a time
        attention = torch.softmax(tokens @ tokens.T / tokens.shape[1] ** 0.5, dim=-1)
        attention = attention.float()
        entropy = -(attention * torch.log(attention + 1e-8)).sum(dim=-1)
        # Saliency s = 1 - Normalize(H), Gumbel-softmax π with τ = 0.1, and the mass
        # m = π s + (1 - π) ε with ε = 0.01.
        low, high = entropy.min(), entropy.max()
        score = 1 - (entropy - low) / (high - low)
        noise = -torch.log(-torch.log(torch.rand_like(score).clamp_min(1e-20)))
        probabilities = torch.softmax((score + noise) / 0.1, dim=-1)
        mass = probabilities * score + (1 - probabilities) * 0.01
        model = AgglomerativeClustering(num_groups, metric="cosine", linkage="average")
        labels = torch.from_numpy(model.fit_predict(tokens.float().cpu().numpy()))
        labels = labels.to(tokens.device)
        # Means weighted by mass, Σ m_j x_j / Σ m_j.
        merged = []
        for group in range(num_groups):
            members = labels == group
            weights = mass[members][:, None].to(tokens.dtype)
            merged.append((tokens[members] * weights).sum(0) / weights.sum())
        sequences.append(torch.stack(merged))
    return torch.stack(sequences)


def tome(x: Any, num_groups: int) -> Any:
    """Return ToMe's matching by tokens, repeated until K are left, in torch."""
    sizes = torch.ones(*x.shape[:2], 1, device=x.device, dtype=x.dtype)
    while x.shape[1] > num_groups:
        # One step merges at most half of the tokens: those at even positions, each into
        # its most similar token at an odd position.
        merges = min(x.shape[1] - num_groups, x.shape[1] // 2)
        unit = x / x.norm(dim=-1, keepdim=True)
        best, target = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        source, stay = order[:, :merges], order[:, merges:].sort(dim=1).values
        into = target[..., None].gather(1, source)

        # Means weighted by size: add the sums and the sizes.
        total = _matched(x * sizes, source, stay, into)
        sizes = _matched(sizes, source, stay, into)
        x = total / sizes
    return x


def _matched(x: Any, source: Any, stay: Any, into: Any) -> Any:
    """Add the even tokens `source` to the odd tokens `into`; `stay` do not merge."""
    wide = (-1, -1, x.shape[-1])
    even, odd = x[:, ::2], x[:, 1::2]
    sums = odd.scatter_add(1, into.expand(*wide), even.gather(1, source.expand(*wide)))
    return torch.cat([even.gather(1, stay.expand(*wide)), sums], dim=1)


def ward_pooling(x: Any, num_groups: int) -> Any:
    """Return the pooling of multi-vector search: SciPy's ward, then plain means."""
    if hasattr(x, "get"):  # a CuPy array
        host = x.get().astype(np.float32)
    else:
        host = x if isinstance(x, np.ndarray) else x.float().cpu().numpy()
    pooled = []
    for tokens in host:
        unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        tree = hierarchy.linkage(unit, "ward")
        labels = hierarchy.fcluster(tree, num_groups, "maxclust") - 1
        sums = np.zeros((num_groups, tokens.shape[1]), tokens.dtype)
        np.add.at(sums, labels, tokens)
        counts = np.bincount(labels, minlength=num_groups)
        pooled.append(sums / np.maximum(counts, 1)[:, None])
    return np.stack(pooled)


def contenders(machine: Machine) -> dict[str, Contender]:
    """Return the contenders that can run on this machine, by name."""
    result: dict[str, Contender] = {
        OURS[0]: qm.quickmerge,
        OURS[1]: by_mass,
        OURS[2]: by_matching,
        "SciPy, ward pooling": ward_pooling,
    }
    if machine.torch is not None:
        result["torch, ToMe's matching"] = tome
    if machine.torch is not None and importlib.util.find_spec("sklearn"):
        result["torch + scikit-learn, the paper's stages"] = reference_semantics
    return result


def sound(result: Any, shape: tuple[int, ...]) -> bool:
    """Return whether tokens have this shape and can be means of patches."""
    tokens = getattr(result, "tokens", result)
    # Patches are in [0, 1] minus their mean, so 2 is beyond any mean of them; NaN is
    # not below it either.
    return tuple(tokens.shape) == shape and bool((abs(tokens) <= 2).all())


def stages(x: Any, num_groups: int) -> dict[str, Callable[[], Any]]:
    """Return the paper's stages, as `by_mass` runs them, as calls on ready inputs."""
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


def layer(machine: Machine, width: int) -> Callable[[Any], Any]:
    """Return a pre-norm transformer layer with random weights, from torch's parts."""
    functional, heads = torch.nn.functional, max(width // HEAD, 1)
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        # Divided by √(inputs), so that activations keep their scale.
        scaled = rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[1]))
        return machine.put(scaled, for_torch=True)

    qkv, out = weights(3 * width, width), weights(width, width)
    wide, narrow = weights(4 * width, width), weights(width, 4 * width)

    def run(x: Any) -> Any:
        batch, count, _ = x.shape
        # x + attention(norm(x)), then x + MLP(norm(x)).
        parts = functional.linear(functional.layer_norm(x, (width,)), qkv)
        # Queries, keys and values: (3, B, H, N, d).
        parts = parts.view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + functional.linear(read.transpose(1, 2).reshape(x.shape), out)
        hidden = functional.linear(functional.layer_norm(x, (width,)), wide)
        return x + functional.linear(functional.gelu(hidden), narrow)

    return run

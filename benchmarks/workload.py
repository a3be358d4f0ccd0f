"""Operations of benchmarks/kernels.py: inputs, other libraries' forms, least work.

A function ``<name>_work`` counts the bytes, flops and exponentials that the operation
needs in any implementation, from its sizes alone. The function ``<name>`` draws its
inputs on the GPU, and gives our call and the same formula in torch and CuPy.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from guard import one_line, say
from machine import cupy_or_reason, torch_on_gpu

import qm_cupy as qm

cupy, _ = cupy_or_reason()
torch = torch_on_gpu()

ITEM = 2  # bytes of an entry of the tokens, which have 16 bits
CHUNK = 1 << 26  # entries that are drawn at a time, in float32


class Work(NamedTuple):
    """The least work of an operation, in any implementation."""

    bytes: float  # inputs that are read and results that are written, each once
    flops: float = 0  # a multiply-add is two
    exps: float = 0  # exponentials and logarithms


class Case(NamedTuple):
    """One operation at one size; every function takes the arrays `inputs`."""

    inputs: tuple[Any, ...]  # CuPy arrays
    ours: Callable[..., Any]
    in_torch: Callable[..., Any]
    in_cupy: Callable[..., Any] | None
    sample: tuple[int, ...]  # index of the sequence that is compared with the reference
    # torch and CuPy get one slice of this many leading axes at a time. Otherwise their
    # N x N would not fit the memory.
    sliced: int = 0
    others: dict[str, Callable[..., Any]] = {}  # noqa: RUF012  further calls to time


@functools.cache
def dtype() -> str:
    """Return the dtype of the tokens: bfloat16, or float16 if CuPy cannot fill it."""
    try:
        import ml_dtypes  # noqa: F401  CuPy takes bfloat16 from it

        cupy.empty(2, "bfloat16")[...] = cupy.ones(2, np.float32)
    except Exception as error:
        say(f"the dtype is float16 instead of bfloat16: {one_line(error)}")
        return "float16"
    return "bfloat16"


@functools.cache
def generators() -> list[Callable[[int], Any]]:
    """Return the first function that can draw normal numbers on the GPU, in a list."""

    def of_cupy(count: int) -> Any:
        return cupy.random.standard_normal(count, dtype=np.float32)

    def of_torch(count: int) -> Any:
        return cupy.from_dlpack(torch.randn(count, device="cuda"))

    for generator in (of_cupy, of_torch):  # CuPy needs cuRAND, which may be missing
        try:
            generator(2)
        except Exception as error:
            say(f"random numbers from another library: {one_line(error)}")
            continue
        return [generator]
    raise RuntimeError("neither CuPy nor torch can draw random numbers on this GPU")


def normal(count: int) -> Any:
    """Return normal numbers on the GPU, in float32."""
    return generators()[0](count)


def uniform(*shape: int) -> Any:
    """Return numbers in [0, 1): the fractional parts of normal numbers."""
    return (normal(math.prod(shape)) % 1).reshape(shape)


def draw(*shape: int, scale: float = 1.0) -> Any:
    """Return normal numbers times `scale`, in the dtype of the tokens."""
    x = cupy.empty(shape, dtype())
    flat = x.reshape(-1)
    for start in range(0, flat.size, CHUNK):  # a float32 copy of all would be too large
        part = flat[start : start + CHUNK]
        part[...] = np.float32(scale) * normal(part.size)
    return x


def draw_labels(batch: int, n: int, groups: int) -> Any:
    """Return random labels (B, N)."""
    return cupy.minimum(uniform(batch, n) * groups, groups - 1).astype(np.int32)


def as_torch(x: Any) -> Any:
    """Return a CuPy array as a tensor over the same memory."""
    # bfloat16 goes through int16, because DLPack may not support it here.
    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)


def entropy_in_torch(scores: Any) -> Any:
    return torch.special.entr(torch.softmax(scores.float(), -1)).sum(-1)


def entropy_in_cupy(scores: Any) -> Any:
    p = cupy.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * cupy.log(cupy.maximum(p, 1e-30))).sum(-1)


def transposed(x: Any) -> Any:
    return x.swapaxes(-1, -2)


def self_attention_work(layers: int, batch: int, n: int, dim: int) -> Work:
    # Bytes: x is read once. Flops: half of the symmetric product X Xᵀ, 2 D per pair.
    # Exps: one for every pair, although pairs (i, j) and (j, i) have the same score,
    # because the maximum that is subtracted differs between rows i and j.
    pairs = layers * batch * n * n
    return Work(ITEM * layers * batch * n * dim, pairs / 2 * 2 * dim, pairs)


def self_attention(layers: int, batch: int, n: int, dim: int) -> Case:
    # The scale keeps the attention from falling on the diagonal alone. The function
    # takes four axes as (B, H, N, d), which is the same work as layers of sequences.
    x = draw(layers, batch, n, dim, scale=0.3)

    def in_torch(x: Any) -> Any:
        return entropy_in_torch(x @ x.mT / dim**0.5)

    def in_cupy(x: Any) -> Any:
        y = x.astype(np.float32)
        return entropy_in_cupy(y @ transposed(y) / dim**0.5)

    call = qm.self_attention_entropy
    return Case((x,), call, in_torch, in_cupy, (-1, -1), sliced=1)


def query_key_work(layers: int, batch: int, heads: int, n: int, width: int) -> Work:
    # Bytes: queries and keys are read once. Each of the N x N pairs of a head takes 2 d
    # flops and an exp.
    rows = layers * batch * heads * n
    return Work(2 * ITEM * rows * width, 2 * width * rows * n, rows * n)


def query_key(layers: int, batch: int, heads: int, n: int, width: int) -> Case:
    query, key = (draw(layers, batch, heads, n, width) for _ in range(2))

    def in_torch(q: Any, k: Any) -> Any:
        return entropy_in_torch(q @ k.mT / width**0.5)

    def in_cupy(q: Any, k: Any) -> Any:
        q, k = q.astype(np.float32), k.astype(np.float32)
        return entropy_in_cupy(q @ transposed(k) / width**0.5)

    def attention(q: Any, k: Any) -> Any:
        q, k = q[None], k[None]  # the fused kernels need four axes
        return torch.nn.functional.scaled_dot_product_attention(q, k, k)

    others = {"torch's attention with V = K": attention}
    call = qm.query_key_entropy
    return Case((query, key), call, in_torch, in_cupy, (-1,) * 3, 2, others)


def given_attention_work(layers: int, batch: int, heads: int, n: int) -> Work:
    # Bytes: A is read once. Each entry a gives a log a, which is added up: 2 flops and
    # a logarithm, which costs as much as an exp.
    entries = layers * batch * heads * n * n
    return Work(ITEM * entries, 2 * entries, entries)


def given_attention(layers: int, batch: int, heads: int, n: int) -> Case:
    a = draw(layers, batch, heads, n, n)
    # The softmax of normal scores, in place, one N x N matrix at a time.
    for matrix in a.reshape(-1, n, n):
        p = cupy.exp(matrix.astype(np.float32))
        matrix[...] = p / p.sum(-1, keepdims=True)

    def in_torch(a: Any) -> Any:
        return torch.special.entr(a.float()).sum(-1)

    def in_cupy(a: Any) -> Any:
        p = a.astype(np.float32)
        return -(p * cupy.log(cupy.maximum(p, 1e-30))).sum(-1)

    return Case((a,), qm.attention_entropy, in_torch, in_cupy, (-1,) * 3, sliced=2)


def received_work(layers: int, batch: int, heads: int, n: int, width: int) -> Work:
    # The sum of a row of exps is known only after its last score. So without N x N
    # memory, every score and its exp is computed twice.
    once = query_key_work(layers, batch, heads, n, width)
    return once._replace(flops=2 * once.flops, exps=2 * once.exps)


def received(layers: int, batch: int, heads: int, n: int, width: int) -> Case:
    query, key = (draw(layers, batch, heads, n, width) for _ in range(2))

    def in_torch(q: Any, k: Any) -> Any:
        return torch.softmax((q @ k.mT / width**0.5).float(), -1).mean(-2)

    def in_cupy(q: Any, k: Any) -> Any:
        q, k = q.astype(np.float32), k.astype(np.float32)
        scores = q @ transposed(k) / width**0.5
        p = cupy.exp(scores - scores.max(-1, keepdims=True))
        return (p / p.sum(-1, keepdims=True)).mean(-2)

    def ours(q: Any, k: Any) -> Any:
        return qm.attention_received(query=q, key=k)

    return Case((query, key), ours, in_torch, in_cupy, (-1,) * 3, 2)


def received_of_given_work(layers: int, batch: int, heads: int, n: int) -> Work:
    # Bytes: A is read once. Every entry is added to the sum of its column.
    entries = layers * batch * heads * n * n
    return Work(ITEM * entries, entries)


def received_of_given(layers: int, batch: int, heads: int, n: int) -> Case:
    (a,) = given_attention(layers, batch, heads, n).inputs

    def in_torch(a: Any) -> Any:
        return a.mean(-2, dtype=torch.float32)

    def in_cupy(a: Any) -> Any:
        return a.mean(-2, dtype=np.float32)

    return Case((a,), qm.attention_received, in_torch, in_cupy, (-1,) * 3, sliced=2)


def cosine_work(batch: int, n: int, dim: int) -> Work:
    # Bytes: x is read, and N x N float32 are written. Flops: half of the symmetric
    # product, 2 D per pair.
    return Work(batch * n * (ITEM * dim + 4 * n), batch * n * n / 2 * 2 * dim)


def cosine(batch: int, n: int, dim: int) -> Case:
    x = draw(batch, n, dim)

    def in_torch(x: Any) -> Any:
        y = torch.nn.functional.normalize(x, dim=-1)
        return (y @ y.mT).float()

    def in_cupy(x: Any) -> Any:
        y = x.astype(np.float32)
        y /= cupy.linalg.norm(y, axis=-1, keepdims=True)
        return y @ transposed(y)

    return Case((x,), qm.cosine_similarity, in_torch, in_cupy, (-1,))


def merge_work(batch: int, n: int, dim: int, groups: int) -> Work:
    # Bytes: tokens, labels and mass (4 bytes each) are read, and the merged tokens are
    # written. Flops: every entry is multiplied by its mass and added.
    return Work(batch * (ITEM * (n + groups) * dim + 8 * n), 2 * batch * n * dim)


def merge(batch: int, n: int, dim: int, groups: int) -> Case:
    x = draw(batch, n, dim)
    labels = draw_labels(batch, n, groups)
    mass = uniform(batch, n) + np.float32(0.1)

    def ours(x: Any, labels: Any, mass: Any) -> Any:
        return qm.merge_tokens(x, labels, groups, mass=mass)

    def in_torch(x: Any, labels: Any, mass: Any) -> Any:
        # One index over the groups of all sequences: b K + label.
        index = labels.long() + groups * torch.arange(batch, device=x.device)[:, None]
        index, weight = index.flatten(), mass.reshape(-1, 1)
        sums = torch.zeros(batch * groups, dim, device=x.device)
        sums = sums.index_add(0, index, x.flatten(0, 1) * weight)
        total = torch.zeros(batch * groups, 1, device=x.device)
        total = total.index_add(0, index, weight)
        return (sums / total.clamp_min(1e-30)).to(x.dtype).view(batch, groups, dim)

    def in_cupy(x: Any, labels: Any, mass: Any) -> Any:
        index = (labels + groups * cupy.arange(batch)[:, None]).ravel()
        sums = cupy.zeros((batch * groups, dim), np.float32)
        weighted = x.reshape(-1, dim).astype(np.float32) * mass.reshape(-1, 1)
        cupy.add.at(sums, index, weighted)
        sums /= cupy.bincount(index, mass.ravel(), batch * groups)[:, None]
        return sums.reshape(batch, groups, dim)

    return Case((x, labels, mass), ours, in_torch, in_cupy, (-1,))


def unmerge_work(batch: int, n: int, dim: int, groups: int) -> Work:
    # Bytes: the merged tokens and the labels are read, and N tokens are written.
    return Work(batch * (ITEM * (n + groups) * dim + 4 * n))


def unmerge(batch: int, n: int, dim: int, groups: int) -> Case:
    y = draw(batch, groups, dim)
    labels = draw_labels(batch, n, groups)

    def in_torch(y: Any, labels: Any) -> Any:
        return y.gather(1, labels.long()[..., None].expand(-1, -1, dim))

    def in_cupy(y: Any, labels: Any) -> Any:
        return cupy.take_along_axis(y, labels[..., None], 1)

    return Case((y, labels), qm.unmerge_tokens, in_torch, in_cupy, (-1,))


def nearest_work(batch: int, n: int, dim: int, groups: int) -> Work:
    # Bytes: tokens and merged tokens are read; the result is one number per sequence.
    # Flops: 2 D for every pair of a token and a merged token.
    return Work(ITEM * batch * (n + groups) * dim, 2 * batch * n * groups * dim)


def nearest(batch: int, n: int, dim: int, groups: int) -> Case:
    x, y = draw(batch, n, dim), draw(batch, groups, dim)

    def in_torch(x: Any, y: Any) -> Any:
        # |x| does not change which merged token is nearest, so only y is normalised.
        near = (x @ torch.nn.functional.normalize(y, dim=-1).mT).argmax(-1)
        gap = x.float() - y.gather(1, near[..., None].expand(-1, -1, dim))
        return gap.square().sum((1, 2)) / x.float().square().sum((1, 2))

    return Case((x, y), qm.reconstruction_error, in_torch, None, (-1,))


def softmax_mass_work(batch: int, n: int) -> Work:
    # Bytes: the float32 saliency is read and the mass written. One exp per token; the
    # few flops are not counted.
    return Work(2 * 4 * batch * n, exps=batch * n)


def softmax_mass(batch: int, n: int) -> Case:
    def ours(s: Any) -> Any:
        return qm.saliency_mass(s, qm.gumbel_softmax(s, seed=0))

    def in_torch(s: Any) -> Any:
        noise = -torch.log(-torch.log(torch.rand_like(s)))
        p = torch.softmax((s + noise) / 0.1, -1)
        return p * s + (1 - p) * 0.01

    score = uniform(batch, n)
    # The noise depends on the index of a sequence. The reference computes the sample
    # alone, as sequence 0, so the sample must be sequence 0.
    return Case((score,), ours, in_torch, None, (0,))


def norms_work(batch: int, n: int, dim: int) -> Work:
    # Bytes: x is read once. Flops: every entry is squared and added.
    return Work(ITEM * batch * n * dim, 2 * batch * n * dim)


def norms(batch: int, n: int, dim: int) -> Case:
    def in_torch(x: Any) -> Any:
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        low, high = norm.amin(-1, keepdim=True), norm.amax(-1, keepdim=True)
        return (norm - low) / (high - low)

    x = draw(batch, n, dim)
    return Case((x,), qm.norm_saliency, in_torch, None, (-1,))


def alignment_work(batch: int, groups: int, dim: int) -> Work:
    # Bytes: x is read. Flops: two directions of two linear layers, each of which takes
    # 2 D H per token for H hidden units. The layers are float32, so this floor, at the
    # rate of tensor cores for 16 bits, is far below the time that they can reach.
    weights = qm.MLPPrior.init(dim).forward.weight_in.size
    return Work(ITEM * batch * groups * dim, 2 * 2 * 2 * batch * groups * weights)


def alignment(batch: int, groups: int, dim: int) -> Case:
    x = draw(batch, groups, dim)
    prior = qm.MLPPrior.init(dim)

    @functools.cache
    def nets(device: Any) -> list[Any]:
        both = prior.forward, prior.backward
        return [[torch.from_numpy(w).to(device) for w in net] for net in both]

    def in_torch(x: Any) -> Any:
        steps = torch.arange(1, groups + 1, device=x.device)[:, None]
        total, both = 0.0, (x, x.flip(1))
        for (w1, b1, w2, b2), z in zip(nets(x.device), both, strict=True):
            mean = z.float().cumsum(1) / steps
            guess = torch.relu(mean @ w1.T + b1) @ w2.T + b2
            total = total + (guess[:, :-1] - z[:, 1:]).square().mean((1, 2))
        return total

    def ours(x: Any) -> Any:
        return qm.alignment_loss(x, prior).total

    return Case((x,), ours, in_torch, None, (-1,))


class Operation(NamedTuple):
    """An operation at one size: its title, its case and its work."""

    size: str  # text that is common to all operations of a size
    title: str
    make: Callable[..., Case]
    count: Callable[..., Work]
    sizes: tuple[int, ...]  # arguments of `make` and of `count`


SIZES = {  # (B, L, N, D, H), small ones first
    "all": (
        *((1, 1, n, 768, 12) for n in (196, 576, 1024)),
        (8, 12, 4096, 1024, 16),
    ),
    "quick": ((1, 1, 196, 768, 12), (2, 2, 1024, 1024, 4)),
    "rehearse": ((1, 1, 64, 32, 2),),
}


def operations(which: str, memory: float = math.inf) -> Iterator[Operation]:
    """Yield the operations to measure; given attention takes at most `memory` bytes."""
    for b, layers, n, d, h in SIZES[which]:
        k, size = n // 4, f"B={b} N={n}"
        given_layers = max(1, int(min(layers, memory / (ITEM * b * h * n * n))))
        states, heads = f"{size} L={layers} D={d}", f"{size} L={layers} H={h}"
        matrices, groups = f"{size} L={given_layers} H={h}", f"{size} D={d} K={k}"
        # The titles name the rows of results/h200/kernels.json.
        of_states = self_attention, self_attention_work
        of_pairs = query_key, query_key_work
        of_given = given_attention, given_attention_work
        of_received = received, received_work
        of_columns = received_of_given, received_of_given_work
        of_losses = alignment, alignment_work
        of_mass = softmax_mass, softmax_mass_work
        for title, make, count, sizes in (
            (f"{states} self-attention", *of_states, (layers, b, n, d)),
            (f"{heads} query-key d=64", *of_pairs, (layers, b, h, n, 64)),
            (f"{heads} query-key d=128", *of_pairs, (layers, b, h, n, 128)),
            (f"{matrices} given A", *of_given, (given_layers, b, h, n)),
            (f"{size} D={d} cosine matrix", cosine, cosine_work, (b, n, d)),
            (f"{groups} merge", merge, merge_work, (b, n, d, k)),
            (f"{groups} unmerge", unmerge, unmerge_work, (b, n, d, k)),
            (f"{groups} error by nearest", nearest, nearest_work, (b, n, d, k)),
            (f"{size} Gumbel, softmax, mass", *of_mass, (b, n)),
            (f"{size} D={d} norm saliency", norms, norms_work, (b, n, d)),
            (f"B={b} K={k} D={d} alignment losses", *of_losses, (b, k, d)),
            (f"{heads} received d=64", *of_received, (layers, b, h, n, 64)),
            (f"{matrices} received of A", *of_columns, (given_layers, b, h, n)),
        ):
            yield Operation(size, title, make, count, sizes)

"""Forward and backward of each operation and of the whole, against torch's autograd.

    python benchmarks/gradients.py [--quick] [--json PATH] [--no-compile]

The other side is the plain formula in torch, as it is (eager) and compiled: its
gradients are compared first. One process, contenders in turn, medians; on a GPU where
there is one, in bfloat16, else on the CPU in float32. Clustering is the same call on
all sides, and in the whole only.

Then what forward and backward of the self-attention entropy hold above their input,
from N to N: ours should grow as N does, autograd's as its square.
"""

import argparse
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pipeline import Machine
from report import median_seconds, write_json

import qm_cupy as qm
import qm_cupy.torch as qt
from qm_cupy._progress import progress

TAU, EPSILON, GAMMA, ALPHA = 0.1, 0.01, 0.8, 0.1
TOLERANCE = 5e-3  # of gradients in float32, over their largest; bfloat16's is 2 ** -4

Loss = Callable[..., Any]
Report = dict[str, Any]


class Case(NamedTuple):
    """A function of tensors that require grad, in our form and in the plain one."""

    inputs: tuple[Any, ...]
    ours: Loss
    plain: Loss


# -------------------------------------------------------------- the plain formulas


def entropy(scores: Any) -> Any:
    log_attention = torch.log_softmax(scores.float(), dim=-1)
    return -(log_attention.exp() * log_attention).sum(dim=-1)


def self_attention(x: Any) -> Any:
    return entropy(x @ x.mT / x.shape[-1] ** 0.5)


def query_key(query: Any, key: Any) -> Any:
    return entropy(query @ key.mT / query.shape[-1] ** 0.5)


def given_attention(attention: Any) -> Any:
    p = attention.float()
    p = p / p.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1)


def mass(found: Any, noise: Any) -> Any:
    low, high = found.aminmax(dim=-1, keepdim=True)
    saliency = 1 - (found - low) / (high - low)
    chosen = torch.softmax((saliency + noise) / TAU, dim=-1)
    return chosen * saliency + (1 - chosen) * EPSILON


def merge(x: Any, labels: Any, num_groups: int, weights: Any) -> Any:
    index = labels.long()[..., None]
    batch, _, dim = x.shape
    total = x.new_zeros(batch, num_groups, dim, dtype=torch.float32)
    weighted = x.float() * weights[..., None]
    total = total.scatter_add(1, index.expand(x.shape), weighted)
    whole = total.new_zeros(batch, num_groups, 1)
    whole = whole.scatter_add(1, index, weights[..., None])
    return (total / whole).to(x.dtype)


def unmerge(merged: Any, labels: Any) -> Any:
    index = labels.long()[..., None].expand(*labels.shape, merged.shape[-1])
    return merged.gather(1, index)


def alignment(merged: Any, prior: Any) -> Any:
    """Return the losses (B,) of an `MLPPrior`, all steps at once."""
    x = merged.float()
    steps = torch.arange(1, x.shape[1], device=x.device)[:, None]
    total = 0
    ways = (prior.forward_prior, x), (prior.backward_prior, x.flip(1))
    for network, y in ways:
        context = y.cumsum(dim=1)[:, :-1] / steps
        total = total + ((network(context) - y[:, 1:]) ** 2).mean(dim=(1, 2))
    return total


def fidelity(x: Any, merged: Any, labels: Any) -> Any:
    gap = x.float() - unmerge(merged, labels).float()
    error = (gap**2).sum(dim=(1, 2)) / (x.float() ** 2).sum(dim=(1, 2))
    return (error - (1 - GAMMA) ** 2).clamp_min(0).mean()


# ------------------------------------------------------------------------- cases


def our_mass(found: Any) -> Any:
    saliency = qt.saliency(found)
    chosen = qt.gumbel_softmax(saliency, temperature=TAU)
    return qt.saliency_mass(saliency, chosen, epsilon=EPSILON)


def cases(machine: Machine, batch: int, num_tokens: int, dim: int) -> dict[str, Case]:
    """Return every operation at one size, K = N / 4."""
    rng, num_groups = np.random.default_rng(0), num_tokens // 4

    def draw(*shape: int) -> Any:
        x = machine.put(rng.standard_normal(shape, np.float32), for_torch=True)
        return (x.bfloat16() if machine.gpu else x).requires_grad_()

    x = draw(batch, num_tokens, dim)
    heads = [draw(1, batch, 4, num_tokens, 64) for _ in range(2)]
    attention = torch.softmax(draw(batch, num_tokens, num_tokens).detach(), dim=-1)
    values = qm.self_attention_entropy(x.detach()).requires_grad_()
    weights = our_mass(values.detach()).requires_grad_()
    labels = qt.cluster_tokens(x, num_groups)
    merged = qm.merge_tokens(x.detach(), labels, num_groups).requires_grad_()
    noise = torch.from_numpy(qm.gumbel_noise((batch, num_tokens), 0)).to(x.device)
    model = qt.QuickMergePP(dim).to(x.device)
    prior = model.ar_alignment.prior

    def by_weights(*given: Any) -> Any:
        return qt.alignment_loss(given[0], prior).total

    def whole(x: Any, *_: Any) -> Any:
        return model(x, num_groups, ALPHA)[1]["total"]

    def plain_whole(x: Any, *_: Any) -> Any:
        weights = mass(self_attention(x), noise)
        labels = qt.cluster_tokens(x, num_groups)
        merged = merge(x, labels, num_groups, weights)
        loss = ALPHA * alignment(merged, prior).mean()
        return loss + fidelity(x, merged, labels)

    trained = tuple(prior.parameters())
    return {
        "attention_entropy": Case(
            (attention.requires_grad_(),), qt.attention_entropy, given_attention
        ),
        "query_key_entropy": Case((*heads,), qt.query_key_entropy, query_key),
        "self_attention_entropy": Case((x,), qt.self_attention_entropy, self_attention),
        "saliency, Gumbel, mass": Case((values,), our_mass, lambda y: mass(y, noise)),
        "merge_tokens": Case(
            (x, weights),
            lambda x, m: qt.merge_tokens(x, labels, num_groups, mass=m),
            lambda x, m: merge(x, labels, num_groups, m),
        ),
        "unmerge_tokens": Case(
            (merged,),
            lambda y: qt.unmerge_tokens(y, labels),
            lambda y: unmerge(y, labels),
        ),
        "alignment_loss": Case(
            (merged, *trained), by_weights, lambda y, *_: alignment(y, prior)
        ),
        "fidelity_loss": Case(
            (x, merged),
            lambda x, y: qt.fidelity_loss(x, y, labels=labels, gamma=GAMMA),
            lambda x, y: fidelity(x, y, labels),
        ),
        "the whole": Case((x, *trained), whole, plain_whole),
    }


# ------------------------------------------------------------------ measurements


def gradients(function: Loss, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    result = function(*inputs)
    slope = torch.linspace(0, 1, result.numel(), device=result.device)
    slope = slope.reshape(result.shape).to(result.dtype)
    return torch.autograd.grad(result, inputs, slope)


def check(title: str, case: Case, forms: dict[str, Loss]) -> None:
    """Refuse to time contenders that do not find the same gradients."""
    wanted = gradients(case.plain, case.inputs)
    for name, form in forms.items():
        for x, y in zip(gradients(form, case.inputs), wanted, strict=True):
            half = x.dtype == torch.bfloat16
            near = (2**-4 if half else TOLERANCE) * float(y.abs().max())
            gap = float((x.float() - y.float()).abs().max())
            if gap > near:
                raise AssertionError(
                    f"{title}: {name} is {gap:g} off, {near:g} allowed"
                )


def measure(
    machine: Machine, title: str, case: Case, compiled: bool, repeats: int
) -> Report:
    """Return the median seconds of forward, and of forward and backward, of each."""
    forms = {"qm_cupy": case.ours, "torch": case.plain}
    if compiled:
        forms["torch.compile"] = torch.compile(case.plain)
    check(title, case, forms)
    calls = {}
    for name, form in forms.items():
        calls[f"{name}, forward"] = machine.waited(
            lambda form=form: form(*(x.detach() for x in case.inputs))
        )
        calls[name] = machine.waited(lambda form=form: gradients(form, case.inputs))
    for call in calls.values():
        call()  # compiles
    return median_seconds(calls, repeats)


def memory(machine: Machine, sizes: list[int], dim: int) -> Iterator[Report]:
    """Give the most bytes that forward and backward hold above tokens (1, N, D)."""
    rng = np.random.default_rng(0)
    for num_tokens in sizes:
        x = rng.standard_normal((1, num_tokens, dim), np.float32)
        x = machine.put(x, for_torch=True).requires_grad_()
        row: Report = {"num_tokens": num_tokens}
        for name, form in (
            ("qm_cupy", qt.self_attention_entropy),
            ("torch", self_attention),
        ):
            call = machine.waited(lambda form=form, x=x: gradients(form, (x,)))
            call()
            give_back_memory()
            row[name] = machine.peak_bytes(call)
        yield row


def give_back_memory() -> None:
    """Let glibc return what is free, or what it keeps would be used without a trace."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def exponent(rows: list[Report], name: str) -> float:
    """Return p of what grows as N ** p does, over the upper half of the sizes."""
    upper = rows[len(rows) // 2 - 1 :]
    points = np.log([(row["num_tokens"], max(row[name], 1)) for row in upper])
    return float(np.polyfit(*points.T, 1)[0])


# ------------------------------------------------------------------------- tables


def print_times(report: dict[str, Report]) -> None:
    print(f"\n{'milliseconds':<34}{'forward':>10}{'and back':>10}{'ratio':>8}")
    for title, medians in report.items():
        print(title)
        for name in medians:
            if name.endswith(", forward"):
                continue
            ahead, both = medians[f"{name}, forward"], medians[name]
            times = f"{1e3 * ahead:>10.3g}{1e3 * both:>10.3g}"
            print(f"    {name:<30}{times}{both / ahead:>7.1f}×")


def print_memory(rows: list[Report]) -> None:
    heads = "".join(f"{row['num_tokens']:>9}" for row in rows)
    print(f"\n{'MB of self-attention entropy, N':<34}{heads}   growth")
    for name in ("qm_cupy", "torch"):
        if any(row[name] is None for row in rows):
            print(f"    {name:<30}unknown on this machine")
            continue
        cells = "".join(f"{row[name] / 1e6:>9.1f}" for row in rows)
        print(f"    {name:<30}{cells}   N^{exponent(rows, name):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and few")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    options = parser.parse_args()
    machine = Machine()
    # Of torch's own: what it would rather have for float32, and what it deprecates.
    warnings.filterwarnings("ignore", module=r"torch\.")
    size = (2, 128, 64) if options.quick else (4, 1024, 512)
    if machine.gpu:
        size = (2, 512, 64) if options.quick else (8, 4096, 1024)
    print(f"qm_cupy {qm.__version__}, torch {torch.__version__}, {machine.name}")
    print(f"B, N, D = {size}, K = N / 4")
    found, report = cases(machine, *size), {}
    with progress(len(found), sys.stderr, "operations") as shown:
        for done, (title, case) in enumerate(found.items(), 1):
            compiled = not options.no_compile
            repeats = 3 if options.quick else 9
            report[title] = measure(machine, title, case, compiled, repeats)
            shown(done)
    print_times(report)
    sizes = [512, 1024, 2048, 4096] if options.quick else [1024, 2048, 4096, 8192]
    rows = list(memory(machine, sizes, size[-1]))
    print_memory(rows)
    if options.json:
        figures = {"machine": machine.name, "size": size, "seconds": report}
        write_json(options.json, {**figures, "memory": rows})


if __name__ == "__main__":
    main()

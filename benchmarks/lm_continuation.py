"""Continuation: what a language model predicts after its cache was shortened.

The model reads the context of a document, each method shortens the cache, and the model
then reads the tokens that follow. All figures are means over these tokens:

- KL: the divergence of the predictions from those with the whole cache, in nats.
- kept: the fraction of the entries that remain, the mean of all heads.
- loss: the negative log-probability of the true tokens. Its exponential is the
  perplexity.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from cache_methods import Shorten
from cache_reading import (
    REPEATED,
    mean_divergence,
    mean_kept,
    mean_loss,
    predict,
    read,
)
from documents import Document
from quality_tables import interval, ratio

Report = dict[str, Any]


class Trial(NamedTuple):
    """A method at one budget."""

    name: str
    shorten: Shorten
    budget: float  # the fraction of the entries that remain


def continuation(
    model: Any,
    documents: list[Document],
    num_tokens: int,
    trials: list[Trial],
    part: Report,
    repeated: int = REPEATED,
) -> Iterator[str]:
    """Add KL and loss of each trial and document to a part of a report.

    `num_tokens` is the length of the context, whose last `repeated` tokens are read a
    second time. Documents that the part has are not measured again. The name of each
    document is yielded when it is done.
    """
    methods = part.setdefault("methods", {})
    whole = part.setdefault("full", {"loss": []})["loss"]
    names = part.setdefault("documents", [])
    for document in (x for x in documents if x.name not in names):
        prompt = read(model, document.context(num_tokens), repeated)
        ids, true = document.continuation[:-1], document.continuation[1:]
        expected = predict(model, prompt, prompt.whole, ids)
        figures = []
        for _, shorten, budget in trials:
            layers = shorten(prompt, int(num_tokens * budget))
            result = predict(model, prompt, layers, ids)
            kl = mean_divergence(expected, result)
            kept = mean_kept(layers) / num_tokens
            figures.append({"kl": kl, "loss": mean_loss(result, true), "kept": kept})
        # All figures of a document, or none.
        for (name, _, budget), row in zip(trials, figures, strict=True):
            cell = methods.setdefault(name, {}).setdefault(str(budget), {})
            for key, figure in row.items():
                cell.setdefault(key, []).append(figure)
        whole.append(mean_loss(expected, true))
        names.append(document.name)
        yield document.name


def summary(report: Report, peers: tuple[str, ...], num_tokens: int) -> Report:
    """Print and return the means, with 95 % intervals by document.

    `peers` are methods; the ratio of KL is that to each of them that has the budget.
    """
    rows, whole = report["methods"], np.array(report["full"]["loss"])
    print(f"\nContexts of {num_tokens} tokens, {len(whole)} documents")
    print(f"whole cache: perplexity {np.exp(whole.mean()):.2f}")
    means: Report = {}
    for name, row in rows.items():
        for budget, cell in row.items():
            kl, loss = np.array(cell["kl"]), np.array(cell["loss"])
            rise = [float(np.expm1(x)) for x in interval(loss - whole)]
            figures: Report = {
                "kl": interval(kl),
                "perplexity": float(np.exp(loss.mean())),
                "perplexity rise": rise,
            }
            measured = [peer for peer in peers if budget in rows[peer]]
            for peer in measured:
                figures[f"kl / {peer}"] = ratio(kl, np.array(rows[peer][budget]["kl"]))
            means.setdefault(name, {})[budget] = figures
            print(f"{name:44s} {float(budget):4.0%} {_cells(figures, measured)}")
    return means


def _cells(figures: Report, peers: list[str]) -> str:
    """Return the figures of one method and budget as text."""
    text = "KL {:.4f} [{:.4f}, {:.4f}]".format(*figures["kl"])
    text += f"  perplexity {figures['perplexity']:6.2f}"
    text += " {:+6.1%} [{:+.1%}, {:+.1%}]".format(*figures["perplexity rise"])
    for peer in peers:
        text += f"  × {peer} {{:.2f}} [{{:.2f}}, {{:.2f}}]".format(
            *figures[f"kl / {peer}"]
        )
    return text

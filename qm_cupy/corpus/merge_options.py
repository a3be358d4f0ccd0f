"""Options of a merge, as the command line gives them, and the call that has them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..composition import with_defaults
from ..pipeline import quickmerge
from ..results import Merged
from ..sources import Sources
from ..stages.clustering.cluster_tokens import Method
from ..stages.clustering.labels import Order
from ..stages.clustering.metrics import Metric
from ..stages.saliency.norm_saliency import norm_saliency


class MergeOptions(NamedTuple):
    """Options of `quickmerge`, with its names. None is the default of `quickmerge`."""

    budget: int | float | None = None
    max_error: float | None = None
    max_distance: float | None = None
    # Where the saliency comes from: the norms or the entropies of the tokens. Its
    # default is the source of `quickmerge`: the attention, or else the tokens.
    saliency: str | None = None
    causal: bool = False
    method: Method | None = None
    metric: Metric = "cosine"
    step: int | None = None
    order: Order = "last"
    temperature: float | None = None
    epsilon: float | None = None
    weights: Any = None
    weighted_linkage: bool | None = None
    noise_seed: int | None = None
    # Whether a budget that a sequence cannot have becomes the nearest possible one.
    clip: bool = False

    def resolved(self, has_attention: bool) -> tuple[Method, str, bool]:
        """Return method, weights and weighted linkage, defaults included."""
        # `with_defaults` asks only which sources there are.
        attention = True if has_attention else None
        sources = Sources(self.saliency, attention, None, None, None)
        return with_defaults(
            sources, self.method, self.weights, self.weighted_linkage, self.max_error
        )


def check_options(options: MergeOptions, has_attention: bool) -> None:
    """Raise if a value is wrong whatever the tokens are, or would have no effect."""
    if options.weights == "attention" and not has_attention:
        raise ValueError("--weights attention needs the attention: --attention NAME")
    method, weights, weighted = options.resolved(has_attention)
    by_saliency = weights in ("saliency", "mass") or method == "nearest"
    reasons = {
        "--saliency": options.saliency and not by_saliency,
        "--noise-seed": options.noise_seed is not None
        and weights != "mass"
        and method != "nearest",
        "--temperature": options.temperature is not None and weights != "mass",
        "--epsilon": options.epsilon is not None and weights != "mass",
        "--causal": options.causal and not has_attention,
        "--weighted-linkage": weighted and weights == "uniform",
        "--clip": options.clip and options.budget is None,
    }
    needs = {
        "--saliency": "the weights saliency or mass, or the method nearest",
        "--noise-seed": "the weights mass or the method nearest",
        "--causal": "--attention",
        "--weighted-linkage": "other weights than uniform",
        "--clip": "--budget",
    }
    for option, wrong in reasons.items():
        if wrong:
            raise ValueError(
                f"{option} would have no effect: it needs "
                f"{needs.get(option, 'the weights mass')}"
            )
    # Merge a few tokens, so that wrong values are found now. This also loads SciPy
    # before the free memory is measured: if SciPy cannot get memory for itself, its
    # import may fail in strange ways, or never end.
    arrays = {"tokens": np.ones((1, 4, 4))}
    if has_attention:
        arrays["attention"] = np.eye(4)[None]
    limited = options.max_error is not None or options.max_distance is not None
    merge_arrays(arrays, None if limited else 1, options, 0)


def merge_arrays(
    arrays: Mapping[str, Any], budget: Any, options: MergeOptions, sequence_offset: int
) -> Merged[Any]:
    """Call `quickmerge` for the arrays of some sequences, with their budget."""
    tokens, mask = arrays["tokens"], arrays.get("mask")
    saliency = None
    if options.saliency == "norm":
        saliency = norm_saliency(tokens, mask=mask)
    attention = arrays.get("attention")
    return quickmerge(
        tokens,
        budget,
        max_error=options.max_error,
        max_distance=options.max_distance,
        hidden_states=tokens if options.saliency == "entropy" else None,
        attention=attention,
        saliency=saliency,
        causal=options.causal,
        mask=mask,
        protect=arrays.get("protect"),
        method=options.method,
        metric=options.metric,
        step=options.step,
        order=options.order,
        temperature=0.1 if options.temperature is None else options.temperature,
        epsilon=0.01 if options.epsilon is None else options.epsilon,
        weights=options.weights,
        weighted_linkage=options.weighted_linkage,
        noise_seed=options.noise_seed,
        # The Gumbel noise of a sequence depends on its index in the file, and not on
        # its index in the chunk: the size of a chunk does not change results.
        sequence_offset=sequence_offset,
    )

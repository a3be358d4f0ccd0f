"""Select the merge of each sequence that has the lowest total loss of the paper."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays.checks import check_number
from .arrays.conversion import Array, BoolArray, convert_inputs, on_callers_stream
from .arrays.dtypes import bfloat16_as_int16
from .arrays.libraries import is_cuda, no_grad
from .pipeline import quickmerge
from .priors.protocols import Prior
from .results import Choice, Merged
from .stages.alignment.alignment_loss import alignment_loss
from .stages.alignment.models import check_prior
from .stages.fidelity.reconstruction_error import reconstruction_error

# A candidate may set every argument of `quickmerge` except these four. All candidates
# merge the same tokens under the same mask. The results of all candidates exist at the
# same time, so they cannot all be written to one `out`. A workspace is for repeated
# calls with the same options, and candidates have different options.
_OPTIONS = {*inspect.signature(quickmerge).parameters} - {
    "tokens", "mask", "out", "workspace",
}  # fmt: skip
# Exactly one of these decides how many groups there are.
_AMOUNTS = "budget", "max_error", "max_distance"


@on_callers_stream
def choose_merge(
    tokens: Array,
    candidates: Sequence[Mapping[str, Any]],
    prior: Prior,
    *,
    alpha: float = 0.1,
    gamma: float = 0.8,
    mask: BoolArray | None = None,
    **options: Any,
) -> Choice[Array]:
    r"""Merge in several ways and keep the best result for each sequence.

    The best candidate has the lowest score. The score is the total loss of the paper
    [1]_,

    .. math:: \alpha L_{AR} + \max\bigl(0,
        \lVert X - \hat X \rVert^2 / \lVert X \rVert^2 - (1 - \gamma)^2\bigr).

    Here :math:`L_{AR}` is the total of `alignment_loss` and X are the tokens. In
    :math:`\hat X`, the result of `unmerge_tokens`, each token is replaced by the merged
    token of its group.

    Parameters
    ----------
    tokens : ndarray of shape (N, D) or (B, N, D)
        Token embeddings, B sequences of N tokens of width D; float16, bfloat16, float32
        or float64.
    candidates : sequence of mapping
        Arguments of `quickmerge` for each candidate, such as ``{"method": "ward"}``,
        ``{"weights": "mass", "noise_seed": 3}``, ``{"budget": 0.2}`` or
        ``{"max_error": 0.1}``.
    prior : Prior
        The prior of the alignment loss, as in `alignment_loss`.
    alpha : float, default 0.1
        Weight α of the alignment loss, ≥ 0.
    gamma : float, default 0.8
        In [0, 1]: the fraction of the sum of the token norms that the merged tokens
        should retain (the norm mass, see `norm_mass`). An error up to (1 - γ)² costs
        nothing, as in `fidelity_loss`.
    mask : ndarray of shape (N,) or (B, N), optional
        Boolean or integer, True or 1 = token.
    **options
        Arguments of `quickmerge` for all candidates. If a candidate has the same
        argument, its own value is used. A `budget`, `max_error` or `max_distance` of a
        candidate replaces all three of the options.

    Returns
    -------
    Choice
        Named tuple of ``merged``, ``scores`` and ``best``. If scores are equal, the
        first candidate is selected. If K differs between sequences or candidates,
        groups of size 0 are appended up to the largest K.

    Raises
    ------
    TypeError
        If a candidate is not a mapping or names an unknown argument, or if
        `alignment_loss` or `quickmerge` raises it.
    ValueError
        If there is no candidate, a candidate has no budget, an option is out of range,
        or all scores of a sequence are NaN, or if `alignment_loss` or `quickmerge`
        raises it.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import MLPPrior
    >>> walk = np.random.default_rng(0).standard_normal((2, 40, 4)).cumsum(1)
    >>> ways = [{"method": "average"}, {"method": "ward"}, {"weights": "saliency"}]
    >>> choice = choose_merge(walk, ways, MLPPrior.init(4).fit(walk), budget=8)
    >>> choice.merged.tokens.shape, choice.scores.shape
    ((2, 8, 4), (3, 2))
    """
    alpha = check_number("alpha", alpha, 0, np.inf, "[)")
    gamma = check_number("gamma", gamma, 0, 1, "[]")
    check_prior(prior)
    candidate_arguments = _arguments(candidates, options)
    # `convert_inputs` raises for tracers of JAX, and for torch tensors that require
    # grad. Call it before any work is done; its result is not needed here.
    convert_inputs({"tokens": tokens, "mask": mask})
    merges, scores = [], []  # one entry per candidate
    for arguments in candidate_arguments:
        result = quickmerge(tokens, mask=mask, **arguments)
        # The functions below, such as `np.stack` and `np.where`, need NumPy or CuPy
        # arrays, so convert the result, which has the type of the caller's arrays.
        fields = {f"merged.{name}": x for name, x in result._asdict().items()}
        convert_back, x, valid, *parts = convert_inputs(
            {"tokens": tokens, "mask": mask} | fields
        )
        merged = Merged(*parts)
        error = reconstruction_error(x, merged.tokens, labels=merged.labels, mask=valid)
        # The prior may be a torch module (`qm_cupy.torch.MLPPrior`), whose parameters
        # require grad. The scores need no gradient, so torch should record none.
        with no_grad(tokens):
            loss: Any = alignment_loss(merged, prior).total
        # α · L_AR + max(0, ‖X - X̂‖² / ‖X‖² - (1 - γ)²); shape (B,)
        scores.append(alpha * loss + np.maximum(error - (1 - gamma) ** 2, 0))
        merges.append(merged)
    table = np.stack(scores)  # (C, B)
    _check_scores(table)
    # (B,); `argmin` returns the first of equal scores. NaN is not the least score.
    best = np.where(np.isnan(table), np.inf, table).argmin(axis=0)
    max_groups = max(merged.tokens.shape[-2] for merged in merges)
    selected = _padded(merges[0], max_groups)
    for number, merged in enumerate(merges[1:], 1):
        taken = best == number  # (B,)
        pairs = zip(_padded(merged, max_groups), selected, strict=True)
        selected = Merged(*(_where(taken, x, y) for x, y in pairs))
    best = np.asarray(best, dtype=np.int32, like=table)
    # All candidates have the same library, so the last `convert_back` fits them all.
    return Choice(
        Merged(*map(convert_back, selected)), convert_back(table), convert_back(best)
    )


def _arguments(candidates: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of `quickmerge` for each candidate, or raise."""
    # A single mapping or a string is probably a mistake: its elements are keys or
    # letters.
    if isinstance(candidates, Mapping | str) or not isinstance(candidates, Sequence):
        raise TypeError(
            "`candidates` must be a sequence of mappings, "
            f"got {type(candidates).__name__}"
        )
    if not candidates:
        raise ValueError("`candidates` must contain at least one mapping, got none")
    all_arguments = []
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, Mapping):
            raise TypeError(
                f"`candidates[{number}]` must be a mapping of arguments, "
                f"got {type(candidate).__name__}"
            )
        arguments = {**options, **candidate}  # a candidate overrides the options
        if any(name in candidate for name in _AMOUNTS):
            arguments = {
                name: value
                for name, value in arguments.items()
                if name in candidate or name not in _AMOUNTS
            }
        unknown = sorted(set(arguments) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"`candidates[{number}]` must hold arguments of `quickmerge` "
                f"({', '.join(sorted(_OPTIONS))}), got {', '.join(map(str, unknown))}"
            )
        if not any(name in arguments for name in _AMOUNTS):
            raise ValueError(
                f"`candidates[{number}]` has no `budget`, `max_error` or "
                "`max_distance`: add one to it, or pass one for all candidates"
            )
        all_arguments.append(arguments)
    return all_arguments


def _check_scores(table: NDArray[Any]) -> None:
    """Raise if all scores (C, B) of a sequence are NaN; GPU arrays are not read."""
    if is_cuda(table):
        return
    wrong = np.argwhere(np.isnan(table).all(axis=0))
    if len(wrong):
        where = f" of sequence {int(wrong[0][0])}" if wrong.shape[1] else ""
        raise ValueError(
            f"`prior` gives NaN for every candidate{where}: its predictions must be "
            "finite"
        )


def _padded(merged: Merged[Any], max_groups: int) -> Merged[Any]:
    """Append groups of size 0 and position -1 until there are `max_groups` groups."""
    gap = max_groups - merged.tokens.shape[-2]
    if gap == 0:
        return merged

    def pad(x: NDArray[Any], axis: int, value: int) -> NDArray[Any]:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, gap)
        # Only bfloat16 becomes int16, so that its bits are copied.
        return np.pad(bfloat16_as_int16(x), widths, constant_values=value).view(x.dtype)

    return merged._replace(  # labels and mass are per token, not per group
        tokens=pad(merged.tokens, -2, 0),  # (B, K, D)
        sizes=pad(merged.sizes, -1, 0),  # (B, K)
        positions=pad(merged.positions, -1, -1),  # (B, K)
    )


def _where(taken: NDArray[np.bool_], x: NDArray[Any], y: NDArray[Any]) -> Any:
    """Return `x` for the sequences that `taken` (B,) marks, and `y` for the others."""
    if x.dtype != y.dtype:  # the weights of two candidates: float32 and float64
        x, y = (z.astype(np.float64) for z in (x, y))
    condition = taken.reshape(taken.shape + (1,) * (x.ndim - taken.ndim))  # (B, 1, ...)
    # CuPy's `where` would convert bfloat16 to a wider dtype, so it gets int16 bits.
    return np.where(condition, bfloat16_as_int16(x), bfloat16_as_int16(y)).view(x.dtype)

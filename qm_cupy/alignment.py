"""Alignment: how well an autoregressive prior predicts the merged tokens."""

import math
import sys
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import check_counts, check_shape, check_tokens
from ._libraries import give_inside, no_grad, stack
from .cli.progress import progress
from .merging import Merged


class AlignmentLoss(NamedTuple, Generic[Array]):
    """Losses of `alignment_loss`, each of shape () or (B,)."""

    forward: Array
    backward: Array
    total: Array


class Prior(Protocol):
    """What `alignment_loss` asks of a prior."""

    def predict(
        self,
        tokens: Any,
        *,
        reverse: bool = False,
        num_groups: Any = None,
        positions: Any = None,
        sizes: Any = None,
    ) -> Any:
        """Return for every token the prediction of the one after (or before) it."""


class SteppingPrior(Protocol):
    """What `decode` asks of a prior that reads one token at a time."""

    def step(
        self, token: Any, state: Any = None, *, position: Any = None, size: Any = None
    ) -> tuple[Any, Any]:
        """Return the prediction (..., D) after a token (..., D), and the new state."""


@on_callers_stream
def alignment_loss(
    merged: Array | Merged[Array], prior: Prior, *, num_groups: Any = None
) -> AlignmentLoss[Array]:
    r"""Bidirectional autoregressive loss of merged tokens under a prior.

    .. math:: L_{AR} = \frac{1}{K-1} \sum_{t=1}^{K-1} \operatorname{MSE}\bigl(
        f(\bar x_{1..t}), \tilde x_{t+1}\bigr) + \frac{1}{K-1} \sum_{t=2}^{K}
        \operatorname{MSE}\bigl(g(\bar x_{t..K}), \tilde x_{t-1}\bigr)

    Parameters
    ----------
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        What `quickmerge` returns, whose positions and sizes the prior may read, or
        merged tokens alone; float16, bfloat16, float32 or float64.
    prior : Prior
        `MLPPrior`, `TransformerPrior`, or your own: its ``predict`` gives all
        predictions at once. It is given NumPy arrays, or CuPy arrays on a GPU,
        whatever library `merged` is of; what is not known is None.
    num_groups : int or ndarray of int of shape (B,), optional
        K of each sequence where they differ; the rest is padding. By default, groups
        of size 0 are; to count them waits for a GPU.

    Returns
    -------
    AlignmentLoss
        ``forward``, ``backward`` and ``total`` (their sum), each of shape () or (B,);
        float32, or float64 for float64 input. 0 for K = 1.

    Raises
    ------
    TypeError
        If `merged` is not floating or `num_groups` not integer.
    ValueError
        If a shape does not fit or an entry is not finite.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from qm_cupy import MLPPrior
    >>> loss = alignment_loss(np.ones((5, 8)), MLPPrior.init(8, seed=0))
    >>> bool(loss.total == loss.forward + loss.backward)
    True
    """
    given, positions, sizes = _parts(merged)
    leave, tokens, num_groups, positions, sizes = enter(
        merged=given, num_groups=num_groups, positions=positions, sizes=sizes
    )
    check_tokens(tokens, "merged")
    counts = _counts(tokens, num_groups, sizes)
    valid = counts if counts.ndim else int(counts)
    known = {"num_groups": valid, "positions": positions, "sizes": sizes}
    after = prior.predict(tokens, **known)
    before = prior.predict(tokens, reverse=True, **known)
    check_shape("prediction", after, "BKD", tokens.shape)
    check_shape("prediction", before, "BKD", tokens.shape)
    find = _alignment_loss_reference
    if _cuda.is_cuda(tokens):
        find = _alignment_loss_cuda
    forward, backward = find(tokens, after, before, counts)
    return AlignmentLoss(leave(forward), leave(backward), leave(forward + backward))


def _counts(tokens: NDArray[Any], num_groups: Any, sizes: Any) -> NDArray[np.int64]:
    """Return K of each sequence: what is given, or else its groups with members."""
    if num_groups is None and sizes is not None:
        num_groups = _cuda.to_host((sizes > 0).sum(axis=-1))
    return check_counts(tokens, num_groups)


def _parts(merged: Any) -> tuple[Any, Any, Any]:
    """Return tokens, positions and sizes; of tokens alone, the rest is None."""
    if isinstance(merged, Merged):
        return merged.tokens, merged.positions, merged.sizes
    return merged, None, None


def _alignment_loss_reference(
    merged: NDArray[Any],
    after: NDArray[Any],
    before: NDArray[Any],
    counts: NDArray[np.int64],
) -> tuple[NDArray[Any], NDArray[Any]]:
    steps = np.maximum(counts - 1, 1)
    known = np.arange(1, merged.shape[-2]) < counts[..., None]  # (B, K - 1)

    def loss(prediction: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        gap = prediction - target
        error = np.einsum("...d,...d->...", gap, gap) / gap.shape[-1]  # (B, K - 1)
        total: NDArray[Any] = np.sum(error, axis=-1, where=known) / steps
        return np.asarray(total, dtype=gap.dtype)

    forward = loss(after[..., :-1, :], merged[..., 1:, :])
    backward = loss(before[..., 1:, :], merged[..., :-1, :])
    return forward, backward


def _alignment_loss_cuda(
    merged: Any, after: Any, before: Any, counts: NDArray[np.int64]
) -> tuple[Any, Any]:
    num_groups, dim = merged.shape[-2:]
    batch = math.prod(merged.shape[:-2])
    kind = _cuda.accumulation(merged.dtype)
    merged, (each, _) = _cuda.contiguous(merged), _cuda.counts(counts)
    chosen = _cuda.implementation()
    warp, block = (1, 1) if chosen == "basic" else (_cuda.WARP, _cuda.BLOCK)
    losses = []
    for reverse, prediction in enumerate((after, before)):
        prediction = _cuda.contiguous(prediction, kind)
        errors = _cuda.empty(merged.shape[:-1], kind)
        sizes = batch, num_groups, dim
        args: tuple[Any, ...] = (prediction, merged, each, *sizes, reverse, errors)
        file, threads = f"{chosen}/alignment", errors.size * warp
        _cuda.launch(file, "prediction_errors", merged.dtype, threads, args)
        losses.append(_cuda.empty(merged.shape[:-2], kind))
        args = (errors, each, batch, num_groups, losses[-1])
        _cuda.launch(file, "alignment_loss", kind, batch * block, args)
    return losses[0], losses[1]


@on_callers_stream
def decode(
    merged: Array | Merged[Array], model: Callable[[Any], Any] | SteppingPrior
) -> Any:
    """Run a model left to right over merged tokens: its prediction at every step.

    Parameters
    ----------
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        What `quickmerge` returns, or merged tokens, of any array library.
    model : callable or prior
        A prior reads a token at a time by its ``step``, with the positions and sizes of
        a `Merged`, and takes K steps in all. A callable sees the growing prefix: it
        maps a prefix of shape (..., t, D), in the caller's own kind, to (..., t, E);
        the last row is the prediction after t tokens. A `torch.nn.Module`, say: over
        tensors it runs under `torch.no_grad()`, in the mode that it is in.

    Returns
    -------
    ndarray of shape (K, E) or (B, K, E)
        The predictions, as the model gives them.

    Raises
    ------
    TypeError
        If `merged` is not a floating array, or the model returns none.
    ValueError
        If the shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> decode(np.array([[1.0], [2.0], [4.0]]), lambda prefix: prefix.cumsum(0)).ravel()
    array([1., 3., 7.])
    """
    tokens, positions, sizes = _parts(merged)
    _, inside = enter(merged=tokens)
    check_tokens(inside, "merged")
    rows, state, predictions = inside.shape[-2], None, []
    with progress(rows, sys.stderr, "tokens") as shown, no_grad(tokens):
        for t in range(rows):
            if hasattr(model, "step"):
                known = [None if x is None else x[..., t] for x in (positions, sizes)]
                prediction, state = model.step(
                    tokens[..., t, :], state, position=known[0], size=known[1]
                )
            else:
                prediction = _last(model, tokens[..., : t + 1, :])
            predictions.append(prediction)
            shown(t + 1)
    stacked = stack(predictions, -2)
    return give_inside(stacked) if isinstance(stacked, np.ndarray) else stacked


def _last(model: Any, prefix: Any) -> Any:
    """Return what the model predicts after a prefix, of which it answers every row."""
    output = model(prefix)
    if getattr(output, "ndim", 0) < 2:
        raise TypeError(
            "`model` must return an array of shape (..., t, E), "
            f"got {type(output).__name__}"
        )
    if output.shape[:-1] != prefix.shape[:-1]:
        raise ValueError(
            "`model` must return shape (..., t, E) for a prefix of shape "
            f"{tuple(prefix.shape)}, got {tuple(output.shape)}"
        )
    return output[..., -1, :]

"""Decoding: a model reads the merged tokens from left to right."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays.checks import check_tokens
from ...arrays.conversion import Array, enter, on_callers_stream
from ...arrays.libraries import give_inside, no_grad, stack
from ...priors.merged_tokens import merged_parts
from ...priors.protocols import SteppingPrior
from ...results import Merged


@on_callers_stream
def decode(
    merged: Array | Merged[Array],
    model: Callable[[Any], Any] | SteppingPrior,
    *,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Run a model left to right over merged tokens and return every prediction.

    Parameters
    ----------
    merged : Merged, or ndarray of shape (K, D) or (B, K, D)
        The result of `quickmerge`, or merged tokens, of any array library.
    model : callable or prior
        A prior is called K times: its ``step`` reads one token at a time, with the
        positions and sizes of a `Merged`. A callable, a `torch.nn.Module` for example,
        reads the growing prefix: it maps an array of shape (..., t, D), of the caller's
        library, to (..., t, E). The last row is the prediction after t tokens. With
        tensors, the model runs under `torch.no_grad()`, and its mode (training or
        evaluation) does not change.
    progress : callable, optional
        Called after each token with the number of tokens decoded so far, 1 to K. By
        default nothing is shown.

    Returns
    -------
    ndarray of shape (K, E) or (B, K, E)
        The predictions of the model, stacked.

    Raises
    ------
    TypeError
        If `merged` is not a floating array, the model does not return an array, or
        `progress` is not callable.
    ValueError
        If a shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> decode(np.array([[1.0], [2.0], [4.0]]), lambda prefix: prefix.cumsum(0)).ravel()
    array([1., 3., 7.])

    With a progress bar from tqdm:

    >>> with tqdm(total=merged.tokens.shape[-2]) as bar:  # doctest: +SKIP
    ...     decode(merged, model, progress=lambda done: bar.update(done - bar.n))
    """
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be callable or None, got {type(progress).__name__}"
        )
    tokens, positions, sizes = merged_parts(merged)
    # `inside`, as NumPy or CuPy, is only checked: the model reads the caller's arrays.
    _, inside = enter({"merged": tokens})
    check_tokens(inside, "merged")
    rows, state, predictions = inside.shape[-2], None, []
    with no_grad(tokens):
        for t in range(rows):
            if hasattr(model, "step"):
                # The state holds what the prior needs of tokens before t (for example
                # a sum, or keys and values), so a step does not read them again.
                known = [None if x is None else x[..., t] for x in (positions, sizes)]
                prediction, state = model.step(
                    tokens[..., t, :], state, position=known[0], size=known[1]
                )
            else:
                # A callable has no state: it reads 1 + 2 + … + K rows in all.
                prediction = _last(model, tokens[..., : t + 1, :])
            predictions.append(prediction)  # (B, E)
            if progress is not None:
                progress(t + 1)
    stacked = stack(predictions, -2)  # (B, K, E)
    return give_inside(stacked) if isinstance(stacked, np.ndarray) else stacked


def _last(model: Any, prefix: Any) -> Any:
    """Return the model's prediction after a prefix: the last row of its output."""
    output = model(prefix)  # (..., t, E)
    if getattr(output, "ndim", 0) < 2:
        raise TypeError(
            "`model` must return an array of shape (..., t, E), "
            f"got {type(output).__name__}"
        )
    # One row for each token: only then is the last row the prediction after t tokens.
    if output.shape[:-1] != prefix.shape[:-1]:
        raise ValueError(
            "`model` must return shape (..., t, E) for a prefix of shape "
            f"{tuple(prefix.shape)}, got {tuple(output.shape)}"
        )
    return output[..., -1, :]

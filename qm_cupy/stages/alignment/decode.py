"""Decoding: a model reads merged tokens from left to right."""

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
    progress : callable, optional
        It is called after each token with the number of tokens decoded so far, 1 to K.
        By default nothing is shown.

    Returns
    -------
    ndarray of shape (K, E) or (B, K, E)
        The predictions, as the model gives them.

    Raises
    ------
    TypeError
        If `merged` is not a floating array, the model returns none, or `progress` is
        not callable.
    ValueError
        If the shape does not fit or an entry is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> decode(np.array([[1.0], [2.0], [4.0]]), lambda prefix: prefix.cumsum(0)).ravel()
    array([1., 3., 7.])

    A progress bar of tqdm:

    >>> with tqdm(total=merged.tokens.shape[-2]) as bar:  # doctest: +SKIP
    ...     decode(merged, model, progress=lambda done: bar.update(done - bar.n))
    """
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be callable or None, got {type(progress).__name__}"
        )
    tokens, positions, sizes = merged_parts(merged)
    _, inside = enter({"merged": tokens})
    check_tokens(inside, "merged")
    rows, state, predictions = inside.shape[-2], None, []
    with no_grad(tokens):
        for t in range(rows):
            if hasattr(model, "step"):
                known = [None if x is None else x[..., t] for x in (positions, sizes)]
                prediction, state = model.step(
                    tokens[..., t, :], state, position=known[0], size=known[1]
                )
            else:
                prediction = _last(model, tokens[..., : t + 1, :])
            predictions.append(prediction)
            if progress is not None:
                progress(t + 1)
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

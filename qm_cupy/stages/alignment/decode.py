"""Decoding: a model reads the merged tokens from left to right.

In shapes, B is the number of sequences, K is the number of merged tokens in a sequence,
D is the width of a token, and E is the width of a prediction. The model is a callable
that reads all tokens so far, or a prior with a method ``step``, which reads one token
at a time. A prior predicts a merged token from the tokens before it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays.checks import check_tokens
from ...arrays.conversion import Array, convert_inputs, on_callers_stream
from ...arrays.libraries import keep_numpy_or_cupy, no_grad, stack
from ...priors.merged_tokens import merged_parts
from ...priors.protocols import MergedTokens, SteppingPrior


@on_callers_stream
def decode(
    merged: Array | MergedTokens[Array],
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
        The ``step`` of a prior is called K times and reads one token at a time, with
        the position and the size of this token if `merged` is a `Merged`. A callable, a
        `torch.nn.Module` for example, is also called K times. It reads the first t
        tokens, an array of shape (..., t, D) of the caller's library, and returns an
        array (..., t, E). The last row is the prediction after t tokens. With tensors,
        the model runs under `torch.no_grad()`, and its mode (training or evaluation)
        does not change.
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
    # Convert the tokens to NumPy or CuPy for the checks only. The model reads the
    # caller's arrays.
    _, checked = convert_inputs({"merged": tokens})
    check_tokens(checked, "merged")
    num_tokens, state, predictions = checked.shape[-2], None, []
    with no_grad(tokens):
        for t in range(num_tokens):
            if hasattr(model, "step"):
                # The state holds data of the earlier tokens, for example their sum, or
                # their keys and values. So a step does not read these tokens again.
                own = [None if x is None else x[..., t] for x in (positions, sizes)]
                prediction, state = model.step(
                    tokens[..., t, :], state, position=own[0], size=own[1]
                )
            else:
                # A callable has no state: in all K calls it reads 1 + 2 + … + K tokens.
                prediction = _last_prediction(model, tokens[..., : t + 1, :])
            predictions.append(prediction)  # (B, E)
            if progress is not None:
                progress(t + 1)
    # The stack has the library of the predictions. A NumPy result becomes C-contiguous.
    stacked = stack(predictions, -2)  # (B, K, E)
    return keep_numpy_or_cupy(stacked) if isinstance(stacked, np.ndarray) else stacked


def _last_prediction(model: Any, prefix: Any) -> Any:
    """Return the model's prediction after the tokens of a prefix (..., t, D)."""
    output = model(prefix)  # (..., t, E)
    if getattr(output, "ndim", 0) < 2:
        raise TypeError(
            "`model` must return an array of shape (..., t, E), "
            f"got {type(output).__name__}"
        )
    # The last row is the prediction after t tokens only if each token has one row.
    if output.shape[:-1] != prefix.shape[:-1]:
        raise ValueError(
            "`model` must return shape (..., t, E) for a prefix of shape "
            f"{tuple(prefix.shape)}, got {tuple(output.shape)}"
        )
    return output[..., -1, :]

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
from ...arrays.libraries import keep_numpy_or_cupy, no_grad, own_copy, stack
from ...priors.merged_tokens import merged_parts
from ...priors.protocols import MergedTokens, SteppingPrior
from .models import check_model, has_method, is_own


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
        array (..., t, E). The last row is the prediction after t tokens. The model gets
        copies of the tokens, which it may change. With tensors, it runs under
        `torch.no_grad()`, and its mode (training or evaluation) does not change.
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
        If `merged` is not a floating array, `model` is neither callable nor a prior, it
        does not return an array, or `progress` is not callable.
    ValueError
        If a shape does not fit or an entry of `merged` is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> decode(np.array([[1.0], [2.0], [4.0]]), lambda prefix: prefix.cumsum(0)).ravel()
    array([1., 3., 7.])

    With a progress bar from tqdm:

    >>> with tqdm(total=merged.tokens.shape[-2]) as bar:  # doctest: +SKIP
    ...     decode(merged, model, progress=lambda done: bar.update(done - bar.n))
    """
    check_model(model)
    if progress is not None and not callable(progress):
        raise TypeError(
            f"`progress` must be callable or None, got {type(progress).__name__}"
        )
    tokens, positions, sizes = merged_parts(merged)
    # Convert the tokens to NumPy or CuPy for the checks only. The model reads the
    # caller's arrays.
    _, checked = convert_inputs({"merged": tokens})
    check_tokens(checked, "merged")
    num_tokens, state = checked.shape[-2], None
    predictions: list[Any] = []
    reader: Any = model  # no type says which methods it has

    def copied(x: Any) -> Any:
        return x if is_own(model) else own_copy(x)

    with no_grad(tokens):
        for t in range(num_tokens):
            if has_method(reader, "step"):
                # The state holds data of the earlier tokens, for example their sum, or
                # their keys and values. So a step does not read these tokens again.
                position, size = (
                    None if x is None else copied(x[..., t]) for x in (positions, sizes)
                )
                token = copied(tokens[..., t, :])
                result = reader.step(token, state, position=position, size=size)
                prediction, state = _prediction_and_state(result)
            else:
                # A callable has no state: in all K calls it reads 1 + 2 + … + K tokens.
                prediction = _last_prediction(reader, copied(tokens[..., : t + 1, :]))
            first = predictions[0] if predictions else prediction
            _check_prediction(prediction, checked.shape[:-2], first)
            # A copy of one row: the model may reuse its array, and the array of all
            # rows can be freed.
            predictions.append(copied(prediction))  # (B, E)
            if progress is not None:
                progress(t + 1)
    # The stack has the library of the predictions. A NumPy result becomes C-contiguous.
    stacked = stack(predictions, -2)  # (B, K, E)
    return keep_numpy_or_cupy(stacked) if isinstance(stacked, np.ndarray) else stacked


def _last_prediction(model: Any, prefix: Any) -> Any:
    """Return the model's prediction after the tokens of a prefix (..., t, D)."""
    wanted = tuple(prefix.shape)  # before the call, which may change the prefix
    output = model(prefix)  # (..., t, E)
    shape = _shape_of(output)
    # The last row is the prediction after t tokens only if each token has one row.
    if len(shape) != len(wanted) or shape[:-1] != wanted[:-1]:
        raise ValueError(
            f"`model` must return shape (..., t, E) for a prefix of shape {wanted}, "
            f"got {shape}"
        )
    return output[..., -1, :]


def _prediction_and_state(result: Any) -> tuple[Any, Any]:
    """Return the two results of a step, or raise."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "`model.step` must return a tuple of the prediction and the new state, "
            f"got {type(result).__name__}"
        )
    return result


def _check_prediction(prediction: Any, batch: tuple[int, ...], first: Any) -> None:
    """Raise unless a prediction is (..., E), with the E and the type of the first."""
    shape = _shape_of(prediction)
    if shape[:-1] != batch or len(shape) != len(batch) + 1:
        wanted = "(B, E)" if batch else "(E)"
        where = f" with B = {batch[0]}" if batch else ""
        raise ValueError(
            f"`model` must predict an array of shape {wanted}{where} for each token, "
            f"got shape {shape}"
        )
    if type(prediction) is not type(first):
        raise TypeError(
            "`model` must return arrays of one type for all tokens, got "
            f"{type(first).__name__}, then {type(prediction).__name__}"
        )
    if shape[-1] != first.shape[-1]:
        raise ValueError(
            "`model` must return arrays of one width E for all tokens, got "
            f"{first.shape[-1]}, then {shape[-1]}"
        )


def _shape_of(output: Any) -> tuple[int, ...]:
    """Return the shape of a result of the model; raise if it is not an array."""
    if not hasattr(output, "shape") or not hasattr(output, "__dlpack__"):
        raise TypeError(f"`model` must return an array, got {type(output).__name__}")
    return tuple(output.shape)

"""Models of users: checks, and calls in which they cannot change the caller's arrays.

A prior is a model that predicts a merged token from the tokens before it. A user's
model may write into its arguments, and may return the same array again in its next
call. So it gets copies, and its results are copied. The priors of this library do
neither. In shapes, B is the number of sequences, K is the number of merged tokens in a
sequence, D is the width of a token, and E is the width of a prediction.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.checks import check_floating, check_shape
from ...arrays.dtypes import accumulation_dtype
from ...arrays.libraries import is_cuda, own_copy
from ...priors.mlp_prior import MLPPrior
from ...priors.transformer import TransformerPrior

_NUM_WEIGHTS = 8  # four weights of each of the two networks


def is_own(model: Any) -> bool:
    """Return whether a model is a prior of this library, and not of a subclass."""
    return type(model) in (MLPPrior, TransformerPrior)


def check_prior(prior: Any) -> None:
    """Raise unless a prior has `predict` or `network_weights`, as a method."""
    _check_methods("prior", prior, "predict", "network_weights")
    if not (has_method(prior, "predict") or has_method(prior, "network_weights")):
        raise TypeError(
            "`prior` must have a method `predict` or `network_weights`, as an MLPPrior "
            f"has, got {type(prior).__name__}"
        )


def check_model(model: Any) -> None:
    """Raise unless a model of `decode` is callable or has a method `step`."""
    _check_methods("model", model, "step")
    if not (callable(model) or has_method(model, "step")):
        raise TypeError(
            "`model` must be callable or have a method `step`, as an MLPPrior has, got "
            f"{type(model).__name__}"
        )


def has_method(x: Any, name: str) -> bool:
    """Return whether an object has a method of this name."""
    return callable(getattr(x, name, None))


def _check_methods(argument: str, x: Any, *names: str) -> None:
    """Raise if `x` is a class with one of the methods: they need an instance."""
    if isinstance(x, type) and any(hasattr(x, name) for name in names):
        raise TypeError(
            f"`{argument}` must be an object, got the class {x.__name__}: make a prior "
            "of it first"
        )


def network_weights(prior: Any) -> tuple[Any, ...]:
    """Return the eight weights of a prior of two layers, or () for another prior."""
    if not has_method(prior, "network_weights"):
        return ()
    weights = tuple(prior.network_weights())
    if len(weights) != _NUM_WEIGHTS:
        raise ValueError(
            f"`prior.network_weights()` must return {_NUM_WEIGHTS} weights, "
            f"got {len(weights)}"
        )
    for i, weight in enumerate(weights):
        if not hasattr(weight, "shape"):
            raise TypeError(
                f"`prior.network_weights()[{i}]` must be an array, "
                f"got {type(weight).__name__}"
            )
    return weights


def predictions(
    prior: Any, tokens: Any, counts: NDArray[np.int64], positions: Any, sizes: Any
) -> tuple[Any, Any]:
    """Return both predictions of a prior for tokens (B, K, D), of their shape.

    The arguments are NumPy or CuPy arrays; `counts` has K of each sequence. The first
    result predicts the next tokens, and the second one the previous tokens.
    """
    own, results = is_own(prior), []
    for reverse in (False, True):
        arrays = [x if own else own_copy(x) for x in (tokens, counts, positions, sizes)]
        count = arrays[1] if counts.ndim else int(counts)  # one sequence: an integer K
        options = {"num_groups": count, "positions": arrays[2], "sizes": arrays[3]}
        if reverse:  # the first call passes no `reverse`, so a prior may lack a default
            options["reverse"] = True
        result = prior.predict(arrays[0], **options)
        _check_prediction(result, tokens)
        results.append(result if own else own_copy(result))
    dtype = accumulation_dtype(tokens.dtype)
    return results[0].astype(dtype, copy=False), results[1].astype(dtype, copy=False)


def _check_prediction(prediction: Any, tokens: Any) -> None:
    """Raise unless a prediction is an array like `tokens`: library, dtype, shape."""
    on_gpu = is_cuda(tokens)
    if not (is_cuda(prediction) if on_gpu else isinstance(prediction, np.ndarray)):
        wanted = "a CuPy array" if on_gpu else "a NumPy array"
        got = type(prediction)
        raise TypeError(
            f"`prior.predict` must return {wanted}, like the tokens that it gets, got "
            f"{got.__module__}.{got.__qualname__}"
        )
    check_floating("prediction", prediction)
    check_shape("prediction", prediction, "BKD", tokens.shape)

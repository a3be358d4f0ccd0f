"""A two-layer perceptron (MLP): its weights, its outputs and its gradient.

An MLP maps x of width D to y = W₂ relu(W₁ x + b₁) + b₂ of width D, with a hidden layer
of width H. The matrices W₁ and W₂ have the shape (outputs, inputs).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from .linear import linear


class MLP(NamedTuple):
    """Weights of a two-layer perceptron W₂ relu(W₁ x + b₁) + b₂."""

    weight_in: NDArray[Any]  # W₁ (H, D)
    bias_in: NDArray[Any]  # b₁ (H,)
    weight_out: NDArray[Any]  # W₂ (D, H)
    bias_out: NDArray[Any]  # b₂ (D,)

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return y (..., D) for x (..., D)."""
        hidden = x @ self.weight_in.T  # (..., H)
        hidden += self.bias_in  # in place: no second array (..., H)
        np.maximum(hidden, 0, out=hidden)
        result: NDArray[Any] = hidden @ self.weight_out.T
        result += self.bias_out
        return result


def check_width(name: str, tokens: Any, network: MLP) -> None:
    """Raise if the width of the tokens is not the input width of the network."""
    dim = network.weight_in.shape[1]
    if tokens.shape[-1] != dim:
        raise ValueError(
            f"`{name}` must have width D = {dim} like the prior, got {tokens.shape[-1]}"
        )


def apply_mlp(network: MLP, x: Any) -> Any:
    """Return W₂ relu(W₁ x + b₁) + b₂ for x (..., D) on the device of the weights."""
    if is_cuda(x):
        return _apply_mlp_cuda(network, x)
    return network(x)  # the reference


def _apply_mlp_cuda(network: MLP, x: Any) -> Any:
    hidden = linear(x, *network[:2], activation="relu")
    return linear(hidden, *network[2:])


def back_propagate(network: MLP, x: Any, hidden: Any, dy: Any) -> tuple[MLP, Any]:
    """Return the gradients of the weights, and of the hidden layer before its ReLU.

    There are R rows: `x` is (R, D), `hidden` is (R, H) after the ReLU, and `dy` (R, D)
    is the gradient of a loss with respect to the outputs. A letter d before a name
    means such a gradient.
    """
    # `hidden` is h = relu(a) with a = W₁ x + b₁, and `da` is the gradient of a: dy W₂
    # where h > 0, and 0 elsewhere. The derivative of the ReLU is 1 above 0, and 0 at 0
    # and below.
    da = (dy @ network.weight_out) * (hidden > 0)  # (R, H)
    # dW₁ = daᵀ x, db₁ = Σ da, dW₂ = dyᵀ h, db₂ = Σ dy, where Σ is over the R rows.
    parts = da.T @ x, da.sum(axis=0), dy.T @ hidden, dy.sum(axis=0)
    return type(network)(*parts), da

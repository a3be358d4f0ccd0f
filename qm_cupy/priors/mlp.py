"""A two-layer perceptron: its weights, what it computes, and its gradient."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.libraries import is_cuda
from .linear import linear


class MLP(NamedTuple):
    """Weights of a two-layer perceptron W₂ relu(W₁ x + b₁) + b₂, stored (out, in)."""

    weight_in: NDArray[Any]
    bias_in: NDArray[Any]
    weight_out: NDArray[Any]
    bias_out: NDArray[Any]

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """Map (..., D) to (..., D)."""
        hidden = x @ self.weight_in.T
        hidden += self.bias_in
        np.maximum(hidden, 0, out=hidden)
        result: NDArray[Any] = hidden @ self.weight_out.T
        result += self.bias_out
        return result


def check_width(name: str, tokens: Any, network: MLP) -> None:
    """Refuse tokens of another width than those that a network reads."""
    dim = network.weight_in.shape[1]
    if tokens.shape[-1] != dim:
        raise ValueError(
            f"`{name}` must have width D = {dim} like the prior, got {tokens.shape[-1]}"
        )


def apply_mlp(network: MLP, x: Any) -> Any:
    """Return W₂ relu(W₁ x + b₁) + b₂ of x (..., D), whose weights are beside x."""
    if is_cuda(x):
        return _apply_mlp_cuda(network, x)
    return network(x)  # the reference


def _apply_mlp_cuda(network: MLP, x: Any) -> Any:
    hidden = linear(x, *network[:2], activation="relu")
    return linear(hidden, *network[2:])


def back_propagate(network: MLP, x: Any, hidden: Any, slope: Any) -> tuple[MLP, Any]:
    """Return the gradient of the weights, and of the hidden layer before its ReLU.

    `slope` is the gradient of the outputs; rows are (R, D), hidden ones (R, H).
    """
    back = (slope @ network.weight_out) * (hidden > 0)
    parts = back.T @ x, back.sum(axis=0), slope.T @ hidden, slope.sum(axis=0)
    return type(network)(*parts), back

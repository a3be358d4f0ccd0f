"""Training of an `MLPPrior`: ridge regression in closed form, then steps of Adam.

A prior is a model that predicts a merged token from the tokens before it. An `MLPPrior`
has two networks. The forward network (index 0) reads the mean of tokens 1..t, and its
target is token t + 1. The backward network (index 1, `reverse`) reads the mean of
tokens t..K, and its target is token t - 1. D is the width of a token, and H is the
width of the hidden layer.

Arrays are NumPy or CuPy arrays. A block is a pair of inputs (R, D) and targets (R, D)
in float64, with R rows. Every pass over the data computes the blocks again, one at a
time.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_finite_values,
    check_integer,
    check_number,
    check_seed,
    check_tokens,
)
from ..arrays.conversion import convert_inputs
from ..cuda.device import to_host
from .merged_tokens import group_counts, is_merged, merged_parts
from .mlp import MLP, back_propagate, check_width
from .running_mean import running_mean
from .weight_checks import converted_network

Block = tuple[Any, Any]
Blocks = Callable[[], Iterator[Block]]

# The largest number of rows R of a block, unless one sequence has more. The hidden
# activations of these rows need 32 MB (float64, H = 256).
_ROWS = 1 << 14
_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-8  # the usual β₁, β₂ and ε of Adam


def fit_networks(
    networks: tuple[MLP, MLP],
    sequences: Any,
    *,
    ridge: float,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> tuple[MLP, MLP]:
    """Return the fitted networks of an `MLPPrior`; see `MLPPrior.fit`."""
    ridge = check_number("ridge", ridge, 0, np.inf, "()")
    rate = check_number("learning_rate", learning_rate, 0, np.inf, "()")
    for name, x, lowest in (("steps", steps, 0), ("batch_size", batch_size, 1)):
        if check_integer(name, x) < lowest:
            raise ValueError(f"`{name}` must be at least {lowest}, got {x}")
    seed = check_seed(seed)
    if is_merged(sequences) or hasattr(sequences, "__dlpack__"):
        sequences = [sequences]
    elif not isinstance(sequences, Iterable):
        raise TypeError(
            "`sequences` must be an array, a Merged or an iterable of these, "
            f"got {type(sequences).__name__}"
        )
    # `iter(x) is x` is true only for an iterator. The ridge regression would read the
    # iterator to the end, so Adam would get no data.
    if steps and iter(sequences) is sequences:
        raise ValueError(
            "`steps` > 0 reads the sequences several times: "
            "pass a list of them, not an iterator"
        )
    # Weights of torch or JAX become NumPy or CuPy arrays.
    forward, backward = networks
    networks = (
        converted_network("forward", forward),
        converted_network("backward", backward),
    )
    # An overflow ends in an error below, which says more than a warning of NumPy.
    with np.errstate(over="ignore", invalid="ignore"):
        fitted = _fit(networks, sequences, ridge, steps, rate, batch_size, seed)
    for direction, network in zip(("forward", "backward"), fitted, strict=True):
        for name, weight in network._asdict().items():
            _check_fit(f"{direction}.{name}", weight)
    return fitted


def _check_fit(name: str, weight: NDArray[Any]) -> None:
    """Raise if a fitted weight is not finite, and say why."""
    try:
        check_finite_values(name, weight)
    except ValueError as error:
        raise ValueError(
            f"the fit fails: {error} in {weight.dtype}; scale the tokens down, "
            "or raise `ridge`"
        ) from None


def _fit(
    networks: tuple[MLP, MLP],
    sequences: Iterable[Any],
    ridge: float,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
) -> tuple[MLP, MLP]:
    regressions = [RidgeRegression(network, ridge) for network in networks]
    # One pass over the data is enough for both networks.
    for tokens, counts in _token_chunks(sequences, networks[0]):
        for reverse, regression in enumerate(regressions):
            for block in prefix_pairs(tokens, counts, bool(reverse)):
                regression.add(*block)
    results = []
    for reverse, (network, regression) in enumerate(
        zip(networks, regressions, strict=True)
    ):
        fitted = regression.network()
        if fitted is None:
            raise ValueError(
                "`sequences` must contain at least one sequence of two or more tokens"
            )
        if steps:
            make_blocks = functools.partial(
                _all_pairs, sequences, network, bool(reverse)
            )
            fitted = refine(fitted, make_blocks, steps, rate, batch_size, seed)
        # The fitted weights are float64. The results have the dtype of the old weights.
        pairs = zip(fitted, network, strict=True)
        results.append(MLP(*(to_host(w).astype(old.dtype) for w, old in pairs)))
    return results[0], results[1]


def _all_pairs(
    sequences: Iterable[Any], network: MLP, reverse: bool
) -> Iterator[Block]:
    """Yield the blocks of all sequences for one direction."""
    for tokens, counts in _token_chunks(sequences, network):
        yield from prefix_pairs(tokens, counts, reverse)


def _token_chunks(
    sequences: Iterable[Any], network: MLP
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Yield tokens (b, K, D) and K of each sequence (b,), for b sequences at a time."""
    for sequence in sequences:
        tokens, _, sizes = merged_parts(sequence)
        _, tokens, sizes = convert_inputs({"sequences": tokens, "sizes": sizes})
        check_tokens(tokens, "sequences")
        check_width("sequences", tokens, network)
        counts = group_counts(tokens, None, sizes).reshape(-1)  # (B,)
        tokens = tokens.reshape(-1, *tokens.shape[-2:])  # (B, K, D)
        block_sequences = max(1, _ROWS // tokens.shape[-2])  # b
        for first in range(0, len(tokens), block_sequences):
            yield (
                tokens[first : first + block_sequences],
                counts[first : first + block_sequences],
            )


def prefix_pairs(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> Iterator[Block]:
    """Yield at most one block, for one network, from `tokens` (b, K, D).

    A block is a pair of inputs and targets, (R, D) each. A row of the forward network
    is (mean of tokens 1..t, token t + 1). With `reverse`, a row is (mean of tokens
    t..K, token t - 1). A sequence of K tokens has K - 1 rows. If no sequence has two
    tokens, there is no block.
    """
    has_target = np.arange(1, tokens.shape[-2]) < counts[:, None]  # (b, K - 1)
    if not has_target.any():
        return
    context = running_mean(tokens, counts, reverse)  # (b, K, D)
    later, earlier = slice(1, None), slice(None, -1)
    sources, targets = (later, earlier) if reverse else (earlier, later)
    selected = np.asarray(has_target, like=context)
    # Convert to float64 before the mask selects rows, because CuPy lacks some
    # operations for bfloat16.
    x, y = (
        array.astype(np.float64) for array in (context[:, sources], tokens[:, targets])
    )
    yield x[selected], y[selected]


class RidgeRegression:
    """Ridge regression of the output layer; the hidden layer does not change.

    The solution is W in (AᵀA + λ J) W = AᵀY. A (R, H + 1) has a row for each input: its
    H hidden activations, and a 1 for the bias. Y (R, D) holds the targets. J is the
    identity matrix with a 0 for the bias, which has no penalty. λ is `ridge` times the
    mean of the first H diagonal entries of AᵀA. So the scale of the activations does
    not change the relative strength of the penalty.
    """

    def __init__(self, network: MLP, ridge: float) -> None:
        self._network, self._ridge = network, ridge
        self._gram: Any = None  # AᵀA (H + 1, H + 1)
        self._moments: Any = None  # AᵀY (H + 1, D)

    def add(self, x: Any, y: Any) -> None:
        """Add the rows of a block, x (R, D) and y (R, D), to the sums AᵀA and AᵀY."""
        if self._gram is None:
            # The weights become arrays of the library of the first block (NumPy or
            # CuPy), on its device.
            converted = (np.asarray(w, dtype=np.float64, like=x) for w in self._network)
            self._network = type(self._network)(*converted)
            self._gram = self._moments = 0
        network = self._network
        hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)  # (R, H)
        hidden = np.concatenate([hidden, np.ones_like(hidden[:, :1])], axis=1)
        # Only these two sums are kept, so the memory does not grow with the data.
        self._gram = self._gram + hidden.T @ hidden
        self._moments = self._moments + hidden.T @ y

    def network(self) -> MLP | None:
        """Return the fitted network in float64, or None if there was no block."""
        if self._gram is None:
            return None
        # NB: not np.eye(like=…): it passes an argument that CuPy's eye does not have.
        penalised = np.ones(len(self._gram))
        penalised[-1] = 0  # the bias has no penalty
        penalty = np.asarray(np.diag(penalised), like=self._gram)  # J
        mean_square = np.diagonal(self._gram)[:-1].mean()
        # λ is `ridge` times the mean squared norm of the first H columns of A. If all
        # activations are 0, so is the mean. The lower limit keeps λ above 0, so that
        # the matrix is invertible.
        penalty_weight = np.maximum(
            self._ridge * mean_square, np.finfo(np.float64).tiny
        )
        try:
            weights = np.linalg.solve(
                self._gram + penalty_weight * penalty, self._moments
            )
        except np.linalg.LinAlgError as error:
            # λ is lost in the rounding of AᵀA, or AᵀA overflows. CuPy returns NaN.
            raise ValueError(
                f"the fit has no unique solution ({error}): raise `ridge`, "
                f"got {self._ridge:g}, or scale the tokens down"
            ) from None
        # Rows 0..H-1 of `weights` (H + 1, D) are W₂ᵀ, and the last row is b₂.
        return self._network._replace(weight_out=weights[:-1].T, bias_out=weights[-1])


def mean_squared_error(network: MLP, blocks: Blocks) -> float:
    """Return the mean squared error of a network over all blocks."""
    total, count = 0.0, 0
    for x, y in blocks():
        total = total + ((network(x) - y) ** 2).sum()
        count += y.size
    return float(total) / count


def gradient(network: MLP, x: Any, y: Any) -> MLP:
    """Return the gradient of a block's mean squared error, for each weight."""
    hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)  # (R, H)
    error = hidden @ network.weight_out.T + network.bias_out - y  # (R, D)
    # With the prediction p, the derivative of mean (p - y)² is 2 (p - y) / (R D).
    return back_propagate(network, x, hidden, error * (2 / error.size))[0]


def refine(
    network: MLP,
    blocks: Blocks,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> MLP:
    """Return the network after `steps` steps of Adam, or `network` if it is better.

    A step reads up to `batch_size` rows of one block. Every pass over the data draws a
    new order of the rows within each block. The order of the blocks stays the same. In
    step t, with the gradient g of a weight w, Adam sets

        m = β₁ m + (1 - β₁) g,    v = β₂ v + (1 - β₂) g²,
        w = w - rate · m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε).
    """
    moment = [0.0 * w for w in network]  # m
    square_moment = [0.0 * w for w in network]  # v
    current = network
    batches = _batches(blocks, batch_size, np.random.default_rng(seed))
    for step, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        gradients = gradient(current, x, y)
        # m and v start at 0, so they are too small at first. Division by 1 - β₁ᵗ and
        # 1 - β₂ᵗ corrects this.
        correction, square_correction = 1 - _DECAY**step, 1 - _SQUARE_DECAY**step
        weights = []
        for i, (w, g) in enumerate(zip(current, gradients, strict=True)):
            moment[i] = _DECAY * moment[i] + (1 - _DECAY) * g
            square_moment[i] = (
                _SQUARE_DECAY * square_moment[i] + (1 - _SQUARE_DECAY) * g * g
            )
            scale = (square_moment[i] / square_correction) ** 0.5 + _EPSILON
            weights.append(w - learning_rate * moment[i] / correction / scale)
        current = type(network)(*weights)
    # A learning rate that is too high can make the fit worse. Compare the errors over
    # all blocks.
    better = mean_squared_error(current, blocks) < mean_squared_error(network, blocks)
    return current if better else network


def _batches(
    blocks: Blocks, batch_size: int, generator: "np.random.Generator"
) -> Iterator[Block]:
    """Yield random batches of rows, one block after the other, without end."""
    while True:
        for x, y in blocks():
            # NumPy draws the order, for CuPy arrays too: a seed gives the same order on
            # the CPU and on a GPU.
            order: NDArray[np.intp] = generator.permutation(len(x))
            for first in range(0, len(x), batch_size):
                selected = np.asarray(order[first : first + batch_size], like=x)
                yield x[selected], y[selected]

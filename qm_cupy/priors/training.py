"""Training of an `MLPPrior`: ridge regression in closed form, then steps of Adam.

Arrays are NumPy or CuPy arrays. A block is a pair of inputs (R, D) and targets (R, D),
in float64. Every pass over the data computes the blocks again, one at a time.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import check_integer, check_number, check_seed, check_tokens
from ..arrays.conversion import enter
from ..cuda.device import to_host
from ..results import Merged
from .merged_tokens import group_counts, merged_parts
from .mlp import MLP, back_propagate, check_width
from .running_mean import running_mean

Block = tuple[Any, Any]
Blocks = Callable[[], Iterator[Block]]

_ROWS = 1 << 14  # prefixes of a block: 32 MB of hidden activations (float64, H = 256)
_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.999, 1e-8  # Adam's usual β₁, β₂ and ε


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
    if isinstance(sequences, Merged) or hasattr(sequences, "__dlpack__"):
        sequences = [sequences]
    elif not isinstance(sequences, Iterable):
        raise TypeError(
            "`sequences` must be an array, a Merged or an iterable of these, "
            f"got {type(sequences).__name__}"
        )
    # `iter` returns an iterator itself. The ridge fit exhausts it, and leaves no data
    # for Adam.
    if steps and iter(sequences) is sequences:
        raise ValueError(
            "`steps` > 0 reads the sequences several times: "
            "pass a list of them, not an iterator"
        )
    fits = [RidgeRegression(network, ridge) for network in networks]
    # One pass over the data serves both directions.
    for tokens, counts in _token_blocks(sequences, networks[0]):
        for reverse, fit in enumerate(fits):
            for block in prefix_pairs(tokens, counts, bool(reverse)):
                fit.add(*block)
    results = []
    for reverse, (network, fit) in enumerate(zip(networks, fits, strict=True)):
        fitted = fit.network()
        if fitted is None:
            raise ValueError(
                "`sequences` must contain at least one sequence of two or more tokens"
            )
        if steps:
            blocks = functools.partial(_all_pairs, sequences, network, bool(reverse))
            fitted = refine(fitted, blocks, steps, rate, batch_size, seed)
        # The fit is in float64. The result has the dtype of the prior's own weights.
        weights = zip(fitted, network, strict=True)
        results.append(MLP(*(to_host(w).astype(old.dtype) for w, old in weights)))
    return results[0], results[1]


def _all_pairs(
    sequences: Iterable[Any], network: MLP, reverse: bool
) -> Iterator[Block]:
    for tokens, counts in _token_blocks(sequences, network):
        yield from prefix_pairs(tokens, counts, reverse)


def _token_blocks(
    sequences: Iterable[Any], network: MLP
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Yield tokens (b, K, D) and their counts (b,), a few sequences at a time."""
    for sequence in sequences:
        tokens, _, sizes = merged_parts(sequence)
        _, tokens, sizes = enter({"sequences": tokens, "sizes": sizes})
        check_tokens(tokens, "sequences")
        check_width("sequences", tokens, network)
        counts = group_counts(tokens, None, sizes).reshape(-1)  # (B,)
        tokens = tokens.reshape(-1, *tokens.shape[-2:])  # (B, K, D)
        part = max(1, _ROWS // tokens.shape[-2])  # sequences of a block
        for first in range(0, len(tokens), part):
            yield tokens[first : first + part], counts[first : first + part]


def prefix_pairs(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> Iterator[Block]:
    """Yield the means that a network reads and the tokens it should predict, (R, D).

    Forward, the pairs are (mean of tokens 1..t, token t + 1); in reverse, (mean of
    tokens t..K, token t - 1). Each sequence has K - 1 pairs.
    """
    known = np.arange(1, tokens.shape[-2]) < counts[:, None]  # (b, K - 1), not padding
    if not known.any():
        return
    context = running_mean(tokens, counts, reverse)  # (b, K, D)
    later, earlier = slice(1, None), slice(None, -1)
    read, wanted = (later, earlier) if reverse else (earlier, later)
    rows = np.asarray(known, like=context)
    # float64 before the mask selects rows: CuPy lacks some operations for bfloat16.
    x, y = (wide.astype(np.float64) for wide in (context[:, read], tokens[:, wanted]))
    yield x[rows], y[rows]


class RidgeRegression:
    """Ridge regression of the output layer; the hidden layer does not change.

    The closed form is (HᵀH + λI) W = HᵀY. H has a row for each prefix: its hidden
    activations h, and a 1 for the bias, which λ does not penalise. λ is `ridge` times
    the mean of the diagonal of HᵀH, without the 1s, so that the scale of the
    activations does not change the relative strength of the penalty.
    """

    def __init__(self, network: MLP, ridge: float) -> None:
        self._network, self._ridge = network, ridge
        self._gram: Any = None  # HᵀH (h + 1, h + 1), h hidden units
        self._moments: Any = None  # HᵀY (h + 1, D)

    def add(self, x: Any, y: Any) -> None:
        """Add a block to the sums HᵀH and HᵀY."""
        if self._gram is None:
            # The first block decides where to compute: NumPy on the CPU or CuPy.
            wide = (np.asarray(w, dtype=np.float64, like=x) for w in self._network)
            self._network = type(self._network)(*wide)
            self._gram = self._moments = 0
        network = self._network
        hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)  # (R, h)
        hidden = np.concatenate([hidden, np.ones_like(hidden[:, :1])], axis=1)
        # Memory does not grow with the data: only these two sums are kept.
        self._gram = self._gram + hidden.T @ hidden
        self._moments = self._moments + hidden.T @ y

    def network(self) -> MLP | None:
        """Return the fitted network in float64, or None if there was no block."""
        if self._gram is None:
            return None
        # NB: not np.eye(like=…): it passes an argument that CuPy's eye does not have.
        ones = np.ones(len(self._gram))
        ones[-1] = 0  # no penalty on the bias
        penalty = np.asarray(np.diag(ones), like=self._gram)
        mean = np.diagonal(self._gram)[:-1].mean()  # mean squared norm of a unit
        # If no hidden unit ever fires, the mean is 0. The floor then keeps λ above 0,
        # and the matrix invertible.
        strength = np.maximum(self._ridge * mean, np.finfo(np.float64).tiny)
        weights = np.linalg.solve(self._gram + strength * penalty, self._moments)
        # `weights` (h + 1, D) is W₂ᵀ above b₂.
        return self._network._replace(weight_out=weights[:-1].T, bias_out=weights[-1])


def mean_squared_error(network: MLP, blocks: Blocks) -> float:
    """Return the mean squared error over all blocks."""
    total, count = 0.0, 0
    for x, y in blocks():
        total = total + ((network(x) - y) ** 2).sum()
        count += y.size
    return float(total) / count


def gradient(network: MLP, x: Any, y: Any) -> MLP:
    """Return the gradient of a block's mean squared error by each weight."""
    hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)  # (R, H)
    error = hidden @ network.weight_out.T + network.bias_out - y  # (R, D)
    # d/dy' of mean (y' - y)² is 2 (y' - y) / (R D).
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
    new order of the rows. With the gradient g of step t, Adam sets

        m = β₁ m + (1 - β₁) g,    v = β₂ v + (1 - β₂) g²,
        w = w - rate · m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + ε).
    """
    moment = [0.0 * w for w in network]  # m
    square = [0.0 * w for w in network]  # v
    now = network
    batches = _batches(blocks, batch_size, np.random.default_rng(seed))
    for step, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        slope = gradient(now, x, y)
        # m and v start at 0. These factors remove the bias of their first steps.
        bias, square_bias = 1 - _DECAY**step, 1 - _SQUARE_DECAY**step
        weights = []
        for i, (w, g) in enumerate(zip(now, slope, strict=True)):
            moment[i] = _DECAY * moment[i] + (1 - _DECAY) * g
            square[i] = _SQUARE_DECAY * square[i] + (1 - _SQUARE_DECAY) * g * g
            size = (square[i] / square_bias) ** 0.5 + _TINY
            weights.append(w - learning_rate * moment[i] / bias / size)
        now = type(network)(*weights)
    # A learning rate that is too high can make the fit worse. Both errors are over all
    # blocks.
    better = mean_squared_error(now, blocks) < mean_squared_error(network, blocks)
    return now if better else network


def _batches(
    blocks: Blocks, batch_size: int, generator: "np.random.Generator"
) -> Iterator[Block]:
    """Yield random batches of rows, one block after the other, without end."""
    while True:
        for x, y in blocks():
            # Drawn by NumPy even for CuPy arrays: a seed gives one order everywhere.
            order: NDArray[np.intp] = generator.permutation(len(x))
            for first in range(0, len(x), batch_size):
                rows = np.asarray(order[first : first + batch_size], like=x)
                yield x[rows], y[rows]

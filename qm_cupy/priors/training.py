"""How an `MLPPrior` learns: ridge regression in closed form, then Adam.

Arrays are NumPy's or CuPy's. A block is inputs (R, D) and targets (R, D), float64; a
fit asks for all blocks anew at every pass over the data.
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

_ROWS = 1 << 14  # prefixes at a time: 32 MB of hidden activations of width 256
_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.999, 1e-8  # Adam's own


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
    """Return the networks of an `MLPPrior`, fitted; `MLPPrior.fit` says to what."""
    ridge = check_number("ridge", ridge, 0, np.inf, "()")
    rate = check_number("learning_rate", learning_rate, 0, np.inf, "()")
    for name, x, least in (("steps", steps, 0), ("batch_size", batch_size, 1)):
        if check_integer(name, x) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {x}")
    seed = check_seed(seed)
    if isinstance(sequences, Merged) or hasattr(sequences, "__dlpack__"):
        sequences = [sequences]
    elif not isinstance(sequences, Iterable):
        raise TypeError(
            "`sequences` must be an array, a Merged or an iterable of these, "
            f"got {type(sequences).__name__}"
        )
    if steps and iter(sequences) is sequences:
        raise ValueError(
            "`steps` read the sequences several times: give a list of them, "
            "not an iterator"
        )
    fits = [RidgeRegression(network, ridge) for network in networks]
    for tokens, counts in _token_blocks(sequences, networks[0]):
        for reverse, fit in enumerate(fits):
            for block in prefix_pairs(tokens, counts, bool(reverse)):
                fit.add(*block)
    results = []
    for reverse, (network, fit) in enumerate(zip(networks, fits, strict=True)):
        fitted = fit.network()
        if fitted is None:
            raise ValueError("`sequences` must have one of two tokens or more")
        if steps:
            blocks = functools.partial(_all_pairs, sequences, network, bool(reverse))
            fitted = refine(fitted, blocks, steps, rate, batch_size, seed)
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
    """Give tokens (b, K, D) and their counts (b,), a few sequences at a time."""
    for sequence in sequences:
        tokens, _, sizes = merged_parts(sequence)
        _, tokens, sizes = enter({"sequences": tokens, "sizes": sizes})
        check_tokens(tokens, "sequences")
        check_width("sequences", tokens, network)
        each = group_counts(tokens, None, sizes).reshape(-1)
        tokens = tokens.reshape(-1, *tokens.shape[-2:])
        part = max(1, _ROWS // tokens.shape[-2])
        for first in range(0, len(tokens), part):
            yield tokens[first : first + part], each[first : first + part]


def prefix_pairs(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> Iterator[Block]:
    """Give the means that a network reads (R, D) and the tokens it should predict."""
    known = np.arange(1, tokens.shape[-2]) < counts[:, None]  # (b, K - 1)
    if not known.any():
        return
    context = running_mean(tokens, counts, reverse)
    ahead, behind = slice(1, None), slice(None, -1)
    read, wanted = (ahead, behind) if reverse else (behind, ahead)
    chosen = np.asarray(known, like=context)
    # Widened before the mask picks rows: CuPy lacks some operations for bfloat16.
    x, y = (wide.astype(np.float64) for wide in (context[:, read], tokens[:, wanted]))
    yield x[chosen], y[chosen]


class RidgeRegression:
    """Finds the output layer of least squares; the hidden layer stays as it is.

    Solves (HᵀH + λI) W = HᵀY for hidden activations H and a constant, which λ spares;
    λ is `ridge` times the mean of HᵀH's diagonal.
    """

    def __init__(self, network: MLP, ridge: float) -> None:
        self._network, self._ridge = network, ridge
        self._gram: Any = None
        self._moments: Any = None

    def add(self, x: Any, y: Any) -> None:
        """Take in a block."""
        if self._gram is None:
            wide = (np.asarray(w, dtype=np.float64, like=x) for w in self._network)
            self._network = type(self._network)(*wide)
            self._gram = self._moments = 0
        network = self._network
        hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)
        hidden = np.concatenate([hidden, np.ones_like(hidden[:, :1])], axis=1)
        self._gram = self._gram + hidden.T @ hidden
        self._moments = self._moments + hidden.T @ y

    def network(self) -> MLP | None:
        """Return the fitted network, in float64; None if there was no block."""
        if self._gram is None:
            return None
        # NB: not np.eye(like=…), which gives CuPy's an argument that it does not have.
        ones = np.ones(len(self._gram))
        ones[-1] = 0  # λ spares the constant
        penalty = np.asarray(np.diag(ones), like=self._gram)
        mean = np.diagonal(self._gram)[:-1].mean()
        # The floor is for hidden units none of which ever fires.
        strength = np.maximum(self._ridge * mean, np.finfo(np.float64).tiny)
        weights = np.linalg.solve(self._gram + strength * penalty, self._moments)
        return self._network._replace(weight_out=weights[:-1].T, bias_out=weights[-1])


def mean_squared_error(network: MLP, blocks: Blocks) -> float:
    """Return the error of all blocks together."""
    total, count = 0.0, 0
    for x, y in blocks():
        total = total + ((network(x) - y) ** 2).sum()
        count += y.size
    return float(total) / count


def gradient(network: MLP, x: Any, y: Any) -> MLP:
    """Return the gradient of a block's mean squared error, shaped as the network."""
    hidden = np.maximum(x @ network.weight_in.T + network.bias_in, 0)
    error = hidden @ network.weight_out.T + network.bias_out - y
    return back_propagate(network, x, hidden, error * (2 / error.size))[0]


def refine(
    network: MLP,
    blocks: Blocks,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> MLP:
    """Return the network after so many steps of Adam, or as it was if that was better.

    A step reads up to `batch_size` rows of a block, drawn anew at every pass.
    """
    moment = [0.0 * w for w in network]
    square = [0.0 * w for w in network]
    now = network
    batches = _batches(blocks, batch_size, np.random.default_rng(seed))
    for step, (x, y) in enumerate(itertools.islice(batches, steps), 1):
        slope = gradient(now, x, y)
        bias, square_bias = 1 - _DECAY**step, 1 - _SQUARE_DECAY**step
        weights = []
        for i, (w, g) in enumerate(zip(now, slope, strict=True)):
            moment[i] = _DECAY * moment[i] + (1 - _DECAY) * g
            square[i] = _SQUARE_DECAY * square[i] + (1 - _SQUARE_DECAY) * g * g
            size = (square[i] / square_bias) ** 0.5 + _TINY
            weights.append(w - learning_rate * moment[i] / bias / size)
        now = type(network)(*weights)
    better = mean_squared_error(now, blocks) < mean_squared_error(network, blocks)
    return now if better else network


def _batches(
    blocks: Blocks, batch_size: int, generator: "np.random.Generator"
) -> Iterator[Block]:
    while True:
        for x, y in blocks():
            order: NDArray[np.intp] = generator.permutation(len(x))
            for first in range(0, len(x), batch_size):
                chosen = np.asarray(order[first : first + batch_size], like=x)
                yield x[chosen], y[chosen]

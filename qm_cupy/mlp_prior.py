"""The paper's prior: a two-layer perceptron over the mean of the tokens so far."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from ._arrays import Array, enter, on_callers_stream
from ._checks import check_counts, check_integer, check_seed, check_tokens


class MLP(NamedTuple):
    """Weights of a two-layer perceptron W₂ relu(W₁ x + b₁) + b₂, stored (out, in)."""

    weight_in: NDArray[Any]
    bias_in: NDArray[Any]
    weight_out: NDArray[Any]
    bias_out: NDArray[Any]

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        """Map (..., D) to (..., D)."""
        hidden = np.maximum(x @ self.weight_in.T + self.bias_in, 0)
        result: NDArray[Any] = hidden @ self.weight_out.T + self.bias_out
        return result


@dataclass(frozen=True)
class MLPPrior:
    """The paper's prior: a small network reads the mean of all tokens so far.

    Its weights are copied to a GPU at the first use there, and later uses read that
    copy: for other weights make another prior.

    Parameters
    ----------
    forward : MLP
        Reads the mean of tokens 1..t and predicts token t + 1.
    backward : MLP
        Reads the mean of tokens t..K and predicts token t - 1.

    Examples
    --------
    >>> import numpy as np
    >>> prior = MLPPrior.init(8, seed=0)
    >>> prior.predict(np.ones((5, 8))).shape
    (5, 8)
    """

    forward: MLP
    backward: MLP
    _copies: dict[tuple[str, np.dtype[Any], bool], MLP] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the copies of the weights out of pickles and copies of the prior."""
        return type(self), (self.forward, self.backward)

    @classmethod
    def init(cls, dim: int, *, hidden_dim: int = 256, seed: int = 0) -> "MLPPrior":
        """Draw a prior at random: uniform within ±1/√(inputs) of each layer.

        Parameters
        ----------
        dim : int
            Width D of the tokens.
        hidden_dim : int, default 256
            Width of the hidden layer.
        seed : int, default 0
            Seed of the draw.

        Returns
        -------
        MLPPrior
            With float32 weights.

        Raises
        ------
        ValueError
            If a width or the seed is out of range.
        """
        widths = check_integer("dim", dim), check_integer("hidden_dim", hidden_dim)
        if min(widths) < 1:
            raise ValueError(f"`dim` and `hidden_dim` must be at least 1, got {widths}")
        generator = np.random.default_rng(check_seed(seed))
        return cls(_random_mlp(generator, *widths), _random_mlp(generator, *widths))

    @on_callers_stream
    def predict(
        self,
        tokens: Array,
        *,
        reverse: bool = False,
        num_groups: Any = None,
        positions: Any = None,
        sizes: Any = None,
    ) -> Array:
        """Predict the neighbour of every token from all tokens up to it, at once.

        Parameters
        ----------
        tokens : ndarray of shape (K, D) or (B, K, D)
            Merged tokens; float16, bfloat16, float32 or float64.
        reverse : bool, default False
            Whether to read from the right and predict the token before.
        num_groups : int or ndarray of int of shape (B,), optional
            Valid tokens of each sequence; the rest is padding.
        positions, sizes : optional
            What other priors read of a `Merged`; this one does not.

        Returns
        -------
        ndarray of shape (K, D) or (B, K, D)
            Row t predicts token t + 1 (t - 1 in reverse); float32, or float64 for
            float64 input.

        Raises
        ------
        TypeError
            If `tokens` is not floating or `num_groups` not integer.
        ValueError
            If a shape does not fit or an entry is not finite.
        """
        leave, tokens, num_groups = enter(tokens=tokens, num_groups=num_groups)
        check_tokens(tokens)
        network = self.backward if reverse else self.forward
        dim = network.weight_in.shape[1]
        if tokens.shape[-1] != dim:
            raise ValueError(
                f"`tokens` must have width D = {dim} like the prior, "
                f"got {tokens.shape[-1]}"
            )
        counts = check_counts(tokens, num_groups)
        if _cuda.is_cuda(tokens):
            network = self._copy_beside(tokens, reverse)
            return leave(_predict_cuda(network, tokens, counts, reverse))
        dtype = np.result_type(tokens.dtype, np.float32)
        context = _running_mean(tokens, counts, reverse).astype(dtype)  # (B, K, D)
        return leave(network(context).astype(dtype, copy=False))

    def _copy_beside(self, tokens: Any, reverse: bool) -> MLP:
        """Return a network with its weights on the device of `tokens`."""
        dtype = _cuda.accumulation(tokens.dtype)
        key = str(tokens.device), dtype, reverse
        if key not in self._copies:
            network = self.backward if reverse else self.forward
            arrays = (_cuda.contiguous(_cuda.to_device(w), dtype) for w in network)
            self._copies[key] = MLP(*arrays)
            _cuda.to_host(self._copies[key].bias_out)  # waits: any stream may read now
        return self._copies[key]


def _predict_cuda(
    network: MLP, tokens: Any, counts: NDArray[np.int64], reverse: bool
) -> Any:
    num_groups, dim = tokens.shape[-2:]
    batch = math.prod(tokens.shape[:-2])
    kind = _cuda.accumulation(tokens.dtype)
    chosen = _cuda.implementation()
    file = f"{chosen}/alignment"
    context = _cuda.empty(tokens.shape, kind)
    each, _ = _cuda.counts(counts)
    sizes = batch, num_groups, dim, int(reverse)
    args: tuple[Any, ...] = (_cuda.contiguous(tokens), each, *sizes, context)
    columns = dim if chosen == "basic" else -(-dim // _cuda.WARP) * _cuda.BLOCK
    _cuda.launch(file, "prefix_means", tokens.dtype, batch * columns, args)
    layers = (*network[:2], 1), (*network[2:], 0)
    for weight, bias, relu in layers:
        out_dim, in_dim = weight.shape
        out = _cuda.empty((*tokens.shape[:-1], out_dim), kind)
        rows = batch * num_groups
        args = (context, weight, bias, rows, in_dim, out_dim, relu, out)
        tiles = -(-rows // _cuda.TILE) * -(-out_dim // _cuda.TILE)
        threads = out.size if chosen == "basic" else tiles * _cuda.BLOCK
        _cuda.launch(file, "linear", kind, threads, args)
        context = out
    return context


def _random_mlp(generator: np.random.Generator, dim: int, hidden_dim: int) -> MLP:
    def draw(inputs: int, *shape: int) -> NDArray[np.float32]:
        bound = inputs**-0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    return MLP(
        draw(dim, hidden_dim, dim),
        draw(dim, hidden_dim),
        draw(hidden_dim, dim, hidden_dim),
        draw(hidden_dim, dim),
    )


def _running_mean(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> NDArray[np.float64]:
    """Return the mean of tokens 1..t, or of t..K in reverse, for every t at once."""
    most = tokens.shape[-2]
    place = np.arange(most)[:, None]  # (K, 1)
    total = tokens.astype(np.float64)
    if not reverse:
        for t in range(1, most):  # a row at a time, for cumsum goes by columns
            total[..., t, :] += total[..., t - 1, :]
        return total / (place + 1)
    left = counts[..., None, None] - place  # tokens from here on: (B, K, 1)
    total = np.where(left > 0, total, 0)
    for t in reversed(range(most - 1)):
        total[..., t, :] += total[..., t + 1, :]
    mean: NDArray[np.float64] = total / np.maximum(left, 1)
    return mean

"""The paper's prior: a two-layer perceptron over the mean of the tokens so far."""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _cuda
from .._arrays import Array, enter, on_callers_stream
from .._checks import (
    check_counts,
    check_integer,
    check_number,
    check_seed,
    check_shape,
    check_tokens,
    check_values,
)
from ..results import Merged
from .checkpoint import _mlp_shapes, _random_mlp, _state_mlp
from .merged_tokens import _counts, _parts
from .mlp import MLP, _network_cuda
from .running_mean import _running_mean
from .training import Block, RidgeRegression, refine
from .weights import load_weights, save_weights

_ROWS = 1 << 14  # prefixes at a time: 32 MB of hidden activations of width 256


@dataclass(frozen=True, eq=False)
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
        self._check_width("tokens", tokens)
        counts = check_counts(tokens, num_groups)
        context = _running_mean(tokens, counts, reverse)
        if _cuda.is_cuda(tokens):
            return leave(_network_cuda(self._copy_beside(tokens, reverse), context))
        network = self.backward if reverse else self.forward
        dtype = np.result_type(tokens.dtype, np.float32)
        return leave(network(context.astype(dtype)).astype(dtype, copy=False))

    @on_callers_stream
    def step(
        self, token: Array, state: Any = None, *, position: Any = None, size: Any = None
    ) -> tuple[Array, Any]:
        """Predict the token after this one, and all before it, left to right.

        Parameters
        ----------
        token : ndarray of shape (D,) or (B, D)
            The next token; float16, bfloat16, float32 or float64.
        state : optional
            What the step before returned; None at the first token.
        position, size : optional
            What other priors read of a `Merged`; this one does not.

        Returns
        -------
        prediction : ndarray of shape (D,) or (B, D)
            As `predict` has it in this token's row.
        state : object
            For the next step.

        Raises
        ------
        TypeError
            If `token` is not floating.
        ValueError
            If a shape does not fit or an entry is not finite.
        """
        leave, token = enter(token=token)
        check_values("token", token, "D", "BD")
        self._check_width("token", token)
        total: Any = None
        count = 0
        if state is not None:
            total, count = state
            check_shape("token", token, "BD", total.shape)
        kind = _cuda.accumulation(token.dtype)
        # As wide as `predict` adds up: float64 but for float32 on a GPU.
        now = token.astype(kind if _cuda.is_cuda(token) else np.float64)
        total = total + now if count else now
        context = (total / (count + 1)).astype(kind)
        if _cuda.is_cuda(token):
            network = self._copy_beside(token, False)
            prediction = _network_cuda(network, context)
        else:
            prediction = self.forward(context).astype(kind, copy=False)
        return leave(prediction), (total, count + 1)

    @on_callers_stream
    def fit(
        self,
        sequences: Any,
        *,
        ridge: float = 1e-2,
        steps: int = 0,
        learning_rate: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> "MLPPrior":
        r"""Return a prior fitted to token sequences, without an autograd engine.

        Both networks keep their hidden layer; the output layer is that of ridge
        regression over all prefixes (suffixes) of all sequences,

        .. math:: \min_W \lVert H W - Y \rVert^2 + \lambda \lVert W \rVert^2,

        in closed form. `steps` of Adam on both layers may follow.

        Parameters
        ----------
        sequences : ndarray of shape (K, D) or (B, K, D), Merged, or iterable of these
            What to fit to; K may differ within an iterable, which is read an array at
            a time. Padding of a `Merged` is left out.
        ridge : float, default 1e-2
            λ over the mean squared norm of a hidden unit's activations, > 0.
        steps : int, default 0
            Steps of Adam. They read the sequences several times: an iterator, which can
            be read only once, will not do.
        learning_rate : float, default 1e-3
            Of Adam.
        batch_size : int, default 256
            Prefixes of each step.
        seed : int, default 0
            Of the order in which steps read them.

        Returns
        -------
        MLPPrior
            With weights of this prior's dtype. Where Adam has not lowered the mean
            squared error over all sequences, its steps are dropped.

        Raises
        ------
        TypeError
            If a sequence is not floating or no array.
        ValueError
            If a shape or width does not fit, an entry is not finite, no sequence has
            two tokens, an option is out of range, or `steps` come with an iterator.

        Examples
        --------
        >>> import numpy as np
        >>> walks = np.random.default_rng(0).standard_normal((20, 30, 4)).cumsum(1)
        >>> prior = MLPPrior.init(4, hidden_dim=32)
        >>> fitted = prior.fit(walks)
        >>> from qm_cupy import alignment_loss
        >>> before, after = (alignment_loss(walks, x).total for x in (prior, fitted))
        >>> bool(after.mean() < 0.5 * before.mean())
        True
        """
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
        networks = self.forward, self.backward
        fits = [RidgeRegression(network, ridge) for network in networks]
        for tokens, counts in self._parts(sequences):
            for reverse, fit in enumerate(fits):
                for block in _pairs(tokens, counts, bool(reverse)):
                    fit.add(*block)
        found = []
        for reverse, (network, fit) in enumerate(zip(networks, fits, strict=True)):
            fitted = fit.network()
            if fitted is None:
                raise ValueError("`sequences` must have one of two tokens or more")
            if steps:
                blocks = functools.partial(self._blocks, sequences, bool(reverse))
                fitted = refine(fitted, blocks, steps, rate, batch_size, seed)
            weights = zip(fitted, network, strict=True)
            found.append(
                MLP(*(_cuda.to_host(w).astype(old.dtype) for w, old in weights))
            )
        return MLPPrior(*found)

    def _blocks(self, sequences: Iterable[Any], reverse: bool) -> Iterator[Block]:
        for tokens, counts in self._parts(sequences):
            yield from _pairs(tokens, counts, reverse)

    def _parts(
        self, sequences: Iterable[Any]
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Give tokens (b, K, D) and their counts (b,), a few sequences at a time."""
        for given in sequences:
            tokens, _, sizes = _parts(given)
            _, tokens, sizes = enter(sequences=tokens, sizes=sizes)
            check_tokens(tokens, "sequences")
            self._check_width("sequences", tokens)
            each = _counts(tokens, None, sizes).reshape(-1)
            tokens = tokens.reshape(-1, *tokens.shape[-2:])
            part = max(1, _ROWS // tokens.shape[-2])
            for first in range(0, len(tokens), part):
                yield tokens[first : first + part], each[first : first + part]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as a safetensors file, at once or not at all.

        Parameters
        ----------
        path : str or path-like
            Where to; a file there is replaced.

        Raises
        ------
        ImportError
            Without the extra ``safetensors``.
        OSError
            If the file cannot be written.

        See Also
        --------
        MLPPrior.load : The way back, bit for bit.
        """
        both = {"forward": self.forward, "backward": self.backward}
        arrays = {
            f"{direction}.{name}": weight
            for direction, network in both.items()
            for name, weight in network._asdict().items()
        }
        hidden_dim, dim = self.forward.weight_in.shape
        settings = {"dim": dim, "hidden_dim": hidden_dim}
        save_weights(Path(path), "MLPPrior", settings, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MLPPrior":
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or path-like
            A file that `save` has written.

        Returns
        -------
        MLPPrior
            Equal to the saved one, bit for bit.

        Raises
        ------
        ImportError
            Without the extra ``safetensors``.
        OSError
            If the file cannot be read.
        ValueError
            If any of its bytes is not as it was saved, or it is no file of this prior.
        """
        _, arrays = load_weights(Path(path), "MLPPrior", _mlp_shapes)
        networks = (
            MLP(*(arrays[f"{direction}.{name}"] for name in MLP._fields))
            for direction in ("forward", "backward")
        )
        return cls(*networks)

    def _check_width(self, name: str, x: NDArray[Any]) -> None:
        dim = self.forward.weight_in.shape[1]
        if x.shape[-1] != dim:
            raise ValueError(
                f"`{name}` must have width D = {dim} like the prior, got {x.shape[-1]}"
            )

    @classmethod
    def from_state_dict(
        cls, forward: Mapping[str, Any], backward: Mapping[str, Any]
    ) -> "MLPPrior":
        """Make a prior of two networks trained in torch, as the paper's code has them.

        Parameters
        ----------
        forward, backward : mapping of str to ndarray
            The ``state_dict()`` of ``nn.Sequential(nn.Linear(D, H), nn.ReLU(),
            nn.Linear(H, D))``: "0.weight" (H, D), "0.bias" (H,), "2.weight" (D, H) and
            "2.bias" (D,), of torch or any other library.

        Returns
        -------
        MLPPrior
            With copies of the weights, in float32 or float64.

        Raises
        ------
        TypeError
            If a weight is not floating.
        ValueError
            If names or shapes do not fit.
        """
        networks = _state_mlp("forward", forward), _state_mlp("backward", backward)
        dims = [network.weight_in.shape[1] for network in networks]
        if dims[0] != dims[1]:
            raise ValueError(f"`forward` has width D = {dims[0]}, `backward` {dims[1]}")
        return cls(*networks)

    def _copy_beside(self, tokens: Any, reverse: bool) -> MLP:
        """Return a network with its weights on the device of `tokens`."""
        dtype = _cuda.accumulation(tokens.dtype)
        key = str(tokens.device), dtype, reverse
        if key not in self._copies:
            network = self.backward if reverse else self.forward
            arrays = [_cuda.contiguous(_cuda.to_device(w), dtype) for w in network]
            self._copies[key] = MLP(*arrays)
            if any(x is not w for x, w in zip(arrays, network, strict=True)):
                _cuda.to_host(arrays[-1])  # waits: any stream may read now
        return self._copies[key]


def _pairs(
    tokens: NDArray[Any], counts: NDArray[np.int64], reverse: bool
) -> Iterator[Block]:
    """Give the means that a network reads (R, D) and the tokens it should predict."""
    known = np.arange(1, tokens.shape[-2]) < counts[:, None]  # (b, K - 1)
    if not known.any():
        return
    context = _running_mean(tokens, counts, reverse)
    ahead, behind = slice(1, None), slice(None, -1)
    read, wanted = (ahead, behind) if reverse else (behind, ahead)
    chosen = np.asarray(known, like=context)
    # Widened before the mask picks rows: CuPy lacks some operations for bfloat16.
    x, y = (wide.astype(np.float64) for wide in (context[:, read], tokens[:, wanted]))
    yield x[chosen], y[chosen]

"""The paper's prior: a two-layer perceptron over the mean of the tokens so far."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.checks import (
    check_counts,
    check_integer,
    check_seed,
    check_shape,
    check_tokens,
    check_values,
)
from ..arrays.conversion import Array, enter, on_callers_stream
from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda, library
from ..cuda.device import to_device, to_host
from ..cuda.launch import contiguous
from .checkpoint import mlp_shapes, random_mlp, read_mlp
from .mlp import MLP, apply_mlp, check_width
from .running_mean import running_mean
from .training import fit_networks
from .weights import load_weights, save_weights


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

    def network_weights(self) -> tuple[Any, ...]:
        """Return the weights of both networks.

        Returns
        -------
        tuple of eight ndarrays
            Those of ``forward``, then of ``backward``, in the order of `MLP`'s fields.
        """
        return (*self.forward, *self.backward)

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
        return cls(random_mlp(generator, *widths), random_mlp(generator, *widths))

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
        leave, tokens, num_groups = enter(
            {"tokens": tokens}, counts={"num_groups": num_groups}
        )
        check_tokens(tokens)
        check_width("tokens", tokens, self.forward)
        counts = check_counts(tokens, num_groups)
        dtype = accumulation_dtype(tokens.dtype)
        context = running_mean(tokens, counts, reverse).astype(dtype, copy=False)
        network = network_beside(self, tokens, reverse)
        return leave(apply_mlp(network, context).astype(dtype, copy=False))

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
        leave, token = enter({"token": token})
        check_values("token", token, "D", "BD")
        check_width("token", token, self.forward)
        total: Any = None
        count = 0
        if state is not None:
            total, count = state
            check_shape("token", token, "BD", total.shape)
        acc_dtype = accumulation_dtype(token.dtype)
        # As wide as `predict` adds up: float64 but for float32 on a GPU.
        now = token.astype(acc_dtype if is_cuda(token) else np.float64)
        total = total + now if count else now
        context = (total / (count + 1)).astype(acc_dtype)
        network = network_beside(self, token, False)
        prediction = apply_mlp(network, context).astype(acc_dtype, copy=False)
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
        networks = fit_networks(
            (self.forward, self.backward),
            sequences,
            ridge=ridge,
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
        return MLPPrior(*networks)

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
        _, arrays = load_weights(Path(path), "MLPPrior", mlp_shapes)
        networks = (
            MLP(*(arrays[f"{direction}.{name}"] for name in MLP._fields))
            for direction in ("forward", "backward")
        )
        return cls(*networks)

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
        networks = (
            read_mlp("forward", forward),
            read_mlp("backward", backward),
        )
        dims = [network.weight_in.shape[1] for network in networks]
        if dims[0] != dims[1]:
            raise ValueError(f"`forward` has width D = {dims[0]}, `backward` {dims[1]}")
        return cls(*networks)


def network_beside(prior: MLPPrior, tokens: Any, reverse: bool) -> MLP:
    """Return a network of a prior, with its weights on the device of `tokens`."""
    network = prior.backward if reverse else prior.forward
    if any(library(w).name in ("torch", "jax") for w in network):
        _, *weights = enter(network._asdict())  # trained there: their values
        network = MLP(*weights)
    if not is_cuda(tokens):
        return network
    dtype = accumulation_dtype(tokens.dtype)
    key = str(tokens.device), dtype, reverse
    copies = prior._copies
    if key not in copies:
        arrays = [contiguous(to_device(w), dtype) for w in network]
        copies[key] = MLP(*arrays)
        if any(x is not w for x, w in zip(arrays, network, strict=True)):
            to_host(arrays[-1])  # waits: any stream may read now
    return copies[key]

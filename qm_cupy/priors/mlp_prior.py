"""The prior of QuickMerge++ (arXiv:2508.13204): two small networks.

A prior is a model that predicts a merged token from the tokens before it. Here each
network is a two-layer perceptron: it reads the mean of all tokens so far. In shapes, B
is the number of sequences, K is the number of merged tokens in a sequence, D is the
width of a token, and H is the width of the hidden layer.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.checks import (
    check_integer,
    check_seed,
    check_shape,
    check_tokens,
    check_values,
)
from ..arrays.conversion import Array, convert_inputs, on_callers_stream
from ..arrays.counts import check_counts
from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda, library
from ..cuda.device import to_device, to_host
from ..cuda.launch import contiguous
from .checkpoint import mlp_shapes, random_mlp, read_mlp
from .mlp import MLP, apply_mlp, check_width
from .running_mean import running_mean
from .training import fit_networks
from .weight_checks import check_networks, converted_network
from .weights import load_weights, save_weights


@dataclass(frozen=True, eq=False)
class MLPPrior:
    """The prior of QuickMerge++ [1]_: a network reads the mean of all tokens so far.

    A prior predicts a merged token from the tokens before it. On the first use on a
    GPU, the weights are copied there, and later uses read this copy. To use other
    weights, make another prior.

    Parameters
    ----------
    forward : MLP
        Reads the mean of tokens 1..t and predicts token t + 1.
    backward : MLP
        Reads the mean of tokens t..K and predicts token t - 1.

    Raises
    ------
    TypeError
        If an argument is not an `MLP` of floating arrays.
    ValueError
        If a shape does not fit, the widths D or H of the networks differ, or a weight
        is not finite. Weights on a GPU are not read. Weights of torch and JAX are
        checked when a method reads them.

    References
    ----------
    .. [1] D. Liu and Y. Yu, "QuickMerge++: Token merging with autoregressive prior",
       arXiv:2508.13204, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> prior = MLPPrior.init(8, seed=0)
    >>> prior.predict(np.ones((5, 8))).shape
    (5, 8)
    """

    forward: MLP
    backward: MLP
    # Weights on GPUs, by device, dtype and direction (reverse or not).
    _copies: dict[tuple[str, np.dtype[Any], bool], MLP] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raise if shapes do not fit, or a NumPy weight is not finite."""
        check_networks(self.forward, self.backward)

    def __reduce__(self) -> tuple[Any, ...]:
        """Exclude the weights on GPUs when the prior is pickled or copied."""
        return type(self), (self.forward, self.backward)

    def network_weights(self) -> tuple[Any, ...]:
        """Return the weights of both networks.

        Returns
        -------
        tuple of eight ndarrays
            The four weights of ``forward``, then the four weights of ``backward``, in
            the order of the fields of `MLP`.
        """
        return (*self.forward, *self.backward)

    @classmethod
    def init(cls, dim: int, *, hidden_dim: int = 256, seed: int = 0) -> "MLPPrior":
        """Draw a random prior: weights uniform within ±1/√(inputs of the layer).

        Parameters
        ----------
        dim : int
            Width D of the tokens.
        hidden_dim : int, default 256
            Width H of the hidden layer.
        seed : int, default 0
            Seed of the random weights.

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
        # Both networks draw from one generator. So their weights differ, and one seed
        # reproduces both.
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
        """Predict the token after (or before) every token, all at once.

        The prediction of token t + 1 reads tokens 1..t. In reverse, the prediction of
        token t - 1 reads tokens t..K.

        Parameters
        ----------
        tokens : ndarray of shape (K, D) or (B, K, D)
            Merged tokens; float16, bfloat16, float32 or float64.
        reverse : bool, default False
            Whether to read from the right and predict the previous token.
        num_groups : int or ndarray of int of shape (B,), optional
            Number of valid tokens of each sequence; later tokens are padding.
        positions, sizes : optional
            Other priors read these fields of a `Merged`. This prior ignores them.

        Returns
        -------
        ndarray of shape (K, D) or (B, K, D)
            Row t predicts token t + 1 (t - 1 in reverse); float32, or float64 for
            float64 input.

        Raises
        ------
        TypeError
            If `tokens` is not floating or `num_groups` is not integer.
        ValueError
            If a shape does not fit or an entry is not finite.
        """
        convert_back, tokens, num_groups = convert_inputs(
            {"tokens": tokens}, counts={"num_groups": num_groups}
        )
        check_tokens(tokens)
        check_width("tokens", tokens, self.forward)
        counts = check_counts(tokens, num_groups)
        dtype = accumulation_dtype(tokens.dtype)
        # All K means are the rows of one matrix, so two GEMMs give all predictions.
        context = running_mean(tokens, counts, reverse).astype(dtype, copy=False)
        network = network_on_device_of(self, tokens, reverse)
        return convert_back(apply_mlp(network, context).astype(dtype, copy=False))

    @on_callers_stream
    def step(
        self, token: Array, state: Any = None, *, position: Any = None, size: Any = None
    ) -> tuple[Array, Any]:
        """Read one token, and predict the token after it from all tokens read so far.

        Parameters
        ----------
        token : ndarray of shape (D,) or (B, D)
            The token to read; float16, bfloat16, float32 or float64.
        state : optional
            The state that the previous step returned; None at the first token.
        position, size : optional
            Other priors read these fields of a `Merged`. This prior ignores them.

        Returns
        -------
        prediction : ndarray of shape (D,) or (B, D)
            The row of this token in the result of `predict`.
        state : object
            The state to pass to the next step.

        Raises
        ------
        TypeError
            If `token` is not floating.
        ValueError
            If a shape does not fit or an entry is not finite.
        """
        convert_back, token = convert_inputs({"token": token})
        check_values("token", token, "D", "BD")
        check_width("token", token, self.forward)
        total: Any = None  # sum of the tokens so far, (D,) or (B, D)
        count = 0
        if state is not None:
            total, count = state
            check_shape("token", token, "BD", total.shape)
        acc_dtype = accumulation_dtype(token.dtype)
        # Sum in the dtype in which `predict` sums: float64 on the CPU, and on a GPU
        # float32, or float64 for float64 tokens.
        # BLAS can give other bits if a token is not in C order.
        converted = token.astype(acc_dtype if is_cuda(token) else np.float64, order="C")
        # A new array, because several steps may continue from the old state.
        total = total + converted if count else converted
        context = (total / (count + 1)).astype(acc_dtype)
        network = network_on_device_of(self, token, False)
        prediction = apply_mlp(network, context).astype(acc_dtype, copy=False)
        return convert_back(prediction), (total, count + 1)

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

        Both networks keep their hidden layer. Their output layer becomes the solution
        of a ridge regression, computed in closed form:

        .. math:: \min_{W, b} \lVert A W + b - Y \rVert^2 + \lambda \lVert W \rVert^2.

        A (R, H) holds the activations of the hidden layer, Y (R, D) holds the tokens to
        predict, and W (H, D) and b (D,) are the weights and the bias of the output
        layer. A and Y have one row for each prefix that has a next token: K - 1 rows
        for a sequence of K tokens. For the backward network, they have one row for each
        suffix that has a previous token. Then `steps` steps of Adam train both layers.

        Parameters
        ----------
        sequences : ndarray of shape (K, D) or (B, K, D), Merged, or iterable of these
            Training data. K may differ between the arrays of an iterable, which are
            read one at a time. Padding of a `Merged` is left out.
        ridge : float, default 1e-2
            λ, relative to the mean squared norm of the columns of A; > 0.
        steps : int, default 0
            Number of steps of Adam. The steps read the sequences several times. So if
            `steps` > 0, an iterator, which can be read only once, raises an error.
        learning_rate : float, default 1e-3
            Learning rate of Adam.
        batch_size : int, default 256
            Largest number of prefixes (or suffixes) in a step.
        seed : int, default 0
            Seed of the order in which the steps read the prefixes (or suffixes).

        Returns
        -------
        MLPPrior
            Its weights are NumPy arrays with the dtype of this prior's weights. If Adam
            does not lower the mean squared error over all sequences, its steps are
            dropped.

        Raises
        ------
        TypeError
            If a sequence is not floating or not an array.
        ValueError
            If a shape or width does not fit, an entry is not finite, no sequence has
            two tokens, an option is out of range, `steps` > 0 with an iterator, the
            tokens are so large that the fit overflows, or `ridge` is so small that the
            regression has no solution.

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
        """Write the weights to a safetensors file, completely or not at all.

        Parameters
        ----------
        path : str or path-like
            File to write. An existing file is replaced.

        Raises
        ------
        ImportError
            If the safetensors package (the extra ``safetensors``) is not installed.
        OSError
            If the file cannot be written.
        ValueError
            If a weight is not finite.

        See Also
        --------
        MLPPrior.load : Read the file back, bit for bit.
        """
        # The arrays get names such as "forward.weight_in". They must be the names that
        # `mlp_shapes` returns, because `load` reads the arrays by those names.
        networks = {"forward": self.forward, "backward": self.backward}
        arrays = {
            f"{direction}.{name}": weight
            for direction, network in networks.items()
            for name, weight in network._asdict().items()
        }
        hidden_dim, dim = self.forward.weight_in.shape
        settings = {"dim": dim, "hidden_dim": hidden_dim}
        save_weights(Path(path), "MLPPrior", settings, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MLPPrior":
        """Read a prior from a file that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            File to read.

        Returns
        -------
        MLPPrior
            Equal to the saved prior, bit for bit.

        Raises
        ------
        ImportError
            If the safetensors package (the extra ``safetensors``) is not installed.
        OSError
            If the file cannot be read.
        ValueError
            If a byte of the file has changed, the file does not hold an `MLPPrior`, or
            a weight is not finite.
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
        """Make a prior from two networks trained in torch, as in the paper's code.

        Parameters
        ----------
        forward, backward : mapping of str to ndarray
            The ``state_dict()`` of ``nn.Sequential(nn.Linear(D, H), nn.ReLU(),
            nn.Linear(H, D))``: "0.weight" (H, D), "0.bias" (H,), "2.weight" (D, H) and
            "2.bias" (D,), of torch or any other library.

        Returns
        -------
        MLPPrior
            It holds copies of the weights, in float32 or float64.

        Raises
        ------
        TypeError
            If a weight is not floating.
        ValueError
            If names or shapes do not fit, the widths D or H of the networks differ, or
            a weight is not finite.
        """
        return cls(read_mlp("forward", forward), read_mlp("backward", backward))


def network_on_device_of(prior: MLPPrior, tokens: Any, reverse: bool) -> MLP:
    """Return the forward or backward network, on the device of `tokens`."""
    network = prior.backward if reverse else prior.forward
    # Weights in torch or JAX are used as plain NumPy or CuPy arrays.
    if any(library(w).name in ("torch", "jax") for w in network):
        network = converted_network("backward" if reverse else "forward", network)
    if not is_cuda(tokens):
        return network
    dtype = accumulation_dtype(tokens.dtype)
    # For float16, bfloat16 and float32 tokens, the kernels read the same float32 copy.
    key = str(tokens.device), dtype, reverse
    copies = prior._copies
    if key not in copies:
        arrays = [contiguous(to_device(w), dtype) for w in network]
        copies[key] = MLP(*arrays)
        # Another stream may use the copies next, so they must be finished. `to_host` of
        # the last copy waits for all work in the current stream. There is no wait if
        # every array is the weight itself and not a copy.
        if any(x is not w for x, w in zip(arrays, network, strict=True)):
            to_host(arrays[-1])
    return copies[key]

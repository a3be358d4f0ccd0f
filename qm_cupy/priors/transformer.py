"""A small causal transformer as the prior: predictions in one pass or in steps.

A prior is a model that predicts a merged token from the tokens before it. B sequences
have K merged tokens of width D; a head of the attention has the width d.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_positions,
    check_seed,
    check_shape,
    check_sizes,
    check_tokens,
    check_values,
)
from ..arrays.conversion import Array, convert_inputs, on_callers_stream
from ..arrays.counts import check_counts
from ..arrays.dtypes import accumulation_dtype
from ..arrays.libraries import is_cuda
from ..cuda.device import to_device, to_host
from ..cuda.launch import contiguous
from .attention import Span, rotary_turns
from .checkpoint import random_transformer, read_transformer, transformer_shapes
from .configuration import Configuration, Weights, configuration_of
from .kv_cache import KVCache
from .merged_tokens import per_sequence
from .transformer_network import run_transformer
from .weight_checks import check_transformer, converted_weights
from .weights import load_weights, save_weights


@dataclass(frozen=True, eq=False)
class TransformerPrior:
    r"""A causal transformer over merged tokens, for inference; train it elsewhere.

    It has blocks x += attention(norm(x)), x += MLP(norm(x)) with GELU, between a linear
    embedding and a linear head. The position of a token is its position in the unmerged
    sequence. Attention is proportional [1]_: with query q, key k and head width d, the
    weight of token j, which stands for n_j tokens, for token i is

    .. math:: p_{ij} = \operatorname{softmax}_j(q_i \cdot k_j / \sqrt d + \log n_j).

    Make a prior by `init`, `from_state_dict` or `load`. On its first use on a GPU, its
    weights are copied there, and later uses read this copy.

    Parameters
    ----------
    forward : mapping of str to ndarray
        Weights of the network that reads from the left and predicts token t + 1. Their
        names are listed in `from_state_dict`.
    backward : mapping of str to ndarray
        Weights of the network that reads from the right and predicts token t - 1.
    num_heads : int
        Number of attention heads. The width d of a head is even, and at most 256.

    Raises
    ------
    TypeError
        If a weight is not a floating array.
    ValueError
        If a name or shape does not fit, or a weight is not finite. Weights on a GPU are
        not read; those of torch and JAX are checked at their first use.

    References
    ----------
    .. [1] D. Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023,
       arXiv:2210.09461.

    Examples
    --------
    >>> import numpy as np
    >>> prior = TransformerPrior.init(8, hidden_dim=32, num_heads=2, seed=0)
    >>> tokens = np.random.default_rng(0).standard_normal((5, 8))
    >>> whole = prior.predict(tokens)
    >>> first, state = prior.step(tokens[0])
    >>> second, state = prior.step(tokens[1], state)
    >>> bool(np.allclose([first, second], whole[:2], atol=1e-6))
    True
    """

    forward: Weights
    backward: Weights
    num_heads: int  # the shapes of the weights do not depend on it
    _settings: Configuration = field(init=False, repr=False)  # from the weights
    # Weights ready for use, by device, dtype and direction (reverse or not).
    _copies: dict[tuple[str, np.dtype[Any], bool], dict[str, Any]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Raise if a direction does not have exactly the weights of the settings."""
        # `forward` determines the settings; `backward` must fit them too.
        settings = configuration_of(self.forward, self.num_heads)
        check_transformer("forward", self.forward, settings)
        check_transformer("backward", self.backward, settings)
        object.__setattr__(self, "_settings", settings)  # the dataclass is frozen

    def __reduce__(self) -> tuple[Any, ...]:
        """Exclude the converted weights when the prior is pickled or copied."""
        return type(self), (dict(self.forward), dict(self.backward), self.num_heads)

    @classmethod
    def init(
        cls,
        dim: int,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
        mlp_dim: int | None = None,
        norm: Literal["rms", "layer"] = "rms",
        num_positions: int | None = None,
        seed: int = 0,
    ) -> "TransformerPrior":
        """Draw a random prior: linear maps are uniform within ±1/√(number of inputs).

        Parameters
        ----------
        dim : int
            Width D of the tokens.
        hidden_dim : int, default 256
            Width E of the network.
        num_layers : int, default 2
            Number of blocks.
        num_heads : int, default 4
            Number of attention heads.
        mlp_dim : int, optional
            Hidden width M of a block's MLP; by default 4 E.
        norm : {"rms", "layer"}, default "rms"
            RMSNorm or LayerNorm.
        num_positions : int, optional
            Number of learned positions. By default, positions are rotary.
        seed : int, default 0
            Seed of the random weights.

        Returns
        -------
        TransformerPrior
            It has float32 weights.

        Raises
        ------
        ValueError
            If a width or the seed is out of range.
        """
        mlp_dim = 4 * hidden_dim if mlp_dim is None else mlp_dim
        if num_positions == 0:  # in the settings, 0 means rotary positions
            raise ValueError("`num_positions` must be at least 1, or None, got 0")
        widths = dim, hidden_dim, num_layers, num_heads, mlp_dim
        settings = Configuration(*widths, norm, num_positions or 0).checked()
        generator = np.random.default_rng(check_seed(seed))  # one for both networks
        forward = random_transformer(generator, settings)
        return cls(forward, random_transformer(generator, settings), num_heads)

    @classmethod
    def from_state_dict(
        cls, forward: Mapping[str, Any], backward: Mapping[str, Any], *, num_heads: int
    ) -> "TransformerPrior":
        """Make a prior from two networks trained in torch.

        Parameters
        ----------
        forward, backward : mapping of str to ndarray
            The ``state_dict()`` of a module with ``embed = nn.Linear(D, E)``;
            ``blocks``, a ModuleList; ``norm``, applied after them; and ``head =
            nn.Linear(E, D)``. A block has ``norm1``; ``qkv = nn.Linear(E, 3 * E)``,
            which returns the queries of all heads, then keys, then values; ``out =
            nn.Linear(E, E)``; ``norm2``; and the MLP, ``mlp_in = nn.Linear(E, M)``,
            exact GELU, ``mlp_out = nn.Linear(M, E)``. Norms are all
            ``nn.LayerNorm(E)`` or all ``nn.RMSNorm(E, eps=1e-5)``. Learned positions
            are ``positions = nn.Embedding(P, E)``, added to the embedding. Without
            them, queries and keys are rotated: elements i and i + d / 2 of a head by
            the angle position · 10000^(-2i / d).
        num_heads : int
            Number of attention heads.

        Returns
        -------
        TransformerPrior
            It holds copies of the weights, in float32 or float64.

        Raises
        ------
        TypeError
            If a weight is not floating.
        ValueError
            If names or shapes do not fit, or an entry is not finite.
        """
        networks = (
            read_transformer("forward", forward),
            read_transformer("backward", backward),
        )
        return cls(*networks, num_heads)

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
        """Predict the neighbour of every token from all tokens up to it, in one pass.

        Parameters
        ----------
        tokens : ndarray of shape (K, D) or (B, K, D)
            Merged tokens; float16, bfloat16, float32 or float64.
        reverse : bool, default False
            Whether to read from the right and predict the previous token.
        num_groups : int or ndarray of int of shape (B,), optional
            Number of valid tokens of each sequence. Predictions of later tokens, which
            are padding, are undefined.
        positions : ndarray of int of shape (K,) or (B, K), optional
            Position of each token in the unmerged sequence; by default 0..K-1. If
            positions are learned, a negative one counts as the first. One that is too
            high raises an error on the CPU, and counts as the last on a GPU.
        sizes : ndarray of shape (K,) or (B, K), optional
            Number of tokens that each token stands for, ≥ 0; by default 1. A token of
            size 0 is not attended to.

        Returns
        -------
        ndarray of shape (K, D) or (B, K, D)
            Row t predicts token t + 1 (t - 1 in reverse); float32, or float64 for
            float64 input.

        Raises
        ------
        TypeError
            If `tokens` is not floating, or `num_groups` or `positions` is not integer.
        ValueError
            If a shape does not fit, an entry is not finite, a size is negative, or a
            position is above the learned positions.
        """
        convert_back, tokens, positions, sizes, num_groups = convert_inputs(
            {"tokens": tokens, "positions": positions, "sizes": sizes},
            counts={"num_groups": num_groups},
        )
        check_tokens(tokens)
        counts = check_counts(tokens, num_groups)
        wanted = tokens.shape[:-1]  # (K,) or (B, K)
        names = "tokens", "positions", "sizes"
        self._check(tokens, positions, sizes, names, wanted, wanted[-1])
        acc_dtype = accumulation_dtype(tokens.dtype)
        inputs = tokens.reshape(-1, *tokens.shape[-2:])  # (B, K, D)
        rows = inputs.shape[:2]  # (B, K)
        span = Span(
            positions=None if positions is None else positions.reshape(rows),
            sizes=None if sizes is None else sizes.reshape(rows).astype(acc_dtype),
            counts=counts.reshape(-1),  # (B,)
            start=0,  # no tokens were read before
            reverse=bool(reverse),
        )
        cache = KVCache.empty(inputs, self._settings, rows[1], layers=1)  # capacity K
        # No layer reads the keys and values of another layer, so all use one cache.
        caches = [(cache.keys[0], cache.values[0])] * self._settings.num_layers
        weights = self._weights(inputs, acc_dtype, bool(reverse))
        return convert_back(
            run_transformer(inputs, span, caches, weights).reshape(tokens.shape)
        )

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
            The state that the previous step returned; None at the first token. It holds
            the keys and values so far. Several steps may continue from one state.
        position : int or ndarray of int of shape () or (B,), optional
            Position of the token in the unmerged sequence; by default the number of
            tokens before it.
        size : number or ndarray of shape () or (B,), optional
            Number of tokens that the token stands for, ≥ 0; by default 1.

        Returns
        -------
        prediction : ndarray of shape (D,) or (B, D)
            The row of this token in the result of `predict`.
        state : object
            The state to pass to the next step.

        Raises
        ------
        TypeError
            If `token` is not floating or `position` is not integer.
        ValueError
            If a shape does not fit, an entry is not finite, a size is negative, or a
            position is above the learned positions.
        """
        # Positions and sizes are arrays, numbers or None. Only arrays are converted.
        options = {"position": position, "size": size}
        arrays = {key: x for key, x in options.items() if hasattr(x, "__dlpack__")}
        convert_back, token, *converted = convert_inputs({"token": token} | arrays)
        position, size = (options | dict(zip(arrays, converted, strict=True))).values()
        check_values("token", token, "D", "BD")
        cache, count = (None, 0) if state is None else state
        acc_dtype = accumulation_dtype(token.dtype)
        inputs = token.reshape(-1, 1, token.shape[-1])  # (B, 1, D)
        if cache is None:  # the first token
            cache = KVCache.empty(inputs, self._settings)
        batch = len(cache.sizes)
        check_shape("token", token, "BD", (batch, token.shape[-1])[2 - token.ndim :])
        if cache.sizes.dtype != acc_dtype:
            raise TypeError(
                "`token` must keep the precision of the tokens before it "
                f"({cache.sizes.dtype}), got {token.dtype}"
            )
        position, size = per_sequence(position, token), per_sequence(size, token)
        names = "token", "position", "size"
        self._check(token, position, size, names, token.shape[:-1], count + 1)
        cache = cache.with_free_slot(count)  # slot `count` is for this token
        cache.sizes[:, count] = 1 if size is None else size
        span = Span(
            positions=None if position is None else position.reshape(batch, 1),
            sizes=cache.sizes,  # (B, capacity)
            counts=np.ones(batch, np.int64),  # T = 1 token
            start=count,
            reverse=False,
        )
        caches = list(zip(cache.keys, cache.values, strict=True))  # for each layer
        weights = self._weights(inputs, acc_dtype, reverse=False)
        prediction = run_transformer(inputs, span, caches, weights).reshape(token.shape)
        cache.length = count + 1  # marks the slot as taken
        return convert_back(prediction), (cache, count + 1)

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
        TransformerPrior.load : Read the file back, bit for bit.
        """
        arrays = {
            f"{direction}.{name}": weight
            for direction in ("forward", "backward")
            for name, weight in getattr(self, direction).items()
        }
        settings = self._settings._asdict()
        save_weights(Path(path), "TransformerPrior", settings, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TransformerPrior":
        """Read a prior from a file that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            File to read.

        Returns
        -------
        TransformerPrior
            Equal to the saved prior, bit for bit.

        Raises
        ------
        ImportError
            If the safetensors package (the extra ``safetensors``) is not installed.
        OSError
            If the file cannot be read.
        ValueError
            If a byte has changed, a weight is not finite, or `MLPPrior` saved the file.
        """
        settings, arrays = load_weights(
            Path(path), "TransformerPrior", transformer_shapes
        )
        networks: dict[str, dict[str, Any]] = {"forward": {}, "backward": {}}
        for key, weight in arrays.items():  # "forward.embed.weight", for example
            direction, _, name = key.partition(".")
            networks[direction][name] = weight
        return cls(**networks, num_heads=settings["num_heads"])

    def _check(
        self,
        tokens: NDArray[Any],
        positions: Any,
        sizes: Any,
        names: tuple[str, str, str],
        wanted: tuple[int, ...],
        end: int,
    ) -> None:
        """Raise if an argument is wrong; the last default position is `end` - 1."""
        dim, learned = self._settings.dim, self._settings.num_positions  # 0: rotary
        if tokens.shape[-1] != dim:
            raise ValueError(
                f"`{names[0]}` must have width D = {dim} like the prior, "
                f"got {tokens.shape[-1]}"
            )
        _, position_name, size_name = names
        check_positions(position_name, positions, wanted, learned)
        check_sizes(size_name, sizes, wanted)
        if positions is None and 0 < learned < end:
            raise ValueError(
                f"the prior has learned {learned} positions, too few for {end} tokens"
            )

    def _weights(
        self, tokens: Any, acc_dtype: np.dtype[Any], reverse: bool
    ) -> dict[str, Any]:
        """Return a network's weights on the device of `tokens`, in `acc_dtype`."""
        on_gpu = is_cuda(tokens)
        key = str(tokens.device) if on_gpu else "NumPy", acc_dtype, reverse
        # Convert once for each device, dtype and direction, and not at every step.
        if key not in self._copies:
            direction = "backward" if reverse else "forward"
            network: Weights = getattr(self, direction)
            named = {f"{direction}[{name!r}]": w for name, w in network.items()}
            arrays = converted_weights(named)  # NumPy or CuPy, also from torch or JAX
            arrays = [to_device(w) if on_gpu else w for w in arrays]
            arrays = [contiguous(w, acc_dtype) for w in arrays]
            copies = dict(zip(network, arrays, strict=True))
            if not self._settings.num_positions:  # rotary; float64 on every device
                turns = rotary_turns(self._settings.hidden_dim // self.num_heads)
                copies["turns"] = to_device(turns) if on_gpu else turns
            if on_gpu:
                # Wait for the copies, because other streams may read them next.
                to_host(copies["head.bias"])
            self._copies[key] = copies
        return self._copies[key]

"""A small causal transformer as the prior: its predictions, all at once or in steps."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays.checks import (
    check_counts,
    check_positions,
    check_seed,
    check_shape,
    check_sizes,
    check_tokens,
    check_values,
)
from ..arrays.conversion import Array, enter, on_callers_stream
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
from .weights import load_weights, save_weights


@dataclass(frozen=True, eq=False)
class TransformerPrior:
    r"""A causal transformer over the merged tokens: for inference, trained elsewhere.

    Pre-norm blocks, x += attention(norm(x)) and x += MLP(norm(x)) with GELU, between a
    linear embedding and a linear head. A token's place is its position in the unmerged
    sequence, and attention is proportional [1]_: a token that stands for n others is
    attended to as n would be,

    .. math:: p_{ij} = \operatorname{softmax}_j(q_i \cdot k_j / \sqrt d + \log n_j).

    Make one by `init`, `from_state_dict` or `load`. Its weights are copied to a GPU at
    the first use there, and later uses read that copy.

    Parameters
    ----------
    forward : mapping of str to ndarray
        Weights of the network that reads from the left and predicts token t + 1, by
        the names that `from_state_dict` lists.
    backward : mapping of str to ndarray
        Weights of the network that reads from the right and predicts token t - 1.
    num_heads : int
        Heads of attention; each is of even width, at most 256.

    Raises
    ------
    ValueError
        If names or shapes of weights do not fit.

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
    num_heads: int
    _settings: Configuration = field(init=False, repr=False)
    _copies: dict[tuple[str, np.dtype[Any], bool], dict[str, Any]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuse weights that make no network."""
        settings = configuration_of(self.forward, self.num_heads)
        shapes = settings.shapes()
        for name in ("forward", "backward"):
            weights: Weights = getattr(self, name)
            if set(weights) != set(shapes):
                lack, extra = set(shapes) - set(weights), set(weights) - set(shapes)
                raise ValueError(
                    f"`{name}` must hold the weights of {settings.num_layers} blocks: "
                    f"it lacks {sorted(lack)}, and {sorted(extra)} are of no use"
                )
            for key, shape in shapes.items():
                check_shape(f"{name}[{key!r}]", weights[key], "XY", shape)
        object.__setattr__(self, "_settings", settings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the copies of the weights out of pickles and copies of the prior."""
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
        """Draw a prior at random: uniform within ±1/√(inputs) of each linear map.

        Parameters
        ----------
        dim : int
            Width D of the tokens.
        hidden_dim : int, default 256
            Width E of the network.
        num_layers : int, default 2
            Blocks.
        num_heads : int, default 4
            Heads of attention.
        mlp_dim : int, optional
            Hidden width of a block's MLP; by default 4 E.
        norm : {"rms", "layer"}, default "rms"
            RMSNorm or LayerNorm.
        num_positions : int, optional
            How many learned positions there are; by default positions are rotary.
        seed : int, default 0
            Seed of the draw.

        Returns
        -------
        TransformerPrior
            With float32 weights.

        Raises
        ------
        ValueError
            If a width or the seed is out of range.
        """
        mlp_dim = 4 * hidden_dim if mlp_dim is None else mlp_dim
        if num_positions == 0:
            raise ValueError("`num_positions` must be at least 1, or None, got 0")
        widths = dim, hidden_dim, num_layers, num_heads, mlp_dim
        settings = Configuration(*widths, norm, num_positions or 0).checked()
        generator = np.random.default_rng(check_seed(seed))
        forward = random_transformer(generator, settings)
        return cls(forward, random_transformer(generator, settings), num_heads)

    @classmethod
    def from_state_dict(
        cls, forward: Mapping[str, Any], backward: Mapping[str, Any], *, num_heads: int
    ) -> "TransformerPrior":
        """Make a prior of two networks trained in torch.

        Parameters
        ----------
        forward, backward : mapping of str to ndarray
            The ``state_dict()`` of a module with ``embed = nn.Linear(D, E)``; where
            positions are learned, ``positions = nn.Embedding(P, E)``, added to it;
            ``blocks``, a ModuleList, each with ``norm1``, ``qkv = nn.Linear(E, 3 * E)``
            (queries, keys and values, each by heads), ``out = nn.Linear(E, E)``,
            ``norm2``, ``mlp_in = nn.Linear(E, M)`` and ``mlp_out = nn.Linear(M, E)``;
            ``norm``; and ``head = nn.Linear(E, D)``. Norms are all ``nn.LayerNorm(E)``
            or all ``nn.RMSNorm(E, eps=1e-5)``. Without ``positions``, queries and keys
            are rotated: elements i and i + d / 2 of a head by the angle
            position · 10000^(-2i / d).
        num_heads : int
            Heads of attention.

        Returns
        -------
        TransformerPrior
            With copies of the weights, in float32 or float64.

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
        """Predict the neighbour of every token from all tokens up to it, at once.

        Parameters
        ----------
        tokens : ndarray of shape (K, D) or (B, K, D)
            Merged tokens; float16, bfloat16, float32 or float64.
        reverse : bool, default False
            Whether to read from the right and predict the token before.
        num_groups : int or ndarray of int of shape (B,), optional
            Valid tokens of each sequence; the rest is padding, whose predictions mean
            nothing.
        positions : ndarray of int of shape (K,) or (B, K), optional
            Place of each token in the unmerged sequence; by default 0..K-1. Of learned
            positions the first stands for those below it, and, on a GPU, where nobody
            looks at them beforehand, the last for those above it.
        sizes : ndarray of shape (K,) or (B, K), optional
            How many tokens each stands for, ≥ 0; by default 1. A token of size 0 is not
            attended to.

        Returns
        -------
        ndarray of shape (K, D) or (B, K, D)
            Row t predicts token t + 1 (t - 1 in reverse); float32, or float64 for
            float64 input.

        Raises
        ------
        TypeError
            If `tokens` is not floating, or `num_groups` or `positions` not integer.
        ValueError
            If a shape does not fit, an entry is not finite, a size negative, or a
            position beyond the learned ones.
        """
        leave, tokens, positions, sizes, num_groups = enter(
            {"tokens": tokens, "positions": positions, "sizes": sizes},
            counts={"num_groups": num_groups},
        )
        check_tokens(tokens)
        counts = check_counts(tokens, num_groups)
        wanted = tokens.shape[:-1]
        names = "tokens", "positions", "sizes"
        self._check(tokens, positions, sizes, names, wanted, wanted[-1])
        acc_dtype = accumulation_dtype(tokens.dtype)
        inside = tokens.reshape(-1, *tokens.shape[-2:])  # (B, K, D)
        rows = inside.shape[:2]
        span = Span(
            positions=None if positions is None else positions.reshape(rows),
            sizes=None if sizes is None else sizes.reshape(rows).astype(acc_dtype),
            counts=counts.reshape(-1),
            start=0,
            reverse=bool(reverse),
        )
        cache = KVCache.empty(inside, self._settings, rows[1], layers=1)
        # One layer's keys and values are of no use to the next.
        caches = [(cache.keys[0], cache.values[0])] * self._settings.num_layers
        weights = self._weights(inside, acc_dtype, bool(reverse))
        return leave(
            run_transformer(inside, span, caches, weights).reshape(tokens.shape)
        )

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
            What the step before returned; None at the first token. It holds the keys
            and values so far, and several steps may go on from one state.
        position : int or ndarray of int of shape () or (B,), optional
            Place of the token in the unmerged sequence; by default how many tokens came
            before it.
        size : number or ndarray of shape () or (B,), optional
            How many tokens it stands for, ≥ 0; by default 1.

        Returns
        -------
        prediction : ndarray of shape (D,) or (B, D)
            As `predict` has it in this token's row.
        state : object
            For the next step.

        Raises
        ------
        TypeError
            If `token` is not floating or `position` not integer.
        ValueError
            If a shape does not fit, an entry is not finite, a size negative, or a
            position beyond the learned ones.
        """
        given = {"position": position, "size": size}  # arrays, or numbers
        arrays = {key: x for key, x in given.items() if hasattr(x, "__dlpack__")}
        leave, token, *inside = enter({"token": token} | arrays)
        position, size = (given | dict(zip(arrays, inside, strict=True))).values()
        check_values("token", token, "D", "BD")
        cache, count = (None, 0) if state is None else state
        acc_dtype = accumulation_dtype(token.dtype)
        inside = token.reshape(-1, 1, token.shape[-1])  # (B, 1, D)
        if cache is None:
            cache = KVCache.empty(inside, self._settings)
        batch = len(cache.sizes)
        check_shape("token", token, "BD", (batch, token.shape[-1])[2 - token.ndim :])
        if cache.sizes.dtype != acc_dtype:
            raise TypeError(
                f"`token` must be as wide as the tokens before it, got {token.dtype}"
            )
        position, size = (
            per_sequence(position, token),
            per_sequence(size, token),
        )
        names = "token", "position", "size"
        self._check(token, position, size, names, token.shape[:-1], count + 1)
        cache = cache.after(count)
        cache.sizes[:, count] = 1 if size is None else size
        span = Span(
            positions=None if position is None else position.reshape(batch, 1),
            sizes=cache.sizes,
            counts=np.ones(batch, np.int64),
            start=count,
            reverse=False,
        )
        caches = list(zip(cache.keys, cache.values, strict=True))
        weights = self._weights(inside, acc_dtype, reverse=False)
        prediction = run_transformer(inside, span, caches, weights).reshape(token.shape)
        cache.length = count + 1
        return leave(prediction), (cache, count + 1)

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
        TransformerPrior.load : The way back, bit for bit.
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
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or path-like
            A file that `save` has written.

        Returns
        -------
        TransformerPrior
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
        settings, arrays = load_weights(
            Path(path), "TransformerPrior", transformer_shapes
        )
        networks: dict[str, dict[str, Any]] = {"forward": {}, "backward": {}}
        for key, weight in arrays.items():
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
        num_places: int,
    ) -> None:
        """Refuse what this prior cannot read; 0..`num_places`-1 is the default."""
        dim, learned = self._settings.dim, self._settings.num_positions
        if tokens.shape[-1] != dim:
            raise ValueError(
                f"`{names[0]}` must have width D = {dim} like the prior, "
                f"got {tokens.shape[-1]}"
            )
        _, position_name, size_name = names
        check_positions(position_name, positions, wanted, learned)
        check_sizes(size_name, sizes, wanted)
        if positions is None and 0 < learned < num_places:
            raise ValueError(
                f"the prior has learned {learned} positions, too few for "
                f"{num_places} tokens"
            )

    def _weights(
        self, tokens: Any, acc_dtype: np.dtype[Any], reverse: bool
    ) -> dict[str, Any]:
        """Return a network's weights beside `tokens`, of the dtype to compute in."""
        on_gpu = is_cuda(tokens)
        key = str(tokens.device) if on_gpu else "NumPy", acc_dtype, reverse
        if key not in self._copies:
            copies = {}
            for name, weight in (self.backward if reverse else self.forward).items():
                weight = to_device(weight) if on_gpu else weight
                copies[name] = contiguous(weight, acc_dtype)
            if not self._settings.num_positions:
                turns = rotary_turns(self._settings.hidden_dim // self.num_heads)
                copies["turns"] = to_device(turns) if on_gpu else turns
            if on_gpu:
                to_host(copies["head.bias"])  # waits: any stream may read now
            self._copies[key] = copies
        return self._copies[key]

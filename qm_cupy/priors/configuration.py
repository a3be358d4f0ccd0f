"""The settings of a transformer prior, their checks, and the shapes of its weights.

A prior is a model that predicts a merged token from the tokens before it. Its network
maps tokens of width D to vectors of width E, has H heads of width d = E / H in each
block, and maps the vectors back to width D.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..arrays.checks import check_integer
from ..cuda.constants import MAX_HEAD_DIM

# A damaged or hostile file may contain any number of layers. This limit bounds the work
# that is done before the shapes are compared with the arrays of the file.
_MAX_LAYERS = 1024
MAX_WIDTH = 2**31 - 1  # the largest size of any axis of a weight

_REPR = reprlib.Repr()  # shortens long values
_REPR.maxstring = _REPR.maxother = 60


def shortened(value: Any) -> str:
    """Return the `repr` of a value of a file, shortened: it may have any length.

    A lone surrogate of a string becomes an escape sequence, so it can be printed.
    """
    return _REPR.repr(value)


Weights = Mapping[str, Any]


class Configuration(NamedTuple):
    """The settings of a network, which determine the shapes of all its weights."""

    dim: int  # D
    hidden_dim: int  # E
    num_layers: int  # number of blocks
    num_heads: int  # H
    mlp_dim: int  # hidden width of the MLP of a block
    norm: Literal["rms", "layer"]
    num_positions: int
    """Number of learned positions; 0 means rotary positions."""

    def checked(self) -> "Configuration":
        """Return the settings; raise if a value is wrong."""
        for name, value in self._asdict().items():
            if name == "norm":
                if value not in ("rms", "layer"):
                    raise ValueError(
                        f'`norm` must be "rms" or "layer", got {shortened(value)}'
                    )
                continue
            check_integer(name, value)
            if value < (0 if name == "num_positions" else 1):
                raise ValueError(f"`{name}` must be at least 1, got {shortened(value)}")
            limit = _MAX_LAYERS if name == "num_layers" else MAX_WIDTH
            if value > limit:
                raise ValueError(
                    f"`{name}` must be at most {limit}, got {shortened(value)}"
                )
        # d = E / H must be an integer, and even: rotary positions rotate pairs of the d
        # elements of a head. With learned positions, a thread of the optimized kernel
        # also copies a pair.
        head_width = self.hidden_dim // self.num_heads
        if head_width * self.num_heads != self.hidden_dim or head_width % 2:
            raise ValueError(
                "`hidden_dim` must be `num_heads` times an even number, "
                f"got {self.hidden_dim} for {self.num_heads} heads"
            )
        # The optimized kernel keeps a query of one head in shared memory.
        if head_width > MAX_HEAD_DIM:
            raise ValueError(
                f"a head must be at most {MAX_HEAD_DIM} wide, got {head_width}: "
                "use more heads (`num_heads`)"
            )
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight of one network, by its name."""
        # RMSNorm has only a weight; LayerNorm also has a bias.
        norms = {"weight", "bias"} if self.norm == "layer" else {"weight"}
        shapes: dict[str, tuple[int, ...]] = {}

        def declare(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape  # (outputs, inputs), as in torch
            shapes[f"{name}.bias"] = shape[:1]  # (outputs,)

        def declare_norm(name: str) -> None:
            shapes.update({f"{name}.{part}": (self.hidden_dim,) for part in norms})

        declare("embed", self.hidden_dim, self.dim)
        if self.num_positions:
            shapes["positions.weight"] = self.num_positions, self.hidden_dim
        for i in range(self.num_layers):
            block = f"blocks.{i}"
            # x += out(attention(norm1(x))), then x += mlp_out(gelu(mlp_in(norm2(x))))
            declare_norm(f"{block}.norm1")
            declare(f"{block}.qkv", 3 * self.hidden_dim, self.hidden_dim)
            declare(f"{block}.out", self.hidden_dim, self.hidden_dim)
            declare_norm(f"{block}.norm2")
            declare(f"{block}.mlp_in", self.mlp_dim, self.hidden_dim)
            declare(f"{block}.mlp_out", self.hidden_dim, self.mlp_dim)
        declare_norm("norm")
        declare("head", self.dim, self.hidden_dim)
        return shapes


def configuration_of(weights: Weights, num_heads: int) -> Configuration:
    """Return the settings of a network, from the names and shapes of its weights.

    The shapes do not depend on the number of heads, so the caller must pass it. The
    caller is `TransformerPrior` with its network `forward`, so errors use this name.
    """
    matrices = ("embed.weight", "blocks.0.mlp_in.weight")
    for name in matrices:
        if getattr(weights.get(name), "ndim", 0) != 2:
            raise ValueError(f"`forward` must hold {name!r}, a matrix (out, in)")
    (hidden_dim, dim), (mlp_dim, _) = (weights[name].shape for name in matrices)
    # "blocks.3.qkv.weight" is a weight of block "3". `TransformerPrior` checks that no
    # block is missing.
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    learned = weights.get("positions.weight")
    return Configuration(
        dim,
        hidden_dim,
        len(blocks),
        check_integer("num_heads", num_heads),
        mlp_dim,
        "layer" if "norm.bias" in weights else "rms",
        0 if learned is None else len(learned),
    ).checked()

"""The widths of a transformer prior, their checks, and the shapes of its weights."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..arrays.checks import check_integer
from ..cuda.constants import MAX_HEAD_DIM

# A damaged or hostile file may state any number. This bounds the work before the shapes
# are compared with the arrays of the file.
_MAX_LAYERS = 1024

Weights = Mapping[str, Any]


class Configuration(NamedTuple):
    """The widths of a network, which determine the shapes of all its weights."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    norm: Literal["rms", "layer"]
    num_positions: int
    """Number of learned positions; 0 means rotary positions."""

    def checked(self) -> "Configuration":
        for name, value in self._asdict().items():
            if name == "norm":
                if value not in ("rms", "layer"):
                    raise ValueError(f'`norm` must be "rms" or "layer", got {value!r}')
                continue
            check_integer(name, value)
            if value < (0 if name == "num_positions" else 1):
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.num_layers > _MAX_LAYERS:
            raise ValueError(
                f"`num_layers` must be at most {_MAX_LAYERS}, got {self.num_layers}"
            )
        # d = E / H must be exact, and even: rotary positions rotate pairs of elements.
        width = self.hidden_dim // self.num_heads
        if width * self.num_heads != self.hidden_dim or width % 2:
            raise ValueError(
                "`hidden_dim` must be `num_heads` times an even number, "
                f"got {self.hidden_dim} for {self.num_heads} heads"
            )
        if width > MAX_HEAD_DIM:  # the kernel keeps a head in shared memory
            raise ValueError(
                f"a head must be at most {MAX_HEAD_DIM} wide, got {width}: "
                "use more heads (`num_heads`)"
            )
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight of one network, by its name."""
        # RMSNorm has a gain only; LayerNorm also has a bias.
        norms = {"weight", "bias"} if self.norm == "layer" else {"weight"}
        shapes: dict[str, tuple[int, ...]] = {}

        def declare(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"] = shape  # (out, in), as torch stores it
            shapes[f"{name}.bias"] = shape[:1]  # (out,)

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
    """Return the settings of a network, read from the names and shapes of its weights.

    The shapes do not depend on `num_heads`, so it must be passed.
    """
    wide = ("embed.weight", "blocks.0.mlp_in.weight")
    for name in wide:
        if getattr(weights.get(name), "ndim", 0) != 2:
            raise ValueError(f"`forward` must hold {name!r}, a matrix (out, in)")
    (hidden_dim, dim), (mlp_dim, _) = (weights[name].shape for name in wide)
    # "blocks.3.qkv.weight" -> "3"; `TransformerPrior` checks that no block is missing.
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

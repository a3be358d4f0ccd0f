"""Models of the kernels of the table: their loops, and how often a warp runs them.

MODELS has one entry for each kernel. The launch of a kernel without an entry is an
error. An entry whose loops are not in the machine code is an error as well.

Counts of opcodes say which code is the common case. A loop also holds code for rare
cases, such as unaligned rows; the path that is counted must pass the opcodes given
here, for example the matrix products and the 16-byte copies.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Sizes = Any  # a namespace: the numbers of a launch, its blocks and its threads


class Loop(NamedTuple):
    """A loop of a model: how to find it, and how often a warp runs it."""

    via: dict[str, int]
    """Opcodes that one pass executes, with the least count of each."""
    times: Callable[[Sizes], float]
    """Passes of a warp; with `work`, the number of that opcode that it executes."""
    work: str = ""
    """An opcode by which the passes are counted."""
    around: str = ""
    """Another loop: this loop is the smallest one that contains it."""
    inside: str = ""
    """Another loop, which contains this one."""
    chain: float = 0
    """Loads that wait for each other, per pass or per `work`."""
    scores: Callable[[Sizes], float] | None = None
    """Scores that a thread finishes in one pass, if any."""


class Model(NamedTuple):
    """The loops of a kernel, and the rest of its code, which runs once."""

    loops: dict[str, Loop]
    rest: dict[str, int] = {}  # noqa: RUF012  opcodes that the rest executes
    scores: Callable[[Sizes], float] | None = None  # of a thread, in the rest
    port_bytes: Callable[[Sizes], float] = lambda s: 0.0  # further reads of a block
    warps: int = 0  # number of warps that work, if not all of the block
    predicted: bool = True  # whether a time is predicted


# A kernel that only streams its arrays: only the memory bounds it.
STREAM = Model({})
# A kernel whose time depends on the data: it is counted, but no time is predicted.
UNPREDICTED = Model({}, predicted=False)


# One step of a tile, by one thread: its products, and its copies, 32 elements per row.
STEP = {"HMMA": 32, "LDGSTS.E.BYPASS.128": 4}  # 128 x 128, 256 threads
HALF = {"HMMA": 32, "LDGSTS.E.BYPASS.128": 6}  # 64 x 128, 128 threads
WIDE = {"HMMA": 64, "LDGSTS.E.BYPASS.128": 6}  # 128 x 256, 256 threads


def tiles(
    rows: int,
    columns: int,
    depth: str,
    *,
    step: dict[str, int] = STEP,
    passes: Callable[[Sizes], float] = lambda s: 1.0,
    per_tile: dict[str, int] | None = None,
    rest: dict[str, int],
) -> Model:
    """Return the model of a kernel around `multiply_tiles`, on tensor cores.

    Each block multiplies `passes` tiles of rows x columns. `depth` names the argument
    of the launch that is the inner dimension of the product. A pass of the inner loop
    executes the opcodes `step`. If `per_tile` is given, there is a loop over the tiles,
    and its passes execute those opcodes.
    """

    def products(s: Sizes) -> float:
        # One HMMA multiplies 16 x 16 by 16 x 8: rows * columns / 128 of them cover a
        # tile for 16 of its inner dimension. The warps of the block divide them.
        steps = getattr(s, depth) / 16
        return passes(s) * rows * columns * steps / 128 / (s.threads / 32)

    def scores(s: Sizes) -> float:
        # The threads of a block divide the scores of a tile.
        return rows * columns / s.threads

    loops = {"step": Loop(step, products, "HMMA")}
    if per_tile is None:
        return Model(loops, rest, scores)
    loops["tile"] = Loop(per_tile, passes, around="step", scores=scores)
    return Model(loops, rest)


def _kept() -> Model:
    """Return the model of the kernels that stage 128 queries (or keys) only once."""

    def copies(s: Sizes) -> float:
        # 128 queries once, and the keys of every tile (or the reverse): rows of 2-byte
        # elements, in copies of 16 bytes that the threads divide.
        rows = 128 * _tiles_of("num_tokens")(s)
        return (128 + rows) * s.head_dim * 2 / 16 / s.threads

    step = {"HMMA": 32}  # the copies are in a loop of their own
    model = tiles(
        128, 128, "head_dim", step=step, passes=_tiles_of("num_tokens"),
        per_tile={"MUFU.EX2": 64}, rest={"STG": 1},
    )  # fmt: skip
    copy = "LDGSTS.E.BYPASS.128"
    loops = model.loops | {"copy": Loop({copy: 2}, copies, copy, inside="tile")}
    return model._replace(loops=loops)


def _linear(rows: int) -> Model:
    """Return the model of `linear` in float32, whose products are FFMAs."""

    def products(s: Sizes) -> float:
        # A tile of rows x 128 outputs; one FFMA per output and input dimension.
        return rows * 128 * s.in_dim / s.threads

    def copies(s: Sizes) -> float:
        # Rows of both factors, 4 bytes per element, in copies of 16 bytes.
        return (rows + 128) * s.in_dim * 4 / 16 / s.threads

    copy = "LDGSTS.E.BYPASS.128"
    return Model(
        {
            "step": Loop({copy: 1}, copies, copy),
            "chunk": Loop({"FFMA": 64}, products, "FFMA", inside="step"),
        },
        {"STG": 64},
    )


def _tiles_of(number: str, columns: int = 128) -> Callable[[Sizes], float]:
    """Return a function that gives how many tiles cover an argument of the launch."""
    return lambda s: math.ceil(getattr(s, number) / columns)


# Names of the file, the kernel, and (in a model) the loops. The names of loops are keys
# of results/instructions.json.
MODELS = {
    "optimized/self_attention_entropy/self_attention_states": tiles(
        128, 128, "dim", rest={"STG": 3, "MUFU.EX2": 128}
    ),
    "optimized/self_attention_entropy/self_attention_states_half": tiles(
        64, 128, "dim", step=HALF, rest={"STG": 3, "MUFU.EX2": 128}
    ),
    "optimized/self_attention_entropy/self_attention_states_wide": tiles(
        128, 256, "dim", step=WIDE, rest={"STG": 3, "MUFU.EX2": 256}
    ),
    "optimized/self_attention_entropy/self_attention_entropy": STREAM,
    "optimized/query_key_entropy/query_key_entropy": tiles(
        64,
        128,
        "head_dim",
        step=HALF,
        passes=_tiles_of("num_tokens"),
        per_tile={"MUFU.EX2": 64},
        rest={"STG": 1},
    ),
    "optimized/query_key_entropy/query_key_entropy_kept": _kept(),
    "optimized/attention_entropy/attention_entropy": Model(
        {
            "row": Loop(
                {"LDG.E.128": 1, "MUFU.LG2": 1}, lambda s: s.num_tokens / 32,
                "MUFU.LG2",
            )
        },
        {"STG": 1},
    ),
    "optimized/score_gradients/score_weights": tiles(
        128, 128, "dim", passes=_tiles_of("num_tokens"), per_tile={"MUFU.EX2": 64},
        rest={"STG": 3},
    ),
    "optimized/attention_received/query_counts": STREAM,
    "optimized/attention_received/query_key_received": tiles(
        64, 128, "head_dim", step=HALF, passes=_tiles_of("num_tokens"),
        per_tile={"MUFU.EX2": 64}, rest={"STG": 1},
    ),
    "optimized/attention_received/query_key_received_kept": _kept(),
    # Each of the eight warps of a block reads every eighth row.
    "optimized/attention_received/attention_received": Model(
        {"row": Loop({"LDG.E.128": 1}, lambda s: s.num_tokens / 8, "LDG.E.128")},
        {"STG": 1},
    ),
    "optimized/token_norms/token_norms": STREAM,
    "optimized/cosine_similarity/cosine_similarity": tiles(
        128, 128, "dim", rest={"STG.E.64": 32, "STG": 96}
    ),
    "optimized/cosine_similarity/cosine_similarity_half": tiles(
        64, 128, "dim", step=HALF, rest={"STG.E.64": 32, "STG": 96}
    ),
    "optimized/cosine_similarity/cosine_similarity_wide": tiles(
        128, 256, "dim", step=WIDE, rest={"STG.E.64": 64, "STG": 192}
    ),
    "optimized/nearest/nearest_anchors": tiles(
        128, 128, "dim", passes=_tiles_of("num_groups"),
        per_tile={"FMUL": 64, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/nearest/nearest_anchors_half": tiles(
        64, 128, "dim", step=HALF, passes=_tiles_of("num_groups"),
        per_tile={"FMUL": 64, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/nearest/nearest_anchors_wide": tiles(
        128, 256, "dim", step=WIDE, passes=_tiles_of("num_groups", 256),
        per_tile={"FMUL": 128, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/reconstruction_error/token_errors": STREAM,
    "optimized/reconstruction_error/reconstruction_error": STREAM,
    # A warp sorts a run of tokens, 32 at a time. Each pass waits about 210 clocks for
    # shared memory. `chain` is in units of a round trip to L2, 270 clocks.
    "optimized/groups/sort_members": Model(
        {
            "place": Loop(
                {"MATCH": 1, "LDS": 2},
                lambda s: math.ceil(s.num_tokens / 32 / s.runs), chain=210 / 270,
            )
        },
        {"STG": 1},
    ),
    "optimized/merge_tokens/merge_tokens": Model(
        {
            # A pass reads four members: their indices, their masses and their columns.
            # With random labels, the last pass is half empty on average.
            "members": Loop(
                {"LDG.E.128": 4, "LDG.E": 12},
                lambda s: s.num_tokens / s.num_groups / 4 + 0.5,
            )
        },
        {"STG.E.128": 1},
    ),
    "optimized/running_mean/prefix_means": STREAM,
    "optimized/linear/linear": _linear(128),
    "optimized/linear/linear_half": _linear(64),
    "optimized/alignment_loss/prediction_errors": STREAM,
    "optimized/alignment_loss/alignment_loss": STREAM,
    "optimized/saliency/entropy_range": STREAM,
    "optimized/saliency/saliency": STREAM,
    # One block per sequence draws the noise, in float64.
    "optimized/gumbel_softmax/gumbel_softmax": Model(
        {"token": Loop({"DFMA": 8, "BAR": 2}, lambda s: s.num_tokens / s.threads)},
        {"STG": 4, "BAR": 4},
    ),
    "optimized/linkage/linkage": UNPREDICTED,
}  # fmt: skip

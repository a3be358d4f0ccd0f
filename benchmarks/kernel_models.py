"""What each kernel of the table does: its loops, and how often a warp runs them.

One line of MODELS for a kernel. A launch of a kernel without a line is an error, and so
is a line whose loops are not in the machine code.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Sizes = Any  # a namespace of the launch's numbers, and its blocks and threads


class Loop(NamedTuple):
    """A loop that a model names: how to find it, and how often a warp runs it."""

    via: dict[str, int]
    """Opcodes that one pass executes, and how many of each at least."""
    times: Callable[[Sizes], float]
    """Passes of a warp, or, with `work`, how many of that opcode it executes."""
    work: str = ""
    around: str = ""
    """Another loop: this one is the smallest around it."""
    inside: str = ""
    """Another loop, which holds this one."""
    chain: float = 0
    """Loads that wait for each other, for each pass or each `work`."""
    scores: Callable[[Sizes], float] | None = None
    """Scores that a thread finishes in one pass, if there are any."""


class Model(NamedTuple):
    """What a kernel does with its sizes."""

    loops: dict[str, Loop]
    rest: dict[str, int] = {}  # noqa: RUF012  opcodes that the rest executes
    scores: Callable[[Sizes], float] | None = None  # of a thread, in the rest
    port_bytes: Callable[[Sizes], float] = lambda s: 0.0  # that a block reads more
    warps: int = 0  # that work, where it is not all of the block's
    predicted: bool = True


# A kernel that only streams its arrays: the memory alone bounds it.
STREAM = Model({})
# A kernel whose time depends on the data: it is counted, and nothing is predicted.
UNPREDICTED = Model({}, predicted=False)


# A step of a tile by one thread: its products, and its copies of 32 elements a row.
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
    each: dict[str, int] | None = None,
    rest: dict[str, int],
) -> Model:
    """Return the model of a kernel around `multiply_tiles`, on tensor cores.

    Each block multiplies `passes` tiles of rows x columns over the number `depth`, in
    passes of a loop that execute `step`. With `each`, a loop over the tiles has these
    opcodes.
    """

    def products(s: Sizes) -> float:
        steps = getattr(s, depth) / 16  # of one HMMA
        return passes(s) * rows * columns * steps / 128 / (s.threads / 32)

    def scores(s: Sizes) -> float:
        return rows * columns / s.threads

    loops = {"step": Loop(step, products, "HMMA")}
    if each is None:
        return Model(loops, rest, scores)
    loops["tile"] = Loop(each, passes, around="step", scores=scores)
    return Model(loops, rest)


def _kept() -> Model:
    """Return the model of `query_key_entropy_kept`, which stages its queries once."""

    def copies(s: Sizes) -> float:
        rows = 128 * _tiles_of("num_tokens")(s)
        return (128 + rows) * s.head_dim * 2 / 16 / s.threads

    step = {"HMMA": 32}
    model = tiles(
        128, 128, "head_dim", step=step, passes=_tiles_of("num_tokens"),
        each={"MUFU.EX2": 64}, rest={"STG": 1},
    )  # fmt: skip
    copy = "LDGSTS.E.BYPASS.128"
    loops = model.loops | {"copy": Loop({copy: 2}, copies, copy, inside="tile")}
    return model._replace(loops=loops)


def _linear(rows: int) -> Model:
    """Return the model of `linear` in float32, whose products are FFMAs."""

    def products(s: Sizes) -> float:
        return rows * 128 * s.in_dim / s.threads

    def copies(s: Sizes) -> float:
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
    return lambda s: math.ceil(getattr(s, number) / columns)


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
        each={"MUFU.EX2": 64},
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
        each={"FMUL": 64, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/nearest/nearest_anchors_half": tiles(
        64, 128, "dim", step=HALF, passes=_tiles_of("num_groups"),
        each={"FMUL": 64, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/nearest/nearest_anchors_wide": tiles(
        128, 256, "dim", step=WIDE, passes=_tiles_of("num_groups", 256),
        each={"FMUL": 128, "LDG": 16, "MUFU.RCP": 16}, rest={"STG": 2},
    ),
    "optimized/reconstruction_error/token_errors": STREAM,
    "optimized/reconstruction_error/reconstruction_error": STREAM,
    # A warp places a run of tokens, 32 at a time: about 210 clocks in shared memory.
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
            # Four members in a pass: which ones, their masses, their columns. Of
            # random labels the last pass is half empty.
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
    # One block for each sequence draws the noise, in float64.
    "optimized/gumbel_softmax/gumbel_softmax": Model(
        {"token": Loop({"DFMA": 8, "BAR": 2}, lambda s: s.num_tokens / s.threads)},
        {"STG": 4, "BAR": 4},
    ),
    "optimized/linkage/linkage": UNPREDICTED,
}  # fmt: skip

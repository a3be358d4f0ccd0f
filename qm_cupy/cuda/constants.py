"""Numbers that Python and CUDA share: `definitions` is what the kernels are given.

The kernels know them by the same names, as macros. Where a number is the size of a
struct, the kernel asserts it.
"""

WARP = 32  # threads that go in step
BLOCK = 256  # threads of a block, where a kernel does not say otherwise
VECTOR_BYTES = 16  # that a thread reads or writes at once; shared memory is aligned so
COUNTS = 16  # arguments of `write_counts` in kernels/basic/counts.cu
# Of kernels/optimized/tiles.cuh: rows and columns of a tile, bytes of each row that are
# staged in a step, and the steps in shared memory of the widest tile.
TILE, STEP_BYTES, WIDE_STAGES = 128, 64, 4
SQUARE = 32  # rows and columns that a block transposes
THREAD_TOKENS = 4  # of a thread, in selection and in the saliency of layers
# Threads of a block, at most, in the kernels whose launch bounds these are. Of
# linkages, by the bytes of a distance: as many as have the registers they need. A
# multiprocessor has one such block at a time, so that all of a launch can run.
SELECTION_THREADS = 1024
GROUP_THREADS = 1024
SORT_THREADS = 1024
LINKAGE_THREADS = {4: 512, 8: 384}
MAX_HEAD_DIM = 256  # of the transformer prior: a block keeps a head's sums
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}  # of linear maps
NOISE_BITS = 23  # of a uniform number, which Gumbel noise is made of

# Values that a row of scores is known by: (m, r, t), or those of its gradient.
STATE_VALUES = 3
EXTREMES = 4  # values that `entropy_extremes` finds for a layer of a sequence
QUERIES, KEYS = 1, 2  # bits: what the rows of a band of score gradients are

# Linkage: what each block keeps. Sizes are in bytes, by those of a distance.
LINKAGE_METHODS = {"average": 0, "complete": 1, "ward": 2, "single": 3}
LEAST_MASS = 1e-6  # of the largest in the sequence: what counts as no mass
ERROR_ROUNDING = 1e-12  # of an error that a cut is held against
LINKAGE_SCRATCH = 128  # distances in shared memory, in front of clusters and matrix
SLOT_BYTES = {width: 5 * width + 22 for width in (4, 8)}  # of a cluster
TREE_BYTES = {width: 2 * width + 20 for width in (4, 8)}  # of a token, in a dendrogram
NEAREST_BYTES = {width: 2 * width for width in (4, 8)}  # of a nearest cluster
# Single linkage: 8-byte words, reals and integers that the state has for each token;
# integers of its progress, and of each token while its rows are written.
SINGLE_WORDS, SINGLE_REALS, SINGLE_INTEGERS = 2, 3, 8
SINGLE_PROGRESS, SINGLE_ROW_INTEGERS = 4, 3
# Contiguous groups: reals and integers for each token.
CONTIGUOUS_REALS, CONTIGUOUS_INTEGERS = 5, 3
BASIC_CONTIGUOUS_REALS, BASIC_CONTIGUOUS_INTEGERS = 3, 2

_BY_WIDTH = "LINKAGE_THREADS", "SLOT_BYTES", "TREE_BYTES", "NEAREST_BYTES"
_SAME = (
    "VECTOR_BYTES", "COUNTS", "TILE", "STEP_BYTES", "WIDE_STAGES", "SQUARE",
    "THREAD_TOKENS", "SELECTION_THREADS", "GROUP_THREADS", "SORT_THREADS",
    "MAX_HEAD_DIM", "NOISE_BITS", "STATE_VALUES", "EXTREMES", "QUERIES", "KEYS",
    "LEAST_MASS", "ERROR_ROUNDING", "LINKAGE_SCRATCH", "SINGLE_WORDS", "SINGLE_REALS",
    "SINGLE_INTEGERS", "SINGLE_PROGRESS", "SINGLE_ROW_INTEGERS", "CONTIGUOUS_REALS",
    "CONTIGUOUS_INTEGERS", "BASIC_CONTIGUOUS_REALS", "BASIC_CONTIGUOUS_INTEGERS",
)  # fmt: skip


def definitions(width: int) -> dict[str, int | float]:
    """Return the numbers by their names in CUDA; `width` is the bytes of an acc_t."""
    here, numbered = globals(), ACTIVATIONS | LINKAGE_METHODS
    return {
        "BLOCK_THREADS": BLOCK,
        **{name: here[name] for name in _SAME},
        **{name: here[name][width] for name in _BY_WIDTH},
        **{name.upper(): x for name, x in numbered.items() if x},
    }

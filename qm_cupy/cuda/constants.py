"""Constants that Python and CUDA use. `definitions` passes them to the compiler.

In the kernels they are macros. Most have the same name as here; `definitions` shows the
exceptions. If a constant is the size of a struct, the kernel asserts that both are
equal. Here "reals" are values of the type of sums, `acc_t`, with 4 or 8 bytes.
"Integers" have 4 bytes.
"""

WARP = 32  # GPU threads that execute one instruction together; the kernels write 32
BLOCK = 256  # threads of a block, unless a launch sets another number
VECTOR_BYTES = 16  # bytes of one vector load or store; shared memory is aligned to it
COUNTS = 16  # number of counts that one launch of `write_counts` writes
# Constants of kernels/optimized/tiles.cuh: the rows and columns of a whole tile, the
# bytes of each row that one step copies to shared memory, and the number of stages of
# the widest tile. A stage is the part of shared memory that holds one step.
TILE, STEP_BYTES, WIDE_STAGES = 128, 64, 4
SQUARE = 32  # rows and columns that a block transposes
THREAD_TOKENS = 4  # tokens that a thread keeps in registers, in selection and saliency
# The largest numbers of threads of a block, which are launch bounds of the kernels. For
# linkage the key is the number of bytes of a distance, and registers limit the number
# of threads: one such block must fit on a multiprocessor. Then all blocks of a
# cooperative launch, at most one for each multiprocessor, can run at the same time.
SELECTION_THREADS = 1024
GROUP_THREADS = 1024
SORT_THREADS = 1024
LINKAGE_THREADS = {4: 512, 8: 384}
# Largest width of a head in the transformer prior: one block keeps the sums of a head.
MAX_HEAD_DIM = 256
# Rows and keys of a block of `attend`.
ATTEND_ROWS, ATTEND_KEYS = 4, 512
# Functions after a linear map.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
NOISE_BITS = 23  # bits of the uniform numbers that Gumbel noise is computed from

# Number of values in the softmax state (m, r, t) of a row of scores, which
# stages/saliency/online_softmax.py defines. Gradients of scores also need three values
# for each row: (m, t / (1 + r), g / (1 + r)), where g is the gradient of a loss with
# respect to the entropy of the row.
STATE_VALUES = 3
EXTREMES = 4  # values that `entropy_extremes` writes for each layer of a sequence
# Bits that select a matrix. G_ij is the gradient of a loss with respect to the score of
# query i and key j. QUERIES selects G, whose rows belong to queries. KEYS selects Gᵀ,
# whose rows belong to keys. Both bits select G + Gᵀ.
QUERIES, KEYS = 1, 2

# Linkage. In the dictionaries of bytes, the keys are the bytes of a distance.
LINKAGE_METHODS = {"average": 0, "complete": 1, "ward": 2, "single": 3}
LEAST_MASS = 1e-6  # a smaller mass is raised to this fraction of the largest mass
# Tolerance for rounding when an error is compared with a limit, as a fraction of the
# error of a single group.
ERROR_ROUNDING = 1e-12
# Length of the scratch memory, in values of the size of a distance. Scratch memory is
# at the start of shared memory, before the clusters and the matrix.
LINKAGE_SCRATCH = 128
SLOT_BYTES = {width: 5 * width + 22 for width in (4, 8)}  # per cluster
TREE_BYTES = {width: 2 * width + 20 for width in (4, 8)}  # per token of a dendrogram
NEAREST_BYTES = {width: 2 * width for width in (4, 8)}  # per nearest cluster
# Single linkage. Its state has 8-byte words, reals and integers for each token. The
# other constants are the integers of its progress for each team of blocks, and the
# integers for each token while the rows of the dendrogram are written.
SINGLE_WORDS, SINGLE_REALS, SINGLE_INTEGERS = 2, 3, 8
SINGLE_PROGRESS, SINGLE_ROW_INTEGERS = 4, 3
# Contiguous groups: reals and integers for each token.
CONTIGUOUS_REALS, CONTIGUOUS_INTEGERS = 5, 3
BASIC_CONTIGUOUS_REALS, BASIC_CONTIGUOUS_INTEGERS = 3, 2

# The names of the constants in `definitions`: those that depend on the width of a real,
# and those that do not.
_BY_WIDTH = "LINKAGE_THREADS", "SLOT_BYTES", "TREE_BYTES", "NEAREST_BYTES"
_SAME = (
    "VECTOR_BYTES", "COUNTS", "TILE", "STEP_BYTES", "WIDE_STAGES", "SQUARE",
    "THREAD_TOKENS", "SELECTION_THREADS", "GROUP_THREADS", "SORT_THREADS",
    "MAX_HEAD_DIM", "ATTEND_ROWS", "ATTEND_KEYS", "NOISE_BITS", "STATE_VALUES",
    "EXTREMES", "QUERIES", "KEYS", "LEAST_MASS", "ERROR_ROUNDING", "LINKAGE_SCRATCH",
    "SINGLE_WORDS", "SINGLE_REALS", "SINGLE_INTEGERS", "SINGLE_PROGRESS",
    "SINGLE_ROW_INTEGERS", "CONTIGUOUS_REALS", "CONTIGUOUS_INTEGERS",
    "BASIC_CONTIGUOUS_REALS", "BASIC_CONTIGUOUS_INTEGERS",
)  # fmt: skip


def definitions(width: int) -> dict[str, int | float]:
    """Return the constants by their names in CUDA; `width` is the bytes of an acc_t."""
    here, numbered = globals(), ACTIVATIONS | LINKAGE_METHODS
    return {
        "BLOCK_THREADS": BLOCK,
        **{name: here[name] for name in _SAME},
        **{name: here[name][width] for name in _BY_WIDTH},
        # The kernels never name number 0, so it has no macro.
        **{name.upper(): x for name, x in numbered.items() if x},
    }

"""Sizes that Python and CUDA share: `compile.options` passes them to the kernels."""

WARP = 32  # threads that go in step
BLOCK = 256  # threads of a block, where a kernel does not say otherwise
COUNTS = 16  # arguments of `write_counts` in kernels/basic/counts.cu
# Of kernels/optimized/tiles.cuh: rows and columns of a tile, bytes of each row that are
# staged in a step, and the steps in shared memory of the widest tile.
TILE, STEP_BYTES, WIDE_STAGES = 128, 64, 4
THREAD_TOKENS = 4  # of a thread, in selection and in the saliency of layers
# Threads of a block, at most, in the kernels whose launch bounds these are; see
# `options`. Of linkages, by the bytes of a distance: as many as have the registers they
# need. A multiprocessor has one such block at a time, so that all of a launch can run.
SELECTION_THREADS = 1024
GROUP_THREADS = 1024
SORT_THREADS = 1024
LINKAGE_THREADS = {4: 512, 8: 384}
MAX_HEAD_DIM = 256  # of the transformer prior: a block keeps a head's sums
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}  # of linear maps

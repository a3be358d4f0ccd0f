"""The kernels of `perturbed_scores`: saliency plus Gumbel noise.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx). With `@optimized`, it runs a test with optimized kernels only.
The noise argument is (seed, number of the first sequence).
"""

import numpy as np
import pytest
from kernel_cases import SIZES, dtypes, mask_of, optimized, random

import qm_cupy as qm
from qm_cupy.stages.selection.perturbed_scores import perturbed_scores_cuda

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**64 - 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_has_the_same_bits(seed, dtype):
    """With saliency 0 the scores are the noise, with the bits of `gumbel_noise`."""
    # In the second case the number of the third sequence is 2³², which has 33 bits.
    for first in (5, 2**32 - 2):
        zeros = np.zeros((3, 33), dtype)
        got = perturbed_scores_cuda(zeros, (seed, first), None)
        wanted = qm.gumbel_noise((3, 33), seed, sequence_offset=first)
        np.testing.assert_array_equal(got, wanted)


@dtypes
@pytest.mark.parametrize("num_tokens", [*SIZES, 1000])
@optimized
def test_perturbed_scores_have_the_bits_of_the_basic_kernel(dtype, num_tokens):
    # A token needs the number of tokens before it. The block of a sequence counts them
    # together; in the basic kernel each thread counts them for its own token.
    saliency, mask = random((3, num_tokens), dtype), mask_of(3, num_tokens)
    got = perturbed_scores_cuda(saliency, (7, 5), mask)
    with qm.use_kernels("basic"):
        wanted = perturbed_scores_cuda(saliency, (7, 5), mask)
    np.testing.assert_array_equal(got, wanted)

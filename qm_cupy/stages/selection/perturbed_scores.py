"""Scores that select tokens: saliency s plus Gumbel noise g."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import rows_of
from ...cuda.constants import BLOCK, SELECTION_THREADS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from .gumbel_noise import gumbel_noise_reference, noise_arguments


def perturbed_scores_reference(
    saliency: NDArray[Any],
    noise: tuple[int | None, int],
    mask: NDArray[np.bool_] | None,
) -> NDArray[Any]:
    """Return s + g (B, N), in float32 at least."""
    # A float16 sum would keep only 11 bits of the noise.
    scores = saliency.astype(np.result_type(saliency, np.float32))
    return scores + _by_rank(gumbel_noise_reference(saliency.shape, *noise), mask)


def _by_rank(
    noise: NDArray[np.float32], mask: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Give the n-th token of a sequence draw n, for any position of the padding."""
    if mask is None:
        return noise
    # The rank of a token is the number of tokens before it. Padding gets a rank too,
    # but its score is not used.
    rank = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    return np.take_along_axis(noise, rank, axis=-1)


def perturbed_scores_cuda(
    saliency: Any, noise: tuple[int | None, int], mask: Any
) -> Any:
    """Return s + g (B, N); padding gets -inf, below every token."""
    batch, num_tokens = rows_of(saliency)
    out = empty(saliency.shape, accumulation_dtype(saliency.dtype))
    arrays = contiguous(saliency), contiguous(mask)
    args = (*arrays, batch, num_tokens, *noise_arguments(noise), out)
    # With both noise and padding, the block of a sequence counts tokens together to get
    # their ranks. Otherwise the work is elementwise, and the basic kernel does it.
    counting = mask is not None and noise[0] is not None
    launch(
        "gumbel_softmax",
        "perturbed_scores",
        saliency.dtype,
        args,
        outputs=out.size,
        blocks=batch,
        block=block_size(num_tokens, SELECTION_THREADS, BLOCK),
        kernels=None if counting else "basic",
    )
    return out

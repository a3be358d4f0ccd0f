"""Scores that select tokens: saliency plus noise."""

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
    scores = saliency.astype(np.result_type(saliency, np.float32))
    return scores + _by_rank(gumbel_noise_reference(saliency.shape, *noise), mask)


def _by_rank(
    noise: NDArray[np.float32], mask: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Give token number n of a sequence draw n, wherever its padding lies."""
    if mask is None:
        return noise
    rank = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    return np.take_along_axis(noise, rank, axis=-1)


def perturbed_scores_cuda(
    saliency: Any, noise: tuple[int | None, int], mask: Any
) -> Any:
    batch, num_tokens = rows_of(saliency)
    out = empty(saliency.shape, accumulation_dtype(saliency.dtype))
    arrays = contiguous(saliency), contiguous(mask)
    args = (*arrays, batch, num_tokens, *noise_arguments(noise), out)
    counting = mask is not None and noise[0] is not None  # draw n is the n-th token's
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

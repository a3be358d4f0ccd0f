"""Scores that select tokens: saliency s plus Gumbel noise g, of shape (N,) or (B, N).

N is the number of tokens in a sequence; B is the number of sequences. `noise` is a pair
(seed, sequence offset); without a seed, g = 0 (gumbel_noise.py).
"""

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
    """Return s + g (B, N), in float32 at least.

    Padding keeps a finite score here. The functions that read the scores replace it by
    -inf.
    """
    # A sum in float16 would keep only 11 bits of the noise.
    scores = saliency.astype(np.result_type(saliency, np.float32))
    return scores + _by_rank(gumbel_noise_reference(saliency.shape, *noise), mask)


def _by_rank(
    noise: NDArray[np.float32], mask: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Return the noise (B, N) in which token n of a sequence has column n of `noise`.

    n counts tokens from 0, without padding. So a token has the same noise wherever the
    padding is.
    """
    if mask is None:
        return noise
    # The rank of a token is the number of tokens before it. Padding gets the rank of
    # the last token before it (0 if there is none); its score is not used.
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
    # With noise and padding, the kernel needs the rank of each token: the number of
    # tokens before this token. In the optimized kernel, the threads of a block count
    # the tokens of a sequence together. Without noise or without padding, the work is
    # elementwise, and the basic kernel has a thread for each token.
    needs_ranks = mask is not None and noise[0] is not None
    launch(
        "gumbel_softmax",
        "perturbed_scores",
        saliency.dtype,
        args,
        outputs=out.size,
        blocks=batch,
        # A thread for each token of the sequence, up to SELECTION_THREADS.
        block=block_size(num_tokens, SELECTION_THREADS, BLOCK),
        kernels=None if needs_ranks else "basic",
    )
    return out

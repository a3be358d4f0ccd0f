"""Saliency, selection probabilities and mass from entropies, in one launch."""

from typing import Any

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import layer_axes
from ...cuda.constants import BLOCK, SELECTION_THREADS, THREAD_TOKENS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from ..saliency.saliency import saliency_cuda
from .gumbel_noise import noise_arguments
from .gumbel_softmax import softmax_mass_cuda

ENTROPIES_OF_A_BLOCK = 1 << 15  # limit of L·H·N, derived in _one_launch


def saliency_gumbel_mass_cuda(
    entropy: Any,
    salient: str,
    temperature: float,
    noise: tuple[int | None, int],
    epsilon: float,
    mask: Any,
) -> tuple[Any, Any, Any]:
    """Return saliency, π and mass, each (B, N), of entropies (..., N)."""
    *leading, num_tokens = entropy.shape
    layers, batch, heads = layer_axes(leading)
    if not _one_launch(layers, heads, num_tokens):
        # Three launches with the same bits: two for the saliency, one for the rest.
        scores = saliency_cuda(entropy, salient, mask).reshape(batch, num_tokens)
        return scores, *softmax_mass_cuda(scores, temperature, noise, epsilon, mask)
    acc_dtype = accumulation_dtype(entropy.dtype)
    # Saliency, π and mass.
    outs = [empty((batch, num_tokens), acc_dtype) for _ in range(3)]
    arrays = contiguous(entropy), contiguous(mask)
    sizes = layers, batch, heads, num_tokens
    options = int(salient == "high"), temperature, *noise_arguments(noise), epsilon
    args = (*arrays, *sizes, *options, *outs)
    kernel = "gumbel_softmax", "saliency_gumbel_mass"
    # One block for each sequence, with a thread for each token up to the limit.
    block = block_size(num_tokens, SELECTION_THREADS, BLOCK)
    launch(*kernel, entropy.dtype, args, blocks=batch, block=block)
    return outs[0], outs[1], outs[2]


def _one_launch(layers: int, heads: int, num_tokens: int) -> bool:
    """Return True if one block for each sequence should do all the work in one launch.

    The block reads L·H·N entropies twice, 4 bytes each, at about 50 bytes a cycle: 0.16
    L·H·N cycles. The other way takes two more launches, about 5,000 cycles, but the
    blocks of all multiprocessors read: it is faster from L·H·N = 32,768 on.
    """
    # The block keeps the scores of all its tokens in registers.
    held = num_tokens <= THREAD_TOKENS * SELECTION_THREADS
    return held and layers * heads * num_tokens <= ENTROPIES_OF_A_BLOCK

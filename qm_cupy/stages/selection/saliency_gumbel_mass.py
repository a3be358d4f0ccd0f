"""Saliency, selection probabilities and mass from entropies, in one launch or three.

The input is the entropies (L, B, H, N) of L layers, B sequences, H heads and N tokens.
The results are the saliency s (saliency.py), the selection probabilities π
(gumbel_softmax.py) and the mass m = π s + (1 - π) ε (saliency_mass.py), each (B, N).
"""

from typing import Any

from ...arrays.dtypes import accumulation_dtype
from ...arrays.shapes import layer_axes
from ...cuda.constants import BLOCK, SELECTION_THREADS, THREAD_TOKENS
from ...cuda.device import empty
from ...cuda.launch import block_size, contiguous, launch
from ..saliency.saliency import saliency_cuda
from .gumbel_noise import noise_arguments
from .gumbel_softmax import softmax_mass_cuda

# Largest L·H·N, the entropies of a sequence, for which one block does all the work. The
# docstring of `_one_launch` derives it.
ENTROPIES_OF_A_BLOCK = 1 << 15


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
        # Three launches give the same bits: two for the saliency, one for π and mass.
        scores = saliency_cuda(entropy, salient, mask).reshape(batch, num_tokens)
        return scores, *softmax_mass_cuda(scores, temperature, noise, epsilon, mask)
    acc_dtype = accumulation_dtype(entropy.dtype)
    # Saliency, π and mass
    outs = [empty((batch, num_tokens), acc_dtype) for _ in range(3)]
    arrays = contiguous(entropy), contiguous(mask)
    sizes = layers, batch, heads, num_tokens
    options = int(salient == "high"), temperature, *noise_arguments(noise), epsilon
    args = (*arrays, *sizes, *options, *outs)
    kernel = "gumbel_softmax", "saliency_gumbel_mass"
    # A block for each sequence, with a thread for each token up to SELECTION_THREADS.
    block = block_size(num_tokens, SELECTION_THREADS, BLOCK)
    launch(*kernel, entropy.dtype, args, blocks=batch, block=block)
    return outs[0], outs[1], outs[2]


def _one_launch(layers: int, heads: int, num_tokens: int) -> bool:
    """Return True if one block for each sequence should do all the work in one launch.

    The block reads its L·H·N entropies of 4 bytes twice, at about 50 bytes per cycle:
    0.16 L·H·N cycles. Three launches cost about 5,000 cycles more than one launch, but
    several blocks read the entropies of a sequence at the same time, each on its own
    multiprocessor. Three launches are faster above L·H·N = 32,768, where 0.16 L·H·N is
    about 5,000.
    """
    # The block keeps the scores of all its tokens in registers.
    fits_registers = num_tokens <= THREAD_TOKENS * SELECTION_THREADS
    return fits_registers and layers * heads * num_tokens <= ENTROPIES_OF_A_BLOCK

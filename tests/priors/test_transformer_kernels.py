"""The kernels of the transformer prior, run by an interpreter on the CPU.

`learned` is the number of learned positions, or None for rotary positions.
"""

import numpy as np
import oracle
import pytest
from conftest import assert_close
from kernel_cases import SIZES, dtypes, random
from oracle_arrays import softmax

import qm_cupy as qm
from qm_cupy.priors import attention

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@pytest.mark.parametrize("num_tokens", [n for n in SIZES if n in (1, 32, 33, 129)])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("learned", [None, 300])
def test_transformer_prior(dtype, num_tokens, norm, learned):
    """129 tokens need two tiles of rows, and all warps of a block for their keys.

    For one token, the linear layers use one warp for each output.
    """
    # Widths of a head that are not multiples of the 32 lanes of a warp.
    heads, width = (2, 6) if num_tokens == 33 else (1, 40)
    prior = qm.TransformerPrior.init(
        5, hidden_dim=heads * width, num_heads=heads, num_layers=1, mlp_dim=7,
        norm=norm, num_positions=learned,
    )  # fmt: skip
    rng = np.random.default_rng(num_tokens)
    tokens = random((2, num_tokens, 5), dtype)
    counts = np.array(
        [num_tokens, -(-num_tokens // 2)]
    )  # half of sequence 1 is padding
    positions = np.sort(rng.choice(300, (2, num_tokens)), axis=-1)
    sizes = rng.integers(0, 4, (2, num_tokens))  # 0: not attended to
    for reverse in (False, True):
        got = prior.predict(
            tokens, reverse=reverse, num_groups=counts, positions=positions, sizes=sizes
        )
        weights = prior.backward if reverse else prior.forward
        for b, count in enumerate(counts):
            inputs = tokens[b, :count].astype(np.float64), weights, heads, reverse
            wanted = oracle.transformer(*inputs, positions[b, :count], sizes[b, :count])
            assert_close(got[b, :count], wanted, dtype)


@dtypes
@pytest.mark.parametrize("learned", [None, 200])
def test_transformer_prior_steps(dtype, learned):
    """A new cache has memory for 16 tokens, so it grows. Positions are int32."""
    prior = qm.TransformerPrior.init(
        5, hidden_dim=12, num_heads=3, num_layers=2, num_positions=learned
    )
    tokens = random((2, 19, 5), dtype)
    sizes, state = np.arange(38).reshape(2, 19) % 4, None
    positions = 3 * np.arange(38, dtype=np.int32).reshape(2, 19)  # with gaps
    wanted = prior.predict(tokens, positions=positions, sizes=sizes)
    # Steps add in another order than one pass, so results agree within the tolerance.
    for t in range(19):
        options = {"position": positions[:, t], "size": sizes[:, t]}
        got, state = prior.step(tokens[:, t], state, **options)
        assert_close(got, wanted[:, t], dtype)


@dtypes
def test_attention_to_more_keys_than_a_block_has_threads(dtype):
    """The kernel rescales its sums if a later key has a higher score.

    A block of 256 threads needs three passes for 600 keys: one query after 599 cached
    tokens. Keys grow with their index, so the maximum score rises in each pass.
    """
    query, keys, values = (
        random((1, 1, 2, 16), dtype, 1),
        random((1, 2, 640, 16), dtype, 2, np.arange(640)[:, None] / 320),
        random((1, 2, 640, 16), dtype, 3),
    )
    span = attention.Span(None, None, np.ones(1, int), 599, False)
    got = attention.attend_cuda(query, keys, values, span)
    # softmax(q · k / √d) v with d = 16, so √d is 4.
    q, k, v = (x.astype(np.float64) for x in (query, keys[:, :, :600], values))
    p = softmax((q[:, 0, :, None] @ np.swapaxes(k, -1, -2))[:, :, 0] / 4)
    assert_close(got[:, 0], (p[:, :, None] @ v[:, :, :600])[:, :, 0], dtype, "stored")

"""The kernels of `alignment_loss` and of its gradient, run by an interpreter."""

import numpy as np
import oracle
import oracle_arrays
import pytest
from conftest import assert_close
from kernel_cases import counted, counts_of, dtypes, random
from seam import cuda
from vjp_cases import VJP_SIZES, alignment_of, assert_gradient, wide

import qm_cupy as qm
from qm_cupy.stages.alignment.alignment_loss import alignment_loss_vjp_reference

pytestmark = pytest.mark.usefixtures("kernels")


# 33 is one more than a warp, and 129 is one more than a tile of 128 rows.
@dtypes
@pytest.mark.parametrize("num_groups", [1, 2, 33, 129])
@counted
def test_alignment(dtype, num_groups, counted):
    batch, dim = 3, 37  # 37 is not a multiple of a warp or a 16-byte vector
    merged = random((batch, num_groups, dim), dtype)
    counts = counts_of(counted, batch, num_groups)
    prior = qm.MLPPrior.init(dim, hidden_dim=50)
    valid = None if counted == "all" else counts
    losses = qm.alignment_loss(merged, prior, num_groups=valid)
    mlps = prior.forward, prior.backward
    networks = [lambda x, mlp=mlp: oracle_arrays.mlp(x, *mlp) for mlp in mlps]
    wanted = [
        oracle.alignment_losses(x[:count], *networks)
        for x, count in zip(merged, counts, strict=True)
    ]
    for reverse, network in enumerate(networks):
        predicted = prior.predict(merged, reverse=bool(reverse), num_groups=valid)
        for b, count in enumerate(counts):
            x = merged[b, :count].astype(np.float64)
            # Row t reads the mean of tokens 1..t, or of tokens t..K in reverse.
            parts = [x[t:] if reverse else x[: t + 1] for t in range(count)]
            y = network(np.stack([part.mean(0) for part in parts]))
            assert_close(predicted[b, :count], y, dtype)
            assert_close(losses[reverse][b], wanted[b][reverse], dtype)
    np.testing.assert_array_equal(losses.total, losses.forward + losses.backward)


@dtypes
@pytest.mark.parametrize("num_groups", [n for n in VJP_SIZES if n < 257])
@counted
def test_alignment_loss_vjp(dtype, num_groups, counted):
    gradient, merged, prior = alignment_of(num_groups, dtype)
    counts = counts_of(counted, 3, num_groups)
    merged[1, counts[1] :] = np.nan  # padding must not be read
    got = qm.alignment_loss_vjp(
        gradient, merged, prior, num_groups=None if counted == "all" else counts
    )
    forward, backward, total = map(wide, gradient)
    # total = forward + backward, so the gradient of the total is added to both.
    gradients_of_both = forward + total, backward + total
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter takes NumPy arrays for arrays of a GPU. The reference must
        # take them for arrays of the CPU.
        patch.setattr(cuda, "is_cuda", lambda x: False)
        wanted = alignment_loss_vjp_reference(
            gradients_of_both, wide(merged), prior, counts
        )
    assert_gradient(got[0], wanted[0], dtype)
    assert not got[0][np.arange(num_groups) >= counts[:, None]].any()  # padding
    acc_dtype = cuda.accumulation_dtype(dtype)
    for mlp, truth in zip(got[1], wanted[1], strict=True):
        for x, y in zip(mlp, truth, strict=True):
            assert_gradient(x, y, dtype, acc_dtype)

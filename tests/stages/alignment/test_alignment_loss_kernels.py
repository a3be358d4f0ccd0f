"""The kernels of `alignment_loss` and of its gradient, interpreted."""

import numpy as np
import oracle
import oracle_arrays
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
from seam import cuda
from vjp_cases import VJP_SIZES, alignment_of, assert_gradient, ragged, wide

import qm_cupy as qm
from qm_cupy.stages.alignment.alignment_loss import alignment_loss_vjp_reference

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
@pytest.mark.parametrize("num_groups", [1, 2, 33, 129])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_alignment(dtype, num_groups, ragged):
    batch, dim = 3, 37
    merged = random((batch, num_groups, dim), dtype)
    counts = np.array([num_groups, max(num_groups // 2, 1), 1])
    if not ragged:
        counts[:] = num_groups
    prior = qm.MLPPrior.init(dim, hidden_dim=50)
    valid = counts if ragged else None
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
            parts = [x[t:] if reverse else x[: t + 1] for t in range(count)]
            y = network(np.stack([part.mean(0) for part in parts]))
            assert_close(predicted[b, :count], y, dtype)  # each token at its own row
            assert_close(losses[reverse][b], wanted[b][reverse], dtype)
    np.testing.assert_array_equal(losses.total, losses.forward + losses.backward)


@dtypes
@pytest.mark.parametrize("num_groups", [n for n in VJP_SIZES if n < 257])
@ragged
def test_alignment_loss_vjp(dtype, num_groups, ragged):
    gradient, merged, prior = alignment_of(num_groups, dtype)
    counts = np.full(3, num_groups)
    if ragged:
        counts[1:] = (num_groups + 1) // 2, 1
        merged[1, counts[1] :] = np.nan  # is not read
    got = qm.alignment_loss_vjp(
        gradient, merged, prior, num_groups=counts if ragged else None
    )
    ahead, behind, total = map(wide, gradient)
    each = ahead + total, behind + total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "is_cuda", lambda x: False)
        wanted = alignment_loss_vjp_reference(each, wide(merged), prior, counts)
    assert_gradient(got[0], wanted[0], dtype)
    assert not got[0][np.arange(num_groups) >= counts[:, None]].any()
    kind = cuda.accumulation_dtype(dtype)
    for mlp, truth in zip(got[1], wanted[1], strict=True):
        for x, y in zip(mlp, truth, strict=True):
            assert_gradient(x, y, dtype, kind)

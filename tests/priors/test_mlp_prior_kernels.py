"""The kernels of `mlp_prior`, interpreted."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
from seam import cuda

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
def test_predictions_from_what_is_not_a_number(dtype):
    """Inputs are not checked on a GPU: what has read a NaN is NaN, and nothing else."""
    merged = random((2, 6, 9), dtype)
    merged[0, 2, 4] = np.nan
    got = qm.MLPPrior.init(9, hidden_dim=5).predict(merged)
    assert np.isnan(got[0, 2:]).all()
    assert np.isfinite(got[0, :2]).all()
    assert np.isfinite(got[1]).all()


def test_weights_of_a_prior_are_uploaded_once(monkeypatch):
    uploads, to_device = [], cuda.to_device

    def counted(x):
        uploads.append(x)
        return to_device(x)

    monkeypatch.setattr(cuda, "to_device", counted)
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    prior.predict(random((2, 6, 9), np.float32))
    assert len(uploads) == 4  # of the one network that was asked
    first = qm.alignment_loss(random((2, 6, 9), np.float32), prior)
    assert len(uploads) == 8
    for dtype in (np.float32, np.float16):  # both compute in float32
        again = qm.alignment_loss(random((2, 6, 9), dtype), prior)
    assert len(uploads) == 8
    assert_close(again.total, first.total, np.float16, "stored")
    qm.alignment_loss(random((2, 6, 9), np.float64), prior)
    assert len(uploads) == 16

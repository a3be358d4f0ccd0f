"""The kernels of the MLP prior, run by an interpreter on the CPU."""

import numpy as np
import pytest
from conftest import assert_close
from kernel_cases import dtypes, random
from seam import cuda

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


@dtypes
def test_only_predictions_that_read_a_nan_are_nan(dtype):
    """A GPU does not check inputs. A NaN must not spread to other predictions.

    Token 3 of sequence 0 has a NaN. Row t of the predictions reads tokens 1..t, so rows
    1 and 2 do not read the NaN.
    """
    merged = random((2, 6, 9), dtype)
    merged[0, 2, 4] = np.nan
    got = qm.MLPPrior.init(9, hidden_dim=5).predict(merged)
    assert np.isnan(got[0, 2:]).all()
    assert np.isfinite(got[0, :2]).all()
    assert np.isfinite(got[1]).all()


def test_weights_are_copied_to_the_gpu_once(monkeypatch):
    uploads, to_device = [], cuda.to_device

    def counted(x):
        uploads.append(x)
        return to_device(x)

    monkeypatch.setattr(cuda, "to_device", counted)
    prior = qm.MLPPrior.init(9, hidden_dim=5)
    prior.predict(random((2, 6, 9), np.float32))
    assert len(uploads) == 4  # the weights of the forward network
    first = qm.alignment_loss(random((2, 6, 9), np.float32), prior)
    assert len(uploads) == 8  # and the weights of the backward network
    for dtype in (np.float32, np.float16):  # both compute in float32
        again = qm.alignment_loss(random((2, 6, 9), dtype), prior)
    assert len(uploads) == 8
    assert_close(again.total, first.total, np.float16, "stored")
    # float64 tokens need weights in float64, of both networks.
    qm.alignment_loss(random((2, 6, 9), np.float64), prior)
    assert len(uploads) == 16

import numpy as np
import pytest
from conftest import assert_close
from differences import assert_slope

import qm_cupy as qm


@pytest.fixture
def inputs(rng):
    """Gradient and saliency (2, 9)."""
    return rng.standard_normal((2, 9)), rng.random((2, 9))


class TestSaliencyMass:
    @pytest.mark.parametrize("epsilon", [0.0, 0.3])
    def test_differences(self, inputs, rng, epsilon):
        gradient, saliency = inputs
        p = rng.random((2, 9))
        options = {"epsilon": epsilon}
        got = qm.saliency_mass_vjp(gradient, saliency, p, **options)
        # The mass is linear in each argument, so differences are exact up to rounding.
        assert_slope(
            got[0],
            lambda s: (gradient * qm.saliency_mass(s, p, **options)).sum(),
            saliency,
        )
        assert_slope(
            got[1],
            lambda p: (gradient * qm.saliency_mass(saliency, p, **options)).sum(),
            p,
        )

    def test_each_in_its_dtype(self, inputs):
        """A gradient of another float dtype is converted."""
        gradient, saliency = inputs
        dtypes = np.float16, np.float32, np.float64
        arrays = (
            x.astype(dtype)
            for x, dtype in zip((gradient, saliency, saliency), dtypes, strict=True)
        )
        by_saliency, by_probability = qm.saliency_mass_vjp(*arrays)
        assert by_saliency.dtype == np.float32
        assert by_probability.dtype == np.float64
        # The gradient was rounded to float16 on its way in.
        assert_close(by_saliency, gradient * saliency, "float16", "stored")

    def test_bad_input(self, inputs):
        gradient, saliency = inputs
        with pytest.raises(ValueError, match="`gradient` must have shape"):
            qm.saliency_mass_vjp(gradient[0], saliency, saliency)
        with pytest.raises(ValueError, match="`probabilities` must have shape"):
            qm.saliency_mass_vjp(gradient, saliency, saliency[0])
        # A negative ε would give negative mass.
        with pytest.raises(ValueError, match="`epsilon` must lie in"):
            qm.saliency_mass_vjp(gradient, saliency, saliency, epsilon=-1)

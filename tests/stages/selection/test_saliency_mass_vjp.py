"""`saliency_mass_vjp`: finite differences, dtypes and checks.

The mass is m = π s + (1 - π) ε, with the saliency s, the selection probabilities π and
the weight ε of background tokens.
"""

import numpy as np
import pytest
from conftest import assert_close
from differences import assert_slope

import qm_cupy as qm


@pytest.fixture
def inputs(rng):
    """Gradient with respect to the mass, and saliency, each (2, 9)."""
    return rng.standard_normal((2, 9)), rng.random((2, 9))


class TestSaliencyMassVjp:
    @pytest.mark.parametrize("epsilon", [0.0, 0.3])
    def test_matches_finite_differences(self, inputs, rng, epsilon):
        gradient, saliency = inputs
        p = rng.random((2, 9))
        options = {"epsilon": epsilon}
        got = qm.saliency_mass_vjp(gradient, saliency, p, **options)
        # The mass is linear in s and in π, so differences are exact up to rounding.
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

    def test_each_gradient_has_the_dtype_of_its_argument(self, inputs):
        """The gradient of the loss may have another float dtype."""
        gradient, saliency = inputs
        dtypes = np.float16, np.float32, np.float64
        arrays = (
            x.astype(dtype)
            for x, dtype in zip((gradient, saliency, saliency), dtypes, strict=True)
        )
        s_gradient, p_gradient = qm.saliency_mass_vjp(*arrays)
        assert s_gradient.dtype == np.float32
        assert p_gradient.dtype == np.float64
        # Here π is the saliency, so s̄ = m̄ π. m̄ was rounded to float16 above.
        assert_close(s_gradient, gradient * saliency, "float16", "stored")

    def test_wrong_arguments_are_refused(self, inputs):
        gradient, saliency = inputs
        with pytest.raises(ValueError, match="`gradient` must have shape"):
            qm.saliency_mass_vjp(gradient[0], saliency, saliency)
        with pytest.raises(ValueError, match="`probabilities` must have shape"):
            qm.saliency_mass_vjp(gradient, saliency, saliency[0])
        # A negative ε would give negative mass.
        with pytest.raises(ValueError, match="`epsilon` must lie in"):
            qm.saliency_mass_vjp(gradient, saliency, saliency, epsilon=-1)

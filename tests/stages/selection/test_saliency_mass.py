"""`saliency_mass` compared with the oracle (oracle.py: plain float64 loops)."""

import oracle
from conftest import assert_close

import qm_cupy as qm


def test_saliency_mass_matches_the_oracle(rng, dtype):
    # m = π s + (1 - π) ε, for saliency s and selection probabilities π
    saliency, probabilities = rng.random((2, 7)).astype(dtype)
    got = qm.saliency_mass(saliency, probabilities, epsilon=0.25)
    assert_close(got, oracle.saliency_mass(saliency, probabilities, 0.25), dtype)

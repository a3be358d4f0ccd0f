"""The fidelity loss: against the oracle, and as the mean excess over the bound."""

import numpy as np
import oracle
from conftest import assert_close

import qm_cupy as qm


def test_fidelity_loss_against_the_oracle(rng):
    tokens = rng.standard_normal((3, 12, 4))
    merged = qm.merge_tokens(tokens, qm.cluster_tokens(tokens, 4), 4)
    for gamma in (0.0, 0.5, 0.8, 1.0):
        got = qm.fidelity_loss(tokens, merged, gamma=gamma)
        assert got.shape == ()
        assert_close(got, oracle.fidelity_loss(tokens, merged, gamma))


def test_fidelity_loss_is_the_mean_excess_over_the_bound(rng):
    tokens = rng.standard_normal((2, 12, 4))
    labels = qm.cluster_tokens(tokens, 4)
    merged = qm.merge_tokens(tokens, labels, 4)
    error = qm.reconstruction_error(tokens, merged, labels=labels)
    wanted = np.maximum(error - 0.04, 0).mean()  # (1 - γ)² with γ = 0.8
    assert_close(qm.fidelity_loss(tokens, merged, labels=labels), wanted)
    # N groups of one token each lose nothing.
    assert qm.fidelity_loss(tokens, tokens, labels=np.tile(np.arange(12), (2, 1))) == 0

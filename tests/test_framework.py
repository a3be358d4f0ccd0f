"""The paper's README, block by block and claim by claim, on every array library.

Each block of its code must run with the paper's class names and give sensible results.
"""

import math

import numpy as np
import pytest
from conftest import to_library, to_numpy

from qm_cupy import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    MLPPrior,
    NormBasedFidelityConstraint,
    QuickMergePP,
    alignment_loss,
    cosine_similarity,
    decode,
    fidelity_loss,
    gumbel_softmax,
    quickmerge,
    quickmerge_inference,
    reconstruction_error,
    saliency,
    self_attention_entropy,
)


# The README's own sizes: 2 sequences of 100 tokens of width 512.
@pytest.fixture
def X(library, rng):  # noqa: N802 - the README's own name
    return to_library(library, rng.standard_normal((2, 100, 512)).astype(np.float32))


@pytest.fixture
def saliency_scores(X):
    return EntropyAwareSaliency(embedding_dim=512, num_layers=12)(X)


def test_quick_start(X):
    embedding_dim = 512
    quickmerge = QuickMergePP(embedding_dim=embedding_dim)
    target_tokens = 20
    merged_tokens, losses = quickmerge(X, target_tokens)
    assert type(merged_tokens) is type(X)
    assert tuple(merged_tokens.shape) == (2, 20, 512)  # (B, K, D)
    assert set(losses) == {"ar_alignment", "fidelity", "total"}
    assert all(isinstance(loss, float) for loss in losses.values())
    # The paper's total: alpha = 0.1 of the alignment loss, and the fidelity loss.
    total = 0.1 * losses["ar_alignment"] + losses["fidelity"]
    assert losses["total"] == pytest.approx(total)
    # Untrained priors predict badly, so the loss cannot be 0.
    assert losses["ar_alignment"] > 0


def test_saliency_block(X, saliency_scores):
    assert type(saliency_scores) is type(X)
    assert tuple(saliency_scores.shape) == (2, 100)
    scores = np.asarray(saliency_scores)
    # Min-max normalisation per sequence: both ends are reached exactly.
    np.testing.assert_array_equal(scores.min(axis=-1), [0, 0])
    np.testing.assert_array_equal(scores.max(axis=-1), [1, 1])


def test_merging_block(X, saliency_scores):
    token_merger = DifferentiableTokenMerging(temperature=0.1, epsilon=0.01)
    merged_tokens, mask = token_merger(X, saliency_scores, K=20)
    assert tuple(merged_tokens.shape) == (2, 20, 512)
    # The mask contains the probabilities of a softmax, which sum to 1.
    np.testing.assert_allclose(np.asarray(mask).sum(axis=-1), [1, 1], rtol=1e-6)


def test_alignment_block(X):
    ar_alignment = BidirectionalARAlignment(embedding_dim=512)
    alignment_loss = ar_alignment.compute_alignment_loss(X)
    directions = ar_alignment.forward_loss(X) + ar_alignment.backward_loss(X)
    assert float(alignment_loss) == pytest.approx(float(directions))


def test_fidelity_block(X):
    fidelity_constraint = NormBasedFidelityConstraint(gamma=0.8)
    merged_tokens = quickmerge(X, 20).tokens
    fidelity_loss = fidelity_constraint.compute_fidelity_loss(X, merged_tokens)
    error = np.asarray(reconstruction_error(X, merged_tokens))
    # (1 - gamma)^2 = 0.2^2. Random tokens have a far larger error, so max(0,
    # ...) is the difference itself.
    assert float(fidelity_loss) == pytest.approx(np.mean(error - 0.2**2), rel=1e-5)
    assert float(fidelity_constraint.compute_fidelity_loss(X, X)) == 0  # exact


@pytest.mark.slow("JAX compiles its operations, one by one")
def test_inference_pipeline(X):
    X_single = X[0, ...]  # noqa: N806
    merged_tokens, predictions = quickmerge_inference(
        # 20 % of 100 tokens. The "model" doubles its input, so its output is known.
        X_single,
        lambda prefix: prefix * 2,
        entropy_budget=0.2,
    )
    assert type(predictions) is type(X)
    assert tuple(merged_tokens.shape) == tuple(predictions.shape) == (20, 512)
    np.testing.assert_array_equal(
        np.asarray(predictions), 2 * np.asarray(merged_tokens)
    )
    # No model, no predictions.
    alone, nothing = quickmerge_inference(X_single, None, entropy_budget=0.2)
    np.testing.assert_array_equal(np.asarray(alone), np.asarray(merged_tokens))
    assert len(nothing) == 0


# Copied from the paper as printed, including the trailing space.
PAPER = """
import torch
from quickmerge import QuickMergePP

# Initialize QuickMerge++
embedding_dim = 512
quickmerge = QuickMergePP(embedding_dim=embedding_dim)

# Input embeddings [batch_size, num_tokens, embedding_dim]
X = torch.randn(2, 100, 512)
target_tokens = 20

# Compress tokens
merged_tokens, losses = quickmerge(X, target_tokens)
print(f"Compressed from {X.shape[1]} to {merged_tokens.shape[1]} tokens")

from quickmerge import EntropyAwareSaliency

saliency_estimator = EntropyAwareSaliency(embedding_dim=512, num_layers=12)
saliency_scores = saliency_estimator(X)  # [B, N]

from quickmerge import DifferentiableTokenMerging

token_merger = DifferentiableTokenMerging(temperature=0.1, epsilon=0.01)
merged_tokens, mask = token_merger(X, saliency_scores, K=20)

from quickmerge import BidirectionalARAlignment

ar_alignment = BidirectionalARAlignment(embedding_dim=512)
alignment_loss = ar_alignment.compute_alignment_loss(merged_tokens)

from quickmerge import NormBasedFidelityConstraint

fidelity_constraint = NormBasedFidelityConstraint(gamma=0.8)
fidelity_loss = fidelity_constraint.compute_fidelity_loss(X, merged_tokens)

from quickmerge import quickmerge_inference

# Single sequence inference
X_single = torch.randn(100, 512)  # [N, D]
ar_model = YourARModel()  # Your autoregressive model

merged_tokens, predictions = quickmerge_inference(
    X_single, 
    ar_model, 
    entropy_budget=0.2  # Compress to 20% of original tokens
)
"""  # noqa: W291 - as it was printed


def test_the_code_blocks_of_the_paper_on_torch(capsys):
    torch = pytest.importorskip("torch")
    names = {"YourARModel": lambda: torch.nn.Linear(512, 7)}
    # The import name is the only difference.
    exec(PAPER.replace("from quickmerge", "from qm_cupy"), names)
    assert capsys.readouterr().out == "Compressed from 100 to 20 tokens\n"
    results = "saliency_scores", "merged_tokens", "mask", "predictions"
    assert all(isinstance(names[name], torch.Tensor) for name in results)
    assert names["saliency_scores"].shape == names["mask"].shape == (2, 100)
    assert names["merged_tokens"].shape == (20, 512)
    for name in ("alignment_loss", "fidelity_loss"):
        assert names[name].shape == ()
    assert names["predictions"].shape == (20, 7)
    assert not names["predictions"].requires_grad  # though the model's weights do
    # The predictions are those of the model on the merged tokens.
    wanted = names["ar_model"](names["merged_tokens"]).detach()
    torch.testing.assert_close(names["predictions"], wanted)


def test_a_model_of_batches():
    torch = pytest.importorskip("torch")
    merged, model = torch.ones(2, 5, 8), torch.nn.Linear(8, 3)
    assert decode(merged, model).shape == (2, 5, 3)
    assert torch.is_grad_enabled()  # `decode` has switched it off and on again


OPTIONS = {
    "temperature": 2.0,
    "epsilon": 0.3,
    "method": "ward",
    "order": "first",
    "seed": 5,
}


def paper(tokens, num_groups, seed=0, **options):
    """Call `quickmerge` with the weights, the method and the noise of the paper."""
    options = {"method": "average", "weights": "mass", "noise_seed": seed} | options
    return quickmerge(tokens, num_groups, **options)


class TestOptions:
    """Each option reaches the stage that it belongs to."""

    @pytest.fixture
    def tokens(self, rng):
        return rng.standard_normal((2, 30, 8))

    @pytest.mark.parametrize("name", OPTIONS)
    def test_each_option_matters(self, tokens, name):
        # All options but one: the default of that one must give another result.
        others = {option: OPTIONS[option] for option in OPTIONS if option != name}
        whole, part = paper(tokens, 6, **OPTIONS), paper(tokens, 6, **others)
        assert not np.allclose(whole.tokens, part.tokens)

    # The class calls `quickmerge` with its options: results are equal bit for bit.
    def test_options_of_token_merging(self, tokens, rng):
        scores = rng.random((2, 30))
        merger = DifferentiableTokenMerging(**OPTIONS)
        wanted = paper(tokens, 6, saliency=scores, **OPTIONS)
        for got, field in zip(merger.merge(tokens, scores, 6), wanted, strict=True):
            np.testing.assert_array_equal(got, field)
        merged, probabilities = merger(tokens, scores, 6)
        np.testing.assert_array_equal(merged, wanted.tokens)
        np.testing.assert_array_equal(
            probabilities, gumbel_softmax(scores, temperature=2.0, seed=5)
        )

    def test_options_of_the_whole_model(self, tokens):
        model = QuickMergePP(embedding_dim=8, gamma=0.9, **OPTIONS)
        merged, losses = model(tokens, 6)
        wanted = paper(tokens, 6, **OPTIONS)
        np.testing.assert_array_equal(merged, wanted.tokens)
        np.testing.assert_array_equal(model.inference(tokens, 6)[0], wanted.tokens)
        # The seed also draws the weights of the model's prior.
        alignment = alignment_loss(merged, MLPPrior.init(8, seed=5)).total
        assert losses["ar_alignment"] == pytest.approx(alignment.mean())
        fidelity = fidelity_loss(tokens, merged, labels=wanted.labels, gamma=0.9)
        assert losses["fidelity"] == pytest.approx(float(fidelity))

    def test_mask_and_k_per_sequence(self, tokens, rng):
        mask, counts = rng.random((2, 30)) < 0.8, np.array([6, 3])
        ragged = {"mask": mask, "num_groups": counts}
        wanted = paper(tokens, counts, mask=mask)
        merged, losses = QuickMergePP(embedding_dim=8)(tokens, counts, mask=mask)
        np.testing.assert_array_equal(merged, wanted.tokens)
        alignment = alignment_loss(merged, MLPPrior.init(8), num_groups=counts).total
        assert losses["ar_alignment"] == pytest.approx(alignment.mean())
        fidelity = fidelity_loss(tokens, merged, labels=wanted.labels, **ragged)
        assert losses["fidelity"] == pytest.approx(float(fidelity))
        scores = saliency(self_attention_entropy(tokens, mask=mask), mask=mask)
        got, probabilities = DifferentiableTokenMerging()(
            tokens, scores, counts, mask=mask
        )
        np.testing.assert_array_equal(got, merged)
        np.testing.assert_array_equal(probabilities, gumbel_softmax(scores, mask=mask))

    # Without noise the seed of the priors must still be a number.
    def test_no_seed(self, tokens):
        merged, losses = QuickMergePP(embedding_dim=8, seed=None)(tokens, 6)
        np.testing.assert_array_equal(merged, paper(tokens, 6, seed=None).tokens)
        assert math.isfinite(losses["total"])

    def test_options_of_alignment(self, tokens):
        prior = MLPPrior.init(8, hidden_dim=5, seed=3)
        wanted = alignment_loss(tokens, prior)
        for alignment in (
            BidirectionalARAlignment(8, 5, seed=3),  # hidden_dim = 5
            BidirectionalARAlignment(8, prior=prior),
        ):
            got = alignment.forward_loss(tokens), alignment.backward_loss(tokens)
            assert got == pytest.approx([wanted.forward.mean(), wanted.backward.mean()])
            total = alignment.compute_alignment_loss(tokens)
            assert total == pytest.approx(wanted.total.mean())

    def test_options_of_fidelity(self, tokens):
        m = paper(tokens, 6)
        constraint = NormBasedFidelityConstraint(gamma=0.6)
        plain = constraint.compute_fidelity_loss(tokens, m.tokens)
        # Both options change the tokens that are compared, so the loss differs.
        for option in ({"labels": m.labels}, {"mask": m.labels > 0}):
            got = constraint.compute_fidelity_loss(tokens, m.tokens, **option)
            wanted = fidelity_loss(tokens, m.tokens, gamma=0.6, **option)
            assert got == wanted != plain


class TestClaims:
    """The README's list of features and parameters, line by line."""

    def test_entropy_across_transformer_layers(self, rng):
        layers = tuple(rng.standard_normal((12, 2, 20, 8)))
        estimator = EntropyAwareSaliency(embedding_dim=8, num_layers=12)
        # One entropy per layer, normalised and then averaged.
        wanted = saliency(self_attention_entropy(layers))
        np.testing.assert_array_equal(estimator(layers), wanted)
        with pytest.raises(ValueError, match="must have L = 12 layers, got 11"):
            estimator(layers[:11])

    def test_embedding_dim_is_the_width(self, rng):
        with pytest.raises(ValueError, match="`tokens` must have width D = 9, got 8"):
            QuickMergePP(embedding_dim=9)(rng.standard_normal((5, 8)), 2)

    # The largest probability grows as the temperature falls, up to 1.
    def test_low_temperature_is_more_discrete(self, rng):
        tokens, scores = rng.standard_normal((2, 30, 8)), rng.random((2, 30))
        peaks = [
            DifferentiableTokenMerging(temperature=t)(tokens, scores, K=5)[1].max()
            for t in (10.0, 1.0, 0.1, 0.001)
        ]
        assert peaks == sorted(peaks)
        assert peaks[-1] == pytest.approx(1)

    # Selected tokens have mass about s, the others
    # epsilon, so epsilon sets the ratio.
    def test_epsilon_weighs_the_background(self, rng):
        tokens, scores = rng.standard_normal((1, 30, 8)), rng.random((1, 30))
        low = DifferentiableTokenMerging(0.1, 1e-6).merge(tokens, scores, 5).mass
        assert low.max() / low.min() > 1e3
        even = DifferentiableTokenMerging(100.0, 1e6).merge(tokens, scores, 5).mass
        assert even.min() / even.max() > 0.99  # at this temperature no token stands out

    def test_merged_tokens_are_saliency_weighted_means(self, rng):
        tokens, scores = rng.standard_normal((30, 8)), rng.random(30)
        m = DifferentiableTokenMerging().merge(tokens, scores, 5)
        for k in range(5):
            members = m.labels == k
            # sum m x / sum m over the members.
            mean = np.average(tokens[members], axis=0, weights=m.mass[members])
            np.testing.assert_allclose(m.tokens[k], mean)

    def test_clusters_are_by_cosine(self, rng):
        """The norms of tokens do not change the groups."""
        tokens, scores = rng.standard_normal((30, 8)), rng.random(30)
        lengths = rng.uniform(0.1, 10, (30, 1))
        np.testing.assert_allclose(
            cosine_similarity(tokens * lengths), cosine_similarity(tokens)
        )
        plain, scaled = (
            DifferentiableTokenMerging().merge(x, scores, 5).labels
            for x in (tokens, tokens * lengths)
        )
        np.testing.assert_array_equal(plain, scaled)

    def test_compressed_sequences_stay_valid_for_decoding(self, rng):
        """No merged token contains a token later than its own position."""
        m = quickmerge(rng.standard_normal((40, 8)), 10)
        assert (np.diff(m.positions) > 0).all()
        # Token i goes into a group whose last member is at i or later.
        assert (np.arange(40) <= m.positions[m.labels]).all()

    def test_alpha_weighs_the_alignment(self, rng):
        model, tokens = QuickMergePP(embedding_dim=8), rng.standard_normal((2, 30, 8))
        _, losses = model(tokens, 6, alpha=2.5)
        assert losses["total"] == pytest.approx(
            2.5 * losses["ar_alignment"] + losses["fidelity"]
        )

    # gamma = 1 allows no error, gamma = 0 an error of 1.
    def test_gamma_is_the_norm_mass_to_retain(self, rng):
        tokens = rng.standard_normal((2, 30, 8))
        strict, loose = (
            QuickMergePP(embedding_dim=8, gamma=gamma)(tokens, 6)[1]["fidelity"]
            for gamma in (1.0, 0.0)
        )
        assert strict > loose >= 0

    # 16 bits instead of 32: half the bytes, and the last bits of each value rounded.
    def test_half_precision_halves_the_bytes(self, rng):
        tokens = rng.standard_normal((2, 30, 8))
        half, single = (
            quickmerge(tokens.astype(t), 6).tokens for t in (np.float16, np.float32)
        )
        assert half.nbytes * 2 == single.nbytes
        np.testing.assert_allclose(half, single, atol=5e-3)

    # With one merged token there is no next token to predict.
    def test_one_target_token(self, rng):
        _, losses = QuickMergePP(embedding_dim=8)(rng.standard_normal((2, 9, 8)), 1)
        assert losses["ar_alignment"] == 0
        assert all(math.isfinite(loss) for loss in losses.values())

    # An integer 1 is the ratio 1.0 here, not K = 1: the argument is a ratio.
    @pytest.mark.parametrize("entropy_budget", [1, 1.0])
    def test_a_budget_of_one_keeps_all(self, rng, entropy_budget):
        tokens = rng.standard_normal((9, 8))
        merged, _ = quickmerge_inference(tokens, None, entropy_budget)
        np.testing.assert_array_equal(merged, tokens)

    @pytest.mark.parametrize("entropy_budget", [0, 2, 1.01, -0.5])
    def test_a_budget_is_a_ratio(self, rng, entropy_budget):
        with pytest.raises(ValueError, match=r"`entropy_budget` must lie in \(0, 1\]"):
            quickmerge_inference(rng.standard_normal((9, 8)), None, entropy_budget)

    def test_inference_takes_one_sequence(self, rng):
        with pytest.raises(ValueError, match=r"`tokens` must have shape \(N, D\)"):
            quickmerge_inference(rng.standard_normal((2, 9, 8)), None)


def test_a_model_keeps_a_fraction_of_the_tokens(rng, library):
    tokens = rng.standard_normal((2, 12, 4)).astype(np.float32)
    x, model = to_library(library, tokens), QuickMergePP(embedding_dim=4)
    merged, losses = model(x, 0.25)
    wanted, wanted_losses = model(x, 3)
    np.testing.assert_array_equal(to_numpy(merged), to_numpy(wanted))
    assert losses == wanted_losses
    # With a mask, K differs between the sequences.
    mask = to_library(library, np.arange(12) < np.array([[12], [8]]))
    merged, losses = model(x, 0.25, mask=mask)
    assert tuple(merged.shape) == (2, 3, 4)
    assert np.isfinite(losses["total"])

"""Finite inputs give finite results, or an error that says what is out of range.

The inputs are at the ends of the range of each dtype: the largest number, the smallest
normal and subnormal ones, and mixtures. Gradients may be infinite, if the derivative is
out of range, but not NaN. The functions run on the CPU.
"""

import re

import ml_dtypes
import numpy as np
import pytest
from gpu_parity import leaves

import qm_cupy as qm

B, N, D, K = 2, 7, 4, 3
DTYPES = np.float16, ml_dtypes.bfloat16, np.float32, np.float64
FILLS = (
    "max", "alternating", "near max", "mixed", "tiny", "subnormal", "spread",
    "normal and max", "zeros and max", "one max",
)  # fmt: skip


class Extremes:
    """Arrays of extreme values of one dtype."""

    def __init__(self, dtype, fill):
        self.dtype, self.fill, self.rng = dtype, fill, np.random.default_rng(0)
        info = ml_dtypes.finfo(dtype)
        self.largest = float(info.max)
        self.tiny = float(info.smallest_normal)
        self.subnormal = float(info.smallest_subnormal)

    def positive(self, *shape):
        n, rng, largest = int(np.prod(shape)), self.rng, self.largest
        x = {
            "max": lambda: np.full(n, largest),
            "alternating": lambda: np.full(n, largest),
            "near max": lambda: largest * rng.uniform(0.9, 1, n),
            "mixed": lambda: rng.choice(
                [largest, largest / 3, 1, self.tiny, self.subnormal, 0], n
            ),
            "tiny": lambda: self.tiny * rng.integers(1, 4, n),
            "subnormal": lambda: self.subnormal * rng.integers(0, 4, n),
            "spread": lambda: np.exp(
                rng.uniform(np.log(self.tiny), np.log(largest) * 0.999, n)
            ),
            "normal and max": lambda: rng.choice([largest, *rng.random(3)], n),
            "zeros and max": lambda: rng.choice([0, largest], n),
            "one max": lambda: largest * (np.arange(n) == n // 2),
        }[self.fill]()
        return x.reshape(shape).astype(self.dtype)

    def signed(self, *shape):
        sign = self.rng.choice([-1.0, 1.0], shape)
        if self.fill == "max":
            sign[...] = 1
        if self.fill == "alternating":
            sign = np.resize([1.0, -1.0], shape)
        return self.positive(*shape) * sign.astype(self.dtype)

    def usual(self, *shape):
        return self.rng.random(shape).astype(self.dtype)


MASK = np.arange(N) < np.array([[N - 2], [N]])
LABELS = np.where(MASK, np.arange(N) % K, -1)
ROWS, TOKENS, MATRIX, HEADS = (B, N), (B, N, D), (B, N, N), (B, 2, N)

# Results that must be finite. Every function takes an `Extremes`.
VALUES = {
    "attention_entropy": lambda x: qm.attention_entropy(x.positive(*MATRIX), mask=MASK),
    "attention_received": lambda x: qm.attention_received(
        x.positive(*MATRIX), mask=MASK
    ),
    "attention_received, causal": lambda x: qm.attention_received(
        x.positive(*MATRIX), causal=True
    ),
    "attention_received, queries": lambda x: qm.attention_received(
        query=x.signed(*TOKENS), key=x.signed(*TOKENS), mask=MASK
    ),
    "query_key_entropy": lambda x: qm.query_key_entropy(
        x.signed(*TOKENS), x.signed(*TOKENS), causal=True
    ),
    "query_key_entropy, scale": lambda x: qm.query_key_entropy(
        x.usual(*TOKENS), x.usual(*TOKENS), scale=x.largest
    ),
    "self_attention_entropy": lambda x: qm.self_attention_entropy(x.signed(*TOKENS)),
    "attention_mass": lambda x: qm.attention_mass(
        x.positive(*HEADS), x.positive(*HEADS)
    ),
    "saliency": lambda x: qm.saliency(x.signed(*ROWS), mask=MASK),
    "saliency, heads": lambda x: qm.saliency(x.signed(2, B, 2, N), mask=MASK),
    "norm_saliency": lambda x: qm.norm_saliency(x.signed(*TOKENS), mask=MASK),
    "gumbel_softmax": lambda x: qm.gumbel_softmax(x.signed(*ROWS), mask=MASK),
    "gumbel_softmax, cold": lambda x: qm.gumbel_softmax(
        x.signed(*ROWS), temperature=1e-300
    ),
    "gumbel_softmax, hot": lambda x: qm.gumbel_softmax(
        x.signed(*ROWS), temperature=1e300
    ),
    "saliency_mass": lambda x: qm.saliency_mass(x.positive(*ROWS), x.usual(*ROWS)),
    "saliency_mass, epsilon": lambda x: qm.saliency_mass(
        x.positive(*ROWS), x.usual(*ROWS), epsilon=x.largest
    ),
    "norm_mass": lambda x: qm.norm_mass(x.signed(*TOKENS), K, mask=MASK),
    "cosine_similarity": lambda x: qm.cosine_similarity(x.signed(*TOKENS)),
    "merge_tokens": lambda x: qm.merge_tokens(x.signed(*TOKENS), LABELS, K),
    "merge_tokens, mass": lambda x: qm.merge_tokens(
        x.signed(*TOKENS), LABELS, K, mass=x.positive(*ROWS)
    ),
    "merge_tokens, usual mass": lambda x: qm.merge_tokens(
        x.signed(*TOKENS), LABELS, K, mass=x.usual(*ROWS)
    ),
    "quickmerge": lambda x: qm.quickmerge(x.signed(*TOKENS), K, mask=MASK),
    "quickmerge, mass": lambda x: qm.quickmerge(
        x.signed(*TOKENS), K, weights="mass", epsilon=x.largest, mask=MASK
    ),
    "quickmerge, saliency": lambda x: qm.quickmerge(
        x.signed(*TOKENS), K, saliency=x.positive(*ROWS), method="nearest"
    ),
    "quickmerge, attention": lambda x: qm.quickmerge(
        x.signed(*TOKENS), K, attention=x.positive(*MATRIX), mask=MASK
    ),
    "quickmerge, weights": lambda x: qm.quickmerge(
        x.signed(*TOKENS), K, weights=x.positive(*ROWS), weighted_linkage=True
    ),
}
# Errors of inputs that no method represents.
REFUSED = r"attention scores overflow|must have masses below|too large"

GRADIENTS = {
    "attention_entropy_vjp": lambda x, g: qm.attention_entropy_vjp(
        g(*ROWS), x.positive(*MATRIX), mask=MASK
    ),
    "query_key_entropy_vjp": lambda x, g: qm.query_key_entropy_vjp(
        g(*ROWS), x.usual(*TOKENS), x.usual(*TOKENS), mask=MASK
    ),
    "attention_received_vjp": lambda x, g: qm.attention_received_vjp(
        g(*ROWS), x.positive(*MATRIX)
    ),
    "attention_mass_vjp": lambda x, g: qm.attention_mass_vjp(
        g(*ROWS), x.positive(*HEADS), x.positive(*HEADS), causal=True
    ),
    "saliency_vjp": lambda x, g: qm.saliency_vjp(g(*ROWS), x.signed(*HEADS), mask=MASK),
    "norm_saliency_vjp": lambda x, g: qm.norm_saliency_vjp(
        g(*ROWS), x.signed(*TOKENS), mask=MASK
    ),
    "gumbel_softmax_vjp": lambda x, g: qm.gumbel_softmax_vjp(g(*ROWS), x.signed(*ROWS)),
    "saliency_mass_vjp": lambda x, g: qm.saliency_mass_vjp(
        g(*ROWS), x.signed(*ROWS), x.usual(*ROWS)
    ),
    "merge_tokens_vjp": lambda x, g: qm.merge_tokens_vjp(
        g(B, K, D), x.signed(*TOKENS), LABELS, K, mass=x.positive(*ROWS)
    ),
    "merge_tokens_vjp, usual mass": lambda x, g: qm.merge_tokens_vjp(
        g(B, K, D), x.signed(*TOKENS), LABELS, K, mass=x.usual(*ROWS)
    ),
    "unmerge_tokens_vjp": lambda x, g: qm.unmerge_tokens_vjp(g(*TOKENS), LABELS, K),
    "reconstruction_error_vjp": lambda x, g: qm.reconstruction_error_vjp(
        g(B), x.signed(*TOKENS), x.signed(B, K, D), labels=LABELS
    ),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("name", VALUES)
def test_values_are_finite(name, dtype, fill):
    inputs = Extremes(dtype, fill)
    try:
        results = leaves(VALUES[name](inputs))
    except ValueError as error:
        # Only these leave the range: scores of float64, and masses of huge attention.
        if not re.search(REFUSED, str(error)):
            raise
        if dtype != np.float64 and "attention" not in name:
            raise
        return
    for x in results:
        assert np.isfinite(x.astype(np.float64)).all()


@pytest.mark.parametrize("extreme_gradient", [False, True])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_not_nan(name, dtype, fill, extreme_gradient):
    inputs = Extremes(dtype, fill)
    gradient = inputs.signed if extreme_gradient else inputs.usual
    for x in leaves(GRADIENTS[name](inputs, gradient)):
        assert x is None or not np.isnan(x.astype(np.float64)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_a_mean_never_exceeds_its_members(dtype):
    largest = ml_dtypes.finfo(dtype).max
    tokens = np.full((7, 3), largest, dtype)
    labels, mass = np.zeros(7, int), np.random.default_rng(0).random(7)
    for weights in (None, mass.astype(np.float32), np.full(7, 3e38, np.float32)):
        merged = qm.merge_tokens(tokens, labels, 1, mass=weights)
        assert (merged <= largest).all()
        assert (merged >= largest * dtype(0.99)).all()


def test_entropies_whose_difference_overflows():
    entropy = np.array([3e38, -3e38, 0], np.float32)
    np.testing.assert_allclose(qm.saliency(entropy), [0, 1, 0.5])
    # The gradients of s = 1 - (H + 3e38) / 6e38 at the middle token; the extremes get
    # the parts of it that keep the sum 0.
    gradient = qm.saliency_vjp(np.array([0, 0, 6.0], np.float32), entropy)
    np.testing.assert_allclose(gradient, [5e-39, 5e-39, -1e-38], rtol=1e-6)


def test_heads_whose_sum_overflows():
    entropy = np.array([[[3e38, 0, 1e38]] * 2], np.float32).transpose(0, 1, 2)
    np.testing.assert_allclose(qm.saliency(entropy), [[0, 1, 2 / 3]], rtol=1e-6)


def test_attention_of_any_scale_has_the_same_entropy():
    attention = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    wanted = qm.attention_entropy(attention)
    huge = attention * np.float32(3.4e38)
    np.testing.assert_allclose(qm.attention_entropy(huge), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        qm.attention_received(huge), attention.mean(0) * 3.4e38, rtol=1e-6
    )


def test_epsilon_above_the_range_of_the_weights():
    error = r"`epsilon` must be at most 3\.403e\+38, the largest float32, got 1e\+39"
    tokens = np.eye(4, 3, dtype=np.float32)
    with pytest.raises(ValueError, match=error):
        qm.quickmerge(tokens, 3, weights="mass", epsilon=1e39)
    with pytest.raises(ValueError, match=error):
        qm.saliency_mass(tokens[:, 0], tokens[:, 0], epsilon=1e39)
    with pytest.raises(ValueError, match=error):
        qm.saliency_mass_vjp(tokens[:, 0], tokens[:, 0], tokens[:, 0], epsilon=1e39)
    wide = qm.saliency_mass(tokens[:, 0].astype(float), tokens[:, 0], epsilon=1e39)
    np.testing.assert_allclose(wide, [1, 1e39, 1e39, 1e39])


def test_probabilities_for_which_the_mass_overflows():
    saliency, probabilities = np.array([1e308]), np.array([3.0])
    with pytest.raises(ValueError, match=r"`probabilities` must lie in \[0, 1\]"):
        qm.saliency_mass(saliency, probabilities)


def test_attention_whose_mass_overflows():
    received = np.array([1.0, 1e308])
    with pytest.raises(ValueError, match="`received` must have masses below"):
        qm.attention_mass(received * 1.7, 0 * received, causal=True)


OTHER_FLOATS = sorted(
    name
    for name, x in vars(ml_dtypes).items()
    if isinstance(x, type) and name.startswith("float") and name[5].isdigit()
)


@pytest.mark.parametrize("name", [*OTHER_FLOATS, "longdouble"])
def test_only_four_float_dtypes(name):
    dtype = np.dtype(getattr(ml_dtypes, name, np.longdouble))
    with pytest.raises(TypeError, match="`tokens` must be float16, bfloat16, float32"):
        qm.quickmerge(np.zeros((4, 3), dtype), 2)


def test_no_float8_of_torch_and_jax():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="`tokens`"):
            qm.quickmerge(torch.zeros((4, 3)).to(dtype), 2)
    with pytest.raises(TypeError, match="`tokens`"):
        qm.quickmerge(jax.numpy.zeros((4, 3), jax.numpy.float8_e5m2), 2)


def test_heights_out_of_range():
    """Ward's heights exceed the distances, by a factor that grows with the groups."""
    tokens = np.zeros((6, 2))
    tokens[2, 1] = np.finfo(float).max
    with pytest.raises(ValueError, match="the heights exceed the range of float64"):
        qm.linkage(tokens, "ward", metric="euclidean")
    average = qm.linkage(tokens, "average", metric="euclidean")
    np.testing.assert_allclose(average[-1, 2] / tokens[2, 1], 1, rtol=1e-14)

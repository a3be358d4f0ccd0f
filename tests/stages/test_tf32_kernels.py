"""The changes that TF32 makes, and their bounds.

With `allow_tf32`, tensor cores multiply float32 factors that are truncated to TF32: 10
bits of mantissa instead of 23. The fixture `kernels` runs the kernels in the PTX
interpreter (tests/ptx).
"""

import numpy as np
import pytest
from conftest import TF32_TOLERANCE, assert_close
from kernel_cases import mask_of, optimized, random, sizes
from oracle_arrays import softmax_entropy

import qm_cupy as qm

pytestmark = pytest.mark.usefixtures("kernels")


def truncated(x):
    """Return float32 values with a mantissa of 10 bits, as in TF32: 13 bits are 0."""
    return (x.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)


@sizes
@optimized
def test_entropies_with_tf32_equal_those_of_truncated_tokens(num_tokens):
    mask = mask_of(2, num_tokens)
    tokens = random((2, num_tokens, 37), np.float32)

    def entropies(x):
        self_attention = qm.self_attention_entropy(x, mask=mask)
        return self_attention, qm.query_key_entropy(x, x, causal=True, mask=mask)

    # TF32 changes nothing for tokens that are truncated beforehand, so without TF32
    # their entropies must be the same.
    plain, wanted = entropies(tokens), entropies(truncated(tokens))
    with qm.allow_tf32():
        got = entropies(tokens)
    for x, y, z in zip(got, wanted, plain, strict=True):
        assert_close(x, y, np.float32)
        # TF32 was used: results differ. One token always has entropy 0.
        assert (x != z).any() or num_tokens == 1


def tf32_calls(num_tokens, dim):
    """Return, by name, a call of every operation that TF32 changes."""
    x = random((2, num_tokens, dim), np.float32)
    query, key = (
        random((2, num_tokens, dim), np.float32, seed, 1.5) for seed in (1, 2)
    )
    gradient, ones = random((2, num_tokens), np.float32, 3), np.ones(2, np.float32)
    mlp = qm.MLPPrior.init(dim, hidden_dim=50)
    transformer = qm.TransformerPrior.init(
        dim, hidden_dim=40, num_heads=2, num_layers=1, mlp_dim=70
    )

    def alignment_vjp():
        # The gradients of the forward, the backward and the total loss are 0, 1 and 1.
        x_gradient, weights = qm.alignment_loss_vjp((0 * ones, ones, ones), x, mlp)
        return x_gradient, *weights[0], *weights[1]

    return {
        "cosine_similarity": lambda: [qm.cosine_similarity(x)],
        "query_key_entropy": lambda: [qm.query_key_entropy(query, key)],
        "self_attention_entropy": lambda: [qm.self_attention_entropy(x)],
        "attention_received": lambda: [qm.attention_received(query=query, key=key)],
        "alignment_loss": lambda: qm.alignment_loss(x, mlp),
        "MLPPrior.predict": lambda: [mlp.predict(x)],
        "TransformerPrior.predict": lambda: [transformer.predict(x)],
        "query_key_entropy_vjp": lambda: qm.query_key_entropy_vjp(gradient, query, key),
        "self_attention_entropy_vjp": lambda: [
            qm.self_attention_entropy_vjp(gradient, x)
        ],
        "attention_received_vjp": lambda: qm.attention_received_vjp(
            gradient, query=query, key=key
        )[1:],
        "alignment_loss_vjp": alignment_vjp,
    }


@pytest.mark.parametrize("name", TF32_TOLERANCE)
@optimized
def test_tf32_changes_results_within_the_tolerance(name):
    # D = 37 ends within a step of a tile, and D = 64 does not.
    for num_tokens, dim in ((33, 37), (65, 64)):
        call = tf32_calls(num_tokens, dim)[name]
        plain = call()
        with qm.allow_tf32():
            got = call()
        # Equal results would mean that TF32 was not used.
        assert any((x != y).any() for x, y in zip(got, plain, strict=True))
        for x, y in zip(got, plain, strict=True):
            peak = abs(y).max()
            # Gradients have any size, so their tolerance is relative to the largest
            # one.
            limit = TF32_TOLERANCE[name] * (peak if "vjp" in name else max(peak, 1))
            np.testing.assert_allclose(x, y, rtol=0, atol=limit)


@pytest.mark.parametrize("scale", [0.05, 1.0])
@optimized
def test_entropies_with_tf32_are_within_their_bound(scale):
    """The docstring of `allow_tf32` derives the bound for scores of any size."""
    query, key = (random((129, 64), np.float32, seed, 1.5) for seed in (1, 2))
    q, k = query.astype(np.float64), key.astype(np.float64)
    allowed = np.ones((129, 129), np.bool_)
    wanted = softmax_entropy(q @ k.T * scale, allowed)
    # The bound of the docstring is e √(1 + ¼ ln² N), with e the largest change of a
    # score of the row. TF32 changes a product of two factors by at most 2⁻⁹ of it. The
    # last term is the tolerance of float32.
    change = 2**-9 * scale * (abs(q) @ abs(k).T).max(-1)  # e of each row
    bound = change * np.sqrt(1 + np.log(129) ** 2 / 4) + 2e-5
    with qm.allow_tf32():
        got = qm.query_key_entropy(query, key, scale=scale)
    assert (abs(got - wanted) <= bound).all()


@optimized
def test_matrix_products_with_tf32_are_near_those_of_float32():
    tokens = random((2, 129, 37), np.float32)
    prior = qm.MLPPrior.init(37, hidden_dim=50)
    functions = qm.cosine_similarity, prior.predict
    for function in functions:
        plain = function(tokens)
        with qm.allow_tf32():
            got = function(tokens)
        assert got.dtype == np.float32
        assert_close(got, plain, "tf32")
        assert (got != plain).any()  # TF32 was used
    # Both factors of x_i · x_j are truncated in the same way, so the matrix stays
    # symmetric.
    with qm.allow_tf32():
        cosines = qm.cosine_similarity(tokens)
        np.testing.assert_array_equal(cosines, np.swapaxes(cosines, 1, 2))


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("basic", np.float32),
        ("optimized-75", np.float32),  # tensor cores of sm_75 do not support TF32
        ("optimized", np.float16),
        ("optimized", np.float64),
    ],
    indirect=["kernels"],
)
def test_tf32_changes_only_float32_on_tensor_cores_that_support_it(dtype):
    tokens = random((1, 40, 16), dtype)
    plain = qm.self_attention_entropy(tokens)
    with qm.allow_tf32():
        np.testing.assert_array_equal(qm.self_attention_entropy(tokens), plain)

"""Keys with fewer heads than queries: each head of the keys serves a group of heads.

The fixture `kernels` runs a test with basic and with optimized kernels, in the PTX
interpreter (tests/ptx).
"""

import ml_dtypes
import numpy as np
import pytest

import qm_cupy as qm

L, B, H, N, D = 2, 2, 6, 7, 4
MASK = np.arange(N) < [[N], [N - 2]]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FUNCTIONS = {
    "entropy": (
        qm.query_key_entropy,
        lambda g, **options: qm.query_key_entropy_vjp(g, **options),
    ),
    "received": (
        qm.attention_received,
        lambda g, **options: qm.attention_received_vjp(g, **options)[1:],
    ),
}
names = pytest.mark.parametrize("name", FUNCTIONS)
key_heads = pytest.mark.parametrize("key_heads", [1, 2, 3, 6])


def draw(rng, key_heads, leading=(B,), dtype=np.float64):
    query = rng.standard_normal((*leading, H, N, D)).astype(dtype)
    return query, rng.standard_normal((*leading, key_heads, N, D)).astype(dtype)


def repeated(key):
    """Return the key head of each head of the queries, h // (H / H_k)."""
    of_query = [h // (H // key.shape[-3]) for h in range(H)]
    return key[..., of_query, :, :]


def check(rng, name, key_heads, leading, dtype, causal):
    function, vjp = FUNCTIONS[name]
    query, key = draw(rng, key_heads, leading, dtype)
    options = {"causal": causal, "scale": 0.7, "mask": MASK}
    pair = {"query": query, "key": repeated(key)}
    wanted = function(**pair, **options)
    got = function(query=query, key=key, **options)
    assert got.shape == (*leading, H, N)
    np.testing.assert_array_equal(got, wanted)
    gradient = rng.standard_normal(got.shape)
    by_query, by_key = vjp(gradient, **pair, **options)
    got = vjp(gradient, query=query, key=key, **options)
    np.testing.assert_array_equal(got[0], by_query)
    assert got[1].shape == key.shape
    assert got[1].dtype == key.dtype
    groups = by_key.reshape(*leading, key_heads, -1, N, D).astype(np.float64)
    tolerance = {8: 1e-13, 4: 1e-6, 2: 1e-2}[key.dtype.itemsize]
    size = abs(groups).sum(-3)  # terms may cancel
    assert (abs(got[1] - groups.sum(-3)) <= tolerance * size).all()


@names
@key_heads
@pytest.mark.parametrize("leading", [(B,), (L, B)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_repeated_keys(rng, name, key_heads, leading, causal):
    check(rng, name, key_heads, leading, np.float64, causal)
    check(rng, name, key_heads, leading, np.float32, causal)


@names
@key_heads
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_equal_repeated_keys(kernels, rng, name, key_heads, dtype, causal):
    check(rng, name, key_heads, (B,), dtype, causal)


@names
def test_the_gradient_of_keys_is_rounded_once(rng, name):
    """The sum over a group is in float32 at least."""
    _, vjp = FUNCTIONS[name]
    query, key = draw(rng, 2, dtype=BFLOAT16)
    gradient = rng.standard_normal((B, H, N)).astype(np.float32)
    got = vjp(gradient, query=query, key=key)[1]
    wide = {"query": query.astype(np.float32), "key": key.astype(np.float32)}
    np.testing.assert_array_equal(got, vjp(gradient, **wide)[1].astype(BFLOAT16))


@names
def test_an_empty_batch(name):
    function, vjp = FUNCTIONS[name]
    pair = {"query": np.ones((0, H, N, D)), "key": np.ones((0, 2, N, D))}
    assert function(**pair).shape == (0, H, N)
    assert vjp(np.ones((0, H, N)), **pair)[1].shape == (0, 2, N, D)


@names
def test_torch_and_jax(rng, name):
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    function, vjp = FUNCTIONS[name]
    query, key = draw(rng, 2, dtype=np.float32)
    gradient = rng.standard_normal((B, H, N)).astype(np.float32)
    wanted = vjp(gradient, query=query, key=key)
    leaves = [torch.tensor(x, requires_grad=True) for x in (query, key)]
    result = function(query=leaves[0], key=leaves[1])
    result.backward(torch.tensor(gradient))
    for leaf, y in zip(leaves, wanted, strict=True):
        np.testing.assert_array_equal(leaf.grad, y)

    def loss(query, key):
        return (function(query=query, key=key) * gradient).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(query, key)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)

"""What lies under padding is never read as a value: NaN there changes no bit.

Padding is where the mask is False or, without a mask, where the label is -1. Every
function runs on the CPU, and with the kernels in the PTX interpreter (tests/ptx).
"""

import numpy as np
import pytest
from gpu_calls import calls
from gpu_parity import HOST, leaves
from kernel_cases import dtypes

import qm_cupy as qm

NUM_TOKENS = 33
# The axes of tokens, counted from the end.
TOKEN_AXES = {
    "tokens": (-2,), "hidden_states": (-2,), "query": (-2,), "key": (-2,),
    "attention": (-2, -1), "entropy": (-1,), "received": (-1,), "saliency": (-1,),
    "scores": (-1,), "probabilities": (-1,), "weights": (-1,), "mass": (-1,),
}  # fmt: skip
# Functions whose gradient has one entry for each token, or one row.
GRADIENT_AXES = {
    "unmerge_tokens_vjp": (-2,),
    **dict.fromkeys(
        [
            "attention_entropy_vjp", "query_key_entropy_vjp",
            "query_key_entropy_vjp, causal", "self_attention_entropy_vjp",
            "attention_received_vjp", "attention_received_vjp, queries and keys",
            "attention_received_vjp, queries and keys, causal", "attention_mass_vjp",
            "saliency_vjp", "norm_saliency_vjp", "gumbel_softmax_vjp",
        ],
        (-1,),
    ),
}  # fmt: skip
CALLS = calls(NUM_TOKENS, masked=True)
PADDED = [
    name
    for name, (_, inputs) in CALLS.items()
    if name not in HOST and (inputs.get("mask") is not None or "labels" in inputs)
]


def filled(x, axes, valid, value):
    """Return x (…, N, …) with a value where a token or its sequence is padding."""
    if isinstance(x, tuple):
        return tuple(filled(layer, axes, valid, value) for layer in x)
    x = x.copy()
    # (B, N) against (…, B, …, N, …): B is the axis with the length of the batch.
    leading = x.shape[: x.ndim + min(axes)]
    batch_axis = next(i for i, n in enumerate(leading) if n == len(valid))
    for axis in axes:
        shape = [1] * x.ndim
        shape[batch_axis], shape[axis] = valid.shape
        x[np.broadcast_to(~valid.reshape(shape), x.shape)] = value
    return x


def with_padding(name, value, dtype):
    """Return the arguments of a call with a value wherever there is padding."""
    _, inputs = CALLS[name]
    mask = inputs.get("mask")
    valid = inputs["labels"] >= 0 if mask is None else mask
    if mask is not None and "labels" in inputs:
        valid = mask & (inputs["labels"] >= 0)
    axes = TOKEN_AXES | {"gradient": GRADIENT_AXES.get(name)}

    def argument(key, x):
        if isinstance(x, tuple) and key in TOKEN_AXES:
            return tuple(argument(key, layer) for layer in x)
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        x = x.astype(dtype)
        return x if axes.get(key) is None else filled(x, axes[key], valid, value)

    return {key: argument(key, x) for key, x in inputs.items()}


def check(name, dtype):
    function = CALLS[name][0]
    wanted = leaves(function(**with_padding(name, 0, dtype)))
    for value in (np.nan, np.inf):
        got = leaves(function(**with_padding(name, value, dtype)))
        for x, y in zip(got, wanted, strict=True):
            assert x is y is None or np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("kernels", ["basic", "optimized"], indirect=True)
def test_kernels(name, dtype, kernels):
    check(name, dtype)


@dtypes
@pytest.mark.parametrize("name", PADDED)
def test_cpu(name, dtype):
    with qm.check_finite(True):
        check(name, dtype)

"""`quickmerge` with its kernels, interpreted on the CPU: launches, values, memory.

The groups are fixed, because clustering has tests of its own.
"""

import ml_dtypes
import numpy as np
import ptx
import pytest
from conftest import assert_close
from kernel_cases import without_shape
from seam import cuda

import qm_cupy as qm
from qm_cupy import pipeline

# The weights of the paper, with noise.
PAPER = {"weights": "mass", "noise_seed": 5, "sequence_offset": 3}

BATCH, TOKENS, DIM, GROUPS, LAYERS, HEADS = 2, 70, 24, 9, 3, 2
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
ENTROPY = {  # the kernels that compute the entropy of each source
    "tokens": ["self_attention_states", "self_attention_entropy"],
    "hidden_states": LAYERS * ["self_attention_states", "self_attention_entropy"],
    "attention": ["attention_entropy"],
    "query": ["query_key_entropy"],
}
SOURCES = [*ENTROPY, "saliency"]

dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=[np.dtype(t).name for t in DTYPES]
)
masked = pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
single = pytest.mark.parametrize("single", [False, True], ids=["batch", "single"])
sources = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    ptx.install(monkeypatch)


@pytest.fixture(autouse=True)
def labels(monkeypatch):
    """Make groups of neighbours, whatever the tokens are."""
    labels = np.tile(np.arange(TOKENS) * GROUPS // TOKENS, (BATCH, 1)).astype(np.int32)

    def cluster_tokens(tokens, num_groups, *, mask=None, **_):
        result = labels if tokens.ndim == 3 else labels[0]
        return result if mask is None else np.where(mask, result, np.int32(-1))

    stages = pipeline.COMPUTE_STAGES._replace(cluster_tokens=cluster_tokens)
    monkeypatch.setattr(pipeline, "COMPUTE_STAGES", stages)


def arguments(source, dtype, masked, single):
    """Return the arguments of `quickmerge`, every array in `dtype`."""
    rng = np.random.default_rng(8)
    tokens = rng.standard_normal((BATCH, TOKENS, DIM))
    mask = None
    if masked:  # padding on the left, and in between
        mask = rng.random((BATCH, TOKENS)) < 0.7
        mask[0] = np.arange(TOKENS) >= TOKENS // 3
    heads = LAYERS, BATCH, HEADS, TOKENS
    inputs = {
        "tokens": {},
        "hidden_states": {
            "hidden_states": rng.standard_normal((LAYERS, *tokens.shape))
        },
        "attention": {"attention": rng.random((*heads, TOKENS)) ** 3},
        "query": dict(
            zip(("query", "key"), rng.normal(size=(2, *heads, 8)), strict=True)
        ),
        "saliency": {"saliency": rng.random((BATCH, TOKENS))},
    }[source]
    # The axis of the batch: layers come before it, except for saliency.
    axis = 0 if source == "saliency" else 1
    if single:
        tokens, mask = tokens[0], None if mask is None else mask[0]
        inputs = {name: x.take(0, axis) for name, x in inputs.items()}
        if source in ("attention", "query"):
            inputs = {name: x[0] for name, x in inputs.items()}  # one layer (H, N, N)
    inputs = {name: x.astype(dtype) for name, x in inputs.items()}
    if source == "hidden_states":
        inputs[source] = tuple(inputs[source])  # layers (B, N, D) or (N, D)
    return {"tokens": tokens.astype(dtype), "budget": GROUPS, "mask": mask, **inputs}


def saliency_of(inputs):
    """Return the saliency from one public function after the other."""
    inputs, mask = dict(inputs), inputs["mask"]
    tokens = inputs["tokens"]
    padding = mask if mask is None or tokens.ndim == 3 else mask[None]

    def lifted(name):  # with the axes of layers and of the batch
        return inputs[name] if tokens.ndim == 3 else inputs[name][None, None]

    if "saliency" in inputs:
        scores = inputs["saliency"].astype(cuda.accumulation_dtype(tokens.dtype))
        scores = scores if mask is None else scores * mask
    else:
        if "attention" in inputs:
            entropy = qm.attention_entropy(lifted("attention"), mask=padding)
        elif "query" in inputs:
            pair = lifted("query"), lifted("key")
            entropy = qm.query_key_entropy(*pair, mask=padding)
        elif "hidden_states" in inputs:
            layers = inputs["hidden_states"]
            if tokens.ndim == 2:
                layers = tuple(x[None] for x in layers)
            entropy = qm.self_attention_entropy(layers, mask=padding)
        # Without a source the tokens are the only hidden states.
        else:
            x = tokens.reshape(-1, TOKENS, DIM)
            entropy = qm.self_attention_entropy(x, mask=padding)
        scores = qm.saliency(entropy, mask=padding).reshape(tokens.shape[:-1])
    return scores


def mass_of(inputs):
    """Return the mass of the paper from one public function after the other."""
    scores, mask = saliency_of(inputs), inputs["mask"]
    probabilities = qm.gumbel_softmax(scores, seed=5, sequence_offset=3, mask=mask)
    mass = qm.saliency_mass(scores, probabilities)
    return mass if mask is None else mass * mask  # padding weighs nothing


@dtypes
@sources
@masked
@single
def test_one_launch_replaces_several_stages(dtype, source, masked, single, launches):
    inputs = arguments(source, dtype, masked, single)
    got = qm.quickmerge(**inputs, **PAPER)
    # Saliency that is given needs no normalisation, so the softmax alone is launched.
    fused = "gumbel_softmax" if source == "saliency" else "saliency_gumbel_mass"
    before = [*ENTROPY.get(source, []), fused]
    assert list(map(without_shape, launches[: len(before)])) == before
    # The kernels that the fused one replaces must not run as well.
    separate = {"entropy_range", "perturbed_scores", "softmax_totals", "saliency_mass"}
    assert not separate & set(launches)

    assert_close(got.mass, mass_of(inputs), dtype)
    assert got.mass.dtype == cuda.accumulation_dtype(dtype)
    merged = qm.merge_tokens(inputs["tokens"], got.labels, GROUPS, mass=got.mass)
    np.testing.assert_array_equal(got.tokens, merged)
    launches.clear()
    with qm.use_kernels("basic"):
        basic = qm.quickmerge(**inputs, **PAPER)
    assert launches.count("saliency_mass") == 1  # not fused
    # Only the tokens are rounded to the input's dtype.
    for x, y, column in zip(got, basic, ("stored", *["computed"] * 4), strict=True):
        assert x.shape == y.shape
        assert_close(x, y, dtype, column)


def widened(x):
    """Return an array of bfloat16, or a tuple of such arrays, in float32."""
    if isinstance(x, tuple):
        return tuple(map(widened, x))
    is_narrow = getattr(x, "dtype", None) == ml_dtypes.bfloat16
    return x.astype(np.float32) if is_narrow else x


@dtypes
@sources
@masked
@single
@pytest.mark.parametrize("options", [{}, PAPER], ids=["defaults", "paper"])
def test_kernels_give_the_results_of_numpy(
    dtype, source, masked, single, options, monkeypatch
):
    inputs = arguments(source, dtype, masked, single)
    got = qm.quickmerge(**inputs, **options)
    monkeypatch.setattr(cuda, "is_cuda", lambda x: False)
    if dtype is ml_dtypes.bfloat16:  # NumPy has no arithmetic for it
        inputs = {name: widened(x) for name, x in inputs.items()}
    wanted = qm.quickmerge(**inputs, **options)
    for x, y, column in zip(got, wanted, ("stored", *["computed"] * 4), strict=True):
        assert_close(x, y.astype(np.float64), dtype, column)


@masked
@single
@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_tokens_alone_launch_only_the_merge(masked, single, kernels, launches):
    """No entropy, noise or softmax is computed (the clustering is replaced here)."""
    inputs = arguments("tokens", np.float32, masked, single)
    with qm.use_kernels(kernels):
        got = qm.quickmerge(**inputs)
        used = {without_shape(x) for x in launches}
        # Without masses the kernel gives the bits of masses that are 1.
        merged = qm.merge_tokens(inputs["tokens"], got.labels, GROUPS, mass=got.mass)
    assert used <= {"sort_members", "merge_tokens", "group_sizes", "group_positions"}
    assert "merge_tokens" in used
    np.testing.assert_array_equal(got.tokens, merged)
    mask = inputs["mask"]
    wanted = np.ones(got.labels.shape) if mask is None else mask
    np.testing.assert_array_equal(got.mass, wanted)


RECEIVED = {  # the kernels of the attention received from each source
    "attention": ["query_counts", "attention_received"],
    "query": ["query_counts", "score_weights", "query_key_received"],
}


@dtypes
@masked
@single
@pytest.mark.parametrize("source", RECEIVED)
def test_default_weights_of_attention(dtype, source, masked, single, launches):
    """They are the attention mass: no saliency, noise or softmax is computed."""
    inputs = arguments(source, dtype, masked, single)
    got = qm.quickmerge(**inputs)
    before = [*RECEIVED[source], *ENTROPY[source], "attention_mass"]
    used = [without_shape(x).removesuffix("_kept") for x in launches[: len(before)]]
    assert used == before
    assert not {"saliency", "gumbel_softmax", "saliency_gumbel_mass"} & set(launches)
    # The stages, one after the other, with the axes of layers and of the batch.
    mask = inputs["mask"]
    lifted = {
        name: x[None, None] if single else x
        for name, x in inputs.items()
        if name in ("attention", "query", "key")
    }
    padding = mask if mask is None or not single else mask[None]
    received = qm.attention_received(**lifted, mask=padding).mean((0, 2))
    if source == "attention":
        entropy = qm.attention_entropy(lifted["attention"], mask=padding)
    else:
        entropy = qm.query_key_entropy(**lifted, mask=padding)
    wanted = received * np.exp(-entropy.mean((0, 2)))
    wanted = wanted.reshape(got.labels.shape)
    assert_close(got.mass, wanted, dtype)
    assert got.mass.dtype == cuda.accumulation_dtype(dtype)
    merged = qm.merge_tokens(inputs["tokens"], got.labels, GROUPS, mass=got.mass)
    np.testing.assert_array_equal(got.tokens, merged)


@masked
@pytest.mark.parametrize("weights", ["mass", "saliency", "uniform", "array"])
def test_results_have_their_own_memory(weights, masked):
    inputs = arguments("saliency", np.float32, masked, single=False)
    if weights == "array":
        weights = inputs["saliency"].copy()
    merged = qm.quickmerge(**inputs, weights=weights)
    assert not np.shares_memory(merged.mass, inputs["saliency"])
    assert not np.shares_memory(merged.mass, weights)
    if masked:
        assert not merged.mass[~inputs["mask"]].any()


@pytest.fixture
def wide(monkeypatch):
    """Return a list of all arrays of width D made so far, copies of inputs too."""
    made = []

    def recorded(make):
        def call(*args):
            x = make(*args)
            # None, or an input that needed no copy, is not new.
            is_new = not any(x is argument for argument in args)
            if x is not None and is_new and x.shape[-1:] == (DIM,):
                made.append(x)
            return x

        return call

    monkeypatch.setattr(cuda, "empty", recorded(cuda.empty))
    monkeypatch.setattr(cuda, "contiguous", recorded(cuda.contiguous))
    return made


@sources
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("options", [{}, PAPER], ids=["defaults", "paper"])
def test_half_precision_halves_the_memory(source, strided, options, wide):
    """One array of tokens is made, the result; and one copy if they are strided."""
    num_bytes = {}
    for dtype in (np.float16, np.float32):
        inputs = arguments(source, dtype, masked=True, single=False)
        if strided:
            inputs["tokens"] = inputs["tokens"].repeat(2, axis=-1)[..., ::2]
        merged = qm.quickmerge(**inputs, **options)
        shapes = sorted(x.shape for x in wide)
        assert shapes == [(BATCH, GROUPS, DIM)] + [(BATCH, TOKENS, DIM)] * strided
        # A float32 copy of float16 tokens would double the memory.
        assert {x.dtype for x in (*wide, merged.tokens)} == {np.dtype(dtype)}
        num_bytes[dtype] = sum(x.nbytes for x in wide)
        wide.clear()
    assert 2 * num_bytes[np.float16] == num_bytes[np.float32]

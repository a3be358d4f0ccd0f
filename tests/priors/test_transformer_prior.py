"""The transformer prior: against the oracle and torch, in steps, and saved weights.

A prior predicts a merged token from the tokens before it. K is the number of merged
tokens and D their width. The network has the width E, and H heads of width d. `learned`
is the number of learned positions, or None for rotary positions.
"""

import functools
import pickle

import ml_dtypes
import numpy as np
import oracle
import ptx
import pytest
from conftest import TOLERANCE, assert_close, to_library, to_numpy
from seam import cuda

import qm_cupy as qm
from qm_cupy.priors import attention
from qm_cupy.priors.weights import save_weights

PRIOR = qm.TransformerPrior.init(5, hidden_dim=12, num_heads=3, mlp_dim=16, seed=3)
DIRECTIONS = "forward", "backward"


def map_weights(prior, change):
    """Return a prior with `change` applied to every weight."""
    networks = (
        {k: change(w) for k, w in getattr(prior, d).items()} for d in DIRECTIONS
    )
    return qm.TransformerPrior(*networks, prior.num_heads)


def assert_same_weights(prior, other):
    assert prior.num_heads == other.num_heads
    for direction in DIRECTIONS:
        weights, wanted = getattr(prior, direction), getattr(other, direction)
        assert weights.keys() == wanted.keys()
        for name, weight in weights.items():
            assert weight.dtype == wanted[name].dtype
            assert weight.shape == wanted[name].shape
            assert weight.tobytes() == wanted[name].tobytes()  # bit for bit


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("learned", [None, 40])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 17])
def test_predict_against_the_oracle(rng, dtype, norm, learned, reverse, num_groups):
    prior = qm.TransformerPrior.init(
        5, hidden_dim=12, num_heads=3, norm=norm, num_positions=learned, seed=1
    )
    # `init` sets the weights of norms to 1 and 0. With these, an error in the use of
    # the weights would not change the result.
    prior = map_weights(prior, lambda w: w + 0.1 * rng.standard_normal(w.shape))
    tokens = rng.standard_normal((2, num_groups, 5)).astype(dtype)
    positions = np.sort(rng.choice(40, (2, num_groups)), axis=-1)
    sizes = rng.integers(0, 4, (2, num_groups))  # size 0: attention weight 0
    weights = prior.backward if reverse else prior.forward
    defaults = np.arange(num_groups), np.ones(num_groups)  # positions and sizes
    with_options = prior.predict(
        tokens, reverse=reverse, positions=positions, sizes=sizes
    )
    without_options = prior.predict(tokens, reverse=reverse)
    assert with_options.dtype == np.result_type(dtype, np.float32)
    for b, x in enumerate(tokens.astype(np.float64)):
        for got, positions_and_sizes in (
            (with_options, (positions[b], sizes[b])),
            (without_options, defaults),
        ):
            wanted = oracle.transformer(x, weights, 3, reverse, *positions_and_sizes)
            assert_close(got[b], wanted, dtype)


def torch_network(torch, norm, learned):
    """Return the module that `from_state_dict` documents, with torch's attention.

    D = 5, E = 12, H = 3, and d = 4. The hidden width of the MLPs is 20. If `learned`,
    there are 50 learned positions.
    """
    nn = torch.nn
    make_norm = nn.LayerNorm if norm == "layer" else rms_norm(torch)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = make_norm(12), make_norm(12)
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
            self.mlp_in, self.mlp_out = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x, bias, angle):
            heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 3, 4))
            q, k, v = heads.unbind(1)  # (K, H, d)
            if not learned:
                q, k = (rotate_half(torch, y, angle) for y in (q, k))
            attended = nn.functional.scaled_dot_product_attention(
                *(y.transpose(0, 1) for y in (q, k, v)), attn_mask=bias
            )
            x = x + self.out(attended.transpose(0, 1).flatten(-2))
            hidden = nn.functional.gelu(self.mlp_in(self.norm2(x)))
            return x + self.mlp_out(hidden)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 12)
            if learned:
                self.positions = nn.Embedding(50, 12)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.norm, self.head = make_norm(12), nn.Linear(12, 5)

        def forward(self, tokens, positions, sizes, reverse):
            x = self.embed(tokens)
            if learned:
                x = x + self.positions(positions)
            frequencies = 10000.0 ** (-torch.arange(0, 4, 2) / 4)  # 10000^(-2i / d)
            angle = positions[:, None, None] * frequencies  # (K, 1, d/2)
            mask = torch.ones(len(x), len(x)).tril().bool()  # j ≤ i in row i
            mask = mask.T if reverse else mask
            # Proportional attention: log n_j is added to the scores.
            bias = torch.log(sizes.float()).masked_fill(~mask, -torch.inf)
            for block in self.blocks:
                x = block(x, bias, angle)
            return self.head(self.norm(x))

    return Network()


def rms_norm(torch):
    return lambda dim: torch.nn.RMSNorm(dim, eps=1e-5)


def rotate_half(torch, x, angle):
    """Return x with each pair of elements (i, i + d/2) rotated by its angle."""
    angle = torch.cat([angle, angle], -1)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("learned", [False, True])
def test_from_state_dict_of_torch(rng, norm, learned):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    networks = [torch_network(torch, norm, learned).double() for _ in range(2)]
    for network in networks:
        for name, weight in network.named_parameters():
            if "norm" in name:  # not 1 and 0, the values of torch
                torch.nn.init.normal_(weight)
    states = [network.state_dict() for network in networks]
    prior = qm.TransformerPrior.from_state_dict(*states, num_heads=3)
    tokens = rng.standard_normal((9, 5))
    positions = np.sort(rng.choice(50, 9))
    sizes = rng.integers(1, 5, 9)
    inputs = [torch.from_numpy(x) for x in (tokens, positions, sizes)]
    for reverse, network in enumerate(networks):
        with torch.no_grad():
            wanted = network(*inputs, reverse).numpy()
        options = {"positions": positions, "sizes": sizes}
        got = prior.predict(tokens, reverse=bool(reverse), **options)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        networks[0].embed.weight.zero_()  # the prior has copies, which must not change
    assert prior.forward["embed.weight"].all()


def test_a_token_of_size_n_counts_as_n_copies():
    """All copies of a token have its position. The prior has only one block.

    With one block, the copies have equal keys and values. In a second block these would
    differ, because an earlier copy has attended to fewer tokens.
    """
    prior = qm.TransformerPrior.init(4, hidden_dim=8, num_heads=2, num_layers=1)
    tokens = np.random.default_rng(0).standard_normal((5, 4))
    sizes = np.array([3, 1, 4, 2, 1])
    got = prior.predict(tokens, sizes=sizes)
    repeated = prior.predict(
        np.repeat(tokens, sizes, axis=0), positions=np.repeat(np.arange(5), sizes)
    )
    # Compare the last token. It attends to all others, and its own size is 1.
    assert_close(got[-1], repeated[-1], "float32")


def test_rotary_scores_depend_on_differences_of_positions(rng):
    """A shift of all positions by a million does not change the predictions."""
    tokens, positions = rng.standard_normal((9, 5)), np.arange(9)
    first = PRIOR.predict(tokens, positions=positions)
    shifted = PRIOR.predict(tokens, positions=positions + 1_000_000)
    np.testing.assert_allclose(first, shifted, rtol=1e-5, atol=1e-5)
    # Twice the differences give other predictions.
    other = PRIOR.predict(tokens, positions=2 * positions)
    assert abs(first - other).max() > 1e-4


def test_predict_in_several_parts_of_queries(rng, monkeypatch):
    tokens, counts = rng.standard_normal((2, 17, 5)), np.array([17, 9])
    wanted = PRIOR.predict(tokens, num_groups=counts, reverse=True)
    # One query has B·H·K = 2·3·17 scores. With memory for the scores of four queries,
    # 17 queries need five parts.
    monkeypatch.setattr(attention, "_MAX_SCORES", 2 * 3 * 17 * 4)
    got = PRIOR.predict(tokens, num_groups=counts, reverse=True)
    assert_close(got[0], wanted[0])
    assert_close(got[1, :9], wanted[1, :9])


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_not_read(rng, reverse):
    tokens, counts = rng.standard_normal((3, 9, 5)), np.array([9, 1, 4])
    altered = tokens.copy()
    for b, k in enumerate(counts):
        altered[b, k:] = 1e6  # would change predictions if it were read
        wanted = PRIOR.predict(tokens[b, :k], reverse=reverse)
        got = PRIOR.predict(altered, num_groups=counts, reverse=reverse)
        assert_close(got[b, :k], wanted)


def test_predict_of_an_empty_batch():
    # The number of queries of a part is computed by a division by B: it must not fail.
    assert PRIOR.predict(np.ones((0, 3, 5))).shape == (0, 3, 5)


# In 40 steps, the cache grows twice: from 16 tokens to 32, and to 64.
@pytest.mark.parametrize("shape", [(40, 5), (3, 40, 5), (1, 5)])
def test_each_step_returns_a_row_of_predict(rng, library, dtype, shape):
    if library == "array_api_strict" and np.dtype(dtype).itemsize == 2:
        pytest.skip("array-api-strict has no 16 bits")
    tokens = to_library(library, rng.standard_normal(shape).astype(dtype))
    positions = to_library(library, np.cumsum(rng.integers(1, 9, shape[:-1]), -1))
    sizes = to_library(library, rng.integers(0, 4, shape[:-1]).astype(np.int32))
    wanted = to_numpy(PRIOR.predict(tokens, positions=positions, sizes=sizes))
    state = None
    for t in range(shape[-2]):
        options = {"position": positions[..., t], "size": sizes[..., t]}
        got, state = PRIOR.step(tokens[..., t, :], state, **options)
        assert type(got) is type(tokens)
        actual = to_numpy(got)
        assert actual.dtype == wanted.dtype
        tolerance = TOLERANCE[wanted.dtype.name].computed
        np.testing.assert_allclose(actual, wanted[..., t, :], tolerance, tolerance)


@pytest.mark.parametrize("learned", [None, 8])
def test_steps_with_default_positions_and_with_numbers(rng, learned):
    prior = qm.TransformerPrior.init(
        5, hidden_dim=8, num_heads=2, num_positions=learned
    )
    tokens = rng.standard_normal((2, 8, 5))
    wanted, state, other = prior.predict(tokens), None, None
    for t in range(8):
        # The default position is the number of earlier tokens, and the default size is
        # 1.
        got, state = prior.step(tokens[:, t], state)
        same, other = prior.step(tokens[:, t], other, position=t, size=1)
        assert_close(got, wanted[:, t])
        np.testing.assert_array_equal(got, same)


def test_two_continuations_of_one_state(rng):
    """Steps alternate between both. They must not read each other's keys."""
    past, future_a, future_b = rng.standard_normal((3, 6, 5))
    state = None
    for token in past:
        _, state = PRIOR.step(token, state)
    states = {0: state, 1: state}
    futures = future_a, future_b
    wanted = [PRIOR.predict(np.concatenate([past, future])) for future in futures]
    for t in range(6):
        for branch, future in enumerate(futures):
            got, states[branch] = PRIOR.step(future[t], states[branch])
            assert_close(got, wanted[branch][6 + t])
    again, _ = PRIOR.step(future_a[0], state)  # the first state still works
    assert_close(again, wanted[0][6])


def test_prior_in_alignment_loss_decode_and_choose_merge(rng):
    tokens = rng.standard_normal((3, 20, 5)).cumsum(axis=1)
    counts = np.array([9, 4, 1])
    # The loss passes positions and sizes of a `Merged` to the prior.
    merged = qm.quickmerge(tokens, counts)
    loss = qm.alignment_loss(merged, PRIOR)
    for b, k in enumerate(counts):
        x = merged.tokens[b, :k]
        options = merged.positions[b, :k], merged.sizes[b, :k]
        predicted_next, predicted_previous = (
            oracle.transformer(x, getattr(PRIOR, d), 3, d == "backward", *options)
            for d in DIRECTIONS
        )
        steps = max(k - 1, 1)  # number of predicted tokens
        forward = ((predicted_next[:-1] - x[1:]) ** 2).mean(-1).sum() / steps
        backward = ((predicted_previous[1:] - x[:-1]) ** 2).mean(-1).sum() / steps
        assert_close(loss.forward[b], forward, "float32")
        assert_close(loss.backward[b], backward, "float32")
    decoded = qm.decode(merged, PRIOR)
    options = {"positions": merged.positions, "sizes": merged.sizes}
    whole = PRIOR.predict(merged.tokens, **options)
    for b, k in enumerate(counts):
        assert_close(decoded[b, :k], whole[b, :k])
    # `choose_merge` compares the losses of two ways to merge.
    candidates = [{"budget": 5, "method": m} for m in ("average", "contiguous")]
    choice = qm.choose_merge(tokens, candidates, PRIOR)
    losses = [qm.alignment_loss(qm.quickmerge(tokens, **c), PRIOR) for c in candidates]
    assert choice.scores.shape == (2, 3)  # (candidates, B)
    gap = choice.scores[0] - choice.scores[1]
    assert np.isfinite(gap).all()
    assert (losses[0].total != losses[1].total).any()


def test_init_is_seeded():
    same, other = (
        qm.TransformerPrior.init(5, hidden_dim=12, num_heads=3, mlp_dim=16, seed=seed)
        for seed in (3, 4)
    )
    assert_same_weights(same, PRIOR)
    name = "blocks.1.mlp_out.weight"
    assert (other.forward[name] != PRIOR.forward[name]).all()
    assert (PRIOR.backward[name] != PRIOR.forward[name]).all()
    assert abs(PRIOR.forward[name]).max() <= 16**-0.5  # 1/√M, M = 16 inputs


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "`dim` must be at least 1"),
        # 10 / 4 is not an integer; 12 / 4 is odd, and rotary positions need pairs.
        ({"hidden_dim": 10}, ValueError, "times an even number, got 10 for 4 heads"),
        ({"hidden_dim": 12}, ValueError, "times an even number"),
        ({"hidden_dim": 2048}, ValueError, "at most 256 wide, got 512"),
        ({"num_layers": 0}, ValueError, "`num_layers` must be at least 1"),
        ({"num_layers": 1 << 40}, ValueError, "`num_layers` must be at most 1024"),
        ({"norm": "batch"}, ValueError, '`norm` must be "rms" or "layer"'),
        ({"num_positions": 0}, ValueError, "`num_positions` must be at least 1"),
        ({"num_positions": -3}, ValueError, "`num_positions` must be at least"),
        ({"num_heads": 2.0}, TypeError, "`num_heads` must be an integer"),
        ({"seed": -1}, ValueError, "`seed`"),
    ],
)
def test_bad_arguments_of_init(change, error, message):
    with pytest.raises(error, match=message):
        qm.TransformerPrior.init(**{"dim": 8, **change})


LEARNED = qm.TransformerPrior.init(5, hidden_dim=4, num_heads=2, num_positions=4)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"tokens": np.ones((3, 4))}, ValueError, "`tokens` must have width D = 5"),
        ({"tokens": np.ones((3, 5), int)}, TypeError, "`tokens` must be float"),
        ({"positions": np.ones(3)}, TypeError, "`positions` must be integers"),
        ({"positions": np.arange(4)}, ValueError, r"`positions` must have shape \(K\)"),
        ({"positions": np.arange(2, 5)}, ValueError, "below 4, .* got 4"),
        ({"tokens": np.ones((5, 5))}, ValueError, "learned 4 positions, too few for 5"),
        ({"sizes": np.ones(4)}, ValueError, r"`sizes` must have shape \(K\) = \(3,\)"),
        ({"sizes": np.array([1, -1, 2])}, ValueError, "`sizes` must be ≥ 0, got -1"),
        ({"sizes": np.array([1, np.nan, 2])}, ValueError, "`sizes` must be finite"),
        ({"sizes": np.ones(3, bool)}, TypeError, "`sizes` must be float"),
        ({"num_groups": 4}, ValueError, "`num_groups`"),
    ],
)
def test_bad_arguments_of_predict(inputs, error, message):
    with pytest.raises(error, match=message):
        LEARNED.predict(**{"tokens": np.ones((3, 5)), **inputs})


@pytest.mark.parametrize(
    ("token", "options", "error", "message"),
    [
        (np.ones(4), {}, ValueError, "`token` must have width D = 5"),
        (np.ones((2, 5)), {}, ValueError, "`token` must have shape"),
        (np.ones(5, "f4"), {}, TypeError, "keep the precision .*float64.*got float32"),
        (np.ones(5), {"position": 1.5}, TypeError, "`position` must be integers"),
        (np.ones(5), {"position": 4}, ValueError, "`position` must be below 4"),
        (np.ones(5), {"size": -1}, ValueError, "`size` must be ≥ 0"),
        (np.ones(5), {"size": np.ones(2)}, ValueError, "`size` must have shape"),
        (np.ones(5), {"size": "three"}, TypeError, "`size` must be float"),
    ],
)
def test_bad_arguments_of_step(token, options, error, message):
    """An error leaves the state as it was: the next step still works."""
    first, state = LEARNED.step(np.ones(5))
    with pytest.raises(error, match=message):
        LEARNED.step(token, state, **options)
    again, _ = LEARNED.step(np.ones(5), state)
    assert_close(again, LEARNED.predict(np.ones((2, 5)))[1])
    assert first.shape == (5,)


# There are 4 learned positions. The fifth step has position 4, which is not learned.
def test_more_steps_than_learned_positions():
    state = None
    for _ in range(4):
        _, state = LEARNED.step(np.ones(5), state)
    with pytest.raises(ValueError, match="learned 4 positions, too few for 5"):
        LEARNED.step(np.ones(5), state)


def state_of(**change):
    """Return a state dict of PRIOR with weights replaced or added; None removes one."""
    weights = {**PRIOR.forward, **change}
    return {name: weight for name, weight in weights.items() if weight is not None}


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "`forward` must hold weights, got none"),
        ({"head.bias": np.ones(5)}, ValueError, "`forward` must hold 'embed.weight'"),
        (state_of(extra=np.ones(1)), ValueError, r"unknown are \['extra'\]"),
        (state_of(**{"head.bias": None}), ValueError, r"missing are \['head.bias'\]"),
        (
            state_of(**{"blocks.1.qkv.bias": np.ones(3)}),
            ValueError,
            r"`forward\['blocks.1.qkv.bias'\]` must have shape .* = \(36,\)",
        ),
        (state_of(**{"head.bias": np.ones(5, int)}), TypeError, "must be float16"),
        (state_of(**{"head.bias": np.full(5, np.inf)}), ValueError, "must be finite"),
    ],
)
def test_weights_that_do_not_fit(inputs, error, message):
    with pytest.raises(error, match=message):
        qm.TransformerPrior.from_state_dict(inputs, PRIOR.backward, num_heads=3)


def test_networks_of_different_configurations_raise():
    one_layer = qm.TransformerPrior.init(5, hidden_dim=12, num_heads=3, num_layers=1)
    with pytest.raises(ValueError, match=r"`backward` .*missing.*'blocks.1.mlp.*more"):
        qm.TransformerPrior(PRIOR.forward, one_layer.backward, 3)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_save_and_load_keep_every_bit(tmp_path, name, rng):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    # Fortran order: safetensors would ignore the strides, so `save` must copy the
    # arrays.
    prior = map_weights(PRIOR, lambda w: np.asfortranarray(w.astype(dtype)))
    prior.save(tmp_path / "prior")
    loaded = qm.TransformerPrior.load(tmp_path / "prior")
    assert_same_weights(loaded, prior)
    tokens = rng.standard_normal((4, 5))
    np.testing.assert_array_equal(loaded.predict(tokens), prior.predict(tokens))
    converted = map_weights(prior, lambda w: w.astype(np.float64))
    assert_close(loaded.predict(tokens), converted.predict(tokens))


def test_load_detects_a_hundred_corruptions(tmp_path, rng):
    path = tmp_path / "prior"
    PRIOR.save(path)
    raw = path.read_bytes()
    # Up to 8 random bytes change. They are in the size, the header, the digest or the
    # data.
    for _ in range(100):
        damaged = bytearray(raw)
        for index in rng.integers(0, len(raw), rng.integers(1, 9)):
            damaged[index] ^= int(rng.integers(1, 256))
        if rng.random() < 0.3:  # cut short as well
            damaged = damaged[: rng.integers(0, len(raw))]
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="prior"):
            qm.TransformerPrior.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "must hold"),  # the file has two blocks
        # The names of the weights of 2⁴⁰ layers would not fit in memory.
        ({"num_layers": 1 << 40}, "at most 1024"),
        ({"hidden_dim": 24}, "must have shape"),
        ({"hidden_dim": "12"}, "`hidden_dim` must be an integer"),
        ({"num_heads": 5}, "an even number"),
        ({"norm": "layer"}, "must hold"),
        ({"more": 1}, "its settings must be"),
    ],
)
def test_settings_that_do_not_match_the_arrays(tmp_path, change, message):
    """The digest is right: anyone can compute it, so shapes are checked too."""
    path = tmp_path / "prior"
    arrays = {
        f"{d}.{name}": w for d in DIRECTIONS for name, w in getattr(PRIOR, d).items()
    }
    settings = {**PRIOR._settings._asdict(), **change}
    save_weights(path, "TransformerPrior", settings, arrays)
    with pytest.raises(ValueError, match=message):
        qm.TransformerPrior.load(path)


def test_pickles_exclude_the_converted_weights(rng):
    prior = map_weights(PRIOR, lambda w: w)  # a new prior, without converted weights
    prior.predict(rng.standard_normal((3, 5)))
    twin = pickle.loads(pickle.dumps(prior))
    assert prior._copies
    assert twin._copies == {}
    assert_same_weights(twin, prior)


@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_kernels_use_the_constants_of_python(rng, kernels, monkeypatch):
    """If Python changes constants that kernels use, the results stay the same.

    The constants are the numbers of the activations, and the limit of the head width.
    """
    tokens = rng.standard_normal((3, 5)).astype(np.float32)
    mlp = qm.MLPPrior.init(5, hidden_dim=8)
    wanted = PRIOR.predict(tokens), mlp.predict(tokens)
    # A kernel that used its own literal numbers would now compute another activation.
    numbers = {"none": 0, "relu": 7, "gelu": 1, "silu": 9}
    monkeypatch.setattr(cuda, "ACTIVATIONS", numbers)
    monkeypatch.setattr(cuda, "MAX_HEAD_DIM", 32)
    ptx.install(monkeypatch)
    # With an empty cache, the kernels are compiled again with these constants.
    monkeypatch.setattr(ptx, "module", functools.cache(ptx.Module))
    with qm.use_kernels(kernels):
        got = PRIOR.predict(tokens), mlp.predict(tokens)
    for x, y in zip(got, wanted, strict=True):
        assert_close(x, y, "float32")
    with pytest.raises(ValueError, match="at most 32 wide, got 34"):
        qm.TransformerPrior.init(5, hidden_dim=34, num_heads=1)

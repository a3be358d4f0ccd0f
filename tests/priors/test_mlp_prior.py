"""The MLP prior: fits, gradients, steps, and weights from torch."""

import copy
import dataclasses
import pickle

import numpy as np
import ptx
import pytest
from conftest import TOLERANCE, assert_close, to_library, to_numpy
from seam import cuda

import qm_cupy as qm
from qm_cupy.priors import training

PRIOR = qm.MLPPrior.init(5, hidden_dim=16, seed=3)


def walks(rng, *shape):
    """Return random walks: a token helps to predict its neighbours."""
    return rng.standard_normal(shape).cumsum(axis=-2)


def pairs_by_loop(sequences, reverse):
    """Return the mean of every prefix (suffix) and the token after (before) it."""
    x, y = [], []
    for tokens in sequences:
        count = len(tokens)
        for t in range(1, count):
            x.append(tokens[count - t :].mean(0) if reverse else tokens[:t].mean(0))
            y.append(tokens[count - t - 1] if reverse else tokens[t])
    return np.array(x), np.array(y)


def ridge_by_least_squares(network, x, y, ridge):
    """Return the output layer, from one least-squares problem with rows of √λ below.

    ‖HW - Y‖² + λ‖W‖² is ‖[H; √λ I] W - [Y; 0]‖². The last column, the bias, has 0 in
    the rows of √λ: it has no penalty.
    """
    w, b = (np.asarray(p, np.float64) for p in network[:2])
    hidden = np.maximum(x @ w.T + b, 0)
    strength = ridge * (hidden**2).sum(0).mean()
    rows = np.hstack([np.sqrt(strength) * np.eye(len(b)), np.zeros((len(b), 1))])
    left = np.vstack([np.hstack([hidden, np.ones((len(x), 1))]), rows])
    right = np.vstack([y, np.zeros((len(b), y.shape[1]))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 10.0])
def test_fit_is_ridge_regression_over_all_prefixes(rng, ridge):
    wide = qm.MLPPrior(
        *(
            qm.MLP(*(w.astype(np.float64) for w in net))
            for net in (PRIOR.forward, PRIOR.backward)
        )
    )
    sequences = [walks(rng, n, 5) for n in (30, 2, 1, 17)]  # one without any pair
    fitted = wide.fit(sequences, ridge=ridge)
    for reverse, (net, old) in enumerate(
        zip(
            (fitted.forward, fitted.backward),
            (wide.forward, wide.backward),
            strict=True,
        )
    ):
        x, y = pairs_by_loop(sequences, reverse)
        weight, bias = ridge_by_least_squares(old, x, y, ridge)
        np.testing.assert_allclose(net.weight_out, weight, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(net.bias_out, bias, rtol=1e-6, atol=1e-7)
        # The ridge fit does not touch the hidden layer.
        np.testing.assert_array_equal(net.weight_in, old.weight_in)
        np.testing.assert_array_equal(net.bias_in, old.bias_in)


def test_fit_is_the_same_in_any_parts(rng, monkeypatch):
    tokens = walks(rng, 9, 12, 5)
    wanted = PRIOR.fit(tokens)
    monkeypatch.setattr(training, "_ROWS", 25)  # blocks of two sequences of 12 tokens
    for sequences in (tokens, list(tokens), iter([tokens[:4], tokens[4:]])):
        for net, other in zip(
            vars(PRIOR.fit(sequences)).values(), vars(wanted).values(), strict=True
        ):
            for x, y in zip(net, other, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_the_scale_of_tokens_does_not_matter(rng):
    """λ is relative to the activations, so scaled tokens give the scaled predictions.

    Without hidden biases, activations scale like tokens. 1024 is a power of two: the
    scale itself adds no rounding.
    """
    plain = PRIOR.forward._replace(bias_in=np.zeros(16, np.float32))
    prior = qm.MLPPrior(plain, plain)
    tokens = walks(rng, 4, 20, 5)
    one, two = prior.fit(tokens), prior.fit(1024 * tokens)
    assert_close(
        two.predict(1024 * tokens[0]) / 1024, one.predict(tokens[0]), "float32"
    )


def test_padding_of_a_merged_is_left_out(rng):
    tokens = walks(rng, 3, 20, 5)
    counts = np.array([9, 4, 1])  # 0, 5 and 8 padded groups
    merged = qm.quickmerge(tokens, counts)
    altered = merged.tokens.copy()
    altered[merged.sizes == 0] = 1e6  # would change the fit if it were read
    fitted = PRIOR.fit(merged._replace(tokens=altered))
    wanted = PRIOR.fit([merged.tokens[b, :k] for b, k in enumerate(counts)])
    assert_close(fitted.predict(tokens[0]), wanted.predict(tokens[0]), "float32")


def test_gradient_by_finite_differences(rng):
    # Random weights: with them, some hidden units fire and some do not.
    network = qm.MLP(*(rng.standard_normal(w.shape) for w in PRIOR.forward))
    x, y = rng.standard_normal((2, 7, 5))

    def loss(weights):
        return training.mean_squared_error(qm.MLP(*weights), lambda: iter([(x, y)]))

    got = training.gradient(network, x, y)
    for part, slope in enumerate(got):
        assert slope.shape == network[part].shape
        for index in np.ndindex(slope.shape):
            sides = []
            for move in (1e-6, -1e-6):
                weights = [w.copy() for w in network]
                weights[part][index] += move
                sides.append(loss(weights))
            wanted = (sides[0] - sides[1]) / 2e-6  # central difference
            np.testing.assert_allclose(slope[index], wanted, rtol=1e-5, atol=1e-8)


def test_adam_by_its_formula(rng):
    network = qm.MLP(*(w.astype(np.float64) for w in PRIOR.forward))
    x, y = rng.standard_normal((2, 40, 5))
    calls = []

    def blocks():
        calls.append(1)
        yield x, y

    # A batch of 100 takes all 40 rows, so that their order only changes the rounding.
    got = training.refine(network, blocks, 3, 0.01, 100, seed=0)
    weights, first, second = list(network), [0] * 4, [0] * 4
    for t in (1, 2, 3):
        slope = training.gradient(qm.MLP(*weights), x, y)
        for i, g in enumerate(slope):
            first[i] = 0.9 * first[i] + 0.1 * g  # m
            second[i] = 0.999 * second[i] + 0.001 * g**2  # v
            step = first[i] / (1 - 0.9**t)
            size = np.sqrt(second[i] / (1 - 0.999**t))
            weights[i] = weights[i] - 0.01 * step / (size + 1e-8)
    for w, wanted in zip(got, weights, strict=True):
        np.testing.assert_allclose(w, wanted, rtol=1e-4, atol=1e-7)
    assert len(calls) == 3 + 2  # one pass for each step and for each of the two errors


def test_steps_lower_the_loss_or_are_dropped(rng):
    tokens = walks(rng, 8, 30, 5)
    ridge = PRIOR.fit(tokens)
    refined = PRIOR.fit(tokens, steps=200)
    again = PRIOR.fit(tokens, steps=200)
    losses = [qm.alignment_loss(tokens, x).total.mean() for x in (refined, ridge)]
    assert losses[0] < 0.99 * losses[1]
    for x, y in zip(refined.forward, again.forward, strict=True):
        np.testing.assert_array_equal(x, y)  # one seed, one result
    # A learning rate that is far too high makes the fit worse: the steps are dropped.
    wild = PRIOR.fit(tokens, steps=3, learning_rate=1e3)
    for x, y in zip(wild.forward, ridge.forward, strict=True):
        np.testing.assert_array_equal(x, y)


def test_fit_beats_the_best_constant_and_the_last_token_held_out(rng):
    """Each sequence has its own mean, which only the mean of the prefix reveals."""
    centres = 2 * rng.standard_normal((500, 1, 5))
    tokens = centres + rng.standard_normal((500, 20, 5))
    train, test = tokens[:450], tokens[450:]
    fitted = qm.MLPPrior.init(5).fit(train)
    # Two predictions that need no prior: the mean of all tokens, and the last token.
    constant = ((test[:, 1:] - train.mean((0, 1))) ** 2).mean()
    last = ((test[:, 1:] - test[:, :-1]) ** 2).mean()
    loss = qm.alignment_loss(test, fitted).forward.mean()
    assert loss < 0.5 * constant
    assert loss < 0.8 * last


def test_fit_of_any_library_is_the_same(rng, library, dtype):
    if library == "array_api_strict" and np.dtype(dtype).itemsize == 2:
        pytest.skip("array-api-strict has no 16 bits")
    tokens = walks(rng, 3, 9, 5).astype(dtype)
    got, wanted = PRIOR.fit(to_library(library, tokens)), PRIOR.fit(tokens)
    for x, y in zip(
        got.forward + got.backward, wanted.forward + wanted.backward, strict=True
    ):
        assert x.dtype == np.float32  # the dtype of the prior's own weights
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"sequences": np.ones((3, 4))},
            ValueError,
            "`sequences` must have width D = 5",
        ),
        ({"sequences": np.ones((1, 5))}, ValueError, "two or more tokens"),
        ({"sequences": []}, ValueError, "two or more tokens"),
        ({"sequences": 3}, TypeError, "an array, a Merged or an iterable"),
        ({"sequences": [[1.0]]}, TypeError, "`sequences` must be an array"),
        ({"sequences": np.full((3, 5), np.nan)}, ValueError, "finite"),
        ({"sequences": iter([]), "steps": 1}, ValueError, "not an iterator"),
        ({"ridge": 0}, ValueError, "`ridge`"),
        ({"steps": -1}, ValueError, "`steps` must be at least 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate`"),
    ],
)
def test_bad_arguments_of_fit(change, error, message):
    with pytest.raises(error, match=message):
        PRIOR.fit(**{"sequences": np.ones((3, 5)), **change})


@pytest.mark.parametrize("shape", [(9, 5), (3, 9, 5), (1, 5)])
def test_steps_are_rows_of_predict(rng, library, dtype, shape):
    if library == "array_api_strict" and np.dtype(dtype).itemsize == 2:
        pytest.skip("array-api-strict has no 16 bits")
    tokens = to_library(library, rng.standard_normal(shape).astype(dtype))
    wanted = to_numpy(PRIOR.predict(tokens))
    state = None
    for t in range(shape[-2]):
        got, state = PRIOR.step(tokens[..., t, :], state)
        assert type(got) is type(tokens)
        actual = to_numpy(got)
        assert actual.dtype == wanted.dtype
        # The sums of `predict` have another order, so the last bits may differ.
        tolerance = TOLERANCE[wanted.dtype.name].computed
        np.testing.assert_allclose(actual, wanted[..., t, :], tolerance, tolerance)


def test_decode_steps(rng, library):
    tokens = to_library(library, walks(rng, 2, 9, 5))
    got = qm.decode(tokens, PRIOR)
    assert type(got) is type(tokens)
    assert_close(to_numpy(got), to_numpy(PRIOR.predict(tokens)))


def test_decode_passes_positions_and_sizes_of_a_merged(rng):
    class Model:
        seen = ()  # a tuple: += then makes an attribute of the instance

        def step(self, token, state=None, *, position=None, size=None):
            self.seen += ((state, position.tolist(), size.tolist()),)
            return token, (state or 0) + 1

    merged, model = qm.quickmerge(walks(rng, 2, 9, 5), 3), Model()
    np.testing.assert_array_equal(qm.decode(merged, model), merged.tokens)
    for t, (state, position, size) in enumerate(model.seen):
        assert state == (t or None)  # None at the first token
        assert position == merged.positions[:, t].tolist()
        assert size == merged.sizes[:, t].tolist()


@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_steps_by_kernels(rng, kernels, dtype, monkeypatch):
    tokens = rng.standard_normal((2, 4, 5)).astype(dtype)
    wanted = PRIOR.predict(tokens)
    ptx.install(monkeypatch)
    prior, state = qm.MLPPrior(PRIOR.forward, PRIOR.backward), None
    with qm.use_kernels(kernels):
        for t in range(4):
            got, state = prior.step(tokens[:, t], state)
            assert_close(got, wanted[:, t], np.result_type(dtype, np.float32))


def test_only_new_copies_of_weights_wait_for_the_gpu(monkeypatch):
    """A wait (`to_host`) costs time, and is needed only if weights were copied."""
    ptx.install(monkeypatch)
    waits, to_host = [], cuda.to_host
    monkeypatch.setattr(cuda, "to_host", lambda x: waits.append(x) or to_host(x))
    prior = qm.MLPPrior(PRIOR.forward, PRIOR.backward)
    prior.predict(np.ones((4, 5), np.float32))
    assert not waits
    prior.predict(np.ones((4, 5)))  # float64: the float32 weights are converted
    assert len(waits) == 1


# Only the running means of a fit come from kernels.
@pytest.mark.parametrize("kernels", ["basic", "optimized"])
def test_fit_by_kernels(rng, kernels, monkeypatch):
    tokens, counts = walks(rng, 3, 9, 5), np.array([9, 4, 1])
    sequences = [tokens[b, :k] for b, k in enumerate(counts)]
    wanted = PRIOR.fit(sequences).predict(tokens)
    ptx.install(monkeypatch)
    with qm.use_kernels(kernels):
        fitted = PRIOR.fit(sequences)
    monkeypatch.undo()  # both priors predict with the reference
    assert_close(fitted.predict(tokens), wanted, "float32")


def test_weights_of_torch(rng):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    networks = [
        torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
        )
        for _ in range(2)
    ]
    prior = qm.MLPPrior.from_state_dict(*(net.state_dict() for net in networks))
    tokens = rng.standard_normal((3, 5)).astype(np.float32)
    means = np.cumsum(tokens, 0) / np.arange(1, 4)[:, None]  # of tokens 1..t
    with torch.no_grad():
        wanted = networks[0](torch.from_numpy(means.astype(np.float32))).numpy()
        networks[0][0].weight.zero_()  # must not change the prior, which has copies
    np.testing.assert_allclose(prior.predict(tokens), wanted, rtol=1e-5, atol=1e-6)


def state(**change):
    """Return a state dict of PRIOR with some weights added or replaced."""
    net = PRIOR.forward
    names = "0.weight", "0.bias", "2.weight", "2.bias"
    return {**dict(zip(names, net, strict=True)), **change}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, ValueError, r"`forward` must have the keys \['0.weight', .*got \[\]"),
        (state(extra=np.ones(1)), ValueError, "must have the keys"),
        (
            state(**{"0.bias": np.ones(3)}),
            ValueError,
            r"`forward\['0.bias'\]` must have",
        ),
        (
            state(**{"2.weight": np.ones((16, 5))}),
            ValueError,
            r"'2.weight'\]` must have",
        ),
        (state(**{"2.bias": np.ones(5, int)}), TypeError, r"'2.bias'\]` must be float"),
    ],
)
def test_weights_that_do_not_fit(weights, error, message):
    with pytest.raises(error, match=message):
        qm.MLPPrior.from_state_dict(weights, state())


def test_directions_of_two_widths():
    other = qm.MLPPrior.init(4, hidden_dim=16).forward
    names = "0.weight", "0.bias", "2.weight", "2.bias"
    with pytest.raises(ValueError, match="have the same width D, got 5 and 4"):
        qm.MLPPrior.from_state_dict(state(), dict(zip(names, other, strict=True)))


@pytest.mark.parametrize("num_tokens", range(1, 60))
def test_means_of_any_number_of_tokens(rng, num_tokens):
    """Means are summed by runs of √K rows: some rows may remain after the last run."""
    both = np.concatenate([np.eye(2), -np.eye(2)])  # (H, D) = (4, 2)
    same = qm.MLP(both, np.zeros(4), both.T, np.zeros(2))  # relu(x) - relu(-x) = x
    prior = qm.MLPPrior(same, same)  # predicts the mean itself
    tokens = rng.standard_normal((3, num_tokens, 2))
    count = np.arange(1, num_tokens + 1)[:, None]
    for reverse, order in ((False, np.s_[:, :]), (True, np.s_[:, ::-1])):
        wanted = (np.cumsum(tokens[order], axis=1) / count)[order]
        assert_close(prior.predict(tokens, reverse=reverse), wanted)


def test_init_is_seeded_and_bounded():
    prior, same, other = (qm.MLPPrior.init(6, seed=seed) for seed in (4, 4, 5))
    assert prior.forward.weight_in.shape == (256, 6)
    assert prior.forward.weight_out.shape == (6, 256)
    for weights, twin, stranger in zip(
        prior.forward + prior.backward,
        same.forward + same.backward,
        other.forward + other.backward,
        strict=True,
    ):
        np.testing.assert_array_equal(weights, twin)
        assert (weights != stranger).all()
    for x, y in zip(prior.forward, prior.backward, strict=True):
        assert (x != y).all()
    # Uniform within ±1/√D for the layer that reads D = 6 inputs.
    assert abs(prior.forward.weight_in).max() <= 6**-0.5


def test_predict_checks_the_width():
    with pytest.raises(
        ValueError, match="`tokens` must have width D = 6 like the prior"
    ):
        qm.MLPPrior.init(6).predict(np.ones((3, 5)))
    with pytest.raises(ValueError, match="at least 1"):
        qm.MLPPrior.init(0)


def test_a_prior_is_pickled_and_copied_without_its_copies_on_gpus():
    # The entry stands for weights on a GPU, which pickles and copies must leave out.
    prior = qm.MLPPrior.init(4, seed=1)
    prior._copies["a GPU", np.dtype("f4"), False] = prior.forward
    twins = pickle.loads(pickle.dumps(prior)), copy.deepcopy(prior)
    for twin in (*twins, dataclasses.replace(prior)):
        assert twin._copies == {}
        for weights, wanted in zip(twin.forward, prior.forward, strict=True):
            np.testing.assert_array_equal(weights, wanted)

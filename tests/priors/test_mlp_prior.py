"""The MLP prior: fits, gradients, steps, and weights from torch.

A prior predicts a merged token from the tokens before it. The forward network reads the
mean of tokens 1..t (a prefix), and the backward network the mean of tokens t..K (a
suffix). D is the width of a token, and H the hidden width.
"""

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
    """Return random walks, in which a token helps to predict its neighbours."""
    return rng.standard_normal(shape).cumsum(axis=-2)


def pairs_of_a_loop(sequences, reverse):
    """Return the mean of every prefix (suffix) and the token after (before) it."""
    x, y = [], []
    for tokens in sequences:
        count = len(tokens)
        for t in range(1, count):
            x.append(tokens[count - t :].mean(0) if reverse else tokens[:t].mean(0))
            y.append(tokens[count - t - 1] if reverse else tokens[t])
    return np.array(x), np.array(y)


def ridge_by_least_squares(network, x, y, ridge):
    """Return the output layer of a ridge regression, from one least-squares problem.

    A holds the activations of the hidden layer, and a column of 1s for the bias. Y are
    the targets, W the weights, and λ the penalty. ‖AW - Y‖² + λ‖W‖² equals
    ‖[A; √λ I] W - [Y; 0]‖²: √λ I is below A, and 0 is below Y. The column of the bias
    has 0 in the rows of √λ, so the bias has no penalty.
    """
    w, b = (np.asarray(p, np.float64) for p in network[:2])
    hidden = np.maximum(x @ w.T + b, 0)
    penalty = ridge * (hidden**2).sum(0).mean()
    rows = np.hstack([np.sqrt(penalty) * np.eye(len(b)), np.zeros((len(b), 1))])
    matrix = np.vstack([np.hstack([hidden, np.ones((len(x), 1))]), rows])
    targets = np.vstack([y, np.zeros((len(b), y.shape[1]))])
    solution = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 10.0])
def test_fit_is_ridge_regression_over_all_prefixes(rng, ridge):
    prior = qm.MLPPrior(
        *(
            qm.MLP(*(w.astype(np.float64) for w in net))
            for net in (PRIOR.forward, PRIOR.backward)
        )
    )
    sequences = [walks(rng, n, 5) for n in (30, 2, 1, 17)]  # one token gives no pair
    fitted = prior.fit(sequences, ridge=ridge)
    for reverse, (net, old) in enumerate(
        zip(
            (fitted.forward, fitted.backward),
            (prior.forward, prior.backward),
            strict=True,
        )
    ):
        x, y = pairs_of_a_loop(sequences, reverse)
        weight, bias = ridge_by_least_squares(old, x, y, ridge)
        np.testing.assert_allclose(net.weight_out, weight, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(net.bias_out, bias, rtol=1e-6, atol=1e-7)
        # The ridge regression does not change the hidden layer.
        np.testing.assert_array_equal(net.weight_in, old.weight_in)
        np.testing.assert_array_equal(net.bias_in, old.bias_in)


def test_fit_does_not_depend_on_the_blocks_of_the_data(rng, monkeypatch):
    tokens = walks(rng, 9, 12, 5)
    wanted = PRIOR.fit(tokens)
    monkeypatch.setattr(training, "_ROWS", 25)  # blocks of two sequences of 12 tokens
    for sequences in (tokens, list(tokens), iter([tokens[:4], tokens[4:]])):
        for net, other in zip(
            vars(PRIOR.fit(sequences)).values(), vars(wanted).values(), strict=True
        ):
            for x, y in zip(net, other, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_fit_of_scaled_tokens_gives_scaled_predictions(rng):
    """The penalty is relative to the activations, so it scales with the tokens.

    The hidden layer has no bias here, so that the activations scale with the tokens
    too. 1024 is a power of two, so the multiplication adds no rounding.
    """
    plain = PRIOR.forward._replace(bias_in=np.zeros(16, np.float32))
    prior = qm.MLPPrior(plain, plain)
    tokens = walks(rng, 4, 20, 5)
    fitted, fitted_to_scaled = prior.fit(tokens), prior.fit(1024 * tokens)
    assert_close(
        fitted_to_scaled.predict(1024 * tokens[0]) / 1024,
        fitted.predict(tokens[0]),
        "float32",
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


def test_gradient_against_differences(rng):
    # With random weights, some hidden activations are 0 and some are not.
    network = qm.MLP(*(rng.standard_normal(w.shape) for w in PRIOR.forward))
    x, y = rng.standard_normal((2, 7, 5))

    def loss(weights):
        return training.mean_squared_error(qm.MLP(*weights), lambda: iter([(x, y)]))

    got = training.gradient(network, x, y)
    for part, gradient in enumerate(got):
        assert gradient.shape == network[part].shape
        for index in np.ndindex(gradient.shape):
            losses = []
            for step in (1e-6, -1e-6):
                weights = [w.copy() for w in network]
                weights[part][index] += step
                losses.append(loss(weights))
            wanted = (losses[0] - losses[1]) / 2e-6  # central difference
            np.testing.assert_allclose(gradient[index], wanted, rtol=1e-5, atol=1e-8)


def test_steps_of_adam_against_its_formula(rng):
    network = qm.MLP(*(w.astype(np.float64) for w in PRIOR.forward))
    x, y = rng.standard_normal((2, 40, 5))
    calls = []

    def blocks():
        calls.append(1)
        yield x, y

    # A batch of 100 contains all 40 rows, so that their order only changes the
    # rounding.
    got = training.refine(network, blocks, 3, 0.01, 100, seed=0)
    weights, first, second = list(network), [0] * 4, [0] * 4
    for t in (1, 2, 3):
        gradient = training.gradient(qm.MLP(*weights), x, y)
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g  # m
            second[i] = 0.999 * second[i] + 0.001 * g**2  # v
            step = first[i] / (1 - 0.9**t)
            size = np.sqrt(second[i] / (1 - 0.999**t))
            weights[i] = weights[i] - 0.01 * step / (size + 1e-8)
    for w, wanted in zip(got, weights, strict=True):
        np.testing.assert_allclose(w, wanted, rtol=1e-4, atol=1e-7)
    assert (
        len(calls) == 3 + 2
    )  # a pass for each step, and one for each of the two errors


def test_steps_lower_the_loss_or_are_dropped(rng):
    tokens = walks(rng, 8, 30, 5)
    ridge = PRIOR.fit(tokens)
    refined = PRIOR.fit(tokens, steps=200)
    again = PRIOR.fit(tokens, steps=200)
    losses = [qm.alignment_loss(tokens, x).total.mean() for x in (refined, ridge)]
    assert losses[0] < 0.99 * losses[1]
    for x, y in zip(refined.forward, again.forward, strict=True):
        np.testing.assert_array_equal(x, y)  # the same seed gives the same result
    # A learning rate that is far too high makes the fit worse: the steps are dropped.
    wild = PRIOR.fit(tokens, steps=3, learning_rate=1e3)
    for x, y in zip(wild.forward, ridge.forward, strict=True):
        np.testing.assert_array_equal(x, y)


def test_fit_predicts_new_sequences_better_than_simple_predictions(rng):
    """Tokens are noise around a mean that differs between sequences.

    The mean of a prefix estimates it, and the fitted network reads this mean.
    """
    centres = 2 * rng.standard_normal((500, 1, 5))
    tokens = centres + rng.standard_normal((500, 20, 5))
    train, test = tokens[:450], tokens[450:]
    fitted = qm.MLPPrior.init(5).fit(train)
    # Two simple predictions: the mean of all training tokens, and the previous token.
    constant_error = ((test[:, 1:] - train.mean((0, 1))) ** 2).mean()
    last_token_error = ((test[:, 1:] - test[:, :-1]) ** 2).mean()
    loss = qm.alignment_loss(test, fitted).forward.mean()
    assert loss < 0.5 * constant_error
    assert loss < 0.8 * last_token_error


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
def test_each_step_returns_a_row_of_predict(rng, library, dtype, shape):
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
        # `predict` adds tokens in another order, so the last bits may differ.
        tolerance = TOLERANCE[wanted.dtype.name].computed
        np.testing.assert_allclose(actual, wanted[..., t, :], tolerance, tolerance)


def test_decode_steps(rng, library):
    tokens = to_library(library, walks(rng, 2, 9, 5))
    got = qm.decode(tokens, PRIOR)
    assert type(got) is type(tokens)
    assert_close(to_numpy(got), to_numpy(PRIOR.predict(tokens)))


def test_decode_passes_positions_and_sizes_of_a_merged(rng):
    class Model:
        seen = ()  # a tuple, so that += creates an attribute of the instance

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
    """`to_host` waits for the GPU. A wait is needed only if weights were copied."""
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


def test_from_state_dict_of_torch(rng):
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
        networks[0][0].weight.zero_()  # the prior has copies, which must not change
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


def test_networks_of_different_widths_raise():
    other = qm.MLPPrior.init(4, hidden_dim=16).forward
    names = "0.weight", "0.bias", "2.weight", "2.bias"
    with pytest.raises(ValueError, match="have the same width D, got 5 and 4"):
        qm.MLPPrior.from_state_dict(state(), dict(zip(names, other, strict=True)))


@pytest.mark.parametrize("num_tokens", range(1, 60))
def test_means_of_any_number_of_tokens(rng, num_tokens):
    """Means are sums over runs of √K rows; for some K, rows remain after the last run.

    The networks compute relu(x) - relu(-x) = x, so they predict the mean that they
    read.
    """
    weights = np.concatenate([np.eye(2), -np.eye(2)])  # (H, D) = (4, 2)
    identity = qm.MLP(weights, np.zeros(4), weights.T, np.zeros(2))
    prior = qm.MLPPrior(identity, identity)
    tokens = rng.standard_normal((3, num_tokens, 2))
    count = np.arange(1, num_tokens + 1)[:, None]
    for reverse, order in ((False, np.s_[:, :]), (True, np.s_[:, ::-1])):
        wanted = (np.cumsum(tokens[order], axis=1) / count)[order]
        assert_close(prior.predict(tokens, reverse=reverse), wanted)


def test_init_is_seeded_and_bounded():
    prior, same, other = (qm.MLPPrior.init(6, seed=seed) for seed in (4, 4, 5))
    assert prior.forward.weight_in.shape == (256, 6)
    assert prior.forward.weight_out.shape == (6, 256)
    for weights, same_seed, other_seed in zip(
        prior.forward + prior.backward,
        same.forward + same.backward,
        other.forward + other.backward,
        strict=True,
    ):
        np.testing.assert_array_equal(weights, same_seed)
        assert (weights != other_seed).all()
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


def test_pickles_and_copies_exclude_the_weights_on_gpus():
    # The entry replaces weights on a GPU.
    prior = qm.MLPPrior.init(4, seed=1)
    prior._copies["a GPU", np.dtype("f4"), False] = prior.forward
    twins = pickle.loads(pickle.dumps(prior)), copy.deepcopy(prior)
    for twin in (*twins, dataclasses.replace(prior)):
        assert twin._copies == {}
        for weights, wanted in zip(twin.forward, prior.forward, strict=True):
            np.testing.assert_array_equal(weights, wanted)

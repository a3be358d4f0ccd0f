"""Models of users: they get copies, and wrong models and results are refused."""

import numpy as np
import pytest
from conftest import assert_close, to_library, to_numpy

import qm_cupy as qm
from qm_cupy.arrays.libraries import library as library_of

PRIOR = qm.MLPPrior.init(4, hidden_dim=3)


def spoil(x):
    """Write zeros into an array of any library that can be written."""
    if x is not None and library_of(x).name != "jax":
        x *= 0


class Spoiler:
    """Predicts as PRIOR, writes into all that it gets, and reuses one result array."""

    def __init__(self):
        self.result = None

    def predict(self, tokens, *, reverse=False, num_groups=None, **parts):
        result = PRIOR.predict(tokens, reverse=reverse, num_groups=num_groups)
        for x in (tokens, *parts.values()):
            spoil(x)
        if isinstance(num_groups, np.ndarray):
            num_groups[...] = 1
        if self.result is None:
            self.result = np.empty_like(result)
        self.result[...] = result
        return self.result

    def step(self, token, state=None, *, position=None, size=None):
        prediction, state = PRIOR.step(token, state)
        for x in (token, position, size):
            spoil(x)
        if library_of(prediction).name == "jax":
            return prediction, state
        if self.result is None:
            self.result = prediction
        self.result[...] = prediction
        return self.result, state


@pytest.fixture
def walks(rng):
    return rng.standard_normal((2, 12, 4)).cumsum(1).astype(np.float32)


@pytest.fixture
def padded(walks):
    """A `Merged` whose sequences have 5 and 3 groups."""
    return qm.quickmerge(walks, np.array([5, 3]))


def bits(arrays):
    return [to_numpy(x).tobytes() for x in arrays]


def of(name, merged):
    """Return a `Merged` with arrays of a library."""
    return qm.Merged(*(to_library(name, x) for x in merged))


def test_alignment_loss_keeps_the_callers_arrays(padded, library):
    merged = of(library, padded)
    before = bits(merged)
    got = qm.alignment_loss(merged, Spoiler())
    assert bits(merged) == before
    for x, y in zip(got, qm.alignment_loss(padded, PRIOR), strict=True):
        np.testing.assert_array_equal(to_numpy(x), y)
    # An array alone, and the counts of the caller.
    counts, tokens = np.array([5, 3]), merged.tokens
    got = qm.alignment_loss(tokens, Spoiler(), num_groups=counts)
    assert counts.tolist() == [5, 3]
    assert bits([tokens]) == before[:1]
    np.testing.assert_array_equal(
        to_numpy(got.total), qm.alignment_loss(padded, PRIOR).total
    )


def test_decode_by_steps_keeps_the_callers_arrays(padded, library):
    merged = of(library, padded)
    before = bits(merged)
    got = qm.decode(merged, Spoiler())
    assert bits(merged) == before
    np.testing.assert_array_equal(to_numpy(got), qm.decode(padded, PRIOR))


def test_decode_by_prefixes_keeps_the_callers_arrays(padded, library):
    merged, seen = of(library, padded), []

    def model(prefix):
        seen.append(to_numpy(prefix).copy())
        spoil(prefix)
        return prefix

    before = bits(merged)
    qm.decode(merged, model)
    assert bits(merged) == before
    for t, prefix in enumerate(seen):
        np.testing.assert_array_equal(prefix, padded.tokens[:, : t + 1])


def test_decode_keeps_predictions_of_a_model_that_reuses_its_array(walks):
    buffer = np.zeros((2, 12, 4), np.float32)

    def model(prefix):
        t = prefix.shape[-2]
        buffer[:, :t] = t * np.ones_like(prefix)
        return buffer[:, :t]

    got = qm.decode(walks, model)
    np.testing.assert_array_equal(got[0, :, 0], np.arange(1, 13))


def test_choose_merge_keeps_its_results(walks, library):
    tokens = to_library(library, walks)
    ways = [{"method": "average"}, {"method": "ward"}]
    got = qm.choose_merge(tokens, ways, Spoiler(), budget=5)
    wanted = qm.choose_merge(walks, ways, PRIOR, budget=5)
    assert bits([tokens]) == bits([walks])
    assert bits((*got.merged, got.scores)) == bits((*wanted.merged, wanted.scores))


def test_the_classes_of_the_paper_keep_the_callers_arrays(walks):
    before = walks.copy()
    got = qm.BidirectionalARAlignment(4, prior=Spoiler()).forward_loss(walks)
    wanted = qm.BidirectionalARAlignment(4, prior=PRIOR).forward_loss(walks)
    assert got == wanted
    np.testing.assert_array_equal(walks, before)

    def model(prefix):
        prefix *= 0
        return prefix

    merged, _ = qm.QuickMergePP(4).inference(walks, 5, model)
    wanted, _ = qm.QuickMergePP(4).inference(walks, 5)
    np.testing.assert_array_equal(merged, wanted)


class Named:
    """Has weights of two layers, but no `predict`."""

    def __init__(self, weights):
        self.weights = weights

    def network_weights(self):
        return self.weights


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_prior_with_weights_alone_predicts(walks, name):
    if name != "numpy":
        pytest.importorskip(name)
    weights = tuple(to_library(name, np.array(w)) for w in PRIOR.network_weights())
    got = qm.alignment_loss(walks, Named(weights))
    wanted = qm.alignment_loss(walks, PRIOR)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    assert qm.choose_merge(walks, [{}], Named(weights), budget=5).scores.shape == (1, 2)


def test_a_prior_with_weights_alone_predicts_as_it_does_traced(walks):
    torch = pytest.importorskip("torch")
    prior, tokens = Named(PRIOR.network_weights()), torch.tensor(walks)
    plain = qm.alignment_loss(tokens, prior).total
    traced = qm.alignment_loss(tokens.requires_grad_(), prior).total
    assert torch.equal(plain, traced.detach())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((), ValueError, "must return 8 weights, got 0"),
        (PRIOR.forward, ValueError, "must return 8 weights, got 4"),
        (
            (*PRIOR.network_weights()[:7], None),
            TypeError,
            r"`prior.network_weights\(\)\[7\]`",
        ),
        (
            (*PRIOR.network_weights()[:7], np.ones(3)),
            ValueError,
            r"`backward.bias_out` must have shape \(D\) = \(4,\), got \(3,\)",
        ),
    ],
)
def test_wrong_weights(walks, weights, error, message):
    with pytest.raises(error, match=message):
        qm.alignment_loss(walks, Named(weights))


def raise_if_called(*arguments, **options):
    raise AssertionError("work was done before the check")


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (None, "`prior` must have a method `predict` or .*, got NoneType"),
        ("MLPPrior", "got str"),
        (np.tanh, "got ufunc"),
        (qm.MLPPrior, "`prior` must be an object, got the class MLPPrior"),
        (type("Empty", (), {"predict": None})(), "got Empty"),
    ],
)
def test_objects_that_are_not_priors(walks, prior, message, monkeypatch):
    monkeypatch.setattr("qm_cupy.choice.quickmerge", raise_if_called)
    for call in (
        lambda: qm.alignment_loss(walks, prior),
        lambda: qm.choose_merge(walks, [{}], prior, budget=3),
        lambda: qm.BidirectionalARAlignment(4, prior=prior or "None"),
    ):
        wanted = message.replace("NoneType", "(NoneType|str)")
        with pytest.raises(TypeError, match=wanted):
            call()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "`model` must be callable or have a method `step`, .*got NoneType"),
        (3, "got int"),
        (qm.MLPPrior, "`model` must be an object, got the class MLPPrior"),
        (type("Predicts", (), {"predict": len})(), "got Predicts"),
    ],
)
def test_objects_that_are_not_models(walks, model, message, monkeypatch):
    with pytest.raises(TypeError, match=message):
        qm.decode(walks, model)
    if model is not None:  # None means "no model" for these
        monkeypatch.setattr("qm_cupy.paper.quickmerge", raise_if_called)
        with pytest.raises(TypeError, match=message):
            qm.QuickMergePP(4).inference(walks, 3, model)
        with pytest.raises(TypeError, match=message):
            qm.quickmerge_inference(walks[0], model)


class Returns:
    """A prior and a model with results that a function computes from the tokens."""

    def __init__(self, result):
        self.result = result

    def predict(self, tokens, **options):
        return self.result(tokens)

    def step(self, token, state=None, **options):
        return self.result(token)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: None, TypeError, "must return a NumPy array, .* got .*NoneType"),
        (lambda x: x.tolist(), TypeError, "`prior.predict` must .* got builtins.list"),
        (lambda x: x.astype(int), TypeError, "`prediction` must be float16, .*int64"),
        (lambda x: x * 1j, TypeError, "`prediction` must be float16, .*complex"),
        (lambda x: x[..., :1], ValueError, "`prediction` must have shape"),
        (lambda x: x[0], ValueError, r"`prediction` must have shape \(B, K, D\)"),
    ],
)
def test_wrong_predictions(walks, result, error, message):
    with pytest.raises(error, match=message):
        qm.alignment_loss(walks, Returns(result))


def test_a_prediction_of_another_library(walks):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"a NumPy array, .* got torch.Tensor"):
        qm.alignment_loss(walks, Returns(torch.from_numpy))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_prediction_of_another_dtype(walks, dtype):
    """The loss has the dtype of the tokens' losses, as on a GPU."""
    got = qm.alignment_loss(walks, Returns(lambda x: x.astype(dtype)))
    rounded = Returns(lambda x: x.astype(dtype).astype(np.float64))
    wanted = qm.alignment_loss(walks.astype(np.float64), rounded)
    assert got.total.dtype == np.float32
    assert_close(got.total, wanted.total, np.float32)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: None, TypeError, "`model` must return an array, got NoneType"),
        (lambda x: [[1.0]], TypeError, "`model` must return an array, got list"),
        (lambda x: 1.0, TypeError, "`model` must return an array, got float"),
        (
            lambda x: np.ones(4),
            ValueError,
            r"`model` must return shape \(..., t, E\) for a prefix of shape "
            r"\(2, 1, 4\), got \(4,\)",
        ),
        (
            lambda x: x[..., : 4 - x.shape[-2] // 2],
            ValueError,
            "arrays of one width E for all tokens, got 4, then 3",
        ),
    ],
)
def test_wrong_results_of_a_callable(walks, result, error, message):
    with pytest.raises(error, match=message):
        qm.decode(walks, result)


def test_results_of_two_libraries(walks):
    torch = pytest.importorskip("torch")

    def model(prefix):
        return torch.from_numpy(prefix) if prefix.shape[-2] > 1 else prefix

    with pytest.raises(
        TypeError, match="of one type for all tokens, got ndarray, then"
    ):
        qm.decode(walks, model)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x, TypeError, "`model.step` must return a tuple .* got ndarray"),
        (lambda x: (x,), TypeError, "`model.step` must return a tuple"),
        (lambda x: (None, 0), TypeError, "`model` must return an array, got NoneType"),
        (
            lambda x: (x[0], 0),
            ValueError,
            r"predict an array of shape \(B, E\) with B = 2 .* got shape \(4,\)",
        ),
        (lambda x: (x[:1], 0), ValueError, r"with B = 2 .* got shape \(1, 4\)"),
    ],
)
def test_wrong_results_of_a_step(walks, result, error, message):
    with pytest.raises(error, match=message):
        qm.decode(walks, Returns(result))


@pytest.mark.parametrize("workspace", ["x", 3, qm.Workspace])
def test_a_wrong_workspace(walks, workspace):
    with pytest.raises(TypeError, match="`workspace` must be a Workspace or None, got"):
        qm.quickmerge(walks, 3, workspace=workspace)

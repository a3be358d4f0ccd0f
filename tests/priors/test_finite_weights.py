"""Weights with a NaN or Inf are refused when a prior is made, saved, fitted or read."""

import numpy as np
import ptx
import pytest
from conftest import to_library

import qm_cupy as qm

MLP_PRIOR = qm.MLPPrior.init(3, hidden_dim=4)
TRANSFORMER = qm.TransformerPrior.init(3, hidden_dim=4, num_heads=2, norm="layer")
KEYS = "0.weight", "0.bias", "2.weight", "2.bias"


def spoiled(weight, value):
    """Return a copy with `value` as its last entry, and the index of this entry."""
    copy = np.array(weight)
    copy.flat[-1] = value
    return copy, tuple(n - 1 for n in copy.shape)


def finite_error(name, value, index):
    """Return the pattern of the error for a weight."""
    at = ", ".join(map(str, index)) + ("," if len(index) == 1 else "")
    return rf"`{name}` must be finite, got {value} at index \({at}\)"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("field", qm.MLP._fields)
def test_mlp_prior(tmp_path, value, direction, field):
    networks = {"forward": MLP_PRIOR.forward, "backward": MLP_PRIOR.backward}
    bad, index = spoiled(getattr(networks[direction], field), value)
    networks[direction] = networks[direction]._replace(**{field: bad})
    wanted = finite_error(rf"{direction}.{field}", value, index)
    with pytest.raises(ValueError, match=wanted):
        qm.MLPPrior(**networks)
    states = {
        name: dict(zip(KEYS, network, strict=True))
        for name, network in networks.items()
    }
    with pytest.raises(ValueError, match=rf"`{direction}\['.*'\]` must be finite"):
        qm.MLPPrior.from_state_dict(**states)
    # An array that becomes wrong later is refused when the prior is saved.
    good = np.array(getattr(MLP_PRIOR.forward, field))
    prior = qm.MLPPrior(MLP_PRIOR.forward._replace(**{field: good}), MLP_PRIOR.backward)
    good[index] = value
    path = tmp_path / "prior"
    wanted = f"{path} was not written: {finite_error(f'forward.{field}', value, index)}"
    with pytest.raises(ValueError, match=wanted):
        prior.save(path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_transformer_prior(tmp_path, direction):
    for key, weight in getattr(TRANSFORMER, direction).items():
        networks = {"forward": TRANSFORMER.forward, "backward": TRANSFORMER.backward}
        bad, index = spoiled(weight, np.nan)
        networks[direction] = {**networks[direction], key: bad}
        wanted = finite_error(rf"{direction}\['{key}'\]", "nan", index)
        with pytest.raises(ValueError, match=wanted):
            qm.TransformerPrior(**networks, num_heads=2)
        bad[index] = 0
        prior = qm.TransformerPrior(**networks, num_heads=2)
        bad[index] = np.nan
        with pytest.raises(ValueError, match=f"{direction}.{key}` must be finite"):
            prior.save(tmp_path / "prior")
    assert not [*tmp_path.iterdir()]


def test_the_setting_check_finite_applies():
    bad, _ = spoiled(MLP_PRIOR.forward.bias_out, np.nan)
    network = MLP_PRIOR.forward._replace(bias_out=bad)
    with qm.check_finite(False):
        prior = qm.MLPPrior(network, MLP_PRIOR.backward)
        assert np.isnan(prior.predict(np.ones((2, 3)))).any()


def test_weights_on_a_gpu_are_not_read(monkeypatch):
    bad, _ = spoiled(MLP_PRIOR.forward.bias_out, np.nan)
    ptx.install(monkeypatch)  # all arrays count as those of a GPU
    qm.MLPPrior(MLP_PRIOR.forward._replace(bias_out=bad), MLP_PRIOR.backward)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_weights_of_a_framework_are_checked_when_they_are_read(name, tmp_path, rng):
    """They may be traced, or may change after the prior is made."""
    pytest.importorskip(name)
    tokens = rng.standard_normal((4, 3)).astype(np.float32)
    bad, index = spoiled(MLP_PRIOR.forward.weight_in, np.nan)
    networks = [
        qm.MLP(*(to_library(name, np.array(w)) for w in network))
        for network in (MLP_PRIOR.forward._replace(weight_in=bad), MLP_PRIOR.backward)
    ]
    prior = qm.MLPPrior(*networks)
    wanted = finite_error("forward.weight_in", "nan", index)
    calls = {
        "predict": lambda: prior.predict(to_library(name, tokens)),
        "step": lambda: prior.step(to_library(name, tokens[0])),
        "fit": lambda: prior.fit(to_library(name, tokens)),
        "save": lambda: prior.save(tmp_path / "prior"),
        "loss": lambda: qm.alignment_loss(to_library(name, tokens), prior),
        "gradient": lambda: qm.alignment_loss_vjp((0, 0, 1.0), tokens, prior),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=wanted.replace("forward.", "forward[._]")):
            call()
    weights = {k: to_library(name, np.array(w)) for k, w in TRANSFORMER.forward.items()}
    bad, index = spoiled(TRANSFORMER.forward["head.bias"], np.inf)
    weights["head.bias"] = to_library(name, bad)
    transformer = qm.TransformerPrior(weights, TRANSFORMER.backward, 2)
    with pytest.raises(ValueError, match=r"`forward\['head.bias'\]` must be finite"):
        transformer.predict(tokens)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_weights_of_a_framework_fit_save_and_predict(name, tmp_path, rng):
    """The results are those of the same weights in NumPy."""
    pytest.importorskip(name)
    tokens = rng.standard_normal((6, 3)).astype(np.float32)
    prior = qm.MLPPrior(
        *(
            qm.MLP(*(to_library(name, np.array(w)) for w in network))
            for network in (MLP_PRIOR.forward, MLP_PRIOR.backward)
        )
    )
    got, wanted = prior.fit(tokens, steps=3), MLP_PRIOR.fit(tokens, steps=3)
    for x, y in zip(got.network_weights(), wanted.network_weights(), strict=True):
        assert type(x) is np.ndarray
        np.testing.assert_array_equal(x, y)
    prior.save(tmp_path / "prior")
    MLP_PRIOR.save(tmp_path / "wanted")
    assert (tmp_path / "prior").read_bytes() == (tmp_path / "wanted").read_bytes()
    gradients = [
        qm.alignment_loss_vjp((0, 0, 1.0), tokens, x)[0] for x in (prior, MLP_PRIOR)
    ]
    np.testing.assert_array_equal(*gradients)
    networks = [
        {k: to_library(name, np.array(w)) for k, w in network.items()}
        for network in (TRANSFORMER.forward, TRANSFORMER.backward)
    ]
    transformer = qm.TransformerPrior(*networks, 2)
    np.testing.assert_array_equal(
        transformer.predict(tokens), TRANSFORMER.predict(tokens)
    )
    transformer.save(tmp_path / "transformer")
    loaded = qm.TransformerPrior.load(tmp_path / "transformer")
    np.testing.assert_array_equal(loaded.predict(tokens), TRANSFORMER.predict(tokens))


def test_parameters_of_torch_that_require_grad(rng):
    torch = pytest.importorskip("torch")
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in MLP_PRIOR.forward]
    prior = qm.MLPPrior(qm.MLP(*weights), qm.MLP(*weights))
    with pytest.raises(TypeError, match=r"`forward.weight_in` requires grad"):
        prior.fit(rng.standard_normal((4, 3)))
    with torch.no_grad():
        prior.fit(rng.standard_normal((4, 3)))


def test_detach_of_a_torch_prior():
    torch = pytest.importorskip("torch")
    from qm_cupy.torch import MLPPrior

    prior = MLPPrior.init(3, hidden_dim=4)
    with torch.no_grad():
        prior.backward_prior[2].bias[1] = torch.nan
    with pytest.raises(ValueError, match=r"`backward\['2.bias'\]` must be finite, got"):
        prior.detach()
    with pytest.raises(ValueError, match=r"must be finite, got nan at index \(1,\)"):
        prior(torch.ones(2, 3))
    bad, _ = spoiled(MLP_PRIOR.forward.bias_in, np.inf)
    with pytest.raises(ValueError, match=r"`forward.bias_in` must be finite"):
        MLPPrior(MLP_PRIOR.forward._replace(bias_in=bad), MLP_PRIOR.backward)


def test_trees_of_jax_may_hold_any_values():
    """A tree of gradients is not a prior that predicts, so it is not checked."""
    jax = pytest.importorskip("jax")
    import qm_cupy.jax  # noqa: F401 (registers the trees)

    tree = jax.tree.map(lambda w: jax.numpy.full_like(w, np.nan), MLP_PRIOR)
    assert np.isnan(tree.forward.weight_in).all()
    with pytest.raises(ValueError, match="must be finite"):
        qm.alignment_loss(np.ones((3, 3)), tree)


@pytest.mark.parametrize(
    ("tokens", "dtype", "message"),
    [
        # The weights are float32, and the largest float32 is 3.4e38.
        (1e60, np.float32, r"the fit fails: `forward.\w+` must be finite.*float32"),
        (1e60, np.float16, r"the fit fails: `forward.\w+` must be finite.*float16"),
        # Squares of 1e200 overflow float64.
        (1e200, np.float64, r"(must be finite.*float64|no unique solution)"),
    ],
)
def test_a_fit_that_overflows(rng, tokens, dtype, message):
    networks = [
        qm.MLP(*(w.astype(dtype) for w in network))
        for network in (MLP_PRIOR.forward, MLP_PRIOR.backward)
    ]
    with pytest.raises(ValueError, match=f"{message}.*scale the tokens down"):
        qm.MLPPrior(*networks).fit(tokens * rng.standard_normal((9, 3)))


def test_a_fit_without_a_unique_solution():
    """All activations are equal, and λ is lost in the sums of their squares."""
    network = qm.MLP(np.ones((4, 3)), np.zeros(4), np.ones((3, 4)), np.zeros(3))
    prior = qm.MLPPrior(network, network)
    with pytest.raises(ValueError, match=r"no unique .*raise `ridge`, got 1e-300"):
        prior.fit(np.ones((9, 3)), ridge=1e-300)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_in": np.ones(4)}, ValueError, r"`forward.weight_in` must have shape"),
        ({"weight_in": np.ones((4, 0))}, ValueError, r"\(H, D\), got \(4, 0\)"),
        (
            {"bias_in": np.ones(3)},
            ValueError,
            r"`forward.bias_in` must have shape \(H\) = \(4,\), got \(3,\)",
        ),
        (
            {"weight_out": np.ones((4, 3))},
            ValueError,
            r"`forward.weight_out` must have shape \(D, H\) = \(3, 4\), got \(4, 3\)",
        ),
        ({"bias_out": [0, 0, 0]}, TypeError, "`forward.bias_out` must be an array"),
        (
            {"bias_out": np.ones(3, int)},
            TypeError,
            "`forward.bias_out` must be float16",
        ),
    ],
)
def test_weights_of_a_wrong_shape_or_type(change, error, message):
    with pytest.raises(error, match=message):
        qm.MLPPrior(MLP_PRIOR.forward._replace(**change), MLP_PRIOR.backward)


def test_both_networks_have_the_same_widths():
    wider = qm.MLPPrior.init(3, hidden_dim=5).backward
    longer = qm.MLPPrior.init(2, hidden_dim=4).backward
    states = [dict(zip(KEYS, x, strict=True)) for x in (MLP_PRIOR.forward, wider)]
    with pytest.raises(ValueError, match="the same hidden width H, got 4 and 5"):
        qm.MLPPrior.from_state_dict(*states)
    with pytest.raises(ValueError, match="the same hidden width H, got 4 and 5"):
        qm.MLPPrior(MLP_PRIOR.forward, wider)
    with pytest.raises(ValueError, match="the same width D, got 3 and 2"):
        qm.MLPPrior(MLP_PRIOR.forward, longer)
    with pytest.raises(TypeError, match="`backward` must be an MLP, got tuple"):
        qm.MLPPrior(MLP_PRIOR.forward, tuple(MLP_PRIOR.backward))

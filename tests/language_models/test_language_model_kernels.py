"""A language model on a device whose kernels are interpreted.

Arrays of the device refuse those of the host (`device_values`), and the expected values
are those of the reference, whose logits are tested against transformers.
"""

import device_values
import numpy as np
import pytest
from conftest import assert_close
from device_array import DeviceArray
from llama_models import ids_of

import qm_cupy as qm

KERNELS = pytest.mark.parametrize("kernels", ["basic", "optimized"])


@pytest.fixture
def model():
    """Return a new model, which has no weights on a device yet."""
    return qm.LanguageModel.init(
        101, 24, num_heads=4, num_key_heads=2, num_layers=2, mlp_dim=40
    )


# Arrays that the stand-in takes for those of a GPU.
def on_device(*arrays):
    return [np.asarray(x).view(DeviceArray) for x in arrays]


def host(x):
    assert isinstance(x, DeviceArray)
    return x.view(np.ndarray)


@KERNELS
def test_predictions_and_states(kernels, model, monkeypatch):
    ids, more = ids_of(2, 37), ids_of(2, 3, seed=1)
    tokens = model.embed(ids)
    # Positions with gaps, as those of merged tokens.
    sizes = np.random.default_rng(0).integers(1, 4, (2, 37))
    positions = np.cumsum(sizes, axis=-1) - 1
    layout = {"positions": positions, "sizes": sizes}
    predicted = model.predict(tokens, **layout)
    logits, state = model.read(ids)
    next_logits, after = model.read(more, state)
    # From here on, the reference is not used any more.
    reads = device_values.install(monkeypatch)
    with qm.use_kernels(kernels):
        device = on_device(ids, more, positions, sizes)
        embedded = model.embed(device[0])
        np.testing.assert_array_equal(host(embedded), tokens)
        layout = {"positions": device[2], "sizes": device[3]}
        assert_close(host(model.predict(embedded, **layout)), predicted, "float32")
        got, device_state = model.read(device[0])
        assert_close(host(got), logits, "float32")
        # The state before the next tokens, to which a step returns below.
        first = device_state
        got, device_state = model.read(device[1], device_state)
        assert_close(host(got), next_logits, "float32")
        for name in ("keys", "values", "bias"):
            x = host(getattr(device_state, name))
            assert_close(x, getattr(after, name), "float32")
        x = host(device_state.attended.mean())
        assert_close(x, after.attended.mean(), "float32")
        # One token by its embedding, after an earlier state.
        got, _ = model.step(model.embed(device[1])[:, 0], first)
        assert_close(host(got), next_logits[:, 0], "float32")
    # The host waits once for the weights, and for nothing else.
    assert reads == ["to_host"]


@KERNELS
def test_merged_states(kernels, model, monkeypatch):
    ids, more = ids_of(2, 60), ids_of(2, 3, seed=1)
    # The positions of first members need minima of groups.
    options = {"sinks": 2, "recent": 6, "rotate_at": "first"}
    state = model.read(ids)[1].merge(20, **options)
    wanted, _ = model.read(more, state)
    device_values.install(monkeypatch)
    with qm.use_kernels(kernels):
        device = on_device(ids, more)
        merged = model.read(device[0])[1].merge(20, **options)
        for name in ("keys", "values", "bias"):
            np.testing.assert_allclose(
                host(getattr(merged, name)), getattr(state, name), atol=1e-4
            )
        # What the next merge needs.
        for name in ("received", "counts"):
            np.testing.assert_allclose(
                host(getattr(merged.attended, name)),
                getattr(state.attended, name),
                atol=1e-4,
            )
        assert merged.counts == state.counts
        for layer, wanted_layer in zip(merged.entries, state.entries, strict=True):
            np.testing.assert_array_equal(host(layer.positions), wanted_layer.positions)
        got, _ = model.read(device[1], merged)
        np.testing.assert_allclose(host(got), wanted, atol=1e-3)


@KERNELS
def test_generation(kernels, model, monkeypatch):
    ids = ids_of(2, 60)
    # Two merges after the prompt, with heads of different lengths.
    options = {"budget": 30, "every": 4, "per_head": True, "sinks": 1}
    plain, wanted = model.generate(ids, 9), model.generate(ids, 9, **options)
    stop = int(plain[0, 3])
    device_values.install(monkeypatch)
    with qm.use_kernels(kernels):
        (text,) = on_device(ids)
        np.testing.assert_array_equal(host(model.generate(text, 9)), plain)
        np.testing.assert_array_equal(host(model.generate(text, 9, **options)), wanted)
        # The host reads whether a text has ended.
        stopped = host(model.generate(text[0], 9, stop=stop))
        np.testing.assert_array_equal(stopped, plain[0, : len(stopped)])
        assert stopped[-1] == stop


def test_ids_that_are_out_of_range_read_no_other_memory(model, monkeypatch):
    """The host does not read ids of a device, so the nearest valid id is used."""
    wanted = model.embed(np.array([0, 100]))
    device_values.install(monkeypatch)
    (ids,) = on_device(np.array([-5, 2**40]))
    np.testing.assert_array_equal(host(model.embed(ids)), wanted)

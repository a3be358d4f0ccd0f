"""Files of weights: there and back, and whatever may have happened to them."""

import hashlib
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

import qm_cupy as qm
from qm_cupy.priors.weights import save_weights

PRIOR = qm.MLPPrior.init(5, hidden_dim=7, seed=3)


def cast(prior, change):
    networks = prior.forward, prior.backward
    return qm.MLPPrior(*(qm.MLP(*map(change, network)) for network in networks))


def weights(prior):
    return prior.forward + prior.backward


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "prior.safetensors"
    PRIOR.save(found)
    return found


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_there_and_back_bit_for_bit(tmp_path, kind):
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    prior = cast(PRIOR, lambda w: w.astype(dtype))
    prior.save(str(tmp_path / "prior"))
    for x, y in zip(
        weights(qm.MLPPrior.load(tmp_path / "prior")), weights(prior), strict=True
    ):
        assert x.dtype == dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def test_strides_are_not_lost(tmp_path):
    """Columns in front, backwards, and every other entry."""
    layouts = (
        np.asfortranarray,
        lambda w: w[..., ::-1].copy()[..., ::-1],
        lambda w: np.repeat(w, 2, axis=-1)[..., ::2],
    )
    for layout in layouts:
        cast(PRIOR, layout).save(tmp_path / "prior")
        for x, y in zip(
            weights(qm.MLPPrior.load(tmp_path / "prior")), weights(PRIOR), strict=True
        ):
            np.testing.assert_array_equal(x, y)


def test_others_can_read_it_and_the_same_prior_gives_the_same_bytes(path, tmp_path):
    arrays = load(path.read_bytes())
    np.testing.assert_array_equal(arrays["forward.weight_in"], PRIOR.forward.weight_in)
    PRIOR.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_any_changed_byte_is_found(path):
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(header), *rng.integers(header, len(raw), 200)]
    for place in places:
        other = raw[place] ^ int(rng.integers(1, 256))
        path.write_bytes(raw[:place] + bytes([other]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=r"prior\.safetensors"):
            qm.MLPPrior.load(path)
    space = raw[:header].rfind(b" ")  # which JSON would not miss
    path.write_bytes(raw[:space] + b"\t" + raw[space + 1 :])
    with pytest.raises(ValueError, match="digest"):
        qm.MLPPrior.load(path)


def test_a_file_cut_short_or_longer_is_refused(path):
    raw = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, *range(200, len(raw), 97), len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="damaged"):
            qm.MLPPrior.load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        qm.MLPPrior.load(path)


def test_a_header_of_any_size_is_refused_before_it_is_read(path):
    raw = path.read_bytes()
    for size in (2**63, 2**40, len(raw)):
        path.write_bytes(size.to_bytes(8, "little") + raw[8:])
        with pytest.raises(ValueError, match="damaged"):
            qm.MLPPrior.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"qm_cupy": "[]"}])
def test_files_of_other_programs(path, metadata):
    arrays = load(path.read_bytes())
    path.write_bytes(save(arrays, metadata=metadata))
    with pytest.raises(ValueError, match="was not saved by a prior of qm_cupy"):
        qm.MLPPrior.load(path)
    path.write_bytes(b"PK\3\4 a zip, say" * 20)
    with pytest.raises(ValueError, match=r"damaged or no \.safetensors file"):
        qm.MLPPrior.load(path)


def arrays_of(prior):
    both = {"forward": prior.forward, "backward": prior.backward}
    return {
        f"{direction}.{name}": w
        for direction, network in both.items()
        for name, w in network._asdict().items()
    }


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"dim": 4, "hidden_dim": 7}, {}, "`forward.weight_in` must have shape"),
        ({"dim": 10**9, "hidden_dim": 10**9}, {}, "must have shape"),
        ({"dim": -1, "hidden_dim": 7}, {}, "must be at least 1"),
        ({"dim": "5", "hidden_dim": 7}, {}, "must be at least 1"),
        ({"dim": 5}, {}, "must be at least 1"),
        ({}, {"extra": np.ones(3)}, "it holds"),
        ({}, {"forward.bias_in": np.ones(7, np.int32)}, "must be one of float16"),
    ],
)
def test_settings_and_arrays_that_do_not_go_together(path, settings, change, message):
    """With a digest that is right: it is no signature."""
    settings = settings or {"dim": 5, "hidden_dim": 7}
    arrays = {**arrays_of(PRIOR), **change}
    save_weights(path, "MLPPrior", settings, arrays)
    with pytest.raises(ValueError, match=message):
        qm.MLPPrior.load(path)


def test_another_kind_of_prior(path):
    save_weights(path, "Other", {}, arrays_of(PRIOR))
    with pytest.raises(ValueError, match="holds a Other, not a MLPPrior"):
        qm.MLPPrior.load(path)


def test_what_cannot_be_written_leaves_what_was_there(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(hashlib, "sha256", None)
    with pytest.raises(TypeError):
        PRIOR.save(path)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_without_the_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (PRIOR.save, qm.MLPPrior.load):
        with pytest.raises(ImportError, match=r"qm-cupy\[safetensors\]"):
            call(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        qm.MLPPrior.load(tmp_path / "nowhere")

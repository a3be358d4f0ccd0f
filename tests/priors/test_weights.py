"""Files of weights: saved, loaded, damaged, and written by other programs."""

import hashlib
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

import qm_cupy as qm
from qm_cupy.priors.weights import save_weights

PRIOR = qm.MLPPrior.init(5, hidden_dim=7, seed=3)


def map_weights(prior, change):
    """Return a prior with `change` applied to every weight."""
    networks = prior.forward, prior.backward
    return qm.MLPPrior(*(qm.MLP(*map(change, network)) for network in networks))


def weights(prior):
    return prior.forward + prior.backward


@pytest.fixture
def path(tmp_path):
    """Path of a file with PRIOR, which a test may damage."""
    file = tmp_path / "prior.safetensors"
    PRIOR.save(file)
    return file


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_save_and_load_keep_every_bit(tmp_path, name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    prior = map_weights(PRIOR, lambda w: w.astype(dtype))
    prior.save(str(tmp_path / "prior"))
    for x, y in zip(
        weights(qm.MLPPrior.load(tmp_path / "prior")), weights(prior), strict=True
    ):
        assert x.dtype == dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def test_arrays_that_are_not_contiguous_are_saved_correctly(tmp_path):
    """safetensors writes the memory of an array without its strides.

    So `save` must copy arrays that are not C-contiguous.
    """
    layouts = (
        np.asfortranarray,  # the first axis is contiguous
        lambda w: w[..., ::-1].copy()[..., ::-1],  # in reverse order in memory
        lambda w: np.repeat(w, 2, axis=-1)[..., ::2],  # every other entry
    )
    for layout in layouts:
        map_weights(PRIOR, layout).save(tmp_path / "prior")
        for x, y in zip(
            weights(qm.MLPPrior.load(tmp_path / "prior")), weights(PRIOR), strict=True
        ):
            np.testing.assert_array_equal(x, y)


def test_other_programs_can_read_it_and_saving_is_deterministic(path, tmp_path):
    arrays = load(path.read_bytes())  # by safetensors alone
    np.testing.assert_array_equal(arrays["forward.weight_in"], PRIOR.forward.weight_in)
    PRIOR.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_load_detects_any_changed_byte(path):
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    # The file is 8 bytes with the size of the header, the header, and the data. Change
    # each byte of the first two parts, and 200 random bytes of the data, one at a time.
    header = 8 + int.from_bytes(content[:8], "little")
    indices = [*range(header), *rng.integers(header, len(content), 200)]
    for index in indices:
        changed = content[index] ^ int(rng.integers(1, 256))  # a different byte
        path.write_bytes(content[:index] + bytes([changed]) + content[index + 1 :])
        with pytest.raises(ValueError, match=r"prior\.safetensors"):
            qm.MLPPrior.load(path)
    # A tab instead of a space does not change the meaning of the JSON header. Only the
    # digest shows the change.
    space = content[:header].rfind(b" ")
    path.write_bytes(content[:space] + b"\t" + content[space + 1 :])
    with pytest.raises(ValueError, match="digest"):
        qm.MLPPrior.load(path)


def test_a_file_that_is_too_short_or_too_long_raises(path):
    raw = path.read_bytes()
    # The file ends within the size, within the header, or within the data.
    for size in (0, 1, 7, 8, 9, 100, *range(200, len(raw), 97), len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="damaged"):
            qm.MLPPrior.load(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        qm.MLPPrior.load(path)


def test_a_wrong_header_size_raises_before_memory_is_allocated(path):
    raw = path.read_bytes()
    # A reader that allocates memory of these sizes would need up to 2⁶³ bytes.
    for size in (2**63, 2**40, len(raw)):
        path.write_bytes(size.to_bytes(8, "little") + raw[8:])
        with pytest.raises(ValueError, match="damaged"):
            qm.MLPPrior.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"qm_cupy": "[]"}])
def test_files_of_other_programs_raise(path, metadata):
    arrays = load(path.read_bytes())
    path.write_bytes(save(arrays, metadata=metadata))
    with pytest.raises(ValueError, match="was not saved by a prior of qm_cupy"):
        qm.MLPPrior.load(path)
    path.write_bytes(b"PK\3\4 a zip, say" * 20)  # an .npz file starts like this
    with pytest.raises(ValueError, match=r"damaged or is not a \.safetensors file"):
        qm.MLPPrior.load(path)


def arrays_of(prior):
    """Return the arrays of a file by name, with the names of `MLPPrior.save`."""
    networks = {"forward": prior.forward, "backward": prior.backward}
    return {
        f"{direction}.{name}": w
        for direction, network in networks.items()
        for name, w in network._asdict().items()
    }


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"dim": 4, "hidden_dim": 7}, {}, "`forward.weight_in` must have shape"),
        # 10¹⁸ weights: nothing is allocated before the shapes are compared.
        ({"dim": 10**9, "hidden_dim": 10**9}, {}, "must have shape"),
        ({"dim": -1, "hidden_dim": 7}, {}, "integers of at least 1"),
        ({"dim": "5", "hidden_dim": 7}, {}, "integers of at least 1"),
        ({"dim": 5}, {}, "integers of at least 1"),
        ({}, {"extra": np.ones(3)}, r"must hold .*unknown are \['extra'\]"),
    ],
)
def test_settings_that_do_not_match_the_arrays(path, settings, change, message):
    """The digest is right: anyone can compute it, so shapes are checked too."""
    settings = settings or {"dim": 5, "hidden_dim": 7}
    arrays = {**arrays_of(PRIOR), **change}
    save_weights(path, "MLPPrior", settings, arrays)
    with pytest.raises(ValueError, match=message):
        qm.MLPPrior.load(path)


def test_file_of_another_type_of_prior_raises(path):
    save_weights(path, "Other", {}, arrays_of(PRIOR))
    with pytest.raises(ValueError, match="must hold weights of MLPPrior, got 'Other'"):
        qm.MLPPrior.load(path)


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(hashlib, "sha256", None)  # a failure in the middle of `save`
    with pytest.raises(TypeError):
        PRIOR.save(path)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]  # no temporary file


def test_error_without_the_safetensors_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # `import` then fails
    for call in (PRIOR.save, qm.MLPPrior.load):
        with pytest.raises(ImportError, match='pip install "safetensors>='):
            call(path)


def test_error_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        qm.MLPPrior.load(tmp_path / "nowhere")

"""Files of weights that somebody wrote to do harm: each is a ValueError with its path.

The digest of these files is right where it is not the subject, because anyone can
compute it.
"""

import hostile_files
import numpy as np
import pytest

import qm_cupy as qm

PRIORS = {
    "MLPPrior": qm.MLPPrior.init(3, hidden_dim=4),
    "TransformerPrior": qm.TransformerPrior.init(3, hidden_dim=4, num_heads=2),
}
SETTINGS = {
    "MLPPrior": {"dim": 3, "hidden_dim": 4},
    "TransformerPrior": PRIORS["TransformerPrior"]._settings._asdict(),
}


def arrays_of(prior):
    """Return the arrays of a prior, by their names in a file."""
    arrays = {}
    for direction in ("forward", "backward"):
        network = getattr(prior, direction)
        weights = network._asdict() if isinstance(network, qm.MLP) else network
        arrays |= {f"{direction}.{name}": w for name, w in weights.items()}
    return arrays


def refused(path, prior, match=None):
    """Assert that `load` raises a ValueError with the path, in one short line."""
    with pytest.raises(ValueError, match=match) as error:
        type(prior).load(path)
    message = str(error.value)
    assert type(error.value) is ValueError
    assert str(path) in message
    assert len(message) - len(str(path)) < 300
    assert "\n" not in message
    message.encode()  # it can be printed: it has no lone surrogates


@pytest.fixture(params=PRIORS)
def prior(request):
    return PRIORS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prior.safetensors"


def test_the_unchanged_file_loads(path, prior):
    """The helpers write files that `load` accepts, so the faults below count."""
    name = type(prior).__name__
    description = hostile_files.described(name, SETTINGS[name])
    hostile_files.write(path, arrays_of(prior), description)
    loaded = type(prior).load(path)
    for key, weight in arrays_of(loaded).items():
        np.testing.assert_array_equal(weight, arrays_of(prior)[key])


DEEP = "[" * 100_000 + "]" * 100_000
# Values of a setting, as JSON.
VALUES = {
    "deep": DEEP,
    # Below the limit of the parser, but `repr` of such a value needs more frames.
    "nested": "[" * 900 + "]" * 900,
    "digits": "1" + "0" * 5000,
    "many digits": "1" + "0" * 4200,
    "infinite": "1e999",
    "nan": "NaN",
    "negative": "-1",
    "zero": "0",
    "int64": str(2**63),
    "float": "3.0",
    "true": "true",
    "null": "null",
    "text": '"3"',
    "long text": '"' + "3" * 10_000 + '"',
    "surrogate": '"\\ud800"',
    "object": '{"a": [1]}',
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_wrong_value_of_any_setting(path, prior, value):
    name = type(prior).__name__
    for key in SETTINGS[name]:
        if key == "num_positions" and value == "0":
            continue  # valid: rotary positions
        others = {k: v for k, v in SETTINGS[name].items() if k != key}
        text = ", ".join(f'"{k}": {hostile_json(v)}' for k, v in others.items())
        settings = f'{{"{key}": {value}, {text}}}'
        description = hostile_files.described(name, settings)
        hostile_files.write(path, arrays_of(prior), description)
        refused(path, prior)


def hostile_json(value):
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.mark.parametrize(
    "settings",
    ["[]", "null", "{}", '{"\\ud800": 1}', DEEP, '{"a": ' * 900 + "1" + "}" * 900],
    ids=["list", "null", "empty", "surrogate", "deep", "nested"],
)
def test_settings_of_a_wrong_form(path, prior, settings):
    description = hostile_files.described(type(prior).__name__, settings)
    hostile_files.write(path, arrays_of(prior), description)
    refused(path, prior)


@pytest.mark.parametrize(
    "description",
    [
        "", "[]", "3", "null", '"text"', DEEP, "NaN", "1e999", "1" + "0" * 5000, "{",
        '{"kind": 3, "settings": {}, "sha256": ""}',
        '{"kind": "MLPPrior", "settings": {}, "sha256": 3}',
        hostile_files.described("MLPPrior", SETTINGS["MLPPrior"], "z" * 64),
        hostile_files.described("MLPPrior", SETTINGS["MLPPrior"], "\\ud800" * 64),
        hostile_files.described("\ud800", {}),
        hostile_files.described("Other" * 10_000, {}),
    ],
)  # fmt: skip
def test_a_description_of_a_wrong_form(path, prior, description):
    hostile_files.write(path, arrays_of(prior), description)
    refused(path, prior)


@pytest.mark.parametrize(
    "number",
    ["-1", str(2**64 - 1), str(2**63), str(2**70), "1" + "0" * 5000, "1e999", "NaN",
     "1.5", "true", "null", '"4"', "[]"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["shape", "offset"])
def test_wrong_numbers_in_the_header(path, prior, number, where):
    shape, end = (number, "4") if where == "shape" else ("1", number)
    header = (
        f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, {end}]}}}}'
    )
    hostile_files.write_header(path, header.encode(), bytes(4))
    refused(path, prior, "damaged")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"__metadata__": ' + b"[" * 100_000,
        b'{"a\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a\ud800": 1}'.encode("utf-8", "surrogatepass"),
        b"\xff\xfe",
        b"[]",
        b'{"a": 3}',
        b'{"__metadata__": {"qm_cupy": 3}}',
        b'{"a": {"dtype": "' + b"X" * 100_000 + b'", "shape": [], '
        b'"data_offsets": [0, 4]}}',
        # The product of the sizes overflows 64 bits.
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], '
        b'"data_offsets": [0, 4]}}',
        # Two arrays in the same bytes.
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_a_wrong_form(path, prior, header):
    hostile_files.write_header(path, header, bytes(4))
    refused(path, prior, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.int32),
        lambda x: x.astype(bool),
        lambda x: x[None],
        lambda x: x.ravel()[:0],
        lambda x: np.zeros((0, 2**40), np.float32),
    ],
    ids=["integers", "booleans", "one axis more", "empty", "empty and wide"],
)
def test_an_array_of_a_wrong_dtype_or_shape(path, prior, change):
    name = type(prior).__name__
    description = hostile_files.described(name, SETTINGS[name])
    for key, weight in arrays_of(prior).items():
        hostile_files.write(path, arrays_of(prior) | {key: change(weight)}, description)
        refused(path, prior, f"`{key}` must")


def test_many_unknown_arrays(path, prior):
    name = type(prior).__name__
    description = hostile_files.described(name, SETTINGS[name])
    more = {f"{i:04}" + "x" * 200: np.ones(1, np.float32) for i in range(1000)}
    hostile_files.write(path, arrays_of(prior) | more, description)
    refused(path, prior, "and 997 more")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(path, prior, value):
    name = type(prior).__name__
    description = hostile_files.described(name, SETTINGS[name])
    for key, weight in arrays_of(prior).items():
        changed = weight.copy()
        index = tuple(n - 1 for n in weight.shape)  # the last entry
        changed[index] = value
        hostile_files.write(path, arrays_of(prior) | {key: changed}, description)
        at = ", ".join(map(str, index)) + ("," if len(index) == 1 else "")
        wanted = rf"prior.safetensors: `{key}` must be finite, got {value} .*\({at}\)"
        refused(path, prior, wanted)

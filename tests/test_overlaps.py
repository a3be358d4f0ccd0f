"""`out` overlaps no other array of its call, and its own arrays do not overlap."""

import numpy as np
import pytest

import qm_cupy as qm

B, N, K, D = 2, 8, 4, 8


def buffer_of(size):
    """Return one piece of memory from which several arrays are taken."""
    return np.zeros(size, np.uint8)


def part(memory, shape, dtype):
    """Return an array at the start of the memory."""
    dtype = np.dtype(dtype)
    return memory[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


def arrays():
    """Return all arrays of one call of `quickmerge`, by name, each of its own memory.

    Among them are arrays that the call does not read.
    """
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.standard_normal((B, N, D)),
        "mask": np.ones((B, N), np.bool_),
        "protect": np.zeros((B, N), np.bool_),
        "weights": rng.random((B, N)),
        "budget": np.array([K, K]),
        "attention": rng.random((B, N, N)),
        "query": rng.standard_normal((B, N, D)),
        "key": rng.standard_normal((B, N, D)),
        "hidden_states": rng.standard_normal((B, N, D)),
        "saliency": rng.random((B, N)),
    }


def in_memory_of(field, x):
    """Return two arrays that share memory: one like the field, and a copy of x."""
    memory = buffer_of(max(field.nbytes, x.nbytes))
    other = part(memory, x.shape, x.dtype)
    other[...] = x
    return part(memory, field.shape, field.dtype), other


@pytest.mark.parametrize("field", qm.Merged._fields)
@pytest.mark.parametrize("name", [*arrays()])
def test_no_input_of_quickmerge(field, name):
    inputs = arrays()
    used = {"tokens", "mask", "protect", "weights", "budget", name}
    if name in ("query", "key"):
        used |= {"query", "key"}
    out = qm.quickmerge(inputs["tokens"], K)
    shared, inputs[name] = in_memory_of(getattr(out, field), inputs[name])
    before = inputs[name].copy()
    out = out._replace(**{field: shared})
    error = rf"`out\.{field}` must not share memory with `{name}`"
    with pytest.raises(ValueError, match=error):
        qm.quickmerge(**{key: inputs[key] for key in used}, out=out)
    np.testing.assert_array_equal(inputs[name], before)


PAIRS = [(a, b) for a in qm.Merged._fields for b in qm.Merged._fields if a < b]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_no_two_arrays_of_out(first, second):
    tokens = arrays()["tokens"]
    out = qm.quickmerge(tokens, K)
    a, b = in_memory_of(getattr(out, first), getattr(out, second))
    out = out._replace(**{first: a, second: b})
    error = rf"`out\.({first}|{second})` must not share memory with `out\."
    with pytest.raises(ValueError, match=error):
        qm.quickmerge(tokens, K, out=out)


@pytest.mark.parametrize("name", ["tokens", "labels", "num_groups", "mass"])
def test_no_input_of_merge_tokens(name):
    inputs = arrays()
    arguments = {
        "tokens": inputs["tokens"],
        "labels": np.tile(np.arange(N) % K, (B, 1)),
        "num_groups": np.array([K, K]),
        "mass": inputs["weights"],
    }
    out, arguments[name] = in_memory_of(np.empty((B, K, D)), arguments[name])
    with pytest.raises(ValueError, match=f"`out` must not share memory with `{name}`"):
        qm.merge_tokens(**arguments, out=out)


@pytest.mark.parametrize("name", ["merged", "labels"])
def test_no_input_of_unmerge_tokens(name):
    arguments = {
        "merged": np.ones((B, K, D)),
        "labels": np.tile(np.arange(N) % K, (B, 1)),
    }
    out, arguments[name] = in_memory_of(np.empty((B, N, D)), arguments[name])
    with pytest.raises(ValueError, match=f"`out` must not share memory with `{name}`"):
        qm.unmerge_tokens(**arguments, out=out)


def test_neighbours_in_one_memory_are_no_overlap():
    memory = np.zeros((B + B, N, D))
    memory[:B] = arrays()["tokens"]
    labels = np.tile(np.arange(N) % K, (B, 1))
    out = memory[B:].reshape(-1)[: B * K * D].reshape(B, K, D)
    wanted = qm.merge_tokens(memory[:B].copy(), labels, K)
    assert qm.merge_tokens(memory[:B], labels, K, out=out) is out
    np.testing.assert_array_equal(out, wanted)

"""The random generator Philox4x32-10, and the uniform numbers u in (0, 1) from it."""

import numpy as np
import oracle
import pytest

from qm_cupy.stages.selection.philox import philox4x32, uniform

# Known answers of the Random123 library: counter, key, and the four random words
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_known_answers(counter, key, words):
    got = philox4x32(tuple(counter), key[0] | key[1] << 32)
    assert [int(word) for word in got] == words
    # The oracle (oracle.py) is an independent implementation. Other tests rely on it.
    assert list(oracle.philox4x32(counter, key)) == words


def test_uniform_is_never_0_or_1():
    # u of the smallest and of the greatest word. With u = 0 or 1 the noise -log(-log u)
    # would be infinite.
    ends = uniform(np.array([0, 0xFFFFFFFF], np.uint64))
    assert 0 < ends[0] < ends[1] < 1
    assert np.float32(ends[1]) < 1  # u has 24 bits, so float32 is exact

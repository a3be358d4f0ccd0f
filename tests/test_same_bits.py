"""Threads and processes do not change the bits of results (docs/project/same_bits.md).

The number of threads of BLAS is that of this process in all of them.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gpu_parity import HOST, leaves
from test_libraries import CALLS, arguments

NAMES = [name for name in CALLS if name not in (*HOST, "decode")]


def digest(name):
    """Return a hash of all results of a call."""
    results = leaves(CALLS[name][0](**arguments(name, np.float32)))
    parts = [np.asarray(x).tobytes() for x in results if x is not None]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def digests():
    return {name: digest(name) for name in NAMES}


def test_calls_in_several_threads_at_once():
    wanted = digests()
    with ThreadPoolExecutor(4) as pool:
        repeated = [*NAMES] * 3
        for name, got in zip(repeated, pool.map(digest, repeated), strict=True):
            assert got == wanted[name], name


def test_another_process():
    script = "from test_same_bits import digests; print(digests())"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(["tests", *filter(None, sys.path)]),
        "PYTHONHASHSEED": "7",
    }
    output = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == str(digests())

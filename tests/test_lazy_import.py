"""`import qm_cupy` is fast, and the first use of a public name imports all of them.

Each test runs in a new process: in this one, other tests have imported everything.
"""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qm_cupy

ROOT = Path(qm_cupy.__file__).parent.parent


def run(code):
    """Return what Python prints for this code; it must not fail or warn."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_the_package_imports_nothing_else():
    loaded = "print(sorted(x for x in sys.modules if x.startswith('qm_cupy')))"
    code = "import sys; old = {*sys.modules}; import qm_cupy; qm_cupy.__version__; "
    assert run(f"{code}{loaded}") == "['qm_cupy']"
    assert run(f"{code}print({{*sys.modules}} - old)") == "{'qm_cupy'}"


def test_the_first_name_imports_only_numpy():
    code = (
        "import sys, qm_cupy; qm_cupy.quickmerge; "
        "unwanted = {'cupy', 'torch', 'jax', 'ml_dtypes', 'matplotlib', 'scipy'}; "
        "unwanted.add('numpy.random'); "  # NumPy itself loads it when it is used
        "print(unwanted & set(sys.modules))"
    )
    assert run(code) == "set()"


# Tools ask every module for such names: they must not cost the time of an import.
@pytest.mark.parametrize("name", ["__wrapped__", "_repr_html_", "__test__"])
def test_special_names_import_nothing(name):
    result = f"hasattr(qm_cupy, {name!r}), 'numpy' in sys.modules"
    code = f"import sys, qm_cupy; print({result})"
    assert run(code) == "False False"


def test_a_wrong_name():
    code = """
import qm_cupy
try:
    qm_cupy.quickmerg
except AttributeError as error:
    print(error)
try:
    from qm_cupy import quickmerg
except ImportError as error:
    print(error)
"""
    first, second = run(code).split("\n")
    assert first.startswith("module 'qm_cupy' has no attribute 'quickmerg'")
    assert second.startswith("cannot import name 'quickmerg' from 'qm_cupy'")


def test_all_names():
    """By `*`, for the completion of an editor, and as attributes."""
    code = "from qm_cupy import *; print(*sorted(x for x in vars() if x[0] != '_'))"
    assert run(code).split() == sorted(qm_cupy.__all__)
    code = "import qm_cupy; print(*dir(qm_cupy))"
    assert {*run(code).split()} >= {*qm_cupy.__all__, "__version__", "stages"}
    code = "import qm_cupy; print(all(hasattr(qm_cupy, x) for x in qm_cupy.__all__))"
    assert run(code) == "True"
    code = "import inspect, qm_cupy; print(*dict(inspect.getmembers(qm_cupy)))"
    assert {*run(code).split()} >= {*qm_cupy.__all__}


def test_packages_are_attributes():
    """As before, but the optional ones must be imported."""
    code = "import qm_cupy; print(qm_cupy.stages.budget.token_budget(0.5, 8))"
    assert run(code) == "4"
    code = "import qm_cupy; print(hasattr(qm_cupy, 'plot'), hasattr(qm_cupy, 'torch'))"
    assert run(code) == "False False"


def test_no_module_has_a_public_name():
    """An import of the module would replace the function by the module."""
    modules = {module.name for module in pkgutil.iter_modules(qm_cupy.__path__)}
    assert modules & {*qm_cupy.__all__} == set()


@pytest.mark.parametrize(
    "first",
    [
        "import qm_cupy.choice",
        "import qm_cupy.api",
        "import qm_cupy.plot",
        "import qm_cupy.stages.saliency.saliency",
        "from qm_cupy.stages import saliency",
        "from qm_cupy import pipeline",
        "from qm_cupy.choice import choose_merge",
    ],
)
def test_modules_that_are_imported_first(first):
    code = f"""
{first}
from qm_cupy import choose_merge, saliency
import inspect, qm_cupy as qm
print(*(inspect.isfunction(x) for x in (choose_merge, saliency, qm.quickmerge)))
"""
    assert run(code) == "True True True"


def test_pickles():
    """A process that has not used a public name yet reads them."""
    items = "[qm_cupy.choose_merge, qm_cupy.Merged]"
    data = run(f"import pickle, qm_cupy; print(pickle.dumps({items}))")
    code = f"import pickle; print(*(x.__name__ for x in pickle.loads({data})))"
    assert run(code) == "choose_merge Merged"


def test_a_replaced_name_stays_replaced():
    code = """
import qm_cupy
qm_cupy.quickmerge = "replaced"
qm_cupy.linkage
print(qm_cupy.quickmerge)
"""
    assert run(code) == "replaced"


def test_threads():
    """All threads get the functions, also while the first one imports them."""
    code = """
import sys, threading
sys.setswitchinterval(1e-6)
import qm_cupy
start, got, names = threading.Barrier(8), [], ("quickmerge", "linkage", "choose_merge")

def use(index):
    start.wait()
    got.append(callable(getattr(qm_cupy, names[index % 3])))

threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(got.count(True))
"""
    assert run(code) == "8"


@pytest.mark.slow("the first compilation of torch, in a new process")
def test_first_use_in_torch_compile():
    pytest.importorskip("torch")
    code = """
import warnings
warnings.simplefilter("ignore")  # torch's own
import torch, qm_cupy as qm

@torch.compile(fullgraph=True, backend="eager")
def merge(x):
    return qm.merge_tokens(x, qm.cluster_tokens(x, 2), 2)

print(tuple(merge(torch.ones(1, 6, 4)).shape))
"""
    assert run(code) == "(1, 2, 4)"


def test_first_use_in_jax_jit():
    pytest.importorskip("jax")
    code = """
import jax, qm_cupy as qm
merge = jax.jit(lambda x: qm.merge_tokens(x, qm.cluster_tokens(x, 2), 2))
print(merge(jax.numpy.ones((1, 6, 4))).shape)
"""
    assert run(code) == "(1, 2, 4)"

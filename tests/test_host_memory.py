"""The memory that a process can still get, from files of a small root folder."""

import os
import subprocess
import sys

import pytest

from qm_cupy.host_memory import available_bytes

resource = pytest.importorskip("resource")
GIB = 2**30
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a function that writes files, with contents by their paths."""
    monkeypatch.setattr(resource, "getrlimit", lambda x: (resource.RLIM_INFINITY, 0))

    def write(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def meminfo(available, swap=0):
    lines = f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n"
    return {"proc/meminfo": f"{lines}SwapFree: {swap // 1024} kB\nHugePages_Free: 0\n"}


def group(folder, limit, used, cached=0):
    """Return the files of a control group of version 2."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def test_free_memory_and_swap(root):
    assert available_bytes(root(meminfo(3 * GIB, 2 * GIB))) == 5 * GIB


def test_other_systems(root, monkeypatch):
    """Without these files, the result is all memory of the machine, or None."""
    values = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert available_bytes(root({})) == 40960

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_bytes(root({})) is None
    monkeypatch.delattr(os, "sysconf")
    assert available_bytes(root({})) is None


class TestControlGroups:
    def test_version_2(self, root):
        folder = root(
            meminfo(9 * GIB)
            | {"proc/self/cgroup": "0::/a/b\n"}
            | group("sys/fs/cgroup/a/b", 4 * GIB, 3 * GIB, cached=GIB // 2)
        )
        assert available_bytes(folder) == 1.5 * GIB

    @pytest.mark.parametrize("inner", ["max", 8 * GIB])
    def test_a_parent_may_allow_less(self, root, inner):
        folder = root(
            meminfo(9 * GIB)
            | {"proc/self/cgroup": "0::/a/b\n"}
            | group("sys/fs/cgroup/a/b", inner, GIB)
            | group("sys/fs/cgroup/a", 3 * GIB, GIB)
        )
        assert available_bytes(folder) == 2 * GIB

    @pytest.mark.parametrize("path", ["/", "/docker/of/the/host"])
    def test_a_container(self, root, path):
        """The group of a container is mounted as the root."""
        folder = root(
            meminfo(9 * GIB)
            | {"proc/self/cgroup": f"0::{path}\n"}
            | group("sys/fs/cgroup", 2 * GIB, GIB)
        )
        assert available_bytes(folder) == GIB

    def test_version_1(self, root):
        mount = "sys/fs/cgroup/memory"
        folder = root(
            meminfo(9 * GIB)
            | {"proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"}
            | {f"{mount}/job/memory.limit_in_bytes": f"{2 * GIB}\n"}
            | {f"{mount}/job/memory.usage_in_bytes": f"{GIB}\n"}
            | {f"{mount}/job/memory.stat": f"cache 1\ntotal_inactive_file {GIB // 4}\n"}
            | {f"{mount}/memory.limit_in_bytes": f"{2**63 - PAGE}\n"}  # no limit
            | {f"{mount}/memory.usage_in_bytes": f"{GIB}\n"}
        )
        assert available_bytes(folder) == 1.25 * GIB

    def test_more_used_than_allowed(self, root):
        folder = root(
            {"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", GIB, 2 * GIB)
        )
        assert available_bytes(folder) == 0

    def test_unreadable_files(self, root):
        folder = root(meminfo(GIB) | {"proc/self/cgroup": "nonsense\n:\n0::/a\n"})
        (folder / "sys/fs/cgroup/a/memory.max").mkdir(parents=True)
        assert available_bytes(folder) == GIB


class TestProcess:
    @pytest.mark.parametrize(("name", "field"), [("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)])
    def test_limits(self, root, monkeypatch, name, field):
        limits = {getattr(resource, name): (100 * PAGE, 200 * PAGE)}
        unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
        monkeypatch.setattr(resource, "getrlimit", lambda x: limits.get(x, unlimited))
        pages = ["0"] * 7
        pages[field] = "30"
        folder = root(meminfo(GIB) | {"proc/self/statm": " ".join(pages)})
        assert available_bytes(folder) == 70 * PAGE

    @pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
    def test_this_machine(self):
        """With a real limit, about what is left of it can be allocated."""
        code = """if True:
            import mmap, resource
            from qm_cupy.host_memory import available_bytes
            assert available_bytes() > 0
            resource.setrlimit(resource.RLIMIT_AS, (2 ** 30, 2 ** 30))
            left = available_bytes()
            assert left < 2 ** 30
            mmap.mmap(-1, left - 2 ** 24).close()
            try:
                mmap.mmap(-1, left + 2 ** 24)
            except OSError:
                print("refused")
        """
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert (result.stdout, result.stderr) == ("refused\n", "")

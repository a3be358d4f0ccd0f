"""How much memory of the CPU a process can still get.

Linux reports it in files. `root` is the folder that contains them, "/" except in tests.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_UNCHECKED = 2**28  # bytes


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return how many bytes this process can still allocate, or None if not known.

    The result is the least of four limits: the free memory of the machine (with swap),
    that of the control groups of the process (which limit containers), and its limits
    of addresses and of data (`ulimit -v` and `ulimit -d`). Systems other than Linux do
    not report free memory; there the result is the memory of the whole machine.
    """
    machine = _machine_bytes(root)
    limits = [*_control_group_bytes(root), *_process_bytes(root)]
    if machine is not None:
        limits.append(machine)
    return max(min(limits), 0) if limits else None


def _machine_bytes(root: Path) -> int | None:
    """Return the free memory and swap, or else the memory of the machine."""
    fields = _fields(root / "proc/meminfo")  # in kibibytes: "MemAvailable:  1024 kB"
    if "MemAvailable:" in fields:
        return (fields["MemAvailable:"] + fields.get("SwapFree:", 0)) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no `sysconf`
        return None


def _control_group_bytes(root: Path) -> Iterator[int]:
    """Yield what each control group of the process still allows; parents count too."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        # "4:memory:/path" is version 1 and "0::/path" is version 2.
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            top, names = "memory", ("limit_in_bytes", "usage_in_bytes")
            inactive = "total_inactive_file"
        elif not controllers:
            top, names, inactive = "", ("max", "current"), "inactive_file"
        else:
            continue
        mount = root / "sys/fs/cgroup" / top
        folder = mount / path.strip("/")
        # In a container, the path may be that of the host, of which only the last
        # folder is mounted, as the mount itself. So folders may be missing.
        for group in (folder, *folder.parents):
            limit, used = (_number(group / f"memory.{name}") for name in names)
            if limit is not None and used is not None:
                # Linux frees the file pages that no process uses, if memory is needed.
                cached = _fields(group / "memory.stat").get(inactive, 0)
                yield limit - used + cached
            if group == mount:
                break


def _process_bytes(root: Path) -> Iterator[int]:
    """Yield what the limits of addresses and of data still allow."""
    try:
        import resource

        page = os.sysconf("SC_PAGE_SIZE")
    except (ImportError, AttributeError, OSError, ValueError):
        return
    pages = _text(root / "proc/self/statm").split()
    # Fields 0 and 5 are all pages of addresses, and those of data and stack.
    for limited, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit, _ = resource.getrlimit(limited)
        if limit != resource.RLIM_INFINITY and len(pages) > field:
            yield limit - int(pages[field]) * page


def _fields(path: Path) -> dict[str, int]:
    """Return the first number of each line of a file by the word before it."""
    lines = (line.split() for line in _text(path).splitlines())
    return {x[0]: int(x[1]) for x in lines if len(x) > 1 and x[1].isdecimal()}


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is none, such as for "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Return the text of a file, or "" if it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def check_memory(needed: int, call: str, way_out: str) -> None:
    """Raise MemoryError if a call needs more memory than there is, with a way out.

    Needs of at most 256 MiB are not compared, because reading the limits takes time.
    """
    if needed <= _UNCHECKED:
        return
    available = available_bytes()
    if available is not None and needed > available:
        raise MemoryError(
            f"{call} needs {needed / 1e9:.1f} GB of memory, but only "
            f"{available / 1e9:.1f} GB are available: {way_out}"
        )

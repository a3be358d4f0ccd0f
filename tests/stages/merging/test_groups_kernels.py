"""The sort of merging and its layout: runs of tokens, groups, shared memory."""

import numpy as np
import pytest
from kernel_cases import labels_of, optimized, sizes
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.merging import groups

ROOM = 48 << 10  # bytes of shared memory


def labels_of_kind(batch, num_tokens, num_groups, kind):
    rng = np.random.default_rng(num_tokens + num_groups)
    shape = batch, num_tokens
    if kind == "padding":
        return np.full(shape, -1, np.int32)
    if kind == "one":
        return np.full(shape, num_groups - 1, np.int32)
    if kind == "wild":  # a fifth are labels of no group
        labels = rng.integers(-num_groups, 2 * num_groups, shape)
        labels[:, ::7] = np.iinfo(np.int32).max
        labels[:, 1::7] = np.iinfo(np.int32).min
        return labels.astype(np.int32)
    return rng.integers(-1, num_groups, shape).astype(np.int32)


def assert_sorted(labels, num_groups, ends, members):
    """Groups one after the other, each in index order, and nothing between them."""
    for b, row in enumerate(labels):
        known = (row >= 0) & (row < num_groups)
        sizes = np.bincount(row[known], minlength=num_groups)
        np.testing.assert_array_equal(ends[b], np.cumsum(sizes))
        order = np.argsort(np.where(known, row, num_groups), kind="stable")
        np.testing.assert_array_equal(members[b, : known.sum()], order[: known.sum()])


@pytest.mark.parametrize("kind", ["random", "padding", "one", "wild"])
@pytest.mark.parametrize(
    ("num_tokens", "num_groups"),
    [
        (1, 1), (31, 31), (32, 1), (33, 7), (100, 100), (700, 1), (1025, 40),
        (1100, 1100), (2500, 2500), (40, 3000),
    ],
)  # fmt: skip
@optimized
@pytest.mark.usefixtures("kernels")
def test_sort_members(num_tokens, num_groups, kind):
    labels = labels_of_kind(3, num_tokens, num_groups, kind)
    assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))


@pytest.mark.parametrize("runs", [1, 2, 5, 8])
@pytest.mark.parametrize("held", [True, False], ids=["shared", "global"])
@optimized
@pytest.mark.usefixtures("kernels")
def test_sort_members_in_runs(runs, held, monkeypatch):
    """Any number of runs, the last ones empty, counts here or there: one order."""
    num_groups = 70
    bytes_held = 4 * num_groups * (runs + 1) if held else 0
    monkeypatch.setattr(groups, "sort_layout", lambda *_: (runs, bytes_held))
    for num_tokens in (1, 33, 97, 290):
        labels = labels_of_kind(2, num_tokens, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))


@optimized
@pytest.mark.usefixtures("kernels")
def test_counts_that_shared_memory_cannot_hold(monkeypatch):
    """At the largest K with counts in shared memory, and at the one after it."""
    room = cuda.dynamic_shared_bytes("groups", "sort_members", np.float32)
    largest, made, empty = room // 8, [], cuda.empty

    def recorded(shape, dtype):
        made.append(shape)
        return empty(shape, dtype)

    monkeypatch.setattr(cuda, "empty", recorded)
    for num_groups, shared in ((largest, True), (largest + 1, False)):
        labels = labels_of_kind(2, 300, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))
        counts = [shape for shape in made if len(shape) == 3]
        assert counts == ([] if shared else [(2, 9, num_groups)])
        made.clear()


def test_layout_of_the_sort():
    layout = groups.sort_layout
    assert layout(4096, 1024, 227 << 10) == (16, 17 * 4096)  # W² = 70 N / K = 280
    assert layout(4096, 1024, ROOM) == (11, 12 * 4096)
    assert layout(4096, 4096, 227 << 10) == (8, 9 * 16384)
    assert layout(4096, 1, ROOM) == (32, 33 * 4)  # no more warps than a block has
    assert layout(33, 1, ROOM) == (2, 3 * 4)  # no run without tokens
    assert layout(1, 1, ROOM) == (1, 2 * 4)
    assert layout(1, 5000, ROOM) == (1, 2 * 20000)  # K above N
    assert layout(6000, 6144, ROOM) == (1, ROOM)
    assert layout(6000, 6145, ROOM) == (8, 0)
    assert layout(33, 6145, ROOM) == (2, 0)


@pytest.mark.parametrize("num_tokens", range(1, 3000, 171))
def test_layouts_are_within_their_limits(num_tokens):
    for num_groups in (1, 2, 3, 50, 777, num_tokens, 5000, 6143, 9000):
        runs, shared = groups.sort_layout(num_tokens, num_groups, ROOM)
        assert 1 <= runs <= min(32, -(-num_tokens // 32))
        assert shared in (0, (runs + 1) * num_groups * 4)
        assert shared <= ROOM


@pytest.mark.usefixtures("kernels")
@sizes
def test_group_sizes_and_positions(num_tokens):
    batch, num_groups = 3, max(num_tokens // 4, 1)
    labels = labels_of(batch, num_tokens, num_groups)
    member = labels[:, :, None] == np.arange(num_groups)
    np.testing.assert_array_equal(qm.group_sizes(labels, num_groups), member.sum(1))
    last = np.where(member, np.arange(num_tokens)[:, None], -1).max(1)
    np.testing.assert_array_equal(qm.group_positions(labels, num_groups), last)

"""The counting sort of group members: runs of tokens, groups, shared memory."""

import numpy as np
import pytest
from kernel_cases import labels_of, optimized, sizes
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.merging import groups

ROOM = 48 << 10  # bytes of shared memory


def labels_of_case(batch, num_tokens, num_groups, case):
    rng = np.random.default_rng(num_tokens + num_groups)
    shape = batch, num_tokens
    if case == "padding":
        return np.full(shape, -1, np.int32)
    if case == "one":  # all tokens are in the last group
        return np.full(shape, num_groups - 1, np.int32)
    if case == "wild":  # many labels are outside 0..K-1
        labels = rng.integers(-num_groups, 2 * num_groups, shape)
        labels[:, ::7] = np.iinfo(np.int32).max
        labels[:, 1::7] = np.iinfo(np.int32).min
        return labels.astype(np.int32)
    return rng.integers(-1, num_groups, shape).astype(np.int32)


def assert_sorted(labels, num_groups, ends, members):
    """Check that members are listed group by group, in index order, without gaps."""
    for b, row in enumerate(labels):
        known = (row >= 0) & (row < num_groups)
        sizes = np.bincount(row[known], minlength=num_groups)
        np.testing.assert_array_equal(ends[b], np.cumsum(sizes))
        # Padding and unknown labels sort last, and are not listed.
        order = np.argsort(np.where(known, row, num_groups), kind="stable")
        np.testing.assert_array_equal(members[b, : known.sum()], order[: known.sum()])


@pytest.mark.parametrize("case", ["random", "padding", "one", "wild"])
@pytest.mark.parametrize(
    ("num_tokens", "num_groups"),
    [  # around a warp, one group, as many groups as tokens, and more
        (1, 1), (31, 31), (32, 1), (33, 7), (100, 100), (700, 1), (1025, 40),
        (1100, 1100), (2500, 2500), (40, 3000),
    ],
)  # fmt: skip
@optimized
@pytest.mark.usefixtures("kernels")
def test_sort_members(num_tokens, num_groups, case):
    labels = labels_of_case(3, num_tokens, num_groups, case)
    assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))


@pytest.mark.parametrize("runs", [1, 2, 5, 8])
@pytest.mark.parametrize("held", [True, False], ids=["shared", "global"])
@optimized
@pytest.mark.usefixtures("kernels")
def test_sort_members_in_runs(runs, held, monkeypatch):
    """The order does not depend on the number of runs or on where the counts are.

    With few tokens the last runs are empty.
    """
    num_groups = 70
    bytes_held = 4 * num_groups * (runs + 1) if held else 0
    monkeypatch.setattr(groups, "sort_layout", lambda *_: (runs, bytes_held))
    for num_tokens in (1, 33, 97, 290):
        labels = labels_of_case(2, num_tokens, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))


@optimized
@pytest.mark.usefixtures("kernels")
def test_counts_that_shared_memory_cannot_hold(monkeypatch):
    """The largest K has its counts in shared memory, the next K in global memory."""
    room = cuda.dynamic_shared_bytes("groups", "sort_members", np.float32)
    # One run and the first indices take 2 · 4 bytes for each group.
    largest, made, empty = room // 8, [], cuda.empty

    def recorded(shape, dtype):
        made.append(shape)
        return empty(shape, dtype)

    monkeypatch.setattr(cuda, "empty", recorded)
    for num_groups, shared in ((largest, True), (largest + 1, False)):
        labels = labels_of_case(2, 300, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))
        # (B, runs + 1, K) in global memory: 8 runs, and the first indices.
        counts = [shape for shape in made if len(shape) == 3]
        assert counts == ([] if shared else [(2, 9, num_groups)])
        made.clear()


def test_layout_of_the_sort():
    # (runs, bytes) for N, K and the available bytes; each run takes 4 K bytes.
    layout = groups.sort_layout
    assert layout(4096, 1024, 227 << 10) == (16, 17 * 4096)  # W² = 70 N / K = 280
    assert layout(4096, 1024, ROOM) == (11, 12 * 4096)  # 12 · 4096 bytes fill ROOM
    assert layout(4096, 4096, 227 << 10) == (8, 9 * 16384)  # W² = 70
    assert layout(4096, 1, ROOM) == (32, 33 * 4)  # a block has at most 32 warps
    assert layout(33, 1, ROOM) == (2, 3 * 4)  # two steps of 32 tokens: two runs
    assert layout(1, 1, ROOM) == (1, 2 * 4)
    assert layout(1, 5000, ROOM) == (1, 2 * 20000)  # K above N
    assert layout(6000, 6144, ROOM) == (1, ROOM)
    # One more group, and the counts are in global memory.
    assert layout(6000, 6145, ROOM) == (8, 0)
    assert layout(33, 6145, ROOM) == (2, 0)


@pytest.mark.parametrize("num_tokens", range(1, 3000, 171))
def test_layouts_are_within_their_limits(num_tokens):
    for num_groups in (1, 2, 3, 50, 777, num_tokens, 5000, 6143, 9000):
        runs, shared = groups.sort_layout(num_tokens, num_groups, ROOM)
        # A warp for each run, and at least one step of 32 tokens in each.
        assert 1 <= runs <= min(32, -(-num_tokens // 32))
        assert shared in (0, (runs + 1) * num_groups * 4)
        assert shared <= ROOM


@pytest.mark.usefixtures("kernels")
@sizes
def test_group_sizes_and_positions(num_tokens):
    batch, num_groups = 3, max(num_tokens // 4, 1)
    labels = labels_of(batch, num_tokens, num_groups)
    member = labels[:, :, None] == np.arange(num_groups)  # (B, N, K)
    np.testing.assert_array_equal(qm.group_sizes(labels, num_groups), member.sum(1))
    # A group without members has position -1.
    last = np.where(member, np.arange(num_tokens)[:, None], -1).max(1)
    np.testing.assert_array_equal(qm.group_positions(labels, num_groups), last)

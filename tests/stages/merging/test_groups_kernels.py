"""The counting sort of group members, and the kernels of sizes and positions.

The sort lists the members (B, N) of every group, and the end of each group in this
list. A sequence is split into runs, one for each warp, and each run has a count for
every group: in shared memory, or in global memory if K is too large. The fixture
`kernels` runs kernels in the PTX interpreter (tests/ptx). N is the number of tokens, K
that of groups.
"""

import numpy as np
import pytest
from kernel_cases import labels_of, optimized, sizes
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.merging import groups

MAX_BYTES = 48 << 10  # bytes of shared memory, for tests of the layout


def labels_of_case(batch, num_tokens, num_groups, case):
    """Return labels (B, N) int32; "random" has labels in 0..K-1 and padding."""
    rng = np.random.default_rng(num_tokens + num_groups)
    shape = batch, num_tokens
    if case == "padding":
        return np.full(shape, -1, np.int32)
    if case == "last":  # all tokens are in the last group
        return np.full(shape, num_groups - 1, np.int32)
    if case == "out of range":  # many labels are outside 0..K-1
        labels = rng.integers(-num_groups, 2 * num_groups, shape)
        labels[:, ::7] = np.iinfo(np.int32).max
        labels[:, 1::7] = np.iinfo(np.int32).min
        return labels.astype(np.int32)
    return rng.integers(-1, num_groups, shape).astype(np.int32)


def assert_sorted(labels, num_groups, ends, members):
    """Check that the list has all members, group by group, in index order."""
    for b, row in enumerate(labels):
        valid = (row >= 0) & (row < num_groups)
        sizes = np.bincount(row[valid], minlength=num_groups)
        np.testing.assert_array_equal(ends[b], np.cumsum(sizes))
        # Labels out of range are padding. They sort last, and are not in the list.
        order = np.argsort(np.where(valid, row, num_groups), kind="stable")
        np.testing.assert_array_equal(members[b, : valid.sum()], order[: valid.sum()])


@pytest.mark.parametrize("case", ["random", "padding", "last", "out of range"])
@pytest.mark.parametrize(
    ("num_tokens", "num_groups"),
    [  # N around a warp; one group; as many groups as tokens; more groups than tokens
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
@pytest.mark.parametrize("in_shared", [True, False], ids=["shared", "global"])
@optimized
@pytest.mark.usefixtures("kernels")
def test_sort_members_in_any_number_of_runs(runs, in_shared, monkeypatch):
    """The list does not depend on the number of runs or on the memory of the counts.

    With few tokens the last runs are empty.
    """
    num_groups = 70
    shared_bytes = 4 * num_groups * (runs + 1) if in_shared else 0
    monkeypatch.setattr(groups, "sort_layout", lambda *_: (runs, shared_bytes))
    for num_tokens in (1, 33, 97, 290):
        labels = labels_of_case(2, num_tokens, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))


@optimized
@pytest.mark.usefixtures("kernels")
def test_counts_that_shared_memory_cannot_hold(monkeypatch):
    """The largest K has its counts in shared memory, the next K in global memory."""
    max_bytes = cuda.dynamic_shared_bytes("groups", "sort_members", np.float32)
    # At least one run has counts (4 bytes for each group), and the first index of each
    # group takes 4 bytes, too.
    largest, shapes, empty = max_bytes // 8, [], cuda.empty

    def recorded_empty(shape, dtype):
        shapes.append(shape)
        return empty(shape, dtype)

    monkeypatch.setattr(cuda, "empty", recorded_empty)
    for num_groups, in_shared in ((largest, True), (largest + 1, False)):
        labels = labels_of_case(2, 300, num_groups, "random")
        assert_sorted(labels, num_groups, *groups.members_cuda(labels, num_groups))
        # The array of counts in global memory is (B, runs + 1, K): 8 runs, and the
        # first indices. No other array has three axes.
        counts = [shape for shape in shapes if len(shape) == 3]
        assert counts == ([] if in_shared else [(2, 9, num_groups)])
        shapes.clear()


def test_layout_of_the_sort():
    # `sort_layout` returns W runs and their bytes for N, K and the available bytes. W
    # is about √(70 N / K). Each run takes 4 K bytes, and the first indices take 4 K
    # bytes.
    layout = groups.sort_layout
    assert layout(4096, 1024, 227 << 10) == (16, 17 * 4096)  # 70 N / K = 280
    assert layout(4096, 1024, MAX_BYTES) == (11, 12 * 4096)  # 12 · 4096 are MAX_BYTES
    assert layout(4096, 4096, 227 << 10) == (8, 9 * 16384)  # 70 N / K = 70
    assert layout(4096, 1, MAX_BYTES) == (32, 33 * 4)  # a block has at most 32 warps
    assert layout(33, 1, MAX_BYTES) == (2, 3 * 4)  # two steps of 32 tokens: two runs
    assert layout(1, 1, MAX_BYTES) == (1, 2 * 4)
    assert layout(1, 5000, MAX_BYTES) == (1, 2 * 20000)  # K above N
    assert layout(6000, 6144, MAX_BYTES) == (1, MAX_BYTES)
    # One more group, and the counts are in global memory.
    assert layout(6000, 6145, MAX_BYTES) == (8, 0)
    assert layout(33, 6145, MAX_BYTES) == (2, 0)


@pytest.mark.parametrize("num_tokens", range(1, 3000, 171))
def test_layouts_are_within_their_limits(num_tokens):
    for num_groups in (1, 2, 3, 50, 777, num_tokens, 5000, 6143, 9000):
        runs, shared = groups.sort_layout(num_tokens, num_groups, MAX_BYTES)
        # A block has at most 32 warps, one for each run. A run has at least one step of
        # 32 tokens.
        assert 1 <= runs <= min(32, -(-num_tokens // 32))
        assert shared in (0, (runs + 1) * num_groups * 4)
        assert shared <= MAX_BYTES


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

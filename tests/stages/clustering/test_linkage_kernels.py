"""Dendrograms of the linkage kernels against those of SciPy, ties included.

An interpreter runs the kernels on the CPU. A round merges all pairs of clusters that
are each other's nearest neighbours. A team is the blocks that work on one sequence.
"""

import numpy as np
import ptx
import pytest
from recorded import recording
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from seam import cuda

import qm_cupy as qm
from qm_cupy.stages.clustering import linkage_cuda

METHODS = tuple(cuda.LINKAGE_METHODS)
# (Multiprocessors, bytes of shared memory) of devices that force each path: the matrix
# in shared memory; the matrix in global memory, with one block for each sequence;
# several blocks for each sequence, with clusters in global memory; and several blocks
# with clusters in shared memory.
DEVICES = {
    "shared": (1, 200 << 10),
    "one-block": (1, 0),
    "blocks": (6, 0),
    "shared-clusters": (6, 5 << 10),
}
SIZES = [2, 3, 31, 33, 64, 129]  # around the sizes of warps and blocks

methods = pytest.mark.parametrize("method", METHODS)
sizes = pytest.mark.parametrize("num_tokens", SIZES)
every_device = pytest.mark.parametrize("device", list(DEVICES), indirect=True)


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """Install the interpreter and a device of `DEVICES`; return the device's name."""
    name = getattr(request, "param", "blocks")
    ptx.install(monkeypatch)
    # Blocks of two warps, so that small inputs need several blocks.
    monkeypatch.setattr(linkage_cuda, "LINKAGE_THREADS", {4: 64, 8: 64})
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(*DEVICES[name]))
    return name


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def cosines_of(tokens, dtype=np.float32):
    norm = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / np.where(norm > 0, norm, 1)
    return (unit @ np.swapaxes(unit, -1, -2)).astype(dtype)


def dendrogram_of(tokens, method, dtype=np.float32, **options):
    """Return the dendrograms and the numbers of rounds, of a batch or one sequence."""
    batch = tokens if tokens.ndim == 3 else tokens[None]
    cosines = cosines_of(batch, dtype)
    rows, rounds = linkage_cuda.linkage_cuda(cosines, method, **options)
    return (rows, rounds) if tokens.ndim == 3 else (rows[0], int(rounds[0]))


def scipy_of(tokens, method):
    """Return SciPy's dendrogram of the tokens, from float64 cosines."""
    distance = 1 - cosines_of(tokens, np.float64)
    if method == "ward":
        distance = np.sqrt(2 * distance.clip(0))
    return hierarchy.linkage(squareform(distance, checks=False), method)


def partition_of(rows, num_groups):
    """Return the K groups after N - K merges, as a set of sets of tokens."""
    num_tokens = len(rows) + 1
    groups = {i: frozenset([i]) for i in range(num_tokens)}
    for r, (a, b) in enumerate(rows[: num_tokens - num_groups, :2].astype(int)):
        groups[num_tokens + r] = groups.pop(a) | groups.pop(b)
    return set(groups.values())


def assert_same_dendrogram(got, wanted, rtol=1e-5):
    """Compare the heights of all merges, and the groups after some of them."""
    np.testing.assert_allclose(got[:, 2], wanted[:, 2], rtol=rtol, atol=1e-6)
    assert hierarchy.is_valid_linkage(got)
    num_tokens = len(got) + 1
    # Compare groups only if all merges up to the cut have distinct heights, because the
    # order of nearly equal merges may differ.
    gaps = np.diff(wanted[:, 2]) > 1e-6
    distinct = np.array([*gaps, True]) & np.array([True, *gaps])
    for num_groups in {2, 3, num_tokens // 5, num_tokens // 2} & set(range(1, 999)):
        merges = num_tokens - num_groups
        if 0 < merges < num_tokens and distinct[:merges].all():
            assert partition_of(got, num_groups) == partition_of(wanted, num_groups)


@methods
@sizes
@every_device
def test_against_scipy(method, num_tokens, device):
    tokens = tokens_of(3, num_tokens, 16)
    rows, rounds = dendrogram_of(tokens, method)
    for got, x in zip(rows, tokens, strict=True):
        assert_same_dendrogram(got, scipy_of(x, method))
    assert (rounds >= 1).all()


@methods
def test_two_hundred_problems_against_scipy(method):
    rng = np.random.default_rng(1)
    for _ in range(10):
        num_tokens, dim = rng.integers(8, 50), rng.integers(12, 40)
        tokens = rng.standard_normal((20, num_tokens, dim))
        # In half of the problems, all tokens of a sequence are near one direction.
        tokens[::2] += rng.standard_normal((10, 1, dim))
        rows, _ = dendrogram_of(tokens, method)
        for got, x in zip(rows, tokens, strict=True):
            assert_same_dendrogram(got, scipy_of(x, method))


@methods
def test_float64_against_scipy(method):
    tokens = tokens_of(40, 6)
    got, _ = dendrogram_of(tokens, method, np.float64)
    wanted = scipy_of(tokens, method)
    np.testing.assert_allclose(got[:, 2], wanted[:, 2], rtol=1e-9)
    np.testing.assert_array_equal(got[:, [0, 1, 3]], wanted[:, [0, 1, 3]])


@methods
@pytest.mark.parametrize("num_tokens", SIZES[-1:])
def test_any_number_of_blocks_gives_the_same_bits(method, num_tokens, monkeypatch):
    tokens = tokens_of(2, num_tokens, 4)
    tokens[1, : num_tokens // 2] = tokens[1, 0]  # ties must be broken in the same way
    results = []
    for multiprocessors in (1, 4, 7):
        for shared in (0, 5 << 10, 200 << 10):
            device = cuda.Device(multiprocessors, shared)
            monkeypatch.setattr(cuda, "current_device", lambda device=device: device)
            results.append(dendrogram_of(tokens, method)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@methods
@pytest.mark.parametrize("threads", [64, 512])
@pytest.mark.parametrize("device", ["blocks", "shared-clusters"], indirect=True)
def test_sequences_take_turns(method, threads, device, monkeypatch):
    """A team works on several sequences, one after another.

    The first block of a team may have ended the last sequence without the other blocks.
    """
    tokens = tokens_of(5, 40, 6)
    wanted, _ = dendrogram_of(tokens, method)
    # Two teams for five sequences.
    two_teams = linkage_cuda.Layout(num_teams=2, blocks=2, threads=threads)
    monkeypatch.setattr(linkage_cuda, "layout_of", lambda *_, **__: two_teams)
    got, _ = dendrogram_of(tokens, method)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("method", ["average", "complete"])
def test_columns_move_together_in_several_passes(method):
    """Columns move when 150 of 300 clusters are left; one pass of a warp moves 128."""
    tokens = tokens_of(300, 16)
    rows, _ = dendrogram_of(tokens, method)
    assert_same_dendrogram(rows, scipy_of(tokens, method))


@methods
@pytest.mark.parametrize("multiprocessors", [1, 6])
def test_few_rows_are_searched_by_whole_blocks(method, multiprocessors, monkeypatch):
    """Tokens lie on an arc with growing gaps: only one or two pairs merge in a round.

    Then a block has fewer rows to search than warps, and several warps divide a row.
    """
    monkeypatch.setattr(linkage_cuda, "LINKAGE_THREADS", {8: 128})
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(multiprocessors, 0))
    angle = np.pi / 2 * np.linspace(0, 1, 700) ** 1.5
    # A permutation, so that the nearest neighbour of a token has any index.
    angle = np.random.default_rng(0).permutation(angle)
    tokens = np.stack((np.cos(angle), np.sin(angle)), axis=-1)
    got, rounds = dendrogram_of(tokens, method, np.float64, num_groups=np.array([670]))
    wanted = scipy_of(tokens, method)[:30]
    np.testing.assert_allclose(got[:30, 2], wanted[:, 2], rtol=1e-7)
    np.testing.assert_array_equal(got[:30, [0, 1, 3]], wanted[:, [0, 1, 3]])
    assert method == "single" or rounds > 10


def test_layouts(monkeypatch):
    device = cuda.Device(132, 227 << 10)
    monkeypatch.setattr(cuda, "current_device", lambda: device)
    monkeypatch.setattr(linkage_cuda, "LINKAGE_THREADS", {4: 512, 8: 384})
    layout = linkage_cuda.layout_of
    # (num_teams, blocks of a team, threads of a block)
    assert layout(8, 4096, 4, 0) == (8, 16, 512)
    assert layout(1, 1024, 4, 0) == (1, 64, 512)  # 64 · 16 warps: one row each
    assert layout(1, 200, 4, 160_000, one_block=True) == (1, 1, 512)
    assert layout(1000, 300, 4, 0) == (1000, 1, 256)
    for batch in range(1, 400):
        for num_tokens in (2, 64, 300, 4096):
            num_teams, blocks, threads = layout(batch, num_tokens, 4, 0)
            # Blocks that wait for each other must all run at once.
            assert blocks == 1 or num_teams * blocks <= 132
            assert 1 <= num_teams <= batch
            assert threads % 32 == 0


@pytest.mark.parametrize(("memory", "threads"), [(2000, 64), (6000, 32)])
def test_small_blocks_only_if_a_multiprocessor_has_memory_for_three(
    monkeypatch, memory, threads
):
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(1, memory))
    monkeypatch.setattr(linkage_cuda, "_FEWER_THREADS", 32)
    launches = []
    monkeypatch.setattr(cuda, "launch", recording(launches.append))
    # A block needs 12 bytes for each token, and 128 bytes more.
    dendrogram_of(tokens_of(2, 100, 8), "single")
    (single,) = launches
    assert (single.shared, single.threads) == (1328, threads)


@pytest.mark.parametrize("width", [4, 8])
def test_max_clusters_alone_is_the_largest_number_that_fits(width):
    for room in (-1, 0, 4 << 10, 100 << 10, 226 << 10):
        limit = linkage_cuda.max_clusters_alone(room, 512, width)
        # `limit` clusters fit, and one more would not.
        assert limit == 0 or linkage_cuda.bytes_alone(limit, width) <= room
        assert linkage_cuda.bytes_alone(max(limit, 1) + 1, width) > room
    # There is at most one cluster for each thread.
    assert linkage_cuda.max_clusters_alone(226 << 10, 64, width) == 64


@methods
@every_device
def test_stopping_early_gives_the_first_merges(method, device):
    num_tokens = SIZES[-1]
    tokens = tokens_of(3, num_tokens, 5)
    whole, all_rounds = dendrogram_of(tokens, method)
    counts = np.array([num_tokens // 5, num_tokens, 1])  # some, no and all merges
    rows, rounds = dendrogram_of(tokens, method, num_groups=counts)
    for got, wanted, count in zip(rows, whole, counts, strict=True):
        merges = num_tokens - count
        np.testing.assert_array_equal(got[:merges], wanted[:merges])
    # Single linkage makes all rounds, so only the others have fewer.
    if method != "single":
        assert rounds[0] < all_rounds[0]
    assert rounds[1] == 0


@methods
@every_device
def test_padding_and_protected_tokens_do_not_merge(method, device):
    num_tokens = 33
    tokens = tokens_of(4, num_tokens, 8)
    mask = np.random.default_rng(2).random((4, num_tokens)) < 0.6
    mask[1] = np.arange(num_tokens) >= 11
    mask[2] = np.arange(num_tokens) == 5
    mask[3] = False
    protect = np.random.default_rng(3).random((4, num_tokens)) < 0.2
    tokens[~mask] = 9  # padding must not be read
    rows, _ = dendrogram_of(tokens, method, mask=mask, protect=protect)
    for got, x, merging in zip(rows, tokens, mask & ~protect, strict=True):
        positions = np.flatnonzero(merging)
        merges = max(len(positions) - 1, 0)
        padding = np.broadcast_to([-1, -1, np.inf, 0], (num_tokens - 1 - merges, 4))
        np.testing.assert_array_equal(got[merges:], padding)
        if merges == 0:
            continue
        # Replace the node numbers of the sequence without the other tokens by those of
        # the padded sequence: a token by its position, and the group of row r by N + r.
        rows_without_others, _ = dendrogram_of(x[merging], method)
        nodes = rows_without_others[:, :2].astype(int)
        is_token = nodes < len(positions)
        padded_numbers = np.where(
            is_token, positions[np.where(is_token, nodes, 0)], nodes
        )
        padded_numbers = np.where(
            is_token, padded_numbers, nodes - len(positions) + num_tokens
        )
        np.testing.assert_array_equal(got[:merges, 2:], rows_without_others[:, 2:])
        np.testing.assert_array_equal(
            got[:merges, :2], np.sort(padded_numbers, axis=-1)
        )


def test_k_counts_protected_tokens():
    num_tokens, count = 33, 9
    tokens, protect = tokens_of(1, num_tokens, 8), np.zeros((1, num_tokens), bool)
    protect[0, [0, 7, 20]] = True
    counts = np.array([count])
    rows, _ = dendrogram_of(tokens, "average", protect=protect, num_groups=counts)
    rows_without_protected, _ = dendrogram_of(tokens[0, ~protect[0]], "average")
    merges = num_tokens - count  # also counts the groups of protected tokens
    np.testing.assert_array_equal(
        rows[0, :merges, 2], rows_without_protected[:merges, 2]
    )


@pytest.mark.parametrize("method", ["average", "ward"])
@every_device
def test_integer_masses_are_repeated_tokens(method, device):
    tokens = tokens_of(30, 8)
    mass = np.random.default_rng(4).integers(1, 5, 30)
    got, _ = dendrogram_of(tokens, method, mass=mass[None].astype(float))
    # The first merges of SciPy join copies of one token, at height 0. The other 29
    # merges are those of the tokens with masses.
    wanted = scipy_of(np.repeat(tokens, mass, axis=0), method)[-29:]
    np.testing.assert_allclose(got[:, 2], wanted[:, 2], rtol=1e-5, atol=1e-6)
    # Ward's heights are proportional to the root of the masses, those of average do not
    # change.
    for scale in (1e-6, 1e6):
        again, _ = dendrogram_of(tokens, method, mass=mass[None] * scale)
        height = np.sqrt(scale) if method == "ward" else 1
        np.testing.assert_allclose(again[:, 2], got[:, 2] * height, rtol=1e-5)


@pytest.mark.parametrize("method", ["average", "ward"])
def test_a_token_of_mass_zero_joins_its_nearest_neighbour(method):
    tokens = tokens_of(20, 8)
    mass = np.ones((1, 20))
    mass[0, ::4] = 0
    got, _ = dendrogram_of(tokens, method, mass=mass)
    assert np.isfinite(got).all()
    # Ward's distance to a token of very small mass is small. So the five tokens of mass
    # 0 merge first, and token 0 with the token of the highest cosine.
    if method == "ward":
        cosines = cosines_of(tokens, np.float64) - 2 * np.eye(20)
        partner = dict(zip(*got[:5, :2].astype(int).T, strict=True))
        partner |= {b: a for a, b in partner.items()}
        assert partner[0] == cosines[0].argmax()
    # If all masses are 0, each mass counts as 1.
    all_zero, _ = dendrogram_of(tokens, method, mass=np.zeros((1, 20)))
    np.testing.assert_array_equal(all_zero, dendrogram_of(tokens, method)[0])


# Changes of tokens that make many distances equal.
TIES = {
    "equal": lambda x: np.ones_like(x),
    "quarter equal": lambda x: np.where(np.arange(len(x))[:, None] % 4, x, x[0]),
    "pairs": lambda x: np.repeat(x[::2], 2, axis=0)[: len(x)],
    "zeros": lambda x: np.where(np.arange(len(x))[:, None] % 3, x, 0),
    "orthogonal": lambda x: np.eye(len(x)),
}


@methods
@pytest.mark.parametrize("ties", list(TIES))
def test_ties_take_few_rounds(method, ties):
    num_tokens = 256
    tokens = tokens_of(num_tokens, 24)
    _, rounds = dendrogram_of(tokens, method)
    tied = TIES[ties](tokens)
    got, tied_rounds = dendrogram_of(tied, method)
    # A hash of the pair breaks ties. Without the hash, many equal distances would need
    # one round for each merge.
    assert tied_rounds <= 3 * rounds
    assert hierarchy.is_valid_linkage(got)
    # With the other ties, later distances of average and ward depend on the pair that
    # merges first, so heights may differ from those of SciPy.
    heights_are_unique = ties in ("equal", "quarter equal", "pairs")
    if heights_are_unique or (method in ("complete", "single") and ties == "zeros"):
        wanted = scipy_of(tied, method)[:, 2]
        np.testing.assert_allclose(got[:, 2], wanted, rtol=1e-5, atol=1e-6)


@methods
def test_a_chain_takes_a_round_for_each_merge(method):
    """Each gap is wider than the previous one: a token is nearest to the one before it.

    Only the first two tokens are each other's nearest, so one pair merges in a round.
    """
    num_tokens = 20
    angle = np.cumsum(1.1 ** np.arange(num_tokens) / 100)
    tokens = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    got, _ = dendrogram_of(tokens, method, np.float64)
    wanted = scipy_of(tokens, method)
    np.testing.assert_allclose(got[:, 2], wanted[:, 2], rtol=1e-7)
    np.testing.assert_array_equal(got[:, [0, 1, 3]], wanted[:, [0, 1, 3]])


@methods
@every_device
@pytest.mark.parametrize("kernels", ["optimized", "basic"])
def test_nan_tokens_do_not_merge(method, device, kernels):
    num_tokens, nan_token = 33, 5
    tokens = tokens_of(2, num_tokens, 8)
    cosines = cosines_of(tokens)
    # The NaN that a GPU computes has all bits set but the sign. If the kernel rounded
    # its bits up, as it does with distances, they would overflow.
    nan = np.uint32(0x7FFFFFFF).view(np.float32)
    cosines[0, nan_token] = cosines[0, :, nan_token] = nan
    cosines[1] = nan
    with qm.use_kernels(kernels):
        rows, rounds = linkage_cuda.linkage_cuda(cosines, method)
        is_other = np.arange(num_tokens) != nan_token
        rows_of_others, rounds_of_others = dendrogram_of(tokens[0, is_other], method)
    np.testing.assert_allclose(rows[0, :-1, 2:], rows_of_others[:, 2:], rtol=1e-5)
    assert (rows[0, -1, :2] == -1).all()
    assert (rows[1, :, :2] == -1).all()
    # NaN tokens must not cause many more rounds. The basic kernel counts no rounds.
    assert kernels == "basic" or rounds[0] <= rounds_of_others + 3


@methods
def test_basic_kernels_agree(method):
    num_tokens = SIZES[-1]
    tokens = tokens_of(2, num_tokens, 16)
    mask = np.arange(num_tokens) >= np.array([[0], [5]])
    mass = np.random.default_rng(5).random((2, num_tokens)) + 0.1
    for options in ({}, {"mask": mask}, {"mass": mass, "mask": mask}):
        if "mass" in options and method not in ("average", "ward"):
            continue
        wanted, _ = dendrogram_of(tokens, method, **options)
        with qm.use_kernels("basic"):
            got, _ = dendrogram_of(tokens, method, **options)
        np.testing.assert_allclose(got[..., 2], wanted[..., 2], rtol=1e-5)
        np.testing.assert_array_equal(got[..., 3] > 0, wanted[..., 3] > 0)


def test_sequence_of_one_token_and_empty_batch():
    for shape in ((1, 1, 1), (0, 5, 5), (0, 1, 1)):
        rows, _ = linkage_cuda.linkage_cuda(np.ones(shape, np.float32), "average")
        assert rows.shape == (shape[0], shape[1] - 1, 4)


@pytest.mark.parametrize("kernels", ["basic", "optimized"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@methods
@every_device
def test_rounding_never_lowers_a_height(method, metric, kernels, device):
    """A cut takes the first rows, so that these must be the lowest.

    The tokens are almost the corners of a simplex: all distances are nearly equal.
    """
    rng = np.random.default_rng(3)
    tokens = np.stack([np.eye(20)] * 6) + 1e-7 * rng.standard_normal((6, 20, 20))
    mass = rng.random((6, 20)) if method in ("average", "ward") else None
    for weights in (None, mass):
        with qm.use_kernels(kernels):
            rows = linkage_cuda.dendrograms_cuda(
                tokens.astype(np.float32), method, weights, metric=metric
            )
        heights = rows[..., 2]
        assert (heights >= 0).all()
        assert (np.diff(heights) >= 0).all()

"""Shapes of tiles: the shape that a launch selects; no shape changes a bit."""

import ml_dtypes
import numpy as np
import ptx
import pytest
from kernel_cases import mask_of, random
from seam import cuda

import qm_cupy as qm

BFLOAT16 = ml_dtypes.bfloat16
# 1000 multiprocessors are more than the whole tiles of these launches, so the tiles are
# halved. With 16 KB of shared memory wide tiles do not fit.
DEVICES = {  # suffix of the kernel: multiprocessors, bytes of shared memory
    "_half": cuda.Device(1000, 48 << 10),
    "": cuda.Device(1, 16 << 10),
    "_wide": cuda.Device(1, 227 << 10),
    "_kept": cuda.Device(1, 227 << 10),
}
H200 = cuda.Device(132, 227 << 10)


@pytest.fixture
def run(launches, monkeypatch):
    """Return a function that makes a call with one shape of tiles."""
    ptx.install(monkeypatch)

    def with_shape(shape, kernel, call):
        monkeypatch.setattr(cuda, "current_device", lambda: DEVICES[shape])
        # Wide tiles are selected even if they are not faster.
        monkeypatch.setattr(cuda, "_WIDE_COST", 0)
        launches.clear()
        got = call()
        # Otherwise the comparison would be of a shape with itself.
        assert kernel + shape in launches, launches
        return np.asarray(got)

    return with_shape


def same(run, kernel, shapes, call):
    """Check that tiles of other shapes give the bits of whole tiles."""
    whole = run("", kernel, call)
    for shape in shapes:
        np.testing.assert_array_equal(run(shape, kernel, call), whole, shape)


# N around the edges of the tiles. D with and without whole chunks of 16 bytes, and with
# more steps than a tile has in shared memory.
SIZES = [
    (1, 8), (64, 8), (65, 40), (128, 33), (130, 72), (130, 200), (70, 171), (257, 8),
    (300, 36),
]  # fmt: skip
sizes = pytest.mark.parametrize(("num_tokens", "dim"), SIZES)
masked = pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
dtypes = pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (np.float16, ["_half", "_wide"]),  # only 16-bit types have wide tiles
        (BFLOAT16, ["_half", "_wide"]),
        (np.float32, ["_half"]),
        (np.float64, ["_half"]),
    ],
)


@dtypes
@sizes
@masked
def test_self_attention(run, dtype, shapes, num_tokens, dim, masked):
    x = random((2, num_tokens, dim), dtype)
    mask = mask_of(2, num_tokens, masked)
    same(
        run,
        "self_attention_states",
        shapes,
        lambda: qm.self_attention_entropy(x, mask=mask),
    )


@dtypes
@sizes
def test_cosines(run, dtype, shapes, num_tokens, dim):
    x = random((2, num_tokens, dim), dtype)
    x[0, num_tokens // 2] = 0  # a zero token, which has no direction
    same(run, "cosine_similarity", shapes, lambda: qm.cosine_similarity(x))


@dtypes
@pytest.mark.parametrize("num_groups", [1, 130, 257])
def test_nearest_anchors(run, dtype, shapes, num_groups):
    x = random((2, 300, 24), dtype)
    anchors = random((2, num_groups, 24), dtype, seed=1)
    same(run, "nearest_anchors", shapes, lambda: qm.reconstruction_error(x, anchors))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
# d of one head.
@pytest.mark.parametrize(("num_tokens", "dim"), [x for x in SIZES if x[1] < 100])
@masked
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_queries_and_keys(run, dtype, num_tokens, dim, masked, causal):
    q, k = (random((2, num_tokens, dim), dtype, seed=s) for s in (0, 1))
    mask = mask_of(2, num_tokens, masked)
    call = lambda: qm.query_key_entropy(q, k, mask=mask, causal=causal)  # noqa: E731
    same(run, "query_key_entropy", ["_kept"], call)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
@pytest.mark.parametrize(("num_tokens", "dim"), [x for x in SIZES if x[1] < 100])
@masked
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_attention_received(run, dtype, num_tokens, dim, masked, causal):
    q, k = (random((2, num_tokens, dim), dtype, seed=s) for s in (0, 1))
    mask = mask_of(2, num_tokens, masked)
    options = {"query": q, "key": k, "mask": mask, "causal": causal}
    call = lambda: qm.attention_received(**options)  # noqa: E731
    same(run, "query_key_received", ["_kept"], call)


def test_queries_and_keys_with_rows_that_are_not_aligned(run):
    """A view that starts 2 bytes later: its rows are copied element by element."""
    q, k = (random((257 * 64 + 1), np.float16, seed=s)[1:] for s in (0, 1))
    q, k = q.reshape(257, 64), k.reshape(257, 64)
    call = lambda: qm.query_key_entropy(q, k)  # noqa: E731
    same(run, "query_key_entropy", ["_kept"], call)
    call = lambda: qm.attention_received(query=q, key=k)  # noqa: E731
    same(run, "query_key_received", ["_kept"], call)


@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "tf32"])
# Rows around a tile of 64, and around one of 128.
@pytest.mark.parametrize("rows", [40, 64, 65, 129])
def test_linear_maps(run, rows, allowed):
    prior = qm.MLPPrior.init(24, hidden_dim=130)
    x = random((2, rows, 24), np.float32)
    with qm.allow_tf32(allowed):
        same(run, "linear", ["_half"], lambda: qm.alignment_loss(x, prior).total)


# With TF32 float32 has wide tiles too.
@pytest.mark.parametrize("num_tokens", [130, 300])
def test_tf32(run, num_tokens):
    x = random((2, num_tokens, 36), np.float32)
    shapes = ["_half", "_wide"]
    with qm.allow_tf32():
        states, cosines = "self_attention_states", "cosine_similarity"
        same(run, states, shapes, lambda: qm.self_attention_entropy(x))
        same(run, cosines, shapes, lambda: qm.cosine_similarity(x))


def selected(device, monkeypatch, tiling, dtype):
    """Return the shape that a device gets."""
    monkeypatch.setattr(cuda, "current_device", lambda: device)
    return cuda.select_shape(tiling, dtype)


def upper(batch, num_tokens, wide=True):
    """Return the tiling of a symmetric product: tiles that reach the diagonal."""
    return cuda.Tiling(batch, num_tokens, num_tokens, upper=True, wide=wide)


def test_few_blocks_are_halved(monkeypatch):
    dtype = np.dtype(np.float16)
    # Whole tiles are 128 wide: 576 tokens have 5 bands and 5 * 6 / 2 = 15 tiles, far
    # fewer than 132 multiprocessors.
    assert selected(H200, monkeypatch, upper(1, 576), dtype) is cuda.HALF  # 15 tiles
    assert selected(H200, monkeypatch, upper(131, 1), dtype) is cuda.HALF  # 131 of 132
    assert selected(H200, monkeypatch, upper(132, 1), dtype) is cuda.WHOLE


def test_many_blocks_of_16_bits_are_wide(monkeypatch):
    many = upper(96, 4096)
    for dtype in np.float16, BFLOAT16:
        assert selected(H200, monkeypatch, many, np.dtype(dtype)) is cuda.WIDE
    for dtype in np.float32, np.float64:
        assert selected(H200, monkeypatch, many, np.dtype(dtype)) is cuda.WHOLE
    other, dtype = upper(96, 4096, wide=False), np.dtype(np.float16)
    assert selected(H200, monkeypatch, other, dtype) is cuda.WHOLE
    with qm.allow_tf32():
        result = selected(H200, monkeypatch, many, np.dtype(np.float32))
        assert result is cuda.WIDE
    for shared in 64 << 10, 96 << 10:  # a T4 does not have these tensor cores
        small = cuda.Device(40, shared)
        result = selected(small, monkeypatch, many, np.dtype(np.float16))
        assert result is cuda.WHOLE
    fits = cuda.Device(40, 99 << 10)  # the limit of sm_86 and sm_89
    assert selected(fits, monkeypatch, many, np.dtype(np.float16)) is cuda.WIDE


def test_a_wide_tile_must_fill_the_gpu(monkeypatch):
    """One sequence of 4096 tokens has 528 whole tiles or 272 wide ones.

    Whole tiles run two at a time: two full turns. Wide ones need three turns, and the
    third has only 8 tiles for 132 multiprocessors.
    """
    dtype = np.dtype(np.float16)
    assert selected(H200, monkeypatch, upper(1, 4096), dtype) is cuda.WHOLE


def test_tiles_that_reach_the_diagonal():
    # N = 385 has 4 bands of 128: 4 * 5 / 2 = 10 whole tiles.
    def blocks(shape, *sizes):
        return [upper(1, n).blocks(shape) for n in sizes]

    assert blocks(cuda.WHOLE, 1, 128, 129, 385) == [1, 1, 3, 10]
    assert blocks(cuda.HALF, 1, 128, 129) == [2, 2, 6]
    assert blocks(cuda.WIDE, 1, 256, 257) == [2, 2, 6]


# 129 rows and 257 columns in 3 sequences: 2 by 3 whole tiles each make 18.
def test_blocks_have_a_tile_or_a_row_of_tiles():
    tiling = cuda.Tiling(3, 129, 257)
    assert [tiling.blocks(x) for x in (cuda.HALF, cuda.WHOLE, cuda.WIDE)] == [
        27,
        18,
        12,
    ]
    assert tiling.block_tiles(cuda.WHOLE) == 1
    rows = tiling._replace(whole_rows=True)
    assert [rows.blocks(x) for x in (cuda.HALF, cuda.WHOLE, cuda.WIDE)] == [9, 6, 6]
    assert [rows.block_tiles(x) for x in (cuda.WHOLE, cuda.WIDE)] == [3, 2]


def test_room_for_kept_queries(monkeypatch):
    monkeypatch.setattr(cuda, "current_device", lambda: H200)
    f16, f32, f64 = map(np.dtype, (np.float16, np.float32, np.float64))
    assert cuda.kept_bytes(128, f16) == 48 << 10  # d = 64: a query tile and two more
    assert cuda.kept_bytes(130, f16) == 72 << 10  # one step more
    assert cuda.kept_bytes(256, f16) == 96 << 10
    assert cuda.kept_bytes(320, f16) == 0  # two blocks do not fit
    assert cuda.kept_bytes(512, f32) == 192 << 10  # one block fits
    assert cuda.kept_bytes(640, f32) == 0
    assert cuda.kept_bytes(64, f64) == 0  # no registers are left
    # Room for two blocks of 49 KiB, but not with 1 KiB of static memory for each.
    monkeypatch.setattr(cuda, "current_device", lambda: cuda.Device(1, 97 << 10))
    assert cuda.kept_bytes(128, f16) == 48 << 10
    assert cuda.kept_bytes(128, f16, 1 << 10) == 0

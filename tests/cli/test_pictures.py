"""Pictures of files: every mode of Pillow, orientations, and files that are damaged."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image, PngImagePlugin, features

from qm_cupy.cli import pictures
from qm_cupy.cli.pictures import (
    cut_into_patches,
    join_patches,
    patch_side,
    read_picture,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP16 = 257 * RAMP.astype(np.uint16)  # 0..65535; 257 * 255 is 65535
STEP = 1 / 255  # the difference of two neighbours in 8 bits


def save(path, image, **options):
    image.save(path, **options)
    with Image.open(path) as opened:  # the mode that a file has
        return path, opened.mode


def write_tiff(
    path, numbers, *, width=None, bits=None, white=1, form=1, extra=None, order="<"
):
    """Write an uncompressed TIFF file; some have no writer in Pillow.

    `white` is the photometric tag: 0 is "white is zero", 1 "black is zero". `form` is
    the sample format: unsigned, signed or floating. `extra` is the meaning of a second
    channel: 1 is alpha that the first one is multiplied by.
    """
    numbers = np.asarray(numbers)
    # The width in pixels differs from that of the array if a pixel is not whole bytes.
    height, width = len(numbers), width or numbers.shape[1]
    channels = numbers[0, 0].size
    content = numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()
    bits = bits or 8 * numbers.dtype.itemsize
    # (number, type, value); the type 3 has 16 bits, and 4 has 32 bits.
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, white),
        (273, 4, 8), (277, 3, channels), (278, 4, height), (279, 4, len(content)),
        (339, 3, form),
    ]  # fmt: skip
    if channels == 2:  # two values of two bytes are stored in the entry
        tags[2] = (258, 3, bits, bits)
        tags[-1:] = [(338, 3, extra), (339, 3, form, form)]
    entries = b""
    for tag, dtype, *values in tags:
        code = {3: "H", 4: "I"}[dtype] * len(values)
        entries += struct.pack(order + "HHI", tag, dtype, len(values))
        entries += struct.pack(order + code, *values).ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 42)
    head += struct.pack(order + "I", 8 + len(content))  # the directory comes last
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    path.write_bytes(head + content + directory)
    return path


def write_png(path, chunks):
    """Write a PNG file of these chunks, and the chunk that ends a file."""
    content = io.BytesIO()
    content.write(b"\x89PNG\r\n\x1a\n")
    for name, chunk in {**chunks, b"IEND": b""}.items():
        PngImagePlugin.putchunk(content, name, chunk)
    path.write_bytes(content.getvalue())
    return path


def grey(picture):
    """Return the first channel; all are equal."""
    np.testing.assert_array_equal(picture[..., 1], picture[..., 0])
    np.testing.assert_array_equal(picture[..., 2], picture[..., 0])
    return picture[..., 0]


@pytest.fixture
def refused(tmp_path, fails):
    """Check that the demo refuses a picture with one short line, and writes nothing."""

    def check(path, *words):
        # Two folders that do not exist, so that a test can see whether they are made.
        output = tmp_path / "new" / "output"
        fails(["demo", "--image", path, "--output", output], *words)
        assert not output.parent.exists()

    return check


class TestModes:
    @pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif", "tga", "ppm"])
    def test_grey_and_colours_of_8_bits(self, tmp_path, suffix):
        path, mode = save(tmp_path / f"grey.{suffix}", Image.fromarray(RAMP))
        assert mode in ("L", "P")
        np.testing.assert_array_equal(grey(read_picture(path)), np.float32(RAMP) / 255)
        if suffix == "gif":  # it has 256 colours at the most
            return
        colours = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
        path, mode = save(tmp_path / f"rgb.{suffix}", Image.fromarray(colours))
        assert mode == "RGB"
        picture = read_picture(path)
        assert picture.dtype == np.float32
        # The bits that NumPy gives, so that results are those of `quickmerge`.
        np.testing.assert_array_equal(picture, colours.astype(np.float32) / 255)

    def test_one_bit(self, tmp_path):
        path, mode = save(tmp_path / "a.png", Image.fromarray(RAMP > 99))
        assert mode == "1"
        np.testing.assert_array_equal(grey(read_picture(path)), RAMP > 99)

    @pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
    def test_transparent_pixels_are_on_white(self, tmp_path, suffix):
        """Colour c with opacity a on white is a c + (1 - a)."""
        colours = np.stack([RAMP, RAMP[::-1], RAMP.T, RAMP[:, ::-1]], axis=-1)
        image = Image.fromarray(colours)
        # WebP otherwise changes the colour of pixels that are fully transparent.
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        path, mode = save(tmp_path / f"a.{suffix}", image, **options)
        assert mode == "RGBA"
        colour, alpha = colours[..., :3] / 255, colours[..., 3:] / 255
        wanted = alpha * colour + (1 - alpha)
        np.testing.assert_allclose(read_picture(path), wanted, atol=STEP)
        # Fully transparent pixels are white, whatever their colour.
        np.testing.assert_array_equal(read_picture(path)[colours[..., 3] == 0], 1)

    def test_grey_with_opacity(self, tmp_path):
        # The transpose, so that grey and opacity differ.
        image = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP.T)])
        path, mode = save(tmp_path / "a.png", image)
        assert mode == "LA"
        wanted = RAMP.T / 255 * (RAMP / 255) + (1 - RAMP.T / 255)
        np.testing.assert_allclose(grey(read_picture(path)), wanted, atol=STEP)

    def test_grey_multiplied_by_its_opacity(self, tmp_path):
        """Grey 50 of opacity 128 was 99.6 before: on white it is 50 + 127."""
        numbers = np.full((16, 16, 2), (50, 128), np.uint8)
        path = write_tiff(tmp_path / "a.tif", numbers, extra=1)
        with Image.open(path) as image:
            assert image.mode == "La"
        np.testing.assert_allclose(read_picture(path), 177 / 255, atol=2 * STEP)

    @pytest.mark.parametrize("transparency", [None, 7, bytes([255] * 7 + [0, 128])])
    def test_palette(self, tmp_path, transparency):
        """The index 7 is transparent, then 8 is half transparent."""
        colours = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
        image = Image.fromarray(RAMP, "L").convert("P")
        image.putpalette(colours.reshape(-1).tolist())
        options = {} if transparency is None else {"transparency": transparency}
        path, mode = save(tmp_path / "a.png", image, **options)
        assert mode == "P"
        wanted = colours / 255
        if transparency is not None:
            wanted[0, 7] = 1  # white
        if isinstance(transparency, bytes):
            wanted[0, 8] = (128 * wanted[0, 8] + 127) / 255
        np.testing.assert_allclose(read_picture(path), wanted, atol=STEP)

    def test_palette_with_opacity(self, tmp_path):
        image = Image.fromarray(RAMP).convert("P").convert("PA")
        image.putalpha(Image.fromarray(RAMP.T))
        path, mode = save(tmp_path / "a.tif", image)
        assert mode == "PA"
        wanted = RAMP.T / 255 * (RAMP / 255) + (1 - RAMP.T / 255)
        np.testing.assert_allclose(grey(read_picture(path)), wanted, atol=STEP)

    @pytest.mark.parametrize("mode", ["1", "L", "RGB"])
    def test_a_transparent_colour(self, tmp_path, mode):
        """A PNG file may name one colour that is transparent."""
        image = Image.fromarray(RAMP).convert(mode)
        black = (0, 0, 0) if mode == "RGB" else 0
        path, stored = save(tmp_path / "a.png", image, transparency=black)
        assert stored == mode
        # Black becomes white, all other colours stay.
        opaque = np.asarray(image.convert("RGB"))
        wanted = np.where(opaque == 0, 255, opaque) / 255
        np.testing.assert_allclose(read_picture(path), wanted, atol=1e-6)

    def test_inks(self, tmp_path):
        """No ink is white, cyan and yellow ink are green, black ink is black."""
        inks = np.zeros((16, 64, 4), np.uint8)
        inks[:, 16:32, 0] = inks[:, 16:32, 2] = inks[:, 32:48, 3] = 255
        inks[:, 48:, 3] = 255 - RAMP
        path, mode = save(tmp_path / "a.tif", Image.fromarray(inks, "CMYK"))
        assert mode == "CMYK"
        picture = read_picture(path)
        # White, green, black: blocks of 16 columns each; the last block is a ramp.
        for start, colour in ((0, 1), (16, (0, 1, 0)), (32, 0)):
            block = picture[:, start : start + 16]
            np.testing.assert_array_equal(block, np.broadcast_to(colour, block.shape))
        np.testing.assert_allclose(grey(picture[:, 48:]), RAMP / 255, atol=STEP)

    def test_luma_and_chroma(self, tmp_path):
        """Chroma 128 has no colour: a ramp of luma is a grey ramp."""
        none = Image.new("L", (16, 16), 128)
        image = Image.merge("YCbCr", [Image.fromarray(RAMP), none, none])
        path, mode = save(tmp_path / "a.tif", image)
        assert mode == "YCbCr"
        np.testing.assert_allclose(grey(read_picture(path)), RAMP / 255, atol=STEP)

    def test_lightness(self, tmp_path):
        """Of CIELAB: L* = 100 is white, L* = 50.2 is 119 of 255, and a red."""
        # The axes a* and b* are 0 at 128.
        image = Image.new("LAB", (16, 16), (255, 128, 128))
        image.paste((128, 128, 128), (0, 0, 16, 8))
        image.paste((136, 208, 195), (0, 0, 16, 4))  # 53.3, 80, 67: the red of sRGB
        path, mode = save(tmp_path / "a.tif", image)
        assert mode == "LAB"
        picture = read_picture(path)
        np.testing.assert_allclose(picture[8:], 1, atol=2 * STEP)
        np.testing.assert_allclose(picture[4:8], 119 / 255, atol=2 * STEP)
        red = np.broadcast_to([1, 0, 0], (4, 16, 3))
        np.testing.assert_allclose(picture[:4], red, atol=0.05)


class TestLargeNumbers:
    """Numbers that do not fit in 8 bits: a ramp must stay a ramp."""

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
    def test_16_bits(self, tmp_path, suffix):
        """White is 65535, also if no pixel is white."""
        if suffix == "jp2" and not features.check("jpg_2000"):
            pytest.skip("Pillow was built without JPEG 2000")
        path, mode = save(tmp_path / f"a.{suffix}", Image.fromarray(RAMP16 // 2))
        assert mode == ("I" if suffix == "pgm" else "I;16")
        wanted = (RAMP16 // 2).astype(np.float32) / 65535
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    def test_16_bits_of_old_versions_of_pillow(self, tmp_path, monkeypatch):
        """They read the same file in the mode I."""
        path, _ = save(tmp_path / "a.png", Image.fromarray(RAMP16 // 2))
        # The entry of Pillow 10: the mode of the image, and that of the file.
        monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
        with Image.open(path) as image:
            assert image.mode == "I"
        wanted = (RAMP16 // 2).astype(np.float32) / 65535
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_byte_orders(self, tmp_path, order):
        path = write_tiff(tmp_path / "a.tif", RAMP16, order=order)
        with Image.open(path) as image:
            assert image.mode == {"<": "I;16", ">": "I;16B"}[order]
        wanted = RAMP16.astype(np.float32) / 65535
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    def test_white_is_zero(self, tmp_path):
        path = write_tiff(tmp_path / "a.tif", RAMP16, white=0)
        wanted = (65535 - RAMP16).astype(np.float32) / 65535
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    def test_12_bits(self, tmp_path):
        """Two numbers of 12 bits are three bytes."""
        numbers = 16 * RAMP.astype(np.uint16)  # 0..4080
        x, y = numbers[:, ::2], numbers[:, 1::2]
        packed = np.stack([x >> 4, (x & 15) << 4 | y >> 8, y & 255], axis=-1)
        packed = packed.reshape(16, 24).astype(np.uint8)
        path = write_tiff(tmp_path / "a.tif", packed, width=16, bits=12)
        wanted = 16 * RAMP.astype(np.float32) / 4095
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    @pytest.mark.parametrize(
        ("dtype", "order"),
        [
            (np.int16, "<"),
            (np.int16, ">"),
            (np.int32, "<"),
            (np.int32, ">"),
            (np.uint32, "<"),  # Pillow does not read ">"
        ],
    )
    def test_other_integers(self, tmp_path, dtype, order):
        """The smallest number is black and the largest one white."""
        # The whole range: the difference of its ends does not fit in the dtype.
        info = np.iinfo(dtype)
        ramp = np.linspace(info.min, info.max, 256).astype(dtype).reshape(16, 16)
        form = 1 if dtype == np.uint32 else 2
        path = write_tiff(tmp_path / "a.tif", ramp, form=form, order=order)
        with Image.open(path) as image:
            assert image.mode == "I"
        np.testing.assert_allclose(grey(read_picture(path)), RAMP / 255, atol=1e-4)

    @pytest.mark.parametrize("low", [0, -3, 5])
    def test_equal_integers_are_black(self, tmp_path, low):
        image = Image.fromarray(np.full((16, 16), low, np.int32))
        path, _ = save(tmp_path / "a.tif", image)
        assert grey(read_picture(path)).max() == 0

    @pytest.mark.parametrize(
        ("scale", "shift", "wanted"),
        [
            (1, 0, RAMP / 255),
            (0.5, 0.25, 0.5 * RAMP / 255 + 0.25),  # within 0..1: as it is
            (1, -0.5, RAMP / 255),
            (-1000, 7, 1 - RAMP / 255),
            (1e-30, 3, 0 * RAMP),  # all numbers are 3
            (6e38, -3e38, RAMP / 255),  # the difference is infinite in float32
        ],
    )
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_floats(self, tmp_path, scale, shift, wanted, order):
        ramp = (scale * (RAMP / 255) + shift).astype(np.float32)
        path = write_tiff(tmp_path / "a.tif", ramp, form=3, order=order)
        with Image.open(path) as image:
            assert image.mode == "F"
        np.testing.assert_allclose(grey(read_picture(path)), wanted, atol=1e-5)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_floats_that_are_not_finite(self, tmp_path, refused, value):
        numbers = np.full((16, 16), 0.5, np.float32)
        numbers[3, 4] = value  # one number is enough
        path, _ = save(tmp_path / "a.tif", Image.fromarray(numbers))
        refused(path, path, "contains NaN or Inf: replace them by finite numbers")

    def test_16_bits_with_a_transparent_grey(self, tmp_path):
        image = Image.fromarray(RAMP16)
        path, _ = save(tmp_path / "a.png", image, transparency=257 * 5)
        wanted = RAMP16.astype(np.float32) / 65535
        wanted[0, 5] = 1
        np.testing.assert_array_equal(grey(read_picture(path)), wanted)

    @pytest.mark.parametrize("transparent", [False, True])
    def test_colours_of_16_bits(self, tmp_path, transparent):
        """Pillow reads only the first 8 bits of each number, which is a ramp too."""
        numbers = np.stack([RAMP16, RAMP16[::-1], RAMP16.T], axis=-1)
        # Each row starts with a byte for its filter, which is 0 here.
        rows = [b"\0" + row.astype(">u2").tobytes() for row in numbers]
        chunks = {
            b"IHDR": struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0),
            b"tRNS": numbers[2, 3].astype(">u2").tobytes(),
            b"IDAT": zlib.compress(b"".join(rows)),  # the pixels
        }
        if not transparent:
            del chunks[b"tRNS"]
        path = write_png(tmp_path / "a.png", chunks)
        wanted = numbers.astype(np.float32) / 65535
        if transparent:
            wanted[2, 3] = 1
        np.testing.assert_allclose(read_picture(path), wanted, atol=STEP)


# The side of the upright picture that the first row of a file shows, and the side that
# its first column shows, for each orientation: the table of EXIF 2.32.
FIRST_ROW_AND_COLUMN = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


class TestOrientation:
    def stored(self, upright, number):
        """Return the array that a file with this orientation stores."""
        row, column = FIRST_ROW_AND_COLUMN[number]
        if row in ("left", "right"):
            upright = upright.T  # the rows of the file are columns of the picture
        if row in ("bottom", "right"):
            upright = upright[::-1]
        return upright[:, ::-1] if column in ("bottom", "right") else upright

    @pytest.mark.parametrize("number", range(1, 9))
    @pytest.mark.parametrize(
        ("suffix", "dtype"),
        [
            ("png", np.uint8),
            ("png", np.uint16),
            ("tif", np.uint8),
            ("tif", np.float32),
            ("webp", np.uint8),
        ],
    )
    def test_all_orientations(self, tmp_path, number, suffix, dtype):
        # Not square, and all numbers within 0..255, so that each dtype has them.
        upright = np.arange(16 * 20).reshape(16, 20) * 0.75
        upright = upright.astype(dtype)
        metadata = Image.Exif()
        metadata[274] = number
        image = Image.fromarray(np.ascontiguousarray(self.stored(upright, number)))
        options = {"lossless": True} if suffix == "webp" else {}
        path, _ = save(tmp_path / f"a.{suffix}", image, exif=metadata, **options)
        picture = grey(read_picture(path))
        peak = {np.uint8: 255, np.uint16: 65535, np.float32: upright.max()}[dtype]
        np.testing.assert_allclose(picture, upright / peak, atol=1e-6)

    @pytest.mark.parametrize("number", [0, 9, 65535])
    def test_numbers_without_a_meaning(self, tmp_path, number):
        metadata = Image.Exif()
        metadata[274] = number
        path, _ = save(tmp_path / "a.png", Image.fromarray(RAMP), exif=metadata)
        np.testing.assert_array_equal(grey(read_picture(path)), np.float32(RAMP) / 255)

    @pytest.mark.parametrize("exif", [b"not EXIF", b"Exif\0\0MM\0*"])
    def test_damaged_orientation(self, tmp_path, exif):
        """The pixels are intact, so the picture is read."""
        path, _ = save(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)
        np.testing.assert_array_equal(grey(read_picture(path)), np.float32(RAMP) / 255)


def test_damaged_metadata(tmp_path):
    """Pillow warns about a date behind the end of the file; the pixels are intact."""
    path = write_tiff(tmp_path / "a.tif", RAMP)
    content = path.read_bytes()
    date = struct.pack("<HHII", 306, 2, 20, 10**6)  # 20 characters at an offset
    path.write_bytes(content[:-16] + date + content[-4:])
    with pytest.warns(UserWarning, match="Truncated"), Image.open(path):
        pass
    np.testing.assert_array_equal(grey(read_picture(path)), np.float32(RAMP) / 255)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_pictures(tmp_path, suffix):
    # White, then black.
    first, second = Image.new("L", (20, 16), 255), Image.new("L", (20, 16), 0)
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.n_frames == 2
    picture = read_picture(path)
    np.testing.assert_array_equal(picture, np.ones((16, 20, 3)))


class TestRefused:
    """One line that names the file, before any work."""

    def test_sizes(self, tmp_path, refused):
        path, _ = save(tmp_path / "a.png", Image.new("L", (15, 40)))
        refused(path, path, "must have 16 x 16 pixels or more, got 15 x 40")
        path, _ = save(tmp_path / "b.png", Image.new("L", (16, 16 * 5000 + 1)))
        refused(path, path, "up to 5000 times the short side, got 16 x 80001")

    def test_a_damaged_file(self, tmp_path, refused):
        (tmp_path / "text.png").write_text("not a picture")
        refused(tmp_path / "text.png", "text.png is not a picture that Pillow can read")
        (tmp_path / "empty.png").touch()
        refused(tmp_path / "empty.png", "empty.png is empty: it has 0 bytes")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
    def test_a_truncated_file(self, tmp_path, rng, refused, suffix):
        noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
        path, _ = save(tmp_path / f"a.{suffix}", Image.fromarray(noise))
        content = path.read_bytes()
        # The end is in the header, or in the pixels.
        for fraction in (0.1, 0.5, 0.9):
            path.write_bytes(content[: int(fraction * len(content))])
            refused(path, path)

    @pytest.mark.slow("it reads some hundred files")
    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp", "jp2"])
    def test_damaged_bytes(self, tmp_path, rng, suffix):
        """A decoder may fail with any error, or read wrong pixels."""
        image = Image.fromarray(RAMP)
        path, _ = save(tmp_path / f"a.{suffix}", image.resize((24, 24)))
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(100):
            damaged = content.copy()
            # Most of the first bytes are headers, where a wrong byte does most harm.
            spots = rng.integers(0, min(len(damaged), 400), 4)
            damaged[spots] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            try:
                result = read_picture(path)
            except ValueError as error:
                result = str(error)
            if isinstance(result, str):
                assert str(path) in result
                assert len(result) < 300
            else:
                assert result.min() >= 0
                assert result.max() <= 1

    def test_libraries_print_nothing(self, tmp_path, capfd):
        """libtiff itself prints a line; the error of the demo is the only one."""
        path, _ = save(
            tmp_path / "a.tif", Image.fromarray(RAMP), compression="tiff_lzw"
        )
        content = path.read_bytes()
        # The strip of pixels starts at byte 8.
        path.write_bytes(content.replace(content[8:40], bytes([255] * 32)))
        with pytest.raises(ValueError, match="cannot be read"):
            read_picture(path)
        assert capfd.readouterr().err == ""
        os.write(2, b"not silent")  # the file descriptor is what it was
        assert capfd.readouterr().err == "not silent"

    def test_what_is_not_a_file(self, tmp_path, refused):
        refused(tmp_path, "must be a regular file, got", tmp_path)
        refused("/dev/zero", "must be a regular file, got /dev/zero")
        os.mkfifo(tmp_path / "pipe")
        # Without a writer at its other end, opening the pipe would never return.
        refused(tmp_path / "pipe", "must be a regular file, got", "pipe")
        refused(tmp_path / "none.png", "none.png: No such file or directory")
        refused(tmp_path / "pipe" / "a.png", "a.png: Not a directory")
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        refused(tmp_path / "circle", "circle: ")

    def test_names(self, tmp_path, refused):
        """A long name is shortened, and a name with line breaks is on one line."""
        refused("y" * 2000, "yyy: File name too long")
        # The escape sequence would colour the terminal red.
        (tmp_path / "a\nb\x1b[31m.png").touch()
        refused(tmp_path / "a\nb\x1b[31m.png", r"a\nb\x1b[31m.png is empty")
        deep = tmp_path.joinpath(*["d" * 100] * 5)
        deep.mkdir(parents=True)
        (deep / "end.png").touch()
        refused(deep / "end.png", "...", "ddd/end.png is empty")

    def test_bombs(self, tmp_path, refused, monkeypatch):
        """Pillow warns above its limit, and raises an error above twice the limit."""
        path, _ = save(tmp_path / "a.png", Image.fromarray(RAMP))
        np.testing.assert_array_equal(grey(read_picture(path)), np.float32(RAMP) / 255)
        for limit in (255, 100):  # for 256 pixels
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            refused(path, path, f"more than {limit} pixels, the limit of Pillow")

    @pytest.mark.parametrize("side", [10_000, 50_000])
    def test_a_header_that_promises_too_much(self, tmp_path, refused, side):
        """The file has 70 bytes."""
        head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        write_png(tmp_path / "bomb.png", {b"IHDR": head, b"IDAT": b""})
        refused(tmp_path / "bomb.png", "bomb.png has more than 89,478,485 pixels")

    def test_too_large_for_memory(self, tmp_path, refused, monkeypatch):
        """64 × 64 pixels of 160 bytes are 655,360 bytes, which is 0.0006 GiB."""
        path, _ = save(tmp_path / "a.png", Image.new("L", (64, 64)))
        monkeypatch.setattr(pictures, "available_bytes", lambda: 655_359)
        refused(path, path, "64 x 64 pixels", "0.0 GiB of memory", "make it smaller")
        for enough in (655_360, None):  # None: the system does not report it
            monkeypatch.setattr(pictures, "available_bytes", lambda x=enough: x)
            assert read_picture(path).shape == (64, 64, 3)

    def test_a_decoder_with_a_long_message(self, tmp_path, monkeypatch):
        path, _ = save(tmp_path / "a.png", Image.new("L", (64, 64)))

        def load(image):
            raise KeyError("a marker " * 100)

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(ValueError, match="cannot be read: 'a marker") as error:
            read_picture(path)
        assert len(str(error.value).replace(str(path), "")) < 200

    def test_memory_that_ends_in_a_decoder(self, tmp_path, refused, monkeypatch):
        path, _ = save(tmp_path / "a.png", Image.new("L", (64, 64)))

        def load(image):
            raise MemoryError

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        refused(path, path, "does not fit in memory: make it smaller")


class TestPatches:
    def test_joined_patches_are_the_picture(self, rng):
        """37 × 29 pixels have 4 × 3 patches of 8 × 8; the rest is cut off."""
        picture = rng.random((37, 29, 3))
        pixels, rows = cut_into_patches(picture, 8)
        assert pixels.shape == (4 * 3, 192)  # 8 * 8 pixels of 3 colours
        np.testing.assert_array_equal(join_patches(pixels, rows, 8), picture[:32, :24])

    @pytest.mark.parametrize(
        ("height", "width", "side"),
        [
            (16, 16, 8),
            (600, 512, 8),
            (800, 400, 8),
            (801, 400, 9),
            (20_000, 16, 8),
            (20_001, 16, 16),  # not 9, which would leave 7 of 16 columns out
            (16, 80_000, 16),
        ],
    )
    def test_the_side_of_a_patch(self, height, width, side):
        assert patch_side(height, width) == side
        assert 1 <= (height // side) * (width // side) <= 5000


def test_a_limit_of_memory(tmp_path):
    """A process that may use 3 GiB refuses a picture that needs 3.7 GiB."""
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_AS
    save(tmp_path / "a.png", Image.new("L", (5000, 5000)))
    # In a new process, because a limit cannot be removed.
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (3 * 2**30,) * 2)\n"
        "from qm_cupy.cli.main import main\n"
        "raise SystemExit(main(['demo', '--image', 'a.png']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    words = "a.png has 5000 x 5000 pixels, for which the demo needs about 3.7 GiB of"
    assert f"qm-cupy: error: --image {words} memory, but " in done.stderr
    assert done.stderr.endswith(" GiB are free: make it smaller\n")

"""Pixels of every kind of file against the array it was written from, and colour of any number of bands."""

import argparse
import itertools
import os
import re
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import TRAINING, assert_same_state, tiny
from PIL import Image

import common
from common import EmptyImageError, Samples, UnreadableImageError, read_image

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "rasters"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
pytestmark = pytest.mark.filterwarnings("error")
GREY, RGB, PALETTE, MASK = "minisblack", "rgb", "palette", "mask"


def numbers(*shape, dtype="u1", seed=0):
    """Random numbers over the whole range of a type; round ones of floats."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def assert_reads(path, array, *args, **kwargs):
    """The file gives `array`, H x W x C, to the last bit: uint8 as it is, others as float32; windows too."""
    image = read_image(path, *args, **kwargs)
    expected = array if array.dtype == np.uint8 else array.astype(np.float32)
    assert image.numpy().dtype == expected.dtype
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), path
    h, w = array.shape[:2]
    for window in ((0, 0, 5, w), (h - 9, w // 2, 9, w - w // 2), (h // 3, 7, 11, 13)):
        y, x, height, width = window
        part = read_image(path, *args, **kwargs, window=window).permute(1, 2, 0).numpy()
        assert np.array_equal(part, expected[y : y + height, x : x + width]), (path, window)


def write(path, array, planar=False, **options):
    """H x W x C by tifffile: bands in each pixel, or one after the other."""
    if array.shape[2] > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    array = np.moveaxis(array, 2, 0) if planar else array
    tifffile.imwrite(path, array.squeeze(), **{"photometric": GREY, **options})


# --------------------------------------------------------------------------------------------------
# TIFF
# --------------------------------------------------------------------------------------------------

LAYOUTS = [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8"])
@pytest.mark.parametrize("planar", [False, True])
def test_types_layouts_and_byte_orders(tmp_path, dtype, planar):
    array = numbers(37, 45, 5, dtype=dtype)
    kinds = itertools.product(LAYOUTS, (None, "lzw", "zlib"), "<>", (False, True))
    for i, (layout, compression, byteorder, big) in enumerate(kinds):
        if big and byteorder == ">":
            continue
        write(tmp_path / f"{i}.tif", array, planar, byteorder=byteorder, bigtiff=big, compression=compression,
              **layout)
        assert_reads(tmp_path / f"{i}.tif", array, 5)
        assert_reads(tmp_path / f"{i}.tif", array[:, :, [3, 0, 3]], bands=[4, 1, 4])


COMPRESSIONS = ["zstd", "lzma", "packbits", "lerc", "webp", "jpeg2000", "lzw", "zlib"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions_and_predictors(tmp_path, compression):
    exact = {"webp": {"lossless": True, "level": 100}, "jpeg2000": {"reversible": True, "level": 0}}
    for i, layout in enumerate(LAYOUTS):
        options = {"compression": compression, "compressionargs": exact.get(compression), **layout}
        for dtype in ["u1"] if compression == "webp" else ["u1", "u2"]:
            array = numbers(37, 45, 3, dtype=dtype)
            write(tmp_path / f"{i}{dtype}.tif", array, **options, photometric=RGB)
            assert_reads(tmp_path / f"{i}{dtype}.tif", array)
        if compression in ("zstd", "lzw", "zlib"):
            for predictor, dtype in ((2, "u1"), (2, "i2"), (2, "u4"), (3, "f4"), (3, "f8")):
                array = numbers(37, 45, 4, dtype=dtype)
                write(tmp_path / f"p{i}{dtype}.tif", array, **options, predictor=predictor)
                assert_reads(tmp_path / f"p{i}{dtype}.tif", array, 4)


@pytest.mark.parametrize("layout", LAYOUTS[:1] + LAYOUTS[2:])
def test_jpeg_compression_gives_rgb(tmp_path, layout):
    y, x = np.mgrid[:64, :96]
    array = np.dstack([2 * x, 2 * y, 255 - x - y]).astype(np.uint8)
    layout = {"compression": "jpeg", "compressionargs": {"level": 98}, **layout}
    write(tmp_path / "a.tif", array, photometric=RGB, **layout)
    image = read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy()
    assert np.abs(image.astype(int) - array).max() < 12
    part = read_image(tmp_path / "a.tif", window=(20, 30, 40, 50)).permute(1, 2, 0).numpy()
    assert np.array_equal(part, image[20:60, 30:80])


def test_one_band_and_pages_are_bands_overviews_are_not(tmp_path):
    array = numbers(20, 24, 6, dtype="u2")
    tifffile.imwrite(tmp_path / "one.tif", array[:, :, 0])
    assert_reads(tmp_path / "one.tif", array[:, :, :1], 1)
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(array, 2, 0), photometric=GREY)
    assert_reads(tmp_path / "pages.tif", array, 6)
    with tifffile.TiffWriter(tmp_path / "overviews.tif") as tiff:
        tiff.write(array, photometric=GREY, planarconfig="contig")
        tiff.write(array[::2, ::2], photometric=GREY, planarconfig="contig", subfiletype=1)
        tiff.write(array[::4, ::4], photometric=GREY, planarconfig="contig")  # as Pillow writes them
        tiff.write(array, photometric=GREY, planarconfig="contig", subfiletype=1)  # as good as the first
    assert_reads(tmp_path / "overviews.tif", array, 6)
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:  # six bands and three more
        tiff.write(array, photometric=GREY, planarconfig="contig")
        tiff.write(array[:, :, 2::-1], photometric=GREY, planarconfig="contig")
    assert_reads(tmp_path / "two.tif", np.dstack([array, array[:, :, 2::-1]]), 9)


def test_rows_of_pixels_as_pages_are_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", numbers(30, 16, 13), photometric=GREY)  # 30 pages of 16 x 13
    with pytest.raises(UnreadableImageError, match="16 x 13 pixels of 30 bands: if H, W and bands are mixed"):
        read_image(tmp_path / "a.tif", 13)


def test_a_large_private_tag_is_no_damage(tmp_path):
    layers = (37724, "B", 2**26, bytes(2**26), True)  # those of Photoshop
    write(tmp_path / "a.tif", numbers(20, 24, 3), photometric=RGB, extratags=[layers])
    assert_reads(tmp_path / "a.tif", numbers(20, 24, 3))


def test_extra_samples_are_alpha_or_data(tmp_path):
    for dtype, kind in itertools.product(("u1", "u2"), ("assocalpha", "unassalpha", "unspecified")):
        array = numbers(20, 24, 4, dtype=dtype)
        write(tmp_path / "a.tif", array, photometric=RGB, extrasamples=[kind])
        assert_reads(tmp_path / "a.tif", array, 4)
        if kind != "unspecified":
            assert_reads(tmp_path / "a.tif", array[:, :, :3], 3)
            continue
        with pytest.raises(UnreadableImageError, match="4 bands, not 3: give --in_chans 4, or choose with"):
            read_image(tmp_path / "a.tif")
    write(tmp_path / "grey.tif", numbers(20, 24, 2), extrasamples=["unassalpha"])
    assert_reads(tmp_path / "grey.tif", numbers(20, 24, 2)[:, :, [0, 0, 0]], 3)
    assert_reads(tmp_path / "grey.tif", numbers(20, 24, 2), 2)


def test_palette_white_is_zero_bits_and_inks(tmp_path):
    index, palette = numbers(20, 24), numbers(3, 256, dtype="u2")
    tifffile.imwrite(tmp_path / "a.tif", index, photometric=PALETTE, colormap=palette)
    assert_reads(tmp_path / "a.tif", np.moveaxis((palette >> 8).astype(np.uint8)[:, index], 0, 2))
    tifffile.imwrite(tmp_path / "8.tif", index, photometric=PALETTE, colormap=palette >> 8)  # old
    assert_reads(tmp_path / "8.tif", np.moveaxis((palette >> 8).astype(np.uint8)[:, index], 0, 2))
    for dtype, expected in (("u1", 255 - index), ("u2", index.astype("u2"))):  # 16 bits keep their own values
        tifffile.imwrite(tmp_path / "b.tif", index.astype(dtype), photometric="miniswhite")
        assert_reads(tmp_path / "b.tif", expected[:, :, None], 1)
    tifffile.imwrite(tmp_path / "c.tif", index > 99, photometric=GREY)
    assert_reads(tmp_path / "c.tif", 255 * (index > 99).astype(np.uint8)[:, :, None], 1)
    inks = Image.fromarray(numbers(20, 24, 3)).convert("CMYK")
    tifffile.imwrite(tmp_path / "d.tif", np.array(inks), photometric="separated")
    assert_reads(tmp_path / "d.tif", np.array(inks.convert("RGB")))


def test_grey_becomes_three_and_rgb_its_luma_in_8_bits_only(tmp_path):
    rgb, grey = numbers(20, 24, 3), numbers(20, 24, 1, seed=1)
    luma = np.array(Image.fromarray(rgb).convert("L"))[:, :, None]
    for name in ("rgb.tif", "rgb.png"):
        (tifffile.imwrite if name[-3:] == "tif" else imagecodecs.imwrite)(tmp_path / name, rgb)
        assert_reads(tmp_path / name, luma, 1)
    write(tmp_path / "grey.tif", grey)
    assert_reads(tmp_path / "grey.tif", grey.repeat(3, 2))
    write(tmp_path / "deep.tif", grey.astype(np.uint16))
    with pytest.raises(UnreadableImageError, match="1 band, not 3"):
        read_image(tmp_path / "deep.tif")
    write(tmp_path / "bands.tif", rgb)  # nobody says that these three are colours
    with pytest.raises(UnreadableImageError, match="3 bands, not 1"):
        read_image(tmp_path / "bands.tif", 1)


# --------------------------------------------------------------------------------------------------
# No data
# --------------------------------------------------------------------------------------------------


def filled(array, valid):
    """By a plain loop: the mean of the valid pixels, band by band."""
    result = array.copy()
    for band in range(array.shape[2]):
        values = [float(v) for v, ok in zip(array[:, :, band].ravel(), valid.ravel(), strict=True) if ok]
        mean = sum(values) / len(values)
        result[:, :, band][~valid] = round(mean) if array.dtype == np.uint8 else mean
    return result


def assert_filled(path, array, valid, *args, **kwargs):
    image = read_image(path, *args, **kwargs).permute(1, 2, 0).numpy()
    with np.errstate(over="ignore"):
        array = array if array.dtype == np.uint8 else array.astype(np.float32)
    np.testing.assert_allclose(image, filled(array, valid), rtol=1e-6)
    assert np.array_equal(common.read_masked(path, *args, **kwargs)[1], valid)


NO_DATA = [("f4", "-9999"), ("f4", "-3.4028234663852886e+38"), ("f4", "-3.4e38"), ("f4", "nan"),
           ("f4", "-99,5"), ("i2", "-32768.0"), ("i2", "-32768"), ("u1", "0"), ("u2", "65535"),
           ("f8", "-1.7976931348623157e+308"), ("u8", "18446744073709551615")]


@pytest.mark.parametrize("dtype, text", NO_DATA)
@pytest.mark.parametrize("options", [{}, {"planar": True, "compression": "zlib", "tile": (16, 16)}])
def test_declared_no_data_is_filled(tmp_path, dtype, text, options):
    array = numbers(20, 24, 3, dtype=dtype)
    array[array == np.dtype(dtype).type(0)] = 1
    hole = float(text.replace(",", ".")) if "." in text or np.dtype(dtype).kind == "f" else int(text)
    array[3:7, 4:9, 1] = hole
    array[12, :, 0] = hole
    valid = np.ones((20, 24), bool)
    valid[3:7, 4:9] = valid[12] = False
    tag = [(42113, "s", 0, text, True)]
    write(tmp_path / "a.tif", array, extratags=tag, **options)
    if dtype[0] != "u" or dtype == "u1":
        assert_filled(tmp_path / "a.tif", array, valid, 3)
    else:
        assert np.array_equal(common.read_masked(tmp_path / "a.tif")[1], valid)
    valid[3:7, 4:9] = True  # band 2 is not asked for
    assert np.array_equal(common.read_masked(tmp_path / "a.tif", bands=[3, 1])[1], valid)
    array[:] = hole
    write(tmp_path / "none.tif", array, extratags=tag, **options)
    with pytest.raises(EmptyImageError, match=r"none.tif: no valid pixel$"):
        read_image(tmp_path / "none.tif")


def test_no_data_that_the_type_cannot_hold_or_no_number_is_none(tmp_path):
    for text in ("-9999", "0.5", "1e40", "none", ""):
        write(tmp_path / "a.tif", numbers(20, 24, 3), extratags=[(42113, "s", 0, text, True)])
        assert_reads(tmp_path / "a.tif", numbers(20, 24, 3))


def test_not_finite_pixels_are_filled(tmp_path):
    array, valid = numbers(20, 24, 3, dtype="f4"), np.ones((20, 24), bool)
    array[2, 3, 1], array[5, 6, 0], array[7, 8, 2] = np.nan, np.inf, -np.inf
    valid[[2, 5, 7], [3, 6, 8]] = False
    write(tmp_path / "a.tif", array)
    np.save(tmp_path / "a.npy", array)
    for name in ("a.tif", "a.npy"):
        assert_filled(tmp_path / name, array, valid)


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "jpeg"}])
def test_tiles_of_which_some_have_a_mask(tmp_path, options):
    masked = 0
    for i in range(72):
        array, mask = np.full((16, 16, 3), 60 + i, np.uint8), np.ones((16, 16), bool)
        with tifffile.TiffWriter(tmp_path / f"{i}.tif") as tiff:
            tiff.write(array, photometric=RGB, **options)
            if i % 8 == 0:
                mask[:, : 5 + i // 8], masked = False, masked + 1
                tiff.write(mask, photometric=MASK, subfiletype=4)
                tiff.write(array[::2, ::2], photometric=RGB, subfiletype=1)
                tiff.write(mask[::2, ::2] & False, photometric=MASK, subfiletype=5)
        pixels, valid = common.read_masked(tmp_path / f"{i}.tif")
        assert np.abs(pixels.astype(int) - 60 - i).max() < 3
        assert valid is None if mask.all() else np.array_equal(valid, mask)
    assert masked == 9


def test_mask_hides_pixels(tmp_path):
    array, mask = numbers(20, 24, 3), numbers(20, 24) > 60
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(array, photometric=RGB)
        tiff.write(mask, photometric=MASK, subfiletype=4)
    assert_filled(tmp_path / "a.tif", array, mask)
    assert_filled(tmp_path / "a.tif", array[4:14, 6:12], mask[4:14, 6:12], window=(4, 6, 10, 6))


def test_left_out_tiles_are_no_data(tmp_path):
    array, valid = numbers(32, 48, 2, dtype="i2"), np.ones((32, 48), bool)
    for text, tile in itertools.product(("-32768", None), (2, 5)):
        tiles = [array[y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16, 32)]
        tiles[tile] = None
        tag = [(42113, "s", 0, text, True)] if text else []
        tifffile.imwrite(tmp_path / "a.tif", iter(tiles), shape=array.shape, dtype=array.dtype, tile=(16, 16),
                         photometric=GREY, planarconfig="contig", extratags=tag)
        expected, valid = array.copy(), np.ones((32, 48), bool)
        y, x = (0, 32) if tile == 2 else (16, 32)
        expected[y : y + 16, x : x + 16] = 0
        valid[y : y + 16, x : x + 16] = False
        if text:
            assert_filled(tmp_path / "a.tif", array, valid, 2)
        else:
            assert_reads(tmp_path / "a.tif", expected, 2)
    write(tmp_path / "all.tif", array)
    with tifffile.TiffFile(tmp_path / "all.tif", mode="r+b") as tiff:  # uncompressed, its only strip left out
        for tag in (273, 279):
            tiff.pages[0].tags[tag].overwrite(0)
    assert_reads(tmp_path / "all.tif", np.zeros_like(array), 2)


# --------------------------------------------------------------------------------------------------
# Other files, folders of bands
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("suffix", [".jp2", ".j2k.jp2"])
def test_jpeg_2000(tmp_path, dtype, suffix):
    codec = {"codecformat": "j2k"} if "j2k" in suffix else {}
    for C in (1, 3, 4):
        array = numbers(37, 45, C, dtype=dtype)
        data = imagecodecs.jpeg2k_encode(array.squeeze(), level=0, reversible=True, **codec)
        (tmp_path / f"{C}{suffix}").write_bytes(data)
        assert_reads(tmp_path / f"{C}{suffix}", array, C)
        assert common.image_size(tmp_path / f"{C}{suffix}", C) == (37, 45)


def test_npy_both_ways(tmp_path):
    for dtype in ("u1", "i1", "u2", "f4", "f8", ">f4", "?"):
        array = numbers(20, 24, 5, dtype=dtype) if dtype != "?" else numbers(20, 24, 5) > 99
        np.save(tmp_path / "hwc.npy", array)
        np.save(tmp_path / "fortran.npy", np.asfortranarray(array))
        np.save(tmp_path / "chw.npy", np.moveaxis(array, 2, 0))
        np.save(tmp_path / "hw.npy", array[:, :, 0])
        for name in ("hwc", "fortran", "chw"):
            assert_reads(tmp_path / f"{name}.npy", array, 5)
        assert_reads(tmp_path / "hw.npy", array[:, :, :1], 1)
        assert_reads(tmp_path / "hwc.npy", array[:, :, [4, 1]], bands=[5, 2])
    np.save(tmp_path / "square.npy", numbers(5, 24, 24))
    np.save(tmp_path / "tile.npy", numbers(8, 8, 20))
    assert_reads(tmp_path / "square.npy", numbers(5, 24, 24).transpose(1, 2, 0)[:, :, [3, 2]], bands=[4, 3])
    assert read_image(tmp_path / "tile.npy", bands=[7, 2]).shape == (2, 8, 8)
    with pytest.raises(UnreadableImageError, match="20 x 24 x 5 numbers, neither H x W x 3 nor 3 x H x W"):
        read_image(tmp_path / "hwc.npy")


@pytest.mark.parametrize("C, kind", [(1, 0), (3, 2)])
def test_a_png_of_16_bit_with_a_transparent_colour(tmp_path, C, kind):
    array, parts = numbers(20, 24, C, dtype="u2"), [b"\x89PNG\r\n\x1a\n"]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    for name, data in ((b"IHDR", struct.pack(">2I5B", 24, 20, 16, kind, 0, 0, 0)), (b"tRNS", bytes(2 * C)),
                       (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    (tmp_path / "a.png").write_bytes(b"".join(parts))
    assert_reads(tmp_path / "a.png", array, C)


def test_a_png_of_more_pixels_than_pillow_allows_by_default(tmp_path, recwarn):
    Image.new("1", (14_000, 13_000)).save(tmp_path / "a.png")
    assert common.image_size(tmp_path / "a.png") == (13_000, 14_000) and not recwarn
    assert read_image(tmp_path / "a.png", 1, window=(5, 6, 7, 8)).shape == (1, 7, 8)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp"])
def test_8_bit_rgb_is_what_pillow_decodes_in_the_same_memory(tmp_path, name):
    y, x = np.mgrid[:40, :56]
    Image.fromarray(np.dstack([4 * x, 6 * y, x + y]).astype(np.uint8)).save(tmp_path / name)
    array = np.array(Image.open(tmp_path / name).convert("RGB"))
    assert read_image(tmp_path / name).stride() == (1, 3 * 56, 3)
    assert_reads(tmp_path / name, array)
    assert_reads(tmp_path / name, array[:, :, [2, 0]], bands=[3, 1])


def test_content_counts_not_the_suffix(tmp_path):
    array = numbers(20, 24, 3, dtype="u2")
    write(tmp_path / "tiff.png", array, planar=True, photometric=RGB)  # Pillow would give the upper bytes
    assert_reads(tmp_path / "tiff.png", array)
    Image.fromarray(numbers(20, 24, 3)).save(tmp_path / "png.png")
    (tmp_path / "png.png").rename(tmp_path / "png.tif")
    assert_reads(tmp_path / "png.tif", numbers(20, 24, 3))


def test_a_folder_of_bands_is_the_image(tmp_path):
    sides = {"B02": 120, "B8A": 60, "B01": 20}
    for place, suffix in (("x/S2A_1", "tif"), ("x/S2A_2", "npy")):
        (tmp_path / place).mkdir(parents=True)
        for i, (band, side) in enumerate(sides.items()):
            array = numbers(side, side, dtype="u2", seed=i)
            path = tmp_path / place / f"{Path(place).name}_{band}.{suffix}"
            (np.save if suffix == "npy" else tifffile.imwrite)(path, array)
        (tmp_path / place / "labels_B8.txt").touch()
    folders = common.list_images(tmp_path, bands=["B01", "B02"])
    assert list(folders) == [str(tmp_path / "x/S2A_1"), str(tmp_path / "x/S2A_2")]
    for folder in folders:
        image = read_image(folder, bands=["b01", "B02", "B8A"])
        assert image.shape == (3, 120, 120) and image.dtype == torch.float32
        assert np.array_equal(image[1], numbers(120, 120, dtype="u2"))
        for band, i in ((0, 2), (2, 1)):
            side = list(sides.values())[i]
            array = torch.from_numpy(numbers(side, side, dtype="u2", seed=i).astype(np.float32))
            torch.testing.assert_close(image[band], bilinear(array, 120), rtol=1e-5, atol=0)
        part = read_image(folder, bands=["B01", "B02", "B8A"], window=(100, 30, 20, 50))
        assert torch.equal(part, image[:, 100:, 30:80])
        assert common.image_size(folder, bands=["B01", "B8A"]) == (60, 60)
    os.remove(tmp_path / "x/S2A_1/S2A_1_B8A.tif")
    with pytest.raises(UnreadableImageError, match=r"S2A_1: no file of band B8A$"):
        read_image(folders[0], bands=["B01", "B8A"])
    (tmp_path / "x/S2A_2/other_b01.TIF").touch()
    with pytest.raises(UnreadableImageError, match="S2A_2: 2 files of band B01: S2A_2_B01.npy, other_b"):
        read_image(folders[1], bands=["B01"])
    with pytest.raises(UnreadableImageError, match="a folder: name the bands in it with --bands"):
        read_image(folders[0])


def bilinear(array, side):
    """Each new pixel's centre in the old grid, between its four neighbours; by hand."""
    h, scale = len(array), len(array) / side
    at = ((torch.arange(side) + 0.5) * scale - 0.5).clamp(0, h - 1)
    low = at.floor().long()
    high, share = (low + 1).clamp(max=h - 1), (at - low)
    rows = array[low] * (1 - share)[:, None] + array[high] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, high] * share


def test_no_data_of_small_bands_is_not_blended_in(tmp_path):
    small, large = np.full((10, 10), 50, np.float32), np.full((20, 20), 7, np.uint8)
    small[:, :4] = -9999
    tifffile.imwrite(tmp_path / "a_S.tif", small, extratags=[(42113, "s", 0, "-9999", True)])
    tifffile.imwrite(tmp_path / "a_L.tif", large)
    pixels, valid = common.read_masked(tmp_path, bands=["S", "L"])
    assert np.array_equal(valid, np.arange(20)[None].repeat(20, 0) >= 8)
    assert (pixels == [50, 7]).all() and pixels.dtype == np.float32


# --------------------------------------------------------------------------------------------------
# Windows, measured pixels
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 70), (32, 96), (20, 40), (9, 9)])
def test_windows_are_a_grid_whose_last_ones_are_shifted_inwards(tmp_path, shape):
    array, T = numbers(*shape, 2, dtype="i2"), 32
    write(tmp_path / "a.tif", array, tile=(16, 16), compression="zlib")
    np.save(tmp_path / "b.npy", numbers(33, 32, 2, dtype="i2"))
    samples = Samples([str(tmp_path / "a.tif"), str(tmp_path / "b.npy")], 2, None, T)
    tops, lefts = ([*range(0, side - T, T), max(0, side - T)] for side in shape)
    expected = [(top, left) for top in tops for left in lefts]
    assert len(samples) == len(expected) + 2
    for i, (top, left) in enumerate(expected):
        assert np.array_equal(samples[i].permute(1, 2, 0), array[top : top + T, left : left + T])
    for i, top in ((len(expected), 0), (len(expected) + 1, 1)):
        assert np.array_equal(samples[i].permute(1, 2, 0), numbers(33, 32, 2, dtype="i2")[top : top + T])


def test_a_window_decodes_only_what_is_under_it(tmp_path):
    array = numbers(96, 96, 2)
    for name, layout in (("tiles", {"tile": (16, 16)}), ("strips", {"rowsperstrip": 16})):
        path = tmp_path / f"{name}.tif"
        write(path, array, compression="zlib", **layout)
        with tifffile.TiffFile(path) as tiff:
            begin, size = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
        data = bytearray(path.read_bytes())
        data[begin : begin + size] = b"\xff" * size
        path.write_bytes(data)
        part = read_image(path, 2, window=(0, 60, 80, 36)).permute(1, 2, 0)
        assert np.array_equal(part, array[:80, 60:])
        for window in (None, (0, 60, 81, 36)):
            with pytest.raises(UnreadableImageError, match=f"{name}.tif"):
                read_image(path, 2, window=window)


def test_a_window_without_a_valid_pixel_gives_its_place_to_another_of_its_image(tmp_path):
    array = np.full((64, 96), -1, np.int16)
    array[40:50, 70:80] = numbers(10, 10, dtype="u1")  # in window 5 of 6 alone
    tag = [(42113, "s", 0, "-1", True)]
    tifffile.imwrite(tmp_path / "a.tif", array, extratags=tag)
    tifffile.imwrite(tmp_path / "b.tif", np.full((20, 20), -1, np.int16), extratags=tag)
    samples = Samples([str(tmp_path / "a.tif"), str(tmp_path / "b.tif")], 1, None, 32)
    assert len(samples) == 7
    assert all(torch.equal(samples[i], samples[5]) for i in range(6))
    with pytest.raises(EmptyImageError, match="b.tif: no valid pixel"):
        samples[6]


def test_workers_read_what_the_main_process_reads(tmp_path):
    for i in range(8):
        array = numbers(40, 40, 3, dtype="u2", seed=i)
        write(tmp_path / f"{i}.tif", array, compression="zlib", tile=(16, 16))
    samples = Samples(common.list_images(tmp_path), 3, None, 32)
    loader = torch.utils.data.DataLoader(samples, 4, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), torch.stack([samples[i] for i in range(len(samples))]))


def write_measured(folder, dtype="f4", C=2):
    """Six files with no-data, one damaged; returns all valid pixels N x C."""
    pixels = []
    for i in range(6):
        array = (np.random.default_rng(i).normal(-2.6e6, 4e4, (30, 20 + i, C))).astype(dtype)
        array[:, 1] = 3e38
        write(folder / f"{i}.tif", array, extratags=[(42113, "s", 0, "3e38", True)])
        pixels.append(np.delete(array, 1, 1).reshape(-1, C).astype(np.float64))
    (folder / "damaged.tif").write_bytes(b"II*\0")
    return np.concatenate(pixels)


def make_args(*words):
    parser = argparse.ArgumentParser()
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs="+")
    parser.add_argument("--img_size", type=int, default=20)
    return parser.parse_args([str(word) for word in words])


def test_mean_and_std_are_measured_on_valid_pixels_and_can_be_pasted_back(tmp_path):
    pixels = write_measured(tmp_path)
    samples, args = Samples(common.list_images(tmp_path), 2), make_args()
    [line] = common.set_pixels(samples, args, [0, 0, 0], [1, 1, 1])
    np.testing.assert_allclose(args.mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(args.std, pixels.std(0), rtol=1e-5)
    assert samples.dtype == torch.float32 and "e+" not in line
    again = make_args(*line.split(": ")[1].split())
    assert (again.mean, again.std) == (args.mean, args.std)
    assert common.plain_decimals([-2.6e20, 1.5e-9, -15.75, 0]) == f"-26{19 * '0'} 0.0000000015 -15.75 0"
    for i, array in enumerate(numbers(6, 30, 20, dtype="i4")):  # a mean far above the deviation
        tifffile.imwrite(tmp_path / f"{i}.tif", 1e7 + array.astype(np.float64) / 2**26)
    found = common.measure_pixels(Samples([str(tmp_path / f"{i}.tif") for i in range(6)], 1))
    values = (1e7 + numbers(6, 30, 20, dtype="i4") / 2**26).astype(np.float32).astype(np.float64)
    assert abs(found.mean[0] - values.mean()) < 1e-4 * values.std()


def test_a_constant_band_has_a_deviation_of_1(tmp_path):
    array = numbers(33, 35, 2)
    array[:, :, 1] = 7  # as quality bands have it; 7 / 255 is no float32
    for i in range(20):
        np.save(tmp_path / f"{i}.npy", array)
    found = common.measure_pixels(Samples(common.list_images(tmp_path), 2))
    assert found.std[1] == 1 and abs(found.std[0] - array[:, :, 0].std() / 255) < 1e-4


@pytest.mark.parametrize("mean, std, fits", [(-2.6e6, 4e4, True), (-2.7e6, 9e4, True), (0.4, 0.1, False),
                                             (-2.6e6, 9e5, False), (-2.6e6, 1e3, False), (-2e6, 4e4, False)])
def test_given_mean_and_std_are_taken_with_a_warning_where_far_off(tmp_path, mean, std, fits):
    write_measured(tmp_path, C=1)
    samples, args = Samples(common.list_images(tmp_path), 1), make_args("--mean", f"{mean:.1f}", "--std", std)
    lines = common.set_pixels(samples, args, [0, 0, 0], [1, 1, 1])
    assert (args.mean, args.std) == ([mean], [std])
    warning = "warning: --mean and --std are far from the images' own, --mean"
    assert not lines if fits else lines[0].startswith(warning)


def test_default_mean_and_std_are_the_methods_for_8_bit_rgb_alone(tmp_path, capsys):
    Image.fromarray(numbers(30, 30, 3)).save(tmp_path / "a.png")
    samples, args = Samples(common.list_images(tmp_path)), make_args()
    assert common.set_pixels(samples, args, (0.1, 0.2, 0.3), (1, 2, 3)) == []
    assert args.mean == [0.1, 0.2, 0.3] and args.std == [1, 2, 3] and samples.dtype == torch.uint8
    two, args = Samples(common.list_images(tmp_path), bands=[3, 1]), make_args()
    common.set_pixels(two, args, (0.1, 0.2, 0.3), (1, 2, 3))
    np.testing.assert_allclose(args.mean, numbers(30, 30, 3)[:, :, [2, 0]].mean((0, 1)) / 255, rtol=1e-5)
    [line] = common.set_pixels(samples, make_args("--img_size", 31), (0, 0, 0), (1, 1, 1))
    assert "warning: --img_size 31: most images are smaller" in line and "30 is their median side" in line
    with pytest.raises(SystemExit):
        common.set_pixels(samples, make_args("--mean", 0, 0, 0), (0, 0, 0), (1, 1, 1))
    assert "give 3 values for each" in capsys.readouterr().err
    write(tmp_path / "b.tif", numbers(30, 30, 3, dtype="u2"), photometric=RGB)
    samples.paths = [*samples.paths, str(tmp_path / "b.tif")]
    with pytest.raises(UnreadableImageError, match="b.tif: torch.float32 among torch.uint8"):
        samples[1]


@pytest.mark.parametrize("words, in_chans, expected", [
    (None, None, 3), (None, 12, 12), ("4 3 2", None, [4, 3, 2]), ("B04 B8A", 2, ["B04", "B8A"]),
    ("4 B03", None, "numbers from 1, or names, not both"), ("0 1", None, "numbers from 1"),
    ("4 3 2", 4, "--in_chans 4: --bands 4 3 2 are 3")])
def test_bands_by_number_or_name_give_the_channels(capsys, words, in_chans, expected):
    bands = words and [common.band(word) for word in words.split()]
    args = argparse.Namespace(bands=bands, in_chans=in_chans)
    if isinstance(expected, str):
        with pytest.raises(SystemExit):
            common.check_bands(args)
        assert expected in capsys.readouterr().err
        return
    common.check_bands(args)
    assert bands is None or bands == expected
    assert args.in_chans == (expected if bands is None else len(expected))


def test_load_samples(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in (1, 2):
        write(tmp_path / f"data/{i}.tif", numbers(40, 50, 5, dtype="u2", seed=i))
    args = make_args()
    vars(args).update(data_path=tmp_path / "data", output_dir=tmp_path, bands=[5, 1], tile_size=30)
    args.in_chans = None
    samples = common.load_samples(args, common.init_process("cpu"), (0, 0, 0), (1, 1, 1))
    assert len(samples) == 2 * 4 and args.in_chans == 2 and samples.dtype == torch.float32
    assert f"--mean {common.plain_decimals(args.mean)} --std" in capsys.readouterr().out
    array = numbers(40, 50, 5, dtype="u2", seed=1)
    assert np.array_equal(samples[3].permute(1, 2, 0), array[10:, 20:, [4, 0]])


# --------------------------------------------------------------------------------------------------
# What is no data, and bad files
# --------------------------------------------------------------------------------------------------


def test_folders_that_are_not_data(tmp_path, capsys):
    names = ["a/x.png", "a/@eaDir/x.png", "a/.hidden/x.png", "run/views.png", "run/log.jsonl", "out/x.png",
             "probe/results.jsonl", "probe/deep/x.png", "stopped/checkpoint.pth", "stopped/x.png", "b/x.png",
             "b/config.json", "export/config.json", "export/model.safetensors", "export/x.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / "a/x.png"), str(tmp_path / "b/x.png")]
    assert list(common.list_images(tmp_path, exclude=tmp_path / "out")) == expected
    data = {folder.name for folder in tmp_path.iterdir() if common.is_data(folder, tmp_path / "out")}
    assert data == {"a", "b"}
    for folder, reason in (("run", "holds log.jsonl"), ("export", "holds config.json and model.safetensors")):
        with pytest.raises(SystemExit):
            common.list_images(tmp_path / folder)
        assert reason in capsys.readouterr().err
    (tmp_path / "cubes").mkdir()
    for name, words in (("a.npz", "save each array as .npy"), ("a.h5", "write each image as a TIFF")):
        (tmp_path / "cubes" / name).touch()
        with pytest.raises(SystemExit):
            common.list_images(tmp_path / "cubes")
        error = capsys.readouterr().err
        assert words in error and "no image in it" in error and error.count("\n") == 1


def bad_files(folder):
    """File name -> what is said of it."""
    array = numbers(40, 40, 3, dtype="u2")
    np.savez(folder / "a.npz", array)
    (folder / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (folder / "hdf5.tif").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (folder / "c.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(99))
    (folder / "d.zarr").mkdir()
    np.save(folder / "complex.npy", numbers(8, 8, dtype="f4") * 1j)
    np.save(folder / "text.npy", np.array([["a", "b"]]))
    np.save(folder / "deep.npy", np.zeros((2, 8, 8, 1)))
    np.save(folder / "empty.npy", np.zeros((0, 8, 3)))
    np.save(folder / "object.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    tifffile.imwrite(folder / "complex.tif", numbers(8, 8, dtype="f4") * 1j)
    tifffile.imwrite(folder / "lab.tif", numbers(8, 8, 3), photometric="cielab")
    (folder / "header.tif").write_bytes(b"II*\0\x08\0\0\0")
    for name, options in (("raw", {}), ("zlib", {"compression": "zlib"}), ("jpeg", {"compression": "jpeg"})):
        pixels = array.astype(np.uint8) if name == "jpeg" else array
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric=RGB, tile=(16, 16), **options)
        data = (folder / f"{name}.tif").read_bytes()
        (folder / f"{name}.tif").write_bytes(data[: len(data) - 40])
    write(folder / "deep.tif", array, compression="jpeg2000", photometric=RGB)
    with tifffile.TiffFile(folder / "deep.tif", mode="r+b") as tiff:  # says 8 bits, holds 16
        tiff.pages[0].tags[258].overwrite((8, 8, 8))
    write(folder / "huge.tif", array)
    data = bytearray((folder / "huge.tif").read_bytes())
    for tag in (b"\0\1\4\0\1\0\0\0", b"\1\1\4\0\1\0\0\0"):  # width and length: one number of 32 bits
        at = data.find(tag) + 8
        data[at : at + 2] = b"\xff\xff"
    (folder / "huge.tif").write_bytes(data)
    (folder / "half.jp2").write_bytes(imagecodecs.jpeg2k_encode(array)[:60])
    (folder / "text.png").write_text("no image\nat all")
    (folder / "none.bmp").touch()
    return {
        "a.npz": "save each array as .npy", "b.h5": "HDF5", "hdf5.tif": "HDF5", "c.mat": "as .npy",
        "d.zarr": "Zarr", "complex.npy": "complex", "text.npy": "<U1 pixels", "empty.npy": "",
        "deep.npy": "2 x 8 x 8 x 1 numbers", "object.npy": "Python objects", "complex.tif": "complex",
        "lab.tif": "CIELAB", "deep.tif": "uint16 numbers in a strip or tile of uint8",
        "header.tif": "no image",
        "raw.tif": "truncated", "zlib.tif": "truncated", "jpeg.tif": "truncated", "half.jp2": "",
        "huge.tif": "65535 x 65535 pixels of 3 bands are too many", "text.png": "cannot identify image file",
        "none.bmp": "cannot identify", "gone.tif": "No such file"}


def test_bad_files_get_one_true_line(tmp_path, capfd):
    for name, words in bad_files(tmp_path).items():
        with warnings.catch_warnings(), pytest.raises(UnreadableImageError) as caught:
            warnings.simplefilter("error")
            read_image(tmp_path / name)
        path, reason = str(caught.value).split(": ", 1)
        assert path == str(tmp_path / name) and words in reason and len(reason) > 5 and "\n" not in reason
    assert capfd.readouterr().err == ""  # nor do libraries print


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    rng, array = np.random.default_rng(0), numbers(40, 40, 3)
    for kind in (None, "lzw", "jpeg"):
        tifffile.imwrite(tmp_path / f"{kind}.tif", array, photometric=RGB, compression=kind, tile=(16, 16))
    (tmp_path / "d.jp2").write_bytes(imagecodecs.jpeg2k_encode(array))
    np.save(tmp_path / "e.npy", array)
    read = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, min(len(data), 400), 3):
                data[at] = rng.integers(256)
            (tmp_path / "x").write_bytes(data)
            try:
                read += read_image(tmp_path / "x").shape[0] == 3
            except UnreadableImageError:
                pass
    assert 0 < read < 300


# --------------------------------------------------------------------------------------------------
# Colour and pictures
# --------------------------------------------------------------------------------------------------


def naive_color(kind, image, factor):
    """One image C x H x W of other than 3 bands, band by band."""
    grey = sum(band for band in image) / len(image)
    bands = []
    for band in image:
        if kind == "brightness":
            band = factor * band
        elif kind == "contrast":
            band = factor * band + (1 - factor) * band.mean()
        elif kind == "saturation" and len(image) >= 3:
            band = factor * band + (1 - factor) * grey
        elif kind == "grayscale":
            band = grey
        bands.append(band.clamp(0, 1))
    return torch.stack(bands)


@pytest.mark.parametrize("C", [1, 2, 4, 13])
def test_colour_of_any_number_of_bands(C):
    images = torch.rand(5, C, 12, 14, generator=torch.Generator().manual_seed(C))
    factors = torch.tensor([0, 0.4, 1, 1.3, 2])
    for kind in ("brightness", "contrast", "saturation", "hue"):
        ours = getattr(common, f"adjust_{kind}")(images.clone(), factors)
        for image, factor, result in zip(images, factors, ours, strict=True):
            torch.testing.assert_close(result, naive_color(kind, image, factor), atol=1e-6, rtol=0)
    where = torch.tensor([True, False, True, False, True])
    grey = common.grayscale(images.clone(), where)
    for image, chosen, result in zip(images, where, grey, strict=True):
        torch.testing.assert_close(result, naive_color("grayscale", image, 0) if chosen else image)
    blurred, *alone = (common.gaussian_blur(x.clone(), where, torch.full((5,), 1.5))
                       for x in (images, *images.split(1, 1)))
    torch.testing.assert_close(blurred, torch.cat(alone, 1))
    assert torch.equal(common.solarize(images.clone(), where)[where], torch.where(
        images[where] >= 128 / 255, 1 - images[where], images[where]))
    draws = common.draw_color_jitter((0.4, 0.4, 0.4, 0.1), torch.ones(5), torch.Generator().manual_seed(0))
    jittered = common.color_jitter(images.clone(), *draws)
    for image, factors, order, result in zip(images, *draws[1:], jittered, strict=True):
        for turn in order.tolist():
            image = naive_color(("brightness", "contrast", "saturation", "hue")[turn], image, factors[turn])
        torch.testing.assert_close(result, image, atol=1e-5, rtol=0)


def test_numbers_are_taken_three_deviations_either_way():
    mean, std = [100.0, -2.6e6], [10.0, 4e4]
    x = torch.tensor([[60.0, 70, 100, 115, 130, 200], [-3e6, -2.72e6, -2.6e6, -2.54e6, -2.48e6, 0]])
    crops = x.view(1, 1, 2, 2, 3).expand(2, 3, 2, 2, 3)  # leading dimensions as CMID's pairs have them
    unit = common.to_float(crops, mean, std)
    expected = torch.tensor([[0, 0, 0.5, 0.75, 1, 1], [0, 0, 0.5, 0.75, 1, 1]]).view(2, 2, 3)
    torch.testing.assert_close(unit, expected.expand(2, 3, 2, 2, 3), atol=1e-6, rtol=0)
    normal = common.normalize(unit[0], mean, std, crops.dtype)
    torch.testing.assert_close(normal, (6 * (expected - 0.5)).expand(3, 2, 2, 3), atol=1e-5, rtol=0)
    eight = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert torch.equal(common.to_float(eight, [5.0], [7.0]), eight.float() / 255)
    normal = common.normalize(eight / 255, [0.2], [0.5], torch.uint8).flatten()
    torch.testing.assert_close(normal, torch.tensor([-0.4, 0, 1.6]))


@pytest.mark.parametrize("C", [1, 2, 3, 4, 13])
def test_pictures_show_the_first_three_bands_or_one(tmp_path, C):
    view = torch.linspace(-4, 4, C * 36).view(C, 6, 6)
    common.save_grid(tmp_path / "a.png", [[view, view]], [9.0] * C, [2.0] * C, torch.float32)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[:, 2:8, 2:8]
    shown = (view / 6 + 0.5).clamp(0, 1)[: 3 if C >= 3 else 1].expand(3, 6, 6)
    assert (picture / 255 - shown).abs().max() < 0.6 / 255


# --------------------------------------------------------------------------------------------------
# Real files
# --------------------------------------------------------------------------------------------------


@real
def test_real_files():
    def pages(path):
        with tifffile.TiffFile(path) as tiff:
            return [page.asarray() for page in tiff.pages[:2]]

    for path in sorted((DATA / "s2_l2a_12band").glob("*.tif")):
        array = pages(path)[0]
        assert_reads(path, array, 12)
        assert_reads(path, array[:, :, [3, 2, 1]], bands=[4, 3, 2])
    path = DATA / "landsat7_6band/L7_ETMs.tif"
    assert_reads(path, pages(path)[0], 6)
    for name in ("cogeo", "goes"):
        path = DATA / f"rio_masks/{name}.tif"
        array, mask = pages(path)
        pixels, valid = common.read_masked(path)
        assert np.array_equal(pixels, array)
        assert np.array_equal(valid if valid is not None else np.ones_like(mask), mask)
    with pytest.raises(EmptyImageError):
        read_image(DATA / "rio_masks/all-nodata.tif", 4)
    samples = Samples(common.list_images(DATA / "s2_l2a_12band"), 3, [4, 3, 2], 64)
    assert len(samples) == 5 * 16 and samples[79].shape == (3, 64, 64)


def test_tiff_whose_pages_form_a_loop_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 16, 16), np.uint8), photometric=GREY)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offsets = [page.offset for page in file.pages]
        after = offsets[1] + 2 + 12 * len(file.pages[1].tags)  # where the next page's offset stands
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[after : after + 4] = int(offsets[0]).to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(UnreadableImageError, match="loop"):
        read_image(tmp_path / "a.tif", 1)


# ------------------------------------------------------------------ all four methods


def write_set(folder, kind):
    """30 images of 48 px (or a scene of 96 x 144) with low-frequency content; flags that read them."""
    rng = np.random.default_rng(0)
    count, (height, width) = (2, (96, 144)) if kind == "tiles" else (30, (48, 48))
    folder.mkdir()
    for i in range(count):
        waves = rng.normal(size=(height, width, 4)).cumsum(0).cumsum(1)
        levels = (1000 * (waves - waves.min()) / np.ptp(waves)).astype(np.int16)
        if kind == "13 bands":
            write(folder / f"{i}.tif", np.concatenate([levels] * 4, 2)[..., :13])
        elif kind == "one float":
            np.save(folder / f"{i}.npy", levels[..., 0].astype(np.float32) - 2000)
        elif kind == "folders":
            (folder / str(i)).mkdir()
            for band, step in (("B02", 1), ("B8A", 2)):
                tifffile.imwrite(folder / str(i) / f"T_{i}_{band}.tif", levels[::step, ::step, 0])
        else:
            write(folder / f"{i}.tif", levels, tile=(48, 48))
    return {"13 bands": ["--in_chans", 13], "one float": ["--in_chans", 1],
            "folders": ["--bands", "B8A", "B02"], "tiles": ["--bands", 4, 2, 1, "--tile_size", 48]}[kind]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("script", TRAINING)
def test_8_bit_rgb_gets_the_papers_mean_and_std(train, tmp_path, script):
    args = train(tmp_path, "--max_steps", "1", script=script)["args"]
    papers = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]  # ImageNet's; CMID: MillionAID's
    if script == "cmid":
        papers = [[0.33797, 0.3605, 0.3348], [0.1359, 0.1352, 0.1407]]
    assert [args["mean"], args["std"]] == papers and args["in_chans"] == 3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["13 bands", "one float", "folders", "tiles"])
@pytest.mark.parametrize("script", TRAINING)
def test_every_method_trains_on_any_pixels_and_resumes(run, tmp_path, capsys, script, kind):
    """Measured mean and std go with the backbone; a resumed run equals the unbroken one."""
    more = write_set(tmp_path / "data", kind)
    batch = ["--batch_size_per_gpu", 4, "--max_steps"]

    def start(out, steps, *flags):
        run(script, "--data_path", tmp_path / "data", "--output_dir", tmp_path / out,
            *tiny(script, *more, *batch, steps, *flags))
        return torch.load(tmp_path / out / "checkpoint.pth", weights_only=True)

    unbroken = start("a", 3)
    words = re.search(r"--mean (.*) --std (.*)", capsys.readouterr().out)
    assert [float(word) for word in words[1].split()] == pytest.approx(unbroken["args"]["mean"])
    start("b", 2)
    assert_same_state(start("b", 3), unbroken)
    given = ["--mean", *words[1].split(), "--std", *words[2].split()]  # pasted back
    assert_same_state(start("c", 3, *given), unbroken)
    model = timm.create_model(f"local-dir:{tmp_path}/a/backbone", pretrained=True, num_classes=0).eval()
    C = len(words[1].split())
    assert model.pretrained_cfg["input_size"][0] == C == len(model.pretrained_cfg["mean"])
    assert model(torch.zeros(1, C, 32, 32)).isfinite().all()
    views = np.asarray(Image.open(tmp_path / "a" / "views.png"))
    assert len(np.unique(views)) > 20 and (views.std((0, 1)) > 10).all()


@pytest.mark.parametrize("bands", [None, [1]])
def test_what_is_too_large_to_read_at_once_is_known_from_its_header(tmp_path, monkeypatch, bands):
    """By all bands of the file, which are decoded together; windows of it can be read."""
    write(tmp_path / "a.tif", numbers(20, 30, 4))
    monkeypatch.setattr(common, "MOST_NUMBERS", 20 * 30 * 4 - 1)
    assert common.image_size(tmp_path / "a.tif", 4, bands) == (20, 30)
    common.read_image(tmp_path / "a.tif", 4, bands, (0, 0, 19, 30))
    for call in (partial(common.image_size, whole=True), common.read_image):
        with pytest.raises(common.UnreadableImageError, match="20 x 30 pixels of 4 bands are too"):
            call(tmp_path / "a.tif", 4, bands)

"""Reading rasters: small tiles of many bands against numpy and Pillow, a window of a scene against all of it.

Run it as `python benchmarks/rasters.py`. One thread. Pixels agree to the last bit before they are timed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from benchmarks.timing import compare

KINDS = {"raw": None, "LZW": "lzw", "deflate": "zlib"}


def smooth(rng: np.random.Generator, side: int, C: int, most: int) -> np.ndarray:
    """Some picture side x side x C: slow waves and a little noise, which compress as scenes do."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / 40
    waves = np.stack([np.sin(x + band) * np.cos(y - band) for band in range(C)], -1)
    return (most * (0.5 + 0.4 * waves) + rng.integers(0, most // 50, waves.shape)).astype(np.int32)


def as_floats(path: Path) -> torch.Tensor:
    """What numpy saved, H x W x C, as read_image gives it."""
    array = np.load(path)
    array = array["arr_0"] if path.suffix == ".npz" else array
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)


def repeated(read: Callable, path: Path, times: int, **options: object) -> Callable:
    """Reads a file so many times; returns the last."""
    return lambda: [read(path, **options) for _ in range(times)][-1]


def tiles(folder: Path, rng: np.random.Generator) -> None:
    """64 x 64 x 13 of 16 bits against numpy's own files, 256 x 256 x 4 of 8 bits against Pillow."""
    array = smooth(rng, 64, 13, 4000).astype(np.uint16)
    np.save(folder / "a.npy", array)
    np.savez_compressed(folder / "a.npz", array)
    for name, compression in KINDS.items():
        path, plain = folder / f"{name}.tif", folder / ("a.npz" if compression else "a.npy")
        tifffile.imwrite(
            path, array, photometric="minisblack", planarconfig="contig", compression=compression
        )
        compare(
            f"64 x 64 x 13, {name}, against numpy's {plain.suffix} (100 files)",
            repeated(common.read_image, path, 100, in_chans=13),
            repeated(as_floats, plain, 100),
            atol=0,
            rtol=0,
        )
    array = smooth(rng, 256, 4, 255).clip(0, 255).astype(np.uint8)
    for name, compression in KINDS.items():
        path = folder / f"{name}4.tif"
        tifffile.imwrite(path, array, photometric="rgb", extrasamples=["unassalpha"], compression=compression)
        compare(
            f"256 x 256 x 4, {name}, against Pillow (100 files)",
            repeated(common.read_image, path, 100, in_chans=4),
            repeated(lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1), path, 100),
            atol=0,
            rtol=0,
        )


def window(folder: Path, rng: np.random.Generator, side: int) -> None:
    """224 px in the middle of a tiled, deflated scene against decoding all of it."""
    path, part = folder / "scene.tif", smooth(rng, 1000, 1, 4000).astype(np.uint16)
    scene = np.tile(part[:, :, 0], (side // 1000, side // 1000))
    tifffile.imwrite(path, scene, tile=(256, 256), compression="zlib", predictor=2)
    at = side // 2 + 50
    compare(
        f"a 224 px window of {side} x {side} px",
        lambda: common.read_image(path, 1, window=(at, at, 224, 224)),
        lambda: common.read_image(path, 1)[:, at : at + 224, at : at + 224],
        rounds=3,
        atol=0,
        rtol=0,
    )


def main() -> None:
    """Measures all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=10_000, help="of the scene, in thousands")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiles(Path(folder), np.random.default_rng(0))
        window(Path(folder), np.random.default_rng(1), args.side)


if __name__ == "__main__":
    main()

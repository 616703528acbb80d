"""Time and memory to list folders of many files and to shuffle them: both grow with the number of files.

Run it as `python benchmarks/listing.py`.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def measure(folder: Path, count: int) -> None:
    """Lists `count` files in folders of 1,000 each, draws the first batch; prints seconds and megabytes."""
    for i in range(0, count, 1000):
        (folder / f"{i:07d}").mkdir()
        for j in range(1000):
            (folder / f"{i:07d}" / f"{j:03d}.jpg").touch()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        paths = common.list_images(folder)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    paths = common.list_images(folder)
    megabytes = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    alone = common.Process(0, 1, torch.device("cpu"), None)
    began = time.perf_counter()
    next(iter(common.StepSampler(len(paths), 256, 1, alone, seed=0, start_step=0, end_step=1)))
    first = time.perf_counter() - began
    print(f"{len(paths):8,} files  listed in {sorted(seconds)[2]:.2f} s ({min(seconds):.2f} to "
          f"{max(seconds):.2f})  paths {megabytes:.1f} MB  shuffled in {first:.3f} s, "
          f"{8 * len(paths) / 2**20:.1f} MB")


def main() -> None:
    """Measures three sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[25_000, 50_000, 100_000], help="counts")
    for count in parser.parse_args().files:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), count)


if __name__ == "__main__":
    main()

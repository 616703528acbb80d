"""Seconds and memory to list many images and to read them, in files and in archives: how the cost grows.

The images are PNGs of 8 x 8 pixels: hard links to one in each of 10 x 100 folders, or copies in 20 archives.
Memory is what a process has for itself (Private_* in /proc/PID/smaps_rollup, on Linux alone). Run it as
`python benchmarks/listing.py`.
"""

import argparse
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

ALONE = common.Process(0, 1, torch.device("cpu"), None)


def write_files(folder: Path, count: int) -> None:
    """`count` images in 10 folders of 100 folders each."""
    for i in range(1000):
        inner = folder / f"region_{i // 100}" / f"place_{i:04d}"
        inner.mkdir(parents=True)
        first = inner / "scene_000000.png"
        Image.new("RGB", (8, 8)).save(first)
        for j in range(1, count // 1000):
            os.link(first, inner / f"scene_{j:06d}.png")


def write_archives(folder: Path, count: int) -> None:
    """`count` images in 20 archives of 50 folders each."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    data = png.getvalue() + bytes(-len(png.getvalue()) % 512)
    for k in range(20):
        with open(folder / f"region_{k:02d}.tar", "wb") as file:
            for i in range(50):
                for j in range(count // 1000):
                    info = tarfile.TarInfo(f"place_{i:04d}/scene_{j:06d}.png")
                    info.size = len(png.getvalue())
                    file.write(info.tobuf() + data)
            file.write(bytes(1024))


def private() -> float:
    """Megabytes that this process shares with no other."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+) kB", text, re.M))) / 1024


def apart(function: Callable, *args: object) -> object:
    """What a function returns in a process of its own."""
    receiver, sender = multiprocessing.Pipe(False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def list_once(folder: Path, out: Path) -> tuple[float, float, int]:
    """Seconds, megabytes that stay, images."""
    before, began = private(), time.perf_counter()
    paths = common.list_images(folder, out, archives=out / "archives.npz")
    return time.perf_counter() - began, private() - before, len(paths)


class Read(torch.utils.data.Dataset):
    """Reads images and tells the worker's memory."""

    def __init__(self, samples: common.Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, float]:
        """Process, megabytes."""
        _ = self.samples[key[1]]
        return os.getpid(), private() if key[1] % 100 == 0 else 0.0


def read_some(folder: Path, out: Path, count: int) -> tuple[float, float]:
    """Growth in megabytes of the worker that grows most; seconds an image."""
    samples = common.Samples(common.list_images(folder, out, archives=out / "archives.npz"))
    steps = min(count, len(samples)) // 50
    sampler = common.StepSampler(len(samples), 50, 1, ALONE, seed=0, start_step=0, end_step=steps)
    first, last, began = {}, {}, time.perf_counter()
    for (pids, memory), _ in common.build_loader(Read(samples), sampler, 2, ALONE.device):
        for pid, own in zip(pids.tolist(), memory.tolist(), strict=True):
            if own:
                first.setdefault(pid, own)
                last[pid] = own
    return max(last[pid] - first[pid] for pid in first), (time.perf_counter() - began) / (50 * steps)


def first_step(folder: Path, out: Path) -> float:
    """Seconds from the start of Python to the end of the first step, with its checkpoint."""
    flags = "--arch test_resnet --img_size 32 --moco_k 64 --bn_groups 1 --batch_size_per_gpu 32 --epochs 1"
    flags += " --max_steps 1 --num_workers 2 --device cpu --amp off --warmup_epochs 0"
    began = time.perf_counter()
    script = Path(__file__).parent.parent / "mhcl.py"
    subprocess.run([sys.executable, script, "--data_path", folder, "--output_dir", out, *flags.split()],
                   check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """A line for each number of images, of files and of archives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000],
                        help="counts, multiples of 1,000")
    parser.add_argument("--read", type=int, default=50_000, help="images for the workers to read")
    args = parser.parse_args()
    print("            images   listed, again (s)   first step, again (s)   main process (bytes/image)   "
          "worker (MB)   read (ms)")
    for write in (write_files, write_archives):
        for count in args.images:
            with tempfile.TemporaryDirectory() as name:
                data, out = Path(name) / "data", Path(name) / "out"
                data.mkdir()
                write(data, count)
                seconds, megabytes, images = apart(list_once, data, out)
                again, kept, _ = apart(list_once, data, out)
                growth, per_image = apart(read_some, data, out, args.read)
                start, restart = first_step(data, Path(name) / "run"), first_step(data, out)
            bytes_each = megabytes * 2**20 / images, kept * 2**20 / images
            print(f"{write.__name__[6:]:8} {images:9,}   {seconds:7.2f} {again:7.2f}   {start:11.1f} "
                  f"{restart:8.1f}   {bytes_each[0]:13.0f} {bytes_each[1]:12.0f}   {growth:11.1f}   "
                  f"{1000 * per_image:9.2f}", flush=True)


if __name__ == "__main__":
    main()

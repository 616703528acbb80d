"""Small helpers shared by the scripts. None is a method's idea; take one along with what it calls.

What belongs to a method, and each training loop, stands in its script, twice or four times if need be: who
mends one such twin (`main`, `gather`, `enqueue`, `teacher_temp_at`, the heads) mends the others.

Order: errors, processes and seeds; data; colour on whole batches; backbones and their weights; optimisation;
what a run writes.
"""

import argparse
import atexit
import contextlib
import copy
import difflib
import errno
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors.torch
import timm
import timm.layers
import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
PIXEL_SUFFIXES = IMAGE_SUFFIXES | {".npy"}  # what read_pixels reads
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
                if hasattr(signal, name)]  # Windows lacks two
# Flags of the training scripts that may change between a run and its continuation: those that do not make
# the method. (Batch, accumulation and processes may change, their product, the effective batch, has to stay.)
FREE_FLAGS = {"data_path", "num_workers", "init", "checkpoint_key", "allow_partial", "batch_size_per_gpu",
              "accum_steps", "output_dir", "device", "amp", "compile", "save_every", "save_minutes",
              "log_every", "max_steps", "tensorboard"}
# Flags that checkpoints of earlier versions lack, and what these did.
YOUNGER_FLAGS = {}

# --------------------------------------------------------------------------------------------------
# Errors, processes, seeds
# --------------------------------------------------------------------------------------------------


def fail(message: str, code: int = 2, everywhere: bool = False) -> NoReturn:
    """Ends the program with one line on stderr.

    Args:
        message: what is wrong, and what is allowed.
        code: 2 for wrong usage, 1 for a failed run.
        everywhere: print in any process, for errors that only one may see; else once per machine.
    """
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", *message.splitlines(), file=sys.stderr, flush=True)  # of a library's, each line
    raise SystemExit(code)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, except where it is None or the text tells it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default is None or "default:" in action.help
        return action.help if told else super()._get_help_string(action)


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line, as those of `fail`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)

    def error(message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+): (\S+): (?=must be )", r"\1 \2: ", message)  # of the types below
        fail(message.removeprefix("argument "))

    parser.error = error
    return parser


def number(kind: type, allowed: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """Flag type: an int or float that is `allowed`; `words` end the error's "must be"."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {words}")
        return value

    words = f"a whole number {words}" if kind is int else words
    return parse


def positive(kind: type) -> Callable[[str], float]:
    """Flag type: a finite int or float above 0."""
    return number(kind, lambda value: 0 < value < math.inf, "above 0")


def not_negative(kind: type) -> Callable[[str], float]:
    """Flag type: a finite int or float of at least 0."""
    return number(kind, lambda value: 0 <= value < math.inf, "at least 0")


def unit(kind: type) -> Callable[[str], float]:
    """Flag type: a number in [0, 1]."""
    return number(kind, lambda value: 0 <= value <= 1, "between 0 and 1")


def finite(kind: type) -> Callable[[str], float]:
    """Flag type: a number that is neither infinite nor NaN."""
    return number(kind, math.isfinite, "a finite number")


def default_warmup(given: float | None, usual: int, epochs: int) -> float:
    """Epochs of a warm-up: those given, else the `usual` ones, but at most a tenth of all."""
    return min(usual, epochs / 10) if given is None else given


@dataclass(frozen=True)
class Process:
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None  # for what is on the CPU: stop flags, figures of the log

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def leave(self) -> None:
        """Parts from the other processes, at the end."""
        if self.world_size > 1:
            dist.destroy_process_group()


def init_process(device: str) -> Process:
    """Joins the other processes that `torch.distributed.run` started, or stands alone without it.

    Args:
        device: auto, cpu, cuda or mps; auto takes the first there is of cuda, mps, cpu.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    one_mps = torch.backends.mps.is_available() and world_size == 1  # gloo has no tensors of mps
    found = {"cuda": torch.cuda.is_available(), "mps": one_mps, "cpu": True}
    name = next(kind for kind, there in found.items() if there) if device == "auto" else device
    if not found[name]:
        fail(f"--device {name}: this machine has none" if name == "cuda" else
             "--device mps: this machine has none, or there are several processes")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            fail(f"--nproc_per_node {processes}: this machine has {gpus} GPUs")
        torch.cuda.set_device(local_rank)
    cpu_group = None
    if world_size > 1:
        store = _store_of_this_start(rank, world_size)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size)
        cpu_group = dist.new_group(backend="gloo") if name == "cuda" else dist.group.WORLD
    return Process(rank, world_size, torch.device(name, local_rank if name == "cuda" else 0), cpu_group)


def _store_of_this_start(rank: int, world_size: int) -> dist.Store:
    # The launcher keeps one key-value store over its restarts, in which processes would find the addresses of
    # dead ones. So rank 0 gives each start a name, and the others wait for it; their keys go under that name.
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    if rank > 0:
        arrival = store.add(f"arrivals/{rank}", 1)
        name = store.get(f"name/{rank}/{arrival}").decode()
        store.set(f"{name}/here/{rank}", "")
        return dist.PrefixStore(name, store)
    name, others, deadline = f"start {time.time_ns()}", range(1, world_size), time.monotonic() + 1800
    while not store.check([f"{name}/here/{other}" for other in others]):
        if time.monotonic() > deadline:
            fail(f"after half an hour not all of {world_size} processes are there", code=1)
        for other in others:  # until all live ones have answered; the last arrival may be a dead one's
            store.set(f"name/{other}/{store.add(f'arrivals/{other}', 0)}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, store)


def stream_seed(*parts: int | str) -> int:
    """A 56-bit seed from any numbers and names; the same parts give the same seed everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded with `stream_seed` of the parts."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to under `--amp` (auto, bf16, fp16, off) on `device`; None for no autocast."""
    if amp == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else None
    if amp == "fp16" and device.type != "cuda":
        fail(f"--amp fp16: only on cuda, this is {device.type}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context of `--amp` on `device`, which may be entered again and again."""
    dtype = autocast_dtype(amp, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# --------------------------------------------------------------------------------------------------
# Data: files, samples, batches
# --------------------------------------------------------------------------------------------------


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; the message names file and reason."""


def list_images(root: str | Path, exclude: str | Path | None = None,
                suffixes: set[str] = IMAGE_SUFFIXES, flag: str = "--data_path") -> list[str]:
    """Paths of all images below `root`, links followed, none hidden or in folder `exclude`; sorted."""
    if not os.path.isdir(root):
        fail(f"{flag} {root}: no such folder")
    paths, done = [], {os.path.realpath(exclude)} if exclude else set()
    if os.path.realpath(root) in done:
        fail(f"{flag} {root}: is --output_dir too; give another folder")

    def unreadable(error: OSError) -> NoReturn:
        fail(f"{flag} {error.filename}: cannot be listed: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (place := os.path.realpath(folder)) in done:  # or a link back to a folder above
            folders.clear()
            continue
        done.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [os.path.join(folder, name) for name in names
                  if os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".")]
    if not paths:
        fail(f"{flag} {root}: no image in it ({', '.join(sorted(suffixes))})")
    return sorted(paths)


def read_image(path: str | Path) -> Tensor:
    """Decodes a file to uint8 RGB, 3 x H x W, in channels_last memory (fast to crop and resize).

    Raises:
        UnreadableImageError: the file is damaged, no image, gone, has more than 8 bits per channel, or a page
            for each band.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF" or ";16" in str(image.tile):  # Pillow would keep RGB's upper 8 bits only
                raise ValueError("16-bit or float pixels: stretch them to 8 bits first")
            if len(pages := _equal_pages(image)) > 1:
                raise ValueError(f"{len(pages)} pages of one size: one image in colour is needed")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UnreadableImageError(f"{path}: {error}") from error


def _equal_pages(image: Image.Image) -> list[int]:
    # Pages of a TIFF that are as large as the first: bands. Smaller ones are overviews of it.
    if image.format != "TIFF" or image.n_frames == 1:
        return [0]
    pages, size = [], image.size
    for page in range(image.n_frames):
        image.seek(page)
        pages += [page] * (image.size == size)
    image.seek(0)
    return pages


def read_pixels(path: str | Path, in_chans: int = 3) -> Tensor:
    """Decodes a file of any number of channels, as SAR and multispectral images have, to in_chans x H x W.

    - An 8-bit image becomes RGB where 3 channels are asked for, and grey where 1 is.
    - A 16-bit, 32-bit or float image of Pillow's (modes I;16, I, F) has one channel.
    - A TIFF with a page for each band has them all; so has RGBA where 4 channels are asked for.
    - A .npy file holds H x W or H x W x in_chans numbers.

    8-bit pixels come as uint8, all others as float32, unchanged.

    Raises:
        UnreadableImageError: the file is damaged or gone, has other channels, or NaN or infinite pixels.
    """
    try:
        if str(path).lower().endswith(".npy"):
            pixels = np.load(path, allow_pickle=False)
        else:
            pixels = _read_bands(path, in_chans)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or pixels.shape[2] != in_chans:
            shape = " x ".join(map(str, pixels.shape))
            raise ValueError(f"{shape} pixels, not H x W x {in_chans} (--in_chans)")
        if np.iscomplexobj(pixels):
            raise ValueError("complex pixels: write their amplitude or decibels")
        if pixels.dtype != np.uint8:
            pixels = pixels.astype(np.float32)
            if not np.isfinite(pixels).all():
                raise ValueError("NaN or infinite pixels: fill them first")
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise UnreadableImageError(f"{path}: {error}") from error


def _read_bands(path: str | Path, in_chans: int) -> np.ndarray:
    with Image.open(path) as image:
        if ";16" in str(image.tile) and image.mode[0] != "I":  # Pillow would keep the upper 8 bits
            raise ValueError("16-bit colour: write a page for each band, or a .npy file")
        pages = _equal_pages(image)
        if len(pages) == 1 and in_chans in (1, 3) and image.mode[0] not in "IF":
            return np.array(image.convert("L" if in_chans == 1 else "RGB"))
        bands = []
        for page in pages:
            image.seek(page)
            bands.append(np.array(image))
        return np.dstack(bands)


def to_float(images: Tensor) -> Tensor:
    """8-bit pixels to [0, 1]; float pixels, of read_pixels, stay as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def check_images(paths: Sequence[str], img_size: int, read: Callable[[str], Tensor] = read_image) -> None:
    """Reads up to 32 images, evenly spaced; fails when none is readable, warns when most are smaller."""
    sides, reason = [], ""
    for path in paths[:: math.ceil(len(paths) / 32)]:
        try:
            sides.append(min(read(path).shape[1:]))
        except UnreadableImageError as error:  # a few are counted and reported when training meets them
            reason = reason or str(error)
    if not sides:
        fail(f"--data_path: none of the images looked at is readable: {reason}")
    median = sorted(sides)[len(sides) // 2]
    if median < img_size:
        print(f"warning: --img_size {img_size}: most images are smaller, so crops are enlarged, which costs "
              f"time and adds nothing; {median} is their median side", file=sys.stderr)


class SkipUnreadable(torch.utils.data.Dataset):
    """A data set that takes the next sample in place of an unreadable one, and says so; up to 100 times.

    `dataset[epoch, index]` may raise UnreadableImageError. Returns (sample, list of messages).
    """

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[object, list[str]]:
        epoch, index = key
        messages = []
        for attempt in range(min(100, len(self.dataset))):
            try:
                return self.dataset[epoch, (index + attempt) % len(self.dataset)], messages
            except UnreadableImageError as error:
                messages.append(str(error))
        raise UnreadableImageError(f"{len(messages)} unreadable images in a row, the last: {messages[-1]}")


class StepSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, from any optimizer step to any later one, across epochs.

    Each epoch is one permutation drawn from (seed, epoch), cut into steps of the effective batch; the rest is
    dropped. Each micro-batch of each process is a slice of the step. So a resumed run goes on where it
    stopped, and a worker needs no state. Memory: one permutation, 8 bytes per image.
    """

    def __init__(self, length: int, batch_size: int, accum_steps: int, process: Process, seed: int,
                 start_step: int, end_step: int):
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.process, self.seed, self.start_step, self.end_step = process, seed, start_step, end_step

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        world_size, rank, shuffled = self.process.world_size, self.process.rank, -1
        steps_per_epoch = self.length // (self.batch_size * self.accum_steps * world_size)
        for step in range(self.start_step, self.end_step):
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            if shuffled != epoch:
                generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
                order, shuffled = torch.randperm(self.length, generator=generator), epoch
            for micro in range(self.accum_steps):
                first = ((step_in_epoch * self.accum_steps + micro) * world_size + rank) * self.batch_size
                yield [(epoch, index) for index in order[first : first + self.batch_size].tolist()]


def _collate(samples: list[tuple[object, list[str]]]) -> tuple[object, list[str]]:
    batch = torch.utils.data.default_collate([sample for sample, _ in samples])
    return batch, [message for _, messages in samples for message in messages]


def _quiet_worker(_: int) -> None:
    # A signal to the whole process group is for the trainer, which needs its workers up to the checkpoint.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    # Workers ignore SIGTERM, so after an error Python's own clean-up would wait for them for ever.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the loader complains that they died
    for worker in multiprocessing.active_children():
        worker.kill()


def worker_count(num_workers: int | None) -> int:
    """`--num_workers`; None shares the machine's cores among its processes, at most 16 each."""
    if num_workers is not None:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def build_loader(dataset: torch.utils.data.Dataset, sampler: StepSampler, num_workers: int | None,
                 device: torch.device) -> torch.utils.data.DataLoader:
    """Loader of (batch, messages about unreadable images).

    Args:
        dataset: maps (epoch, index) to a sample.
        sampler: the batches to make, in order.
        num_workers: see worker_count.
        device: where batches will go; memory is pinned for cuda.
    """
    atexit.register(_end_workers)
    return torch.utils.data.DataLoader(
        SkipUnreadable(dataset), batch_sampler=sampler, num_workers=worker_count(num_workers),
        collate_fn=_collate, worker_init_fn=_quiet_worker, pin_memory=device.type == "cuda")


# --------------------------------------------------------------------------------------------------
# Colour: whole batches on the training device. Images are float N x 3 x H x W in [0, 1] and changed in place.
# Draws come from a CPU generator, so they are the same on every device; every sample has its own.
# --------------------------------------------------------------------------------------------------


def bernoulli(p: Tensor, generator: torch.Generator) -> Tensor:
    """True with probability `p` (n,) for each sample on its own."""
    return torch.rand(len(p), generator=generator) < p


def apply_where(where: Tensor, function: Callable, images: Tensor, *parameters: Tensor) -> Tensor:
    """Applies `function(images, *parameters)` to the samples chosen by `where` (n,), in place."""
    index = where.nonzero().flatten()
    if len(index):
        chosen = [parameter[index].to(images.device, non_blocking=True) for parameter in parameters]
        index = index.to(images.device, non_blocking=True)
        images[index] = function(images.index_select(0, index), *chosen)
    return images


def luma(images: Tensor) -> Tensor:
    """Grey value n x 1 x H x W with torchvision's weights (ITU-R 601)."""
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Returns other + factor * (images - other), clamped to [0, 1]; `factor` (n,)."""
    return other.lerp(images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black; `factor` (n,) at least 0."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean luma; `factor` (n,) at least 0."""
    return blend(images, luma(images).mean((2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the luma; `factor` (n,) at least 0."""
    return blend(images, luma(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (n,) in [-.5, .5] turns, keeping HSV's saturation and value."""
    r, g, b = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    per_chroma = 1 / chroma.masked_fill(chroma < 1e-12, 1)  # a division costs several products
    green_or_blue = torch.where(g == value, (b - r) * per_chroma + 2, (r - g) * per_chroma + 4)
    hue = torch.where(r == value, (g - b) * per_chroma, green_or_blue)  # in sixths of a turn
    hue += 6 * shift.view(-1, 1, 1)
    # HSV to RGB without cases: k = (5, 3, 1) + hue mod 6; value - chroma * clamp(min(k, 4 - k), 0, 1)
    k = (hue.unsqueeze(1) + torch.tensor([5.0, 3.0, 1.0], device=hue.device).view(1, 3, 1, 1)).remainder_(6)
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), share, value=-1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def draw_color_jitter(strength: tuple[float, float, float, float], p: Tensor,
                      generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws torchvision's ColorJitter(*strength) for n samples, each with its probability in `p` (n,).

    Returns:
        where (n,) bool; factors (n, 4), a column per adjustment; order (n, 4), which adjustment comes when.
    """
    neutral, spread = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor(strength)
    factors = neutral + spread * (2 * torch.rand(len(p), 4, generator=generator) - 1)
    order = torch.rand(len(p), 4, generator=generator).argsort(1)
    return bernoulli(p, generator), factors, order


def color_jitter(images: Tensor, where: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Applies what `draw_color_jitter` drew."""
    for turn in range(4):
        for kind, adjust in enumerate(ADJUSTMENTS):
            apply_where(where & (order[:, turn] == kind), adjust, images, factors[:, kind])
    return images


def grayscale(images: Tensor, where: Tensor) -> Tensor:
    """Replaces the chosen samples by their luma in all three channels."""
    return apply_where(where, lambda chosen: luma(chosen).expand_as(chosen), images)


def _blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    n, c, h, w = images.shape
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(n, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0).view(n * c, 1, 1, -1)
    planes = nn.functional.pad(images, [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    planes = nn.functional.conv2d(planes, kernel, groups=n * c)
    return nn.functional.conv2d(planes, kernel.transpose(2, 3), groups=n * c).view(n, c, h, w)


def gaussian_blur(images: Tensor, where: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of the chosen samples by `sigma` (n,) of at most 2 pixels; borders reflected."""
    radius = min(6, images.shape[2] - 1, images.shape[3] - 1)  # three times the greatest sigma
    return apply_where(where, lambda chosen, s: _blur(chosen, s, radius), images, sigma)


def solarize(images: Tensor, where: Tensor) -> Tensor:
    """Inverts the pixels at or above 128 / 255 of the chosen samples."""
    return apply_where(where, lambda chosen: torch.where(chosen >= 128 / 255, 1 - chosen, chosen), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel."""
    mean, std = (torch.tensor(value, device=images.device).view(1, -1, 1, 1) for value in (mean, std))
    return (images - mean).div_(std)


# --------------------------------------------------------------------------------------------------
# Backbones: timm models without classifier, and their weights
# --------------------------------------------------------------------------------------------------


def _close_names(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"; close: {', '.join(close)}" if close else ""


def build_backbone(arch: str, img_size: int | tuple[int, int], patch_size: int | None = None,
                   drop_path: float = 0, in_chans: int = 3) -> nn.Module:
    """A timm model from N x in_chans x H x W to pooled features N x D, for any H and W where it can.

    Its `model_args` attribute holds what timm.create_model needs beside the name to build it again.
    """
    if not timm.is_model(arch):
        fail(f"--arch {arch}: timm has no such model{_close_names(arch)}")
    own = {"patch_size": patch_size} if patch_size else {}
    own |= {"in_chans": in_chans} if in_chans != 3 else {}
    # Swin takes strict_img_size, ViT dynamic_img_size, convolutional nets neither.
    sized = {"img_size": img_size, **own}
    # 0 is given too, because Swin's own default is .1; a net that takes no rate has none.
    rates = [{"drop_path_rate": drop_path}] + [{}] * (drop_path == 0)
    variants = ({"strict_img_size": False, **sized}, {"dynamic_img_size": True, **sized}, own)
    for model_args, rate in itertools.product(variants, rates):
        try:
            backbone = timm.create_model(arch, num_classes=0, **rate, **model_args)
            backbone.model_args = model_args
            return backbone
        except TypeError as error:  # an argument this model does not have
            reason = error
    fail(f"--arch {arch}: cannot be built with --patch_size {patch_size} --drop_path {drop_path}: {reason}")


def patch_multiple(backbone: nn.Module) -> int:
    """The side in pixels that crops must be a multiple of: the patch of a transformer, 1 for other nets."""
    return timm.layers.to_2tuple(getattr(getattr(backbone, "patch_embed", None), "patch_size", 1))[0]


def read_weights(source: str, checkpoint_key: str | None = None, flag: str = "--weights",
                 whole: bool = False) -> tuple[dict, dict]:
    """Reads backbone weights from an output folder, a checkpoint, a state dict, a timm or hf-hub: name.

    Checkpoints and state dicts are ours, or those of DINO, DINO-MC, MoCo, MHCL, MAE, DSPT, CMID, timm and
    torchvision (ResNet, ViT, Swin).

    Args:
        source: what the user gave.
        checkpoint_key: the network of a checkpoint to take, an entry or a prefix in its state dict, such as
            MoCo's encoder_k; None: the network that its run exports.
        flag: the flag to name in errors.
        whole: keep MAE's decoder beside the backbone.

    Returns:
        state dict of the backbone in timm's names, without prefixes; what is known of its arch, patch_size,
        img_size (a side, or height and width), and mean and std of its channels.
    """
    path = Path(source)
    if path.is_dir():
        folder = path / "backbone" if (path / "backbone").is_dir() else path
        exported = checkpoint_key is None and not (whole and (path / "checkpoint.pth").is_file())
        if exported and (folder / "config.json").is_file():
            return _read_exported(folder, flag)
        path = path / "checkpoint.pth"
    if path.is_file():
        return _read_checkpoint(path, checkpoint_key, flag, whole)
    if source.startswith("hf-hub:") or timm.is_model(source):
        try:
            model = timm.create_model(source, pretrained=True, num_classes=0)
        except Exception as error:  # no pretrained weights under this name, no network, no such repository
            fail(f"{flag} {source}: timm could not load pretrained weights: {str(error).splitlines()[0]}")
        config = model.pretrained_cfg
        return model.state_dict(), {"arch": config["architecture"], "img_size": config["input_size"][-1],
                                    "mean": config["mean"], "std": config["std"]}
    fail(f"{flag} {source}: no such file, output folder or timm model{_close_names(source)}")


def _read_exported(folder: Path, flag: str) -> tuple[dict, dict]:
    try:
        config = json.loads((folder / "config.json").read_text())
        state = safetensors.torch.load_file(folder / "model.safetensors")
    except Exception as error:
        fail(f"{flag} {folder}: cannot be read: {error}")
    args, cfg = config.get("model_args", {}), config["pretrained_cfg"]
    height, width = cfg["input_size"][1:]
    return state, {"arch": config["architecture"], "patch_size": args.get("patch_size"), "mean": cfg["mean"],
                   "std": cfg["std"], "img_size": height if height == width else (height, width)}


def _read_checkpoint(path: Path, key: str | None, flag: str, whole: bool) -> tuple[dict, dict]:
    try:
        loader = safetensors.torch.load_file if path.suffix == ".safetensors" else load_checkpoint
        checkpoint = loader(path)
        if not isinstance(checkpoint, dict):
            raise ValueError("is no state dict of tensors")
    except Exception as error:
        fail(f"{flag} {path}: {error}")
    args = checkpoint.get("args") if "effective_batch" in checkpoint else None  # ours, not the authors'
    known = ("arch", "patch_size", "img_size", "mean", "std")
    info = {name: args[name] for name in known if args.get(name) is not None} if args else {}
    if isinstance(info.get("img_size"), list):  # one side, or height and width
        info["img_size"] = tuple(info["img_size"]) if len(set(info["img_size"])) > 1 else info["img_size"][0]
    inner = key if key not in checkpoint else None  # a network within a state dict
    usual = ("teacher", "encoder_q", "online", "state_dict", "model")
    entry = key if key in checkpoint else next((name for name in usual if name in checkpoint), None)
    state = checkpoint[entry] if entry else checkpoint
    names = [name.removeprefix("module.") for name in state] if isinstance(state, dict) else []
    if inner and not any(name.startswith(f"{inner}.") for name in names):
        found = dict.fromkeys(name.split(".")[0] for name in [*checkpoint, *names])
        fail(f"--checkpoint_key {key}: {path} has {', '.join(list(found)[:12])}")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        fail(f"{flag} {path}: {f'its {entry} is' if entry else 'is'} no state dict of tensors")
    return _backbone_names(state, inner or "encoder_q", whole), info


# torchvision's names of ViT and Swin -> timm's. Swin: features 1, 3, 5, 7 are stages, 2, 4, 6 lie between.
# The two pad in other ways: its features are equal where no window is padded, at multiples of 224 px.
TORCHVISION_NAMES = (
    (r"^conv_proj\.", "patch_embed.proj."), (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"), (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^features\.0\.0\.", "patch_embed.proj."), (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * i + 1}\.", f"layers.{i}.blocks.") for i in range(4)),
    *((rf"^features\.{2 * i}\.", f"layers.{i}.downsample.") for i in range(1, 4)))


def _backbone_names(state: dict, network: str, whole: bool) -> dict:
    kept = ("decoder_", "mask_token") if whole else ()
    # Of DDP, MoCo, CMID (two), DINO and ours; what lies beside them in the file is not the backbone.
    for prefix in ("module.", f"{network}.", "online_encoder.", "model.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items()
                     if name.startswith((prefix, *kept))}
    if {"conv_proj.weight", "features.1.0.attn.qkv.weight"} & state.keys():
        for old, new in TORCHVISION_NAMES:
            state = {re.sub(old, new, name): x for name, x in state.items()}
    return state


def loading_report(source: str, own: dict, state: dict, fitting: dict) -> str:
    """A line on a network's tensors `own`, those of a file, `state`, and those taken from it, `fitting`."""
    report = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    for what, all_names in (("missing", own), ("not used", state)):
        names = all_names.keys() - fitting.keys()
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        report += f", {len(names)} {what}" + (f" ({shown})" if names else "")
    return report


def load_backbone(backbone: nn.Module, state: dict, source: str, allow_partial: bool = False) -> str:
    """Fills `backbone` from `state` and returns a line that says what was loaded, missing and unexpected.

    timm resamples position embeddings and patch projections of another size; all else of another shape counts
    as missing. Fails when under 90 % of the backbone's tensors are filled, or the file has more blocks,
    unless `allow_partial`.
    """
    own = backbone.state_dict()

    def fit(state: dict) -> dict:
        return {name: x for name, x in state.items() if name in own and x.shape == own[name].shape}

    fitting = fit(state)
    resample = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if len(fitting) < len(own) and resample:
        # timm before 1.0.31 takes a Swin without classifier for Microsoft's, and moves its downsampling.
        timm_swin = "layers.1.downsample.norm.weight" in fitting and "head.fc.weight" not in state
        mark = {"head.fc.weight": torch.empty(0)} if timm_swin else {}
        try:
            resampled = resample(state | mark, backbone)
            state = {name: x for name, x in resampled.items() if name not in mark}
            fitting = fit(state)
        except Exception:  # keys or shapes of quite another model: the count below says so
            pass
    report = loading_report(source, own, state, fitting)
    # More blocks or layers than the backbone has; not heads, nor the index buffers of older Swins.
    parts, buffers = {name.split(".")[0] for name in own} - {"head"}, ("relative_position_index", "attn_mask")
    extra = [name for name in state if name.split(".")[0] in parts and name not in own
             and not name.endswith(buffers)]
    # BatchNorm's counters of batches change no feature; files of old PyTorch lack them.
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    if (extra or len(fitting.keys() & needed) < 0.9 * len(needed)) and not (allow_partial and fitting):
        fail(f"{report}: another arch? (--allow_partial takes what fits)")
    backbone.load_state_dict(fitting, strict=False)
    return report


def init_backbone(backbone: nn.Module, args: argparse.Namespace, saved: dict | None) -> str:
    """Fills `backbone` from `--init`, unless the run is resumed from `saved`; returns where it starts."""
    if saved:
        return f"resumed at step {saved['step']}{', --init is not read again' if args.init else ''}"
    if not args.init:
        return "from scratch"
    state, _ = read_weights(args.init, args.checkpoint_key, "--init")
    return load_backbone(backbone, state, f"--init {args.init}", args.allow_partial)


def export_backbone(backbone: nn.Module, folder: Path, img_size: int | tuple[int, int],
                    mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes config.json and model.safetensors for timm.create_model("local-dir:FOLDER", pretrained=True)."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    kept = ("architecture", "first_conv", "classifier", "pool_size")
    # safetensors takes no channels_last.
    backbone = copy.deepcopy(backbone).to("cpu", memory_format=torch.contiguous_format)
    backbone.pretrained_cfg = {
        **{key: backbone.pretrained_cfg.get(key) for key in kept}, "num_classes": 0,
        "input_size": (len(mean), *timm.layers.to_2tuple(img_size)), "mean": tuple(mean), "std": tuple(std),
        "crop_pct": 224 / 256, "interpolation": "bicubic"}
    with writing(folder):
        timm.models.save_for_hf(backbone, str(new), model_args=dict(backbone.model_args),
                                safe_serialization=True)
        shutil.copymode(new / "config.json", new / "model.safetensors")  # safetensors' own: the owner's alone
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            with open(new / name, "rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            os.replace(new / name, folder / name)
        shutil.rmtree(new)


# --------------------------------------------------------------------------------------------------
# Optimisation
# --------------------------------------------------------------------------------------------------


def cosine_schedule(base: float, final: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Value at `step`: linear from 0 to `base` over the warm-up, then cosine to `final` at `total_steps`."""
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def param_groups(model: nn.Module) -> list[dict]:
    """Two groups of the trained parameters: with weight decay, and without (biases and 1-D: norm weights)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    no_decay = {name for name, p in trained if name.endswith(".bias") or p.ndim <= 1}
    return [{"params": [p for name, p in trained if name not in no_decay]},
            {"params": [p for name, p in trained if name in no_decay], "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, args: argparse.Namespace, **more: object) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, --lr and --weight_decay, of timm, on the groups of `param_groups`."""
    if args.optimizer == "adamw":
        more["fused"] = True  # one kernel for all tensors
    name = "momentum" if args.optimizer == "sgd" else args.optimizer  # timm's "sgd" would be Nesterov's
    return timm.optim.create_optimizer_v2(param_groups(model), opt=name, lr=args.lr, momentum=0.9,
                                          weight_decay=args.weight_decay, **more)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network; convolutional ones on a GPU to channels_last memory, which is faster there."""
    model.to(device)
    if device.type == "cuda" and not any(hasattr(module, "patch_embed") for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    return model


def distributed(model: nn.Module, process: Process) -> nn.Module:
    """The network in DistributedDataParallel, or as it is where there is one process."""
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


def accumulating(model: nn.Module, micro: int, accum_steps: int) -> contextlib.AbstractContextManager:
    """Context of micro-batch `micro`: processes exchange gradients with the last one only."""
    waits = micro < accum_steps - 1 and isinstance(model, DistributedDataParallel)
    return model.no_sync() if waits else contextlib.nullcontext()


def mean_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over micro-batches of each of the terms, scalars or 1-D."""
    return {name: torch.stack([of_micro[name] for of_micro in terms]).mean(0) for name in terms[0]}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups; those with an `lr_scale` (layer decay) get their share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def grad_norm(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Tensor:
    """Unscales the gradient and returns its norm, which may be infinite or NaN although the loss is finite.

    An overflow of fp16 counts as 0: the scaler leaves that step out and takes a smaller scale.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.nan_to_num(0.0, 0.0, 0.0) if scaler.is_enabled() else norm


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Steps, after `grad_norm`, and forgets the gradient."""
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def update_ema(online: nn.Module, average: nn.Module, momentum: float) -> None:
    """Sets average <- momentum * average + (1 - momentum) * online, over parameters; buffers stay."""
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1 - momentum)


# --------------------------------------------------------------------------------------------------
# What a run writes
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Ends the run in one line where `path` cannot be written: no space, no right, no folder any more."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides it there
        if not isinstance(cause, (OSError, safetensors.SafetensorError)):
            raise
        fail(f"{path}: cannot be written: {cause}; what was written before stays", code=1, everywhere=True)


def write_atomically(path: Path, write: Callable) -> None:
    """Calls `write(file)` on a temporary file, flushes and renames it: `path` is old or new, always whole."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half of a file only takes the space


def load_checkpoint(path: str | Path) -> dict:
    """Loads to the CPU without ever running code from the file; raises ValueError with the reason."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # harmless: flags in public checkpoints
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(str(error)) from error
    except pickle.UnpicklingError as error:
        raise ValueError("refused, because loading it would run code; or no PyTorch file") from error
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"damaged, or no PyTorch file ({reason})") from error


def make_output_dir(folder: str, process: Process) -> Path:
    """Creates the output folder, if need be, and makes sure that it can be written to."""
    try:
        if process.is_main:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "log.jsonl.probe").touch()
            (Path(folder) / "log.jsonl.probe").unlink()
    except OSError as error:
        fail(f"--output_dir {folder}: cannot be written to: {error}")
    return Path(folder)


def plain(args: object) -> dict:
    """The flags as a dict of plain numbers, strings and lists."""
    return json.loads(json.dumps(vars(args)))


def device_name(device: torch.device) -> str:
    """What the run computes on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of the libraries, and the commit of this checkout, if it is one."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], text=True,
                             cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    libraries = {library.__name__: str(library.__version__) for library in (torch, torchvision, timm)}
    return {"python": sys.version.split()[0], **libraries, "commit": git or "unknown"}


def check_alike(process: Process, **values: int) -> None:
    """Fails when not all processes have the same values, as when machines have folders of their own."""
    if process.world_size == 1:
        return
    everywhere = [{}] * process.world_size
    dist.all_gather_object(everywhere, values, group=process.cpu_group)
    for name, value in values.items():
        if others := {other[name] for other in everywhere} - {value}:
            fail(f"{name} is {value} here and {min(others)} in another process: --data_path and --output_dir "
                 "have to be the same folders on all machines")


def agree(process: Process, *flags: bool) -> list[bool]:
    """Each flag is true in all processes once it is in one of them: a decision they take at the same step."""
    if process.world_size == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=process.cpu_group)
    return votes.bool().tolist()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation of the unit vectors of N x D features, times sqrt(D).

    1: directions spread evenly; .5 and more is usual behind a ReLU; near 0: all images alike, collapsed.
    """
    return F.normalize(features.float(), dim=-1).std(0, correction=0).mean() * math.sqrt(features.shape[1])


def save_grid(path: Path, rows: Sequence[Sequence[Tensor]], mean: Sequence[float],
              std: Sequence[float]) -> Tensor:
    """Writes a PNG with a row per image: its views, normalised 3 x h x w of any size, centred on white.

    Returns the picture, 3 x H x W in [0, 1].
    """
    side = max(max(view.shape[1:]) for row in rows for view in row)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    grid = torch.ones(len(rows) * len(rows[0]), 3, side, side)
    for cell, view in zip(grid, (view for row in rows for view in row), strict=True):
        (_, h, w), view = view.shape, view.float().cpu() * std + mean
        top, left = (side - h) // 2, (side - w) // 2
        cell[:, top : top + h, left : left + w] = view.clamp(0, 1)
    grid = torchvision.utils.make_grid(grid, nrow=len(rows[0]), pad_value=1.0)
    write_atomically(path, lambda file: torchvision.utils.save_image(grid, file, format="png"))
    return grid


# --------------------------------------------------------------------------------------------------
# A training run: what all of them do alike
# --------------------------------------------------------------------------------------------------


def add_run_flags(parser: argparse.ArgumentParser, amp: str = "auto") -> None:
    """Adds the flags that `Run` and `init_process` take, the group "run"; `amp` is the default of --amp."""
    add, yes_no = parser.add_argument_group("run").add_argument, argparse.BooleanOptionalAction
    add("--output_dir", required=True, help="where everything is written; a run found there is resumed")
    add("--seed", type=not_negative(int), default=0, help="of weights, order and all random draws")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps or cpu")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default=amp, help="auto: bf16 on GPUs with it")
    add("--compile", action=yes_no, default=False, help="torch.compile the networks; pays on long runs")
    add("--save_every", type=positive(int), default=1, help="epochs between checkpoints; more where epochs "
        "are short")
    add("--save_minutes", type=not_negative(float), default=15.0, help="and the longest time between them")
    add("--log_every", type=positive(int), default=20, help="steps between lines of the log")
    add("--max_steps", type=positive(int), help="stop after so many optimizer steps; schedules keep to "
        "--epochs")
    add("--tensorboard", action=yes_no, default=False, help="write the log and the pictures as events too; "
        "needs the package tensorboard")


class Run:
    """Everything of a training run but networks, loss and loop.

    It counts steps, finds and checks an earlier checkpoint, and fills networks and optimizer from it. It
    hands out steps and batches, writes the log, pictures and checkpoints, and stops after a signal. It ends
    the run on values that are not finite and on too many unreadable images, and warns of collapse.

    Args:
        args: flags of add_run_flags, and data_path, batch_size_per_gpu, accum_steps, epochs, num_workers; to
            export a backbone also img_size, mean and std.
        process: this one.
        samples: of an epoch.
        images: files that they are made from; more than 1 % of them unreadable ends the run.
        free_flags: flags that may differ between a run and its continuation.

    Attributes:
        effective_batch: samples of an optimizer step, over micro-batches and processes.
        steps_per_epoch, total_steps: of the schedules.
        start_step, stop_step: of this start; steps are counted from 0.
        saved: the earlier checkpoint until `restore`, or None.
        autocast, scaler: of --amp.
        stopped: a signal ended the run early.
    """

    def __init__(self, args: argparse.Namespace, process: Process, samples: int, images: int,
                 free_flags: set[str] = FREE_FLAGS):
        self.args, self.process, self.samples, self.images = args, process, samples, images
        self.autocast = autocast(args.amp, process.device)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
        self.effective_batch = args.batch_size_per_gpu * args.accum_steps * process.world_size
        self.steps_per_epoch = samples // self.effective_batch
        if not self.steps_per_epoch:
            fail(f"--batch_size_per_gpu {args.batch_size_per_gpu}: the effective batch, "
                 f"{self.effective_batch}, is larger than the data, {samples}")
        self.total_steps = args.epochs * self.steps_per_epoch
        check_alike(process, images=images, samples=samples)
        self.identity = {"images": images, "samples": samples, "effective_batch": self.effective_batch}
        self._lock, self._events, refused = None, None, None
        try:
            self.out = make_output_dir(args.output_dir, process)
            if process.is_main:
                self._lock = _lock(self.out)
            self.saved = self._find_checkpoint(free_flags)
            self.start_step = self.saved["step"] if self.saved else 0
            if process.is_main and args.tensorboard:
                self._events = _event_writer(self.out, self.start_step)
        except SystemExit as error:  # often of one process alone; then the others end without a word
            refused = error
        if agree(process, refused is not None)[0]:
            raise refused or SystemExit(2)
        stop_step = min(self.total_steps, args.max_steps or self.total_steps)
        self.stop_step = max(self.start_step, stop_step)  # a run that is further already has nothing to do
        check_alike(process, start_step=self.start_step)
        self.unreadable, self.stopped, self._signal_seen = set(), False, False

    def _find_checkpoint(self, free_flags: set[str]) -> dict | None:
        path = self.out / "checkpoint.pth"
        if not path.exists():
            return None
        try:
            saved = load_checkpoint(path)
            before = {**YOUNGER_FLAGS, **saved["args"], "samples": saved["images"],
                      **{name: saved[name] for name in self.identity if name in saved}}
        except (ValueError, KeyError, TypeError) as error:
            fail(f"--output_dir: {path} cannot be resumed: {error}")
        after = {**plain(self.args), **self.identity}
        changed = [f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
                   for name in sorted(before.keys() | after.keys())
                   if name not in free_flags and before.get(name) != after.get(name)]
        if changed:
            fail(f"--output_dir {self.out}: its run had other settings: {'; '.join(changed)}")
        return saved

    def restore(self, backbone: nn.Module | None, **stateful: object) -> None:
        """Fills `stateful` from the earlier checkpoint, if there is one; checkpoints will hold their states.

        Args:
            backbone: exported to OUT/backbone with each checkpoint; None: nothing is.
            stateful: networks, optimizer and losses by the names they have in the checkpoint.
        """
        self.backbone, self.stateful = backbone, {**stateful, "scaler": self.scaler}
        for name, part in self.stateful.items():
            if self.saved and self.saved[name]:  # the scaler has no state without fp16
                part.load_state_dict(self.saved[name])
        self.saved = None

    def loader(self, dataset: torch.utils.data.Dataset) -> torch.utils.data.DataLoader:
        """Loader of this process's micro-batches from the first step of this start to the last."""
        args, process = self.args, self.process
        sampler = StepSampler(len(dataset), args.batch_size_per_gpu, args.accum_steps, process, args.seed,
                              self.start_step, self.stop_step)
        return build_loader(dataset, sampler, args.num_workers, process.device)

    def steps(self, loader: torch.utils.data.DataLoader, init: str | list[str] = (),
              floors: dict[str, float] | None = None, advice: str = "", **header: object) -> Iterator[int]:
        """Yields the steps that are left; ends early after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C.

        Args:
            loader: of `Run.loader`.
            init: a line, or lines, on where the weights come from; printed first.
            floors: health figures, and the value that a collapsed network is below. One that stays below for
                a tenth of the run, and five lines, brings one warning with `advice`.
            advice: what to try then.
            header: derived values, printed and written to the log before training.
        """
        process, amp = self.process, autocast_dtype(self.args.amp, self.process.device)
        derived = {"device": device_name(process.device), "processes": process.world_size,
                   "amp": str(amp).removeprefix("torch.") if amp else "off", "images": self.images,
                   "samples": self.samples, "effective_batch": self.effective_batch,
                   "steps_per_epoch": self.steps_per_epoch, "steps": self.total_steps,
                   "from_step": self.start_step, "to_step": self.stop_step, **header}
        alone = self.args.batch_size_per_gpu == 1  # one image has no spread
        self.floors = {} if alone or not floors else floors
        self.advice, self.below = advice, {name: [] for name in self.floors}
        self.versions, self.saved_at = versions(), time.monotonic()
        if self.process.is_main:
            for line in [init] if isinstance(init, str) else init:
                print(line)
            print("  ".join(f"{name} {value}" for name, value in derived.items()), flush=True)
            self._begin_log({"argv": sys.argv, "versions": self.versions, "init": init, **derived})
        self.bar = tqdm(total=self.stop_step, initial=self.start_step, unit="step", dynamic_ncols=True,
                        disable=not (self.process.is_main and sys.stderr.isatty()))
        ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
        handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS
                    if number not in ignored - {signal.SIGINT, signal.SIGTERM}}  # nohup ignores SIGHUP
        self.batches = iter(loader)
        self._restart_interval()
        try:
            for step in range(self.start_step, self.stop_step):
                self.step = step
                yield step
                if self.stopped:
                    break
        finally:
            self.batches = None  # ends the workers
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self._events:
                self._events.close()
        if self.process.is_main:
            print(f"stopped by a signal after a checkpoint; the same command resumes: {self.out}"
                  if self.stopped else f"{self.stop_step} steps done: {self.out}", flush=True)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal_seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C again ends it at once

    def fetch(self) -> object:
        """The next micro-batch, on the device; warns about images that could not be read, once each."""
        began = time.perf_counter()
        try:
            batch, messages = next(self.batches)
        except UnreadableImageError as error:
            # Of a worker's, a traceback and the name of the error come before it.
            fail(str(error).splitlines()[-1].split("UnreadableImageError: ")[-1], 1, everywhere=True)
        self.waited += time.perf_counter() - began
        for message in set(messages) - self.unreadable:
            print(f"warning: unreadable, another image taken: {message}", file=sys.stderr, flush=True)
            self.unreadable.add(message)
        if isinstance(batch, Tensor):
            return batch.to(self.process.device, non_blocking=True)
        return [part.to(self.process.device, non_blocking=True) for part in batch]

    def is_due(self, step: int) -> bool:
        """True where the log gets a line after `step`: time for figures and pictures that cost something."""
        return (step + 1) % self.args.log_every == 0 or self._ends_period(step + 1)

    def _ends_period(self, done: int) -> bool:
        epochs, rest = divmod(done, self.steps_per_epoch)
        return done == self.stop_step or (rest == 0 and epochs % self.args.save_every == 0)

    def draw(self, name: str, rows: Sequence[Sequence[Tensor]], mean: Sequence[float] | None = None,
             std: Sequence[float] | None = None) -> None:
        """Writes OUT/`name`, a picture with a row per image; see save_grid. Its time does not count.

        `mean` and `std` are those that the rows were normalised with; default: --mean and --std.
        """
        if self.process.is_main:
            began = time.perf_counter()
            grid = save_grid(self.out / name, rows, mean or self.args.mean, std or self.args.std)
            if self._events:
                self._events.add_image(Path(name).stem, grid, self.step + 1)
            self.began += time.perf_counter() - began

    def end_step(self, step: int, terms: dict[str, Tensor], **values: float) -> None:
        """Collects the terms of a step; writes a line of the log and a checkpoint where they are due.

        Args:
            step: that has been done.
            terms: scalars or 1-D, without gradient; the log shows their means over steps and processes.
            values: as they stand after this step, such as lr; the log shows those of its last step.
        """
        self.terms.append(terms)
        overdue = time.monotonic() - self.saved_at > 60 * self.args.save_minutes
        stopping, overdue = agree(self.process, self._signal_seen, overdue)
        done, saving = step + 1, stopping or overdue or self._ends_period(step + 1)
        if saving or self.is_due(step):
            self._write_line(done, {"epoch": done // self.steps_per_epoch, **self._summary(done), **values})
        if saving:
            self._save(done)
            self._restart_interval()  # the time of saving does not count
        self.bar.update()
        self.stopped = stopping and done < self.stop_step

    def _restart_interval(self) -> None:
        self.terms, self.waited, self.began = [], 0.0, time.perf_counter()

    def _summary(self, done: int) -> dict[str, float | list[float]]:
        # Means over steps and processes since the last line; fails where the run must not continue.
        shapes = {name: value.shape for name, value in self.terms[0].items()}
        sizes = [shape.numel() for shape in shapes.values()]
        rows = [torch.cat([value.flatten() for value in terms.values()]) for terms in self.terms]
        table = torch.stack(rows).float().cpu()  # steps x terms

        def named(row: Tensor) -> dict[str, float | list[float]]:
            parts = zip(shapes.items(), row.split(sizes), strict=True)
            return {name: part.view(shape).tolist() for (name, shape), part in parts}

        unreadable = self.unreadable
        if self.process.world_size > 1:
            dist.all_reduce(table, group=self.process.cpu_group)
            table /= self.process.world_size
            everywhere = [set()] * self.process.world_size
            dist.all_gather_object(everywhere, unreadable, group=self.process.cpu_group)
            unreadable = set().union(*everywhere)
        if not table.isfinite().all():
            row = int((~table.isfinite()).any(1).nonzero()[0])
            fail(f"step {done - len(table) + row + 1}: not finite: {named(table[row])}; the last checkpoint "
                 "stays. Try a lower --lr", code=1)
        if len(unreadable) > 0.01 * self.images:
            fail(f"{len(unreadable)} of {self.images} images unreadable, over 1 %: {min(unreadable)}", 1)
        per_step = (time.perf_counter() - self.began) / len(table)
        result = named(table.mean(0))
        result.update(images_per_s=self.effective_batch / per_step, step_seconds=per_step,
                      data_seconds=self.waited / len(table), unreadable=len(unreadable))
        self._restart_interval()
        return result

    def _save(self, done: int) -> None:
        if self.process.is_main:
            state = {name: part.state_dict() for name, part in self.stateful.items()}
            state |= {"args": plain(self.args), **self.identity, "step": done,
                      "epoch": done // self.steps_per_epoch, "versions": self.versions}
            if self.backbone is not None:
                export_backbone(self.backbone, self.out / "backbone", self.args.img_size, self.args.mean,
                                self.args.std)
            write_atomically(self.out / "checkpoint.pth", lambda file: torch.save(state, file))
        self.saved_at = time.monotonic()

    def _begin_log(self, header: dict) -> None:
        # Lines of later steps, from a run that was killed after its last checkpoint, go: they are done again.
        def stays(line: str) -> bool:
            try:
                return json.loads(line).get("step", 0) <= self.start_step
            except (ValueError, AttributeError, TypeError):  # half a line, from a kill while it was written
                return False

        path = self.out / "log.jsonl"
        with writing(path):
            old = path.read_text(errors="replace") if path.exists() and self.start_step else ""
        lines = [*filter(stays, old.splitlines()), json.dumps(header)]
        text = "".join(line + "\n" for line in lines)
        write_atomically(path, lambda file: file.write(text.encode()))

    def _write_line(self, done: int, values: dict) -> None:
        if not self.process.is_main:
            return
        with writing(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": done, **values}) + "\n")
        self._watch(done, values)
        words = []
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            words.append(" ".join([name, *(f"{x:.4g}" if isinstance(x, float) else str(x) for x in numbers)]))
            for i, number in enumerate(numbers if self._events else []):
                self._events.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, done)
        if self.bar.disable:
            print(f"step {done}/{self.stop_step}", *words, sep="  ", flush=True)
        else:
            self.bar.set_postfix_str("  ".join(words[:4]))  # the rest would not fit on a line

    def _watch(self, done: int, values: dict) -> None:
        for name in self.floors.keys() & values.keys():
            low = values[name] < self.floors[name]
            self.below[name] = below = [*self.below[name], done] if low else []
            if len(below) >= 5 and done - below[0] >= self.stop_step / 10:
                print(f"warning: {name} below {self.floors[name]} since step {below[0]}: collapse, features "
                      f"are nearly identical for all images. {self.advice}", file=sys.stderr, flush=True)
                self.floors = {}  # once is enough
                return


def _lock(out: Path) -> object:
    # Held until this process ends, however it ends. A record lock, because workers inherit the other kind.
    if fcntl is None:
        return None
    with writing(out / ".lock"):
        file = open(out / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else this file system has no locks
            fail(f"--output_dir {out}: another run is writing there; wait for it or take another folder")
    return file


def _event_writer(out: Path, start_step: int) -> object:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail("--tensorboard: the package tensorboard is not installed: pip install tensorboard")
    # As in the log, later steps of a run that was killed go.
    return SummaryWriter(str(out / "events"), purge_step=start_step + 1)

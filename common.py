"""Small helpers shared by the scripts. None belongs to a method; copy one with the helpers that it calls.

What belongs to a method, and each training loop, stands in its script, even where two or four scripts hold
the same lines. If you fix one copy (`main`, `gather`, `process_mean`, the heads), fix the others.

Order: errors, flags, processes and seeds; pixels and data (TIFF and others, any bands); colour on whole
batches; weight files of anybody; backbones and their weights; optimisation; what a run writes; `Run`. The two
readers are the larger half: files come from anywhere, and what cannot be read exactly is refused in one line.
"""

import argparse
import atexit
import contextlib
import copy
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.queues
import os
import pickle
import platform
import posixpath
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import imagecodecs
import numpy as np
import safetensors.torch
import tifffile
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
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".npy"}
UNREAD_KINDS = dict.fromkeys((".h5", ".hdf5", ".he5", ".hdf", ".nc", ".zarr"),
                             "HDF5, NetCDF and Zarr are not read: write each image as a TIFF or .npy file")
UNREAD_KINDS |= dict.fromkeys((".mat", ".npz"), ".mat and .npz files are not read: save each array as .npy")
UNREAD_HEADS = {b"\x89HDF\r\n\x1a\n": ".h5", b"MATLAB": ".mat", b"PK\x03\x04": ".npz"}
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
JP2_HEADS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")  # with boxes around the codestream, and without
TIFF_JPEGS = (6, 7, 34892, 33007)  # compressions that tifffile decodes to RGB
PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MOST_NUMBERS = 2**30  # pixels times bands to read at once: 4 GB in float32
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit is a sixth of that
RUN_FILES = {"log.jsonl", "checkpoint.pth", "results.jsonl"}  # a folder with one of them is no data,
EXPORT_FILES = {"config.json", "model.safetensors"}  # nor is one with both of these
TOO_LITTLE = {  # what errors of Python and PyTorch say, and what helps
    "Expected more than 1 value per channel": "BatchNorm needs two images or more: a larger "
                                              "--batch_size_per_gpu (--accum_steps does not help)",
    "Too many open files": "too many open files: raise `ulimit -n`, or give fewer --num_workers",
    "shared memory": "too little shared memory for the workers: fewer --num_workers, or a larger /dev/shm "
                     "(docker run --shm-size 8g)",
    "exited unexpectedly": "a worker ended, see above: fewer --num_workers may help",
    "is killed by signal: Killed": "a worker was killed, probably out of memory: fewer --num_workers",
    "CUDA out of memory": "too little memory on the GPU: a smaller --batch_size_per_gpu, with --accum_steps",
}
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
                if hasattr(signal, name)]  # Windows lacks two
# Flags of the training scripts that may change where a run is resumed: those that do not define
# the method. (Batch, accumulation and processes may change, their product, the effective batch, has to stay.)
FREE_FLAGS = {"data_path", "num_workers", "init", "checkpoint_key", "allow_partial", "batch_size_per_gpu",
              "accum_steps", "output_dir", "device", "amp", "compile", "save_every", "save_minutes",
              "log_every", "max_steps", "tensorboard"}
# Flags that checkpoints of earlier versions lack, and what these did.
YOUNGER_FLAGS = {"in_chans": 3, "bands": None, "tile_size": None, "train_fraction": [1.0]}

# --------------------------------------------------------------------------------------------------
# Errors, processes, seeds
# --------------------------------------------------------------------------------------------------


def fail(message: str, code: int = 2, everywhere: bool = False) -> NoReturn:
    """Ends the program with one line on stderr; `code` 2 is wrong usage, 1 a failed run.

    It is printed once per machine, or `everywhere`: in any process, for errors that only one may see.
    """
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", one_line(message), file=sys.stderr, flush=True)
    raise SystemExit(code)


def one_line(text: object) -> str:
    """The text in one line, its control characters and lone surrogates as escapes."""
    words = " ".join(str(text).splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, except where it is None or the text has it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        stated = action.default is None or "default:" in action.help
        return action.help if stated else super()._get_help_string(action)


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
        """Parts from the other processes, at the end.

        Threads of gloo that outlive Python abort the process. They end with the last reference to their
        group: DDP's, in cycles, go first, and ours is the last.
        """
        if self.world_size > 1:
            gc.collect()
            dist.destroy_process_group()
            object.__setattr__(self, "cpu_group", None)


def init_process(device: str) -> Process:
    """Joins the processes that `torch.distributed.run` started, if any; auto: first of cuda, mps, cpu."""
    if hasattr(sys.stdout, "reconfigure"):  # names of classes and files, in any terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = _say_what_is_short
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_of_queue)
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
        store, wait = _store_of_this_start(rank, world_size), datetime.timedelta(days=1)  # for who lists
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=None if name == "cuda" else wait)
        cpu_group = dist.new_group(backend="gloo", timeout=wait) if name == "cuda" else dist.group.WORLD
    return Process(rank, world_size, torch.device(name, local_rank if name == "cuda" else 0), cpu_group)


def _say_what_is_short(kind: type, error: BaseException, traceback: object) -> None:
    # One line where the machine has too little of something; it may be noticed anywhere in a script.
    way_out = next((way for words, way in TOO_LITTLE.items() if words in str(error)), None)
    if way_out is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print("error:", way_out, file=sys.stderr, flush=True)


def _end_of_queue(error: BaseException, _: object) -> None:
    # Of a worker that cannot hand over its batch, for which the main process would wait forever.
    sys.excepthook(type(error), error, error.__traceback__)
    os._exit(1)


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


def gather_objects(own: object, process: Process) -> list:
    """What each process has, in the order of their ranks."""
    parts = [own] * process.world_size
    if process.world_size > 1:
        dist.all_gather_object(parts, own, group=process.cpu_group)
    return parts


def check_alike(process: Process, **values: int) -> None:
    """Fails when not all processes have the same values, as when machines have folders of their own."""
    everywhere = gather_objects(values, process)
    for name, value in values.items():
        if others := {other[name] for other in everywhere} - {value}:
            fail(f"{name} is {value} here and {min(others)} in another process: --data_path and --output_dir "
                 "have to be the same folders on all machines")


def from_main(process: Process, function: Callable[[], object]) -> object:
    """What `function` returns in the main process, for all; if it fails, all end, with that one's line."""
    if process.world_size == 1:
        return function()
    answer, failure = [None, 0], None  # what it returns, exit code
    if process.is_main:
        try:
            answer[0] = function()
        except BaseException as error:
            failure, answer[1] = error, error.code if isinstance(error, SystemExit) else 1
    dist.broadcast_object_list(answer, 0, group=process.cpu_group)
    if answer[1]:
        raise failure or SystemExit(answer[1])
    return answer[0]


def agree(process: Process, *flags: bool) -> list[bool]:
    """Each flag is true in all processes once it is in one of them: a decision they take at the same step."""
    if process.world_size == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX, group=process.cpu_group)
    return votes.bool().tolist()


def stream_seed(*parts: int | str) -> int:
    """A 56-bit seed from any numbers and names; the same parts give the same seed everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded with `stream_seed` of the parts."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 itself: by its capability, whatever a run would measure."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to under `--amp` (auto, bf16, fp16, off) on `device`; None for no autocast.

    Losses, EMA, centre and queue are written in float32 in the scripts; so are weights and optimizer.
    """
    if amp == "auto":
        return torch.bfloat16 if computes_bf16(device) else None
    if amp == "fp16" and device.type != "cuda":
        fail(f"--amp fp16: only on cuda, this is {device.type}")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context of `--amp` on `device`, which may be entered repeatedly."""
    dtype = autocast_dtype(amp, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def choose_attention(amp: str, device: torch.device) -> None:
    """Chooses timm's form of attention for models built from now on, by `--amp`.

    On CPUs in bf16 matrix products and softmax one by one are 1.4 to 1.6 times as fast as PyTorch's fused
    attention, forward and backward.
    """
    timm.layers.set_fused_attn(not (device.type == "cpu" and autocast_dtype(amp, device) == torch.bfloat16))


# --------------------------------------------------------------------------------------------------
# Data: files, samples, batches
# --------------------------------------------------------------------------------------------------

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # a bad file gets one line of ours


class UnreadableImageError(Exception):
    """An image that cannot be read; the message names file and reason, in one line."""


class EmptyImageError(UnreadableImageError):
    """An image, or a window of one, without a valid pixel."""


class ChangedArchiveError(UnreadableImageError):
    """An archive that is no longer the one that was listed: the run ends, no other image is taken."""


# A row of Paths: where the path is in the text, in which archive, and where there. A list of strings would
# have its reference counts written in every worker, which copies the memory that it shares with the others.
ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("archive", "<i4"), ("at", "<i8"), ("size", "<i8")])


@dataclass(eq=False, repr=False)
class Paths(Sequence):
    """Paths of images in two arrays: 32 bytes each and the path, of a member that in its archive.

    `paths[i]` is a str, of an archive's a Member; `paths[array]` are the Paths of these, in the same memory.
    """

    text: np.ndarray  # uint8: one path after the other
    rows: np.ndarray  # N of ROW; archive: -1 for none
    archives: list[tuple[str, int, int]]  # path, size, time of the last change in ns

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        """Paths of plain strings, which need no archive."""
        text, lengths = bytearray(), array("i")
        for path in map(os.fsencode, paths):
            text += path
            lengths.append(len(path))
        rows = np.zeros(len(lengths), ROW)
        rows["length"], rows["archive"] = lengths, -1
        rows["start"] = rows["length"].cumsum(dtype=np.int64) - rows["length"]
        return cls(np.frombuffer(text, np.uint8), rows, [])

    @classmethod
    def join(cls, parts: Iterable["Paths"]) -> "Paths":
        """One after the other; their texts hold nothing else."""
        texts, rows, archives, begin = [np.empty(0, np.uint8)], [np.empty(0, ROW)], [], 0
        for part in parts:
            texts.append(part.text)
            rows.append(part.rows.copy())
            rows[-1]["start"] += begin
            rows[-1]["archive"][part.rows["archive"] >= 0] += len(archives)
            archives, begin = archives + part.archives, begin + len(part.text)
        return cls(np.concatenate(texts), np.concatenate(rows), archives)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> "str | Paths":
        if not isinstance(index, (int, np.integer)):
            return Paths(self.text, self.rows[index], self.archives)
        start, length, archive, at, size = self.rows[index].item()
        path = os.fsdecode(self.text[start : start + length].tobytes())
        if archive < 0:
            return path
        member = Member(f"{self.archives[archive][0]}/{path}")
        member.archive, member.at, member.size = self.archives[archive], at, size
        return member

    def folder_ranks(self) -> np.ndarray:
        """Of each path's folder, its place among all folders sorted by their paths; N."""
        folders = [os.path.dirname(path) for path in self]
        ranks = {folder: rank for rank, folder in enumerate(sorted(set(folders)))}
        return np.array([ranks[folder] for folder in folders])


def list_images(root: str | Path, exclude: str | Path | None = None, flag: str = "--data_path",
                bands: Sequence[int | str] | None = None, archives: Path | None = None) -> Paths:
    """Paths of all images below `root`, links followed; sorted. With names of bands, the folders of bands.

    What is not data is left out: hidden files and folders, `@eaDir`, the folder `exclude`, and folders that
    hold a run's own files. With `archives`, a file to keep their listings in, a plain .tar is a folder.
    """
    if not os.path.isdir(root):
        fail(f"{flag} {root}: " + ("is a file; give the folder that holds it" if os.path.exists(root) else
                                   "no such folder"))
    if exclude and os.path.realpath(root) == os.path.realpath(exclude):
        fail(f"{flag} {root}: is --output_dir too; give another folder")
    known, listed, compressed = read_listings(archives) if archives else {}, {}, []
    found, archived = [], {}  # paths; path of an archive and a slash -> images in it
    for folder, names in _walk(os.fspath(root), exclude, flag):
        if is_named(bands):
            found += [folder] * any(is_band(name, band) for name in names for band in bands)
        else:
            found += [os.path.join(folder, name) for name in names
                      if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and name[0] != "."]
        for path in [os.path.join(folder, name) for name in names] if archives else []:
            compressed += [path] * path.lower().endswith(COMPRESSED)
            if path.lower().endswith(".tar") and os.path.basename(path)[0] != "." and (
                    os.path.isfile(path) or os.path.islink(path)):
                if is_named(bands):
                    fail(f"{flag} {path}: an archive, in which bands have no names (--bands): unpack it")
                key, part = _archive_images(path, known, flag)
                if key not in listed:
                    listed[key], archived[f"{path}/"] = part, replace(part, archives=[(path, *key[1:])])
    parts = itertools.groupby(sorted([*found, *archived]), archived.__contains__)
    paths = Paths.join(part for is_archive, group in parts
                       for part in (map(archived.get, group) if is_archive else [Paths.of(group)]))
    if listed.keys() - known.keys():
        write_listings(archives, listed.values())
    words = [f"{compressed[0]}: compressed archives are not read: unpack it to a .tar"] if compressed else []
    if not paths:
        wanted = f"file of the bands {' '.join(bands)}" if is_named(bands) else "image"
        seen = {os.path.splitext(name)[1].lower() for _, *names in os.walk(root) for name in sum(names, [])}
        fail("; ".join([f"{flag} {root}: no {wanted} in it ({', '.join(sorted(IMAGE_SUFFIXES))})", *words,
                        *sorted({UNREAD_KINDS[suffix] for suffix in seen & UNREAD_KINDS.keys()})]))
    for line in words:
        print("warning:", one_line(line), file=sys.stderr, flush=True)
    return paths


def _walk(root: str, exclude: str | Path | None, flag: str) -> Iterator[tuple[str, list[str]]]:
    # Folders that are data, each once though links lead to it, and names of files in them.
    def refuse(error: OSError) -> NoReturn:
        fail(f"{flag} {error.filename}: cannot be listed: {error.strerror}")

    done = {os.path.realpath(exclude)} if exclude else set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        own, place = run_files(names), os.path.realpath(folder)
        if own and folder == root:
            fail(f"{flag} {root}: holds {own}, as the output of a run does; if it is data, move that away")
        if own or place in done:  # a link back to a folder above, or a second one
            folders.clear()
            continue
        done.add(place)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "@eaDir")
        yield folder, names


class _Header(tarfile.TarInfo):
    # Where tarfile takes a damaged header for the end of an archive, this is an error.

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or header.size > 2**20 and header.type in b"LKxXg":
            raise tarfile.InvalidHeaderError("an absurd size")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        start = archive.fileobj.tell()
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise ValueError("truncated: it lacks the blocks of zeros that end an archive: copy it "
                             "again") from None
        except tarfile.HeaderError:
            raise ValueError(f"damaged at byte {start}: copy it again" if start else
                             "damaged at byte 0, or no tar archive: copy it again, or move it away") from None


def _archive_images(path: str, known: dict, flag: str) -> tuple[tuple[str, int, int], Paths]:
    # What tells an archive from all others and from its earlier self, and the images in it.
    try:
        stat = os.stat(path)
        if not os.path.isfile(path):
            raise ValueError("not a regular file")
        key = os.path.realpath(path), stat.st_size, stat.st_mtime_ns
        if key in known:
            return key, known[key]
        with open(path, "rb") as file:
            found = _list_members(file, stat.st_size)
    except OSError as error:
        fail(f"{flag} {path}: cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"{flag} {path}: {error}")
    except (tarfile.TarError, RecursionError) as error:  # unexpected end of data; thousands of long names
        fail(f"{flag} {path}: truncated or damaged: {error}")
    own = {}
    for name in found:
        base = name[name.rfind("/") + 1 :]
        if base in RUN_FILES or base in EXPORT_FILES:
            own.setdefault(name[: len(name) - len(base)], []).append(base)
    outputs = tuple(folder for folder, names in own.items() if run_files(names))
    no_data = re.compile(r"(.*/)?(\.|@eaDir/)", re.DOTALL)
    names = sorted(name for name in found if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                   and not no_data.match(name) and not name.startswith(outputs))
    paths = Paths.of(names)
    rows, paths.archives = paths.rows, [key]
    rows["archive"], (rows["at"], rows["size"]) = 0, np.reshape([found[name] for name in names], (-1, 2)).T
    return key, paths


def _list_members(file: BinaryIO, end: int) -> dict[str, tuple[int, int]]:
    # Name -> where a file's data begin, and how many bytes; of several of one name the last, as tar has it.
    head, found, links = file.read(6), {}, {}
    if packer := next((name for magic, name in PACKERS.items() if head.startswith(magic)), None):
        raise ValueError(f"a compressed archive: unpack it to a plain one ({packer} -dc OLD > NEW.tar)")
    file.seek(0)
    archive = tarfile.TarFile(fileobj=file, tarinfo=_Header, errors="surrogateescape")
    while member := archive.next():
        archive.members.clear()  # it keeps them all
        name = _plain_name(member.name)
        if member.issparse():
            raise ValueError(f"{name}: a sparse file: make the archive without --sparse")
        linked = found.get(_plain_name(member.linkname), (0, 0))
        found.pop(name, None)
        links.pop(name, None)
        if member.isreg():
            if not 0 <= member.size <= end - member.offset_data:
                raise ValueError(f"truncated or damaged: {name} is incomplete: copy it again")
            found[name] = member.offset_data, member.size
        elif member.islnk():  # a hard link to a member before it
            found[name] = linked
        elif member.issym():
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    file.seek(archive.offset)
    if file.read(2**20).strip(b"\0"):
        raise ValueError("has data after its end, as archives joined by cat do: join them by tar -A")
    for name, path in links.items():  # symbolic ones; those that lead elsewhere: at 0, where no data begin
        for _ in range(40):
            path = links.get(path, path)
        found[name] = found.get(path, (0, 0))
    return found


def _plain_name(path: str) -> str:
    return "/".join([part for part in path.split("/") if part and part != "."])


def write_listings(path: Path, listings: Iterable[Paths]) -> None:
    """Keeps the images of archives for the next start."""
    every = Paths.join(listings)
    archives = np.frombuffer(json.dumps(every.archives).encode(), np.uint8)
    write_atomically(path, lambda file: np.savez(file, text=every.text, rows=every.rows, archives=archives))


def read_listings(path: Path) -> dict[tuple[str, int, int], Paths]:
    """What write_listings kept, by path, size and time; nothing where the file is damaged or of old."""
    try:
        with np.load(path, allow_pickle=False) as file:  # a zip archive with checksums
            text, rows = file["text"], file["rows"].astype(ROW, casting="no")
            archives = [tuple(key) for key in json.loads(file["archives"].tobytes())]
        ends = np.append(rows["start"], len(text))
        bounds, parts = np.searchsorted(rows["archive"], np.arange(len(archives) + 1)).tolist(), {}
        for key, a, b in zip(archives, bounds[:-1], bounds[1:], strict=True):
            parts[key] = Paths(text[ends[a] : ends[b]], rows[a:b].copy(), [key])
            parts[key].rows["start"] -= ends[a]
            parts[key].rows["archive"] = 0
        return parts
    except Exception:  # no such file, or one damaged in any way: the archives are listed again
        return {}


class Member(str):
    """Path of an image in an archive, and where it lies there."""

    archive: tuple[str, int, int]  # path, size, time of the last change
    at: int
    size: int

    def open(self) -> BinaryIO:
        """Its bytes as a file; raises ChangedArchiveError."""
        path, *before = self.archive
        file = _open_archive(*self.archive)
        stat = os.fstat(file.fileno())
        if [stat.st_size, stat.st_mtime_ns] != before:
            raise ChangedArchiveError(f"{path}: changed since it was listed: start again")
        if not self.at:
            raise ValueError("a link to no file of its archive: make that with tar --dereference")
        return io.BufferedReader(_Section(file, self.at, self.size), min(max(self.size, 1), 2**20))


@functools.lru_cache(64)
def _open_archive(path: str, *of_listing: int) -> io.FileIO:
    return open(path, "rb", buffering=0)


def read_at(file: io.FileIO, count: int, at: int) -> bytes:
    """Up to `count` bytes from `at`; processes that inherited the open file do not disturb each other."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, at)
    file.seek(at)  # Windows, where none is inherited
    return file.read(count)


class _Section(io.RawIOBase):
    # A part of an archive as a file.

    def __init__(self, file: io.FileIO, at: int, size: int):
        self.file, self.at, self.size, self.here = file, at, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.here = max(0, offset + (0, self.here, self.size)[whence])
        return self.here

    def readinto(self, buffer: memoryview) -> int:
        data = read_at(self.file, max(0, min(len(buffer), self.size - self.here)), self.at + self.here)
        buffer[: len(data)] = data
        self.here += len(data)
        return len(data)


def run_files(names: Sequence[str]) -> str:
    """Those of a folder's files that only the output of a run has, in words; empty for data."""
    own = EXPORT_FILES if EXPORT_FILES.issubset(names) else RUN_FILES.intersection(names)
    return " and ".join(sorted(own))


def is_data(folder: Path, exclude: Path | None) -> bool:
    """True for a folder that list_images would look into."""
    hidden = folder.name[0] == "." or folder.name == "@eaDir"
    other = not exclude or os.path.realpath(folder) != os.path.realpath(exclude)
    own = run_files([name for name in RUN_FILES | EXPORT_FILES if os.path.exists(folder / name)])
    return folder.is_dir() and not hidden and other and not own


def band(word: str) -> int | str:
    """One of --bands: a number from 1, or a name."""
    return int(word) if word.isdigit() else word


def check_bands(args: argparse.Namespace, default: int | None = 3) -> None:
    """Fails where --bands contradict each other or --in_chans; sets args.in_chans, else to `default`."""
    if args.bands:
        words = " ".join(map(str, args.bands))
        if len({type(one) for one in args.bands}) > 1 or 0 in args.bands:
            fail(f"--bands {words}: numbers from 1, or names, not both")
        if args.in_chans not in (None, len(args.bands)):
            fail(f"--in_chans {args.in_chans}: --bands {words} are {len(args.bands)}; leave it out")
    args.in_chans = len(args.bands) if args.bands else args.in_chans or default


def is_named(bands: Sequence[int | str] | None) -> bool:
    """True for bands by name: then a folder with a file for each of them is the image."""
    return bool(bands) and isinstance(bands[0], str)


def is_band(file: str, band: str) -> bool:
    """True where the file's stem is `band` or ends with `_` and `band`, in any case."""
    return f"_{os.path.splitext(file)[0]}".lower().endswith(f"_{band}".lower())


def read_image(path: str | Path, in_chans: int = 3, bands: Sequence[int | str] | None = None,
               window: tuple[int, int, int, int] | None = None) -> Tensor:
    """Reads an image in_chans x H x W: uint8, or float32 with the file's own values for all other types.

    jpg, png, bmp, webp, tif, jp2, npy, by their content; an array is H x W or H x W x C, or C x H x W where
    only that fits. Alpha is dropped where the other bands are as many as asked for. 8-bit grey becomes three
    equal channels, 8-bit RGB its luma for one. Pixels that are NaN, infinite, declared no-data or masked get
    the mean of the valid ones, band by band.

    Args:
        path: a file; with names in `bands` a folder.
        in_chans: C; ignored where `bands` are given.
        bands: numbers from 1 choose and order the bands of the file; each name stands for the one file in the
            folder that `is_band`, resized to the largest of them (bilinear).
        window: top, left, height and width of the part to read; of a TIFF only the strips or tiles under it.

    Raises:
        EmptyImageError: no pixel is valid.
        UnreadableImageError: anything else is wrong with it.
    """
    return as_image(*read_masked(path, in_chans, bands, window))


def read_masked(path: str | Path, in_chans: int = 3, bands: Sequence[int | str] | None = None,
                window: tuple[int, int, int, int] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """What read_image reads before it fills: H x W x in_chans, and where that is valid (H x W, or None)."""
    with _in_words(path):
        part = window and (slice(window[0], window[0] + window[2]), slice(window[1], window[1] + window[3]))
        if is_named(bands):
            pixels, valid = _read_folder(path, bands, part)
        else:
            with _opened(path, in_chans, bands) as raster:
                pixels, valid = _read_bands(raster, in_chans, bands, part)
        if valid is not None and not valid.any():
            raise EmptyImageError(f"{path}: no valid pixel")
        return pixels, None if valid is None or valid.all() else valid


def as_image(pixels: np.ndarray, valid: np.ndarray | None) -> Tensor:
    """H x W x C as a tensor C x H x W in the same memory (fast to crop and resize); invalid pixels filled."""
    return torch.from_numpy(pixels if valid is None else _filled(pixels, valid)).permute(2, 0, 1)


def image_size(path: str | Path, in_chans: int = 3,
               bands: Sequence[int | str] | None = None, whole: bool = False) -> tuple[int, int]:
    """Height and width of what read_image would read, without decoding it; raises UnreadableImageError.

    `whole`: it has to be small enough to be read without a window.
    """
    with _in_words(path):
        if is_named(bands):
            size, count = _largest([image_size(file, 1) for file in _band_files(path, bands)]), len(bands)
        else:
            with _opened(path, in_chans, bands) as raster:
                size, count = (raster.height, raster.width), raster.bands
        if whole:
            _check_size(*size, count)
        return size


@contextlib.contextmanager
def _in_words(path: str | Path) -> Iterator[None]:
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # not the image's fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, MemoryError):
            reason = f"too little memory to read it: {reason}"
        elif not isinstance(error, (ValueError, OSError, RuntimeError)):  # an unexpected one of a decoder
            reason = f"damaged ({type(error).__name__}: {reason})"
        raise UnreadableImageError(f"{path}: {reason}") from error


def _filled(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    mean = pixels[valid].mean(0, dtype=np.float64)
    pixels[~valid] = mean.round() if pixels.dtype == np.uint8 else mean
    return pixels


@dataclass
class _Raster:
    """An open file. `read(rows, columns)` gives h x w x bands, and where they are valid, in that shape."""

    height: int
    width: int
    bands: int
    read: Callable[[slice, slice], tuple[np.ndarray, np.ndarray | None]]
    rgb: bool = False  # what is not alpha is red, green and blue
    alpha: Sequence[int] = ()  # from 0


@contextlib.contextmanager
def _opened(path: str | Path, in_chans: int, bands: Sequence[int] | None) -> Iterator[_Raster]:
    suffix, is_member = os.path.splitext(path)[1].lower(), isinstance(path, Member)
    if not is_member and os.path.exists(path) and not os.path.isfile(path):
        if not os.path.isdir(path):
            raise ValueError("not a regular file")
        raise ValueError(UNREAD_KINDS.get(suffix, "a folder: name the bands in it with --bands"))
    with path.open() if is_member else open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        kinds = [kind for start, kind in UNREAD_HEADS.items() if head.startswith(start)]
        if kinds or suffix in UNREAD_KINDS:
            raise ValueError(UNREAD_KINDS[kinds[0] if kinds else suffix])
        if head.startswith(TIFF_HEADS):
            yield _open_tiff(file)
        elif head.startswith(JP2_HEADS):
            yield _open_jp2(file)
        elif head.startswith(b"\x93NUMPY"):
            array = _npy_in_archive(path, file) if is_member else np.load(path, "r", allow_pickle=False)
            yield _open_npy(array, in_chans, bands)
        else:
            yield _open_pillow(file)


def _check_size(height: int, width: int, bands: int) -> None:
    size = f"{height} x {width} pixels of {bands} bands"
    if height * width * bands < 1:
        raise ValueError(size)
    if height * width * bands > MOST_NUMBERS:
        raise ValueError(f"{size} are too many to read at once: cut the image into parts; "
                         "pre-training does so with --tile_size")


def _read_bands(raster: _Raster, in_chans: int, bands: Sequence[int] | None,
                part: tuple[slice, slice] | None) -> tuple[np.ndarray, np.ndarray | None]:
    # The bands asked for, h x w x in_chans, uint8 or float32, and which pixels are valid in all (h x w).
    rows, columns = part or (slice(0, raster.height), slice(0, raster.width))
    if rows.stop > raster.height or columns.stop > raster.width:
        raise ValueError(f"{raster.height} x {raster.width} pixels, which do not hold the window")
    _check_size(rows.stop - rows.start, columns.stop - columns.start, raster.bands)
    pixels, valid = raster.read(rows, columns)
    if pixels.shape != (rows.stop - rows.start, columns.stop - columns.start, raster.bands):
        raise ValueError(f"{shape_words(pixels.shape)} numbers, where its header says {raster.height} x "
                         f"{raster.width} pixels of {raster.bands} bands")
    if pixels.dtype.kind not in "biuf":
        raise ValueError(f"{pixels.dtype} pixels, which are no real numbers")
    every, colours = list(range(raster.bands)), [i for i in range(raster.bands) if i not in raster.alpha]
    grey_or_rgb = pixels.dtype == np.uint8 and (len(colours) == 1 and in_chans == 3
                                                or len(colours) == 3 and in_chans == 1 and raster.rgb)
    if bands:
        chosen, in_chans = [band - 1 for band in bands], len(bands)
    else:
        chosen = every if in_chans == raster.bands else colours
    if bands and max(bands) > raster.bands:
        raise ValueError(f"{raster.bands} bands, --bands {' '.join(map(str, bands))} asks for more")
    if len(chosen) != in_chans and not grey_or_rgb:
        alpha = f" ({len(raster.alpha)} of them alpha)" if raster.alpha else ""
        count = f"{raster.bands} band{'s' * (raster.bands > 1)}{alpha}"
        if raster.width == in_chans and not bands:
            raise ValueError(f"{raster.height} x {raster.width} pixels of {count}: if H, W and bands are "
                             "mixed up, write it by tifffile with planarconfig='contig'")
        raise ValueError(f"{count}, not {in_chans}: give --in_chans {raster.bands}, or choose with --bands")
    if chosen != every:
        pixels, valid = (x if x is None else x[:, :, chosen] for x in (pixels, valid))
    if pixels.dtype != np.uint8:
        real = pixels.dtype.kind == "f"
        with np.errstate(over="ignore"):
            pixels = pixels.astype(np.float32)
        if real and not (finite := np.isfinite(pixels)).all():
            valid = finite if valid is None else valid & finite
    if len(chosen) < in_chans:
        pixels = np.repeat(pixels, 3, 2)
    elif len(chosen) > in_chans:
        pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[:, :, None]
    return np.require(pixels, requirements="CW"), valid if valid is None else valid.all(2)


def _open_pillow(file: BinaryIO) -> _Raster:
    try:  # never a TIFF: of 16-bit RGB it would give the upper bytes, of many bands the first
        image = Image.open(file, formats=["JPEG", "PNG", "BMP", "WEBP", "GIF"])
    except Image.UnidentifiedImageError as error:
        raise ValueError("cannot identify image file") from error
    deep = image.format == "PNG" and (image.mode[0] == "I" or ";16" in str(image.tile))
    mode = image.mode if image.mode in ("L", "LA", "RGB", "RGBA") else "L" if image.mode == "1" else "RGB"
    if image.mode == "P" and "transparency" in image.info or image.mode == "PA":
        mode = "RGBA"
    bands = 1 if deep and image.mode[0] == "I" else len(mode)

    def read(rows: slice, columns: slice) -> tuple[np.ndarray, None]:
        if deep:
            file.seek(0)
            pixels = imagecodecs.png_decode(file.read())
        else:
            pixels = np.array(image if image.mode == mode else image.convert(mode))
        return np.atleast_3d(pixels)[rows, columns, :bands], None  # more: tRNS as alpha, by libpng

    return _Raster(image.height, image.width, bands, read, bands > 2, [bands - 1] * (bands in (2, 4)))


def _open_jp2(file: BinaryIO) -> _Raster:
    start, head = 0, file.read(64)
    while not head.startswith(JP2_HEADS[1]):  # from box to box; what lies within others is no codestream
        length, kind, long = struct.unpack_from(">I4sQ", head)
        if kind != b"jp2c" and length != 1 and length < 8 or length == 1 and long < 16:
            raise ValueError("a JPEG 2000 file without an image in it")
        start += (16 if length == 1 else 8) if kind == b"jp2c" else long if length == 1 else length
        file.seek(start)
        head = file.read(64)
    right, bottom, left, top = struct.unpack_from(">4I", head, 8)  # after markers, length, capabilities
    bands = struct.unpack_from(">H", head, 40)[0]

    def read(rows: slice, columns: slice) -> tuple[np.ndarray, None]:
        file.seek(0)
        return np.atleast_3d(imagecodecs.jpeg2k_decode(file.read(), numthreads=1))[rows, columns], None

    return _Raster(bottom - top, right - left, bands, read, rgb=bands == 3)


def _npy_in_archive(member: Member, file: BinaryIO) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a .npy of version {version[0]}.{version[1]}, which is not read from an archive")
    read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize > member.size:
        raise ValueError("its numbers lie beyond its end" if not dtype.hasobject else "objects, not numbers")
    order = "F" if is_fortran else "C"
    return np.memmap(member.archive[0], dtype, "r", member.at + file.tell(), shape, order)


def _open_npy(array: np.ndarray, in_chans: int, bands: Sequence[int] | None) -> _Raster:
    shape = " x ".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"{shape} numbers, not H x W, H x W x bands or bands x H x W")
    first, _, last = (n >= max(bands) if bands else n == in_chans for n in array.shape)
    square = array.shape[1] == array.shape[2] != array.shape[0]  # 12 x 64 x 64 has bands 4 3 2 both ways
    if first and (not last or bands and square):
        array = array.transpose(1, 2, 0)
    elif not last and array.shape[2] > 1:
        n = max(bands) if bands else in_chans
        raise ValueError(f"{shape} numbers, neither H x W x {n} nor {n} x H x W (--in_chans, --bands)")
    return _Raster(*array.shape, lambda rows, columns: (np.array(array[rows, columns]), None))


def _open_tiff(file: BinaryIO) -> _Raster:
    # Its images are the first page, and those of the same size that are neither overview nor mask.
    pages, places, numbers = [], set(), 0
    for page in tifffile.TiffFile(file).pages:
        page = page.aspage()
        # Several pages may point to the same places.
        numbers += sum(tag.count for tag in page.tags if tag.code in (273, 279, 324, 325))
        if page.offset in places or numbers > 2**25:
            raise ValueError("a TIFF whose pages form a loop" if page.offset in places else
                             "a TIFF of too many strips, tiles or pages")
        places.add(page.offset)
        pages.append(page)
    if not pages:
        raise ValueError("a TIFF with no image in it")
    first, height, width = pages[0], pages[0].imagelength, pages[0].imagewidth
    pages = [page for page in pages[1:] if (page.imagelength, page.imagewidth, page.subfiletype & 1)
             == (height, width, 0)]
    masks = [page for page in pages if page.subfiletype & 4 or page.photometric == 4]
    images = [first, *(page for page in pages if page not in masks)]
    alpha, bands = [], 0
    for page in images:
        count, extra = _band_count(page), page.extrasamples
        alpha += [bands + count - len(extra) + i for i, kind in enumerate(extra) if kind in (1, 2)]
        bands += count

    def read(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray | None]:
        parts = []
        for page in images:
            numbers = _page_numbers(file, page, rows, columns)
            pixels = _page_pixels(page, numbers)
            valid = _where_declared(numbers, page.tags.valueof(42113, first.tags.valueof(42113)))
            if valid is not None and valid.shape != pixels.shape:
                valid = np.broadcast_to(valid.all(2, keepdims=True), pixels.shape)
            parts.append((pixels, valid))
        pixels = parts[0][0] if len(parts) == 1 else np.concatenate([part for part, _ in parts], 2)
        valid = None
        if any(where is not None for _, where in parts):
            valid = np.concatenate([np.ones_like(part, bool) if where is None else where
                                    for part, where in parts], 2)
        for page in masks:
            where = (_page_numbers(file, page, rows, columns) != 0).all(2, keepdims=True)
            valid = np.broadcast_to(where, pixels.shape) if valid is None else valid & where
        return pixels, valid

    rgb = len(images) == 1 and first.photometric in (2, 3, 5, 6)
    return _Raster(height, width, bands, read, rgb, alpha)


def _where_declared(numbers: np.ndarray, text: str | None) -> np.ndarray | None:
    # False where the numbers are the value that a TIFF declares as no data, or None if it declares none.
    if text is None:
        return None
    try:
        text = str(text).replace(",", ".")  # of a writer with that decimal sign
        if numbers.dtype.kind == "f":
            with np.errstate(over="ignore"):
                return numbers != numbers.dtype.type(text)
        return numbers != (int(text) if text.lstrip("+-").isdigit() else float(text))
    except ValueError:  # no number
        return None


def _band_count(page: tifffile.TiffPage) -> int:
    # How many bands a page of a TIFF gives; raises ValueError for what is not read.
    colours, n, eight = page.photometric, page.samplesperpixel, page.dtype == np.uint8
    if page.dtype is None:
        raise ValueError(f"pixels of {page.bitspersample} bits and sample format {page.sampleformat}")
    if page.dtype.kind == "c":
        raise ValueError("complex pixels: write their amplitude or decibels")
    if page.imagedepth > 1:
        raise ValueError(f"a volume of {page.imagedepth} slices: write a page for each")
    if colours == 3 and (page.colormap is None or page.dtype.kind != "u" or n > 1):
        raise ValueError("a palette image without a palette for its numbers")
    odd = colours == 5 and not (n == 4 and eight) or colours == 6 and n != 3
    if odd or colours not in (0, 1, 2, 3, 4, 5, 6):
        name = getattr(colours, "name", colours)
        raise ValueError(f"{n} samples of {page.dtype} in {name} colours: write RGB, or plain bands")
    return 3 if colours in (3, 5) else n


def _page_pixels(page: tifffile.TiffPage, numbers: np.ndarray) -> np.ndarray:
    # What the numbers of a page mean: RGB of palettes, inks and YCbCr; black is 0; 1, 2 and 4 bits become 8.
    colours = page.photometric if 262 in page.tags else 1
    if colours == 3:
        palette = page.colormap.T
        return (palette >> 8 if palette.max() > 255 else palette).astype(np.uint8)[numbers[:, :, 0]]
    if colours == 5 or colours == 6 and page.compression not in TIFF_JPEGS and page.dtype == np.uint8:
        size, mode = numbers.shape[1::-1], "CMYK" if colours == 5 else "YCbCr"
        return np.asarray(Image.frombytes(mode, size, numbers.tobytes()).convert("RGB"))
    if page.bitspersample in (1, 2, 4) and colours in (0, 1, 4):
        numbers = numbers.astype(np.uint8) * (255 // (2**page.bitspersample - 1))
    return 255 - numbers if colours == 0 and numbers.dtype == np.uint8 else numbers


def _page_numbers(file: BinaryIO, page: tifffile.TiffPage, rows: slice, columns: slice) -> np.ndarray:
    # The numbers of a page in these rows and columns, h x w x samples; reads only what lies under them.
    planes, _, H, W, n = page.shaped  # one of planes and n is 1
    if page.is_final and page.dataoffsets[0] > 0:  # uncompressed, in one place
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        start, whole = page.dataoffsets[0], file
        if isinstance(file.raw, _Section):
            if start + math.prod(page.shaped) * dtype.itemsize > file.raw.size:
                raise ValueError("truncated: its pixels lie beyond the end of the file")
            start, whole = start + file.raw.at, file.raw.file
        numbers = np.memmap(whole, dtype, "r", start, page.shaped)[:, 0, rows, columns]
        numbers = numbers.astype(page.dtype)
    else:
        numbers = np.empty((planes, rows.stop - rows.start, columns.stop - columns.start, n), page.dtype)
        for plane, top, left, segment in _segments(file, page, rows, columns):
            h, w = segment.shape[:2]
            y, x = max(rows.start, top), max(columns.start, left)
            part = segment[y - top : rows.stop - top, x - left : columns.stop - left]
            y, x = y - rows.start, x - columns.start
            numbers[plane, y : y + len(part), x : x + part.shape[1]] = part
    return numbers[0] if planes == 1 else np.moveaxis(numbers[..., 0], 0, 2)


def _segments(file: BinaryIO, page: tifffile.TiffPage, rows: slice,
              columns: slice) -> Iterator[tuple[int, int, int, np.ndarray]]:
    # Plane, top, left and numbers h x w x samples of the strips or tiles under these rows and columns.
    (planes, _, H, W, n), offsets, counts = page.shaped, page.dataoffsets, page.databytecounts
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, W)
    if not 0 < height * width * n * page.dtype.itemsize <= 4 * MOST_NUMBERS:
        raise ValueError(f"strips or tiles of {height} x {width} pixels")
    down, across = math.ceil(H / height), math.ceil(W / width)
    if min(len(offsets), len(counts)) < planes * down * across:
        raise ValueError(f"{len(offsets)} of {planes * down * across} strips or tiles are there")
    under = (range(rows.start // height, math.ceil(rows.stop / height)),
             range(columns.start // width, math.ceil(columns.stop / width)))
    for plane, i, j in itertools.product(range(planes), *under):
        index, data = (plane * down + i) * across + j, None
        if counts[index]:  # 0: left out, because all of it is no data
            file.seek(offsets[index])
            data = file.read(counts[index])
            if len(data) < counts[index]:
                raise ValueError("truncated: a strip or tile lies beyond the end of the file")
        decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        if decoded is None:
            decoded = np.full(shape, page.nodata, page.dtype)
        if decoded.dtype.itemsize > page.dtype.itemsize:
            raise ValueError(f"{decoded.dtype} numbers in a strip or tile of {page.dtype}")
        yield plane, i * height, j * width, decoded[0, : H - i * height, : W - j * width]


def _band_files(folder: str | Path, names: Sequence[str]) -> list[str]:
    # The file of each band; raises ValueError where there is none, or there are several.
    files = sorted(name for name in os.listdir(folder)
                   if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and name[0] != ".")
    chosen = []
    for band in names:
        found = [file for file in files if is_band(file, band)]
        if len(found) != 1:
            raise ValueError(f"{len(found) or 'no'} file{'s' * (len(found) > 1)} of band {band}"
                             f"{': ' * bool(found)}{', '.join(found)}")
        chosen.append(os.path.join(folder, found[0]))
    return chosen


def _read_folder(folder: str | Path, names: Sequence[str],
                 part: tuple[slice, slice] | None) -> tuple[np.ndarray, np.ndarray | None]:
    files, everywhere = _band_files(folder, names), (slice(None), slice(None))
    sizes = [image_size(file, 1) for file in files]
    size, bands, where = _largest(sizes), [], []
    for file, own_size in zip(files, sizes, strict=True):
        same = own_size == size
        with _opened(file, 1, None) as raster:
            pixels, valid = _read_bands(raster, 1, None, part if same else None)
        if not same:
            if valid is not None:
                pixels = _filled(pixels, valid) if valid.any() else pixels  # no-data is not to be blended in
                valid = _resized(valid[:, :, None], size, "nearest")[part or everywhere]
            pixels = _resized(pixels, size, "bilinear")[part or everywhere]
        bands.append(pixels)
        where += [] if valid is None else [valid.reshape(pixels.shape)]
    if any(band.dtype != np.uint8 for band in bands):
        bands = [band.astype(np.float32) for band in bands]
    return np.concatenate(bands, 2), np.concatenate(where, 2).all(2) if where else None


def _largest(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _resized(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    # h x w x 1 to H x W x 1, in the same type.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size, mode=mode)[0].permute(1, 2, 0).numpy()
    return (image.round() if pixels.dtype == np.uint8 else image).astype(pixels.dtype)


class Samples(torch.utils.data.Dataset):
    """The images of a data set, or with `tile_size` their windows: `samples[i]` is number i, C x H x W.

    The windows of an image are a grid of tile_size x tile_size pixels, the last row and column shifted
    inwards; a smaller image is one. They are computed, not listed: a million takes no memory.

    Args:
        paths: files, or folders of bands, as list_images gives them, or a list.
        in_chans, bands: see read_image.
        tile_size: side of the windows; None for whole images.
        dtype: of the pixels, once it is known: others are unreadable.
    """

    def __init__(self, paths: Sequence[str], in_chans: int = 3, bands: Sequence[int | str] | None = None,
                 tile_size: int | None = None, dtype: torch.dtype | None = None):
        self.paths = paths if isinstance(paths, Paths) else Paths.of(paths)
        self.bands, self.tile_size, self.dtype = bands, tile_size, dtype
        self.in_chans = len(bands) if bands else in_chans
        if tile_size:
            self.sizes = np.array([self._size(path) for path in self.paths], np.int32)  # N x 2
            self.ends = (-(-self.sizes // tile_size)).prod(1, dtype=np.int64).cumsum()  # of the windows

    def _size(self, path: str) -> tuple[int, int]:
        try:
            return image_size(path, self.in_chans, self.bands)
        except UnreadableImageError:  # it is one sample, which is counted and reported where it is read
            return 1, 1

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.tile_size else len(self.paths)

    def counts(self) -> np.ndarray:
        """Samples of each image, N."""
        return np.diff(self.ends, prepend=0) if self.tile_size else np.ones(len(self.paths), np.int64)

    def place(self, index: int) -> tuple[int, int, int]:
        """Of a sample: the number of its image, of its window in that, and how many that has."""
        if not self.tile_size:
            return index, 0, 1
        image = int(np.searchsorted(self.ends, index, side="right"))
        begin = int(self.ends[image - 1]) if image else 0
        return image, index - begin, int(self.ends[image]) - begin

    def window(self, image: int, number: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of a window; None for the whole image."""
        if not self.tile_size:
            return None
        height, width = self.sizes[image].tolist()
        if height * width == 1:  # its size could not be read
            return None
        row, column = divmod(number, math.ceil(width / self.tile_size))
        h, w = min(self.tile_size, height), min(self.tile_size, width)
        return min(row * h, height - h), min(column * w, width - w), h, w

    def read_masked(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels H x W x C and where they are valid, as the function of that name.

        In the place of a window without a valid pixel another of the same image is taken.
        """
        image, number, count = self.place(index)
        for other in _others(number, count):
            try:
                window = self.window(image, other)
                return read_masked(self.paths[image], self.in_chans, self.bands, window)
            except EmptyImageError as error:
                empty = error
        raise empty

    def __getitem__(self, index: int) -> Tensor:
        pixels, valid = self.read_masked(index)
        image = as_image(pixels, valid)
        if self.dtype not in (None, image.dtype):
            path = self.paths[self.place(index)[0]]
            raise UnreadableImageError(f"{path}: {image.dtype} among {self.dtype}")
        return image


def _others(index: int, count: int) -> Iterator[int]:
    # `index` and up to 99 more of `count`, each once, far from the one before: neighbours fail together.
    step = next(n for n in range(round(0.382 * count) or 1, count + 1) if math.gcd(n, count) == 1)
    return ((index + attempt * step) % count for attempt in range(min(100, count)))


@dataclass
class PixelStats:
    """What measure_pixels found: the type; mean and std per band (uint8 in [0, 1]); the shorter sides."""

    dtype: torch.dtype
    mean: list[float]
    std: list[float]
    sides: list[int]

    def fit(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """False where a mean is ten deviations off, or a deviation ten times too large or too small."""
        return all(abs(m - own_m) < 10 * s and own_s < 10 * s < 100 * own_s for m, s, own_m, own_s
                   in zip(mean, std, self.mean, self.std, strict=True))

    def flags(self) -> str:
        """Mean and standard deviation as they can be given to a script."""
        return f"--mean {plain_decimals(self.mean)} --std {plain_decimals(self.std)}"

    def words(self) -> str:
        """Mean and standard deviation for scripts without these flags."""
        return f"mean {plain_decimals(self.mean)}, std {plain_decimals(self.std)}"


def measure_pixels(samples: Samples, count: int = 256) -> PixelStats:
    """Measures the valid pixels of up to `count` evenly spaced samples; fails where none is readable.

    Of a large sample about 65,536 pixels count. Samples of another type than most do not. The figures are
    rounded to six digits of the deviation.
    """
    looked, reason = [], ""
    for index in range(0, len(samples), math.ceil(len(samples) / count)):
        try:
            pixels, valid = samples.read_masked(index)
        except UnreadableImageError as error:  # a few are counted and reported when training meets them
            reason = reason or str(error)
            continue
        values = pixels.reshape(-1, pixels.shape[2]) if valid is None else pixels[valid]
        values = values[:: math.ceil(len(values) / 2**16)] / (255.0 if pixels.dtype == np.uint8 else 1.0)
        mean = values.mean(0, dtype=np.float64)
        looked.append((pixels.dtype, min(pixels.shape[:2]), len(values), mean, ((values - mean) ** 2).sum(0)))
    if not looked:
        fail(f"--data_path: none of the images looked at is readable: {reason}")
    dtypes, sides, *_ = zip(*looked, strict=True)
    dtype = max(dtypes, key=dtypes.count)
    own = [figures for kind, _, *figures in looked if kind == dtype]
    n, m, s = (np.array(part, np.float64) for part in zip(*own, strict=True))
    mean = n @ m / n.sum()
    std = np.sqrt((s.sum(0) + n @ (m - mean) ** 2) / n.sum())
    # 1 for a constant band, whose deviation rounding makes 1e-17.
    std = [float(f"{s:.6g}") if s > 1e-9 * abs(m) else 1.0 for m, s in zip(mean, std, strict=True)]
    mean = [round(m, 5 - math.floor(math.log10(s))) for m, s in zip(mean.tolist(), std, strict=True)]
    return PixelStats(torch.uint8 if dtype == np.uint8 else torch.float32, mean, std, list(sides))


def plain_decimals(values: Sequence[float]) -> str:
    """Numbers without an exponent, with which argparse would take a negative one for a flag: -2600000."""
    return " ".join(np.format_float_positional(value, trim="-") for value in values)


def small_images(sides: Sequence[int], img_size: int, done: str) -> list[str]:
    """A line where most images' smaller `sides` are below --img_size, else none; `done`: to their crops."""
    median = sorted(sides)[len(sides) // 2]
    if median >= img_size:
        return []
    return [f"warning: --img_size {img_size}: most images are smaller, so crops are {done}, which costs time "
            f"and adds nothing; {median} is their median side"]


def set_pixels(samples: Samples, args: argparse.Namespace, mean: Sequence[float],
               std: Sequence[float]) -> list[str]:
    """Looks at some samples; sets `samples.dtype`, `args.mean` and `args.std`; returns lines to print.

    Fails where none is readable; warns where most are smaller than --img_size. --mean and --std are taken as
    given; without them `mean` and `std` serve 8-bit RGB, and what is measured all else.
    """
    found = measure_pixels(samples, 32)
    lines = small_images(found.sides, min(timm.layers.to_2tuple(args.img_size)), "enlarged")
    samples.dtype = found.dtype
    if args.mean or args.std:
        if not len(args.mean or []) == len(args.std or []) == samples.in_chans:
            fail(f"--mean, --std: give {samples.in_chans} values for each, or neither")
        if not found.fit(args.mean, args.std):
            lines.append(f"warning: --mean and --std are far from the images' own, {found.flags()}")
    elif samples.in_chans == 3 and found.dtype == torch.uint8:
        args.mean, args.std = list(mean), list(std)
    else:
        found = measure_pixels(samples)
        args.mean, args.std = found.mean, found.std
        lines.append(f"measured on some images: {found.flags()}")
    return lines


def add_pixel_flags(add: Callable, tiles: bool = True) -> None:
    """Adds the flags that load_samples takes beside --data_path, and --num_workers, to a group's `add`."""
    add("--in_chans", type=positive(int), help="bands of an image; default: 3, or as many as --bands")
    add("--bands", type=band, nargs="+", help="numbers from 1 choose and order the bands of a file; names, "
        "such as B04 B03 B02, make a folder with a file for each of them the image")
    if tiles:
        add("--tile_size", type=positive(int), help="take images as a grid of windows of so many pixels, of "
            "which only the parts needed are read; for large scenes")
        finite = number(float, math.isfinite, "a finite number")
        add("--mean", type=finite, nargs="+", help="of each band, 8-bit pixels in [0, 1], others in "
            "their units; default: the method's for 8-bit RGB, else measured and printed")
        add("--std", type=positive(float), nargs="+", help="of each band; default: as --mean")
    add("--num_workers", type=not_negative(int), help="per process; default: its share of the cores, at "
        "most 16")


def load_samples(args: argparse.Namespace, process: Process, mean: Sequence[float],
                 std: Sequence[float]) -> Samples:
    """The samples below --data_path by --in_chans, --bands and --tile_size; see set_pixels for the rest.

    The main process alone lists the files, in .tar archives too, and looks at sizes and pixels.
    """
    check_bands(args)

    def look() -> tuple[Samples, list[str], Sequence[float], Sequence[float]]:
        paths = list_images(args.data_path, args.output_dir, bands=args.bands,
                            archives=Path(args.output_dir) / "archives.npz")
        samples = Samples(paths, args.in_chans, args.bands, args.tile_size)
        return samples, set_pixels(samples, args, mean, std), args.mean, args.std

    samples, lines, args.mean, args.std = from_main(process, look)
    check_there(process, samples.paths, args.data_path)
    for line in lines if process.is_main else []:
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)
    return samples


def check_there(process: Process, paths: Paths, root: str | Path, flag: str = "--data_path") -> None:
    """Fails where a process does not see what the main process listed, and ends the others.

    It looks for the folder, some of the files, and all archives, which may be copies made at another time.
    """
    lost = "" if os.path.isdir(root) else str(root)
    for i, (path, size, changed) in enumerate(paths.archives):
        stat = os.stat(path) if os.path.exists(path) else None
        if stat and stat.st_size == size and (not process.is_main or stat.st_mtime_ns == changed):
            paths.archives[i] = path, size, stat.st_mtime_ns
        else:
            lost = lost or path
    some = [path for path in paths[:: math.ceil(len(paths) / 16)] if not isinstance(path, Member)]
    lost = lost or next((path for path in some if not os.path.lexists(path)), "")
    losses = gather_objects(lost, process)
    if any(losses):
        if process.rank != next(rank for rank, other in enumerate(losses) if other):
            raise SystemExit(2)  # the first that lacks something says what
        if process.is_main:
            fail(f"{flag} {lost}: changed since it was listed: start again")
        fail(f"{flag} {lost}: not there on {platform.node()}, or not as the main process sees it: it has to "
             "be the same on all machines", everywhere=True)


def to_float(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels ... x C x H x W to [0, 1]: 8-bit by 255, others three deviations about each band's mean."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return ((images - _per_band(mean, images)) / _per_band(std, images)).div_(6).add_(0.5).clamp_(0, 1)


class SkipUnreadable(torch.utils.data.Dataset):
    """A data set that takes another sample in place of an unreadable one, and says so; up to 100 times.

    `dataset[epoch, index]` may raise UnreadableImageError. Returns (sample, list of messages).
    """

    def __init__(self, dataset: torch.utils.data.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[object, list[str]]:
        epoch, index = key
        messages = []
        for other in _others(index, len(self.dataset)):
            try:
                return self.dataset[epoch, other], messages
            except ChangedArchiveError as error:
                raise UnreadableImageError(str(error)) from None  # ends the run
            except UnreadableImageError as error:
                messages.append(str(error))
        raise UnreadableImageError(f"{len(messages)} unreadable images in a row, the last: {messages[-1]}")


class StepSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one process, from any optimizer step to any later one, across epochs.

    Each epoch is one permutation drawn from (seed, epoch), cut into steps of the effective batch; the rest is
    dropped. Each micro-batch of each process is a slice of the step. So a run resumes where it
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
                order = torch.randperm(self.length, generator=generator(self.seed, "order", epoch))
                shuffled = epoch
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
    # Workers ignore SIGTERM, so after an error Python's own clean-up would wait for them forever.
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
    """Loader of (batch, messages about unreadable images); memory is pinned for cuda."""
    atexit.register(_end_workers)
    return torch.utils.data.DataLoader(
        SkipUnreadable(dataset), batch_sampler=sampler, num_workers=worker_count(num_workers),
        collate_fn=_collate, worker_init_fn=_quiet_worker, pin_memory=device.type == "cuda")


# --------------------------------------------------------------------------------------------------
# Colour: whole batches on the training device. Images are float N x C x H x W in [0, 1] and changed in place.
# Draws come from a CPU generator, so they are the same on every device; every sample has its own. Of other
# than 3 bands the grey is their mean, contrast is about each band's own mean, and the hue stays.
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
    """Grey value n x 1 x H x W: with torchvision's weights (ITU-R 601), or the mean of other than 3 bands."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Returns other + factor * (images - other), clamped to [0, 1]; `factor` (n,)."""
    return other.lerp(images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black; `factor` (n,) at least 0."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean luma, or each band's own mean; `factor` (n,) at least 0."""
    grey = luma(images) if images.shape[1] == 3 else images
    return blend(images, grey.mean((2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the luma; `factor` (n,) at least 0. One or two bands stay."""
    return blend(images, luma(images), factor) if images.shape[1] > 2 else images


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (n,) in [-.5, .5] turns, keeping HSV's saturation and value; of RGB only."""
    if images.shape[1] != 3:
        return images
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
    """Replaces the chosen samples by their luma in all channels."""
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


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What to_float made of pixels of `dtype`, to zero mean and unit deviation per band.

    8-bit pixels: (images - mean) / std. Others are there already but for their range: 6 (images - .5).
    """
    if dtype != torch.uint8:
        return (images - 0.5).mul_(6)
    return (images - _per_band(mean, images)).div_(_per_band(std, images))


def _per_band(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device, dtype=torch.float32).view(-1, 1, 1)


# --------------------------------------------------------------------------------------------------
# Anybody's PyTorch files, read without running anything of them
# --------------------------------------------------------------------------------------------------


class RefusedFileError(ValueError):
    """A file that is not damaged, and still not read; the message says why, and what to do."""


class Placeholder:
    """Stands for all of a file but tensors, containers, numbers, text; does nothing with what it is given."""

    def ignore(self, *args: object) -> None:
        """Takes a file's arguments, state or items."""

    __init__ = __setstate__ = __setitem__ = append = extend = add = ignore

    def __call__(self, *args: object) -> "Placeholder":
        """Itself."""
        return self


class Frozen(type):
    """The kind of class that a file can call, and cannot change."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"sets {name} of a class")


def stand_in(make: Callable) -> Frozen:
    """A new class that `make` makes the instances of."""
    return Frozen("Made", (), {"__new__": lambda cls, *args, **kwargs: make(*args)})


MADE = {  # what is called for a name of a file; for any other, Placeholder
    "collections.OrderedDict": OrderedDict, "collections.defaultdict": lambda *args: {},
    "builtins.getattr": lambda *args: stand_in(Placeholder),  # a class within a class
    "builtins.set": set, "argparse.Namespace": argparse.Namespace,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, cls, args, state: function(*args)}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class DataUnpickler(pickle.Unpickler):
    """Python's unpickler without its power: it looks up no name of a file, so that nothing of it runs."""

    def find_class(self, module: str, name: str) -> object:
        """A new class, which makes what MADE has for the name. torch.load finds the storages itself."""
        if f"{module}.{name}" in DTYPES:
            return DTYPES[f"{module}.{name}"]
        if name == "UntypedStorage":
            return torch.serialization.StorageType("ByteStorage")
        return stand_in(MADE.get(f"{module.replace('__builtin__', 'builtins')}.{name}", Placeholder))

    def __setattr__(self, name: str, value: object) -> None:
        """Takes torch.load's persistent_load, less what that does for old files alone."""
        own = functools.partial(self._storage, value) if name == "persistent_load" else value
        super().__setattr__(name, own)

    @staticmethod
    def _storage(load: Callable, saved_id: object) -> object:
        match saved_id:
            case ("module" | b"module", cls, *_):  # whose source torch would compare
                return cls
            case (_, _, _, _, _, view) if view is not None:  # torch loses it where its storage grows
                raise RefusedFileError("holds a part of a storage: load it in PyTorch, and save it again")
        return load(saved_id)


class DataPickle:
    """The `pickle_module` of torch.load."""

    Unpickler = DataUnpickler

    @staticmethod
    def load(file: BinaryIO, **kwargs: object) -> object:
        """As pickle.load."""
        return DataUnpickler(file, **kwargs).load()


def load_checkpoint(path: str | Path) -> dict:
    """Reads a dict that torch.save wrote: tensors on the CPU, containers, numbers, text; else Placeholders.

    No function that the file chooses runs; a hostile one can take memory, or end the process. Files of torch
    1.6 and later are zip archives, whose checksums are compared (not so by torch.load); older ones have none.

    Raises:
        ValueError: the file is damaged, or holds something else; the reason, in one line.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip:
            _check_zip(path)
        elif tarfile.is_tarfile(path):
            raise RefusedFileError("a tar archive: unpack it, or load it in PyTorch 0.1 and save it again")
        if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true"):
            raise RefusedFileError("TORCH_FORCE_WEIGHTS_ONLY_LOAD: unset it; nothing of a file runs here")
        content = torch.load(path, "cpu", DataPickle, weights_only=False, errors="surrogateescape")
    except OSError as error:
        raise ValueError(str(error)) from error
    except RefusedFileError:
        raise
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__)[:100]
        raise ValueError(f"damaged, or no PyTorch file ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError("holds no dict, so no state dict of tensors")
    return content


def _check_zip(path: str | Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > 8 * os.path.getsize(path) + 2**20:
            raise ValueError("its entries would be much longer than the file")
        for entry in archive.infolist():
            if entry.CRC:  # 0 where torch.serialization.set_crc32_options(False) has left it out
                with archive.open(entry) as file:
                    while file.read(2**20):  # compares the checksum at its end
                        pass
    # With torch's own view of the archive: torch.load would go on with torch.jit.load, which runs programs.
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise RefusedFileError("a TorchScript program: save the state_dict() of its network instead")


# --------------------------------------------------------------------------------------------------
# Backbones: timm models without classifier, and their weights
# --------------------------------------------------------------------------------------------------


def _close_names(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"; close: {', '.join(close)}" if close else ""


def build_backbone(arch: str, img_size: int | tuple[int, int], patch_size: int | None = None,
                   drop_path: float = 0, in_chans: int = 3, global_pool: str | None = None) -> nn.Module:
    """A timm model from N x in_chans x H x W to pooled features N x D, for any H and W where it can.

    A Swin keeps the windows of its own size, 224 px or what its name says, at smaller sizes too.

    `img_size` is a side, or height and width. `patch_size` and `global_pool` ("avg": fc_norm(mean of the
    patch tokens)) are of ViTs; default: the arch's own.

    Returns:
        the model; its attribute `model_args` holds what timm.create_model needs beside the name to build it
        again, `built_for` is `img_size`.
    """
    if not timm.is_model(arch) or "." in arch and not timm.list_pretrained(arch):
        fail(f"--arch {arch}: timm has no such model{_close_names(arch)}")
    own = {"patch_size": patch_size} if patch_size else {}
    own |= {"in_chans": in_chans} if in_chans != 3 else {}
    own |= {"global_pool": global_pool} if global_pool else {}
    swin = arch.startswith("swin_")
    # Swin takes strict_img_size, ViT dynamic_img_size, convolutional nets neither.
    strict = {"strict_img_size": False, "img_size": swin_size(arch, img_size) if swin else img_size, **own}
    # 0 is given too, because Swin's own default is .1; a net that takes no rate has none.
    rates = [{"drop_path_rate": drop_path}] + [{}] * (drop_path == 0)
    variants = (strict, {"dynamic_img_size": True, "img_size": img_size, **own}, own)
    for model_args, rate in itertools.product(variants, rates):
        try:
            backbone = timm.create_model(arch, num_classes=0, **rate, **model_args)
            backbone.model_args, backbone.built_for = model_args, img_size
            return backbone
        except TypeError as error:  # an argument this model does not have
            reason = error
    fail(f"--arch {arch}: cannot be built with --patch_size {patch_size} --drop_path {drop_path}: {reason}")


def swin_size(arch: str, img_size: int | tuple[int, int]) -> int | tuple[int, int]:
    """The size to build a Swin for: its own, at least, since timm shrinks windows larger than a stage's map.

    So its features are torchvision's at multiples of 224 px (windows of 7), and near them elsewhere:
    torchvision pads maps before it shifts windows, timm after that, and where timm shifts a map of one window
    torchvision does not.
    """
    cfg = timm.get_pretrained_cfg(arch)
    sides = zip(timm.layers.to_2tuple(img_size), cfg.input_size[1:], strict=True)
    height, width = (max(pair) for pair in sides)
    return height if height == width else (height, width)


def patch_multiple(backbone: nn.Module) -> int:
    """The side in pixels that crops must be a multiple of: the patch of a transformer, 1 for other nets."""
    embed = getattr(backbone, "patch_embed", None)
    proj = getattr(embed, "proj", None)
    if isinstance(proj, nn.Conv2d) and proj.kernel_size != proj.stride:  # overlapping patches, as PVT's
        return 1
    return timm.layers.to_2tuple(getattr(embed, "patch_size", 1))[0]


def read_weights(source: str, checkpoint_key: str | None = None, flag: str = "--weights",
                 whole: bool = False) -> tuple[dict, dict]:
    """Reads backbone weights from an output folder, a checkpoint, a state dict, a timm or hf-hub: name.

    Checkpoints and state dicts are ours, or those of DINO, DINO-MC, MoCo, MHCL, MAE, DSPT, CMID, timm and
    torchvision (ResNet, ViT, Swin).

    Args:
        source: what the user gave.
        checkpoint_key: the network of a checkpoint to take, an entry or a prefix in its state dict, such as
            MoCo's encoder_k; default: the network that its run exports.
        flag: the flag to name in errors.
        whole: keep MAE's decoder beside the backbone.

    Returns:
        state dict of the backbone in timm's names, without prefixes; what is known of its arch, patch_size,
        img_size (a side, or height and width), mean and std of its channels, global_pool, decoder_heads.
    """
    path = Path(source)
    if path.is_dir():
        folder = path / "backbone" if (path / "backbone").is_dir() else path
        exported = checkpoint_key is None and not (whole and (path / "checkpoint.pth").is_file())
        if exported and (folder / "config.json").is_file():
            try:
                return _read_exported(folder)
            except Exception as error:  # damaged, or entries that are missing or of another type
                fail(f"{flag} {folder}: not as timm exports ({type(error).__name__}: {str(error)[:100]})")
        path = path / "checkpoint.pth"
    if path.is_file():
        try:
            return _read_checkpoint(path, checkpoint_key, flag, whole)
        except Exception as error:  # tensors or flags of other shapes and types than their names tell
            fail(f"{flag} {path}: not as its names tell ({type(error).__name__}: {str(error)[:100]})")
    if source.startswith("hf-hub:") or timm.is_model(source):
        try:
            model = timm.create_model(source, pretrained=True, num_classes=0)
        except Exception as error:  # no pretrained weights under this name, no network, no such repository
            fail(f"{flag} {source}: timm could not load pretrained weights: {str(error).splitlines()[0]}")
        config = model.pretrained_cfg
        return model.state_dict(), {"arch": config["architecture"], "img_size": config["input_size"][-1],
                                    "mean": config["mean"], "std": config["std"]}
    fail(f"{flag} {source}: no such file, output folder or timm model{_close_names(source)}")


def _read_exported(folder: Path) -> tuple[dict, dict]:
    config = json.loads((folder / "config.json").read_text())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    args, cfg = config.get("model_args", {}), config["pretrained_cfg"]
    height, width = cfg["input_size"][1:]
    return state, {"arch": config["architecture"], "patch_size": args.get("patch_size"), "mean": cfg["mean"],
                   "std": cfg["std"], "img_size": height if height == width else (height, width),
                   **_pooling(state)}


def _pooling(state: dict) -> dict:
    # ViTs fine-tuned by MAE's code: a norm after the mean of the patch tokens in place of the last norm.
    return {"global_pool": "avg"} if "fc_norm.weight" in state and "norm.weight" not in state else {}


def _read_checkpoint(path: Path, key: str | None, flag: str, whole: bool) -> tuple[dict, dict]:
    try:
        loader = safetensors.torch.load_file if path.suffix == ".safetensors" else load_checkpoint
        checkpoint = loader(path)
    except Exception as error:
        fail(f"{flag} {path}: {error}")
    args = checkpoint.get("args") if "effective_batch" in checkpoint else None  # ours, not the authors'
    args = args if isinstance(args, dict) else {}
    known = ("arch", "patch_size", "img_size", "mean", "std", "decoder_heads")
    info = {name: args[name] for name in known if args.get(name) is not None}
    if isinstance(info.get("img_size"), list):  # one side, or height and width
        info["img_size"] = tuple(info["img_size"]) if len(set(info["img_size"])) > 1 else info["img_size"][0]
    inner = key if key not in checkpoint else None  # a network within a state dict
    usual = ("teacher", "encoder_q", "online", "state_dict", "model")
    entry = key if key in checkpoint else next((name for name in usual if name in checkpoint), None)
    state = checkpoint[entry] if entry else checkpoint
    state = state if isinstance(state, dict) else {}
    state = {name: x for name, x in state.items() if isinstance(name, str) and isinstance(x, Tensor)}
    names = [name.removeprefix("module.") for name in state]
    if inner and not any(name.startswith(f"{inner}.") for name in names):
        keys = [name for name in checkpoint if isinstance(name, str)]
        found = dict.fromkeys(name.split(".")[0] for name in [*keys, *names])
        fail(f"--checkpoint_key {key}: {path} has {', '.join(name[:40] for name in list(found)[:12])}")
    if not state:
        fail(f"{flag} {path}: {f'its {entry} is' if entry else 'is'} no state dict of tensors")
    state = _backbone_names(state, inner or "encoder_q", whole)
    return state, info | _pooling(state)


# torchvision's names of ViT and Swin -> timm's. Swin: features 1, 3, 5, 7 are stages, 2, 4, 6 lie between.
# swin_size says where the features of the two Swins are equal.
TORCHVISION_NAMES = (
    (r"^conv_proj\.", "patch_embed.proj."), (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"), (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^features\.0\.0\.", "patch_embed.proj."), (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * i + 1}\.", f"layers.{i}.blocks.") for i in range(4)),
    *((rf"^features\.{2 * i}\.", f"layers.{i}.downsample.") for i in range(1, 4)))


# mmcls's names of Swin, which CMID's authors train -> timm's.
MMCLS_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^norm3\.", "norm."),
    *((rf"^stages\.{i}\.downsample\.", f"layers.{i + 1}.downsample.") for i in range(3)),
    (r"^stages\.", "layers."), (r"\.attn\.w_msa\.", ".attn."), (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."))


def _backbone_names(state: dict, network: str, whole: bool) -> dict:
    kept = ("decoder_", "mask_token") if whole else ()
    # Of DDP, MoCo, CMID (two), DINO and ours; what lies beside them in the file is not the backbone.
    for prefix in ("module.", f"{network}.", "online_encoder.", "model.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items()
                     if name.startswith((prefix, *kept))}
    if {"conv_proj.weight", "features.1.0.attn.qkv.weight"} & state.keys():
        return _renamed(state, TORCHVISION_NAMES)
    if any(".attn.w_msa." in name for name in state):
        state = {name: _merging_of_mmcls(x) if re.match(r"stages\.\d\.downsample\.", name) else x
                 for name, x in state.items()}
        return _renamed(state, MMCLS_NAMES)
    return state


def _renamed(state: dict, names: tuple) -> dict:
    for old, new in names:
        state = {re.sub(old, new, name): x for name, x in state.items()}
    return state


def _merging_of_mmcls(x: Tensor) -> Tensor:
    # Four neighbours become one token: theirs unfolds by channel, row, column; timm's goes by column, row,
    # channel. The last dimension of the norm's and the reduction's tensors follows.
    by_neighbour = x.unflatten(-1, (-1, 2, 2))  # ... C row column
    return by_neighbour.movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3).contiguous()


def convert_first_conv(weight: Tensor, conv: nn.Conv2d) -> tuple[Tensor, list[str]]:
    """Weights D x C x h x w for the channels of `conv`, and patches of its size; in words what was done.

    Equal channels in, equal tokens out: each new channel gets an equal share of the old ones' sum. But three
    become more as in timm, repeated and scaled: the first stay red, green and blue.
    """
    C, in_chans, words = weight.shape[1], conv.in_channels, []
    if C != in_chans:
        words.append(f"{C} channels converted to {in_chans}")
        if C == 3 < in_chans:
            weight = timm.models.adapt_input_conv(in_chans, weight.float())
        else:
            weight = (weight.float().sum(1, keepdim=True) / in_chans).expand(-1, in_chans, -1, -1)
    old, new = tuple(weight.shape[2:]), conv.kernel_size
    if old != new == conv.stride:
        weight = timm.layers.resample_patch_embed(weight.float(), list(new))
        words.append(f"patches of {shape_words(old)} px resampled to {shape_words(new)}")
    return weight, words


def _convert_first_convs(backbone: nn.Module, state: dict) -> tuple[dict, list[str]]:
    first = getattr(backbone, "pretrained_cfg", {}).get("first_conv") or ()
    modules, report = dict(backbone.named_modules()), []
    for name in (first,) if isinstance(first, str) else first:
        conv, weight = modules.get(name), state.get(f"{name}.weight")
        if isinstance(conv, nn.Conv2d) and weight is not None and weight.ndim == 4 and conv.groups == 1 \
                and len(weight) == conv.out_channels and max(weight.shape[2:]) <= 64:
            weight, words = convert_first_conv(weight, conv)
            if words and weight.shape == conv.weight.shape:
                state = state | {f"{name}.weight": weight}
                report.append(f"{name}.weight: {', '.join(words)}")
    return state, report


def shape_words(shape: Sequence[int]) -> str:
    """A shape as the messages have it: 64 x 3 x 7 x 7."""
    return " x ".join(map(str, shape)) or "1 number"


def loading_report(source: str, own: dict, state: dict, fitting: dict) -> str:
    """A line on a network's tensors `own`, those of a file, `state`, and those taken from it, `fitting`."""
    report = f"{source}: {len(fitting)} of {len(own)} tensors loaded"
    wrong = [f"{name}: {shape_words(state[name].shape)} in the file, {shape_words(x.shape)} in the network"
             for name, x in own.items() if name in state.keys() - fitting.keys()]
    for what, names in (("missing", own.keys() - state.keys() - fitting.keys()), ("of another shape", wrong),
                        ("not used", state.keys() - own.keys() - fitting.keys())):
        shown = ", ".join(ascii(name)[1:-1] for name in sorted(names)[:3]) + ", ..." * (len(names) > 3)
        if names or what != "of another shape":
            report += f", {len(names)} {what}" + (f" ({shown})" if names else "")
    return report


def load_backbone(backbone: nn.Module, state: dict, source: str, allow_partial: bool = False) -> str:
    """Fills `backbone` from `state`; returns a line: loaded, missing, not used, converted and resampled.

    A first convolution of other channels is converted. timm resamples position embeddings and patches of
    another size. Fails where a tensor of the backbone is missing or has another shape, or the file has more
    blocks, unless `allow_partial`.
    """
    own, given = backbone.state_dict(), state
    state, words = _convert_first_convs(backbone, state)

    def fit(state: dict) -> dict:
        return {name: x for name, x in state.items() if name in own and x.shape == own[name].shape
                and x.is_floating_point() == own[name].is_floating_point()}

    fitting = fit(state)
    resample = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    # timm resamples patches by a matrix of side**4 numbers.
    huge = any(x.ndim == 4 and max(x.shape[2:]) > 64 for x in state.values())
    if len(fitting) < len(own) and resample and not huge:
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
    if (extra or needed - fitting.keys()) and not (allow_partial and fitting):
        fail(f"{report}: another arch? (--allow_partial takes what fits)")
    backbone.load_state_dict(fitting, strict=False)
    changed = [f"{name} ({shape_words(given[name].shape)} to {shape_words(x.shape)})"
               for name, x in fitting.items() if name in given and given[name].shape != x.shape
               and not any(word.startswith(f"{name}:") for word in words)]
    if changed:
        words.append(f"{len(changed)} resampled ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)})")
    return "; ".join([report, *words])


def init_backbone(backbone: nn.Module, args: argparse.Namespace, saved: dict | None) -> str:
    """Fills `backbone` from `--init`, unless the run is resumed from `saved`; returns where it starts."""
    if saved:
        return ""  # Run.steps says so
    if not args.init:
        return "from scratch"
    state, info = read_weights(args.init, args.checkpoint_key, "--init")
    if "pos_embed" in state and isinstance(info.get("img_size"), tuple):  # as many could make a square
        fail(f"--init {args.init}: its positions are of {shape_words(info['img_size'])} px, not of a square")
    report = load_backbone(backbone, state, f"--init {args.init}", args.allow_partial)
    return "; ".join([report, *other_pixels(info, args)])


def other_pixels(info: dict, args: argparse.Namespace) -> list[str]:
    """A line where the weights of `info` were trained with another mean and std, else none."""
    if "mean" not in info or (list(info["mean"]), list(info["std"])) == (list(args.mean), list(args.std)):
        return []
    return [f"trained with --mean {plain_decimals(info['mean'])} --std {plain_decimals(info['std'])}"]


def export_backbone(backbone: nn.Module, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes config.json and model.safetensors of a model of build_backbone.

    They load by timm.create_model("local-dir:FOLDER", pretrained=True), and by transformers'
    AutoModel.from_pretrained("FOLDER").
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # of a killed run
    kept = ("architecture", "first_conv", "classifier", "pool_size")
    # safetensors takes no channels_last.
    backbone = copy.deepcopy(backbone).to("cpu", memory_format=torch.contiguous_format)
    backbone.pretrained_cfg = {
        **{key: backbone.pretrained_cfg.get(key) for key in kept}, "num_classes": 0,
        "input_size": (len(mean), *timm.layers.to_2tuple(backbone.built_for)), "mean": tuple(mean),
        "std": tuple(std), "crop_pct": 224 / 256, "interpolation": "bicubic"}
    with writing(folder):
        timm.models.save_for_hf(backbone, str(new), model_args=dict(backbone.model_args),
                                safe_serialization=True)
        config = json.loads((new / "config.json").read_text())
        # timm's later versions add num_classes, which transformers gives itself.
        config["model_args"] = dict(backbone.model_args)
        (new / "config.json").write_text(json.dumps(config, indent=2))
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


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, --lr and --weight_decay, of timm, on the groups of `param_groups`."""
    fused = {"fused": True} if args.optimizer == "adamw" else {}  # one kernel for all tensors
    name = "momentum" if args.optimizer == "sgd" else args.optimizer  # timm's "sgd" would be Nesterov's
    return timm.optim.create_optimizer_v2(param_groups(model), opt=name, lr=args.lr, momentum=0.9,
                                          weight_decay=args.weight_decay, **fused)


def _in_layout_of_parameters(optimizer: torch.optim.Optimizer) -> None:
    # A checkpoint of networks not in channels_last has another order in memory, and on a CPU AdamW's fused
    # kernel goes through parameter and state in that order.
    for p, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == p.shape:
                state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network; convolutional ones to channels_last memory, in which they are faster."""
    model.to(device)
    if device.type != "mps" and not any(hasattr(module, "patch_embed") for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.padding != (0, 0):
                module.register_forward_pre_hook(_pad_single_pixels)
    return model


def _pad_single_pixels(conv: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor | None:
    # oneDNN's weight gradient in bf16 holds NaN where a padded, strided convolution meets a side of one pixel
    # (torch 2.14, oneDNN 3). One more row or column of zeros is part of its padding: the output is the same.
    height, width = inputs[0].shape[2:]
    if 1 in (height, width):
        return nn.functional.pad(inputs[0], (0, int(width == 1), 0, int(height == 1)))
    return None


def distributed(model: nn.Module, process: Process) -> nn.Module:
    """The network in DistributedDataParallel, or as it is where there is one process."""
    if process.world_size == 1:
        return model
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids)


def sync_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """BatchNorm over the batches of all processes, on GPUs; on CPUs each normalises its own."""
    together = process.world_size > 1 and process.device.type == "cuda"
    return timm.layers.convert_sync_batchnorm(model) if together else model


def share_buffers(model: nn.Module, process: Process) -> None:
    """After training: BatchNorm's statistics of the main process, as in its files, in all processes."""
    if process.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


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
    """Calls `write(file)` on a temporary file, flushes and renames it: `path` is old or new, always whole.

    Makes the folder, if need be.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half of a file only takes the space


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


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Standard deviation of the unit vectors of N x D features, times sqrt(D).

    1: directions spread evenly; .5 and more is usual after a ReLU; near 0: all images alike, collapsed.
    """
    return F.normalize(features.float(), dim=-1).std(0, correction=0).mean() * math.sqrt(features.shape[1])


def to_picture(view: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What normalize made of an image, C x h x w, as red, green and blue 3 x h x w in [0, 1].

    These are the first three bands; of fewer the first is grey.
    """
    if dtype != torch.uint8:  # as to_float: three deviations either way
        mean, std = [0.5] * len(mean), [1 / 6] * len(std)
    view = view.float().cpu()
    view = view * _per_band(std, view) + _per_band(mean, view)
    return view[: 3 if len(view) > 2 else 1].clamp(0, 1).expand(3, -1, -1)


def save_grid(path: Path, rows: Sequence[Sequence[Tensor]], mean: Sequence[float] = (0, 0, 0),
              std: Sequence[float] = (1, 1, 1), dtype: torch.dtype = torch.uint8) -> Tensor:
    """Writes a PNG with a row per image: its views, normalised C x h x w of any size, centred on white.

    `mean`, `std` and `dtype` are those that normalize was given, see to_picture; default: views are pictures
    in [0, 1]. Returns the picture, 3 x H x W in [0, 1].
    """
    H, W = (max(view.shape[dim] for row in rows for view in row) for dim in (1, 2))
    grid = torch.ones(len(rows) * len(rows[0]), 3, H, W)
    for cell, view in zip(grid, (view for row in rows for view in row), strict=True):
        h, w = view.shape[1:]
        top, left = (H - h) // 2, (W - w) // 2
        cell[:, top : top + h, left : left + w] = to_picture(view, mean, std, dtype)
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
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default=amp, help="auto: bf16 on GPUs and "
        "CPUs that compute it natively")
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
        process: its rank, and how many there are.
        samples: of an epoch.
        images: files that they are made from; more than 1 % of them unreadable ends the run.
        free_flags: flags that may change where a run is resumed.

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
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch has it
        if args.compile and process.device.type == "cpu" and not shutil.which(compiler):
            fail(f"--compile: on a CPU torch needs a C++ compiler, and there is no {compiler}: install one, "
                 "name it by CXX=, or leave the flag out")
        self.autocast = autocast(args.amp, process.device)
        choose_attention(args.amp, process.device)
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
        except SystemExit as error:  # often of one process alone; then the others end silently
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
            own = [os.path.realpath(folder) for folder in (self.out, self.out / "backbone")]
            for source in [getattr(self.args, "init", None), *getattr(self.args, "weights", ())]:
                there = source and any(map(os.path.exists, (f"{source}/config.json", f"{source}/backbone")))
                if there and os.path.realpath(source) in own:  # not a name of timm's, or `random`
                    fail(f"--output_dir {self.out}: holds {source}, which would be replaced; take another")
            if (self.out / "head.pth").exists():
                fail(f"--output_dir {self.out}: holds a linear probe, whose backbone would be replaced")
            return None
        try:
            saved = load_checkpoint(path)
            before = {**saved["args"], "samples": saved["images"],
                      **{name: saved[name] for name in self.identity if name in saved}}
        except (ValueError, KeyError, TypeError) as error:
            fail(f"--output_dir: {path} cannot be resumed: {error}")
        after = {**plain(self.args), **self.identity}
        younger = YOUNGER_FLAGS | {name: after.get(name) for name in ("weights_digest", "classes")}
        before = {name: value for name, value in younger.items() if name in after} | before
        changed = [f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
                   for name in sorted(before.keys() | after.keys())
                   if name not in free_flags and before.get(name) != after.get(name)]
        if changed:
            fail(f"--output_dir {self.out}: its run had other settings: {'; '.join(changed)}")
        return saved

    def restore(self, backbone: nn.Module | None, **stateful: object) -> None:
        """Fills `stateful` from the earlier checkpoint, if there is one; checkpoints will hold their states.

        Args:
            backbone: exported to OUT/backbone with each checkpoint, if there is one.
            stateful: networks, optimizer and losses by the names they have in the checkpoint.
        """
        self.backbone, self.stateful = backbone, {**stateful, "scaler": self.scaler}
        for name, part in self.stateful.items():
            if self.saved and self.saved[name]:  # the scaler has no state without fp16
                part.load_state_dict(self.saved[name])
            if isinstance(part, torch.optim.Optimizer):
                _in_layout_of_parameters(part)
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
            init: a line, or lines, on where the weights of a new run come from; printed first.
            floors: health figures, and the value that a collapsed network is below. One that stays below for
                a tenth of the run, and five lines, brings one warning with `advice`.
            advice: what to try then.
            header: derived values, printed and written to the log before training.
        """
        process, amp = self.process, autocast_dtype(self.args.amp, self.process.device)
        if self.start_step:
            again = ", --init is not read again" if getattr(self.args, "init", None) else ""
            init = f"resumed at step {self.start_step}{again}"
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
            if self._lock is not None:
                os.close(self._lock)
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

    def has_result(self) -> bool:
        """True after all steps; after --max_steps of them says that the run can be resumed."""
        if self.stopped:  # `steps` has said so
            return False
        complete = self.stop_step == self.total_steps
        if self.process.is_main and not complete:
            print(f"no result before the last step; the same command resumes: {self.out}")
        return complete

    def is_due(self, step: int) -> bool:
        """True where the log gets a line after `step`: time for figures and pictures that cost something."""
        return (step + 1) % self.args.log_every == 0 or self._ends_period(step + 1)

    def _ends_period(self, done: int) -> bool:
        epochs, rest = divmod(done, self.steps_per_epoch)
        return done == self.stop_step or (rest == 0 and epochs % self.args.save_every == 0)

    def draw(self, name: str, rows: Sequence[Sequence[Tensor]], dtype: torch.dtype = torch.uint8) -> None:
        """Writes OUT/`name`, a picture with a row per image; see save_grid. Its time does not count."""
        if self.process.is_main:
            began = time.perf_counter()
            grid = save_grid(self.out / name, rows, self.args.mean, self.args.std, dtype)
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
            unreadable = set().union(*gather_objects(unreadable, self.process))
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
                export_backbone(self.backbone, self.out / "backbone", self.args.mean, self.args.std)
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


def _lock(out: Path) -> int | None:
    # A file descriptor, to be closed after training; the kernel releases the lock when this process ends,
    # however it ends. A record lock, because workers inherit the other kind.
    if fcntl is None:
        return None
    with writing(out / ".lock"):
        number = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else this file system has no locks
            fail(f"--output_dir {out}: another run is writing there; wait for it or take another folder")
    return number


def _event_writer(out: Path, start_step: int) -> object:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail("--tensorboard: the package tensorboard is not installed: pip install tensorboard")
    # As in the log, later steps of a run that was killed go.
    return SummaryWriter(str(out / "events"), purge_step=start_step + 1)

"""Segmentation by a frozen or fine-tuned backbone: land cover of an image, or what changed between two dates.

UPerNet: T. Xiao et al., "Unified perceptual parsing for scene understanding", ECCV 2018.

    # a backbone of ours beside the two baselines that any result has to beat
    python eval_segmentation.py --data_path POTSDAM --classes classes.txt --weights OUT random pixels \
        --output_dir SEGMENT
    # the papers' way: UPerNet, everything trained, on several GPUs; --layer_decay .65 for a ViT after MAE
    python -m torch.distributed.run --nproc_per_node 4 eval_segmentation.py --data_path POTSDAM \
        --classes classes.txt --weights OUT --output_dir FINE --head upernet --finetune
    # then masks of new images, which lie on the map where the images are GeoTIFFs
    python eval_segmentation.py --predict NEW_IMAGES --weights FINE --output_dir FINE

The backbone gives maps at strides 4, 8, 16, 32 (a ViT: of four blocks), and a head makes logits of them at
stride 4. Of two dates the head sees |f1 - f2| at each level, so their order cannot matter. Whole test images
of any size are evaluated by overlapping windows.

    symbol    variable    flag (default)            what
    B         B           batch_size_per_gpu (8)    crops per process and micro-batch
    D         dates       -                         dates: 1, or 2 of change data
    C         in_chans    in_chans                  channels of a date
    S         img_size    img_size (512)            side of crops and windows
    K         K           -                         logits: one for each class; for change 1
    h, w      -           -                         height and width of a map

DATA_PATH holds train/ and val/ (or test/), each with images/ and masks/, or A/, B/ and label/ (or OUT/).
Files of one stem belong together. Masks hold class numbers, or colours that `--classes` names: a line each,
`name value` or `name R G B`, with the word `ignore` for what does not count. Change labels are above 127
where something changed, or 1 where that is their largest value.

Figures are pooled over the test set, after the last epoch. Classes without a test pixel count in no mean. For
change and two classes there is also the average precision of the last class (ap; logits rounded to 1/128),
beside its share of the pixels.

In OUT: results.jsonl gets a line for each of the weights; segmenter.pth, backbone/, examples.png (image,
truth, prediction), log.jsonl and checkpoint.pth; several weights have a folder each. `--predict`: masks/.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import timm.layers
import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import common
from common import Process, finite, not_negative, positive
from eval_knn import append_result

STRIDES, POOLS = (4, 8, 16, 32), (1, 2, 3, 6)  # of the maps; sides that UPerNet pools to
IGNORE, UNKNOWN = 255, 254  # in masks of class numbers: what does not count, what no class has
BINS = 4097  # of logits from -16 to 16, for the average precision
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # of a GeoTIFF: scale, tie points, matrix, keys
BASELINES = ("random", "pixels")
FREE_FLAGS = common.FREE_FLAGS - {"checkpoint_key", "allow_partial"}
PREDICT_FLAGS = {"predict", "weights", "num_workers", "batch_size_per_gpu", "output_dir", "device", "amp"}

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="train/ and val/ (or test/), each with images/ and masks/, or A/, B/ and label/")
    add("--predict", help="instead: write masks of this folder's images (or of its A/ and B/), with an "
        "--output_dir as --weights")
    add("--classes", help="file that names the masks' numbers or colours; default: the numbers found")
    add("--ignore", type=not_negative(int), nargs="*", default=[255], help="numbers that do not count, where "
        "--classes does not name them")
    add("--img_size", type=positive(int), default=512, help="side of crops and windows; larger ones see more "
        "around a pixel and need more memory")
    add("--in_chans", type=positive(int), help="channels; default: the weights' own, else 3")
    add("--mean", type=finite(float), nargs="+", help="per channel, 8-bit pixels in [0, 1]; default: the "
        "weights' own, else ImageNet's for 8-bit RGB, else measured")
    add("--std", type=positive(float), nargs="+", help="likewise")
    add("--num_workers", type=not_negative(int), help="per process; default: its share of the cores, at "
        "most 16")

    add = parser.add_argument_group("model").add_argument
    add("--weights", nargs="+", required=True, help="one or more: output folder, checkpoint, state dict, "
        "name of timm's pretrained weights, random, pixels (the head on the colours alone)")
    add("--arch", help="timm name; for a bare state dict, and for random alone")
    add("--patch_size", type=positive(int), help="of a ViT; default: the weights' or the arch's own")
    add("--drop_path", type=common.unit(float), default=0.0, help="of the backbone in --finetune; CMID's "
        "Swin-B took .3")
    add("--checkpoint_key", help="network of a checkpoint to take; default: the one that is exported")
    add("--allow_partial", action=yes_no, default=False, help="accept weights that fill under 90 %%")

    add = parser.add_argument_group("method").add_argument
    add("--head", choices=["linear", "upernet"], default="linear", help="a 1x1 convolution on each level, or "
        "UPerNet")
    add("--head_dim", type=positive(int), default=512, help="channels of upernet; we recommend 64 on a CPU")
    add("--finetune", action=yes_no, default=False, help="train the backbone too")
    add("--color_jitter", type=not_negative(float), default=0.0, help="strength, of 8-bit RGB; harms short "
        "and frozen runs, we recommend .4 for long fine-tuning")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=50, help="in each an image counts as often as crops fit "
        "into it")
    add("--batch_size_per_gpu", type=positive(int), default=8, help="crops per process and micro-batch, and "
        "windows at a time in the evaluation")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--lr", type=positive(float), help="of the head, AdamW; default: 2e-2 for linear, 1e-3 for upernet")
    add("--backbone_lr", type=positive(float), default=1e-4, help="in --finetune; we recommend 1e-3 for "
        "some hundred steps")
    add("--layer_decay", type=common.unit(float), default=1.0, help="in --finetune: factor of the rate from "
        "one layer to that below; .65 for a ViT after MAE")
    add("--weight_decay", type=not_negative(float), default=0.05, help="not on biases and norms")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses pairs of flags that contradict each other; puts in defaults that depend on other flags."""
    parser = get_parser()
    changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if (args.data_path is None) == (args.predict is None):
        common.fail("--data_path or --predict: give one of the two")
    if args.predict and len(args.weights) > 1:
        common.fail(f"--weights {' '.join(args.weights)}: one at a time with --predict")
    for name in changed:
        if args.predict and name not in PREDICT_FLAGS:
            common.fail(f"--{name}: not with --predict, it is what the weights were trained with")
        if name in ("backbone_lr", "layer_decay", "drop_path") and not args.finetune:
            common.fail(f"--{name} {getattr(args, name)}: only with --finetune")
        if name == "head_dim" and args.head == "linear":
            common.fail(f"--head_dim {args.head_dim}: only with --head upernet")
    if args.head == "upernet" and args.batch_size_per_gpu == 1:
        common.fail("--batch_size_per_gpu 1: must be at least 2 for the BatchNorm of --head upernet")
    wanted = args.in_chans if args.mean and args.in_chans else len(args.mean or ())
    if not len(args.mean or ()) == len(args.std or ()) == wanted:
        common.fail("--mean, --std: give both or none, with a value for each channel (--in_chans)")
    args.lr = args.lr or {"linear": 2e-2, "upernet": 1e-3}[args.head]


# --------------------------------------------------------------------------------------------------
# Data: classes, masks, pairs of files, crops
# --------------------------------------------------------------------------------------------------


@dataclass
class Classes:
    """What the numbers of a mask mean; one entry for each class."""

    names: list[str]
    values: list[int]  # that predictions are written with
    colours: list[tuple[int, int, int]]  # in pictures
    lut: np.ndarray | None = None  # class number, IGNORE or UNKNOWN of each value; None: change labels
    in_colour: bool = False  # the values are R * 65536 + G * 256 + B


CHANGE = Classes(["unchanged", "changed"], [0, 255], [(0, 0, 0), (255, 255, 255)])


def number_classes(names: list[str], values: list[int], ignore: Sequence[int], in_colour: bool) -> Classes:
    """Classes for the `values` that masks hold; equal `names` share one, and `ignore` is none.

    Values of `ignore` that have no name do not count either.
    """
    kept = list(dict.fromkeys(name for name in names if name != "ignore"))
    lut = np.full(2**24, UNKNOWN, np.uint8)
    lut[[value for value in ignore if value < 2**24]] = IGNORE
    lut[values] = [IGNORE if name == "ignore" else kept.index(name) for name in names]
    first = [values[names.index(name)] for name in kept]
    if in_colour:
        colours = [(v >> 16, v >> 8 & 255, v & 255) for v in first]
        return Classes(kept, list(range(len(kept))), colours, lut, True)
    hues = [2 * math.pi * (0.1 + 0.618034 * i) for i in range(len(kept))]  # far from each other, none black
    colours = [tuple(round(140 + 115 * math.cos(hue - 2.0944 * k)) for k in range(3)) for hue in hues]
    return Classes(kept, first, colours, lut)


def read_classes(path: str, ignore: Sequence[int]) -> Classes:
    """Reads --classes: lines of `name value` or `name R G B`."""
    try:
        lines = [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        common.fail(f"--classes {path}: cannot be read: {error}")
    matches = [re.fullmatch(r"\s*(\S.*?)((?:\s+\d+){3}|\s+\d+)\s*", line) for line in lines]
    numbers = [list(map(int, match[2].split())) if match else [] for match in matches]
    for line, own in zip(lines, numbers, strict=True):
        if len(own) != len(numbers[0]) or not own or max(own) > (255 if len(own) == 3 else 65535):
            common.fail(f"--classes {path}: must be lines of `name value`, or all of `name R G B`: {line}")
    in_colour = len(lines) > 0 and len(numbers[0]) == 3
    values = [own[0] << 16 | own[1] << 8 | own[2] if in_colour else own[0] for own in numbers]
    classes = number_classes([match[1] for match in matches], values, () if in_colour else ignore, in_colour)
    if not 2 <= len(classes.names) <= UNKNOWN:
        common.fail(f"--classes {path}: names {len(classes.names)} classes, must be from 2 to {UNKNOWN}")
    return classes


def read_values(path: str, in_colour: bool) -> np.ndarray:
    """The numbers of a mask, int64 H x W; of one in colour R * 65536 + G * 256 + B.

    Raises:
        UnreadableImageError: the file is damaged or gone, or no mask.
    """
    try:
        if path.lower().endswith((".tif", ".tiff")):  # Pillow does not open every TIFF
            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                values = page.asarray()
                if values.ndim == 3 and page.planarconfig == 2:
                    values = np.moveaxis(values, 0, 2)
                if in_colour and page.colormap is not None:
                    values = (page.colormap >> 8).T[values]
        elif path.lower().endswith(".npy"):
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.array(image.convert("RGB") if in_colour else image)
        values, read = values.astype(np.int64), values
        if values.ndim not in (2, 3) or (values != read).any():
            raise ValueError("a mask holds H x W whole numbers")
        if values.min() < 0 or values.max() >= (256 if in_colour else 2**24):
            raise ValueError(f"values from {values.min()} to {values.max()}")
        if in_colour:
            values = np.broadcast_to(np.atleast_3d(values)[..., :3], (*values.shape[:2], 3))
            return values @ (65536, 256, 1)
        values = values[..., None] if values.ndim == 2 else values[..., : 1 if values.shape[2] == 2 else 3]
        if (values != values[..., :1]).any():
            raise ValueError("a mask in colour: name its colours with --classes")
        return values[..., 0]
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise common.UnreadableImageError(f"{path}: {error}") from error


def read_mask(path: str, classes: Classes) -> Tensor:
    """The mask as class numbers and IGNORE, uint8 H x W; raises UnreadableImageError."""
    values = read_values(path, classes.in_colour)
    if classes.lut is None:
        return torch.from_numpy((values > (0 if values.max() == 1 else 127)).astype(np.uint8))
    mask = classes.lut[values]
    if (mask == UNKNOWN).any():
        raise common.UnreadableImageError(f"{path}: has a value that --classes does not name")
    return torch.from_numpy(mask)


def read_dates(paths: Sequence[str], in_chans: int, shape: Sequence[int] | None = None) -> Tensor:
    """The image, or two dates one after the other, D*C x H x W, of the `shape` of their mask, if given.

    Raises:
        UnreadableImageError: a file is damaged or gone, or of another size or type than its mask or date.
    """
    dates = [common.read_pixels(path, in_chans) for path in paths]
    first = list(shape or dates[0].shape[1:]), dates[0].dtype
    for path, date in zip(paths, dates, strict=True):
        if (own := (list(date.shape[1:]), date.dtype)) != first:
            words = ["{} x {} pixels of {}".format(*sides, kind) for sides, kind in (own, first)]
            raise common.UnreadableImageError(f"{path}: {words[0]}, its mask or other date has {words[1]}")
    return torch.cat(dates)


def match_files(root: Path, parts: Sequence[str], flag: str = "--data_path") -> list[tuple[str, ...]]:
    """Files of the same stem in the folders `parts` of `root`: a tuple of paths for each stem."""
    found = []
    for part in parts:
        paths = common.list_images(root / part, suffixes=common.PIXEL_SUFFIXES, flag=flag)
        found.append({os.path.splitext(os.path.relpath(path, root / part))[0]: path for path in paths})
        if len(found[-1]) < len(paths):
            common.fail(f"{flag} {root / part}: has two files of one stem")
    every = set().union(*found)
    for part, own in zip(parts, found, strict=True):
        if lacking := sorted(every - own.keys()):
            common.fail(f"{flag} {root / part}: lacks {len(lacking)} files that are in "
                        f"{' or '.join(other for other in parts if other != part)}: {', '.join(lacking[:3])}")
    return [tuple(own[stem] for own in found) for stem in sorted(every)]


@dataclass
class Data:
    """The data set: tuples of image and mask, or of date A, date B and label."""

    train: list[tuple[str, ...]]
    test: list[tuple[str, ...]]
    split: str
    classes: Classes
    sizes: list[tuple[int, int]]  # of the training masks
    changed: list[int]  # the training pairs with change


def load_data(args: argparse.Namespace) -> Data:
    """Finds all files and reads all masks once; says what does not fit."""
    root, files = Path(args.data_path), []
    name = next((name for name in ("val", "test") if (root / name).is_dir()), "")
    if not (root / "train").is_dir() or not name:
        common.fail(f"--data_path {root}: must hold train/ and val/ (or test/)")
    change = (root / "train" / "A").is_dir()
    if change and args.classes:
        common.fail(f"--classes {args.classes}: change labels have no classes")
    for folder in (root / "train", root / name):
        label = "OUT" if (folder / "OUT").is_dir() else "label"
        files.append(match_files(folder, ("A", "B", label) if change else ("images", "masks")))
    classes = read_classes(args.classes, args.ignore) if args.classes else CHANGE if change else None
    in_colour = classes is not None and classes.in_colour

    def look(path: str) -> tuple[tuple[int, int], list[int]]:
        values = read_mask(path, CHANGE).numpy() if change else read_values(path, in_colour)
        found = np.zeros(max(2**16, values.max() + 1), bool)
        found[values] = True
        return values.shape, np.flatnonzero(found).tolist()

    masks, quiet = [sample[-1] for part in files for sample in part], not sys.stderr.isatty()
    try:
        with ThreadPoolExecutor(max(1, common.worker_count(args.num_workers))) as pool:
            looks = list(tqdm(pool.map(look, masks), "masks", len(masks), leave=False, disable=quiet))
    except common.UnreadableImageError as error:
        common.fail(f"--data_path: {error}")
    sizes, found = zip(*looks, strict=True)
    values = sorted(set().union(*found))
    if classes is None:
        kept = [value for value in values if value not in args.ignore]
        if not 2 <= len(kept) <= UNKNOWN:
            common.fail(f"--data_path {root}: masks hold {', '.join(map(str, values[:9]))}; --ignore "
                        f"leaves {len(kept)}; must be from 2 to {UNKNOWN}: name them with --classes")
        classes = number_classes([str(value) for value in kept], kept, args.ignore, in_colour=False)
    elif not change and (unknown := [value for value in values if classes.lut[value] == UNKNOWN]):
        path = next(path for path, own in zip(masks, found, strict=True) if unknown[0] in own)
        words = [f"{v >> 16} {v >> 8 & 255} {v & 255}" if classes.in_colour else str(v) for v in unknown[:12]]
        common.fail(f"--classes {args.classes}: names nothing of value {', '.join(words)}, found in {path}")
    changed = [i for i, own in enumerate(found[: len(files[0])]) if change and 1 in own]
    if change and not changed:
        common.fail(f"--data_path {root}: no training label holds a change")
    return Data(*files, f"train/{name}", classes, list(sizes[: len(files[0])]), changed)


def pad(images: Tensor, height: int, width: int) -> Tensor:
    """Pads below and right: by reflection, or with the border where a side is no longer than its pad."""
    for dim, length in ((-2, height), (-1, width)):
        side, index = images.shape[dim], torch.arange(length, device=images.device)
        if length > side:
            reflected = torch.where(index < side, index, 2 * (side - 1) - index)
            repeated = index.clamp(max=side - 1)
            images = images.index_select(dim, repeated if side <= length - side else reflected)
    return images


def up_to(length: int, multiple: int) -> int:
    """The next multiple that is no less than `length`."""
    return -(-length // multiple) * multiple


def cut(image: Tensor, mask: Tensor, box: Sequence[int], size: int, turn: int) -> tuple[Tensor, Tensor]:
    """Cuts a square out of image and mask, resizes it to `size`, turns and flips it.

    Args:
        image: D*C x H x W.
        mask: H x W.
        box: top, left and side of the square; what reaches over the bottom and the right is padded, IGNORE.
        size: of the crop.
        turn: from 0 to 7: quarter turns, and from 4 on a flip after them.
    """
    top, left, side = box
    image, mask = (x[..., top : top + side, left : left + side] for x in (image, mask))
    h, w = (max(1, round(length * size / side)) for length in mask.shape)
    image = pad(resize(image, [h, w], InterpolationMode.BILINEAR, antialias=True), size, size)
    mask = resize(mask[None], [h, w], InterpolationMode.NEAREST_EXACT)[0]
    mask = F.pad(mask, (0, size - w, 0, size - h), value=IGNORE)
    image, mask = (x.rot90(turn % 4, (-2, -1)) for x in (image, mask))
    return (image.flip(-1), mask.flip(-1)) if turn >= 4 else (image, mask)


class CropDataset(torch.utils.data.Dataset):
    """Random crops, drawn from (seed, epoch, index) alone; half of those of change data contain change.

    Args:
        data: the data set; an image counts as often as crops fit into it.
        in_chans: C.
        img_size: S.
        seed: of the run.
    """

    def __init__(self, data: Data, in_chans: int, img_size: int, seed: int):
        self.data, self.in_chans, self.img_size, self.seed = data, in_chans, img_size, seed
        self.images = [i for i, (H, W) in enumerate(data.sizes)
                       for _ in range(max(1, round(H * W / img_size**2)))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns the crop D*C x S x S and its mask S x S."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "crop", epoch, index))
        image, changed = self.images[index], self.data.changed
        wants_change = bool(changed) and bool(torch.rand(()) < 0.5)
        if wants_change and image not in changed:
            image = changed[int(torch.randint(len(changed), ()))]
        *paths, label = self.data.train[image]
        mask = read_mask(label, self.data.classes)
        pixels = read_dates(paths, self.in_chans, mask.shape)
        side = round(self.img_size / (0.5 + 1.5 * torch.rand(()).item()))  # scaled by .5 to 2
        corner = [(0, max(0, length - side)) for length in mask.shape]  # lowest and highest top, left
        if wants_change:  # around one of the changed pixels
            pixel = (mask == 1).nonzero()
            pixel = pixel[torch.randint(len(pixel), ())].tolist()
            corner = [(max(0, at - side + 1), min(high, at))
                      for (_, high), at in zip(corner, pixel, strict=True)]
        top, left = (int(torch.randint(low, high + 1, ())) for low, high in corner)
        return cut(pixels, mask, (top, left, side), self.img_size, int(torch.randint(8, ())))


# --------------------------------------------------------------------------------------------------
# Model: pyramid of maps, heads
# --------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Four maps of the images: a backbone's, or their own colours.

    Args:
        backbone: timm model; None: pixels, averaged to the four strides.
        name: of the weights, for errors.
        in_chans: C.

    Attributes:
        channels, strides: of the four maps. A ViT's strides are all its patch.
        multiple: sides of images have to be multiples of it.
    """

    def __init__(self, backbone: nn.Module | None, name: str, in_chans: int):
        super().__init__()
        self.backbone, self.multiple, self.strides, self.channels = backbone, 32, STRIDES, [in_chans] * 4
        if backbone is None:
            return
        reductions = [stage["reduction"] for stage in getattr(backbone, "feature_info", ())]
        if n := len(reductions) if len(set(reductions)) == 1 else 0:  # a ViT of n blocks
            levels = [max(0, block) for block in (n // 3 - 1, n // 2 - 1, 2 * n // 3 - 1, n - 1)]
            self.strides, self.multiple = reductions[:1] * 4, math.lcm(32, 2 * reductions[0])
        else:
            levels = [max((i for i, r in enumerate(reductions) if r == s), default=None) for s in STRIDES]
        self.levels, side = levels, 2 * self.multiple
        try:
            with torch.no_grad():
                maps = self.eval()(torch.zeros(1, in_chans, side, side))
            strides = [side // x.shape[2] for x in maps]
            if strides != list(self.strides):
                raise ValueError(f"strides {strides}")
        except Exception as error:  # no such method, no such stage
            common.fail(f"--weights {name}: timm gives no maps at strides 4, 8, 16, 32 of it: {error}")
        self.channels = [x.shape[1] for x in maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        """B x C x H x W -> four maps B x channels x h x w."""
        if self.backbone is None:
            return [F.avg_pool2d(images, stride) for stride in self.strides]
        asked = sorted(set(self.levels))  # a shallow ViT has fewer than four
        maps = self.backbone.forward_intermediates(images, indices=asked, intermediates_only=True)
        return [maps[asked.index(level)] for level in self.levels]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """B x c x h x w -> B x c x size, bilinear."""
    return F.interpolate(x, tuple(size), mode="bilinear")


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution on each level; the logits are summed at stride 4."""

    def __init__(self, channels: Sequence[int], K: int):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, K, 1)) for c in channels)

    def forward(self, maps: list[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Four maps -> [logits B x K x size]."""
        return [sum(resized(level(x), size) for level, x in zip(self.levels, maps, strict=True))]


def conv(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(c_out), nn.ReLU())


def rescale(channels: int, stride: int, target: int) -> nn.Module:
    """Brings a map from `stride` to `target`, by the nearest power of 2."""
    power, layers = round(math.log2(stride / target)), []
    for i in range(power):
        layers += [nn.BatchNorm2d(channels), nn.GELU()] * (i > 0)
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2)]
    return nn.Sequential(*layers) if power >= 0 else nn.MaxPool2d(2**-power)


class UPerNet(nn.Module):
    """Pooled context of the last level, handed down the pyramid; then all levels together.

    Args:
        channels, strides: of the four maps.
        K: logits.
        dim: width of all layers.
        auxiliary: logits of the map at stride 16 too, for the loss alone.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], K: int, dim: int, auxiliary: bool):
        super().__init__()
        self.rescale = nn.ModuleList(map(rescale, channels, strides, STRIDES))
        self.pools = nn.ModuleList(conv(channels[3], dim, 1) for _ in POOLS)
        self.context = conv(channels[3] + len(POOLS) * dim, dim, 3)
        self.laterals = nn.ModuleList(conv(c, dim, 1) for c in channels[:3])
        self.smooth = nn.ModuleList(conv(dim, dim, 3) for _ in channels[:3])
        self.classify = nn.Sequential(conv(4 * dim, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, K, 1))
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(conv(channels[2], 256, 3), nn.Dropout2d(0.1),
                                           nn.Conv2d(256, K, 1))

    def forward(self, maps: list[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Four maps -> [logits B x K x size], while training those of the auxiliary head too."""
        *maps, last = [scale(x) for scale, x in zip(self.rescale, maps, strict=True)]
        pooled = [resized(pool(F.adaptive_avg_pool2d(last, side)), last.shape[2:])
                  for side, pool in zip(POOLS, self.pools, strict=True)]
        x = self.context(torch.cat([last, *pooled], 1))
        levels = [x]
        for i in (2, 1, 0):  # strides 16, 8, 4
            lateral = self.laterals[i](maps[i])
            x = lateral + resized(x, lateral.shape[2:])
            levels.append(self.smooth[i](x))
        logits = [self.classify(torch.cat([resized(level, x.shape[2:]) for level in levels], 1))]
        if self.auxiliary and self.training:
            logits.append(self.auxiliary(maps[2]))
        return [resized(x, size) for x in logits]


class Segmenter(nn.Module):
    """Pyramid and a new head; a frozen backbone stays in eval mode and gets no gradient.

    Args:
        pyramid: of the backbone, or of pixels.
        mean, std: of each channel.
        K: logits.
        dates: D.
        args: head, head_dim, finetune, and the seed of the head's weights.
    """

    def __init__(self, pyramid: Pyramid, mean: Sequence[float], std: Sequence[float], K: int, dates: int,
                 args: argparse.Namespace):
        super().__init__()
        torch.manual_seed(args.seed)
        self.pyramid, self.mean, self.std, self.dates = pyramid, mean, std, dates
        self.frozen = not args.finetune
        pyramid.requires_grad_(args.finetune)
        if args.head == "linear":
            self.head = LinearHead(pyramid.channels, K)
        else:
            self.head = UPerNet(pyramid.channels, pyramid.strides, K, args.head_dim, auxiliary=args.finetune)

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode of what is trained."""
        super().train(mode)
        self.pyramid.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images B x D*C x H x W, uint8 or float -> logits B x K x H/4 x W/4, of the images as padded."""
        B, D = len(images), self.dates
        H, W = (up_to(length, self.pyramid.multiple) for length in images.shape[2:])
        x = pad(common.to_float(images), H, W).unflatten(1, (D, -1)).flatten(0, 1)  # B*D x C x H x W
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.pyramid(common.normalize(x, self.mean, self.std))
        if D == 2:
            maps = [torch.sub(*x.unflatten(0, (B, D)).unbind(1)).abs() for x in maps]  # |f1 - f2|
        return self.head(maps, (H // 4, W // 4))


def loss_terms(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Parts of the loss, over all pixels of the batch that count.

    Args:
        logits: B x K x H x W, float32; K = 1 for change.
        masks: B x H x W, class numbers and IGNORE.
    """
    counts = masks != IGNORE
    if logits.shape[1] > 1:
        cross_entropy = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="sum")
        return {"cross_entropy": cross_entropy / counts.sum().clamp(min=1)}
    x, y = logits[:, 0][counts], masks[counts].float()  # the pixels in a row
    p = x.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="sum") / max(1, len(x))
    return {"cross_entropy": cross_entropy, "dice": 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)}


# --------------------------------------------------------------------------------------------------
# Evaluation: windows, figures
# --------------------------------------------------------------------------------------------------


def window_starts(length: int, window: int) -> list[int]:
    """Where windows start, at most 2/3 of their side apart, at multiples of 4; both are multiples of 32."""
    return [*range(0, length - window, window * 2 // 3 // 4 * 4), length - window]


@torch.inference_mode()
def window_logits(model: Segmenter, image: Tensor, args: argparse.Namespace, device: torch.device) -> Tensor:
    """D*C x H x W -> mean logits of all windows at stride 4, K x h x w, of the image as padded."""
    m, autocast = model.pyramid.multiple, common.autocast(args.amp, device)
    image = pad(image, *(up_to(length, m) for length in image.shape[1:]))
    H, W = image.shape[1:]
    h, w = min(up_to(args.img_size, m), H), min(up_to(args.img_size, m), W)
    places = [(top, left) for top in window_starts(H, h) for left in window_starts(W, w)]
    total, count = None, torch.zeros(H // 4, W // 4, device=device)
    for first in range(0, len(places), args.batch_size_per_gpu):
        some = places[first : first + args.batch_size_per_gpu]
        windows = torch.stack([image[:, top : top + h, left : left + w] for top, left in some]).to(device)
        with autocast:
            logits = model(windows)[0].float()
        total = torch.zeros(logits.shape[1], *count.shape, device=device) if total is None else total
        for (top, left), x in zip(some, logits, strict=True):
            part = (..., slice(top // 4, (top + h) // 4), slice(left // 4, (left + w) // 4))
            total[part] += x
            count[part] += 1
    return total / count


def decide(logits: Tensor, height: int, width: int, rows: int = 64) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Decides strip by strip, so that memory does not grow with classes x full size.

    Yields (class numbers r x width; for change and two classes the last one's score, r x width) from logits
    K x h x w at stride 4 of an image of height x width.
    """
    for first in range(0, math.ceil(height / 4), rows):
        above = max(0, first - 1)  # a row more on both sides, for the interpolation
        x = F.interpolate(logits[None, :, above : first + rows + 1], scale_factor=4, mode="bilinear")[0]
        skip = 4 * (first - above)
        x = x[:, skip : skip + min(4 * rows, height - 4 * first), :width].cpu()
        if len(x) == 1:
            yield (x[0] > 0).to(torch.uint8), x[0]
        else:
            yield x.argmax(0).to(torch.uint8), x[1] - x[0] if len(x) == 2 else None


def count_pixels(truth: Tensor, predicted: Tensor, score: Tensor | None, confusion: Tensor,
                 scores: Tensor) -> None:
    """Adds pixels to the counts: truth x predicted C x C, and truth x rounded score 2 x BINS."""
    C, counts = len(confusion), truth != IGNORE
    truth = truth[counts].long()
    confusion += torch.bincount(truth * C + predicted[counts], minlength=C * C).view(C, C)
    if score is not None:
        place = ((score[counts].clamp(-16, 16) + 16) * 128).round().long()
        scores += torch.bincount(truth * BINS + place, minlength=2 * BINS).view(2, BINS)


def figures(confusion: Tensor, scores: Tensor, change: bool) -> dict[str, float | list[float | None] | None]:
    """All figures in percent, of what `count_pixels` counted; None where there is nothing to measure."""
    right, truth, said = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    iou, f1 = right / (truth + said - right).clamp(min=1), 2 * right / (truth + said).clamp(min=1)
    if change:
        result = {"f1": f1[1], "precision": right[1] / said[1].clamp(min=1),
                  "recall": right[1] / truth[1].clamp(min=1), "iou": iou[1]}
    else:
        result = {"miou": iou[truth > 0].mean(), "mean_f1": f1[truth > 0].mean(),
                  "accuracy": right.sum() / truth.sum()}
    if len(truth) == 2:
        negative, positive = scores.flip(1).cumsum(1).double()  # pixels at or above each score, from the top
        gained = positive.diff(prepend=torch.zeros(1))
        result["ap"] = (gained * positive / (positive + negative).clamp(min=1)).sum() / positive[-1]
        result["share"] = truth[1] / truth.sum()
    result = {name: None if x.isnan() else round(100 * x.item(), 3) for name, x in result.items()}
    if not change:
        result["class_iou"] = [round(100 * x, 3) if there else None
                               for x, there in zip(iou.tolist(), truth > 0, strict=True)]
    return result


def evaluate(model: Segmenter, data: Data, args: argparse.Namespace, process: Process) -> dict:
    """Figures over all test images; writes examples.png."""
    model.eval()
    C, rows, lost = len(data.classes.names), [], torch.tensor(0)
    confusion, scores = torch.zeros(C, C, dtype=torch.long), torch.zeros(2, BINS, dtype=torch.long)
    mine = range(process.rank, len(data.test), process.world_size)
    quiet, apart = not (process.is_main and sys.stderr.isatty()), max(1, len(mine) // 8)
    for i in tqdm(mine, "test images", leave=False, disable=quiet):
        *paths, label = data.test[i]
        try:
            mask = read_mask(label, data.classes)
            image = read_dates(paths, len(model.mean), mask.shape)
        except common.UnreadableImageError as error:
            print(f"warning: unreadable, left out: {error}", file=sys.stderr)
            lost += 1
            continue
        parts, top = [], 0
        for classes, score in decide(window_logits(model, image, args, process.device), *mask.shape):
            count_pixels(mask[top : top + len(classes)], classes, score, confusion, scores)
            parts.append(classes)
            top += len(classes)
        if process.is_main and mine.index(i) % apart == 0:
            rows.append(example(model, data.classes, image, mask, torch.cat(parts)))
    if process.world_size > 1:
        for total in (confusion, scores, lost):
            dist.all_reduce(total, group=process.cpu_group)
    if lost > 0.01 * len(data.test):
        common.fail(f"{lost} of {len(data.test)} test images are unreadable, more than 1 %", code=1)
    if rows:
        common.save_grid(Path(args.output_dir) / "examples.png", rows[:8], [0.0] * 3, [1.0] * 3)
    return figures(confusion, scores, model.dates == 2) | {"test_images": len(data.test) - int(lost)}


def example(model: Segmenter, classes: Classes, image: Tensor, mask: Tensor,
            predicted: Tensor) -> list[Tensor]:
    """A row of examples.png, 3 x h x w in [0, 1]: date(s), truth, prediction; the middle 512 px of them."""
    top, left = (max(0, length - 512) // 2 for length in mask.shape)
    image, mask, predicted = (x[..., top : top + 512, left : left + 512] for x in (image, mask, predicted))
    colours = torch.zeros(256, 3)  # IGNORE: black
    colours[: len(classes.colours)] = torch.tensor(classes.colours) / 255
    dates = common.to_float(image).unflatten(0, (model.dates, -1))  # D x C x h x w
    if image.dtype != torch.uint8:  # three deviations either way
        dates = 0.5 + common.normalize(dates, model.mean, model.std) / 6
    dates = dates[:, :3] if dates.shape[1] >= 3 else dates[:, :1].expand(-1, 3, -1, -1)
    return [*dates, *(colours[x.long()].permute(2, 0, 1) for x in (mask, predicted))]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def build_optimizer(model: Segmenter, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; the backbone's layers have their own share of the head's rate, `lr_scale`."""
    groups, pyramid = common.param_groups(model.head), model.pyramid
    if args.finetune and pyramid.backbone:
        device, side = next(pyramid.parameters()).device, 2 * pyramid.multiple
        maps = pyramid.eval()(torch.zeros(1, len(args.mean), side, side, device=device))
        sum(x.mean() for x in maps).backward()
        for p in pyramid.parameters():  # layers behind the maps, such as a last norm, are not trained
            p.requires_grad_(p.grad is not None)
        pyramid.zero_grad()
        skip = getattr(pyramid.backbone, "no_weight_decay", tuple)()
        layers = timm.optim.param_groups_layer_decay(pyramid.backbone, args.weight_decay, skip,
                                                     layer_decay=args.layer_decay)
        groups += [layer | {"lr_scale": layer["lr_scale"] * args.backbone_lr / args.lr} for layer in layers]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def jitter(images: Tensor, dates: int, strength: float, generator: torch.Generator) -> Tensor:
    """Changes the colours of uint8 images B x D*3 x H x W, each date on its own; to float in [0, 1]."""
    x = common.to_float(images).unflatten(1, (dates, 3)).flatten(0, 1)
    strengths = (strength, strength, strength, strength / 4)
    drawn = common.draw_color_jitter(strengths, torch.ones(len(x)), generator)
    return common.color_jitter(x, *drawn).unflatten(0, (-1, dates)).flatten(1, 2)


def train(args: argparse.Namespace, process: Process, data: Data, model: Segmenter, init: str) -> bool:
    """Trains the head, with --finetune the backbone too; returns True when all steps are done."""
    # Data, networks: resumed or new
    dataset = CropDataset(data, len(args.mean), args.img_size, args.seed)
    run = common.Run(args, process, samples=len(dataset), images=len(data.train), free_flags=FREE_FLAGS)
    if process.world_size > 1 and process.device.type == "cuda":
        model = timm.layers.convert_sync_batchnorm(model)
    common.to_device(model, process.device)
    optimizer, scaler = build_optimizer(model, args), run.scaler
    run.restore(None, model=model, optimizer=optimizer)
    model.train()
    if args.compile:
        model.compile()
    ddp = common.distributed(model, process)
    warmup_steps = min(100, run.total_steps // 10)

    for step in run.steps(run.loader(dataset), init, lr=args.lr, warmup_steps=warmup_steps):
        lr = common.cosine_schedule(args.lr, 0.0, step, run.total_steps, warmup_steps)
        common.set_lr(optimizer, lr)
        terms = []
        for micro in range(args.accum_steps):
            images, masks = run.fetch()  # B x D*C x S x S, B x S x S
            seed = common.stream_seed(args.seed, "draws", step, micro, process.rank)
            torch.manual_seed(seed)  # of dropout and drop path
            if args.color_jitter:
                images = jitter(images, model.dates, args.color_jitter, torch.Generator().manual_seed(seed))
            with common.accumulating(ddp, micro, args.accum_steps):
                with run.autocast:
                    outputs = ddp(images)  # B x K x h x w; of the auxiliary head too
                parts = []
                for logits in outputs:
                    full = F.interpolate(logits.float(), scale_factor=4, mode="bilinear")
                    parts.append(loss_terms(full[..., : args.img_size, : args.img_size], masks))
                losses = [sum(part.values()) for part in parts]
                loss = losses[0] + 0.4 * sum(losses[1:])
                scaler.scale(loss / args.accum_steps).backward()
            terms.append({"loss": loss.detach(), **{name: x.detach() for name, x in parts[0].items()}})
        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)

    if process.world_size > 1:  # BatchNorm's statistics: those of the main process, as in its files
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return not run.stopped and run.stop_step == run.total_steps


# --------------------------------------------------------------------------------------------------
# Prediction of new images
# --------------------------------------------------------------------------------------------------


def write_mask(path: Path, mask: np.ndarray, classes: Classes, image: str) -> None:
    """Writes class numbers H x W: a TIFF with the geographic tags of `image`, if it has some, else a PNG."""
    values, tags = np.array(classes.values), []
    numbers = values.astype(np.min_scalar_type(values.max()))[mask]
    if image.lower().endswith((".tif", ".tiff")):
        with tifffile.TiffFile(image) as file:
            found = [file.pages[0].tags[code] for code in GEO_TAGS if code in file.pages[0].tags]
            tags = [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    if tags:
        common.write_atomically(path.with_suffix(".tif"), lambda file: tifffile.imwrite(
            file, numbers, extratags=tags, compression="deflate", metadata=None))
        return
    picture = Image.fromarray(numbers)
    if numbers.dtype == np.uint8:  # the numbers, shown in the classes' colours
        shown = np.zeros((256, 3), np.uint8)
        shown[values] = classes.colours
        picture.putpalette(shown.tobytes())
    common.write_atomically(path.with_suffix(".png"), lambda file: picture.save(file, "png"))


def predict(args: argparse.Namespace, process: Process) -> None:
    """Writes a mask of each image of the folder to OUT/masks."""
    source, root = Path(args.weights[0]), Path(args.predict)
    if not (source / "segmenter.pth").is_file():
        common.fail(f"--weights {source}: holds no segmenter.pth; give a folder that this script filled")
    try:
        saved = common.load_checkpoint(source / "segmenter.pth")
    except ValueError as error:
        common.fail(f"--weights {source}: segmenter.pth: {error}")
    vars(args).update(saved["args"])
    classes = Classes(*saved["classes"])
    name = str(source) if args.arch else "pixels"
    pyramid, _, report = prepare(name, *(common.read_weights(name) if args.arch else ({}, {})), args)
    parts = ("A", "B") if saved["dates"] == 2 else (".",)
    model = Segmenter(pyramid, args.mean, args.std, saved["K"], saved["dates"], args)
    model.head.load_state_dict(saved["head"])
    common.to_device(model, process.device).eval()
    samples = match_files(root, parts, "--predict")
    out = common.make_output_dir(args.output_dir, process) / "masks"
    if process.is_main:
        print(report)
    for paths in samples[process.rank :: process.world_size]:
        try:
            image = read_dates(paths, args.in_chans)
        except common.UnreadableImageError as error:
            print(f"warning: unreadable, left out: {error}", file=sys.stderr)
            continue
        logits = window_logits(model, image, args, process.device)
        mask = torch.cat([numbers for numbers, _ in decide(logits, *image.shape[1:])])
        write_mask(out / os.path.relpath(paths[0], root / parts[0]), mask.numpy(), classes, paths[0])
    if process.is_main:
        print(f"masks of {len(samples)} images: {out}")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def prepare(name: str, state: dict, info: dict, args: argparse.Namespace) -> tuple[Pyramid, str | None, str]:
    """Pyramid, arch and a report for one of --weights, from what read_weights gave; baselines borrow it."""
    if name == "pixels":
        return Pyramid(None, name, args.in_chans), None, "pixels: the head on the colours alone"
    arch = args.arch or info.get("arch")
    if arch is None:
        common.fail(f"--weights {name}: give its --arch")
    if info.get("arch") not in (None, arch):
        common.fail(f"--arch {arch}: {name} holds {info['arch']}")
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(arch, info.get("img_size") or up_to(args.img_size, 32),
                                     args.patch_size or info.get("patch_size"), args.drop_path, args.in_chans)
    report = f"{name}: initial weights of seed {args.seed}"
    if state:
        report = common.load_backbone(backbone, state, name, args.allow_partial)
    return Pyramid(backbone, name, args.in_chans), arch, report


def mean_and_std(data: Data, args: argparse.Namespace, info: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Reads up to 32 training images; returns mean and std: those given, the weights', or measured ones."""
    pixels = []
    for *paths, mask in data.train[:: math.ceil(len(data.train) / 32)]:
        try:
            pixels.append(read_dates(paths, args.in_chans, read_mask(mask, data.classes).shape))
        except common.UnreadableImageError as error:
            common.fail(f"--data_path: {error}")
    is_rgb8 = args.in_chans == 3 and pixels[0].dtype == torch.uint8
    if args.color_jitter and not is_rgb8:
        common.fail(f"--color_jitter {args.color_jitter}: only for 8-bit RGB")
    if args.mean or len(info.get("mean", ())) == args.in_chans:
        return (args.mean, args.std) if args.mean else (info["mean"], info["std"])
    if is_rgb8:
        return common.IMAGENET_MEAN, common.IMAGENET_STD
    rows = torch.cat([common.to_float(x[: args.in_chans]).flatten(1) for x in pixels], 1).double()
    return rows.mean(1).tolist(), rows.std(1).clamp(min=1e-6).tolist()


def compare(args: argparse.Namespace, process: Process) -> None:
    """Trains and evaluates a head on each of --weights, and writes the results."""
    out, data = common.make_output_dir(args.output_dir, process), load_data(args)
    common.check_alike(process, training_images=len(data.train), test_images=len(data.test))
    sources = {name: common.read_weights(name, args.checkpoint_key) for name in args.weights
               if name not in BASELINES}
    borrowed = {}, next((info for _, info in sources.values()), {})
    folders = [out / re.sub(r"[^\w.-]+", "_", name).strip("_.") for name in args.weights]
    if len(set(folders)) < len(folders):
        common.fail(f"--weights {' '.join(args.weights)}: two of them would share a folder in --output_dir")
    args.in_chans = args.in_chans or len(args.mean or borrowed[1].get("mean", "RGB"))
    prepared, lines, change = [], [], data.classes is CHANGE
    for name, folder in zip(args.weights, folders, strict=True):
        state, info = sources.get(name, borrowed)
        mean, std = mean_and_std(data, args, info)
        pyramid, arch, report = prepare(name, state, info, args)
        digest = hashlib.blake2b(digest_size=8)  # a run is not resumed with other weights of the same name
        for x in pyramid.state_dict().values():
            digest.update(x.numpy().tobytes())
        own = {"weights": [name], "mean": list(mean), "std": list(std), "arch": arch,
               "weights_digest": digest.hexdigest(), "output_dir": str(folder if len(folders) > 1 else out)}
        prepared.append((argparse.Namespace(**vars(args) | own), pyramid, report))

    for own, pyramid, report in prepared:
        began, K = time.perf_counter(), 1 if change else len(data.classes.names)
        model = Segmenter(pyramid, own.mean, own.std, K, 1 + change, own)
        if not train(own, process, data, model, report):
            if process.is_main:
                print(f"no result before the last step (--max_steps): {own.output_dir}")
            return
        result = evaluate(model, data, own, process)
        settings = "arch checkpoint_key img_size in_chans head head_dim finetune epochs lr backbone_lr seed"
        lines.append({"task": "change" if change else "segmentation", "weights": own.weights[0],
                      "data": args.data_path, "split": data.split,
                      **{name: getattr(own, name) for name in settings.split()},
                      "train_images": len(data.train), "classes": data.classes.names, **result,
                      "seconds": round(time.perf_counter() - began, 1), "versions": common.versions()})
        if process.is_main:
            save_segmenter(own, data.classes, model, K)
            append_result(out, lines[-1])
    if process.is_main:
        print_table(lines)
        print("\n".join(map(json.dumps, lines)), flush=True)


def save_segmenter(args: argparse.Namespace, classes: Classes, model: Segmenter, K: int) -> None:
    """Writes segmenter.pth and backbone/, which --predict takes."""
    out, backbone = Path(args.output_dir), model.pyramid.backbone
    if backbone:
        built_size = backbone.model_args.get("img_size", args.img_size)  # of a ViT: that of its positions
        common.export_backbone(backbone, out / "backbone", built_size, args.mean, args.std)
    kept = "arch img_size in_chans mean std head head_dim finetune".split()
    saved = {"head": model.head.state_dict(), "args": {name: getattr(args, name) for name in kept},
             "classes": [classes.names, classes.values, classes.colours], "K": K, "dates": model.dates}
    common.write_atomically(out / "segmenter.pth", lambda file: torch.save(saved, file))


def print_table(lines: list[dict]) -> None:
    """A row for each of the weights; then the IoU of each class."""
    first, width = lines[0], max(24, *(len(line["weights"]) for line in lines))
    order = "miou mean_f1 accuracy f1 precision recall iou ap share".split()
    rows = [[line["weights"], *(line[name] for name in order if name in line)] for line in lines]
    rows.insert(0, ["", *(name for name in order if name in first)])
    if "class_iou" in first:
        rows += [[], ["IoU", *(Path(line["weights"]).name[-10:] for line in lines)]]
        rows += zip(first["classes"], *(line["class_iou"] for line in lines), strict=True)
    print(f"\n{first['task']}: % of the pixels of {first['test_images']} test images, "
          f"{first['train_images']} training images; classes without a test pixel (-) count in no mean")
    for name, *values in [row or [""] for row in rows]:
        words = ["-" if x is None else x if isinstance(x, str) else f"{x:.2f}" for x in values]
        print(f"{name:{width}}" + "".join(f"{word:>11}" for word in words))
    print()


def main() -> None:
    """Parses and checks the flags, joins the processes; trains and evaluates, or predicts."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    common.autocast_dtype(args.amp, process.device)  # refuses what the device lacks
    (predict if args.predict else compare)(args, process)
    process.leave()


if __name__ == "__main__":
    main()

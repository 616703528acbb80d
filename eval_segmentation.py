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
of any size are evaluated by overlapping windows. Read `Pyramid`, `UPerNet`, `loss_terms`, `train`,
`window_logits` and `figures` first.

    symbol    variable    flag (default)            what
    B         B           batch_size_per_gpu (8)    crops per process and micro-batch
    D         D           -                         dates: 1, or 2 for change
    C         in_chans    in_chans                  bands of a date
    S         img_size    img_size (512)            side of crops and windows
    K         K           -                         logits: one for each class; for change 1
    h, w      -           -                         height and width of a map

DATA_PATH holds train/ and val/ (or test/), each with images/ and masks/, or A/, B/ and label/ (or OUT/).
Files of one stem belong together. Masks hold class numbers, or colours that `--classes` names: a line each,
`name value` or `name R G B`, with the word `ignore` for what does not count. Change labels are above 127
where something changed, or 1 where that is their largest value.

Figures are pooled over the test set, after the last epoch. Classes without a test pixel count in no mean. For
change and two classes there is also the average precision of the last class (ap; logits rounded to 1/128),
beside its share of the pixels. The same command, with a --data_path of the same train/ and another val/,
evaluates a finished run there.

In OUT: results.jsonl gets a line for each of the weights, at each start; segmenter.pth, backbone/,
examples.png (image, truth, prediction), log.jsonl and checkpoint.pth; several weights have a folder each.
`--predict` writes to OUT/predictions.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import timm.layers
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torchvision.ops import Conv2dNormActivation as conv
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import common
import eval_knn
from common import Process, not_negative, number, positive, unit
from eval_knn import add_result, add_weights_flags, build, load_saved, prepare, print_rows, weights_digest

STRIDES, POOLS = (4, 8, 16, 32), (1, 2, 3, 6)  # of the maps; sides that UPerNet pools to
IGNORE, UNKNOWN = 255, 254  # in masks of class numbers: what does not count, what no class has
WHOLE = slice(None), slice(None)  # rows and columns of a mask
NOT_FINITE = "not all predictions are finite: damaged weights, or try --amp off"
BINS = 4097  # of logits from -16 to 16, for the average precision
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # of a GeoTIFF: scale, tie points, matrix, keys
SAVED_FLAGS = "arch img_size in_chans bands mean std head head_dim finetune".split()  # with the segmenter
SETTINGS = """checkpoint_key allow_partial patch_size drop_path epochs batch_size_per_gpu accum_steps lr
    backbone_lr layer_decay weight_decay color_jitter seed amp""".split()  # also in a line of results

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="train/ and val/ (or test/), each with images/ and masks/, or A/, B/ and label/")
    add("--predict", help="instead: write masks of this folder's images, or of its A/ and B/")
    add("--classes", help="file that names the masks' numbers or colours; default: the numbers found")
    add("--ignore", type=not_negative(int), nargs="*", default=[255], help="numbers of masks that do not "
        "count, unless --classes names them")
    add("--img_size", type=positive(int), default=512, help="side of crops and windows; larger ones see more "
        "around a pixel and need more memory")
    common.add_pixel_flags(add, tiles=False)

    add = parser.add_argument_group("model").add_argument
    add_weights_flags(add, "pixels (the head on the colours alone); with --predict a folder of this script")
    add("--drop_path", type=unit(float), default=0.0, help="in --finetune; .3 for CMID's Swin-B")

    add = parser.add_argument_group("method").add_argument
    add("--head", choices=["linear", "upernet"], default="linear", help="a 1x1 convolution on each level, or "
        "UPerNet")
    add("--head_dim", type=positive(int), default=512, help="channels of upernet; we recommend 64 on a CPU")
    add("--finetune", action=yes_no, default=False, help="train the backbone too")
    add("--color_jitter", type=unit(float), default=0.0, help="strength; harms short and frozen "
        "runs, we recommend .4 for long fine-tuning")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=50, help="an epoch draws area / --img_size^2 crops "
        "of an image, at least one")
    add("--batch_size_per_gpu", type=positive(int), default=8, help="crops, or windows in the evaluation")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, "
        "where memory is small")
    add("--lr", type=positive(float), help="of the head, AdamW; default: 2e-2 for linear, 1e-3 for upernet")
    add("--backbone_lr", type=positive(float), default=1e-4, help="in --finetune; we recommend 1e-3 for "
        "runs of some hundred steps")
    add("--weight_decay", type=not_negative(float), default=0.05, help="not on biases and norms")
    add("--layer_decay", type=number(float, lambda factor: 0 < factor <= 1, "above 0, at most 1"),
        default=1.0, help="in --finetune: learning rate of a layer relative to the one above; .65 for a ViT "
        "after MAE")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in the default of --lr."""
    for name in check_mode(args, get_parser()):
        if name in ("backbone_lr", "layer_decay", "drop_path") and not args.finetune:
            common.fail(f"--{name} {getattr(args, name)}: only with --finetune")
        if name == "head_dim" and args.head == "linear":
            common.fail(f"--head_dim {args.head_dim}: only with --head upernet")
    if args.head == "upernet" and args.batch_size_per_gpu == 1:
        common.fail("--batch_size_per_gpu 1: must be at least 2 for the BatchNorm of --head upernet")
    args.lr = args.lr or {"linear": 2e-2, "upernet": 1e-3}[args.head]


def check_mode(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """As eval_knn.check_mode, for --weights with a folder each; names of the flags not at their defaults."""
    changed = eval_knn.changed_flags(args, parser)
    eval_knn.check_mode(args, changed)
    if len(set(map(folder_name, args.weights))) < len(args.weights):
        common.fail(f"--weights {' '.join(args.weights)}: two of them would share a folder in --output_dir")
    return changed


def folder_name(weights: str) -> str:
    """Of one of several --weights, in --output_dir."""
    return re.sub(r"[^\w.-]+", "_", weights).strip("_.")


# --------------------------------------------------------------------------------------------------
# Data: classes, masks, pairs of files, crops
# --------------------------------------------------------------------------------------------------


@dataclass
class Classes:
    """What the numbers of a mask mean; one entry for each class."""

    names: list[str]
    values: list[int]  # that predictions are written with
    colours: list[tuple[int, ...]]  # in pictures
    ignored: list[str]  # values that do not count
    lut: np.ndarray | None = None  # class number, IGNORE or UNKNOWN of each value; None: change labels
    in_colour: bool = False  # the values are R * 65536 + G * 256 + B


CHANGE = Classes(["unchanged", "changed"], [0, 255], [(0, 0, 0), (255, 255, 255)], [])


def in_words(value: int, in_colour: bool) -> str:
    """The value of a mask as --classes has it: a number, or R G B."""
    return f"{value >> 16} {value >> 8 & 255} {value & 255}" if in_colour else str(value)


def number_classes(named: Sequence[tuple[int, str]], ignore: Sequence[int], in_colour: bool) -> Classes:
    """Numbers the names of (value, name) in their order; lines of one name are one class.

    What does not count: values called "ignore", and those of `ignore` that have no name.
    """
    first = {name: value for value, name in reversed(named) if name.lower() != "ignore"}
    names = list(dict.fromkeys(name for _, name in named if name in first))
    lut = np.full(2**24, UNKNOWN, np.uint8)
    lut[[value for value in ignore if value < 2**24]] = IGNORE
    for value, name in named:
        lut[value] = names.index(name) if name in first else IGNORE
    ignored = [in_words(value, in_colour) for value in np.flatnonzero(lut == IGNORE).tolist()]
    hues = [2 * math.pi * (0.1 + 0.618034 * i) for i in range(len(names))]  # far from each other, none black
    colours = [tuple(round(140 + 115 * math.cos(hue - 2.0944 * k)) for k in range(3)) for hue in hues]
    if in_colour:
        colours = [tuple(first[name].to_bytes(3, "big")) for name in names]
    values = list(range(len(names))) if in_colour else [first[name] for name in names]
    return Classes(names, values, colours, ignored, lut, in_colour)


def read_classes(path: str, ignore: Sequence[int]) -> Classes:
    """Reads --classes: lines of `name value` or `name R G B`."""
    named, kinds = [], set()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        common.fail(f"--classes {path}: cannot be read: {error}")
    for line in lines:
        match = re.fullmatch(r"\s*(\S.*?)((?:\s+\d+){3}|\s+\d+)\s*", line)
        own = [int(word) for word in match[2].split()] if match else []
        kinds.add(len(own))
        if not own or len(kinds) > 1 or max(own) > (255 if len(own) == 3 else 65535):
            common.fail(f"--classes {path}: must be lines of `name value`, or all of `name R G B`: {line}")
        named.append((int.from_bytes(own, "big") if len(own) == 3 else own[0], match[1]))
    if len(dict(named)) < len(named):
        common.fail(f"--classes {path}: names a value twice")
    if 3 in kinds and ignore != [255]:
        common.fail(f"--ignore: not for masks in colour: put a line `ignore R G B` into {path}")
    classes = number_classes(named, () if 3 in kinds else ignore, 3 in kinds)
    if not 2 <= len(classes.names) <= UNKNOWN:
        common.fail(f"--classes {path}: names {len(classes.names)} classes, must be from 2 to {UNKNOWN}")
    return classes


def read_values(path: str, in_colour: bool, part: tuple[slice, slice] = WHOLE) -> np.ndarray:
    """The numbers of a mask as stored, of palettes too, int32 H x W; of colours R * 65536 + G * 256 + B.

    Raises:
        UnreadableImageError: the file is damaged or gone, or no mask.
    """
    try:
        if path.lower().endswith((".tif", ".tiff")):
            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                values = np.atleast_3d(page.asarray(maxworkers=1))
                values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
                if in_colour and page.colormap is not None:
                    values = (page.colormap >> 8).T[values[..., 0]]
        elif path.lower().endswith(".npy"):
            values = np.atleast_3d(np.load(path, allow_pickle=False))
        else:
            with Image.open(path) as image:
                values = np.atleast_3d(image.convert("RGB") if in_colour else image)
        values = values[part][..., : 3 if values.shape[2] > 2 else 1]  # without alpha
        most = 255 if in_colour else 65535
        if values.ndim != 3 or not np.isfinite(values).all() or values.min() < 0 or values.max() > most \
                or (values % 1).any():
            raise ValueError(f"not a mask: it must hold H x W whole numbers from 0 to {most}; give ignored "
                             "pixels one of them, for --ignore")
        if in_colour:
            return (values.astype(np.int32) * np.array([65536, 256, 1], np.int32)).sum(2, dtype=np.int32)
        if (values != values[..., :1]).any():
            raise ValueError("a mask in colour: name its colours with --classes")
        return values[..., 0].astype(np.int32)
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise common.UnreadableImageError(f"{path}: {error}") from error


def read_mask(path: str, classes: Classes, part: tuple[slice, slice] = WHOLE) -> Tensor:
    """A part of the mask as class numbers and IGNORE, uint8 H x W; raises UnreadableImageError."""
    if classes.lut is None:  # change: the largest value of the whole mask counts
        values = read_values(path, in_colour=False)
        most = values.max()
        if 1 < most < 128 and not path.lower().endswith((".jpg", ".jpeg")):  # whose black is not quite 0
            raise common.UnreadableImageError(f"{path}: its largest value is {most}: where something changed "
                                              "there must be values above 127, or 1")
        return torch.from_numpy((values > (0 if most == 1 else 127)).astype(np.uint8)[part])
    numbers = classes.lut[read_values(path, classes.in_colour, part)]
    if (numbers == UNKNOWN).any():
        raise common.UnreadableImageError(f"{path}: changed: it holds values that no class has")
    return torch.from_numpy(numbers)


def read_dates(paths: Sequence[str], samples: common.Samples,
               window: tuple[int, int, int, int] | None = None) -> Tensor:
    """The image or both dates, or a window of them, D x C x H x W, with the bands and type of `samples`.

    Raises:
        UnreadableImageError: a file is damaged or gone, or of another size or type than the others.
    """
    dates = [common.read_image(path, samples.in_chans, samples.bands, window) for path in paths]
    for path, date in zip(paths, dates, strict=True):
        if (date.dtype, date.shape) != (samples.dtype, dates[0].shape):
            raise common.UnreadableImageError(f"{path}: {common.shape_words(date.shape)} {date.dtype} among "
                                              f"{common.shape_words(dates[0].shape)} {samples.dtype}")
    return torch.stack(dates)


class Files(Sequence):
    """Files that belong together: `files[i]` is a tuple of paths, made of the Paths of each kind."""

    def __init__(self, kinds: Sequence[common.Paths]):
        self.kinds = kinds

    def __len__(self) -> int:
        return len(self.kinds[0])

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return tuple(paths[index] for paths in self.kinds)


def match_files(root: Path, parts: Sequence[str], args: argparse.Namespace) -> Files:
    """Files of the same stem in the folders `parts` of `root`."""
    kinds, found, flag = [], [], "--predict" if args.predict else "--data_path"
    for part in parts:
        bands = args.bands if part not in ("masks", "label", "OUT") else None
        paths = common.list_images(root / part, args.output_dir, flag=flag, bands=bands)
        kinds.append(paths)
        found.append({stem(path, root / part): i for i, path in enumerate(paths)})
        if len(found[-1]) < len(paths):
            common.fail(f"{flag} {root / part}: has two files of one stem")
    for part, own in zip(parts, found, strict=True):
        if lacking := sorted(set().union(*found) - own.keys()):
            common.fail(f"{flag} {root / part}: lacks {len(lacking)} files that are in "
                        f"{' or '.join(other for other in parts if other != part)}: {', '.join(lacking[:3])}")
    return Files([paths[np.array([own[key] for key in sorted(own)])]
                  for paths, own in zip(kinds, found, strict=True)])


def stem(path: str, root: Path) -> str:
    """Path below `root` without suffix; of a folder of bands with all its dots, of `root` itself its name."""
    below = os.path.relpath(path, root)
    below = os.path.basename(os.path.abspath(path)) if below == "." else below
    return below if os.path.isdir(path) else os.path.splitext(below)[0]


@dataclass
class Data:
    """The data set: tuples of image and mask, or of date A, date B and label."""

    train: Files
    test: Files
    split: str
    classes: Classes
    sizes: np.ndarray  # N x 2: height and width of the training masks
    changed: np.ndarray  # numbers of the training pairs that hold change
    pixels: common.Samples  # the training images: their bands and type


def find_files(args: argparse.Namespace) -> tuple[list[Files], str, bool]:
    """Training and test files of --data_path, the split in words, and whether they are pairs of dates."""
    root, files = Path(args.data_path), []
    name = next((name for name in ("val", "test") if (root / name).is_dir()), "")
    if not (root / "train").is_dir() or not name:
        common.fail(f"--data_path {root}: must hold train/ and val/ (or test/)")
    change = (root / "train" / "A").is_dir()
    if change and (args.classes or args.ignore != [255]):
        common.fail("--classes, --ignore: not for change labels, all of which count")
    for folder in (root / "train", root / name):
        label = "OUT" if (folder / "OUT").is_dir() else "label"
        files.append(match_files(folder, ("A", "B", label) if change else ("images", "masks"), args))
    return files, f"train/{name}", change


def load_data(files: list[Files], split: str, change: bool, pixels: common.Samples,
              args: argparse.Namespace) -> Data:
    """Reads all masks once and the sizes of all images; leaves out pairs that are unreadable.

    Fails where these are more than 1 %, and where sizes or values do not fit.
    """
    root = Path(args.data_path)
    classes = read_classes(args.classes, args.ignore) if args.classes else CHANGE if change else None
    in_colour = classes is not None and classes.in_colour

    def look(sample: tuple[str, ...]) -> tuple[tuple[int, int], list[int]] | str:
        *paths, mask = sample
        if not change and mask.lower().endswith((".jpg", ".jpeg")):
            common.fail(f"--data_path: {mask}: a JPEG, which changes numbers: save it as PNG")
        try:
            values = read_mask(mask, CHANGE).numpy() if change else read_values(mask, in_colour)
            sizes = [common.image_size(path, args.in_chans, args.bands, whole=True) for path in paths]
        except common.UnreadableImageError as error:
            return str(error)
        for path, size in zip(paths, sizes, strict=True):
            if size != values.shape:
                common.fail(f"--data_path: {path}: {common.shape_words(size)} pixels, its mask has "
                            f"{common.shape_words(values.shape)}")
        found = np.zeros(2**24, bool)
        found[values] = True
        return values.shape, np.flatnonzero(found).tolist()

    every = [*files[0], *files[1]]
    with ThreadPoolExecutor(min(4, max(1, common.worker_count(args.num_workers)))) as pool:
        looks = list(tqdm(pool.map(look, every), "masks", len(every), leave=False, disable=None))
    if lost := [one for one in looks if isinstance(one, str)]:
        if len(lost) > 0.01 * len(every):
            common.fail(f"--data_path: {len(lost)} of {len(every)} images or masks are unreadable, more than "
                        f"1 %: {lost[0]}", code=1)
        print(f"warning: {len(lost)} unreadable, left out: {common.one_line(lost[0])}", file=sys.stderr)
        kept = np.array([not isinstance(one, str) for one in looks])
        files = [Files([paths[np.flatnonzero(mask)] for paths in part.kinds])
                 for part, mask in zip(files, np.split(kept, [len(files[0])]), strict=True)]
        every, looks = [*files[0], *files[1]], [one for one in looks if not isinstance(one, str)]
    sizes, found = zip(*looks, strict=True)
    n, values = len(files[0]), sorted(set().union(*found))
    if classes is None:
        kept = [value for value in values if value not in args.ignore]
        if not 2 <= len(kept) <= UNKNOWN:
            common.fail(f"--data_path {root}: masks hold {', '.join(map(str, values[:9]))}; --ignore "
                        f"leaves {len(kept)}; must be from 2 to {UNKNOWN}: name them with --classes")
        classes = number_classes([(value, str(value)) for value in kept], args.ignore, in_colour)
    elif not change and (unknown := [value for value in values if classes.lut[value] == UNKNOWN]):
        path = next(sample[-1] for sample, own in zip(every, found, strict=True) if unknown[0] in own)
        words = ", ".join(in_words(value, in_colour) for value in unknown[:12])
        common.fail(f"--classes {args.classes}: has no class for value {words}, found in {path}")
    for line in common.small_images([min(size) for size in sizes[:n]], args.img_size, "padded"):
        print(line, file=sys.stderr)
    changed = [i for i, own in enumerate(found[:n]) if change and 1 in own]
    if change and not changed:
        common.fail(f"--data_path {root}: no training label holds a change")
    return Data(*files, split, classes, np.array(sizes[:n]), np.array(changed, np.int64), pixels)


def pad(images: Tensor, height: int, width: int) -> Tensor:
    """Pads below and right: by reflection, or with the border where a side is no longer than its pad."""
    for dim, length in ((-2, height), (-1, width)):
        side, index = images.shape[dim], torch.arange(length, device=images.device)
        if length > side:
            reflected = torch.where(index < side, index, 2 * (side - 1) - index)
            index = reflected if side > length - side else index.clamp(max=side - 1)
            images = images.index_select(dim, index)
    return images


def up_to(length: int, multiple: int) -> int:
    """The next multiple that is no less than `length`."""
    return -(-length // multiple) * multiple


def to_crop(image: Tensor, mask: Tensor, scale: float, size: int, turn: int) -> tuple[Tensor, Tensor]:
    """Resizes image D x C x h x w and mask h x w by `scale`, pads them to `size` (IGNORE), turns, flips.

    `turn` from 0 to 7: quarter turns, and from 4 on a flip after them.
    """
    h, w = (min(size, max(1, round(length * scale))) for length in mask.shape)
    image = pad(resize(image, [h, w], InterpolationMode.BILINEAR, antialias=True), size, size)
    mask = resize(mask[None], [h, w], InterpolationMode.NEAREST_EXACT)[0]
    mask = F.pad(mask, (0, size - w, 0, size - h), value=IGNORE)
    image, mask = (x.rot90(turn % 4, (-2, -1)) for x in (image, mask))
    return (image.flip(-1), mask.flip(-1)) if turn >= 4 else (image, mask)


class CropDataset(torch.utils.data.Dataset):
    """Random crops, drawn from (seed, epoch, index) alone; for change half are around a changed pixel.

    An image counts as often as its area is that of a crop of `img_size`, rounded, at least once.
    """

    def __init__(self, data: Data, img_size: int, seed: int):
        self.data, self.img_size, self.seed = data, img_size, seed
        counts = [max(1, round(H * W / img_size**2)) for H, W in data.sizes.tolist()]
        self.images = np.repeat(np.arange(len(counts)), counts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns the crop D x C x S x S and its mask S x S."""
        (epoch, index), data = key, self.data
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "crop", epoch, index))
        image = int(self.images[index])
        wants_change = len(data.changed) > 0 and bool(torch.rand(()) < 0.5)
        if wants_change and image not in data.changed:
            image = int(data.changed[int(torch.randint(len(data.changed), ()))])
        *paths, label = data.train[image]
        H, W = data.sizes[image].tolist()
        whole = read_mask(label, data.classes) if wants_change else None
        changed = None if whole is None else (whole == 1).nonzero()
        if wants_change and not len(changed):
            raise common.UnreadableImageError(f"{label}: changed: it holds no change any more")
        for attempt in range(100):
            scale = 0.5 + 1.5 * torch.rand(()).item()
            h, w = (min(length, round(self.img_size / scale)) for length in (H, W))
            low, high = (0, 0), (H - h, W - w)  # of the crop's corner
            if wants_change:  # around one of the changed pixels
                y, x = changed[torch.randint(len(changed), ())].tolist()
                low, high = (max(0, y - h + 1), max(0, x - w + 1)), (min(high[0], y), min(high[1], x))
            top, left = (int(torch.randint(a, b + 1, ())) for a, b in zip(low, high, strict=True))
            try:
                crop = read_dates(paths, data.pixels, (top, left, h, w))
                break
            except common.EmptyImageError:  # a part of the scene without data
                if attempt == 99:
                    raise
        part = slice(top, top + h), slice(left, left + w)
        mask = read_mask(label, data.classes, part) if whole is None else whole[part]
        return to_crop(crop, mask, scale, self.img_size, int(torch.randint(8, ())))


# --------------------------------------------------------------------------------------------------
# Model: pyramid of maps, heads
# --------------------------------------------------------------------------------------------------

bilinear = partial(F.interpolate, mode="bilinear")


class Pyramid(nn.Module):
    """Four maps of the images: a backbone's, or without one their own colours, averaged.

    Attributes:
        channels, strides: of the maps. A ViT's strides are all its patch.
        multiple: sides of images have to be multiples of it.
    """

    def __init__(self, backbone: nn.Module | None, in_chans: int, finetune: bool, name: str):
        super().__init__()
        self.backbone, self.multiple, self.strides, self.channels = backbone, 32, STRIDES, [in_chans] * 4
        if backbone is None:
            return
        reductions = [stage["reduction"] for stage in getattr(backbone, "feature_info", ())]
        if n := len(reductions) if len(set(reductions)) == 1 else 0:  # a ViT of n blocks
            self.levels = [max(0, block) for block in (n // 3 - 1, n // 2 - 1, 2 * n // 3 - 1, n - 1)]
            self.strides, self.multiple = (reductions[0],) * 4, math.lcm(32, 2 * reductions[0])
        else:
            last = {reduction: i for i, reduction in enumerate(reductions)}
            self.levels = [last.get(stride) for stride in STRIDES]
            if None in self.levels:
                common.fail(f"--weights {name}: timm gives no maps at strides 4, 8, 16, 32 of it, but at "
                            + ", ".join(map(str, last)))
        side = 2 * self.multiple
        try:
            maps = self.eval()(torch.zeros(1, in_chans, side, side))
            strides = tuple(side // x.shape[2] for x in maps)
            if strides != self.strides:
                raise ValueError(f"strides {strides}")
        except Exception as error:  # no such method, no such stage
            common.fail(f"--weights {name}: timm gives no maps at strides 4, 8, 16, 32 of it: {error}")
        self.channels = [x.shape[1] for x in maps]
        sum(x.mean() for x in maps).backward()
        for p in self.parameters():  # a layer after the maps, such as a last norm, is not trained
            p.requires_grad_(finetune and p.grad is not None)
        self.zero_grad()

    def forward(self, images: Tensor) -> list[Tensor]:
        """B x C x H x W -> four maps B x channels x h x w."""
        if self.backbone is None:
            return [F.avg_pool2d(images, stride) for stride in self.strides]
        asked = sorted(set(self.levels))  # a shallow ViT has fewer than four
        maps = self.backbone.forward_intermediates(images, indices=asked, intermediates_only=True)
        return [maps[asked.index(level)] for level in self.levels]


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution on each level; the logits are summed at stride 4."""

    def __init__(self, channels: Sequence[int], K: int):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.Conv2d(c, K, 1)) for c in channels)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Four maps -> [logits B x K x size]."""
        return [sum(bilinear(level(x), size) for level, x in zip(self.levels, maps, strict=True))]


def rescale(channels: int, stride: int, target: int) -> nn.Module:
    """Brings a map from `stride` to `target`, by the nearest power of 2."""
    power, layers = round(math.log2(stride / target)), []
    for i in range(power):
        layers += [nn.BatchNorm2d(channels), nn.GELU()] * (i > 0)
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2)]
    return nn.Sequential(*layers) if power >= 0 else nn.MaxPool2d(2**-power)


class UPerNet(nn.Module):
    """Pooled context of the last level, handed down the pyramid; then all levels together.

    `auxiliary`: logits of the map at stride 16 too, for the loss alone.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], K: int, dim: int, auxiliary: bool):
        super().__init__()
        self.rescale = nn.ModuleList(map(rescale, channels, strides, STRIDES))
        self.pools = nn.ModuleList(conv(channels[3], dim, 1) for _ in POOLS)
        self.context = conv(channels[3] + len(POOLS) * dim, dim, 3)
        self.laterals = nn.ModuleList(conv(c, dim, 1) for c in channels[:3])
        self.smooth = nn.ModuleList(conv(dim, dim, 3) for _ in channels[:3])
        self.classify = nn.Sequential(conv(4 * dim, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, K, 1))
        self.auxiliary = nn.Sequential(conv(channels[2], 256, 3), nn.Dropout2d(0.1),
                                       nn.Conv2d(256, K, 1)) if auxiliary else None

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Four maps -> [logits B x K x size], while training those of the auxiliary head too."""
        *maps, last = [scale(x) for scale, x in zip(self.rescale, maps, strict=True)]
        pooled = [bilinear(pool(F.adaptive_avg_pool2d(last, side)), last.shape[2:])
                  for side, pool in zip(POOLS, self.pools, strict=True)]
        x = self.context(torch.cat([last, *pooled], 1))
        levels = [x]
        for i in (2, 1, 0):  # strides 16, 8, 4
            lateral = self.laterals[i](maps[i])
            x = lateral + bilinear(x, lateral.shape[2:])
            levels.append(self.smooth[i](x))
        logits = [self.classify(torch.cat([bilinear(level, x.shape[2:]) for level in levels], 1))]
        if self.auxiliary and self.training:
            logits.append(self.auxiliary(maps[2]))
        return [bilinear(x, size) for x in logits]


class Segmenter(nn.Module):
    """A pyramid and a new head."""

    def __init__(self, pyramid: Pyramid, K: int, args: argparse.Namespace):
        super().__init__()
        torch.manual_seed(args.seed)
        self.pyramid, self.K = pyramid, K
        if args.head == "linear":
            self.head = LinearHead(pyramid.channels, K)
        else:
            self.head = UPerNet(pyramid.channels, pyramid.strides, K, args.head_dim, auxiliary=args.finetune)

    def forward(self, x: Tensor) -> list[Tensor]:
        """B x D x C x H x W, normalised -> logits B x K x H/4 x W/4, of the images as padded."""
        B, D = x.shape[:2]
        H, W = (up_to(length, self.pyramid.multiple) for length in x.shape[3:])
        maps = self.pyramid(pad(x.flatten(0, 1), H, W))
        if D == 2:
            maps = [torch.sub(*m.unflatten(0, (B, D)).unbind(1)).abs() for m in maps]  # |f1 - f2|
        return self.head(maps, (H // 4, W // 4))


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def loss_terms(logits: Tensor, masks: Tensor, process: Process) -> dict[str, Tensor]:
    """Cross-entropy, for change (K = 1) binary and with Dice, over the pixels that count of all processes.

    Logits B x K x H x W in float32, masks B x H x W of class numbers and IGNORE, of a micro-batch.
    """
    counts, share = masks != IGNORE, 1 / process.world_size  # DDP averages the gradients of the processes
    pixels = (share * all_processes(counts.sum().float(), process)).clamp(min=share)
    if logits.shape[1] > 1:
        cross_entropy = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="sum")
        return {"cross_entropy": cross_entropy / pixels}
    x, y = logits[:, 0][counts], masks[counts].float()  # the pixels in a row
    p = x.sigmoid()
    both, predicted, true = all_processes(torch.stack([(p * y).sum(), p.sum(), y.sum()]), process)
    return {"cross_entropy": F.binary_cross_entropy_with_logits(x, y, reduction="sum") / pixels,
            "dice": 1 - (2 * both + 1) / (predicted + true + 1)}


def all_processes(x: Tensor, process: Process) -> Tensor:
    """The sum over all processes, with gradient."""
    return all_reduce(x) if process.world_size > 1 else x


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def build_optimizer(model: Segmenter, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; the backbone's layers have their own share of the head's rate, `lr_scale`."""
    groups, backbone = common.param_groups(model.head), model.pyramid.backbone
    if args.finetune and backbone:
        skip = getattr(backbone, "no_weight_decay", tuple)()
        layers = timm.optim.param_groups_layer_decay(
            backbone, args.weight_decay, no_weight_decay_list=skip, layer_decay=args.layer_decay)
        groups += [layer | {"lr_scale": layer["lr_scale"] * args.backbone_lr / args.lr} for layer in layers]
    return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)


def train(model: Segmenter, data: Data, report: str, args: argparse.Namespace,
          process: Process) -> tuple[bool, bool]:
    """Trains the head, with --finetune the backbone too; is there a result, was it stopped?"""
    # Data, networks: resumed or new. A frozen backbone stays in eval mode; it has no gradient.
    dataset = CropDataset(data, args.img_size, args.seed)
    run = common.Run(args, process, samples=len(dataset), images=len(data.train))
    model = common.sync_batchnorm(common.to_device(model, process.device), process)
    optimizer, scaler = build_optimizer(model, args), run.scaler
    run.restore(None, model=model, optimizer=optimizer)
    model.train()
    model.pyramid.train(args.finetune)
    if args.compile:
        model.compile()
    ddp_model = common.distributed(model, process)
    warmup_steps = min(100, run.total_steps // 10)
    jitter = [args.color_jitter] * 3 + [args.color_jitter / 4]

    for step in run.steps(run.loader(dataset), report, lr=args.lr, warmup_steps=warmup_steps):
        lr = common.cosine_schedule(args.lr, 0.0, step, run.total_steps, warmup_steps)
        common.set_lr(optimizer, lr)
        terms = []
        for micro in range(args.accum_steps):
            images, masks = run.fetch()  # B x D x C x S x S, B x S x S
            torch.manual_seed(common.stream_seed(args.seed, "draws", step, micro, process.rank))
            x = common.to_float(images, args.mean, args.std)
            if args.color_jitter:  # each date on its own
                x = x.flatten(0, 1)
                drawn = common.draw_color_jitter(jitter, torch.ones(len(x)), torch.default_generator)
                x = common.color_jitter(x, *drawn).view_as(images)
            x = common.normalize(x, args.mean, args.std, images.dtype)
            with common.accumulating(ddp_model, micro, args.accum_steps):
                with run.autocast:
                    outputs = ddp_model(x)  # B x K x h x w; of UPerNet in --finetune the auxiliary ones too
                outputs = [bilinear(logits.float(), scale_factor=4)[..., : args.img_size, : args.img_size]
                           for logits in outputs]
                parts = [loss_terms(logits, masks, process) for logits in outputs]
                loss, *auxiliary = (sum(part.values()) for part in parts)
                loss = loss + 0.4 * sum(auxiliary)
                scaler.scale(loss / args.accum_steps).backward()
            terms.append({"loss": loss.detach(), **{name: x.detach() for name, x in parts[0].items()}})
        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)

    common.share_buffers(model, process)
    return run.has_result(), run.stopped


# --------------------------------------------------------------------------------------------------
# Evaluation: windows, figures
# --------------------------------------------------------------------------------------------------


def window_starts(length: int, window: int) -> list[int]:
    """Where windows start, at most 2/3 of their side apart, at multiples of 4; both are multiples of 32."""
    return [*range(0, length - window, window * 2 // 3 // 4 * 4), length - window]


@torch.inference_mode()
def window_logits(model: Segmenter, image: Tensor, args: argparse.Namespace, device: torch.device) -> Tensor:
    """D x C x H x W -> mean logits of all windows at stride 4, K x h x w, of the image as padded."""
    m, autocast = model.pyramid.multiple, common.autocast(args.amp, device)
    image = pad(image, *(up_to(length, m) for length in image.shape[2:]))
    H, W = image.shape[2:]
    h, w = min(up_to(args.img_size, m), H), min(up_to(args.img_size, m), W)
    places = [(top, left) for top in window_starts(H, h) for left in window_starts(W, w)]
    total, count = (torch.zeros(n, H // 4, W // 4, device=device) for n in (model.K, 1))
    for first in range(0, len(places), args.batch_size_per_gpu):
        some = places[first : first + args.batch_size_per_gpu]
        x = torch.stack([image[..., top : top + h, left : left + w] for top, left in some]).to(device)
        x = common.normalize(common.to_float(x, args.mean, args.std), args.mean, args.std, image.dtype)
        with autocast:
            logits = model(x)[0].float()
        for (top, left), own in zip(some, logits, strict=True):
            place = (..., slice(top // 4, (top + h) // 4), slice(left // 4, (left + w) // 4))
            total[place] += own
            count[place] += 1
    if not total.isfinite().all():
        common.fail(NOT_FINITE, code=1, everywhere=True)
    return total / count


def decide(logits: Tensor, height: int, width: int, rows: int = 64) -> tuple[Tensor, Tensor | None]:
    """Class numbers H x W of logits K x h x w at stride 4; for change and two classes the last one's score.

    Strip by strip, so that memory does not grow with classes x full size.
    """
    numbers, scores = [], []
    for first in range(0, math.ceil(height / 4), rows):
        above = max(0, first - 1)  # a row more on both sides, for the interpolation
        x = bilinear(logits[None, :, above : first + rows + 1], scale_factor=4)[0]
        x = x[:, 4 * (first - above) :][:, : min(4 * rows, height - 4 * first), :width].cpu()
        numbers.append((x[0] > 0 if len(x) == 1 else x.argmax(0)).to(torch.uint8))
        if len(x) < 3:
            scores.append(x[-1] if len(x) == 1 else x[-1] - x[0])
    return torch.cat(numbers), torch.cat(scores) if scores else None


def count_pixels(truth: Tensor, predicted: Tensor, score: Tensor | None, confusion: Tensor,
                 scores: Tensor) -> None:
    """Adds pixels to the counts: truth x predicted, and truth x rounded score 2 x BINS."""
    n_classes, counts = len(confusion), truth != IGNORE
    truth = truth[counts].long()
    pairs = torch.bincount(truth * n_classes + predicted[counts], minlength=n_classes**2)
    confusion += pairs.view(n_classes, n_classes)
    if score is not None:
        place = ((score[counts].clamp(-16, 16) + 16) * 128).round().long()
        scores += torch.bincount(truth * BINS + place, minlength=2 * BINS).view(2, BINS)


def figures(confusion: Tensor, scores: Tensor, change: bool) -> dict[str, float | list[float | None] | None]:
    """All figures in percent, of what `count_pixels` counted; None where there is nothing to measure."""
    right, truth, said = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    precision, recall = right / said.clamp(min=1), right / truth.clamp(min=1)
    iou, f1 = right / (truth + said - right).clamp(min=1), 2 * right / (truth + said).clamp(min=1)
    present, result = truth > 0, {}
    if change:
        result = {"f1": f1[1], "precision": precision[1], "recall": recall[1], "iou": iou[1]}
    else:
        result = {"miou": iou[present].mean(), "mean_f1": f1[present].mean(),
                  "accuracy": right.sum() / truth.sum()}
    if len(truth) == 2:
        negative, positive = scores.flip(1).cumsum(1).double()  # pixels at or above each score, from the top
        gained = positive.diff(prepend=torch.zeros(1))
        result["ap"] = (gained * positive / (positive + negative).clamp(min=1)).sum() / positive[-1]
        result["share"] = truth[1] / truth.sum()
    values = [*result.values(), *torch.where(present, iou, math.nan)]
    percent = [None if math.isnan(x) else round(100 * float(x), 3) for x in values]
    return dict(zip(result, percent, strict=False)) | {"class_iou": percent[len(result) :]}


def read_share(read: Callable[[int], object], count: int, process: Process,
               may_lose: float = 0.01) -> Iterator[tuple[int, object]]:
    """Yields i and `read(i)` of this process's share of the images.

    Fails where more than the share `may_lose` of all are unreadable, or all are.
    """
    lost = 0
    for i in tqdm(range(process.rank, count, process.world_size), "images", leave=False,
                  disable=None if process.is_main else True):
        try:
            image = read(i)
        except common.UnreadableImageError as error:
            print(f"warning: unreadable, left out: {common.one_line(error)}", file=sys.stderr)
            lost += 1
        else:
            yield i, image
    lost = sum(common.gather_objects(lost, process))
    if lost > may_lose * count or lost == count:
        share = f", more than {100 * may_lose:g} %" if may_lose < 1 else ""
        common.fail(f"{lost} of {count} images are unreadable{share}", code=1)


def segment(model: Segmenter, files: Files, samples: common.Samples, classes: Classes | None,
            args: argparse.Namespace, process: Process) -> Iterator[tuple]:
    """Yields paths, image, mask, class numbers and scores (see decide) of this process's share of `files`.

    With `classes` the last of the files is the mask; without, any number of files may be unreadable.
    """

    def read(i: int) -> tuple:
        *paths, mask = files[i] if classes else (*files[i], None)
        return paths, read_dates(paths, samples), mask and read_mask(mask, classes)

    model.eval()
    for _, (paths, image, mask) in read_share(read, len(files), process, 0.01 if classes else 1.0):
        logits = window_logits(model, image, args, process.device)
        yield paths, image, mask, *decide(logits, *image.shape[2:])


def evaluate(model: Segmenter, data: Data, args: argparse.Namespace, process: Process) -> dict:
    """Figures over all test images; writes examples.png: date(s), truth, prediction."""
    n_classes, rows, done = len(data.classes.names), [], 0
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.long)
    scores = torch.zeros(2, BINS, dtype=torch.long)
    colours = torch.zeros(256, 3)  # IGNORE: black
    colours[:n_classes] = torch.tensor(data.classes.colours) / 255
    every = max(1, len(data.test) // process.world_size // 8)  # of them in examples.png
    results = segment(model, data.test, data.pixels, data.classes, args, process)
    for _, image, mask, predicted, score in results:
        for top in range(0, len(mask), 256):
            strips = [x if x is None else x[top : top + 256] for x in (mask, predicted, score)]
            count_pixels(*strips, confusion, scores)
        if done % every == 0 and len(rows) < 8:
            views = [x[: 3 if len(x) > 2 else 1] for x in common.to_float(image, args.mean, args.std)]
            views += [colours[numbers.long()].permute(2, 0, 1) for numbers in (mask, predicted)]
            top, left = (max(0, length - 512) // 2 for length in mask.shape)
            rows.append([view[:, top : top + 512, left : left + 512] for view in views])
        done += 1
    parts = common.gather_objects((confusion, scores, done), process)
    confusion, scores, done = map(sum, zip(*parts, strict=True))
    if process.is_main and rows:
        common.save_grid(Path(args.output_dir) / "examples.png", rows)
    return figures(confusion, scores, model.K == 1) | {"test_images": done}


# --------------------------------------------------------------------------------------------------
# Prediction of new images
# --------------------------------------------------------------------------------------------------


def write_mask(path: Path, mask: np.ndarray, classes: Classes, image: Path) -> None:
    """Writes class numbers H x W to `path` and a suffix: a TIFF that lies where the `image` lies, or a PNG.

    Of an image in a folder of bands the first in full resolution gives the georeference.
    """
    values, tags = np.array(classes.values), []
    numbers = values.astype(np.min_scalar_type(values.max()))[mask]
    for file in sorted(image.iterdir()) if image.is_dir() else [image]:
        if not tags and file.suffix.lower() in (".tif", ".tiff"):
            with contextlib.suppress(tifffile.TiffFileError), tifffile.TiffFile(file) as tiff:
                page = tiff.pages[0]
                if (page.imagelength, page.imagewidth) == mask.shape:
                    found = [page.tags[code] for code in GEO_TAGS if code in page.tags]
                    tags = [(tag.code, int(tag.dtype), tag.count, tag.value.encode("ascii", "replace")
                             if isinstance(tag.value, str) else tag.value, True) for tag in found]
    if tags:
        common.write_atomically(path.with_name(path.name + ".tif"), lambda file: tifffile.imwrite(
            file, numbers, extratags=tags, compression="deflate", metadata=None))
        return
    picture = Image.fromarray(numbers)
    if numbers.dtype == np.uint8:  # the numbers, shown in the classes' colours
        shown = np.zeros((256, 3), np.uint8)
        shown[values] = classes.colours
        picture.putpalette(shown.tobytes())
    common.write_atomically(path.with_name(path.name + ".png"), lambda file: picture.save(file, "png"))


def predict(args: argparse.Namespace, process: Process) -> None:
    """Writes a mask of each image of the folder to OUT/predictions."""
    source, root = Path(args.weights[0]), Path(args.predict)
    out = common.make_output_dir(args.output_dir, process) / "predictions"
    with load_saved(source, "segmenter.pth") as saved:
        vars(args).update({name: saved["args"][name] for name in SAVED_FLAGS})
        name, classes = str(source) if args.arch else "pixels", Classes(*saved["classes"])
        state, info = common.read_weights(name) if args.arch else ({}, {})
        dtype = torch.uint8 if saved["is_uint8"] else torch.float32
        backbone = build(name, state, info, args.mean, args.std, dtype, args)
        model = Segmenter(Pyramid(backbone.model, args.in_chans, args.finetune, name), saved["K"], args)
        model.head.load_state_dict(saved["head"])
    common.to_device(model, process.device)
    parts, done = ("A", "B") if model.K == 1 else (".",), 0
    files = common.from_main(process, partial(match_files, root, parts, args))
    common.check_there(process, files.kinds[0], root, "--predict")
    if process.is_main:
        print(backbone.report)
    results = segment(model, files, backbone.images(files.kinds[0]), None, args, process)
    for paths, _, _, numbers, _ in results:
        write_mask(out / stem(paths[0], root / parts[0]), numbers.numpy(), classes, Path(paths[0]))
        done += 1
    done = sum(common.gather_objects(done, process))
    if process.is_main:
        print(f"masks of {done} of {len(files)} images: {out}")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, process: Process) -> None:
    """Trains and evaluates a head on each of --weights, and writes the results."""
    out = common.make_output_dir(args.output_dir, process)
    files, split, change = common.from_main(process, partial(find_files, args))
    *images, _ = files[0].kinds
    for paths in images:
        common.check_there(process, paths, args.data_path)
    images = common.Paths.of([path for paths in images for path in paths])
    backbones = prepare(args, process, images, args.drop_path, baselines=("random", "pixels"))
    pixels = backbones[0].images(images)
    data = common.from_main(process, partial(load_data, files, split, change, pixels, args))
    versions = common.versions()
    K, prepared, lines = 1 if change else len(data.classes.names), [], []
    for name, backbone in zip(args.weights, backbones, strict=True):
        own = argparse.Namespace(**vars(args))
        own.weights, own.arch = [name], backbone.arch
        own.mean, own.std = list(backbone.mean), list(backbone.std)
        own.output_dir = str(out / folder_name(name) if len(backbones) > 1 else out)
        own.weights_digest = weights_digest(backbone.model) if backbone.model else None
        own.classes = [data.classes.names, data.classes.values, data.classes.ignored]  # not their file
        prepared.append((own, Pyramid(backbone.model, args.in_chans, args.finetune, name), backbone.report))
    del backbones

    while prepared:  # a network leaves the device with its turn
        own, pyramid, report = prepared.pop(0)
        began, model = time.perf_counter(), Segmenter(pyramid, K, own)
        complete, stopped = train(model, data, report, own, process)
        if stopped:
            return
        if not complete:
            continue
        if process.is_main:
            known = [data.classes.names, data.classes.values, data.classes.colours, data.classes.ignored]
            save_trained("segmenter.pth", model, SAVED_FLAGS, own, classes=known, K=K,
                         is_uint8=pixels.dtype == torch.uint8)
        result = evaluate(model, data, own, process)
        add_result({"task": "change" if K == 1 else "segmentation", "weights": own.weights[0],
                    "data": args.data_path, "split": data.split, "train_images": len(data.train),
                    **{name: getattr(own, name) for name in [*SAVED_FLAGS, *SETTINGS]}, "loading": report,
                    "classes": data.classes.names, "ignored": data.classes.ignored, **result,
                    "versions": versions},
                   began, lines, out, process)
    if process.is_main and lines:
        print_table(lines)
        print("\n".join(map(json.dumps, lines)), flush=True)


def save_trained(name: str, model: nn.Module, flags: Sequence[str], args: argparse.Namespace,
                 **more: object) -> None:
    """Writes OUT/`name`, with the head, `flags` of args and `more`, and backbone/: what --predict takes."""
    out, backbone = Path(args.output_dir), model.pyramid.backbone
    if backbone:
        common.export_backbone(backbone, out / "backbone", args.mean, args.std)
    saved = {"head": model.head.state_dict(), "args": {flag: getattr(args, flag) for flag in flags}, **more}
    common.write_atomically(out / name, partial(torch.save, saved))


def print_table(lines: list[dict]) -> None:
    """A row for each of the weights; then the IoU of each class."""
    first, order = lines[0], "miou mean_f1 accuracy f1 precision recall iou ap share".split()
    names, ignored = [name for name in order if name in first], ", ".join(first["ignored"]) or "none"
    rows = [["", *names], *([line["weights"], *(line[name] for name in names)] for line in lines),
            ["IoU of each class", *(Path(line["weights"]).name[-18:] for line in lines)],
            *zip(first["classes"], *(line["class_iou"] for line in lines), strict=True)]
    print_rows(f"{first['task']}: % of the pixels of {first['test_images']} test images, "
               f"{first['train_images']} training images; ignored values: {ignored}; -: no test pixel", rows)


def main() -> None:
    """Parses and checks the flags, joins the processes; trains and evaluates, or predicts."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    common.choose_attention(args.amp, process.device)
    (predict if args.predict else compare)(args, process)
    process.leave()


if __name__ == "__main__":
    main()

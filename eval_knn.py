"""kNN evaluation of a frozen backbone: DINO's weighted vote, for several k at once.

M. Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021.

    # a backbone of ours beside the two baselines that any result has to beat
    python eval_knn.py --data_path demo/data --weights demo/output image_stats random
    # one GPU; weights of timm by name; red, green and blue of files of 13 bands
    python eval_knn.py --data_path EUROSAT --weights OUT resnet50.a1_in1k --img_size 224 --bands 4 3 2
    # several GPUs share the images: the same figure, sooner
    python -m torch.distributed.run --nproc_per_node 4 eval_knn.py --data_path EUROSAT --weights OUT

Every test image asks its k nearest training images, by cosine similarity of the features, for their class;
each votes with weight exp(similarity / tau). Nothing is trained, so nothing is tuned on the test images.

    symbol    variable       flag (default)             what
    k         ks             nb_knn (10 20 100 200)     neighbours that vote
    tau       temperature    temperature (.07)          of the weights
    N, M      -              -                          training and test images
    D         -              -                          width of the features
    C         C              -                          classes

DATA_PATH holds class folders, in train/ and val/ (or test/); without those, each class is split by
--val_fraction and --split_seed. Or it has a labels.csv: `path,labels` or `path,labels,split`, paths relative
to it, labels joined by `|`. Unless each image has one label, each neighbour votes for all of its own; the
figures are then micro AP, macro AP and micro F1. A folder with neither gets the label-free figures alone.
Beware of random splits of neighbouring tiles (EuroSAT's usual one): near-copies of test images are then among
the training images. Any bands and type of pixels (`--in_chans`, `--bands`); see `pixel_values`.

Differs from the authors' code:
- all k come from one top-k over chunks of test images, so memory stays bounded; any number of classes;
- k above N is refused, or left out where it is a default;
- the features are the backbone's own (DINO-MC's authors put a random projection behind ResNet, WRN and Swin).

In OUTPUT_DIR: results.jsonl, a line for each of the weights, also printed below the table; neighbours.png,
eight queries and the eight images nearest to each (green: a label is shared); features.png, images and the
first three principal components of their last maps as colours. Without labels: the effective rank and the
spread of the features of the training images. Both are low where features are nearly alike for all images;
the rank is at most N and D.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

import common
from common import Process, not_negative, number, positive

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags, with DINO's defaults."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="class folders, or train/ and val/ (or test/) holding them; or "
        "images with a labels.csv; or images without labels")
    add_split_flags(add)

    add = parser.add_argument_group("model").add_argument
    add_weights_flags(add)

    add = parser.add_argument_group("method").add_argument
    add("--nb_knn", type=positive(int), nargs="+", help="k; DINO-MC's authors took 5 10 15 20; default: 10 "
        "20 100 200, those up to N")
    add("--temperature", type=positive(float), default=0.07, help="tau; lower: the nearest count more")
    add("--whiten", type=positive(int), help="whiten the features, over the training images, to so many "
        "principal directions; shows what a cosine hardly sees because it varies little")
    add("--per_class", action=yes_no, default=False, help="add the figure of each class at the first k")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="gets results.jsonl and the pictures")
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images per forward pass")
    add("--seed", type=not_negative(int), default=0, help="of random weights")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps or cpu")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="off", help="auto: bf16 on GPUs and "
        "CPUs that compute it natively")
    return parser


def add_split_flags(add: Callable) -> None:
    """Adds the flags of `load_split` and on the images to a group's `add`."""
    add("--img_size", type=positive(int), help="side of the crop; default: the weights' own, else 224")
    add("--val_fraction", type=number(float, lambda share: 0 < share < 1, "above 0 and below 1"), default=0.2,
        help="of each class, to test on; where there is no train/")
    add("--split_seed", type=not_negative(int), default=0, help="of that split, and of the part that "
        "eval_linear.py chooses a rate on")
    common.add_pixel_flags(add, tiles=False)


def add_weights_flags(add: Callable, also: str = "image_stats (mean and std per channel)") -> None:
    """Adds the flags that `prepare` takes to a group's `add`; `also`: what else --weights may be."""
    add("--weights", nargs="+", required=True, help="one or more: output folder, checkpoint, state dict, "
        f"name of timm's pretrained weights, random, {also}")
    add("--arch", help="timm name; for a bare state dict, and for random alone")
    add("--patch_size", type=positive(int), help="of a ViT; default: the weights' or the arch's own")
    add("--checkpoint_key", help="network of a checkpoint to take, such as student; default: the one that "
        "its run exports")
    add("--allow_partial", action=argparse.BooleanOptionalAction, default=False,
        help="accept weights that leave tensors at their initial values")


def changed_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of the flags that are not at their defaults."""
    return [name for name in vars(args) if getattr(args, name) != parser.get_default(name)]


def check_mode(args: argparse.Namespace, changed: Sequence[str], also: Sequence[str] = ()) -> None:
    """For evaluations that train: fails unless they train and test, or predict with few flags `changed`.

    `also`: more flags that --predict takes.
    """
    if (args.data_path is None) == (args.predict is None):
        common.fail("--data_path or --predict: give one of the two")
    if args.predict and len(args.weights) > 1:
        common.fail(f"--weights {' '.join(args.weights)}: one at a time with --predict")
    if args.predict and (other := [name for name in changed if name not in (*PREDICT_FLAGS, *also)]):
        common.fail(f"--{other[0]}: not with --predict, which keeps to the values of the training")
    common.check_bands(args, None)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


PREDICT_FLAGS = "predict weights num_workers batch_size_per_gpu output_dir device amp".split()
NB_KNN = [10, 20, 100, 200]  # DINO's k's
RANK_IMAGES = 25_000  # RankMe's number for the effective rank
FIGURES = {"top1": "top-1", "micro_ap": "micro AP", "macro_ap": "macro AP", "micro_f1": "micro F1"}
NO_LABELS = "neither two class folders nor a labels.csv"
GREEN, RED = (0.1, 0.7, 0.2), (0.9, 0.1, 0.1)
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass
class Labelled:
    """Images and their labels: N class numbers, or multi-label N x C of 0 and 1, any number for an image."""

    paths: common.Paths
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, mask: Tensor) -> "Labelled":
        """The images where `mask` (N) is true, in their order."""
        return Labelled(self.paths[mask.nonzero().flatten().numpy()], self.labels[mask])


def draw_share(labels: Tensor, share: float, *key: int | str, names: Sequence[str] | None = None,
               may_be_all: bool = False) -> Tensor:
    """True for about `share` of the images of each class, at least one of two: labels N or N x C -> N.

    The rarest class draws first, and what it has decided on an image stays; images without a class draw as
    one. Of one label each, a smaller share is a part of a larger. The draws come from `key` and the class, by
    `names` or its number. `may_be_all`: a class of one image is drawn; else no class is drawn whole.
    """
    if labels.ndim == 1:
        members = [(labels == c).nonzero().flatten() for c in range(int(labels.max()) + 1)]
    else:
        members = [column.nonzero().flatten() for column in [*labels.T, (labels == 0).all(1)]]
    names = range(len(members)) if names is None else [*names, ""]
    drawn, decided = torch.zeros(len(labels), dtype=torch.bool), torch.zeros(len(labels), dtype=torch.bool)
    for c in sorted(range(len(members)), key=lambda c: len(members[c])):
        left = members[c][~decided[members[c]]]
        count = max(1, round(share * len(members[c]))) - int(drawn[members[c]].sum())
        order = torch.randperm(len(left), generator=common.generator(*key, names[c]))
        drawn[left[order[: max(0, count)]]] = True
        decided[members[c]] = True
    for images in members:
        if may_be_all and not drawn[images].any():
            drawn[images[:1]] = True
        if not may_be_all and drawn[images].all():
            drawn[images[:1]] = False
    return drawn


def load_split(data_path: str, val_fraction: float, split_seed: int, exclude: Path | None = None,
               bands: list[int | str] | None = None) -> tuple[Labelled, Labelled, list[str], str]:
    """Training and test images, the class names, and the split in words.

    Of a folder with neither labels.csv nor two class folders all images come as training images, of no class.
    """
    root = Path(data_path)
    if not root.is_dir():
        common.fail(f"--data_path {root}: no such folder")
    if (root / "labels.csv").is_file():
        return read_labels(root, val_fraction, split_seed, exclude, bands)
    folders = class_folders(root, exclude, bands)
    test_name = next((name for name in ("val", "test") if name in folders), None)
    if "train" in folders and test_name and class_folders(root / "train", exclude, bands):
        parts, split = [root / "train", root / test_name], f"train/{test_name}"
    elif folders and {name.lower() for name in folders} <= SPLIT_NAMES:
        common.fail(f"--data_path {root}: holds {', '.join(folders)}; call them train and val (or test), "
                    "with class folders in each")
    else:
        parts, split = [root], f"{val_fraction:g} of each class, split_seed {split_seed}"
    if len(parts) == 1 and len(folders) < 2:
        paths = common.list_images(root, exclude, bands=bands)
        everything = Labelled(paths, torch.zeros(len(paths), dtype=torch.long))
        return everything, everything.part(everything.labels < 0), [], "no labels"
    names, of_part = [], []
    for part in parts:
        own = {name: common.list_images(part / name, exclude, bands=bands)
               for name in class_folders(part, exclude, bands)}
        if len(own) < 2 and not names:
            common.fail(f"--data_path: {part} has {len(own)} class folders, two or more are needed")
        names = names or list(own)
        if unknown := sorted(set(own) - set(names)):
            common.fail(f"--data_path {root}: {part.name}/ has classes that train/ lacks: "
                        + ", ".join(unknown))
        labels = [names.index(name) for name, paths in own.items() for _ in paths]
        paths = common.Paths.of([path for paths in own.values() for path in paths])
        of_part.append(Labelled(paths, torch.tensor(labels)))
    if len(of_part) == 1:
        of_part = split_off(*of_part, names, val_fraction, split_seed)
    return *of_part, names, split


def load_split_once(args: argparse.Namespace, process: Process) -> tuple[Labelled, Labelled, list[str], str]:
    """As load_split by `args`: the main process reads, the others check that their files are there."""

    def read() -> tuple:  # its failures end all processes alike
        try:
            return load_split(args.data_path, args.val_fraction, args.split_seed, Path(args.output_dir),
                              args.bands)
        except PermissionError as error:
            common.fail(f"--data_path {error.filename}: cannot be read: {error.strerror}")

    found = common.from_main(process, read)
    common.check_there(process, found[0].paths, args.data_path)
    if found[2] and found[1].labels.ndim == 2 and not found[1].labels.any():
        common.fail(f"--data_path {args.data_path}: no test image has a label")
    if process.is_main and found[3].startswith("labels.csv"):
        print(f"{args.data_path}: {found[3]}")
    return found


def class_folders(root: Path, exclude: Path | None, bands: list[int | str] | None) -> list[str]:
    """Names of the folders in `root` that may be classes: no output of runs, no folder of bands, an image."""
    folders = sorted(folder for folder in root.iterdir() if common.is_data(folder, exclude))
    if common.is_named(bands):
        folders = [folder for folder in folders if not any(
            common.is_band(file.name, band) for file in folder.iterdir() for band in bands)]
    return [folder.name for folder in folders]


def split_off(images: Labelled, names: list[str], val_fraction: float, split_seed: int) -> list[Labelled]:
    """Training and test images: a share of each class is for the test."""
    mask = draw_share(images.labels, val_fraction, split_seed, "split", names=names)
    if not mask.any():
        common.fail("--data_path: one image of each class leaves none to test on")
    return [images.part(~mask), images.part(mask)]


def read_labels(root: Path, val_fraction: float, split_seed: int, exclude: Path | None,
                bands: list[int | str] | None) -> tuple[Labelled, Labelled, list[str], str]:
    """As load_split, from root/labels.csv: path,labels or path,labels,split.

    Paths are relative to `root`; labels are joined by `|`. Where each image has one label they are classes.
    A split is train, val or test; without that column each class is split.
    """
    file = root / "labels.csv"
    found = {os.path.abspath(path): path for path in common.list_images(root, exclude, bands=bands)}
    rows, has_split = read_rows(file, found)
    paths = sorted(rows)  # as class folders would have them
    names, parts = [rows[path][0] for path in paths], [rows[path][1] for path in paths]
    classes = sorted(set().union(*names))
    if not classes or len(classes) < 2 and all(names):
        common.fail(f"--data_path: {file} names {len(classes)} labels, two or more are needed (a|b are two)")
    number = {name: c for c, name in enumerate(classes)}
    if all(len(own) == 1 for own in names):
        labels = torch.tensor([number[name] for own in names for name in own])
    else:
        labels = torch.zeros(len(names), len(classes))
        for row, own in zip(labels, names, strict=True):
            row[[number[name] for name in own]] = 1
    images, note = Labelled(common.Paths.of(paths), labels), ""
    if len(rows) < len(found):
        note = f", without {len(found) - len(rows)} images that it does not name"
    if not has_split:
        split = f"labels.csv, {val_fraction:g} of each class, split_seed {split_seed}{note}"
        return *split_off(images, classes, val_fraction, split_seed), classes, split
    if unknown := sorted(set(parts) - {"train", "val", "test"}):
        common.fail(f"--data_path: {file}: split {unknown[0]!r}: train, val or test are allowed")
    test_name = "val" if "val" in parts else "test"
    train, test = (images.part(torch.tensor([part == name for part in parts]))
                   for name in ("train", test_name))
    if not len(train) or not len(test):
        common.fail(f"--data_path: {file} has {len(train)} images of split train, {len(test)} of {test_name}")
    counts = [part.labels.sum(0) if part.labels.ndim == 2 else part.labels.bincount(minlength=len(classes))
              for part in (train, test)]
    if missing := [name for name, a, b in zip(classes, *counts, strict=True) if b and not a]:
        common.fail(f"--data_path: {file}: split {test_name} has labels that train lacks: "
                    + ", ".join(missing))
    if rest := len(images) - len(train) - len(test):
        note += f", without {rest} images of split test"
    return train, test, classes, f"labels.csv, train/{test_name}{note}"


def read_rows(file: Path, found: dict[str, str]) -> tuple[dict[str, tuple[set[str], str]], bool]:
    """Labels and split of each image that the rows of labels.csv name; whether there is a column of splits.

    found: absolute path -> path, of all images there are.
    """
    rows = {}
    with open(file, newline="", encoding="utf-8-sig", errors="surrogateescape") as text:
        try:
            table = csv.DictReader(text, strict=True)
            columns = table.fieldnames or []
            if sorted(columns) not in (["labels", "path"], ["labels", "path", "split"]):
                common.fail(f"--data_path: {file} begins with {','.join(columns)!r}, not with path,labels or "
                            "path,labels,split")
            for row in table:
                where = f"--data_path: {file}, line {table.line_num}"
                if None in row or None in row.values():
                    common.fail(f"{where}: not {len(columns)} columns")
                path = found.get(os.path.abspath(file.parent / row["path"]))
                if path is None or path in rows:
                    common.fail(f"{where}: {row['path']!r}: "
                                + ("no such image" if path is None else "named before"))
                labels = {name for name in map(str.strip, row["labels"].split("|")) if name}
                rows[path] = labels, row.get("split", "").strip()
        except csv.Error as error:
            common.fail(f"--data_path: {file}, line {table.reader.line_num}: {error}")
    return rows, "split" in columns


@dataclass
class Backbone:
    """A network to evaluate and the images that it takes."""

    model: nn.Module | None  # B x C x img_size x img_size -> B x D; None: pixels
    img_size: int
    mean: Sequence[float]  # C, of the channels
    std: Sequence[float]
    arch: str | None  # None: image_stats, pixels
    report: str  # where its weights come from
    bands: list[int | str] | None = None  # see common.read_image
    dtype: torch.dtype | None = None  # of the pixels; others are unreadable

    def images(self, paths: Sequence[str]) -> common.Samples:
        """The images as their files have them."""
        return common.Samples(paths, len(self.mean), self.bands, dtype=self.dtype)


class CenterCrops(torch.utils.data.Dataset):
    """Images for a backbone, the shorter side resized to 256/224 of its size, then cut at the centre."""

    def __init__(self, paths: Sequence[str], backbone: Backbone):
        self.images, self.img_size = backbone.images(paths), backbone.img_size
        self.mean, self.std = backbone.mean, backbone.std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Returns the normalised crop C x img_size x img_size, `index`, ""; unreadable: zeros, -1, why."""
        try:
            crop = self.crop(self.images[index])
        except common.UnreadableImageError as error:
            return torch.zeros(len(self.mean), self.img_size, self.img_size), -1, str(error)
        x = common.to_float(crop, self.mean, self.std)
        return common.normalize(x, self.mean, self.std, crop.dtype).contiguous(), index, ""

    def picture(self, index: int) -> Tensor:
        """The crop of an image that is readable as red, green and blue in [0, 1]."""
        return common.to_picture(self[index][0], self.mean, self.std, self.images.dtype)

    def crop(self, image: Tensor) -> Tensor:
        """The middle of the image C x H x W: C x img_size x img_size."""
        image = resize(image, [self.img_size * 256 // 224], InterpolationMode.BICUBIC, antialias=True)
        return center_crop(image, [self.img_size, self.img_size])


# --------------------------------------------------------------------------------------------------
# Model: features of all images
# --------------------------------------------------------------------------------------------------


class ImageStats(nn.Module):
    """Mean and standard deviation of each channel: what a backbone has to beat.

    Both evaluations then standardise each of them over the training images.
    """

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W -> N x 2C."""
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def prepare(args: argparse.Namespace, process: Process, paths: Sequence[str], drop_path: float = 0,
            baselines: Sequence[str] = ("random", "image_stats")) -> list[Backbone]:
    """Builds and fills the backbone of each of --weights; a baseline takes after the first of the others.

    Sets args.in_chans: as given, or as many as --bands, or as the first weights have, else 3. `paths`: the
    training images, whose pixels are looked at.
    """
    sources = {name: common.read_weights(name, args.checkpoint_key) for name in args.weights
               if name not in baselines}
    borrowed = next((info for _, info in sources.values()), {})
    common.check_bands(args, len(borrowed.get("mean", common.IMAGENET_MEAN)))
    samples = common.Samples(paths, args.in_chans, args.bands)

    def measure() -> common.PixelStats:
        found = common.measure_pixels(samples, 32)
        if args.in_chans == 3 and found.dtype == torch.uint8:
            return found
        return common.measure_pixels(samples)  # the values may serve

    found = common.from_main(process, measure)
    values = {name: pixel_values(name, info, found, process) for name, (_, info) in sources.items()}
    values = values or {"": pixel_values("", {}, found, process)}
    usual = next(iter(values.values()))
    if process.is_main and any(mean is found.mean for mean, _ in values.values()):
        print(f"measured on some training images: {found.words()}")
    backbones = []
    for name in args.weights:
        state, info = sources.get(name, ({}, borrowed))
        backbones.append(build(name, state, info, *values.get(name, usual), found.dtype, args, drop_path))
    return backbones


def pixel_values(name: str, info: dict, found: common.PixelStats,
                 process: Process) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of each channel to normalise by.

    The weights' own, where `info` has them; else ImageNet's for 8-bit RGB; else those `found` in the images.
    The weights' own bring a warning where they are far from those found. For other than 8-bit pixels, of
    which to_float keeps three deviations, they would leave nothing then, and those found are taken.
    """
    mean, std, eight_bit = info.get("mean", ()), info.get("std", ()), found.dtype == torch.uint8
    if len(mean) == len(found.mean):
        fit = found.fit(mean, std)
        if not fit and process.is_main:
            print(f"warning: mean and std of {name} are far from the images' own, {found.words()}"
                  + ", which are taken" * (not eight_bit), file=sys.stderr)
        if fit or eight_bit:
            return mean, std
    elif eight_bit and len(found.mean) == 3:
        return common.IMAGENET_MEAN, common.IMAGENET_STD
    return found.mean, found.std


def build(name: str, state: dict, info: dict, mean: Sequence[float], std: Sequence[float],
          dtype: torch.dtype | None, args: argparse.Namespace, drop_path: float = 0) -> Backbone:
    """Builds the network of the weights `name` and fills it from `state`, of which `info` is known."""
    built_size = info.get("img_size", 224)  # a side, or height and width
    img_size = args.img_size or min(to_2tuple(built_size))
    if name == "image_stats":
        if dtype == torch.uint8:  # the colours as they are
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        report = "image_stats: mean and std"
        return Backbone(ImageStats(), img_size, mean, std, None, report, args.bands, dtype)
    if name == "pixels":
        return Backbone(None, img_size, mean, std, None, "pixels: the colours alone", args.bands, dtype)
    arch = args.arch or info.get("arch")
    if arch is None:
        common.fail(f"--weights {name}: give its --arch")
    if info.get("arch") not in (None, arch):
        common.fail(f"--arch {arch}: {name} holds {info['arch']}")
    torch.manual_seed(args.seed)
    built_size = built_size if isinstance(built_size, tuple) else img_size  # its positions are of that grid
    patch_size = args.patch_size or info.get("patch_size")
    model = common.build_backbone(arch, built_size, patch_size, drop_path, len(mean), info.get("global_pool"))
    report = f"{name}: initial weights of seed {args.seed}"
    if state:
        report = common.load_backbone(model, state, name, args.allow_partial)
    return Backbone(model, img_size, mean, std, arch, f"{arch}: {report}", args.bands, dtype)


def weights_digest(model: nn.Module) -> str:
    """Digest of the weights: a run is not resumed with others of the same name."""
    digest = hashlib.blake2b(digest_size=8)
    for x in model.state_dict().values():
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def check_patches(backbones: list[Backbone]) -> None:
    """Fails where the centre crops are not of whole patches."""
    for backbone in backbones:
        if backbone.img_size % (multiple := common.patch_multiple(backbone.model)):
            common.fail(f"--img_size {backbone.img_size}: must be a multiple of the patch, {multiple}")
        try:
            with torch.no_grad():
                backbone.model.eval()(torch.zeros(1, len(backbone.mean), *[backbone.img_size] * 2))
        except Exception as error:  # a net built for one size, as BEiT and MLP-Mixer are
            common.fail(f"--img_size {backbone.img_size}: {backbone.arch} cannot take it: {error}")


def center_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of N x D features over the images; 1 where all images have the same."""
    spread = x.std(0, correction=min(1, len(x) - 1))
    return x.mean(0), torch.where(spread > 1e-6 * x.abs().amax(0), spread, 1)


@torch.inference_mode()
def extract_features(backbone: Backbone, dataset: torch.utils.data.Dataset, args: argparse.Namespace,
                     process: Process, may_lose: float = 0.01) -> tuple[Tensor, Tensor]:
    """Features M x D (float32, unnormalised) of the readable images, and their numbers M, in every process.

    The network goes to the device and into eval mode. Batches are dealt out to the processes whole, so each
    is the same whatever their number. Fails when more than the share `may_lose` of the images are
    unreadable, or a feature is not finite.
    """
    batches = torch.arange(len(dataset)).split(args.batch_size_per_gpu)
    mine = [batch.tolist() for batch in batches[process.rank :: process.world_size]]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=mine, num_workers=common.worker_count(args.num_workers),
        pin_memory=process.device.type == "cuda")
    model, autocast = backbone.model.to(process.device).eval(), common.autocast(args.amp, process.device)
    own, unreadable = [], []
    quiet = not (process.is_main and sys.stderr.isatty())
    for images, numbers, message in tqdm(loader, "features", leave=False, disable=quiet):
        with autocast:
            own.append((model(images.to(process.device, non_blocking=True)).float().cpu(), numbers))
        unreadable += filter(None, message)
    for message in unreadable:
        print(f"warning: unreadable, left out: {common.one_line(message)}", file=sys.stderr)
    parts = common.gather_objects(own, process)
    # Batch number i was the process i % world_size's next one.
    in_order = [parts[i % process.world_size][i // process.world_size] for i in range(len(batches))]
    features, index = (torch.cat(column) for column in zip(*in_order, strict=True))
    lost = int((index < 0).sum())
    if lost == len(dataset):
        common.fail(f"none of the {lost} images is readable", code=1)
    if lost > may_lose * len(dataset):
        common.fail(f"{lost} of {len(dataset)} images are unreadable, more than {100 * may_lose:g} %", code=1)
    features, index = features[index >= 0], index[index >= 0]
    if not features.isfinite().all():
        common.fail("not all features are finite: damaged weights, or try --amp off", code=1)
    return features, index


# --------------------------------------------------------------------------------------------------
# Vote
# --------------------------------------------------------------------------------------------------


def knn_predict(train: Tensor, labels: Tensor, test: Tensor, ks: list[int], temperature: float,
                chunk_elements: int = 2**24) -> Tensor:
    """Predicted classes by weighted vote, for all k from one top-k: M x len(ks), in the order of `ks`.

    `train` N x D and `test` M x D are features of unit length, `labels` N class numbers; or N x C of 0 and 1,
    which give M x len(ks) x C, the share of the vote that each class has. A vote weighs exp(cosine / tau),
    tau being `temperature`, here divided by that of the nearest neighbour: the same vote, without overflow,
    and a small tau leaves the nearest its weight. `chunk_elements`: similarities held at once.
    """
    multi_label, ascending = labels.ndim == 2, sorted(set(ks))
    C, predictions = labels.shape[1] if multi_label else int(labels.max()) + 1, []
    of_query = max(len(train), C * ascending[-1] if multi_label else C)  # numbers held for a test image
    for chunk in test.split(max(1, chunk_elements // of_query)):
        similarity, neighbours = (chunk @ train.T).topk(ascending[-1], dim=1)  # m x k, the nearest first
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes, of_k, counted = torch.zeros(len(chunk), C, device=test.device), {}, 0
        for k in ascending:  # k's voters are those of the smaller k and the next ones
            voters, weight = neighbours[:, counted:k], weights[:, counted:k]
            if multi_label:
                votes += torch.einsum("mk,mkc->mc", weight, labels[voters])
                of_k[k] = votes / weights[:, :k].sum(1, keepdim=True)
            else:
                votes.scatter_add_(1, labels[voters], weight)
                of_k[k] = votes.argmax(1)
            counted = k
        predictions.append(torch.stack([of_k[k] for k in ks], 1))
    return torch.cat(predictions)


# --------------------------------------------------------------------------------------------------
# Figures and pictures
# --------------------------------------------------------------------------------------------------


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Sum over thresholds of (recall - recall before) * precision; equal scores share one. N, N -> 0 to 1."""
    scores, order = scores.sort(descending=True)
    last = torch.ones_like(scores, dtype=torch.bool)  # of its score
    last[:-1] = scores[1:] != scores[:-1]
    hits = positive[order].double().cumsum(0)[last]
    above = torch.arange(1, len(scores) + 1)[last]  # images at or above the threshold
    return (hits.diff(prepend=hits.new_zeros(1)) * hits / above).sum().item() / hits[-1].item()


def multi_label_figures(scores: Tensor, labels: Tensor,
                        threshold: float = 0.5) -> tuple[dict[str, float], list[float | None]]:
    """Average precision and F1 of scores M x C and labels M x C of 0 and 1, in percent.

    Returns micro_ap, over all answers, macro_ap, over the classes with an image, micro_f1, of scores above
    `threshold`; and the average precision of each class.
    """
    if not labels.any():
        common.fail("--data_path: no test image has a label")
    of_class = [100 * average_precision(s, y) if y.any() else None
                for s, y in zip(scores.T, labels.T, strict=True)]
    present = [value for value in of_class if value is not None]
    yes, true = scores > threshold, labels > 0
    figures = {"micro_ap": 100 * average_precision(scores.flatten(), labels.flatten()),
               "macro_ap": sum(present) / len(present),
               "micro_f1": 200 * int((yes & true).sum()) / max(1, int(yes.sum() + true.sum()))}
    return ({name: round(value, 3) for name, value in figures.items()},
            [None if value is None else round(value, 3) for value in of_class])


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values, which sum to 1, of N x D: from 1 to min(N, D).

    RankMe: Q. Garrido et al., ICML 2023. Low where few directions carry all of the features.
    """
    share = torch.linalg.svdvals(features.float())
    share = share / share.sum().clamp(min=1e-12) + 1e-7
    return math.exp(-(share * share.log()).sum())


def whiten(x: Tensor, N: int, count: int) -> Tensor:
    """Features x D in their first `count` principal directions, of mean 0 and variance 1 over the first N."""
    x = (x - x[:N].mean(0)).double()
    variance, directions = torch.linalg.eigh(x[:N].T @ x[:N] / N)  # ascending
    rank = int((variance > 1e-10 * variance[-1]).sum())
    if count > rank:
        common.fail(f"--whiten {count}: the features of {N} training images vary in {rank} directions")
    return (x @ (directions[:, -count:] / variance[-count:].sqrt())).float()


def nearest(x: Tensor, queries: list[int], N: int) -> list[list[int]]:
    """Of each query its number, then those of the eight among the first N nearest to it, itself left out.

    x: unit length, the first N images and maybe others x D.
    """
    similarity = x[queries] @ x[:N].T
    similarity[torch.tensor(queries)[:, None] == torch.arange(N)] = -math.inf
    found = similarity.topk(min(8, N - (min(queries) < N)), 1).indices.tolist()
    return [[query, *row] for query, row in zip(queries, found, strict=True)]


def save_neighbours(path: Path, rows: list[list[int]], images: CenterCrops, labels: Tensor | None) -> None:
    """Writes a picture with a query in each row, and its nearest images.

    With labels, for all `images`, the frame is green where one is the query's too, else red.
    """
    pictures = []
    for query, *others in rows:
        pictures.append([])
        for i in [query, *others]:
            colour = (1.0, 1.0, 1.0)
            if labels is not None and i != query:
                shared = labels[i] == labels[query] if labels.ndim == 1 else labels[i] * labels[query]
                colour = GREEN if shared.any() else RED
            bands = zip(images.picture(i), colour, strict=True)
            pictures[-1].append(torch.stack([F.pad(band, [4] * 4, value=value) for band, value in bands]))
    common.save_grid(path, pictures)


def map_colours(maps: Tensor) -> Tensor:
    """The first three principal components over all positions of B x D x h x w, as colours B x 3 x h x w.

    Each is spread over [0, 1], where 1 % at either end is cut off.
    """
    B, D, h, w = maps.shape
    x = maps.permute(0, 2, 3, 1).reshape(-1, D)
    x = x - x.mean(0)
    axes = torch.linalg.svd(x, full_matrices=False).Vh[:3]  # 3 x D
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the sign is free: fix it
    x = x @ axes.T
    low, high = x.quantile(0.01, 0), x.quantile(0.99, 0)
    x = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return F.pad(x, (0, 3 - len(axes))).view(B, h, w, 3).permute(0, 3, 1, 2)


@torch.inference_mode()
def save_features(path: Path, backbone: Backbone, images: CenterCrops, chosen: list[int],
                  process: Process) -> None:
    """Writes a picture of the chosen images, two a row if even, each beside the colours of its last map."""
    batch = torch.stack([images[i][0] for i in chosen])
    maps = backbone.model.forward_intermediates(
        batch.to(process.device), indices=1, norm=True, intermediates_only=True)[-1]
    colours = F.interpolate(map_colours(maps.float().cpu()), batch.shape[-2:])
    pictures = [common.to_picture(x, backbone.mean, backbone.std, backbone.dtype) for x in batch]
    cells = [cell for pair in zip(pictures, colours, strict=True) for cell in pair]
    width = 4 if len(chosen) % 2 == 0 else 2
    common.save_grid(path, [cells[i : i + width] for i in range(0, len(cells), width)])


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def choose_ks(given: list[int] | None, N: int, images: str) -> list[int]:
    """The k's `given`, which must not be above N, the number of `images`; else the usual ones up to N."""
    if given is None:
        return [k for k in NB_KNN if k <= N] or [N]
    if max(given) > N:
        common.fail(f"--nb_knn {' '.join(map(str, given))}: must be from 1 to the number of {images}, {N}")
    return given


def vote(x: Tensor, labels: Tensor, N: int, classes: list[str], args: argparse.Namespace,
         process: Process) -> dict:
    """Figures in percent for each k, and with --per_class those of each class at the first k.

    `x`, of unit length, and `labels`, class numbers or 0 and 1 for each class, are of N training images, then
    of the test images, which the processes share out.
    """
    ks = choose_ks(args.nb_knn, N, "training images that are readable")
    own, truth = x[N:].tensor_split(process.world_size)[process.rank], labels[N:]
    own = knn_predict(*(tensor.to(process.device) for tensor in (x[:N], labels[:N], own)), ks,
                      args.temperature)
    parts = common.gather_objects(own.cpu(), process)
    predicted = torch.cat(parts)  # M x len(ks), or x C
    result = {}
    for i, k in enumerate(ks):
        if labels.ndim == 2:
            figures, of_class = multi_label_figures(predicted[:, i], truth)
        else:
            right = (predicted[:, i] == truth).double()
            figures = {"top1": round(100 * right.mean().item(), 3)}
            of_class = [right[truth == c] for c in range(len(classes))]
            of_class = [round(100 * own.mean().item(), 3) if len(own) else None for own in of_class]
        for name, value in figures.items():
            result.setdefault(name, {})[str(k)] = value
        if args.per_class and i == 0:
            result["per_class"] = of_class
    return result


def evaluate(backbone: Backbone, both: Labelled, N: int, classes: list[str], args: argparse.Namespace,
             process: Process, suffix: str) -> dict:
    """Figures of a backbone; draws its pictures, whose names end with `suffix`.

    `both`: N training images, then those to test on. Without classes there are label-free figures alone.
    """
    images, labels = CenterCrops(both.paths, backbone), both.labels
    x, index = extract_features(backbone, images, args, process)
    N = int((index < N).sum())  # those that are readable
    if N == 0 or N == len(x) and classes:
        common.fail("no training image, or no test image, is readable", code=1)
    if isinstance(backbone.model, ImageStats):
        center, spread = center_and_spread(x[:N])
        x = (x - center) / spread
    result = {"train_images": N, "test_images": len(x) - N} if classes else {"images": N}
    if process.is_main:
        some = x[torch.arange(min(N, RANK_IMAGES)) * N // min(N, RANK_IMAGES)]
        result |= {"effective_rank": round(effective_rank(some), 2),
                   "feature_std": round(common.feature_std(some).item(), 4)}
    x = F.normalize(whiten(x, N, args.whiten) if args.whiten else x, dim=1)
    if classes:
        result = vote(x, labels[index], N, classes, args, process) | result
    if process.is_main:
        begin, count = (N, len(x) - N) if classes else (0, N)
        queries = [begin + i * count // min(8, count) for i in range(min(8, count))]
        rows = [index[row].tolist() for row in nearest(x, queries, N)]
        out = Path(args.output_dir)
        save_neighbours(out / f"neighbours{suffix}.png", rows, images, labels if classes else None)
        if hasattr(backbone.model, "forward_intermediates"):  # image statistics have no maps
            save_features(out / f"features{suffix}.png", backbone, images, [row[0] for row in rows], process)
    return result


@contextlib.contextmanager
def load_saved(folder: Path, name: str) -> Iterator[dict]:
    """What an evaluation that trains left for --predict; what fails under `with` is the file's fault."""
    if not (folder / name).is_file():
        common.fail(f"--weights {folder}: no {name} in it; give the --output_dir of a run of this script, "
                    "or, of several --weights, the folder of one in it")
    try:
        yield common.load_checkpoint(folder / name)
    except Exception as error:  # a file may hold anything
        reason = common.one_line(error) if isinstance(error, ValueError) else common.one_line(repr(error))
        common.fail(f"--weights {folder}: {name}: not as a run of this script leaves it: {reason[:300]}")


def add_result(line: dict, began: float, lines: list[dict], out: Path, process: Process) -> None:
    """Adds a line, with its seconds, to `lines` and to results.jsonl in `out`: a later failure loses none."""
    lines.append(line | {"seconds": round(time.perf_counter() - began, 1)})
    if process.is_main:
        with common.writing(out / "results.jsonl"), open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(lines[-1]) + "\n")


def print_table(lines: list[dict], classes: list[str]) -> None:
    """Figures in percent, a row for each of the weights and a column for each k; then the label-free ones."""
    width = max(len(line["weights"]) for line in lines)
    tables = [(name, list(lines[0][name])) for name in FIGURES if name in lines[0]]
    for name, ks in tables:
        print(f"\nkNN {FIGURES[name]} in %, {lines[0]['train_images']} training and "
              f"{lines[0]['test_images']} test images, {len(classes)} classes"
              + f" (chance {100 / len(classes):.1f} %)" * (name == "top1")
              + f", whitened to {lines[0]['whiten']} directions" * bool(lines[0]["whiten"]))
        print(" " * width + "".join(f"{'k ' + k:>9}" for k in ks))
        for line in lines:
            print(f"{line['weights']:{width}}" + "".join(f"{line[name][k]:9.2f}" for k in ks))
    print(f"\n{'':{width}}  effective rank  feature_std (of up to {RANK_IMAGES:,} images, without labels)")
    for line in lines:
        print(f"{line['weights']:{width}}{line['effective_rank']:16.1f}{line['feature_std']:13.3f}")
    if tables:
        name = "top-1" if tables[0][0] == "top1" else "average precision"
        print_classes(f"{name} of each class at k {tables[0][1][0]}", lines, classes)


def print_rows(title: str, rows: Sequence[Sequence[str | float | None]]) -> None:
    """A table of rows of a name and figures or words; None is a dash."""
    words = [["-" if x is None else x if isinstance(x, str) else f"{x:.2f}" for x in row] for row in rows]
    first, other = max(len(row[0]) for row in words), max(len(word) for row in words for word in row[1:])
    print(f"\n{title}")
    for name, *values in words:
        print(f"{name:{first}}" + "".join(f"{word:>{max(9, other) + 2}}" for word in values))
    print()


def print_classes(title: str, lines: list[dict], classes: list[str]) -> None:
    """The figures of each class, with --per_class: a column for each of the weights, and their share."""
    if "per_class" not in lines[0]:
        return print()
    shares = [line.get("train_fraction", 1) for line in lines]
    names = [Path(line["weights"]).name[-18:] + (f" {100 * share:g} %" if share < 1 else "")
             for line, share in zip(lines, shares, strict=True)]
    print_rows(title, [["", *names], *zip(classes, *(line["per_class"] for line in lines), strict=True)])


def main() -> None:
    """Checks everything, then evaluates each of the weights."""
    args = get_parser().parse_args()
    common.check_bands(args, None)
    process = common.init_process(args.device)
    common.choose_attention(args.amp, process.device)
    out = common.make_output_dir(args.output_dir, process)
    train, test, classes, split = load_split_once(args, process)
    if not classes and (args.nb_knn or args.per_class):
        common.fail(f"--nb_knn, --per_class: {args.data_path} has {NO_LABELS}")
    ks = choose_ks(args.nb_knn, len(train), "training images")
    if process.is_main and not classes:
        print(f"{args.data_path} has {NO_LABELS}: label-free figures only")
    elif process.is_main and args.nb_knn is None and ks != NB_KNN:
        left_out = " ".join(str(k) for k in NB_KNN if k not in ks)
        print(f"--nb_knn: {left_out} left out, above the number of training images, {len(train)}")
    backbones = prepare(args, process, train.paths)
    check_patches(backbones)
    both = Labelled(common.Paths.of([*train.paths, *test.paths]), torch.cat([train.labels, test.labels]))

    lines, versions = [], common.versions()
    for name, backbone in zip(args.weights, backbones, strict=True):
        began = time.perf_counter()
        if process.is_main:
            print(backbone.report, flush=True)
        suffix = re.sub(r"[^A-Za-z0-9.-]+", "_", f"_{len(lines) + 1}_{name[-60:]}") * (len(backbones) > 1)
        result = evaluate(backbone, both, len(train), classes, args, process, suffix)
        add_result({"task": "knn" if classes else "label-free", "weights": name,
                    "checkpoint_key": args.checkpoint_key, "arch": backbone.arch,
                    "patch_size": args.patch_size, "data": args.data_path, "split": split,
                    "in_chans": args.in_chans, "bands": args.bands, "img_size": backbone.img_size,
                    "temperature": args.temperature, "whiten": args.whiten, "amp": args.amp,
                    "seed": args.seed, "loading": backbone.report, **result, "versions": versions},
                   began, lines, out, process)
    if process.is_main:
        print_table(lines, classes)
        print("\n".join(map(json.dumps, lines)), flush=True)
    process.leave()


if __name__ == "__main__":
    main()

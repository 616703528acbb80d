"""Detection of oriented or horizontal boxes: a rotated FCOS on any backbone, and its average precision.

Z. Tian et al., "FCOS: Fully convolutional one-stage object detection", ICCV 2019. X. Yang et al., "Learning
high-precision bounding box for rotated object detection via Kullback-Leibler divergence", NeurIPS 2021.

    # a short run on a CPU, beside untrained weights
    python demo/scenes.py --output_dir demo/data --detection 60
    python eval_detection.py --data_path demo/data/detection --weights demo/output random --img_size 128 \
        --fpn_dim 64 --head_convs 2 --lr 2e-3 --epochs 40 --batch_size_per_gpu 4 --output_dir BOXES
    # DOTA, one GPU: windows of 1024 px; the second command: the papers' recipe
    python eval_detection.py --data_path DOTA --weights OUT --output_dir DETECT
    python eval_detection.py --data_path DOTA --weights OUT --output_dir DETECT_SGD --optimizer sgd \
        --lr .005 --schedule 8 11
    # then the boxes of new images
    python eval_detection.py --predict NEW_IMAGES --weights DETECT --output_dir DETECT

Each position of a pyramid of maps predicts a class, the distances to the four sides of its object's box, and
the box's angle. No anchors, no special CUDA operators: the figures compare backbones, the best detectors
get more. Read `assign`, `decode`, `kld_loss` and `detection_loss` first.

    symbol    variable      flag (default)            what
    B         B             batch_size_per_gpu (2)    windows per process and micro-batch
    S         S             img_size (1024)           side of the windows
    P         P             -                         positions: all cells of all maps
    C, K      C, K          in_chans (3)              bands, classes
    N, M      -             -                         boxes
    s         strides       p2 (off)                  pixels between positions: 8 to 128, with p2 4 too
    l t r b   sides         -                         distances to a box's sides, in the box's own axes
    theta     angle         boxes                     of the longer side, in [-pi/2, pi/2), y downwards

DATA_PATH holds train/ and val/ (or test/), each with images/ and labelTxt/ (DOTA: x1 y1 ... x4 y4 class
difficult) or labels/ (YOLO: class cx cy w h, or class and four corners, in shares of the image); or
images/train, labels/train. DATA_PATH/classes.txt names YOLO's numbers. An image without labels has no
objects.

Differs from the authors' code: no scale per level, GIoU or KLD with an angle term instead of rotated IoU
(KLD has no gradient for the angle of a square), 8 turns and flips, AdamW by default.

In OUT, or in a folder in it for each of several weights: checkpoint.pth, detector.pth, backbone/, log.jsonl,
examples.png (truth, prediction). In OUT: results.jsonl, with AP at IoU .5 by the area under the curve and by
eleven points (VOC 2007, DOTA) and at higher IoU; predictions/, texts as DOTA's labels with scores.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import timm.layers
import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

import common
import eval_segmentation
from common import Process, not_negative, positive
from eval_knn import add_result, add_weights_flags, build, load_saved, prepare, print_rows, weights_digest
from eval_segmentation import NOT_FINITE, STRIDES, Pyramid, check_mode, folder_name, rescale, stem

SAVED_FLAGS = "img_size in_chans bands boxes arch p2 fpn_dim head_convs".split()  # with a detector
SETTINGS = """patch_size finetune epochs batch_size_per_gpu accum_steps optimizer lr backbone_lr schedule
    weight_decay seed amp checkpoint_key allow_partial""".split()  # also in a line of results
CLIP_GRAD = 35.0  # greatest norm of the gradient, as in the papers
SCORE, MOST_BOXES = 0.05, 2000  # boxes of an image that go on to non-maximum suppression: above, at most
NMS_IOU = {True: 0.1, False: 0.5}  # of oriented boxes, of horizontal ones

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="train/ and val/ (or test/), each with images/ and labelTxt/ or labels/")
    add("--predict", help="instead: find boxes in this folder's images, with an --output_dir as --weights")
    add("--boxes", choices=["auto", "oriented", "horizontal"], default="auto", help="auto: as labels are")
    add("--img_size", type=positive(int), default=1024, help="side of windows that images are cut into")
    common.add_pixel_flags(add, tiles=False)

    add = parser.add_argument_group("model").add_argument
    add_weights_flags(add, "or, with --predict, a folder of this script")

    add = parser.add_argument_group("method").add_argument
    add("--finetune", action=yes_no, default=True, help="train the backbone too; without: it stays frozen")
    add("--p2", action=yes_no, default=False, help="add maps at stride 4: finds objects under 20 "
        "px better, takes three times as long")
    add("--fpn_dim", type=positive(int), default=256, help="channels of pyramid and heads; 64 on a CPU")
    add("--head_convs", type=positive(int), default=4, help="convolutions of each head; 2 on a CPU")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=12, help="we recommend 4,000 steps or more: small data needs "
        "more epochs")
    add("--batch_size_per_gpu", type=positive(int), default=2, help="windows per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="the papers: sgd")
    add("--lr", type=positive(float), default=1e-3, help="not scaled to the batch; we recommend 2e-3 on "
        "small data; the papers: .005 for two images, with sgd")
    add("--backbone_lr", type=positive(float), help="default: .3 of --lr, sgd --lr, which is better for "
        "random weights too")
    add("--schedule", type=positive(int), nargs="+", help="epochs after which the rate is a tenth, 8 11 "
        "in the papers; default: cosine to 0")
    add("--weight_decay", type=not_negative(float), help="not on biases and norms; default: .05, sgd 1e-4")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags."""
    changed = check_mode(args, get_parser())
    if "backbone_lr" in changed and not args.finetune:
        common.fail(f"--backbone_lr {args.backbone_lr}: not with --no-finetune")
    if args.fpn_dim % 32 or args.fpn_dim < 64:  # 32 groups of two channels or more: a map may be one cell
        common.fail(f"--fpn_dim {args.fpn_dim}: must be a multiple of 32, at least 64")
    if args.schedule and max(args.schedule) >= args.epochs:
        common.fail(f"--schedule {' '.join(map(str, args.schedule))}: must be less than --epochs "
                    f"{args.epochs}")
    args.backbone_lr = args.backbone_lr or {"adamw": 0.3, "sgd": 1.0}[args.optimizer] * args.lr
    if args.weight_decay is None:
        args.weight_decay = {"adamw": 0.05, "sgd": 1e-4}[args.optimizer]


# --------------------------------------------------------------------------------------------------
# Boxes: N x 5, of centre x, y, width, height, angle; from the upper left corner of the image, in pixels
# --------------------------------------------------------------------------------------------------


def axes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors along width and height of boxes ... x 5: two of ... x 2."""
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    return torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)


def to_corners(boxes: Tensor) -> Tensor:
    """Boxes N x 5 -> corners N x 4 x 2, in order around the box."""
    u, v = axes(boxes)
    u, v = u * boxes[:, 2:3] / 2, v * boxes[:, 3:4] / 2
    return boxes[:, None, :2] + torch.stack([-u - v, u - v, u + v, v - u], 1)


def canonical(boxes: Tensor) -> Tensor:
    """The same boxes N x 5 with width at least height and angle in [-pi/2, pi/2)."""
    x, y, w, h, angle = boxes.unbind(1)
    angle = torch.where(w < h, angle + math.pi / 2, angle)
    angle = (angle + math.pi / 2).remainder(math.pi) - math.pi / 2
    return torch.stack([x, y, torch.maximum(w, h), torch.minimum(w, h), angle], 1)


def to_boxes(corners: Tensor, oriented: bool) -> Tensor:
    """Corners N x 4 x 2 in any order -> smallest rectangles N x 5; not oriented: upright ones, angle 0."""
    if not oriented:
        low, high = corners.amin(1), corners.amax(1)
        return torch.cat([(low + high) / 2, high - low, torch.zeros_like(low[:, :1])], 1)
    # A side of the smallest rectangle lies on a side of the hull, one of the six lines between two corners.
    first, second = torch.tensor(list(itertools.combinations(range(4), 2))).T
    direction = corners[:, second] - corners[:, first]  # N x 6 x 2
    angle = torch.atan2(direction[..., 1], direction[..., 0])
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    inside = torch.einsum("nkij,ncj->nkic", turn, corners)  # N x 6 x 2 x 4, along each direction and across
    low, high = inside.amin(-1), inside.amax(-1)
    best = (high - low).prod(-1).argmin(1)
    low, high, turn, angle = (x[torch.arange(len(x)), best] for x in (low, high, turn, angle))
    centre = torch.einsum("nij,ni->nj", turn, (low + high) / 2)
    return canonical(torch.cat([centre, high - low, angle[:, None]], 1))


def to_polygons(boxes: Tensor) -> np.ndarray:
    """Boxes N x 5 -> N polygons of shapely, whose corners lie on a grid of 1/1024 px.

    Two polygons that differ in their last bits alone have, for shapely 2.2, now and then no intersection.
    """
    return shapely.polygons(np.round(1024 * to_corners(boxes.double()).numpy()) / 1024)


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of polygons, broadcast; 0 where neither has an area."""
    intersection = shapely.area(shapely.intersection(a, b))
    return intersection / np.maximum(shapely.area(a) + shapely.area(b) - intersection, 1e-9)


def iou_matrix(a: Tensor, b: Tensor) -> np.ndarray:
    """Polygon IoU N x M of boxes N x 5 and M x 5."""
    a, b, iou = to_polygons(a), to_polygons(b), np.zeros((len(a), len(b)))
    i, j = shapely.STRtree(b).query(a)  # pairs whose upright hulls meet
    iou[i, j] = pair_iou(a[i], b[j])
    return iou


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes to keep, best first: those that no better one of their class overlaps too much."""
    order = scores.argsort(descending=True, stable=True)
    polygons, classes = to_polygons(boxes[order]), labels[order].numpy()
    (low, high), alive, kept = np.hsplit(shapely.bounds(polygons), 2), np.ones(len(order), bool), []
    for i in range(len(order)):
        if alive[i]:
            kept.append(i)
            # The later ones that are left, of this class, whose upright hull meets its own.
            near = alive & (classes == classes[i]) & ((low[i] < high) & (low < high[i])).all(1)
            rivals = i + 1 + np.flatnonzero(near[i + 1 :])
            alive[rivals[pair_iou(polygons[i], polygons[rivals]) > threshold]] = False
    return order[kept]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """An image and its objects."""

    path: str
    size: tuple[int, int]  # height, width
    boxes: Tensor  # N x 5
    labels: Tensor  # N class numbers
    difficult: Tensor  # N bool: in the evaluation they do not count, found or not


class SampleList(Sequence):
    """Images and their objects: `samples[i]` is a Sample, made of arrays that all of them share."""

    def __init__(self, samples: Sequence[Sample]):
        self.paths = common.Paths.of([sample.path for sample in samples])
        self.sizes = np.array([sample.size for sample in samples])  # N x 2
        self.ends = np.cumsum([len(sample.labels) for sample in samples])  # of their objects
        self.objects = [torch.cat(column) for column in list(zip(*samples, strict=True))[2:]]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        i = range(len(self))[index]
        own = slice(self.ends[i - 1] if i else 0, self.ends[i])
        return Sample(self.paths[i], tuple(self.sizes[i].tolist()), *(column[own] for column in self.objects))


def parse_label(line: str, yolo: bool, size: tuple[int, int]) -> tuple[np.ndarray, str, bool] | None:
    """A line of a label file -> corners 4 x 2 in pixels, class, difficult; None for a line of DOTA's head.

    Raises:
        ValueError: what is wrong with the line.
    """
    words = line.split()
    if not words or (not yolo and words[0].lower().startswith(("imagesource", "gsd"))):
        return None
    if len(words) not in ((5, 9) if yolo else (9, 10, 11)):
        raise ValueError(f"{len(words)} words, not " + ("class cx cy w h, or class and 4 corners" if yolo else
                                                        "x1 y1 x2 y2 x3 y3 x4 y4 class difficult"))
    name, rest = (words[0], words[1:]) if yolo else (words[8], words[:8])
    if yolo and not (name.isascii() and name.isdecimal() and len(name) < 5):
        raise ValueError(f"{name[:40]}: not a class number from 0 to 9999")
    if not yolo and len(words) > 9 and not words[9].isdecimal():
        raise ValueError(f"{words[9][:40]}: not 0 or 1 for difficult (a class has no blanks)")
    numbers, difficult = np.array(rest, dtype=np.float64), not yolo and len(words) > 9 and int(words[9]) > 0
    if len(numbers) == 4:
        x, y, w, h = numbers
        if min(w, h) <= 0:
            raise ValueError(f"a box of size {w:g} x {h:g}")
        numbers = np.array([x, y] * 4) + np.array([-w, -h, w, -h, w, h, -w, h]) / 2
    corners = numbers.reshape(4, 2) * (size[::-1] if yolo else 1)
    if not (np.abs(corners) < 1e6).all():  # NaN too
        raise ValueError("a corner a million pixels away")
    return corners, name, difficult


class Part(NamedTuple):
    """The files of train/ or val/."""

    name: str
    images: Path  # folders
    labels: Path
    yolo: bool  # or DOTA
    paths: common.Paths  # of the images


def find_part(args: argparse.Namespace, *names: str) -> Part:
    """The first of the parts `names` of --data_path, with the list of its images."""
    root = Path(args.data_path)
    for part, kind in itertools.product(names, ("labelTxt", "labels")):
        for images, labels in ((f"{part}/images", f"{part}/{kind}"), (f"images/{part}", f"{kind}/{part}")):
            if os.path.isdir(root / images) and os.path.isdir(root / labels):
                paths = common.list_images(root / images, args.output_dir, bands=args.bands)
                return Part(part, root / images, root / labels, kind == "labels", paths)
    common.fail(f"--data_path {root}: needs {names[0]}/images and {names[0]}/labelTxt (DOTA) or "
                f"{names[0]}/labels (YOLO)")


def read_part(part: Part, args: argparse.Namespace) -> list[tuple]:
    """Path, size and objects, as of parse_label, of all images that can be read."""
    read, outside, lost, files = [], [], [], set()
    for path in part.paths:
        file = part.labels / f"{stem(path, part.images)}.txt"
        if file in files:
            common.fail(f"--data_path: {path} and another image share the labels of {file}")
        files.add(file)
        try:
            size, objects = common.image_size(path, args.in_chans, args.bands, whole=True), []
        except common.UnreadableImageError as error:
            lost.append(str(error))
            continue
        try:
            lines = file.read_text("utf-8-sig", "replace").splitlines() if os.path.lexists(file) else []
        except OSError as error:
            common.fail(f"--data_path: {file}: cannot be read: {error.strerror}")
        for number, line in enumerate(lines, 1):
            try:
                parsed = parse_label(line, part.yolo, size)
            except ValueError as error:
                common.fail(f"--data_path: {file}, line {number}: {error}")
            if parsed and (parsed[0].max(0) > 0).all() and (parsed[0].min(0) < size[::-1]).all() \
                    and np.linalg.det(np.cov(parsed[0].T)) > 1e-6:  # not all corners on a line
                objects.append(parsed)
            elif parsed:
                outside.append(f"{file}, line {number}")
        read.append((path, size, objects))
    alone = [file for file in part.labels.rglob("*.txt") if file not in files]
    for rows, words in ((outside, "boxes outside their images or without area"), (lost, "unreadable images"),
                        (alone, "labels without an image")):
        if rows:
            print(f"warning: {len(rows)} {words}, left out: {common.one_line(rows[0])}", file=sys.stderr)
    if len(lost) > 0.01 * len(part.paths):
        common.fail(f"--data_path: {len(lost)} of {len(part.paths)} images are unreadable, more than 1 %", 1)
    if not any(not difficult for _, _, objects in read for *_, difficult in objects):
        common.fail(f"--data_path: {part.labels} has no box that is not difficult, for {len(read)} images")
    return read


def load_data(parts: list[Part], args: argparse.Namespace) -> tuple[SampleList, SampleList, list[str]]:
    """Training and test images and the classes' names; sets args.boxes if auto."""
    if parts[0].yolo != parts[1].yolo:
        common.fail(f"--data_path {args.data_path}: train/ and {parts[1].name}/ have labels in two formats")
    train, test = (read_part(part, args) for part in parts)
    for line in common.small_images([min(size) for _, size, _ in train], args.img_size, "padded"):
        print(line, file=sys.stderr)
    named, file = not parts[0].yolo, Path(args.data_path) / "classes.txt"  # YOLO: labels hold numbers
    found = sorted({name for _, _, objects in train + test for _, name, _ in objects})
    if listed := file.exists():
        try:
            text = file.read_text("utf-8-sig")
            classes = ["-".join(line.split()) for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            common.fail(f"--data_path: {file}: cannot be read: {error}")
        if len(set(classes)) < len(classes):
            common.fail(f"--data_path: {file}: names a class twice")
    elif not named:
        classes = [str(number) for number in range(max(map(int, found)) + 1)]
    else:
        classes = sorted({name for _, _, objects in train for _, name, _ in objects})
    numbers = {name if named or not listed else str(i): i for i, name in enumerate(classes)}
    if unknown := [name for name in found if name not in numbers]:
        known = f"{file} lacks" if listed else "train/ lacks (list them in classes.txt)"
        common.fail(f"--data_path: unknown classes, which {known}: {', '.join(unknown[:10])}")
    corners = [torch.tensor(np.array([x[0] for x in objects])).float().view(-1, 4, 2)  # N x 4 x 2 per image
               for _, _, objects in train + test]
    if args.boxes == "auto":  # horizontal: no smallest rectangle is smaller than the upright one
        tight, upright = (to_boxes(torch.cat(corners), turned)[:, 2:4].prod(1) for turned in (True, False))
        args.boxes = "oriented" if (tight < 0.99 * upright).any() else "horizontal"
    samples = [Sample(path, size, to_boxes(own, args.boxes == "oriented"),
                      torch.tensor([numbers[name] for _, name, _ in objects], dtype=torch.long),
                      torch.tensor([difficult for *_, difficult in objects], dtype=torch.bool))
               for (path, size, objects), own in zip(train + test, corners, strict=True)]
    return SampleList(samples[: len(train)]), SampleList(samples[len(train) :]), classes


def windows_of(size: tuple[int, int], img_size: int) -> list[tuple[int, int]]:
    """Tops and lefts of windows that cover an image; a fifth overlaps, the last are shifted inwards."""
    step = max(1, round(0.8 * img_size))
    return list(itertools.product(*([*range(0, side - img_size, step), max(0, side - img_size)]
                                    for side in size)))


def share_inside(boxes: Tensor, window: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Of what an image (height, width) holds of each of N boxes, the share in a window (x, y, x, y); N."""
    visible, seen = (shapely.area(shapely.intersection(to_polygons(boxes), shapely.box(*frame)))
                     for frame in ((0, 0, size[1], size[0]), window))
    return torch.from_numpy(seen / np.maximum(visible, 1e-9)).float()


class BoxWindows(torch.utils.data.Dataset):
    """Random windows S x S, turned and flipped, with their boxes; drawn from (seed, epoch, index) alone.

    An image comes once in an epoch for each of the windows that cover it. Images smaller than S are filled up
    with the mean. Pixels of another type than `dtype` are unreadable.
    """

    def __init__(self, samples: Sequence[Sample], S: int, mean: list[float], oriented: bool, seed: int,
                 dtype: torch.dtype = torch.uint8, bands: list[int | str] | None = None):
        self.samples, self.S, self.oriented, self.seed, self.bands = samples, S, oriented, seed, bands
        self.images = np.repeat(np.arange(len(samples)), [len(windows_of(x.size, S)) for x in samples])
        self.most = max(len(sample.labels) for sample in samples)
        fill = torch.tensor(mean).view(-1, 1, 1)
        self.fill = (255 * fill).round().byte() if dtype == torch.uint8 else fill

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns a window C x S x S and targets M x 6: boxes and class; -1: counts in no loss, -2: none."""
        (epoch, index), S = key, self.S
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        sample = self.samples[self.images[index]]
        h, w = (min(S, side) for side in sample.size)
        for attempt in range(100):
            top, left = self._place(to_corners(sample.boxes), sample.size)
            try:
                pixels = common.read_image(sample.path, len(self.fill), self.bands, (top, left, h, w))
                break
            except common.EmptyImageError:  # a part of the scene without data
                if attempt == 99:
                    raise
        if pixels.dtype != self.fill.dtype:
            raise common.UnreadableImageError(f"{sample.path}: {pixels.dtype} among {self.fill.dtype}")
        window = self.fill.repeat(1, S, S)
        window[:, :h, :w] = pixels
        share = share_inside(sample.boxes, (left, top, left + w, top + h), sample.size)
        labels = torch.where(share < 0.7, -1, sample.labels)[share > 0]
        x, y = (to_corners(sample.boxes[share > 0]) - torch.tensor([left, top])).unbind(-1)  # each M x 4

        # One of the eight turns and flips, of the pixels and of the corners.
        turn = int(torch.randint(8, ()))
        window = window.rot90(turn % 4, (1, 2))
        for _ in range(turn % 4):  # counter-clockwise
            x, y = y, S - x
        if turn >= 4:
            window, x = window.flip(-1), S - x
        targets = torch.full((self.most, 6), -2.0)
        targets[: len(labels), :5] = to_boxes(torch.stack([x, y], -1), self.oriented)
        targets[: len(labels), 5] = labels
        return window.contiguous(), targets

    def _place(self, corners: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        # Top and left of a window: four in five hold a box, whole where it fits, the others lie anywhere.
        low, high = torch.zeros(2), (torch.tensor(size) - self.S).clamp(min=0).float()
        if len(corners) and torch.rand(()) < 0.8:
            chosen = corners[torch.randint(len(corners), ())].flip(-1)  # 4 x 2: y, x
            ends = torch.stack([chosen.amin(0), chosen.amax(0) - self.S]).sort(0).values
            low, high = (torch.minimum(end.clamp(min=0), high) for end in ends)
        return tuple((low + torch.rand(2) * (high - low)).round().int().tolist())


# --------------------------------------------------------------------------------------------------
# Model. The four maps: Pyramid and rescale of eval_segmentation.py
# --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Feature pyramid network of `dim` channels, and the heads of FCOS, of `convs` layers, for K classes.

    The heads are shared by all levels. Oriented boxes take two more numbers per position, for the angle.
    """

    def __init__(self, pyramid: Pyramid, K: int, oriented: bool, p2: bool, dim: int, convs: int):
        super().__init__()
        self.first = 0 if p2 else 1  # of the maps
        # A ViT whose patch is no power of 2 comes near strides 4 to 32.
        targets = [s / 2 ** round(math.log2(s / t)) for s, t in zip(pyramid.strides, STRIDES, strict=True)]
        channels, strides, targets = (x[self.first :] for x in (pyramid.channels, pyramid.strides, targets))
        self.strides = [*targets, 2 * targets[-1], 4 * targets[-1]]
        self.rescale = nn.ModuleList(map(rescale, channels, strides, targets))
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.coarser = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for _ in range(2))
        self.class_tower, self.box_tower = (nn.Sequential(*itertools.chain(*(
            (nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(32, dim), nn.ReLU()) for _ in range(convs))))
            for _ in range(2))
        self.to_logits = nn.Conv2d(dim, K, 3, padding=1)
        self.to_box = nn.Conv2d(dim, 7 if oriented else 5, 3, padding=1)  # l t r b, centreness, two for theta
        for layer in (*self.class_tower, *self.box_tower, self.to_logits, self.to_box):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.to_logits.bias, -math.log(0.99 / 0.01))  # starts at probability .01
        self.to_box.bias.data[:4] = 0.7
        self.to_box.bias.data[6:] = 1.0  # theta starts at 0

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four maps -> logits B x P x K, raw B x P x 5 or 7, positions P x 2 (x, y), strides P."""
        maps = [scale(x) for scale, x in zip(self.rescale, maps[self.first :], strict=True)]
        maps = [conv(x) for conv, x in zip(self.laterals, maps, strict=True)]
        for i in range(len(maps) - 2, -1, -1):  # from the top down
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.smooth, maps, strict=True)]
        maps.append(self.coarser[0](maps[-1]))
        maps.append(self.coarser[1](maps[-1].relu()))
        logits, raw, positions, strides = [], [], [], []
        for x, stride in zip(maps, self.strides, strict=True):
            logits.append(self.to_logits(self.class_tower(x)).flatten(2))
            raw.append(self.to_box(self.box_tower(x)).flatten(2))
            rows, columns = (stride * (torch.arange(n, device=x.device) + 0.5) for n in x.shape[2:])
            positions.append(torch.cartesian_prod(rows, columns).flip(1))
            strides.append(torch.full((len(positions[-1]),), stride, device=x.device))
        return (torch.cat(logits, 2).mT.float(), torch.cat(raw, 2).mT.float(), torch.cat(positions),
                torch.cat(strides))


class Detector(nn.Module):
    """Normalised images B x C x H x W of any size -> what Head gives; they are padded with the mean."""

    def __init__(self, pyramid: Pyramid, head: Head):
        super().__init__()
        self.pyramid, self.head = pyramid, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See Head."""
        bottom, right = (-side % self.pyramid.multiple for side in images.shape[2:])
        return self.head(self.pyramid(F.pad(images, (0, right, 0, bottom))))


def build_detector(backbone: nn.Module, K: int, args: argparse.Namespace) -> Detector:
    """A detector of K classes with a new head, by --seed."""
    torch.manual_seed(args.seed)
    pyramid = Pyramid(backbone, args.in_chans, args.finetune, args.weights[0])
    head = Head(pyramid, K, args.boxes == "oriented", args.p2, args.fpn_dim, args.head_convs)
    return Detector(pyramid, head)


def decode(raw: Tensor, positions: Tensor, strides: Tensor) -> Tensor:
    """Raw numbers N x 5 or 7 at positions N x 2 of strides N -> boxes N x 5."""
    left, top, right, bottom = (strides[:, None] * raw[:, :4].clamp(max=8).exp()).unbind(1)
    angle = torch.atan2(raw[:, 5], raw[:, 6] + 1e-6) / 2 if raw.shape[1] == 7 else torch.zeros_like(left)
    boxes = torch.stack([*positions.unbind(1), left + right, top + bottom, angle], 1)
    u, v = axes(boxes)
    centre = positions + ((right - left) / 2)[:, None] * u + ((bottom - top) / 2)[:, None] * v
    return torch.cat([centre, boxes[:, 2:]], 1)


# --------------------------------------------------------------------------------------------------
# Targets and loss
# --------------------------------------------------------------------------------------------------


def distances(positions: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ... x 2, boxes ... x 5 -> l t r b ... x 4, the positions in the boxes' axes ... x 2."""
    local = torch.stack([((positions - boxes[..., :2]) * axis).sum(-1) for axis in axes(boxes)], -1)
    half = boxes[..., 2:4] / 2
    return torch.cat([half + local, half - local], -1), local


def assign(positions: Tensor, strides: Tensor, boxes: Tensor, ignored: Tensor) -> Tensor:
    """Number of the box that each position learns, P; -1: it counts in no loss; -2: background.

    That is the smallest of those that hold the position, near their centre, and whose size fits its level.
    Positions P x 2, strides P, boxes N x 5, ignored ones (cut off by the window) M x 5.
    """
    low = torch.where(strides == strides.min(), 0, 4 * strides)[:, None]
    high = torch.where(strides == strides.max(), math.inf, 8 * strides)[:, None]
    index = torch.full_like(strides, -2, dtype=torch.long)
    smallest, first = torch.full_like(strides, math.inf), 0
    for part in boxes.split(128) if len(boxes) else ():  # bounds the memory
        sides, local = distances(positions[:, None], part)  # P x n x 4, P x n x 2
        largest = sides.amax(-1)
        fits = (sides.amin(-1) > 0) & (local.abs().amax(-1) < 1.5 * strides[:, None])
        fits &= (largest > low) & (largest <= high)
        area, which = torch.where(fits, part[:, 2] * part[:, 3], math.inf).min(1)
        index = torch.where(area < smallest, first + which, index)
        smallest, first = torch.minimum(area, smallest), first + len(part)
    for part in ignored.split(128):
        inside = (distances(positions[:, None], part)[0].amin(-1) > 0).any(1)
        index[inside & (index == -2)] = -1
    return index


def kld_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """1 - 1 / (1 + ln(1 + D)), D twice the KL divergence of N x 5 boxes' Gaussians from their truth's; N."""
    _, local = distances(boxes[:, :2], truth)  # difference of the centres in the truth's axes
    w, h, W, H = *boxes[:, 2:4].clamp(min=1e-3).unbind(1), *truth[:, 2:4].clamp(min=1e-3).unbind(1)
    cos2, sin2 = (boxes[:, 4] - truth[:, 4]).cos() ** 2, (boxes[:, 4] - truth[:, 4]).sin() ** 2
    D = (4 * local[:, 0] ** 2 / W**2 + 4 * local[:, 1] ** 2 / H**2 + w**2 * (cos2 / W**2 + sin2 / H**2)
         + h**2 * (sin2 / W**2 + cos2 / H**2) + 2 * (W * H / (w * h)).log() - 2)
    return 1 - 1 / (1 + D.clamp(min=1e-6).log1p())


def angle_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """(1 - H/W)(1 - cos 2(theta - theta*)), N: turns boxes that KLD leaves, those predicted as squares."""
    longer, shorter = truth[:, 2:4].amax(1), truth[:, 2:4].amin(1)
    return (1 - shorter / longer.clamp(min=1e-3)) * (1 - (2 * (boxes[:, 4] - truth[:, 4])).cos())


def giou_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """1 - GIoU of upright boxes N x 5; N."""
    return generalized_box_iou_loss(*(torch.cat([x[:, :2] - x[:, 2:4] / 2, x[:, :2] + x[:, 2:4] / 2], 1)
                                      for x in (boxes, truth)))


def detection_loss(outputs: tuple[Tensor, Tensor, Tensor, Tensor], targets: Tensor,
                   process: Process) -> tuple[Tensor, dict[str, Tensor]]:
    """Focal loss of the classes, KLD with the angle term or GIoU of the boxes, cross-entropy of centreness.

    Of Head's outputs and the targets B x M x 6 of BoxWindows. Returns the loss; its parts, how many positions
    learn a box, and how many objects no position learns.
    """
    logits, raw, positions, strides = outputs
    # What each position learns: a box, that there is none, or nothing.
    index, truth, unseen = [], [], 0
    for rows in targets:
        kept = rows[rows[:, 5] >= 0]
        index.append(assign(positions, strides, kept[:, :5], rows[rows[:, 5] == -1, :5]))
        seen = index[-1][index[-1] >= 0]
        truth.append(kept[seen])
        unseen += len(kept) - len(seen.unique())
    index, truth = torch.stack(index), torch.cat(truth)  # B x P, positives x 6
    chosen = index >= 0
    one_hot = torch.zeros_like(logits)
    one_hot[chosen] = F.one_hot(truth[:, 5].long(), logits.shape[2]).to(one_hot)

    of_image, of_position = chosen.nonzero(as_tuple=True)
    sides, _ = distances(positions[of_position], truth)
    pairs = sides.unflatten(1, (2, 2))  # (l, t), (r, b)
    centreness = (pairs.amin(1) / pairs.amax(1)).prod(1).sqrt()
    counts = torch.stack([chosen.sum(), centreness.sum()])  # over all processes, whose gradients are averaged
    if process.world_size > 1:
        dist.all_reduce(counts)
    positives, weight = torch.maximum(counts, counts.new_tensor([1, 1e-6])) / process.world_size

    raw = raw[of_image, of_position]
    boxes = decode(raw, positions[of_position], strides[of_position])
    box_loss = kld_loss if raw.shape[1] == 7 else giou_loss
    parts = {
        "focal": sigmoid_focal_loss(logits[index != -1], one_hot[index != -1], 0.25, 2, "sum") / positives,
        "box": (centreness * box_loss(boxes, truth[:, :5])).sum() / weight,
        # Of soft targets: its least value is not 0 but their entropy.
        "centreness": F.binary_cross_entropy_with_logits(raw[:, 4], centreness, reduction="sum") / positives}
    if raw.shape[1] == 7:
        parts["angle"] = (centreness * angle_loss(boxes, truth)).sum() / weight
    loss = sum(parts.values())
    figures = {"loss": loss, **parts, "positives": chosen.sum(), "unseen": loss.new_tensor(unseen)}
    return loss, {name: value.detach().float() for name, value in figures.items()}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def build_optimizer(detector: Detector, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum .9; the backbone at its own rate."""
    groups, backbone = common.param_groups(detector.head), detector.pyramid.backbone
    skip = getattr(backbone, "no_weight_decay", tuple)()  # such as the positions of a ViT
    if args.finetune:
        own = timm.optim.param_groups_weight_decay(backbone, args.weight_decay, no_weight_decay_list=skip)
        groups += [group | {"lr_scale": args.backbone_lr / args.lr} for group in own]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(step: int, run: common.Run, args: argparse.Namespace) -> float:
    """Cosine to 0, or a tenth after each epoch of --schedule; a warm-up of a tenth, 500 steps at most."""
    warmup_steps = min(500, run.total_steps // 10)
    if args.schedule is None:
        return common.cosine_schedule(args.lr, 0.0, step, run.total_steps, warmup_steps)
    drops = sum(step >= epoch * run.steps_per_epoch for epoch in args.schedule)
    return common.cosine_schedule(args.lr, args.lr, step, run.total_steps, warmup_steps) * 0.1**drops


def train(detector: Detector, samples: Sequence[Sample], dtype: torch.dtype, report: str,
          args: argparse.Namespace, process: Process) -> tuple[bool, bool]:
    """Trains a detector on images of pixels of `dtype`; is there a result, was it stopped?"""
    dataset = BoxWindows(samples, args.img_size, args.mean, args.boxes == "oriented", args.seed, dtype,
                         args.bands)
    run = common.Run(args, process, samples=len(dataset), images=len(samples))
    detector = common.sync_batchnorm(common.to_device(detector, process.device), process)
    # BatchNorm of the backbone keeps its statistics, except those that an untrained one still has to find.
    detector.train()
    detector.pyramid.train(args.finetune and args.weights == ["random"])
    optimizer, scaler = build_optimizer(detector, args), run.scaler
    run.restore(None, detector=detector, optimizer=optimizer)
    if args.compile:
        detector.compile()
    ddp_detector = common.distributed(detector, process)

    for step in run.steps(run.loader(dataset), report, boxes=sum(len(sample.labels) for sample in samples)):
        lr = learning_rate(step, run, args)
        common.set_lr(optimizer, lr)
        terms = []
        for micro in range(args.accum_steps):
            windows, targets = run.fetch()  # B x C x S x S, B x M x 6
            x = common.to_float(windows, args.mean, args.std)
            x = common.normalize(x, args.mean, args.std, windows.dtype)
            with common.accumulating(ddp_detector, micro, args.accum_steps):
                with run.autocast:
                    outputs = ddp_detector(x)
                loss, figures = detection_loss(outputs, targets, process)
                scaler.scale(loss / args.accum_steps).backward()
            terms.append(figures)
        grad_norm = common.grad_norm(optimizer, scaler)
        nn.utils.clip_grads_with_norm_(detector.parameters(), CLIP_GRAD, grad_norm)
        common.optimizer_step(optimizer, scaler)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)

    common.share_buffers(detector, process)
    return run.has_result(), run.stopped


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

Found = tuple[Tensor, Tensor, Tensor]  # boxes N x 5, scores N and class numbers N of an image, best first


@torch.inference_mode()
def detect(detector: nn.Module, image: Tensor, args: argparse.Namespace, process: Process) -> Found:
    """Detects objects in one image C x H x W: the best boxes of its windows, merged; on the CPU."""
    S, found, oriented = args.img_size, [], args.boxes == "oriented"
    places = windows_of(image.shape[1:], S)
    for first in range(0, len(places), args.batch_size_per_gpu):
        part = places[first : first + args.batch_size_per_gpu]
        windows = torch.stack([image[:, top : top + S, left : left + S] for top, left in part])
        windows = windows.to(process.device)
        x = common.to_float(windows, args.mean, args.std)
        with common.autocast(args.amp, process.device):
            outputs = detector(common.normalize(x, args.mean, args.std, windows.dtype))
        logits, raw, positions, strides = outputs
        scores = logits.sigmoid() * raw[..., 4:5].sigmoid()  # B x P x K
        if not scores.isfinite().all():
            common.fail(NOT_FINITE, code=1, everywhere=True)
        for i, (top, left) in enumerate(part):
            score, flat = scores[i].flatten().topk(min(MOST_BOXES, scores[i].numel()))
            at, labels = flat // logits.shape[2], flat % logits.shape[2]
            boxes = decode(raw[i, at], positions[at], strides[at])
            boxes[:, :2] += boxes.new_tensor([left, top])
            fine = boxes.isfinite().all(1) & (boxes[:, 2:4].amin(1) >= 0.5) & (score > SCORE)
            found.append([values[fine].cpu() for values in (boxes, score, labels)])
    boxes, scores, labels = map(torch.cat, zip(*found, strict=True))
    best = scores.topk(min(MOST_BOXES, len(scores))).indices
    kept = best[nms(boxes[best], scores[best], labels[best], NMS_IOU[oriented])]
    return canonical(boxes[kept]) if oriented else boxes[kept], scores[kept], labels[kept]


def detect_all(detector: nn.Module, samples: common.Samples, args: argparse.Namespace, process: Process,
               may_lose: float = 0.01) -> Iterator[tuple[int, Found]]:
    """Yields number and boxes of this process's share of the images; see read_share."""
    detector.eval()
    for i, image in eval_segmentation.read_share(samples.__getitem__, len(samples), process, may_lose):
        yield i, detect(detector, image, args, process)


def match(iou: np.ndarray, difficult: np.ndarray, threshold: float) -> np.ndarray:
    """Verdicts on the N detections of a class in an image, best first: 1 right, 0 wrong, -1 does not count.

    Each goes to the box of largest IoU (N x M) above the threshold; the first that does has found it.
    """
    verdict = np.zeros(len(iou), int)
    if iou.shape[1]:
        box = np.where(iou.max(1) > threshold, iou.argmax(1), -1)
        taken, first = np.unique(box, return_index=True)
        verdict[first[taken >= 0]] = 1
        verdict[(box >= 0) & difficult[box]] = -1
    return verdict


def average_precision(verdict: np.ndarray, boxes: int) -> tuple[float, float]:
    """Area under the curve of precision over recall, and the mean precision at eleven recalls, in %.

    Of verdicts 1 or 0 on the detections of a class, best first, and the number of boxes to find.
    """
    right = verdict.cumsum()
    recall, precision = right / boxes, right / np.arange(1, len(verdict) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a greater
    area = np.sum(np.diff(recall, prepend=0) * envelope)
    points = [precision[recall >= i / 10 - 1e-9].max(initial=0) for i in range(11)]
    return 100 * float(area), 100 * float(np.mean(points))


def evaluate(found: dict[int, Found], samples: Sequence[Sample], classes: list[str], oriented: bool) -> dict:
    """Average precision in %, mean over the classes that the images hold, and by class."""
    thresholds = [0.5, 0.75] if oriented else np.arange(0.5, 1, 0.05).round(2).tolist()
    per_class = {}
    for number, name in enumerate(classes):
        scores, verdicts, boxes = [], [], 0
        for i, (guess, score, label) in found.items():
            sample, own, true = samples[i], label == number, samples[i].labels == number
            iou, difficult = iou_matrix(guess[own], sample.boxes[true]), sample.difficult[true].numpy()
            scores.append(score[own].numpy())
            verdicts.append(np.stack([match(iou, difficult, threshold) for threshold in thresholds]))
            boxes += int((~difficult).sum())
        if boxes:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            verdict = np.concatenate(verdicts, 1)[:, order]  # thresholds x N
            areas, points = zip(*(average_precision(row[row >= 0], boxes) for row in verdict), strict=True)
            per_class[name] = {"boxes": boxes, "ap50": areas[0], "ap50_eleven_points": points[0],
                               "ap75": areas[thresholds.index(0.75)],
                               **({} if oriented else {"ap50_95": sum(areas) / len(areas)})}
    if not per_class:
        common.fail("none of the test images with boxes could be read", code=1)
    table = {name: {key: round(value, 3) for key, value in row.items()} for name, row in per_class.items()}
    figures = [key for key in next(iter(table.values())) if key != "boxes"]
    return {key: round(sum(row[key] for row in per_class.values()) / len(table), 3) for key in figures} | {
        "per_class": table}


def draw_boxes(image: Tensor, boxes: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """A picture 3 x H x W in [0, 1] of an image, its longer side 800, with boxes coloured by class."""
    x = common.to_float(image, args.mean, args.std)[: 3 if len(image) > 2 else 1].expand(3, -1, -1)
    scale = 800 / max(x.shape[1:])
    x = resize(x, [max(1, round(scale * side)) for side in x.shape[1:]], antialias=True)
    picture = to_pil_image(x.clamp(0, 1))
    draw = ImageDraw.Draw(picture)
    for corners, label in zip((scale * to_corners(boxes)).tolist(), labels.tolist(), strict=True):
        colour = f"hsl({(50 + 137 * label) % 360}, 100%, 60%)"
        draw.polygon([tuple(corner) for corner in corners], outline=colour, width=2)
    return pil_to_tensor(picture).float() / 255


def draw_examples(found: dict[int, Found], samples: Sequence[Sample], pixels: common.Samples,
                  args: argparse.Namespace) -> None:
    """Writes examples.png, of up to 8 images: the truth, and what was found with a score above .3.

    Where two classes overlap, the more confident box is drawn.
    """
    rows = []
    for i in list(found)[:: math.ceil(len(found) / 8)]:
        image = pixels[i]
        boxes, scores, labels = (x[found[i][1] > 0.3] for x in found[i])
        kept = nms(boxes, scores, torch.zeros_like(labels), 0.5)
        rows.append([draw_boxes(image, samples[i].boxes, samples[i].labels, args),
                     draw_boxes(image, boxes[kept], labels[kept], args)])
    common.save_grid(Path(args.output_dir) / "examples.png", rows)


# --------------------------------------------------------------------------------------------------
# Prediction of new images
# --------------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace, process: Process) -> None:
    """Writes OUT/predictions, a text per image of the folder: a line of DOTA for each box, and its score."""
    source, root, done = Path(args.weights[0]), Path(args.predict), 0
    out = common.make_output_dir(args.output_dir, process) / "predictions"
    with load_saved(source, "detector.pth") as saved:
        vars(args).update({name: saved["args"][name] for name in SAVED_FLAGS})
        state, info = common.read_weights(str(source))
        args.mean, args.std = info["mean"], info["std"]
        dtype, classes = torch.uint8 if saved["is_uint8"] else torch.float32, saved["classes"]
        backbone = build(str(source), state, info, args.mean, args.std, dtype, args)
        detector = build_detector(backbone.model, len(classes), args)
        detector.head.load_state_dict(saved["head"])
    paths = common.from_main(process, partial(common.list_images, root, args.output_dir, flag="--predict",
                                              bands=args.bands))
    common.check_there(process, paths, root, "--predict")
    if len({stem(path, root) for path in paths}) < len(paths):
        common.fail(f"--predict {root}: has two images of one stem")
    if process.is_main:
        print(backbone.report)
    common.to_device(detector, process.device)
    for i, (boxes, scores, labels) in detect_all(detector, backbone.images(paths), args, process, may_lose=1):
        lines = []
        for corners, score, label in zip(to_corners(boxes), scores, labels, strict=True):
            numbers = " ".join(f"{x:.1f}" for x in corners.flatten().tolist())
            lines.append(f"{numbers} {classes[label]} 0 {score:.3f}\n")
        data = "".join(lines).encode()
        common.write_atomically(out / f"{stem(paths[i], root)}.txt", lambda file, data=data: file.write(data))
        done += 1
    done = sum(common.gather_objects(done, process))
    if process.is_main:
        print(f"boxes of {done} of {len(paths)} images: {out}")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, process: Process) -> None:
    """Trains and evaluates a detector on each of --weights, and writes the results."""
    out, lines, versions = common.make_output_dir(args.output_dir, process), [], common.versions()
    parts = common.from_main(process, lambda: [find_part(args, "train"), find_part(args, "val", "test")])
    common.check_there(process, parts[0].paths, args.data_path)
    backbones = prepare(args, process, parts[0].paths, baselines=("random",))
    train_samples, test_samples, classes, args.boxes = common.from_main(
        process, lambda: (*load_data(parts, args), args.boxes))
    detectors = []
    for name, backbone in zip(args.weights, backbones, strict=True):
        own = argparse.Namespace(**vars(args))
        own.weights, own.arch = [name], backbone.arch
        own.mean, own.std = list(backbone.mean), list(backbone.std)
        own.output_dir = str(out / folder_name(name) if len(args.weights) > 1 else out)
        own.weights_digest, own.classes = weights_digest(backbone.model), classes
        detectors.append((build_detector(backbone.model, len(classes), own), own, backbone))
    del backbones

    while detectors:  # a network leaves the device with its turn
        detector, own, backbone = detectors.pop(0)
        began = time.perf_counter()
        complete, stopped = train(detector, train_samples, backbone.dtype, backbone.report, own, process)
        if stopped:
            return
        if not complete:
            continue
        if process.is_main:
            eval_segmentation.save_trained("detector.pth", detector, SAVED_FLAGS, own, classes=classes,
                                           is_uint8=backbone.dtype == torch.uint8)
        pixels = backbone.images(test_samples.paths)
        parts_found = common.gather_objects(list(detect_all(detector, pixels, own, process)), process)
        if not process.is_main:
            continue
        found = dict(sorted(itertools.chain(*parts_found)))
        draw_examples(found, test_samples, pixels, own)
        add_result({"task": "detection", "weights": own.weights[0], "data": args.data_path,
                    "split": f"train/{parts[1].name}", "train_images": len(train_samples),
                    "test_images": len(found),
                    **{name: getattr(own, name) for name in [*SAVED_FLAGS, *SETTINGS]},
                    **evaluate(found, test_samples, classes, own.boxes == "oriented"),
                    "loading": backbone.report, "versions": versions}, began, lines, out, process)
    if process.is_main and lines:
        print_table(lines)
        print("\n".join(map(json.dumps, lines)), flush=True)


def print_table(lines: list[dict]) -> None:
    """A row for each of the weights, then AP50 of each class."""
    first, names = lines[0], [name for name in lines[0] if name.startswith("ap")]
    rows = [["AP in %", *names], *([line["weights"], *(line[name] for name in names)] for line in lines),
            ["AP50 (boxes)", *(Path(line["weights"]).name[-18:] for line in lines)],
            *([f"{name} ({row['boxes']})", *(line["per_class"][name]["ap50"] for line in lines)]
              for name, row in first["per_class"].items())]
    title = f"{first['boxes']}, {first['train_images']} training and {first['test_images']} test images"
    print_rows(title, rows)


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

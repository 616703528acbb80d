"""Detection of oriented or horizontal boxes: a rotated FCOS on any backbone, and its average precision.

Z. Tian et al., "FCOS: Fully convolutional one-stage object detection", ICCV 2019. X. Yang et al., "Learning
high-precision bounding box for rotated object detection via Kullback-Leibler divergence", NeurIPS 2021.

    # a short run on a CPU, beside untrained weights
    python demo/scenes.py --output_dir demo/data --detection 60
    python eval_detection.py --data_path demo/data/detection --weights demo/output random --img_size 128 \
        --fpn_dim 64 --head_convs 2 --lr 2e-3 --epochs 40 --batch_size_per_gpu 4 --output_dir BOXES
    # DOTA, one GPU: windows of 1024 px, AdamW; the papers' recipe
    python eval_detection.py --data_path DOTA --weights OUT --output_dir BOXES
    python eval_detection.py --data_path DOTA --weights OUT --output_dir BOXES --optimizer sgd --lr .005 \
        --weight_decay 1e-4 --schedule 8 11
    # then the boxes of new images
    python eval_detection.py --predict NEW_IMAGES --weights BOXES --output_dir BOXES

Every position of a pyramid of maps says which class is there, how far the sides of its box are away, and how
the box is turned. No anchors, no special CUDA operators: figures compare backbones; the best detectors get
more. Read `assign`, `decode`, `kld_loss` and `detection_loss` first.

    symbol    variable      flag (default)            what
    B         B             batch_size_per_gpu (2)    windows per process and micro-batch
    P         P             img_size (1024)           positions: all cells of all maps
    C         C             -                         classes
    N, M      -             -                         boxes
    s         strides       p2 (off)                  pixels between positions: 8 to 128, with p2 4 too
    l t r b   sides         -                         distances to a box's sides, in the box's own axes
    theta     angle         boxes                     of the longer side, in [-pi/2, pi/2), y downwards

DATA_PATH holds train/ and val/ (or test/), each with images/ and labelTxt/ (DOTA: x1 y1 ... x4 y4 class
difficult) or labels/ (YOLO: class cx cy w h, or class and four corners, in shares of the image); or
images/train, labels/train. classes.txt names YOLO's numbers. An image without labels has no objects.

Differs from the authors' code: no scale per level, GIoU or KLD with an angle term instead of rotated IoU
(KLD has no gradient for the angle of a square), 8 turns and flips, AdamW by default.

In OUT, or in a folder in it for each of several weights: checkpoint.pth, detector.pth, backbone/, log.jsonl,
examples.png (truth, prediction). OUT/results.jsonl: AP at IoU .5 by the area under the curve and by eleven
points (VOC 2007, DOTA), and at higher IoU.
"""

import argparse
import copy
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import tifffile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss
from tqdm import tqdm

import common
from common import Process, finite, not_negative, positive
from eval_knn import append_result

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="train/ and val/ (or test/), each with images/ and labelTxt/ or labels/")
    add("--predict", help="instead: find boxes in this folder's images, with an --output_dir as --weights")
    add("--boxes", choices=["auto", "oriented", "horizontal"], default="auto", help="auto: horizontal where "
        "all labels are")
    add("--img_size", type=positive(int), help="side of the windows; larger images are cut into them. "
        "Default: 1024, with --predict that of the training")
    add("--in_chans", type=positive(int), help="bands of the images; default: the weights', else 3")
    add("--mean", type=finite(float), nargs="+", help="of each band; default: the weights', else ImageNet's")
    add("--std", type=positive(float), nargs="+", help="of each band; default: as --mean")
    add("--num_workers", type=not_negative(int), help="per process; default: its share of the cores, at "
        "most 16")

    add = parser.add_argument_group("model").add_argument
    add("--weights", nargs="+", required=True, help="one or more: output folder, checkpoint, state dict, "
        "name of timm's pretrained weights, random")
    add("--arch", help="timm name of a net with maps of strides 4 to 32, or of a plain ViT; for a bare state "
        "dict and for random")
    add("--patch_size", type=positive(int), help="of a ViT; default: the weights' or the arch's own")
    add("--checkpoint_key", help="network of a checkpoint to take; default: the one that its run exports")
    add("--allow_partial", action=yes_no, default=False, help="accept weights that fill under 90 %%")

    add = parser.add_argument_group("method").add_argument
    add("--finetune", action=yes_no, default=True, help="train the backbone too; without: it stays frozen")
    add("--p2", action=yes_no, default=False, help="add maps of stride 4; we recommend it where objects are "
        "under 20 px, and three times the time")
    add("--fpn_dim", type=positive(int), default=256, help="channels of pyramid and heads; 64 on a CPU")
    add("--head_convs", type=positive(int), default=4, help="convolutions of each head; 2 on a CPU")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=12, help="one: as many random windows as cover all images; "
        "small data needs more")
    add("--batch_size_per_gpu", type=positive(int), default=2, help="windows per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="the papers: sgd")
    add("--lr", type=positive(float), default=1e-3, help="not scaled to the batch; we recommend 2e-3 on "
        "small data; the papers: .005 for two images, with sgd")
    add("--backbone_lr", type=positive(float), help="default: .3 of --lr")
    add("--schedule", type=positive(int), nargs="+", help="epochs at which the rate falls to a tenth; the "
        "papers: 8 11; default: cosine to 0")
    add("--weight_decay", type=not_negative(float), default=0.05, help="not on biases and norms; sgd: 1e-4")
    add("--clip_grad", type=not_negative(float), default=35.0, help="greatest norm of the gradient; 0: any")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses pairs of flags that contradict each other; puts in defaults that depend on other flags."""
    if (args.data_path is None) == (args.predict is None):
        common.fail("--data_path or --predict: give one of the two")
    if args.predict and len(args.weights) > 1:
        common.fail(f"--weights {' '.join(args.weights)}: one at a time with --predict")
    if len(set(args.weights)) < len(args.weights):
        common.fail(f"--weights {' '.join(args.weights)}: one of them twice")
    if args.fpn_dim % 64:  # GroupNorm takes 32 groups, of two channels or more where a map is one cell
        common.fail(f"--fpn_dim {args.fpn_dim}: must be a multiple of 64")
    if args.schedule and max(args.schedule) >= args.epochs:
        common.fail(f"--schedule {max(args.schedule)}: must be less than --epochs {args.epochs}")
    if len(args.mean or ()) != len(args.std or ()):
        common.fail("--mean, --std: give both, with a value for each band")
    args.backbone_lr = args.backbone_lr or 0.3 * args.lr
    args.img_size = args.img_size or (None if args.predict else 1024)


# --------------------------------------------------------------------------------------------------
# Boxes: N x 5, of centre x, y, width, height, angle; from the upper left corner of the image, in pixels
# --------------------------------------------------------------------------------------------------


def axes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors along width and height of boxes ... x 5, each ... x 2."""
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


def hulls_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upright hulls ... x 4 of shapely's bounds, broadcast: True where the two share an area."""
    return ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1)


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of polygons, broadcast; 0 where neither has an area."""
    intersection = shapely.area(shapely.intersection(a, b))
    return intersection / np.maximum(shapely.area(a) + shapely.area(b) - intersection, 1e-9)


def iou_matrix(a: Tensor, b: Tensor) -> np.ndarray:
    """Polygon IoU N x M of boxes N x 5 and M x 5."""
    a, b = to_polygons(a), to_polygons(b)
    iou = np.zeros((len(a), len(b)))
    i, j = hulls_overlap(shapely.bounds(a)[:, None], shapely.bounds(b)[None]).nonzero()
    iou[i, j] = pair_iou(a[i], b[j])
    return iou


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes to keep, best first: those that no better one of their class overlaps too much."""
    order = scores.argsort(descending=True, stable=True)
    polygons, classes = to_polygons(boxes[order]), labels[order].numpy()
    bounds, alive, kept = shapely.bounds(polygons), np.ones(len(order), bool), []
    for i in range(len(order)):
        if alive[i]:
            kept.append(i)
            rivals = alive[i + 1 :] & (classes[i + 1 :] == classes[i])
            rivals = i + 1 + np.flatnonzero(rivals & hulls_overlap(bounds[i], bounds[i + 1 :]))
            alive[rivals[pair_iou(polygons[i], polygons[rivals]) > threshold]] = False
    return order[kept]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """An image of `size` (height, width) and its objects."""

    path: str
    size: tuple[int, int]
    corners: Tensor  # N x 4 x 2 in pixels, in any order
    labels: Tensor  # N class numbers
    difficult: Tensor  # N bool: in evaluation, found or not, they do not count


def image_size(path: str) -> tuple[int, int]:
    """Height and width by the head of the file."""
    try:
        if path.lower().endswith((".tif", ".tiff")):
            with tifffile.TiffFile(path) as file:
                return file.pages[0].imagelength, file.pages[0].imagewidth
        if path.lower().endswith(".npy"):
            return np.load(path, mmap_mode="r").shape[:2]
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # decoders raise almost anything on damaged bytes
        common.fail(f"--data_path: {path}: {error}")


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
    numbers, difficult = np.array(rest, dtype=np.float64), not yolo and len(words) > 9 and int(words[9]) > 0
    if not np.isfinite(numbers).all():
        raise ValueError("numbers that are not finite")
    if len(numbers) == 4:
        x, y, w, h = numbers
        if min(w, h) <= 0:
            raise ValueError(f"a box of size {w:g} x {h:g}")
        numbers = np.array([x - w, y - h, x + w, y - h, x + w, y + h, x - w, y + h]) + [x, y] * 4
        numbers = numbers / 2
    return numbers.reshape(4, 2) * (size[::-1] if yolo else 1), name, difficult


def find_part(root: Path, part: str) -> tuple[Path, Path, bool]:
    """Folders of images and labels of train, val or test, and whether these are YOLO's."""
    for images, name, yolo in (("images", "labelTxt", False), ("images", "labels", True)):
        for pattern in ("{part}/{kind}", "{kind}/{part}"):
            folders = [root / pattern.format(part=part, kind=kind) for kind in (images, name)]
            if all(folder.is_dir() for folder in folders):
                return *folders, yolo
    common.fail(f"--data_path {root}: needs {part}/images and {part}/labelTxt (DOTA) or {part}/labels (YOLO)")


def read_part(root: Path, part: str) -> tuple[list[tuple], bool]:
    """Path, size and parsed labels of all images of a part; whether the labels are YOLO's."""
    images, labels, yolo = find_part(root, part)
    read, outside = [], []
    for path in common.list_images(images, suffixes=common.PIXEL_SUFFIXES):
        file = (labels / Path(path).relative_to(images)).with_suffix(".txt")
        size, objects = image_size(path), []
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                parsed = parse_label(line, yolo, size)
            except ValueError as error:
                common.fail(f"--data_path: {file}, line {number}: {error}")
            if parsed and (parsed[0].max(0) > 0).all() and (parsed[0].min(0) < size[::-1]).all():
                objects.append(parsed)
            elif parsed:
                outside.append(f"{file}, line {number}")
        read.append((path, size, objects))
    if outside:
        print(f"warning: {len(outside)} boxes outside their images, left out: {outside[0]}", file=sys.stderr)
    if not any(objects for _, _, objects in read):
        common.fail(f"--data_path {root}: {labels} holds no box for any of {len(read)} images")
    return read, yolo


def load_data(data_path: str) -> tuple[list[Sample], list[Sample], list[str], bool]:
    """Training and test images, names of the classes, and whether a box is oriented, not upright."""
    root = Path(data_path)
    if not root.is_dir():
        common.fail(f"--data_path {root}: no such folder")
    test_name = next((name for name in ("val", "test") if (root / name).is_dir() or
                      (root / "images" / name).is_dir()), "val")
    (train, yolo), (test, _) = read_part(root, "train"), read_part(root, test_name)
    names = root / "classes.txt"
    found, of_train = (sorted({name for _, _, objects in part for _, name, _ in objects})
                       for part in (train + test, train))
    if names.is_file():
        classes = names.read_text().split()
    elif yolo and all(name.isdecimal() for name in found):
        classes = [str(number) for number in range(max(map(int, found)) + 1)]
    else:
        classes = of_train
    numbers = {str(i) if yolo else name: i for i, name in enumerate(classes)}
    if unknown := [name for name in found if name not in numbers]:
        known = f"{names} lacks" if names.is_file() else "train/ lacks (list them in classes.txt)"
        common.fail(f"--data_path {root}: unknown classes, which {known}: {', '.join(unknown[:10])}")
    train, test = ([Sample(path, size, torch.tensor(np.array([x[0] for x in objects])).float().view(-1, 4, 2),
                           torch.tensor([numbers[name] for _, name, _ in objects], dtype=torch.long),
                           torch.tensor([x[2] for x in objects], dtype=torch.bool))
                    for path, size, objects in part] for part in (train, test))
    corners = torch.cat([sample.corners for sample in (*train, *test)])
    upright = to_corners(to_boxes(corners, oriented=False))
    away = (corners[:, :, None] - upright[:, None]).norm(dim=-1)  # N x 4 x 4: each must meet one of the other
    return train, test, classes, bool((torch.maximum(away.amin(1), away.amin(2)) > 0.05).any())


def windows_of(size: tuple[int, int], img_size: int) -> list[tuple[int, int]]:
    """Tops and lefts of windows that cover an image; a fifth overlaps, the last are shifted inwards."""
    step, starts = max(1, round(0.8 * img_size)), []
    for side in size:
        count = 1 + max(0, math.ceil((side - img_size) / step))
        starts.append([max(0, min(i * step, side - img_size)) for i in range(count)])
    return list(itertools.product(*starts))


def share_inside(corners: Tensor, window: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """N shares, of what the image (height, width) holds of each box, that a window holds.

    Args:
        corners: N x 4 x 2, in order around the box.
        window: left, top, right, bottom.
        size: height, width.
    """
    polygons = shapely.polygons(corners.double().numpy())
    visible, seen = (shapely.area(shapely.intersection(polygons, shapely.box(*box)))
                     for box in ((0, 0, size[1], size[0]), window))
    return torch.from_numpy(seen / np.maximum(visible, 1e-9)).float()


class BoxWindows(torch.utils.data.Dataset):
    """Random windows, turned and flipped, with their boxes; drawn from (seed, epoch, index) alone.

    Args:
        samples: the images.
        img_size: S, side of the windows; smaller images are filled up with the mean.
        mean: of each band.
        oriented: boxes are; else upright.
        seed: of the run.
    """

    def __init__(self, samples: list[Sample], img_size: int, mean: list[float], oriented: bool, seed: int):
        self.samples, self.img_size, self.mean = samples, img_size, mean
        self.oriented, self.seed = oriented, seed
        # An image comes once in an epoch for each of the windows that cover it.
        self.images = [i for i, sample in enumerate(samples) for _ in windows_of(sample.size, img_size)]
        self.most = max(len(sample.labels) for sample in samples)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns a window C x S x S and targets M x 6: boxes and class; -1: counts in no loss, -2: none."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        sample, S = self.samples[self.images[index]], self.img_size
        image = common.read_pixels(sample.path, len(self.mean))
        height, width = image.shape[1:]
        corners = to_corners(to_boxes(sample.corners, self.oriented))  # in order around the box
        top, left = self._place(corners, (height, width))
        bottom, right = min(top + S, height), min(left + S, width)
        fill = torch.tensor(self.mean).view(-1, 1, 1)
        fill = (255 * fill).round().byte() if image.dtype == torch.uint8 else fill
        window = fill.repeat(1, S, S)
        window[:, : bottom - top, : right - left] = image[:, top:bottom, left:right]
        share = share_inside(corners, (left, top, right, bottom), (height, width))
        labels = torch.where(share < 0.7, -1, sample.labels)[share > 0]
        window, corners = self._turn(window, corners[share > 0] - torch.tensor([left, top]))
        targets = torch.full((self.most, 6), -2.0)
        targets[: len(labels)] = torch.cat([to_boxes(corners, self.oriented), labels[:, None]], 1)
        return window, targets

    def _place(self, corners: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        # Top and left of a window: four in five hold a box, whole where it fits, the others lie anywhere.
        room = torch.tensor(size) - self.img_size
        low, high = torch.zeros(2), room.clamp(min=0).float()
        if len(corners) and torch.rand(()) < 0.8:
            chosen = corners[torch.randint(len(corners), ())].flip(-1)  # 4 x 2: y, x
            ends = torch.stack([chosen.amin(0), chosen.amax(0) - self.img_size]).sort(0).values
            low, high = (torch.minimum(end.clamp(min=0), high) for end in ends)
        return tuple((low + torch.rand(2) * (high - low)).round().int().tolist())

    def _turn(self, window: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
        quarters, S = int(torch.randint(4, ())), self.img_size
        for _ in range(quarters):  # against the clock
            corners = torch.stack([corners[..., 1], S - corners[..., 0]], -1)
        window = window.rot90(quarters, (1, 2))
        if torch.rand(()) < 0.5:
            window, corners = window.flip(-1), torch.stack([S - corners[..., 0], corners[..., 1]], -1)
        return window.contiguous(), corners


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Maps of a timm backbone at strides of about 8, 16 and 32 pixels, or 4 too.

    Args:
        backbone: gives maps of these strides, or is a plain ViT; then the maps after blocks n/3 - 1, n/2 - 1,
            2n/3 - 1 and n - 1 are brought to strides 4 to 32 by the patch's own ratio.
        name: to name in errors.
        p2: stride 4 too.

    Attributes:
        strides, channels: of the maps.
    """

    def __init__(self, backbone: nn.Module, name: str, p2: bool):
        super().__init__()
        self.backbone, info = backbone, getattr(backbone, "feature_info", [])
        reductions = [stage["reduction"] for stage in info]
        self.strides, first = [4, 8, 16, 32], 0 if p2 else 1
        doublings = [0] * 4
        if hasattr(backbone, "forward_intermediates") and len(set(reductions)) == 1:
            n, patch = len(reductions), reductions[0]
            indices = [max(0, i) for i in (n // 3 - 1, n // 2 - 1, 2 * n // 3 - 1, n - 1)]
            doublings = [round(math.log2(patch / stride)) for stride in self.strides]
            self.strides = [patch / 2**d for d in doublings]
        elif hasattr(backbone, "forward_intermediates") and set(self.strides) <= set(reductions):
            indices = [max(i for i, r in enumerate(reductions) if r == stride) for stride in self.strides]
        else:
            common.fail(f"--weights {name}: timm gives no maps of strides 4, 8, 16, 32 of this arch, as it "
                        "does of ResNet, Swin, ConvNeXt and plain ViT")
        self.strides, self.indices = self.strides[first:], indices[first:]
        self.channels = [info[i]["num_chs"] for i in self.indices]
        self.scale = nn.ModuleList(map(self._rescale, doublings[first:], self.channels))

    @staticmethod
    def _rescale(doublings: int, channels: int) -> nn.Module:
        if doublings <= 0:
            return nn.MaxPool2d(2**-doublings) if doublings else nn.Identity()
        layers = []
        for _ in range(doublings):
            layers += [nn.ConvTranspose2d(channels, channels, 2, 2), nn.BatchNorm2d(channels), nn.GELU()]
        return nn.Sequential(*layers[:-2])

    def forward(self, images: Tensor) -> list[Tensor]:
        """B x C x H x W, sides multiples of the last stride -> maps B x channels x h x w."""
        asked = sorted(set(self.indices))
        maps = self.backbone.forward_intermediates(images, indices=asked, intermediates_only=True)
        maps = dict(zip(asked, maps, strict=True))
        return [scale(maps[i]) for i, scale in zip(self.indices, self.scale, strict=True)]


class Detector(nn.Module):
    """Backbone, feature pyramid network and the heads of FCOS, shared by all levels.

    Args:
        pyramid: of the backbone.
        C: classes.
        oriented: two more numbers per position, for the angle.
        dim: channels.
        convs: convolutions of each head.
    """

    def __init__(self, pyramid: Pyramid, C: int, oriented: bool, dim: int, convs: int):
        super().__init__()
        self.pyramid, self.oriented = pyramid, oriented
        self.strides = [*pyramid.strides, 2 * pyramid.strides[-1], 4 * pyramid.strides[-1]]
        self.laterals = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in pyramid.channels)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in pyramid.strides)
        self.coarser = nn.ModuleList(nn.Conv2d(dim, dim, 3, 2) for _ in range(2))
        self.class_tower, self.box_tower = (nn.Sequential(*(
            layer for _ in range(convs)
            for layer in (nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(32, dim), nn.ReLU())))
            for _ in range(2))
        self.to_logits = nn.Conv2d(dim, C, 3, padding=1)
        self.to_box = nn.Conv2d(dim, 7 if oriented else 5, 3, padding=1)  # l t r b, centreness, two for theta
        for module in (self.class_tower, self.box_tower, self.to_logits, self.to_box):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.to_logits.bias, -math.log(0.99 / 0.01))  # begins at probability .01
        self.to_box.bias.data[:4] = 0.7
        if oriented:
            self.to_box.bias.data[6] = 1.0  # theta begins at 0
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised images B x C x H x W of any size.

        Returns:
            logits B x P x C; raw boxes and centreness B x P x 5 or 7; positions P x 2 (x, y) in pixels and
            strides P.
        """
        multiple = round(self.pyramid.strides[-1])
        images = F.pad(images, (0, -images.shape[3] % multiple, 0, -images.shape[2] % multiple))
        maps = [lateral(x) for lateral, x in zip(self.laterals, self.pyramid(images), strict=True)]
        for finer, coarser in zip(maps[-2::-1], maps[:0:-1], strict=True):  # from the top down
            finer += F.interpolate(coarser, size=finer.shape[2:], mode="nearest")
        maps = [conv(x) for conv, x in zip(self.smooth, maps, strict=True)]
        # Padded by hand: oneDNN's bf16 gradient of a padded convolution of a 1 x 1 map is NaN at times.
        maps.append(self.coarser[0](F.pad(maps[-1], [1] * 4)))
        maps.append(self.coarser[1](F.pad(maps[-1].relu(), [1] * 4)))
        logits, raw, positions, strides = [], [], [], []
        for x, stride in zip(maps, self.strides, strict=True):
            logits.append(self.to_logits(self.class_tower(x)).flatten(2))
            raw.append(self.to_box(self.box_tower(x)).flatten(2))
            rows, columns = (stride * (torch.arange(n, device=x.device) + 0.5) for n in x.shape[2:])
            positions.append(torch.cartesian_prod(rows, columns).flip(1))
            strides.append(torch.full((len(positions[-1]),), float(stride), device=x.device))
        return (torch.cat(logits, 2).mT.float(), torch.cat(raw, 2).mT.float(), torch.cat(positions),
                torch.cat(strides))


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
    """Which box each position learns.

    That is the smallest of those that hold the position, near their centre, and whose size fits its level.

    Args:
        positions: P x 2.
        strides: P.
        boxes: N x 5.
        ignored: M x 5, boxes cut off by the window.

    Returns:
        P: number of the box; -1: background; -2: in an ignored box, counts in no loss.
    """
    low = torch.where(strides == strides.min(), 0, 4 * strides)[:, None]
    high = torch.where(strides == strides.max(), math.inf, 8 * strides)[:, None]
    index = torch.full_like(strides, -1, dtype=torch.long)
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
        index[inside & (index == -1)] = -2
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

    Args:
        outputs: of Detector.
        targets: B x M x 6, of BoxWindows.
        process: this one; sums are divided by the positives of all processes.

    Returns:
        the loss; its parts, positions that learn a box, and objects that no position learns.
    """
    (logits, raw, positions, strides), C = outputs, outputs[0].shape[2]
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
    one_hot[chosen] = F.one_hot(truth[:, 5].long(), C).to(one_hot)

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
        "focal": sigmoid_focal_loss(logits[index > -2], one_hot[index > -2], 0.25, 2, "sum") / positives,
        "box": (centreness * box_loss(boxes, truth[:, :5])).sum() / weight,
        "centreness": F.binary_cross_entropy_with_logits(raw[:, 4], centreness, reduction="sum") / positives}
    if raw.shape[1] == 7:
        parts["angle"] = (centreness * angle_loss(boxes, truth)).sum() / weight
    loss = sum(parts.values())
    figures = {"loss": loss, **parts, "positives": chosen.sum(), "unseen": loss.new_tensor(unseen)}
    return loss, {name: value.detach().float() for name, value in figures.items()}


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

Found = tuple[Tensor, Tensor, Tensor]  # boxes N x 5, scores N and class numbers N of an image, best first


@torch.inference_mode()
def detect(detector: Detector, image: Tensor, args: argparse.Namespace, process: Process,
           least: float = 0.05, most: int = 2000) -> Found:
    """Boxes of an image C x H x W (uint8, or float pixels), from all its windows, on the CPU."""
    S, found = args.img_size, []
    places = windows_of(image.shape[1:], S)
    for first in range(0, len(places), args.batch_size_per_gpu):
        part = places[first : first + args.batch_size_per_gpu]
        windows = torch.stack([image[:, top : top + S, left : left + S] for top, left in part])
        windows = common.normalize(common.to_float(windows.to(process.device)), args.mean, args.std)
        with common.autocast(args.amp, process.device):
            logits, raw, positions, strides = detector(windows)
        scores = logits.sigmoid() * raw[..., 4:5].sigmoid()  # B x P x C
        for i, (top, left) in enumerate(part):
            best, flat = scores[i].flatten().topk(min(most, scores[i].numel()))
            best, flat = best[best > least], flat[best > least]
            at, labels = flat // logits.shape[2], flat % logits.shape[2]
            boxes = decode(raw[i, at], positions[at], strides[at])
            boxes[:, :2] += boxes.new_tensor([left, top])
            found.append([x.cpu() for x in (boxes, best, labels)])
    boxes, scores, labels = map(torch.cat, zip(*found, strict=True))
    fine = boxes.isfinite().all(1) & (boxes[:, 2:4].amin(1) >= 0.5)
    best = scores.masked_fill(~fine, -1).topk(min(most, int(fine.sum()))).indices
    boxes, scores, labels = boxes[best], scores[best], labels[best]
    kept = nms(boxes, scores, labels, 0.1 if detector.oriented else 0.5)
    boxes = canonical(boxes[kept]) if detector.oriented else boxes[kept]
    return boxes, scores[kept], labels[kept]


def surest(found: Found, least: float = 0.3) -> Found:
    """What pictures and --predict show: scores above `least`, and of two classes at one place the surer."""
    boxes, scores, labels = (x[found[1] > least] for x in found)
    kept = nms(boxes, scores, torch.zeros_like(labels), 0.5)
    return boxes[kept], scores[kept], labels[kept]


def detect_all(detector: Detector, paths: list[str], args: argparse.Namespace,
               process: Process) -> list[Found | None]:
    """Boxes of all images, in every process; None for unreadable ones, of which there may be 1 %."""
    detector.eval()
    quiet, found = not (process.is_main and sys.stderr.isatty()), []
    for path in tqdm(paths[process.rank :: process.world_size], "images", leave=False, disable=quiet):
        try:
            found.append(detect(detector, common.read_pixels(path, len(args.mean)), args, process))
        except common.UnreadableImageError as error:
            print(f"warning: unreadable, left out: {error}", file=sys.stderr)
            found.append(None)
    parts = [found]
    if process.world_size > 1:
        parts = [None] * process.world_size
        dist.all_gather_object(parts, found, group=process.cpu_group)
    found = [parts[i % process.world_size][i // process.world_size] for i in range(len(paths))]
    lost = sum(x is None for x in found)
    if lost > 0.01 * len(paths):
        common.fail(f"{lost} of {len(paths)} images unreadable, over 1 %", code=1)
    return found


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
    """Area under the curve of precision over recall, and its mean at eleven points, in %.

    Args:
        verdict: 1 or 0 for each detection of a class, best first.
        boxes: how many there are to find.
    """
    right = verdict.cumsum()
    recall, precision = right / boxes, right / np.arange(1, len(verdict) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a greater
    area = np.sum(np.diff(recall, prepend=0) * envelope)
    points = [precision[recall >= i / 10 - 1e-9].max(initial=0) for i in range(11)]
    return 100 * float(area), 100 * float(np.mean(points))


def evaluate(found: list[Found | None], samples: list[Sample], classes: list[str], oriented: bool) -> dict:
    """Average precision by class and mean over the classes that the images hold, in %; see the docstring."""
    thresholds = (0.5, 0.75) if oriented else np.arange(0.5, 1, 0.05).round(2).tolist()
    pairs = [(x, sample) for x, sample in zip(found, samples, strict=True) if x is not None]
    per_class = {}
    for number, name in enumerate(classes):
        scores, verdicts, boxes = [], {threshold: [] for threshold in thresholds}, 0
        for (guess, score, label), sample in pairs:
            own, true = label == number, sample.labels == number
            difficult = sample.difficult[true].numpy()
            iou = iou_matrix(guess[own], to_boxes(sample.corners[true], oriented))
            boxes += int((~difficult).sum())
            scores.append(score[own].numpy())
            for threshold in thresholds:
                verdicts[threshold].append(match(iou, difficult, threshold))
        if boxes:
            order = np.argsort(-np.concatenate(scores), kind="stable")
            ap = []
            for threshold in thresholds:
                verdict = np.concatenate(verdicts[threshold])[order]
                ap.append(average_precision(verdict[verdict >= 0], boxes))
            per_class[name] = {"boxes": boxes, "ap50": ap[0][0], "ap50_eleven_points": ap[0][1],
                               "ap75": ap[thresholds.index(0.75)][0]}
            if not oriented:
                per_class[name]["ap50_95"] = sum(area for area, _ in ap) / len(ap)
    if not per_class:
        common.fail("--data_path: all boxes of the test images are difficult: nothing to measure", code=1)
    figures = [name for name in next(iter(per_class.values())) if name != "boxes"]
    means = {name: round(np.mean([row[name] for row in per_class.values()]).item(), 3) for name in figures}
    return {**means, "per_class": {name: {key: round(value, 3) for key, value in row.items()}
                                   for name, row in per_class.items()}}


COLOURS = ["#ffd500", "#00e5ff", "#ff5cf4", "#7dff4d", "#ff7b24", "#7c9dff", "#ffffff", "#ff4d5e"]


def draw_boxes(image: Tensor, boxes: Tensor, labels: Tensor, args: argparse.Namespace) -> Image.Image:
    """The first three bands of an image C x H x W, 800 px wide or high, with boxes coloured by class."""
    x = common.normalize(common.to_float(image)[None], args.mean, args.std)[0]
    low, spread = (torch.tensor(value).view(-1, 1, 1) for value in (args.mean, args.std))
    x = x * spread + low if image.dtype == torch.uint8 else 0.5 + x / 6
    x = x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)
    scale = 800 / max(x.shape[1:])
    x = F.interpolate(x[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
    picture = Image.fromarray((255 * x.clamp(0, 1)).byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for corners, label in zip((scale * to_corners(boxes)).tolist(), labels.tolist(), strict=True):
        draw.polygon([tuple(corner) for corner in corners], outline=COLOURS[label % len(COLOURS)], width=2)
    return picture


def draw_examples(path: Path, samples: list[Sample], found: list[Found | None], oriented: bool,
                  args: argparse.Namespace) -> None:
    """Writes a picture with a row for each of up to 8 images: what is there, what was found."""
    rows = []
    for i in range(0, len(samples), math.ceil(len(samples) / 8)):
        if found[i] is not None:
            image = common.read_pixels(samples[i].path, len(args.mean))
            boxes, _, labels = surest(found[i])
            truth = to_boxes(samples[i].corners, oriented), samples[i].labels
            rows.append([draw_boxes(image, *what, args) for what in (truth, (boxes, labels))])
    width = max(left.width for left, _ in rows)
    sheet = Image.new("RGB", (2 * width + 8, sum(left.height + 8 for left, _ in rows)), "white")
    top = 0
    for left, right in rows:
        sheet.paste(left, (0, top))
        sheet.paste(right, (width + 8, top))
        top += left.height + 8
    common.write_atomically(path, lambda file: sheet.save(file, "png"))


# --------------------------------------------------------------------------------------------------
# Training, main
# --------------------------------------------------------------------------------------------------


def prepare(name: str, args: argparse.Namespace,
            borrowed: dict) -> tuple[nn.Module, argparse.Namespace, str]:
    """Backbone of one of --weights, the flags of its run, a report; `random` borrows arch, mean and std."""
    state, info = ({}, borrowed) if name == "random" else common.read_weights(name, args.checkpoint_key)
    args = copy.copy(args)
    args.weights, args.arch = name, args.arch or info.get("arch")
    if args.arch is None:
        common.fail(f"--weights {name}: give its --arch")
    if info.get("arch") not in (None, args.arch):
        common.fail(f"--arch {args.arch}: {name} holds {info['arch']}")
    args.patch_size = args.patch_size or info.get("patch_size")
    for key, usual in (("mean", common.IMAGENET_MEAN), ("std", common.IMAGENET_STD)):
        setattr(args, key, list(getattr(args, key) or info.get(key) or usual))
    if len(args.mean) != (args.in_chans or len(args.mean)):
        common.fail(f"--in_chans {args.in_chans}: give --mean and --std of so many, not {len(args.mean)}")
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(args.arch, args.img_size, args.patch_size, in_chans=len(args.mean))
    if not state:
        return backbone, args, f"{name}: initial weights of seed {args.seed}"
    return backbone, args, common.load_backbone(backbone, state, name, args.allow_partial)


def set_trained(detector: Detector, learns: bool, in_chans: int) -> None:
    """Chooses the backbone's parameters that learn: none, or those that its maps depend on.

    DDP would wait for the gradient of the others, such as a ViT's last norm.
    """
    backbone, side = detector.pyramid.backbone.eval().requires_grad_(learns), round(2 * detector.strides[-3])
    if learns:
        maps = detector.pyramid(torch.zeros(1, in_chans, side, side))
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(sum(x.sum() for x in maps), parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.requires_grad_(gradient is not None)


def build_optimizer(detector: Detector, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum .9; the backbone's parameters at their own rate."""
    own = {id(p) for p in detector.pyramid.backbone.parameters()}
    groups = []
    for group in common.param_groups(detector):
        for backbone, scale in ((False, 1.0), (True, args.backbone_lr / args.lr)):
            chosen = [p for p in group["params"] if (id(p) in own) == backbone]
            groups.append({**group, "params": chosen, "lr_scale": scale})
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


def train(backbone: nn.Module, report: str, samples: list[Sample], classes: list[str], oriented: bool,
          args: argparse.Namespace, process: Process) -> Detector | None:
    """Trains a detector on one of --weights; None where the run was stopped before its end."""
    dataset = BoxWindows(samples, args.img_size, args.mean, oriented, args.seed)
    run = common.Run(args, process, samples=len(dataset), images=len(samples))
    torch.manual_seed(args.seed)
    detector = Detector(Pyramid(backbone, args.weights, args.p2), len(classes), oriented, args.fpn_dim,
                        args.head_convs).eval()
    set_trained(detector, args.finetune, len(args.mean))
    common.to_device(detector, process.device).train()
    # BatchNorm keeps its statistics, except those that an untrained backbone still has to find.
    backbone.train(args.finetune and args.weights == "random")
    optimizer, scaler = build_optimizer(detector, args), run.scaler
    run.restore(backbone, detector=detector, optimizer=optimizer)
    if args.compile:
        detector.compile()
    ddp_detector = common.distributed(detector, process)

    loader = run.loader(dataset)
    for step in run.steps(loader, report, classes=len(classes), boxes=sum(len(s.labels) for s in samples),
                          kind="oriented" if oriented else "horizontal"):
        lr = learning_rate(step, run, args)
        common.set_lr(optimizer, lr)
        terms = []
        for micro in range(args.accum_steps):
            windows, targets = run.fetch()  # B x C x S x S, B x M x 6
            images = common.normalize(common.to_float(windows), args.mean, args.std)
            with common.accumulating(ddp_detector, micro, args.accum_steps):
                with run.autocast:
                    outputs = ddp_detector(images)
                loss, figures = detection_loss(outputs, targets, process)
                scaler.scale(loss / args.accum_steps).backward()
            terms.append(figures)
        grad_norm = common.grad_norm(optimizer, scaler)
        if args.clip_grad:
            nn.utils.clip_grad_norm_(detector.parameters(), args.clip_grad)
        common.optimizer_step(optimizer, scaler)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)

    if process.world_size > 1:  # BatchNorm's statistics: those of the main process, as in its files
        for buffer in detector.buffers():
            dist.broadcast(buffer, 0)
    if run.stopped or run.stop_step < run.total_steps:
        return None
    if process.is_main:
        state = {name: x for name, x in detector.state_dict().items() if ".backbone." not in name}
        saved = {"detector": state, "classes": classes, "oriented": oriented, "p2": args.p2,
                 "fpn_dim": args.fpn_dim, "head_convs": args.head_convs, "img_size": args.img_size}
        common.write_atomically(run.out / "detector.pth", lambda file: torch.save(saved, file))
    return detector


def predict(args: argparse.Namespace, process: Process) -> None:
    """Writes OUT/predictions, a text per image of the folder: a line of DOTA for each box, and its score."""
    source = Path(args.weights[0])
    try:
        saved = common.load_checkpoint(source / "detector.pth")
    except ValueError as error:
        common.fail(f"--weights {source}: no detector of this script: {error}")
    args.img_size = args.img_size or saved["img_size"]
    paths = common.list_images(args.predict, suffixes=common.PIXEL_SUFFIXES, flag="--predict")
    backbone, args, report = prepare(str(source), args, {})
    pyramid = Pyramid(backbone, args.weights, saved["p2"])
    sizes = (saved[name] for name in ("oriented", "fpn_dim", "head_convs"))
    detector = Detector(pyramid, len(saved["classes"]), *sizes)
    detector.load_state_dict({**detector.pyramid.state_dict(prefix="pyramid."), **saved["detector"]})
    out = common.make_output_dir(args.output_dir, process) / "predictions"
    found = detect_all(common.to_device(detector, process.device), paths, args, process)
    if not process.is_main:
        return
    print(report)
    for path, boxes in zip(paths, found, strict=True):
        file = out / Path(path).relative_to(args.predict).with_suffix(".txt")
        lines = []
        for corners, score, label in zip(*surest(boxes), strict=True) if boxes else ():
            numbers = " ".join(f"{x:.1f}" for x in to_corners(corners[None]).flatten().tolist())
            lines.append(f"{numbers} {saved['classes'][label]} 0 {score:.3f}\n")
        file.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(lines).encode()
        common.write_atomically(file, lambda stream, data=data: stream.write(data))
    print(f"{len(paths)} images: {out}")


def print_table(lines: list[dict]) -> None:
    """AP in %: a row for each of the weights, then AP50 of the classes."""
    width = max(len(line["weights"]) for line in lines) + 2
    names = [name for name in lines[0] if name.startswith("ap")]
    print(f"\n{lines[0]['boxes']} boxes, AP in %")
    print(" " * width + "".join(f"{name:>20}" for name in names))
    for line in lines:
        print(f"{line['weights']:{width}}" + "".join(f"{line[name]:20.2f}" for name in names))
    print("\nAP50 of each class (boxes)")
    for name, row in lines[0]["per_class"].items():
        values = "".join(f"{line['per_class'][name]['ap50']:9.2f}" for line in lines)
        print(f"  {name:24}{row['boxes']:7}{values}")
    print()


def run_all(args: argparse.Namespace, process: Process) -> None:
    """Trains and evaluates a detector on each of --weights, and writes the results."""
    samples, tests, classes, oriented = load_data(args.data_path)
    oriented = oriented if args.boxes == "auto" else args.boxes == "oriented"
    out = common.make_output_dir(args.output_dir, process)
    prepared, borrowed = [], {}
    for name in sorted(args.weights, key="random".__eq__):  # random last: it borrows
        prepared.append(prepare(name, args, borrowed))
        borrowed = {key: getattr(prepared[0][1], key) for key in ("arch", "patch_size", "mean", "std")}
    lines = []
    for backbone, own, report in prepared:
        began = time.perf_counter()
        if len(prepared) > 1:
            own.output_dir = str(out / re.sub(r"[^\w.-]+", "_", own.weights).strip("_"))
        detector = train(backbone, report, samples, classes, oriented, own, process)
        if detector is None:
            if process.is_main:
                print("stopped before the end, without a result")
            return
        found = detect_all(detector, [sample.path for sample in tests], own, process)
        if process.is_main:
            draw_examples(Path(own.output_dir) / "examples.png", tests, found, oriented, own)
            lines.append({
                "task": "detection", "weights": own.weights, "checkpoint_key": args.checkpoint_key,
                "arch": own.arch, "data": args.data_path, "boxes": "oriented" if oriented else "horizontal",
                "img_size": own.img_size, "finetune": own.finetune, "p2": own.p2, "epochs": own.epochs,
                "lr": own.lr, "seed": own.seed, "train_images": len(samples), "test_images": len(tests),
                **evaluate(found, tests, classes, oriented), "seconds": round(time.perf_counter() - began, 1),
                "versions": common.versions()})
            append_result(out, lines[-1])
    if process.is_main:
        print_table(lines)
        print("\n".join(map(json.dumps, lines)), flush=True)


def main() -> None:
    """Parses and checks the flags, joins the processes, trains and evaluates, or predicts."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    (predict if args.predict else run_all)(args, process)
    process.leave()


if __name__ == "__main__":
    main()

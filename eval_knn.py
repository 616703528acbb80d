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
--val_fraction and --split_seed. Beware of random splits of neighbouring tiles (EuroSAT's usual one):
near-copies of test images are then among the training images. Images have any bands and any type of pixels
(`--in_chans`, `--bands`); `pixel_values` says by what mean and deviation they are normalised.

Differs from the authors' code:
- all k come from one top-k over chunks of test images, so memory stays bounded; any number of classes;
- k above N is refused, or left out where it is a default;
- the features are the backbone's own (DINO-MC's authors put a random projection behind ResNet, WRN and Swin).

On screen a table; in OUTPUT_DIR/results.jsonl, and as the last lines printed, a JSON line for each weights.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
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
    add("--data_path", required=True, help="class folders, or train/ and val/ (or test/) holding them")
    add_split_flags(add)

    add = parser.add_argument_group("model").add_argument
    add_weights_flags(add)

    add = parser.add_argument_group("method").add_argument
    add("--nb_knn", type=positive(int), nargs="+", help="k; DINO-MC's authors took 5 10 15 20; default: 10 "
        "20 100 200, those up to N")
    add("--temperature", type=positive(float), default=0.07, help="tau; lower: the nearest count more")
    add("--per_class", action=yes_no, default=False, help="add the accuracy of each class at the first k")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="where results.jsonl gets its lines")
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


def add_weights_flags(add: Callable) -> None:
    """Adds the flags that `prepare` takes to a group's `add`."""
    add("--weights", nargs="+", required=True, help="one or more: output folder, checkpoint, state dict, "
        "name of timm's pretrained weights, random, image_stats (mean and std per channel)")
    add("--arch", help="timm name; for a bare state dict, and for random alone")
    add("--patch_size", type=positive(int), help="of a ViT; default: the weights' or the arch's own")
    add("--checkpoint_key", help="network of a checkpoint to take, such as student; default: the one that "
        "its run exports")
    add("--allow_partial", action=argparse.BooleanOptionalAction, default=False,
        help="accept weights that leave tensors at their initial values")


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


NB_KNN = [10, 20, 100, 200]  # DINO's k's
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def class_folders(root: Path, exclude: Path | None = None,
                  bands: list[int | str] | None = None) -> dict[str, list[str]]:
    """Class name -> its images, by the folders in `root`; without `exclude` and the output of runs."""
    folders = sorted(folder for folder in root.iterdir() if common.is_data(folder, exclude))
    names = [folder.name for folder in folders]
    if names and {name.lower() for name in names} <= SPLIT_NAMES:
        common.fail(f"--data_path: {root} holds {', '.join(names)}, no classes; call them train and val")
    if len(folders) < 2:
        common.fail(f"--data_path: {root} has {len(folders)} class folders, two or more are needed")
    return {folder.name: common.list_images(folder, exclude, bands=bands) for folder in folders}


def load_split(data_path: str, val_fraction: float, split_seed: int, exclude: Path | None = None,
               bands: list[int | str] | None = None) -> tuple[list, list, list[str], str]:
    """Training and test images as (path, class number), the class names, and the split in words."""
    root = Path(data_path)
    if not root.is_dir():
        common.fail(f"--data_path {root}: no such folder")
    if (root / "train").is_dir():
        name = next((name for name in ("val", "test") if (root / name).is_dir()), None)
        if name is None:
            common.fail(f"--data_path {root}: has train/ but neither val/ nor test/")
        train, test = (class_folders(root / part, exclude, bands) for part in ("train", name))
        split = f"train/{name}"
        if unknown := sorted(set(test) - set(train)):
            common.fail(f"--data_path {root}: {name}/ has classes that train/ lacks: {', '.join(unknown)}")
    else:
        train, test, split = {}, {}, f"{val_fraction:g} of each class, split_seed {split_seed}"
        for name, paths in class_folders(root, exclude, bands).items():
            generator = torch.Generator().manual_seed(common.stream_seed(split_seed, "split", name))
            order = torch.randperm(len(paths), generator=generator).tolist()
            count = max(1, round(val_fraction * len(paths)))
            if count == len(paths):
                common.fail(f"--val_fraction {val_fraction}: leaves no training image of class {name}")
            test[name], train[name] = ([paths[i] for i in part] for part in (order[:count], order[count:]))
    names = list(train)
    train, test = ([(path, names.index(name)) for name, paths in part.items() for path in paths]
                   for part in (train, test))
    return train, test, names, split


@dataclass
class Backbone:
    """A network to evaluate and the images that it takes."""

    model: nn.Module  # B x C x img_size x img_size -> B x D
    img_size: int
    mean: Sequence[float]  # C, of the channels
    std: Sequence[float]
    arch: str | None  # None: image statistics
    report: str  # where its weights come from
    bands: list[int | str] | None = None  # see common.read_image
    dtype: torch.dtype | None = None  # of the pixels; others are unreadable

    def images(self, samples: list[tuple[str, int]]) -> common.Samples:
        """The images of (path, class number), as its files have them."""
        images = common.Samples([path for path, _ in samples], len(self.mean), self.bands)
        images.dtype = self.dtype
        return images


class LabelledImages(torch.utils.data.Dataset):
    """Images for a backbone, the shorter side resized to 256/224 of its size, then cut to it at the centre.

    Args:
        samples: paths and classes.
        backbone: whose size, mean, std, bands and type of pixels they get.
    """

    def __init__(self, samples: list[tuple[str, int]], backbone: Backbone):
        self.labels, self.images = [label for _, label in samples], backbone.images(samples)
        self.img_size, self.mean, self.std = backbone.img_size, backbone.mean, backbone.std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Returns the normalised crop C x img_size x img_size, its class, and what is wrong.

        Of an unreadable image that is a crop of zeros, -1, and the reason.
        """
        try:
            crop = self.crop(self.images[index])
        except common.UnreadableImageError as error:
            return torch.zeros(len(self.mean), self.img_size, self.img_size), -1, str(error)
        x = common.to_float(crop, self.mean, self.std)
        return common.normalize(x, self.mean, self.std, crop.dtype).contiguous(), self.labels[index], ""

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


BASELINES = ("random", "image_stats")


def prepare(args: argparse.Namespace, process: Process, train: list, drop_path: float = 0) -> list[Backbone]:
    """Builds and fills the backbone of each of --weights; a baseline takes after the first of the others.

    Sets args.in_chans: as given, or as many as --bands, or as the first weights have, else 3. `train`: the
    training images, whose pixels are looked at.
    """
    sources = {name: common.read_weights(name, args.checkpoint_key) for name in args.weights
               if name not in BASELINES}
    borrowed = next((info for _, info in sources.values()), {})
    common.check_bands(args, len(borrowed.get("mean", common.IMAGENET_MEAN)))
    samples = common.Samples([path for path, _ in train], args.in_chans, args.bands)
    found = common.measure_pixels(samples, 32)
    if args.in_chans != 3 or found.dtype != torch.uint8:
        found = common.measure_pixels(samples)  # the values may serve
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
    if img_size % (multiple := common.patch_multiple(model)):
        common.fail(f"--img_size {img_size}: no multiple of the patch, {multiple}")
    return Backbone(model, img_size, mean, std, arch, f"{arch}: {report}", args.bands, dtype)


def center_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of N x D features over the images; 1 where all images have the same."""
    spread = x.std(0)
    return x.mean(0), torch.where(spread > 1e-6 * x.abs().amax(0), spread, 1)


@torch.inference_mode()
def extract_features(backbone: Backbone, dataset: torch.utils.data.Dataset, args: argparse.Namespace,
                     process: Process, may_lose: float = 0.01) -> tuple[Tensor, Tensor]:
    """Features N x D (float32, unnormalised) and labels N of all images, in their order, in every process.

    The network goes to the device and into eval mode. Batches are dealt out to the processes whole, so each
    is the same whatever their number. Fails when more than the share `may_lose` of the images are
    unreadable, or a feature is not finite.
    """
    index = torch.arange(len(dataset)).split(args.batch_size_per_gpu)
    mine = [batch.tolist() for batch in index[process.rank :: process.world_size]]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=mine, num_workers=common.worker_count(args.num_workers),
        pin_memory=process.device.type == "cuda")
    model, autocast = backbone.model.to(process.device).eval(), common.autocast(args.amp, process.device)
    features, labels, unreadable = [], [], []
    quiet = not (process.is_main and sys.stderr.isatty())
    for images, label, message in tqdm(loader, "features", leave=False, disable=quiet):
        with autocast:
            features.append(model(images.to(process.device, non_blocking=True)).float().cpu())
        labels.append(label)
        unreadable += filter(None, message)
    for message in unreadable:
        print(f"warning: unreadable, left out: {message}", file=sys.stderr)
    parts = [list(zip(features, labels, strict=True))]
    if process.world_size > 1:
        parts = [None] * process.world_size
        dist.all_gather_object(parts, list(zip(features, labels, strict=True)), group=process.cpu_group)
    # Batch number i was the process i % world_size's next one.
    batches = [parts[i % process.world_size][i // process.world_size] for i in range(len(index))]
    features, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    lost = int((labels < 0).sum())
    if lost > may_lose * len(dataset) or lost == len(dataset):
        common.fail(f"{lost} of {len(dataset)} images are unreadable, more than {100 * may_lose:g} %", code=1)
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not features.isfinite().all():
        common.fail("not all features are finite: damaged weights, or try --amp off", code=1)
    return features, labels


# --------------------------------------------------------------------------------------------------
# Vote
# --------------------------------------------------------------------------------------------------


def knn_predict(train: Tensor, train_labels: Tensor, test: Tensor, ks: list[int], temperature: float,
                chunk_elements: int = 2**24) -> Tensor:
    """Predicted classes by weighted vote, for all k from one top-k.

    Args:
        train: N x D features of unit length.
        train_labels: N class numbers.
        test: M x D features of unit length.
        ks: numbers of neighbours.
        temperature: tau; a vote weighs exp(cosine / tau), here divided by that of the nearest neighbour: the
            same vote, without overflow, and a small tau leaves the nearest its weight.
        chunk_elements: similarities held at once; bounds the memory.

    Returns:
        len(ks) x M class numbers, in the order of `ks`.
    """
    C, ascending = int(train_labels.max()) + 1, sorted(set(ks))
    predictions = []
    for chunk in test.split(max(1, chunk_elements // max(len(train), C))):
        similarity, neighbours = (chunk @ train.T).topk(ascending[-1], dim=1)  # m x k, the nearest first
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes, of_k, counted = torch.zeros(len(chunk), C, device=test.device), {}, 0
        for k in ascending:  # k's voters are those of the smaller k and the next ones
            votes.scatter_add_(1, train_labels[neighbours[:, counted:k]], weights[:, counted:k])
            of_k[k], counted = votes.argmax(1), k
        predictions.append(torch.stack([of_k[k] for k in ks]))
    return torch.cat(predictions, 1)


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


def evaluate(backbone: Backbone, train: list, test: list, C: int, args: argparse.Namespace,
             process: Process) -> dict:
    """Top-1 in percent for each k, and with --per_class that of each class at the first k."""
    (train_x, train_y), (test_x, test_y) = (
        extract_features(backbone, LabelledImages(part, backbone), args, process) for part in (train, test))
    if isinstance(backbone.model, ImageStats):
        center, spread = center_and_spread(train_x)
        train_x, test_x = (train_x - center) / spread, (test_x - center) / spread
    ks = choose_ks(args.nb_knn, len(train_x), "training images that are readable")
    train_x, test_x = F.normalize(train_x, dim=1).to(process.device), F.normalize(test_x, dim=1)
    mine = slice(process.rank, None, process.world_size)  # this process's share of the test images
    mine_x, mine_y = test_x[mine].to(process.device), test_y[mine]
    predicted = knn_predict(train_x, train_y.to(process.device), mine_x, ks, args.temperature).cpu()
    right = torch.stack([mine_y[row == mine_y].bincount(minlength=C) for row in predicted])  # len(ks) x C
    if process.world_size > 1:
        dist.all_reduce(right, group=process.cpu_group)
    of_class = torch.bincount(test_y, minlength=C)
    result = {"top1": {str(k): round(100 * count / len(test_y), 3)
                       for k, count in zip(ks, right.sum(1).tolist(), strict=True)}}
    if args.per_class:
        result["per_class"] = [round(100 * hits / images, 3) if images else None
                               for hits, images in zip(right[0].tolist(), of_class.tolist(), strict=True)]
    return result | {"train_images": len(train_y), "test_images": len(test_y)}


def main() -> None:
    """Checks everything, then evaluates each of the weights."""
    args = get_parser().parse_args()
    common.check_bands(args, None)
    process = common.init_process(args.device)
    common.autocast(args.amp, process.device)  # before a network is built, whose attention it chooses
    out = common.make_output_dir(args.output_dir, process)
    train, test, classes, split = load_split(args.data_path, args.val_fraction, args.split_seed, out,
                                             args.bands)
    common.check_alike(process, training_images=len(train), test_images=len(test))
    ks = choose_ks(args.nb_knn, len(train), "training images")
    if process.is_main and args.nb_knn is None and ks != NB_KNN:
        left_out = " ".join(str(k) for k in NB_KNN if k not in ks)
        print(f"--nb_knn: {left_out} left out, above the number of training images, {len(train)}")
    backbones = prepare(args, process, train)

    lines, versions = [], common.versions()
    for name, backbone in zip(args.weights, backbones, strict=True):
        began = time.perf_counter()
        if process.is_main:
            print(backbone.report, flush=True)
        result = evaluate(backbone, train, test, len(classes), args, process)
        lines.append({"task": "knn", "weights": name, "checkpoint_key": args.checkpoint_key,
                      "arch": backbone.arch, "patch_size": args.patch_size, "data": args.data_path,
                      "split": split, "in_chans": args.in_chans, "bands": args.bands,
                      "img_size": backbone.img_size, "temperature": args.temperature,
                      "amp": args.amp, "seed": args.seed, "loading": backbone.report, **result,
                      "seconds": round(time.perf_counter() - began, 1), "versions": versions})
        if process.is_main:
            append_result(out, lines[-1])
    if process.is_main:
        print_table(lines, classes)
        print("\n".join(map(json.dumps, lines)), flush=True)
    process.leave()


def append_result(out: Path, line: dict) -> None:
    """Adds a line to results.jsonl in `out`, once it is measured: a later failure loses none."""
    with common.writing(out / "results.jsonl"), open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def print_table(lines: list[dict], classes: list[str]) -> None:
    """Top-1 in percent: a row for each of the weights, a column for each k, then the classes."""
    width = max(len(line["weights"]) for line in lines)
    print(f"\nkNN top-1 in %, {lines[0]['train_images']} training and {lines[0]['test_images']} test images, "
          f"{len(classes)} classes (chance {100 / len(classes):.1f} %)")
    print(" " * width + "".join(f"{'k ' + k:>9}" for k in lines[0]["top1"]))
    for line in lines:
        print(f"{line['weights']:{width}}" + "".join(f"{value:9.2f}" for value in line["top1"].values()))
    print_classes(f"per class at k {next(iter(lines[0]['top1']))}", lines, classes)


def print_classes(title: str, lines: list[dict], classes: list[str]) -> None:
    """The figures of each class, with --per_class: a column for each of the weights."""
    if "per_class" in lines[0]:
        print(f"\n{title}")
        for i, name in enumerate(classes):
            values = [line["per_class"][i] for line in lines]
            print(f"  {name:24}" + "".join(f"{'-':>9}" if v is None else f"{v:9.2f}" for v in values))
    print()


if __name__ == "__main__":
    main()

"""Linear probe of frozen backbones, fine-tuning, and classification of new images with what was learned.

    # linear probe: features once, heads for many learning rates at once, the best chosen on a part of the
    # training images; beside image statistics and untrained weights
    python eval_linear.py --data_path LABELLED --weights OUT image_stats random --output_dir PROBE
    # the papers' way, new crops in each epoch and one learning rate: DINO-MC's, MHCL's
    python eval_linear.py --data_path LABELLED --weights OUT --output_dir PAPER1 --protocol paper --lrs .001
    python eval_linear.py --data_path LABELLED --weights OUT --output_dir PAPER2 --protocol paper --lrs .1 \
        --schedule 60 80
    # fine-tuning, on several GPUs
    python -m torch.distributed.run --nproc_per_node 4 eval_linear.py --finetune --data_path LABELLED \
        --weights OUT --output_dir FINE --layer_decay .65 --drop_path .1 --mixup .8 --cutmix 1 --erase .25
    # then the classes of new images
    python eval_linear.py --predict NEW_IMAGES --weights FINE --output_dir FINE

    symbol    variable       flag (default)              what
    N         N              -                           training images
    D         D              -                           width of a feature
    C         C              -                           classes
    L         L              lrs                         learning rates tried at once
    B         B              batch_size (256)            images per step of a head, over all processes

Frozen: the backbone is in eval mode, BatchNorm too, and gets no gradient. Its features are computed once, or
with `--protocol paper` in each epoch from new crops, and heads are trained on them. With several `--lrs` a
head is trained for each, on 80 % of the training images of each class; the learning rate of the best on the
other 20 % trains a head on all of them; then the test images are looked at, once. A ViT's feature is the
class tokens of its last `--n_last_blocks`, that of other nets the pooled last map. `--finetune` trains the
backbone too, on all training images; the last epoch counts. With `--avgpool`, as MAE and CSPT do it, a ViT's
feature is then its mean patch token behind a fresh norm. Images and labels: as eval_knn.py takes them.

Differs from MAE's fine-tuning: without `--avgpool` a ViT's last norm has the learning rate of its last block,
theirs that of the head.

In OUT: results.jsonl gets a line for each of the weights and each --train_fraction, with top-1 and macro
precision, recall and F1 (several labels: micro AP, macro AP, micro F1); of the first of the weights (but
image_stats) and the largest fraction there are head.pth, backbone/ and confusion.png (rows: true class,
columns: predicted). `--predict` writes predictions.csv.
"""

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm.layers
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import CutMix, MixUp, RandAugment, RandomChoice, RandomErasing
from torchvision.transforms.v2.functional import resized_crop

import common
import eval_knn
from common import Process, not_negative, number, positive, unit
from eval_knn import Backbone, CenterCrops, ImageStats, Labelled, draw_share, extract_features

FIGURES = {"top1": "top1", "macro_precision": "precision", "macro_recall": "recall", "macro_f1": "f1",
           "micro_ap": "micro AP", "macro_ap": "macro AP", "micro_f1": "micro F1"}
# Flags that may change between a fine-tuning and its continuation. All others make the result.
FREE_FLAGS = common.FREE_FLAGS - {"checkpoint_key", "allow_partial"} | {"per_class"}
HELD_OUT = 0.2  # of the training images of each class, to choose the learning rate on
FINETUNE_FLAGS = (
    "drop_path mixup cutmix smoothing rand_augment erase accum_steps optimizer lr min_lr warmup_epochs "
    "weight_decay layer_decay compile save_every save_minutes log_every max_steps tensorboard").split()
FROZEN_FLAGS = "protocol n_last_blocks lrs schedule batch_size".split()
LRS = [mantissa * 10.0**exponent for exponent in range(-4, 2) for mantissa in (1, 2, 5)]

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", help="class folders, or train/ and val/ (or test/) holding them; or with a labels.csv")
    add("--predict", help="instead: classify this folder's images, with an --output_dir as --weights")
    eval_knn.add_split_flags(add)

    add = parser.add_argument_group("model").add_argument
    eval_knn.add_weights_flags(add)
    add("--drop_path", type=unit(float), default=0.0, help="of the backbone in --finetune")

    add = parser.add_argument_group("method").add_argument
    add("--finetune", action=yes_no, default=False, help="train the backbone too")
    add("--protocol", choices=["cached", "paper"], default="cached", help="features once, or of new random "
        "crops in each epoch, which takes --epochs times as long")
    add("--n_last_blocks", type=positive(int), help="class tokens of so many blocks of a ViT; default: 4")
    add("--avgpool", action=yes_no, default=False, help="mean patch token of a ViT; frozen: beside the "
        "class tokens, --finetune: in their place, behind a fresh norm. For MAE")
    for name, usual in (("mixup", ".8"), ("cutmix", "1")):
        add(f"--{name}", type=not_negative(float), default=0.0, help=f"alpha of {name} in --finetune; "
            f"{usual} in CMID and DSPT")
    add("--smoothing", type=unit(float), default=0.0, help="of labels in --finetune; .1 is usual")
    add("--rand_augment", type=number(float, lambda strength: 0 <= strength <= 10, "from 0 to 10"),
        default=0.0, help="strength of RandAugment in --finetune; 9 in CMID")
    add("--erase", type=unit(float), default=0.0, help="probability of a random box of noise in --finetune; "
        ".25 in CMID and DSPT")
    add("--per_class", action=yes_no, default=False, help="print the figure of each class")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=100, help="over the training images")
    add("--train_fraction", type=number(float, lambda share: 0 < share <= 1, "above 0, at most 1"), nargs="+",
        default=[1.0], help="share of the training images of each class to learn from, at least one, drawn "
        "by --split_seed; several give a row each; .01 .1 1 is usual")
    add("--lrs", type=positive(float), nargs="+", default=LRS, help="frozen: to choose from, at a batch of "
        "256, scaled linearly; one: no choice")
    add("--schedule", type=positive(int), nargs="+", help="frozen: epochs when it falls to a tenth; default: "
        "cosine")
    add("--batch_size", type=positive(int), default=256, help="frozen: images per step of a head")
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images per process and pass through "
        "the backbone")
    add("--accum_steps", type=positive(int), default=1, help="--finetune: micro-batches per optimizer step")
    add("--optimizer", choices=["adamw", "adan", "sgd"], default="adamw", help="--finetune")
    add("--lr", type=positive(float), default=5e-4, help="--finetune: at an effective batch of 256, scaled "
        "linearly")
    add("--min_lr", type=not_negative(float), default=1e-6, help="--finetune: at the end of its cosine")
    add("--warmup_epochs", type=not_negative(float), help="--finetune: of the learning rate; default: 5, but "
        "at most a tenth of --epochs")
    add("--weight_decay", type=not_negative(float), default=0.05, help="--finetune: not on biases and norms")
    add("--layer_decay", type=number(float, lambda factor: 0 < factor <= 1, "above 0, at most 1"),
        default=1.0, help="--finetune: factor of the rate from one layer to that below; .65 for a ViT after "
        "MAE")

    common.add_run_flags(parser, amp="off")
    return parser


def changed_flags(args: argparse.Namespace) -> list[str]:
    """Names of the flags that are not at their defaults."""
    parser = get_parser()
    parser.set_defaults(warmup_epochs=common.default_warmup(None, 5, args.epochs))
    return eval_knn.changed_flags(args, parser)


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags."""
    args.warmup_epochs = common.default_warmup(args.warmup_epochs, 5, args.epochs)
    changed = changed_flags(args)
    eval_knn.check_mode(args, changed, also=("img_size", "in_chans", "bands"))
    if args.schedule and max(args.schedule) >= args.epochs:
        common.fail(f"--schedule {' '.join(map(str, args.schedule))}: must be less than --epochs "
                    f"{args.epochs}")
    if args.finetune and len(args.weights) > 1:
        common.fail(f"--weights {' '.join(args.weights)}: one at a time with --finetune")
    if args.finetune and args.weights == ["image_stats"]:
        common.fail("--weights image_stats: has nothing to fine-tune")
    if args.finetune and len(args.train_fraction) > 1:
        common.fail(f"--train_fraction {' '.join(map(str, args.train_fraction))}: one with --finetune")
    for name in changed:
        if name in (FROZEN_FLAGS if args.finetune else FINETUNE_FLAGS):
            common.fail(f"--{name}: {'not' if args.finetune else 'only'} with --finetune")
    if args.finetune and args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs}")


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


def random_crop(image: Tensor, img_size: int) -> Tensor:
    """RandomResizedCrop and flip, drawn from torch's generator; C x img_size x img_size."""
    box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
    crop = resized_crop(image, *box, [img_size] * 2, InterpolationMode.BICUBIC)
    return crop.flip(-1) if torch.rand(()) < 0.5 else crop


class CropsOfEpoch(CenterCrops):
    """As CenterCrops, with random crops, drawn from (seed, epoch, index) alone."""

    def __init__(self, paths: Sequence[str], backbone: Backbone, seed: int, epoch: int):
        super().__init__(paths, backbone)
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Returns the normalised crop, `index` (-1: unreadable), and what is wrong."""
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "probe", self.epoch, index))
        return super().__getitem__(index)

    def crop(self, image: Tensor) -> Tensor:
        """A random crop in the place of the centre's."""
        return random_crop(image, self.img_size)


class FinetuneImages(torch.utils.data.Dataset):
    """A random crop and its label or labels, drawn from (seed, epoch, index) alone.

    `rand_augment`: strength of RandAugment's two operations, from 0 (none) to 10.
    """

    def __init__(self, train: Labelled, backbone: Backbone, rand_augment: float, seed: int):
        self.labels, self.images = train.labels, backbone.images(train.paths)
        self.img_size, self.seed, self.augment = backbone.img_size, seed, None
        if rand_augment:
            fill = [127.0] * len(backbone.mean)
            self.augment = RandAugment(2, round(100 * rand_augment), 1001, fill=fill)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns the crop C x img_size x img_size, of the file's type, and its row of the labels."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "finetune", epoch, index))
        crop = random_crop(self.images[index], self.img_size)
        if self.augment:
            crop = self.augment(crop)
        return crop.contiguous(), self.labels[index]


def erase_and_mix(images: Tensor, targets: Tensor, C: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Boxes of noise in images B x bands x H x W, then mixup or cutmix of the batch, as args ask for.

    Targets are B classes, or B x C of 0 and 1; those of mixed images come back as B x C shares.
    """
    if args.erase:
        erase = RandomErasing(args.erase, value="random")
        images = torch.stack([erase(image) for image in images])
    B, kinds = len(images), ((MixUp, args.mixup), (CutMix, args.cutmix))
    mixes = [kind(alpha=alpha, num_classes=B) for kind, alpha in kinds if alpha]
    if not mixes:
        return images, targets
    images, shares = RandomChoice(mixes)(images, torch.arange(B, device=images.device))
    targets = F.one_hot(targets, C) if targets.ndim == 1 else targets
    return images, shares @ targets.float()  # B x B: how much of which image


# --------------------------------------------------------------------------------------------------
# Model: features, and heads for many learning rates at once
# --------------------------------------------------------------------------------------------------


class LastBlocks(nn.Module):
    """Normed class tokens of a timm ViT's last blocks, side by side; with avgpool the mean patch too."""

    def __init__(self, vit: VisionTransformer, n_last_blocks: int, avgpool: bool):
        super().__init__()
        self.vit, self.n_last_blocks, self.avgpool = vit, n_last_blocks, avgpool

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W -> N x D."""
        blocks = self.vit.get_intermediate_layers(  # patch tokens and prefix tokens of each
            images, self.n_last_blocks, return_prefix_tokens=True, norm=True)
        parts = [prefix[:, 0] for _, prefix in blocks]
        if self.avgpool:
            parts.append(blocks[-1][0].mean(1))
        return torch.cat(parts, -1)


def with_features(backbone: Backbone, name: str, n_last_blocks: int | None, avgpool: bool) -> Backbone:
    """The backbone with the features to probe: LastBlocks of a ViT with a class token, else as it is.

    A ViT with fc_norm has no norm for class tokens: it stays as it is, too.
    """
    vit = backbone.model
    if isinstance(vit, VisionTransformer) and vit.has_class_token and isinstance(vit.fc_norm, nn.Identity):
        n = n_last_blocks or min(4, len(vit.blocks))
        if n > len(vit.blocks):
            common.fail(f"--n_last_blocks {n}: {name} has {len(vit.blocks)}")
        return replace(backbone, model=LastBlocks(vit, n, avgpool))
    if (n_last_blocks or avgpool) and not isinstance(vit, ImageStats):
        common.fail(f"--n_last_blocks, --avgpool: {name} is no ViT with a class token, or has fc_norm")
    return backbone


def use_patch_tokens(vit: nn.Module) -> str:
    """Turns a ViT's feature into fc_norm(mean of the patch tokens), as timm's global_pool="avg" builds it.

    Returns words for the report; a ViT that has an fc_norm already stays as it is.
    """
    if not isinstance(vit, VisionTransformer) or isinstance(vit.norm, type(vit.fc_norm)):  # one is Identity
        common.fail(f"--avgpool: with --finetune only for a ViT with a last norm, not {type(vit).__name__}")
    if not isinstance(vit.fc_norm, nn.Identity):
        return "; --avgpool: it has fc_norm already"
    vit.fc_norm, vit.norm, vit.attn_pool = vit.norm, nn.Identity(), None
    vit.fc_norm.reset_parameters()
    vit.global_pool = vit.model_args["global_pool"] = "avg"
    return "; --avgpool: the mean patch token, behind fc_norm, which starts fresh; norm is not used"


def train_heads(features_at: Callable[[int], Tensor], labels: Tensor, index: Tensor, C: int,
                lrs: Sequence[float], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Trains a linear head for each learning rate, all on the same batches; SGD, momentum .9, no decay.

    `features_at`: epoch -> N x D; `labels`: N, or N x C of 0 and 1; `index`: the images to train on; `lrs`: L
    rates at a batch of 256, each a tenth after the epochs of --schedule, or without it a cosine to 0.
    Returns weights L x C x D and biases L x C.
    """
    D, L = features_at(0).shape[1], len(lrs)
    initial = 0.01 * torch.randn(C, D, generator=common.generator(args.seed, "head"))
    W = initial.to(labels.device).repeat(L, 1, 1)
    b = torch.zeros(L, C, device=labels.device)
    lr = torch.tensor([lr * args.batch_size / 256 for lr in lrs], device=labels.device)
    heads, momenta = [W.requires_grad_(), b.requires_grad_()], [torch.zeros_like(W), torch.zeros_like(b)]
    steps_per_epoch = math.ceil(len(index) / args.batch_size)
    for epoch in range(args.epochs):
        x = features_at(epoch)
        order = torch.randperm(len(index), generator=common.generator(args.seed, "head order", epoch))
        for i, batch in enumerate(index[order.to(index.device)].split(args.batch_size)):
            if args.schedule is None:
                step, steps = epoch * steps_per_epoch + i, args.epochs * steps_per_epoch
                now = common.cosine_schedule(1.0, 0.0, step, steps)
            else:
                now = 0.1 ** sum(epoch >= milestone for milestone in args.schedule)
            logits = torch.einsum("bd,lcd->blc", x[batch], W) + b
            if labels.ndim == 2:
                targets = labels[batch].unsqueeze(1).expand(-1, L, -1)
                loss = L * F.binary_cross_entropy_with_logits(logits, targets)  # a mean over B, L and C
            else:
                targets = labels[batch].unsqueeze(1).expand(-1, L)
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(batch)
            gradients = torch.autograd.grad(loss, heads)
            with torch.no_grad():
                for head, momentum, gradient in zip(heads, momenta, gradients, strict=True):
                    momentum.mul_(0.9).add_(gradient)
                    head.sub_(now * lr.view(-1, *[1] * (head.ndim - 1)) * momentum)  # its own rate for each
    return W.detach(), b.detach()


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def confusion_matrix(labels: Tensor, predicted: Tensor, C: int) -> Tensor:
    """Counts C x C; row: true class, column: predicted."""
    return torch.bincount(labels * C + predicted, minlength=C * C).view(C, C)


def metrics(confusion: Tensor) -> dict[str, float]:
    """Top-1, and precision, recall and F1 as means over the classes with test images, in percent.

    A class that is never predicted has precision 0; F1 is the mean of the classes' own.
    """
    right, images, predicted = confusion.diag().double(), confusion.sum(1), confusion.sum(0)
    precision, recall = right / predicted.clamp(min=1), right / images.clamp(min=1)
    f1 = 2 * right / (images + predicted).clamp(min=1)
    figures = {"top1": right.sum() / images.sum()}
    figures |= {f"macro_{name}": value[images > 0].mean()
                for name, value in (("precision", precision), ("recall", recall), ("f1", f1))}
    return {name: round(100 * value.item(), 3) for name, value in figures.items()}


def figures_of(logits: Tensor, labels: Tensor) -> tuple[dict[str, float], list[float | None]]:
    """Figures in percent of M x C logits, and that of each class: its accuracy, or its average precision."""
    if labels.ndim == 2:
        return eval_knn.multi_label_figures(logits, labels, threshold=0)
    confusion = confusion_matrix(labels, logits.argmax(1), logits.shape[1])
    share = 100 * confusion.diag() / confusion.sum(1)
    return metrics(confusion), [None if math.isnan(x) else round(x, 3) for x in share.tolist()]


def save_confusion(path: Path, confusion: Tensor, classes: list[str]) -> None:
    """Draws the matrix, each row divided by its sum: white 0, black 1, with class names and row percent."""
    side, left = 30, 8 + 7 * max(map(len, classes))
    picture = Image.new("RGB", (left + side * len(classes) + 8, side * len(classes) + 8), "white")
    draw = ImageDraw.Draw(picture)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    for row, name in enumerate(classes):
        draw.text((4, side * row + 9), name, "black")
        for column, value in enumerate(share[row].tolist()):
            x, y, shade = left + side * column, side * row, round(255 * (1 - value))
            outline = (60, 120, 220) if row == column else (225, 225, 225)
            draw.rectangle((x, y, x + side - 2, y + side - 2), (shade,) * 3, outline)
            if value >= 0.005:
                draw.text((x + 5, y + 9), f"{100 * value:.0f}", "white" if value > 0.5 else "black")
    common.write_atomically(path, lambda file: picture.save(file, "png"))


# --------------------------------------------------------------------------------------------------
# Frozen
# --------------------------------------------------------------------------------------------------


class TrainingFeatures:
    """Features of the training images: of centre crops, and of the crops that heads learn from in each epoch.

    `x`, N x D of centre crops (image statistics standardised), and `labels` are of the readable images, whose
    numbers are `index`.
    """

    def __init__(self, backbone: Backbone, train: Labelled, args: argparse.Namespace, process: Process):
        self.backbone, self.paths, self.args, self.process = backbone, train.paths, args, process
        self.of_epoch = None, None  # number of an epoch, and the features of its crops
        x, self.index = extract_features(backbone, CenterCrops(train.paths, backbone), args, process)
        self.center, self.spread = (0, 1)
        if isinstance(backbone.model, ImageStats):
            self.center, self.spread = eval_knn.center_and_spread(x)
        self.x, self.labels = self.standardise(x), train.labels[self.index].to(process.device)

    def standardise(self, x: Tensor) -> Tensor:
        """Features of any images, N x D, as heads take them; on the device."""
        return ((x - self.center) / self.spread).to(self.process.device)

    def at(self, epoch: int) -> Tensor:
        """What heads learn from in an epoch, N x D."""
        if self.args.protocol == "cached":
            return self.x
        if self.of_epoch[0] != epoch:
            crops = CropsOfEpoch(self.paths, self.backbone, self.args.seed, epoch)
            x, index = extract_features(self.backbone, crops, self.args, self.process)
            if not torch.equal(index, self.index):
                common.fail("other images are readable than before", code=1)
            self.of_epoch = epoch, self.standardise(x)
        return self.of_epoch[1]


def held_out(labels: Tensor, split_seed: int) -> Tensor:
    """True for the images, N, of which the learning rate is chosen; fails where there are none."""
    held = draw_share(labels, HELD_OUT, split_seed, "held out")
    if not held.any() or labels.ndim == 2 and not labels[held].any():
        common.fail("--lrs, --train_fraction: so few images of each class leave none to choose among several "
                    "learning rates on; give one, or a larger fraction")
    return held


def choose_lr(features: TrainingFeatures, index: Tensor, C: int,
              args: argparse.Namespace) -> tuple[float, dict]:
    """The rate of --lrs whose head is best on a part of the images `index`, and figures for the results."""
    held = held_out(features.labels[index].cpu(), args.split_seed).to(index.device)
    W, b = train_heads(features.at, features.labels, index[~held], C, args.lrs, args)
    logits = torch.einsum("nd,lcd->lnc", features.x[index[held]], W) + b.unsqueeze(1)  # L x N x C
    truth = features.labels[index[held]].cpu()
    name = "micro_ap" if truth.ndim == 2 else "top1"
    found = [figures_of(of_lr.cpu(), truth)[0][name] if of_lr.isfinite().all() else 0.0 for of_lr in logits]
    lr = args.lrs[max(range(len(found)), key=found.__getitem__)]
    if features.process.is_main and lr in (min(args.lrs), max(args.lrs)):
        print(f"warning: the best learning rate, {lr:g}, is at the end of --lrs", file=sys.stderr)
    of_lr = {f"{lr:g}": value for lr, value in zip(args.lrs, found, strict=True)}
    return lr, {"held_out_images": int(held.sum()), f"held_out_{name}": of_lr}


def probe(backbone: Backbone, train: Labelled, test: Labelled, classes: list[str], args: argparse.Namespace,
          process: Process) -> list[tuple[dict, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Trains heads on frozen features, for each --train_fraction, and looks at the test images once.

    Returns of each: results, logits M x C and labels of the test images, weight C x D and bias C of the head.
    """
    C, shares = len(classes), [fraction_of(train, share, classes, args) for share in args.train_fraction]
    features = TrainingFeatures(backbone, train, args, process)
    test_x, test_index = extract_features(backbone, CenterCrops(test.paths, backbone), args, process)
    done = []
    for share, mask in zip(args.train_fraction, shares, strict=True):
        index = mask[features.index].nonzero().flatten().to(process.device)
        lr, choice = choose_lr(features, index, C, args) if len(args.lrs) > 1 else (args.lrs[0], {})
        W, b = train_heads(features.at, features.labels, index, C, [lr], args)
        if not W.isfinite().all():
            common.fail(f"--lrs {lr:g}: the head's weights are not finite; take a smaller one", code=1)
        logits = (features.standardise(test_x) @ W[0].T + b[0]).cpu()
        result = {"train_fraction": share, "lr": lr, **choice, "train_images": len(index),
                  "test_images": len(test_x)}
        done.append((result, logits, test.labels[test_index], (W[0].cpu(), b[0].cpu())))
    return done


def fraction_of(train: Labelled, share: float, classes: list[str], args: argparse.Namespace) -> Tensor:
    """True for the images of a --train_fraction, N."""
    return draw_share(train.labels, share, args.split_seed, "fraction", names=classes, may_be_all=True)


# --------------------------------------------------------------------------------------------------
# Fine-tuning
# --------------------------------------------------------------------------------------------------


def finetune(backbone: Backbone, train: Labelled, C: int, args: argparse.Namespace, process: Process) -> bool:
    """Trains backbone and head, a timm model of C classes, in place; True when all epochs are done."""
    # Data
    if args.rand_augment and (len(backbone.mean) not in (1, 3) or backbone.dtype != torch.uint8):
        common.fail(f"--rand_augment {args.rand_augment:g}: only for 8-bit images of 1 or 3 bands, these are "
                    f"{str(backbone.dtype).removeprefix('torch.')} of {len(backbone.mean)}")
    multi_label = train.labels.ndim == 2
    if args.smoothing and multi_label:
        common.fail(f"--smoothing {args.smoothing:g}: only where each image has one label")
    run = common.Run(args, process, samples=len(train), images=len(train), free_flags=FREE_FLAGS)

    # Network
    model = common.sync_batchnorm(common.to_device(backbone.model, process.device), process).train()
    optimizer, scaler = timm.optim.create_optimizer_v2(
        model, opt="momentum" if args.optimizer == "sgd" else args.optimizer, lr=args.lr, momentum=0.9,
        weight_decay=args.weight_decay, layer_decay=args.layer_decay), run.scaler
    run.restore(None, model=model, optimizer=optimizer)
    if args.compile:
        model.compile()
    ddp_model = common.distributed(model, process)

    loader = run.loader(FinetuneImages(train, backbone, args.rand_augment, args.seed))
    base_lr = args.lr * run.effective_batch / 256
    warmup_steps = round(args.warmup_epochs * run.steps_per_epoch)
    for step in run.steps(loader, backbone.report, scaled_lr=base_lr):
        lr = common.cosine_schedule(base_lr, args.min_lr, step, run.total_steps, warmup_steps)
        common.set_lr(optimizer, lr)  # of the head; that of the layers below by --layer_decay
        terms = []

        for micro in range(args.accum_steps):
            crops, targets = run.fetch()  # B x bands x H x W, B or B x C
            images = common.to_float(crops, backbone.mean, backbone.std)
            images = common.normalize(images, backbone.mean, backbone.std, crops.dtype)
            # The draws of erasing, mixing and drop path.
            torch.manual_seed(common.stream_seed(args.seed, "mix", step, micro, process.rank))
            images, targets = erase_and_mix(images, targets, C, args)
            with common.accumulating(ddp_model, micro, args.accum_steps):
                with run.autocast:
                    logits = ddp_model(images)  # B x C
                if multi_label:
                    loss = F.binary_cross_entropy_with_logits(logits.float(), targets)
                else:
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accum_steps).backward()
            terms.append({"loss": loss.detach()})

        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)

    common.share_buffers(model, process)
    return run.has_result()


def run_finetune(backbone: Backbone, train: Labelled, test: Labelled, classes: list[str],
                 args: argparse.Namespace, process: Process) -> list[tuple]:
    """Gives the backbone a head, trains both, looks at the test images once, takes the head off again.

    Returns what `probe` does; an empty list when it was stopped before the end.
    """
    C, train = len(classes), train.part(fraction_of(train, args.train_fraction[0], classes, args))
    model = backbone.model
    if args.avgpool:
        backbone.report += use_patch_tokens(model)
    torch.manual_seed(args.seed)
    model.reset_classifier(C)
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        common.fail(f"--finetune: timm gives {type(model).__name__} no linear head")
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    if not finetune(backbone, train, C, args, process):
        return []
    logits, index = extract_features(backbone, CenterCrops(test.paths, backbone), args, process)
    result = {"train_fraction": args.train_fraction[0], "lr": args.lr, "train_images": len(train),
              "test_images": len(index)}
    weights = head.weight.detach().cpu(), head.bias.detach().cpu()
    model.cpu().reset_classifier(0)
    return [(result, logits, test.labels[index], weights)]


# --------------------------------------------------------------------------------------------------
# Prediction of new images
# --------------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace, process: Process, out: Path) -> None:
    """Writes predictions.csv, a row for each readable image of the folder: path, class, its probability.

    Of a multi-label head: path, labels above a probability of .5, joined by |, and that of each.
    """
    source = Path(args.weights[0])
    with eval_knn.load_saved(source, "head.pth") as head:
        # Older heads have neither size nor bands and type of pixels.
        args.img_size, args.bands = args.img_size or head.get("img_size"), args.bands or head.get("bands")
        dtype = {"uint8": torch.uint8, "float32": torch.float32}.get(head.get("dtype"))
        name = str(source / "backbone")  # as it lies beside the head
        state, info = common.read_weights(name)
        common.check_bands(args, len(info["mean"]))
        if args.in_chans != len(info["mean"]):
            common.fail(f"--in_chans {args.in_chans}: {source} learned from {len(info['mean'])} bands")
        backbone = eval_knn.build(name, state, info, info["mean"], info["std"], dtype, args)
        eval_knn.check_patches([backbone])
        if head["n_last_blocks"]:
            backbone.model = LastBlocks(backbone.model, head["n_last_blocks"], head["avgpool"])
        weight, bias, classes = head["weight"], head["bias"], head["classes"]
    paths = common.from_main(process, lambda: common.list_images(
        args.predict, out, flag="--predict", bands=args.bands))
    common.check_there(process, paths, args.predict, "--predict")
    if process.is_main:
        print(backbone.report)
    x, index = extract_features(backbone, CenterCrops(paths, backbone), args, process, may_lose=1.0)
    logits = x @ weight.T + bias
    if process.is_main:
        text = io.StringIO()
        writer = csv.writer(text)
        if head.get("multi_label"):
            writer.writerow(["path", "labels", *classes])
            for i, row in zip(index.tolist(), logits.sigmoid().tolist(), strict=True):
                labels = "|".join(name for name, p in zip(classes, row, strict=True) if p > 0.5)
                writer.writerow([paths[i], labels, *(f"{p:.4f}" for p in row)])
        else:
            writer.writerow(["path", "class", "probability"])
            for i, row in zip(index.tolist(), logits.softmax(1), strict=True):
                writer.writerow([paths[i], classes[row.argmax()], f"{row.max():.4f}"])
        data = text.getvalue().encode(errors="surrogateescape")  # a file's name may be any bytes
        common.write_atomically(out / "predictions.csv", lambda file: file.write(data))
        print(f"{len(index)} of {len(paths)} images classified: {out / 'predictions.csv'}")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def print_table(lines: list[dict], classes: list[str]) -> None:
    """A row for each of the weights, and the classes' own top-1 where asked for."""
    width = max(len(line["weights"]) for line in lines)
    task, test = lines[0]["task"], lines[0]["test_images"]
    train = max(line["train_images"] for line in lines)
    print(f"\n{task}: % of {test} test images, {train} training images, {len(classes)} classes"
          + f" (chance {100 / len(classes):.1f} %)" * ("top1" in lines[0]))
    names = [name for name in FIGURES if name in lines[0]]
    print(f"{'':{width}}{'labels':>9}" + "".join(f"{FIGURES[name]:>11}" for name in names) + f"{'lr':>9}")
    for line in lines:
        print(f"{line['weights']:{width}}{100 * line['train_fraction']:7g} %"
              + "".join(f"{line[name]:11.2f}" for name in names) + f"{line['lr']:9g}")
    eval_knn.print_classes(f"{FIGURES[names[0]]} of each class", lines, classes)


def save_head(out: Path, backbone: Backbone, features: nn.Module, weights: tuple[Tensor, Tensor],
              classes: list[str], multi_label: bool) -> None:
    """Writes what --predict reads: backbone/, and head.pth with weight C x D and bias C.

    `features` is the model whose features the head takes: the backbone's own, or LastBlocks of it.
    """
    head = {"weight": weights[0], "bias": weights[1], "classes": classes,
            "multi_label": multi_label, "img_size": backbone.img_size, "bands": backbone.bands,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "n_last_blocks": getattr(features, "n_last_blocks", 0),
            "avgpool": getattr(features, "avgpool", False)}
    common.export_backbone(backbone.model, out / "backbone", backbone.mean, backbone.std)
    common.write_atomically(out / "head.pth", partial(torch.save, head))


def compare(args: argparse.Namespace, process: Process, out: Path) -> None:
    """Probes or fine-tunes each of --weights, and writes the results."""
    train, test, classes, split = eval_knn.load_split_once(args, process)
    if not classes:
        common.fail(f"--data_path {args.data_path}: has {eval_knn.NO_LABELS}")
    if not args.finetune and len(args.lrs) > 1:  # before any work
        held_out(train.labels[fraction_of(train, min(args.train_fraction), classes, args)], args.split_seed)
    backbones = eval_knn.prepare(args, process, train.paths, args.drop_path)
    eval_knn.check_patches(backbones)

    lines, versions, task = [], common.versions(), f"linear, {args.protocol}"
    # Of the free flags these may change figures a little.
    free = FREE_FLAGS - {"amp", "batch_size_per_gpu", "accum_steps", "compile"}
    free |= {"weights", "checkpoint_key", "arch", "img_size", "in_chans", "bands", "split_seed", "seed",
             "finetune", "train_fraction"}
    settings = {name: getattr(args, name) for name in changed_flags(args) if name not in free}
    kept = next((name for name in args.weights if name != "image_stats"), None)  # whose head is saved
    if args.finetune:  # what a checkpoint has to say of its network
        task, measure, trained, (backbone,) = "finetune", run_finetune, backbones, backbones
        args.img_size, args.mean, args.std = backbone.img_size, backbone.mean, backbone.std
        args.arch, args.classes = backbone.arch, classes
        args.weights_digest = eval_knn.weights_digest(backbone.model)
    elif (out / "checkpoint.pth").is_file():
        common.fail(f"--output_dir {out}: holds a training run, whose backbone would be replaced")
    else:
        measure, trained = probe, [with_features(backbone, name, args.n_last_blocks, args.avgpool)
                                   for name, backbone in zip(args.weights, backbones, strict=True)]
    for name, backbone, model in zip(args.weights, backbones, trained, strict=True):
        began = time.perf_counter()
        if process.is_main and not args.finetune:  # which prints it, or where it resumes
            print(backbone.report, flush=True)
        for result, logits, labels, head in measure(model, train, test, classes, args, process):
            figures, of_class = figures_of(logits, labels)
            if args.per_class:
                figures["per_class"] = of_class
            if process.is_main and name == kept and result["train_fraction"] == max(args.train_fraction):
                save_head(out, backbone, model.model, head, classes, labels.ndim == 2)
                if labels.ndim == 1:
                    confusion = confusion_matrix(labels, logits.argmax(1), len(classes))
                    save_confusion(out / "confusion.png", confusion, classes)
            eval_knn.add_result(
                {"task": task, "weights": name, "checkpoint_key": args.checkpoint_key, "arch": backbone.arch,
                 "data": args.data_path, "split": split, "in_chans": args.in_chans, "bands": args.bands,
                 "img_size": backbone.img_size, "seed": args.seed, "settings": settings,
                 "loading": backbone.report, **result, **figures, "versions": versions},
                began, lines, out, process)
    if process.is_main and lines:  # none of a fine-tuning that was stopped
        print_table(lines, classes)
        print("\n".join(map(json.dumps, lines)))


def main() -> None:
    """Parses and checks the flags, joins the processes; then probes or fine-tunes, or predicts."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    common.choose_attention(args.amp, process.device)
    out = common.make_output_dir(args.output_dir, process)
    (predict if args.predict else compare)(args, process, out)
    process.leave()


if __name__ == "__main__":
    main()

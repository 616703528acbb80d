"""DINO-MC and DINO-TP: self-distillation between global and multi-sized local crops, or between dates.

J. Wanyan et al., "Extending global-local view alignment for self-supervised learning with remote sensing
imagery", arXiv 2303.06670. Builds on DINO (M. Caron et al., ICCV 2021), which is `--mode dino` here.

    # a short run on a CPU; `make demo` draws the images first, and measures the result
    python dino_mc.py --data_path demo/data/train --output_dir OUT --arch resnet18 --img_size 64 \
        --out_dim 1024 --use_bn_in_head --lr 8e-3 --momentum_teacher .98 --epochs 12 --warmup_epochs 1
    # one GPU: ViT-S/16 on any folder of images, labelled or not
    python dino_mc.py --data_path IMAGES --output_dir OUT --batch_size_per_gpu 128
    # several GPUs; DINO-TP on one folder per location, holding its dates
    python -m torch.distributed.run --nproc_per_node 4 dino_mc.py --data_path PLACES --output_dir OUT \
        --mode tp

A student sees every view, a teacher (its moving average) only the global ones. The student's output on each
view has to predict the teacher's on every other view. Centring and a low temperature of the teacher keep both
from collapsing. MC gives local crops many sizes; TP takes global views from different dates of a place. Read
`make_views`, `DINOLoss` and `train` first.

    symbol    variable              flag (default)                what
    B         B                     batch_size_per_gpu (64)       images per process and micro-batch
    T, V      T, V                  mode, local_crops_number (6)  global views (mc, dino 2; tp 3), all views
    D         D                     arch (vit_small_patch16_224)  width of the backbone's features
    K         K                     out_dim (65536)               prototypes
    tau_s     student_temp          student_temp (.1)             student's temperature
    tau_t     teacher_temp          teacher_temp (.04)            teacher's; may warm up by epochs
    c         center                -                             mean teacher output, momentum .9
    m         momentum              momentum_teacher (.996)       of the teacher, cosine to 1

Differs from the authors' code:
- every image is used; `--one_date_per_location` draws one image per folder and epoch (theirs: once per run);
- TP's three global views follow from the mode; its dates are drawn without replacement where there are three;
- workers crop, resize and flip with antialiasing, 8-bit images in uint8; colour and blur follow on the
  device. So in TP they come after the crop, not before, and the blur's sigma counts pixels of the crop;
- colours are computed in floating point, without rounding to 8 bits in between;
- Swin is timm's, without a second, untrained head; timm resamples ViT positions (bicubic, antialiased);
- `--drop_path` acts on every backbone that has it, ResNets included (off with 0);
- several processes on GPUs synchronise BatchNorm; on CPUs each normalises its own batch;
- the centre is saved; order, crops and draws follow from seed and step: a resumed run repeats the unbroken
  one.

In OUT: checkpoint.pth, backbone/ (the teacher's, for timm), log.jsonl, views.png.
"""

import argparse
import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

import common
from common import Process, Samples, not_negative, positive, unit

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags; the defaults are the paper's."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth; tp: one folder per location")
    add("--img_size", type=positive(int), default=224, help="side of the global crops; local ones scale "
        "with it")
    add("--one_date_per_location", action=yes_no, default=False,
        help="mc, dino: a folder is a place; an epoch takes one of its images at random")
    common.add_pixel_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="vit_small_patch16_224", help="any timm model with pooled features, such as "
        "vit_small_patch8_224, resnet50, wide_resnet50_2, swin_tiny_patch4_window7_224")
    add("--patch_size", type=positive(int), help="of a ViT; default: the arch's own; we recommend "
        "a smaller one for small images")
    add("--drop_path", type=unit(float), default=0.1, help="stochastic depth of the student; we recommend 0 "
        "for short runs")
    add("--init", help="start the backbone from an output folder, a checkpoint, a state dict, or timm's "
        "pretrained weights by name")
    add("--checkpoint_key", help="network of a checkpoint that --init takes; default: the one that its run "
        "exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves tensors at their "
        "initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mode", choices=["mc", "dino", "tp"], default="mc", help="mc: local crops of many sizes; dino: of "
        "one size, the baseline; tp: global crops from different dates")
    add("--out_dim", type=positive(int), default=65536, help="K; we recommend fewer, such as 4096, for small "
        "data")
    add("--norm_last_layer", action=yes_no, default=True, help="keep the prototypes' gain at 1; without, "
        "training may be better, or unstable")
    add("--use_bn_in_head", action=yes_no, default=False, help="BatchNorm in the head; helps short runs")
    add("--momentum_teacher", type=unit(float), default=0.996, help="start of its cosine to 1; we recommend "
        ".98 for short runs")
    add("--student_temp", type=positive(float), default=0.1, help="tau_s; seldom changed")
    add("--teacher_temp", type=positive(float), default=0.04, help="tau_t after its warm-up; we recommend a "
        "lower one if the loss stays at ln K; above .07 training is unstable")
    add("--warmup_teacher_temp", type=positive(float), default=0.04, help="tau_t at the start; lower if "
        "unstable")
    add("--warmup_teacher_temp_epochs", type=not_negative(int), default=0, help="its length; we recommend 30 "
        "for long runs")
    add("--freeze_last_layer", type=not_negative(int), default=1, help="epochs without gradient for the "
        "prototypes. We recommend more if the loss does not fall at the start, 0 where there is one epoch")
    add("--global_crops_scale", type=positive(float), nargs=2, default=(0.32, 1.0), help="share of the area; "
        "the higher, the easier")
    add("--local_crops_scale", type=positive(float), nargs=2, default=(0.05, 0.32), help="share of the area; "
        "the higher, the easier")
    add("--local_crops_number", type=not_negative(int), default=6, help="fewer save time; mc, tp: the "
        "smallest stay")
    add("--local_crops_size", type=positive(int), nargs="+", help="sides in pixels, one for all or one each; "
        "default: 184 164 144 124 104 84 in mc and tp, 96 in dino, in proportion to --img_size / 224")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=300, help="length of all schedules; small data needs more")
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--optimizer", choices=["adamw", "sgd", "lars"], default="adamw", help="we recommend sgd or lars for "
        "ResNets")
    add("--lr", type=positive(float), default=5e-4, help="at an effective batch of 256, scaled linearly")
    add("--min_lr", type=not_negative(float), default=1e-6, help="at the end of its cosine; not scaled")
    add("--warmup_epochs", type=not_negative(float), help="of the learning rate; default: 10, but at most a "
        "tenth of --epochs")
    add("--weight_decay", type=not_negative(float), default=0.04, help="at the start, not on biases and "
        "norms; we recommend 1e-4 with sgd, to its end")
    add("--weight_decay_end", type=not_negative(float), default=0.4, help="at the end of its cosine")
    add("--clip_grad", type=not_negative(float), default=3.0, help="greatest norm of each tensor's gradient; "
        "0: off")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags."""
    args.warmup_epochs = common.default_warmup(args.warmup_epochs, 10, args.epochs)
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs}")
    if args.warmup_teacher_temp_epochs > args.epochs:
        common.fail(f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs}: must be at most "
                    f"--epochs {args.epochs}")
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not low <= high <= 1:
            common.fail(f"--{name} {low} {high}: must be 0 < low <= high <= 1")
    if args.local_crops_size and len(args.local_crops_size) not in (1, args.local_crops_number):
        common.fail(f"--local_crops_size {' '.join(map(str, args.local_crops_size))}: one side, or "
                    f"{args.local_crops_number} (--local_crops_number), not {len(args.local_crops_size)}")
    if args.mode != "dino" and not args.local_crops_size and args.local_crops_number > len(MC_SIZES):
        common.fail(f"--local_crops_number {args.local_crops_number}: mode {args.mode} has {len(MC_SIZES)} "
                    "sizes; for more give --local_crops_size")
    if args.mode == "tp" and args.one_date_per_location:
        common.fail("--one_date_per_location: only with --mode mc or dino; tp draws three dates")


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------

MC_SIZES = (184, 164, 144, 124, 104, 84)  # of local crops beside 224 px global ones
DINO_SIZE = 96


@dataclass(frozen=True)
class View:
    """How one view is made: geometry in the workers, then colour on the device."""

    size: int  # side in pixels
    scale: tuple[float, float]  # share of the image's area
    interpolation: InterpolationMode
    for_teacher: bool = False  # a global view
    date: int = 0  # which of the drawn dates
    p_flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    p_jitter: float = 0.8
    p_gray: float = 0.2
    p_blur: float = 0.5
    p_solarize: float = 0.0


def local_sizes(mode: str, img_size: int, number: int, sizes: Sequence[int] | None,
                multiple: int) -> list[int]:
    """Sides of the local crops: as given, else the paper's in proportion to `img_size`.

    Args:
        mode: mc, dino or tp.
        img_size: side of the global crops.
        number: how many local crops.
        sizes: None, one side for all, or one each.
        multiple: the backbone's patch; at another size than 224 sides are rounded down to it.
    """
    if img_size % multiple:
        common.fail(f"--img_size {img_size}: must be a multiple of the patch, {multiple}")
    if sizes:
        result = list(sizes) * (number if len(sizes) == 1 else 1)
    else:
        result = [DINO_SIZE] * number if mode == "dino" else list(MC_SIZES[len(MC_SIZES) - number:])
        if img_size != 224:
            result = [size * img_size // 224 // multiple * multiple for size in result]
        if min(result, default=multiple) < multiple:
            common.fail(f"--img_size {img_size}: its smallest local crop is under the patch, {multiple}; "
                        "take a larger --img_size, a smaller --patch_size or less --local_crops_number")
    for size in result:
        if not multiple <= size <= img_size:
            common.fail(f"--local_crops_size {size}: must be between the patch, {multiple}, and --img_size, "
                        f"{img_size}")
    return result


def make_views(mode: str, img_size: int, sizes: Sequence[int], global_scale: tuple[float, float],
               local_scale: tuple[float, float]) -> list[View]:
    """The paper's views, global ones first. `sizes` are the sides of the local crops."""
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    if mode == "tp":
        # Two of the three dates change colour and flip; the third and the local crops (of date 0) do not.
        a = View(img_size, global_scale, bicubic, for_teacher=True, jitter=(0.4, 0.4, 0.4, 0.1))
        unchanged = {"p_flip": 0.0, "p_jitter": 0.0, "p_gray": 0.0, "p_blur": 0.0}
        return [replace(a, date=1), replace(a, date=2, **unchanged), replace(a, date=0),
                *(View(size, local_scale, bilinear, **unchanged) for size in sizes)]
    global_1 = View(img_size, global_scale, bicubic, for_teacher=True, p_blur=1.0)
    global_2 = View(img_size, global_scale, bicubic, for_teacher=True, p_blur=0.1, p_solarize=0.2)
    if mode == "dino":
        return [global_1, global_2, *(View(size, local_scale, bicubic) for size in sizes)]
    strong = (0.8, 0.8, 0.8, 0.2)
    return [global_1, global_2, *(View(size, local_scale, bilinear, jitter=strong) for size in sizes)]


class ViewDataset(torch.utils.data.Dataset):
    """Geometry of all views of an image or of a location, drawn from (seed, epoch, index) alone.

    Args:
        samples: the images.
        views: what to make of them.
        seed: of the run.
        locations: numbers of the dates of each place, to choose from; None: every image by itself.
    """

    def __init__(self, samples: Samples, views: list[View], seed: int,
                 locations: Sequence[list[int]] | None = None):
        self.samples, self.views, self.seed, self.locations = samples, views, seed, locations

    def __len__(self) -> int:
        return len(self.samples if self.locations is None else self.locations)

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        """Returns V tensors bands x size x size of the files' dtype."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        dates = [index] if self.locations is None else self.locations[index]
        order = torch.randperm(len(dates)).tolist()  # without replacement; too few repeat
        chosen = [dates[order[view.date % len(dates)]] for view in self.views]
        images = {date: self.samples[date] for date in dict.fromkeys(chosen)}
        return [self._crop(images[date], view) for date, view in zip(chosen, self.views, strict=True)]

    @staticmethod
    def _crop(image: Tensor, view: View) -> Tensor:
        box = RandomResizedCrop.get_params(image, view.scale, (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, [view.size] * 2, view.interpolation)
        return crop.flip(-1) if torch.rand(()) < view.p_flip else crop


def color_views(crops: list[Tensor], views: list[View], args: argparse.Namespace,
                generator: torch.Generator) -> list[Tensor]:
    """Colour, blur, solarize and normalise on the crops' device; every sample has its own draws.

    Args:
        crops: V tensors B x bands x size x size, as ViewDataset gives them.
        views: their V recipes.
        args: mean and std.
        generator: on the CPU.

    Returns:
        groups of views that go through the network as one batch, float (n_views * B) x bands x size x size,
        view by view: first all global ones, then local ones, joined where neighbours have the same size.
    """
    B = len(crops[0])

    def per_sample(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values)).repeat_interleave(B)  # n_views * B

    groups = []
    # Within a kind (global, local) the strength of the jitter is the same; the probabilities differ by view.
    pairs = zip(crops, views, strict=True)
    for _, members in groupby(pairs, key=lambda pair: (pair[1].for_teacher, pair[1].size)):
        crops_of_group, views_of_group = zip(*members, strict=True)
        x = common.to_float(torch.cat(crops_of_group), args.mean, args.std)
        p = per_sample(view.p_jitter for view in views_of_group)
        x = common.color_jitter(x, *common.draw_color_jitter(views_of_group[0].jitter, p, generator))
        p = per_sample(view.p_gray for view in views_of_group)
        x = common.grayscale(x, common.bernoulli(p, generator))
        p = per_sample(view.p_blur for view in views_of_group)
        sigma = torch.empty(len(x)).uniform_(0.1, 2.0, generator=generator)
        x = common.gaussian_blur(x, common.bernoulli(p, generator), sigma)
        p = per_sample(view.p_solarize for view in views_of_group)
        x = common.solarize(x, common.bernoulli(p, generator))
        groups.append(common.normalize(x, args.mean, args.std, crops[0].dtype))
    return groups


def draw_views(run: common.Run, groups: list[Tensor], B: int, dtype: torch.dtype) -> None:
    """Writes views.png: a row for each of up to 8 images, all its views as the network sees them."""
    views = [view[:8] for group in groups for view in group.split(B)]  # V times 8 x bands x s x s
    run.draw("views.png", list(zip(*views, strict=True)), dtype)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """Three linear layers to a unit vector, then its cosine with K prototypes (Caron et al. 2021).

    Args:
        in_dim: D, width of the backbone's features.
        out_dim: K.
        use_bn: BatchNorm after the first two linear layers.
        norm_last_layer: keep the gain of the prototypes at 1.
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool = False, norm_last_layer: bool = True):
        super().__init__()
        layers = []
        for width in (in_dim, 2048):
            norm = [nn.BatchNorm1d(2048)] if use_bn else []
            layers += [nn.Linear(width, 2048), *norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(2048, 256))
        self.last_layer = nn.Linear(256, out_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.utils.parametrizations.weight_norm(self.last_layer)
        gain = self.last_layer.parametrizations.weight.original0  # K x 1
        nn.init.ones_(gain)
        gain.requires_grad_(not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """N x D -> N x K."""
        x = F.normalize(self.mlp(features), dim=-1)  # N x 256
        return self.last_layer(x)


class Network(nn.Module):
    """Backbone and head: the student, or the teacher.

    Args:
        backbone: maps images to pooled features.
        head: maps features to outputs.
        multiple: sides are cut to a multiple of it at the right and bottom, as the authors' ViT does.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, multiple: int):
        super().__init__()
        self.backbone, self.head, self.multiple = backbone, head, multiple

    def forward(self, groups: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Groups of views N_g x bands x s x s -> outputs N x K, features N x D, N the sum of N_g.

        The backbone runs once per group, the head once on everything.
        """
        features = []
        for x in groups:
            side = x.shape[-1] // self.multiple * self.multiple
            features.append(self.backbone(x[..., :side, :side]))
        features = torch.cat(features)
        return self.head(features), features


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def teacher_probabilities(teacher_out: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """P = softmax((t - c) / tau_t) of the outputs ... x K, in float32."""
    return ((teacher_out.float() - center) / teacher_temp).softmax(-1)


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher on a global view and the student on every other view.

    Args:
        out_dim: K.
        student_temp: tau_s.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1):
        super().__init__()
        self.student_temp = student_temp
        self.register_buffer("center", torch.zeros(out_dim))

    def forward(self, student_out: Tensor, teacher_out: Tensor, teacher_temp: float) -> Tensor:
        """Mean over the pairs (i, v), v not i, and the batch of -sum_k P_i[k] log softmax(s_v / tau_s)[k].

        Args:
            student_out: V x B x K outputs, the T global views first.
            teacher_out: T x B x K outputs, without gradient.
            teacher_temp: tau_t.
        """
        T, B, _ = teacher_out.shape
        V = len(student_out)
        P = teacher_probabilities(teacher_out, self.center, teacher_temp)  # T x B x K
        log_q = (student_out.float() / self.student_temp).log_softmax(-1)  # V x B x K
        pairs = -torch.einsum("tbk,vbk->tv", P, log_q) / B  # T x V, every pair
        return (pairs.sum() - pairs.diagonal().sum()) / (T * (V - 1))

    @torch.no_grad()
    def update_center(self, batch_mean: Tensor) -> None:
        """Sets c <- .9 c + .1 `batch_mean`, the teacher's mean output (K,) of batch, views and processes."""
        self.center.lerp_(batch_mean, 0.1)


@torch.no_grad()
def health(teacher_out: Tensor, center: Tensor, teacher_temp: float) -> dict[str, float]:
    """Log figures of the teacher that show whether it collapses.

    Args:
        teacher_out: T x B x K outputs.
        center: K, as the loss used it.
        teacher_temp: tau_t.

    Returns:
        entropy of P (ln K: uniform); kl of P from its batch mean (0: the same for all images, collapsed).
    """
    P = teacher_probabilities(teacher_out, center, teacher_temp).flatten(0, 1)
    mean = P.mean(0)
    entropy = -torch.special.xlogy(P, P).sum(-1).mean()
    kl = -torch.special.xlogy(mean, mean).sum() - entropy
    return {"entropy": entropy.item(), "kl": kl.item()}


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scales each tensor's gradient, on its own, to a norm of at most `max_norm`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    scales = [(max_norm / (norm + 1e-6)).clamp(max=1) for norm in torch._foreach_norm(grads)]
    torch._foreach_mul_(grads, scales)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class Locations(Sequence):
    """Places: `locations[i]` are the numbers of the dates of one, in an array that all of them share.

    Args:
        order: numbers of all samples, those of a place one after the other.
        ends: of the places in it.
    """

    def __init__(self, order: np.ndarray, ends: np.ndarray):
        self.order, self.ends = order, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[int]:
        return self.order[self.ends[index - 1] if index else 0 : self.ends[index]].tolist()


def group_locations(samples: Samples, args: argparse.Namespace) -> Locations | None:
    """The dates of each place: the images of a folder, window by window; None: no such mode."""
    if args.mode != "tp" and not args.one_date_per_location:
        return None
    folders, counts = samples.paths.folder_ranks(), samples.counts()
    if (folders == folders[0]).all():
        common.fail(f"--data_path {args.data_path}: all images are in one folder; tp and "
                    "--one_date_per_location want the dates of each place in a folder of its own")
    window = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    # Windows of dates of different sizes would not show the same place.
    places = np.stack([np.repeat(folders, counts), window, np.repeat(counts, counts)])  # 3 x samples
    order = np.lexsort(places[::-1])  # by folder, window, number of windows; dates keep their order
    differ = (np.diff(places[:, order]) != 0).any(0)
    ends = np.append(np.flatnonzero(differ) + 1, len(order))
    if len(ends) == len(order):
        common.fail(f"--data_path {args.data_path}: every folder has one image; tp and "
                    "--one_date_per_location want the dates of a place in a folder of its own")
    return Locations(order, ends)


def feature_width(backbone: nn.Module, arch: str, sizes: Sequence[int], multiple: int,
                  in_chans: int = 3) -> int:
    """D, found by running the backbone once on each side; fails where it cannot take one."""
    backbone.eval()
    for size in dict.fromkeys(size // multiple * multiple for size in sizes):
        try:
            with torch.no_grad():
                features = backbone(torch.zeros(1, in_chans, size, size))
        except Exception as error:
            common.fail(f"--arch {arch}: cannot take crops of {size} px: {error}")
    backbone.train()
    return features.shape[1]


def build_networks(args: argparse.Namespace) -> tuple[Network, Network, list[View]]:
    """Student, teacher and the views they take; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    build = partial(common.build_backbone, args.arch, args.img_size, args.patch_size, in_chans=args.in_chans)
    backbone = build(drop_path=args.drop_path)
    multiple = common.patch_multiple(backbone)
    sizes = local_sizes(args.mode, args.img_size, args.local_crops_number, args.local_crops_size, multiple)
    views = make_views(args.mode, args.img_size, sizes, args.global_crops_scale, args.local_crops_scale)
    D = feature_width(backbone, args.arch, [args.img_size, *sizes], multiple, args.in_chans)
    head = DINOHead(D, args.out_dim, args.use_bn_in_head, args.norm_last_layer)
    teacher = Network(build(), copy.deepcopy(head), multiple).requires_grad_(False)  # without drop path
    return Network(backbone, head, multiple), teacher, views


def process_mean(x: Tensor, process: Process) -> Tensor:
    """Mean over all processes, in place; without gradient."""
    if process.world_size > 1:
        dist.all_reduce(x)
        x /= process.world_size
    return x


def warmed_up(start: float, end: float, i: int, warmup: int) -> float:
    """Value i of `warmup` evenly spaced ones from `start` to `end`; `end` after them."""
    return start + (end - start) * i / max(1, warmup - 1) if i < warmup else end


def schedules(step: int, run: common.Run, args: argparse.Namespace) -> dict[str, float]:
    """Learning rate, weight decay and the teacher's momentum by steps; its temperature by epochs."""
    T, warmup_steps = run.total_steps, round(args.warmup_epochs * run.steps_per_epoch)
    lr, epoch = args.lr * run.effective_batch / 256, step // run.steps_per_epoch
    return {"lr": warmed_up(0.0, lr, step, warmup_steps) if step < warmup_steps else
            common.cosine_schedule(lr, args.min_lr, step, T, warmup_steps),
            "weight_decay": common.cosine_schedule(args.weight_decay, args.weight_decay_end, step, T),
            "momentum": common.cosine_schedule(args.momentum_teacher, 1.0, step, T),
            "teacher_temp": warmed_up(args.warmup_teacher_temp, args.teacher_temp, epoch,
                                      args.warmup_teacher_temp_epochs)}


def train(args: argparse.Namespace, process: Process) -> None:
    """Trains the student; writes checkpoints, the teacher's backbone, log and pictures to --output_dir."""
    # Data
    samples = common.load_samples(args, process, common.IMAGENET_MEAN, common.IMAGENET_STD)
    locations = group_locations(samples, args)
    run = common.Run(args, process, samples=len(locations or samples), images=len(samples.paths))

    # Networks, new or resumed. --init fills the student alone, so the teacher is copied from it.
    student, teacher, views = build_networks(args)
    T, V = sum(view.for_teacher for view in views), len(views)
    dino_loss = DINOLoss(args.out_dim, args.student_temp).to(process.device)
    init = common.init_backbone(student.backbone, args, run.saved)
    teacher.load_state_dict(student.state_dict())
    student, teacher = (common.sync_batchnorm(common.to_device(network, process.device), process)
                        for network in (student, teacher))
    optimizer, scaler = common.build_optimizer(student, args), run.scaler
    run.restore(teacher.backbone, student=student, teacher=teacher, dino_loss=dino_loss, optimizer=optimizer)
    if args.compile:
        student.backbone.compile()  # the rest loops over sizes
        teacher.backbone.compile()
    ddp_student = common.distributed(student, process)

    loader = run.loader(ViewDataset(samples, views, args.seed, locations))
    advice = ("Try a lower --teacher_temp or --lr, more --warmup_epochs or --warmup_teacher_temp_epochs, or "
              "--use_bn_in_head")
    header = {"scaled_lr": args.lr * run.effective_batch / 256, "views": [view.size for view in views],
              "chance_loss": math.log(args.out_dim)}
    floors = {"kl": 0.02, "feature_std": 0.05}  # a collapsed network stays below
    for step in run.steps(loader, init, floors, advice, **header):
        now = schedules(step, run, args)
        common.set_lr(optimizer, now["lr"])
        optimizer.param_groups[0]["weight_decay"] = now["weight_decay"]  # the other group has none
        colour = common.generator(args.seed, "colour", step, process.rank)
        teacher_mean, terms = torch.zeros_like(dino_loss.center), []

        for micro in range(args.accum_steps):
            crops = run.fetch()  # V times B x bands x size x size
            B = len(crops[0])
            # Drop path draws from torch's own generator: seeded, so that a resumed run draws the same.
            torch.manual_seed(common.stream_seed(args.seed, "drop path", step, micro, process.rank))
            groups = color_views(crops, views, args, colour)
            if step == micro == 0:
                draw_views(run, groups, B, crops[0].dtype)
            with torch.no_grad(), run.autocast:
                teacher_out = teacher(groups[:1])[0].view(T, B, -1)  # T x B x K, of the global views alone
            with common.accumulating(ddp_student, micro, args.accum_steps):
                with run.autocast:
                    student_out, features = ddp_student(groups)  # V*B x K, V*B x D
                loss = dino_loss(student_out.view(V, B, -1), teacher_out, now["teacher_temp"])
                scaler.scale(loss / args.accum_steps).backward()
            teacher_mean += teacher_out.float().mean((0, 1)) / args.accum_steps
            terms.append({"loss": loss.detach(),
                          "feature_std": common.feature_std(features[: T * B].detach())})

        # Student: each tensor's gradient is clipped; the prototypes rest during the first epochs.
        grad_norm = common.grad_norm(optimizer, scaler)
        if args.clip_grad:
            clip_gradients(student.parameters(), args.clip_grad)
        if step // run.steps_per_epoch < args.freeze_last_layer:
            for parameter in student.head.last_layer.parameters():
                parameter.grad = None
        common.optimizer_step(optimizer, scaler)
        # Teacher: after the optimizer step. Centre: after the loss has used the old one.
        common.update_ema(student, teacher, now["momentum"])
        figures = {}
        if run.is_due(step):  # of the last micro-batch alone: reading them waits for the GPU
            figures = health(teacher_out, dino_loss.center, now["teacher_temp"])
        dino_loss.update_center(process_mean(teacher_mean, process))
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, **figures, **now)


def main() -> None:
    """Parses and checks the flags, joins the processes, trains."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    train(args, process)
    process.leave()


if __name__ == "__main__":
    main()

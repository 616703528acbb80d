"""CMID: masked image reconstruction, global contrast and local distillation, learned together.

D. Muhtar et al., "CMID: a unified self-supervised learning framework for remote sensing image understanding",
IEEE TGRS 2023, arXiv 2304.09670.

    # a short run on a CPU; `make demo` draws the images
    python cmid.py --data_path demo/data/train --output_dir OUT --arch resnet18 --img_size 64 \
        --mask_patch_size 16 --moco_k 1024 --batch_size_per_gpu 32 --epochs 5 --warmup_epochs 1 \
        --momentum .98 --local_dim 256 --warmup_teacher_temp_epochs 0 --teacher_temp .04
    # one GPU: ResNet-50 on any folder of images, labelled or not
    python cmid.py --data_path IMAGES --output_dir OUT --moco_k 16384
    # several GPUs: Swin-B, the paper's other backbone
    python -m torch.distributed.run --nproc_per_node 4 cmid.py --data_path IMAGES --output_dir OUT \
        --arch swin_base_patch4_window7_224

Two crops of each image, one of them changed in colour. The online encoder sees both with blocks masked out;
a branch encoder (its moving average) sees them whole. The online encoder has to paint the masked blocks; to
tell the other crop's key from a queue of older keys; and, at positions that show the same place, to predict
what the branch encoder makes of the other crop. Read `match_positions`, the losses and the middle of
`train_one_epoch` first.

    symbol    variable           flag (default)              what
    B         B                  batch_size_per_gpu (64)     images per process and micro-batch
    h, w      map_side           img_size (224)              sides of the last map, img_size / 32: 7
    D         D                  arch (resnet50)             channels of the last map
    n         num_matches        num_matches (20 of 49)      matched positions of a pair
    r, x      prediction, image  -                           reconstruction and image, normalised
    q, k      q, k               -                           queries and keys of the global contrast
    K         K                  moco_k (65536)              length of the queue
    tau       moco_t             moco_t (.2)                 temperature of the global contrast
    tau_o     student_temp       student_temp (.1)           online temperature of the local distillation
    tau_b     branch_temp        teacher_temp (.07)          branch's ("teacher"), warms up by epochs from .04
    c         center             -                           mean branch output at matches, momentum .9
    m         now["momentum"]    momentum (.996)             of the branch encoder, cosine to 1

A position is a cell of the last map and stands for 32 x 32 pixels, those that the decoder paints from it. Two
positions of different crops match by the distance, in the source image, between the centres of their squares.

Differs from the authors' code:
- they add normalised offsets to positions as if they were pixels, so most of their pairs are not neighbours;
- the keys of both views enter the queue once each (theirs: once per process);
- the centre takes the mean over all processes; with `--accum_steps` it moves once per step and direction;
- the frequency loss compares mean spectra, and the mean is over a process's micro-batch;
- both views go through the encoder, and its BatchNorm, as one batch;
- workers crop, resize and flip in uint8 with antialiasing; colour and noise follow on the device;
- several processes on GPUs synchronise BatchNorm; on CPUs each normalises its own batch;
- no weight decay on biases and norm weights;
- queue and centre are saved; order, crops and draws follow from seed and step: a resumed run repeats the
  unbroken one;
- of ConvNeXt, whose last norm comes after pooling, decoder and local head see the map without it.

In OUT: checkpoint.pth, backbone/ (the online encoder's, for timm; its BatchNorm has the statistics of masked
images), log.jsonl, views.png, reconstruction.png.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm.layers
import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

import common
from common import Process

STRIDE = 32  # of the last map
MILLIONAID_MEAN, MILLIONAID_STD = (0.33797, 0.3605, 0.3348), (0.1359, 0.1352, 0.1407)  # the paper's data

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags; the defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    yes_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=int, default=224, help="side of both crops, a multiple of 32")
    add("--mean", type=float, nargs=3, default=MILLIONAID_MEAN, help="of RGB in [0, 1]")
    add("--std", type=float, nargs=3, default=MILLIONAID_STD, help="of RGB in [0, 1]")
    add("--num_workers", type=int, help="per process; none: its share of the cores, at most 16")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", help="a timm ResNet, Swin or ConvNeXt, such as resnet18, "
        "swin_base_patch4_window7_224, convnext_tiny")
    add("--init", help="start the backbone from an output folder, a checkpoint, a state dict, or timm's "
        "pretrained weights by name")
    add("--checkpoint_key", help="which network of a checkpoint --init takes; none: the one its run exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves "
        "tensors at their initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mask_patch_size", type=int, default=32, help="side of the masked blocks in pixels, a divisor of "
        "--img_size; less for small images")
    add("--mask_ratio", type=float, default=0.6, help="share of the blocks; less if reconstruction.png stays "
        "flat")
    add("--mask_stage", type=int, default=0, choices=[0, 1, 2, 3], help="the mask token is added before this "
        "stage; 0: right after the stem")
    add("--num_matches", type=int, help="matched positions; none: 20 of 49, in proportion")
    add("--loss_weights", type=float, nargs=3, default=(1.0, 1.0, 1.0), help="of reconstruction, global and "
        "local loss; 0 switches one off, to see what it does")
    add("--momentum", type=float, default=0.996, help="of the branch encoder, at the start of its cosine "
        "to 1; .98 for short runs")
    add("--moco_k", type=int, default=65536, help="K, a multiple of twice the effective batch; at most the "
        "number of images: they have two keys each, so this is half an epoch")
    add("--moco_t", type=float, default=0.2, help="tau; lower: nearest negatives count more")
    add("--local_dim", type=int, default=2048, help="prototypes of the local loss; fewer for small data")
    add("--student_temp", type=float, default=0.1, help="tau_o; seldom changed")
    add("--teacher_temp", type=float, default=0.07, help="tau_b after its warm-up; lower if the local "
        "loss stays at ln of --local_dim")
    add("--warmup_teacher_temp", type=float, default=0.04, help="tau_b at the start; lower if unstable")
    add("--warmup_teacher_temp_epochs", type=int, default=50, help="its length; 0 for short runs")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=200, help="length of all schedules; small data needs more")
    add("--batch_size_per_gpu", type=int, default=64, help="images per process and micro-batch")
    add("--accum_steps", type=int, default=1, help="micro-batches per optimizer step, where memory is small")
    add("--optimizer", choices=["adan", "adamw"], default="adan", help="with adamw give --lr 5e-4")
    add("--lr", type=float, default=1e-3, help="at an effective batch of 64; scaled linearly to the actual")
    add("--min_lr", type=float, default=1e-6, help="at the end of its cosine; not scaled")
    add("--warmup_epochs", type=float, default=10, help="of the learning rate; less for short runs")
    add("--weight_decay", type=float, default=0.02, help="not on biases and norms")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=True, help="where all is written; a run found there goes on")
    add("--seed", type=int, default=0, help="of weights, order, crops, colour and masks")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps or cpu")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="auto: bf16 on GPUs with it")
    add("--compile", action=yes_no, default=False, help="torch.compile the encoders; pays on long runs")
    add("--save_every", type=int, default=1, help="epochs between checkpoints; more where epochs are short")
    add("--save_minutes", type=float, default=15, help="and the longest time between them")
    add("--log_every", type=int, default=20, help="steps between lines of the log")
    add("--max_steps", type=int, help="stop after this many optimizer steps; schedules keep to --epochs")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses values out of range and pairs that contradict each other, before any work."""
    positive = ("img_size mask_patch_size num_matches moco_k moco_t local_dim student_temp teacher_temp std "
                "warmup_teacher_temp epochs batch_size_per_gpu accum_steps lr save_every log_every max_steps")
    not_negative = ("num_workers warmup_teacher_temp_epochs min_lr warmup_epochs weight_decay save_minutes "
                    "seed loss_weights")
    common.check_range(args, positive.split(), not_negative.split(), unit=["momentum", "mask_ratio"],
                       finite=["mean"])
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs}: must be less than --epochs {args.epochs}")
    if args.warmup_teacher_temp_epochs > args.epochs:
        common.fail(f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs}: must not be more than "
                    f"--epochs {args.epochs}; 0 for short runs")
    if not any(args.loss_weights):
        common.fail("--loss_weights 0 0 0: leaves nothing to learn from")
    for divisor, name in ((STRIDE, "the last map's stride"), (args.mask_patch_size, "--mask_patch_size")):
        if args.img_size % divisor:
            common.fail(f"--img_size {args.img_size}: must be a multiple of {name}, {divisor}")
    token_stride = (4, 4, 8, 16)[args.mask_stage]  # of the map that gets the token
    if args.mask_patch_size % token_stride:
        common.fail(f"--mask_patch_size {args.mask_patch_size}: must be a multiple of {token_stride}, the "
                    f"stride at --mask_stage {args.mask_stage}")
    total = (args.img_size // args.mask_patch_size) ** 2
    if not 0 < masked_blocks(total, args.mask_ratio) < total:
        common.fail(f"--mask_ratio {args.mask_ratio}: must mask some of the {total} blocks, not all "
                    "(--mask_patch_size)")
    num_positions = (args.img_size // STRIDE) ** 2
    if args.num_matches and args.num_matches > num_positions:
        common.fail(f"--num_matches {args.num_matches}: the last map has {num_positions} positions")


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


class PairDataset(torch.utils.data.Dataset):
    """Two crops of an image and their geometry, drawn from (seed, epoch, index) alone.

    Args:
        paths: the images.
        img_size: side of the crops.
        seed: of the run.
    """

    def __init__(self, paths: list[str], img_size: int, seed: int):
        self.paths, self.img_size, self.seed = paths, img_size, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns crops uint8 2 x 3 x img_size x img_size and geometries float 2 x 5.

        A geometry is top, left, height and width in source pixels, and 1 for a mirrored crop.
        """
        epoch, index = item
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = common.read_image(self.paths[index])
        crops, geometries = zip(*(self._crop(image) for _ in range(2)), strict=True)
        return torch.stack(crops), torch.tensor(geometries, dtype=torch.float32)

    def _crop(self, image: Tensor) -> tuple[Tensor, tuple]:
        box = RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, [self.img_size] * 2, InterpolationMode.BILINEAR)
        flipped = bool(torch.rand(()) < 0.5)
        return (crop.flip(-1) if flipped else crop), (*box, flipped)


def gaussian_noise(images: Tensor, where: Tensor, std: Tensor, seed: int) -> Tensor:
    """Adds noise to the chosen samples N x 3 x H x W in [0, 1]; `where`, `std` (N,); clamped to [0, 1]."""
    generator = torch.Generator(images.device).manual_seed(seed)  # on the device: too many draws for the CPU
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    std = torch.where(where, std, 0.0).to(images.device).view(-1, 1, 1, 1)
    return images.add_(noise * std).clamp_(0, 1)


def color_views(crops: Tensor, mean: Sequence[float], std: Sequence[float],
                seed: int) -> tuple[Tensor, Tensor]:
    """Both views: the first as it is, the second changed in colour; normalised.

    Args:
        crops: uint8 B x 2 x 3 x H x W.
        mean: of RGB in [0, 1].
        std: of RGB in [0, 1].
        seed: of the draws; every sample has its own.
    """
    generator, B = torch.Generator().manual_seed(seed), len(crops)

    def chance(p: float) -> Tensor:
        return common.bernoulli(torch.full((B,), p), generator)

    x1, x2 = common.to_float(crops).unbind(1)
    jitter = common.draw_color_jitter((0.4, 0.4, 0.2, 0.1), torch.full((B,), 0.8), generator)
    sigma = torch.empty(B).uniform_(0.1, 2.0, generator=generator)
    variance = torch.empty(B).uniform_(10, 50, generator=generator)  # of pixels in [0, 255]
    x2 = common.color_jitter(x2, *jitter)
    x2 = common.gaussian_blur(x2, torch.ones(B, dtype=torch.bool), sigma)
    x2 = gaussian_noise(x2, chance(0.6), variance.sqrt() / 255, common.stream_seed(seed, "noise"))
    x2 = common.solarize(x2, chance(0.2))
    x2 = common.grayscale(x2, chance(0.2))
    return common.normalize(x1, mean, std), common.normalize(x2, mean, std)


# Masks of blocks, `blocks`, are B x s x s; masks of pixels, `mask`, B x 1 x H x W. In both 1 means masked.


def masked_blocks(total: int, ratio: float) -> int:
    """How many of an image's blocks are masked, ceil(ratio * total); .55 * 100 is 55.0...01 and means 55."""
    return math.ceil(round(ratio * total, 6))


def draw_masks(B: int, side: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Blocks B x side x side, 1 = masked, drawn for each image on its own."""
    order = torch.rand(B, side**2, generator=generator).argsort(1)  # a permutation each
    return (order < masked_blocks(side**2, ratio)).float().view(B, side, side)


def enlarge(blocks: Tensor, side: int) -> Tensor:
    """Blocks B x s x s -> mask B x 1 x side x side, side a multiple of s."""
    times = side // blocks.shape[-1]
    return blocks.repeat_interleave(times, 1).repeat_interleave(times, 2).unsqueeze(1)


def mask_images(images: Tensor, mask: Tensor) -> Tensor:
    """Puts each image's own mean colour where the mask is 1."""
    return torch.where(mask > 0, images.mean((2, 3), keepdim=True), images)


# --------------------------------------------------------------------------------------------------
# Matching: which positions of two crops show the same place
# --------------------------------------------------------------------------------------------------


def position_centers(geometry: Tensor, side: int) -> Tensor:
    """Centres of the side x side positions in source pixels (y, x), row by row.

    Args:
        geometry: B x 5: top, left, height, width, 1 for mirrored.
        side: of the map.

    Returns:
        B x side^2 x 2.
    """
    top, left, height, width, flipped = geometry.unsqueeze(-1).unbind(1)  # B x 1 each
    share = (torch.arange(side, device=geometry.device) + 0.5) / side  # of the crop's height or width
    y = top + height * share  # B x side
    x = left + width * torch.where(flipped > 0, 1 - share, share)
    y, x = y.unsqueeze(2).expand(-1, side, side), x.unsqueeze(1).expand(-1, side, side)
    return torch.stack([y, x], -1).flatten(1, 2)


def match_positions(geometry: Tensor, other: Tensor, side: int, num_matches: int) -> tuple[Tensor, ...]:
    """For each position its nearest in the other crop; of these pairs the `num_matches` closest.

    However far apart; several positions may have the same match.

    Args:
        geometry: B x 5, see position_centers.
        other: B x 5, of the other crop.
        side: of the map.
        num_matches: n.

    Returns:
        positions in the first crop, their matches in the other, distances in source pixels: B x n each.
    """
    centers, other_centers = position_centers(geometry, side), position_centers(other, side)
    exact = "donot_use_mm_for_euclid_dist"  # a matrix product would lose digits
    distances = torch.cdist(centers, other_centers, compute_mode=exact)
    nearest, matches = distances.min(2)  # B x side^2
    closest, positions = nearest.topk(num_matches, dim=1, largest=False)
    return positions, matches.gather(1, positions), closest


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def stem_and_stages(backbone: nn.Module) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """Modules of a timm ResNet, Swin or ConvNeXt in order: before the stages; stages, and norm. Else None."""
    if hasattr(backbone, "conv1") and hasattr(backbone, "layer4"):
        stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        return [backbone.conv1, backbone.bn1, backbone.act1, backbone.maxpool], stages
    if hasattr(backbone, "patch_embed") and len(getattr(backbone, "layers", ())) == 4:
        return [backbone.patch_embed], [*backbone.layers, backbone.norm]
    if hasattr(backbone, "norm_pre") and len(getattr(backbone, "stages", ())) == 4:
        return [backbone.stem], [*backbone.stages, backbone.norm_pre]
    return None


def maps_are_nhwc(backbone: nn.Module) -> bool:
    """True where the maps inside are B x h x w x D, as in Swin."""
    return getattr(backbone, "output_fmt", "NCHW") == "NHWC"


def run_backbone(backbone: nn.Module, images: Tensor, stage: int = 0, blocks: Tensor | None = None,
                 mask_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images -> last map B x D x h x w and pooled features B x D.

    Args:
        backbone: one that stem_and_stages knows.
        images: B x 3 x H x W.
        stage: before which the token is added.
        blocks: B x s x s, 1 = masked; None: no token.
        mask_token: as wide as the map there.
    """
    stem, stages = stem_and_stages(backbone)
    nhwc, x = maps_are_nhwc(backbone), images
    for module in (*stem, *stages[:stage]):
        x = module(x)
    if blocks is not None:  # the pixels there are of one colour already; the token says which are missing
        side = x.shape[1] if nhwc else x.shape[2]
        token = mask_token.view(1, -1, 1, 1) * enlarge(blocks, side)  # B x width x side x side
        x = x + (token.permute(0, 2, 3, 1) if nhwc else token).to(x.dtype)
    for module in stages[stage:]:
        x = module(x)
    pooled = backbone.forward_head(x)
    return (x.permute(0, 3, 1, 2) if nhwc else x), pooled


class LocalHead(nn.Module):
    """Three linear layers to a unit vector, then its cosine with prototypes.

    The paper's 1 x 1 convolutions, on the chosen positions alone.

    Args:
        in_dim: D.
        out_dim: prototypes.
        use_bn: BatchNorm after the first two layers.
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool):
        super().__init__()
        layers = []
        for width in (in_dim, 2048):
            norm = [nn.BatchNorm1d(2048)] if use_bn else []
            layers += [nn.Linear(width, 2048), *norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(2048, 256))
        prototypes = nn.Linear(256, out_dim, bias=False)
        self.prototypes = nn.utils.parametrizations.weight_norm(prototypes)
        gain = self.prototypes.parametrizations.weight.original0  # out_dim x 1
        nn.init.ones_(gain)
        gain.requires_grad_(False)  # prototypes stay unit vectors

    def forward(self, x: Tensor) -> Tensor:
        """N x D -> N x out_dim."""
        return self.prototypes(F.normalize(self.mlp(x), dim=-1))


class Encoder(nn.Module):
    """Backbone, projector of the global and head of the local loss; as it stands, the branch encoder.

    Args:
        backbone: a timm model that stem_and_stages knows.
        D: channels of its last map.
        local_dim: prototypes.
        use_bn: BatchNorm in the local head, as in the backbone.
    """

    def __init__(self, backbone: nn.Module, D: int, local_dim: int, use_bn: bool):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(nn.Linear(D, 2048), nn.ReLU(), nn.Linear(2048, 256))
        self.local_head = LocalHead(D, local_dim, use_bn)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images B x 3 x H x W -> last map B x D x h x w, keys B x 256 of unit length."""
        last_map, pooled = run_backbone(self.backbone, images)
        return last_map, F.normalize(self.projector(pooled).float(), dim=-1)


class OnlineEncoder(Encoder):
    """An encoder with a mask token, and a decoder from the last map to pixels.

    Args:
        backbone: as in Encoder, like D, local_dim and use_bn.
        mask_stage: the token is added before it.
        token_dim: width of the map there.
    """

    def __init__(self, backbone: nn.Module, D: int, local_dim: int, use_bn: bool, mask_stage: int,
                 token_dim: int):
        super().__init__(backbone, D, local_dim, use_bn)
        self.mask_stage, self.mask_token = mask_stage, nn.Parameter(torch.zeros(token_dim))
        self.decoder = nn.Sequential(nn.Conv2d(D, 3 * STRIDE**2, 1), nn.PixelShuffle(STRIDE))

    def forward(self, images: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Masked images -> all that the losses need, in one call: DistributedDataParallel sees no other.

        Args:
            images: B x 3 x H x W, masked.
            blocks: B x s x s, 1 = masked.
            positions: B x n of the last map's h * w, for the local head.

        Returns:
            prediction B x 3 x H x W; queries B x 256 of unit length; local outputs B x n x local_dim; pooled
            features B x D.
        """
        last_map, pooled = run_backbone(self.backbone, images, self.mask_stage, blocks, self.mask_token)
        q = F.normalize(self.projector(pooled).float(), dim=-1)
        local = self.local_head(take_positions(last_map, positions))
        return self.decoder(last_map), q, local.view(*positions.shape, -1), pooled


def take_positions(last_map: Tensor, positions: Tensor) -> Tensor:
    """Map B x D x h x w at positions B x n, numbered row by row -> (B * n) x D."""
    x = last_map.flatten(2).transpose(1, 2)  # B x h*w x D
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2])).flatten(0, 1)


def gather(x: Tensor, process: Process) -> Tensor:
    """Rows of all processes, in the order of their ranks; without gradient."""
    if process.world_size == 1:
        return x
    everywhere = [torch.empty_like(x) for _ in range(process.world_size)]
    dist.all_gather(everywhere, x.contiguous())
    return torch.cat(everywhere)


def process_mean(x: Tensor, process: Process) -> Tensor:
    """Mean over all processes, in place; without gradient."""
    if process.world_size > 1:
        dist.all_reduce(x)
        x /= process.world_size
    return x


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def focal_l1(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean over masked pixels of |d| (2 sigmoid(.2 |d|) - 1), d the difference: large errors count more.

    Args:
        prediction: B x 3 x H x W.
        image: B x 3 x H x W, normalised.
        mask: B x 1 x H x W, 1 = masked.
    """
    d = (prediction - image).abs()
    return (d * (2 * torch.sigmoid(0.2 * d) - 1) * mask).sum() / (mask.sum() + 1e-5) / 3  # mask: 1 channel


def focal_frequency(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of the batch's mean spectra, mean over frequencies; those that are worse count more.

    Pixels that are not masked are taken halfway to the image, with a thousandth of the gradient. Arguments as
    in focal_l1.
    """
    w = torch.where(mask > 0, 1.0, 0.001)
    blended = prediction * w + 0.5 * (prediction.detach() + image) * (1 - w)
    # The spectrum of the mean is the mean of the spectra.
    difference = torch.fft.fft2(blended.mean(0) - image.mean(0), norm="ortho")  # 3 x H x W
    distance = difference.real**2 + difference.imag**2
    weight = (distance.detach().sqrt() + 1).log()
    weight = (weight / weight.max().clamp(min=1e-12)).clamp(0, 1)
    return (weight * distance).mean()


def reconstruction_loss(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Focal L1 plus focal frequency loss, in float32. Arguments as in focal_l1."""
    prediction = prediction.float()
    return focal_l1(prediction, image, mask) + focal_frequency(prediction, image, mask)


def global_loss(q: Tensor, k: Tensor, queue: Tensor, moco_t: float) -> Tensor:
    """InfoNCE: each query has to tell the key of its image's other view from those in the queue.

    Args:
        q: B x 256 queries of unit length.
        k: B x 256 keys of unit length, without gradient.
        queue: 256 x K.
        moco_t: tau.
    """
    l_pos = (q * k).sum(-1, keepdim=True)  # B x 1
    l_neg = q @ queue  # B x K
    logits = torch.cat([l_pos, l_neg], 1) / moco_t
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def local_loss(output: Tensor, target: Tensor, center: Tensor, student_temp: float,
               branch_temp: float) -> Tensor:
    """Cross-entropy between branch and online encoder at matched positions, mean over all, in float32.

    Args:
        output: B x n x local_dim of the online encoder.
        target: B x n x local_dim of the branch encoder, without gradient.
        center: local_dim, c.
        student_temp: tau_o.
        branch_temp: tau_b.
    """
    p_target = ((target.float() - center) / branch_temp).softmax(-1)
    log_p = (output.float() / student_temp).log_softmax(-1)
    return -(p_target * log_p).sum(-1).mean()


class Memory(nn.Module):
    """State of the losses: the queue of the global, the centre of the local.

    Args:
        moco_k: K.
        local_dim: width of the centre.
    """

    def __init__(self, moco_k: int, local_dim: int):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(256, moco_k), dim=0))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(local_dim))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts keys N x 256 of all processes in the place of the oldest N."""
        N, K = len(keys), self.queue.shape[1]
        columns = (self.queue_ptr + torch.arange(N, device=keys.device)) % K
        self.queue[:, columns] = keys.T
        self.queue_ptr.add_(N).remainder_(K)

    def moved_center(self, batch_mean: Tensor) -> Tensor:
        """.9 c + .1 `batch_mean`, the branch's mean output (local_dim,) at matched positions; c stays."""
        return self.center.lerp(batch_mean, 0.1)


# --------------------------------------------------------------------------------------------------
# One epoch
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def batch_top1(q: Tensor, k: Tensor) -> Tensor:
    """% of queries B x 256 to which, of the batch's keys B x 256, their image's is the nearest."""
    return 100 * ((q @ k.T).argmax(1) == torch.arange(len(q), device=q.device)).float().mean()


def teacher_temp_at(epoch: int, warmup: float, final: float, warmup_epochs: int) -> float:
    """tau_b: linear from `warmup` to `final` over the warm-up epochs, then constant."""
    return warmup + (final - warmup) * min(1.0, epoch / warmup_epochs) if warmup_epochs else final


def train_one_epoch(epoch: int, steps: range, batches: Iterator, online: nn.Module, branch: Encoder,
                    memory: Memory, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                    schedule: Callable[[int], dict[str, float]], num_matches: int, args: argparse.Namespace,
                    process: Process, meter: common.Meter,
                    after_step: Callable[[int, dict, Callable], bool]) -> bool:
    """Trains the optimizer steps `steps` of one epoch; returns True as soon as the run is to stop.

    Args:
        epoch: counted from 0.
        steps: counted from the start of the run.
        batches: yields crops, geometries and messages about unreadable images.
        online: an OnlineEncoder, in DistributedDataParallel or not.
        branch: its moving average.
        memory: queue and centre.
        optimizer: two parameter groups, with and without weight decay.
        scaler: for fp16; else it does nothing.
        schedule: step -> lr, momentum.
        num_matches: n.
        args: the flags.
        process: this one.
        meter: collects what the log shows.
        after_step: after_step(steps done, values, draw) logs and saves when due, and says whether to stop;
            draw() writes reconstruction.png.
    """
    network = online.module if isinstance(online, DistributedDataParallel) else online
    autocast = common.autocast(args.amp, process.device)
    branch_temp = teacher_temp_at(epoch, args.warmup_teacher_temp, args.teacher_temp,
                                  args.warmup_teacher_temp_epochs)
    map_side, mask_side = args.img_size // STRIDE, args.img_size // args.mask_patch_size

    for step in steps:
        now = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = now["lr"]
        keys, figures, branch_means = [], [], torch.zeros(2, args.local_dim, device=process.device)

        for micro in range(args.accum_steps):
            # B x 2 x 3 x H x W, B x 2 x 5
            crops, geometry = (x.to(process.device, non_blocking=True) for x in meter.fetch(batches))
            B = len(crops)
            seed = common.stream_seed(args.seed, "colour", step, micro, process.rank)
            images = torch.cat(color_views(crops, args.mean, args.std, seed))  # 2B x 3 x H x W, by views
            generator = torch.Generator().manual_seed(common.stream_seed(seed, "mask"))
            blocks = draw_masks(2 * B, mask_side, args.mask_ratio, generator).to(process.device)  # 2B x s x s
            mask = enlarge(blocks, args.img_size)  # 2B x 1 x H x W
            masked = mask_images(images, mask)
            if process.is_main and step == 0 and micro == 0:
                save_views(images, args)

            # Online positions of view 1 and their matches in view 2; then the other way round.
            there = match_positions(geometry[:, 0], geometry[:, 1], map_side, num_matches)
            back = match_positions(geometry[:, 1], geometry[:, 0], map_side, num_matches)
            positions, matches, distances = (
                torch.cat(both) for both in zip(there, back, strict=True))  # 2B x n each

            with torch.no_grad(), autocast:  # BatchNorm, here too, takes the batch's statistics
                branch_map, k = branch(images)  # 2B x D x h x w, 2B x 256
                other_map = branch_map.roll(B, 0)  # halves swapped: in the rows of view 1, view 2's map
                target = branch.local_head(take_positions(other_map, matches)).view(2, B, num_matches, -1)
                k = k.view(2, B, -1)  # by views

            # Processes exchange gradients with the last micro-batch only.
            waits = micro < args.accum_steps - 1 and online is not network
            with online.no_sync() if waits else nullcontext():
                with autocast:
                    prediction, q, local, pooled = online(masked, blocks, positions)
                q, local = q.view(2, B, -1), local.view(2, B, num_matches, -1)

                # By views, for the frequency loss compares mean spectra.
                views = zip(prediction.chunk(2), images.chunk(2), mask.chunk(2), strict=True)
                l_reconstruction = sum(reconstruction_loss(*view) for view in views) / 2
                l_global = sum(global_loss(q[v], k[1 - v], memory.queue, args.moco_t) for v in range(2)) / 2

                # The second direction sees the centre as the first has moved it; it is stored below.
                means = process_mean(target.float().mean((1, 2)), process)  # 2 x local_dim
                centers = memory.center, memory.moved_center(means[0])
                l_local = sum(local_loss(local[v], target[v], centers[v], args.student_temp, branch_temp)
                              for v in range(2)) / 2

                losses = l_reconstruction, l_global, l_local
                loss = sum(weight * term for weight, term in zip(args.loss_weights, losses, strict=True))
                scaler.scale(loss / args.accum_steps).backward()
            # B x 2 x 256, image by image: the queue's order is that of one process without accumulation.
            keys.append(gather(k.transpose(0, 1), process))
            branch_means += means / args.accum_steps
            figures.append({"loss": loss.detach(), "reconstruction": l_reconstruction.detach(),
                            "global": l_global.detach(), "local": l_local.detach(),
                            "batch_top1": (batch_top1(q[0], k[1]) + batch_top1(q[1], k[0])) / 2,
                            "match_distance": distances.mean(),
                            "feature_std": common.feature_std(pooled.detach())})

        # Online encoder by gradient, then the branch follows, then centre and queue.
        scaler.unscale_(optimizer)
        grad_norm = common.grad_norm(network, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for part in ("backbone", "projector", "local_head"):
            common.update_ema(getattr(network, part), getattr(branch, part), now["momentum"])
        for mean in branch_means:
            memory.center = memory.moved_center(mean)
        memory.enqueue(torch.cat(keys).flatten(0, 1))  # both views' keys, once each

        terms = {name: torch.stack([part[name] for part in figures]).mean(0) for name in figures[0]}
        meter.end_step({**terms, "grad_norm": grad_norm})
        first = slice(min(B, 8))  # of view 1 in the last micro-batch
        if after_step(step + 1, {**now, "teacher_temp": branch_temp},
                      partial(save_reconstruction, images[first], masked[first], prediction[first].detach(),
                              mask[first], args)):
            return True
    return False


def save_views(images: Tensor, args: argparse.Namespace) -> None:
    """Draws a row for each of up to 8 images: views 1 and 2 before masking; `images` 2B x 3 x H x W."""
    rows = list(zip(*(view[:8] for view in images.chunk(2)), strict=True))
    common.save_grid(Path(args.output_dir) / "views.png", rows, args.mean, args.std)


def save_reconstruction(images: Tensor, masked: Tensor, prediction: Tensor, mask: Tensor,
                        args: argparse.Namespace) -> None:
    """Draws a row for each image: itself, what the encoder saw, the prediction in the masked blocks."""
    pasted = torch.where(mask > 0, prediction.float(), images)
    rows = list(zip(images, masked, pasted, strict=True))
    common.save_grid(Path(args.output_dir) / "reconstruction.png", rows, args.mean, args.std)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def probe_backbone(backbone: nn.Module, args: argparse.Namespace) -> tuple[int, int]:
    """Channels of the last map and at the mask stage; fails for a backbone that cannot be taken apart."""
    refusal = f"--arch {args.arch}: must be a ResNet, a Swin or a ConvNeXt whose last map has stride {STRIDE}"
    parts = stem_and_stages(backbone)
    if parts is None:
        common.fail(refusal)
    images = torch.rand(1, 3, args.img_size, args.img_size)
    backbone.eval()
    try:
        with torch.no_grad():
            token_map = nn.Sequential(*parts[0], *parts[1][: args.mask_stage])(images)
            last_map, pooled = run_backbone(backbone, images)
            same = torch.allclose(pooled, backbone(images), atol=1e-4)
    except Exception as error:
        common.fail(f"{refusal}: {error}")
    backbone.train()
    if not same or last_map.shape[2:] != (args.img_size // STRIDE,) * 2:
        common.fail(refusal)
    return last_map.shape[1], token_map.shape[-1 if maps_are_nhwc(backbone) else 1]


def build_encoders(args: argparse.Namespace) -> tuple[OnlineEncoder, Encoder]:
    """Online and branch encoder; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(args.arch, args.img_size)
    D, token_dim = probe_backbone(backbone, args)
    use_bn = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())
    branch = Encoder(copy.deepcopy(backbone), D, args.local_dim, use_bn).requires_grad_(False)
    return OnlineEncoder(backbone, D, args.local_dim, use_bn, args.mask_stage, token_dim), branch


def main() -> None:
    """Sets everything up, resumes what was begun, trains, and writes."""
    parser = get_parser()
    parser.error = common.fail
    args = parser.parse_args()
    check_args(args)
    process = common.init_process(args.device)
    common.autocast_dtype(args.amp, process.device)  # refuses what the device lacks
    out = common.make_output_dir(args.output_dir, process)

    # Data
    paths = common.list_images(args.data_path, exclude=out)
    common.check_images(paths, args.img_size)
    effective_batch = args.batch_size_per_gpu * args.accum_steps * process.world_size
    steps_per_epoch = len(paths) // effective_batch
    if not steps_per_epoch:
        common.fail(f"--batch_size_per_gpu {args.batch_size_per_gpu}: the effective batch, "
                    f"{effective_batch}, is larger than the data, {len(paths)}")
    keys_per_step = 2 * effective_batch
    if args.moco_k % keys_per_step:
        nearest = max(1, args.moco_k // keys_per_step) * keys_per_step
        common.fail(f"--moco_k {args.moco_k}: must be a multiple of twice the effective batch, "
                    f"{keys_per_step}, such as {nearest}")
    total_steps = args.epochs * steps_per_epoch
    end_step = min(total_steps, args.max_steps or total_steps)

    # Networks and state: resumed, or started, and then the branch encoder starts as the online encoder
    network, branch = build_encoders(args)
    memory = Memory(args.moco_k, args.local_dim).to(process.device)
    identity = {"args": common.plain(args), "images": len(paths), "effective_batch": effective_batch}
    saved = common.resume_checkpoint(out / "checkpoint.pth", identity, common.FREE_FLAGS)
    init = common.init_backbone(network.backbone, args, saved)
    start = network.state_dict()
    branch.load_state_dict({name: start[name] for name in branch.state_dict()})
    for model in (network, branch):
        model.to(process.device)
        if process.device.type == "cuda" and not hasattr(model.backbone, "patch_embed"):
            model.to(memory_format=torch.channels_last)
    if process.world_size > 1 and process.device.type == "cuda":
        network, branch = (timm.layers.convert_sync_batchnorm(model) for model in (network, branch))
    fused = {"fused": True} if args.optimizer == "adamw" else {}  # one kernel for all tensors
    optimizer = timm.optim.create_optimizer_v2(
        common.param_groups(network), lr=args.lr, weight_decay=args.weight_decay, opt=args.optimizer, **fused)
    scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
    stateful = {"online": network, "branch": branch, "memory": memory, "optimizer": optimizer,
                "scaler": scaler}
    start_step = saved["step"] if saved else 0
    common.check_alike(process, images=len(paths), start_step=start_step)
    end_step = max(start_step, end_step)  # a run that is further already has nothing to do
    for name, part in stateful.items():
        if saved and saved[name]:  # the scaler has no state without fp16
            part.load_state_dict(saved[name])
    del saved
    if args.compile:
        for model in (network, branch):
            model.compile()
    online = network
    if process.world_size > 1:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        online = DistributedDataParallel(network, device_ids=device_ids)

    dataset = PairDataset(paths, args.img_size, args.seed)
    sampler = common.StepSampler(len(dataset), args.batch_size_per_gpu, args.accum_steps, process, args.seed,
                                 start_step, end_step)
    loader = common.build_loader(dataset, sampler, args.num_workers, process.device)
    lr = args.lr * effective_batch / 64
    num_positions = (args.img_size // STRIDE) ** 2
    num_matches = args.num_matches or max(1, round(20 / 49 * num_positions))

    def schedule(step: int) -> dict[str, float]:
        cosine = partial(common.cosine_schedule, step=step, total_steps=total_steps)
        return {"lr": cosine(lr, args.min_lr, warmup_steps=round(args.warmup_epochs * steps_per_epoch)),
                "momentum": cosine(args.momentum, 1.0)}

    versions = common.versions()
    header = {"argv": sys.argv, "versions": versions, "init": init,
              "device": common.device_name(process.device),
              "processes": process.world_size, "images": len(paths), "effective_batch": effective_batch,
              "scaled_lr": lr, "steps_per_epoch": steps_per_epoch, "steps": total_steps,
              "from_step": start_step, "to_step": end_step, "positions": num_positions,
              "num_matches": num_matches, "chance_global": math.log(args.moco_k + 1),
              "chance_local": math.log(args.local_dim)}
    if process.is_main:
        print(init)
        derived = {name: value for name, value in header.items() if name not in ("argv", "versions", "init")}
        print("  ".join(f"{name} {value}" for name, value in derived.items()))
        if args.moco_k > len(paths):
            print(f"warning: --moco_k {args.moco_k}: more keys than the {len(paths)} images; the queue often "
                  "holds older keys of the query's own image, as negatives", file=sys.stderr)
    floors = {"feature_std": 0.05} if args.batch_size_per_gpu > 1 else {}  # one image has no spread
    log = common.RunLog(out, process, end_step, start_step, header, floors,
                        advice="Try a lower --lr, more --warmup_epochs, or a larger --momentum")
    meter, stop, saved_at = common.Meter(process, len(paths)), common.StopSignal(), time.monotonic()

    def save(step: int) -> None:
        nonlocal saved_at
        if process.is_main:
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {**identity, "step": step, "epoch": step // steps_per_epoch, "versions": versions}
            common.export_backbone(network.backbone, out / "backbone", args.img_size, args.mean, args.std)
            common.write_atomically(out / "checkpoint.pth", partial(torch.save, state))
        saved_at = time.monotonic()

    def after_step(step: int, values: dict, draw_reconstruction: Callable[[], None]) -> bool:
        overdue = time.monotonic() - saved_at > 60 * args.save_minutes
        stopping, overdue = common.agree(process, stop.seen, overdue)
        epochs, rest = divmod(step, steps_per_epoch)
        saving = stopping or overdue or step == end_step or (rest == 0 and epochs % args.save_every == 0)
        if saving or step % args.log_every == 0:
            log.write(step, {"epoch": epochs, **meter.summary(step, effective_batch), **values})
            if process.is_main:
                draw_reconstruction()
            if saving:
                save(step)
            meter.restart()
        log.advance()
        return stopping and step < end_step

    batches, stopped = iter(loader), False
    for epoch in range(start_step // steps_per_epoch, math.ceil(end_step / steps_per_epoch)):
        steps = range(max(start_step, epoch * steps_per_epoch), min(end_step, (epoch + 1) * steps_per_epoch))
        stopped = train_one_epoch(epoch, steps, batches, online, branch, memory, optimizer, scaler, schedule,
                                  num_matches, args, process, meter, after_step)
        if stopped:
            break
    del batches  # ends the workers
    log.close()
    if process.is_main:
        print(f"stopped by a signal after a checkpoint; the same command goes on: {out}" if stopped else
              f"{end_step} steps done. Judge it: python eval_knn.py --data_path LABELLED --weights {out}")
    if process.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""CMID: masked image reconstruction, global contrast and local distillation, learned together.

D. Muhtar et al., "CMID: a unified self-supervised learning framework for remote sensing image understanding",
IEEE TGRS 2023, arXiv 2304.09670.

    # a short run on a CPU; `make demo` draws the images
    python cmid.py --data_path demo/data/train --output_dir OUT --arch resnet18 --img_size 64 \
        --mask_patch_size 16 --moco_k 1024 --batch_size_per_gpu 32 --epochs 5 --momentum .98 \
        --local_dim 256 --teacher_temp .04
    # one GPU: ResNet-50 on any folder of images, labelled or not
    python cmid.py --data_path IMAGES --output_dir OUT --moco_k 16384
    # several GPUs: Swin-B, the paper's other backbone
    python -m torch.distributed.run --nproc_per_node 4 cmid.py --data_path IMAGES --output_dir OUT \
        --arch swin_base_patch4_window7_224

Two crops of each image, the second changed in colour. The online encoder sees both with blocks masked out;
the branch encoder, its moving average, sees them whole. The online encoder has three tasks: to paint the
masked blocks; to find the other crop's key among a queue of older keys; and, at positions that show the same
place, to predict what the branch encoder makes of the other crop. Read "Masks and matches", the losses and
`train` first.

    symbol    variable           flag (default)              what
    B         B                  batch_size_per_gpu (64)     images per process and micro-batch
    h, w      map_side           img_size (224)              sides of the last map, img_size / 32: 7
    D         D                  arch (resnet50)             channels of the last map
    n         num_matches        num_matches (20 of 49)      matched positions of a pair of views
    q, k      q, k               -                           queries and keys of the global contrast
    K, tau    queue, moco_t      moco_k (65536), moco_t (.2) length of the queue, temperature of the contrast
    tau_o     student_temp       student_temp (.1)           online temperature of the local distillation
    tau_b     teacher_temp       teacher_temp (.07)          the branch's ("teacher"); warms up from .04
    c         center             -                           mean branch output at matches, momentum .9
    m         momentum           momentum (.996)             of the branch encoder, cosine to 1

Differs from the authors' code:
- positions match by their distance in source pixels; the authors add normalised offsets to pixel coordinates,
  so most of their matches are not the nearest positions;
- both views' keys enter the queue once (theirs: once per process); the centre's mean is over all processes;
- both views go through the encoders, and their BatchNorm, as one batch; no weight decay on biases and norms;
- the mean spectra of the frequency loss are of a process's micro-batch; momentum and tau_b are one
  step apart from theirs; tau_b warms up for a quarter of the epochs, 50 at most;
- of ConvNeXt the map is taken before the last norm;
- workers crop, resize and flip with antialiasing, 8-bit images in uint8; colour and noise follow on the
  device; queue, centre and all draws survive a resume.

In OUT: checkpoint.pth, backbone/ (the online encoder's, for timm; its BatchNorm has the statistics of masked
images), log.jsonl, views.png, reconstruction.png.
"""

import argparse
import copy
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

import common
from common import Process, Samples, not_negative, positive, unit

STRIDE = 32  # of the last map
MILLIONAID_MEAN, MILLIONAID_STD = (0.33797, 0.3605, 0.3348), (0.1359, 0.1352, 0.1407)  # the paper's data

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags; the defaults are the paper's."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=positive(int), default=224, help="side of both views, a multiple of 32")
    common.add_pixel_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", help="a timm ResNet, Swin or ConvNeXt, such as resnet18, "
        "swin_base_patch4_window7_224, convnext_tiny")
    add("--init", help="start the backbone from an output folder, a checkpoint, a state dict, or timm's "
        "pretrained weights by name")
    add("--checkpoint_key", help="network of a checkpoint that --init takes; default: the one that its run "
        "exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves tensors at their "
        "initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mask_patch_size", type=positive(int), default=32, help="side of the masked blocks in pixels, a "
        "divisor of --img_size; we recommend 16 below 224 px")
    add("--mask_ratio", type=unit(float), default=0.6, help="share of the blocks; less if reconstruction.png "
        "stays flat")
    add("--mask_stage", type=int, default=0, choices=[0, 1, 2, 3], help="the mask token is added before this "
        "stage; 0: right after the stem")
    add("--num_matches", type=positive(int), help="n, matched positions; default: 20 of 49, in proportion")
    add("--loss_weights", type=not_negative(float), nargs=3, default=(1.0, 1.0, 1.0), help="of "
        "reconstruction, global and local loss; 0 switches one off, to see what it does")
    add("--momentum", type=unit(float), default=0.996, help="of the branch encoder, at the start of its "
        "cosine to 1; we recommend .98 for short runs")
    add("--moco_k", type=positive(int), default=65536, help="K. We recommend at most the number of images: "
        "each has two keys, so this is half an epoch")
    add("--moco_t", type=positive(float), default=0.2, help="tau; lower: near negatives count more")
    add("--local_dim", type=positive(int), default=2048, help="prototypes; fewer for small data")
    add("--student_temp", type=positive(float), default=0.1, help="tau_o; seldom changed")
    add("--teacher_temp", type=positive(float), default=0.07, help="tau_b after its warm-up; lower if the "
        "local loss stays at ln of --local_dim")
    add("--warmup_teacher_temp", type=positive(float), default=0.04, help="tau_b at first; lower if unstable")
    add("--warmup_teacher_temp_epochs", type=not_negative(int), help="of tau_b; default: 50, but at most a "
        "quarter of --epochs")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=200, help="length of all schedules; small data needs more")
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--optimizer", choices=["adan", "adamw"], default="adan", help="we recommend --lr 5e-4 with adamw")
    add("--lr", type=positive(float), default=1e-3, help="at an effective batch of 64, scaled linearly")
    add("--min_lr", type=not_negative(float), default=1e-6, help="at the end of its cosine; not scaled")
    add("--warmup_epochs", type=not_negative(float), help="of the learning rate; default: 10, but at most a "
        "tenth of --epochs")
    add("--weight_decay", type=not_negative(float), default=0.02, help="not on biases and norms")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags."""
    args.warmup_epochs = common.default_warmup(args.warmup_epochs, 10, args.epochs)
    if args.warmup_teacher_temp_epochs is None:
        args.warmup_teacher_temp_epochs = min(50, args.epochs // 4)
    warmup = args.warmup_teacher_temp_epochs
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs}")
    if warmup > args.epochs:
        common.fail(f"--warmup_teacher_temp_epochs {warmup}: must be at most --epochs {args.epochs}")
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
        samples: the images.
        img_size: side of the crops.
        seed: of the run.
    """

    def __init__(self, samples: Samples, img_size: int, seed: int):
        self.samples, self.img_size, self.seed = samples, img_size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns crops 2 x C x img_size x img_size of the files' dtype, and geometries float 2 x 5.

        A geometry is top, left, height and width in source pixels, and 1 for a mirrored crop.
        """
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = self.samples[index]
        crops, geometries = zip(*(self._crop(image) for _ in range(2)), strict=True)
        return torch.stack(crops), torch.tensor(geometries, dtype=torch.float32)

    def _crop(self, image: Tensor) -> tuple[Tensor, tuple]:
        box = RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, [self.img_size] * 2, InterpolationMode.BILINEAR)
        flipped = bool(torch.rand(()) < 0.5)
        return (crop.flip(-1) if flipped else crop), (*box, flipped)


def gaussian_noise(images: Tensor, where: Tensor, std: Tensor, seed: int) -> Tensor:
    """Adds noise to the chosen samples N x C x H x W in [0, 1]; `where`, `std` (N,); clamped to [0, 1]."""
    generator = torch.Generator(images.device).manual_seed(seed)  # on the device: too many draws for the CPU
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    std = torch.where(where, std, 0.0).to(images.device).view(-1, 1, 1, 1)
    return images.add_(noise * std).clamp_(0, 1)


def color_views(crops: Tensor, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Both views, normalised: the first as it is, the second changed in colour, every sample on its own.

    Args:
        crops: B x 2 x C x H x W, as PairDataset gives them.
        args: mean, std.
        seed: of the draws.
    """
    generator, B = torch.Generator().manual_seed(seed), len(crops)

    def chance(p: float) -> Tensor:
        return common.bernoulli(torch.full((B,), p), generator)

    x1, x2 = common.to_float(crops, args.mean, args.std).unbind(1)
    jitter = common.draw_color_jitter((0.4, 0.4, 0.2, 0.1), torch.full((B,), 0.8), generator)
    sigma = torch.empty(B).uniform_(0.1, 2.0, generator=generator)
    variance = torch.empty(B).uniform_(10, 50, generator=generator)  # of pixels in [0, 255]
    x2 = common.color_jitter(x2, *jitter)
    x2 = common.gaussian_blur(x2, torch.ones(B, dtype=torch.bool), sigma)
    x2 = gaussian_noise(x2, chance(0.6), variance.sqrt() / 255, common.stream_seed(seed, "noise"))
    x2 = common.solarize(x2, chance(0.2))
    x2 = common.grayscale(x2, chance(0.2))
    return tuple(common.normalize(x, args.mean, args.std, crops.dtype) for x in (x1, x2))


# --------------------------------------------------------------------------------------------------
# Masks and matches. The rest is made of these four; n, h and w as above:
#
#   blocks     B x s x s      the image as s x s squares of --mask_patch_size pixels; 1 = masked
#   mask       B x 1 x H x W  the same, pixel by pixel; 1 = masked
#   positions  B x n          cells of a view's last map, numbered row by row; each stands for the 32 x 32
#                             pixels that the decoder paints from it
#   matches    B x n          to each of them, the cell of the other view that shows the nearest place of the
#                             source image; matches_12: to positions of view 1, cells of view 2
# --------------------------------------------------------------------------------------------------


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
    """Each position's nearest in the other view, which several may share; the `num_matches` closest pairs.

    Args:
        geometry: B x 5, see position_centers.
        other: B x 5, of the other view.
        side: of the map.
        num_matches: n.

    Returns:
        positions in this view, their matches in the other, distances in source pixels: B x n each.
    """
    centers, other_centers = position_centers(geometry, side), position_centers(other, side)
    exact = "donot_use_mm_for_euclid_dist"  # a matrix product would lose digits
    distances = torch.cdist(centers, other_centers, compute_mode=exact)  # B x h*w x h*w
    nearest, matches = distances.min(2)  # B x h*w
    closest, positions = nearest.topk(num_matches, dim=1, largest=False)
    return positions, matches.gather(1, positions), closest


def take_positions(last_map: Tensor, positions: Tensor) -> Tensor:
    """Map B x D x h x w at positions B x n -> (B * n) x D."""
    x = last_map.flatten(2).transpose(1, 2)  # B x h*w x D
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2])).flatten(0, 1)


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
        images: B x C x H x W.
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
    """Three linear layers (the paper's 1 x 1 convolutions) to a unit vector; its cosine with prototypes.

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
        """Images B x C x H x W -> last map B x D x h x w, keys B x 256 of unit length."""
        last_map, pooled = run_backbone(self.backbone, images)
        return last_map, F.normalize(self.projector(pooled).float(), dim=-1)


class OnlineEncoder(Encoder):
    """An encoder with a mask token, and a decoder from the last map to pixels.

    Args:
        backbone: as in Encoder, like D, local_dim and use_bn.
        mask_stage: the token is added before it.
        token_dim: width of the map there.
        in_chans: C.
    """

    def __init__(self, backbone: nn.Module, D: int, local_dim: int, use_bn: bool, mask_stage: int,
                 token_dim: int, in_chans: int):
        super().__init__(backbone, D, local_dim, use_bn)
        self.mask_stage, self.mask_token = mask_stage, nn.Parameter(torch.zeros(token_dim))
        self.decoder = nn.Sequential(nn.Conv2d(D, in_chans * STRIDE**2, 1), nn.PixelShuffle(STRIDE))

    def forward(self, images: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Masked images -> all that the losses need, in one call: DistributedDataParallel sees no other.

        Args:
            images: B x C x H x W, masked.
            blocks: B x s x s, 1 = masked.
            positions: B x n of the last map's h * w, for the local head.

        Returns:
            prediction B x C x H x W; queries B x 256 of unit length; local outputs B x n x local_dim; pooled
            features B x D.
        """
        last_map, pooled = run_backbone(self.backbone, images, self.mask_stage, blocks, self.mask_token)
        q = F.normalize(self.projector(pooled).float(), dim=-1)
        local = self.local_head(take_positions(last_map, positions))
        return self.decoder(last_map), q, local.view(*positions.shape, -1), pooled


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
        prediction: B x C x H x W.
        image: B x C x H x W, normalised.
        mask: B x 1 x H x W, 1 = masked.
    """
    d = (prediction - image).abs()
    return (d * (2 * torch.sigmoid(0.2 * d) - 1) * mask).sum() / (mask.sum() + 1e-5) / d.shape[1]


def focal_frequency(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Squared distance between the mean spectra of a batch, weighted so that large errors count more.

    A spectrum covers the whole image, so visible pixels cannot be left out. They enter as the mean of
    prediction and image, with a thousandth of the gradient, so that the loss acts on the masked blocks; not
    with 0, since no other loss holds the visible pixels to the image. Arguments as in focal_l1.
    """
    w = torch.where(mask > 0, 1.0, 0.001)  # share of the prediction that has a gradient
    blended = w * prediction + (1 - w) * 0.5 * (prediction.detach() + image)
    # The spectrum of the mean is the mean of the spectra.
    difference = torch.fft.fft2(blended.mean(0) - image.mean(0), norm="ortho")  # C x H x W
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
               teacher_temp: float) -> Tensor:
    """Cross-entropy between branch and online encoder at matched positions, mean over all, in float32.

    Args:
        output: B x n x local_dim of the online encoder.
        target: B x n x local_dim of the branch encoder, without gradient.
        center: local_dim, c.
        student_temp: tau_o.
        teacher_temp: tau_b.
    """
    p_target = ((target.float() - center) / teacher_temp).softmax(-1)
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


@torch.no_grad()
def batch_top1(q: Tensor, k: Tensor) -> Tensor:
    """% of queries B x 256 to which, of the batch's keys B x 256, their image's is the nearest."""
    return 100 * ((q @ k.T).argmax(1) == torch.arange(len(q), device=q.device)).float().mean()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def probe_backbone(backbone: nn.Module, args: argparse.Namespace) -> tuple[int, int]:
    """Channels of the last map and at the mask stage; fails for a backbone that cannot be taken apart."""
    refusal = f"--arch {args.arch}: must be a ResNet, a Swin or a ConvNeXt whose last map has stride {STRIDE}"
    parts = stem_and_stages(backbone)
    if parts is None:
        common.fail(refusal)
    images = torch.rand(1, args.in_chans, args.img_size, args.img_size)
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


def build_encoders(args: argparse.Namespace, process: Process) -> tuple[OnlineEncoder, Encoder]:
    """Online and branch encoder; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(args.arch, args.img_size, in_chans=args.in_chans)
    D, token_dim = probe_backbone(backbone, args)
    use_bn = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())
    branch = Encoder(copy.deepcopy(backbone), D, args.local_dim, use_bn).requires_grad_(False)
    online = OnlineEncoder(backbone, D, args.local_dim, use_bn, args.mask_stage, token_dim, args.in_chans)
    online, branch = (common.sync_batchnorm(encoder, process) for encoder in (online, branch))
    return online, branch


def schedules(step: int, run: common.Run, args: argparse.Namespace) -> tuple[float, float, float]:
    """Learning rate, momentum of the branch encoder and its temperature at a step."""
    # Cosine over all steps; during the first W also a linear ramp from 1 % to 100 %.
    lr = common.cosine_schedule(args.lr * run.effective_batch / 64, args.min_lr, step, run.total_steps)
    W = round(args.warmup_epochs * run.steps_per_epoch)
    if step < W:
        lr *= 1 - (1 - step / W) * (1 - 0.01)
    momentum = common.cosine_schedule(args.momentum, 1.0, step, run.total_steps)
    epoch, warmup, temp = step // run.steps_per_epoch, args.warmup_teacher_temp_epochs, args.teacher_temp
    if epoch < warmup:  # evenly spaced, epoch by epoch, from the first value to the last
        temp = args.warmup_teacher_temp + (temp - args.warmup_teacher_temp) * epoch / max(1, warmup - 1)
    return lr, momentum, temp


def draw_reconstruction(run: common.Run, images: Tensor, masked: Tensor, prediction: Tensor, mask: Tensor,
                        dtype: torch.dtype) -> None:
    """Writes reconstruction.png: up to 8 images, as the encoder saw them, with the masked blocks painted."""
    painted = torch.where(mask > 0, prediction.detach().float(), images)
    run.draw("reconstruction.png", list(zip(images[:8], masked[:8], painted[:8], strict=True)), dtype)


def check_queue(args: argparse.Namespace, run: common.Run) -> None:
    """Fails where the queue cannot hold a step's keys; warns where it is longer than sensible."""
    if args.moco_k < 2 * run.effective_batch:
        common.fail(f"--moco_k {args.moco_k}: must be at least twice the effective batch, "
                    f"{2 * run.effective_batch}: two keys per image")
    if args.moco_k > run.samples and run.process.is_main:
        print(f"warning: --moco_k {args.moco_k}: more keys than the {run.samples} images; the queue often "
              "holds older keys of the query's own image, as negatives", file=sys.stderr)


def train(args: argparse.Namespace, process: Process) -> None:
    """Trains the online encoder; writes checkpoints, backbone, log and pictures to --output_dir."""
    # Data
    samples = common.load_samples(args, process, MILLIONAID_MEAN, MILLIONAID_STD)
    run = common.Run(args, process, samples=len(samples), images=len(samples.paths))
    check_queue(args, run)

    # Networks, new or resumed. --init fills the online encoder alone, so the branch encoder is copied from
    # it, part by part: it has no mask token and no decoder.
    online, branch = build_encoders(args, process)
    memory = Memory(args.moco_k, args.local_dim).to(process.device)
    init = common.init_backbone(online.backbone, args, run.saved)
    for name, part in branch.named_children():
        part.load_state_dict(online.get_submodule(name).state_dict())
    for encoder in (online, branch):
        common.to_device(encoder, process.device)
    optimizer, scaler = common.build_optimizer(online, args), run.scaler
    run.restore(online.backbone, online=online, branch=branch, memory=memory, optimizer=optimizer)
    if args.compile:
        online.compile()
        branch.compile()
    ddp_online = common.distributed(online, process)

    loader = run.loader(PairDataset(samples, args.img_size, args.seed))
    map_side, s = args.img_size // STRIDE, args.img_size // args.mask_patch_size
    num_matches = args.num_matches or max(1, round(20 / 49 * map_side**2))
    advice = "Try a lower --lr, more --warmup_epochs, or a larger --momentum"
    header = {"scaled_lr": args.lr * run.effective_batch / 64, "num_matches": num_matches,
              "chance_global": math.log(args.moco_k + 1), "chance_local": math.log(args.local_dim)}
    floors = {"feature_std": 0.05}  # a collapsed network stays below
    for step in run.steps(loader, init, floors, advice, **header):
        lr, momentum, teacher_temp = schedules(step, run, args)
        common.set_lr(optimizer, lr)
        keys, means, terms = [], [], []

        for micro in range(args.accum_steps):
            # Two views of each image: of 2B rows, view 1 is the first half, view 2 the second.
            crops, geometry = run.fetch()  # B x 2 x C x H x W, B x 2 x 5
            B, seed = len(crops), common.stream_seed(args.seed, "colour", step, micro, process.rank)
            images = torch.cat(color_views(crops, args, seed))  # 2B x C x H x W
            if step == micro == 0:
                pairs = list(zip(*(view[:8] for view in images.chunk(2)), strict=True))
                run.draw("views.png", pairs, crops.dtype)

            # Put a view's mean colour where it is masked; match its positions with those of the other.
            blocks = draw_masks(2 * B, s, args.mask_ratio, common.generator(seed, "mask")).to(process.device)
            mask = enlarge(blocks, args.img_size)  # 2B x 1 x H x W
            masked = torch.where(mask > 0, images.mean((2, 3), keepdim=True), images)
            place_1, place_2 = geometry.unbind(1)  # B x 5 each
            positions_1, matches_12, distances_12 = match_positions(place_1, place_2, map_side, num_matches)
            positions_2, matches_21, distances_21 = match_positions(place_2, place_1, map_side, num_matches)
            positions = torch.cat([positions_1, positions_2])  # 2B x n

            # The branch encoder sees the views whole: keys; and, where the other view matches, its targets.
            with torch.no_grad(), run.autocast:  # BatchNorm, here too, takes the batch's statistics
                branch_map, k = branch(images)  # 2B x D x h x w, 2B x 256
                map_1, map_2 = branch_map.chunk(2)
                matched = torch.cat([take_positions(map_2, matches_12), take_positions(map_1, matches_21)])
                targets = branch.local_head(matched).view(2, B, num_matches, -1)  # for view 1, for view 2

            with common.accumulating(ddp_online, micro, args.accum_steps):
                # The online encoder sees them masked.
                with run.autocast:
                    prediction, q, outputs, pooled = ddp_online(masked, blocks, positions)
                # Reconstruction, view by view: the frequency loss compares mean spectra.
                parts = zip(prediction.chunk(2), images.chunk(2), mask.chunk(2), strict=True)
                l_reconstruction = sum(reconstruction_loss(*part) for part in parts) / 2
                # Global contrast: the queries of one view, the keys of the other.
                (q_1, q_2), (k_1, k_2) = q.chunk(2), k.chunk(2)
                l_global = (global_loss(q_1, k_2, memory.queue, args.moco_t)
                            + global_loss(q_2, k_1, memory.queue, args.moco_t)) / 2
                # Local distillation: the authors move the centre after each direction, so the second sees it
                # as the first has moved it. What stays moves below, once a step.
                mean = process_mean(targets.float().mean((1, 2)), process)  # 2 x local_dim
                center_1 = memory.center
                center_2 = center_1.lerp(mean[0], 0.1)
                (output_1, output_2), temps = outputs.chunk(2), (args.student_temp, teacher_temp)
                l_local = (local_loss(output_1, targets[0], center_1, *temps)
                           + local_loss(output_2, targets[1], center_2, *temps)) / 2
                losses = {"reconstruction": l_reconstruction, "global": l_global, "local": l_local}
                loss = sum(weight * x for weight, x in zip(args.loss_weights, losses.values(), strict=True))
                scaler.scale(loss / args.accum_steps).backward()
            keys.append(gather(torch.stack([k_1, k_2], 1), process))  # B x 2 x 256, image by image
            means.append(mean)
            terms.append({"loss": loss.detach(), **{name: x.detach() for name, x in losses.items()},
                          "batch_top1": (batch_top1(q_1, k_2) + batch_top1(q_2, k_1)) / 2,
                          "match_distance": torch.cat([distances_12, distances_21]).mean(),
                          "feature_std": common.feature_std(pooled)})

        # Online encoder by gradient; branch encoder by its moving average; then centre and queue.
        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        for name, part in branch.named_children():
            common.update_ema(online.get_submodule(name), part, momentum)
        mean_1, mean_2 = torch.stack(means).mean(0)  # over micro-batches
        memory.center = memory.center.lerp(mean_1, 0.1).lerp(mean_2, 0.1)
        memory.enqueue(torch.cat(keys).flatten(0, 1))
        if run.is_due(step):
            draw_reconstruction(run, images[:B], masked[:B], prediction[:B], mask[:B], crops.dtype)
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr, momentum=momentum,
                     teacher_temp=teacher_temp)


def main() -> None:
    """Parses and checks the flags, joins the processes, trains."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    train(args, process)
    process.leave()


if __name__ == "__main__":
    main()

"""MHCL: contrast at four scales of the backbone, with hard positives and negatives made in feature space.

Z. Li et al., "Contrastive learning based on multiscale hard features for remote-sensing image scene
classification", IEEE TGRS 2023. Builds on MoCo v2 (K. He et al., CVPR 2020; X. Chen et al.,
arXiv 2003.04297), which is `--no-mhcl` here.

    # a short run on a CPU; `make demo` draws the images
    python mhcl.py --data_path demo/data/train --output_dir OUT --arch resnet18 --img_size 64 \
        --moco_k 512 --batch_size_per_gpu 32 --lr .12 --epochs 5
    # one GPU: ResNet-50 on any folder of images, labelled or not
    python mhcl.py --data_path IMAGES --output_dir OUT --moco_k 16384
    # several GPUs; plain MoCo v2, the baseline
    python -m torch.distributed.run --nproc_per_node 4 mhcl.py --data_path IMAGES --output_dir OUT --no-mhcl \
        --batch_size_per_gpu 64

Two views of each image: the query encoder sees one, the key encoder (its moving average) the other. A query
has to find its own key among a queue of earlier keys. MHCL does so at each of the four stages, and once more
with hard positives (the pair, pushed apart) and hard negatives (blends of two keys of the queue). The loss is
the weighted sum of these eight cross-entropies. Read `extrapolate`, `interpolate`, `MHCLLoss` and `train`
first.

    symbol       variable         flag (default)            what
    B            B                batch_size_per_gpu (128)  images per process and micro-batch
    S            S                mhcl                      scales: 4; with --no-mhcl 1
    R            -                -                         rows of the loss: S, and S hard ones; 8 (MoCo: 1)
    C            moco_dim         moco_dim (128)            width of queries and keys
    K            K                moco_k (65536)            length of the queue
    q, k         q, k             -                         queries and keys, unit vectors
    q^, k^       hard_q, hard_k   -                         hard positives: extrapolated pairs
    lambda       lam              a (1), b (.1)             how far pairs are pushed apart; Beta(a, b)
    mu           mu               a (1), b (.1)             share of a negative in its blend; Beta(a, b)
    pi           permutation      -                         which negative blends with which
    tau          moco_t           moco_t (.2)               temperature of the softmax
    m            moco_m           moco_m (.99)              momentum of the key encoder

Differs from the authors' code:
- `--no-mhcl` runs, on one process too, on CPUs too;
- lambda, mu and pi are the same in all processes, drawn by torch from the seed and the step;
- the learning rate is set step by step, not by epoch, and scaled to the batch (.03 at 256: .015 at 128);
- the queue need not be a multiple of the batch; no weight decay on biases and norm weights;
- workers crop, resize and flip with antialiasing, 8-bit images in uint8; colour follows on the device;
- stage 4 gives the backbone's own pooled features: of Swin and ConvNeXt those after the last norm;
- one process puts groups of its batch in place of MoCo's GPUs (`Encoder.forward`, `Shuffle`);
- the queue is saved; order, crops and draws follow from seed and step: a resumed run repeats the unbroken
  one.

In OUT: checkpoint.pth, backbone/ (the query encoder's, for timm), log.jsonl, views.png.
"""

import argparse
import copy
import math
import sys
from collections.abc import Sequence

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
    """All flags; the defaults are the authors', of their README."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=positive(int), default=224, help="side of both views")
    common.add_pixel_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", help="a timm model that gives four stages, such as resnet18, "
        "wide_resnet50_2, resnext50_32x4d, swin_tiny_patch4_window7_224, convnext_tiny; with --no-mhcl any")
    add("--init", help="start the backbone from an output folder, a checkpoint, a state dict, or timm's "
        "pretrained weights by name")
    add("--checkpoint_key", help="network of a checkpoint that --init takes; default: the one that its run "
        "exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves tensors at their "
        "initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mhcl", action=yes_no, default=True, help="four scales and hard features; without: MoCo v2")
    add("--mlp", action=yes_no, default=True, help="two layers behind the last stage; without: one (MoCo v1)")
    add("--aug_plus", action=yes_no, default=True, help="MoCo v2's augmentation, with blur; without: v1's")
    add("--moco_dim", type=positive(int), default=128, help="C, width of queries and keys; seldom changed")
    add("--moco_k", type=positive(int), default=65536, help="K. We recommend at most half the number of "
        "images: with a queue of half an epoch, one query in eight meets an older key of its own image as a "
        "negative; with one of a whole epoch, one in two. In runs of minutes some 8 batches: the encoder "
        "moves fast, and older keys are told by their age")
    add("--moco_m", type=unit(float), default=0.99, help="momentum of the key encoder; we recommend .999 for "
        "long runs of MoCo")
    add("--moco_t", type=positive(float), default=0.2, help="tau; .07 for MoCo v1; the lower, the more the "
        "nearest negatives count")
    add("--a", type=positive(float), default=1.0, help="lambda and mu are drawn from Beta(a, b), of mean "
        "a / (a + b). The authors took 20 (and b .1) for UC Merced, 10 for NWPU-RESISC45")
    add("--b", type=positive(float), default=0.1, help="the higher, the smaller lambda and mu: pairs are "
        "pushed apart less, and a negative's partner weighs more")
    add("--bn_groups", type=positive(int), help="parts of a batch that BatchNorm sees one by one; default: "
        "parts of about 32 images, at least 2, where there is one process, else 1")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=800, help="length of all schedules; small data needs more")
    add("--batch_size_per_gpu", type=positive(int), default=128, help="images per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="we recommend adamw for Swin, ConvNeXt")
    add("--lr", type=positive(float), default=0.03, help="at an effective batch of 256, scaled linearly; we "
        "recommend 5e-4 with adamw")
    add("--cos", action=yes_no, default=True, help="cosine of the rate to 0; without: see --schedule")
    add("--schedule", type=positive(int), nargs="*", help="epochs at which --no-cos takes a tenth of the "
        "rate; default: 120 160")
    add("--warmup_epochs", type=not_negative(float), default=0.0, help="of the learning rate; we recommend "
        "10 with adamw")
    add("--weight_decay", type=not_negative(float), default=1e-4, help="not on biases and norms; we "
        "recommend .05 with adamw")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags."""
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs}")
    if args.schedule is not None:
        given = " ".join(map(str, args.schedule))
        if args.cos:
            common.fail(f"--schedule {given}: only with --no-cos")
        if not all(epoch < args.epochs for epoch in args.schedule):
            common.fail(f"--schedule {given}: must be less than --epochs {args.epochs}")
    args.schedule = [120, 160] if args.schedule is None else args.schedule


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


class PairDataset(torch.utils.data.Dataset):
    """Geometry of two views of an image, drawn from (seed, epoch, index) alone.

    Args:
        samples: the images.
        img_size: side of the views.
        seed: of the run.
    """

    def __init__(self, samples: Samples, img_size: int, seed: int):
        self.samples, self.img_size, self.seed = samples, img_size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        """Returns the query's and the key's view, bands x img_size x img_size of the files' dtype."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = self.samples[index]
        return [self._crop(image), self._crop(image)]

    def _crop(self, image: Tensor) -> Tensor:
        box = RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, [self.img_size] * 2, InterpolationMode.BILINEAR)
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop


def color_views(crops: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Colour, blur and normalise on the crops' device; every sample has its own draws.

    Args:
        crops: N x bands x H x W, as PairDataset gives them.
        args: aug_plus chooses MoCo v2's changes (jitter, grey, blur) or v1's (grey, jitter); mean, std.
        generator: on the CPU.
    """
    x, N = common.to_float(crops, args.mean, args.std), len(crops)
    gray = common.bernoulli(torch.full((N,), 0.2), generator)
    if args.aug_plus:
        jitter = common.draw_color_jitter((0.4, 0.4, 0.4, 0.1), torch.full((N,), 0.8), generator)
        blur = common.bernoulli(torch.full((N,), 0.5), generator)
        sigma = torch.empty(N).uniform_(0.1, 2.0, generator=generator)
        x = common.grayscale(common.color_jitter(x, *jitter), gray)
        x = common.gaussian_blur(x, blur, sigma)
    else:
        jitter = common.draw_color_jitter((0.4, 0.4, 0.4, 0.4), torch.ones(N), generator)
        x = common.color_jitter(common.grayscale(x, gray), *jitter)
    return common.normalize(x, args.mean, args.std, crops.dtype)


def draw_views(run: common.Run, crops_q: Tensor, crops_k: Tensor) -> None:
    """Writes views.png: a row for each of up to 8 images, its two views, with colours of their own draws."""
    generator = torch.Generator().manual_seed(run.args.seed)
    views = [color_views(crops[:8], run.args, generator) for crops in (crops_q, crops_k)]
    run.draw("views.png", list(zip(*views, strict=True)), crops_q.dtype)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def pooled_stages(backbone: nn.Module, images: Tensor, S: int) -> list[Tensor]:
    """Images B x bands x H x W -> S tensors B x width; the last are the backbone's own pooled features."""
    if S == 1:
        return [backbone(images)]
    last, maps = backbone.forward_intermediates(images, indices=S)  # maps: B x width x h x w
    return [*(x.mean((2, 3)) for x in maps[:-1]), backbone.forward_head(last)]


class Encoder(nn.Module):
    """Backbone and a projector for each scale: the query encoder, or the key encoder.

    Args:
        backbone: timm model; with more than one scale it has `forward_intermediates`.
        channels: of the scales, from the first stage to the last.
        moco_dim: C.
        mlp: two layers for the last scale, as the others always have.
    """

    def __init__(self, backbone: nn.Module, channels: Sequence[int], moco_dim: int, mlp: bool):
        super().__init__()
        self.backbone, self.projectors = backbone, nn.ModuleList()
        for scale, width in enumerate(channels):
            hidden = [nn.Linear(width, width), nn.ReLU()] if mlp or scale < len(channels) - 1 else []
            self.projectors.append(nn.Sequential(*hidden, nn.Linear(width, moco_dim)))

    def forward(self, images: Tensor, bn_groups: int = 1) -> tuple[Tensor, Tensor]:
        """B x bands x H x W -> unit vectors B x S x C in float32, pooled features of the last scale B x D.

        The batch goes through the backbone in `bn_groups` parts, each with its own BatchNorm statistics, as
        if each were on a GPU of its own: see Shuffle. (Swin and ConvNeXt have no BatchNorm.)
        """
        parts = [pooled_stages(self.backbone, part, len(self.projectors)) for part in images.chunk(bn_groups)]
        embeddings = []
        for scale, projector in enumerate(self.projectors):
            features = torch.cat([part[scale] for part in parts])  # B x width
            embeddings.append(projector(features))
        return F.normalize(torch.stack(embeddings, 1).float(), dim=-1), features


def gather(x: Tensor, process: Process) -> Tensor:
    """Rows of all processes, in the order of their ranks; without gradient."""
    if process.world_size == 1:
        return x
    everywhere = [torch.empty_like(x) for _ in range(process.world_size)]
    dist.all_gather(everywhere, x.contiguous())
    return torch.cat(everywhere)


class Shuffle:
    """MoCo's Shuffle-BN: permutes the rows of all processes, and restores their order.

    BatchNorm statistics leak which images share a batch, so a query could find its key by them. With shuffled
    keys, a query and its key are normalised with the statistics of different batches.

    Args:
        B: rows of each process.
        seed: of the order, the same in all processes.
        process: its rank, and how many there are.
    """

    def __init__(self, B: int, seed: int, process: Process):
        self.process, generator = process, torch.Generator().manual_seed(seed)
        order = torch.randperm(B * process.world_size, generator=generator)
        # Rows of all processes' batch that this process encodes; where its own rows went.
        self.idx_shuffle = order.chunk(process.world_size)[process.rank].to(process.device)
        self.idx_unshuffle = order.argsort().chunk(process.world_size)[process.rank].to(process.device)

    def __call__(self, x: Tensor) -> Tensor:
        """This process's rows B x ... -> the B rows, of all processes, that it encodes."""
        return gather(x, self.process)[self.idx_shuffle]

    def unshuffle(self, x: Tensor) -> Tensor:
        """Results for the rows it encoded -> those for its own rows, in their order."""
        return gather(x, self.process)[self.idx_unshuffle]


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------

# Weights of the cross-entropies, from the first stage to the last; the authors' values.
WEIGHTS = (0.1, 0.4, 0.7, 1.0)
HARD_WEIGHTS = (0.01, 0.04, 0.07, 0.1)


def draw_hard(args: argparse.Namespace, step: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a step's hard features are made with; drawn on the CPU from seed and step, alike in all processes.

    Returns:
        lambda (S,) and mu (S,), from Beta(a, b); pi (K,), a permutation of the queue for all scales.
    """
    torch.manual_seed(common.stream_seed(args.seed, "hard", step))  # Beta draws from torch's own generator
    lam, mu = torch.distributions.Beta(args.a, args.b).sample((2, S))
    return lam, mu, torch.randperm(args.moco_k)


def extrapolate(q: Tensor, k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Hard positives: each pair pushed apart on its own line, and not normalised again.

    <q^, k^> = (1 + 2 lambda + 2 lambda^2) <q, k> - 2 lambda (1 + lambda): below <q, k> unless q = k.

    Args:
        q: B x S x C queries, unit vectors; their gradient flows through both results.
        k: B x S x C keys, unit vectors without gradient.
        lam: S strengths, lambda.

    Returns:
        q^ = (1 + lambda) q - lambda k and k^ = (1 + lambda) k - lambda q, B x S x C.
    """
    lam = lam.view(-1, 1)
    return (1 + lam) * q - lam * k, (1 + lam) * k - lam * q


def interpolate(l_neg: Tensor, mu: Tensor, permutation: Tensor) -> Tensor:
    """Hard negatives: logits against the blends mu n + (1 - mu) n_pi, from the logits against n.

    Logits are linear in n, so this is exactly the same, and needs no blended queue.

    Args:
        l_neg: S x B x K logits.
        mu: S.
        permutation: K, pi.
    """
    permuted = l_neg.gather(-1, permutation.expand_as(l_neg))  # has a faster gradient than l_neg[..., pi]
    return permuted.lerp_(l_neg, mu.view(-1, 1, 1))  # mu l_neg + (1 - mu) permuted, in place: they are large


def info_nce(l_pos: Tensor, l_neg: Tensor) -> Tensor:
    """Cross-entropy of [l_pos, l_neg] with label 0, S x B; joining S x B and S x B x K would copy all."""
    return torch.logaddexp(l_pos, l_neg.logsumexp(-1)) - l_pos


class MHCLLoss(nn.Module):
    """InfoNCE of each row against its own queue. Rows are the scales, and then their hard features.

    The queues R x C x K (268 MB with the defaults) hold the earlier keys, k of the scales and k^ of the hard
    rows. They are never copied: of each step there are only the logits, R x B x K.

    Args:
        weights: R, of the rows: (1,) is MoCo.
        moco_dim: C.
        moco_k: K.
        moco_t: tau.
    """

    def __init__(self, weights: Sequence[float], moco_dim: int, moco_k: int, moco_t: float):
        super().__init__()
        self.moco_t = moco_t
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.register_buffer("queue", F.normalize(torch.randn(len(weights), moco_dim, moco_k), dim=1))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))

    def logits(self, q: Tensor, k: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys B x S x C, queue S x C x K -> l_pos S x B, l_neg S x B x K, over tau."""
        q = q / self.moco_t
        return torch.einsum("bsc,bsc->sb", q, k), torch.einsum("bsc,sck->sbk", q, queue)

    def forward(self, q: Tensor, k: Tensor,
                draws: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Sum over rows of weight times cross-entropy, mean over the batch.

        Args:
            q: B x S x C queries, unit vectors in float32.
            k: B x S x C keys of the same images, without gradient.
            draws: lambda, mu and pi of draw_hard; None: no hard features, R is S.

        Returns:
            the loss; keys for the queue, B x R x C; cross-entropy R, l_pos S x B and l_neg S x B x K of the
            scales, for `log_figures`.
        """
        S = q.shape[1]
        # Each query against its own key and the queue of its scale.
        l_pos, l_neg = self.logits(q, k, self.queue[:S])
        cross_entropy, keys = info_nce(l_pos, l_neg), k  # S x B
        if draws is not None:
            lam, mu, permutation = draws
            # The same once more with the pair pushed apart, against blends of the queue's keys.
            hard_q, hard_k = extrapolate(q, k, lam)
            hard_pos, hard_neg = self.logits(hard_q, hard_k, self.queue[S:])
            hard_neg = interpolate(hard_neg, mu, permutation)
            cross_entropy = torch.cat([cross_entropy, info_nce(hard_pos, hard_neg)])  # R x B
            keys = torch.cat([k, hard_k.detach()], 1)
        cross_entropy = cross_entropy.mean(1)
        return self.weights @ cross_entropy, keys, (cross_entropy.detach(), l_pos.detach(), l_neg.detach())

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts keys N x R x C of all processes in the place of the oldest N."""
        N, K = len(keys), self.queue.shape[-1]
        columns = (self.queue_ptr + torch.arange(N, device=keys.device)) % K
        self.queue[:, :, columns] = keys.permute(1, 2, 0)
        self.queue_ptr.add_(N).remainder_(K)


@torch.no_grad()
def log_figures(q: Tensor, k: Tensor, features: Tensor, parts: tuple[Tensor, ...],
                moco_t: float) -> dict[str, Tensor]:
    """Log figures of a micro-batch by scale, cross-entropy by row (chance: ln(K + 1)); without gradient.

    top1: % whose own key is nearer than the queue's; batch_top1: than the batch's, which does not depend on
    K. positive, negative: mean cosine to the own key and to the queue's.
    """
    cross_entropy, l_pos, l_neg = parts
    nearest = torch.einsum("bsc,nsc->sbn", q, k).argmax(-1)  # S x B
    own = torch.arange(len(q), device=q.device)
    return {"top1": 100 * (l_pos > l_neg.amax(-1)).float().mean(1),
            "batch_top1": 100 * (nearest == own).float().mean(1),
            "positive": moco_t * l_pos.mean(1),
            "negative": moco_t * l_neg.mean((1, 2)),
            "cross_entropy": cross_entropy,
            "feature_std": common.feature_std(features)}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def stage_widths(backbone: nn.Module, args: argparse.Namespace, S: int) -> list[int]:
    """Channels of the last S stages, found by running the backbone; fails where it does not have them."""
    reductions = [stage["reduction"] for stage in getattr(backbone, "feature_info", ())][-S:]
    if S > 1 and (len(set(reductions)) < S or not hasattr(backbone, "forward_intermediates")):
        common.fail(f"--arch {args.arch}: timm offers no four feature stages of it, as it does of ResNet, "
                    "ResNeXt, WRN, Swin and ConvNeXt; --no-mhcl takes any model")
    backbone.eval()
    try:
        with torch.no_grad():
            images = torch.zeros(1, args.in_chans, args.img_size, args.img_size)
            widths = [x.shape[1] for x in pooled_stages(backbone, images, S)]
    except Exception as error:
        common.fail(f"--arch {args.arch}: gives no features of {S} stages for {args.img_size} px: {error}")
    backbone.train()
    return widths


def build_encoders(args: argparse.Namespace) -> tuple[Encoder, Encoder]:
    """Query and key encoder; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(args.arch, args.img_size, in_chans=args.in_chans)
    multiple = common.patch_multiple(backbone)
    if args.img_size % multiple:
        common.fail(f"--img_size {args.img_size}: must be a multiple of the patch, {multiple}")
    channels = stage_widths(backbone, args, S=4 if args.mhcl else 1)
    encoder_q = Encoder(backbone, channels, args.moco_dim, args.mlp)
    return encoder_q, copy.deepcopy(encoder_q).requires_grad_(False)


def batchnorm_groups(encoder: nn.Module, args: argparse.Namespace, process: Process) -> int:
    """Parts of a process's batch that BatchNorm sees one by one."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
        return 1
    B, groups = args.batch_size_per_gpu, args.bn_groups or 1
    if process.world_size == 1 and not args.bn_groups:
        # As many equal parts as have 32 images or more each, as MoCo's GPUs had; else two.
        groups = next((n for n in range(max(2, B // 32), 1, -1) if B % n == 0), 2)
    if B % groups or B < 2 * groups:
        common.fail(f"--batch_size_per_gpu {B}: must be cut into {groups} equal parts of 2 images or more "
                    "for BatchNorm (--bn_groups)")
    return groups


def learning_rate(step: int, run: common.Run, args: argparse.Namespace) -> float:
    """Cosine to 0, or constant and a tenth after each epoch of --schedule; after a linear warm-up."""
    lr = args.lr * run.effective_batch / 256
    warmup_steps = round(args.warmup_epochs * run.steps_per_epoch)
    if args.cos:
        return common.cosine_schedule(lr, 0.0, step, run.total_steps, warmup_steps)
    drops = sum(step >= epoch * run.steps_per_epoch for epoch in args.schedule)
    return common.cosine_schedule(lr, lr, step, run.total_steps, warmup_steps) * 0.1**drops


def check_queue(args: argparse.Namespace, run: common.Run) -> None:
    """Fails where the queue cannot hold a step's keys; warns where it is longer than sensible."""
    if args.moco_k < run.effective_batch:
        common.fail(f"--moco_k {args.moco_k}: must be at least the effective batch, {run.effective_batch}")
    if args.moco_k > run.samples / 2 and run.process.is_main:
        print(f"warning: --moco_k {args.moco_k}: more than half of the {run.samples} images; the queue often "
              "holds an older key of the query's own image, as a negative", file=sys.stderr)


def train(args: argparse.Namespace, process: Process) -> None:
    """Trains the query encoder; writes checkpoints, backbone, log and pictures to --output_dir."""
    # Data
    samples = common.load_samples(args, process, common.IMAGENET_MEAN, common.IMAGENET_STD)
    run = common.Run(args, process, samples=len(samples), images=len(samples.paths),
                     free_flags=common.FREE_FLAGS | {"bn_groups"})
    check_queue(args, run)

    # Networks, new or resumed. --init fills the query encoder alone, so the key encoder is copied from it.
    encoder_q, encoder_k = build_encoders(args)
    bn_groups = batchnorm_groups(encoder_q, args, process)
    weights = (*WEIGHTS, *HARD_WEIGHTS) if args.mhcl else (1.0,)
    mhcl_loss = MHCLLoss(weights, args.moco_dim, args.moco_k, args.moco_t).to(process.device)
    init = common.init_backbone(encoder_q.backbone, args, run.saved)
    encoder_k.load_state_dict(encoder_q.state_dict())
    for encoder in (encoder_q, encoder_k):
        common.to_device(encoder, process.device)
    optimizer, scaler = common.build_optimizer(encoder_q, args), run.scaler
    run.restore(encoder_q.backbone, encoder_q=encoder_q, encoder_k=encoder_k, mhcl_loss=mhcl_loss,
                optimizer=optimizer)
    if args.compile:
        encoder_q.compile()
        encoder_k.compile()
    ddp_q = common.distributed(encoder_q, process)

    loader = run.loader(PairDataset(samples, args.img_size, args.seed))
    advice = "Try a lower --lr, more --warmup_epochs, or a larger --moco_m"
    header = {"bn_groups": bn_groups, "scaled_lr": args.lr * run.effective_batch / 256,
              "queue_epochs": args.moco_k / len(samples), "chance_cross_entropy": math.log(args.moco_k + 1)}
    floors = {"feature_std": 0.05}  # a collapsed network stays below
    for step in run.steps(loader, init, floors, advice, **header):
        lr = learning_rate(step, run, args)
        common.set_lr(optimizer, lr)
        colour = common.generator(args.seed, "colour", step, process.rank)
        draws = None
        if args.mhcl:
            draws = [x.to(process.device) for x in draw_hard(args, step, S=4)]  # lambda, mu, pi
        keys, terms = [], []

        for micro in range(args.accum_steps):
            crops_q, crops_k = run.fetch()  # B x bands x H x W each
            if step == micro == 0:
                draw_views(run, crops_q, crops_k)
            # Shuffle-BN: the keys of this process's images are computed elsewhere, in another batch.
            shuffle = Shuffle(len(crops_k), common.stream_seed(args.seed, "shuffle", step, micro), process)
            views_q = color_views(crops_q, args, colour)
            views_k = color_views(shuffle(crops_k), args, colour)
            with torch.no_grad(), run.autocast:
                k = shuffle.unshuffle(encoder_k(views_k, bn_groups)[0])  # B x S x C
            with common.accumulating(ddp_q, micro, args.accum_steps):
                with run.autocast:
                    q, features = ddp_q(views_q, bn_groups)  # B x S x C, B x D
                loss, new_keys, parts = mhcl_loss(q, k, draws)
                scaler.scale(loss / args.accum_steps).backward()
            keys.append(gather(new_keys, process))
            terms.append({"loss": loss.detach(), **log_figures(q, k, features, parts, args.moco_t)})

        # Query encoder by gradient, key encoder by moving average, then the queue. (MoCo updates the key
        # encoder at the start of the next step, with the same result.)
        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        common.update_ema(encoder_q, encoder_k, args.moco_m)
        mhcl_loss.enqueue(torch.cat(keys))
        run.end_step(step, {**common.mean_terms(terms), "grad_norm": grad_norm}, lr=lr)


def main() -> None:
    """Parses and checks the flags, joins the processes, trains."""
    args = get_parser().parse_args()
    check_args(args)
    process = common.init_process(args.device)
    train(args, process)
    process.leave()


if __name__ == "__main__":
    main()

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
has to find its own key among a queue of earlier keys. MHCL asks this after each of the four stages, and asks
it again with pairs that are pushed apart and with negatives that are blends of two.

    symbol       variable         flag (default)            what
    B            B                batch_size_per_gpu (128)  images per process and micro-batch
    S            S                mhcl                      scales: 4; with --no-mhcl 1
    R            -                -                         rows of the loss: scales, hard features: 8; or 1
    C            moco_dim         moco_dim (128)            width of queries and keys
    K            K                moco_k (65536)            length of the queue
    q, k         q, k             -                         queries and keys, unit vectors
    q^, k^       hard_q, hard_k   -                         hard positives: extrapolated pairs
    lambda       lam              a (1), b (.1)             how far pairs are pushed apart; Beta(a, b)
    mu           mu               a (1), b (.1)             share of a negative in its blend; Beta(a, b)
    pi           permutation      -                         which negative blends with which
    tau          moco_t           moco_t (.2)               temperature of the softmax
    m            moco_m           moco_m (.99)              momentum of the key encoder

lambda and mu are drawn once per step and scale, pi once per step. Scales and their hard features have queues
of their own, R x C x K floats, 268 MB with the defaults (8 x 128 x 65,536), which are never copied: logits
are linear in the negatives, so it is the S x B x K logits that are blended. Choose K by the data. With a
queue of half an epoch, one query in eight meets an older key of its own image as a negative; with one of a
whole epoch, one in two. So make K at most half the number of images (2,100 images: 1024).

BatchNorm's statistics tell which images a batch holds, and a query could find its key by them. So, as in
MoCo, keys are normalised in other company than their queries: the key views of all processes are shuffled,
and each process encodes another share. One that is alone has groups in place of processes: it cuts its
queries, and its shuffled keys, into `--bn_groups` parts that BatchNorm sees one by one. (Swin and ConvNeXt
have no BatchNorm.) The more groups, or processes, the less company a key shares with its query.

Differs from the authors' code:
- `--no-mhcl` runs, on one process too, on CPUs too;
- lambda, mu and pi are the same in all processes, drawn by torch from the seed and the step;
- the learning rate is set step by step, not by epoch, and scaled to the batch (.03 at 256: .015 at 128);
- no weight decay on biases and norm weights;
- workers crop, resize and flip in uint8 with antialiasing; colour follows on the device, batch by batch;
- stage 4 gives the backbone's own pooled features: of Swin and ConvNeXt those after the last norm;
- the queue is saved; order, crops and draws follow from seed and step: a resumed run repeats the unbroken
  one.

In OUT: checkpoint.pth, backbone/ (the query encoder's, for timm), log.jsonl, views.png.
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

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags; the defaults are the authors', of their README."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    yes_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=int, default=224, help="side of both views")
    add("--mean", type=float, nargs=3, default=common.IMAGENET_MEAN, help="of RGB in [0, 1]")
    add("--std", type=float, nargs=3, default=common.IMAGENET_STD, help="of RGB in [0, 1]")
    add("--num_workers", type=int, help="per process; none: its share of the cores, at most 16")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="resnet50", help="a timm model that gives four stages, such as resnet18, "
        "wide_resnet50_2, resnext50_32x4d, swin_tiny_patch4_window7_224, convnext_tiny; with --no-mhcl any")
    add("--init", help="start the backbone from an output folder, a checkpoint, a state dict, or timm's "
        "pretrained weights by name")
    add("--checkpoint_key", help="which network of a checkpoint --init takes; none: the one its run exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves "
        "tensors at their initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mhcl", action=yes_no, default=True, help="four scales and hard features; without: MoCo v2")
    add("--mlp", action=yes_no, default=True, help="two layers behind the last stage; without: one (MoCo v1)")
    add("--aug_plus", action=yes_no, default=True, help="MoCo v2's augmentation, with blur; without: v1's")
    add("--moco_dim", type=int, default=128, help="C, width of queries and keys; seldom changed")
    add("--moco_k", type=int, default=65536, help="K, a multiple of the effective batch; at most half "
        "the images")
    add("--moco_m", type=float, default=0.99, help="momentum of the key encoder; .999 for long runs of MoCo")
    add("--moco_t", type=float, default=0.2, help="tau; .07 for MoCo v1; lower: nearest negatives count more")
    add("--a", type=float, default=1.0, help="lambda and mu are drawn from Beta(a, b), of mean a / (a + b); "
        "the authors' values for other data are in our README")
    add("--b", type=float, default=0.1, help="more: lambda and mu are smaller, so pairs are pushed apart "
        "less, and a negative's partner weighs more")
    add("--bn_groups", type=int, help="cut the batch into so many parts for BatchNorm; none: parts of about "
        "32 images, at least 2, if there is one process, and no cut if there are several")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=800, help="length of all schedules; small data needs more")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process and micro-batch")
    add("--accum_steps", type=int, default=1, help="micro-batches per optimizer step, where memory is small")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="adamw: for Swin and ConvNeXt")
    add("--lr", type=float, default=0.03, help="at an effective batch of 256; scaled linearly to the actual; "
        "5e-4 with adamw")
    add("--cos", action=yes_no, default=True, help="cosine of the rate to 0; without: see --schedule")
    add("--schedule", type=int, nargs="*", default=[120, 160], help="epochs at which --no-cos takes a "
        "tenth of the rate")
    add("--warmup_epochs", type=float, default=0, help="of the learning rate; 10 with adamw")
    add("--weight_decay", type=float, default=1e-4, help="not on biases and norms; .05 with adamw")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=True, help="where all is written; a run found there goes on")
    add("--seed", type=int, default=0, help="of weights, order, crops, colour and hard features")
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
    positive = ("img_size moco_dim moco_k moco_t a b bn_groups epochs batch_size_per_gpu accum_steps lr "
                "save_every log_every max_steps std")
    not_negative = "num_workers warmup_epochs weight_decay save_minutes seed"
    common.check_range(args, positive.split(), not_negative.split(), unit=["moco_m"], finite=["mean"])
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs}: must be less than --epochs {args.epochs}")
    if args.cos and args.schedule != get_parser().get_default("schedule"):
        common.fail(f"--schedule {' '.join(map(str, args.schedule))}: only with --no-cos")
    if not args.cos and not all(0 < epoch < args.epochs for epoch in args.schedule):
        common.fail(f"--schedule {' '.join(map(str, args.schedule))}: must be between 0 and --epochs "
                    f"{args.epochs}")


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


class PairDataset(torch.utils.data.Dataset):
    """Geometry of two views of an image, in uint8, drawn from (seed, epoch, index) alone.

    Args:
        paths: the images.
        img_size: side of the views.
        seed: of the run.
    """

    def __init__(self, paths: list[str], img_size: int, seed: int):
        self.paths, self.img_size, self.seed = paths, img_size, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, int]) -> list[Tensor]:
        """Returns the query's and the key's view, uint8 3 x img_size x img_size."""
        epoch, index = item
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = common.read_image(self.paths[index])
        return [self._crop(image), self._crop(image)]

    def _crop(self, image: Tensor) -> Tensor:
        box = RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, [self.img_size] * 2, InterpolationMode.BILINEAR)
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop


def color_views(crops: Tensor, aug_plus: bool, mean: Sequence[float], std: Sequence[float],
                generator: torch.Generator) -> Tensor:
    """Colour, blur and normalise on the crops' device; every sample has its own draws.

    Args:
        crops: uint8 N x 3 x H x W.
        aug_plus: MoCo v2's (jitter, grey, blur), or v1's (grey, jitter).
        mean: of RGB in [0, 1].
        std: of RGB in [0, 1].
        generator: on the CPU.
    """
    x, N = common.to_float(crops), len(crops)
    gray = common.bernoulli(torch.full((N,), 0.2), generator)
    if aug_plus:
        jitter = common.draw_color_jitter((0.4, 0.4, 0.4, 0.1), torch.full((N,), 0.8), generator)
        blur = common.bernoulli(torch.full((N,), 0.5), generator)
        sigma = torch.empty(N).uniform_(0.1, 2.0, generator=generator)
        x = common.grayscale(common.color_jitter(x, *jitter), gray)
        x = common.gaussian_blur(x, blur, sigma)
    else:
        jitter = common.draw_color_jitter((0.4, 0.4, 0.4, 0.4), torch.ones(N), generator)
        x = common.color_jitter(common.grayscale(x, gray), *jitter)
    return common.normalize(x, mean, std)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def pooled_stages(backbone: nn.Module, images: Tensor, S: int) -> list[Tensor]:
    """Images B x 3 x H x W -> S tensors B x width; the last are the backbone's own pooled features."""
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
        """B x 3 x H x W -> unit vectors B x S x C in float32, pooled features of the last scale B x D.

        BatchNorm sees one of `bn_groups` parts of the batch at a time.
        """
        S = len(self.projectors)
        parts = [pooled_stages(self.backbone, part, S) for part in images.chunk(bn_groups)]  # each S tensors
        pooled = [torch.cat(scale) for scale in zip(*parts, strict=True)]  # S tensors B x width
        x = [projector(features) for projector, features in zip(self.projectors, pooled, strict=True)]
        return F.normalize(torch.stack(x, 1).float(), dim=-1), pooled[-1]


def gather(x: Tensor, process: Process) -> Tensor:
    """Rows of all processes, in the order of their ranks; without gradient."""
    if process.world_size == 1:
        return x
    everywhere = [torch.empty_like(x) for _ in range(process.world_size)]
    dist.all_gather(everywhere, x.contiguous())
    return torch.cat(everywhere)


class Shuffle:
    """Shuffle-BN: hands the rows of all processes out anew, and takes what became of them back in order.

    Args:
        B: rows of each process.
        seed: of the order, the same in all processes.
        process: this one.
    """

    def __init__(self, B: int, seed: int, process: Process):
        self.process, generator = process, torch.Generator().manual_seed(seed)
        order = torch.randperm(B * process.world_size, generator=generator)
        # Rows of all processes' batch that this process encodes; where its own rows went.
        self.taken = order.chunk(process.world_size)[process.rank].to(process.device)
        self.own = order.argsort().chunk(process.world_size)[process.rank].to(process.device)

    def __call__(self, x: Tensor) -> Tensor:
        """This process's rows B x ... -> the B rows, of all processes, that it encodes."""
        return gather(x, self.process)[self.taken]

    def undo(self, x: Tensor) -> Tensor:
        """Results for the rows it encoded -> those for its own rows, in their order."""
        return gather(x, self.process)[self.own]


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------

WEIGHTS = (0.1, 0.4, 0.7, 1.0)  # of the four scales
HARD_WEIGHTS = (0.01, 0.04, 0.07, 0.1)


def draw_hard(seed: int, a: float, b: float, S: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a step's hard features are made with; drawn on the CPU, so the same in all processes.

    Seeds torch's own generator of the CPU.

    Returns:
        lambda (S,) and mu (S,), from Beta(a, b); pi (K,), a permutation of the queue for all scales.
    """
    torch.default_generator.manual_seed(seed)  # the only one that Beta draws from
    lam, mu = torch.distributions.Beta(a, b).sample((2, S))
    return lam, mu, torch.randperm(K)


def extrapolate(q: Tensor, k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Hard positives: each pair pushed apart on its own line, and not normalised again.

    q^ k^ = (1 + 2 lambda + 2 lambda^2) q k - 2 lambda (1 + lambda): 1 where q = k, less elsewhere.

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
    partner = l_neg.gather(-1, permutation.expand_as(l_neg))  # its gradient is faster than that of [..., pi]
    return partner.lerp_(l_neg, mu.view(-1, 1, 1))


def info_nce(l_pos: Tensor, l_neg: Tensor) -> Tensor:
    """Cross-entropy of [l_pos, l_neg] with label 0, S x B; joining S x B and S x B x K would copy all."""
    return torch.logaddexp(l_pos, l_neg.logsumexp(-1)) - l_pos


class MHCLLoss(nn.Module):
    """InfoNCE of each row against its own queue. Rows are the scales, and then their hard features.

    The queues of the hard rows hold earlier k^. Beside the queue, R x C x K, are the logits, R x B x K.

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
                draws: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over rows of weight times cross-entropy, mean over the batch.

        Args:
            q: B x S x C queries, unit vectors in float32.
            k: B x S x C keys of the same images, without gradient.
            draws: lambda, mu and pi of draw_hard; None: no hard features, R is S.

        Returns:
            the loss; keys for the queue, B x R x C; figures for the log, without gradient.
        """
        S = q.shape[1]
        l_pos, l_neg = self.logits(q, k, self.queue[:S])
        cross_entropy, keys = info_nce(l_pos, l_neg), k  # S x B
        if draws is not None:
            lam, mu, permutation = draws
            hard_q, hard_k = extrapolate(q, k, lam)
            hard_pos, hard_neg = self.logits(hard_q, hard_k, self.queue[S:])
            hard_neg = interpolate(hard_neg, mu, permutation)
            cross_entropy = torch.cat([cross_entropy, info_nce(hard_pos, hard_neg)])  # R x B
            keys = torch.cat([k, hard_k.detach()], 1)
        cross_entropy = cross_entropy.mean(1)
        loss = self.weights @ cross_entropy
        with torch.no_grad():
            nearest = torch.einsum("bsc,nsc->sbn", q, k).argmax(-1)  # S x B, among the batch's own keys
            own = torch.arange(len(q), device=q.device)
            # By scale; of all rows only cross_entropy. batch_top1 does not depend on K and the age of keys.
            figures = {"loss": loss.detach(),
                       "top1": 100 * (l_pos > l_neg.amax(-1)).float().mean(1),
                       "batch_top1": 100 * (nearest == own).float().mean(1),
                       "positive": self.moco_t * l_pos.mean(1),
                       "negative": self.moco_t * l_neg.mean((1, 2)),
                       "cross_entropy": cross_entropy.detach()}
        return loss, keys, figures

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts keys N x R x C of all processes in the place of the oldest N."""
        N, K = len(keys), self.queue.shape[-1]
        columns = (self.queue_ptr + torch.arange(N, device=keys.device)) % K
        self.queue[:, :, columns] = keys.permute(1, 2, 0)
        self.queue_ptr.add_(N).remainder_(K)


# --------------------------------------------------------------------------------------------------
# One epoch
# --------------------------------------------------------------------------------------------------


def train_one_epoch(steps: range, batches: Iterator, encoder_q: nn.Module, encoder_k: Encoder,
                    mhcl_loss: MHCLLoss, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                    schedule: Callable[[int], dict[str, float]], bn_groups: int, args: argparse.Namespace,
                    process: Process, meter: common.Meter, after_step: Callable[[int, dict], bool]) -> bool:
    """Trains the optimizer steps `steps` of one epoch; returns True as soon as the run is to stop.

    Args:
        steps: counted from the start of the run.
        batches: yields both views of B images and messages about unreadable images.
        encoder_q: an Encoder, in DistributedDataParallel or not.
        encoder_k: its moving average.
        mhcl_loss: holds the queue.
        optimizer: two parameter groups, with and without weight decay.
        scaler: for fp16; else it does nothing.
        schedule: step -> lr.
        bn_groups: parts of the batch that BatchNorm sees one by one.
        args: the flags.
        process: this one.
        meter: collects what the log shows.
        after_step: after_step(steps done, values) logs and saves when due, and says whether to stop.
    """
    network = encoder_q.module if isinstance(encoder_q, DistributedDataParallel) else encoder_q
    S = len(network.projectors)
    autocast = common.autocast(args.amp, process.device)

    for step in steps:
        now = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = now["lr"]
        generator = torch.Generator().manual_seed(common.stream_seed(args.seed, "colour", step, process.rank))
        keys, figures, draws = [], [], None
        if args.mhcl:
            draws = draw_hard(common.stream_seed(args.seed, "hard", step), args.a, args.b, S, args.moco_k)
            draws = tuple(draw.to(process.device, non_blocking=True) for draw in draws)

        for micro in range(args.accum_steps):
            crops_q, crops_k = (x.to(process.device, non_blocking=True) for x in meter.fetch(batches))
            shuffle = Shuffle(len(crops_k), common.stream_seed(args.seed, "shuffle", step, micro), process)
            views_q = color_views(crops_q, args.aug_plus, args.mean, args.std, generator)
            views_k = color_views(shuffle(crops_k), args.aug_plus, args.mean, args.std, generator)
            if step == 0 and micro == 0:
                own_views_k = shuffle.undo(views_k)  # all processes take part
                if process.is_main:
                    save_views(views_q, own_views_k, args)
                del own_views_k
            with torch.no_grad(), autocast:
                k = shuffle.undo(encoder_k(views_k, bn_groups)[0])  # B x S x C

            # Processes exchange gradients with the last micro-batch only.
            waits = micro < args.accum_steps - 1 and encoder_q is not network
            with encoder_q.no_sync() if waits else nullcontext():
                with autocast:
                    q, features = encoder_q(views_q, bn_groups)  # B x S x C, B x D
                loss, new_keys, parts = mhcl_loss(q, k, draws)
                scaler.scale(loss / args.accum_steps).backward()
            keys.append(gather(new_keys, process))
            figures.append({**parts, "feature_std": common.feature_std(features.detach())})

        # Query encoder by gradient, then the key encoder follows (in MoCo just before the next keys, which is
        # the same), then the keys enter the queue.
        scaler.unscale_(optimizer)
        grad_norm = common.grad_norm(network, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        common.update_ema(network, encoder_k, args.moco_m)
        mhcl_loss.enqueue(torch.cat(keys))

        terms = {name: torch.stack([part[name] for part in figures]).mean(0) for name in figures[0]}
        meter.end_step({**terms, "grad_norm": grad_norm})
        if after_step(step + 1, now):
            return True
    return False


def save_views(views_q: Tensor, views_k: Tensor, args: argparse.Namespace) -> None:
    """Draws a row for each of up to 8 images: its view for the query, and that for the key."""
    rows = list(zip(views_q[:8], views_k[:8], strict=True))
    common.save_grid(Path(args.output_dir) / "views.png", rows, args.mean, args.std)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def stage_widths(backbone: nn.Module, arch: str, img_size: int, S: int) -> list[int]:
    """Channels of the last S stages, found by running the backbone; fails where it does not have them."""
    reductions = [stage["reduction"] for stage in getattr(backbone, "feature_info", ())][-S:]
    if S > 1 and (len(set(reductions)) < S or not hasattr(backbone, "forward_intermediates")):
        common.fail(f"--arch {arch}: timm gives no four stages of it to contrast, as it does of ResNet, "
                    "ResNeXt, WRN, Swin and ConvNeXt; --no-mhcl takes any")
    backbone.eval()
    try:
        with torch.no_grad():
            widths = [x.shape[1] for x in pooled_stages(backbone, torch.zeros(1, 3, img_size, img_size), S)]
    except Exception as error:
        common.fail(f"--arch {arch}: gives no features of {S} stages for {img_size} px: {error}")
    backbone.train()
    return widths


def build_encoders(args: argparse.Namespace) -> tuple[Encoder, Encoder]:
    """Query and key encoder, alike; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    backbone = common.build_backbone(args.arch, args.img_size)
    multiple = common.patch_multiple(backbone)
    if args.img_size % multiple:
        common.fail(f"--img_size {args.img_size}: must be a multiple of the patch, {multiple}")
    channels = stage_widths(backbone, args.arch, args.img_size, S=4 if args.mhcl else 1)
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
    if args.moco_k % effective_batch:
        nearest = max(1, args.moco_k // effective_batch) * effective_batch
        common.fail(f"--moco_k {args.moco_k}: must be a multiple of the effective batch, {effective_batch}, "
                    f"such as {nearest}")
    total_steps = args.epochs * steps_per_epoch
    end_step = min(total_steps, args.max_steps or total_steps)

    # Networks and state: resumed, or started, and then the key encoder starts as the query encoder
    network, encoder_k = build_encoders(args)
    bn_groups = batchnorm_groups(network, args, process)
    weights = (*WEIGHTS, *HARD_WEIGHTS) if args.mhcl else (1.0,)
    mhcl_loss = MHCLLoss(weights, args.moco_dim, args.moco_k, args.moco_t).to(process.device)
    identity = {"args": common.plain(args), "images": len(paths), "effective_batch": effective_batch}
    saved = common.resume_checkpoint(out / "checkpoint.pth", identity, common.FREE_FLAGS | {"bn_groups"})
    init = common.init_backbone(network.backbone, args, saved)
    encoder_k.load_state_dict(network.state_dict())
    for model in (network, encoder_k):
        model.to(process.device)
        if process.device.type == "cuda" and not hasattr(model.backbone, "patch_embed"):
            model.to(memory_format=torch.channels_last)
    fused = {"fused": True} if args.optimizer == "adamw" else {}  # one kernel for all tensors
    optimizer = timm.optim.create_optimizer_v2(
        common.param_groups(network), lr=args.lr, weight_decay=args.weight_decay, momentum=0.9,
        opt="momentum" if args.optimizer == "sgd" else args.optimizer,  # timm's "sgd" would be Nesterov's
        **fused)
    scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
    stateful = {"encoder_q": network, "encoder_k": encoder_k, "mhcl_loss": mhcl_loss,
                "optimizer": optimizer, "scaler": scaler}
    start_step = saved["step"] if saved else 0
    common.check_alike(process, images=len(paths), start_step=start_step)
    end_step = max(start_step, end_step)  # a run that is further already has nothing to do
    for name, part in stateful.items():
        if saved and saved[name]:  # the scaler has no state without fp16
            part.load_state_dict(saved[name])
    del saved
    if args.compile:
        for model in (network, encoder_k):
            model.compile()
    encoder_q = network
    if process.world_size > 1:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        encoder_q = DistributedDataParallel(network, device_ids=device_ids)

    dataset = PairDataset(paths, args.img_size, args.seed)
    sampler = common.StepSampler(len(dataset), args.batch_size_per_gpu, args.accum_steps, process, args.seed,
                                 start_step, end_step)
    loader = common.build_loader(dataset, sampler, args.num_workers, process.device)
    lr = args.lr * effective_batch / 256

    def schedule(step: int) -> dict[str, float]:
        warmup_steps = round(args.warmup_epochs * steps_per_epoch)
        rate = common.cosine_schedule(lr, 0.0 if args.cos else lr, step, total_steps, warmup_steps)
        drops = 0 if args.cos else sum(step >= epoch * steps_per_epoch for epoch in args.schedule)
        return {"lr": rate * 0.1**drops}

    versions = common.versions()
    header = {"argv": sys.argv, "versions": versions, "init": init,
              "device": common.device_name(process.device),
              "processes": process.world_size, "images": len(paths), "effective_batch": effective_batch,
              "scaled_lr": lr, "steps_per_epoch": steps_per_epoch, "steps": total_steps,
              "from_step": start_step, "to_step": end_step, "bn_groups": bn_groups,
              "queue_epochs": args.moco_k / (steps_per_epoch * effective_batch),
              "chance_cross_entropy": math.log(args.moco_k + 1)}
    if process.is_main:
        print(init)
        derived = {name: value for name, value in header.items() if name not in ("argv", "versions", "init")}
        print("  ".join(f"{name} {value}" for name, value in derived.items()))
        if args.moco_k > len(paths) / 2:
            print(f"warning: --moco_k {args.moco_k}: more than half of the {len(paths)} images; the queue "
                  "often holds an older key of the query's own image, as a negative", file=sys.stderr)
    floors = {"feature_std": 0.05} if args.batch_size_per_gpu > 1 else {}  # one image has no spread
    log = common.RunLog(out, process, end_step, start_step, header, floors,
                        advice="Try a lower --lr, more --warmup_epochs, or a larger --moco_m")
    meter, stop, saved_at = common.Meter(process, len(paths)), common.StopSignal(), time.monotonic()

    def save(step: int) -> None:
        nonlocal saved_at
        if process.is_main:
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {**identity, "step": step, "epoch": step // steps_per_epoch, "versions": versions}
            common.export_backbone(network.backbone, out / "backbone", args.img_size, args.mean, args.std)
            common.write_atomically(out / "checkpoint.pth", partial(torch.save, state))
        saved_at = time.monotonic()

    def after_step(step: int, values: dict) -> bool:
        overdue = time.monotonic() - saved_at > 60 * args.save_minutes
        stopping, overdue = common.agree(process, stop.seen, overdue)
        epochs, rest = divmod(step, steps_per_epoch)
        saving = stopping or overdue or step == end_step or (rest == 0 and epochs % args.save_every == 0)
        if saving or step % args.log_every == 0:
            log.write(step, {"epoch": epochs, **meter.summary(step, effective_batch), **values})
        if saving:
            save(step)
            meter.restart()
        log.advance()
        return stopping and step < end_step

    batches, stopped = iter(loader), False
    for epoch in range(start_step // steps_per_epoch, math.ceil(end_step / steps_per_epoch)):
        steps = range(max(start_step, epoch * steps_per_epoch), min(end_step, (epoch + 1) * steps_per_epoch))
        stopped = train_one_epoch(steps, batches, encoder_q, encoder_k, mhcl_loss, optimizer, scaler,
                                  schedule, bn_groups, args, process, meter, after_step)
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

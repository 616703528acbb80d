"""DSPT: a masked autoencoder (MAE) that goes on pre-training from weights you have, on images of your own.

T. Zhang et al., "Consecutive pre-training: a knowledge transfer learning strategy with relevant unlabeled
data for remote sensing domain", Remote Sensing 2022; first titled "Don't stop pre-training". K. He et al.,
"Masked autoencoders are scalable vision learners", CVPR 2022, arXiv 2111.06377.

    # a short run on a CPU, from nothing; `make demo` draws the images
    python dspt_mae.py --data_path demo/data/train --output_dir OUT --arch vit_tiny_patch16_224 \
        --img_size 64 --patch_size 8 --decoder_dim 128 --decoder_depth 2 --decoder_heads 4 \
        --epochs 20 --warmup_epochs 2
    # one GPU: MAE's public weights, encoder and decoder, go on with any folder of images
    python dspt_mae.py --data_path IMAGES --output_dir OUT --init mae_pretrain_vit_base_full.pth \
        --epochs 100 --warmup_epochs 5
    # several GPUs: a second domain after the first, here SAR images of one channel
    python -m torch.distributed.run --nproc_per_node 4 dspt_mae.py --data_path SAR --output_dir OUT2 \
        --init OUT --in_chans 1 --mean .4 --std .2 --epochs 100 --warmup_epochs 5

The encoder, a ViT, sees a random 25 % of the patches of each image. A small decoder receives their features,
with one learned mask token for each hidden patch, and predicts the hidden pixels. After training the decoder
is left behind; the encoder is the backbone. The method's point is `--init`: MAE of ImageNet, or of a first
domain, goes on with unlabelled images of the domain that counts. Without it this is plain MAE, the baseline.

    symbol     variable    flag (default)                 what
    B          B           batch_size_per_gpu (64)        images per process and micro-batch
    C          C           in_chans (3)                   channels
    p          p           patch_size (the arch's, 16)    side of a patch in pixels
    h, w       grid        img_size (224)                 patches per column and row: 14
    N          N           -                              patches of an image: 196
    n          n           mask_ratio (.75)               patches that the encoder sees: 49
    D          D           arch (vit_base_patch16_224)    width of the encoder: 768
    -          decoder_*   decoder_dim (512), decoder_depth (8), decoder_heads (16): width, blocks, heads

Pixels of 8-bit images are in [0, 1] before --mean and --std. Other channels than colour (`--in_chans`) come
from TIFF files with a page for each band, 16-bit or float images of one band, and .npy files H x W x C.
Pixels that are not 8-bit are taken as they are, and --mean and --std are in their units.

Differs from the authors' code:
- other sizes than the weights were made for: fixed positions are computed anew for the new grid, learned ones
  resampled and kept fixed; the patch projection is resampled, and converted to other channels;
- workers crop, resize and flip with antialiasing, 8-bit images in uint8;
- the mean and variance of `--norm_pix_loss` are put back in reconstruction.png;
- order, crops and draws follow from seed and step: a resumed run repeats the unbroken one.

In OUT: checkpoint.pth, backbone/ (the encoder, for timm), log.jsonl, views.png, reconstruction.png.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm.models
import timm.optim
import torch
import torch.distributed as dist
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block, VisionTransformer
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
    """All flags, with the authors' defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    yes_no = argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=int, nargs="+", default=[224], help="side of the crops, or height and width")
    add("--in_chans", type=int, default=3, help="1 for SAR, 12 for .npy files H x W x 12; the first "
        "lines of this file say what is read")
    add("--mean", type=float, nargs="+", default=common.IMAGENET_MEAN, help="of each channel, 8-bit pixels "
        "in [0, 1], others in their units; leave it out, and the error gives values measured on the images")
    add("--std", type=float, nargs="+", default=common.IMAGENET_STD, help="of each channel")
    add("--num_workers", type=int, help="per process; none: its share of the cores, at most 16")

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="vit_base_patch16_224", help="a timm ViT with a class token, such as "
        "vit_tiny_patch16_224, vit_small_patch16_224, vit_large_patch16_224")
    add("--patch_size", type=int, help="of a ViT; none: the arch's own; smaller for small images")
    add("--init", help="go on from MAE's checkpoint, with or without decoder, from an output folder, a state "
        "dict, or timm's pretrained weights by name; none: from nothing")
    add("--checkpoint_key", help="which entry of a checkpoint --init takes; none: the usual ones")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that fills under 90 %% of "
        "the encoder")

    add = parser.add_argument_group("method").add_argument
    add("--mask_ratio", type=float, default=0.75, help="share of the patches that the encoder does not see; "
        "less is slower, and easier")
    add("--norm_pix_loss", action=yes_no, default=True, help="targets normalised by patch; without: pixels, "
        "for sharper pictures and worse features")
    add("--decoder_dim", type=int, default=512, help="width of the decoder; one in --init needs the same")
    add("--decoder_depth", type=int, default=8, help="blocks of the decoder; 1 to 4 for small encoders")
    add("--decoder_heads", type=int, default=16, help="heads of the decoder; a divisor of its width")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=1600, help="length of all schedules; with --init 100 to 400 are enough")
    add("--batch_size_per_gpu", type=int, default=64, help="images per process and micro-batch")
    add("--accum_steps", type=int, default=1, help="micro-batches per optimizer step, where memory is small")
    add("--lr", type=float, default=1.5e-4, help="at an effective batch of 256; scaled linearly to the "
        "actual")
    add("--min_lr", type=float, default=0.0, help="at the end of its cosine; not scaled")
    add("--warmup_epochs", type=float, default=40, help="of the learning rate; less for short runs")
    add("--weight_decay", type=float, default=0.05, help="not on biases and norms")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=True, help="where all is written; a run found there goes on")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda, mps or cpu")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="auto: bf16 on GPUs with it")
    add("--compile", action=yes_no, default=False, help="torch.compile the network; pays on long runs")
    add("--save_every", type=int, default=1, help="epochs between checkpoints; more where epochs are short")
    add("--save_minutes", type=float, default=15, help="and the longest time between them")
    add("--log_every", type=int, default=20, help="steps between lines of the log")
    add("--max_steps", type=int, help="stop after this many optimizer steps; schedules keep to --epochs")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses values out of range and pairs that contradict each other; makes --img_size height and width."""
    positive = ("in_chans patch_size decoder_dim decoder_depth decoder_heads epochs batch_size_per_gpu "
                "accum_steps lr save_every log_every max_steps std")
    not_negative = "num_workers min_lr warmup_epochs weight_decay save_minutes seed"
    common.check_range(args, positive.split(), not_negative.split(), finite=["mean"])
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs}: must be less than --epochs {args.epochs}")
    if not 0 < args.mask_ratio < 1:
        common.fail(f"--mask_ratio {args.mask_ratio}: must be above 0 and below 1")
    if len(args.img_size) > 2 or min(args.img_size) <= 0:
        common.fail(f"--img_size {' '.join(map(str, args.img_size))}: one side, or height and width, above 0")
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        common.fail(f"--decoder_dim {args.decoder_dim}: must be a multiple of 4, and of --decoder_heads, "
                    f"{args.decoder_heads}")
    args.img_size = (args.img_size * 2)[:2]


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


class CropDataset(torch.utils.data.Dataset):
    """One crop of an image, drawn from (seed, epoch, index) alone.

    Args:
        paths: the images.
        size: height and width of the crop.
        in_chans: C.
        dtype: of the pixels; images of another are not mixed in.
        seed: of the run.
    """

    def __init__(self, paths: list[str], size: tuple[int, int], in_chans: int, dtype: torch.dtype, seed: int):
        self.paths, self.size, self.in_chans, self.dtype, self.seed = paths, size, in_chans, dtype, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Returns a crop C x H x W."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = common.read_image(self.paths[index], self.in_chans)
        if image.dtype != self.dtype:
            raise common.UnreadableImageError(f"{self.paths[index]}: {image.dtype} among {self.dtype}")
        box = RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))  # top, left, height, width
        crop = resized_crop(image, *box, self.size, InterpolationMode.BICUBIC)
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop


def check_pixels(paths: list[str], args: argparse.Namespace) -> torch.dtype:
    """The images' dtype; fails when --mean and --std are far from these channels', and says what they are."""
    dtypes, pixels = [], []

    def read(path: str) -> Tensor:
        image = common.read_image(path, args.in_chans)
        k = math.ceil(math.sqrt(image[0].numel() / 2**16))  # a grid of about 65,536 pixels at most
        dtypes.append(image.dtype)
        pixels.append(common.to_float(image[:, ::k, ::k]).flatten(1))
        return image

    common.check_images(paths, min(args.img_size), read)  # up to 32 of them
    sample = torch.cat(pixels, 1)
    dtype, own_mean, own_std = dtypes[0], sample.mean(1).tolist(), sample.std(1).tolist()
    fits = len(args.mean) == len(args.std) == args.in_chans
    for mean, std, m, s in zip(args.mean, args.std, own_mean, own_std, strict=False):
        fits &= abs(m - mean) < 10 * std and s < 10 * std and (std < 10 * s or s == 0)
    if not fits:
        given = " ".join(map(str, args.mean))
        mean = " ".join(f"{m:.4g}" for m in own_mean)
        std = " ".join(f"{s or 1:.4g}" for s in own_std)  # 1 for a constant channel
        common.fail(f"--mean {given}: --mean and --std do not fit the images' {args.in_chans} channels; "
                    f"measured on some: --mean {mean} --std {std}")
    return dtype


def kept_patches(N: int, mask_ratio: float) -> int:
    """How many of N patches are kept, int(N * (1 - mask_ratio)); 10 * (1 - .9) is .999... and means 1."""
    return int(round(N * (1 - mask_ratio), 6))


def random_masking(B: int, N: int, mask_ratio: float,
                   generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches each image keeps: int(N * (1 - mask_ratio)) at random.

    Returns:
        ids_keep B x n; ids_restore B x N, the place of each patch among kept ones, then masked ones;
        mask B x N, 1 = removed.
    """
    n = kept_patches(N, mask_ratio)
    ids_shuffle = torch.rand(B, N, generator=generator).argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    return ids_shuffle[:, :n], ids_restore, (ids_restore >= n).float()


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def sincos_positions(D: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions of MAE's public weights, (1 + h * w) x D; zeros for the class token.

    The first half of the features tells the column, the second the row. Each half is sin, then cos, of the
    number times 10000^(-i / (D / 4)), i from 0 to D / 4 - 1.
    """
    h, w = grid
    omega = 10000 ** (-torch.arange(D // 4, dtype=torch.float64) / (D / 4))
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [number.reshape(-1, 1) * omega for number in (column, row)]  # h*w x D/4 each
    positions = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
    return torch.cat([torch.zeros(1, D), positions.float()])


def patchify(images: Tensor, p: int) -> Tensor:
    """Images B x C x H x W -> patches B x N x (p * p * C), row by row; in a patch by row, column, channel."""
    B, C, H, W = images.shape
    x = images.view(B, C, H // p, p, W // p, p)
    return torch.einsum("bchpwq->bhwpqc", x).reshape(B, -1, p * p * C)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """Patches B x N x (p * p * C) -> images B x C x H x W; undoes patchify."""
    (h, w), B = grid, len(patches)
    x = patches.view(B, h, w, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(B, -1, h * p, w * p)


def take_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Tokens B x N x D at ids B x n -> B x n x D."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


class MaskedAutoencoder(nn.Module):
    """A ViT that encodes the kept patches, and a decoder that paints all. The decoder has MAE's public names.

    Args:
        backbone: timm's VisionTransformer with a class token and positions for `grid`.
        grid: h, w.
        patch_dim: p * p * C.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: of each block.
    """

    def __init__(self, backbone: VisionTransformer, grid: tuple[int, int], patch_dim: int, decoder_dim: int,
                 decoder_depth: int, decoder_heads: int):
        super().__init__()
        D = backbone.embed_dim
        self.backbone = backbone
        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(*(
            Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth)))
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_dim)
        self.register_buffer("decoder_pos_embed", sincos_positions(decoder_dim, grid), persistent=False)
        self._init_weights(grid)

    def _init_weights(self, grid: tuple[int, int]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.backbone.patch_embed.proj  # a linear layer on patches, though it is a convolution
        nn.init.xavier_uniform_(projection.weight.data.view(len(projection.weight), -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        nn.init.normal_(self.backbone.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        self.backbone.pos_embed.data.copy_(sincos_positions(self.backbone.embed_dim, grid))
        self.backbone.pos_embed.requires_grad_(False)

    def encode(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Images B x C x H x W, ids_keep B x n -> class token and kept patches B x (1 + n) x D."""
        vit = self.backbone
        x = vit.patch_embed(images).flatten(1, -2)  # B x h x w x D -> B x N x D
        x = take_tokens(x + vit.pos_embed[:, 1:], ids_keep)
        cls_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat([cls_token, x], 1))))

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent B x (1 + n) x D, ids_restore B x N -> prediction B x N x (p * p * C)."""
        x = self.decoder_embed(latent)
        B, N = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(B, N + 1 - x.shape[1], -1)
        patches = take_tokens(torch.cat([x[:, 1:], mask_tokens], 1), ids_restore)  # in the image's order
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def forward(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> prediction B x N x (p * p * C) and the class token's features B x D."""
        latent = self.encode(images, ids_keep)
        return self.decode(latent, ids_restore), latent[:, 0]


# --------------------------------------------------------------------------------------------------
# Weights to go on from
# --------------------------------------------------------------------------------------------------


def convert_positions(pos_embed: Tensor, grid: tuple[int, int],
                      old_grid: tuple[int, int] | None) -> tuple[Tensor, str]:
    """Positions 1 x (1 + N) x D of a file, for `grid`, and in words what became of them.

    Args:
        pos_embed: of the file.
        grid: h, w now.
        old_grid: h, w in the file, if known; None: they are equal.
    """
    D, N = pos_embed.shape[2], pos_embed.shape[1] - 1
    now = f"{grid[0]} x {grid[1]}"
    for h in range(1, N + 1):
        if N % h == 0 and torch.allclose(pos_embed[0], sincos_positions(D, (h, N // h)), atol=1e-3):
            how = "of the file" if grid == (h, N // h) else f"of {h} x {N // h} computed anew for {now}"
            return sincos_positions(D, grid).unsqueeze(0), f"fixed positions {how}"
    side = math.isqrt(N)
    h, w = old_grid or (side, side)
    if h * w != N:
        common.fail(f"--init: its {N + 1} positions are not those of a class token and a known grid")
    if (h, w) == grid:
        return pos_embed, "learned positions of the file, from now on fixed"
    resampled = resample_abs_pos_embed(pos_embed, list(grid), [h, w], num_prefix_tokens=1)
    return resampled, f"learned positions of {h} x {w} resampled to {now}, from now on fixed"


def convert_projection(weight: Tensor, in_chans: int, p: int) -> tuple[Tensor, str]:
    """Patch projection D x C x p x p of a file, for `in_chans` channels and patches of `p`, and in words.

    Each new channel gets an equal share of the old ones' sum, so equal channels give the tokens they gave
    before. But three become more as in timm, repeated and scaled: the first stay red, green and blue.
    """
    _, C, old_p, _ = weight.shape
    words = []
    if C != in_chans:
        words.append(f"patch projection of {C} channels converted to {in_chans}")
        if C == 3 < in_chans:
            weight = timm.models.adapt_input_conv(in_chans, weight)
        else:
            weight = (weight.sum(1, keepdim=True) / in_chans).expand(-1, in_chans, -1, -1)
    if old_p != p:
        weight = resample_patch_embed(weight, [p, p])
        words.append(f"patch projection of {old_p} px resampled to {p} px")
    return weight, ", ".join(words) or "patch projection of the file"


def load_init(network: MaskedAutoencoder, args: argparse.Namespace) -> list[str]:
    """Fills encoder and decoder from --init; returns a line on each: loaded, missing, converted.

    Fails when under 90 % of the encoder are filled. The decoder starts fresh where the file has none, or one
    of another shape.
    """
    vit = network.backbone
    state, info = common.read_weights(args.init, args.checkpoint_key, "--init", whole=True)
    state = {name: x.float() for name, x in state.items()}
    encoder = {name: x for name, x in state.items() if not name.startswith(("decoder_", "mask_token"))}
    decoder = {name: x for name, x in state.items() if name not in encoder and name != "decoder_pos_embed"}

    words, same_patches, p = [], True, vit.patch_embed.patch_size[0]
    weight, pos_embed = encoder.get("patch_embed.proj.weight"), encoder.get("pos_embed")
    if weight is not None and weight.ndim == 4 and len(weight) == vit.embed_dim:  # else of another arch
        # Other patches: the decoder's last layer predicts other pixels, even where its shape is the same.
        same_patches = weight.shape == vit.patch_embed.proj.weight.shape
        encoder["patch_embed.proj.weight"], how = convert_projection(weight, args.in_chans, p)
        words.append(how)
        if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[2] == vit.embed_dim:
            size = info.get("img_size")
            old_grid = tuple(side // weight.shape[-1] for side in size) if isinstance(size, tuple) else None
            encoder["pos_embed"], how = convert_positions(pos_embed, vit.patch_embed.grid_size, old_grid)
            words.append(how)
    if "mean" in info and (list(info["mean"]), list(info["std"])) != (list(args.mean), list(args.std)):
        mean, std = (" ".join(map(str, info[name])) for name in ("mean", "std"))
        words.append(f"trained with --mean {mean} --std {std}")
    report = common.load_backbone(vit, encoder, f"encoder from --init {args.init}", args.allow_partial)
    lines = ["; ".join([report, *words])]

    own = {name: x for name, x in network.state_dict().items() if not name.startswith("backbone.")}
    fits = {name: x for name, x in decoder.items() if name in own and x.shape == own[name].shape
            and (same_patches or not name.startswith("decoder_pred"))}
    network.load_state_dict(fits, strict=False)
    report = "decoder: none in the file, starts fresh"
    if decoder:
        report = common.loading_report("decoder", own, decoder, fits)
        if len(fits) < len(own):
            report += "; what is missing starts fresh"
    return [*lines, report]


# --------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches by their own mean and unbiased variance (+ 1e-6); mean and deviation, B x N x 1, to undo it."""
    mean = patches.mean(-1, keepdim=True)
    std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def mae_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error per patch, mean over the masked patches, in float32.

    Args:
        prediction: B x N x (p * p * C).
        target: B x N x (p * p * C).
        mask: B x N, 1 = removed.
    """
    error = (prediction.float() - target).square().mean(-1)  # B x N
    return (error * mask).sum() / mask.sum()


# --------------------------------------------------------------------------------------------------
# One epoch
# --------------------------------------------------------------------------------------------------


def train_one_epoch(steps: range, batches: Iterator, model: nn.Module, optimizer: torch.optim.Optimizer,
                    scaler: torch.amp.GradScaler, schedule: Callable[[int], dict[str, float]],
                    args: argparse.Namespace, process: Process, meter: common.Meter,
                    after_step: Callable[[int, dict, Callable], bool]) -> bool:
    """Trains the optimizer steps `steps` of one epoch; returns True as soon as the run is to stop.

    Args:
        steps: counted from the start of the run.
        batches: yields crops and messages about unreadable images.
        model: a MaskedAutoencoder, in DistributedDataParallel or not.
        optimizer: two parameter groups, with and without weight decay.
        scaler: for fp16; else it does nothing.
        schedule: step -> lr.
        args: the flags.
        process: this one.
        meter: collects what the log shows.
        after_step: after_step(steps done, values, draw) logs and saves when due, and says whether to stop;
            draw() writes reconstruction.png.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    p, grid = network.backbone.patch_embed.patch_size[0], network.backbone.patch_embed.grid_size
    autocast = common.autocast(args.amp, process.device)

    for step in steps:
        now = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = now["lr"]
        figures = []

        for micro in range(args.accum_steps):
            crops = meter.fetch(batches).to(process.device, non_blocking=True)
            images = common.normalize(common.to_float(crops), args.mean, args.std)
            seed = common.stream_seed(args.seed, "mask", step, micro, process.rank)
            masking = random_masking(len(images), grid[0] * grid[1], args.mask_ratio,
                                     torch.Generator().manual_seed(seed))
            ids_keep, ids_restore, mask = (x.to(process.device, non_blocking=True) for x in masking)
            patches = patchify(images, p)
            target = normalize_patches(patches)[0] if args.norm_pix_loss else patches
            if process.is_main and step == 0 and micro == 0:
                save_pictures("views.png", images, patches, mask, None, p, grid, crops.dtype, args)

            # Processes exchange gradients with the last micro-batch only.
            waits = micro < args.accum_steps - 1 and model is not network
            with model.no_sync() if waits else nullcontext():
                with autocast:
                    prediction, features = model(images, ids_keep, ids_restore)
                loss = mae_loss(prediction, target, mask)
                scaler.scale(loss / args.accum_steps).backward()
            # What it would cost to paint each hidden patch in its own mean; about 1 with norm_pix_loss.
            flat_loss = mae_loss(target.mean(-1, keepdim=True), target, mask)
            figures.append({"loss": loss.detach(), "flat_loss": flat_loss,
                            "feature_std": common.feature_std(features.detach())})

        scaler.unscale_(optimizer)
        grad_norm = common.grad_norm(network, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        terms = {name: torch.stack([part[name] for part in figures]).mean(0) for name in figures[0]}
        meter.end_step({**terms, "grad_norm": grad_norm})
        if after_step(step + 1, now, partial(save_pictures, "reconstruction.png", images, patches, mask,
                                             prediction.detach(), p, grid, crops.dtype, args)):
            return True
    return False


def save_pictures(name: str, images: Tensor, patches: Tensor, mask: Tensor, prediction: Tensor | None, p: int,
                  grid: tuple[int, int], dtype: torch.dtype, args: argparse.Namespace) -> None:
    """Draws a row for each of up to 8 images: itself, what the encoder sees, the prediction elsewhere.

    What is no 8-bit RGB is shown from -2 to 2 deviations: the first three channels, or the first in grey.
    """
    images, patches, masked = images[:8], patches[:8], mask[:8].unsqueeze(-1) > 0  # masked 8 x N x 1
    columns = [images, unpatchify(patches.masked_fill(masked, 0), p, grid)]
    if prediction is not None:
        prediction = prediction[:8].float()
        if args.norm_pix_loss:
            _, mean, std = normalize_patches(patches)
            prediction = prediction * std + mean
        columns.append(unpatchify(torch.where(masked, prediction, patches), p, grid))
    mean, std = args.mean, args.std
    if args.in_chans != 3 or dtype != torch.uint8:
        columns = [x[:, :3] if args.in_chans >= 3 else x[:, :1].expand(-1, 3, -1, -1) for x in columns]
        mean, std = (0.5,) * 3, (0.25,) * 3
    common.save_grid(Path(args.output_dir) / name, list(zip(*columns, strict=True)), mean, std)


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def build_network(args: argparse.Namespace) -> MaskedAutoencoder:
    """The autoencoder; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    vit = common.build_backbone(args.arch, tuple(args.img_size), args.patch_size, in_chans=args.in_chans)
    plain = isinstance(vit, VisionTransformer) and type(vit.patch_embed) is PatchEmbed
    if not plain or vit.global_pool != "token" or vit.num_prefix_tokens != 1 or vit.no_embed_class:
        common.fail(f"--arch {args.arch}: must be a ViT with a class token, its position and no other token")
    p = common.patch_multiple(vit)
    if any(side % p for side in args.img_size):
        sides = " ".join(map(str, dict.fromkeys(args.img_size)))
        common.fail(f"--img_size {sides}: must be a multiple of the patch, {p}")
    N = vit.patch_embed.num_patches
    if not 0 < kept_patches(N, args.mask_ratio) < N:
        common.fail(f"--mask_ratio {args.mask_ratio}: must keep some of the {N} patches, not all")
    return MaskedAutoencoder(vit, vit.patch_embed.grid_size, p * p * args.in_chans, args.decoder_dim,
                             args.decoder_depth, args.decoder_heads)


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
    paths = common.list_images(args.data_path, exclude=out, suffixes=common.PIXEL_SUFFIXES)
    dtype = check_pixels(paths, args)
    effective_batch = args.batch_size_per_gpu * args.accum_steps * process.world_size
    steps_per_epoch = len(paths) // effective_batch
    if not steps_per_epoch:
        common.fail(f"--batch_size_per_gpu {args.batch_size_per_gpu}: the effective batch, "
                    f"{effective_batch}, is larger than the data, {len(paths)}")
    total_steps = args.epochs * steps_per_epoch
    end_step = min(total_steps, args.max_steps or total_steps)

    # Network: resumed, or started, from --init or from nothing
    network = build_network(args)
    identity = {"args": common.plain(args), "images": len(paths), "effective_batch": effective_batch}
    saved = common.resume_checkpoint(out / "checkpoint.pth", identity, common.FREE_FLAGS)
    if saved:
        init = [f"resumed at step {saved['step']}{', --init is not read again' if args.init else ''}"]
    else:
        init = load_init(network, args) if args.init else ["from nothing: plain MAE"]
    network.to(process.device)
    optimizer = timm.optim.create_optimizer_v2(
        common.param_groups(network), lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.95),
        opt="adamw", fused=True)  # one kernel for all tensors
    scaler = torch.amp.GradScaler(process.device.type, enabled=args.amp == "fp16")
    stateful = {"model": network, "optimizer": optimizer, "scaler": scaler}
    start_step = saved["step"] if saved else 0
    common.check_alike(process, images=len(paths), start_step=start_step)
    end_step = max(start_step, end_step)  # a run that is further already has nothing to do
    for name, part in stateful.items():
        if saved and saved[name]:  # the scaler has no state without fp16
            part.load_state_dict(saved[name])
    del saved
    if args.compile:
        network.compile()
    model = network
    if process.world_size > 1:
        device_ids = [process.device.index] if process.device.type == "cuda" else None
        model = DistributedDataParallel(network, device_ids=device_ids)

    vit = network.backbone
    grid, p = vit.patch_embed.grid_size, vit.patch_embed.patch_size[0]
    dataset = CropDataset(paths, tuple(args.img_size), args.in_chans, dtype, args.seed)
    sampler = common.StepSampler(len(dataset), args.batch_size_per_gpu, args.accum_steps, process, args.seed,
                                 start_step, end_step)
    loader = common.build_loader(dataset, sampler, args.num_workers, process.device)
    lr = args.lr * effective_batch / 256

    def schedule(step: int) -> dict[str, float]:
        warmup_steps = round(args.warmup_epochs * steps_per_epoch)
        return {"lr": common.cosine_schedule(lr, args.min_lr, step, total_steps, warmup_steps)}

    versions = common.versions()
    header = {"argv": sys.argv, "versions": versions, "init": init,
              "device": common.device_name(process.device), "processes": process.world_size,
              "images": len(paths), "effective_batch": effective_batch, "scaled_lr": lr,
              "steps_per_epoch": steps_per_epoch, "steps": total_steps, "from_step": start_step,
              "to_step": end_step, "patches": f"{grid[0]} x {grid[1]} of {p} px",
              "kept_patches": kept_patches(grid[0] * grid[1], args.mask_ratio)}
    if process.is_main:
        for line in init:
            print(line)
        derived = {name: value for name, value in header.items() if name not in ("argv", "versions", "init")}
        print("  ".join(f"{name} {value}" for name, value in derived.items()))
    floors = {"feature_std": 0.05} if args.batch_size_per_gpu > 1 else {}  # one image has no spread
    log = common.RunLog(out, process, end_step, start_step, header, floors,
                        advice="Try a lower --lr or more --warmup_epochs")
    meter, stop, saved_at = common.Meter(process, len(paths)), common.StopSignal(), time.monotonic()

    def save(step: int) -> None:
        nonlocal saved_at
        if process.is_main:
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {**identity, "step": step, "epoch": step // steps_per_epoch, "versions": versions}
            common.export_backbone(vit, out / "backbone", tuple(args.img_size), args.mean, args.std)
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
        stopped = train_one_epoch(steps, batches, model, optimizer, scaler, schedule, args, process, meter,
                                  after_step)
        if stopped:
            break
    del batches  # ends the workers
    log.close()
    if process.is_main:
        print(f"stopped by a signal after a checkpoint; the same command goes on: {out}" if stopped else
              f"{end_step} steps done. Look at {out}/reconstruction.png; kNN says little about MAE")
    if process.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

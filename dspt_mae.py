"""DSPT: a masked autoencoder (MAE) continues its pre-training on your own images, from weights you have.

T. Zhang et al., "Consecutive pre-training: a knowledge transfer learning strategy with relevant unlabeled
data for remote sensing domain", Remote Sensing 2022. Builds on MAE (K. He et al., CVPR 2022).

    # a short run on a CPU, from scratch; `make demo` draws the images
    python dspt_mae.py --data_path demo/data/train --output_dir OUT --arch vit_tiny_patch16_224 \
        --img_size 64 --patch_size 8 --decoder_dim 128 --decoder_depth 2 --decoder_heads 4 --epochs 20
    # one GPU: MAE's public weights, encoder and decoder, continue on any folder of images
    python dspt_mae.py --data_path IMAGES --output_dir OUT --init mae_pretrain_vit_base_full.pth --epochs 100
    # several GPUs: a second domain after the first, here SAR images of one channel
    python -m torch.distributed.run --nproc_per_node 4 dspt_mae.py --data_path SAR --output_dir OUT2 \
        --init OUT --in_chans 1 --epochs 100

The encoder, a ViT, sees a random 25 % of the patches of each image. A small decoder receives their features,
with one learned mask token for each hidden patch, and predicts the hidden pixels. After training the decoder
is left behind; the encoder is the backbone. The method's point is `--init`: MAE of ImageNet, or of a first
domain, continues with unlabelled images of the domain that counts. Without it this is plain MAE, the
baseline. Read `random_masking`, `MaskedAutoencoder`, `mae_loss` and `train` first.

    symbol     variable    flag (default)                 what
    B          B           batch_size_per_gpu (64)        images per process and micro-batch
    C          C           in_chans (3)                   channels
    p          p           patch_size (the arch's, 16)    side of a patch in pixels
    h, w       grid        img_size (224)                 patches per column and row: 14
    N          N           -                              patches of an image: 196
    n          n           mask_ratio (.75)               patches that the encoder sees: 49
    D          D           arch (vit_base_patch16_224)    width of the encoder: 768
    -          decoder_*   decoder_dim (512), decoder_depth (8), decoder_heads (16): width, blocks, heads

Differs from the authors' code:
- for other image sizes fixed positions are computed again, learned ones resampled and kept fixed; the patch
  projection is resampled, and converted to other channels;
- where images are not square, crops are cut in their proportions, so that nothing is stretched further;
- workers crop, resize and flip with antialiasing, 8-bit images in uint8;
- reconstruction.png puts back each patch's mean and variance, which `--norm_pix_loss` takes away;
- order, crops and masks follow from seed and step: a resumed run repeats the unbroken one.

In OUT: checkpoint.pth, backbone/ (the encoder, for timm), log.jsonl, views.png, reconstruction.png.
"""

import argparse
import math
from functools import partial

import timm.optim
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

import common
from common import Process, Samples, not_negative, number, positive

# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    """All flags, with the authors' defaults."""
    parser, yes_no = common.build_parser(__doc__.splitlines()[0]), argparse.BooleanOptionalAction

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of images, at any depth")
    add("--img_size", type=positive(int), nargs="+", default=[224], help="side of the crops, or height and "
        "width")
    common.add_pixel_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--arch", default="vit_base_patch16_224", help="a timm ViT with a class token, such as "
        "vit_tiny_patch16_224, vit_small_patch16_224, vit_large_patch16_224")
    add("--patch_size", type=positive(int), help="of the ViT, smaller for small images; default: the arch's "
        "own")
    add("--init", help="continue from MAE's checkpoint, with or without decoder, from an output folder, a "
        "state dict, or timm's pretrained weights by name; default: from scratch")
    add("--checkpoint_key", help="network of a checkpoint that --init takes; default: the one that its run "
        "exports")
    add("--allow_partial", action=yes_no, default=False, help="accept an --init that leaves tensors of "
        "the encoder at their initial values")

    add = parser.add_argument_group("method").add_argument
    add("--mask_ratio", type=number(float, lambda ratio: 0 < ratio < 1, "above 0 and below 1"), default=0.75,
        help="share of the patches that the encoder does not see; less is slower, and easier")
    add("--norm_pix_loss", action=yes_no, default=True, help="targets normalised by patch; without: pixels, "
        "for sharper pictures and worse features")
    add("--decoder_dim", type=positive(int), default=512, help="width of the decoder; that of --init is "
        "taken where it has the same")
    add("--decoder_depth", type=positive(int), default=8, help="blocks of the decoder; we recommend 1 to 4 "
        "for small encoders")
    add("--decoder_heads", type=positive(int), default=16, help="heads of the decoder; a divisor of its "
        "width; that of --init is taken where it has as many")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive(int), default=1600, help="length of all schedules; we recommend 100 to 400 "
        "with --init")
    add("--batch_size_per_gpu", type=positive(int), default=64, help="images per process and micro-batch")
    add("--accum_steps", type=positive(int), default=1, help="micro-batches per optimizer step, where memory "
        "is small")
    add("--lr", type=positive(float), default=1.5e-4, help="at an effective batch of 256, scaled linearly")
    add("--min_lr", type=not_negative(float), default=0.0, help="at the end of its cosine; not scaled")
    add("--warmup_epochs", type=not_negative(float), help="of the learning rate; default: 40, but at most a "
        "tenth of --epochs")
    add("--weight_decay", type=not_negative(float), default=0.05, help="not on biases and norms")

    common.add_run_flags(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other; fills in defaults that depend on other flags.

    --img_size becomes (height, width).
    """
    args.warmup_epochs = common.default_warmup(args.warmup_epochs, 40, args.epochs)
    if args.warmup_epochs >= args.epochs:
        common.fail(f"--warmup_epochs {args.warmup_epochs:g}: must be less than --epochs {args.epochs}")
    if len(args.img_size) > 2:
        common.fail(f"--img_size {' '.join(map(str, args.img_size))}: one side, or height and width")
    if args.decoder_dim % 4 or args.decoder_dim % args.decoder_heads:
        common.fail(f"--decoder_dim {args.decoder_dim}: must be a multiple of 4, and of --decoder_heads, "
                    f"{args.decoder_heads}")
    args.img_size = tuple((args.img_size * 2)[:2])


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


class CropDataset(torch.utils.data.Dataset):
    """One crop of an image, drawn from (seed, epoch, index) alone.

    Args:
        samples: the images.
        size: height and width of the crop.
        seed: of the run.
    """

    def __init__(self, samples: Samples, size: tuple[int, int], seed: int):
        self.samples, self.size, self.seed = samples, size, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Returns a crop C x H x W of the files' dtype."""
        epoch, index = key
        torch.default_generator.manual_seed(common.stream_seed(self.seed, "geometry", epoch, index))
        image = self.samples[index]
        proportion = self.size[1] / self.size[0]
        ratio = (3 / 4 * proportion, 4 / 3 * proportion)  # width / height
        box = RandomResizedCrop.get_params(image, (0.2, 1.0), ratio)  # top, left, height, width
        crop = resized_crop(image, *box, self.size, InterpolationMode.BICUBIC)
        return crop.flip(-1) if torch.rand(()) < 0.5 else crop


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
    angles = [index.reshape(-1, 1) * omega for index in (column, row)]  # h*w x D/4 each
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


def build_network(args: argparse.Namespace) -> MaskedAutoencoder:
    """The autoencoder; the same initial weights in all processes, from --seed."""
    torch.manual_seed(args.seed)
    vit = common.build_backbone(args.arch, args.img_size, args.patch_size, in_chans=args.in_chans)
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


# --------------------------------------------------------------------------------------------------
# Weights to continue from
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
            how = "of the file" if grid == (h, N // h) else f"of {h} x {N // h} recomputed for {now}"
            return sincos_positions(D, grid).unsqueeze(0), f"fixed positions {how}"
    side = math.isqrt(N)
    h, w = old_grid or (side, side)
    if h * w != N:
        common.fail(f"--init: its {N + 1} positions are not those of a class token and a known grid")
    if (h, w) == grid:
        return pos_embed, "learned positions of the file, from now on fixed"
    resampled = resample_abs_pos_embed(pos_embed, list(grid), [h, w], num_prefix_tokens=1)
    return resampled, f"learned positions of {h} x {w} resampled to {now}, from now on fixed"


def load_init(network: MaskedAutoencoder, args: argparse.Namespace) -> list[str]:
    """Fills encoder and decoder from --init; returns a line on each: loaded, missing, converted.

    Fails where a tensor of the encoder is missing or has another shape, unless --allow_partial; channels,
    patches and positions are converted. The decoder starts fresh where the file has none, or one of another
    width or, as far as the file tells, of other heads.
    """
    vit = network.backbone
    state, info = common.read_weights(args.init, args.checkpoint_key, "--init", whole=True)
    state = {name: x.float() for name, x in state.items()}
    encoder = {name: x for name, x in state.items() if not name.startswith(("decoder_", "mask_token"))}
    decoder = {name: x for name, x in state.items() if name not in encoder and name != "decoder_pos_embed"}

    words, same_patches = [], True
    weight, pos_embed = encoder.get("patch_embed.proj.weight"), encoder.get("pos_embed")
    if weight is not None and weight.ndim == 4 and len(weight) == vit.embed_dim:  # else of another arch
        # Other patches: the decoder's last layer predicts other pixels, even where its shape is the same.
        same_patches = weight.shape == vit.patch_embed.proj.weight.shape
        if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[2] == vit.embed_dim:
            size = info.get("img_size")
            old_grid = tuple(side // weight.shape[-1] for side in size) if isinstance(size, tuple) else None
            encoder["pos_embed"], how = convert_positions(pos_embed, vit.patch_embed.grid_size, old_grid)
            words.append(how)
    words += common.other_pixels(info, args)
    report = common.load_backbone(vit, encoder, f"encoder from --init {args.init}", args.allow_partial)
    lines = ["; ".join([report, *words])]

    own = {name: x for name, x in network.state_dict().items() if not name.startswith("backbone.")}
    if not same_patches:
        decoder = {name: x for name, x in decoder.items() if not name.startswith("decoder_pred")}
    report, heads = "decoder: none in the file, starts fresh", info.get("decoder_heads")
    if decoder and heads not in (None, args.decoder_heads):  # tensors of the same shapes, another function
        report = f"decoder: the file's has {heads} heads, not {args.decoder_heads}, starts fresh"
    elif decoder:
        fits = {name: x for name, x in decoder.items() if name in own and x.shape == own[name].shape}
        network.load_state_dict(fits, strict=False)
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
# Pictures
# --------------------------------------------------------------------------------------------------


def draw_pictures(run: common.Run, name: str, patches: Tensor, mask: Tensor, prediction: Tensor | None,
                  p: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Draws a row for each of up to 8 images: itself, what the encoder sees, the prediction elsewhere.

    Args:
        run: whose folder gets the picture.
        name: of the file.
        patches: B x N x (p * p * C), of normalised images.
        mask: B x N, 1 = removed.
        prediction: B x N x (p * p * C), with --norm_pix_loss of normalised patches; None: two columns.
        p: side of a patch.
        grid: h, w.
        dtype: of the files' pixels.
    """
    args, patches, masked = run.args, patches[:8], mask[:8].unsqueeze(-1) > 0  # masked 8 x N x 1
    columns = [patches, patches.masked_fill(masked, 0)]
    if prediction is not None:
        prediction = prediction[:8].detach().float()
        if args.norm_pix_loss:
            _, mean, std = normalize_patches(patches)
            prediction = prediction * std + mean
        columns.append(torch.where(masked, prediction, patches))
    columns = [unpatchify(column, p, grid) for column in columns]
    run.draw(name, list(zip(*columns, strict=True)), dtype)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, process: Process) -> None:
    """Trains the autoencoder; writes checkpoints, encoder, log and pictures to --output_dir."""
    # Data
    samples = common.load_samples(args, process, common.IMAGENET_MEAN, common.IMAGENET_STD)
    run = common.Run(args, process, samples=len(samples), images=len(samples.paths))

    # Network: new (from --init or from scratch) or resumed
    model = build_network(args)
    p, grid = model.backbone.patch_embed.patch_size[0], model.backbone.patch_embed.grid_size
    N = grid[0] * grid[1]
    if args.init and not run.saved:
        init = load_init(model, args)
    else:
        init = common.init_backbone(model.backbone, args, run.saved)
    common.to_device(model, process.device)
    optimizer, scaler = timm.optim.create_optimizer_v2(
        common.param_groups(model), opt="adamw", lr=args.lr, weight_decay=args.weight_decay,
        betas=(0.9, 0.95), fused=True), run.scaler
    run.restore(model.backbone, model=model, optimizer=optimizer)
    if args.compile:
        model.compile()
    ddp_model = common.distributed(model, process)

    loader = run.loader(CropDataset(samples, args.img_size, args.seed))
    base_lr = args.lr * run.effective_batch / 256
    warmup_steps = round(args.warmup_epochs * run.steps_per_epoch)
    advice = "Try a lower --lr or more --warmup_epochs"
    header = {"scaled_lr": base_lr, "patches": f"{grid[0]} x {grid[1]} of {p} px",
              "kept_patches": kept_patches(N, args.mask_ratio)}
    floors = {"feature_std": 0.05}  # a collapsed network stays below
    for step in run.steps(loader, init, floors, advice, **header):
        lr = common.cosine_schedule(base_lr, args.min_lr, step, run.total_steps, warmup_steps)
        common.set_lr(optimizer, lr)
        terms = []

        for micro in range(args.accum_steps):
            crops = run.fetch()  # B x C x H x W
            images = common.to_float(crops, args.mean, args.std)
            images = common.normalize(images, args.mean, args.std, crops.dtype)
            # Which patches the encoder sees: others for each image.
            masking = random_masking(len(images), N, args.mask_ratio,
                                     common.generator(args.seed, "mask", step, micro, process.rank))
            ids_keep, ids_restore, mask = (x.to(process.device, non_blocking=True) for x in masking)
            # What the decoder has to predict.
            patches = patchify(images, p)  # B x N x (p * p * C)
            target = normalize_patches(patches)[0] if args.norm_pix_loss else patches
            if step == micro == 0:
                draw_pictures(run, "views.png", patches, mask, None, p, grid, crops.dtype)
            with common.accumulating(ddp_model, micro, args.accum_steps):
                with run.autocast:
                    prediction, features = ddp_model(images, ids_keep, ids_restore)  # B x N x (p² C), B x D
                loss = mae_loss(prediction, target, mask)
                scaler.scale(loss / args.accum_steps).backward()
            # The loss if each hidden patch were painted in its own mean; about 1 with norm_pix_loss.
            flat_loss = mae_loss(target.mean(-1, keepdim=True), target, mask)
            terms.append({"loss": loss.detach(), "flat_loss": flat_loss,
                          "feature_std": common.feature_std(features)})

        grad_norm = common.grad_norm(optimizer, scaler)
        common.optimizer_step(optimizer, scaler)
        if run.is_due(step):
            draw_pictures(run, "reconstruction.png", patches, mask, prediction, p, grid, crops.dtype)
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

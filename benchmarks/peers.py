"""Whole training loops, data included, against the same method in the library lightly.

    pip install lightly
    python benchmarks/peers.py --data_path IMAGES

Network, size and number of crops, heads, batch, optimizer and folder are the same on both sides, and one
thread loads and trains. Ours runs as a user starts it; lightly as its documentation shows it, in float32. The
two take turns; the figure is the ratio of the medians of their steps. Their draws differ, so their losses
cannot be compared number by number: both are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, here and in the processes of ours

import timm
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
OURS = {
    "DINO, ResNet-18, 32 images": """dino_mc.py --mode dino --arch resnet18 --img_size 64
        --local_crops_number 2 --local_crops_size 32 --batch_size_per_gpu 32 --out_dim 4096 --use_bn_in_head
        --drop_path 0""",
    "MoCo v2, ResNet-18, 64 images": """mhcl.py --no-mhcl --arch resnet18 --img_size 64
        --batch_size_per_gpu 64 --moco_k 4096""",
    "MAE, ViT-Ti/8, 64 images": """dspt_mae.py --arch vit_tiny_patch16_224 --patch_size 8 --img_size 64
        --batch_size_per_gpu 64 --decoder_dim 128 --decoder_depth 2 --decoder_heads 4""",
}


def our_steps(flags: str, data: Path, steps: int) -> list[tuple[float, float]]:
    """Seconds and loss of each step of a run of ours, without the first ten."""
    with tempfile.TemporaryDirectory() as out:
        more = f"--epochs 100 --max_steps {steps + 10} --log_every 1 --num_workers 0 --device cpu"
        words = [*flags.split(), *more.split(), "--data_path", data, "--output_dir", out]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [(line["step_seconds"], line["loss"]) for line in lines if line.get("step", 0) > 10]


def batches(data: Path, transform: Callable, size: int) -> Iterator[list[Tensor]]:
    """The views of a batch, epoch after epoch."""
    from lightly.data import LightlyDataset

    dataset = LightlyDataset(str(data), transform=transform)
    loader = torch.utils.data.DataLoader(dataset, size, shuffle=True, drop_last=True, num_workers=0)
    while True:
        for views, *_ in loader:
            yield views


def dino(data: Path) -> Iterator[Tensor]:
    """Steps of lightly's DINO; yields the loss."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import DINOTransform

    student, teacher = (nn.Sequential(
        timm.create_model("resnet18", num_classes=0),
        DINOProjectionHead(512, 2048, 256, 4096, batch_norm=True, freeze_last_layer=1)) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss_of = DINOLoss(4096)
    optimizer = torch.optim.AdamW(student.parameters(), 5e-4)
    transform = DINOTransform(global_crop_size=64, local_crop_size=32, n_local_views=2)
    for views in batches(data, transform, 32):
        update_momentum(student, teacher, 0.996)
        teacher_out = [teacher(view) for view in views[:2]]
        loss = loss_of(teacher_out, [student(view) for view in views], epoch=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        yield loss.detach()


def moco(data: Path) -> Iterator[Tensor]:
    """Steps of lightly's MoCo v2; yields the loss."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import MoCoV2Transform

    query = nn.Sequential(timm.create_model("resnet18", num_classes=0), MoCoProjectionHead(512, 512, 128))
    key, loss_of = deepcopy(query).requires_grad_(False), NTXentLoss(0.2, memory_bank_size=(4096, 128))
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    for view_q, view_k in batches(data, MoCoV2Transform(input_size=64), 64):
        update_momentum(query, key, 0.999)
        with torch.no_grad():
            keys = key(view_k)
        loss = loss_of(query(view_q), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def mae(data: Path) -> Iterator[Tensor]:
    """Steps of lightly's MAE; yields the loss."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from lightly.transforms import MAETransform

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, patch_size=8)
    encoder = MaskedVisionTransformerTIMM(vit)
    decoder = MAEDecoderTIMM(64, 8, embed_dim=192, decoder_embed_dim=128, decoder_depth=2,
                             decoder_num_heads=4)
    both = nn.ModuleList([encoder, decoder])
    optimizer = torch.optim.AdamW(both.parameters(), 1.5e-4, betas=(0.9, 0.95), weight_decay=0.05)
    for (images,) in batches(data, MAETransform(input_size=64), 64):
        keep, mask = utils.random_token_mask((len(images), 65), mask_ratio=0.75)
        tokens = decoder.mask_token.expand(len(images), 65, -1).clone()
        tokens = utils.set_at_index(tokens, keep, decoder.embed(encoder.encode(images, idx_keep=keep)))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), mask))
        loss = nn.functional.mse_loss(predicted, utils.get_at_index(utils.patchify(images, 8), mask - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def main() -> None:
    """Three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, required=True, help="a folder of images")
    parser.add_argument("--steps", type=int, default=20, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides")
    args = parser.parse_args()
    try:
        import lightly
    except ImportError:
        raise SystemExit("lightly is not installed: pip install lightly") from None
    print(f"lightly {lightly.__version__}, torch {torch.__version__}, one thread")
    for (name, flags), peer in zip(OURS.items(), (dino, moco, mae), strict=True):
        loop, ours, theirs, ratios = peer(args.data_path), [], [], []
        for _ in range(5):
            next(loop)
        for _ in range(args.rounds):
            ours.append(our_steps(flags, args.data_path.resolve(), args.steps))
            theirs.append([])
            for _ in range(args.steps):
                began = time.perf_counter()
                loss = next(loop).item()
                theirs[-1].append((time.perf_counter() - began, loss))
            own, other = (statistics.median(step[0] for step in side[-1]) for side in (ours, theirs))
            ratios.append(other / own)
        own, other = (statistics.median(step[0] for part in side for step in part) for side in (ours, theirs))
        print(f"{name}: {own:.3f} s a step against {other:.3f} s: {other / own:.2f} times as fast "
              f"({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} rounds); losses at the end "
              f"{ours[-1][-1][1]:.2f}, {theirs[-1][-1][1]:.2f}", flush=True)


if __name__ == "__main__":
    main()

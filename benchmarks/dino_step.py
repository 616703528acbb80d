"""DINO-MC's step, ViT-S/16, against a plain step of the same modules in float32.

Run it as `python benchmarks/dino_step.py`. Both see the same weights and the same coloured crops. The plain
step loops over pairs of views for the loss, and over tensors for clipping, optimizer and average. With `--amp
off` loss and gradients have to be equal; with `auto` on a processor for bf16 the first loss to .2 %.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dino_mc
from benchmarks.timing import compare
from benchmarks.update import OURS, PLAIN, our_step, plain_step, side

K, TEMP = 65536, 0.04


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """Every teacher view with every other student view, one pair at a time."""
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher):
        P = ((t - center) / TEMP).softmax(-1)
        for v, s in enumerate(student):
            if v != i:
                total = total - (P * (s / 0.1).log_softmax(-1)).sum(-1).mean()
                pairs += 1
    return total / pairs


def main() -> None:
    """One comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--amp", choices=["auto", "off"], default="auto", help="of ours")
    args = parser.parse_args()
    B, cpu = args.batch, torch.device("cpu")
    bf16 = common.autocast_dtype(args.amp, cpu) is not None
    torch.manual_seed(0)
    views = dino_mc.make_views("mc", 224, dino_mc.MC_SIZES, (0.32, 1.0), (0.05, 0.32))
    crops = [torch.randint(256, (B, 3, view.size, view.size), dtype=torch.uint8) for view in views]
    normalisation = argparse.Namespace(mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD)
    groups = dino_mc.color_views(crops, views, normalisation, torch.Generator())
    networks = []
    for amp in (args.amp, "off"):
        common.choose_attention(amp, cpu)
        autocast = common.autocast(amp, cpu)
        backbone = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
        networks.append((dino_mc.Network(backbone, dino_mc.DINOHead(384, K), 16), autocast))
    (start, our_autocast), (other, plain_autocast) = networks
    other.load_state_dict(start.state_dict())
    dino_loss, center = dino_mc.DINOLoss(K), torch.zeros(K)

    ours, usual = (*side(start, OURS), our_autocast), (*side(other, PLAIN), plain_autocast)

    def step(networks: tuple, loss_of: Callable, update: Callable) -> list[Tensor]:
        student, teacher, optimizer, autocast = networks
        with autocast:
            with torch.no_grad():
                teacher_out = teacher(groups[:1])[0].view(2, B, K).float()
            student_out = student(groups)[0].view(len(views), B, K).float()
        loss = loss_of(student_out, teacher_out)
        optimizer.zero_grad()
        loss.backward()
        grads = [] if bf16 else [p.grad.clone() for p in student.parameters() if p.grad is not None]
        update(student, teacher, optimizer)
        return [loss.detach(), *grads]

    tolerance = {"atol": 0, "rtol": 2e-3} if bf16 else {"atol": 1e-5}
    compare(f"step of {B} images, {'bf16, ' * bf16}{torch.get_num_threads()} threads",
            lambda: step(ours, lambda s, t: dino_loss(s, t, TEMP), our_step),
            lambda: step(usual, lambda s, t: plain_loss(s, t, center), plain_step), **tolerance)


if __name__ == "__main__":
    main()

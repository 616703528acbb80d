"""A step's update of DINO's ViT-S/16 and its head: clip, AdamW and moving average, against loops.

Run it as `python benchmarks/update.py`. Both start from the same weights and gradients and have to end with
the same ones.
"""

import copy
import sys
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dino_mc
from benchmarks.timing import compare

LR, DECAY, MOMENTUM, CLIP = 1e-3, 0.04, 0.996, 3.0


def plain_step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A loop over tensors for each of the three."""
    for p in student.parameters():
        if p.grad is not None:
            scale = CLIP / (p.grad.norm(2) + 1e-6)
            if scale < 1:
                p.grad.mul_(scale)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
            q.mul_(MOMENTUM).add_((1 - MOMENTUM) * p.detach())


def our_step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The script's."""
    dino_mc.clip_gradients(student.parameters(), CLIP)
    optimizer.step()
    common.update_ema(student, teacher, MOMENTUM)


def main() -> None:
    """One comparison."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch16_224", num_classes=0)
    student = dino_mc.Network(backbone, dino_mc.DINOHead(384, 65536), 16)
    for p in student.parameters():
        p.grad = 5 * torch.randn_like(p) / p.numel() ** 0.5 if p.requires_grad else None
    sides = {}
    for step, fast in ((our_step, {"fused": True}), (plain_step, {"foreach": False})):
        network = copy.deepcopy(student)
        for p, q in zip(network.parameters(), student.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        optimizer = torch.optim.AdamW(common.param_groups(network), lr=LR, weight_decay=DECAY, **fast)
        sides[step] = network, copy.deepcopy(network), optimizer

    def run(step: object) -> list[torch.Tensor]:
        network, teacher, optimizer = sides[step]
        step(network, teacher, optimizer)
        return [p.detach() for part in (network, teacher) for p in part.parameters()]

    count = sum(p.numel() for p in student.parameters()) / 1e6
    compare(f"clip, AdamW, average of {count:.0f} million parameters, {torch.get_num_threads()} threads",
            lambda: run(our_step), lambda: run(plain_step), atol=1e-6)


if __name__ == "__main__":
    main()

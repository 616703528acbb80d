"""A step's update of DINO's ViT-S/16 and its head: clip, AdamW and moving average, against loops.

Run it as `python benchmarks/update.py`. Both start from the same weights and gradients and have to end with
the same ones.
"""

import copy
import sys
from collections.abc import Callable
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


OURS, PLAIN = {"fused": True}, {"foreach": False}  # of AdamW


def side(start: nn.Module, fast: dict) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Student, teacher and optimizer of one side, from the same weights as the other's."""
    student = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(common.param_groups(student), lr=LR, weight_decay=DECAY, **fast)
    return student, copy.deepcopy(start).requires_grad_(False), optimizer


def main() -> None:
    """One comparison."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch16_224", num_classes=0)
    start = dino_mc.Network(backbone, dino_mc.DINOHead(384, 65536), 16)
    ours, usual = side(start, OURS), side(start, PLAIN)
    for p, q in zip(ours[0].parameters(), usual[0].parameters(), strict=True):
        if p.requires_grad:
            p.grad = 5 * torch.randn_like(p) / p.numel() ** 0.5
            q.grad = p.grad.clone()

    def run(step: Callable, student: nn.Module, teacher: nn.Module,
            optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        step(student, teacher, optimizer)
        return [p.detach() for part in (student, teacher) for p in part.parameters()]

    count = sum(p.numel() for p in start.parameters()) / 1e6
    compare(f"clip, AdamW, average of {count:.0f} million parameters, {torch.get_num_threads()} threads",
            lambda: run(our_step, *ours), lambda: run(plain_step, *usual), atol=1e-6)


if __name__ == "__main__":
    main()

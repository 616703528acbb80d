"""The linear probe against running the backbone in each epoch, and its heads against one at a time.

    python benchmarks/linear_probe.py

On one CPU thread, ResNet-18, 64 px. Both sides see the same images in the same order, and the heads have to
agree. They take turns; printed are the medians, their ratio, and its range over the rounds.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from benchmarks.timing import compare
from eval_linear import train_heads

SEED, C, B = 0, 30, 256


def epochs_of_batches(N: int, epochs: int) -> list[list[Tensor]]:
    """The batches of each epoch, in the order that train_heads draws."""
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(common.stream_seed(SEED, "head order", epoch))
        batches.append(list(torch.randperm(N, generator=generator).split(B)))
    return batches


def plain_head(features_of: Callable[[Tensor], Tensor], labels: Tensor, D: int, lr: float,
               epochs: int) -> nn.Linear:
    """One head, as usual: torch's SGD, features asked for anew for each batch."""
    head = nn.Linear(D, C)
    generator = torch.Generator().manual_seed(common.stream_seed(SEED, "head"))
    head.weight.data.copy_(0.01 * torch.randn(C, D, generator=generator))
    head.bias.data.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
    batches = epochs_of_batches(len(labels), epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (epochs * len(batches[0])))))
    for batch in sum(batches, []):
        with torch.no_grad():
            x = features_of(batch)
        optimizer.zero_grad()
        F.cross_entropy(head(x), labels[batch]).backward()
        optimizer.step()
        scheduler.step()
    return head


def heads(features: Tensor, labels: Tensor, lrs: list[float], epochs: int) -> tuple[Tensor, Tensor]:
    """All heads at once, as eval_linear.py trains them."""
    args = argparse.Namespace(epochs=epochs, batch_size=B, schedule=None, seed=SEED)
    return train_heads(lambda _: features, labels, torch.arange(len(labels)), C, lrs, args)


def main() -> None:
    """Both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    lrs = [10 ** (-2 + i / 10) for i in range(20)]

    x, labels, epochs = torch.randn(8000, 512), torch.randint(C, (8000,)), 5

    def heads_at_once() -> tuple[Tensor, Tensor]:
        return heads(x, labels, lrs, epochs)

    def one_by_one() -> tuple[Tensor, Tensor]:
        single = [plain_head(lambda batch: x[batch], labels, 512, lr, epochs) for lr in lrs]
        return tuple(torch.stack([getattr(head, part).data for head in single])
                     for part in ("weight", "bias"))

    began = time.perf_counter()
    heads(x, labels, lrs, 100)
    print(f"20 heads, 100 epochs of 8,000 features of 512: {time.perf_counter() - began:.1f} s", flush=True)
    compare("20 heads, 5 epochs, at once against one by one", heads_at_once, one_by_one, rounds)

    backbone = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.rand(192, 3, 64, 64)
    few = labels[:192]

    def features() -> Tensor:
        with torch.no_grad():
            return torch.cat([backbone(batch) for batch in images.split(B)])

    def probe(rates: list[float]) -> tuple[Tensor, Tensor]:
        W, b = heads(features(), few, rates, epochs)
        return W[:1], b[:1]

    def rerun() -> tuple[Tensor, Tensor]:
        head = plain_head(lambda batch: backbone(images[batch]), few, 512, lrs[0], epochs)
        return head.weight.data[None], head.bias.data[None]

    compare("one rate, 5 epochs, features once against in each", lambda: probe(lrs[:1]), rerun, rounds)
    compare("20 rates, the same", lambda: probe(lrs), rerun, rounds, 20)


if __name__ == "__main__":
    main()

"""MHCL's loss, forward and backward, against the plain way: clone the queue and mix its negatives.

    python benchmarks/mhcl_loss.py

Both give the same loss and gradient, which is checked first. Then the two take turns. Printed are the ratio
of the times and that of the peak memory beside the queue, which a thread reads off while steps run in a fresh
process. On the CPU, under Linux.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import mhcl
from benchmarks.timing import compare

WEIGHTS = (*mhcl.WEIGHTS, *mhcl.HARD_WEIGHTS)


def plain_loss(loss: mhcl.MHCLLoss, q: Tensor, k: Tensor, hard: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A row at a time on a copy of the queue, whose hard rows are mixed."""
    lam, mu, permutation = hard
    queue = loss.queue.clone()
    total = 0.0
    for row, weight in enumerate(WEIGHTS):
        s = row % 4
        query, key, negatives = q[:, s], k[:, s], queue[row]  # B x C, B x C, C x K
        if row >= 4:
            query, key = (1 + lam[s]) * query - lam[s] * key, (1 + lam[s]) * key - lam[s] * query
            negatives = mu[s] * negatives + (1 - mu[s]) * negatives[:, permutation]
        l_pos = torch.einsum("bc,bc->b", query, key).unsqueeze(1)
        l_neg = torch.einsum("bc,ck->bk", query, negatives)
        logits = torch.cat([l_pos, l_neg], 1) / loss.moco_t
        total = total + weight * F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    return total


def our_loss(loss: mhcl.MHCLLoss, q: Tensor, k: Tensor, hard: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The script's, with its figures for the log."""
    value, _, parts = loss(q, k, hard)
    mhcl.log_figures(q, k, q[:, -1].detach(), parts, loss.moco_t)
    return value


SIDES = {"plain": plain_loss, "mhcl.py": our_loss}


def setup(args: argparse.Namespace) -> tuple:
    """Loss with a queue of noise, queries, keys and a step's draws."""
    torch.manual_seed(0)
    loss = mhcl.MHCLLoss(WEIGHTS, 128, args.moco_k, 0.2)
    q, k = (F.normalize(torch.randn(args.batch, 4, 128), dim=-1) for _ in range(2))
    hard = argparse.Namespace(seed=0, a=1.0, b=0.1, moco_k=args.moco_k)
    return loss, q.requires_grad_(), k, mhcl.draw_hard(hard, 0, S=4)


def step(side: str, loss: mhcl.MHCLLoss, q: Tensor, k: Tensor, hard: tuple) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    value = SIDES[side](loss, q, k, hard)
    return value.detach(), torch.autograd.grad(value, q)[0]


def resident() -> float:
    """MB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_memory(side: str, inputs: tuple) -> float:
    """MB that a step takes at its peak, beside what was there before the first."""
    before, samples, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            samples.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step(side, *inputs)
    done.set()
    watcher.join()
    return max(samples) - before


def main() -> None:
    """Checks that both sides agree, then measures them in turn; or prints the peak memory of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moco_k", type=int, default=65536, help="K")
    parser.add_argument("--batch", type=int, default=32, help="B")
    parser.add_argument("--rounds", type=int, default=9, help="of each side")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--memory_of", choices=SIDES, help="print this side's peak in MB, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = setup(args)
    if args.memory_of:
        print(peak_memory(args.memory_of, inputs))
        return
    compare(f"loss and gradient, K {args.moco_k}, B {args.batch}, {args.threads} CPU threads",
            lambda: step("mhcl.py", *inputs), lambda: step("plain", *inputs), args.rounds,
            atol=1e-5, rtol=1.3e-6)
    memory = {side: [] for side in SIDES}
    for _ in range(3):
        for side in SIDES:
            command = [sys.executable, *sys.argv, "--memory_of", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory[side].append(float(output))
    for side in SIDES:
        print(f"{side:8} peak {statistics.median(memory[side]):5.0f} MB beside the queue")
    ratios = [plain / ours for plain, ours in zip(memory["plain"], memory["mhcl.py"], strict=True)]
    print(f"plain / mhcl.py, memory: {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max "
          f"{max(ratios):.2f})")


if __name__ == "__main__":
    main()

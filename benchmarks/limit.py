"""How near a training step is to the processor's limit: the bare matrix products and convolutions of it.

    python benchmarks/limit.py --data_path IMAGES

Each script does a few steps of its own, at 224 px and in the small recipe of compare.py. They are watched for
the shapes of its matrix products and convolutions, forward and backward, which are then run alone, in bf16,
each warm in the cache. Their sum is the limit; the figure is the median step over it. Waiting for data is
left out. With --operators also the shares of the operators that take most of a step, by torch's profiler.
"""

import argparse
import contextlib
import importlib
import io
import json
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.compare import flags_of
from benchmarks.timing import median_seconds

STEPS = {
    "DINO-MC, ViT-S/16, 4 images": "dino_mc.py --arch vit_small_patch16_224 --batch_size_per_gpu 4",
    "MHCL, ResNet-50, 8 images": "mhcl.py --arch resnet50 --batch_size_per_gpu 8 --moco_k 4096",
    "CMID, ResNet-50, 4 images": "cmid.py --arch resnet50 --batch_size_per_gpu 4 --moco_k 4096",
    "DSPT, ViT-B/16, 8 images": "dspt_mae.py --arch vit_base_patch16_224 --batch_size_per_gpu 8",
} | {f"{name}, small recipe": flags_of(name, "short") for name in ("dino_mc", "mhcl", "cmid", "mae")}
aten = torch.ops.aten
BARE = {op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution,
                              aten.convolution_backward)}


class Watch(TorchDispatchMode):
    """Counts the calls of BARE by function and arguments, of which tensors count by shape and strides."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Calls the function."""
        if function in BARE:
            self.calls[function, tuple(map(described, args))] += 1
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Layout:
    """Of a tensor."""

    shape: tuple
    strides: tuple

    def make(self) -> Tensor:
        """Random numbers in bf16."""
        numel = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return torch.randn(numel).bfloat16().as_strided(self.shape, self.strides)


def described(x: object) -> object:
    """An argument of a call as something that can be counted."""
    if isinstance(x, Tensor):
        return Layout(tuple(x.shape), x.stride())
    return tuple(x) if isinstance(x, list) else x


def seconds_of(function: object, arguments: tuple, rounds: int = 3) -> float:
    """Of one call, the median of `rounds` warm ones."""
    arguments = [x.make() if isinstance(x, Layout) else list(x) if isinstance(x, tuple) else x
                 for x in arguments]
    return median_seconds(lambda: function(*arguments), rounds)


def steps(flags: str, data: Path, count: int) -> list[float]:
    """Seconds that each step of a script takes, without the wait for data."""
    script, *words = flags.split()
    with tempfile.TemporaryDirectory() as out:
        words += ["--max_steps", count, "--data_path", data, "--output_dir", out, "--epochs", 100]
        words += ["--log_every", 1, "--num_workers", 1, "--device", "cpu"]
        sys.argv = [script, *map(str, words)]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script.removesuffix(".py")).main()
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line["step_seconds"] - line["data_seconds"] for line in lines if "step" in line]


def operators(flags: str, data: Path, count: int) -> list[tuple[str, float]]:
    """Operators and their shares of the time in all operators of a few steps, the most costly first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        steps(flags, data, count)
    costs = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return [(name, costs[name] / sum(costs.values())) for name in sorted(costs, key=costs.get, reverse=True)]


def main() -> None:
    """A line for each script, with --operators another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, required=True, help="a folder of images")
    parser.add_argument("--steps", type=int, default=8, help="to time, after two")
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--operators", type=int, default=0, help="so many of the most costly ones")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, flags in STEPS.items():
        if args.only not in name:
            continue
        step = statistics.median(steps(flags, args.data_path, args.steps + 2)[2:])
        with Watch() as watch:
            steps(flags, args.data_path, 2)
        limit = sum(count * seconds_of(*call) for call, count in watch.calls.items()) / 2
        print(f"{name}: {step:.2f} s a step, its bare products and convolutions {limit:.2f} s: "
              f"{step / limit:.2f} times the limit", flush=True)
        if args.operators:
            most = operators(flags, args.data_path, args.steps)[: args.operators]
            print("    " + ", ".join(f"{operator} {share:.1%}" for operator, share in most), flush=True)


if __name__ == "__main__":
    main()

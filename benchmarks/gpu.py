"""Images per second of each method on one GPU, and of the same step when batches cost nothing.

    python benchmarks/gpu.py

Every run is the script itself at 224 px, in the GPU's default precision, on drawn JPEG files of 256 px or
the images of --data_path: 8 log intervals of as many steps as there are workers, which deliver in waves. The
figures are means without the first two (start, and what was fetched ahead) and the last: images per second
and the GPU's peak memory, as it is, on batches that are in memory already (the ceiling: what is lost against
it was waiting for data), and with --compile. DINO-MC ViT-S/16 also runs with the usual way of doing all
augmentation in the workers, with torchvision's transforms on PIL images, which takes 20 GB of shared memory
with 16 workers.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmid
import common
import dino_mc
import dspt_mae
import mhcl
from benchmarks.augmentation import draw_jpegs, pil_transform

RUNS = {  # script, flags, images in a batch
    "DINO-MC ViT-S/16": (dino_mc, "--arch vit_small_patch16_224", 256),
    "DINO-MC ResNet-50": (dino_mc, "--arch resnet50", 128),
    "MHCL ResNet-50": (mhcl, "--arch resnet50", 256),
    "CMID ResNet-50": (cmid, "--arch resnet50", 128),
    "DSPT ViT-B/16": (dspt_mae, "--arch vit_base_patch16_224", 512),
}
build_loader = common.build_loader


def precomputed(*args: object) -> Iterator:
    """In place of common.build_loader: its first batches again and again."""
    batches = iter(build_loader(*args))
    return itertools.cycle([next(batches) for _ in range(2)])


class PILDataset(torch.utils.data.Dataset):
    """In place of dino_mc.ViewDataset: finished float views, from torchvision's transforms on PIL images."""

    def __init__(self, samples: common.Samples, views: list[dino_mc.View], seed: int, locations: None = None):
        self.paths, self.transforms = samples.paths, [pil_transform(view) for view in views]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor]:
        """Returns V tensors float 3 x size x size."""
        image = Image.open(self.paths[key[1]]).convert("RGB")
        return [transform(image) for transform in self.transforms]


def group_views(crops: list[Tensor], views: list[dino_mc.View], *_: object) -> list[Tensor]:
    """In place of dino_mc.color_views, for views that are finished."""
    pairs = itertools.groupby(zip(crops, views, strict=True), key=lambda pair: pair[1].size)
    return [torch.cat([crop for crop, _ in members]) for _, members in pairs]


def measure(script: object, flags: list[str], batch: int, loader: Callable = build_loader) -> dict | None:
    """Runs `script`; returns images per second and peak GB, or None where the GPU's memory is too small."""
    interval = max(1, common.worker_count(None))
    steps = 8 * interval
    common.build_loader = loader
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out:
        run = {"output_dir": out, "batch_size_per_gpu": batch, "max_steps": steps, "log_every": interval,
               "save_every": 10**6, "save_minutes": 10**6}  # nothing is written before the end
        more = [word for name, value in run.items() for word in (f"--{name}", str(value))]
        sys.argv = [f"{script.__name__}.py", *flags, *more]
        try:
            script.main()
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()[1:]]
    if lines[-1]["step"] != steps:
        sys.exit("stopped")
    seconds = statistics.mean(line["step_seconds"] for line in lines[2:-1])
    return {"images_per_s": batch / seconds, "GB": torch.cuda.max_memory_allocated() / 1e9}


def show(label: str, run: dict | None, ours: dict) -> None:
    """Prints the figures of a run, and how the run as it is compares."""
    print(f"{label}: out of memory" if run is None else
          f"{label}: {run['images_per_s']:.0f} images/s, {run['GB']:.1f} GB; as it is runs "
          f"{ours['images_per_s'] / run['images_per_s']:.2f} times as fast", flush=True)


def main() -> None:
    """A line for each run, as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="images; default: 1,000 drawn scenes")
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS), help="these methods")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU, and torch finds none")
    print(f"{common.device_name(torch.device('cuda', 0))}, {common.worker_count(None)} workers, "
          f"{common.versions()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data_path:
            draw_jpegs(Path(folder) / "data", 1000)
        data = ["--data_path", args.data_path or f"{folder}/data"]
        for name in args.only:
            script, more, batch = RUNS[name]
            flags = [*data, *more.split()]
            while not (ours := measure(script, flags, batch)):
                batch //= 2
            label = f"{name}, batch {batch}"
            show(f"{label}, as it is", ours, ours)
            show(f"{label}, batches from memory", measure(script, flags, batch, precomputed), ours)
            if name == "DINO-MC ViT-S/16":
                kept = dino_mc.ViewDataset, dino_mc.color_views
                dino_mc.ViewDataset, dino_mc.color_views = PILDataset, group_views
                show(f"{label}, PIL in the workers", measure(script, flags, batch), ours)
                dino_mc.ViewDataset, dino_mc.color_views = kept
            try:
                show(f"{label}, --compile", measure(script, [*flags, "--compile"], batch), ours)
            except Exception as error:  # no compiler on this machine, or the like: the other runs follow
                print(f"{name}, --compile failed: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()

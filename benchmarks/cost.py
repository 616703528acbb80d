"""How time and memory of a step grow with batch, image size, local crops, queue and number of images.

    python benchmarks/cost.py --data_path IMAGES

Runs each script through its command line for 8 steps per value, one run after the other, and prints the
step_seconds and data_seconds of the last 4 steps from log.jsonl, and the peak memory of the largest process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = """--img_size 64 --batch_size_per_gpu 16 --num_workers 1 --device cpu --epochs 1 --warmup_epochs 0
    --max_steps 8 --log_every 4"""
BASES = {
    "dino_mc.py": "--arch resnet18 --local_crops_number 2 --out_dim 4096",
    "mhcl.py": "--arch resnet18 --moco_k 4096",
    "cmid.py": "--arch resnet18 --moco_k 4096 --mask_patch_size 16 --warmup_teacher_temp_epochs 0",
    "dspt_mae.py": """--arch vit_tiny_patch16_224 --patch_size 8 --decoder_dim 128 --decoder_depth 2
        --decoder_heads 4""",
}
GROWS = [
    ("dino_mc.py", "batch_size_per_gpu", (8, 16, 32, 64)),
    ("dino_mc.py", "img_size", (48, 64, 96)),
    ("dino_mc.py", "local_crops_number", (0, 2, 4, 6)),
    ("dino_mc.py", "out_dim", (4096, 65536)),
    ("mhcl.py", "batch_size_per_gpu", (16, 64)),
    ("mhcl.py", "moco_k", (4096, 16384, 65536)),
    ("cmid.py", "img_size", (64, 96)),
    ("dspt_mae.py", "img_size", (64, 96)),
    ("dspt_mae.py", "mask_ratio", (0.75, 0.5)),
]


def measure(script: str, flags: list[str]) -> tuple[float, float, float]:
    """Seconds of a step, of these waited for data, and peak MB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, script, *flags, "--output_dir", out]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)
        if status:
            sys.exit(f"failed: {' '.join(command)}")
        last = json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1])
    if last["step"] != 8:
        sys.exit("error: --data_path: must hold 512 images or more")
    return last["step_seconds"], last["data_seconds"], usage.ru_maxrss / 1024


def main() -> None:
    """A row for each value."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="at least 512 images of 96 px or more")
    parser.add_argument("--scripts", choices=BASES, nargs="+", default=list(BASES), help="these alone")
    args = parser.parse_args()
    data = ["--data_path", str(Path(args.data_path).resolve())]
    for script, flag, values in (row for row in GROWS if row[0] in args.scripts):
        for value in values:
            flags = [*data, *SHORT.split(), *BASES[script].split(), f"--{flag}", str(value)]
            seconds, waited, memory = measure(script, flags)
            print(f"{script:12} --{flag:18} {value:<6g} {1000 * seconds:6.0f} ms a step, of these "
                  f"{1000 * waited:4.0f} for data, {memory:5.0f} MB", flush=True)


if __name__ == "__main__":
    main()

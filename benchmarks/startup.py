"""How long `--help` of each script takes, against importing torch, torchvision and timm.

Run it as `python benchmarks/startup.py`. The target is under twice the import.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("dino_mc.py", "mhcl.py", "cmid.py", "dspt_mae.py", "eval_knn.py", "eval_linear.py",
           "eval_segmentation.py", "eval_detection.py")


def seconds(*command: str) -> float:
    """Time of a fresh Python."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Takes turns, 5 rounds."""
    commands = {"import": ("-c", "import torch, torchvision, timm")}
    commands |= {name: (name, "--help") for name in SCRIPTS}
    times = {name: [] for name in commands}
    for _ in range(5):
        for name, command in commands.items():
            times[name].append(seconds(*command))
    for name in SCRIPTS:
        ratios = sorted(a / b for a, b in zip(times[name], times["import"], strict=True))
        print(f"{name} --help: {statistics.median(times[name]):.2f} s, "
              f"{statistics.median(times[name]) / statistics.median(times['import']):.2f} of the import "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()

"""CMID's parts under one budget: reconstruction, + global, + local with true and with shuffled positions.

    python benchmarks/cmid_ablation.py --data_path AID --output_dir OUT

DATA_PATH has class folders in train/ and val/; the images in train/ are used without labels. Each variant is
a run of cmid.py for each seed, in a folder of OUT: started again, it keeps what is finished and resumes what
is not. At the end eval_knn.py evaluates them; then mean and standard deviation over the seeds are printed.
With the default 250 steps of 16 images at 96 px about 12 minutes a run on one CPU thread.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmid
import eval_knn

VARIANTS = {"reconstruction": (1, 0, 0), "global": (1, 1, 0), "local": (1, 1, 1), "local_shuffled": (1, 1, 1)}
match_positions = cmid.match_positions


def match_at_random(geometry: Tensor, other: Tensor, side: int, num_matches: int) -> tuple[Tensor, ...]:
    """The same positions as match_positions, but random ones of the other crop as their matches."""
    positions, matches, distances = match_positions(geometry, other, side, num_matches)
    generator = torch.Generator().manual_seed(int(geometry.sum()))  # repeatable, another in each step
    random = torch.rand(len(matches), side**2, generator=generator).argsort(1)[:, :num_matches]
    return positions, random.to(matches.device), distances


def main() -> None:
    """Runs the variants one after the other, then evaluates all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="holds train/ and val/")
    parser.add_argument("--output_dir", required=True, help="gets a folder for each variant")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS), help="these variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run with each")
    parser.add_argument("--steps", type=int, default=250, help="of 16 images")
    args = parser.parse_args()
    folders = {name: [f"{args.output_dir}/{name}_{seed}" for seed in args.seeds] for name in args.only}
    for seed in range(len(args.seeds)):
        for name in args.only:
            cmid.match_positions = match_at_random if name == "local_shuffled" else match_positions
            flags = f"""--data_path {args.data_path}/train --output_dir {folders[name][seed]} --arch resnet18
                --img_size 96 --mask_patch_size 16 --moco_k 1024 --batch_size_per_gpu 16 --lr 4e-3 --epochs 1
                --warmup_epochs .1 --momentum .98 --local_dim 256 --teacher_temp .04 --num_workers 0
                --warmup_teacher_temp_epochs 0 --log_every 25 --max_steps {args.steps}
                --seed {args.seeds[seed]}"""
            weights = " ".join(map(str, VARIANTS[name]))
            sys.argv = ["cmid.py", *flags.split(), "--loss_weights", *weights.split()]
            cmid.main()
    weights = sum(folders.values(), []) + ["random", "image_stats"]
    sys.argv = ["eval_knn.py", "--data_path", args.data_path, "--output_dir", args.output_dir,
                "--nb_knn", "20", "--num_workers", "0", "--weights", *weights]
    eval_knn.main()
    lines = (Path(args.output_dir) / "results.jsonl").read_text().splitlines()
    top1 = {line["weights"]: line["top1"]["20"] for line in map(json.loads, lines)}
    for name in args.only:
        values = [top1[folder] for folder in folders[name]]
        deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{name:16s} kNN {statistics.mean(values):.2f} %{deviation}, {len(values)} seeds")


if __name__ == "__main__":
    main()

"""CMID's parts under one budget: reconstruction, + global, + local with true and with shuffled positions.

    python benchmarks/cmid_ablation.py --data_path AID --output_dir OUT

DATA_PATH has class folders in train/ and val/; the images in train/ are used without labels. Each variant is
a run of cmid.py in a folder of OUT: started again, what is finished is kept, what is not goes on. At the end
eval_knn.py compares them. With the default 250 steps of 16 images at 96 px about 10 minutes each on one CPU
thread.
"""

import argparse
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
    parser.add_argument("--steps", type=int, default=250, help="of 16 images")
    args = parser.parse_args()
    for name in args.only:
        cmid.match_positions = match_at_random if name == "local_shuffled" else match_positions
        flags = f"""--data_path {args.data_path}/train --output_dir {args.output_dir}/{name} --arch resnet18
            --img_size 96 --mask_patch_size 16 --moco_k 1024 --batch_size_per_gpu 16 --lr 4e-3 --epochs 1
            --warmup_epochs .1 --momentum .98 --local_dim 256 --teacher_temp .04
            --warmup_teacher_temp_epochs 0 --log_every 25 --max_steps {args.steps}"""
        weights = " ".join(map(str, VARIANTS[name]))
        sys.argv = ["cmid.py", *flags.split(), "--loss_weights", *weights.split()]
        cmid.main()
    folders = [f"{args.output_dir}/{name}" for name in args.only]
    sys.argv = ["eval_knn.py", "--data_path", args.data_path, "--output_dir", args.output_dir,
                "--nb_knn", "20", "--weights", *folders, "random", "image_stats"]
    eval_knn.main()


if __name__ == "__main__":
    main()

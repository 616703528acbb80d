"""Every method under one budget on one folder: kNN and linear probe, mean and deviation over seeds.

    python benchmarks/compare.py --data_path AID --other_path LANDSAT --output_dir OUT

DATA_PATH has class folders in train/ and val/; the images in train/ are used without labels. The budget is
time of one CPU thread: each method does as many epochs as take about as long. DSPT continues an MAE of the
images in OTHER_PATH, whose time comes on top. Judged are the last checkpoints. Started again, this skips what
is done and continues with what is not; several may run at once with different --seeds or --methods.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DINO = """dino_mc.py --arch resnet18 --img_size 64 --local_crops_number 2 --batch_size_per_gpu 32 --epochs 1
    --warmup_epochs .2 --out_dim 4096 --use_bn_in_head --freeze_last_layer 0 --drop_path 0 --lr 8e-3
    --momentum_teacher .98 --teacher_temp .03 --weight_decay_end .1"""
MOCO = "mhcl.py --arch resnet18 --img_size 64 --epochs 2 --batch_size_per_gpu 32 --moco_k 1024 --lr .12"
MAE = """dspt_mae.py --arch vit_tiny_patch16_224 --img_size 64 --patch_size 8 --decoder_dim 128
    --decoder_depth 2 --decoder_heads 4 --lr 2e-3"""
METHODS = {
    "dino": f"{DINO} --mode dino",
    "dino_mc": DINO,
    "moco_v2": f"{MOCO} --no-mhcl",
    "mhcl": MOCO,
    "cmid": """cmid.py --arch resnet18 --img_size 64 --mask_patch_size 16 --epochs 1 --warmup_epochs .1
        --batch_size_per_gpu 16 --moco_k 1024 --lr 4e-3 --momentum .98 --local_dim 256 --teacher_temp .04
        --warmup_teacher_temp_epochs 0""",
    "mae": f"{MAE} --epochs 3 --warmup_epochs .5",
    "dspt": f"{MAE} --epochs 3 --warmup_epochs .5",
}
OTHER = f"{MAE} --epochs 100 --warmup_epochs 10 --batch_size_per_gpu 32"  # where DSPT begins, on few images
BASELINES = {
    "image_stats": "--weights image_stats",
    "random_resnet18": "--weights random --arch resnet18",
    "random_vit_tiny": "--weights random --arch vit_tiny_patch16_224 --patch_size 8",
}
JUDGES = {"knn": "eval_knn.py --img_size 96 --nb_knn 20", "linear": "eval_linear.py --img_size 96"}


def run(flags: str, *more: object) -> None:
    """One of the scripts, on one CPU thread that does its own loading; a failure ends this script too."""
    words = [*flags.split(), "--num_workers", "0", "--device", "cpu", *map(str, more)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def results(out: Path, judge: str) -> list[dict]:
    """What an evaluation wrote of one run; nothing before it is done."""
    path = out / judge / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pretrain(name: str, out: Path, data: Path, other: Path, *more: object) -> None:
    """One run, or its rest; `more` flags and their values."""
    init = []
    if name == "dspt":
        start = out.with_name(out.name.replace("dspt", "other"))
        run(OTHER, "--data_path", other, "--output_dir", start, *more)
        init = ["--init", start]
    run(METHODS[name], "--data_path", data / "train", "--output_dir", out, *more, *init)


def minutes(out: Path) -> float:
    """What the steps of a run took, from its log."""
    seconds, done = 0.0, 0
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if "step" in line:
            seconds += (line["step"] - done) * line["step_seconds"]
            done = line["step"]
    return seconds / 60


def main() -> None:
    """Pre-trains, judges, prints the table of all that is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, required=True, help="holds train/ and val/")
    parser.add_argument("--other_path", type=Path, required=True, help="images of another domain, for DSPT")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder for each run")
    parser.add_argument("--methods", choices=[*METHODS, *BASELINES], nargs="+",
                        default=[*METHODS, *BASELINES], help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run with each")
    parser.add_argument("--amp", choices=["auto", "off"], default="auto", help="of the pre-training")
    args = parser.parse_args()
    data, other, root = (path.resolve() for path in (args.data_path, args.other_path, args.output_dir))

    for seed in args.seeds:
        for name in args.methods:
            out = root / f"{name}_{seed}"
            for judge, flags in JUDGES.items():
                if results(out, judge):
                    continue
                if name in METHODS and judge == "knn":
                    pretrain(name, out, data, other, "--seed", seed, "--amp", args.amp)
                weights = BASELINES[name].split() if name in BASELINES else ["--weights", out]
                if judge == "linear" and name in ("random_vit_tiny", "mae", "dspt"):
                    weights.append("--avgpool")
                run(flags, "--data_path", data, "--output_dir", out / judge, "--seed", seed, *weights)

    for name in [*BASELINES, *METHODS]:
        folders, row = sorted(root.glob(f"{name}_[0-9]*")), f"{name:16}"
        for judge in JUDGES:
            lines = [line for out in folders for line in results(out, judge)]
            top1 = [line["top1"]["20"] if judge == "knn" else line["top1"] for line in lines]
            if top1:
                deviation = f"+- {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
                row += f"{judge} {statistics.mean(top1):.1f} {deviation:6} % ({len(top1)} seeds)   "
        times = [minutes(out) for out in folders if (out / "log.jsonl").exists()]
        print(row + (f"{statistics.mean(times):.1f} minutes" if times else ""))


if __name__ == "__main__":
    main()

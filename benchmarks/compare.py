"""Every method under one budget on one folder, then each task: mean and deviation over seeds.

    python benchmarks/compare.py --data_path AID --other_path LANDSAT --output_dir OUT
    python benchmarks/compare.py --data_path AID --other_path LANDSAT --output_dir OUT --budget long \
        --seeds 0 1 --roads_path ROADS --change_path SZTAKI --boxes_path UCAS

DATA_PATH has class folders in train/ and val/; the images in train/ are used without labels. The budget is
time of one CPU thread, about 3 minutes or 40: each method does as many epochs as take about as long. DSPT
continues an MAE of the images in OTHER_PATH, whose time comes on top. The last checkpoint is evaluated; of
long runs also each fifth by kNN, drawn in curve.png. A task whose folder is not given is left out. Started
again, this skips what is done and resumes what is not; several may run at once with different --seeds or
--methods.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
DINO = """dino_mc.py --arch resnet18 --batch_size_per_gpu 32 --out_dim 4096 --use_bn_in_head
    --freeze_last_layer 0 --drop_path 0 --lr 8e-3 --teacher_temp .03 --weight_decay_end .1"""
MOCO = "mhcl.py --arch resnet18 --lr .12"
CMID = """cmid.py --arch resnet18 --mask_patch_size 16 --local_dim 256 --teacher_temp .04
    --warmup_teacher_temp_epochs 0"""
MAE = """dspt_mae.py --arch vit_tiny_patch16_224 --patch_size 8 --decoder_dim 128 --decoder_depth 2
    --decoder_heads 4 --lr 2e-3"""
SHORT = {
    DINO: "--local_crops_number 2 --epochs 1 --warmup_epochs .2 --momentum_teacher .98",
    MOCO: "--epochs 2 --batch_size_per_gpu 32 --moco_k 1024",
    CMID: "--epochs 1 --warmup_epochs .1 --batch_size_per_gpu 16 --moco_k 1024 --lr 4e-3 --momentum .98",
    MAE: "--epochs 3 --warmup_epochs .5"}
LONG = {
    DINO: "--local_crops_number 4 --warmup_epochs .5 --momentum_teacher .99",
    MOCO: """--batch_size_per_gpu 64 --moco_k 512 --moco_t .1 --optimizer adamw --lr 4e-3 --weight_decay .05
        --warmup_epochs .5""",
    CMID: "--warmup_epochs .5 --batch_size_per_gpu 32 --moco_k 512 --lr 2e-3 --momentum .99",
    MAE: "--warmup_epochs 2"}
BUDGETS = {"short": SHORT, "long": LONG}
PARTS = 5  # of a long run
METHODS = {  # recipe, flags, epochs of a long run
    "dino": (DINO, "--mode dino", 8),
    "dino_mc": (DINO, "", 7),
    "moco_v2": (MOCO, "--no-mhcl", 26),
    "mhcl": (MOCO, "", 24),
    "cmid": (CMID, "", 12),
    "mae": (MAE, "", 50),
    "dspt": (MAE, "", 50),
}
OTHER = f"{MAE} --img_size 64 --epochs 100 --warmup_epochs 10 --batch_size_per_gpu 32"  # where DSPT begins
BASELINES = {
    "colours": "",
    "random_resnet18": "--weights random --arch resnet18",
    "random_vit_tiny": "--weights random --arch vit_tiny_patch16_224 --patch_size 8",
}
SEGMENTATION = "eval_segmentation.py --head upernet --head_dim 64 --img_size 128 --amp auto"
TASKS = {  # name: flag of its folder, command, columns of the table
    "knn": ("data_path", "eval_knn.py --img_size 96 --nb_knn 20 --amp auto", {
        "kNN": lambda line: line["top1"]["20"]}),
    "linear": ("data_path", "eval_linear.py --img_size 96 --train_fraction .01 .1 1 --amp auto", {
        f"linear {share:.0%}": lambda line, share=share: line["top1"] if line["train_fraction"] == share
        else None for share in (1, 0.1, 0.01)}),
    "finetune": ("data_path", """eval_linear.py --finetune --img_size 96 --train_fraction .1 --epochs 10
        --batch_size_per_gpu 32 --lr 1e-2 --amp auto""", {"fine-tuned 10%": lambda line: line["top1"]}),
    "roads": ("roads_path", f"{SEGMENTATION} --epochs 4", {"roads mIoU": lambda line: line["miou"]}),
    "change": ("change_path", f"{SEGMENTATION} --epochs 8", {"change F1": lambda line: line["f1"]}),
    "boxes": ("boxes_path", """eval_detection.py --no-finetune --img_size 384 --fpn_dim 64 --head_convs 2
        --epochs 3 --batch_size_per_gpu 2 --lr 2e-3 --amp auto""", {"boxes AP50": lambda line: line["ap50"]}),
}
DENSE = ("roads", "change", "boxes")


def run(flags: str, *more: object) -> None:
    """One of the scripts, on one CPU thread that does its own loading; a failure ends this script too."""
    words = [*flags.split(), "--num_workers", "0", "--device", "cpu", *map(str, more)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def flags_of(name: str, budget: str, given: int | None = None) -> str:
    """Script and flags of a method; `given`: epochs of a long run in place of its own."""
    recipe, flags, epochs = METHODS[name]
    own = f"--epochs {given or epochs}" if budget == "long" else ""
    return f"{recipe} {flags} --img_size 64 {BUDGETS[budget][recipe]} {own}"


def read(path: Path) -> list[dict]:
    """The lines of a log or of results; none before they are written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pretrain(name: str, out: Path, args: argparse.Namespace, seed: int) -> None:
    """One run, or its rest. A long one keeps its backbone at each fifth and evaluates it by kNN."""
    flags, more = flags_of(name, args.budget, args.epochs), ["--seed", seed, "--amp", args.amp]
    if name == "dspt":
        start = out.with_name(out.name.replace("dspt", "other"))
        run(OTHER, "--data_path", args.other_path, "--output_dir", start, *more)
        more += ["--init", start]
    more += ["--data_path", args.data_path / "train", "--output_dir", out]
    if args.budget == "short":
        return run(flags, *more)
    run(flags, *more, "--max_steps", 1)
    total = read(out / "log.jsonl")[0]["steps"]
    for i in range(1, PARTS + 1):
        kept = out / "curve" / str(total * i // PARTS)
        if not kept.exists():
            run(flags, *more, "--max_steps", kept.name)
            shutil.copytree(out / "backbone", kept)
        if not read(kept / "knn" / "results.jsonl"):
            run(TASKS["knn"][1], "--data_path", args.data_path, "--weights", kept, "--output_dir",
                kept / "knn")


def evaluate(name: str, out: Path, args: argparse.Namespace, seed: int) -> None:
    """All tasks whose folder is given, of one run or baseline; those that are there are skipped."""
    for task, (folder, flags, _) in TASKS.items():
        data = getattr(args, folder)
        if not data or name == "colours" and task in ("finetune", "boxes"):
            continue
        for head_seed in args.head_seeds if name in METHODS and task in DENSE else [seed]:
            results = out / f"{task}_{head_seed}"
            if read(results / "results.jsonl"):
                continue
            weights = BASELINES[name].split() if name in BASELINES else ["--weights", out]
            if name == "colours":
                weights = ["--weights", "pixels" if task in DENSE else "image_stats"]
            if task in ("linear", "finetune") and name in ("random_vit_tiny", "mae", "dspt"):
                weights.append("--avgpool")
            run(flags, "--data_path", data, "--output_dir", results, "--seed", head_seed, *weights)


def minutes(out: Path) -> float:
    """What the steps of a run took, from its log."""
    seconds, done = 0.0, 0
    for line in read(out / "log.jsonl"):
        if "step" in line:
            seconds += (line["step"] - done) * line["step_seconds"]
            done = line["step"]
    return seconds / 60


def print_table(root: Path) -> None:
    """A row for each method and baseline: mean, deviation and number of runs of each figure."""
    columns = {column: (task, figure) for task, (_, _, figures) in TASKS.items()
               for column, figure in figures.items()}
    print(" | ".join(["", "minutes", *columns]))
    for name in [*BASELINES, *METHODS]:
        folders = sorted(root.glob(f"{name}_[0-9]*"))
        row = [name, " ".join(f"{minutes(out):.1f}" for out in folders if name in METHODS)]
        for task, figure in columns.values():
            lines = [line for out in folders for path in out.glob(f"{task}_*/results.jsonl")
                     for line in read(path)]
            values = [value for value in map(figure, lines) if value is not None]
            deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.1f}{deviation} ({len(values)})" if values else "")
        print(" | ".join(row))


def draw_curves(root: Path, path: Path) -> None:
    """Draws kNN over the images seen: a line for each method, through the mean of its seeds."""
    curves = {}
    for name in METHODS:
        parts = {}
        for out in root.glob(f"{name}_[0-9]*"):
            log = read(out / "log.jsonl")
            for folder in (out / "curve").glob("*"):
                thousands = int(folder.name) * log[0]["effective_batch"] / 1000
                for line in read(folder / "knn" / "results.jsonl"):
                    parts.setdefault(thousands, []).append(line["top1"]["20"])
        if parts:
            curves[name] = [(x, statistics.mean(values)) for x, values in sorted(parts.items())]
    if not curves:
        return
    right = max(x for points in curves.values() for x, _ in points)
    low, high = (f(y for points in curves.values() for _, y in points) for f in (min, max))
    low, high = int(low // 5 * 5), int(-(-high // 5) * 5)
    picture = Image.new("RGB", (720, 420), "white")
    draw = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return 50 + 540 * x / right, 380 - 350 * (y - low) / (high - low)

    for y in range(low, high + 1, 5):
        draw.line([at(0, y), at(right, y)], "lightgray")
        draw.text((10, at(0, y)[1] - 6), f"{y} %", "black")
    for x in range(0, int(right) + 1, 20):
        draw.text((at(x, low)[0] - 4, 386), str(x), "black")
    draw.text((200, 402), "thousand images seen; kNN, k 20, 96 px", "black")
    colours = ("red", "darkorange", "royalblue", "navy", "green", "gray", "black")
    ends = []
    for (name, points), colour in zip(curves.items(), colours, strict=False):
        draw.line([at(*point) for point in points], colour, 2)
        ends.append([at(*points[-1])[1], name, colour])
    ends.sort()
    for i in range(1, len(ends)):  # names do not lie on each other
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + 14)
    for y, name, colour in ends:
        draw.text((600, y - 6), name, colour)
    picture.save(path)


def main() -> None:
    """Pre-trains, evaluates, prints the table of all that is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="holds train/ and val/")
    add("--other_path", type=Path, required=True, help="images of another domain, for DSPT")
    add("--output_dir", type=Path, required=True, help="gets a folder for each run")
    add("--budget", choices=list(BUDGETS), default="short", help="about 3 minutes or 40")
    add("--epochs", type=int, help="of long runs, where a CPU is slower: ours computes bf16")
    add("--methods", choices=[*METHODS, *BASELINES], nargs="+", default=[*METHODS, *BASELINES],
        help="these alone")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run with each")
    add("--amp", choices=["auto", "off"], default="auto", help="of the pre-training")
    add("--roads_path", type=Path, help="for eval_segmentation.py")
    add("--change_path", type=Path, help="the same, pairs of dates")
    add("--boxes_path", type=Path, help="for eval_detection.py")
    add("--head_seeds", type=int, nargs="+", default=[0, 1, 2], help="of these three tasks, on each run")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.resolve())

    for seed in args.seeds:
        for name in args.methods:
            out = args.output_dir / f"{name}_{seed}"
            if name in METHODS:
                pretrain(name, out, args, seed)
            evaluate(name, out, args, seed)
    print_table(args.output_dir)
    draw_curves(args.output_dir, args.output_dir / "curve.png")


if __name__ == "__main__":
    main()

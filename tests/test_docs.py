"""Every command in the READMEs, the scripts' docstrings and the benchmarks is one the scripts accept."""

import importlib
import inspect
import re
import shlex

import pytest
import torch
from conftest import ROOT, SCRIPTS

import dino_mc
from benchmarks import compare, gpu, limit


def commands():
    """(script, words after its name) of each command that starts one of the scripts."""
    found = []
    for name in ("README.md", "benchmarks/README.md", *(f"{script}.py" for script in SCRIPTS)):
        text = (ROOT / name).read_text()
        parts = (
            re.findall(r"```bash\n(.*?)```", text, re.S) if name.endswith(".md") else [text.split('"""')[1]]
        )
        lines = "\n".join(parts).replace("\\\n", " ")
        for variable, words in re.findall(r'^(\w+)="(.*)"$', lines, re.M):
            lines = lines.replace(f"${variable}", words)
        for line in lines.splitlines():
            match = re.search(r"python .*?(\w+)\.py\b(.*)", line)
            if match and match[1] in SCRIPTS:
                found.append(pytest.param(match[1], match[2], id=f"{name}: {line.strip()[:70]}"))
    return found


def test_there_are_commands():
    assert len(commands()) >= 10


def benchmark_commands():
    flags = {f"{name}, {budget}": compare.flags_of(name, budget)
             for name in compare.METHODS for budget in compare.BUDGETS}
    tasks = {name: f"{flags} --weights random" for name, (_, flags, _) in compare.TASKS.items()}
    for name, line in (flags | tasks | limit.STEPS).items():
        script, _, words = line.partition(".py ")
        yield pytest.param(script, f"--data_path x --output_dir x {words}", id=f"benchmarks: {name}")


def test_the_dataset_that_a_benchmark_replaces_takes_the_same():
    old, new = (inspect.signature(c).parameters for c in (dino_mc.ViewDataset, gpu.PILDataset))
    assert list(old) == list(new)


@pytest.mark.parametrize("script, words", [*commands(), *benchmark_commands()])
def test_command_parses(script, words):
    module = importlib.import_module(script)
    args = module.get_parser().parse_args(shlex.split(words, comments=True))
    if hasattr(module, "check_args"):
        module.check_args(args)


# Warm-ups of at most a tenth of the epochs: CMID's authors take 50.
PAPERS = {  # what the authors' codes take, from the specification of the methods
    "dino_mc": """--mode mc --img_size 224 --drop_path .1
        --global_crops_scale .32 1 --local_crops_scale .05 .32 --local_crops_number 6 --out_dim 65536
        --norm_last_layer --no-use_bn_in_head --student_temp .1 --warmup_teacher_temp .04 --teacher_temp .04
        --warmup_teacher_temp_epochs 0 --momentum_teacher .996 --freeze_last_layer 1 --clip_grad 3
        --optimizer adamw --lr 5e-4 --min_lr 1e-6 --warmup_epochs 10 --weight_decay .04 --weight_decay_end .4
        --epochs 300""",
    "mhcl": """--arch resnet50 --img_size 224 --mhcl --mlp --aug_plus --moco_dim 128 --moco_k 65536
        --moco_m .99 --moco_t .2 --a 1 --b .1 --optimizer sgd --lr .03 --cos
        --warmup_epochs 0 --weight_decay 1e-4 --batch_size_per_gpu 128 --epochs 800""",
    "cmid": """--arch resnet50 --img_size 224 --mask_patch_size 32 --mask_ratio .6 --mask_stage 0
        --loss_weights 1 1 1 --momentum .996
        --moco_k 65536 --moco_t .2 --local_dim 2048 --student_temp .1 --warmup_teacher_temp .04
        --teacher_temp .07 --warmup_teacher_temp_epochs 50 --optimizer adan --lr 1e-3 --min_lr 1e-6
        --warmup_epochs 10 --weight_decay .02 --batch_size_per_gpu 64 --epochs 200""",
    "dspt_mae": """--arch vit_base_patch16_224 --img_size 224 --mask_ratio .75 --norm_pix_loss
        --decoder_dim 512 --decoder_depth 8 --decoder_heads 16 --lr 1.5e-4 --min_lr 0 --warmup_epochs 40
        --weight_decay .05 --batch_size_per_gpu 64 --epochs 1600""",
    "eval_knn": "--temperature .07",
}


@pytest.mark.parametrize("script", PAPERS)
def test_defaults_are_the_papers(script):
    needed = ["--data_path", "x", "--output_dir", "x"] + ["--weights", "w"] * (script == "eval_knn")

    def parse(words):
        module = importlib.import_module(script)
        args = module.get_parser().parse_args([*needed, *words])
        if hasattr(module, "check_args"):
            module.check_args(args)  # which sets defaults that depend on other flags
        args = vars(args)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}

    assert parse(PAPERS[script].split()) == parse([])


def test_python_of_the_readme_compiles():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        compile(block, "README.md", "exec")


def test_backbone_of_a_run_is_used_as_the_readme_says(train, tmp_path, monkeypatch, capsys):
    """Each block runs, and gives the features, or holds the weights, of the backbone that was trained."""
    train(tmp_path / "OUT", "--arch", "resnet18", "--max_steps", "1", "--no-mhcl", script="mhcl")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Use the backbone") : text.index("## What a run writes")]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    timm_, torch_ = {}, {}
    for block, names in zip(blocks, (timm_, torch_), strict=True):
        exec(block.replace("resnet50", "resnet18"), names)
    assert timm_["features"].shape == (1, 512)
    assert "missing_keys=['fc.weight', 'fc.bias'], unexpected_keys=[]" in capsys.readouterr().out
    image = torch.rand(2, 3, 32, 32)
    model = torch_["model"].eval()
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(model(image), timm_["model"](image))


@pytest.mark.parametrize(
    "script, some",
    [
        ("dino_mc", {"out_dim", "student_temp", "momentum_teacher"}),
        ("mhcl", {"moco_k", "moco_t", "moco_m"}),
        ("cmid", {"num_matches", "moco_k", "student_temp"}),
        ("dspt_mae", {"mask_ratio", "decoder_dim", "patch_size"}),
    ],
)
def test_symbols_and_flags_of_the_docstrings_exist(script, some):
    module = importlib.import_module(script)
    flags = {action.dest for action in module.get_parser()._actions}
    table = re.search(r"symbol +variable.*?\n\n", module.__doc__, re.S)[0].splitlines()
    named = {word for row in table[1:] for word in re.findall(r"[a-z]+_[a-z_]+", row)}
    assert some <= named
    symbols = {"tau_s", "tau_t", "tau_o", "tau_b", "map_side", "branch_temp", "hard_q", "hard_k"}
    assert named - flags <= symbols | {"vit_small_patch", "vit_base_patch"}

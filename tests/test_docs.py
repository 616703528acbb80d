"""Every command in the README and in the scripts' docstrings is one the scripts accept."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import cmid
import dino_mc
import dspt_mae
import eval_knn
import eval_linear
import mhcl

SCRIPTS = {
    f"{module.__name__}.py": module for module in (dino_mc, mhcl, cmid, dspt_mae, eval_knn, eval_linear)
}


def commands():
    """(source, words after the script's name, script) of each command that starts one of the scripts."""
    found = []
    for name in ("README.md", *SCRIPTS):
        text = (ROOT / name).read_text()
        parts = (
            re.findall(r"```bash\n(.*?)```", text, re.S) if name == "README.md" else [text.split('"""')[1]]
        )
        lines = "\n".join(parts).replace("\\\n", " ")
        for variable, words in re.findall(r'^(\w+)="(.*)"$', lines, re.M):
            lines = lines.replace(f"${variable}", words)
        for line in lines.splitlines():
            match = re.search(r"python .*?(\w+\.py)\b(.*)", line)
            if match and match[1] in SCRIPTS:
                found.append(pytest.param(match[1], match[2], id=f"{name}: {line.strip()[:70]}"))
    return found


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("script, words", commands())
def test_command_parses(script, words):
    args = SCRIPTS[script].get_parser().parse_args(shlex.split(words, comments=True))
    if script != "eval_knn.py":  # which has no check_args
        SCRIPTS[script].check_args(args)


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
    timm_, torch_, detection = ({} for _ in range(3))
    for block, names in zip(blocks, (timm_, torch_, detection), strict=True):
        exec(block.replace("resnet50", "resnet18"), names)
    assert timm_["features"].shape == (1, 512)
    assert "missing_keys=['fc.weight', 'fc.bias'], unexpected_keys=[]" in capsys.readouterr().out
    image = torch.rand(2, 3, 32, 32)
    model = torch_["model"].eval()
    model.fc = torch.nn.Identity()
    body, detector = detection["backbone"].body.eval(), detection["detector"].eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image), timm_["model"](image))
        torch.testing.assert_close(body(image)["3"].mean((2, 3)), timm_["model"](image), atol=1e-4, rtol=1e-3)
        assert detector([torch.rand(3, 64, 64)])[0].keys() == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    "script, some",
    [
        ("dino_mc.py", {"out_dim", "student_temp", "momentum_teacher"}),
        ("mhcl.py", {"moco_k", "moco_t", "moco_m"}),
        ("cmid.py", {"num_matches", "moco_k", "student_temp"}),
        ("dspt_mae.py", {"mask_ratio", "decoder_dim", "patch_size"}),
    ],
)
def test_symbols_and_flags_of_the_docstrings_exist(script, some):
    flags = {action.dest for action in SCRIPTS[script].get_parser()._actions}
    table = re.search(r"symbol +variable.*?\n\n", SCRIPTS[script].__doc__, re.S)[0].splitlines()
    named = {word for row in table[1:] for word in re.findall(r"[a-z]+_[a-z_]+", row)}
    assert some <= named
    assert named - flags <= {
        "vit_small_patch",
        "vit_base_patch",
        "tau_s",
        "tau_t",
        "tau_o",
        "tau_b",
        "map_side",
        "branch_temp",
        "hard_q",
        "hard_k",
    }

"""Every command in the README and in the scripts' docstrings is one the scripts accept."""

import re
import shlex

import pytest
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
        for line in "\n".join(parts).replace("\\\n", " ").splitlines():
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

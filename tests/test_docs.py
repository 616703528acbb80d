"""Every command in the README and in the scripts' docstrings is one the scripts accept."""

import re
import shlex

import pytest
from conftest import ROOT

import dino_mc
import eval_knn

PARSERS = {"dino_mc.py": dino_mc.get_parser, "eval_knn.py": eval_knn.get_parser}


def commands():
    """(source, words after the script's name, script) of each command that starts one of the scripts."""
    found = []
    for name in ("README.md", *PARSERS):
        text = (ROOT / name).read_text()
        parts = (
            re.findall(r"```bash\n(.*?)```", text, re.S) if name == "README.md" else [text.split('"""')[1]]
        )
        for line in "\n".join(parts).replace("\\\n", " ").splitlines():
            match = re.search(r"python .*?(\w+\.py)\b(.*)", line)
            if match and match[1] in PARSERS:
                found.append(pytest.param(match[1], match[2], id=f"{name}: {line.strip()[:70]}"))
    return found


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("script, words", commands())
def test_command_parses(script, words):
    args = PARSERS[script]().parse_args(shlex.split(words, comments=True))
    if script == "dino_mc.py":
        dino_mc.check_args(args)


def test_python_of_the_readme_compiles():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        compile(block, "README.md", "exec")


def test_symbols_and_flags_of_the_docstrings_exist():
    flags = {action.dest for action in dino_mc.get_parser()._actions}
    table = re.search(r"symbol +variable.*?\n\n", dino_mc.__doc__, re.S)[0].splitlines()[1:-1]
    named = {word for row in table for word in re.findall(r"[a-z]+_[a-z_]+", row)}
    assert {"out_dim", "student_temp", "momentum_teacher"} <= named
    assert named - flags == {"vit_small_patch", "tau_s", "tau_t"}

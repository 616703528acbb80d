"""Fixtures: small scene images, and the scripts run inside this process or in processes of their own."""

import atexit
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF

from demo.scenes import write_dataset

# One thread, here and in the processes that tests start: runs are equal to the last bit only with equal
# numbers of threads, and the models are so small that threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Flushing a file waits for all that others write, seconds on a busy machine, and helps only where the machine
# itself dies, which no test tries. The processes that tests start import this too.
os.fsync = lambda file: None
ROOT = Path(__file__).parent.parent
# What a tiny run needs; `test_vit` and `test_resnet` are timm's own miniature models.
SMALL = "--img_size 32 --batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1".split()
SMALL += ["--num_workers", "0", "--device", "cpu", "--amp", "off"]
METHOD = {
    "dino_mc": "--out_dim 64 --local_crops_number 2".split(),
    "mhcl": "--moco_k 16 --bn_groups 2".split(),
    "cmid": "--moco_k 16 --mask_patch_size 8 --local_dim 32 --warmup_teacher_temp_epochs 0".split(),
    "dspt_mae": "--decoder_dim 32 --decoder_depth 1 --decoder_heads 2".split(),
}
TRAINING = list(METHOD)
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")
METHOD["eval_linear"] = "--finetune --weights random".split()
ARCH = {script: "--arch test_vit --patch_size 8".split() for script in ("dino_mc", "dspt_mae", "eval_linear")}


def tiny(script, *flags):
    """Flags of a tiny run of a training script; `flags` win."""
    return [
        *SMALL,
        *METHOD[script],
        *([] if "--arch" in flags else ARCH.get(script, ["--arch", "test_resnet"])),
        *flags,
    ]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """train/ (30 images), val/ (20), locations/ (10 places, 3 dates) of 48 px."""
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(
        folder,
        {"train_per_class": 3, "val_per_class": 2, "locations": 10, "dates": 3, "image_size": 48, "seed": 0},
    )
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs a script's main() with the given flags."""

    def main(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        importlib.import_module(script).main()

    return main


@pytest.fixture
def train(run, scenes):
    """A tiny run of a training script; returns its checkpoint."""

    def main(out, *flags, script="dino_mc", data="train"):
        run(script, "--data_path", scenes / data, "--output_dir", out, *tiny(script, *flags))
        return torch.load(Path(out) / "checkpoint.pth", weights_only=True)

    return main


def launch(*command):
    """Starts Python as a user does, in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, **pipes)


# Scripts start here in copies of one process that has imported everything: seconds sooner than anew.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["mhcl", "pytest", "demo.scenes"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(script, flags, environment, output, prepare):
    with contextlib.suppress(PermissionError):
        os.setsid()  # with its workers, apart from the tests
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process started anew
    os.environ.update(environment)
    sys.argv = [f"{script}.py", *map(str, flags)]
    if prepare:
        prepare[0](*prepare[1:])
    try:
        importlib.import_module(script).main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing would not


class Start:
    """A script's main() in one or several processes of their own, with the environment of a launcher.

    `prepare`: (function, *arguments), called in each process before main().
    `last`: more flags for the last process.
    """

    def __init__(self, folder, script, *flags, processes=1, prepare=None, last=()):
        self.outputs, self.processes = [], []
        folder.mkdir(exist_ok=True, parents=True)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes):
            output = folder / f"rank{rank}.txt"
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = [*flags, *last] if rank == processes - 1 else flags
            process = server.Process(target=_main, args=(script, words, own, output, prepare))
            process.start()
            self.processes.append(process)
            self.outputs.append(output)

    def poll(self):
        """None while all processes run."""
        codes = [process.exitcode for process in self.processes]
        return None if all(code is None for code in codes) else codes

    def signal(self, number, processes=None):
        """To all processes and their workers, as from a scheduler or Ctrl-C; or to some."""
        for process in processes or self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self, timeout=120):
        """Exit codes; all that was printed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return codes, self.text()

    def text(self):
        return "".join(output.read_text() for output in self.outputs if output.exists())

    def finish(self):
        """Waits for a run that must succeed; all that was printed."""
        codes, text = self.wait()
        assert not any(codes), text[-3000:]
        return text


def wait_for(process, log, step, seconds=60):
    """Waits until the log has a line of at least `step`."""
    for _ in range(50 * seconds):
        assert process.poll() is None, process.text() if hasattr(process, "text") else process.communicate()
        text = log.read_text() if log.exists() else ""
        if any(
            line.get("step", 0) >= step for line in map(json.loads, text.splitlines()[: text.count("\n")])
        ):
            return
        time.sleep(0.02)
    raise AssertionError("no progress")


def read_log(out):
    """The lines of a run's log, headers too."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def warm_cosine():
    """The rate of each of 21 steps: 7 of warm-up to .01, then a cosine to .001."""
    falling = [0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    return [0.01 * step / 7 for step in range(7)] + falling


def torchvision_jitter(image, factors, order):
    """ColorJitter of one image 3 x H x W by torchvision's functions, with what common drew."""
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for kind in order.tolist():
        image = adjust[kind](image, factors[kind].item())
    return image


def assert_same_colours(image, expected):
    """But for a few pixels whose channels are nearly equal, or near solarize's threshold."""
    assert ((image - expected).abs() > 1e-3).float().mean() < 0.01


def assert_same(a, b, path=""):
    """Two nested states are equal to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def assert_same_state(a, b):
    """Two checkpoints hold the same run at the same step; their flags and versions may differ."""
    for part in a.keys() - {"args", "versions"}:
        assert_same(a[part], b[part], part)

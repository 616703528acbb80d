"""Runs that are killed, stopped, started twice, starved of space or fed bad files."""

import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    SCRIPTS,
    TRAINING,
    Start,
    assert_same,
    assert_same_state,
    free_port,
    launch,
    read_log,
    tiny,
    wait_for,
)
from PIL import Image
from safetensors.torch import load_file
from test_cli import refused

import common

ALL = [*TRAINING, "eval_linear"]  # what writes checkpoints
TOY_AND_SLOWLY_ALL = ["toy", *(pytest.param(script, marks=pytest.mark.slow) for script in ALL)]
MHCL_AND_SLOWLY_ALL = ["mhcl", *(pytest.param(s, marks=pytest.mark.slow) for s in ALL if s != "mhcl")]


def base(script, scenes, out, *flags):
    """Words of a tiny run; the toy needs no data."""
    if script == "toy":
        return [script, "--output_dir", out, "--device", "cpu", *flags]
    more = ["--bn_groups", 1] if script == "mhcl" else []  # with two processes as with one
    data = scenes if script == "eval_linear" else scenes / "train"
    return [script, "--data_path", data, "--output_dir", out, *tiny(script, *more, *flags)]


def read(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Killed, stopped, restarted
# --------------------------------------------------------------------------------------------------


def die_at(where, count):
    """Kills the main process at the `count`-th step, or as it writes a file: half, unnamed, just renamed."""
    left = count * (os.environ["RANK"] == "0")

    def passed(here):
        nonlocal left
        left -= here
        return here and left == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    end_step, fsync, replace = common.Run.end_step, os.fsync, os.replace

    def dying_step(self, *arguments, **values):
        if passed(where == "step"):
            die()
        end_step(self, *arguments, **values)

    def dying_fsync(file):
        if passed(where == "half" and "checkpoint.pth" in os.readlink(f"/proc/self/fd/{file}")):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()
        fsync(file)

    def dying_replace(old, new):
        if passed(where == "unnamed" and Path(new).name == "checkpoint.pth"):
            die()
        replace(old, new)
        if passed(where == Path(new).name):
            die()

    common.Run.end_step, os.fsync, os.replace = dying_step, dying_fsync, dying_replace


# Before the first checkpoint; while it or the backbone is written; between the two; in the last epoch.
DEATHS = [
    ("step", 2),
    ("half", 1),
    ("unnamed", 1),
    ("checkpoint.pth", 1),
    ("step", 3),
    ("half", 2),
    ("model.safetensors", 1),
    ("step", 2),
    ("checkpoint.pth", 1),
]


@pytest.mark.parametrize("script", TOY_AND_SLOWLY_ALL)
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(scenes, tmp_path, script):
    flags = ["--batch_size_per_gpu", 2, "--accum_steps", 2, "--epochs", 3]

    def start(name, **more):
        return Start(tmp_path / name, *base(script, scenes, tmp_path / name, *flags), processes=2, **more)

    for death in DEATHS:
        if script == "eval_linear" and death[0] == "model.safetensors":
            continue  # it is written after the test
        run = start("a", prepare=(die_at, *death))
        run.processes[0].join(60)
        assert run.processes[0].exitcode == -signal.SIGKILL, (death, run.text())
        run.signal(signal.SIGKILL)
        run.wait()
    for name in "ab":
        start(name).finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))
    assert_same(*(load_file(tmp_path / name / "backbone" / "model.safetensors") for name in "ab"))
    assert not list(tmp_path.glob("a/*.tmp")) and not (tmp_path / "a" / "backbone.new").exists()
    steps = [line["step"] for line in read_log(tmp_path / "a") if "step" in line]
    assert steps == sorted(set(steps)) and steps[-1] == read(tmp_path / "b")["step"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_killed_at_random_moments(scenes, tmp_path, script):
    """SIGKILL to all processes after a random time; `pytest -m slow -s` prints how many runs were killed."""
    draw, kills = random.Random(0), 0
    for processes, workers, micro in [(p, w, m) for p in (1, 2) for w in (0, 1, 3) for m in (1, 2)]:
        flags = ["--batch_size_per_gpu", 4 // micro, "--accum_steps", micro, "--num_workers", workers]
        flags += ["--log_every", 1]
        out = [tmp_path / f"{name}{processes}{workers}{micro}" for name in "ab"]
        began = time.monotonic()
        Start(out[0], *base(script, scenes, out[0], *flags), processes=processes).finish()
        seconds = time.monotonic() - began
        for _ in range(6):
            run = Start(out[1], *base(script, scenes, out[1], *flags), processes=processes)
            time.sleep(draw.uniform(0, seconds))
            kills += run.poll() is None
            run.signal(signal.SIGKILL)
            for process in run.processes:
                process.kill()  # it may not have had its group yet
            run.wait()
        Start(out[1], *base(script, scenes, out[1], *flags), processes=processes).finish()
        assert_same_state(read(out[0]), read(out[1]))
    print(f"{script}: {kills} kills survived")
    assert kills > 20


def children(pid):
    """Process ids below `pid`, from /proc."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in own] + [deeper for child in own for deeper in children(child)]


@pytest.mark.parametrize("script", MHCL_AND_SLOWLY_ALL)
def test_launcher_restarts_after_a_process_is_killed(scenes, tmp_path, script):
    """As users start it, with a launcher; at the end the run is that of processes without one."""
    script, *flags = base(script, scenes, tmp_path / "a", "--epochs", 4, "--log_every", 1)
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 3".split()
    process = launch(*command, f"{script}.py", *flags)
    try:
        wait_for(process, tmp_path / "a" / "log.jsonl", 4)
        os.kill(workers_of(process, script)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode == 0 and out.count(" steps done") == 1, err[-3000:]
    starts = [line["from_step"] for line in read_log(tmp_path / "a") if "from_step" in line]
    assert len(starts) == 2 and starts[1] > 0
    Start(tmp_path / "b", *base(script, scenes, tmp_path / "b", "--epochs", 4), processes=2).finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))


def workers_of(launcher, script):
    """Ids of the training processes."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(launcher.pid)}
    return [pid for pid, words in commands.items() if f"{script}.py" in words]


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_two_nodes_train_as_one_does_though_a_process_is_killed(scenes, tmp_path, script):
    command = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --max-restarts 3".split()
    command += ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    script, *flags = base(script, scenes, tmp_path / "a", "--epochs", 20, "--log_every", 1)
    nodes = [launch(*command, f"{script}.py", *flags) for _ in range(2)]
    try:
        wait_for(nodes[0], tmp_path / "a" / "log.jsonl", 10)
        os.kill(workers_of(nodes[1], script)[0], signal.SIGKILL)
        for node in nodes:
            out, err = node.communicate(timeout=200)
            assert node.returncode == 0, err[-3000:]
    finally:
        for node in nodes:
            node.kill()
    Start(tmp_path / "b", *base(script, scenes, tmp_path / "b", "--epochs", 20), processes=2).finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))


def use_store(port):
    """As under a launcher, whose store outlives its processes; here the main one comes late to it."""
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    time.sleep(os.environ["RANK"] == "0")


def test_processes_find_each_other_in_a_store_with_the_keys_of_dead_ones(tmp_path):
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    store.add("arrivals/1", 3)  # three died before they had an answer
    flags = ["toy", "--output_dir", tmp_path, "--device", "cpu", "--log_every", 1, "--epochs", 99]

    def start(*more):
        return Start(tmp_path, *flags, *more, processes=2, prepare=(use_store, store.port))

    for step in (2, 4):
        run = start()
        wait_for(run, tmp_path / "log.jsonl", step, seconds=20)
        run.signal(signal.SIGKILL)
        run.wait()
    step = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    codes, text = start("--max_steps", step + 9).wait(timeout=20)
    assert codes == [0, 0], text


def start_workers(method):
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("script", [*TOY_AND_SLOWLY_ALL, "toy spawn"])
def test_ctrl_c_stops_the_run_with_a_checkpoint_and_leaves_no_process(scenes, tmp_path, script):
    """Workers outlive the signal, whether they inherit its handler (fork) or not (spawn)."""
    script, method = [*script.split(), "fork"][:2]
    flags = ["--epochs", 40, "--save_every", 100, "--log_every", 1, "--num_workers", 1]
    flags += ["--accum_steps", 7] if script == "toy" else []  # so the step in which it comes needs workers
    run = Start(tmp_path, *base(script, scenes, tmp_path, *flags), prepare=(start_workers, method))
    wait_for(run, tmp_path / "log.jsonl", 3)
    run.signal(signal.SIGINT)  # to the workers too, as from a terminal
    last = read_log(tmp_path)[-1]["step"]
    run.processes[0].join(60)
    with pytest.raises(ProcessLookupError):  # nobody is left in its group
        os.killpg(run.processes[0].pid, 0)
    assert run.finish().count("the same command resumes") == 1
    assert last <= read(tmp_path)["step"] <= last + 3  # steps may have ended as this test looked


# --------------------------------------------------------------------------------------------------
# Two runs in one folder; a full disk; a system without POSIX signals
# --------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(tmp_path):
    flags = ["toy", "--output_dir", tmp_path, "--device", "cpu", "--log_every", 1, "--epochs", 999]
    first = Start(tmp_path / "1", *flags, "--num_workers", 2)
    wait_for(first, tmp_path / "log.jsonl", 2)
    for processes in (1, 2):
        codes, text = Start(tmp_path / "2", *flags, processes=processes).wait()
        assert (
            codes == [2] * processes
            and text
            == f"error: --output_dir {tmp_path}: another run is writing "
            "there; wait for it or take another folder\n"
        )
    workers = children(first.processes[0].pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that they outlive it
    first.processes[0].kill()
    first.processes[0].join()
    step = read_log(tmp_path)[-1]["step"]
    Start(tmp_path / "3", *flags, "--max_steps", step + 2).finish()
    states = [Path(f"/proc/{worker}/stat").read_text().split()[2] for worker in workers]
    assert states == ["T", "T"]
    first.signal(signal.SIGKILL)


def limit_files(size):
    """As on a full disk: no file of this process may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_ends_the_run_in_words_and_the_old_checkpoint_stays(tmp_path):
    flags = ["toy", "--output_dir", tmp_path, "--device", "cpu"]
    Start(tmp_path, *flags, "--max_steps", 7).finish()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    codes, text = Start(tmp_path, *flags, prepare=(limit_files, len(before) // 2)).wait()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert codes == [1] and len(errors) == 1 and "Traceback" not in text, text
    assert re.search(
        r"(checkpoint.pth|backbone): cannot be written: .*File too large.*; what was written", errors[0]
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    Start(tmp_path, *flags).finish()


def as_on_windows(scripts):
    """Hides what Windows lacks, and refuses to flush files that are open for reading, as it does."""
    import fcntl

    fsync = os.fsync

    def strict_fsync(file):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(file)

    os.fsync = strict_fsync
    for module, name in (
        (signal, "SIGHUP"),
        (signal, "SIGUSR1"),
        (signal, "SIGCHLD"),
        (os, "sched_getaffinity"),
    ):
        delattr(module, name)
    sys.modules["fcntl"] = None
    for name in ("common", *scripts):
        sys.modules.pop(name, None)
    for name in scripts:
        importlib.import_module(name)


def test_without_posix_signals_and_locks_all_imports_and_one_process_trains(scenes, tmp_path):
    flags = base("mhcl", scenes, tmp_path)
    for steps in (1, 2):
        Start(tmp_path, *flags, "--max_steps", steps, prepare=(as_on_windows, SCRIPTS)).finish()
    assert read(tmp_path)["step"] == 2 and not (tmp_path / ".lock").exists()


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def pixels(h=40, w=48, c=3):
    ramp = np.arange(h)[:, None, None] * 3 + np.arange(w)[None, :, None] * 2 + np.arange(c) * 40
    return (ramp % 256).astype(np.uint8)


def good_images(folder):
    """Images of all kinds that are read."""
    image = Image.fromarray(pixels())
    image.save(folder / "with space.png")
    image.save(folder / "UPPER.JPG", format="JPEG")
    image.save(folder / "ünï-图像.jpeg")
    image.save(folder / "$(touch hacked) ; touch hacked2 `touch hacked3`.bmp")
    image.save(folder / "lossy.webp")
    image.save(folder / "plain.tif", compression="tiff_lzw")
    image.convert("P").save(folder / "palette.png")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("1").save(folder / "bits.png")
    image.convert("LA").save(folder / "grey and alpha.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("YCbCr").save(folder / "ycbcr.tiff")
    image.save(folder / "moving.webp", save_all=True, append_images=[image.rotate(90)])
    image.save(folder / "moving.png", save_all=True, append_images=[image.rotate(90)])
    Image.fromarray(pixels(1, 1)).save(folder / "one pixel.png")
    Image.fromarray(pixels(2, 300)).save(folder / "thin.png")
    os.symlink(folder / "plain.tif", folder / "link.tif")
    (folder / os.fsdecode(b"bytes\xff.png")).write_bytes((folder / "alpha.png").read_bytes())


def bad_images(folder, good):
    """Files with the names of images that are none, or are not to be read; what is said of each."""
    jpeg = (good / "UPPER.JPG").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "text.png").write_text("I am a text")
    (folder / "html.jpg").write_text("<html>404</html>")
    Image.fromarray(pixels(c=1)[:, :, 0].astype(np.uint16) * 200).save(folder / "deep.png")
    Image.fromarray(pixels(c=1)[:, :, 0].astype(np.float32)).save(folder / "float.tif")
    image = Image.fromarray(pixels())
    image.save(folder / "bands.tif", save_all=True, append_images=[image])
    Image.new("1", (40_000, 40_000)).save(folder / "bomb.png", compress_level=1)
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    return {
        "empty.jpg": "cannot identify image file",
        "truncated.jpg": "truncated",
        "text.png": "cannot identify image file",
        "html.jpg": "cannot identify image file",
        "deep.png": "1 band, not 3",
        "float.tif": "1 band, not 3",
        "bands.tif": "6 bands, not 3",
        "bomb.png": "are too many to read at once",
        "dangling.png": "No such file",
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    for name in ("good", "bad"):
        (root / name).mkdir()
    good_images(root / "good")
    return root / "good", root / "bad", bad_images(root / "bad", root / "good")


def test_each_kind_of_image_is_read_or_refused_in_words(zoo):
    good, bad, messages = zoo
    for path in common.list_images(good):
        image = common.read_image(path)
        assert (
            image.dtype == torch.uint8 and len(image) == 3 and image.float().std() > 0 or "one pixel" in path
        )
    grey = common.read_image(good / "grey.jpg")
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    for name in ("plain.tif", "with space.png", "alpha.png", "moving.png"):
        assert torch.equal(common.read_image(good / name).permute(1, 2, 0), torch.from_numpy(pixels())), name
    assert {Path(path).name for path in common.list_images(bad)} == messages.keys()
    for name, message in messages.items():
        with warnings.catch_warnings(), pytest.raises(common.UnreadableImageError, match=re.escape(message)):
            warnings.simplefilter("error")
            common.read_image(bad / name)


SLOW_ZOO = [name for name in (*TRAINING, "eval_linear", "predict") if name != "mhcl"]


@pytest.mark.parametrize(
    "script", ["mhcl", "eval_knn", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_ZOO)]
)
def test_all_kinds_of_images_go_through_every_script(zoo, scenes, tmp_path, script):
    """9 bad files of 1,000, each warned about once."""
    good, bad, messages = zoo
    for split in ("train", "val"):
        for kind in "ab":
            (tmp_path / split / kind).mkdir(parents=True)
        paths = [*good.iterdir(), *bad.iterdir(), *(scenes / "train").rglob("*.png")]
        for i in range(1000):
            path = paths[i] if i < len(paths) else paths[-1 - i % 30]
            os.symlink(path, tmp_path / split / "ab"[i % 2] / f"{i:03d} {path.name}")
    loading = ["--batch_size_per_gpu", 50, "--num_workers", 1, "--device", "cpu"]
    backbone = ["--weights", "random", "--arch", "test_resnet", "--img_size", 32]
    out, data = tmp_path / "out", tmp_path
    if script == "eval_linear":
        flags = [*loading, *backbone, "--lrs", 1, "--epochs", 1]
    elif script == "eval_knn":
        flags = [*loading, *backbone, "--nb_knn", 5]
    elif script == "predict":
        probe = ["--data_path", scenes, *loading, *backbone, "--lrs", 1, "--epochs", 1]
        Start(out, "eval_linear", "--output_dir", out, *probe).finish()
        flags = [*loading, "--predict", tmp_path / "val", "--weights", out]
    else:
        data = tmp_path / "train"
        queue = ["--moco_k", 100] if script in ("mhcl", "cmid") else []
        flags = [*tiny(script), *queue, *loading]
        flags += ["--epochs", 1, "--warmup_epochs", 0, "--log_every", 10]
    flags += ["--data_path", data] if script != "predict" else []
    name = "eval_linear" if script == "predict" else script
    text = Start(out, name, "--output_dir", out, *flags).finish()
    splits = 2 if script in ("eval_knn", "eval_linear") else 1
    for file in messages:
        assert len(re.findall(rf"warning: .*{re.escape(file)}", text)) == splits, (file, text[-2000:])
    assert not list(Path.cwd().glob("hacked*")) and not list(tmp_path.rglob("hacked*"))
    if script in TRAINING:
        assert read_log(out)[-1]["unreadable"] == len(messages)


def test_folder_that_links_back_to_itself_is_listed_once(scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "data")
    before = list(common.list_images(tmp_path / "data"))
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    os.symlink(tmp_path, tmp_path / "data" / next((tmp_path / "data").iterdir()).name / "above")
    assert list(common.list_images(tmp_path / "data")) == before


def test_folders_that_are_no_data(run, capsys, scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "data")
    before = list(common.list_images(tmp_path / "data"))
    shutil.copytree(scenes / "val", tmp_path / "data" / ".ipynb_checkpoints")
    assert list(common.list_images(tmp_path / "data")) == before
    flags = ["--data_path", tmp_path / "data", "--output_dir", tmp_path / "data", *tiny("mhcl")]
    refused(run, capsys, "mhcl", flags, "is --output_dir too; give another folder")


def test_image_that_vanishes_is_left_out(scenes, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for copy in range(5):
        for path in (scenes / "train").rglob("*.png"):
            os.link(path, data / f"{copy}_{path.name}")
    for extra in sorted(data.iterdir())[148:]:
        extra.unlink()  # 37 steps of 4 see all
    flags = ["--data_path", data, *tiny("mhcl"), "--epochs", 30, "--num_workers", 1, "--log_every", 1]
    run = Start(tmp_path, "mhcl", "--output_dir", tmp_path / "out", *flags, "--max_steps", 80)
    wait_for(run, tmp_path / "out" / "log.jsonl", 2)
    sorted(data.iterdir())[0].unlink()
    text = run.finish()
    assert text.count("warning: unreadable, another image taken") == 1 and "No such file" in text


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL)
def test_gradient_that_is_not_finite_stops_the_run(run, monkeypatch, capsys, scenes, tmp_path, script):
    """The loss is still finite: only the gradient's norm shows it before the next checkpoint is written."""
    create, calls = timm.optim.create_optimizer_v2, []

    def poisoned(*arguments, **more):
        optimizer = create(*arguments, **more)
        first = optimizer.param_groups[0]["params"][0]
        first.register_hook(lambda grad: grad * (float("inf") if len(calls) == 2 else calls.append(0) or 1))
        return optimizer

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", poisoned)
    script, *flags = base(script, scenes, tmp_path, "--log_every", 100, "--max_steps", 4)
    with pytest.raises(SystemExit) as stop:
        run(script, *flags)
    error = capsys.readouterr().err
    pattern = r"step 3: not finite: \{'loss': \d.*'grad_norm': (inf|nan)"
    assert stop.value.code == 1 and re.search(pattern, error), error
    assert not (tmp_path / "checkpoint.pth").exists()


def test_overflow_of_fp16_is_left_to_the_scaler():
    model, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 2)).sum() * float("inf")).backward()
    assert common.grad_norm(optimizer, scaler) == 0
    common.optimizer_step(optimizer, scaler)
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    assert common.grad_norm(optimizer, scaler).item() == pytest.approx(3**0.5)  # of 1, 1 and the bias's 1
    common.optimizer_step(optimizer, scaler)
    assert torch.equal(model.weight, before - 1) and model.weight.grad is None


# --------------------------------------------------------------------------------------------------
# Files that would run code
# --------------------------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def evil_files(path, done):
    """Writes the same trap in each of the formats that torch.load reads."""
    for save in (torch.save, partial(torch.save, _use_new_zipfile_serialization=False), pickle.dump):
        for content in (Evil(done), {"model": Evil(done), "args": {}}):
            with open(path, "wb") as file:
                save(content, file)
            yield


def test_no_loading_path_runs_code(run, capsys, scenes, tmp_path):
    path, done = tmp_path / "checkpoint.pth", tmp_path / "done"
    for _ in evil_files(path, done):
        with contextlib.suppress(ValueError):
            common.load_checkpoint(path)
        assert not done.exists()
    paths = {
        "--init": base("mhcl", scenes, tmp_path / "o", "--init", path),
        "resume": base("mhcl", scenes, tmp_path),
    }
    paths["--weights"] = [
        "eval_knn",
        "--data_path",
        scenes,
        "--arch",
        "test_resnet",
        "--output_dir",
        tmp_path / "e",
        "--weights",
        path,
        "--nb_knn",
        1,
    ]
    for script, *flags in paths.values():
        refused(run, capsys, script, flags, "error: --")
    shutil.copy(path, tmp_path / "head.pth")
    flags = ["--predict", scenes / "val", "--weights", tmp_path, "--output_dir", tmp_path / "e"]
    refused(run, capsys, "eval_linear", flags, "error: --")
    with open(tmp_path / "evil.npy", "wb") as file:
        np.save(file, np.array([Evil(done)], dtype=object), allow_pickle=True)
    with pytest.raises(common.UnreadableImageError, match="Python objects"):
        common.read_image(tmp_path / "evil.npy")
    assert not done.exists()
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    loads = re.findall(r"torch\.load\(.*|pickle\.loads?\(.*|allow_pickle=True", code)
    assert len(loads) == 1 and loads[0].startswith("torch.load(path, \"cpu\", DataPickle,")


# --------------------------------------------------------------------------------------------------
# Leaks
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_memory_stays_flat_over_2000_steps(scenes, tmp_path, script):
    """Of the process and its workers, from step 500 to step 2,000; `pytest -m slow -s` prints it."""
    flags = base(script, scenes, tmp_path, "--epochs", 300, "--save_every", 20, "--num_workers", 1)
    run = Start(tmp_path, *flags, "--log_every", 20, "--max_steps", 2000)
    usage = []
    for step in (500, 1990):
        wait_for(run, tmp_path / "log.jsonl", step - 20, seconds=600)
        pid = run.processes[0].pid
        found = [Path(f"/proc/{each}/status").read_text() for each in (pid, *children(pid))]
        usage.append([int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) / 1024 for text in found])
    run.finish()
    print(f"{script}: MB at step 500 and 2,000: {usage}")
    for early, late in zip(*usage, strict=True):
        assert late < early + 30, usage

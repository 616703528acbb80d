"""Runs that are killed, stopped, starved of space or fed bad data, numbers and files."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINING, Run, assert_same, assert_same_state, free_port, launch, tiny, wait_for
from PIL import Image
from safetensors.torch import load_file
from test_cli import refused

import common

ALL = [*TRAINING, "eval_linear"]  # what writes checkpoints


def base(script, scenes, out, *flags):
    data = scenes if script == "eval_linear" else scenes / "train"
    return [script, "--data_path", data, "--output_dir", out, *tiny(script, *flags)]


def read(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Killed
# --------------------------------------------------------------------------------------------------


def die_at(where, count):
    """Kills this process at the `count`-th step, or as it writes a file: half, unnamed, or just renamed."""
    left = count

    def passed(here):
        nonlocal left
        left -= here
        return here and left == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    end_step, fsync, replace = common.Meter.end_step, os.fsync, os.replace

    def dying_step(self, terms):
        end_step(self, terms)
        if passed(where == "step"):
            die()

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

    common.Meter.end_step, os.fsync, os.replace = dying_step, dying_fsync, dying_replace


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
PLANS = {  # processes, workers, micro-batches: the first always, the second with -m slow
    "dino_mc": [(2, 0, 2), (1, 1, 1)],
    "mhcl": [(1, 3, 1), (2, 1, 1)],
    "cmid": [(2, 1, 1), (1, 0, 2)],
    "dspt_mae": [(1, 3, 2), (2, 0, 1)],
    "eval_linear": [(2, 0, 1), (1, 1, 1)],
}


@pytest.mark.parametrize(
    "script, plan",
    [(script, PLANS[script][0]) for script in ALL]
    + [pytest.param(script, PLANS[script][1], marks=pytest.mark.slow) for script in ALL],
)
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(scenes, tmp_path, script, plan):
    processes, workers, micro = plan
    flags = ["--batch_size_per_gpu", 4 // micro, "--accum_steps", micro, "--num_workers", workers]
    if script == "mhcl":
        flags += ["--bn_groups", 1 if processes == 2 else 2]
    start = {
        name: partial(
            Run, tmp_path / name, *base(script, scenes, tmp_path / name, *flags), processes=processes
        )
        for name in "ab"
    }
    for death in DEATHS:
        if script == "eval_linear" and death[0] == "model.safetensors":
            continue  # it is written after the test
        run = start["a"](prepare=(die_at, *death))
        run.processes[0].join(60)
        assert run.processes[0].exitcode == -signal.SIGKILL, (death, run.text())
        run.signal(signal.SIGKILL)
        run.wait()
    for name in "ab":
        start[name]().finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))
    a, b = (load_file(tmp_path / name / "backbone" / "model.safetensors") for name in "ab")
    assert_same(a, b)
    assert not list(tmp_path.glob("a/*.tmp")) and not (tmp_path / "a" / "backbone.new").exists()
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "step" in line]
    assert steps == sorted(set(steps)) and steps[-1] == read(tmp_path / "b")["step"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_killed_at_random_moments(scenes, tmp_path, script):
    """SIGKILL to all processes after a random time; `pytest -m slow -s` prints how many runs were killed."""
    draw, kills = random.Random(0), 0
    for processes, workers, micro in [(p, w, m) for p in (1, 2) for w in (0, 1, 3) for m in (1, 2)]:
        flags = ["--batch_size_per_gpu", 4 // micro, "--accum_steps", micro, "--num_workers", workers]
        flags += ["--log_every", 1, *(["--bn_groups", 1] if script == "mhcl" else [])]
        out = [tmp_path / f"{name}{processes}{workers}{micro}" for name in "ab"]
        began = time.monotonic()
        Run(out[0], *base(script, scenes, out[0], *flags), processes=processes).finish()
        seconds = time.monotonic() - began
        for _ in range(6):
            run = Run(out[1], *base(script, scenes, out[1], *flags), processes=processes)
            time.sleep(draw.uniform(0, seconds))
            kills += run.poll() is None
            run.signal(signal.SIGKILL)
            for process in run.processes:
                process.kill()  # it may not have had its group yet
            run.wait()
        Run(out[1], *base(script, scenes, out[1], *flags), processes=processes).finish()
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


@pytest.mark.parametrize(
    "script", ["dspt_mae", *(pytest.param(s, marks=pytest.mark.slow) for s in ALL if s != "dspt_mae")]
)
def test_launcher_restarts_after_a_process_is_killed(scenes, tmp_path, script):
    script, *flags = base(script, scenes, tmp_path / "a", "--epochs", 20, "--log_every", 1)
    command = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 3".split()
    process = launch(*command, f"{script}.py", *flags)
    wait_for(process, tmp_path / "a" / "log.jsonl", 10)
    workers = [
        pid for pid in children(process.pid) if f"{script}.py" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(workers[-1], signal.SIGKILL)
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.terminate()
    assert process.returncode == 0, err[-3000:]
    headers = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    starts = [line["from_step"] for line in headers if "from_step" in line]
    assert len(starts) == 2 and starts[1] > 0
    Run(tmp_path / "b", *base(script, scenes, tmp_path / "b", "--epochs", 20), processes=2).finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))


@pytest.mark.parametrize(
    "script", ["mhcl", *(pytest.param(s, marks=pytest.mark.slow) for s in ALL if s != "mhcl")]
)
def test_two_nodes_train_as_one_does(scenes, tmp_path, script):
    more = ["--bn_groups", 1] if script == "mhcl" else []
    command = (
        "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id run".split()
    )
    command += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    script, *flags = base(script, scenes, tmp_path / "a", *more)
    nodes = [launch(*command, f"{script}.py", *flags) for _ in range(2)]
    try:
        for node in nodes:
            out, err = node.communicate(timeout=200)
            assert node.returncode == 0, err[-3000:]
    finally:
        for node in nodes:
            node.kill()
    Run(tmp_path / "b", *base(script, scenes, tmp_path / "b", *more), processes=2).finish()
    assert_same_state(read(tmp_path / "a"), read(tmp_path / "b"))


@pytest.mark.parametrize(
    "script, number",
    [*((script, signal.SIGINT) for script in ALL), ("mhcl", signal.SIGTERM), ("dspt_mae", signal.SIGUSR1)],
)
def test_a_signal_stops_the_run_with_a_checkpoint_and_leaves_no_process(scenes, tmp_path, script, number):
    flags = ["--epochs", 40, "--save_every", 100, "--log_every", 1, "--num_workers", 2]
    run = Run(tmp_path, *base(script, scenes, tmp_path, *flags))
    wait_for(run, tmp_path / "log.jsonl", 3)
    run.signal(number)
    last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]["step"]
    run.processes[0].join(60)
    with pytest.raises(ProcessLookupError):  # nobody is left in its group
        os.killpg(run.processes[0].pid, 0)
    assert run.finish().count("the same command goes on") == 1
    assert last <= read(tmp_path)["step"] <= last + 3  # a step may have ended as this test looked


# --------------------------------------------------------------------------------------------------
# No space
# --------------------------------------------------------------------------------------------------


def limit_files(size):
    """As on a full disk: no file of this process may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("script", ALL)
def test_full_disk_ends_the_run_in_words_and_the_old_checkpoint_stays(scenes, tmp_path, script):
    flags = base(script, scenes, tmp_path)
    Run(tmp_path, *flags, "--max_steps", 7).finish()
    before = (tmp_path / "checkpoint.pth").read_bytes()
    codes, text = Run(tmp_path, *flags, prepare=(limit_files, len(before) // 2)).wait()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert codes == [1] and len(errors) == 1 and "Traceback" not in text, text
    assert "checkpoint.pth: cannot be written: [Errno 27] File too large; what was written" in errors[0]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    Run(tmp_path, *flags).finish()


def test_backbone_and_log_that_cannot_be_written_end_the_run_in_words(train, capsys, tmp_path):
    train(tmp_path, "--max_steps", "1")
    os.rename(tmp_path / "backbone", tmp_path / "kept")
    (tmp_path / "backbone").write_text("a file, no folder")
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--max_steps", "2")
    assert stop.value.code == 1 and re.search("error: .*backbone: cannot be written", capsys.readouterr().err)
    (tmp_path / "backbone").unlink()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--max_steps", "3")
    assert stop.value.code == 1 and "log.jsonl: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("script", ALL)
def test_damaged_checkpoint_is_refused_in_words(run, capsys, scenes, tmp_path, script):
    script, *flags = base(script, scenes, tmp_path)
    run(script, *flags, "--max_steps", 1)
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "checkpoint.pth").write_bytes(whole[:length])
        capsys.readouterr()
        refused(run, capsys, script, flags, "checkpoint.pth cannot be resumed: ")


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
    Image.new("L", (30_000, 30_000)).save(folder / "bomb.png", compress_level=1)
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    return {
        "empty.jpg": "cannot identify image file",
        "truncated.jpg": "truncated",
        "text.png": "cannot identify image file",
        "html.jpg": "cannot identify image file",
        "deep.png": "1 band, not 3",
        "float.tif": "1 band, not 3",
        "bands.tif": "6 bands, not 3",
        "bomb.png": "exceeds limit",
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


@pytest.mark.parametrize("script", [*TRAINING, "eval_knn", "eval_linear", "predict"])
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
        Run(out, "eval_linear", "--output_dir", out, *probe).finish()
        flags = [*loading, "--predict", tmp_path / "val", "--weights", out]
    else:
        data = tmp_path / "train"
        queue = ["--moco_k", 100] if script in ("mhcl", "cmid") else []
        flags = [*tiny(script), *queue, *loading]
        flags += ["--epochs", 1, "--warmup_epochs", 0, "--log_every", 10]
    flags += ["--data_path", data] if script != "predict" else []
    name = "eval_linear" if script == "predict" else script
    text = Run(out, name, "--output_dir", out, *flags).finish()
    splits = 2 if script in ("eval_knn", "eval_linear") else 1
    for file in messages:
        assert len(re.findall(rf"warning: .*{re.escape(file)}", text)) == splits, (file, text[-2000:])
    assert not list(Path.cwd().glob("hacked*")) and not list(tmp_path.rglob("hacked*"))
    if script in TRAINING:
        assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["unreadable"] == len(messages)


def test_folder_that_links_back_to_itself_is_listed_once(scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "data")
    before = common.list_images(tmp_path / "data")
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    os.symlink(tmp_path, tmp_path / "data" / next((tmp_path / "data").iterdir()).name / "above")
    assert common.list_images(tmp_path / "data") == before


def test_folders_that_are_no_data(run, capsys, scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "data")
    before = common.list_images(tmp_path / "data")
    shutil.copytree(scenes / "val", tmp_path / "data" / ".ipynb_checkpoints")
    assert common.list_images(tmp_path / "data") == before
    flags = ["--data_path", tmp_path / "data", "--output_dir", tmp_path / "data", *tiny("dspt_mae")]
    refused(run, capsys, "dspt_mae", flags, "is --output_dir too; give another folder")


def test_machines_with_folders_of_their_own_are_refused(scenes, tmp_path):
    """Rank 1 has no checkpoint to resume from."""
    script, *flags = base("dspt_mae", scenes, tmp_path / "a")
    Run(tmp_path / "a", script, *flags, "--max_steps", 4, processes=2).finish()
    run = Run(tmp_path / "a", script, *flags, processes=2, last=["--output_dir", tmp_path / "b"])
    codes, text = run.wait()
    assert codes == [2, 2] and "start_step is 4 here and 0 in another process" in text


def test_log_of_any_content_is_gone_on_with(train, tmp_path):
    train(tmp_path, "--max_steps", "2", "--log_every", "1")
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b"12\n\xff\xfe\n{half")
    train(tmp_path, "--max_steps", "3", "--log_every", "1")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]


@pytest.mark.parametrize("script", ["mhcl", "dspt_mae"])
def test_image_that_vanishes_is_left_out(scenes, tmp_path, script):
    data = tmp_path / "data"
    data.mkdir()
    for copy in range(5):
        for path in (scenes / "train").rglob("*.png"):
            os.link(path, data / f"{copy}_{path.name}")
    for extra in sorted(data.iterdir())[148:]:
        extra.unlink()  # 37 steps of 4 see all
    flags = ["--data_path", data, *tiny(script), "--epochs", 30, "--num_workers", 1, "--log_every", 1]
    run = Run(tmp_path, script, "--output_dir", tmp_path / "out", *flags, "--max_steps", 111)
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
    create, calls = common.timm.optim.create_optimizer_v2, []

    def poisoned(model, **kwargs):
        first = (
            next(iter(model.parameters())) if isinstance(model, torch.nn.Module) else model[0]["params"][0]
        )
        first.register_hook(lambda grad: grad * (float("inf") if len(calls) == 13 else calls.append(0) or 1))
        return create(model, **kwargs)

    monkeypatch.setattr("timm.optim.create_optimizer_v2", poisoned)
    script, *flags = base(script, scenes, tmp_path, "--log_every", 100)
    with pytest.raises(SystemExit) as stop:
        run(script, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and re.search(
        r"step 14: not finite: \{'loss': \d.*'grad_norm': (inf|nan)", error
    )
    assert read(tmp_path)["step"] == 7  # the epoch before


def test_overflow_of_fp16_is_left_to_the_scaler():
    model, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 2)).sum() * float("inf")).backward()
    scaler.unscale_(optimizer)
    assert common.grad_norm(model, scaler) == 0
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    assert common.grad_norm(model, scaler).item() == pytest.approx(3**0.5)  # of 1, 1 and the bias's 1


def test_one_image_at_a_time_is_no_collapse(train, capsys, tmp_path):
    flags = ["--batch_size_per_gpu", "1", "--max_steps", "10", "--log_every", "1"]
    for script in ("dspt_mae", "dino_mc"):
        train(tmp_path / script, *flags, script=script)
        assert "collapse" not in capsys.readouterr().err


def test_collapse_is_warned_about_once(train, capsys, tmp_path):
    train(tmp_path / "uniform", "--log_every", "1", "--warmup_teacher_temp", "100", "--teacher_temp", "100")
    error = capsys.readouterr().err
    assert error.count("warning: kl below 0.02 since step 1: collapse") == 1 and "Try a lower" in error
    train(tmp_path / "usual", "--log_every", "1")
    assert "collapse" not in capsys.readouterr().err
    process = common.Process(0, 1, torch.device("cpu"), None)
    log = common.RunLog(tmp_path, process, 100, 0, {}, {"kl": 0.02, "feature_std": 0.05}, "Do this.")
    for step in range(1, 30):
        log.write(step, {"kl": 1.0, "feature_std": 0.04 if step > 8 or step == 3 else 0.5})
        warned = capsys.readouterr().err
        assert (warned == "") == (step != 19), step  # a tenth of the run after step 9
        assert step != 19 or "feature_std below 0.05 since step 9" in warned and "Do this." in warned


# --------------------------------------------------------------------------------------------------
# Files that would run code
# --------------------------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_loading_path_runs_code(run, capsys, scenes, tmp_path):
    evil, done = tmp_path / "evil.pth", tmp_path / "hacked"
    attempts = []
    for script in ALL:
        out = tmp_path / script
        out.mkdir()
        script, *flags = base(script, scenes, out)
        attempts.append((script, flags, out / "checkpoint.pth"))
        if script != "eval_linear":
            attempts.append((script, [*flags, "--init", evil], evil))
    for script in ("eval_knn", "eval_linear"):
        flags = ["--data_path", scenes, "--arch", "test_resnet", "--output_dir", tmp_path / "e"]
        flags += ["--nb_knn", 1] if script == "eval_knn" else []
        attempts.append((script, [*flags, "--weights", evil], evil))
        attempts.append(
            (script, [*flags, "--weights", tmp_path / "folder"], tmp_path / "folder/checkpoint.pth")
        )
    flags = ["--predict", scenes / "val", "--weights", tmp_path / "head", "--output_dir", tmp_path / "e"]
    attempts.append(("eval_linear", flags, tmp_path / "head/head.pth"))
    for folder in ("folder", "head"):
        (tmp_path / folder).mkdir()
    for script, flags, path in attempts:
        for save in (torch.save, partial(torch.save, _use_new_zipfile_serialization=False), pickle.dump):
            for content in (Evil(done), {"model": Evil(done), "args": {}}):
                with open(path, "wb") as file:
                    save(content, file)
                capsys.readouterr()
                refused(run, capsys, script, flags, "error: --")
                assert not done.exists()
        path.unlink()
    with open(tmp_path / "evil.npy", "wb") as file:
        np.save(file, np.array([Evil(done)], dtype=object), allow_pickle=True)
    with pytest.raises(common.UnreadableImageError, match="Python objects"):
        common.read_image(tmp_path / "evil.npy")
    assert not done.exists()


# --------------------------------------------------------------------------------------------------
# Leaks
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_memory_stays_flat_over_2000_steps(scenes, tmp_path, script):
    """Of the process and its workers, from step 500 to step 2,000; `pytest -m slow -s` prints it."""
    flags = base(script, scenes, tmp_path, "--epochs", 300, "--save_every", 20, "--num_workers", 1)
    run = Run(tmp_path, *flags, "--log_every", 20, "--max_steps", 2000)
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

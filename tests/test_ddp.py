"""Several gloo processes on one machine."""

import json
import os
import re
import signal

import pytest
import torch
from conftest import TRAINING, Start, assert_same, assert_same_state, read_log, tiny, wait_for

import common


def draw_alike():
    """Every sample gets the same draws on the device, whatever its place in the batch and its process."""
    rand, randn = torch.rand, torch.randn

    def alike(*shape, generator=None, **more):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if generator is None or not shape:
            return rand(shape, generator=generator, **more)
        return rand(shape[1:], generator=torch.Generator().manual_seed(0), **more).expand(shape).clone()

    def no_noise(*shape, generator=None, **more):
        return randn(*shape, generator=generator, **more) * (generator is None)

    torch.rand, torch.randn = alike, no_noise
    for name in ("color_jitter", "grayscale", "gaussian_blur", "solarize"):
        setattr(common, name, lambda images, *draws: images)


def moment(state):
    return state["exp_avg" if "exp_avg" in state else "momentum_buffer"].flatten()


# Nets without BatchNorm. CMID's frequency loss takes the mean spectrum of the own batch: two others remain.
MORE = {
    "mhcl": ["--arch", "test_convnext"],
    "dino_mc": ["--drop_path", 0],
    "cmid": ["--arch", "test_convnext", "--loss_weights", 0, 1, 1],
}
EQUAL = {  # figures that are the same for one process and for several
    "dino_mc": ["loss"],
    "mhcl": ["loss", "top1", "positive", "negative", "cross_entropy"],
    "cmid": ["loss", "global", "local", "match_distance"],
    "dspt_mae": ["loss", "flat_loss"],
}


@pytest.mark.parametrize("script", TRAINING)
def test_two_processes_that_stop_and_resume_equal_one_on_the_joint_batch(scenes, tmp_path, script):
    """Gradient, centre or queue, averages and logged figures; with accumulation, and a start in between."""
    flags = ["--data_path", scenes / "train", *tiny(script, *MORE.get(script, ()))]
    flags += ["--lr", 1e-6, "--warmup_epochs", 0, "--log_every", 1]
    one = ["--output_dir", tmp_path / "1", "--batch_size_per_gpu", 8, "--max_steps", 3]
    two = ["--output_dir", tmp_path / "2", "--batch_size_per_gpu", 2, "--accum_steps", 2]
    Start(tmp_path / "a", script, *flags, *one, prepare=(draw_alike,)).finish()
    for steps in (2, 3):
        text = Start(
            tmp_path / "b", script, *flags, *two, "--max_steps", steps, processes=2, prepare=(draw_alike,)
        ).finish()
        assert text.count(f"{steps} steps done") == 1
    a, b = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in "12")
    # Moments are sums of gradients. Adam's steps are large where the gradient is near 0, hence the tiny rate.
    x, y = (torch.cat([*map(moment, saved["optimizer"]["state"].values())]) for saved in (a, b))
    assert x.norm() > 1e-3 and (x - y).norm() < 0.01 * x.norm()
    for part in a.keys() - {"optimizer", "args", "versions", "scaler"}:
        if not isinstance(a[part], dict):
            assert_same(a[part], b[part], part)
            continue
        for name, value in a[part].items():
            torch.testing.assert_close(
                b[part][name], value, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    for line, other in zip(read_log(tmp_path / "1")[1:], read_log(tmp_path / "2")[2:], strict=False):
        if "step" in other and line["step"] == other["step"]:
            for name in EQUAL[script]:
                assert other[name] == pytest.approx(line[name], rel=1e-3, abs=1e-5), name
    header = read_log(tmp_path / "2")[0]
    assert header["processes"] == 2 and header["effective_batch"] == 8


def toy(out, *flags, **more):
    words = ["--output_dir", out, "--device", "cpu", "--log_every", 1, *flags]
    return Start(out, "toy", *words, **{"processes": 2, **more})


def test_two_processes_in_bf16_are_resumed_to_the_last_bit(scenes, tmp_path):
    flags = ["--data_path", scenes / "train", *tiny("mhcl"), "--amp", "bf16", "--max_steps"]
    for out, steps in (("a", 2), ("b", 1), ("b", 2)):
        Start(tmp_path / out, "mhcl", *flags, steps, "--output_dir", tmp_path / out, processes=2).finish()
    a, b = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same_state(a, b)


def test_log_of_two_processes_holds_means_and_all_unreadable_images(tmp_path):
    """Each process says what it could not read; together 3 of 300 are 1 %, and 4 too many."""
    text = toy(tmp_path / "a", "--samples", 300, "--epochs", 1, "--bad", 3, 70, 150).finish()
    assert sorted(set(re.findall(r"file \d+", text))) == ["file 150", "file 3", "file 70"]
    lines = read_log(tmp_path / "a")[1:]
    assert lines[-1]["unreadable"] == 3 and text.count("37 steps done") == 1
    for line in lines:
        assert line["images_per_s"] * line["step_seconds"] == pytest.approx(8)
    codes, text = toy(tmp_path / "b", "--samples", 300, "--epochs", 2, "--bad", 3, 70, 150, 9).wait()
    assert (
        codes == [1, 1]
        and text.count("4 of 300 images unreadable, over 1 %") == 1
        and "Traceback" not in text
    )


def late_in_one(what):
    """Rank 1 alone sees a signal, or that a checkpoint is overdue, in step 3."""
    end_step = common.Run.end_step

    def call(run, step, *arguments, **values):
        if step == 2 and run.process.rank == 1:
            if what == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                run.saved_at -= 1e6
        end_step(run, step, *arguments, **values)

    common.Run.end_step = call


@pytest.mark.parametrize("what", ["signal", "overdue"])
def test_what_one_process_sees_all_do_at_the_same_step(tmp_path, what):
    flags = ["--epochs", 1, "--batch_size_per_gpu", 2, "--max_steps", 5, "--log_every", 100]
    text = toy(tmp_path, *flags, prepare=(late_in_one, what)).finish()
    steps = [line["step"] for line in read_log(tmp_path)[1:]]
    assert steps == ([3] if what == "signal" else [3, 5])
    assert text.count("the same command resumes") == (what == "signal")


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--samples", 31, "images is 30 here and 31 in another process: --data_path and"),
        ("--output_dir", "OTHER", "start_step is 2 here and 0 in another process"),
    ],
)
def test_processes_that_differ_end_all(tmp_path, flag, value, message):
    toy(tmp_path / "out", "--max_steps", 2).finish()
    value = tmp_path / value if value == "OTHER" else value
    codes, text = toy(tmp_path / "out", last=[flag, value]).wait()
    assert codes == [2, 2] and len(text.splitlines()) == 1 and message in text, text


def test_an_error_of_the_main_process_is_one_line_of_all(tmp_path):
    codes, text = toy(tmp_path, "--output_dir", "/dev/null/x").wait()
    assert codes == [2, 2] and len(text.splitlines()) == 1 and "/dev/null/x: cannot be written to" in text


def test_an_error_of_all_processes_is_printed_once_per_machine(tmp_path):
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "o", *tiny("mhcl")]
    codes, text = Start(tmp_path / "run", "mhcl", *flags, processes=2).wait()
    assert codes == [2, 2] and len(re.findall("^error: .*no image in it", text, re.M)) == 1


KNN = "--weights random image_stats --arch test_resnet --img_size 32 --nb_knn 1 3 10 --per_class"
PROBE = "--weights random image_stats --arch test_resnet --img_size 32 --protocol paper --lrs 1 10 --epochs 4"


@pytest.mark.parametrize(
    "script, flags", [("eval_knn", KNN), ("eval_linear", f"{PROBE} --batch_size 8 --per_class")]
)
def test_evaluation_gives_the_same_figures_with_two_processes(scenes, tmp_path, script, flags):
    flags += " --num_workers 0 --batch_size_per_gpu 4 --device cpu"
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        base = ["--data_path", scenes, "--output_dir", out, *flags.split()]
        text = Start(tmp_path / f"run{processes}", script, *base, processes=processes).finish()
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [json.loads(line) for line in text.splitlines()[-2:]] == lines and text.count("chance") == 1
        results.append([{name: x for name, x in line.items() if name != "seconds"} for line in lines])
    assert results[0] == results[1] and len(results[0]) == 2


def show_statistics():
    """Prints BatchNorm's statistics that a process evaluated with, at its end."""
    forward, leave, last = torch.nn.BatchNorm2d.forward, common.Process.leave, {}

    def seeing(self, x):
        last.update({} if self.training else {"mean": self.running_mean.double().sum().item()})
        return forward(self, x)

    torch.nn.BatchNorm2d.forward = seeing
    common.Process.leave = lambda process: (print("evaluated with", last["mean"]), leave(process))


def test_finetuning_gives_its_result_with_two_processes(scenes, tmp_path):
    """On CPUs BatchNorm takes each process's own batches; the test images are dealt out to all processes."""
    flags = tiny("eval_linear", "--arch", "resnet18", "--mixup", ".8", "--drop_path", ".1")
    base = ["--data_path", scenes, "--output_dir", tmp_path, *flags, "--batch_size_per_gpu", 2, "--epochs", 2]
    text = Start(tmp_path, "eval_linear", *base, "--max_steps", 3, processes=2).finish()
    assert text.count("no result before the last step; the same command resumes") == 1
    assert not (tmp_path / "results.jsonl").exists()
    text = Start(tmp_path, "eval_linear", *base, processes=2, prepare=(show_statistics,)).finish()
    one, other = re.findall("evaluated with (.*)", text)
    assert one == other
    Start(tmp_path, "eval_linear", *base, processes=2).finish()  # evaluates what is in the files again
    first, again = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert 0 <= first["top1"] <= 100 and (tmp_path / "head.pth").exists()
    assert first | {"seconds": 0} == again | {"seconds": 0}


def test_signal_to_one_process_while_it_runs(tmp_path):
    run = toy(tmp_path, "--epochs", 99, "--num_workers", 1)
    wait_for(run, tmp_path / "log.jsonl", 3)
    run.signal(signal.SIGTERM, run.processes[1:])
    assert run.finish().count("the same command resumes") == 1

"""common.Run, which all training scripts share, under the smallest of scripts: tests/toy.py."""

import math
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import assert_same_state, read_log

import common

ALONE = common.Process(0, 1, torch.device("cpu"), None)


def start(out, *flags, process=ALONE, **more):
    """A run in this process; `more` goes to toy.train."""
    words = ["--output_dir", out, "--device", "cpu", "--log_every", 1, *flags]
    return toy.train(toy.get_parser().parse_args([*map(str, words)]), process, **more)


def fails(message, code, capsys, *arguments, **more):
    """The run ends with this one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        start(*arguments, **more)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert stop.value.code == code and len(errors) == 1 and re.search(message, errors[0]), errors


def steps_of(out):
    return [line["step"] for line in read_log(out) if "step" in line]


# ------------------------------------------------------------------ lengths, log, what is written when


def test_lengths_header_and_lines(tmp_path, capsys):
    run = start(tmp_path, "--accum_steps", 2, "--log_every", 2, "--batch_size_per_gpu", 3, scaled_lr=0.5)
    assert (run.effective_batch, run.steps_per_epoch, run.total_steps) == (6, 5, 15)
    assert (run.start_step, run.stop_step, run.stopped, run.saved) == (0, 15, False, None)
    header, *lines = read_log(tmp_path)
    expected = {
        "processes": 1,
        "images": 30,
        "samples": 30,
        "effective_batch": 6,
        "steps": 15,
        "steps_per_epoch": 5,
        "from_step": 0,
        "to_step": 15,
        "scaled_lr": 0.5,
        "init": "from scratch",
        "device": "cpu, 1 threads",
        "argv": sys.argv,
    }
    assert {name: header[name] for name in expected} == expected
    assert header["versions"]["torch"] == str(torch.__version__)
    native = common.computes_bf16(torch.device("cpu"))
    assert header["amp"] == ("bfloat16" if native else "off")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12, 14, 15]  # and after each epoch
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    for line in lines:
        assert line["images_per_s"] * line["step_seconds"] == pytest.approx(6)
        assert line["lr"] == pytest.approx(0.1 / line["step"]) and line["unreadable"] == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "from scratch" and "effective_batch 6  steps_per_epoch 5  steps 15" in out[1]
    assert re.match(r"step 2/15  epoch 0  loss 0\.\d+  all 0\.\d+ 1  grad_norm \d", out[2])
    assert out[-1] == f"15 steps done: {tmp_path}"
    saved = common.load_checkpoint(tmp_path / "checkpoint.pth")
    assert saved["step"] == 15 and saved["epoch"] == 3 and saved["args"]["lr"] == 0.1
    assert not {"scaler", "versions", "model", "optimizer", "images", "samples"} - saved.keys()


def test_a_line_holds_the_means_since_the_last(tmp_path):
    start(tmp_path / "each")
    start(tmp_path / "some", "--log_every", 3)
    each, some = read_log(tmp_path / "each")[1:], read_log(tmp_path / "some")[1:]
    for line, steps in zip(some, ([1, 2, 3], [4, 5, 6], [7], [8, 9]), strict=False):
        losses = [each[step - 1]["loss"] for step in steps]
        assert line["loss"] == pytest.approx(sum(losses) / len(steps)) == line["all"][0]
        assert line["all"][1] == 1 and line["lr"] == each[steps[-1] - 1]["lr"]


@pytest.mark.parametrize("log_every, save_every, max_steps", [(4, 1, 21), (5, 2, 20), (100, 3, 9)])
def test_is_due_says_which_steps_get_a_line(tmp_path, log_every, save_every, max_steps):
    due = []

    def ask(run, step):
        due.extend([step + 1] * run.is_due(step))
        return {}

    flags = ["--log_every", log_every, "--save_every", save_every, "--max_steps", max_steps]
    start(tmp_path, *flags, more_terms=ask)
    assert steps_of(tmp_path) == due and due[-1] == max_steps and len(due) < max_steps


@pytest.fixture
def saves(monkeypatch):
    """The steps after which checkpoints were written."""
    found, save = [], common.Run._save
    monkeypatch.setattr(common.Run, "_save", lambda run, done: (found.append(done), save(run, done)))
    return found


def test_checkpoints_by_epochs_minutes_and_at_the_end(tmp_path, saves, monkeypatch):
    start(tmp_path / "a", "--save_every", 2)
    assert saves == [14, 21] and not list(tmp_path.rglob("*.tmp"))
    saves.clear()
    clock = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: 0.001 * clock.now, now=0.0)
    monkeypatch.setattr(common, "time", clock)

    def pass_time(run, step):
        clock.now += 25
        return {}

    start(tmp_path / "b", "--save_minutes", 1, "--save_every", 2, "--log_every", 100, more_terms=pass_time)
    assert saves == steps_of(tmp_path / "b") == [3, 6, 9, 12, 14, 17, 20, 21]


def test_max_steps_stops_and_more_go_further(tmp_path, saves, capsys):
    assert start(tmp_path, "--max_steps", 2).total_steps == 21
    start(tmp_path, "--max_steps", 4)
    assert saves == [2, 4] and steps_of(tmp_path) == [1, 2, 3, 4]
    start(tmp_path, "--max_steps", 3)  # there already
    assert saves == [2, 4] and capsys.readouterr().out.splitlines()[-1] == f"4 steps done: {tmp_path}"
    assert start(tmp_path).stop_step == 21 and saves == [2, 4, 7, 14, 21]


def test_time_of_pictures_and_checkpoints_does_not_count(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 0, perf_counter=lambda: clock.now, now=0.0)
    monkeypatch.setattr(common, "time", clock)

    def passing(function, seconds):
        def call(*arguments):
            clock.now += seconds
            return function(*arguments)

        return call

    monkeypatch.setattr(common, "save_grid", passing(common.save_grid, 100))
    monkeypatch.setattr(common, "export_backbone", passing(common.export_backbone, 100))
    monkeypatch.setattr(toy.Noise, "__getitem__", passing(toy.Noise.__getitem__, 1))
    start(tmp_path, "--log_every", 3, more_terms=lambda run, step: setattr(clock, "now", clock.now + 2) or {})
    for line in read_log(tmp_path)[1:]:
        assert (line["data_seconds"], line["step_seconds"]) == (4, 6)  # of 4 images; and 2


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize("flags", [[], ["--accum_steps", 2, "--num_workers", 2]])
def test_resumed_run_equals_the_unbroken_one(tmp_path, flags):
    start(tmp_path / "a", *flags)
    for steps in (2, 3, 9, 21):  # within an epoch and across its end
        start(tmp_path / "b", *flags, "--max_steps", steps)
    a, b = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same_state(a, b)
    steps = steps_of(tmp_path / "b")
    assert steps == sorted(set(steps))


def test_log_of_a_resumed_run_has_no_step_twice_whatever_it_held(tmp_path):
    start(tmp_path, "--max_steps", 3)
    with open(tmp_path / "log.jsonl", "ab") as file:  # killed as it wrote, and then edited
        file.write(b'{"step": 4, "loss": 7}\n12\n\xff\xfe\n{"step": null}\n{"step": "x"}\n\n{"step": 5, "lo')
    start(tmp_path, "--max_steps", 5)
    found = [line.get("step", line.get("from_step")) for line in read_log(tmp_path)]
    assert found == [0, 1, 2, 3, 3, 4, 5] and read_log(tmp_path)[-2]["loss"] < 7
    (tmp_path / "checkpoint.pth").unlink()
    start(tmp_path, "--max_steps", 1)
    assert len(read_log(tmp_path)) == 2  # a run from scratch has a log of its own


def test_changed_settings_are_named(tmp_path, capsys):
    start(tmp_path, "--max_steps", 1)
    fails(
        r"other settings: lr was 0.1, is 0.2; weight_decay was 0.1, is 0.3$",
        2,
        capsys,
        tmp_path,
        "--lr",
        0.2,
        "--weight_decay",
        0.3,
    )
    fails("effective_batch was 4, is 2$", 2, capsys, tmp_path, "--batch_size_per_gpu", 2)
    fails("images was 30, is 31; samples was 30, is 31$", 2, capsys, tmp_path, "--samples", 31)
    flags = [
        "--batch_size_per_gpu",
        2,
        "--accum_steps",
        2,
        "--save_every",
        9,
        "--log_every",
        7,
        "--max_steps",
        2,
    ]
    assert start(tmp_path, *flags, "--save_minutes", 3, "--num_workers", 1).start_step == 1


def test_checkpoints_of_the_version_before_are_resumed(tmp_path, capsys, monkeypatch):
    """They lack the number of samples where it is that of the images, and flags that are younger."""
    start(tmp_path, "--max_steps", 1)
    path = tmp_path / "checkpoint.pth"
    saved = common.load_checkpoint(path)
    for name in ("tensorboard", "weight_decay"):
        del saved["args"][name]
    del saved["samples"]
    torch.save(saved, path)
    fails("weight_decay was None, is 0.1$", 2, capsys, tmp_path)
    monkeypatch.setattr(common, "YOUNGER_FLAGS", {"weight_decay": 0.2})
    fails("weight_decay was 0.2, is 0.1$", 2, capsys, tmp_path)
    monkeypatch.setattr(common, "YOUNGER_FLAGS", {"weight_decay": 0.1})
    fails("images was 30, is 31; samples was 30, is 31$", 2, capsys, tmp_path, "--samples", 31)
    assert start(tmp_path, "--max_steps", 2).start_step == 1


def test_damaged_checkpoint_is_refused(tmp_path, capsys):
    start(tmp_path, "--max_steps", 1)
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "checkpoint.pth").write_bytes(whole[:length])
        fails(
            "^error: --output_dir: .*checkpoint.pth cannot be resumed: damaged|no PyTorch",
            2,
            capsys,
            tmp_path,
        )
    for content in ([1], {"step": 3}, {"args": 3, "images": 30}):
        torch.save(content, tmp_path / "checkpoint.pth")
        fails("cannot be resumed: ", 2, capsys, tmp_path)


# ------------------------------------------------------------------ what ends a run, and what is only said


@pytest.mark.parametrize("log_every, bad, name", [(1, 9, "other"), (4, 9, "other"), (100, 8, "grad_norm")])
def test_a_value_that_is_not_finite_ends_the_run_at_its_step(tmp_path, capsys, log_every, bad, name):
    def poisoned(run, step):
        return {name: torch.tensor(math.inf if step + 1 == bad else 1.0), "pair": torch.ones(2)}

    message = (
        rf"step {bad}: not finite: {{'loss': 0\.\d+.*'{name}': inf.*'pair': \[1.0, 1.0\]}}; the last check"
    )
    fails(message, 1, capsys, tmp_path, "--log_every", log_every, more_terms=poisoned)
    assert common.load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 7  # the epoch before


def test_more_than_one_percent_unreadable_end_the_run(tmp_path, capsys):
    flags = ["--samples", 200, "--batch_size_per_gpu", 40, "--epochs", 2, "--save_every", 2]
    flags += ["--num_workers", 1]
    start(tmp_path, *flags, "--bad", 5, 77)  # 1 % is not more
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(warnings) == [f"warning: unreadable, another image taken: file {i}: bad" for i in (5, 77)]
    assert read_log(tmp_path)[-1]["unreadable"] == 2
    fails(
        "3 of 200 images unreadable, over 1 %: file 5: bad$",
        1,
        capsys,
        tmp_path / "b",
        *flags,
        "--bad",
        5,
        77,
        8,
    )
    bad = ["--bad", *range(30)]
    for workers in (0, 1):
        fails(
            "^error: 30 unreadable images in a row, the last: file ",
            1,
            capsys,
            tmp_path / f"c{workers}",
            *bad,
            "--num_workers",
            workers,
        )


def test_collapse_is_warned_about_once(tmp_path, capsys):
    def watch(out, std, *flags):
        """A run without a network whose `std` after each step is given; its warnings of a collapse."""
        words = ["--output_dir", tmp_path / out, "--device", "cpu", "--samples", 28, "--log_every", 1, *flags]
        args = toy.get_parser().parse_args([*map(str, words)])
        run = common.Run(args, ALONE, args.samples, args.samples)
        run.restore(None)
        floors = {"std": 0.05, "absent": 1.0}
        for step in run.steps(run.loader(toy.Noise(args)), floors=floors, advice="Do this."):
            run.end_step(step, {"std": torch.tensor(std(step + 1))})
        return [line for line in capsys.readouterr().err.splitlines() if "collapse" in line]

    def low_from(first):
        return lambda done: 0.04 if done >= first or done == 3 else 0.05

    warnings = watch("a", low_from(20), "--epochs", 10, "--log_every", 2)  # of 70 steps
    assert len(warnings) == 1 and warnings[0].startswith("warning: std below 0.05 since step 20: collapse")
    assert warnings[0].endswith("Do this.")
    for first, count in ((17, 1), (18, 0)):  # five lines, and more than a tenth of 21 steps
        assert len(watch(f"b{first}", low_from(first))) == count
    for low, count in ((8, 1), (7, 0)):  # a tenth of 70 steps, and more than five lines

        def dip(done, low=low):
            return 0.04 if done <= low else 1.0

        assert len(watch(f"c{low}", dip, "--epochs", 10)) == count
    assert not watch("d", low_from(1), "--batch_size_per_gpu", 1)  # one image has no spread


def test_backbone_or_log_that_cannot_be_written_end_the_run(tmp_path, capsys):
    start(tmp_path, "--max_steps", 1)
    os.rename(tmp_path / "backbone", tmp_path / "kept")
    (tmp_path / "backbone").write_text("a file, no folder")
    fails("backbone: cannot be written", 1, capsys, tmp_path, "--max_steps", 2)
    (tmp_path / "backbone").unlink()
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    fails("log.jsonl: cannot be written", 1, capsys, tmp_path, "--max_steps", 3)
    fails("--output_dir /dev/null/x: cannot be written to", 2, capsys, "/dev/null/x")
    fails(
        "31: the effective batch, 62, is larger than the data, 30$",
        2,
        capsys,
        tmp_path,
        "--accum_steps",
        2,
        "--batch_size_per_gpu",
        31,
    )


# ------------------------------------------------------------------ signals


def send(number, at, times=1):
    """A step that sends a signal to this process."""

    def more_terms(run, step):
        for _ in range(times if step == at else 0):
            os.kill(os.getpid(), number)
        return {}

    return more_terms


@pytest.fixture(autouse=True)
def usual_handlers():
    """Those of a process that was started without nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in common.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    return [signal.getsignal(number) for number in common.STOP_SIGNALS]


@pytest.mark.parametrize("number", common.STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_the_run_after_its_step(tmp_path, capsys, saves, number):
    before = handlers()
    run = start(tmp_path, "--log_every", 100, more_terms=send(number, 2))
    assert run.stopped and saves == steps_of(tmp_path) == [3]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by a signal after a checkpoint; the same command resumes: {tmp_path}"
    )
    assert handlers() == before
    last = start(tmp_path, "--max_steps", 5, more_terms=send(number, 4))  # too late to stop anything
    assert not last.stopped and capsys.readouterr().out.endswith(f"5 steps done: {tmp_path}\n")


def test_ctrl_c_again_ends_the_run_at_once(tmp_path, saves):
    before = handlers()
    for first in (signal.SIGTERM, signal.SIGINT):

        def both(run, step, first=first):
            send(first, 2)(run, step)
            return send(signal.SIGINT, 2)(run, step)

        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / first.name, more_terms=both)
        assert handlers() == before and saves == []


def test_nohup_is_heeded(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert not start(tmp_path, "--max_steps", 5, more_terms=send(signal.SIGHUP, 2)).stopped


# ------------------------------------------------------------------ tensorboard


def test_tensorboard_gets_the_figures_and_pictures_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(tmp_path, "--tensorboard", "--max_steps", 4)
    saved = (tmp_path / "checkpoint.pth").read_bytes()
    start(tmp_path, "--tensorboard", "--max_steps", 6)
    (tmp_path / "checkpoint.pth").write_bytes(saved)  # as after a kill: steps 5 and 6 are done again
    start(tmp_path, "--tensorboard", "--max_steps", 7)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    lines = [line for line in read_log(tmp_path) if "step" in line]
    names = set()
    for name in lines[0].keys() - {"step"}:
        values = [line[name] if isinstance(line[name], list) else [line[name]] for line in lines]
        for i in range(len(values[0])):
            tag = name if len(values[0]) == 1 else f"{name}/{i}"
            names.add(tag)
            found = [(event.step, event.value) for event in events.Scalars(tag)]
            assert found == [
                (line["step"], pytest.approx(v[i])) for line, v in zip(lines, values, strict=True)
            ]
    assert set(events.Tags()["scalars"]) == names and events.Tags()["images"] == ["views"]
    (picture,) = events.Images("views")
    assert (picture.step, picture.width, picture.height) == (1, 70, 36)


def test_tensorboard_that_is_absent_is_one_line(tmp_path, capsys, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    fails("--tensorboard: the package tensorboard is not installed", 2, capsys, tmp_path, "--tensorboard")
    start(tmp_path, "--max_steps", 1)
    assert not (tmp_path / "events").exists()


def test_compile_without_a_compiler_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    fails(r"^error: --compile: .* a C\+\+ compiler", 2, capsys, tmp_path / "a", "--compile")
    assert not (tmp_path / "a").exists()


def test_checkpoint_of_another_memory_layout_is_resumed(tmp_path):
    """On a CPU AdamW's fused kernel takes for granted that parameter and averages have the same."""
    start(tmp_path / "a", "--optimizer", "adamw", "--max_steps", 6)
    start(tmp_path / "b", "--optimizer", "adamw", "--max_steps", 3)
    path, layouts = tmp_path / "b" / "checkpoint.pth", set()
    saved = torch.load(path, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        for name, x in state.items():
            state[name] = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
            layouts.add((x.is_contiguous(), state[name].is_contiguous()))
    assert layouts == {(True, True), (True, False)}
    torch.save(saved, path)
    start(tmp_path / "b", "--optimizer", "adamw", "--max_steps", 6)
    assert_same_state(*(common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ab"))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_optimizer_steps_of_a_network_in_channels_last(accum_steps):
    """As those of AdamW's plain loop on the same network in the usual layout."""
    nets, steps = [], []
    for device in (torch.device("cpu"), None):
        torch.manual_seed(0)
        nets.append(common.build_backbone("test_resnet", 32))
        args = SimpleNamespace(optimizer="adamw", lr=0.1, weight_decay=0.1)
        steps.append(common.build_optimizer(nets[-1], args))
        if device:
            common.to_device(nets[-1], device)
        else:
            steps[-1] = torch.optim.AdamW(steps[-1].param_groups, args.lr, foreach=False, fused=False)
    assert any(not p.is_contiguous() for p in nets[0].parameters())
    for _ in range(3):
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            for _ in range(accum_steps):
                grad = torch.randn(p.shape)
                (p * grad).sum().backward()
                (q * grad).sum().backward()
        for step in steps:
            step.step()
            step.zero_grad()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

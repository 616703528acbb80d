"""Several gloo processes on one machine."""

import json
import os
import re
import signal
import socket

import pytest
import test_cmid
import test_dino_mc
import test_dspt_mae
import test_mhcl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_same_state, launch, tiny
from test_cli import wait_for

import common


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def steps_of_one_process(rank, world_size, port, script, accum_steps, path):
    """Two steps of training on this process's share of a fixed batch; the main one saves the result."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    process = common.init_process("cpu")
    tests = {"dino_mc": test_dino_mc, "mhcl": test_mhcl, "cmid": test_cmid, "dspt_mae": test_dspt_mae}
    # CMID's frequency loss takes the mean spectrum of the own batch, so only the other two are the same.
    weights = ["--loss_weights", "0", "1", "1"] if script == "cmid" else []
    flags = ["--accum_steps", str(accum_steps), *weights]
    online, average, loss, meter, _ = tests[script].train_two_steps(flags, process=process)
    summary = meter.summary(2, 8)
    flags = common.agree(process, rank == 1, rank == 5)
    if process.is_main:
        parts = {"online": online, "average": average, "loss": loss}  # a method may have the first alone
        state = {name: part.state_dict() for name, part in parts.items() if part}
        terms = {name: torch.tensor(summary[name]) for name in meter_terms(script)}
        torch.save({**state, "terms": terms, "unreadable": summary["unreadable"], "flags": flags}, path)
    if world_size > 1:
        dist.destroy_process_group()


def meter_terms(script):
    """What is the same for one process and for several."""
    return {
        "dino_mc": ["loss"],
        "mhcl": ["loss", "top1", "positive", "negative", "cross_entropy"],
        "cmid": ["loss", "global", "local", "match_distance"],
        "dspt_mae": ["loss", "flat_loss"],
    }[script]


@pytest.mark.parametrize(
    "script, accum_steps",
    [("dino_mc", 1), ("dino_mc", 2), ("mhcl", 2), ("cmid", 1), ("dspt_mae", 1), ("dspt_mae", 2)],
)
def test_two_processes_equal_one_on_the_joint_batch(tmp_path, script, accum_steps):
    """Gradient, centre or queue, average and logged figures; the models have no BatchNorm."""
    results = []
    for world_size in (1, 2):
        path = tmp_path / f"{world_size}.pth"
        accum = accum_steps if world_size == 2 else 1
        arguments = (world_size, free_port(), script, accum, path)
        mp.start_processes(steps_of_one_process, arguments, nprocs=world_size, start_method="spawn")
        results.append(torch.load(path, weights_only=True))
    one, two = results
    assert one.keys() == two.keys() and {"online", "terms"} <= one.keys()
    for part in one.keys() - {"unreadable", "flags"}:
        assert one[part].keys() == two[part].keys() != set()
        for name, value in one[part].items():
            torch.testing.assert_close(
                two[part][name], value, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert one["unreadable"] == 1 and two["unreadable"] == 2  # the union over processes
    assert one["flags"] == [False, False] and two["flags"] == [True, False]


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.parametrize(
    "script, flags",
    [
        ("dino_mc", ["--arch", "test_resnet", "--batch_size_per_gpu", "2", "--accum_steps", "2"]),
        ("mhcl", ["--batch_size_per_gpu", "2", "--accum_steps", "2", "--bn_groups", "1"]),
        ("cmid", ["--batch_size_per_gpu", "2", "--accum_steps", "2"]),
        ("dspt_mae", ["--batch_size_per_gpu", "2", "--accum_steps", "2"]),
    ],
)
def test_two_processes_train_stop_and_go_on_bit_for_bit(scenes, tmp_path, script, flags):
    flags = tiny(script, *flags, "--log_every", "1", "--save_every", "100", "--epochs", "12")
    base = [f"{script}.py", "--data_path", scenes / "train", *flags]
    finish(launch(*base, "--output_dir", tmp_path / "a", "--max_steps", "12", processes=2))
    process = launch(
        *base, "--output_dir", tmp_path / "b", "--num_workers", "1", processes=2, start_new_session=True
    )
    wait_for(process, tmp_path / "b" / "log.jsonl", 3)
    os.killpg(process.pid, signal.SIGTERM)  # the launcher, both processes and their workers
    out, err = process.communicate(timeout=60)
    assert out.count("stopped by a signal after a checkpoint") == 1, err[-3000:]
    assert 3 <= torch.load(tmp_path / "b" / "checkpoint.pth", weights_only=True)["step"] < 36
    stopped_at = torch.load(tmp_path / "b" / "checkpoint.pth", weights_only=True)["step"]
    end = ["--max_steps", str(max(12, stopped_at + 1))]
    finish(launch(*base, "--output_dir", tmp_path / "b", *end, processes=2))
    finish(launch(*base, "--output_dir", tmp_path / "a", *end, processes=2))
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert_same_state(b, a)
    header = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert header["processes"] == 2 and header["effective_batch"] == 8


def test_evaluation_gives_the_same_figure_with_two_processes(scenes, tmp_path):
    figures = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        text = finish(
            launch(
                "eval_knn.py",
                "--data_path",
                scenes,
                "--weights",
                "random",
                "image_stats",
                "--arch",
                "test_resnet",
                "--img_size",
                32,
                "--nb_knn",
                1,
                3,
                10,
                "--per_class",
                "--output_dir",
                out,
                "--num_workers",
                0,
                "--batch_size_per_gpu",
                4,
                "--device",
                "cpu",
                processes=processes,
            )
        )
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [json.loads(line) for line in text.splitlines()[-2:]] == lines and text.count("kNN top-1") == 1
        figures.append([(line["top1"], line["per_class"], line["train_images"]) for line in lines])
    assert figures[0] == figures[1]


def test_probe_gives_the_same_figures_with_two_processes(scenes, tmp_path):
    results = []
    for processes in (1, 2):
        flags = "--weights random image_stats --arch test_resnet --img_size 32 --epochs 4 --batch_size 8"
        flags += (
            " --protocol paper --lrs 1 10 --num_workers 0 --batch_size_per_gpu 4 --device cpu --per_class"
        )
        out = tmp_path / str(processes)
        command = ["eval_linear.py", "--data_path", scenes, "--output_dir", out, *flags.split()]
        finish(launch(*command, processes=processes))
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        results.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    assert results[0] == results[1] and len(results[0]) == 2


def test_finetuning_with_two_processes_stops_and_goes_on(scenes, tmp_path):
    flags = "--finetune --weights random --arch test_vit --patch_size 8 --img_size 32 --epochs 3"
    flags += " --warmup_epochs 1 --batch_size_per_gpu 2 --accum_steps 2 --mixup .8 --drop_path .1"
    flags += " --num_workers 0 --device cpu"
    base = ["eval_linear.py", "--data_path", scenes, *flags.split()]
    finish(launch(*base, "--output_dir", tmp_path / "a", processes=2))
    out = finish(launch(*base, "--output_dir", tmp_path / "b", "--max_steps", "4", processes=2))
    assert out.count("stopped before the end; the same command goes on") == 1
    finish(launch(*base, "--output_dir", tmp_path / "b", processes=2))
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert_same_state(b, a)
    assert a["effective_batch"] == 8 and (tmp_path / "a" / "head.pth").exists()
    tops = [json.loads((tmp_path / name / "results.jsonl").read_text())["top1"] for name in "ab"]
    assert tops[0] == tops[1]


def test_error_is_printed_once_per_machine(tmp_path):
    process = launch(
        "dino_mc.py", "--data_path", tmp_path, "--output_dir", tmp_path / "o", *tiny("dino_mc"), processes=2
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and len(re.findall("^error: .*no image in it", err, re.M)) == 1

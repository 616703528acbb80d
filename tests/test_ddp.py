"""Several gloo processes on one machine."""

import atexit
import gc
import json
import os
import re
import signal
from pathlib import Path

import pytest
import test_cmid
import test_dino_mc
import test_dspt_mae
import test_mhcl
import timm
import torch
import torch.distributed as dist
from conftest import Run, assert_same_state, free_port, launch, server, tiny, wait_for

import common
import eval_knn
import eval_linear


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
        processes = [
            server.Process(target=steps_of_one_process, args=(rank, *arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)
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


TASKS = Path("/proc/self/task")


def count_threads_at_exit():
    """Threads of gloo that live on may ask for Python's lock when there is none, which aborts the process."""
    gc.disable()  # else it is chance whether DDP's cycles were collected before
    atexit.register(
        lambda: print("threads of gloo:", sum("gloo" in path.read_text() for path in TASKS.glob("*/comm")))
    )


@pytest.mark.parametrize(
    "script, flags",
    [
        ("dino_mc", ["--arch", "test_resnet", "--batch_size_per_gpu", "2", "--accum_steps", "2"]),
        ("mhcl", ["--batch_size_per_gpu", "2", "--accum_steps", "2", "--bn_groups", "1"]),
        ("cmid", ["--batch_size_per_gpu", "2", "--accum_steps", "2"]),
        ("dspt_mae", ["--batch_size_per_gpu", "2", "--accum_steps", "2"]),
        ("eval_linear", ["--batch_size_per_gpu", "2", "--accum_steps", "2"]),
    ],
)
def test_two_processes_train_stop_and_go_on_bit_for_bit(scenes, tmp_path, script, flags):
    flags = tiny(script, *flags, "--log_every", "1", "--save_every", "100", "--epochs", "12")
    base = [script, "--data_path", scenes if script == "eval_linear" else scenes / "train", *flags]

    def run(name, *more):
        flags = [*base, "--output_dir", tmp_path / name, *more]
        return Run(tmp_path / name, *flags, processes=2, prepare=(count_threads_at_exit,))

    assert "threads of gloo: 0" in run("a", "--max_steps", "12").finish()
    stopped = run("b", "--num_workers", "1")
    wait_for(stopped, tmp_path / "b" / "log.jsonl", 3)
    stopped.signal(signal.SIGTERM)
    assert stopped.finish().count("the same command goes on") == 1
    step = torch.load(tmp_path / "b" / "checkpoint.pth", weights_only=True)["step"]
    assert 3 <= step < 36
    end = str(max(12, step + 1))
    for name in "ab":
        run(name, "--max_steps", end).finish()
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert_same_state(b, a)
    header = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert header["processes"] == 2 and header["effective_batch"] == 8


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
        text = Run(tmp_path / f"run{processes}", script, *base, processes=processes).finish()
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert [json.loads(line) for line in text.splitlines()[-2:]] == lines and text.count("top-1") == 1
        results.append([{name: x for name, x in line.items() if name != "seconds"} for line in lines])
    assert results[0] == results[1] and len(results[0]) == 2


def test_finetuning_gives_its_result_with_two_processes(scenes, tmp_path):
    flags = tiny("eval_linear", "--mixup", ".8", "--drop_path", ".1", "--batch_size_per_gpu", "2")
    base = ["--data_path", scenes, "--output_dir", tmp_path, *flags]
    text = Run(tmp_path, "eval_linear", *base, "--max_steps", "4", processes=2).finish()
    assert text.count("stopped before the end; the same command goes on") == 1
    assert not (tmp_path / "results.jsonl").exists()
    Run(tmp_path, "eval_linear", *base, processes=2).finish()
    Run(tmp_path, "eval_linear", *base, processes=2).finish()  # judges what is in the files again
    first, again = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert 0 <= first["top1"] <= 100 and (tmp_path / "head.pth").exists()
    assert first | {"seconds": 0} == again | {"seconds": 0}


def finetune_in_one_process(rank, port, samples, out):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    process = common.init_process("cpu")
    flags = ["--data_path", "x", "--output_dir", out, *tiny("eval_linear", "--max_steps", "3")]
    args = eval_linear.get_parser().parse_args([*map(str, flags)])
    model = timm.create_model("test_resnet", num_classes=10)
    eval_linear.finetune(model, samples, 10, 32, (0.5,) * 3, (0.5,) * 3, args, process, out)
    torch.save(dict(model.named_buffers()), out / f"{rank}.pth")
    dist.destroy_process_group()


def test_finetuned_processes_end_with_the_same_statistics(scenes, tmp_path):
    """On CPUs BatchNorm takes each process's own batches; the test images are dealt out to all processes."""
    arguments = free_port(), eval_knn.load_split(str(scenes), 0.2, 0)[0], tmp_path
    processes = [server.Process(target=finetune_in_one_process, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    assert one and all(torch.equal(one[name], other[name]) for name in one)


def test_launched_processes_train(scenes, tmp_path):
    flags = ["--data_path", scenes / "train", "--output_dir", tmp_path, *tiny("dspt_mae")]
    process = launch("dspt_mae.py", *flags, processes=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("9 steps done") == 1, err[-3000:]


def test_error_is_printed_once_per_machine(tmp_path):
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "o", *tiny("dino_mc")]
    codes, text = Run(tmp_path / "run", "dino_mc", *flags, processes=2).wait()
    assert codes == [2, 2] and len(re.findall("^error: .*no image in it", text, re.M)) == 1

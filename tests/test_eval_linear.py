import contextlib
import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, assert_same_state, tiny, warm_cosine
from PIL import Image
from test_eval_knn import PIXELS, write_multi_label, write_tiles

import common
import eval_knn
import eval_linear
from common import Process
from eval_knn import Backbone, Labelled

ALONE = Process(0, 1, torch.device("cpu"), None)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_args(*flags):
    base = "--data_path x --output_dir x --weights random --num_workers 0 --device cpu".split()
    args = eval_linear.get_parser().parse_args([*base, *map(str, flags)])
    eval_linear.check_args(args)
    return args


# ------------------------------------------------------------------ heads


def head_data(N=50, D=6, C=4):
    return rand(N, D), torch.randint(C, (N,), generator=torch.Generator().manual_seed(1)), torch.arange(N)


def heads_of(x, labels, index, lrs, *flags):
    """Heads after three epochs of batches of 16."""
    args = make_args("--epochs", 3, "--batch_size", 16, *flags)
    return eval_linear.train_heads(lambda _: x, labels, index, 4, lrs, args)


@pytest.mark.parametrize("schedule, multi_label", [(None, False), ([2, 3], False), (None, True)])
def test_heads_trained_at_once_equal_torchs_sgd_one_by_one(schedule, multi_label):
    """Each of the batched heads is what torch.optim.SGD makes of one head, with the same batches."""
    x, labels, index = head_data()
    loss_of = F.cross_entropy
    if multi_label:
        labels, loss_of = (rand(50, 4, seed=2) > 0.3).float(), torch.nn.BCEWithLogitsLoss()
    index, lrs, epochs = index[5:], [0.01, 0.3, 2.0], 4
    flags = ["--epochs", epochs, "--seed", 3, *(["--schedule", *schedule] if schedule else [])]
    W, b = heads_of(x, labels, index, [lr * 256 / 16 for lr in lrs], *flags)
    generator = torch.Generator().manual_seed(common.stream_seed(3, "head"))
    start = 0.01 * torch.randn(4, 6, generator=generator)
    for i, lr in enumerate(lrs):
        head = torch.nn.Linear(6, 4)
        head.weight.data.copy_(start)
        head.bias.data.zero_()
        optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9)
        step = 0
        for epoch in range(epochs):
            order = torch.Generator().manual_seed(common.stream_seed(3, "head order", epoch))
            shuffled = index[torch.randperm(45, generator=order)]
            for first in range(0, 45, 16):
                now = lr * 0.5 * (1 + math.cos(math.pi * step / 12))
                if schedule:
                    now = lr * (0.1 if epoch == 2 else 0.01 if epoch == 3 else 1)
                optimizer.param_groups[0]["lr"] = now
                batch = shuffled[first : first + 16]
                optimizer.zero_grad()
                loss_of(head(x[batch]), labels[batch]).backward()
                optimizer.step()
                step += 1
        torch.testing.assert_close(W[i], head.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b[i], head.bias.data, atol=1e-5, rtol=1e-4)
    assert not W.requires_grad and not b.requires_grad


def test_a_head_does_not_depend_on_the_others():
    x, labels, index = head_data()
    together = heads_of(x, labels, index, [0.1, 1.0, 9.0])
    for i, lr in enumerate([0.1, 1.0, 9.0]):
        alone = heads_of(x, labels, index, [lr])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-6, rtol=1e-5)


def test_heads_learn_from_the_images_of_their_index_alone():
    x, labels, index = head_data()
    other = labels.clone()
    other[:10] = (other[:10] + 1) % 4
    assert_same(*(list(heads_of(x, y, index[10:], [1.0])) for y in (labels, other)))


def test_held_out_part_is_stratified_and_repeatable():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    mask = eval_linear.held_out(labels, 0)
    assert [int(mask[labels == c].sum()) for c in range(4)] == [2, 1, 1, 0]
    assert torch.equal(mask, eval_linear.held_out(labels, 0))
    assert any(not torch.equal(mask, eval_linear.held_out(labels, seed)) for seed in range(1, 9))


# ------------------------------------------------------------------ figures


def test_metrics_and_confusion_matrix_against_counting():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)  # class 4 has no test image
    predicted = torch.randint(5, (60,), generator=generator)
    predicted[predicted == 2] = 3  # class 2 is never predicted
    confusion = eval_linear.confusion_matrix(labels, predicted, 5)
    pairs = list(zip(labels.tolist(), predicted.tolist(), strict=True))
    assert all(confusion[t, p] == pairs.count((t, p)) for t in range(5) for p in range(5))
    precisions, recalls, f1s = [], [], []
    for c in range(4):
        right = pairs.count((c, c))
        said, there = sum(p == c for _, p in pairs), sum(t == c for t, _ in pairs)
        precision, recall = right / said if said else 0.0, right / there
        precisions.append(precision)
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    expected = {"top1": sum(t == p for t, p in pairs) / 60, "macro_precision": sum(precisions) / 4}
    expected |= {"macro_recall": sum(recalls) / 4, "macro_f1": sum(f1s) / 4}
    figures = eval_linear.metrics(confusion)
    assert figures.keys() == expected.keys()
    for name, value in figures.items():
        assert value == pytest.approx(100 * expected[name], abs=1e-3), name


def test_confusion_picture_is_dark_where_a_class_goes(tmp_path):
    confusion = torch.tensor([[4, 0], [1, 3]])
    eval_linear.save_confusion(tmp_path / "c.png", confusion, ["a", "bb"])
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("L")).astype(int)
    left = 8 + 7 * 2
    cells = [[picture[30 * row + 4, left + 30 * column + 24] for column in range(2)] for row in range(2)]
    assert cells[0] == [0, 255] and abs(cells[1][0] - 191) <= 1 and abs(cells[1][1] - 64) <= 1


# ------------------------------------------------------------------ features


def backbone_of(model):
    return Backbone(model, 32, common.IMAGENET_MEAN, common.IMAGENET_STD, "x", "x")


@pytest.mark.parametrize("n, avgpool", [(1, False), (3, False), (2, True)])
def test_vit_features_are_normed_class_tokens_of_the_last_blocks(n, avgpool):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8).eval()
    images = rand(2, 3, 32, 32)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    tokens = []
    for block in vit.blocks:
        x = block(x)
        tokens.append(vit.norm(x))
    expected = torch.cat([t[:, 0] for t in tokens[-n:]] + ([tokens[-1][:, 1:].mean(1)] if avgpool else []), 1)
    features = eval_linear.with_features(backbone_of(vit), "x", n, avgpool).model(images)
    torch.testing.assert_close(features, expected)
    if (n, avgpool) == (1, False):
        torch.testing.assert_close(features, vit(images))


def probe(scenes, model, *flags, test=None):
    args = make_args("--epochs", 5, "--batch_size", 8, *flags)
    train, own_test, classes, _ = eval_knn.load_split(str(scenes), 0.2, 0)
    (done,) = eval_linear.probe(backbone_of(model), train, test or own_test, classes, args, ALONE)
    return done


def resnet():
    torch.manual_seed(0)
    return common.build_backbone("test_resnet", 32)


def test_backbone_stays_as_it_is(scenes):
    backbone = resnet().train()
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    probe(scenes, backbone, "--lrs", 1, 10)
    assert_same(dict(backbone.state_dict()), before)  # BatchNorm's statistics too


def test_learning_rate_is_chosen_without_the_test_images(scenes):
    """With other labels, or other images, in the test part the choice and the head are the same."""
    test = eval_knn.load_split(str(scenes), 0.2, 0)[1]
    wrong, few = Labelled(test.paths, (test.labels + 3) % 10), test.part(torch.arange(20) < 4)
    results = [probe(scenes, resnet(), test=part) for part in (test, wrong, few)]
    first = results[0]
    for result, _, _, head in results:
        assert (result["lr"], result["held_out_top1"]) == (first[0]["lr"], first[0]["held_out_top1"])
        assert_same(list(head), list(first[3]))
    assert not torch.equal(results[0][2], results[1][2]) and len(results[2][2]) == 4
    assert first[0]["held_out_images"] == 10 and first[0]["train_images"] == 30
    best = max(first[0]["held_out_top1"].values())
    assert first[0]["held_out_top1"][f"{first[0]['lr']:g}"] == best


def test_heads_to_choose_from_do_not_see_the_held_out_images(scenes, monkeypatch):
    trained_on = []
    train_heads = eval_linear.train_heads

    def noting(features_at, labels, index, *more):
        trained_on.append((index, labels))
        return train_heads(features_at, labels, index, *more)

    monkeypatch.setattr(eval_linear, "train_heads", noting)
    probe(scenes, resnet(), "--lrs", 1, 10)
    (choosing, labels), (everything, _) = trained_on
    held = eval_linear.held_out(labels, 0)
    assert torch.equal(choosing, (~held).nonzero().flatten()) and held.sum() == 10
    assert torch.equal(everything, torch.arange(30))


def test_head_of_the_chosen_rate_is_trained_on_all_images(scenes):
    result, logits, _, (weight, bias) = probe(scenes, resnet(), "--lrs", 1, 10, "--batch_size", 8)
    again = probe(scenes, resnet(), "--lrs", result["lr"], "--batch_size", 8)
    assert_same([weight, bias], list(again[3]))
    assert "held_out_top1" not in again[0] and torch.equal(logits, again[1])
    # its rate is scaled by the batch
    args = make_args("--epochs", 5, "--batch_size", 256)
    train = eval_knn.load_split(str(scenes), 0.2, 0)[0]
    dataset, y = eval_knn.CenterCrops(train.paths, backbone_of(None)), train.labels
    x, _ = eval_knn.extract_features(backbone_of(resnet()), dataset, args, ALONE)
    args.batch_size, lr = 8, result["lr"]
    W, b = eval_linear.train_heads(lambda _: x.clone(), y.clone(), torch.arange(30), 10, [lr], args)
    assert_same([W[0], b[0]], [weight, bias])


@pytest.mark.parametrize("flags, epochs", [(["--protocol", "paper"], 5), ([], 0)])
def test_the_papers_protocol_has_new_crops_in_each_epoch(scenes, monkeypatch, flags, epochs):
    seen = []
    extract = eval_linear.extract_features

    def count(backbone, dataset, *more):
        seen.append(getattr(dataset, "epoch", None))
        return extract(backbone, dataset, *more)

    monkeypatch.setattr(eval_linear, "extract_features", count)
    probe(scenes, resnet(), "--lrs", "1", *flags)
    assert seen == [None, None, *range(epochs)]


def test_crops_of_an_epoch_are_repeatable(scenes):
    train = eval_knn.load_split(str(scenes), 0.2, 0)[0]
    one, same, other = (eval_linear.CropsOfEpoch(train.paths, backbone_of(None), 0, i) for i in (1, 1, 2))
    (a, index, message), (b, _, _), (c, _, _) = one[7], same[7], other[7]
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 32, 32) and a.max() < 3
    assert index == 7 and message == ""


def test_split_does_not_depend_on_the_file_systems_order(scenes, monkeypatch):
    expected = eval_knn.load_split(str(scenes / "train"), 0.3, 0)
    walk = eval_knn.common.os.walk
    iterdir = type(scenes).iterdir
    monkeypatch.setattr("os.walk", lambda *a, **k: ((f, d, n[::-1]) for f, d, n in list(walk(*a, **k))[::-1]))
    monkeypatch.setattr(type(scenes), "iterdir", lambda path: iter(sorted(iterdir(path), reverse=True)))
    again = eval_knn.load_split(str(scenes / "train"), 0.3, 0)
    assert [list(part.paths) for part in again[:2]] == [list(part.paths) for part in expected[:2]]
    assert_same([part.labels for part in again[:2]], [part.labels for part in expected[:2]])


# ------------------------------------------------------------------ whole runs


def flags_of(scenes, out, *flags):
    base = ["--data_path", scenes, "--output_dir", out, "--num_workers", "0", "--device", "cpu"]
    return [*base, "--img_size", "32", "--epochs", "3", *flags]


def results_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_linear_probe_of_all_kinds_and_prediction(run, train, scenes, tmp_path, capsys):
    train(tmp_path / "mae", "--max_steps", "1", script="dspt_mae")  # a ViT
    capsys.readouterr()
    weights = ["--weights", tmp_path / "mae", "image_stats", "random"]
    run("eval_linear", *flags_of(scenes, tmp_path / "out", *weights, "--per_class", "--batch_size", "8"))
    printed, results = capsys.readouterr().out, results_of(tmp_path / "out")
    assert [json.loads(line) for line in printed.splitlines()[-3:]] == results
    assert [r["arch"] for r in results] == ["test_vit", None, "test_vit"]
    for r in results:
        assert r["task"] == "linear, cached" and 0 <= r["top1"] <= 100 and len(r["per_class"]) == 10
        assert r["train_images"] == 30 and r["test_images"] == 20 and len(r["held_out_top1"]) == 18
        assert np.mean(r["per_class"]) == pytest.approx(r["macro_recall"], abs=1e-2)
    assert Image.open(tmp_path / "out" / "confusion.png").size[0] > 300
    head = torch.load(tmp_path / "out" / "head.pth", weights_only=True)
    assert head["weight"].shape == (10, 4 * 64) and head["n_last_blocks"] == 4  # four class tokens

    new = tmp_path / "new folder"
    new.mkdir()
    labels = {}
    for i, path in enumerate(sorted((scenes / "val").rglob("*.png"))):
        labels[f"{i} ü.png"] = path.parent.name
        (new / f"{i} ü.png").write_bytes(path.read_bytes())
    flags = ["--predict", new, "--weights", tmp_path / "out", "--output_dir", tmp_path / "p"]
    run("eval_linear", *flags, "--num_workers", "0", "--device", "cpu")
    with open(tmp_path / "p" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    right = sum(labels[row["path"].rsplit("/", 1)[1]] == row["class"] for row in rows)
    assert 100 * right / 20 == results[0]["top1"]  # the same images, the same head


def test_unreadable_images_are_left_out_of_the_prediction(run, scenes, tmp_path, capsys):
    run("eval_linear", *flags_of(scenes, tmp_path / "out", "--weights", "random", "--arch", "test_resnet"))
    new = tmp_path / "new"
    new.mkdir()
    path = next((scenes / "val").rglob("*.png"))
    for i in range(100):
        (new / f"{i:03}.png").write_bytes(path.read_bytes())
    for i in (50, 60, 70):  # more than the 1 % that training and evaluation take
        (new / f"{i:03}.png").write_text("no image")
    flags = ["--predict", new, "--weights", tmp_path / "out", "--output_dir", tmp_path / "out"]
    run("eval_linear", *flags, "--num_workers", "0", "--device", "cpu")
    captured = capsys.readouterr()
    assert "97 of 100 images classified" in captured.out and "050.png" in captured.err
    text = (tmp_path / "out" / "predictions.csv").read_text()
    assert "049.png" in text and "050.png" not in text
    for flag in ("--avgpool", "--in_chans=4", "--per_class", "--finetune", "--protocol=paper", "--lr=1"):
        with pytest.raises(SystemExit):
            run("eval_linear", *flags, flag)
        words = "learned from 3 bands" if "in_chans" in flag else ": not with --predict"
        assert words in capsys.readouterr().err


FINETUNE = "--finetune --arch test_resnet --weights random --batch_size_per_gpu 4 --warmup_epochs 1".split()
REGULARISED = "--mixup .8 --cutmix 1 --smoothing .1 --erase .5 --rand_augment 9 --drop_path .1".split()


VIT = ["--arch", "test_vit", "--patch_size", "8"]


@pytest.mark.parametrize("flags", [["--optimizer", "adan", *REGULARISED],
                                   [*VIT, "--layer_decay", ".65", "--accum_steps", "2", "--mixup", ".8"]])
def test_finetuning_resumes_bit_for_bit(run, scenes, tmp_path, capsys, flags):
    for name, steps in (("a", [None]), ("b", [2, 5, None])):
        for stop in steps:
            extra = ["--max_steps", stop] if stop else []
            run("eval_linear", *flags_of(scenes, tmp_path / name, *FINETUNE, *flags, *extra))
            printed = capsys.readouterr().out
            assert (tmp_path / name / "results.jsonl").exists() == (stop is None)
            assert ("no result before the last step; the same command" in printed) == (stop is not None)
            words = "".join(line for line in printed.splitlines() if line[:1] != "{")  # without the result
            assert ("initial weights of seed 0" in words) == (stop != 5 and (name, stop) != ("b", None))
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert_same_state(b, a)
    one, two = (results_of(tmp_path / name)[0] for name in "ab")
    assert one["task"] == "finetune" and one["top1"] == two["top1"] and a["epoch"] == 3
    heads = [torch.load(tmp_path / name / "head.pth", weights_only=True) for name in "ab"]
    assert_same(*heads)
    name = "fc" if "adan" in flags else "head"
    assert torch.equal(heads[0]["weight"], a["model"][f"{name}.weight"])


def test_a_finetuning_is_not_resumed_with_other_weights(run, scenes, tmp_path, capsys):
    for seed in (1, 2):
        torch.manual_seed(seed)
        backbone = common.build_backbone("test_resnet", 32)
        common.export_backbone(backbone, tmp_path / "source", (0.5,) * 3, (0.2,) * 3)
        more = ["--weights", tmp_path / "source", "--max_steps", 1]
        flags = flags_of(scenes, tmp_path / "out", *FINETUNE, *more)
        with pytest.raises(SystemExit) if seed == 2 else contextlib.nullcontext():
            run("eval_linear", *flags)
    assert "other settings: weights_digest was" in capsys.readouterr().err


def test_finetuned_backbone_and_head_predict_as_the_model_did(run, scenes, tmp_path, capsys):
    run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, "--lr", ".05", "--layer_decay", ".9"))
    result = results_of(tmp_path)[0]
    flags = ["--predict", scenes / "val", "--weights", tmp_path, "--output_dir", tmp_path]
    run("eval_linear", *flags, "--num_workers", "0", "--device", "cpu")
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["path"].split("/")[-2] == row["class"] for row in rows)
    assert 100 * right / len(rows) == result["top1"]
    before = timm.create_model("test_resnet", num_classes=0).state_dict()
    after = common.read_weights(str(tmp_path))[0]
    assert after.keys() == before.keys()


def test_finetuning_learns(run, scenes, tmp_path):
    """It is trained and tested on the same images here: they are learned by heart."""
    data = tmp_path / "data"
    for name in ("train", "val"):
        (data / name).mkdir(parents=True)
        for c in ("forest", "dense_housing"):
            (data / name / c).symlink_to(scenes / "train" / c)
    flags = ["--finetune", "--arch", "test_resnet", "--weights", "random", "--batch_size_per_gpu", "6"]
    flags += ["--lr", ".2", "--epochs", "40", "--warmup_epochs", "2", "--log_every", "5"]
    run("eval_linear", *flags_of(data, tmp_path / "out", *flags))
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 < lines[1]["loss"]
    assert results_of(tmp_path / "out")[0]["top1"] >= 80


def test_finetuning_regularises_as_asked_and_follows_its_schedule(run, scenes, tmp_path):
    """Each flag alone changes the loss of the first batch, whose images and weights are the same."""

    def lines(*flags, steps=1):
        out = tmp_path / "_".join(flags or ["plain"])
        more = ["--max_steps", steps, "--log_every", "1", "--lr", ".64", "--min_lr", ".001", *flags]
        run("eval_linear", *flags_of(scenes, out, *FINETUNE, *VIT, *more))
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]

    plain = lines(steps=21)
    assert [line["lr"] for line in plain] == pytest.approx(warm_cosine())  # .64 * 4 / 256
    assert lines("--mixup", "0")[0]["loss"] == plain[0]["loss"]
    for flag, value in zip(REGULARISED[::2], REGULARISED[1::2], strict=True):
        assert lines(flag, "1" if flag == "--erase" else value)[0]["loss"] != plain[0]["loss"], flag


def test_each_micro_batch_has_draws_of_its_own(run, scenes, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(eval_linear, "erase_and_mix", lambda images, targets, C, args: (
        seeds.append(torch.initial_seed()) or images, targets))
    run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, "--accum_steps", "2", "--max_steps", "3"))
    assert len(set(seeds)) == len(seeds) == 6


def test_layer_decay_lowers_the_rate_of_early_layers(run, scenes, tmp_path):
    flags = [*VIT, "--layer_decay", ".5", "--max_steps", "4", "--log_every", "1"]
    run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, *flags))
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    groups = saved["optimizer"]["param_groups"]
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["lr"]
    scales = {group["lr_scale"] for group in groups}
    depth = max(int(name.split(".")[1]) for name in saved["model"] if name.startswith("blocks.")) + 1
    assert scales == {0.5**i for i in range(depth + 2)}  # the head 1, the patch projection least
    for group in groups:
        assert group["lr"] == pytest.approx(last * group["lr_scale"])
        assert group["weight_decay"] in (0.0, 0.05)


@pytest.mark.parametrize("source, file, words", [
    ("own", "x", "holds OUT, which would be replaced"), ("backbone", "x", "which would be replaced"),
    ("random", "head.pth", "holds a linear probe, whose backbone would be replaced")])
def test_a_run_replaces_no_weights_of_others(run, scenes, tmp_path, capsys, source, file, words):
    out = tmp_path / "out"
    common.export_backbone(resnet(), out / "backbone", (0.5,) * 3, (0.5,) * 3)
    (out / file).touch()
    name = {"own": out, "backbone": out / "backbone"}.get(source, source)
    before = (out / "backbone" / "model.safetensors").read_bytes()
    scripts = ["eval_linear"] if source == "random" else ["eval_linear", "mhcl"]
    for script in scripts:
        flags = FINETUNE if script == "eval_linear" else tiny(script)
        flags = [*flags, "--weights" if script == "eval_linear" else "--init", name]
        with pytest.raises(SystemExit):
            run(script, *flags_of(scenes, out, *flags))
        assert words.replace("OUT", str(out)) in capsys.readouterr().err
    assert (out / "backbone" / "model.safetensors").read_bytes() == before


def test_a_folder_may_have_the_name_of_a_baseline(run, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    run("eval_linear", *flags_of(scenes, "random", *FINETUNE, "--epochs", "2", "--max_steps", "1"))
    assert (tmp_path / "random" / "checkpoint.pth").exists()


def test_finetuning_with_changed_flags_is_refused_but_for_those_that_make_no_result(run, scenes, tmp_path,
                                                                                    capsys):
    run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, "--max_steps", "1"))
    for flags, words in ((["--mixup", ".5"], "mixup was 0.0, is 0.5"),
                         (["--allow_partial"], "allow_partial was False, is True")):
        with pytest.raises(SystemExit):
            run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, *flags))
        assert f"other settings: {words}" in capsys.readouterr().err
    run("eval_linear", *flags_of(scenes, tmp_path, *FINETUNE, "--max_steps", "2", "--per_class"))
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 2


def naive_finetuning(train, C):
    """Losses of three steps, weights and AdamW's first moments, one parameter at a time."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8, dynamic_img_size=True)
    torch.manual_seed(0)
    model.reset_classifier(C)
    torch.nn.init.normal_(model.head.weight, std=0.01)
    torch.nn.init.zeros_(model.head.bias)
    dataset = eval_linear.FinetuneImages(train, backbone_of(None), 0.0, 0)
    order = torch.randperm(len(train), generator=common.generator(0, "order", 0)).tolist()
    losses = []
    first, second = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
    for step in range(3):
        loss = 0.0
        for index in order[4 * step : 4 * step + 4]:
            image, label = dataset[0, index]
            x = image / 255 - torch.tensor(common.IMAGENET_MEAN).view(3, 1, 1)
            logits = model((x / torch.tensor(common.IMAGENET_STD).view(3, 1, 1))[None])[0]
            if train.labels.ndim == 2:  # a sigmoid for each class
                p = logits.sigmoid()
                for c in range(C):
                    loss = loss - (p[c] if label[c] else 1 - p[c]).log() / C / 4
            else:
                logits = logits.log_softmax(0)
                loss = loss - (0.9 * logits[label] + 0.1 * logits.mean()) / 4  # smoothing of .1
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        total = 3 * (len(train) // 4)
        lr = 1e-6 + (0.001 - 1e-6) * 0.5 * (1 + math.cos(math.pi * step / total))  # .064 * 4 / 256
        with torch.no_grad():
            for name, p in model.named_parameters():
                spared = p.ndim <= 1 or name.endswith("bias") or name in ("pos_embed", "cls_token")
                p.mul_(1 - lr * 0.05 * (not spared))
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.999 * second[name] + 0.001 * p.grad**2
                rms = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
                p.sub_(lr * first[name] / (1 - 0.9 ** (step + 1)) / (rms + 1e-8))
    return losses, dict(model.named_parameters()), first


@pytest.mark.parametrize("micro_batch, multi_label", [(4, False), (2, False), (2, True)])
def test_steps_of_finetuning_equal_plain_loops(run, scenes, tmp_path, micro_batch, multi_label):
    """AdamW, smoothing or several labels; accumulation is one large batch."""
    flags, data, C = [*FINETUNE, *VIT, "--warmup_epochs", "0", "--lr", ".064"], scenes, 10
    if multi_label:
        data, C = write_multi_label(tmp_path / "data", scenes), 3
    else:
        flags += ["--smoothing", ".1"]
    flags += ["--max_steps", "3", "--log_every", "1", "--batch_size_per_gpu", micro_batch]
    run("eval_linear", *flags_of(data, tmp_path, *flags, "--accum_steps", 4 // micro_batch))
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    train = eval_knn.load_split(str(data), 0.2, 0)[0]
    losses, expected, first = naive_finetuning(train, C)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    for name, p in expected.items():
        # AdamW's first steps are signs, of which small gradients have none.
        sure = first[name].abs() > (1e-5 if multi_label else 1e-4)
        torch.testing.assert_close(saved["model"][name][sure], p.data[sure], atol=2e-5, rtol=1e-3, msg=name)
        assert name == "pos_embed" or sure.any(), name


# ------------------------------------------------------------------ few labels, several labels


def test_fractions_share_features_and_give_a_row_each(run, scenes, tmp_path, capsys, monkeypatch):
    seen, extract = [], eval_linear.extract_features
    monkeypatch.setattr(eval_linear, "extract_features", lambda *a: seen.append(1) or extract(*a))
    flags = ["--weights", "random", "image_stats", "--arch", "test_resnet", "--lrs", 1]
    run("eval_linear", *flags_of(scenes, tmp_path, *flags, "--train_fraction", 0.01, 0.67, 1))
    lines, printed = results_of(tmp_path), capsys.readouterr().out
    assert len(seen) == 4  # training and test images of each of the weights, once
    rows = [(line["train_fraction"], line["train_images"]) for line in lines]
    assert rows == [(0.01, 10), (0.67, 20), (1.0, 30)] * 2
    assert [row.split()[:2] for row in printed.splitlines() if " % " in row and "linear" not in row] == [
        [name, share] for name in ("random", "image_stats") for share in ("1", "67", "100")]
    alone = flags_of(scenes, tmp_path / "alone", "--weights", "random", "--arch", "test_resnet", "--lrs", 1)
    run("eval_linear", *alone)
    assert results_of(tmp_path / "alone")[0]["top1"] == lines[2]["top1"]
    saved, whole = (common.load_checkpoint(out / "head.pth") for out in (tmp_path, tmp_path / "alone"))
    assert torch.equal(saved["weight"], whole["weight"])  # of the largest fraction
    for more, words in ((["--lrs", 1, 2], "leave none to choose among several learning rates"),
                        (["--finetune", "--train_fraction", 0.5, 1], "one with --finetune")):
        with pytest.raises(SystemExit):
            run("eval_linear", *flags_of(scenes, tmp_path, "--weights", "random", "--arch", "test_resnet",
                                         "--train_fraction", 0.01, *more))
        assert words in capsys.readouterr().err


def test_finetuning_on_a_fraction_takes_its_images_alone(run, scenes, tmp_path):
    flags = ["--finetune", "--weights", "random", "--arch", "test_resnet", "--batch_size_per_gpu", 4]
    run("eval_linear", *flags_of(scenes, tmp_path, *flags, "--train_fraction", 0.67))
    assert results_of(tmp_path)[0]["train_images"] == 20


@pytest.mark.parametrize("flags", [["--lrs", 1, 10], ["--finetune", "--mixup", 0.8, "--cutmix", 1]])
def test_several_labels_from_training_to_prediction(run, scenes, tmp_path, flags):
    """The figures are those of the probabilities that --predict writes of the test images."""
    data, out = write_multi_label(tmp_path / "data", scenes), tmp_path / "out"
    flags = [*flags, "--weights", "random", "--arch", "test_resnet", "--batch_size_per_gpu", 4, "--per_class"]
    run("eval_linear", *flags_of(data, out, *flags))
    (line,) = results_of(out)
    run("eval_linear", "--predict", data, "--weights", out, "--output_dir", out, "--num_workers", 0)
    _, test, classes, _ = eval_knn.load_split(str(data), 0.2, 0)
    with open(out / "predictions.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert len(rows) == 20 and not (out / "confusion.png").exists()
    scores = torch.tensor([[float(rows[path][name]) for name in classes] for path in test.paths])
    figures, of_class = eval_knn.multi_label_figures(scores, test.labels)
    for name, value in figures.items():
        assert line[name] == pytest.approx(value, abs=0.01)
    assert line["per_class"] == pytest.approx(of_class, abs=0.01)
    for path, row in zip(test.paths, scores.tolist(), strict=True):
        assert rows[path]["labels"] == "|".join(n for n, p in zip(classes, row, strict=True) if p > 0.5)


def test_confident_heads_are_ranked_and_broken_ones_not_chosen(monkeypatch):
    """Logits whose sigmoids are 1 in float32 are no ties; a rate at which weights overflow does not win."""
    logits, labels = torch.tensor([[30.0], [25], [20], [18]]), torch.tensor([[1.0], [1], [0], [0]])
    figures, _ = eval_linear.figures_of(logits, labels)
    assert figures == {"micro_ap": 100, "macro_ap": 100, "micro_f1": pytest.approx(200 * 2 / 6, abs=1e-3)}
    x, labels = rand(40, 6), (rand(40, 3, seed=1) > 0).float()
    features = SimpleNamespace(x=1e4 * x, labels=labels, at=lambda _: 1e4 * x, process=ALONE)
    args = make_args("--epochs", 3, "--batch_size", 8, "--lrs", 1e-4, 1e38)
    lr, choice = eval_linear.choose_lr(features, torch.arange(40), 3, args)
    assert lr == 1e-4 and choice["held_out_micro_ap"]["1e+38"] == 0


def test_mixing_gives_each_image_its_share_of_both_labels():
    images, labels = rand(6, 3, 8, 8), (rand(6, 4, seed=1) > 0).float()
    args = make_args("--finetune", "--mixup", 0.8)
    torch.manual_seed(0)
    mixed, targets = eval_linear.erase_and_mix(images, labels, 4, args)
    for i, image in enumerate(mixed):  # image i and the one before it, with one factor
        other = images[i - 1]
        factor = ((image - other) * (images[i] - other)).sum() / ((images[i] - other) ** 2).sum()
        assert 0 <= factor <= 1
        torch.testing.assert_close(targets[i], factor * labels[i] + (1 - factor) * labels[i - 1])


# ------------------------------------------------------------------ any bands, any type of pixels


def predicted_top1(run, data, out, *flags):
    """Top-1 of --predict on a folder of classes; the same head on the same images as in `out`."""
    run("eval_linear", "--predict", data, "--weights", out, "--output_dir", out, *flags, "--num_workers", 0)
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return 100 * sum(row["path"].split("/")[-2] == row["class"] for row in rows) / len(rows)


@pytest.mark.parametrize("kind", PIXELS)
@pytest.mark.parametrize("flags", [["--lrs", 1], ["--lrs", 1, "--protocol", "paper"],
                                   ["--finetune", "--lr", 0.5, "--batch_size_per_gpu", 5, "--erase", 0.2]])
def test_probe_finetuning_and_prediction_take_any_pixels(run, tmp_path, kind, flags):
    """Bands, mean and std travel with the head: the prediction needs no flags."""
    write_tiles(tmp_path / "data", kind)
    flags = flags_of(tmp_path / "data", tmp_path / "out", "--arch", "test_resnet", *PIXELS[kind], *flags)
    run("eval_linear", *flags, "--weights", "random")
    (result,) = results_of(tmp_path / "out")
    assert result["train_images"] == 10 and result["in_chans"] == {"int16": 4, "float": 1, "folders": 2}[kind]
    top1 = predicted_top1(run, tmp_path / "data" / "test", tmp_path / "out")
    assert top1 == pytest.approx(result["top1"], abs=1e-3)


def test_finetuning_normalises_other_pixels_as_the_evaluation_does(run, tmp_path, monkeypatch, capsys):
    """What the network sees in its first step: 6 (clamp(.5 + (x - mean) / (6 std)) - .5) of the crops."""
    write_tiles(tmp_path / "data", "int16")
    seen, mix, prepare, backbones = [], eval_linear.erase_and_mix, eval_knn.prepare, []
    monkeypatch.setattr(eval_linear, "erase_and_mix", lambda x, *more: seen.append(x) or mix(x, *more))
    monkeypatch.setattr(eval_knn, "prepare", lambda *a: backbones.extend(made := prepare(*a)) or made)
    flags = ["--finetune", "--weights", "random", "--arch", "test_resnet", "--batch_size_per_gpu", 10]
    flags += ["--in_chans", 13, "--max_steps", 1]
    run("eval_linear", *flags_of(tmp_path / "data", tmp_path / "out", *flags))
    train = eval_knn.load_split(str(tmp_path / "data"), 0.2, 0)[0]
    dataset = eval_linear.FinetuneImages(train, backbones[0], 0.0, 0)
    order = torch.randperm(10, generator=common.generator(0, "order", 0)).tolist()
    m, s = (torch.tensor(x).view(-1, 1, 1) for x in (backbones[0].mean, backbones[0].std))
    for x, index in zip(seen[0], order, strict=True):
        expected = 6 * ((0.5 + (dataset[0, index][0] - m) / (6 * s)).clamp(0, 1) - 0.5)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit):
        run("eval_linear", *flags_of(tmp_path / "data", tmp_path / "x", *flags, "--rand_augment", 9))
    assert "only for 8-bit images of 1 or 3 bands, these are float32 of 13" in capsys.readouterr().err


# ------------------------------------------------------------------ fine-tuning on the mean patch token


def test_avgpool_is_a_fresh_norm_of_the_mean_patch_token():
    torch.manual_seed(0)
    vit = common.build_backbone("test_vit", 32, 8).eval()
    torch.nn.init.normal_(vit.norm.weight)  # of the file: not used
    images = rand(2, 3, 32, 32)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for block in vit.blocks:
        x = block(x)
    report = eval_linear.use_patch_tokens(vit)
    expected = F.layer_norm(x[:, 1:].mean(1), (64,), eps=vit.fc_norm.eps)
    torch.testing.assert_close(vit(images), expected)
    assert "fc_norm, which starts fresh; norm is not used" in report
    as_timm = common.build_backbone("test_vit", 32, 8, global_pool="avg")
    assert vit.state_dict().keys() == as_timm.state_dict().keys() and vit.model_args == as_timm.model_args
    assert "has fc_norm already" in eval_linear.use_patch_tokens(vit)


def test_avgpool_is_finetuned_with_the_heads_rate_and_predicts_the_same(run, train, scenes, tmp_path, capsys):
    train(tmp_path / "mae", "--max_steps", "1", script="dspt_mae")
    flags = ["--finetune", "--avgpool", "--batch_size_per_gpu", 4, "--layer_decay", ".5"]
    base = flags_of(scenes, tmp_path / "out", *flags, "--lr", ".05", "--weights", tmp_path / "mae")
    run("eval_linear", *base, "--max_steps", 3)
    run("eval_linear", *base)
    capsys.readouterr()
    (result,) = results_of(tmp_path / "out")
    assert "fc_norm, which starts fresh" in result["loading"] and result["settings"]["avgpool"]
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    fc_norm = [name for name in saved["model"] if "fc_norm" in name]
    assert len(fc_norm) == 2 and not any(name.startswith("norm.") for name in saved["model"])
    top = [group for group in saved["optimizer"]["param_groups"] if group["lr_scale"] == 1]
    assert sum(len(group["params"]) for group in top) == 4  # weight and bias of fc_norm and of the head
    state, info = common.read_weights(str(tmp_path / "out"))
    assert info["global_pool"] == "avg"
    assert torch.equal(state["fc_norm.weight"], saved["model"]["fc_norm.weight"])
    assert predicted_top1(run, scenes / "val", tmp_path / "out") == pytest.approx(result["top1"], abs=1e-3)
    flags += ["--arch", "test_resnet", "--weights", "random"]
    with pytest.raises(SystemExit):
        run("eval_linear", *flags_of(scenes, tmp_path / "x", *flags))
    assert "only for a ViT with a last norm, not ResNet" in capsys.readouterr().err

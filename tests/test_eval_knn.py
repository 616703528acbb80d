import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import common
import eval_knn


def features(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def naive_vote(train, labels, query, k, temperature):
    """The class with the greatest sum of exp(cosine / tau) among the k nearest, from the definition."""
    cosines = [sum(a * b for a, b in zip(x, query.tolist(), strict=True)) for x in train.tolist()]
    votes = {}
    for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
        votes[labels[i].item()] = votes.get(labels[i].item(), 0) + math.exp(cosines[i] / temperature)
    return max(votes, key=votes.get)


@pytest.mark.parametrize("chunk_elements", [2**24, 1, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 0.005])
def test_votes_equal_the_definition_for_every_k(chunk_elements, temperature):
    train, test = features(60, 6), features(25, 6, seed=1)
    labels = torch.arange(60) * 7 % 5
    ks = [10, 1, 60, 3]
    predicted = eval_knn.knn_predict(train, labels, test, ks, temperature, chunk_elements)
    assert predicted.shape == (4, 25)
    for row, k in zip(predicted, ks, strict=True):
        assert row.tolist() == [naive_vote(train, labels, query, k, temperature) for query in test]


def test_a_small_temperature_leaves_the_nearest_their_weight():
    """Even where exp((cosine - 1) / tau) is 0 in float32."""
    train = F.normalize(torch.tensor([[-1.0, 0.1], [0.5, 1.0], [0.4, 1.0]]))
    query = torch.tensor([[1.0, 0.0]])
    assert eval_knn.knn_predict(train, torch.tensor([0, 1, 1]), query, [1, 2, 3], 0.002).tolist() == [[1]] * 3


def test_a_constant_channel_spoils_no_image_stats():
    x = torch.cat([features(4001, 2), torch.full((4001, 1), 0.1)], 1)
    center, spread = eval_knn.center_and_spread(x)
    standardised = (x - center) / spread
    torch.testing.assert_close(standardised[:, :2].std(0), torch.ones(2))
    torch.testing.assert_close(standardised[:, 2], torch.zeros(4001), atol=1e-5, rtol=0)


def test_features_that_are_not_finite_are_refused(run, scenes, tmp_path, capsys):
    """And what was measured before stays."""
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(
        {name: x * math.inf if name == "conv1.0.weight" else x for name, x in state.items()}, tmp_path / "x"
    )
    flags = ["--data_path", scenes, "--arch", "test_resnet", "--img_size", 32, "--num_workers", 0]
    flags += ["--weights", "image_stats", tmp_path / "x"]
    for script, more in (("eval_knn", ["--nb_knn", 3]), ("eval_linear", [])):
        with pytest.raises(SystemExit) as stop:
            run(script, *flags, *more, "--output_dir", tmp_path / script)
        assert stop.value.code == 1 and "not all features are finite" in capsys.readouterr().err
        assert [line["weights"] for line in lines_of(tmp_path / script)] == ["image_stats"]


def lines_of(path):
    return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def test_whole_run_over_all_kinds_of_weights(run, train, scenes, tmp_path, capsys):
    train(tmp_path / "out", "--max_steps", "2", script="mhcl")
    capsys.readouterr()
    checkpoint = tmp_path / "out" / "checkpoint.pth"
    weights = [tmp_path / "out", checkpoint, tmp_path / "out" / "backbone", "random", "image_stats"]
    base = ["--data_path", scenes, "--output_dir", tmp_path, "--num_workers", 0]
    run("eval_knn", *base, "--weights", *weights, "--nb_knn", 1, 5, 30, "--per_class")
    printed = capsys.readouterr().out
    lines = lines_of(tmp_path)
    assert [json.loads(line) for line in printed.splitlines()[-5:]] == lines
    assert [line["weights"] for line in lines] == [str(name) for name in weights]
    assert lines[0]["top1"] == lines[1]["top1"] == lines[2]["top1"]  # the query encoder, read in three ways
    for line in lines:
        assert line["train_images"] == 30 and line["test_images"] == 20 and line["img_size"] == 32
        assert set(line["top1"]) == {"1", "5", "30"} and len(line["per_class"]) == 10
        assert sum(line["per_class"]) / 10 == pytest.approx(line["top1"]["1"])
    run("eval_knn", *base, "--weights", checkpoint, "--checkpoint_key", "encoder_k", "--nb_knn", 1)
    assert len(lines_of(tmp_path)) == 6


def test_image_stats_are_standardised_means_and_deviations(run, scenes, tmp_path):
    base = ["--data_path", scenes, "--output_dir", tmp_path, "--num_workers", 0]
    run("eval_knn", *base, "--weights", "image_stats", "--img_size", 32, "--nb_knn", 3)
    train, test, classes, _ = eval_knn.load_split(str(scenes), 0.2, 0)

    def stats(samples):
        images = [eval_knn.LabelledImages(samples, 32, 3)[i][0] for i in range(len(samples))]
        return torch.stack(
            [torch.tensor([f(x[c]) for f in (torch.mean, torch.std) for c in range(3)]) for x in images]
        )

    x, y = stats(train), stats(test)
    x, y = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
    labels = torch.tensor([label for _, label in train])
    right = sum(
        naive_vote(F.normalize(x), labels, F.normalize(q, dim=0), 3, 0.07) == label
        for q, (_, label) in zip(y, test, strict=True)
    )
    assert lines_of(tmp_path)[0]["top1"]["3"] == pytest.approx(100 * right / len(test))


def test_crop_is_the_middle_of_the_resized_image(tmp_path):
    picture = Image.effect_noise((160, 320), 80).convert("RGB")
    picture.save(tmp_path / "x.png")
    crop, label, message = eval_knn.LabelledImages([(str(tmp_path / "x.png"), 4)], 112, 3)[0]
    expected = picture.resize((128, 256), Image.Resampling.BICUBIC).crop((8, 72, 120, 184))
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert (crop * 255 - expected).abs().max() <= 2.01 and label == 4 and message == ""


def test_split_is_stratified_seeded_and_disjoint(scenes):
    one, two = (eval_knn.load_split(str(scenes / "train"), 0.34, 0) for _ in range(2))
    assert one == two
    train, test, classes, split = one
    assert len(classes) == 10 and len(train) == 20 and len(test) == 10 and "split_seed 0" in split
    assert sorted(label for _, label in test) == list(range(10))
    assert not {path for path, _ in train} & {path for path, _ in test}
    assert eval_knn.load_split(str(scenes / "train"), 0.34, 1)[1] != test


def test_unreadable_images_are_left_out_and_counted(run, scenes, tmp_path, capsys):
    data = tmp_path / "data"
    for i in range(12):
        for name in ("a", "b"):
            for source in (scenes / "train" / "forest").iterdir():
                (data / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, data / name / f"{i}_{source.name}")
    for name in ("a", "b"):
        for i in range(100):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(data / name / f"{i}.png")
    (data / "a" / "bad.png").write_text("no image")
    flags = ["--data_path", data, "--output_dir", tmp_path, "--weights", "image_stats", "--nb_knn", 5]
    flags += ["--num_workers", 0, "--val_fraction", 0.5]
    run("eval_knn", *flags)
    (line,) = lines_of(tmp_path)
    assert line["train_images"] + line["test_images"] == 272
    assert capsys.readouterr().err.count("warning: unreadable") == 1
    for i in range(9):
        (data / "a" / f"bad{i}.png").write_text("no image")
    with pytest.raises(SystemExit):
        run("eval_knn", *flags)
    assert "unreadable, more than 1 %" in capsys.readouterr().err


def test_ks_above_the_number_of_readable_images(run, tmp_path, capsys):
    """Those given by hand are refused, the usual ones are left out."""
    data = tmp_path / "data"
    for split, count in (("train", 60), ("val", 2)):
        for name in ("a", "b"):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (i, 0, 0)).save(data / split / name / f"{i}.png")
    (data / "train" / "a" / "0.png").write_text("no image")
    flags = ["--data_path", data, "--weights", "image_stats", "--output_dir", tmp_path, "--num_workers", 0]
    for k, words in ((121, "training images, 120"), (120, "training images that are readable, 119")):
        with pytest.raises(SystemExit):
            run("eval_knn", *flags, "--nb_knn", 1, k)
        assert f"--nb_knn 1 {k}: must be from 1 to the number of {words}" in capsys.readouterr().err
    run("eval_knn", *flags)
    assert "--nb_knn: 200 left out, above the number of training images, 120" in capsys.readouterr().out
    assert list(lines_of(tmp_path)[0]["top1"]) == ["10", "20", "100"]
    flags[1] = data / "val"
    run("eval_knn", *flags, "--val_fraction", 0.5)
    assert list(lines_of(tmp_path)[1]["top1"]) == ["2"]  # fewer images than the least usual k
    with pytest.raises(SystemExit):
        run("eval_knn", *flags, "--val_fraction", 0.9)
    assert "leaves no training image of class a" in capsys.readouterr().err


def test_features_are_those_of_the_backbone(scenes):
    torch.manual_seed(0)
    model, stats = common.build_backbone("test_resnet", 32), (common.IMAGENET_MEAN, common.IMAGENET_STD)
    samples = eval_knn.load_split(str(scenes), 0.2, 0)[0]
    flags = ["--data_path", "x", "--weights", "random", "--num_workers", "0", "--batch_size_per_gpu", "7"]
    args, alone = eval_knn.get_parser().parse_args(flags), common.Process(0, 1, torch.device("cpu"), None)
    dataset = eval_knn.LabelledImages(samples, 32, 3)
    backbone = eval_knn.Backbone(model, 32, *stats, "test_resnet", "")
    x, y = eval_knn.extract_features(backbone, dataset, args, alone)
    assert y.tolist() == [label for _, label in samples]
    for i in (0, 6, 7, len(samples) - 1):
        with torch.no_grad():
            expected = model(common.normalize(dataset[i][0].unsqueeze(0), *stats))[0]
        torch.testing.assert_close(x[i], expected, atol=1e-5, rtol=1e-4)

import json
import math
import shutil

import numpy as np
import pytest
import tifffile
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


def backbone_of(model, mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD, img_size=32, **more):
    return eval_knn.Backbone(model, img_size, mean, std, "x", "x", **more)


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
        dataset = eval_knn.LabelledImages(samples, backbone_of(None, (0.0,) * 3, (1.0,) * 3))
        images = [dataset[i][0] for i in range(len(samples))]
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
    plain = backbone_of(None, (0.0,) * 3, (1.0,) * 3, 112)
    crop, label, message = eval_knn.LabelledImages([(str(tmp_path / "x.png"), 4)], plain)[0]
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
    model = common.build_backbone("test_resnet", 32)
    samples = eval_knn.load_split(str(scenes), 0.2, 0)[0]
    flags = ["--data_path", "x", "--weights", "random", "--num_workers", "0", "--batch_size_per_gpu", "7"]
    args, alone = eval_knn.get_parser().parse_args(flags), common.Process(0, 1, torch.device("cpu"), None)
    backbone = backbone_of(model)
    dataset = eval_knn.LabelledImages(samples, backbone)
    x, y = eval_knn.extract_features(backbone, dataset, args, alone)
    assert y.tolist() == [label for _, label in samples]
    for i in (0, 6, 7, len(samples) - 1):
        with torch.no_grad():
            expected = model(dataset[i][0].unsqueeze(0))[0]
        torch.testing.assert_close(x[i], expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ any bands, any type of pixels


def write_tiles(folder, kind):
    """16 tiles of 20 px in two classes; `kind`: int16 (13 bands), float (one band), folders (of two bands).

    Returns their arrays H x W x C by path."""
    generator, arrays = np.random.default_rng(0), {}
    C = {"int16": 13, "float": 1, "folders": 2}[kind]
    for i in range(16):
        place = folder / ("train" if i < 10 else "test") / "ab"[i % 2] / str(i)
        scale = 10.0 ** np.arange(C) if kind == "int16" and i % 4 > 1 else 1.0
        array = -20 + (5 * generator.standard_normal((20, 20, C)) + i % 2 * 3) * np.minimum(scale, 1000)
        array = array.astype("f4" if kind == "float" else "i2")
        place.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folders":
            place.mkdir()
            for band, name in enumerate(("B02", "B08")):
                tifffile.imwrite(place / f"T31_{name}.tif", array[:, :, band])
        else:
            place = place.with_suffix(".tif")
            array = array if C > 1 else array[:, :, 0]
            tifffile.imwrite(place, array, photometric="minisblack", planarconfig="contig" if C > 1 else None)
        arrays[str(place)] = array.reshape(20, 20, C)
    return arrays


PIXELS = {"int16": ["--bands", 5, 1, 13, 2], "float": ["--in_chans", 1], "folders": ["--bands", "b08", "B02"]}
ORDER = {"int16": [4, 0, 12, 1], "float": [0], "folders": [1, 0]}


def flags_of(folder, kind, *flags):
    base = ["--data_path", folder / "data", "--img_size", 32, "--num_workers", 0, "--device", "cpu"]
    return [*base, "--arch", "test_resnet", *PIXELS[kind], *flags]


@pytest.mark.parametrize("kind", PIXELS)
def test_other_pixels_are_normalised_by_what_was_measured(run, tmp_path, monkeypatch, capsys, kind):
    """The formula of methods.md, on tifffile's own arrays: 6 (clamp(.5 + (x - mean) / (6 std)) - .5)."""
    arrays, seen = write_tiles(tmp_path / "data", kind), []
    extract = eval_knn.extract_features
    monkeypatch.setattr(eval_knn, "extract_features", lambda backbone, dataset, *more: (
        seen.append((backbone, dataset)) or extract(backbone, dataset, *more)))
    run("eval_knn", *flags_of(tmp_path, kind, "--weights", "random", "image_stats", "--nb_knn", 1, 3),
        "--output_dir", tmp_path / "data" / "out")  # which is no class
    printed = capsys.readouterr().out
    assert printed.count("measured on some training images: mean ") == 1
    lines = lines_of(tmp_path / "data" / "out")
    assert [(line["train_images"], line["test_images"]) for line in lines] == [(10, 6)] * 2
    assert lines[0]["in_chans"] == len(ORDER[kind])
    train = np.stack([a[:, :, ORDER[kind]] for path, a in arrays.items() if "/train/" in path])
    mean, std = (f(train.astype("f8"), (0, 1, 2)) for f in (np.mean, np.std))
    for backbone, dataset in seen:
        np.testing.assert_allclose(backbone.mean, mean, atol=1e-4 * std.max())
        np.testing.assert_allclose(backbone.std, std, rtol=1e-4)
        for i in (0, len(dataset) - 1):
            image = torch.from_numpy(arrays[dataset.images.paths[i]][:, :, ORDER[kind]].astype("f4"))
            image = image.permute(2, 0, 1)[None]
            large = F.interpolate(image, (36, 36), mode="bicubic", antialias=True)[0, :, 2:34, 2:34]
            m, s = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, std))
            expected = 6 * ((0.5 + (large - m) / (6 * s)).clamp(0, 1) - 0.5)
            torch.testing.assert_close(dataset[i][0], expected, atol=2e-3, rtol=1e-3)


def test_channels_follow_the_weights_and_so_do_mean_and_std(run, tmp_path, monkeypatch, capsys):
    """Four bands; values that are far off bring a warning, and for 8-bit pixels stay."""
    model, backbones = common.build_backbone("test_resnet", 32, in_chans=4), []
    monkeypatch.setattr(eval_knn, "evaluate", lambda backbone, *_: backbones.append(backbone) or {
        "top1": {"1": 1.0}, "train_images": 1, "test_images": 1})
    for name in ("a", "b"):
        for i in range(4):
            for kind, scale in (("8", 1), ("16", 100)):
                (tmp_path / kind / name).mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(i).integers(0, 200, (20, 20, 4)) * scale
                path, pixels = tmp_path / kind / name / f"{i}.tif", pixels.astype(f"u{len(kind)}")
                tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    for kind, own, words in (("8", (0.4, 0.2), ""), ("8", (90.0, 2.0), "std of OUT are far"),
                             ("16", (9000.0, 6000.0), ""), ("16", (0.4, 0.2), ", which are taken")):
        mean, std = ((x,) * 4 for x in own)
        common.export_backbone(model, tmp_path / "w" / "backbone", 32, mean, std)
        flags = ["--data_path", tmp_path / kind, "--output_dir", tmp_path, "--num_workers", 0, "--nb_knn", 1]
        run("eval_knn", *flags, "--weights", tmp_path / "w", "random")
        error = capsys.readouterr().err.replace(str(tmp_path / "w"), "OUT")
        assert len(error.splitlines()) == bool(words) and words in error, error
        taken = own if kind == "8" or not words else (100 * 99.5, 100 * 57.7)
        for backbone in backbones[-2:]:  # the baseline's too
            assert backbone.mean == pytest.approx([taken[0]] * 4, rel=0.05)
            assert backbone.std == pytest.approx([taken[1]] * 4, rel=0.05)
            assert backbone.dtype == (torch.uint8 if kind == "8" else torch.float32)
    flags[1] = tmp_path / "8"  # the weights are converted to what is asked for
    run("eval_knn", *flags, "--weights", tmp_path / "w", "--bands", 3, 2, 1)
    assert "4 channels converted to 3" in capsys.readouterr().out
    assert backbones[-1].mean == common.IMAGENET_MEAN


def test_an_image_of_another_type_is_left_out_of_its_batch(tmp_path):
    arrays = list(write_tiles(tmp_path, "float"))
    Image.new("L", (20, 20)).save(tmp_path / "8.png")
    (tmp_path / "bad.tif").write_text("no image")
    backbone = backbone_of(None, (0.0,), (1.0,), dtype=torch.float32)
    paths = [arrays[0], str(tmp_path / "8.png"), str(tmp_path / "bad.tif")]
    dataset = eval_knn.LabelledImages([(path, 1) for path in paths], backbone)
    images, labels, messages = torch.utils.data.default_collate([dataset[i] for i in range(3)])
    assert images.shape == (3, 1, 32, 32) and labels.tolist() == [1, -1, -1]
    assert "torch.uint8 among torch.float32" in messages[1] and messages[2].count("bad.tif") == 1
    assert not images[1:].any() and images[0].any()


@pytest.mark.parametrize("script, more", [("eval_knn", []), ("eval_linear", ["--epochs", 1])])
def test_attention_is_chosen_before_networks_are_built(run, scenes, tmp_path, monkeypatch, script, more):
    built = []
    build = common.build_backbone
    monkeypatch.setattr(common, "build_backbone", lambda *a: built.append(build(*a)) or built[-1])
    flags = ["--data_path", scenes, "--arch", "test_vit", "--weights", "random", "--img_size", 32, *more]
    for amp in ("bf16", "off"):
        run(script, *flags, "--amp", amp, "--num_workers", 0, "--device", "cpu", "--output_dir", tmp_path)
    assert [model.blocks[0].attn.fused_attn for model in built] == [False, True]

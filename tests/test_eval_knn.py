import io
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
    assert predicted.shape == (25, 4)
    for row, k in zip(predicted.T, ks, strict=True):
        assert row.tolist() == [naive_vote(train, labels, query, k, temperature) for query in test]


def test_a_small_temperature_leaves_the_nearest_their_weight():
    """Even where exp((cosine - 1) / tau) is 0 in float32."""
    train = F.normalize(torch.tensor([[-1.0, 0.1], [0.5, 1.0], [0.4, 1.0]]))
    query = torch.tensor([[1.0, 0.0]])
    assert eval_knn.knn_predict(train, torch.tensor([0, 1, 1]), query, [1, 2, 3], 0.002).tolist() == [[1] * 3]


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


def test_names_that_the_terminal_cannot_write(run, scenes, tmp_path, monkeypatch):
    for i, name in enumerate(("größe", "b")):
        shutil.copytree(sorted((scenes / "train").iterdir())[i], tmp_path / "data" / name)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    flags = ["--data_path", tmp_path / "data", "--output_dir", tmp_path, "--num_workers", 0, "--img_size", 32]
    run("eval_knn", *flags, "--weights", "image_stats", "--nb_knn", 1, "--per_class")
    screen.flush()
    assert rb"gr\xf6\xdfe" in screen.buffer.getvalue()


def test_image_stats_are_standardised_means_and_deviations(run, scenes, tmp_path):
    base = ["--data_path", scenes, "--output_dir", tmp_path, "--num_workers", 0]
    run("eval_knn", *base, "--weights", "image_stats", "--img_size", 32, "--nb_knn", 3)
    train, test, classes, _ = eval_knn.load_split(str(scenes), 0.2, 0)

    def stats(samples):
        dataset = eval_knn.CenterCrops(samples.paths, backbone_of(None, (0.0,) * 3, (1.0,) * 3))
        images = [dataset[i][0] for i in range(len(samples))]
        return torch.stack(
            [torch.tensor([f(x[c]) for f in (torch.mean, torch.std) for c in range(3)]) for x in images]
        )

    x, y = stats(train), stats(test)
    x, y = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
    right = sum(
        naive_vote(F.normalize(x), train.labels, F.normalize(q, dim=0), 3, 0.07) == label
        for q, label in zip(y, test.labels.tolist(), strict=True)
    )
    assert lines_of(tmp_path)[0]["top1"]["3"] == pytest.approx(100 * right / len(test))


def test_crop_is_the_middle_of_the_resized_image(tmp_path):
    picture = Image.effect_noise((160, 320), 80).convert("RGB")
    picture.save(tmp_path / "x.png")
    plain = backbone_of(None, (0.0,) * 3, (1.0,) * 3, 112)
    crop, index, message = eval_knn.CenterCrops([str(tmp_path / "x.png")], plain)[0]
    expected = picture.resize((128, 256), Image.Resampling.BICUBIC).crop((8, 72, 120, 184))
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert (crop * 255 - expected).abs().max() <= 2.01 and index == 0 and message == ""


def test_split_is_stratified_seeded_and_disjoint(scenes):
    one, two = (eval_knn.load_split(str(scenes / "train"), 0.34, 0) for _ in range(2))
    train, test, classes, split = one
    for a, b in zip(one[:2], two[:2], strict=True):
        assert list(a.paths) == list(b.paths) and torch.equal(a.labels, b.labels)
    assert len(classes) == 10 and len(train) == 20 and len(test) == 10 and "split_seed 0" in split
    assert test.labels.tolist() == list(range(10))
    assert len({*train.paths, *test.paths}) == 30
    assert eval_knn.load_split(str(scenes / "train"), 0.34, 1)[1].paths[0] != test.paths[0]


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
    run("eval_knn", *flags, "--val_fraction", 0.9)  # a class keeps an image to learn from
    assert (lines_of(tmp_path)[2]["train_images"], lines_of(tmp_path)[2]["test_images"]) == (2, 2)


def test_features_are_those_of_the_backbone(scenes):
    torch.manual_seed(0)
    model = common.build_backbone("test_resnet", 32)
    samples = eval_knn.load_split(str(scenes), 0.2, 0)[0]
    flags = ["--data_path", "x", "--weights", "random", "--num_workers", "0", "--batch_size_per_gpu", "7"]
    args, alone = eval_knn.get_parser().parse_args(flags), common.Process(0, 1, torch.device("cpu"), None)
    backbone = backbone_of(model)
    dataset = eval_knn.CenterCrops(samples.paths, backbone)
    x, index = eval_knn.extract_features(backbone, dataset, args, alone)
    assert index.tolist() == list(range(len(samples)))
    for i in (0, 6, 7, len(samples) - 1):
        with torch.no_grad():
            expected = model(dataset[i][0].unsqueeze(0))[0]
        torch.testing.assert_close(x[i], expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ labels in a file


def write_csv(folder, rows, header="path,labels"):
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def write_multi_label(folder, scenes):
    """20 images of two classes side by side; labels: those of both, b+c are one, and none for every tenth."""
    sources, rows = [sorted(place.iterdir())[0] for place in sorted((scenes / "train").iterdir())[:4]], []
    (folder / "images").mkdir(parents=True)
    for i in range(20):
        a, b = i % 4, i // 4 % 4
        both = np.concatenate([np.asarray(Image.open(sources[j]).convert("RGB"))[:, :20] for j in (a, b)], 1)
        Image.fromarray(both).save(folder / "images" / f"{i:02d}.png")
        labels = sorted({("a", "b", "c", "c")[j] for j in (a, b)}) if i % 10 else []
        rows.append(f"images/{i:02d}.png,{'|'.join(labels)},{'train' if i < 14 else 'test'}")
    write_csv(folder, rows, "path,labels,split")
    return folder


def naive_ap(scores, positive):
    """Area under the steps of precision over recall, from every threshold there is."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [y for s, y in zip(scores, positive, strict=True) if s >= threshold]
        recall = sum(above) / sum(positive)
        total, before = total + (recall - before) * sum(above) / len(above), recall
    return total


@pytest.mark.parametrize("ties", [False, True])
def test_multi_label_figures_equal_plain_loops(ties):
    """Pooled over all images; ties share a threshold; a class without an image is left out of the mean."""
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(40, 5, generator=generator), torch.rand(40, 5, generator=generator) > 0.7
    if ties:
        scores = (scores * 4).round() / 4
    labels[:, 3], labels[7] = False, False
    labels = labels.float()
    figures, of_class = eval_knn.multi_label_figures(scores, labels)
    expected = [naive_ap(s, y) if sum(y) else None
                for s, y in zip(scores.T.tolist(), labels.T.tolist(), strict=True)]
    assert of_class[3] is None and expected[3] is None
    del of_class[3], expected[3]
    assert of_class == pytest.approx([100 * value for value in expected], abs=1e-3)
    pooled = [x.flatten().tolist() for x in (scores, labels)]
    hits = sum(s > 0.5 and y for s, y in zip(*pooled, strict=True))
    expected = {"macro_ap": sum(expected) / 4, "micro_ap": naive_ap(*pooled),
                "micro_f1": 2 * hits / (sum(s > 0.5 for s in pooled[0]) + sum(pooled[1]))}
    assert figures == pytest.approx({name: 100 * value for name, value in expected.items()}, abs=1e-3)


def test_votes_for_several_labels_equal_the_definition():
    train, test, ks = features(30, 6), features(9, 6, seed=1), [7, 1, 30]
    labels = (features(30, 4, seed=2) > 0.1).float()
    predicted = eval_knn.knn_predict(train, labels, test, ks, 0.2, chunk_elements=200)
    assert predicted.shape == (9, 3, 4)
    for query, of_k in zip(test, predicted, strict=True):
        cosines = (train @ query).tolist()
        order = sorted(range(30), key=lambda i: -cosines[i])
        for k, shares in zip(ks, of_k, strict=True):
            weights = {i: math.exp(cosines[i] / 0.2) for i in order[:k]}
            for c in range(4):
                share = sum(w for i, w in weights.items() if labels[i, c]) / sum(weights.values())
                assert shares[c].item() == pytest.approx(share, abs=1e-5)


def test_shares_are_drawn_from_each_class(monkeypatch):
    """A class keeps an image on either side, where it can; smaller shares are parts of larger ones."""
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    mask = eval_knn.draw_share(labels, 0.2, 0)
    assert [int(mask[labels == c].sum()) for c in range(4)] == [20, 2, 1, 0]
    few = eval_knn.draw_share(labels, 0.05, 0, may_be_all=True)
    assert [int(few[labels == c].sum()) for c in range(4)] == [5, 1, 1, 1]
    assert not (few & ~eval_knn.draw_share(labels, 0.2, 0, may_be_all=True)).any()
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([0.4, 0.1, 0.01, 0.002])
    for seed in range(20):
        several = (torch.rand(1000, 4, generator=generator) < chance).float()
        mask = eval_knn.draw_share(several, 0.2, seed)
        everywhere = several.sum(0) > 1
        assert (several[~mask].sum(0) > 0)[everywhere].all()  # none that the other side lacks
        assert abs(mask.double().mean() - 0.2) < 0.02
        assert ((several[mask].sum(0) / several.sum(0) - 0.2).abs()[:2] < 0.06).all()
        few = eval_knn.draw_share(several, 0.01, seed, may_be_all=True)
        assert (several[few].sum(0) > 0)[several.sum(0) > 0].all() and few.sum() < 30


def test_labels_of_a_file(run, scenes, tmp_path, capsys):
    """With and without a split; one label everywhere makes classes; what is not named is left out."""
    data = write_multi_label(tmp_path / "data", scenes)
    train, test, classes, split = eval_knn.load_split(str(data), 0.2, 0)
    assert classes == ["a", "b", "c"] and split == "labels.csv, train/test"
    assert (len(train), len(test)) == (14, 6) and train.paths[3] == str(data / "images" / "03.png")
    assert train.labels[:5].tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 1], [1, 1, 0]]
    write_csv(data, [f"images/{i:02d}.png, {'xy'[i % 2]} " for i in range(18)])
    train, test, classes, split = eval_knn.load_split(str(data), 0.34, 0)
    assert classes == ["x", "y"] and len(train) == 12 and test.labels.tolist().count(0) == 3
    assert all(label == int(path[-5]) % 2 for path, label in zip(test.paths, test.labels, strict=True))
    assert split.endswith(", without 2 images that it does not name")
    write_csv(data, [f"images/{i:02d}.png,{'xy'[i % 2]}" for i in range(17, -1, -1)])
    again = eval_knn.load_split(str(data), 0.34, 0)[1]
    assert list(again.paths) == list(test.paths)  # whatever the order of the rows


@pytest.mark.parametrize("rows, header, words", [
    (["images/00.png"], "path,labels", "line 2: not 2 columns"),
    (["images/00.png,a,b"], "path,labels", "line 2: not 2 columns"),
    (["images/00.png,a", "images/99.png,b"], "path,labels", "line 3: 'images/99.png': no such image"),
    (["../out.png,a"], "path,labels", "line 2: '../out.png': no such image"),
    (["images/00.png,a", "./images/00.png,b"], "path,labels", "line 3: './images/00.png': named before"),
    (["images/00.png,a"], "path,label", "begins with 'path,label', not with path,labels or"),
    ([], "", "begins with '', not"),
    (["images/00.png,a", "images/01.png,a"], "path,labels", "names 1 labels, two or more"),
    (["images/00.png,a,train", "images/01.png,b,dev"], "path,labels,split", "split 'dev': train, val or"),
    (["images/00.png,a,train", "images/01.png,b,train"], "path,labels,split", "2 images of split train, 0"),
    (["images/00.png,a,train", "images/01.png,b|a,test"], "path,labels,split", "labels that train lacks: b"),
    (['images/00.png,"a'], "path,labels", "unexpected end of data"),
])
def test_wrong_files_of_labels_are_one_line(scenes, tmp_path, capsys, rows, header, words):
    data = write_multi_label(tmp_path / "data", scenes)
    write_csv(data, rows, header)
    with pytest.raises(SystemExit):
        eval_knn.load_split(str(data), 0.2, 0)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: --data_path: "), error


def test_test_images_without_any_label_are_refused_before_work(run, scenes, tmp_path, capsys):
    data = write_multi_label(tmp_path / "data", scenes)
    write_csv(data, ["images/00.png,a,train", "images/01.png,b|a,train", "images/02.png,,test"],
              "path,labels,split")
    flags = ["--data_path", data, "--output_dir", tmp_path, "--weights", "image_stats", "--num_workers", 0]
    for script in ("eval_knn", "eval_linear"):
        with pytest.raises(SystemExit):
            run(script, *flags)
        printed = capsys.readouterr()
        assert "no test image has a label" in printed.err and "mean and std" not in printed.out


def test_knn_of_several_labels(run, scenes, tmp_path, capsys):
    data = write_multi_label(tmp_path / "data", scenes)
    flags = ["--data_path", data, "--output_dir", tmp_path / "out", "--img_size", 32, "--num_workers", 0]
    run("eval_knn", *flags, "--weights", "image_stats", "random", "--arch", "test_resnet", "--nb_knn", 1, 3,
        "--per_class")
    for line in lines_of(tmp_path / "out"):
        for name in ("micro_ap", "macro_ap", "micro_f1"):
            assert set(line[name]) == {"1", "3"} and all(0 <= v <= 100 for v in line[name].values())
        assert line["macro_ap"]["1"] == pytest.approx(sum(line["per_class"]) / 3, abs=1e-3)
        assert (line["train_images"], line["test_images"]) == (14, 6) and "top1" not in line
    assert "kNN macro AP in %, 14 training and 6 test images, 3 classes\n" in capsys.readouterr().out


@pytest.mark.parametrize("names, split", [
    (["train", "harbour"], "0.5 of each"), (["train", "test", "harbour"], "0.5 of each"),
    (["train/a", "train/b", "val/a", "other/x"], "train/val"),
    (["train/a", "train/b", "test/b"], "train/test"),
])
def test_a_class_may_be_called_train(tmp_path, names, split):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    train, test, classes, words = eval_knn.load_split(str(tmp_path), 0.5, 0)
    assert words.startswith(split) and classes == (sorted(names) if "/" not in names[0] else ["a", "b"])


# ------------------------------------------------------------------ without labels


def test_effective_rank_and_its_extremes():
    x = features(50, 6)
    values = np.linalg.svd(x.numpy().astype("f8"), compute_uv=False)
    shares = [value / sum(values) + 1e-7 for value in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert eval_knn.effective_rank(x) == pytest.approx(expected, rel=1e-5)
    assert eval_knn.effective_rank(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert eval_knn.effective_rank(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)


def test_whitened_features_have_variance_1_in_principal_directions():
    x = features(60, 6).double() * torch.tensor([9, 5, 3, 1, 0.5, 0.1]) + 7
    white = eval_knn.whiten(x.float(), 40, 3).double()
    torch.testing.assert_close(white[:40].mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(white[:40].T @ white[:40] / 40, torch.eye(3).double(), atol=1e-4, rtol=0)
    centred = (x - x[:40].mean(0)).numpy()
    _, lengths, directions = np.linalg.svd(centred[:40])
    expected = torch.from_numpy(centred @ directions[:3].T / lengths[:3] * 40**0.5)
    for own, other in zip(white.flip(1).T, expected.T, strict=True):  # up to signs
        torch.testing.assert_close(own * (own @ other).sign(), other, atol=1e-4, rtol=1e-4)


def test_whitening_finds_classes_in_a_direction_that_varies_little(run, scenes, tmp_path, capsys):
    N, draws = 200, torch.Generator().manual_seed(0)
    labels = torch.arange(2 * N) % 2
    x = torch.randn(2 * N, 4, generator=draws) * 5 + 20
    x[:, 0] = labels * 0.2 + 0.01 * torch.randn(2 * N, generator=draws)
    found = []
    for y in (x, eval_knn.whiten(x, N, 4)):
        y = F.normalize(y, dim=1)
        found.append((eval_knn.knn_predict(y[:N], labels[:N], y[N:], [5], 0.07)[:, 0] == labels[N:]).float())
    assert found[0].mean() < 0.7 and found[1].mean() > 0.95
    flags = ["--data_path", scenes, "--weights", "image_stats", "--nb_knn", 1, "--output_dir", tmp_path]
    run("eval_knn", *flags, "--whiten", 2)
    out = capsys.readouterr().out
    assert ", whitened to 2 directions\n" in out and json.loads(out.splitlines()[-1])["whiten"] == 2
    with pytest.raises(SystemExit):
        run("eval_knn", *flags, "--whiten", 7)
    assert "--whiten 7: the features of " in capsys.readouterr().err


def test_neighbours_are_the_nearest_and_not_the_image_itself():
    x = features(20, 5)
    rows = eval_knn.nearest(x, [0, 7, 15], 12)  # the last one is no candidate
    for query, *others in rows:
        cosine = [(x[query] @ x[i]).item() if i != query else -9 for i in range(12)]
        assert others == sorted(range(12), key=lambda i: -cosine[i])[:8]
    assert eval_knn.nearest(x, [0, 1], 2) == [[0, 1], [1, 0]]


def test_colours_are_the_first_three_components():
    maps = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [9.0, 5, 3, 1, 1, 1]).view(6, 1, 1)
    colours = eval_knn.map_colours(maps)
    assert colours.shape == (4, 3, 5, 5) and colours.min() == 0 and colours.max() == 1
    for c in range(3):
        assert abs(np.corrcoef(colours[:, c].flatten(), maps[:, c].flatten())[0, 1]) > 0.95
    torch.testing.assert_close(colours, eval_knn.map_colours(maps.flip(0)).flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_convnext"])
def test_a_folder_without_labels_gets_pictures_and_figures(run, scenes, tmp_path, capsys, arch):
    data = tmp_path / "data"
    shutil.copytree(scenes / "train" / "forest", data / "anything")
    for i in range(3):  # as near as can be
        shutil.copy(sorted((data / "anything").iterdir())[0], data / f"{i}.png")
    flags = ["--data_path", data, "--output_dir", tmp_path / "out", "--num_workers", 0, "--img_size", 32]
    run("eval_knn", *flags, "--weights", "random", "image_stats", "--arch", arch)
    printed = capsys.readouterr().out
    assert "neither two class folders nor a labels.csv: label-free figures only" in printed
    lines = lines_of(tmp_path / "out")
    for line in lines:
        assert line["task"] == "label-free" and line["images"] == 6 and "top1" not in line
        assert 1 <= line["effective_rank"] <= 6 and line["feature_std"] > 0
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"neighbours_1_random.png", "features_1_random.png", "neighbours_2_image_stats.png"}
    for more in (["--nb_knn", 1], ["--per_class"]):
        with pytest.raises(SystemExit):
            run("eval_knn", *flags, "--weights", "random", "--arch", arch, *more)
        assert "--nb_knn, --per_class: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("eval_linear", *flags, "--weights", "random", "--arch", arch)
    assert "has neither two class folders nor a labels.csv" in capsys.readouterr().err


def test_frames_tell_whether_a_label_is_shared(run, tmp_path):
    for name, grey in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i in range(5):
            part = tmp_path / "data" / ("val" if i == 0 else "train")
            Image.new("RGB", (32, 32), (grey + i,) * 3).save(part / name / f"{i}.png")
    flags = ["--data_path", tmp_path / "data", "--output_dir", tmp_path, "--num_workers", 0, "--img_size", 32]
    run("eval_knn", *flags, "--weights", "image_stats", "--nb_knn", 1)
    picture = np.asarray(Image.open(tmp_path / "neighbours.png").convert("RGB")).astype(int)
    cell = 32 + 8 + 2
    frames = [[picture[3 + cell * row, 22 + cell * column] for column in range(9)] for row in range(2)]
    green = [[g > r for r, g, b in row[1:]] for row in frames]
    assert green == [[True] * 4 + [False] * 4] * 2
    assert [row[0].tolist() for row in frames] == [[255] * 3] * 2


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
        "top1": {"1": 1.0}, "train_images": 1, "test_images": 1, "effective_rank": 1.0, "feature_std": 1.0})
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
        common.export_backbone(model, tmp_path / "w" / "backbone", mean, std)
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
    dataset = eval_knn.CenterCrops(paths, backbone)
    images, index, messages = torch.utils.data.default_collate([dataset[i] for i in range(3)])
    assert images.shape == (3, 1, 32, 32) and index.tolist() == [0, -1, -1]
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

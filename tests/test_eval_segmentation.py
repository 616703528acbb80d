import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import ROOT, Start, assert_same, read_log
from PIL import Image
from safetensors.torch import load_file

import common
import eval_segmentation as es
from common import Process
from demo.scenes import write_pixels

TINY = "--arch test_resnet --img_size 32 --batch_size_per_gpu 4 --epochs 2 --num_workers 0".split()
TINY += ["--device", "cpu", "--amp", "off"]
CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU, None)


def rng(seed=0):
    return np.random.default_rng(seed)


def make_args(*flags):
    base = "--data_path x --output_dir x --weights random --device cpu --amp off --num_workers 0".split()
    args = es.get_parser().parse_args([*base, *map(str, flags)])
    es.check_args(args)
    common.check_bands(args)
    args.mean, args.std = [0.4] * args.in_chans, [0.2] * args.in_chans
    return args


def load(path, *flags):
    args = make_args("--data_path", path, *flags)
    files, split, change = es.find_files(args)
    *images, _ = files[0].kinds
    pixels = common.Samples([path for paths in images for path in paths], args.in_chans, args.bands)
    pixels.dtype = common.measure_pixels(pixels, 32).dtype
    return es.load_data(files, split, change, pixels, args)


def segmenter(arch, *flags, K=3, side=64, **build):
    torch.manual_seed(0)
    args = make_args(*flags)
    backbone = None if arch == "pixels" else common.build_backbone(arch, side, **build)
    return es.Segmenter(es.Pyramid(backbone, 3, args.finetune, arch), K, args)


def save(path, array, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **tags)
    else:
        Image.fromarray(array).save(path)


@pytest.fixture
def land(tmp_path):
    """6 + 3 images of 40 x 56, dark left of a line and bright right of it; the masks hold 0, 1 and 255."""
    for part, count in (("train", 6), ("val", 3)):
        for i in range(count):
            mask = np.zeros((40, 56), np.uint8)
            mask[:, 10 + 5 * i :] = 1
            image = rng(i).integers(0, 60, (40, 56, 3)).astype(np.uint8) + 150 * mask[..., None]
            mask[:3] = 255
            save(tmp_path / "land" / part / "images" / f"{i}.png", image)
            save(tmp_path / "land" / part / "masks" / f"{i}.png", mask)
    return tmp_path / "land"


@pytest.fixture
def dates(tmp_path):
    """6 + 3 pairs of 64 x 64; in the first of each part a patch of 3 x 3 has changed."""
    for part, count in (("train", 6), ("test", 3)):
        for i in range(count):
            before = rng(i).integers(0, 120, (64, 64, 3)).astype(np.uint8)
            after, label = before.copy(), np.zeros((64, 64), np.uint8)
            if i == 0:
                after[50:53, 20:23], label[50:53, 20:23] = 250, 255
            for name, array in (("A", before), ("B", after), ("label", label)):
                save(tmp_path / "dates" / part / name / f"{i}.png", array)
    return tmp_path / "dates"


# ------------------------------------------------------------------ figures


def test_figures_against_counting_with_ignored_pixels_and_an_absent_class():
    truth, predicted = rng(0).integers(0, 5, (20, 30)), rng(1).integers(0, 4, (20, 30))
    truth[truth == 2], predicted[predicted == 1], truth[truth == 4] = 0, 2, es.IGNORE
    confusion, truth_t, predicted_t = (torch.zeros(4, 4, dtype=torch.long),
                                       *(torch.from_numpy(x).byte() for x in (truth, predicted)))
    for part in (slice(0, 7), slice(7, 20)):
        es.count_pixels(truth_t[part], predicted_t[part], None, confusion, torch.zeros(2, es.BINS))
    pairs = [(t, p) for t, p in zip(truth.ravel(), predicted.ravel(), strict=True) if t != es.IGNORE]
    iou, f1 = {}, {}
    for c in range(4):
        both = sum(t == p == c for t, p in pairs)
        either = sum(c in pair for pair in pairs)
        iou[c], f1[c] = 100 * both / either, 200 * both / (either + both)
    figures = es.figures(confusion, torch.zeros(2, es.BINS), change=False)
    assert figures["class_iou"] == [pytest.approx(iou[0], abs=1e-3), 0, None, pytest.approx(iou[3], abs=1e-3)]
    assert iou[2] == 0 and any(p == 2 for _, p in pairs)  # predicted, but nowhere there: not in the means
    assert figures["miou"] == pytest.approx((iou[0] + iou[1] + iou[3]) / 3, abs=1e-3)
    assert figures["mean_f1"] == pytest.approx((f1[0] + f1[1] + f1[3]) / 3, abs=1e-3)
    assert figures["accuracy"] == pytest.approx(100 * np.mean([t == p for t, p in pairs]), abs=1e-3)
    assert "ap" not in figures


@pytest.mark.parametrize("change", [False, True])
def test_figures_of_two_classes_against_a_loop_over_thresholds(change):
    truth = (rng(0).random(400) < 0.2).astype(int)
    score = np.round((rng(1).normal(size=400) + truth - 0.5) * 16) / 16  # some are equal
    score[:3] = (-20, 20, 17)  # beyond the bins
    confusion, scores = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, es.BINS, dtype=torch.long)
    tensors = torch.from_numpy(truth).byte(), torch.from_numpy(score > 0).byte(), torch.from_numpy(score)
    es.count_pixels(*tensors, confusion, scores)
    figures = es.figures(confusion, scores, change)
    ap, recall, clipped = 0.0, 0.0, score.clip(-16, 16)
    for threshold in sorted(set(clipped), reverse=True):
        hits, said = truth[clipped >= threshold].sum(), (clipped >= threshold).sum()
        ap, recall = ap + (hits / truth.sum() - recall) * hits / said, hits / truth.sum()
    hits, said = (truth & (score > 0)).sum(), (score > 0).sum()
    expected = {"ap": ap, "share": truth.mean()}
    if change:
        expected |= {"f1": 2 * hits / (said + truth.sum()), "precision": hits / said,
                     "recall": hits / truth.sum(), "iou": hits / (truth | (score > 0)).sum()}
    for name, value in expected.items():
        assert figures[name] == pytest.approx(100 * value, abs=1e-3), name
    empty = es.figures(torch.tensor([[5, 2], [0, 0]]), torch.zeros_like(scores), change=True)
    assert empty["ap"] is None and empty["f1"] == 0 and empty["share"] == 0


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize("length, window", [(32, 32), (64, 32), (96, 64), (3008, 512), (160, 128)])
def test_windows_cover_every_pixel_and_overlap_by_a_third(length, window):
    starts = es.window_starts(length, window)
    assert set().union(*(range(s, s + window) for s in starts)) == set(range(length))
    assert starts[-1] == length - window and all(s % 4 == 0 for s in starts)
    assert all(0 < b - a <= window * 2 / 3 for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("arch", ["test_resnet", "pixels"])
def test_one_window_equals_one_pass(arch):
    model = segmenter(arch).eval()
    image = torch.from_numpy(rng().integers(0, 256, (1, 3, 50, 70))).byte()
    with torch.no_grad():
        logits = model((image[None] / 255 - 0.4) / 0.2)[0]
        once = F.interpolate(logits, scale_factor=4, mode="bilinear")[0, :, :50, :70].argmax(0).byte()
    logits = es.window_logits(model, image, make_args("--img_size", 96), CPU)
    assert torch.equal(es.decide(logits, 50, 70, rows=5)[0], once) and len(once.unique()) > 1


def test_overlapping_windows_are_averaged():
    model = segmenter("test_resnet").eval()
    image = torch.rand(1, 3, 60, 100)  # not 8-bit: beyond .4 +- .6 it is clamped
    logits = es.window_logits(model, image, make_args("--img_size", 60, "--batch_size_per_gpu", 3), CPU)
    padded = np.pad(image[0].numpy(), ((0, 0), (0, 4), (0, 28)), mode="reflect")
    padded = torch.from_numpy((padded - 0.4) / 0.2).clamp(-3, 3)
    total, count = torch.zeros(3, 16, 32), torch.zeros(16, 32)
    for left in (0, 40, 64):
        with torch.no_grad():
            total[:, :, left // 4 : left // 4 + 16] += model(padded[None, None, ..., left : left + 64])[0][0]
        count[:, left // 4 : left // 4 + 16] += 1
    torch.testing.assert_close(logits, total / count)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_strips_equal_the_whole_map(K):
    logits = torch.randn(K, 13, 9, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], scale_factor=4, mode="bilinear")[0, :, :51, :34]
    for rows in (1, 4, 64):
        numbers, score = es.decide(logits, 51, 34, rows)
        assert torch.equal(numbers, (whole[0] > 0 if K == 1 else whole.argmax(0)).byte())
        if K < 3:
            torch.testing.assert_close(score, whole[0] if K == 1 else whole[1] - whole[0])
        else:
            assert score is None


# ------------------------------------------------------------------ crops


def test_strips_of_tall_images_all_count(segment, land):
    """Images of more than 256 rows are counted strip by strip."""
    for path in land.glob("*/*/*.png"):
        array = np.array(Image.open(path))
        path.unlink()
        save(path, np.concatenate([array] * 7))  # 280 rows
    counted, count = [], es.count_pixels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "count_pixels", lambda truth, *more: (counted.append(truth.numel()),
                                                                count(truth, *more)))
        segment(land, land.parent / "new", "--epochs", 1)
    assert sum(counted) == 3 * 280 * 56


def test_predictions_that_are_not_finite_end_the_run(capsys):
    model = segmenter("test_resnet").eval()
    model.head.levels[0][1].bias.data[0] = torch.nan
    with pytest.raises(SystemExit):
        es.window_logits(model, torch.zeros(1, 3, 64, 64).byte(), make_args("--img_size", 64), CPU)
    assert "not all predictions are finite" in capsys.readouterr().err


@pytest.mark.parametrize("sides", [(5, 9), (9, 9), (5, 30), (40, 5), (4, 9)])
def test_padding_reflects_or_repeats(sides):
    image = rng().integers(0, 256, (3, *sides)).astype(np.uint8)
    expected = image
    for axis in (1, 2):
        more = max(0, 10 - sides[axis - 1])
        width = [(0, more) if a == axis else (0, 0) for a in range(3)]
        expected = np.pad(expected, width, mode="reflect" if sides[axis - 1] > more else "edge")
    padded = es.pad(torch.from_numpy(image), max(10, sides[0]), max(10, sides[1]))
    assert np.array_equal(padded.numpy(), expected)


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("size, side", [(32, 32), (48, 32), (64, 32), (16, 32), (24, 37), (61, 31)])
def test_image_and_mask_move_alike(turn, size, side):
    """In a scene of blocks, the crop's mask tells its colours, and is where plain indexing puts it."""
    blocks = rng().integers(0, 5, (8, 8)).repeat(10, 0).repeat(10, 1)[7 : 7 + side, 7 : 7 + side]
    image = torch.from_numpy(np.stack([50 * blocks, 255 - 50 * blocks]).astype(np.uint8))
    both = torch.stack([image, image.flip(0)])
    crop, mask = es.to_crop(both, torch.from_numpy(blocks.astype(np.uint8)), size / side, size, turn)
    at = [int((i + 0.5) * side / size) for i in range(size)]  # the pixel under each new pixel's centre
    expected = np.rot90(blocks[np.ix_(at, at)], turn % 4)
    expected = np.fliplr(expected) if turn >= 4 else expected
    assert np.array_equal(mask.numpy(), expected)
    highest, lowest = (F.max_pool2d(sign * mask[None].float(), 3, 1, 1)[0] for sign in (1, -1))
    inside = (highest == -lowest) | (size == side)  # not along the blocks' edges
    assert inside.float().mean() > 0.2 and len(mask[inside].unique()) > 2
    assert (crop[0, 0].int() - 50 * mask.int()).abs()[inside].max() <= (size != side)
    assert torch.equal(crop[0], crop[1].flip(0))  # both dates alike


def test_what_is_beyond_the_border_is_ignored():
    image, mask = torch.arange(36).byte().view(1, 1, 6, 6), torch.ones(6, 6).byte()
    crop, label = es.to_crop(image, mask, 1.0, 12, 0)
    assert (label[:6, :6] == 1).all() and int((label == es.IGNORE).sum()) == 144 - 36
    assert torch.equal(crop[:, :, :6, :6], image)
    assert torch.equal(crop[0, 0, 6:, :6], crop[0, 0, 5:6, :6].expand(6, 6))


def test_an_image_counts_as_often_as_crops_fit_and_crops_depend_on_the_key_alone(land):
    dataset = es.CropDataset(data := load(land), 32, 0)
    assert len(dataset) == 6 * 2 and len(es.CropDataset(data, 512, 0)) == 6
    first, again, other = dataset[0, 3], dataset[0, 3], dataset[1, 3]
    assert_same(list(first), list(again))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (1, 3, 32, 32) and set(first[1].unique().tolist()) <= {0, 1, es.IGNORE}


def test_crops_are_of_all_scales_and_turns(tmp_path):
    """A gradient from left to right: its slope tells the scale, from .5 to 2, its direction the turn."""
    for part in ("train", "val"):
        for i in range(2):
            ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (120, 120, 3))
            save(tmp_path / part / "images" / f"{i}.png", np.ascontiguousarray(ramp))
            save(tmp_path / part / "masks" / f"{i}.png", np.uint8(np.arange(120) % 2)[None].repeat(120, 0))
    dataset, slopes, turns = es.CropDataset(load(tmp_path), 24, 0), [], set()
    for i in range(150):
        crop = dataset[i // 50, i % 50][0][0, 0].float()
        across, down = crop[:, -4].mean() - crop[:, 3].mean(), crop[-4].mean() - crop[3].mean()
        slopes.append(float(max(across.abs(), down.abs())) / 17 / 2)
        turns.add((bool(across.abs() > down.abs()), bool(across + down > 0)))
    assert len(turns) == 4
    assert 0.49 < min(slopes) < 0.56 and 1.7 < max(slopes) < 2.1  # 1 / scale


def test_half_the_crops_contain_change(dates):
    dataset = es.CropDataset(load(dates), 32, 0)
    assert list(dataset.data.changed) == [0]
    with_change = np.mean([bool((dataset[i // 24, i % 24][1] == 1).any()) for i in range(200)])
    assert 0.45 < with_change < 0.65  # without: one pair in six, a third of its crops


def test_crops_avoid_the_parts_of_a_scene_without_data(land):
    image = np.full((40, 56, 3), np.nan, np.float32)
    image[:, :8] = 7
    for path in land.glob("*/images/*.png"):
        path.unlink()
        save(path.with_suffix(".tif"), image, photometric="rgb")
    dataset = es.CropDataset(load(land), 16, 0)
    for i in range(len(dataset)):
        torch.testing.assert_close(dataset[0, i][0], torch.full((1, 3, 16, 16), 7.0))


def test_unreadable_pairs_are_left_out_up_to_one_percent(tmp_path, capsys):
    for i in range(101):
        for kind in ("images", "masks"):
            part = tmp_path / ("train" if i < 95 else "val") / kind
            save(part / f"{i:03}.png", np.uint8(rng(i).integers(0, 2, (8, 8) + (3,) * (kind == "images"))))
    (tmp_path / "train/masks/007.png").write_text("no mask")
    data = load(tmp_path)
    names = [[Path(path).stem for path in pair] for pair in data.train]
    assert len(names) == 94 == len(data.sizes) and len(data.test) == 6
    assert all(image == mask != "007" for image, mask in names)
    assert "1 unreadable, left out: " in capsys.readouterr().err


# ------------------------------------------------------------------ classes and masks


def test_colours_become_numbers(tmp_path):
    (tmp_path / "classes").write_text("road 255 255 255\nlow vegetation 0 255 0\n\nignore 255 0 0\n"
                                      "tree 0 9 0\nroad 250 250 250\n")
    classes = es.read_classes(tmp_path / "classes", [255])
    assert classes.names == ["road", "low vegetation", "tree"] and classes.values == [0, 1, 2]
    assert classes.colours == [(255, 255, 255), (0, 255, 0), (0, 9, 0)] and classes.ignored == ["255 0 0"]
    rgb = np.array([[[255] * 3, [0, 255, 0]], [[255, 0, 0], [250] * 3], [[0, 9, 0]] * 2], np.uint8)
    alpha = np.concatenate([rgb, np.full((3, 2, 1), 7, np.uint8)], 2)
    save(tmp_path / "a.png", rgb)
    save(tmp_path / "b.png", alpha)
    save(tmp_path / "c.tif", rgb)
    save(tmp_path / "d.tif", rgb.transpose(2, 0, 1), planarconfig="separate", photometric="rgb")
    for name in ("a.png", "b.png", "c.tif", "d.tif"):
        expected = [[0, 1], [es.IGNORE, 0], [2, 2]]
        assert es.read_mask(str(tmp_path / name), classes).tolist() == expected, name
    with pytest.raises(common.UnreadableImageError, match="name its colours with --classes"):
        es.read_values(str(tmp_path / "a.png"), False)


@pytest.mark.parametrize("name, array", [
    ("grey.png", np.array([[0, 7]], np.uint8)), ("deep.png", np.array([[0, 7]], np.uint16)),
    ("bits.png", np.array([[0, 1]], bool)), ("equal.png", np.array([[[0] * 3, [7] * 3]], np.uint8)),
    ("alpha.png", np.array([[[0, 9], [7, 8]]], np.uint8)), ("a.tif", np.array([[0, 7]], np.int32)),
    ("float.tif", np.array([[0, 7]], np.float32))])
def test_numbers_of_masks(tmp_path, name, array):
    save(tmp_path / name, array)
    assert es.read_values(str(tmp_path / name), False).tolist() == [[0, 1 if array.dtype == bool else 7]]


def test_palette_images_hold_numbers_and_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 2]], np.uint8))
    image.putpalette([1, 2, 3, 0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "p.png")
    colormap = np.zeros((3, 256), np.uint16)
    colormap[:, [0, 2]] = np.array([[1, 9], [2, 8], [3, 7]]) * 256
    save(tmp_path / "p.tif", np.array([[0, 2]], np.uint8), photometric="palette", colormap=colormap)
    for name in ("p.png", "p.tif"):
        assert es.read_values(str(tmp_path / name), False).tolist() == [[0, 2]]
        assert es.read_values(str(tmp_path / name), True).tolist() == [[0x010203, 0x090807]]


@pytest.mark.parametrize("label, changed", [
    ([[0, 1]], [[0, 1]]), ([[0, 255]], [[0, 1]]), ([[0, 0]], [[0, 0]]), ([[127, 128]], [[0, 1]]),
    ([[0, 1, 255]], [[0, 0, 1]])])
def test_change_labels(tmp_path, label, changed):
    save(tmp_path / "x.png", np.array(label, np.uint8))
    save(tmp_path / "y.png", np.array(label, np.uint8)[..., None].repeat(3, 2))
    for name in ("x.png", "y.png"):
        assert es.read_mask(str(tmp_path / name), es.CHANGE).tolist() == changed
    for most in (2, 127):  # coded in another way; of a JPEG black that is not quite 0
        for name in ("z.png", "z.jpg"):
            save(tmp_path / name, np.full((8, 8), most, np.uint8))
        with pytest.raises(common.UnreadableImageError, match=f"its largest value is {most}: where"):
            es.read_mask(str(tmp_path / "z.png"), es.CHANGE)
        assert not es.read_mask(str(tmp_path / "z.jpg"), es.CHANGE).any()


def test_without_a_file_the_numbers_found_are_the_classes(land):
    data = load(land)
    assert (data.classes.names, data.classes.ignored, data.split) == (["0", "1"], ["255"], "train/val")
    assert es.read_mask(data.test[0][1], data.classes)[:5, 9:11].tolist() == [[255, 255]] * 3 + [[0, 1]] * 2
    data = load(land, "--ignore")
    assert data.classes.names == ["0", "1", "255"] and data.classes.values == [0, 1, 255]


# ------------------------------------------------------------------ model


BACKBONES = ["resnet18", "wide_resnet50_2", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
             "convnext_atto", "efficientnet_b0", "regnety_002", "pvt_v2_b0", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("arch", [*BACKBONES, "vit8", "pixels"])
def test_every_backbone_gives_logits_at_stride_4_of_any_size(arch):
    flags, build = ("--head", "upernet", "--head_dim", 8), {"patch_size": 8} if arch == "vit8" else {}
    model = segmenter("vit_tiny_patch16_224" if build else arch, *flags, **build)
    sizes = []
    for scale, target in zip(model.head.rescale, es.STRIDES, strict=True):
        scale.register_forward_hook(lambda _, __, x, target=target: sizes.append(x.shape[2] * target))
    linear = es.LinearHead(model.pyramid.channels, 3)
    images = torch.rand(2, 1, 3, 100, 70)
    with torch.no_grad():
        upernet = model.train()(images)
        model.head = linear
        outputs = [*upernet, *model(images)]
    assert [x.shape for x in outputs] == [(2, 3, 32, 24)] * 2 and all(x.isfinite().all() for x in outputs)
    assert sizes == [128] * 4


def test_a_vit_gives_the_maps_of_four_blocks_and_pixels_are_averaged():
    pyramid = segmenter("test_vit").pyramid  # 6 blocks
    assert pyramid.levels == [1, 2, 3, 5] and pyramid.multiple == 32 and pyramid.strides == (16,) * 4
    vit, tokens = pyramid.backbone.eval(), []
    for block in vit.blocks:
        block.register_forward_hook(lambda _, __, x: tokens.append(x))
    with torch.no_grad():
        maps = pyramid(torch.rand(1, 3, 64, 64))
    for level, x in zip((1, 2, 3, 5), maps, strict=True):
        assert torch.equal(x.flatten(2).mT, tokens[level][:, vit.num_prefix_tokens :])
    pixels = segmenter("pixels").pyramid(x := torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(pixels[3][0, 1, 1, 0], x[0, 1, 32:, :32].mean())


def test_heads_against_plain_formulas():
    torch.manual_seed(0)
    maps, size = [torch.rand(2, c, s, s) for c, s in ((3, 16), (4, 8), (5, 4), (6, 2))], (16, 16)

    def up(x, side):
        return F.interpolate(x, (side, side), mode="bilinear")

    head = es.LinearHead([3, 4, 5, 6], 7).eval()
    expected = sum(up(level[1](level[0](x)), 16) for level, x in zip(head.levels, maps, strict=True))
    torch.testing.assert_close(head(maps, size)[0], expected)
    net = es.UPerNet([3, 4, 5, 6], es.STRIDES, 7, 8, auxiliary=True).eval()
    pooled = [up(pool(F.adaptive_avg_pool2d(maps[3], side)), 2)
              for pool, side in zip(net.pools, (1, 2, 3, 6), strict=True)]
    p32 = net.context(torch.cat([maps[3], *pooled], 1))
    p16 = net.laterals[2](maps[2]) + up(p32, 4)
    p8 = net.laterals[1](maps[1]) + up(p16, 8)
    p4 = net.laterals[0](maps[0]) + up(p8, 16)
    levels = [up(x, 16) for x in (p32, net.smooth[2](p16), net.smooth[1](p8), net.smooth[0](p4))]
    torch.testing.assert_close(net(maps, size)[0], net.classify(torch.cat(levels, 1)))
    assert len(net(maps, size)) == 1 and len(net.train()(maps, size)) == 2  # the auxiliary one while training


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_the_order_of_the_dates_does_not_matter(head):
    model = segmenter("test_resnet", "--head", head, K=1).eval()
    a, b, c = torch.rand(3, 2, 3, 40, 40)
    with torch.no_grad():
        forth, back, other = (model(torch.stack(pair, 1))[0] for pair in ((a, b), (b, a), (a, c)))
    assert torch.equal(forth, back) and not torch.allclose(forth, other)
    a, b = (model.pyramid(F.pad(x, (0, 24, 0, 24), mode="reflect")) for x in (a, b))
    maps = [(x - y).abs() for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(forth, model.head(maps, (16, 16))[0], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ loss


def test_cross_entropy_of_the_pixels_that_count():
    logits, masks = torch.randn(2, 3, 4, 5), torch.from_numpy(rng().integers(0, 3, (2, 4, 5))).byte()
    masks[0, :2] = es.IGNORE
    total = [-float(logits[b, :, i, j].log_softmax(0)[int(masks[b, i, j])])
             for b in range(2) for i in range(4) for j in range(5) if masks[b, i, j] != es.IGNORE]
    terms = es.loss_terms(logits, masks, ALONE)
    assert float(terms["cross_entropy"]) == pytest.approx(np.mean(total), abs=1e-5)
    assert float(es.loss_terms(logits, torch.full_like(masks, es.IGNORE), ALONE)["cross_entropy"]) == 0


def test_the_auxiliary_head_counts_two_fifths_and_micro_batches_their_share(land, tmp_path, monkeypatch):
    """The gradient of one step is that of the losses of its two micro-batches, written out."""
    head = ["--head", "upernet", "--head_dim", 8, "--finetune", "--img_size", 32]
    flags = ["--data_path", land, "--output_dir", tmp_path / "out", *head, "--epochs", 20, "--max_steps", 1]
    args = make_args(*flags, "--batch_size_per_gpu", 2, "--accum_steps", 2)
    model, twin = (segmenter("test_convnext", *head, K=2) for _ in range(2))
    batches, grads, fetch = [], [], common.Run.fetch
    monkeypatch.setattr(common.Run, "fetch", lambda run: batches.append(fetch(run)) or batches[-1])
    monkeypatch.setattr(common, "optimizer_step", lambda *_: grads.extend(
        p.grad.clone() for p in model.head.parameters()))
    es.train(model, load(land), "", args, ALONE)
    for micro, (images, masks) in enumerate(batches):
        torch.manual_seed(common.stream_seed(args.seed, "draws", 0, micro, 0))  # of dropout
        x = common.normalize(common.to_float(images, args.mean, args.std), args.mean, args.std, images.dtype)
        loss, auxiliary = (
            F.cross_entropy(F.interpolate(y, scale_factor=4, mode="bilinear"), masks.long(),
                            ignore_index=es.IGNORE) for y in twin.train()(x))
        ((loss + 0.4 * auxiliary) / 2).backward()
    assert len(batches) == 2
    for grad, p in zip(grads, twin.head.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-3)


def test_change_loss_is_binary_cross_entropy_and_dice_of_the_batch():
    logits, masks = torch.randn(2, 1, 4, 5), torch.from_numpy(rng().integers(0, 2, (2, 4, 5))).byte()
    masks[1, 3] = es.IGNORE
    p, y = [x[masks != es.IGNORE].double().numpy() for x in (logits[:, 0].sigmoid(), masks)]
    terms = es.loss_terms(logits, masks, ALONE)
    entropy = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert float(terms["cross_entropy"]) == pytest.approx(entropy, abs=1e-5)
    assert float(terms["dice"]) == pytest.approx(1 - (2 * sum(p * y) + 1) / (sum(p) + sum(y) + 1), abs=1e-5)


# ------------------------------------------------------------------ training


@pytest.fixture
def segment(run):
    """A tiny run; returns its lines of results.jsonl."""

    def main(data, out, *flags, weights=("random",)):
        words = "--data_path", data, "--output_dir", out, "--weights", *weights, *TINY, *flags
        run("eval_segmentation", *words)
        results = Path(out) / "results.jsonl"
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    return main


@pytest.mark.parametrize("finetune", [False, True])
def test_frozen_means_no_weight_and_no_statistic_changes(segment, land, tmp_path, finetune):
    flags = ["--finetune", "--head", "upernet", "--head_dim", "8"] if finetune else []
    segment(land, tmp_path / "out", *flags)
    torch.manual_seed(0)
    before = common.build_backbone("test_resnet", 32).state_dict()
    after = load_file(tmp_path / "out" / "backbone" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed if not finetune else changed == before.keys()
    assert Image.open(tmp_path / "out" / "examples.png").size == (3 * 58 + 2, 3 * 42 + 2)


def test_learning_rates_of_layers_and_what_is_not_trained():
    flags = ["--finetune", "--layer_decay", 0.5, "--backbone_lr", 1e-3, "--lr", 1e-2]
    model = segmenter("test_vit", *flags, side=32)
    optimizer = es.build_optimizer(model, make_args(*flags))
    common.set_lr(optimizer, 2e-2)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    vit, head = model.pyramid.backbone, model.head
    assert rate[id(head.levels[0][1].weight)] == 2e-2
    for block, part in enumerate(vit.blocks):
        assert rate[id(part.mlp.fc1.weight)] == pytest.approx(2e-3 * 0.5 ** (5 - block))
    assert rate[id(vit.patch_embed.proj.weight)] == pytest.approx(2e-3 * 0.5**6)
    assert not vit.norm.weight.requires_grad and id(vit.norm.weight) not in rate  # passed by no map
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups
               if any(p is vit.pos_embed for p in group["params"]))


@pytest.mark.parametrize("kind", ["land", "dates"])
def test_a_resumed_run_repeats_the_unbroken_one(segment, land, dates, tmp_path, kind):
    data = {"land": land, "dates": dates}[kind]
    flags = "--head upernet --head_dim 8 --finetune --drop_path 0.2 --color_jitter 0.4 --epochs 3".split()
    flags += ["--arch", "test_convnext", "--num_workers", "1" if kind == "dates" else "0"]
    flags += ["--batch_size_per_gpu", "8"] if kind == "dates" else []
    whole = segment(data, tmp_path / "whole", *flags)
    assert segment(data, tmp_path / "parts", *flags, "--max_steps", "4") == []
    parts = segment(data, tmp_path / "parts", *flags)
    for name, part in (("checkpoint.pth", "model"), ("segmenter.pth", "head")):
        a, b = (common.load_checkpoint(tmp_path / out / name) for out in ("whole", "parts"))
        assert_same(a[part], b[part])
    for line in (*whole, *parts):
        del line["seconds"], line["versions"]
    assert whole == parts


def joint_loss(path, K):
    """In each process: the gradient of the loss of its part of a batch, averaged as DDP does."""
    process = common.init_process("cpu")
    generator = torch.Generator().manual_seed(1)
    logits, masks = torch.randn(4, K, 6, 6, generator=generator), torch.ones(4, 6, 6).byte()
    masks[:, :, ::2], masks[0], masks[1, :4] = 0, es.IGNORE, es.IGNORE  # the first parts have less to count
    logits, masks = (x.chunk(process.world_size)[process.rank].clone() for x in (logits, masks))
    terms = es.loss_terms(logits.requires_grad_(), masks, process)
    sum(terms.values()).backward()
    values = torch.stack([*terms.values()]).detach()
    parts = common.gather_objects((logits.grad / process.world_size, values), process)
    if process.is_main:
        grads, values = zip(*parts, strict=True)
        torch.save((torch.cat(grads), torch.stack(values).mean(0)), path)
    process.leave()
    raise SystemExit


@pytest.mark.parametrize("K", [1, 2])
def test_loss_of_two_processes_is_that_of_the_joint_batch(tmp_path, K):
    results = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.pth"
        Start(tmp_path / path.stem, "toy", processes=processes, prepare=(joint_loss, path, K)).finish()
        results.append(torch.load(path))
    torch.testing.assert_close(*results)


def test_two_processes_share_crops_and_test_images(land, segment, tmp_path):
    more = ["--head", "upernet", "--head_dim", "8", "--finetune", "--epochs", "1"]
    flags = ["--data_path", land, "--output_dir", tmp_path / "out", "--weights", "random", *TINY, *more]
    Start(tmp_path / "log", "eval_segmentation", *flags, "--batch_size_per_gpu", "2", processes=2).finish()
    # nothing is left to train: one process evaluates the same weights on all images
    both, alone = segment(land, tmp_path / "out", *more)
    assert both["test_images"] == alone["test_images"] == 3
    for part in ("train", "val"):  # nor on another test set
        shutil.copytree(land / "train", tmp_path / "other" / part)
    assert segment(tmp_path / "other", tmp_path / "out", *more)[-1]["test_images"] == 6
    for name in ("miou", "accuracy", "ap", "class_iou"):
        assert both[name] == pytest.approx(alone[name], abs=0.1)


def test_it_learns_and_compares_several_weights(segment, land, tmp_path, capsys):
    lines = segment(land, tmp_path / "out", "--epochs", "10", "--amp", "bf16", weights=("random", "pixels"))
    assert [line["weights"] for line in lines] == ["random", "pixels"]
    assert lines[1]["miou"] > 80 and lines[1]["ap"] > 95 and lines[1]["arch"] is None
    table = capsys.readouterr().out.split("\nsegmentation: ")[1].splitlines()
    assert "ignored values: 255;" in table[0]
    assert table[1].split() == ["miou", "mean_f1", "accuracy", "ap", "share"]
    assert table[3].split()[:2] == ["pixels", f"{lines[1]['miou']:.2f}"]
    assert not (tmp_path / "out" / "pixels" / "backbone").exists()
    with pytest.raises(SystemExit):
        segment(land, tmp_path / "out" / "random", "--epochs", "10", "--seed", "1", "--amp", "bf16")
    assert "seed was 0, is 1; weights_digest was" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"random", "pixels", "results.jsonl"}


# ------------------------------------------------------------------ prediction


GEO = {33550: (12, 3, (0.5, 0.5, 0.0)), 33922: (12, 6, (0.0, 0.0, 0.0, 400000.0, 5e6, 0.0)),
       34735: (3, 8, (1, 1, 0, 1, 3072, 0, 1, 32633)), 34737: (2, 6, "WGS84|")}


@pytest.mark.parametrize("named", [False, True])
def test_predictions_lie_on_the_map(run, segment, tmp_path, named):
    """Six bands in a file, or two by name in a folder; masks have the size, the tags and the numbers."""
    extra = {"extratags": [(code, *tag, True) for code, tag in GEO.items()], "metadata": None}
    for part in ("train", "val", "new"):
        for i in range(4):
            mask = np.zeros((40, 50), np.uint8)
            mask[:, 25:] = 7
            image = (rng(i).normal(300, 20, (6, 40, 50)) + 200 * mask).astype(np.float32)
            folder = tmp_path / part / ("images" if part != "new" else "deep")
            if named:
                save(folder / f"{i}.x" / "S2_B01.tif", image[0, ::2, ::2], **extra)
                save(folder / f"{i}.x" / "S2_B02.tif", image[1], **(extra if i else {}))
            elif i < 2:
                save(folder / f"{i}.x.tif", image, photometric="minisblack", **(extra if i else {}))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{i}.x.npy", image.transpose(1, 2, 0))
            if part != "new":
                save(tmp_path / part / "masks" / f"{i}.x.tif", mask)
    bands = ["--bands", "B01", "B02"] if named else ["--in_chans", "6"]
    segment(tmp_path, tmp_path / "out", *bands, "--epochs", "20", "--ignore")
    run("eval_segmentation", "--predict", tmp_path / "new", "--weights", tmp_path / "out", "--output_dir",
        tmp_path / "out", "--device", "cpu")
    tagged, out = {1, 2, 3} if named else {1}, tmp_path / "out" / "predictions" / "deep"
    assert {path.name for path in out.iterdir()} == {f"{i}.x.{'tif' if i in tagged else 'png'}"
                                                     for i in range(4)}
    for i in range(4):
        if i in tagged:
            with tifffile.TiffFile(out / f"{i}.x.tif") as file:
                mask, tags = file.pages[0].asarray(), file.pages[0].tags
                for code, (dtype, _, value) in GEO.items():
                    assert (int(tags[code].dtype), tags[code].value) == (dtype, value)
        else:
            mask = np.array(Image.open(out / f"{i}.x.png"))
        assert mask.shape == (40, 50) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 7}
        assert (mask[:, :20] == 0).mean() > 0.9 and (mask[:, 30:] == 7).mean() > 0.9
    if named:  # one scene: its folder is the image
        run("eval_segmentation", "--predict", tmp_path / "new" / "deep" / "1.x", "--weights",
            tmp_path / "out", "--output_dir", tmp_path / "out", "--device", "cpu")
        assert (tifffile.imread(out.parent / "1.x.tif") == tifffile.imread(out / "1.x.tif")).all()


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_change_is_predicted_as_it_was_evaluated(run, segment, dates, tmp_path, arch):
    [line] = segment(dates, tmp_path / "out", "--arch", arch, "--head", "upernet", "--head_dim", "8")
    run("eval_segmentation", "--predict", dates / "test", "--weights", tmp_path / "out", "--output_dir",
        tmp_path / "new", "--device", "cpu", "--amp", "off")
    predicted, label = (np.stack([np.array(Image.open(folder / f"{i}.png")) > 127 for i in range(3)])
                        for folder in (tmp_path / "new" / "predictions", dates / "test" / "label"))
    f1 = 200 * (predicted & label).sum() / (predicted.sum() + label.sum())
    assert line["f1"] == pytest.approx(f1, abs=1e-3)


# ------------------------------------------------------------------ bad input, drawn and real data


def break_data(kind, land):
    """Makes a copy's data bad in one way."""
    mask, image = land / "train" / "masks" / "2.png", land / "train" / "images" / "2.png"
    masks = [(path, np.uint8(255 * (np.array(Image.open(path)) == 1))) for path in land.glob("*/masks/*")]
    {"missing": mask.unlink, "damaged": lambda: mask.write_text("no mask"), "": lambda: None,
     "other size": lambda: save(image, np.zeros((40, 50, 3), np.uint8)),
     "nan": lambda: np.save(mask.with_suffix(mask.unlink() or ".npy"), np.full((40, 56), np.nan)),
     "65536": lambda: np.save(mask.with_suffix(mask.unlink() or ".npy"), np.full((40, 56), 65536)),
     "value": lambda: save(mask, np.full((40, 56), 9, np.uint8)),
     "0 and 255": lambda: [save(*pair) for pair in masks]}[kind]()
    (land / "classes").write_text("a 0\nb 1\n")
    (land / "colours").write_text("a 0 0 0\nb 1\n")
    (land / "one").write_text("\ufeffa 0\nIgnore 1\n")
    (land / "twice").write_text("a 0\nb 1\nc 1\n")
    (land / "rgb").write_text("a 0 0 0\nb 1 1 1\n")
    return land


@pytest.mark.parametrize("kind, flags, message", [
    ("missing", [], "masks: lacks 1 files that are in images: 2"),
    ("other size", [], "2.png: 40 x 50 pixels, its mask has 40 x 56"),
    ("value", ["--classes", "LAND/classes"], "classes: has no class for value 9, found in"),
    ("0 and 255", [], "masks hold 0, 255; --ignore leaves 1; must be from 2 to 254: name them with"),
    ("damaged", [], "masks/2.png: cannot identify image file"),
    ("", ["--classes", "LAND/colours"], "must be lines of `name value`, or all of `name R G B`: b 1"),
    ("", ["--classes", "LAND/one"], "names 1 classes, must be from 2 to 254"),
    ("", ["--classes", "LAND/twice"], "twice: names a value twice"),
    ("", ["--classes", "LAND/rgb", "--ignore", "0"], "--ignore: not for masks in colour: put a line"),
    ("nan", [], "must hold H x W whole numbers from 0 to 65535"),
    ("65536", [], "must hold H x W whole numbers from 0 to 65535"),
    ("", ["--color_jitter", "1.5"], "1.5"),
    ("", ["--classes", "nothing"], "--classes nothing: cannot be read"),
    ("", ["--data_path", "LAND/train"], "must hold train/ and val/ (or test/)"),
    ("", ["--head", "upernet", "--batch_size_per_gpu", "1"], "--batch_size_per_gpu 1: must be at least 2"),
    ("", ["--head_dim", "8"], "--head_dim 8: only with --head upernet"),
    ("", ["--backbone_lr", "1"], "--backbone_lr 1.0: only with --finetune"),
    ("", ["--in_chans", "4"], "not 4: give --in_chans 3, or choose with --bands"),
    ("", ["--predict", "x"], "--data_path or --predict: give one of the two"),
    ("", ["--arch", "efficientvit_m0"], "--weights random: timm gives no maps at strides 4, 8, 16, 32"),
    ("", ["--weights", "a/b"], "--weights a/b: no such file"),
    ("", ["--weights", "a/b", "a_b"], "--weights a/b a_b: two of them would share a folder"),
    ("", ["--batch_size_per_gpu", "13"], "the effective batch, 13, is larger than the data, 12"),
])
def test_bad_input_is_one_line(segment, land, tmp_path, capsys, kind, flags, message):
    flags = [flag.replace("LAND", str(land)) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        segment(break_data(kind, land), tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == (1 if kind in ("damaged", "nan", "65536") else 2), error
    assert len(error.splitlines()) == 1 and message in error, error


def test_a_run_knows_its_classes_by_what_their_file_says(segment, land, tmp_path, capsys):
    """And it keeps its segmenter where test images turn out to be bad, to resume when they are mended."""
    for name, text in (("first", "a 0\nb 1\n"), ("moved", "a 0\nb 1\n"), ("other", "b 0\na 1\n")):
        (tmp_path / name).write_text(text)
    run = partial(segment, land, tmp_path / "out", "--classes")
    good = land / "val" / "images" / "1.png"
    kept = good.read_bytes()
    good.write_bytes(kept[: len(kept) // 2])  # its size can be read
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "first")
    assert stop.value.code == 1 and "more than 1 %" in capsys.readouterr().err
    assert (tmp_path / "out" / "segmenter.pth").exists() and (tmp_path / "out" / "backbone").exists()
    good.write_bytes(kept)
    [line] = run(tmp_path / "moved")
    assert line["loading"].startswith("test_resnet: random") and not line["allow_partial"]
    with pytest.raises(SystemExit):
        run(tmp_path / "other")
    assert "other settings: classes was [['a', 'b']" in capsys.readouterr().err


def test_prediction_of_unreadable_images_fails(run, segment, land, tmp_path, capsys):
    segment(land, tmp_path / "out", "--epochs", "1")
    np.save(tmp_path / "bands.npy", np.zeros((6, 40, 40), np.uint8))
    (tmp_path / "new").mkdir()
    (tmp_path / "bands.npy").rename(tmp_path / "new" / "bands.npy")
    with pytest.raises(SystemExit) as stop:
        run("eval_segmentation", "--predict", tmp_path / "new", "--weights", tmp_path / "out", "--output_dir",
            tmp_path / "out", "--device", "cpu")
    assert stop.value.code == 1 and "1 of 1 images are unreadable" in capsys.readouterr().err
    shutil.copy(land / "val" / "images" / "1.png", tmp_path / "new")
    run("eval_segmentation", "--predict", tmp_path / "new", "--weights", tmp_path / "out", "--output_dir",
        tmp_path / "out", "--device", "cpu")
    captured = capsys.readouterr()
    assert "masks of 1 of 2 images" in captured.out and "unreadable, left out" in captured.err


def test_images_smaller_than_the_crops_are_warned_about(land, capsys):
    for img_size, count in ((40, 0), (41, 1)):
        load(land, "--img_size", str(img_size))
        assert capsys.readouterr().err.count("most images are smaller, so crops are padded") == count


def test_max_steps_is_for_each_of_the_weights(segment, land, tmp_path):
    flags = ["--epochs", "2", "--max_steps", "1"]
    segment(land, tmp_path / "out", *flags, weights=("random", "pixels"))
    assert [len(read_log(tmp_path / "out" / name)) for name in ("random", "pixels")] == [2, 2]


def test_drawn_scenes_have_classes_and_changes(tmp_path):
    for name, dates in (("segmentation", False), ("changes", True)):
        write_pixels(tmp_path / name, 50, 32, 0, dates)
    land = load(tmp_path / "segmentation", "--classes", tmp_path / "segmentation" / "classes.txt")
    pairs = load(tmp_path / "changes")
    assert land.classes.names == ["ground", "trees", "water", "paved", "building"]
    assert len(land.train) == len(pairs.train) == 40 and len(pairs.changed) > 20
    shares = sum(np.bincount(np.array(Image.open(mask)).ravel(), minlength=5) for _, mask in land.train)
    assert len(shares) == 5 and (shares > 0.02 * shares.sum()).all()
    before, after = es.read_dates(pairs.train[3][:2], pairs.pixels).float()  # houses on streets
    assert (before - after).abs().mean() > 5


def test_roads_and_changes_of_the_shared_data():
    """Real files: 80 + 20 aerial images with masks of 0 and 1, 11 + 2 pairs of dates."""
    root = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "roads").is_dir() or not (root / "sztaki").is_dir():
        pytest.skip(f"no roads and sztaki in {root}")
    roads, pairs = load(root / "roads"), load(root / "sztaki")
    assert (len(roads.train), len(roads.test), roads.classes.names) == (80, 20, ["0", "1"])
    assert (len(pairs.train), len(pairs.test), len(pairs.changed)) == (11, 2, 11)
    crop, mask = es.CropDataset(pairs, 128, 0)[0, 0]
    assert crop.shape == (2, 3, 128, 128) and mask.shape == (128, 128)

"""Boxes against shapely, targets and losses against slow loops, and small detectors trained to the end."""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import shapely
import tifffile
import torch
import torchvision
from conftest import Start, assert_same_state, read_log
from PIL import Image, ImageDraw
from shapely import affinity

import common
import eval_detection as ed
from demo.scenes import write_detection

ALONE = common.Process(0, 1, torch.device("cpu"), None)
SMALL = "--weights random --arch test_resnet --img_size 64 --fpn_dim 64 --head_convs 1".split()
SMALL += "--num_workers 0 --batch_size_per_gpu 4 --epochs 2 --save_every 1000 --device cpu --amp off".split()


def random_boxes(n, seed=0, size=100, least=1):
    r = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sides = least + (size / 3 - least) * r[:, 2:4]
    return ed.canonical(torch.cat([size * r[:, :2], sides, math.pi * (r[:, 4:] - 0.5)], 1))


def polygon(box):
    """By shapely alone: a rectangle that is turned and moved."""
    x, y, w, h, angle = map(float, box)
    upright = shapely.box(-w / 2, -h / 2, w / 2, h / 2)
    return affinity.translate(affinity.rotate(upright, angle, origin=(0, 0), use_radians=True), x, y)


def iou(a, b):
    """Of two polygons."""
    shared = a.intersection(b).area
    return shared / (a.area + b.area - shared)


# ------------------------------------------------------------------ boxes


def test_corners_in_any_order_give_the_box_back():
    boxes = random_boxes(3000)
    order = torch.rand(3000, 4, generator=torch.Generator().manual_seed(1)).argsort(1)
    corners = ed.to_corners(boxes).gather(1, order[..., None].expand(-1, -1, 2))
    again = ed.to_boxes(corners, oriented=True)
    assert (again[:, 2] >= again[:, 3]).all() and (again[:, 4] >= -math.pi / 2).all()
    assert (again[:, 4] < math.pi / 2).all()
    for box, other in zip(boxes, again, strict=True):
        assert polygon(box).hausdorff_distance(polygon(other)) < 1e-9
    x, y = ed.to_corners(boxes).unbind(-1)
    upright = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)
    expected = torchvision.ops.box_convert(upright, "xyxy", "cxcywh")
    torch.testing.assert_close(ed.to_boxes(corners, oriented=False)[:, :4], expected)


def test_a_quadrilateral_becomes_its_smallest_rectangle():
    corners = 100 * torch.rand(500, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for points, box in zip(corners, ed.to_boxes(corners, oriented=True), strict=True):
        hull = shapely.MultiPoint(points.numpy()).convex_hull
        angles = np.linspace(0, math.pi / 2, 91)
        least = min(affinity.rotate(hull, a, use_radians=True).envelope.area for a in angles)
        assert box[2] * box[3] <= least * (1 + 1e-9)
        assert polygon(box).buffer(1e-6).contains(hull)


def test_iou_matrix_is_shapelys():
    a, b = random_boxes(60), random_boxes(50, seed=1)
    expected = [[iou(polygon(x), polygon(y)) for y in b] for x in a]
    np.testing.assert_allclose(ed.iou_matrix(a, b), expected, atol=2e-3)
    for noise in (0, 1e-16, 1e-15, 1e-12, 1e-6):  # boxes that are nearly, or but for the last bits, equal
        a = random_boxes(2000)
        b = a + noise * torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).double() * a
        assert ed.pair_iou(ed.to_polygons(a), ed.to_polygons(b)).min() > 0.99


@pytest.mark.parametrize("oriented, threshold", [(True, 0.1), (False, 0.5)])
def test_nms_equals_a_slow_loop(oriented, threshold):
    boxes = random_boxes(150, least=10)
    near = boxes[:30] + 1e-4 * torch.randn(30, 5, generator=torch.Generator().manual_seed(2)).double()
    boxes = torch.cat([boxes, boxes[:10], near])
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(len(boxes)) % 2
    boxes[:, 4] *= oriented
    polygons, kept = list(map(polygon, boxes)), []
    for i in scores.argsort(descending=True).tolist():
        if all(labels[i] != labels[j] or iou(polygons[i], polygons[j]) <= threshold for j in kept):
            kept.append(i)
    assert ed.nms(boxes, scores, labels, threshold).tolist() == kept
    assert len(kept) < 150


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize("height, width, S", [(64, 64, 64), (50, 200, 64), (301, 129, 100), (65, 64, 64)])
def test_windows_cover_an_image(height, width, S):
    seen, rows, columns = np.zeros((height, width), int), set(), set()
    for top, left in ed.windows_of((height, width), S):
        assert 0 <= top <= max(0, height - S) and 0 <= left <= max(0, width - S)
        seen[top : top + S, left : left + S] += 1
        rows.add(top)
        columns.add(left)
    assert seen.min() == 1
    for starts in (sorted(rows), sorted(columns)):
        assert all(b - a <= 0.8 * S + 0.5 for a, b in zip(starts, starts[1:], strict=False))


def sample_of(boxes, size, path="", labels=None):
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else labels
    return ed.Sample(path, size, boxes.float(), labels, torch.zeros(len(boxes), dtype=torch.bool))


def bright_image(path, boxes, size):
    """Black, with white boxes; by the distance of the pixels' centres in the boxes' own axes."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    inside = np.zeros(size, bool)
    for x, y, w, h, angle in boxes.tolist():
        along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
        across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
        inside |= (abs(along) <= w / 2) & (abs(across) <= h / 2)
    Image.fromarray((255 * inside).astype(np.uint8)).convert("RGB").save(path)


@pytest.mark.parametrize("oriented", [True, False])
def test_windows_take_their_boxes_along(tmp_path, oriented):
    """White boxes are found at the targets' places; those cut off by more than .3 of them are marked."""
    boxes = [[30, 40, 40, 12, 0.5], [90, 25, 30, 16, -1.2], [95, 80, 44, 10, 1.0], [2, 90, 20, 14, 0]]
    boxes = torch.tensor(boxes)
    if not oriented:
        boxes[:, 4] = 0
    path = str(tmp_path / "a.png")
    bright_image(path, boxes, (100, 120))
    windows = ed.BoxWindows([sample_of(boxes, (100, 120), path)], 64, [0.0] * 3, oriented, seed=0)
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    positions, kept, marked = torch.stack([columns, rows], -1).view(-1, 2), 0, 0
    for index in range(80):
        window, targets = windows[0, index % len(windows)] if index < len(windows) else windows[index, 0]
        white, objects = window[0].flatten() > 127, targets[targets[:, 5] > -2]
        margins = ed.distances(positions[:, None], objects[:, :5])[0].amin(-1)  # above 0 inside
        near = (margins.abs() < 1).any(1)
        assert torch.equal(white[~near], (margins > 0).any(1)[~near])
        for box in objects:
            whole = polygon(box[:5])  # of the last box a part lies outside the image
            in_image = 140 if torch.isclose(box[2:4].prod(), torch.tensor(280.0)) else whole.area
            share = whole.intersection(shapely.box(0, 0, 64, 64)).area / max(in_image, 1)
            if in_image == whole.area and abs(share - 0.7) > 0.01:
                assert (box[5] == -1) == (share < 0.7)
        kept, marked = kept + int((objects[:, 5] >= 0).sum()), marked + int((objects[:, 5] == -1).sum())
    assert kept > 80 and marked > 5
    assert all(torch.equal(a, b) for a, b in zip(windows[3, 1], windows[3, 1], strict=True))


def test_share_is_that_of_the_part_inside_the_image():
    boxes = torch.tensor([[0.0, 50, 40, 10, 0], [50, 50, 40, 10, 0], [50, 50, 40, 10, math.pi / 2]])
    share = ed.share_inside(boxes, (6, 0, 58, 100), (100, 100))
    torch.testing.assert_close(share, torch.tensor([14 / 20, 28 / 40, 1]))


class Oracle(torch.nn.Module):
    """Finds all boxes that a window holds by .7; pixels tell where in the image the window lies."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, windows):
        places = self.boxes[:, :2] - windows[0, :2, 0, 0]  # of a batch of one
        frame, N = shapely.box(0, 0, *windows.shape[:1:-1]), len(self.boxes)
        logits, raw = torch.full((1, N, 2), -9.0), torch.zeros(1, N, 7)
        for n, box in enumerate(torch.cat([places, self.boxes[:, 2:]], 1)):
            if polygon(box).intersection(frame).area >= 0.7 * polygon(box).area:
                logits[0, n, n % 2] = 9
        raw[..., :4] = (self.boxes[:, [2, 3, 2, 3]] / 2).log()
        raw[..., 4], raw[..., 5], raw[..., 6] = 9, (2 * self.boxes[:, 4]).sin(), (2 * self.boxes[:, 4]).cos()
        return logits, raw, places, torch.ones(N)


def test_nothing_is_lost_or_doubled_between_windows():
    boxes = random_boxes(300, size=400, least=8).float()
    boxes[:, 2:4] = boxes[:, 2:4].clamp(max=20)  # no larger than the overlap, so whole in one window
    boxes[:, 3] = boxes[:, 3].clamp(max=12)
    inside = ((boxes[:, :2] > 12) & (boxes[:, :2] < 388)).all(1)
    boxes = boxes[inside]
    boxes = boxes[ed.nms(boxes, torch.rand(len(boxes)), torch.zeros(len(boxes)), 1e-6)]  # apart
    rows, columns = torch.meshgrid(torch.arange(400.0), torch.arange(400.0), indexing="ij")
    image = torch.stack([columns, rows, rows])
    args = argparse.Namespace(img_size=100, batch_size_per_gpu=1, amp="off", boxes="oriented")
    args.mean, args.std = [200.0] * 3, [1000.0] * 3
    found, scores, labels = ed.detect(lambda x: Oracle(boxes)(1000 * x + 200), image, args, ALONE)
    assert len(found) == len(boxes) > 60
    best = ed.iou_matrix(boxes, found)
    assert (best.max(1) > 0.99).all()
    assert torch.equal(labels[best.argmax(1)], torch.arange(len(boxes)) % 2)


class Answers(torch.nn.Module):
    """For each window the same logits P x K and raw P x 5 or 7 at positions P x 2 of stride 1."""

    def __init__(self, logits, raw, positions):
        super().__init__()
        self.outputs = torch.tensor(logits), torch.tensor(raw), torch.tensor(positions)

    def forward(self, windows):
        logits, raw, positions = self.outputs
        return (logits.expand(len(windows), -1, -1), raw.expand(len(windows), -1, -1), positions,
                torch.ones(len(positions)))


def detect_answers(*answers, boxes="horizontal", size=(100, 100)):
    args = argparse.Namespace(img_size=100, batch_size_per_gpu=3, amp="off", boxes=boxes)
    args.mean, args.std = [0.5] * 3, [0.5] * 3
    return ed.detect(Answers(*answers), torch.zeros(3, *size, dtype=torch.uint8), args, ALONE)


def test_score_is_probability_times_centreness_and_little_or_tiny_boxes_go():
    side = [math.log(10.0)] * 4
    raw = [[*side, 0.0], [*side, 2.0], [*side, -4.0], [math.log(0.2)] * 4 + [9.0], [math.inf] * 4 + [9.0]]
    places = [[20.0, 20], [60, 20], [20, 60], [60, 60], [80, 80]]
    boxes, scores, _ = detect_answers([[1.0], [0.0], [1.0], [9.0], [9.0]], raw, places)
    chance = torch.tensor([1.0, 0.0]).sigmoid() * torch.tensor([0.0, 2.0]).sigmoid()
    # .73 x .02 is not above .05; a side of .4 px is under .5; e^8 px is the longest.
    torch.testing.assert_close(scores[1:], chance.sort(descending=True).values)
    assert boxes[1:, :2].tolist() == [[60, 20], [20, 20]] and boxes[1:, 2:4].allclose(torch.tensor(20.0))
    assert boxes[0, 2:4].allclose(torch.tensor(2 * math.exp(8.0)))  # where an overflow is cut


@pytest.mark.parametrize("boxes, overlap, kept", [("oriented", 0.15, 1), ("oriented", 0.05, 2),
                                                  ("horizontal", 0.45, 2), ("horizontal", 0.55, 1)])
def test_overlap_that_removes_a_box(boxes, overlap, kept):
    """Two squares of 20 px, shifted so that their IoU is `overlap`."""
    shift = 20 * (1 - overlap) / (1 + overlap)
    raw = [[math.log(10.0)] * 4 + [9.0] + [0.0, 1.0] * (boxes == "oriented")] * 2
    found, _, _ = detect_answers([[2.0], [1.0]], raw, [[30.0, 30], [30 + shift, 30]], boxes=boxes)
    assert len(found) == kept


def test_windows_of_a_batch_keep_their_places_and_the_best_boxes_stay(monkeypatch):
    """Four windows, three in a batch: each finds a box at its own place."""
    raw = [[math.log(5.0)] * 4 + [9.0]]
    boxes, _, _ = detect_answers([[3.0]], raw, [[10.0, 10]], size=(180, 180))
    assert sorted(boxes[:, :2].tolist()) == [[10, 10], [10, 90], [90, 10], [90, 90]]
    monkeypatch.setattr(ed, "MOST_BOXES", 3)
    assert len(detect_answers([[3.0]], raw, [[10.0, 10]], size=(180, 180))[0]) == 3


def test_predictions_that_are_not_finite_end_the_run(capsys):
    with pytest.raises(SystemExit):
        detect_answers([[math.nan]], [[1.0] * 5], [[10.0, 10]])
    assert "not all predictions are finite" in capsys.readouterr().err


@pytest.mark.parametrize("p2", [False, True])
def test_positions_of_padded_images_that_are_not_square(p2):
    """70 x 130 px become 96 x 160: what is on the image lies where it lay, and the rest is the mean."""
    args = argparse.Namespace(boxes="oriented", finetune=False, in_chans=3, p2=p2, fpn_dim=64, head_convs=1,
                              weights=["x"], seed=0)
    detector, seen = ed.build_detector(common.build_backbone("test_resnet", 64), 2, args).eval(), []
    detector.pyramid.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 70, 130)
    logits, raw, positions, strides = detector(images)
    assert torch.equal(seen[0][:, :, :70, :130], images) and seen[0].shape == (1, 3, 96, 160)
    assert not seen[0][:, :, 70:].any() and not seen[0][..., 130:].any()
    expected = [((j + 0.5) * s, (i + 0.5) * s, s) for s in [4] * p2 + [8, 16, 32, 64, 128]
                for i in range(-(-96 // s)) for j in range(-(-160 // s))]
    assert torch.cat([positions, strides[:, None]], 1).tolist() == [list(map(float, row)) for row in expected]
    assert logits.shape[1] == raw.shape[1] == len(expected)


def test_what_an_untrained_head_says():
    """Probability .01, boxes of about two strides, no angle."""
    args = argparse.Namespace(boxes="oriented", finetune=False, in_chans=3, p2=False, fpn_dim=64,
                              head_convs=2, weights=["x"], seed=0)
    torch.manual_seed(0)  # of the backbone; the head is drawn from args.seed
    detector = ed.build_detector(common.build_backbone("test_resnet", 64), 2, args).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, raw, positions, strides = detector(images)
    assert logits.sigmoid().median().item() == pytest.approx(0.01, rel=0.1)
    boxes = ed.decode(raw[0], positions, strides)
    assert (boxes[:, 2:4] / strides[:, None]).median().item() == pytest.approx(2 * math.exp(0.7), rel=0.05)
    assert boxes[:, 4].abs().max() < 0.3
    assert detector.head.to_box.bias.tolist() == pytest.approx([0.7] * 4 + [0, 0, 1])


def test_windows_larger_than_the_image_turns_and_places(tmp_path):
    """The border is of the mean colour; all eight turns are drawn; one window in five lies anywhere."""
    path = str(tmp_path / "a.png")
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    small = ed.BoxWindows([sample_of(torch.tensor([[5.0, 5, 4, 2, 0]]), (10, 10), path)], 16, [0.2, 0.4, 0.6],
                          True, seed=0)
    seen = set()
    for epoch in range(60):
        window = small[epoch, 0][0]
        whole = torch.tensor([51, 102, 153]).byte().view(3, 1, 1)
        assert int((window == whole).all(0).sum()) >= 16 * 16 - 100
        seen.add(window.numpy().tobytes())
    assert len(seen) == 8
    Image.new("RGB", (90, 90)).save(path)
    large = ed.BoxWindows([sample_of(torch.tensor([[80.0, 80, 6, 6, 0]]), (90, 90), path)], 12,
                          [0.0] * 3, True, seed=0)
    with_box = np.mean([bool((large[i, 0][1][:, 5] >= 0).any()) for i in range(300)])
    assert 0.72 < with_box < 0.9  # anywhere: one in 64


def test_rates_of_head_and_backbone_and_the_schedules():
    flags = ["--data_path", "x", "--output_dir", "x", "--weights", "random", "--lr", "0.02"]
    args = ed.get_parser().parse_args([*flags, "--epochs", "10", "--schedule", "5", "8"])
    ed.check_args(args)
    assert args.backbone_lr == pytest.approx(0.006) and args.weight_decay == 0.05
    papers = ed.get_parser().parse_args([*flags, "--optimizer", "sgd"])
    ed.check_args(papers)
    assert papers.backbone_lr == papers.lr == 0.02 and papers.weight_decay == 1e-4
    args.boxes = "oriented"
    args.in_chans = 3
    detector = ed.build_detector(common.build_backbone("test_vit", 64), 2, args)
    optimizer = ed.build_optimizer(detector, args)
    common.set_lr(optimizer, 0.02)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    vit = detector.pyramid.backbone
    assert groups[id(detector.head.to_box.weight)]["lr"] == 0.02
    assert groups[id(vit.blocks[0].mlp.fc1.weight)]["lr"] == pytest.approx(0.006)
    assert groups[id(vit.blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.05
    assert groups[id(vit.pos_embed)]["weight_decay"] == 0
    args.optimizer = "sgd"
    assert ed.build_optimizer(detector, args).param_groups[0]["momentum"] == 0.9
    run = argparse.Namespace(total_steps=1000, steps_per_epoch=100)
    rates = [ed.learning_rate(step, run, args) for step in (0, 50, 100, 499, 500, 799, 800)]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.02, 0.002, 0.002, 0.0002])
    args.schedule = None
    assert ed.learning_rate(550, run, args) == pytest.approx(0.01) and ed.learning_rate(1000, run, args) == 0


# ------------------------------------------------------------------ targets and losses


def grid(S=64, first=8):
    """Positions and strides of levels of a window: first, 2 first, ..., by a plain loop."""
    strides = (first, 2 * first, 4 * first, 8 * first)
    sides = {s: range(math.ceil(S / s)) for s in strides}
    cells = [(j * s + s / 2, i * s + s / 2, s) for s in strides for i in sides[s] for j in sides[s]]
    table = torch.tensor(cells)
    return table[:, :2], table[:, 2]


def slow_assign(positions, strides, boxes, ignored):
    index = []
    for (px, py), s in zip(positions.tolist(), strides.tolist(), strict=True):
        low = 0 if s == min(strides) else 4 * s
        high = math.inf if s == max(strides) else 8 * s
        best, chosen = math.inf, -2
        for n, (x, y, w, h, angle) in enumerate(boxes.tolist()):
            along = (px - x) * math.cos(angle) + (py - y) * math.sin(angle)
            across = (py - y) * math.cos(angle) - (px - x) * math.sin(angle)
            sides = (w / 2 + along, w / 2 - along, h / 2 + across, h / 2 - across)
            near = abs(along) < 1.5 * s and abs(across) < 1.5 * s
            if min(sides) > 0 and near and low < max(sides) <= high and w * h < best:
                best, chosen = w * h, n
        if chosen < 0 and any(polygon(box).contains(shapely.Point(px, py)) for box in ignored):
            chosen = -1
        index.append(chosen)
    return torch.tensor(index)


@pytest.mark.parametrize("n, m", [(200, 5), (7, 0), (0, 3), (0, 0)])
def test_targets_equal_a_slow_loop(n, m):
    positions, strides = grid(128)
    boxes = torch.cat([random_boxes(n, size=128), random_boxes(n // 4, seed=3, size=2000)]).float()
    boxes[n:, :2] %= 128
    ignored = random_boxes(m, seed=5, size=128, least=20).float()
    index = ed.assign(positions, strides, boxes, ignored)
    assert torch.equal(index, slow_assign(positions, strides, boxes, ignored))
    assert n < 200 or {*strides[index >= 0].tolist()} == {*strides.tolist()}


def test_decoding_undoes_targets():
    boxes = random_boxes(500, least=5).float()
    positions = boxes[:, :2] + torch.rand(500, 2) * boxes[:, 3:4] / 3
    strides = torch.tensor([8.0, 16, 32, 64, 128]).repeat(100)
    sides, _ = ed.distances(positions, boxes)
    assert (sides > 0).all()
    angle = torch.stack([(2 * boxes[:, 4]).sin(), (2 * boxes[:, 4]).cos()], 1)
    raw = torch.cat([(sides / strides[:, None]).log(), torch.zeros(500, 1), 3 * angle], 1)
    for box, other in zip(boxes, ed.canonical(ed.decode(raw, positions, strides)), strict=True):
        assert iou(polygon(box), polygon(other)) > 0.999


def gaussian(box):
    x, y, w, h, angle = box.double()
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return torch.stack([x, y]), turn @ torch.diag(torch.stack([w, h]) ** 2 / 4) @ turn.T


def test_kld_is_that_of_gaussians():
    for box, truth in zip(random_boxes(200), random_boxes(200, seed=1), strict=True):
        distributions = [torch.distributions.MultivariateNormal(*gaussian(x)) for x in (box, truth)]
        D = 2 * torch.distributions.kl_divergence(*distributions)
        loss = ed.kld_loss(box[None], truth[None])[0]
        torch.testing.assert_close(loss, 1 - 1 / (1 + (1 + D).log()))
    same = random_boxes(50)
    turned = torch.stack([*same.T[:2], same[:, 3], same[:, 2], same[:, 4] + math.pi / 2], 1)
    assert ed.kld_loss(same, same).max() < 1e-5 and ed.kld_loss(same, turned).max() < 1e-5
    slivers = torch.tensor([[0.0, 0, 1e-9, 500, 1], [900, 0, 500, 0, 0]], requires_grad=True)
    ed.kld_loss(slivers, slivers.flip(0).detach()).sum().backward()
    assert slivers.grad.isfinite().all()


def test_the_angle_term_turns_what_kld_leaves():
    """A square prediction on a long box: KLD has no gradient for its angle, the angle term has."""
    truth = torch.tensor([[0.0, 0, 40, 10, 0.5]])
    gradients = []
    for loss in (ed.kld_loss, ed.angle_loss):
        square = torch.tensor([[0.0, 0, 20, 20, 0]], requires_grad=True)
        gradients.append(torch.autograd.grad(loss(square, truth).sum(), square)[0][0, 4].item())
    assert abs(gradients[0]) < 1e-6 and gradients[1] < -0.1
    expected = (1 - 10 / 40) * (1 - math.cos(2 * 0.5))
    assert math.isclose(ed.angle_loss(square, truth).item(), expected, rel_tol=1e-5)


def test_giou_is_torchvisions():
    a, b = random_boxes(50), random_boxes(50, seed=1)
    a[:, 4] = b[:, 4] = 0
    xyxy = [torchvision.ops.box_convert(x[:, :4], "cxcywh", "xyxy") for x in (a, b)]
    expected = 1 - torchvision.ops.generalized_box_iou(*xyxy).diag()
    torch.testing.assert_close(ed.giou_loss(a, b), expected)


def slow_loss(outputs, targets):
    """The whole loss by loops, from the specification."""
    logits, raw, positions, strides = outputs
    oriented = raw.shape[2] == 7
    focal = boxes = centreness_loss = angle_term = positives = weights = 0
    for b, rows in enumerate(targets):
        kept = rows[rows[:, 5] >= 0]
        index = slow_assign(positions, strides, kept[:, :5], rows[rows[:, 5] == -1, :5])
        for p, n in enumerate(index.tolist()):
            if n == -1:
                continue
            for c, logit in enumerate(logits[b, p]):
                prob = logit.sigmoid()
                if n >= 0 and c == kept[n, 5]:
                    focal = focal - 0.25 * (1 - prob) ** 2 * prob.log()
                else:
                    focal = focal - 0.75 * prob**2 * (1 - prob).log()
            if n >= 0:
                sides, _ = ed.distances(positions[p], kept[n])
                left, top, right, bottom = sides.tolist()
                centre = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
                box = ed.decode(raw[b, p : p + 1], positions[p : p + 1], strides[p : p + 1])
                loss = ed.kld_loss if oriented else ed.giou_loss
                boxes = boxes + centre * loss(box, kept[n : n + 1, :5])[0]
                if oriented:
                    angle_term = angle_term + centre * ed.angle_loss(box, kept[n : n + 1, :5])[0]
                prob = raw[b, p, 4].sigmoid()
                centreness_loss = centreness_loss - centre * prob.log() - (1 - centre) * (1 - prob).log()
                positives, weights = positives + 1, weights + centre
    return (focal + centreness_loss) / max(1, positives) + (boxes + angle_term) / max(weights, 1e-6)


def random_case(oriented, B=3, seed=0):
    positions, strides = grid()
    generator = torch.Generator().manual_seed(seed)
    logits, raw = (torch.randn(B, len(strides), n, generator=generator) for n in (3, 7 if oriented else 5))
    targets = torch.full((B, 9, 6), -2.0)
    for b in range(B - 1):  # the last has no objects
        boxes = random_boxes(5 + b, seed=b, size=64, least=6).float()
        boxes[:, 4] *= oriented
        classes = torch.randint(-1, 3, (len(boxes), 1), generator=generator)
        targets[b, : len(boxes)] = torch.cat([boxes, classes], 1)
    return (logits.requires_grad_(), raw.requires_grad_(), positions, strides), targets


@pytest.mark.parametrize("oriented", [True, False])
def test_loss_equals_a_slow_loop(oriented):
    outputs, targets = random_case(oriented)
    loss, figures = ed.detection_loss(outputs, targets, ALONE)
    expected = slow_loss(outputs, targets)
    torch.testing.assert_close(loss, expected)
    ours, slow = (torch.autograd.grad(x, outputs[:2]) for x in (loss, expected))
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-4)
    assert figures["positives"] > 10 and (targets[..., 5] == -1).any()
    nothing, _ = ed.detection_loss(outputs, torch.full((3, 1, 6), -2.0), ALONE)
    nothing.backward()
    assert nothing > 0 and outputs[1].grad.abs().sum() == 0


def test_objects_without_a_position_are_counted():
    outputs, _ = random_case(True, B=1)
    targets = torch.tensor([[[32.0, 32, 40, 1, 0, 0], [20, 20, 30, 20, 0.3, 1]]])  # one lies between rows
    assert ed.detection_loss(outputs, targets, ALONE)[1]["unseen"] == 1


# ------------------------------------------------------------------ average precision


def slow_ap(found, samples, number, threshold):
    """One class, by VOC's rules, image by image and box by box."""
    detections = [(float(s), i, box) for i, (boxes, scores, labels) in enumerate(found)
                  for box, s, c in zip(boxes, scores, labels, strict=True) if c == number]
    truth = [[(polygon(b), bool(d)) for b, c, d in zip(s.boxes, s.labels, s.difficult, strict=True)
              if c == number] for s in samples]
    detections.sort(key=lambda x: -x[0])
    count, used, hits, misses, curve = sum(not d for t in truth for _, d in t), set(), 0, 0, []
    for _, i, box in detections:
        ious = [iou(polygon(box), other) for other, _ in truth[i]]
        best = max(range(len(ious)), key=ious.__getitem__) if ious else None
        if best is not None and ious[best] > threshold:
            if truth[i][best][1]:
                continue
            hits, misses = (hits + 1, misses) if (i, best) not in used else (hits, misses + 1)
            used.add((i, best))
        else:
            misses += 1
        curve.append((hits / count, hits / (hits + misses)))
    points = sum(max([p for r, p in curve if r >= t / 10 - 1e-9], default=0) for t in range(11)) / 11
    area = sum(max(p for r, p in curve if r >= k / count - 1e-9) for k in range(1, hits + 1)) / count
    return 100 * area, 100 * points, count


@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_a_slow_one(seed):
    found, samples, r = [], [], torch.Generator().manual_seed(seed)
    for image in range(4):
        boxes = random_boxes(12, seed=10 * seed + image, least=15).float()
        labels = torch.randint(0, 3, (12,), generator=r)
        difficult = torch.rand(12, generator=r) < 0.2
        samples.append(sample_of(boxes, (100, 100), labels=labels)._replace(difficult=difficult))
        shifted = boxes + torch.randn(12, 5, generator=r) * torch.tensor([2, 2, 3, 3, 0.1])
        guess = torch.cat([shifted, boxes[:5], random_boxes(5, seed=image).float()])
        names = torch.cat([labels, labels[:5], torch.randint(0, 4, (5,), generator=r)])
        order = torch.rand(22, generator=r).sort(descending=True)
        found.append((guess[order.indices], order.values, names[order.indices]))
    result = ed.evaluate(dict(enumerate(found)), samples, ["a", "b", "c", "never"], oriented=True)
    assert list(result["per_class"]) == ["a", "b", "c"]  # no box of the fourth
    for number, row in enumerate(result["per_class"].values()):
        area, points, count = slow_ap(found, samples, number, 0.5)
        assert (row["boxes"], row["ap50"]) == (count, pytest.approx(area, abs=1e-3))
        assert row["ap50_eleven_points"] == pytest.approx(points, abs=1e-3)
        assert row["ap75"] == pytest.approx(slow_ap(found, samples, number, 0.75)[0], abs=1e-3)
    means = np.mean([row["ap50"] for row in result["per_class"].values()])
    assert result["ap50"] == pytest.approx(means, abs=1e-3)
    assert 20 < result["ap50"] < 95


def test_ap_of_an_example_by_hand():
    """Found, found again, difficult, wrong place, found; one missed: recall 1/3, 1/3, 1/3, 2/3."""
    places = torch.tensor([[20.0, 20], [60, 20], [20, 60], [60, 60]])
    truth = torch.cat([places, torch.tensor([[20.0, 10, 0]] * 4)], 1)
    sample = sample_of(truth, (100, 100))._replace(difficult=torch.tensor([False, True, False, False]))
    boxes = torch.stack([truth[0], truth[0], truth[1], truth[2] + torch.tensor([0, 30, 0, 0, 0]), truth[2]])
    found = [(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.zeros(5, dtype=torch.long))]
    result = ed.evaluate({0: found[0]}, [sample], ["a"], oriented=True)
    assert result["ap50"] == pytest.approx(100 * (1 + 2 / 4) / 3, abs=1e-3)
    assert result["ap50_eleven_points"] == pytest.approx(100 * (4 * 1 + 3 * 0.5) / 11, abs=1e-3)
    nothing = {0: tuple(x[:0] for x in found[0])}
    assert ed.evaluate(nothing, [sample], ["a"], oriented=True)["ap50"] == 0


# ------------------------------------------------------------------ the whole script


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Four images of 64 px with four boxes each, two long and two wide ones, in train/ and in val/."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    r = torch.Generator().manual_seed(0)
    for image in range(4):
        for kind in ("images", "labelTxt"):
            (folder / "train" / kind).mkdir(parents=True, exist_ok=True)
        places = torch.tensor([[17, 17], [47, 17], [17, 47], [47, 47.0]]) + 2 * torch.rand(4, 2, generator=r)
        sides = torch.tensor([[24.0, 10], [20, 15]] * 2)
        angles = math.pi * torch.rand(4, 1, generator=r)
        corners = ed.to_corners(torch.cat([places, sides, angles], 1)).tolist()
        picture = Image.fromarray(torch.randint(100, (64, 64, 3), generator=r, dtype=torch.uint8).numpy())
        lines = []
        for own, name, colour in zip(corners, ["long", "wide"] * 2, ["white", "red"] * 2, strict=True):
            ImageDraw.Draw(picture).polygon(list(map(tuple, own)), fill=colour)
            lines.append(" ".join(f"{x:.2f}" for x in sum(own, [])) + f" {name} 0\n")
        picture.save(folder / f"train/images/{image}.png")
        (folder / f"train/labelTxt/{image}.txt").write_text("".join(lines))
    shutil.copytree(folder / "train", folder / "val")
    return folder


@pytest.fixture
def detect(run):
    """Runs the script in this process; returns the lines of results.jsonl."""

    def main(data, out, *flags):
        run("eval_detection", "--data_path", data, "--output_dir", out, *SMALL, *flags)
        lines = (out / "results.jsonl").read_text().splitlines() if (out / "results.jsonl").exists() else []
        return [json.loads(line) for line in lines]

    return main


def read_boxes(path, oriented):
    """Boxes, classes and last words of a text of DOTA."""
    lines = path.read_text().splitlines()
    corners, names, _ = zip(*(ed.parse_label(line, False, (64, 64)) for line in lines), strict=True)
    boxes = ed.to_boxes(torch.tensor(np.array(corners)), oriented)
    return boxes, np.array(names), np.array([line.split()[-1] for line in lines], float)


@pytest.mark.parametrize("boxes", ["oriented", "horizontal"])
def test_four_images_are_learned(drawn, detect, run, tmp_path, boxes):
    """The test that the whole is right: labels, windows, targets, losses, decoding, merging and AP."""
    flags = "--epochs 150 --lr 1e-2 --backbone_lr 1e-2 --weight_decay 0 --boxes".split()
    (result,) = detect(drawn, tmp_path, *flags, boxes)
    assert result["ap50"] > 95 and result["ap50_eleven_points"] > 95
    assert result["boxes"] == boxes and ("ap50_95" in result) == (boxes == "horizontal")
    assert Image.open(tmp_path / "examples.png").size == (2 * 802 + 2, 4 * 802 + 2)
    # New images: the text of each can be read as labels, and holds what the true labels hold.
    flags = ["--predict", drawn / "val/images", "--weights", tmp_path, "--output_dir", tmp_path]
    run("eval_detection", *flags, "--num_workers", 0, "--device", "cpu", "--amp", "off")
    lost, doubled, count = 0, 0, 0
    for file in sorted((drawn / "val/labelTxt").iterdir()):
        truth, names, _ = read_boxes(file, boxes == "oriented")
        guess, guessed, scores = read_boxes(tmp_path / "predictions" / file.name, boxes == "oriented")
        assert (scores > 0.05).all() and (np.diff(scores) <= 0).all()
        overlap = ed.iou_matrix(truth, guess) > 0.5
        same = names[:, None] == guessed
        lost, count = lost + (~(overlap & same).any(1)).sum(), count + len(truth)
        doubled += ((overlap & same & (scores > 0.3)).sum(1) > 1).sum()
    assert lost <= 0.05 * count and doubled == 0


@pytest.mark.parametrize("finetune", [True, False])
def test_frozen_means_frozen(drawn, detect, tmp_path, finetune):
    """A pre-trained backbone keeps its BatchNorm statistics, frozen its weights too; untrained ones learn."""
    torch.manual_seed(5)
    source = common.build_backbone("test_resnet", 64)
    common.export_backbone(source, tmp_path / "source", common.IMAGENET_MEAN, common.IMAGENET_STD)
    flag, names = "--finetune" if finetune else "--no-finetune", ["random", str(tmp_path / "source")]
    lines = detect(drawn, tmp_path / "out", flag, "--weights", *names)
    assert [line["weights"] for line in lines] == names
    torch.manual_seed(0)
    for name, before in zip(names, (common.build_backbone("test_resnet", 64), source), strict=True):
        after, _ = common.read_weights(str(tmp_path / "out" / ed.folder_name(name)))
        same = {key: torch.equal(x, after[key]) for key, x in before.state_dict().items()}
        weights = [same[key] for key, _ in before.named_parameters()]
        statistics = [equal for key, equal in same.items() if key.endswith(("running_mean", "running_var"))]
        assert all(weights) != finetune and any(weights) != finetune
        assert all(statistics) == (before is source or not finetune)


SGD = "--optimizer sgd --lr .005 --schedule 1 --save_every 1 --accum_steps 2 --batch_size_per_gpu 2"
ARCHS = [("test_vit", ""), ("test_vit", "--p2 --patch_size 8"), ("test_convnext", "--amp bf16")]
ARCHS += [("test_resnet", SGD), ("swin_tiny_patch4_window7_224", "--max_steps 1")]


@pytest.mark.parametrize("arch, flags", ARCHS)
def test_archs_and_recipes_run(drawn, detect, tmp_path, arch, flags):
    lines = detect(drawn, tmp_path, "--arch", arch, *flags.split())
    assert len(lines) == ("--max_steps" not in flags)
    log = read_log(tmp_path)[1:]
    assert all(math.isfinite(line["loss"]) for line in log)
    if "--schedule" in flags:
        assert [line["lr"] for line in log] == [0.005, 0.0005]


def test_an_arch_without_a_pyramid_is_refused(drawn, detect, tmp_path, capsys):
    with pytest.raises(SystemExit):
        detect(drawn, tmp_path, "--arch", "mixer_s32_224")
    assert "timm gives no maps at strides 4, 8, 16, 32" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npy", "tif", "names"])
def test_any_bands(drawn, detect, run, tmp_path, kind):
    """Floats of five bands, tiles of 16-bit ones, and a file for each band."""
    flags = {"npy": ["--in_chans", 5], "tif": ["--bands", 4, 1], "names": ["--bands", "B1", "B2"]}[kind]
    for part in ("train", "val"):
        images = tmp_path / "data" / part / "images"
        shutil.copytree(drawn / part / "labelTxt", tmp_path / "data" / part / "labelTxt")
        images.mkdir()
        for image in sorted((drawn / part / "images").iterdir()):
            pixels = np.asarray(Image.open(image))[..., [0, 1, 2, 0, 1]]
            if kind == "npy":
                np.save(images / f"{image.stem}.npy", pixels / np.float32(100) - 1)
            elif kind == "tif":
                tifffile.imwrite(images / f"{image.stem}.tif", pixels * np.uint16(99), tile=(16, 16))
            else:
                (images / image.stem).mkdir()
                for band in (1, 2):
                    Image.fromarray(pixels[..., band]).save(images / image.stem / f"x_B{band}.png")
    (result,) = detect(tmp_path / "data", tmp_path / "out", *flags)
    C = 5 if kind == "npy" else 2
    state, info = common.read_weights(str(tmp_path / "out"))
    assert result["in_chans"] == C == len(info["mean"]) and state["conv1.0.weight"].shape[1] == C
    if kind == "names":
        bands = [np.asarray(Image.open(path))[..., 1:] for path in (drawn / "train/images").iterdir()]
        assert info["mean"] == pytest.approx(np.stack(bands).mean((0, 1, 2)) / 255, rel=1e-3)
    run("eval_detection", "--predict", tmp_path / "data/val/images", "--weights", tmp_path / "out",
        "--output_dir", tmp_path / "new", "--num_workers", 0, "--device", "cpu")  # fmt: skip
    texts = {path.name for path in (tmp_path / "new/predictions").iterdir()}
    assert texts == {path.name for path in (drawn / "val/labelTxt").iterdir()}


def test_windows_read_only_what_they_show(tmp_path, monkeypatch):
    """A scene whose upper half holds no valid pixel: windows lie in the lower, and are not decoded whole."""
    path = str(tmp_path / "a.tif")
    scene = np.random.default_rng(0).integers(1, 255, (256, 256, 3), np.uint8)
    scene[:128] = 0
    tags = [(42113, "s", 0, "0", True)]
    tifffile.imwrite(path, scene, tile=(64, 64), compression="deflate", photometric="rgb", extratags=tags)
    sizes, read = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda *args: sizes.append(args[3][2:]) or read(*args))
    windows = ed.BoxWindows([sample_of(torch.zeros(0, 5), (256, 256), path)], 32, [0.0] * 3, True, seed=0)
    colours = {tuple(x) for x in scene[128:].reshape(-1, 3).tolist()}
    for index in range(20):
        window, targets = windows[0, index]
        assert targets.shape == (0, 6)
        own = set(map(tuple, window.flatten(1).T.tolist()))
        assert len(own & colours) > 30
    assert set(sizes) == {(32, 32)} and len(sizes) > 20
    with pytest.raises(common.UnreadableImageError, match="uint8 among torch.float32"):
        ed.BoxWindows(windows.samples, 32, [0.0] * 3, True, 0, torch.float32)[0, 0]


def test_a_run_stopped_by_a_signal_resumes_as_if_it_had_not(drawn, detect, tmp_path, monkeypatch, capsys):
    detect(drawn, tmp_path / "whole", "--epochs", 4)
    original, calls = ed.BoxWindows.__getitem__, []

    def interrupted(self, key):
        calls.append(key)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, key)

    monkeypatch.setattr(ed.BoxWindows, "__getitem__", interrupted)
    assert detect(drawn, tmp_path / "parts", "--epochs", 4) == []
    assert capsys.readouterr().out.count("the same command resumes") == 1 and 8 < len(calls) < 16
    (line,) = detect(drawn, tmp_path / "parts", "--epochs", 4)
    assert line["ap50"] >= 0
    assert_same_state(*(torch.load(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts")))


def test_a_run_is_not_resumed_with_other_weights(drawn, detect, tmp_path, capsys):
    for seed in (1, 2):
        torch.manual_seed(seed)
        source = common.build_backbone("test_resnet", 64)
        common.export_backbone(source, tmp_path / "source", common.IMAGENET_MEAN, common.IMAGENET_STD)
        if seed == 1:
            detect(drawn, tmp_path / "out", "--weights", tmp_path / "source", "--max_steps", 1)
    with pytest.raises(SystemExit):
        detect(drawn, tmp_path / "out", "--weights", tmp_path / "source")
    assert "other settings: weights_digest was" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_classes(drawn, detect, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / "data")
    for names in ("long\nwide\n", "wide\nlong\n"):
        (tmp_path / "data" / "classes.txt").write_text(names)
        with pytest.raises(SystemExit) if names[0] == "w" else contextlib.nullcontext():
            detect(tmp_path / "data", tmp_path / "out", "--max_steps", 1)
    assert "other settings: classes was ['long', 'wide'], is ['wide', 'long']" in capsys.readouterr().err


def test_two_processes_equal_one_on_the_joint_batch(drawn, tmp_path):
    """A ViT, which has no BatchNorm; weights and figures."""
    states = []
    for processes in (1, 2):
        flags = [*SMALL, "--arch", "test_vit", "--batch_size_per_gpu", 4 // processes]
        out = tmp_path / str(processes)
        words = ["--data_path", drawn, "--output_dir", out, *flags]
        Start(tmp_path / f"log{processes}", "eval_detection", *words, processes=processes).finish()
        line = json.loads((out / "results.jsonl").read_text())
        states.append((torch.load(out / "detector.pth")["head"], line))
    (one, line), (two, other) = states
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, atol=2e-4, rtol=1e-3)
    assert line["ap50"] == pytest.approx(other["ap50"], abs=0.5)


# ------------------------------------------------------------------ labels and flags


GOOD = "10 10 30 10 30 20 10 20 car 0\n"


def write_labels(root, train, val, yolo=False, size=(64, 64)):
    """Two images in each of train/ and val/, the second without labels: no objects."""
    for part, text in (("train", train), ("val", val)):
        images, labels = root / part / "images", root / part / ("labels" if yolo else "labelTxt")
        if yolo:  # YOLO's own layout
            images, labels = root / "images" / part, root / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for name in "ab":
            Image.new("RGB", size).save(images / f"{name}.png")
        (labels / "a.txt").write_text(text)


def load(root):
    args = argparse.Namespace(data_path=str(root), output_dir=None, in_chans=3, bands=None, boxes="auto",
                              img_size=64)
    parts = [ed.find_part(args, "train"), ed.find_part(args, "val", "test")]
    return *ed.load_data(parts, args), args.boxes


@pytest.mark.parametrize(
    "train, val, words",
    [
        ("10 10 30 10 30 20 car 0\n", GOOD, "line 1: 8 words, not x1 y1"),
        (GOOD + "10 10 30 10 30 20 10 x car 0\n", GOOD, "line 2: could not convert string to float: 'x'"),
        ("10 10 30 10 30 20 10 nan car 0\n", GOOD, "a million pixels away"),
        (GOOD, "-1e39 0 1e39 0 1e39 20 -1e39 20 car 0\n", "val/labelTxt/a.txt, line 1: a corner a million"),
        (GOOD, GOOD.replace(" 0\n", " 1\n"), "has no box that is not difficult"),
        (GOOD, GOOD.replace("car", "bus"), "unknown classes, which train/ lacks (list them in classes.txt)"),
        ("", GOOD, "has no box that is not difficult"),
        (GOOD.replace("0", "900"), GOOD, "has no box that is not difficult"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, detect, capsys, train, val, words):
    write_labels(tmp_path, train, val)
    with pytest.raises(SystemExit):
        detect(tmp_path, tmp_path / "out")
    error = capsys.readouterr().err
    assert words in error and error.splitlines()[-1].startswith("error: --data_path")


def test_yolo_labels(tmp_path):
    for folder, text in (("a", "2 .5 .5 .2 .4\n"), ("b", "3 .1 .5 .2 .4 .3 .6 .2 .7\n")):
        write_labels(tmp_path / folder, text, text, yolo=True, size=(200, 100))
    (tmp_path / "a/classes.txt").write_text("plane\nship\nsmall vehicle\n")
    (image, empty), _, classes, boxes = load(tmp_path / "a")
    assert classes == ["plane", "ship", "small-vehicle"] and boxes == "horizontal"  # as DOTA writes it
    assert image.labels.tolist() == [2] and not len(empty.labels) and image.size == (100, 200)
    torch.testing.assert_close(image.boxes, torch.tensor([[100.0, 50, 40, 40, 0]]))
    (image, _), _, classes, boxes = load(tmp_path / "b")
    assert classes == ["0", "1", "2", "3"] and boxes == "oriented"
    expected = shapely.Polygon([(20, 50), (40, 40), (60, 60), (40, 70)]).minimum_rotated_rectangle
    assert polygon(image.boxes[0]).symmetric_difference(expected).area < 0.1


@pytest.mark.parametrize(
    "text, words",
    [
        ("0 .5 .5 -.2 .4", "line 1: a box of size -0.2 x 0.4"),
        ("0 .5 .5 .2", "line 1: 4 words, not class cx cy w h"),
        ("7 .5 .5 .2 .4", "lacks: 7"),
        ("-1 .5 .5 .2 .4", "-1: not a class number from 0 to 9999"),
        ("99999 .5 .5 .2 .4", "99999: not a class number from 0 to 9999"),
        ("0 .5 .5 1e308 .2", "a million pixels away"),
    ],
)
def test_bad_yolo_labels(tmp_path, capsys, text, words):
    write_labels(tmp_path, text, text, yolo=True)
    (tmp_path / "classes.txt").write_text("plane\n")
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("names, words", [(b"plane\nplane\n", "class twice"), (b"\xff", "cannot be read")])
def test_bad_names_of_classes(tmp_path, capsys, names, words):
    write_labels(tmp_path, GOOD, GOOD)
    (tmp_path / "classes.txt").write_bytes(names)
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert words in capsys.readouterr().err


def test_labels_and_images_that_do_not_belong_together(tmp_path, capsys):
    write_labels(tmp_path, "\ufeff0 .5 .5 .2 .4\n", "0 .5 .5 .2 .4\n", yolo=True)
    (tmp_path / "labels/train/b.txt").symlink_to("nowhere")
    (tmp_path / "labels/train/c.txt").write_text("0 .5 .5 .2 .4\n")
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "b.txt: cannot be read" in capsys.readouterr().err
    (tmp_path / "labels/train/b.txt").unlink()
    (image, _), _, classes, _ = load(tmp_path)  # with a mark of the byte order
    assert classes == ["0"] and len(image.labels) == 1
    assert "1 labels without an image, left out" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(tmp_path / "images/train/a.jpg")
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "another image share the labels" in capsys.readouterr().err


def test_what_a_saved_detector_may_not_do(tmp_path, detect, run, drawn, capsys):
    """Its flags are those of the network alone; anything else that is wrong with it is one line."""
    detect(drawn, tmp_path / "out", "--epochs", 1)
    saved = torch.load(tmp_path / "out/detector.pth")
    predict = ["--predict", drawn / "val/images", "--weights", tmp_path / "out", "--device", "cpu"]
    predict += ["--output_dir", tmp_path / "new"]
    saved["args"]["output_dir"] = str(tmp_path / "elsewhere")
    torch.save(saved, tmp_path / "out/detector.pth")
    run("eval_detection", *predict)
    assert len(list((tmp_path / "new/predictions").iterdir())) == 4 and not (tmp_path / "elsewhere").exists()
    for bad in ({"head": {}}, {"args": None}, {"classes": ["one"]}):
        torch.save(saved | bad, tmp_path / "out/detector.pth")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run("eval_detection", *predict)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "detector.pth: not as a run of this script leaves it" in error
        assert len(error.splitlines()) == 1


def test_the_demo_draws_objects_where_its_labels_say(tmp_path):
    """Where a box lies pixels differ from those beside it; four images in five are for training."""
    write_detection(tmp_path / "demo", 10, 128, seed=0)
    train, val, classes, boxes = load(tmp_path / "demo")
    assert (len(train), len(val), boxes) == (8, 2, "oriented") and {"car", "plane"} <= set(classes)
    differences = []
    for sample in train:
        image = common.read_image(sample.path).float()
        assert (sample.boxes[:, :2] > 0).all() and (sample.boxes[:, :2] < 128).all()
        for corners in ed.to_corners(sample.boxes * torch.tensor([1, 1, 2.0, 2.0, 1])):
            x, y = corners.clamp(0, 127).long().unbind(1)
            centre = image[:, int(corners[:, 1].mean()), int(corners[:, 0].mean())]
            differences.append((image[:, y, x].mean(1) - centre).abs().max())
    assert len(differences) > 40 and torch.stack(differences).median() > 20


def test_dota_labels(tmp_path, capsys):
    """Header lines, corners in any order, difficult boxes; what lies outside is said and left out."""
    text = "imagesource:GoogleEarth\ngsd:0.146\n30 10 10 20 10 10 30 20 car 1\n" + GOOD
    write_labels(tmp_path, text + "70 10 90 10 90 20 70 20 car 0\n10 10 20 20 30 30 40 40 car 0\n", text)
    (image, _), _, classes, boxes = load(tmp_path)
    assert classes == ["car"] and image.difficult.tolist() == [True, False] and boxes == "horizontal"
    torch.testing.assert_close(image.boxes, torch.tensor([[20.0, 15, 20, 10, 0]] * 2))
    assert "2 boxes outside their images or without area, left out" in capsys.readouterr().err


def test_unreadable_images_are_left_out_up_to_one_percent(tmp_path, capsys):
    write_labels(tmp_path, GOOD, GOOD)
    (tmp_path / "train/images/c.png").write_text("no image")
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "1 of 3 images are unreadable, more than 1 %" in capsys.readouterr().err
    for i in range(98):
        os.link(tmp_path / "train/images/b.png", tmp_path / f"train/images/b{i}.png")
    assert len(load(tmp_path)[0]) == 100
    assert "warning: 1 unreadable images, left out" in capsys.readouterr().err


def test_labels_in_two_formats_are_refused(tmp_path, capsys):
    write_labels(tmp_path, GOOD, "0 .5 .5 .2 .4\n")
    (tmp_path / "val/labelTxt").rename(tmp_path / "val/labels")
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "train/ and val/ have labels in two formats" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--data_path or --predict"),
        ("--data_path x --fpn_dim 32", "--fpn_dim 32: must be a multiple of 32, at least 64"),
        ("--data_path x --fpn_dim 80", "--fpn_dim 80: must be a multiple of 32, at least 64"),
        ("--predict x --weights a b", "one at a time"),
        ("--predict x --img_size 64", "--img_size: not with --predict"),
        ("--data_path x --schedule 12", "less than --epochs 12"),
        ("--data_path x --weights a a", "two of them would share a folder"),
        ("--data_path x --no-finetune --backbone_lr 1", "--backbone_lr 1.0: not with --no-finetune"),
    ],
)
def test_flags_that_contradict_each_other(capsys, flags, words):
    args = ed.get_parser().parse_args(["--weights", "random", "--output_dir", "o", *flags.split()])
    with pytest.raises(SystemExit):
        ed.check_args(args)
    assert words in capsys.readouterr().err

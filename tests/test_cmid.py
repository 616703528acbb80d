import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import assert_same, assert_same_colours, tiny, torchvision_jitter
from PIL import Image
from torchvision.utils import save_image

import cmid
import common
from cmid import LocalHead, Memory, PairDataset
from common import Process

ALONE = Process(0, 1, torch.device("cpu"), None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def unit(*shape, seed=0):
    return F.normalize(rand(*shape, seed=seed), dim=-1)


def block_mask(B=3, blocks=4, side=16):
    return cmid.enlarge(cmid.draw_masks(B, blocks, 0.6, generator()), side)


def make_args(*flags):
    """Parsed and checked."""
    flags = ["--data_path", "x", "--output_dir", "x", *tiny("cmid", *flags)]
    args = cmid.get_parser().parse_args([*map(str, flags)])
    cmid.check_args(args)
    common.check_bands(args)
    args.mean, args.std = cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD  # as load_samples does
    return args


# ------------------------------------------------------------------ losses


def test_focal_l1_is_a_mean_over_masked_pixels():
    prediction, image, mask = rand(3, 3, 16, 16), rand(3, 3, 16, 16, seed=1), block_mask()
    total, masked = 0.0, 0
    for b, i, j in np.ndindex(3, 16, 16):
        if mask[b, 0, i, j]:
            masked += 1  # a pixel counts once, not once per channel
            for c in range(3):
                d = abs((prediction - image)[b, c, i, j].item())
                total += d * (2 / (1 + math.exp(-0.2 * d)) - 1)
    expected = total / (masked + 1e-5) / 3
    assert cmid.focal_l1(prediction, image, mask).item() == pytest.approx(expected, rel=1e-4)


def naive_focal_frequency(prediction, image, mask):
    """With a discrete Fourier transform by its own formula, in double precision."""
    B, _, H, W = prediction.shape
    w = np.where(mask.numpy() > 0, 1.0, 0.001)
    r, x = prediction.detach().double().numpy(), image.double().numpy()
    r = r * w + (0.5 * r + 0.5 * x) * (1 - w)
    rows = np.exp(-2j * np.pi * np.outer(np.arange(H), np.arange(H)) / H) / math.sqrt(H)
    columns = np.exp(-2j * np.pi * np.outer(np.arange(W), np.arange(W)) / W) / math.sqrt(W)
    mean_r = sum(rows @ r[b] @ columns for b in range(B)) / B
    mean_x = sum(rows @ x[b] @ columns for b in range(B)) / B
    distance = np.abs(mean_r - mean_x) ** 2
    weight = np.log(np.sqrt(distance) + 1)
    weight = np.clip(weight / weight.max(), 0, 1)
    return (weight * distance).mean()


def test_focal_frequency_loss():
    prediction, image, mask = rand(3, 3, 16, 12), rand(3, 3, 16, 12, seed=1), block_mask()[..., :12]
    expected = naive_focal_frequency(prediction, image, mask)
    assert cmid.focal_frequency(prediction, image, mask).item() == pytest.approx(expected, rel=1e-4)
    assert cmid.focal_frequency(image, image, mask) == 0  # no division by a greatest weight of 0


def test_focal_frequency_gradient_nearly_spares_what_is_not_masked():
    prediction, image, mask = rand(2, 3, 16, 16).requires_grad_(), rand(2, 3, 16, 16, seed=1), block_mask(2)
    (grad,) = torch.autograd.grad(cmid.focal_frequency(prediction, image, mask), prediction)
    outside, inside = (grad.abs()[(mask == value).expand_as(grad)].mean() for value in (0, 1))
    assert outside / inside == pytest.approx(0.001, rel=0.5)
    # The weights have no gradient: with them held fixed the loss is a plain quadratic.
    w = torch.where(mask > 0, 1.0, 0.001)
    blended = prediction * w + (0.5 * prediction.detach() + 0.5 * image) * (1 - w)
    distance = torch.fft.fft2(blended.mean(0) - image.mean(0), norm="ortho").abs() ** 2
    weight = (distance.detach().sqrt() + 1).log()
    (expected,) = torch.autograd.grad((weight / weight.max() * distance).mean(), prediction)
    torch.testing.assert_close(grad, expected, atol=1e-7, rtol=1e-4)


def test_reconstruction_is_the_sum_in_float32_under_autocast():
    prediction, image, mask = rand(3, 3, 16, 16).bfloat16(), rand(3, 3, 16, 16, seed=1), block_mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cmid.reconstruction_loss(prediction, image, mask)
    exact = prediction.float()
    expected = cmid.focal_l1(exact, image, mask).item() + naive_focal_frequency(exact, image, mask)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-4)


def test_global_loss_is_infonce():
    q, k, queue = unit(4, 6), unit(4, 6, seed=1), unit(9, 6, seed=2).T
    total = 0.0
    for b in range(4):
        positive = math.exp((q[b] @ k[b]).item() / 0.2)
        negatives = sum(math.exp((q[b] @ queue[:, n]).item() / 0.2) for n in range(9))
        total += -math.log(positive / (positive + negatives)) / 4
    assert cmid.global_loss(q, k, queue, 0.2).item() == pytest.approx(total, rel=1e-5)


def test_local_loss_is_a_cross_entropy_with_a_centred_target():
    online, branch, center = rand(2, 3, 7), rand(2, 3, 7, seed=1), rand(7, seed=2)
    total = 0.0
    for b, n in np.ndindex(2, 3):
        P = [math.exp((branch[b, n, k] - center[k]) / 0.05) for k in range(7)]
        Q = [math.exp(online[b, n, k] / 0.1) for k in range(7)]
        total += -sum(P[k] / sum(P) * math.log(Q[k] / sum(Q)) for k in range(7)) / 6
    assert cmid.local_loss(online, branch, center, 0.1, 0.05).item() == pytest.approx(total, rel=1e-4)


def test_queue_starts_as_unit_noise_and_wraps():
    memory = Memory(10, 4)
    torch.testing.assert_close(memory.queue.norm(dim=0), torch.ones(10))
    expected, pointer = memory.queue.clone(), 0
    for step in range(4):
        memory.enqueue(unit(4, 256, seed=step))
        for key in unit(4, 256, seed=step):
            expected[:, pointer % 10] = key
            pointer += 1
    assert torch.equal(memory.queue, expected) and memory.queue_ptr == 6


def test_batch_top1_counts_the_queries_that_find_their_own_key():
    k = torch.eye(5)
    assert cmid.batch_top1(k[[0, 1, 3, 2, 4]], k).item() == pytest.approx(60)  # two look for the other's


# ------------------------------------------------------------------ masks and matches


@pytest.mark.parametrize(
    "side, ratio, count", [(7, 0.6, 30), (4, 0.6, 10), (2, 0.5, 2), (10, 0.55, 55), (5, 0.0, 0), (3, 1.0, 9)])
def test_masks_have_the_right_number_of_blocks_and_differ(side, ratio, count):
    masks = cmid.draw_masks(20, side, ratio, generator())
    assert masks.shape == (20, side, side) and (masks.sum((1, 2)) == count).all()
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    if 0 < count < side**2 and side > 2:
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10
        assert ((masks.mean(0) > 0) & (masks.mean(0) < 1)).all()  # every block now and then
    assert torch.equal(masks, cmid.draw_masks(20, side, ratio, generator()))


def test_masks_lie_on_the_grid_of_blocks():
    blocks = cmid.draw_masks(3, 4, 0.6, generator())
    mask = cmid.enlarge(blocks, 32)
    assert mask.shape == (3, 1, 32, 32)
    for b, i, j in np.ndindex(3, 32, 32):
        assert mask[b, 0, i, j] == blocks[b, i // 8, j // 8]


def random_geometry(B, seed, height=100, width=140):
    draws = torch.rand(B, 5, generator=generator(seed))
    h, w = (20 + draws[:, 2] * 70).floor(), (20 + draws[:, 3] * 100).floor()
    top, left = (draws[:, 0] * (height - h)).floor(), (draws[:, 1] * (width - w)).floor()
    return torch.stack([top, left, h, w, (draws[:, 4] < 0.5).float()], 1)


def naive_center(geometry, side, position):
    top, left, height, width, flipped = geometry.tolist()
    row, column = divmod(position, side)
    if flipped:
        column = side - 1 - column
    return top + (row + 0.5) * height / side, left + (column + 0.5) * width / side


@pytest.mark.parametrize("side, n", [(7, 20), (3, 4), (2, 4), (1, 1)])
def test_matches_are_the_nearest_pairs_by_brute_force(side, n):
    g1, g2 = random_geometry(30, 0), random_geometry(30, 1)
    positions, matches, distances = cmid.match_positions(g1, g2, side, n)
    for b in range(30):
        ours, other = ([naive_center(g[b], side, i) for i in range(side**2)] for g in (g1, g2))
        table = [[math.dist(center, another) for another in other] for center in ours]
        nearest = [min(row) for row in table]
        assert len(set(positions[b].tolist())) == n
        for i, j, distance in zip(*(x[b].tolist() for x in (positions, matches, distances)), strict=True):
            assert table[i][j] == pytest.approx(distance, abs=1e-3) == pytest.approx(nearest[i], abs=1e-3)
        assert sorted(distances[b].tolist()) == pytest.approx(sorted(nearest)[:n], abs=1e-3)


def test_positions_are_numbered_row_by_row():
    last_map = torch.arange(2 * 5 * 3 * 3.0).view(2, 5, 3, 3)
    positions = torch.tensor([[0, 5, 8], [4, 4, 1]])
    expected = [last_map[b, :, p // 3, p % 3] for b in range(2) for p in positions[b].tolist()]
    assert torch.equal(cmid.take_positions(last_map, positions), torch.stack(expected))


# ------------------------------------------------------------------ views


def test_geometry_tells_where_the_pixels_of_a_crop_come_from(tmp_path):
    """Red and green of the source are its columns and rows: what a crop's pixels say, the geometry says."""
    x, y = torch.arange(200).expand(160, 200), torch.arange(160).unsqueeze(1).expand(160, 200)
    image = torch.stack([x, y, torch.zeros(160, 200)], -1).byte()
    Image.fromarray(image.numpy()).save(tmp_path / "ramp.png")
    dataset, flips, areas = PairDataset(common.Samples([str(tmp_path / "ramp.png")]), 64, 0), [], []
    for epoch in range(100):
        crops, geometry = dataset[epoch, 0]
        assert crops.shape == (2, 3, 64, 64) and crops.dtype == torch.uint8 and geometry.shape == (2, 5)
        assert not torch.equal(*crops)
        for crop, centers, own in zip(crops, cmid.position_centers(geometry, 2), geometry, strict=True):
            flips.append(own[4].item())
            areas.append((own[2] * own[3]).item() / (160 * 200))
            for position in range(4):
                row, column = divmod(position, 2)
                cell = crop[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].float().mean((1, 2))
                # A pixel's value is its index, its centre half a pixel further.
                for center in (centers[position].tolist(), naive_center(own, 2, position)):
                    assert (cell[[1, 0]] + 0.5).tolist() == pytest.approx(center, abs=1)
    assert sum(flips) / 200 == pytest.approx(0.5, abs=0.1)
    assert 0.27 < min(areas) < 0.4 and 0.9 < max(areas) <= 1


def test_samples_depend_on_seed_epoch_and_index_alone(scenes):
    samples = common.Samples(common.list_images(scenes / "train"))
    dataset = PairDataset(samples, 32, 0)
    first = dataset[3, 5]
    torch.manual_seed(99)
    assert_same(dataset[3, 5], first)
    for other in (dataset[4, 5], PairDataset(samples, 32, 1)[3, 5], dataset[3, 6]):
        assert not torch.equal(other[1], first[1])


def test_first_view_keeps_its_colour_and_second_is_changed_image_by_image():
    """The same draws through torchvision's operations: jitter, blur, noise, solarize, grey."""
    N, seed, args = 100, 0, make_args()
    crops = torch.randint(256, (N, 2, 3, 24, 24), generator=generator()).byte()
    x1, x2 = cmid.color_views(crops, args, seed)
    expected = common.normalize(crops[:, 0].float() / 255, cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD,
                                torch.uint8)
    torch.testing.assert_close(x1, expected)

    draws = generator(seed)
    where, factors, order = common.draw_color_jitter((0.4, 0.4, 0.2, 0.1), torch.full((N,), 0.8), draws)
    sigma = torch.empty(N).uniform_(0.1, 2, generator=draws)
    variance = torch.empty(N).uniform_(10, 50, generator=draws)
    noisy, solarized, gray = (common.bernoulli(torch.full((N,), p), draws) for p in (0.6, 0.2, 0.2))
    noise = torch.randn(N, 3, 24, 24, generator=generator(common.stream_seed(seed, "noise")))
    for i in range(N):
        x = crops[i, 1].float() / 255
        if where[i]:
            x = torchvision_jitter(x, factors[i], order[i])
        x = TF.gaussian_blur(x, [13, 13], [sigma[i].item()] * 2)
        if noisy[i]:
            x = (255 * x + variance[i].sqrt() * noise[i]).clamp(0, 255) / 255
        if solarized[i]:
            x = TF.solarize(x, 128 / 255)
        if gray[i]:
            x = TF.rgb_to_grayscale(x, 3)
        assert_same_colours(x2[i], TF.normalize(x, cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD))
    assert (where & noisy & solarized & gray).any() and not (where | noisy | solarized | gray).all()


# ------------------------------------------------------------------ encoders


SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("arch, stage", [*(("resnet18", stage) for stage in range(4)), (SWIN, 0), (SWIN, 2),
                                         ("convnext_atto", 1), ("convnext_atto", 3)])
def test_encoders_run_the_backbone_and_add_the_token_where_masked(arch, stage):
    flags = ["--arch", arch, "--img_size", "64", "--mask_patch_size", "16", "--mask_stage", stage]
    online, branch = cmid.build_encoders(make_args(*flags), ALONE)
    online.eval(), branch.eval()
    images, blocks = rand(2, 3, 64, 64), cmid.draw_masks(2, 4, 0.6, generator())
    last_map, pooled = cmid.run_backbone(branch.backbone, images)
    torch.testing.assert_close(pooled, branch.backbone(images))
    assert last_map.shape == (2, branch.backbone.num_features, 2, 2) and not hasattr(branch, "mask_token")
    assert not any(p.requires_grad for p in branch.parameters()) and (online.mask_token == 0).all()
    stem, stages = cmid.stem_and_stages(online.backbone)
    with torch.no_grad():
        online.mask_token.copy_(rand(len(online.mask_token)))
        x = torch.nn.Sequential(*stem, *stages[:stage])(images)
        nhwc = arch.startswith("swin")
        side = x.shape[1 if nhwc else 2]
        for b, i, j in np.ndindex(2, side, side):
            if blocks[b, i * 4 // side, j * 4 // side]:
                at = x[b, i, j] if nhwc else x[b, :, i, j]
                at += online.mask_token
        expected = online.backbone.forward_head(torch.nn.Sequential(*stages[stage:])(x))
    ours = online(images, blocks, torch.zeros(2, 1, dtype=torch.long))[3]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["resnet50", "resnet101", "swin_small_patch4_window7_224", "convnext_tiny"])
def test_other_backbones_are_taken_apart_rightly(arch):
    backbone = common.build_backbone(arch, 64)
    D, _ = cmid.probe_backbone(backbone, make_args("--arch", arch, "--img_size", "64"))
    assert D == backbone.num_features and backbone.training


@pytest.mark.parametrize("use_bn", [False, True])
def test_local_head_is_a_stack_of_1x1_convolutions_and_a_cosine(use_bn):
    head, last_map = LocalHead(12, 20, use_bn), rand(2, 12, 3, 3)
    kinds = ["Linear", *["BatchNorm1d"] * use_bn, "GELU"] * 2 + ["Linear"]
    assert [type(layer).__name__ for layer in head.mlp] == kinds
    x = last_map
    for layer in head.mlp:
        if isinstance(layer, torch.nn.Linear):
            x = F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        elif isinstance(layer, torch.nn.BatchNorm1d):
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / (var + 1e-5).sqrt()
        else:
            x = F.gelu(x)
    weights = F.normalize(head.prototypes.parametrizations.weight.original1, dim=1)
    expected = torch.einsum("bchw,kc->bhwk", F.normalize(x, dim=1), weights).flatten(0, 2)
    ours = head(cmid.take_positions(last_map, torch.arange(9).expand(2, 9)))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    gain = head.prototypes.parametrizations.weight.original0
    assert (gain == 1).all() and not gain.requires_grad


def test_decoder_paints_the_32_x_32_pixels_of_each_position():
    online, _ = cmid.build_encoders(make_args("--img_size", "64", "--mask_patch_size", "16"), ALONE)
    last_map = rand(1, online.backbone.num_features, 2, 2)
    changed = last_map.clone()
    changed[0, :, 1, 0] += 1
    differs = (online.decoder(changed) != online.decoder(last_map)).any(1)[0]
    assert differs.shape == (64, 64) and differs[32:, :32].all() and differs.sum() == 32 * 32


# ------------------------------------------------------------------ training steps


# 4 images and 8 keys a step; no BatchNorm; 4 positions.
STEPS = """--arch test_convnext --img_size 64 --mask_patch_size 16 --local_dim 16 --moco_k 20 --epochs 2
    --lr .16 --min_lr .001 --momentum .9 --warmup_epochs 0 --warmup_teacher_temp_epochs 2 --weight_decay .1
    --loss_weights 1 .5 2 --max_steps 3 --log_every 1""".split()


def plain_views(crops, args, seed):
    return tuple(common.normalize(view / 255, args.mean, args.std, torch.uint8) for view in crops.unbind(1))


def fixed_masks(B, side, ratio, generator):
    return torch.eye(side).expand(B, side, side).contiguous()


def train_steps(out, data, *flags, process=ALONE):
    """Three steps of cmid.train, by SGD, without colour, one mask for all; checkpoint, lines of the log."""
    args = make_args(*STEPS, "--data_path", data, "--output_dir", out, *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmid, "color_views", plain_views)
        patch.setattr(cmid, "draw_masks", fixed_masks)
        patch.setattr(common, "build_optimizer", lambda model, args: torch.optim.SGD(
            common.param_groups(model), momentum=0.9, weight_decay=args.weight_decay))
        cmid.train(args, process)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.load(out / "checkpoint.pth", weights_only=True), [line for line in lines if "loss" in line]


def naive_micro_batch(samples, online, branch, memory, args):
    """One view, one image, one pair at a time: the three losses, keys, mean targets, figures of the log."""
    crops, geometry = (torch.stack(parts) for parts in zip(*samples, strict=True))
    B, blocks = len(crops), fixed_masks(len(crops), 4, 0.6, None)
    mask, x = cmid.enlarge(blocks, 64), plain_views(crops, args, 0)
    masked = [torch.stack([m * image.mean((1, 2), keepdim=True) + (1 - m) * image
                           for image, m in zip(view, mask, strict=True)]) for view in x]
    maps, pooled = zip(*(cmid.run_backbone(online.backbone, view, 0, blocks, online.mask_token)
                         for view in masked), strict=True)
    branch_maps, k = zip(*(branch(view) for view in x), strict=True)
    q = [F.normalize(online.projector(features), dim=1) for features in pooled]
    losses, means, distances, found, center = torch.zeros(3), [], [], 0, memory.center
    for v in range(2):
        prediction = online.decoder(maps[v])
        reconstruction = cmid.focal_l1(prediction, x[v], mask) + cmid.focal_frequency(prediction, x[v], mask)
        contrast = cmid.global_loss(q[v], k[1 - v], memory.queue, 0.2)
        positions, matches, apart = cmid.match_positions(geometry[:, v], geometry[:, 1 - v], 2, 2)
        local, targets = 0.0, []
        for b, n in np.ndindex(B, 2):
            i, j = positions[b, n].item(), matches[b, n].item()
            output = online.local_head(maps[v][b, :, i // 2, i % 2][None])
            targets.append(branch.local_head(branch_maps[1 - v][b, :, j // 2, j % 2][None]))
            P = ((targets[-1] - center) / 0.04).softmax(1)  # the first of two epochs of warm-up
            local = local - (P * (output / 0.1).log_softmax(1)).sum() / (2 * B)
        means.append(torch.cat(targets).mean(0))
        center = 0.9 * center + 0.1 * means[v]  # the second direction sees it moved
        losses = losses + torch.stack([reconstruction, contrast, local]) / 2
        found += sum((q[v][b] @ k[1 - v].T).argmax().item() == b for b in range(B))
        distances.append(apart)
    figures = [100 * found / (2 * B), torch.stack(distances).mean().item(),
               common.feature_std(torch.cat(pooled)).item()]
    return losses, torch.stack(k, 1).flatten(0, 1), torch.stack(means), torch.tensor(figures)


def naive_training(data, accum_steps):
    """Three steps from the specification, one parameter at a time; figures of each step."""
    args, samples = make_args(*STEPS), common.Samples(common.list_images(data))
    online, branch = cmid.build_encoders(args, ALONE)
    memory, start = Memory(20, 16), online.state_dict()
    branch.load_state_dict({name: start[name] for name in branch.state_dict()})
    trained = {name: p for name, p in online.named_parameters() if p.requires_grad}
    velocity = {name: torch.zeros_like(p) for name, p in trained.items()}
    dataset, figures = PairDataset(samples, 64, 0), []
    order = torch.randperm(len(samples), generator=common.generator(0, "order", 0)).tolist()
    for step in range(3):
        parts = []
        for first in range(4 * step, 4 * step + 4, 4 // accum_steps):
            samples = [dataset[0, index] for index in order[first : first + 4 // accum_steps]]
            parts.append(naive_micro_batch(samples, online, branch, memory, args))
        losses, _, means, others = (sum(x) / accum_steps for x in zip(*(
            (part[0], 0, part[2], part[3]) for part in parts), strict=True))
        loss = losses @ torch.tensor([1.0, 0.5, 2.0])
        figures.append([loss.item(), *losses.tolist(), *others.tolist()])
        online.zero_grad()
        loss.backward()
        cosine = 0.5 * (1 + math.cos(math.pi * step / 14))  # two epochs of seven steps
        lr, m = 0.001 + (0.01 - 0.001) * cosine, 1 - 0.1 * cosine  # .16 * 4 / 64
        with torch.no_grad():
            for name, p in trained.items():
                decay = 0.1 if p.ndim > 1 and not name.endswith("bias") else 0.0
                velocity[name] = 0.9 * velocity[name] + p.grad + decay * p
                p.sub_(lr * velocity[name])
            own = dict(online.named_parameters())
            for name, p in branch.named_parameters():
                p.copy_(m * p + (1 - m) * own[name])
            for mean in means:
                memory.center = 0.9 * memory.center + 0.1 * mean
            for n, key in enumerate(torch.cat([part[1] for part in parts])):
                memory.queue[:, (8 * step + n) % 20] = key
    return online.state_dict(), branch.state_dict(), memory, figures


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_steps_equal_plain_loops(scenes, tmp_path, accum_steps):
    """All losses and figures, centre between the directions, SGD, branch encoder, queue over its end."""
    flags = ["--accum_steps", accum_steps, "--batch_size_per_gpu", 4 // accum_steps]
    saved, lines = train_steps(tmp_path, scenes / "train", *flags)
    online, branch, memory, figures = naive_training(scenes / "train", accum_steps)
    names = "loss reconstruction global local batch_top1 match_distance feature_std".split()
    for line, expected in zip(lines, figures, strict=True):
        assert [line[name] for name in names] == pytest.approx(expected, rel=1e-3)
        assert line["teacher_temp"] == 0.04
    assert saved["memory"]["queue_ptr"] == 24 % 20 and memory.center.abs().max() > 0.01
    memory.queue_ptr.fill_(4)
    for ours, naive in (("online", online), ("branch", branch), ("memory", memory.state_dict())):
        assert saved[ours].keys() == naive.keys()
        for name, value in naive.items():
            torch.testing.assert_close(saved[ours][name], value, atol=2e-5, rtol=1e-3, msg=f"{ours} {name}")


def test_every_micro_batch_has_its_own_draws_and_pictures_show_them(train, tmp_path, monkeypatch):
    drawn = []

    def record(owner, name):
        calls, function = [], getattr(owner, name)

        def recorded(*args):
            calls.append((*args, function(*args)))
            return calls[-1][-1]

        monkeypatch.setattr(owner, name, recorded)
        return calls

    views, masks = record(cmid, "color_views"), record(cmid, "draw_masks")
    seen = record(cmid.OnlineEncoder, "forward")
    monkeypatch.setattr(common.Run, "draw", lambda run, name, rows, dtype: drawn.append((name, rows)))
    train(tmp_path, "--accum_steps", "2", "--max_steps", "3", "--log_every", "2", script="cmid")
    seeds = [common.stream_seed(0, "colour", step, micro, 0) for step in range(3) for micro in range(2)]
    assert [seed for _, _, seed, _ in views] == seeds
    assert len({blocks.numpy().tobytes() for *_, blocks in masks}) == 6
    assert all(blocks.shape == (8, 4, 4) for *_, blocks in masks)  # both views of four images
    assert [name for name, _ in drawn] == ["views.png", "reconstruction.png", "reconstruction.png"]
    assert_same(drawn[0][1], list(zip(*views[0][-1], strict=True)))
    _, masked, blocks, _, (prediction, *_) = seen[3]  # the last of the second step
    for b, (image, *others) in enumerate(drawn[1][1]):
        hidden = cmid.enlarge(blocks, 32)[b] == 1
        assert torch.equal(image, views[3][-1][0][b])
        assert_same(others, [masked[b], torch.where(hidden, prediction[b], image)])


def test_schedules():
    """The rate: a cosine over all 21 steps times a ramp over the first 7; tau_b rises epoch by epoch."""
    args = make_args("--lr", 0.16, "--min_lr", 0.001, "--warmup_teacher_temp_epochs", 2)
    run = SimpleNamespace(effective_batch=4, steps_per_epoch=7, total_steps=21)
    lr, momentum, temperature = zip(*(cmid.schedules(step, run, args) for step in range(21)), strict=True)
    falling = [0.001 + 0.009 * (1 + math.cos(math.pi * i / 21)) / 2 for i in range(21)]  # .16 * 4 / 64
    ramp = [1 - (1 - i / 7) * (1 - 0.01) for i in range(7)] + [1] * 14
    assert lr == pytest.approx([rate * share for rate, share in zip(falling, ramp, strict=True)])
    assert momentum == pytest.approx([1 - 0.002 * (1 + math.cos(math.pi * step / 21)) for step in range(21)])
    assert temperature == pytest.approx([0.04] * 7 + [0.07] * 14)


@pytest.mark.parametrize("epochs, rate, temperature", [(3, 0.3, 0), (40, 4, 10), (200, 10, 50)])
def test_warmups_are_short_in_short_runs(epochs, rate, temperature):
    args = cmid.get_parser().parse_args(["--data_path", "x", "--output_dir", "x", "--epochs", str(epochs)])
    cmid.check_args(args)
    assert (args.warmup_epochs, args.warmup_teacher_temp_epochs) == pytest.approx((rate, temperature))


# ------------------------------------------------------------------ whole runs


def test_optimizer_is_the_papers_and_both_encoders_can_be_evaluated(train, tmp_path):
    saved = train(tmp_path, "--max_steps", "2", script="cmid")
    groups = [(g["betas"], g["weight_decay"]) for g in saved["optimizer"]["param_groups"]]
    assert groups == [((0.98, 0.92, 0.99), 0.02), ((0.98, 0.92, 0.99), 0)]
    name = "layer1.0.conv1.weight"
    for key in ("online", "branch", None):
        state, info = common.read_weights(str(tmp_path / "checkpoint.pth"), key)
        expected = saved[key or "online"][f"backbone.{name}"]
        assert info["arch"] == "test_resnet" and torch.equal(state[name], expected)


def test_20_of_49_positions_are_matched(run, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        save_image(torch.rand(3, 224, 224), tmp_path / "data" / f"{i}.png")
    flags = ["--img_size", 224, "--batch_size_per_gpu", 2, "--moco_k", 4, "--max_steps", 1]
    run("cmid", "--data_path", tmp_path / "data", "--output_dir", tmp_path, *tiny("cmid", *flags))
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["num_matches"] == 20 and header["scaled_lr"] == pytest.approx(1e-3 * 2 / 64)
    assert header["chance_global"] == pytest.approx(math.log(5)) and header["chance_local"] == math.log(32)


def test_queue_holds_the_keys_of_a_step_and_not_much_more_than_the_images(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "a", "--moco_k", "7", script="cmid")
    assert "--moco_k 7: must be at least twice the effective batch, 8" in capsys.readouterr().err
    train(tmp_path / "b", "--moco_k", "30", "--max_steps", "1", script="cmid")
    assert "warning: --moco_k" not in capsys.readouterr().err
    train(tmp_path / "c", "--moco_k", "31", "--max_steps", "1", script="cmid")
    assert "warning: --moco_k 31: more keys than the 30 images" in capsys.readouterr().err


def test_a_batch_of_one_image_works(train, tmp_path):
    flags = ["--batch_size_per_gpu", "1", "--moco_k", "2", "--arch", "test_convnext", "--max_steps", "2"]
    assert train(tmp_path, *flags, script="cmid")["step"] == 2

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import (
    assert_same,
    assert_same_colours,
    assert_same_state,
    tiny,
    torchvision_jitter,
    warm_cosine,
)
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image

import cmid
import common
from cmid import Encoder, LocalHead, Memory, OnlineEncoder, PairDataset
from common import Process

ALONE = Process(0, 1, torch.device("cpu"), None)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(rand(*shape, seed=seed), dim=-1)


def block_mask(B=3, blocks=4, side=16):
    mask = cmid.draw_masks(B, blocks, 0.6, torch.Generator().manual_seed(0))
    return cmid.enlarge(mask, side)


# ------------------------------------------------------------------ losses


def test_focal_l1_is_a_mean_over_masked_pixels():
    prediction, image, mask = rand(3, 3, 16, 16), rand(3, 3, 16, 16, seed=1), block_mask()
    total, masked = 0.0, 0
    for b in range(3):
        for i in range(16):
            for j in range(16):
                if mask[b, 0, i, j]:
                    masked += 1  # a pixel counts once, not once per channel
                    for c in range(3):
                        d = abs((prediction - image)[b, c, i, j].item())
                        total += d * (2 / (1 + math.exp(-0.2 * d)) - 1)
    assert cmid.focal_l1(prediction, image, mask).item() == pytest.approx(
        total / (masked + 1e-5) / 3, rel=1e-4
    )


def naive_focal_frequency(prediction, image, mask):
    """With a discrete Fourier transform by its own formula, in double precision."""
    B, _, H, W = prediction.shape
    w = np.where(mask.numpy() > 0, 1.0, 0.001)
    r, x = prediction.detach().double().numpy(), image.double().numpy()
    r = r * w + (0.5 * r + 0.5 * x) * (1 - w)
    rows = np.exp(-2j * np.pi * np.outer(np.arange(H), np.arange(H)) / H) / math.sqrt(H)
    columns = np.exp(-2j * np.pi * np.outer(np.arange(W), np.arange(W)) / W) / math.sqrt(W)
    spectra = [sum(rows @ image_c @ columns for image_c in images) / B for images in zip(r, strict=True)]
    mean_r = sum(rows @ r[b] @ columns for b in range(B)) / B
    mean_x = sum(rows @ x[b] @ columns for b in range(B)) / B
    assert len(spectra) == B
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
    outside = grad.abs()[(mask == 0).expand_as(grad)].mean()
    inside = grad.abs()[(mask == 1).expand_as(grad)].mean()
    assert outside / inside == pytest.approx(0.001, rel=0.5)
    # the weight matrix has no gradient: with it held fixed the loss is a plain quadratic
    w = torch.where(mask > 0, 1.0, 0.001)
    blended = prediction * w + (0.5 * prediction.detach() + 0.5 * image) * (1 - w)
    distance = torch.fft.fft2(blended.mean(0) - image.mean(0), norm="ortho").abs() ** 2
    weight = (distance.detach().sqrt() + 1).log()
    (expected,) = torch.autograd.grad((weight / weight.max() * distance).mean(), prediction)
    torch.testing.assert_close(grad, expected, atol=1e-7, rtol=1e-4)


def test_reconstruction_is_float32_under_autocast():
    prediction, image, mask = rand(3, 3, 16, 16).bfloat16(), rand(3, 3, 16, 16, seed=1), block_mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cmid.reconstruction_loss(prediction, image, mask)
    expected = cmid.focal_l1(prediction.float(), image, mask) + naive_focal_frequency(
        prediction.float(), image, mask
    )
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-3)


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
    for b in range(2):
        for n in range(3):
            P = [math.exp((branch[b, n, k] - center[k]) / 0.05) for k in range(7)]
            Q = [math.exp(online[b, n, k] / 0.1) for k in range(7)]
            total += -sum(P[k] / sum(P) * math.log(Q[k] / sum(Q)) for k in range(7)) / 6
    assert cmid.local_loss(online, branch, center, 0.1, 0.05).item() == pytest.approx(total, rel=1e-4)


def test_memory_wraps_and_moves_its_centre():
    memory = Memory(10, 4)
    torch.testing.assert_close(memory.queue.norm(dim=0), torch.ones(10))
    expected, pointer = memory.queue.clone(), 0
    for step in range(4):
        keys = unit(4, 256, seed=step)
        memory.enqueue(keys)
        for key in keys:
            expected[:, pointer % 10] = key
            pointer += 1
    assert torch.equal(memory.queue, expected) and memory.queue_ptr == 6
    center = torch.zeros(4)
    for step in range(3):
        memory.center = memory.moved_center(rand(4, seed=step))
        center = 0.9 * center + 0.1 * rand(4, seed=step)
    torch.testing.assert_close(memory.center, center)
    assert set(memory.state_dict()) == {"queue", "queue_ptr", "center"}


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize(
    "side, ratio, count", [(7, 0.6, 30), (4, 0.6, 10), (2, 0.5, 2), (5, 0.0, 0), (3, 1.0, 9)]
)
def test_masks_have_the_right_number_of_blocks_and_differ(side, ratio, count):
    masks = cmid.draw_masks(20, side, ratio, torch.Generator().manual_seed(0))
    assert masks.shape == (20, side, side) and (masks.sum((1, 2)) == count).all()
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    if 0 < count < side**2 and side > 2:
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10
        assert ((masks.mean(0) > 0) & (masks.mean(0) < 1)).all()  # every block now and then
    again = cmid.draw_masks(20, side, ratio, torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)


def test_masked_blocks_get_the_images_own_mean_and_lie_on_the_grid():
    blocks = cmid.draw_masks(3, 4, 0.6, torch.Generator().manual_seed(0))
    images, mask = rand(3, 3, 32, 32), cmid.enlarge(blocks, 32)
    masked = cmid.mask_images(images, mask)
    for b in range(3):
        for i in range(32):
            for j in range(32):
                own = images[b].mean((1, 2)) if blocks[b, i // 8, j // 8] else images[b, :, i, j]
                torch.testing.assert_close(masked[b, :, i, j], own)


# ------------------------------------------------------------------ geometry


def random_geometry(B, seed, height=100, width=140):
    draws = torch.rand(B, 5, generator=torch.Generator().manual_seed(seed))
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
        table = [
            [math.dist(naive_center(g1[b], side, i), naive_center(g2[b], side, j)) for j in range(side**2)]
            for i in range(side**2)
        ]
        nearest = [min(row) for row in table]
        assert len(set(positions[b].tolist())) == n
        for i, j, distance in zip(
            positions[b].tolist(), matches[b].tolist(), distances[b].tolist(), strict=True
        ):
            assert table[i][j] == pytest.approx(distance, abs=1e-3)
            assert table[i][j] == pytest.approx(nearest[i], abs=1e-3)
        assert sorted(distances[b].tolist()) == pytest.approx(sorted(nearest)[:n], abs=1e-3)


def test_identical_crops_match_themselves_and_mirrored_ones_their_mirror():
    g = random_geometry(10, 3)
    positions, matches, distances = cmid.match_positions(g, g, 7, 49)
    assert torch.equal(positions, matches) and distances.max() < 1e-3
    mirrored = g.clone()
    mirrored[:, 4] = 1 - mirrored[:, 4]
    positions, matches, distances = cmid.match_positions(g, mirrored, 7, 49)
    assert torch.equal(matches, positions // 7 * 7 + 6 - positions % 7) and distances.max() < 1e-3


def test_geometry_tells_where_the_pixels_of_a_crop_come_from(tmp_path):
    """Red and green of the source are its columns and rows: what a crop's pixels say, the geometry says."""
    x = torch.arange(200).expand(160, 200)
    y = torch.arange(160).unsqueeze(1).expand(160, 200)
    image = torch.stack([x, y, torch.zeros(160, 200)], -1).byte()
    Image.fromarray(image.numpy()).save(tmp_path / "ramp.png")
    dataset, flips, areas = PairDataset([str(tmp_path / "ramp.png")], 64, 0), [], []
    for epoch in range(100):
        crops, geometry = dataset[epoch, 0]
        assert crops.shape == (2, 3, 64, 64) and crops.dtype == torch.uint8 and geometry.shape == (2, 5)
        centers = cmid.position_centers(geometry, 2)  # 2 x 4 x 2
        for crop, center, (_, _, height, width, flipped) in zip(
            crops, centers, geometry.tolist(), strict=True
        ):
            flips.append(flipped)
            areas.append(height * width / (160 * 200))
            for position in range(4):
                row, column = divmod(position, 2)
                cell = crop[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].float().mean((1, 2))
                # a pixel's value is its index, its centre half a pixel further
                assert cell[0].item() + 0.5 == pytest.approx(center[position, 1].item(), abs=1)
                assert cell[1].item() + 0.5 == pytest.approx(center[position, 0].item(), abs=1)
    assert sum(flips) / 200 == pytest.approx(0.5, abs=0.1)
    assert 0.27 < min(areas) < 0.4 and 0.9 < max(areas) <= 1


def test_matched_positions_look_alike_and_are_drawn(scenes, tmp_path):
    """On real crops; matches.png shows the matched centres of each crop (red, green) on its source."""
    paths = common.list_images(scenes / "train")
    dataset, matched, others, pictures = PairDataset(paths, 48, 0), [], [], []
    for index in range(len(paths)):
        crops, geometry = dataset[0, index]
        positions, matches, _ = cmid.match_positions(geometry[:1], geometry[1:], 3, 4)
        cells = F.avg_pool2d(crops.float(), 16).flatten(2)  # 2 x 3 x 9: mean colour around each position
        mine, theirs = cells[0, :, positions[0]], cells[1, :, matches[0]]
        matched.append((mine - theirs).abs().mean())
        others.append((mine - cells[1, :, torch.randperm(9)[:4]]).abs().mean())
        picture = Image.open(paths[index]).convert("RGB").resize((240, 240))
        for g, chosen, color in zip(geometry, (positions[0], matches[0]), ("red", "lime"), strict=True):
            for number, (y, x) in enumerate((5 * cmid.position_centers(g[None], 3)[0, chosen]).tolist()):
                ImageDraw.Draw(picture).text((x, y), str(number), color, anchor="mm")
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    save_image(torch.stack(pictures[:12]) / 255, tmp_path / "matches.png", nrow=4)
    assert torch.stack(matched).mean() < 0.75 * torch.stack(others).mean()


def test_samples_depend_on_seed_epoch_and_index_alone(scenes):
    paths = common.list_images(scenes / "train")
    dataset = PairDataset(paths, 32, 0)
    first = dataset[3, 5]
    torch.manual_seed(99)
    assert_same(dataset[3, 5], first)
    for other in (dataset[4, 5], PairDataset(paths, 32, 1)[3, 5]):
        assert not torch.equal(other[1], first[1])


def test_first_view_keeps_its_colour_and_second_is_changed_image_by_image():
    """The same draws through torchvision's operations: jitter, blur, noise, solarize, grey."""
    N, seed = 100, 0
    crops = torch.randint(256, (N, 2, 3, 24, 24), generator=torch.Generator().manual_seed(0)).byte()
    x1, x2 = cmid.color_views(crops, cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD, seed)
    expected = common.normalize(crops[:, 0].float() / 255, cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD)
    torch.testing.assert_close(x1, expected)

    generator = torch.Generator().manual_seed(seed)
    where, factors, order = common.draw_color_jitter((0.4, 0.4, 0.2, 0.1), torch.full((N,), 0.8), generator)
    sigma = torch.empty(N).uniform_(0.1, 2, generator=generator)
    variance = torch.empty(N).uniform_(10, 50, generator=generator)
    noisy, solarized, gray = (common.bernoulli(torch.full((N,), p), generator) for p in (0.6, 0.2, 0.2))
    noise_seed = common.stream_seed(seed, "noise")
    noise = torch.randn(N, 3, 24, 24, generator=torch.Generator().manual_seed(noise_seed))
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
        x = TF.normalize(x, cmid.MILLIONAID_MEAN, cmid.MILLIONAID_STD)
        assert_same_colours(x2[i], x)
    again = cmid.color_views(crops, (0, 0, 0), (1, 1, 1), seed)[1]
    assert torch.equal(again, cmid.color_views(crops, (0, 0, 0), (1, 1, 1), seed)[1])
    assert 0 <= again.min() and again.max() <= 1
    is_gray = (again.amax(1) - again.amin(1)).amax((1, 2)) < 1e-5
    assert is_gray.float().mean().item() == pytest.approx(0.2, abs=0.08)
    assert (where & noisy & solarized & gray).any() and not (where | noisy | solarized | gray).all()


def test_noise_has_the_given_deviation_where_it_is_wanted():
    images, std = torch.full((6, 3, 50, 50), 0.5), torch.linspace(10, 50, 6).sqrt() / 255
    where = torch.tensor([True, False, True, True, False, True])
    noisy = cmid.gaussian_noise(images.clone(), where, std, 5)
    for i in range(6):
        expected = std[i].item() if where[i] else 0
        assert (noisy[i] - 0.5).std().item() == pytest.approx(expected, rel=0.05, abs=1e-7)
    assert torch.equal(noisy, cmid.gaussian_noise(images.clone(), where, std, 5))
    assert cmid.gaussian_noise(torch.ones(1, 3, 9, 9), torch.tensor([True]), std[-1:], 5).max() == 1


# ------------------------------------------------------------------ encoders


def make_args(*flags):
    return cmid.get_parser().parse_args(["--data_path", "x", "--output_dir", "x", *tiny("cmid", *flags)])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("arch", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_encoders_run_the_backbone_and_add_the_token_where_masked(arch, stage):
    args = make_args(
        "--arch", arch, "--img_size", "64", "--mask_patch_size", "16", "--mask_stage", str(stage)
    )
    online, branch = cmid.build_encoders(args)
    online.eval(), branch.eval()
    images = rand(2, 3, 64, 64)
    last_map, pooled = cmid.run_backbone(branch.backbone, images)
    torch.testing.assert_close(pooled, branch.backbone(images))
    assert last_map.shape == (2, branch.backbone.num_features, 2, 2)
    blocks = cmid.draw_masks(2, 4, 0.6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        cmid.run_backbone(online.backbone, images, stage, blocks, online.mask_token)[1],
        online.backbone(images),
    )
    stem, stages = cmid.stem_and_stages(online.backbone)
    with torch.no_grad():
        online.mask_token.copy_(rand(len(online.mask_token)))
        x = torch.nn.Sequential(*stem, *stages[:stage])(images)
        nhwc = arch.startswith("swin")
        side = x.shape[1 if nhwc else 2]
        for b in range(2):
            for i in range(side):
                for j in range(side):
                    if blocks[b, i * 4 // side, j * 4 // side]:
                        if nhwc:
                            x[b, i, j] += online.mask_token
                        else:
                            x[b, :, i, j] += online.mask_token
        x = torch.nn.Sequential(*stages[stage:])(x)
        expected = online.backbone.forward_head(x)
    torch.testing.assert_close(
        cmid.run_backbone(online.backbone, images, stage, blocks, online.mask_token)[1],
        expected,
        atol=1e-4,
        rtol=1e-4,
    )
    assert not hasattr(branch, "mask_token")


def test_other_backbones_are_taken_apart_rightly():
    for arch in ("resnet50", "resnet101", "swin_small_patch4_window7_224", "convnext_tiny"):
        backbone = common.build_backbone(arch, 64)
        D, _ = cmid.probe_backbone(backbone, make_args("--arch", arch, "--img_size", "64"))
        assert D == backbone.num_features


def test_positions_are_numbered_row_by_row():
    last_map = torch.arange(2 * 5 * 3 * 3.0).view(2, 5, 3, 3)
    positions = torch.tensor([[0, 5, 8], [4, 4, 1]])
    taken = cmid.take_positions(last_map, positions)
    expected = [last_map[b, :, p // 3, p % 3] for b in range(2) for p in positions[b].tolist()]
    assert torch.equal(taken, torch.stack(expected))


@pytest.mark.parametrize("use_bn", [False, True])
def test_local_head_is_a_stack_of_1x1_convolutions_and_a_cosine(use_bn):
    head, last_map = LocalHead(12, 20, use_bn), rand(2, 12, 3, 3)
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
    positions = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(head(cmid.take_positions(last_map, positions)), expected, atol=1e-5, rtol=0)
    gain = head.prototypes.parametrizations.weight.original0
    assert (gain == 1).all() and not gain.requires_grad


# ------------------------------------------------------------------ training steps


def setup_step(flags):
    """Encoders without BatchNorm, memory and optimizer, and two fixed batches of 64 px crops."""
    args = make_args(
        *"--arch test_convnext --img_size 64 --mask_patch_size 16 --local_dim 16".split(), *flags
    )
    torch.manual_seed(0)
    online, branch = (
        kind(common.build_backbone("test_convnext", 64), 64, 16, False, *extra)
        for kind, extra in ((OnlineEncoder, (0, 24)), (Encoder, ()))
    )
    for p in branch.requires_grad_(False).parameters():
        p.add_(0.01 * torch.randn(p.shape))
    memory = Memory(48, 16)
    groups = common.param_groups(online)
    optimizer = timm.optim.create_optimizer_v2(groups, "momentum", lr=1.0, weight_decay=0.1, momentum=0.9)
    batches = []
    for step in range(2):
        crops = torch.randint(256, (8, 2, 3, 64, 64), generator=torch.Generator().manual_seed(step)).byte()
        batches.append((crops, torch.stack([random_geometry(8, step), random_geometry(8, 10 + step)], 1)))
    return args, online, branch, memory, optimizer, batches


def schedule(step):
    return {"lr": 0.01 * step, "momentum": 0.9 + 0.04 * step}


def plain_views(crops, mean, std, seed):
    return tuple(common.normalize(crops[:, view] / 255, mean, std) for view in range(2))


def fixed_masks(B, side, ratio, generator):
    return torch.eye(side).expand(B, side, side).contiguous()


def train_two_steps(flags=(), process=ALONE):
    """Runs train_one_epoch on this process's share of the fixed batches, without colour, masks fixed."""
    args, network, branch, memory, optimizer, batches = setup_step(flags)
    meter, seen = common.Meter(process, 1000), []
    online = network if process.world_size == 1 else DistributedDataParallel(network)
    share = [
        (
            [part.chunk(args.accum_steps)[a].chunk(process.world_size)[process.rank] for part in batch],
            [f"file of {process.rank}"],
        )
        for batch in batches
        for a in range(args.accum_steps)
    ]

    def after_step(step, values, draw):
        seen.append((step, values))
        return False

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = online, branch, memory, optimizer, scaler, schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmid, "color_views", plain_views)
        patch.setattr(cmid, "draw_masks", fixed_masks)
        cmid.train_one_epoch(2, range(1, 3), iter(share), *parts, 2, args, process, meter, after_step)
    return network, branch, memory, meter, seen


def naive_training():
    """Two steps with plain loops, from the specification: one view, one pair, one parameter at a time."""
    args, online, branch, memory, _, batches = setup_step([])
    parameters = {name: p for name, p in online.named_parameters() if p.requires_grad}
    momenta = {name: torch.zeros_like(p) for name, p in parameters.items()}
    queue, center, pointer, losses = memory.queue.clone(), torch.zeros(16), 0, []
    for step, (crops, geometry) in enumerate(batches, start=1):
        x = plain_views(crops, args.mean, args.std, 0)
        blocks = fixed_masks(8, 4, 0.6, None)
        mask = cmid.enlarge(blocks, 64)
        maps, pooled = zip(
            *(
                cmid.run_backbone(online.backbone, cmid.mask_images(v, mask), 0, blocks, online.mask_token)
                for v in x
            ),
            strict=True,
        )
        branch_maps, k = zip(*(branch(v) for v in x), strict=True)
        total = 0.0
        for v in range(2):
            prediction = online.decoder(maps[v])
            total = (
                total
                + (cmid.focal_l1(prediction, x[v], mask) + cmid.focal_frequency(prediction, x[v], mask)) / 2
            )
            q = F.normalize(online.projector(pooled[v]), dim=1)
            total = total + cmid.global_loss(q, k[1 - v], queue, 0.2) / 2
            positions, matches, _ = cmid.match_positions(geometry[:, v], geometry[:, 1 - v], 2, 2)
            pairs = []
            for b in range(8):
                for n in range(2):
                    i, j = positions[b, n].item(), matches[b, n].item()
                    student = online.local_head(maps[v][b, :, i // 2, i % 2][None])
                    target = branch.local_head(branch_maps[1 - v][b, :, j // 2, j % 2][None])
                    pairs.append((student, target))
            for student, target in pairs:
                P = ((target - center) / 0.07).softmax(1)
                total = total - (P * (student / 0.1).log_softmax(1)).sum() / len(pairs) / 2
            center = 0.9 * center + 0.1 * torch.cat([target for _, target in pairs]).mean(0)
        losses.append(total.item())
        online.zero_grad()
        total.backward()
        with torch.no_grad():
            for name, p in parameters.items():
                decay = 0.1 if p.ndim > 1 and not name.endswith("bias") else 0.0
                momenta[name] = 0.9 * momenta[name] + p.grad + decay * p
                p.sub_(schedule(step)["lr"] * momenta[name])
            m, own = schedule(step)["momentum"], dict(online.named_parameters())
            for name, p in branch.named_parameters():
                p.copy_(m * p + (1 - m) * own[name])
            for b in range(8):
                for v in range(2):
                    queue[:, pointer % 48] = k[v][b]
                    pointer += 1
    return online, branch, queue, center, losses


def assert_close_parameters(ours, expected):
    for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_steps_equal_plain_loops():
    """All losses, the centre between the directions, SGD, branch encoder and queue over two steps."""
    online, branch, memory, meter, seen = train_two_steps(["--warmup_teacher_temp_epochs", "0"])
    expected_online, expected_branch, queue, center, losses = naive_training()
    torch.testing.assert_close(torch.stack([terms["loss"] for terms in meter.terms]), torch.tensor(losses))
    torch.testing.assert_close(memory.center, center, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(memory.queue, queue, atol=1e-5, rtol=0)
    assert_close_parameters(online, expected_online)
    assert_close_parameters(branch, expected_branch)
    assert memory.queue_ptr == 32 and [step for step, _ in seen] == [2, 3]
    for terms in meter.terms:
        assert terms["loss"].item() == pytest.approx(
            sum(terms[name].item() for name in ("reconstruction", "global", "local")), rel=1e-5
        )


def test_losses_are_weighed():
    terms = train_two_steps(["--loss_weights", "0", "2", "0.5"])[3].terms[0]
    expected = 2 * terms["global"] + 0.5 * terms["local"]
    torch.testing.assert_close(terms["loss"], expected)


def test_no_gradient_reaches_the_branch():
    _, branch, memory, _, _ = train_two_steps()
    assert all(p.grad is None and not p.requires_grad for p in branch.parameters())
    assert memory.queue.grad_fn is None and memory.center.grad_fn is None


def test_branch_temperature_warms_up_by_epochs():
    values = [cmid.teacher_temp_at(epoch, 0.04, 0.07, 50) for epoch in (0, 25, 50, 60)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])


# ------------------------------------------------------------------ whole runs


def test_whole_run_writes_everything(train, tmp_path):
    saved = train(tmp_path, "--log_every", "2", script="cmid")
    assert saved["step"] == 21 and saved["epoch"] == 3
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["scaled_lr"] == pytest.approx(1e-3 * 4 / 64) and lines[0]["num_matches"] == 1
    names = "loss reconstruction global local batch_top1 match_distance feature_std lr momentum images_per_s"
    assert all(math.isfinite(lines[-1][name]) for name in names.split())
    backbone = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0)
    prefix = "backbone."
    online = {k.removeprefix(prefix): v for k, v in saved["online"].items() if k.startswith(prefix)}
    assert_same(dict(backbone.state_dict()), online)
    assert backbone.pretrained_cfg["mean"] == pytest.approx(cmid.MILLIONAID_MEAN)
    assert Image.open(tmp_path / "views.png").size == (2 * 34 + 2, 4 * 34 + 2)  # 4 images, 2 views
    assert Image.open(tmp_path / "reconstruction.png").size == (3 * 34 + 2, 4 * 34 + 2)


def test_20_of_49_positions_are_matched(run, tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        save_image(torch.rand(3, 224, 224), tmp_path / "data" / f"{i}.png")
    for size, expected in ((224, 20), (64, 2)):
        flags = ["--img_size", size, "--batch_size_per_gpu", 2, "--moco_k", 4, "--max_steps", 1]
        flags = tiny("cmid", "--data_path", tmp_path / "data", "--output_dir", tmp_path / str(size), *flags)
        run("cmid", *flags)
        header = json.loads((tmp_path / str(size) / "log.jsonl").read_text().splitlines()[0])
        assert header["num_matches"] == expected and header["positions"] == (size // 32) ** 2


def test_schedules_and_optimizer_are_the_papers(train, tmp_path):
    """Cosines over all 21 steps, the rate's after an epoch's linear warm-up; no decay on biases and norms."""
    saved = train(tmp_path, "--log_every", "1", "--lr", "0.16", "--min_lr", "0.001", script="cmid")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    assert [line["lr"] for line in lines] == pytest.approx(warm_cosine())  # .16 * 4 / 64
    momenta = [1 - 0.004 * 0.5 * (1 + math.cos(math.pi * step / 21)) for step in range(21)]
    assert [line["momentum"] for line in lines] == pytest.approx(momenta)
    groups = saved["optimizer"]["param_groups"]
    assert [(g["betas"], g["weight_decay"]) for g in groups] == [
        ((0.98, 0.92, 0.99), 0.02),
        ((0.98, 0.92, 0.99), 0),
    ]


@pytest.mark.parametrize("flags", [[], ["--accum_steps", "2", "--arch", "test_convnext"]])
def test_resumed_run_equals_the_unbroken_one(train, tmp_path, flags):
    unbroken = train(tmp_path / "a", *flags, "--num_workers", "2", "--max_steps", "8", script="cmid")
    train(tmp_path / "b", *flags, "--max_steps", "5", script="cmid")
    resumed = train(tmp_path / "b", *flags, "--max_steps", "8", script="cmid")
    assert_same_state(resumed, unbroken)


@pytest.mark.parametrize("flags", [["--batch_size_per_gpu", "1", "--moco_k", "2", "--arch", "test_convnext"]])
def test_a_batch_of_one_image_works(train, tmp_path, flags):
    assert train(tmp_path, *flags, "--max_steps", "2", script="cmid")["step"] == 2


def test_either_encoder_can_be_judged(train, tmp_path):
    saved = train(tmp_path, "--max_steps", "2", script="cmid")
    for key in ("online", "branch", None):
        state, info = common.read_weights(str(tmp_path / "checkpoint.pth"), key)
        name = "layer1.0.conv1.weight"
        assert info["arch"] == "test_resnet" and torch.equal(
            state[name], saved[key or "online"][f"backbone.{name}"]
        )


def test_batch_top1_counts_the_queries_that_find_their_own_key():
    k = torch.eye(5)
    q = k[[0, 1, 3, 2, 4]]  # two of five look for the other's key
    assert cmid.batch_top1(q, k).item() == pytest.approx(60)


def test_hidden_blocks_of_a_few_images_are_learned_by_heart(scenes):
    """Far better than blocks of the right mean colour: positions, blocks and pixels are where they belong."""
    flags = (
        "--arch test_resnet --img_size 64 --mask_patch_size 16 --local_dim 16 --data_path x --output_dir x"
    )
    args = cmid.get_parser().parse_args(flags.split())
    torch.manual_seed(0)
    network, _ = cmid.build_encoders(args)
    paths = sorted((scenes / "train").rglob("*.png"))[::8]
    images = torch.stack([common.read_image(path) for path in paths]) / 255
    images = common.normalize(F.interpolate(images, 64, mode="bilinear"), args.mean, args.std)
    blocks = cmid.draw_masks(len(images), 4, 0.6, torch.Generator().manual_seed(0))
    mask, positions = cmid.enlarge(blocks, 64), torch.zeros(len(images), 1, dtype=torch.long)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(100):
        prediction = network(cmid.mask_images(images, mask), blocks, positions)[0]
        loss = cmid.reconstruction_loss(prediction, images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flat = F.interpolate(F.avg_pool2d(images, 16), scale_factor=16)
    assert loss < cmid.reconstruction_loss(flat, images, mask) / 3

import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import assert_same, assert_same_colours, read_log, tiny, torchvision_jitter
from PIL import Image

import common
import mhcl
from common import Process
from mhcl import Encoder, MHCLLoss, PairDataset, Shuffle

ALONE = Process(0, 1, torch.device("cpu"), None)
WEIGHTS = (0.1, 0.4, 0.7, 1, 0.01, 0.04, 0.07, 0.1)  # of the eight rows, from the specification


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


def make_loss(weights=(*mhcl.WEIGHTS, *mhcl.HARD_WEIGHTS), C=6, K=12, t=0.2):
    torch.manual_seed(3)
    return MHCLLoss(weights, C, K, t)


def parse(*flags):
    args = mhcl.get_parser().parse_args([*map(str, ["--data_path", "x", "--output_dir", "x", *flags])])
    common.check_bands(args)
    return args


def draws(S=4, K=12, seed=0, a=1.0, b=0.5, step=0):
    return mhcl.draw_hard(parse("--seed", seed, "--a", a, "--b", b, "--moco_k", K), step, S)


def log_figures(loss, q, k, draws, features=None):
    features = torch.eye(len(q)) if features is None else features
    value, _, parts = loss(q, k, draws)
    return value, mhcl.log_figures(q, k, features, parts, loss.moco_t)


# ------------------------------------------------------------------ loss, hard features, queue


def naive_mhcl(q, k, queue, lam, mu, permutation, t=0.2):
    """Loss and new keys by loops over rows and images; the negatives themselves are mixed."""
    total, keys = 0.0, torch.empty(len(q), 8, q.shape[2])
    for row in range(8):
        s = row % 4
        for b in range(len(q)):
            query, key, negatives = q[b, s], k[b, s], queue[row].clone()  # C x K
            if row >= 4:
                query, key = (1 + lam[s]) * query - lam[s] * key, (1 + lam[s]) * key - lam[s] * query
                mixed = [
                    mu[s] * negatives[:, n] + (1 - mu[s]) * negatives[:, permutation[n]]
                    for n in range(negatives.shape[1])
                ]
                negatives = torch.stack(mixed, 1)
            logits = torch.stack([query @ key, *(query @ n for n in negatives.T)]) / t
            total = total + WEIGHTS[row] * -logits.log_softmax(0)[0] / len(q)
            keys[b, row] = key.detach()
    return total, keys


def test_loss_and_gradient_equal_a_version_that_mixes_the_queue():
    loss, hard = make_loss(), draws()
    q, k = unit(5, 4, 6).requires_grad_(), unit(5, 4, 6, seed=1)
    value, keys, _ = loss(q, k, hard)
    expected, expected_keys = naive_mhcl(q, k, loss.queue, *hard)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(keys, expected_keys)
    ours, naive = (torch.autograd.grad(x, q)[0] for x in (value, expected))
    torch.testing.assert_close(ours, naive)
    assert not keys.requires_grad


def test_gradient_flows_through_q_inside_the_hard_key():
    q, k, lam = unit(5, 4, 6).requires_grad_(), unit(5, 4, 6, seed=1), torch.rand(4) + 0.1
    _, hard_k = mhcl.extrapolate(q, k, lam)
    (grad,) = torch.autograd.grad(hard_k.sum(), q)
    torch.testing.assert_close(grad, -lam.view(1, 4, 1).expand(5, 4, 6))


def test_queue_over_several_steps_and_around_its_end():
    """Loss and queue against a naive list of keys; 12 places, 5 keys a step, so it wraps twice."""
    loss = make_loss()
    start = loss.queue.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(8, 12))  # normalised noise
    assert start.std() > 0.3
    oldest_first, places = [(number, start[:, :, number]) for number in range(12)], list(range(12))
    for step in range(6):
        q, k, hard = unit(5, 4, 6, seed=10 + step), unit(5, 4, 6, seed=20 + step), draws(seed=step)
        value, keys, _ = loss(q, k, hard)
        naive_queue = torch.empty(8, 6, 12)
        for place, key in oldest_first:
            naive_queue[:, :, place] = key
        expected, expected_keys = naive_mhcl(q, k, naive_queue, *hard)
        torch.testing.assert_close(value, expected)
        before = loss.queue.clone()
        loss.enqueue(keys)
        assert not torch.equal(before, loss.queue)
        for key in expected_keys:
            place, _ = oldest_first.pop(0)
            oldest_first.append((place, key))
    for place, key in oldest_first:
        torch.testing.assert_close(loss.queue[:, :, place], key)
    assert loss.queue_ptr == 30 % 12 and places == sorted(place for place, _ in oldest_first)
    assert {"queue", "queue_ptr"} == set(loss.state_dict())


def test_without_mhcl_it_is_infonce():
    loss = make_loss((1.0,))
    q, k = unit(5, 1, 6).requires_grad_(), unit(5, 1, 6, seed=1)
    value, keys, _ = loss(q, k, None)
    assert loss.queue.shape == (1, 6, 12) and torch.equal(keys, k)
    total = 0.0
    for b in range(5):
        positive = math.exp((q[b, 0] @ k[b, 0]).item() / 0.2)
        negatives = sum(math.exp((q[b, 0] @ n).item() / 0.2) for n in loss.queue[0].T)
        total += -math.log(positive / (positive + negatives)) / 5
    assert value.item() == pytest.approx(total, rel=1e-5)
    logits = torch.cat([(q * k).sum(-1), q[:, 0] @ loss.queue[0]], 1) / 0.2
    naive = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(torch.autograd.grad(value, q)[0], torch.autograd.grad(naive, q)[0])


def test_figures_of_the_log():
    loss, hard = make_loss(), draws()
    q, k = unit(40, 4, 6), unit(40, 4, 6, seed=1)
    k[:, 3] = q[:, 3]
    value, figures = log_figures(loss, q, k, hard, features := torch.rand(40, 7))
    assert figures["feature_std"] == common.feature_std(features)
    torch.testing.assert_close((torch.tensor(WEIGHTS) * figures["cross_entropy"]).sum(), value)
    for s in range(4):
        similarity = q[:, s] @ loss.queue[s]  # B x K
        right = [100.0 * ((q[b, s] @ k[b, s]) > similarity[b]).all() for b in range(40)]
        assert figures["top1"][s].item() == pytest.approx(sum(right) / 40)
        ranks = [(q[b, s] @ k[:, s].T).argmax() == b for b in range(40)]
        assert figures["batch_top1"][s].item() == pytest.approx(100 * sum(ranks).item() / 40)
        assert figures["positive"][s].item() == pytest.approx((q[:, s] * k[:, s]).sum(-1).mean().item())
        assert figures["negative"][s].item() == pytest.approx(similarity.mean().item(), abs=1e-6)
    assert figures["top1"][3] == 100 and figures["positive"][3].item() == pytest.approx(1)


def test_a_collapsed_encoder_scores_no_top1():
    loss = make_loss((1.0,))
    same = torch.ones(4, 1, 6) / math.sqrt(6)
    loss.queue.copy_(same[0, 0].view(1, 6, 1).expand(1, 6, 12))
    value, figures = log_figures(loss, same, same, None)
    assert figures["top1"] == 0 and value.item() == pytest.approx(math.log(13))


def test_draws_follow_seed_and_step_alone_and_the_beta_distribution():
    first = draws(K=50, seed=5)
    torch.manual_seed(99)
    assert_same(draws(K=50, seed=5), first)
    assert not torch.equal(draws(K=50, seed=6)[0], first[0])
    assert not torch.equal(draws(K=50, seed=5, step=1)[0], first[0])
    lam, mu, permutation = first
    assert lam.shape == mu.shape == (4,) and sorted(permutation.tolist()) == list(range(50))
    assert not torch.equal(lam, mu) and len(set(lam.tolist())) == 4  # one draw for each scale
    for values in draws(S=4000, K=1, a=2.0, b=3.0)[:2]:
        assert values.mean().item() == pytest.approx(2 / 5, abs=0.01)  # a / (a + b)
        assert values.var().item() == pytest.approx(6 / (25 * 6), abs=0.005)  # ab / ((a+b)^2 (a+b+1))
    for a, b in ((20, 0.1), (10, 1), (1, 0.001)):
        lam, mu, _ = draws(1000, 1, a=a, b=b)
        assert lam.isfinite().all() and 0 <= lam.min() and lam.max() <= 1


def test_loss_is_float32_under_autocast():
    encoder = Encoder(common.build_backbone("test_resnet", 32), [32, 48, 192, 96], 8, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, features = encoder(torch.randn(4, 3, 32, 32))
    assert q.dtype == torch.float32 and features.dtype == torch.bfloat16


# ------------------------------------------------------------------ encoder


def naive_resnet(backbone, x):
    """Maps after the four stages of a timm ResNet, by its own modules in turn."""
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(x))))
    maps = []
    for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("mlp", [True, False])
def test_encoder_projects_the_mean_of_each_stage(mlp):
    torch.manual_seed(0)
    backbone = common.build_backbone("resnet18", 64)
    encoder = Encoder(backbone, [64, 128, 256, 512], 16, mlp).eval()
    x = torch.randn(3, 3, 64, 64)
    out, features = encoder(x)
    assert out.shape == (3, 4, 16) and features.shape == (3, 512)
    for s, stage in enumerate(naive_resnet(backbone, x)):
        positions = [(i, j) for i in range(stage.shape[2]) for j in range(stage.shape[3])]
        hidden = torch.stack([stage[:, :, i, j] for i, j in positions]).mean(0)
        layers = [m for m in encoder.projectors[s] if isinstance(m, torch.nn.Linear)]
        assert len(layers) == (2 if mlp or s < 3 else 1)
        if len(layers) == 2:
            assert layers[0].weight.shape == (stage.shape[1], stage.shape[1])
            hidden = (hidden @ layers[0].weight.T + layers[0].bias).clamp(min=0)
        hidden = hidden @ layers[-1].weight.T + layers[-1].bias
        torch.testing.assert_close(out[:, s], hidden / hidden.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(features, backbone(x))


BACKBONES = dict.fromkeys(["resnet50", "wide_resnet50_2", "resnext50_32x4d"], [256, 512, 1024, 2048])
BACKBONES |= dict.fromkeys(["swin_tiny_patch4_window7_224", "convnext_tiny"], [96, 192, 384, 768])


@pytest.mark.parametrize("arch, widths", BACKBONES.items())
def test_backbones_of_four_stages(arch, widths):
    backbone = common.build_backbone(arch, 64)
    args = parse("--arch", arch, "--img_size", 64, "--in_chans", 3)
    assert mhcl.stage_widths(backbone, args, 4) == widths and backbone.training
    encoder = Encoder(backbone, widths, 8, True)
    x = torch.randn(2, 3, 64, 64)
    out, features = encoder(x)
    assert out.shape == (2, 4, 8) and out.isfinite().all()
    out[:, :, 0].sum().backward()
    # Several GPUs would wait for ever for a gradient that never comes.
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    backbone.eval()
    torch.testing.assert_close(encoder(x)[1], backbone(x))  # what eval_knn measures


def test_bn_groups_are_normalised_one_by_one():
    torch.manual_seed(0)
    encoder = Encoder(common.build_backbone("test_resnet", 32), [32, 48, 192, 96], 8, True)
    x = torch.randn(8, 3, 32, 32)
    whole, features = encoder(x)
    parts, part_features = encoder(x, bn_groups=4)
    expected = torch.cat([encoder(x[i : i + 2])[0] for i in range(0, 8, 2)])
    torch.testing.assert_close(parts, expected)
    assert (parts - whole).abs().max() > 0.01 and part_features.shape == features.shape
    encoder.eval()
    torch.testing.assert_close(encoder(x, bn_groups=4)[0], encoder(x)[0])


@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffle_hands_out_all_rows_and_takes_them_back_in_order(monkeypatch, world_size):
    B, rows = 4, torch.arange(4 * world_size)
    shuffles = [
        Shuffle(B, 7, Process(rank, world_size, torch.device("cpu"), None)) for rank in range(world_size)
    ]
    monkeypatch.setattr(mhcl, "gather", lambda x, process: rows)
    handed = torch.cat([shuffle(own) for shuffle, own in zip(shuffles, rows.split(B), strict=True)])
    assert sorted(handed.tolist()) == rows.tolist() != handed.tolist()
    monkeypatch.setattr(mhcl, "gather", lambda x, process: 10 * handed)
    for shuffle, part, own in zip(shuffles, handed.split(B), rows.split(B), strict=True):
        assert torch.equal(shuffle.unshuffle(10 * part), 10 * own)


# ------------------------------------------------------------------ views


def test_samples_depend_on_seed_epoch_and_index_alone(scenes):
    samples = common.Samples(common.list_images(scenes / "train"))
    dataset = PairDataset(samples, 32, 0)
    first = dataset[3, 5]
    torch.manual_seed(99)
    assert_same(dataset[3, 5], first)
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in first)
    assert not torch.equal(*first)
    for other in (dataset[4, 5], PairDataset(samples, 32, 1)[3, 5]):
        assert not torch.equal(other[0], first[0])


def test_crops_cover_a_fifth_to_all_of_the_area_and_half_are_mirrored(tmp_path):
    ramp = torch.arange(200).float().expand(200, 200) * 255 / 199
    image = torch.stack([ramp, ramp.T, torch.zeros(200, 200)]).byte()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "ramp.png")
    dataset = PairDataset(common.Samples([str(tmp_path / "ramp.png")]), 100, 0)
    areas, mirrored = [], 0
    for epoch in range(200):
        for crop in dataset[epoch, 0]:
            width, height = (crop[c].max().item() - crop[c].min().item() + 2 for c in (0, 1))
            areas.append(width * height / 255**2)
            mirrored += int(crop[0, 0, 0] > crop[0, 0, -1])
    assert 0.17 < min(areas) < 0.25 and 0.9 < max(areas) < 1.05
    assert mirrored / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("aug_plus", [True, False])
def test_colour_is_torchvisions_sample_by_sample(aug_plus):
    """The same draws through torchvision's functional operations, in the order of MoCo v2 and of v1."""
    N = 60
    crops = torch.randint(256, (N, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    args = parse("--mean", 0, 0, 0, "--std", 1, 1, 1, *["--no-aug_plus"] * (not aug_plus))
    ours = mhcl.color_views(crops, args, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    gray = common.bernoulli(torch.full((N,), 0.2), generator)
    strength = (0.4, 0.4, 0.4, 0.1 if aug_plus else 0.4)
    p = torch.full((N,), 0.8 if aug_plus else 1.0)
    where, factors, order = common.draw_color_jitter(strength, p, generator)
    blur, sigma = torch.zeros(N, dtype=torch.bool), torch.zeros(N)
    if aug_plus:
        blur = common.bernoulli(torch.full((N,), 0.5), generator)
        sigma = torch.empty(N).uniform_(0.1, 2.0, generator=generator)
    for i in range(N):
        x = crops[i].float() / 255
        if gray[i] and not aug_plus:
            x = TF.rgb_to_grayscale(x, 3)
        if where[i]:
            x = torchvision_jitter(x, factors[i], order[i])
        if gray[i] and aug_plus:
            x = TF.rgb_to_grayscale(x, 3)
        if blur[i]:
            x = TF.gaussian_blur(x, [13, 13], [sigma[i].item()] * 2)
        assert_same_colours(ours[i], x)
    assert gray.any() and (~gray).any() and blur.any() == aug_plus


# ------------------------------------------------------------------ training steps


def plain_views(crops, args, generator):
    return common.normalize(crops / 255, args.mean, args.std, torch.uint8)


def train_two_steps(scenes, out, monkeypatch, flags):
    """Trains without BatchNorm and colour; returns flags, the batches that were fetched, the checkpoint."""
    more = [
        "--arch",
        "test_convnext",
        "--batch_size_per_gpu",
        8,
        "--lr",
        1.6,
        "--warmup_epochs",
        0,
        "--max_steps",
        2,
    ]
    more += [
        "--moco_k",
        24,
        "--moco_dim",
        8,
        "--weight_decay",
        0.1,
        "--moco_m",
        0.9,
        "--log_every",
        1,
        *flags,
    ]
    args = parse(*tiny("mhcl", *more))
    args.data_path, args.output_dir, batches = scenes / "train", out, []
    mhcl.check_args(args)
    args.data_path, args.output_dir = str(args.data_path), str(out)
    fetch = common.Run.fetch
    with monkeypatch.context() as patch:
        patch.setattr(mhcl, "color_views", plain_views)
        patch.setattr(common.Run, "fetch", lambda run: batches.append(fetch(run)) or batches[-1])
        mhcl.train(args, ALONE)
    return args, batches, common.load_checkpoint(out / "checkpoint.pth")


def naive_training(args, batches):
    """The same with plain loops, from the specification: one parameter at a time, a whole batch each step."""
    encoder_q, encoder_k = mhcl.build_encoders(args)
    weights = WEIGHTS if args.mhcl else (1.0,)
    queue = MHCLLoss(weights, 8, 24, 0.2).queue
    parameters = dict(encoder_q.named_parameters())
    momenta = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses, pointer = [], 0
    for step in range(2):
        micro = batches[step * args.accum_steps : (step + 1) * args.accum_steps]
        x_q, x_k = (plain_views(torch.cat([crops[view] for crops in micro]), args, None) for view in (0, 1))
        q, k = encoder_q(x_q)[0], encoder_k(x_k)[0].detach()
        if args.mhcl:
            value, keys = naive_mhcl(q, k, queue, *mhcl.draw_hard(args, step, 4))
        else:
            logits = torch.cat([(q * k).sum(-1), q[:, 0] @ queue[0]], 1) / 0.2
            value, keys = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long)), k
        losses.append(value.item())
        encoder_q.zero_grad()
        value.backward()
        with torch.no_grad():
            lr = 1.6 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / 9))
            for name, p in parameters.items():
                decay = 0.1 if p.ndim > 1 and not name.endswith("bias") else 0.0
                momenta[name] = 0.9 * momenta[name] + p.grad + decay * p
                p.sub_(lr * momenta[name])
            for p_k, p_q in zip(encoder_k.parameters(), encoder_q.parameters(), strict=True):
                p_k.copy_(0.9 * p_k + 0.1 * p_q)
            for key in keys:
                queue[:, :, pointer % 24] = key
                pointer += 1
    return {"encoder_q": encoder_q.state_dict(), "encoder_k": encoder_k.state_dict(), "queue": queue}, losses


@pytest.mark.parametrize(
    "flags", [[], ["--no-mhcl", "--no-mlp"], ["--accum_steps", 4, "--batch_size_per_gpu", 2]], ids=str
)
def test_steps_equal_plain_loops(scenes, tmp_path, monkeypatch, flags):
    """Loss, SGD with decay, key encoder without gradient, queue; accumulation is one large batch."""
    args, batches, saved = train_two_steps(scenes, tmp_path, monkeypatch, flags)
    expected, losses = naive_training(args, batches)
    assert [line["loss"] for line in read_log(tmp_path)[1:]] == pytest.approx(losses, rel=1e-4)
    ours = {**saved, "queue": {"": saved["mhcl_loss"]["queue"]}}
    expected["queue"] = {"": expected["queue"]}
    for part, state in expected.items():
        for name, value in state.items():
            said = f"{part} {name}: {{}}".format
            torch.testing.assert_close(ours[part][name], value, atol=2e-5, rtol=1e-3, msg=said)
    assert saved["mhcl_loss"]["queue_ptr"] == 16


def test_no_gradient_reaches_the_key_encoder():
    encoder_q, encoder_k = mhcl.build_encoders(parse(*tiny("mhcl")))
    assert all(p.requires_grad for p in encoder_q.parameters())
    assert not any(p.requires_grad for p in encoder_k.parameters())
    q = encoder_q(torch.rand(4, 3, 32, 32))[0]
    loss, hard = make_loss(C=128), draws()
    value, keys, parts = loss(q, encoder_k(torch.rand(4, 3, 32, 32))[0], hard)
    value.backward()
    assert not any(x.requires_grad for x in (keys, *parts, loss.queue)) and all(
        p.grad is None for p in encoder_k.parameters()
    )


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "flags", [[], ["--no-mhcl", "--no-mlp", "--no-aug_plus", "--no-cos", "--schedule", "1"]]
)
def test_whole_run_writes_everything(train, tmp_path, flags):
    saved = train(tmp_path, "--log_every", "2", *flags, script="mhcl")
    rows, scales = (1, 1) if flags else (8, 4)
    assert saved["step"] == 21 and saved["epoch"] == 3 and saved["args"]["arch"] == "test_resnet"
    assert saved["mhcl_loss"]["queue"].shape == (rows, 128, 16) and saved["mhcl_loss"]["queue_ptr"] == 84 % 16
    lines = read_log(tmp_path)
    assert lines[0]["effective_batch"] == 4 and lines[0]["steps"] == 21 and lines[-1]["step"] == 21
    assert lines[0]["chance_cross_entropy"] == pytest.approx(math.log(17)) and lines[0]["bn_groups"] == 2
    for name, length in {
        "top1": scales,
        "positive": scales,
        "negative": scales,
        "cross_entropy": rows,
    }.items():
        assert len(lines[-1][name]) == length and all(map(math.isfinite, lines[-1][name]))
    for name in ("feature_std", "lr", "images_per_s", "data_seconds", "unreadable", "epoch"):
        assert math.isfinite(lines[-1][name])
    weights = WEIGHTS if scales == 4 else [1]
    terms = zip(weights, lines[-1]["cross_entropy"], strict=True)
    assert lines[-1]["loss"] == pytest.approx(sum(weight * term for weight, term in terms), rel=1e-5)
    backbone = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0)
    prefix = "backbone."
    query = {k.removeprefix(prefix): v for k, v in saved["encoder_q"].items() if k.startswith(prefix)}
    assert_same(dict(backbone.state_dict()), query)
    assert Image.open(tmp_path / "views.png").size == (2 * 34 + 2, 4 * 34 + 2)  # 4 images, 2 views


def test_picture_of_views_shows_what_the_encoders_get(train, tmp_path, monkeypatch):
    """A row for each image, its two views; keys are encoded in another order, of Shuffle-BN."""
    seen, rows, save_grid = [], [], common.save_grid
    forward = mhcl.Encoder.forward
    monkeypatch.setattr(mhcl, "color_views", plain_views)
    monkeypatch.setattr(
        mhcl.Encoder, "forward", lambda self, x, *more: (seen.append(x), forward(self, x, *more))[1]
    )
    monkeypatch.setattr(
        common, "save_grid", lambda path, *more: (rows.extend(more[0]), save_grid(path, *more))[1]
    )
    train(tmp_path, "--max_steps", "1", script="mhcl")
    keys, queries = seen
    shuffle = Shuffle(4, common.stream_seed(0, "shuffle", 0, 0), ALONE)
    assert_same([row[0] for row in rows], list(queries))
    assert_same([row[1] for row in rows], list(keys[shuffle.idx_unshuffle]))
    assert shuffle.idx_unshuffle.tolist() != list(range(4))


def learning_rates(*flags):
    """The rate of each of the steps of three epochs of seven steps, at 1/64 of the batch that --lr is for."""
    args, run = (
        parse("--lr", 0.64, "--epochs", 3, *flags),
        SimpleNamespace(effective_batch=4, steps_per_epoch=7),
    )
    run.total_steps = 21
    mhcl.check_args(args)
    return [mhcl.learning_rate(step, run, args) for step in range(21)]


def test_learning_rate_is_a_cosine_or_falls_in_steps(train, tmp_path):
    assert learning_rates() == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * step / 21)) for step in range(21)]
    )
    steps = learning_rates("--no-cos", "--schedule", 1, 2)
    assert steps == pytest.approx([0.01] * 7 + [0.001] * 7 + [0.0001] * 7)
    warm = learning_rates("--no-cos", "--schedule", 2, "--warmup_epochs", 1)
    assert warm == pytest.approx([0.01 * step / 7 for step in range(7)] + [0.01] * 7 + [0.001] * 7)
    saved = train(tmp_path, "--max_steps", 3, script="mhcl")
    groups = [(g["momentum"], g["nesterov"], g["weight_decay"]) for g in saved["optimizer"]["param_groups"]]
    assert groups == [(0.9, False, 1e-4), (0.9, False, 0)] and read_log(tmp_path)[-1]["lr"] == pytest.approx(
        0.03 * 4 / 256 * 2 / 7
    )


def test_either_encoder_can_be_evaluated_and_taken_further(train, run, scenes, tmp_path, capsys):
    saved = train(tmp_path / "a", "--max_steps", "4", script="mhcl")
    base = ["--data_path", scenes, "--nb_knn", "1", "--output_dir", tmp_path, "--num_workers", "0"]
    checkpoint = str(tmp_path / "a" / "checkpoint.pth")
    run("eval_knn", *base, "--weights", tmp_path / "a", checkpoint)
    run("eval_knn", *base, "--weights", checkpoint, "--checkpoint_key", "encoder_k")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["arch"] for line in lines] == ["test_resnet"] * 3
    assert lines[0]["top1"] == lines[1]["top1"]  # the query encoder is the default of both
    for key in ("encoder_q", "encoder_k"):
        state, info = common.read_weights(checkpoint, key)
        assert info["arch"] == "test_resnet" and torch.equal(
            state["layer1.0.conv1.weight"], saved[key]["backbone.layer1.0.conv1.weight"]
        )
    capsys.readouterr()
    frozen = ["--max_steps", "1", "--lr", "1e-30", "--weight_decay", "0"]
    second = train(tmp_path / "b", "--init", checkpoint, *frozen, script="mhcl")
    assert "tensors loaded, 0 missing" in capsys.readouterr().out
    for key in ("encoder_q", "encoder_k"):  # the key encoder starts as the query encoder
        name = "backbone.layer1.0.conv1.weight"
        assert torch.equal(second[key][name], saved["encoder_q"][name])


def test_a_queue_of_more_than_half_the_data_is_warned_about(train, tmp_path, capsys):
    train(tmp_path / "a", "--moco_k", "12", "--max_steps", "1", script="mhcl")
    assert "warning" not in capsys.readouterr().err
    train(tmp_path / "b", "--moco_k", "16", "--max_steps", "1", script="mhcl")
    assert "warning: --moco_k 16: more than half of the 30 images" in capsys.readouterr().err


def test_a_batch_of_one_image_trains_without_batchnorm(train, tmp_path):
    saved = train(
        tmp_path, "--arch", "test_convnext", "--batch_size_per_gpu", "1", "--max_steps", "2", script="mhcl"
    )
    assert saved["step"] == 2


@pytest.mark.parametrize("arch", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_backbones_without_batchnorm_train_with_adamw(train, tmp_path, arch):
    flags = ["--arch", arch, "--optimizer", "adamw", "--max_steps", "1", "--batch_size_per_gpu", "2"]
    saved = train(tmp_path, *flags, script="mhcl")
    assert saved["step"] == 1 and read_log(tmp_path)[0]["bn_groups"] == 1


def test_batchnorm_groups_are_those_of_moco():
    """32 images each, on one process two groups at least."""
    for world_size, batch, groups in ((1, 128, 4), (1, 24, 2), (1, 100, 2), (1, 96, 3), (2, 128, 1)):
        args = parse("--batch_size_per_gpu", batch)
        process = Process(0, world_size, torch.device("cpu"), None)
        assert mhcl.batchnorm_groups(torch.nn.BatchNorm2d(2), args, process) == groups
        assert mhcl.batchnorm_groups(torch.nn.LayerNorm(2), args, process) == 1


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu_resumes(train, tmp_path, amp):
    flags = ["--device", "cuda", "--amp", amp, "--log_every", "1", "--max_steps"]
    train(tmp_path, *flags, "2", script="mhcl")
    saved = train(tmp_path, *flags, "4", script="mhcl")
    lines = read_log(tmp_path)
    assert saved["step"] == 4 and all(math.isfinite(line["loss"]) for line in lines if "loss" in line)

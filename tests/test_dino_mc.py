import json
import math
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import assert_same, assert_same_colours, assert_same_state, tiny, torchvision_jitter
from PIL import Image
from torchvision.transforms import InterpolationMode

import common
import dino_mc
from common import Process
from dino_mc import DINOHead, DINOLoss, Network, View, ViewDataset

ALONE = Process(0, 1, torch.device("cpu"), None)
IMAGENET = Namespace(mean=common.IMAGENET_MEAN, std=common.IMAGENET_STD)
AS_IS = Namespace(mean=(0.0,) * 3, std=(1.0,) * 3)
PLAIN = {"p_flip": 0.0, "p_jitter": 0.0, "p_gray": 0.0, "p_blur": 0.0}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ loss, centre


@pytest.mark.parametrize("T, V", [(2, 8), (3, 9), (2, 2)])
def test_loss_equals_a_double_loop_over_pairs(T, V):
    B, K, tau_s, tau_t = 5, 7, 0.1, 0.04
    student, teacher = rand(V, B, K), rand(T, B, K, seed=1)
    loss = DINOLoss(K, tau_s)
    loss.center.copy_(rand(K, seed=2))
    total, pairs = 0.0, 0
    for i in range(T):
        for v in range(V):
            if v == i:
                continue
            for b in range(B):
                P = [math.exp((teacher[i, b, k] - loss.center[k]) / tau_t) for k in range(K)]
                q = [math.exp(student[v, b, k] / tau_s) for k in range(K)]
                total += -sum(P[k] / sum(P) * math.log(q[k] / sum(q)) for k in range(K)) / B
            pairs += 1
    assert pairs == T * (V - 1)
    assert loss(student, teacher, tau_t).item() == pytest.approx(total / pairs, rel=1e-4)


def test_loss_is_float32_under_autocast_and_leaves_the_centre():
    loss = DINOLoss(16)
    value = loss(rand(3, 4, 16).bfloat16(), rand(2, 4, 16).bfloat16(), 0.04)
    assert value.dtype == torch.float32 and (loss.center == 0).all()


def test_centre_is_a_moving_mean_of_all_teacher_outputs_and_is_saved():
    loss, expected = DINOLoss(3), torch.zeros(3)
    for step in range(3):
        t = rand(2, 4, 3, seed=step)
        loss.update_center(t.mean((0, 1)))
        expected = 0.9 * expected + 0.1 * torch.stack([t[i, b] for i in range(2) for b in range(4)]).mean(0)
    torch.testing.assert_close(loss.center, expected)
    assert "center" in loss.state_dict()


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_warmups_are_evenly_spaced_and_reach_their_end(warmup):
    """Of temperature (by epochs) and rate (by steps): the first value is the start, the last the end."""
    flags = f"--epochs 8 --warmup_epochs {warmup} --warmup_teacher_temp_epochs {warmup} --teacher_temp .07"
    args = dino_mc.get_parser().parse_args(["--data_path", "x", "--output_dir", "x", *flags.split()])
    run = Namespace(total_steps=8, steps_per_epoch=1, effective_batch=256)
    values = [dino_mc.schedules(step, run, args) for step in range(8)]
    evenly = torch.linspace(0.04, 0.07, warmup).tolist() + [0.07] * (8 - warmup)
    assert [value["teacher_temp"] for value in values] == pytest.approx(evenly)
    waves = [0.5 * (1 + math.cos(math.pi * j / (8 - warmup))) for j in range(8 - warmup)]
    rates = torch.linspace(0, 5e-4, warmup).tolist() + [1e-6 + (5e-4 - 1e-6) * wave for wave in waves]
    assert [value["lr"] for value in values] == pytest.approx(rates)


def test_health_figures_of_known_cases():
    center = rand(8)
    figures = dino_mc.health(center.expand(2, 4, 8), center, 0.04)
    assert figures["entropy"] == pytest.approx(math.log(8)) and figures["kl"] == pytest.approx(0, abs=1e-6)
    one_each = 100 * torch.eye(8).view(2, 4, 8) + center
    figures = dino_mc.health(one_each, center, 0.04)
    assert figures["entropy"] == 0 and figures["kl"] == pytest.approx(math.log(8))


# ------------------------------------------------------------------ model


@pytest.mark.parametrize("use_bn", [False, True])
def test_head_is_the_cosine_with_unit_prototypes(use_bn):
    head = DINOHead(12, 20, use_bn=use_bn)
    x = rand(6, 12)
    linears = [module for module in head.mlp if isinstance(module, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [(12, 2048), (2048, 2048), (2048, 256)]
    hidden = x
    for number, linear in enumerate(linears):
        hidden = hidden @ linear.weight.T + linear.bias
        if number < 2:
            if use_bn:
                hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    prototypes = head.last_layer.parametrizations.weight.original1
    expected = torch.stack(
        [torch.stack([(h / h.norm()) @ (p / p.norm()) for p in prototypes]) for h in hidden]
    )
    torch.testing.assert_close(head(x), expected, atol=1e-4, rtol=0)


def test_head_initial_values_and_gain():
    head = DINOHead(64, 100)
    gain = head.last_layer.parametrizations.weight.original0
    assert (gain == 1).all() and not gain.requires_grad
    assert DINOHead(64, 100, norm_last_layer=False).last_layer.parametrizations.weight.original0.requires_grad
    assert head.last_layer.bias is None
    for module in head.mlp:
        if isinstance(module, torch.nn.Linear):
            assert (module.bias == 0).all() and module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.weight.abs().max() <= 2


class Recorder(torch.nn.Module):
    def forward(self, x):
        self.seen = x
        return x.mean((2, 3))


def test_network_drops_the_patch_remainder_at_the_right_and_bottom():
    network = Network(Recorder(), torch.nn.Identity(), 16)
    x = rand(2, 3, 50, 50)
    network([x])
    assert torch.equal(network.backbone.seen, x[:, :, :48, :48])


def test_network_runs_groups_in_order():
    network = Network(common.build_backbone("test_vit", 32, 8).eval(), DINOHead(64, 16), 8)
    groups = [rand(4, 3, 32, 32), rand(2, 3, 24, 24, seed=1), rand(6, 3, 21, 21, seed=2)]
    out, features = network(groups)
    assert out.shape == (12, 16) and features.shape == (12, 64)
    singles = torch.cat([network([x.unsqueeze(0)])[0] for group in groups for x in group])
    torch.testing.assert_close(out, singles, atol=1e-5, rtol=0)


ARCHS = ("vit_small_patch16_224 vit_small_patch8_224 resnet50 wide_resnet50_2 swin_tiny_patch4_window7_224 "
         "convnext_atto efficientnet_b0").split()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_backbone_takes_every_size_of_crop(arch, img_size=96):
    backbone = common.build_backbone(arch, img_size)
    multiple = common.patch_multiple(backbone)
    sizes = dino_mc.local_sizes("mc", img_size, 6, None, multiple)
    network = Network(backbone.eval(), torch.nn.Identity(), multiple)
    odd = [img_size, *sizes, sizes[-1] + 1]
    with torch.no_grad():
        assert dino_mc.feature_width(backbone, "an arch", odd, multiple) == backbone.num_features
        out, features = network.eval()([rand(1, 3, size, size) for size in odd])
    assert features.shape == (len(odd), backbone.num_features) and out.isfinite().all()


def test_synchronised_batchnorm_keeps_activations(monkeypatch):
    """What several GPUs would train is the net that one GPU trains."""
    backbone = common.build_backbone("efficientnet_b0", 32).eval()
    x = rand(2, 3, 32, 32)
    expected = backbone(x)
    converted = timm.layers.convert_sync_batchnorm(backbone)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted(x), expected)


def test_swin_and_vit_take_the_papers_sizes_at_224():
    for arch in ("swin_tiny_patch4_window7_224", "vit_small_patch16_224"):
        backbone = common.build_backbone(arch, 224)
        multiple = common.patch_multiple(backbone)
        sizes = dino_mc.local_sizes("mc", 224, 6, None, multiple)
        assert sizes == [184, 164, 144, 124, 104, 84]
        assert dino_mc.feature_width(backbone, "an arch", [224, *sizes], multiple) == backbone.num_features


# ------------------------------------------------------------------ views


def test_local_sizes_follow_the_paper():
    papers = [184, 164, 144, 124, 104, 84]
    assert dino_mc.local_sizes("mc", 224, 6, None, 16) == papers  # remainders are cut later
    assert dino_mc.local_sizes("mc", 224, 2, None, 16) == [104, 84]  # fewer: the smallest
    assert dino_mc.local_sizes("tp", 112, 6, None, 1) == [92, 82, 72, 62, 52, 42]
    assert dino_mc.local_sizes("mc", 64, 6, None, 8) == [48, 40, 40, 32, 24, 24]
    assert dino_mc.local_sizes("dino", 224, 3, None, 16) == [96, 96, 96]
    assert dino_mc.local_sizes("mc", 224, 3, [32], 16) == [32, 32, 32]
    assert dino_mc.local_sizes("mc", 224, 2, [48, 33], 16) == [48, 33]
    assert dino_mc.local_sizes("mc", 224, 0, None, 16) == []


def test_views_follow_the_paper():
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    jitter = (0.4, 0.4, 0.2, 0.1)
    global_1 = View(224, (0.32, 1.0), bicubic, True, 0, 0.5, jitter, 0.8, 0.2, 1.0, 0.0)
    global_2 = View(224, (0.32, 1.0), bicubic, True, 0, 0.5, jitter, 0.8, 0.2, 0.1, 0.2)
    make = partial(
        dino_mc.make_views, img_size=224, sizes=[104, 84], global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)
    )
    assert make("mc") == [
        global_1,
        global_2,
        *(
            View(size, (0.05, 0.32), bilinear, False, 0, 0.5, (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, 0.0)
            for size in (104, 84)
        ),
    ]
    assert make("dino") == [
        global_1,
        global_2,
        *(View(size, (0.05, 0.32), bicubic, False, 0, 0.5, jitter, 0.8, 0.2, 0.5, 0.0) for size in (104, 84)),
    ]
    a = View(224, (0.32, 1.0), bicubic, True, 1, 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0.0)
    tp = make("tp")
    assert [view.date for view in tp] == [1, 2, 0, 0, 0]
    assert tp[0] == a and tp[2] == replace(a, date=0) and tp[1] == replace(a, date=2, **PLAIN)
    assert tp[3:] == [View(size, (0.05, 0.32), bilinear, jitter=jitter, **PLAIN) for size in (104, 84)]


def views_of(mode, sizes=(20, 16)):
    return dino_mc.make_views(mode, 32, sizes, (0.32, 1.0), (0.05, 0.32))


def test_samples_depend_on_seed_epoch_and_index_alone(scenes):
    samples = common.Samples(common.list_images(scenes / "train"))
    dataset = ViewDataset(samples, views_of("mc"), 0)
    first = dataset[3, 5]
    torch.manual_seed(99)
    assert_same(dataset[3, 5], first)
    assert [tuple(view.shape) for view in first] == [(3, 32, 32), (3, 32, 32), (3, 20, 20), (3, 16, 16)]
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in first)
    for other in (dataset[4, 5], ViewDataset(samples, views_of("mc"), 1)[3, 5]):
        assert not torch.equal(other[0], first[0])
    assert not torch.equal(first[0], first[1])


def test_batches_do_not_depend_on_the_number_of_workers(scenes):
    dataset = ViewDataset(common.Samples(common.list_images(scenes / "train")), views_of("mc"), 0)
    runs = []
    for workers in (0, 1, 3):
        sampler = common.StepSampler(len(dataset), 4, 2, ALONE, 0, 1, 5)
        runs.append(list(common.build_loader(dataset, sampler, workers, torch.device("cpu"))))
    assert len(runs[0]) == 8
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_crops_cover_the_given_share_of_the_area(tmp_path):
    # The image's red and green tell the position; the extent of a crop is read back from its own values.
    ramp = torch.arange(200).float().expand(200, 200) * 255 / 199
    image = torch.stack([ramp, ramp.T, torch.zeros(200, 200)]).byte()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "ramp.png")
    local = View(100, (0.05, 0.32), InterpolationMode.BILINEAR, **PLAIN)
    dataset = ViewDataset(common.Samples([str(tmp_path / "ramp.png")]), [local], 0)
    areas = []
    for epoch in range(300):
        (crop,) = dataset[epoch, 0]
        width, height = (crop[c].max().item() - crop[c].min().item() + 2 for c in (0, 1))
        areas.append(width * height / 255**2)
    assert 0.03 < min(areas) < 0.08 and 0.29 < max(areas) < 0.35


def test_tp_draws_different_dates_and_repeats_where_there_are_few(tmp_path):
    def sample(dates, epoch):
        paths = []
        for date in range(dates):
            paths.append(str(tmp_path / f"{date}.png"))
            Image.new("RGB", (40, 40), (50 * date, 0, 0)).save(paths[-1])
        views = [replace(view, p_flip=0.0) for view in views_of("tp")]
        dataset = ViewDataset(common.Samples(paths), views, 0, [list(range(dates))])
        return [int(view[0].float().mean() / 50) for view in dataset[epoch, 0]]

    drawn = [sample(4, epoch) for epoch in range(30)]
    for t1, t2, t0, *local in drawn:
        assert len({t0, t1, t2}) == 3 and local == [t0, t0]
    assert {date for dates in drawn for date in dates} == {0, 1, 2, 3}
    for t1, t2, t0, *local in [sample(2, epoch) for epoch in range(10)]:
        assert t1 != t0 and t2 == t0 and local == [t0, t0]
    assert sample(1, 0) == [0] * 5


def test_locations_are_the_dates_of_a_folder_window_by_window(scenes):
    samples = common.Samples(common.list_images(scenes / "locations"))
    locations = {}
    for mode, one_date in (("mc", True), ("tp", False), ("mc", False)):
        args = Namespace(mode=mode, one_date_per_location=one_date, data_path=scenes)
        groups = dino_mc.group_locations(samples, args)
        locations[mode, one_date] = groups and list(groups)
    assert locations["mc", True] == locations["tp", False] and locations["mc", False] is None
    assert locations["tp", False] == [[3 * place + date for date in range(3)] for place in range(10)]
    tiles = common.Samples(samples.paths, tile_size=24)  # four windows of each image of 48 px
    args = Namespace(mode="tp", one_date_per_location=False, data_path=scenes)
    for dates in dino_mc.group_locations(tiles, args):
        places = [tiles.place(index) for index in dates]
        assert len({window for _, window, _ in places}) == 1 and len(dates) == 3
        assert len({image // 3 for image, *_ in places}) == 1


def test_views_without_colour_are_the_normalised_crops():
    views = [replace(view, **PLAIN, p_solarize=0.0) for view in views_of("mc", (20, 16, 16))]
    crops = [torch.randint(256, (4, 3, view.size, view.size), dtype=torch.uint8) for view in views]
    groups = dino_mc.color_views(crops, views, IMAGENET, torch.Generator())
    assert [tuple(group.shape) for group in groups] == [(8, 3, 32, 32), (4, 3, 20, 20), (8, 3, 16, 16)]
    flat = [view for group in groups for view in group.split(4)]
    for crop, view in zip(crops, flat, strict=True):
        torch.testing.assert_close(
            view, common.normalize(crop / 255, common.IMAGENET_MEAN, common.IMAGENET_STD, torch.uint8)
        )


@pytest.mark.parametrize("mode", ["mc", "tp"])
def test_colour_is_torchvisions_sample_by_sample(mode):
    """The same draws through torchvision's operations: jitter, grey, blur, solarize."""
    B, views = 20, views_of(mode)
    crops = [torch.randint(256, (B, 3, view.size, view.size), dtype=torch.uint8) for view in views]
    groups = dino_mc.color_views(crops, views, AS_IS, torch.Generator().manual_seed(0))
    generator, T, changed = torch.Generator().manual_seed(0), 3 if mode == "tp" else 2, 0
    for group, members in zip(groups, (range(T), [T], [T + 1]), strict=True):

        def chances(name, members=members):
            return torch.tensor([getattr(views[v], name) for v in members]).repeat_interleave(B)

        where, factors, order = common.draw_color_jitter(
            views[members[0]].jitter, chances("p_jitter"), generator
        )
        gray = common.bernoulli(chances("p_gray"), generator)
        sigma = torch.empty(len(group)).uniform_(0.1, 2, generator=generator)
        blurred = common.bernoulli(chances("p_blur"), generator)
        solarized = common.bernoulli(chances("p_solarize"), generator)
        for i, x in enumerate(torch.cat([crops[v] for v in members]).float() / 255):
            if where[i]:
                x = torchvision_jitter(x, factors[i], order[i])
            if gray[i]:
                x = TF.rgb_to_grayscale(x, 3)
            if blurred[i]:
                x = TF.gaussian_blur(x, [13, 13], [sigma[i].item()] * 2)
            if solarized[i]:
                x = TF.solarize(x, 128 / 255)
            assert_same_colours(group[i], x)
            changed += bool(where[i] and gray[i] and blurred[i])
    assert changed


def colored(mode, **changes):
    """200 noise images through the global views of a mode: pairs of a view and its crops."""
    views = [replace(view, p_jitter=0.0, p_gray=0.0, **changes) for view in views_of(mode, ())]
    crops = [torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8) for _ in views]
    (group,) = dino_mc.color_views(crops, views, AS_IS, torch.Generator().manual_seed(0))
    return list(zip(group.split(200), crops, strict=True))


def test_each_view_gets_its_own_blur_and_solarize():
    def blurred(view, crops):
        roughness = [x.diff(dim=-1).abs().mean((1, 2, 3)) for x in (view, crops / 255)]
        return (roughness[0] < 0.7 * roughness[1]).float().mean().item()

    def solarized(view, crops):
        return (view.amax((1, 2, 3)) < 0.51).float().mean().item()  # noise has values up to 1

    # a sigma below .35 px, 13 % of the draws, leaves noise nearly as it is
    assert [blurred(*pair) for pair in colored("mc", p_solarize=0.0)] == pytest.approx(
        [0.87, 0.087], abs=0.06
    )
    assert [solarized(*pair) for pair in colored("mc", p_blur=0.0)] == pytest.approx([0, 0.2], abs=0.08)
    assert [blurred(*pair) for pair in colored("tp")] == pytest.approx([0.43, 0, 0.43], abs=0.09)


# ------------------------------------------------------------------ training steps


def test_clipping_is_per_tensor():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4,), (2, 3), (5,))]
    parameters[0].grad, parameters[1].grad = 10 * rand(4), 0.01 * rand(2, 3)
    before = [p.grad.clone() for p in parameters[:2]]
    dino_mc.clip_gradients(parameters, 3.0)
    for p, grad in zip(parameters, before, strict=False):
        norm = math.sqrt(sum(value**2 for value in grad.flatten().tolist()))
        torch.testing.assert_close(p.grad, grad * min(1, 3.0 / (norm + 1e-6)))
    assert parameters[0].grad.norm() == pytest.approx(3, rel=1e-4) and parameters[2].grad is None


# Large: AdamW would blow up the rounding noise of gradients that are 0 by symmetry (attention's key bias).
EPS = 1e-4
STEPS = "--batch_size_per_gpu 8 --epochs 2 --warmup_epochs 1 --drop_path 0 --lr 0.08 --log_every 1".split()


@pytest.fixture
def plain_train(train, monkeypatch):
    """A run of 2 epochs of 3 steps whose views are only cropped, so that plain loops can repeat it."""
    make_views, build_optimizer = dino_mc.make_views, common.build_optimizer
    monkeypatch.setattr(
        dino_mc, "make_views", lambda *args: [replace(v, **PLAIN, p_solarize=0.0) for v in make_views(*args)]
    )

    def with_eps(model, args):
        optimizer = build_optimizer(model, args)
        for group in optimizer.param_groups:
            group["eps"] = EPS
        return optimizer

    monkeypatch.setattr(common, "build_optimizer", with_eps)

    def run(out, *flags):
        saved = train(out, *STEPS, *flags)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return saved, [line["loss"] for line in log if "loss" in line]

    return run


def naive_training(args, paths):
    """The six steps with plain loops, from the paper: the same crops, one parameter at a time."""
    student, teacher, views = dino_mc.build_networks(args)
    teacher.load_state_dict(student.state_dict())
    dataset = ViewDataset(common.Samples(paths), views, 0)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    center, losses, updates = torch.zeros(args.out_dim), [], dict.fromkeys(parameters, 0)
    for step, samples in enumerate(common.StepSampler(30, 8, 1, ALONE, 0, 0, 6)):
        crops = [torch.stack(view) for view in zip(*(dataset[sample] for sample in samples), strict=True)]
        x = [common.normalize(view / 255, common.IMAGENET_MEAN, common.IMAGENET_STD, torch.uint8)
             for view in crops]
        t = [teacher.head(teacher.backbone(view)) for view in x[:2]]
        s = [student.head(student.backbone(view)) for view in x]
        pairs = [(i, v) for i in range(2) for v in range(4) if v != i]
        loss = sum(
            -(((t[i] - center) / 0.04).softmax(1) * F.log_softmax(s[v] / 0.1, 1)).sum(1).mean()
            for i, v in pairs
        ) / len(pairs)
        losses.append(loss.item())
        student.zero_grad()
        loss.backward()
        wave = 0.5 * (1 + math.cos(math.pi * step / 6))
        decay, momentum, lr = 0.4 - 0.36 * wave, 1 - 0.004 * wave, rate(step)
        with torch.no_grad():
            for name, p in parameters.items():
                if step < 3 and name.startswith("head.last_layer"):
                    continue  # the prototypes rest in the first epoch
                grad = p.grad * min(1.0, 3.0 / (p.grad.norm().item() + 1e-6))
                updates[name] += 1
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                if p.ndim > 1 and not name.endswith("bias"):
                    p.mul_(1 - lr * decay)
                m_hat, v_hat = m / (1 - 0.9 ** updates[name]), v / (1 - 0.999 ** updates[name])
                p.sub_(lr * m_hat / (v_hat.sqrt() + EPS))
            center = 0.9 * center + 0.1 * torch.cat(t).mean(0)
            for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
                p_t.copy_(momentum * p_t + (1 - momentum) * p_s)
    return student.state_dict(), teacher.state_dict(), center, losses


def rate(step):
    """Of .08 * 8 / 256: a warm-up over the 3 steps of the first epoch, then a cosine to 1e-6."""
    base = 0.08 * 8 / 256
    wave = 0.5 * (1 + math.cos(math.pi * (step - 3) / 3))
    return base * step / 2 if step < 3 else 1e-6 + (base - 1e-6) * wave


def assert_close(ours, expected):
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_training_equals_plain_loops(plain_train, scenes, tmp_path):
    """Loss, clipping, resting prototypes, AdamW with scheduled decay, centre and teacher."""
    saved, losses = plain_train(tmp_path)
    flags = ["--data_path", "x", "--output_dir", "x", *tiny("dino_mc"), *STEPS]
    args = dino_mc.get_parser().parse_args(flags)
    common.check_bands(args)
    student, teacher, center, expected = naive_training(args, common.list_images(scenes / "train"))
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(saved["dino_loss"]["center"], center, atol=1e-6, rtol=1e-3)
    assert_close(saved["student"], student)
    assert_close(saved["teacher"], teacher)
    assert not torch.equal(student["head.mlp.0.weight"], teacher["head.mlp.0.weight"])
    prototypes = "head.last_layer.parametrizations.weight.original"
    assert (saved["student"][prototypes + "0"] == 1).all()  # the gain is not trained


def test_accumulation_equals_the_large_batch(plain_train, tmp_path):
    whole, losses = plain_train(tmp_path / "a")
    parts, losses_of_parts = plain_train(tmp_path / "b", "--batch_size_per_gpu", "2", "--accum_steps", "4")
    assert losses_of_parts == pytest.approx(losses, rel=1e-4) and parts["step"] == 6
    for network in ("student", "teacher"):
        assert_close(parts[network], whole[network])
    torch.testing.assert_close(parts["dino_loss"]["center"], whole["dino_loss"]["center"])


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "arch, flags, data, steps",
    [("test_vit", [], "train", 21), ("test_resnet", ["--use_bn_in_head"], "val", 15)],
)
def test_whole_run_writes_everything(train, tmp_path, arch, flags, data, steps):
    flags += ["--arch", arch] if arch != "test_vit" else []
    saved = train(tmp_path, "--log_every", "2", *flags, data=data)
    assert saved["step"] == steps and saved["epoch"] == 3 and saved["args"]["arch"] == arch
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["effective_batch"] == 4 and lines[0]["steps"] == steps and lines[-1]["step"] == steps
    names = ("loss feature_std grad_norm entropy kl lr weight_decay momentum teacher_temp images_per_s "
             "data_seconds unreadable epoch")
    for name in names.split():
        assert math.isfinite(lines[-1][name])
    backbone = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0)
    teacher = {
        name.removeprefix("backbone."): value
        for name, value in saved["teacher"].items()
        if name.startswith("backbone.")
    }
    assert_same(dict(backbone.state_dict()), teacher)
    picture = Image.open(tmp_path / "views.png")
    assert picture.size == (4 * 34 + 2, 4 * 34 + 2)  # 4 images, 2 global and 2 local views


@pytest.mark.parametrize("stop, flags", [
    (7, []),  # 7 steps an epoch: its end
    (10, "--mode dino --arch test_resnet --accum_steps 2 --batch_size_per_gpu 2".split()),
])
def test_resumed_run_equals_the_unbroken_one(train, tmp_path, stop, flags):
    unbroken = train(tmp_path / "a", *flags, "--num_workers", "2", "--save_every", "100", "--max_steps", "13")
    train(tmp_path / "b", *flags, "--max_steps", str(stop))
    assert_same_state(train(tmp_path / "b", *flags, "--max_steps", "13"), unbroken)


def test_tp_runs_on_locations(train, tmp_path):
    saved = train(tmp_path, "--mode", "tp", "--max_steps", "2", data="locations")
    assert saved["step"] == 2


def test_one_date_per_location_runs(train, tmp_path):
    saved = train(tmp_path, "--one_date_per_location", "--max_steps", "2", data="locations")
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert saved["step"] == 2 and header["images"] == 30 and header["samples"] == 10


def test_init_starts_the_backbone_from_our_own_output(train, tmp_path, capsys):
    first = train(tmp_path / "a", "--max_steps", "2")
    rest = "--max_steps 1 --lr 1e-30 --out_dim 32 --weight_decay 0 --weight_decay_end 0".split()
    second = train(tmp_path / "b", "--init", tmp_path / "a", *rest)
    assert "tensors loaded, 0 missing" in capsys.readouterr().out
    key = ["--init", tmp_path / "a" / "checkpoint.pth", "--checkpoint_key", "student"]
    third = train(tmp_path / "c", *key, *rest)
    for name, value in first["teacher"].items():
        if name.startswith("backbone."):
            assert torch.equal(second["student"][name], value) and torch.equal(second["teacher"][name], value)
            assert torch.equal(third["teacher"][name], first["student"][name])
    assert "trained with" not in capsys.readouterr().out
    train(tmp_path / "d", "--init", tmp_path / "a", *rest, "--mean", .5, .5, .5, "--std", .2, .2, .2)
    assert "; trained with --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225\n" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimizers(train, tmp_path, optimizer):
    train(tmp_path, "--optimizer", optimizer, "--max_steps", "1")
    group = train(tmp_path, "--optimizer", optimizer, "--max_steps", "2")["optimizer"]["param_groups"][0]
    assert group["momentum"] == 0.9 and not group["nesterov"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_training_on_a_gpu_resumes(train, tmp_path, amp):
    flags = ["--device", "cuda", "--amp", amp, "--log_every", "1", "--max_steps"]
    train(tmp_path, *flags, "2")
    saved = train(tmp_path, *flags, "4")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert saved["step"] == 4 and all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


@pytest.mark.gpu
@needs_gpu
def test_colour_on_a_gpu_is_that_of_the_cpu():
    views = views_of("mc", (20, 16, 16))
    crops = [torch.randint(256, (8, 3, view.size, view.size), dtype=torch.uint8) for view in views]
    cpu, gpu = (
        dino_mc.color_views([crop.to(device) for crop in crops], views, IMAGENET, common.generator(0))
        for device in ("cpu", "cuda")
    )
    for a, b in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=0)

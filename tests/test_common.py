import argparse
import copy
import math
import os
import platform
import struct
import zlib

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import common
from common import Process

ALONE = Process(0, 1, torch.device("cpu"), None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Eight images with flat, dark, bright and grey parts, where colour formulas have their special cases."""
    x = torch.rand(8, 3, 20, 24, generator=generator())
    x[0] = 0.5
    x[1, :, :5] = 0
    x[1, :, 5:9] = 1
    x[2] = x[2].mean(0)
    return x


# ------------------------------------------------------------------ seeds and samples


def test_stream_seed_depends_on_every_part_and_is_the_same_everywhere():
    seeds = {
        common.stream_seed(*parts)
        for parts in ((0, "a", 1, 2), (0, "a", 2, 1), (1, "a", 1, 2), (0, "b", 1, 2))
    }
    assert len(seeds) == 4
    assert (
        common.stream_seed(0, "geometry", 3, 7) == 63523105248240457
    )  # pinned: seeds must not change between versions


def batches(length, batch, accum, rank, world, start=0, end=None, seed=0):
    process = Process(rank, world, torch.device("cpu"), None)
    end = 2 * (length // (batch * accum * world)) if end is None else end
    return list(common.StepSampler(length, batch, accum, process, seed, start, end))


def test_sampler_takes_every_image_once_per_epoch_in_another_order():
    order = [key for batch in batches(12, 3, 1, 0, 1) for key in batch]
    for epoch in (0, 1):
        assert sorted(index for e, index in order if e == epoch) == list(range(12))
    assert [i for _, i in order[:12]] != [i for _, i in order[12:]]
    assert order != [key for batch in batches(12, 3, 1, 0, 1, seed=1) for key in batch]


def test_sampler_gives_any_split_of_the_effective_batch_the_same_steps():
    whole = batches(26, 12, 1, 0, 1)
    for batch, accum, world in ((3, 2, 2), (6, 1, 2), (4, 3, 1)):
        parts = [batches(26, batch, accum, rank, world) for rank in range(world)]
        for step, expected in enumerate(whole):
            found = [
                key for part in parts for micro in part[step * accum : (step + 1) * accum] for key in micro
            ]
            assert sorted(found) == sorted(expected)


def test_sampler_resumes_in_the_middle_of_an_epoch():
    whole = batches(20, 2, 2, 1, 2)
    assert batches(20, 2, 2, 1, 2, start=3) == whole[6:]
    assert len(common.StepSampler(20, 2, 2, ALONE, 0, 3, 7)) == 8


def test_list_images_finds_all_suffixes_at_any_depth_in_sorted_order(tmp_path):
    for name in ("b/c/x.JPG", "a.tif", "b/y.jpeg", "z.webp", "b/.hidden.png", "notes.txt", "b/ü n.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path in common.list_images(tmp_path)]
    assert found == sorted(["a.tif", "b/c/x.JPG", "b/y.jpeg", "b/ü n.png", "z.webp"])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1", "RGB"])
def test_read_image_makes_rgb_of_8_bit_modes(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture = Image.fromarray((np.arange(5 * 7 * 3) % 251).astype(np.uint8).reshape(5, 7, 3)).convert(mode)
    picture.save(path)
    image = common.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 7)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture.convert("RGB")))


def write_png_16_bit_rgb(path):
    """Pillow reads such files, but writes none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + struct.pack(">12H", *[3000] * 12) for _ in range(4)))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_read_image_refuses_damaged_files_and_other_bands(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    good = tmp_path / "good.png"
    Image.new("RGB", (64, 64)).save(good)
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:60])
    write_png_16_bit_rgb(tmp_path / "deep_rgb.png")
    for name, reason in (
        ("text", "cannot identify"),
        ("deep", "1 band, not 3"),
        ("half", "half.png"),
        ("gone", "No such"),
    ):
        with pytest.raises(common.UnreadableImageError, match=reason):
            common.read_image(tmp_path / f"{name}.png")
    assert (common.read_image(tmp_path / "deep_rgb.png") == 3000).all()  # all 16 bits


def test_skip_unreadable_takes_another_sample_and_says_so():
    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, key):
            if key[1] in (1, 2):
                raise common.UnreadableImageError(f"file {key[1]}")
            return key

    dataset = common.SkipUnreadable(Dataset())
    assert dataset[5, 0] == ((5, 0), [])
    assert dataset[5, 2] == ((5, 0), ["file 2", "file 1"])


@pytest.mark.parametrize("machine, avx512, amx, arm, native", [
    ("x86_64", True, False, True, True), ("x86_64", False, True, True, True),
    ("x86_64", False, False, True, False),  # where oneDNN would emulate it
    ("aarch64", False, False, True, True), ("arm64", True, True, False, False)])
def test_amp_auto_is_bf16_by_the_processors_capability(monkeypatch, machine, avx512, amx, arm, native):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm)
    cpu = torch.device("cpu")
    assert common.autocast_dtype("auto", cpu) == (torch.bfloat16 if native else None)
    assert common.autocast_dtype("bf16", cpu) == torch.bfloat16 and common.autocast_dtype("off", cpu) is None
    for amp in ("auto", "off"):  # attention is not fused in bf16 on a CPU
        common.choose_attention(amp, cpu)
        attention = common.build_backbone("test_vit", 32).blocks[0].attn
        assert attention.fused_attn == (amp == "off" or not native)


@pytest.mark.parametrize("kernel, groups", [(3, 1), (5, 1), (3, 16)])
@pytest.mark.parametrize("sides", [(1, 1), (3, 1)])
def test_strided_convolutions_of_single_pixels_have_a_finite_bf16_gradient(kernel, groups, sides):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(16, 32, kernel, 2, kernel // 2, groups=groups)
    plain, x = copy.deepcopy(conv), torch.randn(8, 16, *sides)
    conv = common.to_device(conv, torch.device("cpu"))
    torch.testing.assert_close(conv(x), plain(x))
    for _ in range(20):
        junk = [torch.full((2**18,), math.nan) for _ in range(4)]  # what freed memory may hold
        del junk
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x)
        y.float().square().sum().backward()
        assert conv.weight.grad.isfinite().all()


def test_warm_ups_are_short_in_short_runs_unless_given():
    cases = (None, 10, 300), (None, 10, 3), (2, 10, 3)
    assert [common.default_warmup(*args) for args in cases] == [10, 0.3, 2]


# ------------------------------------------------------------------ colour, sample by sample
# Agreement with torchvision's functional operations on float images: 1e-5; 2e-4 for hue.


@pytest.mark.parametrize(
    "name, factors",
    [
        ("brightness", [0, 0.2, 0.6, 1, 1.2, 1.4, 1.8, 2]),
        ("contrast", [0, 0.2, 0.6, 1, 1.2, 1.4, 1.8, 2]),
        ("saturation", [0, 0.2, 0.6, 1, 1.2, 1.4, 1.8, 2]),
        ("hue", [-0.5, -0.2, -0.1, 0, 0.05, 0.1, 0.2, 0.5]),
    ],
)
def test_adjustments_match_torchvision(images, name, factors):
    ours = getattr(common, f"adjust_{name}")(images.clone(), torch.tensor(factors, dtype=torch.float32))
    reference = getattr(TF, f"adjust_{name}")
    for image, factor, result in zip(images, factors, ours, strict=True):
        torch.testing.assert_close(
            result, reference(image, factor), atol=2e-4 if name == "hue" else 1e-5, rtol=0
        )


def test_color_jitter_applies_each_samples_own_factors_in_its_own_order(images):
    images = torch.cat([images, torch.rand(24, 3, 20, 24, generator=generator(1))])
    strength = (0.8, 0.8, 0.8, 0.2)
    where, factors, order = common.draw_color_jitter(strength, torch.full((32,), 0.7), generator(3))
    assert 0 < where.sum() < 32
    ours = common.color_jitter(images.clone(), where, factors, order)
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]

    def reference(i, kinds):
        image = images[i]
        for kind in kinds if where[i] else []:
            image = operations[kind](image, factors[i, kind].item())
        return image

    for i in range(32):
        torch.testing.assert_close(ours[i], reference(i, order[i].tolist()), atol=1e-3, rtol=0)
    in_one_order = [(ours[i] - reference(i, range(4))).abs().max() > 0.1 for i in range(32)]
    assert sum(in_one_order) >= 5  # so the order is seen in the result


def test_color_jitter_draws_cover_the_range_and_differ_by_sample():
    where, factors, order = common.draw_color_jitter(
        (0.4, 0.4, 0.2, 0.1), torch.full((4000,), 0.8), generator()
    )
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    assert (factors >= low).all() and (factors <= high).all()
    torch.testing.assert_close(factors.amin(0), low, atol=5e-3, rtol=0)
    torch.testing.assert_close(factors.amax(0), high, atol=5e-3, rtol=0)
    assert abs(where.float().mean() - 0.8) < 0.03
    counts = torch.stack(
        [(order == kind).float().mean(0) for kind in range(4)]
    )  # each kind at each turn: 1/4
    assert (counts - 0.25).abs().max() < 0.03
    assert (order.sort(1).values == torch.arange(4)).all()


@pytest.mark.parametrize("shape", [(20, 24), (5, 9)])
def test_blur_matches_torchvision(shape):
    images = torch.rand(4, 3, *shape, generator=generator())
    where, sigma = torch.tensor([True, False, True, True]), torch.tensor([0.1, 1.0, 0.7, 2.0])
    ours = common.gaussian_blur(images.clone(), where, sigma)
    kernel = 2 * min(6, min(shape) - 1) + 1
    for i, image in enumerate(images):
        expected = TF.gaussian_blur(image, [kernel, kernel], [sigma[i].item()] * 2) if where[i] else image
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=0)


def test_grayscale_solarize_and_normalize_match_torchvision(images):
    where = torch.arange(8) % 2 == 0
    gray, solar = common.grayscale(images.clone(), where), common.solarize(images.clone(), where)
    normal = common.normalize(images, common.IMAGENET_MEAN, common.IMAGENET_STD, torch.uint8)
    for i, image in enumerate(images):
        torch.testing.assert_close(
            gray[i], TF.rgb_to_grayscale(image, 3) if where[i] else image, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(solar[i], TF.solarize(image, 128 / 255) if where[i] else image)
        torch.testing.assert_close(normal[i], TF.normalize(image, common.IMAGENET_MEAN, common.IMAGENET_STD))


def test_solarize_threshold_is_128_in_8_bits():
    x = torch.tensor([127, 128]).view(1, 1, 1, 2).expand(1, 3, 1, 2) / 255
    assert torch.allclose(
        common.solarize(x.clone(), torch.tensor([True]))[0, 0, 0] * 255, torch.tensor([127.0, 127.0])
    )


def test_chance_is_per_sample():
    hit = (
        common.bernoulli(torch.tensor([0.0, 1.0, 0.5]).repeat_interleave(2000), generator())
        .float()
        .view(3, -1)
        .mean(1)
    )
    assert hit[0] == 0 and hit[1] == 1 and abs(hit[2] - 0.5) < 0.05


# ------------------------------------------------------------------ backbones, weights


def randomize(model):
    """Makes every tensor, BatchNorm statistics too, different from its initial value."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.05 * torch.rand(value.shape, generator=generator(value.numel())))
    return model.eval()


@pytest.mark.parametrize("arch", ["swin_tiny_patch4_window7_224", "test_vit", "resnet18", "vgg11"])
def test_drop_path_is_what_was_asked_for(arch):
    """Also for Swin, whose own default is not 0, and for nets that have none."""

    def rates(drop_path):
        modules = common.build_backbone(arch, 64, drop_path=drop_path).modules()
        return {m.drop_prob for m in modules if type(m).__name__ == "DropPath" and m.drop_prob}

    assert rates(0) == set()
    if arch == "vgg11":
        with pytest.raises(SystemExit):
            rates(0.2)
    else:
        assert max(rates(0.2)) == pytest.approx(0.2)


def test_backbone_in_channels_last_is_exported_and_stays(tmp_path):
    """As on a GPU, in the middle of training, compiled; safetensors takes contiguous tensors alone."""
    backbone = randomize(common.build_backbone("test_resnet", 32)).to(memory_format=torch.channels_last)
    backbone.compile(backend="eager")
    x = torch.rand(2, 3, 32, 32, generator=generator())
    before = backbone(x)
    common.export_backbone(backbone, tmp_path / "backbone", (0, 0, 0), (1, 1, 1))
    weights = [p for p in backbone.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights and not any(p.is_contiguous() for p in weights)
    loaded = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(loaded(x), before)


@pytest.mark.parametrize(
    "arch, patch",
    [("test_vit", 8), ("test_resnet", None), ("test_convnext", None), ("swin_tiny_patch4_window7_224", None)],
)
def test_exported_backbone_gives_the_same_features_through_timm(tmp_path, arch, patch):
    if arch.startswith("swin") and tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 31):
        pytest.skip("timm before 1.0.31 takes a Swin without classifier for one of its oldest checkpoints")
    backbone = randomize(common.build_backbone(arch, 64, patch, drop_path=0.1))
    common.export_backbone(backbone, tmp_path / "backbone", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    loaded = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0).eval()
    x = torch.rand(2, 3, 64, 64, generator=generator())
    assert torch.equal(loaded(x), backbone(x))
    config = {key: list(loaded.pretrained_cfg[key]) for key in ("mean", "std", "input_size")}
    assert config == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
    tuned = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=7).eval()
    torch.testing.assert_close(tuned.forward_head(tuned.forward_features(x), pre_logits=True), backbone(x))
    assert tuned(x).shape == (2, 7)
    state, info = common.read_weights(str(tmp_path))
    assert info["arch"] == arch and info["patch_size"] == patch and info["img_size"] == 64
    assert state.keys() == backbone.state_dict().keys()


def save(path, content):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return str(path)


@pytest.mark.parametrize(
    "layout", ["plain.pth", "plain.safetensors", "module.pth", "teacher.pth", "state_dict.pth"]
)
def test_weights_of_each_layout_give_the_features_of_their_source(tmp_path, layout):
    source = randomize(common.build_backbone("test_resnet", 32))
    state = source.state_dict()
    content = {
        "plain": state,
        "module": {f"module.{name}": value for name, value in state.items()},
        "teacher": {
            "teacher": {f"module.backbone.{name}": value for name, value in state.items()},
            "student": {},
        },
        "state_dict": {"state_dict": state},
    }[layout.split(".")[0]]
    backbone = common.build_backbone("test_resnet", 32).eval()
    state, _ = common.read_weights(save(tmp_path / layout, content))
    report = common.load_backbone(backbone, state, layout)
    assert f"{len(source.state_dict())} of {len(source.state_dict())} tensors loaded, 0 missing" in report
    x = torch.rand(2, 3, 32, 32, generator=generator())
    assert torch.equal(backbone(x), source(x))


def test_weights_of_another_size_are_resampled():
    small, large = common.build_backbone("test_vit", 32, 8), common.build_backbone("test_vit", 64, 8)
    report = common.load_backbone(large, small.state_dict(), "small")
    assert " 0 missing" in report
    assert large.pos_embed.shape != small.pos_embed.shape
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])


def test_swin_loads_its_own_weights():
    source, backbone = (common.build_backbone("swin_tiny_patch4_window7_224", 64).eval() for _ in range(2))
    assert " 0 missing" in common.load_backbone(backbone, source.state_dict(), "swin")
    x = torch.rand(1, 3, 64, 64, generator=generator())
    assert torch.equal(backbone(x), source(x))


def test_partial_weights_fail_unless_allowed(capsys):
    backbone = common.build_backbone("test_resnet", 32)
    other = {name: value for name, value in backbone.state_dict().items() if not name.startswith("layer2")}
    before = backbone.state_dict()["conv1.0.weight"].clone()
    with pytest.raises(SystemExit):
        common.load_backbone(backbone, {name: value + 1 for name, value in other.items()}, "half")
    error = capsys.readouterr().err
    assert "half" in error and "missing (layer2" in error and "--allow_partial" in error
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], before)
    common.load_backbone(
        backbone, {name: value + 1 for name, value in other.items()}, "half", allow_partial=True
    )
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], before + 1)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("content, reason", [(Evil(), "no state dict"), (b"garbage", "no PyTorch file")])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, capsys, content, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save({"teacher": content}, path)
    with pytest.raises(SystemExit):
        common.read_weights(str(path))
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_flags_in_a_public_checkpoint_are_no_obstacle(tmp_path):
    source = common.build_backbone("test_resnet", 32)
    content = {
        "teacher": {f"backbone.{name}": value for name, value in source.state_dict().items()},
        "args": argparse.Namespace(arch="resnet", patch_size=16),
        "epoch": 7,
    }
    state, info = common.read_weights(save(tmp_path / "checkpoint.pth", content))
    assert info == {} and state.keys() == source.state_dict().keys()


def test_export_survives_what_a_killed_one_left(tmp_path):
    (tmp_path / "backbone.new").mkdir()
    (tmp_path / "backbone.new" / ".tmp123").write_text("half")
    backbone = common.build_backbone("test_resnet", 32)
    for _ in range(2):
        common.export_backbone(backbone, tmp_path / "backbone", (0, 0, 0), (1, 1, 1))
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "backbone",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    "arch, patch",
    [("test_vit", 16), ("swin_tiny_patch4_window7_224", 4), ("test_resnet", 1), ("xcit_nano_12_p16_224", 16),
     ("pvt_v2_b0", 1)],  # whose patches overlap
)
def test_patch_multiple(arch, patch):
    assert common.patch_multiple(common.build_backbone(arch, 224)) == patch


def test_truncated_checkpoint_is_reported(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"teacher": torch.rand(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged|no PyTorch file"):
        common.load_checkpoint(path)


# ------------------------------------------------------------------ optimisation


def test_feature_std_is_0_when_collapsed_and_near_1_for_random_features():
    assert common.feature_std(torch.ones(8, 32)) == pytest.approx(0, abs=1e-6)
    assert common.feature_std(torch.randn(5000, 32)).item() == pytest.approx(1, abs=0.02)


def test_cosine_schedule():
    values = [common.cosine_schedule(2.0, 0.5, step, 10, warmup_steps=4) for step in range(11)]
    assert values[:4] == [0, 0.5, 1, 1.5]
    for step in range(4, 11):
        assert values[step] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * (step - 4) / 6)))
    assert values[4] == 2 and values[10] == pytest.approx(0.5)


def test_param_groups_spare_biases_and_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, plain = common.param_groups(model)
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape] and "weight_decay" not in decayed
    assert len(plain["params"]) == 4 and plain["weight_decay"] == 0


def test_ema_is_the_weighted_mean_of_parameters_and_leaves_buffers():
    online, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(online.weight)
    online.running_mean += 5
    expected = [0.9 * a + 0.1 * o for a, o in zip(average.parameters(), online.parameters(), strict=True)]
    common.update_ema(online, average, 0.9)
    for a, e in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(a, e)
    assert (average.running_mean == 0).all()


# ------------------------------------------------------------------ what a run writes


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, capsys):
    path = tmp_path / "checkpoint.pth"
    path.write_text("old")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(SystemExit) as stop:
        common.write_atomically(path, write)
    assert stop.value.code == 1 and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert "checkpoint.pth: cannot be written: disk full" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no file's fault"):
        common.write_atomically(path, lambda file: (_ for _ in ()).throw(RuntimeError("no file's fault")))


def test_grid_shows_views_at_their_size(tmp_path):
    rows = [[torch.zeros(3, 8, 12), torch.zeros(3, 4, 4)]] * 3
    common.save_grid(tmp_path / "views.png", rows, (0.2, 0.4, 0.6), (1, 1, 1))
    picture = np.array(Image.open(tmp_path / "views.png"))
    assert picture.shape == (3 * 10 + 2, 2 * 14 + 2, 3)
    assert picture[2, 2].tolist() == [51, 102, 153] and picture[2, 16].tolist() == [255] * 3
    assert picture[5, 21].tolist() == [51, 102, 153]

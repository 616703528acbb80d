import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, assert_same_state, tiny, warm_cosine
from PIL import Image
from timm.models import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

import common
import dspt_mae
from common import Process
from dspt_mae import CropDataset, MaskedAutoencoder

ALONE = Process(0, 1, torch.device("cpu"), None)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_args(*flags):
    base = ["--data_path", "x", "--output_dir", "x", *tiny("dspt_mae", *flags)]
    args = dspt_mae.get_parser().parse_args(list(map(str, base)))
    dspt_mae.check_args(args)
    return args


# ------------------------------------------------------------------ masking, patches, positions


@pytest.mark.parametrize("N, ratio, kept", [(196, 0.75, 49), (100, 0.9, 10), (17, 0.5, 8), (16, 0.75, 4)])
def test_random_masking_keeps_the_right_number_and_restores_the_order(N, ratio, kept):
    ids_keep, ids_restore, mask = dspt_mae.random_masking(5, N, ratio, generator())
    assert ids_keep.shape == (5, kept) and ids_restore.shape == mask.shape == (5, N)
    for b in range(5):
        keep = ids_keep[b].tolist()
        assert len(set(keep)) == kept
        assert [n for n in range(N) if mask[b, n] == 0] == sorted(keep)  # 1 = removed
        removed = [n for n in range(N) if n not in keep]
        for n in range(N):  # restore: where patch n stands in (kept in their order, then the others)
            place = ids_restore[b, n].item()
            assert keep[place] == n if n in keep else place >= kept
        assert sorted(ids_restore[b, removed].tolist()) == list(range(kept, N))
    assert len({tuple(sorted(row)) for row in ids_keep.tolist()}) > 1  # different per image
    again = dspt_mae.random_masking(5, N, ratio, generator())
    assert all(torch.equal(a, b) for a, b in zip(again, (ids_keep, ids_restore, mask), strict=True))
    assert not torch.equal(dspt_mae.random_masking(5, N, ratio, generator(1))[0], ids_keep)


def test_every_patch_is_kept_equally_often():
    ids_keep = dspt_mae.random_masking(20000, 16, 0.75, generator())[0]
    frequency = torch.bincount(ids_keep.flatten(), minlength=16) / 20000
    assert (frequency - 0.25).abs().max() < 0.015


@pytest.mark.parametrize("C, H, W, p", [(3, 8, 8, 4), (1, 4, 12, 2), (5, 16, 8, 8)])
def test_patches_hold_the_pixels_by_row_column_channel(C, H, W, p):
    images = rand(2, C, H, W)
    patches = dspt_mae.patchify(images, p)
    assert patches.shape == (2, H * W // p**2, p * p * C)
    for row in range(H):
        for column in range(W):
            n = (row // p) * (W // p) + column // p
            first = ((row % p) * p + column % p) * C
            assert torch.equal(patches[:, n, first : first + C], images[:, :, row, column])
    assert torch.equal(dspt_mae.unpatchify(patches, p, (H // p, W // p)), images)


@pytest.mark.parametrize("D, h, w", [(8, 3, 3), (64, 2, 5), (12, 4, 1)])
def test_positions_are_sines_and_cosines_of_column_and_row(D, h, w):
    positions = dspt_mae.sincos_positions(D, (h, w))
    assert positions.shape == (1 + h * w, D) and positions[0].abs().max() == 0
    for row in range(h):
        for column in range(w):
            expected = []
            for number in (column, row):
                angles = [number / 10000 ** (i / (D / 4)) for i in range(D // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[1 + row * w + column], torch.tensor(expected))


# ------------------------------------------------------------------ loss


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_is_the_mean_over_masked_patches(normalised):
    prediction, patches = rand(3, 6, 12), rand(3, 6, 12, seed=1)
    mask = dspt_mae.random_masking(3, 6, 0.5, generator())[2]
    target = dspt_mae.normalize_patches(patches)[0] if normalised else patches
    total, masked = 0.0, 0
    for b in range(3):
        for n in range(6):
            if mask[b, n] == 0:
                continue
            values = patches[b, n].double().tolist()
            if normalised:
                mean = sum(values) / 12
                variance = sum((v - mean) ** 2 for v in values) / 11  # unbiased
                values = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            total += sum((prediction[b, n, k].item() - v) ** 2 for k, v in enumerate(values)) / 12
            masked += 1
    assert dspt_mae.mae_loss(prediction, target, mask).item() == pytest.approx(total / masked, rel=1e-5)
    assert dspt_mae.mae_loss(prediction.bfloat16(), target, mask).dtype == torch.float32


def test_normalisation_can_be_undone_and_survives_a_flat_patch():
    patches = torch.cat([rand(2, 3, 12), torch.full((2, 1, 12), 7.0)], 1)
    target, mean, std = dspt_mae.normalize_patches(patches)
    torch.testing.assert_close(target * std + mean, patches)
    assert target[:, -1].abs().max() == 0


# ------------------------------------------------------------------ model


def small_model(img_size=32, patch_size=8, in_chans=3, seed=0, **decoder):
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2} | decoder
    torch.manual_seed(seed)
    vit = common.build_backbone("test_vit", img_size, patch_size, in_chans=in_chans)
    grid = vit.patch_embed.grid_size
    return MaskedAutoencoder(vit, grid, patch_size**2 * in_chans, **sizes)


def no_mask(B, N):
    return dspt_mae.random_masking(B, N, 0.0, generator())


@pytest.mark.parametrize("img_size", [32, (16, 40)])
def test_encoder_at_mask_ratio_0_is_the_full_encoder(img_size):
    model = small_model(img_size).eval()
    H, W = model.backbone.patch_embed.img_size
    images, N = rand(2, 3, H, W), H * W // 64
    ids_keep, ids_restore, _ = no_mask(2, N)
    latent = model.encode(images, ids_keep)
    tokens = torch.cat([latent[:, :1], dspt_mae.take_tokens(latent[:, 1:], ids_restore)], 1)
    torch.testing.assert_close(tokens, model.backbone.forward_features(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latent[:, 0], model.backbone(images), atol=1e-5, rtol=1e-4)


def test_encoder_does_not_see_the_masked_patches():
    model, images = small_model(), rand(2, 3, 32, 32)
    ids_keep, _, mask = dspt_mae.random_masking(2, 16, 0.75, generator())
    changed = dspt_mae.patchify(images, 8)
    changed = torch.where(mask.unsqueeze(-1) > 0, torch.tensor(1e3), changed)
    changed = dspt_mae.unpatchify(changed, 8, (4, 4))
    assert torch.equal(model.encode(images, ids_keep), model.encode(changed, ids_keep))


def test_decoder_puts_mask_tokens_in_the_place_of_masked_patches():
    """The decoder's input equals one made patch by patch; its prediction leaves out the class token."""
    model = small_model()
    seen = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids_keep, ids_restore, mask = dspt_mae.random_masking(2, 16, 0.75, generator())
    latent = rand(2, 5, 64)
    prediction = model.decode(latent, ids_restore)
    embedded, positions = model.decoder_embed(latent), dspt_mae.sincos_positions(32, (4, 4))
    for b in range(2):
        torch.testing.assert_close(seen[0][b, 0], embedded[b, 0])  # class token: position 0
        keep = ids_keep[b].tolist()
        for n in range(16):
            token = model.mask_token[0, 0] if mask[b, n] else embedded[b, 1 + keep.index(n)]
            torch.testing.assert_close(seen[0][b, 1 + n], token + positions[1 + n])
    x = model.decoder_norm(model.decoder_blocks(seen[0]))
    assert torch.equal(prediction, model.decoder_pred(x)[:, 1:]) and prediction.shape == (2, 16, 192)


def test_initial_weights():
    model = small_model(decoder_dim=128)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            fan_out, fan_in = module.weight.shape
            bound = math.sqrt(6 / (fan_in + fan_out))  # Xavier, uniform
            assert module.bias.abs().max() == 0 and module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    projection = model.backbone.patch_embed.proj.weight
    bound = math.sqrt(6 / (64 + 192))  # as a linear layer from 8 * 8 * 3 pixels to 64
    assert projection.abs().max() <= bound
    assert projection.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    tokens = torch.cat([model.backbone.cls_token.flatten(), model.mask_token.flatten()])
    assert 0.01 < tokens.std() < 0.03
    assert not model.backbone.pos_embed.requires_grad
    torch.testing.assert_close(model.backbone.pos_embed[0], dspt_mae.sincos_positions(64, (4, 4)))


def test_all_but_positions_is_trained():
    model = small_model()
    ids_keep, ids_restore, mask = dspt_mae.random_masking(2, 16, 0.75, generator())
    prediction, _ = model(rand(2, 3, 32, 32), ids_keep, ids_restore)
    dspt_mae.mae_loss(prediction, rand(2, 16, 192, seed=1), mask).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name == "backbone.pos_embed"), name


# ------------------------------------------------------------------ data


def test_crops_are_repeatable_and_cover_the_flags(scenes):
    paths = common.list_images(scenes / "train")
    dataset = CropDataset(paths, (16, 24), 3, torch.uint8, seed=3)
    a, b = dataset[2, 5], dataset[2, 5]
    assert a.shape == (3, 16, 24) and a.dtype == torch.uint8 and torch.equal(a, b)
    assert not torch.equal(a, dataset[3, 5]) and not torch.equal(
        a, CropDataset(paths, (16, 24), 3, a.dtype, 4)[2, 5]
    )


def test_crop_is_torchvisions_resized_crop_of_the_drawn_box(tmp_path):
    """On a ramp the crop's ends tell the box: its area is .2 to 1 of the image; half are mirrored."""
    ramp = np.tile(np.arange(0, 252, 4, dtype=np.uint8), (63, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    dataset = CropDataset([str(tmp_path / "ramp.png")], (63, 63), 3, torch.uint8, 0)
    crops = torch.stack([dataset[epoch, 0] for epoch in range(300)]).float()
    widths = (crops[:, 0, 30, -1] - crops[:, 0, 30, 0]) / 4
    assert 120 < int((widths < 0).sum()) < 180
    assert widths.abs().max() >= 58 and 20 < widths.abs().min() < 30  # sqrt(.2 * 3 / 4) * 63 = 24


def many_channels(folder, kind, images=12, side=40):
    """Writes a folder of images of one kind; returns the number of channels and what each file holds."""
    folder.mkdir()
    rng, arrays = np.random.default_rng(0), []
    for i in range(images):
        noise = rng.normal(size=(side, side, 4)).astype(np.float32).cumsum(0).cumsum(1)
        byte = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
        path = folder / f"{i} x"
        if kind == "npy float32 4":
            np.save(path.with_suffix(".npy"), noise)
            arrays.append(noise)
        elif kind == "npy uint8 2":
            np.save(path.with_suffix(".npy"), byte[..., :2])
            arrays.append(byte[..., :2])
        elif kind == "npy uint16 1":
            arrays.append(byte[..., 0].astype(np.uint16) * 100)
            np.save(path.with_suffix(".npy"), arrays[-1])
        elif kind == "tiff float 1":
            Image.fromarray(noise[..., 0]).save(path.with_suffix(".tif"))
            arrays.append(noise[..., 0])
        elif kind == "tiff 16 bit 1":
            arrays.append(byte[..., 0].astype(np.uint16) * 100)
            Image.fromarray(arrays[-1]).save(path.with_suffix(".tiff"))
        elif kind == "tiff pages 4":
            pages = [Image.fromarray(byte[..., c]) for c in range(4)]
            pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])
            arrays.append(byte)
        elif kind == "png rgba 4":
            Image.fromarray(byte, "RGBA").save(path.with_suffix(".png"))
            arrays.append(byte)
        elif kind == "png grey 1":
            Image.fromarray(byte[..., 0]).save(path.with_suffix(".png"))
            arrays.append(byte[..., 0])
    return int(kind[-1]), arrays


KINDS = ["npy float32 4", "npy uint8 2", "npy uint16 1", "tiff float 1", "tiff 16 bit 1", "tiff pages 4"]
KINDS += ["png rgba 4", "png grey 1"]


@pytest.mark.parametrize(
    "mean, std, fits",
    [
        (100, 10, True),
        (120, 50, True),
        (0.4, 0.1, False),
        (100, 1000, False),
        (100, 0.5, False),
        (500, 30, False),
    ],
)
def test_mean_and_std_far_from_the_images_are_refused(tmp_path, capsys, mean, std, fits):
    for i in range(4):
        pixels = np.random.default_rng(i).normal(100, 10, (40, 40)).astype(np.float32)
        np.save(tmp_path / f"{i}.npy", np.dstack([pixels, np.full_like(pixels, 7)]))  # the second is constant
    args = make_args("--in_chans", 2, "--mean", mean, 7, "--std", std, 1)
    paths = sorted(map(str, tmp_path.glob("*.npy")))
    if fits:
        assert dspt_mae.check_pixels(paths, args) == torch.float32
    else:
        with pytest.raises(SystemExit):
            dspt_mae.check_pixels(paths, args)
        words = capsys.readouterr().err.split("measured on some: ")[1].split()
        assert words[0::3] == ["--mean", "--std"] and words[2] == "7" and words[5] == "1"


def test_pixels_of_another_type_are_not_mixed_in(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((40, 40), np.float32))
    dataset = CropDataset([str(tmp_path / "a.npy")], (32, 32), 1, torch.uint8, 0)
    with pytest.raises(common.UnreadableImageError, match="torch.float32 among torch.uint8"):
        dataset[0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_any_channels_and_the_backbone_is_judged(run, tmp_path, capsys, kind):
    """mean and std are asked for, with values measured on the images; with these the run works."""
    C, arrays = many_channels(tmp_path / "data", kind)
    base = ["--data_path", tmp_path / "data", "--output_dir", tmp_path / "out", "--in_chans", C]
    base += [*tiny("dspt_mae", "--max_steps", "3", "--epochs", "3")]
    scale = 255 if arrays[0].dtype == np.uint8 else 1
    if C != 3:
        with pytest.raises(SystemExit):
            run("dspt_mae", *base)
        words = capsys.readouterr().err.split("measured on some: ")[1].split()
        values = np.array(words[1 : 1 + C] + words[2 + C :], float)
        pixels = np.stack(arrays).reshape(-1, C) / scale
        np.testing.assert_allclose(values, np.concatenate([pixels.mean(0), pixels.std(0)]), rtol=2e-3)
        base += words
    run("dspt_mae", *base)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and math.isfinite(lines[-1]["loss"])
    vit = timm.create_model(f"local-dir:{tmp_path}/out/backbone", pretrained=True, num_classes=0)
    assert vit(torch.rand(1, C, 32, 32)).shape == (1, 64)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "data").iterdir())):
        part = "val" if i % 3 == 0 else "train"
        path.rename(tmp_path / "labelled" / part / "ab"[i % 2] / path.name)
    flags = ["--nb_knn", "1", "--output_dir", tmp_path, "--num_workers", "0", "--device", "cpu"]
    run(
        "eval_knn", "--data_path", tmp_path / "labelled", "--weights", tmp_path / "out", "image_stats", *flags
    )
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["train_images"], r["test_images"]) for r in results] == [(8, 4)] * 2


def test_float_images_with_the_mean_of_bytes_are_refused(run, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 10000, (40, 40, 3)).astype(np.float32)
        np.save(tmp_path / "data" / f"{i}.npy", pixels)
    with pytest.raises(SystemExit):
        run("dspt_mae", "--data_path", tmp_path / "data", "--output_dir", tmp_path / "o", *tiny("dspt_mae"))
    assert "do not fit the images' 3 channels; measured on some: --mean 49" in capsys.readouterr().err


# ------------------------------------------------------------------ going on from weights


def public_layout(model):
    """A checkpoint with the names of MAE's public one, encoder and decoder side by side."""
    state = {name.removeprefix("backbone."): x.clone() for name, x in model.state_dict().items()}
    state["decoder_pos_embed"] = model.decoder_pos_embed.clone().unsqueeze(0)
    return {"model": state, "optimizer": {"state": {}}, "epoch": 399}


def moved(model):
    """Every trained weight moved at random, so that nothing is equal by its initial value."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return model


def init_from(path, *flags):
    args = make_args("--init", path, *flags)
    network = dspt_mae.build_network(args)
    return network, dspt_mae.load_init(network, args)


def test_public_checkpoint_fills_encoder_and_decoder(tmp_path):
    source = moved(small_model(seed=5)).eval()
    torch.save(public_layout(source), tmp_path / "mae.pth")
    network, lines = init_from(tmp_path / "mae.pth", "--seed", "1")
    assert (
        len(lines) == 2
        and "0 missing, 0 not used; patch projection of the file; fixed positions of" in lines[0]
    )
    assert lines[1] == "decoder: 19 of 19 tensors loaded, 0 missing, 0 not used"
    assert_same(network.state_dict(), source.state_dict())
    images, masking = rand(2, 3, 32, 32), dspt_mae.random_masking(2, 16, 0.75, generator())
    for ours, theirs in zip(network.eval()(images, *masking[:2]), source(images, *masking[:2]), strict=True):
        assert torch.equal(ours, theirs)


def test_public_weights_survive_the_trip_through_a_run(train, tmp_path):
    """Features of the exported backbone are those of the file, when the run changes nothing."""
    source = moved(small_model(seed=5)).eval()
    torch.save(public_layout(source), tmp_path / "mae.pth")
    frozen = ["--init", tmp_path / "mae.pth", "--lr", "1e-30", "--weight_decay", "0", "--max_steps", "1"]
    saved = train(tmp_path / "out", *frozen, script="dspt_mae")
    header = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert "0 missing" in header["init"][0] and "decoder: 19 of 19" in header["init"][1]
    vit = timm.create_model(f"local-dir:{tmp_path}/out/backbone", pretrained=True, num_classes=0).eval()
    images = rand(2, 3, 32, 32)
    assert torch.equal(vit(images), source.backbone(images))
    assert_same({name: saved["model"][name] for name in source.state_dict()}, dict(source.state_dict()))


def test_encoder_only_files_start_a_fresh_decoder(tmp_path):
    source = moved(small_model(seed=5))
    state = public_layout(source)["model"]
    encoder = {name: x for name, x in state.items() if not name.startswith(("decoder", "mask_token"))}
    encoder |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}  # of a classifier
    for number, content in enumerate(
        (encoder, {"model": encoder}, {f"module.{k}": x for k, x in encoder.items()})
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        network, lines = init_from(tmp_path / f"{number}.pth")
        assert "0 missing, 2 not used (head.bias, head.weight)" in lines[0]
        assert lines[1] == "decoder: none in the file, starts fresh"
        assert_same(network.backbone.state_dict(), source.backbone.state_dict())


def test_timms_pretrained_name_is_taken(tmp_path, monkeypatch):
    source = timm.create_model("test_vit", num_classes=0, img_size=32, patch_size=8)
    source.pretrained_cfg["input_size"] = (3, 32, 32)
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            asked.append(name)
            return source
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    network, lines = init_from("test_vit.r160_in1k")
    assert asked == ["test_vit.r160_in1k"] and "learned positions of the file, from now on fixed" in lines[0]
    assert_same(network.backbone.state_dict(), source.state_dict())
    assert not network.backbone.pos_embed.requires_grad and "none in the file" in lines[1]


def test_second_domain_goes_on_from_the_first(train, tmp_path, capsys):
    first = train(tmp_path / "a", "--max_steps", "3", script="dspt_mae")
    frozen = ["--lr", "1e-30", "--weight_decay", "0", "--max_steps", "1"]
    for source in (tmp_path / "a", tmp_path / "a" / "checkpoint.pth"):
        capsys.readouterr()
        out = tmp_path / f"b{source.name}"
        second = train(out, "--init", source, *frozen, script="dspt_mae")
        assert "decoder: 19 of 19 tensors loaded" in capsys.readouterr().out
        assert_same(second["model"], first["model"])
    (tmp_path / "a" / "checkpoint.pth").unlink()  # the exported backbone alone
    train(tmp_path / "c", "--init", tmp_path / "a", *frozen, script="dspt_mae")
    assert "decoder: none in the file" in capsys.readouterr().out


def test_a_backbone_of_another_method_is_taken(train, tmp_path, capsys):
    flags = "--arch test_vit --patch_size 8 --max_steps 1".split()
    teacher = train(tmp_path / "dino", *flags, script="dino_mc")["teacher"]
    network, lines = init_from(tmp_path / "dino")
    assert "0 missing" in lines[0] and "learned positions" in lines[0] and "none in the file" in lines[1]
    prefix = "backbone."
    assert_same(
        dict(network.backbone.state_dict()),
        {k.removeprefix(prefix): x for k, x in teacher.items() if k.startswith(prefix)},
    )


@pytest.mark.parametrize("size, grid", [([64], (8, 8)), ([16, 40], (2, 5))])
def test_another_image_size_gets_positions_of_the_formula(tmp_path, size, grid):
    source = moved(small_model(seed=5))
    torch.save(public_layout(source), tmp_path / "mae.pth")
    network, lines = init_from(tmp_path / "mae.pth", "--img_size", *size)
    assert f"fixed positions of 4 x 4 computed anew for {grid[0]} x {grid[1]}" in lines[0]
    torch.testing.assert_close(network.backbone.pos_embed[0], dspt_mae.sincos_positions(64, grid))
    assert "decoder: 19 of 19" in lines[1]  # its positions are no weights
    torch.testing.assert_close(network.decoder_pos_embed, dspt_mae.sincos_positions(32, grid))
    other, lines = init_from(tmp_path / "mae.pth", "--img_size", 16, 64)  # as many patches, another grid
    assert "fixed positions of 4 x 4 computed anew for 2 x 8" in lines[0]


def test_learned_positions_are_resampled(tmp_path):
    source = small_model(seed=5)
    source.backbone.pos_embed.data.copy_(rand(1, 17, 64, seed=3))
    torch.save(public_layout(source), tmp_path / "vit.pth")
    network, lines = init_from(tmp_path / "vit.pth", "--img_size", 64, 32)
    assert "learned positions of 4 x 4 resampled to 8 x 4, from now on fixed" in lines[0]
    old = source.backbone.pos_embed[:, 1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    new = F.interpolate(old, (8, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 32, 64)
    torch.testing.assert_close(network.backbone.pos_embed[:, 1:], new)
    torch.testing.assert_close(network.backbone.pos_embed[:, :1], source.backbone.pos_embed[:, :1])


def test_learned_positions_of_a_grid_that_is_not_square(train, tmp_path):
    """The grid of our own output is known from its image size; of a bare file it is not."""
    source = small_model((16, 32), seed=5)
    source.backbone.pos_embed.data.copy_(rand(1, 9, 64, seed=3))
    torch.save(public_layout(source), tmp_path / "vit.pth")
    with pytest.raises(SystemExit):
        init_from(tmp_path / "vit.pth", "--img_size", 32)
    common.export_backbone(source.backbone, tmp_path / "backbone", (16, 32), (0.5,) * 3, (0.5,) * 3)
    _, lines = init_from(tmp_path / "backbone", "--img_size", 32)
    assert "learned positions of 2 x 4 resampled to 4 x 4" in lines[0]


def test_another_patch_size_and_other_channels_convert_the_projection(tmp_path):
    source = moved(small_model(seed=5))
    torch.save(public_layout(source), tmp_path / "mae.pth")
    network, lines = init_from(tmp_path / "mae.pth", "--patch_size", 16, "--img_size", 64)
    assert "patch projection of 8 px resampled to 16 px" in lines[0] and "0 missing" in lines[0]
    assert (
        "decoder: 17 of 19" in lines[1] and "2 missing (decoder_pred.bias, decoder_pred.weight)" in lines[1]
    )
    # a smooth image gives nearly the same tokens with larger patches as, at half the size, with the file's
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    small = F.interpolate(ramp, (32, 32), mode="bilinear", antialias=True)
    ours, theirs = network.backbone.patch_embed(ramp), source.backbone.patch_embed(small)
    assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).item() > 0.99

    network, lines = init_from(tmp_path / "mae.pth", "--in_chans", 1, "--mean", 0.5, "--std", 0.5)
    assert "patch projection of 3 channels converted to 1" in lines[0] and "decoder: 17 of 19" in lines[1]
    grey = rand(1, 1, 32, 32)  # one channel counts as three equal ones
    torch.testing.assert_close(
        network.backbone(grey), source.backbone(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4
    )
    network, lines = init_from(
        tmp_path / "mae.pth", "--in_chans", 6, "--mean", *[0.5] * 6, "--std", *[0.5] * 6
    )
    assert "converted to 6" in lines[0]
    twice = rand(1, 3, 32, 32)
    torch.testing.assert_close(
        network.backbone(twice.repeat(1, 2, 1, 1)), source.backbone(twice), atol=1e-5, rtol=1e-4
    )


def test_patches_of_equal_length_but_other_shape_start_a_fresh_prediction_layer(tmp_path):
    """4 x 4 patches of 12 channels have as many numbers as 8 x 8 patches of 3."""
    torch.save(public_layout(small_model(16, 4, 12)), tmp_path / "mae.pth")
    network, lines = init_from(tmp_path / "mae.pth")
    assert "2 missing (decoder_pred.bias, decoder_pred.weight)" in lines[1]
    assert "12 channels converted to 3" in lines[0] and "0 missing" in lines[0]


@pytest.mark.parametrize("C, in_chans", [(1, 3), (1, 12), (12, 3), (12, 1), (4, 12), (3, 1), (3, 2)])
def test_between_any_channels_equal_ones_give_the_same_tokens(C, in_chans):
    weight = rand(8, C, 4, 4)
    converted, words = dspt_mae.convert_projection(weight, in_chans, 4)
    assert words == f"patch projection of {C} channels converted to {in_chans}"
    grey = rand(1, 1, 4, 4, seed=1)
    before, after = (F.conv2d(grey.expand(-1, w.shape[1], -1, -1), w) for w in (weight, converted))
    torch.testing.assert_close(after, before)


def test_half_precision_weights_and_other_pixels_are_taken(tmp_path):
    source = moved(small_model(seed=5))
    torch.save({name: x.half() for name, x in public_layout(source)["model"].items()}, tmp_path / "half.pth")
    _, lines = init_from(tmp_path / "half.pth")
    assert "0 missing" in lines[0] and "fixed positions of the file" in lines[0]
    common.export_backbone(source.backbone, tmp_path / "backbone", 32, (0.5,) * 3, (0.25,) * 3)
    _, lines = init_from(tmp_path / "backbone")
    assert "trained with --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25" in lines[0]


def test_weights_with_more_parts_than_the_arch_are_refused(tmp_path, capsys):
    """LayerScale, or more blocks: every tensor of the arch would be filled, and the features be others."""
    state = public_layout(small_model())["model"]
    for extra in ("blocks.0.ls1.gamma", "blocks.6.norm1.weight"):
        torch.save(state | {extra: torch.ones(64)}, tmp_path / "more.pth")
        with pytest.raises(SystemExit):
            init_from(tmp_path / "more.pth")
        assert f"1 not used ({extra}): another arch?" in capsys.readouterr().err


def test_a_vit_without_biases_in_its_projection_trains(tmp_path):
    network = dspt_mae.build_network(
        make_args("--arch", "vit_base_patch16_clip_224", "--patch_size", "16", "--img_size", "32")
    )
    ids_keep, ids_restore, _ = dspt_mae.random_masking(1, 4, 0.75, generator())
    assert network(rand(1, 3, 32, 32), ids_keep, ids_restore)[0].shape == (1, 4, 768)


def test_decoder_of_another_width_starts_fresh(tmp_path):
    torch.save(public_layout(small_model(decoder_dim=64)), tmp_path / "mae.pth")
    _, lines = init_from(tmp_path / "mae.pth")
    assert lines[1].startswith("decoder: 1 of 19 tensors loaded")  # the bias of the pixels
    torch.save(public_layout(small_model(decoder_depth=2)), tmp_path / "deep.pth")
    _, lines = init_from(tmp_path / "deep.pth")
    assert lines[1].startswith("decoder: 19 of 19 tensors loaded, 0 missing, 12 not used")


def test_a_file_of_another_architecture_is_refused_in_words(run, scenes, tmp_path, capsys):
    files = {"resnet": timm.create_model("test_resnet").state_dict()}
    files["deeper"] = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    files["sam"] = files["deeper"] | {"pos_embed": torch.zeros(1, 2, 2, 192)}
    files["decoder"] = {k: x for k, x in public_layout(small_model())["model"].items() if "decoder" in k}
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(SystemExit) as stop:
            run("dspt_mae", "--data_path", scenes / "train", "--output_dir", tmp_path / "o",
                *tiny("dspt_mae", "--init", tmp_path / name))  # fmt: skip
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1 and "another arch?" in error
        assert f"encoder from --init {tmp_path / name}: " in error
    assert not (tmp_path / "o" / "checkpoint.pth").exists()


# ------------------------------------------------------------------ steps


def setup_step(flags):
    """A network, its optimizer, and two fixed batches."""
    args = make_args(*flags)
    network = dspt_mae.build_network(args)
    groups = common.param_groups(network)
    optimizer = timm.optim.create_optimizer_v2(groups, "momentum", lr=1.0, weight_decay=0.1, momentum=0.9)
    crops = [torch.randint(256, (8, 3, 32, 32), generator=generator(step)).byte() for step in range(2)]
    return args, network, optimizer, crops


def schedule(step):
    return {"lr": 0.01 * step}


def fixed_masking(B, N, ratio, _):
    """The same patches of every image, so that shares of a batch are masked as the whole is."""
    ids_shuffle = torch.randperm(N, generator=generator()).expand(B, -1)
    ids_restore = ids_shuffle.argsort(1)
    return ids_shuffle[:, : N // 4], ids_restore, (ids_restore >= N // 4).float()


def train_two_steps(flags=(), process=ALONE):
    """Runs train_one_epoch on this process's share of the fixed batches."""
    args, network, optimizer, crops = setup_step(flags)
    meter, seen = common.Meter(process, 1000), []
    model = network if process.world_size == 1 else DistributedDataParallel(network)
    share = [
        (
            batch.chunk(args.accum_steps)[a].chunk(process.world_size)[process.rank],
            [f"file of {process.rank}"],
        )
        for batch in crops
        for a in range(args.accum_steps)
    ]

    def after_step(step, values, draw):
        seen.append((step, values))
        return False

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = model, optimizer, scaler, schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dspt_mae, "random_masking", fixed_masking)
        dspt_mae.train_one_epoch(range(1, 3), iter(share), *parts, args, process, meter, after_step)
    return network, None, None, meter, seen


def naive_training(flags=()):
    """Two steps image by image, patch by patch, one parameter at a time."""
    args, network, _, crops = setup_step(flags)
    vit, losses = network.backbone, []
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    momenta = {name: torch.zeros_like(p) for name, p in trained.items()}
    shuffled = torch.randperm(16, generator=generator()).tolist()
    keep, removed = shuffled[:4], shuffled[4:]
    positions, decoder_positions = (dspt_mae.sincos_positions(D, (4, 4)) for D in (64, 32))
    for step, batch in enumerate(crops, start=1):
        total = 0.0
        for image in batch:
            x = (image / 255 - mean) / std
            patches = [x[:, 8 * (n // 4) :][:, :8, 8 * (n % 4) :][:, :, :8] for n in range(16)]
            weight = vit.patch_embed.proj.weight.flatten(1)
            tokens = [vit.cls_token[0, 0] + positions[0]]
            for n in keep:
                tokens.append(weight @ patches[n].flatten() + vit.patch_embed.proj.bias + positions[1 + n])
            latent = vit.norm(vit.blocks(torch.stack(tokens)[None]))[0]
            encoded = network.decoder_embed(latent)
            tokens = [encoded[0] + decoder_positions[0]]
            for n in range(16):
                token = encoded[1 + keep.index(n)] if n in keep else network.mask_token[0, 0]
                tokens.append(token + decoder_positions[1 + n])
            out = network.decoder_norm(network.decoder_blocks(torch.stack(tokens)[None]))[0]
            for n in removed:
                target = patches[n].permute(1, 2, 0).flatten()  # by row, column, channel
                if args.norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total = total + ((network.decoder_pred(out[1 + n]) - target) ** 2).mean()
        loss = total / (8 * len(removed))
        losses.append(loss.item())
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in trained.items():
                decay = 0.1 if p.ndim > 1 and not name.endswith("bias") else 0.0
                momenta[name] = 0.9 * momenta[name] + p.grad + decay * p
                p.sub_(schedule(step)["lr"] * momenta[name])
    return network, losses


@pytest.mark.parametrize("flags", [[], ["--no-norm_pix_loss"], ["--accum_steps", "4"]])
def test_steps_equal_plain_loops(flags):
    """Loss and weights over two steps; accumulation is one large batch."""
    network, _, _, meter, seen = train_two_steps(flags)
    expected, losses = naive_training(flags)
    torch.testing.assert_close(torch.stack([terms["loss"] for terms in meter.terms]), torch.tensor(losses))
    for (name, p), q in zip(network.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert seen == [(2, {"lr": 0.01}), (3, {"lr": 0.02})]


def test_flat_loss_is_that_of_patches_in_their_mean_colour():
    _, _, _, meter, _ = train_two_steps(["--no-norm_pix_loss"])
    args, _, _, crops = setup_step(["--no-norm_pix_loss"])
    patches = dspt_mae.patchify(common.normalize(crops[0] / 255, args.mean, args.std), 8)
    removed = torch.randperm(16, generator=generator())[4:]
    expected = patches[:, removed].var(-1, correction=0).mean()
    assert meter.terms[0]["flat_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------ whole runs


def test_whole_run_writes_everything(train, tmp_path):
    saved = train(tmp_path, "--log_every", "2", script="dspt_mae")
    assert saved["step"] == 21 and saved["epoch"] == 3 and saved["args"]["arch"] == "test_vit"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["init"] == ["from nothing: plain MAE"] and lines[0]["patches"] == "4 x 4 of 8 px"
    assert lines[0]["scaled_lr"] == pytest.approx(1.5e-4 * 4 / 256) and lines[0]["kept_patches"] == 4
    for name in "loss flat_loss feature_std lr images_per_s data_seconds unreadable epoch".split():
        assert math.isfinite(lines[-1][name])
    assert lines[-1]["step"] == 21 and lines[-1]["flat_loss"] == pytest.approx(1, abs=0.05)
    backbone = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0)
    assert isinstance(backbone, VisionTransformer)
    groups = [(g["betas"], g["weight_decay"], len(g["params"])) for g in saved["optimizer"]["param_groups"]]
    decayed = sum(x.ndim > 1 for name, x in saved["model"].items() if name != "backbone.pos_embed")
    others = len(saved["model"]) - 1 - decayed  # biases and norms
    assert groups == [((0.9, 0.95), 0.05, decayed), ((0.9, 0.95), 0.0, others)]
    prefix = "backbone."
    encoder = {k.removeprefix(prefix): v for k, v in saved["model"].items() if k.startswith(prefix)}
    assert_same(dict(backbone.state_dict()), encoder)
    assert Image.open(tmp_path / "views.png").size == (2 * 34 + 2, 4 * 34 + 2)  # 4 images: whole, masked
    assert Image.open(tmp_path / "reconstruction.png").size == (3 * 34 + 2, 4 * 34 + 2)


@pytest.mark.parametrize(
    "flags", [[], ["--accum_steps", "2", "--img_size", "16", "40", "--no-norm_pix_loss"]]
)
def test_resumed_run_equals_the_unbroken_one(train, tmp_path, flags):
    unbroken = train(tmp_path / "a", *flags, "--num_workers", "2", "--max_steps", "8", script="dspt_mae")
    train(tmp_path / "b", *flags, "--max_steps", "5", script="dspt_mae")
    resumed = train(tmp_path / "b", *flags, "--max_steps", "8", script="dspt_mae")
    assert_same_state(resumed, unbroken)


def test_resume_does_not_read_the_init_again(train, tmp_path):
    torch.save(public_layout(moved(small_model())), tmp_path / "mae.pth")
    flags = ["--init", tmp_path / "mae.pth"]
    unbroken = train(tmp_path / "a", *flags, "--max_steps", "4", script="dspt_mae")
    train(tmp_path / "b", *flags, "--max_steps", "2", script="dspt_mae")
    (tmp_path / "mae.pth").unlink()
    assert_same_state(train(tmp_path / "b", *flags, "--max_steps", "4", script="dspt_mae"), unbroken)


def test_a_small_run_learns(train, tmp_path):
    train(tmp_path, "--epochs", "25", "--lr", "0.06", "--log_every", "25", script="dspt_mae")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    assert lines[-1]["loss"] < 0.95 * lines[-1]["flat_loss"] < lines[0]["loss"]


def test_learning_rate_is_a_cosine_after_its_warm_up(train, tmp_path):
    train(tmp_path, "--log_every", "1", "--lr", "0.64", "--min_lr", "0.001", script="dspt_mae")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    assert [line["lr"] for line in lines] == pytest.approx(warm_cosine())  # .64 * 4 / 256


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flags", [["--no-norm_pix_loss"], ["--norm_pix_loss"]])
def test_reconstruction_shows_the_prediction_in_pixels(tmp_path, flags, dtype):
    """A perfect prediction gives the source back, in the third column, with either kind of targets."""
    args = make_args("--output_dir", tmp_path, *flags)
    images = common.normalize(torch.rand(2, 3, 32, 32, generator=generator()), args.mean, args.std)
    patches, mask = dspt_mae.patchify(images, 8), dspt_mae.random_masking(2, 16, 0.75, generator())[2]
    target = dspt_mae.normalize_patches(patches)[0] if args.norm_pix_loss else patches
    shown = patches, mask, target, 8, (4, 4), dtype, args
    dspt_mae.save_pictures("reconstruction.png", images, *shown)
    picture = np.asarray(Image.open(tmp_path / "reconstruction.png")).astype(int)
    source, masked, painted = (picture[2:34, 2 + 34 * column :][:, :32] for column in range(3))
    assert np.abs(source - painted).max() <= 1 and np.abs(source - masked).max() > 50
    for n in range(16):
        same = np.array_equal(*(x[8 * (n // 4) :][:8, 8 * (n % 4) :][:, :8] for x in (source, masked)))
        assert same == (mask[0, n] == 0)


def test_a_batch_of_one_image_trains(train, tmp_path):
    assert train(tmp_path, "--batch_size_per_gpu", "1", "--max_steps", "2", script="dspt_mae")["step"] == 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_gpu_run(train, tmp_path, amp):
    flags = ["--device", "cuda", "--amp", amp, "--max_steps", "4", "--num_workers", "2"]
    assert train(tmp_path, *flags, script="dspt_mae")["step"] == 4

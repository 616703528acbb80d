import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same, assert_same_state, tiny
from PIL import Image

import common
import dspt_mae
from dspt_mae import CropDataset, MaskedAutoencoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def masking(B, N, ratio=0.75, seed=0):
    return dspt_mae.random_masking(B, N, ratio, generator(seed))


def make_args(*flags):
    """Parsed and checked."""
    flags = ["--data_path", "x", "--output_dir", "x", *tiny("dspt_mae", *flags)]
    args = dspt_mae.get_parser().parse_args([*map(str, flags)])
    dspt_mae.check_args(args)
    common.check_bands(args)
    args.mean = args.mean or common.IMAGENET_MEAN  # as load_samples does
    args.std = args.std or common.IMAGENET_STD
    return args


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ masking, patches, positions


@pytest.mark.parametrize("N, ratio, kept", [(196, 0.75, 49), (100, 0.9, 10), (17, 0.5, 8), (16, 0.75, 4)])
def test_random_masking_keeps_the_right_number_and_restores_the_order(N, ratio, kept):
    ids_keep, ids_restore, mask = masking(5, N, ratio)
    assert ids_keep.shape == (5, kept) and ids_restore.shape == mask.shape == (5, N)
    for b in range(5):
        keep = ids_keep[b].tolist()
        assert len(set(keep)) == kept
        assert [n for n in range(N) if mask[b, n] == 0] == sorted(keep)  # 1 = removed
        for n in range(N):  # restore: where patch n stands in (kept in their order, then the others)
            place = ids_restore[b, n].item()
            assert keep[place] == n if n in keep else place >= kept
        assert sorted(ids_restore[b].tolist()) == list(range(N))
    assert len({tuple(sorted(row)) for row in ids_keep.tolist()}) > 1  # different per image


def test_every_patch_is_kept_equally_often():
    frequency = torch.bincount(masking(20000, 16)[0].flatten(), minlength=16) / 20000
    assert (frequency - 0.25).abs().max() < 0.015


@pytest.mark.parametrize("C, H, W, p", [(3, 8, 8, 4), (1, 4, 12, 2), (5, 16, 8, 8)])
def test_patches_hold_the_pixels_by_row_column_channel(C, H, W, p):
    images = rand(2, C, H, W)
    patches = dspt_mae.patchify(images, p)
    assert patches.shape == (2, H * W // p**2, p * p * C)
    for row, column in np.ndindex(H, W):
        n = (row // p) * (W // p) + column // p
        first = ((row % p) * p + column % p) * C
        assert torch.equal(patches[:, n, first : first + C], images[:, :, row, column])
    assert torch.equal(dspt_mae.unpatchify(patches, p, (H // p, W // p)), images)


@pytest.mark.parametrize("D, h, w", [(8, 3, 3), (64, 2, 5), (12, 4, 1)])
def test_positions_are_sines_and_cosines_of_column_and_row(D, h, w):
    positions = dspt_mae.sincos_positions(D, (h, w))
    assert positions.shape == (1 + h * w, D) and positions[0].abs().max() == 0
    for row, column in np.ndindex(h, w):
        expected = []
        for number in (column, row):
            angles = [number / 10000 ** (i / (D / 4)) for i in range(D // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(positions[1 + row * w + column], torch.tensor(expected))


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
    return MaskedAutoencoder(vit, vit.patch_embed.grid_size, patch_size**2 * in_chans, **sizes)


@pytest.mark.parametrize("img_size", [32, (16, 40)])
def test_encoder_at_mask_ratio_0_is_the_full_encoder(img_size):
    model = small_model(img_size).eval()
    H, W = model.backbone.patch_embed.img_size
    images, (ids_keep, ids_restore, _) = rand(2, 3, H, W), masking(2, H * W // 64, 0.0)
    latent = model.encode(images, ids_keep)
    tokens = torch.cat([latent[:, :1], dspt_mae.take_tokens(latent[:, 1:], ids_restore)], 1)
    torch.testing.assert_close(tokens, model.backbone.forward_features(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latent[:, 0], model.backbone(images), atol=1e-5, rtol=1e-4)


def test_encoder_does_not_see_the_masked_patches():
    model, images = small_model(), rand(2, 3, 32, 32)
    ids_keep, _, mask = masking(2, 16)
    changed = dspt_mae.patchify(images, 8).masked_fill(mask.unsqueeze(-1) > 0, 1e3)
    changed = dspt_mae.unpatchify(changed, 8, (4, 4))
    assert torch.equal(model.encode(images, ids_keep), model.encode(changed, ids_keep))


def test_initial_weights_and_what_is_trained():
    model = small_model(decoder_dim=128)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))  # Xavier, uniform
            assert module.bias.abs().max() == 0 and module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    projection = model.backbone.patch_embed.proj.weight
    bound = math.sqrt(6 / (64 + 192))  # as a linear layer from 8 * 8 * 3 pixels to 64
    assert projection.abs().max() <= bound
    assert projection.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    tokens = torch.cat([model.backbone.cls_token.flatten(), model.mask_token.flatten()])
    assert 0.01 < tokens.std() < 0.03
    torch.testing.assert_close(model.backbone.pos_embed[0], dspt_mae.sincos_positions(64, (4, 4)))
    ids_keep, ids_restore, mask = masking(2, 16)
    prediction, _ = model(rand(2, 3, 32, 32), ids_keep, ids_restore)
    dspt_mae.mae_loss(prediction.bfloat16(), rand(2, 16, 192, seed=1), mask).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name == "backbone.pos_embed"), name


def test_a_vit_without_biases_in_its_projection_trains():
    network = dspt_mae.build_network(
        make_args("--arch", "vit_base_patch16_clip_224", "--patch_size", 16, "--img_size", 32))
    assert network(rand(1, 3, 32, 32), *masking(1, 4)[:2])[0].shape == (1, 4, 768)


# ------------------------------------------------------------------ data


def test_crops_follow_from_seed_epoch_and_index(scenes):
    samples = common.Samples(common.list_images(scenes / "train"))
    a, b, other = (CropDataset(samples, (16, 24), seed) for seed in (3, 3, 4))
    crop = a[2, 5]
    assert crop.shape == (3, 16, 24) and crop.dtype == torch.uint8 and torch.equal(crop, b[2, 5])
    assert not torch.equal(crop, a[3, 5]) and not torch.equal(crop, other[2, 5])


def test_crop_is_torchvisions_resized_crop_of_the_drawn_box(tmp_path):
    """On a ramp the crop's ends tell the box: its area is .2 to 1 of the image; half are mirrored."""
    ramp = np.tile(np.arange(0, 252, 4, dtype=np.uint8), (63, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    dataset = CropDataset(common.Samples([str(tmp_path / "ramp.png")]), (63, 63), 0)
    crops = torch.stack([dataset[epoch, 0] for epoch in range(300)]).float()
    widths = (crops[:, 0, 30, -1] - crops[:, 0, 30, 0]) / 4
    assert 120 < int((widths < 0).sum()) < 180
    assert widths.abs().max() >= 58 and 20 < widths.abs().min() < 30  # sqrt(.2 * 3 / 4) * 63 = 24


def test_crops_that_are_not_square_are_cut_in_their_proportions(tmp_path):
    """Across each image the numbers rise by 2 a pixel: the crop's slopes tell how far it is stretched."""
    x, y = np.meshgrid(np.arange(0, 252, 2, dtype=np.uint8), np.arange(0, 252, 2, dtype=np.uint8))
    Image.fromarray(np.stack([x, y, y], 2)).save(tmp_path / "ramps.png")
    dataset = CropDataset(common.Samples([str(tmp_path / "ramps.png")]), (24, 48), 0)
    crops = torch.stack([dataset[epoch, 0] for epoch in range(100)]).float()
    across = (crops[:, 0, 12, 36] - crops[:, 0, 12, 12]).abs() / 24  # source pixels for one of the crop
    down = (crops[:, 1, 18, 24] - crops[:, 1, 6, 24]) / 12
    stretched = across / down
    assert 0.7 < stretched.min() < 0.85 and 1.2 < stretched.max() < 1.45, (stretched.min(), stretched.max())


# ------------------------------------------------------------------ weights to continue from


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


@pytest.fixture
def mae(tmp_path):
    """A model, and its public checkpoint, mae.pth."""
    source = moved(small_model(seed=5)).eval()
    torch.save(public_layout(source), tmp_path / "mae.pth")
    return source


def init_from(path, *flags):
    args = make_args("--init", path, *flags)
    network = dspt_mae.build_network(args)
    return network, dspt_mae.load_init(network, args)


FROZEN = ["--lr", "1e-30", "--weight_decay", "0", "--max_steps", "1"]


def test_public_checkpoint_fills_encoder_and_decoder(mae, tmp_path):
    network, lines = init_from(tmp_path / "mae.pth", "--seed", "1")
    assert "0 missing, 0 not used; fixed positions of the file" in lines[0]
    assert lines[1:] == ["decoder: 19 of 19 tensors loaded, 0 missing, 0 not used"]
    assert_same(network.state_dict(), mae.state_dict())
    images, (ids_keep, ids_restore, _) = rand(2, 3, 32, 32), masking(2, 16)
    ours, theirs = (model(images, ids_keep, ids_restore) for model in (network.eval(), mae))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_public_weights_survive_the_trip_through_a_run(mae, train, tmp_path):
    """Features of the exported backbone are those of the file, when the run changes nothing."""
    saved = train(tmp_path / "out", "--init", tmp_path / "mae.pth", *FROZEN, script="dspt_mae")
    init = read_log(tmp_path / "out")[0]["init"]
    assert "0 missing" in init[0] and "decoder: 19 of 19" in init[1]
    vit = timm.create_model(f"local-dir:{tmp_path}/out/backbone", pretrained=True, num_classes=0).eval()
    images = rand(2, 3, 32, 32)
    assert torch.equal(vit(images), mae.backbone(images))
    assert_same({name: saved["model"][name] for name in mae.state_dict()}, dict(mae.state_dict()))


def test_encoder_only_files_start_a_fresh_decoder(mae, tmp_path):
    state = public_layout(mae)["model"]
    encoder = {name: x for name, x in state.items() if not name.startswith(("decoder", "mask_token"))}
    encoder |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}  # of a classifier
    for content in (encoder, {"model": encoder}, {f"module.{k}": x for k, x in encoder.items()}):
        torch.save(content, tmp_path / "encoder.pth")
        network, lines = init_from(tmp_path / "encoder.pth")
        assert "0 missing, 2 not used (head.bias, head.weight)" in lines[0]
        assert lines[1] == "decoder: none in the file, starts fresh"
        assert_same(network.backbone.state_dict(), mae.backbone.state_dict())


def test_timms_pretrained_name_is_taken(monkeypatch):
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


def test_second_domain_continues_from_the_first(train, tmp_path, capsys):
    first = train(tmp_path / "a", "--max_steps", "3", script="dspt_mae")
    for source in (tmp_path / "a", tmp_path / "a" / "checkpoint.pth"):
        capsys.readouterr()
        second = train(tmp_path / f"b{source.name}", "--init", source, *FROZEN, script="dspt_mae")
        assert "decoder: 19 of 19 tensors loaded" in capsys.readouterr().out
        assert_same(second["model"], first["model"])
    (tmp_path / "a" / "checkpoint.pth").unlink()  # the exported backbone alone
    train(tmp_path / "c", "--init", tmp_path / "a", *FROZEN, script="dspt_mae")
    assert "decoder: none in the file" in capsys.readouterr().out


def test_resume_does_not_read_the_init_again(mae, train, tmp_path):
    flags = ["--init", tmp_path / "mae.pth"]
    unbroken = train(tmp_path / "a", *flags, "--max_steps", "4", script="dspt_mae")
    train(tmp_path / "b", *flags, "--max_steps", "2", script="dspt_mae")
    (tmp_path / "mae.pth").unlink()
    assert_same_state(train(tmp_path / "b", *flags, "--max_steps", "4", script="dspt_mae"), unbroken)
    headers = [line for line in read_log(tmp_path / "b") if "init" in line]
    assert headers[1]["init"] == "resumed at step 2, --init is not read again"


@pytest.mark.parametrize("size, grid", [([64], (8, 8)), ([16, 40], (2, 5)), ([16, 64], (2, 8))])
def test_another_image_size_gets_positions_of_the_formula(mae, tmp_path, size, grid):
    network, lines = init_from(tmp_path / "mae.pth", "--img_size", *size)
    assert f"fixed positions of 4 x 4 recomputed for {grid[0]} x {grid[1]}" in lines[0]
    torch.testing.assert_close(network.backbone.pos_embed[0], dspt_mae.sincos_positions(64, grid))
    assert "decoder: 19 of 19" in lines[1]  # its positions are no weights
    torch.testing.assert_close(network.decoder_pos_embed, dspt_mae.sincos_positions(32, grid))


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


def test_learned_positions_of_a_grid_that_is_not_square(tmp_path):
    """The grid of our own output is known from its image size; of a bare file it is not."""
    source = small_model((16, 32), seed=5)
    source.backbone.pos_embed.data.copy_(rand(1, 9, 64, seed=3))
    torch.save(public_layout(source), tmp_path / "vit.pth")
    with pytest.raises(SystemExit):
        init_from(tmp_path / "vit.pth", "--img_size", 32)
    common.export_backbone(source.backbone, tmp_path / "backbone", (0.5,) * 3, (0.5,) * 3)
    _, lines = init_from(tmp_path / "backbone", "--img_size", 32)
    assert "learned positions of 2 x 4 resampled to 4 x 4" in lines[0]


def test_another_patch_size_and_other_channels_convert_the_projection(mae, tmp_path):
    network, lines = init_from(tmp_path / "mae.pth", "--patch_size", 16, "--img_size", 64)
    assert "patches of 8 x 8 px resampled to 16 x 16" in lines[0] and "0 missing" in lines[0]
    assert "17 of 19" in lines[1] and "2 missing (decoder_pred.bias, decoder_pred.weight)" in lines[1]
    # A smooth image gives nearly the same tokens with larger patches as, at half the size, with the file's.
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    small = F.interpolate(ramp, (32, 32), mode="bilinear", antialias=True)
    ours, theirs = network.backbone.patch_embed(ramp), mae.backbone.patch_embed(small)
    assert F.cosine_similarity(ours.flatten(1), theirs.flatten(1)).item() > 0.99
    images = rand(1, 1, 32, 32), rand(1, 3, 32, 32)
    # One channel counts as three equal ones; three become six repeated.
    for C, ours, theirs in ((1, images[0], images[0].expand(-1, 3, -1, -1)), (6, images[1].repeat(1, 2, 1, 1),
                                                                              images[1])):
        flags = ["--in_chans", C, "--mean", *[0.5] * C, "--std", *[0.5] * C]
        network, lines = init_from(tmp_path / "mae.pth", *flags)
        assert f"patch_embed.proj.weight: 3 channels converted to {C}" in lines[0]
        assert "decoder: 17 of 19" in lines[1]
        torch.testing.assert_close(network.backbone(ours), mae.backbone(theirs), atol=1e-5, rtol=1e-4)


def test_patches_of_equal_length_but_other_shape_start_a_fresh_prediction_layer(tmp_path):
    """4 x 4 patches of 12 channels have as many numbers as 8 x 8 patches of 3."""
    torch.save(public_layout(small_model(16, 4, 12)), tmp_path / "mae.pth")
    _, lines = init_from(tmp_path / "mae.pth")
    assert "2 missing (decoder_pred.bias, decoder_pred.weight)" in lines[1]
    assert "12 channels converted to 3" in lines[0] and "0 missing" in lines[0]


def test_half_precision_weights_and_other_pixels_are_taken(mae, tmp_path):
    torch.save({name: x.half() for name, x in public_layout(mae)["model"].items()}, tmp_path / "half.pth")
    _, lines = init_from(tmp_path / "half.pth")
    assert "0 missing" in lines[0] and "fixed positions of the file" in lines[0]
    common.export_backbone(mae.backbone, tmp_path / "backbone", (0.5,) * 3, (0.25,) * 3)
    _, lines = init_from(tmp_path / "backbone")
    assert "trained with --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25" in lines[0]


def test_decoder_of_another_width_starts_fresh(tmp_path):
    """Of another depth what fits is taken."""
    for sizes, words in (({"decoder_dim": 64}, "1 of 19 tensors loaded"),  # the bias of the pixels
                         ({"decoder_depth": 2}, "19 of 19 tensors loaded, 0 missing, 12 not used")):
        torch.save(public_layout(small_model(**sizes)), tmp_path / "mae.pth")
        assert init_from(tmp_path / "mae.pth")[1][1].startswith(f"decoder: {words}")


def test_decoder_of_other_heads_starts_fresh(mae, tmp_path):
    """Its tensors have the same shapes."""
    saved = {"model": mae.state_dict(), "effective_batch": 4, "args": {"arch": "test_vit"}}
    for heads, words in ((2, "19 of 19 tensors loaded"), (4, "the file's has 4 heads, not 2, starts fresh")):
        saved["args"]["decoder_heads"] = heads
        torch.save(saved, tmp_path / "checkpoint.pth")
        network, lines = init_from(tmp_path / "checkpoint.pth")
        assert lines[1].startswith(f"decoder: {words}"), lines
        same = torch.equal(network.decoder_pred.weight, mae.decoder_pred.weight)
        assert same == (heads == 2)


def test_a_file_of_another_architecture_is_refused_in_words(mae, tmp_path, capsys):
    """LayerScale or more blocks too: every tensor of the arch would be filled, and the features be others."""
    state = public_layout(mae)["model"]
    deeper = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    files = {"resnet": timm.create_model("test_resnet").state_dict(), "deeper": deeper,
             "sam": deeper | {"pos_embed": torch.zeros(1, 2, 2, 192)},
             "decoder": {k: x for k, x in state.items() if "decoder" in k},
             "blocks.0.ls1.gamma": state | {"blocks.0.ls1.gamma": torch.ones(64)},
             "blocks.6.norm1.weight": state | {"blocks.6.norm1.weight": torch.ones(64)}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(SystemExit) as stop:
            init_from(tmp_path / name)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1 and "another arch?" in error
        assert f"encoder from --init {tmp_path / name}: " in error
        assert f"1 not used ({name})" in error or "blocks" not in name


# ------------------------------------------------------------------ training steps


STEPS = "--epochs 2 --warmup_epochs 0 --lr .128 --min_lr .001 --weight_decay .1 --log_every 1".split()


def naive_image(network, image, keep, normalised):
    """Prediction errors of one image, patch by patch: its masked patches', and those of a flat painting."""
    vit, positions, decoder_positions = network.backbone, *(
        dspt_mae.sincos_positions(D, (4, 4)) for D in (64, 32))
    x = (image / 255 - torch.tensor(common.IMAGENET_MEAN).view(3, 1, 1))
    x = x / torch.tensor(common.IMAGENET_STD).view(3, 1, 1)
    patches = [x[:, 8 * (n // 4) :][:, :8, 8 * (n % 4) :][:, :, :8] for n in range(16)]
    weight, bias = vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias
    tokens = [vit.cls_token[0, 0] + positions[0]]
    tokens += [weight @ patches[n].flatten() + bias + positions[1 + n] for n in keep]
    latent = vit.norm(vit.blocks(torch.stack(tokens)[None]))[0]
    encoded = network.decoder_embed(latent)
    tokens = [encoded[0] + decoder_positions[0]]
    for n in range(16):
        token = encoded[1 + keep.index(n)] if n in keep else network.mask_token[0, 0]
        tokens.append(token + decoder_positions[1 + n])
    out = network.decoder_norm(network.decoder_blocks(torch.stack(tokens)[None]))[0]
    errors, flat = [], []
    for n in set(range(16)) - set(keep):
        target = patches[n].permute(1, 2, 0).flatten()  # by row, column, channel
        if normalised:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()  # unbiased variance
        errors.append(((network.decoder_pred(out[1 + n]) - target) ** 2).mean())
        flat.append(((target.mean() - target) ** 2).mean())
    return errors, flat, latent[0]


def naive_training(paths, micro_batch, normalised):
    """Three steps from the specification: figures of each, weights, and AdamW's first moments."""
    network = dspt_mae.build_network(make_args(*STEPS))
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    first, second = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
    dataset, figures = CropDataset(common.Samples(paths), (32, 32), 0), []
    order = torch.randperm(len(paths), generator=common.generator(0, "order", 0)).tolist()
    for step in range(3):
        errors, flats, spread = [], [], []
        for micro in range(4 // micro_batch):
            begin, latents = 4 * step + micro * micro_batch, []
            noise = torch.rand(micro_batch, 16, generator=common.generator(0, "mask", step, micro, 0))
            for index, row in zip(order[begin:], noise.argsort(1).tolist(), strict=False):
                error, flat, latent = naive_image(network, dataset[0, index], row[:4], normalised)
                errors, flats, latents = errors + error, flats + flat, [*latents, latent]
            spread.append(common.feature_std(torch.stack(latents)))
        loss = sum(errors) / 48  # 12 hidden patches of each image
        network.zero_grad()
        loss.backward()
        lr = 0.001 + (0.002 - 0.001) * 0.5 * (1 + math.cos(math.pi * step / 14))  # .128 * 4 / 256
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained.values()))
        figures.append([loss.item(), sum(flats).item() / 48, sum(spread).item() / len(spread), norm, lr])
        with torch.no_grad():
            for name, p in trained.items():
                p.mul_(1 - lr * 0.1 * (p.ndim > 1 and not name.endswith("bias")))
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.95 * second[name] + 0.05 * p.grad**2
                rms = (second[name] / (1 - 0.95 ** (step + 1))).sqrt()
                p.sub_(lr * first[name] / (1 - 0.9 ** (step + 1)) / (rms + 1e-8))
    return figures, trained, first


@pytest.mark.parametrize("micro_batch, normalised", [(4, True), (4, False), (2, True)])
def test_steps_equal_plain_loops(train, scenes, tmp_path, micro_batch, normalised):
    """Figures and weights over three steps; accumulation is one large batch, but for its masks."""
    flags = [*STEPS, "--batch_size_per_gpu", str(micro_batch), "--accum_steps", str(4 // micro_batch)]
    flags += ["--max_steps", "3", "--norm_pix_loss" if normalised else "--no-norm_pix_loss"]
    saved = train(tmp_path, *flags, script="dspt_mae")
    figures, trained, first = naive_training(common.list_images(scenes / "train"), micro_batch, normalised)
    names = "loss flat_loss feature_std grad_norm lr".split()
    for line, expected in zip(read_log(tmp_path)[1:], figures, strict=True):
        assert [line[name] for name in names] == pytest.approx(expected, rel=1e-4)
    sure = 0
    for name, p in trained.items():  # a gradient of nearly 0 has no sure sign, and AdamW's steps are signs
        where = first[name].abs() > 1e-6
        sure += int(where.sum())
        torch.testing.assert_close(saved["model"][name][where], p.data[where], atol=4e-5, rtol=1e-3,
                                   msg=lambda text, name=name: f"{name}: {text}")
    assert sure > 0.9 * sum(p.numel() for p in trained.values())


# ------------------------------------------------------------------ whole runs


def test_whole_run_writes_everything_and_its_pictures_show_the_batch(train, tmp_path, monkeypatch):
    drawn, draw = {}, common.Run.draw

    def noting(run, name, rows, *more):
        drawn.setdefault(name, []).append(run.step)
        draw(run, name, rows, *more)

    monkeypatch.setattr(common.Run, "draw", noting)
    saved = train(tmp_path, "--log_every", "3", script="dspt_mae")
    assert drawn == {"views.png": [0], "reconstruction.png": [2, 5, 6, 8, 11, 13, 14, 17, 20]}
    assert saved["step"] == 21 and saved["epoch"] == 3 and saved["args"]["img_size"] == [32, 32]
    header, *lines = read_log(tmp_path)
    assert header["init"] == "from scratch" and header["patches"] == "4 x 4 of 8 px"
    assert header["scaled_lr"] == pytest.approx(1.5e-4 * 4 / 256) and header["kept_patches"] == 4
    assert lines[-1]["step"] == 21 and lines[-1]["flat_loss"] == pytest.approx(1, abs=0.05)
    backbone = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0)
    encoder = {k.removeprefix("backbone."): v for k, v in saved["model"].items() if k.startswith("backbone.")}
    assert_same(dict(backbone.state_dict()), encoder)
    groups = [(g["betas"], g["weight_decay"], len(g["params"])) for g in saved["optimizer"]["param_groups"]]
    decayed = sum(x.ndim > 1 for name, x in saved["model"].items() if name != "backbone.pos_embed")
    others = len(saved["model"]) - 1 - decayed  # biases and norms
    assert groups == [((0.9, 0.95), 0.05, decayed), ((0.9, 0.95), 0.0, others)]
    assert Image.open(tmp_path / "views.png").size == (2 * 34 + 2, 4 * 34 + 2)  # 4 images: whole, masked
    assert Image.open(tmp_path / "reconstruction.png").size == (3 * 34 + 2, 4 * 34 + 2)


def test_crops_that_are_not_square_resume(train, tmp_path):
    flags = ["--accum_steps", "2", "--img_size", "16", "40", "--no-norm_pix_loss", "--max_steps"]
    unbroken = train(tmp_path / "a", *flags, "4", script="dspt_mae")
    for steps in "24":
        resumed = train(tmp_path / "b", *flags, steps, script="dspt_mae")
    assert_same_state(resumed, unbroken)


def test_a_small_run_learns(train, tmp_path):
    train(tmp_path, "--epochs", "25", "--lr", "0.06", "--log_every", "25", script="dspt_mae")
    lines = read_log(tmp_path)[1:]
    assert lines[-1]["loss"] < 0.95 * lines[-1]["flat_loss"] < lines[0]["loss"]


def test_warm_up_is_40_epochs_or_a_tenth_of_all():
    for epochs, given, expected in ((1600, None, 40), (20, None, 2), (3, None, 0.3), (20, 5, 5)):
        flags = ["--data_path", "x", "--output_dir", "x", "--epochs", str(epochs)]
        args = dspt_mae.get_parser().parse_args(flags + (["--warmup_epochs", str(given)] if given else []))
        dspt_mae.check_args(args)
        assert args.warmup_epochs == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("flag", ["--no-norm_pix_loss", "--norm_pix_loss"])
def test_reconstruction_shows_the_prediction_in_pixels(tmp_path, flag, dtype):
    """A perfect prediction gives the source back, in the third column, with either kind of targets."""
    args = make_args("--output_dir", tmp_path, flag)
    images = torch.rand(2, 3, 32, 32, generator=generator())
    images = common.normalize(images, args.mean, args.std, torch.uint8)
    patches, mask = dspt_mae.patchify(images, 8), masking(2, 16)[2]
    target = dspt_mae.normalize_patches(patches)[0] if args.norm_pix_loss else patches
    run = SimpleNamespace(args=args, draw=lambda name, rows, dtype: common.save_grid(
        tmp_path / name, rows, args.mean, args.std, dtype))
    dspt_mae.draw_pictures(run, "a.png", patches, mask, target, 8, (4, 4), dtype)
    picture = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    source, masked, painted = (picture[2:34, 2 + 34 * column :][:, :32] for column in range(3))
    mean, std = (args.mean, args.std) if dtype == torch.uint8 else (0.5, 1 / 6)
    shown = images[0].permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    assert np.abs(source - 255 * shown.clamp(0, 1).numpy()).max() <= 1
    assert np.abs(source - painted).max() <= 1 and np.abs(source - masked).max() > 50
    for n in range(16):
        same = np.array_equal(*(x[8 * (n // 4) :][:8, 8 * (n % 4) :][:, :8] for x in (source, masked)))
        assert same == (mask[0, n] == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_gpu_run(train, tmp_path, amp):
    flags = ["--device", "cuda", "--amp", amp, "--max_steps", "4", "--num_workers", "2"]
    assert train(tmp_path, *flags, script="dspt_mae")["step"] == 4

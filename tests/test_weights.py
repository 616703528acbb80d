"""Every format of weights that the scripts take: the loaded backbone's features are those of the source.

The files are built here, in the public layout of each format, from networks with random weights.
"""

import argparse
import functools
import json
import os
import shutil

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import tiny
from torch import nn

import common
import dspt_mae

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(model, seed=0):
    """Every weight, bias and statistic moved at random, so that nothing is equal by its initial value."""
    draws = generator(seed)
    for name, x in model.state_dict().items():
        if name.endswith("running_var"):
            x.copy_(0.5 + torch.rand(x.shape, generator=draws))
        elif x.is_floating_point():
            x.add_(torch.randn(x.shape, generator=draws) * 0.1 * (x.std() if x.ndim > 1 else 1))
    return model.eval()


# ------------------------------------------------------------------ sources: networks and their features


@functools.cache
def source(name):
    """A network of timm or torchvision with a classifier of 10; the arch to load it into; side of images."""
    if name == "torchvision_vit":
        model = torchvision.models.VisionTransformer(32, 16, 12, 3, 192, 768, num_classes=10)
        return randomized(model), VIT, 32
    if name == "torchvision_swin":
        return randomized(torchvision.models.swin_t(num_classes=10)), SWIN, 224
    if name.startswith("torchvision_"):
        arch = name.removeprefix("torchvision_")
        return randomized(torchvision.models.get_model(arch, num_classes=10)), arch, 32
    sized = {VIT: {"img_size": 32}, SWIN: {"img_size": 224}}.get(name, {})
    return randomized(timm.create_model(name, num_classes=10, **sized)), name, sized.get("img_size", 32)


@functools.cache
@torch.no_grad()
def features(name):
    """What the source itself gives before its classifier, on `images`."""
    model, _, side = source(name)
    if not name.startswith("torchvision_"):
        return model.forward_head(model.forward_features(images(side)), pre_logits=True)
    kept = []
    classifier = {"torchvision_vit": "heads", "torchvision_swin": "head"}.get(name, "fc")
    hook = getattr(model, classifier).register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(images(side))
    hook.remove()
    return kept[0]


def images(side):
    return torch.rand(2, 3, side, side, generator=generator(7))


def load(path, name, key=None, **kwargs):
    """The backbone filled from `path` as the scripts do it, and the report."""
    _, arch, side = source(name)
    torch.manual_seed(99)
    backbone = common.build_backbone(arch, side).eval()
    state, info = common.read_weights(str(path), key)
    assert info == {}
    return backbone, common.load_backbone(backbone, state, "file", **kwargs)


def assert_features(backbone, name):
    expected = features(name)
    assert expected.std(0).mean() > 1e-3  # they depend on the image
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(source(name)[2])), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ layouts: what lies around a backbone


def prefixed(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def without(state, *classifiers):
    return {name: x for name, x in state.items() if not name.startswith(classifiers)}


def other(state):
    """Another network of the same kind: taken by mistake, its features differ."""
    return {name: x + 1 if x.is_floating_point() else x for name, x in state.items()}


def rest():
    """What else a checkpoint of the authors holds."""
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4, output_dir="."),
    }


def dino(state, prefix="module.backbone.", taken="teacher"):
    """DINO, DINO-MC: `teacher` and `student`, the head beside the backbone."""
    head = {"head.mlp.0.weight": torch.rand(4, 4), "head.last_layer.weight_g": torch.rand(4, 1)}
    head = prefixed(prefix.removesuffix("backbone."), head)
    backbone = without(state, "fc.", "head.", "heads.")
    networks = {}
    for name in ("student", "teacher"):
        networks[name] = prefixed(prefix, backbone if name == taken else other(backbone)) | head
    return {**networks, **rest(), "dino_loss": {"center": torch.zeros(1, 4)}}


def moco(state, taken="encoder_q"):
    """MoCo, MHCL: `state_dict` with both encoders, their heads, and the queue."""
    heads = {
        "fc.0.weight": torch.rand(4, 4),
        "fc.2.bias": torch.rand(4),
        "hard_head.weight": torch.rand(4, 4),
    }
    networks = {}
    for name in ("encoder_k", "encoder_q"):
        backbone = without(state, "fc.", "head.", "heads.")
        networks |= prefixed(f"module.{name}.", (backbone if name == taken else other(backbone)) | heads)
    queue = {"module.queue": torch.rand(128, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": {**networks, **queue}, **rest()}


def mae(state):
    """MAE, DSPT: `model` with the decoder beside the encoder."""
    decoder = {"mask_token": torch.rand(1, 1, 16), "decoder_pos_embed": torch.rand(1, 5, 16)}
    decoder |= {"decoder_embed.weight": torch.rand(16, 192), "decoder_blocks.0.norm1.weight": torch.rand(16)}
    return {"model": without(state, "head.") | decoder, **rest(), "scaler": {}}


def cmid(state, taken="online_encoder"):
    """CMID: `model` with the backbone of each encoder under `model.`, and its other parts beside it."""
    beside = {"projector.0.weight": torch.rand(4, 4), "predictor.bias": torch.rand(4)}
    networks = {}
    for name in ("online_encoder", "target_encoder"):
        backbone = without(state, "fc.", "head.", "heads.")
        backbone = prefixed("model.", backbone if name == taken else other(backbone))
        networks |= prefixed(f"{name}.", backbone | beside)
    return {"model": {**networks, "queue": torch.rand(16, 8)}, **rest()}


def old_mlp(state):
    """torchvision's ViT before its MLP was a Sequential."""
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    renamed = {}
    for name, x in state.items():
        for new, old in names.items():
            name = name.replace(new, old)
        renamed[name] = x
    return renamed


def microsoft(state):
    """Swin in its authors' names, as CMID extracts it: downsample ends a stage, and buffers are kept."""
    renamed = {}
    for name, x in without(state, "head.").items():
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}", f"layers.{stage - 1}")
        renamed[name] = x
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    return renamed | buffers | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}


def unwrapped(state):
    return {name.removeprefix("module."): x for name, x in state.items()}


def plain(state):
    return state


FORMATS = {
    # timm and torchvision
    "timm_resnet": ("resnet18", plain, None),
    "timm_vit": (VIT, plain, None),
    "timm_convnext": ("test_convnext", plain, None),  # part of its head stays when the classifier goes
    "torchvision_resnet": ("torchvision_resnet18", plain, None),
    "torchvision_vit": ("torchvision_vit", plain, None),
    "torchvision_vit_old": ("torchvision_vit", old_mlp, None),
    "torchvision_swin": ("torchvision_swin", plain, None),
    # DINO and DINO-MC
    "dino_vit": (VIT, dino, None),
    "dino_teacher": (VIT, dino, "teacher"),
    "dino_student": (VIT, lambda state: dino(state, taken="student"), "student"),
    "dino_unwrapped": (VIT, lambda state: dino(state, "backbone."), None),
    "dino_bare": (VIT, lambda state: dino(state, "module."), None),
    "dino_mc_resnet": ("torchvision_resnet18", dino, None),
    "dino_mc_swin": ("torchvision_swin", dino, None),
    # MoCo and MHCL
    "moco": ("torchvision_resnet18", moco, None),
    "moco_encoder_k": ("torchvision_resnet18", lambda state: moco(state, "encoder_k"), "encoder_k"),
    "moco_state_dict": ("test_resnet", moco, "state_dict"),
    "moco_unwrapped": ("test_resnet", lambda state: unwrapped(moco(state)["state_dict"]), "encoder_q"),
    # MAE and DSPT
    "mae": (VIT, mae, None),
    # CMID
    "cmid_resnet": ("torchvision_resnet18", cmid, None),
    "cmid_target": ("test_resnet", lambda state: cmid(state, "target_encoder"), "target_encoder"),
    "cmid_target_model": ("test_resnet", lambda state: cmid(state, "target_encoder"), "target_encoder.model"),
    "cmid_extracted": ("test_resnet", lambda state: without(state, "fc."), None),
    "cmid_extracted_state_dict": ("test_resnet", lambda state: {"state_dict": without(state, "fc.")}, None),
    "cmid_extracted_model": ("test_resnet", lambda state: {"model": without(state, "fc.")}, None),
    "cmid_extracted_swin": (SWIN, microsoft, None),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS)
def test_features_are_those_of_the_source(tmp_path, case):
    name, layout, key = FORMATS[case]
    torch.save(layout(source(name)[0].state_dict()), tmp_path / "weights.pth")
    backbone, report = load(tmp_path / "weights.pth", name, key)
    own = len(backbone.state_dict())
    assert report.startswith(f"file: {own} of {own} tensors loaded, 0 missing, ")
    assert_features(backbone, name)


def test_the_test_would_see_another_network(tmp_path):
    """Features of fresh weights, and of the network beside the one taken, are far from the source's."""
    name, layout, _ = FORMATS["moco"]
    torch.save(layout(source(name)[0].state_dict()), tmp_path / "weights.pth")
    backbone, _ = load(tmp_path / "weights.pth", name, "encoder_k")
    for wrong in (backbone, common.build_backbone("resnet18", 32).eval()):
        with pytest.raises(AssertionError, match="not close"):
            assert_features(wrong, name)


@pytest.mark.parametrize("kind", ["a.pth.tar", "a.safetensors", "legacy.pth", "folder"])
def test_kinds_of_files(tmp_path, kind):
    name = "torchvision_resnet18"
    content, path = moco(source(name)[0].state_dict()), tmp_path / kind
    if kind == "a.safetensors":
        safetensors.torch.save_file({name: x.clone() for name, x in content["state_dict"].items()}, path)
    elif kind == "folder":
        path.mkdir()
        torch.save(content, path / "checkpoint.pth")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy.pth")
    backbone, report = load(path, name)
    assert "0 missing, 3 not used (fc.0.weight, fc.2.bias, hard_head.weight)" in report
    assert_features(backbone, name)


def test_batchnorms_of_old_files_lack_counters(tmp_path):
    name = "torchvision_resnet18"
    state = source(name)[0].state_dict()
    torch.save({n: x for n, x in state.items() if "num_batches_tracked" not in n}, tmp_path / "old.pth")
    backbone, report = load(tmp_path / "old.pth", name)
    assert "100 of 120 tensors loaded, 20 missing (bn1.num_batches_tracked" in report
    assert_features(backbone, name)


def test_hub_id(tmp_path, monkeypatch, capsys):
    """A repository in timm's format: weights are read, a pickle with code is not."""
    monkeypatch.chdir(tmp_path)
    model, repository = source("test_vit")[0], tmp_path / "repository"
    timm.models.save_for_hf(model, repository, safe_serialization=False)

    def local(repo_id, filename, **_):
        if not (repository / filename).exists():
            raise timm.models._hub.EntryNotFoundError.__new__(timm.models._hub.EntryNotFoundError)
        return repository / filename

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", local)
    state, info = common.read_weights("hf-hub:someone/something")
    assert info["arch"] == "test_vit" and info["img_size"] == 160
    backbone = common.build_backbone("test_vit", 160).eval()
    common.load_backbone(backbone, state, "hub")
    x = images(160)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(backbone(x), expected, atol=1e-5, rtol=1e-5)

    torch.save({"weight": Evil()}, repository / "pytorch_model.bin")
    with pytest.raises(SystemExit):
        common.read_weights("hf-hub:someone/something")
    assert "could not load pretrained weights" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_swin_of_another_size_keeps_its_place(tmp_path):
    """Tables of the smaller windows are resampled; all else, downsample above all, is taken as it is."""
    model = source(SWIN)[0]
    for state in (without(model.state_dict(), "head."), microsoft(model.state_dict())):
        backbone = common.build_backbone(SWIN, 64)
        assert ": 171 of 171 tensors loaded, 0 missing" in common.load_backbone(backbone, state, "swin")
        for name, x in backbone.state_dict().items():
            same = x.shape == model.state_dict()[name].shape
            assert torch.equal(x, model.state_dict()[name]) if same else "bias_table" in name


# ------------------------------------------------------------------ refusals


def refused(capsys, path, arch, *words, key=None, side=32):
    backbone = common.build_backbone(arch, side)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    with pytest.raises(SystemExit) as stop:
        common.load_backbone(backbone, common.read_weights(str(path), key)[0], str(path))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize(
    "name, arch",
    [
        ("resnet34", "resnet18"),
        ("resnet50", "resnet18"),
        ("resnet18", "resnet34"),
        ("vit_b_16", "resnet18"),
        ("vit_b_16", VIT),
        ("swin_t", VIT),
        ("resnet18", VIT),
        ("resnet50", SWIN),
        ("swin_s", SWIN),
    ],
)
def test_weights_of_another_arch(tmp_path, capsys, name, arch):
    with torch.device("meta"):
        shapes = torchvision.models.get_model(name).state_dict()
    state = {n: torch.zeros((), dtype=x.dtype).expand(x.shape) for n, x in shapes.items()}
    for content in (state, {"state_dict": prefixed("module.encoder_q.", state)}):
        torch.save(content, tmp_path / "weights.pth")
        refused(capsys, tmp_path / "weights.pth", arch, "weights.pth: ", " tensors loaded", "another arch?")


@pytest.mark.parametrize(
    "name, block, extra",
    [
        ("torchvision_resnet18", "layer4.1.", "layer4.2."),
        ("torchvision_vit", "encoder.layers.encoder_layer_11.", "encoder.layers.encoder_layer_12."),
        ("torchvision_swin", "features.5.5.", "features.5.6."),
    ],
)
def test_more_blocks_than_the_arch_has(tmp_path, capsys, name, block, extra):
    model, arch, side = source(name)
    more = {n.replace(block, extra): x for n, x in model.state_dict().items() if n.startswith(block)}
    assert more
    torch.save(model.state_dict() | more, tmp_path / "deeper.pth")
    refused(capsys, tmp_path / "deeper.pth", arch, " 0 missing", "another arch?", side=side)


def test_under_90_percent(tmp_path, capsys):
    name = "torchvision_vit"
    state = source(name)[0].state_dict()
    for blocks, fits in ((1, True), (2, False)):  # of 12, each with 12 of the 150 tensors
        lost = tuple(f"encoder.layers.encoder_layer_{i}." for i in range(blocks))
        torch.save({"state_dict": without(state, *lost)}, tmp_path / "part.pth")
        if not fits:
            refused(capsys, tmp_path / "part.pth", VIT, "126 of 150 tensors loaded, 24 missing (blocks.0.")
        backbone, report = load(tmp_path / "part.pth", name, allow_partial=not fits)
        assert f"{12 * blocks} missing (blocks.0." in report
        assert torch.equal(backbone.cls_token, state["class_token"])


@pytest.mark.parametrize("key", ["encoder", "queue", "module.encoder_k", "teacher"])
def test_key_that_names_no_network(tmp_path, capsys, key):
    path = tmp_path / "moco.pth"
    torch.save(moco(source("torchvision_resnet18")[0].state_dict()), path)
    words = ["--checkpoint_key", "state_dict", "encoder_k, encoder_q", "queue"]
    refused(capsys, path, "resnet18", *words, key=key)


@pytest.mark.parametrize("content", [[1], torch.ones(3), {"model": 3}, {"model": {"a": 1}}, {"epoch": 3}])
def test_files_without_tensors(tmp_path, capsys, content):
    torch.save(content, tmp_path / "a.pth")
    refused(
        capsys,
        tmp_path / "a.pth",
        "resnet18",
        f"--weights {tmp_path / 'a.pth'}: ",
        "no state dict of tensors",
    )
    refused(capsys, tmp_path / "a.pth", "resnet18", key="model")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "kind", ["a.pth", "a.pth.tar", "a.bin", "a.safetensors", "folder", "folder/checkpoint.pth"]
)
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, capsys, kind, legacy, whole):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    path = tmp_path / kind
    file = path / "checkpoint.pth" if path.is_dir() else path
    content = moco({"conv1.weight": torch.ones(1)}) | {"args": Evil()}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    for key in (None, "encoder_k"):
        with pytest.raises(SystemExit) as stop:
            common.read_weights(str(path), key, whole=whole)
        assert stop.value.code == 2 and not (tmp_path / "executed").exists()
        error = capsys.readouterr().err
        assert str(file) in error and ("would run code" in error or kind == "a.safetensors")
    shutil.copy(file, tmp_path / "trusted.pth")
    torch.load(tmp_path / "trusted.pth", weights_only=False)  # it would have run
    assert (tmp_path / "executed").exists()


# ------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("case", ["torchvision_vit", "dino_vit", "mae", "moco_vit", "cmid_vit"])
def test_dspt_mae_goes_on_from_every_format(tmp_path, case):
    """A ViT in each layout fills the encoder; only MAE's file brings parts of a decoder."""
    name, layout, _ = (
        FORMATS[case] if case in FORMATS else (VIT, {"moco_vit": moco, "cmid_vit": cmid}[case], None)
    )
    torch.save(layout(source(name)[0].state_dict()), tmp_path / "weights.pth")
    flags = ["--data_path", "x", "--output_dir", "x", "--init", str(tmp_path / "weights.pth")]
    args = dspt_mae.get_parser().parse_args(flags + tiny("dspt_mae", "--arch", VIT))
    dspt_mae.check_args(args)
    network = dspt_mae.build_network(args)
    lines = dspt_mae.load_init(network, args)
    assert "150 of 150 tensors loaded, 0 missing" in lines[0]
    assert_features(network.backbone.eval(), name)
    assert ("decoder: none in the file" in lines[1]) == (case != "mae")
    state, _ = common.read_weights(args.init, whole=True)
    assert ("decoder_embed.weight" in state) == ("mask_token" in state) == (case == "mae")


def test_decoders_survive_prefixes(tmp_path):
    """Ours and wrapped ones, with and without `backbone.`."""
    decoder = {"decoder_embed.weight": torch.ones(2), "mask_token": torch.ones(3)}
    for prefix in ("", "backbone."):
        state = prefixed("module.", {f"{prefix}cls_token": torch.ones(1), **decoder})
        torch.save({"model": state}, tmp_path / "a.pth")
        whole, _ = common.read_weights(str(tmp_path / "a.pth"), whole=True)
        assert whole.keys() == {"cls_token", *decoder}
        part, _ = common.read_weights(str(tmp_path / "a.pth"))
        assert part.keys() == {"cls_token", *(decoder if prefix == "" else ())}


@pytest.mark.parametrize("script", ["dino_mc", "mhcl", "cmid"])
def test_pretraining_starts_from_a_public_file(train, tmp_path, capsys, script):
    torch.save(moco(source("test_resnet")[0].state_dict()), tmp_path / "moco.pth.tar")
    flags = ["--init", tmp_path / "moco.pth.tar", "--max_steps", "1", "--arch", "test_resnet"]
    train(tmp_path / "out", *flags, script=script)
    assert "0 missing, 3 not used (fc.0.weight" in capsys.readouterr().out


def test_evaluation_of_public_files(run, scenes, tmp_path):
    """The queries of one file are the keys of the other: equal accuracies; and a folder holds the same."""
    state = source("test_resnet")[0].state_dict()
    (tmp_path / "folder").mkdir()
    torch.save(moco(state), tmp_path / "q.pth.tar")
    torch.save(moco(state, "encoder_k"), tmp_path / "k.pth.tar")
    shutil.copy(tmp_path / "q.pth.tar", tmp_path / "folder" / "checkpoint.pth")
    flags = ["--data_path", scenes, "--arch", "test_resnet", "--img_size", "32", "--nb_knn", "1", "3"]
    flags += ["--output_dir", tmp_path, "--num_workers", "0", "--device", "cpu", "--weights"]
    run("eval_knn", *flags, tmp_path / "q.pth.tar", tmp_path / "folder")
    run("eval_knn", *flags, tmp_path / "k.pth.tar", "--checkpoint_key", "encoder_k")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[0]["top1"] == lines[1]["top1"] == lines[2]["top1"]

"""Every format of weights that the scripts take: the loaded backbone's features are those of the source.

The files are built here, in the public layout of each format, from networks with random weights.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import inspect
import io
import json
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import tiny
from PIL import Image
from torch import nn

import common
import dspt_mae
import eval_knn
import eval_linear

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


class MetricStroge:
    """An object that CMID's Trainer pickles, of a class of its own."""

    def __init__(self):
        self.values = {"loss": [np.float64(1.0)]}

    def __setstate__(self, state):
        raise AssertionError("code of a file's class ran")


MetricStroge.__module__ = "exploring_metric"
sys.modules["exploring_metric"] = types.ModuleType("exploring_metric")
sys.modules["exploring_metric"].MetricStroge = MetricStroge


def rest():
    """What else a checkpoint of the authors holds; DINO's schedules put numpy numbers into the optimizer."""
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0].update(lr=np.linspace(0, 1, 3)[1], weight_decay=np.float64(0.04))
    more = {"output_dir": pathlib.Path("."), "crops": np.array([0.4, 1.0]), "names": np.array(["a"], object)}
    return {
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4, **more),
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
    for name in ("online_encoder", "target_encoder", "branch_encoder"):
        backbone = without(state, "fc.", "head.", "heads.")
        backbone = prefixed("model.", backbone if name == taken else other(backbone))
        networks |= prefixed(f"{name}.", backbone | beside)
    return {"model": {**networks, "queue": torch.rand(16, 8)}, **rest(), "metric_storage": MetricStroge()}


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


def mmcls(state):
    """Swin as CMID's authors train it: nn.Unfold merges patches, and names are mmcls's."""
    renamed = {}
    for name, x in without(state, "head.").items():
        if name.startswith("layers"):
            _, stage, part, rest = name.split(".", 3)
            if part == "downsample":
                C = x.shape[-1] // 4
                c, dy, dx = torch.meshgrid(torch.arange(C), torch.arange(2), torch.arange(2), indexing="ij")
                timms = ((2 * dx + dy) * C + c).double()  # index of each neighbour's channels
                order = nn.Unfold(2)(timms[None]).flatten().long()  # in their order
                x = x[..., order]
                name = f"stages.{int(stage) - 1}.downsample.{rest}"
            else:
                rest = rest.replace("attn.", "attn.w_msa.").replace("mlp.fc1", "ffn.layers.0.0")
                name = f"stages.{stage}.blocks.{rest.replace('mlp.fc2', 'ffn.layers.1')}"
        elif name.startswith("norm."):
            name = name.replace("norm", "norm3")
        renamed[name.replace("patch_embed.proj.", "patch_embed.projection.")] = x
    return renamed


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
    "cmid_swin": (SWIN, lambda state: cmid(mmcls(state)), None),
    "cmid_swin_extracted": (SWIN, mmcls, None),
    "cmid_branch": ("test_resnet", lambda state: cmid(state, "branch_encoder"), "branch_encoder"),
}  # fmt: skip


@pytest.mark.parametrize("case, zip", [*((case, 1) for case in FORMATS), ("dino_vit", 0), ("cmid_target", 0)])
def test_features_are_those_of_the_source(tmp_path, case, zip):
    name, layout, key = FORMATS[case]
    content = layout(source(name)[0].state_dict())
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=bool(zip))
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


@pytest.mark.parametrize("side, nearness", [(112, 0.1), (256, 0.3), (448, 1e-5)])
def test_swin_at_other_sizes(side, nearness):
    """Torchvision's features at multiples of 224 px; near them elsewhere, of up to 3: windows stay 7 wide."""
    model, captured = source("torchvision_swin")[0], []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    backbone = common.build_backbone(SWIN, side).eval()
    state = common._backbone_names(model.state_dict(), "encoder_q", False)
    report = common.load_backbone(backbone, state, "swin")
    assert "171 of 171 tensors loaded, 0 missing" in report and "resampled" not in report
    with torch.no_grad():
        model(images(side)[:1])
        torch.testing.assert_close(backbone(images(side)[:1]), captured[0], atol=nearness, rtol=1e-5)
    hook.remove()


def fine_tuned_mae():
    """A ViT as MAE's and CSPT's code fine-tunes it, and its features fc_norm(mean of the patch tokens)."""
    model, kept = source(VIT)[0], []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(images(32))
    hook.remove()
    weight, bias = torch.rand(2, 192, generator=generator(3))
    state = without(model.state_dict(), "norm.") | {"fc_norm.weight": weight, "fc_norm.bias": bias}
    return {"model": state, **rest()}, nn.functional.layer_norm(
        kept[0][:, 1:].mean(1), (192,), weight, bias, 1e-6
    )


def test_fine_tuned_mae_gives_the_norm_of_the_mean(tmp_path, capsys):
    content, expected = fine_tuned_mae()
    torch.save(content, tmp_path / "tuned.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    path, alone = str(tmp_path / "tuned.pth"), common.Process(0, 1, torch.device("cpu"), None)
    for _ in range(2):  # the file, then our own export of it
        flags = ["--data_path", "x", "--weights", path, "--arch", VIT, "--img_size", "32"]
        args = eval_knn.get_parser().parse_args(flags)
        (prepared,) = eval_knn.prepare(args, alone, [str(tmp_path / "image.png")])
        backbone = prepared.model.eval()
        assert "150 of 150 tensors loaded, 0 missing" in prepared.report
        with torch.no_grad():
            torch.testing.assert_close(backbone(images(32)), expected, atol=1e-5, rtol=1e-5)
        assert eval_linear.with_features(prepared, path, None, False) is prepared
        common.export_backbone(backbone, tmp_path / "backbone", (0, 0, 0), (1, 1, 1))
        path = str(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}/backbone", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images(32)), expected, atol=1e-5, rtol=1e-5)
    # To go on from its class token, a norm is missing.
    refused(capsys, tmp_path / "tuned.pth", VIT, "2 missing (norm.bias, norm.weight)", "fc_norm")


@pytest.mark.parametrize("arch, kwargs", [("test_resnet", {}), (VIT, {"global_pool": "avg"}), (SWIN, {})])
def test_exported_config_has_no_more_arguments_than_the_network_needs(tmp_path, arch, kwargs):
    """transformers gives timm num_classes itself, and fails where the config has it too."""
    backbone = common.build_backbone(arch, 64, **kwargs)
    common.export_backbone(backbone, tmp_path / "backbone", (0, 0, 0), (1, 1, 1))
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert config["model_args"] == backbone.model_args and "num_classes" not in config["model_args"]
    assert kwargs.items() <= config["model_args"].items()
    assert {"architecture", "num_classes", "pretrained_cfg"} <= config.keys()  # of which it knows timm's


SEVERAL = [
    ("test_resnet", *pair) for pair in ((1, 3), (13, 3), (12, 1), (4, 12), (3, 1), (3, 2), (3, 6), (3, 12))
]
SEVERAL += [(arch, 13, 3) for arch in ("resnet18", "test_vit", SWIN, "test_convnext", "xcit_nano_12_p16_224")]


@pytest.mark.parametrize("arch, C, in_chans", SEVERAL)
def test_equal_channels_give_the_features_they_gave(arch, C, in_chans):
    file = randomized(common.build_backbone(arch, 32, in_chans=C))
    network = common.build_backbone(arch, 32, in_chans=in_chans).eval()
    report = common.load_backbone(network, file.state_dict(), "file")
    assert (
        f".weight: {C} channels converted to {in_chans}" in report and ", 0 missing, 0 not used; " in report
    )
    grey = images(32)[:, :1]
    with torch.no_grad():
        before, after = (net(grey.expand(-1, k, -1, -1)) for net, k in ((file, C), (network, in_chans)))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_three_channels_stay_the_first_of_more():
    weight = torch.rand(8, 3, 4, 4, generator=generator())
    more, _ = common.convert_first_conv(weight, nn.Conv2d(5, 8, 4))
    torch.testing.assert_close(more, torch.cat([weight, weight[:, :2]], 1) * 3 / 5)


def test_patches_and_positions_are_resampled_and_said():
    file = common.build_backbone("test_vit", 32, 8, in_chans=2)
    report = common.load_backbone(common.build_backbone("test_vit", 64, 4), file.state_dict(), "file")
    assert report == (
        "file: 78 of 78 tensors loaded, 0 missing, 0 not used; patch_embed.proj.weight: 2 channels converted "
        "to 3, patches of 8 x 8 px resampled to 4 x 4; 1 resampled (pos_embed (1 x 17 x 64 to 1 x 257 x 64))"
    )


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


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("torchvision_vit", "encoder.ln.weight", "1 missing (norm.weight)"),
        ("torchvision_resnet18", "layer4.1.bn2.running_var", "1 missing (layer4.1.bn2.running_var)"),
        ("torchvision_vit", "class_token", "1 missing (cls_token)"),
        ("torchvision_vit", "encoder.pos_embedding", "1 missing (pos_embed)"),
        ("torchvision_resnet18", "conv1.weight", "1 missing (conv1.weight)"),
    ],
)
def test_one_tensor_missing(tmp_path, capsys, name, tensor, words):
    state = source(name)[0].state_dict()
    kept = {key: x for key, x in state.items() if key != tensor}
    torch.save({"state_dict": kept}, tmp_path / "part.pth")
    refused(capsys, tmp_path / "part.pth", source(name)[1], words)
    backbone, report = load(tmp_path / "part.pth", name, allow_partial=True)
    assert words in report
    last = "blocks.11.mlp.fc2.weight" if "vit" in name else "layer4.1.conv2.weight"
    theirs = "encoder.layers.encoder_layer_11.mlp.3.weight" if "vit" in name else last
    assert torch.equal(backbone.state_dict()[last], state[theirs])


@pytest.mark.parametrize(
    "tensor, wrong, words",
    [
        ("conv1.weight", (64, 3, 3, 3), "64 x 3 x 3 x 3 in the file, 64 x 3 x 7 x 7 in the network"),
        ("conv1.weight", (32, 5, 7, 7), "32 x 5 x 7 x 7 in the file, 64 x 3 x 7 x 7 in the network"),
        ("layer1.0.conv1.weight", (64, 32, 3, 3), "64 x 32 x 3 x 3 in the file, 64 x 64 x 3 x 3 in the"),
        ("bn1.weight", (128,), "128 in the file, 64 in the network"),
    ],
)
def test_one_tensor_of_another_shape(tmp_path, capsys, tensor, wrong, words):
    name = "torchvision_resnet18"
    torch.save(source(name)[0].state_dict() | {tensor: torch.zeros(wrong)}, tmp_path / "wrong.pth")
    refused(capsys, tmp_path / "wrong.pth", "resnet18", f"1 of another shape ({tensor}: {words}")
    _, report = load(tmp_path / "wrong.pth", name, allow_partial=True)
    assert f"1 of another shape ({tensor}: {words}" in report


def test_positions_of_a_grid_that_is_not_square(tmp_path, capsys):
    """2 x 8 patches are as many as 4 x 4: the three methods with square crops cannot go on from them."""
    state = common.build_backbone("test_vit", (16, 64), 8).state_dict()
    settings = {"arch": "test_vit", "patch_size": 8, "img_size": [16, 64]}
    torch.save({"model": state, "args": settings, "effective_batch": 4}, tmp_path / "a.pth")
    flags = {"init": str(tmp_path / "a.pth"), "checkpoint_key": None, "allow_partial": False}
    with pytest.raises(SystemExit):
        common.init_backbone(common.build_backbone("test_vit", 32, 8), argparse.Namespace(**flags), None)
    assert "its positions are of 16 x 64 px, not of a square" in capsys.readouterr().err


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


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


CODE = "open('executed', 'w').close()"
EXEC = b"cbuiltins\nexec\n"
HIDDEN = io.BytesIO()
torch.save({}, HIDDEN)
# Parts of pickles, each of which leaves an object on the stack; Python's unpickler runs CODE for all of them.
RUNNING = {
    "reduce": EXEC + text(CODE) + b"\x85R",
    "stack_global": text("builtins") + text("exec") + b"\x93" + text(CODE) + b"\x85R",
    "inst": b"(" + text(CODE) + b"ibuiltins\nexec\n",
    "obj": b"(" + EXEC + text(CODE) + b"o",
    "map": b"cbuiltins\nlist\ncbuiltins\nmap\n(" + EXEC + b"(" + text(CODE) + b"ltR\x85R",
    "setstate": b"cfunctools\npartial\nq\x00cbuiltins\nprint\n\x85R(" + EXEC + text(CODE) + b"\x85}Ntb)R",
    "rebuild_from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + EXEC + b"cbuiltins\nint\n"
    + text(CODE) + b"\x85NtR",
}  # fmt: skip
# Where the object may stand, as a part of a pickle.
PLACES = {
    "itself": lambda part: part,
    "value": lambda part: b"}" + text("a") + part + b"s",
    "values": lambda part: b"}(" + text("a") + part + b"u",
    "dict": lambda part: b"(" + text("a") + part + b"d",
    "key": lambda part: b"}" + part + b"Ns",
    "list": lambda part: b"](" + part + b"e",
    "one_item": lambda part: b"]" + part + b"a",
    "tuple": lambda part: part + b"\x85",
    "set": lambda part: b"\x8f(" + part + b"\x90",
    "frozenset": lambda part: b"(" + part + b"\x91",
    "ordered": lambda part: b"ccollections\nOrderedDict\n)R(" + text("a") + part + b"u",
    "metadata": lambda part: b"ccollections\nOrderedDict\n)R}" + text("_metadata") + part + b"sb",
    "namespace": lambda part: b"cargparse\nNamespace\n)\x81}" + text("a") + part + b"sb",
    "slots": lambda part: b"cargparse\nNamespace\n)\x81N}" + text("a") + part + b"s\x86b",
    "class_state": lambda part: b"cargparse\nNamespace\nN}" + text("a") + part + b"s\x86b",
    "memo": lambda part: part + b"\x940h\x00",
}  # fmt: skip
# Parts that may be refused, or give something, but run nothing and end no process.
ODD = {
    "no_rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)N\x89NtR",
    "bounds": b"ctorch._utils\n_rebuild_tensor_v2\n(STORAGEK\x00J\xff\xff\xff\x7f\x85K\x01\x85\x89NtR",
    "negative": b"ctorch._utils\n_rebuild_tensor_v2\n(STORAGEJ\xff\xff\xff\xffK\x01\x85K\x01\x85\x89NtR",
    "strides": b"ctorch._utils\n_rebuild_tensor_v2\n(STORAGEK\x00("
    + b"J\xff\xff\xff\x7f" * 3 + b"t(K\x00K\x00K\x00t\x89NtR",
    "dtype": b"ctorch._utils\n_rebuild_tensor_v3\n(STORAGEK\x00))\x89Nctorch\nload\nNtR",
    "load_from_bytes": b"ctorch.storage\n_load_from_bytes\nB" + len(HIDDEN.getvalue()).to_bytes(4, "little")
    + HIDDEN.getvalue() + b"\x85R",
    "newobj_ex": b"csubprocess\nPopen\n)}\x92}" + text("pid") + b"K\x01sb",
    "persistent_text": b"Pmodule\n",
    "persistent": text("storage") + b"\x85Q",
    "persistent_class": b"(" + text("module") + EXEC + text("a") + text("b") + b"tQ",
    "deep_call": b"ctorch._tensor\n_rebuild_from_type_v2\n\x940" + b"(h\x00N" * 5000 + b")" + b"Nt" * 5000
    + b"\x940h\x00h\x01R",
    "no_numbers": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"]N\x85atQ",
    "bytearray": b"\x96\x04" + bytes(7) + b"abcd}Nsb",
    "buffer": b"\x97", "frame": b"\x95" + b"\xff" * 8, "long": b"\x8b\xff\xff\xff\x7f1",
    "underflow": b"0000R",
    "unhashable": b"}]Ns", "own_item": b"](h\x00e", "extend_placeholder": EXEC + b"(K\x01e",
}  # fmt: skip


class Evil:
    def __reduce__(self):
        return exec, (CODE,)


def write_pickle(path, part, legacy):
    """A file as torch.save writes it, whose pickle leaves the dict {"a": part}; it has one storage."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    whole = b"\x80\x04}" + text("a") + part.replace(b"STORAGE", storage) + b"s."
    if legacy:
        head = (
            torch.serialization.MAGIC_NUMBER,
            torch.serialization.PROTOCOL_VERSION,
            {"little_endian": True},
        )
        used = b"STORAGE" in part
        path.write_bytes(
            b"".join(map(pickle.dumps, head)) + whole + pickle.dumps(["0"] * used)
            + (4).to_bytes(8, "little") * used + bytes(16) * used
        )  # fmt: skip
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in (("data.pkl", whole), ("data/0", bytes(16)), ("version", b"3\n")):
                archive.writestr(f"archive/{name}", record)


@pytest.mark.parametrize("kind", RUNNING)
def test_no_code_of_a_file_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    namespace = vars(argparse.Namespace).copy()
    for place, legacy in ((place, legacy) for place in PLACES for legacy in (False, True)):
        write_pickle(tmp_path / "a.pth", PLACES[place](RUNNING[kind]), legacy)
        if place == "class_state":
            with pytest.raises(ValueError, match="sets a of a class"):
                common.load_checkpoint(tmp_path / "a.pth")
        else:
            assert isinstance(common.load_checkpoint(tmp_path / "a.pth"), dict), place
        assert not (tmp_path / "executed").exists(), place
    assert vars(argparse.Namespace) == namespace
    with contextlib.suppress(AttributeError):  # after it ran
        pickle._loads(b"\x80\x04" + RUNNING[kind] + b".")
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_odd_pickles_end_in_words_at_most(tmp_path, kind, legacy):
    for place in PLACES:
        write_pickle(tmp_path / "a.pth", PLACES[place](ODD[kind]), legacy)
        try:
            assert isinstance(common.load_checkpoint(tmp_path / "a.pth"), dict)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith(
                "damaged, or no PyTorch file ("
            )


def test_a_hostile_file_through_the_reader_of_weights(tmp_path, monkeypatch, capsys):
    """What surrounds the tensors is left alone; in the place of a tensor it is missing."""
    monkeypatch.chdir(tmp_path)

    state = source("torchvision_resnet18")[0].state_dict()
    (tmp_path / "folder").mkdir()
    for file in ("a.pth", "a.pth.tar", "a.bin", "folder/checkpoint.pth"):
        torch.save(moco(state) | {"args": Evil(), "scaler": [Evil()]}, file)
        backbone, _ = load(file.removesuffix("/checkpoint.pth"), "torchvision_resnet18")
        assert_features(backbone, "torchvision_resnet18")
    torch.save({"model": state | {"conv1.weight": Evil()}}, "b.pth")
    refused(capsys, "b.pth", "resnet18", "1 missing (conv1.weight)")
    torch.save({"model": Evil()}, "c.pth")
    refused(capsys, "c.pth", "resnet18", "its model is no state dict of tensors")
    torch.save({"effective_batch": 1, "args": Evil(), "model": state}, "d.pth")
    assert common.read_weights("d.pth")[1] == {}
    assert not (tmp_path / "executed").exists()


def test_a_placeholder_is_harmless():
    it = common.Placeholder("rm -rf", 3)
    it["a"], it.b = 1, 2
    assert it("rm -rf") is it and it in {it}


class Listed(list):
    pass


class Slotted:
    __slots__ = ("a",)

    class Inner:
        """Protocol 2 finds it by getattr(Slotted, "Inner")."""

    def __init__(self):
        self.a = 1


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_stands_beside_the_tensors_does_not_matter(tmp_path, legacy, protocol):
    things = (
        np.arange(3.0), np.array([1, "a"], dtype=object), np.random.default_rng(0), np.float64(1),
        np.dtype("f4"), pathlib.Path("a"), MetricStroge(), Listed([1]), Slotted(), Slotted.Inner(), len,
        collections.Counter("aab"), collections.deque([1], 2), collections.defaultdict(list, a=[1]),
        functools.partial(print, 1), inspect.Parameter.KEYWORD_ONLY, datetime.datetime(2020, 1, 1),
        torch.device("cpu"), torch.Size([2]),
        torch.eye(2).to_sparse(), nn.Linear(2, 2), b"a", bytearray(b"a"), frozenset([1]), 2j, range(3),
        slice(1), ..., 10**40, {(1, (2, 3)): 1, pathlib.Path("a"): 2}, argparse.Namespace(a={1}),
    )  # fmt: skip
    for thing in things:
        saved = {"before": thing, "w": torch.arange(3), "after": [thing]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of saving whole networks in the old format
            torch.save(
                saved, tmp_path / "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(common.load_checkpoint(tmp_path / "a.pth")["w"], torch.arange(3)), thing


def test_classes_of_old_files_are_left_alone(tmp_path):
    """torch.load compares their source, and writes a patch where a class asks for it."""
    cls = b"ctorch.nn.modules.linear\nLinear\n"
    part = b"(" + text("module") + cls + text("file") + text("source") + b"tQ"
    write_pickle(tmp_path / "a.pth", part, legacy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert common.load_checkpoint(tmp_path / "a.pth")["a"] is not nn.Linear


def test_parts_of_storages_are_refused(tmp_path):
    """torch.load leaves them in freed memory where another tensor makes the storage grow."""
    head = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04"
    write_pickle(tmp_path / "a.pth", head + text("1") + b"K\x00K\x02\x87tQ", legacy=True)
    with pytest.raises(ValueError, match="^holds a part of a storage"):
        common.load_checkpoint(tmp_path / "a.pth")


def test_what_torch_is_told_by_the_environment(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    assert torch.equal(common.load_checkpoint(tmp_path / "a.pth")["a"], torch.ones(2))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "True")
    with pytest.raises(ValueError, match="^TORCH_FORCE_WEIGHTS_ONLY_LOAD: unset it"):
        common.load_checkpoint(tmp_path / "a.pth")


# ------------------------------------------------------------------ damage


def every_kind_of_tensor():
    x = torch.randn(4, 6, generator=generator())
    dtypes = (torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.complex64)
    return {"views": [x, x.t(), x[1:, ::2], x[0, 0]], "empty": torch.rand(0, 3), "parameter": nn.Parameter(x),
            "expanded": x[:1].expand(5, 6), **{str(dtype): x.to(dtype) for dtype in dtypes}}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_read_as_torch_reads_them(tmp_path, legacy):
    layer = nn.BatchNorm2d(3)
    content = every_kind_of_tensor() | {"state": layer.state_dict()}
    content |= {} if legacy else {"f8": torch.rand(3).to(torch.float8_e4m3fn)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    ours, theirs = (
        common.load_checkpoint(tmp_path / "a.pth"),
        torch.load(tmp_path / "a.pth", weights_only=True),
    )
    assert ours.keys() == theirs.keys() and ours["state"]._metadata == theirs["state"]._metadata
    flat = [[x for value in loaded.values() for x in (
        value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value])]
        for loaded in (ours, theirs)]  # fmt: skip
    for x, y in zip(*flat, strict=True):
        for part in (torch.Tensor.stride, torch.Tensor.storage_offset, lambda z: (z.shape, z.dtype)):
            assert part(x) == part(y)
        assert torch.equal(*(z.contiguous().view(torch.uint8) if z.ndim else z for z in (x, y)))
    ours["views"][0].zero_()
    assert not ours["views"][2].any()  # they share their memory, as they did


def test_every_byte_of_a_zip_is_checked(tmp_path):
    """One bit flipped in each of the records that are read; and a file without checksums is taken."""
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.rand(50), "b": torch.rand(7)}}, path)
    whole = path.read_bytes()
    common.load_checkpoint(path)
    for entry in zipfile.ZipFile(path).infolist():
        if not entry.filename.endswith(("data.pkl", "byteorder", "data/0", "data/1")):
            continue
        lengths = np.frombuffer(
            whole, "<u2", 2, entry.header_offset + 26
        )  # of the name and what is beside it
        first = entry.header_offset + 30 + int(lengths.sum())
        for place in (first, first + entry.file_size // 2, first + entry.file_size - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(ValueError, match="^damaged, or no PyTorch file .Bad CRC-32"):
                common.load_checkpoint(path)
    for cut in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="^damaged, or no PyTorch file"):
            common.load_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(common.load_checkpoint(path)["a"], torch.ones(2))


def test_files_that_are_whole_and_not_read(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="^a TorchScript program"):
        common.load_checkpoint(tmp_path / "a.pth")
    with tarfile.open(tmp_path / "b.pth", "w") as archive:
        archive.add(tmp_path / "a.pth", "a.pth")
    with pytest.raises(ValueError, match="^a tar archive"):
        common.load_checkpoint(tmp_path / "b.pth")


def test_a_damaged_checkpoint_is_not_resumed(train, tmp_path, capsys):
    train(tmp_path / "out", "--max_steps", "1")
    path = tmp_path / "out" / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        train(tmp_path / "out", "--max_steps", "2")
    error = capsys.readouterr().err
    assert "checkpoint.pth cannot be resumed: damaged, or no PyTorch file (Bad CRC-32" in error
    assert len(error.splitlines()) == 1


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
    common.check_bands(args)
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


def channels_of(state, C):
    name = "conv1.0.weight" if "conv1.0.weight" in state else "patch_embed.proj.weight"
    return state | {name: state[name][:, :1].repeat(1, C, 1, 1)}


@pytest.mark.parametrize("script", ["dino_mc", "mhcl", "cmid", "dspt_mae"])
def test_pretraining_starts_from_a_public_file(train, tmp_path, capsys, script):
    arch = "test_vit" if script == "dspt_mae" else "test_resnet"
    size = {"img_size": 32, "patch_size": 8} if script == "dspt_mae" else {}
    state = randomized(timm.create_model(arch, num_classes=0, **size)).state_dict()
    torch.save(moco(channels_of(state, 13)), tmp_path / "moco.pth.tar")
    flags = ["--init", tmp_path / "moco.pth.tar", "--max_steps", "1", "--arch", arch]
    flags += ["--patch_size", "8"] * (script == "dspt_mae")
    train(tmp_path / "out", *flags, script=script)
    output = capsys.readouterr().out
    assert "0 missing, 3 not used (fc.0.weight" in output and "13 channels converted to 3" in output
    lost = next(name for name in state if name.endswith("weight"))
    torch.save(moco(without(state, lost)), tmp_path / "moco.pth.tar")
    with pytest.raises(SystemExit):
        train(tmp_path / "new", *flags, script=script)
    assert f"1 missing ({lost})" in capsys.readouterr().err


@pytest.mark.parametrize("script, more", [("eval_knn", ["--nb_knn", 1]), ("eval_linear", ["--epochs", 1])])
def test_results_say_what_was_converted(run, scenes, tmp_path, script, more):
    torch.save(channels_of(source("test_resnet")[0].state_dict(), 13), tmp_path / "weights.pth")
    flags = ["--data_path", scenes, "--arch", "test_resnet", "--img_size", "32", "--output_dir", tmp_path]
    flags += ["--weights", tmp_path / "weights.pth", "--num_workers", "0", "--device", "cpu", *more]
    run(script, *flags)
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert line["loading"].endswith("; conv1.0.weight: 13 channels converted to 3")


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


def test_small_files_that_ask_for_gigabytes_are_refused(tmp_path, capsys):
    """A bytearray of 12 GB; compressed entries. The version makes torch read the pickle."""
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x05\x96" + (12 * 2**30).to_bytes(8, "little") + b".")
        archive.writestr("a/version", b"3\n")
    with pytest.raises(ValueError, match="damaged.*truncated"):
        common.load_checkpoint(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/data/0", bytes(2**24))
    with pytest.raises(ValueError, match="much longer than"):
        common.load_checkpoint(tmp_path / "bomb.pth")


def test_weights_that_are_no_floats_are_refused(tmp_path, capsys):
    backbone = common.build_backbone("test_resnet", 32)
    quantised = {name: x.mul(100).to(torch.int8) for name, x in backbone.state_dict().items()}
    torch.save(quantised, tmp_path / "int8.pth")
    state, _ = common.read_weights(str(tmp_path / "int8.pth"))
    with pytest.raises(SystemExit):
        common.load_backbone(backbone, state, "int8.pth")
    assert "tensors loaded" in capsys.readouterr().err

"""The scripts as a user starts them: help, flags, a whole tiny run, bad input."""

import argparse
import importlib
import re
import resource
import shutil

import pytest
import timm
import torch
from conftest import SCRIPTS, TRAINING, assert_same, assert_same_state, launch, read_log, tiny

import common


def parser_of(script):
    return importlib.import_module(script).get_parser()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(run, capsys, script):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--output_dir" in out and "--seed" in out
    for action in parser_of(script)._actions:
        assert action.option_strings[0] in out and action.help


def test_help_of_a_script_started_as_users_do():
    out, err = launch("demo/scenes.py", "--help").communicate(timeout=120)
    assert "--output_dir" in out and "--seed" in out and not err


SHORT_OF = {
    "eval_linear --finetune --batch_size_per_gpu 1": "BatchNorm needs two images or more",
    "eval_knn --num_workers 8": "too many open files: raise `ulimit -n`, or give fewer --num_workers",
}


@pytest.mark.parametrize("command", SHORT_OF)
def test_what_the_machine_or_the_batch_lacks_is_told_without_a_traceback(scenes, tmp_path, command):
    script, *flags = command.split()
    flags += ["--data_path", scenes, "--output_dir", tmp_path, "--weights", "random", "--img_size", 32]
    process = launch(f"{script}.py", *flags, "--arch", "test_resnet", "--device", "cpu")
    if script == "eval_knn":  # on Linux
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
    _, error = process.communicate(timeout=120)
    assert SHORT_OF[command] in error and "Traceback" not in error and process.returncode == 1, error


def example(action):
    """Words for the command line that differ from the flag's default, and the value they must give."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return ([action.option_strings[1]], False) if action.default else ([action.option_strings[0]], True)
    if action.choices:
        value = next(choice for choice in action.choices if choice != action.default)
        return [action.option_strings[0], str(value)], value
    for value in (7, 0.125, "word"):  # a whole number, a number or a text
        try:
            right = (action.type or str)(str(value)) == value
        except (ValueError, argparse.ArgumentTypeError):
            continue
        if right:
            break
    count = action.nargs if isinstance(action.nargs, int) else 2
    values = value if action.nargs is None else [value] * count
    return [action.option_strings[0], *[str(value)] * (1 if action.nargs is None else count)], values


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_survives_from_a_string(script):
    actions = [action for action in parser_of(script)._actions if action.dest != "help"]
    words = [word for action in actions for word in example(action)[0]]
    args = parser_of(script).parse_args(words)
    for action in actions:
        assert getattr(args, action.dest) == example(action)[1] != action.default, action.dest
        assert action.type is not bool


MAY_BE_NEGATIVE = {"mean"}  # of pixels in decibels


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range_are_refused_by_the_parser(capsys, script):
    """Each flag that takes numbers, with numbers that it cannot have and a word."""
    required = [
        word
        for action in parser_of(script)._actions
        if action.required
        for word in (action.option_strings[0], "x")
    ]
    tried = 0
    for action in parser_of(script)._actions:
        if action.choices or isinstance(example(action)[1], str) or not action.type:
            continue
        if action.dest == "bands":  # takes names too
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        for value in ("-1", "inf", "nan", "many"):
            if action.dest in MAY_BE_NEGATIVE and value == "-1":
                continue
            flag, tried = action.option_strings[0], tried + 1
            with pytest.raises(SystemExit) as stop:
                parser_of(script).parse_args([*required, flag, *[value] * count])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and re.fullmatch(rf"error: {flag} {value}: must be .+\n", error), (
                error
            )
    assert tried >= 12


# ------------------------------------------------------------------ one tiny run of each


PICTURES = {"cmid": ["reconstruction.png", "views.png"], "dspt_mae": ["reconstruction.png", "views.png"]}
PICTURES |= {"dino_mc": ["views.png"], "mhcl": ["views.png"], "eval_linear": []}


@pytest.mark.parametrize("script", [*TRAINING, "eval_linear"])
def test_script_trains_resumes_and_exports(run, scenes, tmp_path, script):
    """The unbroken run and one that was resumed end bit for bit alike, with workers or without."""
    base = ["--data_path", scenes if script == "eval_linear" else scenes / "train", *tiny(script)]
    base += ["--log_every", 1, "--accum_steps", 2, "--save_every", 100, "--epochs", 10, "--max_steps"]
    run(script, *base, 5, "--output_dir", tmp_path / "a", "--num_workers", 2)
    for steps in (2, 5):
        run(script, *base, steps, "--output_dir", tmp_path / "b")
    a, b = (common.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in "ab")
    assert_same_state(a, b)
    header, *lines = read_log(tmp_path / "a")
    assert header["effective_batch"] == 8 and [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {"loss", "grad_norm", "lr", "images_per_s", "data_seconds", "unreadable"} <= lines[-1].keys()
    assert sorted(path.name for path in (tmp_path / "a").glob("*.png")) == PICTURES[script]
    if script != "eval_linear":  # exported after the last of all steps
        folder = tmp_path / "a"
        exported = timm.create_model(
            f"local-dir:{folder}/backbone", pretrained=True, num_classes=0
        ).state_dict()
        state, _ = common.read_weights(str(folder / "checkpoint.pth"))
        assert_same({name: state[name] for name in exported}, dict(exported))


@pytest.mark.parametrize("script", TRAINING)
def test_bf16_is_close_to_full_precision_and_another(train, tmp_path, script, monkeypatch):
    """Also resumed to the last bit; `auto` on a processor without it is as `off`."""
    losses, saved = {}, {}
    for amp in ("off", "bf16"):
        saved[amp] = train(tmp_path / amp, "--amp", amp, "--max_steps", 2, "--log_every", 1, script=script)
        losses[amp] = [line["loss"] for line in read_log(tmp_path / amp) if "step" in line]
    assert losses["bf16"] == pytest.approx(losses["off"], rel=0.02) and losses["bf16"] != losses["off"]
    for steps in (1, 2):
        resumed = train(tmp_path / "resumed", "--amp", "bf16", "--max_steps", steps, script=script)
    assert_same_state(resumed, saved["bf16"])
    monkeypatch.setattr(common, "computes_bf16", lambda device: False)
    saved["auto"] = train(tmp_path / "auto", "--amp", "auto", "--max_steps", 2, script=script)
    assert_same_state(saved["auto"], saved["off"])
    assert read_log(tmp_path / "auto")[0]["amp"] == "off"


# ------------------------------------------------------------------ bad input: one line, before any work


BAD_TRAINING = [
    (["--data_path", "/nonexistent"], "--data_path /nonexistent: no such folder"),
    (["--data_path", "EMPTY"], "no image in it"),
    (["--data_path", "BROKEN"], "none of the images looked at is readable"),
    (["--arch", "resnet19"], "--arch resnet19: timm has no such model; close: resnet1"),
    (["--arch", "resnet18.bogus"], "--arch resnet18.bogus: timm has no such model; close: resnet18"),
    (["--batch_size_per_gpu", "31"], "31: the effective batch, 31, is larger than the data, 30"),
    (["--batch_size_per_gpu", "8", "--accum_steps", "4"], "the effective batch, 32, is larger"),
    (["--epochs", "2", "--warmup_epochs", "2"], "--warmup_epochs 2: must be less than --epochs 2"),
    (["--device", "cuda"], "--device cuda: this machine has none"),
    (["--amp", "fp16"], "--amp fp16: only on cuda"),
    (["--init", "nothing.pth"], "--init nothing.pth: no such file"),
    (["--init", "TEXT"], "no PyTorch file"),
    (["--init", "RESNET"], "another arch?"),
    (["--init", "RESNET", "--allow_partial"], "0 of"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: cannot be written to"),
]
BAD_METHOD = {
    "dino_mc": [
        (["--arch", "test_resnet", "--patch_size", "8"], "test_resnet: cannot be built with --patch_size 8"),
        (["--img_size", "30"], "--img_size 30: must be a multiple of the patch, 8"),
        (["--local_crops_size", "40"], "40: must be between the patch, 8, and --img_size, 32"),
        (["--local_crops_size", "4"], "--local_crops_size 4: must be"),
        (["--local_crops_size", "8", "8", "8"], "--local_crops_size 8 8 8: one side, or 2"),
        (["--local_crops_number", "7"], "--local_crops_number 7: mode mc has 6 sizes"),
        (["--global_crops_scale", "0.5", "0.2"], "0.5 0.2: must be 0 < low <= high <= 1"),
        (["--mode", "tp", "--one_date_per_location"], "--one_date_per_location: only with --mode mc or dino"),
        (["--mode", "tp", "--data_path", "SINGLE"], "every folder has one image"),
        (["--mode", "cm"], "error: --mode: invalid choice: 'cm'"),
        (["--mode", "tp", "--data_path", "FLAT"], "all images are in one folder"),
        (["--patch_size", "16"], "--img_size 32: its smallest local crop is under the patch, 16"),
        (
            ["--warmup_teacher_temp_epochs", "4"],
            "--warmup_teacher_temp_epochs 4: must be at most --epochs 3",
        ),
    ],
    "mhcl": [
        (["--moco_k", "7", "--accum_steps", "2"], "--moco_k 7: must be at least the effective batch, 8"),
        (["--arch", "test_vit"], "--arch test_vit: timm offers no four feature stages of it"),
        (["--arch", "maxvit_nano_rw_256"], "gives no features of 4 stages for 32 px"),
        (
            ["--arch", "swin_tiny_patch4_window7_224", "--img_size", "30"],
            "must be a multiple of the patch, 4",
        ),
        (["--moco_k", "20", "--batch_size_per_gpu", "5"], "5: must be cut into 2 equal parts of 2 images"),
        (["--bn_groups", "4"], "--batch_size_per_gpu 4: must be cut into 4 equal parts of 2 images"),
        (["--no-cos", "--schedule", "1", "3"], "--schedule 1 3: must be less than --epochs 3"),
        (["--schedule", "1"], "--schedule 1: only with --no-cos"),
    ],
    "cmid": [
        (["--warmup_teacher_temp_epochs", "50"], "50: must be at most --epochs 3"),
        (["--img_size", "48"], "--img_size 48: must be a multiple of the last map's stride, 32"),
        (["--mask_patch_size", "12"], "--img_size 32: must be a multiple of --mask_patch_size, 12"),
        (["--mask_patch_size", "2"], "--mask_patch_size 2: must be a multiple of 4, the stride at"),
        (
            ["--mask_stage", "3"],
            "--mask_patch_size 8: must be a multiple of 16, the stride at --mask_stage 3",
        ),
        (["--mask_stage", "4"], "error: --mask_stage: invalid choice: 4"),
        (["--mask_ratio", "1"], "--mask_ratio 1.0: must mask some of the 16 blocks, not all"),
        (["--mask_ratio", "0"], "--mask_ratio 0.0: must mask some of the 16 blocks, not all"),
        (["--mask_patch_size", "32"], "must mask some of the 1 blocks, not all"),
        (["--arch", "resnetv2_50"], "--arch resnetv2_50: must be a ResNet, a Swin or a ConvNeXt"),
        (["--arch", "legacy_seresnet18"], "--arch legacy_seresnet18: must be a ResNet"),
        (["--num_matches", "2"], "--num_matches 2: the last map has 1 positions"),
        (["--loss_weights", "0", "0", "0"], "--loss_weights 0 0 0: leaves nothing"),
        (["--arch", "test_vit"], "--arch test_vit: must be a ResNet, a Swin or a ConvNeXt"),
        (["--arch", "efficientnet_b0"], "--arch efficientnet_b0: must be a ResNet"),
    ],
    "dspt_mae": [
        (["--img_size", "30"], "--img_size 30: must be a multiple of the patch, 8"),
        (["--img_size", "32", "36"], "--img_size 32 36: must be a multiple of the patch, 8"),
        (["--img_size", "32", "32", "32"], "--img_size 32 32 32: one side, or height and width"),
        (["--mask_ratio", "0.95"], "--mask_ratio 0.95: must keep some of the 16 patches, not all"),
        (["--decoder_dim", "30"], "--decoder_dim 30: must be a multiple of 4, and of --decoder_heads, 2"),
        (["--decoder_heads", "3"], "--decoder_dim 32: must be a multiple of 4, and of --decoder_heads, 3"),
        (["--arch", "test_vit2"], "--arch test_vit2: must be a ViT with a class token"),
        (["--in_chans", "2"], "3 bands, not 2: give --in_chans 3, or choose with --bands"),
        (["--bands", "1", "B02"], "--bands 1 B02: numbers from 1, or names, not both"),
        (["--bands", "1", "2", "--in_chans", "3"], "--in_chans 3: --bands 1 2 are 2; leave it out"),
        (["--mean", "0.5"], "--mean, --std: give 3 values for each, or neither"),
    ],
}


@pytest.fixture(scope="session")
def places(scenes, tmp_path_factory):
    """Folders and files that bad input refers to by name."""
    root = tmp_path_factory.mktemp("places")
    for name in ("EMPTY", "BROKEN", "SINGLE/a", "SINGLE/b", "FLAT", "SPLITS/training", "SPLITS/Test"):
        (root / name).mkdir(parents=True)
    (root / "BROKEN" / "x.png").write_text("no image")
    for name in ("a", "b"):
        image = next((scenes / "train" / "forest").iterdir())
        shutil.copy(image, root / "SINGLE" / name / "x.png")
        shutil.copy(image, root / "FLAT" / f"{name}.png")
    (root / "TEXT").write_text("no weights")
    torch.save({"layer.weight": torch.zeros(3)}, root / "RESNET")
    return root


def refused(run, capsys, script, flags, message, code=2):
    with pytest.raises(SystemExit) as stop:
        run(script, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == code
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning: --moco_k")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], captured.err
    assert "step" not in captured.out


BAD_EVALUATION = [
    (["--nb_knn", "31"], "--nb_knn 31: must be from 1 to the number of training images, 30"),
    (["--data_path", "/nonexistent"], "no such folder"),
    (["--data_path", "EMPTY"], "no image in it"),
    (["--data_path", "SPLITS"], "SPLITS: holds Test, training; call them train and val (or test)"),
    (["--weights", "random"], "--weights random: give its --arch"),
    (["--weights", "RESNET", "--arch", "test_resnet"], "another arch?"),
    (["--weights", "RESNET"], "give its --arch"),
    (["--weights", "TEXT"], "no PyTorch file"),
    (["--weights", "resnet5o"], "no such file, output folder or timm model; close: resnet5"),
    (["--weights", "resnet18"], "timm could not load pretrained weights"),
    (
        ["--weights", "random", "--arch", "test_vit", "--patch_size", "8", "--img_size", "30"],
        "must be a multiple of the patch, 8",
    ),
    (
        ["--weights", "random", "--arch", "mixer_s32_224", "--img_size", "32"],
        "--img_size 32: mixer_s32_224 cannot take it: Input height (32) doesn't match model (224)",
    ),
]


BAD_LINEAR = [
    (["--data_path", "/nonexistent"], "no such folder"),
    (["--predict", "EMPTY"], "--data_path or --predict: give one of the two"),
    (["--weights", "random"], "--weights random: give its --arch"),
    (["--weights", "TEXT"], "no PyTorch file"),
    (["--weights", "RESNET", "--arch", "test_resnet"], "another arch?"),
    (["--layer_decay", "1.1"], "--layer_decay 1.1: must be above 0, at most 1"),
    (["--schedule", "60", "100"], "--schedule 60 100: must be less than --epochs 100"),
    (["--n_last_blocks", "2", "--weights", "random", "--arch", "test_resnet"], "no ViT with a class token"),
    (
        ["--n_last_blocks", "9", "--weights", "random", "--arch", "test_vit"],
        "--n_last_blocks 9: random has 6",
    ),
    (["--drop_path", "0.1"], "--drop_path: only with --finetune"),
    (["--lr", "0.1"], "--lr: only with --finetune"),
    (["--finetune"], "--weights image_stats: has nothing to fine-tune"),
    (["--finetune", "--weights", "random", "image_stats"], "one at a time with --finetune"),
    (
        ["--finetune", "--weights", "random", "--arch", "test_vit", "--epochs", "5", "--warmup_epochs", "5"],
        "--warmup_epochs 5: must be less than --epochs 5",
    ),
    (
        ["--finetune", "--weights", "random", "--arch", "test_resnet", "--batch_size_per_gpu", "31"],
        "31: the effective batch, 31, is larger than the data, 30",
    ),
]


# What all training scripts share stands once; what a method adds stands with it.
BAD = [("mhcl", *bad) for bad in BAD_TRAINING] + [
    (name, *bad) for name in TRAINING for bad in BAD_METHOD[name]
]
BAD += [("eval_knn", *bad) for bad in BAD_EVALUATION] + [("eval_linear", *bad) for bad in BAD_LINEAR]


@pytest.mark.parametrize("script, flags, message", BAD, ids=[f"{bad[0]} {' '.join(bad[1])}" for bad in BAD])
def test_bad_input_is_one_line_before_any_work(
    run, capsys, scenes, places, tmp_path, monkeypatch, script, flags, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = [str(places / flag) if (places / flag).exists() and flag.isupper() else flag for flag in flags]
    base = [
        "--output_dir",
        tmp_path / "out",
        "--data_path",
        scenes / "train" if script in TRAINING else scenes,
    ]
    if script in TRAINING:
        base += tiny(script, "--warmup_epochs", 0)
    else:
        base += ["--weights", "image_stats", "--num_workers", 0, "--device", "cpu"]
        base += ["--nb_knn", 1] if script == "eval_knn" else ["--img_size", 32]
    refused(run, capsys, script, [*base, *flags], message)
    assert not list(tmp_path.glob("out/*.*th")) and not list(tmp_path.glob("out/*.jsonl"))


def test_prediction_needs_a_head(run, capsys, scenes, tmp_path):
    base = ["--predict", scenes / "val", "--output_dir", tmp_path, "--num_workers", "0", "--device", "cpu"]
    refused(run, capsys, "eval_linear", [*base, "--weights", tmp_path], "no head.pth in it")
    (tmp_path / "head.pth").write_text("nonsense")
    refused(run, capsys, "eval_linear", [*base, "--weights", tmp_path], "head.pth: ")


def test_places_joined_before_a_resume_are_noticed(train, run, capsys, scenes, tmp_path):
    """As many images as before, fewer samples."""
    data = shutil.copytree(scenes / "locations", tmp_path / "data")
    flags = ["--data_path", data, "--output_dir", tmp_path / "o", *tiny("dino_mc", "--one_date_per_location")]
    run("dino_mc", *flags, "--max_steps", "1")
    capsys.readouterr()
    first, second, *_ = sorted(data.iterdir())
    for image in first.iterdir():
        image.rename(second / f"from_first_{image.name}")
    refused(run, capsys, "dino_mc", flags, "samples was 10, is 9")


def test_weights_of_another_arch_are_refused(train, run, capsys, scenes, tmp_path):
    train(tmp_path / "out", "--max_steps", "1", script="mhcl")
    capsys.readouterr()
    base = ["--data_path", scenes, "--output_dir", tmp_path, "--nb_knn", "1", "--weights", tmp_path / "out"]
    refused(run, capsys, "eval_knn", [*base, "--arch", "test_vit"], f"{tmp_path / 'out'} holds test_resnet")
    base[-1] = tmp_path / "out" / "checkpoint.pth"
    refused(run, capsys, "eval_knn", [*base, "--checkpoint_key", "key"], "--checkpoint_key key")


def test_output_inside_the_data_is_no_data(run, scenes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scenes / "train", data)
    base = ["--data_path", data, "--output_dir", data / "out", *tiny("mhcl")]
    for steps in (1, 2):
        run("mhcl", *base, "--max_steps", steps)
    assert torch.load(data / "out" / "checkpoint.pth", weights_only=True)["images"] == 30


def test_scenes_are_repeatable_and_refuse_bad_counts(run, capsys, tmp_path):
    flags = "--train_per_class 1 --val_per_class 1 --locations 2 --dates 2 --image_size 32".split()
    for name in "ab":
        run("demo.scenes", "--output_dir", tmp_path / name, *flags)
    a, b = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b and len(a) == 10 + 10 + 4 and len(set(a.values())) == len(a)
    for name, *more in (("a", *flags, "--seed", 1), ("c", "--train_per_class", 0)):
        with pytest.raises(SystemExit) as stop:
            run("demo.scenes", "--output_dir", tmp_path / name, *more)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err

"""tools/convert.py: released checkpoints become ours, and what is none of either is one clear line."""

import argparse
import os
import re
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import finetune
from model import Student, Teacher, regression_head, relative_index, resize_grid, resize_positions, vision_encoder
from tests import helpers
from tests.helpers import assert_same
from tools import convert

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def released(name):
    """A golden file in the released files' wrapping."""
    file = golden(name)
    return {"model": file["model"]} | ({"model_ema": file["ema"]} if "ema" in file else {})


@pytest.fixture
def save(tmp_path):
    def save(file, name="released.pth"):
        torch.save(file, tmp_path / name)
        return tmp_path / name

    return save


call = partial(helpers.call, convert)
refused = partial(helpers.refused, silent=True)


# ---- released -> ours ----------------------------------------------------------------------------------------------


def encoder_of(config):
    names = ("patch", "dim", "depth", "heads", "ffn", "layer_scale")
    side = config["image_size"]
    return vision_encoder(image_size=(side, side), **{name: config[name] for name in names})


def test_a_released_pretrained_file_gives_a_student_a_teacher_and_their_sizes(save, tmp_path):
    code, out, err = call(save(released("vision")), tmp_path / "ours.pt")
    assert code == 0 and "student" in out and "teacher" in out, err
    state, file = torch.load(tmp_path / "ours.pt", weights_only=True), golden("vision")
    config = {"image_size": 24, "patch": 8, "dim": 12, "depth": 3, "heads": 2, "ffn": 48}
    assert {name: state["config"][name] for name in config} == config and "classes" not in state
    student = Student(encoder_of(state["config"]), regression_head(12))
    student.load_state_dict(state["student"])
    image, mask = file["input"]["image"], file["mask"]
    torch.testing.assert_close(student.train()(image, mask), file["pred"], rtol=0, atol=1e-5)
    teacher = Teacher(student.encoder)
    teacher.load_state_dict(state["teacher"])
    for ours, theirs in zip(teacher(image)[-2:], file["teacher_layers"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_released_finetuned_file_gives_a_classifier_with_numbered_classes(save, tmp_path):
    code, _, err = call(save(released("vision_finetune")), tmp_path / "ours.pt")
    assert code == 0, err
    file = golden("vision_finetune")
    classifier, state, _ = finetune.build(finetune.Config(init=str(tmp_path / "ours.pt")))
    assert state["classes"] == list("0123456789") and state["teacher"] is None and classifier.encoder.embed.image_size == (24, 24)
    torch.testing.assert_close(classifier.eval()(file["input"]["image"]), file["logits"], rtol=0, atol=1e-5)


def test_scripts_read_a_released_file_as_it_is(save, tmp_path):
    for name in ("vision", "vision_finetune"):
        path = save(released(name))
        assert call(path, tmp_path / "ours.pt")[0] == 0
        direct, stored = convert.read(path), convert.read(tmp_path / "ours.pt")
        assert direct.keys() == stored.keys() and direct["config"] == stored["config"]
        assert_same(direct["student"], stored["student"])


def test_weights_without_their_wrapping_are_read_too(save):
    bare = convert.read(save(golden("vision")["model"]))
    assert_same(bare["student"], convert.read(save(released("vision")))["student"])
    assert bare["teacher"] is None


def test_a_checkpoint_of_ours_passes_unchanged(save, tmp_path):
    call(save(released("vision")), tmp_path / "ours.pt")
    code, _, err = call(tmp_path / "ours.pt", tmp_path / "again.pt")
    assert code == 0, err
    ours, again = convert.read(tmp_path / "ours.pt"), convert.read(tmp_path / "again.pt")
    assert ours["config"] == again["config"]
    for part in ("student", "teacher"):
        assert_same(ours[part], again[part])


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"], ids=["numpy 2", "numpy 1"])
def test_the_other_contents_of_a_released_file_do_no_harm(save, module):
    """The released training script also stores its argparse options, and learning rates that are NumPy numbers."""
    args = argparse.Namespace(model="beit_base_patch16_224", lr=2e-3, window_size=(14, 14), target_layers="[6,7]")
    groups = [{"lr": np.float64(2e-3), "params": [0, 1]}]
    more = {"optimizer": {"state": {}, "param_groups": groups}, "epoch": 799, "scaler": {"scale": 2.0}, "args": args}
    path = save(released("vision") | more)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:  # as NumPy before or after its version 2 names what it pickles
        for name, content in members.items():
            file.writestr(name, re.sub(rb"numpy\._?core\.multiarray", module, content))
    assert_same(convert.read(path)["student"], convert.read(save(released("vision"), "plain.pth"))["student"])


def test_numpy_numbers_are_read_as_numbers(save):
    assert convert.load(save({"a": np.float64(2e-3), "b": [np.int64(7)]})) == {"a": 2e-3, "b": [7]}


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "model_ema"])
def test_unknown_weights_are_named(save, tmp_path, part):
    file = released("vision")
    file[part]["blocks.0.attn.relative_position_bias_table"] = torch.zeros(28, 2)
    path = save(file)
    error = refused(call(path, tmp_path / "ours.pt"))
    assert "blocks.0.attn.relative_position_bias_table" in error and str(path) in error
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("missing", ["rel_pos_bias.relative_position_bias_table", "blocks.", "blocks.0."])
def test_a_file_from_which_sizes_cannot_be_told_is_one_line(save, tmp_path, missing):
    file = released("vision")
    kept = {name: tensor for name, tensor in file["model"].items() if not name.startswith(missing)}
    path = save({"model": kept})
    assert str(path) in refused(call(path, tmp_path / "ours.pt"))


def not_square(height=3, width=2):
    """A released file of a model on a grid that is not square, with a damaged relative_position_index."""
    file = released("vision")
    for part in file.values():
        part["rel_pos_bias.relative_position_bias_table"] = torch.randn((2 * height - 1) * (2 * width - 1) + 3, 2)
        size = 1 + height * width
        part["rel_pos_bias.relative_position_index"] = torch.zeros(size, size, dtype=torch.int64)
    return file


@pytest.mark.parametrize("height, width", [(3, 2), (2, 3), (1, 5), (2, 2)])
def test_the_index_of_a_released_file_tells_its_grid(save, height, width):
    """1 x 5 and 2 x 2 patches have as many relative positions, 3 x 2 and 2 x 3 as many patches as well."""
    file = not_square(height, width)
    file["model"]["rel_pos_bias.relative_position_index"] = relative_index(height, width)
    state = convert.read(save(file))
    assert convert.patch_grid(state["config"]) == (height, width)
    classifier, _, _ = finetune.build(finetune.Config(init=str(save(file))), ["a", "b"])
    assert classifier.encoder.embed.image_size == (8 * height, 8 * width)
    assert torch.equal(classifier.encoder.embed.table, state["student"]["encoder.embed.table"])


def test_a_square_grid_needs_no_index(save):
    file = released("vision")
    del file["model"]["rel_pos_bias.relative_position_index"]
    assert convert.patch_grid(convert.read(save(file))["config"]) == (3, 3)


@pytest.mark.parametrize("height, width", [(3, 2), (1, 5)])
def test_a_table_of_a_grid_that_cannot_be_told_is_one_line(save, tmp_path, height, width):
    """The sizes in the new file would be wrong."""
    path = save(not_square(height, width))
    error = refused(call(path, tmp_path / "ours.pt"))
    assert str(path) in error and "square" in error
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("image_size", [0, 24])
def test_finetuning_from_such_a_file_is_one_line_too(save, image_size):
    path = save(not_square())
    with pytest.raises(common.BadInput, match=re.escape(str(path))):
        finetune.build(finetune.Config(init=str(path), image_size=image_size), ["a", "b"])


class Malicious:
    """Unpickled without care it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo >{self.path}",)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "malicious", "other", "tensor"])
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(save, tmp_path, damage):
    good = save(released("vision")).read_bytes()
    written = tmp_path / "written"
    if damage in ("malicious", "other", "tensor"):
        path = save({"malicious": {"model": Malicious(written)}, "other": {"w": 1}, "tensor": torch.zeros(3)}[damage])
    else:
        path = tmp_path / "released.pth"
        path.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "text": b"weights\n"}[damage])
    assert str(path) in refused(call(path, tmp_path / "ours.pt"))
    assert not written.exists() and not (tmp_path / "ours.pt").exists()


def test_files_that_are_not_there_or_cannot_be_written_are_one_line(save, tmp_path):
    path = save(released("vision"))
    assert "none.pth" in refused(call(tmp_path / "none.pth", tmp_path / "ours.pt"))
    assert str(tmp_path) in refused(call(tmp_path, tmp_path / "ours.pt"))
    assert "nowhere" in refused(call(path, tmp_path / "nowhere" / "ours.pt"))


def test_help_promises_no_option_that_is_not_there():
    code, out, _ = call("--help")
    usage, promised = out[: out.index("\n\n")], re.search(r"python -m tools.convert .*", convert.__doc__)[0]
    assert code == 0 and all(flag in usage for flag in re.findall(r"--\w+", promised))


# ---- weights into a module -----------------------------------------------------------------------------------------


def encoder(side=8, **changes):
    sizes = dict(patch=4, dim=8, depth=2, heads=2, ffn=16, layer_scale=0.0, init_std=1.0) | changes
    module = vision_encoder(image_size=(side, side), **sizes)
    with torch.no_grad():
        module.embed.table.normal_()
    return module


def load(module, weights, old=(2, 2), new=(2, 2)):
    convert.load_into(module, weights, "some.pt", old, new)


@pytest.mark.parametrize(
    "name, change",
    [
        ("blocks.1.fc2.bias", lambda weights, name: weights.pop(name)),  # missing
        ("blocks.2.fc2.bias", lambda weights, name: weights.update({name: torch.zeros(8)})),  # left over
        ("blocks.0.attn.qkv.weight", lambda weights, name: weights.update({name: torch.zeros(24, 9)})),  # other shape
        ("embed.table", lambda weights, name: weights.update({name: torch.zeros(12, 3)})),  # other heads
    ],
    ids=["missing", "left over", "shape", "heads"],
)
def test_weights_that_do_not_fit_are_named_and_none_is_loaded(name, change):
    module, weights = encoder(), encoder().state_dict()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    change(weights, name)
    with pytest.raises(common.BadInput) as error:
        load(module, weights)
    assert name in str(error.value) and "some.pt" in str(error.value) and str(error.value).count("\n") == 0
    assert not any(other in str(error.value) for other in before.keys() - {name}), "only what does not fit"
    assert_same(module.state_dict(), before)


def test_weights_that_fit_are_all_loaded():
    module, weights = encoder(), encoder().state_dict()
    load(module, weights)
    assert_same(module.state_dict(), weights)


def test_another_grid_interpolates_the_relative_positions_and_nothing_else():
    module, weights = encoder(side=12), encoder().state_dict()
    load(module, weights, (2, 2), (3, 3))
    expected = weights | {"embed.table": resize_positions(weights["embed.table"], (2, 2), (3, 3))}
    assert expected["embed.table"].shape == (28, 2)
    assert_same(module.state_dict(), expected)


def test_another_grid_interpolates_learned_positions_too():
    module, weights = encoder(side=12, learned_std=1.0), encoder(learned_std=1.0).state_dict()
    load(module, weights, (2, 2), (3, 3))
    ours = module.embed.learned
    assert torch.equal(ours, resize_grid(weights["embed.learned"], (2, 2), (3, 3))) and ours.shape == (9, 8)
    ramp = torch.arange(4.0)[:, None].expand(4, 5)  # of 4 x 5 patches, rising downwards
    across = resize_grid(ramp.reshape(20, 1), (4, 5), (8, 5)).reshape(8, 5)
    assert (across.diff(dim=0) > 0).all() and torch.allclose(across, across[:, :1].expand(8, 5), atol=1e-6)

"""tools/convert.py: any checkpoint into ours or a folder, and --init of all scripts from any checkpoint."""

import copy
from dataclasses import fields

import pytest
import torch

import common
import finetune
import train_text
import train_vision
from common import UserError
from data import text
from model import Teacher
from tests.checkpoints import build, config_of, golden, model_of, released, write_gpt2_files
from tests.helpers import (
    FAST,
    SCRIPTS,
    TINY,
    assert_same,
    call,
    checkpoint,
    done,
    refused,
    write_sentences,
    write_text,
)
from tools import convert, embed, hub


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{(kind, form): path} of a released file, and of a checkpoint of ours and a folder made of it."""
    pytest.importorskip("safetensors", reason="pip install -r requirements-dev.txt")
    found = {}
    for kind in SCRIPTS:
        folder = tmp_path_factory.mktemp(kind)
        file = released(kind)
        if kind == "text":
            write_gpt2_files(folder, len(file["model"]["encoder.sentence_encoder.embed_tokens.weight"]))
        torch.save(file, folder / "released.pt")
        for form in ("ours.pt", "hub"):
            done(call(convert, folder / "released.pt", folder / form))
        found |= {(kind, form): folder / form for form in ("released.pt", "ours.pt", "hub")}
    return found


# ---- the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCRIPTS)
def test_all_forms_hold_the_same(files, kind, tmp_path):
    state = convert.read(files[kind, "released.pt"])
    ours = convert.read(files[kind, "ours.pt"])
    assert ours.keys() == state.keys() and ours["config"] == state["config"]
    assert_same(ours["student"], state["student"])
    assert_same(ours["teacher"], state["teacher"])
    folder = convert.read(files[kind, "hub"])
    encoder = {name: tensor for name, tensor in state["student"].items() if not name.startswith("head.")}
    assert_same(folder["student"], encoder)
    assert folder["config"] == state["config"] and folder["fresh"] == ["head"] and folder["teacher"] is None
    assert folder.get("vocabulary") == state.get("vocabulary")
    done(call(convert, files[kind, "ours.pt"], tmp_path / "teacher", "--network", "teacher"))
    averaged = {name: t for name, t in state["teacher"].items() if not name.startswith("encoder.norm")}
    student = convert.read(tmp_path / "teacher")["student"]
    assert_same({name: student[name] for name in averaged}, averaged)


def test_what_cannot_be_read_or_written_is_one_line(files, tmp_path):
    good, state = files["vision", "released.pt"], convert.read(files["text", "ours.pt"])
    torch.save({"model": golden("vision_finetune")["model"]}, tmp_path / "tuned.pt")
    torch.save({"w": 1}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save(state | {"config": {"dim": 8}}, tmp_path / "damaged.pt")
    torch.save(state | {"config": 5}, tmp_path / "config.pt")
    (tmp_path / "text.pt").write_text("weights\n")
    for name in ("none.pt", "other.pt", "tensor.pt", "damaged.pt", "config.pt", "text.pt", ""):
        error = refused(call(convert, tmp_path / name, tmp_path / "ours.pt"), silent=True)
        assert str(tmp_path / name) in error and not (tmp_path / "ours.pt").exists()
    assert "text.pt" in refused(call(convert, good, tmp_path / "text.pt" / "ours.pt"))
    assert "exists" in refused(call(convert, good, files["vision", "hub"]))
    assert "teacher" in refused(call(convert, tmp_path / "tuned.pt", tmp_path / "x", "--network", "teacher"))


def test_what_a_file_leaves_out_is_printed_wherever_it_is_read(finished, data, tmp_path, monkeypatch, capsys):
    path, picture = tmp_path / "noted.pt", data / "vision/val/cat/00.png"
    torch.save(checkpoint(finished["vision"]) | {"notes": ["left out: pooler"]}, path)
    flags = "--data", data / "vision", "--init", path, "--steps", 1, "--out"
    runs = [(train_vision, *TINY["vision"], *flags, tmp_path / "pre"), (convert, path, tmp_path / "y.pt")]
    runs += [(finetune, *FAST.split(), "--global_batch", 2, *flags, tmp_path / "tuned")]
    runs += [(embed, "--init", path, picture, "--out", tmp_path / "x.npy")]
    for script, *more in runs:
        assert done(call(script, *more)).count(f"{path}: left out: pooler\n") == 1, script
    monkeypatch.setattr(common, "first_process", lambda: False)
    assert convert.read(path)["notes"] and not capsys.readouterr().out


# ---- into a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "left over", "shape"])
def test_weights_that_do_not_fit_are_named_and_none_is_loaded(files, damage):
    state = convert.read(files["vision", "ours.pt"])
    module, name = build(state), "encoder.blocks.1.fc2.bias"
    before = copy.deepcopy(module.state_dict())
    if damage == "missing":
        del state["student"][name]
    else:
        name = name.replace("1.fc2", "3.fc2") if damage == "left over" else name
        state["student"][name] = torch.zeros(9)
    with pytest.raises(UserError, match=f"some.pt.*{name}") as error:
        convert.load_encoder(module, state, "some.pt", head=True)
    assert "\n" not in str(error.value)
    assert_same(module.state_dict(), before)


def test_an_encoder_alone_is_loaded_under_another_head(files):
    """As finetune.py and tools.embed do it: what pre-training alone needs stays behind, the head is new."""
    state = convert.read(files["vision", "ours.pt"])
    model = build(state | {"classes": ["a", "b"], "student": {}})
    new = model.out.weight.clone()
    convert.load_encoder(model, state, "ours.pt", "teacher")
    assert torch.equal(model.out.weight, new)
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, state["teacher"][f"encoder.{name}"]), name


# ---- --init ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["released.pt", "hub"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_init_loads_student_and_teacher(files, kind, form):
    state = convert.read(files[kind, form])
    cfg, model = config_of(state, init=str(files[kind, form])), build(state)
    teacher = Teacher(model.encoder)
    convert.init_run(cfg, model, teacher, state.get("vocabulary"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state["student"].items())
    expected = state["teacher"] or {name: t for name, t in loaded.items() if name.startswith("encoder.")}
    assert_same(teacher.state_dict(), expected)
    cfg.init_teacher = "student"
    convert.init_run(cfg, model, teacher, state.get("vocabulary"))
    assert_same(teacher.encoder.state_dict(), model.encoder.state_dict())


def test_init_of_another_image_size(files):
    """Offsets are interpolated as a picture would be, the class token's three rows stay."""
    state = convert.read(files["vision", "ours.pt"])
    cfg = config_of(state, init=str(files["vision", "ours.pt"]), image_size=48)
    model = train_vision.build(cfg)
    convert.init_run(cfg, model, Teacher(model.encoder))
    new, old = model.encoder.embed.table, state["student"]["encoder.embed.table"]
    picture = old[:-3].reshape(5, 5, 2).permute(2, 0, 1)[None]
    picture = torch.nn.functional.interpolate(picture, size=(11, 11), mode="bicubic", align_corners=False)
    assert torch.equal(new[:-3], picture[0].permute(1, 2, 0).reshape(121, 2)) and torch.equal(
        new[-3:], old[-3:]
    )


@pytest.mark.parametrize("kind, wrong, changes", [
    ("vision", "another modality", {"init": ("speech", "ours.pt")}), ("vision", "heads", {"heads": 3}),
    ("speech", "norm_eps", {"norm_eps": 1e-6}), ("speech", "deep_norm", {"deep_norm": True}),
    ("speech", "fine-tuned", {}), ("text", "vocabulary", {}), ("text", "does not fit", {"max_tokens": 99}),
])  # fmt: skip
def test_init_refuses_what_does_not_fit(files, tmp_path, kind, wrong, changes):
    state = convert.read(files[kind, "ours.pt"])
    path = files[changes["init"]] if "init" in changes else tmp_path / "ckpt.pt"
    torch.save(state | ({"classes": ["a"]} if wrong == "fine-tuned" else {}), tmp_path / "ckpt.pt")
    cfg = config_of(state, **changes | {"init": str(path)})
    model = build(state, **changes | {"heads": 2})
    before = copy.deepcopy(model.state_dict())
    vocabulary = "another" if wrong == "vocabulary" else state.get("vocabulary")
    with pytest.raises(UserError) as error:
        convert.init_run(cfg, model, Teacher(model.encoder), vocabulary)
    expected = {"another modality": "speech"}.get(wrong, wrong)
    assert str(path) in str(error.value) and expected in str(error.value)
    assert_same(model.state_dict(), before)


def test_the_scripts_go_on_from_a_released_file(files, tmp_path):
    """At --lr 0 pre-training keeps all weights, fine-tuning the encoder's, and so does a folder of that."""
    path, flags = files["text", "released.pt"], ["--data", tmp_path / "data"]
    source = convert.read(path)
    for name in {f.name for f in fields(train_text.Config) if f.metadata} & source["config"].keys():
        flags += [f"--{name}", source["config"][name]]
    write_text(tmp_path / "words.txt", 800)
    prepare = ["prepare", "--input", tmp_path / "words.txt", "--out", tmp_path / "data"]
    done(call(text, *prepare, "--vocab", path.parent))
    still = f"{FAST} --steps 2 --lr 0 --weight_decay 0 --global_batch 4".split()
    flags += ["--tau_0", 1, "--tau_e", 1, "--guard_after", -1, *still]
    done(call(train_text, *flags, "--init", path, "--out", tmp_path / "pre"))
    state = convert.read(tmp_path / "pre" / "ckpt.pt")
    assert_same(state["student"], source["student"])
    assert_same(state["teacher"], source["teacher"])
    write_sentences(tmp_path / "moods")
    flags = ["--preset", "glue_small", "--data", tmp_path, "--task", "moods", *still]
    done(call(finetune, *flags, "--init", tmp_path / "pre" / "ckpt.pt", "--out", tmp_path / "tuned"))
    state = convert.read(tmp_path / "tuned" / "ckpt.pt")
    for name, tensor in source["student"].items():
        assert name.startswith("head.") or torch.equal(state["student"][name], tensor), name
    hub.write(state, tmp_path / "hub")
    back = convert.read(tmp_path / "hub")
    assert back["classes"] == state["classes"] and back["task"] == state["task"]
    assert_same(model_of(back).state_dict(), state["student"])

"""Golden files in the forms of the released checkpoints give the golden numbers; nothing in a file is run."""

import argparse
import os
import pickle
import sys
import tarfile
import types

import pytest
import torch

import train_speech
from common import UserError
from data import images, text
from model import Teacher
from tests.checkpoints import NAMES, NAMES2, golden, model_of, options, released, released2, write_gpt2_files
from tests.helpers import assert_same, call, refused
from tests.test_golden2 import student_of
from tools import convert
from tools.released import load, norms_of
from tools.released2 import our_names


@pytest.fixture
def save(tmp_path):
    def save(file, name="released.pt", legacy=False):
        torch.save(file, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        return tmp_path / name

    return save


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def samples(file):
    padding = file["input"]["padding_mask"]
    return None if padding is None else (~padding).sum(1)


# ---- pre-trained -----------------------------------------------------------------------------------------


class Node:
    """As omegaconf keeps options: a container has _content, a leaf _val, and both lead in circles."""

    def __init__(self, value, parent=None):
        self._parent, self._metadata = parent, {"ref_type": int}
        if isinstance(value, dict):
            self._content = {name: Node(inner, self) for name, inner in value.items()}
        else:
            self._val = value


class Dictionary:
    """As fairseq keeps the letters of a CTC model."""

    def __init__(self, symbols):
        self.symbols, self.indices = symbols, {symbol: i for i, symbol in enumerate(symbols)}


@pytest.fixture
def library(monkeypatch):
    """A library with these classes, which is not there any more once .remove() is called."""
    module = types.ModuleType("fairseq.objects")
    for kind in (Node, Dictionary):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.remove = lambda: monkeypatch.setitem(sys.modules, module.__name__, None)
    return module


@torch.no_grad()
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind, form", [
    ("speech", "cfg"), ("speech", "objects"), ("speech", "args"), ("speech", "sequence"), ("speech", "tied"),
    ("text", "cfg"), ("text", "args"), ("text", "lm_head"), ("vision", "plain"),
    ("vision", "distributed"), ("vision", "half"),
])  # fmt: skip
def test_pre_trained(save, library, kind, form, legacy):
    """Predictions and the teacher's layers are those of the file; sizes and options are its own."""
    name = "audio_tied" if form == "tied" else NAMES[kind]
    whole, file, inputs = released(kind, form, name), golden(name), golden(name)["input"]
    if form == "objects":
        whole["cfg"] = Node(whole["cfg"] | {"list": [1, [2]]})
    path = save(whole, legacy=legacy)
    library.remove()
    state, mask, atol = convert.read(path), file["mask"], 2e-2 if form == "half" else 1e-5
    student = model_of(state)
    teacher = Teacher(student.encoder)
    convert.load_encoder(teacher, state, path, "teacher")
    if kind == "speech":
        f, x, valid = student(inputs["source"], mask, samples(file))
        layers = teacher.from_embedded(x, valid)
    elif kind == "vision":
        f, layers = student(inputs["image"], mask)[0], teacher(inputs["image"])
    else:
        f, layers = student(inputs["src_tokens"], mask)[0], teacher(inputs["unmasked_tokens"])
        assert any("vocab.json" in note for note in state["notes"])
    close(f, file["pred"], atol)
    for ours, theirs in zip(layers[-len(file["teacher_layers"]) :], file["teacher_layers"], strict=True):
        close(ours, theirs, atol)
    assert all(tensor.dtype == torch.float32 for tensor in state["student"].values())
    config, said = state["config"], file["config"]
    assert not state["fresh"] and "classes" not in state
    assert config["heads"] == said["encoder_attention_heads"] and config["depth"] == said["encoder_layers"]
    if kind != "vision":
        assert config["top_k"] == said["average_top_k_layers"] and config["beta"] == said["loss_beta"]
        assert config["norm"] == ("instance" if kind == "speech" else "layer")


@torch.no_grad()
@pytest.mark.parametrize("kind", NAMES2)
def test_pre_trained_of_2_0(save, tmp_path, kind):
    """All weights of both networks; features and the teacher's layers are those of the file."""
    whole, file = released2(kind)
    path = save(whole)
    state, (x,) = convert.read(path), file["input"].values()
    student = model_of(state)
    teacher = Teacher(student.encoder)
    convert.load_encoder(teacher, state, path, "teacher")
    if kind == "speech2":  # the file has fewer convolutions; the features are those of its Transformer
        spec = "+".join(f"[(12,{kernel},{stride})]" for kernel, stride in train_speech.CONVS)
        file["config"] |= {"feature_encoder_spec": spec}
        file["model"], x = {n: w for n, w in whole["model"].items() if n != "_ema"}, torch.randn(2, 8000)
        close(student.encoder(x)[0], student_of(file).eval().encoder(x)[0])
        averaged = our_names(file["ema"])
        assert_same({name: teacher.state_dict()[name] for name in averaged}, averaged)
    else:
        close(student.encoder(x)[0], file["student_features"], 2e-5)
        for ours, theirs in zip(teacher(x)[-2:], file["teacher_layers"], strict=True):
            close(ours, theirs, 2e-5)
    config, said = state["config"], file["config"]
    names = {"masks": "clone_batch", "prenet": "prenet_depth", "heads": "num_heads"}
    names |= {f"decoder_{name}": f"decoder_{name}" for name in ("kernel", "groups")}
    assert {ours: config[ours] for ours in names} == {ours: said[theirs] for ours, theirs in names.items()}
    norms = config["norm"], config["final_norm"], config["top_k"]
    assert norms == ("instance", "layer" if kind == "vision2" else "none", 2)
    assert 0.4 < config["mask_ratio" if kind == "vision2" else "mask_p"] < 0.9 and not state["fresh"]
    assert "2.0" in refused(call(convert, path, tmp_path / "hub"))
    assert "2.0" in call(convert, path, tmp_path / "ours.pt")[1]
    assert_same(convert.read(tmp_path / "ours.pt")["student"], state["student"])


def test_of_two_norms_the_layer_norm_is_last_of_a_layer_and_first_of_the_mean():
    both = {f"{name}_norm_target{of}": True for name in ("layer", "instance") for of in ("_layer", "s")}
    assert norms_of(both) == {"norm": "instance_layer", "final_norm": "layer_instance"}
    assert norms_of(dict.fromkeys(both, False)) == {"norm": "none", "final_norm": "none"}
    assert norms_of({"layer_norm_targets": True}) == {"final_norm": "layer"} and norms_of({}) == {}


@torch.no_grad()
def test_pixels_of_another_normalisation_are_folded_in(save):
    """BEiT's scripts take a mean and a std of 0.5 unless they are told to take ImageNet's."""
    file, whole = golden("vision"), released("vision")
    whole["args"].imagenet_default_mean_and_std = False
    state = convert.read(save(whole))
    student = model_of(state)
    teacher = Teacher(student.encoder)
    convert.load_encoder(teacher, state, "file", "teacher")
    ours = images.normalise(255 * (0.5 + 0.5 * file["input"]["image"]))
    close(student(ours, file["mask"])[0], file["pred"])
    for layer, theirs in zip(teacher(ours)[-len(file["teacher_layers"]) :], file["teacher_layers"]):
        close(layer, theirs)


def test_the_vocabulary_is_taken_from_beside_the_file(save, tmp_path):
    """GPT-2's files and fairseq's dict.txt, which go with the released text model."""
    file = released("text")
    size = len(file["model"]["encoder.sentence_encoder.embed_tokens.weight"])
    path = save(file)
    write_gpt2_files(tmp_path, size)
    assert text.Vocabulary.parse(convert.read(path)["vocabulary"]).size == size
    write_gpt2_files(tmp_path, size + 5)
    with pytest.raises(UserError, match=f"has {size}"):
        convert.read(path)


# ---- fine-tuned ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["cfg", "args", "no dictionary"])
def test_speech_fine_tuned(save, library, form):
    file = golden("audio_ctc")
    letters = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIH"]
    wrapper, inner = {"_name": "wav2vec_ctc", "w2v_path": "there.pt"}, options(file)
    how = {"cfg": {"model": wrapper | {"w2v_args": {"model": inner, "task": {}}}}}
    if form == "args":
        how = {"args": argparse.Namespace(**wrapper, w2v_args=argparse.Namespace(**inner))}
    if form != "no dictionary":
        how["task_state"] = {"target_dictionary": Dictionary(letters)}
    path = save({"model": file["model"]} | how)
    library.remove()
    state = convert.read(path)
    assert state["task"] == "letters" and state["teacher"] is None
    assert state["classes"] == ([str(i) for i in range(12)] if form == "no dictionary" else letters)
    logits, frames = model_of(state)(file["input"]["source"], samples(file))
    real = torch.arange(logits.shape[1]) < frames[:, None]
    close(logits[real], file["logits_BTV"][real])


def per_block(model):
    """As the released scripts fine-tune: every block starts with a copy of the shared table."""
    new = {k: v for k, v in model.items() if not k.startswith("rel_pos_bias.")}
    for name in ("relative_position_bias_table", "relative_position_index"):
        new |= {f"blocks.{l}.attn.{name}": model[f"rel_pos_bias.{name}"] for l in range(3)}
    return new


@torch.no_grad()
@pytest.mark.parametrize("entry", ["model", "module", ""])
@pytest.mark.parametrize("tables", ["shared", "per block"])
def test_vision_fine_tuned(save, entry, tables):
    file = golden("vision_finetune")
    model = per_block(file["model"]) if tables == "per block" else file["model"]
    more = {"optimizer": None, "param_shapes": [{"w": torch.Size([2])}]} if entry == "module" else {}
    state = convert.read(save({entry: model} | more if entry else model))
    assert state["task"] == "images" and state["classes"] == list("0123456789")
    assert state["config"]["per_block"] == (tables == "per block")
    close(model_of(state)(file["input"]["image"]), file["logits"])


# ---- nothing runs ----------------------------------------------------------------------------------------


class Malicious:
    """Unpickled without care it would write a file."""

    def __init__(self, path, how="os.system"):
        self.path, self.how = path, how

    def __reduce__(self):
        code = f"open({str(self.path)!r}, 'w').close()"
        calls = {"os.system": (os.system, f"echo >{self.path}"), "eval": (eval, code), "exec": (exec, code)}
        calls |= {"open": (open, str(self.path), "w"), "getattr": (getattr, str, "upper")}
        calls |= {"torch.hub": (torch.hub.load, str(self.path), "x")}
        call, *args = calls[self.how]
        return call, tuple(args)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["weights", "teacher", "options", "top"])
@pytest.mark.parametrize("how", ["os.system", "eval", "exec", "open", "getattr", "torch.hub"])
def test_a_malicious_file_runs_nothing(save, tmp_path, how, place, form):
    file, written = released("speech"), tmp_path / "written"
    bad = Malicious(written, how)
    if place == "weights":
        file["model"]["mask_emb"] = bad
    if place == "teacher":
        file["model"]["_ema"] = {"layer_norm.weight": bad}
    if place == "options":
        file["cfg"]["task"] = bad
    path = save(bad if place == "top" else file, legacy=form == "legacy")
    if form == "pickle":
        path.write_bytes(pickle.dumps(file))
    if place == "options" and how != "os.system" and form != "pickle":  # of no use, and so not looked at
        assert convert.read(path)["student"]
    else:
        error = refused(call(convert, path, tmp_path / "ours.pt"), silent=True)
        assert str(path) in error and not (tmp_path / "ours.pt").exists()
    assert not written.exists()


def test_options_that_hold_each_other_come_to_an_end(save):
    file, value = released("speech"), [1]
    for _ in range(45):
        value = [value, value]
    file["cfg"]["model"]["w2v_args"] = loop = argparse.Namespace(value=value)
    loop._val = loop
    assert convert.read(save(file))["config"]["heads"] == 2


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_one_line(save, tmp_path, part, legacy):
    whole = save(released("speech"), legacy=legacy).read_bytes()
    path = tmp_path / "part.pt"
    path.write_bytes(whole[: int(part * len(whole))])
    error = refused(call(convert, path, tmp_path / "ours.pt"), silent=True)
    assert str(path) in error and not (tmp_path / "ours.pt").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_and_archives_are_refused(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="TorchScript"):
        load(path)
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(path, "pickle")
    with pytest.raises(UserError, match="tar"):
        load(tmp_path / "old.pt")


# ---- every weight ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["extra", "missing", "teacher"])
@pytest.mark.parametrize("kind", [*NAMES, *NAMES2])
def test_what_is_left_over_or_missing_is_named(save, kind, damage):
    file = released(kind)
    weights = file["model"]
    if damage == "teacher":
        weights = file.get("model_ema") or next(weights[name] for name in weights if name.endswith("_ema"))
    name = next(name for name in weights if name.endswith(("1.fc1.bias", "1.mlp.fc1.bias")))
    if damage == "extra":
        weights[name.replace("fc1", "adapter")] = torch.zeros(3)
    else:
        del weights[name]
    path = save(file)
    with pytest.raises(UserError, match="adapter" if damage == "extra" else "blocks.1.fc1.bias") as error:
        state = convert.read(path)
        convert.load_encoder(model_of(state), state, path, "teacher")
    assert "\n" not in str(error.value)


def test_a_head_that_is_new_is_named(save):
    file = golden("vision")
    model = {k: v for k, v in file["model"].items() if not k.startswith(("lm_head", "mask_token", "norm"))}
    state = convert.read(save({"model": model}))
    assert state["fresh"] == ["head"] and state["teacher"] is None
    student = model_of(state)
    assert torch.equal(student.encoder.norm.weight, torch.ones(12)), "the norm starts as the identity"


@pytest.mark.parametrize("rows", [27, 38])
def test_images_that_are_not_square_are_one_line(save, rows):
    file = released("vision")
    for part in (file["model"], file["model_ema"]):
        part["rel_pos_bias.relative_position_bias_table"] = torch.zeros(rows, 2)
    with pytest.raises(UserError, match="square"):
        convert.read(save(file))

"""The released checkpoints' forms: the golden files wrapped as those are, whatever wraps them, give the golden numbers."""

import argparse
import collections
import enum
import json
import os
import pickle
import re
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
import torch

import common
import train_vision
from common import BadInput
from data import text
from model import Teacher
from tools import convert, embed, unpickle
from train_speech import Config as SpeechConfig
from train_text import Config as TextConfig
from train_vision import Config as VisionConfig

GOLDEN = Path(__file__).parent / "golden"
SPEECH_SIZES = {
    "encoder_layers": "encoder_layers", "encoder_attention_heads": "encoder_attention_heads",
    "encoder_embed_dim": "encoder_embed_dim",
    "conv_feature_layers": "conv_feature_layers", "average_top_k_layers": "average_top_k_layers", "loss_beta": "loss_beta",
    "instance_norm_target_layer": "instance_norm_target_layer", "layer_norm_target_layer": "layer_norm_target_layer",
    "layer_norm_targets": "layer_norm_targets", "instance_norm_targets": "instance_norm_targets",
}  # fmt: skip


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


@pytest.fixture
def save(tmp_path):
    def save(file, name="released.pt", **how):
        torch.save(file, tmp_path / name, **how)
        return tmp_path / name

    return save


@pytest.fixture
def foreign(monkeypatch):
    """foreign(value) -> the value as a library's configuration objects, which cannot be imported when the file is read."""
    module = types.ModuleType("omegaconf.dictconfig")
    kinds = {}
    for name in ("DictConfig", "ListConfig", "AnyNode", "Choice"):
        base = (enum.Enum,) if name == "Choice" else ()
        kinds[name] = (
            enum.Enum(name, {"A": "fixed"}, module=module.__name__) if base else type(name, (), {"__module__": module.__name__})
        )
        setattr(module, name, kinds[name])
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def wrap(value, parent=None):
        kind = "DictConfig" if isinstance(value, dict) else "ListConfig" if isinstance(value, list) else "AnyNode"
        node = kinds[kind]()
        node._parent = parent  # leads in circles
        node._metadata = {"ref_type": int, "object_type": dict, "flags": {}, "kind": kinds["Choice"].A}
        if kind == "AnyNode":
            node._val = value
        else:
            node._content = (
                {k: wrap(v, node) for k, v in value.items()} if kind == "DictConfig" else [wrap(v, node) for v in value]
            )
        return node

    wrap.forget = lambda: [monkeypatch.delitem(sys.modules, name) for name in ("omegaconf.dictconfig", "omegaconf")]
    return wrap


def options(config, names=SPEECH_SIZES):
    return {theirs: config[ours] for theirs, ours in names.items() if ours in config}


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def load(state):
    module = convert.build(state)
    convert.load_into(module, state["student"], "state")
    return module.eval()


def samples(file):
    padding = file["input"]["padding_mask"]
    return None if padding is None else (~padding).sum(1)


def check_speech(path, file, atol=1e-5):
    state = convert.read(path)
    config = file["config"]
    said = {"dim": config["encoder_embed_dim"], "depth": config["encoder_layers"], "heads": config["encoder_attention_heads"]}
    said |= {"top_k": config["average_top_k_layers"], "beta": config["loss_beta"]}
    assert said.items() <= state["config"].items() and not state["fresh"] and set(state["config"]) <= set(vars(SpeechConfig()))
    student = load(state)
    f, x, valid = student(file["input"]["source"], file["mask"], samples(file), content=True)
    close(f, file["pred"], atol)
    teacher = Teacher(student.encoder)
    convert.load_into(teacher, state["teacher"], path)
    for ours, theirs in zip(
        teacher(x, valid, content=True)[-config["average_top_k_layers"] :], file["teacher_layers"], strict=True
    ):
        close(ours, theirs, max(atol, 1e-5))
    return state


# ---- speech ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ["cfg", "cfg of objects", "args"])
@pytest.mark.parametrize("name", ["audio_tied", "audio_averaged_positions"])
def test_speech_pretrained(save, foreign, name, form, legacy):
    file = golden(name)
    model = {
        "_name": "data2vec_audio",
        "ema_anneal_end_step": 30_000 if form == "args" else "${optimization.max_update}",
    } | options(file["config"])
    how = {
        "cfg": lambda: {"cfg": {"model": model, "optimization": {"max_update": 30_000}}, "args": None},
        "cfg of objects": lambda: {
            "cfg": foreign({"model": model, "optimization": {"max_update": 30_000}, "list": [1, [2]]}),
            "args": None,
        },
        "args": lambda: {"args": argparse.Namespace(arch="data2vec_audio", **model)},
    }[form]()
    rest = {
        "optimizer_history": [{"num_updates": 1}],
        "task_state": {},
        "extra_state": {"epoch": 1},
        "last_optimizer_state": None,
    }
    path = save({"model": file["model"] | {"_ema": file["ema"]}} | how | rest, _use_new_zipfile_serialization=not legacy)
    foreign.forget()
    state = check_speech(path, file)
    assert state["config"]["tau_n"] == 30_000
    assert state["config"]["share_positions"] == (not any("pos_conv" in key for key in file["ema"]))
    assert form.split()[0] in state["origin"] and "pre-trained" in state["origin"]


def test_speech_teacher_entries_in_the_weights_table_itself(save):
    file = golden("audio_tied")
    model = {f"_ema.{key}": value for key, value in file["ema"].items()} | file["model"]
    check_speech(save({"model": model, "cfg": {"model": options(file["config"])}}), file)


def test_speech_head_in_a_sequence_of_one(save):
    """As the released Base model has it."""
    file = golden("audio_tied")
    model = {re.sub("^final_proj", "final_proj.0", key): value for key, value in file["model"].items()}
    check_speech(save({"model": model | {"_ema": file["ema"]}, "cfg": {"model": options(file["config"])}}), file)


def test_half_precision_is_widened(save):
    file = golden("audio_tied")
    half = {key: value.half() for key, value in file["model"].items()}
    ema = {key: value.half() for key, value in file["ema"].items()}
    state = check_speech(save({"model": half | {"_ema": ema}, "cfg": {"model": options(file["config"])}}), file, atol=2e-2)
    assert all(t.dtype == torch.float32 for part in ("student", "teacher") for t in state[part].values())
    exact = convert.read(
        save({"model": {k: v.float() for k, v in half.items()}, "cfg": {"model": options(file["config"])}}, "again.pt")
    )
    for key, tensor in exact["student"].items():
        assert torch.equal(tensor, state["student"][key]), key


class Dictionary:
    """As fairseq keeps the letters of a CTC model."""

    def __init__(self, symbols):
        self.symbols, self.count, self.indices = symbols, [1] * len(symbols), {s: i for i, s in enumerate(symbols)}


@pytest.mark.parametrize("form", ["cfg", "args", "bare"])
def test_speech_finetuned(save, monkeypatch, form):
    file = golden("audio_ctc")
    letters = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIH"]
    inner = {"_name": "data2vec_audio"} | options(file["config"])
    weights = file["model"]
    if not any(name.startswith("w2v_encoder.") for name in weights):
        weights = {
            ("w2v_encoder." if name.startswith("proj.") else "w2v_encoder.w2v_model.") + name: t for name, t in weights.items()
        }
    wrapper = {"_name": "wav2vec_ctc", "w2v_path": "there.pt", "mask_prob": 0.5}
    monkeypatch.setitem(sys.modules, "fairseq", module := types.ModuleType("fairseq"))
    Dictionary.__module__, module.Dictionary = "fairseq", Dictionary
    how = {
        "cfg": {"cfg": {"model": wrapper | {"w2v_args": {"model": inner, "task": {}}}, "task": {"_name": "audio_finetuning"}},
                "task_state": {"target_dictionary": Dictionary(letters)}},
        "args": {"args": argparse.Namespace(**wrapper, w2v_args=argparse.Namespace(**inner)),
                 "task_state": {"target_dictionary": Dictionary(letters)}},
        "bare": {"cfg": {"model": wrapper | {"w2v_args": {"model": inner}}}},
    }[form]  # fmt: skip
    path = save({"model": weights} | how)
    monkeypatch.delitem(sys.modules, "fairseq")
    state = convert.read(path)
    assert state["goal"] == "letters" and state["teacher"] is None and "fine-tuned" in state["origin"]
    assert state["classes"] == (letters if form != "bare" else [str(i) for i in range(12)]), "what no file says is numbered"
    with torch.no_grad():
        logits, frames = load(state)(file["input"]["source"], samples(file))
    real = torch.arange(logits.shape[1]) < frames[:, None]
    close(logits[real], file["logits_BTV"][real], 1e-5)


def test_letters_can_be_given(save, tmp_path):
    file = golden("audio_ctc")
    path = save({"model": file["model"], "cfg": {"model": {"w2v_args": {"model": options(file["config"])}}}})
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 10\n" for letter in "|ETAONIH"))
    code = tool(path, tmp_path / "ours.pt", "--letters", tmp_path / "dict.ltr.txt")
    assert code == 0 and convert.read(tmp_path / "ours.pt")["classes"] == ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIH"]


def tool(*flags):
    """Exit status of `python -m tools.convert flags`."""
    old, sys.argv = sys.argv, [convert.__file__, *map(str, flags)]
    try:
        common.run(convert.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = old
    return 0


@pytest.mark.parametrize("name", ["heads", "convs"])
def test_what_a_file_does_not_say_is_asked_for(save, tmp_path, capsys, name):
    file = golden("audio_tied")
    said = options(file["config"])
    heads, convs = said.pop("encoder_attention_heads"), said.pop("conv_feature_layers")
    said |= {"encoder_attention_heads": heads} if name == "convs" else {"conv_feature_layers": convs}
    path = save({"model": file["model"] | {"_ema": file["ema"]}, "cfg": {"model": said}})
    assert tool(path, tmp_path / "ours.pt", f"--{name}", heads if name == "heads" else convs) == 0, capsys.readouterr().err
    state = convert.read(tmp_path / "ours.pt")
    assert state["config"]["heads"] == heads
    close(load(state)(file["input"]["source"], file["mask"], samples(file)), file["pred"], 1e-5)


def test_a_flag_that_contradicts_the_file_is_refused(save, tmp_path, capsys):
    file = golden("audio_tied")
    path = save({"model": file["model"], "cfg": {"model": options(file["config"])}})
    assert tool(path, tmp_path / "ours.pt", "--top_k", 1) == 2
    assert "top_k" in capsys.readouterr().err and not (tmp_path / "ours.pt").exists()


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cfg", "args"])
def test_text_pretrained(save, tmp_path, form):
    file = golden("text_tied")
    config = file["config"]
    said = options(config, {k: k for k in config if k not in ("modality",)})
    said = {k: v for k, v in said.items() if isinstance(v, (int, float, bool))}
    nested = {k: v for k, v in said.items() if not k.startswith("encoder_")}
    nested["transformer"] = {
        "encoder": {k.removeprefix("encoder_"): v for k, v in said.items() if k.startswith("encoder_")},
        "decoder": {"attention_heads": 99},
    }
    how = {"cfg": {"model": nested}} if form == "cfg" else {"args": argparse.Namespace(**said)}
    markers = {"encoder.sentence_encoder.version": torch.tensor([3.0])}
    state = convert.read(save({"model": file["model"] | {"encoder._ema": file["ema"]} | markers} | how))
    assert (
        state["config"]["heads"] == config["encoder_attention_heads"]
        and state["config"]["top_k"] == config["average_top_k_layers"]
    )
    assert (
        state["config"]["beta"] == config["loss_beta"] and set(state["config"]) <= set(vars(TextConfig())) and not state["fresh"]
    )
    assert any("vocab.json" in note for note in state["notes"]) and form in state["origin"]
    student = load(state)
    close(student(file["input"]["src_tokens"], file["mask"]), file["pred"], 1e-5)
    teacher = Teacher(student.encoder)
    convert.load_into(teacher, state["teacher"], "state")
    for ours, theirs in zip(
        teacher(file["input"]["unmasked_tokens"])[-config["average_top_k_layers"] :], file["teacher_layers"], strict=True
    ):
        close(ours, theirs, 1e-5)


def test_text_names_of_the_first_versions(save):
    """decoder for encoder, lm_head for the regression head, emb_layer_norm, one matrix for query, key and value, target_model."""
    file, old = golden("text_tied"), {}
    ema = {f"encoder.target_model.{key}": value for key, value in file["ema"].items()}
    for name, tensor in (file["model"] | ema).items():
        if match := re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.(weight|bias)", name):
            if match[2] == "q":
                old[f"{match[1]}in_proj_{match[3]}"] = torch.cat(
                    [(file["model"] | ema)[f"{match[1]}{part}_proj.{match[3]}"] for part in "qkv"]
                )
            continue
        old[name.replace("layernorm_embedding", "emb_layer_norm").replace("regression_head", "lm_head")] = tensor
    old = {re.sub("^encoder", "decoder", name): tensor for name, tensor in old.items()}
    heads = argparse.Namespace(encoder_attention_heads=file["config"]["encoder_attention_heads"])
    state, now = (
        convert.read(save({"model": old, "args": heads})),
        convert.read(save({"model": file["model"] | {"encoder._ema": file["ema"]}, "args": heads})),
    )
    for part in ("student", "teacher"):
        assert state[part].keys() == now[part].keys()
        assert all(torch.equal(tensor, now[part][name]) for name, tensor in state[part].items())


def test_text_finetuned_for_sentences(save):
    file = golden("text_tied")
    dim = file["config"]["encoder_embed_dim"]
    head = {
        "dense.weight": torch.randn(dim, dim),
        "dense.bias": torch.randn(dim),
        "out_proj.weight": torch.randn(3, dim),
        "out_proj.bias": torch.randn(3),
    }
    model = file["model"] | {f"classification_heads.sentence_classification_head.{k}": v for k, v in head.items()}
    args = argparse.Namespace(encoder_attention_heads=file["config"]["encoder_attention_heads"])
    state = convert.read(save({"model": model, "args": args}))
    assert state["goal"] == "sentences" and state["classes"] == ["0", "1", "2"]
    ids = file["input"]["unmasked_tokens"]
    with torch.no_grad():
        first = load(state).encoder(ids)[0][:, 0]
        expected = (first @ head["dense.weight"].T + head["dense.bias"]).tanh() @ head["out_proj.weight"].T + head[
            "out_proj.bias"
        ]
        close(load(state)(ids), expected, 1e-5)
    close(first, file["student_features"][:, 0], 1e-5)


def test_the_vocabulary_is_taken_from_beside_the_file(save, tmp_path):
    """GPT-2's files and fairseq's dict.txt, as the released text models are given out."""
    file = golden("text_tied")
    size = file["model"]["encoder.sentence_encoder.embed_tokens.weight"].shape[0]
    path = save(
        {"model": file["model"], "args": argparse.Namespace(encoder_attention_heads=file["config"]["encoder_attention_heads"])}
    )
    bytes_ = {letter: i for i, letter in enumerate(text.byte_letters().values())}
    (tmp_path / "encoder.json").write_text(json.dumps(bytes_))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(size - 5)))
    assert text.Vocabulary.parse(convert.read(path)["vocabulary"]).size == size
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(size)))
    with pytest.raises(BadInput, match=f"has {size}"):
        convert.read(path)


# ---- vision ----------------------------------------------------------------------------------------------------------


def check_vision(path, file, atol=1e-5):
    state = convert.read(path)
    student = load(state)
    close(student(file["input"]["image"], file["mask"]), file["pred"], atol)
    teacher = Teacher(student.encoder)
    convert.load_into(teacher, state["teacher"], path)
    for ours, theirs in zip(teacher(file["input"]["image"])[-len(file["teacher_layers"]) :], file["teacher_layers"], strict=True):
        close(ours, theirs, max(atol, 1e-5))
    return state


@pytest.mark.parametrize("form", ["plain", "distributed", "half", "args"])
def test_vision_pretrained(save, form):
    file = golden("vision")
    model, ema, more = file["model"], file["ema"], {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    if form == "distributed":
        model, ema = ({f"module.{k}": v for k, v in part.items()} for part in (model, ema))
    if form == "half":
        model, ema = ({k: v.half() if v.is_floating_point() else v for k, v in part.items()} for part in (model, ema))
    if form == "args":
        more["args"] = argparse.Namespace(target_layers="[1,2]", l1_beta=1.5, layer_results="end", target_layer_norm_last=True,
                                          target_instance_norm=False, post_target_layer_norm=False, ema_decay=0.999)  # fmt: skip
    state = check_vision(save({"model": model, "model_ema": ema} | more, "released.pth"), file, 2e-2 if form == "half" else 1e-5)
    assert set(state["config"]) <= set(vars(VisionConfig())) and "pre-trained" in state["origin"]
    said = {"top_k": 2, "beta": 1.5, "norm": "layer", "final_norm": "none", "tau_0": 0.999, "target": "block"}
    recipe = {
        "top_k": 3,
        "beta": 2.0,
        "norm": "layer",
        "final_norm": "layer",
        "tau_0": 0.9998,
        "target": "block",
    }  # as deep as it is
    assert (said if form == "args" else recipe).items() <= state["config"].items()


def per_block(file):
    """As the released scripts fine-tune: every block starts with a copy of the shared table, and goes its own way."""
    model = {k: v for k, v in file["model"].items() if not k.startswith("rel_pos_bias.")}
    depth = 1 + max(int(k.split(".")[1]) for k in model if k.startswith("blocks."))
    for l in range(depth):
        for part in ("table", "index"):
            name = "relative_position_bias_table" if part == "table" else "relative_position_index"
            model[f"blocks.{l}.attn.{name}"] = file["model"][f"rel_pos_bias.{name}"]
    return model


@pytest.mark.parametrize("entry", ["model", "module"])
@pytest.mark.parametrize("tables", ["shared", "per block"])
def test_vision_finetuned(save, entry, tables):
    file = golden("vision_finetune")
    source = file if "rel_pos_bias.relative_position_bias_table" in file["model"] else golden("vision")
    model = file["model"]
    if tables == "per block":
        model = model | per_block(
            {"model": file["model"] | {k: v for k, v in source["model"].items() if k.startswith("rel_pos_bias.")}}
        )
        model = {k: v for k, v in model.items() if not k.startswith("rel_pos_bias.")}
    more = (
        {"buffer_names": [], "optimizer": None, "param_shapes": [{"w": torch.Size([2])}], "ds_version": "0.1", "dp_world_size": 8}
        if entry == "module"
        else {}
    )
    state = convert.read(save({entry: model} | more, "released.pth"))
    assert entry in state["origin"] and state["goal"] == "images" and state["config"]["per_block"] == (tables == "per block")
    with torch.no_grad():
        close(load(state)(file["input"]["image"]), file["logits"], 1e-5)


def test_tables_of_blocks_that_differ_are_each_their_own(save):
    file = golden("vision_finetune")
    model = per_block({"model": file["model"]})
    for name in model:
        if name.endswith("bias_table"):
            model[name] = torch.randn_like(model[name])
    state = convert.read(save({"model": model}, "released.pth"))
    for l, table in enumerate(state["student"]["encoder.embed.table"]):
        assert torch.equal(table, model[f"blocks.{l}.attn.relative_position_bias_table"])
    classifier = load(state)
    _, bias = classifier.encoder.embed.place(
        torch.zeros(1, classifier.encoder.embed.grid[0] * classifier.encoder.embed.grid[1], state["config"]["dim"])
    )
    for l in range(len(bias)):
        expected = model[f"blocks.{l}.attn.relative_position_bias_table"][classifier.encoder.embed.index]
        assert torch.equal(bias[l, 0], expected.permute(2, 0, 1))


@torch.no_grad()
def test_embeddings_follow_the_tables_of_each_block(save):
    """tools.embed goes through the blocks by itself."""
    file = golden("vision_finetune")
    model = per_block({"model": file["model"]})
    model = {name: torch.randn_like(t) if name.endswith("bias_table") else t for name, t in model.items()}
    path, picture = save({"model": model}, "released.pth"), file["input"]["image"]
    encoder, *_ = embed.open_encoder(str(path), "student", None)
    ours = torch.stack(embed.features(encoder, list(picture)))
    close(ours, load(convert.read(path)).encoder(picture)[0][:, 1:], 1e-5)


# ---- nothing runs ------------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickled without care it would write a file."""

    def __init__(self, path, how="os.system"):
        self.path, self.how = path, how

    def __reduce__(self):
        code = f"open({str(self.path)!r}, 'w').close()"
        return {"os.system": (os.system, (f"echo >{self.path}",)), "eval": (eval, (code,)), "exec": (exec, (code,)),
                "open": (open, (str(self.path), "w")), "torch.hub": (torch.hub.load, (str(self.path), "x")),
                "getattr": (getattr, (str, "upper"))}[self.how]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["weights", "teacher", "options", "top"])
@pytest.mark.parametrize("how", ["os.system", "eval", "exec", "open", "getattr"])
def test_a_malicious_file_runs_nothing(save, tmp_path, how, place, legacy, capsys):
    file, written = golden("audio_tied"), tmp_path / "written"
    bad = Malicious(written, how)
    whole = {
        "weights": {"model": file["model"] | {"mask_emb": bad}},
        "teacher": {"model": file["model"] | {"_ema": {"layer_norm.weight": bad}}},
        "options": {"model": file["model"], "args": bad}, "top": bad,
    }[place]  # fmt: skip
    path = save(whole, _use_new_zipfile_serialization=not legacy)
    assert tool(path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert not written.exists() and error.count("\n") == 1 and str(path) in error and "not called" in error
    assert how.split(".")[-1] in error and not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize("place", ["weights", "options"])
def test_calls_of_foreign_libraries_are_not_made_either(save, tmp_path, place):
    file, written = golden("audio_tied"), tmp_path / "written"
    bad = Malicious(written, "torch.hub")
    path = save(
        {
            "model": file["model"] | ({"mask_emb": bad} if place == "weights" else {}),
            "args": bad,
            "cfg": {"model": options(file["config"])},
        }
    )
    if place == "weights":
        with pytest.raises(BadInput, match=r"torch\.hub.* not run"):
            convert.read(path)
    else:
        assert convert.read(path)["student"]
    assert not written.exists()


@pytest.mark.parametrize("name", [
    "collections\nCounter", "collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter",
    "numpy.core.multiarray\nscalar", "torch.storage\nUntypedStorage", "argparse\nNamespace", "torch\nfloat32",
])  # fmt: skip
def test_what_loads_a_file_is_not_changed_by_it(tmp_path, monkeypatch, name):
    """torch's old format writes NAME.patch for a class that asks for it by `dump_patches`, which a pickle could have set."""

    def word(text):
        return b"X" + len(text).to_bytes(4, "little") + text.encode()

    monkeypatch.chdir(tmp_path)
    set_attributes = b"(N}" + word("dump_patches") + b"\x88s" + word("__name__") + word(str(tmp_path / "mine")) + b"stb"
    body = b"\x80\x02(" + word("module") + f"c{name}\n".encode() + set_attributes + word("a.py") + word("b") + b"tQ."
    header = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    Path("bad.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + body + pickle.dumps([], 2))
    with pytest.raises(BadInput, match="^bad.pt: damaged"):
        unpickle.load("bad.pt")
    assert os.listdir() == ["bad.pt"] and not hasattr(collections.Counter, "dump_patches")


def test_torchs_wish_for_its_own_safe_reader_is_met_by_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(a=1)}, tmp_path / "file.pt")
    assert unpickle.load(tmp_path / "file.pt")["w"].sum() == 2 and os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


def test_options_that_hold_each_other_come_to_an_end(save):
    options = [1]
    for _ in range(45):
        options = [options, options]
    path = save({"model": golden("audio_tied")["model"], "args": argparse.Namespace(encoder_layers=options)})
    with pytest.raises(BadInput, match=f"{re.escape(str(path))}.*without end"):
        convert.read(path)


def test_two_weights_for_one_are_refused(save):
    model = golden("text_tied")["model"]
    dim = model["encoder.sentence_encoder.embed_tokens.weight"].shape[1]
    heads = {f"classification_heads.{name}.dense.weight": torch.eye(dim) for name in ("mnli", "cola")}
    with pytest.raises(BadInput, match=r"classification_heads\.cola.* second"):
        convert.read(save({"model": model | heads}))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_any_protocol_run_nothing(tmp_path, protocol):
    path, written = tmp_path / "bare.pt", tmp_path / "written"
    path.write_bytes(pickle.dumps({"model": {"w": Malicious(written)}}, protocol))
    with pytest.raises(BadInput, match=re.escape(str(path))):
        convert.read(path)
    assert not written.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_one_line(save, tmp_path, share, legacy, capsys):
    file = golden("audio_tied")
    whole = save(
        {"model": file["model"], "cfg": {"model": options(file["config"])}}, _use_new_zipfile_serialization=not legacy
    ).read_bytes()
    path = tmp_path / "part.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert tool(path, tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and "Traceback" not in error and not (tmp_path / "ours.pt").exists()


def test_programs_and_archives_are_refused(tmp_path):
    path = tmp_path / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(BadInput, match="TorchScript"):
        unpickle.load(path)
    path.write_bytes(path.read_bytes() + b"PK\5\6")  # zipfile takes it for no archive, torch still does
    with pytest.raises(BadInput, match="TorchScript"):
        unpickle.load(path)
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(path, "pickle")
    with pytest.raises(BadInput, match="tar archive"):
        unpickle.load(tmp_path / "old.pt")


OURS = dict(image_size=8, patch=4, dim=8, depth=2, heads=2, ffn=16)
ODD = {  # entry or option of a checkpoint of ours: what it should not be
    "config": [5, None, ["patch"], argparse.Namespace(patch=4)], "student": [None, {}, [1], {5: torch.zeros(1)}],
    "classes": [3, [1, 2], argparse.Namespace()], "goal": [5, argparse.Namespace()], "finetune": [5],
    "vocabulary": [5, "junk"], "dim": ["8", -8, None, argparse.Namespace()], "depth": ["2", 0, 2.5], "norm_eps": ["small"],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ODD.items() for value in values])
def test_a_checkpoint_of_ours_holds_what_we_write(save, name, value):
    student = train_vision.build(VisionConfig(**OURS)).state_dict()
    whole = {"student": student, "teacher": None, "config": dict(OURS), "classes": ["a"], "goal": "images", "finetune": {}}
    assert convert.read(save(whole))["config"] == OURS
    (whole["config"] if name in ("dim", "depth", "norm_eps") else whole)[name] = value
    path = save(whole)
    with pytest.raises(BadInput, match=re.escape(str(path))):
        convert.read(path)


@pytest.mark.parametrize("damage", ["missing", "other depth", "teacher", "no mark"])
def test_a_folder_is_only_written_of_all_weights(save, tmp_path, capsys, damage):
    student = train_vision.build(VisionConfig(**OURS)).state_dict()
    teacher = {name: tensor for name, tensor in student.items() if name.startswith("encoder.")}
    config = OURS | {"depth": 3} if damage == "other depth" else {"dim": 8} if damage == "no mark" else OURS
    if damage in ("missing", "teacher"):
        (teacher if damage == "teacher" else student).pop("encoder.blocks.1.fc1.weight")
    path = save({"student": student, "teacher": teacher, "config": config})
    assert tool(path, tmp_path / "folder") == 2 and not (tmp_path / "folder").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and (damage == "no mark" or "fc1" in error or "blocks.2" in error)


def test_a_checkpoint_of_ours_holds_tensors_alone(save):
    path = save({"student": {"w": argparse.Namespace(a=1)}, "teacher": None, "config": {}})
    with pytest.raises(BadInput, match="argparse.Namespace"):
        convert.read(path)


# ---- every weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, extra, missing", [
    ("audio_tied", "quantizer.vars", "encoder.layers.1.fc1.bias"),
    ("text_tied", "encoder.sentence_encoder.layers.0.adapter.weight", "encoder.sentence_encoder.layers.0.fc1.bias"),
    ("vision", "blocks.0.attn.k_bias", "blocks.1.mlp.fc1.bias"),
], ids=["speech", "text", "vision"])  # fmt: skip
@pytest.mark.parametrize("damage", ["extra", "missing"])
def test_what_is_left_over_or_lacking_is_listed(save, tmp_path, capsys, name, extra, missing, damage):
    file = golden(name)
    model = dict(file["model"])
    said = argparse.Namespace(**{k: v for k, v in file["config"].items() if isinstance(v, (int, str))})
    if damage == "extra":
        model[extra] = torch.zeros(3)
    else:
        del model[missing]
    assert tool(save({"model": model, "args": said}), tmp_path / "ours.pt") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "ours.pt").exists()
    assert (extra if damage == "extra" else "fc1.bias") in error


@pytest.mark.parametrize(
    "name, key", [("audio_tied", "layers.1.fc1.bias"), ("text_tied", "layers.1.fc1.bias"), ("vision", "blocks.1.mlp.fc1.bias")]
)
def test_a_teacher_is_whole_or_refused(save, name, key):
    file = golden(name)
    ema = {k: v for k, v in file["ema"].items() if k != key}
    assert len(ema) == len(file["ema"]) - 1
    said = argparse.Namespace(**{k: v for k, v in file["config"].items() if isinstance(v, (int, str))})
    entry = {"audio_tied": "_ema", "text_tied": "encoder._ema"}.get(name)
    whole = {"model": file["model"] | ({entry: ema} if entry else {}), "args": said} | ({} if entry else {"model_ema": ema})
    with pytest.raises(BadInput, match="encoder.blocks.1.fc1.bias"):
        convert.read(save(whole))


def test_options_that_are_nonsense_are_one_line(save):
    file = golden("audio_tied")
    for said in ({"encoder_layers": 99}, {"encoder_attention_heads": 7}, {"conv_feature_layers": "[(512, 10, 5)] * 10 ** 9"}):
        with pytest.raises(BadInput) as error:
            convert.read(save({"model": file["model"], "cfg": {"model": options(file["config"]) | said}}))
        assert "\n" not in str(error.value)


def test_a_head_that_is_new_is_named(save, tmp_path, capsys):
    file = golden("vision")
    model = {k: v for k, v in file["model"].items() if not k.startswith("lm_head") and k != "mask_token"}
    assert tool(save({"model": model}), tmp_path / "ours.pt") == 0
    out = capsys.readouterr().out
    assert "new by design: head" in out and "mask_embedding" in out
    assert convert.read(tmp_path / "ours.pt")["fresh"] == ["head"]


def test_the_same_weights_from_the_tool_and_from_the_file(save, tmp_path):
    file = golden("audio_tied")
    path = save({"model": file["model"] | {"_ema": file["ema"]}, "cfg": {"model": options(file["config"])}})
    assert tool(path, tmp_path / "ours.pt") == 0
    direct, stored = convert.read(path), convert.read(tmp_path / "ours.pt")
    assert direct["config"] == stored["config"]
    for part in ("student", "teacher"):
        for name, tensor in direct[part].items():
            assert torch.equal(tensor, stored[part][name])

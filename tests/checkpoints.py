"""What tests of checkpoints share: golden files wrapped as released, models of what convert.read gives."""

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path

import torch

import train_speech
from data import text
from finetune import Classifier, FrameClassifier, SentenceClassifier
from tests.helpers import SCRIPTS
from tools import convert

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"vision": "vision", "speech": "audio_averaged_positions", "text": "text_tied"}
NAMES2 = {"vision2": "images_base", "speech2": "audio_base", "text2": "text_base"}
HEADS = {"vision": Classifier, "speech": FrameClassifier, "text": SentenceClassifier}


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def options(file):
    """Those of a golden file, as fairseq keeps them; of the text encoder inside "transformer"."""
    said = {name: value for name, value in file["config"].items() if isinstance(value, (int, float, str))}
    if said["modality"] != "text":
        return said
    encoder = {name[8:]: value for name, value in said.items() if name.startswith("encoder_")}
    rest = {name: value for name, value in said.items() if not name.startswith("encoder_")}
    return rest | {"transformer": {"encoder": encoder, "decoder": {"attention_heads": 99}}}


def released2(kind):
    """A golden file of data2vec 2.0 likewise; of speech with as many convolutions as the released one."""
    file = torch.load(GOLDEN.parent / "golden2" / f"{NAMES2[kind]}.pt", weights_only=True)
    model, options = file["model"] | {"_ema": file["ema"]}, file["config"]
    for i, (kernel, _) in enumerate(train_speech.CONVS if kind == "speech2" else ()):
        stem = f"modality_encoders.AUDIO.local_encoder.conv_layers.{i}"
        model[f"{stem}.0.weight"] = torch.randn(12, 12 if i else 1, kernel) / kernel
        model |= {f"{stem}.2.1.{part}": torch.randn(12) for part in ("weight", "bias")}
    parts = {"decoder": {name: value for name, value in options.items() if name.startswith("decoder_")}}
    parts |= {name: options.pop(name) for name in ("mask_prob", "mask_prob_adjust", "mask_length")}
    return {"cfg": {"model": options | {"modalities": {options["modality"]: parts}}}, "model": model}, file


def released(kind, form="cfg", name=None):
    """A golden file in one of the forms of the released ones."""
    if kind in NAMES2:
        return released2(kind)[0]
    file = golden(name or NAMES[kind])
    model, ema = file["model"], file["ema"]
    if form == "half":
        model, ema = ({n: t.half() if "index" not in n else t for n, t in p.items()} for p in (model, ema))
    if form == "distributed":
        model, ema = ({f"module.{name}": tensor for name, tensor in part.items()} for part in (model, ema))
    if form == "sequence":  # as the released speech Base has its head
        model = {re.sub("^final_proj", "final_proj.0", name): tensor for name, tensor in model.items()}
    if form == "lm_head":  # of the first versions of text, beside RoBERTa's for words
        model = {name.replace("regression_head", "lm_head"): tensor for name, tensor in model.items()}
        model |= {"encoder.lm_head.weight": torch.zeros(3), "encoder.sentence_encoder.version": torch.ones(1)}
    if kind == "vision":
        return {"model": model, "epoch": 3, "args": argparse.Namespace(window=(14, 14)), "model_ema": ema}
    model = model | {"_ema" if kind == "speech" else "encoder._ema": ema}
    if form == "args":
        flat = {name: value for name, value in file["config"].items() if not isinstance(value, list)}
        return {"args": argparse.Namespace(**flat), "model": model}
    return {"args": None, "cfg": {"model": options(file)}, "model": model, "extra_state": {"epoch": 1}}


def write_gpt2_files(folder, size):
    """A vocabulary of so many ids without merges, in GPT-2's and fairseq's files."""
    letters = text.byte_letters().values()
    (folder / "encoder.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(size - 5)))


def config_of(state, **changes):
    """A Config of the script that trains such a model."""
    config_class = SCRIPTS[convert.modality(state["config"])].Config
    values = state["config"] | changes
    return config_class(**{f.name: values[f.name] for f in fields(config_class) if f.name in values})


def build(state, **changes):
    """The model of a state with random weights: a Student, or a classifier if it is fine-tuned."""
    kind, cfg = convert.modality(state["config"]), config_of(state, **changes)
    sizes = [len(state["student"]["encoder.embed.tokens.weight"])] if kind == "text" else []
    student = SCRIPTS[kind].build(cfg, *sizes)
    if "classes" not in state:
        return student
    more = {"pool_cls": state["config"].get("pool_cls", False)} if kind == "vision" else {}
    return HEADS[kind](student.encoder, len(state["classes"]), **more)


def model_of(state, **changes):
    """The same with its weights, in eval mode."""
    model = build(state, **changes)
    convert.load_encoder(model, state, "state", head=True)
    return model.eval()

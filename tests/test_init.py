"""--init of the scripts: released files and folders of transformers are taken as they are (finetune.py as a process of its own)."""

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import train_speech
import train_text
import train_vision
from data import images, text
from tests.helpers import call, done, refused
from tools import convert

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
FAST = "--steps 2 --workers 0 --dtype float32 --device cpu --log_every 1 --probe_every 0 --save_every 0".split()
SCRIPTS = {"vision": train_vision, "speech": train_speech, "text": train_text}
WORDS = (
    "the cat sat on the mat and then ran into the hat of that fat rat while the bat was at the other end of banana lane".split()
)


def run(script, *flags):
    """As a process of its own."""
    ended = subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def released(kind, folder):
    """A golden file as the released ones are, and for text the vocabulary beside it."""
    if kind == "vision":
        file, path = golden("vision"), folder / "checkpoint-799.pth"
        torch.save({"model": file["model"], "model_ema": file["ema"], "args": argparse.Namespace(target_layers="[1,2]")}, path)
        return path
    file, path = golden("audio_averaged_positions" if kind == "speech" else "text_tied"), folder / "base.pt"
    said = {name: value for name, value in file["config"].items() if isinstance(value, (int, float, str))}
    entry = {"_ema" if kind == "speech" else "encoder._ema": file["ema"]}
    torch.save({"model": file["model"] | entry, "cfg": {"model": said}, "args": None}, path)
    if kind == "text":
        size = len(file["model"]["encoder.sentence_encoder.embed_tokens.weight"])
        (folder / "encoder.json").write_text(json.dumps({letter: i for i, letter in enumerate(text.byte_letters().values())}))
        (folder / "vocab.bpe").write_text("#version: 0.2\n")
        (folder / "dict.txt").write_text(
            "".join(f"{i} 1\n" for i in [*range(65, 97), *range(0, 65), *range(97, 256)][: size - 5])
        )
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{(kind, form): path} of a released file and of a folder of transformers made of it."""
    pytest.importorskip("safetensors", reason="writes folders of transformers: pip install -r requirements-dev.txt")
    found = {}
    for kind in SCRIPTS:
        folder = tmp_path_factory.mktemp(kind)
        found[kind, "released"] = path = released(kind, folder)
        found[kind, "hub"] = folder / "hub"
        convert.hub.write(convert.read(path), found[kind, "hub"])
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "moods"
    folder.mkdir()
    lines = "".join(f"{' '.join(WORDS[i % 9 : i % 9 + 4])}\t{('no', 'yes')[i % 2]}\n" for i in range(16))
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + lines)
    return folder.parent


@pytest.mark.parametrize("form", ["released", "hub"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_finetuning_starts_from_it(files, task, tmp_path, kind, form):
    more = {
        "vision": ["--global_batch", 8],
        "speech": ["--preset", "speech_smoke", "--global_batch", 4, "--max_samples", 64_000],
        "text": ["--preset", "glue_small", "--data", task, "--task", "moods", "--global_batch", 8],
    }[kind]
    run("finetune.py", *more, *FAST, "--init", files[kind, form], "--out", tmp_path / "out", "--lr", 0, "--freeze_steps", 2)
    state, source = convert.read(tmp_path / "out" / "ckpt.pt"), convert.read(files[kind, form])
    assert state["config"].items() >= {k: v for k, v in source["config"].items() if k not in ("target", "image_width")}.items()
    for name, tensor in state["student"].items():  # nothing learned at --lr 0
        if name.startswith("encoder."):
            assert torch.equal(tensor, source["student"][name]), name


@pytest.mark.parametrize("form", ["released", "hub"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_pre_training_goes_on_from_it(files, tmp_path, kind, form):
    source, script = convert.read(files[kind, form]), SCRIPTS[kind]
    flags = []
    for field in fields(script.Config):
        if (value := source["config"].get(field.name)) not in (None, []):
            flags += [f"--{field.name}", *(value if isinstance(value, list) else [value])]
    if kind == "text":
        (tmp_path / "text.txt").write_text(f"{' '.join(WORDS)}\n\n" * 40)
        vocab = files[kind, form] if form == "hub" else files[kind, form].parent
        text.prepare([str(tmp_path / "text.txt")], str(tmp_path / "corpus"), vocab=str(vocab), show=False)
    more = {
        "vision": "--global_batch 4 --probe_images 40 --eval_images 10".split(),
        "speech": "--global_batch 4 --max_samples 64000 --max_seconds 4 --probe_utterances 4 --eval_utterances 4".split(),
        "text": ["--data", tmp_path / "corpus", *"--global_batch 4 --probe_blocks 8 --eval_blocks 4".split()],
    }[kind]
    still = ["--lr", 0, "--tau_0", 1, "--tau_e", 1, "--guard_after", -1, "--weight_decay", 0]
    done(call(script, *flags, *more, *FAST, *still, "--init", files[kind, form], "--out", tmp_path / "out"))
    state = convert.read(tmp_path / "out" / "ckpt.pt")
    for name, tensor in source["student"].items():
        assert torch.equal(state["student"][name], tensor), name
    if form == "released":
        for name, tensor in source["teacher"].items():
            assert torch.equal(state["teacher"][name], tensor), name


@pytest.mark.parametrize("pool", ["mean", "class token"])
@pytest.mark.parametrize("form", ["released", "hub"])
def test_a_fine_tuned_file_classifies_as_it_is(files, tmp_path, form, pool):
    file = golden("vision_finetune")
    if pool == "class token":
        file["model"] = {name.replace("fc_norm", "norm"): tensor for name, tensor in file["model"].items()}
    path = tmp_path / "tuned.pth"
    torch.save({"module": file["model"]}, path)
    if form == "hub":
        convert.hub.write(convert.read(path), path := tmp_path / "hub")
    Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)).save(
        picture := tmp_path / "photo.png"
    )
    out = done(call(finetune, "--init", path, "--predict", picture, "--device", "cpu", "--dtype", "float32"))
    state = convert.read(path)
    model = convert.build(state).eval()
    convert.load_into(model, state["student"], path)
    with torch.no_grad():
        best = model(images.normalise(images.to_tensor(Image.open(picture)))[None]).argmax().item()
    assert state["classes"][best] in out.split("photo.png")[1]


def test_what_finetune_cannot_score_is_one_line(files, tmp_path):
    state = convert.read(files["speech", "released"])
    state |= {"classes": ["a", "b"], "goal": "clips", "teacher": None}
    state["student"] = {name: tensor for name, tensor in state["student"].items() if name.startswith("encoder.")}
    state["student"] |= {"out.weight": torch.randn(2, state["config"]["dim"]), "out.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "clips.pt")
    assert "clips" in refused(call(finetune, "--init", tmp_path / "clips.pt", "--predict", "a.wav"))


def test_a_model_of_another_kind_is_one_line(files, tmp_path):
    source = convert.read(files["speech", "released"])["config"]
    flags = [x for name in ("heads", "norm_eps", "dim") for x in (f"--{name}", source[name])]
    more = "--global_batch 4 --probe_images 40 --eval_images 10".split()
    code, _, error = call(train_vision, *flags, *more, *FAST, "--init", files["speech", "released"], "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and "not a model of images" in error, error


def test_a_model_of_another_kind_is_one_line_for_speech_too(files, tmp_path):
    more = "--global_batch 4 --max_samples 64000 --max_seconds 4".split()
    code, _, error = call(train_speech, *more, *FAST, "--init", files["vision", "released"], "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and "not a model of recordings" in error, error

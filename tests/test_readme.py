"""Every command of the README is run: here with small data and few steps, or by the test named beside it."""

import glob
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data import audio, synthetic
from tests import checkpoints, test_letters
from tools import probes

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
LOOP = r"for (\w+) in (\S+) .*; do (.*); done"  # one value is enough
COMMANDS = [
    re.sub(LOOP, lambda loop: loop[3].replace(f"${loop[1]}", loop[2]), line.split("&&")[-1].strip())
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
BRIEF = "--steps 2 --workers 0 --dtype float32 --device cpu --log_every 1 --probe_every 0"
SMALL = "--dim 16 --depth 2 --heads 2 --ffn 32 --top_k 2 --guard_after -1"
VIT = "--dim 32 --heads 2 --ffn 64 --depth 6 --image_size 64 --global_batch 4 --micro_batch 0"
SPEECH = f"{BRIEF} {SMALL} --channels 8 --pos_width 15 --min_seconds 0"
ELSEWHERE = {  # commands that another test runs
    "pytest": "CI, which calls it",
    "python -m data.images": "tests/test_images.py, against a server on localhost",
    "python -m data.audio": "tests/test_audio.py, against a server on localhost",
}
EXTRA = [  # the first pattern that matches a command says what is added to make it small
    (r"train_vision.py .*--help", ""),
    (r"tools.bench", f"--updates 1 --rounds 1 -- {BRIEF} --global_batch 8"),
    (r"tools.ablate", f"{BRIEF} --data cifar10 --global_batch 8 --guard_after -1"),
    (r"train_vision.py --preset (base|large|large_phase2)", f"{BRIEF} {VIT}"),
    (r"train_vision.py", f"{BRIEF} --global_batch 8 --guard_after -1"),
    (r"train_speech.py --preset (base|audioset)", f"{SPEECH} --max_samples 480000 --batch_seconds 30"),
    (r"train_speech.py", f"{SPEECH} --max_seconds 4 --max_samples 64000 --batch_seconds 8"),
    (r"train_text.py", f"{BRIEF} {SMALL} --max_tokens 32 --global_batch 4 --micro_batch 0"),
    (r"finetune.py .*--(eval_only|predict)", "--workers 0"),
    (r"finetune.py --preset glue", f"{BRIEF} --global_batch 4"),
    (
        r"finetune.py --preset (digits|speech_smoke|10h|100h|audioset)",
        f"{BRIEF} --max_seconds 10 --max_samples 160000 --batch_seconds 10",
    ),
    (r"finetune.py", f"{BRIEF} --global_batch 8 --micro_batch 0"),
    (r"-m (tools|data)\.", ""),
]


def test_the_readme_is_short_and_names_every_file():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000
    assert all(path.name in text for path in ROOT.glob("*.py"))


def test_commands_are_found():
    assert len(COMMANDS) >= 10 and "python train_vision.py" in COMMANDS


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with the data that the README names; its commands leave their runs there."""
    home = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "assets", home / "assets")
    (home / "train_vision.py").symlink_to(ROOT / "train_vision.py")
    rng = np.random.default_rng(0)
    for folder, classes in (("cifar10", ("cat", "dog")), ("IMAGENET", ("n01440764", "n01443537"))):
        for split, count in (("train", 24), ("val", 6)):
            for c in classes:
                (home / folder / split / c).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(home / folder / split / c / f"{i:05d}.png")
    (waves, transcripts), _ = synthetic.speech(n_train=8, n_valid=1)
    libri = "LIBRISPEECH/LibriSpeech"
    places = ("digits/train", "digits/dev", "digits/test", f"{libri}/train-clean-100", f"{libri}/dev-clean")
    for folder in places:
        chapter = home / folder / "9001" / "900131"
        chapter.mkdir(parents=True)
        for i, (wave, text) in enumerate(zip(waves, transcripts)):
            soundfile.write(chapter / f"9001-900131-{i:04d}.flac", wave, audio.RATE)
            with open(chapter / "9001-900131.trans.txt", "a") as file:
                file.write(f"9001-900131-{i:04d} {text}\n")
    (home / "books.txt").write_text(
        "".join(f"On day {i} the cat sat on mat {i % 7}.\nIt was {i} o'clock.\n\n" for i in range(300))
    )
    rows = [f"src\t{i % 2}\t\tthe {('dull', 'fine')[i % 2]} film {i}" for i in range(20)]
    for task, header, columns in (("SST-2", ["sentence\tlabel"], (3, 1)), ("CoLA", [], (0, 1, 2, 3))):
        (home / "GLUE" / task).mkdir(parents=True)
        for split in ("train", "dev"):
            lines = header + ["\t".join(row.split("\t")[c] for c in columns) for row in rows]
            (home / "GLUE" / task / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (home / "SOUNDS").mkdir()
    (home / "SOUNDS" / "classes.txt").write_text("bark\nrain\nsiren\n")
    for i, wave in enumerate(waves):
        soundfile.write(home / "SOUNDS" / f"{i}.flac", wave, audio.RATE)
        with open(home / "SOUNDS" / ("valid.csv" if i < 3 else "train.csv"), "a") as file:
            file.write(f"{i}.flac,{('bark', 'rain', 'bark;siren')[i % 3]}\n")
    torch.save(checkpoints.released("speech"), home / "audio_base_ls.pt")
    (home / "4-gram.arpa").write_text(test_letters.TINY)
    return home


@pytest.mark.parametrize("command", COMMANDS)  # in the order of the README: later commands use earlier runs
def test_command(command, newcomer, monkeypatch, capsys):
    for start, where in ELSEWHERE.items():
        if command.startswith(start):
            pytest.skip(f"run by {where}")
    if command.endswith("-hub"):
        pytest.importorskip(
            "safetensors", reason="a folder of transformers takes safetensors (requirements-dev.txt)"
        )
    if re.match("python -m tools.(plot|draw|ablate)", command):
        pytest.importorskip("matplotlib", reason="requirements-dev.txt")
    extra = next((extra for pattern, extra in EXTRA if re.search(pattern, command)), None)
    assert extra is not None, f"the README has a command that nothing runs: {command}"
    words = shlex.split(re.sub(r"^(python|torchrun --nproc_per_node=\d+) ", "", command)) + shlex.split(extra)
    monkeypatch.chdir(newcomer)
    monkeypatch.setattr(synthetic.speech, "__defaults__", (0, 12, 4, 2, 20))  # small
    monkeypatch.setattr(probes, "fit_ctc", partial(probes.fit_ctc, steps=20))
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    script = ROOT / words.pop(1).replace(".", "/") if words[0] == "-m" else ROOT / words[0]
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    try:
        runpy.run_path(str(script.with_suffix(".py")), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    err = capsys.readouterr().err
    assert status == 0, err[-2000:]

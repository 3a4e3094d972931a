"""finetune.py on recordings: letters by CTC and sound events, from a file, from scratch, frozen, killed, split, asked, misled."""

import contextlib
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import common
import finetune
import train_speech
from data import audio, letters
from tests import helpers
from tests.helpers import assert_same, call, checkpoint, done, ended, kill, launch, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(finetune.__file__)
MODEL = dict(channels=8, dim=16, depth=2, heads=2, ffn=32, pos_groups=2, pos_width=15, top_k=2)
CLASSES = ["has S", "has M", "low, slow voice", "has K"]
PRETRAIN = """--steps 2 --global_batch 8 --max_samples 64000 --max_seconds 4 --workers 0 --probe_every 0 --eval_utterances 2 --lr 0.02 --warmup 0 --tau_0 0.5 --tau_e 0.5 --share_positions false --guard_after -1 --dtype float32
    --device cpu""".split()
TINY = """--preset speech_smoke --steps 4 --global_batch 8 --max_samples 64000 --max_seconds 4 --label_fraction 1 --mask_p 0.3
    --channel_p 0.2 --channel_span 4 --ffn_dropout 0 --lr 0.01 --log_every 1 --dtype float32 --device cpu""".split()
PLAIN = "--mask_p 0 --channel_p 0".split()
STILL = "--steps 1 --lr 0".split()  # one step that moves nothing shows what was loaded
ALONE = "--max_seconds 0.1 --max_samples 1600".split()  # evaluates one recording after the other, without padding


def options(*flags):
    """A step of 2 micro-batches, and later flags that win; a resumed run has its options from its own config.json."""
    return [str(flag) for flag in (flags if "--resume" in flags else [*TINY, *flags])]


def tune(*flags):
    return call(finetune, *options(*flags))


refused = partial(helpers.refused, by="finetune.py: ")


def write(folder, waves, transcripts, speakers):
    """LibriSpeech's layout: folder/SPEAKER/7/SPEAKER-7-NNNN.wav, SPEAKER-7.trans.txt -> paths."""
    paths = []
    for i, (wave, text, speaker) in enumerate(zip(waves, transcripts, speakers)):
        stem = f"{speaker[-1]}-7-{i:04}"
        paths.append(folder / speaker[-1] / "7" / f"{stem}.wav")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(paths[-1], wave, audio.RATE)
        with open(paths[-1].parent / f"{speaker[-1]}-7.trans.txt", "a") as file:
            file.write(f"{stem} {text}\n")
    return paths


def silence(path):
    """A recording that no scan of headers finds out, only its loading."""
    soundfile.write(path, np.zeros(soundfile.info(path).frames), audio.RATE)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """24 training and 9 held-out utterances in train/ and dev/, and the same as clips with events."""
    root = tmp_path_factory.mktemp("speech")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for name, table, part in zip(("train", "dev"), ("train", "valid"), audio.made_speech(n_train=24, n_valid=9)):
        lines = []
        for path, text, speaker in zip(write(root / name, part.waves, part.transcripts, part.speakers), part.transcripts, part.speakers):
            events = [event for event in CLASSES if event[-1] in text or event == CLASSES[2] and speaker[-1] in "0246"]
            lines.append(f'{path.relative_to(root)},"{";".join(events or CLASSES[:1])}"')
        (root / f"{table}.csv").write_text("path,labels\n" + "\n".join(lines))
    return root


@pytest.fixture(scope="module")
def held_out(speech):
    return audio.open_folder(speech, show=False)[1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, speech):
    """A checkpoint of train_speech.py whose student and teacher differ in every tensor that is averaged."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    waves = shutil.copytree(speech, out.with_name("waves"), ignore=shutil.ignore_patterns("*.txt"))  # no transcripts, no probe
    model = [str(word) for name, value in MODEL.items() for word in (f"--{name}", value)]
    done(call(train_speech, *PRETRAIN, *model, "--data", waves, "--out", out))
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, speech, pretrained):
    """A run on letters -> its folder, stdout. Tests that go on from it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "letters"
    flags = "--steps 20 --log_every 5 --probe_every 5 --clip 3".split()
    return out, done(tune("--data", speech, "--init", pretrained, *flags, "--out", out))


@pytest.fixture(scope="module")
def heard(tmp_path_factory, speech, pretrained):
    """A run on sound events -> its folder, stdout."""
    out = tmp_path_factory.mktemp("runs") / "sounds"
    flags = "--goal sounds --mixup 0.5 --steps 12 --log_every 4 --probe_every 4 --head_lr 0.02".split()
    return out, done(tune("--data", speech, "--init", pretrained, *flags, "--out", out))


@pytest.fixture
def tiny(monkeypatch):
    """--init none --model tiny"""
    monkeypatch.setitem(train_speech.PRESETS, "tiny", MODEL)
    return "--init", "none", "--model", "tiny"


def network(path, **options):
    """The recogniser of a fine-tuned file: wave -> logits (T, classes)."""
    recogniser = finetune.build(finetune.Config(**{"goal": "letters", "init": str(path)} | options))[0].eval()

    def listen(wave):
        with torch.no_grad():
            return recogniser(torch.from_numpy(wave)[None])[0][0]

    return listen


# ---- a run and its folder ------------------------------------------------------------------------------------------


def test_a_run_on_letters_leaves_metrics_two_checkpoints_and_results(finished, held_out):
    folder, out = finished
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "results.json"}
    lines, numbers = rows(folder), results(folder)
    assert [row["step"] for row in lines] == [1, 5, 10, 15, 20] and [row["step"] for row in lines if "wer" in row] == [5, 10, 15, 20]
    assert all(math.isfinite(value) for row in lines for value in row.values())
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    rates = {row["step"]: row["wer"] for row in lines if "wer" in row}
    assert numbers["wer"] == rates[20] and numbers["best_wer"] == min(rates.values()) == rates[numbers["best_step"]]
    assert numbers["words"] == sum(len(text.split()) for text in held_out.transcripts)
    assert numbers["wer"] == pytest.approx((numbers["substitutions"] + numbers["deletions"] + numbers["insertions"]) / numbers["words"])
    assert numbers.keys() >= {"cer", "best_cer", "seconds", "peak_memory_gb", "final_loss"}
    assert numbers["utterances"] == 24 and numbers["skipped_files"] == 0 and "24 labelled utterances" in out
    state, best = checkpoint(folder), checkpoint(folder, "best.pt")
    assert state["goal"] == best["goal"] == "letters" and state["classes"] == best["classes"] == letters.LETTERS
    assert best["step"] == numbers["best_step"] and "optimizer" not in best and state["config"]["channels"] == 8


def test_a_run_on_sounds_does_too(heard):
    folder, out = heard
    numbers, lines = results(folder), rows(folder)
    scores = {row["step"]: row["map"] for row in lines if "map" in row}
    assert list(scores) == [4, 8, 12] and all(0 < score <= 1 for score in scores.values())
    assert numbers["map"] == scores[12] and numbers["best_map"] == max(scores.values()) == scores[numbers["best_step"]]
    assert numbers["clips"] == 24 and "24 labelled clips" in out and "wer" not in numbers
    state = checkpoint(folder)
    assert state["goal"] == "sounds" and state["classes"] == CLASSES and state["student"]["out.weight"].shape == (4, 16)


def test_resuming_a_finished_run_is_harmless(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    done(tune("--out", folder, "--resume"))
    assert_same(checkpoint(folder), checkpoint(finished[0]))
    kept = results(folder).keys() - {"peak_memory_gb"}
    assert {name: results(folder)[name] for name in kept} == {name: results(finished[0])[name] for name in kept}


def test_made_speech_needs_no_data(monkeypatch, pretrained, tmp_path):
    monkeypatch.setattr(audio, "made_speech", lambda real=audio.made_speech: real(n_train=6, n_valid=2))
    done(tune("--init", pretrained, "--steps", 2, "--out", tmp_path / "run"))
    assert results(tmp_path / "run")["utterances"] == 6
    assert "--data" in refused(tune("--init", pretrained, "--goal", "sounds", "--out", tmp_path / "other"))


# ---- the loss ------------------------------------------------------------------------------------------------------


def naive_ctc(log_probs, text):
    """-log of the probabilities of all alignments, summed one by one frame (Graves et al. 2006, section 4.1)."""
    states = [0] + [state for letter in text for state in (letter, 0)]  # blanks around every letter
    alpha = {0: log_probs[0][0], 1: log_probs[0][states[1]]}
    for frame in log_probs[1:]:
        new = {}
        for s, symbol in enumerate(states):
            before = [s, s - 1] + [s - 2] * (symbol != 0 and s >= 2 and states[s - 2] != symbol)
            ways = [alpha[b] for b in before if b in alpha]
            if ways:
                new[s] = frame[symbol] + max(ways) + math.log(sum(math.exp(way - max(ways)) for way in ways))
        alpha = new
    ways = [alpha[s] for s in (len(states) - 1, len(states) - 2)]
    return -(max(ways) + math.log(sum(math.exp(way - max(ways)) for way in ways)))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Four utterances of one second: padding plays no part, and any two of them fill a micro-batch of 32,000 samples."""
    root, part = tmp_path_factory.mktemp("even"), audio.made_speech(n_train=4, n_valid=1)[0]
    texts = ["SO", "ME LU", "KA", "NEIRA"]
    paths = write(root / "train", [wave[:16_000] for wave in part.waves], texts, part.speakers)
    (held_out,) = write(root / "dev", [part.waves[0]], texts, part.speakers)
    (root / "classes.txt").write_text("a\nb\nc\n")
    (root / "train.csv").write_text("\n".join(f"{path.relative_to(root)},{e}" for path, e in zip(paths, ("a", "a;c", "b", "b;a;c"))))
    (root / "valid.csv").write_text(f"{held_out.relative_to(root)},b")
    return root, [audio.normalise(audio.load_audio(path)) for path in paths], [letters.encode(text) for text in texts]


def expected_letters(listen, waves, texts):
    losses = [naive_ctc(listen(wave).double().log_softmax(-1).tolist(), text) for wave, text in zip(waves, texts)]
    return sum(losses) / sum(map(len, texts))


def expected_sounds(listen, waves, _):
    total = 0.0
    for wave, truth in zip(waves, ((1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1))):
        for column, y in zip(listen(wave).double().sigmoid().T.tolist(), truth):
            p = sum(v * v for v in column) / sum(column)  # linear softmax over frames
            total -= math.log(p if y else 1 - p) / 3
    return total / 4


@pytest.mark.parametrize("goal, expected", [("letters", expected_letters), ("sounds", expected_sounds)])
def test_the_loss_is_a_mean_over_the_global_batch_however_it_is_split(even, pretrained, tmp_path, goal, expected):
    root, waves, texts = even
    for name, samples in (("one", 64_000), ("two", 32_000)):
        flags = "--goal", goal, "--global_batch", 4, "--max_samples", samples, "--max_seconds", 2, *PLAIN, "--steps", 2
        done(tune("--data", root, "--init", pretrained, *flags, "--out", tmp_path / name))
    done(tune("--data", root, "--init", pretrained, "--goal", goal, *PLAIN, *STILL, "--out", tmp_path / "start"))
    listen = network(tmp_path / "start/ckpt.pt", goal=goal)
    for name in ("one", "two"):
        assert rows(tmp_path / name)[0]["loss"] == pytest.approx(expected(listen, waves, texts), rel=1e-5)
    assert rows(tmp_path / "one")[1]["loss"] == pytest.approx(rows(tmp_path / "two")[1]["loss"], rel=1e-4)


def test_mixed_clips_are_as_long_as_the_longer_and_hold_both_events():
    samples, y, rng = torch.tensor([5, 9, 7, 3]), torch.eye(4), np.random.default_rng(0)
    x = torch.arange(1.0, 5)[:, None] * (torch.arange(9) < samples[:, None])
    kept = []
    for _ in range(300):
        mixed, lengths, truth = audio.mix(x, samples, y, 0.7, rng)
        torch.testing.assert_close(mixed, truth @ x)
        torch.testing.assert_close(truth.sum(1), torch.ones(4))
        for n, row in zip(lengths.tolist(), truth):
            assert n == samples[row > 0].max() and lengths.max() == 9
        kept += [row[i].item() for i, row in enumerate(truth)]
    assert np.mean(np.array(kept) == 1) == pytest.approx(0.3 + 0.7 / 4, abs=0.05), "0.3 alone, and 1 in 4 is mixed with itself"
    assert all(torch.equal(a, b) for a, b in zip(audio.mix(x, samples, y, 0.0, rng), (x, samples, y)))


def test_spans_of_frames_and_channels_are_hidden_in_training_alone(monkeypatch, speech, pretrained, tmp_path):
    masks = []

    def forward(self, waves, samples=None, mask=None, channels=None, real=finetune.Recogniser.forward):
        masks.append((self.training, self.encoder.embed.frames(samples), mask, channels))
        return real(self, waves, samples, mask, channels)

    monkeypatch.setattr(finetune.Recogniser, "forward", forward)
    done(tune("--data", speech, "--init", pretrained, "--mask_p", 0.5, "--mask_span", 3, "--channel_p", 0.25, "--out", tmp_path / "run"))
    assert [m[0] for m in masks].count(True) == 8, "4 steps of 2 micro-batches"
    for training, frames, mask, channels in masks:
        if not training:
            assert mask is channels is None
            continue
        assert mask.shape == (len(frames), frames.max()) and channels.shape == (len(frames), 16)
        beyond = torch.arange(mask.shape[1]) >= frames[:, None]
        assert not mask[beyond].any() and 0.2 < mask[~beyond].float().mean() < 0.55 and 0 < channels.float().mean() < 0.5
    first, second = [m[2] for m in masks if m[0]][:2]
    assert first.shape != second.shape or not torch.equal(first, second)


# ---- what is loaded, what moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_a_run_starts_from_the_encoder_asked_for(speech, pretrained, tmp_path, source):
    done(tune("--data", speech, "--init", pretrained, "--init_from", source, *STILL, "--out", tmp_path / "run"))
    ours, file = checkpoint(tmp_path / "run")["student"], checkpoint(pretrained.parent)
    encoder = {name: tensor for name, tensor in file[source].items() if name.startswith("encoder.")}
    assert ours.keys() - encoder.keys() == {"out.weight", "out.bias"}
    assert_same({name: ours[name] for name in encoder}, encoder)
    differ = [name for name in encoder if not torch.equal(file["student"][name], file["teacher"][name])]
    assert all(name in differ for name in encoder if "blocks" in name or "positions" in name)


def test_random_weights_train_whole_from_the_first_step(speech, tiny, tmp_path):
    done(tune("--data", speech, *tiny, "--freeze_steps", 9, "--freeze_convs", "--steps", 1, "--out", tmp_path / "run"))
    torch.manual_seed(0)
    before = finetune.build(finetune.Config(goal="letters", model="tiny"), letters.LETTERS)[0].state_dict()
    after = checkpoint(tmp_path / "run")["student"]
    assert [name for name in after if torch.equal(after[name], before[name])] == []


def test_random_weights_of_a_files_sizes_are_never_frozen(speech, pretrained, tmp_path):
    flags = "--init_from random --freeze_steps 9 --freeze_convs true --steps 1 --save_every 1".split()
    done(tune("--data", speech, "--init", pretrained, *flags, "--out", tmp_path / "run"))
    torch.manual_seed(0)
    before = finetune.build(finetune.Config(goal="letters", init=str(pretrained), init_from="random"), letters.LETTERS)[0].state_dict()
    after = checkpoint(tmp_path / "run")["student"]
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    done(tune("--out", tmp_path / "run", "--resume", "--steps", 2))
    later = checkpoint(tmp_path / "run")["student"]
    assert [name for name in after if torch.equal(after[name], later[name])] == []


def test_an_utterance_too_short_for_its_letters_is_named(speech, pretrained, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    chapter = data / "train/0/7"
    soundfile.write(chapter / "0-7-9999.wav", np.random.default_rng(0).normal(0, 0.1, 400 + 4 * 320), audio.RATE)  # 5 frames
    soundfile.write(chapter / "0-7-9998.wav", np.random.default_rng(0).normal(0, 0.1, 400 + 4 * 320), audio.RATE)
    with open(chapter / "0-7.trans.txt", "a") as file:
        file.write("0-7-9999 SEEN\n0-7-9998 SEND\n")  # S E _ E N | takes 6 frames, S E N D | takes 5
    call(finetune, *options("--data", data, "--init", pretrained, "--steps", 1, "--out", tmp_path / "run"))
    skipped = checkpoint(tmp_path / "run")["bad"]
    assert [Path(line.split(": ")[0]).name for line in skipped if "too short for its transcript" in line] == ["0-7-9999.wav"]


def test_the_encoder_is_frozen_for_a_while_and_the_convolutions_for_good(speech, pretrained, tmp_path):
    flags = "--freeze_steps 2 --freeze_convs true --steps 2 --weight_decay 0.1 --layer_drop 0.2".split()
    done(tune("--data", speech, "--init", pretrained, *flags, "--out", tmp_path / "run"))
    start, frozen = checkpoint(pretrained.parent)["student"], checkpoint(tmp_path / "run")["student"]
    encoder = [name for name in frozen if name.startswith("encoder.")]
    assert_same({name: frozen[name] for name in encoder}, {name: start[name] for name in encoder})
    head = finetune.build(seeded(init=str(pretrained), goal="letters"), letters.LETTERS)[0].out
    assert not torch.equal(frozen["out.weight"], head.weight) and not torch.equal(frozen["out.bias"], head.bias)
    done(tune("--out", tmp_path / "run", "--resume", "--steps", 4, "--layer_drop", 0))
    after = checkpoint(tmp_path / "run")["student"]
    still = {name for name in encoder if torch.equal(after[name], start[name])}
    assert still == {name for name in encoder if ".convs." in name or ".norms." in name}


def seeded(**options):
    torch.manual_seed(0)
    return finetune.Config(**options)


def test_the_head_has_a_rate_of_its_own(monkeypatch, speech, pretrained, tmp_path):
    made = {}

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["groups"] = self.param_groups

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    flags = "--steps 1 --lr 3e-5 --head_lr 2e-4 --weight_decay 0.1".split()
    done(tune("--data", speech, "--init", pretrained, *flags, "--out", tmp_path / "run"))
    rates = {tuple(p.shape): (group["lr"], group["weight_decay"]) for group in made["groups"] for p in group["params"]}
    assert rates[29, 16] == pytest.approx((0.05 * 2e-4, 0.1)) and rates[29,] == pytest.approx((0.05 * 2e-4, 0)), "the last step"
    assert rates[32, 16] == rates[8, 1, 10] == pytest.approx((0.05 * 3e-5, 0.1))


def test_a_finetuned_file_keeps_its_head_for_the_same_goal_alone(finished, heard):
    weights = checkpoint(finished[0], "best.pt")["student"]
    head = {"out.weight", "out.bias"}
    for goal, kept in (("letters", weights.keys()), ("sounds", weights.keys() - head)):  # 29 sounds, named as the letters
        cfg = finetune.Config(init=str(finished[0] / "best.pt"), goal=goal)
        recogniser, _, classes = finetune.build(cfg, letters.LETTERS)
        assert classes == letters.LETTERS
        assert {name for name, tensor in recogniser.state_dict().items() if torch.equal(tensor, weights[name])} == kept
    cfg = finetune.Config(init=str(heard[0] / "best.pt"), goal="sounds")
    assert finetune.build(cfg, sorted(CLASSES))[2] == CLASSES, "the file's order: its head's"


def test_a_model_of_another_modality_is_one_line(pretrained, speech, held_out, tmp_path):  # held_out: lengths are cached
    torch.save({"student": {"encoder.embed.cls": torch.zeros(4)}, "teacher": None, "config": {"patch": 4}}, tmp_path / "vision.pt")
    flags = "--data", speech, "--out", tmp_path / "run"
    assert "vision.pt: not a model of recordings" in refused(tune(*flags, "--init", tmp_path / "vision.pt"))
    line = refused(call(finetune, "--init", pretrained, "--data", speech, "--out", tmp_path / "run"))
    assert f"{pretrained}: not a model of images" in line and "--preset" in line
    state = checkpoint(pretrained.parent)
    torch.save(state | {"teacher": None}, tmp_path / "alone.pt")
    assert "teacher" in refused(tune(*flags, "--init", tmp_path / "alone.pt", "--init_from", "teacher"))
    assert not (tmp_path / "run").exists()


# ---- a part of the labels, data with faults --------------------------------------------------------------------------


def test_a_fraction_is_the_same_utterances_whatever_the_start(monkeypatch, speech, pretrained, finished, tiny, tmp_path):
    seen = set()

    def load(self, i, real=audio.Utterances.load):
        seen.add(self.names[i])
        return real(self, i)

    monkeypatch.setattr(audio.Utterances, "load", load)
    drawn = []
    starts = ["--init", pretrained], tiny, ["--init", finished[0] / "best.pt"], [*tiny, "--seed", 1]
    for i, start in enumerate(starts):
        seen.clear()
        flags = "--label_fraction", 0.25, "--steps", 2, "--global_batch", 16
        done(tune("--data", speech, *flags, *start, "--out", tmp_path / f"{i}"))
        drawn.append({name for name in seen if "/train/" in name})
        assert len(drawn[-1]) == 6 == results(tmp_path / f"{i}")["utterances"]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_utterances_that_cannot_be_used_are_named_counted_and_left_out(speech, held_out, pretrained, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    odd = [data / "train/0/7" / name for name in ("0-7-0000.wav", "0-7-0008.wav", "0-7-0016.wav")]
    table = odd[0].with_name("0-7.trans.txt")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0].split()[0] + " 5 & MORE", *lines[2:]]))  # digits; no transcript
    wave, _ = soundfile.read(odd[2])
    soundfile.write(odd[2], np.tile(wave, 5), audio.RATE)
    long = data / "dev/1/7/1-7-0001.wav"  # held out: measured all the same
    wave, _ = soundfile.read(long)
    soundfile.write(long, np.tile(wave, 5), audio.RATE)
    short = data / "train/1/7/1-7-0001.wav"  # too short to say its transcript
    soundfile.write(short, audio.load_audio(short)[:800], audio.RATE)
    _, out, err = result = tune("--data", data, "--init", pretrained, "--out", tmp_path / "run")
    done(result)
    whys = "cannot spell &5", "no transcript", "longer than --max_seconds", "too short for its transcript"
    for path, why in zip([*odd, short], whys, strict=True):
        assert (out + err).count(path.name) == 1 and f"skipped {path}: {why}" in out + err
    numbers = results(tmp_path / "run")
    assert (numbers["utterances"], numbers["skipped_files"]) == (20, 4)
    assert numbers["words"] == sum(len(text.split()) for text in held_out.transcripts)
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))


def test_no_transcripts_at_all_is_one_line(speech, pretrained, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    for path in (data / "dev").rglob("*.trans.txt"):
        path.unlink()
    line = refused(tune("--data", data, "--init", pretrained, "--out", tmp_path / "run"))
    assert "no transcript" in line and "dev/" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("goal", ["letters", "sounds"])
def test_a_damaged_recording_is_named_once_and_no_other_is_measured_in_its_stead(speech, held_out, pretrained, tmp_path, goal):
    data = shutil.copytree(speech, tmp_path / "data")
    silence(data / "train/3/7/3-7-0003.wav")
    silence(data / "dev/2/7/2-7-0002.wav")
    flags = "--goal", goal, "--steps", 12, "--probe_every", 4
    _, out, err = result = tune("--data", data, "--init", pretrained, *flags, "--out", tmp_path / "run")
    done(result)
    for name in ("3-7-0003.wav: silent", "2-7-0002.wav: silent"):
        assert (out + err).count(name) == 1
    assert results(tmp_path / "run")["skipped_files"] == 2
    flags = "--data", data, "--init", tmp_path / "run/ckpt.pt", "--eval_only", *ALONE, "--out", tmp_path / "eval"
    printed = done(tune(*flags))
    assert printed.count("2-7-0002.wav: silent") == 1 and results(tmp_path / "eval")["skipped_files"] == 1
    kept = [i for i, name in enumerate(held_out.names) if "2-7-0002" not in name]
    if goal == "letters":
        words = sum(len(held_out.transcripts[i].split()) for i in kept)
        assert results(tmp_path / "run")["words"] == results(tmp_path / "eval")["words"] == words
    else:
        assert results(tmp_path / "eval")["map"] == pytest.approx(naive_map(tmp_path / "run/ckpt.pt", data), abs=1e-6)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_recordings_that_are_all_damaged_are_one_line(speech, pretrained, tmp_path, split):
    data = shutil.copytree(speech, tmp_path / "data")
    for path in (data / split).rglob("*.wav"):
        silence(path)
    code, _, err = tune("--data", data, "--init", pretrained, "--steps", 1, "--out", tmp_path / "run")
    assert code == 2 and "silent" in err.splitlines()[-1] and "Traceback" not in err, err


# ---- evaluate and predict ------------------------------------------------------------------------------------------


def naive_map(path, root):
    """Mean average precision of the held-out clips that can be read, one clip and one class at a time."""
    classes, _, valid = audio.open_events(root, show=False)
    listen, column, frames, values = network(path, goal="sounds"), checkpoint(path.parent, path.name)["classes"], {}, []
    for i in range(len(valid)):
        with contextlib.suppress(audio.BadAudio):
            frames[i] = listen(valid.load(i)).sigmoid()
    for name in classes:
        p = {i: (y := frames[i][:, column.index(name)]).square().sum().item() / y.sum().item() for i in frames}
        hits = [name in valid.transcripts[i].split(";") for i in sorted(frames, key=lambda i: -p[i])]
        if any(hits):
            values.append(np.mean([sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit]))
    return np.mean(values)


def guesses(path, utterances):
    listen = network(path, goal="letters")
    return [letters.decode_greedy(listen(utterances.load(i)))[0] for i in range(len(utterances))]


@pytest.fixture(scope="module")
def early(tmp_path_factory, speech, pretrained):
    """Letters after two steps, when the model still says many of them -> its checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "early"
    done(tune("--data", speech, "--init", pretrained, "--steps", 2, "--lr", 1e-3, "--out", out))
    return out / "ckpt.pt"


def test_eval_only_knows_the_goal_and_measures_what_the_model_says(early, speech, held_out, tmp_path):
    printed = done(call(finetune, "--data", speech, "--init", early, "--eval_only", *ALONE, "--dtype", "float32", "--out", tmp_path / "run"))
    pairs = list(zip(held_out.transcripts, guesses(early, held_out)))
    numbers, expected = results(tmp_path / "run"), letters.wer(pairs)
    assert numbers["substitutions"] > 0, "a model that says something"
    assert {name: numbers[name] for name in expected._fields} == expected._asdict()
    assert numbers["wer"] == expected.rate and numbers["cer"] == letters.cer(pairs).rate and f"wer {expected.rate:.4f}" in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "results.json"}


def test_eval_only_gives_the_rate_of_the_run_again(finished, speech, tmp_path):
    for name, key in (("ckpt.pt", "cer"), ("best.pt", "best_cer")):
        done(tune("--data", speech, "--init", finished[0] / name, "--eval_only", "--out", tmp_path / name))
        assert results(tmp_path / name)["cer"] == results(finished[0])[key]


def test_eval_only_of_a_split_needs_no_training_part(early, heard, speech, held_out, tmp_path):
    for split in ("dev", "train"):
        data = tmp_path / f"only-{split}"
        shutil.copytree(speech / split, data / "test-other")
        flags = "--data", data, "--valid", "test-other", "--eval_only", "--out", tmp_path / split
        done(tune(*flags, "--init", early))
        words = sum(len(path.read_text().split()) for path in data.rglob("*.trans.txt")) - len(list(data.rglob("*.wav")))
        assert results(tmp_path / split)["words"] == words
    for name in ("clips", "classes.txt", "test.csv"):
        source = {"clips": "dev", "test.csv": "valid.csv"}.get(name, name)
        (shutil.copytree if name == "clips" else shutil.copy)(speech / source, data / {"clips": "dev"}.get(name, name))
    done(tune("--data", data, "--valid", "test", "--eval_only", "--init", heard[0] / "ckpt.pt", "--out", tmp_path / "sounds"))
    assert results(tmp_path / "sounds")["map"] == results(heard[0])["map"]


def test_the_beam_search_asks_the_language_model(monkeypatch, early, speech, held_out, tmp_path):
    asked = []

    def decode_beam(log_probs, dictionary, beam, lm, lm_weight, word_score, real=letters.decode_beam):
        asked.append((len(log_probs), beam, lm and lm.order, lm_weight, word_score))
        return real(log_probs, dictionary, beam, lm, lm_weight, word_score)

    monkeypatch.setattr(letters, "decode_beam", decode_beam)
    letters.kneser_ney((text.split() for text in held_out.transcripts), 2).write(str(tmp_path / "lm.arpa"))
    flags = "--data", speech, "--init", early, "--eval_only", *ALONE, "--beam", 4
    done(tune(*flags, "--lm", tmp_path / "lm.arpa", "--lm_weight", 3, "--word_score", 0.5, "--out", tmp_path / "lm"))
    assert len(asked) == 9 and {ask[1:] for ask in asked} == {(4, 2, 3.0, 0.5)}
    done(tune(*flags, "--out", tmp_path / "beam"))
    assert asked[-1][1:3] == (4, None)
    assert "none.arpa" in refused(tune(*flags, "--lm", "none.arpa", "--out", tmp_path / "none"))
    letters.kneser_ney(([word.lower() for word in text.split()] for text in held_out.transcripts), 2).write(str(tmp_path / "low.arpa"))
    training = tune("--data", speech, "--init", early, "--beam", 4, "--lm", tmp_path / "low.arpa", "--out", tmp_path / "none")
    assert "upper case" in refused(training) and not (tmp_path / "none").exists(), "before anything is trained"
    assert "--eval_only" in refused(call(finetune, "--init", early, "--predict", held_out.names[0], "--beam", 4))
    assert "--beam" in refused(tune("--data", speech, "--init", early, "--eval_only", "--lm", tmp_path / "lm.arpa", "--out", tmp_path / "none"))


def test_eval_only_of_sounds_finds_its_classes_in_any_order_but_not_others(heard, speech, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    (data / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    flags = "--data", data, "--init", heard[0] / "ckpt.pt", "--eval_only"
    done(tune(*flags, *ALONE, "--out", tmp_path / "run"))
    assert results(tmp_path / "run")["map"] == pytest.approx(naive_map(heard[0] / "ckpt.pt", speech), abs=1e-6)
    (data / "classes.txt").write_text("\n".join([*CLASSES, "Dog"]))
    assert "Dog" in refused(tune(*flags, "--out", tmp_path / "other"))


@pytest.mark.parametrize("flag", ["--eval_only", "--predict"])
def test_using_needs_a_finetuned_file(pretrained, speech, tmp_path, flag):
    flags = [flag, *[speech / "dev/0/7/0-7-0000.wav"] * (flag == "--predict")]
    for init in (pretrained, "none"):
        assert f"--init {init}: not a fine-tuned checkpoint" in refused(tune("--data", speech, "--init", init, *flags, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_predict_writes_down_what_is_said_and_when(early, held_out, speech, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.wav").write_text("no audio")
    paths = [held_out.names[0], "broken.wav", "none.wav", held_out.names[5]]
    lines = done(call(finetune, "--init", early, "--dtype", "float32", "--predict", *paths)).splitlines()
    assert [line.split(": ")[0] for line in lines] == list(map(str, paths))
    assert all(": skipped, " in line for line in lines[1:3])
    listen = network(early, goal="letters")
    for line, i in ((lines[0], 0), (lines[3], 5)):
        text, times = letters.decode_greedy(listen(held_out.load(i)))
        assert text and line.split(": ", 1)[1] == " ".join(f"{word} ({a:.2f}-{b:.2f} s)" for word, (a, b) in zip(text.split(), times))
        assert 0 <= times[0][0] < times[-1][1] <= held_out.lengths[i] / audio.RATE
    assert "recording" in refused(call(finetune, "--init", early, "--predict", "broken.wav"))
    assert {path.name for path in tmp_path.iterdir()} == {"broken.wav"}


def test_the_times_are_those_of_the_models_own_strides(held_out, speech, tmp_path, monkeypatch):
    convs = ["8,20,10", "8,8,4", "8,4,4"]  # a frame every 160 samples, 10 ms
    model = [str(word) for name, value in MODEL.items() for word in (f"--{name}", value)]
    done(call(train_speech, *PRETRAIN, *model, "--convs", *convs, "--data", speech, "--out", tmp_path / "pre"))
    done(tune("--data", speech, "--init", tmp_path / "pre/ckpt.pt", "--steps", 1, "--out", tmp_path / "run"))
    real, asked = letters.decode_greedy, []
    monkeypatch.setattr(letters, "decode_greedy", lambda *args, **options: asked.append(options) or real(*args, **options))
    done(call(finetune, "--init", tmp_path / "run/ckpt.pt", "--dtype", "float32", "--predict", held_out.names[0]))
    assert asked == [{"frame_s": 0.01}]


def test_predict_names_events_with_their_probabilities(heard, held_out):
    line = done(call(finetune, "--init", heard[0] / "best.pt", "--dtype", "float32", "--predict", held_out.names[0])).strip()
    p = network(heard[0] / "best.pt", goal="sounds")(held_out.load(0)).sigmoid()
    p = (p.square().sum(0) / p.sum(0)).tolist()
    expected = ", ".join(f"{CLASSES[c]} {p[c]:.3f}" for c in sorted(range(4), key=lambda c: -p[c]))
    assert line == f"{held_out.names[0]}: {expected}"


# ---- killed and resumed, several processes ---------------------------------------------------------------------------


def assert_same_end(cut, whole):
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ("student", "optimizer", "step", "best"):
        assert_same(ours[part], theirs[part])
    assert_same(checkpoint(cut, "best.pt")["student"], checkpoint(whole, "best.pt")["student"])
    assert torch.equal(ours["rng"][0][0], theirs["rng"][0][0])
    for name in ("step", "loss", "grad_norm", "lr"):
        assert [row[name] for row in rows(cut)] == [row[name] for row in rows(whole)]
    same = {"seconds", "peak_memory_gb"}
    assert {k: v for k, v in results(cut).items() if k not in same} == {k: v for k, v in results(whole).items() if k not in same}


NOISY = "--dropout 0.1 --attn_dropout 0.1 --ffn_dropout 0.1 --head_dropout 0.1 --layer_drop 0.3 --workers 0".split()


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(speech, pretrained, tmp_path):
    flags = "--data", speech, "--init", pretrained, *NOISY, *"--steps 24 --save_every 4 --probe_every 12 --freeze_steps 8".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill(launch(SCRIPT, *options(*flags, "--out", cut)), cut)
    assert 4 <= checkpoint(cut)["step"] < 24
    done(tune("--out", cut, "--resume"))
    done(tune(*flags, "--out", whole))
    assert_same_end(cut, whole)


def test_a_run_on_sounds_that_is_stopped_and_resumed_ends_with_the_same_bits(monkeypatch, speech, pretrained, tmp_path):
    def save_then_stop(path, state, real=common.save):
        real(path, state)
        if path.name == "ckpt.pt":
            raise KeyboardInterrupt

    flags = "--data", speech, "--init", pretrained, "--goal", "sounds", *NOISY, *"--mixup 0.7 --steps 8 --save_every 3 --probe_every 4".split()
    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save_then_stop)
        assert tune(*flags, "--out", tmp_path / "cut")[0] == 130
    done(tune("--out", tmp_path / "cut", "--resume"))
    done(tune(*flags, "--out", tmp_path / "whole"))
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


RUNS = """import sys
sys.path.insert(0, {folder!r})
import common, finetune
def main(start=common.start_processes, group=[]):
    for flags in {runs!r}:
        sys.argv = ["finetune.py", *flags]
        group += [] if group else [start("cpu", "float32")]  # the runs share one process group
        common.start_processes = lambda *_: group[0]
        finetune.main()
common.run(main)
"""
SPLIT = "--steps 3 --probe_every 1 --global_batch 16 --lr 0.001 --layer_drop 0".split()  # 4 micro-batches


@pytest.fixture(scope="module")
def split(tmp_path_factory, speech, pretrained):
    """The same runs by one process and by two -> {goal: (folder by one, folder by two, damaged file)}, output of the two.

    The file cannot be loaded, and only the second of the two processes meets it.
    """
    tmp = tmp_path_factory.mktemp("split")
    data = shutil.copytree(speech, tmp / "data")
    train = audio.open_folder(data, show=False)[0]
    first, second = ([key[2] for key in audio.batches(train.lengths, 64_000, 64_000, 0, 0, 3, 4, 2, rank)] for rank in (0, 1))
    assert len({len(indices) for indices in second}) > 1, "uneven batches"
    damaged = train.names[min(set(sum(second, ())) - set(sum(first, ())))]
    silence(damaged)
    found, runs = {}, []
    for goal, more in (("letters", []), ("sounds", ["--mixup", "0.5"])):
        flags = "--data", data, "--init", pretrained, "--goal", goal, *SPLIT, *more
        done(tune(*flags, "--out", tmp / f"{goal}-one"))
        runs.append(options(*flags, "--out", tmp / f"{goal}-two"))
        found[goal] = tmp / f"{goal}-one", tmp / f"{goal}-two", Path(damaged).name
    (tmp / "runs.py").write_text(RUNS.format(folder=str(SCRIPT.parent), runs=runs))
    return found, "".join(ended(launch(tmp / "runs.py", processes=2)))


@pytest.mark.parametrize("goal, metric", [("letters", "cer"), ("sounds", "map")])
def test_two_processes_train_and_evaluate_the_same_run_as_one(split, held_out, goal, metric):
    one, two, _ = split[0][goal]
    for row, expected in zip(rows(two), rows(one), strict=True):
        assert row["step"] == expected["step"] and row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row[metric] == pytest.approx(expected[metric], abs=1e-9), "every held-out recording counts once"
    assert len(rows(one)) == 3
    ours, theirs = checkpoint(two)["student"], checkpoint(one)["student"]
    moving = [name for name in ours if not name.endswith("k_bias")]  # whose true gradient is zero
    assert_same({name: ours[name] for name in moving}, {name: theirs[name] for name in moving}, atol=1e-5)
    if goal == "letters":
        assert all(row["words"] == sum(len(text.split()) for text in held_out.transcripts) for row in rows(two))
        assert rows(two)[0]["substitutions"] > 0, "a rate that tells"
    assert results(two)["skipped_files"] == results(one)["skipped_files"] == 1
    assert not torch.equal(checkpoint(two)["rng"][0][0], checkpoint(two)["rng"][1][0])


def test_what_only_the_second_process_meets_is_named_and_only_the_first_speaks(split):
    assert split[1].count(split[0]["letters"][2]) == 2, "once a run"
    assert split[1].count("24 labelled utterances") == split[1].count("24 labelled clips") == 1


# ---- real speech ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_real_utterances_are_learned_by_heart(shared, monkeypatch, tmp_path):
    """From random weights to no error in 58 words: the whole chain from FLAC and transcripts to decoded text is right."""
    for split in ("train", "dev"):
        shutil.copytree(shared / "speech/LibriSpeech/test-clean", tmp_path / "data" / split)
    model = dict(channels=16, dim=64, depth=1, heads=4, ffn=256, pos_groups=4, pos_width=15, pos_depth=3, top_k=1)
    monkeypatch.setitem(train_speech.PRESETS, "tiny", model)
    flags = """--init none --model tiny --steps 160 --lr 3e-3 --clip 3 --global_batch 22 --max_samples 176000 --max_seconds 11
        --log_every 20""".split()
    done(tune("--data", tmp_path / "data", *flags, *PLAIN, "--out", tmp_path / "run"))
    numbers = results(tmp_path / "run")
    assert (numbers["wer"], numbers["cer"], numbers["words"]) == (0, 0, 58), numbers
    part = audio.open_folder(tmp_path / "data", show=False)[1]
    lines = done(call(finetune, "--init", tmp_path / "run/best.pt", "--dtype", "float32", "--predict", *part.names)).splitlines()
    assert [re.sub(r" \([\d.-]+ s\)", "", line.split(": ", 1)[1]) for line in lines] == part.transcripts

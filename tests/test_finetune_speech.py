"""finetune.py on recordings: letters by CTC and sound events: losses, what learns, what is left out, use."""

import json
import math
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
from data import audio, letters, synthetic
from tests import checkpoints, helpers, test_letters
from tests.helpers import FAST, assert_same, call, checkpoint, done, results, rows
from tools import convert, hub

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(helpers.refused, by="finetune.py: ")
CLASSES = ["has S", "has M", "has K", "long"]
FLAGS = f"""--preset speech_smoke {FAST} --steps 4 --batch_seconds 8 --max_samples 64000 --label_fraction 1
    --lr 0.01 --channel_p 0.2 --ffn_dropout 0 --warmup 0.1"""
PLAIN, STILL = "--mask_p 0 --channel_p 0", "--steps 1 --lr 0"


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """24 training and 9 held-out utterances, and the same as clips with events."""
    root, splits = tmp_path_factory.mktemp("speech"), synthetic.speech(n_train=24, n_valid=9)
    helpers.write_speech(root, splits)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split, table, (waves, texts) in zip(("train", "dev"), ("train", "valid"), splits):
        lines = ["path,labels"]
        for path, wave, words in zip(sorted((root / split).rglob("*.flac")), waves, texts):
            events = [event for event in CLASSES[:3] if event[-1] in words] + ["long"] * (len(wave) > 24_000)
            lines.append(f'{path.relative_to(root)},"{";".join(events or CLASSES[:1])}"')
        (root / f"{table}.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def run(speech, finished):
    """run(flag, ...) -> exit status, stdout, stderr of a run from pre-trained weights; later flags win."""

    def tune(*flags, init=finished["speech"] / "ckpt.pt"):
        start = *FLAGS.split(), "--data", speech, "--init", init
        return call(finetune, *start, *(word for flag in flags for word in str(flag).split()))

    return tune


@pytest.fixture(scope="module")
def learned(run, tmp_path_factory):
    """{letters, sounds: folder of a run}; early: letters after two steps, when it writes many of them."""
    root = tmp_path_factory.mktemp("learned")
    done(run("--steps 20 --log_every 5 --probe_every 5 --out", root / "letters"))
    done(run("--task sounds --mixup 0.5 --steps 12 --probe_every 4 --head_lr 0.02 --out", root / "sounds"))
    done(run("--steps 2 --lr 1e-3 --out", root / "early"))
    return {name: root / name for name in ("letters", "sounds", "early")}


def built(task="letters", **options):
    """The task of these options with its model, as a run would start."""
    torch.manual_seed(0)
    cfg = finetune.Config(task=task, workers=0, **options)
    task = finetune.choose_task(cfg, common.start_processes("cpu", "float32"))
    task.build(task.tuned or letters.LETTERS)
    return task


def listener(folder, task):
    """The model of a run: wave -> logits (T, classes)."""
    model = built(task, init=str(folder / "ckpt.pt")).model.eval()
    return lambda wave: model(torch.from_numpy(wave)[None])[0][0].detach()


def test_runs_and_their_results(learned, speech):
    words = sum(len(text.split()) for text in audio.open_data(str(speech))[1].transcripts)
    kinds = ("letters", "wer", min, letters.LETTERS), ("sounds", "map", max, CLASSES)
    for task, metric, best_of, classes in kinds:
        lines, numbers = rows(learned[task]), results(learned[task])
        scores = {line["step"]: line[metric] for line in lines if metric in line}
        assert list(scores) == ([5, 10, 15, 20] if task == "letters" else [4, 8, 12])
        assert lines[-1]["loss"] < lines[0]["loss"] and numbers[metric] == list(scores.values())[-1]
        assert numbers[f"best_{metric}"] == best_of(scores.values()) == scores[numbers["best_step"]]
        assert (numbers["examples"], numbers["skipped_files"]) == (24, 0)
        best = checkpoint(learned[task], "best.pt")
        assert (best["task"], best["classes"], best["step"]) == (task, classes, numbers["best_step"])
        assert best["student"]["out.weight"].shape == (len(classes), 16)
    numbers = results(learned["letters"])
    wrong = numbers["errors"]
    assert numbers["words"] == words and numbers["wer"] == pytest.approx(wrong / words)


def naive_ctc(log_probs, text):
    """-log of the probability of all alignments, frame by frame (Graves et al. 2006, section 4.1)."""
    states = [0] + [state for letter in text for state in (letter, 0)]  # blanks around every letter
    alpha = {0: log_probs[0][0], 1: log_probs[0][states[1]]}
    for frame in log_probs[1:]:
        new = {}
        for s, symbol in enumerate(states):
            before = [s, s - 1] + [s - 2] * (symbol != 0 and s >= 2 and states[s - 2] != symbol)
            ways = [alpha[b] for b in before if b in alpha]
            if ways:
                new[s] = frame[symbol] + np.logaddexp.reduce(ways)
        alpha = new
    return -np.logaddexp(alpha[len(states) - 1], alpha.get(len(states) - 2, -math.inf))


def expected_letters(listen, waves, texts):
    targets = [letters.encode(text) for text in texts]
    losses = [naive_ctc(listen(x).double().log_softmax(-1).tolist(), y) for x, y in zip(waves, targets)]
    return sum(losses) / sum(map(len, targets))


def expected_sounds(listen, waves, _):
    total = 0.0
    for wave, truth in zip(waves, ((1, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1))):
        for column, y in zip(listen(wave).double().sigmoid().T.tolist(), truth):
            p = sum(v * v for v in column) / sum(column)  # linear softmax over frames
            total -= math.log(p if y else 1 - p) / 3
    return total / 4


@pytest.mark.parametrize("task, expected", [("letters", expected_letters), ("sounds", expected_sounds)])
def test_the_loss_is_a_mean_over_the_batch_however_it_is_split(run, tmp_path, task, expected):
    """Four recordings of a second: any two of them fill a micro-batch of 32,000 samples, without padding."""
    texts = ["SO", "ME LU", "KA", "NEIRA"]
    waves = [wave[:16_000] for wave in synthetic.speech(n_train=4, n_valid=1)[0][0]]
    helpers.write_speech(tmp_path, [(waves, texts), (waves[:1], texts[:1])])
    paths = sorted((tmp_path / "train").rglob("*.flac"))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    lines = [f"{path.relative_to(tmp_path)},{e}" for path, e in zip(paths, ("a", "a;c", "b", "b;a;c"))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (tmp_path / "valid.csv").write_text(f"{next((tmp_path / 'dev').rglob('*.flac')).relative_to(tmp_path)},b")
    flags = f"--task {task} {PLAIN} --steps 2 --batch_seconds 4 --max_seconds 2 --data {tmp_path}"
    for samples in (64_000, 32_000):
        done(run(flags, "--max_samples", samples, "--out", tmp_path / str(samples)))
    done(run(flags, STILL, "--out", tmp_path / "start"))
    loaded = [audio.normalise(audio.load_audio(str(path))) for path in paths]
    value = expected(listener(tmp_path / "start", task), loaded, texts)
    whole, split = rows(tmp_path / "64000"), rows(tmp_path / "32000")
    assert whole[0]["loss"] == pytest.approx(value, rel=1e-5) == split[0]["loss"]
    assert whole[1]["loss"] == pytest.approx(split[1]["loss"], rel=1e-4)


def test_spans_of_frames_and_channels_are_hidden_in_training_alone(monkeypatch, run, tmp_path):
    seen = []

    def forward(self, waves, samples=None, mask=None, channels=None, real=finetune.FrameClassifier.forward):
        frames = None if samples is None else self.encoder.embed.frames(samples)
        seen.append((self.training, frames, mask, channels))
        return real(self, waves, samples, mask, channels)

    monkeypatch.setattr(finetune.FrameClassifier, "forward", forward)
    done(run("--mask_p 0.5 --channel_p 1 --out", tmp_path / "run"))
    trained = [rest for training, *rest in seen if training]
    assert len(trained) == 8, "4 steps of 2 micro-batches"
    for frames, mask, channels in trained:
        padding = torch.arange(mask.shape[1]) >= frames[:, None]
        assert not mask[padding].any() and 0.2 < mask[~padding].float().mean() < 0.55
        assert channels.shape == (len(frames), 16)
    assert any(channels.any() for *_, channels in trained)
    assert all(mask is channels is None for training, _, mask, channels in seen if not training)


def test_frames_and_channels_are_hidden_before_the_transformer():
    cfg = train_speech.Config(channels=8, dim=16, depth=1, heads=2, ffn=32, pos_width=15)
    model, waves = finetune.FrameClassifier(train_speech.build(cfg).encoder, 5).eval(), torch.randn(2, 3000)
    mask, channels = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 2:4], channels[1, 5:9], seen = True, True, []
    model.encoder.transform = lambda x, *rest: (seen.append(x) or x, [])
    model(waves, None, mask, channels)
    (x,), (content, _) = seen, model.encoder.embed(waves)
    assert torch.equal(x[0, 2], model.encoder.mask_embedding) and (x[1, :, 5:9] == 0).all()
    assert torch.equal(x[0, 4:], content[0, 4:]) and torch.equal(x[1, :, 9:], content[1, :, 9:])


def test_linear_softmax_weights_real_frames_by_their_own_probability():
    logits, frames = torch.randn(3, 6, 4), [6, 2, 4]
    pooled = finetune.linear_softmax(logits, torch.tensor(frames))
    for x, n, row in zip(logits, frames, pooled):
        p = x[:n].sigmoid()
        torch.testing.assert_close(row, p.square().sum(0) / p.sum(0))
    silent = finetune.linear_softmax(torch.full((1, 2, 3), -200.0), torch.tensor([2]))
    assert (silent == 0).all(), "never 0 / 0"


def naive_average_precision(scores, truth):
    values = []
    for column, labels in zip(scores.T.tolist(), truth.T.tolist()):
        hits = [labels[i] for i in sorted(range(len(column)), key=lambda i: -column[i])]
        precisions = [sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit]
        values += [np.mean(precisions)] if precisions else []
    return np.mean(values)


@pytest.mark.parametrize("levels", [1000, 3])
def test_average_precision_is_that_of_a_loop(levels):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, levels, (40, 6)) / levels).float()  # few: with ties
    truth = torch.from_numpy(rng.random((40, 6)) < [0.3, 0.1, 0.9, 0.5, 0.02, 0]).float()
    expected = naive_average_precision(scores, truth)
    assert finetune.average_precision(scores, truth) == pytest.approx(expected, abs=1e-6)
    assert finetune.average_precision(truth[:, :4], truth[:, :4]) == 1


@pytest.fixture
def start(monkeypatch, finished):
    """The student that runs start from, with convolutions that never learn."""
    monkeypatch.setitem(finetune.PRESETS["speech_smoke"], "freeze_convs", True)
    return checkpoint(finished["speech"])["student"]


def test_the_encoder_is_frozen_for_a_while_and_the_convolutions_for_good(run, finished, tmp_path, start):
    done(run("--freeze_steps 2 --steps 2 --layer_drop 0.2 --weight_decay 0.1 --out", tmp_path / "run"))
    frozen, head = (
        checkpoint(tmp_path / "run")["student"],
        built(init=str(finished["speech"] / "ckpt.pt")).model.out,
    )
    encoder = {name: start[name] for name in frozen if name.startswith("encoder.")}
    assert_same({name: frozen[name] for name in encoder}, encoder)
    assert not torch.equal(frozen["out.weight"], head.weight)
    done(call(finetune, "--out", tmp_path / "run", "--resume", "--steps", 4, "--layer_drop", 0))
    after = checkpoint(tmp_path / "run")["student"]
    still = {name for name in encoder if torch.equal(after[name], start[name])}
    assert still == {name for name in encoder if ".convs." in name or ".norms." in name}


def test_utterances_that_cannot_be_used_are_named_counted_and_left_out(speech, run, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    files = sorted((data / "train").rglob("*.flac"))
    table = files[0].with_name("0-7.trans.txt")
    first, _, *others = table.read_text().splitlines()
    table.write_text("\n".join([first.split()[0] + " 5 & MORE", *others]))  # digits; no transcript
    wave, _ = soundfile.read(files[2])
    for path in (files[2], next((data / "dev").rglob("*.flac"))):  # held out: measured all the same
        soundfile.write(path, np.tile(wave, 5), audio.RATE)
    soundfile.write(files[3], wave[:800], audio.RATE)  # too short for its transcript
    code, out, err = run("--data", data, "--out", tmp_path / "run")
    assert code == 0, err
    assert all((out + err).count(path.name) == 1 for path in files[:4])
    numbers = results(tmp_path / "run")
    assert (numbers["examples"], numbers["skipped_files"]) == (20, 4)
    for path in (data / "dev").rglob("*.trans.txt"):
        path.unlink()
    assert "dev" in refused(run("--data", data, "--out", tmp_path / "no")) and not (tmp_path / "no").exists()


@pytest.mark.parametrize("task, metric", [("letters", "wer"), ("sounds", "map")])
def test_a_damaged_recording_is_named_and_not_measured(speech, run, learned, tmp_path, task, metric):
    data = shutil.copytree(speech, tmp_path / "data")
    damaged = sorted((data / "train").rglob("*.flac"))[5], sorted((data / "dev").rglob("*.flac"))[2]
    for path in damaged:  # silence: no header tells
        soundfile.write(path, np.zeros(soundfile.info(path).frames), audio.RATE)
    code, out, err = run("--task", task, "--steps 12 --probe_every 4 --data", data, "--out", tmp_path / "run")
    assert code == 0 and all((out + err).count(path.name) == 1 for path in damaged), err
    assert results(tmp_path / "run")["skipped_files"] == 2
    flags = "--eval_only --data"
    done(run(flags, data, "--out", tmp_path / "eval", init=learned[task] / "ckpt.pt"))
    damaged[1].unlink()
    lines = (data / "valid.csv").read_text().splitlines()
    (data / "valid.csv").write_text("\n".join(line for line in lines if damaged[1].name not in line))
    done(run(flags, data, "--out", tmp_path / "without", init=learned[task] / "ckpt.pt"))
    assert results(tmp_path / "eval")[metric] == results(tmp_path / "without")[metric]


def test_eval_only_measures_what_the_model_says(learned, speech, run, tmp_path):
    done(run("--task images --eval_only --out", tmp_path / "run", init=learned["early"] / "ckpt.pt"))
    listen, held_out = listener(learned["early"], "letters"), audio.open_data(str(speech))[1]
    guesses = [letters.decode_greedy(listen(held_out.load(i)))[0] for i in range(len(held_out))]
    pairs, numbers = list(zip(held_out.transcripts, guesses)), results(tmp_path / "run")
    expected = letters.wer(pairs)
    assert numbers["errors"] > 0, "a model that says something"
    assert {name: numbers[name] for name in expected._fields} == expected._asdict()
    assert numbers["wer"] == expected.rate and numbers["cer"] == letters.cer(pairs).rate
    done(run("--eval_only --out", tmp_path / "again", init=learned["letters"] / "best.pt"))
    assert results(tmp_path / "again")["cer"] == results(learned["letters"])["best_cer"]


def test_eval_only_needs_no_training_part_and_finds_classes_in_any_order(learned, speech, run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(speech / "dev", data / "test-other")
    flags = "--eval_only --data", data, "--out"
    done(run("--valid test-other", *flags, tmp_path / "letters", init=learned["early"] / "ckpt.pt"))
    assert results(tmp_path / "letters")["words"] == results(learned["letters"])["words"]
    shutil.copytree(speech / "dev", data / "dev")
    shutil.copy(speech / "valid.csv", data / "test.csv")
    (data / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    done(run("--valid test", *flags, tmp_path / "sounds", init=learned["sounds"] / "ckpt.pt"))
    assert results(tmp_path / "sounds")["map"] == pytest.approx(results(learned["sounds"])["map"])
    (data / "classes.txt").write_text("\n".join([*CLASSES, "Dog"]))
    other = run("--valid test", *flags, tmp_path / "no", init=learned["sounds"] / "ckpt.pt")
    assert "classes" in refused(other)


def test_the_beam_search_uses_the_language_model(monkeypatch, learned, run, tmp_path):
    used = []

    def decode_beam(log_probs, dictionary, beam, lm, lm_weight, word_score, real=letters.decode_beam):
        used.append((beam, lm and lm.order, lm_weight, word_score))
        return real(log_probs, dictionary, beam, lm, lm_weight, word_score)

    monkeypatch.setattr(letters, "decode_beam", decode_beam)
    (tmp_path / "lm.arpa").write_text(test_letters.TINY)
    flags, early = "--eval_only --beam 4", learned["early"] / "ckpt.pt"
    lm = "--lm", tmp_path / "lm.arpa", "--lm_weight 3 --word_score 0.5"
    done(run(flags, *lm, "--out", tmp_path / "lm", init=early))
    assert len(used) == 9 and set(used) == {(4, 3, 3.0, 0.5)}
    done(run(flags, "--out", tmp_path / "beam", init=early))
    assert used[-1][:2] == (4, None)
    assert "none.arpa" in refused(run(flags, "--lm none.arpa --out", tmp_path / "no", init=early))
    assert "--eval_only" in refused(run("--beam 4 --predict a.wav", init=early))


def test_predict_writes_words_with_their_times_or_events(learned, speech, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.wav").write_text("no audio")
    held_out = audio.open_data(str(speech))[1]
    paths = [held_out.names[0], "broken.wav", "none.wav", held_out.names[5]]
    predict = "--dtype", "float32", "--predict"
    lines = done(call(finetune, "--init", learned["early"] / "ckpt.pt", *predict, *paths)).splitlines()
    assert [line.split(": ")[0] for line in lines] == paths
    assert all(": skipped, " in line for line in lines[1:3])
    listen = listener(learned["early"], "letters")
    for line, i in ((lines[0], 0), (lines[3], 5)):
        words, times = letters.decode_greedy(listen(held_out.load(i)))
        expected = " ".join(f"{word} ({a:.2f}-{b:.2f} s)" for word, (a, b) in zip(words.split(), times))
        assert words and line.split(": ", 1)[1] == expected
        assert 0 <= times[0][0] < times[-1][1] <= held_out.lengths[i] / audio.RATE
    init = "--init", learned["sounds"] / "ckpt.pt"
    line = done(call(finetune, *init, *predict, held_out.names[0])).strip()
    logits = listener(learned["sounds"], "sounds")(held_out.load(0))
    p = finetune.linear_softmax(logits[None], torch.tensor([len(logits)]))[0].tolist()
    named = ", ".join(f"{CLASSES[c]} {p[c]:.3f}" for c in sorted(range(4), key=lambda c: -p[c]))
    assert line == f"{held_out.names[0]}: {named}"


def test_transcripts_do_not_depend_on_their_neighbours(learned, run, tmp_path):
    scores = []
    for samples in (400, 64_000, 10**6):
        out = tmp_path / str(samples)
        done(run("--eval_only --max_samples", samples, "--out", out, init=learned["early"] / "ckpt.pt"))
        scores.append({name: results(out)[name] for name in ("errors", "cer")})
    assert scores[0] == scores[1] == scores[2]


def test_a_new_head_has_the_letters_of_all_transcripts(speech, run, learned, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    for path in data.rglob("*.trans.txt"):
        lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
        table = str.maketrans("AEIOSM", "аёиоßй")
        path.write_text("".join(f"{name} {text.translate(table)}\n" for name, text in lines))
    first = next((data / "train").rglob("*.trans.txt"))
    first.write_text(first.read_text().replace("ё", "э", 1))  # once, in what may not be trained on
    out = tmp_path / "run"
    done(run("--label_fraction 0.2 --steps 2 --data", data, "--out", out))
    classes = checkpoint(out, "best.pt")["classes"]
    assert set(classes) > set("АЁИОЭЙß|") and not set(classes) & set("AEIOSMйё")
    done(run("--steps 3 --resume --data", data, "--out", out))
    init = "--init", out / "best.pt"
    pytest.importorskip("safetensors")
    done(call(convert, out / "best.pt", tmp_path / "hub"))
    assert list(json.loads((tmp_path / "hub/vocab.json").read_text(encoding="utf-8"))) == classes
    done(run("--eval_only --data", data, "--out", tmp_path / "eval", init=out / "best.pt"))
    assert results(tmp_path / "eval")["words"] == results(learned["letters"])["words"]
    lines = [
        done(call(finetune, *i, "--predict", next((data / "dev").rglob("*.flac"))))
        for i in (init, ("--init", tmp_path / "hub"))
    ]
    assert lines[0] == lines[1]
    done(run("--steps 2 --out", tmp_path / "more", init=learned["letters"] / "best.pt"))
    assert checkpoint(tmp_path / "more")["classes"] == letters.LETTERS, "a tuned head keeps its own"


def test_long_recordings_are_heard_in_windows(learned, tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("long", 130 * 16_000), ("short", 60 * 16_000)):
        soundfile.write(tmp_path / f"{name}.flac", 0.1 * rng.standard_normal(n), 16_000)
    init = "--init", learned["early"] / "ckpt.pt", "--dtype", "float32", "--predict"
    out = done(call(finetune, *init, tmp_path / "long.flac", tmp_path / "short.flac"))
    said = [line for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert len(said) == 2  # and, once, that recordings are heard in parts
    heard = built(init=str(learned["early"] / "ckpt.pt"))
    heard.model.eval()
    wave = torch.from_numpy(audio.normalise(audio.load_audio(tmp_path / "short.flac")))[None]
    with torch.no_grad():
        assert torch.equal(heard.hear(wave), heard.model(wave)[0][0])


def test_what_a_foreign_checkpoint_wants_of_its_input_is_noted(tmp_path):
    file = checkpoints.released("speech")
    for task, notes in (
        ({"normalize": True}, []),
        ({"normalize": False}, ["normalize of its inputs is False, of ours True"]),
    ):
        torch.save(file | {"cfg": file["cfg"] | {"task": task}}, tmp_path / "a.pt")
        assert convert.read(tmp_path / "a.pt")["notes"] == notes
    pytest.importorskip("safetensors")
    hub.write(convert.read(tmp_path / "a.pt"), tmp_path / "hub")
    (tmp_path / "hub/preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 8000}')
    assert convert.read(tmp_path / "hub")["notes"][-2:] == [
        "do_normalize of its inputs is False, of ours True",
        "sampling_rate of its inputs is 8000, of ours 16000",
    ]

"""train_speech.py as its users meet it: run, killed, resumed, split over processes, begun from a checkpoint, misled."""

import json
import math
import shutil
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import common
import train_speech
import train_vision
from data import audio
from masking import span_mask
from model import CONVS, Encoder, Teacher, WaveEmbed
from tests import helpers
from tests.helpers import assert_same, call, checkpoint, ended, kill, launch, results, rows, told, weights

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(train_speech.__file__)
LIMIT = 64_000  # samples of a micro-batch: 1 to 3 of the utterances below
TINY = f"""--channels 8 --dim 16 --depth 2 --heads 2 --ffn 32 --pos_groups 2 --pos_width 15 --top_k 2 --max_seconds 4
    --max_samples {LIMIT} --global_batch 8 --steps 4 --log_every 1 --save_every 0 --probe_every 0 --probe_utterances 4
    --eval_utterances 4 --workers 0 --lr 2e-3 --warmup 0 --decay 0.3 --final_scale 0.1 --beta2 0.98 --clip 0 --tau_0 0.9
    --tau_e 0.99 --tau_n 3 --share_positions true --guard_after -1 --dtype float32 --device cpu""".split()
STILL = "--steps 1 --lr 0 --tau_0 1 --tau_e 1".split()  # one step that moves nothing shows what was loaded


def options(*flags):
    """A tiny model, 2 micro-batches an update, and later flags that win; a resumed run has its options from its config.json."""
    return [str(flag) for flag in (flags if "--resume" in flags else [*TINY, *flags])]


def train(*flags):
    return call(train_speech, *options(*flags))


refused = partial(helpers.refused, by="train_speech.py: ")


# ---- a little LibriSpeech ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def said():
    """(train, valid): 24 and 5 utterances of 1 to 2.1 s; their order is that of the files below."""
    return audio.made_speech(n_train=24, n_valid=5)


@pytest.fixture(scope="session")
def speech(tmp_path_factory, said):
    """root/{train,dev}/SPEAKER/CHAPTER/*.flac and *.trans.txt, as LibriSpeech has them."""
    root = tmp_path_factory.mktemp("speech")
    for split, utterances in zip(("train", "dev"), said):
        for i, (wave, text) in enumerate(zip(utterances.waves, utterances.transcripts)):
            chapter = root / split / f"{i // 6}" / "7"
            chapter.mkdir(parents=True, exist_ok=True)
            soundfile.write(chapter / f"{i // 6}-7-{i:04}.flac", wave, audio.RATE)
            with open(chapter / f"{i // 6}-7.trans.txt", "a") as file:
                file.write(f"{i // 6}-7-{i:04} {text}\n")
    return root


@pytest.fixture(scope="session")
def mute(tmp_path_factory, speech):
    """The same without transcripts, which saves the time of the probes."""
    return shutil.copytree(speech, tmp_path_factory.mktemp("mute") / "data", ignore=shutil.ignore_patterns("*.txt"))


def keys(said, count, world=1, rank=0, steps=3):
    return list(audio.batches(said[0].lengths, LIMIT, LIMIT, 0, 0, steps, count, world, rank))


@pytest.fixture(scope="session")
def damaged(tmp_path_factory, mute, said):
    """Half of one file is missing: of one that only the second of two processes meets, in its first step."""
    root = shutil.copytree(mute, tmp_path_factory.mktemp("damaged") / "data")
    first = {i for *_, lot in keys(said, 4, 2, 0) for i in lot}
    index = next(i for *_, lot in keys(said, 4, 2, 1, steps=1) for i in lot if i not in first)
    (path,) = root.rglob(f"train/*/*/*-{index:04}.flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root, path.name


@pytest.fixture(scope="module")
def finished(tmp_path_factory, speech):
    """One whole run -> its folder and what it said. Tests that go on from it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, told(train("--data", speech, "--out", out, "--probe_every", 2))


@pytest.fixture
def embedded(monkeypatch):
    """Every pass of the convolutions: (in training?, the content that they gave)."""
    calls = []

    def forward(self, waves, samples=None, real=WaveEmbed.forward):
        x, valid = real(self, waves, samples)
        calls.append((self.training, x.detach().clone()))
        return x, valid

    monkeypatch.setattr(WaveEmbed, "forward", forward)
    return calls


# ---- a run and its folder ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_config_metrics_a_checkpoint_and_results(finished):
    assert {path.name for path in finished[0].iterdir()} == {"config.json", "metrics.jsonl", "ckpt.pt", "results.json"}


def test_config_json_holds_every_field_the_versions_and_the_command(finished, speech):
    config = json.loads((finished[0] / "config.json").read_text())
    assert {f.name for f in fields(train_speech.Config)} | {"versions", "command"} == config.keys()
    assert config["dim"] == 16 and config["data"] == str(speech) and config["preset"] == "smoke"
    assert "torch" in config["versions"] and "train_speech.py" in config["command"] and "--dim 16" in config["command"]


def test_metrics_hold_one_line_a_log_step_and_probes_where_asked(finished):
    lines = rows(finished[0])
    names = "loss target_std pred_std masked tau lr grad_norm audio_s_per_s samples_per_s seconds".split()
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    for row in lines:
        assert row.keys() >= set(names) and all(math.isfinite(value) for value in row.values())
    probed = [row["step"] for row in lines if {"explained", "probe", "teacher_probe"} <= row.keys()]
    assert probed == [2, 4] and all("explained" not in row for row in lines if row["step"] not in probed)


def test_results_hold_the_numbers_of_the_contract(finished):
    numbers = results(finished[0])
    both = [f"{name}_{when}" for name in ("explained", "probe", "teacher_probe") for when in ("start", "end")]
    assert numbers.keys() == {"seconds", "peak_memory_gb", "final_loss", "skipped_files", *both}
    assert all(0 <= numbers[name] <= 1 for name in numbers if "probe" in name) and numbers["explained_end"] <= 1
    assert numbers["final_loss"] == rows(finished[0])[-1]["loss"] and numbers["skipped_files"] == 0
    assert numbers["seconds"] > 0 and 0.05 < numbers["peak_memory_gb"] < 8


def test_the_checkpoint_holds_all_of_the_state_as_plain_data(finished):
    state = checkpoint(finished[0])
    assert state.keys() >= {"student", "teacher", "optimizer", "step", "config", "rng"}
    assert state["step"] == 4 and state["config"]["dim"] == 16 and len(state["rng"]) == 1
    assert {name for name in state["student"] if name.startswith("encoder.")} == state["teacher"].keys()
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.01], "on all weights, as released"


def test_speed_is_counted_in_seconds_and_in_utterances(said, mute, tmp_path):
    told(train("--data", mute, "--out", tmp_path / "run", "--steps", 2, "--log_every", 2, "--pad"))
    for row, lots in zip(rows(tmp_path / "run"), (keys(said, 2)[:2], keys(said, 2)[2:4]), strict=True):
        seconds = [said[0].lengths[i] / audio.RATE for *_, lot in lots for i in lot]
        assert row["audio_s_per_s"] / row["samples_per_s"] == pytest.approx(np.mean(seconds))


def test_a_folder_that_holds_a_run_is_not_touched(finished, speech):
    before = {path.name: path.read_bytes() for path in finished[0].iterdir()}
    assert "--resume" in refused(train("--data", speech, "--out", finished[0]))
    assert before == {path.name: path.read_bytes() for path in finished[0].iterdir()}


def test_resuming_a_finished_run_is_harmless(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert "step 0:" in told(train("--out", folder, "--resume"))
    for part in ("student", "teacher", "optimizer", "step"):
        assert_same(checkpoint(folder)[part], checkpoint(finished[0])[part])
    assert rows(folder) == rows(finished[0])
    ours, theirs = results(folder), results(finished[0])
    assert ours | {"peak_memory_gb": 0} == theirs | {"peak_memory_gb": 0}


def test_without_a_folder_speech_is_made_and_every_switch_of_the_method_runs(tmp_path, monkeypatch, said):
    monkeypatch.setattr(audio, "made_speech", lambda: said)
    flags = "--target block --norm layer --final_norm layer --beta 0.25 --window 5 --deep_norm --share_positions false --pad"
    flags += " --schedule cosine --clip 1 --dtype bfloat16 --workers 1 --steps 2 --seed 3"
    assert "24 training utterances" in told(train(*flags.split(), "--out", tmp_path / "run"))
    assert results(tmp_path / "run").keys() >= {"explained_end", "probe_end", "teacher_probe_end"}


def test_without_transcripts_there_is_no_probe(mute, tmp_path):
    assert "no probe" in told(train("--data", mute, "--out", tmp_path / "run", "--steps", 1))
    assert results(tmp_path / "run").keys() >= {"explained_start", "explained_end"}
    assert not any("probe" in name for name in [*results(tmp_path / "run"), *rows(tmp_path / "run")[0]])


def test_the_probe_reads_whole_utterances_with_their_own_transcripts(said, speech, tmp_path, monkeypatch):
    """Of those that are cropped to max_seconds the transcript says more than can be heard."""
    seen = []

    def fit_ctc(x, letters, classes, real=train_speech.fit_ctc):
        seen.append((x, letters))
        return real(x, letters, classes, steps=2)

    monkeypatch.setattr(train_speech, "fit_ctc", fit_ctc)
    flags = "--max_seconds", 1.5, "--probe_utterances", 24, *STILL
    told(train("--data", speech, "--out", tmp_path / "run", *flags))
    short = [i for i, n in enumerate(said[0].lengths) if n <= 1.5 * audio.RATE]
    assert 4 < len(short) < 20 and len(seen) == 4, "student and teacher, before and after"
    for x, texts in seen:
        pairs = sorted((frames(said[0].lengths[i]), len(said[0].transcripts[i]) + 1) for i in short)
        assert sorted((len(u), len(text)) for u, text in zip(x, texts, strict=True)) == pairs
    told(train("--data", speech, "--out", tmp_path / "none", "--max_seconds", 0.5, *STILL))
    assert "probe_end" not in results(tmp_path / "none")


# ---- the method ----------------------------------------------------------------------------------------------------


def frames(samples):
    for _, kernel, stride in CONVS:
        samples = math.floor((samples - kernel) / stride + 1)
    return samples


def naive_loss(student, teacher, batch, pad):
    """Sum over the masked frames of |f - y|^2 / sqrt(D), and their number: single numbers, one utterance at a time."""
    total = count = 0
    for b in range(len(batch["source"])):
        part = slice(None) if pad else slice(b, b + 1)  # a cropped utterance alone, a padded one in its batch
        row = b if pad else 0
        with torch.no_grad():
            x, valid = student.encoder.embed(batch["source"][part], batch["lengths"][part] if pad else None)
            features, _ = student.encoder.transform(x, batch["mask"][part], valid)
            _, layers = teacher.transform(x, None, valid)
            f = student.head(features[row]).double().tolist()  # (T, D)
        y = np.zeros((len(f), 16))
        for a in layers[-2:]:
            for d in range(16):
                channel = a[row, :, d].double().tolist()  # over all frames of the row, padding too
                mean = sum(channel) / len(channel)
                std = math.sqrt(sum((v - mean) ** 2 for v in channel) / len(channel) + 1e-5)
                for t, v in enumerate(channel):
                    y[t, d] += (v - mean) / std / 2
        for t in range(len(f)):
            if batch["mask"][b, t]:
                total += sum((p - q) ** 2 for p, q in zip(f[t], y[t])) / math.sqrt(16)
                count += 1
    return total, count


@pytest.mark.parametrize("pad", [False, True], ids=["cropped", "padded"])
def test_the_loss_is_that_of_a_naive_recomputation(said, mute, finished, tmp_path, pad):
    """One step of two micro-batches, from a checkpoint whose student and teacher differ."""
    flags = "--init", finished[0] / "ckpt.pt", "--pad", pad, *STILL
    told(train("--data", mute, "--out", tmp_path / "run", *flags))
    state = checkpoint(tmp_path / "run")
    student = train_speech.build(train_speech.Config(**state["config"]))
    student.load_state_dict(state["student"])
    teacher = Teacher(student.encoder)
    teacher.load_state_dict(state["teacher"])

    def hide(lengths, rng):
        return span_mask(np.array([frames(n) for n in lengths.tolist()]), 0.65, 10, rng, equal=not pad)

    batches = audio.Batches(audio.open_folder(mute, show=False)[0], 0, LIMIT, pad, hide)
    shares = [naive_loss(student, teacher.encoder, batches[key], pad) for key in keys(said, 2, steps=1)]
    (total, other), (count, fewer) = zip(*shares)
    assert count != fewer, "or else a mean of means would pass for the mean over the global batch"
    row = rows(tmp_path / "run")[0]
    real = sum(frames(n) for key in keys(said, 2, steps=1) for n in batches[key]["lengths"].tolist())
    assert row["loss"] == pytest.approx((total + other) / (count + fewer), rel=1e-5)
    assert row["masked"] == pytest.approx((count + fewer) / real)
    other_teacher = naive_loss(student, student.encoder, batches[keys(said, 2, steps=1)[0]], pad)
    assert other_teacher[0] != pytest.approx(total, rel=1e-2), "the tolerance tells teacher and student apart"


def test_the_convolutions_run_once_and_the_teacher_gets_their_content_unmasked(mute, tmp_path, embedded, monkeypatch):
    taught = []

    def forward(self, input, valid=None, content=False, real=Teacher.forward):
        taught.append((content, input))
        return real(self, input, valid, content)

    monkeypatch.setattr(Teacher, "forward", forward)
    told(train("--data", mute, "--out", tmp_path / "run", "--steps", 3, "--layer_drop", 0.3, "--dropout", 0.1))
    assert sum(training for training, _ in embedded) == 3 * 2, "steps x micro-batches"
    assert len(taught) == len(embedded), "none but the student's"
    for (content, x), (_, made) in zip(taught, embedded, strict=True):
        assert content and torch.equal(x, made) and not x.requires_grad


@pytest.mark.parametrize("share_positions", [True, False])
def test_the_teacher_moves_once_an_update_and_shares_what_it_should(mute, tmp_path, monkeypatch, share_positions):
    moves = []

    def update(self, encoder, tau, real=Teacher.update):
        before = weights(self.encoder)
        real(self, encoder, tau)
        moves.append((before, weights(encoder), weights(self.encoder), tau))

    monkeypatch.setattr(Teacher, "update", update)
    told(train("--data", mute, "--out", tmp_path / "run", "--share_positions", share_positions))
    assert [tau for *_, tau in moves] == pytest.approx([0.93, 0.96, 0.99, 0.99])
    assert [row["tau"] for row in rows(tmp_path / "run")] == [tau for *_, tau in moves]
    shared = ("embed.content.", "embed.positions.") if share_positions else ("embed.content.",)
    for before, theta, after, tau in moves:
        for name, tensor in after.items():
            if name.startswith(shared):
                assert torch.equal(tensor, theta[name]), name
            else:
                expected = tau * before[name].double() + (1 - tau) * theta[name].double()
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    assert_same(checkpoint(tmp_path / "run")["teacher"], {f"encoder.{n}": t for n, t in moves[-1][2].items()})


# ---- killed and resumed --------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(mute, tmp_path):
    flags = "--steps 30 --save_every 3 --dropout 0.2 --attn_dropout 0.1 --ffn_dropout 0.1 --layer_drop 0.3 --workers 2 --pad".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill(launch(SCRIPT, *options(*flags, "--data", mute, "--out", cut)), cut)
    assert 3 <= checkpoint(cut)["step"] < 30 and not (cut / "results.json").exists()
    told(train(*flags, "--data", mute, "--out", whole))
    told(train("--out", cut, "--resume"))  # every other option comes from its config.json
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ("student", "teacher", "optimizer", "step"):
        assert_same(ours[part], theirs[part])
    assert torch.equal(ours["rng"][0][0], theirs["rng"][0][0])
    assert [row["step"] for row in rows(cut)] == list(range(1, 31))
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]
    assert results(cut)["explained_start"] == results(whole)["explained_start"]


def test_an_interrupted_run_can_be_ended_where_it_stands(mute, tmp_path, monkeypatch):
    def save_then_stop(path, state, real=common.save):
        real(path, state)
        if path.name == "ckpt.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save_then_stop)
        assert train("--data", mute, "--out", tmp_path / "run", "--save_every", 2)[0] == 130
    told(train("--out", tmp_path / "run", "--resume", "--steps", 2))
    assert results(tmp_path / "run").keys() >= {"explained_end"} and checkpoint(tmp_path / "run")["step"] == 2


def test_a_resumed_run_takes_a_new_weight_decay_and_beta2(finished, tmp_path, mute):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    told(train("--out", folder, "--resume", "--data", mute, "--steps", 5, "--weight_decay", 0.3, "--beta2", 0.9))
    (group,) = checkpoint(folder)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.9, 0.9))


# ---- several processes, several micro-batches ----------------------------------------------------------------------

SPLIT = "--steps 3 --global_batch 16".split()  # 4 micro-batches of 1 to 3 utterances
DROP = "--pad --layer_drop 0.5".split()


def drop_by_content():
    """Layer drop as a function of the micro-batch: the same whichever process, and whatever its random state, holds it."""

    def transform(self, x, mask=None, valid=None, window=0, real=Encoder.transform, rand=torch.rand):
        dice = iter([float(x.shape[1] % 3 != layer) for layer in range(2)])  # layer 0, layer 1 or none is dropped
        torch.rand = lambda *_: torch.tensor(next(dice))
        try:
            return real(self, x, mask, valid, window)
        finally:
            torch.rand = rand

    return transform


def together(*flags, out, data, script=SCRIPT):
    """Two processes by torchrun -> the run's folder, stdout, stderr."""
    return out, *ended(launch(script, *options(*SPLIT, *flags, "--data", data, "--out", out), processes=2))


def assert_quiet(err):
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("lengths in")]
    assert err.count("| 0/3 [") == 1 and all("/3 [" in line for line in lines), f"one bar and no warnings: {err}"


@pytest.fixture(scope="module")
def double(tmp_path_factory, damaged):
    return together(out=tmp_path_factory.mktemp("runs") / "double", data=damaged[0])


def assert_same_run(ours, theirs):
    for row, expected in zip(rows(ours), rows(theirs), strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {row['step']}"
        for name in ("step", "tau", "lr", "masked"):
            assert row[name] == expected[name]
    assert len(rows(ours)) == 3
    for part in ("student", "teacher"):
        pair = [{n: t for n, t in checkpoint(f)[part].items() if not n.endswith("k_bias")} for f in (ours, theirs)]
        assert_same(*pair, atol=1e-5)  # a key's bias has no gradient but rounding, which Adam makes large


def test_two_processes_train_the_same_run_as_one(damaged, double, tmp_path):
    told(train(*SPLIT, "--data", damaged[0], "--out", tmp_path / "single"))
    assert_same_run(double[0], tmp_path / "single")
    ours, theirs = results(double[0]), results(tmp_path / "single")
    assert ours["explained_end"] == pytest.approx(theirs["explained_end"], abs=1e-4)
    assert ours.keys() == theirs.keys() and ours["skipped_files"] == theirs["skipped_files"] == 1


def test_two_processes_train_the_same_padded_run_with_layer_drop(said, mute, tmp_path, monkeypatch):
    """A layer that one micro-batch drops has its gradient from the others."""
    sizes = [len(lot) for *_, lot in keys(said, 4)]
    assert len(set(sizes)) > 1
    script = tmp_path / "train_speech.py"
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(SCRIPT.parent), str(Path(__file__).parent)]}\n"
        "import common, test_train_speech, train_speech\n"
        "test_train_speech.Encoder.transform = test_train_speech.drop_by_content()\n"
        "common.run(train_speech.main)\n"
    )
    assert_quiet(together(*DROP, out=tmp_path / "double", data=mute, script=script)[2])
    monkeypatch.setattr(Encoder, "transform", drop_by_content())
    told(train(*SPLIT, *DROP, "--data", mute, "--out", tmp_path / "single"))
    assert_same_run(tmp_path / "double", tmp_path / "single")


def test_only_the_first_of_two_processes_speaks(double):
    _, out, err = double
    assert out.count("step 0:") == out.count("training utterances") == out.count("3 steps in") == 1
    assert_quiet(err)


def test_two_processes_keep_a_random_state_each(double):
    first, second = checkpoint(double[0])["rng"]
    assert not torch.equal(first[0], second[0])


def test_a_damaged_recording_that_only_the_second_process_meets_is_named_and_counted(double, damaged):
    folder, out, err = double
    assert results(folder)["skipped_files"] == 1 and (out + err).count(damaged[1]) == 1


# ---- from a checkpoint ---------------------------------------------------------------------------------------------


def test_init_takes_student_and_teacher_and_starts_the_schedule_again(finished, speech, tmp_path):
    told(train("--data", speech, "--init", finished[0] / "ckpt.pt", *STILL, "--out", tmp_path / "run"))
    ours, theirs, numbers = checkpoint(tmp_path / "run"), checkpoint(finished[0]), results(tmp_path / "run")
    assert ours["step"] == 1 and rows(tmp_path / "run")[0]["step"] == 1
    assert_same(ours["student"], theirs["student"])
    assert_same(ours["teacher"], theirs["teacher"])
    assert not torch.equal(ours["teacher"]["encoder.blocks.0.fc1.weight"], ours["student"]["encoder.blocks.0.fc1.weight"])
    for name in ("explained", "probe", "teacher_probe"):
        assert numbers[f"{name}_start"] == pytest.approx(results(finished[0])[f"{name}_end"], abs=1e-4)


def test_init_can_make_the_teacher_a_copy_of_the_student(finished, mute, tmp_path):
    flags = "--data", mute, "--init", finished[0] / "ckpt.pt", "--init_teacher", "student", *STILL
    told(train(*flags, "--out", tmp_path / "run"))
    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(finished[0])
    assert_same(ours["teacher"], {name: theirs["student"][name] for name in theirs["teacher"]})


def test_init_with_what_does_not_fit_is_one_line(finished, mute, tmp_path, monkeypatch):
    flags = "--dim 16 --depth 2 --heads 2 --ffn 32 --top_k 2 --image_size 16 --patch 4 --mask_block 2 --steps 1 --workers 0"
    monkeypatch.setattr(sys, "argv", ["train_vision.py", *flags.split(), "--device", "cpu", "--out", str(tmp_path / "vision")])
    common.run(train_vision.main)
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(checkpoint(finished[0]) | {"classes": ["A"]}, tmp_path / "tuned.pt")
    fine = finished[0] / "ckpt.pt"
    for path, *flags in (
        [tmp_path / "vision" / "ckpt.pt"], [tmp_path / "none.pt"], [tmp_path / "other.pt"], [tmp_path / "tuned.pt"],
        [fine, "--dim", 32], [fine, "--depth", 3], [fine, "--channels", 4], [fine, "--pos_width", 25],
        [fine, "--heads", 4], [fine, "--deep_norm"], [fine, "--norm_eps", 1e-6],
        [fine, "--convs", "8,10,5", *["8,3,3"] * 4, *["8,2,2"] * 2],  # other strides, weights of the same shapes
    ):  # fmt: skip
        assert str(path) in refused(train("--data", mute, "--init", path, *flags, "--out", tmp_path / "run"))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("change", ["--dim 32", "--heads 4", "--deep_norm true"])
def test_resuming_with_another_model_is_one_line_and_costs_nothing(finished, tmp_path, change):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert "ckpt.pt" in refused(train("--out", folder, "--resume", *change.split()))
    assert (folder / "config.json").read_text() == (finished[0] / "config.json").read_text(), "a plain --resume still goes on"


def test_resuming_from_a_damaged_checkpoint_is_one_line(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    assert "ckpt.pt" in refused(train("--out", folder, "--resume"))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_damaged_recording_is_named_once_counted_and_passed_over(damaged, tmp_path):
    said = told(train("--data", damaged[0], "--out", tmp_path / "run", "--steps", 24, "--log_every", 2))
    assert said.count(damaged[1]) == 1, "met in each of 3 epochs"
    assert results(tmp_path / "run")["skipped_files"] == 1


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--steps", "--steps"), ("--stpes 3", "--stpes"), ("--steps 1.5", "--steps"), ("--lr fast", "--lr"),
        ("--pad maybe", "--pad"), ("--norm batch", "--norm"), ("--preset huge", "--preset"), ("--heads 3", "--heads"),
        ("--train dev-other", "dev-other"), ("--convs 8,10,5 8,32000,320", "--max_seconds"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line_and_status_2(mute, tmp_path, flags, named):
    assert named in refused(train("--data", mute, "--out", tmp_path / "run", *flags.split()))
    assert not (tmp_path / "run").exists()


def test_any_sign_in_a_transcript_leaves_the_probe_alone(speech, tmp_path):
    data = shutil.copytree(speech, tmp_path / "data")
    for path in data.rglob("*.trans.txt"):
        path.write_text("".join(f"{line} | &\n" for line in path.read_text().splitlines()))
    assert "probe" in told(train("--data", data, "--out", tmp_path / "run", *STILL))


def test_folders_without_recordings_are_one_line_and_status_2(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert name in refused(train("--data", tmp_path / name, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "dev"])
def test_recordings_that_are_all_damaged_are_one_line_and_status_2(mute, tmp_path, split):
    root = shutil.copytree(mute, tmp_path / "data")
    for path in (root / split).rglob("*.flac"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, _, err = train("--data", root, "--out", tmp_path / "run")
    assert code == 2 and split in err.splitlines()[-1] and "Traceback" not in err, err


def test_a_collapsed_run_stops_and_says_what_to_try(mute, tmp_path):
    flags = "--data", mute, "--steps", 3, "--min_pred_std", 100
    code, _, err = train(*flags, "--guard_after", 2, "--out", tmp_path / "a")
    assert code == 1 and "\nstep 2: collapsed, pred_std" in err and "Traceback" not in err, "on a line of its own"
    assert "--tau_0" in err and "--guard_after" in err
    assert [row["step"] for row in rows(tmp_path / "a")] == [1] and not (tmp_path / "a" / "results.json").exists()
    told(train(*flags, "--guard_after", -1, "--out", tmp_path / "b"))
    code, _, err = train("--data", mute, "--guard_after", 0, "--min_target_std", 100, "--out", tmp_path / "c")
    assert code == 1 and "collapsed, target_std" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(finished, mute, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    code, _, err = train("--data", mute, "--out", folder, *"--resume --steps 20 --lr 1e30 --save_every 4".split())
    assert code == 1 and "finite" in err and "--lr" in err and "Traceback" not in err, err
    assert (folder / "ckpt.pt").read_bytes() == (finished[0] / "ckpt.pt").read_bytes()


# ---- options, help, presets, schedule ------------------------------------------------------------------------------


def config(**changes):
    sizes = dict(dim=16, depth=2, heads=2, top_k=2, pos_groups=2, global_batch=8, max_samples=LIMIT, max_seconds=4.0)
    return train_speech.Config(**sizes | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(global_batch=0), dict(global_batch=12), dict(max_samples=63_999), dict(max_seconds=0.02),
        dict(min_seconds=-1.0), dict(workers=-1), dict(seed=-1), dict(heads=3), dict(pos_groups=3), dict(pos_depth=0),
        dict(pos_width=0), dict(channels=0), dict(top_k=3), dict(top_k=0), dict(mask_p=0.0), dict(mask_p=1.1),
        dict(mask_span=0), dict(dropout=1.0), dict(attn_dropout=-0.1), dict(ffn_dropout=1.0), dict(layer_drop=1.0),
        dict(tau_0=1.1), dict(tau_e=-0.1), dict(tau_n=-1), dict(beta=-1.0), dict(beta2=1.0), dict(weight_decay=-0.1),
        dict(lr=-1e-3), dict(warmup=1.5), dict(decay=-0.1), dict(warmup=0.6, decay=0.6), dict(final_scale=0.0),
        dict(clip=-1.0), dict(window=-1), dict(log_every=0), dict(eval_utterances=0), dict(probe_utterances=0),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_name(changes):
    with pytest.raises(common.BadInput, match=f"--{next(iter(changes))} "):
        train_speech.check(config(**changes), world=2)


def test_accumulation_follows_from_the_number_of_processes():
    for seconds, world, expected in ((16, 1, 4), (16, 2, 2), (16, 4, 1), (17, 1, 4), (1, 1, 1), (24, 3, 2)):
        assert train_speech.check(config(global_batch=seconds), world) == expected


def test_help_lists_the_fields_and_a_presets_values():
    for flags, dim in (["--help"], 16), (["--help", "--preset", "base", "--dim", "768"], 768):
        code, out, _ = train(*flags)
        assert code == 0 and f"--dim {dim} " in out and "Baevski" in out
        assert all(f"--{f.name}" in out and f.metadata["help"] in out for f in fields(train_speech.Config))


def test_presets_are_named_known_and_can_work():
    assert list(train_speech.PRESETS) == ["smoke", "digits", "base", "large", "audioset"]
    micro_batches = {"base": 16, "large": 32, "audioset": 24}
    for name, values in train_speech.PRESETS.items():
        cfg = train_speech.Config(preset=name, **values)
        assert train_speech.check(cfg, 1) == micro_batches.get(name, train_speech.check(cfg, 1))
        for world in (2, 4, 8, 16 if name != "audioset" else 24) if name in micro_batches else ():
            assert train_speech.check(cfg, world) * world == micro_batches[name]
        assert all(type(value) is type(asdict(train_speech.Config())[key]) for key, value in values.items())


def test_the_big_presets_are_the_papers():
    base, large, audioset = (train_speech.Config(**train_speech.PRESETS[n]) for n in ("base", "large", "audioset"))
    for cfg, sizes in (base, (768, 12, 12, 3072)), (large, (1024, 24, 16, 4096)), (audioset, (768, 12, 12, 3072)):
        assert (cfg.dim, cfg.depth, cfg.heads, cfg.ffn) == sizes and cfg.channels == 512
        assert (cfg.pos_width, cfg.pos_depth, cfg.pos_groups) == (95, 5, 16) and cfg.share_positions and not cfg.pad
        assert (cfg.target, cfg.norm, cfg.beta, cfg.window, cfg.mask_p, cfg.mask_span) == ("ffn", "instance", 0, 0, 0.65, 10)
        assert (cfg.tau_0, cfg.tau_e, cfg.tau_n) == (0.999, 0.9999, 30_000)
        assert (cfg.clip, cfg.weight_decay, cfg.beta2) == (0, 0.01, 0.98)
        assert (cfg.dropout, cfg.attn_dropout, cfg.ffn_dropout, cfg.layer_drop) == (0.1, 0.1, 0, 0.05)
        assert (cfg.min_seconds, cfg.max_seconds) == (2, 20)
        assert (cfg.guard_after, cfg.min_target_std, cfg.min_pred_std) == (5000, 0.1, 0.01)
    for cfg, seconds in (base, 63 * 60), (audioset, 94.5 * 60):
        assert cfg.global_batch == seconds and cfg.max_samples == 3_800_000
    assert (base.steps, base.lr, base.schedule, base.warmup, base.decay) == (400_000, 5e-4, "tri_stage", 0.03, 0.07)
    assert (base.top_k, base.final_norm, base.deep_norm) == (8, "none", False)
    assert (audioset.steps, audioset.lr, audioset.schedule) == (200_000, 5e-4, "cosine")
    assert (audioset.top_k, audioset.final_norm, audioset.deep_norm) == (12, "layer", True)
    assert round(audioset.warmup * audioset.steps) == 10_000


def test_the_model_is_that_of_the_options():
    with torch.device("meta"):
        encoder = train_speech.build(train_speech.Config(**train_speech.PRESETS["base"])).encoder
    convs = [(conv.out_channels, *conv.kernel_size, *conv.stride) for conv in encoder.embed.content["convs"]]
    assert convs == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert [(conv.kernel_size, conv.groups) for conv in encoder.embed.positions] == [((19,), 16)] * 5
    assert len(encoder.blocks) == 12 and encoder.layer_drop == 0.05 and encoder.embed.dropout.p == 0.1
    for block in encoder.blocks:
        assert (block.dropout.p, block.attn.dropout, block.ffn_dropout.p, block.target, block.alpha) == (0.1, 0.1, 0, "ffn", 1)


def test_tri_stage_warms_up_holds_and_decays_exponentially():
    cfg = config(steps=1000, lr=2.0, warmup=0.03, decay=0.07, final_scale=0.01)
    for step in range(1, 1001):
        expected = 2 * step / 30 if step <= 30 else 2 if step <= 930 else 2 * 0.01 ** ((step - 930) / 70)
        assert train_speech.lr_at(step, cfg) == pytest.approx(expected)
    assert train_speech.lr_at(1000, cfg) == pytest.approx(0.02)
    flat = config(steps=10, lr=2.0, warmup=0.0, decay=0.0)
    assert [train_speech.lr_at(step, flat) for step in range(1, 11)] == [2] * 10


def test_cosine_warms_up_and_falls():
    cfg = config(steps=100, lr=1.0, warmup=0.2, final_scale=0.1, schedule="cosine")
    for step in range(1, 101):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert train_speech.lr_at(step, cfg) == pytest.approx(step / 20 if step <= 20 else cosine)
    assert train_speech.lr_at(1, config(steps=1, warmup=0.0, lr=1.0, schedule="cosine", final_scale=1.0)) == 1


# ---- real speech ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_at_full_size_takes_real_utterances(shared, monkeypatch, tmp_path):
    """LibriSpeech's own layout through the preset `base`: 5 updates of about 10 seconds, minutes on a CPU."""
    for split in ("train-clean-100", "dev-clean"):
        shutil.copytree(shared / "speech/LibriSpeech/test-clean", tmp_path / "data" / split)
    flags = "--steps 5 --warmup 0.4 --global_batch 12 --max_samples 192000 --max_seconds 12 --log_every 1 --workers 0 --device cpu".split()
    monkeypatch.setattr(sys, "argv", ["train_speech.py", "--preset", "base", "--data", str(tmp_path / "data"), *flags, "--out", str(tmp_path / "run")])  # fmt: skip
    common.run(train_speech.main)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=False)
    assert sum(p.numel() for p in state["student"].values()) > 90e6 and len(rows) == 5
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and all(0.3 < row["masked"] < 0.6 and row["target_std"] > 0.1 for row in rows)
    print([round(row["loss"], 2) for row in rows], json.loads((tmp_path / "run/results.json").read_text()))

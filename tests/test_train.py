"""The three train scripts: a run and its folder, the method, --init, wrong input, options and presets."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import common
import model2
from data import images, synthetic, text
from model import Teacher, WaveEmbed
from tests import helpers
from tests.checkpoints import build
from tests.helpers import RUNS, SCRIPTS, TINY, checkpoint, done, launch, refused, results, rows
from tools import probes

KINDS = list(RUNS)  # the last three: of data2vec 2.0
STILL = "--steps 1 --lr 0 --tau_0 1 --tau_e 1"  # one step that moves nothing shows what was loaded
pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def train(data, finished, tmp_path):
    """train(kind, flags, ...): a tiny run in tmp_path/run, with --resume of a copy of the finished one."""

    def run(kind, *flags, source=None):
        words = [word for flag in flags for word in str(flag).split()]
        if "--resume" in words:
            shutil.copytree(finished[kind], tmp_path / "run", dirs_exist_ok=True)
        else:
            words = [*TINY[kind], "--data", data / kind.rstrip("2") if source is None else source, *words]
        return helpers.call(RUNS[kind], "--out", tmp_path / "run", *words)

    return run


@pytest.fixture
def loaded(monkeypatch):
    """All batches that were loaded, those of the evaluation first."""
    seen = []

    def watch(self, batches, real=common.Log.watch):
        for batch in real(self, batches):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(common.Log, "watch", watch)
    return seen


def rebuilt(state):
    """Student and teacher of a checkpoint."""
    student = build(state)
    student.load_state_dict(state["student"])
    teacher = Teacher(student.encoder)
    teacher.load_state_dict(state["teacher"])
    return student, teacher


# ---- a run and its folder --------------------------------------------------------------------------------


@every_kind
def test_a_run_leaves_a_config_metrics_a_checkpoint_and_results(finished, kind):
    names = {path.name for path in finished[kind].iterdir()}
    assert names == {"config.json", "metrics.jsonl", "ckpt.pt", "results.json"}
    config = json.loads((finished[kind] / "config.json").read_text())
    assert {f.name for f in fields(RUNS[kind].Config)} | {"python", "torch", "command"} == config.keys()
    assert config["dim"] == 16 and config["preset"] == "smoke" and "--dim 16" in config["command"]
    state = checkpoint(finished[kind])
    vocabulary = {"vocabulary"} if "text" in kind else set()
    assert state.keys() == {"student", "teacher", "optimizer", "scaler", "step", "config", "rng"} | vocabulary
    assert state["step"] == 12 and state["config"]["dim"] == 16 and len(state["rng"]) == 1
    assert {name for name in state["student"] if name.startswith("encoder.")} == state["teacher"].keys()
    matrices = sum(name.endswith(".weight") and "norm" not in name for name in state["student"])
    matrices += kind == "vision2"  # the class token
    decay = state["optimizer"]["param_groups"][0]
    assert len(decay["params"]) == (matrices if kind not in ("speech", "text") else len(state["student"]))


@every_kind
def test_metrics_and_results_hold_what_was_measured(finished, kind):
    lines, numbers = rows(finished[kind]), results(finished[kind])
    own = {"vision": {"knn", "teacher_knn"}, "speech": set(), "text": {"position_r2"}}[kind.rstrip("2")]
    scores = {"explained_variance", "probe"} | ({"teacher_probe"} if kind != "text2" else set()) | own
    assert [row["step"] for row in lines] == [0, 1, 3, 6, 9, 12]
    measured = {"loss", "target_std", "pred_std", "masked", "tau", "lr", "grad_norm"}
    units = {"vision": "images_per_s", "speech": "audio_s_per_s", "text": "tokens_per_s"}
    measured.add(units[kind.rstrip("2")])
    for row in lines:
        expected = {"step", "seconds"} | (measured if row["step"] else set())
        assert row.keys() == expected | (scores if row["step"] in (0, 6, 12) else set())
        assert all(math.isfinite(value) for value in row.values())
    both = {f"{name}_{when}" for name in scores for when in ("start", "end")}
    assert numbers.keys() == {"seconds", "peak_memory_gb", "final_loss", "skipped_files"} | both
    assert numbers["final_loss"] == lines[-1]["loss"] and numbers["probe_start"] == lines[0]["probe"]
    assert numbers["explained_variance_end"] == lines[-1]["explained_variance"] <= 1
    assert numbers["seconds"] > 0 and 0.05 < numbers["peak_memory_gb"] < 8


@every_kind
def test_lines_are_plain_and_name_a_damaged_sample_once(finished, kind):
    """Without a terminal; the sample is met in each of several epochs."""
    lines = finished[kind].with_suffix(".txt").read_text().splitlines()
    assert sum(line.startswith("step ") for line in lines) == 6 + 1  # the last one says where results.json is
    assert not any("\r" in line or "%|" in line for line in lines)
    skipped = [line for line in lines if line.startswith("skipped ")]
    damaged = helpers.DAMAGED[kind.rstrip("2")]
    assert len(skipped) == results(finished[kind])["skipped_files"] == len(damaged)
    assert all(any(name in line for line in skipped) for name in damaged)


@every_kind
def test_a_folder_that_holds_a_run_is_not_touched(finished, train, kind):
    before = {path.name: path.read_bytes() for path in finished[kind].iterdir()}
    assert "--resume" in refused(train(kind, "--out", finished[kind]))
    assert before == {path.name: path.read_bytes() for path in finished[kind].iterdir()}


@pytest.mark.parametrize(
    "run",
    [
        "vision --layer_scale 0.1 --drop_path 0.2 --learned_std 0 --attn_dropout 0.1",
        "speech --deep_norm --share_positions false --pad --schedule cosine --dropout 0.1 --layer_drop 0.2",
        "text --share_embedding false --mask_span 4 --mask_p 0.35 --schedule cosine --weight_std 0",
        "vision2 --drop_path 0.2 --attn_dropout 0.1",
        "speech2 --share_positions true --prenet 0 --dropout 0.1 --layer_drop 0.2",
    ],
)
def test_data_are_made_and_every_switch_of_the_method_runs(monkeypatch, tmp_path, train, run):
    documents = [f"{' '.join(chr(97 + i * j % 26) for j in range(40))}\n" for i in range(60)]
    monkeypatch.setattr(synthetic, "images", partial(synthetic.images, n_train=60, n_val=20))
    monkeypatch.setattr(synthetic, "speech", partial(synthetic.speech, n_train=20, n_valid=3))
    monkeypatch.setattr(synthetic, "documents", lambda: (documents[:50], documents[50:]))
    monkeypatch.setattr(probes, "fit_ctc", partial(probes.fit_ctc, steps=20))
    flags = "--target attention --norm instance --final_norm layer --beta 0.2 --window 2 --clip 1 --steps 2"
    done(train(*run.split(), flags, "--dtype bfloat16 --workers 1", source=""))
    assert results(tmp_path / "run").keys() >= {"explained_variance_end", "probe_end", "teacher_probe_end"}


def test_images_without_classes_have_no_probe(data, train, tmp_path):
    shutil.copytree(data / "vision/train/dog", tmp_path / "data/train/dog")
    done(train("vision", STILL, source=tmp_path / "data"))
    assert not any("knn" in name or "probe" in name for name in results(tmp_path / "run"))


# ---- the method ------------------------------------------------------------------------------------------


def standardise(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
    return [(v - mean) / std for v in values]


def naive_target(kind, layers):
    """T lists of D numbers from the same of each of the top K layers (section 3.3)."""
    if kind not in ("vision", "text"):  # each channel over time
        layers = [list(zip(*(standardise(channel) for channel in zip(*a)))) for a in layers]
    else:
        layers = [[standardise(position) for position in a] for a in layers]
    y = [[sum(values) / len(layers) for values in zip(*positions)] for positions in zip(*layers)]
    return [standardise(position) for position in y] if "vision" in kind else y


def naive_distance(kind, f, y, beta):
    """Of one position (section 3.4): squared error / sqrt(D), a mean or a sum of smooth L1."""
    d = [abs(p - q) for p, q in zip(f, y)]
    if kind not in ("vision", "text"):
        return sum(x * x for x in d) / (1 if kind == "text2" else math.sqrt(len(d)))
    smooth = sum(x * x / 2 / beta if x <= beta else x - beta / 2 for x in d)
    return smooth / len(d) if kind == "vision" else smooth


def naive_loss(kind, student, teacher, batch, pad, beta=0.5):
    """Sum over the masked positions of a micro-batch, and their number, from single numbers; class term."""
    hidden = full = batch.get("source")
    if "vision" in kind:
        hidden = full = images.normalise(batch["images"])
    elif "text" in kind:
        hidden, full = batch["corrupted"], batch["tokens"]
    mask, total, class_term = batch["mask"].flatten(0, -2), 0, 0
    valid = batch["lengths"] if pad else None
    predictions = torch.zeros(*mask.shape, 16)
    with torch.no_grad():
        predictions[mask], *_ = student(hidden, mask, valid)
        layers = [a.tolist() for a in teacher(full, valid)]
    for row, f in enumerate(predictions.tolist()):
        y = naive_target(kind, [a[row * len(full) // len(mask)] for a in layers[-2:]])
        total += sum(naive_distance(kind, f[t], y[t], beta) for t in range(len(y)) if mask[row, t])
        if kind == "vision2":  # of 8 images with 3 masks each
            mean = [sum(values) / len(y) for values in zip(*y)]
            class_term += 2.56 * naive_distance(kind, student.cls[row].tolist(), mean, beta) / 24
    return total, mask.sum().item(), class_term


LOSSES = "vision --beta 0.5,speech,speech --pad,text --beta 0.5,text --beta 0.5 --mask_span 4 --mask_p 0.35"


@pytest.mark.parametrize("run", f"{LOSSES},vision2,speech2,text2".split(","))
def test_the_loss_is_that_of_a_naive_recomputation(finished, train, tmp_path, loaded, monkeypatch, run):
    """One step of two micro-batches, from a checkpoint whose student and teacher differ."""
    kind, *flags = run.split()
    monkeypatch.setattr(model2.Student2.__init__, "__defaults__", (0.0, 0.0))  # without noise
    done(train(kind, "--init", finished[kind] / "ckpt.pt", STILL, *flags))
    student, teacher = rebuilt(checkpoint(tmp_path / "run"))
    pad = "--pad" in flags
    totals, counts, classes = zip(*(naive_loss(kind, student, teacher, b, pad) for b in loaded[-2:]))
    total, expected = totals[0], sum(totals) / sum(counts) + sum(classes)
    different = len(set(counts)) == 2 or kind in ("vision2", "text2")
    assert different, "or else a mean of means would pass for the mean over the global batch"
    assert rows(tmp_path / "run")[1]["loss"] == pytest.approx(expected, rel=1e-5)
    itself = naive_loss(kind, student, Teacher(student.encoder), loaded[-2], pad)[0]
    assert itself != pytest.approx(total, rel=1e-4), "the tolerance tells teacher and student apart"


def test_the_loss_of_masked_language_modelling_is_the_mean_cross_entropy(train, tmp_path, loaded):
    done(train("text", "--objective mlm", STILL))
    student, _ = rebuilt(checkpoint(tmp_path / "run"))
    logits = torch.cat([student(batch["corrupted"], batch["mask"])[0] for batch in loaded[-2:]])
    tokens = torch.cat([batch["tokens"][batch["mask"]] for batch in loaded[-2:]])
    expected = torch.nn.functional.cross_entropy(logits, tokens).item()
    assert rows(tmp_path / "run")[1]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "run, shared",
    [
        ("vision", ()),
        ("speech", ("embed.content.", "embed.positions.")),
        ("speech --share_positions false", ("embed.content.",)),
        ("text", ("embed.",)),
        ("text --share_embedding false", ()),
        ("vision2", ()),
        ("speech2", ("embed.content.",)),
        ("text2", ("embed.", "context.")),
    ],
)
def test_the_teacher_moves_once_an_update(train, tmp_path, monkeypatch, run, shared):
    moves = []

    def update(self, encoder, tau, real=Teacher.update):
        before, theta = ({n: t.clone() for n, t in x.state_dict().items()} for x in (self.encoder, encoder))
        real(self, encoder, tau)
        moves.append((before, theta, {n: t.clone() for n, t in self.encoder.state_dict().items()}, tau))

    monkeypatch.setattr(Teacher, "update", update)
    done(train(*run.split()))
    assert [tau for *_, tau in moves] == pytest.approx([0.93, 0.96, 0.99, 0.99])
    for before, theta, after, tau in moves:
        for name, tensor in after.items():
            expected = tau * before[name].double() + (1 - tau) * theta[name].double()
            if name.startswith(shared):
                expected = theta[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    helpers.assert_same(
        checkpoint(tmp_path / "run")["teacher"], {f"encoder.{n}": t for n, t in moves[-1][2].items()}
    )


def test_the_convolutions_run_once_for_student_and_teacher(train):
    forward, from_embedded = WaveEmbed.forward, Teacher.from_embedded
    with (
        mock.patch.object(WaveEmbed, "forward", autospec=True, side_effect=forward) as embed,
        mock.patch.object(Teacher, "from_embedded", autospec=True, side_effect=from_embedded) as teach,
    ):
        done(train("speech", "--steps 3"))
    assert embed.call_count == teach.call_count >= 3 * 2, "steps x micro-batches, and the evaluation's"


@every_kind
def test_both_encoders_can_be_compiled(train, monkeypatch, kind):
    compiled, called = [], []

    def pretend(transform, **_):
        compiled.append(transform)
        return lambda *args: called.append(transform) or transform(*args)

    monkeypatch.setattr(torch, "compile", pretend)
    done(train(kind, "--compile"))
    assert len(compiled) == 2 and all(called.count(one) >= 4 * 2 for one in compiled)


# ---- from a checkpoint; what goes wrong ------------------------------------------------------------------


@pytest.mark.parametrize("network", ["teacher", "student"])
@every_kind
def test_init_takes_both_networks_and_starts_at_step_0(finished, train, tmp_path, kind, network):
    done(train(kind, "--init", finished[kind] / "ckpt.pt", "--init_teacher", network, STILL))
    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(finished[kind])
    assert ours["step"] == 1 and [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    helpers.assert_same(ours["student"], theirs["student"])
    helpers.assert_same(ours["teacher"], {name: theirs[network][name] for name in theirs["teacher"]})


@every_kind
def test_init_and_resume_with_what_does_not_fit_are_one_line(finished, train, tmp_path, kind):
    """And leave the run's folder to the next attempt."""
    for path in (tmp_path / "none.pt", *(finished[name] / "ckpt.pt" for name in KINDS if name != kind)):
        assert str(path) in refused(train(kind, "--init", path))
    other = "--masks 0" if kind.endswith("2") else "--masks 2"
    for flags in ("--dim 32", "--depth 3", "--heads 4", other):
        assert "ckpt.pt" in refused(train(kind, "--init", finished[kind] / "ckpt.pt", flags))
        assert not (tmp_path / "run").exists()
        assert "ckpt.pt" in refused(train(kind, "--resume", flags))
        assert (tmp_path / "run/config.json").read_text() == (finished[kind] / "config.json").read_text()
        shutil.rmtree(tmp_path / "run")


def test_another_vocabulary_of_the_same_size_is_one_line(finished, train, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {chr(97 + i % 26) * 9} {i % 7}" for i in range(300)))
    text.prepare([str(tmp_path / "text.txt")], tmp_path / "other", vocab_size=300, valid_every=10)
    for flags in (f"--init {finished['text'] / 'ckpt.pt'}", f"--resume --data {tmp_path / 'other'}"):
        assert "vocabulary" in refused(train("text", flags, source=tmp_path / "other"))


WRONG = "--steps,--stpes 3,--steps 1.5,--steps 0,--lr fast,--norm batch,--preset huge,--heads 3,--top_k 3"
WRONG_IN = {
    "vision": "--image_size 18,--mask_ratio 1.1,--global_batch 10",
    "speech": "--max_samples 63999,--dim 24,--train dev-other,--pad maybe",
    "text": "--max_tokens 7,--global_batch 10,--share_embedding maybe",
    "vision2": "--decoder_width 24,--dim 24,--mask_adjust 2,--dim 18 --decoder_groups 2",
    "speech2": "--decoder_width 24,--pad,--deep_norm,--decoder_depth 0",
    "text2": "--objective mlm,--max_tokens 1000000,--masks -1",
}


@every_kind
def test_wrong_options_and_folders_without_data_are_one_line(train, tmp_path, kind):
    for flags in f"{WRONG},{WRONG_IN[kind]}".split(","):
        line = refused(train(kind, flags), by=f"{RUNS[kind].__name__}.py: ")
        assert flags.split()[0] in line or "dev-other" in line, line
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        assert name in refused(train(kind, source=tmp_path / name), silent=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, split, workers", [("vision", "train", 1), ("speech", "dev", 0)])
def test_samples_that_are_all_damaged_are_one_line(data, tmp_path, kind, split, workers):
    shutil.copytree(data / kind, tmp_path / "data")
    for path in (tmp_path / "data" / split).rglob("*.*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    flags = *TINY[kind], "--data", tmp_path / "data", "--workers", workers, "--out", tmp_path / "run"
    assert f"/{split}/" in refused(launch(SCRIPTS[kind], *flags, limit=60)), "and its worker leaves, too"


@every_kind
def test_a_collapsed_run_stops_and_says_what_to_try(train, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(common, "COLLAPSED", {"pred_std": 100})
    code, _, err = train(kind, "--guard_after 2 --save_every 1")
    assert code == 1 and "step 2: pred_std" in err and "--tau_0" in err and "Traceback" not in err, err
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]
    assert checkpoint(tmp_path / "run")["step"] == 1 and not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize("run", [f"{k} --lr 1e30 --save_every 4" for k in KINDS] + ["text --save_every 1"])
def test_numbers_that_are_not_finite_spare_the_checkpoint(finished, train, tmp_path, monkeypatch, run):
    kind, *flags = run.split()
    if "--lr" not in flags:  # the loss of that step is still finite, the weights are not
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: math.inf)
    code, _, err = train(kind, "--resume --steps 20", *flags)
    assert code == 1 and "diverged" in err and "--lr" in err and "Traceback" not in err, err
    assert (tmp_path / "run/ckpt.pt").read_bytes() == (finished[kind] / "ckpt.pt").read_bytes()


# ---- options and presets ---------------------------------------------------------------------------------


@every_kind
def test_help_lists_the_options_with_the_presets_values(kind):
    script = RUNS[kind]
    for flags, dim in ([], 128), (["--preset", "base"], 768):
        out = " ".join(done(helpers.call(script, *flags, "--help")).split())
        assert f"--dim {dim} width D" in out and "Baevski" in out
        assert all(f"--{f.name} " in out for f in fields(script.Config) if f.metadata)


CONFIGS = {
    f"{kind} {name}": script.Config(**values)
    for kind, script in SCRIPTS.items()
    for name, values in script.PRESETS.items()
}
PAPER = {  # tables 10 to 12 of the paper, and the released configurations where it is silent
    "vision base large large_phase2": """image_size=224 patch=16 mask_block=16 target=block top_k=6 norm=layer
        final_norm=layer beta=2 clip=3 weight_decay=0.05 beta2=0.999 tau_n=0""",
    "vision base large": "tau_0=0.9998 tau_e=0.9998 init_teacher=teacher",
    "vision base": "global_batch=2048 steps=500456 lr=2e-3 layer_scale=1e-4 drop_path=0.25",
    "vision large large_phase2": "global_batch=8192 steps=125114 lr=1e-3 layer_scale=1e-5 drop_path=0.2",
    "vision large_phase2": "tau_0=0.9999 tau_e=0.9999 init_teacher=student",
    "speech base large audioset": """channels=512 pos_width=95 pos_depth=5 pos_groups=16 target=ffn beta=0
        norm=instance tau_0=0.999 tau_e=0.9999 tau_n=30000 mask_p=0.65 mask_span=10 pad=false
        share_positions=true dropout=0.1 attn_dropout=0.1 layer_drop=0.05 clip=0 weight_decay=0.01
        beta2=0.98 max_seconds=20""",
    "speech base large": "top_k=8 final_norm=none deep_norm=false batch_seconds=3780 steps=400000",
    "speech base": "lr=5e-4 schedule=tri_stage",
    "speech audioset": """top_k=12 final_norm=layer deep_norm=true batch_seconds=5670 steps=200000 lr=5e-4
        schedule=cosine""",
    "text base base_spans large": """target=ffn top_k=10 norm=layer final_norm=none beta=4 tau_0=0.999
        share_embedding=true tau_e=0.9999 global_batch=256 max_tokens=512 steps=1000000 clip=5
        weight_decay=0.01 beta2=0.98 dropout=0.1 attn_dropout=0.1""",
    "text base": "lr=2e-4 mask_p=0.15 mask_span=1 tau_n=100000",
    "text base_spans": "lr=2e-4 mask_p=0.35 mask_span=4 tau_n=300000",
    # data2vec 2.0: the released configurations
    "vision base2 large2 huge2": """steps=375300 masks=16 mask_block=3 beta=0 clip=4 beta2=0.95
        weight_decay=0.05 patch=16 image_size=224 crop_min=0.2 jitter=0 target=ffn norm=instance
        final_norm=layer tau_0=0.9998 drop_path=0 attn_dropout=0 decoder_groups=16 decoder_dropout=0
        norm_eps=1e-6 guard_after=-1""",
    "vision base2": """dim=768 depth=10 prenet=2 heads=12 ffn=3072 top_k=10 mask_ratio=0.8 mask_adjust=0.07
        global_batch=256 lr=1e-3 tau_e=0.99999 tau_n=100000 class_weight=2.56 decoder_depth=6
        decoder_width=768 decoder_kernel=3""",
    "vision large2 huge2": """prenet=0 heads=16 mask_ratio=0.75 mask_adjust=0.1 global_batch=128 lr=4e-4
        tau_n=150000 class_weight=1.28 decoder_depth=3 decoder_width=1024 decoder_kernel=5""",
    "vision large2": "dim=1024 depth=24 ffn=4096 top_k=18 tau_e=0.99999",
    "vision huge2": "dim=1280 depth=32 ffn=5120 top_k=24 tau_e=0.99995",
    "speech base2 large2": """channels=512 pos_width=95 pos_depth=5 pos_groups=16 pad=false
        share_positions=false schedule=cosine mask_span=5 weight_decay=0.01 beta2=0.98 beta=0 norm=instance
        final_norm=none dropout=0.1 attn_dropout=0.1 decoder_dropout=0.1 decoder_depth=4 decoder_kernel=7
        decoder_groups=16 min_seconds=2 max_seconds=20 norm_eps=1e-5 target=ffn guard_after=5000""",
    "speech base2": """dim=768 depth=12 prenet=0 heads=12 ffn=3072 top_k=8 masks=8 mask_p=0.5
        mask_adjust=0.05 max_samples=1000000 batch_seconds=500 steps=400000 lr=7.5e-4 clip=0 tau_0=0.999
        tau_e=0.99999 tau_n=75000 layer_drop=0.05 decoder_width=384""",
    "speech large2": """dim=1024 depth=16 prenet=8 heads=16 ffn=4096 top_k=16 masks=12 mask_p=0.55
        layer_drop=0 mask_adjust=0.1 max_samples=320000 batch_seconds=960 steps=600000 lr=4e-4 clip=1
        tau_0=0.9997 tau_e=1 tau_n=300000 decoder_width=768""",
    "text base2 large2": """masks=8 prenet=0 max_tokens=512 global_batch=64 schedule=cosine clip=1 beta=0
        weight_decay=0.01 beta2=0.98 tau_0=0.9999 tau_e=0.99999 tau_n=100000 dropout=0.1 attn_dropout=0.1
        decoder_dropout=0.1 decoder_depth=5 decoder_width=768 decoder_kernel=9 decoder_groups=1
        share_embedding=true norm_eps=1e-5 target=ffn guard_after=5000""",
    "text base2": """dim=768 depth=12 heads=12 ffn=3072 top_k=12 mask_p=0.48 steps=1000000 lr=2e-4
        norm=instance final_norm=none""",
    "text large2": """dim=1024 depth=24 heads=16 ffn=4096 top_k=24 mask_p=0.5 steps=600000 lr=1e-4 norm=layer
        final_norm=instance""",
}  # fmt: skip


@pytest.mark.parametrize("presets", PAPER)
def test_the_big_presets_are_the_papers(presets):
    kind, *names = presets.split()
    for name in names:
        cfg = CONFIGS[f"{kind} {name}"]
        for option, value in (pair.split("=") for pair in PAPER[presets].split()):
            found = getattr(cfg, option)
            assert found == (value if isinstance(found, str) else json.loads(value)), (name, option)
        sizes = (1024, 24, 16, 4096) if "large" in name else (768, 12, 12, 3072)
        if not cfg.masks:
            assert (cfg.dim, cfg.depth, cfg.heads, cfg.ffn, cfg.guard_after) == (*sizes, 5000)


WARMUPS = {  # steps of the warm-up and of the final decay
    "vision base": (6256, 0), "vision large": (12_511, 0), "vision large_phase2": (6256, 0),
    "speech base": (12_000, 28_000), "speech audioset": (10_000, 0),
    "text base": (50_000, 150_000), "text base_spans": (10_000, 0),
    "vision base2": (50_040, 0), "vision huge2": (50_040, 0), "speech base2": (8000, 0),
    "speech large2": (10_000, 0), "text base2": (4000, 0), "text large2": (4000, 0),
}  # fmt: skip


@pytest.mark.parametrize("preset", WARMUPS)
def test_the_learning_rate_warms_up_and_falls_as_in_the_paper(preset):
    cfg, (warmup, decay) = CONFIGS[preset], WARMUPS[preset]
    for step in (1, warmup // 2, warmup, warmup + 1, cfg.steps // 2, cfg.steps - 9999, cfg.steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (cfg.steps - warmup))
        fall = cfg.final_scale + (1 - cfg.final_scale) * cosine
        if decay:  # held, then exponential
            fall = cfg.final_scale ** max(0, 1 - (cfg.steps - step) / decay)
        assert common.lr_at(step, cfg) == pytest.approx(cfg.lr * min(step / warmup, fall))


def test_presets_split_among_the_usual_numbers_of_processes():
    for preset, cfg in CONFIGS.items():
        for world in (1, 2, 4, 8) if cfg.steps > 100_000 else (1,):
            if preset.startswith("speech"):
                SCRIPTS["speech"].micro_batch_count(cfg, world)
            else:
                common.accumulation_steps(cfg.global_batch, cfg.micro_batch, world)


def test_names_that_are_not_utf8(data, monkeypatch, tmp_path):
    """A broken picture is named in a terminal that takes UTF-8 alone."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    folder = tmp_path / "vision"
    shutil.copytree(data / "vision", folder)
    bad = os.fsencode(folder / helpers.DAMAGED["vision"][0])
    os.rename(bad, bad.replace(b"04", b"\xe9"))
    flags = *TINY["vision"], "--steps", 1, "--data", folder, "--out", tmp_path / "run"
    assert r"train/cat/\udce9.png: " in done(launch(SCRIPTS["vision"], *flags))


def test_the_modules_that_windows_lacks_are_not_needed(tmp_path):
    lines = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import common, finetune;"
    lines += "common.run(finetune.main)"
    flags = ["--steps", "1", "--device", "cpu", "--workers", "0", "--label_fraction", "0.01", "--out"]
    command = [sys.executable, "-c", lines, *flags, tmp_path / "run"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    assert results(tmp_path / "run")["peak_memory_gb"] is None

"""A run that is killed and resumed, split over processes or micro-batches, or has workers is the same run."""

import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import finetune
import train_speech
import train_text
import train_vision
from model import Encoder
from tests import helpers
from tests.helpers import FAST, TINY, assert_same, call, checkpoint, done, refused, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Loop:
    script: ModuleType
    kind: str  # of the model
    source: str  # of the data
    flags: list
    split: str  # flags for 4 micro-batches an update
    random: str  # flags for regularisation
    single: Path = None  # folder of a run of 3 steps in one process


TUNE = [*FAST.split(), "--steps", 3, "--global_batch", 8, "--dropout", 0]
LETTERS = ["--preset", "speech_smoke", "--label_fraction", 1, "--max_samples", 64_000, "--channel_p", 0.2]
LOOPS = {
    "vision": Loop(
        train_vision, "vision", "vision", [*TINY["vision"], "--micro_batch", 0],
        "--micro_batch 2", "--drop_path 0.3 --attn_dropout 0.1",
    ),
    "speech": Loop(
        train_speech, "speech", "speech", [*TINY["speech"], "--batch_seconds", 16],
        "", "--dropout 0.2 --attn_dropout 0.1 --layer_drop 0.3",
    ),
    "padded": Loop(
        train_speech, "speech", "speech", [*TINY["speech"], "--batch_seconds", 16, "--pad"],
        "", "--dropout 0.2 --layer_drop 0.3 --batch_seconds 8",
    ),
    "text": Loop(
        train_text, "text", "text", [*TINY["text"], "--micro_batch", 0],
        "--micro_batch 2", "--dropout 0.2 --attn_dropout 0.1",
    ),
    "vision2": Loop(
        train_vision, "vision", "vision", [*TINY["vision2"], "--micro_batch", 0],
        "--micro_batch 2", "--drop_path 0.3 --attn_dropout 0.1",
    ),
    "speech2": Loop(
        train_speech, "speech", "speech", [*TINY["speech2"], "--batch_seconds", 16],
        "", "--dropout 0.2 --layer_drop 0.3",
    ),
    "text2": Loop(
        train_text, "text", "text", [*TINY["text2"], "--micro_batch", 0], "--micro_batch 2", "--dropout 0.2"
    ),
    "images": Loop(
        finetune, "vision", "vision", [*TUNE, "--drop_path", 0],
        "--micro_batch 2", "--micro_batch 4 --drop_path 0.3 --mixup 0.8 --cutmix 1 --erasing 0.25",
    ),
    "letters": Loop(
        finetune, "speech", "letters", [*LETTERS, *TUNE, "--batch_seconds", 16, "--ffn_dropout", 0],
        "", "--dropout 0.1 --layer_drop 0.3 --ffn_dropout 0.1 --freeze_steps 2",
    ),
    "sentences": Loop(
        finetune, "text", "tasks", ["--preset", "glue_small", *TUNE, "--task", "moods"],
        "--micro_batch 2", "--dropout 0.1 --label_fraction 0.7",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=LOOPS)
def loop(request, data, finished, tmp_path_factory):
    it = replace(LOOPS[request.param])
    it.flags = [*it.flags, "--data", data / it.source]
    if it.script is finetune:
        it.flags += ["--init", finished[it.kind] / "ckpt.pt"]
    it.single = tmp_path_factory.mktemp("single") / "run"
    done(call(it.script, *it.flags, "--steps", 3, "--out", it.single))
    return it


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(loop, tmp_path):
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log.txt"
    flags = [*loop.flags, *loop.random.split(), "--steps", 8, "--save_every", 3, "--probe_every", 3]
    done(call(loop.script, *flags, "--out", whole))
    stop, kill = partial(helpers.send_after_step, 1, signal.SIGTERM), partial(helpers.send_after_step, 5)
    process = helpers.fork(loop.script, *flags, "--out", cut, log=log, prepare=stop)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM, log.read_text()
    assert "SIGTERM: saved at step 1; go on with --resume" in log.read_text()
    process = helpers.fork(loop.script, "--out", cut, "--resume", log=log, prepare=kill)
    process.join()
    assert process.exitcode == -9, log.read_text()
    assert checkpoint(cut)["step"] == 3 and rows(cut)[-1]["step"] == 5
    assert not (cut / "results.json").exists()

    done(call(loop.script, "--out", cut, "--resume", "--workers", 1))  # the others come from its config.json
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ours.keys() - {"config", "finetune"}:
        assert_same(ours[part], theirs[part])
    assert helpers.timeless(cut) == helpers.timeless(whole) and rows(cut)[-1]["step"] == 8
    here = {"seconds": 0, "peak_memory_gb": 0, "skipped_files": 0}  # what this process has used and met
    assert results(cut) | here == results(whole) | here
    if loop.script is finetune:
        assert_same(checkpoint(cut, "best.pt")["student"], checkpoint(whole, "best.pt")["student"])


def test_resuming_a_finished_run_changes_nothing(loop, tmp_path):
    before = [helpers.timeless(loop.single), checkpoint(loop.single), results(loop.single)]
    done(call(loop.script, "--out", loop.single, "--resume"))
    assert_same(before[1]["student"], checkpoint(loop.single)["student"])
    assert before[0] == helpers.timeless(loop.single)
    here = {"peak_memory_gb": 0, "skipped_files": 0}  # what this process has met
    assert before[2] | here == results(loop.single) | here


def assert_same_run(ours, theirs):
    """Up to rounding. A key's bias has no gradient but rounding, which Adam makes large."""
    for row, expected in zip(rows(ours), rows(theirs), strict=True):
        for name in row.keys() & {"step", "loss", "grad_norm", "lr", "tau", "wer", "top1", "accuracy"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {row['step']}"
    ours, theirs = checkpoint(ours), checkpoint(theirs)
    for part in ("student", "teacher"):
        if ours[part]:
            pair = ({n: t for n, t in x[part].items() if not n.endswith("k_bias")} for x in (ours, theirs))
            assert_same(*pair, atol=1e-5)


def test_micro_batches_train_the_same_run_as_whole_ones(loop, tmp_path):
    if not loop.split:
        pytest.skip("recordings always come in micro-batches")
    done(call(loop.script, *loop.flags, *loop.split.split(), "--steps", 3, "--out", tmp_path / "run"))
    assert_same_run(tmp_path / "run", loop.single)


def seed_by_content(real=Encoder.transform):
    """Dropout becomes a function of the micro-batch, whichever process has it."""

    def transform(self, x, *args):
        torch.manual_seed(x.shape[1])
        return real(self, x, *args)

    Encoder.transform = transform


def test_two_processes_train_the_same_run_as_one(loop, tmp_path):
    flags = [*loop.flags, *loop.split.split(), "--steps", 3, "--out", tmp_path / "run"]
    logs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    assert helpers.fork_two(loop.script, *flags, logs=logs) == [0, 0], [log.read_text() for log in logs]
    assert_same_run(tmp_path / "run", loop.single)
    first, second = (log.read_text() for log in logs)
    assert "step 3 after" in first and second == "", "only the first process speaks"
    skipped = [line for line in first.splitlines() if line.startswith("skipped ")]
    for name in helpers.DAMAGED[loop.kind]:
        assert sum(name in line for line in skipped) == 1, name
    assert results(tmp_path / "run")["skipped_files"] == len(skipped)
    states = checkpoint(tmp_path / "run")["rng"]
    assert not torch.equal(states[0][0], states[1][0])


def test_two_processes_drop_other_layers(data, monkeypatch, tmp_path):
    """A layer that one micro-batch drops has its gradient from the others."""
    it = LOOPS["padded"]
    flags = [*it.flags, "--data", data / it.source, "--layer_drop", 0.5, "--steps", 3, "--out"]
    logs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    ends = helpers.fork_two(it.script, *flags, tmp_path / "double", logs=logs, prepare=seed_by_content)
    assert ends == [0, 0], [log.read_text() for log in logs]
    monkeypatch.setattr(Encoder, "transform", Encoder.transform)  # puts it back
    seed_by_content()
    done(call(it.script, *flags, tmp_path / "single"))
    assert_same_run(tmp_path / "double", tmp_path / "single")


def test_torchrun_trains_the_same_run(data, tmp_path):
    flags = [*LOOPS["vision"].flags, "--micro_batch", 2, "--data", data / "vision", "--steps", 3, "--out"]
    done(call(train_vision, *flags, tmp_path / "single"))
    done(helpers.launch(train_vision, *flags, tmp_path / "double", processes=2))
    assert_same_run(tmp_path / "double", tmp_path / "single")


def test_spawned_workers_load_the_same(loop, tmp_path):
    """Spawned ones, as on Windows and macOS, get the data sets pickled."""
    if "--masks" in loop.flags:
        pytest.skip("as without --masks")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        done(call(loop.script, *loop.flags, "--steps", 3, "--workers", 2, "--out", tmp_path / "run"))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert helpers.timeless(tmp_path / "run") == helpers.timeless(loop.single)


# ---- signals, a folder in use, a full disk ---------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_all_processes_stop_and_save_when_one_is_told_to(data, tmp_path, number):
    flags = [
        *TINY["vision"],
        "--data",
        data / "vision",
        "--workers",
        1,
        "--steps",
        1000,
        "--out",
        tmp_path / "run",
    ]
    logs, tell = [tmp_path / "0", tmp_path / "1"], partial(helpers.send_after_step, 2, number, rank="1")
    ends = helpers.fork_two(train_vision, *flags, logs=logs, prepare=tell)
    assert ends == 2 * [128 + number], [log.read_text() for log in logs]
    assert checkpoint(tmp_path / "run")["step"] in (2, 3)
    assert logs[0].read_text().count("saved at step") == 1 and logs[1].read_text() == ""


def press_twice():
    for _ in range(2):
        helpers.send_after_step(2, signal.SIGINT)


def test_a_second_ctrl_c_ends_a_run_at_once(data, tmp_path):
    flags = [*TINY["vision"], "--data", data / "vision", "--steps", 1000, "--out", tmp_path / "run"]
    process = helpers.fork(train_vision, *flags, log=tmp_path / "log", prepare=press_twice)
    process.join()
    assert process.exitcode == 130 and not (tmp_path / "run" / "ckpt.pt").exists()


def test_two_runs_in_one_folder(data, tmp_path):
    flags = ["--data", data / "vision", "--save_every", 1, "--steps", 1000, "--out", tmp_path / "run"]
    wait = partial(helpers.send_after_step, 2, signal.SIGSTOP)
    process = helpers.fork(train_vision, *TINY["vision"], *flags, log=tmp_path / "log", prepare=wait)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or '"step": 2,' not in metrics.read_text():
            process.join(0.1)
        line = refused(call(train_vision, *TINY["vision"], *flags, "--resume"))
    finally:
        process.kill()
        process.join()
    assert "run: a live process writes to it" in line
    done(call(train_vision, *flags, "--resume", "--steps", 3))
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [700, 2000, 40_000])  # bytes: config.json, metrics.jsonl, ckpt.pt do not fit
def test_a_full_disk_is_one_line_and_keeps_what_there_was(data, tmp_path, size):
    flags = ["--data", data / "vision", "--steps", 9, "--save_every", 4, "--out", tmp_path / "run"]
    done(call(train_vision, *TINY["vision"], *flags, "--steps", 2))
    before, whole = checkpoint(tmp_path / "run"), sorted(os.listdir(tmp_path / "run"))
    log, full = tmp_path / "log", partial(helpers.limit_files, size)
    process = helpers.fork(train_vision, *flags, "--resume", log=log, prepare=full)
    process.join()
    assert process.exitcode == 2 and log.read_text().splitlines()[-1].startswith("train_vision.py: "), (
        log.read_text()
    )
    assert "Traceback" not in log.read_text() and "make room" in log.read_text()
    assert_same(before, checkpoint(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith("}\n"), "no half line"
    assert sorted(os.listdir(tmp_path / "run")) == whole
    done(call(train_vision, *flags, "--resume"))


# ---- float16 ---------------------------------------------------------------------------------------------


REAL_SCALER = torch.amp.GradScaler


def start_at(scale, killed=None):
    torch.amp.GradScaler = partial(REAL_SCALER, init_scale=scale)
    if killed:
        helpers.send_after_step(killed)


def test_float16(loop, monkeypatch, tmp_path):
    """Updates that overflow move nothing but the scale, which a resumed run and all processes share."""
    monkeypatch.setattr(torch.amp, "GradScaler", REAL_SCALER)  # puts it back
    flags = [*loop.flags, *loop.split.split(), "--dtype", "float16", "--steps", 4, "--save_every", 2, "--out"]
    start_at(2.0**60)
    done(call(loop.script, *flags, tmp_path / "large"))
    scale = checkpoint(tmp_path / "large")["scaler"]["scale"]
    assert scale < 2**60
    start_at(scale)
    done(call(loop.script, *flags, tmp_path / "fits"))
    kill = partial(start_at, 2.0**60, killed=3)
    process = helpers.fork(loop.script, *flags, tmp_path / "killed", log=tmp_path / "log", prepare=kill)
    process.join()
    done(call(loop.script, "--out", tmp_path / "killed", "--resume"))
    expected = checkpoint(tmp_path / "large")
    for part in ("student", "teacher", "optimizer", "rng", "step"):
        assert_same(checkpoint(tmp_path / "killed")[part], expected[part])
        assert_same(
            checkpoint(tmp_path / "fits")[part], expected[part], atol=1e-4
        )  # some steps at another scale
    assert helpers.timeless(tmp_path / "killed") == helpers.timeless(tmp_path / "large")
    logs, start = [tmp_path / "0", tmp_path / "1"], partial(start_at, 2.0**60)
    ends = helpers.fork_two(loop.script, *flags, tmp_path / "two", logs=logs, prepare=start)
    assert ends == [0, 0], [log.read_text() for log in logs]
    assert checkpoint(tmp_path / "two")["scaler"]["scale"] in (
        scale,
        scale / 2,
    )  # DDP halves the gradients later
    for row, other in zip(rows(tmp_path / "two"), rows(tmp_path / "large"), strict=True):
        assert row.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-2)


def test_float16_without_a_scale_that_fits_ends_the_run(data, monkeypatch, tmp_path):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda weights, clip: [w.grad.fill_(torch.inf) for w in weights]
    )
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, optimizer: None)
    flags = [*TINY["vision"], "--data", data / "vision", "--dtype", "float16", "--out", tmp_path / "run"]
    assert "diverged" in refused(call(train_vision, *flags))
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]

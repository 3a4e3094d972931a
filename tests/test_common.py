"""common.py: options, exit statuses, schedules, checkpoints, resuming, the log."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import RunConfig, UserError, option
from model import Teacher

CPU = torch.device("cpu")


@dataclass
class Config(RunConfig):
    steps: int = option(10, "how many", min_=1)
    lr: float = option(0.1, "how fast", min_=0, max_=1)
    shape: str = option("round", "which", ("round", "square"))
    fast: bool = option(True, "whether")
    files: list = option([], "pictures")
    guard_after: int = 5  # no option: presets and files set it


PRESETS = {"small": {}, "big": {"steps": 1000, "lr": 0.5, "guard_after": -1}}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy.py"])


def parse(flags=""):
    sys.argv[1:] = flags.split()
    return common.parse(Config, PRESETS, "A toy.", "toy")


def end(capsys, main):
    with pytest.raises(SystemExit) as error:
        common.run(main)
    return error.value.code, capsys.readouterr().err


# ---- options ---------------------------------------------------------------------------------------------


def test_options_beat_the_preset_and_the_preset_beats_the_defaults():
    config = parse("--preset big --lr 0.7")
    assert (config.steps, config.lr, config.shape, config.guard_after) == (1000, 0.7, "round", -1)
    assert (parse().preset, parse().steps, parse().out) == ("small", 10, "runs/toy-small")
    parse().files.append("a.png")
    assert parse().files == [], "a default is not shared"


def test_a_resumed_run_keeps_its_own_values_except_those_given():
    common.Log(parse("--preset big --steps 77 --shape square --out a"), 0, 0, CPU, "images")
    config = parse("--out a --resume --lr 0.9")
    assert (config.preset, config.steps, config.shape, config.guard_after) == ("big", 77, "square", -1)
    assert config.resume and config.lr == 0.9
    assert parse("--out a --resume --preset big").steps == 1000, "a preset that is given counts"
    assert parse("--out a").steps == parse("--out b --resume").steps == 10
    Path("a/config.json").write_text("{")
    with pytest.raises(UserError, match="a/config.json: damaged"):
        parse("--out a --resume")


def test_values():
    flags = ("--fast --lr 1", "--fast true", "--fast=FALSE")
    assert [parse(flag).fast for flag in flags] == [True, True, False]
    assert parse("--steps 1e5").steps == 100_000 and type(parse("--steps 1e5").steps) is int
    assert parse(f"--steps {2**53 + 1}").steps == 2**53 + 1 and parse("--files a b").files == ["a", "b"]
    assert parse("--lr 1e-1").lr == 0.1 and type(parse("--lr 1").lr) is float


WRONG = """--stps 3 | --ste 3 | --res | stray | --steps | --preset huge | --shape flat | --lr 1.5 | --fast 2
    --steps many | --steps 1.5 | --steps nan | --steps 1e999 | --steps 0 | --lr inf | --guard_after 5"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in WRONG.replace("\n", "|").split("|")])
def test_wrong_options_are_one_line_and_status_2(capsys, flags):
    status, line = end(capsys, lambda: parse(flags))
    assert status == 2 and line.startswith("toy.py: ") and line.count("\n") == 1
    assert all(word in line for word in flags.split()), line


# ---- processes -------------------------------------------------------------------------------------------


def test_exit_status(capsys, monkeypatch):
    assert end(capsys, lambda: None) == (0, "")
    assert end(capsys, lambda: signal.raise_signal(signal.SIGINT)) == (130, "")
    for where in ("", "Caught UserError in worker\n  line 3\ncommon.UserError: "):
        status = end(capsys, lambda where=where: common.require(False, f"{where}x.pt: gone"))
        assert status == (2, "toy.py: x.pt: gone\n")
    monkeypatch.setenv("RANK", "1")
    assert end(capsys, lambda: common.require(False, "x.pt: gone"))[1], "RANK alone is no process group"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert end(capsys, lambda: common.require(False, "x.pt: gone")) == (2, ""), "one line for all processes"
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


@pytest.mark.parametrize(
    "names", ["WORLD_SIZE", "SLURM_NTASKS", "RANK", "RANK MASTER_ADDR", "RANK WORLD_SIZE"]
)
def test_half_a_process_group_is_refused(capsys, monkeypatch, names):
    for name in names.split():
        monkeypatch.setenv(name, "4")
    status, line = end(capsys, lambda: common.start_processes("cpu", "auto"))
    assert status == 2 and line.startswith(f"toy.py: {names.split()[0]} is ") and "torchrun" in line


def test_one_process_alone(monkeypatch):
    for name, value in {"WORLD_SIZE": "1", "SLURM_NTASKS": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    rank, world, device, autocast, scaler = common.start_processes("cpu", "float16")
    assert (rank, world, device) == (0, 1, CPU) and scaler.is_enabled()
    assert autocast.fast_dtype == torch.float16 and not common.start_processes("cpu", "auto")[4].is_enabled()
    with pytest.raises(UserError, match="--device mps: torch finds no such device; use --device"):
        common.start_processes("mps", "auto")


GPUS = {(9, 0): "bfloat16", (8, 6): "bfloat16", (7, 5): "float16", (7, 0): "float16", (6, 1): "float32"}


@pytest.mark.parametrize("capability", GPUS)
def test_auto_dtype_of_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: (*args, options["enabled"]))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: enabled)
    monkeypatch.setenv("LOCAL_RANK", "1")
    _, _, device, autocast, scaled = common.start_processes("auto", "auto")
    name = GPUS[capability]
    assert device == torch.device("cuda", 1) and scaled == (name == "float16")
    assert autocast[2] == (name != "float32") and (not autocast[2] or autocast[1] == getattr(torch, name))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="2 GPUs; use --nproc_per_node=2"):
        common.start_processes("cuda", "auto")


def test_a_restart_by_torchrun_resumes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not parse().resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse().resume


@pytest.mark.parametrize("schedule", ["cosine", "linear", "tri_stage"])
@pytest.mark.parametrize("warmup, final", [(0, 0.1), (0.2, 0.01), (1, 0.5)])
def test_learning_rate(schedule, warmup, final):
    cfg = SimpleNamespace(schedule=schedule, steps=50, lr=0.3, warmup=warmup, decay=0.4, final_scale=final)
    first, low = 50 * warmup, 0.3 * final
    for step in range(1, 51):
        if step <= first:
            expected = 0.3 * step / first
        elif schedule == "cosine":
            expected = low + (0.3 - low) * math.cos(math.pi / 2 * (step - first) / (50 - first)) ** 2
        elif schedule == "linear":
            expected = 0.3 + (low - 0.3) * (step - first) / (50 - first)
        else:
            expected = 0.3 if step <= 30 else 0.3 * math.exp(math.log(final) * (step - 30) / 20)
        assert common.lr_at(step, cfg) == pytest.approx(expected, rel=1e-9)


def test_what_is_due_and_how_a_batch_splits():
    assert [s for s in range(1, 11) if common.due(s, 4, 10)] == [4, 8, 10] and not common.due(4, 0, 10)
    splits = {(32, 0, 4): 1, (32, 8, 2): 2, (30, 10, 1): 3, (7, 100, 1): 1}
    assert all(common.accumulation_steps(*split) == count for split, count in splits.items())
    with pytest.raises(UserError, match="--global_batch 30.*multiple of 4"):
        common.accumulation_steps(30, 8, 1)


# ---- checkpoints -----------------------------------------------------------------------------------------


def test_a_crash_while_saving_leaves_the_old_checkpoint(monkeypatch):
    path, state = Path("ckpt.pt"), {"w": torch.randn(3, 2), "step": 5, "config": {"out": "a"}}
    common.save(path, state)

    def crash(state, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(UserError, match="ckpt.pt.*No space"):
        common.save(path, {})
    back = common.load(path)
    assert torch.equal(back.pop("w"), state.pop("w")) and back == state and os.listdir() == ["ckpt.pt"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_what_is_no_checkpoint_is_one_line_and_never_run():
    torch.save(Malicious(), "malicious.pt")
    torch.save({"w": torch.randn(50, 50)}, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:5000])
    Path("empty.pt").touch()
    for name in ("empty", "cut", "malicious", "missing"):
        with pytest.raises(UserError, match=f"^{name}.pt: [^\n]*$"):
            common.load(Path(f"{name}.pt"))
    assert not Path("it-ran").exists()


def train(cfg, resumed_at=0):
    """A toy run with dropout: trains to cfg.steps -> all that must not depend on where it was resumed."""
    torch.manual_seed(resumed_at)  # a new process starts from other weights and random numbers
    student = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    teacher = Teacher(student)
    optimizer, scaler = (
        torch.optim.AdamW(student.parameters(), lr=cfg.lr),
        torch.amp.GradScaler(enabled=False),
    )
    step = common.load_run(cfg, 0, student, teacher, optimizer, scaler)["step"]
    assert step == resumed_at
    for x in torch.arange(4 * cfg.steps).view(-1, 4).float().sin()[step:]:
        optimizer.zero_grad()
        student(x).square().sum().backward()
        optimizer.step()
        teacher.update(student, 0.9)
    log = common.Log(cfg, step, 0, CPU, "images")
    log.checkpoint(cfg.steps, student, teacher, optimizer, scaler)
    assert optimizer.param_groups[0]["lr"] == cfg.lr
    moments = optimizer.state[student[0].weight].values()
    return [*student.parameters(), *teacher.parameters(), *moments, torch.rand(3)]


def test_a_resumed_run_is_the_same_to_the_last_bit():
    expected = train(parse("--out a --steps 7"))
    train(parse("--out b --steps 4"))
    resumed = train(parse("--out b --steps 7 --resume"), resumed_at=4)
    assert all(torch.equal(x, y) for x, y in zip(resumed, expected, strict=True))
    train(parse("--out b --steps 8 --resume --lr 0.5"), resumed_at=7)  # another learning rate


def test_weights_of_another_model_are_one_line():
    linear, weight = torch.nn.Linear(2, 3), torch.randn(3, 2)
    for other in ({}, {"bias": torch.zeros(4)}, {"bias": torch.zeros(3), "bias2": torch.zeros(3)}):
        with pytest.raises(UserError, match="^x.pt: .*bias"):
            common.load_weights(linear, {"weight": weight} | other, "x.pt")
    common.load_weights(linear, {"weight": weight}, "x.pt", fresh=("bias",))
    assert torch.equal(linear.weight, weight)
    with pytest.raises(UserError, match="--heads 4"):
        common.check_same_model(SimpleNamespace(heads=2), {"heads": 4}, "x.pt")


# ---- the log ---------------------------------------------------------------------------------------------


def test_the_log_goes_on_after_the_checkpoint(capsys):
    common.Log(parse("--out a"), 0, 1, CPU, "images").write(1, {"loss": 1.0})
    assert os.listdir() == [], "only the first process writes"
    log = common.Log(parse("--out a"), 0, 0, CPU, "images")
    log.write(0, {}, {"probe": 0.1})
    for _batch in log.watch([{"skipped": ["x.png: broken"]}, {}, {"skipped": ["x.png: broken"]}]):
        log.advance(32)
    log.write(3, {"loss": torch.tensor(0.5)})
    with open("a/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.4}\n{"step": 9, "lo')  # killed while writing
    with pytest.raises(UserError, match="--out a: holds a run"):
        common.Log(parse("--out a"), 0, 0, CPU, "images")
    log = common.Log(parse("--out a --resume"), 3, 0, CPU, "images")
    lines = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3] and lines[1]["images_per_s"] > 0
    log.write(4, {"loss": 0.3}, {"probe": 0.7})
    log.finish(accuracy=0.9)
    results = json.loads(Path("a/results.json").read_text())
    expected = {"final_loss": 0.3, "probe_start": 0.1, "probe_end": 0.7, "accuracy": 0.9}
    assert expected.items() <= results.items() and 0.05 < results["peak_memory_gb"] < 64
    assert capsys.readouterr().out.count("skipped x.png: broken\n") == 1


def test_files_that_are_skipped_are_summed_up(capsys):
    log = common.Log(parse("--out a"), 0, 0, CPU, "images")
    names = [f"{number:03}.png: broken" for number in range(40)]
    log.report(names[:8])
    log.report(names[:30])
    log.report(names)
    log.finish()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert len(lines) == 11 and lines[9] == "skipped 009.png: broken" and "40" in lines[-1]
    assert json.loads(Path("a/results.json").read_text())["skipped_files"] == 40


def test_scores_that_are_no_longer_measured_are_no_result():
    """A run is resumed on data without labels."""
    log = common.Log(parse("--out a"), 0, 0, CPU, "images")
    for step, probe in ((0, 0.1), (3, 0.5)):
        log.write(step, {"loss": 2.0} if step else {}, {"explained_variance": 0.0, "probe": probe})
    log = common.Log(parse("--out a --resume"), 3, 0, CPU, "images")
    log.write(4, {"loss": 1.0}, {"explained_variance": 0.2})
    log.finish()
    results = json.loads(Path("a/results.json").read_text())
    assert results["explained_variance_end"] == 0.2 and "probe_end" not in results

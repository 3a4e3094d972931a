"""tools/ablate.py: small grids in real processes, stopped and run again; what it makes of kept results."""

import signal
import sys
import time

import numpy as np
import pytest

import common
import finetune
import train_vision
from tests.helpers import FAST, TINY, call, checkpoint, done, refused, results, rows
from tools import ablate

GRID = [train_vision.__file__, "--option", "beta", "--metric", "probe", "final_loss", "--out"]


def cells(folder):
    lines = (folder / "table.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line and "---" not in line]


def test_a_grid_that_is_stopped_goes_on_and_has_the_same_table(data, tmp_path, one_thread, monkeypatch):
    out, whole, values = tmp_path / "grid", tmp_path / "whole", ["--values", 0, 2, "--seeds", 0, 1]
    flags = [*TINY["vision"], "--data", data / "vision", "--steps", 30]

    def sleep(seconds, begun=out / "0-s1" / "metrics.jsonl", real=time.sleep):
        return signal.raise_signal(signal.SIGTERM) if begun.exists() else real(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", sleep)
        code, _, told = call(ablate, *GRID, out, *values, "--jobs", 1, "--", *flags)
    assert code == 128 + signal.SIGTERM and "0-s0: done (1 of 4)" in told
    assert checkpoint(out / "0-s1")["step"] < 30 and not (out / "2-s0").exists()
    finished = (out / "0-s0" / "results.json").stat().st_mtime_ns
    common.received.clear()  # as in a new process
    assert "holds" in refused(call(ablate, *GRID, out, *values, "--", *flags, "--lr", 1))  # another grid's
    code, _, told = call(ablate, *GRID, out, *values, "--jobs", 2, "--", *flags)
    assert code == 0 and "0-s0" not in told and "(4 of 4)" in told
    assert (out / "0-s0" / "results.json").stat().st_mtime_ns == finished
    assert [row["step"] for row in rows(out / "0-s1")] == list(range(31))
    for value, seed in ((0, 0), (0, 1), (2, 0), (2, 1)):
        done(call(train_vision, *flags, "--beta", value, "--seed", seed, "--out", whole / f"{value}-s{seed}"))
    done(call(ablate, *GRID, whole, *values, "--report"))
    assert cells(out) == cells(whole) and len(cells(out)) == 6


def test_a_run_that_fails_is_told_and_the_others_are_fine_tuned(data, tmp_path):
    flags = [*FAST.split(), "--data", str(data / "vision"), "--steps", "2", "--global_batch", "8"]
    grid = [*GRID, tmp_path, "--option", "beta crop_min", "--values", "-1 0.3", "2 0.5", "--seeds", 3]
    grid += ["--metric", "top1", "--then", finetune.__file__, " ".join(flags)]
    code, _, told = call(ablate, *grid, "--", *TINY["vision"], *flags)
    assert code == 1 and "_1_0.3-s3: failed with status 2" in told and "1 runs have failed" in told
    assert "--beta: -1 is not" in (tmp_path / "_1_0.3-s3" / "log.txt").read_text()
    first, tuned = tmp_path / "2_0.5-s3", tmp_path / "2_0.5-s3-tuned"
    top1, made, config = results(tuned)["top1"], checkpoint(tuned)["finetune"], checkpoint(first)["config"]
    assert cells(tmp_path)[1:] == [["-1 0.3", *"--0--0"], ["2 0.5", f"{top1:.4f}", *"-1--0"]]
    assert (config["beta"], config["crop_min"]) == (2, 0.5)
    assert (made["seed"], made["init"]) == (3, str(first / "ckpt.pt"))


def test_the_report_and_wrong_input(tmp_path, monkeypatch):
    a, b = np.array([0.5, 0.25, 0.75]), np.array([0.5, 0.875, 1])  # of seeds 0, 1, 2 and of 1, 2, 7
    names = [*("1-s0", "1-s1", "1-s2"), *("a_2-s1", "a_2-s2", "a_2-s7"), "3-s0"]
    for name, probe in zip(names, [*a, *b, 0.125], strict=True):
        common.save(tmp_path / name / "results.json", {"probe_end": probe, "loss": 1})
    grid = [*GRID, tmp_path, "--report", "--values", 1, "a 2", 3, "--seeds", 0, 1, 2, 7, "--metric", "probe"]
    done(call(ablate, *grid))
    (head, *lines), gain = cells(tmp_path), b[:2] - a[1:]
    paired = [f"+{gain.mean():.4f}", f"{gain.std(ddof=1) / 2**0.5:.4f}", "2"]
    assert head[:2] == ["beta", "probe_end"] and lines[2] == ["3", "0.1250", *"-1", "-0.3750", *"-1"]
    assert lines[0] == ["1", f"{a.mean():.4f}", f"{a.std(ddof=1):.4f}", *"3--0"]
    assert lines[1] == ["a 2", f"{b.mean():.4f}", f"{b.std(ddof=1):.4f}", "3", *paired]
    for words, told in (
        (["--metric", "wer"], "have loss, probe_end"),
        (["--values"], "--values: expected"),
        (["--option", "seed"], "--option seed: not an option"),
        (["--option", "tau_0 tau_e"], "'1': give one of each --option"),
        (["--values", "a b", "a_b"], "share a folder"),
        (["--then", ablate.__file__], "ablate.py: not a train script"),
    ):
        assert told in refused(call(ablate, *grid, *words), by="ablate.py: ", silent=True)
    pytest.importorskip("matplotlib", reason="requirements-dev.txt")
    drawn = [(done(call(ablate, *grid)), (tmp_path / "figure.svg").read_text())[1] for _ in range(2)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "requirements-dev.txt" in refused(call(ablate, *grid))
    assert drawn[0] == drawn[1] and all(f">{text}<" in drawn[0] for text in ("a 2", "beta", "probe_end"))

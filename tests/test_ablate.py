"""tools/ablate.py: small grids in real processes, stopped and run again; what it makes of kept results."""

import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import common
import finetune
import train_vision
from tests import helpers
from tests.helpers import call, done, refused
from tools import ablate

TRAIN = train_vision.__file__
GRID = [TRAIN, "--option", "beta", "--metric", "probe", "final_loss"]
RESULTS = {"1": {0: 0.5, 1: 0.25, 2: 0.75}, "2 x": {1: 0.5, 2: 0.875, 7: 1}, "3": {0: 0.125}}


def cells(folder):
    """table.md -> [[cell]], without the rules."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def kept(tmp_path):
    """The flags that report RESULTS, which are kept in the folders of a grid."""
    for value, column in RESULTS.items():
        for seed, number in column.items():
            folder = tmp_path / f"{value.replace(' ', '_')}-s{seed}"
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps({"probe_end": number, "loss": 1}))
    return [TRAIN, "--option", "target", "--values", *RESULTS, "--seeds", 0, 1, 2, 7, "--out", tmp_path]


def stop_when(path):
    """Sends this process SIGTERM as soon as there is such a file."""
    while not path.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_grid_that_is_stopped_goes_on_and_has_the_same_table(data, tmp_path, one_thread):
    out, whole = tmp_path / "grid", tmp_path / "whole"
    flags = [*helpers.TINY["vision"], "--data", data / "vision", "--steps", 30]
    grid = [*GRID, "--values", 0, 2, "--seeds", 0, 1, "--out"]
    threading.Thread(target=stop_when, args=[out / "0-s1" / "metrics.jsonl"], daemon=True).start()
    code, _, told = call(ablate, *grid, out, "--jobs", 1, "--", *flags)
    assert code == 128 + signal.SIGTERM and "0-s0: done (1 of 4)" in told
    assert helpers.checkpoint(out / "0-s1")["step"] < 30 and not (out / "2-s0").exists()
    finished = (out / "0-s0" / "results.json").stat().st_mtime_ns

    common.received.clear()  # as in a new process
    assert "holds" in refused(call(ablate, *grid, out, "--", *flags, "--lr", 1))  # would mix two grids
    code, _, told = call(ablate, *grid, out, "--jobs", 2, "--", *flags)
    assert code == 0 and "0-s0" not in told and "(4 of 4)" in told
    assert (out / "0-s0" / "results.json").stat().st_mtime_ns == finished
    assert [row["step"] for row in helpers.rows(out / "0-s1")] == list(range(31))
    for value, seed in (("0", 0), ("0", 1), ("2", 0), ("2", 1)):
        own = ["--beta", value, "--seed", seed, "--out", whole / f"{value}-s{seed}"]
        done(call(train_vision, *flags, *own))
    done(call(ablate, *grid, whole, "--report"))
    assert cells(out) == cells(whole) and len(cells(out)) == 6


def test_a_run_that_fails_is_told_and_the_others_are_fine_tuned(data, tmp_path):
    flags = [*helpers.FAST.split(), "--data", str(data / "vision"), "--steps", "2", "--global_batch", "8"]
    then = ["--then", finetune.__file__, " ".join(flags)]
    grid = [*GRID, "top1", "--values", -1, 2, "--seeds", 3, "--out", tmp_path, *then]
    code, _, told = call(ablate, *grid, "--", *helpers.TINY["vision"], *flags)
    assert code == 1 and "_1-s3: failed with status 2" in told and "1 runs have failed" in told
    assert "--beta: -1 is not" in (tmp_path / "_1-s3" / "log.txt").read_text()
    top1 = f"{helpers.results(tmp_path / '2-s3-tuned')['top1']:.4f}"
    assert cells(tmp_path)[-2:] == [["-1", *"--0--0"], ["2", top1, *"-1--0"]]
    made = helpers.checkpoint(tmp_path / "2-s3-tuned")["finetune"]
    assert made["seed"] == 3 and made["init"] == str(tmp_path / "2-s3" / "ckpt.pt")


def test_the_table_has_means_and_paired_differences(kept, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in done(call(ablate, *kept, "--metric", "probe", "--report"))
    head, *rows = cells(tmp_path)
    assert head[:2] == ["target", "probe_end"] and not (tmp_path / "figure.svg").exists()
    a, b = np.array([0.5, 0.25, 0.75]), np.array([0.5, 0.875, 1])
    gain = np.array([0.5 - 0.25, 0.875 - 0.75])  # of seeds 1 and 2
    error = gain.std(ddof=1) / np.sqrt(2)
    assert rows[0] == ["1", f"{a.mean():.4f}", f"{a.std(ddof=1):.4f}", *"3--0"]
    assert rows[1][:4] == ["2 x", f"{b.mean():.4f}", f"{b.std(ddof=1):.4f}", "3"]
    assert rows[1][4:] == [f"+{gain.mean():.4f}", f"{error:.4f}", "2"]
    assert rows[2] == ["3", "0.1250", "-", "1", "-0.3750", "-", "1"]


def test_the_figure_shows_every_value_and_is_the_same_each_time(kept, tmp_path):
    pytest.importorskip("matplotlib", reason="requirements-dev.txt")
    figures = []
    for _ in range(2):
        done(call(ablate, *kept, "--metric", "probe_end", "loss", "--report"))
        figures.append((tmp_path / "figure.svg").read_text())
    assert figures[0] == figures[1] and all(f">{text}<" in figures[0] for text in ("2 x", "target", "loss"))


def test_wrong_input_is_told_in_one_line(kept, tmp_path):
    def error(flags):
        return refused(call(ablate, *flags, "--metric", "wer", "--report"), by="ablate.py: ", silent=True)

    assert "--metric wer: the runs" in (told := error(kept)) and "loss, probe_end" in told
    assert "train.py: not a train script" in error(["train.py", *kept[1:]])
    assert "not a train script" in error([ablate.__file__, *kept[1:]])
    assert "--values" in error([*kept, "--values"])
    assert "seed: not an option" in error([*kept, "--option", "seed"])
    assert "topk: not an option" in error([*kept, "--option", "topk"])
    assert "'1': give a value of each of tau_0, tau_e" in error([*kept, "--option", "tau_0 tau_e"])
    assert "share a folder" in error([*kept, "--values", "a b", "a_b"])
    assert "--init: the grid" in error([*kept, "--then", finetune.__file__, "--init x"])
    result = call(ablate, *kept, "--metric", "wer", "--", "--target", "ffn")
    assert "--target: the grid" in refused(result)

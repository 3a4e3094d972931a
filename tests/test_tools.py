"""tools/table.py and tools/plot.py on small runs, and every command and log that RESULTS.md cites."""

import glob
import json
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest

from tests.helpers import call, done, refused
from tools import ablate, plot, table

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "RESULTS.md").read_text()
COMMANDS = re.findall(r"^python -m tools\.(ablate|plot|table) (.*)$", RESULTS, re.MULTILINE)
LINES = [{"step": 0, "probe": 0.1}, {"step": 1, "loss": 1.0}]
LINES += [{"step": 10, "loss": 0.5, "probe": 0.3}, {"step": 20, "loss": 0.75, "probe": 0.4}]
CURVES = {"probe": {0: 0.1, 10: 0.3, 20: 0.4}, "loss": {1: 1.0, 10: 0.5, 20: 0.75}}


def make_run(folder, results=None, metrics=None):
    folder.mkdir(parents=True)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def cells(result):
    """What tools.table printed -> its rows without the rule, each a list of cells."""
    out = done(result)
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    assert all(len(row) == len(head) for row in rows + [rule])
    return [head, *rows]


def test_table_has_a_row_per_run_and_a_column_per_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a"), {"top1": 0.51249, "best_top1": 0.6, "best_step": 16000, "note": "text"})
    make_run(Path("b"), {"top1": 1, "best_top1": 0.0625})
    rows = cells(call(table, "a", "b", "--keys", "top1,best_step"))
    assert rows == [["run", "top1", "best_step"], ["a", "0.512", "16000"], ["b", "1", "-"]]
    assert cells(call(table, "a", "b"))[0] == ["run", "top1", "best_top1", "best_step"]


def test_table_averages_the_seeds_of_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"pre-s0": 0.41, "pre-s1": 0.44, "pre-s12": 0.47, "none-s0": 0.30, "pre-s1-long": 0.5}
    for name, value in values.items():
        make_run(Path(name), {"top1": value})
    std = statistics.stdev([0.41, 0.44, 0.47])
    rows = cells(call(table, *values, "--group", "seed"))[1:]
    assert rows == [["pre", f"0.440 ± {std:.3f} (3)"], ["none", "0.300"], ["pre-s1-long", "0.500"]]
    assert len(cells(call(table, *values))) == 1 + len(values)


def test_table_says_in_one_line_what_it_cannot_read(tmp_path):
    good = make_run(tmp_path / "good", {"top1": 0.5, "top5": 0.9})
    unfinished = make_run(tmp_path / "unfinished", metrics=LINES)
    assert "unfinished" in refused(call(table, good, unfinished))
    (unfinished / "results.json").write_text('{"top1": 0.5')
    assert "unfinished" in refused(call(table, good, unfinished))
    error = refused(call(table, good, "--keys", "top1,wer"))
    assert "wer" in error and "top1, top5" in error


def test_curves_are_read_from_a_run_that_was_killed(tmp_path):
    run = make_run(tmp_path / "run", metrics=LINES)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    curves = plot.read_curves(run)
    assert curves == CURVES and list(curves["probe"]) == [0, 10, 20]


def test_plot_draws_a_panel_per_key_and_a_line_per_run(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="requirements-dev.txt")
    drawn = {}

    def record(figure, path, **options):
        for panel in figure.axes:
            drawn[panel.get_title()] = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
        return save(figure, path, **options)

    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", record)
    a = make_run(tmp_path / "a", metrics=LINES)
    b = make_run(tmp_path / "b", metrics=[{"step": 5, "loss": 2.0, "lr": 1e-3}])
    for name in ("new/one.svg", "new/two.svg", "new/one.png"):
        assert name in done(call(plot, a, b, "--out", tmp_path / name, "--labels", "ours,theirs"))
    assert drawn == {
        "loss": {"ours": [[1, 1.0], [10, 0.5], [20, 0.75]], "theirs": [[5, 2.0]]},
        "probe": {"ours": [[0, 0.1], [10, 0.3], [20, 0.4]], "theirs": []},
    }
    text = (tmp_path / "new/one.svg").read_text()
    assert ">probe<" in text and ">theirs<" in text and text == (tmp_path / "new/two.svg").read_text()


def test_plot_says_in_one_line_what_it_cannot_read(tmp_path):
    good = make_run(tmp_path / "good", metrics=LINES)
    out = ("--out", tmp_path / "curves.svg")
    assert "nowhere" in refused(call(plot, tmp_path / "nowhere", *out))
    assert "probe, loss" in refused(call(plot, good, *out, "--keys", "loss,wer"))
    assert "curves.gif" in refused(call(plot, good, "--out", tmp_path / "curves.gif"))
    assert "--labels" in refused(call(plot, good, *out, "--labels", "a,b"))
    (good / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert "good" in refused(call(plot, good, *out))


@pytest.mark.parametrize("tool, options", COMMANDS, ids=[" ".join(command)[:40] for command in COMMANDS])
def test_commands_of_the_results_run(tool, options, tmp_path, monkeypatch):
    if tool != "table":
        pytest.importorskip("matplotlib", reason="requirements-dev.txt")
    if tool == "plot":
        options += f" --out {tmp_path}/curves.svg"
    monkeypatch.chdir(ROOT)
    if tool == "ablate":  # writes beside the kept logs
        shutil.copytree("assets", tmp_path / "assets")
        shutil.copy("train_vision.py", tmp_path)
        monkeypatch.chdir(tmp_path)
    words = [match for word in shlex.split(options) for match in sorted(glob.glob(word)) or [word]]
    printed = done(call({"ablate": ablate, "plot": plot, "table": table}[tool], *words))
    if tool == "ablate":
        assert printed.split("\n\n")[0] in RESULTS  # the first table


def test_results_cite_what_is_there_and_nothing_else_is_kept(monkeypatch):
    monkeypatch.chdir(ROOT)
    patterns = set(re.findall(r"assets/[\w./?*-]*[\w?*]", RESULTS))
    assert all(glob.glob(pattern) for pattern in patterns), patterns
    cited = {Path(path) for pattern in patterns for path in glob.glob(pattern)}
    files = [path for path in Path("assets").rglob("*") if path.is_file()]
    assert not [path for path in files if not cited & {path, *path.parents}]

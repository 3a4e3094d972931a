"""tools/table.py and tools/plot.py on small folders of runs, good and broken."""

import json
import re
import statistics
import sys
from functools import partial

import pytest

from tests import helpers
from tests.helpers import call
from tools import plot, table

refused = partial(helpers.refused, silent=True)


def make_run(folder, results=None, metrics=None):
    folder.mkdir(parents=True)
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def cells(out):
    """A Markdown table -> its rows, each a list of cells."""
    head, rule, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in out.splitlines())
    assert all(re.fullmatch("-+:?", cell) for cell in rule) and all(len(row) == len(head) for row in rows + [rule])
    return [head, *rows]


# ---- a table -------------------------------------------------------------------------------------------------------


def test_table_has_a_row_a_run_and_a_column_a_key(tmp_path):
    a = make_run(tmp_path / "a", {"top1": 0.51249, "best_top1": 0.6, "best_step": 16000, "seconds": 1234.56})
    b = make_run(tmp_path / "b", {"top1": 1, "best_top1": 0.0625, "best_step": 5, "note": "text", "healthy": True})
    code, out, _ = call(table, a, b / "results.json", "--keys", "top1, best_top1,best_step")
    assert code == 0
    assert cells(out) == [
        ["run", "top1", "best_top1", "best_step"], ["a", "0.512", "0.600", "16000"], ["b", "1", "0.062", "5"],
    ]  # fmt: skip
    head, first, second = cells(call(table, a, b)[1])
    assert head == ["run", "top1", "best_top1", "best_step", "seconds"]
    assert first[-1] == "1234.6" and second[-1] == "-"


def test_table_names_runs_by_what_tells_them_apart(tmp_path):
    runs = [make_run(tmp_path / name, {"top1": 0.5}) for name in ("x/run", "y/run")]
    assert [row[0] for row in cells(call(table, *runs)[1])] == ["run", "x/run", "y/run"]
    assert cells(call(table, runs[0])[1])[1][0] == "run"


def test_table_averages_the_seeds_of_a_setting(tmp_path):
    values = {"pre-s0": 0.41, "pre-s1": 0.44, "pre-s12": 0.47, "none-s0": 0.30, "pre-s1-long": 0.5}
    runs = [make_run(tmp_path / name, {"top1": value, "images": 100}) for name, value in values.items()]
    make_run(tmp_path / "none-s1", {"images": 101})
    code, out, _ = call(table, *runs, tmp_path / "none-s1", "--group", "seed")
    std = statistics.stdev([0.41, 0.44, 0.47])
    assert code == 0 and cells(out)[1:] == [
        ["pre", f"0.440 ± {std:.3f} (3)", "100.0 ± 0.0 (3)"], ["none", "0.300 (1)", "100.5 ± 0.7 (2)"],
        ["pre-s1-long", "0.500 (1)", "100 (1)"],
    ]  # fmt: skip
    assert len(cells(call(table, *runs)[1])) == 6, "not unless asked"
    assert cells(call(table, *runs[:3], "--group", r"^pre(?=-)")[1])[1][0] == "-s0"


def test_table_says_in_one_line_what_it_cannot_read(tmp_path):
    good = make_run(tmp_path / "good", {"top1": 0.5, "top5": 0.9})
    unfinished = make_run(tmp_path / "unfinished", metrics=[{"step": 1}])
    assert "unfinished" in refused(call(table, good, unfinished))
    assert "nowhere" in refused(call(table, tmp_path / "nowhere"))
    for text in ("", '{"top1": 0.5', "[1, 2]", "\x00"):
        (unfinished / "results.json").write_text(text)
        assert "unfinished" in refused(call(table, good, unfinished))
    error = refused(call(table, good, "--keys", "top1,wer"))
    assert "wer" in error and "top5" in error
    assert "--group" in refused(call(table, good, "--group", "("))
    assert "no numbers" in refused(call(table, make_run(tmp_path / "empty", {})))


# ---- curves --------------------------------------------------------------------------------------------------------

ROWS = [{"step": 1, "loss": 1.0}, {"step": 10, "loss": 0.5, "probe": 0.3}, {"step": 20, "loss": 0.75, "probe": 0.4}]


def test_curves_start_with_the_results_value_before_the_first_step(tmp_path):
    results = {"probe_start": 0.1, "probe_end": 0.4, "knn_start": 0.2, "seconds": 3.0}
    curves = plot.read_curves(make_run(tmp_path / "run", results, ROWS) / "metrics.jsonl")
    assert curves == {"probe": {0: 0.1, 10: 0.3, 20: 0.4}, "loss": {1: 1.0, 10: 0.5, 20: 0.75}}


def test_curves_of_a_run_that_goes_on_leave_out_its_half_written_line(tmp_path):
    run = make_run(tmp_path / "run", metrics=ROWS)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    assert plot.read_curves(run / "metrics.jsonl")["loss"] == {1: 1.0, 10: 0.5, 20: 0.75}


def test_plot_says_in_one_line_what_it_cannot_read(tmp_path):
    good = make_run(tmp_path / "good", metrics=ROWS)
    out = tmp_path / "curves.svg"
    assert "nowhere" in refused(call(plot, good, tmp_path / "nowhere", "--out", out))
    error = refused(call(plot, good, "--out", out, "--keys", "loss,wer"))
    assert "wer" in error and "loss, probe" in error
    assert "curves.gif" in refused(call(plot, good, "--out", tmp_path / "curves.gif"))
    assert "--labels" in refused(call(plot, good, "--out", out, "--labels", "a,b"))
    broken = make_run(tmp_path / "broken", metrics=ROWS)
    text = (broken / "metrics.jsonl").read_text()
    for line in ("{", "[]", '{"loss": 1}'):
        (broken / "metrics.jsonl").write_text(line + "\n" + text)
        assert "broken" in (error := refused(call(plot, broken, "--out", out))) and "line 1" in error
    (broken / "metrics.jsonl").write_text("")
    assert "no numbers" in refused(call(plot, broken, "--out", out))
    (good / "results.json").write_text("{")
    assert "results.json" in refused(call(plot, good, "--out", out))
    assert not out.exists()


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run(tmp_path / "run", metrics=ROWS)
    assert "requirements-dev.txt" in refused(call(plot, run, "--out", tmp_path / "curves.svg"))


NEEDED = "matplotlib is not installed; requirements-dev.txt has it"


def drawn_lines(monkeypatch):
    """Records what is drawn: {panel title: {run: [(step, value), ...]}} of the last picture."""
    figures = pytest.importorskip("matplotlib.figure", reason=NEEDED)
    seen = {}

    def record(figure, *args, real=figures.Figure.savefig, **kwargs):
        seen.clear()
        for panel in figure.axes:
            points = {line.get_label(): zip(line.get_xdata(), line.get_ydata(), strict=True) for line in panel.lines}
            seen[panel.get_title()] = {name: list(pairs) for name, pairs in points.items()}
        return real(figure, *args, **kwargs)

    monkeypatch.setattr(figures.Figure, "savefig", record)
    return seen


def test_plot_draws_a_panel_a_key_and_a_line_a_run(tmp_path, monkeypatch):
    seen = drawn_lines(monkeypatch)
    a = make_run(tmp_path / "a", {"probe_start": 0.1}, ROWS)
    b = make_run(tmp_path / "b", metrics=[{"step": 5, "loss": 2.0, "lr": 1e-3}])
    code, out, err = call(plot, a, b / "metrics.jsonl", "--out", tmp_path / "deep" / "er" / "curves.svg")
    assert code == 0 and "curves.svg" in out, err
    assert seen == {
        "loss": {"a": [(1, 1.0), (10, 0.5), (20, 0.75)], "b": [(5, 2.0)]},
        "probe": {"a": [(0, 0.1), (10, 0.3), (20, 0.4)], "b": []},
    }
    text = (tmp_path / "deep" / "er" / "curves.svg").read_text()
    assert "<svg" in text and ">probe<" in text and ">a<" in text and ">b<" in text
    assert call(plot, a, b, "--out", tmp_path / "two.png", "--keys", "lr,loss", "--labels", "ours,theirs")[0] == 0
    assert list(seen) == ["lr", "loss"] and seen["lr"] == {"ours": [], "theirs": [(5, 1e-3)]}
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_plot_gives_the_same_bytes_for_the_same_runs(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDED)
    run = make_run(tmp_path / "run", metrics=ROWS)
    for suffix in ("svg", "png"):
        paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
        for path in paths:
            assert call(plot, run, "--out", path)[0] == 0
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert str(tmp_path) not in (tmp_path / "0.svg").read_text()


def test_plot_of_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDED)
    (tmp_path / "file").write_text("")
    run = make_run(tmp_path / "run", metrics=ROWS)
    assert "--out" in refused(call(plot, run, "--out", tmp_path / "file" / "curves.svg"))


@pytest.mark.parametrize("tool", [plot, table], ids=["plot", "table"])
def test_help_shows_how_to_call_it(tool):
    code, out, _ = call(tool, "--help")
    assert code == 0 and f"python -m tools.{tool.__name__.removeprefix('tools.')} runs/" in out and "--keys" in out

"""tools/bench.py: tiny updates of each modality, operations counted by hand, the same with transformers."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import RUNS, SCRIPTS, TINY, call, done, refused
from tools import bench

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = {"all", "loader", "teacher", "student", "targets, loss", "backward", "clip, AdamW", "EMA"}
FLOOR = "all but loader, x floor"


def tables(kind, data, *flags):
    """-> networks; {row: their cells}; the lines around the table."""
    kind, tiny = kind.rstrip("2"), TINY[kind]
    flags = f"train_{kind}.py", "--updates", 1, "--rounds", 1, *flags, *tiny, "--data", data / kind
    lines = [line for line in done(call(bench, *flags)).splitlines() if line and line[:4] != "|---"]
    (_, *networks), *rows = [line.strip("| ").split(" | ") for line in lines if line[0] == "|"]
    assert all(len(cells) == len(networks) for _, *cells in rows)
    return networks, {name: cells for name, *cells in rows}, [line for line in lines if line[0] != "|"]


@pytest.mark.parametrize("kind", RUNS)
def test_each_part_of_an_update_is_timed(kind, data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setitem(sys.modules, "transformers", None)
    networks, rows, (without, head, floor, loader) = tables(kind, data, "--compile", "--")
    assert networks == ["ours", "compiled"] and len(compiled) == 2 and rows.keys() == PARTS | {FLOOR}
    for i in (0, 1):
        shares = {part: int(rows[part][i].split("(")[1].strip("%)")) for part in PARTS}
        assert shares.pop("all") == 100 and 50 < sum(shares.values()) < 105 and float(rows[FLOOR][i]) > 1
    assert "requirements-dev.txt" in without and "float32" in head
    assert f"{RUNS[kind].__name__}.py smoke" in head
    assert min(float(line.split()[1]) for line in (floor, loader)) > 0


def test_operations_are_counted_as_by_hand():
    x, image = torch.randn(2, 32, 50, requires_grad=True), torch.randn(2, 8, 9, 9, requires_grad=True)
    q = torch.randn(2, 4, 50, 16, requires_grad=True)
    for once, layer, *inputs in (
        (2 * 2 * 32 * 50 * 7, torch.nn.Linear(50, 7), x),
        (2 * 2 * 50 * 64 * (32 // 8) * 5, torch.nn.Conv1d(32, 64, 5, padding=2, groups=8), x),
        (2 * 2 * 4 * 4 * 6 * (8 // 2) * 3 * 3, torch.nn.Conv2d(8, 6, 3, stride=2, groups=2), image),
        (2 * 2 * 2 * 4 * 50 * 50 * 16, F.scaled_dot_product_attention, q, q, q),  # scores, their use
    ):
        with FlopCounterMode(display=False, custom_mapping=bench.FORMULAS) as forward:
            y = layer(*inputs)
        with FlopCounterMode(display=False, custom_mapping=bench.FORMULAS) as backward:
            y.sum().backward()
        assert (forward.get_total_flops(), backward.get_total_flops()) == (once, 2 * once)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_transformers_has_the_same_first_losses_in_the_same_loop(kind, data, monkeypatch):
    pytest.importorskip("transformers", reason="requirements-dev.txt")
    losses, script = [], SCRIPTS[kind]

    def record(*args, real=script.regression_loss, **kwargs):
        loss = real(*args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(script, "regression_loss", record)
    for theirs in (False, True):
        bench.run(script, [*TINY[kind], "--data", str(data / kind), "--target", "block"], theirs)
    ours, theirs = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert theirs[:2] == pytest.approx(ours[:2], rel=1e-4)  # of the micro-batches of the first update
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs) == len(ours) > 2


def test_transformers_has_a_column_unless_it_lacks_an_option(data):
    pytest.importorskip("transformers", reason="requirements-dev.txt")
    assert tables("vision", data, "--")[0] == ["ours", "transformers"]
    networks, _, lines = tables("speech", data, "--", "--deep_norm", "true")
    assert networks == ["ours"] and "DeepNorm" in lines[0]


def test_wrong_input_is_one_line():
    for told, *flags in (
        ("song.py", "song.py"),
        ("--updates", "train_text.py", "--updates", 0),
        ("--preset no", "train_text.py", "--preset", "no"),
        ("--patch", "train_text.py", "--", "--patch", 2),
        ("nowhere", "train_vision.py", "--", "--data", "nowhere"),
    ):
        assert told in refused(call(bench, *flags), by="bench.py: ", silent=True)

"""tools/bench.py: small updates of each modality, counted operations, the same with transformers."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import SCRIPTS, call, done, refused
from tools import bench

FLAGS = ["--dtype", "float32", "--device", "cpu", "--preset", "smoke"]
PHASES = {"loader", "student", "teacher", "targets, loss", "backward", "clip, AdamW", "EMA", "rest"}


def tables(path, *flags):
    printed = done(call(bench, *flags, *FLAGS, "--updates", 2, "--out", path))
    found = json.loads(path.read_text())
    assert all(f"| {name} |" in printed for table in found.values() for name in table)
    return found.values()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_small_update_of_each_modality(kind, data, tmp_path, one_thread, monkeypatch):
    flags = kind, "--data", data / kind, "--seconds", 1, "--batch"
    phases, updates, products, loader = tables(tmp_path / "2.json", *flags, 2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    _, alone, more, _ = tables(tmp_path / "4.json", *flags, 4)
    assert phases.keys() == PHASES and "ours" in updates and [*alone] == ["ours"]
    assert abs(sum(share for _, _, share in phases.values()) - 1) < 1e-6
    assert (
        all(row[2] > 1 for row in updates.values()) and min(products["float32"] + [*loader.values()][0]) > 0
    )
    assert 1.5 < more["float32"][0] / products["float32"][0] < 2.5


def test_products_are_counted_as_by_hand():
    x, q = torch.randn(2, 32, 50, requires_grad=True), torch.randn(2, 4, 50, 16, requires_grad=True)
    conv, linear = torch.nn.Conv1d(32, 64, 5, padding=2, groups=8), torch.nn.Linear(50, 7)
    attention = torch.nn.functional.scaled_dot_product_attention
    hand = {conv: (2 * 2 * 50 * 64 * 4 * 5, x), linear: (2 * 2 * 32 * 50 * 7, x)}
    for call_, (once, *inputs) in (hand | {attention: (2 * 2 * 2 * 4 * 50 * 50 * 16, q, q, q)}).items():
        with FlopCounterMode(display=False, custom_mapping=bench.FORMULAS) as counter:
            call_(*inputs).sum().backward()
        assert counter.get_total_flops() == 3 * once


@torch.no_grad()
@pytest.mark.parametrize("kind", SCRIPTS)
def test_transformers_predicts_the_same(kind, data):
    pytest.importorskip("transformers", reason="requirements-dev.txt")
    made = bench.prepare(SCRIPTS[kind], ["--data", data / kind, *FLAGS, "--target", "block"])
    cfg, _, *parts, _, dataset, keys, _, _ = made
    batch = dataset[next(iter(keys))]
    pair = bench.ours(kind, *parts), bench.library(kind, cfg, parts[0])
    torch.testing.assert_close(*(network[2](batch) for network in pair), rtol=1e-4, atol=1e-4)


def test_wrong_input_is_told_in_one_line():
    for flags, told in (
        (["song"], "song"),
        (["text", "--preset", "no"], "no"),
        (["text", "--updates", 0], "0"),
    ):
        assert told in refused(call(bench, *flags))

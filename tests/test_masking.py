"""masking.py against its own rules, restated cell by cell, and against the released generator's statistics."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from masking import block_mask

GOLDEN = Path(__file__).parent / "golden" / "mask_stats_and_schedule.pt"
GRIDS = [(14, 14), (8, 8), (4, 4), (5, 11), (13, 3), (2, 3), (1, 7), (1, 1)]


def naive_block_mask(grid, ratio, min_block, rng):
    """One row of block_mask as the docstring tells it, with a set of cells; draws from rng in the same order."""
    height, width = grid
    budget, hidden, failures = round(ratio * height * width), set(), 0
    while len(hidden) < budget and failures < 10:
        failures += 1
        area = min_block + rng.random() * (budget - len(hidden) - min_block)
        aspect = 0.3 ** (2 * rng.random() - 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h >= height or w >= width:
            continue
        top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
        cells = {(top + i, left + j) for i in range(h) for j in range(w)}
        if cells - hidden and len(hidden | cells) <= budget:
            hidden, failures = hidden | cells, 0
    if not hidden:
        hidden = {(rng.integers(height), rng.integers(width))}
    return [(i, j) in hidden for i in range(height) for j in range(width)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("ratio, min_block", [(0.6, 16), (0.6, 4), (0.3, 1), (1.0, 2)])
def test_follows_its_rules_cell_by_cell(grid, ratio, min_block):
    mask = block_mask(20, grid, ratio, min_block, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    expected = [naive_block_mask(grid, ratio, min_block, rng) for _ in range(20)]
    assert mask.dtype == torch.bool and mask.tolist() == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.4, 120 / 196, 1.0])
def test_hides_at_least_one_patch_and_never_more_than_its_share(grid, ratio):
    for min_block in (1, 4, 16):
        mask = block_mask(50, grid, ratio, min_block, np.random.default_rng(1))
        assert mask.shape == (50, grid[0] * grid[1])
        assert mask.sum(1).min() >= 1
        assert mask.sum(1).max() <= max(1, round(ratio * grid[0] * grid[1]))


def test_counts_are_those_of_the_released_generator():
    released = torch.load(GOLDEN, weights_only=True)["vision_14x14_120_min16_max196"]
    counts = block_mask(4000, (14, 14), 120 / 196, 16, np.random.default_rng(1)).sum(1).double()
    assert counts.mean().item() == pytest.approx(released["mean"], abs=0.1)  # 4 standard errors of the difference
    assert counts.std().item() == pytest.approx(released["std"], abs=0.25)
    assert counts.min() >= 105 and counts.max() == released["max"] == 120
    assert len(set(counts.tolist())) > 1, "rows may differ in count"


def test_a_single_rectangle_keeps_area_and_aspect_within_bounds():
    """With all the budget in one rectangle (min_block = budget) its sides are those of an aspect in [0.3, 1 / 0.3]."""
    sides = set()
    for row in block_mask(300, (40, 60), 100 / 2400, 100, np.random.default_rng(0)).view(300, 40, 60):
        rows, columns = row.any(1).nonzero().flatten(), row.any(0).nonzero().flatten()
        if row.sum() == len(rows) * len(columns) > 80:  # nothing else was squeezed in elsewhere
            sides.add((len(rows), len(columns)))
    low, high = math.sqrt(100 * 0.3), math.sqrt(100 / 0.3)
    assert len(sides) > 5 and all(round(low) <= n <= round(high) for pair in sides for n in pair)
    assert any(h > w for h, w in sides) and any(h < w for h, w in sides), "tall and wide"


def test_every_patch_is_hidden_sometimes_and_shown_sometimes():
    often = block_mask(400, (6, 9), 0.6, 4, np.random.default_rng(0)).float().mean(0)
    assert often.min() > 0.1 and often.max() < 0.95


def test_is_a_function_of_the_generator_alone():
    def draw(seed):
        return block_mask(4, (14, 14), 0.6, 16, np.random.default_rng(seed))

    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(5)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, draw(5)) and not torch.equal(first, draw(6))
    assert not torch.equal(first[0], first[1]), "rows of one batch are independent"

"""masking.py against its rules, cell by cell, and against statistics of the released generators."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from masking import bert_mask, block_mask, exact_blocks, span_mask, span_mask_tokens, uniform_mask

RELEASED = torch.load(Path(__file__).parent / "golden" / "mask_stats_and_schedule.pt", weights_only=True)


def check_statistics(values, released, released_count):
    """Mean within 4 standard errors of the difference of the means, std within 20 %."""
    values = torch.tensor(values, dtype=torch.float64)
    error = released["std"] * math.sqrt(1 / len(values) + 1 / released_count)
    assert values.mean().item() == pytest.approx(released["mean"], abs=4 * error)
    assert values.std().item() == pytest.approx(released["std"], rel=0.2)


# ---- rectangles of patches -------------------------------------------------------------------------------


def naive_block_mask(grid, ratio, min_block, rng):
    """With a set of cells; draws from rng in the same order."""
    height, width = grid
    budget, hidden, failures = round(ratio * height * width), set(), 0
    while len(hidden) < budget and failures < 10:
        failures += 1
        area = min_block + rng.random() * (budget - len(hidden) - min_block)
        aspect = 0.3 ** (2 * rng.random() - 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h < height and w < width:
            top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
            cells = {(top + i, left + j) for i in range(h) for j in range(w)}
            if cells - hidden and len(hidden | cells) <= budget:
                hidden, failures = hidden | cells, 0
    if not hidden:
        hidden = {(rng.integers(height), rng.integers(width))}
    return [(i, j) in hidden for i in range(height) for j in range(width)]


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (5, 11), (13, 3), (1, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("ratio, min_block", [(0.6, 16), (0.6, 4), (0.3, 1), (1.0, 2)])
def test_rectangles_follow_their_rules_cell_by_cell(grid, ratio, min_block):
    for seed in range(10):
        mask = block_mask(grid, ratio, min_block, np.random.default_rng(seed))
        assert mask.dtype == torch.bool
        assert mask.tolist() == naive_block_mask(grid, ratio, min_block, np.random.default_rng(seed))
        assert 1 <= mask.sum() <= max(1, round(ratio * grid[0] * grid[1]))


def test_rectangles_hide_as_much_as_the_released_generator():
    released, rng = RELEASED["vision_14x14_120_min16_max196"], np.random.default_rng(1)
    counts = [block_mask((14, 14), 120 / 196, 16, rng).sum().item() for _ in range(4000)]
    check_statistics(counts, released, 1000)
    assert max(counts) == released["max"] == 120 and min(counts) >= 105


# ---- spans of frames -------------------------------------------------------------------------------------


def naive_span_mask(lengths, p, span, rng, equal, min_spans):
    """One frame at a time; draws from rng in the same order."""
    u, total = rng.random(), max(lengths)
    rows = []
    for n, scores in zip(lengths, rng.random((len(lengths), total), dtype=np.float32).tolist()):
        size = max(1, min(span, n - 1))
        starts = sorted(range(n - size + 1), key=lambda t: scores[t])
        starts = starts[: max(min_spans, math.floor(p * n / span + u))]
        rows.append([any(start <= t < start + size for start in starts) for t in range(total)])
    if equal:
        fewest = min(sum(row) for row in rows)
        for row, scores in zip(rows, rng.random((len(lengths), total), dtype=np.float32).tolist()):
            for t in sorted((t for t in range(total) if row[t]), key=lambda t: scores[t])[fewest:]:
                row[t] = False
    return rows


@pytest.mark.parametrize("p, span", [(0.65, 10), (0.65, 1), (0.3, 4), (1.0, 3), (0.001, 10)])
@pytest.mark.parametrize("equal, min_spans", [(True, 1), (False, 1), (False, 0)])
def test_spans_follow_their_rules_frame_by_frame(p, span, equal, min_spans):
    for seed in range(15):
        lengths = np.random.default_rng(seed).integers(1, 60, 5)
        mask = span_mask(lengths, p, span, np.random.default_rng(seed), equal, min_spans)
        expected = naive_span_mask(lengths, p, span, np.random.default_rng(seed), equal, min_spans)
        assert mask.dtype == torch.bool and mask.tolist() == expected
        assert not mask[torch.arange(mask.shape[1]) >= torch.tensor(lengths)[:, None]].any()
        assert mask.sum(1).min() >= min_spans
        if equal:
            assert mask.sum(1).min() == mask.sum(1).max()


@pytest.mark.parametrize("length, batch", [(499, 8), (250, 8), (781, 4)])
def test_spans_hide_as_much_as_the_released_generator(length, batch):
    rng = np.random.default_rng(0)
    means = [span_mask(np.full(batch, length), 0.65, 10, rng).double().mean().item() for _ in range(500)]
    check_statistics(means, RELEASED[f"audio_T{length}_B{batch}_p0.65_len10"], 150)


# ---- tokens ----------------------------------------------------------------------------------------------

MASK = 999  # <s> 0, <pad> 1, </s> 2, <unk> 3, regular tokens, <mask>
REGULAR = range(4, MASK)


def sentence(length, seed=0, padding=0):
    """<s> ... </s> or <mask> ... </s> <pad> ... of random regular tokens."""
    ids = np.random.default_rng(seed).integers(4, MASK, length)
    ids[0], ids[length // 2], ids[-1] = 0, (2, MASK)[seed % 2], 2
    return np.concatenate([ids, np.ones(padding, int)])


def single_tokens(ids, rng, p=0.15):
    return bert_mask(ids, REGULAR, MASK, p, rng)


def spans(ids, rng, p=0.35):
    return span_mask_tokens(ids, REGULAR, MASK, p, 4, rng)


@pytest.mark.parametrize("draw", [single_tokens, spans])
@pytest.mark.parametrize("p", [1e-6, 0.35, 1.0])
def test_some_regular_token_is_selected_and_never_a_special_one(draw, p):
    for seed in range(100):
        ids = sentence(3 + seed % 20, seed, padding=seed % 7)
        before, again = torch.tensor(ids), draw(ids, np.random.default_rng(seed), p)
        corrupted, mask = draw(ids, np.random.default_rng(seed), p)
        assert torch.equal(corrupted, again[0]) and torch.equal(mask, again[1])
        assert corrupted.dtype == torch.int64 and mask.dtype == torch.bool
        regular = (before > 3) & (before < MASK)
        assert mask.any() == regular.any() and not (mask & ~regular).any()
        assert torch.equal(corrupted[~mask], before[~mask]) and torch.equal(torch.tensor(ids), before)


def test_bert_selects_15_percent_and_treats_them_80_10_10():
    """Fractions within 4 standard errors: 400 texts of 509 regular tokens."""
    rng, counts, replaced, often = np.random.default_rng(0), np.zeros(3), [], torch.zeros(512)
    for seed in range(400):
        ids = torch.tensor(sentence(512, seed))
        corrupted, mask = single_tokens(ids.numpy(), rng)
        assert mask.sum() in (76, 77)  # of .15 * 509
        often += mask
        new, old = corrupted[mask], ids[mask]
        counts += [(new == MASK).sum(), (new == old).sum(), ((new != old) & (new != MASK)).sum()]
        replaced += new[(new != old) & (new != MASK)].tolist()
    fractions, expected = counts / counts.sum(), np.array([0.8, 0.1, 0.1])
    assert counts.sum() / (400 * 509) == pytest.approx(0.15, abs=0.0005)
    assert (abs(fractions - expected) < 4 * np.sqrt(expected * (1 - expected) / counts.sum())).all()
    assert min(replaced) >= 4 and max(replaced) < MASK and len(set(replaced)) > 700
    assert (often[torch.tensor(sentence(512)) > 3] / 400 - 0.15).abs().max() < 5 * math.sqrt(
        0.15 * 0.85 / 400
    )


def test_spans_of_tokens_are_those_of_frames_without_the_special_ones():
    for seed in range(50):
        ids = torch.tensor(sentence(100, seed))
        corrupted, mask = spans(ids.numpy(), np.random.default_rng(seed))
        expected = naive_span_mask([100], 0.35, 4, np.random.default_rng(seed), True, 1)[0]
        assert torch.equal(mask, torch.tensor(expected) & (ids > 3) & (ids < MASK))
        assert torch.equal(corrupted, ids.masked_fill(mask, MASK))


@pytest.mark.parametrize("length", [512, 128])
def test_spans_of_tokens_hide_as_much_as_the_released_generator(length):
    """Of a text without special tokens, which the released generator hides, too."""
    ids, rng = np.random.default_rng(1).integers(4, MASK, length), np.random.default_rng(0)
    means = [spans(ids, rng)[1].double().mean().item() for _ in range(1500)]
    check_statistics(means, RELEASED[f"text_{length}_p0.35_len4"], 400)


def test_spans_leave_something_of_a_short_text():
    texts = [
        spans(sentence(5, seed), np.random.default_rng(seed))[0] for seed in range(200)
    ]  # 2 regular tokens
    assert sum(((text > 3) & (text < MASK)).any().item() for text in texts) > 150


@pytest.mark.parametrize("grid", [(1,), (3,), (101,), (2, 2), (5, 9)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.55])
def test_blocks_of_2_0_have_exact_and_equal_counts(grid, share):
    total, rng = math.prod(grid), np.random.default_rng(0)
    for side in (1, 2, 5):
        rows = exact_blocks(7, grid, share, 0.07, side, rng)
        assert rows.shape == (7, total) and set(rows.sum(1).tolist()) == {max(1, int(total * share))}
    assert set(uniform_mask(7, total, share, rng).sum(1).tolist()) == {total - int(total * (1 - share))}

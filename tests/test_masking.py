"""masking.py against its own rules, restated cell by cell, and against the released generator's statistics."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from masking import bert_mask, block_mask, span_mask, span_mask_tokens

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


# ---- spans of speech -----------------------------------------------------------------------------------------------


def runs(row):
    """Lengths of the runs of True in a list."""
    lengths = [0]
    for hidden in row:
        lengths = [*lengths[:-1], lengths[-1] + 1] if hidden else [*lengths, 0]
    return [n for n in lengths if n]


def naive_span_mask(lengths, p, span, rng):
    """Without trimming: one row, one span at a time. Draws from rng what span_mask draws."""
    extra = rng.random()
    draws = rng.random((len(lengths), max(lengths)), dtype=np.float32)
    mask = [[False] * max(lengths) for _ in lengths]
    for row, n, dice in zip(mask, lengths, draws.tolist()):
        size = max(1, min(span, n - 1))
        starts = sorted(range(n - size + 1), key=lambda t: dice[t])
        count = min(max(1, int(p * n / span + extra)), len(starts))
        for start in starts[:count]:
            for t in range(start, start + size):
                row[t] = True
    return mask


@pytest.mark.parametrize("p, span", [(0.65, 10), (0.65, 1), (0.3, 4), (1.0, 3), (0.001, 10)])
def test_spans_follow_their_rules_frame_by_frame(p, span):
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 70, 6)
        mask = span_mask(lengths, p, span, np.random.default_rng(seed), equal=False)
        expected = naive_span_mask(lengths.tolist(), p, span, np.random.default_rng(seed))
        assert mask.dtype == torch.bool and mask.tolist() == expected


@pytest.mark.parametrize("length, batch", [(499, 8), (250, 8), (781, 4)])
def test_spans_hide_as_much_as_the_released_generator(length, batch):
    released = torch.load(GOLDEN, weights_only=True)[f"audio_T{length}_B{batch}_p0.65_len10"]
    rng, masks = np.random.default_rng(0), 500
    share = torch.cat([span_mask(np.full(batch, length), 0.65, 10, rng).double().mean(1)[:1] for _ in range(masks)])
    error = released["std"] * math.sqrt(1 / masks + 1 / 150)  # of the difference: the file's mean is of 150 masks or more
    assert share.mean().item() == pytest.approx(released["mean"], abs=3 * error)
    assert share.std().item() == pytest.approx(released["std"], rel=0.2)
    assert released["min"] - 0.04 < share.min() and share.max() < released["max"] + 0.04


LENGTHS = np.array([120, 40, 11, 10, 9, 2, 1])


@pytest.mark.parametrize("equal", [True, False])
def test_spans_never_lie_in_the_padding_and_every_row_has_some(equal):
    for seed in range(100):
        mask = span_mask(LENGTHS, 0.65, 10, np.random.default_rng(seed), equal)
        assert mask.shape == (7, 120) and mask.any(1).all()
        assert not mask[torch.arange(120)[None] >= torch.from_numpy(LENGTHS)[:, None]].any()


def test_a_mask_may_be_empty_where_the_caller_says_so():
    """Channels of fine-tuning: p .1 of 192 channels in spans of 64 is a span in 3 of 10 updates, not one in each."""
    rng = np.random.default_rng(0)
    share = [span_mask(np.full(4, 192), 0.1, 64, rng, equal=False, least=0).float().mean().item() for _ in range(2000)]
    assert np.mean(share) == pytest.approx(0.1, abs=0.01) and min(share) == 0


def test_equal_rows_hide_as_much_as_the_one_that_hides_least():
    lengths = np.array([120, 90, 100, 60])
    for seed in range(50):
        rows = span_mask(lengths, 0.65, 10, np.random.default_rng(seed), equal=False)
        trimmed = span_mask(lengths, 0.65, 10, np.random.default_rng(seed), equal=True)
        assert trimmed.sum(1).tolist() == [rows.sum(1).min()] * 4
        assert not (trimmed & ~rows).any(), "trimming only shows, it never hides"


def test_untrimmed_runs_are_whole_spans():
    many, one = (span_mask(np.full(200, 300), p, 10, np.random.default_rng(0), equal=False).tolist() for p in (0.65, 0.01))
    found = [n for row in many for n in runs(row)]
    assert min(found) == 10 and max(found) > 20, "spans may meet and overlap"
    assert [runs(row) for row in one] == [[10]] * 200


def test_longer_rows_of_a_padded_batch_hide_more():
    counts = sum(span_mask(np.array([400, 100]), 0.65, 10, np.random.default_rng(s), equal=False).sum(1) for s in range(50))
    assert 3 < counts[0] / counts[1] < 5


@pytest.mark.parametrize("length", range(1, 13))
def test_rows_shorter_than_a_span_keep_something_visible(length):
    for seed in range(20):
        mask = span_mask(np.full(4, length), 0.65, 10, np.random.default_rng(seed))
        assert (mask.sum(1) >= 1).all() and ((mask.sum(1) < length).all() or length == 1)


def test_every_frame_is_hidden_sometimes_and_the_ends_least():
    often = span_mask(np.full(2000, 60), 0.65, 10, np.random.default_rng(0), equal=False).double().mean(0)
    assert often.min() > 0.05 and often.max() < 0.8
    assert often[0] < often[20:40].min() and often[-1] < often[20:40].min(), "a span must fit within the row"


def test_spans_are_a_function_of_the_generator_alone():
    def draw(seed):
        return span_mask(np.array([200, 150]), 0.65, 10, np.random.default_rng(seed))

    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(5)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, draw(5)) and not torch.equal(first, draw(6))
    assert not torch.equal(first[0], first[1]), "rows of one batch are independent"


def test_spans_of_a_large_batch_take_milliseconds():
    rng, seconds = np.random.default_rng(0), []
    for _ in range(5):
        started = time.perf_counter()
        span_mask(np.full(64, 999), 0.65, 10, rng)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05


# ---- tokens of text ------------------------------------------------------------------------------------------------

VOCAB, MASK = 1000, 999  # <s> 0, <pad> 1, </s> 2, <unk> 3, ordinary tokens, <mask>
ORDINARY = range(4, MASK)


def sentence(length, seed=0, padding=0):
    """<s> ... </s> of random ordinary tokens with a </s> in the middle, and padding behind."""
    ids = np.random.default_rng(seed).integers(4, MASK, length)
    ids[0], ids[length // 2], ids[-1] = 0, 2, 2
    return np.concatenate([ids, np.ones(padding, int)])


def singles(ids, rng, p=0.15):
    return bert_mask(ids, ORDINARY, MASK, p, rng)


def spans(ids, rng, p=0.35, span=4):
    return span_mask_tokens(ids, ORDINARY, MASK, p, span, rng)


def test_bert_selects_15_percent_and_treats_them_80_10_10():
    """Shares within 4 standard errors: 400 texts of 509 ordinary tokens."""
    rng, chosen, masked, kept, replaced = np.random.default_rng(0), 0, 0, 0, []
    for seed in range(400):
        ids = sentence(512, seed)
        corrupted, mask = singles(ids, rng)
        assert mask.sum() in (math.floor(0.15 * 509), math.ceil(0.15 * 509))
        ids, chosen = torch.from_numpy(ids), chosen + mask.sum().item()
        assert corrupted.dtype == torch.int64 and mask.dtype == torch.bool and torch.equal(corrupted[~mask], ids[~mask])
        masked += (corrupted[mask] == MASK).sum().item()
        kept += (corrupted == ids)[mask].sum().item()
        replaced += corrupted[mask & (corrupted != MASK) & (corrupted != ids)].tolist()
    assert chosen / (400 * 509) == pytest.approx(0.15, abs=4 * 0.5 / (400**0.5 * 509))
    for count, share in (masked, 0.8), (kept, 0.1), (len(replaced), 0.1):
        assert count / chosen == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / chosen))
    assert min(replaced) >= 4 and max(replaced) < MASK and len(set(replaced)) > 700, "any ordinary token, no special one"


def test_every_ordinary_token_is_selected_equally_often():
    ids, rng = sentence(32), np.random.default_rng(0)
    often = sum(singles(ids, rng)[1].double() for _ in range(4000)) / 4000
    ordinary = torch.from_numpy(ids) > 3
    assert often[ordinary].sub(0.15).abs().max() < 4.5 * math.sqrt(0.15 * 0.85 / 4000) and not often[~ordinary].any()


@pytest.mark.parametrize("masker", [singles, spans])
@pytest.mark.parametrize("p", [1e-6, 0.35, 1.0])
def test_tokens_that_are_special_or_padding_are_never_selected_and_at_least_one_other_is(masker, p):
    for seed in range(100):
        length = 3 + seed % 20
        ids = sentence(length, seed, padding=seed % 7)
        corrupted, mask = masker(ids, np.random.default_rng(seed), p)
        special = torch.from_numpy(ids) < 4
        assert mask.shape == corrupted.shape == (len(ids),)
        assert mask.any() == (length > 3) and not (mask & special).any(), "of three tokens all are special"
        assert torch.equal(corrupted[~mask], torch.from_numpy(ids)[~mask])


def test_all_that_lies_in_a_span_becomes_mask():
    for seed in range(50):
        ids = sentence(100, seed)
        corrupted, mask = spans(ids, np.random.default_rng(seed))
        assert (corrupted[mask] == MASK).all() and not (corrupted[~mask] == MASK).any()
        special = {int(t) for t in np.flatnonzero(ids < 4)}
        for end in [t for t in range(100) if mask[t] and not (t < 99 and mask[t + 1])]:
            start = max([t for t in range(end) if not mask[t]], default=-1) + 1
            near = special & {start - 1, end + 1}
            assert end - start + 1 >= 4 or near, "a whole span, but for a special token that it holds"


@pytest.mark.parametrize("ordinary", [2, 3])
def test_spans_leave_something_of_a_short_text(ordinary):
    shown = [(spans(sentence(ordinary + 3, seed), np.random.default_rng(seed))[0] < MASK).sum().item() for seed in range(200)]
    assert sum(count > 3 for count in shown) > 150, "more than the special tokens"


@pytest.mark.parametrize("length", [512, 128])
def test_spans_of_tokens_hide_as_much_as_the_released_generator(length):
    """Of a text without special tokens: those are never hidden here, while the released generator hides <s> and </s>, too."""
    released = torch.load(GOLDEN, weights_only=True)[f"text_{length}_p0.35_len4"]
    rng, n = np.random.default_rng(0), 1500
    ids = np.random.default_rng(1).integers(4, MASK, length)
    shares = torch.stack([spans(ids, rng)[1].double().mean() for _ in range(n)])
    error = released["std"] * math.sqrt(1 / n + 1 / 400)  # of the difference: the file's mean is of 400 masks
    assert shares.mean().item() == pytest.approx(released["mean"], abs=4 * error)
    assert shares.std().item() == pytest.approx(released["std"], rel=0.2)


@pytest.mark.parametrize("masker", [singles, spans])
def test_hidden_tokens_are_a_function_of_the_generator_alone(masker):
    def draw(seed):
        return masker(sentence(200), np.random.default_rng(seed))

    torch.manual_seed(0)
    np.random.seed(0)
    first, ids = draw(5), sentence(200)
    torch.manual_seed(1)
    np.random.seed(1)
    again, other = draw(5), draw(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[1], other[1])
    masker(ids, np.random.default_rng(0))
    assert (ids == sentence(200)).all(), "the input stays as it is"

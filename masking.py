"""What is hidden from the student. In every mask True = hidden from the student and scored by the loss.

Masks are drawn from a numpy Generator that the caller seeds, so they depend on (seed, epoch, sample) alone.
"""

import math

import numpy as np
import torch
from torch import Tensor


def block_mask(grid: tuple[int, int], ratio: float, min_block: int, rng: np.random.Generator) -> Tensor:
    """Rectangles of patches, until `ratio` of the grid is hidden (section 4.1; Bao et al. 2021).

    Each has an area uniform in [min_block, what is left to hide] patches and a log-uniform aspect ratio in
    [0.3, 1 / 0.3]. It is kept if it is smaller than the grid, hides something new, and not more than is left;
    10 failures in a row end the mask, at or just under round(ratio * H * W) hidden patches.

    grid       (H, W) in patches
    min_block  smallest rectangle, in patches (the paper's 16 of 196)
    returns    (H * W,) bool, row-major, at least one True
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    left, failures = round(ratio * height * width), 0
    while left > 0 and failures < 10:
        failures += 1
        area = min_block + (left - min_block) * rng.random()
        aspect = math.exp(math.log(0.3) * (2 * rng.random() - 1))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, side = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, side : side + w]
        new = h * w - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            left, failures = left - new, 0
    if not mask.any():  # no rectangle fits in a small grid
        mask[rng.integers(height), rng.integers(width)] = True
    return torch.from_numpy(mask).flatten()


def span_mask(
    lengths: np.ndarray, p: float, span: int, rng: np.random.Generator, equal: bool = True, min_spans: int = 1
) -> Tensor:
    """Spans of frames or tokens, which may overlap (section 4.2).

    The paper starts a span at each frame with probability p / span. The released code, and this one, draw the
    NUMBER of spans in a row, floor(p * T / span + u) with one u in [0, 1) for the batch, and distinct starts:
    at p .65, span 10 about 45 % are hidden, instead of the paper's 49 %.

    lengths  (B,) real positions of each row; T is the largest
    p        fraction of positions to hide if spans never overlapped
    span     length of a span, at most one less than the row's, so that something stays visible
    equal    hide equally many positions in all rows, by uncovering random ones in the others
    returns  (B, T) bool, nothing hidden in the padding
    """
    u = rng.random()
    scores = rng.random((len(lengths), max(lengths)), dtype=np.float32)
    mask = np.zeros(scores.shape, dtype=bool)
    for row, length, score in zip(mask, lengths, scores):
        size = min(max(length - 1, 1), span)
        places = length - size + 1  # where a span may start
        count = min(max(int(p * length / span + u), min_spans), places)
        for start in np.argsort(score[:places])[:count]:
            row[start : start + size] = True
    if equal:
        fewest = mask.sum(1).min()
        for row, score in zip(mask, rng.random(mask.shape, dtype=np.float32)):
            hidden = np.flatnonzero(row)
            row[hidden[np.argsort(score[hidden])[fewest:]]] = False
    return torch.from_numpy(mask)


def bert_mask(
    ids: np.ndarray, regular_ids: np.ndarray, mask_id: int, p: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """BERT's corruption of one text (section 4.3; Devlin et al. 2019): a fraction p of tokens is selected.

    Of these, 80 % become <mask>, 10 % a random token, 10 % stay; ALL of them are scored.

    ids          (T,) token ids
    regular_ids  ids that may be selected, and that random tokens are drawn from: not the special ones
    returns      corrupted ids (T,) int64, mask (T,) bool
    """
    ids = np.array(ids, dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    regular = np.flatnonzero(np.isin(ids, regular_ids))
    chosen = rng.permutation(regular)[: max(1, int(p * len(regular) + rng.random()))]
    mask[chosen] = True
    fate = rng.random(len(chosen))
    other = np.asarray(regular_ids)[rng.integers(len(regular_ids), size=len(chosen))]
    ids[chosen] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, other, ids[chosen]))
    return torch.from_numpy(ids), torch.from_numpy(mask)


def span_mask_tokens(
    ids: np.ndarray, regular_ids: np.ndarray, mask_id: int, p: float, span: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """As bert_mask, in spans that all become <mask> (the paper's best GLUE average: p .35, span 4)."""
    regular = torch.from_numpy(np.isin(ids, regular_ids))
    ids = torch.from_numpy(np.array(ids, dtype=np.int64))
    span = min(span, max(1, int(regular.sum()) - 1))  # of a few tokens, one should stay visible
    mask = span_mask(np.array([len(ids)]), p, span, rng)[0] & regular
    if regular.any() and not mask.any():
        mask[rng.choice(regular.nonzero()[:, 0].numpy())] = True
    return ids.masked_fill(mask, mask_id), mask


# ---- data2vec 2.0: equally many in each row


def exact_blocks(
    rows: int, grid: tuple[int, ...], share: float, adjust: float, side: int, rng: np.random.Generator
) -> Tensor:
    """Squares (spans) around random centres that fill exactly int(share * T) positions of a grid, (T,) or
    (H, W) -> (rows, T) bool, row-major (2.0).

    int(T * (share + adjust) / side^n) centres, which may coincide; squares are cut at the border; then single
    positions are added or removed at random. Of speech these are hidden, of images what stays VISIBLE.
    """
    chosen = np.zeros((rows, *grid), dtype=bool)
    total = math.prod(grid)
    count = max(1, int(total * share))
    centres = rng.integers(grid, size=(rows, int(total * (share + adjust) / side ** len(grid)), len(grid)))
    for row, places in zip(chosen, centres - side // 2):
        for place in places:
            row[tuple(slice(max(0, i), i + side) for i in place)] = True
    for row in chosen.reshape(rows, total):  # a view
        surplus = int(row.sum()) - count
        wrong = np.flatnonzero(row == (surplus > 0))
        row[rng.permutation(wrong)[: abs(surplus)]] = surplus < 0
    return torch.from_numpy(chosen).flatten(1)


def uniform_mask(rows: int, length: int, ratio: float, rng: np.random.Generator) -> Tensor:
    """All but int(length * (1 - ratio)) random positions (2.0, text): (rows, length) bool."""
    order = torch.from_numpy(rng.random((rows, length))).argsort(dim=1).argsort(dim=1)
    return order >= int(length * (1 - ratio))

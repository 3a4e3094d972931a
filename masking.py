"""What is hidden from the student.

Every mask in this project is boolean with True = hidden from the student and scored by the loss; the teacher
never sees a mask. Randomness comes from a numpy Generator that the caller seeds, so that a mask is a pure
function of (seed, epoch, sample) whatever the number of processes or workers.
"""

import math

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 10  # tries to place one rectangle before giving up on hiding more


def block_mask(batch: int, grid: tuple[int, int], ratio: float, min_block: int, rng: np.random.Generator) -> Tensor:
    """Rectangles of patches, until `ratio` of the grid is hidden (paper section 4.1; Bao et al. 2021).

    Each rectangle has an area uniform in [min_block, what is still to hide] patches and a log-uniform aspect ratio
    in [0.3, 1 / 0.3]; it stays if it is smaller than the grid, adds at least one new patch and not more than is
    still to hide. The mask therefore ends at or just under round(ratio * H * W), and rows may differ in count.

    batch      number of independent masks B
    grid       (H, W) in patches; the image's size divided by the patch size
    ratio      share of patches to hide, in (0, 1]; the paper's 60 % is 120 / 196
    min_block  smallest rectangle, in patches (16 of 196); too large for the grid and nothing fits
    returns    (B, H * W) bool, row-major, at least one True in every row
    """
    height, width = grid
    mask = np.zeros((batch, height, width), dtype=bool)
    for picture in mask:
        left_to_hide = round(ratio * height * width)
        while left_to_hide > 0 and (new := _hide_rectangle(picture, left_to_hide, min_block, rng)):
            left_to_hide -= new
        if not picture.any():  # a grid too small for min_block: a row without a scored patch would teach nothing
            picture[rng.integers(height), rng.integers(width)] = True
    return torch.from_numpy(mask).flatten(1)


def _hide_rectangle(picture: np.ndarray, at_most: int, min_block: int, rng: np.random.Generator) -> int:
    """Hides one random rectangle of `picture` (H, W) in place; returns how many patches it newly hides (0: none fit)."""
    height, width = picture.shape
    for _ in range(ATTEMPTS):
        area = min_block + (at_most - min_block) * rng.random()  # also runs downwards, when less than min_block is left
        aspect = math.exp(math.log(0.3) * (2 * rng.random() - 1))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            block = picture[top : top + h, left : left + w]
            new = h * w - int(block.sum())
            if 0 < new <= at_most:
                block[:] = True
                return new
    return 0


def span_mask(
    lengths: np.ndarray, p: float, span: int, rng: np.random.Generator, equal: bool = True, least: int = 1
) -> Tensor:
    """Runs of `span` frames or tokens, which may overlap (paper section 4.2; the released code's counts).

    The paper starts a span at every frame with probability p / span. The released code, and we, draw the NUMBER of spans of
    a row, floor(p * T / span + u) with one u in [0, 1) for the batch, and their starts without replacement. At p .65, span
    10 about 45 % are hidden (43 to 47, more for longer input), where the paper's wording gives 49 %.

    lengths  (B,) valid positions of each row, at least 1; T is the largest, what lies beyond a row's length is padding
    p        share of positions to hide if spans never met, in (0, 1]
    span     length of a span, cut to one less than the row where that is longer, so that something stays visible
    equal    hide equally many in all rows, the fewest that one has, by showing random positions of the others again:
             with it (M, D) splits into B equal parts; without it, the long rows of a padded batch hide more
    least    fewest spans of a row; 0 where a mask may be empty (the channels of fine-tuning)
    returns  (B, T) bool, at least `least` True in every row, none in the padding
    """
    lengths = np.asarray(lengths)
    rows, t = len(lengths), np.arange(lengths.max())
    size = np.clip(lengths - 1, 1, span)  # (B,) of a row's spans
    places = lengths - size + 1  # (B,) where one may start: it must end within the row
    count = np.clip((p * lengths / span + rng.random()).astype(int), least, places)
    order = np.where(t < places[:, None], rng.random((rows, len(t)), dtype=np.float32), np.inf).argsort(1)  # (B, T) each row's places, shuffled
    begun = np.zeros((rows, len(t) + 1), int)
    np.put_along_axis(begun, order, t < count[:, None], axis=1)
    begun = begun[:, :-1].cumsum(1)  # (B, T) spans begun up to here; those begun more than `size` ago have ended
    ended = np.take_along_axis(begun, np.maximum(t - size[:, None], 0), 1) * (t >= size[:, None])
    mask = begun > ended
    if equal:
        order = np.where(mask, rng.random(mask.shape, dtype=np.float32), np.inf).argsort(1)
        np.put_along_axis(mask, order, t < mask.sum(1).min(), axis=1)
    return torch.from_numpy(mask)


def bert_mask(ids: np.ndarray, ordinary: range, mask_id: int, p: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """BERT's corruption of one text: a share p of the tokens is selected (paper section 4.3; Devlin et al. 2019).

    Of the selected, 80 % become <mask>, 10 % a random ordinary token, 10 % stay; ALL of them are scored.

    ids       (T,) token ids
    ordinary  ids that may be selected and that random tokens are drawn from: no special tokens, no padding
    p         share of the ordinary tokens to select, floor(p * n + u) of them with u in [0, 1), at least one
    returns   corrupted ids (T,) int64 for the student, mask (T,) bool, True = selected
    """
    ids = np.array(ids, dtype=np.int64)
    places = np.flatnonzero((ids >= ordinary.start) & (ids < ordinary.stop))
    chosen = rng.permutation(places)[: max(1, int(p * len(places) + rng.random()))]
    mask = np.zeros(len(ids), dtype=bool)
    mask[chosen] = True
    fate = rng.random(len(chosen))
    ids[chosen] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, rng.integers(ordinary.start, ordinary.stop, len(chosen)), ids[chosen]))
    return torch.from_numpy(ids), torch.from_numpy(mask)


def span_mask_tokens(
    ids: np.ndarray, ordinary: range, mask_id: int, p: float, span: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Spans of tokens, all of them <mask> (the paper's best GLUE average): span_mask at p .35, span 4 hides about 30 %.

    As bert_mask otherwise; special tokens within a span stay as they are and are not scored. In a text of few ordinary tokens
    the spans are shorter than those, so that as a rule one of them stays visible.
    """
    ids = torch.from_numpy(np.array(ids, dtype=np.int64))
    allowed = (ids >= ordinary.start) & (ids < ordinary.stop)
    span = min(span, max(1, int(allowed.sum()) - 1))
    mask = span_mask(np.array([len(ids)]), p, span, rng)[0] & allowed
    if allowed.any() and not mask.any():
        mask[rng.choice(allowed.nonzero()[:, 0].numpy())] = True
    return ids.masked_fill(mask, mask_id), mask

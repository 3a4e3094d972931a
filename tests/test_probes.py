"""tools/probes.py: probes against what is known of data that is made for it, or against two passes."""

import math

import numpy as np
import pytest
import torch

from tools.probes import explained_variance, fit_ctc, knn, linear_probe, position_r2


def draw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1


def batches(offset=0.0, lengths=(6, 6, 6)):
    """f, y, mask of several batch sizes, with a different mean at each position."""
    parts = []
    for i, (b, t) in enumerate(zip((3, 1, 5), lengths)):
        y = draw(b, t, 4, seed=i) + torch.arange(t)[:, None] + offset
        mask = draw(b, t, seed=100 + i) > 0.5
        mask[:, 0] = True
        parts.append((y[mask] + draw(int(mask.sum()), 4, seed=200 + i) / 4, y, mask))
    return parts


def in_two_passes(parts, by_position):
    f, y = (torch.cat(values).double() for values in zip(*((f, y[mask]) for f, y, mask in parts)))
    m = torch.cat([y.flatten(0, 1) for _, y, _ in parts]).double().mean(0)
    if by_position:
        mean = torch.cat([y for _, y, _ in parts]).double().mean(0)  # (T, D)
        m = torch.cat([mean.expand_as(y)[mask] for _, y, mask in parts])
    return 1 - ((f - y).square().sum() / (y - m).square().sum()).item()


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_explained_variance_is_that_of_two_passes(offset):
    parts, other = batches(offset), batches(offset, lengths=(5, 9, 5))
    assert explained_variance(iter(parts), True) == pytest.approx(in_two_passes(parts, True), abs=1e-6)
    assert explained_variance(iter(other), False) == pytest.approx(in_two_passes(other, False), abs=1e-6)


@pytest.mark.parametrize("by_position", [True, False])
def test_explained_variance_of_constant_targets_is_nan(by_position):
    for value in (0.0, 1 / 3, 1234.5):
        y, mask = torch.full((3, 6, 4), value), torch.ones(3, 6).bool()
        assert math.isnan(explained_variance([(y[mask] + 0.01, y, mask)], by_position))
    y, mask = (
        draw(1, 64, 128),
        draw(1, 64, seed=100) > 0,
    )  # one image is its own mean, whatever rounding leaves
    assert math.isnan(explained_variance([(y[mask] + 0.01, y, mask)], True))


def test_position_r2_is_known_where_targets_are_made_of_both():
    """A code of the position + noise of three times its variance: a quarter, in texts of any length."""
    torch.manual_seed(0)
    code, parts = torch.randn(20, 64), []
    for rows, length in ((6, 20), (5, 13)):
        valid = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))
        y = code[:length] + 3**0.5 * torch.randn(rows, length, 64) + 5
        parts.append((torch.where(valid[..., None], y, 1e3), valid))
    assert position_r2(iter(parts), 24) == pytest.approx(0.25, abs=0.05), "padding does not count"
    valid = torch.ones(4, 20).bool()
    assert position_r2([(code.expand(4, -1, -1), valid)], 20) == pytest.approx(1)
    assert abs(position_r2([(torch.randn(4, 20, 64), valid)], 20)) < 0.05
    assert math.isnan(position_r2([(torch.ones(4, 20, 8), valid)], 20))


def clusters(count, seed, noise):
    y = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.eye(4, 6)[y] * torch.tensor([1, 10, 100, 1, 1, 1]) + noise * draw(count, 6, seed=seed), y


def test_knn_is_that_of_a_loop():
    (x, y), (x_test, y_test) = fit, test = clusters(80, 0, noise=0.3), clusters(60, 1, noise=0.3)
    for k in (3, 20):
        right = 0
        for query, truth in zip((x_test - x.mean(0)) / x.std(0), y_test.tolist()):
            cosine = torch.cosine_similarity(query, (x - x.mean(0)) / x.std(0)).tolist()
            votes = [0.0] * 4
            for i in np.argsort(cosine)[-k:]:
                votes[y[i]] += math.exp(cosine[i] / 0.07)
            right += votes.index(max(votes)) == truth
        assert knn(*fit, *test, k=k) == pytest.approx(right / 60, abs=1e-6)
    assert 0.3 < right / 60 < 0.97


def test_the_linear_probe_learns_what_is_separable_and_nothing_from_noise():
    assert linear_probe(*clusters(80, 0, 0.02), *clusters(60, 1, 0.02)) == 1
    (x, y), (x_test, y_test) = clusters(100, 0, 0.1), clusters(100, 1, 0.1)
    assert linear_probe(draw(100, 6), y, draw(100, 6, seed=1), y_test) < 0.4
    with torch.no_grad():  # as its caller evaluates
        assert linear_probe(1000 * x + 7, y, 1000 * x_test + 7, y_test) == linear_probe(x, y, x_test, y_test)


def utterances(count, seed):
    """Random words; each letter lasts 2 to 4 frames that point its own way, between silences."""
    rng, x, labels = np.random.default_rng(seed), [], []
    for _ in range(count):
        word, frames = rng.integers(1, 5, rng.integers(2, 7)).tolist(), [0]
        for letter in word:
            frames += [letter] * rng.integers(2, 5) + [0] * rng.integers(1, 4)
        noise = 0.1 * rng.standard_normal((len(frames), 6))
        x.append(torch.tensor(np.eye(6)[frames] + noise, dtype=torch.float32))
        labels.append(word)
    return x, labels


def greedy(log_probs):
    best = log_probs.argmax(-1).tolist()
    return [one for one, before in zip(best, [0, *best]) if one != before and one != 0]


def test_the_ctc_probe_learns_separable_letters():
    x, labels = utterances(20, 0)
    short, word = x[0][:2], [1, 2, 3, 4]  # shorter than its transcript
    with torch.no_grad():
        probe = fit_ctc([*x, short], [*labels, word], classes=5)
    for u, word in zip(*utterances(20, 1)):
        assert greedy(probe(u)) == word and not probe(u).requires_grad
        torch.testing.assert_close(probe(u).exp().sum(-1), torch.ones(len(u)))


def test_the_ctc_probe_leaves_the_blanks_behind_after_a_few_steps():
    """Letters among much silence: without the flat start, 60 steps end where blanks are the best answer."""
    x, labels = utterances(20, 0)
    x = [torch.cat([u, u[:1].repeat(4 * len(u), 1)]) for u in x]
    x = [u + draw(*u.shape, seed=i) / 2 for i, u in enumerate(x)]
    probe = fit_ctc(x, labels, classes=5, steps=60)
    assert sum(bool(greedy(probe(u))) for u in x) > 10

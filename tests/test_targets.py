"""targets.py against loops over single numbers."""

import math

import numpy as np
import pytest
import torch

from targets import (
    average_precision, explained, feature_std, fit_ctc, instance_norm, layer_norm, position_share, regression_loss, tau_at,
    top_k_average,
)  # fmt: skip

NORMS = ("layer", "instance", "none")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


# ---- normalise and average -----------------------------------------------------------------------------------------


def standardised(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)  # biased
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]


def naive_norm(a, norm):
    """a: nested lists [B][T][D], normalised over D of each position or over T of each channel."""
    if norm == "layer":
        return [[standardised(position) for position in sample] for sample in a]
    if norm == "instance":
        channels = [[standardised(channel) for channel in zip(*sample)] for sample in a]
        return [[list(position) for position in zip(*sample)] for sample in channels]
    return a


def naive_top_k_average(layers, k, norm, final_norm):
    chosen = [naive_norm(layers[len(layers) - 1 - i], norm) for i in range(k)]
    b, t, d = len(layers[0]), len(layers[0][0]), len(layers[0][0][0])
    mean = [[[sum(a[i][j][c] for a in chosen) / k for c in range(d)] for j in range(t)] for i in range(b)]
    return naive_norm(mean, final_norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final_norm", NORMS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_target_is_the_mean_of_the_top_k_normalised_layers(norm, final_norm, k):
    layers = [draw(2, 5, 3, seed=i) for i in range(4)]
    expected = naive_top_k_average([a.double().tolist() for a in layers], k, norm, final_norm)
    y = top_k_average(layers, k, norm, final_norm)
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_target_is_float32_without_gradient_whatever_the_layers_are():
    layers = [draw(2, 5, 8).bfloat16().requires_grad_() for _ in range(2)]
    for norm in NORMS:
        y = top_k_average(layers, 2, norm, norm)
        assert y.dtype == torch.float32 and not y.requires_grad


@pytest.mark.parametrize("k", [-1, 0, 5])
def test_k_beyond_the_layers_is_refused(k):
    with pytest.raises(ValueError, match="4 layers"):
        top_k_average([draw(1, 2, 3)] * 4, k)


def test_instance_norm_is_per_sample_and_channel_over_all_positions():
    a = draw(3, 7, 4)
    y = instance_norm(a)
    torch.testing.assert_close(y.mean(1), torch.zeros(3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(3, 4), rtol=1e-4, atol=0)
    changed = a.clone()
    changed[1, :, 2] = draw(7, seed=9)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    unmoved = (instance_norm(changed) == y).all(1)
    assert torch.equal(unmoved, same), "only that channel of that sample moves"


def test_instance_norm_of_a_single_position_is_zero():
    assert torch.equal(instance_norm(draw(2, 1, 4)), torch.zeros(2, 1, 4))


def test_layer_norm_is_per_position():
    a = draw(2, 4, 16)
    alone = torch.stack([layer_norm(a[:, t : t + 1])[:, 0] for t in range(4)], 1)
    torch.testing.assert_close(layer_norm(a), alone)


# ---- loss and momentum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.25, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_loss_is_smooth_l1_summed(beta, scale):
    differences = [0, 1e-3, beta / 2, beta - 1e-3, beta, beta + 1e-3, 2 * beta + 1, 30]
    differences += [-d for d in differences]
    pred = draw(8, 2)
    target = pred - torch.tensor(differences).view(8, 2)
    total = slope = 0.0
    for d in (pred.double() - target.double()).flatten().tolist():
        total += d * d if beta == 0 else 0.5 * d * d / beta if abs(d) <= beta else abs(d) - 0.5 * beta
        slope += abs(2 * d) if beta == 0 else min(abs(d) / beta, 1)
    pred.requires_grad_()
    loss = regression_loss(pred, target, beta, scale)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(scale * total, rel=1e-5)
    assert pred.grad.abs().sum().item() == pytest.approx(scale * slope, rel=1e-5)


def test_loss_is_computed_in_float32():
    pred, target = draw(50, 4).bfloat16(), draw(50, 4, seed=1).bfloat16()
    loss = regression_loss(pred, target, 2, 0.25)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(regression_loss(pred.double(), target.double(), 2, 0.25).item(), rel=1e-5)


def test_tau_is_linear_then_constant():
    for step in range(1, 200):
        expected = 0.9 + min(step / 100, 1) * 0.09
        assert tau_at(step, 0.9, 0.99, 100) == pytest.approx(expected, abs=1e-12)
    assert tau_at(100, 0.9, 0.99, 100) == tau_at(10**9, 0.9, 0.99, 100) == 0.99
    assert tau_at(1, 0.5, 0.7, 0) == 0.7, "no ramp: tau_e from the first step"


# ---- meters --------------------------------------------------------------------------------------------------------


def test_feature_std_is_over_positions_then_mean_over_features():
    y = draw(40, 5)
    expected = np.mean([np.std(y[:, c].double().numpy()) for c in range(5)])
    assert feature_std(y).item() == pytest.approx(expected, rel=1e-5)
    assert feature_std(draw(1, 5).expand(40, 5)).item() < 1e-6, "collapsed: all positions alike"


def batches(sizes=(3, 1, 5), t=6, d=4, offset=0.0):
    """(pred, y, mask) of several sizes, with a different mean at each position."""
    out = []
    for i, b in enumerate(sizes):
        y = draw(b, t, d, seed=i) + torch.arange(t)[:, None] + offset
        mask = draw(b, t, seed=100 + i) > 0.5
        mask[:, 0] = True
        out.append((y[mask] + draw(int(mask.sum()), d, seed=200 + i) / 4, y, mask))
    return out


def two_pass(parts, by_position):
    pred = np.concatenate([p.double().numpy() for p, _, _ in parts])
    y = np.concatenate([y.double().numpy() for _, y, _ in parts])
    mask = np.concatenate([m.numpy() for _, _, m in parts])
    m = np.broadcast_to(y.mean(0) if by_position else y.mean((0, 1)), y.shape)
    return 1 - ((pred - y[mask]) ** 2).sum() / ((y[mask] - m[mask]) ** 2).sum()


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_explained_is_that_of_two_passes(by_position, offset):
    parts = batches(offset=offset)
    assert explained(iter(parts), by_position) == pytest.approx(two_pass(parts, by_position), abs=1e-6)


def test_explained_allows_other_lengths_where_positions_have_no_meaning():
    parts = [*batches((2, 3), t=5), *batches((4,), t=9)]
    flat = [(p, y.flatten(0, 1)[:, None], m.flatten()[:, None]) for p, y, m in parts]
    assert explained(parts, False) == pytest.approx(two_pass(flat, True), abs=1e-6)


def test_explained_is_0_for_the_mean_of_each_position_and_1_for_the_truth():
    parts = [(y, y, torch.ones_like(mask)) for _, y, mask in batches()]
    means = torch.cat([y for _, y, _ in parts]).mean(0)
    guess = [(means.expand_as(y).flatten(0, 1), y, mask) for _, y, mask in parts]
    truth = [(y[mask], y, mask) for _, y, mask in parts]
    assert explained(guess, True) == pytest.approx(0, abs=1e-6)
    assert explained(truth, True) == explained(truth, False) == 1
    assert explained(guess, False) > 0.1, "knowing the place explains something when the mean is one for all"


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.7, 1234.5])
def test_explained_is_nan_for_constant_targets(value):
    y, mask = torch.full((3, 6, 4), value), torch.ones(3, 6, dtype=torch.bool)
    for by_position in (True, False):
        assert math.isnan(explained([(y[mask] + 0.01, y, mask)], by_position))


def test_explained_is_nan_for_one_picture_which_is_its_own_mean():
    """Whatever rounding leaves of a spread that is zero in truth must not become a huge number."""
    for seed in range(40):
        y, mask = draw(1, 64, 128, seed=seed), draw(1, 64, seed=100 + seed) > 0
        value = explained([(y[mask] + 0.01, y, mask)], True)
        assert math.isnan(value), f"seed {seed}: {value}"


# ---- sound events ----------------------------------------------------------------------------------------------------


def naive_average_precision(scores, truth):
    values = []
    for c in range(scores.shape[1]):
        ranking = sorted(range(len(scores)), key=lambda i: -scores[i, c].item())  # stable
        hits, precisions = 0, []
        for rank, i in enumerate(ranking, 1):
            if truth[i, c]:
                hits += 1
                precisions.append(hits / rank)
        if precisions:
            values.append(sum(precisions) / hits)
    return sum(values) / len(values)


@pytest.mark.parametrize("levels", [1000, 4])  # of scores: all different, many equal
def test_average_precision_is_that_of_a_loop(levels):
    rng = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (50, 7), generator=rng) / levels
    truth = (torch.rand(50, 7, generator=rng) < torch.linspace(0.02, 0.9, 7)).float()
    truth[:, 3] = 0  # a class that never occurs does not count
    assert average_precision(scores, truth) == pytest.approx(naive_average_precision(scores, truth), abs=1e-6)


def test_average_precision_of_perfect_and_worst_scores():
    truth = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 0]])
    assert average_precision(truth, truth) == 1
    assert average_precision(-truth, truth) == pytest.approx(((1 / 3 + 2 / 4) / 2 + 1 / 4) / 2)
    assert average_precision(truth, torch.zeros(4, 2)) == 0


# ---- the CTC probe -------------------------------------------------------------------------------------------------


def utterances(count, seed, letters=4, dim=6, noise=0.3):
    """Random words; each letter lasts 2 to 4 frames that point its own way, between silences that point another."""
    rng = np.random.default_rng(seed)
    x, said = [], []
    for _ in range(count):
        word = rng.integers(1, letters + 1, rng.integers(2, 7)).tolist()
        spoken = [0]
        for letter in word:
            spoken += [letter] * rng.integers(2, 5) + [0] * rng.integers(1, 4)
        frames = np.eye(dim)[spoken] + noise / 3 * rng.standard_normal((len(spoken), dim))
        x.append(torch.tensor(frames, dtype=torch.float32))
        said.append(word)
    return x, said


def heard(log_probs):
    best = log_probs.argmax(-1).tolist()
    return [one for one, before in zip(best, [0, *best]) if one != before and one != 0]


def test_the_ctc_probe_learns_letters_that_are_separable_without_an_error():
    probe = fit_ctc(*utterances(20, 0), classes=5)
    for frames, word in zip(*utterances(20, 1)):
        log_probs = probe(frames)
        assert heard(log_probs) == word, "utterances that it was not fitted on"
        assert log_probs.shape == (len(frames), 5) and not log_probs.requires_grad
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(frames)))


def test_the_ctc_probe_learns_nothing_from_noise():
    x, said = utterances(20, 0)
    torch.manual_seed(0)
    probe = fit_ctc([torch.randn_like(u) for u in x], said, classes=5)
    right = [heard(probe(torch.randn_like(u))) == word for u, word in zip(*utterances(20, 1))]
    assert sum(right) < 3


def test_the_ctc_probe_has_left_the_blanks_behind_after_a_few_steps():
    """Sparse letters among much silence: without the flat start 60 steps end where blank is the best answer everywhere."""
    x, said = utterances(20, 0)
    x = [torch.cat([u, u[:1].repeat(4 * len(u), 1)]) + 1.5 * torch.randn(5 * len(u), u.shape[1], generator=torch.Generator().manual_seed(0)) for u in x]
    probe = fit_ctc(x, said, classes=5, steps=60)
    assert sum(bool(heard(probe(u))) for u in x) > 10


def test_the_ctc_probe_is_a_function_of_its_data():
    x, said = utterances(8, 0)
    torch.manual_seed(1)
    first = fit_ctc(x, said, 5, steps=20)(x[0])
    torch.manual_seed(2)
    with torch.no_grad():  # as its caller evaluates
        assert torch.equal(first, fit_ctc(x, said, 5, steps=20)(x[0]))
        scaled = fit_ctc([100 * u - 7 for u in x], said, 5, steps=20)
    torch.testing.assert_close(scaled(100 * x[0] - 7), first, rtol=0, atol=1e-3)


def test_the_ctc_probe_survives_a_dead_feature_and_a_transcript_longer_than_its_recording():
    x, said = utterances(8, 0)
    x = [torch.cat([u, torch.full((len(u), 1), 3.0)], 1) for u in x]
    probe = fit_ctc([*x, x[0][:2]], [*said, [1, 2, 3, 4]], 5)
    assert [heard(probe(u)) for u in x] == said


def test_the_positions_share_is_known_where_targets_are_made_of_both():
    """y = a code of the place + noise of thrice its variance, in texts of different lengths: a quarter, without bias."""
    torch.manual_seed(0)
    code, parts = torch.randn(20, 64), []
    for rows, length in ((6, 20), (5, 13)):
        real = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))
        parts.append((code[:length] + 3**0.5 * torch.randn(rows, length, 64) + 5, real))
    assert position_share(iter(parts), places=24) == pytest.approx(0.25, abs=0.05)
    parts = [(torch.where(real[..., None], y, torch.nan).nan_to_num(1e3), real) for y, real in parts]
    assert position_share(parts, places=24) == pytest.approx(0.25, abs=0.05), "padding does not count"
    assert position_share([(code[None].expand(3, -1, -1), torch.ones(3, 20, dtype=bool))], 20) == pytest.approx(1)
    noise = [(torch.randn(4, 20, 64), torch.ones(4, 20, dtype=bool))]
    assert abs(position_share(noise, 20)) < 0.05, "the mean of 4 explains a quarter of the noise it was fitted on"
    assert math.isnan(position_share([(torch.ones(4, 20, 8), torch.ones(4, 20, dtype=bool))], 20))

"""targets.py against loops over single numbers."""

import math

import numpy as np
import pytest
import torch

from targets import feature_std, regression_loss, tau_at, top_k_average

NORMS = ("layer", "instance", "none", "instance_layer", "layer_instance")


def draw(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1


def standardised(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)  # biased
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]


def naive_norm(a, norm):
    """a: lists [B][T][D], over the D of each position or the T of each channel."""
    if norm == "layer":
        return [[standardised(position) for position in sample] for sample in a]
    if norm == "instance":
        channels = [[standardised(channel) for channel in zip(*sample)] for sample in a]
        return [[list(position) for position in zip(*sample)] for sample in channels]
    if "_" in norm:
        first, second = norm.split("_")
        return naive_norm(naive_norm(a, first), second)
    return a


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("final_norm", NORMS)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_target_is_the_mean_of_the_top_k_normalised_layers(norm, final_norm, k):
    layers = [draw(2, 5, 3, seed=l) for l in range(4)]
    top = [naive_norm(layers[3 - l].double().tolist(), norm) for l in range(k)]
    mean = [[[sum(a[b][t][d] for a in top) / k for d in range(3)] for t in range(5)] for b in range(2)]
    expected = torch.tensor(naive_norm(mean, final_norm))
    torch.testing.assert_close(top_k_average(layers, k, norm, final_norm), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_target_is_float32_without_gradient(norm):
    layers = [draw(2, 5, 8, seed=l).bfloat16().requires_grad_() for l in range(2)]
    y = top_k_average(layers, 2, norm, norm)
    assert y.dtype == torch.float32 and not y.requires_grad
    torch.testing.assert_close(y, top_k_average([a.float() for a in layers], 2, norm, norm))


@pytest.mark.parametrize("k", [-1, 0, 5])
def test_k_beyond_the_layers_is_refused(k):
    with pytest.raises(ValueError, match="4 layers"):
        top_k_average([draw(1, 2, 3)] * 4, k, "layer")


@pytest.mark.parametrize("beta", [0, 0.25, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_loss_is_the_sum_of_smooth_l1(beta, scale):
    differences = [0, 1e-3, beta / 2, beta - 1e-3, beta, beta + 1e-3, 2 * beta + 1, 30]
    differences = torch.tensor(differences + [-d for d in differences]).view(8, 2)
    f = draw(8, 2).requires_grad_()
    y = f.detach() - differences
    total = slope = 0.0
    for d in (f.double() - y.double()).flatten().tolist():
        total += d * d if beta == 0 else d * d / (2 * beta) if abs(d) <= beta else abs(d) - beta / 2
        slope += abs(2 * d) if beta == 0 else min(abs(d) / beta, 1)
    loss = regression_loss(f, y, beta, scale)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(scale * total, rel=1e-5)
    assert f.grad.abs().sum().item() == pytest.approx(scale * slope, rel=1e-5)


def test_loss_is_computed_in_float32():
    f, y = draw(50, 4).bfloat16(), draw(50, 4, seed=1).bfloat16()
    for beta in (0, 2):
        loss, exact = regression_loss(f, y, beta, 0.25), regression_loss(f.double(), y.double(), beta, 0.25)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_tau_is_linear_then_constant():
    for step in range(1, 200):
        assert tau_at(step, 0.9, 0.99, 100) == pytest.approx(0.9 + min(step, 100) * 0.0009, abs=1e-12)
    assert tau_at(100, 0.9, 0.99, 100) == tau_at(10**9, 0.9, 0.99, 100) == 0.99
    assert tau_at(1, 0.5, 0.7, 0) == 0.7


def test_feature_std_is_over_positions_and_averaged_over_features():
    y = draw(40, 5) * torch.arange(1, 6)
    expected = np.mean([np.std(y[:, d].double().numpy()) for d in range(5)])
    assert feature_std(y).item() == pytest.approx(expected, rel=1e-5)
    assert feature_std(draw(1, 5).expand(40, 5)).item() < 1e-6

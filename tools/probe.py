"""What frozen features know: a k-nearest-neighbour vote and a linear probe, both returning top-1 as a fraction of 1.

Arguments of both: x (N, D) features and y (N,) int64 labels to fit on, x_test (M, D) and y_test (M,) to measure on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = x.mean(0), x.std(0) + 1e-6
    return (x - mean) / std, (x_test - mean) / std


def knn(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    """Top-1 of a k-nearest-neighbour vote, weighted by exp(cosine / temperature) (Wu et al. 2018)."""
    x, x_test = (F.normalize(v, dim=1) for v in standardise(x, x_test))
    weight, near = (x_test @ x.T).topk(min(k, len(x)), dim=1)
    votes = torch.zeros(len(x_test), int(y.max()) + 1, device=x.device)
    votes.scatter_add_(1, y[near], (weight / temperature).exp())
    return (votes.argmax(1) == y_test).float().mean().item()


@torch.enable_grad()
def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, penalty: float = 1e-3) -> float:
    """Top-1 of multinomial logistic regression on standardised features, fitted to the end by L-BFGS."""
    x, x_test = standardise(x, x_test)
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, device=x.device, requires_grad=True)
    bias = torch.zeros(weight.shape[1], device=x.device, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        fit.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    fit.step(closure)
    return ((x_test @ weight + bias).argmax(1) == y_test).float().mean().item()

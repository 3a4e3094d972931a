"""What the student regresses (normalise, average, loss, tau: paper sections 3.3 and 3.4), meters and probes."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of every target normalisation, in all modalities


# ---- the target: y = 1/K * sum of the top K normalised layers ---------------------------------------------------


def layer_norm(a: Tensor) -> Tensor:
    """Parameter-free layer norm over the D features of each position. a: (B, T, D) -> (B, T, D) float32."""
    return F.layer_norm(a.float(), a.shape[-1:], eps=EPS)


def instance_norm(a: Tensor) -> Tensor:
    """Parameter-free instance norm: each channel of each sample over its T positions, biased variance.

    All T positions count, padding too (as released). a: (B, T, D) -> (B, T, D) float32.
    """
    return F.layer_norm(a.float().transpose(1, 2), a.shape[1:2], eps=EPS).transpose(1, 2)  # over T, not D


NORMS = {"layer": layer_norm, "instance": instance_norm, "none": Tensor.float}


@torch.no_grad()
def top_k_average(layers: list[Tensor], k: int, norm: str = "layer", final_norm: str = "none") -> Tensor:
    """The target y of every position: the mean of the top k layers, each normalised first (paper section 3.3).

    layers      teacher outputs [a_1 .. a_L], each (B, T, D)
    k           how many layers from the top, 1 <= k <= L
    norm        of each layer: "layer" (vision, text), "instance" (speech) or "none"
    final_norm  of the mean: "layer" (vision, AudioSet), "instance" or "none" (speech, text)
    returns     (B, T, D) float32, without gradient
    raises      ValueError if k is out of range
    """
    if not 1 <= k <= len(layers):
        raise ValueError(f"K = {k}, but the teacher has {len(layers)} layers: take 1 <= K <= {len(layers)}")
    y = sum(NORMS[norm](a) for a in layers[-k:]) / k
    return NORMS[final_norm](y)


# ---- the loss ----------------------------------------------------------------------------------------------------


def regression_loss(pred: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    """Smooth L1 summed over positions: scale * sum_D l(pred - target), l = 0.5 d^2 / beta or |d| - 0.5 beta.

    The caller divides by the number of masked positions of the GLOBAL batch, which no single process knows from
    its own share. beta = 0 is the plain squared error d^2, without the factor 1/2 (speech).

    pred, target  (M, D), any float dtype; computed in float32
    beta          where the quadratic part ends (vision 2, text 4, speech 0)
    scale         1 / D (vision: mean over features), 1 / sqrt(D) (speech) or 1 (text)
    returns       scalar float32
    """
    pred, target = pred.float(), target.float()
    if beta == 0:
        return scale * F.mse_loss(pred, target, reduction="sum")
    return scale * F.smooth_l1_loss(pred, target, beta=beta, reduction="sum")


def tau_at(step: int, tau_0: float, tau_e: float, tau_n: int) -> float:
    """The teacher's momentum at optimiser step `step` (1, 2, ...): linear from tau_0 to tau_e over tau_n steps, then tau_e."""
    return tau_e if step >= tau_n else tau_0 + (tau_e - tau_0) * step / tau_n


# ---- meters: does it learn, has it collapsed? -----------------------------------------------------------------------


def feature_std(y: Tensor) -> Tensor:
    """Mean over features of the standard deviation over positions. y: (M, D) -> scalar; near 0 means collapse."""
    return y.detach().float().std(dim=0, correction=0).mean()


def explained(batches: Iterable[tuple[Tensor, Tensor, Tensor]], by_position: bool) -> float:
    """Share of the target's variance that the predictions explain: 1 - sum |pred - y|^2 / sum |y - m|^2.

    Both sums run over the masked positions of held-out data; m is the mean target of the held-out set, of each
    position where positions have a fixed meaning (vision: knowing the place alone earns 0), else one for all.

    batches      of (pred (M, D), y (B, T, D), mask (B, T) bool); one pass, sums in float64
    by_position  True: one mean per position, all T equal; False: one mean over all positions
    returns      at most 1; 0 = no better than m; nan when there is nothing to explain
    """
    count = total = masked_count = masked_total = squares = residual = 0.0
    for pred, y, mask in batches:
        y, pred = y.double(), pred.double()
        if not by_position:
            y, mask = y.flatten(0, 1)[:, None], mask.flatten()[:, None]  # (B * T, 1, D): one position for all
        count += len(y)
        total = total + y.sum(0)  # (T, D)
        masked_count = masked_count + mask.sum(0)[:, None]  # (T, 1)
        masked_total = masked_total + (y * mask[..., None]).sum(0)  # (T, D)
        squares += y[mask].square().sum().item()
        residual += (pred - y[mask]).square().sum().item()
    mean = total / count
    spread = squares + (masked_count * mean.square() - 2 * mean * masked_total).sum().item()  # sum |y - m|^2
    return 1 - residual / spread if spread > 1e-12 * squares else math.nan


def unhealthy(row: dict, guard_after: int, least_target_std: float, least_pred_std: float) -> str:
    """One line if a run has diverged or (from step guard_after on; -1: never) collapsed, with what to try; else an empty string.

    row  a line of metrics.jsonl: step, loss, grad_norm, target_std, pred_std
    """
    if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
        return "the loss is not finite; try a smaller --lr, a longer --warmup or --dtype float32, and --resume"
    for name, least in (("target_std", least_target_std), ("pred_std", least_pred_std)):
        if 0 <= guard_after <= row["step"] and row[name] < least:
            return f"collapsed, {name} {row[name]:.3f} < {least}; try a smaller --lr, a longer --warmup, a larger --tau_0, --norm layer or instance; --guard_after -1 goes on regardless"  # fmt: skip
    return ""


def show(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


# ---- probes: what frozen features know. x (N, D), y (N,) int64 to fit on; x_test (M, D), y_test (M,) to measure on ---------


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
    """Top-1 of multinomial logistic regression on standardised features, fitted to the end by L-BFGS; nan if x is one row or none."""
    if len(x) < 2:
        return math.nan
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


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over classes of the precision at each hit, down the ranking by score; classes without a hit are left out.

    scores (N, C) float, truth (N, C) 1 or 0 -> fraction of 1; clips of equal score count in their order in the data.
    """
    hits = truth.gather(0, scores.argsort(dim=0, descending=True, stable=True)) > 0.5
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    found = hits.any(0)
    return ((precision * hits).sum(0) / hits.sum(0).clamp_min(1))[found].mean().item() if found.any() else 0.0


@torch.enable_grad()
def fit_ctc(x: list[Tensor], letters: list[list[int]], classes: int, steps: int = 400, lr: float = 0.05):
    """A linear layer on frozen frames, trained by CTC (Graves et al. 2006; blank 0) with Adam on all utterances at once.

    A flat start, as hidden Markov models have it: for a quarter of the steps every letter owns an even share of its utterance.
    Without it CTC says blank everywhere for so long that the number of steps decides what comes out.

    x        frames (T, D) of each utterance;  letters  its transcript, indices 1 .. classes - 1
    returns  a function: frames (T, D) of one utterance -> log-probabilities (T, classes)
    """
    device, every = x[0].device, torch.cat(x)
    mean, std = every.mean(0), every.std(0) + 1e-6
    frames = [len(u) for u in x]
    padded = torch.nn.utils.rnn.pad_sequence([(u - mean) / std for u in x])  # (T, B, D)
    goal, lengths = torch.tensor([i for text in letters for i in text], device=device), [len(text) for text in letters]
    shares = [goal.new_tensor(text)[torch.arange(n, device=device) * len(text) // n] for text, n in zip(letters, frames)]
    even = torch.nn.utils.rnn.pad_sequence(shares, padding_value=-100)  # (T, B); -100: no frame, not scored
    weight = torch.zeros(padded.shape[-1], classes, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=lr, betas=(0.9, 0.99), eps=1e-5)  # gradients of rounding errors are no direction
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        log_probs = (padded @ weight + bias).log_softmax(-1)
        if step < steps // 4:
            loss = F.nll_loss(log_probs.flatten(0, 1), even.flatten())
        else:
            loss = F.ctc_loss(log_probs, goal, tuple(frames), tuple(lengths), zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight, bias = weight.detach(), bias.detach()
    return lambda u: ((u - mean) / std @ weight + bias).log_softmax(-1)


def position_share(batches: Iterable[tuple[Tensor, Tensor]], places: int) -> float:
    """Share of the targets' variance that their place alone explains: near 1, they say where a token stands and nothing else.

    1 - variance about the mean of each position / variance about the mean of all, without bias (adjusted R squared).

    batches      of (y (B, T, D), real (B, T) bool, False at padding), T may differ; one pass, sums in float64
    places       the largest T
    returns      at most 1; about 0 for targets that do not know their place; nan when they do not vary
    """
    count = total = squares = 0.0
    for y, real in batches:
        beyond = places - y.shape[1]
        y = F.pad(y.double() * real[..., None], (0, 0, 0, beyond))
        count = count + F.pad(real.double(), (0, beyond)).sum(0)[:, None]  # (places, 1)
        total = total + y.sum(0)  # (places, D)
        squares += y.square().sum().item()
    n, used = count.sum().item(), (count > 0).sum().item()
    within = squares - (total.square() / count.clamp_min(1)).sum().item()
    spread = squares - total.sum(0).square().sum().item() / n
    return 1 - within / (n - used) * (n - 1) / spread if n > used and spread > 1e-12 * squares else math.nan

"""What the student regresses: normalise, average, loss, tau (paper sections 3.3 and 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of every target normalisation, in all modalities


def layer_norm(a: Tensor) -> Tensor:
    """Over the D features of each position, without parameters: (B, T, D) -> (B, T, D) float32."""
    return F.layer_norm(a.float(), a.shape[-1:], eps=EPS)


def instance_norm(a: Tensor) -> Tensor:
    """Of each channel and sample over all T positions, padding too (as fairseq): (B, T, D) -> float32."""
    return F.layer_norm(a.float().transpose(1, 2), a.shape[1:2], eps=EPS).transpose(1, 2)


NORMS = {"layer": layer_norm, "instance": instance_norm, "none": Tensor.float}
NORMS["instance_layer"] = lambda a: layer_norm(instance_norm(a))  # both, one after the other
NORMS["layer_instance"] = lambda a: instance_norm(layer_norm(a))


@torch.no_grad()
def top_k_average(layers: list[Tensor], k: int, norm: str, final_norm: str = "none") -> Tensor:
    """y = 1/K * sum of the normalised top K layers (section 3.3), in float32, without gradient.

    layers      the teacher's [a_1 .. a_L], (B, T, D) each
    k           how many from the top, 1 <= k <= L; else ValueError
    norm        of each layer, one of NORMS: "layer" (vision, text), "instance" (speech), ...
    final_norm  of the mean: "layer" (vision, AudioSet), "none" (speech, text), ...
    """
    if not 1 <= k <= len(layers):
        raise ValueError(f"K = {k}, but the teacher gave {len(layers)} layers")
    y = sum(NORMS[norm](a) for a in layers[-k:]) / k
    return NORMS[final_norm](y)


def regression_loss(f: Tensor, y: Tensor, beta: float, scale: float) -> Tensor:
    """scale * sum of smooth L1 over positions and features (section 3.4), in float32.

    smooth L1 of d = f - y: d^2 / (2 beta) up to |d| = beta, then |d| - beta / 2. beta 0: d^2 (speech).
    The caller divides by the number of masked positions in the whole batch, over all processes.

    f, y   (M, D) predictions and targets at the masked positions
    scale  1 / D (vision: a mean over features), 1 / sqrt(D) (speech) or 1 (text)
    """
    if beta == 0:
        return scale * F.mse_loss(f.float(), y.float(), reduction="sum")
    return scale * F.smooth_l1_loss(f.float(), y.float(), beta=beta, reduction="sum")


def tau_at(step: int, tau_0: float, tau_e: float, tau_n: int) -> float:
    """The teacher's momentum at step 1, 2, ...: linear from tau_0 to tau_e over tau_n steps, then tau_e."""
    return tau_e if step >= tau_n else tau_0 + (tau_e - tau_0) * step / tau_n


def feature_std(y: Tensor) -> Tensor:
    """Std over positions, averaged over features: (M, D) -> scalar. Near 0 the network has collapsed."""
    return y.detach().float().std(dim=0, correction=0).mean()

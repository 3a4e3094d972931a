"""The released data2vec 2.0 step, in numbers: each *.pt of GOLDEN2_DIR (default tests/golden2) is reproduced.

A file is one tiny model and what one step did with it, by what its `config` says; or statistics of masks.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import model2
from masking import exact_blocks, uniform_mask
from model import Teacher
from model2 import Decoder, Encoder2, Patches, Student2, Tokens, Waves
from targets import regression_loss, top_k_average
from tools.released2 import our_names

FOLDER = Path(os.environ.get("GOLDEN2_DIR", Path(__file__).parent / "golden2"))
FILES = sorted(FOLDER.glob("*.pt"))


def read(path):
    return torch.load(path, weights_only=True)


STEPS = [path for path in FILES if "pred" in read(path)]
steps = pytest.mark.parametrize("path", STEPS, ids=[path.stem for path in STEPS])


def close(ours, expected, atol, what):
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)} is not {tuple(expected.shape)}"
    error = (ours.detach() - expected).abs().max().item() if ours.numel() else 0.0
    assert error <= atol, f"{what}: off by {error:.2e}, tolerance {atol:.1e}"


def embed_of(c):
    if c["modality"] == "image":
        side = c["input_size"] // c["patch_size"]
        return Patches((side, side), c["patch_size"], c["embed_dim"])
    if c["modality"] == "text":
        rows, pad = c["num_position_embeddings"], c["pad_idx"]
        return Tokens(c["vocab_size"], rows - pad - 1, pad, c["embed_dim"], 0.0, c["embedding_norm_eps"])
    convs = []
    for part in c["feature_encoder_spec"].split("+"):  # such as [(512,10,5)]+[(512,3,2)]*4
        numbers = [int(n) for n in re.findall(r"\d+", part)]
        convs += [numbers[:3]] * (numbers[3] if len(numbers) > 3 else 1)
    stack = c["conv_pos_kernel"], c["conv_pos_depth"], c["conv_pos_groups"]
    return Waves(convs, c["embed_dim"], *stack, c["num_heads"], c["embedding_norm_eps"])


def student_of(golden):
    c = golden["config"]
    context = c["modality"] != "text" or c["prenet_depth"] > 0
    block = {"heads": c["num_heads"], "ffn": int(c["embed_dim"] * c["mlp_ratio"]), "dropout": (0, 0, 0)}
    block |= {"prenet": c["prenet_depth"], "context": context, "eps": c["block_norm_eps"]}
    encoder = Encoder2(embed_of(c), c["embed_dim"], c["depth"], **block)
    sizes = [c[f"decoder_{name}"] for name in ("dim", "layers", "kernel", "groups")]
    grid = encoder.embed.grid
    hidden = int(c["projection_ratio"] * c["decoder_dim"]) if c["projection_layers"] == 2 else 0
    decoder = Decoder(c["embed_dim"], *sizes, grid, c["decoder_residual"], hidden)
    student = Student2(encoder, decoder, noise=c["mask_noise_std"])
    student.load_state_dict(our_names(golden["model"]))
    return student


def norms(c):
    """How each layer is normalised, and how their mean."""
    each, mean = ("instance", "layer"), ("layer", "instance")  # in this order, if both are set
    norm = "_".join(name for name in each if c[f"{name}_norm_target_layer"])
    return norm or "none", "_".join(name for name in mean if c[f"{name}_norm_targets"]) or "none"


def test_there_are_golden_files():
    assert STEPS, f"no golden files in {FOLDER}"


@steps
def test_one_step(path, monkeypatch):
    golden = read(path)
    c, mask, noise = golden["config"], golden["mask"], golden["noise"]
    student, kind = student_of(golden), c["modality"]
    shared = {"image": (), "audio": ("embed.content",), "text": ("embed", "context")}[kind]
    teacher = Teacher(student.encoder, shared)
    missing, unexpected = teacher.load_state_dict(our_names(golden["ema"]), strict=False)
    assert not unexpected and all(name.startswith(teacher.shared, 8) for name in missing)

    # predictions, targets
    (x,) = golden["input"].values()
    drawn = torch.zeros(*mask.shape, noise.shape[1])
    drawn[mask] = noise / c["mask_noise_std"]
    monkeypatch.setattr(model2, "noise_of", lambda *_: drawn)
    f, content, valid = student.train()(x, mask)
    close(content, golden["local_features"], 2e-5, "content")
    h, _ = student.encoder(x, mask)
    close(h[:, student.encoder.prefix :], golden["context_out"], 2e-5, "visible positions")
    close(f, golden["pred"], 2e-5, "predictions")
    layers = teacher(x) if kind == "image" else teacher.from_embedded(content, valid)
    k, copies, scale = c["average_top_k_layers"], c["clone_batch"], c["loss_scale"] or c["embed_dim"] ** -0.5
    for ours, theirs in zip(layers[-k:], golden["teacher_layers"]):
        close(ours, theirs, 2e-5, "layer of the teacher")
    y = top_k_average(layers, k, *norms(c))
    close(y, golden["target_all"], 3e-5, "targets")
    targets = y.repeat_interleave(copies, 0)[mask]
    close(targets, golden["target"], 3e-5, "targets at hidden positions")

    # losses, gradients
    losses = {f"{kind.upper()}_regression": regression_loss(f, targets, c["loss_beta"], scale)}
    loss = sum(losses.values()) / len(f)
    if c["cls_loss"]:
        target = y.mean(1).repeat_interleave(copies, 0)
        close(student.cls, golden["cls_pred"], 2e-5, "class term")
        close(target, golden["cls_target"], 2e-5, "target of the class term")
        losses["cls"] = c["cls_loss"] * len(f) * regression_loss(student.cls, target, c["loss_beta"], scale)
        mean = regression_loss(student.cls, target, c["loss_beta"], scale) / len(target)
        loss = loss + c["cls_loss"] * len(target) * mean
    for name, value in losses.items():
        torch.testing.assert_close(value, golden["losses"][name], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=0)
    loss.backward()
    expected = our_names(golden["grads"])
    for name, p in student.named_parameters():
        close(p.grad, expected.pop(name), 3e-5, f"gradient of {name}")
    assert not expected, f"without a gradient here: {', '.join(expected)}"

    # the step, and the average after it
    with torch.no_grad():
        for p in student.parameters():
            p -= c["sgd_lr"] * p.grad
    teacher.update(student.encoder, c["ema_tau"])
    after = our_names(golden["ema_after"])
    for name, value in teacher.state_dict().items():
        close(value, after.pop(name, student.state_dict()[name]), 1e-6, f"average of {name}")
    assert not after


@steps
def test_features_of_the_whole_input(path):
    golden = read(path)
    (x,) = golden["input"].values()
    features, _ = student_of(golden).eval().encoder(x)
    close(features, golden["student_features"], 2e-5, "features")


STATISTICS = {name: c for path in FILES for name, c in read(path).get("masks", {}).items()}


def chosen_of(c, n, rng):
    """What is drawn in blocks, hidden or visible, as the file has it: (n, H, W) or (n, T) bool."""
    if c["kind"] == "uniform":
        return uniform_mask(n, c["positions"], c["mask_prob"], rng)
    side = int(c["positions"] ** 0.5)
    grid = (side, side) if c["kind"] == "2d" else (c["positions"],)
    share = 1 - c["mask_prob"] if c["inverse_mask"] else c["mask_prob"]
    return exact_blocks(n, grid, share, c["mask_prob_adjust"], c["mask_length"], rng).view(n, *grid)


def neighbours(rows, axis):
    """How often two positions in a row, along an axis of (N, ...), are both chosen."""
    n = rows.shape[axis] - 1
    return rows.narrow(axis, 0, n) & rows.narrow(axis, 1, n)


@pytest.mark.parametrize("name", STATISTICS)
def test_masks_are_like_the_released_ones(name):
    c, n, rng = STATISTICS[name], 600, np.random.default_rng(0)
    rows = chosen_of(c, n, rng)
    hidden = ~rows if c.get("inverse_mask") else rows
    assert set(hidden.flatten(1).sum(1).tolist()) == {c["hidden"]}
    p = c["hidden_frequency"]
    error = (hidden.flatten(1).float().mean(0) - p).abs()
    assert (error <= 5 * (p * (1 - p) * (1 / n + 1 / c["draws"])).sqrt() + 1e-3).all()
    found, padded = {}, torch.nn.functional.pad(rows, (1, 1) * (rows.ndim - 1))
    if c["kind"] == "2d":
        found["adjacent_block_pairs"] = sum(neighbours(rows, axis).flatten(1).sum(1) for axis in (1, 2))
        near = padded[:, 2:, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 1:-1, 2:] | padded[:, 1:-1, :-2]
        found["lone_block_cells"] = (rows & ~near).flatten(1).sum(1)
    elif c["kind"] == "1d":
        found["hidden_runs"] = (rows & ~padded[:, :-2]).sum(1)
        found["lone_hidden"] = (rows & ~padded[:, :-2] & ~padded[:, 2:]).sum(1)
    for key, values in found.items():
        mean, std = c[key]
        assert abs(values.float().mean() - mean) <= 4 * std * (1 / n + 1 / c["draws"]) ** 0.5, key

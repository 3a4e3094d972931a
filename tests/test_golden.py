"""The released training step, in numbers: every *.pt under GOLDEN_DIR (default tests/golden) must be reproduced.

What is checked follows from `config.modality` and from the fields that a file holds.
"""

import os
from pathlib import Path

import pytest
import torch

from model import Classifier, Student, Teacher, regression_head, vision_encoder
from targets import regression_loss, tau_at, top_k_average
from tools.convert import VISION, from_released_vision, rename

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.pt"))]


def read(path):
    return torch.load(path, weights_only=True)


def of(modality, *fields):
    """The golden files of one modality that hold these fields."""
    chosen = []
    for param in FILES:
        file = read(param.values[0])
        if file.get("config", {}).get("modality") == modality and all(field in file for field in fields):
            chosen.append(param)
    return chosen or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {modality} file in GOLDEN_DIR"))]


def close(ours, golden, atol, what):
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} is not {tuple(golden.shape)}"
    error = (ours.detach() - golden).abs().max().item() if golden.numel() else 0.0
    assert error <= atol, f"{what}: off by {error:.2e}, tolerance {atol:.0e}"


def test_there_are_golden_files():
    assert FILES, f"no golden files in {FOLDER}"


# ---- vision --------------------------------------------------------------------------------------------------------


def vision_from(config):
    target = {"end": "block", "fc": "ffn"}[config["layer_results"]]
    return vision_encoder(
        image_size=tuple(config["image_size"]), patch=config["patch_size"], dim=config["encoder_embed_dim"],
        depth=config["encoder_layers"], heads=config["encoder_attention_heads"],
        ffn=int(config["encoder_embed_dim"] * config["mlp_ratio"]), layer_scale=0.1 if config["layer_scale"] else 0.0,
        relative=config["use_shared_rel_pos_bias"], learned_std=0.1 if config["use_abs_pos_emb"] else 0.0, target=target,
    )  # fmt: skip


def norms(config):
    norm = "instance" if config["target_instance_norm"] else "layer" if config["target_layer_norm_last"] else "none"
    return norm, "layer" if config["post_target_layer_norm"] else "none"


@pytest.mark.parametrize("path", of("vision", "pred"))
def test_vision_step(path):
    golden = read(path)
    config, image, mask = golden["config"], golden["input"]["image"], golden["mask"]
    state = from_released_vision({"model": golden["model"], "model_ema": golden["ema"]})
    student = Student(vision_from(config), regression_head(config["encoder_embed_dim"]))
    student.load_state_dict(state["student"])
    teacher = Teacher(student.encoder)
    teacher.load_state_dict(state["teacher"])
    student.train()

    layers, k = teacher(image), config["average_top_k_layers"]
    for i, (ours, theirs) in enumerate(zip(layers[-k:], golden["teacher_layers"], strict=True)):
        close(ours, theirs, 1e-5, f"teacher layer {i}")
    y = top_k_average(layers, k, *norms(config))[mask]
    close(y, golden["target"], 1e-5, "targets")
    f = student(image, mask)
    close(f, golden["pred"], 1e-5, "predictions")

    beta = 0.0 if config["l2_loss"] else config["l1_beta"]
    gain = config["loss_scale"] if config["loss_scale"] > 0 else 1.0
    total = regression_loss(f, y, beta, gain)
    torch.testing.assert_close(total.detach(), golden["loss_sum"], rtol=1e-5, atol=0)
    loss = regression_loss(f, y, beta, gain / y.shape[-1]) / len(y)  # as the training loop writes it
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)

    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    expected = from_released_vision({"model": golden["grads"]})["student"]
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        close(gradient, expected[name], 1e-5, f"gradient of {name}")

    with torch.no_grad():
        for p in student.parameters():
            p -= config["sgd_lr"] * p.grad
    teacher.update(student.encoder, config["ema_tau"])
    after = rename(golden["ema_after"], VISION)
    ours = teacher.encoder.state_dict()
    assert set(ours) == set(after)
    for name, tensor in after.items():
        close(ours[name], tensor, 1e-6, f"teacher after the update, {name}")


@pytest.mark.parametrize("path", of("vision", "student_features"))
def test_vision_features(path):
    golden = read(path)
    config, image = golden["config"], golden["input"]["image"]
    student = Student(vision_from(config), regression_head(config["encoder_embed_dim"]))
    student.load_state_dict(from_released_vision({"model": golden["model"]})["student"])
    student.eval()
    close(student.encoder(image)[0], golden["student_features"], 1e-5, "features")
    if "student_features_prenorm" in golden and config["layer_results"] == "end":
        patches = golden["student_features_prenorm"][:, student.encoder.prefix :]
        close(student.encoder(image)[1][-1], patches, 1e-5, "last block")


@pytest.mark.parametrize("path", of("vision", "logits"))
def test_vision_finetuned(path):
    golden = read(path)
    config = golden["config"]
    classifier = Classifier(vision_from(config), config["num_classes"])
    classifier.load_state_dict(from_released_vision({"model": golden["model"]})["student"])
    classifier.eval()
    close(classifier(golden["input"]["image"]), golden["logits"], 1e-5, "logits")


# ---- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in FILES if "ema_decay_schedule" in read(p.values[0])])
def test_tau_schedule(path):
    for name, values in read(path)["ema_decay_schedule"].items():
        if isinstance(values, dict):
            tau_0, rest = name[name.index("(") + 1 : -1].split("->")
            tau_e, tau_n = rest.split(",")
            for step, tau in values.items():
                assert tau_at(step, float(tau_0), float(tau_e), int(tau_n)) == pytest.approx(tau, abs=1e-9)
        else:
            assert tau_at(1, values, values, 0) == tau_at(10**6, values, values, 0) == values

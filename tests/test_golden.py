"""The released training step, in numbers: every *.pt under GOLDEN_DIR (default tests/golden) must be reproduced.

What is checked follows from `config.modality` and from the fields that a file holds.
"""

import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import Classifier, Recogniser, Student, Teacher, regression_head, speech_encoder, text_encoder, vision_encoder
from targets import regression_loss, tau_at, top_k_average
from tools.convert import (
    POST_NORM, SPEECH, TEXT, VISION, from_released_speech, from_released_text, from_released_vision, fuse, rename,
)  # fmt: skip

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


def close(ours, golden, atol, what, large=math.inf):
    """Within atol; entries beyond `large` within atol of their size."""
    assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} is not {tuple(golden.shape)}"
    error = ((ours.detach() - golden) / golden.div(large).abs().clamp_min(1)).abs().max().item() if golden.numel() else 0.0
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
    """The normalisation of each layer and of their mean: vision files name them differently."""
    vision = config["modality"] == "vision"
    names = ("target_instance_norm", "target_layer_norm_last") if vision else ("instance_norm_target_layer", "layer_norm_target_layer")
    last = ("", "post_target_layer_norm") if vision else ("instance_norm_targets", "layer_norm_targets")
    return tuple(
        "instance" if config.get(instance) else "layer" if config.get(layer) else "none" for instance, layer in (names, last)
    )


def check_targets(golden, layers):
    """Teacher layers, then targets at the masked positions -> the targets."""
    k = golden["config"]["average_top_k_layers"]
    for i, (ours, theirs) in enumerate(zip(layers[-k:], golden["teacher_layers"], strict=True)):
        close(ours, theirs, 1e-5, f"teacher layer {i}")
    y = top_k_average(layers, k, *norms(golden["config"]))[golden["mask"]]
    close(y, golden["target"], 1.5e-4 if golden["config"]["modality"] == "audio" else 1e-5, "targets")
    return y


def check_step(golden, student, teacher, loss, expected_gradients, after, noise=()):
    """Every gradient of the loss, then the teacher after one step of plain gradient descent and one update."""
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        if not name.endswith(noise):
            close(gradient, expected_gradients[name], 1e-5, f"gradient of {name}", large=1.0)  # torch 2.6's convolutions round otherwise
    with torch.no_grad():
        for name, p in student.named_parameters():
            p -= golden["config"]["sgd_lr"] * expected_gradients[name]  # the file's, which noise could not tell from ours
    teacher.update(student.encoder, golden["config"]["ema_tau"])
    ours = teacher.encoder.state_dict()
    for name, tensor in after.items():
        close(ours[name], tensor, 1e-6, f"teacher after the update, {name}")
    return ours


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

    y = check_targets(golden, teacher(image))
    f = student(image, mask)
    close(f, golden["pred"], 1e-5, "predictions")

    beta = 0.0 if config["l2_loss"] else config["l1_beta"]
    gain = config["loss_scale"] if config["loss_scale"] > 0 else 1.0
    total = regression_loss(f, y, beta, gain)
    torch.testing.assert_close(total.detach(), golden["loss_sum"], rtol=1e-5, atol=0)
    loss = regression_loss(f, y, beta, gain / y.shape[-1]) / len(y)  # as the training loop writes it
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)

    gradients, after = from_released_vision({"model": golden["grads"]})["student"], rename(golden["ema_after"], VISION)
    assert set(check_step(golden, student, teacher, loss, gradients, after)) == set(after)


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


# ---- speech ----------------------------------------------------------------------------------------------------------


def speech_from(config):
    convs = []
    for part in config["conv_feature_layers"].split("+"):  # such as [(512,10,5)]+[(512,3,2)]*4
        numbers = [int(n) for n in re.findall(r"\d+", part)]
        convs += [tuple(numbers[:3])] * (numbers[3] if len(numbers) > 3 else 1)
    return speech_encoder(
        dim=config["encoder_embed_dim"], depth=config["encoder_layers"], heads=config["encoder_attention_heads"],
        ffn=config["encoder_ffn_embed_dim"], convs=tuple(convs), kernel=config["pos_conv_kernel"],
        pos_depth=config["pos_conv_depth"], groups=config["conv_pos_groups"],
    )  # fmt: skip


def samples(golden):
    padding = golden["input"]["padding_mask"]
    return None if padding is None else (~padding).sum(1)


@pytest.mark.parametrize("path", of("audio", "pred"))
def test_speech_step(path):
    golden = read(path)
    config, waves, mask = golden["config"], golden["input"]["source"], golden["mask"]
    state = from_released_speech(golden["model"], golden["ema"])
    student = Student(speech_from(config), regression_head(config["encoder_embed_dim"]))
    student.load_state_dict(state["student"])
    tied = any(key.startswith("pos_conv") for key in config["ema_skip_keys"])
    teacher = Teacher(student.encoder, shared=("embed.content", "embed.positions") if tied else ("embed.content",))
    teacher.load_state_dict(state["teacher"])
    student.train()

    f, x, valid = student(waves, mask, samples(golden), content=True)
    close(x, golden["teacher_input"], 1e-5, "content that the teacher sees")
    y = check_targets(golden, teacher(x, valid, content=True))
    close(f, golden["pred"], 1e-5, "predictions")
    scale = config["loss_scale"] or config["encoder_embed_dim"] ** -0.5
    total = regression_loss(f, y, config["loss_beta"], scale)
    torch.testing.assert_close(total.detach(), golden["loss_sum"], rtol=1e-5, atol=0)
    assert len(f) == golden["sample_size"]
    loss = total / len(f)
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)

    gradients = from_released_speech(golden["grads"])["student"]
    after = fuse(rename({f"encoder.{k}": v for k, v in golden["ema_after"].items()}, SPEECH | POST_NORM))
    ours = check_step(golden, student, teacher, loss, gradients, after, noise=("k_bias",))
    assert set(ours) - set(after) == {n for n in ours if n.startswith("embed.content")} | {"mask_embedding"}
    for name in set(ours) - set(after) - {"mask_embedding"}:
        assert torch.equal(ours[name], student.encoder.state_dict()[name]), f"{name} is shared"


@pytest.mark.parametrize("path", of("audio", "student_features"))
def test_speech_features(path):
    golden = read(path)
    student = Student(speech_from(golden["config"]), regression_head(golden["config"]["encoder_embed_dim"]))
    student.load_state_dict(from_released_speech(golden["model"])["student"])
    student.eval()
    close(student.encoder(golden["input"]["source"], None, samples(golden))[0], golden["student_features"], 1e-5, "features")


@pytest.mark.parametrize("path", of("audio", "logits_BTV"))
def test_speech_ctc(path):
    golden = read(path)
    model = {name.removeprefix("w2v_encoder.").removeprefix("w2v_model."): t for name, t in golden["model"].items()}
    recogniser = Recogniser(speech_from(golden["config"]), golden["config"]["vocab_size"])
    recogniser.load_state_dict(from_released_speech(model)["student"])
    recogniser.eval()
    logits, frames = recogniser(golden["input"]["source"], samples(golden))
    assert torch.equal(frames, golden["input"]["input_lengths"])
    real = torch.arange(logits.shape[1]) < frames[:, None]  # in the padding, the file's logits are those of a sure blank
    close(logits[real], golden["logits_BTV"][real], 1e-5, "logits")
    log_probs = logits.float().log_softmax(-1)
    close(log_probs[real], golden["log_probs_BTV"][real], 1e-5, "log-probabilities")
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), golden["input"]["targets_flat"], frames, golden["input"]["target_lengths"],
        blank=golden["config"]["blank_idx"], reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(loss.detach(), golden["ctc_loss_sum"], rtol=1e-5, atol=0)


# ---- text ------------------------------------------------------------------------------------------------------------


def text_from(config):
    return text_encoder(
        vocab=config["vocab_size"], max_length=config["num_position_embeddings"] - config["pad_idx"] - 1, pad=config["pad_idx"],
        dim=config["encoder_embed_dim"], depth=config["encoder_layers"], heads=config["encoder_attention_heads"],
        ffn=config["encoder_ffn_embed_dim"],
    )  # fmt: skip


@pytest.mark.parametrize("path", of("text", "pred"))
def test_text_step(path):
    golden = read(path)
    config, mask = golden["config"], golden["mask"]
    state = from_released_text(golden["model"], golden["ema"])
    student = Student(text_from(config), regression_head(config["encoder_embed_dim"], config["head_layers"]))
    student.load_state_dict(state["student"])
    tied = any(key.startswith("embed_") for key in config["ema_skip_keys"])
    teacher = Teacher(student.encoder, shared=("embed",) if tied else ())
    teacher.load_state_dict(state["teacher"])
    student.train()

    y = check_targets(golden, teacher(golden["input"]["unmasked_tokens"]))  # the full sentence, not its masked tokens alone
    f = student(golden["input"]["src_tokens"], mask)
    close(f, golden["pred"], 1e-5, "predictions")
    scale = config["encoder_embed_dim"] ** -0.5 if config["loss_scale"] is None else config["loss_scale"]
    total = regression_loss(f, y, config["loss_beta"], scale)
    torch.testing.assert_close(total.detach(), golden["loss_sum"], rtol=1e-5, atol=0)
    assert len(f) == golden["sample_size"]
    loss = total / len(f)
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)

    gradients = from_released_text(golden["grads"])["student"]
    after = fuse(rename({f"encoder.{k}": v for k, v in golden["ema_after"].items()}, TEXT | POST_NORM))
    assert set(check_step(golden, student, teacher, loss, gradients, after, noise=("k_bias",))) == set(after)


@pytest.mark.parametrize("path", of("text", "student_features"))
def test_text_features(path):
    golden = read(path)
    student = Student(text_from(golden["config"]), regression_head(golden["config"]["encoder_embed_dim"], golden["config"]["head_layers"]))
    student.load_state_dict(from_released_text(golden["model"])["student"])
    student.eval()
    tokens = golden["input"]["unmasked_tokens"]
    real = tokens != golden["config"]["pad_idx"]
    close(student.encoder(tokens)[0][real], golden["student_features"][real], 1e-5, "features")


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

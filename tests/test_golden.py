"""The released training step, in numbers: each *.pt of GOLDEN_DIR (default tests/golden) must be reproduced.

A file is one tiny model and what one step did with it. Its fields and `config` tell what is tested.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Encoder, PatchEmbed, Student, Teacher, TokenEmbed, WaveEmbed
from targets import regression_loss, tau_at, top_k_average
from tools.released import our_names

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.pt"))
KIND = {"vision": "vision", "audio": "speech", "text": "text"}  # `modality` of a file -> our name


def read(path):
    return torch.load(path, weights_only=True)


def files_with(field, modality=None):
    """One test for each file that has this field; pytest skips it if there is none."""
    chosen = [path for path in FILES if field in read(path)]
    chosen = [path for path in chosen if modality in (None, read(path).get("config", {}).get("modality"))]
    return pytest.mark.parametrize("path", chosen, ids=[path.stem for path in chosen])


def close(ours, expected, atol, what):
    assert ours.shape == expected.shape, f"{what}: {tuple(ours.shape)} is not {tuple(expected.shape)}"
    error = (ours.detach() - expected).abs().max().item() if ours.numel() else 0.0
    assert error <= atol, f"{what}: off by {error:.2e}, tolerance {atol:.1e}"


def vision_encoder(config):
    grid = [side // config["patch_size"] for side in config["image_size"]]
    dim, depth, heads = (config[f"encoder_{name}"] for name in ("embed_dim", "layers", "attention_heads"))
    tables = depth if config.get("use_rel_pos_bias") else 0
    relative = config["use_shared_rel_pos_bias"] or tables > 0
    embed = PatchEmbed(grid, config["patch_size"], dim, heads, relative, tables=tables)
    options = dict(pre_norm=True, eps=1e-6, heads=heads, ffn=int(dim * config["mlp_ratio"]))
    options["target"] = {"end": "block", "fc": "ffn"}[config["layer_results"]]
    return Encoder(embed, dim, depth, layer_scale=float(config["layer_scale"]), **options)


def post_norm_encoder(config):
    dim = config["encoder_embed_dim"]
    if config["modality"] == "audio":
        convs = []
        for part in config["conv_feature_layers"].split("+"):  # such as [(512,10,5)]+[(512,3,2)]*4
            numbers = [int(n) for n in re.findall(r"\d+", part)]
            convs += [numbers[:3]] * (numbers[3] if len(numbers) > 3 else 1)
        kernel, stack = config["pos_conv_kernel"], config["pos_conv_depth"]
        embed = WaveEmbed(convs, dim, kernel, stack, config["conv_pos_groups"], 0.0, 1e-5)
    else:
        pad, rows = config["pad_idx"], config["num_position_embeddings"]
        embed = TokenEmbed(config["vocab_size"], rows - pad - 1, pad, dim, 0.0, 1e-5)
    options = dict(heads=config["encoder_attention_heads"], ffn=config["encoder_ffn_embed_dim"], target="ffn")
    return Encoder(embed, dim, config["encoder_layers"], pre_norm=False, eps=1e-5, **options)


def encoder_of(config):
    return vision_encoder(config) if config["modality"] == "vision" else post_norm_encoder(config)


def renamed(golden, field):
    return our_names(golden[field], KIND[golden["config"]["modality"]])


def student_of(golden):
    """The file's student; its head is one Linear, or several with GELU between them."""
    weights = renamed(golden, "model")
    shapes = [w.shape for name, w in weights.items() if re.fullmatch(r"head\.(\d+\.)?weight", name)]
    layers = [layer for out, in_ in shapes for layer in (nn.Linear(in_, out), nn.GELU())][:-1]
    head = layers[0] if "head.weight" in weights else nn.Sequential(*layers)
    student = Student(encoder_of(golden["config"]), head)
    student.load_state_dict(weights)
    return student


def teacher_of(golden, student):
    """The file's teacher. Speech's convolutions and ema_skip_keys are not averaged but the student's."""
    kind, skipped = golden["config"]["modality"], golden["config"].get("ema_skip_keys")
    names = our_names({name: torch.empty(0) for name in skipped}, KIND[kind]) if skipped else {}
    shared = {name.removeprefix("encoder.").rpartition(".")[0] for name in names}
    if kind == "audio":
        shared.add("embed.content")
    teacher = Teacher(student.encoder, sorted(shared))
    missing, unexpected = teacher.load_state_dict(renamed(golden, "ema"), strict=False)
    assert all(name.startswith("head.") for name in unexpected), "vision: a copy of the student's"
    assert all(name.startswith((*teacher.shared, "mask_emb"), len("encoder.")) for name in missing), missing
    return teacher


def samples(golden):
    padding = golden["input"].get("padding_mask")
    return None if padding is None else (~padding).sum(1)


def forward(golden, student, teacher):
    """-> predictions (M, D), all layers of the teacher."""
    inputs, mask = golden["input"], golden["mask"]
    if golden["config"]["modality"] == "audio":
        f, x, valid = student(inputs["source"], mask, samples(golden))
        close(x, golden["teacher_input"], 1e-5, "content that the teacher sees")
        return f, teacher.from_embedded(x, valid)
    if golden["config"]["modality"] == "text":  # the teacher sees the whole text
        return student(inputs["src_tokens"], mask)[0], teacher(inputs["unmasked_tokens"])
    return student(inputs["image"], mask)[0], teacher(inputs["image"])


def norms(config):
    """How each layer is normalised, and how their mean."""
    flags = ["instance_norm_target_layer", "layer_norm_target_layer"]
    flags += ["instance_norm_targets", "layer_norm_targets"]
    if config["modality"] == "vision":
        flags = ["target_instance_norm", "target_layer_norm_last", "", "post_target_layer_norm"]
    instance, layer, last_instance, last_layer = (config.get(flag) for flag in flags)
    each = [name for name, wanted in (("instance", instance), ("layer", layer)) if wanted]
    mean = [name for name, wanted in (("layer", last_layer), ("instance", last_instance)) if wanted]
    return "_".join(each) or "none", "_".join(mean) or "none"  # in this order, if both are set


def beta_and_scale(config):
    """Smooth L1's beta and the factor of its sum."""
    gain = config.get("loss_scale") or 0
    if config["modality"] == "vision":
        return 0.0 if config["l2_loss"] else config["l1_beta"], gain if gain > 0 else 1.0
    return config["loss_beta"], gain if gain > 0 else config["encoder_embed_dim"] ** -0.5


def test_there_are_golden_files():
    assert FILES, f"no golden files in {FOLDER}"


@files_with("pred")
def test_one_step_of_pre_training(path):
    golden = read(path)
    config, mask = golden["config"], golden["mask"]
    speech = config["modality"] == "audio"
    student = student_of(golden)
    teacher = teacher_of(golden, student)
    student.train()

    # predictions and targets
    f, layers = forward(golden, student, teacher)
    close(f, golden["pred"], 1e-5, "predictions")
    k = config["average_top_k_layers"]
    for l, (a, expected) in enumerate(zip(layers[-k:], golden["teacher_layers"], strict=True)):
        close(a, expected, 1e-5, f"teacher layer {l}")
    y = top_k_average(layers, k, *norms(config))[mask]
    close(y, golden["target"], 1.5e-4 if speech else 1e-5, "targets")

    # loss
    total = regression_loss(f, y, *beta_and_scale(config))
    torch.testing.assert_close(total.detach(), golden["loss_sum"], rtol=1e-5, atol=0)
    size = f.numel() if config["modality"] == "vision" else len(f)
    assert size == golden["sample_size"]
    loss = total / size
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=1e-5, atol=0)

    # gradients
    loss.backward()
    gradients, expected = {n: p.grad for n, p in student.named_parameters()}, renamed(golden, "grads")
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        close(gradients[name], gradient, 1e-5 * max(largest, 1), f"gradient of {name}")

    # the teacher after a step of gradient descent, with the gradients of the file: k_proj.bias' are noise
    with torch.no_grad():
        for name, p in student.named_parameters():
            p -= config["sgd_lr"] * expected[name]
    teacher.update(student.encoder, config["ema_tau"])
    after = renamed(golden, "ema_after")
    for name, tensor in teacher.state_dict().items():
        if name in after:
            close(tensor, after[name], 1e-6, f"teacher after the update, {name}")
        elif name != "encoder.mask_embedding":
            assert torch.equal(tensor, student.state_dict()[name]), f"{name} is the student's"


@files_with("student_features")
@torch.no_grad()
def test_features_of_the_whole_input(path):
    golden = read(path)
    config, inputs = golden["config"], golden["input"]
    encoder = student_of(golden).encoder.eval()
    x = inputs[{"vision": "image", "audio": "source", "text": "unmasked_tokens"}[config["modality"]]]
    features, layers = encoder(x, None, samples(golden))
    shown = x != config["pad_idx"] if config["modality"] == "text" else slice(None)
    close(features[shown], golden["student_features"][shown], 1e-5, "features")
    if "student_features_prenorm" in golden and config["layer_results"] == "end":
        patches = golden["student_features_prenorm"][:, encoder.prefix :]
        close(layers[-1], patches, 1e-5, "last block")


@files_with("logits", "vision")
@torch.no_grad()
def test_a_fine_tuned_model_of_images(path):
    from finetune import Classifier

    golden = read(path)
    classifier = Classifier(encoder_of(golden["config"]), golden["config"]["num_classes"])
    classifier.load_state_dict(renamed(golden, "model"))
    close(classifier.eval()(golden["input"]["image"]), golden["logits"], 1e-5, "logits")


@files_with("logits_BTV", "audio")
@torch.no_grad()
def test_a_fine_tuned_model_of_speech(path):
    from finetune import FrameClassifier

    golden = read(path)
    classifier = FrameClassifier(encoder_of(golden["config"]), golden["config"]["vocab_size"])
    classifier.load_state_dict(renamed(golden, "model"))
    logits, frames = classifier.eval()(golden["input"]["source"], samples(golden))
    assert torch.equal(frames, golden["input"]["input_lengths"])
    shown = (
        torch.arange(logits.shape[1]) < frames[:, None]
    )  # in padding, the file's logits are a certain blank
    close(logits[shown], golden["logits_BTV"][shown], 1e-5, "logits")
    log_probs = logits.log_softmax(-1)
    close(log_probs[shown], golden["log_probs_BTV"][shown], 1e-5, "log-probabilities")
    labels, lengths = golden["input"]["targets_flat"], golden["input"]["target_lengths"]
    blank = golden["config"]["blank_idx"]
    loss = F.ctc_loss(log_probs.transpose(0, 1), labels, frames, lengths, blank=blank, reduction="sum")
    torch.testing.assert_close(loss, golden["ctc_loss_sum"], rtol=1e-5, atol=0)


@files_with("ema_decay_schedule")
def test_tau(path):
    for name, values in read(path)["ema_decay_schedule"].items():  # such as audio_base(0.999->0.9999,30000)
        if not isinstance(values, dict):
            assert tau_at(1, values, values, 0) == tau_at(10**6, values, values, 0) == values
            continue
        tau_0, tau_e, tau_n = re.fullmatch(r".*\((.*)->(.*),(.*)\)", name).groups()
        for step, tau in values.items():
            assert tau_at(step, float(tau_0), float(tau_e), int(tau_n)) == pytest.approx(tau, abs=1e-9)

"""tools/hub.py against the transformers library itself: the same numbers in both directions, for random models of all kinds.

The models are drawn from PARITY_SEED (default 0); any seed must pass. Largest deviation allowed: 1e-5 of the largest magnitude.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SEED = int(os.environ.get("PARITY_SEED", 0))
transformers = pytest.importorskip(
    "transformers", reason="compares with the transformers library: pip install -r requirements-dev.txt"
)
safetensors = pytest.importorskip("safetensors.torch", reason="reads its folders: pip install -r requirements-dev.txt")
transformers.utils.logging.disable_progress_bar()

from common import BadInput  # noqa: E402
from data import audio, glue, images, letters, text  # noqa: E402
from model import resize_grid, resize_positions  # noqa: E402
from tests import helpers
from tools import convert, hub  # noqa: E402

ROOT = Path(__file__).parent.parent
EACH = 6  # configurations of each kind, in each direction
LIMIT = 1e-5
deviations = []


def close(ours, theirs, what=""):
    """Within LIMIT of the largest magnitude."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    deviation = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    deviations.append(deviation)
    assert deviation <= LIMIT, f"{what}: off by {deviation:.1e} of the largest magnitude"


def randomise(module, rng):
    """No weight stays zero or one, where a mistake would not show; the embedding of padding does, as nobody sees it."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.3 if p.ndim == 1 or "table" in name or "token" in name else 1 / np.sqrt(p[0].numel())
            p.mul_(p.ndim == 1).add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def outputs_of(layers, call):
    """What each of the layers returns during call(), and what the call returns."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)) for layer in layers
    ]
    try:
        with torch.no_grad():
            return seen, call()
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(base):
    """A model's layers, wherever its class keeps them."""
    inside = getattr(base, "encoder", base)
    return inside.layer if hasattr(inside, "layer") else inside.layers


def ours_of(state):
    """The model of a checkpoint of ours with its weights; its layers' results are the blocks' outputs."""
    module = convert.build(state | {"config": state["config"] | {"target": "block"}})
    convert.load_into(module, state["student"], "state", fresh=state.get("fresh", ()))
    return module.eval()


def pick(rng, *choices):
    return choices[int(rng.integers(len(choices)))]


def drawn(kind, number):
    return np.random.default_rng([SEED, {"vision": 1, "speech": 2, "text": 3}[kind], number])


def save_theirs(model, folder, rng):
    """A folder as save_pretrained writes it, or as its versions before safetensors did, in one file or in parts."""
    form = pick(rng, "safetensors", "bin", "parts", "bin parts")
    model.save_pretrained(folder)
    state = safetensors.load_file(folder / "model.safetensors")
    if form == "safetensors":
        return
    (folder / "model.safetensors").unlink()
    name, write = ("model.safetensors", safetensors.save_file) if form == "parts" else ("pytorch_model.bin", torch.save)
    if form == "bin":
        return torch.save(state, folder / name)
    halves, parts = [{k: v for i, (k, v) in enumerate(state.items()) if i % 2 == half} for half in (0, 1)], {}
    for i, half in enumerate(halves, 1):
        part = name.replace(".", f"-0000{i}-of-00002.")
        write(half, folder / part)
        parts |= dict.fromkeys(half, part)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def load_theirs(auto, folder, caplog):
    """from_pretrained() without the network; nothing is missing, left over or new, and nothing is said about it."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model, info = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not caplog.records, caplog.text
    return model.eval()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def round_trip(state, folder):
    """ours -> folder -> ours: the encoder, and the head if fine-tuned, bit by bit; and what the config says."""
    back = convert.read(folder)
    kept = {name: t for name, t in state["student"].items() if not name.startswith("head.")}
    assert_same({name: t for name, t in back["student"].items() if not name.startswith("head.")}, kept)
    assert {name: back["config"].get(name) for name in state["config"]} == state["config"]
    assert all(back.get(name) == state.get(name) for name in ("classes", "goal", "vocabulary"))


def our_state(config, rng, classes=(), goal=None, **more):
    """A checkpoint of ours with random weights, as train_*.py or finetune.py would leave it."""
    state = {"student": more.pop("student", {}), "teacher": None, "config": config} | more
    if classes:
        state |= {"classes": list(classes), "goal": goal}
    return state | {"student": randomise(convert.build(state), rng).state_dict()}


# ---- vision ----------------------------------------------------------------------------------------------------------


def vision_theirs(rng):
    """A random model: its class, config, and size of images."""
    name = pick(rng, "Data2VecVision", "Data2VecVision", "Beit")
    heads, side = int(rng.integers(1, 5)), int(rng.integers(2, 6))
    patch, width = pick(rng, 2, 4, 6), side
    positions = {p: bool(rng.random() < 0.5) for p in ("use_relative_position_bias", "use_shared_relative_position_bias")}
    absolute = bool(rng.random() < 0.4)
    if rng.random() < 0.25 and not absolute:
        width = int(rng.integers(2, 6))
    head = bool(rng.random() < 0.5)
    config = getattr(transformers, name + "Config")(
        hidden_size=8 * heads * int(rng.integers(1, 4)), num_attention_heads=heads, num_hidden_layers=int(rng.integers(1, 5)),
        intermediate_size=int(rng.integers(8, 80)), image_size=side * patch if width == side else [side * patch, width * patch],
        patch_size=patch, use_absolute_position_embeddings=absolute, use_mask_token=bool(rng.random() < 0.5),
        use_mean_pooling=bool(rng.random() < 0.5), layer_scale_init_value=pick(rng, 0.0, 0.1),
        layer_norm_eps=pick(rng, 1e-12, 1e-6, 1e-5),
        num_labels=int(rng.integers(2, 7)), out_indices=[1], **positions,
    )  # fmt: skip
    model = getattr(transformers, name + ("ForImageClassification" if head else "Model"))(config)
    return randomise(model, rng), head, (side * patch, width * patch)


@pytest.mark.parametrize("number", range(EACH))
def test_vision_from_theirs(number, tmp_path):
    rng = drawn("vision", number)
    model, head, size = vision_theirs(rng)
    save_theirs(model, tmp_path, rng)
    state = convert.read(tmp_path)
    ours, pictures = ours_of(state), torch.from_numpy(rng.standard_normal((3, 3, *size), dtype=np.float32))
    assert state["origin"].endswith(type(model).__name__) and ("classes" in state) == head
    base = getattr(model, model.base_model_prefix) if head else model
    theirs, result = outputs_of(blocks_of(base), lambda: model(pictures))
    with torch.no_grad():
        features, layers = ours.encoder(pictures)
        for i, (a, b) in enumerate(zip(layers, theirs, strict=True)):
            close(a, b[:, 1:], f"layer {i}")
        if head:
            close(ours(pictures), result.logits, "logits")
        elif not model.config.use_mean_pooling:
            close(features, result.last_hidden_state, "features")


@pytest.mark.parametrize("number", range(EACH))
def test_vision_to_theirs(number, tmp_path, caplog):
    rng = drawn("vision", 100 + number)
    heads, side, patch, head = int(rng.integers(1, 5)), int(rng.integers(2, 6)), pick(rng, 2, 4, 6), number % 2
    relative, learned = bool(rng.random() < 0.7), bool(rng.random() < 0.5)
    width = int(rng.integers(2, 6)) if not relative and not learned else side
    config = {
        "image_size": side * patch, "image_width": width * patch * (width != side), "patch": patch,
        "dim": 8 * heads * int(rng.integers(1, 4)),
        "depth": int(rng.integers(1, 5)), "heads": heads, "ffn": int(rng.integers(8, 80)),
        "layer_scale": pick(rng, 0.0, 1e-4, 0.1),
        "relative": relative, "per_block": relative and bool(rng.random() < 0.5), "learned_std": 0.3 * learned,
        "norm_eps": pick(rng, 1e-6, 1e-5),
    }  # fmt: skip
    config |= {"pool_cls": bool(rng.random() < 0.3)} if head else {"top_k": 1, "beta": 0.5, "norm": "instance"}
    state = our_state(config, rng, [f"class {i}" for i in range(int(rng.integers(2, 7)))] if head else (), "images")
    assert hub.write(state, tmp_path / "hub") is not None
    auto = transformers.AutoModelForImageClassification if head else transformers.AutoModel
    model, ours = load_theirs(auto, tmp_path / "hub", caplog), ours_of(state)
    pictures = torch.from_numpy(rng.standard_normal((3, 3, side * patch, width * patch), dtype=np.float32))
    theirs, result = outputs_of(blocks_of(model.data2vec_vision if head else model), lambda: model(pictures))
    with torch.no_grad():
        features, layers = ours.encoder(pictures)
        for i, (a, b) in enumerate(zip(layers, theirs, strict=True)):
            close(a, b[:, 1:], f"layer {i}")
        close(ours(pictures) if head else features, result.logits if head else result.last_hidden_state, "logits or features")
    if head:
        assert list(model.config.id2label.values()) == state["classes"]
    round_trip(state, tmp_path / "hub")


def vision_state(side, patch=16, rng=None, **more):
    config = {"image_size": side, "patch": patch, "dim": 16, "depth": 2, "heads": 2, "ffn": 32, "layer_scale": 0.1,
              "relative": True,
              "per_block": False, "learned_std": 0.0, "norm_eps": 1e-6} | more  # fmt: skip
    return our_state(config, rng or drawn("vision", 200))


@pytest.mark.parametrize("per_block", [False, True])
def test_another_image_size_interpolates_like_theirs_where_theirs_is_bicubic(per_block, tmp_path, caplog, monkeypatch):
    """224 -> 384. The library stretches relative positions bilinearly, we bicubically: with its interpolation made bicubic
    all features agree, and as it is they do not. Learned positions are bicubic in both."""
    state = vision_state(224, per_block=per_block, learned_std=0.02)
    hub.write(state, tmp_path / "hub")
    model = load_theirs(transformers.AutoModel, tmp_path / "hub", caplog)
    large = convert.build(state | {"config": state["config"] | {"image_size": 384, "target": "block"}}).eval()
    convert.load_into(large, state["student"], "state", (14, 14), (24, 24), state.get("fresh", ()))
    pictures = torch.from_numpy(drawn("vision", 201).standard_normal((1, 3, 384, 384), dtype=np.float32))
    with torch.no_grad():
        ours = large.encoder(pictures)[0]
        plain = model(pictures).last_hidden_state
        real = F.interpolate
        monkeypatch.setattr(F, "interpolate", lambda x, size, mode, **more: real(x, size, mode="bicubic", align_corners=False))
        close(ours, model(pictures).last_hidden_state, "features")
    assert (ours - plain).abs().max() / plain.abs().max() > 1e-4, "bilinear by now? then say so in the docstring"


def test_positions_are_stretched_as_an_independent_bicubic_does():
    rng = drawn("vision", 202)
    table = torch.from_numpy(rng.standard_normal((27 * 27 + 3, 3), dtype=np.float32))
    grid = table[:-3].reshape(27, 27, 3).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, size=(47, 47), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(-1, 3)
    ours = resize_positions(table, (14, 14), (24, 24))
    assert torch.equal(ours[:-3], expected) and torch.equal(ours[-3:], table[-3:])
    assert torch.equal(
        resize_positions(torch.stack([table, 2 * table]), (14, 14), (24, 24))[1], resize_positions(2 * table, (14, 14), (24, 24))
    )
    assert resize_grid(torch.randn(196, 5), (14, 14), (24, 24)).shape == (576, 5)


def test_positions_of_images_that_are_not_square_are_not_written(tmp_path):
    state = vision_state(32, image_width=48)
    with pytest.raises(BadInput, match="not square"):
        hub.write(state, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_their_image_processor_makes_our_pixels(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    hub.write(vision_state(32), tmp_path / "hub")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub", local_files_only=True)
    except ImportError as error:
        pytest.skip(f"the library's image processor wants more: {error}")
    picture = Image.fromarray(drawn("vision", 203).integers(256, size=(32, 32, 3), dtype=np.uint8))
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(images.normalise(images.to_tensor(picture))[None], theirs, rtol=0, atol=1e-4)


# ---- speech ----------------------------------------------------------------------------------------------------------


def waves(rng, convs, padded):
    """(B, N) with noise behind each row's end, as nothing may see it, and lengths (B,), or None without padding."""
    receptive, jump = 1, 1
    for _, kernel, stride in convs:
        receptive, jump = receptive + (kernel - 1) * jump, jump * stride
    longest = receptive + jump * int(rng.integers(8, 30)) + int(rng.integers(jump))
    lengths = rng.integers(receptive + jump, longest + 1, size=3)
    lengths[int(rng.integers(3))] = longest
    x = torch.from_numpy(rng.standard_normal((3, longest), dtype=np.float32))
    return (x, torch.from_numpy(lengths)) if padded else (x, None)


def compare_speech(model, ours, state, rng, convs):
    base = getattr(model, "data2vec_audio", model)
    for padded in (False, True):
        x, samples = waves(rng, convs, padded)
        if padded:
            x = x * (torch.arange(x.shape[1]) < samples[:, None])
        mask = None if samples is None else (torch.arange(x.shape[1]) < samples[:, None]).long()
        theirs, result = outputs_of(blocks_of(base), lambda: model(x, attention_mask=mask))
        with torch.no_grad():
            features, layers = ours.encoder(x, None, samples)
            frames = torch.full((3,), features.shape[1]) if samples is None else ours.encoder.embed.frames(samples)
            real = torch.arange(features.shape[1]) < frames[:, None]
            for i, (a, b) in enumerate(zip(layers, theirs, strict=True)):
                close(a[real], b[real], f"layer {i}, padded {padded}")
            if "classes" not in state:
                close(features[real], result.last_hidden_state[real], f"features, padded {padded}")
                continue
            logits, _ = ours(x, samples)
            if state["goal"] == "clips":
                mean = (logits * real[..., None]).sum(1) / frames[:, None]
                close(mean, result.logits, f"logits of clips, padded {padded}")
            else:
                close(logits[real], result.logits[real], f"logits, padded {padded}")


def speech_sizes(rng):
    heads, groups = int(rng.integers(1, 5)), pick(rng, 1, 2, 4)
    convs = [
        (8 * int(rng.integers(1, 6)), int(rng.integers(2, 11)), int(rng.integers(1, 6))) for _ in range(int(rng.integers(1, 5)))
    ]
    return heads, groups, convs


@pytest.mark.parametrize("number", range(EACH))
def test_speech_from_theirs(number, tmp_path):
    rng = drawn("speech", number)
    heads, groups, convs = speech_sizes(rng)
    head = ("Model", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification")[number % 4]
    config = transformers.Data2VecAudioConfig(
        hidden_size=8 * heads * int(rng.integers(1, 4)), num_attention_heads=heads, num_hidden_layers=int(rng.integers(1, 5)),
        intermediate_size=int(rng.integers(8, 80)), conv_dim=[c for c, _, _ in convs], conv_kernel=[k for _, k, _ in convs],
        conv_stride=[s for _, _, s in convs], conv_pos_kernel_size=int(rng.integers(3, 20)),
        num_conv_pos_embeddings=int(rng.integers(1, 6)),
        num_conv_pos_embedding_groups=groups, vocab_size=int(rng.integers(3, 40)), num_labels=int(rng.integers(2, 9)),
        mask_time_prob=pick(rng, 0.0, 0.05), layer_norm_eps=pick(rng, 1e-5, 1e-12), classifier_proj_size=int(rng.integers(4, 40)),
    )  # fmt: skip
    model = randomise(getattr(transformers, "Data2VecAudio" + head)(config), rng)
    save_theirs(model, tmp_path, rng)
    state = convert.read(tmp_path)
    assert state["origin"].endswith(type(model).__name__) and ("classes" in state) == (head != "Model")
    compare_speech(model, ours_of(state), state, rng, convs)


@pytest.mark.parametrize("number", range(EACH))
def test_speech_to_theirs(number, tmp_path, caplog):
    rng = drawn("speech", 100 + number)
    heads, groups, convs = speech_sizes(rng)
    goal = (None, "letters", "clips", "sounds")[number % 4]
    depth = int(rng.integers(1, 6))
    config = {
        "channels": convs[0][0], "convs": [",".join(map(str, conv)) for conv in convs],
        "dim": 8 * heads * int(rng.integers(1, 4)),
        "depth": int(rng.integers(1, 5)), "heads": heads, "ffn": int(rng.integers(8, 80)), "pos_depth": depth,
        "pos_width": depth * int(rng.integers(3, 20)), "pos_groups": groups, "norm_eps": pick(rng, 1e-5, 1e-6),
        "deep_norm": False,
    }  # fmt: skip
    if number == 5:  # the paper's seven convolutions
        config |= {"channels": 16, "convs": []}
        convs = [(16, k, s) for _, k, s in convert.hub.CONVS]
    config |= {} if goal else {"top_k": 1, "share_positions": False, "mask_p": 0.5}
    classes = letters.LETTERS if goal == "letters" else [f"sound {i}" for i in range(int(rng.integers(2, 9)))]
    state = our_state(config, rng, classes if goal else (), goal)
    hub.write(state, tmp_path / "hub")
    auto = {None: "", "letters": "ForCTC", "clips": "ForAudioClassification", "sounds": "ForAudioFrameClassification"}[goal]
    model = load_theirs(getattr(transformers, "AutoModel" + auto), tmp_path / "hub", caplog)
    compare_speech(model, ours_of(state), state, rng, convs)
    if goal != "clips":
        round_trip(state, tmp_path / "hub")


def test_their_processor_prepares_waves_and_spells_letters_as_ours(tmp_path):
    rng = drawn("speech", 200)
    config = {"channels": 8, "convs": [], "dim": 16, "depth": 1, "heads": 2, "ffn": 16, "pos_depth": 1, "pos_width": 3,
              "pos_groups": 1,
              "norm_eps": 1e-5, "deep_norm": False}  # fmt: skip
    hub.write(our_state(config, rng, letters.LETTERS, "letters"), tmp_path / "hub")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hub", local_files_only=True)
    wave = rng.standard_normal(500).astype(np.float32) * 0.1
    theirs = extractor(wave, sampling_rate=16000, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(audio.normalise(wave), theirs, rtol=0, atol=5e-3)  # its variance floor is another
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", local_files_only=True)
    best = [0, 9, 9, 0, 6, 13, 0, 13, 16, 0, 1, 1, 24, 28]
    scores = np.full((len(best), len(letters.LETTERS)), -9.0)
    scores[np.arange(len(best)), best] = 0
    assert tokenizer.decode(best) == letters.decode_greedy(scores, letters.LETTERS)[0]


def test_a_blank_that_is_not_the_first_output_becomes_it(tmp_path):
    """As in many fine-tuned models: the padding token comes last, the words are parted by another sign, letters are small."""
    rng = drawn("speech", 201)
    config = transformers.Data2VecAudioConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, conv_dim=[8], conv_kernel=[10],
        conv_stride=[5],
        conv_pos_kernel_size=3, num_conv_pos_embeddings=1, num_conv_pos_embedding_groups=1, vocab_size=4, pad_token_id=3,
    )  # fmt: skip
    model = randomise(transformers.Data2VecAudioForCTC(config), rng)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "_": 2, "[PAD]": 3}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"word_delimiter_token": "_"}))
    state = convert.read(tmp_path)
    assert state["classes"] == ["[PAD]", "A", "B", "|"] and any("blank" in note for note in state["notes"])
    x = torch.randn(2, 300)
    with torch.no_grad():
        close(ours_of(state)(x)[0][..., [1, 2, 3, 0]], model(x).logits)


# ---- text ------------------------------------------------------------------------------------------------------------


def tokens(rng, vocab, longest, padding):
    """(3, T) ids with <pad> = 1 behind or before what is real."""
    ids = torch.from_numpy(rng.integers(4, vocab, size=(3, int(rng.integers(2, longest + 1)))))
    for row in ids if padding else ():
        n = int(rng.integers(0, len(row)))
        row[len(row) - n :] = 1
        row.copy_(row.flip(0) if padding == "left" else row)
    return ids


def compare_text(model, ours, state, rng, vocab):
    base = getattr(model, model.base_model_prefix, model)
    for padding in (None, "right", "left"):
        ids = tokens(rng, vocab, state["config"]["max_tokens"], padding)
        real = ids != 1
        theirs, result = outputs_of(blocks_of(base), lambda: model(ids, attention_mask=real.long()))
        with torch.no_grad():
            features, layers = ours.encoder(ids)
            for i, (a, b) in enumerate(zip(layers, theirs, strict=True)):
                close(a[real], b[real], f"layer {i}, padding {padding}")
            if "classes" not in state:
                close(features[real], result.last_hidden_state[real], f"features, padding {padding}")
            elif padding != "left":  # the head looks at the first token
                close(ours(ids), result.logits, f"logits, padding {padding}")


@pytest.mark.parametrize("number", range(EACH))
def test_text_from_theirs(number, tmp_path):
    rng = drawn("text", number)
    name, head, heads, vocab = (
        pick(rng, "Data2VecText", "Data2VecText", "Roberta"),
        number % 2,
        int(rng.integers(1, 5)),
        int(rng.integers(8, 90)),
    )
    config = getattr(transformers, name + "Config")(
        vocab_size=vocab, hidden_size=8 * heads * int(rng.integers(1, 4)), num_attention_heads=heads,
        num_hidden_layers=int(rng.integers(1, 5)),
        intermediate_size=int(rng.integers(8, 80)), max_position_embeddings=int(rng.integers(6, 50)),
        type_vocab_size=pick(rng, 1, 2),
        layer_norm_eps=pick(rng, 1e-12, 1e-5), num_labels=int(rng.integers(1, 6)), pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = randomise(getattr(transformers, name + ("ForSequenceClassification" if head else "Model"))(config), rng)
    save_theirs(model, tmp_path, rng)
    state = convert.read(tmp_path)
    assert state["origin"].endswith(type(model).__name__) and ("classes" in state) == head
    assert "vocabulary" not in state and any("vocab.json" in note for note in state["notes"])
    compare_text(model, ours_of(state), state, rng, vocab)


@pytest.mark.parametrize("number", range(EACH))
def test_text_to_theirs(number, tmp_path, caplog):
    rng = drawn("text", 100 + number)
    head, heads, vocab, longest = number % 2, int(rng.integers(1, 5)), int(rng.integers(8, 90)), int(rng.integers(4, 50))
    config = {
        "max_tokens": longest, "dim": 8 * heads * int(rng.integers(1, 4)), "depth": int(rng.integers(1, 5)), "heads": heads,
        "ffn": int(rng.integers(8, 80)), "norm_eps": pick(rng, 1e-5, 1e-12),
    }  # fmt: skip
    config |= {} if head else {"top_k": 1, "head_layers": 2, "objective": "data2vec", "beta": 1.0}
    classes = pick(rng, ["score"], ["no", "yes"], ["a", "b", "c"]) if head else ()
    state = our_state(config, rng, classes, "sentences", student={"encoder.embed.tokens.weight": torch.zeros(vocab, 1)})
    hub.write(state, tmp_path / "hub")
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    compare_text(load_theirs(auto, tmp_path / "hub", caplog), ours_of(state), state, rng, vocab)
    round_trip(state, tmp_path / "hub")


def test_their_tokenizer_reads_our_vocabulary(tmp_path):
    rng = drawn("text", 200)
    sentences = ["the cat sat on the mat", "Then  it's 42 rats, and\na naïve hat ☃!", "that fat rat", "<mask> is text here"]
    vocabulary = text.train_vocabulary(sentences * 3, 290)
    config = {
        "max_tokens": 40,
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "ffn": 16,
        "norm_eps": 1e-5,
        "head_layers": 2,
        "objective": "data2vec",
    }
    state = our_state(
        config, rng, vocabulary=vocabulary.spell(), student={"encoder.embed.tokens.weight": torch.zeros(vocabulary.size, 1)}
    )
    hub.write(state, tmp_path / "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub", local_files_only=True)
    for sentence in sentences[:3]:
        assert tokenizer(sentence)["input_ids"] == glue.sentence_ids(vocabulary, sentence), sentence
    assert tokenizer(*sentences[:2])["input_ids"] == glue.sentence_ids(vocabulary, *sentences[:2])
    assert (
        tokenizer.mask_token_id == vocabulary.mask
        and tokenizer.pad_token_id == vocabulary.pad
        and len(tokenizer) == vocabulary.size
    )
    assert convert.read(tmp_path / "hub")["vocabulary"] == state["vocabulary"]
    (tmp_path / "hub" / "vocab").unlink()  # as a folder of theirs: vocab.json and merges.txt alone
    back = text.Vocabulary.parse(convert.read(tmp_path / "hub")["vocabulary"])
    assert back.size == vocabulary.size and back.pieces == vocabulary.pieces
    (tmp_path / "hub" / "merges.txt").unlink()
    assert "vocabulary" not in convert.read(tmp_path / "hub")


# ---- what is not understood --------------------------------------------------------------------------------------------


def folder_of(tmp_path, **changes):
    config = transformers.Data2VecTextConfig(
        vocab_size=20, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.Data2VecTextModel(config).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | changes))
    return tmp_path / "model.safetensors"


def refused(path, *words):
    with pytest.raises(BadInput) as error:
        convert.read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


def test_every_weight_is_accounted_for(tmp_path):
    weights = folder_of(tmp_path)
    state = safetensors.load_file(weights)
    safetensors.save_file(state | {"encoder.layer.1.adapter.weight": torch.zeros(3)}, weights)
    refused(tmp_path, "encoder.layer.1.adapter.weight")
    safetensors.save_file({name: t for name, t in state.items() if name != "encoder.layer.1.output.dense.bias"}, weights)
    refused(tmp_path, "encoder.blocks.1.fc2.bias")
    safetensors.save_file({name: t for name, t in state.items() if ".layer.1." not in name}, weights)
    refused(tmp_path, "2 layers", "of 1")
    safetensors.save_file(state, weights)
    assert any("pooler" in note for note in convert.read(tmp_path)["notes"]), "what is left out is named"


@pytest.mark.parametrize("change", [
    {"model_type": "bert"}, {"model_type": None}, {"hidden_act": "relu"}, {"is_decoder": True}, {"pad_token_id": 0},
    {"num_attention_heads": 5},
    {"num_attention_heads": None},
    {"hidden_size": "wide"}, {"layer_norm_eps": "small"},
], ids=str)  # fmt: skip
def test_other_kinds_of_models_are_one_line(tmp_path, change):
    folder_of(tmp_path, **change)
    refused(tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo >{self.path}",)


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "text", "malicious", "malicious legacy", "no weights", "no config", "config", "escape"]
)
def test_damaged_and_malicious_folders_are_one_line(tmp_path, damage):
    folder, written = tmp_path / "hub", tmp_path / "written"
    folder.mkdir()
    weights = folder_of(folder)
    good = weights.read_bytes()
    weights.unlink()
    if "malicious" in damage:
        torch.save({"w": Malicious(written)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization="legacy" not in damage)
    elif damage in ("truncated", "empty", "text"):
        weights.write_bytes({"truncated": good[: len(good) // 2], "empty": b"", "text": b"weights\n"}[damage])
    elif damage == "escape":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "config":
        weights.write_bytes(good)
        (folder / "config.json").write_text('{"model_type": "data2vec-text", ')
    refused(folder, *(["posix.system"] if "malicious" in damage else []))
    assert not written.exists()


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(tmp_path, "pip install safetensors")
    with pytest.raises(BadInput, match="pip install safetensors"):
        hub.write(vision_state(32), tmp_path / "hub")


tool = partial(helpers.call, convert)


def test_the_tool_says_what_it_recognised_and_writes_either_form(tmp_path):
    state = vision_state(32, top_k=2, beta=0.25)
    state["teacher"] = {name: 2 * tensor for name, tensor in state["student"].items() if name.startswith("encoder.")}
    torch.save(state, tmp_path / "ckpt.pt")
    code, out, err = tool(tmp_path / "ckpt.pt", tmp_path / "hub")
    assert code == 0 and "checkpoint of this project" in out and "left out: head" in out and "left out: the teacher" in out, err
    assert transformers.AutoModel.from_pretrained(tmp_path / "hub", local_files_only=True).config.image_size == 32
    code, out, err = tool(tmp_path / "hub", tmp_path / "back.pt")
    assert code == 0 and "Data2VecVisionModel" in out and "new by design: head" in out, err
    back = convert.read(tmp_path / "back.pt")
    assert back["config"]["top_k"] == 2 and back["config"]["beta"] == 0.25 and back["fresh"] == ["head"]
    assert_same(back["student"], {name: t for name, t in state["student"].items() if not name.startswith("head.")})
    code, out, err = tool(tmp_path / "ckpt.pt", tmp_path / "teacher", "--network", "teacher")
    assert code == 0, err
    assert_same(convert.read(tmp_path / "teacher")["student"], state["teacher"])
    code, out, err = tool(tmp_path / "ckpt.pt", tmp_path / "hub")
    assert code == 2 and err.count("\n") == 1 and "already there" in err
    shutil.copytree(tmp_path / "hub", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    code, out, err = tool(tmp_path / "run", tmp_path / "again.pt")
    assert code == 2 and err.count("\n") == 1 and str(tmp_path / "run") in err


def test_the_scripts_do_without_these_libraries():
    names = "train_vision, train_speech, train_text, finetune, tools.convert"
    script = f"import sys; sys.modules['transformers'] = sys.modules['safetensors'] = None; import {names}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_never_overwritten(tmp_path):
    state = vision_state(32)
    hub.write(state, tmp_path / "hub")
    with pytest.raises(BadInput, match="already there"):
        hub.write(state, tmp_path / "hub")


def test_the_largest_deviation_is_shown(record_property, capsys):
    record_property("largest_deviation", max(deviations, default=0.0))
    with capsys.disabled():
        print(
            f" [seed {SEED}: {len(deviations)} comparisons, largest deviation {max(deviations, default=0.0):.1e} of {LIMIT:.0e}]",
            end="",
        )

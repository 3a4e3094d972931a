"""tools/hub.py against the transformers library: the same numbers in both directions, for random models.

They are drawn from PARITY_SEED (default 0); any seed must pass, up to 1e-5 of the largest magnitude.
"""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SEED = int(os.environ.get("PARITY_SEED", 0))
transformers = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
safetensors = pytest.importorskip("safetensors.torch", reason="pip install -r requirements-dev.txt")
transformers.utils.logging.disable_progress_bar()

from common import UserError  # noqa: E402
from data import audio, glue, images, letters, text  # noqa: E402
from tests.checkpoints import build, model_of  # noqa: E402
from tests.helpers import assert_same  # noqa: E402
from tests.test_released import Malicious  # noqa: E402
from tools import convert, hub  # noqa: E402

EACH = range(6)  # configurations of each kind, in each direction
CLASSES = {"images": "ForImageClassification", "letters": "ForCTC", "sounds": "ForAudioFrameClassification"}
CLASSES |= {"sentences": "ForSequenceClassification", None: ""}


def close(ours, theirs, what=""):
    deviation = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    assert ours.shape == theirs.shape and deviation <= 1e-5, f"{what}: off by {deviation:.1e}"


def draw(kind, number):
    return np.random.default_rng([SEED, *kind.encode(), number])


def pick(rng, *choices):
    return choices[int(rng.integers(len(choices)))]


def randomise(module, rng):
    """No weight stays zero or one, where a mistake would not show; the embedding of padding does."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.3 if p.ndim == 1 or "table" in name or "token" in name else 1 / np.sqrt(p[0].numel())
            p.mul_(p.ndim == 1).add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def draw_sizes(rng, *names):
    heads = int(rng.integers(1, 5))
    dim = 8 * heads * int(rng.integers(1, 4))
    return dict(zip(names, (dim, heads, int(rng.integers(1, 5)), int(rng.integers(8, 80)))))


def our_sizes(rng):
    return draw_sizes(rng, "dim", "heads", "depth", "ffn")


def their_model(rng, name, head, **options):
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    config = getattr(transformers, name + "Config")(**draw_sizes(rng, *names), **options)
    return randomise(getattr(transformers, name + (head or "Model"))(config), rng)


def our_state(config, rng, classes=None, task=None, vocab=0, **more):
    """A checkpoint of ours with random weights."""
    state = {"teacher": None, "config": config, "notes": [], "fresh": []} | more
    state["student"] = {"encoder.embed.tokens.weight": torch.zeros(vocab, 1)}
    if task:
        state |= {"classes": list(classes), "task": task}
    return state | {"student": randomise(build(state), rng).state_dict()}


def their_vision(rng, number):
    patch, side = pick(rng, 2, 4, 6), int(rng.integers(2, 6))
    switches = ("use_relative_position_bias", "use_shared_relative_position_bias", "use_mask_token")
    switches += ("use_absolute_position_embeddings", "use_mean_pooling")
    options = {name: bool(rng.random() < 0.5) for name in switches}
    options |= {"image_size": side * patch, "patch_size": patch, "num_labels": int(rng.integers(2, 7))}
    options |= {"layer_norm_eps": pick(rng, 1e-12, 1e-6), "layer_scale_init_value": pick(rng, 0.0, 0.1)}
    name = pick(rng, "Data2VecVision", "Data2VecVision", "Beit")
    return their_model(rng, name, number % 2 and CLASSES["images"], out_indices=[1], **options)


def our_vision(rng, number):
    relative, patch = bool(rng.random() < 0.7), pick(rng, 2, 4, 6)
    config = our_sizes(rng) | {
        "image_size": patch * int(rng.integers(2, 6)), "patch": patch, "norm_eps": pick(rng, 1e-6, 1e-5),
        "layer_scale": pick(rng, 0.0, 1e-4, 0.1), "learned_std": pick(rng, 0.0, 0.3), "norm": "instance",
        "relative": relative, "per_block": relative and bool(rng.random() < 0.5),
    }  # fmt: skip
    if number % 2 == 0:
        return our_state(config, rng)
    config["pool_cls"] = bool(rng.random() < 0.3)
    return our_state(config, rng, [f"class {i}" for i in range(int(rng.integers(2, 7)))], "images")


def compare_vision(model, ours, state, rng):
    pictures = torch.from_numpy(rng.standard_normal((3, 3, *[model.config.image_size] * 2), dtype=np.float32))
    result = model(pictures, output_hidden_states=True)
    features, layers = ours.encoder(pictures)
    for i, (a, b) in enumerate(zip(layers, result.hidden_states[1:], strict=True)):
        close(a, b[:, 1:], f"layer {i}")
    if "classes" in state:
        close(ours(pictures), result.logits, "logits")
    elif not model.config.use_mean_pooling:
        close(features, result.last_hidden_state, "features")


def their_speech(rng, number):
    task = (None, "letters", "sounds")[number % 3]
    return their_model(
        rng, "Data2VecAudio", CLASSES[task],
        conv_dim=[8 * int(rng.integers(1, 6))] * 7, conv_pos_kernel_size=int(rng.integers(3, 20)),
        num_conv_pos_embeddings=int(rng.integers(1, 6)), num_conv_pos_embedding_groups=pick(rng, 1, 2, 4),
        vocab_size=int(rng.integers(3, 40)), num_labels=int(rng.integers(2, 9)),
        mask_time_prob=pick(rng, 0.0, 0.05), layer_norm_eps=pick(rng, 1e-5, 1e-12),
    )  # fmt: skip


def our_speech(rng, number):
    task, depth = (None, "letters", "sounds")[number % 3], int(rng.integers(1, 6))
    config = our_sizes(rng) | {
        "channels": 8 * int(rng.integers(1, 6)), "pos_depth": depth, "pos_groups": pick(rng, 1, 2, 4),
        "pos_width": depth * int(rng.integers(3, 20)), "norm_eps": pick(rng, 1e-5, 1e-6), "deep_norm": False,
        "share_positions": False,
    }  # fmt: skip
    classes = letters.LETTERS if task == "letters" else [f"sound {i}" for i in range(int(rng.integers(2, 9)))]
    return our_state(config, rng, classes, task)


def compare_speech(model, ours, state, rng):
    lengths = torch.tensor([*rng.integers(800, 6000, size=2).tolist(), 6000])
    waves = torch.from_numpy(rng.standard_normal((3, 6000), dtype=np.float32))
    for samples in (None, lengths):
        inside = torch.arange(6000) < (torch.full((3,), 6000) if samples is None else lengths)[:, None]
        mask = None if samples is None else inside.long()
        result = model(waves * inside, attention_mask=mask, output_hidden_states=True)
        features, layers = ours.encoder(waves * inside, None, samples)
        real = torch.arange(features.shape[1]) < ours.encoder.embed.frames(inside.sum(1))[:, None]
        for i, (a, b) in enumerate(zip(layers, result.hidden_states[1:], strict=True)):
            close(a[real], b[real], f"layer {i}")
        if "classes" in state:
            close(ours(waves * inside, samples)[0][real], result.logits[real], "logits")
        else:
            close(features[real], result.last_hidden_state[real], "features")


def their_text(rng, number):
    name = pick(rng, "Data2VecText", "Data2VecText", "Roberta")
    head = CLASSES["sentences"] if number % 2 else pick(rng, "Model", "ForMaskedLM")
    return their_model(
        rng, name, head, vocab_size=int(rng.integers(8, 90)), type_vocab_size=pick(rng, 1, 2),
        max_position_embeddings=int(rng.integers(10, 50)), layer_norm_eps=pick(rng, 1e-12, 1e-5),
        num_labels=int(rng.integers(1, 6)), pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip


def our_text(rng, number):
    config = our_sizes(rng) | {"max_tokens": int(rng.integers(8, 50)), "norm_eps": pick(rng, 1e-5, 1e-12)}
    classes = pick(rng, ["score"], ["no", "yes"], ["a", "b", "c"])
    return our_state(config, rng, classes, "sentences" if number % 2 else None, int(rng.integers(8, 90)))


def compare_text(model, ours, state, rng):
    for padding in (None, "right", "left"):
        shape = 3, int(rng.integers(2, state["config"]["max_tokens"] + 1))
        ids = torch.from_numpy(rng.integers(4, model.config.vocab_size, size=shape))
        for row in ids if padding else ():
            n = int(rng.integers(0, len(row)))
            row[slice(n) if padding == "left" else slice(len(row) - n, None)] = 1
        real = ids != 1
        result = model(ids, attention_mask=real.long(), output_hidden_states=True)
        features, layers = ours.encoder(ids)
        for i, (a, b) in enumerate(zip(layers, result.hidden_states[1:], strict=True)):
            close(a[real], b[real], f"layer {i}, padding {padding}")
        close(features[real], result.hidden_states[-1][real], f"features, padding {padding}")
        if "classes" in state and padding != "left":  # the head takes the first token
            close(ours(ids), result.logits, f"logits, padding {padding}")


KINDS = {
    "vision": (their_vision, our_vision, compare_vision),
    "speech": (their_speech, our_speech, compare_speech),
    "text": (their_text, our_text, compare_text),
}


@torch.no_grad()
@pytest.mark.parametrize("number", EACH)
@pytest.mark.parametrize("kind", KINDS)
def test_from_theirs(kind, number, tmp_path):
    """A folder as save_pretrained writes it now, or before safetensors, in one file or in two."""
    rng, (theirs, _, compare) = draw(kind, number), KINDS[kind]
    model = theirs(rng, number)
    model.save_pretrained(tmp_path)
    path, form = tmp_path / "model.safetensors", pick(rng, "safetensors", "bin", "parts")
    weights = safetensors.load_file(path)
    if form != "safetensors":
        path.unlink()
    if form == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    for i in range(2) if form == "parts" else ():
        half = {name: weights[name] for name in list(weights)[i::2]}
        safetensors.save_file(half, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    state = convert.read(tmp_path)
    assert ("classes" in state) == type(model).__name__.endswith(("Classification", "CTC"))
    compare(model, model_of(state, target="block"), state, rng)


@torch.no_grad()
@pytest.mark.parametrize("number", EACH)
@pytest.mark.parametrize("kind", KINDS)
def test_to_theirs_and_back(kind, number, tmp_path, caplog):
    rng, (_, ours, compare) = draw(kind, 100 + number), KINDS[kind]
    state = ours(rng, number)
    hub.write(state, tmp_path / "hub")
    model = load_theirs(CLASSES[state.get("task")], tmp_path / "hub", caplog)
    compare(model, model_of(state, target="block"), state, rng)
    back = convert.read(tmp_path / "hub")
    kept = {name: t for name, t in state["student"].items() if not name.startswith("head.")}
    assert_same(back["student"], kept)
    assert state["config"].items() <= back["config"].items()
    assert all(back.get(name) == state.get(name) for name in ("classes", "task"))


def load_theirs(head, folder, caplog):
    """from_pretrained(), which finds no weight missing, left over or new, and warns of nothing."""
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    auto = getattr(transformers, f"AutoModel{head}")
    with caplog.at_level(logging.WARNING):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not caplog.records, caplog.text
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("per_block", [False, True])
def test_another_image_size_is_as_theirs_where_theirs_is_bicubic(per_block, tmp_path, caplog, monkeypatch):
    """224 -> 384. The library resizes relative positions bilinearly, we bicubically (learned ones: both)."""
    config = our_sizes(draw("vision", 200)) | {"image_size": 224, "patch": 16, "layer_scale": 0.1}
    config |= {"relative": True, "per_block": per_block, "learned_std": 0.02, "norm_eps": 1e-6}
    state = our_state(config, draw("vision", 200))
    hub.write(state, tmp_path / "hub")
    model = load_theirs("", tmp_path / "hub", caplog)
    pictures = torch.from_numpy(draw("vision", 201).standard_normal((1, 3, 384, 384), dtype=np.float32))
    ours, real = model_of(state, image_size=384, target="block").encoder(pictures)[0], F.interpolate
    bilinear = model(pictures).last_hidden_state

    def bicubic(x, size, mode, **more):
        return real(x, size, mode="bicubic", align_corners=False)

    monkeypatch.setattr(F, "interpolate", bicubic)
    close(ours, model(pictures).last_hidden_state, "features")
    assert (ours - bilinear).abs().max() / bilinear.abs().max() > 1e-4


def test_their_processors_prepare_pixels_and_waves_and_spell_letters_as_ours(tmp_path):
    rng = draw("speech", 200)
    hub.write(our_vision(rng, 0), tmp_path / "vision")
    hub.write(our_speech(rng, 1), tmp_path / "speech")
    side = convert.read(tmp_path / "vision")["config"]["image_size"]
    picture = Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vision")
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(images.normalise(images.to_tensor(picture))[None], theirs, rtol=0, atol=1e-4)
    wave = rng.standard_normal(500).astype(np.float32) * 0.1
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "speech")
    theirs = extractor(wave, sampling_rate=16000, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(audio.normalise(wave), theirs, rtol=0, atol=5e-3)  # variance + 1e-7 there
    best = [0, 9, 9, 0, 6, 13, 0, 13, 16, 0, 1, 1, 24, 28]
    scores = np.where(np.eye(len(letters.LETTERS))[best], 0.0, -9.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "speech")
    assert tokenizer.decode(best) == letters.decode_greedy(scores, letters.LETTERS)[0]


@torch.no_grad()
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("prepared", [
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {}, {"image_mean": [0.1, 0.7, 0.4]},
    {"do_normalize": False}, {"do_rescale": False, "image_mean": [128, 120, 100], "image_std": [60, 61, 62]},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
], ids=str)  # fmt: skip
def test_pixels_may_be_normalised_in_any_way(tmp_path, prepared, file, caplog, capsys):
    """Their processor and model give what ours do, and so does what ours are written to."""
    rng = draw("vision", 300)
    model = their_vision(rng, 1)
    model.save_pretrained(tmp_path / "hub")
    prepared = {"image_processor_type": "BeitImageProcessor", **prepared, "do_center_crop": False}
    prepared["size"] = {"height": model.config.image_size, "width": model.config.image_size}
    nested = {"image_processor": prepared} if file == "processor_config.json" else prepared
    (tmp_path / "hub" / file).write_text(json.dumps(nested))
    state = convert.read(tmp_path / "hub")
    assert f"'do_center_crop': False, 'size': {prepared['size']}" in capsys.readouterr().out
    hub.write(state, tmp_path / "back")
    picture = rng.integers(256, size=(*prepared["size"].values(), 3), dtype=np.uint8)
    ours = model_of(state, target="block")(images.normalise(images.to_tensor(picture))[None])
    for folder in ("hub", "back"):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / folder)
        pixels = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        close(ours, load_theirs(CLASSES["images"], tmp_path / folder, caplog)(pixels).logits, folder)
    assert_same(convert.read(tmp_path / "back")["student"], state["student"])


def test_their_tokenizer_reads_our_vocabulary(tmp_path):
    sentences = ["the cat sat on the mat", "Then  it's 42 rats, and\na naïve hat ☃!", "that fat rat"]
    vocabulary = text.train_vocabulary(sentences * 3, 290)
    config = {"max_tokens": 40, "dim": 16, "depth": 1, "heads": 2, "ffn": 16, "norm_eps": 1e-5}
    state = our_state(config, draw("text", 200), vocab=vocabulary.size, vocabulary=vocabulary.spell())
    hub.write(state, tmp_path / "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    for sentence in sentences:
        assert tokenizer(sentence)["input_ids"] == glue.sentence_ids(vocabulary, sentence), sentence
    assert tokenizer(*sentences[:2])["input_ids"] == glue.sentence_ids(vocabulary, *sentences[:2])
    assert tokenizer.mask_token_id == vocabulary.mask and len(tokenizer) == vocabulary.size
    assert convert.read(tmp_path / "hub")["vocabulary"] == state["vocabulary"]
    (tmp_path / "hub" / "vocab").unlink()  # as a folder of theirs: vocab.json and merges.txt alone
    back = text.Vocabulary.parse(convert.read(tmp_path / "hub")["vocabulary"])
    assert back.size == vocabulary.size and back.pieces == vocabulary.pieces


@torch.no_grad()
@pytest.mark.parametrize("form", ["pairs", "strings", "mask in the middle"])
def test_tokenizer_json_alone(tmp_path, form):
    """As the library saves it now; tokens come after <mask>, and the table of embeddings is padded."""
    tk = pytest.importorskip("tokenizers")
    lines = Path(__file__).read_text("utf-8").split("\n") + ["naïve ÄÖÜ ☃ 日本 \t it's", " two  spaces"]
    lines = [line for line in lines if line and not re.search("<(s|/s|pad|unk|mask|ent)>", line)]
    special = ["<s>", "<pad>", "</s>", "<unk>"] + ["<mask>", "<ent>"] * (form == "mask in the middle")
    theirs = tk.Tokenizer(tk.models.BPE())
    theirs.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": 500, "special_tokens": special, "initial_alphabet": alphabet}
    theirs.train_from_iterator(lines, tk.trainers.BpeTrainer(show_progress=False, **how))
    theirs.add_special_tokens(["<mask>", "<ent>"])
    theirs.save(str(path := tmp_path / "tokenizer.json"))
    about = json.loads(path.read_text("utf-8"))
    if form == "strings":  # as older versions have it
        about["model"]["merges"] = [" ".join(merge) for merge in about["model"]["merges"]]
        path.write_text(json.dumps(about))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=512, pad_token_id=1, max_position_embeddings=34, **sizes)
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    state, size = convert.read(tmp_path), theirs.get_vocab_size()
    for note in (f"{512 - size} tokens", "do_lower_case"):
        assert note in " ".join(state["notes"])
    vocabulary = text.Vocabulary.parse(state["vocabulary"])
    assert len(lines) > 200 and all(vocabulary.encode(line) == theirs.encode(line).ids for line in lines)
    assert (vocabulary.size, vocabulary.mask) == (size, theirs.token_to_id("<mask>"))
    assert not {theirs.token_to_id(token) for token in (*special, "<mask>", "<ent>")} & {
        *vocabulary.regular_ids
    }
    ids = torch.tensor([glue.sentence_ids(vocabulary, lines[0], max_tokens=32)])
    ours = model_of(state, target="block").encoder(ids)[0]
    close(ours, model(ids).last_hidden_state, "features")
    for change, name in (
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"), ({"pre_tokenizer": None}, "type None"),
        ({"pre_tokenizer": about["pre_tokenizer"] | {"add_prefix_space": True}}, "add_prefix_space True"),
    ):  # fmt: skip
        path.write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=f"no vocabulary .tokenizer.json has {name}"):
            convert.read(tmp_path)


def test_the_blank_of_a_folder_becomes_output_0(tmp_path):
    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=5
    )
    torch.manual_seed(0)
    config = transformers.Data2VecAudioConfig(conv_dim=[16] * 7, pad_token_id=4, **sizes)
    theirs = transformers.Data2VecAudioForCTC(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"A": 0, "|": 1, "B": 2, "[UNK]": 3, "[PAD]": 4}))
    state = convert.read(tmp_path)
    assert state["classes"] == ["[PAD]", "A", "|", "B", "[UNK]"]
    wave = torch.randn(1, 4000)
    expected = theirs(wave).logits[..., [4, 0, 1, 2, 3]]
    torch.testing.assert_close(model_of(state)(wave)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [
    {"model_type": "bert"}, {"model_type": None}, {"hidden_act": "relu"}, {"is_decoder": True},
    {"pad_token_id": 0}, {"num_attention_heads": 7}, {"num_attention_heads": None}, {"data2vec": 5},
    "truncated", "malicious", "no weights", "config", "extra", "missing",
], ids=str)  # fmt: skip
def test_other_kinds_and_damage_are_one_line(tmp_path, change):
    folder, written = tmp_path / "hub", tmp_path / "written"
    hub.write(our_text(draw("text", 300), 0), folder)
    about, path, named = folder / "config.json", folder / "model.safetensors", str(folder)
    weights = safetensors.load_file(path)
    if isinstance(change, dict):
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
    if change in ("malicious", "no weights"):
        path.unlink()
    if change == "malicious":
        torch.save({"w": Malicious(written, "eval")}, folder / "pytorch_model.bin")
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:999])
    if change == "config":
        about.write_text('{"model_type": "data2vec-text", ')
    if change == "extra":
        named = "encoder.layer.0.adapter.weight"
        safetensors.save_file(weights | {named: torch.zeros(3)}, path)
    if change == "missing":
        del weights["encoder.layer.0.output.dense.bias"]
        safetensors.save_file(weights, path)
        named = "encoder.blocks.0.fc2.bias"
    with pytest.raises(UserError) as error:
        model_of(convert.read(folder))
    assert "\n" not in str(error.value) and named in str(error.value) and not written.exists()


def test_the_scripts_do_without_these_libraries():
    names = "train_vision, train_speech, train_text, finetune, tools.convert"
    script = f"import sys; sys.modules['transformers'] = sys.modules['safetensors'] = None; import {names}"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

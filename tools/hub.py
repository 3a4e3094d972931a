"""Folders of the transformers library (config.json and weights), read and written without it.

Read: Data2VecAudio, Data2VecText, Data2VecVision, and Roberta and Beit, whose models these are. Written: what
from_pretrained() of its Auto classes takes.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from common import require, whole
from data import text
from tools import released
from tools.released import KERNELS, PIXELS, complete, rename, translate

# names: theirs -> ours; {} is the first number in a name
ATTENTION = "encoder.layer.{}.attention"
LAYERS = {
    f"{ATTENTION}.output.dense": "blocks.{}.attn.out", "encoder.layer.{}.intermediate.dense": "blocks.{}.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.fc2",
}  # fmt: skip
VISION = LAYERS | {
    "embeddings.cls_token": "embed.cls", "embeddings.mask_token": "mask_embedding",
    "embeddings.position_embeddings": "embed.learned", "embeddings.patch_embeddings.projection": "embed.proj",
    "encoder.relative_position_bias.relative_position_bias_table": "embed.table",
    f"{ATTENTION}.attention.relative_position_bias.relative_position_bias_table": "embed.table.{}",
    f"{ATTENTION}.attention.query": "blocks.{}.attn.q", f"{ATTENTION}.attention.key": "blocks.{}.attn.k",
    f"{ATTENTION}.attention.value": "blocks.{}.attn.v", "layernorm": "norm",
    "encoder.layer.{}.lambda_1": "blocks.{}.scale1", "encoder.layer.{}.lambda_2": "blocks.{}.scale2",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
}  # fmt: skip
AUDIO = {
    "masked_spec_embed": "mask_embedding", "encoder.layer_norm": "embed.norm",
    "feature_extractor.conv_layers.{}.conv": "embed.content.convs.{}",
    "feature_extractor.conv_layers.{}.layer_norm": "embed.content.norms.{}",
    "feature_projection.layer_norm": "embed.content.norm",
    "feature_projection.projection": "embed.content.proj",
    "encoder.pos_conv_embed.layers.{}.conv": "embed.positions.{}",
    **{f"encoder.layers.{{}}.attention.{part}_proj": f"blocks.{{}}.attn.{part}" for part in "qkv"},
    "encoder.layers.{}.attention.out_proj": "blocks.{}.attn.out",
    "encoder.layers.{}.feed_forward.intermediate_dense": "blocks.{}.fc1",
    "encoder.layers.{}.feed_forward.output_dense": "blocks.{}.fc2",
    "encoder.layers.{}.layer_norm": "blocks.{}.norm1",
    "encoder.layers.{}.final_layer_norm": "blocks.{}.norm2",
}  # fmt: skip
TEXT = LAYERS | {
    "embeddings.word_embeddings": "embed.tokens", "embeddings.position_embeddings": "embed.positions",
    "embeddings.LayerNorm": "embed.norm", f"{ATTENTION}.self.query": "blocks.{}.attn.q",
    f"{ATTENTION}.self.key": "blocks.{}.attn.k", f"{ATTENTION}.self.value": "blocks.{}.attn.v",
    f"{ATTENTION}.output.LayerNorm": "blocks.{}.norm1",
    "encoder.layer.{}.output.LayerNorm": "blocks.{}.norm2",
}  # fmt: skip
KINDS = {  # model_type: names of the encoder, of heads; what is before an encoder's names under a head
    "data2vec-vision": (VISION, {"pooler.layernorm": "norm", "classifier": "out"}, "data2vec_vision."),
    "beit": (VISION, {"pooler.layernorm": "norm", "classifier": "out"}, "beit."),
    "data2vec-audio": (AUDIO, {"lm_head": "out", "classifier": "out"}, "data2vec_audio."),
    "data2vec-text": (TEXT, {"classifier.dense": "dense", "classifier.out_proj": "out"}, "data2vec_text."),
    "roberta": (TEXT, {"classifier.dense": "dense", "classifier.out_proj": "out"}, "roberta."),
}
NOT_USED = r"(pooler|lm_head|embeddings\.token_type_embeddings)\..*|.*(relative_position_index|position_ids)"
EXPECTED = {  # in config.json, if it is there: weights do not tell these
    "hidden_act": "gelu", "feat_extract_activation": "gelu", "is_decoder": False,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
}  # fmt: skip
INPUTS = {"do_normalize": True, "sampling_rate": 16000, "feature_size": 1}  # how ours are prepared
INPUTS |= {"add_prefix_space": False, "do_lower_case": False}
TASKS = {"images": "ForImageClassification", "sentences": "ForSequenceClassification", None: "Model"}
TASKS |= {"letters": "ForCTC", "sounds": "ForAudioFrameClassification"}
IMAGES = {"image_processor_type": "BeitImageProcessor", "do_center_crop": False}
WAVES = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True}


def read_json(path: Path) -> dict:
    """{} if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """model.safetensors or pytorch_model.bin, or their parts model-00001-of-00002.safetensors ..."""
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    require(paths, f"{folder}: no weights of transformers in it; of a run, use its ckpt.pt or best.pt")
    weights = {}
    for path in paths:
        if path.suffix == ".bin":
            weights |= released.load(path)
        else:
            from safetensors.torch import load_file  # optional

            weights |= load_file(path)
    return weights


def read(folder: Path) -> dict:
    """A folder -> state, as convert.read describes it. Raises UserError."""
    about = read_json(folder / "config.json")
    kind = about.get("model_type")
    require(kind in KINDS, f"{folder}: has model_type {kind} in config.json; known are {', '.join(KINDS)}")
    encoder, head, prefix = KINDS[kind]
    expected = EXPECTED | ({"pad_token_id": 1} if encoder is TEXT else {})
    for name, value in expected.items():
        given = about.get(name, value)
        require(given == value, f"{folder}: has {name} {given} in config.json; only {value} can be read")
    weights = {name.removeprefix(prefix): tensor for name, tensor in load_weights(folder).items()}
    student = rename(weights, encoder, head, NOT_USED, folder)
    left = {name.split(".")[0] for name in weights if not translate(name, head)} & {"pooler", "lm_head"}
    notes = [f"left out: {name}" for name in sorted(left)]
    nested = read_json(folder / "processor_config.json")
    prepared = nested.get("image_processor") or nested.get("feature_extractor")
    prepared = prepared or read_json(folder / "preprocessor_config.json")
    config = {"heads": about["num_attention_heads"], "norm_eps": about["layer_norm_eps"]}
    labels = about.get("id2label", {"0": "LABEL_0"})
    classes = None if labels["0"] == "LABEL_0" else [labels[str(i)] for i in range(len(labels))]
    if encoder is VISION:
        task, config["image_size"] = "images", about["image_size"]
        require(isinstance(about["image_size"], int), f"{folder}: only square images can be read")
        released.fold_pixels(student, prepared or PIXELS)
        size = {name: value for name, value in prepared.items() if re.search("size|crop|resample", name)}
        if "data2vec" not in about:  # it is not from write()
            notes.append(f"made for pictures of {size or 'unknown size'}; ours: the middle square, bicubic")
    elif encoder is TEXT:
        task = "sentences"
        types = weights.get("embeddings.token_type_embeddings.weight", torch.zeros(1, 1))
        tokens = student["encoder.embed.tokens.weight"]
        student["encoder.embed.tokens.weight"] = tokens + types[0]  # ours are all of the first type
    else:
        task, config["deep_norm"] = "sounds", False
    if encoder is not VISION:
        prepared = prepared | read_json(folder / "tokenizer_config.json")
        other = [name for name, ours in INPUTS.items() if prepared.get(name, ours) != ours]
        notes += [f"{name} of its inputs is {prepared[name]}, of ours {INPUTS[name]}" for name in other]
    if encoder is AUDIO and "lm_head.weight" in weights:
        symbols = {i: symbol for symbol, i in read_json(folder / "vocab.json").items()}
        space = prepared.get("word_delimiter_token", "|")
        blank, outputs = about.get("pad_token_id", 0), range(len(student["out.weight"]))
        order = [blank] + [i for i in outputs if i != blank]  # our blank is output 0
        student |= {name: student[name][order] for name in ("out.weight", "out.bias")}
        names = [symbols.get(i, f"<{i}>").replace(space, "|") for i in order]
        task, classes = "letters", names if symbols else None
    config = about.get("data2vec", {}) | config  # the former is from write()
    state = {"student": student, "teacher": None, "config": config, "task": task, "classes": classes}
    return complete(state | {"origin": f"folder of transformers, {kind}", "notes": notes}, folder)


def write(state: dict, folder: Path, network: str = "student") -> None:
    """A state -> a new folder for from_pretrained(), without the head of pre-training. Raises UserError."""
    from safetensors.torch import save as serialize  # optional

    config, weights, task = state["config"], state[network], state.get("task")
    require(not folder.exists(), f"{folder}: exists; choose a new folder")
    require(not config.get("masks"), f"{folder}: the transformers library has no data2vec 2.0")
    require(weights, f"--network {network}: the checkpoint has none")
    write_kind = vision_folder if "patch" in config else audio_folder if "channels" in config else text_folder
    about, head, added, files = write_kind(state, weights)
    kind = about["model_type"].removeprefix("data2vec-")
    about |= {
        "architectures": [f"Data2Vec{kind.title()}{TASKS[task]}"], "hidden_size": config["dim"],
        "num_hidden_layers": config["depth"], "num_attention_heads": config["heads"], "dtype": "float32",
        "intermediate_size": config["ffn"], "layer_norm_eps": config["norm_eps"],
        "data2vec": {name: value for name, value in config.items() if name not in ("data", "out", "init")},
    }  # fmt: skip
    if task and task != "letters":
        about["id2label"] = {str(i): name for i, name in enumerate(state["classes"])}
        about["label2id"] = {name: i for i, name in enumerate(state["classes"])}
    encoder, _, prefix = KINDS[about["model_type"]]
    prefix = prefix if task else ""
    names = {f"encoder.{ours}": prefix + theirs for theirs, ours in encoder.items()} | head
    new = {prefix + name: tensor for name, tensor in added.items()}
    for name, tensor in split(weights).items():
        theirs = translate(name, names)
        require(theirs or name.startswith("head."), f"{name}: transformers has no place for this weight")
        if theirs:
            new[theirs] = tensor.float().clone().contiguous()
    with whole(folder) as place:
        place.mkdir()
        (place / "model.safetensors").write_bytes(serialize(new, {"format": "pt"}))
        for name, content in {"config.json": about, **files}.items():
            if not isinstance(content, str):
                content = json.dumps(content, indent=2, ensure_ascii=False)
            (place / name).write_text(content, encoding="utf-8")


def vision_folder(state: dict, weights: dict) -> tuple[dict, dict, dict, dict]:
    """-> for config.json; names of the head, ours: theirs; weights that ours lacks; files {name: content}."""
    config, side, table = state["config"], state["config"]["image_size"], weights.get("encoder.embed.table")
    mean = "encoder.norm.weight" not in weights and not config.get("pool_cls")
    about = {
        "model_type": "data2vec-vision", "image_size": side, "patch_size": config["patch"],
        "use_mask_token": "encoder.mask_embedding" in weights, "use_mean_pooling": mean,
        "use_absolute_position_embeddings": "encoder.embed.learned" in weights,
        "use_relative_position_bias": table is not None and table.ndim == 3,
        "use_shared_relative_position_bias": table is not None and table.ndim == 2,
        "layer_scale_init_value": config["layer_scale"], "out_indices": [config["depth"]],
    }  # fmt: skip
    files = {"preprocessor_config.json": PIXELS | IMAGES | {"size": {"height": side, "width": side}}}
    norm = "data2vec_vision.pooler.layernorm" if mean else "data2vec_vision.layernorm"
    return about, {"norm": norm, "out": "classifier"}, {}, files


def audio_folder(state: dict, weights: dict) -> tuple[dict, dict, dict, dict]:
    config, letters = state["config"], state.get("task") == "letters"
    require(not config["deep_norm"], "deep_norm: transformers has no model with DeepNorm")
    about = {
        "model_type": "data2vec-audio", "conv_dim": [config["channels"]] * len(KERNELS),
        "num_conv_pos_embeddings": config["pos_depth"],
        "conv_pos_kernel_size": max(3, config["pos_width"] // config["pos_depth"]),
        "num_conv_pos_embedding_groups": config["pos_groups"],
    }  # fmt: skip
    files = {"preprocessor_config.json": WAVES}
    if letters:
        symbols = state["classes"]
        about |= {"vocab_size": len(symbols), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        unknown = "<unk>" if "<unk>" in symbols else symbols[0]
        special = {"pad_token": symbols[0], "unk_token": unknown, "bos_token": None, "eos_token": None}
        files["vocab.json"] = {symbol: i for i, symbol in enumerate(symbols)}
        files["tokenizer_config.json"] = {"tokenizer_class": "Wav2Vec2CTCTokenizer"} | special
    return about, {"out": "lm_head" if letters else "classifier"}, {}, files


def text_folder(state: dict, weights: dict) -> tuple[dict, dict, dict, dict]:
    tokens, dim = weights["encoder.embed.tokens.weight"].shape
    longest = state["config"]["max_tokens"]
    about = {"model_type": "data2vec-text", "type_vocab_size": 1, "vocab_size": tokens}
    about["max_position_embeddings"] = longest + 2
    added = {"embeddings.token_type_embeddings.weight": torch.zeros(1, dim)}
    if "classes" not in state:  # AutoModel has a pooler, data2vec none
        added |= {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
    files = tokenizer_files(state["vocabulary"], longest) if "vocabulary" in state else {}
    return about, {"dense": "classifier.dense", "out": "classifier.out_proj"}, added, files


def split(weights: dict) -> dict:
    """Our weights as theirs are: query, key and value apart, a table for each block, axes of size 1."""
    new = {re.sub(r"attn\.([qkv])_bias", r"attn.\1.bias", name): tensor for name, tensor in weights.items()}
    for name in [name for name in new if name.endswith("attn.qkv.weight")]:
        parts = new.pop(name).chunk(3)
        new |= {name.replace("qkv", part): tensor for part, tensor in zip("qkv", parts)}
    if "encoder.embed.cls" in new:
        for name in {"encoder.embed.cls", "encoder.mask_embedding"} & new.keys():
            new[name] = new[name][None, None]
    if "encoder.embed.learned" in new:  # theirs has one for the class token, too
        new["encoder.embed.learned"] = F.pad(new["encoder.embed.learned"], (0, 0, 1, 0))[None]
    if "encoder.embed.table" in new and new["encoder.embed.table"].ndim == 3:
        tables = new.pop("encoder.embed.table")
        new |= {f"encoder.embed.table.{l}": table for l, table in enumerate(tables)}
    return new


def tokenizer_files(spelled: str, max_tokens: int) -> dict:
    """Our vocabulary; and as vocab.json and merges.txt of RoBERTa's tokenizer, unless it lacks ids."""
    vocabulary = text.Vocabulary.parse(spelled)
    if text.UNK in vocabulary.pieces.values():
        return {"vocab": spelled}
    letters = text.byte_letters()
    spell = {piece: "".join(letters[byte] for byte in piece) for piece in vocabulary.pieces}
    rank = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    merges = [" ".join(spell[half] for half in halves(piece, rank)) for piece in rank if len(piece) > 1]
    names = {spell[piece]: i for piece, i in vocabulary.pieces.items()} | vocabulary.special
    names |= {f"<unused{i}>": i for i in set(range(vocabulary.size)) - set(names.values())}
    return {
        "vocab": spelled,
        "vocab.json": dict(sorted(names.items(), key=lambda item: item[1])),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer", "model_max_length": max_tokens},
    }


def halves(piece: bytes, rank: dict[bytes, int]) -> list[bytes]:
    """The two pieces that a piece was merged from: its bytes, merged in the order of the ranks before it."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts

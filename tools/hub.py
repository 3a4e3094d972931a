"""Folders of the transformers library (config.json and weights), read and written without it.

Read: Data2VecAudio, Data2VecText, Data2VecVision, and Roberta and Beit, whose models these are. Written: what
from_pretrained() of its Auto classes takes. A name is translated by a table of `theirs: ours`, {} for a layer's number.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from common import BadInput
from model import CONVS, convolutions
from tools.released import (
    LETTERS, SPEECH_RECIPE, TEXT_RECIPE, VISION_RECIPE, choose, depth_of, fuse, gather_positions, head_layers, spell_convs,
    targets, under_encoder,
)  # fmt: skip
from tools.unpickle import load_folder, read_json

AUDIO = {
    "masked_spec_embed": "mask_embedding",
    "feature_extractor.conv_layers.{}.conv": "embed.content.convs.{}",
    "feature_extractor.conv_layers.{}.layer_norm": "embed.content.norms.{}",
    "feature_projection.layer_norm": "embed.content.norm",
    "feature_projection.projection": "embed.content.proj",
    "encoder.pos_conv_embed.layers.{}.conv": "embed.positions.{}",
    "encoder.layer_norm": "embed.norm",
    **{f"encoder.layers.{{}}.attention.{part}_proj": f"blocks.{{}}.attn.{part}" for part in "qkv"},
    "encoder.layers.{}.attention.out_proj": "blocks.{}.attn.out",
    "encoder.layers.{}.layer_norm": "blocks.{}.norm1",
    "encoder.layers.{}.feed_forward.intermediate_dense": "blocks.{}.fc1",
    "encoder.layers.{}.feed_forward.output_dense": "blocks.{}.fc2",
    "encoder.layers.{}.final_layer_norm": "blocks.{}.norm2",
}
TEXT = {
    "embeddings.word_embeddings": "embed.tokens",
    "embeddings.position_embeddings": "embed.positions",
    "embeddings.token_type_embeddings": "embed.types",
    "embeddings.LayerNorm": "embed.norm",
    **{f"encoder.layer.{{}}.attention.self.{part}": f"blocks.{{}}.attn.{part[0]}" for part in ("query", "key", "value")},
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.out",
    "encoder.layer.{}.attention.output.LayerNorm": "blocks.{}.norm1",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.fc2",
    "encoder.layer.{}.output.LayerNorm": "blocks.{}.norm2",
}
VISION = {
    "embeddings.cls_token": "embed.cls",
    "embeddings.mask_token": "mask_embedding",
    "embeddings.position_embeddings": "embed.learned",
    "embeddings.patch_embeddings.projection": "embed.proj",
    "encoder.relative_position_bias.relative_position_bias_table": "embed.table",
    "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table": "embed.table.{}",
    **{f"encoder.layer.{{}}.attention.attention.{part}": f"blocks.{{}}.attn.{part[0]}" for part in ("query", "key", "value")},
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.out",
    "encoder.layer.{}.lambda_1": "blocks.{}.scale1",
    "encoder.layer.{}.lambda_2": "blocks.{}.scale2",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.fc2",
    "layernorm": "norm",
}
KINDS = {  # model_type: names of the weights, prefix under a head, recipe of pre-training, what else a folder of ours keeps
    "data2vec-audio": (AUDIO, "data2vec_audio.", SPEECH_RECIPE, ("share_positions", "window")),
    "data2vec-text": (TEXT, "data2vec_text.", TEXT_RECIPE, ("share_embedding", "window", "objective", "head_layers")),
    "roberta": (TEXT, "roberta.", TEXT_RECIPE, ()),
    "data2vec-vision": (VISION, "data2vec_vision.", VISION_RECIPE, ("window", "layer_scale", "learned_std", "init_std")),
    "beit": (VISION, "beit.", VISION_RECIPE, ()),
}
LEFT_OUT = r"pooler\..*|lm_head\..*|.*relative_position_index|.*position_ids"  # parts that a model of ours has no use for
OURS = "data2vec"  # entry of config.json for what only we ask: K, targets, loss


def translate(name: str, table: dict[str, str]) -> str | None:
    """ "encoder.layer.3.output.dense.bias" -> "blocks.3.fc2.bias"; None if the table does not have it."""
    number = re.search(r"(?<=\.)\d+(?=\.)", name + ".")
    form = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    stem, _, leaf = form.rpartition(".")
    new = table.get(form) or (f"{table[stem]}.{leaf}" if stem in table else None)
    return new and new.format(number and number[0])


# ---- theirs -> ours ----------------------------------------------------------------------------------------------------------


def read(folder: Path, asked: dict) -> dict:
    """A folder -> {"student", "teacher": None, "config", "origin", "notes"[, "classes", "goal"]}. Raises BadInput."""
    config, notes = read_json(folder / "config.json"), []
    if (kind := config.get("model_type")) not in KINDS:
        raise BadInput(f"{folder}: its config.json says model_type {kind}; known are {', '.join(KINDS)}")
    names, prefix, recipe, more = KINDS[kind]
    refuse_variants(config, folder)
    weights = {name.removeprefix(prefix): tensor for name, tensor in load_folder(folder).items()}
    encoder, rest = {}, {}
    for name, tensor in weights.items():
        new = translate(name, names)
        (encoder if new else rest)[new or name] = tensor
    encoder = fuse({re.sub(r"attn\.([qkv])\.bias", r"attn.\1_bias", name): tensor for name, tensor in encoder.items()})
    make = audio_model if names is AUDIO else text_model if names is TEXT else vision_model
    new = make(folder, config, encoder, rest, asked, notes)
    if strange := [name for name in rest if not re.fullmatch(LEFT_OUT, name)]:
        raise BadInput(
            f"{folder}: weights that this code has no use for: {', '.join(strange[:5])}{' and more' * (len(strange) > 5)}"
        )
    if dropped := sorted({name.rpartition(".")[0] for name in rest if not name.endswith(("index", "ids"))}):
        notes.append(f"left out: {', '.join(dropped)}")
    stored = config.get(OURS) if isinstance(config.get(OURS), dict) else {}
    if "classes" not in new:
        new["config"] |= targets(stored, asked, recipe, new["config"]["depth"], folder)
    new["config"] |= {name: stored[name] for name in more if isinstance(stored.get(name), (bool, int, float, str))}
    if "task" in stored:
        new["finetune"] = {"task": str(stored["task"])}
    architecture = (config.get("architectures") or [kind])[0]
    return new | {"teacher": None, "notes": notes, "origin": f"folder of transformers, {architecture}"}


def refuse_variants(config: dict, folder: Path) -> None:
    """Raises BadInput for what changes the computation in a way that our models cannot follow."""
    fine = {
        "hidden_act": "gelu", "feat_extract_activation": "gelu", "conv_bias": False, "add_adapter": False,
        "use_weighted_layer_sum": False,
        "is_decoder": False, "add_cross_attention": False, "num_channels": 3, "position_embedding_type": "absolute",
        "add_fpn": False,
    }  # fmt: skip
    for name, value in fine.items():
        if config.get(name, value) != value:
            raise BadInput(f"{folder}: {name} {config[name]} in its config.json; only {value} can be read")


def needed(config: dict, name: str, folder: Path) -> int:
    if not isinstance(value := config.get(name), int) or value < 1:
        raise BadInput(f"{folder}: its config.json does not say {name}")
    return value


def common_sizes(config: dict, encoder: dict[str, Tensor], eps: float, folder: Path, asked: dict) -> dict:
    dim, heads = needed(config, "hidden_size", folder), needed(config, "num_attention_heads", folder)
    if "blocks.0.fc1.weight" not in encoder or dim % heads:
        raise BadInput(f"{folder}: no layers in its weights, or a hidden_size that is no multiple of the heads")
    return {
        "dim": dim, "depth": depth_of(encoder, needed(config, "num_hidden_layers", folder), folder),
        "heads": choose("heads", heads, asked, heads, folder),
        "ffn": len(encoder["blocks.0.fc1.weight"]), "norm_eps": float(config.get("layer_norm_eps", eps)),
    }  # fmt: skip


def named_classes(config: dict, outputs: int, asked: dict, folder: Path) -> list[str]:
    """Of id2label; "0", "1", ... where it only numbers them."""
    labels = config.get("id2label") or {}
    names = asked.get("classes") or [str(labels.get(str(i), f"LABEL_{i}")) for i in range(outputs)]
    if len(names) != outputs:
        raise BadInput(f"{folder}: {outputs} outputs, but {len(names)} classes")
    return [str(i) for i in range(outputs)] if names == [f"LABEL_{i}" for i in range(outputs)] else names


def audio_model(folder: Path, config: dict, encoder: dict, rest: dict, asked: dict, notes: list) -> dict:
    kernels = sorted(
        (name for name in encoder if re.fullmatch(r"embed\.content\.convs\.\d+\.weight", name)),
        key=lambda name: int(name.split(".")[3]),
    )
    strides = config.get("conv_stride", [s for _, _, s in CONVS])
    if len(kernels) != len(strides) or not kernels or "embed.positions.0.weight" not in encoder:
        raise BadInput(f"{folder}: {len(kernels)} convolutions, {len(strides)} strides, or no convolution for positions")
    width, pos_depth = (
        encoder["embed.positions.0.weight"].shape,
        sum(name.startswith("embed.positions.") for name in encoder) // 2,
    )
    if width[-1] < 3:
        raise BadInput(f"{folder}: conv_pos_kernel_size {width[-1]}; at least 3 can be read")
    sizes = common_sizes(config, encoder, 1e-5, folder, asked)
    sizes |= spell_convs([(*encoder[name].shape[::2], int(stride)) for name, stride in zip(kernels, strides)])
    sizes |= {
        "pos_depth": pos_depth,
        "pos_width": width[-1] * pos_depth,
        "pos_groups": sizes["dim"] // width[1],
        "deep_norm": False,
    }
    new = {"student": under_encoder(encoder), "config": sizes}
    if (folder / "preprocessor_config.json").is_file() and read_json(folder / "preprocessor_config.json").get(
        "do_normalize"
    ) is False:
        notes.append("its recordings are not normalised to variance 1, ours are")
    if "lm_head.weight" in rest:
        out, bias = rest.pop("lm_head.weight"), rest.pop("lm_head.bias")
        classes, blank = letters(folder, config, len(out), asked), int(config.get("pad_token_id") or 0)
        if blank:  # ours is the first
            order = [blank, *(i for i in range(len(out)) if i != blank)]
            out, bias, classes = out[order], bias[order], [classes[i] for i in order]
            notes.append(f"output {blank}, the blank, became the first")
        new |= {"classes": classes, "goal": "letters"}
    elif (
        "projector.weight" in rest and "classifier.weight" in rest
    ):  # two linear maps and the mean over time: one map and the mean
        inner, inner_bias, out, bias = (
            rest.pop(f"{part}.{leaf}") for part in ("projector", "classifier") for leaf in ("weight", "bias")
        )
        out, bias = (out.double() @ inner.double()).float(), (out.double() @ inner_bias.double() + bias.double()).float()
        new |= {"classes": named_classes(config, len(out), asked, folder), "goal": "clips"}
    elif "classifier.weight" in rest:  # frame by frame
        out, bias = rest.pop("classifier.weight"), rest.pop("classifier.bias")
        new |= {"classes": named_classes(config, len(out), asked, folder), "goal": "sounds"}
    else:
        return new
    new["student"] |= {"out.weight": out, "out.bias": bias}
    return new


def letters(folder: Path, config: dict, outputs: int, asked: dict) -> list[str]:
    """The symbol of each output of a CTC model: of its tokenizer, else the released ones; the word boundary is "|"."""
    if "classes" in asked:
        names = asked["classes"]
    elif (folder / "vocab.json").is_file():
        table = read_json(folder / "vocab.json")
        places = {i: str(name) for name, i in table.items() if isinstance(i, int)}
        names = [places.get(i, f"<{i}>") for i in range(outputs)]
        about = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        delimiter = about.get("word_delimiter_token") or "|"
        names = ["|" if name == (delimiter if isinstance(delimiter, str) else "|") else name for name in names]
        upper = [name.upper() if len(name) == 1 else name for name in names]  # as our transcripts are
        names = upper if len(set(upper)) == len(set(names)) else names
    else:
        names = ["<pad>", "<s>", *LETTERS[2:]] if outputs == len(LETTERS) else [str(i) for i in range(outputs)]
    if len(names) != outputs:
        raise BadInput(f"{folder}: {outputs} outputs, but {len(names)} letters")
    return names


def text_model(folder: Path, config: dict, encoder: dict, rest: dict, asked: dict, notes: list) -> dict:
    if (pad := config.get("pad_token_id", 1)) != 1:
        raise BadInput(f"{folder}: pads with token {pad}; only RoBERTa's order of tokens can be read, with <pad> 1")
    if "embed.tokens.weight" not in encoder or "embed.positions.weight" not in encoder:
        raise BadInput(f"{folder}: no embeddings of tokens and positions in its weights")
    if (types := encoder.pop("embed.types.weight", None)) is not None:  # all of our tokens are of the first type
        if types[0].any():
            encoder["embed.tokens.weight"] = encoder["embed.tokens.weight"] + types[0]
        if types[1:].any():
            notes.append("left out: token types but the first")
    sizes = common_sizes(config, encoder, 1e-12, folder, asked) | {"max_tokens": len(encoder["embed.positions.weight"]) - 2}
    new = {"student": under_encoder(encoder), "config": sizes}
    if "classifier.out_proj.weight" in rest:
        for part, ours in (("dense", "dense"), ("out_proj", "out")):
            new["student"] |= {f"{ours}.{leaf}": rest.pop(f"classifier.{part}.{leaf}") for leaf in ("weight", "bias")}
        outputs = len(new["student"]["out.weight"])
        classes = named_classes(config, outputs, asked, folder)
        new |= {"classes": ["score"] if outputs == 1 else classes, "goal": "sentences"}
    else:
        sizes |= {"objective": "data2vec", "head_layers": head_layers({})}
    return new


def vision_model(folder: Path, config: dict, encoder: dict, rest: dict, asked: dict, notes: list) -> dict:
    if "embed.proj.weight" not in encoder or "embed.cls" not in encoder:
        raise BadInput(f"{folder}: no patch embedding or class token in its weights")
    encoder = {name: tensor.flatten() if name in ("embed.cls", "mask_embedding") else tensor for name, tensor in encoder.items()}
    encoder = gather_positions(encoder, folder)
    height, width = pair(config.get("image_size", 224))
    patch = encoder["embed.proj.weight"].shape[-2:]
    if patch[0] != patch[1] or height % patch[0] or width % patch[0]:
        raise BadInput(
            f"{folder}: patches of {patch[0]} x {patch[1]} in images of {height} x {width}; only squares that fill them are read"
        )
    grid, table = (height // patch[0], width // patch[0]), encoder.get("embed.table")
    if table is not None and grid[0] != grid[1]:
        if table.shape[-2] != (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3:
            raise BadInput(f"{folder}: {table.shape[-2]} relative positions are not those of {grid[0]} x {grid[1]} patches")
        encoder["embed.table"] = table = as_they_use(table, grid)
        notes.append(
            "images are not square: relative positions as transformers computes with them, sides swapped and interpolated"
        )
    sizes = common_sizes(config, encoder, 1e-12, folder, asked) | {
        "patch": patch[0], "image_size": height, "image_width": width if width != height else 0,
        "layer_scale": float(config.get("layer_scale_init_value", 0.1)) if "blocks.0.scale1" in encoder else 0.0,
        "relative": table is not None, "per_block": table is not None and table.ndim == 3,
        "learned_std": 0.02 if "embed.learned" in encoder else 0.0,
    }  # fmt: skip
    new = {"student": under_encoder(encoder), "config": sizes}
    about = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    if about.get("image_mean", MEAN) != MEAN or about.get("image_std", STD) != STD:
        notes.append(
            f"its pictures are normalised by {about.get('image_mean')}, {about.get('image_std')}, ours by ImageNet's mean and std"
        )
    if "classifier.weight" in rest:
        new["student"].pop("encoder.mask_embedding", None)
        mean = config.get("use_mean_pooling", True)
        for leaf in ("weight", "bias"):
            if f"pooler.layernorm.{leaf}" in rest and mean:
                new["student"][f"norm.{leaf}"] = rest.pop(f"pooler.layernorm.{leaf}")
            elif f"encoder.norm.{leaf}" in new["student"]:
                new["student"][f"norm.{leaf}"] = new["student"].pop(f"encoder.norm.{leaf}")
            new["student"][f"out.{leaf}"] = rest.pop(f"classifier.{leaf}")
        sizes["pool_cls"] = not mean
        new |= {"classes": named_classes(config, len(new["student"]["out.weight"]), asked, folder), "goal": "images"}
    return new


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def as_they_use(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """([L,] rows, H): a table of a grid that is not square, as the library (5.x) reads it: as if its sides were swapped, and
    then stretched bilinearly to what they are. For squares that is the table itself."""
    if table.ndim == 3:
        return torch.stack([as_they_use(one, grid) for one in table])
    height, width = 2 * grid[0] - 1, 2 * grid[1] - 1
    cells = table[:-3].reshape(1, width, height, -1).permute(0, 3, 1, 2)
    cells = torch.nn.functional.interpolate(cells, (height, width), mode="bilinear", align_corners=False)
    return torch.cat([cells.permute(0, 2, 3, 1).reshape(height * width, -1), table[-3:]])


# ---- ours -> theirs ----------------------------------------------------------------------------------------------------------

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of data/images.py, as decimal numbers


def write(state: dict, folder: Path, network: str = "student") -> list[str]:
    """A checkpoint of ours -> a new folder for from_pretrained(). Returns notes of what has no place in it. Raises BadInput."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: already there; choose a new folder")
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise BadInput("writing a folder of transformers takes the safetensors library; pip install safetensors") from None
    arch, weights, tuned = state["config"], state[network], "classes" in state
    if weights is None:
        raise BadInput("the checkpoint holds no teacher; take --network student")
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    head = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.")}
    make = vision_folder if "patch" in arch else audio_folder if "channels" in arch else text_folder
    kind, config, theirs, files, notes = make(state, encoder, head if tuned and network == "student" else {})
    names, prefix, recipe, more = KINDS[kind]
    names = {ours: name for name, ours in names.items()}
    body = {}
    for name, tensor in unfuse(encoder).items():
        if (new := translate(name, names)) is None:
            raise BadInput(f"{name}: has no place in a folder of transformers")
        body[(prefix if tuned else "") + new] = tensor
    theirs = {(prefix if tuned and name.startswith(INSIDE) else "") + name: tensor for name, tensor in theirs.items()}
    if left := sorted({name.split(".")[0] for name in head} - {"out", "norm", "dense"}):
        notes.append(f"left out: {', '.join(left)} (of pre-training)")
    if state.get("teacher") and network == "student":
        notes.append("left out: the teacher (--network teacher writes it instead)")
    kept = {name: arch[name] for name in (*(() if tuned else recipe), *more) if name in arch}
    kept |= {"task": state["finetune"]["task"]} if state.get("finetune", {}).get("task") else {}
    sizes = {
        "model_type": kind, "hidden_size": arch["dim"], "num_hidden_layers": arch["depth"], "num_attention_heads": arch["heads"],
        "intermediate_size": arch["ffn"], "hidden_act": "gelu", "dtype": "float32",
        "layer_norm_eps": arch.get("norm_eps", 1e-6 if "patch" in arch else 1e-5),
    }  # fmt: skip
    config = sizes | config | ({OURS: kept} if kept else {})
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file(
        {name: t.float().clone().contiguous() for name, t in (body | theirs).items()},
        part / "model.safetensors",
        {"format": "pt"},
    )
    for name, content in {"config.json": config, **files}.items():
        (part / name).write_text(
            content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8"
        )
    if folder.exists():
        folder.rmdir()
    os.replace(part, folder)
    return notes


INSIDE = ("embeddings.", "layernorm.", "pooler.")  # of what is not translated, this is the encoder's and not the head's


def unfuse(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one matrix of query, key and value becomes three; their biases have names like theirs; tables one a block."""
    new = {}
    for name, tensor in encoder.items():
        if name.endswith("attn.qkv.weight"):
            new |= {name.replace("qkv", part): weight for part, weight in zip("qkv", tensor.chunk(3))}
        elif name == "embed.table" and tensor.ndim == 3:
            new |= {f"embed.table.{l}": table for l, table in enumerate(tensor)}
        elif name in ("embed.cls", "mask_embedding") and "embed.cls" in encoder:
            new[name] = tensor[None, None]
        elif name == "embed.learned":  # theirs has one for the class token too
            new[name] = torch.cat([torch.zeros_like(tensor[:1]), tensor])[None]
        else:
            new[re.sub(r"attn\.([qkv])_bias", r"attn.\1.bias", name)] = tensor
    return new


def labels_of(classes: list[str]) -> dict:
    return {"id2label": {str(i): name for i, name in enumerate(classes)}, "label2id": {name: i for i, name in enumerate(classes)}}


def audio_folder(state: dict, encoder: dict, head: dict) -> tuple[str, dict, dict, dict, list[str]]:
    arch, classes, notes = state["config"], state.get("classes", []), []
    if arch.get("deep_norm"):
        raise BadInput("deep_norm: the transformers library has no Data2VecAudio with DeepNorm's residuals")
    convs = convolutions(arch["channels"], arch.get("convs") or [])
    config = {
        "conv_dim": [c for c, _, _ in convs], "conv_kernel": [k for _, k, _ in convs], "conv_stride": [s for _, _, s in convs],
        "conv_bias": False,
        "feat_extract_activation": "gelu", "num_feat_extract_layers": len(convs), "num_conv_pos_embeddings": arch["pos_depth"],
        "conv_pos_kernel_size": max(3, arch["pos_width"] // arch["pos_depth"]),
        "num_conv_pos_embedding_groups": arch["pos_groups"],
        "mask_time_prob": 0.05, "add_adapter": False, "use_weighted_layer_sum": False, "architectures": ["Data2VecAudioModel"],
    }  # fmt: skip
    files = {"preprocessor_config.json": {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": 16000, "padding_value": 0.0,
        "padding_side": "right", "do_normalize": True, "return_attention_mask": True,
    }}  # fmt: skip
    if not head:
        return "data2vec-audio", config, {}, files, notes
    goal = state.get("goal", "letters")
    if goal == "letters":
        config |= {"architectures": ["Data2VecAudioForCTC"], "vocab_size": len(classes), "pad_token_id": 0}
        config |= {"bos_token_id": None, "eos_token_id": None, "ctc_loss_reduction": "mean"}
        files["vocab.json"] = {name: i for i, name in enumerate(classes)}
        unknown = "<unk>" if "<unk>" in classes else classes[0]
        files["tokenizer_config.json"] = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": classes[0], "unk_token": unknown, "bos_token": None,
            "eos_token": None,
            "word_delimiter_token": "|", "do_lower_case": False, "replace_word_delimiter_char": " ",
        }  # fmt: skip
        files["preprocessor_config.json"]["processor_class"] = "Wav2Vec2Processor"
        return "data2vec-audio", config, {f"lm_head.{leaf}": head[f"out.{leaf}"] for leaf in ("weight", "bias")}, files, notes
    theirs = {f"classifier.{leaf}": head[f"out.{leaf}"] for leaf in ("weight", "bias")}
    if goal == "clips":  # through a first map that changes nothing
        config |= {"architectures": ["Data2VecAudioForSequenceClassification"], "classifier_proj_size": arch["dim"]}
        theirs |= {"projector.weight": torch.eye(arch["dim"]), "projector.bias": torch.zeros(arch["dim"])}
    else:
        config |= {"architectures": ["Data2VecAudioForAudioFrameClassification"]}
        notes.append("frame by frame: the pooling over time, sum p^2 / sum p, is yours to do")
    return "data2vec-audio", config | labels_of(classes), theirs, files, notes


def text_folder(state: dict, encoder: dict, head: dict) -> tuple[str, dict, dict, dict, list[str]]:
    arch, classes, dim, notes = state["config"], state.get("classes", []), state["config"]["dim"], []
    config = {
        "vocab_size": len(encoder["embed.tokens.weight"]), "max_position_embeddings": len(encoder["embed.positions.weight"]),
        "type_vocab_size": 1,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "architectures": ["Data2VecTextModel"],
    }  # fmt: skip
    theirs = {"embeddings.token_type_embeddings.weight": torch.zeros(1, dim)}
    if head:
        for part, ours in (("dense", "dense"), ("out_proj", "out")):
            theirs |= {f"classifier.{part}.{leaf}": head[f"{ours}.{leaf}"] for leaf in ("weight", "bias")}
        config |= {"architectures": ["Data2VecTextForSequenceClassification"]} | labels_of(classes)
        config |= {"problem_type": "regression"} if classes == ["score"] else {}
    else:
        theirs |= {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
        notes.append("pooler: not trained by data2vec; what AutoModel asks for is the identity")
    files = {}
    if "vocabulary" in state:
        files = tokenizer_files(state["vocabulary"], arch["max_tokens"])
        if "vocab.json" not in files:
            notes.append("no vocab.json and merges.txt: some pieces that others are merged of have no id")
    else:
        notes.append("no tokenizer: the checkpoint holds no vocabulary")
    return "data2vec-text", config, theirs, files, notes


def tokenizer_files(spelled: str, max_tokens: int) -> dict:
    """Our vocabulary as it is, and as vocab.json and merges.txt of RoBERTa's tokenizer unless ids are lacking."""
    from data import text

    vocabulary = text.Vocabulary.parse(spelled)
    files = {"vocab": spelled}
    letters = text.byte_letters()
    spell = {piece: "".join(letters[byte] for byte in piece) for piece in vocabulary.pieces}
    if text.UNK in vocabulary.pieces.values():
        return files
    rank = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    merges = [" ".join(spell[part] for part in halves(piece, rank)) for piece in rank if len(piece) > 1]
    names = {spell[piece]: i for piece, i in vocabulary.pieces.items()}
    names |= dict(zip((*text.SPECIAL, "<mask>"), vocabulary.special))
    taken = set(names.values())
    names |= {f"<unused{i}>": i for i in range(vocabulary.size) if i not in taken}
    special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), (*text.SPECIAL, "<mask>")))
    files["vocab.json"] = dict(sorted(names.items(), key=lambda item: item[1]))
    files["merges.txt"] = "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges)
    files["tokenizer_config.json"] = special | {
        "tokenizer_class": "RobertaTokenizer", "model_max_length": max_tokens, "add_prefix_space": False, "sep_token": "</s>",
        "cls_token": "<s>",
    }  # fmt: skip
    return files


def halves(piece: bytes, rank: dict[bytes, int]) -> list[bytes]:
    """The two pieces that a piece was merged of: what merging its bytes by the earlier ranks leaves."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def vision_folder(state: dict, encoder: dict, head: dict) -> tuple[str, dict, dict, dict, list[str]]:
    arch, notes = state["config"], []
    height, width = arch["image_size"], arch.get("image_width") or arch["image_size"]
    table = encoder.get("embed.table")
    if height != width and (table is not None or "embed.learned" in encoder):
        raise BadInput(
            f"images of {height} x {width}: the transformers library mixes up the sides of positions if images are not square"
        )
    config = {
        "image_size": height if height == width else [height, width], "patch_size": arch["patch"], "num_channels": 3,
        "use_mask_token": "mask_embedding" in encoder, "use_absolute_position_embeddings": "embed.learned" in encoder,
        "use_relative_position_bias": table is not None and table.ndim == 3,
        "use_shared_relative_position_bias": table is not None and table.ndim == 2,
        "use_mean_pooling": bool(head) and not arch.get("pool_cls", False),
        "layer_scale_init_value": arch["layer_scale"] if "blocks.0.scale1" in encoder else 0.0,
        "architectures": ["Data2VecVisionModel"],
        "out_indices": [arch["depth"]], "drop_path_rate": 0.1,
    }  # fmt: skip
    files = {"preprocessor_config.json": {
        "image_processor_type": "BeitImageProcessor", "do_resize": True, "size": {"height": height, "width": width},
        "resample": 3,
        "do_center_crop": False, "crop_size": {"height": height, "width": width}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD, "do_reduce_labels": False,
    }}  # fmt: skip
    if not head:
        return "data2vec-vision", config, {}, files, notes
    norm = "layernorm" if arch.get("pool_cls") else "pooler.layernorm"
    theirs = {f"{norm}.{leaf}": head[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    theirs |= {f"classifier.{leaf}": head[f"out.{leaf}"] for leaf in ("weight", "bias")}
    config |= {"architectures": ["Data2VecVisionForImageClassification"]} | labels_of(state["classes"])
    return "data2vec-vision", config, theirs, files, notes

"""The checkpoints that were released with data2vec: their names for weights and options, and ours.

Speech and text come from fairseq (.pt: `model` with an `_ema` entry, options in `cfg` or, before, `args`; a fine-tuned speech
model wears its wrapper's prefix), vision from BEiT's scripts (.pth: `model` and `model_ema`, or `module` after DeepSpeed).
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from common import BadInput
from model import CONVS, relative_index
from tools.unpickle import plain, tensors

# ---- names: pattern of theirs -> ours -----------------------------------------------------------------------------------

VISION = {
    r"cls_token": "embed.cls",
    r"mask_token": "mask_embedding",
    r"pos_embed": "embed.learned",
    r"patch_embed\.proj\.(weight|bias)": r"embed.proj.\1",
    r"rel_pos_bias\.relative_position_bias_table": "embed.table",
    r"blocks\.(\d+)\.attn\.relative_position_bias_table": r"embed.table.\1",
    r"blocks\.(\d+)\.gamma_([12])": r"blocks.\1.scale\2",
    r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"blocks.\1.norm\2.\3",
    r"blocks\.(\d+)\.attn\.([qv])_bias": r"blocks.\1.attn.\2_bias",
    r"blocks\.(\d+)\.attn\.qkv\.weight": r"blocks.\1.attn.qkv.weight",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"blocks.\1.attn.out.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)": r"blocks.\1.fc\2.\3",
    r"norm\.(weight|bias)": r"norm.\1",
}
VISION_HEAD = {r"lm_head\.(weight|bias)": r"\1"}  # regression head of pre-training
VISION_CLASSIFIER = {r"fc_norm\.(weight|bias)": r"norm.\1", r"head\.(weight|bias)": r"out.\1"}
VISION_UNUSED = r".*relative_position_index"  # tells the grid, and is recomputed from it

SPEECH = {
    r"mask_emb": "mask_embedding",
    r"feature_extractor\.conv_layers\.(\d+)\.0\.weight": r"embed.content.convs.\1.weight",
    r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)": r"embed.content.norms.\1.\2",
    r"layer_norm\.(weight|bias)": r"embed.content.norm.\1",
    r"post_extract_proj\.(weight|bias)": r"embed.content.proj.\1",
    r"encoder\.pos_conv\.(\d+)\.0\.(weight|bias)": r"embed.positions.\1.\2",
    r"encoder\.layer_norm\.(weight|bias)": r"embed.norm.\1",
}
POST_NORM = {  # the layers of speech and text alike
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight": r"blocks.\1.attn.\2.weight",
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias": r"blocks.\1.attn.\2_bias",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)": r"blocks.\1.attn.out.\2",
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"encoder\.layers\.(\d+)\.fc([12])\.(weight|bias)": r"blocks.\1.fc\2.\3",
    r"encoder\.layers\.(\d+)\.final_layer_norm\.(weight|bias)": r"blocks.\1.norm2.\2",
}
SPEECH_HEAD = {
    r"final_proj\.(?:0\.)?(weight|bias)": r"head.\1",
    r"proj\.(weight|bias)": r"out.\1",
}  # of pre-training; of fine-tuning

TEXT = {
    r"encoder\.embed_(tokens|positions)\.weight": r"embed.\1.weight",
    r"encoder\.layernorm_embedding\.(weight|bias)": r"embed.norm.\1",
}
TEXT_HEAD = {
    r"encoder\.regression_head\.(\d+)\.(weight|bias)": r"head.\1.\2",
    r"classification_heads\.[^.]+\.dense\.(weight|bias)": r"dense.\1",
    r"classification_heads\.[^.]+\.out_proj\.(weight|bias)": r"out.\1",
}
TEXT_UNUSED = r"(.*\.)?version|encoder\.lm_head\..*"  # a marker of fairseq's; RoBERTa's head for words, if one was kept

LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # outputs of the released speech models


def rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The tensors whose name matches a pattern of `table`, under their new names. Raises BadInput if two get the same."""
    new = {}
    for name, tensor in state.items():
        for pattern, ours in table.items():
            if match := re.fullmatch(pattern, name):
                if (mine := match.expand(ours)) in new:
                    raise BadInput(f"{name}: a second weight for {mine}; which of the two is meant?")
                new[mine] = tensor.flatten() if ours in ("embed.cls", "mask_embedding") else tensor
    return new


def account(state: dict[str, Tensor], known, path, what: str, inside: str = "") -> None:
    """Raises BadInput that lists the names which, without `inside`, no pattern of `known` matches."""
    if strange := [name for name in state if not any(re.fullmatch(pattern, name.replace(inside, "")) for pattern in known)]:
        raise BadInput(f"{path}: {what} with unknown weights: {', '.join(strange[:5])}{' and more' * (len(strange) > 5)}")


def fuse(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value matrices of a layer become one."""
    new = dict(encoder)
    for name in encoder:
        stem = name.removesuffix("q.weight")
        if name.endswith("attn.q.weight") and all(f"{stem}{part}.weight" in encoder for part in "qkv"):
            new[stem + "qkv.weight"] = torch.cat([new.pop(f"{stem}{part}.weight") for part in "qkv"])
    return new


def gather_positions(encoder: dict[str, Tensor], path) -> dict[str, Tensor]:
    """Vision: the blocks' own tables become one of (L, rows, H); the class token takes its learned position, so none is lost."""
    new = dict(encoder)
    if own := sorted((name for name in encoder if name.startswith("embed.table.")), key=lambda name: int(name.split(".")[2])):
        if len(own) != depth_of(encoder):
            raise BadInput(f"{path}: some blocks have their own relative positions ({name_of(own[0])}) and some have none")
        shared = new.pop("embed.table", 0)  # beside those, a table for all adds to each
        new["embed.table"] = torch.stack([new.pop(name) + shared for name in own])
    if "embed.learned" in new and new["embed.learned"].ndim == 3:
        first, new["embed.learned"] = new["embed.learned"][0, 0], new["embed.learned"][0, 1:]
        new["embed.cls"] = new["embed.cls"] + first if first.any() else new["embed.cls"]
    return new


def name_of(table: str) -> str:
    return f"blocks.{table.split('.')[2]}.attn.relative_position_bias_table"


def depth_of(encoder: dict[str, Tensor], said=None, path="") -> int:
    """Number of blocks. Raises BadInput if the file says (an int, or None) that there are others."""
    depth = 1 + max((int(name.split(".")[1]) for name in encoder if name.startswith("blocks.")), default=-1)
    if isinstance(said, int) and said != depth:
        raise BadInput(f"{path}: says that it has {said} layers, but holds weights of {depth}")
    return depth


def under_encoder(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"encoder.{name}": tensor for name, tensor in encoder.items()}


# ---- weights: {"student", "teacher" or None[, "classes"]} ------------------------------------------------------------------


def from_released_vision(file: dict, path: str = "released checkpoint") -> dict:
    """{"model": ..., "model_ema": ...} with the released names -> {"student", "teacher"[, "classes"]}.

    student  encoder.* and head.* (pre-trained), or encoder.*, norm.* and out.* of a classifier (fine-tuned: such a file
             has no mask token and no final norm, and does not name its classes: they become "0", "1", ...)
    teacher  encoder.*, or None
    """
    model, ema = file.get("model", file), file.get("model_ema")
    known = [*VISION, *VISION_HEAD, *VISION_CLASSIFIER, VISION_UNUSED]
    account(model | (ema or {}), known, path, "released vision checkpoint")
    new = {"student": under_encoder(gather_positions(rename(model, VISION), path)), "teacher": None}
    if "head.weight" in model:
        new["student"] |= rename(model, VISION_CLASSIFIER)
        if "norm.weight" in model and "fc_norm.weight" not in model:  # of the class token, not of the mean
            new["student"] |= {f"norm.{leaf}": new["student"].pop(f"encoder.norm.{leaf}") for leaf in ("weight", "bias")}
        new["classes"] = [str(i) for i in range(len(model["head.weight"]))]
        new["student"].pop("encoder.mask_embedding", None)
    else:
        new["student"] |= {f"head.{name}": tensor for name, tensor in rename(model, VISION_HEAD).items()}
    if ema:
        new["teacher"] = under_encoder(gather_positions(rename(ema, VISION), path))
    return new


def from_released_speech(
    model: dict[str, Tensor], ema: dict[str, Tensor] | None = None, path: str = "released checkpoint"
) -> dict:
    """Released names -> {"student", "teacher"}; the teacher's content (convolutions, projection) is the student's."""
    account(model, [*SPEECH, *POST_NORM, *SPEECH_HEAD], path, "released speech checkpoint")
    encoder = fuse(rename(model, SPEECH | POST_NORM))
    student = under_encoder(encoder) | rename(model, SPEECH_HEAD)
    if ema is None:
        return {"student": student, "teacher": None}
    shared = {name: tensor for name, tensor in encoder.items() if not name.startswith("blocks.")}
    if not any(name.startswith("encoder.") for name in ema):  # the Transformer alone was averaged
        ema = {f"encoder.{name}": tensor for name, tensor in ema.items()}
    account(
        ema, [*SPEECH, *POST_NORM, *SPEECH_HEAD], path, "teacher of a released speech checkpoint"
    )  # a head is not averaged by us
    return {"student": student, "teacher": under_encoder(shared | fuse(rename(ema, SPEECH | POST_NORM)))}


def from_released_text(model: dict[str, Tensor], ema: dict[str, Tensor] | None = None, path: str = "released checkpoint") -> dict:
    """Released names (encoder.sentence_encoder.*, encoder.regression_head.*; the teacher's without prefix) -> as for speech."""
    inner = {name.replace("sentence_encoder.", ""): tensor for name, tensor in model.items()}
    account(model, [*TEXT, *POST_NORM, *TEXT_HEAD, TEXT_UNUSED], path, "released text checkpoint", inside="sentence_encoder.")
    encoder = fuse(rename(inner, TEXT | POST_NORM))
    student = under_encoder(encoder) | rename(inner, TEXT_HEAD)
    if "head.2.weight" not in student:  # one layer alone is no Sequential here
        student = {name.replace("head.0.", "head."): tensor for name, tensor in student.items()}
    if "out.weight" in student:  # fine-tuned: the head of pre-training has served
        student = {name: tensor for name, tensor in student.items() if not name.startswith("head.")}
    if ema is None:
        return {"student": student, "teacher": None}
    shared = {name: tensor for name, tensor in encoder.items() if not name.startswith("blocks.")}
    if not any(name.startswith("encoder.") for name in ema):
        ema = {f"encoder.{name}": tensor for name, tensor in ema.items()}
    ema = {name.replace("sentence_encoder.", ""): tensor for name, tensor in ema.items()}
    account(ema, [*TEXT, *POST_NORM, TEXT_UNUSED], path, "teacher of a released text checkpoint")
    return {"student": student, "teacher": under_encoder(shared | fuse(rename(ema, TEXT | POST_NORM)))}


# ---- options: what the weights tell, what the file says, what the user says, the released recipe -----------------------------


def choose(name: str, said, asked: dict, recipe, path):
    """The value of an option. Raises BadInput if the user (`asked`) contradicts the file (`said`, or None)."""
    number = isinstance(recipe, (int, float))
    said = type(recipe)(said) if isinstance(said, (int, float) if number else type(recipe)) else None
    if said is not None and asked.get(name, said) != said:
        raise BadInput(f"{path}: says {name} {said}; leave --{name} {asked[name]} away")
    return said if said is not None else asked.get(name, recipe)


def norms_said(options: dict, layer: tuple[str, str], mean: tuple[str, str]) -> tuple[str | None, str | None]:
    """Which normalisation the file's flags (instance norm, layer norm) ask of each layer and of the mean; None if it has none."""

    def of(instance, layer):
        if instance not in options and layer not in options:
            return None
        return "instance" if options.get(instance) else "layer" if options.get(layer) else "none"

    return of(*layer), of(*mean)


def targets(options: dict, asked: dict, recipe: dict, depth: int, path) -> dict:
    """K, normalisation, loss and tau of a pre-trained file; `options` under our names as far as it says them."""
    chosen = {name: choose(name, options.get(name), asked, value, path) for name, value in recipe.items()}
    return chosen | {"top_k": min(chosen["top_k"], depth)}


SPEECH_RECIPE = {
    "target": "ffn", "top_k": 8, "norm": "instance", "final_norm": "none", "beta": 0.0, "tau_0": 0.999, "tau_e": 0.9999,
    "tau_n": 30_000,
    "mask_p": 0.65, "mask_span": 10,
}  # fmt: skip
TEXT_RECIPE = {
    "target": "ffn", "top_k": 10, "norm": "layer", "final_norm": "none", "beta": 4.0, "tau_0": 0.999, "tau_e": 0.9999,
    "tau_n": 100_000,
    "mask_p": 0.15, "mask_span": 1,
}  # fmt: skip
VISION_RECIPE = {
    "target": "block", "top_k": 6, "norm": "layer", "final_norm": "layer", "beta": 2.0, "tau_0": 0.9998, "tau_e": 0.9998,
    "tau_n": 0,
    "mask_ratio": 0.6, "mask_block": 16,
}  # fmt: skip


def fairseq_options(file: dict) -> tuple[dict, dict]:
    """The model's and the task's options of a fairseq file, each in one table, in whichever form they are kept.

    A fine-tuned model keeps those of the pre-trained one inside (w2v_args); they say how the encoder is built.
    """
    if file.get("cfg") is not None:
        cfg = resolve(plain(file["cfg"]))
        model, task = (cfg.get(part) if isinstance(cfg, dict) else None for part in ("model", "task"))
        model, task = (x if isinstance(x, dict) else {} for x in (model, task))
    else:
        model = plain(file.get("args"))
        model = model if isinstance(model, dict) else {}
        task = {"_name": model.get("task")}
    inner = model.get("w2v_args")
    if isinstance(inner, dict):
        model = model | (inner["model"] if isinstance(inner.get("model"), dict) else inner)
    transformer = model.get("transformer")
    if isinstance(transformer, dict) and isinstance(transformer.get("encoder"), dict):  # text, cfg form
        model = model | {f"encoder_{name}": value for name, value in transformer["encoder"].items()}
    return model, task


def resolve(cfg):
    """omegaconf's references, such as "${optimization.max_update}" for a model's option, become what they refer to."""

    def at(name):
        value = cfg
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def walk(value):
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        return at(value[2:-1]) if isinstance(value, str) and re.fullmatch(r"\$\{[\w.]+\}", value) else value

    return walk(cfg)


def under_our_names(options: dict) -> dict:
    """fairseq's names for targets, loss and tau."""
    theirs = {
        "top_k": "average_top_k_layers", "beta": "loss_beta", "tau_0": "ema_decay", "tau_e": "ema_end_decay",
        "tau_n": "ema_anneal_end_step",
        "mask_p": "mask_prob", "mask_span": "mask_length",
    }  # fmt: skip
    said = {ours: options.get(name) for ours, name in theirs.items()}
    said["norm"], said["final_norm"] = norms_said(
        options, ("instance_norm_target_layer", "layer_norm_target_layer"), ("instance_norm_targets", "layer_norm_targets")
    )
    return said


def speech_config(encoder: dict[str, Tensor], options: dict, asked: dict, path) -> dict:
    """Our Config's keys for a speech encoder under our names (without "encoder."). Strides and heads are not in the weights."""
    needed = ("embed.content.convs.0.weight", "embed.positions.0.weight", "blocks.0.fc1.weight", "embed.content.proj.weight")
    if lacking := [name for name in needed if name not in encoder]:
        raise BadInput(f"{path}: its sizes cannot be told without {', '.join(lacking)} (our names)")
    convs = [encoder[f"embed.content.convs.{i}.weight"].shape for i in range(count(encoder, "embed.content.convs."))]
    layers = choose("convs", options.get("conv_feature_layers"), asked, "", path)
    strides = strides_of(layers, len(convs)) if layers else [s for _, _, s in CONVS]
    if strides is None:
        raise BadInput(f"{path}: its convolutions are said to be {layers[:80]}, and are not")
    if len(strides) != len(convs):
        raise BadInput(f"{path}: {len(convs)} convolutions, and their strides are not said; give them as --convs")
    position, pos_depth = encoder["embed.positions.0.weight"], count(encoder, "embed.positions.")
    dim = len(encoder["embed.content.proj.weight"])
    return spell_convs([(c, k, s) for (c, _, k), s in zip(convs, strides)]) | {
        "dim": dim, "depth": depth_of(encoder, options.get("encoder_layers"), path),
        "heads": choose("heads", options.get("encoder_attention_heads"), asked, max(1, dim // 64), path),
        "ffn": len(encoder["blocks.0.fc1.weight"]), "pos_depth": pos_depth, "pos_width": position.shape[-1] * pos_depth,
        "pos_groups": dim // position.shape[1], "norm_eps": 1e-5, "deep_norm": False,
    }  # fmt: skip


def spell_convs(convs: list[tuple[int, int, int]]) -> dict:
    """(channels, kernel, stride) of each layer -> our Config's `channels` and `convs`."""
    usual = [(convs[0][0], k, s) for _, k, s in CONVS]
    return {"channels": convs[0][0], "convs": [] if convs == usual else [",".join(map(str, conv)) for conv in convs]}


def strides_of(layers: str, number: int) -> list[int] | None:
    """Of fairseq's text such as "[(512,10,5)] + [(512,3,2)]*4", which is not run; None if it is not of so many layers."""
    strides = []
    for part in layers.split("+"):
        times = re.search(r"\*\s*(\d{1,3})\s*$|^\s*(\d{1,3})\s*\*", part)
        strides += [int(s) for s in re.findall(r"\(\s*\d+\s*,\s*\d+\s*,\s*(\d+)\s*\)", part)] * int(
            (times[1] or times[2]) if times else 1
        )
    return strides if len(strides) == number else None


def count(encoder: dict[str, Tensor], stem: str) -> int:
    return len({name[len(stem) :].split(".")[0] for name in encoder if name.startswith(stem)})


def text_config(encoder: dict[str, Tensor], options: dict, asked: dict, path, pad: int = 1) -> dict:
    needed = ("embed.tokens.weight", "embed.positions.weight", "blocks.0.fc1.weight")
    if lacking := [name for name in needed if name not in encoder]:
        raise BadInput(f"{path}: its sizes cannot be told without {', '.join(lacking)} (our names)")
    dim = encoder["embed.tokens.weight"].shape[1]
    return {
        "max_tokens": len(encoder["embed.positions.weight"]) - pad - 1, "dim": dim,
        "depth": depth_of(encoder, options.get("encoder_layers"), path),
        "heads": choose("heads", options.get("encoder_attention_heads"), asked, max(1, dim // 64), path),
        "ffn": len(encoder["blocks.0.fc1.weight"]), "norm_eps": 1e-5,
    }  # fmt: skip


def vision_grid(rows: int, index: Tensor | None) -> tuple[int, int] | None:
    """(H, W) in patches of a model with so many relative positions; None if that cannot be told.

    index  the file's own relative_index, (1 + H * W, 1 + H * W); without it, or if it is damaged, only a square is known
    """
    side = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    patches = side * side if index is None else len(index) - 1
    for height in range(1, patches + 1):
        width = patches // height
        if height * width == patches and (2 * height - 1) * (2 * width - 1) + 3 == rows:
            if height == width or index is not None and torch.equal(index, relative_index(height, width)):
                return height, width
    return None


def vision_config(encoder: dict[str, Tensor], index: Tensor | None, path: str, options: dict = {}, asked: dict = {}) -> dict:
    """Sizes of a vision encoder, from its renamed weights and relative_position_index. Raises BadInput if they do not tell."""
    needed = ("embed.proj.weight", "blocks.0.fc1.weight") + ("embed.table",) * (index is not None)
    if lacking := [name for name in needed if name not in encoder]:
        raise BadInput(f"{path}: its sizes cannot be told without {', '.join(lacking)} (our names)")
    table, proj = encoder.get("embed.table"), encoder["embed.proj.weight"]
    patch, depth, dim = proj.shape[-1], depth_of(encoder), len(proj)
    if table is not None:
        if not (grid := vision_grid(table.shape[-2], index)):
            raise BadInput(
                f"{path}: {table.shape[-2]} relative positions are not those of a square image, and no index in it fits them"
            )
    elif "embed.learned" in encoder:
        grid = (math.isqrt(len(encoder["embed.learned"])),) * 2
        if grid[0] ** 2 != len(encoder["embed.learned"]):
            raise BadInput(f"{path}: {len(encoder['embed.learned'])} learned positions are not those of a square image")
    else:
        grid = (choose("image_size", options.get("input_size"), asked, 224, path) // patch,) * 2
    heads = table.shape[-1] if table is not None else choose("heads", options.get("heads"), asked, max(1, dim // 64), path)
    return {
        "patch": patch, "dim": dim, "heads": heads, "image_size": grid[0] * patch,
        "image_width": grid[1] * patch if grid[0] != grid[1] else 0, "depth": depth, "ffn": len(encoder["blocks.0.fc1.weight"]),
        "layer_scale": 1e-4 if "blocks.0.scale1" in encoder else 0.0, "relative": table is not None,
        "per_block": table is not None and table.ndim == 3, "learned_std": 0.02 if "embed.learned" in encoder else 0.0,
        "norm_eps": 1e-6,
    }  # fmt: skip


def vision_targets(options: dict) -> dict:
    """BEiT's script's options under our names."""
    said = {"beta": 0.0 if options.get("l2_loss") else options.get("l1_beta"), "tau_e": options.get("ema_decay")}
    said["tau_0"], said["target"] = said["tau_e"], {"end": "block", "fc": "ffn"}.get(options.get("layer_results"))
    if layers := re.findall(r"\d+", str(options.get("target_layers") or "")):
        said["top_k"] = len(layers)
    if "no_target_layer_norm_last" in options:
        options = options | {"target_layer_norm_last": not options["no_target_layer_norm_last"]}
    said["norm"], said["final_norm"] = norms_said(
        options, ("target_instance_norm", "target_layer_norm_last"), ("post_target_instance_norm", "post_target_layer_norm")
    )
    return said | {"mask_block": options.get("min_mask_patches_per_block")}


# ---- a whole file ------------------------------------------------------------------------------------------------------------


def split(file: dict, path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, str]:
    """A file -> weights, the teacher's or None, and in which entry the weights were (model, module, or the file itself)."""
    where = next((name for name in ("model", "module", "state_dict") if isinstance(file.get(name), dict)), "")
    weights = dict(file[where] if where else file)
    ema = file.get("model_ema") if where else None
    if isinstance(ema, dict) and isinstance(ema.get("state_dict_ema"), dict):
        ema = ema["state_dict_ema"]
    for name in [name for name in weights if str(name).split(".")[-1] == "_ema"]:  # fairseq keeps it among the weights
        ema = weights.pop(name)
    nested = {str(name).split("_ema.", 1)[1]: name for name in weights if re.match(r"(.*\.)?_ema\.", str(name))}
    if nested:
        ema = {inner: weights.pop(name) for inner, name in nested.items()}
    return unwrap(tensors(weights, path)), unwrap(tensors(ema, path, "teacher")) if ema else None, where


def unwrap(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of a distributed wrapper."""
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()} if wrapped else weights


def from_released(file: dict, path: str, asked: dict) -> dict | None:
    """A file of the released kinds -> {"student", "teacher", "config", ...}; None if it is none of them. Raises BadInput."""
    where = next((name for name in ("model", "module", "state_dict") if isinstance(file.get(name), dict)), "")
    names = [str(name) for name in (file[where] if where else file)]
    if any(name.endswith("patch_embed.proj.weight") for name in names):
        return vision_file(file, path, asked)
    if any(name.endswith("feature_extractor.conv_layers.0.0.weight") for name in names):
        return speech_file(file, path, asked)
    if any(name.endswith("coder.sentence_encoder.embed_tokens.weight") for name in names):
        return text_file(file, path, asked)
    return None


def vision_file(file: dict, path: str, asked: dict) -> dict:
    weights, ema, where = split(file, path)
    options = plain(file.get("args")) or {}
    new = from_released_vision({"model": weights, "model_ema": ema}, path)
    index = next((tensor for name, tensor in weights.items() if re.fullmatch(VISION_UNUSED, name)), None)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in new["student"].items()}
    new["config"] = vision_config(encoder, index, path, options if isinstance(options, dict) else {}, asked)
    tuned = "classes" in new
    if tuned:
        new["goal"] = "images"
        new["config"]["pool_cls"] = "fc_norm.weight" not in weights
    else:
        said = vision_targets(options if isinstance(options, dict) else {})
        new["config"] |= targets(said, asked, VISION_RECIPE, new["config"]["depth"], path)
    kind = "fine-tuned" if tuned else "pre-trained"
    return new | {"origin": f"released vision checkpoint, {kind} (weights in {where or 'the file itself'})"}


def speech_file(file: dict, path: str, asked: dict) -> dict:
    weights, ema, _ = split(file, path)
    marker = next(name for name in weights if name.endswith("feature_extractor.conv_layers.0.0.weight"))
    prefix = marker.removesuffix("feature_extractor.conv_layers.0.0.weight")
    if prefix:  # of the wrapper that fine-tunes: its own head is one level up
        outer = prefix.removesuffix("w2v_model.")
        weights = {name.removeprefix(prefix).removeprefix(outer): tensor for name, tensor in weights.items()}
    new, (options, task) = from_released_speech(weights, ema, path), fairseq_options(file)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in new["student"].items()}
    new["config"] = speech_config(encoder, options, asked, path)
    if tuned := "out.weight" in new["student"]:
        outputs, sounds = len(new["student"]["out.weight"]), "classification" in str(task.get("_name"))
        new["goal"] = "sounds" if sounds else "letters"
        new["classes"] = (
            asked.get("classes") or dictionary_of(file) or (LETTERS if outputs == len(LETTERS) and not sounds else None)
        )
        new["classes"] = new["classes"] or [str(i) for i in range(outputs)]
        new["student"] = {name: tensor for name, tensor in new["student"].items() if not name.startswith("head.")}
        if len(new["classes"]) != outputs:
            raise BadInput(
                f"{path}: {outputs} outputs, but {len(new['classes'])} classes; give the list that it was trained with"
            )
    else:
        said = under_our_names(options) | {"target": None}
        new["config"] |= targets(said, asked, SPEECH_RECIPE, new["config"]["depth"], path)
        new["config"]["share_positions"] = not (ema and any("pos_conv" in name for name in ema))
    return new | {
        "origin": f"released speech checkpoint (fairseq, {form(file)}), "
        + (f"fine-tuned for {new['goal']}" if tuned else "pre-trained")
    }


def text_file(file: dict, path: str, asked: dict) -> dict:
    weights, ema, _ = split(file, path)
    marker = next(name for name in weights if name.endswith("coder.sentence_encoder.embed_tokens.weight"))
    prefix = marker[: -len("encoder.sentence_encoder.embed_tokens.weight")]
    weights = newer_names({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    if inside := {name.split("target_model.", 1)[1]: name for name in weights if name.startswith("encoder.target_model.")}:
        ema = {name: weights.pop(whole) for name, whole in inside.items()}  # the teacher, in files older than `_ema`
    new, (options, _) = from_released_text(weights, ema and newer_names(ema), path), fairseq_options(file)
    if any(name.startswith("encoder.lm_head.") for name in weights):
        new["notes"] = ["left out: lm_head, which predicts words"]
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in new["student"].items()}
    new["config"] = text_config(encoder, options, asked, path)
    if tuned := "out.weight" in new["student"]:
        new["goal"], outputs = "sentences", len(new["student"]["out.weight"])
        new["classes"] = asked.get("classes") or (["score"] if outputs == 1 else [str(i) for i in range(outputs)])
        if len(new["classes"]) != outputs:
            raise BadInput(f"{path}: {outputs} outputs, but {len(new['classes'])} classes")
    else:
        new["config"] |= targets(under_our_names(options), asked, TEXT_RECIPE, new["config"]["depth"], path)
        new["config"] |= {"objective": "data2vec", "head_layers": head_layers(new["student"])}
    return new | {
        "origin": f"released text checkpoint (fairseq, {form(file)}), {'fine-tuned for sentences' if tuned else 'pre-trained'}"
    }


def newer_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the first versions of fairseq's text models, and its one matrix for query, key and value, as they are now."""
    new = {}
    for name, tensor in weights.items():
        name = re.sub(r"^decoder\.", "encoder.", name).replace(".emb_layer_norm.", ".layernorm_embedding.")
        name = re.sub(r"^encoder\.lm_head\.(\d+)\.", r"encoder.regression_head.\1.", name)
        if match := re.fullmatch(r"(.*self_attn\.)in_proj_(weight|bias)", name):
            new |= {f"{match[1]}{part}_proj.{match[2]}": third for part, third in zip("qkv", tensor.chunk(3))}
        else:
            new[name] = tensor
    return new


def head_layers(student: dict[str, Tensor]) -> int:
    """Linear layers of a regression head; 2, the released one's, if there is none."""
    return sum(name.startswith("head.") and name.endswith("weight") for name in student) or 2


def form(file: dict) -> str:
    return "cfg" if file.get("cfg") is not None else "args" if file.get("args") is not None else "no options"


def dictionary_of(file: dict) -> list[str] | None:
    """The letters of a CTC model, if the file keeps fairseq's dictionary with its task."""
    task = plain(file.get("task_state"))
    dictionary = task.get("target_dictionary") if isinstance(task, dict) else None
    symbols = dictionary.get("symbols") if isinstance(dictionary, dict) else None
    return [str(symbol) for symbol in symbols] if isinstance(symbols, list) else None


def letters_of_file(path: Path) -> list[str]:
    """fairseq's dict.ltr.txt: a line `letter count` for each, after its four special symbols. Raises BadInput."""
    try:
        return LETTERS[:4] + [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None

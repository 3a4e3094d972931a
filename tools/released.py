"""The checkpoints that were released with data2vec: read safely, their names and options become ours.

Speech and text are fairseq's (.pt: "model" with an "_ema" entry, options in "cfg" or "args"; a fine-tuned
speech model is wrapped), vision is from BEiT's scripts (.pth: "model" and "model_ema", or "module").
"""

import math
import re
import unicodedata
import warnings

import torch

from common import UserError, require


class Foreign:
    """Stands for any class or function that a file names: keeps the state of an object, does nothing."""

    state = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


def load(path) -> dict:
    """What torch.save wrote. Nothing in it is run: what is no tensor or plain container becomes a Foreign."""
    stand_ins = []
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")  # the error says it
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
            reason = " ".join(str(error).split("WeightsUnpickler error: ")[-1].split())
        unknown = re.match(r"Unsupported global: GLOBAL (\S+) was not an allowed", reason)
        if unknown is None or len(stand_ins) > 500:
            raise UserError(f"{path}: missing, damaged, or not safe to read ({reason:.150})")
        name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
        stand_ins.append((type(name, (Foreign,), {}), name))


# names: theirs -> ours; {} is the first number in a name
POST_NORM = {
    "layers.{}.self_attn.q_proj": "blocks.{}.attn.q", "layers.{}.self_attn.k_proj": "blocks.{}.attn.k",
    "layers.{}.self_attn.v_proj": "blocks.{}.attn.v", "layers.{}.self_attn.out_proj": "blocks.{}.attn.out",
    "layers.{}.self_attn_layer_norm": "blocks.{}.norm1", "layers.{}.final_layer_norm": "blocks.{}.norm2",
    "layers.{}.fc1": "blocks.{}.fc1", "layers.{}.fc2": "blocks.{}.fc2",
}  # fmt: skip
VISION = {
    "cls_token": "embed.cls", "mask_token": "mask_embedding", "pos_embed": "embed.learned",
    "patch_embed.proj": "embed.proj", "rel_pos_bias.relative_position_bias_table": "embed.table",
    "blocks.{}.attn.relative_position_bias_table": "embed.table.{}",
    "blocks.{}.attn.q_bias": "blocks.{}.attn.q_bias", "blocks.{}.attn.v_bias": "blocks.{}.attn.v_bias",
    "blocks.{}.attn.qkv": "blocks.{}.attn.qkv", "blocks.{}.attn.proj": "blocks.{}.attn.out",
    "blocks.{}.gamma_1": "blocks.{}.scale1", "blocks.{}.gamma_2": "blocks.{}.scale2",
    "blocks.{}.norm1": "blocks.{}.norm1", "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.mlp.fc1": "blocks.{}.fc1", "blocks.{}.mlp.fc2": "blocks.{}.fc2", "norm": "norm",
}  # fmt: skip
SPEECH = {
    "mask_emb": "mask_embedding", "feature_extractor.conv_layers.{}.0": "embed.content.convs.{}",
    "feature_extractor.conv_layers.{}.2.1": "embed.content.norms.{}", "layer_norm": "embed.content.norm",
    "post_extract_proj": "embed.content.proj", "encoder.pos_conv.{}.0": "embed.positions.{}",
    "encoder.layer_norm": "embed.norm", **{f"encoder.{name}": ours for name, ours in POST_NORM.items()},
}  # fmt: skip
TEXT = POST_NORM | {"embed_tokens": "embed.tokens", "embed_positions": "embed.positions"}
TEXT |= {"layernorm_embedding": "embed.norm"}
VISION_HEAD = {"lm_head": "head", "fc_norm": "norm", "head": "out"}  # of pre-training, of fine-tuning
SPEECH_HEAD = {"final_proj": "head", "final_proj.{}": "head", "proj": "out"}
TEXT_HEAD = {"regression_head.{}": "head.{}", "lm_head.{}": "head.{}"}
KINDS = {  # a weight that tells; names of the encoder, of heads; prefix that is dropped
    "vision": ("patch_embed.proj.weight", VISION, VISION_HEAD, r"module\."),
    "speech": ("conv_layers.0.0.weight", SPEECH, SPEECH_HEAD, r"w2v_encoder\.(w2v_model\.)?"),
    "text": ("sentence_encoder.embed_tokens.weight", TEXT, TEXT_HEAD, r"encoder\.(sentence_encoder\.)?"),
}  # fmt: skip
NOT_USED = r"(.*\.)?(relative_position_index|version)|lm_head\..*"  # the last predicts words (RoBERTa's)
LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # of released CTC models
KERNELS = [10, 3, 3, 3, 3, 2, 2]  # of the convolutions
PIXELS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # as data/images.py


def translate(name: str, names: dict[str, str]) -> str | None:
    """ "encoder.pos_conv.3.0.bias" -> "embed.positions.3.bias"; None for a name that the table lacks."""
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    form = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
    stem, _, leaf = form.rpartition(".")
    new = names.get(form) or (stem in names and f"{names[stem]}.{leaf}")
    return new.format(number and number[0]) if new else None


def rename(weights: dict, encoder: dict, head: dict, not_used: str, path) -> dict[str, torch.Tensor]:
    """Weights under our names ("encoder.blocks.0.fc1.bias", "out.bias"), float32. UserError names others."""
    names = {theirs: f"encoder.{ours}" for theirs, ours in encoder.items()} | head
    new = {}
    for name, tensor in weights.items():
        ours = translate(name, names)
        require(ours or re.fullmatch(not_used, name), f"{path}: {name} is not a weight of data2vec")
        require(torch.is_tensor(tensor), f"{path}: {name} is no tensor but a {type(tensor).__name__}")
        if ours:
            new[re.sub(r"attn\.([qkv])\.bias", r"attn.\1_bias", ours)] = tensor.detach().float()
    for name in {"encoder.embed.cls", "encoder.embed.gain", "encoder.mask_embedding"} & new.keys():
        new[name] = new[name].flatten()
    for name in [name for name in new if name.endswith("attn.q.weight")]:
        parts = [name.replace("q.weight", f"{part}.weight") for part in "qkv"]
        new[name.replace("q.weight", "qkv.weight")] = torch.cat([new.pop(part) for part in parts])
    tables = [name for name in new if name.startswith("encoder.embed.table.")]
    if tables:  # one of each block; one for all may be added to them
        shared = new.pop("encoder.embed.table", 0)
        tables = [new.pop(f"encoder.embed.table.{l}") + shared for l in range(len(tables))]
        new["encoder.embed.table"] = torch.stack(tables)
    learned = new.get("encoder.embed.learned")
    if learned is not None and learned.ndim == 3:  # the first one is the class token's
        new["encoder.embed.cls"] = new["encoder.embed.cls"] + learned[0, 0]
        new["encoder.embed.learned"] = learned[0, 1:]
    return new


def our_names(weights: dict, kind: str, path="released checkpoint") -> dict[str, torch.Tensor]:
    """Released weights of vision, speech or text, all or some of them, under our names. Raises UserError."""
    _, encoder, head, prefix = KINDS[kind]
    weights = {re.sub(f"^({prefix})", "", name): tensor for name, tensor in weights.items()}
    if kind == "speech" and not any(name.startswith("encoder.") for name in weights):  # the Transformer alone
        weights = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    return rename(weights, encoder, head, NOT_USED, path)


def fold_pixels(weights: dict, prepared: dict) -> None:
    """Vision: the embedding of pixels as a preprocessor_config.json has them becomes that of ours."""
    scale = prepared.get("rescale_factor", 1 / 255) if prepared.get("do_rescale", True) else 1
    pixels = [prepared.get(name, 0.5) for name in PIXELS] if prepared.get("do_normalize", True) else [0, 1]
    values = (torch.tensor(value).double().view(-1, 1, 1) for value in (*PIXELS.values(), *pixels))
    our_mean, our_std, mean, std = values
    weight, bias = (weights[f"encoder.embed.proj.{part}"] for part in ("weight", "bias"))
    weights["encoder.embed.proj.weight"] = (weight * (255 * scale * our_std / std)).float()
    offset = (255 * scale * our_mean - mean) / std
    weights["encoder.embed.proj.bias"] = bias + (weight * offset).sum((1, 2, 3)).float()


OPTIONS = {"average_top_k_layers": "top_k", "loss_beta": "beta", "encoder_attention_heads": "heads"}
OPTIONS |= {"l1_beta": "beta", "ema_decay": "tau_0", "ema_end_decay": "tau_e"}


def plain(value):
    """What objects of argparse and omegaconf keep; one level, as an object may hold itself."""
    for _ in range(5):
        if isinstance(value, Foreign) and isinstance(value.state, dict):
            value = value.state.get("_content", value.state.get("_val", value.state))
    return value


def table(value) -> dict:
    """Options as a dict of plain values; {} for anything else."""
    value = plain(value)
    return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else {}


def options_of(file: dict) -> dict:
    """Options of the model, and of the model inside a fine-tuned one."""
    options = table(table(file.get("cfg")).get("model", file.get("args")))
    inner = table(options.get("w2v_args"))
    options |= table(inner.get("model")) or inner
    encoder = table(table(options.get("transformer")).get("encoder"))
    return options | {f"encoder_{name}": value for name, value in encoder.items()}


def read(file: dict, path) -> dict:
    """A file of the released kinds -> state, as convert.read describes it. Raises UserError."""
    tables = [file[name] for name in ("model", "module", "state_dict") if isinstance(file.get(name), dict)]
    weights, ema = dict((tables or [file])[0]), file.get("model_ema")
    for name in [name for name in weights if name.endswith("_ema")]:  # fairseq: among the weights
        ema = weights.pop(name)
    kinds = [kind for kind in KINDS if any(name.endswith(KINDS[kind][0]) for name in weights)]
    require(kinds, f"{path}: not a checkpoint of data2vec; it holds {', '.join(list(file)[:5])}")
    kind, options = kinds[0], options_of(file)
    student = our_names(weights, kind, path)
    teacher = None
    if ema:  # what is not averaged is the student's
        both = {name: t for name, t in student.items() if ".blocks." not in name} | our_names(ema, kind, path)
        teacher = {name: tensor for name, tensor in both.items() if name.startswith("encoder.")}
    if not options.get("imagenet_default_mean_and_std", True):  # BEiT's scripts: mean and std of 0.5
        for weights in filter(None, (student, teacher)):
            fold_pixels(weights, {"image_mean": 0.5, "image_std": 0.5})
    config = {ours: options[theirs] for theirs, ours in OPTIONS.items() if theirs in options}
    config |= norms_of(options) | {"norm_eps": 1e-6 if kind == "vision" else 1e-5, "deep_norm": False}
    task = "images" if kind == "vision" else "letters"
    classes = table(table(file.get("task_state")).get("target_dictionary")).get("symbols")
    state = {"student": student, "teacher": teacher, "config": config, "task": task, "classes": classes}
    loudness = table(table(file.get("cfg")).get("task", file.get("args"))).get("normalize", True)
    notes = [] if loudness or kind != "speech" else ["normalize of its inputs is False, of ours True"]
    return complete(state | {"origin": f"released {kind} checkpoint", "notes": notes}, path)


def norms_of(options):
    """{norm, final_norm}, as far as options tell. If both are set, the layer norm comes last, or first."""
    config = {}
    for ours, flag, order in (("norm", "norm_target_layer", 1), ("final_norm", "norm_targets", -1)):
        if f"layer_{flag}" in options:
            both = [name for name in ("instance", "layer")[::order] if options.get(f"{name}_{flag}")]
            config[ours] = "_".join(both) or "none"
    return config


def sizes_of(weights: dict, path) -> dict:
    """Sizes of a model from its weights under our names. Raises UserError."""
    w = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    dim, ffn = w["blocks.0.fc2.weight"].shape
    sizes = {"dim": dim, "depth": depth, "ffn": ffn, "heads": max(1, dim // 64)}
    if "embed.tokens.weight" in w:
        return sizes | {"max_tokens": len(w["embed.positions.weight"]) - 2}
    if "embed.content.proj.weight" in w:
        convs = [w[name] for name in sorted(w) if name.startswith("embed.content.convs.")]
        kernels = [conv.shape[-1] for conv in convs]
        require(kernels == KERNELS, f"{path}: has convolutions of {kernels}; only {KERNELS} can be read")
        pos_depth = sum(name.startswith("embed.positions.") for name in w) // 2
        _, width, kernel = w["embed.positions.0.weight"].shape
        sizes |= {"channels": len(convs[0]), "pos_groups": dim // width}
        return sizes | {"pos_depth": pos_depth, "pos_width": kernel * pos_depth}
    biases, patch = w.get("embed.table"), w["embed.proj.weight"].shape[-1]
    sizes |= {"patch": patch, "image_size": 224, "relative": biases is not None, "per_block": False}
    sizes["learned_std"] = 0.02 if "embed.learned" in w else 0.0
    sizes["layer_scale"] = 1e-4 if "blocks.0.scale1" in w else 0.0
    if biases is not None:  # (2 side - 1)^2 + 3 rows
        rows, heads = biases.shape[-2:]
        side = (math.isqrt(rows - 3) + 1) // 2
        require(rows == (2 * side - 1) ** 2 + 3, f"{path}: {rows} relative positions, of no square image")
        sizes |= {"image_size": side * patch, "per_block": biases.ndim == 3, "heads": heads}
    return sizes


def complete(state: dict, path) -> dict:
    """Adds sizes and names of classes, leaves out what is not ours. Raises UserError."""
    weights, tuned = state["student"], "out.weight" in state["student"]
    config = state["config"] = sizes_of(weights, path) | state["config"]
    split = config["dim"] % config["heads"] == 0
    require(split, f"{path}: {config['dim']} features do not split into {config['heads']} heads")
    if tuned and "patch" in config and "norm.weight" not in weights:
        config["pool_cls"] = True  # the class token is classified, not the mean
        weights = {re.sub(r"^encoder\.norm", "norm", name): tensor for name, tensor in weights.items()}
    kept = ("encoder.", "norm.", "dense.", "out.") if tuned else ("encoder.", "head.")
    state["student"] = {name: tensor for name, tensor in weights.items() if name.startswith(kept)}
    if not tuned:
        fresh = [] if any(name.startswith("head.") for name in weights) else ["head"]
        return {name: state[name] for name in state.keys() - {"task", "classes"}} | {"fresh": fresh}
    outputs = len(weights["out.weight"])
    known = {("letters", len(LETTERS)): LETTERS, ("sentences", 1): ["score"]}
    names = state["classes"] or known.get((state["task"], outputs)) or [str(i) for i in range(outputs)]
    require(len(names) == outputs, f"{path}: has {outputs} outputs, but names of {len(names)} classes")
    return state | {"classes": [unicodedata.normalize("NFC", name) for name in names]}

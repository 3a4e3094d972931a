"""Released files of data2vec 2.0 (fairseq's .pt, pre-trained): their names and options become ours."""

import re

from common import require
from tools.released import options_of, table

KINDS = {"IMAGE": "vision", "AUDIO": "speech", "TEXT": "text"}
KERNELS = [10, 3, 3, 3, 3, 2, 2]  # of the convolutions in train_speech.py
NAMES = {  # theirs -> ours: regular expressions for the start of a name
    r"extra_tokens$": "encoder.embed.cls", r"alibi_scale$": "encoder.embed.gain",
    r"local_encoder\.proj\.": "encoder.embed.proj.",
    r"local_encoder\.conv_layers\.(\d+)\.0\.": r"encoder.embed.content.convs.\1.",
    r"local_encoder\.conv_layers\.(\d+)\.2\.1\.": r"encoder.embed.content.norms.\1.",
    r"project_features\.1\.": "encoder.embed.content.norm.",
    r"project_features\.2\.": "encoder.embed.content.proj.",
    r"relative_positional_encoder\.(\d+)\.0\.": r"encoder.embed.positions.\1.",
    r"local_encoder\.embed_tokens\.": "encoder.embed.tokens.",
    r"local_encoder\.embed_positions\.": "encoder.embed.positions.",
    r"local_encoder\.layernorm_embedding\.": "encoder.embed.norm.",
    r"context_encoder\.norm\.": "encoder.context.norm.",
    r"context_encoder\.blocks\.": "encoder.context.blocks.", r"blocks\.": "encoder.blocks.",
    r"decoder\.blocks\.(\d+)\.0\.": r"head.convs.\1.", r"decoder\.proj\.": "head.head.",
}  # fmt: skip
OPTIONS = {
    "num_heads": "heads", "average_top_k_layers": "top_k", "mask_length": "mask_block",
    "mask_prob_adjust": "mask_adjust", "clone_batch": "masks",
}  # fmt: skip


def our_names(weights, path="released checkpoint"):
    """{name: tensor} of student, teacher or gradients, under our names. UserError for an unknown name."""
    ours = {}
    for theirs, tensor in weights.items():
        name = re.sub(r"^modality_encoders\.\w+\.|^(?=\d)", lambda m: "" if m[0] else "blocks.", theirs)
        if name.startswith("fixed_positional_encoder."):
            continue  # they follow from the sizes
        found = [pattern for pattern in NAMES if re.match(pattern, name)]
        require(found, f"{path}: {theirs} has no place in data2vec 2.0")
        name = re.sub(f"^{found[0]}", NAMES[found[0]], name).replace(".attn.proj.", ".attn.out.")
        name = name.replace(".mlp.", ".")
        if ".embed.positions." in name and "relative" in theirs:  # counted from 1
            name = re.sub(r"\d+", lambda m: str(int(m[0]) - 1), name)
        if name.endswith("qkv.bias"):
            parts = {name.replace("qkv.bias", f"{part}_bias"): x for part, x in zip("qkv", tensor.chunk(3))}
            ours |= parts
        else:
            ours[name] = tensor.flatten() if name.endswith((".cls", ".gain")) else tensor
    return ours


def read(file, path):
    """A released file -> state, as convert.read describes it."""
    weights = dict(file["model"])
    ema = weights.pop("_ema", None)
    mode = next(name.split(".")[1] for name in weights if name.startswith("modality_encoders."))
    require(mode in KINDS, f"{path}: of {mode}, which is not supported")
    options = options_of(file)
    inner = table(table(options.get("modalities")).get(mode.lower()))
    options |= inner | table(inner.get("decoder"))
    student, teacher = our_names(weights, path), None
    if ema:  # what is not averaged is the student's
        teacher = {name: w for name, w in student.items() if name.startswith("encoder.")}
        teacher |= our_names(ema, path)
    config = {ours: options[theirs] for theirs, ours in OPTIONS.items() if theirs in options}
    for ours, flag in (("norm", "norm_target_layer"), ("final_norm", "norm_targets")):
        instance, layer = options.get(f"instance_{flag}"), options.get(f"layer_{flag}")
        config[ours] = "instance" if instance else "layer" if layer else "none"
    config |= {"norm_eps": options.get("norm_eps", 1e-6 if mode == "IMAGE" else 1e-5)}
    config = {"masks": 1} | config | sizes_of(student, path)
    ratio, side = options.get("mask_prob", 0.5), config.pop("mask_block", 5)
    if mode == "IMAGE":
        config |= {"mask_ratio": ratio, "mask_block": side, "target": "ffn"}
    else:
        config |= {"mask_p": ratio, "mask_span": side}
    origin = f"released {KINDS[mode]} checkpoint of data2vec 2.0"
    fresh = [] if any(name.startswith("head.") for name in student) else ["head"]
    state = {"student": student, "teacher": teacher, "config": config}
    return state | {"origin": origin, "notes": [], "fresh": fresh}


def sizes_of(student, path):
    """Sizes of a model from its weights under our names."""
    w = {name.removeprefix("encoder."): tensor for name, tensor in student.items()}

    def count(stem):
        return len({name[len(stem) :].split(".")[0] for name in w if name.startswith(stem)})

    dim, ffn = w["blocks.0.fc2.weight"].shape
    sizes = {"dim": dim, "ffn": ffn, "depth": count("blocks."), "prenet": count("context.blocks.")}
    if "head.convs.0.weight" in w:
        width, within, *_, kernel = w["head.convs.0.weight"].shape
        sizes |= {"decoder_depth": count("head.convs."), "decoder_width": width, "decoder_kernel": kernel}
        sizes["decoder_groups"] = dim // within
    if "embed.tokens.weight" in w:
        return sizes | {"max_tokens": len(w["embed.positions.weight"]) - 2}
    if "embed.proj.weight" in w:
        return sizes | {"patch": w["embed.proj.weight"].shape[-1], "image_size": 224}
    convs = [w[f"embed.content.convs.{i}.weight"] for i in range(count("embed.content.convs."))]
    require([c.shape[-1] for c in convs] == KERNELS, f"{path}: convolutions of other kernels than {KERNELS}")
    (_, within, kernel), depth = w["embed.positions.0.weight"].shape, count("embed.positions.")
    sizes |= {"channels": len(convs[0]), "pos_groups": dim // within, "pos_depth": depth}
    return sizes | {"pos_width": kernel * depth, "heads": len(w["embed.gain"])}

"""Released files of data2vec 2.0 (fairseq's .pt, pre-trained): their names and options become ours."""

import math
import re

from common import require
from tools.released import VISION, complete, norms_of, options_of, rename, table

# names: theirs -> ours, as in released.py
BLOCKS = {theirs: ours for theirs, ours in VISION.items() if theirs.startswith("blocks.")}
ENCODER = BLOCKS | {f"context_encoder.{theirs}": f"context.{ours}" for theirs, ours in BLOCKS.items()} | {
    "extra_tokens": "embed.cls", "alibi_scale": "embed.gain", "context_encoder.norm": "context.norm",
    "local_encoder.proj": "embed.proj", "local_encoder.conv_layers.{}.0": "embed.content.convs.{}",
    "local_encoder.conv_layers.{}.2.1": "embed.content.norms.{}", "project_features_1": "embed.content.norm",
    "project_features_2": "embed.content.proj", "relative_positional_encoder.{}.0": "embed.positions.{}",
    "local_encoder.embed_tokens": "embed.tokens", "local_encoder.embed_positions": "embed.positions",
    "local_encoder.layernorm_embedding": "embed.norm",
}  # fmt: skip
HEAD = {"decoder.blocks.{}.0": "head.convs.{}"} | {f"decoder.proj{n}": f"head.head{n}" for n in ("", ".{}")}
OPTIONS = {  # ours: theirs
    "heads": "num_heads", "norm_eps": "norm_eps", "top_k": "average_top_k_layers", "beta": "loss_beta",
    "masks": "clone_batch", "mask_ratio": "mask_prob", "mask_p": "mask_prob", "mask_block": "mask_length",
    "mask_span": "mask_length", "mask_adjust": "mask_prob_adjust",
}  # fmt: skip
SHARED = {"IMAGE": (), "AUDIO": "encoder.embed.content.", "TEXT": ("encoder.embed.", "encoder.context.")}


def our_names(weights, path="released checkpoint"):
    """{name: tensor} of student, teacher or gradients, under our names. UserError for an unknown name."""
    plain = {}
    for name, tensor in weights.items():
        name = re.sub(r"^modality_encoders\.\w+\.", "", name)
        name = re.sub(r"^(?=\d)", "blocks.", name)  # text's average is of the blocks alone
        name = name.replace("project_features.", "project_features_")  # .1 a LayerNorm, .2 a Linear
        name = re.sub(r"(?<=relative_positional_encoder\.)\d+", lambda n: f"{int(n[0]) - 1}", name)  # from 1
        plain[name] = tensor
    ours = rename(plain, ENCODER, HEAD, r"fixed_positional_encoder\.positions", path)
    for name in [name for name in ours if name.endswith("qkv.bias")]:
        for part, bias in zip("qkv", ours.pop(name).chunk(3)):
            ours[name.replace("qkv.bias", f"{part}_bias")] = bias
    return ours


def read(file, path):
    """A released file -> state, as convert.read describes it. Raises UserError."""
    weights = dict(file["model"])
    ema, first = weights.pop("_ema", None), next(name for name in weights if name.startswith("modality_enc"))
    mode = first.split(".")[1]
    require(mode in SHARED, f"{path}: a model of {mode}; only {', '.join(SHARED)} can be read")
    student, teacher = our_names(weights, path), None
    if ema:
        shared = {name: tensor for name, tensor in student.items() if name.startswith(SHARED[mode])}
        teacher = shared | our_names(ema, path)
    options = options_of(file)
    options |= table(table(options.get("modalities")).get(mode.lower()))
    config = {"masks": 1, "target": "ffn", "norm_eps": 1e-6 if mode == "IMAGE" else 1e-5}
    config |= {ours: options[theirs] for ours, theirs in OPTIONS.items() if theirs in options}
    config |= {"norm": "none", "final_norm": "none"} | norms_of(options)
    config["prenet"] = len({name.split(".")[3] for name in student if ".context.blocks." in name})
    if "head.convs.0.weight" in student:
        width, within, *_, kernel = student["head.convs.0.weight"].shape
        depth = sum(name.startswith("head.convs.") for name in student) // 2
        config |= {"decoder_depth": depth, "decoder_width": width, "decoder_kernel": kernel}
        config["decoder_groups"] = len(student["encoder.blocks.0.norm1.bias"]) // within
    if mode == "IMAGE":
        side = math.isqrt(weights["modality_encoders.IMAGE.fixed_positional_encoder.positions"].shape[1])
        config["image_size"] = side * student["encoder.embed.proj.weight"].shape[-1]
    state = {"student": student, "teacher": teacher, "config": config, "notes": []}
    return complete(state | {"origin": f"released checkpoint of data2vec 2.0, {mode}"}, path)

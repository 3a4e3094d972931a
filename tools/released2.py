"""Names of the released data2vec 2.0 files."""

import re

NAMES = {
    "local_encoder.proj": "embed.proj",
    "extra_tokens": "embed.cls",
    "alibi_scale": "embed.gain",
    "local_encoder.conv_layers.#.0": "embed.content.convs.#",
    "local_encoder.conv_layers.#.2.1": "embed.content.norms.#",
    "project_features.1": "embed.content.norm",
    "project_features.2": "embed.content.proj",
    "local_encoder.embed_tokens": "embed.tokens",
    "local_encoder.embed_positions": "embed.positions",
    "local_encoder.layernorm_embedding": "embed.norm",
    "context_encoder.norm": "context.norm",
    "context_encoder.blocks": "context.blocks",
}


def our_names(weights):
    """{name: tensor} of student, teacher or gradients, renamed."""
    ours = {}
    for name, w in weights.items():
        if re.match(r"\d", name):
            name = f"blocks.{name}"
        name = re.sub(r"^modality_encoders\.\w+\.", "", name)
        if name.startswith("fixed_positional"):
            continue
        if name.startswith("decoder."):
            name = re.sub(r"decoder\.blocks\.(\d+)\.0", r"head.convs.\1", name).replace(
                "decoder.proj", "head.head"
            )
        else:
            name = re.sub(
                r"^relative_positional_encoder\.(\d+)\.0", lambda m: f"embed.positions.{int(m[1]) - 1}", name
            )
            for theirs, own in NAMES.items():
                pattern = "^" + re.escape(theirs).replace("\\#", r"(\d+)") + r"(?=\.|$)"
                name = re.sub(pattern, own.replace("#", r"\1"), name)
            name = name.replace("attn.proj", "attn.out").replace("mlp.", "")
            name = f"encoder.{name}"
        if name.endswith("attn.qkv.bias"):
            for part, piece in zip("qkv", w.chunk(3)):
                ours[name.replace("qkv.bias", f"{part}_bias")] = piece
            continue
        ours[name] = w.flatten() if name.endswith(("embed.cls", "embed.gain")) else w
    return ours

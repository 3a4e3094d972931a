"""Checkpoints of other origin -> ours.

    python -m tools.convert IN OUT     a released vision checkpoint (.pth) -> a checkpoint of ours

`read` is what the scripts call for --init: our own checkpoints pass as they are, the released vision format
(pre-trained or fine-tuned) is converted. Only tensors and plain containers are ever read from a file.
"""

import argparse
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # `python tools/convert.py` works as well as `python -m tools.convert`
    sys.path.insert(0, str(Path(__file__).parent.parent))

import common
from common import BadInput
from model import relative_index, resize_grid, resize_positions

# ---- released vision names: the encoder of BEiT, a shared relative-position table, a linear head -----------------------

VISION = {
    r"cls_token": "embed.cls",
    r"mask_token": "mask_embedding",
    r"pos_embed": "embed.learned",
    r"patch_embed\.proj\.(weight|bias)": r"embed.proj.\1",
    r"rel_pos_bias\.relative_position_bias_table": "embed.table",
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


def rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """The tensors whose name matches a pattern of `table`, under their new names."""
    new = {}
    for name, tensor in state.items():
        for pattern, ours in table.items():
            if match := re.fullmatch(pattern, name):
                new[match.expand(ours)] = tensor.flatten() if ours in ("embed.cls", "mask_embedding") else tensor
    return new


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


def vision_config(encoder: dict[str, Tensor], index: Tensor | None, path: str) -> dict:
    """Sizes of a vision encoder, from its renamed weights and relative_position_index. Raises BadInput if they do not tell."""
    blocks = {int(name.split(".")[1]) for name in encoder if name.startswith("blocks.")}
    needed = ("embed.table", "embed.proj.weight", "blocks.0.fc1.weight")
    if lacking := [name for name in needed if name not in encoder]:
        raise BadInput(f"{path}: its sizes cannot be told without {', '.join(lacking)} (our names)")
    table, proj = encoder["embed.table"], encoder["embed.proj.weight"]
    if not (grid := vision_grid(len(table), index)):
        raise BadInput(f"{path}: {len(table)} relative positions are not those of a square image, and no relative_position_index in it fits them")
    patch = proj.shape[-1]
    return {
        "patch": patch, "dim": len(proj), "heads": table.shape[1], "image_size": grid[0] * patch,
        "image_width": grid[1] * patch if grid[0] != grid[1] else 0, "depth": 1 + max(blocks), "ffn": len(encoder["blocks.0.fc1.weight"]),
        "layer_scale": 1e-4 if "blocks.0.scale1" in encoder else 0.0, "relative": True, "learned_std": 0.0,
    }  # fmt: skip


def from_released_vision(file: dict, path: str = "released checkpoint") -> dict:
    """{"model": ..., "model_ema": ...} with the released names -> {"student", "teacher"[, "classes"]}.

    student  encoder.* and head.* (pre-trained), or encoder.*, norm.* and out.* of a classifier (fine-tuned: such a file
             has no mask token and no final norm, and does not name its classes: they become "0", "1", ...)
    teacher  encoder.*, or None
    """
    model, ema = file.get("model", file), file.get("model_ema")
    known = [*VISION, *VISION_HEAD, *VISION_CLASSIFIER, VISION_UNUSED]
    if strange := [name for name in [*model, *(ema or {})] if not any(re.fullmatch(p, name) for p in known)]:
        raise BadInput(f"{path}: released vision checkpoint with unknown weights: {', '.join(strange[:5])}")
    new = {"student": {f"encoder.{name}": tensor for name, tensor in rename(model, VISION).items()}, "teacher": None}
    if "fc_norm.weight" in model:
        new["student"] |= rename(model, VISION_CLASSIFIER)
        new["classes"] = [str(i) for i in range(len(model["head.weight"]))]
    else:
        new["student"] |= {f"head.{name}": tensor for name, tensor in rename(model, VISION_HEAD).items()}
    if ema:
        new["teacher"] = {f"encoder.{name}": tensor for name, tensor in rename(ema, VISION).items()}
    return new


# ---- released speech and text names: the encoders of wav2vec 2.0 and of RoBERTa --------------------------------------

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


TEXT = {
    r"encoder\.embed_(tokens|positions)\.weight": r"embed.\1.weight",
    r"encoder\.layernorm_embedding\.(weight|bias)": r"embed.norm.\1",
}


def fuse(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value matrices of a layer become one."""
    new = dict(encoder)
    for name in encoder:
        if name.endswith("attn.q.weight"):
            stem = name.removesuffix("q.weight")
            new[stem + "qkv.weight"] = torch.cat([new.pop(f"{stem}{part}.weight") for part in "qkv"])
    return new


def from_released_speech(model: dict[str, Tensor], ema: dict[str, Tensor] | None = None) -> dict:
    """Released names -> {"student", "teacher"}; the teacher's content (convolutions, projection) is the student's."""
    encoder = fuse(rename(model, SPEECH | POST_NORM))
    student = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    student |= rename(model, {r"final_proj\.(weight|bias)": r"head.\1", r"proj\.(weight|bias)": r"out.\1"})
    if ema is None:
        return {"student": student, "teacher": None}
    averaged = fuse(rename({f"encoder.{name}": tensor for name, tensor in ema.items()}, SPEECH | POST_NORM))
    return {"student": student, "teacher": {f"encoder.{name}": tensor for name, tensor in (encoder | averaged).items()}}


def from_released_text(model: dict[str, Tensor], ema: dict[str, Tensor] | None = None) -> dict:
    """Released names (encoder.sentence_encoder.*, encoder.regression_head.*; the teacher's without prefix) -> as for speech."""
    inner = {name.replace("encoder.sentence_encoder.", "encoder."): tensor for name, tensor in model.items()}
    encoder = fuse(rename(inner, TEXT | POST_NORM))
    student = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    several = "encoder.regression_head.2.weight" in inner  # one layer alone is no Sequential here
    student |= rename(inner, {r"encoder\.regression_head\.(\d+)\.(weight|bias)": r"head.\1.\2" if several else r"head.\2"})
    if ema is None:
        return {"student": student, "teacher": None}
    averaged = fuse(rename({f"encoder.{name}": tensor for name, tensor in ema.items()}, TEXT | POST_NORM))
    return {"student": student, "teacher": {f"encoder.{name}": tensor for name, tensor in (encoder | averaged).items()}}


# ---- any checkpoint ----------------------------------------------------------------------------------------------------


def numpy_scalar(package: str):
    """What makes a NumPy number of its bytes, under the name that NumPy before ("core") and since ("_core") 2 gives it."""

    def scalar(dtype: np.dtype, value: bytes):
        return np.float64(0).__reduce__()[0](dtype, value)

    scalar.__module__, scalar.__qualname__ = f"numpy.{package}.multiarray", "scalar"  # how torch tells what is allowed
    return scalar


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU; only tensors and plain containers, so that nothing in the file is run."""
    # released files hold options and NumPy learning rates beside the weights
    harmless = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), *map(numpy_scalar, ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch's readers raise nearly anything on bytes that are no checkpoint
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own text goes on to recommend loading it unsafely
            reason = "it asks for more than tensors and plain containers"
        raise BadInput(f"{path}: damaged, or not a checkpoint that can be read safely ({reason})") from None


def read(path: str) -> dict:
    """A checkpoint of any known origin -> {"student", "teacher" or None, "config", "classes" if fine-tuned}. Raises BadInput."""
    file = load(path)
    if not isinstance(file, dict):
        raise BadInput(f"{path}: holds a {type(file).__name__}, not a checkpoint; give ckpt.pt or best.pt of a run")
    if {"student", "teacher", "config"} <= file.keys():
        return file
    names = file.get("model", file)
    if isinstance(names, dict) and "patch_embed.proj.weight" in names:
        new = from_released_vision(file, path)
        index = next((tensor for name, tensor in names.items() if re.fullmatch(VISION_UNUSED, name)), None)
        return new | {"config": vision_config(rename(names, VISION), index, path)}
    raise BadInput(f"{path}: neither a checkpoint of ours nor a released vision checkpoint; it holds {', '.join(map(str, list(file)[:6]))}")


def patch_grid(config: dict) -> tuple[int, int]:
    """(H, W) in patches of the images that a model of this config takes."""
    return config["image_size"] // config["patch"], (config.get("image_width") or config["image_size"]) // config["patch"]


def load_into(
    module: torch.nn.Module, weights: dict[str, Tensor], path: str, old: tuple[int, int] = (), new: tuple[int, int] = ()
):
    """Loads weights, with the positions interpolated (bicubic) from the grid `old` to `new`.

    Raises BadInput that names what does not fit: no parameter stays random, no weight is left over.
    """
    mine = module.state_dict()
    fitted = dict(weights)
    for name, tensor in weights.items() if old != new else ():
        for end, resize in (("embed.table", resize_positions), ("embed.learned", resize_grid)):
            if name.endswith(end):
                fitted[name] = resize(tensor, old, new)
    odd = [n for n in mine.keys() | fitted.keys() if n not in mine or n not in fitted or mine[n].shape != fitted[n].shape]
    if odd:
        raise BadInput(f"{path}: does not fit this model; look at {', '.join(sorted(odd)[:6])}")
    module.load_state_dict(fitted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="checkpoint of ours to write")
    args = parser.parse_args()
    state = read(args.source)
    if not Path(args.target).parent.is_dir():
        raise BadInput(f"{args.target}: cannot be written, its folder does not exist")
    common.save(Path(args.target), state)
    print(f"{args.source}: {', '.join(k for k in state if state[k])}; {state['config']} -> {args.target}")


if __name__ == "__main__":
    common.run(main)

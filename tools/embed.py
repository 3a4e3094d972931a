"""Features of images, recordings or lines of text, whichever the checkpoint is for.

    python -m tools.embed --init runs/cifar10/ckpt.pt cifar10/val --out features.npy           # folders, recursively
    python -m tools.embed --init runs/digits/ckpt.pt a.wav b.flac --out frames.npy --pool none --layer 4 --network teacher
    python -m tools.embed --init runs/corpus/ckpt.pt lines.txt --out lines.npy                 # each line; - reads stdin

Writes FILE.npy, float32 (rows, D), and FILE.tsv with a line an input, in their order: first, end, input, skipped. Its rows are
first to end - 1: one, or with --pool none one a position; no row if it cannot be read, and skipped says why.
The feature of layer l is what block l hands to the next: the output after its last residual (images) or last norm (recordings,
text). No final norm is applied; fine-tuned models of images have none. Positions are patches (without the class token), frames
or tokens (<s> and </s> are two of them). Inputs are cropped and normalised as in evaluation.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

if __name__ == "__main__":  # `python tools/embed.py` works as well as `python -m tools.embed`
    sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import train_speech
import train_text
import train_vision
from common import BadInput
from data import audio, images, text
from model import Encoder, bias_of, restrict
from tools import convert

KINDS = {  # what a config of this kind has: its script, what its inputs are, how their files in a folder end
    "patch": (train_vision, "images", images.EXTENSIONS),
    "channels": (train_speech, "recordings", audio.ENDINGS),
    "max_tokens": (train_text, "lines", (".txt",)),
}


class Unusable(Exception):
    """An input that cannot be used; the message is a short reason without its name."""


def open_encoder(path: str, network: str, layer: int | None) -> tuple:
    """-> encoder up to `layer` (None: the last), its Config, vocabulary or None, an entry of KINDS. Raises BadInput."""
    state = convert.read(path)
    kind = next((KINDS[key] for key in KINDS if key in state["config"]), None)
    if not kind:
        raise BadInput(f"{path}: a model of neither images, recordings nor text; its config has none of {', '.join(KINDS)}")
    if not (weights := state.get(network)):
        raise BadInput(f"{path}: holds no {network}; take --network student")
    if kind[0] is train_text and not state.get("vocabulary"):
        raise BadInput(f"{path}: holds no vocabulary, without which text gives no tokens")
    cfg = kind[0].Config(**{f.name: state["config"][f.name] for f in fields(kind[0].Config) if f.name in state["config"]})
    if layer is not None and not 0 <= layer <= cfg.depth:
        raise BadInput(f"--layer {layer}: the model has layers 0 (its embedding) to {cfg.depth}")
    vocabulary = text.Vocabulary.parse(state["vocabulary"]) if kind[0] is train_text else None
    encoder = kind[0].build(cfg, *([vocabulary.size] if vocabulary else [])).encoder
    encoder.norm, encoder.mask_embedding = nn.Identity(), None  # no block's output depends on them, and a file may lack them
    weights = {n.removeprefix("encoder."): t for n, t in weights.items() if n.startswith("encoder.")}
    convert.load_into(encoder, {n: t for n, t in weights.items() if not n.startswith(("norm.", "mask_embedding"))}, path)
    encoder.blocks = encoder.blocks[:layer]
    return encoder.eval(), cfg, vocabulary, kind


def find(places: list[str], endings: tuple[str, ...]) -> Iterator[tuple[str, str | bytes | Unusable]]:
    """Files, folders and "-" -> (name, path, or line of text, or what is wrong) of every input, in order."""
    for place in places:
        try:
            paths = audio.find_files(place, endings) if os.path.isdir(place) else [place]
        except OSError as error:
            yield place, Unusable(f"cannot be listed ({error.filename}: {error.strerror})")
            continue
        if not paths:
            yield place, Unusable(f"nothing in it ends in {' '.join(endings)}")
        for path in paths:
            yield from lines_of(path) if ".txt" in endings else [(path, path)]


def lines_of(path: str) -> list[tuple[str, bytes | Unusable]]:
    """A text file, or "-" for stdin -> (name with its number, line) of each line, as find() gives them."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        return [(path, Unusable(error.strerror))]
    if not content or b"\0" in content:
        return [(path, Unusable("not text, it holds zero bytes" if content else "empty"))]
    lines = content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    return [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1)]


def read(source: str | bytes | Unusable, cfg, vocabulary: text.Vocabulary | None) -> Tensor | str:
    """An image (3, H, W) or a recording (N,), float32, normalised, or a line's tokens (T,) int64; or what is wrong with it."""
    try:
        if isinstance(source, Unusable):
            raise source
        if isinstance(cfg, train_vision.Config):
            size = (cfg.image_size, cfg.image_width or cfg.image_size)
            return images.normalise(images.to_tensor(images.center_crop(images.load_image(source), size)))
        if isinstance(cfg, train_speech.Config):
            return torch.from_numpy(audio.normalise(audio.load_audio(source)))
        if not (line := source.decode().removesuffix("\r")).strip():
            raise Unusable("empty")
        if len(ids := [text.BOS, *vocabulary.encode(line), text.EOS]) > cfg.max_tokens:
            raise Unusable(f"{len(ids)} tokens, but the model has positions for {cfg.max_tokens}")
        return torch.tensor(ids)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (images.BadImage, audio.BadAudio, Unusable) as error:
        return str(error)


@torch.no_grad()
def features(encoder: Encoder, inputs: list[Tensor]) -> list[Tensor]:
    """What read() gives, on the encoder's device -> the last block's output (T, D) float32 of each, whatever the others are.

    They are embedded one by one, since padding would bleed into speech's position convolutions (WaveEmbed.place), and padded
    to the longest for the blocks, which can be told not to look there.
    """
    placed, biases = zip(*(encoder.embed.place(*encoder.embed(x[None])) for x in inputs))  # each (1, prefix + T, D)
    lengths = torch.tensor([x.shape[1] for x in placed], device=placed[0].device)
    x = nn.utils.rnn.pad_sequence([x[0] for x in placed], batch_first=True)  # (B, prefix + T, D)
    valid = None if lengths.min() == lengths.max() else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    bias = restrict(biases[0], valid, None, prefix=0)  # images have the same one, and no padding
    for l, block in enumerate(encoder.blocks):
        x, _ = block(x, bias_of(bias, l))
    return [y[encoder.prefix : n].float() for y, n in zip(x, lengths.tolist())]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="file or folder; a text file is an input a line; - is text from stdin")
    add("--init", metavar="CKPT", required=True, help="checkpoint, pre-trained or fine-tuned")
    add("--out", metavar="FILE.npy", type=Path, required=True, help="array to write; never one that is there already")
    add("--layer", type=int, help="block whose output to take, from 1; 0: the embedding with positions; default: the last")
    add("--network", default="student", choices=("student", "teacher"), help="fine-tuned files hold no teacher")
    add("--pool", default="mean", choices=("mean", "none"), help="mean over an input's positions, or a row for each")
    add("--batch_size", type=int, default=16, help="inputs at once; changes time and memory alone")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes the GPU if there is one")
    add("--dtype", default="float32", choices=("auto", "float32", "bfloat16"), help="bfloat16 is faster on GPUs, and rougher")
    args = parser.parse_args()
    index, part = args.out.with_suffix(".tsv"), args.out.with_name(args.out.name + ".tmp")
    if args.out.suffix != ".npy" or args.batch_size < 1:
        raise BadInput(f"--out {args.out} --batch_size {args.batch_size}: must end in .npy, and be at least 1")
    if there := [path for path in (args.out, index) if path.exists()]:
        raise BadInput(f"{there[0]}: already there, and not overwritten; remove it or choose another --out")
    *_, device, autocast = common.start_processes(args.device, args.dtype)
    encoder, cfg, vocabulary, (_, unit, endings) = open_encoder(args.init, args.network, args.layer)
    encoder.to(device)
    found, table, wrong, rows = list(find(args.inputs, endings)), ["first\tend\tinput\tskipped"], [], 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file, tqdm(total=len(found), unit=f" {unit}", dynamic_ncols=True) as bar:
            header = {"descr": "<f4", "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": (0, encoder.dim)})  # as long for any number of rows
            for at in range(0, len(found), args.batch_size):
                lot = found[at : at + args.batch_size]
                inputs = [read(source, cfg, vocabulary) for _, source in lot]
                usable = [x.to(device) for x in inputs if isinstance(x, Tensor)]
                with autocast:
                    outputs = iter(features(encoder, usable) if usable else [])
                for (name, _), x in zip(lot, inputs):
                    name = name.translate({9: r"\t", 10: r"\n", 13: r"\r"}).encode(errors="backslashreplace").decode()
                    y, reason = (next(outputs), "") if isinstance(x, Tensor) else (torch.empty(0, encoder.dim), x)
                    if reason:
                        wrong.append(f"{name}: {reason}")
                        bar.write(f"skipped {wrong[-1]}")
                    elif args.pool == "mean":
                        y = y.mean(0, keepdim=True)
                    file.write(y.cpu().contiguous().numpy())
                    table.append(f"{rows}\t{rows + len(y)}\t{name}\t{reason}")
                    rows += len(y)
                bar.update(len(inputs))
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, encoder.dim)})
        if not rows:
            raise BadInput(f"nothing here can be used; the first of {len(wrong)}: {wrong[0]}")
        common.save(index, "\n".join(table) + "\n")
        os.replace(part, args.out)  # last: an array that is there has its index
    except OSError as error:
        raise BadInput(f"--out {args.out}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    layer, count = f"{args.network}, layer {len(encoder.blocks)} of {cfg.depth}", len(found) - len(wrong)
    print(f"{args.init}: {layer}; {count} {unit}, {len(wrong)} skipped -> {args.out} ({rows}, {encoder.dim}), {index}")


if __name__ == "__main__":
    common.run(main)

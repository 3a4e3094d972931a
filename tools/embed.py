"""Features of images, recordings or lines of text: python -m tools.embed --init CKPT FOLDER --out FILE.npy

FILE.npy is float32 (rows, D). FILE.tsv has a line for each input: first, end, input, skipped. Its rows are
first to end - 1: one, with --pool none one for each patch (not the class token), frame or token (with <s> and
</s>). Layer l is the output of block l, before any final norm. Inputs go one by one, as in evaluation.
"""

import glob
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import common
import train_speech
import train_text
import train_vision
from data import audio, images, text
from model import Teacher
from tools import convert

SCRIPTS = {"vision": train_vision, "speech": train_speech, "text": train_text}
ENDINGS = {"vision": images.EXTENSIONS, "speech": audio.ENDINGS, "text": (".txt",)}  # in folders


def open_model(path):
    """-> kind, Config, Vocabulary or None, Student with random weights, and what convert.read gives."""
    state, vocabulary = convert.read(path), None
    kind = convert.modality(state["config"])
    script = SCRIPTS[kind]
    cfg = script.Config(**{k: v for k, v in state["config"].items() if k in vars(script.Config())})
    if kind == "text":
        common.require("vocabulary" in state, f"{path}: has no vocabulary; put its files beside it")
        vocabulary = text.Vocabulary.parse(state["vocabulary"])
    student = script.build(cfg, vocabulary.size) if vocabulary else script.build(cfg)
    return kind, cfg, vocabulary, student, state


def open_both(path, weights="trained", seed=0):
    """-> name (weights), kind, cfg, words (Vocabulary or None), student and teacher, of pre-training; their
    weights are those of the checkpoint, or "random", drawn from the seed."""
    torch.manual_seed(seed)
    kind, cfg, words, student, state = open_model(path)
    ready = state["teacher"] and "head" not in state["fresh"] and getattr(cfg, "objective", "") != "mlm"
    common.require(ready, f"{path}: lacks a teacher or a head for its features; give one of data2vec")
    teacher = Teacher(student.encoder.eval(), window=cfg.window)
    if weights == "trained":
        convert.load_encoder(student, state, path, head=True)
        convert.load_encoder(teacher, state, path, "teacher")
    return SimpleNamespace(name=weights, kind=kind, cfg=cfg, words=words, student=student, teacher=teacher)


def find(place, kind):
    """File, folder or line of text -> [(name, source), ...]; the source is a path, or a line of text."""
    found = sorted(glob.glob(f"{glob.escape(place)}/**", recursive=True))
    paths = [path for path in found if path.lower().endswith(ENDINGS[kind])] or [place]
    if kind == "text" and (os.path.exists(place) or place.endswith(".txt")):
        return [(f"{path}:{n}", line) for path in paths for n, line in enumerate(audio.read_lines(path), 1)]
    return [(re.sub("[\x00-\x1f\ud800-\udfff]", lambda c: repr(c[0])[1:-1], path), path) for path in paths]


def read(source, kind, cfg, vocabulary):
    """-> image (3, H, W) or wave (N,), float32, normalised; tokens (T,) int64."""
    if kind == "vision":
        img = images.center_crop(images.load_image(source), cfg.image_size)
        return images.normalise(images.to_tensor(img))
    if kind == "speech":
        return torch.from_numpy(audio.normalise(audio.load_audio(source)))
    ids = [text.BOS, *vocabulary.encode(source), text.EOS]
    if not source or "\ufffd" in source or len(ids) > cfg.max_tokens:
        raise ValueError(f"empty, not UTF-8, or over {cfg.max_tokens} tokens")
    return torch.tensor(ids)


@torch.no_grad()
def main():
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="file, folder or line of text")
    add("--init", metavar="CKPT", required=True, help="checkpoint, pre-trained or fine-tuned, or hub folder")
    add("--out", metavar="FILE.npy", type=Path, required=True, help="new array")
    add("--layer", type=int, help="from 1; 0: the embedding with positions; default: the last")
    add("--network", default="student", choices=("student", "teacher"), help="fine-tuned: student alone")
    add("--pool", default="mean", choices=("mean", "none"), help="mean of an input's positions, or all")
    add("--device", default="auto", choices=common.DEVICES, help="auto: the GPU if there is one")
    add("--dtype", default="float32", choices=common.DTYPES, help="of the computation")
    args = parser.parse_args()
    new = args.out.parent.is_dir() and not args.out.exists() and args.out.suffix == ".npy"
    common.require(new, f"--out {args.out}: must be a new .npy file, in a folder that exists")
    _, _, device, autocast, _ = common.start_processes(args.device, args.dtype)
    kind, cfg, vocabulary, student, state = open_model(args.init)
    common.require(args.layer in (None, *range(cfg.depth + 1)), f"--layer: must be in 0 .. {cfg.depth}")
    convert.load_encoder(student, state, args.init, args.network)
    encoder = student.encoder.eval().to(device)
    encoder.blocks, encoder.norm = encoder.blocks[: args.layer], torch.nn.Identity()
    found = [pair for place in args.inputs for pair in find(place, kind)]
    rows, reasons = [torch.empty(0, encoder.dim)] * len(found), [""] * len(found)
    for i, (name, source) in enumerate(tqdm(found, disable=None)):
        try:
            x = read(source, kind, cfg, vocabulary)[None].to(device)
        except (images.BadImage, *audio.AUDIO_ERRORS) as error:
            reasons[i] = str(error)
            tqdm.write(f"skipped {name}: {error}")
            continue
        with autocast:  # features (1, prefix + T, D)
            features = audio.in_windows(encoder, x) if kind == "speech" else encoder(x)[0]
        y = features[0, encoder.prefix :].float().cpu()
        rows[i] = y.mean(0, keepdim=True) if args.pool == "mean" else y
    ends = np.cumsum([0, *map(len, rows)]).tolist()
    common.require(ends[-1], f"{args.inputs[0]}: no input can be used; see what is skipped above")
    lines = [f"{ends[i]}\t{ends[i + 1]}\t{name}\t{reasons[i]}\n" for i, (name, _) in enumerate(found)]
    with common.whole(args.out) as path:
        np.save(path, torch.cat(rows).numpy())
        common.save(args.out.with_suffix(".tsv"), "first\tend\tinput\tskipped\n" + "".join(lines))
    print(f"{args.out}: layer {len(encoder.blocks)}, {len(found)} inputs, {sum(map(bool, reasons))} skipped")


if __name__ == "__main__":
    common.run(main)

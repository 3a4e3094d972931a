"""Checkpoints in and out: released data2vec weights, folders of the transformers library, and ours.

    python -m tools.convert IN OUT.pt     released .pt or .pth, or a folder -> a checkpoint of ours
    python -m tools.convert IN OUT        any of these -> a folder for from_pretrained(): config.json, weights, tokenizer

`read` is what the scripts call for --init: all of these are taken as they are, this command is for keeping the result. What a
file cannot say is asked for by options, whose defaults are the released recipe. Every weight finds its place or is named.
"""

import argparse
import importlib
import sys
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # `python tools/convert.py` works as well as `python -m tools.convert`
    sys.path.insert(0, str(Path(__file__).parent.parent))

import common
from common import BadInput
from model import Classifier, Recogniser, SentenceClassifier, resize_grid, resize_positions
from tools import hub, released
from tools.released import (  # noqa: F401  (names in use elsewhere)
    POST_NORM, SPEECH, TEXT, VISION, from_released_speech, from_released_text, from_released_vision, fuse, rename, vision_config,
    vision_grid,
)  # fmt: skip
from tools.unpickle import load, reason, tensors

SIZES = ("dim", "depth", "heads", "ffn", "patch", "image_size", "channels", "pos_depth", "pos_width", "pos_groups", "max_tokens")


def read(path: str | Path, asked: dict | None = None) -> dict:
    """A checkpoint or folder of any known origin -> what a checkpoint of ours holds. Raises BadInput.

    student, teacher  {name: tensor}; the teacher None if the file has none
    config            sizes and targets, under the names of the Configs of train_*.py
    classes, goal     if fine-tuned: what the outputs stand for, and what they are (images, letters, sounds, clips, sentences)
    vocabulary        text: what data.text's Vocabulary.parse takes, if the file or what lies beside it tells
    origin, notes     not of ours: what it was recognised as; what was left out or made up
    fresh             not of ours: names of parts that it lacks by design (the regression head), for load_into
    asked             what the user says where the file cannot (heads, top_k, ...; classes, vocab: a folder)
    """
    asked, folder = asked or {}, Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadInput(f"{path}: a folder without config.json; give a folder of the transformers library, or ckpt.pt of a run")
    if folder.is_dir() and not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        raise BadInput(f"{path}: a folder without weights of the transformers library; of a run give ckpt.pt or best.pt in it")
    if folder.is_dir():
        new = foreign(hub.read, folder, asked)
    else:
        file = load(path)
        if not isinstance(file, dict):
            raise BadInput(f"{path}: holds a {type(file).__name__}, not a checkpoint; give ckpt.pt or best.pt of a run")
        if {"student", "teacher", "config"} <= file.keys():
            check_kinds(file, path)
            if "max_tokens" in file["config"] and "vocabulary" not in file:  # as it was not known where it was converted
                add_vocabulary(file, path, asked)
            return file
        new = foreign(released.from_released, file, str(path), asked)
        if new is None:
            raise BadInput(
                f"{path}: neither a checkpoint of ours nor a known released one; it holds {', '.join(map(str, list(file)[:6]))}"
            )
    new = {"notes": []} | new
    complete(new, path)
    if "max_tokens" in new["config"]:
        add_vocabulary(new, path, asked)
    return new


def foreign(reader, *arguments):
    """Calls a reader of what others wrote: options of other kinds than they should be, or parts missing, are one line too."""
    try:
        return reader(*arguments)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        where = next(str(argument) for argument in arguments if isinstance(argument, (str, Path)))
        why = " ".join(repr(error).split())[:200]
        raise BadInput(f"{where}: not as files of its kind are; its options or weights cannot be understood ({why})") from None


def check_kinds(file: dict, path) -> None:
    """Raises BadInput unless a checkpoint of ours holds what we write: tensors, options of their kinds, names of classes."""
    for part in ("student", "teacher"):
        if part == "student" or file[part]:
            tensors(file[part], path, part)
            if not all(isinstance(name, str) for name in file[part]):
                raise BadInput(f"{path}: its {part} has weights without a name; damaged")
    if not isinstance(config := file["config"], dict):
        raise BadInput(f"{path}: its config is a {type(config).__name__}, not a table of options")
    known = vars(script_of(config).Config())
    for name in config.keys() & known.keys():
        kind = type(known[name])
        if not isinstance(config[name], (int, float) if kind is float else kind) or name in SIZES and config[name] < 1:
            said = config[name] if isinstance(config[name], (int, float, str)) else type(config[name]).__name__
            raise BadInput(f"{path}: its config says {name} {said}; damaged, or of another version")
    names = file.get("classes", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(file.get("goal", ""), str)):
        raise BadInput(f"{path}: its classes or its goal are no names; damaged, or of another version")
    if not isinstance(file.get("finetune", {}), dict) or not isinstance(file.get("vocabulary", ""), str):
        raise BadInput(f"{path}: its finetune is no table of options, or its vocabulary no text; damaged, or of another version")
    if "vocabulary" in file:
        from data import text

        try:
            text.Vocabulary.parse(file["vocabulary"])
        except (ValueError, LookupError) as error:
            raise BadInput(f"{path}: its vocabulary is damaged ({reason(error)})") from None


def complete(state: dict, path) -> None:
    """Checks that the weights are all that the model has. Raises BadInput that lists the others.

    Parts that other origins lack by design are named in the notes: a mask embedding becomes zeros, the final norm of vision
    the identity; the head of pre-training is left to be new ("fresh").
    """
    if state["config"]["dim"] % state["config"]["heads"]:
        raise BadInput(
            f"{path}: {state['config']['dim']} features are no multiple of {state['config']['heads']} heads; see --heads"
        )
    script_of(state["config"])  # imported here: what it makes when it is imported is real
    with torch.device("meta"):
        wanted = build(state).state_dict()
    student, made, state["fresh"] = state["student"], [], []
    for name, tensor in wanted.items():
        if name not in student and name in ("encoder.mask_embedding", "encoder.norm.weight", "encoder.norm.bias"):
            student[name] = torch.full(tensor.shape, float(name == "encoder.norm.weight"))
            made.append(name.removeprefix("encoder.").split(".")[0])
        elif name not in student and name.startswith("head."):
            state["fresh"] = ["head"]
    check_fit(wanted, student, path, state["fresh"])
    if state["teacher"]:
        shared = ("encoder.embed.", "encoder.mask_embedding")  # often not averaged, and then not in the file
        shared = {name: student[name] for name in wanted if name.startswith(shared) or name.split(".")[1] in made}
        teacher = state["teacher"] = shared | state["teacher"]
        check_fit({name: tensor for name, tensor in wanted.items() if name.startswith("encoder.")}, teacher, path)
    if made:
        state["notes"].append(f"made up, as the file has none: {', '.join(sorted(set(made)))}")
    if state["fresh"]:
        state["notes"].append("new by design: head, the regression head of pre-training")


def add_vocabulary(state: dict, path, asked: dict) -> None:
    """Text: the vocabulary that the user names, or that lies in the folder or beside the file; else a note says what to do."""
    from data import text  # only text needs it

    beside = Path(path) if Path(path).is_dir() else Path(path).parent
    there = {part.name for part in beside.iterdir()}
    known = "vocab" in there or {"vocab.json", "encoder.json"} & there and {"merges.txt", "vocab.bpe"} & there
    if not asked.get("vocab") and not known:
        note = "no vocabulary: put vocab.json and merges.txt, or encoder.json, vocab.bpe and dict.txt, beside the weights"
        state["notes"] = [*state.get("notes", []), note]
        return
    vocabulary = text.open_vocabulary(str(asked.get("vocab") or beside))
    rows = len(state["student"]["encoder.embed.tokens.weight"])
    if vocabulary.size != rows:
        raise BadInput(
            f"{asked.get('vocab') or beside}: a vocabulary of {vocabulary.size} tokens, but the model of {path} has {rows}"
        )
    state["vocabulary"] = vocabulary.spell()


# ---- from a config to a model ------------------------------------------------------------------------------------------------


def script_of(config: dict):
    """The train_*.py of a config: it knows the defaults of the options, and how they make a model."""
    name = "train_vision" if "patch" in config else "train_speech" if "channels" in config else "train_text"
    return importlib.import_module(name)  # late, as these import this file


def build(state: dict) -> torch.nn.Module:
    """The model that a checkpoint is of, with random weights: the Student of its script, or what it was fine-tuned to."""
    config, script = state["config"], script_of(state["config"])
    cfg = script.Config(**{f.name: config[f.name] for f in fields(script.Config) if f.name in config})
    vocab = (len(state["student"]["encoder.embed.tokens.weight"]),) if "max_tokens" in config else ()
    try:
        student = script.build(cfg, *vocab)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise BadInput(f"the sizes of the checkpoint do not go together: {' '.join(str(error).split())[:200]}") from None
    if "classes" not in state:
        return student
    if "patch" in config:
        return Classifier(student.encoder, len(state["classes"]), config.get("pool_cls", False))
    return (Recogniser if "channels" in config else SentenceClassifier)(student.encoder, len(state["classes"]))


def patch_grid(config: dict) -> tuple[int, int]:
    """(H, W) in patches of the images that a model of this config takes."""
    return config["image_size"] // config["patch"], (config.get("image_width") or config["image_size"]) // config["patch"]


def check_fit(mine: dict[str, Tensor], weights: dict[str, Tensor], path, fresh: list[str] | tuple[str, ...] = ()) -> None:
    """Raises BadInput that names parameters without weights (unless of a `fresh` part), weights left over, other shapes."""
    new = {name for name in mine if name not in weights and name.split(".")[0] in fresh}
    odd = [
        n for n in (mine.keys() | weights.keys()) - new if n not in mine or n not in weights or mine[n].shape != weights[n].shape
    ]
    if odd:
        both = next((n for n in sorted(odd) if n in mine and n in weights), None)
        sizes = f" ({both} is {tuple(weights[both].shape)} in the file, {tuple(mine[both].shape)} here)" if both else ""
        raise BadInput(f"{path}: does not fit this model; look at {', '.join(sorted(odd)[:6])}{sizes}")


def check_whole(state: dict, path) -> None:
    """Raises BadInput unless a checkpoint's weights are those of the model that its config describes."""
    script_of(state["config"])
    with torch.device("meta"):
        wanted = build(state).state_dict()
    check_fit(wanted, state["student"], path, state.get("fresh", ()))
    if state["teacher"]:
        check_fit({name: tensor for name, tensor in wanted.items() if name.startswith("encoder.")}, state["teacher"], path)


def load_into(
    module: torch.nn.Module, weights: dict[str, Tensor], path: str, old: tuple[int, int] = (), new: tuple[int, int] = (),
    fresh: list[str] | tuple[str, ...] = (),
):  # fmt: skip
    """Loads weights, with the positions interpolated (bicubic) from the grid `old` to `new`.

    Raises BadInput that names what does not fit: no parameter stays random (but those of `fresh` parts), no weight is left over.
    """
    mine = module.state_dict()
    fitted = dict(weights)
    for name, tensor in weights.items() if old != new else ():
        for end, resize in (("embed.table", resize_positions), ("embed.learned", resize_grid)):
            if name.endswith(end):
                fitted[name] = resize(tensor, old, new)
    check_fit(mine, fitted, path, fresh)
    module.load_state_dict({name: fitted.get(name, tensor) for name, tensor in mine.items()})


# ---- command line --------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint or folder to read")
    parser.add_argument("target", metavar="OUT", help="checkpoint of ours (.pt or .pth) or folder to write")
    parser.add_argument("--network", choices=("student", "teacher"), default="student", help="which one goes into a folder")
    options = parser.add_argument_group(
        "what the file may not say, by default as released; in conflict with the file it is an error"
    )
    options.add_argument("--heads", type=int, help="attention heads; 64 features each")
    options.add_argument("--image_size", type=int, help="pixels, of a vision model without positions; 224")
    options.add_argument("--convs", help="speech: as fairseq writes them, such as '[(512,10,5)] + [(512,3,2)]*4 + [(512,2,2)]*2'")
    options.add_argument(
        "--letters", type=Path, metavar="FILE", help="speech: dict.ltr.txt of the fine-tuning; the released order of 28"
    )
    options.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line; numbers")
    options.add_argument("--vocab", help="text: folder with vocab.json and merges.txt, or encoder.json, vocab.bpe and dict.txt")
    options.add_argument("--top_k", type=int, help="layers averaged into the target: 6 (vision), 8 (speech), 10 (text)")
    options.add_argument("--target", choices=("block", "ffn", "ffn_residual", "attention"), help="block (vision) or ffn")
    options.add_argument("--norm", choices=("layer", "instance", "none"), help="of each layer: layer, or instance (speech)")
    options.add_argument("--final_norm", choices=("layer", "instance", "none"), help="of their mean: layer (vision) or none")
    options.add_argument("--beta", type=float, help="of smooth L1: 2 (vision), 0 (speech), 4 (text)")
    args = parser.parse_args()
    target = Path(args.target)
    if not target.parent.is_dir():
        raise BadInput(f"{args.target}: cannot be written, its folder does not exist")
    asked = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in ("source", "target", "network", "letters", "classes")
    }
    if args.letters or args.classes:
        asked["classes"] = released.letters_of_file(args.letters) if args.letters else lines_of(args.classes)
    state = read(args.source, asked)
    origin = state.get("origin", "a checkpoint of this project" + (", fine-tuned" if "classes" in state else ""))
    if target.suffix in (".pt", ".pth"):
        notes = []
        common.save(target, state)
    else:
        foreign(check_whole, state, args.source)
        notes = hub.write(state, target, args.network)
    sizes = ("dim", "depth", "heads", "ffn", "patch", "image_size", "max_tokens", "top_k", "target", "norm", "beta")
    parts = [name for name in ("student", "teacher", "classes", "vocabulary") if state.get(name) is not None]
    print(
        f"{args.source}: {origin}; {', '.join(parts)}; "
        + ", ".join(f"{name} {state['config'][name]}" for name in sizes if name in state["config"])
    )
    for note in [*state.get("notes", []), *notes]:
        print(f"  {note}")
    print(f"-> {args.target}")


def lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


if __name__ == "__main__":
    common.run(main)

"""Checkpoints in and out: released data2vec weights, folders of the transformers library, and ours.

python -m tools.convert IN OUT.pt     a released .pt or .pth, or a folder -> a checkpoint of ours
python -m tools.convert IN OUT        any of these -> a folder for from_pretrained()
"""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import UserError, require
from data import text
from tools import hub, released, released2
from tools.released import table

OPTIONAL = ("encoder.norm.", "encoder.mask_embedding")  # targets do not depend on them; some files lack them


def read(path) -> dict:
    """A checkpoint or folder of any known origin -> what checkpoints of ours hold. Raises UserError.

    student, teacher  {name: tensor}; the teacher may be None
    config            sizes and targets, under the names of the train scripts' options
    classes, task     if fine-tuned: names of the outputs; images, letters, sounds or sentences
    vocabulary        text: what Vocabulary.parse takes, if the file has it or its files are beside it
    origin, notes     what it is; what was left out or differs, which is printed
    fresh             parts that it lacks by design: the head
    """
    path = Path(path)
    try:
        state = hub.read(path) if path.is_dir() else released.load(path)
        if not {"student", "teacher", "config"} <= state.keys():
            two = any(name.startswith("modality_encoders.") for name in table(state.get("model")))
            state = (released2 if two else released).read(state, path)
        state = {"origin": "checkpoint of ours", "notes": [], "fresh": []} | state
        if modality(state["config"]) == "text" and "vocabulary" not in state:
            add_vocabulary(state, path)
    except UserError:
        raise
    except Exception as error:  # what others wrote, or damage, can fail in any way
        raise UserError(f"{path}: not a checkpoint that can be read ({error!r:.150})") from error
    for note in state["notes"]:
        common.say(f"{path}: {note}")
    return state


def modality(config: dict) -> str:
    """vision, speech or text. LookupError for a config of something else."""
    marks = {"patch": "vision", "channels": "speech", "max_tokens": "text"}
    return [kind for name, kind in marks.items() if name in config][0]


def add_vocabulary(state: dict, path: Path) -> None:
    """Text: the vocabulary in the folder, or beside the file."""
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).exists() for name in ("vocab", "tokenizer.json", "merges.txt", "vocab.bpe")):
        state["notes"].append(f"{folder}: no vocabulary; put vocab.json and merges.txt there")
        return
    vocabulary, name = text.open_vocabulary(str(folder)), "encoder.embed.tokens.weight"
    size, rows = vocabulary.size, len(state["student"][name])
    if path.is_dir() and size < rows < size + 128:  # padded for speed, or for tokens of other uses
        state["notes"].append(f"left out: {rows - size} tokens without a name")
        state["student"][name] = state["student"][name][:size]
    else:
        require(size == rows, f"{folder}: a vocabulary of {size}, but {path} has {rows}")
    state["vocabulary"] = vocabulary.spell()


def init_run(cfg, student, teacher, vocabulary_text: str | None = None) -> None:
    """--init of a train script: loads the student; the teacher is the file's or a copy (--init_teacher)."""
    state, path = read(cfg.init), f"--init {cfg.init}"
    kind, wanted = modality(state["config"]), modality(vars(cfg))
    require(kind == wanted, f"{path}: a model of {kind}, but this script trains {wanted}")
    require("classes" not in state, f"{path}: fine-tuned; use a pre-trained checkpoint")
    common.check_same_model(cfg, state["config"], path)
    same = state.get("vocabulary") == vocabulary_text  # of --data; None unless this is text
    require(same, f"{path}: no vocabulary, or not that of --data; prepare the text with data.text --vocab")
    load_encoder(student, state, path, head=True)
    teacher.update(student.encoder, tau=0.0)
    if state["teacher"] and cfg.init_teacher == "teacher":
        load_encoder(teacher, state, path, "teacher")
    teacher.update(student.encoder, tau=1.0)  # shared parts are the student's


def load_encoder(model, state: dict, path, network: str = "student", head: bool = False) -> None:
    """state[network] of read() into model.encoder, positions interpolated; head: into all of the model."""
    weights, own, config = state[network], model.state_dict(), state["config"]
    require(weights, f"{path}: has no {network}")
    if model.encoder.embed.grid:
        weights = resize(weights, config["image_size"] // config["patch"], model.encoder.embed.grid[0])
    loaded = {name: own[name] for name in own if name.startswith(OPTIONAL)}
    for name, tensor in weights.items():
        if (name in own or not name.startswith(OPTIONAL)) and (head or name.startswith("encoder.")):
            loaded[name] = tensor
    fresh = state["fresh"] if head else {name.split(".")[0] for name in own} - {"encoder"}
    common.load_weights(model, loaded, path, tuple(fresh))


def resize(weights: dict, old: int, new: int) -> dict:
    """Vision: positions of old x old patches, interpolated (bicubic) to new x new."""
    resized = dict(weights)
    for name, tensor in weights.items() if old != new else ():
        if name.endswith("embed.learned"):
            resized[name] = resize_grid(tensor, old, new)
        elif name.endswith("embed.table"):  # ([L,] rows, H): a grid of offsets, then three rows that stay
            offsets = resize_grid(tensor[..., :-3, :], 2 * old - 1, 2 * new - 1)
            resized[name] = torch.cat([offsets, tensor[..., -3:, :]], dim=-2)
    return resized


def resize_grid(x, old: int, new: int):
    """([L,] old * old, D) -> ([L,] new * new, D)."""
    grid = x.reshape(-1, old, old, x.shape[-1]).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(*x.shape[:-2], new * new, x.shape[-1])


def main():
    parser = common.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint or folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="checkpoint of ours (.pt) or a new folder")
    parser.add_argument("--network", choices=("student", "teacher"), default="student", help="for a folder")
    args = parser.parse_args()
    state = read(args.source)
    if args.target.suffix in (".pt", ".pth"):
        common.save(args.target, state)
    else:
        hub.write(state, args.target, args.network)
    print(f"{args.source}: {state['origin']}\n-> {args.target}")


if __name__ == "__main__":
    common.run(main)

"""Weights from files of any origin; nothing in a file is ever run.

A checkpoint is a pickle, and a pickle may name any function of any library and have it called. Here a name is only looked up in
a short list (what makes tensors and plain containers). A name of Python's own library that is not in it is refused, since no
checkpoint needs to call one. All others become Records, which hold what the file says of them and can do nothing: released files
keep their options in objects of argparse, omegaconf and fairseq, which can so be read without these libraries.
"""

import _compat_pickle
import collections
import functools
import json
import os
import pickle
import re
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import BadInput

# ---- pickles -----------------------------------------------------------------------------------------------------------


class Record:
    """An object or the result of a call that was not made: the name of what would have made it, arguments, state, items."""

    name = ""

    def __new__(cls, *args, **options):
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *args, **options):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):  # of a kind of dict
        self.items.append((key, value))

    def append(self, value):  # of a kind of list
        self.items.append(value)

    def __call__(self, *args, **options):
        return Record(self, *args)


def bytes_of(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    return text.encode("latin1")


def number(dtype: Record, value: bytes):
    """A NumPy number, such as a learning rate: dtype is the Record of numpy.dtype("f8", ...), its state says the byte order."""
    order = dtype.state[1] if isinstance(dtype.state, tuple) and dtype.state[1] in ("<", ">") else "="
    if not re.fullmatch("[fiub][0-9]+", kind := str(dtype.args[0])):
        raise pickle.UnpicklingError(f"a NumPy number of kind {kind}")
    return np.frombuffer(value, order + kind)[0]


class Made:
    """What makes tensors and plain containers. A pickle may also set attributes of what it names: not of these."""

    __slots__ = ("make",)

    def __init__(self, make):
        self.make = make

    def __call__(self, *args):
        return self.make(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it asks to change what loads it")


CALLED = {  # all that is ever called
    "collections.OrderedDict": collections.OrderedDict, "collections.Counter": collections.Counter,
    "builtins.set": set, "builtins.frozenset": frozenset, "_codecs.encode": bytes_of, "torch.Size": torch.Size,
    "torch.device": torch.device, "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
} | {
    f"numpy.{core}.multiarray.scalar": number for core in ("core", "_core")
} | {
    f"torch._utils._rebuild_{name}": getattr(torch._utils, f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3")
}  # fmt: skip
MADE = {name: Made(make) for name, make in CALLED.items()}
MADE |= {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}  # called they are an error
KEPT = re.compile(  # names of Python's own library that options are made of, as Records like all that is foreign
    r"argparse\.Namespace|collections\.(defaultdict|deque)|copyreg\._reconstructor|pathlib\.\w+|_?operator\.getitem|typing\.\w+"
    r"|enum\.\w+|datetime\.\w+|functools\.partial|uuid\.UUID|decimal\.Decimal"
    r"|builtins\.(bool|bytearray|bytes|complex|dict|float|int|list|object|range|slice|str|tuple|type)"
)


@functools.cache
def record_of(name: str) -> type:
    return type(name, (Record,), {"name": name})


class InertUnpickler(pickle.Unpickler):
    """Makes tensors, plain containers and Records; torch adds what reads a tensor's numbers."""

    def find_class(self, module, name):
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
        if (full := f"{module}.{name}") in MADE:
            return MADE[full]
        if module.partition(".")[0] in sys.stdlib_module_names and not KEPT.fullmatch(full):
            raise pickle.UnpicklingError(f"it asks to call {full}, which no checkpoint needs; it was not called")
        return record_of(full)


def load(path: str | Path) -> dict:
    """Reads a checkpoint of torch.save, in its zip format or the one before, onto the CPU. Raises BadInput: one line."""
    reader = types.SimpleNamespace(
        __name__="inert", Unpickler=InertUnpickler, load=lambda file, **how: InertUnpickler(file, **how).load()
    )
    forced = os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)  # torch's own reader, which knows no Records
    try:
        if tarfile.is_tarfile(path):  # these two torch.load would read in ways of their own
            raise pickle.UnpicklingError("it is a tar archive")
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\3\4"  # how torch.load tells; zipfile can be led to another opinion
        if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise pickle.UnpicklingError("it is a TorchScript program")
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)  # safe by what the reader makes
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path}: damaged, or not a checkpoint that can be read safely: {reason(error)}") from None
    except Exception as error:  # readers raise nearly anything on bytes that are no checkpoint
        raise BadInput(f"{path}: damaged, or not a checkpoint ({reason(error)})") from None
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def reason(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def plain(x, depth: int = 0, left: list[int] | None = None):
    """Options as nested dicts, lists and values: what argparse, omegaconf, enums and dataclasses keep, without their classes.

    left  [how many values may still come]; few nested lists that hold each other twice would make more than any memory holds
    """
    left = [2_000_000] if left is None else left
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("options without end")
    if depth > 50:
        return None
    if isinstance(x, dict):
        return {key: plain(value, depth + 1, left) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value, depth + 1, left) for value in x]
    if not isinstance(x, Record):
        return x
    if isinstance(x.state, dict):  # omegaconf: containers and leaves; what else they keep leads back to where one is
        inner = next((x.state[name] for name in ("_content", "_val") if name in x.state), x.state)
        return plain(inner, depth + 1, left)
    if x.items:
        return plain(dict(x.items) if isinstance(x.items[0], tuple) else x.items, depth + 1, left)
    return plain(x.args[0], depth + 1, left) if len(x.args) == 1 else None  # an enum is made of its value


def tensors(weights, path: str | Path, what: str = "weights") -> dict[str, Tensor]:
    """{name: tensor} in float32 where floating point. Raises BadInput if anything in it is no tensor, or if it is no dict."""
    if not isinstance(weights, dict) or not weights:
        raise BadInput(f"{path}: its {what} are not a table of names and tensors")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            kind = (
                f"what {tensor.name or 'a call'} would make, which was not run"
                if isinstance(tensor, Record)
                else type(tensor).__name__
            )
            raise BadInput(f"{path}: its {what} hold no tensor but {kind} as {name}; not a file to trust")
    return {str(name): tensor.detach().float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


# ---- folders of the transformers library ---------------------------------------------------------------------------------


def load_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: model.safetensors or pytorch_model.bin, or the parts that their index lists. Raises BadInput."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return load_part(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            table = read_json(index).get("weight_map")
            parts = sorted({str(part) for part in table.values()}) if isinstance(table, dict) else []
            if wrong := [part for part in parts if Path(part).name != part] or ["nothing"] * (not parts):
                raise BadInput(f"{index}: {wrong[0]} is no file of its folder")
            return {key: tensor for part in parts for key, tensor in load_part(folder / part).items()}
    raise BadInput(f"{folder}: neither model.safetensors nor pytorch_model.bin in it; give the folder that save_pretrained wrote")


def load_part(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return tensors(load(path), path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise BadInput(f"{path}: reading it takes the safetensors library; pip install safetensors") from None
    try:
        return tensors(load_file(path), path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except BadInput:
        raise
    except Exception as error:  # of the library's own
        raise BadInput(f"{path}: damaged, or no safetensors file ({reason(error)})") from None


def read_json(path: Path) -> dict:
    """A .json that holds a table. Raises BadInput."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({reason(error)})") from None
    if not isinstance(table, dict):
        raise BadInput(f"{path}: holds no table of options")
    return table

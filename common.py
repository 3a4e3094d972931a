"""Plumbing that nobody ablates: options, processes, run folder, checkpoints, metric lines, exit codes."""

import argparse
import functools
import json
import math
import os
import pickle
import platform
import resource
import sys
from dataclasses import field, fields
from pathlib import Path

import torch
import torch.distributed as dist


class BadInput(Exception):
    """The user's input cannot be used; the message is one line: which file or option, what is wrong, what to do."""


def run(main) -> None:
    """Calls main(). Exit status 0; 2 and one line for BadInput; 130 for Ctrl-C; 1 for anything else."""
    try:
        main()
    except (BadInput, argparse.ArgumentError) as error:
        if os.environ.get("RANK", "0") == "0":
            message = str(error).strip().splitlines()[-1].removeprefix("common.BadInput: ")  # torch wraps a worker's error
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line option; a default [] takes any number of values."""
    value = {"default_factory": list} if default == [] else {"default": default}
    return field(**value, metadata={"help": help, "choices": choices, "kind": type(default)})


def read_value(kind: type, text: str):
    """The text of an option as bool, int (1e5 too), float (finite) or str. Raises ValueError."""
    if kind in (str, list):
        return text
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    if not math.isfinite(number := float(text)) or kind is int and number != int(number):
        raise ValueError
    return kind(number)


def parse(config_class, presets: dict[str, dict], about: str, family: str):
    """Command line -> config. Later wins: defaults, preset, the run's own config.json with --resume, `--key value`."""
    names = [f.name for f in fields(config_class)]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    for f in fields(config_class):
        kind = f.metadata["kind"]
        read = functools.partial(read_value, kind)
        read.__name__ = kind.__name__  # argparse names it in its message
        count = {bool: {"nargs": "?", "const": True}, list: {"nargs": "*"}}.get(kind, {})
        parser.add_argument(f"--{f.name}", type=read, choices=f.metadata["choices"], default=argparse.SUPPRESS, **count)
    given, unknown = parser.parse_known_args()
    given = vars(given)
    help_wanted = given.pop("help", False)
    if unknown:
        raise BadInput(f"unknown option {unknown[0]}; the options are " + " ".join(f"--{name}" for name in names))
    preset = given.get("preset", next(iter(presets)))
    given.setdefault("out", default_folder(f"{family}-{preset}", given.get("resume", False)))
    stored = Path(given["out"]) / "config.json"
    if given.get("resume") and stored.exists():
        old = {k: v for k, v in json.loads(stored.read_text()).items() if k in names}
        presets, preset = presets | {old["preset"]: old}, given.get("preset", old["preset"])
    if preset not in presets:
        raise BadInput(f"--preset {preset}: no such preset; choose from {', '.join(presets)}")
    config = config_class(**{"preset": preset} | presets[preset] | given)
    if help_wanted:
        print(f"{about}\npresets: {', '.join(presets)}\noptions, with their values in preset {preset}:")
        for f in fields(config_class):
            print(f"  --{f.name} {getattr(config, f.name)}".ljust(30), f.metadata["help"])
        sys.exit(0)
    return config


def check_range(config, low: float, high: float, names: str) -> None:
    """Raises BadInput unless each of the named options lies in [low, high]."""
    for name in names.split():
        if not low <= getattr(config, name) <= high:
            raise BadInput(f"--{name} {getattr(config, name)}: must be " + (f"at least {low}" if high == math.inf else f"between {low} and {high}"))


def default_folder(name: str, resume: bool) -> str:
    """runs/NAME, or the first free of runs/NAME-2, -3, ...; with resume the last one that exists."""
    folders = [Path("runs", name if i == 1 else f"{name}-{i}") for i in range(1, 1000)]
    free = next(i for i, folder in enumerate(folders) if not folder.exists())
    return str(folders[max(free - 1, 0) if resume else free])


def start_processes(device: str) -> tuple[int, int, torch.device]:
    """Joins torchrun's process group, if there is one -> rank, world size, this process's device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here; take --device cpu")
    device = torch.device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches an update, so that any number of processes trains on the user's global batch. Raises BadInput."""
    count = math.ceil(global_batch / (world * (micro_batch or global_batch)))
    if global_batch % (world * count):
        raise BadInput(f"--global_batch {global_batch}: does not split into {world} processes x {count} micro-batches; take a multiple of {world * count}")  # fmt: skip
    return count


def gather(value) -> list:
    """The picklable value of every rank, in order of rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def bfloat16_wanted(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16; auto: where the hardware multiplies it natively."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability() >= (8, 0)
    return dtype == "bfloat16" or dtype == "auto" and fast


def open_run(out: str, config: dict, resume: bool, rank: int) -> Path:
    """Creates the run's folder with config.json; refuses a folder that already holds a run, unless resuming."""
    folder = Path(out)
    if not resume and any((folder / name).exists() for name in ("config.json", "ckpt.pt", "metrics.jsonl")):
        raise BadInput(f"--out {out}: already holds a run; continue it with --resume, or take another folder")
    gather(None)  # no rank writes before all have looked
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {out}: cannot make this folder ({error.strerror})") from None
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(folder / "config.json", config | {"versions": versions, "command": " ".join(sys.argv)})
    return folder


def write_json(path: Path, value) -> None:
    replace(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def replace(path: Path, write) -> None:
    """Writes a file that is always whole: under a temporary name first, then renamed over the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path: Path, **state) -> None:
    replace(path, lambda file: torch.save(state, file))


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU; only tensors and plain containers, so that nothing in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise BadInput(f"{path}: damaged, or not a checkpoint that can be read safely ({reason})") from None


def rng_state(device: torch.device) -> dict:
    """This process's random state (dropout, drop path); gather() it over ranks into the checkpoint."""
    return {"cpu": torch.get_rng_state()} | ({"gpu": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def set_rng_state(states: list[dict], rank: int, device: torch.device) -> None:
    """Restores this rank's state; processes that the interrupted run did not have keep their fresh seed."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and "gpu" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["gpu"])


def log(folder: Path, row: dict) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def trim_log(folder: Path, step: int) -> None:
    """Drops metric lines after `step` (a resumed run writes them again) and one that was cut short."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    replace(path, lambda file: file.write("".join(line + "\n" for line in kept).encode()))


def peak_memory_gb(device: torch.device) -> float:
    """The largest memory of this process so far: the GPU's when it trains there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**30

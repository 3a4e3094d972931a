"""Plumbing that nobody ablates: options, processes, run folder, checkpoints, metric lines, exit codes.
Plain functions; nothing here knows what data2vec is."""

import argparse
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
        if dist.is_initialized():
            dist.destroy_process_group()
    except (BadInput, argparse.ArgumentError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- options: a dataclass, a preset, then --key value ----------------------------------------------------------------


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line option. A list default takes any number of values."""
    kwargs = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kwargs, metadata={"help": help, "choices": choices, "kind": type(default)})


def _reader(kind: type):
    def read(text: str):
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = int(float(text)) if kind is int and float(text).is_integer() else kind(text)  # 1e5 is an int
        return value if kind is str or math.isfinite(value) else kind("finite number wanted")

    def checked(text: str):
        try:
            return read(text)
        except (KeyError, ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'true or false' if kind is bool else kind.__name__}") from None  # fmt: skip

    return checked


def parse(config_class, presets: dict[str, dict], about: str, family: str):
    """Command line -> config. Later wins: defaults, preset, the run's own config.json with --resume, `--key value`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    for f in fields(config_class):
        kind = f.metadata["kind"]
        nargs = {bool: {"nargs": "?", "const": True}, list: {"nargs": "*"}}.get(kind, {})
        parser.add_argument(f"--{f.name}", type=_reader(str if kind is list else kind), default=argparse.SUPPRESS,
                            choices=f.metadata["choices"], **nargs)  # fmt: skip
    given, unknown = parser.parse_known_args()
    given, known = vars(given), [f.name for f in fields(config_class)]
    if unknown:
        raise BadInput(f"unknown option {unknown[0]}; the options are " + " ".join(f"--{name}" for name in known))
    preset = given.get("preset", next(iter(presets)))
    if preset not in presets:
        raise BadInput(f"--preset {preset}: no such preset; choose from {', '.join(presets)}")
    given.setdefault("out", _default_folder(f"{family}-{preset}", given.get("resume", False)))
    stored = Path(given["out"]) / "config.json"
    if given.get("resume") and stored.exists():
        stored = {k: v for k, v in json.loads(stored.read_text()).items() if k in known}
        presets, preset = {**presets, stored["preset"]: stored}, given.get("preset", stored["preset"])
    config = config_class(**{"preset": preset, **presets[preset], **{k: v for k, v in given.items() if k != "help"}})
    if "help" in given:
        print(f"{about}\n\nPresets: {', '.join(presets)}. Values of preset {preset}:\n")
        for f in fields(config_class):
            print(f"  --{f.name} {getattr(config, f.name)}".ljust(32), f.metadata["help"])
        sys.exit(0)
    return config


def _default_folder(name: str, resume: bool) -> str:
    """runs/NAME, or the first free runs/NAME-2, -3, ...; with resume the last one that exists."""
    folders = [Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000)]
    free = next(i for i, folder in enumerate(folders) if not folder.exists())
    return str(folders[max(free - 1, 0) if resume else free])


# ---- processes ---------------------------------------------------------------------------------------------------------


def start_processes(device: str) -> tuple[int, int, torch.device]:
    """Joins torchrun's process group, if there is one -> rank, world size, this process's device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here; take --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def gather(value) -> list:
    """The picklable value of every rank, in order of rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32


# ---- the run's folder: config.json, metrics.jsonl, ckpt.pt, results.json -----------------------------------------------


def open_run(out: str, config: dict, resume: bool, rank: int) -> Path:
    """Creates the run's folder and writes config.json; refuses a folder that already holds a run, unless resuming."""
    folder = Path(out)
    if not resume and any((folder / name).exists() for name in ("config.json", "ckpt.pt", "metrics.jsonl")):
        raise BadInput(f"--out {out}: already holds a run; continue it with --resume, or take another folder")
    gather(None)  # no rank looks before another has written
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {out}: cannot make this folder ({error.strerror})") from None
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(folder / "config.json", {**config, "versions": versions, "command": " ".join(sys.argv)})
    return folder


def write_json(path: Path, value) -> None:
    """Writes a file that is always whole: to a temporary name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def save(path: Path, **state) -> None:
    """Writes a checkpoint of tensors and plain containers; a crash in the middle leaves the previous one intact."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU. Only tensors and plain containers are read: nothing in the file is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint") from None
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path}: not a checkpoint that can be read safely, or damaged ({reason})") from None


def rng_state(device: torch.device) -> dict:
    """This process's random state, for dropout and drop path; gather() it over ranks into the checkpoint."""
    return {"cpu": torch.get_rng_state()} | ({"gpu": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def set_rng_state(states: list[dict], rank: int, device: torch.device) -> None:
    """Restores this rank's state; a run resumed with more processes keeps the fresh seeds of the new ones."""
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and "gpu" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["gpu"])


def log(folder: Path, row: dict) -> None:
    """Appends one line to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def trim_log(folder: Path, step: int) -> None:
    """Drops the metric lines after `step`, which the resumed run will write again."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in lines))


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory of this process so far: the GPU's when training there, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

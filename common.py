"""Plumbing that nobody ablates: options, processes, the run's folder, checkpoints, metric lines, exit codes."""

import argparse
import atexit
import json
import math
import os
import resource
import sys
import traceback
from dataclasses import field, fields
from pathlib import Path

import torch
import torch.distributed as dist


class BadInput(Exception):
    """The user's input cannot be used; the message is one line: which file or option, what is wrong, what to do."""


def run(main) -> None:
    """Calls main(). Exit status 0; 2 and one line for input that cannot be used; 130 for Ctrl-C; 1 otherwise."""
    status = 1
    try:
        main()
        gather(None)  # torchrun's processes leave together: none before the others have all they need from it
        status = 0
    except (BadInput, argparse.ArgumentError, FileExistsError, NotADirectoryError, PermissionError) as error:
        traceback.clear_frames(error.__traceback__)  # closes a progress bar, which ends its line
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a machine
            line = str(error).strip().splitlines()[-1].removeprefix("common.BadInput: ")  # torch wraps a worker's
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(status := 2)
    except KeyboardInterrupt:
        sys.exit(status := 130)
    finally:
        if dist.is_initialized():  # gloo's threads can hang or abort an orderly exit
            atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(status)))


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line option, of the default's type; [] takes one or more words."""
    kind = type(default)

    def read(text: str):
        if kind in (str, list, bool):
            return bool(("false", "true").index(text.lower())) if kind is bool else text
        if not math.isfinite(number := float(text)) or kind is int and number != int(number):  # 1e5 is an int too
            raise ValueError
        return int(text) if kind is int and text.isdigit() else kind(number)
    read.__name__ = kind.__name__  # argparse names it in its message
    flag = {"type": read, "choices": choices} | {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(kind, {})
    return field(default_factory=lambda: kind(default), metadata={"help": help, "kind": kind, "flag": flag})


def parse(config_class, presets: dict[str, dict], about: str, family: str):
    """Command line -> config. Later wins: defaults, preset, the run's own config.json with --resume, `--key value`."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    for f in fields(config_class):
        parser.add_argument(f"--{f.name}", **f.metadata["flag"] | ({"choices": presets} if f.name == "preset" else {}))
    given, unknown = parser.parse_known_args()
    if unknown:
        raise BadInput(f"unknown option {unknown[0]}; the options are " + " ".join(f"--{f.name}" for f in fields(config_class)))
    given, preset = vars(given), getattr(given, "preset", next(iter(presets)))
    stored = Path(given.setdefault("out", f"runs/{family}-{preset}"), "config.json")
    if given.get("resume") and stored.exists():
        try:
            known = vars(config_class()) | json.loads(stored.read_text())  # an option that is newer than the run: its default
            old = {f.name: f.metadata["kind"](known[f.name]) for f in fields(config_class)}
        except (ValueError, TypeError) as error:
            raise BadInput(f"{stored}: damaged or of another version ({error!r}); mend it or start anew") from None
        presets, preset = presets | {old["preset"]: old}, given.get("preset", old["preset"])
    config = config_class(**{"preset": preset} | presets[preset] | {k: v for k, v in given.items() if k != "help"})
    if "help" in given:
        print(f"{about}\npresets: {', '.join(presets)}\noptions, with their values in preset {preset}:")
        print("\n".join(f"  --{f.name} {getattr(config, f.name)}".ljust(30) + " " + f.metadata["help"] for f in fields(config)))
        sys.exit(0)
    return config


def check_range(config, low: float, high: float, names: str) -> None:
    """Raises BadInput unless each of the named options lies in [low, high]."""
    for name in names.split():
        if not low <= (value := getattr(config, name)) <= high:
            raise BadInput(f"--{name} {value}: must be at least {low}" + (f", at most {high}" if high < math.inf else ""))


def start_processes(device: str, dtype: str) -> tuple[int, int, torch.device, torch.autocast]:
    """Joins torchrun's process group, if any -> rank, world size, device, autocast (auto: bfloat16 if native)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here; take --device cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.cuda.set_device(place) if cuda else None
    native = torch.cuda.get_device_capability() >= (8, 0) if cuda else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    autocast = torch.autocast(place.type, torch.bfloat16, enabled=dtype == "bfloat16" or dtype == "auto" and native)
    dist.init_process_group("nccl" if cuda else "gloo") if "RANK" in os.environ else None
    torch.multiprocessing.set_start_method("fork", force=True) if hasattr(os, "fork") else None  # datasets hold closures
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), place, autocast


def gather(value) -> list:
    """The picklable value of every rank, in order of rank."""
    values = [value] * int(os.environ.get("WORLD_SIZE", 1))
    dist.all_gather_object(values, value) if dist.is_initialized() else None
    return values


def open_run(out: str, config: dict, resume: bool, rank: int) -> Path:
    """Makes the run's folder and its config.json; refuses a folder with results of a run, unless resuming."""
    folder, kept = Path(out), [Path(out, name) for name in ("ckpt.pt", "metrics.jsonl", "results.json")]
    if rank == 0:
        if not resume and any(path.exists() and path.stat().st_size for path in kept):  # a failed start leaves config.json
            raise BadInput(f"--out {out}: already holds a run; continue it with --resume, or choose another --out")
        print(f"--resume: no ckpt.pt in {out}, so this starts at step 0") if resume and not kept[0].exists() else None
        folder.mkdir(parents=True, exist_ok=True)
        about = {"versions": {"python": sys.version.split()[0], "torch": torch.__version__}, "command": " ".join(sys.argv)}
        save(folder / "config.json", config | about)
    return folder


def save(path: Path, state: dict | str) -> None:
    """Writes text, .json or a checkpoint under a temporary name, then renames: a crash leaves the previous file whole."""
    temporary, text = path.with_name(path.name + ".tmp"), json.dumps(state, indent=2) if path.suffix == ".json" else state
    temporary.write_text(text) if isinstance(text, str) else torch.save(state, temporary)
    os.replace(temporary, path)


def rng_state(device: torch.device, restore: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """This process's random state (dropout, drop path), after restoring one; gather() it over ranks to save it."""
    sources = [torch, torch.cuda][: 1 + (device.type == "cuda")]
    for source, state in zip(sources, restore or []):
        source.set_rng_state(state)
    return [source.get_rng_state() for source in sources]


def open_metrics(folder: Path, step: int):
    """metrics.jsonl, opened to append lines; those after `step`, which a resumed run writes again, are dropped."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    save(path, "".join(f"{s}\n" for s in lines if s.endswith("}") and json.loads(s)["step"] <= step))
    return open(path, "a", buffering=1)  # a line is on disk when it is written


def peak_memory_gb(device: torch.device) -> float:
    """The largest memory of this process so far: the GPU's when it trains there, else resident memory."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else kilobytes / 2**20

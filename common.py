"""Plumbing that nobody ablates: options, processes, learning rate, checkpoints, a run's folder and log."""

import argparse
import atexit
import copy
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

HINT = "try a smaller --lr, a longer --warmup, a larger --tau_0, --norm instance or --dtype float32"
COLLAPSED = {"target_std": 0.1, "pred_std": 0.01}  # a run with less has collapsed (released speech code)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
received = []  # signals that ask a run to save and stop
DEVICES, DTYPES = ("auto", "cpu", "cuda", "mps"), ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """Wrong input from a person. The message is one line: which option or file, what is wrong, what to do."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def run(main):
    """Calls main(). Exit status: 0; 2 after a UserError, told in one line; 128 + n after signal n; else 1."""
    status = 1
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    try:
        main()
        gather(None)  # torchrun ends all processes when the first one leaves, so they leave together
        status = 0
    except UserError as error:
        status = 2
        line = str(error).strip().splitlines()[-1]  # torch puts a traceback before what a worker raised
        if first_process():
            print(f"{Path(sys.argv[0]).name}: {line.removeprefix('common.UserError: ')}", file=sys.stderr)
    except ModuleNotFoundError as error:
        status = 2
        print(f"{error}: pip install -r requirements-dev.txt", file=sys.stderr)
    except KeyboardInterrupt as stop:  # its argument: another signal
        status = 128 + (stop.args or [signal.SIGINT])[0]
    finally:
        for worker in [child for child in multiprocessing.active_children() if child.daemon]:
            with suppress(RuntimeError):  # torch watches the workers of a loader, which ignore signals
                worker.kill()
                worker.join()
        if dist.is_initialized():  # gloo's threads can hang an orderly exit
            atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(status)))
    sys.exit(status)


# ---- options ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")

    def split(self):  # options, and the words after --, which are another script's
        at = [*sys.argv, "--"].index("--")
        return self.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]


def option(default, help, choices=None, min_=-math.inf, max_=math.inf):
    """A dataclass field that is a command-line option of the default's type (bool, int, float, str, list)."""
    kind = type(default)

    def read(text):
        if kind is bool:
            return bool(("false", "true").index(text.lower()))
        if kind in (str, list):
            return text
        number = int(text) if text.isdigit() else float(text)
        if not math.isfinite(number) or kind(number) != number:  # a fraction is no int, while 1e5 is one
            raise ValueError
        if not min_ <= number <= max_:
            raise argparse.ArgumentTypeError(f"{text} is not between {min_:g} and {max_:g}")
        return kind(number)

    read.__name__ = kind.__name__  # argparse shows it
    shape = {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(kind, {})
    flag = {"type": read, "choices": choices, "help": help} | shape
    return field(default_factory=lambda: copy.copy(default), metadata=flag)


@dataclass
class RunConfig:
    preset: str = option("smoke", "named set of values for the options below")
    data: str = option("", "folder of data; empty: a small data set made on the spot, no download")
    out: str = option("", "folder of this run; empty: runs/, with a name from the preset")
    resume: bool = option(False, "continue the run in --out from its ckpt.pt")
    init: str = option("", "checkpoint to start from: ours, released, or a folder of transformers")
    steps: int = option(1000, "optimiser steps (updates); all schedules end here", min_=1)
    seed: int = option(0, "seed of weights, order, augmentation and masks", min_=0)
    device: str = option("auto", "auto takes the GPU if there is one", DEVICES)
    dtype: str = option("auto", "autocast; auto: bfloat16 if native, or float16 on older GPUs", DTYPES)
    compile: bool = option(False, "torch.compile the encoders")
    workers: int = option(2, "data-loading processes of each training process; 0: in the loop", min_=0)
    log_every: int = option(10, "steps between lines of metrics.jsonl", min_=1)
    save_every: int = option(500, "steps between checkpoints; 0: only at the end", min_=0)
    probe_every: int = option(1000, "steps between evaluations; 0: only at the start and the end", min_=0)


def parse(config_class, presets, description, family):
    """Command line -> config. Later wins: defaults, preset, with --resume the run's config.json, options."""
    parser = Parser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    options = [f for f in fields(config_class) if f.metadata]  # presets and files alone set other fields
    for f in options:
        parser.add_argument(f"--{f.name}", **f.metadata)
    given = vars(parser.parse_args())
    preset, show_help = given.get("preset", next(iter(presets))), given.pop("help", False)
    require(preset in presets, f"--preset {preset}: not one of {', '.join(presets)}")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not given.get("eval_only"):
        given["resume"] = True  # torchrun has started this run again
    stored = Path(given.setdefault("out", f"runs/{family}-{preset}"), "config.json")
    values = {"preset": preset} | presets[preset]
    if given.get("resume") and stored.exists():
        try:
            kept = json.loads(stored.read_text())
        except ValueError as error:
            raise UserError(f"{stored}: damaged ({error}); repair it, or use another --out") from None
        kept = {f.name: kept[f.name] for f in fields(config_class) if f.name in kept}
        values = kept | (values if "preset" in given else {})
    cfg = config_class(**(values | given))
    if show_help:
        print(f"{description}\npresets: {', '.join(presets)}\noptions, and their values in preset {preset}:")
        for f in options:
            print(f"  --{f.name} {getattr(cfg, f.name)}".ljust(30), f.metadata["help"])
        sys.exit(0)
    return cfg


def check_sizes(cfg):
    """UserError if the model's sizes do not go together."""
    require(cfg.dim % cfg.heads == 0, f"--heads {cfg.heads}: must divide --dim {cfg.dim}")
    require(cfg.top_k <= cfg.depth, f"--top_k {cfg.top_k}: there are only --depth {cfg.depth} layers")


def accumulation_steps(global_batch, micro_batch, world):
    """Micro-batches of a process in an update, of at most micro_batch samples (0: any)."""
    count = math.ceil(global_batch / (world * (micro_batch or global_batch)))
    split = f"{world} processes x {count} micro-batches; use a multiple of {world * count}"
    even = global_batch % (world * count) == 0
    require(even, f"--global_batch {global_batch}: does not split into {split}")
    return count


def lr_at(step, cfg):
    """Learning rate at step 1 .. cfg.steps; warmup and decay are fractions of them. A linear warm-up to lr,
    then a cosine, linear, or tri_stage (hold, then decay exponentially) down to final_scale * lr."""
    warmup, final = round(cfg.warmup * cfg.steps), cfg.final_scale
    if step <= warmup:
        return cfg.lr * step / warmup
    t = (step - warmup) / (cfg.steps - warmup)
    if cfg.schedule == "cosine":
        return cfg.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t)))
    if cfg.schedule == "linear":
        return cfg.lr * (final + (1 - final) * (1 - t))
    decay = round(cfg.decay * cfg.steps)
    return cfg.lr * final ** (max(0, step - (cfg.steps - decay)) / max(decay, 1))


def due(step, every, steps):
    """At every `every`-th step (0: none) and at the last one."""
    return step == steps or (every > 0 and step % every == 0)


# ---- processes -------------------------------------------------------------------------------------------


def start_processes(device, dtype):
    """Joins torchrun's process group, if there is one -> rank, processes, device, autocast, grad scaler."""
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        except ValueError as error:
            raise UserError(f"RANK is set, but not its whole group ({error}); use torchrun") from None
    group = dist.is_initialized()
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        count = os.environ.get(name) or "1"
        require(group or count == "1", f"{name} is {count}, but RANK is not set; use torchrun, or unset it")
    rank, world = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    kind = found if device == "auto" else device
    require(kind in ("cpu", found), f"--device {kind}: torch finds no such device; use --device {found}")
    device, best = torch.device(kind), "float32"
    if kind == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        require(local < count, f"--device cuda: process {local}, {count} GPUs; use --nproc_per_node={count}")
        device = torch.device(kind, local)
        torch.cuda.set_device(device)
        generation, _ = torch.cuda.get_device_capability()
        best = "bfloat16" if generation >= 8 else "float16" if generation == 7 else "float32"
    elif kind == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        best = "bfloat16"
    dtype = best if dtype == "auto" else dtype
    half = torch.float16 if dtype == "float16" else torch.bfloat16
    autocast = torch.autocast(kind, half, enabled=dtype != "float32")
    return rank, world, device, autocast, torch.amp.GradScaler(kind, enabled=dtype == "float16")


def first_process():
    """Is this the process that prints?"""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def say(line):
    """Prints a line, once for all processes."""
    if first_process():
        print(line)


def gather(value):
    """The (picklable) value of every process, in order of rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_reduce(x, op=dist.ReduceOp.SUM):
    """The tensor x, summed over all processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def to_device(batch, device):
    """A batch with its tensors on the device; all else stays as it is."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def optimizer_step(optimizer, scaler, network, clip):
    """Clips the gradients and steps -> their norm; None if float16 overflowed: only the scale moved."""
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    require(scale > 1e-3, f"--dtype float16: gradients are finite at no scale: the run has diverged; {HINT}")
    return grad_norm if scaler.get_scale() >= scale else None


# ---- checkpoints -----------------------------------------------------------------------------------------


@contextmanager
def writing(path):
    """UserError for what cannot be written in this block."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        raise UserError(f"{path}: cannot be written ({error}); make room, or use another folder") from None


@contextmanager
def whole(path):
    """Yields where to write a file or folder, which then becomes `path`: what was there stays until then."""
    new = path.with_name(f"new-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            os.replace(new, path)
        finally:
            shutil.rmtree(new) if new.is_dir() else new.unlink(missing_ok=True)


def save(path, state):
    """Writes text, .json or a checkpoint; the old file stays until the new one is whole."""
    with whole(path) as new:
        if isinstance(state, str) or path.suffix == ".json":
            text = state if isinstance(state, str) else json.dumps(state, indent=2)
            new.write_text(text, encoding="utf-8")
        else:
            torch.save(state, new)


def load(path):
    """A checkpoint of ours, on the CPU. UserError if it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise nearly anything on bytes that are no checkpoint
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{path}: missing, damaged, or not a checkpoint of ours ({reason})") from None


def load_weights(module, weights, path, fresh=()):
    """Loads all weights; UserError with the names of those that do not fit. `fresh` parts may stay new."""
    own = module.state_dict()
    weights = {name: own[name] for name in own if name.split(".")[0] in fresh} | weights
    wrong = sorted(own.keys() ^ weights.keys())
    wrong = wrong or [name for name in own if own[name].shape != weights[name].shape]
    require(not wrong, f"{path}: does not fit this model; see {', '.join(wrong[:5])}")
    module.load_state_dict(weights)


def check_same_model(cfg, config, path):
    """UserError if a checkpoint's config differs in what the shapes of its weights do not tell."""
    for name in [name for name in ("heads", "norm_eps", "deep_norm", "objective") if hasattr(cfg, name)]:
        other = config.get(name, getattr(cfg, name))
        require(other == getattr(cfg, name), f"{path}: was trained with --{name} {other}; use the same")
    two = bool(config.get("masks"))
    require(two == bool(getattr(cfg, "masks", two)), f"{path}: is{'' if two else ' not'} data2vec 2.0")


def load_run(cfg, rank, student, teacher, optimizer, scaler):
    """With --resume, ckpt.pt of --out, loaded into all of these; {"step": 0} if there is none."""
    path = Path(cfg.out, "ckpt.pt")
    if not cfg.resume or not path.exists():
        return {"step": 0}
    state = load(path)
    check_same_model(cfg, state["config"], path)
    load_weights(student, state["student"], path)
    if teacher is not None:
        load_weights(teacher, state["teacher"], path)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, options):
        group |= own  # weight decay and betas of this command, not of the file
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    if rank < len(state["rng"]):
        for source, value in zip(random_states(next(student.parameters()).device), state["rng"][rank]):
            source.set_rng_state(value)
    return state


def random_states(device):
    """The modules of torch that hold the random state of a process."""
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


class Log:
    """A run's folder and its progress bar, or lines without a terminal. unit: what advance() counts."""

    def __init__(self, cfg, step, rank, device, unit):
        self.cfg, self.rank, self.device, self.unit, self.folder = cfg, rank, device, unit, Path(cfg.out)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell starts what runs in the background
                signal.signal(number, ask_to_stop)
        self.first, self.last, self.skipped, self.count = {}, {}, set(), 0
        self.scored = -1  # step of the last line with scores
        if rank == 0:
            self.open_folder(step)
        self.bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=True if rank else None)
        self.now = self.marked = time.time()
        self.started = self.now - self.last.get("seconds", 0.0)

    def open_folder(self, step):
        """Refuses a folder in use or, unless resuming, with a run; drops metrics after `step`."""
        metrics = self.folder / "metrics.jsonl"
        for path in (self.folder / "ckpt.pt", metrics, self.folder / "results.json"):
            new = self.cfg.resume or not path.exists() or path.stat().st_size == 0
            require(new, f"--out {self.folder}: holds a run; add --resume, or use another --out")
        with writing(f"--out {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(metrics, "ab+", buffering=0)  # noqa: SIM115  on disk when written
        try:
            if fcntl:  # not on Windows; the lock ends with this process
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # others: a file system without locks
            taken = error.errno in (errno.EAGAIN, errno.EACCES)
            require(not taken, f"--out {self.folder}: a live process writes to it; use another --out")
        about = {"python": sys.version, "torch": torch.__version__, "command": " ".join(sys.argv)}
        save(self.folder / "config.json", asdict(self.cfg) | about)
        self.file.seek(0)  # another opened and closed file would end the lock
        kept = 0  # bytes
        for line in self.file.read().splitlines(True):
            if not line.endswith(b"}\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
            self.keep(json.loads(line))
        self.file.truncate(kept)

    def keep(self, line):
        self.first = line if line["step"] == 0 else self.first
        self.scored = line["step"] if self.first.keys() <= line.keys() else self.scored
        self.last = (self.last if self.last.get("step") == line["step"] else {}) | line

    def watch(self, batches):
        """Yields the batches; reports their skipped samples."""
        for batch in batches:
            self.report(batch.get("skipped", ()))
            yield batch

    def report(self, skipped):
        """Names the first ten samples that were skipped, each once; those of other processes at the end."""
        new, room = sorted(set(skipped) - self.skipped), max(0, 10 - len(self.skipped))
        self.skipped |= set(new)
        for line in new[:room] if self.rank == 0 else ():
            self.bar.write(f"skipped {line}")

    def advance(self, count):
        """One step is done, with `count` units (a number or scalar tensor) in all processes."""
        self.bar.update()
        self.count, self.now = self.count + count, time.time()

    def due(self, step):
        every = (self.cfg.log_every, self.cfg.save_every, self.cfg.probe_every)
        return step == 1 or any(due(step, n, self.cfg.steps) for n in every)

    def write(self, step, metrics, scores=None):
        """A line of metrics.jsonl: metrics (numbers, scalar tensors) averaged over processes, and scores."""
        scores = scores or {}
        if metrics:
            values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
            metrics = dict(zip(metrics, (all_reduce(values) / len(gather(None))).tolist()))
            self.check_health(step, metrics)
            metrics[f"{self.unit}_per_s"] = float(self.count) / max(self.now - self.marked, 1e-9)
        if self.rank == 0:
            line = {"step": step} | metrics | {"seconds": time.time() - self.started} | scores
            self.append(line)
            self.keep(line)
            text = ", ".join(f"{name} {value:.4g}" for name, value in (scores or metrics).items())
            if self.bar.disable or scores:
                self.bar.write(f"step {step}: {text}")
            else:
                self.bar.set_postfix_str(text)
        self.marked, self.count = time.time(), 0
        self.started = self.started if step else self.marked

    def append(self, line):
        """A line of metrics.jsonl, whole or not at all."""
        data, end = json.dumps(line).encode() + b"\n", self.file.seek(0, os.SEEK_END)
        with writing(self.file.name):
            if self.file.write(data) < len(data):
                self.file.truncate(end)
                raise OSError("no space left")

    def checkpoint(self, step, student, teacher, optimizer, scaler, **more):
        """ckpt.pt, all that --resume needs, if it is due or a signal asks to stop, which then ends the run.
        All processes call this after each step; the first one writes."""
        stop = all_reduce(torch.tensor(max(received, default=0)), dist.ReduceOp.MAX).item()
        if not stop and not due(step, self.cfg.save_every, self.cfg.steps):
            return
        rng = gather([source.get_rng_state() for source in random_states(self.device)])
        if self.rank == 0:
            parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "scaler": scaler}
            state = {name: part and part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "config": asdict(self.cfg), "rng": rng}
            save(self.folder / "ckpt.pt", state | more)
        if stop:
            gather(None)  # until the first process has written
            if self.rank == 0:
                self.bar.write(f"{signal.Signals(stop).name}: saved at step {step}; go on with --resume")
            raise KeyboardInterrupt(stop)

    def check_health(self, step, metrics):
        """Ends a run that has diverged or, from step guard_after on (-1: never), collapsed."""
        guarded = 0 <= getattr(self.cfg, "guard_after", -1) <= step
        for name, value in metrics.items():
            if not math.isfinite(value) or (guarded and value < COLLAPSED.get(name, value)):
                self.bar.close()
                text = f"step {step}: {name} is {value:.3g}: the run has diverged or collapsed; {HINT}"
                raise SystemExit(text if self.rank == 0 else 1)

    def finish(self, **more):
        """results.json: cost, final loss, and KEY_start and KEY_end of what is measured from step 0 on."""
        self.report(set().union(*gather(self.skipped)))
        self.bar.close()
        if self.rank > 0:
            return
        last = self.last
        seconds = last.get("seconds", time.time() - self.started)
        results = {"seconds": seconds, "peak_memory_gb": peak_memory_gb(self.device)}
        results |= {"final_loss": last.get("loss"), "skipped_files": len(self.skipped)}
        if len(self.skipped) > 10:
            print(f"skipped {len(self.skipped)} samples in all")
        print(f"step {last.get('step', 0)} after {seconds:.0f} s -> {self.folder}/results.json")
        for name in [name for name in self.first if name not in ("step", "seconds") and name in last]:
            results |= {f"{name}_start": self.first[name], f"{name}_end": last[name]}
            print(f"  {name:26} {self.first[name]:.3f} -> {last[name]:.3f}")
        print("".join(f"  {name} {value:.4g}\n" for name, value in more.items()), end="")
        save(self.folder / "results.json", results | more)


def ask_to_stop(number, frame):
    """Handles a signal: the run saves after the step it is in. A second Ctrl-C ends it at once."""
    if number == signal.SIGINT and number in received:
        raise KeyboardInterrupt
    received.append(number)


def peak_memory_gb(device):
    """The largest memory of this process so far: of a CUDA GPU, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 / (1024 if sys.platform == "darwin" else 1)

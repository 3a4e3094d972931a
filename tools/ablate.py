"""An ablation: a train script with each value of an option and each seed, then a table and a figure.

python -m tools.ablate train_vision.py --option top_k --values 1 2 3 --out runs/k --metric probe -- --steps 99
python -m tools.ablate train_vision.py --option "tau_0 tau_e" --values "0.9 0.99" "0.95 0.999" --out runs/t \\
    --metric probe top1 --then finetune.py "--label_fraction 0.1" -- --preset cifar10 --data cifar10

What follows -- goes to each run, in OUT/VALUE-sSEED with its log.txt; --then fine-tunes it, in
OUT/VALUE-sSEED-tuned. After Ctrl-C the same command goes on. It ends with OUT/table.md and OUT/figure.svg.
"""

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

import common
from common import require, say
from tools import plot, table


def options_of(script, words, *own):
    """{name: nargs} of a train script's options. UserError if the words set one that the grid sets."""
    config = Path(script).suffix == ".py" and Path(script).is_file() and runpy.run_path(script).get("Config")
    require(config, f"{script}: not a train script; use train_vision.py, train_speech.py, .. or finetune.py")
    own = ("seed", "out", "resume", *own)
    given = {word.split("=")[0] for word in words} & {f"--{name}" for name in own}
    require(not given, f"{' '.join(given)}: the grid sets it; leave it out of the options of {script}")
    return {f.name: f.metadata.get("nargs") for f in fields(config) if f.metadata and f.name not in own[:3]}


def flags(names, value, options):
    """The words that set these options to a value, in which several options have a word each."""
    parts = value.split() if len(names) > 1 else [value]
    require(len(parts) == len(names), f"--values '{value}': give a value of each of {', '.join(names)}")
    lists = [part.split() if options[name] == "+" else [part] for name, part in zip(names, parts)]
    return [word for name, words in zip(names, lists) for word in (f"--{name}", *words)]


def start(folder, words):
    """The process of a run, which goes on where an earlier one stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [path for path in (folder / "ckpt.pt", folder / "metrics.jsonl") if path.exists()]
    words = [sys.executable, *words, *["--resume"] * any(path.stat().st_size for path in left)]
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def work(commands, jobs):
    """Runs {folder: script and flags}, but what is done, `jobs` at a time -> how many have failed."""
    for folder, words in commands.items():
        about = folder / "config.json"
        ran = json.loads(about.read_text())["command"] if about.exists() else " ".join(words)
        require(ran.split(" --resume")[0] == " ".join(words), f"{folder}: holds `{ran}`; use another --out")
    waiting, running = [folder for folder in commands if not (folder / "results.json").exists()], {}
    bar = tqdm(total=len(commands), initial=len(commands) - len(waiting), unit="run", disable=None)
    for number in common.SIGNALS:
        signal.signal(number, common.ask_to_stop)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                running[folder] = start(folder, commands[folder])
            time.sleep(0.1)
            bar.refresh()
            if common.received:
                bar.write("stopping: the runs save; the same command goes on", sys.stderr)
                raise KeyboardInterrupt(common.received[0])
            for folder in [folder for folder in running if running[folder].poll() is not None]:
                status = running.pop(folder).returncode
                bar.n += status == 0
                told = f"failed with status {status}, see {folder / 'log.txt'}" if status else "done"
                bar.write(f"{folder.name}: {told} ({bar.n} of {len(commands)})", sys.stderr)
    finally:
        bar.close()
        for process in running.values() if os.name == "posix" else ():  # Windows: Ctrl-C alone lets them save
            process.terminate()
        for process in running.values():
            process.wait()
    return len(commands) - bar.n


def report(args, runs):
    """OUT/table.md and OUT/figure.svg. Of what a run and its fine-tuning both have, the run's counts."""
    found, tables, label = {}, {}, " ".join(args.option)
    for key, pair in runs.items():
        there = [folder for folder, _ in reversed(pair) if (folder / "results.json").exists()]
        found[key] = {k: v for folder in there for k, v in table.read_results(folder).items()}
    known = sorted(set().union(*found.values()))
    for name in args.metric:
        key = name if name in known else f"{name}_end"
        require(key in known, f"--metric {name}: the runs in {args.out} have {', '.join(known) or 'none'}")
        columns = {v: {s: found[v, s][key] for s in args.seeds if key in found[v, s]} for v in args.values}
        tables[key] = table.compare(columns)
    text = "\n".join(table.comparison(label, key, rows) for key, rows in tables.items())
    common.save(args.out / "table.md", text)
    say(text)
    plot.draw_points(tables, label, args.out / "figure.svg")


def main():
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = common.Parser("ablate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("script", help="train_vision.py, train_speech.py, train_text.py or finetune.py")
    add("--option", type=str.split, required=True, help="what varies; several in quotes vary together")
    add("--values", nargs="+", required=True, help="for several options, in quotes: a value of each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--out", type=Path, required=True, help="folder of the runs, the table and the figure")
    add("--metric", nargs="+", required=True, help="of results.json; probe is short for probe_end")
    add("--then", nargs="+", help="script, and in quotes options, of a fine-tuning of each run")
    add("--jobs", type=int, default=0, help="runs at a time; 0: cores / threads (OMP_NUM_THREADS, else 1)")
    add("--report", action="store_true", help="run nothing, only write the table and the figure again")
    args = parser.parse_args(sys.argv[1:at])
    rest, then = sys.argv[at + 1 :], shlex.split(" ".join(args.then or ""), posix=os.name == "posix")
    options = options_of(args.script, rest, *args.option)
    if then:
        options_of(then[0], then, "init")
    for name in args.option:
        require(name in options, f"--option {name}: not an option of {args.script} to vary; see its --help")
    runs = {}  # (value, seed) -> folder and command of the run, and of its fine-tuning
    for value, seed in [(value, seed) for value in args.values for seed in args.seeds]:
        first = args.out / f"{re.sub('^[-.]|[^A-Za-z0-9_.-]', '_', value)}-s{seed}"  # allowed on every system
        words = [args.script, *rest, *flags(args.option, value, options), "--seed", str(seed)]
        tuning = [*then, "--seed", str(seed), "--init", str(first / "ckpt.pt")]
        pair = (first, words), (first.with_name(f"{first.name}-tuned"), tuning)
        runs[value, seed] = [(folder, [*words, "--out", str(folder)]) for folder, words in pair]
    names = {str(pair[0][0]).lower() for pair in runs.values()}
    require(len(names) == len(args.values) * len(args.seeds), "--values, --seeds: two runs share a folder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs, failed = args.jobs or max(1, cores // int(os.environ.get("OMP_NUM_THREADS", 1))), 0
    for stage in range(0 if args.report else 2 if then else 1):
        ready = [pair for pair in runs.values() if stage == 0 or (pair[0][0] / "results.json").exists()]
        failed += work(dict(pair[stage] for pair in ready), jobs)
    report(args, runs)
    sys.exit(f"{failed} runs have failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    common.run(main)

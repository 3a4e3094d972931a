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
from itertools import product
from math import nan
from pathlib import Path

from tqdm import tqdm

import common
from common import require
from tools import plot, table


def options_of(script):
    """The options of a train script that a grid can set. UserError if it is none."""
    config = Path(script).suffix == ".py" and Path(script).is_file() and runpy.run_path(script).get("Config")
    require(config, f"{script}: not a train script; use train_vision.py, train_speech.py, .. or finetune.py")
    return {f.name for f in fields(config) if f.metadata} - {"seed", "out", "resume"}


def work(commands, jobs):
    """Runs {folder: script and flags}, but what is done, `jobs` at a time -> how many have failed."""
    for folder in [folder for folder in commands if (folder / "config.json").exists()]:
        ran = json.loads((folder / "config.json").read_text())["command"].split(" --out ")[0]
        require(ran == " ".join(commands[folder]), f"{folder}: holds `{ran}`; use another --out")
    waiting, running = [folder for folder in commands if not (folder / "results.json").exists()], {}
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ
    bar = tqdm(total=len(commands), initial=len(commands) - len(waiting), unit="run", disable=None)
    for number in common.SIGNALS:
        signal.signal(number, common.ask_to_stop)
    try:
        while waiting or running:
            if waiting and len(running) < max(1, jobs):
                folder = waiting.pop(0)
                again = ["--resume"] if (folder / "config.json").exists() else []
                words = [sys.executable, *commands[folder], "--out", str(folder), *again]
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "log.txt", "ab") as log:
                    running[folder] = subprocess.Popen(words, env=env, stdout=log, stderr=log)
            time.sleep(0.1)
            bar.refresh()
            if common.received:  # the runs save, and the same command goes on
                raise KeyboardInterrupt(common.received[0])
            for folder in [folder for folder in running if running[folder].poll() is not None]:
                status = running.pop(folder).returncode
                bar.n += status == 0
                told = f"failed with status {status}, see {folder / 'log.txt'}" if status else "done"
                bar.write(f"{folder.name}: {told} ({bar.n} of {bar.total})", sys.stderr)
    finally:
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return bar.total - bar.n


def report(args, runs):
    """OUT/table.md and OUT/figure.svg. Of what a run and its fine-tuning both have, the run's counts."""
    found, text, means, stds, label = {}, [], {}, {}, " ".join(args.option)
    for setting, pair in runs.items():
        there = [folder for folder, _ in reversed(pair) if (folder / "results.json").exists()]
        found[setting] = {k: v for folder in there for k, v in table.read_results(folder).items()}
    known = sorted(set().union(*found.values()))
    keys = [name if name in known else f"{name}_end" for name in args.metric]
    require(set(keys) <= set(known), f"--metric: the runs in {args.out} have {', '.join(known) or 'none'}")
    for key in keys:
        columns = {v: [found[v, seed].get(key, nan) for seed in args.seeds] for v in args.values}
        text.append(table.compare(label, key, columns))
        spreads = {v: table.spread(column) for v, column in columns.items()}
        means[key] = {v: mean for v, (mean, _, _) in spreads.items()}
        stds[key] = [std for _, std, _ in spreads.values()]
    common.save(args.out / "table.md", "\n".join(text))
    print(*text, sep="\n")
    plot.draw({"mean": means}, keys, args.out / "figure.svg", label, stds)


def main():
    parser = common.Parser("ablate", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, threads = parser.add_argument, int(os.environ.get("OMP_NUM_THREADS", 1))
    add("script", help="train_vision.py, train_speech.py, train_text.py or finetune.py")
    add("--option", type=str.split, required=True, help="what varies; several in quotes vary together")
    add("--values", nargs="+", required=True, help="for several options, in quotes: a value of each")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--out", type=Path, required=True, help="folder of the runs, the table and the figure")
    add("--metric", nargs="+", required=True, help="of results.json; probe is short for probe_end")
    add("--then", type=shlex.split, nargs="+", default=[], help="script, and in quotes options, to fine-tune")
    add("--jobs", type=int, default=max(1, os.cpu_count() // threads), help="at a time; default: all cores")
    add("--report", action="store_true", help="run nothing, only write the table and the figure again")
    args, rest = parser.split()
    unknown = set(args.option) - options_of(args.script)
    require(not unknown, f"--option {' '.join(unknown)}: not an option of {args.script} to vary")
    if args.then:
        options_of(args.then[0][0])
    runs = {}  # (value, seed) -> folder and command of the run, and of its fine-tuning
    for value, seed in product(args.values, args.seeds):
        parts = value.split() if len(args.option) > 1 else [value]
        require(len(parts) == len(args.option), f"--values '{value}': give one of each --option")
        name = f"{re.sub('^[-.]|[^A-Za-z0-9_.-]', '_', value)}-s{seed}"  # allowed on every system
        words = [args.script, *rest, *map("--{}={}".format, args.option, parts), "--seed", str(seed)]
        tuning = [*sum(args.then, []), "--init", str(args.out / name / "ckpt.pt"), "--seed", str(seed)]
        runs[value, seed] = (args.out / name, words), (args.out / f"{name}-tuned", tuning)
    require(len({str(run[0]).lower() for run, _ in runs.values()}) == len(runs), "--values: share a folder")
    failed = 0
    for stage in range(0 if args.report else 2 if args.then else 1):
        ready = [pair for pair in runs.values() if stage == 0 or (pair[0][0] / "results.json").exists()]
        failed += work(dict(pair[stage] for pair in ready), args.jobs)
    report(args, runs)
    sys.exit(f"{failed} runs have failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    common.run(main)

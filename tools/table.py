"""A Markdown table from the results.json of finished runs: python -m tools.table runs/a runs/b --keys top1"""

import json
import math
import re
import statistics
from argparse import ArgumentParser
from pathlib import Path

from common import UserError, require, run


def read_results(folder: Path) -> dict[str, float]:
    """The numbers in a run's results.json. UserError if it has none."""
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no results.json to read; a run writes it at its end ({error})") from None
    return {key: value for key, value in results.items() if isinstance(value, (int, float))}


def choose_keys(wanted: str, runs: list[dict]) -> list[str]:
    """The comma-separated names in `wanted`; "": every name that a run has."""
    known = list(dict.fromkeys(key for run in runs for key in run))
    keys = wanted.split(",") if wanted else known
    require(keys and set(keys) <= set(known), f"--keys {wanted}: the runs have {', '.join(known) or 'none'}")
    return keys


def cell(values: list[float]) -> str:
    """The value of one run, or the mean ± the sample standard deviation of several (how many)."""
    if len(values) > 1:
        return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} ({len(values)})"
    value = values[0] if values else "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def spread(values: list[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation and count of the values that are not nan. nan: too few."""
    values = [value for value in values if not math.isnan(value)]
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values or [math.nan]), std, len(values)


def compare(label: str, key: str, columns: dict[str, list[float]]) -> str:
    """{setting: values of the same seeds, nan: none} -> a Markdown table, with the mean difference to the
    first setting over the pairs, the seeds that have both."""
    first = next(iter(columns))
    lines = [f"| {label} | {key} | std | n | difference to {first} | standard error | pairs |"]
    for setting, column in columns.items():
        mean, std, n = spread(column)
        gains = [] if setting == first else [x - base for x, base in zip(column, columns[first])]
        gain, error, pairs = spread(gains)
        cells = f"{mean:.4f} | {std:.4f} | {n} | {gain:+.4f} | {error / math.sqrt(pairs or 1):.4f} | {pairs}"
        lines.append(f"| {setting} | {cells.replace('+nan', '-').replace('nan', '-')} |")
    return "\n".join([lines[0], "|---|" + "---:|" * 6, *lines[1:]]) + "\n"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--keys", default="", help="comma-separated columns; default: every number")
    parser.add_argument("--group", choices=["seed"], help="mean and std of runs that differ only in -sN")
    args = parser.parse_args()
    rows = {}
    for folder in args.runs:
        name = re.sub(r"-s\d+$", "", str(folder)) if args.group else str(folder)
        rows.setdefault(name, []).append(read_results(folder))
    keys = choose_keys(args.keys, sum(rows.values(), []))
    print("| run | " + " | ".join(keys) + " |\n|---|" + "---:|" * len(keys))
    for name, runs in rows.items():
        cells = (cell([run[key] for run in runs if key in run]) for key in keys)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)

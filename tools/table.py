"""A Markdown table from the results.json of finished runs.

    python -m tools.table runs/a runs/b --keys top1,best_top1      a row a run
    python -m tools.table runs/*-s? --group seed                   a-s0, a-s1, a-s2 in one row: mean ± std (n)
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":  # `python tools/table.py` works as well as `python -m tools.table`
    sys.path.insert(0, str(Path(__file__).parent.parent))

from common import BadInput, run


def numbers(found) -> dict[str, float]:
    """The numbers of a JSON object by name; what else it holds is left out. Raises ValueError if it is none."""
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def read_results(path: Path) -> dict[str, float]:
    """The numbers in a run's results.json. Raises BadInput."""
    try:
        return numbers(json.loads(path.read_text()))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; a run writes it at its end") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as results ({getattr(error, 'strerror', None) or error})") from None


def run_names(folders: list[Path]) -> list[str]:
    """What tells the folders apart: the path of each from the folder in which they all lie."""
    folders = [folder.resolve() for folder in folders]
    top = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(top).as_posix() for folder in folders]


def choose_keys(wanted: str, found: list[dict]) -> list[str]:
    """The comma-separated names in `wanted`, or all there are. Raises BadInput for one that no run has."""
    there = list(dict.fromkeys(name for row in found for name in row))
    if not there:
        raise BadInput("these runs have no numbers to show yet")
    keys = [key.strip() for key in wanted.split(",") if key.strip()] or there
    if missing := [key for key in keys if key not in there]:
        raise BadInput(f"--keys {','.join(missing)}: no run has it; there are {', '.join(there)}")
    return keys


def cell(values: list[float], grouped: bool) -> str:
    """One run's value, or mean ± sample standard deviation, and in a grouped table (the number of runs)."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    digits = 0 if len(values) == 1 and isinstance(values[0], int) else 3 if abs(mean) < 10 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}" + (f" ({len(values)})" if grouped else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or its results.json")
    parser.add_argument("--keys", default="", help="comma-separated columns; default: every number that a run has")
    parser.add_argument("--group", metavar="REGEX", help="names that differ in what it matches share a row; seed: -sN")
    args = parser.parse_args()
    try:
        pattern = re.compile({None: "(?!)", "seed": r"-s\d+$"}.get(args.group, args.group))
    except re.error as error:
        raise BadInput(f"--group {args.group}: not a regular expression ({error})") from None
    files = [path if path.suffix == ".json" else path / "results.json" for path in map(Path, args.runs)]
    found = [read_results(path) for path in files]
    keys, rows = choose_keys(args.keys, found), {}
    for name, row in zip(run_names([path.parent for path in files]), found):
        rows.setdefault(pattern.sub("", name), []).append(row)
    print("| run | " + " | ".join(keys) + " |\n|---|" + "---:|" * len(keys))
    for name, members in rows.items():
        cells = [cell([row[key] for row in members if key in row], bool(args.group)) for key in keys]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)

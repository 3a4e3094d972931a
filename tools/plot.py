"""Training curves from the metrics.jsonl of runs, one panel a number. Wants matplotlib.

    python -m tools.plot runs/a runs/b --out assets/curves.svg
    python -m tools.plot runs/a --out curves.png --keys loss,target_std,pred_std

The value before the first step comes from the run's results.json, once it has ended.
"""

import argparse
import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":  # `python tools/plot.py` works as well as `python -m tools.plot`
    sys.path.insert(0, str(Path(__file__).parent.parent))

from common import BadInput, run
from tools.table import choose_keys, numbers, read_results, run_names

USUAL = ("loss", "probe", "knn", "explained", "top1")


def read_curves(path: Path) -> dict[str, dict[float, float]]:
    """metrics.jsonl, and KEY_start of the results.json beside it -> {key: {step: value}}. Raises BadInput."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot be read ({reason}); give a run's folder") from None
    end = path.with_name("results.json")
    results = read_results(end) if end.exists() else {}
    curves = {k.removesuffix("_start"): {0: v} for k, v in results.items() if k.endswith("_start")}
    measured = set()
    for number, line in enumerate(lines, start=1):
        try:
            row = numbers(json.loads(line))
            step = row.pop("step")
        except (ValueError, KeyError):
            if number == len(lines):  # a run that goes on, or was killed, may have written half of it
                continue
            raise BadInput(f"{path}: line {number} is no metrics of a step") from None
        for key, value in row.items():
            curves.setdefault(key, {})[step] = value
            measured.add(key)
    return {key: dict(sorted(curves[key].items())) for key in curves if key in measured}


def draw(runs: dict[str, dict], keys: list[str], out: Path) -> None:
    """One panel a key, four in a row; one line a run. The same input gives the same file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {"svg.hashsalt": "data2vec", "svg.fonttype": "none"}]):  # whatever the user's own is
        across, down = min(len(keys), 4), math.ceil(len(keys) / 4)
        figure = Figure(figsize=(3.2 * across, 2.5 * down), layout="constrained")
        for at, key in enumerate(keys, start=1):
            panel = figure.add_subplot(down, across, at)
            for i, (name, curves) in enumerate(runs.items()):
                steps, values = list(curves.get(key, {})), list(curves.get(key, {}).values())
                panel.plot(steps, values, "." * (len(steps) < 20) + "-", color=f"C{i % 10}", label=name, linewidth=1.2)
            panel.set(title=key, xlabel="step")
            panel.grid(alpha=0.3)
        if len(runs) > 1:
            lines = panel.get_legend_handles_labels()
            figure.legend(*lines, loc="outside lower center", ncols=min(len(runs), across + 1), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        unsaid = ("Date", "Creator") if out.suffix == ".svg" else ("Software",)
        figure.savefig(out, dpi=150, metadata=dict.fromkeys(unsaid))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or a metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture to write, .svg or .png")
    parser.add_argument("--keys", default="", help=f"comma-separated; default: what there is of {', '.join(USUAL)}")
    parser.add_argument("--labels", default="", help="comma-separated names of the runs; default: their folders")
    args = parser.parse_args()
    if args.out.suffix not in (".svg", ".png"):
        raise BadInput(f"--out {args.out}: give a name that ends in .svg or .png")
    files = [path if path.suffix == ".jsonl" else path / "metrics.jsonl" for path in map(Path, args.runs)]
    curves = [read_curves(path) for path in files]
    names = args.labels.split(",") if args.labels else run_names([path.parent for path in files])
    if len(names) != len(files) or len(set(names)) != len(names):
        raise BadInput(f"--labels: {len(files)} runs need as many different names, got {', '.join(names)}")
    there = set().union(*curves)
    keys = choose_keys(args.keys or ",".join(key for key in USUAL if key in there), curves)
    try:
        draw(dict(zip(names, curves)), keys, args.out)
    except ImportError as error:
        raise BadInput(f"drawing wants matplotlib: pip install -r requirements-dev.txt ({error})") from None
    except OSError as error:
        raise BadInput(f"--out {args.out}: cannot be written ({error.strerror})") from None
    print(f"{', '.join(keys)} of {', '.join(names)} -> {args.out}")


if __name__ == "__main__":
    run(main)

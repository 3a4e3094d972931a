"""Training curves from the metrics.jsonl of runs, one panel per number (pip install matplotlib).

python -m tools.plot runs/a runs/b --out curves.svg
python -m tools.plot runs/a --out curves.png --keys loss,target_std,pred_std
"""

import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager
from pathlib import Path

from common import UserError, require, run, whole
from tools.table import choose_keys

DEFAULT_KEYS = ("loss", "probe", "knn", "explained_variance", "top1")
STYLE = {"svg.hashsalt": "data2vec", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
STYLE |= {"savefig.dpi": 150, "savefig.bbox": "tight", "text.parse_math": False, "legend.frameon": False}


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """{key: {step: value}} of a run's metrics.jsonl."""
    curves = {}
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        for line in [json.loads(line) for line in lines if line.endswith("}")]:  # the last may be broken
            step = line.pop("step")
            for key, value in line.items():
                curves.setdefault(key, {})[step] = value
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no metrics.jsonl to read; give the folder of a run ({error})") from None
    return curves


@contextmanager
def figure(path: Path):
    """Yields an empty figure and then writes it. The same content gives the same file."""
    require(path.suffix in (".svg", ".png"), f"--out {path}: must end in .svg or .png")
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        drawn = Figure(layout="constrained")
        yield drawn
        undated = ("Date", "Creator") if path.suffix == ".svg" else ("Software",)
        with whole(path) as place:
            drawn.savefig(place, metadata=dict.fromkeys(undated))


def draw(runs: dict[str, dict], keys: list[str], path: Path, label="step", stds=None) -> None:
    """One panel per key, four in a row; one line per run: {key: {x: value}}. stds: {key: list}, as bars."""
    columns, rows = min(len(keys), 4), math.ceil(len(keys) / 4)
    with figure(path) as page:
        page.set_size_inches(3.2 * columns, 2.5 * rows)
        for i, key in enumerate(keys):
            panel = page.add_subplot(rows, columns, i + 1)
            for name, curves in runs.items():
                curve = curves.get(key, {})
                panel.plot([*curve], [*curve.values()], marker="." if len(curve) < 20 else "", label=name)
                if stds:
                    panel.errorbar([*curve], [*curve.values()], stds[key], fmt="none", capsize=3)
            panel.set(title=key, xlabel=label)
            panel.grid(alpha=0.3)
            if key == "explained_variance":  # an untrained network is far below
                panel.set_ylim(-0.5, 1)
        if len(runs) > 1:
            page.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=columns + 1)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="picture, .svg or .png")
    parser.add_argument("--keys", default="", help=f"comma-separated; default: {', '.join(DEFAULT_KEYS)}")
    parser.add_argument("--labels", default="", help="comma-separated names of the runs; default: folders")
    args = parser.parse_args()
    curves = [read_curves(folder) for folder in args.runs]
    names = args.labels.split(",") if args.labels else list(map(str, args.runs))
    require(len(set(names)) == len(names) == len(curves), f"--labels {args.labels}: give a name for each run")
    known = set().union(*curves)
    keys = choose_keys(args.keys or ",".join(key for key in DEFAULT_KEYS if key in known), curves)
    draw(dict(zip(names, curves)), keys, args.out)
    print(f"{', '.join(keys)} of {', '.join(names)} -> {args.out}")


if __name__ == "__main__":
    run(main)

"""Labelled sentences: GLUE's eight tasks or tables of your own, batches, metrics.

    python -m data.glue --out DIR          downloads GLUE's tasks to DIR/TASK/{train,dev}.tsv

A task is a folder with train and one of HELD_OUT, .tsv (no quoting) or .csv: GLUE's files, the hub's, or your
own, with a column of LABELS and those of a row of COLUMNS. Names of classes match in any case.
"""

import argparse
import csv
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, require, run, save, say, writing
from data.download import download
from data.text import BOS, EOS, PAD

URL = "https://dl.fbaipublicfiles.com"
ARCHIVES = {"QQP": "QQP-clean", "QNLI": "QNLIv2"}  # the others have the task's name
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
csv.field_size_limit(1 << 30)  # characters of a cell; by default 131,072
HELD_OUT = ("dev", "valid", "validation", "val", "test")  # the first of them is measured
LABELS = ("label", "gold_label", "is_duplicate", "score", "Quality")
COLUMNS = (
    ("#1 String", "#2 String"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("sentence1", "sentence2"), ("sentence",), ("text",),
)  # fmt: skip


class Task(NamedTuple):
    classes: tuple  # () if labels are scores
    metrics: tuple  # names; the first one selects the best checkpoint
    hub: tuple = ()  # other words for these classes, on the hub
    steps: int = 0  # of fine-tuning, and sentences a step (Liu et al. 2019); 0: ten epochs
    batch: int = 32
    dev: tuple = ("dev",)  # splits to measure on

    def index(self):
        """{name of a class in lower case, or the hub's word for it: its index}"""
        return {name.lower(): i for names in (self.hub, self.classes) for i, name in enumerate(names)}


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {  # the paper leaves out WNLI
    "CoLA": Task(BINARY, ("matthews",), ("unacceptable", "acceptable"), 5336, 16),
    "SST-2": Task(BINARY, ("accuracy",), ("negative", "positive"), 20_935),
    "MRPC": Task(BINARY, ("accuracy", "f1"), ("not_equivalent", "equivalent"), 2296, 16),
    "STS-B": Task((), ("pearson", "spearman"), (), 3598, 16),
    "QQP": Task(BINARY, ("accuracy", "f1"), ("not_duplicate", "duplicate"), 113_272),
    "MNLI": Task(("contradiction", "neutral", "entailment"), ("accuracy",), ("2", "1", "0"), 123_873,
                 dev=("dev_matched", "dev_mismatched")),
    "QNLI": Task(ENTAILMENT, ("accuracy",), ("0", "1"), 33_112),
    "RTE": Task(ENTAILMENT, ("accuracy",), ("0", "1"), 2036, 16),
}  # fmt: skip


def open_task(folder, training=True, names=()):
    """-> Task, {split: [(sentences, label), ...]} of dev and, if training, of train.

    sentences: one or two texts; label: index of the class, or a float. A folder that is not named as one of
    TASKS has classes, or scores if the labels are numbers with decimals; if not training, those of `names`.
    """
    folder = Path(folder).resolve()
    official = {name.lower().replace("-", ""): task for name, task in TASKS.items()}
    task = official.get(folder.name.lower().replace("-", ""))
    found = {path.stem.lower(): path for path in sorted(folder.glob("*.[ctCT][sS][vV]"))}
    files = {"train": found.get("train")} if training else {}
    for split in task.dev if task else ("dev",):
        stems = [name + split.removeprefix("dev") for name in HELD_OUT]
        files[split], *unused = [found[stem] for stem in stems if stem in found] or [None]
        say(f"held out: {files[split]}" + "".join(f"; not used: {path.name}" for path in unused))
    for split, path in files.items():
        require(path, f"{folder}: no {split}.tsv or .csv; `python -m data.glue` downloads GLUE")
    task = task or own_task(found.get("train", files["dev"]), () if training else names)
    return task, {split: read_examples(path, task) for split, path in files.items()}


def read_table(path):
    """-> rows {column: cell}, columns of the sentences and of the label."""
    tabs = path.suffix.lower() == ".tsv"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline().strip("\r\n").split("\t")
            file.seek(0)
            quoted = not tabs or "idx" in first  # the hub's .tsv; in GLUE's own a quote is any character
            style = {"strict": True} if quoted else {"quoting": csv.QUOTE_NONE}
            if path.parent.name.lower() == "cola" and tabs and "label" not in first:  # has no header
                style["fieldnames"] = ["source", "label", "mark", "sentence"]
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", **style)
            rows, header = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; it must be UTF-8, and .csv with matching quotes") from None
    texts = [columns for columns in COLUMNS if set(columns) <= set(header)]
    labels = [column for column in LABELS if column in header]
    require(texts and labels, f"{path}: its columns are {header}, but it needs label and one of {COLUMNS}")
    return rows, [*texts[0], labels[0]]


def own_task(path, names):
    rows, (*_, column) = read_table(path)
    labels = [row[column].strip() for row in rows if row[column]]
    numbers = {label: float(label) for label in labels if NUMBER.fullmatch(label)}
    mostly = sum(label in numbers for label in labels) >= 0.9 * len(labels)
    if names == ["score"] or (mostly and any(number % 1 for number in numbers.values())):
        return Task((), ("pearson", "spearman"))
    classes = sorted(set(labels), key=lambda label: (numbers.get(label, math.inf), label))
    known = {label.lower() for label in labels} <= {name.lower() for name in names}
    return Task(tuple(names if known else classes), ("accuracy",))


def output_order(task, names, assume):
    """Outputs of a head with these names in the order of the task's classes; [] if it has other classes.

    assume: numbers 0 .. instead of names, on one side, count the classes of the other.
    """
    classes, index = list(task.classes) or ["score"], task.index() or {"score": 0}
    places, found = list(range(len(classes))), [index.get(name.lower(), -1) for name in names]
    if assume and sorted(found) != places and list(map(str, range(len(names)))) in (names, classes):
        found = list(range(len(names)))
    if sorted(found) != places:
        return []
    if names != classes:
        say("classes: " + ", ".join(f"{name} of the file is {classes[i]}" for name, i in zip(names, found)))
    return [found.index(i) for i in places]


def read_examples(path, task):
    """-> [(sentences, label), ...] of a file; broken rows are skipped, and the first one is printed."""
    rows, columns = read_table(path)
    labels, examples, skipped = task.index(), [], []
    for row in rows:
        *sentences, label = ((row[column] or "").strip() for column in columns)
        label = label.lower()
        if not task.classes and NUMBER.fullmatch(label):
            labels[label] = float(label)
        if None not in row and all(sentences) and label in labels:  # None: more cells than columns
            examples.append((tuple(sentences), labels[label]))
        else:
            skipped.append(str(row)[:200])
    usable = {label for _, label in examples} - {-1.0}  # the hub's scores of tests, which are secret
    require(usable, f"{path}: no row can be used: {skipped[:1]}")
    if skipped:
        say(f"{path}: skipped {len(skipped)} rows, the first is {skipped[0]}")
    return examples


def sentence_ids(vocabulary, first, second=None, max_tokens=512):
    """-> ids of <s> first </s> or <s> first </s> </s> second </s>; the longer text is cut to fit."""
    a = vocabulary.encode(first)
    b = [] if second is None else vocabulary.encode(second)
    room = max_tokens - (2 if second is None else 4)
    while len(a) + len(b) > max(0, room):
        max(b, a, key=len).pop()
    return [BOS, *a, EOS] + ([] if second is None else [EOS, *b, EOS])


class Sentences:
    """sentences[[(epoch, index), ...]] -> dict: tokens (B, T) int64, padded with <pad>; labels (B,) float."""

    def __init__(self, examples, vocabulary, max_tokens):
        self.examples, self.vocabulary, self.max_tokens = examples, vocabulary, max_tokens

    def __getitem__(self, keys):
        texts, labels = zip(*(self.examples[index] for _, index in keys))
        ids = [sentence_ids(self.vocabulary, *text, max_tokens=self.max_tokens) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), True, PAD)
        return {"tokens": tokens, "labels": torch.tensor(labels, dtype=torch.float32)}


def accuracy(predicted, labels):
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted, labels):
    """Of class 1; 0 if it is never right."""
    p, t = np.asarray(predicted) == 1, np.asarray(labels) == 1
    return float(2 * (p & t).sum() / max(1, p.sum() + t.sum()))


def pearson(predicted, labels):
    """Linear correlation; 0 if one side is constant."""
    a, b = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def spearman(predicted, labels):
    return pearson(ranks(predicted), ranks(labels))


def ranks(values):
    """-> (n,) float64, from 1; equal values have their mean rank, nan stays nan."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    return np.where(np.isnan(values), np.nan, mean_ranks[inverse.ravel()])


# matthews is Pearson's correlation of classes 0 and 1
METRICS = {"accuracy": accuracy, "f1": f1, "matthews": pearson, "pearson": pearson, "spearman": spearman}


def fetch(out, file):
    path = out / os.path.basename(file)
    download(f"{URL}/{file}", str(path))
    return path


def make_mrpc(out):
    """MRPC has no archive: its dev split is the pairs of the training file that mrpc_dev_ids.tsv lists."""
    train = fetch(out, "senteval/senteval_data/msr_paraphrase_train.txt").read_text(encoding="utf-8-sig")
    dev_ids = fetch(out, "glue/data/mrpc_dev_ids.tsv").read_text("utf-8").split("\n")
    dev_ids = {tuple(line.split()) for line in dev_ids}
    header, *rows = train.split("\n")
    for split in ("train", "dev"):
        part = [row for row in rows if (tuple(row.split("\t")[1:3]) in dev_ids) == (split == "dev")]
        save(out / "MRPC" / f"{split}.tsv", "\n".join([header, *part]))


def main():
    parser = argparse.ArgumentParser("data.glue", description="Downloads GLUE's tasks.")
    parser.add_argument("--out", type=Path, required=True, help="folder; each task becomes a folder in it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        if name == "MRPC":
            make_mrpc(args.out)
        else:
            archive = fetch(args.out, f"glue/data/{ARCHIVES.get(name, name)}.zip")
            with writing(args.out / name):
                shutil.unpack_archive(archive, args.out)
        print(args.out / name)


if __name__ == "__main__":
    run(main)

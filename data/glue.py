"""Labelled sentences: GLUE's eight tasks or tables of your own, batches, metrics.

    python -m data.glue --out DIR          downloads GLUE's tasks to DIR/TASK/{train,dev}.tsv

Your own task is a folder with train and dev as .tsv (no quoting) or .csv, with the columns sentence, or
sentence1 and sentence2, and label.
"""

import argparse
import csv
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, first_process, require, run
from data.download import download
from data.text import BOS, EOS, PAD

URL = "https://dl.fbaipublicfiles.com"
ARCHIVES = {"QQP": "QQP-clean", "QNLI": "QNLIv2"}  # the others have the task's name
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
csv.field_size_limit(1 << 30)  # characters of a cell; by default 131,072


class Task(NamedTuple):
    classes: tuple  # () if labels are scores
    metrics: tuple  # names; the first one selects the best checkpoint
    columns: tuple  # of the one or two sentences
    label: str = "label"  # column
    dev: tuple = ("dev",)  # splits to measure on


BINARY, ENTAILMENT, PAIR = ("0", "1"), ("entailment", "not_entailment"), ("sentence1", "sentence2")
TASKS = {  # the paper leaves out WNLI
    "CoLA": Task(BINARY, ("matthews",), ("sentence",)),
    "SST-2": Task(BINARY, ("accuracy",), ("sentence",)),
    "MRPC": Task(BINARY, ("accuracy", "f1"), ("#1 String", "#2 String"), "Quality"),
    "STS-B": Task((), ("pearson", "spearman"), PAIR, "score"),
    "QQP": Task(BINARY, ("accuracy", "f1"), ("question1", "question2"), "is_duplicate"),
    "MNLI": Task(("contradiction", "neutral", "entailment"), ("accuracy",), PAIR, "gold_label",
                 ("dev_matched", "dev_mismatched")),
    "QNLI": Task(ENTAILMENT, ("accuracy",), ("question", "sentence")),
    "RTE": Task(ENTAILMENT, ("accuracy",), PAIR),
}  # fmt: skip
RECIPES = {  # steps of fine-tuning, sentences a step (Liu et al. 2019)
    "CoLA": (5336, 16), "SST-2": (20_935, 32), "MRPC": (2296, 16), "STS-B": (3598, 16), "QQP": (113_272, 32),
    "MNLI": (123_873, 32), "QNLI": (33_112, 32), "RTE": (2036, 16),
}  # fmt: skip


def open_task(folder, training=True):
    """-> Task, {split: [(sentences, label), ...]} of dev and, if training, of train.

    sentences: one or two texts; label: index of the class, or a float. A folder that is not named as one of
    TASKS has classes, or scores if the labels are numbers with decimals.
    """
    folder = Path(folder).resolve()
    files = {path.stem: path for path in sorted(folder.glob("*.[ct]sv"))}
    task = TASKS.get(folder.name)
    splits = ["train"] * training + list(task.dev if task else ["dev"])
    for split in splits:
        require(split in files, f"{folder}: no {split}.tsv or .csv; `python -m data.glue` downloads GLUE")
    task = task or own_task(read_table(files.get("train", files["dev"])))
    return task, {split: read_examples(files[split], task) for split in splits}


def read_table(path):
    """-> rows {column: cell}."""
    style = {"strict": True} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if path.match("CoLA/*.tsv"):  # has no header
        style["fieldnames"] = ["source", "label", "mark", "sentence"]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, **style))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; it must be UTF-8, and .csv with matching quotes") from None


def own_task(rows):
    labels = [row["label"].strip() for row in rows if row.get("label")]
    numbers = [float(label) for label in labels if NUMBER.fullmatch(label)]
    columns = ("sentence",) if rows and "sentence" in rows[0] else PAIR
    if len(numbers) >= 0.9 * len(labels) and any(number % 1 for number in numbers):
        return Task((), ("pearson", "spearman"), columns)
    return Task(tuple(sorted(set(labels))), ("accuracy",), columns)


def read_examples(path, task):
    """-> [(sentences, label), ...] of a file; broken rows are skipped, and the first one is printed."""
    needed = [*task.columns, task.label]
    labels = {label: index for index, label in enumerate(task.classes)}
    examples, skipped = [], []
    for row in read_table(path):
        require(set(needed) <= set(row), f"{path}: its columns are {list(row)}, but it needs {needed}")
        *sentences, label = ((row[column] or "").strip() for column in needed)
        if not task.classes and NUMBER.fullmatch(label):
            labels[label] = float(label)
        if None not in row and all(sentences) and label in labels:  # None: more cells than columns
            examples.append((tuple(sentences), labels[label]))
        else:
            skipped.append(str(row)[:200])
    require(examples, f"{path}: no row can be used: {skipped[:1]}")
    if skipped and first_process():
        print(f"{path}: skipped {len(skipped)} rows, the first is {skipped[0]}", file=sys.stderr)
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
    dev_ids = fetch(out, "glue/data/mrpc_dev_ids.tsv").read_text().split("\n")
    dev_ids = {tuple(line.split()) for line in dev_ids}
    header, *rows = train.split("\n")
    splits = {"train": [header], "dev": [header]}
    for row in rows:
        is_dev = tuple(row.split("\t")[1:3]) in dev_ids
        splits["dev" if is_dev else "train"].append(row)
    (out / "MRPC").mkdir(exist_ok=True)
    for split, lines in splits.items():
        (out / "MRPC" / f"{split}.tsv").write_text("\n".join(lines), encoding="utf-8")


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
            shutil.unpack_archive(fetch(args.out, f"glue/data/{ARCHIVES.get(name, name)}.zip"), args.out)
        print(args.out / name)


if __name__ == "__main__":
    run(main)

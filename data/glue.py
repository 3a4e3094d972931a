"""Labelled sentences: GLUE's tasks or tables of your own, batches, metrics.

A task is a folder with train and one of HELD_OUT, .tsv (no quoting) or .csv: GLUE's files, the hub's, or your
own, with a column of LABELS and those of a row of COLUMNS. Names of classes match in any case.
"""

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, require, say
from data.text import BOS, EOS, PAD

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
csv.field_size_limit(1 << 30)  # characters of a cell; by default 131,072
HELD_OUT = ("dev", "valid", "validation", "val", "test")  # the first of them is measured
LABELS = ("label", "gold_label", "is_duplicate", "score", "Quality")
COLUMNS = (
    ("#1 String", "#2 String"), ("question1", "question2"), ("premise", "hypothesis"),
    ("question", "sentence"), ("sentence1", "sentence2"), ("sentence",), ("text",),
)  # fmt: skip


class Task(NamedTuple):
    classes: tuple  # or SCORE: labels are numbers
    metrics: tuple  # names; the first one selects the best checkpoint
    hub: tuple = ()  # other words for these classes, on the hub
    steps: int = 0  # of fine-tuning, and sentences a step (Liu et al. 2019); 0: ten epochs
    batch: int = 32
    dev: tuple = ("dev",)  # splits to measure on

    def index(self):
        """{name of a class in lower case, or the hub's word for it: its index}"""
        return {name.lower(): i for names in (self.hub, self.classes) for i, name in enumerate(names)}


SCORE, BINARY, ENTAILMENT = ("score",), ("0", "1"), ("entailment", "not_entailment")
TASKS = {  # the paper leaves out WNLI
    "CoLA": Task(BINARY, ("matthews",), ("unacceptable", "acceptable"), 5336, 16),
    "SST-2": Task(BINARY, ("accuracy",), ("negative", "positive"), 20_935),
    "MRPC": Task(BINARY, ("accuracy", "f1"), ("not_equivalent", "equivalent"), 2296, 16),
    "STS-B": Task(SCORE, ("pearson", "spearman"), (), 3598, 16),
    "QQP": Task(BINARY, ("accuracy", "f1"), ("not_duplicate", "duplicate"), 113_272),
    "MNLI": Task(("contradiction", "neutral", "entailment"), ("accuracy",), ("2", "1", "0"), 123_873,
                 dev=("dev_matched", "dev_mismatched")),
    "QNLI": Task(ENTAILMENT, ("accuracy",), ("0", "1"), 33_112),
    "RTE": Task(ENTAILMENT, ("accuracy",), ("0", "1"), 2036, 16),
}  # fmt: skip


def open_task(folder, training=True, names=()):
    """-> Task, {split: [(sentences, label), ...]} of dev and, if training, of train.

    sentences: one or two texts; label: index of the class, or a float. names: of the classes of --init.
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
        require(path, f"{folder}: no {split}.tsv or .csv; README says where GLUE is")
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
            if len(first) == 4 and first[1] in BINARY:  # GLUE's own CoLA has no header
                style["fieldnames"] = ["source", "label", "mark", "sentence"]
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", restval="", **style)
            rows, header = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; it must be UTF-8, and .csv with matching quotes") from None
    texts = [columns for columns in COLUMNS if set(columns) <= set(header)]
    labels = [column for column in LABELS if column in header]
    require(texts and labels, f"{path}: its columns are {header}, but it needs label and one of {COLUMNS}")
    return rows, [*texts[0], labels[0]]


def own_task(path, names):
    """Scores if most labels are numbers, some with decimals; else classes, `names` if these have all."""
    rows, (*_, column) = read_table(path)
    labels = {row[column].strip() for row in rows} - {""}
    numbers = {label: float(label) for label in labels if NUMBER.fullmatch(label)}
    decimals = any(number % 1 for number in numbers.values())
    if names == [*SCORE] or (decimals and len(numbers) > len(labels) / 2):
        return Task(SCORE, ("pearson", "spearman"))
    known = {label.lower() for label in labels} <= {name.lower() for name in names}
    classes = sorted(labels, key=lambda label: (numbers.get(label, math.inf), label))
    return Task(tuple(names if known else classes), ("accuracy",))


def output_order(task, names, assume):
    """Which of the outputs with these names is each class of the task; [] if they have other classes.

    assume: if one side has numbers 0 .. instead of names, they count the classes of the other.
    """
    index, places = task.index(), list(range(len(task.classes)))
    found = [index.get(name.lower(), -1) for name in names]
    numbered = [str(i) for i in places] in (names, list(task.classes))
    if assume and numbered and -1 in found and len(found) == len(places):
        say(f"classes: {names} of the file are taken for {task.classes}, in this order")
        found = places
    return np.argsort(found).tolist() if sorted(found) == places else []


def read_examples(path, task):
    """-> [(sentences, label), ...] of a file; broken rows are skipped, and the first one is printed."""
    rows, columns = read_table(path)
    index, examples, skipped = task.index(), [], []
    for row in rows:
        *sentences, label = (row[column].strip() for column in columns)
        value = index.get(label.lower())
        if task.classes == SCORE:
            value = float(label) if NUMBER.fullmatch(label) else None
        if None in row or value is None or not all(sentences):  # None in row: more cells than columns
            skipped.append(str(row)[:200])
        else:
            examples.append((tuple(sentences), value))
    require(examples, f"{path}: no row can be used: {skipped[:1]}")
    if skipped:
        say(f"{path}: skipped {len(skipped)} rows, the first is {skipped[0]}")
    return examples


def sentence_ids(vocabulary, *texts, max_tokens=512):
    """-> ids of <s> first </s> or <s> first </s> </s> second </s>; the longer text is cut to fit."""
    parts = [vocabulary.encode(text) for text in texts]
    room = max(0, max_tokens - 2 * len(parts))
    while sum(map(len, parts)) > room:
        max(reversed(parts), key=len).pop()
    ids = [i for part in parts for i in (EOS, *part, EOS)]
    return [BOS, *ids[1:]]


class Sentences:
    """sentences[[(epoch, index), ...]] -> dict: tokens (B, T) int64, padded with <pad>; labels (B,) float."""

    def __init__(self, examples, vocabulary, max_tokens):
        self.examples, self.vocabulary, self.max_tokens = examples, vocabulary, max_tokens

    def __getitem__(self, keys):
        texts, labels = zip(*(self.examples[index] for _, index in keys))
        ids = [sentence_ids(self.vocabulary, *text, max_tokens=self.max_tokens) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), True, PAD)
        return {"tokens": tokens, "labels": torch.tensor(labels, dtype=torch.float32)}


def pearson(p, t):
    """Linear correlation; 0 if one side is constant."""
    constant = np.ptp(p) == 0 or np.ptp(t) == 0
    return 0.0 if constant else np.corrcoef(p, t)[0, 1]


def ranks(values):
    """-> (n,) float64, from 1; equal values have their mean rank, nan stays nan."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    return np.where(np.isnan(values), np.nan, mean_ranks[inverse])


METRICS = {  # of predictions and labels, arrays (n,)
    "accuracy": lambda p, t: np.mean(p == t),
    "f1": lambda p, t: 2 * np.sum(p * t) / max(1, np.sum(p + t)),  # of classes 0 and 1
    "matthews": pearson,  # of classes 0 and 1
    "pearson": pearson,
    "spearman": lambda p, t: pearson(ranks(p), ranks(t)),
}

"""Labelled sentences in, batches out: GLUE's eight tasks or one of yours, their metrics, their download.

    python -m data.text glue --out DIR            fetch GLUE's eight tasks, leave them as DIR/TASK/{train,dev,test}.tsv

The walk: DIR/TASK/train.tsv -> Examples -> Sentences -> (B, T) int64 and labels (B,).
"""

import csv
import math
import os
import shutil
import zipfile
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from common import BadInput
from data.images import download, md5_of
from data.text import BOS, EOS, PAD, lines_of, why


# ------------------------------------------------------------------------------------------------------ GLUE: the tasks

class Task(NamedTuple):
    """classes: names of the labels, () for a number; metrics: names in METRICS, the first one counts; columns: sentence1,
    sentence2 or None, label; dev: the splits to measure on; archive: what to fetch."""
    classes: tuple
    metrics: tuple
    columns: tuple
    dev: tuple = ("dev",)
    archive: str = ""


TASKS = {                                        # SPEC section 5; the paper leaves WNLI out
    "CoLA": Task(("0", "1"), ("matthews",), ("sentence", None, "label"), archive="CoLA.zip"),
    "SST-2": Task(("0", "1"), ("accuracy",), ("sentence", None, "label"), archive="SST-2.zip"),
    "MRPC": Task(("0", "1"), ("accuracy", "f1"), ("#1 String", "#2 String", "Quality")),
    "STS-B": Task((), ("pearson", "spearman"), ("sentence1", "sentence2", "score"), archive="STS-B.zip"),
    "QQP": Task(("0", "1"), ("accuracy", "f1"), ("question1", "question2", "is_duplicate"), archive="QQP-clean.zip"),
    "MNLI": Task(("contradiction", "neutral", "entailment"), ("accuracy",), ("sentence1", "sentence2", "gold_label"),
                 ("dev_matched", "dev_mismatched"), "MNLI.zip"),
    "QNLI": Task(("entailment", "not_entailment"), ("accuracy",), ("question", "sentence", "label"), archive="QNLIv2.zip"),
    "RTE": Task(("entailment", "not_entailment"), ("accuracy",), ("sentence1", "sentence2", "label"), archive="RTE.zip"),
}
RECIPES = {                                      # steps and sentences a step of the paper's fine-tuning
    "CoLA": (5336, 16), "SST-2": (20_935, 32), "MRPC": (2296, 16), "STS-B": (3598, 16), "QQP": (113_272, 32),
    "MNLI": (123_873, 32), "QNLI": (33_112, 32), "RTE": (2036, 16),
}
COLA = ["source", "label", "mark", "sentence"]   # the columns of its files, which do not say so


class Examples(NamedTuple):
    """rows: (sentence1, sentence2 or None, label), the label an index into the task's classes, a float, or None in a test
    split that has none; lines: where each row begins in the file; bad: "file line n: reason" of rows that were passed over."""
    rows: list
    lines: list
    bad: list


def open_task(folder, name, training=True):
    """-> Task, {split: Examples}: train, unless training=False, and the task's dev splits. Raises BadInput.

    name: one of TASKS, in any case; or a task of yours, a folder with train.tsv and dev.tsv (quoting off) or train.csv and
    dev.csv (quoting on) with columns sentence, or sentence1 and sentence2, and label. If 90 % of train's labels are numbers, and
    not all are whole, it is a regression (Pearson, Spearman), else the sorted labels of train are its classes (accuracy).
    training=False: where there is no train, dev tells instead.
    """
    known = {task.lower(): task for task in TASKS}
    name = known.get(name.lower(), name)
    task = TASKS.get(name) or own_task(find_split(folder, name, "train", *() if training else ("dev",)))
    return task, {split: read_task(folder, name, split, task) for split in (*("train",) * training, *task.dev)}


def own_task(path):
    """-> the Task that the header and the labels of a training file make. Raises BadInput."""
    header, rows = read_table(path)
    known = [name for name in header if name in ("label", "sentence", "sentence1", "sentence2")]
    if sorted(known) not in (["label", "sentence"], ["label", "sentence1", "sentence2"]):
        raise BadInput(f"{path}: its columns are {', '.join(header)[:100]}; "
                       "it needs label, and sentence, or sentence1 and sentence2, each once and no other of these")
    columns = ("sentence", None, "label") if "sentence" in known else ("sentence1", "sentence2", "label")
    faults = [fault(row, header, columns) for _, row in rows]
    labels = [row[header.index("label")].strip() for (_, row), wrong in zip(rows, faults) if not wrong]
    if not labels:
        raise unusable(path, [f"{path} line {line}: {wrong}" for (line, _), wrong in zip(rows, faults)])
    numbers = [number for number in map(number_of, labels) if number is not None]
    if len(numbers) >= 0.9 * len(labels) and any(number != int(number) for number in numbers):
        return Task((), ("pearson", "spearman"), columns)
    whole = len(numbers) == len(labels)
    classes = {whole_number(label) if whole else label for label in labels}
    if len(classes) < 2:
        raise BadInput(f"{path}: {len(classes)} different labels; there is nothing to tell apart")
    return Task(tuple(sorted(classes, key=float if whole else None)), ("accuracy",), columns)


def fault(row, header, columns):
    """-> what is wrong with a row whatever its label says, or an empty text; columns: a Task's."""
    if len(row) != len(header):
        return f"{len(row)} columns instead of {len(header)}"
    if not all(row[header.index(column)].strip() for column in columns[:2] if column):
        return "an empty sentence"
    return "" if columns[2] not in header or row[header.index(columns[2])].strip() else "no label"


def unusable(path, bad):
    """-> BadInput for a file of which no row can be used; bad: a line for each."""
    return BadInput(f"{bad[0]}; nor can any other of its {len(bad)} rows be used" if bad else f"{path}: a header and no rows")


def whole_number(label):
    """-> the label, a whole number as Python writes it: 1 for 1.0, 01 and +1."""
    try:
        return str(int(label))                                                     # also of more digits than a float holds
    except ValueError:
        number = number_of(label)
    return label if number is None or number != int(number) else str(int(number))


def number_of(text):
    """-> float, or None if the text is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def find_split(folder, name, *splits):
    """-> path of the file of the first split that is there: in folder/name if there is such a folder, else in the folder.
    Raises BadInput."""
    inside = os.path.join(folder, name)
    home = inside if os.path.isdir(inside) else folder
    places = [os.path.join(home, split + end) for split in splits for end in (".tsv", ".csv")]
    found = next((place for place in places if os.path.isfile(place)), None)
    if not found:
        raise BadInput(f"{os.path.join(inside, splits[-1])}.tsv: no such file; `python -m data.text glue` fetches GLUE's, "
                       "or write one (.tsv or .csv)")
    return found


def read_table(path, header=None):
    """-> names of the columns, [(line number, row)]; .tsv has no quoting, .csv has. Empty lines are left out. Raises BadInput."""
    rows, lines, last = [], lines_of(path, whole=True), 0
    csv.field_size_limit(1 << 30)                                                  # characters of a cell; else it is 131072
    try:
        if path.endswith(".csv"):
            table = csv.reader(lines, strict=True)
            for row in table:
                rows.append((last + 1, row))
                last = table.line_num
        else:
            rows = [(i, line.rstrip("\n").split("\t")) for i, line in enumerate(lines, 1)]
    except csv.Error as e:
        raise BadInput(f"{path} line {last + 1}: not CSV ({e}); mend the line") from None
    rows = [(i, row) for i, row in rows if any(map(str.strip, row))]
    if not rows:
        raise BadInput(f"{path}: empty; there is nothing to read")
    if header is None or rows[0][1] == ["index", "sentence"]:                      # so CoLA's test file begins
        header = [name.strip() for name in rows.pop(0)[1]]
    return header, rows


def read_task(folder, name, split, task=None):
    """-> Examples of folder/name/split.tsv (or .csv, or the file in the folder itself); task: by default TASKS[name].

    Rows that cannot be used are collected in `bad`; BadInput if none is left, or the file or a column is missing.
    """
    task, path = task or TASKS[name], find_split(folder, name, split)
    header, table = read_table(path, COLA if name == "CoLA" else None)
    if twice := [column for column in task.columns if header.count(column) > 1]:
        raise BadInput(f"{path}: {header.count(twice[0])} columns are called {twice[0]}; keep one")
    first, second, label = (header.index(column) if column in header else None for column in task.columns)
    if first is None or (second is None) != (task.columns[1] is None) or (label is None and split.startswith(("train", "dev"))):
        missing = [column for column in task.columns if column and column not in header]
        raise BadInput(f"{path}: no column {missing[0]}; its columns are {', '.join(header)[:100]}")
    out = Examples([], [], [])
    for line, row in table:
        value, wrong = None, fault(row, header, task.columns)
        if not wrong and label is not None:
            text = row[label].strip()
            text = text if text in task.classes else whole_number(text)
            value = number_of(text) if not task.classes else task.classes.index(text) if text in task.classes else None
            if value is None:
                wrong = f"label {text[:40]!r} is " + (f"none of {', '.join(task.classes)[:100]}" if task.classes else "no number")
        if wrong:
            out.bad.append(f"{path} line {line}: {wrong}")
        else:
            out.rows.append((row[first].strip(), None if second is None else row[second].strip(), value))
            out.lines.append(line)
    if not out.rows:
        raise unusable(path, out.bad)
    return out


def sentence_ids(vocabulary, first, second=None, max_tokens=512):
    """-> list of ids: <s> first </s>, or of a pair <s> first </s> </s> second </s> (SPEC section 5); of what is too long the
    longer sentence loses its end."""
    a, b = vocabulary.encode(first), [] if second is None else vocabulary.encode(second)
    room = max_tokens - (2 if second is None else 4)
    while len(a) + len(b) > max(0, room):
        (a if len(a) > len(b) else b).pop()
    return [BOS, *a, EOS] + ([] if second is None else [EOS, *b, EOS])


class Sentences(torch.utils.data.Dataset):
    """sentences[[(epoch, index), ...]] -> dict(tokens (B, T) int64, padded with <pad>; labels (B,) float32), for
    DataLoader(batch_size=None). rows: as Examples.rows; what is longer than max_tokens loses its end."""

    def __init__(self, rows, vocabulary, max_tokens):
        self.rows, self.vocabulary, self.max_tokens = rows, vocabulary, max_tokens

    def __len__(self):
        return len(self.rows)

    def part(self, indices):
        """-> the Sentences of these rows alone, in this order."""
        return Sentences([self.rows[i] for i in indices], self.vocabulary, self.max_tokens)

    def cut(self):
        """-> number of rows that lose their end."""
        return sum(len(sentence_ids(self.vocabulary, a, b, math.inf)) > self.max_tokens for a, b, _ in self.rows)

    def __getitem__(self, keys):
        rows = [self.rows[index] for _, index in keys]
        ids = [torch.tensor(sentence_ids(self.vocabulary, a, b, self.max_tokens)) for a, b, _ in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
        return {"tokens": tokens, "labels": torch.tensor([float(label) for *_, label in rows])}


# ------------------------------------------------------------------------------------------------- metrics, of numpy arrays

def accuracy(predicted, labels):
    """Share of equal ones."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted, labels):
    """Of class 1, harmonic mean of precision and recall; 0 if there is no true positive."""
    p, t = np.asarray(predicted) == 1, np.asarray(labels) == 1
    return float(2 * (p & t).sum() / max(1, p.sum() + t.sum()))


def matthews(predicted, labels):
    """Correlation of two classes 0 and 1; 0 if one side has one class only."""
    return pearson(np.asarray(predicted) == 1, np.asarray(labels) == 1)            # Matthews' is Pearson's of 0 and 1


def pearson(predicted, labels):
    """Linear correlation; 0 if one side is constant, nan if a value is not finite."""
    a, b = (np.asarray(x, np.float64) for x in (predicted, labels))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def spearman(predicted, labels):
    """Correlation of ranks; equal values share the mean of theirs; nan if a value is not finite."""
    return pearson(*(ranks(x) for x in (predicted, labels)))


def ranks(x):
    """-> (n,) float64, from 1; equal values get their mean rank, what is not finite has none (nan)."""
    x = np.asarray(x, np.float64)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.where(np.isfinite(x), ((2 * last - counts + 1) / 2)[inverse.ravel()], np.nan)


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}


# ------------------------------------------------------------------------------------------ python -m data.text glue

URL = "https://dl.fbaipublicfiles.com"
MRPC_FILES = {"train": "senteval/senteval_data/msr_paraphrase_train.txt",
              "test": "senteval/senteval_data/msr_paraphrase_test.txt", "dev": "glue/data/mrpc_dev_ids.tsv"}


def fetch(url, path, md5):
    """Fetch a file unless it is there, and not empty; the md5 is checked if one is given. Raises BadInput."""
    if not os.path.exists(path) or not os.path.getsize(path):
        download(url, path, md5)
    elif md5 and md5_of(path) != md5:
        raise BadInput(f"{path}: its md5 is not {md5}; remove it and run this again")


def download_task(out, name, url, md5=None):
    """Fetch a task of GLUE unless it is there already, and leave it as out/name/*.tsv. Raises BadInput.

    A zip says itself whether it is whole (the CRC of each file). Of MRPC, whose files are not in a zip, `md5` is train's.
    """
    target = os.path.join(out, name)
    files = [os.path.join(target, f"{split}.tsv") for split in ("train", *TASKS[name].dev)]
    if not (lacks := [path for path in files if not os.path.isfile(path) or not os.path.getsize(path)]):
        return
    if os.path.isdir(target) and os.listdir(target):
        raise BadInput(f"{lacks[0]}: missing or empty; remove {target} and run this again")
    part = os.path.join(out, f".{name}.part")                                      # hidden until whole
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        mrpc(out, part, url, md5) if name == "MRPC" else unzip(out, name, part, url, md5)
        for split in ("train", *TASKS[name].dev):
            try:
                read_task(part, name, split)
            except BadInput as e:
                raise BadInput(f"{url}: what came is not GLUE's {name} ({str(e).removeprefix(part + os.sep)}); "
                               f"remove what lies in {out} and run this again") from None
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unzip(out, name, part, url, md5):
    """Write the archive's {train,dev*,test*}.tsv into `part`; its other names are not looked at, so none leads outside."""
    archive = os.path.join(out, TASKS[name].archive)
    fetch(f"{url.rstrip('/')}/glue/data/{TASKS[name].archive}", archive, md5)
    try:
        with zipfile.ZipFile(archive) as file:
            inside = {member.filename.rpartition("/")[2]: member for member in file.infolist() if member.filename.count("/") == 1}
            for split in ("train", "test", "test_matched", "test_mismatched", *TASKS[name].dev):
                if member := inside.get(f"{split}.tsv"):
                    with file.open(member) as source, open(os.path.join(part, f"{split}.tsv"), "wb") as target:
                        shutil.copyfileobj(source, target)                         # raises BadZipFile for a wrong CRC
                elif not split.startswith("test"):
                    raise ValueError(f"no {name}/{split}.tsv in it")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as e:
        raise BadInput(f"{archive}: not GLUE's {name}, or damaged ({why(e)}); remove it and run this again") from None


def mrpc(out, part, url, md5):
    """Write MRPC's train, dev and test.tsv into `part`: dev is those pairs of ids in the original training file that GLUE's
    mrpc_dev_ids.tsv lists (408 of 4076)."""
    places = {split: os.path.join(out, os.path.basename(file)) for split, file in MRPC_FILES.items()}
    for split, file in MRPC_FILES.items():
        fetch(f"{url.rstrip('/')}/{file}", places[split], md5 if split == "train" else None)
    dev, written = {tuple(line.split()) for line in lines_of(places["dev"])}, Counter()
    for split in ("train", "test"):
        if not (lines := list(lines_of(places[split]))):
            raise BadInput(f"{places[split]}: came empty; run this again, or download it by hand")
        with open(os.path.join(part, f"{split}.tsv"), "w", encoding="utf-8", newline="\n") as file, \
                open(os.path.join(part, "dev.tsv"), "a", encoding="utf-8", newline="\n") as held_out:
            file.write(lines[0])
            held_out.write(lines[0] if split == "train" else "")
            for line in lines[1:]:
                listed = split == "train" and tuple(line.split("\t")[1:3]) in dev
                written[split, listed] += 1
                (held_out if listed else file).write(line)
    if not written["train", True] == len(dev) > 0:
        raise BadInput(f"{places['dev']}: {written['train', True]} of its {len(dev)} pairs are in {places['train']}; "
                       "remove both and run this again")

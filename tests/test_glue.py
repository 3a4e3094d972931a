"""GLUE's files and tables of one's own, metrics against their formulas."""

import math
import statistics

import numpy as np
import pytest

from common import UserError
from data import glue as G
from data import text as T

SENTENCES = ["sentence1", "sentence2"]
LAYOUTS = {  # the header (CoLA has none), a row, what it says
    "CoLA": (None, ["gj04", "1", "*", 'He said "no.'], (('He said "no.',), 1)),
    "SST-2": (["sentence", "label"], ["a charming film ", "1"], (("a charming film",), 1)),
    "MRPC": (["Quality", "ID", "#1 String", "#2 String"], ["0", "12", '"A', "B"], (('"A', "B"), 0)),
    "STS-B": (["index", *SENTENCES, "score"], ["0", "A.", "B.", "3.750"], (("A.", "B."), 3.75)),
    "QQP": (["id", "question1", "question2", "is_duplicate"], ["1", "A?", "B?", "0"], (("A?", "B?"), 0)),
    "MNLI": ([*SENTENCES, "label1", "gold_label"], ["A.", "B.", "neutral", "entailment"], (("A.", "B."), 2)),
    "QNLI": (["question", "sentence", "label"], ["A?", "B.", "not_entailment"], (("A?", "B."), 1)),
    "RTE": (["index", *SENTENCES, "label"], ["0", "P.", "H.", "entailment"], (("P.", "H."), 0)),
}  # fmt: skip


def tsv(*rows, end="\n"):
    return "".join("\t".join(row) + end for row in rows if row)


def write_task(root, name, *rows, end="\n"):
    (root / name).mkdir(parents=True, exist_ok=True)
    content = tsv(*LAYOUTS[name][:2], *rows, end=end)
    for split in ("train", *G.TASKS[name].dev):
        (root / name / f"{split}.tsv").write_text(content, encoding="utf-8", newline="")
    return root / name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    assert set(G.TASKS) == set(LAYOUTS)
    folder = write_task(tmp_path, name, end="\r\n" if name == "MRPC" else "\n")
    task, splits = G.open_task(folder)
    assert task == G.TASKS[name] and set(task.metrics) <= set(G.METRICS)
    assert splits == dict.fromkeys(["train", *task.dev], [LAYOUTS[name][2]])
    (folder / "train.tsv").unlink()
    assert set(G.open_task(folder, training=False)[1]) == set(task.dev)
    with pytest.raises(UserError, match=f"{name}: no train.tsv or .csv"):
        G.open_task(folder)


HUB = {  # folder, header, rows (names or numbers of classes), labels that they have
    "CoLA": ("cola", "sentence,label,idx", ["a,1,0", "b,unacceptable,1"], [1, 0]),
    "SST-2": ("sst2", "sentence,label,idx", ["a,0,0", "b,positive,1"], [0, 1]),
    "MRPC": ("mrpc", "sentence1,sentence2,label,idx", ["a,b,1,0", "a,b,not_equivalent,1"], [1, 0]),
    "STS-B": ("stsb", "sentence1,sentence2,label,idx", ["a,b,3.75,0", "a,b,5,1"], [3.75, 5]),
    "QQP": ("QQP", "question1,question2,label,idx", ["a,b,0,0", "a,b,duplicate,1"], [0, 1]),
    "MNLI": ("mnli", "premise,hypothesis,label,idx", ["a,b,0,0", "a,b,1,1", "a,b,2,2", "a,b,ENTAILMENT,3"],
             [2, 1, 0, 2]),
    "QNLI": ("qnli", "question,sentence,label,idx", ["a,b,0,0", "a,b,not_entailment,1"], [0, 1]),
    "RTE": ("rte", "sentence1,sentence2,label,idx", ["a,b,1,0", "a,b,entailment,1"], [1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".CSV"])
@pytest.mark.parametrize("name", HUB)
def test_tables_of_the_hub(name, ending, tmp_path, capsys):
    folder, header, rows, labels = HUB[name]
    (tmp_path / folder).mkdir()
    mark, cell = "," if ending.lower() == ".csv" else "\t", '"said ""so"",\nand left"'
    rows = [header, *rows, header.replace("label", "none")]
    content = "\r\n".join(mark.join(cell if part == "a" else part for part in row.split(",")) for row in rows)
    for split in ("train", *(part.replace("dev", "Validation") for part in G.TASKS[name].dev)):
        (tmp_path / folder / f"{split}{ending}").write_text(content, newline="")
        (tmp_path / folder / f"{split.replace('Validation', 'test')}{ending}").write_text(content, newline="")
    task, splits = G.open_task(tmp_path / folder)
    assert task == G.TASKS[name] and list(splits) == ["train", *task.dev]
    for examples in splits.values():
        assert [label for _, label in examples] == labels
        assert examples[0][0][0] == 'said "so",\nand left'
    printed = capsys.readouterr().out
    for part in (split[3:] + ending for split in task.dev):
        assert f"Validation{part}; not used: test{part}\n" in printed


def test_broken_rows_are_skipped(tmp_path, capsys):
    good = LAYOUTS["QQP"][1]
    broken = [*good[:3], "2"], good[:2], ["a"], [*good[:3], ""], [*good[:2], " ", "1"], [*good, "x"]
    folder = write_task(tmp_path, "QQP", *broken, good, ["", "", ""])
    assert len(G.open_task(folder)[1]["train"]) == 2
    assert "QQP/train.tsv: skipped 7 rows, the first is {'id': '1'," in capsys.readouterr().out
    scores = [[*LAYOUTS["STS-B"][1][:3], label] for label in ("high", "nan", "")]
    assert len(G.open_task(write_task(tmp_path, "STS-B", *scores))[1]["dev"]) == 1
    folder = write_task(tmp_path, "RTE")
    for content, message in (
        (b"sentence1\tsentence2\tlabel\n", r"no row can be used: \[\]"),
        (b"sentence1\tlabel\na\tentailment\n", r"needs label and one of .*'sentence1', 'sentence2'"),
        (b"sentence1\tsentence2\tlabel\na\tb\tc\nd\n", "no row can be used: .*'label': 'c'"),
        (b"sentence1\tsentence2\tlabel\na\tb\t\xe9", "train.tsv: .*can't decode"),
    ):
        (folder / "train.tsv").write_bytes(content)
        with pytest.raises(UserError, match=message):
            G.open_task(folder)


def write_own(folder, labels, text="some words"):
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        rows = ["sentence\tlabel", *(f"{text}\t{label}" for label in labels)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_tables_of_ones_own(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    rows = 'label,idx,sentence\npos,0,"good, very\ngood"\nneg,1,bad\nneutral,2,"said ""so"""\n'
    (mine / "train.csv").write_text(rows)
    (mine / "dev.csv").write_text("sentence,label\nfine,pos\nodd,strange\n")
    task, splits = G.open_task(mine)
    assert task.classes == ("neg", "neutral", "pos") and task.metrics == ("accuracy",)
    expected = [(("good, very\ngood",), 2), (("bad",), 0), (('said "so"',), 1)]
    assert splits == {"train": expected, "dev": [(("fine",), 2)]}
    (mine / "train.csv").write_text('label,sentence\npos,"never closed\n')
    with pytest.raises(UserError, match="train.csv: .*matching quotes"):
        G.open_task(mine)
    assert G.open_task(write_own(tmp_path / "b", ["1.5", "2.0", "beta", "none"]))[0].classes[-1] == "none"
    task, splits = G.open_task(write_own(tmp_path / "c", ["1", "2", "-.5", *["4.75"] * 8, "n/a"]))
    assert task.classes == G.SCORE and task.metrics == ("pearson", "spearman")
    assert [label for _, label in splits["dev"]] == [1, 2, -0.5] + [4.75] * 8
    long = "word " * 40_000  # Python's csv by default stops at 131072 characters
    _, splits = G.open_task(write_own(tmp_path / "d", ["0", "1"], long))
    assert splits["train"][1] == ((long.strip(),), 1)


def test_numbers_sort_as_numbers_and_held_out_files_have_customary_names(tmp_path, capsys):
    labels = [str(i) for i in range(12)]
    mine = write_own(tmp_path / "a", ["none", *reversed(labels)])
    assert G.open_task(mine)[0].classes == (*labels, "none")
    (mine / "dev.tsv").rename(mine / "VAL.tsv")
    (mine / "test.csv").write_text("text,label\nfine,11\nbad,2\n")
    assert len(G.open_task(mine)[1]["dev"]) == 13
    assert f"held out: {mine}/VAL.tsv; not used: test.csv\n" in capsys.readouterr().out
    (mine / "VAL.tsv").unlink()
    (mine / "train.tsv").unlink()
    names = ["2", "11", "one"]  # of a file, of which not all need be here
    task, splits = G.open_task(mine, training=False, names=names)
    assert list(task.classes) == names and splits["dev"] == [(("fine",), 1), (("bad",), 0)]
    assert G.open_task(mine, training=False, names=["score"])[0].classes == G.SCORE


def test_outputs_are_found_by_the_names_of_their_classes(capsys):
    mnli, own = G.TASKS["MNLI"], G.Task(("bad", "fine", "odd"), ("accuracy",))
    silent = [(mnli, list(mnli.classes), [0, 1, 2]), (own, ["a", "b", "c"], []), (own, ["bad", "fine"], [])]
    silent += [(own, ["0", "1", "2", "3"], []), (G.TASKS["STS-B"], ["score"], [0])]
    silent += [(own, [], []), (mnli, ["0", "1", "2"], [2, 1, 0])]
    silent += [(mnli, ["ENTAILMENT", "Neutral", "CONTRADICTION"], [2, 1, 0])]
    silent += [(own, ["odd", "bad", "fine"], [1, 2, 0]), (G.TASKS["SST-2"], ["POSITIVE", "NEGATIVE"], [1, 0])]
    told = [(own, ["0", "1", "2"], [0, 1, 2])]  # an order is assumed
    told += [(own._replace(classes=("0", "1", "2")), ["x", "y", "z"], [0, 1, 2])]
    for task, names, order in silent + told:
        assert G.output_order(task, names, assume=True) == order, names
        assert capsys.readouterr().out.count("classes: ") == ((task, names, order) in told)
    assert G.output_order(own, ["0", "1", "2"], assume=False) == []


def test_sentences_become_ids():
    vocabulary = T.train_vocabulary(["the cat sat on banana mat " * 9], 300)
    a, b = vocabulary.encode("the cat sat"), vocabulary.encode("on banana mat")
    assert G.sentence_ids(vocabulary, "the cat sat") == [0, *a, 2]
    assert G.sentence_ids(vocabulary, "the cat sat", "on banana mat") == [0, *a, 2, 2, *b, 2]
    assert G.sentence_ids(vocabulary, "the cat sat", max_tokens=4) == [0, *a[:2], 2]
    long = vocabulary.encode("on banana mat " * 9)
    cut = G.sentence_ids(vocabulary, "the cat sat", "on banana mat " * 9, max_tokens=2 * len(a) + 3)
    assert cut == [0, *a, 2, 2, *long[: len(a) - 1], 2]  # the longer one is cut
    sentences = G.Sentences([(("the cat sat",), 1), (("on banana mat", "a"), 0.5)], vocabulary, 512)
    batch = sentences[[(0, 1), (3, 0)]]
    assert batch["tokens"].tolist()[1] == [0, *a, 2] + [1] * (batch["tokens"].shape[1] - len(a) - 2)
    assert batch["labels"].tolist() == [0.5, 1]


def test_real_glue(shared):
    for name, counts in (("SST-2", (6917, 3608, 872, 444)), ("CoLA", (8533, 6008, 1043, 719))):
        splits = G.open_task(shared / "text" / "glue" / name)[1].values()
        assert tuple(n for rows in splits for n in (len(rows), sum(label for _, label in rows))) == counts


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_their_formulas(seed):
    rng = np.random.default_rng(seed)
    p, t = rng.integers(2, size=50), rng.integers(2, size=50)
    tp, fp, fn, tn = (sum((x, y) == pair for x, y in zip(p, t)) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert G.METRICS["accuracy"](p, t) == pytest.approx((tp + tn) / 50)
    assert G.METRICS["f1"](p, t) == pytest.approx(2 / ((tp + fp) / tp + (tp + fn) / tp))
    norm = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert G.METRICS["matthews"](p, t) == pytest.approx((tp * tn - fp * fn) / norm)
    a, b = rng.integers(6, size=40).tolist(), rng.normal(size=40).round(1).tolist()
    assert G.pearson(a, b) == pytest.approx(statistics.correlation(a, b))
    ra, rb = ([sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v] for v in (a, b))
    assert G.ranks(a).tolist() == ra
    assert G.METRICS["spearman"](a, b) == pytest.approx(statistics.correlation(ra, rb))


def test_metrics_at_their_limits():
    spearman = G.METRICS["spearman"]
    assert G.pearson([2, 2], [0, 1]) == spearman([0, 1], [3, 3]) == 0
    assert G.pearson([0.1] * 3, [1, 2, 4]) == 0, "a mean that rounds makes no variance"
    assert math.isnan(G.pearson([math.nan, 1, 2], [3, 4, 5]) + spearman([math.nan, 1, 2], [3, 4, 5]))
    assert G.METRICS["f1"](np.zeros(1), np.zeros(1)) == 0

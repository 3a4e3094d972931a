"""finetune.py on sentences: tasks in GLUE's layouts and of one's own, from a tiny pre-trained text model."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import train_text
from data import glue
from tests import helpers
from tests.helpers import FAST, call, checkpoint, done, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(helpers.refused, by="finetune.py: ")
TINY = f"--preset glue_small {FAST} --steps 6 --global_batch 8 --dropout 0 --lr 3e-3".split()
MOODS = {1: ("fine", "great", "lovely"), 0: ("dull", "awful", "poor")}


def write_task(folder, header, lines):
    folder.mkdir(parents=True)
    for split, part in (("train", lines), ("dev", lines[:10])):
        (folder / f"{split}.tsv").write_text("\n".join([header, *part]) + "\n")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks whose labels are words of the sentence, in several layouts."""
    root, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    told = [(y, f"the film is {rng.choice(MOODS[y])} i say") for y in rng.integers(0, 2, 40).tolist()]
    write_task(root / "SST-2", "sentence\tlabel", [f"{s}\t{y}" for y, s in told])
    pair = "sentence1\tsentence2\t"
    write_task(root / "pairs", pair + "label", [f"{s}\t{s} again\t{('no', 'yes')[y]}" for y, s in told])
    write_task(root / "STS-B", pair + "score", [f"{s}\tas we said\t{4.5 * y}" for y, s in told])
    mnli = [f"{s}\tso\t{('neutral', 'entailment')[y]}" for y, s in told]
    write_task(root / "MNLI", pair + "gold_label", mnli)
    (root / "MNLI/dev.tsv").rename(root / "MNLI/dev_matched.tsv")
    (root / "MNLI/dev_mismatched.tsv").write_text((root / "MNLI/train.tsv").read_text())
    cola = [f"src\t{y}\t{'*' * (1 - y)}\t{s}" for y, s in told]
    write_task(root / "CoLA", cola[0], cola[1:])  # no header
    return root


@pytest.fixture(scope="module")
def tune(tasks, finished):
    """tune(flag, ..., init=): one tiny run from a pre-trained checkpoint; later flags win."""

    def run(*flags, init=finished["text"] / "ckpt.pt"):
        start = *TINY, "--data", tasks, "--init", init
        return call(finetune, *start, *(word for flag in flags for word in str(flag).split()))

    return run


@pytest.fixture(scope="module")
def learned(tune, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "run"
    done(tune("--task SST-2 --steps 80 --probe_every 40 --lr 1e-2 --out", out))
    return out


def test_an_easy_task_is_learned_and_results_say_so(learned):
    numbers, best = results(learned), checkpoint(learned, "best.pt")
    assert numbers["accuracy"] >= 0.9 and numbers["best_accuracy"] >= numbers["accuracy"]
    assert numbers["examples"] == 40 and "best_step" in numbers
    assert [line["step"] for line in rows(learned) if "accuracy" in line] == [40, 80]
    assert (best["task"], best["finetune"]["task"], best["parts"]) == ("sentences", "SST-2", 1)
    assert best["classes"] == ["0", "1"] and best["vocabulary"].startswith("data2vec vocabulary")
    assert {group["eps"] for group in checkpoint(learned)["optimizer"]["param_groups"]} == {1e-6}


METRICS = "CoLA matthews,STS-B pearson spearman,MNLI accuracy accuracy_mismatched,pairs accuracy"


@pytest.mark.parametrize("case", METRICS.split(","))
def test_every_layout_has_its_metrics(case, tune, tmp_path):
    task, *metrics = case.split()
    done(tune("--task", task, "--out", tmp_path / "run"))
    numbers = results(tmp_path / "run")
    assert [name for name in numbers if name.split("_")[0] in glue.METRICS] == metrics
    assert all(-1 <= numbers[name] <= 1 for name in metrics)


def test_the_head_reads_the_first_token_alone():
    cfg = train_text.Config(dim=8, depth=1, heads=2, ffn=16, max_tokens=16)
    model = finetune.SentenceClassifier(train_text.build(cfg, 50).encoder, 3).eval()
    tokens = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    x = model.encoder(tokens)[0][:, 0]
    x = torch.tanh(F.linear(x, model.dense.weight, model.dense.bias))
    torch.testing.assert_close(model(tokens), F.linear(x, model.out.weight, model.out.bias))


def test_the_largest_score_of_all_tokens(tune, tmp_path, monkeypatch):
    cfg = train_text.Config(dim=8, depth=1, heads=2, ffn=16, max_tokens=16)
    model = finetune.SentenceClassifier(train_text.build(cfg, 50).encoder, 3, pool="max").eval()
    tokens = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    scores = model.out(model.dense(model.encoder(tokens)[0]).tanh())
    expected = torch.stack([scores[0].amax(0), scores[1, :3].amax(0)])  # not of padding
    torch.testing.assert_close(model(tokens), expected)
    built, build = [], finetune.SentenceClassifier.__init__
    record = lambda self, *sizes: built.append(sizes[-1]) or build(self, *sizes)  # noqa: E731
    monkeypatch.setattr(finetune.SentenceClassifier, "__init__", record)
    done(tune("--task SST-2 --pool max --out", tmp_path / "run"))
    done(tune("--task SST-2 --eval_only --out", tmp_path / "eval", init=tmp_path / "run/ckpt.pt"))
    assert results(tmp_path / "eval")["accuracy"] == results(tmp_path / "run")["accuracy"]
    assert built == ["max", "max"]  # the file says it


def test_a_small_fraction_of_the_labels_holds_every_class(tune, tmp_path):
    lines = [f"{word}\t{label}" for label, n in (("no", 95), ("yes", 5)) for word in ["words"] * n]
    write_task(tmp_path / "rare", "sentence\tlabel", lines)
    (tmp_path / "rare/dev.tsv").write_text((tmp_path / "rare/train.tsv").read_text())
    done(tune("--task rare --label_fraction 0.05 --steps 1 --data", tmp_path, "--out", tmp_path / "run"))
    assert results(tmp_path / "run")["examples"] == 6  # round(4.75) + 1


@pytest.mark.parametrize("task", ["SST-2", "pairs"])
def test_eval_only_knows_the_task_and_needs_no_training_part(task, tasks, tune, tmp_path):
    done(tune("--task", task, "--out", tmp_path / "run"))
    (tmp_path / "data" / task).mkdir(parents=True)
    (tmp_path / "data" / task / "dev.tsv").write_text((tasks / task / "dev.tsv").read_text())
    flags = f"--preset smoke --eval_only --workers 0 --dtype float32 --data {tmp_path / 'data'}"
    done(call(finetune, *flags.split(), "--init", tmp_path / "run/ckpt.pt", "--out", tmp_path / "eval"))
    assert results(tmp_path / "eval")["accuracy"] == results(tmp_path / "run")["accuracy"]


def test_each_sentence_of_predict_is_answered_or_skipped(learned, tune, tmp_path):
    sentences = "the film is great i say", "the film is awful i say", "", "two\tsentences"
    lines = done(call(finetune, "--init", learned / "best.pt", "--predict", *sentences)).splitlines()
    assert "great i say: 1 " in lines[0] and "awful i say: 0 " in lines[1]
    assert all(": skipped" in line for line in lines[2:])
    for task, answer in (("pairs", r"(no|yes) 0\.\d+, (no|yes) 0\.\d+"), ("STS-B", r"-?\d\.\d+")):
        done(tune("--task", task, "--out", tmp_path / task))
        init = "--init", tmp_path / task / "best.pt"
        one, two = done(call(finetune, *init, "--predict", "the film", "the film\tagain")).splitlines()
        assert ": skipped" in one
        assert re.fullmatch(answer, two.partition(": ")[2]), two


@pytest.mark.parametrize("names", [["1", "0"], ["POSITIVE", "NEGATIVE"]], ids=str)
def test_outputs_in_another_order_are_found_by_name(names, learned, tune, tmp_path):
    state = checkpoint(learned, "best.pt")
    head = {name: state["student"][name].flip(0) for name in ("out.weight", "out.bias")}
    state |= {"classes": names, "student": state["student"] | head}
    torch.save(state, tmp_path / "best.pt")
    flags = "--task SST-2 --eval_only", "--out", tmp_path / "eval"
    done(tune(*flags, init=tmp_path / "best.pt"))
    assert results(tmp_path / "eval")["accuracy"] == results(learned)["best_accuracy"]


def test_a_run_whose_numbers_were_sorted_as_text_goes_on(tune, tmp_path):
    out, data = tmp_path / "run", tmp_path / "data"
    write_task(data / "twelve", "sentence\tlabel", [f"{'word ' * i}end\t{i}" for i in range(12)])
    done(tune("--task twelve --steps 2 --data", data, "--out", out))
    state = checkpoint(out)
    assert state["classes"] == [str(i) for i in range(12)]
    state["classes"].sort()
    torch.save(state, out / "ckpt.pt")
    done(tune("--task twelve --steps 3 --resume --data", data, "--out", out))
    assert checkpoint(out)["classes"] == sorted(str(i) for i in range(12))


def test_steps_and_batches_of_the_paper_follow_from_the_task(finished, monkeypatch):
    names = {"CoLA": 5336, "MNLI": 123_873, "MRPC": 2296, "QNLI": 33_112, "QQP": 113_272, "RTE": 2036}
    names |= {"SST-2": 20_935, "STS-B": 3598, "mine": 13}
    examples = [(("a",), 0)] * 40
    for name, steps in names.items():
        spec = glue.TASKS.get(name, glue.Task(glue.SCORE, ("pearson",)))
        monkeypatch.setattr(glue, "open_task", lambda *_, **__: (spec, {"train": examples, "dev": examples}))  # noqa: B023
        init = {"task": name, "init": str(finished["text"] / "ckpt.pt")}
        cfg = finetune.Config(**finetune.PRESETS["glue"] | init)
        finetune.choose_task(cfg, (0, 1, torch.device("cpu"), torch.autocast("cpu", enabled=False))).setup()
        batch = 16 if name in ("CoLA", "MRPC", "RTE", "STS-B") else 32
        assert (cfg.steps, cfg.global_batch) == (steps, batch), name
    assert (cfg.weight_decay, cfg.beta2, cfg.dropout, cfg.layer_decay) == (0.1, 0.98, 0.1, 1.0)


def test_what_cannot_work_is_one_line(tune, finished, tmp_path):
    state = checkpoint(finished["text"])
    torch.save({name: value for name, value in state.items() if name != "vocabulary"}, tmp_path / "bare.pt")
    out = "--out", tmp_path / "no"
    assert "--task" in refused(tune(*out))
    assert "WNLI" in refused(tune("--task WNLI", *out))
    assert "vocabulary" in refused(tune("--task SST-2", *out, init=tmp_path / "bare.pt"))
    assert not (tmp_path / "no").exists()

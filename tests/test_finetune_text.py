"""finetune.py on sentences: tasks of GLUE's layouts and of one's own, from a tiny pre-trained text model."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import finetune
import train_text
from data import glue, text
from model import SentenceClassifier, text_encoder
from tests import helpers
from tests.helpers import assert_same, call, checkpoint, done, ended, launch, results, rows

TINY = """--preset glue_small --steps 6 --global_batch 8 --log_every 2 --probe_every 3 --workers 0 --dropout 0 --attn_dropout 0
    --head_dropout 0 --lr 3e-3 --dtype float32 --device cpu""".split()
MOODS = {"good": ("fine", "great", "lovely"), "bad": ("dull", "awful", "poor")}


def tune(*flags):
    return call(finetune, *(flags if "--resume" in flags else [*TINY, *map(str, flags)]))


refused = partial(helpers.refused, by="finetune.py: ")


def write_task(folder, header, lines):
    folder.mkdir(parents=True)
    for split, part in (("train", lines), ("dev", lines[:10])):
        (folder / f"{split}.tsv").write_text("\n".join([header, *part]) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tasks whose labels are words of the sentence, in several layouts."""
    root, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    told = [(int(good), f"the film is {rng.choice(MOODS['good' if good else 'bad'])} i say") for good in rng.random(40) < 0.5]
    write_task(root / "SST-2", "sentence\tlabel", [f"{s}\t{y}" for y, s in told])
    write_task(root / "pairs", "sentence1\tsentence2\tlabel", [f"{s}\t{s} again\t{('no', 'yes')[y]}" for y, s in told])
    write_task(root / "STS-B", "sentence1\tsentence2\tscore", [f"{s}\tas was said\t{4.5 * y}" for y, s in told])
    write_task(root / "MNLI", "sentence1\tsentence2\tgold_label", [f"{s}\tso\t{('neutral', 'entailment')[y]}" for y, s in told])
    (root / "MNLI/dev.tsv").rename(root / "MNLI/dev_matched.tsv")
    (root / "MNLI/dev_mismatched.tsv").write_text((root / "MNLI/train.tsv").read_text())
    cola = [f"src\t{y}\t{'*' * (1 - y)}\t{s}" for y, s in told]
    write_task(root / "CoLA", cola[0], cola[1:])  # no header
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, data):
    """A checkpoint of train_text.py whose student and teacher differ."""
    root = tmp_path_factory.mktemp("text")
    (root / "train.txt").write_text((data / "SST-2/train.tsv").read_text().replace("\n", "\n\n") * 3)
    text.prepare([str(root / "train.txt")], str(root / "corpus"), vocab_size=300, show=False)
    done(call(train_text, *"""--dim 16 --depth 2 --heads 2 --ffn 32 --max_tokens 32 --top_k 2 --probe_blocks 10 --eval_blocks 5 --steps 3
        --global_batch 4 --workers 0 --lr 0.01 --tau_0 0.5 --tau_e 0.5 --guard_after -1 --dtype float32 --device cpu""".split(),
        "--data", root / "corpus", "--out", root / "run"))  # fmt: skip
    return root / "run" / "ckpt.pt"


@pytest.fixture(scope="module")
def finished(data, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    done(tune("--task", "SST-2", "--data", data, "--init", pretrained, "--out", out, "--steps", 60, "--probe_every", 30, "--lr", 1e-2))
    return out


def test_an_easy_task_is_learned_and_results_say_so(finished):
    found = results(finished)
    assert found["accuracy"] >= 0.9 and found["best_accuracy"] >= found["accuracy"] and found["sentences"] == 40
    assert {"seconds", "peak_memory_gb", "final_loss", "best_step"} <= set(found)
    assert [row["step"] for row in rows(finished) if "accuracy" in row] == [30, 60]
    assert checkpoint(finished)["classes"] == ["0", "1"] and checkpoint(finished)["goal"] == "sentences"


@pytest.mark.parametrize(
    "task, metrics",
    [("cola", {"matthews"}), ("STS-B", {"pearson", "spearman"}), ("MNLI", {"accuracy", "accuracy_mismatched"}), ("pairs", {"accuracy"})],
)
def test_every_layout_has_its_metrics(task, metrics, data, pretrained, tmp_path):
    done(tune("--task", task, "--data", data, "--init", pretrained, "--out", tmp_path / "run"))
    found = results(tmp_path / "run")
    assert {name for name in found if name.split("_")[0] in glue.METRICS} == metrics
    assert all(-1 <= found[name] <= 1 for name in metrics)


def test_the_head_reads_the_first_token_alone():
    torch.manual_seed(0)
    encoder = text_encoder(vocab=50, max_length=16, pad=1, dim=8, depth=1, heads=2, ffn=16)
    model = SentenceClassifier(encoder, 3).eval()
    tokens = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
    x = encoder(tokens)[0][:, 0]
    expected = F.linear(torch.tanh(F.linear(x, model.dense.weight, model.dense.bias)), model.out.weight, model.out.bias)
    torch.testing.assert_close(model(tokens), expected)


def test_micro_batches_are_the_same_run(data, pretrained, tmp_path):
    for name, flags in (("whole", []), ("split", ["--micro_batch", 2])):
        done(tune("--task", "SST-2", "--data", data, "--init", pretrained, "--out", tmp_path / name, "--log_every", 1, *flags))
    one, two = rows(tmp_path / "whole"), rows(tmp_path / "split")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)


def test_two_processes_are_the_same_run_as_one(data, pretrained, tmp_path):
    flags = [*TINY, "--task", "SST-2", "--data", data, "--init", pretrained, "--log_every", 1, "--steps", 3]
    done(call(finetune, *flags, "--out", tmp_path / "one"))
    ended(launch(finetune.__file__, *flags, "--out", tmp_path / "two", processes=2))
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)
    assert results(tmp_path / "one")["accuracy"] == results(tmp_path / "two")["accuracy"]
    weights = [{n: w for n, w in checkpoint(tmp_path / run)["student"].items() if "k_bias" not in n} for run in ("one", "two")]
    assert_same(*weights, rtol=0, atol=1e-5)


def test_a_stopped_run_ends_with_the_same_bits(data, pretrained, tmp_path, monkeypatch):
    flags = ["--task", "SST-2", "--data", data, "--init", pretrained, "--save_every", 2, "--dropout", 0.1]
    done(tune(*flags, "--out", tmp_path / "whole"))
    save = common.save

    def stop(path, state):
        save(path, state)
        if path.name == "ckpt.pt" and state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", stop)
        assert tune(*flags, "--out", tmp_path / "cut")[0] == 130
    done(call(finetune, "--resume", "--out", tmp_path / "cut"))
    assert_same(checkpoint(tmp_path / "whole")["student"], checkpoint(tmp_path / "cut")["student"])


def test_random_takes_sizes_and_vocabulary_alone(data, pretrained, tmp_path):
    for start in ("student", "teacher", "random"):
        flags = ["--task", "SST-2", "--data", data, "--init", pretrained, "--init_from", start, "--lr", 0, "--steps", 1]
        done(tune(*flags, "--out", tmp_path / start))
    state = torch.load(pretrained, weights_only=True)
    for start in ("student", "teacher"):
        assert torch.equal(checkpoint(tmp_path / start)["student"]["encoder.blocks.0.fc1.weight"], state[start]["encoder.blocks.0.fc1.weight"])
    ours = checkpoint(tmp_path / "random")["student"]["encoder.blocks.0.fc1.weight"]
    assert not torch.allclose(ours, state["student"]["encoder.blocks.0.fc1.weight"])


def test_a_sweep_leaves_a_table_of_means_and_goes_on_where_it_was(data, pretrained, tmp_path):
    flags = ["--task", "SST-2", "--data", data, "--init", pretrained, "--sweep", "--lrs", "1e-3", "1e-2", "--seeds", 2, "--out", tmp_path / "s"]
    printed = done(tune(*flags))
    found = results(tmp_path / "s")
    for lr in ("1e-3", "1e-2"):
        runs = [results(tmp_path / "s" / f"lr{lr}-seed{seed}")["accuracy"] for seed in (0, 1)]
        assert found["table"][lr]["accuracy"] == pytest.approx([np.mean(runs), np.std(runs)])
    assert found["accuracy"] == max(mean["accuracy"][0] for mean in found["table"].values())
    assert (tmp_path / "s" / "table.md").read_text() in printed
    before = (tmp_path / "s/lr1e-3-seed0/results.json").stat().st_mtime_ns
    (tmp_path / "s/lr1e-2-seed1/results.json").unlink()
    (tmp_path / "s/lr1e-2-seed1/ckpt.pt").unlink()
    done(call(finetune, "--resume", "--out", tmp_path / "s"))
    assert results(tmp_path / "s")["table"] == found["table"]
    assert (tmp_path / "s/lr1e-3-seed0/results.json").stat().st_mtime_ns == before


def test_a_rate_that_diverges_is_left_out_of_the_table(data, pretrained, tmp_path):
    flags = ["--task", "SST-2", "--data", data, "--init", pretrained, "--sweep", "--seeds", 1, "--out", tmp_path / "s"]
    out = done(tune(*flags, "--lrs", "1e30", "1e-3"))
    assert "lr1e30-seed0: step" in out and [*results(tmp_path / "s")["table"]] == ["1e-3"]
    assert "1e30" not in (tmp_path / "s/table.md").read_text()
    status, _, error = tune(*flags[:-1], tmp_path / "none", "--lrs", "1e30")
    assert status == 1 and "no learning rate" in str(error)


def test_a_sweep_neither_evaluates_nor_predicts(finished, data, tmp_path):
    for flags in (["--eval_only"], ["--predict", "a film"]):
        assert "--sweep" in refused(call(finetune, "--init", finished / "best.pt", "--sweep", "--data", data, "--out", tmp_path / "s", *flags))


def test_a_resumed_run_keeps_its_task_and_classes(data, pretrained, tmp_path):
    """Another task of as many classes would go on silently, and its best checkpoint would be the old task's."""
    out = tmp_path / "run"
    done(tune("--task", "pairs", "--data", data, "--init", pretrained, "--out", out))
    before = (out / "config.json").read_text()
    words = (data / "pairs/train.tsv").read_text().replace("\tno\n", "\tnever\n").splitlines()
    write_task(tmp_path / "other/pairs", words[0], words[1:])  # the same name, other classes
    for flags in (["--task", "CoLA"], ["--task", "SST-2"], ["--data", tmp_path / "other"]):
        assert "a run of pairs with classes no, yes" in refused(call(finetune, "--resume", "--out", out, "--steps", 9, *flags))
        assert (out / "config.json").read_text() == before
    done(call(finetune, "--resume", "--out", out, "--steps", 9))


def test_each_sentence_of_predict_is_answered_or_skipped(finished, data, pretrained, tmp_path):
    out = done(call(finetune, "--init", finished / "best.pt", "--predict", "the film", "", "bad \udcff byte", "two\tsentences", "i say"))
    assert [line.split(": ")[1].split(",")[0] for line in out.splitlines()] [1:4] == 3 * ["skipped"] and "i say: " in out
    assert "one sentence" in out.splitlines()[3]
    old = torch.load(finished / "best.pt", weights_only=True)
    del old["parts"]  # as files were before it was kept
    torch.save(old, tmp_path / "old.pt")
    out = done(call(finetune, "--init", tmp_path / "old.pt", "--predict", "the film", "two\tsentences", "now\tthere\tare three"))
    assert [": skipped" in line for line in out.splitlines()] == [False, False, True]
    done(tune("--task", "pairs", "--data", data, "--init", pretrained, "--out", tmp_path / "run"))
    pair = partial(call, finetune, "--init", tmp_path / "run/best.pt", "--predict")
    assert "none of these is a sentence" in refused(pair("the film"))
    assert ": skipped" not in done(pair("the film\tagain"))


def test_a_small_share_of_the_labels_holds_every_class(data, pretrained, tmp_path):
    lines = [f"{word}\t{label}" for label, n in (("no", 95), ("yes", 5)) for word in ["words"] * n]
    write_task(tmp_path / "rare", "sentence\tlabel", lines)
    (tmp_path / "rare/dev.tsv").write_text((tmp_path / "rare/train.tsv").read_text())
    for seed in range(3):
        flags = ["--task", "rare", "--data", tmp_path, "--init", pretrained, "--label_fraction", 0.05, "--seed", seed, "--out", tmp_path / f"{seed}"]
        done(tune(*flags, "--steps", 1))
        assert results(tmp_path / f"{seed}")["sentences"] == 6  # round(4.75) + 1


def test_adam_is_the_papers(finished):
    assert {group["eps"] for group in checkpoint(finished)["optimizer"]["param_groups"]} == {1e-6}


def test_eval_only_and_predict_know_what_the_file_is_for(finished, data, tmp_path):
    out = done(call(finetune, "--init", finished / "ckpt.pt", "--data", data, "--eval_only", "--out", tmp_path / "eval", "--workers", 0))
    assert results(tmp_path / "eval")["accuracy"] == results(finished)["accuracy"] and "accuracy" in out
    out = done(call(finetune, "--init", finished / "best.pt", "--predict", "the film is great i say", "the film is awful i say"))
    good, bad = out.splitlines()
    assert "great i say: 1 " in good and "awful i say: 0 " in bad


@pytest.mark.parametrize("task", ["SST-2", "pairs"])
def test_eval_only_needs_no_training_part_and_counts_what_is_cut(task, data, pretrained, tmp_path):
    done(tune("--task", task, "--data", data, "--init", pretrained, "--out", tmp_path / "run"))
    held_out = tmp_path / "held-out" / task
    held_out.mkdir(parents=True)
    lines = (data / task / "dev.tsv").read_text().splitlines()
    (held_out / "dev.tsv").write_text("\n".join([*lines, "\t".join(["word " * 99] * lines[0].count("\t") + lines[1].split("\t")[-1:])]) + "\n")
    told = results(tmp_path / "run")["accuracy"] * 10
    for out, own in (("eval", []), ("papers", ["--steps", 0, "--global_batch", 0])):
        flags = "--init", tmp_path / "run/ckpt.pt", "--eval_only", "--out", tmp_path / out, "--workers", 0, *own
        printed = done(call(finetune, "--preset", "glue_small", "--data", held_out.parent, *flags))
        assert "longer than the model's 32 tokens and lose their end: 1\n" in printed
        assert results(tmp_path / out)["accuracy"] * 11 in (pytest.approx(told), pytest.approx(told + 1))


def test_a_pair_is_predicted_with_a_tab_and_a_score_is_a_number(data, pretrained, tmp_path):
    done(tune("--task", "STS-B", "--data", data, "--init", pretrained, "--out", tmp_path / "run"))
    out = done(call(finetune, "--init", tmp_path / "run/best.pt", "--predict", "the film is great i say\tas was said"))
    assert abs(float(out.split(": ")[1])) < 10


def test_the_papers_steps_and_batches_stand_behind_zeros(data):
    cfg = replace(finetune.Config(**finetune.PRESETS["glue"]), data=str(data))
    ours = {task: finetune.paper_values(replace(cfg, task=task)) for task in glue.TASKS}
    assert {task: c.steps for task, c in ours.items()} == {
        "CoLA": 5336, "MNLI": 123_873, "MRPC": 2296, "QNLI": 33_112, "QQP": 113_272, "RTE": 2036, "SST-2": 20_935, "STS-B": 3598,
    }  # fmt: skip
    assert {task for task, c in ours.items() if c.global_batch == 16} == {"CoLA", "MRPC", "RTE", "STS-B"}
    assert {c.global_batch for c in ours.values()} == {16, 32}
    assert finetune.paper_values(replace(cfg, task="pairs")).steps == 13, "10 epochs of 40 rows in batches of 32"
    assert asdict(finetune.paper_values(replace(cfg, task="sst-2", steps=7, global_batch=4)))["steps"] == 7
    c = ours["CoLA"]
    assert (c.weight_decay, c.beta2, c.dropout, c.layer_decay, c.lrs, c.seeds) == (0.1, 0.98, 0.1, 1.0, ["1e-5", "2e-5", "3e-5", "4e-5"], 5)


def test_the_rate_rises_for_6_percent_and_falls_to_nothing():
    cfg = finetune.Config(schedule="linear", steps=100, lr=1.0)
    rates = [finetune.lr_at(step, cfg) for step in range(1, 101)]
    assert rates[2] == pytest.approx(0.5) and max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[52] == pytest.approx(0.5) and rates[99] == 0


def test_what_cannot_work_is_one_line(data, pretrained, tmp_path):
    both = ["--data", data, "--init", pretrained, "--out", tmp_path / "no"]
    assert "--task" in refused(tune(*both))
    assert "train.tsv" in refused(tune(*both, "--task", "WNLI"))
    assert "random" in refused(tune("--data", data, "--task", "SST-2", "--out", tmp_path / "no"))
    for lrs in (["fast"], ["1e-4", "0.0001"], ["1e-4", "0"], ["-1"], ["inf"]):
        assert "--lrs" in refused(tune(*both, "--task", "SST-2", "--sweep", "--lrs", *lrs))
    assert "--seeds" in refused(tune(*both, "--task", "SST-2", "--sweep", "--seeds", 0))
    assert not (tmp_path / "no" / "results.json").exists()


def test_bad_rows_are_named_with_file_and_line_and_counted(data, pretrained, tmp_path):
    lines = (data / "SST-2/train.tsv").read_text().splitlines()
    lines[3:3] = ["a row without a label", "an unknown class\tmaybe", "an empty label\t"]
    write_task(tmp_path / "data/SST-2", lines[0], lines[1:])
    out = done(tune("--task", "SST-2", "--data", tmp_path / "data", "--init", pretrained, "--out", tmp_path / "run"))
    for line, why in ((4, "1 columns"), (5, "maybe"), (6, "no label")):
        assert f"train.tsv line {line}: " in out and why in out
    many = "\n".join(["sentence\tlabel", "fine\t1", "dull\t0", *30 * ["no label\t"]])
    for split in ("train", "dev"):
        (tmp_path / f"data/SST-2/{split}.tsv").write_text(many + "\n")
    out_many = done(tune("--task", "SST-2", "--data", tmp_path / "data", "--init", pretrained, "--out", tmp_path / "many"))
    assert out_many.count("skipped ") == 11 and "skipped 50 more" in out_many
    assert results(tmp_path / "run")["skipped_files"] == 6 and results(tmp_path / "run")["sentences"] == 40  # in train and dev
    assert json.loads((tmp_path / "run/config.json").read_text())["task"] == "SST-2"

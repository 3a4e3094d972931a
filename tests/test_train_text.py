"""train_text.py as its users meet it: run, killed, resumed, split over processes, begun from a checkpoint, misled."""

import json
import math
import random
import shutil
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest
import torch

import common
import train_text
import train_vision
from data import glue, text
from masking import bert_mask, span_mask_tokens
from model import Student, Teacher
from targets import linear_probe, top_k_average
from tests import helpers
from tests.helpers import assert_same, call, checkpoint, ended, kill, launch, results, rows, told, weights

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(train_text.__file__)
TINY = """--dim 16 --depth 2 --heads 2 --ffn 32 --max_tokens 32 --top_k 2 --probe_blocks 20 --eval_blocks 10 --global_batch 8
    --micro_batch 4 --steps 4 --log_every 1 --save_every 0 --probe_every 0 --workers 0 --lr 2e-3 --warmup 0 --decay 0.3
    --final_scale 0.1 --beta2 0.98 --clip 0 --tau_0 0.9 --tau_e 0.99 --tau_n 3 --guard_after -1 --dtype float32 --device cpu""".split()
STILL = "--steps 1 --lr 0 --tau_0 1 --tau_e 1".split()  # one step that moves nothing shows what was loaded


def options(*flags):
    """A tiny model, 2 micro-batches an update, and later flags that win; a resumed run has its options from its config.json."""
    return [str(flag) for flag in (flags if "--resume" in flags else [*TINY, *flags])]


def train(*flags):
    return call(train_text, *options(*flags))


refused = partial(helpers.refused, by="train_text.py: ")


# ---- a little library ----------------------------------------------------------------------------------------------

SYLLABLES = "ba ce di fo gu ha ki lo mu na pe ri so tu va we xi yo zu bra cle dri flo gru".split()


def write_library(root, seed):
    """root/text.txt: 120 documents of a few lines, each line a walk through made words in an order that can be learned."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(150)]
    documents = []
    for _ in range(120):
        starts = (rng.randrange(len(words)) for _ in range(rng.randint(1, 4)))
        lines = (" ".join(words[(at + i) % len(words)] for i in range(rng.randint(2, 12))) for at in starts)
        documents.append("".join(f"{line}.\n" for line in lines))
    (root / "text.txt").write_text("\n".join(documents))
    return root / "text.txt"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A folder that data.text prepared."""
    root = tmp_path_factory.mktemp("library")
    text.prepare([str(write_library(root, 0))], str(root / "data"), vocab_size=400, valid_share=0.1, show=False)
    return root / "data"


def batches_of(library, masker, count=8, parts=2, max_tokens=32):
    """The micro-batches of the first update of a run with seed 0."""
    train_set, _, vocabulary = text.open_corpus(str(library))
    blocks = text.Blocks(train_set, max_tokens)
    batches = text.Batches(blocks, 0, lambda ids, rng: masker(ids, vocabulary, rng))
    return [batches[keys] for keys in text.batches(len(blocks), 0, 0, 1, count, parts, 1, 0)]


def singles(ids, vocabulary, rng):
    return bert_mask(ids, vocabulary.ordinary, vocabulary.mask, 0.15, rng)


def spans(ids, vocabulary, rng):
    return span_mask_tokens(ids, vocabulary.ordinary, vocabulary.mask, 0.35, 4, rng)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, library):
    """One whole run -> its folder and what it said. Tests that go on from it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, told(train("--data", library, "--out", out, "--probe_every", 2))


def rebuilt(state, **changes):
    """Student and teacher of a checkpoint."""
    cfg = train_text.Config(**state["config"] | changes)
    student = train_text.build(cfg, text.Vocabulary.parse(state["vocabulary"]).size)
    student.load_state_dict(state["student"])
    teacher = Teacher(student.encoder, ("embed",) * cfg.share_embedding)
    teacher.load_state_dict(state["teacher"])
    return student, teacher


# ---- a run and its folder ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_config_metrics_a_checkpoint_the_vocabulary_and_results(finished, library):
    assert {path.name for path in finished[0].iterdir()} == {"config.json", "metrics.jsonl", "ckpt.pt", "results.json", "vocab"}
    assert (finished[0] / "vocab").read_bytes() == (library / "vocab").read_bytes()


def test_config_json_holds_every_field_the_versions_and_the_command(finished, library):
    config = json.loads((finished[0] / "config.json").read_text())
    assert {f.name for f in fields(train_text.Config)} | {"versions", "command"} == config.keys()
    assert config["dim"] == 16 and config["data"] == str(library) and config["preset"] == "smoke"
    assert "torch" in config["versions"] and "train_text.py" in config["command"] and "--dim 16" in config["command"]


def test_metrics_hold_one_line_a_log_step_and_probes_where_asked(finished):
    lines = rows(finished[0])
    names = "loss target_std pred_std masked tau lr grad_norm tokens_per_s samples_per_s seconds".split()
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    for row in lines:
        assert row.keys() >= set(names) and all(math.isfinite(value) for value in row.values())
    probed = [row["step"] for row in lines if {"explained", "probe", "teacher_probe"} <= row.keys()]
    assert probed == [2, 4] and all("explained" not in row for row in lines if row["step"] not in probed)


def test_results_hold_the_numbers_of_the_contract(finished):
    numbers = results(finished[0])
    both = [f"{name}_{when}" for name in ("explained", "position_share", "probe", "teacher_probe") for when in ("start", "end")]
    assert numbers.keys() == {"seconds", "peak_memory_gb", "final_loss", *both}
    assert all(0 <= numbers[name] <= 1 for name in numbers if "probe" in name) and numbers["explained_end"] <= 1
    assert numbers["final_loss"] == rows(finished[0])[-1]["loss"]
    assert numbers["seconds"] > 0 and 0.05 < numbers["peak_memory_gb"] < 8


def test_a_labelled_task_is_probed_on_mean_features_without_padding(library, tmp_path):
    """Sentences of two sorts of words, of different lengths: an untrained network's mean feature tells them apart."""
    rng, words = random.Random(0), (SYLLABLES[:12], SYLLABLES[12:])
    (home := tmp_path / "sorts").mkdir()
    for split, count in ("train", 120), ("dev", 60):
        lines = [f"{' '.join(rng.choices(words[i % 2], k=rng.randint(2, 12)))}\t{'ab'[i % 2]}" for i in range(count)]
        (home / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]) + ("one column\n" if split == "dev" else ""))
    said = told(train("--data", library, "--out", tmp_path / "run", "--probe_data", home, "--probe_every", 2))
    assert f"{home}/dev.tsv line 62: 1 columns instead of 2: left out" in said
    numbers, names = results(tmp_path / "run"), ("task_probe", "teacher_task_probe")
    assert all(0.8 < numbers[f"{name}_{when}"] <= 1 for name in names for when in ("start", "end"))
    assert [row["step"] for row in rows(tmp_path / "run") if set(names) <= row.keys()] == [2, 4]

    student, _ = rebuilt(checkpoint(tmp_path / "run"))
    vocabulary, parts = text.open_corpus(str(library))[2], glue.open_task(str(tmp_path), "sorts")[1]
    with torch.no_grad():  # a sentence at a time, so that none is padded
        mean = lambda row: student.encoder(torch.tensor([glue.sentence_ids(vocabulary, row[0], max_tokens=32)]))[0][0].mean(0)  # noqa: E731
        x, x_test = (torch.stack([mean(row) for row in parts[split].rows]) for split in ("train", "dev"))
    y, y_test = (torch.tensor([row[2] for row in parts[split].rows]) for split in ("train", "dev"))
    assert numbers["task_probe_end"] == pytest.approx(linear_probe(x, y, x_test, y_test), abs=0.02)

    for split in ("train", "dev"):
        (home / f"{split}.tsv").write_text("sentence\tlabel\nba ce\t0.5\ndi fo\t1.5\n")
    assert "scores" in refused(train("--data", library, "--out", tmp_path / "no", "--probe_data", home))
    assert not (tmp_path / "no").exists(), "refused before the run's folder is made"


def test_a_corpus_of_two_texts_has_no_probe_and_trains_all_the_same(tmp_path):
    (tmp_path / "train.txt").write_text("hello\n\nworld\n")  # one to learn from, one held out
    told(train("--data", tmp_path, "--out", tmp_path / "run", "--steps", 1, "--global_batch", 1))
    assert all(math.isnan(results(tmp_path / "run")[f"probe_{when}"]) for when in ("start", "end"))


def test_the_checkpoint_holds_all_of_the_state_as_plain_data(finished):
    state = checkpoint(finished[0])
    assert state.keys() >= {"student", "teacher", "optimizer", "step", "config", "rng", "vocabulary"}
    assert state["step"] == 4 and state["config"]["dim"] == 16 and len(state["rng"]) == 1
    assert state["vocabulary"] == (finished[0] / "vocab").read_text()
    assert {name for name in state["student"] if name.startswith("encoder.")} == state["teacher"].keys()
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.01], "on all weights, as released"


def test_speed_is_counted_in_tokens_without_padding_and_in_sequences(library, tmp_path):
    told(train("--data", library, "--out", tmp_path / "run", "--steps", 1))
    (row,) = rows(tmp_path / "run")
    batches = batches_of(library, singles)
    assert len({len(ids[ids != text.PAD]) for batch in batches for ids in batch["tokens"]}) > 2, "sequences differ in length"
    real = sum((batch["tokens"] != text.PAD).sum().item() for batch in batches)
    assert row["tokens_per_s"] / row["samples_per_s"] == pytest.approx(real / 8)


def test_a_folder_that_holds_a_run_is_not_touched(finished, library):
    before = {path.name: path.read_bytes() for path in finished[0].iterdir()}
    assert "--resume" in refused(train("--data", library, "--out", finished[0]))
    assert before == {path.name: path.read_bytes() for path in finished[0].iterdir()}


def test_resuming_a_finished_run_is_harmless(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert "step 0:" in told(train("--out", folder, "--resume"))
    for part in ("student", "teacher", "optimizer", "step"):
        assert_same(checkpoint(folder)[part], checkpoint(finished[0])[part])
    assert rows(folder) == rows(finished[0])
    ours, theirs = results(folder), results(finished[0])
    assert ours | {"peak_memory_gb": 0} == theirs | {"peak_memory_gb": 0}


def test_without_a_folder_text_is_made_and_every_switch_of_the_method_runs(library, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "made_corpus", lambda: text.open_corpus(str(library)))
    flags = "--target block --norm instance --final_norm layer --beta 0.25 --window 5 --share_embedding false --mask_p 0.35"
    flags += " --mask_span 4 --schedule cosine --clip 1 --dtype bfloat16 --workers 1 --steps 2 --seed 3 --head_layers 1"
    assert "training and" in told(train(*flags.split(), "--out", tmp_path / "run"))
    assert results(tmp_path / "run").keys() >= {"explained_end", "probe_end", "teacher_probe_end"}


def test_plain_text_is_prepared_once(tmp_path):
    (tmp_path / "data").mkdir()
    write_library(tmp_path, 0).rename(tmp_path / "data" / "train.txt")
    assert "prepared into" in told(train("--data", tmp_path / "data", "--out", tmp_path / "a", *STILL))
    assert "prepared into" not in told(train("--data", tmp_path / "data", "--out", tmp_path / "b", *STILL))
    assert (tmp_path / "a" / "vocab").read_text() == (tmp_path / "b" / "vocab").read_text()


# ---- the method ----------------------------------------------------------------------------------------------------


def naive_loss(student, teacher, batch, beta=4.0):
    """Sum over the masked tokens of the smooth L1, and their number: single numbers, one text at a time, without padding."""
    total = count = 0
    for tokens, corrupted, mask in zip(batch["tokens"], batch["corrupted"], batch["mask"]):
        real = tokens != text.PAD
        with torch.no_grad():
            f = student.head(student.encoder(corrupted[real][None])[0][0]).double().tolist()
            layers = [a[0].double().tolist() for a in teacher(tokens[real][None])]
        for t in mask[real].nonzero()[:, 0].tolist():
            y = [0.0] * 16
            for a in layers[-2:]:
                mean = sum(a[t]) / 16
                std = math.sqrt(sum((v - mean) ** 2 for v in a[t]) / 16 + 1e-5)
                y = [s + (v - mean) / std / 2 for s, v in zip(y, a[t])]
            for d in (abs(p - q) for p, q in zip(f[t], y)):
                total += d * d / 2 / beta if d <= beta else d - beta / 2
            count += 1
    return total, count


@pytest.mark.parametrize("masker", [singles, spans])
def test_the_loss_is_that_of_a_naive_recomputation(library, finished, tmp_path, masker):
    """One step of two micro-batches, from a checkpoint whose student and teacher differ."""
    flags = [] if masker is singles else "--mask_p 0.35 --mask_span 4".split()
    told(train("--data", library, "--out", tmp_path / "run", "--init", finished[0] / "ckpt.pt", *STILL, "--beta", 0.5, *flags))
    student, teacher = rebuilt(checkpoint(tmp_path / "run"))
    batches = batches_of(library, masker)
    (total, other), (count, fewer) = zip(*(naive_loss(student, teacher, batch, 0.5) for batch in batches))
    assert count != fewer, "or else a mean of means would pass for the mean over the global batch"
    (row,) = rows(tmp_path / "run")
    assert row["loss"] == pytest.approx((total + other) / (count + fewer), rel=1e-5)
    assert row["masked"] == pytest.approx((count + fewer) / sum((b["tokens"] != text.PAD).sum().item() for b in batches))
    itself = naive_loss(student, Teacher(student.encoder), batches[0], 0.5)[0]
    assert itself != pytest.approx(total, rel=1e-4), "the tolerance tells teacher and student apart"


def test_the_teacher_gets_the_full_text_and_the_student_the_corrupted_one(library, tmp_path, monkeypatch):
    taught, learned = [], []

    def teach(self, input, *rest, real=Teacher.forward):
        taught.append(input)
        return real(self, input, *rest)

    def learn(self, input, mask, real=Student.forward):
        learned.append((input, mask)) if self.training else None
        return real(self, input, mask)

    monkeypatch.setattr(Teacher, "forward", teach)
    monkeypatch.setattr(Student, "forward", learn)
    told(train("--data", library, "--out", tmp_path / "run", *STILL))
    expected = batches_of(library, singles)
    mask_id = text.open_corpus(str(library))[2].mask
    assert len(learned) == 2, "one pass a micro-batch"
    for (corrupted, mask), batch in zip(learned, expected, strict=True):
        assert torch.equal(corrupted, batch["corrupted"]) and torch.equal(mask, batch["mask"]) and (corrupted == mask_id).any()
        assert any(torch.equal(tokens, batch["tokens"]) for tokens in taught)
    assert not any((tokens == mask_id).any() for tokens in taught)


def test_targets_depend_on_every_token_of_the_text_hidden_or_not(finished, library):
    student, teacher = rebuilt(checkpoint(finished[0]))
    student.eval()
    batch = batches_of(library, singles)[0]
    tokens, corrupted, mask = (batch[name][:1] for name in ("tokens", "corrupted", "mask"))

    def both(tokens, corrupted):
        with torch.no_grad():
            return top_k_average(teacher(tokens), 2)[mask], student(corrupted, mask)

    y, f = both(tokens, corrupted)
    hidden, shown = mask[0].nonzero()[0, 0], (~mask[0]).nonzero()[1, 0]
    for place, seen in (hidden, False), (shown, True):
        changed, visible = tokens.clone(), corrupted.clone()
        changed[0, place] = 4 + (changed[0, place] - 3) % 300
        if seen:
            visible[0, place] = changed[0, place]
        other_y, other_f = both(changed, visible)
        assert (other_y - y).abs().amax(1).min() > 1e-6, "the targets of all masked tokens, through attention"
        assert torch.equal(other_f, f) != seen


@pytest.mark.parametrize("share", [True, False])
def test_the_teacher_moves_once_an_update_and_shares_what_it_should(library, tmp_path, monkeypatch, share):
    moves = []

    def update(self, encoder, tau, real=Teacher.update):
        before = weights(self.encoder)
        real(self, encoder, tau)
        moves.append((before, weights(encoder), weights(self.encoder), tau))

    monkeypatch.setattr(Teacher, "update", update)
    told(train("--data", library, "--out", tmp_path / "run", "--share_embedding", share))
    (before, theta, after, tau), *moves = moves
    assert tau == 1 and before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after), "at the start"
    assert [tau for *_, tau in moves] == pytest.approx([0.93, 0.96, 0.99, 0.99])
    assert [row["tau"] for row in rows(tmp_path / "run")] == [tau for *_, tau in moves]
    for before, theta, after, tau in moves:
        for name, tensor in after.items():
            if share and name.startswith("embed."):
                assert torch.equal(tensor, theta[name]), name
            else:
                expected = tau * before[name].double() + (1 - tau) * theta[name].double()
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
    state = checkpoint(tmp_path / "run")
    assert_same(state["teacher"], {f"encoder.{n}": t for n, t in moves[-1][2].items()})
    same = torch.equal(state["teacher"]["encoder.embed.tokens.weight"], state["student"]["encoder.embed.tokens.weight"])
    assert same == share


def test_masked_language_modelling_learns_a_toy_corpus(library, tmp_path):
    """The comparison: the same model, masks and probe, without anything to be explained."""
    flags = "--objective mlm --steps 60 --lr 1e-2 --log_every 5 --beta2 0.98 --guard_after 1 --min_pred_std 100".split()
    told(train("--data", library, "--out", tmp_path / "run", *flags))
    losses, numbers = [row["loss"] for row in rows(tmp_path / "run")], results(tmp_path / "run")
    assert all("pred_std" in row and "target_std" not in row for row in rows(tmp_path / "run"))
    assert losses[0] == pytest.approx(math.log(400), rel=0.1), "the entropy of knowing nothing"
    assert losses[-1] < losses[0] - 0.5
    assert {"probe_start", "probe_end", "teacher_probe_end"} <= numbers.keys() and "explained_end" not in numbers
    assert checkpoint(tmp_path / "run")["student"]["head.weight"].shape == (400, 16)


def test_masked_language_modelling_never_runs_the_teacher_which_only_averages(library, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("the teacher ran"))
    told(train("--data", library, "--out", tmp_path / "run", "--objective", "mlm"))
    state = checkpoint(tmp_path / "run")
    assert not torch.equal(state["teacher"]["encoder.blocks.0.fc1.weight"], state["student"]["encoder.blocks.0.fc1.weight"])


def test_the_loss_of_masked_language_modelling_is_a_mean_over_all_selected_tokens(library, tmp_path):
    told(train("--data", library, "--out", tmp_path / "run", "--objective", "mlm", *STILL))
    student, _ = rebuilt(checkpoint(tmp_path / "run"))
    losses = []
    for batch in batches_of(library, singles):
        for tokens, corrupted, mask in zip(batch["tokens"], batch["corrupted"], batch["mask"]):
            with torch.no_grad():
                logits = student.head(student.encoder(corrupted[tokens != text.PAD][None])[0][0]).double()
            losses += [(logits[t].logsumexp(0) - logits[t, tokens[t]]).item() for t in mask.nonzero()[:, 0]]
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---- killed and resumed --------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(library, tmp_path):
    flags = "--steps 30 --save_every 3 --dropout 0.2 --attn_dropout 0.1 --workers 1".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kill(launch(SCRIPT, *options(*flags, "--data", library, "--out", cut)), cut)
    assert 3 <= checkpoint(cut)["step"] < 30 and not (cut / "results.json").exists()
    told(train(*flags, "--data", library, "--out", whole))
    told(train("--out", cut, "--resume"))  # every other option comes from its config.json
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ("student", "teacher", "optimizer", "step"):
        assert_same(ours[part], theirs[part])
    assert torch.equal(ours["rng"][0][0], theirs["rng"][0][0])
    assert [row["step"] for row in rows(cut)] == list(range(1, 31))
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]
    assert results(cut)["explained_start"] == results(whole)["explained_start"]


def test_an_interrupted_run_can_be_ended_where_it_stands(library, tmp_path, monkeypatch):
    def save_then_stop(path, state, real=common.save):
        real(path, state)
        if path.name == "ckpt.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save_then_stop)
        assert train("--data", library, "--out", tmp_path / "run", "--save_every", 2)[0] == 130
    told(train("--out", tmp_path / "run", "--resume", "--steps", 2))
    assert results(tmp_path / "run").keys() >= {"explained_end"} and checkpoint(tmp_path / "run")["step"] == 2


def test_a_resumed_run_takes_a_new_weight_decay_and_beta2(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    told(train("--out", folder, "--resume", "--steps", 5, "--weight_decay", 0.3, "--beta2", 0.9))
    (group,) = checkpoint(folder)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.9, 0.9))


# ---- several processes, several micro-batches ----------------------------------------------------------------------

SPLIT = "--steps 3 --global_batch 16".split()  # 4 micro-batches an update, 2 for each of two processes


@pytest.fixture(scope="module")
def double(tmp_path_factory, library):
    """Two processes by torchrun -> the run's folder, stdout, stderr."""
    out = tmp_path_factory.mktemp("runs") / "double"
    return out, *ended(launch(SCRIPT, *options(*SPLIT, "--data", library, "--out", out), processes=2))


def test_two_processes_train_the_same_run_as_one(library, double, tmp_path):
    hidden = [batch["mask"].sum().item() for batch in batches_of(library, singles, count=16, parts=4)]
    assert hidden[0] + hidden[2] != hidden[1] + hidden[3], "the processes hide unequal numbers of tokens"
    told(train(*SPLIT, "--data", library, "--out", tmp_path / "single"))
    assert len(rows(double[0])) == 3
    for row, expected in zip(rows(double[0]), rows(tmp_path / "single"), strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {row['step']}"
        for name in ("step", "tau", "lr", "masked"):
            assert row[name] == expected[name]
    for part in ("student", "teacher"):
        pair = [{n: t for n, t in checkpoint(f)[part].items() if not n.endswith("k_bias")} for f in (double[0], tmp_path / "single")]
        assert_same(*pair, atol=1e-5)  # a key's bias has no gradient but rounding, which Adam makes large
    ours, theirs = results(double[0]), results(tmp_path / "single")
    assert ours.keys() == theirs.keys() and ours["explained_end"] == pytest.approx(theirs["explained_end"], abs=1e-4)


def test_only_the_first_of_two_processes_speaks(double):
    _, out, err = double
    assert out.count("step 0:") == out.count("training and") == out.count("3 steps in") == 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert err.count("| 0/3 [") == 1 and all("/3 [" in line for line in lines), f"one bar and no warnings: {err}"


def test_two_processes_keep_a_random_state_each(double):
    first, second = checkpoint(double[0])["rng"]
    assert not torch.equal(first[0], second[0])


# ---- from a checkpoint ---------------------------------------------------------------------------------------------


def test_init_takes_student_and_teacher_and_starts_the_schedule_again(finished, library, tmp_path):
    told(train("--data", library, "--init", finished[0] / "ckpt.pt", *STILL, "--out", tmp_path / "run"))
    ours, theirs, numbers = checkpoint(tmp_path / "run"), checkpoint(finished[0]), results(tmp_path / "run")
    assert ours["step"] == 1 and rows(tmp_path / "run")[0]["step"] == 1
    assert_same(ours["student"], theirs["student"])
    assert_same(ours["teacher"], theirs["teacher"])
    assert not torch.equal(ours["teacher"]["encoder.blocks.0.fc1.weight"], ours["student"]["encoder.blocks.0.fc1.weight"])
    for name in ("explained", "probe", "teacher_probe"):
        assert numbers[f"{name}_start"] == pytest.approx(results(finished[0])[f"{name}_end"], abs=1e-4)


def test_init_can_make_the_teacher_a_copy_of_the_student(finished, library, tmp_path):
    flags = "--data", library, "--init", finished[0] / "ckpt.pt", "--init_teacher", "student", *STILL
    told(train(*flags, "--out", tmp_path / "run"))
    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(finished[0])
    assert_same(ours["teacher"], {name: theirs["student"][name] for name in theirs["teacher"]})


def test_shared_embeddings_are_the_students_from_the_first_batch_on(finished, library, tmp_path, monkeypatch):
    """Also if the run of the checkpoint averaged them."""
    state, students, equal = checkpoint(finished[0]), [], []
    state["teacher"]["encoder.embed.tokens.weight"] += 1
    torch.save(state, tmp_path / "averaged.pt")

    def build(*args, real=train_text.build):
        students.append(real(*args))
        return students[-1]

    def teach(self, input, real=Teacher.forward):
        equal.append(torch.equal(self.encoder.embed.tokens.weight, students[-1].encoder.embed.tokens.weight))
        return real(self, input)

    monkeypatch.setattr(train_text, "build", build)
    monkeypatch.setattr(Teacher, "forward", teach)
    for share in (True, False):
        equal.clear()
        flags = "--init", tmp_path / "averaged.pt", "--share_embedding", share, *STILL
        told(train("--data", library, "--out", tmp_path / f"run-{share}", *flags))
        assert set(equal) == {share}


def test_init_with_what_does_not_fit_is_one_line(finished, library, tmp_path):
    """And leaves the run's folder to the next attempt."""
    flags = "--dim 16 --depth 2 --heads 2 --ffn 32 --top_k 2 --image_size 16 --patch 4 --mask_block 2 --steps 1 --workers 0"
    told(call(train_vision, *flags.split(), "--device", "cpu", "--out", tmp_path / "vision"))
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(checkpoint(finished[0]) | {"classes": ["A"]}, tmp_path / "tuned.pt")
    fine = finished[0] / "ckpt.pt"
    for path, named, *flags in (
        [tmp_path / "vision" / "ckpt.pt", "vocabulary"], [tmp_path / "none.pt", "no such"], [tmp_path / "other.pt", "neither"],
        [tmp_path / "tuned.pt", "fine-tuned"], [fine, "--dim 16", "--dim", 32], [fine, "--depth 2", "--depth", 3],
        [fine, "--heads 2", "--heads", 4], [fine, "--max_tokens 32", "--max_tokens", 64],
        [fine, "--head_layers 2", "--head_layers", 1], [fine, "--objective data2vec", "--objective", "mlm"],
    ):  # fmt: skip
        line = refused(train("--data", library, "--init", path, *flags, "--out", tmp_path / "run"))
        assert str(path) in line and named in line


def test_a_checkpoint_of_another_vocabulary_is_one_line_even_if_it_has_the_same_size(finished, tmp_path):
    text.prepare([str(write_library(tmp_path, 1))], str(tmp_path / "data"), vocab_size=400, valid_share=0.1, show=False)
    line = refused(train("--data", tmp_path / "data", "--init", finished[0] / "ckpt.pt", "--out", tmp_path / "run"))
    assert "ckpt.pt" in line and "vocabulary, of 400" in line and "--vocab" in line
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    assert "vocabulary" in refused(train("--out", folder, "--resume", "--data", tmp_path / "data"))
    assert (folder / "vocab").read_bytes() == (finished[0] / "vocab").read_bytes()


@pytest.mark.parametrize("change", ["--dim 32", "--heads 4"])
def test_resuming_with_another_model_is_one_line_and_costs_nothing(finished, tmp_path, change):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert "ckpt.pt" in refused(train("--out", folder, "--resume", *change.split()))
    assert (folder / "config.json").read_text() == (finished[0] / "config.json").read_text(), "a plain --resume still goes on"


def test_resuming_from_a_damaged_checkpoint_is_one_line(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    assert "ckpt.pt" in refused(train("--out", folder, "--resume"))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--steps", "--steps"), ("--stpes 3", "--stpes"), ("--steps 1.5", "--steps"), ("--lr fast", "--lr"),
        ("--share_embedding maybe", "--share_embedding"), ("--norm batch", "--norm"), ("--preset huge", "--preset"),
        ("--heads 3", "--heads"), ("--objective bert", "--objective"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line_and_status_2(library, tmp_path, flags, named):
    assert named in refused(train("--data", library, "--out", tmp_path / "run", *flags.split()))
    assert not (tmp_path / "run").exists()


def test_folders_without_text_are_one_line_and_status_2(library, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(library, tmp_path / "damaged")
    (tmp_path / "damaged" / "train.idx").write_bytes(b"12345678")
    for name in ("none", "empty", "damaged"):
        assert name in refused(train("--data", tmp_path / name, "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_collapsed_run_stops_and_says_what_to_try(library, tmp_path):
    flags = "--data", library, "--steps", 3, "--min_pred_std", 100
    code, _, err = train(*flags, "--guard_after", 2, "--out", tmp_path / "a")
    assert code == 1 and "\nstep 2: collapsed, pred_std" in err and "Traceback" not in err, "on a line of its own"
    assert "--tau_0" in err and "--guard_after" in err
    assert [row["step"] for row in rows(tmp_path / "a")] == [1] and not (tmp_path / "a" / "results.json").exists()
    told(train(*flags, "--guard_after", -1, "--out", tmp_path / "b"))
    code, _, err = train("--data", library, "--guard_after", 0, "--min_target_std", 100, "--out", tmp_path / "c")
    assert code == 1 and "collapsed, target_std" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    code, _, err = train("--out", folder, *"--resume --steps 20 --lr 1e30 --save_every 4".split())
    assert code == 1 and "finite" in err and "--lr" in err and "Traceback" not in err, err
    assert (folder / "ckpt.pt").read_bytes() == (finished[0] / "ckpt.pt").read_bytes()


# ---- options, help, presets, schedule ------------------------------------------------------------------------------


def config(**changes):
    return train_text.Config(**dict(dim=16, depth=2, heads=2, top_k=2, global_batch=8) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(global_batch=0), dict(global_batch=7), dict(micro_batch=-1), dict(global_batch=14, micro_batch=4),
        dict(workers=-1), dict(seed=-1), dict(max_tokens=7), dict(dim=0), dict(depth=0), dict(heads=3), dict(ffn=0),
        dict(head_layers=0), dict(top_k=3), dict(top_k=0), dict(mask_p=0.0), dict(mask_p=1.1), dict(mask_span=0),
        dict(dropout=1.0), dict(attn_dropout=-0.1), dict(tau_0=1.1), dict(tau_e=-0.1), dict(tau_n=-1), dict(beta=-1.0),
        dict(beta2=1.0), dict(weight_decay=-0.1), dict(lr=-1e-3), dict(warmup=1.5), dict(decay=-0.1),
        dict(warmup=0.6, decay=0.6), dict(decay=0.1, final_scale=0.0), dict(final_scale=1.5), dict(clip=-1.0), dict(window=-1),
        dict(log_every=0), dict(save_every=-1), dict(probe_every=-1), dict(token_std=-1.0), dict(eval_blocks=0), dict(probe_blocks=0),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_name(changes):
    with pytest.raises(common.BadInput, match=f"--{next(iter(changes))} "):
        train_text.check(config(**changes), world=2)


def test_accumulation_follows_from_the_number_of_processes():
    for batch, micro, world, expected in (
        (16, 4, 1, 4), (16, 4, 2, 2), (16, 4, 4, 1), (16, 0, 1, 1), (16, 0, 2, 1), (16, 5, 1, 4), (18, 4, 3, 2), (16, 64, 2, 1),
    ):  # fmt: skip
        assert train_text.check(config(global_batch=batch, micro_batch=micro), world) == expected


def test_help_lists_the_fields_and_a_presets_values():
    for flags, dim in (["--help"], 16), (["--help", "--preset", "base", "--dim", "768"], 768):
        code, out, _ = train(*flags)
        assert code == 0 and f"--dim {dim} " in out and "Baevski" in out
        assert all(f"--{f.name}" in out and f.metadata["help"] in out for f in fields(train_text.Config))


def test_presets_are_named_known_and_can_work():
    assert list(train_text.PRESETS) == ["smoke", "corpus", "base", "base_spans", "large"]
    for name, values in train_text.PRESETS.items():
        cfg = train_text.Config(preset=name, **values)
        for world in (1, 8, 16):
            count = train_text.check(cfg, world)
            assert cfg.global_batch % (count * world) == 0
            assert cfg.micro_batch == 0 or cfg.global_batch // (count * world) <= cfg.micro_batch
        assert all(type(value) is type(asdict(train_text.Config())[key]) for key, value in values.items())


def test_the_big_presets_are_the_papers():
    base, spans, large = (train_text.Config(**train_text.PRESETS[n]) for n in ("base", "base_spans", "large"))
    for cfg, sizes in (base, (768, 12, 12, 3072)), (spans, (768, 12, 12, 3072)), (large, (1024, 24, 16, 4096)):
        assert (cfg.dim, cfg.depth, cfg.heads, cfg.ffn) == sizes and cfg.head_layers == 2
        assert (cfg.steps, cfg.global_batch, cfg.max_tokens) == (1_000_000, 256, 512)
        assert (cfg.target, cfg.norm, cfg.final_norm, cfg.top_k, cfg.beta) == ("ffn", "layer", "none", 10, 4)
        assert (cfg.window, cfg.share_embedding, cfg.objective) == (0, True, "data2vec")
        assert (cfg.clip, cfg.weight_decay, cfg.beta2) == (5, 0.01, 0.98)
        assert (cfg.dropout, cfg.attn_dropout, cfg.tau_0, cfg.tau_e) == (0.1, 0.1, 0.999, 0.9999)
        assert (cfg.guard_after, cfg.min_target_std, cfg.min_pred_std) == (5000, 0.1, 0.01)
        assert (cfg.token_std, cfg.position_std, cfg.weight_std) == (0.02, 0.02, 0.02)
    assert (base.mask_p, base.mask_span, base.tau_n) == (0.15, 1, 100_000)
    assert (base.lr, base.schedule, base.warmup, base.decay) == (2e-4, "tri_stage", 0.05, 0.15)
    assert (spans.mask_p, spans.mask_span, spans.tau_n) == (0.35, 4, 300_000)
    assert (spans.lr, spans.schedule, round(spans.warmup * spans.steps)) == (2e-4, "cosine", 10_000)


def test_the_model_is_that_of_the_options():
    with torch.device("meta"):
        student = train_text.build(train_text.Config(**train_text.PRESETS["base"]), 50265)
    embed = student.encoder.embed
    assert embed.tokens.weight.shape == (50265, 768) and embed.positions.weight.shape == (514, 768) and embed.dropout.p == 0.1
    assert len(student.encoder.blocks) == 12 and student.encoder.mask_embedding is None
    for block in student.encoder.blocks:
        assert (block.dropout.p, block.attn.dropout, block.ffn_dropout.p, block.target) == (0.1, 0.1, 0, "ffn")
    assert [tuple(p.shape) for p in student.head.parameters()] == [(1536, 768), (1536,), (768, 1536), (768,)]


@pytest.mark.parametrize("weight_std, ffn_std", [(0.05, 0.05), (0.0, 256**-0.5)])
def test_tables_and_matrices_start_at_the_std_that_is_asked_for(weight_std, ffn_std):
    torch.manual_seed(0)
    cfg = config(dim=64, ffn=256, max_tokens=128, token_std=1.0, position_std=0.1, weight_std=weight_std)
    encoder = train_text.build(cfg, 400).encoder
    for table, std in (encoder.embed.tokens, 1.0), (encoder.embed.positions, 0.1), (encoder.blocks[1].fc2, ffn_std):
        assert table.weight.std().item() == pytest.approx(std, rel=0.05)
    for table in encoder.embed.tokens, encoder.embed.positions:
        assert not table.weight[text.PAD].any()
    first, _, last = train_text.build(cfg, 400).head  # at 0 as torch has it: uniform, std 1 / sqrt(3 inputs)
    assert (first.weight.std().item(), last.weight.std().item()) == pytest.approx((weight_std or 192**-0.5, weight_std or 384**-0.5), rel=0.05)
    assert bool(first.bias.any()) == (not weight_std)


def test_tri_stage_warms_up_holds_and_decays_exponentially():
    cfg = config(steps=1000, lr=2.0, warmup=0.05, decay=0.15, final_scale=0.01)
    for step in range(1, 1001):
        expected = 2 * step / 50 if step <= 50 else 2 if step <= 850 else 2 * 0.01 ** ((step - 850) / 150)
        assert train_text.lr_at(step, cfg) == pytest.approx(expected)
    assert train_text.lr_at(1000, cfg) == pytest.approx(0.02)
    flat = config(steps=10, lr=2.0, warmup=0.0, decay=0.0)
    assert [train_text.lr_at(step, flat) for step in range(1, 11)] == [2] * 10


def test_cosine_warms_up_and_falls():
    cfg = config(steps=100, lr=1.0, warmup=0.2, final_scale=0.1, schedule="cosine")
    for step in range(1, 101):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert train_text.lr_at(step, cfg) == pytest.approx(step / 20 if step <= 20 else cosine)
    assert train_text.lr_at(1, config(steps=1, warmup=0.0, lr=1.0, schedule="cosine", final_scale=1.0)) == 1

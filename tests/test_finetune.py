"""finetune.py as its users meet it: from a pre-trained file, from scratch, resumed, split, evaluated, asked, misled."""

import json
import math
import re
import shutil
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import common
import finetune
import train_speech
import train_vision
from data import images
from model import resize_grid, resize_positions
from tests import helpers
from tests.helpers import assert_same, call, checkpoint, done, ended, kill, launch, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(finetune.__file__)
GOLDEN = Path(__file__).parent / "golden"
PRETRAIN = """--dim 16 --depth 3 --heads 2 --ffn 32 --top_k 2 --image_size 16 --patch 4 --mask_block 2 --relative true
    --learned_std 0 --init_std 0.2 --global_batch 8 --steps 4 --warmup 0 --lr 0.02 --tau_0 0.5 --tau_e 0.5 --workers 0
    --probe_images 4 --eval_images 4 --guard_after -1 --dtype float32 --device cpu""".split()
TINY = """--steps 6 --global_batch 8 --warmup 2 --log_every 2 --probe_every 3 --workers 0 --drop_path 0 --dtype float32
    --device cpu""".split()
STILL = "--steps 1 --lr 0 --min_lr 0".split()  # one step that moves nothing shows what was loaded


def options(*flags):
    """Few steps, and later flags that win; a resumed run has its options from its own config.json."""
    return [str(flag) for flag in (flags if "--resume" in flags else [*TINY, *flags])]


def tune(*flags):
    return call(finetune, *options(*flags))


refused = partial(helpers.refused, by="finetune.py: ")
COLOURS = {"red": (200, 60, 60), "blue": (60, 60, 200)}


def write_pictures(root, classes=("blue", "red"), train=12, val=(5, 4)):
    """root/{train,val}/CLASS/NN.png: small, not square, noisy; red and blue have that colour, others one of theirs."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        colour = COLOURS.get(name, rng.integers(40, 210, 3))
        for split, count in (("train", train), ("val", val[c % len(val)])):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-40, 41, (20, 24, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 training and 9 held-out pictures of two classes, easy to tell apart but for one in the wrong folder."""
    root = write_pictures(tmp_path_factory.mktemp("data") / "two")
    shutil.copy(root / "val/blue/04.png", root / "val/red/03.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, pictures):
    """A checkpoint of train_vision.py whose student and teacher differ in every tensor."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    done(call(train_vision, *PRETRAIN, "--data", pictures, "--out", out))
    state = checkpoint(out)
    assert not any(torch.equal(state["teacher"][name], state["student"][name]) for name in state["teacher"])
    return out / "ckpt.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures, pretrained):
    """One run that learns -> its folder, stdout. Tests that go on from it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    flags = "--steps 40 --warmup 5 --lr 0.01 --probe_every 10 --log_every 5".split()
    return out, done(tune("--data", pictures, "--init", pretrained, *flags, "--out", out))


# ---- a run and its folder ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_config_metrics_two_checkpoints_and_results(finished, pictures):
    folder = finished[0]
    names = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "results.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert {f.name for f in fields(finetune.Config)} | {"versions", "command"} == config.keys()
    assert config["data"] == str(pictures) and config["steps"] == 40 and "finetune.py" in config["command"]


def test_metrics_hold_one_line_a_log_step_and_the_accuracy_where_asked(finished):
    lines = rows(finished[0])
    assert [row["step"] for row in lines] == [1, *range(5, 41, 5)]
    for row in lines:
        assert row.keys() >= {"loss", "lr", "grad_norm", "samples_per_s"}
        assert all(math.isfinite(value) for value in row.values())
    assert [row["step"] for row in lines if "top1" in row] == [10, 20, 30, 40]


def test_an_easy_task_is_learned_and_results_say_so(finished):
    folder, out = finished
    numbers, lines = results(folder), rows(folder)
    assert numbers.keys() >= {"top1", "best_top1", "best_step", "seconds", "peak_memory_gb", "final_loss"}
    assert numbers["top1"] == 8 / 9 and "top5" not in numbers, "two classes, one picture in the wrong folder"
    assert numbers["final_loss"] == lines[-1]["loss"] and numbers["top1"] == lines[-1]["top1"]
    accuracy = {row["step"]: row["top1"] for row in lines if "top1" in row}
    first_best = min(step for step in accuracy if accuracy[step] == max(accuracy.values()))
    assert (numbers["best_top1"], numbers["best_step"]) == (max(accuracy.values()), first_best)
    assert numbers["images"] == 24 and numbers["skipped_files"] == 0 and numbers["seconds"] > 0
    assert f"{numbers['top1']:.4f}" in out


def test_both_checkpoints_are_plain_data_that_finetune_reads(finished):
    folder = finished[0]
    state, best = checkpoint(folder), checkpoint(folder, "best.pt")
    assert state.keys() >= {"student", "teacher", "optimizer", "step", "config", "rng"} and state["step"] == 40
    assert best["step"] == results(folder)["best_step"] and "optimizer" not in best
    assert state["classes"] == best["classes"] == ["blue", "red"]
    for name in ("ckpt.pt", "best.pt"):
        classifier, _, _ = finetune.build(finetune.Config(init=str(folder / name)))
        assert_same(dict(classifier.state_dict()), dict(checkpoint(folder, name)["student"]))
        assert classifier.encoder.embed.image_size == (16, 16)


def test_from_ten_classes_up_there_is_a_top5(tmp_path, pretrained):
    classes = [f"c{i:02}" for i in range(11)]
    data = write_pictures(tmp_path / "data", classes, train=1, val=(1,))
    out, forgetful = tmp_path / "run", "--dropout 0.9 --drop_path 0.9".split()  # both are for training alone
    printed = done(tune("--data", data, "--init", pretrained, *forgetful, "--steps", 1, "--out", out))
    numbers = results(out)
    assert "top5" in printed and numbers.keys() >= {"top5", "best_top5"} and numbers["top1"] <= numbers["top5"] <= 1

    classifier, _, _ = finetune.build(finetune.Config(init=str(out / "ckpt.pt")))
    hits = [0, 0]
    for label, name in enumerate(classes):
        with Image.open(data / "val" / name / "00.png") as picture:
            view = images.normalise(images.to_tensor(images.center_crop(picture, 16)))[None]
        ranking = classifier.eval()(view)[0].argsort(descending=True).tolist()
        hits[0] += ranking[0] == label
        hits[1] += label in ranking[:5]
    assert [numbers["top1"], numbers["top5"]] == pytest.approx([hits[0] / 11, hits[1] / 11])


def test_a_folder_that_holds_a_run_is_not_touched(finished, pictures):
    folder = finished[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "--resume" in refused(tune("--data", pictures, "--out", folder))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resuming_a_finished_run_is_harmless(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    done(tune("--out", folder, "--resume"))
    assert_same(checkpoint(folder), checkpoint(finished[0]))
    assert rows(folder) == rows(finished[0])
    kept = results(folder).keys() - {"peak_memory_gb"}
    assert {name: results(folder)[name] for name in kept} == {name: results(finished[0])[name] for name in kept}


def test_a_damaged_picture_is_named_once_counted_and_passed_over(pictures, pretrained, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    for path in (data / "train/red/03.png", data / "val/blue/01.png"):
        path.write_bytes(path.read_bytes()[:50])
    _, out, err = result = tune("--data", data, "--init", pretrained, "--out", tmp_path / "run")
    done(result)
    assert (out + err).count("red/03.png") == (out + err).count("blue/01.png") == 1
    assert results(tmp_path / "run")["skipped_files"] == 2
    assert results(tmp_path / "run")["top1"] * 8 % 1 == pytest.approx(0, abs=1e-9), "of the eight that can be read"


def test_every_regulariser_runs_and_the_run_repeats(pictures, pretrained, tmp_path):
    flags = """--drop_path 0.3 --dropout 0.1 --attn_dropout 0.1 --mixup 0.8 --cutmix 1 --erasing 0.5 --rand_augment 9
        --smoothing 0.2 --clip 1 --micro_batch 4 --dtype bfloat16 --steps 4""".split()
    for name in "ab":
        done(tune("--data", pictures, "--init", pretrained, *flags, "--out", tmp_path / name))
    assert_same(checkpoint(tmp_path / "a")["student"], checkpoint(tmp_path / "b")["student"])
    assert [row["loss"] for row in rows(tmp_path / "a")] == [row["loss"] for row in rows(tmp_path / "b")]
    done(tune("--data", pictures, "--init", pretrained, *flags, "--seed", 1, "--out", tmp_path / "c"))
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "c")[0]["loss"]


# ---- what is loaded ------------------------------------------------------------------------------------------------

OWN = ("encoder.norm.weight", "encoder.norm.bias", "encoder.mask_embedding")  # of pre-training alone


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_init_loads_the_encoder_of_the_network_asked_for(pretrained, network):
    cfg = finetune.Config(init=str(pretrained), init_from=network)
    classifier, state, _ = finetune.build(cfg, ["a", "b", "c"])
    file = checkpoint(pretrained.parent)[network]
    encoder = {name: tensor for name, tensor in file.items() if name.startswith("encoder.") and name not in OWN}
    ours = classifier.state_dict()
    assert ours.keys() - encoder.keys() == {"norm.weight", "norm.bias", "out.weight", "out.bias"}
    assert_same({name: ours[name] for name in encoder}, encoder)
    assert classifier.encoder.mask_embedding is None and ours["out.weight"].shape == (3, 16)
    assert classifier.encoder.embed.image_size == (16, 16) and state["config"]["depth"] == 3
    picture = torch.randn(2, 3, 16, 16)
    last, layers = classifier.eval().encoder(picture)
    assert torch.equal(last[:, 1:], layers[-1]), "the final norm is gone"


def test_a_run_starts_from_these_weights(pretrained, pictures, tmp_path):
    loaded = {}
    for network in ("student", "teacher"):
        flags = "--init", pretrained, "--init_from", network, *STILL
        done(tune("--data", pictures, *flags, "--out", tmp_path / network))
        loaded[network] = checkpoint(tmp_path / network)["student"]
        file = checkpoint(pretrained.parent)[network]
        for name, tensor in loaded[network].items():
            assert not name.startswith("encoder.") or torch.equal(tensor, file[name]), name
    head = [{name: t for name, t in state.items() if not name.startswith("encoder.")} for state in loaded.values()]
    assert_same(*head)


def test_init_none_is_the_presets_model_with_random_weights(pictures, tmp_path):
    done(tune("--data", pictures, "--init", "none", *STILL, "--global_batch", 2, "--out", tmp_path / "run"))
    state, expected = checkpoint(tmp_path / "run"), train_vision.Config(**train_vision.PRESETS["smoke"])
    for name in ("dim", "depth", "heads", "ffn", "patch", "image_size"):
        assert state["config"][name] == getattr(expected, name)
    assert state["student"]["encoder.blocks.0.fc1.weight"].shape == (expected.ffn, expected.dim)
    assert_same(state["student"], finetune.build(finetune_after_seed(0), ["blue", "red"])[0].state_dict())
    other = finetune.build(finetune_after_seed(1), ["blue", "red"])[0].state_dict()
    assert not torch.equal(state["student"]["out.weight"], other["out.weight"])


def finetune_after_seed(seed):
    torch.manual_seed(seed)
    return finetune.Config()


def test_a_finetuned_file_keeps_its_head_for_its_own_classes_alone(finished):
    cfg = finetune.Config(init=str(finished[0] / "best.pt"))
    weights = checkpoint(finished[0], "best.pt")["student"]
    same, _, _ = finetune.build(cfg, ["blue", "red"])
    assert_same(dict(same.state_dict()), dict(weights))
    other, _, _ = finetune.build(cfg, ["cat", "dog", "eel"])
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, weights[name]) if name.startswith("encoder.") else name.startswith(("norm", "out"))
    assert other.out.weight.shape == (3, 16) and not torch.equal(other.norm.weight, same.norm.weight)


def test_another_image_size_interpolates_the_positions(pretrained, pictures, tmp_path):
    out = tmp_path / "run"
    done(tune("--data", pictures, "--init", pretrained, "--image_size", 24, *STILL, "--out", out))
    state = checkpoint(out)
    assert (state["config"]["image_size"], state["config"]["patch"]) == (24, 4)
    table = checkpoint(pretrained.parent)["student"]["encoder.embed.table"]
    assert_same(state["student"]["encoder.embed.table"], resize_positions(table, (4, 4), (6, 6)))
    done(tune("--data", pictures, "--init", pretrained, "--image_size", 24, "--steps", 3, "--out", tmp_path / "moved"))
    again = "--init", tmp_path / "moved" / "ckpt.pt", "--eval_only", "--out", tmp_path / "again"
    done(tune("--data", pictures, *again))
    assert results(tmp_path / "again")["top1"] == results(tmp_path / "moved")["top1"]
    assert "--image_size" in refused(tune("--data", pictures, "--init", pretrained, "--image_size", 18))


# ---- released checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The golden models in the wrapping of released files -> paths: a pre-trained one, a fine-tuned one (24 pixels)."""
    folder, paths = tmp_path_factory.mktemp("released"), []
    for name in ("vision", "vision_finetune"):
        file = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        paths.append(folder / f"{name}.pth")
        torch.save({"model": file["model"]} | ({"model_ema": file["ema"]} if "ema" in file else {}), paths[-1])
    return paths


def test_a_released_pretrained_checkpoint_is_finetuned(released, pictures, tmp_path):
    file = torch.load(released[0], weights_only=True)
    for network, part in (("student", "model"), ("teacher", "model_ema")):
        classifier, _, _ = finetune.build(finetune.Config(init=str(released[0]), init_from=network), ["a", "b"])
        assert classifier.encoder.embed.image_size == (24, 24)
        for block, golden in ((0, "blocks.0.mlp.fc1.weight"), (2, "blocks.2.mlp.fc1.weight")):
            assert torch.equal(classifier.encoder.blocks[block].fc1.weight, file[part][golden])
        assert torch.equal(classifier.encoder.embed.table, file[part]["rel_pos_bias.relative_position_bias_table"])
    done(tune("--data", pictures, "--init", released[0], "--steps", 3, "--out", tmp_path / "run"))
    done(tune("--data", pictures, "--init", tmp_path / "run/best.pt", "--eval_only", "--out", tmp_path / "eval"))


def test_a_released_finetuned_checkpoint_predicts_what_it_did(released):
    file = torch.load(GOLDEN / "vision_finetune.pt", weights_only=True)
    classifier, state, _ = finetune.build(finetune.Config(init=str(released[1])))
    assert state["classes"] == list("0123456789")
    torch.testing.assert_close(classifier.eval()(file["input"]["image"]), file["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("names", [list("0123456789"), [f"n{i:02}" for i in range(10)]], ids=["numbers", "wordnet"])
def test_a_released_finetuned_checkpoint_is_evaluated(released, tmp_path, names):
    """It knows its classes by number only: they are those of the sorted folders. Nine pictures lie where it says."""
    data = write_pictures(tmp_path / "data", names, train=1, val=(1,))
    classifier, _, _ = finetune.build(finetune.Config(init=str(released[1])))
    for i, name in enumerate(names):
        path = data / "val" / name / "00.png"
        view = images.normalise(images.to_tensor(images.center_crop(images.load_image(path), classifier.encoder.embed.image_size)))
        guess = int(classifier.eval()(view[None]).argmax())
        path.rename(data / "val" / names[(guess + (i == 5)) % 10] / f"{name}.png")
    done(tune("--data", data, "--init", released[1], "--eval_only", "--out", tmp_path / "run"))
    assert results(tmp_path / "run")["top1"] == pytest.approx(0.9)


# ---- a part of the labels ------------------------------------------------------------------------------------------


def test_a_fraction_of_the_labels_is_drawn_from_every_class():
    labels = [0] * 100 + [1] * 40 + [2] * 3 + [3] + [1] * 60
    for fraction, counts in ((0.1, [10, 10, 1, 1]), (0.5, [50, 50, 2, 1]), (0.001, [1] * 4), (1.0, [100, 100, 3, 1])):
        subset = images.label_subset(labels, fraction, seed=0)
        assert sorted(set(subset.tolist())) == subset.tolist(), "sorted, none twice"
        assert np.bincount(np.asarray(labels)[subset]).tolist() == counts
    assert np.array_equal(images.label_subset(labels, 0.1, 7), images.label_subset(labels, 0.1, 7))
    assert not np.array_equal(images.label_subset(labels, 0.1, 7), images.label_subset(labels, 0.1, 8))


@pytest.fixture
def seen(monkeypatch):
    """The names of the training pictures that are loaded."""
    names = set()

    def load(self, i, real=images.ImageSet.load):
        names.add(self.names[i])
        return real(self, i)

    monkeypatch.setattr(images.ImageSet, "load", load)
    return names


def test_a_fraction_is_the_same_pictures_whatever_the_start(seen, pictures, pretrained, tmp_path):
    drawn = []
    starts = [pretrained, "--init_from", "teacher"], [pretrained, "--mixup", 0.5], [pretrained, "--seed", 1], ["none"]
    for i, start in enumerate(starts):
        seen.clear()
        flags = "--label_fraction", 0.25, "--steps", 1, "--global_batch", 12, "--init", *start
        done(tune("--data", pictures, *flags, "--out", tmp_path / f"{i}"))
        drawn.append({name for name in seen if "/train/" in name})
        assert len(drawn[-1]) == 6 == results(tmp_path / f"{i}")["images"]
        assert sum("red" in name for name in drawn[-1]) == 3
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]


def test_a_damaged_picture_does_not_let_in_one_without_a_label(seen, pictures, pretrained, tmp_path):
    """The stand-in of a damaged picture is of the drawn part too: the others' labels are not to be used."""
    data = shutil.copytree(pictures, tmp_path / "data")
    subset = images.label_subset([0] * 12 + [1] * 12, 0.25, seed=0)
    drawn = {f"{('blue', 'red')[i // 12]}/{i % 12:02}.png" for i in subset.tolist()}
    alone = next(int(i) for i in subset if (i + 1) % 24 not in subset)
    damaged = data / "train" / ("blue", "red")[alone // 12] / f"{alone % 12:02}.png"
    damaged.write_bytes(b"no picture")
    flags = "--label_fraction", 0.25, "--steps", 2, "--init", pretrained, "--out", tmp_path / "run"
    done(tune("--data", data, *flags))
    assert {"/".join(Path(name).parts[-2:]) for name in seen if "/train/" in name} == drawn


def test_a_picture_beside_the_class_folders_is_named(pictures, pretrained, tmp_path):
    """It has no label, and must not get in as the stand-in of a damaged picture that comes right before it either."""
    data = shutil.copytree(pictures, tmp_path / "data")
    shutil.copy(data / "train/blue/00.png", data / "train/cyan.png")
    assert "cyan.png" in refused(tune("--data", data, "--init", pretrained, "--out", tmp_path / "run"))


# ---- the optimiser -------------------------------------------------------------------------------------------------

LAYER = {  # depth 3
    "encoder.embed.cls": 0, "encoder.embed.proj.weight": 0, "encoder.embed.proj.bias": 0, "encoder.embed.learned": 0,
    "encoder.blocks.0.attn.q_bias": 1, "encoder.blocks.1.fc2.weight": 2, "encoder.blocks.2.norm2.bias": 3,
    "encoder.embed.table": 4, "norm.weight": 4, "norm.bias": 4, "out.weight": 4, "out.bias": 4,
}  # fmt: skip


def test_layers_are_counted_from_the_embedding_to_the_head():
    assert {name: finetune.layer_of(name, 3) for name in LAYER} == LAYER
    assert finetune.layer_of("encoder.blocks.11.fc1.weight", 12) == 12


def watch(monkeypatch):
    """Records the classifier and the optimiser of a run."""
    made = {}

    def build(*args, real=finetune.build):
        made["classifier"] = (built := real(*args))[0]
        return built

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["optimizer"] = self

    monkeypatch.setattr(finetune, "build", build)
    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    return made


def test_every_parameter_is_in_one_group_with_its_layers_rate_and_decay(monkeypatch, pictures, pretrained, tmp_path):
    made = watch(monkeypatch)
    flags = "--steps 2 --warmup 2 --lr 0.004 --layer_decay 0.5 --weight_decay 0.03".split()
    done(tune("--data", pictures, "--init", pretrained, *flags, "--out", tmp_path / "run"))
    names = {id(p): name for name, p in made["classifier"].named_parameters()}
    groups = {names[id(p)]: group for group in made["optimizer"].param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in made["optimizer"].param_groups) == len(names) == len(groups)
    for name, group in groups.items():
        block = name.split(".")[2] if ".blocks." in name else None
        below = {"0": 3, "1": 2, "2": 1, None: 4 if "cls" in name or "proj" in name else 0}[block]  # layers above + 1
        assert group["lr"] == pytest.approx(0.004 * 0.5**below), name
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.03}
    blocks = [f"encoder.blocks.{i}.{part}.weight" for i in range(3) for part in ("attn.qkv", "attn.out", "fc1", "fc2")]
    assert decayed == {*blocks, "encoder.embed.proj.weight", "out.weight"}
    assert {groups[name]["weight_decay"] for name in groups.keys() - decayed} == {0}


def test_learned_positions_and_gains_do_not_decay(monkeypatch, pictures, tmp_path):
    made = watch(monkeypatch)
    out = tmp_path / "pretrained"
    flags = "--learned_std 0.3 --layer_scale 0.1 --steps 1".split()
    done(call(train_vision, *PRETRAIN, *flags, "--data", pictures, "--out", out))
    done(tune("--data", pictures, "--init", out / "ckpt.pt", "--steps", 1, "--out", tmp_path / "run"))
    names = {id(p): name for name, p in made["classifier"].named_parameters()}
    plain = {names[id(p)] for g in made["optimizer"].param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert plain >= {"encoder.embed.learned", "encoder.embed.table", "encoder.blocks.1.scale2", "encoder.embed.cls"}


def test_learned_positions_are_interpolated_to_another_image_size(pictures, tmp_path):
    out = tmp_path / "pretrained"
    done(call(train_vision, *PRETRAIN, *"--learned_std 0.3 --steps 1".split(), "--data", pictures, "--out", out))
    done(tune("--data", pictures, "--init", out / "ckpt.pt", "--image_size", 24, *STILL, "--out", tmp_path / "run"))
    before, after = checkpoint(out)["student"], checkpoint(tmp_path / "run")["student"]
    for part, resize in (("learned", resize_grid), ("table", resize_positions)):
        name = f"encoder.embed.{part}"
        assert_same(after[name], resize(before[name], (4, 4), (6, 6)))


def test_a_layer_decay_of_zero_trains_the_head_and_the_table_alone(pictures, pretrained, tmp_path):
    flags = "--init", pretrained, "--layer_decay", 0, "--lr", 0.01, "--steps", 2
    done(tune("--data", pictures, *flags, "--out", tmp_path / "run"))
    before, after = checkpoint(pretrained.parent)["student"], checkpoint(tmp_path / "run")["student"]
    moved = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert moved == {"encoder.embed.table", "norm.weight", "norm.bias", "out.weight", "out.bias"}


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    cfg = finetune.Config(steps=100, warmup=20, lr=1.0, min_lr=0.1)
    for step in range(1, 101):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert finetune.lr_at(step, cfg) == pytest.approx(step / 20 if step <= 20 else cosine)
    assert finetune.lr_at(100, cfg) == pytest.approx(0.1)
    assert finetune.lr_at(1, finetune.Config(steps=1, warmup=0, lr=1.0)) > 0
    assert [finetune.lr_at(step, finetune.Config(steps=2, warmup=50, lr=1.0)) for step in (1, 2)] == [0.5, 1]


# ---- mixing and erasing --------------------------------------------------------------------------------------------


def batch(n=6, side=16):
    """Pictures of one grey each, and the one-hot label of that grey: pixels say what the label should be."""
    greys = torch.arange(1.0, n + 1)
    return greys[:, None, None, None].expand(n, 3, side, side).clone(), torch.eye(n)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pixels_and_labels_are_mixed_in_the_same_proportion(kind):
    (x, y), rng = batch(), np.random.default_rng(0)
    sizes = (0.8, 0.0) if kind == "mixup" else (0.0, 0.8)
    greys, kept = torch.arange(1.0, 7), []
    for _ in range(200):
        mixed, labels = images.mix(x, y, *sizes, rng)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), labels @ greys)
        assert all(labels[i, i] + labels[i, 5 - i] == pytest.approx(1, abs=1e-6) for i in range(6))
        if kind == "mixup":
            assert torch.equal(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
        else:
            assert ((mixed == x) | (mixed == x.flip(0))).all(), "a pixel is of the one picture or of the other"
            rectangle = (mixed[0, 0] != x[0, 0]).nonzero()
            if len(rectangle):
                height, width = (rectangle.amax(0) - rectangle.amin(0) + 1).tolist()
                assert len(rectangle) == height * width
        kept.append(labels[0, 0].item())
    assert torch.equal(x, batch()[0]) and torch.equal(y, batch()[1]), "the batch itself stays"
    assert np.mean(kept) == pytest.approx(0.5, abs=0.08) and np.var(kept) == pytest.approx(1 / (4 * 2.6), abs=0.03)


def test_mixing_is_deterministic_and_a_coin_chooses_between_the_two():
    x, y = batch()
    first, again, other = (images.mix(x, y, 0.8, 1.0, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    rng = np.random.default_rng(0)
    smooth = [bool((images.mix(x, y, 0.8, 1.0, rng)[0].flatten(1).std(1) < 1e-6).all()) for _ in range(200)]
    assert 60 < sum(smooth) < 140


def test_no_mixing_is_no_change():
    (x, y), rng = batch(), np.random.default_rng(0)
    mixed, labels = images.mix(x, y, 0.0, 0.0, rng)
    assert torch.equal(mixed, batch()[0]) and torch.equal(labels, batch()[1])


def test_erasing_puts_noise_into_one_rectangle_of_each_picture_it_meets():
    blank = torch.full((300, 3, 32, 32), 9.0)
    erased = images.erase(blank.clone(), 1.0, np.random.default_rng(0))
    areas, aspects = [], []
    for picture in erased:
        hit = (picture != 9).all(0)
        assert torch.equal(hit, (picture != 9).any(0))
        (height, width), area = (hit.nonzero().amax(0) - hit.nonzero().amin(0) + 1).tolist(), int(hit.sum())
        assert area == height * width
        areas.append(area / 1024)
        aspects.append(height / width)
    assert 0.01 < min(areas) < 0.05 and 0.28 < max(areas) < 0.36
    assert 0.2 < min(aspects) < 0.5 and 2 < max(aspects) < 5
    noise = erased[erased != 9]
    assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    again = images.erase(blank.clone(), 1.0, np.random.default_rng(0))
    assert torch.equal(erased, again)
    assert torch.equal(images.erase(blank.clone(), 0.0, np.random.default_rng(0)), blank)
    some = images.erase(blank.clone(), 0.25, np.random.default_rng(0))
    assert (some != blank).flatten(1).any(1).float().mean().item() == pytest.approx(0.25, abs=0.08)
    small = images.erase(torch.zeros(50, 3, 4, 8), 1.0, np.random.default_rng(0))
    assert small.isfinite().all() and small.shape == (50, 3, 4, 8)


def test_micro_batches_are_mixed_and_erased_each_in_its_own_way(monkeypatch, pictures, pretrained, tmp_path):
    states = []

    def erase(x, probability, rng, real=images.erase):
        states.append(rng.bit_generator.state["state"]["state"])
        return real(x, probability, rng)

    monkeypatch.setattr(images, "erase", erase)
    flags = "--mixup 0.8 --erasing 0.5 --micro_batch 4 --steps 3".split()
    done(tune("--data", pictures, "--init", pretrained, *flags, "--out", tmp_path / "run"))
    assert len(states) == 6 == len(set(states))


# ---- killed and resumed --------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(pictures, pretrained, tmp_path):
    flags = """--steps 120 --warmup 10 --log_every 1 --save_every 10 --probe_every 20 --drop_path 0.3 --dropout 0.1
        --mixup 0.8 --cutmix 1 --erasing 0.3""".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = "--data", pictures, "--init", pretrained, *flags
    kill(launch(SCRIPT, *options(*flags, "--out", cut)), cut)
    stopped_at = checkpoint(cut)["step"]
    assert 10 <= stopped_at < 120 and not (cut / "results.json").exists()
    done(tune("--out", cut, "--resume"))  # every other option comes from its config.json
    done(tune(*flags, "--out", whole))
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ("student", "optimizer", "step", "best"):
        assert_same(ours[part], theirs[part])
    assert_same(checkpoint(cut, "best.pt")["student"], checkpoint(whole, "best.pt")["student"])
    assert all(torch.equal(a, b) for a, b in zip(ours["rng"][0], theirs["rng"][0], strict=True))
    assert [row["step"] for row in rows(cut)] == list(range(1, 121))
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in rows(cut)] == [row[name] for row in rows(whole)]
    for name in ("top1", "best_top1", "best_step", "images"):
        assert results(cut)[name] == results(whole)[name]


def test_an_interrupted_run_can_be_ended_where_it_stands(pictures, pretrained, tmp_path, monkeypatch):
    def save_then_stop(path, state, real=common.save):
        real(path, state)
        if path.name == "ckpt.pt":
            raise KeyboardInterrupt

    flags = "--data", pictures, "--init", pretrained, "--save_every", 4, "--probe_every", 5
    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save_then_stop)
        assert tune(*flags, "--out", tmp_path / "run")[0] == 130
    done(tune("--out", tmp_path / "run", "--resume", "--steps", 4))
    assert results(tmp_path / "run").keys() >= {"top1", "best_top1", "best_step"}


def test_resuming_what_does_not_fit_is_one_line(finished, tmp_path):
    for name, flags in (("size", ["--image_size", 24]), ("groups", []), ("damaged", [])):
        folder = shutil.copytree(finished[0], tmp_path / name)
        state = checkpoint(folder)
        if name == "groups":
            state["optimizer"]["param_groups"].pop()
            torch.save(state, folder / "ckpt.pt")
        if name == "damaged":
            (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
        assert "ckpt.pt" in refused(tune("--out", folder, "--resume", *flags))


@pytest.fixture
def begun(pictures, pretrained, tmp_path):
    """Two steps of a run, and the file that it started from gone."""
    init = shutil.copy(pretrained, tmp_path / "init.pt")
    done(tune("--data", pictures, "--init", init, "--layer_decay", 0.5, "--steps", 2, "--out", tmp_path / "run"))
    init.unlink()
    return tmp_path / "run"


def test_resuming_needs_the_runs_own_checkpoint_alone(begun):
    done(tune("--out", begun, "--resume", "--steps", 3))
    assert checkpoint(begun)["step"] == 3


@pytest.mark.parametrize("scale", [0.25, 1])
def test_a_resumed_run_takes_a_new_layer_decay_and_weight_decay(monkeypatch, begun, scale):
    made = watch(monkeypatch)
    done(tune("--out", begun, "--resume", "--steps", 3, "--layer_decay", scale, "--weight_decay", 0.3))
    names = {id(p): name for name, p in made["classifier"].named_parameters()}
    groups = {names[id(p)]: group for group in made["optimizer"].param_groups for p in group["params"]}
    lr = rows(begun)[-1]["lr"]
    for name, layers_below_the_head in (("out.weight", 0), ("encoder.blocks.2.fc1.weight", 1), ("encoder.embed.proj.weight", 4)):
        assert groups[name]["lr"] == pytest.approx(lr * scale**layers_below_the_head) and groups[name]["weight_decay"] == 0.3
    assert groups["out.bias"]["weight_decay"] == 0


# ---- several processes, several micro-batches ----------------------------------------------------------------------

# Of the first 24 samples (3 steps of 8) one that, in micro-batches of 2, only the second of two processes meets.
DAMAGED = next(int(i) for k, i in enumerate(images.order(24, 0, 0)) if k % 4 >= 2 and i < 12)


@pytest.fixture(scope="module")
def split(tmp_path_factory, pictures, pretrained):
    """Flags of runs that must not differ, among them a data set with a damaged picture."""
    data = shutil.copytree(pictures, tmp_path_factory.mktemp("data") / "damaged")
    (data / "train" / "blue" / f"{DAMAGED:02}.png").write_bytes(b"no picture")
    return "--data", data, "--init", pretrained, *"--steps 3 --log_every 1 --probe_every 1 --lr 0.004".split()


@pytest.fixture(scope="module")
def single(tmp_path_factory, split):
    out = tmp_path_factory.mktemp("runs") / "single"
    done(tune(*split, "--out", out))
    return out


def assert_same_run(ours, theirs):
    for row, expected in zip(rows(ours), rows(theirs), strict=True):
        assert row["step"] == expected["step"]
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {row['step']}"
        assert row["top1"] == expected["top1"], "nine pictures, each counted once"
    assert len(rows(ours)) == 3
    assert_same(checkpoint(ours)["student"], checkpoint(theirs)["student"], atol=1e-5)


def test_micro_batches_train_the_same_run_as_whole_ones(single, split, tmp_path):
    for micro_batch in (4, 1):
        done(tune(*split, "--micro_batch", micro_batch, "--out", tmp_path / f"{micro_batch}"))
        assert_same_run(tmp_path / f"{micro_batch}", single)


@pytest.fixture(scope="module")
def double(tmp_path_factory, split):
    out = tmp_path_factory.mktemp("runs") / "double"
    flags = options(*split, "--micro_batch", 2, "--out", out)
    return out, *ended(launch(SCRIPT, *flags, processes=2))


def test_two_processes_train_and_evaluate_the_same_run_as_one(single, double):
    assert any(0 < row["top1"] < 1 for row in rows(single)), "an accuracy that tells"
    assert_same_run(double[0], single)
    for name in ("top1", "best_top1", "best_step"):
        assert results(double[0])[name] == results(single)[name]


def test_only_the_first_of_two_processes_speaks_and_each_has_its_random_state(double):
    folder, out, err = double
    assert out.count("labelled images") == 1 and err.count("| 0/3 [") <= 1
    first, second = checkpoint(folder)["rng"]
    assert not torch.equal(first[0], second[0])


def test_a_damaged_picture_that_only_the_second_process_meets_is_named_and_counted(double):
    folder, out, err = double
    assert results(folder)["skipped_files"] == 1
    assert (out + err).count(f"{DAMAGED:02}.png") == 1


def test_only_the_last_micro_batch_sends_its_gradient(monkeypatch, pictures, pretrained, tmp_path):
    """One of two processes, in a group of one: what it sends is counted, and not added to another's."""
    held = []

    class Counted(finetune.DistributedDataParallel):
        def no_sync(self):
            held.append(1)
            return super().no_sync()

    def start(*_, real=common.start_processes):
        return 0, 2, *real("cpu", "float32")[2:]

    monkeypatch.setattr(finetune, "DistributedDataParallel", Counted)
    monkeypatch.setattr(common, "start_processes", start)
    flags = options("--data", pictures, "--init", pretrained, "--micro_batch", 1, "--steps", 3, "--out", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [finetune.__file__, *flags])
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        finetune.main()
    finally:
        dist.destroy_process_group()
    assert len(held) == 3 * 3, "three steps of four micro-batches"


# ---- evaluate and predict ------------------------------------------------------------------------------------------


def test_eval_only_gives_the_accuracy_again(finished, pictures, tmp_path):
    for name, key in (("ckpt.pt", "top1"), ("best.pt", "best_top1")):
        out = tmp_path / name
        printed = done(tune("--data", pictures, "--init", finished[0] / name, "--eval_only", "--out", out))
        assert results(out)["top1"] == results(finished[0])[key]
        assert f"top1 {results(out)['top1']:.4f}" in printed
        assert not (out / "ckpt.pt").exists()


def test_eval_only_wants_a_finetuned_file(pretrained, pictures, tmp_path):
    for init in (pretrained, "none"):
        assert "--init" in refused(tune("--data", pictures, "--init", init, "--eval_only", "--out", tmp_path / "run"))
        assert not (tmp_path / "run").exists(), "so that the command can be mended and typed again"


def test_eval_only_does_not_overwrite_the_results_of_a_run(finished, pictures, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = "--init", folder / "best.pt", "--out", folder
    assert "--eval_only" in refused(tune(*flags, "--eval_only", "--resume"))
    assert "--out" in refused(tune("--data", pictures, *flags, "--eval_only"))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_eval_only_refuses_data_of_other_classes(finished, tmp_path):
    """A head made on the spot would be measured instead."""
    for classes in (["cat", "dog"], ["blue", "green", "red"]):
        data = write_pictures(tmp_path / "-".join(classes), classes, train=1, val=(1,))
        flags = "--data", data, "--init", finished[0] / "best.pt", "--eval_only", "--out", tmp_path / "run"
        assert "class" in refused(tune(*flags))


def test_predict_names_the_classes_and_goes_on_after_a_broken_picture(finished, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes((pictures / "val/red/00.png").read_bytes()[:60])
    Image.new("L", (5, 40), 100).save(tmp_path / "grey.png")
    paths = [pictures / "val/red/00.png", "broken.png", "none.png", tmp_path, pictures / "val/blue/03.png", "grey.png"]
    lines = done(tune("--init", finished[0] / "best.pt", "--predict", *paths)).splitlines()
    assert len(lines) == 6 and all(line.startswith(f"{path}: ") for line, path in zip(lines, paths, strict=True))
    guesses = [line.removeprefix(f"{path}: ") for line, path in zip(lines, paths, strict=True)]
    assert guesses[0].startswith("red 0.") and ", blue 0." in guesses[0] and guesses[4].startswith("blue 0.")
    assert all(guess.startswith("skipped, ") for guess in guesses[1:4])
    chances = [float(part.split()[1]) for part in guesses[0].split(", ")]
    assert sum(chances) == pytest.approx(1, abs=2e-3) and chances == sorted(chances, reverse=True)
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png", "grey.png"}, "nothing is written"


def test_only_the_first_process_predicts(monkeypatch, finished, pictures):
    monkeypatch.setattr(common, "start_processes", lambda *_, real=common.start_processes: (1, 2, *real("cpu", "float32")[2:]))
    assert done(tune("--init", finished[0] / "best.pt", "--predict", pictures / "val/red/00.png")) == ""


def test_predict_with_a_released_file_gives_five_numbers_of_classes(released, pictures):
    line = done(tune("--init", released[1], "--predict", pictures / "val/red/00.png"))
    assert len(line.split(": ")[1].split(", ")) == 5 and line.count("\n") == 1


def test_predict_without_what_it_needs_is_one_line(finished, pretrained, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = pictures / "val/red/00.png"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    refused(tune("--init", finished[0] / "best.pt", "--predict", "broken.png", "none.png"))
    assert str(pretrained) in refused(tune("--init", pretrained, "--predict", picture))
    assert "--init none" in refused(tune("--predict", picture))
    assert "none.pt" in refused(tune("--init", "none.pt", "--predict", picture))
    empty = tune("--data", pictures, "--init", finished[0] / "best.pt", "--steps", 1, "--predict")
    assert "--predict" in refused(empty), "a pattern that matches no file trains nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png"}


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_data_that_cannot_be_used_is_one_line(pretrained, pictures, tmp_path):
    def reason(name):
        return refused(tune("--data", tmp_path / name, "--init", pretrained, "--out", tmp_path / "run"))

    assert "nowhere" in reason("nowhere")
    write_pictures(tmp_path / "one", ["red"])
    assert "class" in reason("one") and "one" in reason("one")
    shutil.copytree(pictures, tmp_path / "strange")
    shutil.copytree(pictures / "val/red", tmp_path / "strange/val/violet")
    assert "violet" in reason("strange")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damaged", ["train", "val"])
def test_pictures_that_are_all_damaged_are_one_line(pretrained, pictures, tmp_path, damaged):
    """A line of its own, although the progress bar may be on the screen already."""
    data = shutil.copytree(pictures, tmp_path / "data")
    for path in (data / damaged).rglob("*.png"):
        path.write_bytes(b"nothing")
    code, _, err = tune("--data", data, "--init", pretrained, "--out", tmp_path / "run")
    assert code == 2 and re.search(r"(^|[\r\n])finetune\.py: [^\r\n]+\n", err) and "Traceback" not in err, err


def test_a_checkpoint_that_cannot_be_used_is_one_line(pictures, pretrained, tmp_path):
    (tmp_path / "text.pt").write_text("no weights\n")
    state = checkpoint(pretrained.parent)
    torch.save(state | {"teacher": None}, tmp_path / "alone.pt")
    del state["student"]["encoder.blocks.2.fc2.weight"]
    torch.save(state, tmp_path / "part.pt")
    for name, word in (("none.pt", "none.pt"), ("text.pt", "text.pt"), ("part.pt", "encoder.blocks.2.fc2.weight")):
        assert word in refused(tune("--data", pictures, "--init", tmp_path / name, "--out", tmp_path / "run"))
    flags = "--init", tmp_path / "alone.pt", "--init_from", "teacher"
    assert "teacher" in refused(tune("--data", pictures, *flags, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    flags = "--resume --steps 60 --lr 1e30 --probe_every 100 --save_every 100".split()
    code, _, err = tune("--out", folder, *flags)
    assert code == 1 and "finite" in err and "--lr" in err and "Traceback" not in err, err
    assert re.search(r"\nstep \d+: the loss", err), "not on the line of the bar"
    for name in ("ckpt.pt", "best.pt"):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes()


def test_gradients_that_are_not_finite_stop_the_run_before_their_step_is_saved(monkeypatch, pictures, pretrained, tmp_path):
    """Its loss is still finite, its weights are not."""

    def poison(parameters, *_, real=torch.nn.utils.clip_grad_norm_, calls=[]):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad.fill_(math.inf)
        return real(parameters, math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    out = tmp_path / "run"
    code, _, err = tune("--data", pictures, "--init", pretrained, "--save_every", 1, "--probe_every", 1, "--out", out)
    assert code == 1 and "step 3" in err and "finite" in err, err
    for name in ("ckpt.pt", "best.pt"):
        assert all(tensor.isfinite().all() for tensor in checkpoint(out, name)["student"].values())
    assert checkpoint(out)["step"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(global_batch=0), dict(global_batch=9), dict(micro_batch=-1), dict(workers=-1),
        dict(seed=-1), dict(log_every=0), dict(save_every=-1), dict(probe_every=-1), dict(image_size=-4),
        dict(label_fraction=0.0), dict(label_fraction=1.1), dict(lr=-1e-3), dict(min_lr=-1e-3), dict(warmup=-1),
        dict(layer_decay=1.1), dict(layer_decay=-0.1), dict(weight_decay=-0.1), dict(clip=-1.0), dict(drop_path=1.0),
        dict(drop_path=-0.1),
        dict(dropout=1.1), dict(attn_dropout=-0.1), dict(smoothing=1.1), dict(mixup=-1.0), dict(cutmix=-1.0),
        dict(erasing=1.1), dict(rand_augment=-1.0), dict(jitter=-0.1), dict(crop_min=0.0), dict(crop_min=1.1),
        dict(mask_p=1.1), dict(channel_p=-0.1), dict(mask_span=0), dict(channel_span=0), dict(layer_drop=1.0), dict(freeze_steps=-1),
        dict(ffn_dropout=-0.1), dict(head_dropout=1.0), dict(beta2=1.0), dict(beam=-1), dict(lm="lm.arpa"), dict(head_lr=1e-3, lr=0.0),
        dict(mixup=1.1, goal="sounds"), dict(max_seconds=0.0, goal="letters"), dict(max_samples=1000, goal="letters"),
        dict(global_batch=24, max_samples=128_000, max_seconds=4.0, goal="letters"),
    ],
    ids=lambda changes: "{}={}".format(*next(iter(changes.items()))),
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_name(changes):
    with pytest.raises(common.BadInput, match=f"--{next(iter(changes))} "):
        finetune.check(finetune.Config(**{"global_batch": 8} | changes), world=2)


def test_accumulation_follows_from_the_number_of_processes():
    for world, micro_batch, expected in ((1, 0, 1), (2, 0, 1), (1, 16, 4), (4, 16, 1), (1, 1000, 1), (2, 17, 2)):
        assert finetune.check(finetune.Config(global_batch=64, micro_batch=micro_batch), world) == expected


# ---- help and presets ----------------------------------------------------------------------------------------------


def test_help_lists_the_fields_and_a_presets_values():
    for flags, steps in ([], 500), (["--preset", "base"], 125_100):
        out = done(call(finetune, *flags, "--help"))
        assert f"--steps {steps} " in out and "Fine-tune" in out
        assert all(f"--{f.name}" in out and f.metadata["help"] in out for f in fields(finetune.Config))


LABELS = ("10m", "1h", "10h", "100h", "960h")


def test_presets_are_named_known_and_can_work():
    speech = ["speech_smoke", "digits", *LABELS, *(f"{name}_large" for name in LABELS), "audioset"]
    assert list(finetune.PRESETS) == ["smoke", "cifar10", "base", "large", *speech, "glue", "glue_small"]
    for name, values in finetune.PRESETS.items():
        cfg = finetune.Config(preset=name, **values)
        assert all(type(value) is type(asdict(finetune.Config())[key]) for key, value in values.items())
        if cfg.goal == "sentences":
            assert cfg.schedule == "linear" and name.startswith("glue")
            continue
        assert cfg.warmup < cfg.steps and (cfg.goal == "images") == (name not in speech)
        pretraining = train_vision if cfg.goal == "images" else train_speech
        assert cfg.model in pretraining.PRESETS, "--init none takes this model"
        for world in (1, 2, 8) if cfg.goal == "images" else (1,) if name in speech[:2] else (1, 2, 4, 8):
            count = finetune.check(cfg, world)
            if cfg.goal == "images":
                assert count * world * (cfg.micro_batch or cfg.global_batch) >= cfg.global_batch
            else:
                assert count * world * cfg.max_samples == pytest.approx(cfg.global_batch * 16_000, rel=0.05)
        if name.endswith("_large") or name == "audioset":
            assert finetune.check(cfg, 16) == 1


def test_the_speech_presets_are_the_papers():
    """Updates, rates, hidden time and channels, frozen updates; base, then large."""
    table = {
        "10m": (13_000, (5e-5, 1e-4), (0.65, 0.65), (0.25, 0.25), (10_000, 10_000)),
        "1h": (13_000, (5e-5, 3e-4), (0.65, 0.75), (0.25, 0.25), (10_000, 10_000)),
        "10h": (20_000, (5e-5, 1e-4), (0.65, 0.75), (0.5, 0.25), (10_000, 10_000)),
        "100h": (80_000, (3e-5, 3e-5), (0.65, 0.5), (0.5, 0.5), (0, 10_000)),
        "960h": (320_000, (1e-4, 3e-5), (0.5, 0.5), (0.1, 0.25), (0, 10_000)),
    }
    for name, (steps, *columns) in table.items():
        for size, model in enumerate(("base", "large")):
            cfg = finetune.Config(**finetune.PRESETS[name + "_large" * size])
            assert [cfg.lr, cfg.mask_p, cfg.channel_p, cfg.freeze_steps] == [column[size] for column in columns], name
            assert (cfg.steps, cfg.model, cfg.goal, cfg.schedule, cfg.beta2) == (steps, model, "letters", "tri_stage", 0.98)
            assert (cfg.mask_span, cfg.channel_span, cfg.layer_drop, cfg.ffn_dropout, cfg.freeze_convs) == (10, 64, 0.1, 0.1, True)
            assert cfg.global_batch * 16_000 == 3_200_000 * 8 and cfg.init_from == "student"
    cfg = finetune.Config(**finetune.PRESETS["audioset"])
    assert (cfg.steps, cfg.lr, cfg.head_lr, cfg.mask_p, cfg.mask_span, cfg.mixup) == (13_000, 3e-5, 2e-4, 0.45, 4, 0.7)
    assert (cfg.model, cfg.goal) == ("audioset", "sounds") and cfg.global_batch == pytest.approx(21.3 * 60, rel=0.01)


def test_the_tri_stage_schedule_rises_holds_and_decays():
    cfg = finetune.Config(steps=100, lr=2.0, schedule="tri_stage")
    rates = [finetune.lr_at(step, cfg) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9:50] == [2.0] * 41
    assert rates[50:] == pytest.approx([2 * 0.05 ** (step / 50) for step in range(1, 51)]) and rates[-1] == pytest.approx(0.1)


def test_the_big_presets_are_the_papers():
    base, large = (finetune.Config(**finetune.PRESETS[name]) for name in ("base", "large"))
    epoch = 1_281_167 // 1024
    assert base.steps == 100 * epoch and large.steps == 50 * epoch and base.warmup == 10 * epoch
    assert (base.lr, base.drop_path, large.lr, large.drop_path) == (4e-3, 0.2, 5e-3, 0.25)
    for cfg in (base, large):
        assert (cfg.global_batch, cfg.layer_decay, cfg.weight_decay, cfg.smoothing) == (1024, 0.65, 0.05, 0.1)
        assert (cfg.mixup, cfg.cutmix, cfg.erasing, cfg.rand_augment, cfg.init_from) == (0.8, 1.0, 0.25, 9.0, "student")

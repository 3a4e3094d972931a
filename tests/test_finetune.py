"""finetune.py on images, and what its tasks share: runs, what is loaded, layers, wrong input, presets."""

import math
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import common
import finetune
import train_speech
import train_vision
from data import images
from tests import checkpoints, helpers
from tests.helpers import FAST, assert_same, call, checkpoint, done, results, rows
from tools import convert, embed

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(helpers.refused, by="finetune.py: ")
TINY = f"{FAST} --steps 4 --global_batch 8 --drop_path 0 --lr 3e-3".split()
STILL = "--steps 1 --lr 0"  # one step that moves nothing shows what was loaded
COLOURS = {"red": (200, 60, 60), "blue": (60, 60, 200)}


def write_pictures(root, classes=("blue", "red"), train=12, val=6):
    """root/{train,val}/CLASS/NN.png: noise around the colour of the class."""
    rng = np.random.default_rng(0)
    for name in classes:
        colour = COLOURS.get(name, rng.integers(40, 210, 3))
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-40, 41, (20, 24, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 training and 12 held-out images of cats and dogs; one is damaged."""
    root = write_pictures(tmp_path_factory.mktemp("pictures"), ["cat", "dog"])
    (root / "train/cat/04.png").write_bytes((root / "train/cat/04.png").read_bytes()[:60])
    return root


@pytest.fixture
def tune(pictures, finished, tmp_path):
    """tune(flag, ..., out=): one tiny run from pre-trained weights in tmp_path/OUT; later flags win."""

    def run(*flags, out="run", init=finished["vision"] / "ckpt.pt"):
        start = "--data", pictures, "--init", init, "--out", tmp_path / out
        return call(finetune, *TINY, *start, *(word for flag in flags for word in str(flag).split()))

    return run


@pytest.fixture(scope="module")
def learned(finished, tmp_path_factory):
    """A run on an easy task -> its folder, its data."""
    root = tmp_path_factory.mktemp("learned")
    data = write_pictures(root / "data")
    shutil.copy(data / "val/blue/05.png", data / "val/red/06.png")  # in the wrong folder
    flags = "--steps 40 --lr 0.01 --probe_every 10 --log_every 5 --save_every 20"
    start = "--init", finished["vision"] / "ckpt.pt", "--data", data, "--out", root / "run"
    done(call(finetune, *TINY, *flags.split(), *start))
    return root / "run", data


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def task_of(**options):
    """A task without a run: what main() makes of these options."""
    cfg = finetune.Config(**{"workers": 0} | options)
    return finetune.choose_task(cfg, common.start_processes("cpu", "float32"))


def built(classes, **options):
    """The model that a run with these options would start from."""
    torch.manual_seed(0)
    task = task_of(**options)
    task.build(classes)
    return task.model


def test_an_easy_task_is_learned_and_results_say_so(learned):
    folder, _ = learned
    names = {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "results.json"}
    assert {path.name for path in folder.iterdir()} == names
    lines, numbers = rows(folder), results(folder)
    assert [line["step"] for line in lines] == [1, *range(5, 41, 5)]
    assert all(line.keys() >= {"loss", "lr", "grad_norm", "images_per_s", "seconds"} for line in lines)
    accuracy = {line["step"]: line["top1"] for line in lines if "top1" in line}
    assert list(accuracy) == [10, 20, 30, 40]
    assert numbers["top1"] == accuracy[40] == pytest.approx(12 / 13), "all but the one in the wrong folder"
    first_best = min(step for step in accuracy if accuracy[step] == max(accuracy.values()))
    assert (numbers["best_top1"], numbers["best_step"]) == (max(accuracy.values()), first_best)
    assert numbers["final_loss"] == lines[-1]["loss"] and numbers.keys() >= {"seconds", "peak_memory_gb"}
    assert (numbers["examples"], numbers["skipped_files"]) == (24, 0) and "top5" not in numbers


def test_both_checkpoints_hold_all_that_is_needed_to_use_them(learned):
    folder, data = learned
    last, best = checkpoint(folder), checkpoint(folder, "best.pt")
    assert last.keys() - best.keys() == {"optimizer", "scaler", "rng", "best"} and best["teacher"] is None
    assert (last["step"], best["step"]) == (40, results(folder)["best_step"])
    assert (best["classes"], best["task"], best["finetune"]["task"]) == (["blue", "red"], "images", "images")
    for name in ("ckpt.pt", "best.pt"):
        model = built(["blue", "red"], init=str(folder / name))
        assert_same(model.state_dict(), checkpoint(folder, name)["student"])


def test_a_finished_run_is_not_touched_and_resuming_it_is_harmless(learned, tune, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    assert "--resume" in refused(tune()) and contents(folder) == contents(learned[0])
    done(call(finetune, "--out", folder, "--resume"))
    assert_same(checkpoint(folder), checkpoint(learned[0]))
    before, after = (results(path) | {"peak_memory_gb": 0} for path in (learned[0], folder))
    assert before == after


def test_every_regulariser_runs_and_the_run_repeats(tune, tmp_path):
    flags = """--drop_path 0.3 --dropout 0.1 --mixup 0.8 --cutmix 1 --erasing 0.5 --rand_augment 9 --clip 1
        --crop_min 0.2"""
    for out in ("first", "second"):
        done(tune(flags, out=out))
    first, second = (rows(tmp_path / out) for out in ("first", "second"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert all(math.isfinite(line["loss"]) for line in first)


def test_micro_batches_train_the_same_run_each_with_random_numbers_of_its_own(tune, tmp_path, monkeypatch):
    for out, flags in (("whole", ""), ("split", "--micro_batch 2")):
        done(tune(flags, out=out))
    whole, split = rows(tmp_path / "whole"), rows(tmp_path / "split")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in whole] == pytest.approx([line[name] for line in split], rel=1e-4)
    states = []

    def erase(x, probability, rng, real=images.erase):
        states.append(rng.bit_generator.state["state"]["state"])
        return real(x, probability, rng)

    monkeypatch.setattr(images, "erase", erase)
    done(tune("--micro_batch 4 --erasing 0.5 --steps 3"))
    assert len(states) == 6 == len(set(states))


def test_a_damaged_image_is_named_once_counted_and_replaced(tune, tmp_path):
    code, out, err = tune("--steps 8")
    assert code == 0 and (out + err).count("cat/04.png") == 1
    assert results(tmp_path / "run")["skipped_files"] == 1 and results(tmp_path / "run")["examples"] == 24


def test_batches_can_be_made_in_processes_that_share_nothing(pictures):
    task = task_of(data=str(pictures), init="none")
    task.setup()
    for dataset in (task.dataset, task.held_out[""][0]):
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[[(0, 7), (1, 3)]]["images"], dataset[[(0, 7), (1, 3)]]["images"])


PRE_TRAINING = ("encoder.norm.weight", "encoder.norm.bias", "encoder.mask_embedding")  # only


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_a_run_starts_from_the_encoder_of_init(tune, finished, tmp_path, network):
    done(tune(STILL, "--init_from", network))
    ours, file = checkpoint(tmp_path / "run")["student"], checkpoint(finished["vision"])[network]
    encoder = {n: t for n, t in file.items() if n.startswith("encoder.") and n not in PRE_TRAINING}
    assert ours.keys() - encoder.keys() == {"norm.weight", "norm.bias", "out.weight", "out.bias"}
    assert_same({name: ours[name] for name in encoder}, encoder)
    model = built(["a", "b"], init=str(finished["vision"] / "ckpt.pt"), init_from=network).eval()
    last, layers = model.encoder(torch.randn(2, 3, 16, 16))
    assert torch.equal(last[:, 1:], layers[-1]), "the final norm is gone"


def test_without_init_the_model_of_a_preset_has_random_weights(tune, finished, tmp_path):
    done(tune(STILL, "--global_batch 2", init="none"))
    state, preset = checkpoint(tmp_path / "run"), train_vision.PRESETS["smoke"]
    assert state["config"]["depth"] == preset["depth"] and state["config"]["dim"] == 128
    assert_same(state["student"], built(["cat", "dog"]).state_dict())
    name, file = "encoder.blocks.1.fc1.weight", checkpoint(finished["vision"])["student"]
    random = built(["a", "b"], init=str(finished["vision"] / "ckpt.pt"), init_from="random").state_dict()
    assert random[name].shape == file[name].shape and not torch.equal(random[name], file[name])


def test_a_finetuned_file_keeps_its_head_for_its_own_classes_alone(learned):
    weights = checkpoint(learned[0], "best.pt")["student"]
    assert_same(built(["blue", "red"], init=str(learned[0] / "best.pt")).state_dict(), weights)
    for name, tensor in built(["cat", "dog", "eel"], init=str(learned[0] / "best.pt")).state_dict().items():
        assert name.startswith(("norm", "out")) or torch.equal(tensor, weights[name])


def test_classes_of_the_same_names_are_matched_by_name(learned, tune, tmp_path):
    """Outputs in another order than the folders are evaluated, resumed and tuned further as they are."""
    folder, state = shutil.copytree(learned[0], tmp_path / "turned"), checkpoint(learned[0])
    state["classes"] = state["classes"][::-1]
    for name in ("out.weight", "out.bias"):
        state["student"][name] = state["student"][name].flip(0)
    torch.save(state, folder / "ckpt.pt")
    done(tune("--eval_only --data", learned[1], init=folder / "ckpt.pt", out="eval"))
    assert results(tmp_path / "eval")["top1"] == results(learned[0])["top1"] > 0.9
    done(tune(STILL, "--data", learned[1], init=folder / "ckpt.pt", out="still"))
    done(call(finetune, "--out", folder, "--resume", "--steps", 41, "--lr", 0))
    for name in ("still", "turned"):
        assert checkpoint(tmp_path / name)["classes"] == ["red", "blue"]
        assert results(tmp_path / name)["top1"] == results(learned[0])["top1"]


def test_folders_that_are_numbers_are_matched_by_number(finished, tmp_path, capsys):
    names, init = [str(i) for i in range(12)], str(finished["vision"] / "ckpt.pt")
    data, head = write_pictures(tmp_path / "data", names, 2, 1), built(names, init=init).state_dict()
    state = checkpoint(finished["vision"]) | {"student": head, "task": "images", "classes": names}
    torch.save(state, tmp_path / "ckpt.pt")
    task = task_of(init=str(tmp_path / "ckpt.pt"), data=str(data), eval_only=True)
    task.setup()
    assert task.classes == names and "order" not in capsys.readouterr().out
    assert_same(task.model.state_dict(), head)


def test_another_image_size_interpolates_the_positions(tune, tmp_path):
    done(tune("--image_size 24 --steps 3"))
    state = checkpoint(tmp_path / "run")
    assert state["config"]["image_size"] == 24
    assert len(state["student"]["encoder.embed.table"]) == 11 * 11 + 3, "6 x 6 patches"
    done(tune("--eval_only", init=tmp_path / "run/ckpt.pt", out="again"))
    assert results(tmp_path / "again")["top1"] == results(tmp_path / "run")["top1"]
    assert "--image_size: use a multiple" in refused(tune("--image_size 18", out="no"))


TASKS = {  # of checkpoints of data2vec 2.0: data, options
    "vision": ("vision", "--drop_path 0.1"),
    "speech": ("letters", "--preset speech_smoke --batch_seconds 8 --max_samples 64000 --label_fraction 1"),
    "text": ("tasks", "--preset glue_small --task moods --global_batch 8"),
}


@pytest.mark.parametrize("start", ["ours", "released"])
@pytest.mark.parametrize("kind", TASKS)
def test_checkpoints_of_2_0_are_tuned_evaluated_and_used(data, finished, tmp_path, kind, start):
    source, flags = TASKS[kind]
    path = finished[f"{kind}2"] / "ckpt.pt"
    if start == "released":
        path = tmp_path / "released.pt"
        torch.save(checkpoints.released(f"{kind}2"), path)
        checkpoints.write_gpt2_files(tmp_path, size=40)
    run, flags = tmp_path / "run", [*FAST.split(), *flags.split(), "--data", data / source]
    done(call(finetune, *flags, *STILL.split(), "--probe_every", 1, "--init", path, "--out", run))
    state, student = checkpoint(run, "best.pt"), convert.read(path)["student"]
    encoder = {name: tensor for name, tensor in student.items() if name.startswith("encoder.")}
    assert_same({name: t for name, t in state["student"].items() if name.startswith("encoder.")}, encoder)
    assert state["config"]["masks"] == 3 and not any(name.startswith("head.") for name in state["student"])
    best = *FAST.split(), "--init", run / "best.pt"
    done(call(finetune, *best, "--eval_only", "--data", data / source, "--out", tmp_path / "again"))
    metric = {"vision": "top1", "speech": "cer", "text": "accuracy"}[kind]
    assert results(tmp_path / "again")[metric] == results(run)[metric]
    more = "--steps", 2, "--image_size", 32, "--mask_p", 0.3  # if it has images, recordings
    done(call(finetune, *flags, *more, "--init", path, "--out", tmp_path / "moved"))
    after = checkpoint(tmp_path / "moved")["student"]
    assert all((after[name] != t).any() for name, t in encoder.items() if name.endswith("fc1.weight"))

    (tmp_path / "in.txt").write_text("abc ha\n")
    one = {"vision": "val/dog/01.png", "speech": "dev/0/7/0-7-0001.flac"}.get(kind)
    one = tmp_path / "in.txt" if kind == "text" else data / source / one
    printed = done(call(finetune, *best, "--predict", "abc ha" if kind == "text" else one))
    assert str("abc ha" if kind == "text" else one) in printed
    for out, init in (("x.npy", run / "best.pt"), ("y.npy", path)):
        done(call(embed, "--init", init, one, "--out", tmp_path / out))
    same = np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy")
    assert same[0].shape == (1, 16) and np.array_equal(*same)


def test_a_released_classifier_predicts_and_is_evaluated(tune, tmp_path):
    """It numbers its classes, in the order of the folders' names. Nine of ten images are where it says."""
    released, names = tmp_path / "released.pth", [f"n{i:02}" for i in range(10)]
    torch.save({"model": checkpoints.golden("vision_finetune")["model"]}, released)
    data = write_pictures(tmp_path / "data", names, train=1, val=1)
    paths, hits = sorted((data / "val").rglob("*.png")), [0, 0]
    lines = done(call(finetune, "--dtype", "float32", "--init", released, "--predict", *paths)).splitlines()
    for i, (path, line) in enumerate(zip(paths, lines, strict=True)):
        best = [int(part.split()[0]) for part in line.partition(": ")[2].split(", ")]
        label = (best[0] + (i == 5)) % 10
        hits = [hits[0] + (label == best[0]), hits[1] + (label in best)]
        path.rename(data / "val" / names[label] / f"{i}-moved.png")
    printed = done(tune("--eval_only --data", data, init=released))
    assert f"{released}: no class names; taken in the order of the folders: n00, n01, " in printed
    numbers = results(tmp_path / "run")
    assert hits[0] == 9 and [numbers["top1"], numbers["top5"]] == pytest.approx([0.9, hits[1] / 10])


def test_a_fraction_of_the_labels_is_the_same_images_for_any_start(monkeypatch, tune, tmp_path):
    used, drawn = set(), []

    def load_image(file, real=images.load_image):
        used.add(str(file))
        return real(file)

    monkeypatch.setattr(images, "load_image", load_image)
    for out, flags in enumerate(["", "--init_from teacher --mixup 0.5", "--init none", "--seed 1"]):
        used.clear()
        done(tune("--label_fraction 0.25 --steps 1 --global_batch 12", flags, out=str(out)))
        drawn.append({name for name in used if "/train/" in name and "cat/04" not in name})
        assert results(tmp_path / str(out))["examples"] == 6
        assert {name.split("/")[-2] for name in drawn[-1]} == {"cat", "dog"}
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_each_layer_has_its_rate_and_matrices_alone_decay(finished):
    model = built(["a", "b"], init=str(finished["vision"] / "ckpt.pt"))
    cfg = finetune.Config(layer_decay=0.5, weight_decay=0.03)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = finetune.layer_groups(cfg, model)
    found = {names[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values()) and sum(len(g["params"]) for g in groups) == len(names)
    expected = {  # depth 2: the embedding is 3 layers below the top
        "encoder.embed.cls": (1 / 8, 0), "encoder.embed.proj.weight": (1 / 8, 0.03),
        "encoder.embed.learned": (1 / 8, 0), "encoder.blocks.0.fc1.weight": (1 / 4, 0.03),
        "encoder.blocks.1.attn.q_bias": (1 / 2, 0), "encoder.blocks.1.attn.qkv.weight": (1 / 2, 0.03),
        "encoder.embed.table": (1, 0), "norm.weight": (1, 0), "out.weight": (1, 0.03), "out.bias": (1, 0),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    groups = finetune.layer_groups(finetune.Config(layer_decay=1.0, lr=0.1, head_lr=0.3), model)
    scales = {names[id(p)]: g["scale"] for g in groups for p in g["params"]}
    assert scales["out.weight"] == scales["norm.bias"] == pytest.approx(3)
    assert {scale for name, scale in scales.items() if name.startswith("encoder.")} == {1}


@pytest.mark.parametrize("preset", ["smoke", "base", "digits", "glue_small"])
def test_learning_rates_are_those_of_the_recipes(preset):
    cfg = finetune.Config(**finetune.PRESETS[preset])
    for t in (0.05, 0.1, 0.3, 0.5, 0.75, 1.0):
        low = 1e-6 / cfg.lr
        cosine = t / 0.1 if t < 0.1 else low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (t - 0.1) / 0.9))
        tri_stage = min(t / 0.1, 0.05 ** max(0, (t - 0.5) / 0.5))
        linear = min(t / 0.06, (1 - t) / 0.94)
        expected = {"cosine": cosine, "tri_stage": tri_stage, "linear": linear}[cfg.schedule]
        assert common.lr_at(round(t * cfg.steps), cfg) == pytest.approx(cfg.lr * expected), t


def test_eval_only_gives_the_accuracy_again_and_leaves_runs_alone(learned, tune, tmp_path):
    folder, data = learned
    for name, key in (("ckpt.pt", "top1"), ("best.pt", "best_top1")):
        printed = done(tune("--eval_only", "--data", data, init=folder / name, out=name))
        assert results(tmp_path / name)["top1"] == results(folder)[key]
        assert f"top1 {results(folder)[key]:.4g}" in printed and not (tmp_path / name / "ckpt.pt").exists()
    copy = shutil.copytree(folder, tmp_path / "copy")
    for flags in ("--eval_only --resume", "--eval_only"):
        refused(tune(flags, "--data", data, init=folder / "best.pt", out="copy"))
    assert contents(copy) == contents(folder)
    other = write_pictures(tmp_path / "other", ["cat", "dog"], train=1, val=1)
    assert "classes" in refused(tune("--eval_only", "--data", other, init=folder / "best.pt"))


def test_predict_names_classes_and_goes_on_after_a_broken_file(learned, tmp_path, monkeypatch):
    folder, data = learned
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes((data / "val/red/00.png").read_bytes()[:60])
    paths = [data / "val/red/00.png", "broken.png", "none.png", data / "val/blue/03.png"]
    lines = done(call(finetune, "--init", folder / "best.pt", "--predict", *paths)).splitlines()
    answers = [line.removeprefix(f"{path}: ") for line, path in zip(lines, paths, strict=True)]
    assert answers[0].startswith("red 0.") and ", blue 0." in answers[0] and answers[3].startswith("blue 0.")
    assert all(answer.startswith("skipped, ") for answer in answers[1:3])
    assert sum(float(part.split()[1]) for part in answers[0].split(", ")) == pytest.approx(1, abs=2e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png"}, "nothing is written"


def test_data_that_cannot_be_used_is_one_line(tune, tmp_path):
    write_pictures(tmp_path / "one", ["red"], train=1, val=1)
    write_pictures(tmp_path / "strange", train=1, val=1)
    shutil.copytree(tmp_path / "strange/val/red", tmp_path / "strange/val/violet")
    write_pictures(tmp_path / "damaged", train=1, val=1)
    for path in (tmp_path / "damaged/val").rglob("*.png"):
        path.write_bytes(b"nothing")
    for name in ("nowhere", "one", "strange", "damaged"):
        assert str(tmp_path / name) in refused(tune("--data", tmp_path / name))


def test_a_checkpoint_that_cannot_be_used_is_one_line(tune, finished, tmp_path):
    state = checkpoint(finished["vision"])
    torch.save(state | {"teacher": None}, tmp_path / "alone.pt")
    torch.save(state | {"task": "clips", "classes": ["a", "b"]}, tmp_path / "clips.pt")
    lacking = {name: t for name, t in state["student"].items() if name != "encoder.blocks.1.fc2.weight"}
    torch.save(state | {"student": lacking}, tmp_path / "part.pt")
    (tmp_path / "words.pt").write_text("no weights\n")
    vision, speech = (finished[kind] / "ckpt.pt" for kind in ("vision", "speech"))
    cases = [
        ("none.pt", "", "none.pt"), ("words.pt", "", "words.pt"), ("part.pt", "", "blocks.1.fc2.weight"),
        ("alone.pt", "--init_from teacher", "teacher"), ("clips.pt", "--eval_only", "--init"),
        (vision, "--eval_only", "not fine-tuned"), ("none", "--predict a.png", "--init none"),
        (speech, "", "speech"), (vision, "--task letters", "vision"), (vision, "--lm lm.arpa", "--beam"),
        ("none", "--model huge", "huge"), ("none", "--task CoLA", "vocabulary"),
    ]  # fmt: skip
    for init, flags, expected in cases:
        init = init if init == "none" else tmp_path / init
        assert expected in refused(tune(flags, init=init)), (init, flags)
        assert not (tmp_path / "run").exists()


WRONG = """steps 0,global_batch 0,global_batch 10,micro_batch -1,label_fraction 0,label_fraction 1.1,lr -1,
    layer_decay 1.1,warmup 1.1,final_scale 2,weight_decay -1,clip -1,drop_path 1,dropout 1.1,mask_p 1.1,
    channel_p -1,mixup -1,erasing 2,rand_augment 11,crop_min 0,beam -1,max_seconds 0,freeze_steps -1,
    schedule step,init_from best"""


@pytest.mark.parametrize("flags", WRONG.split(","))
def test_values_that_cannot_work_are_refused_by_name(tune, flags):
    assert f"--{flags.split()[0]}" in refused(tune("--micro_batch 4", f"--{flags.strip()}"))


def test_a_run_that_diverges_stops_and_spares_its_checkpoints(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    flags = "--steps 60 --lr 1e30 --probe_every 0 --save_every 0 --log_every 1"
    code, _, err = call(finetune, "--out", folder, "--resume", *flags.split())
    assert code == 1 and "diverged" in err and "--lr" in err and "Traceback" not in err
    for name in ("ckpt.pt", "best.pt"):
        assert (folder / name).read_bytes() == (learned[0] / name).read_bytes()


def test_a_run_of_other_classes_is_not_resumed(learned, tmp_path):
    folder = shutil.copytree(learned[0], tmp_path / "run")
    other = write_pictures(tmp_path / "other", ["cat", "dog"], train=4, val=1)
    assert "blue" in refused(call(finetune, "--out", folder, "--resume", "--steps", 60, "--data", other))


LABELS = ("10m", "1h", "10h", "100h", "960h")


def test_presets_are_known_and_can_work():
    speech = ["speech_smoke", "digits", *LABELS, *(f"{name}_large" for name in LABELS), "audioset"]
    assert list(finetune.PRESETS) == ["smoke", "cifar10", "base", "large", *speech, "glue", "glue_small"]
    for name, values in finetune.PRESETS.items():
        cfg = finetune.Config(preset=name, **values)
        assert all(type(value) is type(getattr(finetune.Config(), key)) for key, value in values.items())
        for world in (1,) if name in (*speech[:2], "glue") else (1, 2, 8):
            if name in speech:
                count = train_speech.micro_batch_count(cfg, world) * world
                assert count * cfg.max_samples == pytest.approx(cfg.batch_seconds * 16_000, rel=0.05)
            elif cfg.global_batch:
                assert common.accumulation_steps(cfg.global_batch, cfg.micro_batch, world) in (1, 4, 8)
        if cfg.task in finetune.KINDS:
            assert cfg.model in finetune.KINDS[cfg.task].script.PRESETS


def test_the_image_presets_are_the_papers():
    for name, epochs, lr, drop_path in (("base", 100, 4e-3, 0.2), ("large", 50, 5e-3, 0.25)):
        cfg, epoch = finetune.Config(**finetune.PRESETS[name]), 1_281_167 // 1024
        assert (cfg.steps, cfg.lr, cfg.drop_path) == (epochs * epoch, lr, drop_path)
        assert cfg.warmup * cfg.steps == pytest.approx(10 * epoch)
        assert cfg.final_scale * cfg.lr == pytest.approx(1e-6)
        assert (cfg.global_batch, cfg.layer_decay, cfg.weight_decay, cfg.crop_min) == (1024, 0.65, 0.05, 0.08)
        assert (cfg.mixup, cfg.cutmix, cfg.erasing, cfg.rand_augment) == (0.8, 1.0, 0.25, 9.0)


def test_the_speech_presets_are_the_papers():
    """Updates, rates, hidden time and channels, frozen updates; base, then large."""
    table = """10m 13000 5e-5 .65 .25 10000  1e-4 .65 .25 10000
        1h 13000 5e-5 .65 .25 10000  3e-4 .75 .25 10000
        10h 20000 5e-5 .65 .5 10000  1e-4 .75 .25 10000
        100h 80000 3e-5 .65 .5 0  3e-5 .5 .5 10000
        960h 320000 1e-4 .5 .1 0  3e-5 .5 .25 10000"""
    for name, steps, *columns in map(str.split, table.splitlines()):
        for model, values in (("base", columns[:4]), ("large", columns[4:])):
            cfg = finetune.Config(**finetune.PRESETS[name + "_large" * (model == "large")])
            assert [cfg.lr, cfg.mask_p, cfg.channel_p, cfg.freeze_steps] == list(map(float, values)), name
            assert (cfg.steps, cfg.model, cfg.task, cfg.beta2) == (int(steps), model, "letters", 0.98)
            assert (cfg.mask_span, cfg.layer_drop, cfg.ffn_dropout, cfg.freeze_convs) == (10, 0.1, 0.1, True)
            assert cfg.batch_seconds * 16_000 == 3_200_000 * 8 and cfg.init_from == "student"
    cfg = finetune.Config(**finetune.PRESETS["audioset"])
    assert (cfg.steps, cfg.lr, cfg.head_lr, cfg.mask_p, cfg.mask_span) == (13_000, 3e-5, 2e-4, 0.45, 4)
    assert (cfg.model, cfg.task, cfg.mixup, cfg.batch_seconds) == ("audioset", "sounds", 0.7, 1280)

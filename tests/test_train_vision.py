"""train_vision.py as its users meet it: run, killed, resumed, split over processes, begun from a checkpoint, misled."""

import json
import math
import shutil
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import train_vision
from data import images
from model import resize_grid, resize_positions
from targets import regression_loss
from tests import helpers
from tests.helpers import assert_same, checkpoint, ended, kill, launch, results, rows

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(train_vision.__file__)
TINY = """--dim 16 --depth 2 --heads 2 --ffn 32 --top_k 2 --image_size 16 --patch 4 --mask_block 2 --relative true
    --learned_std 0 --global_batch 8 --steps 6 --log_every 2 --warmup 2 --workers 0 --probe_images 100 --eval_images 50
    --guard_after -1 --dtype float32 --device cpu""".split()


def options(*flags):
    """A tiny model and later flags that win; a resumed run has its options from its own config.json."""
    return [str(flag) for flag in (flags if "--resume" in flags else [*TINY, *flags])]


refused = partial(helpers.refused, by="train_vision.py: ")


def train(*flags, processes=1, status=0):
    """Runs it to its end -> stdout, stderr."""
    return ended(launch(SCRIPT, *options(*flags), processes=processes), status)


@pytest.fixture
def main(monkeypatch, capfd):
    """The same inside this process, which saves the seconds of importing torch -> exit status, stdout, stderr."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train_vision.py", *options(*flags)])
        capfd.readouterr()
        code = 0
        try:
            common.run(train_vision.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
        return code, *capfd.readouterr()

    return call


def write_pictures(root, classes=("cat", "dog"), train=12, val=6):
    """root/{train,val}/CLASS/N.png, small, not square, each of its own colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
                coarse.resize((24, 20), Image.BICUBIC).save(root / split / name / f"{i:02}.png")
    return root


# The picture that is damaged: of the first 24 samples (3 steps of 8) one in the second half of its batch, so that of
# two processes only the second one meets it.
DAMAGED = next(int(i) for k, i in enumerate(images.order(24, 0, 0)) if k % 8 >= 4 and i < 12)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = write_pictures(tmp_path_factory.mktemp("pictures"))
    path = root / "train" / "cat" / f"{DAMAGED:02}.png"
    path.write_bytes(path.read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """One whole run -> its folder, stdout, stderr. Tests that go on from it work on a copy."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, *train("--data", pictures, "--out", out, "--probe_every", 3)


# ---- a run and its folder ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_config_metrics_a_checkpoint_and_results(finished):
    assert {path.name for path in finished[0].iterdir()} == {"config.json", "metrics.jsonl", "ckpt.pt", "results.json"}


def test_config_json_holds_every_field_the_versions_and_the_command(finished, pictures):
    config = json.loads((finished[0] / "config.json").read_text())
    assert {f.name for f in fields(train_vision.Config)} | {"versions", "command"} == config.keys()
    assert config["dim"] == 16 and config["data"] == str(pictures) and config["preset"] == "smoke"
    assert "torch" in config["versions"] and "train_vision.py" in config["command"] and "--dim 16" in config["command"]


def test_metrics_hold_one_line_a_log_step_and_probes_where_asked(finished):
    lines = rows(finished[0])
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 6]
    for row in lines:
        assert row.keys() >= {"loss", "target_std", "pred_std", "tau", "lr", "grad_norm", "samples_per_s"}
        assert all(math.isfinite(value) for value in row.values())
    names = {"explained", "knn", "probe", "teacher_knn", "teacher_probe"}
    probed = [row["step"] for row in lines if names <= row.keys()]
    assert probed == [3, 6] and all("explained" not in row for row in lines if row["step"] not in probed)


def test_results_hold_the_numbers_of_the_contract(finished):
    numbers = results(finished[0])
    both = [f"{name}_{when}" for name in ("explained", "knn", "probe") for when in ("start", "end")]
    assert numbers.keys() >= {"seconds", "peak_memory_gb", "final_loss", "teacher_knn_end", "teacher_probe_end", *both}
    assert all(0 <= numbers[name] <= 1 for name in numbers if "knn" in name or "probe" in name)
    assert numbers["final_loss"] == rows(finished[0])[-1]["loss"] and numbers["explained_end"] <= 1
    assert numbers["seconds"] > 0 and 0.05 < numbers["peak_memory_gb"] < 8


def test_the_checkpoint_holds_all_of_the_state_as_plain_data(finished):
    state = checkpoint(finished[0])
    assert state.keys() >= {"student", "teacher", "optimizer", "step", "config", "rng"}
    assert state["step"] == 6 and state["config"]["dim"] == 16 and len(state["rng"]) == 1
    assert {name for name in state["student"] if name.startswith("encoder.")} == state["teacher"].keys()
    assert any(not torch.equal(state["teacher"][name], state["student"][name]) for name in state["teacher"])


def test_only_matrices_decay(finished):
    state = checkpoint(finished[0])
    decayed, plain = state["optimizer"]["param_groups"]
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0

    def shapes(group):
        return sorted(tuple(state["optimizer"]["state"][i]["exp_avg"].shape) for i in group["params"])

    matrix = {n: n.endswith(".weight") and ".norm" not in n for n in state["student"]}
    assert shapes(decayed) == sorted(tuple(t.shape) for n, t in state["student"].items() if matrix[n])
    assert shapes(plain) == sorted(tuple(t.shape) for n, t in state["student"].items() if not matrix[n])


def test_a_damaged_picture_is_named_once_counted_and_passed_over(finished):
    folder, out, err = finished
    assert (out + err).count(f"{DAMAGED:02}.png") == 1
    assert results(folder)["skipped_files"] == 1


def test_a_folder_that_holds_a_run_is_not_touched(finished, pictures, main):
    folder = finished[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "--resume" in refused(main("--data", pictures, "--out", folder))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resuming_a_finished_run_is_harmless(finished, tmp_path, main):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    code, out, err = main("--out", folder, "--resume")
    assert code == 0 and "step 0:" in out
    assert_same(checkpoint(folder)["student"], checkpoint(finished[0])["student"])
    assert_same(checkpoint(folder)["teacher"], checkpoint(finished[0])["teacher"])
    assert rows(folder) == rows(finished[0]) and results(folder).keys() == results(finished[0]).keys()
    for name in results(folder).keys() - {"peak_memory_gb"}:
        assert results(folder)[name] == results(finished[0])[name]


def test_the_embedded_pictures_need_no_folder_and_every_switch_of_the_method_runs(tmp_path):
    flags = "--learned_std 0.3 --layer_scale 0.1 --target ffn --norm layer --final_norm layer --beta 0 --window 1"
    out, _ = train(*flags.split(), *"--workers 2 --dtype bfloat16 --steps 2 --out".split(), tmp_path / "run")
    assert "10 classes" in out and results(tmp_path / "run").keys() >= {"explained_end", "knn_end"}


def test_one_class_runs_without_probes(tmp_path, main):
    write_pictures(tmp_path / "data", classes=("cat",))
    code, out, err = main("--data", tmp_path / "data", "--out", tmp_path / "run", "--image_width", 8, "--steps", 2)
    assert code == 0 and "no probe" in out, err
    assert results(tmp_path / "run").keys() >= {"explained_start", "explained_end"}
    assert not any("knn" in name or "probe" in name for name in results(tmp_path / "run"))


# ---- killed and resumed --------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(pictures, tmp_path):
    flags = "--steps 80 --log_every 1 --save_every 5 --drop_path 0.3 --dropout 0.2 --attn_dropout 0.1 --data".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*flags, pictures, "--out", whole)
    kill(launch(SCRIPT, *options(*flags, pictures, "--out", cut)), cut)
    assert 5 <= checkpoint(cut)["step"] < 80 and not (cut / "results.json").exists()
    train("--out", cut, "--resume")  # every other option comes from its config.json
    ours, theirs = checkpoint(cut), checkpoint(whole)
    for part in ("student", "teacher", "optimizer", "step"):
        assert_same(ours[part], theirs[part])
    assert torch.equal(ours["rng"][0][0], theirs["rng"][0][0])
    assert [row["step"] for row in rows(cut)] == list(range(1, 81))
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]
    assert results(cut)["explained_start"] == results(whole)["explained_start"]


def test_an_interrupted_run_can_be_ended_where_it_stands(pictures, tmp_path, main, monkeypatch):
    def save_then_stop(*args, real=common.save, **state):
        real(*args, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save", save_then_stop)
        assert main("--data", pictures, "--out", tmp_path / "run", "--save_every", 4)[0] == 130
    code, _, err = main("--out", tmp_path / "run", "--resume", "--steps", 4)
    assert code == 0, err
    assert results(tmp_path / "run").keys() >= {"explained_end", "knn_end", "probe_end"}


# ---- several processes, several micro-batches ----------------------------------------------------------------------

# A fifth of the pictures get one hidden patch, the others 13 of 16: the processes hold different numbers of positions.
SPLIT = "--steps 3 --log_every 1 --probe_images 2 --eval_images 6 --mask_ratio 0.8 --mask_block 8".split()


@pytest.fixture(scope="module")
def single(tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("runs") / "single"
    train(*SPLIT, "--data", pictures, "--out", out)
    return out


@pytest.fixture(scope="module", params=[0, 2], ids=["whole", "micro-batches"])
def double(request, tmp_path_factory, pictures):
    out = tmp_path_factory.mktemp("runs") / "double"
    return out, *train(*SPLIT, "--micro_batch", request.param, "--data", pictures, "--out", out, processes=2)


def assert_same_run(ours, theirs):
    for row, expected in zip(rows(ours), rows(theirs), strict=True):
        assert row["step"] == expected["step"]
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), f"{name} of step {row['step']}"
    assert len(rows(ours)) == 3
    for part in ("student", "teacher"):
        assert_same(checkpoint(ours)[part], checkpoint(theirs)[part], atol=1e-5)


def test_two_processes_train_the_same_run_as_one(single, double):
    assert_same_run(double[0], single)
    assert results(double[0])["explained_end"] == pytest.approx(results(single)["explained_end"], abs=1e-4)


def test_micro_batches_train_the_same_run_as_whole_ones(single, pictures, tmp_path, main, monkeypatch):
    counts = {4: [], 1: []}
    for micro_batch in counts:

        def counted(f, *args, real=regression_loss, seen=counts[micro_batch], **kwargs):
            seen.append(len(f))
            return real(f, *args, **kwargs)

        monkeypatch.setattr(train_vision, "regression_loss", counted)
        out = tmp_path / f"{micro_batch}"
        code, _, err = main(*SPLIT, "--micro_batch", micro_batch, "--data", pictures, "--out", out)
        assert code == 0, err
        assert_same_run(out, single)
    assert len(counts[4]) == 6 and len(counts[1]) == 24
    ours, others = counts[4][::2], counts[4][1::2]  # what each of two processes holds
    assert ours[0] != others[0], "or else a mean of means would pass for the mean over the global batch"


def test_only_the_first_of_two_processes_speaks(double):
    _, out, err = double
    assert out.count("step 0:") == out.count("training and") == out.count("3 steps in") == 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert err.count("| 0/3 [") == 1 and all("/3 [" in line for line in lines), f"one bar and no warnings: {err}"


def test_two_processes_keep_a_random_state_each(double):
    first, second = checkpoint(double[0])["rng"]
    assert not torch.equal(first[0], second[0])


def test_a_damaged_picture_that_only_the_second_process_meets_is_named_and_counted(double):
    folder, out, err = double
    assert results(folder)["skipped_files"] == 1
    assert (out + err).count(f"{DAMAGED:02}.png") == 1


# ---- from a checkpoint ---------------------------------------------------------------------------------------------

STILL = "--steps 1 --lr 0 --min_lr 0 --tau_0 1 --tau_e 1".split()  # one step that moves nothing shows what was loaded


def test_init_takes_student_and_teacher_and_starts_the_schedule_again(finished, pictures, tmp_path, main):
    code, _, err = main("--data", pictures, "--init", finished[0] / "ckpt.pt", *STILL, "--out", tmp_path / "run")
    assert code == 0, err
    ours, theirs, numbers = checkpoint(tmp_path / "run"), checkpoint(finished[0]), results(tmp_path / "run")
    assert ours["step"] == 1 and rows(tmp_path / "run")[0]["step"] == 1
    assert_same(ours["student"], theirs["student"])
    assert_same(ours["teacher"], theirs["teacher"])
    for name in ("explained", "knn", "teacher_knn"):
        assert numbers[f"{name}_start"] == pytest.approx(results(finished[0])[f"{name}_end"], abs=1e-4)


def test_init_can_make_the_teacher_a_copy_of_the_student(finished, pictures, tmp_path, main):
    flags = "--data", pictures, "--init", finished[0] / "ckpt.pt", "--init_teacher", "student", *STILL
    assert main(*flags, "--out", tmp_path / "run")[0] == 0
    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(finished[0])
    assert_same(ours["teacher"], {name: theirs["student"][name] for name in theirs["teacher"]})


def test_init_at_another_image_size_interpolates_the_positions(finished, pictures, tmp_path, main):
    flags = "--data", pictures, "--init", finished[0] / "ckpt.pt", "--image_size", 24, "--image_width", 12, *STILL
    code, _, err = main(*flags, "--out", tmp_path / "run")
    assert code == 0, err
    for part in ("student", "teacher"):
        ours, expected = checkpoint(tmp_path / "run")[part], checkpoint(finished[0])[part]
        expected["encoder.embed.table"] = resize_positions(expected["encoder.embed.table"], (4, 4), (6, 3))
        assert_same(ours, expected)


def test_init_with_what_does_not_fit_is_one_line(finished, pictures, tmp_path, main):
    (tmp_path / "text.pt").write_text("0 1 2 3: no weights\n")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    fine = finished[0] / "ckpt.pt"
    for path, *flags in (
        [tmp_path / "none.pt"], [tmp_path / "text.pt"], [tmp_path / "other.pt"], [tmp_path / "tensor.pt"],
        [fine, "--dim", 32], [fine, "--depth", 3], [fine, "--patch", 8], [fine, "--heads", 4],
    ):  # fmt: skip
        assert str(path) in refused(main("--data", pictures, "--init", path, *flags, "--out", tmp_path / "run"))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_a_resumed_run_takes_a_new_weight_decay_and_beta2(finished, tmp_path, main):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert main("--out", folder, "--resume", "--steps", 7, "--weight_decay", 0.3, "--beta2", 0.9)[0] == 0
    groups = checkpoint(folder)["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.3, (0.9, 0.9)), (0, (0.9, 0.9))]


def test_init_with_learned_positions_at_another_image_size_interpolates_them(pictures, tmp_path, main):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = "--data", pictures, *STILL, "--learned_std", 0.3
    assert main(*flags, "--out", first)[0] == 0
    code, _, err = main(*flags, "--init", first / "ckpt.pt", "--image_size", 24, "--image_width", 12, "--out", second)
    assert code == 0, err
    for part in ("student", "teacher"):
        name = "encoder.embed.learned"
        assert_same(checkpoint(second)[part][name], resize_grid(checkpoint(first)[part][name], (4, 4), (6, 3)))


def test_resuming_with_another_model_is_one_line_and_costs_nothing(finished, tmp_path, main):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    assert "ckpt.pt" in refused(main("--out", folder, "--resume", "--dim", 32))
    assert (folder / "config.json").read_text() == (finished[0] / "config.json").read_text(), "a plain --resume still goes on"


def test_resuming_from_a_damaged_checkpoint_is_one_line(finished, tmp_path, main):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    assert "ckpt.pt" in refused(main("--out", folder, "--resume"))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_folder_without_pictures_is_one_line_and_status_2(tmp_path):
    _, err = train("--data", tmp_path / "none", "--out", tmp_path / "run", status=2)
    assert "none" in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_that_are_all_damaged_are_one_line_and_status_2(tmp_path, main, split):
    write_pictures(tmp_path / "data", train=3, val=2)
    for path in (tmp_path / "data" / split).rglob("*.png"):
        path.write_bytes(b"nothing")
    code, _, err = main("--data", tmp_path / "data", "--out", tmp_path / "run")
    assert code == 2 and split in err and "Traceback" not in err, err


def test_a_collapsed_run_stops_and_says_what_to_try(pictures, tmp_path):
    flags = "--guard_after 1 --min_target_std 100 --out".split()
    _, err = train("--data", pictures, *flags, tmp_path / "run", status=1)
    assert "collapsed" in err and "--tau_0" in err and "--guard_after" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_collapse_guard_waits_for_its_step_and_can_be_switched_off(pictures, tmp_path, main):
    flags = "--data", pictures, "--min_pred_std", 100, "--log_every", 1
    code, _, err = main(*flags, "--guard_after", 4, "--out", tmp_path / "a")
    assert code == 1 and "\nstep 4: collapsed, pred_std" in err and "Traceback" not in err, "on a line of its own"
    assert [row["step"] for row in rows(tmp_path / "a")][:3] == [1, 2, 3]
    assert main(*flags, "--guard_after", -1, "--out", tmp_path / "b")[0] == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(finished, tmp_path, main):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    flags = "--resume --steps 20 --lr 1e30 --save_every 4 --clip 0".split()
    code, _, err = main("--out", folder, *flags)
    assert code == 1 and "finite" in err and "--lr" in err and "Traceback" not in err, err
    assert (folder / "ckpt.pt").read_bytes() == (finished[0] / "ckpt.pt").read_bytes()


def test_gradients_that_are_not_finite_stop_the_run_before_their_step_is_saved(pictures, tmp_path, main, monkeypatch):
    """Its loss is still finite, its weights are not."""

    def poison(parameters, limit, real=torch.nn.utils.clip_grad_norm_, calls=[]):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad.fill_(math.inf)
        return real(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poison)
    code, _, err = main("--data", pictures, "--save_every", 1, "--out", tmp_path / "run")
    assert code == 1 and "step 3" in err and "finite" in err, err
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["student"].values())


def config(**changes):
    return train_vision.Config(**{"dim": 16, "depth": 2, "heads": 2, "top_k": 2, "image_size": 16} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=0), dict(global_batch=0), dict(global_batch=9), dict(micro_batch=-1), dict(workers=-1),
        dict(heads=3), dict(image_size=18), dict(image_width=6), dict(image_width=-4), dict(top_k=3), dict(top_k=0),
        dict(mask_ratio=0.0), dict(mask_ratio=1.1), dict(mask_block=-1), dict(drop_path=1.0), dict(drop_path=-0.1),
        dict(dropout=1.1), dict(tau_0=1.1), dict(tau_n=-1), dict(beta=-1.0), dict(beta2=1.0), dict(weight_decay=-0.1),
        dict(lr=-1e-3), dict(min_lr=-1e-3), dict(crop_min=0.0), dict(jitter=-0.1), dict(window=-1), dict(seed=-1),
        dict(eval_images=0), dict(log_every=0), dict(clip=-1.0),
    ],
    ids=lambda changes: "{}={}".format(*next(iter(changes.items()))),
)  # fmt: skip
def test_values_that_cannot_work_are_refused_by_name(changes):
    with pytest.raises(common.BadInput, match=next(iter(changes)) if "image" not in next(iter(changes)) else "image"):
        train_vision.check(config(**{"global_batch": 8} | changes), world=2)


def test_accumulation_follows_from_the_number_of_processes():
    for world, micro_batch, expected in ((1, 0, 1), (2, 0, 1), (1, 16, 4), (4, 16, 1), (1, 1000, 1), (2, 17, 2)):
        assert train_vision.check(config(global_batch=64, micro_batch=micro_batch), world) == expected


# ---- help, presets, and the functions of the script ----------------------------------------------------------------


def test_help_lists_the_fields_and_a_presets_values(capsys, monkeypatch):
    for flags, size in (["--help"], 32), (["--preset", "base", "--help"], 224):
        monkeypatch.setattr(sys, "argv", ["train_vision.py", *flags])
        with pytest.raises(SystemExit) as end:
            common.run(train_vision.main)
        out = capsys.readouterr().out
        assert end.value.code == 0 and f"--image_size {size} " in out and "Baevski" in out
        assert all(f"--{f.name}" in out and f.metadata["help"] in out for f in fields(train_vision.Config))


def test_presets_are_named_known_and_can_work():
    assert list(train_vision.PRESETS) == ["smoke", "cifar10", "base", "large", "large_phase2"]
    for name, values in train_vision.PRESETS.items():
        cfg = train_vision.Config(preset=name, **values)
        for world in (1, 2, 8, 16):
            assert train_vision.check(cfg, world) * world * (cfg.micro_batch or cfg.global_batch) >= cfg.global_batch
        assert all(type(value) is type(asdict(train_vision.Config())[key]) for key, value in values.items())


def test_the_big_presets_are_the_papers():
    base, large, phase2 = (train_vision.Config(**train_vision.PRESETS[n]) for n in ("base", "large", "large_phase2"))
    for cfg, sizes in (base, (768, 12, 12, 3072, 2048)), (large, (1024, 24, 16, 4096, 8192)):
        assert (cfg.dim, cfg.depth, cfg.heads, cfg.ffn, cfg.global_batch) == sizes
        assert (cfg.top_k, cfg.norm, cfg.final_norm, cfg.beta, cfg.target) == (6, "layer", "layer", 2, "block")
        assert (cfg.tau_0, cfg.tau_e, cfg.clip, cfg.weight_decay, cfg.beta2) == (0.9998, 0.9998, 3, 0.05, 0.999)
        assert round(cfg.mask_ratio * 196) == 120 and cfg.relative and cfg.learned_std == 0 and cfg.mask_block == 16
    assert (base.layer_scale, large.layer_scale, base.lr, large.lr) == (1e-4, 1e-5, 2e-3, 1e-3)
    assert (phase2.init_teacher, phase2.tau_0, phase2.tau_e) == ("student", 0.9999, 0.9999)


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    cfg = config(steps=100, warmup=20, lr=1.0, min_lr=0.1)
    for step in range(1, 101):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert train_vision.lr_at(step, cfg) == pytest.approx(step / 20 if step <= 20 else cosine)
    assert train_vision.lr_at(100, cfg) == pytest.approx(0.1)
    assert train_vision.lr_at(1, config(steps=1, warmup=0, lr=1.0)) > 0
    assert [train_vision.lr_at(step, config(steps=2, warmup=50, lr=1.0)) for step in (1, 2)] == [0.5, 1]


def toy(n, seed, classes=3):
    """Features (n, 6) whose class lies in their direction from a common far mean."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return 50 + 4 * torch.eye(6)[labels] + torch.randn(n, 6, generator=rng), labels


def test_the_linear_probe_fits_what_is_separable_and_nothing_else():
    fit, test = toy(300, 0), toy(200, 1)
    assert train_vision.linear_probe(*fit, *test) > 0.95
    assert train_vision.linear_probe(torch.randn(300, 6), fit[1], torch.randn(200, 6), test[1]) < 0.5
    with torch.no_grad():
        assert train_vision.linear_probe(*fit, *test) > 0.95, "fits although its caller tracks no gradient"


def test_knn_is_a_vote_weighted_by_similarity():
    (x, y), (x_test, y_test) = toy(60, 0), toy(30, 1)
    x_test = x_test + 2 * torch.randn(30, 6, generator=torch.Generator().manual_seed(2))  # so that some fail
    mean, std = x.mean(0), x.std(0)
    right = 0
    for sample, label in zip(x_test, y_test, strict=True):
        cosine = [torch.cosine_similarity((sample - mean) / std, (other - mean) / std, dim=0).item() for other in x]
        votes = [0.0] * 3
        for i in sorted(range(60), key=lambda i: -cosine[i])[:20]:
            votes[y[i]] += math.exp(cosine[i] / 0.07)
        right += votes.index(max(votes)) == label
    assert 0.4 < right / 30 < 1
    assert train_vision.knn(x, y, x_test, y_test) == pytest.approx(right / 30)

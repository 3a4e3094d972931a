"""common.py: options, run folders, checkpoints that survive crashes and refuse to run what they hold, metric lines."""

import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import common
from common import BadInput, option
from tools import convert


@dataclass
class Config:
    preset: str = option("small", "named values")
    out: str = option("", "folder")
    resume: bool = option(False, "go on")
    steps: int = option(10, "how many")
    lr: float = option(0.1, "how fast")
    shape: str = option("round", "which", ("round", "square"))
    fast: bool = option(True, "whether")
    files: list = option([], "pictures")


PRESETS = {"small": dict(), "big": dict(steps=1000, lr=0.5)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parse(*flags):
    sys.argv[1:] = flags
    return common.parse(Config, PRESETS, "A toy.", "toy")


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py"])


def refused(capsys, *flags):
    """The one line on stderr with which a program with these options ends, status 2."""
    with pytest.raises(SystemExit) as end:
        common.run(lambda: parse(*flags))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("toy.py: "), err
    return err


# ---- options -------------------------------------------------------------------------------------------------------


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults():
    assert parse().steps == 10 and parse().preset == "small"
    config = parse("--preset", "big", "--lr", "0.7")
    assert (config.preset, config.steps, config.lr, config.shape) == ("big", 1000, 0.7, "round")


def test_a_resumed_run_keeps_its_own_values_except_those_given(tmp_path):
    first = parse("--preset", "big", "--steps", "77", "--shape", "square", "--out", "a")
    folder = common.open_run("a", vars(first), False, 0)
    assert folder.samefile(tmp_path / "a")
    config = parse("--out", "a", "--resume", "--lr", "0.9")
    assert (config.preset, config.steps, config.shape, config.lr) == ("big", 77, "square", 0.9)
    assert config.resume is True and config.out == "a"
    assert parse("--out", "a", "--resume", "--preset", "big").steps == 77, "the preset of the run says nothing new"
    assert parse("--out", "a").steps == 10, "without --resume the folder says nothing"
    assert parse("--out", "nothing-there", "--resume").steps == 10


def test_an_option_that_is_newer_than_the_run_takes_its_default():
    common.open_run("a", {"preset": "big", "steps": 77}, False, 0)  # a run of before lr and the others were options
    config = parse("--out", "a", "--resume")
    assert (config.steps, config.lr) == (77, type(config)().lr)


def test_data_loaders_fork():
    """Their datasets hold closures, which no other way of starting a process can hand over."""
    torch.multiprocessing.set_start_method("spawn", force=True)
    common.start_processes("cpu", "float32")
    assert torch.multiprocessing.get_start_method() == "fork"


@pytest.mark.parametrize("damage", ["", "{", "[]", '[3]'])
def test_a_damaged_config_is_named_when_resuming(capsys, damage):
    os.mkdir("a")
    with open("a/config.json", "w") as file:
        file.write(damage)
    assert "config.json" in refused(capsys, "--out", "a", "--resume")


@pytest.mark.parametrize(
    "flags, value",
    [([], True), (["--fast"], True), (["--fast", "true"], True), (["--fast=FALSE"], False)],
)
def test_switches_are_set_by_name_or_by_true_and_false(flags, value):
    assert parse(*flags).fast is value
    assert parse(*flags, "--lr", "1").lr == 1, "a switch does not swallow the next option"


@pytest.mark.parametrize("text, value", [("100000", 100_000), ("1e5", 100_000), ("-3", -3), ("1E2", 100), ("2.0", 2)])
def test_whole_numbers_may_be_written_as_powers_of_ten(text, value):
    steps = parse("--steps", text).steps
    assert steps == value and type(steps) is int


def test_large_whole_numbers_stay_exact():
    assert parse("--steps", str(2**53 + 1)).steps == 2**53 + 1


def test_numbers_lists_and_choices():
    assert parse("--lr", "1e-3").lr == 1e-3 and type(parse("--lr", "2").lr) is float
    assert parse("--files", "a.png", "b.png").files == ["a.png", "b.png"] and parse().files == []
    assert parse("--shape", "square").shape == "square"


def test_what_is_put_into_a_list_stays_there():
    parse().files.append("a.png")
    assert parse().files == []


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--stps", "3"], ["--stps", "--steps", "--lr", "--shape", "--fast"]),  # lists what exists
        (["--ste", "3"], ["--ste", "--steps"]),  # no abbreviations
        (["stray"], ["stray"]),
        (["--preset", "huge"], ["huge", "small", "big"]),
        (["--shape", "flat"], ["--shape", "flat", "round", "square"]),
        (["--steps", "many"], ["--steps", "many", "int"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--steps", "nan"], ["--steps"]),
        (["--steps", "1e999"], ["--steps"]),
        (["--lr", "inf"], ["--lr"]),
        (["--lr", "fast"], ["--lr", "float"]),
        (["--fast", "maybe"], ["--fast", "maybe"]),
        (["--steps"], ["--steps"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_one_line_and_status_2(capsys, flags, said):
    line = refused(capsys, *flags)
    assert all(word in line for word in said), line


def test_help_names_every_field_with_the_values_of_the_preset(capsys):
    for flags, steps in (["--help"], "10"), (["--preset", "big", "--help"], "1000"), (["-h", "--steps", "3"], "3"):
        with pytest.raises(SystemExit) as end:
            common.run(lambda flags=flags: parse(*flags))
        out, err = capsys.readouterr()
        assert end.value.code == 0 and err == "" and "A toy." in out and "small, big" in out
        assert f"--steps {steps} " in out and "how many" in out and all(f"--{name}" in out for name in vars(Config()))


def test_the_default_folder_is_named_after_script_and_preset():
    assert parse().out == "runs/toy-small" and parse("--preset", "big").out == "runs/toy-big"
    assert parse("--out", "x").out == "x"


# ---- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, status", [(BadInput("x.pt: gone"), 2), (KeyboardInterrupt(), 130), (SystemExit(1), 1)])
def test_exit_status(error, status):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code == status


def test_success_returns_and_other_errors_keep_their_traceback():
    common.run(lambda: None)
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


def test_only_the_first_process_of_a_machine_speaks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        common.run(lambda: parse("--stps"))
    assert capsys.readouterr() == ("", "")


def test_the_line_does_not_land_on_a_progress_bar(capsys):
    def main():
        bar = tqdm(total=3)
        bar.update()
        raise BadInput("x.pt: gone")

    with pytest.raises(SystemExit, match="2"):
        common.run(main)
    assert "\ntoy.py: x.pt: gone\n" in capsys.readouterr().err


PROCESS = """
import atexit, os, sys, time
import common

def main():
    rank, *_ = common.start_processes("cpu", "float32")
    atexit.register(os.abort)  # as gloo's threads now and then do
    print("done", end="")
    common.gather(rank)
    if sys.argv[1] == "late" and rank == 1:
        time.sleep(1)
        open("last", "w").close()
    if sys.argv[1] == "input":
        raise common.BadInput("x.pt: gone")
    if sys.argv[1] == "stop":
        raise SystemExit("collapsed")
    if sys.argv[1] == "mistake":
        1 / 0

common.run(main)
"""


@pytest.mark.parametrize(
    "end, status, said", [("late", 0, ""), ("input", 2, "gone\n"), ("stop", 1, "collapsed\n"), ("mistake", 1, "division by zero\n")]
)  # fmt: skip
def test_two_processes_end_together_with_their_status_and_what_they_printed(tmp_path, end, status, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", PROCESS, end], env=os.environ | place | {"PYTHONPATH": str(Path(common.__file__).parent)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    out, err = processes[0].communicate(timeout=120)
    assert processes[0].returncode == status and out == "done" and err.endswith(said), err
    assert (tmp_path / "last").exists() == (end == "late"), "the first waits for the second"
    assert processes[1].wait(timeout=120) == status


# ---- run folder ----------------------------------------------------------------------------------------------------


def test_a_new_run_writes_its_config_and_an_old_run_is_refused(tmp_path):
    folder = common.open_run("a/b", {"steps": 3}, False, 0)
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 3 and config["versions"]["torch"] == torch.__version__ and "toy.py" in config["command"]
    for name in ("results.json", "ckpt.pt", "metrics.jsonl"):
        (tmp_path / name[:2]).mkdir()
        (tmp_path / name[:2] / name).write_text("{}")
        with pytest.raises(BadInput, match="--resume"):
            common.open_run(name[:2], {}, False, 0)
        assert common.open_run(name[:2], {}, True, 0).is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    common.open_run("other", {}, False, 0)  # a folder without a run is fine


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/a"):
        with pytest.raises(SystemExit, match="2"):
            common.run(lambda out=out: common.open_run(out, {}, False, 0))
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and out in err


def test_other_ranks_write_nothing(tmp_path):
    common.open_run("a", {}, False, 1)
    assert not (tmp_path / "a").exists()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    rng = [common.rng_state(torch.device("cpu"))]
    state = dict(student={"w": torch.randn(3, 2)}, step=5, config={"lr": 0.1, "out": "a"}, rng=rng)
    common.save(tmp_path / "ckpt.pt", state)
    back = convert.load(tmp_path / "ckpt.pt")
    assert back.keys() == state.keys() and back["config"] == state["config"] and back["step"] == 5
    assert torch.equal(back["student"]["w"], state["student"]["w"])
    assert os.listdir(tmp_path) == ["ckpt.pt"], "no temporary file stays"


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    common.save(tmp_path / "ckpt.pt", {"step": 1})

    def crash(state, file):
        file.write_bytes(b"half of")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space"):
        common.save(tmp_path / "ckpt.pt", {"step": 2})
    assert convert.load(tmp_path / "ckpt.pt") == {"step": 1}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def damaged():
    """Name -> bytes of files that are no checkpoints."""
    common.save(common.Path("good.pt"), {"student": {"w": torch.randn(50, 50)}, "step": 3})
    good = common.Path("good.pt").read_bytes()
    torch.save({"w": Malicious()}, "bad.pt")
    return {
        "empty": b"", "one byte": good[:1], "truncated early": good[:30], "truncated": good[: len(good) // 2],
        "without its end": good[:-1], "text": b"these are not the weights\n", "json": b'{"step": 3}',
        "numbers": b"0 1 2 3\n", "dots": b"...", "picture": b"\x89PNG\r\n\x1a\n" + bytes(99), "zeros": bytes(1000),
        "malicious": common.Path("bad.pt").read_bytes(), "malicious pickle": pickle.dumps(Malicious(), 2),
        "truncated pickle": pickle.dumps({"step": 3, "w": "x" * 300}, 2)[:-150], "odd pickle": b"\x80\x02X\x09",
    }  # fmt: skip


NAMES = [
    "empty", "one byte", "truncated early", "truncated", "without its end", "text", "json", "numbers", "dots",
    "picture", "zeros", "malicious", "malicious pickle", "truncated pickle", "odd pickle",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_checkpoint_is_refused_in_one_line_and_never_run(tmp_path, name):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(damaged()[name])
    with pytest.raises(BadInput) as error:
        convert.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(BadInput, match=str(path)):
            convert.load(path)


def test_random_state_comes_back():
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    states = [common.rng_state(cpu)]
    expected = torch.rand(3)
    torch.rand(7)
    common.rng_state(cpu, states[0])
    assert torch.equal(torch.rand(3), expected)


# ---- metric lines --------------------------------------------------------------------------------------------------


def test_metric_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with common.open_metrics(tmp_path, 0) as metrics:
        for step in range(1, 6):
            print(json.dumps({"step": step, "loss": 1 / step}), file=metrics)
            assert path.read_text().count("\n") == step, "a line is on disk when it is written"
    whole = path.read_text().splitlines(keepends=True)
    for cut in ("".join(whole), "".join(whole) + '{"step": 6, "lo', "".join(whole)[:-1]):  # whole, killed while writing
        path.write_text(cut)
        common.open_metrics(tmp_path, 9).close()
        assert path.read_text() == "".join(whole)
    with common.open_metrics(tmp_path, 3) as metrics:
        print(json.dumps({"step": 4}), file=metrics)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_crash_while_dropping_metric_lines_leaves_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def crash(self, text, real=common.Path.write_text):
        real(self, text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Path, "write_text", crash)
    with pytest.raises(KeyboardInterrupt):
        common.open_metrics(tmp_path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_one_process_gathers_only_its_own_value():
    assert common.gather({"a": 1}) == [{"a": 1}]


@pytest.mark.parametrize("name, wanted", [("float32", False), ("bfloat16", True)])
def test_the_dtype_that_was_asked_for_is_taken(name, wanted):
    for dtype, enabled in ((name, wanted), ("auto", torch.cpu._is_avx512_bf16_supported())):
        with common.start_processes("cpu", dtype)[3]:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is (torch.bfloat16 if enabled else torch.float32)


def test_peak_memory_is_in_gigabytes():
    assert 0.05 < common.peak_memory_gb(torch.device("cpu")) < 64


def test_a_start_that_failed_does_not_block_its_folder(tmp_path, capsys):
    for _ in range(2):  # it left config.json and an empty metrics.jsonl
        common.open_run(tmp_path, {"lr": 1.0}, resume=False, rank=0)
        common.open_metrics(tmp_path, 0).close()
    common.open_run(tmp_path, {"lr": 2.0}, resume=True, rank=0)
    assert "starts at step 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 2.0

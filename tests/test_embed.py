"""tools/embed.py: features of files and lines, from tiny checkpoints, against the model called by hand on each alone."""

import copy
import io
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

import train_speech
import train_text
import train_vision
from data import audio, images, text
from model import Classifier, Recogniser, SentenceClassifier
from tests import helpers
from tools import convert, embed

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"dim": 16, "depth": 3, "heads": 2, "ffn": 24, "dropout": 0.3, "attn_dropout": 0.3}
VOCABULARY = text.Vocabulary({bytes([i]): i + 4 for i in range(256)})
TEXTS = ["the cat", "é sat on a mat, it sat and sat", "x", "on day 7 the dog barked"]
SCRIPTS = {"vision": train_vision, "speech": train_speech, "text": train_text}
KINDS = list(SCRIPTS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """{kind: ckpt, its path; cfg, student and teacher in it; folder of inputs; names of these, in order}."""
    root, rng, made = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0), {}
    configs = {
        "vision": train_vision.Config(**SMALL, image_size=16, image_width=24, patch=8, layer_scale=0.5, target="ffn"),
        "speech": train_speech.Config(**SMALL, channels=6, pos_groups=2, pos_width=15, deep_norm=True),
        "text": train_text.Config(**SMALL, max_tokens=40, head_layers=1),
    }
    for kind, cfg in configs.items():
        torch.manual_seed(1)
        student = train_text.build(cfg, VOCABULARY.size) if kind == "text" else SCRIPTS[kind].build(cfg)
        teacher = copy.deepcopy(student)
        for network in (student, teacher):
            for p in network.parameters():
                nn.init.normal_(p, p.mean().item(), 0.2)  # biases, gains and position tables too
        more = {"vocabulary": vocabulary_text(root)} if kind == "text" else {}
        averaged = {name: tensor for name, tensor in teacher.state_dict().items() if name.startswith("encoder.")}
        file = {"student": student.state_dict(), "teacher": averaged, "config": asdict(cfg) | {"new": 1}}
        torch.save(file | more, root / f"{kind}.pt")
        folder = root / kind
        (folder / "b").mkdir(parents=True)
        made[kind] = SimpleNamespace(ckpt=root / f"{kind}.pt", folder=folder, cfg=cfg)
        made[kind].student, made[kind].teacher = student.eval(), teacher.eval()
    places = [(i, place) for i, place in enumerate(("a", "b/a", "b/d", "b/e", "c"))]
    for i, place in places:
        picture = rng.integers(256, size=(30 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "vision" / f"{place}.png")
        soundfile.write(root / "speech" / f"{place}.wav", rng.normal(size=(4000, 900, 7000, 410, 4010)[i]) / 9, audio.RATE)
    (root / "text/a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS[:2]).encode())
    (root / "text/b/a.txt").write_text("\n".join(TEXTS[2:]) + "\n")
    for kind in KINDS:
        (root / kind / "b" / "other.md").write_text("no input")
        (root / kind / "b" / ".hidden.txt").write_text("no input")
    made["vision"].names = [root / "vision" / f"{place}.png" for _, place in places]
    made["speech"].names = [root / "speech" / f"{place}.wav" for _, place in places]
    made["text"].names = [root / "text" / name for name in ("a.txt:1", "a.txt:2", "b/a.txt:1", "b/a.txt:2")]
    for kind in KINDS:
        made[kind].names = [str(name) for name in made[kind].names]
    return made


def vocabulary_text(folder):
    VOCABULARY.save(folder / "vocab")
    return (folder / "vocab").read_text()


def alone(kind, case, i):
    """What the model takes for input i, in a batch of one."""
    if kind == "vision":
        picture = images.center_crop(Image.open(case.names[i]), (16, 24))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((torch.from_numpy(np.array(picture)).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    if kind == "speech":
        x = torch.from_numpy(soundfile.read(case.names[i], dtype="float32")[0])
        return nn.functional.layer_norm(x, x.shape)[None]
    return torch.tensor([[0, *(b + 4 for b in TEXTS[i].encode()), 2]])


@torch.no_grad()
def oracle(kind, case, network="student"):
    """{layer: [(T, D) of each input]}, by hooks on the blocks of the whole model; 0: what the first block is given."""
    encoder, seen = getattr(case, network).encoder, {}
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.setdefault(0, []).append(given[0]))]
    for l, block in enumerate(encoder.blocks, start=1):
        hooks.append(block.register_forward_hook(lambda _, given, out, l=l: seen.setdefault(l, []).append(out[0])))
    for i in range(len(case.names)):
        encoder(alone(kind, case, i))
    for hook in hooks:
        hook.remove()
    return {l: [x[0, encoder.prefix :].numpy() for x in xs] for l, xs in seen.items()}


def call(*flags, stdin=b""):
    """python -m tools.embed flag ... on the CPU -> exit status, stdout, stderr."""
    return helpers.call(embed, *flags, "--device", "cpu", stdin=SimpleNamespace(buffer=io.BytesIO(stdin)))


refused = partial(helpers.refused, silent=True)


def written(out):
    """An array and its index -> rows of each input, names, reasons."""
    x, (head, *lines) = np.load(out), out.with_suffix(".tsv").read_text().splitlines()
    assert head == "first\tend\tinput\tskipped" and x.dtype == np.float32 and x.ndim == 2 and x.flags.c_contiguous
    first, end, names, skipped = zip(*(line.split("\t") for line in lines))
    first, end = list(map(int, first)), list(map(int, end))
    assert [0, *end[:-1]] == first and end[-1] == len(x), "no row is left out or given twice"
    assert not list(out.parent.glob("*.tmp"))
    return [x[a:b] for a, b in zip(first, end)], list(names), list(skipped)


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and np.abs(a - b).max() <= 1e-5 * max(1, np.abs(b).max())


# ---- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_what_the_blocks_put_out_for_each_input_alone(kind, network, tiny, tmp_path):
    case = tiny[kind]
    theirs = oracle(kind, case, network)
    for layer in range(4) if network == "student" else (2, 3):
        flags = ["--init", case.ckpt, "--network", network, case.folder]
        flags += ["--layer", layer] * (layer < 3)  # the last one is the default
        code, said, err = call(*flags, "--out", tmp_path / f"{layer}.npy", "--pool", "none")
        assert code == 0, err
        assert f"{network}, layer {layer} of 3" in said and f"{len(case.names)} " in said and "0 skipped" in said
        rows, names, skipped = written(tmp_path / f"{layer}.npy")
        assert names == case.names and set(skipped) == {""}
        assert_close(rows, theirs[layer])
    assert call(*flags, "--out", tmp_path / "mean.npy")[0] == 0
    rows, names, _ = written(tmp_path / "mean.npy")
    assert names == case.names
    assert_close(rows, [x.mean(0, keepdims=True) for x in theirs[3]])
    assert np.abs(theirs[3][0] - theirs[2][0]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_student_and_teacher_differ(kind, tiny):
    assert np.abs(oracle(kind, tiny[kind])[3][0] - oracle(kind, tiny[kind], "teacher")[3][0]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing(kind, tiny, tmp_path):
    case, rows = tiny[kind], {}
    for size in (1, 2, 100):
        out = tmp_path / f"{size}.npy"
        assert call("--init", case.ckpt, case.folder, "--out", out, "--pool", "none", "--batch_size", size)[0] == 0
        rows[size] = written(out)[0]
    assert_close(rows[2], rows[1])
    assert_close(rows[100], rows[1])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(kind, tiny, tmp_path):
    case = tiny[kind]
    assert call("--init", case.ckpt, case.folder, "--out", tmp_path / "x.npy", "--dtype", "bfloat16")[0] == 0
    rows, theirs = written(tmp_path / "x.npy")[0], [x.mean(0, keepdims=True) for x in oracle(kind, case)[3]]
    assert 0 < max(np.abs(a - b).max() for a, b in zip(rows, theirs)) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetuned_model_gives_its_encoders_blocks(kind, tiny, tmp_path):
    case = tiny[kind]
    make = {"vision": Classifier, "speech": Recogniser, "text": SentenceClassifier}[kind]
    model = make(copy.deepcopy(case.student.encoder), 5)
    file = torch.load(case.ckpt) | {"student": model.state_dict(), "teacher": None, "classes": list("abcde"), "goal": "any"}
    torch.save(file, tmp_path / "best.pt")
    assert call("--init", tmp_path / "best.pt", case.folder, "--out", tmp_path / "x.npy", "--pool", "none")[0] == 0
    assert_close(written(tmp_path / "x.npy")[0], oracle(kind, case)[3])
    error = refused(call("--init", tmp_path / "best.pt", case.folder, "--out", tmp_path / "y.npy", "--network", "teacher"))
    assert "no teacher" in error and "--network student" in error


def test_what_the_released_code_computes_comes_out_of_its_files(tmp_path):
    """The golden files' layers of the teacher, and logits of a fine-tuned model from the pooled last layer."""
    golden = torch.load(GOLDEN / "vision.pt", weights_only=True)
    torch.save({"model": golden["model"], "model_ema": golden["ema"]}, tmp_path / "pre.pth")
    pictures = list(golden["input"]["image"])
    for layer, theirs in zip((2, 3), golden["teacher_layers"]):
        encoder, *_ = embed.open_encoder(str(tmp_path / "pre.pth"), "teacher", layer)
        torch.testing.assert_close(torch.stack(embed.features(encoder, pictures)), theirs, rtol=0, atol=1e-5)
    golden = torch.load(GOLDEN / "vision_finetune.pt", weights_only=True)
    torch.save({"model": golden["model"]}, tmp_path / "tuned.pth")
    encoder, *_ = embed.open_encoder(str(tmp_path / "tuned.pth"), "student", None)
    pooled = torch.stack([x.mean(0) for x in embed.features(encoder, list(golden["input"]["image"]))])
    model = golden["model"]
    pooled = nn.functional.layer_norm(pooled, (12,), model["fc_norm.weight"], model["fc_norm.bias"], 1e-6)
    torch.testing.assert_close(pooled @ model["head.weight"].T + model["head.bias"], golden["logits"], rtol=0, atol=1e-5)


def test_a_config_may_lack_keys_and_weights_may_not(tiny, tmp_path):
    case = tiny["speech"]
    file = torch.load(case.ckpt)
    told = {key: file["config"][key] for key in [*SMALL, "channels", "pos_groups", "pos_width", "deep_norm"]}
    torch.save(file | {"config": told}, tmp_path / "less.pt")
    assert call("--init", tmp_path / "less.pt", case.names[0], "--out", tmp_path / "x.npy", "--pool", "none")[0] == 0
    assert_close(written(tmp_path / "x.npy")[0], oracle("speech", case)[3][:1])
    del file["student"]["encoder.blocks.1.fc1.bias"]
    torch.save(file, tmp_path / "lacks.pt")
    assert "blocks.1.fc1.bias" in refused(call("--init", tmp_path / "lacks.pt", case.names[0], "--out", tmp_path / "y.npy"))


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vision", "speech"])
def test_inputs_stay_in_the_order_given(kind, tiny, tmp_path):
    case = tiny[kind]
    theirs = [x.mean(0, keepdims=True) for x in oracle(kind, case)[3]]
    given = [4, 1, 1, 0]
    flags = [*(case.names[i] for i in given), case.folder / "b"]
    assert call("--init", case.ckpt, *flags, "--out", tmp_path / "x.npy", "--batch_size", 3)[0] == 0
    rows, names, _ = written(tmp_path / "x.npy")
    assert names == [case.names[i] for i in [*given, 1, 2, 3]]
    assert_close(rows, [theirs[i] for i in [*given, 1, 2, 3]])


def test_lines_come_from_stdin_too(tiny, tmp_path):
    case = tiny["text"]
    theirs = oracle("text", case)[3]
    lines = "\n".join(reversed(TEXTS)).encode()
    assert call("--init", case.ckpt, "-", f"{case.folder}/b", "--out", tmp_path / "x.npy", "--pool", "none", stdin=lines)[0] == 0
    rows, names, _ = written(tmp_path / "x.npy")
    assert names == ["-:1", "-:2", "-:3", "-:4", *case.names[2:]]
    assert_close(rows, [*reversed(theirs), *theirs[2:]])


def test_a_progress_bar_counts_inputs_with_their_rate(tiny, tmp_path):
    err = call("--init", tiny["vision"].ckpt, tiny["vision"].folder, "--out", tmp_path / "x.npy")[2]
    assert "5/5" in err and "images/s" in err


@pytest.mark.parametrize("kind", ["vision", "speech"])
def test_bad_files_are_named_and_skipped(kind, tiny, tmp_path):
    case, end = tiny[kind], ".png" if kind == "vision" else ".wav"
    folder = tmp_path / "in"
    (folder / "void").mkdir(parents=True)
    whole = Path(case.names[0]).read_bytes()
    contents = {"a": b"", "b": whole, "c": b"what is this?", "d": whole[:30], "e": Path(case.names[1]).read_bytes()}
    for name, content in contents.items():
        (folder / f"{name}{end}").write_bytes(content)
    (folder / f"f{end}").symlink_to(folder / "nowhere")
    (folder / f"g\t\udcff\n{end}").write_bytes(b"")
    flags = [folder, folder / "void", tmp_path / "gone"]
    code, said, err = call("--init", case.ckpt, *flags, "--out", tmp_path / "x.npy", "--pool", "none", "--batch_size", 2)
    assert code == 0 and "Traceback" not in err, err
    rows, names, skipped = written(tmp_path / "x.npy")
    assert names == [f"{folder}/{name}{end}" for name in [*"abcdef", r"g\t\udcff\n"]] + [f"{folder}/void", f"{tmp_path}/gone"]
    assert [i for i, reason in enumerate(skipped) if not reason] == [1, 4]
    assert "empty" in skipped[0] and "No such file" in skipped[5] and end in skipped[7] and "No such file" in skipped[8]
    told = [line for line in said.splitlines() if line.startswith("skipped ")]
    assert told == [f"skipped {name}: {reason}" for name, reason in zip(names, skipped) if reason]
    assert "; 2 " in said and "7 skipped" in said
    assert_close([rows[1], rows[4]], oracle(kind, case)[3][:2])
    code, said, err = call("--init", case.ckpt, folder / f"a{end}", tmp_path / "gone", "--out", tmp_path / "y.npy")
    assert code == 2 and "of 2: " in err.splitlines()[-1] and f"a{end}: empty" in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.glob("y.*"))


def test_bad_lines_are_named_and_skipped(tiny, tmp_path):
    case = tiny["text"]
    long = "x" * 38  # with <s> and </s> exactly what the model has positions for
    lines = [TEXTS[0].encode(), b"", b"\xff\xfe", long.encode(), long.encode() + b"!", b"  ", TEXTS[3].encode()]
    (tmp_path / "in.txt").write_bytes(b"\n".join(lines))
    (tmp_path / "empty.txt").write_bytes(b"")
    flags = [tmp_path / "in.txt", tmp_path / "empty.txt", tiny["vision"].names[0], tmp_path / "gone.txt"]
    code, said, err = call("--init", case.ckpt, *flags, "--out", tmp_path / "x.npy", "--pool", "none")
    assert code == 0 and "Traceback" not in err, err
    rows, names, skipped = written(tmp_path / "x.npy")
    assert names == [f"{tmp_path}/in.txt:{n}" for n in range(1, 8)] + [str(flag) for flag in flags[1:]]
    few = "41 tokens, but the model has positions for 40"
    assert skipped[:8] == ["", "empty", "not UTF-8", "", few, "empty", "", "empty"]
    assert "zero bytes" in skipped[8] and "No such file" in skipped[9]
    assert f"skipped {tmp_path}/in.txt:5: {few}\n" in said and "3 lines, 7 skipped" in said
    assert [len(x) for x in rows] == [9, 0, 0, 40, 0, 0, 25, 0, 0, 0]
    assert_close([rows[0], rows[6]], [oracle("text", case)[3][i] for i in (0, 3)])
    code, _, err = call("--init", case.ckpt, "-", "--out", tmp_path / "y.npy", stdin=b"")
    assert code == 2 and "-: empty" in err.splitlines()[-1] and not list(tmp_path.glob("y.*"))


# ---- the files written, and options --------------------------------------------------------------------------------


def test_nothing_is_overwritten(tiny, tmp_path):
    case = tiny["vision"]
    for name in ("x.npy", "y.tsv"):
        (tmp_path / name).write_text("precious")
        out = tmp_path / Path(name).with_suffix(".npy")
        error = refused(call("--init", case.ckpt, case.folder, "--out", out))
        assert name in error and "remove it" in error and "--out" in error
        assert (tmp_path / name).read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "y.tsv"]


def test_a_run_that_is_stopped_leaves_nothing(tiny, tmp_path, monkeypatch):
    case, calls = tiny["vision"], []

    def features(*args, real=embed.features):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(embed, "features", features)
    assert call("--init", case.ckpt, case.folder, "--out", tmp_path / "new/x.npy", "--batch_size", 2)[0] == 130
    assert list((tmp_path / "new").iterdir()) == []


def test_an_out_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    case = tiny["vision"]
    assert "file" in refused(call("--init", case.ckpt, case.folder, "--out", tmp_path / "file" / "x.npy"))


def test_options_that_cannot_work_are_one_line(tiny, tmp_path):
    case, out = tiny["text"], tmp_path / "x.npy"
    assert ".npy" in refused(call("--init", case.ckpt, case.folder, "--out", tmp_path / "x.npz"))
    assert "--batch_size 0" in refused(call("--init", case.ckpt, case.folder, "--out", out, "--batch_size", 0))
    for layer in (-1, 4):
        error = refused(call("--init", case.ckpt, case.folder, "--out", out, "--layer", layer))
        assert f"--layer {layer}" in error and "to 3" in error
    assert "nowhere.pt" in refused(call("--init", tmp_path / "nowhere.pt", case.folder, "--out", out))
    file = torch.load(case.ckpt)
    torch.save({key: file[key] for key in ("student", "teacher", "config")}, tmp_path / "mute.pt")
    assert "vocabulary" in refused(call("--init", tmp_path / "mute.pt", case.folder, "--out", out))
    torch.save(file | {"config": {"dim": 16}}, tmp_path / "odd.pt")
    assert "max_tokens" in refused(call("--init", tmp_path / "odd.pt", case.folder, "--out", out))
    assert not out.exists()


def test_help_says_what_a_layer_is():
    code, out, _ = call("--help")
    assert code == 0 and "python -m tools.embed --init" in out and "last residual" in out
    assert "0: the embedding with positions" in " ".join(out.split())


def test_what_convert_reads_is_what_counts(tiny, tmp_path, monkeypatch):
    """Hub folders and released files come through convert.read: nothing else is asked of the path."""
    case = tiny["vision"]
    state = json.loads(json.dumps(asdict(case.cfg)))
    monkeypatch.setattr(convert, "read", lambda path: {"student": case.student.state_dict(), "teacher": None, "config": state})
    assert call("--init", "some/hub/folder", case.folder, "--out", tmp_path / "x.npy", "--pool", "none")[0] == 0
    assert_close(written(tmp_path / "x.npy")[0], oracle("vision", case)[3])

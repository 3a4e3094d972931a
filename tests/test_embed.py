"""tools/embed.py, from tiny released checkpoints, against the model called by hand on each input alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn as nn
from PIL import Image

from data import images
from model import Teacher
from tests import checkpoints
from tests.helpers import call, done, refused
from tools import convert, embed, hub

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["vision", "speech", "text"]
TASKS = {"vision": "images", "speech": "letters", "text": "sentences"}
ENDS = {"vision": ".png", "speech": ".wav"}
STEMS = ["a", "b/a", "b/d", "b/e", "c"]
TEXTS = ["2+2=4", "(1+2)*3=9,7-5=2", "8", "11/2=5.5"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """{kind: .ckpt, a path; its .state, .student, .teacher; .folder of inputs; .names of these, in order}."""
    root, rng, cases = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0), {}
    checkpoints.write_gpt2_files(root, size=40)
    for kind in KINDS:
        case = cases[kind] = SimpleNamespace(ckpt=root / f"{kind}.pt", folder=root / kind)
        torch.save(checkpoints.released(kind), case.ckpt)
        case.state = convert.read(case.ckpt)
        case.student = checkpoints.model_of(case.state)
        case.teacher = Teacher(case.student.encoder)
        convert.load_encoder(case.teacher, case.state, case.ckpt, "teacher")
        (case.folder / "b").mkdir(parents=True)
        (case.folder / "b" / "other.md").write_text("no input")
        (case.folder / "b" / ".hidden.txt").write_text("no input")
        case.names = [f"{case.folder}/{stem}{ENDS.get(kind)}" for stem in STEMS]
    for i, (image, wave) in enumerate(zip(cases["vision"].names, cases["speech"].names)):
        pixels = rng.integers(256, size=(30 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        soundfile.write(wave, rng.normal(size=(4000, 900, 7000, 410, 4010)[i]) / 9, 16_000)
    case = cases["text"]
    (case.folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TEXTS[:2]).encode())
    (case.folder / "b/a.txt").write_text("\n".join(TEXTS[2:]) + "\n")
    case.names = [f"{case.folder}/{name}" for name in ("a.txt:1", "a.txt:2", "b/a.txt:1", "b/a.txt:2")]
    return cases


def alone(kind, case, i):
    """What the model takes for input i, in a batch of one."""
    if kind == "vision":
        x = torch.from_numpy(np.array(images.center_crop(Image.open(case.names[i]), 24))) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return ((x - mean) / std).permute(2, 0, 1)[None]
    if kind == "speech":
        x = torch.from_numpy(soundfile.read(case.names[i], dtype="float32")[0])
        return nn.functional.layer_norm(x, x.shape)[None]
    return torch.tensor([[0, *(byte - 0x21 + 4 for byte in TEXTS[i].encode()), 2]])


@torch.no_grad()
def expected(kind, case, network="student"):
    """[layer][input]: (T, D), by hooks on the blocks of the whole model; 0: what enters the first block."""
    encoder = getattr(case, network).encoder
    layers = [[] for _ in range(4)]
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda _, given: layers[0].append(given[0]))]
    for l, block in enumerate(encoder.blocks, start=1):
        hooks.append(block.register_forward_hook(lambda _, given, out, l=l: layers[l].append(out[0])))
    for i in range(len(case.names)):
        encoder(alone(kind, case, i))
    for hook in hooks:
        hook.remove()
    return [[x[0, encoder.prefix :].numpy() for x in layer] for layer in layers]


def run(out, *flags):
    """The command, on the CPU -> what it prints, rows of each input, names, reasons."""
    printed = done(call(embed, "--init", *flags, "--out", out, "--device", "cpu"))
    x, (head, *lines) = np.load(out), out.with_suffix(".tsv").read_text().splitlines()
    assert head == "first\tend\tinput\tskipped" and x.dtype == np.float32 and x.ndim == 2
    first, end, names, reasons = zip(*(line.split("\t") for line in lines))
    assert [0, *map(int, end)] == [*map(int, first), len(x)]  # each row belongs to one input
    return printed, [x[int(a) : int(b)] for a, b in zip(first, end)], list(names), reasons


def assert_close(ours, theirs, atol=1e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and np.abs(a - b).max() <= atol * max(1, np.abs(b).max())


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_what_the_block_gives_for_the_input_alone(kind, network, tiny, tmp_path):
    case, layers = tiny[kind], expected(kind, tiny[kind], network)
    flags = [case.ckpt, case.folder, "--network", network]
    for layer in range(4):
        more = ["--pool", "none", "--layer", layer]
        printed, rows, names, reasons = run(tmp_path / f"{layer}.npy", *flags, *more)
        assert names == case.names and set(reasons) == {""}
        assert f"layer {layer}, {len(names)} inputs, 0 skipped" in printed
        assert_close(rows, layers[layer])
    means = [x.mean(0, keepdims=True) for x in layers[3]]
    assert_close(run(tmp_path / "mean.npy", *flags)[1], means)
    rough = run(tmp_path / "rough.npy", *flags, "--dtype", "bfloat16")[1]
    assert_close(rough, means, atol=0.1)
    assert any((a != b).any() for a, b in zip(rough, means))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tuned_model_and_its_folder_of_transformers_give_the_encoders_blocks(kind, tiny, tmp_path):
    case, before = tiny[kind], expected(kind, tiny[kind])[3]
    model = checkpoints.HEADS[kind](checkpoints.build(case.state).encoder, 5)
    convert.load_encoder(model, case.state, case.ckpt)
    task = {"student": model.state_dict(), "teacher": None, "classes": list("abcde"), "task": TASKS[kind]}
    torch.save(case.state | task, tmp_path / "best.pt")
    assert_close(run(tmp_path / "x.npy", tmp_path / "best.pt", case.folder, "--pool", "none")[1], before)
    flags = ["--init", tmp_path / "best.pt", case.folder, "--network", "teacher"]
    assert "teacher" in refused(call(embed, *flags, "--out", tmp_path / "y.npy"))
    pytest.importorskip("safetensors")
    hub.write(convert.read(tmp_path / "best.pt"), tmp_path / "hub")
    assert_close(run(tmp_path / "z.npy", tmp_path / "hub", case.folder, "--pool", "none")[1], before)


@pytest.mark.parametrize("kind", ["vision", "speech"])
def test_order_and_broken_files(kind, tiny, tmp_path):
    case, broken = tiny[kind], [tmp_path / name for name in ("a", "b\udcff", "none", "gone")]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(b"what is this?")
    broken[2].mkdir()
    given = [case.names[4], *broken[:2], case.names[1], case.names[1], *broken[2:], case.folder / "b"]
    printed, rows, names, reasons = run(tmp_path / "x.npy", case.ckpt, *given)
    assert names[:3] == [case.names[4], f"{tmp_path}/a", rf"{tmp_path}/b\udcff"]
    assert names[3:] == [*map(str, given[3:7]), *case.names[1:4]]
    assert [i for i, reason in enumerate(reasons) if reason] == [1, 2, 5, 6]
    assert "Is a directory" in reasons[5] and "No such file" in reasons[6]
    skipped = [f"skipped {name}: {reason}" for name, reason in zip(names, reasons) if reason]
    assert printed.splitlines()[:-1] == skipped and "10 inputs, 4 skipped" in printed
    means = [x.mean(0, keepdims=True) for x in expected(kind, case)[3]]
    assert_close([x for x in rows if len(x)], [means[i] for i in (4, 1, 1, 1, 2, 3)])
    code, _, err = call(embed, "--init", case.ckpt, *broken, "--out", tmp_path / "y.npy")
    assert code == 2 and "no input can be used" in err and not list(tmp_path.glob("y.*"))


def test_broken_lines(tiny, tmp_path):
    long = b"8" * 22  # with <s> and </s> exactly what the model has positions for
    lines = [TEXTS[0].encode(), b"", b"\xff\xfe", long, long + b"!", b"  ", TEXTS[3].encode()]
    (tmp_path / "in.txt").write_bytes(b"\n".join(lines))
    flags = [tiny["text"].ckpt, tmp_path / "in.txt", "--pool", "none"]
    _, rows, names, reasons = run(tmp_path / "x.npy", *flags)
    assert names == [f"{tmp_path}/in.txt:{n}" for n in range(1, 8)]
    assert [len(x) for x in rows] == [7, 0, 0, 24, 0, 0, 10] and "over 24 tokens" in reasons[4]
    assert_close([rows[0], rows[6]], [expected("text", tiny["text"])[3][i] for i in (0, 3)])


def test_wrong_options_are_one_line(tiny, tmp_path):
    ckpt, folder, out = tiny["text"].ckpt, tiny["text"].folder, tmp_path / "x.npy"
    (tmp_path / "old.npy").write_text("precious")
    torch.save(checkpoints.released("text"), tmp_path / "mute.pt")
    for path in ("old.npy", "x.npz", "nowhere/x.npy"):
        assert path in refused(call(embed, "--init", ckpt, folder, "--out", tmp_path / path), silent=True)
    assert "0 .. 3" in refused(call(embed, "--init", ckpt, folder, "--out", out, "--layer", 4))
    assert "gone.pt" in refused(call(embed, "--init", tmp_path / "gone.pt", folder, "--out", out))
    assert "gone.txt" in refused(call(embed, "--init", ckpt, tmp_path / "gone.txt", "--out", out))
    assert "vocabulary" in refused(call(embed, "--init", tmp_path / "mute.pt", folder, "--out", out))
    assert [path.name for path in tmp_path.glob("*.npy")] == ["old.npy"]


def test_long_recordings_and_names_that_would_break_the_table(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).normal(size=70 * 16_000) / 9
    soundfile.write(tmp_path / "in/new\nline\t.wav", noise, 16_000)
    flags = [tiny["speech"].ckpt, tmp_path / "in", "--pool", "none"]
    _, (x,), names, _ = run(tmp_path / "x.npy", *flags)
    assert names == [rf"{tmp_path}/in/new\nline\t.wav"]
    wave = torch.from_numpy(soundfile.read(tmp_path / "in/new\nline\t.wav", dtype="float32")[0])
    with torch.no_grad():
        whole = tiny["speech"].student.encoder(nn.functional.layer_norm(wave, wave.shape)[None])[0][0].numpy()
    assert x.shape == whole.shape == (3499, 12) and np.abs(x - whole).mean() < 0.1 * np.abs(whole).mean()

"""tools/draw.py on tiny finished runs: the pictures, and the numbers behind them, computed by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import RUNS, assert_same, call, checkpoint, done, refused
from tools import draw, embed

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("matplotlib", reason="requirements-dev.txt")
KINDS, LINE = [*RUNS], "abc def $gab$ ha bed fed."


@pytest.fixture
def inputs(data):
    images, waves = (
        sorted((data / "vision/val").rglob("*.png")),
        sorted((data / "speech/dev").rglob("*.flac")),
    )
    return {"vision": images[:2], "speech": waves[:1], "text": [LINE, data / "text.txt"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_has_content_and_is_the_same_each_time(kind, finished, inputs, tmp_path):
    flags = [finished[kind] / "ckpt.pt", *inputs[kind.rstrip("2")], "--beside", "random", "--out"]
    for end in ("svg", "png"):
        one, other = tmp_path / f"one.{end}", tmp_path / f"other.{end}"
        assert "one" in done(call(draw, *flags, one)) and "other" in done(call(draw, *flags, other))
        assert one.read_bytes() == other.read_bytes()
    assert len(Image.open(one).convert("RGB").getcolors(2**24)) > (20 if "text" in kind else 200)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_mask_cosines_and_features_are_those_of_training(kind, finished, inputs):
    state, network = checkpoint(finished[kind]), embed.open_both(str(finished[kind] / "ckpt.pt"))
    both = [network.student.state_dict(), network.teacher.state_dict()]
    assert_same(both, [state["student"], state["teacher"]])
    row = draw.prepare(network, str(inputs[kind.rstrip("2")][0]), np.random.default_rng(5))
    one, _ = draw.look(network, [row, row])
    cfg, words, x = RUNS[kind].Config(**state["config"]), network.words, row.x
    given = {"vision": [], "speech": [torch.tensor([x.shape[1]])], "text": [words, x[0].numpy()]}
    drawn = RUNS[kind].draw_mask(cfg, *given[kind.rstrip("2")], np.random.default_rng(5))
    seen, mask = drawn if "text" in kind else (x[0], drawn)
    mask = mask.view(-1, mask.shape[-1])[0]  # 2.0: the first of three
    seen = seen.masked_fill(mask, words.mask) if kind == "text2" else seen
    assert torch.equal(row.mask[0], mask) and torch.equal(row.seen[0], seen) and 0 < mask.sum() < len(mask)
    over, layers = int(cfg.norm != "instance"), [a[0].double() for a in network.teacher(x)[-cfg.top_k :]]
    y = sum((a - a.mean(over, True)) / (a.var(over, False, True) + 1e-5).sqrt() for a in layers) / cfg.top_k
    if cfg.final_norm == "layer":
        y = (y - y.mean(1, True)) / (y.var(1, False, True) + 1e-5).sqrt()
    f = network.student(seen[None], mask[None])[0].double()
    cosines = [float(p @ t / (p.norm() * t.norm())) for p, t in zip(f, y[mask])]
    assert one.cosine[mask].tolist() == pytest.approx(cosines, abs=1e-4) and one.cosine[~mask].isnan().all()
    torch.testing.assert_close(one.y.double(), y, atol=1e-4, rtol=1e-4)
    assert one.rgb.shape == (2, len(mask), 3) and one.rgb.std() > 0.1 and not torch.equal(one.own, one.y)
    if kind.endswith("2"):
        assert len(one.own) == (~mask).sum() and (one.rgb[0, mask] == draw.GREY).all()


def test_a_prediction_that_is_its_target_finds_its_own_token(finished, tmp_path, monkeypatch):
    network = embed.open_both(str(finished["text"] / "ckpt.pt"))
    row = draw.prepare(network, LINE, np.random.default_rng([0, 0]))
    (one,) = draw.look(network, [row])
    one.f = one.y[row.mask[0]]
    monkeypatch.setattr(draw, "look", lambda *_: [one])
    done(call(draw, finished["text"] / "ckpt.pt", LINE, "--out", tmp_path / "a.svg"))
    said = " ".join((tmp_path / "a.svg").read_text().split())
    names = {i: str(piece)[2:-1].replace(" ", "·") for piece, i in network.words.pieces.items()}
    names[network.words.mask] = "&lt;mask&gt;"
    for token, seen, cosine in zip(row.x[row.mask], row.seen[row.mask], one.cosine[row.mask[0]]):
        assert f"{names[int(token)]} {names[int(seen)]} {cosine:.2f} {names[int(token)]} " in said


def test_wrong_input_is_one_line(finished, inputs, tmp_path):
    vision, words, image = finished["vision"] / "ckpt.pt", finished["text"] / "ckpt.pt", inputs["vision"][0]
    tuned = tmp_path / "tuned.pt"
    torch.save(checkpoint(finished["text"]) | {"teacher": None}, tuned)
    cases = [("gone.png", vision, "gone.png"), ("text.t", vision, "text.txt"), ("tuned.pt", tuned, LINE)]
    cases += [("no text", words, " "), ("x.gif", vision, image), ("non-neg", vision, image, "--seed", "-1")]
    for said, *flags in [*cases, ("--beside", vision, image, "--beside", words)]:
        assert said in refused(call(draw, *flags, "--out", tmp_path / "x.gif"), silent=True)

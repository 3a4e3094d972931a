"""data/images.py: decoding, folders, the made set, transforms, sampling, and the commands (against a local server)."""
import functools
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import BadInput  # noqa: E402
from data import images as I  # noqa: E402, E741

SHARED = ROOT.parent / "shared" / "data" / "images"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared data not there")
RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(img):
    return np.asarray(img).astype(int)


def picture(h=24, w=32, seed=0):
    """A smooth colour picture, so that JPEG and resizing stay close to it."""
    a, b, c = np.random.default_rng(seed).uniform(0.05, 0.25, 3)
    y, x = np.mgrid[:h, :w]
    planes = np.stack([127 + 120 * np.sin(a * x), 127 + 120 * np.cos(b * y), 120 + 120 * np.sin(a * y - b * x)], -1)
    return Image.fromarray(planes.astype("u1"))


def folder(root, files, seed=0):
    """Write small pictures to root/<name> for each name."""
    for i, name in enumerate(files):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, seed + i).save(path, "PNG")
    return root


# ----------------------------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp", "a.JPG"])
def test_rgb_formats(tmp_path, name):
    options = {"a.webp": {"lossless": True}, "a.JPG": {"quality": 95}}
    picture().save(tmp_path / name, **options.get(name, {}))
    img = I.load_image(tmp_path / name)
    assert img.mode == "RGB" and img.size == (32, 24)
    assert np.abs(pixels(img) - pixels(picture())).max() <= (25 if "JPG" in name else 0)


def test_greys_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    expected = np.repeat(np.rint(ramp / 257)[..., None], 3, -1)
    Image.fromarray(ramp.astype("u2")).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype("u2")).save(tmp_path / "16.tif")
    Image.fromarray(ramp.astype("i4")).save(tmp_path / "I.tif")
    Image.fromarray((ramp / 65535).astype("f4")).save(tmp_path / "F.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("16.png", "16.tif", "I.tif", "F.tif", "16.pgm"):
        assert np.abs(pixels(I.load_image(tmp_path / name)) - expected).max() <= 1, name
    Image.fromarray((ramp / 2).astype("u2")).save(tmp_path / "dark.png")         # within 16 bits: dark stays dark
    assert np.abs(pixels(I.load_image(tmp_path / "dark.png")) - expected / 2).max() <= 1
    Image.fromarray((ramp * 1000 - 5).astype("i4")).save(tmp_path / "wide.tif")  # beyond 16 bits: stretched
    assert np.abs(pixels(I.load_image(tmp_path / "wide.tif")) - expected).max() <= 1
    Image.fromarray(np.full((4, 4), np.nan, "f4")).save(tmp_path / "nan.tif")
    assert pixels(I.load_image(tmp_path / "nan.tif")).max() == 0
    Image.fromarray(np.arange(256, dtype="u1").reshape(16, 16)).save(tmp_path / "8.png")
    assert (pixels(I.load_image(tmp_path / "8.png"))[..., 0].ravel() == np.arange(256)).all()
    bits = np.eye(9, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "1.png")
    assert (pixels(I.load_image(tmp_path / "1.png"))[..., 2] == 255 * bits).all()


def test_transparency_becomes_white(tmp_path):
    alpha = np.array([[0, 255], [128, 255]], "u1")
    rgba = np.concatenate([np.broadcast_to(np.array(BLUE, "u1"), (2, 2, 3)), alpha[..., None]], -1)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    out = pixels(I.load_image(tmp_path / "rgba.png"))
    assert (out[0, 0] == 255).all() and (out[0, 1] == BLUE).all()
    assert abs(out[1, 0, 0] - 127) <= 1 and out[1, 0, 2] == 255
    Image.fromarray(np.stack([np.zeros((2, 2), "u1"), alpha], -1)).save(tmp_path / "la.png")
    assert (pixels(I.load_image(tmp_path / "la.png"))[..., 0] == [[255, 0], [127, 0]]).all()
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], "u1")).convert("P")
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "p.png")
    assert (pixels(I.load_image(tmp_path / "p.png")) == [[RED, BLUE], [BLUE, RED]]).all()
    palette.save(tmp_path / "pt.png", transparency=0)                        # colour 0 is clear
    palette.save(tmp_path / "pb.png", transparency=bytes([0, 255]))          # the same as alpha bytes
    palette.save(tmp_path / "pt.gif", transparency=0)
    for name in ("pt.png", "pb.png", "pt.gif"):
        assert (pixels(I.load_image(tmp_path / name)) == [[[255] * 3, BLUE], [BLUE, [255] * 3]]).all(), name
    Image.new("RGB", (3, 3), RED).save(tmp_path / "key.png", transparency=RED)  # a colour key
    assert (pixels(I.load_image(tmp_path / "key.png")) == 255).all()


def test_cmyk_and_animation(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    for name in ("cmyk.jpg", "cmyk.tif"):
        assert np.abs(pixels(I.load_image(tmp_path / name)) - RED).max() <= 3
    frames = [Image.new("RGB", (5, 5), c) for c in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(I.load_image(tmp_path / "a.gif")) == RED).all()


@pytest.mark.parametrize("ext", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 60000])
def test_exif_orientation(tmp_path, ext, orientation):
    """Corner colours tell the turn: the stored top left corner must show where EXIF says."""
    stored = Image.new("RGB", (32, 16), "white")
    stored.paste(RED, (0, 0, 8, 8))
    stored.paste(BLUE, (24, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{ext}", exif=exif, **({"quality": 95} if ext in ("jpg", "webp") else {}))
    out = pixels(I.load_image(tmp_path / f"a.{ext}"))
    # where (row, column) the stored top left and top right corners must be: EXIF 2.3, tag 0x0112
    red, blue = {2: ("tr", "tl"), 3: ("br", "bl"), 4: ("bl", "br"), 5: ("tl", "bl"), 6: ("tr", "br"), 7: ("br", "tr"),
                 8: ("bl", "tl")}.get(orientation, ("tl", "tr"))
    at = {"tl": out[2, 2], "tr": out[2, -3], "bl": out[-3, 2], "br": out[-3, -3]}
    assert out.shape == ((32, 16, 3) if orientation in (5, 6, 7, 8) else (16, 32, 3))
    assert np.abs(at[red] - RED).max() < 40 and np.abs(at[blue] - BLUE).max() < 40


def test_damaged_exif_survives(tmp_path):
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert I.load_image(tmp_path / "a.jpg").size == (32, 24)


def damaged_files(root):
    """Every way of being broken that the wild has shown, as files."""
    picture(64, 64).save(root / "good.jpg")
    picture(64, 64).save(root / "good.png")
    jpg, png = (root / "good.jpg").read_bytes(), (root / "good.png").read_bytes()
    files = {"empty.jpg": b"", "text.jpg": b"not a picture", "cut.jpg": jpg[:len(jpg) // 2], "head.jpg": jpg[:30],
             "cut.png": png[:len(png) // 2], "crc.png": png[:60] + bytes(8) + png[68:], "head.png": png[:20],
             "html.png": b"<!DOCTYPE html><html>429</html>", "sig.png": b"\x89PNG\r\n\x1a\n", "gif.gif": b"GIF89a\1\0",
             "tif.tif": b"II*\0\x08\0\0\0\xff\xff" + bytes(40), "bmp.bmp": b"BM" + bytes(20), "ppm.ppm": b"P6 a b c",
             "webp.webp": b"RIFF\x10\0\0\0WEBPVP8 xxxx"}
    for name, content in files.items():
        (root / name).write_bytes(content)
    (root / "dir.jpg").mkdir()
    return [*files, "dir.jpg", "missing.jpg"]


def test_damaged_files_raise_one_kind(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in damaged_files(tmp_path):
            with pytest.raises(I.BadImage) as error:
                I.load_image(tmp_path / name)
            assert str(error.value) and "\n" not in str(error.value) and str(tmp_path) not in str(error.value), name


def test_random_damage_raises_one_kind(tmp_path):
    """Flipped bytes anywhere: a picture or BadImage, never anything else."""
    rng = np.random.default_rng(0)
    bad = 0
    for ext, mode in zip("jpg png png gif tif bmp webp".split(), "RGB RGB P P RGB RGB RGB".split()):
        picture(20, 20).convert(mode).save(tmp_path / f"a.{ext}")
        whole = (tmp_path / f"a.{ext}").read_bytes()
        for _ in range(40):
            content = bytearray(whole)
            for _ in range(4):
                content[rng.integers(len(content) if rng.random() < 0.5 else 60)] = rng.integers(256)
            (tmp_path / f"b.{ext}").write_bytes(content)
            try:
                assert I.load_image(tmp_path / f"b.{ext}").mode == "RGB"
            except I.BadImage:
                bad += 1
    assert bad > 40


@pytest.mark.parametrize("limit", [300, 100])                # Pillow warns above the limit and raises above twice of it
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    picture(20, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(I.BadImage, match="Decompression"):
        I.load_image(tmp_path / "a.png")


def test_draft_keeps_enough_pixels(tmp_path):
    picture(400, 600).save(tmp_path / "a.jpg", quality=95)
    assert I.load_image(tmp_path / "a.jpg").size == (600, 400)
    half = I.load_image(tmp_path / "a.jpg", draft=150)
    assert half.size == (300, 200)
    assert np.abs(pixels(half) - pixels(picture(400, 600).resize((300, 200), Image.BOX))).mean() < 4
    assert I.load_image(tmp_path / "a.jpg", draft=1000).size == (600, 400)


# ------------------------------------------------------------------------------------------------------------ folders

def test_open_folder(tmp_path):
    folder(tmp_path, ["train/dog/b.png", "train/dog/deep/er/a.PNG", "train/cat/x.jpeg", "train/.hid/x.png",
                      "train/cat/.y.png", "train/loose.png", "train/dog/deep/looks.like.a.jpg/c.png",
                      "val/dog/1.png", "val/cat/2.TIF", "val/emu/3.webp", "val/4.gif"])
    (tmp_path / "train/cat/notes.txt").write_text("x")
    (tmp_path / "train/void").mkdir()
    train, val = I.open_folder(tmp_path)
    assert train.classes == val.classes == ["cat", "dog"]
    assert [(Path(n).relative_to(tmp_path).as_posix(), k) for n, k in zip(train.names, train.labels)] == [
        ("train/cat/x.jpeg", 0), ("train/dog/b.png", 1), ("train/dog/deep/er/a.PNG", 1),
        ("train/dog/deep/looks.like.a.jpg/c.png", 1), ("train/loose.png", -1)]
    labels = {Path(n).name: k for n, k in zip(val.names, val.labels)}
    assert labels == {"1.png": 1, "2.TIF": 0, "3.webp": -1, "4.gif": -1}
    assert len(train) == 5 and train.load(1).size == (8, 8)


def test_open_folder_follows_links(tmp_path):
    folder(tmp_path / "store", ["a.png", "b.png"])
    (tmp_path / "root/train/one").mkdir(parents=True)
    os.symlink(tmp_path / "store", tmp_path / "root/train/two")
    os.symlink(tmp_path / "store/a.png", tmp_path / "root/train/one/l.png")
    train, val = I.open_folder(tmp_path / "root")
    assert train.classes == ["one", "two"] and len(train) + len(val) == 3


@pytest.mark.parametrize("n", [2, 20, 21, 45])
def test_open_folder_without_val(tmp_path, n):
    folder(tmp_path, [f"train/{i:03d}.png" for i in range(n)])
    train, val = I.open_folder(tmp_path)
    assert len(val) == -(-n // 20) and len(train) == n - len(val) and not set(train.names) & set(val.names)
    assert val.names == sorted(train.names + val.names)[::20] and train.names == sorted(train.names)
    assert train.classes == [""] and set(train.labels + val.labels) == {0}


def test_open_folder_bad_input(tmp_path):
    cases = {"absent": [], "a": ["a/x/1.png"], "b": ["b/train/x/notes.txt"], "c": ["c/train/x/1.png"],
             "d": ["d/train/x/1.png", "d/val/x/notes.txt"]}
    for root, files in cases.items():
        folder(tmp_path, files)
        with pytest.raises(BadInput) as error:
            I.open_folder(tmp_path / root)
        assert str(tmp_path / root) in str(error.value) and "\n" not in str(error.value)


def test_scanning_is_fast(tmp_path):
    for k in range(10):
        (tmp_path / f"train/c{k}").mkdir(parents=True)
        for i in range(1000):
            open(tmp_path / f"train/c{k}/{i}.JPEG", "w").close()
    start = time.perf_counter()
    train, val = I.open_folder(tmp_path)
    assert len(train) + len(val) == 10000 and time.perf_counter() - start < 1.5  # about 0.03 s on a free core


# ------------------------------------------------------------------------------------------------------- the made set

@functools.lru_cache(maxsize=1)
def made():
    start = time.perf_counter()
    return *I.made_images(), time.perf_counter() - start


def test_made_images():
    train, val, seconds = made()
    assert seconds < 8                                                # about 0.7 s on a free core
    assert (len(train), len(val), len(train.classes)) == (4000, 1000, 10) and train.classes == sorted(train.classes)
    assert train.load(0).mode == "RGB" and train.load(0).size == (32, 32) and type(train.labels[0]) is int
    assert np.bincount(train.labels).tolist() == [400] * 10 and np.bincount(val.labels).tolist() == [100] * 10
    again, _ = I.made_images(n_train=200, n_val=0)
    other, _ = I.made_images(seed=1, n_train=200, n_val=0)
    same, _ = I.made_images(n_train=200, n_val=0)
    assert (again.pixels == same.pixels).all() and again.labels == same.labels and (again.pixels != other.pixels).any()
    assert len({x.tobytes() for x in [*train.pixels, *val.pixels]}) == 5000                 # no val picture is in train
    one, two = I.made_images(n_train=100, n_val=100)                                        # even if they look alike
    assert one.labels != two.labels and not {x.tobytes() for x in one.pixels} & {x.tobytes() for x in two.pixels}
    assert one.labels != sorted(one.labels)
    assert I.made_images(n_train=3, n_val=1, size=64)[0].load(2).size == (64, 64)


def test_made_classes_need_more_than_colour():
    """A linear classifier on mean colour and contrast stays near chance (0.1); templates of the letters do not."""
    train, val, _ = made()
    x, y = (s.pixels.astype(np.float32) / 255 for s in (train, val))
    y_label = np.array(val.labels)

    def accuracy(f):
        a, b = (np.c_[f(z), np.ones(len(z))] for z in (x, y))
        w = np.linalg.lstsq(a, np.eye(10)[train.labels], rcond=None)[0]
        return ((b @ w).argmax(1) == y_label).mean()

    assert accuracy(lambda z: z.mean((1, 2))) < 0.16
    assert accuracy(lambda z: np.c_[z.mean((1, 2)), z.std((1, 2))]) < 0.18
    assert accuracy(lambda z: z[:, ::2, ::2].reshape(len(z), -1)) < 0.35
    # learnable all the same: seen against the border's colour, the letters of one class are alike
    ink = [np.abs(z - np.median(z, (1, 2), keepdims=True)).sum(-1).reshape(len(z), -1) for z in (x, y)]
    ink = [z - z.mean(1, keepdims=True) for z in ink]
    means = np.stack([ink[0][np.array(train.labels) == k].mean(0) for k in range(10)])
    means = (means - means.mean(0)) / np.linalg.norm(means - means.mean(0), axis=1, keepdims=True)
    assert ((ink[1] @ means.T).argmax(1) == y_label).mean() > 0.3


def test_made_pictures_continue():
    """Context predicts: a pixel resembles its neighbour far more than a pixel elsewhere in the picture."""
    x = made()[0].pixels.astype(int)
    near, far = np.abs(x[:, :, 1:] - x[:, :, :-1]).mean(), np.abs(x - x[:, ::-1, ::-1]).mean()
    assert near < far / 2


# --------------------------------------------------------------------------------------------------------- transforms

def test_random_resized_crop_statistics():
    """The boxes that are asked for: area share, aspect and place are distributed as the recipe says."""
    class Spy:
        size = (600, 500)

        def resize(self, size, resample, box):
            assert size == (7, 7) and resample == Image.BICUBIC
            return box

    class Wide(Spy):
        def resize(self, size, resample, box):
            assert size == (80, 20)                               # we say (height, width), Pillow (width, height)
            return box

    rng = np.random.default_rng(0)
    boxes = np.array([I.random_resized_crop(Spy(), 7, (0.2, 1), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / 300000, w / h
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 600 and boxes[:, 3].max() <= 500
    assert 0.199 < area.min() < 0.21 and 0.95 < area.max() <= 1
    assert 0.745 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
    small = area < 0.4                                            # here no draw is rejected: uniform and log-uniform
    assert abs(np.histogram(area[small], 4, (0.2, 0.4))[0] / small.sum() - 0.25).max() < 0.04
    assert abs(np.median(aspect[small]) - 1) < 0.02
    assert boxes[:, 0].min() < 10 and boxes[:, 2].max() > 590 and abs((boxes[:, 0] + boxes[:, 2]).mean() / 2 - 300) < 5
    wide = np.array([I.random_resized_crop(Wide(), (20, 80), (0.2, 0.3), (1, 1), rng) for _ in range(10)])
    assert np.abs((wide[:, 2] - wide[:, 0]) / (wide[:, 3] - wide[:, 1]) - 4).max() < 0.03


def test_random_resized_crop_pixels():
    rng = np.random.default_rng(0)
    img = picture(40, 40)
    assert (pixels(I.random_resized_crop(img, 40, (1, 1), (1, 1), rng)) == pixels(img)).all()
    strip = Image.new("RGB", (1000, 10), BLUE)
    strip.paste(RED, (493, 0, 507, 10))
    out = pixels(I.random_resized_crop(strip, 16, (0.9, 1), (3 / 4, 4 / 3), rng))  # nothing fits: the middle, 4:3
    assert out.shape == (16, 16, 3) and np.abs(out - RED).mean() < 2
    assert I.random_resized_crop(Image.new("RGB", (1, 1)), 8, (0.2, 1), (3 / 4, 4 / 3), rng).size == (8, 8)


def test_center_crop():
    img = picture(32, 32)
    assert I.center_crop(img, 32) is img
    big = picture(100, 160)
    reference = big.resize((round(160 * 0.64), 64), Image.BICUBIC)       # shorter side to 56 / 0.875 = 64, then cut
    left = (reference.width - 56) // 2
    out = pixels(I.center_crop(big, 56))
    assert out.shape == (56, 56, 3)
    assert np.abs(out - pixels(reference.crop((left, 4, left + 56, 60)))).mean() < 1.5
    for size in ((1, 1), (5, 300), (32, 31)):
        assert I.center_crop(Image.new("RGB", size, RED), 32).size == (32, 32)
        assert I.center_crop(Image.new("RGB", size, RED), (16, 48)).size == (48, 16)
    assert I.center_crop(img, [32, 32]) is img


def test_color_jitter():
    img = picture(16, 16)
    assert (pixels(I.color_jitter(img, 0, np.random.default_rng(0))) == pixels(img)).all()
    same = I.color_jitter(img, 0.4, np.random.default_rng(3)), I.color_jitter(img, 0.4, np.random.default_rng(3))
    assert (pixels(same[0]) == pixels(same[1])).all() and (pixels(same[0]) != pixels(img)).any()
    grey = Image.new("RGB", (4, 4), (100, 100, 100))        # contrast and saturation leave an even grey alone
    rng = np.random.default_rng(0)
    values = np.array([pixels(I.color_jitter(grey, 0.4, rng))[0, 0, 0] for _ in range(2000)])
    assert 59 <= values.min() <= 63 and 137 <= values.max() <= 141 and abs(values.mean() - 100) < 2
    assert abs(np.histogram(values, 4, (60, 140))[0] / 2000 - 0.25).max() < 0.05
    assert pixels(I.color_jitter(img, 2.5, rng)).shape == (16, 16, 3)


def test_color_jitter_is_image_enhance(monkeypatch):
    """Each step against Pillow's ImageEnhance, the definition of the recipe."""
    from PIL import ImageEnhance
    img = picture(16, 16)

    class Fixed:
        def __init__(self, kinds, factor):
            self.kinds, self.factor = kinds, factor

        def permutation(self, n):
            return self.kinds

        def uniform(self, low, high):
            assert (low, high) == pytest.approx((0.6, 1.4))
            return self.factor

    for kind, enhance in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        for factor in (0.6, 1.3):
            out = I.color_jitter(img, 0.4, Fixed([kind], factor))
            assert np.abs(pixels(out) - pixels(enhance(img).enhance(factor))).max() <= 1


def test_rand_augment():
    img = picture(32, 32)
    rng = np.random.default_rng(0)
    outs = [pixels(I.rand_augment(img, 2, 9, 0.5, rng)) for _ in range(600)]
    unchanged = np.mean([(o == pixels(img)).all() for o in outs])
    assert 0.2 < unchanged < 0.36                           # two ops, each skipped half of the time: 1/4, and a bit
    assert all(o.shape == (32, 32, 3) for o in outs) and len({o.tobytes() for o in outs}) > 200
    a, b = (pixels(I.rand_augment(img, 3, 9, 0.5, np.random.default_rng(8))) for _ in range(2))
    assert (a == b).all()
    assert len(I.RAND_AUGMENT) == 15
    noise = Image.fromarray(np.random.default_rng(0).integers(64, 192, (32, 32, 3), dtype=np.uint8))

    def change(op, m):
        return np.abs(pixels(op(noise, m)) - pixels(noise)).mean()

    for k, op in enumerate(I.RAND_AUGMENT[3:]):             # three have no magnitude; the others grow with it,
        assert change(op, 0.3) > 0 and change(op, -0.9) > 0, k
        assert change(op, 0.9) > change(op, 0.3) or k >= 10, k  # except that shifted noise is noise
        assert change(op, 0) == 0 or k == 1, k              # posterize at 0 keeps 4 bits, as in the recipe's code
    right = pixels(I.move(img, right=0.25))
    assert (right[:, 8:] == pixels(img)[:, :-8]).all() and (right[:, :8] == I.GREY).all()
    down = pixels(I.move(img, down=-0.25))
    assert (down[:-8] == pixels(img)[8:]).all()
    dot = Image.new("RGB", (33, 33))
    dot.putpixel((16, 16), (255, 255, 255))                 # shears leave the middle where it is
    assert all(pixels(I.move(dot, **{k: 0.3}))[16, 16, 0] > 200 for k in ("shear_x", "shear_y"))


def test_flip_to_tensor_normalise():
    img = picture(6, 9)
    rng = np.random.default_rng(0)
    flipped = [(pixels(I.flip(img, rng)) == pixels(img)[:, ::-1]).all() for _ in range(400)]
    assert 0.42 < np.mean(flipped) < 0.58
    x = I.to_tensor(img)
    assert x.shape == (3, 6, 9) and x.dtype == torch.uint8 and x.is_contiguous()
    assert (x.permute(1, 2, 0).numpy() == np.asarray(img)).all()
    x[:] = 0                                                # its own memory: writing must not reach the picture
    assert pixels(img).max() > 0
    x = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    y = I.normalise(x)
    oracle = ((x.numpy() / 255).transpose(0, 2, 3, 1) - mean) / std
    assert y.dtype == torch.float32 and np.abs(y.permute(0, 2, 3, 1).numpy() - oracle).max() < 1e-5
    assert torch.equal(I.normalise(x[0]), y[0])


# ----------------------------------------------------------------------------------------------------- views, batches

def train_view(img, rng):
    return I.color_jitter(I.flip(I.random_resized_crop(img, 32, (0.2, 1), (3 / 4, 4 / 3), rng), rng), 0.4, rng)


def half_mask(rng):
    return rng.permutation(64) < 32


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


def small():
    return I.made_images(n_train=50, n_val=10)[0]


def test_views_are_pure():
    views = I.Views(small(), train_view, 3, half_mask)
    view, mask, label, bad = views[2, 7]
    assert (view.shape, view.dtype, mask.shape, mask.dtype, bad) == ((3, 32, 32), torch.uint8, (64,), torch.bool, "")
    assert mask.sum() == 32 and label == views.images.labels[7] and len(views) == 50
    np.random.seed(1)
    views[0, 0]
    assert same(views[2, 7], (view, mask, label, bad))                                  # whatever was asked before
    assert same(pickle.loads(pickle.dumps(views))[2, 7], (view, mask, label, bad))      # and in another process
    for other in (views[3, 7], views[2, 8], I.Views(small(), train_view, 4, half_mask)[2, 7]):
        assert not torch.equal(other[0], view) and not torch.equal(other[1], mask)
    assert I.Views(small(), train_view, 3)[0, 0][1].shape == (0,)


def test_views_do_not_depend_on_workers():
    views = I.Views(small(), train_view, 0, half_mask)

    def run(workers):
        keys = I.batches(50, 0, 0, 4, 16, 2, 1, 0)
        return list(torch.utils.data.DataLoader(views, batch_sampler=keys, collate_fn=I.collate, num_workers=workers))

    one, two = run(0), run(2)
    assert len(one) == 8 and all(same(a, b) for a, b in zip(one, two))
    x, mask, y, bad = one[0]
    assert x.shape == (8, 3, 32, 32) and x.dtype == torch.uint8 and mask.shape == (8, 64) and mask.dtype == torch.bool
    assert y.shape == (8,) and y.dtype == torch.int64 and bad == []


def test_views_replace_broken_images(tmp_path):
    folder(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["val/a/0.png"])
    for name in ("train/a/1.png", "train/a/2.png", "train/b/2.png"):
        (tmp_path / name).write_bytes(b"x")
    train, _ = I.open_folder(tmp_path)
    views = I.Views(train, train_view, 0, half_mask)
    got = views[5, 1]
    assert same(got[:3], views[5, 3][:3]) and got[2] == 1                     # both broken ones passed over
    lines = got[3].splitlines()
    assert [line.split(": ", 1)[0] for line in lines] == [train.names[1], train.names[2]] and "not an image" in lines[0]
    assert same(views[0, 5][:3], views[0, 0][:3])                             # the last wraps to the first
    batch = I.collate([views[0, i] for i in range(6)])
    assert batch[0].shape == (6, 3, 32, 32) and len(batch[3]) == 4
    for name in train.names:
        Path(name).write_bytes(b"")
    with pytest.raises(BadInput, match="empty file"):
        views[0, 0]


def test_eval_batches(tmp_path):
    folder(tmp_path, [f"train/{c}/{i}.png" for c in "ab" for i in range(3)] + ["val/a/0.png"])
    (tmp_path / "train/a/1.png").write_bytes(b"x")
    train, _ = I.open_folder(tmp_path)
    got = list(I.eval_batches(train, [5, 1, 0, 3], lambda img, rng: I.center_crop(img, 8), 2))
    assert [b[2].tolist() for b in got] == [[1], [0, 1]] and [len(b[3]) for b in got] == [1, 0]
    assert torch.equal(got[1][0][0], I.to_tensor(train.load(0))) and got[1][1].shape == (2, 0)
    alone = next(I.eval_batches(train, [1], lambda img, rng: img, 1))
    assert len(alone[0]) == len(alone[2]) == 0 and train.names[1] in alone[3][0]
    again = list(I.eval_batches(train, [5, 1, 0, 3], lambda img, rng: I.center_crop(img, 8), 2, workers=1))
    assert all(same(a, b) for a, b in zip(got, again))


def test_order_and_sample_at():
    n = 7
    run = [I.sample_at(k, n, 0) for k in range(3 * n)]
    for epoch in range(3):
        part = run[epoch * n:(epoch + 1) * n]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(n))
        assert [i for _, i in part] == I.order(n, 0, epoch).tolist()
    assert all(type(i) is int for _, i in run)
    assert I.order(1000, 0, 0).tolist() != I.order(1000, 0, 1).tolist() != I.order(1000, 1, 1).tolist()
    with pytest.raises(ValueError):
        I.order(n, 0, 0)[0] = 1                             # it is shared: nobody may change it


def test_batches_are_the_same_for_any_world():
    n, seed, total = 50, 1, 72
    for world in (1, 2, 3, 8):
        for accumulation in (1, 3):
            ranks = [list(I.batches(n, seed, 2, 7, total, accumulation, world, r)) for r in range(world)]
            assert all(len(r) == 5 * accumulation for r in ranks)
            for s in range(2, 7):                           # a step reaches across epochs
                micro = range((s - 2) * accumulation, (s - 1) * accumulation)
                keys = [key for m in micro for r in ranks for key in r[m]]
                assert keys == [I.sample_at(k, n, seed) for k in range(s * total, (s + 1) * total)]
    whole = list(I.batches(n, seed, 0, 7, total, 2, 2, 1))
    assert whole[6:] == list(I.batches(n, seed, 3, 7, total, 2, 2, 1))        # a restart at step 3 goes on
    assert len(next(I.batches(3, 0, 0, 1, 32, 1, 1, 0))) == 32                # fewer images than the batch
    with pytest.raises(AssertionError):
        next(I.batches(n, 0, 0, 1, 10, 1, 3, 0))


def test_batches_compute_the_order_once_an_epoch():
    start = time.perf_counter()
    batch = next(I.batches(1_281_167, 0, 600, 601, 2048, 1, 1, 0))
    assert len(set(batch)) == 2048 and time.perf_counter() - start < 2


def test_speed_of_a_view():
    views = I.Views(small(), train_view, 0)
    views[0, 0]
    start = time.process_time()
    for i in range(200):
        views[1, i % 50]
    assert (time.process_time() - start) / 200 < 0.002      # about 0.16 ms on a free core


# ---------------------------------------------------------------------------------------------------------- real data

@needs_shared
def test_shared_cifar10():
    train, val = I.open_folder(SHARED / "cifar10")
    assert (len(train), len(val), len(train.classes)) == (10000, 2000, 10)
    assert np.bincount(train.labels).tolist() == [1000] * 10 and np.bincount(val.labels).tolist() == [200] * 10
    assert all(train.load(i).size == (32, 32) for i in range(0, 10000, 25))
    assert all(f"/{train.classes[k]}/" in n for n, k in zip(train.names, train.labels))


@needs_shared
def test_shared_imagenet_samples():
    train, val = I.open_folder(SHARED / "imagenet_samples")
    assert (len(train), len(val), len(train.classes)) == (80, 20, 80) and set(val.labels) == {-1}
    odd = ("potter", "thunder_snake", "tusker", "acoustic")     # quote in the name, illegal EXIF, tiny, grey
    rng = np.random.default_rng(0)
    for i, name in enumerate(train.names):
        if i % 9 == 0 or any(part in name for part in odd):
            img = train.load(i)
            assert img.mode == "RGB" and I.center_crop(img, 64).size == (64, 64)
            assert I.random_resized_crop(img, 64, (0.2, 1), (3 / 4, 4 / 3), rng).size == (64, 64)
    opener = next(n for n in val.names if "can_opener" in n)
    with Image.open(opener) as raw:
        assert (pixels(ImageOps.exif_transpose(raw).convert("RGB")) == pixels(I.load_image(opener))).all()
        assert I.load_image(opener).size == raw.size[::-1]


# ----------------------------------------------------------------------------------------------------- the two commands

NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def cifar_archive(replace=None):
    """-> bytes of an archive laid out like CIFAR-10's, 4 images a batch; replace: {member: bytes or None}."""
    rng = np.random.default_rng(0)
    members = {"batches.meta": {b"label_names": NAMES, b"num_vis": 3072}}
    for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        members[name] = {b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), b"labels": [k, k, 9 - k, 0],
                         b"batch_label": b"some", b"filenames": [b"a.png"] * 4}
    dumped = {name: pickle.dumps(value, protocol=2) for name, value in members.items()} | (replace or {})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in dumped.items():
            if content is not None:
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), members


def offer(server, replace=None):
    content, members = cifar_archive(replace)
    server.files["/c.tar.gz"] = content
    return f"{server.url}/c.tar.gz", hashlib.md5(content).hexdigest(), members


def command(*args):
    """Run it as a user would, in a process of its own."""
    env = {**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "data.images", *map(str, args)], cwd=ROOT, env=env, timeout=60,
                          capture_output=True, text=True)


def one_line(result):
    """Exit status 2 and one line, which is returned (the progress bar, if any, goes before it)."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_cifar10_command(tmp_path, server):
    url, md5, members = offer(server)
    out = tmp_path / "c10"
    result = command("cifar10", "--out", out, "--url", url, "--md5", md5.upper())
    assert result.returncode == 0, result.stderr
    train, val = I.open_folder(out)
    assert (len(train), len(val)) == (20, 4)
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]
    row = members["data_batch_3"][b"data"][1]                 # training image 9: label 2, stored channel by channel
    path = out / "train" / "bird" / "00009.png"
    assert (np.asarray(I.load_image(path)) == row.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    for i, label in enumerate(members["test_batch"][b"labels"]):
        assert (out / "val" / NAMES[label].decode() / f"{i:05d}.png").exists()
    asked, when = len(server.asked), path.stat().st_mtime_ns
    (out / "train" / "dog").mkdir(exist_ok=True)
    next((out / "val").rglob("*.png")).unlink()
    I.cifar10(out, url, md5)                                  # again: nothing is fetched, what is missing is written
    assert len(server.asked) == asked and path.stat().st_mtime_ns == when and len(I.open_folder(out)[1]) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_broke(tmp_path, server, ranges):
    url, md5, _ = offer(server)
    server.cut, server.ranges = 5000, ranges
    with pytest.raises(BadInput, match="run this again") as error:
        I.download(url, str(tmp_path / "a"), md5)
    assert "\n" not in str(error.value) and url in str(error.value)
    assert (tmp_path / "a.part").stat().st_size == 5000 and not (tmp_path / "a").exists()
    server.cut = None
    I.download(url, str(tmp_path / "a"), md5)
    assert [wanted for _, wanted in server.asked] == [None, "bytes=5000-"] and (tmp_path / "a").read_bytes() == server.files["/c.tar.gz"]
    shutil.move(tmp_path / "a", tmp_path / "a.part")          # stopped between the last byte and the rename: 416
    I.download(url, str(tmp_path / "a"), md5)
    assert (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_wrong_md5_is_never_used(tmp_path, server):
    url, _, _ = offer(server)
    with pytest.raises(BadInput, match="md5") as error:
        I.cifar10(tmp_path, url, I.CIFAR_MD5)
    assert url in str(error.value) and not list(tmp_path.iterdir())
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(server.files["/c.tar.gz"])
    with pytest.raises(BadInput, match="md5"):                                  # put there by hand: not used either
        I.cifar10(tmp_path, url, I.CIFAR_MD5)
    assert not (tmp_path / "train").exists()


def test_no_network(tmp_path, server):
    line = one_line(command("cifar10", "--out", tmp_path, "--url", f"{server.url}/nothing"))
    assert "404" in line and "by hand" in line and str(tmp_path / "cifar-10-python.tar.gz") in line
    for url in ("http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "nonsense"):
        with pytest.raises(BadInput, match="by hand") as error:
            I.download(url, str(tmp_path / "a"), "")
        assert url in str(error.value) and "\n" not in str(error.value)


class Evil:
    """What a hostile pickle looks like: it asks for os.mkdir when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_archives(tmp_path, server):
    hit = str(tmp_path / "hit")
    labels = [0] * 4
    evil = {
        "call": {"batches.meta": pickle.dumps({b"label_names": NAMES, b"x": Evil(hit)}, protocol=2)},
        "dotted": {"test_batch": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.view\x93."},
        "builtin": {"test_batch": b"cbuiltins\neval\n(S'1'\ntR."},
        "path": {"batches.meta": pickle.dumps({b"label_names": [b"../../hit"] * 10}, protocol=2)},
        "label": {"test_batch": pickle.dumps({b"data": np.zeros((4, 3072), "u1"), b"labels": [77] * 4}, protocol=2)},
        "shape": {"test_batch": pickle.dumps({b"data": np.zeros((4, 30), "u1"), b"labels": labels}, protocol=2)},
        "dtype": {"test_batch": pickle.dumps({b"data": np.zeros((4, 3072)), b"labels": labels}, protocol=2)},
        "absent": {"data_batch_5": None},
        "cut": {"data_batch_5": b"\x80\x02}q"},
    }
    for name, replace in evil.items():
        url, md5, _ = offer(server, replace)
        with pytest.raises(BadInput, match="not CIFAR-10's python archive") as error:
            I.cifar10(tmp_path / name, url, md5)
        assert "\n" not in str(error.value) and not os.path.exists(hit), name
        assert not (tmp_path / name / "val").exists(), name
    assert pickle.loads(evil["call"]["batches.meta"]) and os.path.exists(hit)   # the plain reader would have run it
    server.files["/c.tar.gz"] = b"\x1f\x8b not a tar"
    with pytest.raises(BadInput, match="not CIFAR-10's python archive"):
        I.cifar10(tmp_path / "z", f"{server.url}/c.tar.gz", hashlib.md5(b"\x1f\x8b not a tar").hexdigest())


def test_out_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["data.images", "cifar10", "--out", str(tmp_path / "file")])
    with pytest.raises(BadInput, match="cannot be written"):
        I.main()


def test_imagenet_command(tmp_path, monkeypatch, capsys):
    folder(tmp_path, [f"train/n{i:08d}/{i}.JPEG" for i in range(4)] + ["val/n00000000/1.JPEG", "val/n00000009/2.JPEG"])
    (tmp_path / "train/n00000000/0.JPEG").write_bytes(b"")
    result = command("imagenet", "--data", tmp_path)
    line = one_line(result)
    assert "train/WNID" in result.stdout and "train: 4 images in 4 classes" in result.stdout
    for part in ("train/ has images of 4 classes, not 1000", "val/ has images of 1 classes", "4 images, not 1281167",
                 "1 images of val/", "0.JPEG cannot be decoded (empty file)", str(tmp_path)):
        assert part in line, part
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(BadInput, match="no folder val/"):
        I.check_imagenet(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        I.check_imagenet(tmp_path / "absent")
    whole = I.ImageSet([f"n{i:08d}" for i in range(1000)], [i % 1000 for i in range(1281167)], range(1281167))
    part = I.ImageSet(whole.classes, whole.labels[:50000], range(50000))
    monkeypatch.setattr(I, "open_folder", lambda root: (whole, part))
    monkeypatch.setattr(I.ImageSet, "load", lambda self, i: None)
    (tmp_path / "val").mkdir()
    I.check_imagenet(tmp_path)
    assert "complete" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["data.images", "imagenet"])
    I.main()
    assert "train/WNID" in capsys.readouterr().out

"""data/images.py and data/sampling.py: decoding, folders, augmentation, views and batches, CIFAR-10."""

import functools
import io
import pickle
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

import common
from common import UserError
from data import images, sampling, synthetic

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def pixels(img):
    return np.asarray(img).astype(int)


def load(path):
    img = images.load_image(path)
    assert img.mode == "RGB"
    return pixels(img)


def picture(h=24, w=32, seed=0):
    """A smooth colour picture, so that JPEG and resizing stay close to it."""
    a, b, c = np.random.default_rng(seed).uniform(0.05, 0.25, 3)
    y, x = np.mgrid[:h, :w]
    planes = 127 + 120 * np.sin(a * x), 127 + 120 * np.cos(b * y), 120 + 120 * np.sin(a * y - c * x)
    return Image.fromarray(np.stack(planes, -1).astype("u1"))


def folder(root, *files):
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, seed=i).save(path, "PNG")


def test_greys_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    grey = np.rint(ramp / 257)[..., None]
    for name, array, expected in (
        ("16.png", ramp.astype("u2"), grey),
        ("16.tif", ramp.astype("u2"), grey),
        ("dark.png", (ramp / 2).astype("u2"), grey / 2),
        ("F.tif", (ramp / 65535).astype("f4"), grey),
    ):
        Image.fromarray(array).save(tmp_path / name)
        assert np.abs(load(tmp_path / name) - expected).max() <= 1, name


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_are_scaled_by_the_bits_that_they_use(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 4096).round().reshape(64, 64)
    for scale in (1, 0.6):  # not by the maximum of the picture
        for name, kind in (("a.png", "u2"), ("a.tif", ">u2"), ("b.tif", "i4"), ("c.tif", "f4")):
            Image.fromarray((ramp * scale).astype(kind)).save(tmp_path / name)
            expected = (ramp * scale).astype(kind) // 2 ** (bits - 8)
            assert np.array_equal(load(tmp_path / name)[..., 0], expected), name


@pytest.mark.parametrize("low, high, black, white", [
    (0, 1.05, 0, 255), (-0.03, 1.02, 0, 255), (0, 0.5, 0, 128), (0, 258.0, 0, 255), (0, 300.0, 0, 75),
    (-1024, 3071, 0, 255), (-3, 3000, 0, 187), (0, 70_000, 0, 68), (0, 9, 0, 9), (7, 7, 7, 7),
])  # fmt: skip
def test_other_greys_are_scaled_too(tmp_path, low, high, black, white):
    x = np.linspace(low, high, 4096).reshape(64, 64).astype("f4" if isinstance(high, float) else "i4")
    Image.fromarray(x).save(tmp_path / "a.tif")
    assert (load(tmp_path / "a.tif").min(), load(tmp_path / "a.tif").max()) == (black, white)


def test_12_bit_colours_in_16_are_refused(tmp_path):
    """Pillow reads the upper 8 bits of 16: 16 levels would be left."""
    for bits in (16, 12):
        x = np.linspace(0, 2**bits - 1, 4096).astype(">u2").reshape(64, 64, 1).repeat(3, 2)
        head, content = (
            struct.pack(">2I5B", 64, 64, 16, 2, 0, 0, 0),
            b"".join(b"\0" + row.tobytes() for row in x),
        )
        chunks = [b"IHDR" + head, b"IDAT" + zlib.compress(content), b"IEND"]
        chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        (tmp_path / f"{bits}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert len(np.unique(load(tmp_path / "16.png"))) == 256
    with pytest.raises(images.BadImage, match="12-bit colours"):
        images.load_image(tmp_path / "12.png")


def test_transparency_becomes_white_and_cmyk_rgb(tmp_path):
    rgba = np.array([[[*BLUE, 0], [*BLUE, 255]], [[*BLUE, 128], [*BLUE, 255]]], "u1")
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert load(tmp_path / "rgba.png").tolist() == [[[*WHITE], [*BLUE]], [[127, 127, 255], [*BLUE]]]
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], "u1")).convert("P")
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "color.png", transparency=0)
    palette.save(tmp_path / "color.gif", transparency=0)
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(load(tmp_path / "cmyk.jpg") - RED).max() <= 3
    for name in ("color.png", "color.gif"):
        assert np.array_equal(load(tmp_path / name), [[WHITE, BLUE], [BLUE, WHITE]]), name


CORNERS = {2: "tr tl", 3: "br bl", 4: "bl br", 5: "tl bl", 6: "tr br", 7: "br tr", 8: "bl tl"}  # EXIF 2.3


@pytest.mark.parametrize("ext", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 60000])
def test_exif_orientation(tmp_path, ext, orientation):
    """The red and blue corners, stored top left and top right, are where the standard says."""
    stored = Image.new("RGB", (32, 16), "white")
    stored.paste(RED, (0, 0, 8, 8))
    stored.paste(BLUE, (24, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{ext}", exif=exif, quality=95)
    out = load(tmp_path / f"a.{ext}")
    red, blue = CORNERS.get(orientation, "tl tr").split()
    corners = {"tl": out[2, 2], "tr": out[2, -3], "bl": out[-3, 2], "br": out[-3, -3]}
    assert out.shape == ((32, 16, 3) if orientation in (5, 6, 7, 8) else (16, 32, 3))
    assert np.abs(corners[red] - RED).max() < 40 and np.abs(corners[blue] - BLUE).max() < 40


def test_damaged_files_raise_bad_image(tmp_path):
    for name in ("a.jpg", "a.png"):
        picture(64, 64).save(tmp_path / name)
    jpg, png = (tmp_path / "a.jpg").read_bytes(), (tmp_path / "a.png").read_bytes()
    for content in (b"", b"<html>", jpg[: len(jpg) // 2], png[:99], png[:60] + bytes(8) + png[68:]):
        (tmp_path / "b.jpg").write_bytes(content)
        with pytest.raises(images.BadImage, match="^.+$"):
            images.load_image(tmp_path / "b.jpg")
    for path in (tmp_path, tmp_path / "missing.jpg"):
        with pytest.raises(images.BadImage, match="Is a directory|No such file"):
            images.load_image(path)


def test_open_data(tmp_path):
    folder(tmp_path, "train/dog/b.png", "train/dog/deep/er/a.PNG", "train/cat/x.jpeg", "train/.hid/x.png")
    folder(tmp_path, "train/cat/.y.png", "train/loose.png", "train/dog/looks.like.a.jpg/c.png")
    folder(tmp_path, "val/dog/1.png", "val/cat/2.TIF", "val/emu/3.webp", "val/4.gif", "store/5.png")
    (tmp_path / "train/cat/link").symlink_to(tmp_path / "store")
    train, val = images.open_data(str(tmp_path))
    assert train.classes == val.classes == ["cat", "dog"] and len(train) == 6
    names = [Path(file).relative_to(tmp_path / "train").as_posix() for file in train.files]
    assert dict(zip(names, train.labels)) == {
        "cat/link/5.png": 0, "cat/x.jpeg": 0, "dog/b.png": 1, "dog/deep/er/a.PNG": 1,
        "dog/looks.like.a.jpg/c.png": 1, "loose.png": -1,
    }  # fmt: skip
    assert names == sorted(names)
    labels = {Path(file).name: label for file, label in zip(val.files, val.labels)}
    assert labels == {"1.png": 1, "2.TIF": 0, "3.webp": -1, "4.gif": -1}


@pytest.mark.parametrize("folders, used, unused", [
    ("train valid", "valid", ""), ("Train VALIDATION Test extra", "VALIDATION", "Test, extra"),
    ("training test", "test", ""), ("train test dev", "dev", "test"), ("train val eval", "val", "eval"),
    ("train val/empty test", "test", "val"), ("train test/unlabelled", "every 20th image of train", "test"),
])  # fmt: skip
def test_the_held_out_folder_is_found_and_said(tmp_path, capsys, monkeypatch, folders, used, unused):
    for name in folders.split():
        for i in range(21):
            inside = {"val/empty": f"{name}/a/notes.txt", "test/unlabelled": f"test/{i}.png"}
            folder(tmp_path, inside.get(name, f"{name}/{'ab'[i % 2]}/{i}.png"))
    _, val = images.open_data(str(tmp_path))
    assert {Path(file).relative_to(tmp_path).parts[0] for file in val.files} == {used.split()[-1]}
    assert len(val) == (2 if used.startswith("every") else 21) and -1 not in val.labels
    unused = [name for name in unused.split(", ") if name]
    assert capsys.readouterr().out == f"--data: held out is {used}; not used: {unused}\n"
    monkeypatch.setattr(common, "first_process", lambda: False)
    images.open_data(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_classes_are_in_the_order_that_is_given_if_they_are_the_same(tmp_path):
    folder(tmp_path, *(f"{split}/{i}/a.png" for split in ("train", "val") for i in (*range(11), 100)))
    order = ["2", *map(str, (0, 1, *range(3, 11))), "100"]
    for part in images.open_data(str(tmp_path), order):
        assert part.classes == order
        assert [order[label] for label in part.labels] == [Path(file).parent.name for file in part.files]
    assert images.open_data(str(tmp_path), order[1:])[0].classes == sorted(order)


def test_open_data_without_val(tmp_path):
    folder(tmp_path, *(f"train/{i:03d}.png" for i in range(21)))
    train, val = images.open_data(str(tmp_path))
    assert val.files == sorted(train.files + val.files)[::20] and len(train) == 19
    assert len(train.classes) == 1 and set(train.labels + val.labels) == {0}


@pytest.mark.parametrize("file", ["a/x/1.png", "train/x/notes.txt", "train/x/1.png"])
def test_open_data_without_images(tmp_path, file):
    folder(tmp_path, file)
    with pytest.raises(UserError, match=f"--data {tmp_path}: no images in train/CLASS/, or too few"):
        images.open_data(str(tmp_path))


class Spy:
    """An image that gives the box of a crop instead of its pixels."""

    size = (600, 500)

    def resize(self, size, resample, box):
        assert size == (7, 7) and resample == Image.BICUBIC
        return box


def test_random_resized_crop_statistics():
    rng = np.random.default_rng(0)
    crops = [images.random_resized_crop(Spy(), 7, (0.2, 1), (3 / 4, 4 / 3), rng) for _ in range(4000)]
    left, top, right, bottom = np.array(crops).T
    area, aspect = (right - left) * (bottom - top) / 300000, (right - left) / (bottom - top)
    assert min(left.min(), top.min()) >= 0 and right.max() <= 600 and bottom.max() <= 500
    assert 0.199 < area.min() < 0.21 and 0.95 < area.max() <= 1
    assert 0.745 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
    small = area < 0.4  # no such draw is rejected: uniform and log-uniform
    assert abs(np.median(area[small]) - 0.3) < 0.01 and abs(np.median(aspect[small]) - 1) < 0.02


def test_random_resized_crop_of_a_long_image():
    strip = Image.new("RGB", (1000, 10), BLUE)
    strip.paste(RED, (493, 0, 507, 10))
    crop = images.random_resized_crop(strip, 16, (0.9, 1), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert crop.size == (16, 16) and np.abs(pixels(crop) - RED).mean() < 2  # nothing fits: the middle


def test_center_crop():
    img, big = picture(32, 32), picture(100, 160)
    assert images.center_crop(img, 32) is img
    resized = big.resize((round(160 * 0.64), 64), Image.BICUBIC)  # shorter side 56 / 0.875
    left = (resized.width - 56) // 2
    difference = pixels(images.center_crop(big, 56)) - pixels(resized.crop((left, 4, left + 56, 60)))
    assert np.abs(difference).mean() < 1.5


def test_color_jitter_is_pillows():
    for kind, enhance in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        for factor in (0.6, 1.3):
            rng = Mock(permutation=Mock(return_value=[kind]), uniform=Mock(return_value=factor))
            out = images.color_jitter(picture(16, 16), 0.4, rng)
            assert np.abs(pixels(out) - pixels(enhance(picture(16, 16)).enhance(factor))).max() <= 1


def test_rand_augment():
    img, rng = picture(32, 32), np.random.default_rng(0)
    outs = [pixels(images.rand_augment(img, 2, 9, 0.5, rng)) for _ in range(600)]
    assert 0.2 < np.mean([np.array_equal(out, img) for out in outs]) < 0.36  # neither of two: 1/4, and a bit
    noise = Image.fromarray(np.random.default_rng(0).integers(64, 192, (32, 32, 3), dtype=np.uint8))
    for k, op in enumerate(images.RAND_AUGMENT[3:]):  # three have no magnitude
        weak, strong, other, none = (np.abs(pixels(op(noise, m)) - noise).mean() for m in (0.3, 0.9, -0.9, 0))
        assert weak > 0 and other > 0 and (none == 0 or k == 1)  # posterize keeps 4 bits
        assert strong > weak or k >= 10  # shifted noise is noise


def test_rand_augment_shears_and_shifts():
    shear_x, shear_y, shift_x, shift_y = images.RAND_AUGMENT[-4:]
    img, dot = picture(20, 20), Image.new("RGB", (33, 33))
    out = pixels(shift_x(img, 1))  # by 0.45 of the width
    assert np.array_equal(out[:, 9:], pixels(img)[:, :-9]) and (out[:, :9] == images.GREY).all()
    assert np.array_equal(pixels(shift_y(img, -1))[:-9], pixels(img)[9:])
    dot.putpixel((16, 16), WHITE)
    assert all(pixels(shear(dot, 1))[16, 16, 0] > 200 for shear in (shear_x, shear_y))


def test_flip_and_normalise():
    img, rng = picture(6, 9), np.random.default_rng(0)
    flipped = [np.array_equal(images.flip(img, rng), pixels(img)[:, ::-1]) for _ in range(400)]
    assert 0.42 < np.mean(flipped) < 0.58
    y = images.normalise(images.to_tensor(img)[None])
    expected = (pixels(img) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert y.dtype == torch.float32 and np.abs(y[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def train_view(img, rng):
    img = images.random_resized_crop(img, 32, (0.2, 1), (3 / 4, 4 / 3), rng)
    return images.color_jitter(images.flip(img, rng), 0.4, rng)


def draw_mask(rng):
    return rng.permutation(64) < 32


def same(a, b):
    return a["skipped"] == b["skipped"] and all(torch.equal(a[k], b[k]) for k in ("images", "mask", "labels"))


@functools.lru_cache(maxsize=1)
def views():
    train, _ = synthetic.images(n_train=50, n_val=10)
    return images.Views(images.ImageSet(*train), train_view, 3, draw_mask)


def test_a_view_depends_on_seed_epoch_and_index_alone():
    batch = views()[[(2, 7), (0, 3), (2, 8)]]
    x, mask = batch["images"], batch["mask"]
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8 and x.is_contiguous()
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [32] * 3 and batch["skipped"] == []
    assert batch["labels"].tolist() == [views().images.labels[i] for i in (7, 3, 8)]
    np.random.seed(1)
    assert same(pickle.loads(pickle.dumps(views()))[[(2, 7), (0, 3), (2, 8)]], batch)
    assert torch.equal(views()[[(2, 7)]]["images"], x[:1])
    other_seed = images.Views(views().images, train_view, 4, draw_mask)
    for other in (views()[[(3, 7)]], views()[[(2, 8)]], other_seed[[(2, 7)]]):
        assert not torch.equal(other["images"], x[:1]) and not torch.equal(other["mask"], mask[:1])
    assert images.Views(views().images, train_view, 3)[[(0, 0), (0, 1)]]["mask"].shape == (2, 0)


def test_views_do_not_depend_on_workers():
    def load_all(workers):
        keys = sampling.batches(50, 0, 0, 4, 16, 2, 1, 0)
        return list(sampling.loader(views(), keys, workers, torch.device("cpu")))

    one, two = load_all(0), load_all(2)
    assert len(one) == 8 and all(same(a, b) for a, b in zip(one, two))


def test_broken_images_are_replaced_or_dropped(tmp_path):
    folder(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(3)), "val/a/0.png")
    for name in ("train/a/1.png", "train/a/2.png", "train/b/2.png"):
        (tmp_path / name).write_bytes(b"x")
    train, _ = images.open_data(str(tmp_path))
    replaced, dropped = (images.Views(train, train_view, 0, draw_mask, replace) for replace in (True, False))
    got = replaced[[(5, 1), (0, 5)]]
    expected = replaced[[(5, 3), (0, 0)]]  # the next one; after the last, the first
    assert torch.equal(got["images"], expected["images"]) and got["labels"].tolist() == [1, 0]
    assert [line.split(": ")[0] for line in got["skipped"]] == [train.files[i] for i in (1, 2, 5)]
    got = dropped[[(0, 5), (0, 1), (0, 0), (5, 3)]]
    assert got["labels"].tolist() == [0, 1] and len(got["skipped"]) == 2
    assert torch.equal(got["images"], expected["images"].flip(0))
    for file in train.files:
        Path(file).write_bytes(b"")
    with pytest.raises(UserError, match="train/a/0.png: .*; no image of --data can be decoded"):
        replaced[[(0, 0), (0, 1)]]


def test_cifar10_command(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    files = {"batches.meta.txt": b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(5, 0, -1))):
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] = 2, 9, 0, 2
        files[f"{name}.bin"] = records.tobytes()
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(sys, "argv", ["images", "cifar10", "--out", str(tmp_path)])
    images.main()
    train, val = images.open_data(str(tmp_path))
    assert len(train) == 20 and train.classes == ["airplane", "bird", "truck"]
    names = [file.removeprefix(f"{tmp_path}/val/") for file in val.files]
    assert names == ["airplane/00002.png", "bird/00000.png", "bird/00003.png", "truck/00001.png"]
    stored = records[1, 1:].reshape(3, 32, 32).transpose(1, 2, 0)  # of data_batch_1
    assert np.array_equal(load(tmp_path / "train/truck/00001.png"), stored)

"""Folders of images -> pictures -> random views -> batches.

python -m data.images cifar10 --out DIR    downloads CIFAR-10 to DIR/{train,val}/CLASS/NNNNN.png
"""

import argparse
import contextlib
import glob
import math
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from tqdm import tqdm

from common import require, run, say
from data import synthetic
from data.download import download

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # ImageNet's
STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
HELD_OUT = ("val", "valid", "validation", "dev", "test")  # folders, in any case, the first choice first
GREY = (124, 116, 104)  # the mean as a colour
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # the version without pickle


class BadImage(Exception):
    """An image that cannot be decoded; the message is the reason."""


@dataclass
class ImageSet:
    classes: list[str]
    labels: list[int]  # -1: none of the classes
    files: list  # paths, or images as (H, W, 3) uint8 arrays

    def __len__(self):
        return len(self.files)

    def part(self, indices):
        return ImageSet(self.classes, [self.labels[i] for i in indices], [self.files[i] for i in indices])


def open_data(path, order=()):
    """-> (train, val): ImageSets of path/{train,val}/CLASS/**, classes as in train; "": synthetic images.
    val: the first folder of HELD_OUT with images of these classes, else every 20th of train; a line says it.
    Classes are sorted, or in this order if it has the same names. Raises UserError."""
    if not path:
        return [ImageSet(*split) for split in synthetic.images()]
    folders = {name[:-1].lower(): name[:-1] for name in sorted(glob.glob("*/", root_dir=path))}
    source = folders.get("train", folders.get("training", "train"))
    train = find_images(os.path.join(path, source))
    classes = sorted({name for _, name in train} - {"."}) or ["."]
    labels = {name: i for i, name in enumerate(order if sorted(order) == classes else classes)}
    for used in (folders[name] for name in HELD_OUT if name in folders):
        val = find_images(os.path.join(path, used))
        if any(name in labels or classes == ["."] for _, name in val):
            break
    else:
        used, val = f"every 20th image of {source}", train[::20]
        del train[::20]
    require(train, f"--data {path}: no images in train/CLASS/, or too few ({' '.join(EXTENSIONS)})")
    say(f"--data: held out is {used}; not used: {sorted({*folders.values()} - {source, used})}")
    return [
        ImageSet([*labels], [labels.get(name, -1) for _, name in split], [file for file, _ in split])
        for split in (train, val)
    ]


def find_images(folder):
    """-> sorted (path, class) of the images below a folder, without hidden ones; class: subfolder or "."."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        class_name = os.path.relpath(parent, folder).split(os.sep)[0]
        names = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found += [(os.path.join(parent, name), class_name) for name in names]
    return sorted(found)


def load_image(file):
    """Path or (H, W, 3) uint8 -> RGB image, turned as EXIF says, on a white ground. Raises BadImage."""
    if isinstance(file, np.ndarray):
        return Image.fromarray(file)
    try:
        with Image.open(file) as img:
            cut = img.mode[0] not in "IF" and ";16" in str(img.tile)  # 16-bit colours: Pillow keeps 8 bits
            img.load()
            if cut and max(high for _, high in img.convert("RGB").getextrema()) < 16:
                raise ValueError("12-bit colours in 16 bits; save them with 8")
            with contextlib.suppress(Exception):  # the pixels can be fine when the EXIF is not
                img = ImageOps.exif_transpose(img)
            return to_rgb(img)
    except Exception as error:  # Pillow raises nearly anything on damaged data
        raise BadImage(getattr(error, "strerror", None) or repr(error)) from None


def to_rgb(img):
    """Any mode -> RGB; convert() alone clips 16-bit grey and shows what is transparent.
    Greys keep the upper 8 of the 8, 10, 12, 14 or 16 bits that hold them; black is 0, or the lowest below."""
    if img.mode[0] in "IF":  # one channel of 16-bit, 32-bit or real numbers
        x = np.nan_to_num(np.asarray(img, np.float64), posinf=0, neginf=0)
        x -= min(0, x.min())
        white, most = (1, x.max() / 1.1) if img.mode == "F" else (256, x.max())  # real ones may overshoot
        while most > white:
            white *= 4
        img = Image.fromarray((x * (256 / white)).clip(0, 255).astype(np.uint8))
    elif img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB")


def random_resized_crop(img, size, scale, ratio, rng):
    """-> (size, size): fraction of the area uniform in `scale`, aspect log-uniform in `ratio`; bicubic."""
    w, h = img.size
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        crop_w, crop_h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < crop_w <= w and 0 < crop_h <= h:
            left, top = rng.integers(w - crop_w + 1), rng.integers(h - crop_h + 1)
            break
    else:  # a very long image: the largest middle part within `ratio`
        crop_w, crop_h = max(1, min(w, round(h * ratio[1]))), max(1, min(h, round(w / ratio[0])))
        left, top = (w - crop_w) // 2, (h - crop_h) // 2
    return img.resize((size, size), Image.BICUBIC, box=(left, top, left + crop_w, top + crop_h))


def center_crop(img, size):
    """-> (size, size): the middle square, 0.875 of the shorter side; bicubic. An image of that size stays."""
    same = img.size == (size, size)
    return img if same else ImageOps.fit(img, (size, size), Image.BICUBIC, bleed=0.125 / 2)


def flip(img, rng):
    """Swaps left and right, with probability 1/2."""
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def color_jitter(img, strength, rng):
    """Brightness, contrast, saturation in random order, each by a factor in 1 - strength .. 1 + strength."""
    if strength == 0:
        return img
    for kind in rng.permutation(3):  # 0 brightness, 1 contrast, 2 saturation: towards black, mean or grey
        other = Image.new("L", img.size) if kind == 0 else img.convert("L")
        if kind == 1:
            other = Image.new("L", img.size, round(np.asarray(other).mean()))
        img = Image.blend(other.convert("RGB"), img, rng.uniform(max(0, 1 - strength), 1 + strength))
    return img


def affine(img, *numbers):
    """-> img whose pixel (x, y) is that at (a x + b y + c, d x + e y + f); grey where there is none."""
    return img.transform(img.size, Image.Transform.AFFINE, numbers, Image.BICUBIC, fillcolor=GREY)


RAND_AUGMENT = (  # op(img, m), m in -1..1: severity, and direction by its sign
    lambda img, m: ImageOps.autocontrast(img),
    lambda img, m: ImageOps.equalize(img),
    lambda img, m: ImageOps.invert(img),
    lambda img, m: img.rotate(30 * m, Image.BICUBIC, fillcolor=GREY),
    lambda img, m: ImageOps.posterize(img, max(1, 4 - int(4 * abs(m)))),
    lambda img, m: ImageOps.solarize(img, 256 - int(256 * abs(m))),
    lambda img, m: img.point([v + int(110 * abs(m)) if v < 128 else v for v in range(256)] * 3),
    lambda img, m: ImageEnhance.Color(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Contrast(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Brightness(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * m),
    lambda img, m: affine(img, 1, 0.3 * m, -0.3 * m * img.height / 2, 0, 1, 0),  # shear
    lambda img, m: affine(img, 1, 0, 0, 0.3 * m, 1, -0.3 * m * img.width / 2),
    lambda img, m: affine(img, 1, 0, -0.45 * m * img.width, 0, 1, 0),  # shift
    lambda img, m: affine(img, 1, 0, 0, 0, 1, -0.45 * m * img.height),
)


def rand_augment(img, n_ops, magnitude, magnitude_std, rng):
    """RandAugment (Cubuk et al. 2020): n_ops operations, each with probability 1/2 and its own magnitude."""
    for op in rng.integers(len(RAND_AUGMENT), size=n_ops):
        m = min(max(rng.normal(magnitude, magnitude_std), 0), 10) / 10
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            img = RAND_AUGMENT[op](img, sign * m)
    return img


class Views(torch.utils.data.Dataset):
    """views[[(epoch, index), ...]] -> {"images": (B, 3, H, W) uint8, "mask": (B, T) bool, True = hidden,
    "labels": (B,) int64, "skipped": ["file: reason"]}; each view depends on (seed, epoch, index) alone.
    transform(img, rng) -> PIL, draw_mask(rng) -> (T,), or (M, T); without it T = 0. An image that cannot be
    decoded is replaced by the next one, or dropped."""

    def __init__(self, images, transform, seed, draw_mask=None, replace=True):
        self.images, self.transform, self.seed = images, transform, seed
        self.draw_mask, self.replace = draw_mask, replace

    def __getitem__(self, keys):
        views, masks, labels, skipped = [], [], [], []
        left = list(reversed(keys))
        while left:
            epoch, i = left.pop()
            try:
                img = load_image(self.images.files[i])
            except BadImage as error:
                skipped.append(f"{self.images.files[i]}: {error}")
                enough = len(skipped) < len(self.images) + len(keys)
                require(enough, f"{skipped[0]}; no image of --data can be decoded")
                if self.replace:
                    left.append((epoch, (i + 1) % len(self.images)))
                continue
            rng = np.random.default_rng([self.seed, epoch, i])
            views.append(to_tensor(self.transform(img, rng)))
            masks.append(torch.as_tensor(self.draw_mask(rng) if self.draw_mask else [], dtype=torch.bool))
            labels.append(self.images.labels[i])
        views, masks = (torch.stack(x) if x else torch.empty(0, 0) for x in (views, masks))
        return {"images": views, "mask": masks, "labels": torch.tensor(labels).long(), "skipped": skipped}


def to_tensor(img):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(img).transpose(2, 0, 1)))


def normalise(images):
    """(..., 3, H, W) uint8 -> float32 with ImageNet's mean and std; on the device: bytes travel faster."""
    return (images.float() - MEAN.to(images.device)) / STD.to(images.device)


def erase(x, probability, rng):
    """Random erasing (Zhong et al. 2020) in place, on x (B, 3, H, W): noise in 2 to 33 % of an image."""
    height, width = x.shape[-2:]
    for img in x:
        if rng.random() < probability:
            area = height * width * rng.uniform(0.02, 1 / 3)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((3, h, w), dtype=np.float32)
            img[:, top : top + h, left : left + w] = torch.from_numpy(noise).to(x.device)
    return x


def mix(x, y, mixup, cutmix, rng):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) with the reversed batch: x (B, 3, H, W),
    y (B, classes). mixup, cutmix: parameters of a Beta distribution, 0: off; of both, one is drawn."""
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    if alpha == 0:
        return x, y
    keep = rng.beta(alpha, alpha)
    if use_cutmix:
        height, width = x.shape[-2:]
        h, w = round(height * math.sqrt(1 - keep)), round(width * math.sqrt(1 - keep))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        other, x = x.flip(0), x.clone()
        x[..., top : top + h, left : left + w] = other[..., top : top + h, left : left + w]
        keep = 1 - h * w / (height * width)
    else:
        x = keep * x + (1 - keep) * x.flip(0)
    return x, keep * y + (1 - keep) * y.flip(0)


def main():
    parser = argparse.ArgumentParser("python -m data.images")
    parser.add_argument("name", choices=["cifar10"], help="data set to download")
    parser.add_argument("--out", required=True, help="folder for train/, val/ and the archive")
    out = Path(parser.parse_args().out)
    with tarfile.open(download(CIFAR10, out)) as tar:
        files = {os.path.basename(file.name): tar.extractfile(file).read() for file in tar if file.isfile()}
    classes = files["batches.meta.txt"].decode().split()
    train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
    for split, content in (("train", train), ("val", files["test_batch.bin"])):
        records = np.frombuffer(content, np.uint8).reshape(-1, 3073)  # label, pixels
        for i, record in enumerate(tqdm(records, desc=split)):
            path = out / split / classes[record[0]] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(path)


if __name__ == "__main__":
    run(main)

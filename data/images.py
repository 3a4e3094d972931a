"""Pictures in, views out: image folders, a made data set, transforms, and batches that any number of GPUs draw alike.

    python -m data.images cifar10 --out DIR      fetch CIFAR-10 and write it as DIR/{train,val}/{class}/NNNNN.png
    python -m data.images imagenet --data DIR    say what ImageNet's folder must look like, and check it

The walk: file -> ImageSet.load -> transform -> Views -> collate -> (B, 3, H, W) uint8 -> device -> normalise.
A sample is a pure function of (seed, epoch, index), so workers, ranks and restarts cannot change it.
"""
import argparse
import functools
import hashlib
import http.client
import math
import os
import pickle
import re
import tarfile
import urllib.error
import urllib.request
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common import BadInput, run

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MEAN, STD = 255 * torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).view(2, 3, 1, 1)   # ImageNet's
GREY = (124, 116, 104)                                                                           # the mean as a colour


# ---------------------------------------------------------------------------------------------- files -> ImageSet

class BadImage(Exception):
    """A picture that cannot be decoded; the message is a short reason without the path."""


class ImageSet:
    """Labelled pictures. classes: sorted names; labels: list of int, -1 = unknown; names: list of str for messages."""

    def __init__(self, classes, labels, names, pixels=None, draft=0):
        self.classes, self.labels, self.names, self.pixels, self.draft = classes, labels, names, pixels, draft

    def __len__(self):
        return len(self.names)

    def part(self, indices):
        """-> the ImageSet of these pictures alone, in this order."""
        labels, names = ([values[i] for i in indices] for values in (self.labels, self.names))
        pixels = None if self.pixels is None else self.pixels[indices]
        return ImageSet(self.classes, labels, names, pixels, self.draft)

    def load(self, i):
        """-> PIL image, mode RGB. Raises BadImage."""
        return load_image(self.names[i], self.draft) if self.pixels is None else Image.fromarray(self.pixels[i])


def load_image(path, draft=0):
    """-> PIL image, mode RGB, turned as its EXIF says, transparency on white, first frame. Raises BadImage only.

    draft: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many pixels (0 = always whole).
    More pixels than Pillow's limit against decompression bombs (89 million) make a picture bad, too.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")                                    # damaged metadata: not our business
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            img = Image.open(file)
            if draft:
                img.draft(None, (draft, draft))
            img.load()
            return to_rgb(turn_upright(img))
    except UnidentifiedImageError:                                             # its message would repeat the path
        raise BadImage("not an image" if os.path.getsize(path) else "empty file") from None
    except Exception as e:  # Pillow's readers raise nearly anything on damaged data; the caller wants one kind
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
        raise BadImage(" ".join(reason.split())) from None


def turn_upright(img):
    """Apply the EXIF orientation. After img.load(): TIFF turns itself while loading, PNG reads its EXIF there."""
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}
    try:
        turn = turns.get(img.getexif().get(0x0112))
    except Exception:  # unreadable EXIF is no reason to lose a picture whose pixels are fine
        turn = None
    return img if turn is None else img.transpose(turn)


def to_rgb(img):
    """Any mode -> RGB. Pillow's own convert() would clip 16-bit grey and show what lies under transparent pixels."""
    if img.mode[0] in "IF":                                # I;16, I, F: one channel of wide numbers
        x = np.nan_to_num(np.asarray(img).astype(np.float64), posinf=0, neginf=0)
        low, high = 0, 1 if img.mode == "F" else 65535     # the usual ranges; a file that leaves them is stretched
        if x.min() < low or x.max() > high:
            low, high = x.min(), x.max()
        img = Image.fromarray(np.rint((x - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    elif img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img if img.mode == "RGB" else img.convert("RGB")


def find_images(folder):
    """-> sorted paths of the images below `folder`; hidden names are passed over."""
    found, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_image = entry.name.lower().endswith(EXTENSIONS)
                if entry.is_dir(follow_symlinks=not is_image):  # no stat for files, nor for links called *.jpg
                    folders.append(entry.path)
                elif is_image:
                    found.append(entry.path)
    return sorted(found)


def open_folder(root, draft=0):
    """root/{train,val}/{class}/**/image -> (train, val): two ImageSets with the same classes.

    Classes are train's folders that hold an image, sorted; images loose in train/ are one class "" if it has no such
    folders. What is labelled otherwise (a val class that train lacks) gets -1. Without val/, every 20th image of train
    is held out. draft: see load_image. Raises BadInput.
    """
    if not os.path.isdir(root):
        raise BadInput(f"{root}: no such folder; give the one that holds train/ and val/")
    if not os.path.isdir(os.path.join(root, "train")):
        raise BadInput(f"{root}: no folder train/ in it; images are looked for in train/CLASS/ and val/CLASS/")
    found = {}
    for split in ("train", "val"):
        folder = os.path.join(root, split)
        if os.path.isdir(folder):
            try:
                paths = find_images(folder)
            except OSError as e:
                raise BadInput(f"{e.filename or folder}: cannot be listed ({e.strerror}); mend it or move it") from e
            if not paths:
                raise BadInput(f"{folder}: no images in it; put {' '.join(EXTENSIONS)} files into {split}/CLASS/")
            inside = (path[len(folder) + 1:].split(os.sep) for path in paths)
            found[split] = [(path, parts[0] if len(parts) > 1 else "") for path, parts in zip(paths, inside)]
    classes = sorted({name for _, name in found["train"]} - {""}) or [""]
    number = {name: i for i, name in enumerate(classes)}
    if "val" not in found:
        if len(found["train"]) < 2:
            raise BadInput(f"{root}: one image, and none can be held out for validation; add images or a folder val/")
        found["val"] = found["train"][::20]
        del found["train"][::20]
    return tuple(ImageSet(classes, [number.get(name, -1) for _, name in found[split]],
                          [path for path, _ in found[split]], draft=draft) for split in ("train", "val"))


# --------------------------------------------------------------------------------------------- the made data set

def made_images(seed=0, n_train=4000, n_val=1000, size=32):
    """-> (train, val): ten letters, drawn large on textured grounds; no file is read, the same seed gives the same.

    Made for masked prediction: stripes, checks, rings and shadings run on under a mask, and the letters (all mirror
    images of themselves) can be completed from a part. Colours, textures, place, size and slant are drawn without
    looking at the class, and all letters have the same ink, so neither mean colour nor texture tells the class.
    """
    classes = list("AHMOTUVWXY")
    glyphs = np.stack([glyph(letter) for letter in classes])                                         # (10, 128, 128)
    sets = []
    for stream, n in enumerate((n_train, n_val)):           # train and val never share random numbers
        rng = np.random.default_rng([seed, stream])
        labels = rng.permutation(np.arange(n) % len(classes))
        pixels = np.empty((n, size, size, 3), np.uint8)
        for i in range(0, n, 100):
            pixels[i:i + 100] = draw(glyphs, labels[i:i + 100], size, rng)
        names = [f"made {('train', 'val')[stream]} image {i}" for i in range(n)]
        sets.append(ImageSet(classes, labels.tolist(), names, pixels))
    return tuple(sets)


def glyph(letter, side=128, ink=0.2):
    """-> (side, side) float32 in 0..1: a bold letter in the middle, scaled until it covers the share `ink`."""
    big = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(big).text((2 * side, 2 * side), letter, 255, ImageFont.load_default(2 * side), "mm", stroke_width=8)
    left, top, right, bottom = big.getbbox()
    half = (np.asarray(big).mean() / 255 * big.width ** 2 / ink) ** 0.5 / 2           # half the side that gives `ink`
    x, y = (left + right) / 2, (top + bottom) / 2
    big = big.transform((side, side), Image.Transform.EXTENT, (x - half, y - half, x + half, y + half), Image.BICUBIC)
    return np.asarray(big.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255    # smooth enough to sample


def texture(rng, n, x, y):
    """-> (n, H, W) float32 in -1..1: stripes, checks, rings or a shading over the plane (x, y) in -1..1."""
    kind = rng.integers(4, size=(n, 1, 1))                  # 0 stripes, 1 checks, 2 rings, 3 shading
    angle, start_x, start_y = rng.uniform(0, 2 * np.pi, (3, n, 1, 1)).astype(np.float32)
    waves = np.where(kind == 3, 0.5, rng.uniform(4, 11, (n, 1, 1))).astype(np.float32)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    u = np.where(kind == 2, np.hypot(x - np.cos(start_x), y - np.sin(start_x)), u)    # rings round a point at radius 1
    return np.sin(u * waves + start_y) * np.where(kind == 1, np.sin(v * waves + start_x), np.float32(1))


def draw(glyphs, labels, size, rng):
    """-> (n, size, size, 3) uint8: one random picture for each label."""
    n = len(labels)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    y, x = axis[None, :, None], axis[None, None, :]                                   # (1, H, 1), (1, 1, W)
    at_x, at_y = rng.uniform(-0.2, 0.2, (2, n, 1, 1)).astype(np.float32)
    angle = rng.uniform(-0.35, 0.35, (n, 1, 1)).astype(np.float32)                    # radians, 20 degrees
    slant = rng.uniform(-0.2, 0.2, (n, 1, 1)).astype(np.float32)
    scale_x, scale_y = rng.uniform(0.8, 1.15, (2, n, 1, 1)).astype(np.float32)
    u = (np.cos(angle) * (x - at_x) + np.sin(angle) * (y - at_y)) / scale_x
    v = (np.cos(angle) * (y - at_y) - np.sin(angle) * (x - at_x)) / scale_y
    side = glyphs.shape[1]
    i, j = (np.clip((c + 1) * side / 2, 0, side - 1).astype(np.int32) for c in (v, u + slant * v))
    ink = glyphs[labels[:, None, None], i, j][..., None]                              # (n, H, W, 1), 0..1
    ground = rng.uniform(0.1, 0.9, (n, 1, 1, 3)).astype(np.float32)
    paints = rng.uniform(0, 1, (8, n, 1, 1, 3)).astype(np.float32)
    best = np.abs(paints - ground).sum(-1).argmax(0)[:, 0, 0]                         # of 8 paints the best to see
    paint = paints[best, np.arange(n)]
    depth = rng.uniform(-0.2, 0.2, (2, n, 1, 1, 3)).astype(np.float32)
    ground = ground + depth[0] * texture(rng, n, x, y)[..., None]                     # (n, H, W, 3)
    paint = paint + depth[1] * texture(rng, n, x, y)[..., None]
    return np.rint(np.clip(ground + ink * (paint - ground), 0, 1) * 255).astype(np.uint8)


# ----------------------------------------------------------------------------- transforms: PIL, driven by a generator

def sides(size):
    """A number or (height, width) -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def random_resized_crop(img, size, scale, ratio, rng):
    """-> PIL of `size`, a number or (height, width). Area share uniform in `scale`, bicubic; log-uniform aspect
    (width / height) in `ratio`, times that of `size`."""
    w, h = img.size
    height, width = sides(size)
    ratio = (ratio[0] * width / height, ratio[1] * width / height)
    for _ in range(10):
        area = w * h * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        cw, ch = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            left, top = rng.integers(w - cw + 1), rng.integers(h - ch + 1)
            break
    else:                                        # a very long picture: the largest middle part within the aspect bounds
        cw, ch = max(1, min(w, round(h * ratio[1]))), max(1, min(h, round(w / ratio[0])))
        left, top = (w - cw) // 2, (h - ch) // 2
    return img.resize((width, height), Image.BICUBIC, box=(left, top, left + cw, top + ch))


def center_crop(img, size, ratio=0.875):
    """-> PIL of `size`, a number or (height, width): the middle `ratio` of what fits, bicubic; the right size stays."""
    height, width = sides(size)
    if img.size == (width, height):
        return img                               # 32-pixel pictures would only be blurred
    w, h = img.size
    unit = min(w / width, h / height) * ratio / 2
    box = (w / 2 - unit * width, h / 2 - unit * height, w / 2 + unit * width, h / 2 + unit * height)
    return img.resize((width, height), Image.BICUBIC, box=box)


def flip(img, rng):
    """Mirror left and right, half of the time."""
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else img


def color_jitter(img, strength, rng):
    """Brightness, contrast and saturation in random order, each factor uniform in 1 - strength .. 1 + strength."""
    if strength == 0:
        return img
    for kind in rng.permutation(3):
        if kind == 0:
            other = Image.new("RGB", img.size)                                            # black: brightness
        elif kind == 1:
            other = Image.new("RGB", img.size, (round(np.asarray(img.convert("L")).mean()),) * 3)  # its mean: contrast
        else:
            other = img.convert("L").convert("RGB")                                       # itself in grey: saturation
        img = Image.blend(other, img, rng.uniform(max(0, 1 - strength), 1 + strength))
    return img


def move(img, shear_x=0, shear_y=0, right=0, down=0):
    """Shear about the middle, or shift by shares of the width and height; what comes into view is grey."""
    w, h = img.size
    numbers = (1, shear_x, -right * w - shear_x * h / 2, shear_y, 1, -down * h - shear_y * w / 2)
    return img.transform(img.size, Image.Transform.AFFINE, numbers, Image.BICUBIC, fillcolor=GREY)


RAND_AUGMENT = (  # op(img, m): m = severity, 0..1, its sign the direction; at 1 the customary extremes
    lambda img, m: ImageOps.autocontrast(img),
    lambda img, m: ImageOps.equalize(img),
    lambda img, m: ImageOps.invert(img),
    lambda img, m: img.rotate(30 * m, Image.BICUBIC, fillcolor=GREY),
    lambda img, m: ImageOps.posterize(img, max(1, 4 - int(4 * abs(m)))),                          # bits that are kept
    lambda img, m: ImageOps.solarize(img, 256 - int(256 * abs(m))),                               # invert from here on
    lambda img, m: img.point([v + int(110 * abs(m)) if v < 128 else v for v in range(256)] * 3),  # SolarizeAdd
    lambda img, m: ImageEnhance.Color(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Contrast(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Brightness(img).enhance(1 + 0.9 * m),
    lambda img, m: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * m),
    lambda img, m: move(img, shear_x=0.3 * m),
    lambda img, m: move(img, shear_y=0.3 * m),
    lambda img, m: move(img, right=0.45 * m),
    lambda img, m: move(img, down=0.45 * m),
)


def rand_augment(img, n_ops, magnitude, magnitude_std, rng):
    """RandAugment (Cubuk et al. 2020) in the form of the fine-tuning recipe (SPEC section 5: magnitude 9, std 0.5).

    n_ops operations drawn with replacement, each applied half of the time (as the recipe's code does) with its own
    magnitude ~ N(magnitude, std) within 0..10; a larger magnitude is always a stronger change.
    """
    for op in rng.integers(len(RAND_AUGMENT), size=n_ops):
        m = min(max(rng.normal(magnitude, magnitude_std), 0), 10) / 10
        sign = rng.choice((-1, 1))
        if rng.random() < 0.5:
            img = RAND_AUGMENT[op](img, sign * m)
    return img


def erase(x, probability, rng):
    """Random erasing (Zhong et al. 2020): noise in a rectangle of 2 to 33 % of a picture, in place.
    x: (B, 3, H, W) normalised -> x."""
    height, width = x.shape[-2:]
    for picture in x:
        if rng.random() < probability:
            area, aspect = height * width * rng.uniform(0.02, 1 / 3), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((3, h, w), dtype=np.float32)
            picture[:, top : top + h, left : left + w] = torch.from_numpy(noise).to(x.device)
    return x


def mix(x, y, mixup, cutmix, rng):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch with its own reverse order -> x, y.

    x (B, 3, H, W) pictures, y (B, classes) soft labels; both are mixed in the same proportion, drawn from a Beta distribution
    with parameter mixup or cutmix; 0: off. With both on a coin decides.
    """
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    if not use_cutmix and mixup == 0:
        return x, y
    keep = rng.beta(*[cutmix if use_cutmix else mixup] * 2)
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


def to_tensor(img):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(img).transpose(2, 0, 1)))


def normalise(images):
    """(..., 3, H, W) uint8 -> float32 with ImageNet's mean and std; on the device, so that bytes travel, not floats."""
    mean, std = (c.to(images.device, non_blocking=True) for c in (MEAN, STD))
    return (images.float() - mean) / std


# ------------------------------------------------------------------------- samples that depend on nothing but their key

class Views(torch.utils.data.Dataset):
    """views[(epoch, index)] -> (view uint8 (3, H, W), mask bool (T,) or (0,), label int, bad str).

    transform(img, rng) -> PIL; masker(rng) -> bool (T,), True = hidden. Both draw from a generator seeded by
    [seed, epoch, index]. An image that cannot be decoded is replaced by the next one that can, or, with replace=False
    (measuring), gives view None, which collate drops; `bad` then has a line "name: reason" for each.
    Raises BadInput when no image at all can be decoded.
    """

    def __init__(self, images, transform, seed, masker=None, replace=True):
        self.images, self.transform, self.seed, self.masker, self.replace = images, transform, seed, masker, replace

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        bad = []
        for i in range(index, index + len(self.images)):
            i %= len(self.images)
            try:
                img = self.images.load(i)
            except BadImage as e:
                bad.append(f"{self.images.names[i]}: {e}")
                if not self.replace:
                    return None, None, self.images.labels[i], bad[0]
                continue
            rng = np.random.default_rng([self.seed, epoch, i])
            view = to_tensor(self.transform(img, rng))
            mask = torch.as_tensor(self.masker(rng) if self.masker else [], dtype=torch.bool)
            return view, mask, self.images.labels[i], "\n".join(bad)
        raise BadInput(f"{bad[0]}; nor can any other of the {len(bad)} images be decoded: check the data folder")


def collate(items):
    """-> views (B, 3, H, W) uint8, masks (B, T) bool, labels (B,) int64, bad list[str]; B = 0 if no view is left."""
    bad = [line for item in items for line in item[3].splitlines()]
    kept = [item[:3] for item in items if item[0] is not None]
    if not kept:
        return torch.empty(0, 3, 0, 0).byte(), torch.empty(0, 0).bool(), torch.empty(0).long(), bad
    views, masks, labels = zip(*kept)
    return torch.stack(views), torch.stack(masks), torch.tensor(labels), bad


@functools.lru_cache(maxsize=2)                  # once an epoch, not once a sample; two, for a batch across epochs
def order(n, seed, epoch):
    """-> (n,) int64, read-only: the epoch's permutation."""
    permutation = np.random.default_rng([seed, epoch, n]).permutation(n)  # n is no index: no view uses this stream
    permutation.flags.writeable = False
    return permutation


def sample_at(k, n, seed):
    """-> (epoch, index) of the k-th sample of the whole run: epoch follows epoch, nothing is dropped between them."""
    return k // n, int(order(n, seed, k // n)[k % n])


def label_subset(labels, fraction, seed):
    """-> sorted indices of `fraction` of every class, at least one each; a function of the seed alone."""
    labels, rng = np.asarray(labels), np.random.default_rng([seed, 10])
    chosen = []
    for c in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == c))
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def batches(n, seed, start_step, steps, global_batch, accumulation, world, rank):
    """Yield this rank's micro-batches, lists of (epoch, index), for steps start_step .. steps - 1 (like range).

    For DataLoader(batch_sampler=...). Step s takes the run's samples s * global_batch .. (s + 1) * global_batch - 1,
    whatever accumulation and world are, which only cut them into blocks: 1, 8 or 16 GPUs train on the same batches,
    and a restart goes on where it was.
    """
    size, rest = divmod(global_batch, accumulation * world)
    assert size and not rest, f"batch {global_batch} does not split into {accumulation} parts on {world} processes"
    for step in range(start_step, steps):
        for micro in range(accumulation):
            first = step * global_batch + (micro * world + rank) * size
            yield [sample_at(k, n, seed) for k in range(first, first + size)]


def eval_batches(images, indices, transform, batch_size, workers=0):
    """Yield collate's tuples for images[indices] in order; epoch 0 throughout, broken images left out but reported."""
    keys = [(0, int(i)) for i in indices]
    keys = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    views = Views(images, transform, seed=0, replace=False)
    yield from torch.utils.data.DataLoader(views, batch_sampler=keys, collate_fn=collate, num_workers=workers)


# ----------------------------------------------------------------------------- python -m data.images cifar10 | imagenet

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
IMAGENET = """ImageNet-1K cannot be fetched by a script: get it from https://image-net.org, unpack and sort it into
  DIR/train/WNID/*.JPEG   1000 folders such as n01440764 (one for each inner tar), 1,281,167 images in all
  DIR/val/WNID/*.JPEG     the same 1000 folders, 50,000 images; they come unsorted, and the devkit's file
                          ILSVRC2012_validation_ground_truth.txt says which goes where"""


def cifar10(out, url, md5):
    """Fetch CIFAR-10 unless it lies in `out` already, and write out/{train,val}/{class}/NNNNN.png. Raises BadInput."""
    os.makedirs(out, exist_ok=True)
    archive = os.path.join(out, "cifar-10-python.tar.gz")
    if not os.path.exists(archive):
        download(url, archive, md5)
    elif md5_of(archive) != md5:
        raise BadInput(f"{archive}: its md5 is not {md5}; remove it and run this again")
    try:
        splits = read_cifar10(archive)
    except Exception as e:  # a strange archive makes tarfile, gzip, pickle and numpy raise nearly anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise BadInput(f"{archive}: not CIFAR-10's python archive ({reason}); remove it and run this again") from e
    for split, (pixels, names) in splits.items():
        for name in set(names):
            os.makedirs(os.path.join(out, split, name), exist_ok=True)
        for i, name in enumerate(tqdm(names, desc=split)):
            path = os.path.join(out, split, name, f"{i:05d}.png")
            if not os.path.exists(path):
                part = os.path.join(out, split, name, f".{i:05d}.part")   # hidden until whole, should this be killed
                Image.fromarray(pixels[i]).save(part, "PNG")
                os.replace(part, path)


def download(url, path, md5):
    """Fetch url to `path` by way of `path`.part, going on where a broken download stopped; no md5: unchecked. Raises BadInput."""
    part = path + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            have = have if reply.status == 206 else 0              # 200: this server can only start from the beginning
            total = have + int(reply.headers["Content-Length"]) if reply.headers["Content-Length"] else None
            with open(part, "ab" if have else "wb") as file, \
                    tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path)) as bar:
                while chunk := reply.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total and os.path.getsize(part) < total:
            raise BadInput(f"{url}: broke off at {os.path.getsize(part)} of {total} bytes; run this again to go on")
    except (OSError, http.client.HTTPException, ValueError) as e:  # no route, 404, timeout, reset, not a URL
        if getattr(e, "code", None) != 416:                        # 416: nothing lies beyond `have`, the part is whole
            raise BadInput(f"{url}: {' '.join(str(e).split()) or type(e).__name__}; run this again, "
                           f"or download the file by hand and put it at {path}") from e
    if md5 and md5_of(part) != md5:
        os.remove(part)
        raise BadInput(f"{url}: what came has not the md5 {md5}, so it was removed; run this again or check --url")
    os.replace(part, path)


def md5_of(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays and calls nothing else: a pickle from the net can ask for anything."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]                     # wherever this numpy keeps it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):                # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no picture needs")


def read_cifar10(archive):
    """-> {split: (pixels (N, 32, 32, 3) uint8, N class names)}. Members are read by name: no path in it is followed."""
    splits = {}
    with tarfile.open(archive) as tar:
        def read(member):
            return ArrayUnpickler(tar.extractfile(f"cifar-10-batches-py/{member}"), encoding="bytes").load()

        classes = [name.decode("ascii") for name in read("batches.meta")[b"label_names"]]
        if not all(re.fullmatch(r"\w+", name) for name in classes):
            raise ValueError(f"class names {classes} cannot be folders")
        for split, members in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("val", ["test_batch"])):
            parts = [read(member) for member in members]
            names = [classes[label] for part in parts for label in part[b"labels"]]
            pixels = np.concatenate([part[b"data"] for part in parts]).reshape(len(names), 3, 32, 32)
            splits[split] = pixels.transpose(0, 2, 3, 1).astype(np.uint8, order="C", casting="safe"), names
    return splits


def check_imagenet(root):
    """Print what is found below root; raise BadInput that names what is missing from ImageNet-1K."""
    train, val = open_folder(root)
    if not os.path.isdir(os.path.join(root, "val")):
        raise BadInput(f"{root}: no folder val/ in it; see the layout above")
    wrong = []
    for split, images, right in (("train", train, 1281167), ("val", val, 50000)):
        known = len(set(images.labels) - {-1})
        print(f"{split}: {len(images)} images in {known} classes")
        if known != 1000:
            wrong.append(f"{split}/ has images of {known} classes, not 1000")
        if len(images) != right:
            wrong.append(f"{split}/ has {len(images)} images, not {right}")
        if -1 in images.labels:
            wrong.append(f"{images.labels.count(-1)} images of {split}/ lie in no folder that is a class of train/")
        for i in np.linspace(0, len(images) - 1, 5).astype(int):
            try:
                images.load(i)
            except BadImage as e:
                wrong.append(f"{images.names[i]} cannot be decoded ({e})")
    if wrong:
        raise BadInput(f"{root}: {'; '.join(wrong)}; see the layout above")
    print(f"{root}: complete")


def main():
    parser = argparse.ArgumentParser(prog="python -m data.images", description="Bring images into this code's layout.")
    commands = parser.add_subparsers(dest="command", required=True)
    cifar = commands.add_parser("cifar10", help="download CIFAR-10 and write it as PNG files")
    cifar.add_argument("--out", required=True, help="folder to write train/ and val/ to; the archive is kept there too")
    cifar.add_argument("--url", default=CIFAR_URL, help="another place to fetch cifar-10-python.tar.gz from")
    cifar.add_argument("--md5", default=CIFAR_MD5, help="checksum of the archive, should the one at --url differ")
    imagenet = commands.add_parser("imagenet", help="explain ImageNet's layout, and check a folder for it")
    imagenet.add_argument("--data", help="folder with train/ and val/")
    args = parser.parse_args()
    if args.command == "cifar10":
        try:
            cifar10(args.out, args.url, args.md5.lower())
        except OSError as e:
            raise BadInput(f"{args.out}: cannot be written ({e}); make room there or give another --out") from e
        print(f"{args.out}: CIFAR-10, {args.out}/train and {args.out}/val")
    else:
        print(IMAGENET)
        if args.data:
            check_imagenet(args.data)


if __name__ == "__main__":
    run(main)

"""Data sets that need no download: images of letters, speech of an invented language, Python's own texts.

Images and speech depend on the seed alone, the text on the version of Python.
"""

import ast
import contextlib
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from common import require

RATE = 16_000  # samples a second
HOP, WINDOW, FFT = 64, 256, 512  # samples; the FFT is longer for the tail of the resonances
VOWELS, STOPS = "AEIOU", "TK"
# letter: formants F1 F2 F3 in Hz, loudness of the voice and of the noise (of a stop: of its burst)
LETTERS = {
    "A": (730, 1200, 2500, 1.0, 0.0), "E": (530, 1850, 2500, 0.9, 0.0), "I": (290, 2250, 3000, 0.7, 0.0),
    "O": (500, 900, 2450, 0.9, 0.0), "U": (320, 700, 2250, 0.7, 0.0), "L": (360, 1100, 2800, 0.5, 0.0),
    "M": (250, 1000, 2100, 0.4, 0.0), "N": (260, 1550, 2600, 0.4, 0.0), "R": (430, 1250, 1650, 0.6, 0.0),
    "S": (4300, 5600, 6600, 0.0, 0.3), "F": (1400, 3600, 6200, 0.0, 0.15), "Z": (280, 1800, 5200, 0.35, 0.15),
    "T": (2700, 4000, 5600, 0.0, 0.5), "K": (1300, 2000, 3600, 0.0, 0.5),
}  # fmt: skip
STDLIB_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib",
    "json", "logging", "multiprocessing", "os", "sqlite3", "tkinter", "unittest", "urllib", "wsgiref", "xml",
    "xmlrpc", "zoneinfo",
)  # fmt: skip


def images(seed=0, n_train=4000, n_val=1000, size=32):
    """-> train, val, each (classes: 10 letters; labels: list of int; images: list of (size, size, 3) uint8).

    Stripes, checks, rings and shades continue under a mask, and a part of a letter tells the rest; colour,
    texture and the area of the letter do not tell the class."""
    classes = list("AHMOTUVWXY")
    glyphs = np.stack([glyph(letter) for letter in classes])  # (10, 128, 128)
    splits = []
    for stream, n in enumerate((n_train, n_val)):
        rng = np.random.default_rng([seed, stream])
        labels = rng.permutation(np.arange(n) % len(classes))
        pixels = [draw(glyphs, labels[i : i + 100], size, rng) for i in range(0, n, 100)]
        splits.append((classes, labels.tolist(), [*np.concatenate(pixels)]))
    return splits


def glyph(letter, side=128, ink=0.2):
    """-> (side, side) float32 in 0..1: a bold letter that covers the fraction `ink`."""
    big = Image.new("L", (4 * side, 4 * side))
    font = ImageFont.load_default(2 * side)
    ImageDraw.Draw(big).text((2 * side, 2 * side), letter, 255, font, "mm", stroke_width=8)
    left, top, right, bottom = big.getbbox()
    half = (np.asarray(big).mean() / 255 * big.width**2 / ink) ** 0.5 / 2  # of the side that gives `ink`
    x, y = (left + right) / 2, (top + bottom) / 2
    box = (x - half, y - half, x + half, y + half)
    small = big.transform((side, side), Image.Transform.EXTENT, box, Image.BICUBIC)
    return np.asarray(small.filter(ImageFilter.GaussianBlur(1.5)), np.float32) / 255


def texture(rng, n, x, y):
    """-> (n, H, W) float32 in -1..1: stripes, checks, rings or a shade over the plane (x, y) in -1..1."""
    kind = rng.integers(4, size=(n, 1, 1))  # 0 stripes, 1 checks, 2 rings, 3 shade
    angle, start_x, start_y = rng.uniform(0, 2 * np.pi, (3, n, 1, 1)).astype(np.float32)
    waves = np.where(kind == 3, 0.5, rng.uniform(4, 11, (n, 1, 1))).astype(np.float32)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    u = np.where(kind == 2, np.hypot(x - np.cos(start_x), y - np.sin(start_x)), u)
    return np.sin(u * waves + start_y) * np.where(kind == 1, np.sin(v * waves + start_x), np.float32(1))


def draw(glyphs, labels, size, rng):
    """-> (n, size, size, 3) uint8, one for each label."""
    n, side = len(labels), glyphs.shape[1]
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    y, x = axis[None, :, None], axis[None, None, :]  # (1, H, 1), (1, 1, W)
    center_x, center_y = rng.uniform(-0.2, 0.2, (2, n, 1, 1)).astype(np.float32)
    angle, slant = (rng.uniform(-r, r, (n, 1, 1)).astype(np.float32) for r in (0.35, 0.2))  # radians
    scale_x, scale_y = rng.uniform(0.8, 1.15, (2, n, 1, 1)).astype(np.float32)
    u = (np.cos(angle) * (x - center_x) + np.sin(angle) * (y - center_y)) / scale_x
    v = (np.cos(angle) * (y - center_y) - np.sin(angle) * (x - center_x)) / scale_y
    i, j = (np.clip((c + 1) * side / 2, 0, side - 1).astype(np.int32) for c in (v, u + slant * v))
    ink = glyphs[labels[:, None, None], i, j][..., None]  # (n, H, W, 1), 0..1
    background = rng.uniform(0.1, 0.9, (n, 1, 1, 3)).astype(np.float32)
    colors = rng.uniform(0, 1, (8, n, 1, 1, 3)).astype(np.float32)
    best = np.abs(colors - background).sum(-1).argmax(0)[:, 0, 0]  # most contrast
    color = colors[best, np.arange(n)]
    depth = rng.uniform(-0.2, 0.2, (2, n, 1, 1, 3)).astype(np.float32)
    background = background + depth[0] * texture(rng, n, x, y)[..., None]  # (n, H, W, 3)
    color = color + depth[1] * texture(rng, n, x, y)[..., None]
    return np.rint(np.clip(background + ink * (color - background), 0, 1) * 255).astype(np.uint8)


def speech(seed=0, n_train=600, n_valid=60, n_speakers=8, n_words=40):
    """-> (train, valid), each (waves: list of (N,) float32 at 16 kHz, 1 to 2.5 s; transcripts: list of str).

    Letters are resonances of a voice or of noise, glide into each other and last 60 to 160 ms; one of four
    words follows each word; utterance i has the voice of speaker i % n_speakers."""
    rng = np.random.default_rng([seed, 0])
    lexicon = draw_lexicon(rng, n_words)
    follows = [rng.choice(n_words, 4, replace=False) for _ in lexicon]
    tract = rng.permutation(np.linspace(0.87, 1.17, n_speakers))  # scales the formants
    pitch = 120 * (tract / tract.min()) ** 2 * rng.uniform(0.85, 1.15, n_speakers)  # Hz
    splits = []
    for stream, n in enumerate((n_train, n_valid), 1):
        rng = np.random.default_rng([seed, stream])
        waves, transcripts = [], []
        for i in range(n):
            seconds, tempo = rng.uniform(1.0, 1.7), rng.uniform(0.85, 1.15)
            words, letters, durations = [], [" "], [0.02]
            word = rng.integers(n_words)
            while sum(durations) < seconds:
                words.append(lexicon[word])
                letters += [*words[-1], " "]
                durations += [*np.clip(tempo * rng.uniform(0.06, 0.16, len(words[-1])), 0.06, 0.16)]
                durations.append(rng.uniform(0.04, 0.12))  # of the pause
                word = rng.choice(follows[word])
            waves.append(speak(letters, durations, tract[i % n_speakers], pitch[i % n_speakers], rng))
            transcripts.append(" ".join(words))
        splits.append((waves, transcripts))
    return splits


def draw_lexicon(rng, n):
    """-> n different words of 2 to 4 letters in which vowels and consonants alternate."""
    alphabets = list(VOWELS), [letter for letter in LETTERS if letter not in VOWELS]
    words = []
    while len(words) < n:
        start = rng.integers(2)
        word = "".join(rng.choice(alphabets[(start + k) % 2]) for k in range(rng.integers(2, 5)))
        if word not in words:
            words.append(word)
    return words


def speak(letters, durations, tract, pitch, rng):
    """-> (N,) float32: letters (" " = pause), durations in seconds, from pulses, noise and resonances."""
    ends = np.rint(np.cumsum(durations) * RATE / HOP).astype(int)
    counts = np.diff(ends, prepend=0)  # frames of each letter
    values = np.array([LETTERS.get(letter, (500, 1500, 2500, 0, 0)) for letter in letters], float)
    tracks = np.repeat(values, counts, axis=0)  # (T, 5)
    for letter, end, count in zip(letters, ends, counts):
        if letter in STOPS:
            tracks[end - count : end - count // 3, 3:] = 0  # closed for two thirds
    tracks[:, :3] = smooth(np.log(tracks[:, :3]), 15)  # 60 ms: letters colour their neighbours
    tracks[:, 3:] = smooth(tracks[:, 3:], 3)
    frames, samples = len(tracks), len(tracks) * HOP
    time = np.arange(samples, dtype=np.float32) / HOP

    def to_samples(x):  # (T,) or fewer values -> (N,)
        return np.interp(time, np.linspace(0, frames, len(x)), x).astype(np.float32)

    melody = np.linspace(1.1, 0.9, 6) * np.exp(rng.normal(0, 0.07, 6))  # falls, with accents
    phase = np.cumsum(to_samples(pitch * melody) / RATE) % 1  # glottis: opens, closes, rests
    opening = 0.5 - 0.5 * np.cos(phase * (np.pi / 0.4))
    closing = np.cos(np.clip((phase - 0.4) * (np.pi / 0.36), 0, np.pi / 2))
    flow = np.where(phase < 0.4, opening, closing)
    voice = np.diff(flow, 2, prepend=flow[[0, 0]])  # twice: brighter
    voice += 0.05 * voice.std() * rng.standard_normal(samples, np.float32)  # breath
    noise = rng.standard_normal(samples, np.float32)
    source = to_samples(tracks[:, 3]) * voice / voice.std() + to_samples(tracks[:, 4]) * noise
    padded = np.pad(source.astype(np.float32), (WINDOW // 2, FFT))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:samples:HOP]  # (T, WINDOW)
    hann = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    spectra = np.fft.rfft(windows * hann, FFT) * resonances(np.exp(tracks[:, :3]) * tract)
    pieces = np.fft.irfft(spectra, FFT).reshape(frames, FFT // HOP, HOP)
    wave = np.zeros((frames + FFT // HOP, HOP))
    for k in range(FFT // HOP):  # overlap and add
        wave[k : k + frames] += pieces[:, k]
    wave = wave.reshape(-1)[WINDOW // 2 :][:samples]
    wave *= 0.06 / wave.std()
    background = 0.06 * 10 ** rng.uniform(-2.2, -1.5) * rng.standard_normal(samples)  # 30 to 44 dB below
    return (wave + background).astype(np.float32)


def smooth(tracks, n):
    """(T, C) -> (T, C): a Hann-weighted average over n frames."""
    kernel = np.hanning(n + 2)[1:-1]
    padded = np.pad(tracks, ((n // 2, n // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in padded.T], axis=1)


def resonances(formants):
    """(T, 3) Hz -> (T, FFT // 2 + 1) complex64: responses of three resonators in series, of mean energy 1."""
    formants = np.minimum(formants, 7600)[..., None]  # (T, 3, 1)
    radius = np.exp(-np.pi * (50 + 0.07 * formants) / RATE)  # bandwidth grows with frequency
    z = np.exp(-2j * np.pi * np.arange(FFT // 2 + 1) / FFT).astype(np.complex64)
    a = (-2 * radius * np.cos(2 * np.pi * formants / RATE)).astype(np.float32)
    b = (radius**2).astype(np.float32)
    response = 1 / (1 + (a + b * z) * z).prod(axis=1)
    return response / np.sqrt((np.abs(response) ** 2).mean(axis=1, keepdims=True))


def documents():
    """-> (train, valid): lists of str, 2 MB of English that comes with Python; a tenth, by hash, is held out.

    A document is one list of paragraphs(), without repetitions. Raises UserError if there are too few."""
    seen, train, valid = set(), [], []
    for texts in paragraphs():
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(new)
        if sum(map(len, new)) >= 200:
            document = "\n".join(new) + "\n"
            split = valid if zlib.crc32(document.encode()) % 10 == 0 else train
            split.append(document)
    size = sum(map(len, train + valid))
    require(size >= 200_000, "this Python comes without its documentation; give a folder of text with --data")
    return train, valid


def paragraphs():
    """Yields lists of str: a topic of help(), or the docstrings of each module in the standard library."""
    with contextlib.suppress(ImportError):  # some systems leave it out
        from pydoc_data.topics import topics

        yield from ([topics[name].strip()] for name in sorted(topics))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for folder in ["", *STDLIB_PACKAGES]:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"], folder).glob("*.py")):
            with contextlib.suppress(OSError, SyntaxError, ValueError):
                tree = ast.parse(path.read_bytes())
                found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
                yield [text.strip() for text in found if text]

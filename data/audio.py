"""Recordings -> waves -> batches: folders or manifests of speech, clips with sound events.

python -m data.audio librispeech --splits dev-clean test-clean --out DIR    writes DIR/LibriSpeech/dev-clean/
"""

import argparse
import contextlib
import csv
import functools
import glob
import io
import itertools
import math
import os
import tarfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from common import UserError, first_process, require, run, say
from data import synthetic
from data.download import download

RATE = 16_000  # samples a second, of all waves
LIBRISPEECH = "https://www.openslr.org/resources/12"
MIN_SAMPLES = 400  # receptive field of the convolutions: a shorter wave has no frame
STRIDE = 320  # samples from frame to frame
WINDOW, OVERLAP = 3000, 250  # frames, of recordings that are heard in parts: 60 s, 5 s
ENDINGS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
AUDIO_ERRORS = (OSError, RuntimeError, ValueError, MemoryError)  # of a recording that cannot be used


class Endless(io.FileIO):
    """Hides the size of a file: by it, libsndfile shortens a WAV, and guesses how long an MP3 is."""

    def seek(self, offset, whence=0):
        return super().seek(2**40) if (offset, whence) == (0, 2) else super().seek(offset, whence)


def decode(path, count_only=False):
    """-> (N,) float32, mono (mean of the channels), or N alone, by the header if it has it; its rate."""
    with open(path, "rb") as file:
        head = file.read(4096)
    sized, empty = b"fLaC" in head or b"OggS" in head, b"data" + bytes(4)
    source = (open if sized else Endless)(path, "rb")
    if head[:4] == b"RIFF" and empty in head:  # written to a pipe, and never completed
        source = io.BytesIO(source.read().replace(empty, b"data" + b"\xff" * 4, 1))
    with source, soundfile.SoundFile(source) as file:
        file.seekable = lambda: False  # read on to the end, whatever the header says
        promised = file.frames if file.frames * file.channels < 2**28 else 0  # more is a placeholder
        if count_only and promised:
            return promised, file.samplerate
        size, blocks = 1152 if file.format == "MP3" else 2**16, []
        with contextlib.suppress(soundfile.LibsndfileError if size == 1152 else ()):  # in a last, cut frame
            while not blocks or len(blocks[-1]):
                blocks.append(file.read(size, "float32", always_2d=True).mean(1))
        x, total = np.concatenate(blocks), os.path.getsize(path)
        rest = total - source.tell() if file.format in ("FLAC", "OGG", "MP3") else 0  # others end with notes
    if len(x) < promised - file.samplerate / 4 or rest > 0.1 * total:
        raise ValueError(f"truncated, or several files in one: {len(x)} samples, and {rest} bytes are left")
    return len(x) if count_only else x, file.samplerate


def load_audio(path):
    """-> (N,) float32, mono, 16 kHz, as loud as the file. Raises AUDIO_ERRORS."""
    x, rate = decode(path)
    if rate != RATE:
        x = resample(x, rate)
    if len(x) < MIN_SAMPLES or x.min() == x.max() or not np.isfinite(x).all():
        raise ValueError("too short, silent, or with samples that are not finite")
    return x


def resample(x, rate):
    """(N,) float32 at `rate` -> (round(N * 16000 / rate),) float32: windowed sinc without delay, flat to 90 %
    of the lower Nyquist frequency, 70 dB down at 100 %."""
    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common  # output sample m is at input position m * down / up
    scale = min(1, up / down)
    half = math.ceil(45 / scale)  # 45 zero crossings a side; Kaiser beta for 70 dB
    y = np.empty(round(len(x) * RATE / rate), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, (half, half + down + 1)), 2 * half + 1)
    for phase in range(min(up, len(y))):  # outputs phase, phase + up, ... have the same filter
        first, rest = divmod(phase * down, up)
        distance = np.arange(-half, half + 1) - rest / up
        taper = np.i0(6.8 * np.sqrt(np.maximum(0, 1 - (distance / (half + 1)) ** 2)))
        taps = np.sinc(0.95 * scale * distance) * taper
        taps = (taps / taps.sum()).astype(np.float32)
        y[phase::up] = windows[first::down][: len(y[phase::up])] @ taps
    return y


def normalise(x):
    """(N,) -> (N,) float32 of mean 0 and variance 1 (eps 1e-5)."""
    x = np.asarray(x, np.float64)
    return ((x - x.mean()) / np.sqrt(x.var() + 1e-5)).astype(np.float32)


def in_windows(network, wave):
    """network(wave)[0], (1, N) -> (1, T, C). Attention needs memory for T^2, so that more than WINDOW frames
    are computed in parts, each with OVERLAP more on both sides, which are dropped."""
    frames, parts = (wave.shape[1] - MIN_SAMPLES) // STRIDE + 1, []
    starts = range(0, max(1, frames - 2 * OVERLAP), WINDOW - 2 * OVERLAP)
    for start in starts:
        stop = None if start == starts[-1] else (start + WINDOW - 1) * STRIDE + MIN_SAMPLES
        x = network(wave[:, start * STRIDE : stop])[0]
        parts.append(x[:, OVERLAP if start else 0 : -OVERLAP if stop else None])
    if len(parts) > 1:
        say_once(f"recordings over {WINDOW / 50:g} s are heard in parts of that length, which overlap")
    return torch.cat(parts, 1)


say_once = functools.cache(say)


@dataclass
class Utterances:
    names: list
    lengths: np.ndarray  # (n,) int64, samples at 16 kHz by their headers
    transcripts: list  # words, "event;event" or ""
    waves: list | None = None  # of synthetic speech
    skipped: list = field(default_factory=list)  # "path: reason"

    def __len__(self):
        return len(self.names)

    def part(self, indices):
        names, transcripts = [self.names[i] for i in indices], [self.transcripts[i] for i in indices]
        waves = self.waves and [self.waves[i] for i in indices]
        return Utterances(names, self.lengths[np.array(indices, int)], transcripts, waves, self.skipped)

    def load(self, i):
        """-> (N,) float32, normalised; N can differ from lengths[i]. Raises AUDIO_ERRORS."""
        return normalise(self.waves[i] if self.waves else load_audio(self.names[i]))


def open_data(root, train=(), valid=(), min_seconds=0.0, classes=()):
    """-> (train, valid): Utterances of the splits of a folder (see open_split); "": synthetic speech.

    Defaults: train is train/, all train-*/, train.tsv, train.csv or all; valid likewise dev, valid, val, or
    test, or every 20th of train. What is in valid is left out of train, unless both are the same."""
    if not root:
        return [
            Utterances([f"synthetic {i}" for i in range(len(w))], np.array([len(x) for x in w]), texts, w)
            for w, texts in synthetic.speech()
        ]
    require(os.path.isdir(root), f"{root}: no such folder; give the one that holds train/ and dev/")
    ends = (".csv",) if classes else ("/", "-*/", ".tsv", ".csv")
    train = train or find_splits(root, ("train",), ends) or ["train.csv" if classes else ""]
    valid = valid or find_splits(root, ("dev", "valid", "val", "validation"), ends)
    valid = valid or find_splits(root, ("test", "eval"), ends)
    options = {"min_samples": max(MIN_SAMPLES, min_seconds * RATE), "classes": classes}
    learn = open_split(root, *train, **options)
    test = open_split(root, *valid, **options) if valid else learn.part(range(0, len(learn), 20))
    taken = set() if train == valid else set(test.names)
    kept = [i for i, name in enumerate(learn.names) if name not in taken]
    require(kept, f"{root}: no utterance is left for training; add some, or choose other splits")
    held_out = ", ".join(valid) or "every 20th of it"
    say(f"{root}: training on {', '.join(train) or 'all'}; validation: {held_out}")
    return learn.part(kept), test


def open_events(root, train=(), valid=()):
    """-> (classes, train, valid): lines of classes.txt, clips with sound events as transcripts (AudioSet)."""
    classes = [line for line in read_lines(os.path.join(root, "classes.txt")) if line]
    return classes, *open_data(root, train, valid, classes=classes)


def find_splits(root, names, ends):
    """-> a list: the first folder of these names (in any case), else all folders NAME-*, else a table."""
    entries = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    patterns = [name + end for end in ends for name in names]
    found = ([name for name in entries if fnmatchcase(name.lower(), p)] for p in patterns)
    return next(filter(None, found), [])


def open_split(root, *splits, min_samples=MIN_SAMPLES, classes=()):
    """-> Utterances of folders root/split ("": root), manifests root/split.tsv or tables root/split.csv, of
    at least min_samples by their headers. Raises UserError."""
    transcripts, lengths, skipped = {}, {}, []  # by path: words, samples
    for split in splits:
        path = os.path.join(root, split)
        if classes or path.endswith(".csv"):
            transcripts |= read_events(path.removesuffix(".csv") + ".csv", classes)
        else:
            transcripts |= read_folder(path) if os.path.isdir(path) else read_manifest(path)
    for path in tqdm(transcripts, "lengths", disable=None if first_process() else True):
        try:
            count, rate = decode(path, count_only=True)
            lengths[path] = round(count * RATE / rate)
        except AUDIO_ERRORS as error:
            skipped.append(f"{path}: {error}")
    lengths = {path: samples for path, samples in lengths.items() if samples >= min_samples}
    reason = skipped[:1] or f"no {' '.join(ENDINGS)} of {min_samples / RATE:g} s or more"
    require(lengths, f"{root}/{splits[0]}: no recording can be used ({reason}); check the folder")
    words = [transcripts[path] for path in lengths]
    return Utterances(list(lengths), np.array(list(lengths.values())), words, skipped=skipped)


def read_folder(folder):
    """Recordings below a folder -> {path: words}, from lines `NAME WORDS` of *.trans.txt beside them."""
    paths, words = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True), {}
    for path in paths:
        for line in read_lines(path, "surrogateescape") if path.endswith(".trans.txt") else ():
            name, *text = line.split() or [""]
            words[os.path.join(os.path.dirname(path), name)] = " ".join(text)
    paths = sorted(path for path in paths if path.lower().endswith(ENDINGS))
    return {path: words.get(os.path.splitext(path)[0], "") for path in paths}


def read_manifest(path):
    """fairseq's NAME.tsv (a folder, then lines `PATH TAB ...`) and NAME.wrd, if there -> {path: words}."""
    stem = path.removesuffix(".tsv")
    folder, *lines = read_lines(f"{stem}.tsv", "surrogateescape") or [""]
    names = [os.path.join(os.path.dirname(stem), folder, line.split("\t")[0]) for line in lines if line]
    texts = read_lines(f"{stem}.wrd") if os.path.isfile(f"{stem}.wrd") else [""] * len(names)
    require(len(texts) == len(names), f"{stem}.tsv: {len(names)} recordings, but {len(texts)} transcripts")
    return dict(zip(names, texts))


def read_events(path, classes):
    """A table of lines `PATH,EVENT;EVENT` -> {path: "event;event", or "" if there are no classes}."""
    clips = {}
    for number, line in enumerate(csv.reader(read_lines(path)), 1):
        if line and line != ["path", "labels"]:
            events = [event.strip() for event in line[-1].strip(" ;").split(";")] if classes else []
            valid = len(line) == 2 and set(events) <= set(classes)
            require(valid, f"{path} line {number}: must be PATH,EVENT;EVENT of classes.txt")
            clips[os.path.join(os.path.dirname(path), line[0])] = ";".join(events)
    return clips


def read_lines(path, errors="replace"):
    """The stripped lines of a UTF-8 file. Other bytes become U+FFFD, or stay ("surrogateescape")."""
    require(os.path.isfile(path), f"{path}: no such file; check its name and the folder")
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        return [line.strip() for line in file]


def length_groups(lengths, max_samples, seed, epoch, max_length, sort=False):
    """-> list of (B,) int64, new ones each epoch: indices of similar lengths (clipped to max_length, samples)
    with B * the longest <= max_samples. sort: no randomness, short to long (for evaluation)."""
    rng = np.random.default_rng([seed, epoch, len(lengths)])
    lengths = np.minimum(lengths, max_length)
    noise = 0 if sort else rng.uniform(-0.05, 0.05, len(lengths))
    order = np.argsort(np.log(lengths) + noise, kind="stable")
    cuts, start, longest = [], 0, 0
    for i, n in enumerate(lengths[order].tolist()):
        longest = max(longest, n)
        if (i + 1 - start) * longest > max_samples and i > start:
            cuts.append(i)
            start, longest = i, n
    groups = np.split(order, cuts)
    return groups if sort else [groups[i] for i in rng.permutation(len(groups))]


def batches_by_length(lengths, max_samples, max_length, seed, start_step, steps, count, world, rank):
    """Yields this process's keys (epoch, i, indices) of steps start_step .. steps - 1. Each step takes the
    next `count` groups, whatever `world` is; process r takes every world-th of them from the r-th."""
    assert count % world == 0
    epochs = (length_groups(lengths, max_samples, seed, epoch, max_length) for epoch in itertools.count())
    groups = ((epoch, group) for epoch, part in enumerate(epochs) for group in part)
    for i, (epoch, group) in enumerate(itertools.islice(groups, steps * count)):
        if i >= start_step * count and i % count % world == rank:
            yield epoch, i, tuple(group.tolist())


class Batches:
    """batches[epoch, i, indices] -> {"source": (B, N) float32, "lengths", "indices": (B,) int64, "mask": bool
    (B, T) from masker(lengths, rng), True = hidden, or None, "skipped": ["name: reason"]}. Waves are random
    windows of at most max_length samples, padded with zeros or (pad=False) as long as the shortest one."""

    def __init__(self, utterances, seed, max_length, pad, masker=None):
        self.utterances, self.seed, self.max_length, self.pad = utterances, seed, max_length, pad
        self.masker, self.order = masker, np.argsort(utterances.lengths, kind="stable")

    def __getitem__(self, key):
        epoch, number, indices = key
        skipped, windows, mask = [], [], None
        loaded = [self.load(index, skipped) for index in indices]
        limit = self.max_length if self.pad else min(self.max_length, *(len(x) for _, x in loaded))
        for index, x in loaded:
            start = np.random.default_rng([self.seed, epoch, index]).integers(max(0, len(x) - limit) + 1)
            windows.append(torch.from_numpy(x[start : start + limit]))
        source = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
        lengths = torch.tensor([len(x) for x in windows])
        if self.masker:
            mask = torch.as_tensor(self.masker(lengths, np.random.default_rng([self.seed, epoch, number, 1])))
        indices = torch.tensor([index for index, _ in loaded])
        return {"source": source, "lengths": lengths, "mask": mask, "indices": indices, "skipped": skipped}

    def load(self, index, skipped):
        """-> index, wave: of this recording; if it is broken, of the next longer or else shorter one."""
        place = np.flatnonzero(self.order == index)[0]
        for i in map(int, itertools.chain(self.order[place:], self.order[:place][::-1])):
            try:
                return i, self.utterances.load(i)
            except AUDIO_ERRORS as error:
                skipped.append(f"{self.utterances.names[i]}: {error}")
        raise UserError(f"{skipped[-1]}; nor can any other recording be loaded: check the folder")


def mix(x, samples, y, p, rng):
    """Mixup of clips x (B, N), their lengths `samples` (B,) and truth y (B, classes), with probability p."""
    other = torch.from_numpy(rng.permutation(len(x)))
    keep = np.where(rng.random(len(x)) < p, rng.random(len(x)), 1.0)
    samples = torch.where(torch.from_numpy(keep < 1), samples.maximum(samples[other]), samples)
    keep = torch.from_numpy(keep).float()[:, None]
    return keep * x + (1 - keep) * x[other], samples, keep * y + (1 - keep) * y[other]


def main():
    parser = argparse.ArgumentParser("python -m data.audio", description="Download LibriSpeech (CC BY 4.0)")
    parser.add_argument("command", choices=["librispeech"])
    parser.add_argument("--splits", nargs="+", required=True, help="such as dev-clean train-clean-100")
    parser.add_argument("--out", required=True, help="folder for the archives and LibriSpeech/SPLIT/")
    args = parser.parse_args()
    for split in args.splits:
        with tarfile.open(download(f"{LIBRISPEECH}/{split}.tar.gz", args.out)) as tar:
            tar.extractall(args.out, tqdm(tar, split, unit=" files"), filter="data")


if __name__ == "__main__":
    run(main)

"""Recordings in, waves out: folders and manifests of speech, made speech, and batches that any number of GPUs draw alike.

    python -m data.audio librispeech --splits dev-clean test-clean --out DIR
                                                  fetch parts of LibriSpeech, leave them as DIR/LibriSpeech/{split}/

The walk: file -> Utterances.load (16 kHz, mono, normalised as a whole) -> window -> (B, N) float32 -> device.
A batch is a pure function of (seed, epoch, its utterances), so workers, ranks and restarts cannot change it.
"""
import argparse
import csv
import gzip
import hashlib
import itertools
import json
import math
import os
import shutil
import tarfile
import uuid
import warnings
import zlib
from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from common import BadInput, run

RATE = 16_000                                     # samples a second; everywhere behind load_audio
MIN_SAMPLES = 400                                 # receptive field of the conv encoder: less gives no frame at all
other_rates = []                                  # the first file of another rate that this process met
ENDINGS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
CACHE = ".data2vec-lengths.json"
DECODING_ERRORS = (OSError, RuntimeError, ValueError, MemoryError)      # soundfile's own are RuntimeErrors; lying headers


# ------------------------------------------------------------------------------------------------------- file -> wave

class BadAudio(Exception):
    """A recording that cannot be used; the message is a short reason without the path."""


def at_rate(frames, rate):
    """Frames at `rate` -> samples at 16 kHz."""
    return round(frames * RATE / rate)


def load_audio(path):
    """-> (N,) float32, mono, 16 kHz, as loud as the file. Raises BadAudio only.

    Several channels are averaged; another rate is converted, with one warning a process. A FLAC or WAV that was cut is
    noticed; a cut OGG or MP3 may read as a shorter recording.
    """
    import soundfile
    try:
        with open(path, "rb"), soundfile.SoundFile(path) as file:       # open() first: its errors say what is the matter
            rate, frames = file.samplerate, usable_frames(file)
            x = file.read(dtype="float32", always_2d=True)              # (N, channels)
    except BadAudio:
        raise
    except DECODING_ERRORS as e:
        raise BadAudio(reason(path, e)) from None
    if len(x) < frames:
        raise BadAudio(f"truncated: {len(x)} of {frames} frames")
    if lost := lost_bytes(path):
        raise BadAudio(f"truncated: {lost} bytes are missing at its end")
    x = x.mean(1) if x.shape[1] > 1 else x[:, 0]
    if not np.isfinite(x).all():
        raise BadAudio("NaN or infinite samples")
    if x.min() == x.max():
        raise BadAudio("silent: all samples are equal")
    if rate != RATE:
        warn_once(path, rate)
        x = resample(x, rate)
    if len(x) < MIN_SAMPLES:
        raise BadAudio(f"too short: {len(x)} samples of at least {MIN_SAMPLES}")
    return x


def lost_bytes(path):
    """Bytes that a RIFF WAVE file says its samples take, beyond its end: libsndfile takes what is there and says nothing.
    0 for all other files, and for a file written to a pipe, which does not know."""
    with open(path, "rb") as file:
        form, end = file.read(12), os.fstat(file.fileno()).st_size
        if (form[:4], form[8:]) != (b"RIFF", b"WAVE"):
            return 0
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            if head[:4] == b"data":
                return max(0, file.tell() + size - end) if size < 2 ** 32 - 2 ** 12 else 0
            file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def usable_frames(file):
    """Frames that the header promises (soundfile's SoundFile or info). Raises BadAudio."""
    if not 0 < file.frames < 2 ** 40:                                   # a FLAC written to a pipe does not know
        raise BadAudio("no samples" if file.frames <= 0 else "its header does not give the length")
    return file.frames


def reason(path, error):
    """-> short text without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if getattr(error, "code", None) == 1:                               # libsndfile: format not recognised
        return "not audio that libsndfile reads" if os.path.getsize(path) else "empty file"
    return " ".join(getattr(error, "error_string", f"{type(error).__name__}: {error}").split())


def warn_once(path, rate, show=True):
    if not other_rates:
        other_rates.append(path)
        if show:
            warnings.warn(f"{path} has {rate} Hz; this file and others like it are converted to {RATE} Hz while training, "
                          "which takes time: convert them beforehand", stacklevel=3)


def resample(x, rate):
    """(N,) float32 at `rate` -> (round(N * 16000 / rate),) float32: windowed sinc, no delay, silence beyond both ends.

    Flat to 90 % of the lower of both Nyquist frequencies, 70 dB down at 100 %.
    """
    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common                # sample m of the output lies at m * down / up of the input
    scale = min(1, up / down)                                # lower rate / input rate
    half = math.ceil(45 / scale)                             # 45 zero crossings a side; Kaiser beta for 70 dB
    x = np.pad(x, (half, half + down + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, 2 * half + 1)      # row n is centred on input sample n
    offset = np.arange(-half, half + 1)
    y = np.empty(at_rate(len(x) - 2 * half - down - 1, rate), np.float32)
    for phase in range(min(up, len(y))):                     # outputs phase, phase + up, ... share their filter
        first, rest = divmod(phase * down, up)
        at = offset - rest / up                              # input samples from the filter's middle
        window = np.i0(6.8 * np.sqrt(np.maximum(0, 1 - (at / (half + 1)) ** 2)))
        taps = np.sinc(0.95 * scale * at) * window
        taps = (taps / taps.sum()).astype(np.float32)
        part = y[phase::up]
        part[:] = windows[first::down][:len(part)] @ taps
    return y


def normalise(x):
    """(N,) -> (N,) float32 of mean 0 and variance 1, as a layer norm over the whole utterance would (eps 1e-5)."""
    x = np.asarray(x, np.float64)
    return ((x - x.mean()) / np.sqrt(x.var() + 1e-5)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- files -> Utterances

class Utterances:
    """Recordings. names: paths, or what made speech is called; lengths: (n,) int64, samples at 16 kHz; transcripts: upper
    case words or "", or sound events, joined by ";"; speakers: names or ""; waves: list of (N,) arrays, for made speech.
    bad: "path: reason" of files that the scan refused."""

    def __init__(self, names, lengths, transcripts, speakers, waves=None, bad=()):
        self.names, self.transcripts, self.speakers, self.waves = names, transcripts, speakers, waves
        self.lengths, self.bad = np.asarray(lengths, np.int64), list(bad)

    def __len__(self):
        return len(self.names)

    def part(self, indices):
        """-> the Utterances of these alone, in this order (with no bad files: they are the whole's)."""
        names, transcripts, speakers = ([v[i] for i in indices] for v in (self.names, self.transcripts, self.speakers))
        waves = None if self.waves is None else [self.waves[i] for i in indices]
        return Utterances(names, self.lengths[np.asarray(indices, np.int64)], transcripts, speakers, waves)

    def load(self, i):
        """-> (lengths[i],) float32, normalised as a whole. Raises BadAudio."""
        x = load_audio(self.names[i]) if self.waves is None else self.waves[i]
        if len(x) != self.lengths[i]:
            raise BadAudio(f"{len(x)} samples at {RATE} Hz, not the {self.lengths[i]} that its header or manifest gave"
                           " (a manifest must count them at that rate; the folder alone needs no counts)")
        return normalise(x)


def open_folder(root, train=(), valid=(), min_seconds=0.0, show=True):
    """-> (train, valid): Utterances of the named splits of `root`, each a folder or a manifest NAME.tsv (see open_split).

    Splits that are not named: train is train/, else all train-*/, else train.tsv, else root itself; valid is dev/, valid/
    or val/, else all dev-*/ (valid-*/, val-*/), else dev.tsv, valid.tsv or val.tsv, else every 20th utterance of train is
    held out; or, where there are no such folders and manifests, the clips of train.csv and valid.csv (see open_events),
    whose labels are left aside. Files of valid are never in train. Both leave out what is shorter than min_seconds.
    Raises BadInput.
    """
    if not os.path.isdir(root):
        raise BadInput(f"{root}: no such folder; give the one that holds train/ and dev/, or recordings")
    least = max(MIN_SAMPLES, round(min_seconds * RATE))
    if not (train or valid or find_splits(root, "train")) and os.path.isfile(os.path.join(root, "train.csv")):
        sets = [long_enough(part, root, least) for part in open_events(root, show=show)[1:]]
        for part in sets:
            part.transcripts = [""] * len(part)
        return tuple(sets)
    train = list(train) or find_splits(root, "train") or [""]
    valid = list(valid) or find_splits(root, "dev", "valid", "val")
    one = concatenate([open_split(root, split, least, show) for split in train])
    if valid:
        two = concatenate([open_split(root, split, least, show) for split in valid])
        names = set(two.names)
        kept = [i for i, name in enumerate(one.names) if name not in names]
        if not kept:
            raise BadInput(f"{root}: every utterance of the training splits is in {' '.join(valid)}, too; choose others")
    else:
        if len(one) < 2:
            raise BadInput(f"{root}: one utterance, and none can be held out for validation; add some, or a folder dev/")
        two, kept = one.part(range(0, len(one), 20)), [i for i in range(len(one)) if i % 20]
    bad, one = one.bad, one.part(kept)
    one.bad = bad
    return one, two


def find_splits(root, *names):
    """-> the splits that are there under these names: a folder, else folders NAME-*, else a manifest; or []."""
    inside = sorted(os.listdir(root))
    folders = [name for name in inside if os.path.isdir(os.path.join(root, name))]
    found = [[name] for name in names if name in folders]
    found += [[name for name in folders if name.startswith(f"{start}-")] for start in names]
    found += [[name] for name in names if f"{name}.tsv" in inside]
    return next((splits for splits in found if splits), [])


def concatenate(sets):
    lists = ([value for s in sets for value in getattr(s, key)] for key in ("names", "transcripts", "speakers", "bad"))
    names, transcripts, speakers, bad = lists
    return Utterances(names, np.concatenate([s.lengths for s in sets]), transcripts, speakers, bad=bad)


def open_split(root, split, min_samples=MIN_SAMPLES, show=True):
    """-> Utterances of root/split, or of the manifest root/split.tsv; split "" is root itself. Raises BadInput.

    A folder: every recording below it, sorted; a transcript is a line `STEM WORDS` of any *.trans.txt below it; the speaker
    is the first folder of speaker/chapter/file. show: a progress bar while lengths are read, which is needed only once.
    """
    folder = os.path.join(root, split) if split else str(root)
    if os.path.isdir(folder):
        names, lengths, transcripts, speakers, bad = read_folder(folder, show)
    elif os.path.isfile(folder + ".tsv"):
        names, lengths, transcripts, speakers = read_manifest(folder)
        bad = []
    else:
        raise BadInput(f"{root}: neither a folder {split}/ nor a manifest {split}.tsv in it; check the name of the split")
    return long_enough(Utterances(names, lengths, transcripts, speakers, bad=bad), folder, min_samples)


def long_enough(found, folder, min_samples):
    """-> the Utterances without those shorter than min_samples, which `bad` tells. Raises BadInput if none is left."""
    short, bad = found.lengths < MIN_SAMPLES, found.bad
    bad += [f"{found.names[i]}: too short: {found.lengths[i]} samples of at least {MIN_SAMPLES}" for i in np.flatnonzero(short)]
    if (brief := (found.lengths < min_samples) & ~short).any():
        bad += [f"{folder}: {brief.sum()} recordings shorter than {min_samples / RATE:g} s (--min_seconds)"]
        short |= brief
    if short.all():
        some = f"no recording that can be used ({bad[0]})" if bad else f"no recordings ({' '.join(ENDINGS)})"
        raise BadInput(f"{folder}: {some}; put audio there or choose another split")
    found = found.part(np.flatnonzero(~short))
    found.bad = bad
    return found


def read_folder(folder, show):
    """-> names, lengths, transcripts, speakers, bad: what open_split says, before anything is dropped for its length."""
    try:
        paths = find_files(folder, (*ENDINGS, ".trans.txt"))
    except OSError as e:
        raise BadInput(f"{e.filename or folder}: cannot be listed ({e.strerror}); mend it or move it") from e
    texts = [path for path in paths if path.lower().endswith(".trans.txt")]
    words, anywhere = {}, {}                                     # a transcript beside the recording goes before one elsewhere
    for path in texts:
        for line in read_lines(path):
            stem, _, text = line.strip().partition(" ")
            words[os.path.dirname(path), stem] = anywhere[stem] = " ".join(text.upper().split())
    lengths, bad = scan(folder, sorted(set(paths) - set(texts)), show)
    bad, paths = [f"{path}: {why}" for path, why in bad.items()], list(lengths)
    places = [(os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]) for path in paths]
    count = Counter(stem for _, stem in places)
    transcripts = [words.get((at, stem), anywhere.get(stem, "") if count[stem] == 1 else "") for at, stem in places]
    speakers = [speaker_of(below(folder, path)) for path in paths]
    return paths, [lengths[path] for path in paths], transcripts, speakers, bad


def below(folder, path):
    """-> path as seen from folder (os.path.relpath does the same in 10 times the time)."""
    return path[len(os.path.join(folder, "")):]


def speaker_of(path):
    parts = path.split(os.sep)
    return parts[0] if len(parts) == 3 else ""


def find_files(folder, endings):
    """-> sorted paths of the files below `folder` with one of these endings; hidden names are passed over."""
    found, folders, seen = [], [folder], set()
    while folders:
        stat = os.stat(place := folders.pop())
        if (stat.st_dev, stat.st_ino) in seen:                            # a link back to a folder above
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.lower().endswith(endings):
                    found.append(entry.path)
    return sorted(found)


def read_lines(path):
    """-> the lines of a UTF-8 text file, with or without a newline at its end. Raises BadInput."""
    try:
        with open(path, "rb") as file:
            lines = file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); mend it or move it") from e
    texts = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            texts.append(line.decode("utf-8").rstrip("\r"))
        except UnicodeDecodeError:
            raise BadInput(f"{path} line {number}: not UTF-8; convert the file") from None
    return texts


def read_manifest(stem):
    """stem.tsv, with words from stem.wrd or letters from stem.ltr -> names, lengths, transcripts, speakers.

    The first line is the folder of the recordings (if relative, seen from the manifest's), the others `path TAB frames`.
    No recording is opened: frames are taken for samples at 16 kHz, and load() finds out where they are not.
    """
    lines = read_lines(manifest := stem + ".tsv")
    while lines and not lines[-1].strip():
        lines.pop()
    folder = os.path.join(os.path.dirname(manifest), lines[0].strip()) if lines else ""
    if not os.path.isdir(folder):
        raise BadInput(f"{manifest} line 1: names no folder that is there; put the folder of the recordings on it")
    paths, lengths = [], []
    for number, line in enumerate(lines[1:], 2):
        path, _, frames = line.partition("\t")
        if not path or not frames.strip().isdecimal() or int(frames) >= 2 ** 40:
            raise BadInput(f"{manifest} line {number}: not PATH, a tab, and the number of frames; mend the line")
        paths.append(path)
        lengths.append(int(frames))
    transcripts = [""] * len(paths)
    for ending in (".ltr", ".wrd"):                              # words go before letters
        if os.path.isfile(stem + ending):
            transcripts = read_lines(stem + ending)
            if len(transcripts) != len(paths):
                raise BadInput(f"{stem + ending}: {len(transcripts)} lines for the {len(paths)} recordings of {manifest}; "
                               "write both anew")
            if ending == ".ltr":
                transcripts = ["".join(text.split()).replace("|", " ") for text in transcripts]
    transcripts = [" ".join(text.upper().split()) for text in transcripts]
    return [os.path.join(folder, path) for path in paths], lengths, transcripts, [speaker_of(path) for path in paths]


def open_events(root, train=(), valid=(), show=True):
    """-> (classes, train, valid): clips with sound events, several a clip (AudioSet); transcripts holds "event;event".

    root/classes.txt names the classes, one a line. root/train.csv and root/valid.csv, else eval.csv (or the files named, with
    or without .csv), have a line `path,event;event` for each clip, the path seen from root, quoted where it holds a comma;
    a first line `path,labels` is passed over. Clips of valid are never in train, unless both are the same files.
    Raises BadInput; a clip that is not there or cannot be opened is only named in `bad`, if there are others.
    """
    if not os.path.isfile(place := os.path.join(root, "classes.txt")):
        raise BadInput(f"{place}: no such file; write the names of the classes into it, one a line")
    known = {}
    for number, line in enumerate(read_lines(place), 1):
        if (name := line.strip()) in known or ";" in name:
            wrong = f"{name!r} stands on line {known[name]}, too" if name in known else f"{name!r} holds a ;, which separates events"
            raise BadInput(f"{place} line {number}: {wrong}; mend the list")
        if name:
            known[name] = number
    named = list(train) or ["train"], list(valid) or ["valid" if os.path.isfile(os.path.join(root, "valid.csv")) else "eval"]
    tables = [[os.path.join(root, name.removesuffix(".csv") + ".csv") for name in names] for names in named]
    one, two = ({path: events for table in part for path, events in read_events(root, table, known).items()} for part in tables)
    one = {path: events for path, events in one.items() if path not in two or tables[0] == tables[1]}
    lengths, bad = scan(root, sorted(one | two), show, whole=False)
    bad |= {path: f"too short: {n} samples of at least {MIN_SAMPLES}" for path, n in lengths.items() if n < MIN_SAMPLES}
    sets = []
    for part, clips in zip(tables, (one, two)):
        names, lost = [path for path in clips if path not in bad], [f"{path}: {bad[path]}" for path in clips if path in bad]
        if not names:
            some = f"none of its clips can be used ({lost[0]})" if lost else "no clips of its own"
            raise BadInput(f"{part[0]}: {some}; the paths in it are seen from {root}")
        events = [clips[path] for path in names]
        sets.append(Utterances(names, [lengths[path] for path in names], events, [""] * len(names), bad=lost))
    return list(known), *sets


def read_events(root, table, known):
    """-> {path: "event;event"} of a CSV file with lines `path,event;event`, events all `known`. Raises BadInput."""
    if not os.path.isfile(table):
        raise BadInput(f"{table}: no such file; write a line PATH,EVENT;EVENT into it for each clip, or name another")
    clips, rows = {}, csv.reader(read_lines(table), strict=True)
    try:
        for row in rows:
            path, labels = (value.strip() for value in row) if len(row) == 2 else ("", "")
            if not row or not clips and (path, labels) == ("path", "labels"):
                continue
            events = [event.strip() for event in labels.split(";") if event.strip()]
            wrong = [f"{event!r} is not in classes.txt; add it there, or mend the line" for event in events if event not in known]
            if not path or not events:
                wrong = ["not PATH,EVENT;EVENT with one event or more; mend the line, with quotes around what holds a comma"]
            elif os.path.join(root, path) in clips:
                wrong = [f"{path} has a line already; write all its events on one"]
            elif os.path.isabs(path):
                wrong = [f"{path} is not seen from {root}; write the path from there on"]
            if wrong:
                raise BadInput(f"{table} line {rows.line_num}: {wrong[0]}")
            clips[os.path.join(root, path)] = ";".join(dict.fromkeys(events))
    except csv.Error as e:
        raise BadInput(f"{table} line {rows.line_num}: not CSV ({e}); mend the line") from None
    return clips


def scan(folder, paths, show, whole=True):
    """-> {path: samples at 16 kHz}, {path: reason} of what cannot be opened. Each file is opened once, ever.

    What was found is kept in the folder or, if that is read-only, in the user's cache: relative path -> size, mtime,
    frames, rate; if these are the whole folder's recordings, what it no longer holds is forgotten. Ranks may scan at the
    same time: each writes the whole under a name of its own, then renames.
    """
    import soundfile
    places, known = cache_files(folder), {}
    for place in places:
        try:
            with open(place, encoding="utf-8") as file:
                known.update(json.load(file))
        except (OSError, ValueError, TypeError, RecursionError):          # absent or damaged: the files know better
            pass
    found, bad, todo = {}, {}, []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as e:                                              # a link to nothing
            bad[path] = e.strerror
            continue
        key, stamp = below(folder, path), [stat.st_size, stat.st_mtime_ns]
        entry = known.get(key)
        if isinstance(entry, list) and len(entry) == 4 and entry[:2] == stamp and all(type(v) is int and v >= 0 for v in entry) and entry[3]:
            found[key] = entry
        else:
            todo.append((path, key, stamp))
    for path, key, stamp in tqdm(todo, desc=f"lengths in {folder}", unit=" files", disable=not (show and todo)):
        try:
            info = soundfile.info(path)
            found[key] = [*stamp, usable_frames(info), info.samplerate]
        except BadAudio as e:
            bad[path] = str(e)
        except DECODING_ERRORS as e:
            bad[path] = reason(path, e)
    kept = found if whole else known | found
    if kept != known:
        any(write_cache(place, kept) for place in places)                 # the first that can be written
    opened = {path: found[key] for path in paths if (key := below(folder, path)) in found}
    for path, (_, _, _, rate) in opened.items():
        if rate != RATE:
            warn_once(path, rate, show)                                   # here, so that no worker has to
    return {path: at_rate(frames, rate) for path, (_, _, frames, rate) in opened.items()}, bad


def cache_files(folder):
    """-> where lengths may be kept: in the folder, else among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.abspath(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return os.path.join(folder, CACHE), os.path.join(home, "data2vec", name + ".json")


def write_cache(path, found):
    """-> whether it could be written."""
    part = f"{path}.{uuid.uuid4().hex}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(part, "w", encoding="utf-8") as file:
                json.dump(found, file)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.remove(part)
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------- batches that depend on nothing but their key

def epoch_batches(lengths, max_samples, seed, epoch, max_length, sort=False):
    """-> list of (B,) int64: every utterance once, similar lengths together, B * the longest <= max_samples or B = 1.

    Lengths in samples, clipped to max_length. They are sorted with 5 % of noise, so that the composition of the batches
    changes each epoch, cut, and shuffled. sort: without noise and shuffling, short to long (for measuring).
    """
    rng = np.random.default_rng([seed, epoch, len(lengths)])             # no index: no window is drawn from this stream
    lengths = np.minimum(lengths, max_length)
    noise = 0 if sort else rng.uniform(-0.05, 0.05, len(lengths))
    order = np.argsort(np.log(lengths) + noise, kind="stable")
    cuts, start, longest = [], 0, 0
    for i, n in enumerate(lengths[order].tolist()):
        longest = max(longest, n)
        if (i + 1 - start) * longest > max_samples and i > start:
            cuts.append(i)
            start, longest = i, n
    found = np.split(order, cuts)
    return found if sort else [found[i] for i in rng.permutation(len(found))]


def batches(lengths, max_samples, max_length, seed, start_step, steps, count, world, rank):
    """Yield this rank's micro-batches, keys (epoch, i, indices), for steps start_step .. steps - 1 (like range).

    The run's micro-batches are those of its epochs, one after the other, and i is the number in it. Step s takes
    s * count .. (s + 1) * count - 1, whatever the number of processes is, and rank r every world-th of them from its r-th.
    """
    assert count % world == 0, f"{count} micro-batches a step do not split among {world} processes"
    i, epoch = 0, 0
    while i < steps * count:
        found = epoch_batches(lengths, max_samples, seed, epoch, max_length)
        for k in range(max(0, start_step * count - i), min(len(found), steps * count - i)):
            if (i + k) % count % world == rank:
                yield epoch, i + k, tuple(found[k].tolist())
        i, epoch = i + len(found), epoch + 1


class Batches(torch.utils.data.Dataset):
    """batches[(epoch, i, indices)] -> dict(source (B, N) float32, lengths (B,) int64, mask (B, T) bool or None, indices (B,)
    int64, bad list[str]), for DataLoader(batch_size=None, sampler=batches(...)).

    Of each utterance, normalised as a whole, comes a random window (from [seed, epoch, index]). pad=False: all have the
    length N of the shortest, at most max_length. pad=True: at most max_length, zeros behind up to N, the longest; `lengths`
    tells. masker(lengths, rng) -> bool (B, T), True = hidden, draws from [seed, epoch, i, 1].
    A recording that cannot be loaded is replaced by the next longer one that can, else by the next shorter one (repeated
    up to N if pad=False); `bad` has "name: reason" for each, `indices` what was taken. Raises BadInput if none can be loaded.
    """

    def __init__(self, utterances, seed, max_length, pad, masker=None):
        self.utterances, self.seed, self.max_length, self.pad, self.masker = utterances, seed, max_length, pad, masker
        self.order = np.argsort(utterances.lengths, kind="stable")
        self.place = np.argsort(self.order)                               # order[place[i]] == i

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, key):
        epoch, number, indices = key
        bad, waves, taken = [], [], []
        limit = self.max_length                                           # padded: whole, also what stands in for another
        if not self.pad:
            limit = min(limit, int(self.utterances.lengths[list(indices)].min()))
        for index in indices:
            x, index = self.load(int(index), bad)
            start = np.random.default_rng([self.seed, epoch, index]).integers(max(0, len(x) - limit) + 1)
            x = x[start:start + limit]
            waves.append(x if self.pad else np.resize(x, limit))          # np.resize repeats, and only what is too short
            taken.append(index)
        lengths = torch.tensor([len(x) for x in waves])
        source = np.zeros((len(waves), max(map(len, waves))), np.float32)
        for row, x in zip(source, waves):
            row[:len(x)] = x
        mask = None
        if self.masker:
            mask = torch.as_tensor(self.masker(lengths, np.random.default_rng([self.seed, epoch, number, 1])))
        return {"source": torch.from_numpy(source), "lengths": lengths, "mask": mask, "indices": torch.tensor(taken), "bad": bad}

    def load(self, index, bad):
        """-> wave of `index`, or of the first in its stead that can be loaded, and its index; adds to `bad`."""
        place = self.place[index]
        for i in itertools.chain(self.order[place:], self.order[:place][::-1]):
            try:
                return self.utterances.load(int(i)), int(i)
            except BadAudio as e:
                bad.append(f"{self.utterances.names[i]}: {e}")
        raise BadInput(f"{bad[-1]}; nor can any other of the {len(self)} recordings be loaded: check the data folder")


def mix(x, samples, y, p, rng):
    """Mixup of a batch of padded clips with a shuffle of its own: each with probability p, in a proportion of its own.

    x (B, N) waves, samples (B,) their lengths, y (B, classes) truth -> the same of the mixtures, as long as the longer of both.
    """
    other = torch.from_numpy(rng.permutation(len(x)))
    keep = np.where(rng.random(len(x)) < p, rng.random(len(x)), 1.0)
    samples = torch.where(torch.from_numpy(keep < 1), samples.maximum(samples[other]), samples)
    keep = torch.from_numpy(keep).float()[:, None]
    return keep * x + (1 - keep) * x[other], samples, keep * y + (1 - keep) * y[other]


# ------------------------------------------------------------------------------------------------------ the made speech

LETTERS = {  # formants F1 F2 F3 in Hz, loudness of voice and of noise; of a stop, which is silent at first, its burst
    "A": (730, 1200, 2500, 1.0, 0.0), "E": (530, 1850, 2500, 0.9, 0.0), "I": (290, 2250, 3000, 0.7, 0.0),
    "O": (500, 900, 2450, 0.9, 0.0), "U": (320, 700, 2250, 0.7, 0.0), "L": (360, 1100, 2800, 0.5, 0.0),
    "M": (250, 1000, 2100, 0.4, 0.0), "N": (260, 1550, 2600, 0.4, 0.0), "R": (430, 1250, 1650, 0.6, 0.0),
    "S": (4300, 5600, 6600, 0.0, 0.3), "F": (1400, 3600, 6200, 0.0, 0.15), "Z": (280, 1800, 5200, 0.35, 0.15),
    "T": (2700, 4000, 5600, 0.0, 0.5), "K": (1300, 2000, 3600, 0.0, 0.5),
}
VOWELS, STOPS = "AEIOU", "TK"
HOP, WINDOW, FFT = 64, 256, 512                  # samples: 4 ms a frame; the rest of the FFT takes the resonances' tail


def made_speech(seed=0, n_train=600, n_valid=60, n_speakers=8, n_words=40):
    """-> (train, valid): Utterances of 1 to 2.5 s in a made language; no file is read, the same seed gives the same.

    Speech-like where masked prediction needs it: letters are resonances of a voice or of noise that glide into each other
    and last 60 to 160 ms, so that a hidden 20 ms frame can be completed from beside it; and the words come from a small
    lexicon in which each is followed by one of four, so that a hidden letter can be guessed from the others. Speakers differ
    in pitch and in the length of the vocal tract, every utterance in tempo, melody and background noise.
    Transcripts are the letters spoken.
    """
    rng = np.random.default_rng([seed, 0])
    lexicon = made_lexicon(rng, n_words)
    follows = [rng.choice(n_words, min(4, n_words), replace=False) for _ in lexicon]
    tract = rng.permutation(np.linspace(0.87, 1.17, n_speakers))                  # scales the formants
    pitch = 120 * (tract / tract.min()) ** 2 * rng.uniform(0.85, 1.15, n_speakers)            # Hz
    sets = []
    for stream, n in enumerate((n_train, n_valid), 1):       # train and valid never share random numbers
        rng = np.random.default_rng([seed, stream])
        waves, transcripts, speakers = [], [], []
        for i in range(n):
            speaker, seconds, tempo = i % n_speakers, rng.uniform(1.0, 1.7), rng.uniform(0.85, 1.15)
            words, letters, durations, word = [], [" "], [0.02], rng.integers(n_words)
            while sum(durations) < seconds:                  # the last word may take it to 2.5 s
                words.append(lexicon[word])
                letters += [*words[-1], " "]
                durations += [*np.clip(tempo * rng.uniform(0.06, 0.16, len(words[-1])), 0.06, 0.16), rng.uniform(0.04, 0.12)]
                word = rng.choice(follows[word])
            waves.append(speak(letters, durations, tract[speaker], pitch[speaker], rng))
            transcripts.append(" ".join(words))
            speakers.append(f"made {speaker}")
        names = [f"made {('train', 'valid')[stream - 1]} utterance {i}" for i in range(n)]
        sets.append(Utterances(names, [len(x) for x in waves], transcripts, speakers, waves))
    return tuple(sets)


def made_lexicon(rng, n):
    """-> n different words of 2 to 4 letters in which vowels and consonants take turns."""
    consonants, words = [letter for letter in LETTERS if letter not in VOWELS], []
    while len(words) < n:
        start = rng.integers(2)
        word = "".join(rng.choice(consonants if (start + k) % 2 else list(VOWELS)) for k in range(rng.integers(2, 5)))
        if word not in words:
            words.append(word)
    return words


def speak(letters, durations, tract, pitch, rng):
    """-> (N,) float32: letters (" " = pause) of these durations in seconds, said by a source and a filter.

    The source is a train of glottal pulses and noise; short spectra of it are multiplied by three resonances.
    """
    ends = np.rint(np.cumsum(durations) * RATE / HOP).astype(int)
    counts = np.diff(ends, prepend=0)                                             # frames a letter
    rows = np.array([LETTERS.get(letter, (500, 1500, 2500, 0, 0)) for letter in letters], float)
    tracks = np.repeat(rows, counts, axis=0)                                      # (T, 5)
    for letter, end, count in zip(letters, ends, counts):
        if letter in STOPS:
            tracks[end - count:end - count // 3, 3:] = 0                          # closed for two thirds
    tracks[:, :3] = smooth(np.log(tracks[:, :3]), 15)                             # 60 ms: letters colour their neighbours
    tracks[:, 3:] = smooth(tracks[:, 3:], 3)
    frames, samples = len(tracks), len(tracks) * HOP
    at = np.arange(samples, dtype=np.float32) / HOP

    def spread(values):                                                           # (T,) or fewer -> (N,)
        return np.interp(at, np.linspace(0, frames, len(values)), values).astype(np.float32)

    melody = np.linspace(1.1, 0.9, 6) * np.exp(rng.normal(0, 0.07, 6))            # falls, with accents
    phase = np.cumsum(spread(pitch * melody) / RATE) % 1
    flow = np.where(phase < 0.4, 0.5 - 0.5 * np.cos(phase * (np.pi / 0.4)),       # glottis opens, shuts faster, stays shut
                    np.cos(np.clip((phase - 0.4) * (np.pi / 0.36), 0, np.pi / 2)))
    voice = np.diff(flow, 2, prepend=flow[[0, 0]])                                # twice: brighter, all resonances sound
    voice += 0.05 * voice.std() * rng.standard_normal(samples, np.float32)        # breath
    noise = rng.standard_normal(samples, np.float32)
    source = spread(tracks[:, 3]) * voice / voice.std() + spread(tracks[:, 4]) * noise

    padded = np.pad(source.astype(np.float32), (WINDOW // 2, FFT))
    cut = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:samples:HOP]  # (T, WINDOW)
    spectra = np.fft.rfft(cut * np.hanning(WINDOW + 1)[:-1].astype(np.float32), FFT) * resonances(np.exp(tracks[:, :3]) * tract)
    pieces = np.fft.irfft(spectra, FFT).reshape(frames, FFT // HOP, HOP)
    wave = np.zeros((frames + FFT // HOP, HOP))
    for k in range(FFT // HOP):                                                   # overlap and add
        wave[k:k + frames] += pieces[:, k]
    wave = wave.reshape(-1)[WINDOW // 2:][:samples]
    wave *= 0.06 / wave.std()
    return (wave + 0.06 * 10 ** rng.uniform(-2.2, -1.5) * rng.standard_normal(samples)).astype(np.float32)    # 30 to 44 dB


def smooth(tracks, n):
    """(T, C) -> (T, C): every column averaged over n frames, by a Hann window."""
    kernel = np.hanning(n + 2)[1:-1]
    padded = np.pad(tracks, ((n // 2, n // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in padded.T], axis=1)


def resonances(formants):
    """(T, 3) Hz -> (T, FFT // 2 + 1) complex64: responses of three resonators in series, of mean energy 1."""
    formants = np.minimum(formants, 7600)[..., None]                              # (T, 3, 1)
    radius = np.exp(-np.pi * (50 + 0.07 * formants) / RATE)                       # bandwidth grows with frequency
    z = np.exp(-2j * np.pi * np.arange(FFT // 2 + 1) / FFT).astype(np.complex64)
    a, b = (-2 * radius * np.cos(2 * np.pi * formants / RATE)).astype(np.float32), (radius ** 2).astype(np.float32)
    response = 1 / (1 + (a + b * z) * z).prod(axis=1)
    return response / np.sqrt((np.abs(response) ** 2).mean(axis=1, keepdims=True))


# ---------------------------------------------------------------------------------------- python -m data.audio librispeech

LIBRISPEECH_URL = "https://www.openslr.org/resources/12"
LIBRISPEECH_MD5 = {
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1", "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9", "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522", "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}


def librispeech(out, split, url, md5):
    """Fetch a split of LibriSpeech unless it is there already, and leave it as out/LibriSpeech/{split}. Raises BadInput."""
    from data.images import download, md5_of
    target, archive = os.path.join(out, "LibriSpeech", split), os.path.join(out, f"{split}.tar.gz")
    if os.path.isdir(target):
        return
    os.makedirs(out, exist_ok=True)
    if not os.path.exists(archive):
        download(f"{url.rstrip('/')}/{split}.tar.gz", archive, md5)
    elif md5_of(archive) != md5:
        raise BadInput(f"{archive}: its md5 is not {md5}; remove it and run this again")
    part = os.path.join(out, f".{split}.part")                            # hidden until whole, should this be killed
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm(tar, desc=split, unit=" files"):
                unpack(tar, member, split, part)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise BadInput(f"{archive}: not LibriSpeech's {split} ({e}); remove it and run this again") from e
    whole = os.path.join(part, "LibriSpeech")
    if not os.path.isdir(os.path.join(whole, split)):
        shutil.rmtree(part, ignore_errors=True)
        raise BadInput(f"{archive}: no LibriSpeech/{split}/ in it; remove it and run this again")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    for name in sorted(os.listdir(whole), key=lambda name: name == split):    # the split last: it says that all is done
        os.replace(os.path.join(whole, name), os.path.join(out, "LibriSpeech", name))
    shutil.rmtree(part)


def unpack(tar, member, split, part):
    """Write one file of the archive below `part`. Raises ValueError for what LibriSpeech's archives do not hold."""
    place = PurePosixPath(member.name)
    known = place.parts[:1] == ("LibriSpeech",) and (len(place.parts) <= 2 or place.parts[1] == split)
    if not known or ".." in place.parts or not (member.isfile() or member.isdir()):
        raise ValueError(f"it holds {member.name!r}")                     # no link is made, so no path leads outside
    if member.isfile():
        path = os.path.join(part, *place.parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tar.extractfile(member) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file)


def main():
    parser = argparse.ArgumentParser(prog="python -m data.audio", description="Bring speech into this code's layout.")
    commands = parser.add_subparsers(dest="command", required=True)
    libri = commands.add_parser("librispeech", formatter_class=argparse.RawTextHelpFormatter,
                                help="download parts of LibriSpeech (CC BY 4.0) and unpack them")
    libri.add_argument("--splits", nargs="+", required=True, metavar="SPLIT", help="\n".join(LIBRISPEECH_MD5))
    libri.add_argument("--out", required=True, help="folder to write LibriSpeech/SPLIT/ to; the archives are kept beside it,\n"
                       "and are of no use once they are unpacked")
    libri.add_argument("--url", default=LIBRISPEECH_URL, help=argparse.SUPPRESS)        # for tests and mirrors
    libri.add_argument("--md5", nargs="+", default=[], help=argparse.SUPPRESS)          # of the splits, in order
    args = parser.parse_args()
    if unknown := [split for split in args.splits if split not in LIBRISPEECH_MD5]:
        raise BadInput(f"--splits {unknown[0]}: no such part; choose from {', '.join(LIBRISPEECH_MD5)}")
    for i, split in enumerate(args.splits):
        try:
            librispeech(args.out, split, args.url, args.md5[i].lower() if i < len(args.md5) else LIBRISPEECH_MD5[split])
        except OSError as e:
            raise BadInput(f"{args.out}: cannot be written ({e}); make room there or give another --out") from e
        print(f"{os.path.join(args.out, 'LibriSpeech', split)}: there")


if __name__ == "__main__":
    run(main)

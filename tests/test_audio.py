"""data/audio.py: decoding, folders and manifests, the cache, batches, the made speech, and the command (local server)."""
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common import BadInput
from data import audio as A

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test touches the user's cache, and each sees the first file of another rate."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(A, "other_rates", [])


def wave(n=4000, rate=16000, hz=440.0, seed=0):
    """A tone in a little noise."""
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(n) / rate) + 0.01 * np.random.default_rng(seed).standard_normal(n)


def write(path, x=None, rate=16000, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave() if x is None else x, rate, **options)
    return path


def reason(path):
    with pytest.raises(A.BadAudio) as error:
        A.load_audio(path)
    assert str(path) not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("ending, tolerance", [("wav", 4e-5), ("flac", 4e-5), ("ogg", 0.05), ("mp3", 0.1)])
def test_formats(tmp_path, ending, tolerance):
    if ending.upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {ending}")
    x = A.load_audio(write(tmp_path / f"a.{ending}"))
    assert x.dtype == np.float32 and x.shape == (4000,)
    assert np.abs(x - wave())[200:-200].max() < tolerance       # 16 bits; or what a lossy codec leaves, in its place


def test_channels_are_averaged(tmp_path):
    left, right = wave(hz=300), wave(hz=700, seed=1)
    x = A.load_audio(write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT"))
    assert x.dtype == np.float32 and np.abs(x - (left + right) / 2).max() < 1e-6
    assert "silent" in reason(write(tmp_path / "b.wav", np.stack([left, -left], 1), subtype="FLOAT"))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_against_the_same_sine_at_16k(tmp_path, rate):
    n = rate // 2 + 3
    nyquist = min(rate, 16000) / 2
    for hz in (0.02 * nyquist, 0.5 * nyquist, 0.9 * nyquist):
        y = A.resample(np.sin(2 * np.pi * hz * np.arange(n) / rate).astype(np.float32), rate)
        assert y.dtype == np.float32 and len(y) == round(n * 16000 / rate)
        error = y - np.sin(2 * np.pi * hz * np.arange(len(y)) / 16000)     # no delay, no other loudness
        assert np.abs(error[200:-200]).max() < 2e-3, hz                    # 0.1 dB would be 1e-2
    for hz in (8001, 8500, 10000) if rate > 16000 else ():                 # what 16 kHz cannot hold must not come back
        y = A.resample(np.sin(2 * np.pi * hz * np.arange(n) / rate).astype(np.float32), rate)
        assert 20 * np.log10(y[200:-200].std() * 2 ** 0.5) < -60, hz
    if rate < 16000:                                                       # nor an image of what 8 kHz held
        y = A.resample(np.sin(2 * np.pi * 0.8 * nyquist * np.arange(n) / rate).astype(np.float32), rate)
        spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y))))
        f = np.fft.rfftfreq(len(y), 1 / 16000)
        assert spectrum[f > 1.01 * nyquist].max() < 1e-3 * spectrum.max()
    assert np.abs(A.resample(np.ones(rate, np.float32), rate)[200:-200] - 1).max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = A.load_audio(write(tmp_path / "a.wav", wave(n, rate, 1000), rate))
    assert np.abs(x - wave(len(x), 16000, 1000, 1))[200:-200].max() < 0.12 and len(x) == round(n * 16000 / rate)


def test_resampling_an_odd_rate_and_a_short_file():
    y = A.resample(np.sin(2 * np.pi * 500 * np.arange(5000) / 15999).astype(np.float32), 15999)
    assert np.abs(y - np.sin(2 * np.pi * 500 * np.arange(len(y)) / 16000))[200:-200].max() < 2e-3
    assert len(A.resample(np.ones(3, np.float32), 48000)) == 1 and len(A.resample(np.ones(3, np.float32), 8000)) == 6


def test_one_warning_names_the_first_file(tmp_path):
    files = [write(tmp_path / f"{i}.wav", rate=rate) for i, rate in enumerate((16000, 8000, 48000))]
    with pytest.warns(UserWarning) as caught:
        [A.load_audio(path) for path in files]
    assert len(caught) == 1 and str(files[1]) in str(caught[0].message) and "8000" in str(caught[0].message)


def test_the_scan_warns_of_other_rates_so_that_no_worker_has_to(tmp_path):
    for i, rate in enumerate((16000, 8000, 48000)):
        write(tmp_path / "train" / f"{i}.wav", wave(9600), rate=rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, _ = A.open_folder(tmp_path, show=False)
        [train.load(i) for i in range(len(train))]
    assert not caught, "only the process that shows"
    A.other_rates.clear()
    with pytest.warns(UserWarning) as caught:
        train, _ = A.open_folder(tmp_path)
        [train.load(i) for i in range(len(train))]
    assert len(caught) == 1 and "1.wav has 8000 Hz" in str(caught[0].message)


def test_a_link_to_a_folder_above_is_no_maze(tmp_path):
    write(tmp_path / "a" / "b.wav")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert A.find_files(str(tmp_path), (".wav",)) == [str(tmp_path / "a/b.wav")]


def test_bad_recordings(tmp_path):
    (tmp_path / "empty.flac").touch()
    assert reason(tmp_path / "empty.flac") == "empty file"
    (tmp_path / "text.wav").write_text("this is no sound\n" * 100)
    assert "not audio" in reason(tmp_path / "text.wav")
    assert "No such file" in reason(tmp_path / "absent.wav")
    assert "directory" in reason(tmp_path)
    for value in (0.0, 0.25):
        assert "silent" in reason(write(tmp_path / "s.wav", np.full(4000, value)))
    for value in (np.nan, np.inf, -np.inf):
        x = wave()
        x[1234] = value
        assert "NaN" in reason(write(tmp_path / "n.wav", x, subtype="FLOAT"))
    assert "no samples" in reason(write(tmp_path / "z.wav", wave(0)))
    assert "too short" in reason(write(tmp_path / "399.wav", wave(399)))
    assert len(A.load_audio(write(tmp_path / "400.wav", wave(400)))) == 400
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "too short" in reason(write(tmp_path / "48k.wav", wave(1100), 48000))       # 367 samples at 16 kHz


def test_a_wav_that_was_cut_is_noticed(tmp_path):
    whole = write(tmp_path / "a.wav", wave(1001)).read_bytes()
    head = whole.index(b"data") + 4
    for content, lost in (
        (whole[:-1], 1), (whole[:-1000], 1000), (whole, 0), (whole + b"LIST\4\0\0\0abcd", 0),
        (whole[:12] + b"LIST\3\0\0\0abc\0" + whole[12:], 0),                                          # odd chunks are padded
        (whole[:head] + b"\xff\xff\xff\xff" + whole[head + 4:], 0),                                   # written to a pipe
    ):
        (tmp_path / "b.wav").write_bytes(content)
        if lost:
            assert reason(tmp_path / "b.wav") == f"truncated: {lost} bytes are missing at its end"
        else:
            assert len(A.load_audio(tmp_path / "b.wav")) >= 1001


def test_damaged_flac(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30000)
    whole = write(tmp_path / "a.flac", noise).read_bytes()
    for keep in (0.99, 0.5, 0.1):
        (tmp_path / "b.flac").write_bytes(whole[:int(keep * len(whole))])
        assert reason(tmp_path / "b.flac")
    broken = bytearray(whole)
    broken[len(whole) // 2:len(whole) // 2 + 100] = bytes(100)
    (tmp_path / "b.flac").write_bytes(broken)
    assert reason(tmp_path / "b.flac")
    unknown = bytearray(whole)                                   # as an encoder leaves it that writes to a pipe
    unknown[21] &= 0xF0
    unknown[22:26] = bytes(4)
    (tmp_path / "b.flac").write_bytes(unknown)
    assert "length" in reason(tmp_path / "b.flac")
    read = soundfile.SoundFile.read                              # a decoder that stops early without a word
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, **options: read(self, **options)[:-1])
    assert reason(tmp_path / "a.flac") == "truncated: 29999 of 30000 frames"


def test_normalise():
    x = np.random.default_rng(0).normal(3, 0.01, 5000).astype(np.float32)
    y = A.normalise(x)
    expected = torch.nn.functional.layer_norm(torch.tensor(x, dtype=torch.float64), (5000,), eps=1e-5)
    assert y.dtype == np.float32 and np.abs(y - expected.numpy()).max() < 1e-5
    assert y.std() < 0.97                                        # the eps shows in so quiet a recording
    assert np.isfinite(A.normalise(np.float32([3e38, -3e38, 1]))).all()


# ---------------------------------------------------------------------------------------------------------- folders

def corpus(root, split="train", speakers=2, per=3):
    """root/split/{speaker}/{chapter}/{speaker}-{chapter}-{i}.flac with transcripts, the last line without a newline."""
    for s in range(speakers):
        place = Path(root) / split / str(100 + s) / "7"
        stems = [f"{100 + s}-7-{i:04d}" for i in range(per)]
        for i, stem in enumerate(stems):
            write(place / f"{stem}.flac", wave(3000 + 1000 * s + 100 * i, seed=i))
        (place / f"{100 + s}-7.trans.txt").write_text("\n".join(f"{stem} WORD {'ABC'[i % 3]}" for i, stem in enumerate(stems)))
    return Path(root)


def test_split_folder(tmp_path, monkeypatch):
    root = corpus(tmp_path / "c")
    write(root / "train/.hidden/x.flac")
    write(root / "train/loose.WAV", wave(3333))
    write(root / "train/100/deep/er/d.flac", wave(2222))
    with open(root / "train/100/7/100-7.trans.txt", "a") as file:
        file.write("\n\nmalformed\nno-such-file SOME WORDS\nloose  in  lower\tcase\r\n")
    s = A.open_split(root, "train")
    inside = [os.path.relpath(name, root / "train") for name in s.names]
    assert inside == sorted(inside) and len(s) == 8 and s.bad == []
    assert inside[:4] == [f"100/7/100-7-000{i}.flac" for i in range(3)] + ["100/deep/er/d.flac"] and inside[-1] == "loose.WAV"
    assert s.lengths.dtype == np.int64 and s.lengths.tolist() == [3000, 3100, 3200, 2222, 4000, 4100, 4200, 3333]
    assert s.transcripts == ["WORD A", "WORD B", "WORD C", "", "WORD A", "WORD B", "WORD C", "IN LOWER CASE"]
    assert s.speakers == ["100"] * 3 + [""] + ["101"] * 3 + [""]
    x = s.load(5)
    assert x.shape == (4100,) and x.dtype == np.float32 and abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-3
    part = s.part([5, 0])
    assert part.names == [s.names[5], s.names[0]] and part.lengths.tolist() == [4100, 3000] and (part.load(0) == x).all()
    assert part.transcripts == ["WORD B", "WORD A"] and part.speakers == ["101", "100"]
    write(s.names[5], wave(4000))                                # it has changed since
    with pytest.raises(A.BadAudio, match="4000 samples.*4100"):
        s.load(5)
    monkeypatch.chdir(root)
    assert len(A.open_split(".", "train", show=False)) == len(A.open_split("train/", "", show=False)) == 8
    assert A.open_split("train/", "", show=False).speakers == s.speakers


def test_transcripts_of_equal_stems(tmp_path):
    for s in ("a", "b", "c"):
        write(tmp_path / f"train/{s}/1/0.flac")
    (tmp_path / "train/a/1/x.trans.txt").write_text("0 FROM A\n")
    (tmp_path / "train/b/1/x.trans.txt").write_text("\ufeff0 FROM B\n", encoding="utf-8")
    assert A.open_split(tmp_path, "train").transcripts == ["FROM A", "FROM B", ""]      # c's is not known
    (tmp_path / "train/b/1/x.trans.txt").write_bytes(b"0 GOOD\n1 B\xff\n")
    with pytest.raises(BadInput, match=r"x\.trans\.txt line 2: not UTF-8"):
        A.open_split(tmp_path, "train")


def test_scan_refuses(tmp_path):
    root = corpus(tmp_path / "c")
    (root / "train/bad.flac").write_bytes(b"")
    (root / "train/text.wav").write_text("text")
    os.symlink("nowhere", root / "train/link.ogg")
    s = A.open_split(root, "train", min_samples=3200)
    assert s.lengths.tolist() == [3200, 4000, 4100, 4200]
    assert sorted(Path(line.split(": ")[0]).name for line in s.bad) == ["bad.flac", "link.ogg", "text.wav", "train"]
    assert f"{root}/train/bad.flac: empty file" in s.bad and any("2 recordings shorter than 0.2 s" in line for line in s.bad)
    write(root / "train/t.wav", wave(399))
    assert any("399" in line for line in A.open_split(root, "train", min_samples=0).bad)


def test_rates_in_a_scan(tmp_path):
    write(tmp_path / "train/a.wav", wave(10001), 44100)
    s = A.open_split(tmp_path, "train")
    assert s.lengths.tolist() == [round(10001 * 16000 / 44100)] == A.open_split(tmp_path, "train").lengths.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(s.load(0)) == s.lengths[0]


# ------------------------------------------------------------------------------------------------------------ the cache

@pytest.fixture
def opened(monkeypatch):
    """The names of the files that soundfile.info was asked about."""
    asked, info = [], soundfile.info
    monkeypatch.setattr(soundfile, "info", lambda path: (asked.append(Path(path).name), info(path))[1])
    return asked


def test_second_scan_opens_nothing(tmp_path, opened, capfd):
    root = corpus(tmp_path / "c")
    first = A.open_split(root, "train")
    assert len(opened) == 6 and "lengths" in capfd.readouterr().err and (root / "train" / A.CACHE).exists()
    again = A.open_split(root, "train")
    assert len(opened) == 6 and capfd.readouterr().err == ""
    assert (again.lengths == first.lengths).all() and again.names == first.names and not (tmp_path / "xdg").exists()
    assert [p.name for p in (root / "train").iterdir() if p.name.startswith(".")] == [A.CACHE]      # nothing left over
    changed, same_size = root / "train/100/7/100-7-0000.flac", root / "train/100/7/100-7-0001.flac"
    write(changed, wave(9000))
    os.utime(same_size, ns=(1, 1))
    (root / "train/100/7/100-7-0002.flac").unlink()
    write(root / "train/new.wav")
    opened.clear()
    third = A.open_split(root, "train", show=False)
    assert sorted(opened) == [changed.name, same_size.name, "new.wav"] and capfd.readouterr().err == ""
    assert third.lengths.tolist() == [9000, 3100, 4000, 4100, 4200, 4000]
    assert "100-7-0002" not in (root / "train" / A.CACHE).read_text()
    shutil.move(root, tmp_path / "moved")                        # keys are relative: the cache moves along
    opened.clear()
    assert len(A.open_split(tmp_path / "moved", "train")) == 6 and opened == []


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"100/7/100-7-0000.flac": [1]}', "\udcff", "[" * 100000])
def test_damaged_cache_is_ignored(tmp_path, content, opened):
    root = corpus(tmp_path / "c")
    (root / "train" / A.CACHE).write_text(content, errors="surrogateescape")
    assert len(A.open_split(root, "train", show=False)) == 6 and len(opened) == 6
    assert len(A.open_split(root, "train", show=False)) == 6 and len(opened) == 6


def test_lies_in_the_cache(tmp_path):
    root = corpus(tmp_path / "c")
    A.open_split(root, "train", show=False)
    path = root / "train" / A.CACHE
    entries = json.loads(path.read_text())
    for value in (0, -1, 2.5, "x", None, True):
        path.write_text(json.dumps({key: [*entry[:3], value] for key, entry in entries.items()}))
        assert A.open_split(root, "train", show=False).lengths.tolist() == [3000, 3100, 3200, 4000, 4100, 4200]


def test_folder_that_cannot_be_written(tmp_path, opened, monkeypatch):
    root = corpus(tmp_path / "c")
    (root / "train" / A.CACHE).mkdir()                           # so that root cannot write it either
    assert len(A.open_split(root, "train", show=False)) == 6
    assert len(list((tmp_path / "xdg/data2vec").glob("*.json"))) == 1 and len(os.listdir(tmp_path / "xdg/data2vec")) == 1
    assert len(os.listdir(root / "train")) == 3
    corpus(tmp_path / "other")
    (tmp_path / "other/train" / A.CACHE).mkdir()
    opened.clear()
    monkeypatch.chdir(root)
    assert len(A.open_split(".", "train", show=False)) == 6 and opened == []          # the same folder, however it is named
    assert len(A.open_split(tmp_path / "other", "train", show=False)) == 6 and len(opened) == 6      # but not another one
    shutil.rmtree(tmp_path / "xdg")
    (tmp_path / "xdg").write_text("a file")                      # nowhere at all
    assert len(A.open_split(root, "train", show=False)) == 6


def test_scans_side_by_side(tmp_path):
    root = corpus(tmp_path / "c", speakers=4, per=10)
    results, errors = [], []

    def scan():
        try:
            results.append(A.open_split(root, "train", show=False).lengths.tolist())
        except Exception as e:  # noqa: BLE001  the thread would swallow it
            errors.append(e)

    threads = [threading.Thread(target=scan) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 6 and all(r == results[0] for r in results)
    assert len(json.loads((root / "train" / A.CACHE).read_text())) == 40
    assert [p.name for p in (root / "train").iterdir() if p.name.startswith(".")] == [A.CACHE]


# ------------------------------------------------------------------------------------------------------------ manifests

def manifest(tmp_path, rows=None, **texts):
    audio = tmp_path / "audio"
    for i in range(3):
        write(audio / f"spk{i}/ch/{i}.flac", wave(1000 * (i + 1)))
    rows = [f"spk{i}/ch/{i}.flac\t{1000 * (i + 1)}" for i in range(3)] if rows is None else rows
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m/train.tsv").write_text("\n".join([str(audio), *rows]) + "\n")
    for ending, text in texts.items():
        (tmp_path / f"m/train.{ending}").write_text(text)
    return tmp_path / "m"


def test_manifest(tmp_path, opened):
    root = manifest(tmp_path)
    s = A.open_split(root, "train")
    assert s.lengths.tolist() == [1000, 2000, 3000] and s.transcripts == [""] * 3 and s.speakers == ["spk0", "spk1", "spk2"]
    assert opened == [] and s.load(2).shape == (3000,) and s.names[1] == str(tmp_path / "audio/spk1/ch/1.flac")
    manifest(tmp_path, ltr="H E L L O | W O R L D |\nI ' M |\n\n")
    assert A.open_split(root, "train").transcripts == ["HELLO WORLD", "I'M", ""]
    manifest(tmp_path, wrd="one two\nThree\nfour")               # no newline at the end; words go before letters
    s = A.open_split(root, "train", min_samples=1500)
    assert s.transcripts == ["THREE", "FOUR"] and s.lengths.tolist() == [2000, 3000] and "1 recordings" in s.bad[0]
    (root / "train.tsv").write_text("../audio\nspk1/ch/1.flac\t2000\n\n\n")
    for ending in ("wrd", "ltr"):
        (root / f"train.{ending}").unlink()
    assert A.open_split(root, "train").load(0).shape == (2000,)  # a relative folder is seen from the manifest


def test_manifest_at_another_rate(tmp_path):
    write(tmp_path / "audio/x.wav", wave(8000), 8000)
    root = manifest(tmp_path, ["x.wav\t8000"])
    with warnings.catch_warnings(), pytest.raises(A.BadAudio, match="16000 samples.*8000"):
        warnings.simplefilter("ignore")
        A.open_split(root, "train").load(0)


def test_bad_manifests(tmp_path):
    good = "spk0/ch/0.flac\t1000"
    for row in ("no tab 1000", "a.flac\tmany", "a.flac\t-5", "\t1000", "a.flac\t", "", "a.flac\t1\t2"):
        with pytest.raises(BadInput, match=r"train\.tsv line 3: ") as error:
            A.open_split(manifest(tmp_path, [good, row, good]), "train")
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=r"train\.wrd: 2 lines for the 3 recordings"):
        A.open_split(manifest(tmp_path, wrd="a\nb\n"), "train")
    for content in ("", "\n", "/no/such/folder\na.flac\t1000\n"):
        (tmp_path / "m/train.tsv").write_text(content)
        with pytest.raises(BadInput, match=r"train\.tsv"):
            A.open_split(tmp_path / "m", "train")
    (tmp_path / "m/train.tsv").write_bytes(str(tmp_path).encode() + b"\n\xff\xfe\t1\n")
    with pytest.raises(BadInput, match=r"train\.tsv line 2: not UTF-8"):
        A.open_split(tmp_path / "m", "train")


# ---------------------------------------------------------------------------------------------------------- open_folder

def test_open_folder_finds_the_splits(tmp_path):
    lengths = {"train": 1000, "train-clean": 1100, "train-other": 1200, "dev": 1300, "valid": 1400, "val": 1450,
               "dev-clean": 1500, "dev-other": 1600}
    for split, n in lengths.items():
        write(tmp_path / "c" / split / "1/2/a.flac", wave(n))
    root = tmp_path / "c"

    def splits(**options):
        return [s.lengths.tolist() for s in A.open_folder(root, show=False, **options)]

    assert splits() == [[1000], [1300]]
    assert splits(train=["train-other", "train"], valid=["dev-clean", "val"]) == [[1200, 1000], [1500, 1450]]
    assert splits(train=["train-other"], min_seconds=1150 / 16000) == [[1200], [1300]]
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "dev")
    assert splits() == [[1100, 1200], [1400]]
    shutil.rmtree(root / "valid")
    assert splits() == [[1100, 1200], [1450]]
    shutil.rmtree(root / "val")
    assert splits() == [[1100, 1200], [1500, 1600]]
    shutil.rmtree(root / "train-clean")
    shutil.rmtree(root / "train-other")
    write(root / "loose.flac", wave(1700))
    assert splits() == [[1700], [1500, 1600]]                    # root itself, but nothing of valid in train
    for name, n in (("train", 1800), ("valid", 1900)):
        write(tmp_path / f"t/audio/{n}.wav", wave(n))
        (tmp_path / f"t/{name}.tsv").write_text(f"audio\n{n}.wav\t{n}\n")
    root = tmp_path / "t"
    assert splits() == [[1800], [1900]]


@pytest.mark.parametrize("n", [2, 20, 21, 45])
def test_held_out(tmp_path, n):
    for i in range(n):
        write(tmp_path / f"{i:03d}.wav", wave(400 + i))
    (tmp_path / "bad.wav").write_text("x")
    train, valid = A.open_folder(tmp_path, show=False)
    assert len(valid) == -(-n // 20) and len(train) == n - len(valid) and not set(train.names) & set(valid.names)
    assert valid.lengths.tolist() == list(range(400, 400 + n, 20))
    assert len(train.bad) == 1 and valid.bad == []               # reported once


def test_open_folder_bad_input(tmp_path):
    (tmp_path / "empty/train").mkdir(parents=True)
    (tmp_path / "text/train").mkdir(parents=True)
    (tmp_path / "text/train/a.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.wav").write_text("x")
    write(tmp_path / "one/train/a.wav")
    (tmp_path / "file").write_text("x")
    for root in ("absent", "empty", "text", "broken", "one", "file"):
        with pytest.raises(BadInput) as error:
            A.open_folder(tmp_path / root, show=False)
        assert str(tmp_path / root) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)
    write(tmp_path / "two/train/a.wav")
    write(tmp_path / "two/train/b.wav")
    with pytest.raises(BadInput, match="test-clean"):
        A.open_folder(tmp_path / "two", train=["test-clean"], show=False)
    with pytest.raises(BadInput, match="train"):
        A.open_folder(tmp_path / "two", train=["train"], valid=["train"], show=False)
    with pytest.raises(BadInput, match="shorter than 2 s"):
        A.open_folder(tmp_path / "two", min_seconds=2, show=False)


# -------------------------------------------------------------------------------------------------------- sound events

def events(root, **files):
    """root with these CSV files (and classes.txt) beside the clips 1000.wav .. 1004.wav, of so many samples, in clips/."""
    for i in range(5):
        write(root / f"clips/{1000 + i}.wav", wave(1000 + i))
    (root / "classes.txt").write_text(files.pop("classes", "Dog\n\nCat\nCar, passing by\n"))
    for name, text in files.items():
        (root / f"{name}.csv").write_text(text)
    return root


def test_events(tmp_path):
    root = events(
        tmp_path, train='path,labels\r\nclips/1000.wav, Dog\r\n\r\n"clips/1001.wav","Car, passing by; Cat;Cat"\r\n',
        valid="clips/1003.wav,Cat\nclips/1002.wav,Dog;Cat;\n", eval="clips/1004.wav,Dog",
    )
    classes, train, valid = A.open_events(root, show=False)
    assert classes == ["Dog", "Cat", "Car, passing by"]
    assert train.names == [f"{root}/clips/1000.wav", f"{root}/clips/1001.wav"] and train.transcripts == ["Dog", "Car, passing by;Cat"]
    assert valid.lengths.tolist() == [1003, 1002] and valid.transcripts == ["Cat", "Dog;Cat"] and train.bad == valid.bad == []
    assert len(train.load(0)) == 1000 and train.speakers == ["", ""]
    assert A.open_events(root, ["valid.csv", "train"], ["eval"], show=False)[1].lengths.tolist() == [1003, 1002, 1000, 1001]
    (root / "valid.csv").unlink()
    assert A.open_events(root, show=False)[2].lengths.tolist() == [1004], "eval.csv"
    assert set(json.loads((root / A.CACHE).read_text())) == {f"clips/{n}.wav" for n in range(1000, 1005)}, "each opened once, ever"
    (root / "clips/1003.wav").unlink()
    A.read_folder(str(root), show=False)
    assert set(json.loads((root / A.CACHE).read_text())) == {f"clips/{n}.wav" for n in (1000, 1001, 1002, 1004)}, "what is gone is forgotten"


def test_clips_with_events_are_trained_on_without_them_and_the_held_out_ones_stay_out(tmp_path):
    root = events(tmp_path, train="clips/1000.wav,Dog\nclips/1004.wav,Cat\nclips/1001.wav,Cat\n", valid="clips/1003.wav,Cat\n")
    train, valid = A.open_folder(root, min_seconds=1001 / 16000, show=False)
    assert (train.lengths.tolist(), valid.lengths.tolist()) == ([1004, 1001], [1003]) and {*train.transcripts, *valid.transcripts} == {""}
    assert "1 recordings shorter" in train.bad[0]
    assert len(A.open_folder(root, train=["clips"], show=False)[0]) == 4, "a folder that is named goes before"


def test_events_of_valid_are_not_in_train(tmp_path):
    root = events(tmp_path, train="clips/1000.wav,Dog\nclips/1001.wav,Cat\n", valid="clips/1001.wav,Cat\n")
    _, train, valid = A.open_events(root, show=False)
    assert (train.lengths.tolist(), valid.lengths.tolist()) == ([1000], [1001])
    assert [s.lengths.tolist() for s in A.open_events(root, ["train"], ["train"], show=False)[1:]] == [[1000, 1001]] * 2


def test_clips_that_are_not_there_are_named(tmp_path):
    root = events(tmp_path, train="clips/1000.wav,Dog\ngone.wav,Cat\nbad.wav,Cat\nshort.wav,Dog\n", valid="clips/1001.wav,Cat\nlost.wav,Dog\n")
    (root / "bad.wav").write_text("no audio")
    write(root / "short.wav", wave(399))
    for _ in range(2):                                           # the second time from the cache
        _, train, valid = A.open_events(root, show=False)
        assert train.lengths.tolist() == [1000] and valid.lengths.tolist() == [1001]
        assert [line.split(": ")[0] for line in train.bad] == [f"{root}/{name}" for name in ("gone.wav", "bad.wav", "short.wav")]
        assert valid.bad == [f"{root}/lost.wav: No such file or directory"]


@pytest.mark.parametrize("where, files", [
    ("classes.txt line 3: 'Cat' ", dict(classes="Dog\nCat\nCat\n")),
    ("classes.txt line 2: 'a;b' ", dict(classes="Dog\na;b\n")),
    ("train.csv line 2: 'Cow' ", dict(train="clips/1000.wav,Dog\nclips/1001.wav,Cat;Cow\n")),
    ("train.csv line 3: ", dict(train="path,labels\nclips/1000.wav,Dog\nclips/1001.wav\n")),
    ("train.csv line 1: ", dict(train="clips/1000.wav, ;\n")),
    ("train.csv line 1: ", dict(train="clips/1000.wav,Car, passing by\n")),
    ("train.csv line 2: ", dict(train="clips/1000.wav,Dog\nclips/1000.wav,Cat\n")),
    ("train.csv line 1: /abs/1.wav", dict(train="/abs/1.wav,Dog\n")),
    ("train.csv line 1: not CSV", dict(train='"clips/1000.wav"x,Dog\n')),
    ("train.csv: ", dict(train="")),
    ("valid.csv: ", dict(valid="gone.wav,Dog\nlost.wav,Dog\n")),
    ("valid.csv: ", dict(train="clips/1000.wav,Dog\n", valid="path,labels\n")),
])  # fmt: skip
def test_events_bad_input(tmp_path, where, files):
    root = events(tmp_path, **dict(train="clips/1000.wav,Dog\n", valid="clips/1001.wav,Dog\n") | files)
    with pytest.raises(BadInput) as error:
        A.open_events(root, show=False)
    assert str(error.value).startswith(f"{root}/{where}") and "\n" not in str(error.value) and "; " in str(error.value)


def test_events_without_their_files(tmp_path):
    root = events(tmp_path, train="clips/1000.wav,Dog\n")
    for name, call in (("eval.csv", dict()), ("other.csv", dict(valid=["other"])), ("classes.txt", dict())):
        with pytest.raises(BadInput, match=f"{name}: no such file; write "):
            A.open_events(root, show=False, **call)
        if name == "other.csv":
            (root / "classes.txt").unlink()


# ------------------------------------------------------------------------------------------------------------- batches

LENGTHS = np.random.default_rng(5).integers(1000, 40000, 500)


def test_epoch_batches():
    limit, most = 30000, 100_000
    epochs = [A.epoch_batches(LENGTHS, most, 0, e, limit) for e in range(3)]
    for found in epochs:
        assert sorted(np.concatenate(found).tolist()) == list(range(500))
        for b in found:
            n = np.minimum(LENGTHS[b], limit)
            assert len(b) * n.max() <= most and n.max() / n.min() < 3
        full = [len(b) * np.minimum(LENGTHS[b], limit).max() for b in found]
        assert np.mean(full) > 0.8 * most                        # greedy: batches are full
        spread = [n.max() / n.min() for n in (np.minimum(LENGTHS[b], limit) for b in found)]
        assert np.median(spread) < 1.3                           # similar lengths together
        assert abs(np.corrcoef([LENGTHS[b].mean() for b in found], range(len(found)))[0, 1]) < 0.4       # shuffled
    sets = [{frozenset(b.tolist()) for b in found} for found in epochs]
    assert len(sets[0] & sets[1]) < 0.2 * len(sets[0])           # other companions each epoch
    again = A.epoch_batches(LENGTHS, most, 0, 1, limit)
    assert all((a == b).all() for a, b in zip(epochs[1], again)) and len(again) == len(epochs[1])
    assert [b.tolist() for b in A.epoch_batches(LENGTHS, most, 1, 1, limit)] != [b.tolist() for b in again]
    ordered = A.epoch_batches(LENGTHS, most, 0, 0, limit, sort=True)
    assert (np.diff(np.minimum(LENGTHS, limit)[np.concatenate(ordered)]) >= 0).all()
    assert A.epoch_batches(np.array([50, 50, 50]), 100, 0, 0, 1000, sort=True)[0].tolist() == [0, 1]     # exactly full
    assert [len(b) for b in A.epoch_batches(np.array([5000, 6000]), 100, 0, 0, 9000)] == [1, 1]          # each alone


def test_epoch_batches_are_fast():
    lengths = np.random.default_rng(0).integers(16000, 400000, 300_000)
    start = time.process_time()
    A.epoch_batches(lengths, 3_800_000, 0, 0, 320_000)
    assert time.process_time() - start < 1                       # about 0.1 s


def test_batches_are_the_same_for_any_world():
    most, limit, count, steps = 100_000, 30000, 12, 14           # 14 * 12 micro-batches: more than one epoch
    whole = list(A.batches(LENGTHS, most, limit, 3, 0, steps, count, 1, 0))
    expected = [(e, b.tolist()) for e in range(3) for b in A.epoch_batches(LENGTHS, most, 3, e, limit)][:steps * count]
    assert [(e, list(b)) for e, _, b in whole] == expected and whole[-1][0] >= 1
    assert [i for _, i, _ in whole] == list(range(steps * count))
    assert all(type(v) is int for e, i, b in whole for v in (e, i, *b)) and type(whole[0][2]) is tuple
    for world in (1, 2, 3, 4, 12):
        ranks = [list(A.batches(LENGTHS, most, limit, 3, 0, steps, count, world, r)) for r in range(world)]
        assert [key for keys in zip(*ranks) for key in keys] == whole
        for r, keys in enumerate(ranks):
            per = count // world
            assert len(keys) == steps * per
            for start in (1, 5, 13, 14):
                assert list(A.batches(LENGTHS, most, limit, 3, start, steps, count, world, r)) == keys[start * per:]
    with pytest.raises(AssertionError):
        next(A.batches(LENGTHS, most, limit, 3, 0, 1, 10, 3, 0))


def made_set(lengths=(500, 900, 700, 800, 1000, 600), broken=()):
    """Utterance i is i + 1 plus a slow ramp before it is normalised, so that a window shows where it was cut."""
    class Set(A.Utterances):
        def load(self, i):
            if i in broken:
                raise A.BadAudio("broken")
            return self.waves[i]

    waves = [(i + 1 + np.arange(n) / 10000).astype(np.float32) for i, n in enumerate(lengths)]
    return Set([f"u{i}" for i in range(len(waves))], lengths, [""] * len(waves), [""] * len(waves), waves)


def cut(row):
    """-> (utterance, first sample) of a window of made_set."""
    utterance = int(row[0])
    return utterance - 1, round(10000 * (float(row[0]) - utterance))


def test_batches_crop_to_the_shortest():
    data = A.Batches(made_set(), seed=1, max_length=10**6, pad=False)
    starts = set()
    for epoch in range(20):
        b = data[epoch, 0, (1, 3, 4)]
        assert b["source"].shape == (3, 800) and b["source"].dtype == torch.float32
        assert b["lengths"].tolist() == [800] * 3 and b["lengths"].dtype == torch.int64
        assert b["indices"].tolist() == [1, 3, 4] and b["indices"].dtype == torch.int64 and b["bad"] == [] and b["mask"] is None
        assert [cut(row)[0] for row in b["source"]] == [1, 3, 4]
        assert np.allclose(np.diff(b["source"].numpy(), axis=1), 1e-4, atol=1e-6)                # one piece
        starts.add(cut(b["source"][2])[1])
        assert cut(b["source"][1])[1] == 0
    assert len(starts) > 10 and min(starts) >= 0 and 100 < max(starts) <= 200
    assert data[0, 0, (4, 5)]["source"].shape == (2, 600)
    small = A.Batches(made_set(), seed=1, max_length=300, pad=False)
    assert small[0, 0, (1, 3)]["source"].shape == (2, 300)
    assert torch.equal(small[3, 0, (1, 3)]["source"][1], small[3, 7, (3,)]["source"][0])          # (seed, epoch, index) only
    assert not torch.equal(small[3, 0, (1,)]["source"], small[4, 0, (1,)]["source"])
    other = A.Batches(made_set(), seed=2, max_length=300, pad=False)
    assert not torch.equal(small[3, 0, (1,)]["source"], other[3, 0, (1,)]["source"])
    ends = {cut(small[e, 0, (0,)]["source"][0])[1] for e in range(1000)}
    assert min(ends) == 0 and max(ends) == 200                   # every start, the last one included


def test_batches_pad():
    data = A.Batches(made_set(), seed=1, max_length=750, pad=True)
    b = data[0, 0, (0, 2, 1)]
    assert b["source"].shape == (3, 750) and b["lengths"].tolist() == [500, 700, 750]
    for row, n in zip(b["source"], b["lengths"]):
        assert (row[:n] > 0.9).all() and (row[n:] == 0).all()
    assert cut(b["source"][0]) == (0, 0)
    assert data[0, 0, (0, 5)]["source"].shape == (2, 600)


def test_masker_gets_lengths_and_its_own_stream():
    def masker(lengths, rng):
        assert lengths.tolist() == [500, 700] and lengths.dtype == torch.int64
        return rng.random((2, 40)) < 0.5

    data = A.Batches(made_set(), seed=1, max_length=750, pad=True, masker=masker)
    masks = {key: data[(*key, (0, 2))]["mask"] for key in ((0, 0), (0, 1), (1, 0))}
    assert masks[0, 1].dtype == torch.bool and masks[0, 1].shape == (2, 40)
    expected = np.random.default_rng([1, 0, 1, 1]).random((2, 40)) < 0.5
    assert (masks[0, 1].numpy() == expected).all() and len({m.numpy().tobytes() for m in masks.values()}) == 3


def test_broken_recordings_are_replaced():
    # in order of length: 0 (500), 5 (600), 2 (700), 3 (800), 1 (900), 4 (1000)
    data = A.Batches(made_set(broken={2, 3}), seed=1, max_length=10**6, pad=False)
    b = data[0, 0, (2, 4)]
    assert b["indices"].tolist() == [1, 4] and b["bad"] == ["u2: broken", "u3: broken"] and b["source"].shape == (2, 700)
    assert b["lengths"].tolist() == [700, 700] and cut(b["source"][0])[0] == 1
    assert torch.equal(b["source"], data[0, 0, (2, 4)]["source"])
    data = A.Batches(made_set(broken={4, 1}), seed=1, max_length=10**6, pad=False)                # none is longer
    b = data[0, 0, (4,)]
    assert b["indices"].tolist() == [3] and b["bad"] == ["u4: broken", "u1: broken"] and b["source"].shape == (1, 1000)
    assert torch.equal(b["source"][0, :200], b["source"][0, 800:]) and b["lengths"].tolist() == [1000]
    data = A.Batches(made_set(broken={4, 1}), seed=1, max_length=10**6, pad=True)
    b = data[0, 0, (4, 0)]
    assert b["lengths"].tolist() == [800, 500] and b["source"].shape == (2, 800)                  # N is what there is
    data = A.Batches(made_set(broken={0}), seed=1, max_length=10**6, pad=True)
    b = data[0, 0, (0,)]
    assert b["indices"].tolist() == [5] and b["source"].shape == (1, 600)                         # whole: as its transcript is
    with pytest.raises(BadInput, match="u0: broken; nor can any other of the 6"):
        A.Batches(made_set(broken=set(range(6))), seed=1, max_length=10**6, pad=True)[0, 0, (4,)]


def test_loader_with_workers(tmp_path):
    root = corpus(tmp_path / "c", per=10)
    train, _ = A.open_folder(root, show=False)
    Path(train.names[3]).write_bytes(b"")                        # broken after the scan
    data = A.Batches(train, 0, 3500, False, lambda lengths, rng: rng.random((len(lengths), 4)) < 0.5)
    keys = list(A.batches(train.lengths, 12000, 3500, 0, 0, 3, 4, 1, 0))
    runs = [list(torch.utils.data.DataLoader(data, batch_size=None, sampler=iter(keys), num_workers=w)) for w in (0, 1)]
    assert len(runs[0]) == 12 and sum(len(b["bad"]) for b in runs[0]) >= 1
    for a, b in zip(*runs):
        assert a["bad"] == b["bad"] and all(torch.equal(a[k], b[k]) for k in ("source", "lengths", "mask", "indices"))


# --------------------------------------------------------------------------------------------------------- made speech

@functools.lru_cache(maxsize=1)
def made():
    start = time.process_time()
    return *A.made_speech(n_train=120, n_valid=40), time.process_time() - start


def test_made_speech():
    train, valid, seconds = made()
    assert seconds < 160 * 10 / 600                              # 600 in 10 s; about 5 s on a slow thread
    for s, n in ((train, 120), (valid, 40)):
        assert len(s) == len(s.waves) == len(s.transcripts) == n and [len(x) for x in s.waves] == s.lengths.tolist()
        assert s.lengths.min() >= 16000 and s.lengths.max() <= 40000 and len(set(s.speakers)) == 8
        assert all(x.dtype == np.float32 and np.abs(x).max() <= 1 and np.isfinite(x).all() for x in s.waves)
        words = [w for text in s.transcripts for w in text.split()]
        assert all(2 <= len(w) <= 4 and set(w) <= set(A.LETTERS) for w in words)
    assert train.names[12] == "made train utterance 12" and valid.names[0] == "made valid utterance 0"
    assert abs(train.load(0).std() - 1) < 1e-2
    lexicon = {w for text in train.transcripts for w in text.split()}
    assert 20 < len(lexicon | {w for text in valid.transcripts for w in text.split()}) <= 40             # one language
    assert len({x.tobytes() for x in (*train.waves, *valid.waves)}) == 160
    assert train.transcripts[:40] != valid.transcripts
    again, other = A.made_speech(n_train=3, n_valid=2), A.made_speech(seed=1, n_train=3, n_valid=2)
    assert all((x == y).all() for x, y in zip(again[0].waves, train.waves)) and again[0].transcripts == train.transcripts[:3]
    assert all((x == y).all() for x, y in zip(again[1].waves, valid.waves))              # whatever n_train is
    assert other[0].transcripts != again[0].transcripts and len(other[0].waves[0]) != len(again[0].waves[0])


def test_made_words_predict_each_other():
    train, valid, _ = made()
    pairs = {(a, b) for text in train.transcripts + valid.transcripts for a, b in zip(text.split(), text.split()[1:])}
    follows = {a: {b for x, b in pairs if x == a} for a, _ in pairs}
    assert max(map(len, follows.values())) <= 4 and np.mean([len(f) for f in follows.values()]) > 1.5


def features(x):
    """-> (T, 40) log spectrum in 40 bands, 10 ms apart."""
    frames = np.lib.stride_tricks.sliding_window_view(x, 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512))[:, 1:241].reshape(len(frames), 40, 6) ** 2
    return np.log(power.mean(-1) + 1e-3)


def test_letters_sound_different_and_last():
    """Spoken alone, letters of one speaker are told from the spectra of another; frames resemble their neighbours."""
    def say(letter, tract, pitch, seed):
        x = A.speak([" ", letter, " "], [0.05, 0.14, 0.05], tract, pitch, np.random.default_rng(seed))
        return features(A.normalise(x)).reshape(-1)

    letters = list(A.LETTERS)
    templates = np.stack([np.mean([say(c, t, 120, 9) for t in (0.9, 1.0, 1.1)], axis=0) for c in letters])
    right = [np.square(templates - say(c, t, p, k)).sum(1).argmin() == i for i, c in enumerate(letters)
             for k, (t, p) in enumerate(((0.95, 110), (1.05, 180)))]
    assert np.mean(right) > 0.8                                  # chance: 0.07
    f = [features(made()[0].load(i)) for i in range(10)]
    near, far = (np.mean([np.abs(x[d:] - x[:-d]).mean() for x in f]) for d in (1, 40))
    assert near < 0.6 * far
    pitches = []
    for speaker in range(8):                                     # the strongest period of the voice, of 8 speakers
        x = made()[0].waves[speaker].astype(np.float64)
        r = np.fft.irfft(np.abs(np.fft.rfft(x, 2 ** 17)) ** 2)[40:260]
        pitches.append(16000 / (40 + r.argmax()))
    assert max(pitches) > 1.4 * min(pitches)


# ---------------------------------------------------------------------------------------------------------- real data

def test_shared_digits(shared):
    folder = shared / "speech/digits"
    s = fresh(folder, "train")
    assert len(s) == 798 and round(s.lengths.sum() / 16000 / 60, 2) == 35.98 and s.bad == []
    assert sum(len(text.split()) for text in s.transcripts) == 4000 and set(s.speakers) == {f"900{i}" for i in range(1, 6)}
    assert all(s.transcripts) and [round(n / 16000, 3) for n in (s.lengths.min(), s.lengths.max())] == [0.976, 5.678]
    assert all(abs(s.load(i).std() - 1) < 0.6 for i in range(0, 798, 80))


def fresh(root, split):
    """The shared folder must not be written to: only the user's cache is (see own_cache)."""
    with pytest.MonkeyPatch.context() as patch:
        places = A.cache_files
        patch.setattr(A, "cache_files", lambda folder: places(folder)[1:])
        return A.open_split(root, split, show=False)


def test_shared_librispeech(shared):
    s = fresh(shared / "speech/LibriSpeech", "test-clean")
    assert len(s) == 4 and sum(len(text.split()) for text in s.transcripts) == 58 and set(s.speakers) == {"1089"}
    assert [round(n / 16000, 1) for n in s.lengths] == [10.4, 3.3, 2.1, 5.4] and round(s.lengths.sum() / 16000, 1) == 21.2
    assert all(len(s.load(i)) == s.lengths[i] for i in range(4)) and all(s.transcripts)


# -------------------------------------------------------------------------------------------------------- the command

@pytest.fixture
def server(server):
    server.url += "/base"
    return server


def pack(members):
    """{name: bytes or TarInfo} -> the bytes of a tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if content is info else len(content)
            tar.addfile(info, None if content is info else io.BytesIO(content))
    return buffer.getvalue()


def offer(server, tmp_path, split, members=None):
    """Serve a small archive of LibriSpeech's layout -> its md5."""
    place = corpus(tmp_path / "src", split) if members is None else None
    if members is None:
        members = {f"LibriSpeech/{p.relative_to(place)}": p.read_bytes() for p in sorted((place / split).rglob("*")) if p.is_file()}
        members = {"LibriSpeech/README.TXT": split.encode()} | members
    content = pack(members)
    server.files[f"/base/{split}.tar.gz"] = content
    return hashlib.md5(content).hexdigest()


def command(*args):
    """Run it as a user would, in a process of its own."""
    env = {**os.environ, "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "data.audio", *map(str, args)], cwd=ROOT, env=env, timeout=60,
                          capture_output=True, text=True, check=False)


def test_librispeech_command(tmp_path, server):
    sums = [offer(server, tmp_path, split) for split in ("dev-clean", "test-clean")]
    out = tmp_path / "out"
    result = command("librispeech", "--splits", "dev-clean", "test-clean", "--out", out, "--url", server.url + "/", "--md5", *sums)
    assert result.returncode == 0, result.stderr
    assert str(out / "LibriSpeech/dev-clean") in result.stdout
    assert sorted(p.name for p in out.iterdir()) == ["LibriSpeech", "dev-clean.tar.gz", "test-clean.tar.gz"]
    assert sorted(p.name for p in (out / "LibriSpeech").iterdir()) == ["README.TXT", "dev-clean", "test-clean"]
    for split in ("dev-clean", "test-clean"):
        s = A.open_split(out / "LibriSpeech", split, show=False)
        assert len(s) == 6 and s.transcripts[5] == "WORD C" and s.speakers[0] == "100" and s.load(0).shape == (3000,)
    asked = len(server.asked)
    A.librispeech(out, "dev-clean", server.url, "whatever")      # there already: nothing is fetched or written
    (out / "LibriSpeech/test-clean").rename(tmp_path / "aside")
    A.librispeech(out, "test-clean", server.url, sums[1])        # unpacked anew from the archive that is there
    assert len(server.asked) == asked and len(A.open_split(out / "LibriSpeech", "test-clean", show=False)) == 6


def test_broken_download_goes_on(tmp_path, server):
    md5 = offer(server, tmp_path, "dev-clean")
    server.cut = 5000
    with pytest.raises(BadInput, match="run this again"):
        A.librispeech(tmp_path / "o", "dev-clean", server.url, md5)
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["dev-clean.tar.gz.part"]
    server.cut = None
    A.librispeech(tmp_path / "o", "dev-clean", server.url, md5)
    assert server.asked == [("/base/dev-clean.tar.gz", None), ("/base/dev-clean.tar.gz", "bytes=5000-")]
    assert len(A.open_split(tmp_path / "o/LibriSpeech", "dev-clean", show=False)) == 6


def test_wrong_md5_and_wrong_options(tmp_path, server, monkeypatch):
    offer(server, tmp_path, "dev-clean")

    def line(*args):
        monkeypatch.setattr(sys, "argv", ["audio", "librispeech", "--out", str(tmp_path / "o"), "--url", server.url, *args])
        with pytest.raises(BadInput) as error:
            A.main()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert A.LIBRISPEECH_MD5["dev-clean"] in line("--splits", "dev-clean") and not list((tmp_path / "o").iterdir())
    assert "404" in line("--splits", "dev-other") and not (tmp_path / "o/LibriSpeech").exists()
    (tmp_path / "o/test-clean.tar.gz").write_bytes(b"put there by hand")
    assert "md5" in line("--splits", "test-clean")
    asked = len(server.asked)
    message = line("--splits", "dev-clean", "dev-dirty")
    assert "dev-dirty" in message and "train-other-500" in message and len(server.asked) == asked      # before any download
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["audio", "librispeech", "--out", str(tmp_path / "file"), "--splits", "dev-clean"])
    with pytest.raises(BadInput, match="cannot be written"):
        A.main()


def test_hostile_archives(tmp_path, server):
    link = tarfile.TarInfo("LibriSpeech/dev-clean/link")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    hard = tarfile.TarInfo("LibriSpeech/dev-clean/hard")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../../../hit"
    good = {"LibriSpeech/dev-clean/1/2/a.txt": b"x"}
    for name, members in {
        "up": good | {"LibriSpeech/dev-clean/../../../hit": b"x"}, "root": good | {str(tmp_path / "hit"): b"x"},
        "link": {"a": link, "LibriSpeech/dev-clean/link/hit": b"x"}, "hard": good | {"h": hard},
        "other": good | {"LibriSpeech/test-clean/1/2/a.txt": b"x"}, "nothing": {"LibriSpeech/README.TXT": b"x"}, "empty": {},
    }.items():
        md5 = offer(server, tmp_path, "dev-clean", members)
        with pytest.raises(BadInput, match="dev-clean") as error:
            A.librispeech(tmp_path / name, "dev-clean", server.url, md5)
        assert "\n" not in str(error.value) and not (tmp_path / "hit").exists(), name
        assert [p.name for p in (tmp_path / name).iterdir()] == ["dev-clean.tar.gz"], name
    whole = pack(good | {"LibriSpeech/dev-clean/b": os.urandom(5000)})
    for damaged in (whole[:3000], b"\x1f\x8b no tar", b""):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d/dev-clean.tar.gz").write_bytes(damaged)
        with pytest.raises(BadInput, match="not LibriSpeech's dev-clean"):
            A.librispeech(tmp_path / "d", "dev-clean", server.url, hashlib.md5(damaged).hexdigest())
        assert [p.name for p in (tmp_path / "d").iterdir()] == ["dev-clean.tar.gz"]


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audio", "librispeech", "--help"])
    with pytest.raises(SystemExit):
        A.main()
    text = capsys.readouterr().out
    assert "train-clean-100\n" in text and "--out" in text and "--url" not in text and "--md5" not in text

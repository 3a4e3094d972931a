"""data/audio.py: decoding, folders, manifests, sound events, batches, real recordings, and the command."""

import functools
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common import UserError
from data import audio

RAMP = 10_000  # samples of steps of 1 / RAMP, see numbered()


def wave(n=4000, rate=16000, hz=440.0, seed=0):
    """A tone in a little noise."""
    noise = np.random.default_rng(seed).standard_normal(n)
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(n) / rate) + 0.01 * noise


def write(path, x=None, rate=16000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave() if x is None else x, rate, **options)
    return path


def refused(path):
    with pytest.raises(audio.AUDIO_ERRORS) as error:
        audio.load_audio(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_formats_and_channels(tmp_path):
    left, right = wave(hz=300), wave(hz=700, seed=1)
    for ending, tolerance in (("wav", 4e-5), ("flac", 4e-5), ("ogg", 0.07), ("mp3", 0.1)):  # 16 bits; lossy
        x = audio.load_audio(write(tmp_path / f"a.{ending}"))
        assert x.dtype == np.float32 and x.shape == (4000,)
        assert np.abs(x - wave())[200:-200].max() < tolerance
        x = audio.load_audio(write(tmp_path / f"a.{ending}", np.stack([left, right], 1)))
        assert np.abs(x - (left + right) / 2)[200:-200].max() < tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_against_the_same_sine_at_16k(tmp_path, rate):
    n, nyquist = rate // 2 + 3, min(rate, 16000) / 2

    def resampled(hz):
        return audio.resample(np.sin(2 * np.pi * hz * np.arange(n) / rate).astype(np.float32), rate)

    for hz in (0.02 * nyquist, 0.5 * nyquist, 0.9 * nyquist):
        y = resampled(hz)
        assert y.dtype == np.float32 and len(y) == round(n * 16000 / rate)
        error = y - np.sin(2 * np.pi * hz * np.arange(len(y)) / 16000)  # no delay, no other loudness
        assert np.abs(error[200:-200]).max() < 2e-3, hz
    for hz in (8001, 8500, 10000) if rate > 16000 else ():  # what 16 kHz cannot hold leaves no alias
        assert 20 * np.log10(resampled(hz)[200:-200].std() * 2**0.5) < -60, hz
    x = audio.load_audio(write(tmp_path / "a.wav", wave(n, rate, 1000), rate))
    assert len(x) == round(n * 16000 / rate)
    assert np.abs(x - wave(len(x), 16000, 1000, 1))[200:-200].max() < 0.12


def test_recordings_that_cannot_be_used(tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound\n" * 100)
    assert "not recognised" in refused(tmp_path / "text.wav")
    assert "No such file" in refused(tmp_path / "absent.wav")
    broken = wave()
    broken[1234] = np.nan
    for x in (broken, np.full(4000, 0.25), wave(0), wave(399)):
        assert "not finite" in refused(write(tmp_path / "x.wav", x, subtype="FLOAT"))
    assert "too short" in refused(write(tmp_path / "x.wav", wave(1100), 48000))
    assert len(audio.load_audio(write(tmp_path / "400.wav", wave(400)))) == 400
    flac = write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 30000)).read_bytes()
    damaged = flac[: len(flac) // 2] + bytes(100) + flac[len(flac) // 2 + 100 :]
    for content in (flac[:-600], flac[: len(flac) // 2], damaged):
        (tmp_path / "b.flac").write_bytes(content)
        assert refused(tmp_path / "b.flac")


def test_lengths_that_a_header_does_not_know(tmp_path):
    """As SoX, ffmpeg, recorders and streams leave them; measured and decoded in full."""
    paths, x = [write(tmp_path / "gsm.wav", wave(32000), subtype="GSM610")], wave(32000)
    wav, au = (write(tmp_path / f"a.{end}", x).read_bytes() for end in ("wav", "au"))
    flac = bytearray(write(tmp_path / "a.flac", x).read_bytes())
    start = wav.index(b"data") + 4
    for size in (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 64036):
        paths.append(tmp_path / f"{size:x}.wav")
        paths[-1].write_bytes(wav[:start] + size.to_bytes(4, "little") + wav[start + 4 :])
    for count in (0, 2**36 - 1, 33000):
        flac[21] = flac[21] & 0xF0 | count >> 32
        flac[22:26] = (count & 0xFFFFFFFF).to_bytes(4, "big")
        paths.append(tmp_path / f"{count}.flac")
        paths[-1].write_bytes(flac)
    (tmp_path / "au.wav").write_bytes(au[:8] + b"\xff" * 4 + au[12:])  # known by its content
    for path in [*paths, tmp_path / "au.wav"]:
        assert np.abs(audio.load_audio(path) - x).max() < (0.3 if path.stem == "gsm" else 2e-4), path
        counted = audio.decode(path, count_only=True)[0]
        assert counted == {"fa24.wav": 32018, "33000.flac": 33000}.get(path.name, 32000), path


def without_count(mp3):
    """Bytes of an MP3 without its first frame, which holds no sound but their number."""
    start = mp3.index(b"\xff")
    return mp3[mp3.index(mp3[start : start + 2], start + 40) :]


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
def test_mp3(tmp_path, rate):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 6 * rate) * (np.arange(6 * rate) > 3 * rate)
    for mode in ("CONSTANT", "VARIABLE"):
        options = {"bitrate_mode": mode, "compression_level": 0.5}
        whole = write(tmp_path / "a.mp3", noise + wave(6 * rate, rate), rate, **options).read_bytes()
        bare = without_count(whole)
        assert len(whole) - 2000 < len(bare) < len(whole)
        for i, content in enumerate((whole, bare, bare + b"TAG" + bytes(125), bare[:-50])):
            path = tmp_path / f"{i}.mp3"
            path.write_bytes(b"ID3\3\0\0\0\0\x4e\x10" + bytes(10000) + content if i else content)
            x = audio.load_audio(path)
            assert 96_000 - 2500 * (i == 3) <= len(x) < 101_000
            assert x[80_000:96_000].std() > 0.2, "the loud end, at a high bit rate"
            assert abs(round(audio.decode(path, True)[0] * 16000 / rate) - len(x)) <= 1
        for content in (whole[: len(whole) // 2], whole + whole):  # cut; two files
            path.write_bytes(content)
            assert "truncated, or several" in refused(path)


def test_truncated_and_joined(tmp_path):
    wav, ogg = (write(tmp_path / f"a.{end}", wave(64000)).read_bytes() for end in ("wav", "ogg"))
    for name, content in (("c.wav", wav[: len(wav) // 2]), ("c.ogg", ogg + ogg)):
        (tmp_path / name).write_bytes(content)
        assert "truncated, or several" in refused(tmp_path / name)


def test_names_of_all_kinds(tmp_path):
    """Not UTF-8, a line break, characters of patterns; in transcripts and manifests, too."""
    folder, names = (
        os.fsencode(tmp_path / "train"),
        (b"a\xff.wav", b"a+b.flac", b"caf\xe9.mp3", b"o\xf6.opus"),
    )
    os.mkdir(folder)
    for name in (*names, b"new\nline.ogg", b"[%]*#.wav"):
        with open(os.path.join(folder, name), "wb") as file:
            form = {"opus": "OGG"}.get(name.split(b".")[1].decode(), name.split(b".")[1].decode())
            soundfile.write(file, wave(), 16000, format=form, subtype="OPUS" if b"opus" in name else None)
    with open(os.path.join(folder, b"\xe9.trans.txt"), "wb") as file:
        file.write(b"a\xff ONE\na+b TWO TWO\ncaf\xe9\tTHREE\no\xf6 FOUR\n[%]*# FIVE\n")
    s = audio.open_split(str(tmp_path), "train")
    assert [len(s.load(i)) for i in range(6)] == s.lengths.tolist() == [4000] * 6 and not s.skipped
    texts = dict(zip([os.fsencode(os.path.basename(name)) for name in s.names], s.transcripts))
    assert [texts[name] for name in names] == ["ONE", "TWO TWO", "THREE", "FOUR"]
    assert texts[b"[%]*#.wav"] == "FIVE" and texts[b"new\nline.ogg"] == ""
    (tmp_path / "m.tsv").write_bytes(b"train\n" + b"\t1\n".join(names) + b"\t1\n")
    assert audio.open_split(str(tmp_path), "m").names == [
        os.path.join(str(tmp_path), "train", os.fsdecode(name)) for name in names
    ]


def test_windows_of_long_recordings():
    torch.manual_seed(0)
    conv, seen = torch.nn.Conv1d(1, 3, 400, 320), []

    def network(wave):  # a frame and its 200 neighbours
        seen.append(wave.shape[1])
        x = torch.nn.functional.avg_pool1d(conv(wave[:, None]), 401, 1, 200, count_include_pad=False)
        return x.transpose(1, 2), None

    limit = 400 + 2999 * 320  # samples of 3000 frames
    for n in (400, 50_000, limit, limit + 319, limit + 320, 3 * limit, 3 * limit + 7, 5 * limit + 12_345):
        wave = torch.randn(1, n)
        whole = network(wave)[0]
        del seen[:]
        parts = audio.in_windows(network, wave)
        assert parts.shape == whole.shape and max(seen) < limit + 320
        assert torch.equal(parts, whole) if len(seen) == 1 else (parts - whole).abs().max() < 1e-5
        assert (len(seen) == 1) == (n < limit + 320)


def corpus(root, split="train", speakers=2, per=3):
    """root/split/{speaker}/{chapter}/*.flac with transcripts, the last line without a newline."""
    for s in range(speakers):
        chapter = root / split / str(100 + s) / "7"
        stems = [f"{100 + s}-7-{i:04d}" for i in range(per)]
        for i, stem in enumerate(stems):
            write(chapter / f"{stem}.flac", wave(3000 + 1000 * s + 100 * i, seed=i))
        lines = [f"{stem} WORD {'ABC'[i % 3]}" for i, stem in enumerate(stems)]
        (chapter / f"{100 + s}-7.trans.txt").write_text("\n".join(lines))
    return root


def test_a_folder(tmp_path):
    root = corpus(tmp_path / "c")
    write(root / "train/.hidden/x.flac")
    write(root / "train/loose.WAV", wave(3333))
    write(root / "train/100/deep/er/d.flac", wave(9600), 48000)
    (root / "train/bad.flac").touch()
    (root / "train/gone.ogg").symlink_to("nowhere")
    (root / "train/x.trans.txt").write_bytes(b"\xef\xbb\xbfloose  in  lower\tcase\r\nother caf\xe9\r\n")
    (root / "train/101/linked").symlink_to(root / "train/100/7")
    s = audio.open_split(root, "train")
    inside = [os.path.relpath(name, root / "train") for name in s.names]
    assert inside == sorted(inside) and inside[3] == "100/deep/er/d.flac" and inside[-1] == "loose.WAV"
    assert s.lengths.tolist() == [3000, 3100, 3200, 3200, 4000, 4100, 4200, 3000, 3100, 3200, 3333]
    words = ["WORD A", "WORD B", "WORD C"]
    assert s.transcripts == [*words, "", *words, *words, "in lower case"]
    assert [Path(line.split(": ")[0]).name for line in s.skipped] == ["bad.flac", "gone.ogg"]
    part = s.part([5, 0])
    assert part.names == [s.names[5], s.names[0]] and part.lengths.tolist() == [4100, 3000]
    assert part.transcripts == ["WORD B", "WORD A"] and part.load(0).shape == (4100,)


def manifest(tmp_path, wrd=None):
    for i in range(3):
        write(tmp_path / f"audio/spk{i}/{i}.flac", wave(1000 * (i + 1)))
    lines = [f"spk{i}/{i}.flac\t{1000 * (i + 1)}" for i in range(3)]
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m/train.tsv").write_text("\n".join([str(tmp_path / "audio"), *lines]) + "\n")
    if wrd:
        (tmp_path / "m/train.wrd").write_text(wrd)
    return tmp_path / "m"


def test_a_manifest(tmp_path):
    root = manifest(tmp_path)
    s = audio.open_split(root, "train")
    assert s.lengths.tolist() == [1000, 2000, 3000] and s.transcripts == [""] * 3
    assert s.load(2).shape == (3000,) and s.names[1] == str(tmp_path / "audio/spk1/1.flac")
    manifest(tmp_path, wrd="one two\nThree\nfour")
    s = audio.open_split(root, "train.tsv", min_samples=1500)
    assert s.transcripts == ["Three", "four"] and s.lengths.tolist() == [2000, 3000]
    (root / "train.wrd").unlink()
    (root / "train.tsv").write_text("../audio\nspk1/1.flac\t7\nspk9/gone.flac\nspk0/0.flac\n\n\n")
    s = audio.open_split(root, "train")  # relative to the manifest; counts are not looked at
    assert s.lengths.tolist() == [2000, 1000] and "gone.flac: [Errno 2] No such file" in s.skipped[0]


def test_splits_are_found(tmp_path):
    splits = ("train", "train-clean", "train-other", "dev", "valid", "dev-clean", "dev-other")
    for n, split in enumerate(splits):
        write(tmp_path / split / "1/2/a.flac", wave(1000 + n))

    def lengths(**options):
        return [s.lengths.tolist() for s in audio.open_data(str(tmp_path), **options)]

    assert lengths(train=["train-other", "dev"], valid=["dev-clean", "train"]) == [[1002, 1003], [1005, 1000]]
    for gone, expected in (
        ("", [[1000], [1003]]),
        ("train", [[1001, 1002], [1003]]),
        ("dev", [[1001, 1002], [1004]]),
        ("valid", [[1001, 1002], [1005, 1006]]),
        ("train-clean", [[1002], [1005, 1006]]),
        ("train-other", [[1003, 1001, 1002, 1000, 1004], [1005, 1006]]),  # all, without what is in valid
    ):
        if gone:
            (tmp_path / gone).rename(tmp_path / f"gone-{gone}")
        assert lengths() == expected
    for split in ("dev-clean", "dev-other"):
        (tmp_path / split).rename(tmp_path / f"gone-{split}")
    # every 20th of what is long enough
    assert lengths(min_seconds=1002 / 16000) == [[1006, 1003, 1002, 1004], [1005]]


@pytest.mark.parametrize("name", ["valid", "VAL", "Validation", "DEV", "test", "Dev-clean"])
def test_held_out_splits_of_customary_names(tmp_path, name, capsys):
    for n, split in enumerate(("TRAIN", name, "docs", "Test-2")):
        write(tmp_path / split / "a.flac", wave(1000 + n))
    assert [s.lengths.tolist() for s in audio.open_data(str(tmp_path))] == [[1000], [1001]]
    assert capsys.readouterr().out == f"{tmp_path}: training on TRAIN/; validation: {name}/\n"
    for split in ("TRAIN", name):  # the same by manifests
        (tmp_path / split).rename(tmp_path / "docs" / split)
        (tmp_path / f"{split}.tsv").write_text(f"docs/{split}\na.flac\t1\n")
    (tmp_path / "Test-2").rename(tmp_path / "docs" / "Test-2")
    if name != "Dev-clean":  # such names are those of folders
        assert [s.lengths.tolist() for s in audio.open_data(str(tmp_path))] == [[1000], [1001]]
        assert f"training on TRAIN.tsv; validation: {name}.tsv\n" in capsys.readouterr().out


def test_an_empty_held_out_folder_is_one_line(tmp_path):
    write(tmp_path / "train/a.flac")
    (tmp_path / "val/deep").mkdir(parents=True)
    with pytest.raises(UserError, match="val/: no recording can be used"):
        audio.open_data(str(tmp_path))


def test_wrong_folders_and_splits_are_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.wav").write_text("x")
    write(tmp_path / "one/train/a.wav")
    manifest(tmp_path / "w", wrd="a\nb\n")
    for root, options, reason in (
        ("absent", {}, "absent: no such folder"),
        ("broken", {}, "a.wav: .*not recognised"),
        ("one", {}, "left for training"),
        ("one", {"train": ["test-clean"]}, "test-clean.tsv: no such file"),
        ("one", {"min_seconds": 2}, "of 2 s or more"),
        ("w/m", {}, "3 recordings, but 2 transcripts"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            audio.open_data(str(tmp_path / root), **options)
        assert str(tmp_path / root) in str(error.value) and "\n" not in str(error.value)


def events(root, **files):
    """root with these CSV files and classes.txt beside clips/1000.wav .. 1004.wav, of so many samples."""
    for i in range(5):
        write(root / f"clips/{1000 + i}.wav", wave(1000 + i))
    (root / "classes.txt").write_text(files.pop("classes", "Dog\n\nCat\nCar, passing by\n"))
    for name, text in files.items():
        (root / f"{name}.csv").write_text(text)
    return str(root)


def test_events(tmp_path):
    train = 'path,labels\r\nclips/1000.wav, Dog\n\n"clips/1001.wav","Car, passing by; Cat"\ngone.wav,Cat\n'
    valid = "clips/1003.wav,Cat\nclips/1002.wav,Dog;Cat;\n"
    root = events(tmp_path, train=train, valid=valid, other="clips/1002.wav,Dog\nclips/1004.wav,Dog\n")
    classes, train, valid = audio.open_events(root)
    assert classes == ["Dog", "Cat", "Car, passing by"]
    assert train.names == [f"{root}/clips/1000.wav", f"{root}/clips/1001.wav"]
    assert train.transcripts == ["Dog", "Car, passing by;Cat"] and valid.transcripts == ["Cat", "Dog;Cat"]
    assert valid.lengths.tolist() == [1003, 1002] and len(train.load(0)) == 1000
    assert len(train.skipped) == 1 and train.skipped[0].startswith(f"{root}/gone.wav: ") and not valid.skipped
    assert audio.open_events(root, ["other.csv"])[1].lengths.tolist() == [1004]  # 1002 is in valid
    assert audio.open_events(root, ["valid"], ["valid"])[1].lengths.tolist() == [1003, 1002]
    sets = audio.open_data(root, min_seconds=1001 / 16000)  # pre-training looks at no events
    assert [s.lengths.tolist() for s in sets] == [[1001], [1003, 1002]]
    assert {text for s in sets for text in s.transcripts} == {""}
    for name in ("val", "Dev", "eval", "TEST"):
        (tmp_path / "valid.csv").rename(tmp_path / f"{name}.csv")
        assert audio.open_events(root)[2].lengths.tolist() == [1003, 1002]
        (tmp_path / f"{name}.csv").rename(tmp_path / "valid.csv")
    (tmp_path / "valid.csv").unlink()
    assert [s.lengths.tolist() for s in audio.open_events(root)[1:]] == [[1001], [1000]]  # every 20th
    for reason, table in (
        ("train.csv line 2: ", "clips/1000.wav,Dog\nclips/1001.wav,Cat;Cow\n"),
        ("train.csv line 1: ", "clips/1000.wav,Car, passing by\n"),
        ("lost.wav", "lost.wav,Dog\n"),
    ):
        with pytest.raises(UserError, match=f"^{tmp_path}.*{reason}"):
            audio.open_events(events(tmp_path, train=table, valid="clips/1001.wav,Dog\n"))


LENGTHS = np.random.default_rng(5).integers(1000, 40000, 500)


def test_length_groups():
    limit, most = 30000, 100_000
    epochs = [audio.length_groups(LENGTHS, most, 0, epoch, limit) for epoch in range(3)]
    for groups in epochs:
        clipped = [np.minimum(LENGTHS[group], limit) for group in groups]
        assert sorted(np.concatenate(groups).tolist()) == list(range(500))
        assert max(len(n) * n.max() for n in clipped) <= most
        assert np.mean([len(n) * n.max() for n in clipped]) > 0.8 * most  # full
        assert np.median([n.max() / n.min() for n in clipped]) < 1.3  # similar lengths
    ordered = audio.length_groups(LENGTHS, most, 0, 0, limit, sort=True)
    assert (np.diff(np.minimum(LENGTHS, limit)[np.concatenate(ordered)]) >= 0).all()


def test_batches_are_the_same_for_any_number_of_processes():
    most, limit, count, steps = 100_000, 30000, 12, 14  # more than an epoch
    keys = functools.partial(audio.batches_by_length, LENGTHS, most, limit, 3)
    whole = list(keys(0, steps, count, 1, 0))
    groups = [(e, g.tolist()) for e in range(3) for g in audio.length_groups(LENGTHS, most, 3, e, limit)]
    assert [(e, list(indices)) for e, _, indices in whole] == groups[: steps * count] and whole[-1][0] >= 1
    assert [i for _, i, _ in whole] == list(range(steps * count))
    for world in (1, 2, 3, 4, 12):
        ranks = [list(keys(0, steps, count, world, rank)) for rank in range(world)]
        assert [key for together in zip(*ranks) for key in together] == whole
        for rank, own in enumerate(ranks):
            for start in (1, 5, 13, 14):
                assert list(keys(start, steps, count, world, rank)) == own[start * count // world :]


def numbered(lengths=(500, 900, 700, 800, 1000, 600), broken=()):
    """Utterance i holds i + 1 plus a ramp, so that a window shows where it was cut."""
    waves = [(i + 1 + np.arange(n) / RAMP).astype(np.float32) for i, n in enumerate(lengths)]

    class Numbered(audio.Utterances):
        def load(self, i):
            if i in broken:
                raise ValueError("broken")
            return self.waves[i]

    return Numbered([f"u{i}" for i in range(len(waves))], np.array(lengths), [""] * len(waves), waves)


def cut(window):
    """-> utterance, first sample."""
    return int(window[0]) - 1, round(RAMP * (float(window[0]) % 1))


def test_batches_crop_to_the_shortest():
    data = audio.Batches(numbered(), seed=1, max_length=10**6, pad=False)
    for epoch in range(20):
        batch = data[epoch, 0, (1, 3, 4)]
        assert batch["source"].shape == (3, 800) and batch["source"].dtype == torch.float32
        assert batch["lengths"].tolist() == [800] * 3 and batch["lengths"].dtype == torch.int64
        assert batch["indices"].tolist() == [1, 3, 4] == [cut(x)[0] for x in batch["source"]]
        assert batch["skipped"] == [] and batch["mask"] is None and cut(batch["source"][1])[1] == 0
        assert np.allclose(np.diff(batch["source"].numpy(), axis=1), 1 / RAMP, atol=1e-6)  # one piece
    small = audio.Batches(numbered(), seed=1, max_length=300, pad=False)
    window = small[3, 0, (1, 3)]["source"][1]  # a function of seed, epoch and index
    assert window.shape == (300,) and torch.equal(window, small[3, 7, (3,)]["source"][0])
    starts = {cut(small[epoch, 0, (0,)]["source"][0])[1] for epoch in range(1000)}
    assert min(starts) == 0 and max(starts) == 200 and len(starts) > 150  # the last start, too


def test_batches_pad_and_draw_masks_from_numbers_of_their_own():
    data = audio.Batches(numbered(), seed=1, max_length=750, pad=True, masker=random_mask)
    batch = data[0, 1, (0, 2, 1)]
    assert batch["source"].shape == (3, 750) and batch["lengths"].tolist() == [500, 700, 750]
    for x, n in zip(batch["source"], batch["lengths"]):
        assert (x[:n] > 0.9).all() and (x[n:] == 0).all()
    assert cut(batch["source"][0]) == (0, 0) and data[0, 0, (0, 5)]["source"].shape == (2, 600)
    expected = np.random.default_rng([1, 0, 1, 1]).random((3, 40)) < 0.5
    assert batch["mask"].dtype == torch.bool and np.array_equal(batch["mask"], expected)


def random_mask(lengths, rng):
    assert lengths.dtype == torch.int64
    return rng.random((len(lengths), 40)) < 0.5


@pytest.mark.parametrize(
    "broken, pad, indices, replaced, lengths",  # by length: 0 (500), 5 (600), 2 (700), 3 (800), 1, 4 (1000)
    [
        ([2, 3], False, (2, 4), [1, 4], [900, 900]),
        ([4, 1], False, (4,), [3], [800]),  # none is longer
        ([4, 1], True, (4, 0), [3, 0], [800, 500]),
    ],
)
def test_broken_recordings_are_replaced(broken, pad, indices, replaced, lengths):
    batch = audio.Batches(numbered(broken=broken), seed=1, max_length=10**6, pad=pad)[0, 0, indices]
    assert batch["indices"].tolist() == replaced == [cut(x)[0] for x in batch["source"]]
    assert batch["lengths"].tolist() == lengths and batch["source"].shape == (len(indices), max(lengths))
    assert batch["skipped"] == [f"u{i}: broken" for i in broken]
    with pytest.raises(UserError, match="nor can any other"):
        audio.Batches(numbered(broken=range(6)), seed=1, max_length=10**6, pad=pad)[0, 0, (4,)]


def test_workers_load_the_same(tmp_path):
    train, _ = audio.open_data(str(corpus(tmp_path / "c", per=10)))
    Path(train.names[3]).write_bytes(b"")  # broken since it was measured
    data = audio.Batches(train, 0, 3500, False, random_mask)
    keys = list(audio.batches_by_length(train.lengths, 12000, 3500, 0, 0, 3, 4, 1, 0))
    options = {"batch_size": None, "sampler": keys}
    inside = list(torch.utils.data.DataLoader(data, **options))
    loader = torch.utils.data.DataLoader(data, **options, num_workers=1, multiprocessing_context="spawn")
    assert len(inside) == 12 and any(batch["skipped"] for batch in inside)
    for a, b in zip(inside, loader, strict=True):
        assert a["skipped"] == b["skipped"]
        assert all(torch.equal(a[name], b[name]) for name in ("source", "lengths", "mask", "indices"))


def test_mix():
    x, samples, y = torch.randn(6, 50), torch.arange(45, 51), torch.eye(6)
    mixed, longest, truth = audio.mix(x, samples, y, 0.7, np.random.default_rng(3))
    assert torch.allclose(truth.sum(1), torch.ones(6)) and torch.allclose(mixed, truth @ x)
    assert longest.tolist() == [samples[row > 0].max() for row in truth]
    same = audio.mix(x, samples, y, 0.0, np.random.default_rng(3))
    assert all(torch.equal(a, b) for a, b in zip(same, (x, samples, y)))


def test_shared_recordings(shared):
    train, dev = audio.open_data(str(shared / "speech/digits"))
    assert (len(train), len(dev)) == (798, 49) and round(train.lengths.sum() / 16000 / 60, 2) == 35.98
    assert sum(len(text.split()) for text in train.transcripts) == 4000 and not train.skipped
    assert all(len(train.load(i)) == train.lengths[i] for i in range(0, 798, 80))
    s = audio.open_split(shared / "speech/LibriSpeech", "test-clean")
    assert len(s) == 4 and sum(len(text.split()) for text in s.transcripts) == 58
    assert [round(n / 16000, 1) for n in s.lengths] == [10.4, 3.3, 2.1, 5.4] and all(s.transcripts)


def test_the_librispeech_command(tmp_path, monkeypatch):
    source, archive = corpus(tmp_path / "src", "dev-clean"), tmp_path / "dev-clean.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "LibriSpeech")
    monkeypatch.setattr(audio, "LIBRISPEECH", tmp_path.as_uri())
    flags = ["librispeech", "--splits", "dev-clean", "--out", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", ["audio", *flags])
    audio.main()
    s = audio.open_split(tmp_path / "o/LibriSpeech", "dev-clean")
    assert len(s) == 6 and s.transcripts[5] == "WORD C" and s.load(0).shape == (3000,)

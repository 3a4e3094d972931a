"""data/synthetic.py: the same seed gives the same data, and there is something to learn in it."""

import functools

import numpy as np

from data import synthetic


@functools.lru_cache(maxsize=1)
def letters():
    """-> pixels (N, 32, 32, 3) in 0..1 and labels (N,), of train and of val."""
    splits = [(np.stack(files) / 255, np.array(labels)) for _, labels, files in synthetic.images()]
    return *splits[0], *splits[1]


@functools.lru_cache(maxsize=1)
def spoken():
    return synthetic.speech(n_train=40, n_valid=10)


def test_images():
    train, val = synthetic.images()
    for (classes, labels, files), n in ((train, 4000), (val, 1000)):
        assert classes == list("AHMOTUVWXY") and len(files) == n
        assert files[0].shape == (32, 32, 3) and files[0].dtype == np.uint8
        assert type(labels[0]) is int and np.bincount(labels).tolist() == [n // 10] * 10
    assert len({image.tobytes() for image in train[2] + val[2]}) == 5000
    again, other = (synthetic.images(seed, n_train=200, n_val=10)[0] for seed in (0, 1))
    assert again[1] == synthetic.images(n_train=200, n_val=20)[0][1] != other[1]
    assert train[1][:12] == [2, 2, 9, 1, 6, 5, 7, 3, 3, 1, 9, 5]
    assert val[1][:12] == [4, 5, 7, 6, 1, 4, 5, 9, 7, 8, 1, 8]


def test_classes_need_more_than_colour():
    """Linear classifiers on colour and contrast stay near chance (0.1), on pixels they do not get far."""
    x, y, x_val, y_val = letters()

    def accuracy(features):
        a, b = (np.c_[features(z), np.ones(len(z))] for z in (x, x_val))
        weight = np.linalg.lstsq(a, np.eye(10)[y], rcond=None)[0]
        return ((b @ weight).argmax(1) == y_val).mean()

    assert accuracy(lambda z: np.c_[z.mean((1, 2)), z.std((1, 2))]) < 0.18
    assert accuracy(lambda z: z[:, ::2, ::2].reshape(len(z), -1)) < 0.35


def test_speech():
    (waves, texts), (valid_waves, valid_texts) = spoken()
    assert len(waves) == len(texts) == 40 and len(valid_waves) == len(valid_texts) == 10
    for wave in waves + valid_waves:
        assert wave.dtype == np.float32 and 16000 <= len(wave) <= 40000 and np.abs(wave).max() <= 1
    assert texts[:2] == ["ZETA ROF KAZU AM", "KAK OKA OLET"]
    again, other = (synthetic.speech(seed, n_train=3, n_valid=2) for seed in (0, 1))
    assert again[0][1] == texts[:3] != other[0][1] and again[1][1] == valid_texts[:2]
    assert all(np.array_equal(a, b) for a, b in zip(again[0][0], waves))


def spectrum(wave):
    """-> (T, 40): log energy in 40 bands, 10 ms apart."""
    frames = np.lib.stride_tricks.sliding_window_view(wave / wave.std(), 400)[::160] * np.hanning(400)
    power = np.abs(np.fft.rfft(frames, 512))[:, 1:241].reshape(len(frames), 40, 6) ** 2
    return np.log(power.mean(-1) + 1e-3)


def test_letters_sound_different():
    """Letters of one speaker are recognised by the spectra of another."""

    def say(letter, tract, pitch, seed):
        rng = np.random.default_rng(seed)
        return spectrum(synthetic.speak([" ", letter, " "], [0.05, 0.14, 0.05], tract, pitch, rng)).ravel()

    templates = [np.mean([say(c, t, 120, 9) for t in (0.9, 1.0, 1.1)], axis=0) for c in synthetic.LETTERS]
    right = []
    for i, letter in enumerate(synthetic.LETTERS):
        for seed, (tract, pitch) in enumerate([(0.95, 110), (1.05, 180)]):
            right.append(np.square(templates - say(letter, tract, pitch, seed)).sum(1).argmin() == i)
    assert np.mean(right) > 0.8  # chance: 0.07


def test_documents():
    train, valid = synthetic.documents()
    assert sum(map(len, train + valid)) > 600_000 and 0.03 < len(valid) / len(train) < 0.3
    assert len(set(train + valid)) == len(train) + len(valid)
    assert any("Return the" in document for document in train)

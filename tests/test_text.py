"""The vocabulary against naive merging, prepared corpora, blocks and batches against loops."""

import functools
import itertools
import json
import os
import pickle
import random
import sys

import numpy as np
import pytest
import regex
import tiktoken
import torch

from common import UserError
from data import text as T
from masking import bert_mask, span_mask_tokens

TALE = "the cat sat on a mat and then ran into the hat of that fat rat while the bat was at banana lane"


def story(n, seed=0):
    """n lines of made English."""
    rng = random.Random(seed)
    words = [rng.choices(TALE.split(), k=rng.randint(1, 12)) for _ in range(n)]
    return [" ".join(line).capitalize() + rng.choice([".", "!", "?", " ..."]) + "\n" for line in words]


def documents(seed, n):
    return [story(random.Random(seed + i).randint(1, 6), seed + i) for i in range(n)]


def write_text(path, docs):
    path.write_text("\n".join("".join(doc) for doc in docs), encoding="utf-8")
    return str(path)


def decode(vocabulary, ids):
    pieces = {i: piece for piece, i in vocabulary.pieces.items()}
    return b"".join(pieces[i] for i in ids).decode()


def texts(corpus, vocabulary):
    return [decode(vocabulary, corpus.tokens[a:b]) for a, b in itertools.pairwise(corpus.bounds)]


@pytest.fixture(scope="module")
def vocabulary():
    return T.train_vocabulary(story(200), 300)


def naive_bpe(counts, n):
    """All pairs are counted again before each merge; a pair that spells a known piece adds none."""
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < n:
        pairs = {}
        for word, count in counts.items():
            for pair in itertools.pairwise(words[word]):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, parts in words.items():
            i, out = 0, []
            while i < len(parts):
                hit = tuple(parts[i : i + 2]) == best
                out.append(parts[i] + parts[i + 1] if hit else parts[i])
                i += 1 + hit
            words[word] = out
        if best[0] + best[1] not in pieces:
            pieces.append(best[0] + best[1])
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_training_is_naive_counting(seed):
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé "
    counts = {"".join(rng.choices(letters, k=rng.randint(1, 14))): rng.randint(1, 6) for _ in range(40)}
    ranks = T.train_bpe(counts, 256 + 60)
    assert list(ranks) == naive_bpe(counts, 256 + 60) and list(ranks.values()) == list(range(len(ranks)))


def test_training_stops_at_pairs_seen_once():
    assert len(T.train_bpe({"abcdef": 1}, 1000)) == len(T.train_bpe({}, 1000)) == 256
    assert list(T.train_bpe({"ab": 2, "cd": 2}, 257))[256:] == [b"ab"]  # of equal counts, the first by bytes
    words = "x" * 101 + " xx" * 3  # words of over 100 letters do not count
    assert T.train_vocabulary([words], 5000).size == 263
    with pytest.raises(UserError, match="--vocab_size 260"):
        T.train_vocabulary(["a"], 260)


def naive_merging(word, ranks):
    """The lowest rank first, the leftmost of equals."""
    parts = [bytes([b]) for b in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_encoding_is_naive_merging(vocabulary):
    for line in [*story(40, seed=5), "  two  spaces, l'été won't   \n\n\t42nd\n", "banana" * 9]:
        words = regex.findall(T.WORDS, line)
        assert "".join(words) == line
        expected = [i for word in words for i in naive_merging(word.encode(), vocabulary.pieces)]
        assert vocabulary.encode(line) == expected
    words = ["I", "'ve", " 12", " cats", "!!", " ", " été", "\n", " x", "_", "2", "e", "\n\n"]  # by hand
    assert regex.findall(T.WORDS, "".join(words)) == words


def test_ids_are_robertas(vocabulary):
    v = vocabulary
    assert v.special == {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 299}
    assert (v.size, v.mask, v.regular_ids.tolist()) == (300, 299, list(range(4, 299)))
    assert sorted(v.pieces.values()) == v.regular_ids.tolist()
    assert not set(v.encode("<mask></s>")) & set(v.special.values())


def test_any_text_comes_back(vocabulary):
    rng = random.Random(0)
    planes = [(0, 0x80), (0, 0x800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 14), (0x2000, 0x2030)]
    texts = ["".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(n % 40)) for n in range(300)]
    runs = [
        unit * 30_000 for unit in (" ", " \n", "a", "\u3000", "cat ")
    ]  # the tokenizer alone fails on them
    for text in texts + runs:
        assert decode(vocabulary, vocabulary.encode(text)) == text
    assert vocabulary.encode(runs[-1]).count(*vocabulary.encode(" cat")) == 29_999  # words stay whole


def test_vocabulary_as_text(vocabulary):
    for v in (vocabulary, T.Vocabulary({bytes([b]): b + 5 for b in range(256)}, 300, mask=4)):
        for again in (T.Vocabulary.parse(v.spell()), pickle.loads(pickle.dumps(v))):
            assert list(again.pieces.items()) == list(v.pieces.items())
            assert (again.size, again.mask) == (v.size, v.mask)
            assert again.regular_ids.tolist() == v.regular_ids.tolist()
            assert again.encode("the cat") == v.encode("the cat")
    assert (v.mask, v.regular_ids.tolist()) == (4, list(range(5, 261)))


MERGES = ["h e", "l l", "he ll", "\u0120 w", "hell o", "\u0120w o"]


def gpt2_ids():
    """{token: id} in the order of GPT-2's: printable bytes, other bytes, merges, the end of texts."""
    printable = [chr(b) for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*printable, *others, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def write_vocabulary(folder, ids, merges=MERGES, names=("encoder.json", "vocab.bpe"), order=()):
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(ids), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    if order:
        (folder / "dict.txt").write_text("".join(f"{i} {9 - k}\n" for k, i in enumerate(order)))
    return str(folder)


def test_fairseqs_order(tmp_path):
    """Line n of dict.txt names the GPT-2 id that becomes n + 4; <mask> follows the last line."""
    ids = gpt2_ids()
    order = random.Random(0).sample(range(263), 263)
    folder = write_vocabulary(tmp_path / "a", ids, order=[*order, "madeupword0000", "madeupword0001"])
    v = T.open_vocabulary(folder)
    assert (v.size, v.mask) == (4 + 265 + 1, 269)
    assert v.regular_ids.tolist() == [i for i in range(4, 267) if order[i - 4] != 262]  # the end of texts
    expected = [4 + order.index(ids[token]) for token in ("hello", "\u0120wo", "\u010a")]
    assert v.encode("hello wo\n") == expected
    assert decode(v, v.encode("hell\x00 ÿ the 100 % 日")) == "hell\x00 ÿ the 100 % 日"
    order.remove(ids["q"])
    holes = T.open_vocabulary(write_vocabulary(tmp_path / "b", ids, order=order))
    assert holes.encode("q") == [3] and T.Vocabulary.parse(holes.spell()).encode("q") == [3]


@pytest.mark.parametrize("mask_at", [4, 100, -1])
def test_robertas_files(tmp_path, mask_at):
    """Its own ids count, wherever <mask> is; a dict.txt beside them is not read."""
    tokens = list(gpt2_ids())[:-1]
    random.Random(1).shuffle(tokens)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "madeupword0000"]
    tokens.insert(mask_at if mask_at > 0 else len(tokens), "<mask>")
    ids = {token: i for i, token in enumerate(tokens)}
    names = ("vocab.json", "merges.txt")
    v = T.open_vocabulary(write_vocabulary(tmp_path / "a", ids, names=names, order=range(9)))
    assert (v.size, v.mask) == (len(ids), ids["<mask>"])
    assert v.encode("hello wo") == [ids["hello"], ids["\u0120wo"]]
    assert T.Vocabulary.parse(v.spell()).mask == v.mask
    assert set(v.regular_ids) == set(range(len(ids))) - {*v.special.values(), ids["madeupword0000"]}
    text, rng = np.array([0, *v.encode("hello wo " * 300), 2]), np.random.default_rng(0)
    drawn, mask = bert_mask(text, v.regular_ids, v.mask, 1.0, rng)  # a tenth becomes random tokens
    assert set(drawn[1:-1].tolist()) <= {*v.regular_ids, v.mask} and len(set(drawn.tolist())) > 40
    assert mask.tolist() == [False, *[True] * (len(text) - 2), False]
    assert span_mask_tokens(text, v.regular_ids, v.mask, 0.5, 4, rng)[0][[0, -1]].tolist() == [0, 2]
    del ids["q"]  # some vocabularies lack bytes
    assert T.open_vocabulary(write_vocabulary(tmp_path / "b", ids, names=names)).encode("q") == [3]


def test_wrong_vocabularies(tmp_path):
    ids, names, order = gpt2_ids(), ("vocab.json", "merges.txt"), range(263)
    special = {"<s>": 0, "<pad>": 3, "</s>": 2, "<unk>": 1, "<mask>": 4}
    (tmp_path / "vocab").write_text("data2vec vocabulary, ids: 300\nAA== x\n")
    for name, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "invalid literal"),
        (write_vocabulary(tmp_path / "a", ids | special, names=names), "special tokens are not"),
        (write_vocabulary(tmp_path / "b", ids, ["z z"], order=order), "'zz'"),
        (write_vocabulary(tmp_path / "d", ids), "dict.txt"),
    ):
        with pytest.raises(UserError, match=f"{name}: no vocabulary .*{reason}"):
            T.open_vocabulary(str(name))


def test_gpt2_is_downloaded(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b"ll": 257}
    special = {"<|endoftext|>": 258}
    small = tiktoken.Encoding("gpt2", pat_str=T.WORDS, mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    v = T.open_vocabulary("gpt2")
    assert v.size == 4 + 258 + 1 and v.encode("hell") == [260, 261]


def test_documents(tmp_path):
    (tmp_path / "a").write_bytes("\ufeff\n\none\r\ntwo \u2028 x\n \t\n\nthree\n".encode())
    (tmp_path / "b").write_text("four\n\nfive")
    (tmp_path / "c").write_text("")
    documents = list(T.read_documents([tmp_path / name for name in "abc"]))
    assert documents == [["one\n", "two \u2028 x\n"], ["three\n"], ["four\n"], ["five"]]


def test_prepare(tmp_path, monkeypatch, capsys):
    docs, held = documents(0, 30), documents(500, 4)
    a, b = write_text(tmp_path / "a.txt", docs[:20]), write_text(tmp_path / "b.txt", docs[20:])
    valid, out = write_text(tmp_path / "v.txt", held), tmp_path / "new" / "out"
    command = ["data.text", "prepare", "--input", a, b, valid, "--valid", valid, "--out", f"{out}/"]
    monkeypatch.setattr(sys, "argv", [*command, "--vocab_size", "320"])
    T.main()
    assert "'train': {'documents': 30," in capsys.readouterr().out
    assert os.listdir(tmp_path / "new") == ["out"]
    train, valid_set, vocabulary = T.open_data(str(out))
    assert texts(train, vocabulary) == ["".join(doc) for doc in docs]
    assert texts(valid_set, vocabulary) == ["".join(doc) for doc in held]
    assert train.tokens.dtype == np.uint16 and train.bounds.dtype == np.int64
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train"] == {"documents": 30, "tokens": len(train.tokens)}
    expected = T.train_vocabulary((line for doc in docs for line in doc), 320)
    assert vocabulary.spell() == expected.spell()
    again = pickle.loads(pickle.dumps(train))  # for workers: by its name
    assert len(pickle.dumps(train)) < 1000 and (again.tokens == train.tokens).all()


def test_prepare_holds_out_documents(tmp_path):
    docs = documents(0, 60)
    wide = T.Vocabulary({bytes([b]): b + 4 for b in range(256)}, 70_000)  # ids that take four bytes
    (tmp_path / "vocab").write_text(wide.spell())
    T.prepare([write_text(tmp_path / "a.txt", docs)], tmp_path / "out", vocab=tmp_path, valid_every=10)
    train, valid, v = T.open_data(str(tmp_path / "out"))
    assert train.tokens.dtype == np.uint32 and v.size == 70_000
    assert texts(valid, v) == ["".join(doc) for doc in docs[::10]]
    assert texts(train, v) == ["".join(doc) for i, doc in enumerate(docs) if i % 10]


def test_prepare_refuses(tmp_path):
    good, one = write_text(tmp_path / "good", documents(0, 9)), write_text(tmp_path / "one", documents(0, 1))
    (tmp_path / "latin").write_bytes("ab é cd\n".encode("latin1"))
    for args, message in (
        ({"inputs": [one]}, "no text for train"),
        ({"inputs": [str(tmp_path / "none")]}, "none: no such file"),
        ({"inputs": [str(tmp_path / "latin")]}, "latin: not UTF-8"),
        ({"inputs": [good], "out": tmp_path}, "--out .*: exists"),
    ):
        with pytest.raises(UserError, match=message):
            T.prepare(**{"out": tmp_path / "out"} | args)
    assert sorted(os.listdir(tmp_path)) == ["good", "latin", "one"]
    T.prepare([good], tmp_path / "out", 300)
    assert sorted(os.listdir(tmp_path)) == ["good", "latin", "one", "out"]
    (tmp_path / "out" / "train.bin").write_bytes(b"abcd")
    with pytest.raises(UserError, match="train.bin: does not fit"):
        T.open_data(str(tmp_path / "out"))
    with pytest.raises(UserError, match="no prepared text; run `python -m data.text prepare"):
        T.open_data(str(tmp_path))


def test_synthetic_text():
    train, valid, vocabulary = T.open_data("")
    assert vocabulary.size == 2048 and 0.03 < len(valid.tokens) / len(train.tokens) < 0.3
    documents = texts(train, vocabulary)
    assert sum(map(len, documents)) > 2 * len(train.tokens) > 600_000
    assert not set(documents) & set(texts(valid, vocabulary))


def corpus_of(*lengths):
    """Documents of these lengths; token k of the corpus is 10 + k."""
    return T.Corpus(np.arange(10, 10 + sum(lengths)), np.cumsum([0, *lengths]))


def naive_blocks(corpus, n):
    """Token by token, as the docstring says."""
    out, now = [], [0]
    for start, end in itertools.pairwise(corpus.bounds):
        doc = corpus.tokens[start:end].tolist()
        if len(now) > 1 and len(now) + len(doc) + 1 > n:
            out.append(now)
            now = [0]
        while len(doc) + 2 > n:
            out.append([0, *doc[: n - 2], 2])
            doc = doc[n - 2 :]
        now += [*doc, 2]
    return [*out, now]


@pytest.mark.parametrize("n", [3, 4, 9, 32, 500])
def test_blocks_hold_everything_once(n):
    for seed in range(6):
        rng = np.random.default_rng([seed, n])
        corpus = corpus_of(*rng.integers(1, rng.choice([4, 20, 120]), 80).tolist())
        blocks = T.Blocks(corpus, n)
        loaded = [blocks.load(i) for i in range(len(blocks))]
        assert [x.tolist() for x in loaded] == naive_blocks(corpus, n)
        assert all(x.dtype == np.int64 and 3 <= len(x) <= n for x in loaded)
        assert [t for x in loaded for t in x if t >= 10] == corpus.tokens.tolist()


def test_full_blocks_hold_the_stream_of_documents():
    rng = np.random.default_rng(0)
    for n, longest in ((8, 5), (9, 40), (16, 1)):
        corpus = corpus_of(*rng.integers(1, longest + 1, 30).tolist())
        parts = itertools.pairwise(corpus.bounds)
        stream = [t for a, b in parts for t in [*corpus.tokens[a:b].tolist(), T.EOS]]
        blocks = T.FullBlocks(corpus, n)
        loaded = [blocks.load(i).tolist() for i in range(len(blocks))]
        assert len(loaded) == len(stream) // (n - 1) and all(len(x) == n and x[0] == T.BOS for x in loaded)
        assert sum((x[1:] for x in loaded), []) == stream[: len(loaded) * (n - 1)]


def draw_mask(p, ids, rng):
    return bert_mask(ids, range(4, 299), 299, p, rng)


def test_batches(vocabulary):
    ids = [np.array(vocabulary.encode("".join(doc)), np.uint16) for doc in documents(0, 60)]
    corpus = T.Corpus(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))
    batches = T.Batches(T.Blocks(corpus, 64), 7, functools.partial(draw_mask, 0.15))
    keys = [(0, 3), (0, 8), (2, 3)]
    batch = batches[keys]
    tokens, corrupted, mask = batch["tokens"], batch["corrupted"], batch["mask"]
    assert tokens.dtype == corrupted.dtype == torch.int64 and mask.dtype == torch.bool
    for row, (epoch, index) in enumerate(keys):
        ids = batches.blocks.load(index)
        n = len(ids)
        assert tokens[row, :n].tolist() == ids.tolist() and (tokens[row, n:] == 1).all()
        assert (corrupted[row, n:] == 1).all() and not mask[row, n:].any() and mask[row].any()
        expected = draw_mask(0.15, ids, np.random.default_rng([7, epoch, index]))
        assert torch.equal(corrupted[row, :n], expected[0]) and torch.equal(mask[row, :n], expected[1])
    assert (corrupted == tokens)[~mask].all() and not torch.equal(mask[0], mask[2])  # by epoch
    assert torch.equal(pickle.loads(pickle.dumps(batches))[keys]["corrupted"], corrupted)

"""Text: the vocabulary against naive merging, prepared corpora, blocks and batches, GLUE's files and metrics."""
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
import threading
import tracemalloc
import zipfile
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import BadInput
from data import glue as G
from data import text as T
from masking import bert_mask

TALE = "the cat sat on a mat and then ran into the hat of that fat rat while the bat was at the other end of banana lane"


def story(n, seed=0):
    """n lines of made English."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(TALE.split(), k=rng.randint(1, 12))).capitalize() + rng.choice([".", "!", "?", " ..."]) + "\n"
            for _ in range(n)]


@pytest.fixture(scope="module")
def vocabulary():
    return T.train_vocabulary(story(200), 300)


def run(monkeypatch, *args):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["data.text", *map(str, args)])
    T.main()


# ------------------------------------------------------------------------------------------------------- the vocabulary

def naive_bpe(counts, n):
    """All pairs counted anew before each merge. A piece is its bytes: a pair that spells a known piece adds none."""
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    pieces = [bytes([b]) for b in range(256)]
    while len(pieces) < n:
        pairs = {}
        for word, n_word in counts.items():
            for pair in itertools.pairwise(words[word]):
                pairs[pair] = pairs.get(pair, 0) + n_word
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, parts in words.items():
            i, out = 0, []
            while i < len(parts):
                hit = tuple(parts[i:i + 2]) == best
                out.append(parts[i] + parts[i + 1] if hit else parts[i])
                i += 1 + hit
            words[word] = out
        if best[0] + best[1] not in pieces:
            pieces.append(best[0] + best[1])
    return pieces


def toy_counts(seed):
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcdé "
    return {"".join(rng.choices(letters, k=rng.randint(1, 14))): rng.randint(1, 6) for _ in range(40)}


@pytest.mark.parametrize("seed", range(8))
def test_training_is_naive_counting(seed):
    counts = toy_counts(seed)
    ranks = T.train_bpe(counts, 256 + 60)
    assert list(ranks) == naive_bpe(counts, 256 + 60) and list(ranks.values()) == list(range(len(ranks)))
    shuffled = random.Random(1).sample(sorted(counts.items()), len(counts))
    assert list(T.train_bpe(dict(shuffled), 256 + 60)) == list(ranks)                     # the order of words means nothing


def test_training_stops_at_pairs_seen_once():
    assert len(T.train_bpe({"abcdef": 1}, 1000)) == 256
    assert list(T.train_bpe({"aaaa": 1}, 1000))[256:] == [b"aa"]
    assert list(T.train_bpe({"ab": 2, "cd": 2}, 257))[256:] == [b"ab"]                    # a tie: by bytes
    assert len(T.train_bpe({}, 1000)) == 256


def naive_merging(word, ranks):
    """The lowest rank first, the leftmost among equals."""
    parts = [bytes([b]) for b in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def test_encoding_is_naive_merging(vocabulary):
    import regex
    ranks = {piece: i for piece, i in vocabulary.pieces.items()}
    for line in [*story(40, seed=5), "  two  spaces, l'été won't   \n\n\t42nd\n", "banana" * 9]:
        words = regex.findall(T.WORDS, line)
        assert "".join(words) == line
        assert vocabulary.encode(line) == [i for word in words for i in naive_merging(word.encode(), ranks)]


def test_words_are_gpt2s():
    """Splits written out by hand, from the published pattern's description."""
    import regex
    cases = {"I've 12 cats!!": ["I", "'ve", " 12", " cats", "!!"], "a  b\n c": ["a", " ", " b", "\n", " c"],
             "don't-stop": ["don", "'t", "-", "stop"], "x_y\n\n": ["x", "_", "y", "\n\n"], "été 2e": ["été", " 2", "e"]}
    for text, words in cases.items():
        assert regex.findall(T.WORDS, text) == words


def test_ids_are_robertas(vocabulary):
    v = vocabulary
    assert (v.bos, v.pad, v.eos, v.unk, v.mask, v.size) == (0, 1, 2, 3, 299, 300) and v.special == (0, 1, 2, 3, 299)
    assert v.ordinary == range(4, 299) and sorted(v.pieces.values()) == list(v.ordinary)
    assert v.decode([0, *v.encode("a cat"), 299, 1, 2, 3]) == "<s>a cat<mask><pad></s><unk>"
    assert not set(v.encode("<mask></s>")) & set(v.special)                               # text is text
    assert v.encode("") == [] and isinstance(v.encode("cat"), list)
    assert [v.spelling[i] for i in range(4, 260)] == [bytes([b]) for b in range(256)]     # nothing is unknown


def test_any_text_comes_back(vocabulary):
    rng = random.Random(0)
    planes = [(0, 0x80), (0, 0x800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 14), (0x2000, 0x2030)]
    for _ in range(300):
        text = "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(0, 40)))
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([4 + 0xE9]) == "\ufffd"                                      # half a character
    for bad in ("\ud800", "ab\udfffc", "\ud83d\ud83d"):
        with pytest.raises(BadInput, match=f"surrogate pair at character {next(i for i, c in enumerate(bad) if c > 'z')}"):
            vocabulary.encode(bad)


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a", "-", "é", "\u3000", " a", "cat "])
def test_long_runs(vocabulary, unit):
    """A million of one character, which the tokeniser's regex alone would not survive."""
    text = unit * (100_000 // len(unit))
    assert vocabulary.decode(vocabulary.encode(text)) == text
    pieces = list(T.cut(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= T.PIECE


def test_cuts_fall_between_words(vocabulary, monkeypatch):
    text = "".join(story(60))
    whole = vocabulary.encode(text)
    monkeypatch.setattr(T, "PIECE", 100)
    assert len(list(T.cut(text))) > 10 and vocabulary.encode(text) == whole


def test_vocabulary_file(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "vocab")
    again = T.Vocabulary.load(tmp_path / "vocab")
    assert list(again.pieces.items()) == list(vocabulary.pieces.items()) and again.size == 300
    assert pickle.loads(pickle.dumps(again)).encode("the cat") == vocabulary.encode("the cat")
    assert os.listdir(tmp_path) == ["vocab"]
    lines = (tmp_path / "vocab").read_text().splitlines(keepends=True)
    for damage in (lines[:-1] + [lines[-1][:3]], lines[1:], lines[:100], [lines[0], *lines[5:], *lines[1:5]], [],
                   lines + lines[-1:], *([lines[0], row, *lines[2:]] for row in ("AA== 299\n", "é 4\n", "AA== 4 4\n", "*\n"))):
        (tmp_path / "bad").write_text("".join(damage))
        with pytest.raises(BadInput, match="bad: not a vocabulary"):
            T.Vocabulary.load(tmp_path / "bad")
    with pytest.raises(BadInput, match="No such file"):
        T.Vocabulary.load(tmp_path / "none")
    with pytest.raises(BadInput, match="no such vocabulary"):
        T.open_vocabulary(str(tmp_path / "none"))


def test_vocabulary_sizes():
    for size in (0, 260, 1 << 21):
        with pytest.raises(BadInput, match="--vocab_size"):
            T.train_vocabulary(["a"], size)
    assert T.train_vocabulary(["a"], 261).size == 261
    assert T.train_vocabulary(["ab ab"], 5000).size == 262                                # " ab": "ab" comes twice, then is done


def test_counting_streams_and_forgets(monkeypatch):
    taken = []

    def lines():                                                                          # endless, if it were listed first
        for i in itertools.count():
            taken.append(i)
            if i == 50:
                raise KeyError("read")
            yield f"the word{i}\n"
    with pytest.raises(KeyError):
        T.count_words(lines())
    assert len(taken) == 51
    counts = T.count_words(iter(["the cat", " the cat", "x" * 101]))
    assert counts == {"the": 1, " the": 1, " cat": 2}
    monkeypatch.setattr(T, "MOST_WORDS", 100)
    counts = T.count_words(f"{word} common" for word in map("".join, itertools.product("abcdefgh", repeat=3)))
    assert counts[" common"] == 512 and len(counts) <= 102


# ---------------------------------------------------------------------------------- vocabularies of others, tiny ones

def letters():
    """How GPT-2's files write bytes: printable Latin-1 as it is, the rest from U+0100 on. -> {byte: letter}"""
    table, n = {}, 0
    for b in range(256):
        if chr(b).isprintable() and not chr(b).isspace():
            table[b] = chr(b)
        else:
            table[b] = chr(256 + n)
            n += 1
    return table


MERGES = ["h e", "l l", "he ll", "\u0120 w", "hell o", "\u0120w o"]


def gpt2_tokens():
    """Tokens in the order of GPT-2's ids: printable bytes, other bytes, merges, the end of texts."""
    table = letters()
    assert table[32] == "\u0120" and table[10] == "\u010a"
    return [*sorted(table.values(), key=lambda c: (ord(c) >= 256, c)), *(m.replace(" ", "") for m in MERGES), "<|endoftext|>"]


def write_vocabulary(folder, ids, merges=MERGES, names=("encoder.json", "vocab.bpe"), order=None):
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(ids), encoding="utf-8")
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    if order is not None:
        (folder / "dict.txt").write_text("".join(f"{i} {9 - k}\n" for k, i in enumerate(order)), encoding="utf-8")
    return folder


def test_gpt2s_files(tmp_path):
    ids = {token: i for i, token in enumerate(gpt2_tokens())}
    v = T.Vocabulary.from_files(write_vocabulary(tmp_path / "a", ids))
    assert v.size == 4 + 262 + 1 and v.mask == 266
    assert v.encode("hello wo\n") == [4 + ids["hello"], 4 + ids["\u0120wo"], 4 + ids["\u010a"]]
    assert v.decode(v.encode("hell\x00 ÿ the 100 % 日")) == "hell\x00 ÿ the 100 % 日"
    v.save(tmp_path / "vocab")
    assert T.open_vocabulary(str(tmp_path / "vocab")).encode("hello wo") == v.encode("hello wo")
    assert T.open_vocabulary(str(tmp_path)).size == T.open_vocabulary(str(tmp_path / "a")).size == 267


def test_fairseqs_order(tmp_path):
    """dict.txt maps GPT-2's id on line n to n + 4; <mask> stands behind the last line, made-up words included."""
    ids = {token: i for i, token in enumerate(gpt2_tokens())}
    order = random.Random(0).sample(range(263), 263)
    v = T.Vocabulary.from_files(write_vocabulary(tmp_path / "a", ids, order=[*order, "madeupword0000", "madeupword0001"]))
    assert v.size == 4 + 265 + 1 and v.mask == 269
    for token in ("hello", "\u0120wo", "q"):
        text = token.replace("\u0120", " ")
        assert v.encode(text) == [4 + order.index(ids[token])]
        assert v.decode(v.encode(text)) == text
    assert v.decode([4 + 263, 4]) .startswith("<unk>")                                    # an id without a piece
    v.save(tmp_path / "vocab")
    assert T.Vocabulary.load(tmp_path / "vocab").encode("hello world") == v.encode("hello world")
    short = T.Vocabulary.from_files(write_vocabulary(tmp_path / "b", ids, order=[i for i in order if i != ids["q"]]))
    assert short.encode("q") == [3] and short.decode([3]) == "<unk>"                      # a hole says so
    short.save(tmp_path / "short")
    assert T.Vocabulary.load(tmp_path / "short").encode("aq") == [short.encode("a")[0], 3]


def test_hubs_files(tmp_path):
    tokens = gpt2_tokens()[:-1]
    random.Random(1).shuffle(tokens)
    ids = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens, "madeupword0000", "<mask>"])}
    v = T.Vocabulary.from_files(write_vocabulary(tmp_path / "a", ids, names=("vocab.json", "merges.txt"), order=range(9)))
    assert v.size == len(ids) and v.mask == ids["<mask>"]
    assert v.encode("hello wo") == [ids["hello"], ids["\u0120wo"]]
    wrong = {**ids, "<pad>": ids["<mask>"], "<mask>": 1}
    with pytest.raises(BadInput, match="vocab.json: .*RoBERTa's"):
        T.Vocabulary.from_files(write_vocabulary(tmp_path / "b", wrong, names=("vocab.json", "merges.txt")))


def test_wrong_vocabulary_files(tmp_path):
    ids = {token: i for i, token in enumerate(gpt2_tokens())}
    with pytest.raises(BadInput, match="no vocab.json or encoder.json"):
        T.open_vocabulary(str(tmp_path))
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(BadInput, match="no merges.txt or vocab.bpe"):
        T.open_vocabulary(str(tmp_path))
    for i, (files, name) in enumerate([
            ({"ids": [1]}, "encoder.json"), ({"ids": {"a": "b"}}, "encoder.json"),
            ({"ids": ids, "merges": ["h e", "x"]}, "vocab.bpe"),
            ({"ids": ids, "merges": ["z z"]}, "vocab.bpe"), ({"ids": {**ids, "hell": 5}}, "encoder.json"),
            ({"ids": {**ids, "日本": 400}, "merges": ["日 本"]}, "encoder.json")]):
        with pytest.raises(BadInput, match=name) as e:
            T.Vocabulary.from_files(write_vocabulary(tmp_path / str(i), **files))
        assert "\n" not in str(e.value)
    place = write_vocabulary(tmp_path / "d", ids, order=[1])
    (place / "dict.txt").write_text("1 2\n\n")
    with pytest.raises(BadInput, match="dict.txt"):
        T.Vocabulary.from_files(place)
    (place / "encoder.json").write_text("{")
    with pytest.raises(BadInput, match="encoder.json"):
        T.Vocabulary.from_files(place)


def test_gpt2_by_name(monkeypatch):
    def absent(name):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(tiktoken, "get_encoding", absent)
    with pytest.raises(BadInput, match="gpt2: cannot be fetched .*no route to host.*; run this once with a network") as e:
        T.open_vocabulary("gpt2")
    assert "\n" not in str(e.value)
    ranks = {bytes([b]): b for b in range(256)} | {b"he": 256, b"ll": 257}
    small = tiktoken.Encoding("gpt2", pat_str=T.WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    v = T.open_vocabulary("gpt2")
    assert v.size == 4 + 258 + 1 and v.encode("hell") == [260, 261]


# -------------------------------------------------------------------------------------------- files -> prepared corpus

def test_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo \u2028 three\r\r\n\n x\u0085\x0cy".encode())
    assert list(T.lines_of(path)) == ["one\n", "two \u2028 three\r\n", "\n", " x\u0085\x0cy"]
    path.write_bytes(b"")
    assert list(T.lines_of(path)) == []
    path.write_bytes(b"\n")
    assert list(T.lines_of(path)) == ["\n"]


def test_lines_of_long_files(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "LINE", 64)                                                    # characters fall across chunks
    text = "".join(random.Random(0).choices("aé日𝄞 \n", k=5000)) + "x" * 300 + " " + "é" * 300 + "\n"
    (tmp_path / "a").write_bytes(text.encode())
    lines = list(T.lines_of(tmp_path / "a"))
    assert "".join(lines) == text and max(map(len, lines)) < 200 and len(lines) > text.count("\n")


def test_wrong_bytes_are_located(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "LINE", 64)
    good = ("é日𝄞 a\n" * 50).encode()
    for at in (0, 11, 63, 64, 65, 300):
        at = len(good[:at].decode(errors="ignore").encode())                              # where a character begins
        (tmp_path / "a").write_bytes(good[:at] + b"\xff" + good[at:])
        with pytest.raises(BadInput, match=rf"a byte {at}: not UTF-8 \(invalid start byte\)"):
            list(T.lines_of(tmp_path / "a"))
    (tmp_path / "a").write_bytes(good + "日".encode()[:2])
    with pytest.raises(BadInput, match=rf"byte {len(good)}: not UTF-8 \(unexpected end"):
        list(T.lines_of(tmp_path / "a"))
    (tmp_path / "a").write_bytes(good[:-1] + " One line.\nTwo.\n".encode("utf-16-le"))     # no mark says so
    with pytest.raises(BadInput, match=rf"a byte {len(good)}: not UTF-8 \(a NUL, as UTF-16 has many\); convert"):
        list(T.lines_of(tmp_path / "a"))
    with pytest.raises(BadInput, match="No such file"):
        list(T.lines_of(tmp_path / "b"))


def test_memory_stays_small(tmp_path):
    (tmp_path / "a").write_bytes(b"word " * 6_000_000)                                    # 30 MB in one line
    tracemalloc.start()
    n = sum(map(len, T.lines_of(tmp_path / "a")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 30_000_000 and peak < 12e6


def test_documents(tmp_path):
    (tmp_path / "a").write_text("\n\none\ntwo\n \t\n\nthree\n")
    (tmp_path / "b").write_text("four\n\nfive")
    (tmp_path / "c").write_text("")
    paths = [tmp_path / name for name in "abc"]
    assert list(T.documents_of(paths)) == [(0, "one\n"), (0, "two\n"), (1, "three\n"), (2, "four\n"), (3, "five")]


def documents(seed, n):
    return [story(random.Random(seed + i).randint(1, 6), seed + i) for i in range(n)]


def write_text(path, docs):
    path.write_text("\n".join("".join(doc) for doc in docs), encoding="utf-8")
    return path


def texts(corpus, vocabulary):
    return [vocabulary.decode(corpus.document(i)) for i in range(len(corpus))]


def test_prepare(tmp_path, capsys, monkeypatch):
    docs, held = documents(0, 30), documents(500, 4)
    a, b = write_text(tmp_path / "a.txt", docs[:20]), write_text(tmp_path / "b.txt", docs[20:])
    valid, out = write_text(tmp_path / "v.txt", held), tmp_path / "new" / "out"
    run(monkeypatch, "prepare", "--input", a, b, "--valid", valid, "--out", out, "--vocab_size", "320")
    assert "320 ids; train: 30 documents" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "vocab"]
    train, valid_set, vocabulary = T.open_corpus(out)
    assert texts(train, vocabulary) == ["".join(doc) for doc in docs]
    assert texts(valid_set, vocabulary) == ["".join(doc) for doc in held]
    assert train.tokens.dtype == np.uint16 and train.bounds.dtype == np.int64 and len(train.bounds) == 31 == len(train) + 1
    assert train.tokens.min() >= 4 and train.tokens.max() < vocabulary.mask
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train"] == {"documents": 30, "tokens": len(train.tokens)}
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 320
    assert vocabulary.pieces == T.train_vocabulary((line for doc in docs for line in doc), 320).pieces
    again = pickle.loads(pickle.dumps(train))                                             # for workers: by its path
    assert len(pickle.dumps(train)) < 1000 and (again.document(3) == train.document(3)).all()


def test_prepare_holds_out_a_share(tmp_path):
    docs = documents(0, 60)
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / ".hidden" / "x").write_bytes(b"\xff")
    write_text(tmp_path / "in" / "a.txt", docs[:25])
    write_text(tmp_path / "in" / "sub" / "b.txt", docs[25:])
    meta = T.prepare([tmp_path / "in"], tmp_path / "out", 300, valid_share=0.1, show=False)
    train, valid, v = T.open_corpus(tmp_path / "out")
    assert texts(valid, v) == ["".join(doc) for doc in docs[::10]]
    assert texts(train, v) == ["".join(doc) for i, doc in enumerate(docs) if i % 10]
    assert v.pieces == T.train_vocabulary((line for i, doc in enumerate(docs) if i % 10 for line in doc), 300).pieces
    assert meta["valid"]["documents"] == 6
    T.prepare([tmp_path / "in"], tmp_path / "two", vocab=str(tmp_path / "out"), valid_share=0.001, show=False)
    assert len(T.open_corpus(tmp_path / "two")[1]) == 1                                   # one at least
    for name in ("vocab", "train.idx"):
        same = (tmp_path / "out" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same == (name == "vocab")


@pytest.mark.parametrize("out", ["in", "in/out", "link/out"])
def test_prepare_does_not_read_its_own_output(tmp_path, out):
    folder, out = tmp_path / "in", tmp_path / out
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    write_text(folder / "a.txt", documents(0, 20))
    write_text(folder / "sub" / "vocab", documents(50, 9))                                # not in --out, so it is text
    first = T.prepare([f"{folder}/"], out, 300, show=False)
    (out / ".part-0").mkdir()
    (out / ".part-0" / "train.bin").write_text("the rest of a broken run\n")
    files = {name: (out / name).read_bytes() for name in T.WRITTEN}
    assert first["train"]["documents"] == 28 and first["inputs"] == [f"{folder}/a.txt", f"{folder}/sub/vocab"]
    assert T.prepare([f"{folder}/"], out, 300, overwrite=True, show=False) == first
    T.prepare([folder / "a.txt", folder / "sub", out / "vocab", out / "meta.json"], out, 300, overwrite=True, show=False)    # *
    assert files == {name: (out / name).read_bytes() for name in T.WRITTEN}
    with pytest.raises(BadInput, match="vocab: nothing but what prepare wrote"):
        T.prepare([out / "vocab"], out, 300, overwrite=True, show=False)


def test_a_file_counts_once(tmp_path):
    (tmp_path / "in").mkdir()
    a, b = (write_text(tmp_path / "in" / name, documents(i, 9)) for i, name in enumerate("ab"))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    meta = T.prepare([b, tmp_path / "in", a, tmp_path / "link"], tmp_path / "out", 300, show=False)
    assert meta["inputs"] == [str(b), str(a)] and meta["train"]["documents"] == 17


def test_prepare_tries_out_first(tmp_path, monkeypatch):
    a = write_text(tmp_path / "a", documents(0, 9))
    monkeypatch.setattr(T, "count_words", lambda texts: pytest.fail("hours of counting, and nowhere to put it"))
    with pytest.raises(BadInput, match="a: cannot be written"):
        run(monkeypatch, "prepare", "--input", a, "--out", a)


def test_killed_prepares_are_swept_up(tmp_path, monkeypatch):
    """And the living are left alone."""
    a, out, spell = write_text(tmp_path / "a", documents(0, 9)), tmp_path / "out", T.Vocabulary.spell

    def names():
        return sorted(name[:6] for name in os.listdir(out))
    if not (child := os.fork()):
        T.Vocabulary.spell = lambda _: os.kill(os.getpid(), 9)
        T.prepare([a], out, 300, show=False)
    assert os.waitpid(child, 0)[1] == 9 and names() == [".part-"]

    def amid(vocabulary):                                                                 # the second runs within the first
        monkeypatch.setattr(T.Vocabulary, "spell", spell)
        T.prepare([a], out, 300, overwrite=True, show=False)
        assert names().count(".part-") == 1
        return spell(vocabulary)
    monkeypatch.setattr(T.Vocabulary, "spell", amid)
    T.prepare([a], out, 300, show=False)
    assert sorted(os.listdir(out)) == sorted(T.WRITTEN)


def test_real_text(shared, tmp_path):
    source = shared / "text" / "corpus" / "valid.txt"
    meta = T.prepare([source], tmp_path / "out", 1024, show=False)
    train, valid, v = T.open_corpus(tmp_path / "out")
    assert (len(train), len(valid)) == (51, 1) and meta["train"]["tokens"] < source.stat().st_size / 2.5
    whole = source.read_text(encoding="utf-8")
    assert sorted(texts(train, v) + texts(valid, v)) == sorted(part.strip("\n") + "\n" for part in whole.split("\n\n"))


def test_large_vocabularies_take_four_bytes(tmp_path):
    v = T.Vocabulary({bytes([b]): b + 4 for b in range(256)}, 70_000)
    v.save(tmp_path / "vocab")
    a = write_text(tmp_path / "a", documents(0, 5))
    T.prepare([a], tmp_path / "out", vocab=str(tmp_path / "vocab"), show=False)
    train, _, again = T.open_corpus(tmp_path / "out")
    assert train.tokens.dtype == np.uint32 and again.size == 70_000 and texts(train, again)[0] == "".join(documents(0, 5)[1])


def test_prepare_refuses(tmp_path, monkeypatch):
    a, one = write_text(tmp_path / "a", documents(0, 9)), write_text(tmp_path / "one", documents(0, 1))
    empty, blank, latin = tmp_path / "empty", tmp_path / "blank", tmp_path / "latin"
    empty.write_text("")
    blank.write_text("\n \n")
    latin.write_bytes(a.read_bytes() + "é".encode("latin1") + b"\n")
    for name in ("folder", "links"):
        (tmp_path / name).mkdir()
    (tmp_path / "links" / "b").symlink_to(tmp_path / "nowhere")
    out = tmp_path / "out"
    for args, message in (
            ([empty], "empty: no text in it$"), ([blank, empty], "blank: no text in it, nor"),
            ([one], "one: one document, and none"),
            ([tmp_path / "none"], "none: no such file"), ([tmp_path / "folder"], "folder: no files in it"),
            ([latin], f"latin byte {a.stat().st_size}: not UTF-8"), ([a, "--valid", empty], "empty: no text in it"),
            ([a, "--valid", a], "a: is part of --input"), ([empty, "--valid", a], "empty: no text in it"),
            ([tmp_path / "links"], "links/b: no such file"), ([tmp_path / "links" / "b"], "links/b: no such file"),
            ([a, "--valid_share", ".999"], "--valid_share 0.999: holds out all 9 documents"),
            ([a, "--valid_share", "0"], "--valid_share 0.0"), ([a, "--vocab_size", "12"], "--vocab_size 12"),
            ([a, "--vocab", tmp_path / "none"], "no such vocabulary"), ([a, "--vocab", a], "not a vocabulary")):
        with pytest.raises(BadInput, match=message) as e:
            run(monkeypatch, "prepare", "--out", out, "--input", *args)
        assert "\n" not in str(e.value) and not (out / "meta.json").exists()
        assert not out.exists() or os.listdir(out) == []                                  # nothing half made is left
    run(monkeypatch, "prepare", "--input", a, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BadInput, match="already holds a prepared corpus; add --overwrite"):
        run(monkeypatch, "prepare", "--input", a, "--out", out)
    with pytest.raises(BadInput, match="byte"):                                           # a failure leaves the old one whole
        run(monkeypatch, "prepare", "--input", latin, "--out", out, "--overwrite")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    run(monkeypatch, "prepare", "--input", one, a, "--out", out, "--overwrite")
    assert len(T.open_corpus(out)[0]) == 9
    with pytest.raises(BadInput, match="a: cannot be written"):
        run(monkeypatch, "prepare", "--input", a, "--out", a)


def test_one_line_and_status_2(tmp_path):
    """The command in a process of its own."""
    (tmp_path / "a").write_bytes(b"ab\xffcd")
    command = [sys.executable, "-m", "data.text", "prepare", "--input", tmp_path / "a", "--out", tmp_path / "out"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].endswith("a byte 2: not UTF-8 (invalid start byte); convert the file to UTF-8")


# --------------------------------------------------------------------------------------------- Corpus, Blocks, Batches

def corpus_of(*lengths):
    """Documents of these lengths; token k of the corpus is 10 + k."""
    return T.Corpus(np.arange(10, 10 + sum(lengths)), np.cumsum([0, *lengths]))


def test_blocks_by_hand():
    blocks = T.Blocks(corpus_of(2, 1, 3, 9, 1, 4), 8)
    assert [blocks.load(i).tolist() for i in range(len(blocks))] == [
        [0, 10, 11, 2, 12, 2], [0, 13, 14, 15, 2],        # the third does not fit into the first block
        [0, 16, 17, 18, 19, 20, 21, 2],                   # nine tokens: cut into six, a full block,
        [0, 22, 23, 24, 2, 25, 2],                        # and three, which leave room for the next document
        [0, 26, 27, 28, 29, 2]]
    assert [T.Blocks(corpus_of(6), 8).load(0).tolist()] == [[0, *range(10, 16), 2]]
    assert [len(T.Blocks(corpus_of(*lengths), 8)) for lengths in ([7], [5, 1], [4, 1])] == [2, 2, 1]
    with pytest.raises(BadInput, match="--max_tokens 2"):
        T.Blocks(corpus_of(5), 2)


def naive_blocks(corpus, n):
    """Token by token, as the docstring tells it."""
    out, now = [], [0]
    for i in range(len(corpus)):
        doc = corpus.document(i).tolist()
        if len(now) > 1 and len(now) + len(doc) + 1 > n:
            out.append(now)
            now = [0]
        while len(doc) + 2 > n:
            out.append([0, *doc[:n - 2], 2])
            doc = doc[n - 2:]
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
        assert all(x.dtype == np.int64 and 3 <= len(x) <= n and x[0] == 0 and x[-1] == 2 and (x == 0).sum() == 1 for x in loaded)
        assert [t for x in loaded for t in x if t >= 10] == corpus.tokens.tolist()        # each token once, in order
        ends = {int(x[i - 1]) for x in loaded for i in np.flatnonzero(x == 2)}
        assert {int(corpus.document(i)[-1]) for i in range(80)} <= ends                   # </s> behind each document


def masker(ids, rng):
    return bert_mask(ids, range(4, 299), 299, 0.15, rng)


@pytest.fixture(scope="module")
def blocks(vocabulary):
    ids = [np.array(vocabulary.encode("".join(doc)), np.uint16) for doc in documents(0, 60)]
    return T.Blocks(T.Corpus(np.concatenate(ids), np.cumsum([0, *map(len, ids)])), 64)


def test_batches(blocks):
    data = T.Batches(blocks, 7, masker)
    batch = data[[(0, 3), (0, len(blocks) - 1), (2, 3)]]
    tokens, corrupted, mask = batch["tokens"], batch["corrupted"], batch["mask"]
    assert tokens.dtype == corrupted.dtype == torch.int64 and mask.dtype == torch.bool and len(data) == len(blocks)
    for row, index in enumerate((3, len(blocks) - 1, 3)):
        ids = blocks.load(index)
        assert tokens[row, :len(ids)].tolist() == ids.tolist() and (tokens[row, len(ids):] == 1).all()
        assert (corrupted[row, len(ids):] == 1).all() and not mask[row, len(ids):].any() and mask[row].any()
        changed, hidden = masker(ids, np.random.default_rng([7, (0, 0, 2)[row], index]))
        assert torch.equal(corrupted[row, :len(ids)], changed) and torch.equal(mask[row, :len(ids)], hidden)
    assert (corrupted == tokens)[~mask].all() and (tokens[mask] >= 4).all()
    assert not torch.equal(mask[0], mask[2])                                              # another epoch, another mask
    alone = data[[(2, 3)]]                                                                # whatever it is batched with
    assert torch.equal(alone["corrupted"][0], corrupted[2, :alone["tokens"].shape[1]])
    plain = T.Batches(blocks, 7)[[(0, 3)]]
    assert torch.equal(plain["tokens"], plain["corrupted"]) and not plain["mask"].any()
    assert plain["tokens"].data_ptr() != plain["corrupted"].data_ptr()


def test_batches_do_not_depend_on_processes_and_workers(blocks):
    data = T.Batches(blocks, 0, masker)

    def steps(accumulation, world, workers=0, start=0):
        ranks = []
        for rank in range(world):
            keys = T.batches(len(blocks), 0, start, 6, 8, accumulation, world, rank)
            ranks.append(list(torch.utils.data.DataLoader(data, batch_size=None, sampler=keys, num_workers=workers)))
        out = []
        for step in range(6 - start):                                                     # its rows in order, without padding
            rows = [(t[t != 1].tolist(), c[t != 1].tolist(), m[t != 1].tolist()) for micro in range(accumulation) for r in ranks
                    for t, c, m in zip(*(r[step * accumulation + micro][k] for k in ("tokens", "corrupted", "mask")))]
            out.append(rows)
        return out

    one = steps(1, 1)
    assert len(one) == 6 and all(len(rows) == 8 for rows in one)
    assert one == steps(2, 2) == steps(1, 4) == steps(4, 1) == steps(1, 1, workers=2)
    assert one[4:] == steps(1, 2, start=4)                                                # a restart


# -------------------------------------------------------------------------------------------------- open_corpus, made_corpus

def test_open_plain_text(tmp_path, capsys, monkeypatch):
    home, folder = tmp_path / "home", tmp_path / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    folder.mkdir()
    write_text(folder / "train.txt", documents(0, 20))
    write_text(folder / "valid.txt", documents(90, 3))
    train, valid, v = T.open_corpus(folder, 280)
    assert (len(train), len(valid), v.size) == (20, 3, 280)
    assert f"{folder}: plain text; prepared into {folder}" in capsys.readouterr().err and not home.exists()
    cache = next(folder.glob(".data2vec-text-*"))
    stamp = (cache / "train.bin").stat().st_mtime_ns
    assert T.open_corpus(folder, 280)[2].size == 280 and (cache / "train.bin").stat().st_mtime_ns == stamp     # once
    assert "plain text" not in capsys.readouterr().err
    assert T.open_corpus(folder, 290, show=False)[2].size == 290 and len(list(folder.glob(".data2vec-text-*"))) == 2
    (cache / "train.idx").write_bytes(b"")
    assert len(T.open_corpus(folder, 280, show=False)[0]) == 20                           # damaged: prepared anew
    write_text(folder / "train.txt", documents(0, 25))
    assert len(T.open_corpus(folder, 280, show=False)[0]) == 25                           # so it is when the text has changed
    assert len(list(folder.iterdir())) == 4                                               # both texts, 290's and the new one
    (folder / "valid.txt").unlink()
    train, valid, _ = T.open_corpus(folder, 280, show=False)
    assert (len(train), len(valid)) == (24, 1)


def test_two_open_plain_text_at_once(tmp_path, monkeypatch):
    """Both begin to prepare; the slower one is amid its last files when the faster one, which has done it, reads."""
    write_text(tmp_path / "train.txt", documents(0, 20))
    read, save, spell = T.read_corpus, T.save, T.Vocabulary.spell
    both, first, midway, done = threading.Barrier(2, timeout=20), *(threading.Event() for _ in range(3))
    turns = itertools.count()

    def ordered(vocabulary):
        both.wait()
        return spell(vocabulary) if next(turns) == 0 or first.wait(20) else None

    def slow(*args):
        if first.is_set():
            midway.set()
            done.wait(20)
        save(*args)
        first.set()
    monkeypatch.setattr(T.Vocabulary, "spell", ordered)
    monkeypatch.setattr(T, "save", slow)
    monkeypatch.setattr(T, "read_corpus", lambda place: midway.wait(20) and read(place))
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(T.open_corpus, tmp_path, 280, show=False) for _ in range(2)]
        wait(tasks, return_when=FIRST_COMPLETED)
        done.set()
        one, two = (task.result() for task in tasks)
    assert one[0].stem == two[0].stem and (one[0].tokens == two[0].tokens).all() and len(os.listdir(tmp_path)) == 2


def test_open_plain_text_read_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder, make = tmp_path / "data", os.makedirs
    folder.mkdir()
    write_text(folder / "train.txt", documents(0, 20))

    def read_only(place, **options):
        if str(place).startswith(str(folder)):
            raise PermissionError(30, "Read-only file system")
        make(place, **options)
    monkeypatch.setattr(os, "makedirs", read_only)
    assert len(T.open_corpus(folder, 280)[0]) == 19 and os.listdir(folder) == ["train.txt"]
    assert f"prepared into {tmp_path / 'home' / 'data2vec' / 'text-'}" in capsys.readouterr().err
    monkeypatch.setattr(T, "prepare", None)                                               # now it lies in the cache
    assert len(T.open_corpus(folder, 280)[0]) == 19
    (tmp_path / "other").mkdir()
    write_text(tmp_path / "other" / "train.txt", documents(0, 5))

    def full(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(T, "prepare", full)
    with pytest.raises(BadInput, match="neither .* can be written .No space left"):
        T.open_corpus(tmp_path / "other")


def test_open_refuses(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        T.open_corpus(tmp_path / "none")
    with pytest.raises(BadInput, match="neither meta.json nor train.txt"):
        T.open_corpus(tmp_path)
    (tmp_path / "valid.txt").write_text("a\n")
    with pytest.raises(BadInput, match="neither meta.json nor train.txt"):
        T.open_corpus(tmp_path)
    a = write_text(tmp_path / "a", documents(0, 9))
    out = tmp_path / "out"
    T.prepare([a], out, 300, show=False)
    for name, content, message in (
            ("train.bin", b"", "train.bin or .idx: cannot be read"), ("train.bin", b"abc", "cannot be read"),
            ("train.bin", b"abcd", "damaged"), ("valid.idx", b"\0" * 16, "damaged"), ("vocab", b"x", "not a vocabulary"),
            ("meta.json", b"{}", "meta.json: not of a prepared corpus"), ("meta.json", b"[", "meta.json: not of"),
            ("meta.json", (out / "meta.json").read_bytes().replace(b'_size": 300', b'_size": 301'), "does not fit")):
        good = (out / name).read_bytes()
        (out / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            T.open_corpus(out)
        (out / name).write_bytes(good)
    assert len(T.open_corpus(out)) == 3


def test_made_corpus():
    start = time.process_time()
    train, valid, vocabulary = T.made_corpus()
    assert time.process_time() - start < 15
    assert vocabulary.size == 2048 and 0.03 < len(valid.tokens) / len(train.tokens) < 0.3
    documents = [texts(corpus, vocabulary) for corpus in (train, valid)]
    size = sum(len(text) for part in documents for text in part)
    assert size > 600_000 and len(train.tokens) + len(valid.tokens) < size / 2          # tokens that say something
    assert not set(documents[0]) & set(documents[1]) and len(set(documents[0])) == len(train)
    words = " ".join(documents[0]).lower().split()
    assert words.count("the") / len(words) > 0.03                                         # English
    assert any("Return the" in text for text in documents[0])
    blocks = T.Blocks(train, 128)
    assert len(blocks) > 1000 and pickle.loads(pickle.dumps(blocks)).load(5).tolist() == blocks.load(5).tolist()
    again = [list(part) for part in (T.made_topics(), T.made_topics())]
    assert again[0] == again[1]


def test_made_corpus_needs_sources(monkeypatch):
    monkeypatch.setattr(T, "made_topics", list)
    monkeypatch.setattr(T, "made_docstrings", lambda: [["short"], ["x" * 300, "x" * 300]])
    with pytest.raises(BadInput, match="made corpus: this Python"):
        T.made_corpus()


# ------------------------------------------------------------------------------------------------------ GLUE: the tasks

MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
        "sentence2_parse", "sentence1", "sentence2"]
LAYOUTS = {  # header (none for CoLA), a row, what it says
    "CoLA": (None, ["gj04", "1", "*", 'He said "no.'], ('He said "no.', None, 1)),
    "SST-2": (["sentence", "label"], ["a charming film ", "1"], ("a charming film", None, 1)),
    "MRPC": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["0", "12", "13", '"A', "B"], ('"A', "B", 0)),
    "STS-B": (["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
              ["0", "main", "f", "2012", "1", "none", "none", "A plane.", "A jet.", "3.750"], ("A plane.", "A jet.", 3.75)),
    "QQP": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["1", "2", "3", "Why?", "How?", "0"],
            ("Why?", "How?", 0)),
    "MNLI": ([*MNLI, "label1", "gold_label"], ["0"] * 8 + ["P.", "H.", "neutral", "entailment"], ("P.", "H.", 2)),
    "QNLI": (["index", "question", "sentence", "label"], ["0", "Who?", "He.", "not_entailment"], ("Who?", "He.", 1)),
    "RTE": (["index", "sentence1", "sentence2", "label"], ["0", "P.", "H.", "entailment"], ("P.", "H.", 0)),
}


def tsv(*rows, end="\n"):
    return "".join("\t".join(row) + end for row in rows if row)


def write_task(root, name, split="train", *rows, end="\n"):
    header, row, _ = LAYOUTS[name]
    if split.startswith("dev_"):
        header, row = [*MNLI, "label1", "label2", "gold_label"], [*row[:-1], "neutral", row[-1]]
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / f"{split}.tsv").write_text(tsv(header, row, *rows, end=end), encoding="utf-8", newline="")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    assert list(G.TASKS) == list(dict.fromkeys(G.TASKS)) and set(G.TASKS) == set(LAYOUTS)
    for split in ("train", *G.TASKS[name].dev):
        write_task(tmp_path, name, split, end="\r\n" if name == "MRPC" else "\n")
    task, splits = G.open_task(tmp_path, name.lower())
    assert set(splits) == {"train", *task.dev} and task == G.TASKS[name] and set(task.metrics) <= set(G.METRICS)
    for examples in splits.values():
        assert examples.rows == [LAYOUTS[name][2]] and examples.lines == [1 if name == "CoLA" else 2] and examples.bad == []
    (tmp_path / name / "train.tsv").unlink()
    with pytest.raises(BadInput, match="train.tsv: no such file"):
        G.open_task(tmp_path, name)


def test_bad_rows_are_named(tmp_path):
    good = LAYOUTS["QQP"][1]
    wrong = [*good[:5], "2"], good[:4], ["a"], [*good[:5], ""], [*good[:4], " ", "1"], [*good, "x"]
    write_task(tmp_path, "QQP", "train", *wrong, good)
    found = G.read_task(tmp_path, "QQP", "train")
    path = tmp_path / "QQP" / "train.tsv"
    assert len(found.rows) == 2 and found.lines == [2, 9]
    assert found.bad == [f"{path} line {3 + i}: {reason}" for i, reason in enumerate((
        "label '2' is none of 0, 1", "4 columns instead of 6", "1 columns instead of 6", "no label", "an empty sentence",
        "7 columns instead of 6"))]
    write_task(tmp_path, "STS-B", "train", [*LAYOUTS["STS-B"][1][:9], "high"], [*LAYOUTS["STS-B"][1][:9], "nan"])
    reasons = [line.rpartition(": ")[2] for line in G.read_task(tmp_path, "STS-B", "train").bad]
    assert reasons == ["label 'high' is no number", "label 'nan' is no number"]
    (tmp_path / "RTE").mkdir()
    for content, message in (("", "empty; there"), ("\n\n", "empty; there"), ("index\tsentence1\tsentence2\n", "no column label"),
                             ("index\tsentence1\tlabel\n", "no column sentence2"), ("sentence1\tsentence2\tlabel\n", "no rows"),
                             ("sentence1\tsentence2\tlabel\na\tb\tc\nd\n", "line 2: label 'c' is none of .*; nor can any other"),
                             ("sentence1\tsentence2\tlabel\na\tb\t\xe9".encode("latin1"), "byte 30: not UTF-8")):
        (tmp_path / "RTE" / "dev.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(BadInput, match=message):
            G.read_task(tmp_path, "RTE", "dev")


def test_test_splits_have_no_labels(tmp_path):
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "test.tsv").write_text("index\tsentence\n0\tBill ran.\n")
    assert G.read_task(tmp_path, "CoLA", "test").rows == [("Bill ran.", None, None)]


def test_tasks_of_ones_own(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.csv").write_text('label,sentence\npos,"good, very\ngood"\nneg,bad\npos,""\nneutral,"said ""so"""\n')
    (mine / "dev.csv").write_text("sentence,label\nfine,pos\nodd,strange\n")
    task, splits = G.open_task(tmp_path, "mine")
    assert task.classes == ("neg", "neutral", "pos") and task.metrics == ("accuracy",)
    assert splits["train"].rows == [("good, very\ngood", None, 2), ("bad", None, 0), ('said "so"', None, 1)]
    assert splits["train"].lines == [2, 4, 6] and splits["train"].bad == [f"{mine / 'train.csv'} line 5: an empty sentence"]
    assert splits["dev"].rows == [("fine", None, 2)] and len(splits["dev"].bad) == 1
    assert G.open_task(mine, "anything")[1]["train"].rows == splits["train"].rows         # the files in the folder itself
    (mine / "train.csv").write_text('label,sentence\npos,"never closed\n')
    with pytest.raises(BadInput, match="train.csv line 2: not CSV"):
        G.open_task(tmp_path, "mine")
    scores = tmp_path / "scores"
    scores.mkdir()
    for split in ("train", "dev"):
        (scores / f"{split}.tsv").write_text('sentence1\tsentence2\tlabel\n"a\tb\t2\nc\td\t1.5\n')
    task, splits = G.open_task(tmp_path, "scores")
    assert task.classes == () and task.metrics == ("pearson", "spearman")
    assert splits["dev"].rows == [('"a', "b", 2.0), ("c", "d", 1.5)]
    for split in ("train", "dev"):
        (scores / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"s\t{i}\n" for i in (10, 9, 0)))
    assert G.open_task(tmp_path, "scores")[0].classes == ("0", "9", "10")
    for content, message in (("sentence\tclass\na\tb\n", "its columns are sentence, class"),
                             ("sentence\tlabel\na\t1\n", "1 different labels")):
        (scores / "train.tsv").write_text(content)
        with pytest.raises(BadInput, match=message):
            G.open_task(tmp_path, "scores")


def own(folder, labels, header="sentence\tlabel", splits=("train", "dev")):
    """A task of one's own with a row for each label."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.tsv").write_text("\n".join([header, *(f"some words\t{label}" for label in labels)]) + "\n")
    return folder


def test_a_bad_label_makes_no_classes(tmp_path):
    for bad in ("n/a", "nan", "inf"):
        scores = own(tmp_path / "scores", ["0.5", "1.5", "2.25", "3", *["4.75"] * 5, bad])
        task, splits = G.open_task(tmp_path, "scores")
        assert task.classes == () and [row[2] for row in splits["dev"].rows[:4]] == [0.5, 1.5, 2.25, 3]
        assert splits["train"].bad == [f"{scores / 'train.tsv'} line 11: label {bad!r} is no number"]
    own(tmp_path / "versions", ["1.5", "2.0", "2.0", "beta", "none"])
    assert G.open_task(tmp_path, "versions")[0].classes == ("1.5", "2.0", "beta", "none")


def test_whole_numbers_are_classes_however_written(tmp_path):
    own(tmp_path / "mixed", ["1", "1.0", "0", "10.", "-2.00", "01", "+1", "1e0", "12345678901234567890"])
    own(tmp_path / "mixed", ["0.0", "1", "10", "-2", "0.5"], splits=["dev"])
    task, splits = G.open_task(tmp_path, "mixed")
    assert task.classes == ("-2", "0", "1", "10", "12345678901234567890")
    assert [row[2] for row in splits["train"].rows] == [2, 2, 1, 3, 0, 2, 2, 2, 4]
    assert [row[2] for row in splits["dev"].rows] == [1, 2, 3, 0] and len(splits["dev"].bad) == 1


@pytest.mark.parametrize("body, reason", [
    (["abc", "def"], "line 2: 1 columns instead of 2; nor can any other of its 2 rows be used"),
    (["abc\t", "def\t "], "line 2: no label; nor can any other of its 2 rows be used"),
    (["\t1", "\t0"], "line 2: an empty sentence; nor can any other of its 2 rows be used"),
    ([], ": a header and no rows"),
    (["abc\t1", "\t0", "def\t1"], ": 1 different labels; there is nothing to tell apart"),  # a class of empty sentences is none
])
def test_a_task_without_usable_rows_says_why(tmp_path, body, reason):
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *body]) + "\n")
    with pytest.raises(BadInput) as e:
        G.open_task(tmp_path, ".")
    assert str(e.value).partition("train.tsv")[2].strip() == reason


def test_columns_must_be_clear(tmp_path):
    for i, header in enumerate(("label\tlabel", "sentence\tlabel\tsentence", "sentence\tsentence1\tsentence2\tlabel",
                                "sentence\tlabel\tsentence1", "sentence1\tlabel")):
        own(tmp_path / str(i), "01", header)
        with pytest.raises(BadInput, match="train.tsv: its columns are .*each once") as e:
            G.open_task(tmp_path, str(i))
        assert "\n" not in str(e.value)
    own(own(tmp_path / "dev", "01"), "01", "sentence\tlabel\tlabel", ["dev"])
    with pytest.raises(BadInput, match="dev.tsv: 2 columns are called label; keep one"):
        G.open_task(tmp_path, "dev")


def test_splits_come_from_one_folder(tmp_path):
    own(own(tmp_path / "mine", "01", splits=["train"]).parent, "01", splits=["dev"])
    with pytest.raises(BadInput, match="mine/dev.tsv: no such file"):
        G.open_task(tmp_path, "mine")


def test_long_lines_and_cells(tmp_path, monkeypatch):
    long = "word " * 40_000                                                               # Python's csv stops at 131072 characters
    for end, cell in ((".tsv", long), (".csv", f'"{long}\n"')):
        gap = "," if end == ".csv" else "\t"
        (tmp_path / f"train{end}").write_text(f"sentence{gap}label\n{cell}{gap}1\na{gap}0\n")
        monkeypatch.setattr(T, "LINE", 64)                                                # lines fall across chunks
        rows = G.read_table(str(tmp_path / f"train{end}"))[1]
        assert [(line, row[0].strip(), row[1]) for line, row in rows] == [(2, long.strip(), "1"), (3 + (end == ".csv"), "a", "0")]


def test_sentences_become_ids(vocabulary):
    a, b = vocabulary.encode("the cat sat"), vocabulary.encode("on banana mat")
    assert G.sentence_ids(vocabulary, "the cat sat") == [0, *a, 2]
    assert G.sentence_ids(vocabulary, "the cat sat", "on banana mat") == [0, *a, 2, 2, *b, 2]
    assert G.sentence_ids(vocabulary, "the cat sat", max_tokens=4) == [0, *a[:2], 2]
    long = vocabulary.encode("on banana mat " * 9)
    cut = G.sentence_ids(vocabulary, "the cat sat", "on banana mat " * 9, max_tokens=2 * len(a) + 3)
    assert cut == [0, *a, 2, 2, *long[:len(a) - 1], 2]                                    # the longer one is cut


def test_real_glue(shared):
    folder = shared / "text" / "glue"
    for name, counts in (("SST-2", (6917, 3608, 872, 444)), ("CoLA", (8533, 6008, 1043, 719))):
        _, splits = G.open_task(folder, name)
        found = [n for split in ("train", "dev") for n in (len(splits[split].rows), sum(row[2] for row in splits[split].rows))]
        assert found == list(counts) and not any(splits[split].bad for split in splits)
        assert splits["train"].lines == list(range(1 + (name == "SST-2"), len(splits["train"].rows) + 1 + (name == "SST-2")))
    assert len(G.read_task(folder, "SST-2", "test").rows) == 1821


# -------------------------------------------------------------------------------------------------------------- metrics

def naive_pearson(a, b):
    n, ma, mb = len(a), sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b)) / n
    return cov / ((sum((x - ma) ** 2 for x in a) / n) ** 0.5 * (sum((y - mb) ** 2 for y in b) / n) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_their_formulas(seed):
    rng = np.random.default_rng(seed)
    p, t = rng.integers(2, size=50).tolist(), rng.integers(2, size=50).tolist()
    tp, fp, fn, tn = (sum((x, y) == pair for x, y in zip(p, t)) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert G.accuracy(p, t) == pytest.approx((tp + tn) / 50)
    assert G.f1(p, t) == pytest.approx(2 / ((tp + fp) / tp + (tp + fn) / tp))
    assert G.matthews(p, t) == pytest.approx((tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5)
    a, b = rng.integers(6, size=40).tolist(), rng.normal(size=40).round(1).tolist()
    assert G.pearson(a, b) == pytest.approx(naive_pearson(a, b))
    ra, rb = ([sum(y < x for y in v) + (sum(y == x for y in v) + 1) / 2 for x in v] for v in (a, b))
    assert G.ranks(a).tolist() == ra
    assert G.spearman(a, b) == pytest.approx(naive_pearson(ra, rb))


def test_metrics_against_libraries():
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    p, t, a, b = rng.integers(2, size=99), rng.integers(2, size=99), rng.integers(9, size=99), rng.normal(size=99)
    assert G.f1(p, t) == pytest.approx(metrics.f1_score(t, p))
    assert G.matthews(p, t) == pytest.approx(metrics.matthews_corrcoef(t, p))
    assert G.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert G.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])


def test_metrics_at_their_limits():
    assert G.matthews([1, 1], [0, 1]) == G.pearson([2, 2], [0, 1]) == G.spearman([0, 1], [3, 3]) == G.f1([0, 0], [1, 0]) == 0
    assert G.pearson([0.1] * 3, [0.1] * 3) == G.pearson([0.1] * 3, [1, 2, 4]) == 0, "a mean that rounds makes no variance"
    for bad in (math.nan, math.inf):
        assert math.isnan(G.pearson([bad, 1, 2], [3, 3, 3])) and math.isnan(G.spearman([1, 2, 3], [bad, 1, 2]))
    assert G.f1([0], [0]) == 0 and G.f1([1], [1]) == 1 and G.matthews([0, 1], [1, 0]) == pytest.approx(-1)
    assert G.spearman([1, 2, 30], [1, 4, 5]) == pytest.approx(1) and G.accuracy([2, 1], [2, 0]) == 0.5
    assert all(type(metric([1, 0], [1, 0])) is float for metric in G.METRICS.values())
    assert G.pearson(np.array([1, 2], np.float32), torch.tensor([2.0, 4.0])) == pytest.approx(1)


# --------------------------------------------------------------------------------------------- python -m data.text glue


def archive(name, tmp_path, extra=(), leave_out=()):
    """-> bytes of a zip such as GLUE's."""
    for split in ("train", *G.TASKS[name].dev):
        write_task(tmp_path / "made", name, split)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((tmp_path / "made" / name).iterdir()):
            if path.name not in leave_out:
                file.write(path, f"{name}/{path.name}")
        for member, content in extra:
            file.writestr(member, content)
    return buffer.getvalue()


def test_glue_is_fetched(server, tmp_path, monkeypatch, capsys):
    out, names = tmp_path / "out", ("CoLA", "MNLI", "QNLI")
    odd = [("CoLA/original/raw/train.tsv", "x"), ("../evil.tsv", "x"), ("/abs/train.tsv", "x"), ("CoLA/../../dev.tsv", "x"),
           ("__MACOSX/CoLA/._train.tsv", "x"), ("CoLA/test.tsv", "index\tsentence\n0\tHe ran.\n")]
    for name in names:
        server.files[f"/glue/data/{G.TASKS[name].archive}"] = archive(name, tmp_path, odd if name == "CoLA" else ())
    run(monkeypatch, "glue", "--out", out, "--tasks", *names, "--url", server.url)
    assert "CoLA: there" in capsys.readouterr().out
    for name in names:
        assert G.open_task(out, name)[1]["train"].rows == [LAYOUTS[name][2]]
    assert sorted(os.listdir(out)) == ["CoLA", "CoLA.zip", "MNLI", "MNLI.zip", "QNLI", "QNLIv2.zip"]
    assert sorted(os.listdir(out / "CoLA")) == ["dev.tsv", "test.tsv", "train.tsv"]
    assert sorted(os.listdir(tmp_path)) == ["made", "out"]
    assert sorted(os.listdir(out / "MNLI")) == ["dev_matched.tsv", "dev_mismatched.tsv", "train.tsv"]
    asked = len(server.asked)
    run(monkeypatch, "glue", "--out", out, "--tasks", *names, "--url", server.url)
    assert len(server.asked) == asked                                                     # all there
    dev = out / "MNLI" / "dev_mismatched.tsv"
    for spoil in (lambda: dev.write_text(""), dev.unlink):
        spoil()
        with pytest.raises(BadInput, match="MNLI/dev_mismatched.tsv: missing or empty; remove .*/MNLI and run this again"):
            G.download_task(str(out), "MNLI", server.url)
    for path in (out / "MNLI").iterdir():
        path.unlink()
    G.download_task(str(out), "MNLI", server.url)                                         # an empty folder is nothing
    assert dev.stat().st_size


def test_glue_goes_on_after_a_break(server, tmp_path):
    content = server.files["/glue/data/RTE.zip"] = archive("RTE", tmp_path)
    server.cut = 100
    with pytest.raises(BadInput, match="broke off at 100 of"):
        G.download_task(str(tmp_path), "RTE", server.url)
    assert os.path.getsize(tmp_path / "RTE.zip.part") == 100 and not (tmp_path / "RTE").exists()
    server.cut = None
    G.download_task(str(tmp_path), "RTE", server.url, hashlib.md5(content).hexdigest())
    assert server.asked[-1][1] == "bytes=100-" and G.read_task(tmp_path, "RTE", "dev").rows


def test_wrong_archives(server, tmp_path, monkeypatch):
    good = archive("RTE", tmp_path)
    at = good.index(b"train.tsv") + 12                                                    # within the packed data of train.tsv
    flipped = good[:at] + bytes([good[at] ^ 255]) + good[at + 1:]
    for i, (content, message) in enumerate((
            (b"<html>", "not GLUE's RTE, or damaged .BadZipFile"), (flipped, "not GLUE's RTE, or damaged"),
            (good[:-30], "damaged"), (archive("RTE", tmp_path, leave_out=["dev.tsv"]), "no RTE/dev.tsv in it"),
            (archive("CoLA", tmp_path), "what came is not GLUE's RTE .train.tsv: no column sentence1"))):
        out = tmp_path / str(i)
        server.files["/glue/data/RTE.zip"] = content
        with pytest.raises(BadInput, match=message) as e:
            run(monkeypatch, "glue", "--out", out, "--tasks", "RTE", "--url", server.url)
        assert "\n" not in str(e.value) and os.listdir(out) == ["RTE.zip"]
    out = tmp_path / "md5"
    server.files["/glue/data/RTE.zip"] = good
    with pytest.raises(BadInput, match="has not the md5 0123"):
        run(monkeypatch, "glue", "--out", out, "--tasks", "RTE", "--url", server.url, "--md5", "0123")
    assert os.listdir(out) == []
    (out / "RTE.zip").write_bytes(good)
    with pytest.raises(BadInput, match="RTE.zip: its md5 is not 0123"):
        G.download_task(str(out), "RTE", server.url, "0123")
    G.download_task(str(out), "RTE", server.url)
    with pytest.raises(BadInput, match="404"):
        G.download_task(str(out), "QQP", server.url)
    with pytest.raises(BadInput, match="--tasks WNLI: no such task; choose from CoLA"):
        run(monkeypatch, "glue", "--out", out, "--tasks", "WNLI", "--url", server.url)


def test_mrpc_is_split(server, tmp_path, monkeypatch):
    header, row = LAYOUTS["MRPC"][0], LAYOUTS["MRPC"][1]
    rows = [["1", str(i), str(i + 50), f'A "{i}', f"B {i}"] for i in range(10)]
    names = dict(zip(("train", "test", "dev"), (f"/{G.MRPC_FILES[split]}" for split in ("train", "test", "dev"))))
    server.files[names["train"]] = ("\ufeff" + tsv(header, *rows, end="\r\n")).encode()
    server.files[names["test"]] = ("\ufeff" + tsv(header, row, end="\r\n")).encode()
    server.files[names["dev"]] = tsv(["3", "53"], ["7", "57"]).encode()
    G.download_task(str(tmp_path), "MRPC", server.url)
    _, splits = G.open_task(tmp_path, "MRPC")
    assert [r[0] for r in splits["dev"].rows] == ['A "3', 'A "7']
    assert [r[0] for r in splits["train"].rows] == [f'A "{i}' for i in range(10) if i not in (3, 7)]
    assert G.read_task(tmp_path, "MRPC", "test").rows == [LAYOUTS["MRPC"][2]]
    for split in ("train", "test"):
        (folder := tmp_path / f"empty_{split}").mkdir()
        for name in names.values():
            (folder / os.path.basename(name)).write_bytes(b"" if name == names[split] else server.files[name])
        with monkeypatch.context() as patch, pytest.raises(BadInput, match=f"{split}.txt: came empty; run this again"):
            patch.setattr(G, "download", lambda url, path, md5: None)                     # and so it does again
            G.download_task(str(folder), "MRPC", server.url)
        G.download_task(str(folder), "MRPC", server.url)
        assert len(G.open_task(folder, "MRPC")[1]["train"].rows) == 8
    server.files[names["dev"]] = tsv(["3", "53"], ["7", "58"]).encode()
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput, match="mrpc_dev_ids.tsv: 1 of its 2 pairs are in"):
        G.download_task(str(tmp_path / "other"), "MRPC", server.url)
    assert not (tmp_path / "other" / "MRPC").exists()

"""Text in, token blocks out: a vocabulary, a prepared corpus, blocks of whole documents. (Labelled sentences: data/glue.py.)

    python -m data.text prepare --input BOOKS/ WIKI.txt --out DIR --vocab_size 8192      or --vocab gpt2 | FOLDER
                                                  text -> DIR/{vocab, train.bin, train.idx, valid.bin, valid.idx, meta.json}
    python -m data.text glue --out DIR            fetch GLUE's eight tasks, leave them as DIR/TASK/{train,dev,test}.tsv

The walk: file -> lines -> documents -> Vocabulary.encode -> DIR/train.bin -> Corpus -> Blocks -> Batches -> (B, T) int64.
A batch is a pure function of (seed, its keys (epoch, index)), so workers, ranks and restarts cannot change it.

What prepare reads is yours to bring: UTF-8 text, a paragraph a line, a blank line between documents, in files or folders of
files. The paper takes a books corpus and English Wikipedia (section 4.3), some 16 GB. Neither is fetched here: the books are
no longer given out; for Wikipedia take a dump and any extractor that drops the mark-up and leaves articles apart by a blank line.
Released text checkpoints know GPT-2's pieces in the order of a dict.txt: put encoder.json, vocab.bpe and dict.txt (or a hub's
vocab.json and merges.txt) into a folder and give it as --vocab.
"""

import argparse
import ast
import base64
import bisect
import codecs
import contextlib
import fcntl
import hashlib
import heapq
import json
import math
import os
import shutil
import sys
import sysconfig
import uuid
import zlib
from array import array
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from common import BadInput, run, save
from data.images import batches, download, md5_of  # noqa: F401  (batches: for the train script, as it is)

# Where GPT-2 cuts text into words before it merges (Radford et al. 2019): contractions, letters, digits, signs, each with
# the space before it; and other white space.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PIECE = 1 << 14                                   # characters handed to the tokeniser at once: its regex has a finite stack
LINE = 1 << 20                                    # characters of a line kept in memory
LONGEST = 100                                     # a longer word is no word, and teaches the vocabulary nothing
MOST_WORDS = 1_000_000                            # distinct words kept; merging them takes about 1.2 GB
WRITTEN = ("vocab", "train.bin", "train.idx", "valid.bin", "valid.idx", "meta.json")     # by prepare, in this order


# ------------------------------------------------------------------------------------------------------- the vocabulary

class Vocabulary:
    """Byte-level BPE in RoBERTa's order: <s> 0, <pad> 1, </s> 2, <unk> 3, ordinary tokens from 4, <mask> last.

    pieces: {bytes: id} in order of merging, all 256 single bytes first; an id of UNK says that the vocabulary lacks it.
    size: number of ids; some may have no piece (released vocabularies are filled up), but they are never produced.
    """

    bos, pad, eos, unk = BOS, PAD, EOS, UNK

    def __init__(self, pieces, size=None):
        self.pieces, self.size = pieces, size or len(pieces) + len(SPECIAL) + 1
        self.mask, self.special = self.size - 1, (BOS, PAD, EOS, UNK, self.size - 1)
        self.ordinary = range(len(SPECIAL), self.size - 1)
        self.dtype = np.uint16 if self.size <= 1 << 16 else np.uint32               # of ids on disk
        self.ids = np.fromiter(pieces.values(), np.int64, len(pieces))              # rank of merging -> id
        self.bpe = tiktoken.Encoding("data2vec", pat_str=WORDS, special_tokens={},
                                     mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)})
        self.spelling = {i: piece for piece, i in pieces.items() if i != UNK}
        self.spelling |= {i: name.encode() for i, name in zip(self.special, (*SPECIAL, "<mask>"))}

    def encode(self, text):
        """-> list of ids, none of them special (UNK apart, if the vocabulary has holes). Raises BadInput for lone surrogates.

        "<mask>" in a text is six characters like any others. More than 16384 characters are cut, at a space if there is one.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise BadInput(f"text: half a surrogate pair at character {e.start}, which no UTF-8 can say; mend the text") from None
        ranks = [rank for piece in cut(text) for rank in self.bpe.encode_ordinary(piece)]
        return self.ids[ranks].tolist()

    def decode(self, ids):
        """-> text; special tokens by their names, bytes that are not UTF-8 as the replacement character."""
        return b"".join(self.spelling.get(int(i), SPECIAL[UNK].encode()) for i in ids).decode(errors="replace")

    def spell(self):
        """-> text: a line with the size, then a line `base64 id` for each piece, in order of merging."""
        lines = (f"{base64.b64encode(piece).decode()} {i}\n" for piece, i in self.pieces.items())
        return f"data2vec vocabulary, ids: {self.size}\n" + "".join(lines)

    def save(self, path):
        """A file of what spell() says."""
        with open(part := f"{path}.{uuid.uuid4().hex}", "w", encoding="ascii") as file:
            file.write(self.spell())
        os.replace(part, path)

    @classmethod
    def load(cls, path):
        """What save() wrote. Raises BadInput."""
        try:
            with open(path, encoding="ascii") as file:
                return cls.parse(file.read())
        except (OSError, ValueError) as e:
            raise BadInput(f"{path}: not a vocabulary of this code ({why(e)}); prepare the text anew") from None

    @classmethod
    def parse(cls, text):
        """The text of what save() wrote, as checkpoints carry it. Raises ValueError."""
        head, *lines = text.splitlines()
        size, rows = int(head.removeprefix("data2vec vocabulary, ids: ")), [line.split() for line in lines]
        return cls.checked({base64.b64decode(piece, validate=True): int(i) for piece, i in rows}, size, len(rows))

    @classmethod
    def checked(cls, pieces, size, count):
        """-> Vocabulary, unless an id or a piece is missing, doubled or impossible. Raises ValueError."""
        ids = [i for i in pieces.values() if i != UNK]
        if len(pieces) != count or len(set(ids)) != len(ids) or not all(len(SPECIAL) <= i < size - 1 for i in ids):
            raise ValueError(f"{count} pieces and {size} ids do not go together")
        if {len(piece) for piece in list(pieces)[:256]} != {1} or len(pieces) < 256:
            raise ValueError("the 256 single bytes do not come first")
        return cls(pieces, size)

    @classmethod
    def from_files(cls, folder):
        """GPT-2's encoder.json and vocab.bpe or a hub's vocab.json and merges.txt, and fairseq's dict.txt if it is there.

        A vocab.json with <s> (RoBERTa's) gives the ids itself. GPT-2's own ids are moved up by 4, or to the line of dict.txt
        (`<GPT-2 id> <count>`) that names them: id = line + 4, from line 0, <mask> behind the last. Raises BadInput.
        """
        found = [next((path for name in names if os.path.isfile(path := os.path.join(folder, name))), None)
                 for names in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"), ("dict.txt",))]
        if not all(found[:2]):
            lacks = "merges.txt or vocab.bpe" if found[0] else "vocab.json or encoder.json"
            raise BadInput(f"{folder}: no {lacks} in it; put both there")
        names, merges, order = found
        try:
            with open(path := names, encoding="utf-8") as file:
                known = json.load(file)
            if not isinstance(known, dict) or not all(type(i) is int for i in known.values()):
                raise ValueError("not {token: id}")
            with open(path := merges, encoding="utf-8") as file:
                lines = [line.rstrip("\r\n") for line in file]
            if lines and lines[0].startswith("#version"):
                del lines[0]
            pairs = [line.split(" ") for line in lines if line]
            if wrong := next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in known), None):
                raise ValueError(f"{' '.join(wrong)!r} is no pair that makes a token of {os.path.basename(names)}")
            letters = byte_letters()
            spelled = dict.fromkeys([*letters.values(), *map("".join, pairs)])     # the order of merging
            ids, size = {name: known.get(name, -1) for name in spelled}, None
            path = names
            if SPECIAL[0] in known:
                size = max(known.values()) + 1
                if [known.get(name) for name in (*SPECIAL, "<mask>")] != [0, 1, 2, 3, size - 1]:
                    raise ValueError("its special tokens are not RoBERTa's: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last")
            elif order:
                with open(path := order, encoding="utf-8") as file:
                    place = {line.split()[0]: i for i, line in enumerate(file, len(SPECIAL))}
                ids = {name: place.get(str(i), -1) for name, i in ids.items()}
                size = len(SPECIAL) + len(place) + 1
            else:
                ids = {name: i + len(SPECIAL) if i >= 0 else -1 for name, i in ids.items()}
                size = len(SPECIAL) + 1 + max(known[name] for name in spelled if name in known) + 1
            byte = {letter: b for b, letter in letters.items()}
            pieces = {bytes(byte[c] for c in name): i if i >= 0 else UNK for name, i in ids.items()}
            return cls.checked(pieces, size, len(spelled))
        except (OSError, ValueError, IndexError, KeyError) as e:                   # KeyError: a letter that is no byte
            raise BadInput(f"{path}: cannot be used as a vocabulary ({why(e)}); take it whole from its home") from None


def byte_letters():
    """-> {byte: letter}: how GPT-2's files write bytes. Printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def open_vocabulary(name):
    """"gpt2", a file that save() wrote, or a folder: of from_files, or one that prepare wrote. Raises BadInput.

    "gpt2" has GPT-2's own order; released text checkpoints want dict.txt's, so give a folder for these.
    """
    if name == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:                                         # no network; not what it should be
            raise BadInput(f"--vocab gpt2: cannot be fetched ({why(e)}); run this once with a network, "
                           "or give a folder with GPT-2's encoder.json and vocab.bpe, or a prepared one") from None
        pieces = [gpt2.decode_single_token_bytes(rank) for rank in range(gpt2.max_token_value)]    # the last ends texts
        return Vocabulary({piece: i for i, piece in enumerate(pieces, len(SPECIAL))})
    if not os.path.exists(name):
        raise BadInput(f"{name}: no such vocabulary; give gpt2, a file `vocab` of a prepared corpus, or a folder")
    if os.path.isdir(name):
        return Vocabulary.load(own) if os.path.isfile(own := os.path.join(name, "vocab")) else Vocabulary.from_files(name)
    return Vocabulary.load(name)


def why(error):
    """-> the reason in one line, without the path."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return " ".join(reason.split())[:200]


def cut(text):
    """-> the text in pieces of at most PIECE characters, cut before the last space in each: words stay as they are."""
    start = 0
    while len(text) - start > PIECE:
        space = text.rfind(" ", start + 1, start + PIECE)
        end = space if space > 0 else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


# ------------------------------------------------------------------------------------- byte pairs: counting and merging

def count_words(texts):
    """Texts, read once -> {word: count}. Whenever there are MOST_WORDS distinct words, the rarer half is forgotten."""
    try:
        import regex  # Python's own re knows no \p{L}
    except ImportError:
        raise BadInput("regex: tiktoken needs this package too, but it is not there; run `pip install regex`") from None
    find, counts = regex.compile(WORDS).findall, Counter()
    for text in texts:
        counts.update(word for piece in cut(text) for word in find(piece) if len(word) <= LONGEST)
        if len(counts) > MOST_WORDS:
            median = sorted(counts.values())[len(counts) // 2]
            counts = Counter({word: n for word, n in counts.items() if n > median})
    return counts


def train_bpe(counts, n_pieces, show=False):
    """{word: count} -> {bytes: rank}, at most n_pieces: 256 bytes, then, again and again, the commonest pair (Sennrich et al.
    2016). Among equals the pair whose bytes sort first; pairs seen once are not merged, so the result may be shorter.

    A pair that spells a piece made earlier from another pair becomes that piece: tiktoken, which goes by the bytes alone,
    would merge it too. Only words that hold the merged pair are looked at, so that a step costs what it changes.
    """
    pieces = [bytes([b]) for b in range(256)]
    number = {piece: i for i, piece in enumerate(pieces)}
    words, weights = [list(word.encode()) for word in counts], list(counts.values())
    pairs, where = Counter(), defaultdict(set)                                     # (a, b) -> count, words it may be in
    for i, (word, n) in enumerate(zip(words, weights)):
        for pair in pairwise(word):
            pairs[pair] += n
            where[pair].add(i)
    heap = [(-n, pieces[a], pieces[b], a, b) for (a, b), n in pairs.items()]
    heapq.heapify(heap)
    with tqdm(total=n_pieces, initial=256, desc="vocabulary", unit=" pieces", disable=not show) as bar:
        while heap and len(pieces) < n_pieces:
            n, _, _, a, b = heapq.heappop(heap)
            if -n != (now := pairs[a, b]):                                         # an old entry: it fell, or was merged
                if now > 0:
                    heapq.heappush(heap, (-now, pieces[a], pieces[b], a, b))
                continue
            if now < 2:
                break
            new = number.setdefault(pieces[a] + pieces[b], len(pieces))
            if new == len(pieces):
                pieces.append(pieces[a] + pieces[b])
                bar.update()
            change = Counter()
            for i in where.pop((a, b)):
                old = words[i]
                words[i] = word = merge(old, a, b, new)
                for pair in pairwise(old):
                    change[pair] -= weights[i]
                for pair in pairwise(word):
                    change[pair] += weights[i]
                    where[pair].add(i)
            for (c, d), by in change.items():
                pairs[c, d] += by
                if by > 0:
                    heapq.heappush(heap, (-pairs[c, d], pieces[c], pieces[d], c, d))
    return number


def merge(word, a, b, new):
    """-> the list with each a, b, from the left, replaced by new."""
    out, i = [], 0
    while i < len(word):
        if word[i] == a and i + 1 < len(word) and word[i + 1] == b:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def train_vocabulary(texts, vocab_size, show=False):
    """Texts, read once -> Vocabulary of at most vocab_size ids: 5 special ones, 256 bytes, merges. Raises BadInput."""
    if not 5 + 256 <= vocab_size <= 1 << 20:
        raise BadInput(f"--vocab_size {vocab_size}: must be at least 261 (256 bytes, 5 special tokens), at most {1 << 20}")
    ranks = train_bpe(count_words(texts), vocab_size - 5, show)
    return Vocabulary({piece: rank + len(SPECIAL) for piece, rank in ranks.items()})


# -------------------------------------------------------------------------------------------- files -> prepared corpus

def lines_of(path, bar=None, whole=False):
    """Lines of a UTF-8 file with their newline; CR LF becomes LF. Unless `whole`, a line of over a million characters comes in
    parts, and never more than a few MB are held. Raises BadInput: the file, and the byte that is wrong (a NUL is, too)."""
    at, rest, text = 0, b"", ""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(LINE):
                rest += chunk
                new, used = codecs.utf_8_decode(rest, "strict", False)             # up to the last whole character
                if (zero := rest.find(0)) >= 0:
                    raise UnicodeDecodeError("utf-8", rest, zero, zero + 1, "a NUL, as UTF-16 has many")
                text += new if at else new.removeprefix("\ufeff")
                at, rest = at + used, rest[used:]
                *lines, text = text.split("\n")
                for line in lines:
                    yield line.removesuffix("\r") + "\n"
                if len(text) > LINE and not whole:
                    space = text.rfind(" ", 1)
                    yield text[:space] if space > 0 else text
                    text = text[space:] if space > 0 else ""
                if bar is not None:
                    bar.update(len(chunk))
        codecs.utf_8_decode(rest, "strict", True)
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} byte {at + e.start}: not UTF-8 ({e.reason}); convert the file to UTF-8") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({why(e)}); mend it or leave it out") from None
    if text:
        yield text


def documents_of(paths, show=False, desc=""):
    """Yield (number, line) of the files, in order; the lines of a document, up to a blank line or the file's end, share one."""
    total, number = sum(os.path.getsize(path) for path in paths), -1
    with tqdm(total=total, unit="B", unit_scale=True, desc=desc, disable=not show) as bar:
        for path in paths:
            within, fresh = False, True                                            # a document has begun; a line begins here
            for line in lines_of(path, bar):
                if fresh and not line.strip():
                    within = False
                else:
                    number += not within
                    within = True
                    yield number, line
                fresh = line.endswith("\n")


def find_texts(inputs, out):
    """Files and folders -> paths of files, each file once, sorted within a folder. Passed over: what is hidden in folders, and
    what prepare wrote to `out`. Raises BadInput."""
    found, own = {}, {os.path.realpath(os.path.join(out, name)) for name in WRITTEN}
    for place in map(str, inputs):
        inside = [place]
        if os.path.isdir(place):
            inside = [os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names]
            inside = sorted(path for path in inside if "/." not in "/" + path[len(place):].replace(os.sep, "/"))
            if not inside:
                raise BadInput(f"{place}: no files in it; put text files there")
        for path in inside:
            if not os.path.isfile(path):                                           # nor is a link to nothing
                raise BadInput(f"{path}: no such file or folder; give text files, or folders of them")
            found.setdefault(os.path.realpath(path), path)
    if not (texts := [path for real, path in found.items() if real not in own]):
        raise BadInput(f"{inputs[0]}: nothing but what prepare wrote; give the text that it was made of")
    return texts


@contextlib.contextmanager
def scratch(out):
    """A new hidden folder in `out`, removed in the end. One that a killed process left goes now: its lock ended with it."""
    for lock in Path(out).glob(".part-*/lock"):
        with contextlib.suppress(OSError), open(lock, "r+") as file:               # raises: the process lives, or no locks here
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    os.makedirs(part := os.path.join(out, f".part-{uuid.uuid4().hex}"))
    try:
        with open(os.path.join(part, "lock"), "w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def prepare(inputs, out, vocab_size=8192, vocab=None, valid=(), valid_share=0.01, overwrite=False, show=True):
    """Text files -> out/{vocab, train.bin, train.idx, valid.bin, valid.idx, meta.json}; returns meta. Raises BadInput.

    *.bin: ids without special tokens, uint16 or uint32; *.idx: int64, where documents start and the last one ends.
    Lines are encoded one by one, newline included, so that no document is ever in memory as a whole.
    The files appear when all is done, meta.json last. Without `valid` the first document and every 1 / valid_share-th
    after it are held out. The vocabulary is learned from the training text, or opened (vocab: see open_vocabulary).
    """
    if os.path.exists(os.path.join(out, "meta.json")) and not overwrite:
        raise BadInput(f"--out {out}: already holds a prepared corpus; add --overwrite, or choose another --out")
    if not 0 < valid_share < 1:
        raise BadInput(f"--valid_share {valid_share}: must lie between 0 and 1; it is the share of documents held out")
    share, paths = Fraction(str(valid_share)), find_texts(inputs, out)
    held_out = find_texts(valid, out) if valid else None
    if held_out and (both := set(map(os.path.realpath, paths)) & set(map(os.path.realpath, held_out))):
        raise BadInput(f"--valid {min(both)}: is part of --input, too; what is held out must not be trained on")

    def split_of(number):
        return "train" if held_out or math.ceil((number + 1) * share) == math.ceil(number * share) else "valid"

    with scratch(out) as part:
        if vocab is None:
            texts = (line for number, line in documents_of(paths, show, "counting words") if split_of(number) == "train")
            vocabulary = train_vocabulary(texts, vocab_size, show)
        else:
            vocabulary = open_vocabulary(vocab)
        meta = {"version": 1, "dtype": np.dtype(vocabulary.dtype).name, "vocab_size": vocabulary.size, "inputs": paths,
                "command": " ".join(sys.argv)}
        with open(os.path.join(part, "train.bin"), "wb") as one, open(os.path.join(part, "valid.bin"), "wb") as two:
            files, bounds = {"train": one, "valid": two}, {"train": array("q"), "valid": array("q")}
            written = {"train": 0, "valid": 0}
            for names, fixed in ((paths, None), (held_out, "valid")) if held_out else ((paths, None),):
                last = None
                for number, line in documents_of(names, show, "encoding"):
                    if number != last:
                        split, last = fixed or split_of(number), number
                        bounds[split].append(written[split])
                    ids = vocabulary.encode(line)
                    files[split].write(np.array(ids, vocabulary.dtype).tobytes())
                    written[split] += len(ids)
        for split in files:
            meta[split] = {"documents": len(bounds[split]), "tokens": written[split]}
            bounds[split].append(written[split])
            with open(os.path.join(part, f"{split}.idx"), "wb") as file:
                bounds[split].tofile(file)
        if not written["train"] and written["valid"] and not held_out:
            if (count := meta["valid"]["documents"]) > 1:
                raise BadInput(f"--valid_share {valid_share}: holds out all {count} documents; take a smaller share")
            raise BadInput(f"{paths[0]}: one document, and none can be held out; give --valid, or part documents by blank lines")
        for split, place in (("train", paths[0]), ("valid", (held_out or paths)[0])):
            if not written[split]:
                raise BadInput(f"{place}: no text in it" + (", nor in the other files" if len(paths) > 1 else ""))
        vocabulary.save(os.path.join(part, "vocab"))
        save(Path(part, "meta.json"), meta)
        Path(out, "meta.json").unlink(missing_ok=True)                             # from here on it is neither old nor new
        for name in WRITTEN:
            os.replace(os.path.join(part, name), os.path.join(out, name))
    return meta


# --------------------------------------------------------------------------------------------- Corpus, Blocks, Batches

class Corpus:
    """Documents as ids without special tokens. tokens: (N,) unsigned ints, mapped from disk or in memory; bounds: (n + 1,)
    int64, document i is tokens[bounds[i]:bounds[i + 1]]. Pickled by its path, should it have one."""

    def __init__(self, tokens, bounds, stem=None):
        self.tokens, self.bounds, self.stem = tokens, bounds, stem

    @classmethod
    def open(cls, stem, dtype):
        """`stem`.bin and `stem`.idx. Raises BadInput."""
        try:
            tokens, bounds = np.memmap(f"{stem}.bin", dtype, "r"), np.memmap(f"{stem}.idx", np.int64, "r")
        except (OSError, ValueError) as e:                                         # ValueError: empty, or cut within a number
            raise BadInput(f"{stem}.bin or .idx: cannot be read ({why(e)}); prepare the text anew") from None
        if len(bounds) < 2 or bounds[0] or bounds[-1] != len(tokens) or (np.diff(bounds) <= 0).any():
            raise BadInput(f"{stem}.idx: does not fit {stem}.bin, one of them is damaged; prepare the text anew")
        return cls(tokens, bounds, (stem, dtype))

    def __reduce__(self):
        return (Corpus.open, self.stem) if self.stem else (Corpus, (self.tokens, self.bounds))

    def __len__(self):
        return len(self.bounds) - 1

    def document(self, i):
        """-> (n,) ids of document i, read-only."""
        return self.tokens[self.bounds[i]:self.bounds[i + 1]]


class Blocks:
    """A corpus as blocks of at most max_tokens: <s>, then whole documents, each with </s> behind it (the paper's "complete
    documents", section 4.3). load(i) -> (n,) int64.

    Documents stay in order and fill a block while they fit. One that is longer than a block starts a new one, and is cut into
    full blocks, each with <s> and </s> of its own; what remains of it starts a block that the next documents may fill. (The
    released recipe's blocks hold one document each.)
    bounds: (blocks + 1,) int64, where blocks start in the corpus's tokens.
    """

    def __init__(self, corpus, max_tokens=512):
        if max_tokens < 3:
            raise BadInput(f"--max_tokens {max_tokens}: must be at least 3, <s>, a token and </s>")
        self.corpus, room = corpus, max_tokens - 1                                 # beside <s>
        ends = np.asarray(corpus.bounds) + np.arange(len(corpus.bounds))           # the same with a </s> for each document
        cost, at, bounds = memoryview(ends), 0, array("q", [0])
        start, total = 0, len(corpus.tokens)                                       # document `at`, token `start`
        while start < total:
            last = bisect.bisect_right(cost, start + at + room, lo=at) - 1         # documents before it fit as a whole
            if last > at:
                at, start = last, int(corpus.bounds[last])
            else:
                start += min(room - 1, int(corpus.bounds[at + 1]) - start)         # a piece and its </s>
                at += start == corpus.bounds[at + 1]
            bounds.append(start)
        self.bounds = np.frombuffer(bounds, np.int64)

    def __len__(self):
        return len(self.bounds) - 1

    def load(self, i):
        """-> (n,) int64: <s> ... </s>, with </s> also where a document ends within."""
        start, end = self.bounds[i], self.bounds[i + 1]
        inside = slice(*np.searchsorted(self.corpus.bounds, [start, end], side="right"))
        ends = np.union1d(self.corpus.bounds[inside], end) - start                 # of documents, and of the block
        ids = self.corpus.tokens[start:end].astype(np.int64)
        return np.concatenate([[BOS], np.insert(ids, ends, EOS)])


class Batches(torch.utils.data.Dataset):
    """batches[[(epoch, index), ...]] -> dict(tokens (B, T) int64, the text, padded with <pad>; corrupted (B, T) int64, what the
    student sees; mask (B, T) bool, True = scored), for DataLoader(batch_size=None, sampler=batches(len(blocks), ...)).

    masker(ids (n,) int64, rng) -> corrupted (n,), mask (n,), as in masking.bert_mask; rng is seeded by [seed, epoch, index].
    Without a masker, corrupted is tokens and nothing is scored.
    """

    def __init__(self, blocks, seed, masker=None):
        self.blocks, self.seed, self.masker = blocks, seed, masker

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, keys):
        texts = [self.blocks.load(index) for _, index in keys]
        shape = len(texts), max(map(len, texts))
        tokens, mask = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.bool)
        corrupted = tokens.clone()
        for row, ((epoch, index), ids) in enumerate(zip(keys, texts)):
            rng = np.random.default_rng([self.seed, epoch, index])
            changed, hidden = self.masker(ids, rng) if self.masker else (ids, np.zeros(len(ids), bool))
            tokens[row, :len(ids)] = torch.from_numpy(ids)
            corrupted[row, :len(ids)] = torch.as_tensor(changed)
            mask[row, :len(ids)] = torch.as_tensor(hidden)
        return {"tokens": tokens, "corrupted": corrupted, "mask": mask}


def open_corpus(path, vocab_size=8192, vocab=None, show=True):
    """A folder that prepare wrote -> (train Corpus, valid Corpus, Vocabulary). Raises BadInput.

    A folder of plain text, train.txt and valid.txt (without it 1 % of train.txt's documents), is prepared into a hidden folder
    in it, else among the user's caches, once for each vocabulary. If many processes do so at once, all take the first one's.
    """
    if not os.path.isdir(path):
        raise BadInput(f"{path}: no such folder; give one that `python -m data.text prepare` wrote, or one with train.txt")
    if os.path.isfile(os.path.join(path, "meta.json")):
        return read_corpus(path)
    texts = [text for name in ("train.txt", "valid.txt") if os.path.isfile(text := os.path.join(path, name))]
    if not texts or not texts[0].endswith("train.txt"):
        raise BadInput(f"{path}: neither meta.json nor train.txt in it; run `python -m data.text prepare` on your text first")
    about = [os.path.abspath(path), vocab or vocab_size], [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, texts)]
    name, stamp = (hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for part in about)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    places = [Path(path, f".data2vec-text-{name}-{stamp}"), Path(home, "data2vec", f"text-{name}-{stamp}")]
    for place in filter(os.path.exists, places):
        try:
            return read_corpus(place)
        except BadInput:                                                           # it appeared whole, so it was damaged since
            shutil.rmtree(place, ignore_errors=True)
    for place in places:
        try:
            with scratch(place.parent) as part:
                print(f"{path}: plain text; prepared into {place}", file=sys.stderr) if show else None
                prepare(texts[:1], made := os.path.join(part, "made"), vocab_size, vocab, texts[1:], show=show)
                with contextlib.suppress(OSError):                                 # another process was faster: its own is taken
                    os.rename(made, place)
            for old in place.parent.glob(f"*text-{name}-*"):                       # of the text before it changed
                shutil.rmtree(old, ignore_errors=True) if old != place else None
            return read_corpus(place)
        except OSError as e:
            failed = e
    raise BadInput(f"{path}: plain text, and neither {places[0]} nor {places[1]} can be written ({why(failed)}); "
                   "prepare it elsewhere")


def read_corpus(folder):
    """-> (train Corpus, valid Corpus, Vocabulary) of what prepare wrote. Raises BadInput."""
    place = os.path.join(folder, "meta.json")
    try:
        with open(place, encoding="utf-8") as file:
            meta = json.load(file)
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]]
        counts = [meta[split]["tokens"] for split in ("train", "valid")]
        size = meta["vocab_size"]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise BadInput(f"{place}: not of a prepared corpus, or damaged ({why(e)}); prepare the text anew") from None
    vocabulary = Vocabulary.load(os.path.join(folder, "vocab"))
    train, valid = (Corpus.open(os.path.join(folder, split), dtype) for split in ("train", "valid"))
    if vocabulary.size != size or counts != [len(train.tokens), len(valid.tokens)]:
        raise BadInput(f"{place}: does not fit the files beside it; prepare the text anew")
    return train, valid, vocabulary


# ------------------------------------------------------------------------------------------------------ the made corpus

LIBRARY = ("asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib", "json",
           "logging", "multiprocessing", "os", "sqlite3", "tkinter", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo")


def made_corpus(vocab_size=2048):
    """-> (train Corpus, valid Corpus, Vocabulary): English that every Python carries, nothing is fetched or written.

    The language reference's topics (pydoc_data), a document each, and the docstrings of the standard library's modules, a
    document for each module; they are read, not imported. About 2 MB and seconds; a tenth, chosen by hash, is held out. The same
    each time, but other Pythons carry other text: compare runs of one version. Raises BadInput if the Python carries too little.
    """
    documents, seen = [], set()
    for text in [*made_topics(), *made_docstrings()]:
        fresh = [part for part in text if part not in seen and not seen.add(part)]         # a docstring counts once
        if sum(map(len, fresh)) >= 200:
            documents.append("\n".join(fresh) + "\n")
    if sum(map(len, documents)) < 200_000:
        raise BadInput("made corpus: this Python comes without its documentation and sources; give a folder of text instead")
    parts = [], []
    for text in documents:
        parts[zlib.crc32(text.encode()) % 10 == 0].append(text)
    vocabulary, sets = train_vocabulary(parts[0], vocab_size), []
    for texts in parts:
        ids = [np.array(vocabulary.encode(text), vocabulary.dtype) for text in texts]
        sets.append(Corpus(np.concatenate(ids), np.cumsum([0, *map(len, ids)])))
    return (*sets, vocabulary)


def made_topics():
    """-> lists of one text: the topics of Python's help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError:                                                            # some systems leave it out
        return []
    return [[topics[name].strip()] for name in sorted(topics)]


def made_docstrings():
    """Yield lists of texts, a list for each module of the standard library."""
    root = sysconfig.get_paths()["stdlib"]
    folders = [root, *(os.path.join(root, name) for name in LIBRARY)]
    paths = [os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in sorted(os.listdir(folder))]
    for path in paths:
        if path.endswith(".py") and os.path.isfile(path):
            try:
                with open(path, "rb") as file:
                    tree = ast.parse(file.read())
            except (OSError, SyntaxError, ValueError):                             # not one that this Python runs
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            yield [text.strip() for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def main():
    from data import glue  # it imports this file

    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data.text", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("prepare", help="plain text -> tokens on disk", formatter_class=plain)
    text.add_argument("--input", nargs="+", required=True,
                      help="UTF-8 text files, or folders of them; a blank line ends a document")
    text.add_argument("--out", required=True, help="folder to write vocab, {train,valid}.{bin,idx} and meta.json to")
    text.add_argument("--vocab_size", type=int, default=8192, help="ids of a vocabulary to learn from the text, 261 or more;\n"
                      "the paper's has 50265, which wants gigabytes of text")
    text.add_argument("--vocab", help="gpt2, or a prepared vocabulary, or a folder with GPT-2's or RoBERTa's files, instead")
    text.add_argument("--valid", nargs="+", default=[], help="text files to hold out; else --valid_share of the documents")
    text.add_argument("--valid_share", type=float, default=0.01, help="share of the documents to hold out, spread evenly")
    text.add_argument("--overwrite", action="store_true", help="replace what --out already holds")
    tasks = commands.add_parser("glue", help="download GLUE's tasks", formatter_class=plain)
    tasks.add_argument("--out", required=True, help="folder to write TASK/ to; the archives are kept beside it,\n"
                       "and are of no use once they are unpacked")
    tasks.add_argument("--tasks", nargs="+", default=list(glue.TASKS), metavar="TASK", help=" ".join(glue.TASKS))
    tasks.add_argument("--md5", nargs="+", default=[],
                       help="of the archives, in the order of --tasks; GLUE's home publishes none,\n"
                       "and without it the archives' own checksums are all that is checked")
    tasks.add_argument("--url", default=glue.URL, help=argparse.SUPPRESS)          # for tests and mirrors
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            meta = prepare(args.input, args.out, args.vocab_size, args.vocab, args.valid, args.valid_share, args.overwrite)
            print(f"{args.out}: {meta['vocab_size']} ids;", "; ".join("{}: {documents} documents, {tokens} tokens".format(
                split, **meta[split]) for split in ("train", "valid")))
            return
        if unknown := [name for name in args.tasks if name not in glue.TASKS]:
            raise BadInput(f"--tasks {unknown[0]}: no such task; choose from {', '.join(glue.TASKS)}")
        for i, name in enumerate(args.tasks):
            os.makedirs(args.out, exist_ok=True)
            glue.download_task(args.out, name, args.url, args.md5[i].lower() if i < len(args.md5) else None)
            print(f"{os.path.join(args.out, name)}: there")
    except OSError as e:
        raise BadInput(f"{args.out}: cannot be written ({e}); make room there or give another --out") from e


if __name__ == "__main__":
    run(main)

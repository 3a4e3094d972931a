"""Text: a vocabulary, a corpus prepared from plain text, blocks of whole documents, batches.

    python -m data.text prepare --input BOOKS.txt WIKI/*.txt --out DIR --vocab_size 8192

Text is UTF-8, one paragraph per line, with a blank line between documents.
"""

import argparse
import base64
import json
from collections import Counter, defaultdict
from heapq import heappop, heappush
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import UserError, require, run, whole
from data import synthetic

# GPT-2's regular expression: BPE merges only within a word, which includes the space before it
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken overflows on long runs of one kind, so it gets a text in parts that end before a space
PARTS = regex.compile(r"(?s).{1,16384}\Z|.{1,16383}(?= )|.{1,16384}")
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
BOS, PAD, EOS, UNK = range(4)
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "dict.txt")


class Vocabulary:
    """Byte-level BPE with RoBERTa's ids: <s> 0, <pad> 1, </s> 2, <unk> 3.

    pieces  {bytes: id} in the order of merging, the 256 single bytes first; UNK for a piece without an id
    size    number of ids, used or not
    mask    id of <mask>, by default the last
    """

    def __init__(self, pieces, size=None, mask=None):
        self.pieces = pieces
        self.size = size or len(pieces) + 5
        self.mask = self.size - 1 if mask is None else mask
        self.special = SPECIAL | {"<mask>": self.mask}
        self.regular_ids = np.unique([i for i in pieces.values() if i > UNK])  # that a text can have
        self.dtype = np.dtype("uint16" if self.size <= 1 << 16 else "uint32")  # on disk
        self.ids = np.array(list(pieces.values()))  # rank of merging -> id
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding("data2vec", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        """-> list of ids, none of them special: "<mask>" in a text is six plain characters."""
        ranks = [rank for part in PARTS.findall(text) for rank in self.bpe.encode_ordinary(part)]
        return self.ids[ranks].tolist()

    def spell(self):
        """-> the vocabulary as text: a line with the size, then `base64 id` for each piece."""
        mask = "" if self.mask == self.size - 1 else f", mask: {self.mask}"
        lines = [f"{base64.b64encode(piece).decode()} {i}\n" for piece, i in self.pieces.items()]
        return f"data2vec vocabulary, ids: {self.size}{mask}\n" + "".join(lines)

    @classmethod
    def parse(cls, text):
        """The text of spell(). Raises ValueError."""
        head, *lines = text.splitlines()
        size, *mask = head.removeprefix("data2vec vocabulary, ids: ").split(", mask: ")
        pieces = {base64.b64decode(piece): int(i) for piece, i in map(str.split, lines)}
        return cls(pieces, int(size), *map(int, mask))

    @classmethod
    def from_files(cls, folder):
        """RoBERTa's tokenizer.json, or vocab.json and merges.txt; or GPT-2's encoder.json and vocab.bpe,
        whose id in line n of fairseq's dict.txt, from 0, becomes n + 4."""
        files = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name in FILES}
        if "tokenizer.json" in files:
            about = json.loads(files["tokenizer.json"])
            wanted = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False, "normalizer": None}
            given = {"normalizer": about["normalizer"]} | (about["pre_tokenizer"] or {"type": None})
            for name, value in wanted.items():
                if given.get(name, value) != value:
                    raise ValueError(f"tokenizer.json has {name} {given[name]}; only RoBERTa's kind is known")
            ids = about["model"]["vocab"] | {token["content"]: token["id"] for token in about["added_tokens"]}
            merges = about["model"]["merges"]  # "a b", in newer files ["a", "b"]
        elif "vocab.json" in files:
            ids, merges = json.loads(files["vocab.json"]), files["merges.txt"].split("\n")
        else:
            ids, merges = json.loads(files["encoder.json"]), files["vocab.bpe"].split("\n")
            moved = {line.split()[0]: n for n, line in enumerate(files["dict.txt"].splitlines(), 4)}
            ids = {token: moved.get(str(i), UNK) for token, i in ids.items()}
            ids |= SPECIAL | {"<mask>": len(moved) + 4}
        if "<mask>" not in ids or not SPECIAL.items() <= ids.items():
            raise ValueError(f"the special tokens are not {SPECIAL} and <mask>")
        bytes_of = {letter: byte for byte, letter in byte_letters().items()}
        known = dict.fromkeys(bytes_of, UNK) | ids  # some vocabularies lack bytes
        merges = ["".join(merge).replace(" ", "") for merge in merges if merge[:8] != "#version"]
        tokens = [*bytes_of, *filter(None, merges)]
        pieces = {bytes(bytes_of[c] for c in token): known[token] for token in tokens}
        return cls(pieces, max(ids.values()) + 1, ids["<mask>"])


def byte_letters():
    """-> {byte: letter} of GPT-2's files: printable bytes as they are, the others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def open_vocabulary(name):
    """-> Vocabulary: gpt2 (downloaded), a prepared folder's, or that of a folder for from_files."""
    path = Path(name, "vocab")
    try:
        if name == "gpt2":
            gpt2 = tiktoken.get_encoding("gpt2")
            pieces = map(gpt2.decode_single_token_bytes, range(gpt2.max_token_value))  # not <|endoftext|>
            return Vocabulary({piece: i for i, piece in enumerate(pieces, 4)})
        return Vocabulary.parse(path.read_text()) if path.exists() else Vocabulary.from_files(path.parent)
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{name}: no vocabulary ({error}); it takes RoBERTa's files") from None


def train_vocabulary(texts, vocab_size):
    """Iterable of texts -> a new Vocabulary of at most vocab_size ids."""
    require(vocab_size >= 261, f"--vocab_size {vocab_size}: 256 bytes and 5 special tokens need 261")
    parts = (part for text in texts for part in PARTS.findall(text))
    counts = Counter(word for part in parts for word in regex.findall(WORDS, part) if len(word) <= 100)
    pieces = train_bpe(dict(counts.most_common(1_000_000)), vocab_size - 5)  # 1.2 GB of memory
    return Vocabulary({piece: rank + 4 for piece, rank in pieces.items()})


def train_bpe(counts, num_pieces):
    """{word: count} -> {bytes: rank}: the 256 bytes, then the most frequent pair, merged again and again.

    Sennrich et al. 2016. Of equal counts the pair whose bytes sort first is merged; pairs seen once are not.
    """
    pieces = [bytes([b]) for b in range(256)]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    words = [word.encode().decode("latin1") for word in counts]  # a piece is one character, chr(rank)
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair of characters -> its count, the words it may be in
    heap, change = [], Counter()

    def count(i, sign):
        for pair in pairwise(words[i]):
            change[pair] += sign * weights[i]
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    while True:
        for (a, b), difference in change.items():
            pairs[a, b] += difference
            if difference != 0 and pairs[a, b] > 1:
                heappush(heap, (-pairs[a, b], pieces[ord(a)], pieces[ord(b)], a, b))
        change.clear()
        while heap and pairs[heap[0][3:]] != -heap[0][0]:  # the count has changed since
            heappop(heap)
        if not heap or len(pieces) == num_pieces:
            return ranks
        _, first, second, a, b = heappop(heap)
        if first + second not in ranks:  # another pair may spell the same
            ranks[first + second] = len(pieces)
            pieces.append(first + second)
        for i in where.pop((a, b)):
            count(i, -1)
            words[i] = words[i].replace(a + b, chr(ranks[first + second]))
            count(i, 1)


def read_documents(paths):
    """Yields documents as lists of lines. A blank line or the end of a file ends a document."""
    for path in tqdm(paths, unit=" files", disable=None):
        try:
            with open(path, encoding="utf-8-sig") as file:
                yield from (list(lines) for blank, lines in groupby(file, str.isspace) if not blank)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason}); convert it to UTF-8") from None


def prepare(inputs, out, vocab_size=8192, vocab=None, valid=(), valid_every=100):
    """Text files -> out/{vocab, train.bin, train.idx, valid.bin, valid.idx, meta.json}; returns meta.

    *.bin: ids without special tokens, uint16 or uint32; *.idx: int64, where documents start, and the end.
    Without `valid`, every valid_every-th document is held out, from the first. Lines are encoded one by one.
    """
    out = Path(out)
    require(not out.exists(), f"--out {out}: exists; remove it or choose another folder")
    inputs = [path for path in inputs if path not in valid]  # --input DIR/*.txt may include them
    for path in [*inputs, *valid]:
        require(Path(path).is_file(), f"{path}: no such file")

    def documents(split):
        numbered = enumerate(read_documents(valid if valid and split == "valid" else inputs))
        return (doc for n, doc in numbered if valid or (n % valid_every == 0) == (split == "valid"))

    with whole(out) as folder:
        folder.mkdir()
        texts = chain.from_iterable(documents("train"))
        vocabulary = open_vocabulary(vocab) if vocab else train_vocabulary(texts, vocab_size)
        (folder / "vocab").write_text(vocabulary.spell(), "utf-8")
        meta = {"vocab_size": vocabulary.size}
        for split in ("train", "valid"):
            bounds = [0]
            with open(folder / f"{split}.bin", "wb") as file:
                for document in documents(split):
                    for line in document:
                        file.write(np.array(vocabulary.encode(line), vocabulary.dtype))
                    bounds.append(file.tell() // vocabulary.dtype.itemsize)
            require(len(bounds) > 1, f"no text for {split}; put blank lines between documents or use --valid")
            np.array(bounds, np.int64).tofile(folder / f"{split}.idx")
            meta[split] = {"documents": len(bounds) - 1, "tokens": bounds[-1]}
        (folder / "meta.json").write_text(json.dumps(meta, indent=2), "utf-8")
    return meta


class Corpus:
    """tokens (N,) unsigned, without special ones; document i is tokens[bounds[i] : bounds[i + 1]]."""

    def __init__(self, tokens, bounds, source=None):
        self.tokens, self.bounds, self.source = tokens, bounds, source

    @classmethod
    def open(cls, stem, dtype):
        tokens = np.memmap(f"{stem}.bin", dtype, "r")
        bounds = np.memmap(f"{stem}.idx", np.int64, "r")
        require(bounds[-1] == len(tokens), f"{stem}.bin: does not fit {stem}.idx; prepare the text again")
        return cls(tokens, bounds, (stem, dtype))

    def __reduce__(self):  # for workers: they open the files
        return (Corpus.open, self.source) if self.source else (Corpus, (self.tokens, self.bounds))


class Blocks:
    """A corpus as blocks of at most max_tokens: <s>, then documents, each followed by </s> (section 4.3).

    Documents fill a block in order while they fit. A longer one starts a new block and is split into full
    blocks, each with <s> and </s>; the next documents fill its last block. (Released: a block a document.)
    """

    def __init__(self, corpus, max_tokens=512):
        self.corpus = corpus
        room, used = max_tokens - 1, 0  # without <s>
        starts = [0]  # of the blocks, in corpus.tokens
        for start, end in pairwise(memoryview(corpus.bounds)):
            if used > 0 and used + end - start + 1 > room:
                starts.append(start)
                used = 0
            while end - start + 1 > room:
                start += room - 1
                starts.append(start)
            used += end - start + 1
        self.bounds = np.array([*starts, len(corpus.tokens)])

    def __len__(self):
        return len(self.bounds) - 1

    def load(self, i):
        """-> (n,) int64: <s> ... </s>, with </s> also where a document ends inside."""
        start, end = self.bounds[i : i + 2]
        first, last = np.searchsorted(self.corpus.bounds, [start, end], side="right")
        ends = np.union1d(self.corpus.bounds[first:last], end) - start  # of documents and of the block
        ids = self.corpus.tokens[start:end].astype(np.int64)
        return np.concatenate([[BOS], np.insert(ids, ends, EOS)])


class FullBlocks:
    """A corpus as blocks of exactly max_tokens: <s>, then the stream of documents, each followed by </s>,
    without regard to where they end (data2vec 2.0). What is left at the end is not used."""

    def __init__(self, corpus, max_tokens=512):
        self.corpus, self.room = corpus, max_tokens - 1
        self.ends = np.arange(len(corpus.bounds) - 1) + corpus.bounds[1:]  # of documents, in the stream
        require(len(self), f"--max_tokens {max_tokens}: the text has {self.ends[-1] + 1}, not one full block")

    def __len__(self):
        return int(self.ends[-1] + 1) // self.room

    def load(self, i):
        """-> (max_tokens,) int64."""
        start, end = i * self.room, (i + 1) * self.room
        first, last = np.searchsorted(self.ends, [start, end])
        ids = self.corpus.tokens[start - first : end - last].astype(np.int64)
        places = self.ends[first:last] - np.arange(first, last) - (start - first)
        return np.concatenate([[BOS], np.insert(ids, places, EOS)])


class Batches:
    """batches[[(epoch, index), ...]] -> {tokens, corrupted (B, T) int64, padded; mask (B, T), True = scored}.

    draw_mask(ids (n,) int64, rng) -> corrupted, which the student sees, and mask, as masking.bert_mask.
    """

    def __init__(self, blocks, seed, draw_mask):
        self.blocks, self.seed, self.draw_mask = blocks, seed, draw_mask

    def __getitem__(self, keys):
        rows = []
        for epoch, index in keys:
            ids = self.blocks.load(index)
            rng = np.random.default_rng([self.seed, epoch, index])
            rows.append([torch.from_numpy(ids), *self.draw_mask(ids, rng)])
        columns = zip(("tokens", "corrupted", "mask"), zip(*rows), (PAD, PAD, False))
        return {name: pad_sequence(column, True, padding) for name, column, padding in columns}


def open_data(path):
    """-> train Corpus, valid Corpus, Vocabulary of a prepared folder; "": of Python's documentation."""
    if path == "":
        splits = synthetic.documents()
        vocabulary = train_vocabulary(splits[0], 2048)
        ids = [[np.array(vocabulary.encode(text), vocabulary.dtype) for text in texts] for texts in splits]
        train, valid = (Corpus(np.concatenate(part), np.cumsum([0, *map(len, part)])) for part in ids)
        return train, valid, vocabulary
    hint = "run `python -m data.text prepare --input FILE.txt --out DIR` and give that DIR"
    require(Path(path, "meta.json").exists(), f"--data {path}: no prepared text; {hint}")
    vocabulary = open_vocabulary(path)
    train, valid = (Corpus.open(f"{path}/{split}", vocabulary.dtype) for split in ("train", "valid"))
    return train, valid, vocabulary


def main():
    parser = argparse.ArgumentParser("data.text", description="Turns text files into tokens.")
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("--input", nargs="+", required=True, help="text files")
    parser.add_argument("--valid", nargs="+", default=[], help="text files to hold out; else 1 %% of --input")
    parser.add_argument("--out", required=True, help="new folder, for --data of train_text.py")
    parser.add_argument("--vocab_size", type=int, default=8192, help="ids to learn; the paper has 50265")
    parser.add_argument("--vocab", help="gpt2, or a folder with vocab.json and merges.txt, or tokenizer.json")
    args = parser.parse_args()
    print(f"{args.out}:", prepare(args.input, args.out, args.vocab_size, args.vocab, args.valid))


if __name__ == "__main__":
    run(main)

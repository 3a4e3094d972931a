"""Transcripts to letters and back: CTC decoding with or without a word language model, and error rates.

    python -m data.letters arpa --input FILES --order 3 --out lm.arpa    estimate a language model from text

Everywhere a dictionary is a list of symbols, one an output of the network: a blank, the word boundary "|", and letters.
A released checkpoint brings its own order. Its symbols of several characters (<pad>, </s>, <unk>) say nothing here:
their probability counts as the blank's.
"""

import argparse
import gzip
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import NamedTuple

import numpy as np

from common import BadInput, run

LETTERS = ["<blank>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "'"]  # 29 symbols; the blank first, where CTC losses expect it


# ---- text <-> letters ---------------------------------------------------------------------------------------------


def letters_of(dictionary: list[str], blank: int = 0) -> dict[str, int]:
    """{letter: its index}, without the blank and "|". Raises BadInput for a dictionary that has no "|"."""
    if "|" not in dictionary or dictionary[blank] == "|":
        raise BadInput('dictionary: has no word boundary "|"; words could not be told apart')
    return {s: i for i, s in enumerate(dictionary) if len(s) == 1 and i != blank and s != "|"}


def clean(text: str, dictionary: list[str] = LETTERS, blank: int = 0) -> tuple[str, str]:
    """Any text -> (what is said, in upper case; the characters in it that the dictionary cannot say, sorted).

    Accents go, typographic apostrophes become ', other punctuation becomes a space, quotes around a word go. Digits and
    signs that stand for words (5 & % $) stay and are reported: only the caller knows how they were spoken.
    """
    letters, out = letters_of(dictionary, blank), []
    for c in unicodedata.normalize("NFKD", re.sub("[’‘ʼ＇´`]", "'", text)).upper():
        kind = unicodedata.category(c)
        if c in letters or c in "%&@#":
            out.append(c)
        elif kind not in ("Mn", "Cf"):  # the accents that NFKD has split from their letters; soft hyphens
            out.append(" " if kind[0] in "PZ" or kind == "Cc" else c)
    words = [w.strip("'") if w[0] == w[-1] == "'" else w for w in "".join(out).split()]
    text = " ".join(w for w in words if w)
    return text, "".join(sorted(set(text) - {" "} - letters.keys()))


def transcribed(utterances, dictionary: list[str], longest: float, frames=None) -> tuple:
    """-> (the Utterances of at most `longest` samples that the dictionary can spell, with cleaned transcripts; a line
    "name: why" for each of the others). frames: of so many samples; CTC needs one for each letter, and one between two that
    are equal. Raises BadInput if none is left."""
    kept, texts, left_out = [], [], []
    for i, transcript in enumerate(utterances.transcripts):
        said, unknown = clean(transcript, dictionary)
        if not said or unknown or utterances.lengths[i] > longest:
            why = "no transcript" if not said else f"cannot spell {unknown}" if unknown else "longer than --max_seconds"
            left_out.append(f"{utterances.names[i]}: {why}")
        elif frames and frames(int(utterances.lengths[i])) < len(it := encode(said, dictionary)) + sum(map(int.__eq__, it, it[1:])):
            left_out.append(f"{utterances.names[i]}: too short for its transcript")
        else:
            kept.append(i)
            texts.append(said)
    if not kept:
        raise BadInput(f"no utterance that can be used, for instance {left_out[0]}; add transcripts or choose other splits")
    part = utterances.part(kept)
    part.transcripts = texts
    return part, left_out


def encode(text: str, dictionary: list[str] = LETTERS, blank: int = 0) -> list[int]:
    """Text -> indices of its letters, upper-cased, with "|" after every word, the last one too (as released).

    "hello world" gives H E L L O | W O R L D |; a text without words gives []. Raises BadInput, which names the
    characters that are not in the dictionary.
    """
    letters = letters_of(dictionary, blank)
    words = text.upper().split()
    if unknown := sorted({c for word in words for c in word if c not in letters}):
        raise BadInput(f"{text!r}: the dictionary has no {' '.join(unknown)}; clean the transcript, or leave it out")
    return [i for word in words for i in (*map(letters.get, word), dictionary.index("|"))]


# ---- CTC: log-probabilities -> text -----------------------------------------------------------------------------------


def frames_of(log_probs, dictionary: list[str], blank: int) -> np.ndarray:
    """log_probs (T, C), NumPy or torch -> a float64 copy; symbols that say nothing are added to the blank."""
    if hasattr(log_probs, "detach"):
        log_probs = log_probs.detach().cpu().double().numpy()
    frames = np.array(log_probs, dtype=np.float64)
    if frames.ndim != 2 or frames.shape[1] != len(dictionary):
        raise ValueError(f"log_probs of shape {frames.shape}: wanted (T, {len(dictionary)}), one column a symbol")
    if len(bad := np.flatnonzero(~np.isfinite(frames.max(1, initial=-np.inf)))):
        raise ValueError(f"log_probs, frame {bad[0]}: NaN, infinite or all -inf; the network has diverged")
    if silent := [i for i, s in enumerate(dictionary) if len(s) != 1 and i != blank]:
        frames[:, blank] = np.logaddexp.reduce(frames[:, [blank, *silent]], axis=1)
        frames[:, silent] = -np.inf
    return frames


def decode_greedy(
    log_probs, dictionary: list[str] = LETTERS, blank: int = 0, frame_s: float = 0.02
) -> tuple[str, list[tuple[float, float]]]:
    """The best symbol of each frame, repeats collapsed, blanks dropped -> (text, [(start_s, end_s) of each word]).

    log_probs  (T, C); scores that are not normalised do, too
    frame_s    seconds from one frame to the next (speech: 320 samples at 16 kHz)
    times      from the start of a word's first letter to the end of its last; CTC letters are short spikes, so words
               may seem to start late and end early by a few frames
    raises     ValueError for NaN or a wrong shape
    """
    letters_of(dictionary, blank)
    best = frames_of(log_probs, dictionary, blank).argmax(1).tolist()
    words, times, inside = [], [], False
    for t, k in enumerate(best):
        if dictionary[k] == "|":
            inside = False
        elif k != blank:
            if not inside:
                words.append("")
                times.append((t * frame_s, 0.0))
                inside = True
            if t == 0 or best[t - 1] != k:
                words[-1] += dictionary[k]
            times[-1] = (times[-1][0], (t + 1) * frame_s)
    return " ".join(words), times


def check_spelling(lm: "ArpaLM", dictionary: list[str], blank: int = 0) -> None:
    """Raises BadInput for a language model of other letters."""
    if not any(letters_of(dictionary, blank).keys() >= set(word) for word in lm.words):
        raise BadInput("language model: the dictionary can spell none of its words; is it in upper case?")


def decode_beam(
    log_probs,
    dictionary: list[str] = LETTERS,
    beam: int = 50,
    lm: "ArpaLM | None" = None,
    lm_weight: float = 2.0,
    word_score: float = -1.0,
    unk_score: float = -10.0,
    lexicon: bool = False,
    prune: float = 12.0,
    blank: int = 0,
) -> list[tuple[str, float]]:
    """Prefix beam search (Hannun et al. 2014) -> [(text, score)], best first, at most `beam`, at least one.

    score = ln P(text) + [lm_weight * log10 P_LM(text </s>) + word_score * words + unk_score * unknown words]
    The bracket needs an LM. Its log is to base 10 as in the released decoder, so that published weights can be used.
    P(text) sums over all alignments; "|" at the start, at the end or twice adds no word, so such alignments count too.

    log_probs   (T, C) natural logarithms, each frame summing to 1
    beam        prefixes kept after each frame; the search is exact while none is dropped
    unk_score   added for a word that the LM does not list, on top of its <unk>
    lexicon     True: only the LM's words (if no prefix ends on a whole word, an unfinished one counts as unknown)
    prune       symbols this many nats below the best of their frame are skipped; inf: none
    raises      ValueError for NaN, a wrong shape or a beam below 1; BadInput for an LM of other letters
    """
    frames, letters, bar = frames_of(log_probs, dictionary, blank), letters_of(dictionary, blank), dictionary.index("|")
    if beam < 1 or lexicon and not lm:
        raise ValueError("beam must be at least 1" if beam < 1 else "a lexicon needs an LM, whose words it takes")
    if lm:
        check_spelling(lm, dictionary, blank)
    heard = {"": (("<s>",), 0.0)}  # finished words, each with its "|" -> (LM history, their part of the score)
    allowed = {}  # unfinished word -> (C,) 0 or -inf, with a lexicon

    def listen(words: str) -> tuple[tuple, float]:
        """The LM's view of finished words; all but the last were heard before."""
        if words not in heard:
            before, _, word = words[:-1].rpartition("|")
            history, score = heard[before and before + "|"]
            score += lm_weight * lm.score(history, word) + word_score + (unk_score if word not in lm.words else 0)
            heard[words] = lm.shorten((*history, word)), score
        return heard[words]

    def allow(word: str) -> np.ndarray:
        if word not in allowed:
            allowed[word] = np.full(len(dictionary), -np.inf)
            allowed[word][[dictionary.index(c) for c in lm.spelling.get(word, "") if c == "|" or c in letters]] = 0
        return allowed[word]

    # A prefix is what is written so far, such as "HELLO|WO". It holds P in two parts: of alignments that end in a
    # blank, and of those that end in its last symbol. After a boundary ("" or "HELLO|") a further "|" changes nothing.
    prefixes, in_blank, in_symbol = [""], np.zeros(1), np.full(1, -np.inf)
    for frame in frames:
        frame = np.where(frame >= frame.max() - prune, frame, -np.inf)
        n, rows = len(prefixes), np.arange(len(prefixes))
        total = np.logaddexp(in_blank, in_symbol)
        fresh = np.array([not p or p[-1] == "|" for p in prefixes])
        last = np.array([letters.get(p[-1:], bar) for p in prefixes])  # (N,)
        stay_blank = total + frame[blank]
        stay_symbol = np.where(fresh, total, in_symbol) + frame[last]
        grow = total[:, None] + frame  # (N, C)
        grow[rows, last] = np.where(fresh, -np.inf, in_blank + frame[last])  # a letter twice needs a blank between
        grow[:, blank] = -np.inf
        if lexicon:
            grow += [allow(p.rpartition("|")[2]) for p in prefixes]
        row = {p: i for i, p in enumerate(prefixes)}
        if pairs := [(j, row[p[:-1]]) for j, p in enumerate(prefixes) if p and p[:-1] in row]:
            child, parent = np.array(pairs).T  # a prefix that grows into another of the beam joins it
            stay_symbol[child] = np.logaddexp(stay_symbol[child], grow[parent, last[child]])
            grow[parent, last[child]] = -np.inf

        stay_rank, grow_rank = np.logaddexp(stay_blank, stay_symbol), grow
        if lm:
            bonus = np.array([heard[p[: p.rfind("|") + 1]][1] for p in prefixes])
            stay_rank, grow_rank = stay_rank + bonus, grow + bonus[:, None]
            for i in np.flatnonzero(grow[:, bar] > -np.inf):
                grow_rank[i, bar] = grow[i, bar] + listen(prefixes[i] + "|")[1]
        rank = np.concatenate([stay_rank, grow_rank.ravel()])
        best = np.argsort(-rank, kind="stable")[:beam]
        best = best[rank[best] > -np.inf]
        if not len(best):  # the lexicon, or symbols of probability 0, leave nothing to write
            return [("", -math.inf)]
        stays, (parent, symbol) = best < n, np.divmod(best - n, len(dictionary))
        source = np.where(stays, best, 0)
        in_blank = np.where(stays, stay_blank[source], -np.inf)
        in_symbol = np.where(stays, stay_symbol[source], grow[parent, symbol])
        prefixes = [
            prefixes[k] if stay else prefixes[i] + dictionary[c]
            for k, stay, i, c in zip(best.tolist(), stays.tolist(), parent.tolist(), symbol.tolist())
        ]

    texts = {}  # a last word counts with and without its "|"
    for prefix, p in zip(prefixes, np.logaddexp(in_blank, in_symbol).tolist()):
        words = prefix if prefix[-1:] in ("", "|") else prefix + "|"
        texts[words] = float(np.logaddexp(texts.get(words, -np.inf), p))
    if lexicon:
        whole = {words: p for words, p in texts.items() if not words or words[:-1].rpartition("|")[2] in lm.words}
        texts = whole or texts
    if lm:
        for words in texts:
            history, bonus = listen(words)
            texts[words] += bonus + lm_weight * lm.score(history, "</s>")
    return sorted(((words.replace("|", " ").strip(), p) for words, p in texts.items()), key=lambda pair: -pair[1])


# ---- language model -----------------------------------------------------------------------------------------------


def lines_of(path: str) -> Iterator[str]:
    """The lines of a UTF-8 text, plain or gzip, whatever its name. Raises BadInput: the file, where and why."""
    at = 0
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            for at, line in enumerate(file, 1):
                yield line
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: not UTF-8, or a damaged gzip file"
        raise BadInput(f"{path}: cannot be read after line {at} ({reason})") from None


class ArpaLM:
    """A back-off n-gram model. prob, backoff: {n-gram, a tuple of words: log10}; all in memory, about 250 bytes each."""

    def __init__(self, order: int, prob: dict[tuple, float], backoff: dict[tuple, float]):
        self.order, self.prob, self.backoff = order, prob, backoff
        self.words = {gram[0] for gram in prob if len(gram) == 1} - {"<s>", "</s>", "<unk>"}

    def shorten(self, history: tuple) -> tuple:
        """The part of the history that score() looks at: the last order - 1 words."""
        return history[max(0, len(history) - self.order + 1) :]

    def score(self, history: tuple, word: str) -> float:
        """log10 P(word | history). Sentences begin with the history ("<s>",) and end with the word "</s>".

        Words not listed count as <unk>, in the history too; without <unk> in the model they get -100, never -inf.
        """
        *history, word = (w if (w,) in self.prob else "<unk>" for w in (*self.shorten(history), word))
        weight = 0.0
        for start in range(len(history) + 1):  # the longest history first; each word dropped costs its back-off weight
            context = tuple(history[start:])
            if (p := self.prob.get((*context, word))) is not None:
                return weight + p
            weight += self.backoff.get(context, 0.0)
        return -100.0

    @cached_property
    def spelling(self) -> dict[str, str]:
        """The words as a tree: {start of a word: the letters that may follow, "|" where it is a word}."""
        tree = {}
        for word in sorted(self.words):
            for i, c in enumerate(word + "|"):
                if c not in (following := tree.get(word[:i], "")):
                    tree[word[:i]] = following + c
        return tree

    @classmethod
    def read(cls, path: str) -> "ArpaLM":
        """Reads an ARPA file of any order, gzip too. Raises BadInput: the file, the line and what is wrong there."""
        wanted, found, prob, backoff, n, at = {}, Counter(), {}, {}, None, 0
        try:
            for at, line in enumerate(lines_of(path), 1):
                line = line.strip(" \t\r\n")
                if n is None:  # whatever stands before \data\ is a comment
                    n = 0 if line == "\\data\\" else None
                elif line == "\\end\\":
                    break
                elif n == 0 and (match := re.fullmatch(r"ngram +(\d+) *= *(\d+)", line)):
                    wanted[int(match[1])] = int(match[2])
                elif match := re.fullmatch(r"\\(\d+)-grams:", line):
                    n = int(match[1])
                    if n not in wanted:
                        raise ValueError(f"{n}-grams, which the header does not announce")
                elif line:
                    p, *words = re.split("[ \t]+", line)
                    if not n or not n <= len(words) <= n + 1:
                        raise ValueError(f"wanted log10 P, {n or 'n'} words and perhaps a back-off weight")
                    words[:n] = ("<unk>" if word == "<UNK>" else word for word in words[:n])  # some tools shout
                    gram, p, weight = tuple(map(intern, words[:n])), float(p), float(words[n] if words[n:] else 0)
                    if gram in prob or not p <= 0 or not weight < math.inf:
                        raise ValueError("listed twice" if gram in prob else "log10 P must be at most 0, weights finite")
                    prob[gram] = max(p, -100.0)  # some tools write -inf, which times a weight of 0 would be NaN
                    found[n] += 1
                    if weight:
                        backoff[gram] = max(weight, -100.0)
            else:
                raise ValueError("the file ends before \\end\\" if n is not None else "no \\data\\: not an ARPA file")
            for n, count in wanted.items():
                if found[n] != count:
                    raise ValueError(f"the header promises {count} {n}-grams, the file holds {found[n]}")
        except ValueError as error:
            raise BadInput(f"{path}: line {at}: {error}") from None
        return cls(max(wanted, default=1), prob, backoff)

    def write(self, path: str) -> None:
        """Writes the model as an ARPA file, gzip if the name ends in .gz, under a temporary name until it is whole."""
        grams = [sorted(gram for gram in self.prob if len(gram) == n) for n in range(1, self.order + 1)]
        temporary = f"{path}.tmp"
        with (gzip.open if str(path).endswith(".gz") else open)(temporary, "wt", encoding="utf-8", newline="\n") as file:
            print("\\data\\", *(f"ngram {n}={len(some)}" for n, some in enumerate(grams, 1)), sep="\n", file=file)
            for n, some in enumerate(grams, 1):
                print(f"\n\\{n}-grams:", file=file)
                for gram in some:
                    weight = f"\t{self.backoff[gram]:.7f}" if gram in self.backoff else ""
                    print(f"{self.prob[gram]:.7f}\t{' '.join(gram)}{weight}", file=file)
            print("\n\\end\\", file=file)
        os.replace(temporary, path)


def kneser_ney(sentences: Iterable[Sequence[str]], order: int) -> ArpaLM:
    """Interpolated Kneser-Ney (Chen and Goodman 1999, section 4.1.6) with one discount an order, estimated from the counts.

    P_n(w | h) = (c(h w) - D) / c(h) + D * N(h) / c(h) * P_{n-1}(w | h without its first word)
    c is a count in the highest order, below it the number of different words seen before the n-gram; N(h) is the
    number of different words seen after h; the unigrams rest on 1 / V for each word, </s> and <unk>.
    """
    counts = [Counter() for _ in range(order + 1)]
    for words in sentences:
        if not {"<s>", "</s>"}.isdisjoint(words):
            raise BadInput(f"{' '.join(words)!r}: holds <s> or </s>, which are added here")
        words = ("<s>", *map(intern, words), "</s>")
        for n in range(1, order + 1):
            counts[n].update(words[i : i + n] for i in range(len(words) - n + 1))
    for n in range(1, order):
        before = Counter(gram[1:] for gram in counts[n + 1])
        for gram in counts[n]:
            if gram[0] != "<s>":  # nothing stands before <s>: its counts remain
                counts[n][gram] = before[gram]
    counts[1].pop(("<s>",), None)  # never predicted
    if not counts[1]:
        raise BadInput("no sentence to learn from")
    size = len(counts[1] | Counter([("<unk>",)]))
    prob, backoff = {}, {}
    for n in range(1, order + 1):
        ones, twos = (sum(c == k for c in counts[n].values()) for k in (1, 2))
        discount = ones / (ones + 2 * twos) if ones and twos else 0.5  # too little text: any value in (0, 1)
        total, kinds = Counter(), Counter()
        for gram, c in counts[n].items():
            total[gram[:-1]] += c
            kinds[gram[:-1]] += 1
        share = {history: discount * kinds[history] / total[history] for history in total}  # left for the lower order
        for gram, c in counts[n].items():
            prob[gram] = (c - discount) / total[gram[:-1]] + share[gram[:-1]] * (prob[gram[1:]] if n > 1 else 1 / size)
        if n == 1:
            prob.setdefault(("<unk>",), share[()] / size)
        backoff |= {history: math.log10(w) for history, w in share.items() if history}
    return ArpaLM(order, {("<s>",): -99.0} | {gram: math.log10(p) for gram, p in prob.items()}, backoff)


# ---- error rates --------------------------------------------------------------------------------------------------


class Errors(NamedTuple):
    substitutions: int
    deletions: int
    insertions: int
    words: int  # of the reference; characters for cer

    @property
    def rate(self) -> float:
        """Errors a word: 0 is perfect, more than 1 is possible; with no reference word 0 or, if something was said, inf."""
        wrong = self.substitutions + self.deletions + self.insertions
        return wrong / self.words if self.words else math.inf if wrong else 0.0


def errors(reference: Sequence, hypothesis: Sequence) -> Errors:
    """The fewest substitutions, deletions and insertions that turn one sequence into the other (Levenshtein).

    Where several ways are as short, the way back from the end takes a match or substitution first, then a deletion.
    """
    index = {}
    ref, hyp = (np.array([index.setdefault(x, len(index)) for x in s], dtype=int) for s in (reference, hypothesis))
    steps = np.arange(len(hyp) + 1)
    cost = np.tile(steps, (len(ref) + 1, 1))  # cost[i, j]: of the first i of the reference into the first j of the hypothesis
    for i, item in enumerate(ref, 1):
        cost[i] = cost[i - 1] + 1
        cost[i, 1:] = np.minimum(cost[i, 1:], cost[i - 1, :-1] + (hyp != item))
        cost[i] = np.minimum.accumulate(cost[i] - steps) + steps  # any number of insertions on the right
    cost, (i, j), (s, d, n) = cost.tolist(), (len(ref), len(hyp)), (0, 0, 0)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (wrong := int(ref[i - 1] != hyp[j - 1])):
            i, j, s = i - 1, j - 1, s + wrong
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i, d = i - 1, d + 1
        else:
            j, n = j - 1, n + 1
    return Errors(s, d, n, len(ref))


def wer(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Word errors of (reference, hypothesis) texts, summed over all; .rate is the word error rate, a fraction.

    An empty reference adds its hypothesis' words as insertions. Compares as written: bring both to the same case.
    """
    return Errors(*np.sum([(0, 0, 0, 0), *(errors(a.split(), b.split()) for a, b in pairs)], axis=0).tolist())


def cer(pairs: Iterable[tuple[str, str]]) -> Errors:
    """As wer, of characters; a single space between words is one of them."""
    return Errors(*np.sum([(0, 0, 0, 0), *(errors(*(" ".join(t.split()) for t in pair)) for pair in pairs)], axis=0).tolist())


# ---- command line -------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(prog="python -m data.letters", description="Language models for CTC decoding.")
    commands = parser.add_subparsers(dest="command", required=True)
    arpa = commands.add_parser("arpa", help="estimate an n-gram model (interpolated Kneser-Ney) and write it as ARPA")
    arpa.add_argument("--input", nargs="+", required=True, metavar="FILE", help="texts, plain or gzip, one sentence a line")
    arpa.add_argument("--order", type=int, default=3, help="longest n-gram (default 3); memory grows with it and the text")
    arpa.add_argument("--skip", type=int, default=0, help="words to skip at the start of a line: 1 for LibriSpeech's ids")
    arpa.add_argument("--out", required=True, metavar="FILE", help="ARPA file to write; gzip if it ends in .gz")
    args = parser.parse_args()
    if args.order < 1 or args.skip < 0:
        raise BadInput("--order must be at least 1 and --skip at least 0")
    if not Path(args.out).absolute().parent.is_dir() or Path(args.out).is_dir():
        raise BadInput(f"{args.out}: cannot be written; give a file in a folder that exists")
    lines = (line for path in args.input for line in lines_of(path))
    sentences = (clean(" ".join(line.split()[args.skip :]))[0].split() for line in lines)
    lm = kneser_ney(filter(None, sentences), args.order)
    lm.write(args.out)
    odd = sum(not set(word) <= set(LETTERS) for word in lm.words)
    print(f"{args.out}: {len(lm.prob)} n-grams up to order {args.order}, {len(lm.words)} words"
          + (f"; {odd} of them hold digits or signs, which CTC letters never spell" if odd else ""))  # fmt: skip


if __name__ == "__main__":
    run(main)

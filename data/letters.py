"""Transcripts to letters and back: CTC decoding, with or without a language model of words, and error rates.

A dictionary lists the network's outputs: the blank, "|" between words, letters. Longer symbols (<unk> of
released models) count as the blank.
"""

import functools
import gzip
import itertools
import math
import re
import unicodedata
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, require

LETTERS = ["<blank>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "'"]
APOSTROPHES = "'’‘ʼ＇´`"
UNKNOWN_SCORE = -10  # of a word that the language model does not have


def alphabet(transcripts):
    """The dictionary of a new head: LETTERS if they spell the transcripts (with capitals), else all letters,
    marks and digits in these, as capitals where a capital is one character."""
    text = unicodedata.normalize("NFC", re.sub(f"[{APOSTROPHES}]", "'", "".join(transcripts)))
    found = {c for c in text if c == "'" or unicodedata.category(c)[0] in "LM" or c.isdecimal()}
    found = {c if c == "ı" or len(c.title()) > 1 else c.title() for c in found}  # Turkish has I and İ
    return LETTERS if found <= set(LETTERS) else ["<blank>", "|", *sorted(found)]


def clean(text, dictionary=LETTERS):
    """-> text in the dictionary's letters and single spaces, and the characters it has no letter for.

    Takes the dictionary's case; drops accents that it lacks, quotes, and punctuation other than % & @ #."""
    letters, out = {symbol for symbol in dictionary if len(symbol) == 1} - {"|"}, ""

    def spell(c):
        return next((form for form in (c, c.upper(), c.lower()) if form in letters), None)

    quote = next((c for c in APOSTROPHES if c in letters), "'")
    text = re.sub(f"[{APOSTROPHES}]", lambda found: found[0] if found[0] in letters else quote, text)
    for c in unicodedata.normalize("NFC", text):
        for part in c if spell(c) else unicodedata.normalize("NFKD", c).upper():
            kind = unicodedata.category(part)
            if spell(part) or part in "%&@#":
                out += spell(part) or part
            elif kind != "Cf" and unicodedata.combining(part) < 10:  # soft hyphens, accents; not vowels
                out += " " if kind[0] in "PZ" or kind == "Cc" else part
    words = [word.strip(quote) if word[0] == word[-1] == quote else word for word in out.split()]
    text = " ".join(filter(None, words))
    return text, "".join(sorted(set(text) - letters - {" "}))


def encode(text, dictionary=LETTERS):
    """Cleaned text -> indices of its letters, with "|" after each word (as released)."""
    index = {symbol: i for i, symbol in enumerate(dictionary)}
    return [index[c] for word in text.split() for c in word + "|"]


def transcribed(utterances, dictionary, max_samples, frames=lambda samples: math.inf):
    """-> Utterances with cleaned transcripts, "name: reason" of those left out."""
    texts, skipped = {}, []
    for i, samples in enumerate(utterances.lengths.tolist()):
        text, unknown = clean(utterances.transcripts[i], dictionary)
        repeats = sum(a == b for a, b in zip(text, text[1:]))
        if unknown or not text:
            skipped.append(f"{utterances.names[i]}: no transcript, or cannot spell {unknown}")
        elif samples > max_samples or frames(samples) < len(text) + 1 + repeats:  # CTC has no alignment
            skipped.append(f"{utterances.names[i]}: over --max_seconds, or too short for its transcript")
        else:
            texts[i] = text
    require(texts, f"no utterance can be used ({skipped[:1]}); add transcripts, or choose other splits")
    return replace(utterances.part(list(texts)), transcripts=list(texts.values())), skipped


def letter_scores(log_probs, dictionary):
    """(T, C) array or tensor -> (T, C) float64 array: longer symbols are added to the blank."""
    x = torch.as_tensor(log_probs).detach().double().cpu().numpy().copy()
    if not np.isfinite(x.max(1)).all():
        raise ValueError("log_probs: NaN, or all -inf; the network has diverged")
    silent = [i for i, symbol in enumerate(dictionary) if i == 0 or len(symbol) > 1]
    x[:, 0] = np.logaddexp.reduce(x[:, silent], axis=1)
    x[:, silent[1:]] = -np.inf
    return x


def decode_greedy(log_probs, dictionary=LETTERS, frame_s=0.02):
    """The best symbol of each frame -> text, [(start, end) of each word in seconds]."""
    best = letter_scores(log_probs, dictionary).argmax(1)
    path = "".join(dictionary[k] if k else " " for k in best)  # a character a frame, " " for the blank
    found = list(re.finditer(r"[^| ]([^|]*[^| ])?", path))
    words = ["".join(c for c, _ in itertools.groupby(word[0])).replace(" ", "") for word in found]
    return " ".join(words), [(word.start() * frame_s, word.end() * frame_s) for word in found]


def decode_beam(log_probs, dictionary=LETTERS, beam=50, lm=None, lm_weight=2, word_score=-1, prune=12):
    """Prefix beam search (Hannun et al. 2014) -> [(text, score)], best first, at most `beam`.

    score = ln P(text), summed over its alignments; with an LM + lm_weight * log10 P_LM(text </s>) +
    word_score * words. Symbols whose ln P is more than prune below the best of their frame are left out."""

    @functools.cache
    def lm_score(words):
        if not words:
            return 0.0
        score = lm_weight * lm.score(["<s>", *words[:-1]], words[-1]) + word_score
        return lm_score(words[:-1]) + score + (0 if words[-1] in lm.words else UNKNOWN_SCORE)

    bar = dictionary.index("|")
    prefixes, last = [""], np.array([bar])  # the N texts so far, and their last symbols
    in_blank, in_symbol = np.full(1, -np.inf), np.zeros(1)  # ln P that they end in a blank, in that symbol
    for frame in letter_scores(log_probs, dictionary):
        frame = np.where(frame < frame.max() - prune, -np.inf, frame)
        grown = np.logaddexp(in_blank, in_symbol)[:, None] + frame  # (N, C): ln P of each prefix + symbol
        grown[range(len(grown)), last] = in_blank + frame[last]  # a letter twice needs a blank between
        in_blank, in_symbol = grown[:, 0].copy(), in_symbol + frame[last]
        rows = {prefix: i for i, prefix in enumerate(prefixes)}
        for i, prefix in enumerate(prefixes):
            if prefix and prefix[:-1] in rows:  # what grows into another prefix joins it
                grown_from = rows[prefix[:-1]], last[i]
                in_symbol[i] = np.logaddexp(in_symbol[i], grown[grown_from])
                grown[grown_from] = -np.inf
        grown[:, 0] = np.logaddexp(in_blank, in_symbol)  # column 0: the prefix as it is
        scores = grown.copy()
        for i, prefix in enumerate(prefixes if lm else []):
            words = tuple(prefix.split("|"))
            scores[i] += lm_score(words[:-1])
            if grown[i, bar] > -np.inf:
                scores[i, bar] = grown[i, bar] + lm_score(words)
        best = np.argsort(-scores, axis=None)[:beam]
        row, symbol = np.divmod(best[grown.flat[best] > -np.inf], len(dictionary))
        prefixes = [prefixes[i] + (dictionary[k] if k else "") for i, k in zip(row, symbol)]
        last = np.where(symbol == 0, last[row], symbol)
        in_blank = np.where(symbol == 0, in_blank[row], -np.inf)
        in_symbol = np.where(symbol == 0, in_symbol[row], grown[row, symbol])
        in_symbol = np.where(last == bar, np.logaddexp(in_blank, in_symbol), in_symbol)
        in_blank[last == bar] = -np.inf  # "|" twice needs no blank between
    texts = {}
    for prefix, score in zip(prefixes, np.logaddexp(in_blank, in_symbol)):
        words = tuple(filter(None, prefix.split("|")))  # a last word counts with and without its "|"
        texts[words] = np.logaddexp(texts.get(words, -np.inf), score)
    for words in texts if lm else []:
        texts[words] += lm_score(words) + lm_weight * lm.score(["<s>", *words], "</s>")
    return sorted(((" ".join(words), score) for words, score in texts.items()), key=lambda pair: -pair[1])


class ArpaLM:
    """The back-off n-gram model of an ARPA file (or .gz), in the dictionary's letters. Raises UserError."""

    def __init__(self, path, dictionary=LETTERS):
        self.prob, self.backoff = {}, {}  # {n-gram, a tuple of words: log10}
        self.order, line = 0, ""
        spell = functools.cache(lambda w: w if w[0] == "<" else clean(w, dictionary)[0] or w)
        try:
            with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
                for line in map(str.strip, file):
                    if re.fullmatch(r"\\\d+-grams:", line):
                        self.order = int(line[1:-7])
                    elif self.order and line and line != "\\end\\":
                        p, *words = line.replace("<UNK>", "<unk>").split()
                        gram = tuple(map(spell, words[: self.order]))
                        self.prob[gram] = max(float(p), self.prob.get(gram, -100.0))  # some tools write -inf
                        if len(words) > self.order:
                            self.backoff[gram] = max(float(words[self.order]), -100.0)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: not an ARPA file ({error})") from None
        require(self.prob and line == "\\end\\", f"{path}: not an ARPA file, or truncated")
        self.words = {gram[0] for gram in self.prob if len(gram) == 1} - {"<s>", "</s>", "<unk>"}

    def score(self, history, word):
        """log10 P(word | history) in a sentence <s> ... </s>; an unknown word without <unk>: -100."""
        *history, word = (w if (w,) in self.prob else "<unk>" for w in (*history, word)[-self.order :])
        weight = 0.0
        for start in range(len(history) + 1):  # shorter histories until one is listed with the word
            gram = (*history[start:], word)
            if gram in self.prob:
                return weight + self.prob[gram]
            weight += self.backoff.get(gram[:-1], 0.0)
        return -100.0


class Errors(NamedTuple):
    errors: int
    words: int  # of the reference; characters for cer

    @property
    def rate(self):
        return self.errors / max(1, self.words)


def distance(reference, hypothesis):
    """The fewest substitutions, deletions and insertions between two sequences (Levenshtein)."""
    hypothesis = np.array(list(hypothesis), object)
    insertions = np.arange(len(hypothesis) + 1)
    cost = insertions
    for item in reference:
        replaced, cost = cost[:-1] + (hypothesis != item), cost + 1
        cost[1:] = np.minimum(cost[1:], replaced)
        cost = np.minimum.accumulate(cost - insertions) + insertions
    return int(cost[-1])


def wer(pairs, split=str.split):
    """Word errors of (reference, hypothesis) texts, summed; .rate is the word error rate, a fraction."""
    pairs = [(split(reference), split(hypothesis)) for reference, hypothesis in pairs]
    return Errors(sum(distance(*pair) for pair in pairs), sum(len(reference) for reference, _ in pairs))


def cer(pairs):
    """As wer, of characters, the spaces between words included."""
    return wer(pairs, split=lambda text: " ".join(text.split()))

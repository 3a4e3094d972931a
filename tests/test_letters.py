"""data/letters.py against all alignments, a recursive edit distance and n-grams written by hand."""

import functools
import gzip
import itertools
import math
import unicodedata

import numpy as np
import pytest
import torch

from common import UserError
from data import letters
from data.audio import Utterances
from data.letters import LETTERS, UNKNOWN_SCORE, ArpaLM, clean, decode_beam, decode_greedy, encode

RELEASED = ["<pad>", "|", "<unk>", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
GREEK = ["<pad>", *"αβγδεζηθικλμνξοπρστυφχψως", "ά", "|"]


def frames(path, dictionary=LETTERS, p=0.9):
    """Log-probabilities that say one symbol a frame; "_" is the blank."""
    out = np.full((len(path), len(dictionary)), math.log((1 - p) / (len(dictionary) - 1)))
    for t, c in enumerate(path):
        out[t, 0 if c == "_" else dictionary.index(c)] = math.log(p)
    return out


def random_frames(t, c, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (t, c))).log_softmax(-1).numpy()


def test_clean_and_encode():
    assert clean("Γειά σου, ΚΌΣΜΕ", GREEK) == ("γειά σου κοσμε", "")  # the dictionary has ά, but no ό
    for text, expected, unknown in (
        ("It’s a café — déjà-vu!", "IT'S A CAFE DEJA VU", ""),
        ("“Quoted,” she said. 'Yes' ‘no’ 'tis dogs'", "QUOTED SHE SAID YES NO 'TIS DOGS'", ""),
        ("5 % & more", "5 % & MORE", "%&5"),
        ("Łódź Straße ﬁne", "ŁODZ STRASSE FINE", "Ł"),
        ("E\u0301a\u00a0b\u200bc Ｆｕｌｌ", "EA BC FULL", ""),
        ("``co\u00adop'' ½ \ufeffx\ty", "COOP 1⁄2 X Y", "12⁄"),
    ):
        assert clean(text) == clean(expected) == (expected, unknown)
    assert "".join(LETTERS[i] for i in encode("I DON'T")) == "I|DON'T|" and encode("") == []
    assert encode("TEA", RELEASED) == [4, 3, 5, 1] and len(LETTERS) == len(set(LETTERS)) == 29


@pytest.mark.parametrize(
    "text, letters_found, spelled",
    [
        ("It’s a test & more, NAIVE", LETTERS[2:], "IT'S A TEST & MORE NAIVE"),
        ("schöne naïve Straße", "ACEHNRSTVÏÖß", "SCHÖNE NAÏVE STRAßE"),
        ("Ёлка и подъезд", "ЁАДЕЗИКЛОПЪ", "ЁЛКА И ПОДЪЕЗД"),
        ("Σίσυφος", "ΊΟΣΥΦ", "ΣΊΣΥΦΟΣ"),  # one sigma
        ("नमस्ते हिन्दी", "तदनमसहिीे्", "नमस्ते हिन्दी"),  # vowels are marks
        ("안녕, 세계!", "계녕세안", "안녕 세계"),
        ("你好，世界", "世你好界", "你好 世界"),
        ("İki ılık", "IKLİı", "İKI ıLıK"),  # Turkish has two
        ("tiếng Việt", "GINTVẾỆ", "TIẾNG VIỆT"),
        ("ქართული", "ათილრუქ", "ქართული"),  # no capitals
        ("l‘été à 5 h d'or", "'5DHLORTÀÉ", "L'ÉTÉ À 5 H D'OR"),
    ],
)
def test_the_alphabet_of_a_new_head(text, letters_found, spelled):
    for form in ("NFC", "NFD"):
        found = letters.alphabet([unicodedata.normalize(form, text), ""])
        assert found == ["<blank>", "|", *letters_found]
        assert clean(unicodedata.normalize(form, text), found)[0] == spelled


def test_what_a_dictionary_has_stays():
    latin = "abcdefghijklmnopqrstuvwxyz"
    for symbols, text, expected in (
        (latin + "äöüß", "SCHÖNE naïve Straße ÄRGER", "schöne naive straße ärger"),
        (latin.upper() + "ÄÖÜß", "schön naïve Straße", "SCHÖN NAIVE STRAßE"),
        (latin.upper() + "ÄÖÜ", "Straße", "STRASSE"),
        (latin.upper() + "\u0301\u0302", "ế", "E\u0302\u0301"),  # a dictionary of separate accents
        (latin.upper() + "’", "l'eau, l’or ‘où’", "L’EAU L’OR OU"),
        ("пять'ʼ", "пʼять п’ять", "пʼять п'ять"),
        ("σοφςό", "ΣΟΦΟΣ σοφός", "σοφοσ σοφός"),
        ("HhEeLlOo", "Hello", "Hello"),
    ):
        for form in ("NFC", "NFD"):
            assert clean(unicodedata.normalize(form, text), ["<pad>", "|", "<unk>", *symbols]) == (
                expected,
                "",
            )
    assert clean("नमस्ते", ["", "|", *"नमसत"])[1] == "े्"  # a vowel is no accent that can go


def test_a_language_model_is_spelled_as_the_dictionary_has_it(tmp_path):
    path = arpa(tmp_path, TINY.replace("A", "Ä"))
    for dictionary, word in ((LETTERS, "A"), (["", "|", *"äb"], "ä"), (["", "|", *"ÄB"], "Ä")):
        lm = ArpaLM(path, dictionary)
        assert lm.words == {word, "b" if word == "ä" else "B", word + ("b" if word == "ä" else "B")}
        assert lm.score(["<s>"], word) == -0.1 and "<unk>" not in lm.words


def test_what_can_be_transcribed():
    texts = ["Good, too", "", "Room 5", "TOO LONG", "HELLO"]
    s = Utterances(list("abcde"), np.array([5000, 5000, 5000, 9000, 6 * 320]), texts)
    part, skipped = letters.transcribed(s, LETTERS, 8000, lambda samples: samples // 320)
    assert part.names == ["a"] and part.transcripts == ["GOOD TOO"]  # HELLO needs 7 frames
    assert [line[:3] for line in skipped] == ["b: ", "c: ", "d: ", "e: "] and "cannot spell 5" in skipped[1]
    with pytest.raises(UserError, match="b: no transcript.*; add transcripts"):
        letters.transcribed(s.part([1]), LETTERS, 8000)


def test_greedy_collapses_and_times_words():
    paths = ["HHE_LL_LLO", "HELLO", "||H_I||_|YOU||", "____", "|", "A|_|A", "", "HI|_" * 500]
    for path, text in zip(paths, ["HELLO", "HELO", "HI YOU", "", "", "A A", "", "HI " * 499 + "HI"]):
        found, times = decode_greedy(frames(path))
        assert found == text and len(times) == len(text.split())
        assert decode_beam(frames(path, p=0.999))[0][0] == text
    text, times = decode_greedy(frames("_HH_I__|_A|"))
    assert text == "HI A" and np.allclose(times, [(0.02, 0.10), (0.18, 0.20)])


@pytest.mark.parametrize("decode", [decode_greedy, decode_beam])
def test_inputs_of_decoding(decode):
    x = torch.from_numpy(frames("A_B|C")).requires_grad_()
    for y in (x, x.bfloat16(), x.detach().numpy()):
        assert "AB C" in (decode(y)[0], decode(y)[0][0])
    for value in (math.nan, -math.inf):
        x = frames("ABC")
        x[1] = value
        with pytest.raises(ValueError, match="diverged"):
            decode(x)


def all_texts(log_probs, dictionary):
    """{text: its probability}, from each of the C ** T alignments alone."""
    found = {}
    for path in itertools.product(range(len(dictionary)), repeat=len(log_probs)):
        symbols = ("" if i == 0 or len(dictionary[i]) > 1 else dictionary[i] for i in path)
        text = " ".join("".join(k for k, _ in itertools.groupby(symbols)).replace("|", " ").split())
        found[text] = found.get(text, 0.0) + math.exp(sum(log_probs[t][i] for t, i in enumerate(path)))
    return {text: p for text, p in found.items() if p > 0}


def assert_scores(found, expected):
    assert len(found) == len(expected) and found == sorted(found, key=lambda pair: -pair[1])
    assert dict(found) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dictionary", [["_", "|", "A", "B"], ["_", "A", "<pad>", "|"]])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 4, 5])
def test_beam_is_exact_if_nothing_is_dropped(dictionary, t):
    for seed in range(2):
        x = random_frames(t, 4, seed)
        x[: t // 2, seed + 1] = -np.inf  # symbols of probability 0
        expected = {text: math.log(p) for text, p in all_texts(x, dictionary).items()}
        assert_scores(decode_beam(x, dictionary, beam=10**6, prune=math.inf), expected)
        for beam in (1, 3):
            found = decode_beam(x, dictionary, beam)
            assert 1 <= len(found) <= beam
            assert all(score <= expected[text] + 1e-9 for text, score in found)


@pytest.mark.parametrize("t", [0, 1, 3, 5])
def test_beam_with_a_language_model_is_exact(tmp_path, t):
    lm, dictionary, expected = ArpaLM(arpa(tmp_path)), ["_", "|", "A", "B"], {}
    x = random_frames(t, 4, t)
    for text, p in all_texts(x, dictionary).items():
        expected[text], history = math.log(p), ["<s>"]
        for word in text.split():
            expected[text] += 1.7 * lm.score(history, word) - 0.6 + (0 if word in lm.words else UNKNOWN_SCORE)
            history.append(word)
        expected[text] += 1.7 * lm.score(history, "</s>")
    assert_scores(decode_beam(x, dictionary, 10**6, lm, 1.7, -0.6, prune=math.inf), expected)


TINY = """\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-1.0\t<UNK>
-inf\t<s>\t-0.3
-0.9\t</s>
-0.5\tA\t-0.2
-0.7 B -0.1
-0.8\tAB

\\2-grams:
-0.1\t<s> A\t-0.4
-0.3\tA B\t-0.25
-0.6\tB </s>
-0.2\tA A

\\3-grams:
-0.05\t<s> A B

\\end\\
"""


def arpa(tmp_path, text=TINY, name="lm.arpa"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_scores_of_an_arpa_file_written_by_hand(tmp_path, name):
    lm = ArpaLM(arpa(tmp_path, TINY.replace("\n", "\r\n"), name))
    assert lm.order == 3 and lm.words == {"A", "B", "AB"}
    for history, word, expected in (
        ("<s> A", "B", -0.05),
        ("<s>", "A", -0.1),
        ("<s> A", "A", -0.4 - 0.2),  # backs off once
        ("<s> A", "AB", -0.4 - 0.2 - 0.8),  # twice
        ("A B", "A", -0.25 - 0.1 - 0.5),
        ("A B", "</s>", -0.25 - 0.6),
        ("B A", "B", -0.3),  # the history B A is not listed: weight 1
        ("A QUX", "B", -0.7),  # unknown words back off at no cost
        ("<s>", "QUX", -0.3 - 1.0),
        ("", "<s>", -100),
    ):
        assert lm.score(history.split(), word) == pytest.approx(expected), (history, word)
    assert ArpaLM(arpa(tmp_path, TINY.replace("-1.0\t<UNK>\n", ""))).score(["<s>"], "QUX") == -100


def test_damaged_arpa_files_are_one_line(tmp_path):
    for i, text in enumerate((TINY[:-7], TINY.replace("-0.5", "x"), "", "\\end\\")):
        (tmp_path / f"{i}.arpa").write_text(text)
    (tmp_path / "b.gz").write_bytes(gzip.compress(TINY.encode())[:60])
    for path in (*tmp_path.iterdir(), tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=f"^{path}: not an ARPA file.*$"):
            ArpaLM(path)


@functools.cache
def distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


def test_errors_against_recursion():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (tuple(rng.integers(0, 3, rng.integers(0, 9)).tolist()) for _ in range(2))
        assert letters.distance(a, b) == distance(a, b)
    found = letters.wer([("A B C D", "A X C D"), ("A", "B C D"), ("", "X")])
    assert found == (5, 5) and found.rate == 1.0
    assert letters.wer([("A", "B C D")]).rate == 3 and letters.wer([("", "")]).rate == 0
    assert letters.cer([("AB  C", "AB C"), ("AB C", "ABC")]) == (1, 8)

"""data/letters.py against enumeration of every alignment, a recursive edit distance and n-grams worked out by hand."""

import functools
import gzip
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import BadInput, run
from data.letters import LETTERS, ArpaLM, cer, clean, decode_beam, decode_greedy, encode, errors, kneser_ney, main, wer

ROOT = Path(__file__).parent.parent
RELEASED = ["<s>", "<pad>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


def spell(indices, dictionary=LETTERS):
    return "".join(dictionary[i] for i in indices)


def frames(path, dictionary=LETTERS, p=0.9):
    """Log-probabilities that say one symbol a frame; "_" is the blank."""
    out = np.full((len(path), len(dictionary)), math.log((1 - p) / (len(dictionary) - 1)))
    for t, c in enumerate(path):
        out[t, 0 if c == "_" else dictionary.index(c)] = math.log(p)
    return out


def random_frames(t, c, seed, sharpness=1.0):
    noise = torch.randn(t, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.mul(sharpness).log_softmax(-1).numpy()


# ---- text <-> letters ----------------------------------------------------------------------------------------------


def test_every_word_ends_with_the_boundary():
    assert spell(encode("hello world")) == "HELLO|WORLD|"
    assert spell(encode("  I  don't\n")) == "I|DON'T|"
    assert encode("") == encode("   ") == []
    assert len(LETTERS) == len(set(LETTERS)) == 29


def test_the_released_order_is_respected():
    assert encode("tea", RELEASED) == [6, 5, 7, 4]
    assert decode_greedy(frames("TT_EA|", RELEASED), RELEASED)[0] == "TEA"


def test_a_blank_elsewhere_is_never_a_letter():
    dictionary = ["|", "A", "B", "_"]
    assert encode("ab", dictionary, blank=3) == [1, 2, 0]
    with pytest.raises(BadInput):
        encode("a_b", dictionary, blank=3)
    path = np.log(np.eye(4)[[1, 3, 1, 0, 2]] + 1e-9)
    assert decode_greedy(path, dictionary, blank=3)[0] == decode_beam(path, dictionary, blank=3)[0][0] == "AA B"


@pytest.mark.parametrize("text, named", [("route 66", "6"), ("café", "É"), ("a|b", "|"), ("a_b <s>", "< > _"), ("ab-cd", "-")])
def test_unknown_characters_are_named(text, named):
    with pytest.raises(BadInput, match="has no " + named.replace("|", r"\|")):
        encode(text)


def test_a_dictionary_without_a_boundary_is_refused():
    for dictionary in (["_", "A"], ["|", "A"]):
        with pytest.raises(BadInput, match="boundary"):
            encode("a", dictionary)


@pytest.mark.parametrize(
    "text, said, unknown",
    [
        ("It’s a café — déjà-vu!", "IT'S A CAFE DEJA VU", ""),
        ("“Quoted,” she said. 'Yes' ‘no’ 'tis dogs'", "QUOTED SHE SAID YES NO 'TIS DOGS'", ""),
        ("5 % & more", "5 % & MORE", "%&5"),
        ("Łódź Straße ﬁne", "ŁODZ STRASSE FINE", "Ł"),
        ("' '' - \t\n", "", ""),
        ("a|b", "A|B", "|"),
        ("E\u0301a\u00a0b\u200bc", "EA BC", ""),
        ("Ｆｕｌｌ", "FULL", ""),
        ("``co\u00adop'' ½ \ufeffx\ty", "COOP 1⁄2 X Y", "12⁄"),
        ("", "", ""),
    ],
)
def test_clean(text, said, unknown):
    assert clean(text) == (said, unknown)
    assert clean(said) == (said, unknown)
    if not unknown:
        assert decode_greedy(frames(spell(encode(said)).replace("LL", "L_L").replace("SS", "S_S")))[0] == said


# ---- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, text",
    [
        ("HHE_LL_LLO", "HELLO"),
        ("HELLO", "HELO"),  # no blank between, so one L
        ("||H_I||_|YOU||", "HI YOU"),
        ("____", ""),
        ("|", ""),
        ("A|_|A", "A A"),
        ("I_|_'", "I '"),
        ("", ""),
    ],
)
def test_greedy_collapses(path, text):
    said, times = decode_greedy(frames(path))
    assert said == text and len(times) == len(text.split())
    assert decode_beam(frames(path, p=0.999))[0][0] == text


def test_times_of_words():
    text, times = decode_greedy(frames("_HH_I__|_A|"))
    assert text == "HI A"
    np.testing.assert_allclose(times, [(0.02, 0.10), (0.18, 0.20)])
    assert decode_greedy(frames("A"), frame_s=0.04)[1] == [(0.0, 0.04)]


def test_tensors_and_arrays_of_any_float():
    x = torch.from_numpy(frames("A_B|C")).requires_grad_()
    for y in (x, x.bfloat16(), x.half(), x.detach().numpy().astype("float32")):
        assert decode_greedy(y)[0] == decode_beam(y)[0][0] == "AB C"
    before = x.detach().clone()
    decode_beam(before, RELEASED[1:5] + LETTERS[4:])
    assert torch.equal(before, x)  # the input is left alone


@pytest.mark.parametrize("decode", [decode_greedy, decode_beam])
def test_what_is_not_a_distribution_is_refused(decode):
    for value in (math.nan, math.inf):
        x = frames("ABC")
        x[1, 5] = value
        with pytest.raises(ValueError, match="frame 1: NaN"):
            decode(x)
    x = frames("ABC")
    x[2] = -math.inf
    with pytest.raises(ValueError, match="frame 2"):
        decode(x)
    for shape in ((3, 28), (29,), (1, 3, 29)):
        with pytest.raises(ValueError, match="shape"):
            decode(np.zeros(shape))


# ---- beam search against enumeration ------------------------------------------------------------------------------------


def all_texts(log_probs, dictionary, blank=0):
    """{text: its probability}, from each of the C ** T alignments alone."""
    said = {}
    for path in itertools.product(range(len(dictionary)), repeat=len(log_probs)):
        letters = [k for k, _ in itertools.groupby("" if i == blank or len(dictionary[i]) > 1 else dictionary[i] for i in path)]
        text = " ".join("".join(letters).replace("|", " ").split())
        said[text] = said.get(text, 0.0) + math.exp(sum(log_probs[t][i] for t, i in enumerate(path)))
    return {text: p for text, p in said.items() if p > 0}


def assert_same(found, wanted):
    """found: decode_beam's pairs; wanted: {text: score}."""
    assert len(found) == len(dict(found)) == len(wanted)
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    for text, score in found:
        assert score == pytest.approx(wanted[text], abs=1e-9), text


SMALL = [(["_", "|", "A", "B"], 0), (["A", "|", "_"], 2), (["_", "|", "A", "<pad>"], 0)]


@pytest.mark.parametrize("dictionary, blank", SMALL)
@pytest.mark.parametrize("t", [0, 1, 2, 3, 4, 5])
def test_beam_is_exact_when_nothing_is_dropped(dictionary, blank, t):
    for seed in range(2):
        x = random_frames(t, len(dictionary), seed)
        wanted = {text: math.log(p) for text, p in all_texts(x, dictionary, blank).items()}
        assert_same(decode_beam(x, dictionary, beam=10**6, prune=math.inf, blank=blank), wanted)


def test_beam_with_symbols_of_probability_zero():
    dictionary = ["_", "|", "A", "B"]
    x = random_frames(5, 4, 3).copy()
    x[0, 0] = x[1, 2] = x[2, 1] = x[3, 0] = x[3, 2] = -np.inf
    wanted = {text: math.log(p) for text, p in all_texts(x, dictionary).items()}
    assert_same(decode_beam(x, dictionary, beam=10**6, prune=math.inf), wanted)


def test_a_sum_of_alignments_beats_the_best_one():
    x = np.log([[0.6, 0.0001, 0.3999], [0.6, 0.0001, 0.3999]])  # blank blank .36; A in any of three ways .64
    assert decode_greedy(x, ["_", "|", "A"])[0] == ""
    assert decode_beam(x, ["_", "|", "A"])[0][0] == "A"


TINY = """made by hand

\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.3
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


def naive_score(lm, words, weight, word_score, unk_score):
    score, history = 0.0, ("<s>",)
    for word in words:
        score += weight * lm.score(history, word) + word_score + (0 if word in lm.words else unk_score)
        history += (word,)
    return score + weight * lm.score(history, "</s>")


@pytest.mark.parametrize("lexicon", [False, True])
@pytest.mark.parametrize("t", [0, 1, 3, 5])
def test_beam_with_a_language_model_is_exact(tmp_path, t, lexicon):
    lm, dictionary = ArpaLM.read(arpa(tmp_path)), ["_", "|", "A", "B"]
    options = {"lm_weight": 1.7, "word_score": -0.6, "unk_score": -2.5}
    for seed in range(2):
        x, wanted = random_frames(t, 4, seed), {}
        for text, p in all_texts(x, dictionary).items():
            if not lexicon or set(text.split()) <= lm.words:
                wanted[text] = math.log(p) + naive_score(lm, text.split(), 1.7, -0.6, -2.5)
        found = decode_beam(x, dictionary, 10**6, lm, lexicon=lexicon, prune=math.inf, **options)
        assert_same(found, wanted)


def test_a_narrow_beam_reports_no_more_than_the_truth(tmp_path):
    x, dictionary = random_frames(5, 4, 7), ["_", "|", "A", "B"]
    truth = all_texts(x, dictionary)
    for beam in (1, 2, 3, 8):
        found = decode_beam(x, dictionary, beam)
        assert 1 <= len(found) <= beam
        assert all(score <= math.log(truth[text]) + 1e-9 for text, score in found)


def test_pruning_of_unlikely_symbols_hardly_changes_anything():
    for seed in range(3):
        x = random_frames(40, 29, seed, 5)
        (text, score), (full_text, full_score) = decode_beam(x)[0], decode_beam(x, prune=math.inf)[0]
        assert text == full_text and full_score - 0.01 < score <= full_score + 1e-9


def test_the_language_model_decides_between_words_that_sound_alike():
    lm = kneser_ney([s.split() for s in ("I SEE THE SEA", "THE SEA IS BLUE", "I SEE YOU")], 3)
    x = frames("I|SE_E|THE|SE_E|", p=0.9)
    x[14, LETTERS.index("A")] = x[14, LETTERS.index("E")] - 0.5  # E is heard a little better than A
    assert decode_greedy(x)[0] == decode_beam(x)[0][0] == "I SEE THE SEE"
    assert decode_beam(x, lm=lm)[0][0] == "I SEE THE SEA"
    assert decode_beam(frames("I|SE_E|THE|SEX|", p=0.8), lm=lm, lexicon=True)[0][0].split()[-1] in lm.words


def test_lexicon_corners():
    lm = kneser_ney([["AB"], ["I'M"]], 2)
    assert decode_beam(frames("I'M", p=0.99), lm=lm, lexicon=True)[0][0] == "I'M"
    hard = np.full((2, 29), -np.inf)
    hard[[0, 1], [LETTERS.index("A"), LETTERS.index("A")]] = 0
    assert [text for text, _ in decode_beam(hard, lm=lm, lexicon=True)] == ["A"]  # cut in the middle of a word
    hard[1] = np.roll(hard[1], 2)
    assert decode_beam(hard, lm=lm, lexicon=True) == [("", -math.inf)]  # nothing can be said
    assert decode_beam(np.zeros((0, 29)), lm=lm, lexicon=True)[0][0] == ""
    with pytest.raises(ValueError, match="lexicon needs"):
        decode_beam(hard, lexicon=True)
    with pytest.raises(ValueError, match="beam"):
        decode_beam(hard, beam=0)
    with pytest.raises(BadInput, match="upper case"):
        decode_beam(hard, lm=kneser_ney([["ab"]], 2))


def test_open_vocabulary_writes_unknown_words_at_a_price():
    lm = kneser_ney([["THE", "CAT"], ["A", "CAT"]], 2)
    x = frames("THE|CAB|", p=0.9)
    assert decode_beam(x, lm=lm, unk_score=0)[0][0] == "THE CAB"
    assert decode_beam(x, lm=lm, unk_score=-1e4)[0][0] == "THE CAT"
    assert decode_beam(x, lm=lm, lexicon=True)[0][0] == "THE CAT"


def test_speed_of_beam_search():
    lm = kneser_ney([["SO", "IT", "IS"], ["IT", "IS", "SO"]], 3)
    for x in (random_frames(250, 29, 0, 0.1), random_frames(250, 29, 0, 6)):  # flat and peaked
        start = time.process_time()
        decode_beam(x, lm=lm)
        assert time.process_time() - start < 2


# ---- language model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz", "zipped-without-saying"])
def test_scores_of_an_arpa_file_made_by_hand(tmp_path, name):
    path = arpa(tmp_path, name=name)
    if name == "zipped-without-saying":
        Path(path).write_bytes(gzip.compress(TINY.replace("\n", "\r\n").encode()))
    lm = ArpaLM.read(path)
    assert lm.order == 3 and lm.words == {"A", "B", "AB"}
    for history, word, wanted in [
        (("<s>", "A"), "B", -0.05),  # a trigram
        (("<s>",), "A", -0.1),  # a bigram
        ((), "A", -0.5),
        (("<s>", "A"), "A", -0.4 - 0.2),  # backs off once
        (("<s>", "A"), "AB", -0.4 - 0.2 - 0.8),  # twice
        (("A", "B"), "A", -0.25 - 0.1 - 0.5),
        (("A", "B"), "</s>", -0.25 - 0.6),
        (("B", "A"), "B", -0.3),  # the history B A is not listed: weight 1
        (("B", "AB"), "A", -0.5),
        (("A", "QUX"), "B", -0.7),  # unknown words back off at no cost
        (("<s>",), "QUX", -0.3 - 1.0),
        (("X", "Y", "Z", "<s>", "A"), "B", -0.05),  # only two words of history count
    ]:
        assert lm.score(history, word) == pytest.approx(wanted), (history, word)


def test_without_unk_unknown_words_cost_100(tmp_path):
    text = TINY.replace("-1.0\t<unk>\n", "").replace("1=6", "1=5")
    assert ArpaLM.read(arpa(tmp_path, text)).score(("<s>",), "QUX") == -100


def test_the_unknown_word_may_be_in_upper_case(tmp_path):
    lm = ArpaLM.read(arpa(tmp_path, TINY.replace("<unk>", "<UNK>")))
    assert lm.score(("<s>",), "QUX") == ArpaLM.read(arpa(tmp_path, TINY)).score(("<s>",), "QUX") > -100 and "<UNK>" not in lm.words


def test_infinite_weights_are_capped(tmp_path):
    lm = ArpaLM.read(arpa(tmp_path, TINY.replace("-99\t<s>\t-0.3", "-inf\t<s>\t-inf")))
    assert lm.score((), "<s>") == -100 and lm.score(("<s>",), "B") == -100.7
    assert decode_beam(frames("B"), lm=lm, lm_weight=0.0)[0][0] == "B"


@pytest.mark.parametrize(
    "old, new, line, said",
    [
        ("-0.5\tA\t-0.2", "x\tA\t-0.2", 12, "float"),
        ("-0.5\tA\t-0.2", "-0.5\tA\tB\tC", 12, "1 words"),
        ("-0.5\tA\t-0.2", "nan\tA\t-0.2", 12, "at most 0"),
        ("-0.5\tA\t-0.2", "-0.5\tA\tnan", 12, "finite"),
        ("-0.5\tA\t-0.2", "0.5\tA\t-0.2", 12, "at most 0"),
        ("-0.5\tA\t-0.2", "-0.5\tB", 13, "twice"),
        ("-0.3\tA B\t-0.25\n", "", 24, "promises 4 2-grams, the file holds 3"),
        ("\\end\\\n", "", 24, "ends before"),
        ("\\data\\\n", "", 24, "not an ARPA file"),
        ("\\3-grams:", "\\4-grams:", 22, "header"),
        ("ngram 2=4\n", "", 15, "header"),
        ("\n\\1-grams:", "", 8, "wanted"),
        (TINY, "", 0, "not an ARPA file"),
    ],
)
def test_a_damaged_arpa_file_is_named_with_its_line(tmp_path, old, new, line, said):
    assert old in TINY
    with pytest.raises(BadInput) as caught:
        ArpaLM.read(arpa(tmp_path, TINY.replace(old, new)))
    message = str(caught.value)
    assert f"lm.arpa: line {line}: " in message and said in message and "\n" not in message


def test_damaged_bytes_and_missing_files_are_named(tmp_path):
    path = Path(arpa(tmp_path, TINY * 50, "a.gz"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadInput, match=r"a\.gz: cannot be read after line 0 .EOFError"):
        ArpaLM.read(str(path))
    path.write_bytes(TINY.replace("AB", "Ä").encode("latin1"))
    with pytest.raises(BadInput, match="UTF-8"):
        ArpaLM.read(str(path))
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadInput, match="cannot be read"):
            ArpaLM.read(str(missing))


CORPUS = "THE CAT SAT|THE DOG SAT|A CAT AND A DOG SAT|THE CAT SAT ON THE DOG|I|THE CAT RAN|A DOG RAN ON AND ON|SAT"


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_history(tmp_path, order):
    kneser_ney([s.split() for s in CORPUS.split("|")], order).write(str(tmp_path / "lm.arpa.gz"))
    lm = ArpaLM.read(str(tmp_path / "lm.arpa.gz"))
    everything = sorted(lm.words) + ["</s>", "<unk>"]
    histories = [h for n in range(3) for h in itertools.product(everything + ["<s>"], repeat=n)]
    histories += [gram for gram in lm.prob if len(gram) == 3]
    for history in histories:
        assert sum(10 ** lm.score(history, word) for word in everything) == pytest.approx(1, abs=1e-5), history


def test_kneser_ney_against_the_formula():
    """Two sentences, A B and A C, as bigrams, worked out on paper.

    Bigrams: <s> A 2, A B 1, A C 1, B </s> 1, C </s> 1; n1 = 4, n2 = 1, D = 4 / 6.
    Left neighbours: A 1 (<s>), B 1, C 1, </s> 2; n1 = 3, n2 = 1, D = 3 / 5; sum 5, kinds 4, V = 5 with <unk>.
    """
    lm = kneser_ney([["A", "B"], ["A", "C"]], 2)
    rest = 0.6 * 4 / 5 / 5
    single = {"A": 0.4 / 5 + rest, "B": 0.4 / 5 + rest, "C": 0.4 / 5 + rest, "</s>": 1.4 / 5 + rest, "<unk>": rest}
    for word, p in single.items():
        assert 10 ** lm.score((), word) == pytest.approx(p)
    d = 2 / 3
    assert 10 ** lm.score(("<s>",), "A") == pytest.approx((2 - d) / 2 + d / 2 * single["A"])
    assert 10 ** lm.score(("A",), "B") == pytest.approx((1 - d) / 2 + d * 2 / 2 * single["B"])
    assert 10 ** lm.score(("A",), "A") == pytest.approx(d * 2 / 2 * single["A"])
    assert 10 ** lm.score(("B",), "C") == pytest.approx(d * single["C"])
    assert 10 ** lm.score(("C",), "ELSE") == pytest.approx(d * single["<unk>"])


def test_writing_and_reading_keep_every_number(tmp_path):
    lm = kneser_ney([s.split() for s in CORPUS.split("|")], 3)
    lm.write(str(tmp_path / "lm.arpa"))
    again = ArpaLM.read(str(tmp_path / "lm.arpa"))
    assert again.prob == pytest.approx(lm.prob, abs=1e-6)
    assert again.backoff == pytest.approx({gram: w for gram, w in lm.backoff.items() if w}, abs=1e-6)
    assert os.listdir(tmp_path) == ["lm.arpa"]


def test_an_order_longer_than_the_text(tmp_path):
    kneser_ney([["I"]], 5).write(str(tmp_path / "lm.arpa"))
    assert ArpaLM.read(str(tmp_path / "lm.arpa")).order == 5


def test_markers_in_the_text_are_refused():
    for sentences in ([["A", "<s>"]], []):
        with pytest.raises(BadInput):
            kneser_ney(sentences, 2)


# ---- command line ----------------------------------------------------------------------------------------------------------


def tool(monkeypatch, capsys, *arguments):
    """Runs the tool in this process (torch takes seconds to import anew) -> exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["letters.py", *map(str, arguments)])
    try:
        status = run(main) or 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_arpa_tool(tmp_path):
    (tmp_path / "a.txt").write_text("id-1 It’s a café.\n\nid-2 Room 5\n")
    with gzip.open(tmp_path / "b.gz", "wt") as file:
        file.write("id-3 A ROOM\n")
    files, out = [str(tmp_path / name) for name in ("a.txt", "b.gz")], str(tmp_path / "lm.arpa")
    command = [sys.executable, "-m", "data.letters", "arpa", "--input", *files, "--skip", "1", "--order", "2", "--out", out]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "5 words; 1 of them" in said
    assert ArpaLM.read(out).words == {"IT'S", "A", "CAFE", "ROOM", "5"}


@pytest.mark.parametrize(
    "name, out, option, said",
    [
        ("none.txt", "lm", [], "none.txt: cannot be read"),
        ("bad.txt", "lm", [], "bad.txt: cannot be read after line 0"),
        ("empty.txt", "lm", [], "no sentence"),
        ("empty.txt", "no/lm", [], "folder that exists"),
        ("empty.txt", "lm", ["--order", "0"], "--order"),
    ],
)
def test_the_arpa_tool_says_what_is_wrong_in_a_line(tmp_path, monkeypatch, capsys, name, out, option, said):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n...\n")
    found = tool(monkeypatch, capsys, "arpa", "--input", tmp_path / name, "--out", tmp_path / out, *option)
    assert found[0] == 2 and said in found[2] and len(found[2].splitlines()) == 1, found


def test_help_names_the_options(monkeypatch, capsys):
    status, said, _ = tool(monkeypatch, capsys, "arpa", "--help")
    assert status == 0 and "--order" in said and "one sentence a line" in said


# ---- error rates -------------------------------------------------------------------------------------------------------------


def naive_distance(a, b):
    @functools.cache
    def distance(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        if a[i] == b[j]:
            return distance(i + 1, j + 1)
        return 1 + min(distance(i + 1, j), distance(i, j + 1), distance(i + 1, j + 1))

    return distance(0, 0)


def test_errors_against_recursion():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.integers(0, 3, rng.integers(0, 9)).tolist() for _ in range(2))
        e = errors(a, b)
        assert e.substitutions + e.deletions + e.insertions == naive_distance(a, b)
        assert e.insertions - e.deletions == len(b) - len(a) and e.words == len(a) and min(e) >= 0


@pytest.mark.parametrize(
    "reference, hypothesis, wanted",
    [
        ("THE CAT SAT", "THE CAT SAT", (0, 0, 0, 3)),
        ("THE CAT SAT", "THE BAT SAT", (1, 0, 0, 3)),
        ("THE CAT SAT", "CAT SAT", (0, 1, 0, 3)),
        ("THE CAT SAT", "THE CAT SAT UP", (0, 0, 1, 3)),
        ("A", "B C D", (1, 0, 2, 1)),
        ("", "A B", (0, 0, 2, 0)),
        ("A B", "", (0, 2, 0, 2)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_kinds_of_errors(reference, hypothesis, wanted):
    assert errors(reference.split(), hypothesis.split()) == wanted


def test_rates_add_up_over_pairs():
    found = wer([("A B C D", "A X C D"), ("A", "B C D"), ("", "X")])
    assert found == (2, 0, 3, 5) and found.rate == 1.0
    assert wer([("A", "B C D")]).rate == 3
    assert cer([("AB  C", "AB C"), ("AB C", "ABC")]) == (0, 1, 0, 8)
    assert wer(iter([])).rate == 0 and wer([("", "")]).rate == 0 and wer([("", "A")]).rate == math.inf
    assert all(type(x) is int for x in found) and type(found.rate) is float


def test_speed_of_error_rates():
    rng = np.random.default_rng(0)
    pairs = [tuple(" ".join(map(str, rng.integers(0, 50, 20))) for _ in range(2)) for _ in range(500)]
    start = time.process_time()
    wer(pairs)
    assert time.process_time() - start < 0.5 * 2

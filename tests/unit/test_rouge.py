"""Rouge-L equals the papers' to the last digit: the package ``rouge`` 1.0.1 gave the figures here."""

from __future__ import annotations

import sys

import pytest

from fedferret.core.errors import UserError
from fedferret.evaluation import rouge
from fedferret.evaluation.rouge import rouge_l, rouge_l_google

RECORDED: list[tuple[str, str, float]] = [
    ("the cat sat on the mat", "the cat sat down on the mat", 0.9090909041322315),
    ("the cat sat. It slept.", "It slept. the cat sat.", 0.999999995),
    ("", "anything", 0.0),
    ("...", "anything", 0.0),
    ("anything", "...", 0.0),
    ("yes", "no", 0.0),
    ("a b c d", "d c b a", 0.24999999500000009),
    ("one two three two one", "one two one two", 0.7999999952000001),
    ("I like tea. I like coffee. \n", "I like coffee and tea.  ", 0.9090909041322315),
    ("The answer is 3.14 metres.", "The answer is 3.15 metres, I think.", 0.5714285665306124),
    ("lol that is so true! what do you do for fun?", "haha yeah. what do you like to do for fun?", 0.5263157844875347),
    ("a b. c d. a c", "a c. b d. d a. ", 0.8888888839506174),
    ("x. . y", "x.y. ", 0.999999995),
    ("c a c", "c c a", 0.999999995),  # of several longest subsequences, the one that the package finds
]


@pytest.mark.parametrize(("answer", "reference", "expected"), RECORDED)
def test_the_papers_figure(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == expected


def test_a_word_counts_once_however_often_it_occurs() -> None:
    assert rouge_l("no no no no", "no") == rouge_l("no", "no") == pytest.approx(1)
    assert rouge_l_google("no no no no", "no") == pytest.approx(0.4)


def test_case_and_punctuation_count_in_the_papers_figure_alone() -> None:
    assert rouge_l("Yes, Paris!", "yes paris") == 0.0
    assert rouge_l_google("Yes, Paris!", "yes paris") == 1.0


def test_a_thousand_words_are_scored() -> None:
    text = " ".join(f"w{number}" for number in range(1000))
    assert rouge_l(text, text) == pytest.approx(1)


def test_rouge_l_google_without_its_package_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rouge._google.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r'metric "rouge-l-google" needs a package: pip install "fedferret\[rouge\]"'):
        rouge_l_google("a", "a")
    rouge._google.cache_clear()

"""Rouge-L as the Ferret and FedKSeed papers compute it, and as most of the field does.

Both papers' code calls the package ``rouge`` 1.0.1: ``get_scores(answer, reference)[0]["rouge-l"]["f"]``. This is

    sentences: pieces between full stops     words: between spaces, with case and punctuation
    U = the set of words in any longest common subsequence of a sentence of the reference and one of the answer
    P = |U| / distinct words of the answer     R = |U| / distinct words of the reference     F = 2 P R / (P + R + 1e-8)

and 0 where either text has no sentence. It is implemented again here for two reasons. The package has had no release
since 2021 and fails on texts of a thousand words, as it recurses once per word. The package ``rouge-score``, which is
maintained, counts a word as often as it occurs and so cannot give these figures. ``rouge_l_google`` is rougeL of
``rouge-score``: one subsequence of both texts, lower case, alphanumeric characters only. See docs/evaluation.md for how
far the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from fedferret.core.errors import UserError


def rouge_l(answer: str, reference: str) -> float:
    """The papers' F measure, from 0 to 1.

    Args:
        answer: the generated text.
        reference: the example's response.

    Returns:
        The F measure; 0.0 where either text has no word.

    >>> rouge_l("the cat sat", "the cat sat down")
    0.8571428522448981
    """
    ours, theirs = _sentences(answer), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common = {word for sentence in theirs for other in ours for word in _common(sentence, other)}
    precision = len(common) / len({word for sentence in ours for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_google(answer: str, reference: str) -> float:
    """The F measure of rougeL in the package ``rouge-score``, without stemming, from 0 to 1.

    Args:
        answer: the generated text.
        reference: the example's response.

    Returns:
        What the package's scorer gives.

    Raises:
        UserError: if the package is not installed.
    """
    return float(_google().score(reference, answer)["rougeL"].fmeasure)


@cache
def _google() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise UserError('metric "rouge-l-google" needs a package: pip install "fedferret[rouge]"') from None
    return RougeScorer(["rougeL"])


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence. White space between two full stops is a sentence of one empty word, as in the package."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """One longest common subsequence; of several, the one that the package finds."""
    lengths = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, word in enumerate(left, start=1):
        for j, other in enumerate(right, start=1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if word == other else max(lengths[i - 1][j], lengths[i][j - 1])
    found, i, j = [], len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found

"""Exact match: the same final number if the reference has one after "####", else the same text.

The number is read as GSM8K's code reads it (grade_school_math/dataset.py): the first match of "#### -1,234.5", commas
removed. An answer without a number is then wrong. Texts are the same if they differ in white space alone.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


def exact_match(answer: str, reference: str) -> float:
    """Whether an answer matches its reference, as 1.0 or 0.0.

    Args:
        answer: the generated text.
        reference: the example's response.

    Returns:
        1.0 where the numbers after "####" are equal or, without one in the reference, all words; otherwise 0.0.

    >>> exact_match("3 + 4 is 7. #### 1,007", "<<1000+7=1007>> #### 1007"), exact_match("Paris.", "Paris")
    (1.0, 0.0)
    """
    wanted = final_number(reference)
    if wanted is not None:
        return float(final_number(answer) == wanted)
    return float(answer.split() == reference.split())


def final_number(text: str) -> str | None:
    """The number after "####".

    Args:
        text: an answer or a reference.

    Returns:
        The number as written, without commas; None if there is none.
    """
    found = _NUMBER.search(text)
    return found[1].replace(",", "") if found else None

"""The metrics of generated answers, by their names in a recipe's ``[evaluation] metrics``.

A scorer maps an example and the model's answer to a figure from 0 to 1; the figure of a held-out set is their mean.
"choice" is not a scorer, as it needs no generated answer: see ``choice.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedferret.core.errors import UserError
from fedferret.data import reasoning
from fedferret.data.examples import Example
from fedferret.evaluation.choice import choices_of
from fedferret.evaluation.exact import exact_match
from fedferret.evaluation.rouge import rouge_l, rouge_l_google

Scorer = Callable[[Example, str], float]

SCORERS: Mapping[str, Scorer] = {
    "rouge-l": lambda example, answer: rouge_l(answer, example.response),
    "rouge-l-google": lambda example, answer: rouge_l_google(answer, example.response),
    "exact-match": lambda example, answer: exact_match(answer, example.response),
    "task-score": lambda example, answer: reasoning.score(example, answer),
}


def applies(metric: str, example: Example) -> bool:
    """Whether an example has what a metric needs.

    Args:
        metric: a name in ``[evaluation] metrics``.
        example: of a held-out set.

    Returns:
        False for "choice" without choices, for "task-score" without a task and an entry, and for all but "loss" where
        the example is a text alone or its response calls tools.
    """
    response = example.turns[-1]
    if metric == "loss":
        return True
    if len(example.turns) == 1 or response.tool_calls:
        return False  # a text alone asks nothing, and a call of a tool is no text
    if metric == "task-score":
        return {"task", "entry"} <= example.metadata.keys()
    return metric != "choice" or bool(choices_of(example))


def check_metrics(metrics: Iterable[str], held_out: Mapping[str, Sequence[Example]]) -> None:
    """Check that every metric can be measured.

    Args:
        metrics: names in ``[evaluation] metrics``.
        held_out: the examples of each held-out set.
    Raises:
        UserError: if no held-out example has what a metric needs, or a package is not installed.
    """
    needs = {"task-score": 'source = "reasoning-gym"', "choice": "examples with choices"}
    for metric in metrics:
        if not any(applies(metric, example) for examples in held_out.values() for example in examples):
            needed = needs.get(metric, "examples with a prompt and a text to write")
            raise UserError(f'metric "{metric}" needs {needed}: no held-out example has what it scores')
    if "rouge-l-google" in metrics:
        rouge_l_google("", "")

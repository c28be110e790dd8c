"""Exact match, choices by likelihood and tasks' scorers, each against figures computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, Turn
from fedferret.data.files import Files
from fedferret.data.reasoning import ReasoningGym
from fedferret.data.templates import template
from fedferret.evaluation.choice import choice_scores
from fedferret.evaluation.exact import exact_match
from fedferret.evaluation.scorers import SCORERS, applies, check_metrics
from fedferret.objectives.next_token import NextToken


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so 3 + 4 = 7\n#### 7", "<<3+4=7>>7\n#### 7", True),
        ("#### 1,200", "#### 1200", True),
        ("#### -3", "#### 3", False),
        ("The answer is 7.", "#### 7", False),
        ("#### 7 #### 8", "#### 7", True),  # the first number counts, as in GSM8K's code
        ("#### seven", "#### 7", False),
        (" red  door\n", "red door", True),
        ("Red door", "red door", False),
        ("red door.", "red door", False),
        ("", "", True),
    ],
)
def test_exact_match_is_gsm8ks_or_the_same_text(answer: str, reference: str, right: bool) -> None:
    assert exact_match(answer, reference) == float(right)


def question(number: int, choices: tuple[str, ...], right: int) -> Example:
    """A question with choices; ``right`` is the index of the response."""
    turns = (Turn("user", f"Question {number}? " * (number + 1)), Turn("assistant", choices[right]))
    return Example(turns, {"choices": choices})


QUESTIONS = [
    question(0, ("blue", "a rather long answer", "no"), 0),
    question(1, ("yes", "never in a thousand years"), 0),
    question(2, ("one", "two", "three", "four"), 1),
    question(3, ("left", "right"), 0),
]


@torch.no_grad()
def log_likelihood(language_model: Any, example: Example, choice: str) -> float:
    """The log-likelihood of a choice's tokens after the prompt, from one forward pass."""
    chat, tokenizer = template("chat"), language_model.tokenizer
    prompt = chat.prompt(example, tokenizer, 512)
    answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
    logits = language_model.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prompt) + place - 1, token] for place, token in enumerate(answer)))


def scores(language_model: Any, examples: list[Example], **settings: Any) -> dict[str, float]:
    """The figures of ``choice_scores``."""
    loss, chat = NextToken(), template("chat")
    given = {"max_tokens": 512, "stops": {2}, "batch_size": 3, **settings}
    return choice_scores(language_model.model, loss, examples, chat, language_model.tokenizer, **given)


def test_the_most_likely_choice_is_taken_by_sum_and_by_length() -> None:
    language_model = models.load("tiny")
    right, right_by_length, differ = 0, 0, 0
    for example in QUESTIONS:
        choices = example.metadata["choices"]
        found = [log_likelihood(language_model, example, choice) for choice in choices]
        by_length = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
        picks = [choices[values.index(max(values))] for values in (found, by_length)]
        right += picks[0] == example.response
        right_by_length += picks[1] == example.response
        differ += picks[0] != picks[1]
    assert differ and right != right_by_length  # else this test could not tell the two apart
    assert scores(language_model, QUESTIONS) == {"choice": right / 4, "choice-by-length": right_by_length / 4}


def test_a_model_scored_on_its_most_likely_choices_is_always_right_in_any_batch() -> None:
    """The response of every example is the choice that the model finds most likely."""
    language_model = models.load("tiny")
    answers = []
    for example in QUESTIONS:
        choices = example.metadata["choices"]
        best = max(choices, key=lambda choice: log_likelihood(language_model, example, choice))
        answers.append(replace(example, turns=(example.turns[0], Turn("assistant", best))))
    for batch_size in (1, 20):
        assert scores(language_model, answers, batch_size=batch_size)["choice"] == 1.0


def test_all_choices_of_an_example_have_the_same_prompt() -> None:
    """The longest choice sets the prompt's length: else a short choice would see more of the question."""
    language_model: Any = models.load("tiny")
    seen: list[list[int]] = []

    class Watching(NextToken):
        def by_example(self, model: Any, batch: Any) -> Any:
            prompts = (batch.labels == -100) & (batch.attention_mask == 1)
            seen.extend(row[mask].tolist() for row, mask in zip(batch.input_ids, prompts, strict=True))
            return super().by_example(model, batch)

    loss = Watching()
    example = question(5, ("a", "b" * 40), 0)
    choice_scores(language_model.model, loss, [example], template("chat"), language_model.tokenizer, 60, {2})
    assert len(seen) == 2 and seen[0] == seen[1] and len(seen[0]) == 20


def test_choices_that_are_equal_once_they_are_cut_are_not_told_apart() -> None:
    language_model = models.load("tiny")
    alike = ("a" * 300 + "b", "a" * 300 + "c")
    for right in (0, 1):
        assert scores(language_model, [question(1, alike, right)], max_tokens=64)["choice"] == 0.0


def test_examples_without_choices_are_left_out() -> None:
    plain = Example((Turn("user", "Why?"), Turn("assistant", "So.")))
    language_model = models.load("tiny")
    assert scores(language_model, [plain]) == {}
    assert scores(language_model, [plain, *QUESTIONS]) == scores(language_model, QUESTIONS)


def test_choices_come_from_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = '{"instruction": "1 + 1?", "response": "2", "choices": ["1", "2"], "who": "%s"}\n'
    file.write_text("".join(row % who for who in "abab"))
    data = Files(path=str(file), client_column="who", held_out_fraction=0.5).load(Key.of(1))
    examples = [example for part in (data.clients, data.held_out) for each in part.values() for example in each]
    assert len(examples) == 4 and all(example.metadata["choices"] == ("1", "2") for example in examples)
    assert applies("choice", examples[0])
    for wrong in ('["1", "3"]', '"2"', "2"):
        file.write_text((row % "a").replace('["1", "2"]', wrong))
        with pytest.raises(
            UserError, match=r"row 1: the choices .* are not a list of texts that includes the response"
        ):
            Files(path=str(file), client_column="who").load(Key.of(1))
    for wrong, message in (
        ('["2", "2"]', "two choices are the same text"),
        ('["2", "\\ud800"]', "a choice holds half of a character"),
        ('["2", null]', "a choice holds null, not a text"),
    ):
        file.write_text((row % "a").replace('["1", "2"]', wrong))
        with pytest.raises(UserError, match=message):
            Files(path=str(file), client_column="who").load(Key.of(1))
    file.write_text(row % "a")
    with pytest.raises(UserError, match=r'has no column "options" \(data.choices_column\)'):
        Files(path=str(file), client_column="who", choices_column="options").load(Key.of(1))


def test_a_tasks_scorer_accepts_the_response() -> None:
    data = ReasoningGym(tasks=("chain_sum", "spell_backward"), rows=2, held_out_rows=2, held_out_tasks=1).load(
        Key.of(1)
    )
    score = SCORERS["task-score"]
    for example in (example for each in data.held_out.values() for example in each):
        assert applies("task-score", example)
        assert score(example, example.response) == 1.0
        assert score(example, "no idea") < 0.2


def test_a_metric_that_no_held_out_example_supports_is_refused() -> None:
    plain = {"rows": (Example((Turn("user", "Why?"), Turn("assistant", "So."))),)}
    check_metrics(("loss", "rouge-l", "rouge-l-google", "exact-match"), plain)
    with pytest.raises(UserError, match=r'metric "task-score" needs source = "reasoning-gym": no held-out example'):
        check_metrics(("task-score",), plain)
    with pytest.raises(UserError, match=r'metric "choice" needs examples with choices'):
        check_metrics(("choice",), plain)
    check_metrics(("choice",), {"rows": tuple(QUESTIONS)})
    with pytest.raises(UserError, match=r'"green" is not among its choices'):
        check_metrics(
            ("choice",), {"rows": (replace(QUESTIONS[0], turns=(Turn("user", "?"), Turn("assistant", "green"))),)}
        )


def test_scorers_read_the_example_and_the_answer() -> None:
    example = Example((Turn("user", "?"), Turn("assistant", "the red door")))
    assert SCORERS["exact-match"](example, "the red door") == 1.0
    assert SCORERS["rouge-l"](example, "the door") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert math.isclose(SCORERS["rouge-l-google"](example, "THE door!"), 0.8)

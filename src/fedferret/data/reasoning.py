"""Generated reasoning tasks with exact scorers: the ``reasoning-gym`` package. Client = task, or a share of all rows.

A partition gives the shares of all rows; its categories are the tasks.

The rows of a task follow from the key and the task's name. Rows without an answer are left out. Questions are
distinct: of the first ``rows`` plus ``held_out_rows`` distinct questions the last are held out, so training uses no
held-out question.
Held-out sets: "rows" (unseen questions of the clients' tasks) and "tasks" (tasks that no client has).

The package reads and seeds the global generators of ``random`` and numpy, at import and in two tasks. Every call here
seeds both and restores them. Six tasks are left out because the scorer rejects the task's answer. Five are left out
because the rows change from process to process (the generators iterate over sets).
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import Example, FederatedData, Turn, at_most, check_at_least
from fedferret.data.partition import Partition, named_clients

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = "reasoning-gym, (c) 2025 Open-Thought; Apache License 2.0."

_NO_ANSWER = {"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
_NOT_REPEATABLE = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}

# Short questions, short answers, under a millisecond per row, hundreds of distinct questions.
DEFAULT_TASKS = (
    *("aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher", "calendar_arithmetic"),
    *("chain_sum", "count_bits", "count_primes", "color_cube_rotation", "complex_arithmetic", "decimal_arithmetic"),
    *("decimal_chain_sum", "dice", "family_relationships", "fraction_simplification", "gcd", "gsm_symbolic"),
    *("knights_knaves", "lcm", "leg_counting", "letter_counting", "number_filtering", "prime_factorization"),
    *("products", "simple_equations", "simple_geometry", "spell_backward", "syllogism", "time_intervals"),
    *("word_sequence_reversal",),
)


@dataclass(frozen=True)
class ReasoningGym:
    """Settings of the source "reasoning-gym"; the defaults give 27 clients of 200 rows."""

    tasks: tuple[str, ...] = DEFAULT_TASKS  # or ("all",)
    rows: int = 200  # training examples per task
    held_out_rows: int = 10  # per task
    held_out_tasks: int = 4  # drawn by the key
    max_held_out: int | None = 256  # examples per held-out set; None: all
    client: Literal["task", "partition"] = "task"  # one task per client, the most skewed case; or by ``partition``
    partition: Partition = field(default_factory=Partition)  # its categories are the tasks

    def __post_init__(self) -> None:
        check_at_least("rows", self.rows, 1)
        check_at_least("held_out_rows", self.held_out_rows, 0)
        check_at_least("held_out_tasks", self.held_out_tasks, 0)
        check_at_least("max_held_out", self.max_held_out, 1)

    def load(self, key: Key) -> FederatedData:
        """Generate the rows; under a second for the defaults after the package's slow import.

        Raises:
            UserError: if the package is missing, a task cannot be used, or no task is left to train on.
        """
        tasks = self._tasks()
        if self.held_out_tasks >= len(tasks):
            raise UserError(
                f"data.held_out_tasks is {self.held_out_tasks} of {len(tasks)} tasks: leave one to train on"
            )
        unseen = set(key.fold("held-out tasks").sample(tasks, self.held_out_tasks))
        clients: dict[str, tuple[Example, ...]] = {}
        held_out: dict[str, list[Example]] = {"rows": [], "tasks": []}
        for task in tasks:
            if task in unseen:
                held_out["tasks"].extend(_generate(task, self.held_out_rows, key.fold("rows", task)))
            else:
                examples = _generate(task, self.rows + self.held_out_rows, key.fold("rows", task))
                clients[task] = tuple(examples[: self.rows])
                held_out["rows"].extend(examples[self.rows :])
        if self.client == "partition":
            clients = self._partitioned(clients, key.fold("partition"))
        return FederatedData(
            clients=clients,
            held_out={
                name: at_most(examples, self.max_held_out, key.fold("held out", name))
                for name, examples in held_out.items()
                if examples
            },
            source="reasoning-gym",
            notice=NOTICE,
        )

    def _partitioned(self, by_task: dict[str, tuple[Example, ...]], key: Key) -> dict[str, tuple[Example, ...]]:
        rows = [example for examples in by_task.values() for example in examples]
        parts = self.partition.split(len(rows), [example.metadata["task"] for example in rows], key)
        return named_clients(rows, parts)

    def _tasks(self) -> list[str]:
        known = set(_package().factory.DATASETS)
        if self.tasks == ("all",):
            return sorted(known - _NO_ANSWER - _NOT_REPEATABLE)
        for task in self.tasks:
            if task not in known:
                raise UserError(f'reasoning-gym has no task "{task}": {nearest(task, known)}')
            if task in _NO_ANSWER:
                raise UserError(
                    f'reasoning-gym task "{task}" gives no answer text that its scorer accepts: '
                    "remove it from data.tasks"
                )
            if task in _NOT_REPEATABLE:
                raise UserError(
                    f'reasoning-gym task "{task}" differs from process to process: remove it from data.tasks'
                )
        return sorted(set(self.tasks))


def score(example: Example, answer: str) -> float:
    """Score a generated answer with the scorer of the example's task.

    Args:
        example: of this source.
        answer: the generated text.
    Returns:
        From 0 to 1; 1 is right.
    """
    scorer = _scorer(example.metadata["task"])
    with _global_generators(0):
        try:
            return float(scorer(answer, example.metadata["entry"]))
        except Exception:  # some scorers parse the answer and raise any exception where they cannot
            return 0.0


def _generate(task: str, count: int, key: Key) -> list[Example]:
    """The first ``count`` distinct questions of a task that have an answer: 0 has none in "base_conversion"."""
    seed = key.words[0] >> 2  # the package adds row numbers and needs the sum below 2^32
    found: dict[str, Example] = {}
    with _global_generators(seed):
        tries = 2 * count + 20
        dataset = _package().create_dataset(task, seed=seed, size=tries)
        for index in range(tries):
            if len(found) == count:
                break
            entry = dataset[index]
            if not str(entry["answer"]).strip():
                continue
            metadata = {"task": task, "category": dataset.category, "entry": entry}
            turns = (Turn("user", entry["question"]), Turn("assistant", str(entry["answer"])))
            found.setdefault(entry["question"], Example(turns, metadata))
    if len(found) < count:
        raise UserError(
            f'reasoning-gym task "{task}" has few distinct questions ({len(found)} in {tries} rows, {count} wanted): '
            f"lower data.rows or remove it from data.tasks"
        )
    return list(found.values())


@cache
def _scorer(task: str) -> Any:
    return _package().get_score_answer_fn(task)


def _package() -> Any:
    try:
        with _global_generators(0), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a library that the package imports
            return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError:
        raise UserError('data source "reasoning-gym" needs a package: pip install reasoning-gym==0.1.25') from None


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for code that reads them, then restore their states."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)

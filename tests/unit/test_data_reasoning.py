"""reasoning-gym: distinct questions, a scorer per task, and unchanged global generators."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.partition import Partition
from fedferret.data.reasoning import DEFAULT_TASKS, ReasoningGym, score

pytest.importorskip("reasoning_gym")

# list_functions and pool_matrix read the global generators of random and numpy
SMALL = ReasoningGym(
    tasks=("gcd", "lcm", "list_functions", "pool_matrix", "syllogism"), rows=12, held_out_rows=5, held_out_tasks=2
)


def test_rows_and_tasks_are_held_out():
    data = SMALL.load(Key.of(1))
    assert len(data.clients) == 3 and [len(examples) for examples in data.clients.values()] == [12] * 3
    assert [len(examples) for examples in data.held_out.values()] == [15, 10]
    assert {example.metadata["task"] for example in data.held_out["rows"]} == set(data.clients)
    assert len({example.metadata["task"] for example in data.held_out["tasks"]} | set(data.clients)) == 5
    questions = [e.turns[0].content for part in (*data.clients.values(), *data.held_out.values()) for e in part]
    assert len(questions) == len(set(questions))


def test_every_row_has_an_answer():
    """Of the package's rows of "ab" many are answered by no letter, and 0 has no digits in base_conversion."""
    data = ReasoningGym(tasks=("ab", "base_conversion"), held_out_tasks=0).load(Key.of(1))
    rows = [e for part in (*data.clients.values(), *data.held_out.values()) for e in part]
    assert len(rows) == 2 * 210 and all(example.turns[1].content.strip() for example in rows)


def test_the_data_follow_from_the_key_and_not_from_the_global_generators():
    random.seed(1), np.random.seed(1)  # as another program may leave them
    first = SMALL.load(Key.of(1))
    random.seed(2), np.random.seed(2)
    assert first == SMALL.load(Key.of(1))
    assert first != SMALL.load(Key.of(2))


CODE = """
import random, numpy as np
def states():
    return random.getstate(), np.random.get_state()[1].tolist()
before = states()
from fedferret.core.keys import Key
from fedferret.data.partition import Partition
from fedferret.data.reasoning import ReasoningGym, score
data = ReasoningGym(tasks=("gcd", "list_functions", "pool_matrix"), rows=3, held_out_tasks=0).load(Key.of(1))
score(data.clients["gcd"][0], "1")
assert states() == before
print(data.clients)
"""


@pytest.mark.slow
def test_another_process_makes_the_same_rows_and_keeps_its_generators():
    hash_seed = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=hash_seed)
    here = ReasoningGym(tasks=("gcd", "list_functions", "pool_matrix"), rows=3, held_out_tasks=0).load(Key.of(1))
    assert run.stdout.strip() == str(here.clients)


def test_scores_come_from_the_task():
    data = ReasoningGym(rows=2, held_out_rows=0, held_out_tasks=0).load(Key.of(1))
    assert list(data.clients) == sorted(DEFAULT_TASKS) and not data.held_out
    for examples in data.clients.values():
        assert score(examples[0], examples[0].response) == 1.0
        assert score(examples[0], "certainly wrong") < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("gdc",)}, 'did you mean "gcd"'),
        ({"tasks": ("rubiks_cube",), "held_out_tasks": 0}, "no answer text"),
        ({"tasks": ("ransom_note",), "held_out_tasks": 0}, "process to process"),
        ({"tasks": ("gcd",), "held_out_tasks": 1}, "leave one to train on"),
        ({"tasks": ("coin_flip",), "held_out_tasks": 0, "rows": 500}, "few distinct questions"),
    ],
)
def test_unusable_tasks_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        ReasoningGym(**settings).load(Key.of(1))


def test_impossible_settings_are_refused_at_once():
    with pytest.raises(UserError, match=r"data\.rows is 0"):
        ReasoningGym(rows=0)


def test_the_rows_of_all_tasks_are_partitioned_and_the_held_out_sets_stay_the_same():
    whole = SMALL.load(Key.of(1))
    kinds = {}
    for kind, alpha in (("iid", 1.0), ("dirichlet", 0.1)):
        partition = Partition(kind=kind, clients=3, alpha=alpha, min_examples=0)
        data = dataclasses.replace(SMALL, client="partition", partition=partition).load(Key.of(1))
        assert list(data.clients) == ["client-0", "client-1", "client-2"]
        everything = sorted(str(each.turns) for examples in data.clients.values() for each in examples)
        assert everything == sorted(str(each.turns) for examples in whole.clients.values() for each in examples)
        assert data.held_out == whole.held_out
        kinds[kind] = [Counter(example.metadata["task"] for example in held) for held in data.clients.values()]
    largest = {kind: max(max(count.values()) / count.total() for count in counts) for kind, counts in kinds.items()}
    assert largest["dirichlet"] > largest["iid"]

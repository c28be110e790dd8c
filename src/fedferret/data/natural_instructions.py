"""Natural Instructions v2.8: 1,600 tasks, each a definition and rows of input and outputs. Client = training task.

Wang et al. "Super-NaturalInstructions", EMNLP 2022, arXiv 2204.07705. The source reads a clone of the repository:
``tasks/*.json`` and the English lists ``splits/default/{train,test}_tasks.txt`` (757 and 119 tasks).

As in the code of FedKSeed and Ferret:
1. Drop the instances with inputs of ``max_input_characters`` or more.
2. Leave out the training tasks with fewer than ``min_instances`` remaining (738 tasks remain, the paper says). Of the
   instances of each other training task draw a share of ``train_fraction``, rounded down.
3. Of the instances of each test task draw a share of ``test_fraction``, rounded down, but at least
   ``min_test_instances`` where the task has so many. They are the held-out set "tasks".
4. Instruction: the task's first definition. Input: the instance's. Response: the first of the instance's outputs.

The code specifies more than the papers: it filters lengths first, in characters, by a setting meant for tokens (1,024),
and test tasks have no minimum number of instances. Deviations from the code: draws are keyed, independently per task;
an instance with a blank output is dropped; a blank input has no section in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, at_most, check_at_least, instruction_example

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = (
    "Natural Instructions v2, Allen Institute for AI; Apache License 2.0, and of each task its source's own licence."
)

_CLONE = "git clone --depth 1 --branch v2.8 https://github.com/allenai/natural-instructions"


@dataclass(frozen=True)
class NaturalInstructions:
    """Settings of the source "natural-instructions"; the defaults are the paper's."""

    path: str  # a clone of the repository
    max_input_characters: int = 1024  # inputs have fewer
    min_instances: int = 20  # a training task with fewer is left out
    train_fraction: float = 0.2  # share of a training task's instances
    test_fraction: float = 0.02  # share of a test task's instances
    min_test_instances: int = 20  # per test task, whatever the share
    num_clients: int | None = None  # training tasks, drawn by the key; None: all, as in the paper
    max_held_out: int | None = None  # examples held out, drawn by the key; None: all, as in the paper

    def __post_init__(self) -> None:
        for name in ("max_input_characters", "min_instances", "num_clients", "max_held_out"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("min_test_instances", self.min_test_instances, 0)
        for name in ("train_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"data.{name} is {getattr(self, name)}: give a share of the data, above 0 and at most 1"
                )

    def load(self, key: Key) -> FederatedData:
        """Read the tasks and draw the instances; one file is in memory at a time.

        Raises:
            UserError: if the clone is not complete, or fewer than ``num_clients`` tasks qualify.
        """
        clients = {}
        for task in sorted(self._tasks("train")):
            instances = self._instances(task)
            count = int(len(instances) * self.train_fraction)
            if len(instances) >= self.min_instances and count:
                clients[task] = at_most(instances, count, key.fold("train", task))
        if self.num_clients is not None:
            if self.num_clients > len(clients):
                raise UserError(
                    f"data.num_clients is {self.num_clients} but {len(clients)} tasks qualify: ask for fewer"
                )
            clients = {task: clients[task] for task in key.fold("clients").sample(list(clients), self.num_clients)}
        held_out: list[Example] = []
        for task in self._tasks("test"):
            instances = self._instances(task)
            count = max(self.min_test_instances, int(len(instances) * self.test_fraction))
            held_out.extend(at_most(instances, count, key.fold("test", task)))
        return FederatedData(
            clients=clients,
            held_out={"tasks": at_most(held_out, self.max_held_out, key.fold("held out"))},
            source="natural-instructions",
            notice=NOTICE,
        )

    def _tasks(self, split: str) -> list[str]:
        path = Path(self.path) / "splits" / "default" / f"{split}_tasks.txt"
        try:
            return path.read_text(encoding="utf-8").split()
        except OSError:
            raise UserError(f'there is no file "{path}" (data.path): {_CLONE} {self.path}') from None

    def _instances(self, task: str) -> list[Example]:
        """The task's instances with short inputs."""
        path = Path(self.path) / "tasks" / f"{task}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return list(_examples(task, content, self.max_input_characters))
        except OSError:
            raise UserError(f'there is no file "{path}", which the task list names: {_CLONE} {self.path}') from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f'"{path}" is not a Natural Instructions task ({error!r:.80}): clone the repository again: {_CLONE}'
            ) from None


def _examples(task: str, content: Any, max_input_characters: int) -> Iterator[Example]:
    definition = content["Definition"]
    instruction = definition if isinstance(definition, str) else definition[0]
    metadata = {"task": task, "category": content["Categories"][0]}
    for instance in content["Instances"]:
        input_text, outputs = instance["input"], instance["output"]
        response = outputs if isinstance(outputs, str) else outputs[0]
        if len(input_text) < max_input_characters and response.strip():
            yield instruction_example(instruction, input_text, response, metadata)

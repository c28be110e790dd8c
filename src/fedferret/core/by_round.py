"""What a method tunes in each round, and how large its memories are then: known before the run.

public, server   what ``init`` makes of the prepared model on the meta device, as the codec writes it; of a later
                 stage also the weights that it stands on
client           ``WireCost.client_state_bytes``: a first private state may need the client's data
all three        and ``Algorithm.state_growth``
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm, Shapes
from fedferret.core.hand_over import all_weights
from fedferret.core.keys import Key
from fedferret.core.node import Codec
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.core.wire_cost import StateBytes


@dataclass(frozen=True)
class _Begun:
    """A method, or a stage of one, with the sizes of the states that it begins with."""

    rounds: int
    algorithm: AnyAlgorithm
    model: nn.Module
    shapes: Shapes
    public: int
    server: int

    def after(self, round: int, clients: int) -> StateBytes:
        """What the states have after one of its rounds."""
        grown = self.algorithm.state_growth(self.model, self.shapes, round, clients)
        kept = self.algorithm.wire_cost(self.shapes, 1, round).client_state_bytes
        return StateBytes(self.public + grown.public, self.server + grown.server, kept + grown.client)


def shapes_by_round(algorithm: AnyAlgorithm, model: nn.Module, rounds: int) -> Callable[[int], Shapes]:
    """The shapes of the tensors that ``algorithm`` tunes in each round.

    Args:
        algorithm: the method.
        model: prepared for it, on the meta device.
        rounds: of the run.

    Returns:
        A function from a round's number, from 1, to shapes by parameter name.
    """
    if isinstance(algorithm, Staged):
        return algorithm.shapes(model, rounds)
    shapes = tree.shapes(tree.parameters(model))
    return lambda round: shapes


def state_bytes_by_round(
    algorithm: AnyAlgorithm, task: Task, cohort: int, clients: int, codec: Codec
) -> Callable[[int], StateBytes]:
    """Measure the states of ``algorithm`` in each round.

    Args:
        algorithm: the method.
        task: its model is prepared for the method, on the meta device.
        cohort: clients of a round.
        clients: of the run.
        codec: writes states.

    Returns:
        A function from a round's number, from 1, to bytes; framing that grows with the number of clients is left out.
    """
    begun = list(_begun(algorithm, task, codec))

    def of_round(round: int) -> StateBytes:
        number, part = round, begun[0]
        for part in begun:
            if number <= part.rounds:
                break
            number -= part.rounds
        return part.after(number, min(clients, number * cohort))

    return of_round


def _begun(algorithm: AnyAlgorithm, task: Task, codec: Codec) -> Iterator[_Begun]:
    if not isinstance(algorithm, Staged):
        yield _measured(algorithm, task, codec)
        return
    stood_on = 0  # bytes of the weights under a stage, where they are not the checkpoint's
    before = None
    whole = 4 * tree.size(all_weights(algorithm.release(copy.deepcopy(task.model))))
    for stage, rounds, model in algorithm.prepared(task.model, task.rounds):
        if before is not None:
            sent = before[0].sent
            stood_on = whole if sent is None else min(whole, stood_on + 4 * sent(before[1]))
        part = _measured(stage.algorithm, Task.of(model, task.objective, rounds), codec, stood_on)
        before = stage, part.shapes
        yield part


def _measured(algorithm: AnyAlgorithm, task: Task, codec: Codec, stood_on: int = 0) -> _Begun:
    public, server = algorithm.init(task, Key(0))
    shapes = tree.shapes(tree.parameters(task.model))
    model = copy.deepcopy(task.model)  # a later stage is prepared from the one that is given
    return _Begun(task.rounds, algorithm, model, shapes, codec.size(public) + stood_on, codec.size(server))

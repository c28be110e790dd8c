"""What one stage of a method leaves to the next.

    on every node     the hand-over runs inside ``apply``, from public facts alone: no byte crosses the wire
    at the server     the result is the entry of the stage's last round, in place of the stage's own entry

On every node it must have the same bits on every machine, so it copies and adds, and calls no matrix library. At the
server it may be a decomposition: the last bits of one depend on the machine and its number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.core.algorithm import AnyAlgorithm, Shapes
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.task import Task
from fedferret.core.tree import Tree


@message
class HandedOver:
    """What the next stage begins from: weights by plain name and an adapter's first values, and figures to report."""

    weights: dict[str, Annotated[Tensor, Form(torch.float32)]]
    figures: dict[str, float]


HandOver: TypeAlias = Callable[[Task, Tree, AnyAlgorithm, Any, Key], Mapping[str, Tensor] | HandedOver]


def tuned_weights(task: Task, base: Tree, finished: AnyAlgorithm, public: Any, key: Key) -> dict[str, Tensor]:
    """Hand over the finished stage's model, adapters merged: the usual hand-over.

    Args:
        task: with the finished stage's model; its weights may be overwritten.
        base: the weights that the finished stage stood on.
        finished: the stage's method.
        public: the stage's public state.
        key: for hand-overs that draw.

    Returns:
        Weights that the next stage begins from, by name: plain ones, and where given the next adapter's first values.

    Raises:
        UserError: the finished stage's method has no global model.
    """
    with finished.model(task, public) as model:
        if model is None:
            raise UserError(f"{finished.name} has no global model to hand over to the next stage")
        plain = finished.release(copy.deepcopy(model))
    return {name: weight for name, weight in all_weights(plain).items() if name in base}


@dataclass(frozen=True)
class Stage:
    """One stage of a method.

    Attributes:
        algorithm: the stage's method.
        rounds: how many it has; None: all that are left.
        hand_over: what it leaves to the next.
        sent: None: every node computes the hand-over. Else the server does, and the function says how many fp32 values
            the result has, given the shapes of the tensors that the stage tunes. Weights under the stage stay what
            they are where the result does not name them.
    """

    algorithm: AnyAlgorithm
    rounds: int | None = None
    hand_over: HandOver = tuned_weights
    sent: Callable[[Shapes], int] | None = None


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model.

    Args:
        model: of any kind.

    Returns:
        Every parameter by name, frozen ones too, tied ones once; detached, not copied.
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters()}

"""FedLog's bodies: of two architectures in one run, and adapters in a frozen text model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret import models
from fedferret.algorithms.fedlog import FedLog
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.node import Node
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.models.private_body import image_weights
from fedferret.wire import codec
from toy_classifier import THREE_CLASSES
from toys import bits, simulate

TRAINING = FirstOrder(optimizer="adamw", learning_rate=1e-3, steps=1, batch_size=4, clip=None)
FEDLOG = FedLog(bodies=("lenet5", "conv4"), features=5, training=TRAINING)


@dataclass(frozen=True)
class Pictures:
    """One client's images of noise."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, key: Key | None) -> Iterator[Any]:
        """All images once, in their order."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield SimpleNamespace(pixels=self.pixels[rows], labels=self.labels[rows])

    def take(self, rows: Sequence[int]) -> Pictures:
        """Some images, in this order."""
        return Pictures(self.pixels[list(rows)], self.labels[list(rows)])


def pictures(client: str) -> Pictures:
    pixels = Key.of(8, client).uniform(4 * 784).float().view(4, 1, 28, 28)
    return Pictures(pixels, torch.tensor([0, 1, 2, 0]))


def image_task(algorithm: FedLog) -> Task:
    model = models.classifier("lenet5", 3).model
    return Task.of(algorithm.prepare(model, Key.of(7, "prepare")), THREE_CLASSES, 2)


def test_clients_of_two_architectures_share_a_head_and_nothing_else() -> None:
    """Which architecture a client has follows from its name; bodies of one begin alike, whoever worked before."""
    data = {client: pictures(client) for client in "abc"}
    run = simulate(FEDLOG, 2, data=data, task=image_task(FEDLOG))
    assert not [failure for record in run.records for failure in record.failures]
    states = {client: run.store.get(client) for client in data}
    assert {state.body for state in states.values()} == {"lenet5", "conv4"}
    shapes = {tuple(state.weights["projection.weight"].shape) for state in states.values()}
    assert shapes == {(5, 84), (5, 256)} and run.state.public.head.shape == (3, 6)
    for client, state in states.items():
        assert sum(weight.numel() for weight in state.weights.values()) == image_weights(state.body, 5)
        fresh, first, public = image_task(FEDLOG), Key.of(3, "join", client), run.state.public
        again = run.algorithm.init_client(run.task, public, data[client], first)
        assert bits(again) == bits(FEDLOG.init_client(fresh, public, data[client], first)) != bits(state)
        with run.algorithm.model(run.task, public, state) as model, torch.no_grad():
            assert model is not None
            logits = model(next(data[client].batches(4, None)))
        with FEDLOG.model(fresh, public, state) as model, torch.no_grad():  # a process that had no body yet
            assert model is not None and torch.equal(model(next(data[client].batches(4, None))), logits)
    cost = FEDLOG.wire_cost(tree.shapes(tree.parameters(run.task.model)), 3, 2)
    assert (cost.up_most, cost.client_state_bytes) == (4 * 3 * 6, 4 * image_weights("conv4", 5))


def test_two_architectures_start_from_a_drawn_head_and_need_bodies_that_train() -> None:
    assert FEDLOG.start == "random" and FedLog(bodies=("lenet5", "lenet5")).start == "statistics"
    frozen: Any = models.classifier("lenet5", 3).model
    frozen.freeze()
    with pytest.raises(UserError, match=r'model.train="head" freezes the body'):
        FEDLOG.check(FEDLOG.prepare(frozen, Key.of(1)), 2)


@pytest.mark.parametrize("over", [{"name": "ssf"}, {"name": "fedit", "rank": 2, "modules": "all-linear"}])
def test_an_adapter_of_a_frozen_text_model_is_the_private_body(over: dict[str, Any]) -> None:
    """Every value but the adapter's stays the base's, and each client's adapter differs from the others'."""
    algorithm = FedLog(over=over, features=4, start="random", training=TRAINING)
    loaded: Any = models.classifier("tiny-encoder", 3)
    with pytest.raises(UserError, match="the recipe's model reads texts; leave bodies out"):
        FEDLOG.prepare(loaded.model, Key.of(7, "prepare"))
    before = tree.clone(dict(loaded.model.encoder.named_parameters()))
    task = Task.of(algorithm.prepare(loaded.model, Key.of(7, "prepare")), THREE_CLASSES, 1)
    algorithm.check(task.model, 5)
    node, _ = Node.start(task, algorithm, 3, codec)
    states = []
    for client in "ab":
        tokens = loaded.tokenizer([f"{client} one", f"{client} two", "three"], padding=True, return_tensors="pt")
        data: Any = Texts(tokens)
        private = algorithm.init_client(task, node.public, data, Key.of(3, "join", client))
        states.append(algorithm.client_update(task, node.public, private, data, Key.of(1, client)).client)
    assert all("encoder" in name or name.startswith("projection.") for name in states[0].weights)
    assert bits(states[0]) != bits(states[1])
    after = dict(task.model.named_parameters())
    kept = [name for name in after if name.startswith("inner.encoder") and not after[name].requires_grad]
    assert kept and all(
        torch.equal(after[name], before[name.removeprefix("inner.encoder.").replace("base_layer.", "")])
        for name in kept
    )


class Texts:
    """A batch of texts, of one class each."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 3

    def batches(self, size: int, key: Key | None) -> Iterator[Any]:
        """All of them."""
        yield SimpleNamespace(labels=torch.arange(3), **self.tokens)


def test_a_learned_prompt_is_no_private_body() -> None:
    algorithm = FedLog(over="fedprompt", training=TRAINING)
    with pytest.raises(UserError, match="a learned prompt cannot be a private body"):
        algorithm.check(algorithm.prepare(models.classifier_skeleton("tiny-encoder", 3), Key.of(1)), 1)

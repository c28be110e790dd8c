"""One part averaged and the other private: what these methods become at their limits; no private part leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.local_only import LocalOnly
from fedferret.algorithms.split_model import FedPer, FedRep, LGFedAvg
from fedferret.config import from_tables
from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.node import client_key
from fedferret.core.pooling import tensors
from fedferret.engines.in_process import InProcess
from fedferret.local.first_order import FirstOrder, TrainingRefused
from toy_sites import Direct, simulate_sites, sites
from toys import TRAINING, Failing, Simulation, simulate, toy_classifier, toy_clients, toy_task, weights

BODY, HEAD = ["body.0.weight", "body.0.bias"], ["head.weight", "head.bias"]  # of the toy's classifier


@pytest.mark.parametrize(
    "algorithm", [FedPer(head_layers=0), FedRep(head_layers=0, head_times=0), LGFedAvg(head_layers=2)]
)
def test_with_all_layers_averaged_it_is_fedavg_to_the_bit(algorithm: AnyAlgorithm) -> None:
    ours = simulate(type(algorithm)(**{**vars(algorithm), "training": TRAINING}), 3)
    assert ours.memory == fedavg().memory
    assert weights(ours)  # nothing is private, so the public weights are every client's model


def fedavg(**options: Any) -> Simulation:
    """Three rounds on the same classifier."""
    return simulate(FedAvg(training=TRAINING), 3, **{"task": toy_task(3, FedPer()), **options})


def test_fedrep_that_leaves_the_head_as_it_is_is_fedavg_under_a_frozen_head() -> None:
    task = toy_task(3, FedPer())
    for name, weight in task.model.named_parameters():
        weight.requires_grad_(name in BODY)
    frozen, ours = fedavg(task=task), simulate(FedRep(head_times=0, training=TRAINING), 3)
    base = dict(toy_classifier().named_parameters())
    for name in BODY:
        assert torch.equal(ours.state.public.weights[name], frozen.state.public.weights[name])
    for name in HEAD:
        assert torch.equal(ours.store.get("a").weights[name], base[name])


def test_fedrep_trains_the_head_and_then_the_body_and_leaves_the_model_trainable() -> None:
    algorithm, training = FedRep(head_times=3, training=TRAINING), TRAINING
    task, data = toy_task(1, FedPer()), toy_clients(1)["a"]
    public, _ = algorithm.init(task, Key.of(1))
    reply = algorithm.client_update(task, public, None, data, Key.of(1))
    assert all(weight.requires_grad for weight in task.model.parameters())

    model = toy_task(1, FedPer()).model
    for names, phase, key in (
        (HEAD, FirstOrder(learning_rate=0.1, steps=3 * 2, batch_size=4), Key.of(1).fold("train").fold("head")),
        (BODY, training, Key.of(1).fold("train")),
    ):
        direct = toy_task(1, FedPer())
        tree.copy_(tree.parameters(direct.model), tree.parameters(model))
        for name, weight in direct.model.named_parameters():
            weight.requires_grad_(name in names)
        phase.train(direct, data, key)
        model = direct.model.requires_grad_(True)
    expected = tree.parameters(model)
    assert reply.client is not None and list(reply.client.weights) == HEAD
    for name in HEAD:
        assert torch.equal(reply.client.weights[name], expected[name])
    for name in BODY:
        assert torch.equal(reply.payload.delta[name], public.weights[name] - expected[name])

    with pytest.raises((OSError, TrainingRefused)):
        algorithm.client_update(task, public, None, Failing(data.x, data.y), Key.of(1))  # type: ignore[attr-defined]
    assert all(weight.requires_grad for weight in task.model.parameters())


@pytest.mark.parametrize("algorithm", [FedPer, FedRep, LGFedAvg, LocalOnly])
def test_a_private_part_never_crosses_the_wire(algorithm: Any, tmp_path: Path) -> None:
    """Neither its names nor its trained bits are in any message of a run with sites, in either direction."""
    method, crossed, private = algorithm(training=TRAINING), list[bytes](), list[tuple[str, Tensor]]()

    def transport(data: Any) -> Direct:
        link = sites(method, 2, tmp_path)(data)

        def watched(site: str, message: bytes, response: bytes) -> list[Any]:
            crossed.extend((message, response))
            return [response]

        link.tamper = watched
        return link

    class Watched(InProcess):
        """The same run, bit for bit, with every private state at hand."""

        def work(self, *given: Any) -> tuple[Any, Any]:
            reply, state = super().work(*given)
            private.extend(tensors(state))
            return reply, state

    assert simulate_sites(method, 2, transport).public == simulate(method, 2, engine=Watched).public
    assert len(private) == 2 * 3 * (4 if algorithm is LocalOnly else 2) and len(crossed) >= 2 * 2 * 3
    for name, weight in private:
        assert not any(weight.numpy().tobytes() in message for message in crossed), name
    if algorithm is not LocalOnly:  # what does cross is found
        task = toy_task(2, FedPer())
        public, _ = method.init(task, Key.of(1))
        sent = method.client_update(task, public, None, toy_clients()["a"], client_key(3, 1, "a"))
        for _, delta in tensors(sent.payload):
            assert any(delta.numpy().tobytes() in message for message in crossed)


@pytest.mark.parametrize(
    ("layers", "first"), [(0, None), (1, "head.weight"), (2, "body.linear.weight"), (3, "body.conv2.weight")]
)
def test_the_last_layers_are_the_head(layers: int, first: str | None) -> None:
    names = [
        f"{part}.{kind}" for part in ("body.conv1", "body.conv2", "body.linear", "head") for kind in ("weight", "bias")
    ]
    start = names.index(first) if first else len(names)
    assert FedPer(head_layers=layers).shares(names) == names[:start]
    assert LGFedAvg(head_layers=layers).shares(names) == names[start:]


def test_a_pooler_goes_with_the_blocks_before_it_and_embeddings_are_body() -> None:
    blocks = [f"encoder.encoder.layer.{number}.output.weight" for number in range(3)]
    names = ["encoder.embeddings.word.weight", *blocks, "encoder.pooler.weight", "head.weight", "head.bias"]
    assert LGFedAvg(head_layers=1).shares(names) == names[-2:]
    assert LGFedAvg(head_layers=2).shares(names) == names[3:]
    assert LGFedAvg(head_layers=4).shares(names) == names


def test_what_cannot_be_split_is_refused() -> None:
    model = toy_classifier()
    for algorithm, message in (
        (FedPer(head_layers=3), "head_layers=3: of this model 2 layers are tuned"),
        (FedPer(head_layers=2), "head_layers=2: of the 2 layers that are tuned fedper would share none"),
        (LGFedAvg(head_layers=0), "lg-fedavg would share none"),
    ):
        with pytest.raises(UserError, match=message):
            algorithm.check(model, 1)
    for settings, message in (
        ({"name": "fedper", "head_layers": -1}, "must not be negative"),
        ({"name": "fedrep", "head_times": -1}, "must not be negative"),
        ({"name": "fedavg-ft", "fine_tuning": -1}, "must not be negative"),
        ({"name": "fedrep"}, 'cannot take objective "next-token", only classification'),
    ):
        with pytest.raises(UserError, match=message):
            from_tables({"model": {"name": "tiny"}, "data": {"source": "chitchat"}, "algorithm": settings})


def test_local_only_is_the_clients_own_training_round_after_round_and_fedavgs_first_one() -> None:
    run, task = simulate(LocalOnly(training=TRAINING), 3), toy_task(3)
    base = tree.clone(tree.parameters(task.model))
    for round in (1, 2, 3):
        trained = TRAINING.train(task, run.data["a"], client_key(run.seed, round, "a").fold("train"))
        if round == 1:
            own_task, public, key = toy_task(3), run.state.public, client_key(run.seed, 1, "a")
            first = FedAvg(training=TRAINING).client_update(own_task, public, None, run.data["a"], key)
            for name, weight in trained.weights.items():
                assert torch.equal(first.payload.delta[name], base[name] - weight)
    for name, weight in run.store.get("a").weights.items():
        assert torch.equal(weight, trained.weights[name])
        assert torch.equal(run.state.public.weights[name], base[name])
    assert max(max(record.bytes_up.values()) for record in run.records) < 200  # the round's framing

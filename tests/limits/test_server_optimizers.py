"""Server optimisers: the papers' recurrences, FedAvg without momentum, exact resuming, and none that is ignored."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.methods import METHODS, reference, rounds_of
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.registry import catalogue
from fedferret.algorithms.server_optimizer import Moments, ServerOptimizer
from fedferret.config import build_algorithm
from fedferret.core.errors import UserError
from toys import TRAINING, simulate

UPDATES = (0.5, -2.0, 0.25, 1e-4, 0.0)


def by_hand(kind: str, beta_1: float, beta_2: float, rate: float, tau: float) -> list[float]:
    """The steps of one weight with the mean updates ``UPDATES``, as the papers' algorithms are written."""
    m, v, steps = 0.0, tau**2, []
    for delta in UPDATES:
        if kind == "momentum":
            m = beta_1 * m + delta
            steps.append(m)
            continue
        m = beta_1 * m + (1 - beta_1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "adam":
            v = beta_2 * v + (1 - beta_2) * delta**2
        else:
            v = v - (1 - beta_2) * delta**2 * ((v > delta**2) - (v < delta**2))
        steps.append(rate * m / (math.sqrt(v) + tau))
    return steps


@pytest.mark.parametrize("kind", ["momentum", "adagrad", "adam", "yogi"])
def test_a_weights_steps_are_the_papers_recurrence(kind: Any) -> None:
    settings = {"beta_1": 0.8, "beta_2": 0.7, "learning_rate": 0.3, "tau": 0.01}
    read = {"momentum": ("beta_1",), "adagrad": ("beta_1", "learning_rate", "tau")}.get(kind, tuple(settings))
    optimizer = ServerOptimizer(name=kind, **{name: settings[name] for name in read})
    memory: Moments | None = None
    for update, expected in zip(UPDATES, by_hand(kind, 0.8, 0.7, 0.3, 0.01), strict=True):
        memory, step = optimizer.step(memory, {"w": torch.tensor([update]), "other": torch.tensor([7.0])})
        assert float(step["w"]) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert memory is not None and bool(memory.second) == (kind != "momentum")


def test_a_weight_that_a_round_does_not_move_keeps_its_memory_and_another_shape_is_refused() -> None:
    """Methods that choose layers may share others from one round to the next."""
    optimizer, one = ServerOptimizer(name="adam"), torch.ones(2)
    after, _ = optimizer.step(None, {"a": one, "b": one})
    later, steps = optimizer.step(after, {"b": one})
    assert list(steps) == ["b"] and later is not None and after is not None
    assert later.first["a"] is after.first["a"] and not torch.equal(later.first["b"], after.first["b"])
    with pytest.raises(ValueError, match="b changed its shape"):
        optimizer.step(after, {"b": torch.ones(3)})


def test_without_momentum_it_is_fedavg_to_the_bit() -> None:
    momentum = ServerOptimizer(name="momentum", beta_1=0.0)
    ours = simulate(FedAvg(training=TRAINING, server_optimizer=momentum), 3)
    assert ours.public == simulate(FedAvg(training=TRAINING), 3).public


@pytest.mark.parametrize("kind", ["adagrad", "yogi"])
def test_stopped_and_resumed_it_goes_on_with_the_same_moments(kind: Any, tmp_path: Path) -> None:
    algorithm = FedAvg(training=TRAINING, server_optimizer=ServerOptimizer(name=kind))
    simulate(algorithm, 4, until=2, folder=tmp_path)
    assert simulate(algorithm, 4, folder=tmp_path).memory == simulate(algorithm, 4).memory


ROWS = {algorithm.name: name for name, algorithm in reversed(METHODS.items()) if algorithm.name in catalogue()}


@pytest.mark.parametrize("method", catalogue())
def test_a_method_uses_the_servers_optimiser_or_refuses_it(method: str) -> None:
    name = ROWS[method]
    plain, momentum = METHODS[name], ServerOptimizer(name="momentum")
    if all(field.name != "server_optimizer" for field in dataclasses.fields(plain)):
        with pytest.raises(UserError, match="server_optimizer: there is no such setting"):
            build_algorithm(method, {"server_optimizer": {"name": "momentum"}})
        return
    if method in ("fedex-lora", "fedpeptao", "fedptr"):  # with another server
        with pytest.raises(
            UserError, match=r'server_optimizer.name="momentum": the method.* leave server_optimizer out'
        ):
            replace(plain, server_optimizer=momentum)
        return
    changed = simulate(replace(plain, server_optimizer=momentum), rounds_of(plain))
    assert changed.state.server is not None and changed.public != reference(name).public
    assert changed.history()[-1].bytes_up == reference(name).history()[-1].bytes_up


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adma"}, "server_optimizer.name"),
        ({"beta_1": 0.9}, 'beta_1=0.9: name="average" does not read it; leave it out'),
        ({"name": "momentum", "learning_rate": 0.1}, "does not read it; set server_learning_rate"),
        ({"name": "adam", "beta_2": 1.0}, r"beta_2=1.0: must lie in \[0, 1\)"),
        ({"name": "yogi", "tau": 0.0}, "tau=0.0: must be at least 1e-15"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_algorithm("fedavg", {"server_optimizer": settings})


def test_an_adapters_own_server_is_refused() -> None:
    over = {"name": "fedit", "server_optimizer": {"name": "adam"}}
    with pytest.raises(UserError, match=r"over\.server_optimizer: the server does as ferret says; leave it out"):
        build_algorithm("ferret", {"over": over})

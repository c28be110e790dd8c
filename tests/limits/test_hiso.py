"""Where HiSo becomes FedKSeed on shared directions, and that H is what its clients could not have sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedkseed import FedKSeed, FedKSeedEntry
from fedferret.algorithms.hiso import HiSo
from fedferret.algorithms.hiso_messages import Gradients, HiSoPublic
from fedferret.bases.gaussian import add_gaussian_
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import MeanPool, NotFinite
from fedferret.local.zeroth_order import ZerothOrder
from fedferret.wire import codec
from toys import SHAPES, simulate, toy_clients, toy_model, toy_task, weights

TRAINING = ZerothOrder(learning_rate=0.01, perturbation=1e-3, steps=6, batch_size=4, difference="forward")
HISO = HiSo(directions=3, smoothing=0.3, floor=1e-3, training=TRAINING)
DECOMFL = HiSo(directions=1, smoothing=0.0, training=TRAINING)


def base() -> dict[str, Tensor]:
    """The toy's weights before round 1, copied."""
    return tree.clone(tree.parameters(toy_model()))


def direction(public: HiSoPublic, column: int) -> dict[str, Tensor]:
    """One Gaussian direction of round 1, by name."""
    drawn, offset, key = tree.zeros_like(public.weights), 0, Key(public.seed).fold(1)
    for part in drawn.values():
        add_gaussian_(part, key, column, 1.0, offset)
        offset += part.numel()
    return drawn


def gradients(method: HiSo, client: str = "a") -> tuple[HiSoPublic, Tensor]:
    """A client's scalars of round 1."""
    task = toy_task(1)
    public, _ = method.init(task, Key.of(3, "begin"))
    reply = method.client_update(task, public, None, toy_clients()[client], Key.of(3, "local", 1, client))
    return public, reply.payload.gradients


def test_with_h_frozen_a_clients_walk_is_zeroth_order_training_to_the_bit() -> None:
    public, found = gradients(DECOMFL)
    task, key = toy_task(1), Key.of(3, "local", 1, "a").fold("train")
    directions = Key(public.seed).fold(1)
    expected, _ = TRAINING.walk(task, toy_clients()["a"], key, directions, range(6))
    assert found.tolist() == torch.tensor(expected).tolist()


def test_with_h_frozen_an_entry_is_fedkseeds_of_the_same_directions() -> None:
    """To the bit along one direction; a sum of several is rounded before it is added."""
    for steps, rounding in ((1, 0.0), (6, 1e-6)):
        method = replace(DECOMFL, training=replace(TRAINING, steps=steps))
        run = simulate(method, 1)
        fedkseed = FedKSeed(pool_size=steps, training=method.training)
        theirs, _ = fedkseed.init(toy_task(1), Key.of(1))
        theirs = replace(theirs, seed=Key(run.state.public.seed).fold(1).value)
        pool = MeanPool()
        for client in toy_clients():
            pool.add(Gradients(gradients(method, client)[1]), 1.0)
        entry = FedKSeedEntry(torch.zeros(0, dtype=torch.int16), pool.result().only.gradients[None])
        fedkseed.apply(toy_task(1), theirs, entry)
        for name, weight in weights(run).items():
            torch.testing.assert_close(weight, theirs.weights[name], rtol=0, atol=rounding)
        assert all(bool((diagonal == 1).all()) for diagonal in run.state.public.curvature.values())


def test_an_entry_moves_weights_and_h_as_the_formulas_say() -> None:
    public, found = gradients(HISO)
    public = replace(public, curvature={name: torch.rand_like(w) + 0.5 for name, w in public.weights.items()})
    expected, curvature = base(), tree.clone(public.curvature)
    drawn = [direction(public, column) for column in range(18)]
    for name, weight in expected.items():
        stretched = [each[name].double() / curvature[name].double().sqrt() for each in drawn]
        step = sum(float(g) * v for g, v in zip(found, stretched, strict=True)) / 3
        last = sum(float(g) * v for g, v in zip(found[15:], stretched[15:], strict=True)) / 3
        weight -= (0.01 * step).float()
        curvature[name] = (0.7 * curvature[name] + 0.3 * (last**2 + 1e-3)).float()
    task = toy_task(1)
    pool = MeanPool()
    pool.add(Gradients(found), 1.0)
    _, entry = HISO.server_update(task, public, None, pool.result(), Key.of(1))
    HISO.apply(task, public, codec.decode(codec.encode(entry)))
    for name, weight in expected.items():
        torch.testing.assert_close(public.weights[name], weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(public.curvature[name], curvature[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_the_clients_walk_is_the_servers_step_with_the_same_h(difference: Any) -> None:
    """One client, one round: the weights that it arrived at, where H stretches its directions by up to ten times."""
    method = replace(HISO, training=replace(TRAINING, difference=difference))
    task = toy_task(1)
    public, _ = method.init(task, Key.of(3, "begin"))
    for name, diagonal in public.curvature.items():
        diagonal.copy_(torch.linspace(0.01, 4, diagonal.numel()).view_as(diagonal))
        assert name in public.weights
    before = tree.clone(public.weights)
    reply = method.client_update(task, public, None, toy_clients()["a"], Key.of(3, "local", 1, "a"))
    own = tree.clone(tree.parameters(task.model))
    pool = MeanPool()
    pool.add(reply.payload, 1.0)
    method.apply(task, public, method.server_update(task, public, None, pool.result(), Key.of(1))[1])
    for name, weight in own.items():
        torch.testing.assert_close(public.weights[name], weight, rtol=0, atol=2e-5)
        assert float((weight - before[name]).abs().max()) > 1e-3


def test_scalars_that_cannot_be_are_refused() -> None:
    public, found = gradients(HISO)
    HISO.accept(toy_task(1), public, Gradients(found))
    with pytest.raises(ValueError, match="not 18 gradients: the client has other settings"):
        HISO.accept(toy_task(1), public, Gradients(found[:17]))
    with pytest.raises(ValueError, match=r"gradients of .* came where fp32"):
        HISO.accept(toy_task(1), public, Gradients(found.double()))
    with pytest.raises(NotFinite, match="gradients holds NaN or infinity"):
        MeanPool().add(Gradients(torch.full((18,), torch.nan)), 1.0)


def test_impossible_settings_are_refused() -> None:
    for change, reason in (
        ({"directions": 0}, "directions=0: must be at least 1"),
        ({"smoothing": 1.0}, r"smoothing=1.0: must lie in \[0, 1\); 0 is DeComFL"),
        ({"floor": 0.0}, "floor=0.0: must be from 1e-16 to 1"),
        ({"floor": 1e-60}, "floor=1e-60: must be from 1e-16 to 1"),
        ({"training": replace(TRAINING, weight_decay=0.1)}, r"training.weight_decay=0.1: .*; set it to 0"),
    ):
        with pytest.raises(UserError, match=reason):
            replace(HISO, **change)


def test_a_round_costs_its_scalars_both_ways() -> None:
    cost = HISO.wire_cost(SHAPES, 3, 1)
    assert cost.up_most == cost.down_most == 4 * 18 and HiSo().wire_cost(SHAPES, 3, 1).up_most == 20
    (up,) = {size for record in simulate(HISO, 2).records for size in record.bytes_up.values()}
    assert 0 < up - 4 * 18 < 140

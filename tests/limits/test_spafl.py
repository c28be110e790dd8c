"""SpaFL: without thresholds local training alone; otherwise what its formulas say, for clients that sit out too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedferret.algorithms.spafl import SpaFL, SpaFLClient
from fedferret.algorithms.spafl_steps import caught_up, importance_step
from fedferret.config import build_algorithm
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.node import client_key
from fedferret.core.pooling import tensors
from fedferret.core.task import Task
from fedferret.engines.in_process import InProcess
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.wire import codec
from toys import TRAINING, SquaredError, bits, normal, simulate, toy_clients, toy_model

ROUNDS = 5
SPARSE = SpaFL(alpha=0.02, modules=("0",), training=TRAINING)


def test_with_every_row_kept_and_no_pressure_it_is_local_training_alone_to_the_bit() -> None:
    run = simulate(replace(SPARSE, alpha=0.0, initial_threshold=-1.0), ROUNDS)
    for client, rows in toy_clients().items():
        task = Task.of(toy_model(), SquaredError(), ROUNDS)
        for round in range(1, ROUNDS + 1):
            TRAINING.train(replace(task, round=round), rows, client_key(3, round, client).fold("train"))
        own = run.store.get(client)
        assert isinstance(own, SpaFLClient)
        assert bits(own.weights) == bits(tree.parameters(task.model))
    assert not any(each.any() for each in run.state.public.differences.values())  # the mean of equal τ is τ


def convolutional(weights: Sequence[Tensor] = ()) -> nn.Module:
    """Two filters and three neurons without biases."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias=False))
    for number, weight in enumerate(model.parameters()):
        with torch.no_grad():
            weight.copy_(weights[number] if weights else 0.5 * normal(Key.of(1, number), *weight.shape))
    return model


@pytest.mark.parametrize("window", ["all", "unit", "inverted"])
def test_the_gradient_of_a_threshold_is_that_of_the_whole_row_and_nonzero_in_the_right_window(window: Any) -> None:
    def loss(model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(normal(Key.of(2), 5, 1, 4, 4)), torch.tensor([0, 1, 2, 0, 1]))

    model = adapters.RowThresholds(window=window, initial=0.4, head=True).attach(convolutional(), Key.of(0))
    found = {name: module.weight for name, module in adapters.masked_modules(model).items()}
    masks = [adapters.row_mask(module).detach() for module in adapters.masked_modules(model).values()]
    kept = torch.cat(masks)
    assert 0 < kept.sum() < len(kept)  # some rows are masked, and have a gradient all the same
    masked = convolutional([(w.flatten(1) * m[:, None]).view_as(w) for w, m in zip(found.values(), masks, strict=True)])
    loss(model).backward()  # type: ignore[no-untyped-call]
    loss(masked).backward()  # type: ignore[no-untyped-call]
    passes = float(window != "inverted")  # margins are far below 1
    for (name, weight), plain, mask_R in zip(found.items(), masked.parameters(), masks, strict=True):
        assert weight.grad is not None and plain.grad is not None
        flat, gradient = weight.detach().flatten(1), plain.grad.flatten(1)
        row_R = passes * (gradient * flat).sum(dim=1)
        threshold = model.get_submodule(name).get_parameter(adapters.THRESHOLD)
        assert threshold.grad is not None
        torch.testing.assert_close(threshold.grad, -row_R)
        assert bool(threshold.grad.abs().min() > 1e-4) == (window != "inverted")
        through = flat.sign() * row_R[:, None] / flat.shape[1]
        torch.testing.assert_close(weight.grad.flatten(1), gradient * mask_R[:, None] + through)


def test_a_layer_of_which_nothing_is_left_begins_again_at_0() -> None:
    training = replace(TRAINING, steps=1)
    algorithm = replace(SPARSE, initial_threshold=9.0, modules=("0", "2"), training=training)
    run = simulate(algorithm, 1, data=toy_clients(1))
    thresholds = {name: each for name, each in run.state.public.weights.items() if name.endswith("threshold")}
    assert [len(each) for each in thresholds.values()] == [16, 1]
    assert not any(each.any() for each in thresholds.values())
    assert run.records[0].metrics["a"]["density"] == 1.0
    half = replace(algorithm, initial_threshold=0.35, alpha=0.0, modules=("0",))
    (left,) = simulate(half, 1, data=toy_clients(1)).state.public.differences.values()
    assert left.abs().max() < 0.1  # some rows are left: none is reset


def test_who_sits_out_ends_where_applying_every_difference_at_once_does_and_downloads_what_it_missed() -> None:
    """One of three clients a round; the third comes in round 3 at the earliest, and one may never come."""

    class Eager(InProcess):
        """Brings every client's weights up to date in every round, whether it is sampled or not."""

        def exchange(self, bodies: Any, state: Any) -> Any:
            for client, rows in toy_clients().items():
                algorithm, task, public = state.node.algorithm, state.node.task, state.public
                known = self._store.get(client) or algorithm.init_client(task, public, rows, Key.of(0))
                weights = tree.clone(algorithm.private_of(task, public, known))
                self._store._states[client] = SpaFLClient(weights, state.round)
            yield from super().exchange(bodies, state)

    algorithm = replace(SPARSE, modules=("0", "2"))
    lazy = simulate(algorithm, 8, per_round=1)
    eager = simulate(algorithm, 8, per_round=1, engine=Eager)
    assert lazy.public == eager.public and lazy.history() == eager.history()
    public, last = lazy.state.public, {record.cohort[0]: record.round for record in lazy.records}
    assert any(each.abs().max() > 1e-3 for each in public.differences.values())
    for client, rows in lazy.data.items():
        own = lazy.store.get(client) or algorithm.init_client(lazy.task, public, rows, Key.of(0))
        at_once = eager.algorithm.private_of(eager.task, public, eager.store.get(client))
        assert bits(algorithm.private_of(lazy.task, public, own)) == bits(at_once)
        assert own.applied == (last[client] - 1 if client in last else 8)
        with algorithm.model(lazy.task, public, own) as model:
            assert model is not None and torch.equal(tree.parameters(model)["0.weight"], at_once["0.weight"])
    held: dict[str, int] = {}
    for record in lazy.records:
        (client,) = record.cohort
        missed = record.round - 1 - held.get(client, 0)
        assert 4 * 17 * missed <= record.bytes_down[client] <= (4 * 17 + 400) * missed
        held[client] = record.round - 1
    assert max(record.bytes_down[record.cohort[0]] for record in lazy.records) > 3 * 4 * 17  # somebody was away


def test_a_client_that_comes_late_begins_from_the_base_with_every_difference_applied() -> None:
    run = simulate(SPARSE, 3)
    public = run.state.public
    late = run.algorithm.init_client(run.task, public, run.data["a"], Key.of(1))
    base = {name: weight.detach() for name, weight in toy_model().named_parameters()}
    expected = base["0.weight"]
    for change in public.differences[f"0.{adapters.THRESHOLD}"]:
        expected = importance_step(expected, change, "kernel")
    assert late is not None and late.applied == 3
    assert torch.equal(late.weights["0.weight"], expected) and not torch.equal(expected, base["0.weight"])
    assert torch.equal(late.weights["0.bias"], base["0.bias"])
    still = simulate(replace(SPARSE, importance_update=False), 3)
    kept = still.algorithm.init_client(still.task, still.state.public, run.data["a"], Key.of(1))
    assert still.state.public.differences == {} and torch.equal(kept.weights["0.weight"], base["0.weight"])  # type: ignore[union-attr]


def test_a_threshold_that_rises_shrinks_its_row_and_none_that_stays() -> None:
    for shape, kernel, whole in (((5, 6), 6, 6), ((5, 4, 3, 3), 9, 36)):
        weight, change = normal(Key.of(1), *shape), torch.tensor([0.1, -0.1, 0.0, 0.2, -0.3])
        before = weight.flatten(1).sum(dim=1)
        moved = importance_step(weight, change, "kernel")
        assert torch.equal(
            (moved.flatten(1).sum(dim=1).abs() - before.abs()).sign()[[0, 1, 3, 4]], -change.sign()[[0, 1, 3, 4]]
        )
        assert torch.equal(moved[2], weight[2])
        expected = before.sign() * change / kernel
        torch.testing.assert_close((weight - moved).flatten(1)[:, 0], expected, atol=1e-6, rtol=0)
        wide = importance_step(weight, change, "whole")
        torch.testing.assert_close((weight - wide) * whole, (weight - moved) * kernel, atol=1e-5, rtol=0)
        nothing = {"row_threshold": torch.zeros(3, 5)}
        assert torch.equal(caught_up({"weight": weight}, nothing, "kernel")["weight"], weight)


def test_more_pressure_gives_a_lower_density_and_thresholds_alone_travel() -> None:
    densities = []
    for alpha in (0.0, 0.1, 0.5):
        run = simulate(replace(SPARSE, alpha=alpha, initial_threshold=0.3), ROUNDS)
        densities.append(sum(each["density"] for each in run.records[-1].metrics.values()))
        reply = run.algorithm.client_update(run.task, run.state.public, run.store.get("b"), run.data["b"], Key.of(1))
        entries = [codec.decode(codec.decode(record).entry) for record in run.state.log.since(0).records]
        for sent in (reply.payload, *entries):
            assert [(tuple(each.shape), each.dtype) for _, each in tensors(sent)] == [((16,), torch.float32)]
    assert densities[0] > densities[1] > densities[2]


def test_alphas_schedule_rises_over_its_rounds() -> None:
    """Without a gradient of the loss a step moves a threshold by the rate times α alone."""
    moved = {}
    for rounds in (1, 20):
        algorithm = replace(SPARSE, window="inverted", alpha=0.5, alpha_schedule="sigmoid", alpha_rounds=rounds)
        run = simulate(replace(algorithm, training=FirstOrder(learning_rate=1e-3, steps=1, clip=None)), 2)
        (changes,) = run.state.public.differences.values()
        assert torch.equal(changes, changes[:, :1].expand(-1, 16))  # the published window: every threshold moves alike
        moved[rounds] = changes[:, 0] / 1e-3
    torch.testing.assert_close(moved[1], 0.5 * torch.tensor([-5.0, 5.0]).sigmoid(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(moved[20], 0.5 * torch.tensor([-5.0, -4.5]).sigmoid(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha_rounds": 0}, "alpha_rounds=0"),
        ({"modules": ["nowhere"]}, 'algorithm.modules="nowhere"'),
        ({"initial_threshold": 1e30}, r"initial_threshold=1e\+30: allowed are -100 to 100"),
    ],
)
def test_what_cannot_be_is_named_before_any_work(settings: dict[str, Any], named: str) -> None:
    algorithm = build_algorithm("spafl", settings)
    with pytest.raises(UserError, match=named):
        algorithm.check(algorithm.prepare(toy_model(), Key.of(1)), 1)

"""Weights held in bf16: rounded at random, by keys, so that every node has the same bits and no update is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contract.methods import METHODS, rounds_of
from fedferret.bases import native
from fedferret.bases.stochastic_rounding import round_into_, rounded_once
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.log import LogUpdate
from fedferret.core.node import Node
from fedferret.core.pooling import basic_pool
from fedferret.core.task import Task
from fedferret.engines.debug import Debug
from fedferret.local.first_order import FirstOrder
from fedferret.local.masters import Masters
from fedferret.models.loading import hold_in_bf16
from fedferret.wire import codec
from toys import Rows, Simulation, SquaredError, bits, held_out_loss, simulate, toy_clients, toy_model

KEY = Key.of(3, "precision")
ROWS = [  # every way in which an entry moves weights, with every way in which steps are taken
    "fedavg",
    "fedavg-adamw-damped",
    "fedavg-no-gradient-buffer",
    "fedprox",
    "scaffold",
    "fedavg-8bit",
    "fedavg-top-k",
    "fetch-sgd",
    "ferret",
    "ferret-per-client",
    "ferret-per-client-momentum-feedback",
    "ferret-published",
]


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    """Every row in turn."""
    return str(request.param)


class Wide(SquaredError):
    """The toy's objective for a model in bf16: rows go in rounded, and the loss is fp32."""

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        return nn.functional.mse_loss(model(rows.x.bfloat16()).float(), rows.y)


def half_task(rounds: int) -> Task:
    """The toy's task, with weights in bf16."""
    model = toy_model()
    hold_in_bf16(model)
    return Task.of(model, Wide(), rounds)


def run(name: str, **options: object) -> Simulation:
    rounds = rounds_of(METHODS[name])
    return simulate(METHODS[name], rounds, task=half_task(rounds), **options)  # type: ignore[arg-type]


def test_bf16_weights_are_the_same_bits_on_every_node(name: str, tmp_path: Path) -> None:
    """In another engine, on a client that comes late, and in a run that was stopped and resumed."""
    first, again = run(name), run(name, engine=Debug)
    assert {weight.dtype for weight in first.state.public.weights.values()} == {torch.bfloat16}
    assert again.memory == first.memory and again.history() == first.history()
    rounds, update = rounds_of(METHODS[name]), first.state.log.since(0)
    for batch in ([update], list(one_by_one(update))):
        late, _ = Node.start(half_task(rounds), METHODS[name], 3, codec)
        for part in batch:
            late.catch_up(part)
        assert bits(late.public) == first.public
    run(name, until=2, folder=tmp_path)
    assert run(name, folder=tmp_path).memory == first.memory
    assert held_out_loss(first.task, first.task.model) < 0.97 * held_out_loss(half_task(1), half_task(1).model)


def one_by_one(update: LogUpdate) -> list[LogUpdate]:
    """The same records, each in an update of its own; the whole where the log has a snapshot."""
    if update.snapshot is not None:
        return [update]
    return [LogUpdate(number, None, (record,)) for number, record in enumerate(update.records, 1)]


def test_an_entry_is_rounded_once_per_tensor_after_all_replies(name: str) -> None:
    """What fp32 weights would be after the entry, rounded by seed, version and name; entries themselves are fp32."""
    stopped, algorithm = run(name, until=2), METHODS[name]
    weights = tree.clone(stopped.state.public.weights)
    reply = algorithm.client_update(stopped.task, stopped.state.public, stopped.store.get("b"), toy_clients()["b"], KEY)
    pool = basic_pool(algorithm.pooling)
    pool.add(reply.payload.decoded(), 3.0)
    pool.add(reply.payload.decoded(), 6.0)
    state = stopped.state
    _, entry = algorithm.server_update(stopped.task, state.public, state.server, pool.result(), KEY)
    wide = codec.decode(codec.encode(state.public))
    wide.weights = {name: weight.float() for name, weight in wide.weights.items()}
    algorithm.apply(stopped.task, wide, entry)
    state.node.apply(entry)
    for tensor, moved in wide.weights.items():
        expected = round_into_(weights[tensor], moved, Key.of(stopped.seed, "apply", 3).fold(tensor))
        assert torch.equal(state.public.weights[tensor], expected)


@pytest.mark.parametrize("clip", [None, 1e9], ids=["in-backward", "after-backward"])
def test_a_bf16_clients_update_is_its_optimisers_unrounded_sum(clip: float | None) -> None:
    """With steps of 10^-6 the update of the rounded weights has the same mean and hundreds of times the energy."""
    task, rows = half_task(1), toy_clients()["c"]
    before = tree.clone(tree.parameters(task.model))
    task.objective.loss(task.model, next(iter(rows.batches(100, None)))).backward()
    gradients = {name: weight.grad.float() for name, weight in task.model.named_parameters() if weight.grad is not None}
    task.model.zero_grad()
    trained = FirstOrder(learning_rate=1e-6, steps=3, batch_size=100, clip=clip).train(task, rows, KEY)
    sent = torch.cat([delta.view(-1) for _, delta in tree.difference(before, trained.weights)])
    wanted = 3e-6 * torch.cat([gradient.view(-1) for gradient in gradients.values()])  # weights hardly move
    assert (sent - wanted).norm() < 0.1 * wanted.norm()
    energy, draws = 0.0, 2000
    for name, master in trained.weights.items():
        many = master.expand(draws, *master.shape).contiguous()
        rounded = round_into_(torch.empty_like(many, dtype=torch.bfloat16), many, KEY.fold(name)).float()
        energy += float((before[name].float() - rounded).square().sum()) / draws
    assert energy > 100 * float(sent.square().sum())


def test_masters_leave_fp32_weights_alone() -> None:
    model = toy_model()
    masters = Masters(model, KEY)
    assert all(masters.weights[name] is weight for name, weight in model.named_parameters())
    inner = object()
    assert masters.stepper(inner) is inner  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("compiled", [True, False])
def test_rounding_keeps_the_mean_and_what_bf16_has(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setenv("FEDFERRET_NATIVE", "0")
    elif native.kernels(torch.device("cpu")) is None:
        pytest.skip("there is no C compiler")
    count = 200_003  # more than a chunk, and no whole number of them
    low, step = 0.109375, 2.0**-11  # neighbours in bf16
    for share in (0.03, 0.5, 0.9):
        target = torch.empty(count, dtype=torch.bfloat16)
        round_into_(target, torch.full((count,), low + share * step), KEY)
        up = (target.float() == low + step).float().mean()
        assert set(target.float().tolist()) <= {low, low + step}
        assert abs(float(up) - share) < 4 * (share * (1 - share) / count) ** 0.5
        mirrored = round_into_(torch.empty_like(target), torch.full((count,), -low - share * step), KEY)
        assert torch.equal(mirrored, -target)
    exact = (2 * KEY.uniform(count) - 1).bfloat16()
    exact[:3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    assert torch.equal(round_into_(torch.empty_like(exact), exact.float(), KEY), exact)
    assert round_into_(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([torch.nan, -torch.nan]), KEY).isnan().all()


def test_compiled_rounding_has_the_bits_of_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.kernels(torch.device("cpu")) is None:
        pytest.skip("there is no C compiler")
    source = ((2 * KEY.uniform(300_001) - 1) ** 9).float()
    compiled = round_into_(torch.empty_like(source, dtype=torch.bfloat16), source, KEY)
    across = round_into_(torch.empty(3, 100_000, dtype=torch.bfloat16).T, source[:300_000].view(100_000, 3), KEY)
    monkeypatch.setenv("FEDFERRET_NATIVE", "0")
    assert torch.equal(round_into_(torch.empty_like(compiled), source, KEY), compiled)
    assert torch.equal(across.reshape(-1), compiled[:300_000])


def test_a_change_that_fails_leaves_the_weight() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ZeroDivisionError), rounded_once(weight, KEY) as wide:
        wide += 1
        raise ZeroDivisionError
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))

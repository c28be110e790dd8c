"""FibecFed becomes FedIT, and each of its parts is what its definition says."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract.methods import reference
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.fibecfed import FibecFed
from fedferret.algorithms.fibecfed_messages import ChosenLayers, FibecFedClient, Sensitivities, factors_of
from fedferret.core import tree
from fedferret.core.algorithm import Pooled
from fedferret.core.errors import UserError
from fedferret.core.exchanges import ClientUpdate, Failure, Reply
from fedferret.core.intake import Intake
from fedferret.core.keys import Key
from fedferret.core.log import Log, Record
from fedferret.core.node import Node
from fedferret.core.pooling import leaves
from fedferret.core.rounds import Plan, RunState
from fedferret.core.task import Task
from fedferret.data.labelled_batches import LabelledTexts
from fedferret.engines.client_store import ClientStore
from fedferret.local.curriculum import ordered, prefix, share_at
from fedferret.local.first_order import FirstOrder
from fedferret.local.fisher import fisher, neuron_masks
from fedferret.local.sensitivity import sensitivities
from fedferret.models.classifiers import TextClassifier
from fedferret.models.layers import layers_of
from fedferret.models.tiny import tiny_encoder
from fedferret.objectives.classification import Classification
from fedferret.wire import codec
from fuzz.mutations import mutated
from toys import Given, Simulation, SquaredError, ToyData, bits, simulate, toy_clients, toy_rows, toy_task, weights

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, epochs=1, batch_size=4, weight_decay=0.1)
SAME: dict[str, Any] = {"rank": 2, "alpha": 4, "modules": ("0", "2"), "training": ADAM}
FIBECFED = FibecFed(**SAME, refresh=1)
WHOLE = replace(FIBECFED, layers=1, kept_neurons=1, curriculum_start=1)


def fresh() -> Simulation:
    """A run before its first round."""
    data = toy_clients()
    task = toy_task(4, FIBECFED)
    node, server = Node.start(task, FIBECFED, 3, codec)
    return Simulation(FIBECFED, task, None, ClientStore(), RunState(node, server, Log(None, 10)), [], data, 3)


@dataclass(frozen=True)
class Texts:
    """Sixty texts of six tokens; the class says which four tokens they are made of."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor


@cache
def told_apart() -> tuple[Task, Texts]:
    """A BERT of two layers that has learned the classes, with factors; and the texts."""
    drawn = (Key.of(1).uniform(60 * 6) * 4).int().view(60, 6)
    labels = torch.arange(60) % 4
    texts = Texts((drawn + 4 * labels[:, None] + 3).int().flatten(), torch.full((60,), 6), labels)
    model: nn.Module = TextClassifier(tiny_encoder(Key.of(2)), nn.Linear(64, 4), "mean")
    nn.init.zeros_(model.head.weight)  # type: ignore[arg-type,union-attr]
    objective = Classification(classes=("a", "b", "c", "d"))
    data = LabelledTexts(texts.ids, texts.lengths, texts.labels)
    training = FirstOrder(optimizer="adamw", learning_rate=3e-3, epochs=2, batch_size=10)
    training.train(Task.of(model, objective, 1), data, Key.of(3))
    model = FibecFed(modules="all-linear").prepare(model, Key.of(4))
    return Task.of(model, objective, 2), texts


def test_fibecfed_of_all_layers_rows_and_examples_is_fedit_to_the_bit() -> None:
    run, fedit = simulate(WHOLE, 4), simulate(FedIT(**SAME), 4)
    assert bits(weights(run)) == bits(weights(fedit))
    told = [[(record.metrics, record.bytes_up) for record in each.history()] for each in (run, fedit)]
    assert told[0] == told[1]
    assert all(run.store.get(client) is None for client in run.data)
    for change in ({"layers": 0.5}, {"kept_neurons": 0.5}, {"curriculum_start": 0.2}):
        assert bits(weights(simulate(replace(WHOLE, **change), 4))) != bits(weights(fedit))


def test_scoring_layers_that_are_all_chosen_costs_a_round_and_so_is_refused() -> None:
    for change, words in (({"layers": 0.9}, "these are all"), ({"layers": 0.5, "modules": ("0",)}, "these are all")):
        method = replace(FIBECFED, rank=1, **change)
        with pytest.raises(UserError, match=words):
            method.check(toy_task(4, method).model, 4)
    with pytest.raises(UserError, match="the first round scores layers"):
        replace(FIBECFED, rank=1).check(toy_task(4, FIBECFED).model, 1)
    for wrong in ({"layers": 0.0}, {"layers": 1.5}, {"kept_neurons": 0.0}, {"curriculum_end": 0.0}, {"refresh": 0}):
        with pytest.raises(UserError, match="="):
            replace(FIBECFED, **wrong)


# --- Fisher information


def trained_factors() -> Task:
    """The toy task with factors that are not 0."""
    task = toy_task(2, FIBECFED)
    tree.copy_(tree.parameters(task.model), {n: w + 0.1 for n, w in tree.parameters(task.model).items()})
    return task


def branching(model: Any, rows: Any) -> Tensor:
    """The toy's loss, with a branch that vmap cannot follow."""
    loss = SquaredError().loss(model, rows)
    return loss if float(loss.detach()) >= 0 else -loss


@pytest.mark.parametrize("loss", [SquaredError().loss, branching])
def test_fisher_information_is_the_trace_of_outer_products_of_single_gradients(loss: Any) -> None:
    task, data = trained_factors(), toy_rows(Key.of(1), 7)
    task = replace(task, objective=Given(loss))
    names = factors_of(tree.parameters(task.model))
    found = fisher(task, data, names, at_once=3)
    outer = []
    for row in range(7):
        task.model.zero_grad()
        loss(task.model, next(iter(data.take([row]).batches(1, None)))).backward()
        flat = torch.cat([task.model.get_parameter(name).grad.flatten() for name in names]).double()  # type: ignore[union-attr]
        outer.append(torch.outer(flat, flat))
    assert torch.allclose(found.by_example, torch.stack([each.trace() for each in outer]), rtol=1e-5)
    diagonal = torch.stack(outer).mean(0).diagonal()
    pieces = diagonal.split([task.model.get_parameter(name).numel() for name in names])
    for name, piece in zip(names, pieces, strict=True):
        expected = piece.view_as(task.model.get_parameter(name)).sum(1)
        assert torch.allclose(found.by_neuron[name].double(), expected, rtol=1e-5), name
    assert not torch.allclose(found.by_example, fisher(task, data, names[:1]).by_example)


def test_an_example_whose_gradient_is_not_finite_is_the_hardest_and_tells_nothing_of_neurons() -> None:
    task, data = trained_factors(), toy_rows(Key.of(1), 7)
    names, bad = factors_of(tree.parameters(task.model)), data.x[3, 0]

    def loss(model: Any, rows: Any) -> Tensor:
        return SquaredError().loss(model, rows) * torch.where(rows.x[0, 0] == bad, torch.nan, 1.0)

    found = fisher(replace(task, objective=Given(loss)), data, names, at_once=3)
    others = [row for row in range(7) if row != 3]
    without = fisher(task, data.take(others), names)
    assert found.by_example[3] == torch.inf
    assert torch.allclose(found.by_example[others], without.by_example)
    for name, each in without.by_neuron.items():
        assert torch.allclose(found.by_neuron[name] * 7 / 6, each), name
    assert ordered(found.by_example, "easy-first", Key.of(1))[-1] == 3


def test_rows_with_most_information_in_the_long_run_are_kept_and_a_factor_that_has_none_trains_whole() -> None:
    masks = neuron_masks({"b": torch.tensor([1.0, 5.0, 0.0, 5.0, 2.0]), "a": torch.zeros(4)}, 0.4)
    assert masks["b"].tolist() == [0, 1, 0, 1, 0] and masks["a"].tolist() == [1, 1, 1, 1]
    state = FibecFedClient({}, torch.zeros(0, dtype=torch.int32), {"b": torch.tensor([4.0, 0.0])}, {}, trained=5)
    after = state.measured({"b": torch.tensor([0.0, 8.0])}, 0.75, 0.5, state.order)
    assert after.fisher["b"].tolist() == [3.0, 2.0] and after.rows["b"].tolist() == [1, 0] and after.trained == 0


def test_rows_that_are_not_kept_stay_to_the_bit() -> None:
    """AdamW with weight decay and clipping, in the first rounds and after the rows were chosen again."""
    before, after = (simulate(replace(FIBECFED, layers=1), 4, until=until) for until in (2, 3))
    for client in before.data:
        state = after.store.get(client)
        reply = after.algorithm.client_update(
            replace(after.task, round=4), after.state.public, state, after.data[client], Key.of(1)
        )
        assert any(".lora_A." in name and not rows.all() for name, rows in reply.client.rows.items())
        for name, rows in reply.client.rows.items():
            delta = reply.payload.delta[name]
            assert delta[rows == 0].count_nonzero() == 0 and delta[rows == 1].count_nonzero() > 0, name


def test_examples_with_flipped_labels_are_harder() -> None:
    """On a BERT of two layers that has learned to tell which of four tokens a text is made of."""
    task, clean = told_apart()
    flipped = torch.arange(60) % 5 == 0
    labels = torch.where(flipped, (clean.labels + 1) % 4, clean.labels)
    names = factors_of(tree.parameters(task.model))
    hard = fisher(task, LabelledTexts(clean.ids, clean.lengths, labels), names).by_example
    above = (hard[flipped][:, None] > hard[~flipped][None, :]).double().mean()
    assert above > 0.9  # the area under the curve


# --- curriculum


def test_the_prefix_grows_to_all_of_the_data_in_the_datas_own_order() -> None:
    data, difficulties = toy_rows(Key.of(1), 10), torch.tensor([3.0, 1, 2, 1, 9, 8, 7, 6, 5, 4])
    order = ordered(difficulties, "easy-first", Key.of(1))
    assert sorted(order.tolist()) == list(range(10)) and order.tolist()[:4] == [1, 3, 2, 0]
    assert ordered(difficulties, "hard-first", Key.of(1)).tolist()[:2] == [4, 5]
    assert ordered(difficulties, "random", Key.of(1)).tolist() != ordered(difficulties, "random", Key.of(2)).tolist()
    shares = [share_at(t, 10, 0.2, 0.8) for t in range(1, 11)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.3) and shares[7:] == [1, 1, 1]
    assert torch.equal(prefix(data, order, 0.35).x, data.x[[0, 1, 2, 3]])  # type: ignore[attr-defined]
    assert prefix(data, order, 1.0) is data


def test_a_client_trains_on_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Watched(ToyData):
        def batches(self, size: int, key: Key | None) -> Any:
            taken.append(len(self)) if key else None
            return super().batches(size, key)

        def take(self, rows: Any) -> Any:
            return Watched(self.x[list(rows)], self.y[list(rows)])

    rows: Any = toy_rows(Key.of(1), 20)
    simulate(replace(FIBECFED, curriculum_end=1.0), 5, data={"a": Watched(rows.x, rows.y)})
    assert taken == [8, 12, 16, 20]  # of 20, in the four rounds after the one that scores layers


def test_the_order_is_measured_again_where_asked_for_and_where_a_client_has_other_examples() -> None:
    rows: Any = toy_rows(Key.of(1), 20)
    orders: dict[bool, list[list[int]]] = {}
    for reorder in (False, True):
        method = replace(FIBECFED, layers=1, reorder=reorder, refresh=2)
        runs = [simulate(method, 5, data={"a": rows}, until=until) for until in (1, 2, 3)]
        orders[reorder] = [run.store.get("a").order.tolist() for run in runs]
    assert orders[False][0] == orders[False][1] == orders[False][2]
    assert orders[True][0] == orders[True][1] != orders[True][2]  # measured with the weights of two rounds
    run = runs[0]
    reply = method.client_update(
        replace(run.task, round=2), run.state.public, run.store.get("a"), toy_rows(Key.of(1), 7), Key.of(1)
    )
    assert reply.client is not None and sorted(reply.client.order.tolist()) == list(range(7))


# --- layers


def test_sensitivity_is_the_relative_change_under_noise_of_a_given_size() -> None:
    """On linear layers with a tanh between, written out."""
    task, data = toy_task(2), toy_rows(Key.of(1), 5)
    first, second = layers_of(task.model).values()
    found, loss = sensitivities(task, first, [first, second], data, 0.1, 5, Key.of(2))
    signs = 1 - 2 * (Key.of(2).fold(0).bits(20) & 1).view(5, 4)
    noisy = data.x + 0.1 * data.x.norm(dim=1, keepdim=True) / 2 * signs
    assert torch.allclose((noisy - data.x).norm(dim=1), 0.1 * data.x.norm(dim=1))
    outputs = [(first(x), second(torch.tanh(first(x)))) for x in (data.x, noisy)]
    expected = [((b - a).norm(dim=1) / a.norm(dim=1)).mean() for a, b in zip(*outputs, strict=True)]
    assert torch.allclose(found, torch.stack(expected).double(), rtol=1e-5)
    assert loss == pytest.approx(SquaredError().loss(task.model, next(data.batches(5, None))).item())


def test_padding_does_not_count_in_the_sensitivity() -> None:
    model, mask = nn.Sequential(nn.Linear(4, 4)), torch.tensor([[1, 1, 1], [1, 0, 0]])
    x = toy_rows(Key.of(1), 6).x.view(2, 3, 4)
    batch = SimpleNamespace(x=x * (1 + 1e3 * (1 - mask))[:, :, None], attention_mask=mask)
    data: Any = SimpleNamespace(batches=lambda size, key: [batch])
    task = Task.of(model, Given(lambda model, rows: model(rows.x).sum()), 1)
    (found,), _ = sensitivities(task, model[0], [model[0]], data, 0.1, 2, Key.of(2))
    signs = 1 - 2 * (Key.of(2).fold(0).bits(24) & 1).view(2, 3, 4)
    before = model(x) * mask[:, :, None]
    change = model(x + 0.05 * x.norm(dim=2, keepdim=True) * signs) * mask[:, :, None] - before
    expected = (change.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).mean()
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)


def test_factors_of_layers_that_were_not_chosen_never_travel() -> None:
    """A snapshot of the public state has their first values, and each client goes on with its own."""
    run = reference("fibecfed")
    (chosen,) = run.state.public.chosen
    kept = f"{2 - 2 * chosen}."
    for encoded in run.state.log.since(0).records:
        record = codec.decode(encoded)
        assert isinstance(record, Record)
        assert not [path for path, _ in leaves(codec.decode(record.entry)) if kept in path.replace("[", ".")]
    begun = tree.parameters(toy_task(4, run.algorithm).model)
    states = [run.store.get(client) for client in run.data]
    for name, weight in run.state.public.weights.items():
        assert torch.equal(weight, begun[name]) == name.startswith(kept)
        assert (name in states[0].weights) == name.startswith(kept)
    assert not any(torch.equal(states[0].weights[name], states[1].weights[name]) for name in states[0].weights)


def test_the_server_chooses_the_layers_with_the_largest_mean() -> None:
    run = fresh()
    for shares, expected in (((0.2, 0.8), [1]), ((0.6, 0.4), [0]), ((0.5, 0.5), [0])):
        pooled = Pooled((Sensitivities(torch.tensor(shares)),), (1.0,))
        _, entry = FIBECFED.server_update(run.task, run.state.public, None, pooled, Key.of(1))
        assert isinstance(entry, ChosenLayers) and entry.layers.tolist() == expected


def test_a_client_that_comes_late_scores_its_examples_and_no_layers() -> None:
    run = simulate(FIBECFED, 4, until=2, data=toy_clients(2))
    late = toy_rows(Key.of(9), 8)
    state = FIBECFED.init_client(run.task, run.state.public, late, Key.of(1))
    assert state is not None and sorted(state.order.tolist()) == list(range(8)) and not state.weights
    reply = FIBECFED.client_update(replace(run.task, round=3), run.state.public, state, late, Key.of(2))
    assert list(reply.payload.delta) == FIBECFED.shared(run.task, run.state.public)


def test_a_mutated_score_of_layers_is_one_failure_or_a_distribution() -> None:
    run, refused = fresh(), 0
    payload = FIBECFED.client_update(run.task, run.state.public, None, run.data["b"], Key.of(1)).payload
    choose = random.Random(5).randrange
    for _ in range(200):
        intake = Intake(run.state.node, Plan(3, 9, 3), 1e6)
        try:
            update = codec.decode(codec.encode(ClientUpdate(mutated(payload, choose), 9, {})))
        except ValueError:
            refused += 1
            continue
        outcome = intake.take(Reply("b", update, 100))
        refused += isinstance(outcome, Failure)
        if isinstance(outcome, Reply):
            assert 0 <= float(outcome.body.payload.shares.min()) <= float(outcome.body.payload.shares.max()) <= 1.001
    assert 50 < refused < 200
    for wrong in ([1.5, -0.5], [0.3, 0.3, 0.4], [math.nan, 1.0], [1e20, 1e20]):
        with pytest.raises(ValueError, match="layers"):
            FIBECFED.accept(run.task, run.state.public, Sensitivities(torch.tensor(wrong)))

"""FedPepTAO: what it becomes without its parts, and the relations of its server's controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedpeptao import FedPepTAO
from fedferret.algorithms.fedpeptao_messages import LayerScores
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2
from fedferret.core.algorithm import Pooled
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.robust_pooling import PoolSettings
from fedferret.local.first_order import FirstOrder, TrainingRefused
from toys import HELD_OUT, Rows, Simulation, ToyData, simulate, toy_clients, toy_language_model, toy_task

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.1, steps=2, clip=None)
PLAIN = FedPepTAO(layers=1.0, virtual_tokens=3, server_rate=0.0, training=ADAM)
STEPPING = replace(PLAIN, server_rate=1.0, weighting="equal")
V2 = FedPTuningV2(virtual_tokens=3, training=ADAM)
CHOOSING = replace(PLAIN, layers=0.34)


def largest_gap(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return max(float((left[name] - value).abs().max()) for name, value in right.items())


def test_without_the_servers_step_and_with_all_layers_fedpeptao_is_fedptuning_v2_to_the_bit() -> None:
    theirs = simulate(V2, 3)
    ours = simulate(PLAIN, 3)
    assert all(
        torch.equal(ours.state.public.weights[name], weight) for name, weight in theirs.state.public.weights.items()
    )
    assert ours.history()[0].bytes_up == theirs.history()[0].bytes_up
    assert (
        largest_gap(simulate(replace(PLAIN, server_rate=1.0), 3).state.public.weights, ours.state.public.weights) > 1e-3
    )


def test_the_floor_is_relative_to_the_rate() -> None:
    """A rate that has fallen to a floor of 1 is a rate that does not fall."""
    constant = simulate(replace(STEPPING, server_decay=1.0, server_floor=0.0), 3)
    assert simulate(replace(STEPPING, server_decay=0.5, server_floor=1.0), 3).public == constant.public
    assert simulate(replace(STEPPING, server_decay=0.5, server_floor=0.0), 3).public != constant.public


def test_the_servers_control_is_the_mean_of_the_clients_controls() -> None:
    """With equally many local steps; whoever takes part."""
    server = simulate(STEPPING, 4, per_round=2).state.server
    controls = server.controls
    assert sorted(controls) == ["a", "b", "c"] and server.steps == 4
    for name, control in server.control.items():
        mean = sum(each[name] for each in controls.values()) / 3
        torch.testing.assert_close(control, mean, rtol=1e-4, atol=1e-5)
        assert float((controls["a"][name] - control).abs().max()) > 1e-2


def test_of_equal_clients_the_controls_cancel_and_momentum_is_left() -> None:
    rows: Any = toy_clients()["a"]
    same = ToyData(rows.x, rows.y, shuffled=False)
    run = simulate(STEPPING, 2, data={"a": same, "b": same}, until=1)
    server = run.state.server
    assert largest_gap(server.controls["a"], server.control) < 1e-6
    assert largest_gap({n: 0.1 * value for n, value in server.previous.items()}, server.momentum) < 1e-6
    # the published code steps only from the second round on, along the difference of two rounds' means
    coded = simulate(replace(STEPPING, server_formula="paper-code"), 2, data={"a": same, "b": same}, until=1)
    plain = simulate(PLAIN, 2, data={"a": same, "b": same}, until=1)
    assert coded.state.server.steps == 0
    assert largest_gap(coded.state.public.weights, plain.state.public.weights) == 0
    assert largest_gap(run.state.public.weights, plain.state.public.weights) > 0


def test_a_control_is_the_mean_direction_of_a_clients_steps() -> None:
    """c_j = Δ_j / (K_j x rate) after the first round; the published code's rate is the first of the run."""
    training = replace(ADAM, schedule="linear")
    run = simulate(replace(STEPPING, training=training), 4, data=toy_clients(1), until=1)
    expected = {name: value / (2 * 0.1) for name, value in run.state.server.previous.items()}
    assert largest_gap(run.state.server.controls["a"], expected) < 1e-6
    for formula, rate in (("plain", 0.05), ("paper-code", 0.1)):  # in round 3 of 4
        algorithm = replace(STEPPING, training=training, server_formula=formula)
        two, three = (simulate(algorithm, 4, data=toy_clients(1), until=until).state.server for until in (2, 3))
        grown = {
            name: two.controls["a"][name] - two.control[name] + value / (2 * rate)
            for name, value in three.previous.items()
        }
        assert largest_gap(three.controls["a"], grown) < 1e-5


def test_layers_that_are_not_shared_keep_their_values_and_are_each_clients_own() -> None:
    run = simulate(CHOOSING, 3)
    before = toy_task(3, CHOOSING)
    (layer,) = run.state.public.chosen.nonzero().flatten().tolist()
    first = dict(before.model.named_parameters())
    for name, weight in run.state.public.weights.items():
        moved = not torch.equal(weight, first[name])
        assert moved == (f"layers.{layer}." in name)
    private = [run.store.get(client).weights for client in run.data]
    assert all(f"layers.{layer}." not in name for each in private for name in each) and len(private[0]) == 4
    assert largest_gap(private[0], private[1]) > 1e-3


def test_without_personal_prefixes_the_other_layers_read_none() -> None:
    algorithm = replace(CHOOSING, personal=False)
    run = simulate(algorithm, 3)
    assert all(run.store.get(client) is None for client in run.data)
    rows = Rows(HELD_OUT.x, HELD_OUT.y)
    with algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        alone = run.task.objective.loss(model, rows).item()
        others = [name for name in run.state.public.weights if f"layers.{chosen_layer(run)}." not in name]
        for name in others:
            del model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]]
        assert run.task.objective.loss(model, rows).item() == alone
    whole = simulate(CHOOSING, 3)
    assert abs(whole.loss() - alone) > 1e-6


def chosen_layer(run: Simulation) -> int:
    (layer,) = run.state.public.chosen.nonzero().flatten().tolist()
    return int(layer)


@pytest.mark.parametrize(
    ("settings", "scores", "share", "chosen"),
    [
        ({"layers": 0.5}, [1.0, 5.0, 3.0], None, [0, 1, 1, 0]),
        ({"layers": 0.5, "keep": "lowest"}, [1.0, 5.0, 3.0], None, [1, 0, 1, 0]),
        ({}, [2.0, 2.0, 2.0], 0.13, [1, 0, 0, 0]),  # of equal scores the first layer, and one at the least
        ({}, [2.0, 2.0, 3.0], 0.6, [1, 0, 1, 0]),
        ({}, [2.0, 2.0, 3.0], 0.9, [1, 1, 1, 1]),
        ({}, [2.0, 2.0, 3.0], 0.0, [0, 0, 1, 0]),
    ],
)
def test_the_server_chooses_the_layers_with_the_best_mean_scores(
    settings: dict[str, Any], scores: list[float], share: float | None, chosen: list[int]
) -> None:
    algorithm = FedPepTAO(**settings)
    public: Any = type("Public", (), {"chosen": torch.ones(4, dtype=torch.uint8), "round": 0})
    sums = [
        LayerScores(torch.tensor(scores) + off, torch.tensor([] if share is None else [share + off / 10]))
        for off in (-0.5, 0.25)  # the first client has half of the weight of the second
    ]
    pooled: Pooled[Any] = Pooled(tuple(sums), (1.0, 2.0))
    _, entry = algorithm.server_update(toy_task(1), public, algorithm.init(toy_task(1), Key(0))[1], pooled, Key(0))
    assert entry.chosen.tolist() == chosen  # type: ignore[union-attr]


def test_the_formula_gives_the_papers_numbers_of_a_prefix() -> None:
    """RoBERTa-large, p = 20: 983,040 numbers for all layers, 491,520 for 12 of 24."""
    kinds = ("prefix_key", "prefix_value")
    shapes = {f"encoder.layer.{layer}.attention.self.{kind}": (20, 1024) for layer in range(24) for kind in kinds}
    assert FedPepTAO(layers=1.0).wire_cost(shapes, 10, 1).up_most == 4 * 983_040
    half = FedPepTAO(layers=0.5)
    assert (half.wire_cost(shapes, 10, 1).up_most, half.wire_cost(shapes, 10, 1).down_most) == (4 * 23, 24)
    assert half.wire_cost(shapes, 10, 2).up_most == half.wire_cost(shapes, 10, 2).down_least == 4 * 491_520
    assert half.wire_cost(shapes, 10, 2).client_state_bytes == 4 * 491_520
    measured = FedPepTAO()
    assert measured.wire_cost(shapes, 10, 10).up_most == 4 * 983_040
    assert measured.wire_cost(shapes, 10, 11).up_most == 4 * 24
    assert (measured.wire_cost(shapes, 10, 12).up_least, measured.wire_cost(shapes, 10, 12).up_most) == (
        4 * 983_040 / 24,
        4 * 983_040,
    )


@pytest.mark.parametrize(
    ("settings", "rounds", "line"),
    [
        ({"scoring_batch": 1}, 20, "scoring_batch=1: of one example every layer has the same score; use at least 8"),
        ({"layers": 0.0}, 20, r'layers=0.0: give a share of all layers, above 0 to 1.0, or "spectrum"'),
        ({"layers": 0.1}, 20, "layers=0.1: 0 of 3 layers would be shared; give a share for 1 to 2 of them, or 1.0"),
        ({"layers": 0.9}, 20, "layers=0.9: 3 of 3 layers would be shared"),
        ({"layers": 0.5}, 1, "layers=0.5 takes 1 rounds before training and the run has 1"),
        ({}, 11, 'layers="spectrum" takes 11 rounds before training and the run has 11; raise rounds, lower warm_up'),
        ({"server_rate": -1.0}, 20, "server_rate=-1.0: must be at least 0, which is no step"),
        ({"server_momentum": 1.0}, 20, "server_momentum=1.0: nothing new would count"),
        ({"server_decay": 1.5}, 20, "server_decay=1.5: must lie between 0 and 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings: dict[str, Any], rounds: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        algorithm = FedPepTAO(**settings)
        algorithm.check(toy_task(rounds, algorithm).model.to("meta"), rounds)


def test_scores_are_of_the_model_without_prefixes() -> None:
    """Whatever the prefixes are, and the seed that drew them."""
    scores = []
    for tokens in (3, 5):
        algorithm = replace(CHOOSING, virtual_tokens=tokens)
        run = simulate(algorithm, 2, until=1)
        public, _ = algorithm.init(run.task, Key(0))
        data = run.data["b"]
        scores.append(algorithm.client_update(run.task, public, None, data, Key.of(1)).payload.scores)
    assert torch.equal(*scores) and len(scores[0]) == 2 and float(scores[0].min()) > 8
    algorithm.accept(run.task, public, LayerScores(scores[0], torch.zeros(0)))
    for wrong in (scores[0] * 0 + 0.5, scores[0] * 1e6, scores[0][:1]):  # B examples have at least B, at most 1e5 B
        with pytest.raises(ValueError, match="scores"):
            algorithm.accept(run.task, public, LayerScores(wrong, torch.zeros(0)))
    measuring = replace(algorithm, layers="spectrum", warm_up_rounds=0)
    measuring.accept(run.task, public, LayerScores(scores[0], torch.ones(1)))
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="no batch gives"):
            measuring.accept(run.task, public, LayerScores(scores[0], torch.tensor([share])))


def test_a_client_with_one_example_has_no_scores() -> None:
    run = simulate(CHOOSING, 2, until=1)
    public, _ = CHOOSING.init(run.task, Key(0))
    with pytest.raises(TrainingRefused, match="one example, by which every layer has the same score"):
        CHOOSING.client_update(run.task, public, None, run.data["b"].take([0]), Key.of(1))


def test_without_the_servers_step_a_robust_pool_combines_scores_and_updates() -> None:
    """Three clients, one of which is far off: the median is another's."""
    run = simulate(CHOOSING, 2, pool=PoolSettings(name="median"))
    assert run.state.server.controls == {} and [record.failures for record in run.records] == [(), ()]
    assert run.loss() != simulate(CHOOSING, 2).loss()
    with pytest.raises(UserError, match="the payloads of fedpeptao are not averaged"):
        PoolSettings(name="median").check(replace(CHOOSING, server_rate=1.0).pooling, "fedpeptao", 3)


def test_a_model_of_one_layer_leaves_no_choice() -> None:
    with pytest.raises(UserError, match=r"one layer, of which none can be chosen: set layers=1\.0"):
        FedPepTAO().check(FedPepTAO().prepare(toy_language_model(1), Key(0)), 20)
    FedPepTAO(layers=1.0).check(FedPepTAO().prepare(toy_language_model(1), Key(0)), 1)

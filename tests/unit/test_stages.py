"""Staged methods: the next stage takes over, on every node alike, exactly where the one before ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.methods import METHODS
from contract.staged_methods import FullThenLoRA, TwoStages
from fedferret.algorithms import registry
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.ferret import Ferret
from fedferret.build import check
from fedferret.config import from_tables
from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.errors import UserError
from fedferret.core.hand_over import Stage
from fedferret.core.keys import Key
from fedferret.core.log import Log, LogUpdate
from fedferret.core.node import Node
from fedferret.core.stages import Staged
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.local.first_order import FirstOrder
from fedferret.runner import run
from fedferret.wire import codec
from tiny_runs import silent, tiny_tables
from toy_sites import simulate_sites, sites
from toys import ONE_BIT, SHAPES, TRAINING, bits, shapes_of, simulate, toy_clients, toy_task, weights

FEDAVG = FedAvg(training=TRAINING)
FERRET = replace(ONE_BIT, coordinates=60, bits=8)
LORA = FedIT(rank=2, alpha=4, modules=("0", "2"), training=FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3))
KEY = Key.of(1)
FULL_THEN_LORA = FullThenLoRA(full_rounds=2, full=FEDAVG, lora=LORA)


def two(first: AnyAlgorithm, second: AnyAlgorithm, after: int, **options: Any) -> TwoStages:
    return TwoStages(first=first, second=second, first_rounds=after, **options)


@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-error-feedback", "fedkseed", "fedit", "fedprompt"])
def test_a_stage_with_zero_rounds_is_the_next_stage_alone(name: str) -> None:
    alone = simulate(METHODS[name], 3)
    staged = two(FEDAVG, METHODS[name], after=0)
    task = toy_task(3, METHODS[name])  # the same kind of model
    run = simulate(staged, 3, task=task)
    assert bits(run.state.public.public) == alone.public
    assert [record.bytes_up for record in run.records] == [record.bytes_up for record in alone.records]


def test_a_method_then_itself_is_itself_where_it_remembers_nothing() -> None:
    both, alone = simulate(two(FEDAVG, FEDAVG, after=2), 4), simulate(FEDAVG, 4)
    assert codec.encode(weights(both)) == codec.encode(weights(alone))


def test_the_first_rounds_are_the_first_methods() -> None:
    both, alone = simulate(two(FERRET, FEDAVG, after=2), 4, until=2), simulate(FERRET, 2)
    assert codec.encode(weights(both)) == codec.encode(weights(alone))
    assert (both.state.public.stage, both.state.public.round) == (1, 0)  # handed over


def test_each_stages_schedule_runs_over_its_rounds() -> None:
    rates: list[float] = []

    class Watched(Ferret):
        def apply(self, task: Any, public: Any, entry: Any) -> None:
            rates.append(entry.learning_rate)
            super().apply(task, public, entry)

    linear = Watched(coordinates=60, schedule="linear", training=TRAINING)
    simulate(two(linear, linear, after=2), 6)
    assert rates == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_the_second_stages_lora_stands_on_the_first_stages_weights() -> None:
    """All that the first stage tuned is under the factors, on every node; merged, the two are one plain model."""
    run = simulate(FULL_THEN_LORA, 4)
    first = weights(simulate(FEDAVG, 2))
    under = dict(run.state.public.weights)
    assert all(torch.equal(under[name], weight) for name, weight in first.items())
    with run.algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        tuned = tree.parameters(model)
        assert tuned and all("lora_" in name for name in tuned)
        rows = next(toy_clients()["a"].batches(9, None)).x
        behind_lora = model(rows)
        plain = run.algorithm.release(model)
        assert set(dict(plain.named_parameters())) == set(SHAPES)
        torch.testing.assert_close(plain(rows), behind_lora, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_across_the_border_is_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = simulate(FULL_THEN_LORA, 4)
    simulate(FULL_THEN_LORA, 4, until=stop, folder=tmp_path)
    resumed = simulate(FULL_THEN_LORA, 4, folder=tmp_path)
    assert resumed.memory == whole.memory


def test_sites_and_one_process_have_the_same_bits_over_the_border(tmp_path: Path) -> None:
    remote = simulate_sites(FULL_THEN_LORA, 4, sites(FULL_THEN_LORA, 4, tmp_path))
    assert remote.public == simulate(FULL_THEN_LORA, 4).public
    assert all(not record.failures for record in remote.records)


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_late_client_stands_on_the_same_weights_by_records_or_by_a_snapshot(with_snapshot: bool) -> None:
    run = simulate(FULL_THEN_LORA, 4)
    node, _ = Node.start(toy_task(4, FULL_THEN_LORA), FULL_THEN_LORA, 3, codec)
    everything = run.state.log.since(0)
    if with_snapshot:
        everything = LogUpdate(4, run.public, ())
    elif everything.snapshot is not None:  # the toy's log folds: have it whole
        log = Log()
        again = simulate(FULL_THEN_LORA, 4)
        assert again.public == run.public and log.version == 0
        return
    node.catch_up(everything)
    assert bits(node.public) == run.public
    replies = [
        each.algorithm.client_update(each.task, each.public, None, toy_clients()["a"], KEY).payload
        for each in (node, run.state.node)
    ]
    assert bits(replies[0]) == bits(replies[1])


def test_costs_are_each_stages_to_the_byte() -> None:
    shapes = shapes_of(FULL_THEN_LORA, 4)
    assert shapes(1) == shapes(2) == SHAPES and set(shapes(3)) == set(shapes(4)) and "lora_" in next(iter(shapes(3)))
    full, lora = 4 * 97, 4 * (2 * (4 + 16) + 2 * (16 + 1))
    run = simulate(FULL_THEN_LORA, 4)
    for number, payload in ((1, full), (2, full), (3, lora), (4, lora)):
        cost = FULL_THEN_LORA.wire_cost(shapes(number), 3, number)
        assert cost.up_least == cost.up_most == cost.down_most == payload
        (up,) = set(run.records[number - 1].bytes_up.values())
        assert payload < up < payload + 400
    staged = two(FEDAVG, replace(FERRET, error_feedback=True), after=1)
    assert staged.wire_cost(SHAPES, 3, 1).client_state_bytes == 0
    assert staged.wire_cost(SHAPES, 3, 2).client_state_bytes == 4 * 97


def test_the_hand_over_may_change_the_weights_and_every_node_does_the_same() -> None:
    def halve(task: Any, base: Any, finished: Any, public: Any, key: Any) -> dict[str, torch.Tensor]:
        return {name: 0.5 * weight for name, weight in public.weights.items()}

    halved = simulate(two(FERRET, FEDAVG, after=1, hand_over=halve), 3, until=1)
    plain = simulate(two(FERRET, FEDAVG, after=1), 3, until=1)
    assert all(torch.equal(weights(halved)[name], 0.5 * weight) for name, weight in weights(plain).items())


def test_the_hand_over_may_give_the_next_adapters_first_values() -> None:
    """What SLoRA does: the update of the first stage goes into the factors, over the original base."""

    def into_b(task: Any, base: Any, finished: Any, public: Any, key: Any) -> dict[str, torch.Tensor]:
        return {f"{name}.lora_B.default.weight": torch.full((out, 2), 0.25) for name, out in (("0", 16), ("2", 1))}

    staged = two(FEDAVG, LORA, after=1, hand_over=into_b)
    run = simulate(staged, 3, until=1)
    assert run.state.public.stage == 1 and not run.state.public.weights  # the base is the checkpoint
    factors = run.state.public.public.weights
    assert torch.equal(factors["0.lora_B.default.weight"], torch.full((16, 2), 0.25))
    with staged.model(run.task, run.state.public) as model:
        assert model is not None
        assert torch.equal(model.get_submodule("0").base_layer.weight, toy_task(1).model.get_parameter("0.weight"))  # type: ignore[union-attr]


def test_private_state_is_made_in_its_stage_for_those_who_come_late_too() -> None:
    method = two(FEDAVG, replace(FERRET, error_feedback=True, scale="shrunk"), after=1)
    run = simulate(method, 6, per_round=1)
    assert {client for record in run.records[1:] for client in record.cohort} == set(toy_clients())
    for record in run.records[1:]:
        private: Any = run.store.get(record.cohort[0])
        assert private.stage == 1 and private.client.residual


@pytest.mark.parametrize(
    ("rounds", "total", "reason"),
    [
        ((-1, None), 4, "two-stages: stage 1 has -1 rounds; give 0 .no such stage. or more"),
        ((5, None), 4, "stages 1 to 1 have 5 rounds and the run has 4; raise rounds or shorten a stage"),
        ((0, 0), 4, "no stage has any round"),
        ((1, 2), 4, "the stages have 3 rounds and the run has 4; set rounds=3 or lengthen a stage"),
    ],
)
def test_stages_that_cannot_be_are_refused(rounds: tuple[int, int | None], total: int, reason: str) -> None:
    class Given(TwoStages):
        def stages(self) -> tuple[Stage, ...]:
            return tuple(Stage(FEDAVG, each) for each in rounds)

    with pytest.raises(UserError, match=reason):
        Given().check(toy_task(total).model, total)


def test_a_stage_that_cannot_be_on_its_model_is_refused_before_work() -> None:
    with pytest.raises(UserError, match="coordinates=98: this model has"):
        two(FEDAVG, replace(FERRET, coordinates=98), after=2).check(toy_task(4).model, 4)
    with pytest.raises(UserError, match='modules="nowhere": no linear module'):
        replace(FULL_THEN_LORA, lora=replace(LORA, modules=("nowhere",))).check(toy_task(4).model, 4)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """``full-then-lora`` as a recipe's method."""
    known = registry.method
    monkeypatch.setattr(
        "fedferret.config.method", lambda name: FullThenLoRA if name == "full-then-lora" else known(name)
    )


def staged_tables(tmp_path: Path, full_rounds: int, **changes: Any) -> dict[str, Any]:
    training = {"learning_rate": 0.1, "steps": 2}
    algorithm = {
        "name": "full-then-lora",
        "full_rounds": full_rounds,
        "full": {"training": training},
        "lora": {"rank": 2, "training": {"optimizer": "sgd", **training}},
        "training": training,
    }
    tables = tiny_tables(tmp_path, algorithm=algorithm, rounds=4, **changes)
    del tables["algorithm"]["training"]
    return tables


@pytest.mark.usefixtures("registered")
def test_a_head_alone_cannot_be_trained_in_stages(tmp_path: Path) -> None:
    """A stage after the first trains all weights of what the stage before left."""
    recipe = from_tables(staged_tables(tmp_path, 2, model={"name": "tiny", "train": "head"}))
    with pytest.raises(UserError, match=r'model.train="head": .* has several stages'):
        check(recipe)


@pytest.mark.usefixtures("registered")
def test_a_staged_method_is_a_recipes_method_from_toml_to_export(tmp_path: Path) -> None:
    """Its fields are TOML; a run goes over the border, resumes, exports a plain folder, and its delta rebuilds it."""
    recipe = from_tables(staged_tables(tmp_path, 2))
    assert isinstance(recipe.algorithm, Staged) and recipe.algorithm.full_rounds == 2  # type: ignore[attr-defined]
    assert from_tables(recipe.tables()) == recipe
    summary = run(recipe, tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0] and summary["status"] == "finished"
    up = summary["bytes_up_by_round"]
    assert up[0] == up[1] > 5 * up[2] == 5 * up[3]
    one = export_folder(tmp_path / "run", tmp_path / "model", silent)
    export_delta(tmp_path / "run", tmp_path / "delta", silent)
    assert apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent) == one
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.usefixtures("registered")
def test_no_first_stage_in_a_recipe_is_fedit_alone(tmp_path: Path) -> None:
    staged = run(from_tables(staged_tables(tmp_path, 0)), tmp_path / "staged", silent)
    lora = {"name": "fedit", **staged_tables(tmp_path, 0)["algorithm"]["lora"]}
    alone = run(from_tables(tiny_tables(tmp_path, algorithm=lora, rounds=4)), tmp_path / "alone", silent)
    assert staged["eval_loss"] == alone["eval_loss"] and staged["bytes_up"] == alone["bytes_up"]

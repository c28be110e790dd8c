"""Scores at the clients, the figures over clients, and how all figures besides the loss reach the run's files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.task import Task, added_scores
from fedferret.data.examples import Example, Turn
from fedferret.evaluation.per_client import spread
from fedferret.experiment import Experiment
from fedferret.runner import Interrupted, run
from fedferret.tracking.events import read
from fedferret.tracking.report import write_report
from tiny_runs import NAMES, silent, tiny_experiment, tiny_recipe
from toys import TRAINING

MEASURED = {"metrics": ["rouge-l", "exact-match"], "generate_examples": 3, "max_new_tokens": 4, "per_client": True}
FAIRNESS = ["client-mean", "worst-tenth", "deviation", "range"]


def example(**metadata: str) -> Example:
    """An example with this metadata."""
    return Example((Turn("user", "?"), Turn("assistant", "!")), metadata)


def test_the_owner_of_an_example_is_the_first_of_the_owner_names_in_its_metadata() -> None:
    assert example(client="ann", category="qa").owner == "ann"
    assert example(person="bo", conversation="17").owner == "bo"
    assert example(task="gcd", category="arithmetic").owner == "gcd"
    assert example(category="qa").owner == "qa"
    assert example(conversation="17").owner is None


def test_the_fairness_figures_follow_their_formulas() -> None:
    losses = {str(number): float(number) for number in range(1, 26)}
    assert spread(losses) == {
        "client-mean": 13.0,
        "worst-tenth": (25 + 24 + 23) / 3,
        "deviation": statistics.pstdev(range(1, 26)),
        "range": 24.0,
    }
    assert spread(losses, higher_is_better=True)["worst-tenth"] == 2.0
    assert spread({"only": 2.0}) == {"client-mean": 2.0, "worst-tenth": 2.0, "deviation": 0.0, "range": 0.0}
    assert spread({}) == {}


def test_the_loss_of_an_example_is_the_same_in_any_batch() -> None:
    experiment = tiny_experiment(FedAvg(training=TRAINING), 1)
    tokens, model, objective = experiment.examples.held_out("rows"), experiment.model, experiment.objective
    order = iter(tokens.longest_first)
    assert tokens.longest_first != sorted(tokens.longest_first)  # else the order would not matter
    for batch in tokens.batches(3, None):
        for loss, count in zip(*(each.tolist() for each in objective.by_example(model, batch)), strict=True):
            (alone,) = experiment.examples.encode([experiment.data.held_out["rows"][next(order)]]).batches(1, None)
            assert objective.scores(model, alone) == pytest.approx({"loss": loss, "count": count}, rel=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with all these metrics, and its summary."""
    folder = tmp_path_factory.mktemp("measured")
    recipe = tiny_recipe(folder, algorithm={"name": "fedavg"}, evaluation={**MEASURED, "local_only_clients": 0})
    return folder / "run", run(recipe, folder / "run", lambda line: None)


def test_every_evaluation_has_the_clients_figures_and_their_spread(measured: tuple[Path, dict[str, Any]]) -> None:
    out, summary = measured
    evaluations = read(out).evaluations
    assert list(evaluations) == [0, 1, 2, 3]
    for number, entry in evaluations.items():
        assert set(entry.per_client) <= set(NAMES) and len(entry.per_client) > 1
        scores = entry.results["rows"]
        assert {name: scores[name] for name in FAIRNESS} == pytest.approx(spread(entry.per_client))
        assert {client: each["loss"] for client, each in entry.clients.items()} == entry.per_client
        if number in (1, 2):  # before the first round and after the last everybody scores, in between the cohort
            assert set(entry.per_client) <= set(read(out).rounds[number].clients)
    assert summary["metrics"]["rows"]["worst-tenth"][-1] == evaluations[3].results["rows"]["worst-tenth"]
    assert evaluations[3].per_client != evaluations[0].per_client


def test_metrics_of_answers_are_measured_before_the_first_round_and_after_the_last(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    _, summary = measured
    found = summary["metrics"]["rows"]
    for metric in ("rouge-l", "exact-match"):
        assert found[metric][1:3] == [None, None]
        assert all(isinstance(found[metric][number], float) for number in (0, 3))
    assert "choice" not in found


def test_the_report_shows_all_figures(measured: tuple[Path, dict[str, Any]]) -> None:
    out, summary = measured
    page = write_report(out).read_text()
    for name in ("rouge-l", "exact-match", "worst-tenth"):
        assert f"<dt>{name}, untuned → tuned</dt>" in page and f">{name}</th>" in page
    assert "<dt>range, untuned" not in page
    assert f"{summary['metrics']['rows']['worst-tenth'][2]:.3f}" in page
    losses = read(out).evaluations[3].per_client
    assert f"The loss of each of the {len(losses)} clients on what it holds out" in page
    assert all(f"{loss:.3f}" in page for loss in losses.values())


def test_a_run_that_is_resumed_books_what_scoring_brought_as_one_that_is_not(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, evaluation={"per_client": True, "local_only_clients": 0, "every": 2}, rounds=4)
    whole = run(recipe, tmp_path / "whole", silent)

    def stop(client: str) -> None:
        if 2 in read(tmp_path / "run").evaluations:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", silent, on_client=stop)
    stopped = run(recipe, tmp_path / "run", silent)
    names = ("bytes_up", "bytes_down_by_round", "bytes_evaluation", "eval_loss")
    assert [stopped[name] for name in names] == [whole[name] for name in names]
    assert any(read(tmp_path / "run").rounds[3].brought.values())


def test_metrics_besides_the_loss_change_no_weight(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, summary = measured
    plain = run(
        tiny_recipe(tmp_path, algorithm={"name": "fedavg"}, evaluation={"local_only_clients": 0}),
        tmp_path / "plain",
        lambda line: None,
    )
    assert plain["eval_loss"] == summary["eval_loss"] and plain["metrics"] == {}
    assert json.loads((tmp_path / "plain" / "summary.json").read_text())["metrics"] == {}


def test_metrics_every_measures_the_other_metrics_more_often(tmp_path: Path) -> None:
    evaluation = {**MEASURED, "metrics": ["exact-match"], "metrics_every": 2, "per_client": False}
    recipe = tiny_recipe(tmp_path, algorithm={"name": "fedavg"}, evaluation={**evaluation, "local_only_clients": 0})
    found = run(recipe, tmp_path / "run", lambda line: None)["metrics"]["rows"]
    assert list(found) == ["exact-match"]
    assert [value is None for value in found["exact-match"]] == [False, True, False, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["rouge"]}, "evaluation.metrics"),
        ({"metrics_every": 0}, "metrics_every=0: must be greater than 0"),
        ({"generate_examples": 0}, "generate_examples=0: must be greater than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be greater than 0"),
    ],
)
def test_invalid_evaluation_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, evaluation=settings)


@state
class Factor:
    """A client's private state: what its model is multiplied by."""

    value: float


FACTORS = {"Ann": 0.5, "Bo": 2.0, "Cleo": 1.0, "Dov": 1.5}


@dataclass(frozen=True, kw_only=True)
class Alone(FedAvg):
    """FedAvg without a global model: every client has the public weights times a factor."""

    name: ClassVar[str] = "alone"

    @contextmanager
    def model(self, task: Task, public: Any, client: Any = None) -> Iterator[Any]:
        """None without a client; else the public weights, scaled by the client's state."""
        if client is None:
            yield None
            return
        with super().model(task, public) as model:
            assert isinstance(model, nn.Module)
            for weight in model.parameters():
                weight.detach().mul_(client.value)
            yield model

    def client_update(self, task: Task, public: Any, client: Any, data: Any, key: Any) -> Any:
        """FedAvg's, with the client's factor kept."""
        reply = super().client_update(task, public, client, data, key)
        return replace(reply, client=client)

    def init_client(self, task: Task, public: Any, data: Any, key: Any) -> Any:
        """The factor of the client that has this key in a run of seed 1."""
        return Factor({Key.of(1, "join", name): factor for name, factor in FACTORS.items()}[key])


def test_without_a_global_model_each_clients_examples_are_scored_with_the_clients_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe(tmp_path, evaluation={"per_client": True}), algorithm=Alone(training=TRAINING))
    experiment = Experiment.load(recipe, log=lambda line: None)
    state = experiment.initial_state()
    engine = experiment.engine(state)
    next(experiment.run_rounds(state, engine))
    found = experiment.score(state, engine)
    (main,) = experiment.data.held_out.values()
    expected = {}
    for name in state.versions:
        examples = [each for each in main if each.owner == name]
        with Alone().model(experiment.task, state.public, Factor(FACTORS[name])) as model:
            if examples:
                rows = experiment.examples.encode(examples)
                sums = added_scores(experiment.objective, model, rows, 8)
                expected[name] = experiment.objective.figures(sums)["loss"]
    losses = {name: each["loss"] for name, each in found.per_client.items()}
    assert len(expected) == 2 and losses == pytest.approx(expected)
    assert set(found.moved) == set(expected) and min(found.moved.values()) > 0
    assert found.results["rows"]["client-mean"] == pytest.approx(statistics.fmean(expected.values()))
    everything = [each for each in main if each.owner in expected]
    assert found.results["rows"]["tokens"] == experiment.examples.encode(everything).num_response_tokens

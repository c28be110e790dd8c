"""Whose losses they are, how unevenly they fall, and how all figures beside the loss reach the run's files."""

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
from fedferret.core.algorithm import Task
from fedferret.core.errors import UserError
from fedferret.data.examples import Example, Turn
from fedferret.evaluation.loss import Losses, evaluate, example_losses
from fedferret.evaluation.personal import fairness, losses_by_owner, owner_of
from fedferret.experiment import Experiment
from fedferret.runner import run
from fedferret.tracking.events import read
from fedferret.tracking.report import write_report
from tiny_runs import NAMES, tiny_experiment, tiny_recipe
from toys import TRAINING

MEASURED = {"metrics": ["rouge-l", "exact-match"], "generate_examples": 3, "max_new_tokens": 4, "per_client": True}
FAIRNESS = ["client-mean", "worst-tenth", "deviation", "range"]


def example(**metadata: str) -> Example:
    """One whose metadata is all that matters."""
    return Example((Turn("user", "?"), Turn("assistant", "!")), metadata)


def test_an_example_belongs_to_the_most_telling_name_in_its_metadata() -> None:
    assert owner_of(example(client="ann", category="qa")) == "ann"
    assert owner_of(example(person="bo", conversation="17")) == "bo"
    assert owner_of(example(task="gcd", category="arithmetic")) == "gcd"
    assert owner_of(example(category="qa")) == "qa"
    assert owner_of(example(conversation="17")) is None


def test_an_owners_loss_is_a_mean_over_tokens_and_strangers_are_left_out() -> None:
    examples = [example(person="b"), example(person="a"), example(), example(person="b")]
    found = losses_by_owner(examples, Losses([6.0, 5.0, 100.0, 2.0], [3, 1, 1, 1]))
    assert found == {"a": 5.0, "b": 2.0} and list(found) == ["a", "b"]


def test_the_figures_of_fairness_are_the_textbooks() -> None:
    losses = {str(number): float(number) for number in range(1, 26)}
    assert fairness(losses) == {
        "client-mean": 13.0,
        "worst-tenth": (25 + 24 + 23) / 3,
        "deviation": statistics.pstdev(range(1, 26)),
        "range": 24.0,
    }
    assert fairness({"only": 2.0}) == {"client-mean": 2.0, "worst-tenth": 2.0, "deviation": 0.0, "range": 0.0}
    assert fairness({}) == {}


def test_losses_are_the_examples_own_whatever_the_batch() -> None:
    experiment = tiny_experiment(FedAvg(training=TRAINING), 1)
    tokens, model = experiment.tokens.held_out("rows"), experiment.model
    assert tokens.longest_first != sorted(tokens.longest_first)  # so that order matters
    losses = example_losses(model, experiment.loss, tokens, 3)
    for number, each in enumerate(experiment.data.held_out["rows"]):
        alone = evaluate(model, experiment.loss, experiment.tokens.encode([each]))
        assert losses.sums[number] / losses.tokens[number] == pytest.approx(alone.loss, rel=1e-5)
        assert losses.tokens[number] == alone.tokens


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with all of it, and its summary."""
    folder = tmp_path_factory.mktemp("measured")
    recipe = tiny_recipe(folder, algorithm={"name": "fedavg"}, evaluation={**MEASURED, "local_only_clients": 0})
    return folder / "run", run(recipe, folder / "run", lambda line: None)


def test_every_evaluation_has_the_owners_losses_and_their_figures(measured: tuple[Path, dict[str, Any]]) -> None:
    out, summary = measured
    evaluations = read(out).evaluations
    assert list(evaluations) == [0, 1, 2, 3]
    for entry in evaluations.values():
        assert set(entry.per_client) <= set(NAMES) and len(entry.per_client) > 1
        scores = entry.results["rows"]
        assert {name: scores[name] for name in FAIRNESS} == pytest.approx(fairness(entry.per_client))
    assert summary["metrics"]["rows"]["worst-tenth"][-1] == evaluations[3].results["rows"]["worst-tenth"]
    assert evaluations[3].per_client != evaluations[0].per_client


def test_what_takes_answers_is_measured_before_and_after(measured: tuple[Path, dict[str, Any]]) -> None:
    _, summary = measured
    found = summary["metrics"]["rows"]
    for metric in ("rouge-l", "exact-match"):
        assert found[metric][1:3] == [None, None]
        assert all(isinstance(found[metric][number], float) for number in (0, 3))
    assert "choice" not in found


def test_the_report_shows_them(measured: tuple[Path, dict[str, Any]]) -> None:
    out, summary = measured
    page = write_report(out).read_text()
    for name in ("rouge-l", "exact-match", "worst-tenth"):
        assert f"<dt>{name}, untuned → tuned</dt>" in page and f">{name}</th>" in page
    assert "<dt>range, untuned" not in page
    assert f"{summary['metrics']['rows']['worst-tenth'][2]:.3f}" in page
    losses = read(out).evaluations[3].per_client
    assert f"The loss of each of the {len(losses)} whose examples are held out" in page
    assert all(f"{loss:.3f}" in page for loss in losses.values())


def test_what_is_measured_beside_the_loss_changes_no_weight(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, summary = measured
    plain = run(
        tiny_recipe(tmp_path, algorithm={"name": "fedavg"}, evaluation={"local_only_clients": 0}),
        tmp_path / "plain",
        lambda line: None,
    )
    assert plain["eval_loss"] == summary["eval_loss"] and plain["metrics"] == {}
    assert json.loads((tmp_path / "plain" / "summary.json").read_text())["metrics"] == {}


def test_the_other_metrics_can_be_asked_for_more_often(tmp_path: Path) -> None:
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
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(tmp_path, evaluation=settings)


@dataclass(frozen=True, kw_only=True)
class Alone(FedAvg):
    """FedAvg as if it had no global model: every client runs the weights of its own that it was given here."""

    name: ClassVar[str] = "alone"

    @contextmanager
    def model(self, task: Task, public: Any, client: Any = None) -> Iterator[Any]:
        """None for everybody; for a client, the model of the common weights, scaled by what it holds."""
        if client is None:
            yield None
            return
        with super().model(task, public) as model:
            assert isinstance(model, nn.Module)
            for weight in model.parameters():
                weight.detach().mul_(client)
            yield model


def test_without_a_global_model_each_owners_examples_meet_the_owners_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe(tmp_path, evaluation={"per_client": True}), algorithm=Alone(training=TRAINING))
    experiment = Experiment.load(recipe, log=lambda line: None)
    state = experiment.initial_state()
    engine = experiment.engine(state)
    factors = {"Ann": 0.5, "Bo": 2.0}
    state.versions.update(dict.fromkeys(factors, 0))
    monkeypatch.setattr(engine.store, "get", factors.__getitem__)
    found = experiment.score(state, engine)
    main = experiment.data.held_out["rows"]
    expected = {}
    for name, factor in factors.items():
        own = [each for each in main if owner_of(each) == name]
        with Alone().model(experiment.task, state.public, factor) as model:
            if own:
                expected[name] = evaluate(model, experiment.loss, experiment.tokens.encode(own)).loss
    assert expected and found.per_client == pytest.approx(expected)
    assert found.results["rows"]["client-mean"] == pytest.approx(statistics.fmean(expected.values()))

"""FedAvg with fine-tuning at the client: FedAvg in all but what a client is scored with, in every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.staged_methods import TwoStages
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedavg_ft import FedAvgFT
from fedferret.core import rounds, tree
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.keys import Key
from fedferret.core.task import added_scores
from fedferret.engines.in_process import InProcess
from fedferret.engines.remote import Remote
from fedferret.wire import codec
from toy_sites import BASE, RECIPE, Direct, toy_trainer
from toys import TRAINING, Simulation, bits, simulate, toy_clients, toy_rows, toy_task, weights

HELD_OUT = {client: toy_rows(Key.of(9, client), 6) for client in toy_clients()}
FEDAVG, TUNED = FedAvg(training=TRAINING), FedAvgFT(fine_tuning=3, training=TRAINING)


def engine_of(run: Simulation, at_sites: bool, folder: Path) -> Any:
    """The clients of a run with what they hold out, in this process or behind messages."""
    if not at_sites:
        return InProcess(run.data, codec, held_out=HELD_OUT)
    trainers = {
        name: toy_trainer(run.algorithm, 3, {name: rows}, folder / name, name, held_out=HELD_OUT)
        for name, rows in run.data.items()
    }
    return Remote(Direct(trainers), codec, recipe=RECIPE, base=BASE, deadline=60.0)


def scores(algorithm: AnyAlgorithm, folder: Path, at_sites: bool = False) -> Mapping[str, Mapping[str, float]]:
    """Every client's sums after three rounds, twice; nothing but the scores may come of it."""
    run = simulate(algorithm, 3)
    before, engine = run.memory, engine_of(run, at_sites, folder)
    found, failures, _ = rounds.score(engine, list(run.data), run.state, 4)
    again, _, _ = rounds.score(engine, list(run.data), run.state, 4)
    assert not failures and again == found and run.memory == before
    assert not at_sites or not list(folder.rglob("*.state")) + list(folder.rglob("clients/*"))
    return found


def test_the_rounds_and_the_global_model_are_fedavgs_to_the_bit(tmp_path: Path) -> None:
    ours, theirs = simulate(TUNED, 3), simulate(FEDAVG, 3)
    assert ours.memory == theirs.memory and bits(weights(ours)) == bits(weights(theirs))
    untuned = scores(replace(TUNED, fine_tuning=0), tmp_path / "zero")
    assert untuned == scores(FEDAVG, tmp_path / "fedavg")
    assert untuned != scores(TUNED, tmp_path / "tuned")


@pytest.mark.parametrize("at_sites", [False, True])
def test_a_client_is_scored_with_the_newest_model_after_steps_on_its_own_rows(at_sites: bool, tmp_path: Path) -> None:
    run, task = simulate(FEDAVG, 3), toy_task(3)
    expected = {}
    for client, rows in run.data.items():
        tree.copy_(tree.parameters(task.model), weights(run))
        replace(TRAINING, steps=3).train(task, rows, Key.of(3, "personalise", 3, client))
        expected[client] = added_scores(task.objective, task.model, HELD_OUT[client], 4)
    assert scores(TUNED, tmp_path, at_sites) == expected


def test_a_stage_is_scored_as_its_method_is(tmp_path: Path) -> None:
    staged = TwoStages(first_rounds=1, first=FEDAVG, second=TUNED)
    run, task = simulate(staged, 3), toy_task(3)
    found, _, _ = rounds.score(engine_of(run, False, tmp_path), ["a"], run.state, 4)
    with torch.no_grad():
        tree.copy_(tree.parameters(task.model), weights(run))
    replace(TRAINING, steps=3).train(task, run.data["a"], Key.of(3, "personalise", 3, "a"))
    assert found["a"] == added_scores(task.objective, task.model, HELD_OUT["a"], 4)

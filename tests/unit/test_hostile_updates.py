"""What a certified client states or sends is bounded: it harms itself alone, and the run's folder stays readable."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contract.methods import METHODS, reference
from contract.unlike_methods import Drift, DriftEntry
from fedferret import experiment
from fedferret.algorithms.fedavg import Delta
from fedferret.core import intake, rounds
from fedferret.core.errors import RunError, UserError
from fedferret.core.exchanges import ClientScores, ClientUpdate, Score
from fedferret.core.norms import limits_off
from fedferret.core.pooling import scaled
from fedferret.core.robust_pooling import PoolSettings
from fedferret.engines.in_process import InProcess
from fedferret.runner import Interrupted, run
from fedferret.tracking import events
from fedferret.tracking.report import write_report
from fedferret.tracking.summary import summarise, write_summary
from fedferret.wire import codec
from tiny_runs import silent, tiny_recipe
from toy_guards import Identity, ToySecureSum
from toys import Backwards, simulate, toy_clients
from unit.written_run import write_run

NAN, INFINITY = float("nan"), float("inf")
Change = Callable[[ClientUpdate], ClientUpdate]


def tampering(who: str, change: Change) -> type[InProcess]:
    """An engine in which one client sends something else."""

    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            reply, private = super().work(state, client, body, data)
            tampers = client == who and isinstance(reply, ClientUpdate)
            return change(reply) if tampers else reply, private

    return Tampering


class Sized(Drift):
    """Drift with norms, so that updates wait for those of the others."""

    def update_norm(self, task: Any, public: Any, payload: Any) -> float:
        return 1.0


def states(**metrics: Any) -> Change:
    return lambda update: replace(update, metrics={**update.metrics, **metrics})


def times(factor: float) -> Change:
    return lambda update: replace(update, payload=scaled(update.payload, factor))


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"seconds": NAN}, "the metric 'seconds' is nan: must lie between 0 and 2.592e+06"),
        ({"seconds": INFINITY}, "the metric 'seconds' is inf: "),
        ({"seconds": -1.0}, "the metric 'seconds' is -1: "),
        ({"seconds": 1e7}, "the metric 'seconds' is 1e+07: "),
        ({"density": 1.5}, "the metric 'density' is 1.5: must lie between 0 and 1"),
        ({"loss": NAN}, "the metric 'loss' is nan: must lie between -1e+09 and 1e+09"),
        ({"loss": -INFINITY}, "the metric 'loss' is -inf: "),
        ({"loss": 1e300}, "the metric 'loss' is 1e+300: "),
        (
            {"\x1b[2J\n" + 99 * "x": 1.0},
            "an unknown metric came, '\\x1b[2J\\n" + 30 * "x" + ": known are loss, seconds",
        ),
    ],
)
def test_a_metric_that_cannot_be_is_that_clients_failure(metrics: dict[str, Any], reason: str) -> None:
    data = toy_clients()
    hostile = simulate(METHODS["fedavg"], 1, data={**data, "ab": data["a"]}, engine=tampering("ab", states(**metrics)))
    (failure,) = hostile.records[0].failures
    assert (failure.client, failure.stage) == ("ab", "pool") and failure.reason.startswith(reason)
    assert hostile.public == simulate(METHODS["fedavg"], 1).public


def test_work_that_took_longer_than_the_deadline_counts_when_it_is_repeated() -> None:
    """A site repeats its stored response when a round is run again."""
    late = simulate(METHODS["fedavg"], 1, engine=tampering("a", states(seconds=1e5)))
    assert not late.records[0].failures
    assert late.records[0].metrics["a"]["seconds"] == rounds.Plan(1, 1, 1).deadline == 3600.0


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        ({"loss": NAN, "count": 5.0}, "the sum 'loss' is nan: "),
        ({"loss": 1e300, "count": 5.0}, "the sum 'loss' is 1e+300: must lie between -5e+09 and 5e+09"),
        ({"loss": 1.0, "count": INFINITY}, "the sum 'count' is inf: "),
        ({"loss": 1.0, "count": 0.0}, "the sum 'count' is 0: must lie between 1 and "),
        ({"loss": 1.0, "count": -5.0}, "the sum 'count' is -5: "),
        ({"loss": 1.0, "count": 2.5}, "the sum 'count' is 2.5: must be whole"),
        ({"loss": 1.0}, "the sum 'count' is missing"),
        ({"loss": 1.0, "count": 5.0, "more": 1.0}, "an unknown sum came, 'more'"),
    ],
)
def test_sums_that_cannot_be_are_that_clients_failure(sums: dict[str, Any], reason: str) -> None:
    class Tampering(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            reply, private = super().work(state, client, body, data)
            return (ClientScores(sums) if isinstance(body, Score) and client == "b" else reply), private

    finished = reference("fedavg")
    engine = Tampering(finished.data, codec, held_out=toy_clients(2))
    found, (failure,), _ = rounds.score(engine, ["a", "b"], finished.state, 4)
    assert list(found) == ["a"] and (failure.client, failure.stage) == ("b", "score")
    assert failure.reason.startswith(reason)


@pytest.mark.parametrize("name", ["fedavg", "ferret-per-client", "fedavg-top-k"])
def test_from_four_updates_on_one_far_above_the_median_is_refused_whatever_the_order_of_arrival(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 30 times the others is a change that the model's size allows
    hostile, data = tampering("b", times(30.0)), toy_clients(4)
    without = {client: rows for client, rows in data.items() if client != "b"}
    for arriving, small in ((lambda engine: engine, intake.SMALL), (Backwards, 0)):  # in memory, and in a file
        monkeypatch.setattr(intake, "SMALL", small)
        attacked = simulate(METHODS[name], 2, data=data, engine=hostile, arriving=arriving)
        assert attacked.public == simulate(METHODS[name], 2, data=without).public
        assert attacked.store.get("b") is None  # nor did the round change what the client keeps
        for record in attacked.records:
            (failure,) = record.failures
            assert (failure.client, failure.stage) == ("b", "norm") and "10 times the median of 4" in failure.reason
            assert "b" not in record.metrics and "b" not in record.bytes_up
    three = {client: data[client] for client in "abc"}
    assert simulate(METHODS[name], 1, data=three, engine=hostile).records[0].failures == ()
    for settings in (PoolSettings(norm_limit="off"), PoolSettings(norm_ratio=100.0)):
        assert simulate(METHODS[name], 1, data=data, engine=hostile, pool=settings).records[0].failures == ()


def test_without_limits_no_value_is_so_large_that_the_weights_overflow() -> None:
    for name in ("fedavg", "ferret", "ferret-momentum", "ferret-per-client", "fedkseed", "fedavg-8bit", "drift"):
        for factor, refused in ((1e10, False), (1e20, True)):
            found = simulate(
                METHODS[name],
                2,
                data=toy_clients(2),
                engine=tampering("b", times(factor)),
                pool=PoolSettings(norm_limit="off"),
                until=1,
            )
            assert bool(found.records[0].failures) == refused, (name, factor)
            assert all(torch.isfinite(weight).all() for weight in found.state.public.weights.values())


def test_an_entry_or_a_state_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    """A method's fault, for no client can cause it: the log, the state on disk and the server's state are as before."""

    class Broken(Drift):
        where = "entry"

        def server_update(self, *given: Any) -> Any:
            server, entry = super().server_update(*given)
            wrong = {name: step * NAN for name, step in entry.step.items()}
            return server, DriftEntry(wrong) if self.where == "entry" else entry

        def apply(self, task: Any, public: Any, entry: Any) -> None:
            super().apply(task, public, entry)
            if self.where == "state":
                public.weights["0.bias"].mul_(INFINITY)

    good = simulate(Drift(), 3, folder=tmp_path, until=1)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for where, reason in (("entry", r"step\[0.weight\] holds NaN"), ("state", r"weights\[0.bias\] holds NaN")):
        broken = Broken()
        object.__setattr__(broken, "where", where)
        with pytest.raises(RunError, match=f"the .* round 2 of a, b, c is not kept: {reason} or infinity"):
            simulate(broken, 3, folder=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert simulate(Drift(), 3, folder=tmp_path).public == simulate(Drift(), 3).public != good.public


def test_where_norms_are_not_limited_the_run_says_why() -> None:
    def why(method: Any, norm_limit: Any = "on", **options: Any) -> str | None:
        return limits_off(simulate(method, 1, **options).state.node, PoolSettings(norm_limit=norm_limit))

    assert why(METHODS["ferret"]) is why(METHODS["ferret"], guards=(Identity(),)) is None
    assert why(METHODS["fedavg"], "off") == 'pool.norm_limit="off"'
    assert why(METHODS["fedavg"], guards=(ToySecureSum(),)) == "the server sees masked sums alone"
    assert why(METHODS["drift"]) == "the updates of drift have none"
    for wrong in (0.5, NAN, INFINITY):
        with pytest.raises(UserError, match=r"norm_ratio=.*: must be at least 1 and finite"):
            PoolSettings(norm_ratio=wrong)


def test_a_run_without_limits_logs_it(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = tiny_recipe(tmp_path, rounds=1, clients={"per_round": 1}, pool={"norm_limit": "off"})
    run(recipe, tmp_path / "run", lines.append)
    assert 'The norms of clients\' updates are not limited: pool.norm_limit="off".' in lines


def test_a_hostile_clients_run_is_reported_interrupted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, rounds=2, clients={"per_round": 4}, evaluation={"every": 2})

    class Hostile(tampering("Ann", states(seconds=NAN))):  # type: ignore[misc]
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            if state.round == 1 and client == "Cleo" and not resumed:
                raise KeyboardInterrupt
            reply, private = super().work(state, client, body, data)
            return times(1e30)(reply) if client == "Bo" else reply, private

    resumed: list[bool] = []
    monkeypatch.setitem(experiment.ENGINES, "in-process", Hostile)
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "run", silent)
    resumed.append(True)
    assert run(recipe, tmp_path / "run", silent)["status"] == "finished"
    failures = events.read(tmp_path / "run").failures
    assert [(number, each.client) for number, each in failures] == [
        (number, client) for number in (1, 2) for client in ("Ann", "Bo")
    ]
    page = write_report(tmp_path / "run").read_text()
    assert "must lie between 0 and" in page and "1 + the norm of the model" in page


def test_a_folder_with_null_for_every_fraction_opens_is_summed_up_and_reported(tmp_path: Path) -> None:
    """Before metrics were checked, one client's NaN became null in every figure that it had a part in."""
    write_run(tmp_path, finished=False)
    log = events.EventLog(tmp_path)
    log.write("saved", round=4, seconds=0.5)
    path = tmp_path / events.FILE
    path.write_text("".join(json.dumps(nulls(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    found = events.read(tmp_path)
    assert found.done == 4 and found.rounds[2].seconds_local == 0.0 and math.isnan(found.rounds[2].loss)
    assert summarise(found)["seconds"] == 0.0
    write_summary(tmp_path)
    assert "4 of 4 rounds" in write_report(tmp_path).read_text()
    events.EventLog(tmp_path).write("resume", round=4)
    assert events.read(tmp_path).ledger().up == found.ledger().up


def nulls(value: Any) -> Any:
    """A JSON value with null for every fraction."""
    if isinstance(value, Mapping):
        return {name: nulls(item) for name, item in value.items()}
    if isinstance(value, list):
        return [nulls(item) for item in value]
    return None if isinstance(value, float) else value


def test_a_sum_of_another_form_is_refused_when_it_comes_though_it_waits_for_the_others() -> None:
    """``drift`` accepts anything: what does not pool with the first must not end the round at its end."""
    data = toy_clients(4)
    for change in (
        lambda update: replace(update, payload=replace(update.payload, change={"stranger": torch.zeros(2)})),
        lambda update: replace(update, payload=Delta(update.payload.change)),
    ):
        attacked = simulate(Sized(), 1, data=data, engine=tampering("b", change))
        (failure,) = attacked.records[0].failures
        assert (failure.client, failure.stage) == ("b", "pool") and "does not pool with" in failure.reason
        without = {client: rows for client, rows in data.items() if client != "b"}
        assert attacked.public == simulate(Sized(), 1, data=without).public

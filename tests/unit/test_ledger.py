"""The ledger counts the bytes of a run, and those of FedAvg, by round and client."""

from __future__ import annotations

import json
from pathlib import Path

from fedferret.tracking import events
from fedferret.tracking.summary import summarise
from fedferret.wire.ledger import Ledger
from unit.written_run import record


def ledger() -> Ledger:
    return Ledger.of(1000, [record(1), record(2, failing=("bob",)), record(3, cohort=("ann",))])


def test_totals_are_the_sums_over_rounds_and_clients() -> None:
    assert ledger().up_by_round == [30, 20, 10]
    assert ledger().down_by_round == [21, 21, 7]  # bob received an entry and returned no update
    assert (ledger().up, ledger().down) == (60, 49)


def test_means_are_over_clients_that_sent_and_clients_that_received() -> None:
    assert ledger().up_per_client_round == 60 / 6
    assert ledger().down_per_client_round == 49 / 7
    assert Ledger(1000).up_per_client_round == 0


def test_fedavg_costs_four_bytes_per_weight_down_to_sampled_and_up_from_returning_clients() -> None:
    assert ledger().fedavg_by_round == [4000 * (3 + 3), 4000 * (3 + 2), 4000 * (1 + 1)]
    assert ledger().fedavg == 4000 * 13


def test_a_round_that_is_run_again_replaces_its_first_attempt() -> None:
    run = ledger()
    run.add(3, {"ann": 11, "eve": 12}, {"ann": 1, "eve": 2})
    assert (run.up_by_round[-1], run.down_by_round[-1]) == (23, 3)
    assert len(run.rounds) == 3


def test_rounds_are_listed_in_order_in_whatever_order_they_are_added() -> None:
    run = Ledger(1)
    run.add(2, {"a": 2}, {"a": 20})
    run.add(1, {"a": 1}, {"a": 10})
    assert (run.up_by_round, run.down_by_round) == ([1, 2], [10, 20])


def test_scoring_at_the_clients_is_booked_as_evaluation_and_in_no_total_of_the_rounds(tmp_path: Path) -> None:
    log = events.EventLog(tmp_path)
    log.write("start", parameters=1000)
    log.write("round", **events.round_fields(record(1)))
    before = events.read(tmp_path).ledger()
    results = {"held out": {"loss": 1.0, "perplexity": 2.7, "tokens": 3.0}}
    log.write("evaluation", round=1, results=results, seconds=0.1, bytes={"ann": 40, "bob": 2})
    run = events.read(tmp_path)
    assert (run.ledger().up, run.ledger().down, run.ledger().evaluation) == (before.up, before.down, 42)
    assert summarise(run)["bytes_evaluation"] == 42


def test_json_and_back() -> None:
    scored = ledger()
    scored.add_scores(3, {"ann": 9})
    assert Ledger.from_dict(json.loads(json.dumps(scored.to_dict()))) == scored

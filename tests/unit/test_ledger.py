"""The ledger counts what was moved, and what FedAvg would have moved, by round and client."""

from __future__ import annotations

import json

from fedferret.wire.ledger import Ledger
from unit.written_run import record


def ledger() -> Ledger:
    return Ledger.of(1000, [record(1), record(2, failing=("bob",)), record(3, cohort=("ann",))])


def test_totals_are_the_sums_over_rounds_and_clients() -> None:
    assert ledger().up_by_round == [30, 20, 10]
    assert ledger().down_by_round == [21, 21, 7]  # bob received what he did not answer
    assert (ledger().up, ledger().down) == (60, 49)


def test_means_are_over_those_who_sent_and_those_who_received() -> None:
    assert ledger().up_per_client_round == 60 / 6
    assert ledger().down_per_client_round == 49 / 7
    assert Ledger(1000).up_per_client_round == 0


def test_fedavg_moves_four_bytes_a_weight_down_to_the_sampled_and_up_from_the_answering() -> None:
    assert ledger().fedavg_by_round == [4000 * (3 + 3), 4000 * (3 + 2), 4000 * (1 + 1)]
    assert ledger().fedavg == 4000 * 13


def test_a_round_played_again_replaces_its_first_try() -> None:
    book = ledger()
    book.add(3, {"ann": 11, "eve": 12}, {"ann": 1, "eve": 2})
    assert (book.up_by_round[-1], book.down_by_round[-1]) == (23, 3)
    assert len(book.rounds) == 3


def test_rounds_are_listed_in_their_order_whatever_the_order_of_entry() -> None:
    book = Ledger(1)
    book.add(2, {"a": 2}, {"a": 20})
    book.add(1, {"a": 1}, {"a": 10})
    assert (book.up_by_round, book.down_by_round) == ([1, 2], [10, 20])


def test_json_and_back() -> None:
    assert Ledger.from_dict(json.loads(json.dumps(ledger().to_dict()))) == ledger()

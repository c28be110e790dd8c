"""The ledger: every byte that crossed the wire, by round and client, catching up included.

For comparison it also counts the bytes of FedAvg in the same rounds: the d weights in fp32, down to every sampled
client and up from every client that returned an update,

    bytes_fedavg = 4 d · Σ_rounds (sampled + returned)

FedAvg's first download is included, as its clients receive the weights in every round.

Scoring clients' own models moves bytes too: the log that a client is missing, and its sums. These are booked apart, as
evaluation, and are in no total of the rounds. A round's bytes are those that it would have without scoring. What
scoring brought of them already is sent once, and taken off evaluation: rounds and evaluation add up to what was sent.
Rounds that a rewinding discarded were sent all the same: their bytes are a figure apart too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedferret.core.rounds import RoundRecord

FP32_BYTES = 4


@dataclass(frozen=True)
class RoundBytes:
    """One round's bytes by client."""

    up: Mapping[str, int]  # from every client that returned an update
    down: Mapping[str, int]  # to every sampled client
    brought: Mapping[str, int] = field(default_factory=dict)  # of ``down``, what scoring had brought already


@dataclass
class Ledger:
    """Bytes up and down for every round and client of a run of a model with ``parameters`` weights."""

    parameters: int
    rounds: dict[int, RoundBytes] = field(default_factory=dict)
    scores: dict[int, dict[str, int]] = field(default_factory=dict)  # by evaluated round and client, both ways
    discarded: int = 0  # bytes of rounds that were rewound, both ways, evaluation included

    @classmethod
    def of(cls, parameters: int, records: Iterable[RoundRecord]) -> Ledger:
        """Make the ledger of some rounds.

        Args:
            parameters: d, the number of weights of the model.
            records: one per round.

        Returns:
            One entry per round; the bytes of catching up are included.
        """
        ledger = cls(parameters)
        for record in records:
            ledger.add(record.round, record.bytes_up, record.bytes_down, record.brought)
        return ledger

    def add(
        self, number: int, up: Mapping[str, int], down: Mapping[str, int], brought: Mapping[str, int] | None = None
    ) -> None:
        """Record a round; a round that is run again after a crash replaces its first attempt.

        Args:
            number: of the round, from 1.
            up: bytes from each client that returned an update.
            down: bytes to each sampled client.
            brought: of these, what scoring had brought already.
        """
        self.rounds[number] = RoundBytes(dict(up), dict(down), dict(brought or {}))

    def add_scores(self, number: int, moved: Mapping[str, int]) -> None:
        """Record what scoring at the clients moved after a round.

        Args:
            number: of the evaluated round; 0 is before tuning.
            moved: bytes, both ways together, by client that scored its model.
        """
        if moved:
            self.scores[number] = dict(moved)

    @property
    def up_by_round(self) -> list[int]:
        """Bytes that clients sent, by round."""
        return [sum(entry.up.values()) for _, entry in sorted(self.rounds.items())]

    @property
    def down_by_round(self) -> list[int]:
        """Bytes that clients received, by round."""
        return [sum(entry.down.values()) for _, entry in sorted(self.rounds.items())]

    @property
    def fedavg_by_round(self) -> list[int]:
        """Bytes of FedAvg, up and down together, by round."""
        model = FP32_BYTES * self.parameters
        return [model * (len(entry.up) + len(entry.down)) for _, entry in sorted(self.rounds.items())]

    @property
    def up(self) -> int:
        """All bytes up."""
        return sum(self.up_by_round)

    @property
    def down(self) -> int:
        """All bytes down."""
        return sum(self.down_by_round)

    @property
    def fedavg(self) -> int:
        """All bytes of FedAvg, up and down together."""
        return sum(self.fedavg_by_round)

    @property
    def evaluation(self) -> int:
        """What scoring at the clients added to the bytes of rounds, both ways together."""
        brought = sum(count for entry in self.rounds.values() for count in entry.brought.values())
        return sum(count for moved in self.scores.values() for count in moved.values()) - brought

    @property
    def up_per_client_round(self) -> float:
        """Mean bytes up, per client and round; 0 before a client has sent any."""
        return _mean([count for entry in self.rounds.values() for count in entry.up.values()])

    @property
    def down_per_client_round(self) -> float:
        """Mean bytes down, per client and round; 0 before a client was sampled."""
        return _mean([count for entry in self.rounds.values() for count in entry.down.values()])

    def to_dict(self) -> dict[str, Any]:
        """Write the ledger as plain values for JSON.

        Returns:
            ``parameters``; ``rounds``: by the round's number as a string, bytes ``up``, ``down``, ``brought``;
            ``scores``: likewise, bytes both ways by client; ``discarded``: bytes of rounds that were rewound.
        """
        rounds = {
            str(number): {"up": dict(entry.up), "down": dict(entry.down), "brought": dict(entry.brought)}
            for number, entry in sorted(self.rounds.items())
        }
        scores = {str(number): dict(moved) for number, moved in sorted(self.scores.items())}
        discarded = self.discarded
        return {"parameters": self.parameters, "rounds": rounds, "scores": scores, "discarded": discarded}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ledger:
        """Read a ledger.

        Args:
            plain: what ``to_dict`` returned, also after JSON.

        Returns:
            An equal ledger.
        """
        ledger = cls(plain["parameters"], discarded=plain.get("discarded", 0))
        for number, entry in plain["rounds"].items():
            ledger.add(int(number), entry["up"], entry["down"], entry.get("brought"))
        for number, moved in plain.get("scores", {}).items():
            ledger.add_scores(int(number), moved)
        return ledger


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0

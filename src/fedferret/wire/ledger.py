"""The ledger: every byte that crossed the wire, by round and client, catching up included.

Beside what was moved it keeps what FedAvg would have moved in the same rounds: the d weights in fp32, down to
every sampled client and up from every client that answered,

    bytes_fedavg = 4 d · Σ_rounds (sampled + answered)

The comparison charges FedAvg's first download too, as its clients receive the weights in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedferret.core.rounds import RoundRecord

FP32_BYTES = 4


@dataclass(frozen=True)
class RoundBytes:
    """One round's bytes. ``down`` has an entry per sampled client, ``up`` one per client that answered."""

    up: Mapping[str, int]
    down: Mapping[str, int]


@dataclass
class Ledger:
    """Bytes up and down for every round and client of a run of a model with ``parameters`` weights."""

    parameters: int
    rounds: dict[int, RoundBytes] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: int, records: Iterable[RoundRecord]) -> Ledger:
        """The ledger of these rounds."""
        ledger = cls(parameters)
        for record in records:
            ledger.add(record.round, record.bytes_up, record.bytes_down)
        return ledger

    def add(self, number: int, up: Mapping[str, int], down: Mapping[str, int]) -> None:
        """Enter round ``number``; a round that is played again after a crash replaces its first try."""
        self.rounds[number] = RoundBytes(dict(up), dict(down))

    @property
    def up_by_round(self) -> list[int]:
        """Bytes that clients sent, in the order of rounds."""
        return [sum(entry.up.values()) for _, entry in sorted(self.rounds.items())]

    @property
    def down_by_round(self) -> list[int]:
        """Bytes that clients received, in the order of rounds."""
        return [sum(entry.down.values()) for _, entry in sorted(self.rounds.items())]

    @property
    def fedavg_by_round(self) -> list[int]:
        """Bytes that FedAvg would have moved, up and down together, in the order of rounds."""
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
        """All bytes that FedAvg would have moved, up and down together."""
        return sum(self.fedavg_by_round)

    @property
    def up_per_client_round(self) -> float:
        """Mean bytes that one client sent in one round; 0 before any did."""
        return _mean([count for entry in self.rounds.values() for count in entry.up.values()])

    @property
    def down_per_client_round(self) -> float:
        """Mean bytes that one sampled client received in one round; 0 before any was sampled."""
        return _mean([count for entry in self.rounds.values() for count in entry.down.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` is the way back."""
        rounds = {str(number): {"up": dict(r.up), "down": dict(r.down)} for number, r in sorted(self.rounds.items())}
        return {"parameters": self.parameters, "rounds": rounds}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Ledger:
        """The ledger that ``to_dict`` wrote down."""
        ledger = cls(plain["parameters"])
        for number, entry in plain["rounds"].items():
            ledger.add(int(number), entry["up"], entry["down"])
        return ledger


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0

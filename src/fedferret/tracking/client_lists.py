"""The lists of clients of a run, as its event log has them: one for each round from which another list held.

    {"event": "clients", "time": ..., "round": 13, "clients": ["ann", "cleo"], "added": [], "retired": ["bo"]}

The list that a run begins with is in its recipe or its data. The clients of round n are drawn from the seed, n and the
list at round n alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ClientList:
    """The clients that may be sampled from ``round`` on, and how they differ from those before."""

    round: int
    clients: tuple[str, ...]  # sorted
    added: tuple[str, ...]
    retired: tuple[str, ...]

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> ClientList:
        """Read a ``clients`` event."""
        return cls(event["round"], *(tuple(event[name]) for name in ("clients", "added", "retired")))


def list_fields(round: int, clients: Sequence[str], before: Iterable[str]) -> dict[str, Any]:
    """The fields of a ``clients`` event.

    Args:
        round: the first that draws from the list.
        clients: who may be sampled from then on, sorted.
        before: who could be sampled before.
    """
    known = set(before)
    added, retired = [name for name in clients if name not in known], sorted(known - set(clients))
    return {"round": round, "clients": list(clients), "added": added, "retired": retired}


def clients_at(lists: Iterable[ClientList], round: int, first: Iterable[str]) -> list[str]:
    """Who could be sampled in a round.

    Args:
        lists: of the run, by round.
        round: from 1.
        first: the clients that the run began with.

    Returns:
        Names, sorted.
    """
    held = [each.clients for each in lists if each.round <= round]
    return list(held[-1]) if held else sorted(first)

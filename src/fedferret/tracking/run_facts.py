"""What befell a run beside its rounds: it was rewound, or went on with other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedferret.data.pinned import DATA, difference


@dataclass(frozen=True)
class Rewind:
    """The run went back to ``round``, into a new epoch."""

    round: int
    epoch: int  # above that of the rewinding before; seconds since 1970
    discarded: tuple[int, ...]  # rounds that are run again
    bytes: int  # that were sent for them, both ways, evaluation included
    retired: tuple[str, ...]  # clients that are sampled no more from then on
    begun_anew: tuple[str, ...]  # clients with a private state of that round that is no longer held


@dataclass(frozen=True)
class ChangedData:
    """After ``round``, the run went on with other data, which its user accepted."""

    round: int
    what: str  # which file, and what happened to it
    event: Mapping[str, Any]  # has ``files`` and ``data_fingerprint`` as they were from then on

    @classmethod
    def of(cls, before: Mapping[str, Any], event: Mapping[str, Any]) -> ChangedData:
        """Say what changed.

        Args:
            before: the event that stated the data until then.
            event: of resuming with other data.
        """
        known, found = (each.get("files", {}).get(DATA, {}) for each in (before, event))
        digests = [str(each.get("data_fingerprint", ""))[:12] for each in (before, event)]
        examples = f"the examples are others (SHA-256 {digests[0]}… then, {digests[1]}… now)"
        return cls(event["round"], difference(known, found) or examples, event)

"""Who may be sampled: the clients that a run began with and those that came since, without those that were retired.

Both kinds of changes only grow, and who was retired does not come back. So the changes that a checkpoint holds and
those that an operator asked for can be united in any order, and any number of times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ClientChanges:
    """Changes to a run's list of clients since the run began.

    Attributes:
        added: clients that came, in the order in which they came.
        retired: clients that are sampled no more, in the order in which they were retired.
    """

    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()

    def __or__(self, other: ClientChanges) -> ClientChanges:
        """Unite two sets of changes.

        Args:
            other: further changes; those that are known already count once.

        Returns:
            Both.
        """
        added, retired = dict.fromkeys((*self.added, *other.added)), dict.fromkeys((*self.retired, *other.retired))
        return ClientChanges(tuple(added), tuple(retired))

    def applied(self, clients: Iterable[str]) -> list[str]:
        """Apply the changes to a list of clients.

        Args:
            clients: that the run began with.

        Returns:
            Who may be sampled, sorted.
        """
        return sorted({*clients, *self.added} - {*self.retired})

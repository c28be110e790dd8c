"""What a method sends and keeps: of the wire by its own formula, of its states by ``core/by_round.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WireCost:
    """Bytes per client in one round by a method's formula, framing left out, and what the method keeps on each client.

    The least and the most differ where the length varies: entropy codes, chosen layers, unions of positions.
    """

    up_least: float
    up_most: float
    down_least: float
    down_most: float
    client_state_bytes: float = 0.0  # a client's private state, from one of the client's rounds to the next

    @classmethod
    def exact(cls, up: float, down: float, client_state_bytes: float = 0.0) -> WireCost:
        """The cost of messages of one length.

        Args:
            up: bytes from a client to the server.
            down: bytes from the server to a client.
            client_state_bytes: bytes of a client's private state.

        Returns:
            A cost with equal least and most bytes in each direction.
        """
        return cls(up, up, down, down, client_state_bytes)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the three memories after a round."""

    public: float = 0.0  # a snapshot of the log
    server: float = 0.0
    client: float = 0.0  # of each client that took part

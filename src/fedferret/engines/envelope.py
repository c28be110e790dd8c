"""What a client sends up, and the one way in which its work of a round is done, whichever process it runs in.

join (before the first round)  ->  local  ->  Envelope, encoded          the client's end
decode  ->  is it an answer at all?  ->  Answer                          the server's end
"""

from __future__ import annotations

from typing import Any

from fedferret.core.algorithm import Algorithm, Examples, Payload, Task
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.rounds import ClientUpdate, Codec, local_key


@message
class Envelope:
    """What travels up: the payload and what the server must know of it."""

    payload: Any
    weight: float
    metrics: dict[str, float]


def seal_envelope(
    algorithm: Algorithm[Any, Any, Any, Any, Any],
    task: Task,
    public: Any,
    private: Any | None,
    data: Examples,
    codec: Codec,
    *,
    seed: int,
    round: int,
    client: str,
) -> tuple[bytes, Any]:
    """One client's round: its message, encoded, and its new private state; ``private`` is None before the first."""
    if private is None:
        private = algorithm.init_client(task, data, Key.of(seed, "join", client))
    reply = algorithm.client_update(task, public, private, data, local_key(seed, round, client))
    return codec.encode(Envelope(reply.payload, reply.weight, dict(reply.metrics))), reply.client


def open_envelope(client: str, encoded: bytes, codec: Codec) -> ClientUpdate:
    """A received message as the loop wants it. Raises WireError or ValueError for one that is not an answer."""
    envelope = codec.decode(encoded)
    if not isinstance(envelope, Envelope):
        raise ValueError(f"a {type(envelope).__name__} came where an Envelope was expected")
    numbers = [envelope.weight, *envelope.metrics.values()] if isinstance(envelope.metrics, dict) else [None]
    if not isinstance(envelope.payload, Payload) or not all(isinstance(number, float) for number in numbers):
        raise ValueError("an Envelope came that holds no payload with a weight and metrics")
    return ClientUpdate(client, envelope.payload, envelope.weight, envelope.metrics, len(encoded))

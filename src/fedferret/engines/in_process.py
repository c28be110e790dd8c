"""All clients in this process, one after the other, on one replica of the model.

    for each client:  local(task, public, private, data, key)  ->  encode  ->  decode  ->  yield

The server's public state and the clients' are one object here, which is honest because they are bit-equal by
law, and cheap: nothing of the model's size is copied per client. Messages go through the codec all the same.
A client that raises is reported and dropped for the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedferret.core.algorithm import Examples, Payload
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.rounds import Answer, Codec, Failure, Job
from fedferret.engines.client_store import ClientStore


@message
class Envelope:
    """What travels up: the payload and what the server must know of it."""

    payload: Any
    weight: float
    metrics: dict[str, float]


class InProcess:
    """The engine for one machine."""

    def __init__(
        self,
        data: Mapping[str, Examples],
        codec: Codec,
        store: ClientStore | None = None,
        starting: Callable[[str], None] = lambda client: None,
    ) -> None:
        """``data`` may make a client's examples when asked for them; ``starting`` hears of each client first."""
        self._data = data
        self._codec = codec
        self.store = store or ClientStore()
        self._starting = starting

    def map(self, job: Job, cohort: Sequence[str]) -> Iterator[Answer | Failure]:
        """Each client's outcome as it finishes."""
        for client in cohort:
            self._starting(client)
            yield self._outcome(job, client)

    def _outcome(self, job: Job, client: str) -> Answer | Failure:
        stage = "data"
        try:
            data = self._data[client]
            stage = "local"
            encoded, private = self.work(job, client, data)
            stage = "wire"
            answer = open_envelope(client, encoded, self._codec)
        except Exception as error:
            return self.failed(job, client, stage, error)
        if private is not None:
            self.store.stage(client, private, job.round)
        return answer

    def work(self, job: Job, client: str, data: Examples) -> tuple[bytes, Any]:
        """One client's round: its message, encoded, and its new private state."""
        private = self.store.get(client)
        if private is None:
            private = job.algorithm.join(job.task, data, Key.of(job.seed, "join", client))
        reply = job.algorithm.local(job.task, job.public, private, data, job.key(client))
        return self._codec.encode(Envelope(reply.payload, reply.weight, dict(reply.metrics))), reply.client

    def failed(self, job: Job, client: str, stage: str, error: Exception) -> Failure:
        """What becomes of an error: here, the round goes on without the client."""
        return Failure(client, stage, f"{type(error).__name__}: {error}")


def open_envelope(client: str, encoded: bytes, codec: Codec) -> Answer:
    """A received message as the loop wants it. Raises WireError or ValueError for one that is not an answer."""
    envelope = codec.decode(encoded)
    if not isinstance(envelope, Envelope):
        raise ValueError(f"a {type(envelope).__name__} came where an Envelope was expected")
    numbers = [envelope.weight, *envelope.metrics.values()] if isinstance(envelope.metrics, dict) else [None]
    if not isinstance(envelope.payload, Payload) or not all(isinstance(number, float) for number in numbers):
        raise ValueError("an Envelope came that holds no payload with a weight and metrics")
    return Answer(client, envelope.payload, envelope.weight, envelope.metrics, len(encoded))

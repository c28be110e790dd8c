"""All clients in this process, one after the other, on one replica of the model.

    for each client:  local(task, public, private, data, key)  ->  encode  ->  decode  ->  yield

The server's public state and the clients' are one object here, which is honest because they are bit-equal by
law, and cheap: nothing of the model's size is copied per client. Messages go through the codec all the same.
A client that raises is reported and dropped for the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedferret.core.algorithm import Examples
from fedferret.core.rounds import ClientUpdate, Codec, Failure, Job
from fedferret.engines.client_store import ClientStore
from fedferret.engines.envelope import Envelope, open_envelope, seal_envelope

__all__ = ["Envelope", "InProcess"]


class InProcess:
    """The engine for one machine."""

    def __init__(
        self,
        data: Mapping[str, Examples],
        codec: Codec,
        store: ClientStore | None = None,
        on_client_start: Callable[[str], None] = lambda client: None,
    ) -> None:
        """``data`` may make a client's examples when asked for them; ``on_client_start`` hears of each client first."""
        self._data = data
        self._codec = codec
        self.store = store or ClientStore()
        self._starting = on_client_start

    def map(self, job: Job, cohort: Sequence[str]) -> Iterator[ClientUpdate | Failure]:
        """Each client's outcome as it finishes."""
        for client in cohort:
            self._starting(client)
            yield self._outcome(job, client)

    def _outcome(self, job: Job, client: str) -> ClientUpdate | Failure:
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
        return seal_envelope(
            job.algorithm,
            job.task,
            job.public,
            private,
            data,
            self._codec,
            seed=job.seed,
            round=job.round,
            client=client,
        )

    def failed(self, job: Job, client: str, stage: str, error: Exception) -> Failure:
        """What becomes of an error: here, the round goes on without the client."""
        return Failure(client, stage, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Nothing to end: the clients live in this process."""

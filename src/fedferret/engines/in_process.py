"""All clients in this process, one after the other, on the server's own node.

    for each client:  node.handle(body, client, private, data)  ->  encode  ->  decode  ->  yield

The server's public state and the clients' are one object here: they are bit-equal by law, and nothing of the model's
size is copied per client. Messages go through the codec all the same. A client that raises is reported and left out of
the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedferret.core.exchanges import Body, Failure, Reply, Score, Train
from fedferret.core.node import Codec
from fedferret.core.rounds import RunState
from fedferret.core.task import Examples
from fedferret.engines.client_store import ClientStore, DamagedState


class InProcess:
    """The engine for one machine."""

    def __init__(
        self,
        data: Mapping[str, Examples],
        codec: Codec,
        store: ClientStore | None = None,
        on_client_start: Callable[[str], None] = lambda client: None,
        held_out: Mapping[str, Examples] | None = None,
    ) -> None:
        """An engine over these clients.

        Args:
            data: each client's examples; may be made when they are asked for.
            codec: of messages.
            store: of the clients' private states; in memory without one.
            on_client_start: called with a client's name before its work.
            held_out: what each client holds out, to be scored there.
        """
        self._data, self._held_out = data, held_out or {}
        self._codec = codec
        self._store = store or ClientStore()
        self._on_client_start = on_client_start

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
        """Let every client handle a body, one after the other; see ``Engine``.

        Args:
            bodies: by client: ``Train``, ``Score`` or a message that a guard declares.
            state: of the run, before the round; clients work on ``state.node``.

        Returns:
            One outcome per client, in the order of ``bodies``, as each client finishes.
        """
        for client, body in bodies.items():
            self._on_client_start(client)
            yield self._outcome(state, client, body)
        self._store.flush()

    def commit(self, round: int, refused: Sequence[str]) -> None:
        """Make the private states that the round produced the clients' states.

        Args:
            round: the round that is saved, from 1.
            refused: clients with a refused update; they keep the private states from before the round.
        """
        self._store.withdraw(refused)
        self._store.commit(round)

    def close(self) -> None:
        """Nothing to end: the clients live in this process."""

    def _outcome(self, state: RunState, client: str, body: Body) -> Reply | Failure:
        stage = "data"
        try:
            data = (self._held_out if isinstance(body, Score) else self._data)[client]
            stage = "local"
            reply, private = self.work(state, client, body, data)
            stage = "wire"
            encoded = self._codec.encode(reply)
            received = Reply(client, self._codec.decode(encoded), len(encoded))
        except DamagedState:
            raise  # without this client the run would go on to other weights
        except Exception as error:
            return self.failed(body, client, stage, error)
        if private is not None and isinstance(body, Train):
            self._store.stage(client, private, body.round)
        return received

    def work(self, state: RunState, client: str, body: Body, data: Examples) -> tuple[Any, Any]:
        """Let one client handle a body.

        Args:
            state: of the run, before the round.
            client: the client's name.
            body: ``Train``, ``Score`` or a message that a guard declares.
            data: the client's examples; for ``Score`` those that the client holds out.

        Returns:
            The client's reply, a message, and the client's private state from now on; None where it has none.
        """
        return state.node.handle(body, client, self._store.get(client), data, lambda: self._data[client])

    def failed(self, body: Body, client: str, stage: str, error: Exception) -> Failure:
        """Turn an error into an outcome: here, the round goes on without the client.

        Args:
            body: what the client was to handle.
            client: the client's name.
            stage: where the error arose: "data", "local" or "wire".
            error: as caught.

        Returns:
            The failure, with the error's type and message as reason.
        """
        return Failure(client, stage, f"{type(error).__name__}: {error}")

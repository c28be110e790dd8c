"""The server's half of any engine that is not this process: a Request to each client, a Response back, no trust.

    bodies -> one request per client -> transport -> responses, as they come -> checked -> spooled -> replies in client
    order

* A request carries what the client's site is missing of the log, by the server's books. A site that is missing more
  says so and is sent that; a site with another hash of its replica is named, and rebuilds it from base and log once.
* Every request has a ticket. A response with another is late, or a second one, and counts for nothing.
* Responses wait for their turn in a temporary file: the server's memory does not grow with their number.
* Whatever a site does becomes one Failure with one line; nothing that comes back raises here.

A transport with workers (a simulation) is brought up to date worker by worker at the start of an exchange; then any of
them takes any client's request, with that client's private state, which stays in the server's ``ClientStore``.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedferret.core.exchanges import Body, Failure, Reply
from fedferret.core.node import Codec
from fedferret.core.rounds import RunState
from fedferret.core.spool import Place, Spool
from fedferret.engines.client_store import ClientStore
from fedferret.engines.transport import DONE, MISSING, REFUSED, Received, Request, Response, Transport, check_fields

SENDINGS = 4  # requests to one client in an exchange: recipe missing, then records, then the replica differs
_SMALLEST_LIMIT = 1 << 20  # bytes that any response may have, however small the model


@dataclass
class Missing:
    """What a site is to be sent beside the body."""

    since: int  # version that the site's replica has
    recipe: bool = False
    rebuild: bool = False


class Remote:
    """The engine over a transport."""

    def __init__(
        self,
        transport: Transport,
        codec: Codec,
        *,
        recipe: str,
        base: str,
        deadline: float,
        workers: Sequence[str] = (),
        store: ClientStore | None = None,
        on_client_start: Callable[[str], None] = lambda client: None,
        log: Callable[[str], None] = lambda line: None,
        on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        """An engine over this transport.

        Args:
            transport: delivers messages; closed with the engine.
            codec: of messages.
            recipe: the recipe's identity as TOML.
            base: SHA-256 of the base weights.
            deadline: seconds of an exchange.
            workers: the transport's, of which any works for any client; () where every client is a site.
            store: of simulated clients' private states.
            on_client_start: called with a client's name when its reply's turn comes.
            log: called with a line for each thing an operator should know that is no failure.
            on_message: called with every message.
        """
        self._store = store or ClientStore()
        self.transport, self.codec = transport, codec
        self.recipe, self.run = recipe, hashlib.sha256(recipe.encode()).hexdigest()
        self.base, self.deadline, self.workers = base, deadline, tuple(workers)
        self.on_client_start, self.log, self.on_message = on_client_start, log, on_message
        self.held: dict[str, int] = {}  # the version that each worker holds

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
        """Every client's outcome, in the bodies' order, each as soon as those before it are known; see ``Engine``."""
        with tempfile.TemporaryFile() as file:
            yield from _Exchange(self, self._store, bodies, state, Spool(file)).run()

    def commit(self, round: int, refused: Sequence[str]) -> None:
        """What the round made of simulated clients is what they are, but for those that were refused."""
        self._store.withdraw(refused)
        self._store.commit(round)

    def close(self) -> None:
        """End the transport."""
        self.transport.close()


class _Messages(Mapping[str, bytes]):
    """Requests by addressee, each encoded when it is asked for: a model's snapshot to many is never held many times."""

    def __init__(self, names: Sequence[str], make: Callable[[str], bytes]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Exchange:
    """One call of ``exchange``."""

    def __init__(
        self, engine: Remote, store: ClientStore, bodies: Mapping[str, Body], state: RunState, spool: Spool
    ) -> None:
        self.engine, self.store, self.bodies, self.state, self.spool = engine, store, bodies, state, spool
        self.end = time.monotonic() + engine.deadline
        self.round = next((body.round for body in bodies.values()), state.round)
        self.fingerprint = state.node.fingerprint()
        # no message of a round is larger than a few models; one that claims to be is not even decoded
        model = state.node.task.model
        self.limit = _SMALLEST_LIMIT + 4 * sum(each.numel() * each.itemsize for each in model.parameters())
        self.tickets: dict[str, str] = {}
        self.missing: dict[str, Missing] = {}  # what each addressee is to be sent
        self.sendings = dict.fromkeys(bodies, 0)
        self.settled: dict[str, Failure | tuple[Place, Place]] = {}
        self.wrong: dict[str, str] = {}  # what was wrong with what a client sent, while a better copy may come

    def run(self) -> Iterator[Reply | Failure]:
        """Send, listen, send again to those that miss something, until all are settled or the time is over."""
        turn = iter(self.bodies)
        client = next(turn, None)
        waiting = list(self.bodies)
        while waiting:
            self._bring_up_workers()
            again: list[str] = []
            for received in self._send(waiting):
                if self._take(received):
                    again.append(received.site)
                while client in self.settled:
                    yield self._outcome(client)
                    client = next(turn, None)
            for name in waiting:
                if name not in self.settled and (name not in again or self._left() <= 0):
                    self.settled[name] = Failure(name, "wire", self.wrong.get(name, "no reply before the deadline"))
            waiting = [name for name in waiting if name not in self.settled]
        while client is not None:
            yield self._outcome(client)
            client = next(turn, None)

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _send(self, names: Sequence[str]) -> Iterator[Received]:
        self.tickets |= {name: secrets.token_hex(8) for name in names}
        return self.engine.transport.exchange(_Messages(names, self._message), max(0.0, self._left()))

    def _message(self, name: str) -> bytes:
        engine, state = self.engine, self.state
        client = "" if name in engine.workers else name
        missing = self._missing(name)
        update = state.log.since(missing.since)
        private = self.store.get(client) if client and engine.workers else None
        message = engine.codec.encode(
            Request(
                run=engine.run,
                epoch=state.node.epoch,
                round=self.round,
                ticket=self.tickets[name],
                client=client,
                recipe=engine.recipe if missing.recipe else "",
                base=engine.base,
                version=state.log.version,
                fingerprint=self.fingerprint,
                snapshot=update.snapshot or b"",
                records=update.records,
                counted=state.versions[client] + 1 if client in state.versions else 0,
                rebuild=missing.rebuild,
                private=b"" if private is None else engine.codec.encode(private),
                body=self.bodies[client] if client else None,
            )
        )
        self._log_event("request", name, payload_bytes=update.size, framed_bytes=len(message))
        return message

    def _missing(self, name: str) -> Missing:
        """By the books, or as the site said itself."""
        if name in self.missing:
            return self.missing[name]
        if self.engine.workers:  # a worker not heard from yet has nothing; a client's request brings nothing
            held = self.engine.held.get(name) if name in self.engine.workers else self.state.log.version
        else:
            held = self.state.versions.get(name)
        return Missing(held or 0, recipe=held is None)

    def _bring_up_workers(self) -> None:
        """Have every worker that is behind come to this version; one that cannot will say so to a client."""
        engine, version = self.engine, self.state.log.version
        for _ in range(SENDINGS):
            behind = [name for name in engine.workers if engine.held.get(name) != version]
            if not behind or self._left() <= 0:
                return
            for received in self._send(behind):
                response = self._read(received)
                if not isinstance(response, Response):
                    engine.log(f"{received.site}: {response}")
                elif response.status == DONE:
                    engine.held[received.site] = response.version
                    self.missing.pop(received.site, None)
                elif response.status == MISSING:
                    self.missing[received.site] = self._named(response)
                else:
                    engine.log(f"{received.site}: {_line(response.reason)}")

    def _take(self, received: Received) -> bool:
        """Settle the client, or note why not; returns whether it is to be sent another request."""
        client = received.site
        if client not in self.tickets:
            self.engine.log(f"{client}: a message came from a site that was asked nothing; ignored")
            return False
        if client in self.settled:
            self.engine.log(f"{client}: a second response in round {self.round}; ignored")
            return False
        response = self._read(received)
        if not isinstance(response, Response):
            self.wrong[client] = response
            return False
        if response.status == MISSING:
            return self._send_missing(client, response)
        if response.status == REFUSED:
            self.settled[client] = Failure(client, "local", _line(response.reason))
        elif (response.version, response.fingerprint) != (self.state.log.version, self.fingerprint):
            return self._send_missing(client, response)
        else:
            self.settled[client] = self.spool.put(response.reply), self.spool.put(response.private)
            if response.reason:  # what the site did without, such as a private state that is no longer held
                self.engine.log(f"{client}: {_line(response.reason)}")
                self._log_event("notice", client, note=_line(response.reason))
        return False

    def _read(self, received: Received) -> Response | str:
        """The response that a site's message is, or what is wrong with it."""
        if received.content is None:
            return self.wrong.get(received.site) or received.reason or "no reply before the deadline"
        if len(received.content) > self.limit:
            return f"sent {len(received.content):,} bytes, and no response of this run has more than {self.limit:,}"
        try:
            response = self.engine.codec.decode(received.content)
            if not isinstance(response, Response):
                return f"a {type(response).__name__} came where a Response was expected"
            check_fields(response)
        except (ValueError, TypeError, RecursionError) as error:
            return f"{type(error).__name__}: {_line(str(error))}"
        name = received.site
        self._log_event(
            response.status,
            name,
            payload_bytes=len(response.reply),
            framed_bytes=len(received.content),
            version=response.version,
            process=response.process,
            note=_line(response.reason),
        )
        if response.ticket == "" and response.status == REFUSED:  # it could not even read the request
            return f"did not take the request: {_line(response.reason)}"
        if response.ticket != self.tickets[name]:
            return f"replied to a request of round {response.round} that is over"
        client = "" if name in self.engine.workers else name
        head = self.engine.run, self.state.node.epoch, self.round, client
        if (response.run, response.epoch, response.round, response.client) != head:
            return f"replied for {_line(response.client)} in round {response.round}, which it was not asked"
        if response.status not in (DONE, MISSING, REFUSED):
            return f"sent the invalid status {_line(response.status)!r}"
        return response

    def _send_missing(self, client: str, response: Response) -> bool:
        """The site has not what the request builds on: remember what to send with the next."""
        missing = self._named(response)
        known = self.missing.get(client)
        self.sendings[client] += 1
        if missing.rebuild and known and known.rebuild:
            self.settled[client] = Failure(
                client,
                "replica",
                f"rebuilt from base and log it still differs at version {response.version}: its base model, its "
                f"fedferret or its machine computes other bits",
            )
            return False
        if self.sendings[client] == SENDINGS:
            reason = f"its {_line(response.reason)} is still missing after it was sent"
            self.settled[client] = Failure(client, "replica", reason)
            return False
        if missing.rebuild:
            self.engine.log(f"{client}: its replica differs from the server's; it rebuilds from base and log")
        if self.engine.workers:
            self.engine.held.clear()  # the response does not name the worker, and sending to all costs little
            if missing.rebuild:
                self.missing |= {name: missing for name in self.engine.workers}
        else:
            missing.rebuild = missing.rebuild or bool(known and known.rebuild)
            self.missing[client] = missing
        self.wrong[client] = f"its {_line(response.reason)} is missing, and the time was over before it was sent"
        return True

    def _outcome(self, client: str) -> Reply | Failure:
        """A settled client's outcome; what it sent is decoded only now, one at a time."""
        self.engine.on_client_start(client)
        settled = self.settled[client]
        if isinstance(settled, Failure):
            return settled
        place, private = settled
        codec = self.engine.codec
        try:
            encoded = self.spool.get(place)
            reply = Reply(client, codec.decode(encoded), len(encoded))
            if private[1] and self.engine.workers:
                self.store.stage(client, codec.decode(self.spool.get(private)), self.round)
            return reply
        except (ValueError, TypeError, RecursionError) as error:
            return Failure(client, "wire", f"{type(error).__name__}: {_line(str(error))}")

    def _named(self, response: Response) -> Missing:
        """What a site says is missing; one that replied from another replica is missing the run's."""
        if response.status == DONE or response.reason == "replica":
            return Missing(0, recipe=True, rebuild=True)
        held = min(max(0, response.version), self.state.log.version)
        return Missing(held, recipe=response.reason == "recipe")

    def _log_event(self, what: str, name: str, **facts: Any) -> None:
        event = {"what": what, "run": self.engine.run[:16], "round": self.round, "client": name, **facts}
        self.engine.on_message(event)


def _line(text: str) -> str:
    """A stranger's words on one line of the operator's terminal."""
    return "".join(each if each.isprintable() else "�" for each in " ".join(text.split()))[:300]

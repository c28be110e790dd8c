"""The server's half of any engine that is not this process: a Request to each client, a Response back, no trust.

    bodies -> one request per client -> sealed -> transport -> responses, as they come -> seal, then content checked
           -> spooled -> replies in client order

* A request carries what the client's site is missing of the log, by the server's books. A site that is missing more
  says so and is sent that; a site with another hash of its replica is named, and rebuilds it from base and log once.
* Every request has a ticket and a number. What comes with another, or with a seal that is not the site's, is logged and
  counts for nothing, and the request is sent again: anyone may have sent it, to have it taken for the site's response.
* Responses wait for their turn in a temporary file: the server's memory does not grow with their number.
* Whatever a site does becomes one Failure with one line; nothing that comes back raises here.

A transport with workers (a simulation) is brought up to date worker by worker at the start of an exchange; then any of
them takes any client's request, with that client's private state, which stays in the server's ``ClientStore``.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedferret.core.exchanges import Body, Failure, Reply, Score, Train
from fedferret.core.node import Codec
from fedferret.core.rounds import RunState, longest_update
from fedferret.core.spool import Place, Spool
from fedferret.core.text import plain_line
from fedferret.engines.client_store import ClientStore
from fedferret.engines.replay import Protection
from fedferret.engines.transport import DONE, MISSING, PARTS, REFUSED, Messages, Received, Request, Response, Transport

SENDINGS = 4  # requests to one client in an exchange: recipe missing, then records, then the replica differs
ERRORS = 3  # errors of a site's processes that are not believed in an exchange: nobody signs them
_FRAME = 64 << 10  # bytes of a response beside the reply
_SUM = 64  # bytes of a sum in a reply with scores: its name and value
_GUARDS = 1 << 20  # bytes of a reply that a guard declares: keys and shares for each of the cohort
_SLACK = 4  # a response is decoded up to this many times the longest reply; the intake is exact
_LARGEST = 1 << 40  # no round, version or process has this number


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
        protection: Protection | None = None,
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
            protection: seal and numbers of the messages; None: no seal, and numbers from this machine's clock.
            on_client_start: called with a client's name when its reply's turn comes.
            log: called with a line for each thing an operator should know that is no failure.
            on_message: called with every message.
        """
        self._store = store or ClientStore()
        self.transport, self.codec = transport, codec
        self.protection = protection or Protection()
        self.recipe, self.run = recipe, hashlib.sha256(recipe.encode()).hexdigest()
        self.base, self.deadline, self.workers = base, deadline, tuple(workers)
        self.on_client_start, self.log, self.on_message = on_client_start, log, on_message
        self.held: dict[str, int] = {}  # the version that each worker holds

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterator[Reply | Failure]:
        """Every client's outcome, in the bodies' order, each as soon as those before it are known; see ``Engine``."""
        with tempfile.TemporaryFile() as file:
            yield from _Exchange(self, self._store, bodies, state, Spool(file)).run()
        self._store.flush()

    def commit(self, round: int, refused: Sequence[str]) -> None:
        """What the round made of simulated clients is what they are, but for those that were refused."""
        self._store.withdraw(refused)
        self._store.commit(round)

    def close(self) -> None:
        """End the transport."""
        self.transport.close()


def largest_response(bodies: Mapping[str, Body], state: RunState) -> int:
    """Bytes that a site's response may have; a longer one is not even decoded.

    Args:
        bodies: of one exchange, by client.
        state: of the run, before the round.

    Returns:
        A few times the method's formula for an update; by the number of sums for scores; a constant for guards.
    """
    body = next(iter(bodies.values()), None)
    if isinstance(body, Train):
        return _FRAME + math.ceil(_SLACK * longest_update(state.node, len(bodies), body.round))
    return _FRAME + (_SUM * len(state.node.task.objective.sums) if isinstance(body, Score) else _GUARDS)


class _Exchange:
    """One call of ``exchange``."""

    def __init__(
        self, engine: Remote, store: ClientStore, bodies: Mapping[str, Body], state: RunState, spool: Spool
    ) -> None:
        self.engine, self.store, self.bodies, self.state, self.spool = engine, store, bodies, state, spool
        self.end = time.monotonic() + engine.deadline
        self.round = next((body.round for body in bodies.values()), state.round)
        self.fingerprint = state.node.fingerprint()
        self.limit = largest_response(bodies, state)
        if engine.workers:  # their responses carry clients' private states, and the workers are this machine's own
            model = state.node.task.model
            self.limit += _GUARDS + 4 * sum(each.numel() * each.itemsize for each in model.parameters())
        self.tickets: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.digests: dict[str, str] = {}  # SHA-256 of what was sent
        self.errors: dict[str, int] = {}  # how many errors came in a client's name; nobody signs them
        self.dropped: dict[str, int] = {}  # how many messages in a client's name were not its response
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
        self.numbers |= {name: self.engine.protection.numbers.next() for name in names}
        return self.engine.transport.exchange(Messages(names, self._message), max(0.0, self._left()))

    def _message(self, name: str) -> bytes:
        engine, state = self.engine, self.state
        client = "" if name in engine.workers else name
        missing = self._missing(name)
        update = state.log.since(missing.since)
        private = self.store.get(client) if client and engine.workers else None
        counted, counted_epoch = state.counted(client)
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
                counted=counted,
                counted_epoch=counted_epoch,
                rebuild=missing.rebuild,
                private=b"" if private is None else engine.codec.encode(private),
                body=self.bodies[client] if client else None,
                sequence=self.numbers[name],
            )
        )
        message = engine.protection.seal.close(message)
        self.digests[name] = hashlib.sha256(message).hexdigest()
        self._log_event("request", name, payload_bytes=update.size, framed_bytes=len(message))
        return message

    def _missing(self, name: str) -> Missing:
        """By the books, or as the site said itself."""
        if name in self.missing:
            return self.missing[name]
        if self.engine.workers:  # a worker not heard from yet has nothing; a client's request brings nothing
            held = self.engine.held.get(name) if name in self.engine.workers else self.state.log.version
        else:
            held = self.state.holds(name)
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
                    engine.log(f"{received.site}: {plain_line(response.reason)}")

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
            self.settled[client] = Failure(client, "local", plain_line(response.reason))
        elif (response.version, response.fingerprint) != (self.state.log.version, self.fingerprint):
            return self._send_missing(client, response)
        else:
            self.settled[client] = self.spool.put(response.reply), self.spool.put(response.private)
            if response.reason:  # what the site did without, such as a private state that is no longer held
                self.engine.log(f"{client}: {plain_line(response.reason)}")
                self._log_event("notice", client, note=plain_line(response.reason))
        return False

    def _read(self, received: Received) -> Response | str:
        """The response that a site's message is, or what is wrong with it."""
        name, seal = received.site, self.engine.protection.seal
        if received.content is None:
            reason = self.wrong.get(name) or received.reason or "no reply before the deadline"
            self.errors[name] = self.errors.get(name, 0) + 1
            return self._drop(received, reason) if seal.signs and self.errors[name] <= ERRORS else reason
        try:
            content = seal.open(name, received.content)
        except ValueError as error:
            return self._drop(received, plain_line(str(error)))
        if len(content) > self.limit:
            return f"sent {len(content):,} bytes, and no response of this run has more than {self.limit:,}"
        try:
            return self._checked(received, content)
        except OSError:
            raise  # of a disk: no fault of this site
        except Exception as error:  # whatever strange bytes may raise, in a message's own text too
            return f"{type(error).__name__}: {plain_line(str(error))}"

    def _checked(self, received: Received, content: bytes) -> Response | str:
        """The response that these bytes are; nothing of it is logged before it is known to be one."""
        name, response = received.site, self.engine.codec.decode(content)
        if not isinstance(response, Response):
            return f"a {type(response).__name__} came where a Response was expected"
        if response.status not in (DONE, MISSING, REFUSED):
            return f"sent the invalid status {plain_line(response.status)!r}"
        if response.status == MISSING and response.reason not in PARTS:
            return f"says that {plain_line(response.reason, 60)!r} is missing, and no such thing is sent"
        if max(abs(response.version), abs(response.process), abs(response.round)) >= _LARGEST:
            return f"sent a version, a process or a round of {_LARGEST:,} or more"
        self._log_event(
            response.status,
            name,
            payload_bytes=len(response.reply),
            framed_bytes=len(content),
            version=response.version,
            process=response.process,
            note=plain_line(response.reason),
        )
        if response.ticket == self.digests[name] and response.status == REFUSED:  # it could not even read the request
            return f"did not take the request: {plain_line(response.reason)}"
        if response.status == REFUSED and not response.run:
            return self._drop(received, f"did not take a request that came damaged: {plain_line(response.reason)}")
        if (response.ticket, response.sequence) != (self.tickets[name], self.numbers[name]):
            return self._drop(received, f"replied to a request of round {response.round} that is over")
        client = "" if name in self.engine.workers else name
        head = self.engine.run, self.state.node.epoch, self.round, client
        if (response.run, response.epoch, response.round, response.client) != head:
            return f"replied for {plain_line(response.client)} in round {response.round}, which it was not asked"
        return response

    def _drop(self, received: Received, reason: str) -> str:
        """Have the request sent again, since what came need not be from the site, and log that; returns the reason."""
        if received.site not in self.settled and received.again(reason):
            self.dropped[received.site] = self.dropped.get(received.site, 0) + 1
            if self.dropped[received.site] == 1:  # a flood has one line
                self.engine.log(f"{received.site}: {reason}; dropped, and its request is sent again")
        return reason

    def _send_missing(self, client: str, response: Response) -> bool:
        """The site has not what the request builds on: remember what to send with the next."""
        missing, missed = self._named(response), response.reason if response.status == MISSING else "replica"
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
            reason = f"its {missed} is still missing after it was sent"
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
        self.wrong[client] = f"its {missed} is missing, and the time was over before it was sent"
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
        except OSError:
            raise  # of a disk: no fault of this client
        except Exception as error:  # whatever strange bytes may raise
            return Failure(client, "wire", f"{type(error).__name__}: {plain_line(str(error))}")

    def _named(self, response: Response) -> Missing:
        """What a site says is missing; one that replied from another replica is missing the run's."""
        if response.status == DONE or response.reason == "replica":
            return Missing(0, recipe=True, rebuild=True)
        held = min(max(0, response.version), self.state.log.version)
        return Missing(held, recipe=response.reason == "recipe")

    def _log_event(self, what: str, name: str, **facts: Any) -> None:
        event = {"what": what, "run": self.engine.run[:16], "round": self.round, "client": name, **facts}
        self.engine.on_message(event)

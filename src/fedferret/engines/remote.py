"""The server's half of any engine that is not this process: an Order to each client, a Receipt back, no trust.

    Job -> one order per client -> transport -> receipts, as they come -> checked -> spooled -> Answers in cohort order

* An order carries what the client's site lacks of the log, by the server's books. A site that lacks more says so and is
  sent that; a site whose replica has another hash is named, and has it rebuilt from base and log once.
* Every order has a ticket of its own. A receipt with another is late, or a second one, and counts for nothing.
* Receipts wait for their turn in a temporary file: the server's memory does not grow with their number.
* Whatever a site does becomes one Failure with one line; nothing that comes back raises here.

A transport with workers (a simulation) is brought up to date worker by worker at the start of a round; then any of them
takes any client's order, with that client's private state, which stays in the server's ``ClientStore``.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedferret.core import tree
from fedferret.core.pooling import tensors
from fedferret.core.rounds import ClientUpdate, Codec, Failure, Job
from fedferret.engines.client_store import ClientStore
from fedferret.engines.envelope import open_envelope
from fedferret.engines.transport import Received, Request, Response, Transport, check_fields

SENDINGS = 4  # of orders to one client in a round: it may lack the recipe, then records, then differ
_SMALLEST_LIMIT = 1 << 20  # bytes that any answer may have, however small the model


@dataclass
class Missing:
    """What a site is to be sent beside the order itself."""

    since: int
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
        record: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        """``recipe``: its identity as TOML. ``base``: SHA-256 of the base weights. ``deadline``: seconds of a round.

        ``workers``: the transport's, of which any plays any client; () where every client is a site of its own.
        ``log`` hears a line for each thing an operator should know that is no failure; ``record`` of every letter.
        """
        self.store = store or ClientStore()
        self.transport, self.codec = transport, codec
        self.recipe, self.run = recipe, hashlib.sha256(recipe.encode()).hexdigest()
        self.base, self.deadline, self.workers = base, deadline, tuple(workers)
        self.on_client_start, self.log, self.record = on_client_start, log, record
        self.held: dict[str, int] = {}  # the version that each worker holds

    def map(self, job: Job, cohort: Sequence[str]) -> Iterator[ClientUpdate | Failure]:
        """Every client's outcome, in the cohort's order, each as soon as those before it are known."""
        with tempfile.TemporaryFile() as spool:
            yield from _Round(self, job, cohort, Spool(spool)).play()

    def close(self) -> None:
        """End the transport."""
        self.transport.close()


class Spool:
    """Bytes that wait on disk. ``put`` says where they lie, ``get`` reads them there."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def put(self, content: bytes) -> tuple[int, int]:
        """Append; returns place and length."""
        place = self._file.seek(0, 2)
        self._file.write(content)
        return place, len(content)

    def get(self, place: tuple[int, int]) -> bytes:
        """What was put there."""
        self._file.seek(place[0])
        content: bytes = self._file.read(place[1])
        return content


class _Messages(Mapping[str, bytes]):
    """Orders by addressee, each encoded when it is asked for: a model's snapshot to many is never held many times."""

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


class _Round:
    """One call of ``map``."""

    def __init__(self, engine: Remote, job: Job, cohort: Sequence[str], spool: Spool) -> None:
        self.engine, self.job, self.cohort, self.spool = engine, job, cohort, spool
        self.end = time.monotonic() + engine.deadline
        self.fingerprint = tree.digest(tensors(job.public))
        # no message of a round is larger than a few models; one that claims to be is not even decoded
        self.limit = _SMALLEST_LIMIT + 4 * sum(each.numel() * each.itemsize for each in job.task.model.parameters())
        self.tickets: dict[str, str] = {}
        self.missing: dict[str, Missing] = {}  # what each addressee is to be sent
        self.sendings = dict.fromkeys(cohort, 0)
        self.settled: dict[str, Failure | tuple[tuple[int, int], tuple[int, int]]] = {}
        self.wrong: dict[str, str] = {}  # what was wrong with what a client sent, while a better copy may come

    def play(self) -> Iterator[ClientUpdate | Failure]:
        """Send, listen, send again to those who lack something, until all are settled or the time is over."""
        turn = iter(self.cohort)
        client = next(turn, None)
        waiting = list(self.cohort)
        while waiting:
            self._bring_up_workers()
            again: list[str] = []
            for received in self._exchange(waiting):
                if self._take(received):
                    again.append(received.site)
                while client in self.settled:
                    yield self._outcome(client)
                    client = next(turn, None)
            for name in waiting:
                if name not in self.settled and (name not in again or self._left() <= 0):
                    self.settled[name] = Failure(name, "wire", self.wrong.get(name, "no answer before the deadline"))
            waiting = [name for name in waiting if name not in self.settled]
        while client is not None:
            yield self._outcome(client)
            client = next(turn, None)

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _exchange(self, names: Sequence[str]) -> Iterator[Received]:
        self.tickets |= {name: secrets.token_hex(8) for name in names}
        return self.engine.transport.exchange(_Messages(names, self._message), max(0.0, self._left()))

    def _message(self, name: str) -> bytes:
        engine, job = self.engine, self.job
        client = "" if name in engine.workers else name
        missing_parts = self._missing(name)
        update = job.log.since(missing_parts.since)
        private = engine.store.get(client) if client and engine.workers else None
        message = engine.codec.encode(
            Request(
                run=engine.run,
                recipe=engine.recipe if missing_parts.recipe else "",
                base=engine.base,
                client=client,
                round=job.round,
                ticket=self.tickets[name],
                version=job.log.version,
                fingerprint=self.fingerprint,
                since=missing_parts.since,
                snapshot=update.snapshot or b"",
                records=update.records,
                counted=job.versions[client] + 1 if client in job.versions else 0,
                rebuild=missing_parts.rebuild,
                private=b"" if private is None else engine.codec.encode(private),
            )
        )
        self._log_event("request", name, payload_bytes=update.size, framed_bytes=len(message))
        return message

    def _missing(self, name: str) -> Missing:
        """By the books, or as the site said itself."""
        if name in self.missing:
            return self.missing[name]
        if self.engine.workers:  # a worker that has not been heard of lacks everything; a client's order brings nothing
            held = self.engine.held.get(name) if name in self.engine.workers else self.job.log.version
        else:
            held = self.job.versions.get(name)
        return Missing(held or 0, recipe=held is None)

    def _bring_up_workers(self) -> None:
        """Have every worker that is behind come to this round's version; one that cannot will say so to a client."""
        engine, version = self.engine, self.job.log.version
        for _ in range(SENDINGS):
            behind = [name for name in engine.workers if engine.held.get(name) != version]
            if not behind or self._left() <= 0:
                return
            for received in self._exchange(behind):
                response = self._read(received)
                if isinstance(response, Response) and response.outcome == "ok":
                    engine.held[received.site] = response.version
                    self.missing.pop(received.site, None)
                elif isinstance(response, Response) and response.outcome == "missing":
                    self.missing[received.site] = self._said(response)
                elif isinstance(response, Response):
                    engine.log(f"{received.site}: {_line(response.reason)}")
                else:
                    engine.log(f"{received.site}: {response}")

    def _take(self, received: Received) -> bool:
        """Settle the client, or note why not; returns whether it is to be sent another order."""
        client = received.site
        if client not in self.tickets:
            self.engine.log(f"{client}: a letter came from a site that was asked nothing; ignored")
            return False
        if client in self.settled:
            self.engine.log(f"{client}: a second answer in round {self.job.round}; ignored")
            return False
        response = self._read(received)
        if not isinstance(response, Response):
            self.wrong[client] = response
            return False
        if response.outcome == "missing":
            return self._note_missing(client, response)
        if response.outcome == "refused":
            self.settled[client] = Failure(client, "local", _line(response.reason))
        elif (response.version, response.fingerprint) != (self.job.log.version, self.fingerprint):
            return self._note_missing(client, response)
        else:
            self.settled[client] = self.spool.put(response.content), self.spool.put(response.private)
        return False

    def _read(self, received: Received) -> Response | str:
        """The receipt that a delivery brings, or what is wrong with it."""
        if received.content is None:
            return self.wrong.get(received.site) or received.reason or "no answer before the deadline"
        if len(received.content) > self.limit:
            return f"sent {len(received.content):,} bytes, and no answer of this run has more than {self.limit:,}"
        try:
            response = self.engine.codec.decode(received.content)
            if not isinstance(response, Response):
                return f"a {type(response).__name__} came where a Receipt was expected"
            check_fields(response)
        except (ValueError, TypeError, RecursionError) as error:
            return f"{type(error).__name__}: {_line(str(error))}"
        name = received.site
        self._log_event(
            response.outcome,
            name,
            payload_bytes=len(response.content),
            framed_bytes=len(received.content),
            version=response.version,
            process=response.process,
            note=_line(response.reason),
        )
        if response.ticket == "" and response.outcome == "refused":  # it could not even read the order
            return f"did not take the order: {_line(response.reason)}"
        if response.ticket != self.tickets[name]:
            return f"answered an order of round {response.round} that is over"
        client = "" if name in self.engine.workers else name
        if (response.run, response.round, response.client) != (self.engine.run, self.job.round, client):
            return f"answered for {_line(response.client)} in round {response.round}, which it was not asked"
        if response.outcome not in ("ok", "missing", "refused"):
            return f"answered with the word {_line(response.outcome)!r}, which means nothing"
        return response

    def _note_missing(self, client: str, response: Response) -> bool:
        """The site has not what the order builds on: remember what to send with the next."""
        missing_parts = self._said(response)
        known = self.missing.get(client)
        self.sendings[client] += 1
        if missing_parts.rebuild and known and known.rebuild:
            self.settled[client] = Failure(
                client,
                "replica",
                f"rebuilt from base and log it still differs at version {response.version}: its base model, its "
                f"fedferret or its machine computes other bits",
            )
            return False
        if self.sendings[client] == SENDINGS:
            self.settled[client] = Failure(
                client, "replica", f"still lacks its {_line(response.reason)} after it was sent"
            )
            return False
        if missing_parts.rebuild:
            self.engine.log(f"{client}: its replica differs from the server's; it rebuilds from base and log")
        if self.engine.workers:
            self.engine.held.clear()  # which of them lacks it is not said, and sending it to all costs little
            if missing_parts.rebuild:
                self.missing |= {name: missing_parts for name in self.engine.workers}
        else:
            missing_parts.rebuild = missing_parts.rebuild or bool(known and known.rebuild)
            self.missing[client] = missing_parts
        self.wrong[client] = f"lacks its {_line(response.reason)}, and the time was over before it was sent"
        return True

    def _outcome(self, client: str) -> ClientUpdate | Failure:
        """A settled client's outcome; what it sent is decoded only now, one at a time."""
        self.engine.on_client_start(client)
        settled = self.settled[client]
        if isinstance(settled, Failure):
            return settled
        content, private = settled
        codec = self.engine.codec
        try:
            answer = open_envelope(client, self.spool.get(content), codec)
            if private[1] and self.engine.workers:
                self.engine.store.stage(client, codec.decode(self.spool.get(private)), self.job.round)
            return answer
        except (ValueError, TypeError, RecursionError) as error:
            return Failure(client, "wire", f"{type(error).__name__}: {_line(str(error))}")

    def _said(self, response: Response) -> Missing:
        """What a site that lacks something is to be sent; one that answered from another replica lacks its replica."""
        if response.outcome == "ok" or response.reason == "replica":
            return Missing(0, recipe=True, rebuild=True)
        return Missing(min(max(0, response.version), self.job.log.version), recipe=response.reason == "recipe")

    def _log_event(self, what: str, name: str, **facts: Any) -> None:
        event = {"what": what, "run": self.engine.run[:16], "round": self.job.round, "client": name, **facts}
        self.engine.record(event)


def _line(text: str) -> str:
    """A stranger's words on one line of the operator's terminal."""
    return "".join(message if message.isprintable() else "�" for message in " ".join(text.split()))[:300]

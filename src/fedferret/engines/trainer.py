"""The site's half: model, replica, data and private state in one process that answers orders. No socket in it.

    order -> the recipe's work, built once          (model loaded once: the process id in every receipt shows it)
          -> replica up to the order's version      (base + own log on disk + the records of the order)
          -> is its hash the server's?              (else "lacks replica": the server names the site, and it rebuilds)
          -> join / local -> receipt

    FOLDER/runs/<run>/recipe.toml   what was asked of this site
    FOLDER/runs/<run>/log/          the records that it applied, each file whole or absent
    FOLDER/runs/<run>/clients/      its private state after each round that may still be the last one counted

A trainer that is started again rebuilds the replica from its base and this log, and asks the server for nothing but
what it missed. Without a folder (a simulation's worker) nothing is kept, and private states come with the orders.
Whatever comes in, ``answer`` raises nothing: a mistake, ours or the server's, is one line in the receipt.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, Examples, Task
from fedferret.core.errors import RunError
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.core.log import Update
from fedferret.core.pooling import tensors
from fedferret.engines.envelope import seal_envelope
from fedferret.engines.site_folder import RunFolder
from fedferret.engines.transport import Request, Response, check_fields
from fedferret.tracking.checkpoint import replay
from fedferret.wire import codec


@dataclass(frozen=True)
class Work:
    """What a recipe becomes at a site, with the model in its base's weights."""

    task: Task
    algorithm: Algorithm[Any, Any, Any, Any, Any]
    seed: int
    data: Mapping[str, Examples]  # of the clients that are played here: a site's one, or all of a simulation's
    base: str  # SHA-256 of the base weights
    data_fingerprint: str


PRIVACY = "none"  # what answers are protected with, for the audit: no clipping with noise, no secure sum
Build = Callable[[str, Path | None], Work]  # from a recipe as TOML, and a folder to work in


class MissingState(Exception):
    """The order cannot be carried out with what is here: "recipe", "records" or "replica"."""


@dataclass
class Replica:
    """One run at this site: its work, and the public state at a version."""

    run: str
    work: Work
    public: Any
    version: int
    fingerprint: str = ""  # of this version, once it was asked for

    def hash(self) -> str:
        """SHA-256 of the public state."""
        if not self.fingerprint:
            self.fingerprint = tree.digest(tensors(self.public))
        return self.fingerprint


class Trainer:
    """Answers orders, one at a time."""

    def __init__(
        self,
        build: Build,
        folder: Path | None = None,
        client: str | None = None,
        record: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        """``client``: the only one that is played here; None: any. ``record`` hears of every order and receipt."""
        self._build, self._folder, self._client, self._record = build, folder, client, record
        self._replica: Replica | None = None
        self._last: tuple[Request, Response] | None = None  # the answer given last: the same order has the same

    def handle(self, message: bytes) -> bytes:
        """The receipt for an order, both encoded."""
        request = Request("", "", "", "", 0, "", 0, "", 0, b"", (), 0, False, b"")
        notes: list[str] = []
        try:
            request = read_request(message)
            self._log_event("request", request, len(message), 0, "")
            response = self._carry_out(request, notes)
        except MissingState as missing:
            response = self._response(request, "missing", reason=str(missing))
        except Exception as error:
            response = self._response(request, "refused", reason=" ".join(f"{type(error).__name__}: {error}".split()))
        encoded = codec.encode(response)
        note = "; ".join([*notes, *([response.reason] if response.reason else [])])
        try:
            self._log_event(response.outcome, request, len(encoded), len(response.content), note)
        except OSError as error:  # the disk is full: what cannot be written down is not sent
            encoded = codec.encode(self._response(request, "refused", reason=f"cannot write its audit file: {error}"))
        return encoded

    def _carry_out(self, request: Request, notes: list[str]) -> Response:
        if request.client and self._client is not None and request.client != self._client:
            raise RunError(f"this site plays {self._client}, and the order is for {request.client}")
        replica = self._open(request, notes)
        self._catch_up(replica, request)
        if request.fingerprint and replica.hash() != request.fingerprint:
            raise MissingState("replica")
        if not request.client:
            return self._response(request, "ok")
        if self._last and _same_work(self._last[0], request):
            return replace(self._last[1], ticket=request.ticket)
        if request.client not in replica.work.data:
            raise RunError(f"there is no data here for {request.client}")
        private = self._private(request, notes)
        content, private = seal_envelope(
            replica.work.algorithm,
            replica.work.task,
            replica.public,
            private,
            replica.work.data[request.client],
            codec,
            seed=replica.work.seed,
            round=request.round,
            client=request.client,
        )
        kept = b"" if private is None else codec.encode(private)
        folder = self._run_folder(request.run)
        if folder and kept:
            folder.keep(request.round, kept)
        response = self._response(request, "ok", content, private=b"" if folder else kept)
        if folder:  # one client: a server that was killed meanwhile asks for the same again
            self._last = request, response
        return response

    def _open(self, request: Request, notes: list[str]) -> Replica:
        """The replica of the order's run, built from the base and this site's log if it is not in memory."""
        folder = self._run_folder(request.run)
        if self._replica and self._replica.run == request.run and not request.rebuild:
            self._check_base(self._replica.work, request)
            return self._replica
        self._replica, self._last = None, None  # the memory of two models is one too many
        if folder and request.rebuild:
            folder.forget()
        recipe = request.recipe or (folder.recipe() if folder else "")
        if not recipe:
            raise MissingState("recipe")
        if hashlib.sha256(recipe.encode()).hexdigest() != request.run:
            raise RunError("the recipe that came is not the one that the order names")
        work = self._build(recipe, folder.path if folder else None)
        self._check_base(work, request)
        public, _ = work.algorithm.init(work.task, Key.of(work.seed, "begin"))
        replica = Replica(request.run, work, public, 0)
        if folder:
            write_atomically(folder.path / "recipe.toml", recipe)
            try:
                update, version = folder.log(notes)
                replica.public, replica.version = replay(work.task, work.algorithm, public, update), version
            except (RunError, ValueError) as error:
                notes.append(f"the log in {folder.path} is of no use ({error}): it is begun again")
                folder.forget()
                raise MissingState("records") from None
        self._replica = replica
        return replica

    def _check_base(self, work: Work, request: Request) -> None:
        if work.base != request.base:
            raise RunError(
                f"the base model here has SHA-256 {work.base[:12]}…, and the run began from {request.base[:12]}…: "
                f"give this site the same weights"
            )

    def _catch_up(self, replica: Replica, request: Request) -> None:
        """Apply what of the order's records the replica lacks, then write it to this site's log."""
        first = request.version - len(request.records) + 1  # version of the first record
        if replica.version > request.version:  # an order that is over; or a server whose folder is an earlier day's
            raise MissingState("replica")
        if replica.version == request.version:
            return
        snapshot = request.snapshot if request.snapshot and replica.version < first - 1 else None
        if snapshot is None and replica.version < first - 1:
            raise MissingState("records")
        at = first - 1 if snapshot is not None else replica.version
        update = Update(snapshot, request.records[at - first + 1 :])
        try:
            public = replay(replica.work.task, replica.work.algorithm, replica.public, update)
        except RunError:
            self._replica = None
            raise MissingState("replica") from None
        except BaseException:  # the public state is half-way: it is rebuilt from the log at the next order
            self._replica = None
            raise
        replica.public, replica.version, replica.fingerprint = public, request.version, ""
        if folder := self._run_folder(request.run):
            folder.add(update, at)

    def _private(self, request: Request, notes: list[str]) -> Any | None:
        """The client's private state after the last round in which it was counted."""
        folder = self._run_folder(request.run)
        if folder is None:
            return codec.decode(request.private) if request.private else None
        encoded = folder.private(request.counted)
        try:
            return codec.decode(encoded) if encoded else None
        except codec.WireError as error:
            notes.append(f"the private state of round {request.counted} is damaged ({error}): it is begun again")
            return None

    def _run_folder(self, run: str) -> RunFolder | None:
        return RunFolder(self._folder / "runs" / run[:16]) if self._folder else None

    def _response(
        self, request: Request, outcome: str, content: bytes = b"", reason: str = "", private: bytes = b""
    ) -> Response:
        replica = self._replica if self._replica and self._replica.run == request.run else None
        version, fingerprint = (replica.version, replica.hash()) if replica else (-1, "")
        return Response(
            request.run,
            request.round,
            request.ticket,
            request.client,
            outcome,
            version,
            fingerprint,
            os.getpid(),
            content,
            reason,
            private,
        )

    def _log_event(self, what: str, request: Request, framed: int, payload: int, note: str) -> None:
        replica = self._replica
        down = len(request.snapshot) + sum(map(len, request.records))
        self._record(
            {
                "what": what,
                "run": request.run[:16],
                "round": request.round,
                "client": request.client,
                "payload_bytes": down if what == "request" else payload,
                "framed_bytes": framed,
                "version": replica.version if replica else -1,
                "data": replica.work.data_fingerprint if replica else "",
                "privacy": PRIVACY,
                "note": note,
            }
        )


def read_request(message: bytes) -> Request:
    """A received order. Raises ValueError for bytes that are none."""
    request = codec.decode(message)
    if not isinstance(request, Request):
        raise ValueError(f"a {type(request).__name__} came where an Order was expected")
    check_fields(request)
    if not (re.fullmatch("[0-9a-f]{64}", request.run) and request.round > 0 and 0 <= request.since <= request.version):
        raise ValueError("an Order came that names no run, round or version")
    return request


def _same_work(one: Request, other: Request) -> bool:
    """Whether two orders ask for the same work, on whatever way they came."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("run", "client", "round", "version", "fingerprint", "counted")
    )

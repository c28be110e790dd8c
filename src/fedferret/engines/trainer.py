"""The site's half: model, replica, data and private state in one process that answers requests. No socket in it.

    message -> is the seal the server's?             (before anything is decoded)
            -> is its number the highest so far?     (the same bytes again: the same response; see ``replay.py``)
    request -> the recipe's work, built once         (model loaded once: the process id in every response shows it)
            -> replica up to the request's version   (base + the site's log on disk + the records of the request)
            -> is its hash the server's?             (else "replica" is missing, and the site rebuilds it)
            -> node.handle(body) -> response, sealed

    FOLDER/request.last, response.last   the newest request, and the response to it
    FOLDER/runs/<run>/recipe.toml   what was asked of this site
    FOLDER/runs/<run>/log/          the records that it applied, each file whole or absent
    FOLDER/runs/<run>/clients/      its private state after each round that may be, or become, the last one counted
    FOLDER/runs/<run>/epoch         the highest epoch of the run that came: a rewinding begins a higher one

A request of an earlier epoch is refused. The first one of a later epoch makes the site drop the records and states of
the rounds that the server rewound.

A trainer that is started again rebuilds the replica from its base and this log, and asks the server only for what it
missed. Without a folder (a simulation's worker) nothing is kept, and private states come with the requests. Whatever
comes in, ``handle`` raises nothing: a mistake, ours or the server's, is one line in the response.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError
from fedferret.core.exchanges import Score, Train
from fedferret.core.files import write_atomically
from fedferret.core.keys import Key
from fedferret.core.log import LogUpdate
from fedferret.core.node import Diverged, MissingRecords, Node
from fedferret.core.task import Examples
from fedferret.core.text import plain_line
from fedferret.engines.replay import LastRequest
from fedferret.engines.site_folder import RunFolder
from fedferret.engines.transport import DONE, MISSING, REFUSED, SERVER, NoSeal, Request, Response, Seal
from fedferret.wire import codec


@dataclass(frozen=True)
class Work:
    """What a recipe becomes at a site.

    Attributes:
        node: at version 0.
        data: of the clients that work here: a site's one, or all of a simulation's.
        base: SHA-256 of the base weights.
        data_fingerprint: SHA-256 of the examples.
        held_out: what each of these clients holds out.
    """

    node: Node
    data: Mapping[str, Examples]
    base: str
    data_fingerprint: str
    held_out: Mapping[str, Examples] = field(default_factory=dict)


PRIVACY = "none"  # what replies are protected with, for the audit: no clipping with noise, no secure sum
Build = Callable[[str, Path | None], Work]  # from a recipe as TOML, and a folder to work in


class MissingState(Exception):
    """The request needs something that is not here: "recipe", "records" or "replica"."""


@dataclass
class Replica:
    """One run at this site."""

    run: str
    work: Work


class Trainer:
    """Answers requests, one at a time."""

    def __init__(
        self,
        build: Build,
        folder: Path | None = None,
        client: str | None = None,
        on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
        *,
        seal: Seal | None = None,
        allow: Callable[[str, str], None] = lambda recipe, base: None,
        longest_round: float | None = None,
        history: int = 10,
    ) -> None:
        """A trainer without a run yet.

        Args:
            build: makes the work of a recipe.
            folder: of the site; None keeps nothing.
            client: the only one that works here; None: any.
            on_message: called with every request and response, for the audit file.
            seal: of messages from and to the server; None: none.
            allow: called with a run's recipe, as TOML, and the SHA-256 of its base before either is used; raises for a
                run that this site does not take part in.
            longest_round: seconds that one request may compute; None: as long as it takes.
            history: the private states of so many rounds before the last stay, for a run that is rewound.

        Raises:
            UserError: a file in the folder is damaged.
        """
        self._seal = seal or NoSeal()
        self._newest = LastRequest(folder) if folder else None  # a simulation's worker keeps nothing
        self._build, self._folder, self._client, self._on_message = build, folder, client, on_message
        self._allow, self._longest_round = allow, longest_round
        self._history, self._epochs = history, dict[str, int]()  # by run, where no folder keeps it
        self._replica: Replica | None = None
        self._last: tuple[Request, Response] | None = None  # the response given last: the same request has the same

    def handle(self, message: bytes) -> bytes:
        """The response to a request, both encoded and sealed."""
        request, notes = _unread(message), list[str]()
        try:
            content = self._seal.open(SERVER, message)
            request = read_request(content)
            self._log_event("request", request, len(message), 0, "")
            response = self._accepted(request, content, notes)
        except Exception as error:
            response = self._refusal(request, error)
        sealed = self._seal.close(codec.encode(response))
        note = "; ".join([*notes, *([response.reason] if response.reason else [])])
        try:
            self._log_event(response.status, request, len(sealed), len(response.reply), note)
        except OSError as error:  # the disk is full: what cannot be written down is not sent
            response = self._response(request, REFUSED, reason=f"cannot write its audit file: {error}")
            sealed = self._seal.close(codec.encode(response))
        return sealed

    def _accepted(self, request: Request, content: bytes, notes: list[str]) -> Response:
        """The response to a request that is the server's: the stored one, where these bytes have had one."""
        if request.client and self._client is not None and request.client != self._client:
            # before its number counts: another site's request, brought here, must not make this site's own an old one
            raise RunError(f"this site works for {self._client}, and the request is for {request.client}")
        stored = self._newest.accept(request.sequence, content) if self._newest else None
        if stored is not None:
            try:
                response = codec.decode(stored)
                notes.append("the same request again has the same response")
                return response  # type: ignore[no-any-return]  # what was kept below
            except codec.WireError as error:
                notes.append(f"the stored response is damaged ({error}): the work is done again")
        try:
            response = self._carry_out(request, notes)
        except MissingState as missing:
            response = self._response(request, MISSING, reason=str(missing))
        except Exception as error:
            response = self._refusal(request, error)
        if self._newest:
            self._newest.keep(codec.encode(response))
        return response

    def _carry_out(self, request: Request, notes: list[str]) -> Response:
        self._enter_epoch(request, notes)
        replica = self._open(request, notes)
        node = replica.work.node
        self._catch_up(node, request)
        if request.fingerprint and node.fingerprint() != request.fingerprint:
            raise MissingState("replica")
        if not request.client:
            return self._response(request, DONE)
        if self._last and _same_work(self._last[0], request):
            return replace(self._last[1], ticket=request.ticket, sequence=request.sequence)
        holdings = replica.work.held_out if isinstance(request.body, Score) else replica.work.data
        if request.client not in holdings:
            raise RunError(f"there is no data here for {request.client}")
        before, begun_anew = self._private(request, node, notes)

        def examples(holdings: Mapping[str, Examples]) -> Examples:
            held, longest = holdings[request.client], self._longest_round
            return held if longest is None else TimedExamples(held, longest)

        training = partial(examples, replica.work.data)
        reply, private = node.handle(request.body, request.client, before, examples(holdings), training)
        trains = isinstance(request.body, Train)
        kept = trains and private is not None
        folder = self._run_folder(request.run)
        if folder and kept:
            folder.keep(request.client, request.round, private, request.epoch)
        carried = codec.encode(private) if kept and not folder else b""
        response = self._response(request, DONE, codec.encode(reply), begun_anew, carried)
        if folder:  # one client: a server that was killed meanwhile asks for the same again
            self._last = request, response
        return response

    def _enter_epoch(self, request: Request, notes: list[str]) -> None:
        """Refuse a request from before the run was rewound; at the first one after it, drop what that has undone."""
        folder = self._run_folder(request.run)
        known = folder.epoch() if folder else self._epochs.get(request.run, 0)
        if request.epoch < known:
            raise RunError(
                f"the request is of epoch {request.epoch}, and the run was rewound since, to epoch {known}: "
                f"the server's folder is of an earlier day: restore its newest copy, or begin a new epoch there with "
                f"`fedferret rewind RUN --to ROUND`, also of its present round"
            )
        if request.epoch == known:
            return
        # the server's books are those of the round that it went back to: what precedes the records stands
        stands = 0 if request.snapshot else request.version - len(request.records)
        if folder and folder.recipe(request.run, notes):
            folder.rewind(request.epoch, stands, request.counted if request.client else request.version)
            notes.append(f"the run was rewound, epoch {request.epoch}: records after {stands} were dropped")
        self._epochs[request.run] = request.epoch
        self._last = None
        if self._replica and self._replica.run == request.run:
            if self._replica.work.node.version > stands:
                self._replica = None  # it is rebuilt from base and log
            else:
                self._replica.work.node.epoch = request.epoch

    def _open(self, request: Request, notes: list[str]) -> Replica:
        """The replica of the request's run, built from the base and this site's log if it is not in memory."""
        folder = self._run_folder(request.run)
        if self._replica and self._replica.run == request.run and not request.rebuild:
            self._check_base(self._replica.work, request)
            return self._replica
        self._replica, self._last = None, None  # the memory of two models is one too many
        if folder and request.rebuild:
            folder.forget()
        recipe = request.recipe or (folder.recipe(request.run, notes) if folder else "")
        if not recipe:
            raise MissingState("recipe")
        if hashlib.sha256(recipe.encode()).hexdigest() != request.run:
            raise RunError("the recipe that came is not the one that the request names")
        self._allow(recipe, request.base)
        work = self._build(recipe, folder.path if folder else None)
        self._check_base(work, request)
        work.node.epoch = request.epoch
        if folder:
            write_atomically(folder.path / "recipe.toml", recipe)
            folder.keep_epoch(request.epoch)
            try:
                work.node.catch_up(folder.log(notes))
            except (RunError, ValueError) as error:
                notes.append(f"the log in {folder.path} is of no use ({error}): it is begun again")
                folder.forget()
                raise MissingState("records") from None
        self._replica = Replica(request.run, work)
        return self._replica

    def _check_base(self, work: Work, request: Request) -> None:
        if work.base != request.base:
            raise RunError(
                f"the base model here has SHA-256 {work.base[:12]}…, and the run began from {request.base[:12]}…: "
                f"give this site the same weights"
            )

    def _catch_up(self, node: Node, request: Request) -> None:
        """Apply what the replica is missing of the request's records, then write it to this site's log."""
        before = node.version
        if before > request.version or node.epoch != request.epoch:
            raise MissingState("replica")  # a request that is over; or a server with the folder of an earlier day
        update = LogUpdate(request.version, request.snapshot or None, request.records)
        try:
            node.catch_up(update)
        except MissingRecords:
            raise MissingState("records") from None
        except Diverged:
            self._replica = None
            raise MissingState("replica") from None
        except BaseException:  # the public state is half-way: it is rebuilt from the log at the next request
            self._replica = None
            raise
        if node.version > before and (folder := self._run_folder(request.run)):
            folder.add(update, before)

    def _private(self, request: Request, node: Node, notes: list[str]) -> tuple[Any | None, str]:
        """The client's private state after the last round in which it was counted; why there is none, if one is due."""
        folder, counted = self._run_folder(request.run), request.counted
        if folder is None:
            return (codec.decode(request.private) if request.private else None), ""
        noted = len(notes)
        epoch = None if request.counted_epoch < 0 else request.counted_epoch
        state = folder.private(request.client, counted, request.version - self._history, notes, epoch)
        if state is not None or not counted or not node.leaves_state(counted):
            return state, ""
        what = "damaged, or of another copy of the run" if len(notes) > noted else "no longer held"
        return None, f"the private state of round {counted} is {what}: it is begun again"

    def _run_folder(self, run: str) -> RunFolder | None:
        return RunFolder(self._folder / "runs" / run[:16]) if self._folder else None

    def _response(
        self, request: Request, status: str, reply: bytes = b"", reason: str = "", private: bytes = b""
    ) -> Response:
        replica = self._replica if self._replica and self._replica.run == request.run else None
        node = replica.work.node if replica else None
        version, fingerprint = (node.version, node.fingerprint()) if node else (-1, "")
        head = request.run, request.epoch, request.round, request.ticket, request.client
        return Response(*head, status, version, fingerprint, os.getpid(), reply, reason, private, request.sequence)

    def _refusal(self, request: Request, error: Exception) -> Response:
        return self._response(request, REFUSED, reason=plain_line(f"{type(error).__name__}: {error}"))

    def _log_event(self, what: str, request: Request, framed: int, payload: int, note: str) -> None:
        replica = self._replica
        down = len(request.snapshot) + sum(map(len, request.records))
        self._on_message(
            {
                "what": what,
                "run": request.run[:16],
                "round": request.round,
                "client": request.client,
                "body": type(request.body).__name__ if request.body is not None else "",
                "payload_bytes": down if what == "request" else payload,
                "framed_bytes": framed,
                "version": replica.work.node.version if replica else -1,
                "data": replica.work.data_fingerprint if replica else "",
                "privacy": PRIVACY,
                "note": note,
            }
        )


class TimedExamples:
    """Examples that give no more batches once a time is over, so that a training of any method ends."""

    def __init__(self, examples: Examples, seconds: float, end: float | None = None) -> None:
        """Examples with a clock that runs.

        Args:
            examples: of one client.
            seconds: until no more batches are given.
            end: of that time on the monotonic clock; None: from now.
        """
        self._examples, self._seconds = examples, seconds
        self._end = time.monotonic() + seconds if end is None else end

    def __len__(self) -> int:
        return len(self._examples)

    def batches(self, size: int, key: Key | None) -> Iterator[Any]:
        """See ``Examples``. Raises RunError once the time is over."""
        for batch in self._examples.batches(size, key):
            if time.monotonic() > self._end:
                raise RunError(
                    f"policy.longest_round={self._seconds:g}: the round asks for more than the {self._seconds:g} s "
                    f"that this site allows"
                )
            yield batch

    def take(self, rows: Sequence[int]) -> TimedExamples:
        """See ``Examples``; the clock runs on."""
        return TimedExamples(self._examples.take(rows), self._seconds, self._end)


def read_request(message: bytes) -> Request:
    """A received request. Raises ValueError for bytes that are none."""
    request = codec.decode(message)
    if not isinstance(request, Request):
        raise ValueError(f"a {type(request).__name__} came where a Request was expected")
    if not (re.fullmatch("[0-9a-f]{64}", request.run) and min(request.epoch, request.round, request.version) >= 0):
        raise ValueError("a Request came that names no run, round or version")
    if not 0 < request.sequence < 1 << 62:
        raise ValueError(f"a Request came with the number {request.sequence}")
    return request


def _unread(message: bytes) -> Request:
    """What is known of a message that cannot be read: its SHA-256, by which the server knows what it sent."""
    digest = hashlib.sha256(message).hexdigest()
    return Request("", 0, 0, digest, "", "", "", 0, "", b"", (), 0, 0, False, b"", None, 0)


def _same_work(one: Request, other: Request) -> bool:
    """Whether two requests ask for the same work, on whatever way they came."""
    names = ("run", "epoch", "client", "round", "version", "fingerprint", "counted", "counted_epoch")
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and codec.encode(one.body) == codec.encode(other.body)

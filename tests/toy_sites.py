"""The toy world at trainers: sites in this process behind a transport that can misbehave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.guard import Guard
from fedferret.core.node import Node
from fedferret.core.task import Examples
from fedferret.engines.client_store import ClientStore
from fedferret.engines.remote import Remote
from fedferret.engines.replay import Protection
from fedferret.engines.trainer import Trainer, Work
from fedferret.engines.transport import Received, Seal
from fedferret.wire import codec
from toys import Simulation, simulate, toy_clients, toy_task

RECIPE = "a recipe that both ends know\n"
BASE = hashlib.sha256(b"the base").hexdigest()


class Direct:
    """A transport that calls trainers; ``tamper`` may change, drop or add what comes back.

    ``repeats``: how often it sends one message again, if what came back was dropped.
    """

    def __init__(self, trainers: Mapping[str, Trainer], workers: Sequence[str] = (), repeats: int = 0) -> None:
        self.trainers, self.workers, self.repeats = dict(trainers), tuple(workers), repeats
        self.tamper: Callable[[str, bytes, bytes], list[Any]] = lambda site, message, response: [response]
        self.exchanges: list[dict[str, int]] = []  # bytes of each message, by addressee
        self.closed = False

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """In the reverse of the order in which they were given: arrival must not matter."""
        sent, left, waiting = {}, dict.fromkeys(messages, self.repeats), list(messages)

        def again(site: str, reason: str) -> bool:
            left[site] -= 1
            waiting.extend([site] if left[site] >= 0 else [])
            return left[site] >= 0

        while waiting:
            site = waiting.pop()
            message = messages[site]
            sent[site] = len(message)
            taker = site if site in self.trainers else self.workers[len(waiting) % len(self.workers)]
            for content in self.tamper(site, message, self.trainers[taker].handle(message)):
                received = content if isinstance(content, Received) else Received(site, content)
                yield replace(received, again=partial(again, site)) if self.repeats else received
        self.exchanges.append(sent)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def toy_trainer(
    algorithm: AnyAlgorithm,
    rounds: int,
    data: Mapping[str, Examples],
    folder: Path | None = None,
    client: str | None = None,
    base: str = BASE,
    on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
    built: list[str] | None = None,
    guards: Sequence[Guard] = (),
    held_out: Mapping[str, Examples] | None = None,
    seal: Seal | None = None,
    **limits: Any,
) -> Trainer:
    """A trainer with a toy model; ``built`` counts how often it was made, ``limits`` are those of a site's policy."""

    def build(recipe: str, _: Path | None) -> Work:
        if built is not None:
            built.append(recipe)
        node, _ = Node.start(toy_task(rounds, algorithm), algorithm, 3, codec, guards=guards)
        return Work(node, data, base, "fingerprint of the data", held_out or {})

    return Trainer(build, folder, client, on_message, seal=seal, **limits)


def simulate_sites(
    algorithm: AnyAlgorithm,
    rounds: int,
    transport: Callable[[Mapping[str, Examples]], Direct],
    *,
    data: Mapping[str, Examples] | None = None,
    log: Callable[[str], None] = lambda line: None,
    on_message: Callable[[Mapping[str, Any]], None] = lambda event: None,
    protection: Protection | None = None,
    **options: Any,
) -> Simulation:
    """``simulate`` with the engine Remote over a transport."""

    def engine(clients: Mapping[str, Examples], given: Any, store: ClientStore) -> Remote:
        link = transport(clients)
        return Remote(
            link,
            given,
            recipe=RECIPE,
            base=BASE,
            deadline=60.0,
            workers=link.workers,
            store=store,
            protection=protection,
            log=log,
            on_message=on_message,
        )

    options = {"keeps_states": False, **options}  # True: the server keeps the states, for workers
    return simulate(algorithm, rounds, data=data or toy_clients(), engine=engine, **options)


def sites(algorithm: AnyAlgorithm, rounds: int, root: Path) -> Callable[[Mapping[str, Examples]], Direct]:
    """A trainer with a folder for each client."""
    return lambda data: Direct(
        {name: toy_trainer(algorithm, rounds, {name: rows}, root / name, name) for name, rows in data.items()}
    )


def workers(algorithm: AnyAlgorithm, rounds: int, count: int = 2) -> Callable[[Mapping[str, Examples]], Direct]:
    """So many trainers, of which any works for any client."""
    names = [f"worker-{number}" for number in range(1, count + 1)]
    return lambda data: Direct({name: toy_trainer(algorithm, rounds, data) for name in names}, names)


def response(content: bytes) -> Any:
    """What a trainer sent."""
    return codec.decode(content)


__all__ = ["BASE", "RECIPE", "Direct", "response", "simulate_sites", "sites", "toy_trainer", "tree", "workers"]

"""Seals and runs over signed messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from contract.methods import METHODS
from fedferret.core.task import Examples
from fedferret.engines.replay import Protection, SequenceNumbers
from fedferret.sites.credentials import read_server, read_site
from fedferret.sites.pki import Authority
from fedferret.sites.signing import ServerSeal, SiteSeal
from toy_sites import Direct, simulate_sites, toy_trainer
from toys import Simulation

NAMES = ("a", "b", "c")
METHOD, ROUNDS = METHODS["ferret"], 4


def issued(folder: Path) -> Authority:
    """An authority that has made the credentials of the toy clients."""
    made = Authority.create(folder / "pki", ["127.0.0.1"])
    for name in NAMES:
        made.issue(name)
    return made


def server_seal(authority: Authority) -> ServerSeal:
    return ServerSeal(read_server(authority.folder))


def site_seal(authority: Authority, folder: Path, name: str = "a", **options: Any) -> SiteSeal:
    folder.mkdir(exist_ok=True)
    return SiteSeal(read_site(authority.folder / "sites" / name), folder, **options)


def signed_sites(authority: Authority, root: Path, tamper: Any = None, trained: list[str] | None = None) -> Any:
    """Toy sites with seals; ``trained`` is given what each does with a request."""

    def log(name: str) -> Callable[[Mapping[str, Any]], None]:
        def note(event: Mapping[str, Any]) -> None:
            if trained is not None and event["what"] == "done" and "the same response" not in event["note"]:
                trained.append(f"{name} {event['round']}")

        return note

    def make(data: Mapping[str, Examples]) -> Direct:
        trainers = {}
        for name, rows in data.items():
            seal = site_seal(authority, root / name, name)
            options: dict[str, Any] = {"on_message": log(name), "seal": seal}
            trainers[name] = toy_trainer(METHOD, ROUNDS, {name: rows}, root / name, name, **options)
        transport = Direct(trainers, repeats=5)
        transport.tamper = tamper or transport.tamper
        return transport

    return make


def signed_run(authority: Authority, root: Path, tamper: Any = None, **options: Any) -> tuple[Simulation, list[str]]:
    """A run over signed messages, and its lines."""
    lines: list[str] = []
    protection = Protection(server_seal(authority), SequenceNumbers(root / "sequence"))
    trained = options.pop("trained", None)
    made = signed_sites(authority, root, tamper, trained)
    return simulate_sites(METHOD, ROUNDS, made, log=lines.append, protection=protection, **options), lines

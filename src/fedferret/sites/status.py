"""`fedferret nodes` and `fedferret status`: what the files of a server or a site say, in words. They ask no process.

nodes RUN     a line for each site: connected?  last answer  version it holds  bytes
status RUN    what the server is doing, how far the run is, who failed last and why
status SITE   whether the site takes part, what it answered last, what came and went
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.sites import join, state
from fedferret.tracking import events
from fedferret.tracking.audit import read_audit
from fedferret.tracking.units import as_bytes, as_duration

if TYPE_CHECKING:
    from rich.table import Table

STALE = 30.0  # seconds after which what a server wrote about connections is old: it writes every five


@dataclass
class SiteStatus:
    """One site, as its server knows it."""

    connected: bool | None = None  # None: not known
    answered: float = 0.0  # when its last answer came; 0: never
    round: int = 0  # of that answer
    version: int = -1  # of the log that it held then
    process: int = 0  # of its trainer then
    reason: str = ""  # why its last letter brought no answer; "" if it did
    messages: int = 0  # bytes of orders and receipts, both ways
    framed: int = 0  # the same with Flower's records and headers


def site_statuses(run: Path) -> dict[str, SiteStatus]:
    """Every site that the server has heard of or written to. Raises UserError for a folder that was never served."""
    if not (run / state.FOLDER / "server.json").exists():
        raise UserError(
            f"{run}: no server was started in that folder; give the run's folder, as `fedferret serve` said"
        )
    found: dict[str, SiteStatus] = {}
    for event in state.messages(run):
        site = found.setdefault(str(event.get("client", "")), SiteStatus())
        if event["what"] == "ok":
            site.answered, site.round, site.reason = event["time"], event["round"], ""
        if "version" in event:
            site.version, site.process = event["version"], event["process"]
        if event["what"] == "traffic":
            site.messages += event["payload_down"] + event["payload_up"]
            site.framed += event["framed_down"] + event["framed_up"]
            site.reason = event["reason"]
        elif event["what"] == "refused":
            site.reason = event["note"]
    known = state.read(run, "nodes")
    fresh = time.time() - known.get("time", 0.0) < STALE and doing(state.read(run, "server")) == "serving"
    for name, node in known.get("nodes", {}).items():
        found.setdefault(name, SiteStatus()).connected = node["connected"] if fresh else None
    return found


def nodes_table(run: Path) -> Table:
    """The sites as a table."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("site", "connected", "last answer", "holds", "letters", "framed", "trouble"):
        table.add_column(title, justify="right" if title in ("letters", "framed") else "left")
    for name, site in sorted(site_statuses(run).items()):
        connected = {True: "yes", False: "no", None: "not known"}[site.connected]
        answer = f"round {site.round}, {ago(site.answered)}" if site.answered else "none"
        held = f"version {site.version}" if site.version >= 0 else "nothing"
        table.add_row(name, connected, answer, held, as_bytes(site.messages), as_bytes(site.framed), site.reason)
    return table


def status(folder: Path) -> str:
    """Some lines on a run's folder or a site's. Raises UserError for another."""
    if (folder / join.STATE).exists():
        return _site(folder)
    known = state.read(folder, "server")
    if not known:
        raise UserError(f"{folder}: neither a run that was served nor a site's folder")
    run = events.read(folder)
    guarded = "certificates on both sides" if known["secure"] else "INSECURE: nobody is checked"
    sites = site_statuses(folder)
    lines = [
        f"Server:   {_doing(known)}; sites call {known['listen']} ({guarded})",
        f"Package:  SHA-256 {known['package']}",
        f"Run:      round {run.done} of {run.planned or '?'}; {run.status}; the server was restarted "
        f"{known['restarts']} times",
        f"Sites:    {sum(site.connected is True for site in sites.values())} of {len(sites)} connected",
    ]
    return "\n".join(
        [*lines, *(f"Failure:  round {number}, {each.client}: {each.reason}" for number, each in run.failures[-3:])]
    )


def doing(known: dict[str, Any]) -> str:
    """What the process that wrote this is doing; "gone" where it ended without a word."""
    at_work = known.get("doing") not in (None, "stopped", "finished", "failed")
    return "gone" if at_work and not _alive(known["process"]) else str(known.get("doing", ""))


def ago(then: float) -> str:
    """How long ago that was."""
    return f"{as_duration(max(0.0, time.time() - then))} ago"


def _site(folder: Path) -> str:
    known = join.read_state(folder)
    audit = list(read_audit(folder))
    answers = [event for event in audit if event["what"] == "ok"]
    came = sum(event["framed_bytes"] for event in audit if event["what"] == "request")
    went = sum(event["framed_bytes"] for event in audit if event["what"] in ("ok", "missing", "refused"))
    sockets = [event for event in audit if event["what"] == "socket"]
    down, up = (sum(event[name] for event in sockets) for name in ("down_bytes", "up_bytes"))
    last = f"round {answers[-1]['round']} at {answers[-1]['time'][:19]}" if answers else "none so far"
    return "\n".join(
        [
            f"Site:     {known['name']}, {_doing(known)}; server {known['address']}",
            f"Answers:  {len(answers)}; the last: {last}",
            f"Letters:  {as_bytes(came)} came, {as_bytes(went)} went; each is a line of {folder}/audit.jsonl",
            *([f"Sockets:  {as_bytes(down)} came, {as_bytes(up)} went, TLS and polling included"] if sockets else []),
        ]
    )


def _doing(known: dict[str, Any]) -> str:
    words = doing(known)
    return f"ended without a word (process {known['process']})" if words == "gone" else words


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

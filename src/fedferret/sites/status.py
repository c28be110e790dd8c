"""`fedferret nodes` and `fedferret status`: the state in the files of a server or a site. They call no process.

nodes RUN     a line for each site: connected?  last update  log version  bytes
status RUN    what the server is doing, how far the run is, which clients failed last and why
status SITE   whether the site takes part, its last update, bytes received and sent
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.engines.transport import DONE, MISSING, REFUSED
from fedferret.sites import join, members, state, strikes
from fedferret.tracking import events
from fedferret.tracking.audit import read_audit
from fedferret.tracking.units import as_bytes, as_duration

if TYPE_CHECKING:
    from rich.table import Table

STALE = 30.0  # seconds after which the record of connections is out of date: the server writes it every five


@dataclass
class SiteStatus:
    """The status of one site, from the server's records."""

    connected: bool | None = None  # None: not known
    updated: float = 0.0  # time of the site's last update; 0: none
    round: int = 0  # of that update
    version: int = -1  # of the site's log at the last response
    process: int = 0  # id of the site's trainer at the last response
    reason: str = ""  # why the last request brought no update; "" if it did
    messages: int = 0  # bytes of requests and responses
    framed: int = 0  # the same with Flower's records and headers
    retired: bool = False  # by `fedferret sites retire`


def site_statuses(run: Path) -> dict[str, SiteStatus]:
    """Return the status of every site that connected or was sent a request, by name.

    Raises:
        UserError: if no server was started in the folder.
    """
    if not (run / state.FOLDER / "server.json").exists():
        raise UserError(f"{run}: no server was started in that folder; give the run's folder (`fedferret serve --out`)")
    found: dict[str, SiteStatus] = {}
    for event in state.messages(run):
        site = found.setdefault(str(event.get("client", "")), SiteStatus())
        if event["what"] == DONE:
            site.updated, site.round, site.reason = event["time"], event["round"], ""
        if "version" in event and "process" in event:
            site.version, site.process = event["version"], event["process"]
        if event["what"] == "traffic":
            site.messages += event["payload_down"] + event["payload_up"]
            site.framed += event["framed_down"] + event["framed_up"]
            site.reason = plain_line(event["reason"])
        elif event["what"] == REFUSED:
            site.reason = plain_line(event.get("note", ""))
    known = state.read(run, "nodes")
    fresh = time.time() - known.get("time", 0.0) < STALE and doing(state.read(run, "server")) == "serving"
    for name, node in known.get("nodes", {}).items():
        found.setdefault(name, SiteStatus()).connected = bool(node.get("connected")) if fresh else None
    for name in strikes.unread_sites(run):
        found.setdefault(name, SiteStatus()).reason = strikes.unread_reason(run, name)
    asked = members.requested(run)
    for name in asked.added:
        found.setdefault(name, SiteStatus())
    for name in asked.retired:
        site = found.setdefault(name, SiteStatus())
        site.retired, site.reason = True, "retired"
    return found


def nodes_table(run: Path) -> Table:
    """Return the status of the sites as a table."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("site", "connected", "last update", "log", "messages", "framed", "failure"):
        table.add_column(title, justify="right" if title in ("messages", "framed") else "left")
    for name, site in sorted(site_statuses(run).items()):
        connected = {True: "yes", False: "no", None: "not known"}[site.connected]
        update = f"round {site.round}, {ago(site.updated)}" if site.updated else "none"
        version = f"version {site.version}" if site.version >= 0 else "none"
        table.add_row(name, connected, update, version, as_bytes(site.messages), as_bytes(site.framed), site.reason)
    return table


def status(folder: Path) -> str:
    """Return a few lines on a served run or a site.

    Raises:
        UserError: if the folder is neither a served run's nor a site's.
    """
    if (folder / join.STATE).exists():
        return _site(folder)
    known = state.read(folder, "server")
    if not known:
        raise UserError(f"{folder}: not the folder of a served run or of a site")
    run = events.read(folder)
    security = "certificates on both sides" if known.get("secure") else "INSECURE: no certificates"
    found = site_statuses(folder)
    sites = [site for site in found.values() if not site.retired]
    retired = f"; {len(found) - len(sites)} retired" if len(found) > len(sites) else ""
    lines = [
        f"Server:   {_doing(known)}; sites call {known.get('listen', '?')} ({security})",
        f"Package:  SHA-256 {known.get('package', '?')}",
        f"Run:      round {run.done} of {run.planned or '?'}; {run.status}; the server was restarted "
        f"{known.get('restarts', 0)} times",
        f"Sites:    {sum(site.connected is True for site in sites)} of {len(sites)} connected{retired}",
    ]
    return "\n".join(
        [
            *lines,
            *(f"Unread:   {name} is {strikes.unread_reason(folder, name)}" for name in strikes.unread_sites(folder)),
            *(f"Failure:  round {number}, {each.client}: {each.reason}" for number, each in run.failures[-3:]),
        ]
    )


def doing(known: dict[str, Any]) -> str:
    """Return what the process that wrote ``known`` is doing; "gone" if it ended without writing so."""
    at_work = known.get("doing") not in (None, "stopped", "finished", "failed")
    return "gone" if at_work and not _alive(int(known.get("process", 0))) else str(known.get("doing", ""))


def ago(then: float) -> str:
    """Return how long ago a time (seconds since the epoch) was, in words."""
    return f"{as_duration(max(0.0, time.time() - then))} ago"


def _site(folder: Path) -> str:
    known = join.read_state(folder)
    audit = list(read_audit(folder))
    updates = [event for event in audit if event["what"] == DONE]
    received = sum(event["framed_bytes"] for event in audit if event["what"] == "request")
    sent = sum(event["framed_bytes"] for event in audit if event["what"] in (DONE, MISSING, REFUSED))
    sockets = [event for event in audit if event["what"] == "socket"]
    down, up = (sum(event[name] for event in sockets) for name in ("down_bytes", "up_bytes"))
    last = f"round {updates[-1]['round']} at {updates[-1]['time'][:19]}" if updates else "none so far"
    return "\n".join(
        [
            f"Site:     {known.get('name', '?')}, {_doing(known)}; server {known.get('address', '?')}",
            f"Updates:  {len(updates)}; the last: {last}",
            f"Messages: {as_bytes(received)} received, {as_bytes(sent)} sent; each is a line of {folder}/audit.jsonl",
            *([f"Sockets:  {as_bytes(down)} received, {as_bytes(up)} sent, with TLS and polling"] if sockets else []),
        ]
    )


def _doing(known: dict[str, Any]) -> str:
    now = doing(known)
    return f"ended unexpectedly (process {known.get('process', '?')})" if now == "gone" else now


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

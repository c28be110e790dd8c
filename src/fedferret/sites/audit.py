"""A site's audit file as a table for people; ``tracking/audit.py`` says what a line is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.tracking.audit import Audit, read_audit
from fedferret.tracking.units import as_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Audit", "audit_table", "read_audit"]

_TITLES = ("time", "what", "run", "round", "payload", "framed", "version", "data", "note")


def audit_table(folder: Path) -> Table:
    """Every message of the site in ``folder``, oldest first, and what all of them came to."""
    from rich.table import Table

    events = list(read_audit(folder))
    came = sum(event["framed_bytes"] for event in events if event["what"] == "order")
    went = sum(event["framed_bytes"] for event in events if event["what"] != "order")
    table = Table(title=f"{folder}: {as_bytes(came)} came, {as_bytes(went)} went", title_justify="left")
    for title in _TITLES:
        table.add_column(title, justify="right" if title in ("round", "payload", "framed", "version") else "left")
    for event in events:
        table.add_row(
            event["time"][:19].replace("T", " "),
            event["what"],
            event["run"][:8],
            str(event["round"]),
            as_bytes(event["payload_bytes"]),
            as_bytes(event["framed_bytes"]),
            str(event["version"]),
            event["data"][:8],
            event["note"],
        )
    return table

"""`fedferret record`: whether runs are a record. It imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedferret.command_errors import one_line_errors
from fedferret.core.imports import quick_imports
from fedferret.core.text import printable_lines


def _log(line: str) -> None:
    typer.echo(printable_lines(line, longest=1_000_000))


def record(
    runs: Annotated[
        list[Path], typer.Argument(help="The method's runs, seeds 1 to 3.", metavar="RUN...", show_default=False)
    ],
    control: Annotated[
        list[Path] | None, typer.Option(help="A run of FedAvg. May be repeated.", metavar="RUN", show_default=False)
    ] = None,
    tracks: Annotated[
        Path | None, typer.Option(help="A file of tracks.", metavar="FILE", show_default="the package's")
    ] = None,
    who: Annotated[str, typer.Option(help="The name of the holder, for the line.", show_default=False)] = "",
    commit: Annotated[str, typer.Option(help="The commit with the runs, for the line.", show_default=False)] = "",
    link: Annotated[str, typer.Option("--log", help="Their description, for the line.", show_default=False)] = "",
) -> None:
    """Check runs against the rules of docs/records.md: 97% of FedAvg's loss reduction, in the fewest bytes.

    RUN is a run's folder, or a folder with runs named seed-1, seed-2 and seed-3.
    --control is given for FedAvg at its best rate, and for a lower and a higher rate.
    Prints every rule, the share of each seed, and the table's line. Exits with 1 where a rule fails.
    """
    with one_line_errors():
        from fedferret.core.errors import UserError

        if not control:
            raise UserError("no run of FedAvg was given: add --control FOLDER, once or several times")
        with quick_imports():
            from fedferret.comparison.record import record as check_record

        passed = check_record(runs, control, _log, tracks, who, commit, link)
    if not passed:
        raise typer.Exit(1)

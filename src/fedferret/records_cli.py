"""`fedferret record` and `fedferret advise`. Each imports what it needs when it runs."""

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


def advise(
    recipe: Annotated[Path, typer.Argument(help="A recipe of ferret.", metavar="RECIPE.toml", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Replace one setting: `--set rounds=40`. May be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of FedAvg to probe.", min=1)] = 2,
    gain: Annotated[
        float | None,
        typer.Option("--reduction", help="FedAvg's loss reduction, if known.", show_default="extrapolated"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast how many coordinates Ferret needs for 90, 97 and 99% of FedAvg's loss reduction, and their bytes.

    Runs a few rounds of RECIPE.toml's FedAvg and measures what the noise of Ferret costs. Writes no file.
    Forecasts are rough: docs/advise.md compares them with runs.
    """
    with one_line_errors():
        import json

        from fedferret.core.errors import UserError
        from fedferret.recipe_file import read_tables

        if gain is not None and not 0 < gain < float("inf"):
            raise UserError(f"--reduction {gain}: must be above 0, in nats per token")
        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        with quick_imports():
            from fedferret import advice, advice_text
            from fedferret.config import from_tables

        settings = from_tables(tables)
        found = advice.probe(settings, rounds, gain, lambda line: typer.echo(printable_lines(line), err=True))
        lines = advice.advise(found, settings, gain)
        if as_json:
            typer.echo(json.dumps(advice_text.plain(found, settings, lines, gain), indent=1))
        else:
            _log(advice_text.text_of(found, settings, lines, gain))

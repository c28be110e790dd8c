"""The command line. Each command imports what it needs when it runs, so `--help` prints at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from fedferret.command_errors import Commands, one_line_errors
from fedferret.core.imports import quick_imports
from fedferret.core.text import printable_lines
from fedferret.core.waiting import sleep_soon
from fedferret.pki_cli import pki
from fedferret.records_cli import advise, record
from fedferret.sites_cli import sites

app = typer.Typer(
    name="fedferret",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Federated tuning of *all* the weights of a language model, with kilobytes on the wire.

Start with `fedferret run recipes/demo.toml`.
It tunes a real model on conversations of real people and logs every round.
It writes a folder with a report (`report.html`), the figures (`summary.json`)
and the tuned model as a log of kilobytes.
`fedferret list` shows all methods, models and data sources.
""",
    epilog="Exit codes: 0 done, 1 the run failed, 2 invalid input, 130 stopped with Ctrl-C (SIGTERM 143, SIGHUP 129).",
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe file, TOML.", metavar="RECIPE.toml", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", metavar="DIR", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace one setting: `--set algorithm.coordinates=8192`. May be repeated."),
]
ChangedData = Annotated[bool, typer.Option("--accept-changed-data", help="Go on with data that has changed.")]
StoredDtype = Annotated[
    Literal["fp32", "bf16"] | None,
    typer.Option("--dtype", help="Of the folder's weights.", show_default="as the base is stored"),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME-OF-RECIPE")]


def _version(asked: bool) -> None:
    if asked:
        from fedferret import __version__

        _log(f"fedferret {__version__}")
        raise typer.Exit


def _log(line: str) -> None:
    """Print what a command has to say; names in it may have any character."""
    typer.echo(printable_lines(line, longest=1_000_000))


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before a command."""


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    accept_changed_data: ChangedData = False,
) -> None:
    """Run a recipe: tune the model, evaluate it, write a report.

    RECIPE.toml sets the model, the data and the method; `recipes/` has examples.
    Stop with Ctrl-C; the same command resumes after the last complete round.
    """
    with one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        with quick_imports():
            from fedferret.config import from_tables
            from fedferret.exportable import exportable
            from fedferret.run_folder import as_begun
            from fedferret.runner import run as run_recipe

        folder = out or Path("runs") / recipe.stem
        settings = from_tables(as_begun(tables, folder, _log))
        run_recipe(settings, folder, _log, accept_changed_data=accept_changed_data)
        _log(exportable(settings).lines(folder))


@app.command("list")
def list_() -> None:
    """List all methods, objectives, models and data sources, one line each."""
    from rich.table import Table
    from rich.text import Text

    from fedferret.algorithms.registry import catalogue as methods
    from fedferret.data.registry import catalogue as data
    from fedferret.models.catalogue import catalogue as models
    from fedferret.objectives.registry import catalogue as objectives
    from fedferret.tracking.console import plain_console

    console = plain_console()
    kinds = (("Methods", methods()), ("Objectives", objectives()), ("Models", models()), ("Data", data()))
    for title, entries in kinds:
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, line in entries.items():
            table.add_row(Text(name, style="bold"), line)
        console.print(table, "")


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show a recipe's settings and its cost: bytes per client and round, and roughly memory and time."""
    with one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        with quick_imports():
            from fedferret.config import from_tables
            from fedferret.estimate import estimate

        resolved = from_tables(tables)
        _log(resolved.to_toml())
        _log(str(estimate(resolved)))


@app.command()
def report(folder: RunFolder) -> None:
    """Write a run's report again and print its path."""
    with one_line_errors():
        from fedferret.tracking.report import write_report

        _log(f"Report: {write_report(folder)}")


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path | None, typer.Option(help="Write a Hugging Face folder, which transformers loads.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Write the log alone, as one file of kilobytes.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Write the adapter alone, as a folder that peft loads.")] = None,
    dtype: StoredDtype = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's folder here.", show_default="as in the run's recipe")
    ] = None,
    client: Annotated[str | None, typer.Option(help="Write a client's own model (`--to`).", metavar="NAME")] = None,
    prune: Annotated[bool, typer.Option(help="Leave out an image model's rows that are zero (`--to`).")] = False,
) -> None:
    """Export a run's tuned model: complete (`--to FOLDER`), as a delta (`--delta FILE`), as an adapter, or all of them.

    DIR is the run's folder. `fedferret apply` rebuilds the model from a delta file.
    """
    with one_line_errors():
        from fedferret import export as exporting
        from fedferret.core.errors import UserError

        if to is None and delta is None and adapter is None:
            raise UserError("nothing to write: give --to FOLDER, --delta FILE, --adapter FOLDER or several of these")
        for place in (to, adapter):
            if place is not None:
                exporting.check_free(place)
        if dtype is not None and to is None:
            raise UserError(f"--dtype {dtype}: only a whole model (--to FOLDER) is written in another dtype")
        if (client or prune) and (to is None or delta or adapter):
            raise UserError("--client, --prune: give --to FOLDER alone; only a whole model is a client's, or pruned")
        if adapter is not None:
            exporting.export_folder(folder, adapter, _log, adapter_alone=True, base_name=base)
        if delta is not None:
            exporting.export_delta(folder, delta, _log, base)
            _log(f"Delta: {delta} ({delta.stat().st_size:,} bytes)")
        if to is not None:
            fingerprint = exporting.export_folder(folder, to, _log, dtype, base_name=base, client=client, prune=prune)
            _log(f"Model: {to} (SHA-256 of the tuned weights {fingerprint[:16]}…)")


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The base model: its name in the recipe, or a folder.", metavar="BASE")],
    delta: Annotated[Path, typer.Argument(help="A file that `fedferret export --delta` wrote.", metavar="DELTA")],
    to: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="The adapter that the run went on from, if any.")] = None,
    dtype: StoredDtype = None,
) -> None:
    """Rebuild a tuned model from its base model and a delta file.

    BASE is the base model. DELTA is a file from `fedferret export --delta`.
    The rebuilt weights must have the SHA-256 that the file states.
    """
    with one_line_errors():
        from fedferret.export import apply_delta

        fingerprint = apply_delta(base, delta, to, _log, adapter, dtype)
        _log(f"Model: {to} (SHA-256 of the tuned weights {fingerprint[:16]}…, as in the delta file)")


@app.command()
def rewind(
    folder: RunFolder,
    to: Annotated[int, typer.Option(help="The last round to keep; 0: none.", min=0, metavar="ROUND")],
    without: Annotated[str | None, typer.Option(help="Retire a site: no later round asks it.", metavar="SITE")] = None,
) -> None:
    """Undo the last rounds of a stopped run, for example after a bad round.

    DIR is the run's folder. The rounds after ROUND are discarded; the command that ran them runs them again.
    The last 10 rounds can be undone (`execution.history`). Sites need no attention: they follow at the next request.
    The present round discards nothing: sites then accept a restored copy that they refused as one of an earlier day.
    """
    with one_line_errors():
        with quick_imports():
            from fedferret.rewind import rewind as rewind_run

        rewind_run(folder, to, without, _log)


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="A grid file, TOML.", metavar="GRID.toml", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The runs' folder.", show_default="runs/NAME-OF-GRID")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this method alone. May be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; the cores are divided among them.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and their cost; run nothing.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Write table and page; run nothing.")] = False,
    also: Annotated[list[Path] | None, typer.Option(help="A folder with more runs. May be repeated.")] = None,
) -> None:
    """Run methods × seeds on one task and compare loss, bytes, time and memory.

    GRID.toml sets the task, the methods and the seeds.
    Stop with Ctrl-C; the same command resumes.
    """
    with one_line_errors():
        from fedferret.recipe_file import read_tables

        read_tables(grid, overrides or [])  # before the imports that take seconds
        from fedferret.comparison import commands

        folder = out or Path("runs") / grid.stem
        if dry_run:
            commands.plan(grid, folder, overrides or [], only or [], also or [])
        else:
            commands.compare(grid, folder, overrides or [], only or [], jobs, retry_failed, table_only, also or [])


@app.command()
def bench(
    names: Annotated[list[str], typer.Argument(help="Benchmarks, or `all`.", metavar="NAME...", show_default=False)],
    save: Annotated[bool, typer.Option(help="Save the results in benchmarks/results/.")] = False,
) -> None:
    """Measure speed or memory: projection, round, training, memory, simulation, startup, or all.

    Every benchmark measures two variants in turn; it prints JSON and a sentence.
    Benchmarks need a checkout of the repository.
    """
    with one_line_errors():
        import subprocess

        from fedferret.core.errors import UserError, nearest

        checkout = Path(__file__).parents[2]
        known = ["projection", "round", "training", "memory", "simulation", "startup"]
        if not (checkout / "benchmarks" / "measure.py").exists():
            raise UserError("benchmarks are part of the repository, not of the package: run this in a checkout of it")
        for name in known if names == ["all"] else names:
            if name not in known:
                raise UserError(f'no benchmark is called "{name}": {nearest(name, known)}')
            command = [sys.executable, "-m", f"benchmarks.{name}", *(["--save"] if save else [])]
            subprocess.run(command, cwd=checkout, check=True)


Insecure = Annotated[bool, typer.Option("--insecure", help="Use no certificates; for tests, on loopback alone.")]
OffLoopback = Annotated[bool, typer.Option("--insecure-off-loopback", help="Let --insecure use a trusted network.")]


@app.command()
def serve(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = None,
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT to listen on for sites.")] = "127.0.0.1:8443",
    folder: Annotated[Path, typer.Option("--pki", help="The folder from `fedferret pki init`.")] = Path("pki"),
    wait: Annotated[float, typer.Option(help="Seconds to wait for all sites before the first round.")] = 300.0,
    insecure: Insecure = False,
    insecure_off_loopback: OffLoopback = False,
    accept_changed_data: ChangedData = False,
) -> None:
    """Run a recipe across the sites that it names: accept their connections and run the rounds.

    The recipe lists the sites by name. Each site runs `fedferret join`.
    If a process of the server ends, it is started again.
    Stop with Ctrl-C; the same command resumes after the last complete round.
    """
    with one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        commands = _site_commands()
        unsafe = insecure, insecure_off_loopback
        commands.serve(
            tables, out or Path("runs") / recipe.stem, listen, folder, wait, *unsafe, accept_changed_data, _log
        )


@app.command()
def join(
    address: Annotated[str, typer.Argument(help="The server, as HOST:PORT.", metavar="ADDRESS", show_default=False)],
    name: Annotated[str, typer.Option(help="This site's name in the server's recipe.")],
    data: Annotated[Path | None, typer.Option(help="The file to train on; needed at first start.")] = None,
    folder: Annotated[Path | None, typer.Option(help="This site's folder.", show_default="sites/NAME")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="The archive from `fedferret pki issue`, or its folder; needed at first start.")
    ] = None,
    package: Annotated[str, typer.Option(help="SHA-256 of the run package.", show_default="this version's")] = "",
    insecure: Insecure = False,
    insecure_off_loopback: OffLoopback = False,
    accept_changed_data: ChangedData = False,
) -> None:
    """Take part in a server's run with the data of this machine, until Ctrl-C.

    ADDRESS is the server, HOST:PORT. The data file stays on this machine.
    """
    with one_line_errors():
        unsafe = insecure, insecure_off_loopback
        _site_commands().join(address, name, data, folder, credentials, package, *unsafe, accept_changed_data, _log)


@app.command()
def nodes(folder: RunFolder) -> None:
    """Show the sites of a served run: connected or not, time of the last reply, bytes."""
    with one_line_errors():
        with quick_imports():
            from fedferret.sites.status import nodes_table
            from fedferret.tracking.console import plain_console

        plain_console().print(nodes_table(folder))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="The folder of a served run or of a site.", metavar="DIR")],
) -> None:
    """Show the state of a served run or of a site. DIR is its folder."""
    with one_line_errors():
        with quick_imports():
            from fedferret.sites.status import status as status_text

        _log(status_text(folder))


def _site_commands() -> ModuleType:
    """The module behind serve and join. Raises UserError if a package that it needs is missing."""
    from importlib.util import find_spec

    from fedferret.core.errors import UserError

    if not (find_spec("flwr") and find_spec("cryptography")):
        raise UserError('serve and join need packages; run: pip install "fedferret[flower]"')
    with quick_imports():
        from fedferret.sites import commands

    return commands


app.command()(record)
app.command()(advise)
app.add_typer(sites, name="sites")
app.add_typer(pki, name="pki")


def main() -> None:
    """The entry point of the `fedferret` command."""
    sleep_soon(os.environ)
    app()

"""The command line. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

app = typer.Typer(
    name="fedferret",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Federated tuning of *all* the weights of a language model, with kilobytes on the wire.

Start with `fedferret run recipes/demo.toml`: it tunes a real model on real people's conversations, shows every
round as it happens, and leaves a folder with a report (`report.html`), the figures (`summary.json`) and the tuned
model as a log of kilobytes. `fedferret list` says which methods, models and data there are.
""",
    epilog="Exit codes: 0 done, 1 the run could not go on, 2 something given was wrong, 130 stopped with Ctrl-C.",
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, in TOML.", metavar="RECIPE.toml", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", metavar="DIR", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting: `--set algorithm.coordinates=8192`. May be repeated."),
]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/NAME-OF-RECIPE].")] = None,
) -> None:
    """Play a recipe: tune, measure, report.

    The folder can be resumed after every round: stop with Ctrl-C and give the same command again.
    """
    with _one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        from fedferret.config import from_tables
        from fedferret.runner import run as play

        resolved = from_tables(tables)
        folder = out or Path("runs") / recipe.stem
        summary = play(resolved, folder, _log)
        _log(_closing_words(folder, summary))


@app.command("list")
def list_() -> None:
    """List the methods, models and data there are, a line each."""
    from rich.console import Console
    from rich.table import Table

    from fedferret.algorithms.registry import catalogue as methods
    from fedferret.data.registry import catalogue as data
    from fedferret.models.catalogue import catalogue as models

    console = Console()
    for title, entries in (("Methods", methods()), ("Models", models()), ("Data", data())):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, line in entries.items():
            table.add_row(f"[bold]{name}[/bold]", line)
        console.print(table, "")


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show a recipe's resolved settings and what it will cost: bytes a round, memory, time (a rough estimate)."""
    with _one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        from fedferret.config import from_tables
        from fedferret.estimate import estimate

        resolved = from_tables(tables)
        _log(resolved.to_toml())
        _log(str(estimate(resolved)))


@app.command()
def report(folder: RunFolder) -> None:
    """Write a run's report again, and say where it is."""
    with _one_line_errors():
        from fedferret.tracking.report import write_report

        _log(f"Report: {write_report(folder)}")


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path | None, typer.Option(help="Write a Hugging Face folder that plain transformers loads.")] = None,
    delta: Annotated[Path | None, typer.Option(help="Write the log alone: kilobytes that rebuild it.")] = None,
) -> None:
    """Hand over a run's tuned model: whole (`--to FOLDER`), as a difference from the base (`--delta FILE`), or both."""
    with _one_line_errors():
        from fedferret import export as exporting
        from fedferret.core.errors import UserError

        if to is None and delta is None:
            raise UserError("nothing to write: give --to FOLDER, --delta FILE or both")
        if delta is not None:
            exporting.export_delta(folder, delta, _log)
            _log(f"Delta: {delta} ({delta.stat().st_size:,} bytes)")
        if to is not None:
            fingerprint = exporting.export_folder(folder, to, _log)
            _log(f"Model: {to} (SHA-256 of the tuned weights {fingerprint[:16]}…)")


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The base model: a name as in a recipe, or a folder.", metavar="BASE")],
    delta: Annotated[Path, typer.Argument(help="A file that `fedferret export --delta` wrote.", metavar="DELTA")],
    to: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
) -> None:
    """Rebuild a tuned model from its base and a delta file; the weights are checked by the hash in the file."""
    with _one_line_errors():
        from fedferret.export import apply_delta

        fingerprint = apply_delta(base, delta, to, _log)
        _log(f"Model: {to} (SHA-256 of the tuned weights {fingerprint[:16]}…, as the delta file says)")


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="A grid, in TOML.", metavar="GRID.toml", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The grid's folder; runs/NAME-OF-GRID if none.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Play this method alone. May be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; the cores are divided among them.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Play failed runs again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and what they will cost.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Play nothing; write table and page.")] = False,
    also: Annotated[
        list[Path] | None, typer.Option(help="Another folder of this grid, whose runs count here. May be repeated.")
    ] = None,
) -> None:
    """Play methods × seeds on one task, and compare: loss, bytes, time, memory.

    The grid can be resumed at any time: stop with Ctrl-C and give the same command again.
    """
    with _one_line_errors():
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
    names: Annotated[list[str], typer.Argument(help="Which ones, or `all`.", metavar="NAME...", show_default=False)],
    save: Annotated[bool, typer.Option(help="Keep the results in benchmarks/results/.")] = False,
) -> None:
    """Measure a claim about speed or memory: projection, round, training, memory, simulation, startup.

    Every benchmark compares two things measured in turn in one run, and prints JSON and a sentence.
    """
    with _one_line_errors():
        import subprocess

        from fedferret.core.errors import UserError, nearest

        checkout = Path(__file__).parents[2]
        known = ["projection", "round", "training", "memory", "simulation", "startup"]
        if not (checkout / "benchmarks" / "measure.py").exists():
            raise UserError("benchmarks are part of the repository, not of the package: run this in a checkout")
        for name in known if names == ["all"] else names:
            if name not in known:
                raise UserError(f'no benchmark is called "{name}": {nearest(name, known)}')
            command = [sys.executable, "-m", f"benchmarks.{name}", *(["--save"] if save else [])]
            subprocess.run(command, cwd=checkout, check=True)


Insecure = Annotated[bool, typer.Option("--insecure", help="Without certificates: on loopback, for trying out.")]
OffLoopback = Annotated[
    bool, typer.Option("--insecure-off-loopback", help="With --insecure: on a network where everybody is trusted.")
]


@app.command()
def serve(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/NAME-OF-RECIPE].")] = None,
    listen: Annotated[str, typer.Option(help="Where sites call: ADDRESS:PORT.")] = "127.0.0.1:8443",
    folder: Annotated[Path, typer.Option("--pki", help="The folder that `fedferret pki init` made.")] = Path("pki"),
    wait: Annotated[float, typer.Option(help="Seconds to wait for all sites before the first round.")] = 300.0,
    insecure: Insecure = False,
    insecure_off_loopback: OffLoopback = False,
) -> None:
    """Serve a recipe to the sites it names: let them in, play the rounds, go on after whatever ends.

    The folder can be resumed at any time: stop with Ctrl-C and give the same command again.
    """
    with _one_line_errors():
        from fedferret.recipe_file import read_tables

        tables = read_tables(recipe, overrides or [])  # before the imports that take seconds
        commands = _site_commands()
        commands.serve(
            tables, out or Path("runs") / recipe.stem, listen, folder, wait, insecure, insecure_off_loopback, _log
        )


@app.command()
def join(
    address: Annotated[str, typer.Argument(help="The server, HOST:PORT.", metavar="ADDRESS", show_default=False)],
    name: Annotated[str, typer.Option(help="This site's name, as the run's list of sites has it.")],
    data: Annotated[Path | None, typer.Option(help="The file to train on; it stays here. Needed once.")] = None,
    folder: Annotated[Path | None, typer.Option(help="The site's own folder [default: sites/NAME].")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="What the server's administrator sent: archive or folder. Needed once.")
    ] = None,
    package: Annotated[
        str, typer.Option(help="SHA-256 of the one run package to take [default: this version's].")
    ] = "",
    insecure: Insecure = False,
    insecure_off_loopback: OffLoopback = False,
) -> None:
    """Take part in a server's run with this machine's data, until Ctrl-C."""
    with _one_line_errors():
        _site_commands().join(address, name, data, folder, credentials, package, insecure, insecure_off_loopback, _log)


@app.command()
def nodes(folder: RunFolder) -> None:
    """Show a served run's sites: who is connected, who answered when, what moved."""
    with _one_line_errors():
        from rich.console import Console

        from fedferret.sites.status import nodes_table

        Console().print(nodes_table(folder))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A served run's folder, or a site's.", metavar="DIR")],
) -> None:
    """Say how a served run stands, or a site."""
    with _one_line_errors():
        from fedferret.sites.status import status as words

        _log(words(folder))


def _site_commands() -> ModuleType:
    from importlib.util import find_spec

    from fedferret.core.errors import UserError

    if not (find_spec("flwr") and find_spec("cryptography")):
        raise UserError('running across organisations needs packages: pip install "fedferret[flower]"')
    from fedferret.sites import commands

    return commands


pki = typer.Typer(
    no_args_is_help=True,
    help="""Certificates of a federation: make the authority once, then one archive for each site.

The authority's key never leaves its folder (`--pki`, or `pki`); a site is sent its own archive and nothing else.
docs/security.md says how to send, renew and revoke.""",
)
app.add_typer(pki, name="pki")

PkiFolder = Annotated[Path, typer.Option("--pki", help="The folder that holds the authority.", metavar="DIR")]
SiteName = Annotated[str, typer.Argument(help="A site, as in ward-7.", metavar="NAME", show_default=False)]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A name or address under which sites call the server. May be repeated."),
]


@pki.command("init")
def pki_init(
    host: Hosts = None,
    folder: PkiFolder = Path("pki"),
    title: Annotated[str, typer.Option(help="The federation's name, in every certificate.")] = "fedferret",
) -> None:
    """Make the authority and the server's certificates."""
    with _one_line_errors():
        _pki_commands().init(folder, host or [], title, _log)


@pki.command("issue")
def pki_issue(name: SiteName, folder: PkiFolder = Path("pki")) -> None:
    """Make a site's certificate and node key, in one archive to send."""
    with _one_line_errors():
        _pki_commands().issue(folder, name, _log)


@pki.command("renew")
def pki_renew(
    name: Annotated[str, typer.Argument(help="A site, or `server`.", metavar="NAME", show_default=False)],
    host: Hosts = None,
    folder: PkiFolder = Path("pki"),
) -> None:
    """Make a certificate anew before it expires; a site's node key stays."""
    with _one_line_errors():
        _pki_commands().renew(folder, name, host or [], _log)


@pki.command("revoke")
def pki_revoke(name: SiteName, folder: PkiFolder = Path("pki")) -> None:
    """Shut a site out for good: all its certificates are refused, its keys forgotten."""
    with _one_line_errors():
        _pki_commands().revoke(folder, name, _log)


@pki.command("show")
def pki_show(folder: PkiFolder = Path("pki")) -> None:
    """List the certificates: whose, how many days are left, which are revoked."""
    with _one_line_errors():
        _pki_commands().show(folder, _log)


def _pki_commands() -> ModuleType:
    from fedferret.core.errors import UserError

    try:
        from fedferret.sites import pki_commands
    except ModuleNotFoundError as error:
        if error.name != "cryptography":
            raise
        raise UserError('certificates need a package: pip install "fedferret[flower]"') from None
    return pki_commands


def main() -> None:
    """The entry point of the `fedferret` command."""
    app()


def _log(text: str) -> None:
    typer.echo(text)


def _closing_words(folder: Path, summary: dict[str, object]) -> str:
    return "\n".join(
        [
            f"Report:       {folder / 'report.html'}",
            f"Figures:      {folder / 'summary.json'}",
            f"Tuned model:  fedferret export {folder} --to FOLDER   (Hugging Face)",
            f"              fedferret export {folder} --delta FILE  (kilobytes)",
        ]
    )


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2; a run that cannot go on, one line and 1; Ctrl-C, 130."""
    from fedferret.core.errors import RunError, UserError

    try:
        yield
    except UserError as error:
        _complain(error)
        raise typer.Exit(2) from None
    except RunError as error:
        _complain(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        _complain(error if error.args else "stopped")
        raise typer.Exit(130) from None


def _complain(error: object) -> None:
    print("fedferret:", " ".join(str(error).split()), file=sys.stderr)  # torch's own messages can have many lines

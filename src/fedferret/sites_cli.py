"""`fedferret sites`: the commands for the sites of a served run. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fedferret.command_errors import one_line_errors
from fedferret.core.imports import quick_imports

sites = typer.Typer(
    no_args_is_help=True,
    help="""The sites of a served run: list, add and retire them while it runs or after it was stopped.

A change takes effect as the next round begins. It is a fact of the run: the recipe stays as it is.
docs/deployment.md explains how.""",
)
RunFolder = Annotated[Path, typer.Argument(help="A served run's folder.", metavar="RUN", show_default=False)]
SiteName = Annotated[str, typer.Argument(help="A site's name, such as ward-7.", metavar="NAME", show_default=False)]
PkiFolder = Annotated[
    Path | None,
    typer.Option("--pki", help="The folder of `fedferret pki`.", metavar="DIR", show_default="the server's"),
]


@sites.command("list")
def sites_list(folder: RunFolder) -> None:
    """Show which sites take part, since which round, and which were retired."""
    with one_line_errors():
        from fedferret.tracking.console import plain_console

        plain_console().print(_member_commands().sites_table(folder))


@sites.command("add")
def sites_add(
    folder: RunFolder,
    name: SiteName,
    pki: PkiFolder = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="The server runs without certificates.")] = False,
) -> None:
    """Let a further site take part, and make its certificate and keys, in one archive to send."""
    with one_line_errors():
        _member_commands().add(folder, name, pki, insecure, typer.echo)


@sites.command("retire")
def sites_retire(
    folder: RunFolder,
    name: SiteName,
    pki: PkiFolder = None,
    keep_certificate: Annotated[
        bool, typer.Option("--keep-certificate", help="Do not revoke: the site takes part in other runs.")
    ] = False,
) -> None:
    """Sample a site no more, for good, and revoke its certificate."""
    with one_line_errors():
        _member_commands().retire(folder, name, pki, keep_certificate, typer.echo)


@sites.command("readmit")
def sites_readmit(folder: RunFolder, name: SiteName) -> None:
    """Read a site again after three of its messages ended the server's app."""
    with one_line_errors():
        from fedferret.sites.strikes import readmit

        readmit(folder, name)
        typer.echo(f"{name} is read again from the next exchange on.")


def _member_commands() -> ModuleType:
    with quick_imports():
        from fedferret.sites import member_commands

    return member_commands

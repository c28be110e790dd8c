"""`fedferret pki`: the commands for certificates. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from fedferret.command_errors import one_line_errors

pki = typer.Typer(
    no_args_is_help=True,
    help="""Certificates of a federation: create the authority once, then one archive for each site.

The authority's key stays in its folder (`--pki`). A site gets its archive only.
docs/security.md explains how to send, renew and revoke.""",
)
PkiFolder = Annotated[Path, typer.Option("--pki", help="The folder that holds the authority.", metavar="DIR")]
SiteName = Annotated[str, typer.Argument(help="A site's name, such as ward-7.", metavar="NAME", show_default=False)]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A host name or address of the server. May be repeated."),
]


@pki.command("init")
def pki_init(
    host: Hosts = None,
    folder: PkiFolder = Path("pki"),
    title: Annotated[str, typer.Option(help="The federation's name; it is in every certificate.")] = "fedferret",
) -> None:
    """Create the authority and the server's certificates."""
    with one_line_errors():
        _pki_commands().init(folder, host or [], title, typer.echo)


@pki.command("issue")
def pki_issue(name: SiteName, folder: PkiFolder = Path("pki")) -> None:
    """Create a site's certificate and node key, in one archive to send."""
    with one_line_errors():
        _pki_commands().issue(folder, name, typer.echo)


@pki.command("renew")
def pki_renew(
    name: Annotated[str, typer.Argument(help="A site's name, or `server`.", metavar="NAME", show_default=False)],
    host: Hosts = None,
    folder: PkiFolder = Path("pki"),
) -> None:
    """Replace a certificate before it expires; a site keeps its node key."""
    with one_line_errors():
        _pki_commands().renew(folder, name, host or [], typer.echo)


@pki.command("revoke")
def pki_revoke(name: SiteName, folder: PkiFolder = Path("pki")) -> None:
    """Exclude a site: the server refuses all its certificates, and its keys are deleted."""
    with one_line_errors():
        _pki_commands().revoke(folder, name, typer.echo)


@pki.command("show")
def pki_show(folder: PkiFolder = Path("pki")) -> None:
    """List all certificates: holder, days left, revoked or not."""
    with one_line_errors():
        _pki_commands().show(folder, typer.echo)


def _pki_commands() -> ModuleType:
    """The module behind pki. Raises UserError if the package that it needs is missing."""
    from fedferret.core.errors import UserError

    try:
        from fedferret.sites import pki_commands
    except ModuleNotFoundError as error:
        if error.name != "cryptography":
            raise
        raise UserError('certificates need a package; run: pip install "fedferret[flower]"') from None
    return pki_commands

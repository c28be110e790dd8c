"""Where a server listens and sites call, as written on a command line."""

from __future__ import annotations

from ipaddress import ip_address

from fedferret.core.errors import UserError


def split(address: str) -> tuple[str, int]:
    """Host and port. Raises UserError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(f'"{address}": a name or an address and a port are wanted, as in fed.example.org:8443')
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached under that name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

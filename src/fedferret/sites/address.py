"""Addresses of servers as the command line takes them: HOST:PORT."""

from __future__ import annotations

from ipaddress import ip_address

from fedferret.core.errors import UserError


def split(address: str) -> tuple[str, int]:
    """Return the host and the port of HOST:PORT.

    Raises:
        UserError: unless there is a host, and a port of 1 to 65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise UserError(f'"{address}": give a host name or an IP address, and a port, as in fed.example.org:8443')
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is this machine's loopback interface."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Clients of Flower's runtime API on loopback, which gives out tasks (`flwr/supercore/runtime`)."""

from __future__ import annotations

from pathlib import Path

from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

_ACQUIRES = frozenset({"/flwr.proto.Runtime/AcquireTask"})  # the call that needs the secret; a task has a token


def authorised(address: str, secret: bytes, authority: Path | None = None) -> RuntimeHttpClient:
    """Return a client that may take tasks.

    Args:
        address: of the SuperLink or SuperNode, HOST:PORT.
        secret: shared with that process.
        authority: the certificate to trust; None: no TLS.
    """
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRES)
    return RuntimeHttpClient.from_server_address(
        address, authority is None, _read(authority), [RuntimeVersionHttpInterceptor("fedferret"), proof]
    )


def client_of_task(address: str, token: str, authority: Path | None = None) -> RuntimeHttpClient:
    """Return a client for one task.

    Args:
        address: of the SuperLink or SuperNode, HOST:PORT.
        token: of the task.
        authority: the certificate to trust; None: no TLS.
    """
    identity = RuntimeTokenHttpInterceptor(token)
    return RuntimeHttpClient.from_server_address(
        address, authority is None, _read(authority), [RuntimeVersionHttpInterceptor("fedferret"), identity]
    )


def _read(authority: Path | None) -> bytes | None:
    return authority.read_bytes() if authority else None

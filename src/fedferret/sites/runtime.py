"""Clients of the interface on loopback by which Flower hands out tasks (`flwr/supercore/runtime`)."""

from __future__ import annotations

from pathlib import Path

from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

_ACQUIRES = frozenset(
    {"/flwr.proto.Runtime/AcquireTask"}
)  # what the secret is asked for; a task has a token of its own


def authorised(address: str, secret: bytes, authority: Path | None = None) -> RuntimeHttpClient:
    """A client that may take tasks; over TLS where there is an authority to trust."""
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRES)
    return RuntimeHttpClient.from_server_address(
        address, authority is None, _read(authority), [RuntimeVersionHttpInterceptor("fedferret"), proof]
    )


def client_of_task(address: str, token: str, authority: Path | None = None) -> RuntimeHttpClient:
    """A client that speaks for the task with that token."""
    identity = RuntimeTokenHttpInterceptor(token)
    return RuntimeHttpClient.from_server_address(
        address, authority is None, _read(authority), [RuntimeVersionHttpInterceptor("fedferret"), identity]
    )


def _read(authority: Path | None) -> bytes | None:
    return authority.read_bytes() if authority else None

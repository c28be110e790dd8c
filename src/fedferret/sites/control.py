"""Control of the SuperLink over loopback: which node keys it accepts, and which run it has.

The control API has no login in Flower's released build; the server never publishes it (see `proxy`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedferret.core.errors import RunError
from fedferret.sites.package import fingerprint


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink lists it."""

    identifier: int
    name: str  # "" in insecure mode
    connected: bool
    registered: str  # time of registration, ISO 8601


class Control:
    """A client of one SuperLink's control API."""

    def __init__(self, address: str, authority: Path | None) -> None:
        """Create a client.

        Args:
            address: of the SuperLink, HOST:PORT.
            authority: the CA certificate to trust; None: no TLS.
        """
        self._client = ControlHttpClient.from_server_address(
            address,
            authority is None,
            authority.read_bytes() if authority else None,
            [RuntimeVersionHttpInterceptor("fedferret")],
        )

    def wait(self, seconds: float, alive: Callable[[], bool]) -> None:
        """Wait until the SuperLink replies.

        Args:
            seconds: how long to wait.
            alive: returns whether the SuperLink's process runs.
        Raises:
            RunError: if the SuperLink ends, or does not reply in time.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and alive():
            try:
                self._client.ListNodes(ListNodesRequest())
                return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RunError("the SuperLink does not reply: see server/superlink.log in the run's folder")

    def register(self, keys: Mapping[str, bytes]) -> None:
        """Register the sites' node keys.

        Args:
            keys: public key (OpenSSH format) by site name.
        Raises:
            RunError: if the SuperLink refuses a key.
        """
        for name, key in keys.items():
            public = public_key_to_bytes(load_ssh_public_key(key))  # type: ignore[arg-type]  # P-384, as pki makes them
            try:
                self._client.RegisterNode(RegisterNodeRequest(public_key=public, name=name))
            except httpx.HTTPStatusError as error:
                known = FlowerError.from_json(error.response.text)
                if known is None or known.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise RunError(f"the SuperLink refuses the node key of {name}: {error.response.text}") from error

    def unregister(self, keep: Collection[str]) -> None:
        """Unregister the nodes of all other sites: the SuperLink accepts no call of theirs any more.

        Args:
            keep: names of the sites that stay.
        """
        for node in self._client.ListNodes(ListNodesRequest()).nodes_info:
            if node.status != NodeStatus.UNREGISTERED and node.name not in keep:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))

    def start(self, package: bytes) -> int:
        """Stop the runs of an earlier server, start a run with that package, and return the new run's id."""
        for identifier, run in self._client.ListRuns(ListRunsRequest()).run_dict.items():
            if not run.finished_at:
                self._client.StopRun(StopRunRequest(run_id=identifier))
        fab = Fab(hash_str=fingerprint(package), content=package)
        return int(self._client.StartRun(StartRunRequest(fab=fab)).run_id)

    def nodes(self) -> list[Node]:
        """Return the registered nodes."""
        known = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.name, node.status == "online", node.registered_at) for node in known]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

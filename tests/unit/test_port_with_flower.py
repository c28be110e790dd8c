"""The server's port with Flower's SuperLink and SuperNodes: which nodes reach which calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason='the engine flower needs pip install "fedferret[flower]"')

import httpx
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedferret.sites import flower_process, forwarder
from fedferret.sites.control import Control
from fedferret.sites.credentials import SiteCredentials, read_site
from fedferret.sites.proxy import Proxy
from unit import outside
from unit.outside import Federation, call

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Server:
    federation: Federation
    folder: Path
    superlink: int
    port: int
    control: Control

    def proxy(self) -> Proxy:
        listen, behind = f"127.0.0.1:{self.port}", f"127.0.0.1:{self.superlink}"
        return Proxy(self.folder / "nginx", self.federation.server, listen, behind)

    def connected(self) -> set[str]:
        return {node.name for node in self.control.nodes() if node.connected}


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@contextmanager
def running(command: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **flower_process.environment(folder / "flower")}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


@contextmanager
def site(server: Server, name: str, folder: Path) -> Iterator[tuple[SiteCredentials, int]]:
    """A site's credentials and its forwarder's port."""
    folder.mkdir(mode=0o700)
    shutil.copytree(server.federation.pairs[name][0].parent, folder / "keys")
    known, port = read_site(folder / "keys"), outside.free_port()
    with running(forwarder.command(known, f"localhost:{server.port}", port, folder), folder, "forwarder"):
        wait_until(lambda: forwarder.BEGUN in (folder / "forwarder.log").read_text())
        yield known, port


def supernode(site: SiteCredentials, address: str, authority: Path, folder: Path) -> list[str]:
    port = outside.free_port()
    return flower_process.supernode(
        address, port, folder / "flower", authority, site.node_key, site.name, folder / "none"
    )


def misses(folder: Path) -> int:
    """How many outages the site's forwarder logged: calls of the node that did not reach the server."""
    return (folder / "site" / "forwarder.log").read_text().count("cannot be reached")


def returns(folder: Path) -> int:
    """How many ends of outages the site's forwarder logged: calls of the node that reached the server again."""
    return (folder / "site" / "forwarder.log").read_text().count("can be reached again")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    outside.needs_nginx()
    folder = tmp_path_factory.mktemp("server")
    federation = outside.federation(folder)
    known, port = federation.server, outside.free_port()
    certificates = flower_process.Certificates(known.authority, *known.superlink)
    with running(flower_process.superlink("127.0.0.1", port, folder, certificates), folder, "superlink") as process:
        control = Control(f"127.0.0.1:{port}", known.authority)
        control.wait(180, lambda: process.poll() is None)
        control.register({"ward-7": known.node_public_keys()["ward-7"].read_bytes()})
        yield Server(federation, folder, port, outside.free_port(), control)
        control.close()


def test_a_registered_node_connects_and_stays_over_a_restart_of_the_proxy(server: Server, tmp_path: Path) -> None:
    with site(server, "ward-7", tmp_path / "site") as (known, port):
        command = supernode(known, f"127.0.0.1:{port}", known.folder / "loopback.crt", tmp_path)
        with running(command, tmp_path, "supernode") as node:  # before there is a server: the node keeps trying
            wait_until(lambda: misses(tmp_path) > 0)
            with server.proxy():
                wait_until(lambda: server.connected() == {"ward-7"})
                missed, returned = misses(tmp_path), returns(tmp_path)  # before the outage: its line comes once
            wait_until(lambda: misses(tmp_path) > missed)  # a call of the node fell into the outage
            with server.proxy():
                wait_until(lambda: returns(tmp_path) > returned)
                assert node.poll() is None and server.connected() == {"ward-7"}
                node.terminate()  # the node signs off, and the SuperLink records it
                wait_until(lambda: server.connected() == set())


def test_a_node_that_is_not_registered_is_refused_despite_a_valid_certificate(server: Server, tmp_path: Path) -> None:
    with server.proxy(), site(server, "ward-8", tmp_path / "site") as (known, port):
        command = supernode(known, f"127.0.0.1:{port}", known.folder / "loopback.crt", tmp_path)
        with running(command, tmp_path, "supernode") as node:
            assert node.wait(300) != 0
    assert "2004" in (tmp_path / "supernode.log").read_text()
    assert server.connected() == set()


def test_a_registered_node_without_its_certificate_is_refused_before_flower(server: Server, tmp_path: Path) -> None:
    known = read_site(server.federation.pairs["ward-7"][0].parent)
    with (
        server.proxy(),
        running(supernode(known, f"localhost:{server.port}", known.authority, tmp_path), tmp_path, "supernode") as node,
    ):
        assert node.wait(300) != 0
    assert "400 Bad Request" in (tmp_path / "supernode.log").read_text()
    assert "400" in (server.folder / "nginx" / "refused.log").read_text() and server.connected() == set()


def test_the_control_paths_can_be_reached_on_the_server_and_not_through_the_proxy(
    server: Server, tmp_path: Path
) -> None:
    good = server.federation.pairs["ward-7"]
    with server.proxy(), site(server, "ward-7", tmp_path / "site") as (known, port):
        for address, authority, refused in (
            (f"127.0.0.1:{server.superlink}", known.authority, False),
            (f"127.0.0.1:{port}", known.folder / "loopback.crt", True),
        ):
            client = ControlHttpClient.from_server_address(
                address, False, authority.read_bytes(), [RuntimeVersionHttpInterceptor("test")]
            )
            with client:
                if refused:
                    with pytest.raises(httpx.HTTPStatusError, match="404"):
                        client.ListRuns(ListRunsRequest())
                else:
                    client.ListRuns(ListRunsRequest())
        unsigned = call(
            server.port, server.federation.ca, good, "/v1/fleet/pull-messages", Content_Type=PROTOBUF_MEDIA_TYPE
        )
        assert unsigned[0] == 401, unsigned  # it reached SuperLink, which requires a node's signature
        for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/health", "/openapi.json"):
            assert call(server.port, server.federation.ca, good, path)[0] == 404
            assert call(server.superlink, server.federation.ca, good, path)[0] != 404

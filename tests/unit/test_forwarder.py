"""The forwarder: what it passes on, what it logs when a server is away, false or refuses, and how it ends."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from federation import CountingProxy
from fedferret.core.errors import UserError
from fedferret.sites import forwarder
from fedferret.sites.credentials import SiteCredentials
from fedferret.sites.nginx import Limits
from fedferret.sites.proxy import Proxy
from fedferret.tracking.audit import read_audit
from unit import outside
from unit.outside import Federation, call

pytestmark = pytest.mark.slow
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return outside.federation(tmp_path_factory.mktemp("federation"))


@dataclass
class Running:
    port: int
    site: Path
    log: Path
    process: subprocess.Popen[bytes]

    def call(self, path: str = PULL, body: bytes = b"") -> tuple[int, bytes]:
        """A call as a node makes it: over TLS, to loopback, trusting only the site's loopback certificate."""
        return call(self.port, self.site / "loopback.crt", None, path, body=body)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.log.read_text())


@contextmanager
def forwarding(folder: Path, pair: outside.Pair, address: str) -> Iterator[Running]:
    """A forwarder for the site with the certificate ``pair``; the site's folder is copied to ``folder``."""
    site = folder / "site"
    shutil.copytree(pair[0].parent, site)
    port, log = outside.free_port(), folder / "forwarder.log"
    command = forwarder.command(SiteCredentials("ward-7", site, ()), address, port, folder)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    running = Running(port, site, log, process)
    try:
        running.wait_for(forwarder.BEGUN)
        yield running
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_calls_reach_superlink_and_responses_come_back(federation: Federation, tmp_path: Path) -> None:
    outside.needs_nginx()
    port = outside.free_port()
    with (
        outside.superlink(federation.server.superlink) as behind,
        Proxy(
            tmp_path / "nginx",
            federation.server,
            f"127.0.0.1:{port}",
            f"127.0.0.1:{behind.port}",
            Limits(upload=32 << 20),
        ),
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{port}") as here,
    ):
        assert here.call() == (200, PULL.encode() + b" ")
        assert here.call("/v1/control/start-run")[0] == 404
        assert here.call(PUSH, os.urandom(32 << 20))[0] == 200
        with ThreadPoolExecutor(8) as pool:
            bodies = [bytes([number]) * 100_000 for number in range(40)]
            responses = list(pool.map(lambda body: here.call(PUSH, body), bodies))
        assert responses == [(200, PUSH.encode() + b" " + body[:8]) for body in bodies]
        line = outside.connection(here.port, here.site / "loopback.crt", None)
        for _ in range(20):  # one connection is one connection
            line.request("POST", PULL)
            assert line.getresponse().read() == PULL.encode() + b" "
        line.close()
        assert {name for name, _, _ in behind.calls} == {f"POST {PULL}", f"POST {PUSH}"}
        assert here.log.read_text().count("\n") == 1  # only that it began


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what crossed a socket")
def test_the_sites_audit_has_what_crossed_its_sockets(federation: Federation, tmp_path: Path) -> None:
    outside.needs_nginx()
    port = outside.free_port()
    wire = CountingProxy(port)
    with (
        closing(wire),
        outside.superlink(federation.server.superlink) as behind,
        Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{port}", f"127.0.0.1:{behind.port}"),
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{wire.port}") as here,
    ):
        for size in (10, 100_000, 1_000_000):
            assert here.call(PUSH, os.urandom(size))[0] == 200
        kept = outside.connection(here.port, here.site / "loopback.crt", None)  # still open when the line is written
        kept.request("POST", PULL)
        kept.getresponse().read()
        crossed = wire.up, wire.down
        here.process.terminate()
        here.process.wait(600)
    (line,) = read_audit(tmp_path)
    print(f"at the proxy {crossed}, in the audit {line['up_bytes']}, {line['down_bytes']}")
    assert line["what"] == "socket" and crossed[0] > 1_100_000
    for counted, audited in zip(crossed, (line["up_bytes"], line["down_bytes"]), strict=True):
        assert abs(counted - audited) <= 64  # the open connection's close_notify of TLS


def test_while_the_server_is_away_calls_get_503_and_it_is_logged_once(federation: Federation, tmp_path: Path) -> None:
    outside.needs_nginx()
    port = outside.free_port()
    with (
        outside.superlink(federation.server.superlink) as behind,
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{port}") as here,
    ):
        for body in (b"", bytes(8 << 20)):
            assert here.call(PUSH, body)[0] == 503
        for _ in range(2):
            with Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{port}", f"127.0.0.1:{behind.port}"):
                assert here.call()[0] == 200
            assert here.call()[0] == 503
        logged = here.log.read_text().splitlines()[1:]
        assert [line.split(" ", 1)[1].split(" (")[0] for line in logged] == [
            "cannot be reached",
            "can be reached again",
        ] * 2 + ["cannot be reached"]


@pytest.mark.parametrize(
    ("impostor", "words"),
    [
        ("stranger's server", "is not the server that this site's credentials are for"),
        ("ward-8", "is not the server that this site's credentials are for: unsuitable certificate purpose"),
        ("late", "is not the server that this site's credentials are for"),
    ],
)
def test_another_server_is_sent_nothing(federation: Federation, tmp_path: Path, impostor: str, words: str) -> None:
    with (
        outside.superlink(federation.pairs[impostor]) as behind,
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{behind.port}") as here,
    ):
        assert here.call(PUSH, b"secret")[0] == 503
        here.wait_for(words)
        assert behind.calls == []


def test_a_server_under_another_name_is_sent_nothing(tmp_path: Path) -> None:
    federation = outside.federation(tmp_path)
    federation.authority.renew("server", ["elsewhere.example.org"])
    with (
        outside.superlink(federation.server.proxy) as behind,
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{behind.port}") as here,
    ):
        assert here.call(PUSH, b"secret")[0] == 503
        here.wait_for("Hostname mismatch")
        assert behind.calls == []


def test_a_refused_certificate_is_logged_and_a_renewed_one_needs_no_restart(
    federation: Federation, tmp_path: Path
) -> None:
    outside.needs_nginx()
    port = outside.free_port()
    with (
        outside.superlink(federation.server.superlink) as behind,
        Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{port}", f"127.0.0.1:{behind.port}"),
        forwarding(tmp_path, federation.pairs["late"], f"localhost:{port}") as here,
    ):
        for _ in range(2):
            assert here.call()[0] == 400
        here.wait_for("refuses this site's certificate: it has expired, was revoked")
        for path, new in zip(("site.crt", "site.key"), federation.pairs["ward-7"], strict=True):
            shutil.copy(new, here.site / path)
        assert here.call()[0] == 200
        here.wait_for("can be reached again")
        assert here.log.read_text().count("refuses") == 1


def test_a_server_that_ends_during_a_call_looks_like_a_lost_connection_and_not_like_broken_tls(
    federation: Federation, tmp_path: Path
) -> None:
    # Flower tries again after a lost connection, and gives up after an error of TLS
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*federation.server.superlink)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            line = context.wrap_socket(plain, server_side=True)
            line.recv(1 << 16)
            os.close(line.detach())  # without TLS's close_notify

        thread = threading.Thread(target=serve)
        thread.start()
        with forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{listener.getsockname()[1]}") as here:
            trusting = ssl.create_default_context(cafile=str(here.site / "loopback.crt"))
            with (
                socket.create_connection(("127.0.0.1", here.port), timeout=600) as plain,
                trusting.wrap_socket(plain, server_hostname=outside.HOST, suppress_ragged_eofs=False) as line,
            ):
                line.sendall(f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
                assert line.recv(1) == b""  # close_notify
        thread.join()


def test_it_listens_on_loopback_only(federation: Federation, tmp_path: Path) -> None:
    address = outside.own_address()
    if address is None:
        pytest.skip("this machine is on no network: there is no outside")
    with forwarding(tmp_path, federation.pairs["ward-7"], "localhost:1") as here, pytest.raises(OSError):
        socket.create_connection((address, here.port), timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_frees_the_port(federation: Federation, tmp_path: Path, number: signal.Signals) -> None:
    with (
        outside.superlink(federation.server.superlink) as behind,
        forwarding(tmp_path, federation.pairs["ward-7"], f"localhost:{behind.port}") as here,
    ):
        line = outside.connection(here.port, here.site / "loopback.crt", None)
        line.request("POST", PULL)  # the connection stays open
        assert line.getresponse().read()
        here.process.send_signal(number)
        assert here.process.wait(600) == 0
        line.close()
        socket.create_server(("127.0.0.1", here.port)).close()
        assert here.log.read_text().count("\n") == 1


def test_it_ends_with_its_parent(federation: Federation, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(federation.pairs["ward-7"][0].parent, site)
    command = forwarder.command(SiteCredentials("ward-7", site, ()), "localhost:1", outside.free_port(), tmp_path)
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    starter = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, start_new_session=True
    )
    assert starter.stdout is not None
    try:
        assert starter.stdout.readline().startswith(forwarder.BEGUN.encode())
        starter.kill()
        starter.wait()
        ready, _, _ = select.select([starter.stdout], [], [], 600)
        assert ready and starter.stdout.read() == b""  # the forwarder had the other end: it ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
        starter.wait()
        starter.stdout.close()


def test_an_invalid_address_is_one_line(tmp_path: Path) -> None:
    for address in ("", "fed.example.org", ":8443", "fed.example.org:", "fed.example.org:x", "a:70000"):
        with pytest.raises(UserError, match=r"host name and port, as in fed\.example\.org:8443"):
            forwarder.command(SiteCredentials("ward-7", tmp_path, ()), address, 1, tmp_path)

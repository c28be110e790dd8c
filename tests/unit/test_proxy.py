"""The server's port, with real sockets and real nginx: a valid site reaches a node's calls; nothing else passes."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree

from fedferret.core.errors import UserError
from fedferret.sites import nginx
from fedferret.sites.certificates import node_key_header
from fedferret.sites.proxy import Proxy
from unit import outside
from unit.outside import Federation, SuperLink, call

pytestmark = pytest.mark.slow
PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    outside.needs_nginx()
    return outside.federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def superlink(federation: Federation) -> Iterator[SuperLink]:
    with outside.superlink(federation.server.superlink) as server:
        yield server


@pytest.fixture(scope="module")
def port(federation: Federation, superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    number = outside.free_port()
    folder = tmp_path_factory.mktemp("proxy") / "nginx"
    with Proxy(folder, federation.server, f"0.0.0.0:{number}", f"127.0.0.1:{superlink.port}"):
        yield number


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("name", nginx.FLEET)
def test_a_site_reaches_the_calls_of_a_node(federation: Federation, superlink: SuperLink, port: int, name: str) -> None:
    superlink.calls.clear()
    signed = {
        "flwr_public_key": node_key(federation, "ward-7"),
        "flwr_timestamp": "2026-11-23T12:00:00+00:00",
        "flwr_signature": "c2ln",
    }
    status, body = call(port, federation.ca, federation.pairs["ward-7"], f"/v1/fleet/{name}", body=b"x" * 99, **signed)
    assert (status, body) == (200, f"/v1/fleet/{name} xxxxxxxx".encode())
    ((line, headers, size),) = superlink.calls
    assert (line, size) == (f"POST /v1/fleet/{name}", 99)
    assert {key.lower().replace("-", "_"): value for key, value in headers.items()}.items() >= signed.items()
    assert headers["X-Forwarded-For"] == "127.0.0.1"


def node_key(federation: Federation, site: str) -> str:
    return node_key_header(federation.server.node_public_keys()[site].read_bytes())


@pytest.mark.parametrize("key", ["ward-8", "a2V5", "nobody", "ward-7 "])
def test_a_call_with_another_node_key_than_the_certificates_is_refused(
    federation: Federation, superlink: SuperLink, port: int, key: str
) -> None:
    superlink.calls.clear()
    given = node_key(federation, key) if key == "ward-8" else key
    assert call(port, federation.ca, federation.pairs["ward-7"], PULL, flwr_public_key=given)[0] == 403
    assert call(port, federation.ca, federation.pairs["ward-8"], PULL, flwr_public_key=given)[0] == (
        200 if key == "ward-8" else 403
    )
    assert len(superlink.calls) == (key == "ward-8")


CLOSED = (
    *("/v1/control/start-run", "/v1/control/list-runs", "/v1/control/register-node", "/v1/control/get-auth-tokens"),
    *("/v1/runtime/acquire-task", "/v1/runtime/push-messages", "/v1/runtime/responses", "/", "/health", "/docs"),
    *("/openapi.json", "/v1/fleet", "/v1/fleet/", "/v1/fleet/register-node", "/v1/fleet/unregister-node"),
    *("/v1/fleet/pull-messages/", "/v1/fleet/pull-messagesx", "/V1/fleet/pull-messages", "/api/v1/fleet/pull-messages"),
    *("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run"),
    *("/v1/fleet/pull-messages/../../control/start-run", "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run"),
    *("/v1/fleet/pull-messages%00/v1/control/start-run", "/v1/fleet/..;/control/start-run", "/v1/%63ontrol/start-run"),
    *("https://localhost/v1/control/start-run", "/v1/fleet\\..\\control\\start-run", "*"),
)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("path", CLOSED)
def test_not_even_a_site_reaches_anything_else(
    federation: Federation, superlink: SuperLink, port: int, path: str, method: str
) -> None:
    superlink.calls.clear()
    status, _ = call(port, federation.ca, federation.pairs["ward-7"], path, method)
    assert status in (400, 404) and superlink.calls == []


@pytest.mark.parametrize(
    "spelling", ["/v1/control/../fleet/pull-messages", "/v1//fleet/./pull%2dmessages", "https://x" + PULL]
)
def test_a_call_is_passed_on_under_the_path_in_the_configuration(
    federation: Federation, superlink: SuperLink, port: int, spelling: str
) -> None:
    superlink.calls.clear()
    assert call(port, federation.ca, federation.pairs["ward-7"], spelling)[0] == 200
    assert [line for line, _, _ in superlink.calls] == [f"POST {PULL}"]


def test_calls_are_posts(federation: Federation, superlink: SuperLink, port: int) -> None:
    superlink.calls.clear()
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        assert call(port, federation.ca, federation.pairs["ward-7"], PULL, method)[0] == 403
    assert superlink.calls == []


def test_a_request_hidden_in_another_is_not_passed_on(federation: Federation, superlink: SuperLink, port: int) -> None:
    superlink.calls.clear()
    hidden = "POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    begin = f"POST {PULL} HTTP/1.1\r\nHost: x\r\n"
    for request, statuses in (
        (f"{begin}Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}", [b"400"]),
        (f"{begin}Content-Length: 0\r\nContent-Length: {len(hidden)}\r\n\r\n{hidden}", [b"400"]),
        (f"{begin}Content-Length: 0\r\n\r\n{hidden}", [b"200", b"404"]),  # two valid requests in a row
    ):
        line = outside.connection(port, federation.ca, federation.pairs["ward-7"])
        line.connect()
        line.sock.sendall(request.encode())
        response = b"".join(iter(lambda: line.sock.recv(1 << 16), b""))  # noqa: B023
        line.close()
        assert [part[:3] for part in response.split(b"HTTP/1.1 ")[1:]] == statuses
    assert [call for call, _, _ in superlink.calls] == [f"POST {PULL}"]


@pytest.mark.parametrize("who", [None, "late", "stranger", "server", "stranger's server"])
def test_a_client_with_no_certificate_or_a_wrong_one_is_refused(
    federation: Federation, superlink: SuperLink, port: int, who: str | None
) -> None:
    superlink.calls.clear()
    status, body = call(port, federation.ca, federation.pairs[who] if who else None, PULL)
    assert status == 400 and b"certificate" in body.lower() and superlink.calls == []
    assert b"nginx/" not in body  # no version, which would help an attacker


def test_each_refusal_is_logged_and_a_call_that_passed_is_not(
    federation: Federation, superlink: SuperLink, tmp_path: Path
) -> None:
    number = outside.free_port()
    with Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{superlink.port}"):
        good = federation.pairs["ward-7"]
        for pair, path in (
            (good, PULL),
            (None, PULL),
            (federation.pairs["late"], PULL),
            (good, "/v1/control/start-run"),
        ):
            call(number, federation.ca, pair, path)
    one, two, three = (tmp_path / "nginx" / "refused.log").read_text().splitlines()
    assert "127.0.0.1" in one and " NONE " in one and one.endswith(f"{PULL} 400")
    assert "CN=late" in two and "certificate has expired" in two
    assert "CN=ward-7" in three and three.endswith("POST /v1/control/start-run 404")


def test_a_revoked_site_is_cut_off_and_one_that_came_is_let_in_while_the_proxy_runs(
    superlink: SuperLink, tmp_path: Path
) -> None:
    outside.needs_nginx()
    federation = outside.federation(tmp_path)
    number = outside.free_port()
    with (
        outside.superlink(federation.server.superlink) as behind,
        Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{behind.port}") as proxy,
    ):
        came = federation.authority.issue("ward-9").with_suffix("")
        pair, key = (came / "site.crt", came / "site.key"), node_key(federation, "ward-9")
        assert call(number, federation.ca, pair, PULL, flwr_public_key=key)[0] == 403  # nginx does not know the key
        proxy.configure()

        def gives(status: int, pair: outside.Pair, **headers: str) -> bool:
            with suppress(OSError):  # of a connection to a worker that ends; a node tries again
                return call(number, federation.ca, pair, PULL, **headers)[0] == status
            return False

        wait_until(lambda: gives(200, pair, flwr_public_key=key))
        line = open_line(number, federation, "ward-7")
        again = federation.authority.folder / "again"
        again.mkdir()
        kept = tuple(again / path.name for path in federation.pairs["ward-7"])
        for path, copy in zip(federation.pairs["ward-7"], kept, strict=True):
            copy.write_bytes(path.read_bytes())  # the site still has the keys that are deleted here
        federation.authority.revoke("ward-7")
        wait_until(lambda: gives(400, (kept[0], kept[1])))
        open_line(number, federation, "ward-8").close()
        assert line.sock.recv(1) == b""  # the open connection is closed
        line.close()
        renewed = federation.authority.issue("ward-7").with_suffix("")
        wait_until(lambda: gives(200, (renewed / "site.crt", renewed / "site.key")))


def open_line(port: int, federation: Federation, name: str) -> Any:
    """A connection that has had a reply and stays open, like a node's. A worker that ends after a reload closes it."""
    found: list[Any] = []

    def stays() -> bool:
        line = outside.connection(port, federation.ca, federation.pairs[name])
        with suppress(OSError):
            line.request("POST", PULL)
            assert line.getresponse().read()
            if line.sock is not None:
                found.append(line)
                return True
        line.close()
        return False

    wait_until(stays)
    return found[0]


def test_no_tls_session_is_resumed_without_checking_the_certificate(federation: Federation, port: int) -> None:
    context = ssl.create_default_context(cafile=str(federation.ca))
    context.load_cert_chain(*federation.pairs["ward-7"])
    session = None
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.minimum_version = context.maximum_version = version
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
                context.wrap_socket(plain, server_hostname=outside.HOST, session=session) as line,
            ):
                line.sendall(f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
                assert b" 200 " in line.recv(1 << 16) and not line.session_reused
                session = line.session
        session = None


def test_old_tls_and_plain_http_are_refused(federation: Federation, superlink: SuperLink, port: int) -> None:
    superlink.calls.clear()

    def old(context: ssl.SSLContext) -> None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1

    with pytest.warns(DeprecationWarning), pytest.raises(ssl.SSLError):
        outside.connection(port, federation.ca, federation.pairs["ward-7"], old).connect()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
        plain.sendall(f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        assert b" 400 " in plain.recv(1 << 16)
    assert superlink.calls == []


def test_superlink_cannot_be_reached_from_outside(federation: Federation, superlink: SuperLink, port: int) -> None:
    address = outside.own_address()
    if address is None:
        pytest.skip("this machine is on no network: there is no outside")
    socket.create_connection((address, port), timeout=30).close()
    with pytest.raises(OSError):
        socket.create_connection((address, superlink.port), timeout=30)


def test_a_superlink_that_the_authority_did_not_certify_is_sent_nothing(federation: Federation, tmp_path: Path) -> None:
    number = outside.free_port()
    with (
        outside.superlink(federation.pairs["stranger's server"]) as impostor,
        Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{impostor.port}"),
    ):
        assert call(number, federation.ca, federation.pairs["ward-7"], PULL)[0] == 502
        assert impostor.calls == []


def test_a_call_is_small_an_upload_as_long_as_answers_are_and_none_is_written_to_disk(
    federation: Federation, superlink: SuperLink, tmp_path: Path
) -> None:
    superlink.calls.clear()
    number, folder = outside.free_port(), tmp_path / "nginx"
    limits = nginx.Limits(upload=nginx.upload_limit(1_000_000))
    larger = {"push-object": limits.upload, "push-messages": limits.announcement}
    hostile = PushMessagesRequest(message_object_trees=[ObjectTree(children=[ObjectTree(object_id=64 * "f")] * 46)])
    assert len(hostile.SerializeToString()) > limits.announcement  # so many objects of one reply cannot be announced
    with Proxy(folder, federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{superlink.port}", limits):
        good = federation.pairs["ward-7"]
        before = {path: path.stat().st_mtime_ns for path in (folder / "temporary").rglob("*")}
        for name in nginx.FLEET:
            path, size = f"/v1/fleet/{name}", larger.get(name, limits.call)
            assert call(number, federation.ca, good, path, body=bytes(size))[0] == 200
            line = outside.connection(number, federation.ca, good)
            line.putrequest("POST", path)
            line.putheader("Content-Length", str(size + 1))
            line.endheaders()
            assert line.getresponse().status == 413
            line.close()
        assert {path: path.stat().st_mtime_ns for path in (folder / "temporary").rglob("*")} == before
    assert [size for _, _, size in superlink.calls] == [larger.get(name, limits.call) for name in nginx.FLEET]


def test_a_certificate_has_few_requests_at_a_time_and_the_others_have_theirs(
    federation: Federation, tmp_path: Path
) -> None:
    number = outside.free_port()
    limits = nginx.Limits(requests=2, burst=5)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # takes connections and responds to nothing
        Proxy(tmp_path / "n", federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{silent.getsockname()[1]}", limits),
    ):
        lines = [outside.connection(number, federation.ca, federation.pairs["ward-7"]) for _ in range(3)]
        for line in lines[:2]:
            line.request("POST", PULL)
            silent.accept()[0].detach()
        lines[2].request("POST", PULL)
        assert lines[2].getresponse().status == 503  # Flower's nodes then try again
        line = outside.connection(number, federation.ca, federation.pairs["ward-8"])
        line.request("POST", PULL)
        silent.accept()[0].detach()
        for each in (*lines, line):
            each.close()


def test_mistakes_are_one_line(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = federation.server
    for listen, superlink, words in (
        ("8443", "127.0.0.1:1", "give an IP address and a port"),
        ("fed.example.org:8443", "127.0.0.1:1", "give an IP address and a port"),
        ("0.0.0.0:99999", "127.0.0.1:1", "give an IP address and a port"),
        ("0.0.0.0:8443", "192.0.2.7:1", "keep it on loopback"),
        ("0.0.0.0:8443", "0.0.0.0:1", "keep it on loopback"),
    ):
        with pytest.raises(UserError, match=words):
            Proxy(tmp_path, server, listen, superlink)
    with pytest.raises(UserError, match=r"give a path without quotes, .* for nginx"):
        Proxy(tmp_path / 'a";user root', server, "0.0.0.0:8443", "127.0.0.1:1").prepare()
    (tmp_path / "a folder with spaces").mkdir(mode=0o700)
    Proxy(tmp_path / "a folder with spaces", server, "[::]:8443", "[::1]:1").prepare()
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(UserError, match="apt-get install nginx-light"):
        Proxy(tmp_path / "b", server, "0.0.0.0:8443", "127.0.0.1:1").prepare()


def test_the_calls_are_those_of_flowers_nodes_except_registering() -> None:
    translation = pytest.importorskip("flwr.supercore.protobuf.translation", reason="Flower is not installed")
    table = next(value for value in vars(translation).values() if isinstance(value, dict) and ("POST", PULL) in value)
    calls = {path.removeprefix("/v1/fleet/") for _, path in table if path.startswith("/v1/fleet/")}
    assert calls - set(nginx.FLEET) == {"register-node", "unregister-node"} and set(nginx.FLEET) <= calls

"""Requests and responses are signed: what another made is dropped, and its request repeated."""

from __future__ import annotations

import shutil
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from contract.methods import reference
from fedferret.core.errors import RunError, UserError
from fedferret.engines.replay import Protection
from fedferret.engines.transport import SERVER, Received
from fedferret.sites import certificates, signing
from fedferret.sites.archive import unpack
from fedferret.sites.certificates import Clock, Pair
from fedferret.sites.credentials import read_server, read_site
from fedferret.sites.pki import Authority, Validity
from fedferret.sites.signing_keys import read_private
from fedferret.wire import codec
from toy_sites import simulate_sites
from toys import toy_clients
from unit.signed import METHOD, NAMES, ROUNDS, issued, server_seal, signed_run, signed_sites, site_seal

MESSAGE = codec.encode((1, "a message of either direction"))


def ago(days: float) -> Clock:
    """A clock that is ``days`` late."""
    return lambda: datetime.now(UTC) - timedelta(days=days)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return issued(tmp_path_factory.mktemp("signing"))


@pytest.fixture
def fresh(authority: Authority, tmp_path: Path) -> Authority:
    """A copy, to be changed."""
    return Authority(Path(shutil.copytree(authority.folder, tmp_path / "pki")))


def refusal(seal: Any, sealed: bytes, sender: str = SERVER) -> str:
    """In which words a message is refused; they are one line."""
    with pytest.raises(ValueError) as caught:
        seal.open(sender, sealed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_byte_that_was_changed_anywhere_is_refused_at_both_ends(authority: Authority, tmp_path: Path) -> None:
    server, site = server_seal(authority), site_seal(authority, tmp_path)
    request, response = server.close(MESSAGE), site.close(MESSAGE)
    assert site.open(SERVER, request) == MESSAGE == server.open("a", response)
    assert server.close(MESSAGE) == request and site.close(MESSAGE) == response, "repeated to the byte"
    for seal, sender, sealed in ((site, SERVER, request), (server, "a", response)):
        for place in range(len(sealed)):
            refusal(seal, sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :], sender)
        for cut in (0, 2, 66, 84, 86, len(sealed) - 1):
            refusal(seal, sealed[:cut], sender)
        refusal(seal, sealed + b"\0", sender)


def test_a_message_passes_neither_for_another_sites_nor_in_the_other_direction(
    authority: Authority, tmp_path: Path
) -> None:
    server = server_seal(authority)
    a, b = site_seal(authority, tmp_path / "a"), site_seal(authority, tmp_path / "b", "b")
    assert refusal(server, b.close(MESSAGE), "a") == "the signature is not the site's"
    assert refusal(server, a.close(MESSAGE), "stranger") == "there is no signing key of stranger"
    assert refusal(server, server.close(MESSAGE), "a") == "the message was signed for the other direction"
    assert refusal(a, b.close(MESSAGE)) == "the message was signed for the other direction"
    assert refusal(a, MESSAGE) == refusal(server, MESSAGE, "a") == "the message has no signature"


def test_a_site_that_came_after_the_server_began_is_known_by_its_key(fresh: Authority, tmp_path: Path) -> None:
    server = server_seal(fresh)
    assert refusal(server, MESSAGE, "d") == "there is no signing key of d"
    fresh.issue("d")
    assert server.open("d", site_seal(fresh, tmp_path / "d", "d").close(MESSAGE)) == MESSAGE


def posing(key: Ed25519PrivateKey, certificate: bytes) -> bytes:
    """A request, signed with a key, beside a certificate (PEM) of the attacker's choice."""
    der = x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)
    signed = signing.REQUEST + len(der).to_bytes(2, "little") + der + MESSAGE
    return b"fS\1" + key.sign(signed) + signed


def test_no_other_certificate_passes_for_the_one_of_the_servers_signing_key(
    fresh: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, own = site_seal(fresh, tmp_path / "a"), Ed25519PrivateKey.generate()
    for certificate in ("server/server.crt", "server/superlink.crt", "sites/a/site.crt", "ca.crt"):
        words = refusal(site, posing(own, (fresh.folder / certificate).read_bytes()))
        assert "for another purpose" in words or "is none" in words
    with monkeypatch.context() as patched:  # one of TLS with an Ed25519 key, such as we make none
        patched.setattr(certificates, "SIGNING", certificates.CLIENT_AUTH)
        authority = Pair((fresh.folder / "ca.crt").read_bytes(), (fresh.folder / "ca.key").read_bytes())
        pair = certificates.certificate(authority, "a", certificates.CLIENT_AUTH, 9, datetime.now(UTC))
    assert "for another purpose" in refusal(site, posing(read_private(pair.key), pair.certificate))
    right = (fresh.folder / "server" / "signing.crt").read_bytes()
    assert refusal(site, posing(own, right)) == "the signature is not the server's"
    other = Authority.create(tmp_path / "other", ["127.0.0.1"])
    assert "is of another authority" in refusal(site, server_seal(other).close(MESSAGE))
    assert not (tmp_path / "a" / signing.NEWEST).exists(), "nothing is remembered of what was refused"


def test_the_servers_key_changes_in_a_run_and_an_older_one_is_of_no_more_use(fresh: Authority, tmp_path: Path) -> None:
    server, stolen = server_seal(fresh), server_seal(fresh).close(MESSAGE)
    site = site_seal(fresh, tmp_path / "a")
    assert site.open(SERVER, stolen) == MESSAGE
    fresh.renew("server")
    assert server.close(MESSAGE) != stolen, "the running server signs with the new key"
    assert site.open(SERVER, server.close(MESSAGE)) == MESSAGE
    for seal in (site, site_seal(fresh, tmp_path / "a")):  # after a restart too
        assert "the server's signing key is an old one" in refusal(seal, stolen)
        assert seal.open(SERVER, server.close(MESSAGE)) == MESSAGE
    kept = tmp_path / "a" / signing.NEWEST
    assert kept.stat().st_mode & 0o077 == 0
    kept.write_bytes(b"spoilt")
    with pytest.raises(UserError, match=r"server-signing\.crt is damaged .* delete it if"):
        site_seal(fresh, tmp_path / "a")


def test_a_server_in_the_middle_of_being_renewed_signs_with_the_former_key(fresh: Authority, tmp_path: Path) -> None:
    server, site = server_seal(fresh), site_seal(fresh, tmp_path / "a")
    certificate = (fresh.folder / "server" / "signing.crt").read_bytes()
    fresh.renew("server")
    newer = (fresh.folder / "server" / "signing.crt").read_bytes()
    (fresh.folder / "server" / "signing.crt").write_bytes(certificate)  # the key is there, its certificate is not
    assert site.open(SERVER, server.close(MESSAGE)) == MESSAGE
    (fresh.folder / "server" / "signing.crt").write_bytes(newer)
    assert site.open(SERVER, server.close(MESSAGE)) == MESSAGE


def test_an_expired_certificate_is_one_line_at_both_ends(tmp_path: Path) -> None:
    old = Authority.create(tmp_path / "pki", ["127.0.0.1"], clock=ago(300), validity=Validity(certificate=365))
    old.issue("a")
    sealed = server_seal(old).close(MESSAGE)
    assert site_seal(old, tmp_path / "a").open(SERVER, sealed) == MESSAGE
    assert "expired on" in refusal(site_seal(old, tmp_path / "b", clock=ago(-66)), sealed)
    assert "check this machine's clock" in refusal(site_seal(old, tmp_path / "c", clock=ago(302)), sealed)
    late = Authority.create(tmp_path / "late", ["127.0.0.1"], clock=ago(340))
    assert any("server's signing key expires in 24 days" in line for line in read_server(late.folder).notices)


def test_credentials_of_an_earlier_fedferret_are_refused_with_the_command_that_renews_them(
    fresh: Authority, tmp_path: Path
) -> None:
    pytest.importorskip("flwr")
    from fedferret.sites.serve import _keys

    site, archive, former = fresh.folder / "sites" / "a", fresh.folder / "sites" / "a.tar", tmp_path / "former.tar"
    with tarfile.open(archive) as whole, tarfile.open(former, "w") as without:
        for member in whole:
            if not member.name.endswith("signing.key"):
                without.addfile(member, whole.extractfile(member))
    with pytest.raises(UserError, match=r"former\.tar has no signing key.*`fedferret pki renew a`"):
        unpack(former, tmp_path / "site")
    for path in site.glob("signing.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no signing key.*`fedferret pki renew a`"):
        read_site(site)
    with pytest.raises(UserError, match=r"^a: no signing keys.*`fedferret pki renew a`"):
        _keys(read_server(fresh.folder), ["a", "b"])
    fresh.renew("a")
    assert unpack(archive, tmp_path / "site").name == "a" and _keys(read_server(fresh.folder), ["a"])
    key = (site / "signing.key").read_bytes()
    fresh.renew("a")
    assert (site / "signing.key").read_bytes() == key, "a running server knows the site by it"
    for name in ("signing.crt", "signing.key"):
        (fresh.folder / "server" / name).unlink()
        with pytest.raises(UserError, match=r"without keys that sign requests; run `fedferret pki renew server`"):
            read_server(fresh.folder)
        fresh.renew("server")
        read_server(fresh.folder)


# ---- a run over signed messages
def test_a_signed_run_has_the_bits_of_one_process_and_the_ledger_counts_no_signature(
    authority: Authority, tmp_path: Path
) -> None:
    events: list[Any] = []
    run, lines = signed_run(authority, tmp_path, on_message=events.append)
    assert run.public == reference("ferret").public and not lines
    assert [record.bytes_up for record in run.records] == [record.bytes_up for record in reference("ferret").records]
    request = next(event for event in events if event["what"] == "request")
    assert request["framed_bytes"] > request["payload_bytes"] + 600, "framing counts signature and certificate"
    for name in NAMES:
        for path in (tmp_path / name / "request.last", tmp_path / name / "response.last"):
            assert path.stat().st_mode & 0o077 == 0


class Forger:
    """Replies first in the name of "a", each time that "a" is sent something new, or ``always``."""

    def __init__(self, kind: str, always: bool = False) -> None:
        self.kind, self.always = kind, always
        self.forged: set[bytes] = set()
        self.seen: dict[str, list[bytes]] = {name: [] for name in NAMES}  # what each site sent, oldest first

    def __call__(self, site: str, message: bytes, response: bytes) -> list[Any]:
        self.seen[site].append(response)
        if site != "a" or (message in self.forged and not self.always):
            return [response]
        self.forged.add(message)
        return [self.forgery(message, response)]  # the true response is blocked

    def forgery(self, message: bytes, response: bytes) -> Any:
        if self.kind == "changed":
            return response[:-9] + bytes([response[-9] ^ 1]) + response[-8:]
        if self.kind == "of b":
            return self.seen["b"][-1]
        if self.kind == "of an earlier request":
            return self.seen["a"][0] if len(self.seen["a"]) > 1 else b""
        return {"garbage": b"x" * 300, "long": b"x" * (2 << 20), "reflected": message, "unsigned": response[86:]}.get(
            self.kind, Received("a", None, "the site's trainer gave no reply")
        )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("changed", "the signature is not the site's"),
        ("of b", "the signature is not the site's"),
        ("of an earlier request", "replied to a request of round 1 that is over"),
        ("garbage", "the message has no signature"),
        ("long", "the message has no signature"),
        ("reflected", "the message was signed for the other direction"),
        ("unsigned", "the message has no signature"),
        ("an error", "the site's trainer gave no reply"),
    ],
)
def test_a_forged_response_is_dropped_and_the_sites_own_counts_without_a_second_training(
    kind: str, reason: str, authority: Authority, tmp_path: Path
) -> None:
    trained: list[str] = []
    run, lines = signed_run(authority, tmp_path, Forger(kind), trained=trained)
    assert run.public == reference("ferret").public and not any(record.failures for record in run.records)
    assert f"a: {reason}; dropped, and its request is sent again" in lines and len(lines) == len(set(trained)) / 3
    assert len(trained) == len(set(trained)) == 3 * ROUNDS, "each site trained once a round"


def test_a_forger_without_end_costs_one_sites_round_and_one_line(authority: Authority, tmp_path: Path) -> None:
    run, lines = signed_run(authority, tmp_path, Forger("changed", always=True))
    for record in run.records:
        (failure,) = record.failures
        assert (failure.client, failure.reason) == ("a", "the signature is not the site's")
        assert set(record.bytes_up) == {"b", "c"}
    assert len(lines) == ROUNDS


def test_a_request_that_was_changed_on_the_way_is_sent_again(authority: Authority, tmp_path: Path) -> None:
    """The site signs that it could not read it, which must not stand for its response, now or later."""
    refusals: list[bytes] = []
    made = signed_sites(authority, tmp_path)(toy_clients())
    trainer = made.trainers["a"]

    def tamper(site: str, message: bytes, response: bytes) -> list[bytes]:
        if site == "a" and message not in refusals:
            refusals.append(message)
            return [trainer.handle(message[:-1] + bytes([message[-1] ^ 1]))]
        return [response]

    made.tamper = tamper
    lines: list[str] = []
    protection = Protection(server_seal(authority))
    run = simulate_sites(METHOD, ROUNDS, lambda data: made, log=lines.append, protection=protection)
    assert run.public == reference("ferret").public and not any(record.failures for record in run.records)
    assert "did not take a request that came damaged: ValueError: the signature is not the server's" in lines[0]


def test_a_server_that_a_site_does_not_know_is_told_so_at_once(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", ["127.0.0.1"])
    for name in NAMES:
        shutil.copytree(authority.folder / "sites" / name, other.folder / "sites" / name)
    made = signed_sites(authority, tmp_path)
    protection = Protection(server_seal(other))
    with pytest.raises(RunError, match=r"did not take the request: ValueError: the certificate .* another authority"):
        simulate_sites(METHOD, ROUNDS, made, protection=protection)

"""Credentials are private, checked when read, and never overwritten; a mistake is one line."""

from __future__ import annotations

import ssl
import stat
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedferret import cli
from fedferret.core.errors import UserError
from fedferret.sites import certificates, credentials
from fedferret.sites.credentials import read_server
from fedferret.sites.pki import Authority, Validity

HOSTS = ["fed.example.org", "192.0.2.7", "127.0.0.1"]


def ago(days: float) -> Callable[[], datetime]:
    """A clock that is ``days`` late."""
    return lambda: datetime.now(UTC) - timedelta(days=days)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki", HOSTS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shake_hands(server: tuple[Path, Path], client: tuple[Path, Path], trusted: Path, host: str) -> None:
    """A TLS handshake in memory with certificates on both sides; raises the error of either side."""
    called = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    called.load_cert_chain(*server)
    called.load_verify_locations(trusted)
    called.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(trusted))
    calling.verify_flags |= getattr(ssl, "VERIFY_X509_STRICT", 0)  # the default of newer Pythons
    calling.load_cert_chain(*client)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = calling.wrap_bio(back, there, server_hostname=host)
    other = called.wrap_bio(there, back, server_side=True)
    pending = [one, other]
    for _ in range(10):
        for side in list(pending):
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not pending


def test_everything_is_readable_by_its_owner_alone(authority: Authority) -> None:
    authority.issue("ward-7")
    for path in [authority.folder, *authority.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_site_and_the_server_accept_each_other_under_every_given_name_and_no_other(authority: Authority) -> None:
    authority.issue("ward-7")
    site = credentials.read_site(authority.folder / "sites" / "ward-7")
    server = credentials.read_server(authority.folder)
    assert site.name == "ward-7" and server.hosts == tuple(HOSTS)
    mine = (site.certificate, site.key)
    for host in HOSTS:
        shake_hands(server.proxy, mine, site.authority, host)
    for host in certificates.LOOPBACK:
        shake_hands(server.superlink, mine, site.authority, host)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"fed\.example\.com"):
        shake_hands(server.proxy, mine, site.authority, "fed.example.com")
    with pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
        shake_hands(server.proxy, mine, site.authority, "localhost")


def test_a_certificate_is_valid_for_its_side_only(authority: Authority, tmp_path: Path) -> None:
    authority.issue("ward-7")
    site, server = (
        credentials.read_site(authority.folder / "sites" / "ward-7"),
        credentials.read_server(authority.folder),
    )
    mine = (site.certificate, site.key)
    with pytest.raises(ssl.SSLError, match=r"unsuitable|purpose"):
        shake_hands(mine, mine, site.authority, "ward-7")
    with pytest.raises(ssl.SSLError, match=r"unsuitable|purpose"):
        shake_hands(server.proxy, server.proxy, site.authority, HOSTS[0])
    other = Authority.create(tmp_path / "other", HOSTS)
    other.issue("ward-7")
    theirs = credentials.read_site(other.folder / "sites" / "ward-7")
    with pytest.raises(ssl.SSLError):
        shake_hands(server.proxy, (theirs.certificate, theirs.key), site.authority, HOSTS[0])


def test_a_site_makes_its_loopback_certificate_once_and_trusts_it(authority: Authority) -> None:
    archive = authority.issue("ward-7")
    site = credentials.read_site(archive.with_suffix(""))
    pair = credentials.loopback(site.folder)
    before = files(site.folder)
    assert credentials.loopback(site.folder) == pair and files(site.folder) == before
    for host in certificates.LOOPBACK:
        shake_hands(pair, pair, pair[0], host)
    credentials.loopback(site.folder, clock=ago(-credentials.LOOPBACK_DAYS - 1))
    assert files(site.folder) != before  # made again once expired


def test_node_keys_are_in_the_formats_of_openssh_and_flower(authority: Authority) -> None:
    authority.issue("ward-7")
    site = credentials.read_site(authority.folder / "sites" / "ward-7")
    public = load_ssh_public_key(site.node_public_key.read_bytes())
    assert load_ssh_private_key(site.node_key.read_bytes(), None).public_key() == public
    assert public.curve.name == "secp384r1"  # type: ignore[union-attr]
    assert site.node_public_key.read_text().split()[2] == "ward-7"
    assert credentials.read_server(authority.folder).node_public_keys() == {"ward-7": site.node_public_key}


def test_nothing_is_overwritten(authority: Authority) -> None:
    authority.issue("ward-7")
    before = files(authority.folder)
    with pytest.raises(UserError, match=r"exists and is not overwritten.*pki renew ward-7"):
        authority.issue("ward-7")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        Authority.create(authority.folder, HOSTS)
    assert files(authority.folder) == before


def test_renewing_keeps_the_node_key(authority: Authority) -> None:
    archive = authority.issue("ward-7")
    folder = archive.with_suffix("")
    before, sent = files(folder), archive.read_bytes()
    assert authority.renew("ward-7") == archive
    after = files(folder)
    assert {name for name in after if after[name] != before[name]} >= {"site.crt", "site.key"}
    assert {name for name in ("node.key", "signing.key", "ca.crt") if after[name] != before[name]} == set()
    assert archive.read_bytes() != sent
    credentials.read_site(folder)
    authority.renew("server", ["new.example.org"])
    assert credentials.read_server(authority.folder).hosts == ("new.example.org",)
    authority.renew("server")
    assert credentials.read_server(authority.folder).hosts == ("new.example.org",)


def test_revoking_covers_every_certificate_of_the_name_and_deletes_its_keys(authority: Authority) -> None:
    authority.issue("ward-8")
    authority.issue("ward-7")
    authority.renew("ward-7")
    assert authority.revoke("ward-7") == 2
    assert not list(authority.folder.glob("sites/ward-7*"))
    listed = {one.serial for one in authority.statuses() if one.revoked}
    assert {one.name for one in authority.statuses() if one.revoked} == {"ward-7"} and len(listed) == 2
    crl = subprocess.run(
        ["openssl", "crl", "-noout", "-verify", "-CAfile", "ca.crt", "-text", "-in", "revoked.crl"],
        cwd=authority.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert crl.stdout.count("Serial Number") == 2 and "verify OK" in crl.stderr
    authority.issue("ward-7")
    assert len({one.serial for one in authority.statuses() if one.revoked}) == 2
    assert authority.revoke("ward-8") == 1 and authority.revoke("ward-7") == 1


def test_a_certificate_that_expires_soon_is_noted_and_an_expired_one_is_refused(tmp_path: Path) -> None:
    old = Authority.create(tmp_path / "pki", HOSTS, clock=ago(340), validity=Validity(authority=700, certificate=365))
    folder = old.issue("ward-7").with_suffix("")
    assert old.notices == [] and credentials.read_site(folder, clock=ago(340)).notices == ()
    (notice,) = credentials.read_site(folder).notices
    assert "ward-7 expires in 24 days" in notice and "pki renew" in notice
    assert "fedferret pki renew server" in credentials.read_server(old.folder).notices[0]
    assert [one.days_left for one in Authority(old.folder).statuses()] == [359, 24, 24, 24, 24]
    with pytest.raises(UserError, match=r"certificate of ward-7 expired on 20\d\d-\d\d-\d\d: ask"):
        credentials.read_site(folder, clock=ago(-26))
    with pytest.raises(UserError, match=r"the server's certificate expired on .* renew server"):
        credentials.read_server(old.folder, clock=ago(-26))
    with pytest.raises(UserError, match="the authority expired on"):
        Authority(old.folder, clock=ago(-361))
    with pytest.raises(UserError, match="check this machine's clock"):
        credentials.read_site(folder, clock=ago(342))


def test_a_clock_that_is_somewhat_late_is_accepted(authority: Authority) -> None:
    folder = authority.issue("ward-7").with_suffix("")
    credentials.read_site(folder, clock=ago(50 / 1440))
    credentials.read_server(authority.folder, clock=ago(50 / 1440))


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    late = Authority.create(tmp_path / "pki", HOSTS, validity=Validity(authority=100, certificate=365))
    late.issue("ward-7")
    assert {one.days_left for one in late.statuses()} == {99}


@pytest.mark.parametrize("name", ["", "Ward", "-ward", "ward-", "ward 7", "../ward", "ward_7", "w" * 64, "wärd", "a.b"])
def test_a_name_that_cannot_be_a_folder_or_a_host_is_refused(authority: Authority, name: str) -> None:
    for act in (authority.issue, authority.revoke, authority.renew):
        with pytest.raises(UserError, match="cannot be the name of a site"):
            act(name)


@pytest.mark.parametrize(
    "host", ["", "fed.example.org:8443", "*.example.org", "a b", "-a", "häuser.de", "a" * 64, "a..b"]
)
def test_an_invalid_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="or an IP address, without a port"):
        Authority.create(tmp_path / "pki", ["fed.example.org", host])
    assert not (tmp_path / "pki").exists()


def test_other_mistakes_are_one_line_too(authority: Authority, tmp_path: Path) -> None:
    authority.issue("ward-7")
    for act, words in (
        (lambda: Authority.create(tmp_path / "new", []), "every name and address under which sites"),
        (lambda: Authority.create(tmp_path / "new", HOSTS, "a/b"), "cannot name a federation"),
        (lambda: Authority(tmp_path / "new"), "fedferret pki init"),
        (lambda: authority.issue("server"), "reserved for the server"),
        (lambda: authority.issue("server-signing"), "reserved for the server"),
        (lambda: authority.revoke("ward-8"), 'did you mean "ward-7"'),
        (lambda: authority.renew("ward-7", ["a.org"]), "nothing calls sites"),
        (lambda: credentials.read_site(tmp_path), "is missing: unpack the archive"),
        (lambda: credentials.read_server(tmp_path), "fedferret pki init"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            act()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)


def test_keys_that_others_can_read_are_refused(authority: Authority) -> None:
    folder = authority.issue("ward-7").with_suffix("")
    for path in (folder / "site.key", folder / "node.key", folder / "signing.key", folder):
        mode = path.stat().st_mode
        path.chmod(0o750)
        with pytest.raises(
            UserError, match=f"can be read by others .mode 750.*chmod {'700' if path == folder else '600'}"
        ):
            credentials.read_site(folder)
        path.chmod(mode)
    (authority.folder / "ca.key").chmod(0o640)
    with pytest.raises(UserError, match=r"ca\.key can be read by others"):
        Authority(authority.folder)
    (authority.folder / "server" / "server.key").chmod(0o604)
    with pytest.raises(UserError, match=r"server\.key can be read by others"):
        credentials.read_server(authority.folder)


def test_files_that_do_not_belong_together_are_named(authority: Authority, tmp_path: Path) -> None:
    one, two = (authority.issue(name).with_suffix("") for name in ("ward-7", "ward-8"))
    for name, content, words in (
        ("site.key", (two / "site.key").read_bytes(), "do not belong together"),
        (
            "ca.crt",
            (Authority.create(tmp_path / "b", HOSTS).folder / "ca.crt").read_bytes(),
            "not signed by the authority",
        ),
        ("site.crt", b"nothing", "cannot be read as PEM"),
        ("node.key", (two / "node.key").read_bytes(), r"node\.key and node\.pub do not belong together"),
        ("node.pub", (two / "node.pub").read_bytes(), r"node\.key and node\.pub do not belong together"),
        ("node.key", b"nothing", "a node key cannot be read"),
    ):
        before = (one / name).read_bytes()
        (one / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            credentials.read_site(one)
        (one / name).write_bytes(before)
    credentials.read_site(one)


def test_the_server_refuses_a_node_key_under_another_sites_name(authority: Authority) -> None:
    one, two = (authority.issue(name).with_suffix("") for name in ("ward-7", "ward-8"))
    (one / "node.pub").write_bytes((two / "node.pub").read_bytes())
    with pytest.raises(UserError, match=r"ward-7/node\.pub is the node key of ward-8"):
        credentials.read_server(authority.folder).node_public_keys()


def test_a_damaged_file_of_the_authority_is_one_line(authority: Authority) -> None:
    for name in ("ca.crt", "ca.key", "revoked.crl", "server/server.crt", "server/superlink.key"):
        path = authority.folder / name
        before = path.read_bytes()
        flipped = before[: len(before) // 2] + bytes([before[len(before) // 2] ^ 0x80]) + before[len(before) // 2 + 1 :]
        for damaged in (b"", flipped, None):
            path.unlink()
            if damaged is None:
                path.mkdir(mode=0o700)
            else:
                credentials.write_private(path, damaged)
            lines = []
            for command in (lambda: Authority(authority.folder).statuses(), lambda: read_server(authority.folder)):
                try:
                    command()  # type: ignore[no-untyped-call]
                except UserError as error:
                    lines.append(str(error))
            assert lines  # a server needs no ca.key, and `pki show` none of the server's files
            for line in lines:
                assert str(path.with_suffix("")) in line or "the authority" in line, line
                assert "\n" not in line and ": " in line
            if damaged is None:
                path.rmdir()
            credentials.write_private(path, before)


def test_the_commands(tmp_path: Path) -> None:
    def give(*arguments: str, code: int = 0) -> str:
        outcome = CliRunner().invoke(cli.app, ["pki", *arguments, "--pki", str(tmp_path / "pki")])
        assert outcome.exit_code == code, outcome.output
        return " ".join(outcome.output.split())

    assert "fed.example.org" in give("init", "--host", "fed.example.org", "--host", "127.0.0.1")
    assert "ward-7.tar" in give("issue", "ward-7")
    assert "ward-7.tar" in give("renew", "ward-7")
    assert "not overwritten" in give("issue", "ward-7", code=2)
    shown = give("show")
    assert shown.count("ward-7") == 2 and shown.count("364 days left") == 5 and "replaced; 364" in shown
    assert "2 certificates" in give("revoke", "ward-7")
    assert "revoked" in give("show")
    assert "no site is called" in give("revoke", "ward-7", code=2)

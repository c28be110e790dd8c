"""Archives of credentials: they hold one site's files, and a bad one leaves good credentials as they are."""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from fedferret.core.errors import UserError
from fedferret.sites import credentials
from fedferret.sites.archive import unpack
from fedferret.sites.pki import Authority

HOSTS = ["fed.example.org", "192.0.2.7", "127.0.0.1"]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki", HOSTS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_has_the_files_of_its_site_and_nothing_of_the_authority(
    authority: Authority, tmp_path: Path
) -> None:
    authority.issue("ward-8")
    archive = authority.issue("ward-7")
    (archive.with_suffix("") / "notes.txt").write_text("of the administrator")
    authority.renew("ward-7")
    site = unpack(archive, tmp_path / "site" / "keys")
    assert site.name == "ward-7" and set(files(site.folder)) == set(credentials.SITE_FILES)
    sent = b"".join(files(site.folder).values()) + archive.read_bytes()
    assert (authority.folder / "ca.key").read_bytes().splitlines()[1] not in sent
    assert (authority.folder / "sites" / "ward-8" / "site.key").read_bytes().splitlines()[1] not in sent
    readme = (site.folder / "README.txt").read_text()
    assert "fedferret join fed.example.org:8443" in readme and "--name ward-7" in readme
    for path in [site.folder, *site.folder.iterdir()]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_newer_archive_replaces_an_older_one_but_not_that_of_another_site(
    authority: Authority, tmp_path: Path
) -> None:
    first = unpack(authority.issue("ward-7"), tmp_path / "site")
    before = files(first.folder)
    with pytest.raises(UserError, match=r"holds the credentials of ward-7, .* those of ward-8"):
        unpack(authority.issue("ward-8"), first.folder)
    assert files(first.folder) == before
    again = unpack(authority.renew("ward-7"), first.folder)
    assert files(again.folder)["site.crt"] != before["site.crt"]


@pytest.mark.parametrize("entry", ["../site.crt", "ward-7/../../site.crt", "/etc/site.crt", "ward-7/other", "ward-7"])
def test_an_archive_with_another_entry_is_refused(authority: Authority, tmp_path: Path, entry: str) -> None:
    archive, bad = authority.issue("ward-7"), tmp_path / "bad.tar"
    bad.write_bytes(archive.read_bytes())
    with tarfile.open(bad, "a") as tar:
        tar.addfile(tarfile.TarInfo(entry), io.BytesIO())
    with pytest.raises(UserError, match=r"bad\.tar: not an archive"):
        unpack(bad, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_archives_that_are_truncated_linked_or_invalid_are_refused(authority: Authority, tmp_path: Path) -> None:
    archive, bad = authority.issue("ward-7"), tmp_path / "bad.tar"
    link = tarfile.TarInfo("ward-7/site.key")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(bad, "w") as tar:
        tar.addfile(link)
    for content in (bad.read_bytes(), archive.read_bytes()[:3000], b"PK\3\4 no tar", b""):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not an archive"):
            unpack(bad, tmp_path / "site")
    with pytest.raises(UserError, match=r"there is no file .*none\.tar"):
        unpack(tmp_path / "none.tar", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def repack(archive: Path, bad: Path, changes: dict[str, bytes], folder: str = "ward-7") -> Path:
    """An archive with other content in some files."""
    with tarfile.open(archive) as old, tarfile.open(bad, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            name = member.name.partition("/")[2]
            content = changes.get(name, file.read())
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
    return bad


def test_a_bad_archive_leaves_good_credentials_as_they_are(authority: Authority, tmp_path: Path) -> None:
    archive = authority.issue("ward-7")
    other = files(authority.issue("ward-8").with_suffix(""))
    strange = files(Authority.create(tmp_path / "strange", HOSTS).issue("ward-7").with_suffix(""))
    into = unpack(archive, tmp_path / "site" / "credentials").folder
    credentials.loopback(into)
    before = files(into)
    bad = tmp_path / "bad.tar"
    node = {name: other[name] for name in ("node.key", "node.pub")}
    site = {name: other[name] for name in ("site.key", "site.crt")}
    for changes, folder, words in (
        ({"site.key": other["site.key"]}, "ward-7", r"bad\.tar: site\.crt and its key do not belong together"),
        ({"site.crt": b"nothing"}, "ward-7", "cannot be read as PEM"),
        ({"ca.crt": strange["ca.crt"]}, "ward-7", "not signed by the authority"),
        ({"node.key": other["node.key"]}, "ward-7", r"node\.key and node\.pub do not belong together"),
        (node, "ward-7", r"node\.pub is the node key of ward-8, and site\.crt the certificate of ward-7"),
        (site, "ward-7", "the certificate of ward-8"),
        ({}, "ward-9", "its folder is called ward-9, and its credentials are those of ward-7"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            unpack(repack(archive, bad, changes, folder), into)
        assert "\n" not in str(raised.value) and files(into) == before
    with pytest.raises(UserError, match=r"holds the credentials of ward-7; give those of ward-9"):
        unpack(archive, tmp_path / "elsewhere", name="ward-9")
    assert not (tmp_path / "elsewhere").exists() and [path.name for path in into.parent.iterdir()] == [into.name]
    unpack(authority.renew("ward-7"), into)
    assert {name for name, content in files(into).items() if content == before.get(name)} >= {"loopback.key"}

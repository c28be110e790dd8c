"""What is installed is what was locked, has no known vulnerability and an allowed licence, and a release lists it."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from supply import audit, licences
from supply.pins import HASHES, LOCK, ROOT, pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOUND = {
    "id": "GHSA-test",
    "aliases": ["CVE-2000-1"],
    "summary": "Runs what it reads.",
    "affected": [
        {
            "package": {"name": "bad", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
        }
    ],
}


def test_both_locks_agree_on_every_version_and_one_has_every_hash() -> None:
    exact, hashed = pins(LOCK), pins(HASHES)
    assert {name: version for name, version in hashed.items() if name in exact} == {
        name: exact[name] for name in hashed if name in exact
    }
    # pip freeze leaves setuptools out; the others belong to PyTorch's CUDA build alone.
    assert all(re.match(r"(setuptools|triton|(cuda|nvidia)-.+)$", name) for name in hashed.keys() - exact.keys())
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["flower"], *extras["mixtures"]]
    for requirement in map(Requirement, [*wanted, *PROJECT["build-system"]["requires"]]):
        assert hashed[requirement.name] in requirement.specifier
    entries = re.sub(r"\\\n", "", re.sub(r"^ *#.*\n", "", HASHES.read_text(), flags=re.MULTILINE)).splitlines()
    assert len(entries) == len(hashed)
    assert all(re.fullmatch(r"\S+==\S+ (\s*--hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)


@pytest.mark.parametrize(
    "line", ["torch>=2.13", "torch", "torch==2.*", "torch==2.13,!=2.13.1", "torch @ file:///t.whl"]
)
def test_a_line_that_pins_no_exact_version_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"# locked\nnumpy==2.4.6 \\\n    --hash=sha256:00\n    # via torch\n{line}\n")
    with pytest.raises(ValueError, match="pins no exact version"):
        pins(tmp_path / "lock")


def test_the_list_of_licences_has_every_locked_package() -> None:
    rows = re.findall(r"^\| (\S+) \| (\S+) \| \S.* \|$", licences.PAGE.read_text(), flags=re.MULTILINE)
    assert dict(rows[1:]) == pins(LOCK)


def test_every_installed_package_has_an_allowed_licence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("piplicenses")
    licences.main([])
    assert "allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("MIT; BSD", True),
        ("MIT; GPLv3", False),
        ("MIT OR GPLv3", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_a_licence_that_is_not_allowed_word_for_word_is_refused(licence: str, allowed: bool) -> None:
    assert (licences.refused({"a": licence}, ["MIT", "BSD"], {}) == []) == allowed
    assert licences.refused({"a": licence}, ["MIT", "BSD"], {"b*": "why", "a*": "why"}) == []
    assert (licences.refused({"a": licence}, ["MIT", "BSD"], {"a": " "}) == []) == allowed  # an exception has a reason


@pytest.fixture
def service() -> Iterator[str]:
    """The address of a vulnerability service in OSV's form, which knows of one fault in the package "bad"."""

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"vulns": [FOUND]} if query["package"]["name"] == "bad" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


@pytest.mark.slow(seconds=6)
def test_a_known_vulnerability_is_refused_unless_it_has_a_reason(
    service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pip_audit")
    lock, accepted, stamp = tmp_path / "a.lock", tmp_path / "accepted.toml", tmp_path / "audited"

    def run(packages: str, vulnerabilities: str, address: str) -> str:
        lock.write_text(packages)
        accepted.write_text("[vulnerabilities]\n" + vulnerabilities)
        files = ["--lock", str(lock), "--accepted", str(accepted), "--stamp", str(stamp)]
        audit.main([*files, "--vulnerability-service", "osv", "--osv-url", address])
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match=r"^bad 1\.0: CVE-2000-1, fixed in 1\.1: Runs what it reads\.\n.*reason"):
        run("good==2.0\nbad==1.0\n", "", service)
    with pytest.raises(SystemExit, match="GHSA-test needs a reason"):
        run("bad==1.0\n", 'GHSA-test = ""', service)
    with socket.socket() as nobody:  # bound, so that nobody else listens here
        nobody.bind(("127.0.0.1", 0))
        out = run("bad==1.0\n", "", f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/query")
    assert out.count("\n") == 1 and "not audited" in out and not stamp.exists()
    assert "none in 1 packages beside 1 accepted" in run("bad==1.0\n", 'CVE-2000-1 = "Reads nothing."', service)
    assert stamp.exists()
    assert "CVE-2000-1 in accepted.toml was not found" in run("good==2.0\n", 'CVE-2000-1 = "Reads nothing."', service)


@pytest.mark.slow(seconds=8)
def test_a_release_has_its_packages_lock_bill_of_materials_and_sums(tmp_path: Path) -> None:
    for tool in ("build", "cyclonedx_py"):
        pytest.importorskip(tool)
    command = ["make", "-C", str(ROOT), f"BIN={Path(sys.executable).parent}", f"DIST={tmp_path / 'dist'}", "release"]
    done = ["-o", ".venv/installed-dev", "-o", "committed", "-o", "supply"]  # what the other tests and `make check` do
    subprocess.run([*command, *done], check=True, capture_output=True)
    dist, version = tmp_path / "dist", PROJECT["project"]["version"]
    files = {f"fedferret-{version}-py3-none-any.whl", f"fedferret-{version}.tar.gz", HASHES.name, "sbom.cdx.json"}
    sums = dict(reversed(line.split()) for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((dist / name).read_bytes()).hexdigest() for name in files}
    assert {path.name for path in dist.iterdir()} == files | {"SHA256SUMS"}
    bill = json.loads((dist / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["version"] == version
    assert {part["name"]: part["version"] for part in bill["components"]} == pins(HASHES)
    assert all(source["hashes"] for part in bill["components"] for source in part["externalReferences"])
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert modules <= set(ZipFile(dist / f"fedferret-{version}-py3-none-any.whl").namelist())

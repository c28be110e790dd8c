"""The files under deploy/: their commands exist, and the programs that read them accept them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedferret import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SERVICES = {path.stem: yaml.safe_load(path.read_text())["services"] for path in (DEPLOY / "container").glob("*.yaml")}


def check_command(words: list[str]) -> None:
    """Parse a command of fedferret as the command line does, without running it."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[words[0]]  # type: ignore[union-attr]
    command.make_context(words[0], words[1:])


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists_with_few_rights(unit: Path) -> None:
    program, *words = settings(unit)["ExecStart"].split()
    assert Path(program).name == "fedferret"
    check_command([word.replace("${ADDRESS}", "fed.example.org:8443").replace("%i", "ward-7") for word in words])
    assert settings(unit)["User"] == "fedferret" and settings(unit)["UMask"] == "0077"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_the_units_and_rates_them_restricted(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name.replace("@.", "@ward-7.")
    copy.write_text(unit.read_text().replace("/opt/fedferret/bin/fedferret", sys.executable))
    quiet = {**os.environ, "SYSTEMD_COLORS": "0", "SYSTEMD_EMOJI": "0"}
    outcome = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, env=quiet)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "", "")
    command = ["systemd-analyze", "security", "--offline=true", copy]
    outcome = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if outcome.returncode:
        pytest.skip("this systemd cannot rate a unit that is not installed")
    (exposure,) = re.findall(r"Overall exposure level for .*: ([\d.]+) ", outcome.stdout)
    assert float(exposure) <= 2.5  # of 10; systemd calls this "OK"


def test_containers_start_commands_that_exist_with_few_rights() -> None:
    assert set(SERVICES) == {"server", "site"}
    for services in SERVICES.values():
        for service in services.values():
            check_command(service["command"])
            assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
            assert (ROOT / service["build"]["dockerfile"]).exists()
            assert (DEPLOY / "container" / service["build"]["context"]).resolve() == ROOT
    assert "ports" not in SERVICES["site"]["join"]  # nothing calls a site
    assert SERVICES["server"]["serve"]["ports"] == ["8443:8443"]
    assert all(mount.endswith(":ro") for mount in SERVICES["site"]["join"]["volumes"] if "train" in mount)


def test_the_image_has_existing_files_and_locked_packages_and_runs_as_an_ordinary_user() -> None:
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE) for word in line.split()]
    assert sources and all(list(ROOT.glob(source)) for source in sources)
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert installs and all("--require-hashes" in install or "--no-index" in install for install in installs)
    ignored = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored and all(f"!{source}" in ignored for source in sources)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for wanted in re.findall(r"/source\[(\w+)\]", text):
        assert wanted in extras
    users = re.findall(r"^USER (\w+)$", text, flags=re.MULTILINE)
    assert users == ["fedferret"] and text.index("\nUSER") < text.index("\nENTRYPOINT")

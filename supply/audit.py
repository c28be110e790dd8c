"""Ask pip-audit for known vulnerabilities of every locked version: ``python -m supply.audit``.

Options that this program does not know go to pip-audit, ``--vulnerability-service osv`` for example. Without a network,
or where a mirror has packages but no records of vulnerabilities, one line says so and the audit passes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supply.pins import HASHES, LOCK, pins

ACCEPTED = Path(__file__).with_name("accepted.toml")
UNREACHABLE = re.compile(r"Could not connect|not redirecting properly|requests\.exceptions\.|ServiceError")


class NoAnswer(Exception):
    """The vulnerability service cannot be reached."""


def ask(versions: Mapping[str, str], options: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit knows about some versions.

    Args:
        versions: Exact versions by package.
        options: Further options of pip-audit.

    Returns:
        One record per package: ``name``, and ``vulns`` or ``skip_reason``.

    Raises:
        NoAnswer: If the service cannot be reached.
        SystemExit: If pip-audit fails for any other reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(wanted), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10", *options]
        outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.stdout.startswith("{"):
        records: list[dict[str, Any]] = json.loads(outcome.stdout)["dependencies"]
        return records
    words = outcome.stderr.strip() or "pip-audit printed nothing"
    if UNREACHABLE.search(words):
        raise NoAnswer(words.splitlines()[-1])
    sys.exit(f"pip-audit failed: {words}")


def audit(versions: Mapping[str, str], options: Sequence[str]) -> list[dict[str, Any]]:
    """The records of all versions; the first package alone shows whether the service answers at all."""
    first = dict([next(iter(versions.items()))])
    records = ask(first, options)
    if all("skip_reason" in record for record in records):
        raise NoAnswer(records[0]["skip_reason"])
    rest = {name: version for name, version in versions.items() if name not in first}
    return records + (ask(rest, options) if rest else [])


def judged(records: Sequence[Mapping[str, Any]], accepted: Mapping[str, str]) -> tuple[list[str], set[str]]:
    """The vulnerabilities that nobody accepted, a line each, and the accepted names that were found."""
    lines, used = [], set()
    for record in records:
        for found in record.get("vulns", []):
            names = {found["id"], *found["aliases"]}
            used |= names & set(accepted)
            if not names & set(accepted):
                fixed = f"fixed in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "not fixed yet"
                lines.append(
                    f"{record['name']} {record['version']}: {found['id']}, {fixed}: {found['description'][:200]}"
                )
    return lines, used


def main(words: Sequence[str]) -> None:
    """Audit the locks; the stamp is written only where every package was audited or is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamp", type=Path, help="a file to touch after an audit that took place")
    parser.add_argument("--lock", type=Path, nargs="+", default=[HASHES, LOCK])
    parser.add_argument("--accepted", type=Path, default=ACCEPTED)
    asked, options = parser.parse_known_args(words)
    accepted = tomllib.loads(asked.accepted.read_text(encoding="utf-8"))["vulnerabilities"]
    if unexplained := [name for name, reason in accepted.items() if not str(reason).strip()]:
        sys.exit(f"{asked.accepted.name}: {', '.join(unexplained)} needs a reason")
    versions = {name: version for lock in asked.lock for name, version in pins(lock).items()}
    try:
        records = audit(versions, options)
    except NoAnswer as why:
        print(f"Vulnerabilities: not audited, the service does not answer ({why})")
        return
    lines, used = judged(records, accepted)
    if skipped := [record["name"] for record in records if "skip_reason" in record]:
        print(f"Vulnerabilities: no record of {', '.join(skipped)}")
    if lines:
        lines.append(f"Update the lock, or give a reason in {asked.accepted.name} under [vulnerabilities]")
        sys.exit("\n".join(lines))
    for name in sorted(set(accepted) - used):
        print(f"Vulnerabilities: {name} in {asked.accepted.name} was not found, delete it")
    print(f"Vulnerabilities: none in {len(records) - len(skipped)} packages beside {len(used)} accepted")
    if asked.stamp:
        asked.stamp.touch()


if __name__ == "__main__":
    main(sys.argv[1:])

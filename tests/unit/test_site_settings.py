"""A site's settings and data: found beside ``site.toml``, faults in one line, rows in nothing that leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedferret import models, recipe
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Train
from fedferret.engines.transport import Request
from fedferret.resident.process import open_trainer
from fedferret.resident.site import Site, check_data, read_site
from fedferret.wire import codec


def write_site(folder: Path, settings: str, rows: str = '{"instruction": "The door?", "response": "Red."}\n') -> Path:
    (folder / "site.toml").write_text(settings)
    (folder / "rows.jsonl").write_text(rows)
    return folder


def test_a_sites_settings_name_its_file_beside_them(tmp_path: Path) -> None:
    site = read_site(write_site(tmp_path, 'name = "ward-7"\n[data]\npath = "rows.jsonl"\n'))
    assert site.data and site.data.path == str(tmp_path / "rows.jsonl") and len(check_data(site)) == 1
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "site.toml").write_text(site.to_toml())
    assert read_site(tmp_path / "again") == site
    assert Site(name="worker").to_toml() == 'name = "worker"\ndevice = "cpu"\nmemory = "fast"\nhistory = 10\n'


@pytest.mark.parametrize(
    ("settings", "rows", "reason"),
    [
        ('name = "w"\n[data]\npath = "none.jsonl"', "", r"there is no file"),
        ('name = "w"\n[data]\npath = "rows.jsonl"', "", r"is empty"),
        ('name = "w"\n[data]\npath = "rows.jsonl"', "{}\n", r'has no column "instruction"'),
        (
            'name = "w"\n[data]\npath = "rows.jsonl"',
            '{"instruction": "x", "response": ""}',
            r"row 1: column .* is empty",
        ),
        ('name = "w"\n[data]\npath = "rows.jsonl"\nheld_out = 1', "", r"data.held_out: there is no such setting"),
        ('name = ""\n[data]\npath = "rows.jsonl"', "", r"name='': give the name"),
        ('nam = "w"', "", r"nam: there is no such setting; did you mean .name."),
        ("name = ", "", r"not TOML"),
        ('name = "w"\ndata = "rows.jsonl"', "", r"must be a table"),
    ],
)
def test_a_fault_of_a_site_is_one_line_before_any_server_is_met(
    settings: str, rows: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        open_trainer(write_site(tmp_path, settings, rows))
    assert "\n" not in str(raised.value)


def test_a_site_without_settings_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"site.toml: there is no such file; it names the site and its data"):
        read_site(tmp_path)


def test_a_sites_data_is_in_nothing_that_it_sends(tmp_path: Path) -> None:
    rows = [{"instruction": f"Secret {number}?", "response": "Xyzzy plugh."} for number in range(4)]
    folder = write_site(
        tmp_path, 'name = "w"\n[data]\npath = "rows.jsonl"\n', "".join(json.dumps(row) + "\n" for row in rows)
    )
    plan = recipe(
        rounds=1,
        model={"name": "tiny"},
        data={"source": "sites", "sites": ["w"]},
        clients={"per_round": 1},
        algorithm={"name": "ferret", "coordinates": 64, "training": {"learning_rate": 0.1, "steps": 1}},
    ).identity_toml()
    site = open_trainer(folder)
    run = hashlib.sha256(plan.encode()).hexdigest()
    request = Request(run, 0, 1, "t", "w", plan, "f" * 64, 0, "", b"", (), 0, 0, False, b"", Train(1), 1)
    base = codec.decode(site.handle(codec.encode(request)))
    assert "the base model here has SHA-256" in base.reason
    fingerprint = tree.fingerprint(tree.parameters(models.load("tiny").model))
    sent = site.handle(codec.encode(replace(request, base=fingerprint, sequence=2)))
    assert codec.decode(sent).status == "done"
    for word in (b"Secret", b"Xyzzy", b"plugh"):
        assert word not in sent and word not in (folder / "audit.jsonl").read_bytes()

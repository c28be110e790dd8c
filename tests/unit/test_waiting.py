"""Threads that wait sleep soon, unless the user has decided."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedferret.core.waiting import sleep_soon


def test_the_command_tells_openmp_before_torch_is_imported() -> None:
    """OpenMP reads its settings once, when torch loads it."""
    program = (
        "import os, sys; from fedferret.cli import main; sys.argv[1:] = ['--version']\n"
        "try: main()\n"
        "except SystemExit: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "3000 False"


@pytest.mark.parametrize("decided", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_has_decided_stays(decided: dict[str, str]) -> None:
    environment = dict(decided)
    sleep_soon(environment)
    assert environment == decided

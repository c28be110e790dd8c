"""The supervisor keeps real processes running, logs their end once, and never leaves one behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedferret.sites import supervisor as supervising
from fedferret.sites.supervisor import Part, Supervisor, alone_in, ended, terminable

PATIENCE = 60.0  # seconds for anything: the machine may be busy
FOR_EVER = "import time; print('up', flush=True); time.sleep(1000)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "FIRST_PAUSE", 0.05)


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def supervisor(logged: list[str]) -> Iterator[Supervisor]:
    with closing(
        Supervisor(logged.append, lambda part, code, output: f"{part.name} {ended(code)}: {output.strip()}")
    ) as it:
        yield it


def python(name: str, program: str, log: Path, **environment: str) -> Part:
    return Part(name, [sys.executable, "-S", "-c", program], log, environment)


def wait_until(so: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def poll_until(supervisor: Supervisor, so: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        supervisor.poll()
        time.sleep(0.01)


def is_gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_the_end_of_a_killed_part_is_logged_and_the_part_started_again(
    supervisor: Supervisor, logged: list[str], tmp_path: Path
) -> None:
    supervisor.start(python("one", FOR_EVER, tmp_path / "one.log"))
    poll_until(supervisor, lambda: "up" in supervisor.output("one"))
    first = supervisor.process("one")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    poll_until(supervisor, lambda: supervisor.process("one") not in (None, first))
    assert logged == ["one was ended by SIGKILL: up"]


def test_a_part_that_keeps_ending_is_logged_once_and_started_after_longer_pauses(
    supervisor: Supervisor, logged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(supervising, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(supervising, "FIRST_PAUSE", 2.0)
    supervisor.start(python("one", "import sys; print('no'); sys.exit(3)", tmp_path / "one.log"))
    pauses = []
    for _ in range(5):
        wait_until(lambda: supervisor.exit_code("one") is not None)
        supervisor.poll()  # records that it ended
        since = clock[0]
        while supervisor.exit_code("one") is None and supervisor.process("one") is None and clock[0] - since < 100:
            clock[0] += 0.5
            supervisor.poll()
        pauses.append(clock[0] - since)
    assert pauses == [2, 4, 8, 15, 15]
    assert logged == ["one ended with code 3: no"]


def test_the_end_of_a_part_that_was_healthy_again_is_logged_again(
    supervisor: Supervisor, logged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "HEALTHY", 0.0)
    supervisor.start(python("one", "import sys; sys.exit(3)", tmp_path / "one.log"))
    poll_until(supervisor, lambda: len(logged) == 2)
    assert logged == ["one ended with code 3: "] * 2


def test_all_parts_end_together_in_reverse_order_and_by_sigkill_if_necessary(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = tmp_path / "order"
    polite = (
        "import os, pathlib, signal, time\n"
        "def end(*_):\n"
        "    with open(os.environ['ORDER'], 'a') as file: print(os.environ['WHO'], file=file)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(1000)"
    )
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    for name in ("one", "two"):
        supervisor.start(python(name, polite, tmp_path / f"{name}.log", ORDER=str(order), WHO=name))
    supervisor.start(python("three", stubborn, tmp_path / "three.log"))
    poll_until(supervisor, lambda: all("up" in supervisor.output(name) for name in ("one", "two", "three")))
    processes = [supervisor.process(name) for name in ("one", "two", "three")]
    supervisor.stop("three", patience=0.2)
    supervisor.close()
    assert order.read_text().split() == ["two", "one"]
    assert all(process is not None and is_gone(process) for process in processes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_supervisor_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from fedferret.sites.supervisor import Part, Supervisor\n"
        "supervisor = Supervisor(print, lambda *_: '')\n"
        "command = [sys.executable, '-S', '-c', 'import time; time.sleep(1000)']\n"
        "supervisor.start(Part('one', command, Path(sys.argv[1])))\n"
        "print(supervisor.process('one'), flush=True); time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "one.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert not is_gone(child)
        process.kill()
    end = time.monotonic() + PATIENCE
    while not is_gone(child):
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.01)


def test_a_log_over_its_limit_is_renamed_at_the_next_start(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "LARGEST_LOG", 100)
    log = tmp_path / "logs" / "one.log"
    log.parent.mkdir()
    log.write_text("old " * 50)
    supervisor.start(python("one", FOR_EVER, log))
    poll_until(supervisor, lambda: "up" in log.read_text())
    assert log.with_name("one.log.old").read_text().startswith("old")
    assert supervisor.output("one").strip() == "up"


def test_output_is_what_was_logged_since_the_last_start(supervisor: Supervisor, tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    log.write_text("of yesterday\n")
    supervisor.start(python("one", FOR_EVER, log))
    poll_until(supervisor, lambda: "up" in log.read_text())
    assert supervisor.output("one") == "up\n"


def test_a_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    with alone_in(tmp_path / "ward-7", "a site"):
        program = (
            "import sys; from pathlib import Path; from fedferret.sites.supervisor import alone_in\n"
            "with alone_in(Path(sys.argv[1]), 'a site'): pass"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "ward-7")]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert "a site is running there already" in outcome.stderr.splitlines()[-1]
    with alone_in(tmp_path / "ward-7", "a site"):
        pass


def test_sigterm_acts_as_ctrl_c() -> None:
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)  # a library that another test imported may have its own
    with pytest.raises(KeyboardInterrupt), terminable():
        timer.start()
        time.sleep(PATIENCE)
    assert signal.getsignal(signal.SIGTERM) == before

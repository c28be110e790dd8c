"""Processes are kept running, said to be gone once, and never outlive their supervisor: real processes throughout."""

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

PATIENCE = 60.0  # seconds for anything: other work may be running
FOR_EVER = "import time; print('up', flush=True); time.sleep(1000)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "FIRST_PAUSE", 0.05)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(said: list[str]) -> Iterator[Supervisor]:
    with closing(
        Supervisor(said.append, lambda part, code, words: f"{part.name} {ended(code)}: {words.strip()}")
    ) as it:
        yield it


def python(name: str, program: str, log: Path, **environment: str) -> Part:
    return Part(name, [sys.executable, "-S", "-c", program], log, environment)


def wait_until(so: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def tend_until(supervisor: Supervisor, so: Callable[[], object]) -> None:
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


def test_a_part_that_is_killed_is_said_to_be_gone_and_started_again(
    supervisor: Supervisor, said: list[str], tmp_path: Path
) -> None:
    supervisor.start(python("one", FOR_EVER, tmp_path / "one.log"))
    tend_until(supervisor, lambda: "up" in supervisor.words("one"))
    first = supervisor.process("one")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    tend_until(supervisor, lambda: supervisor.process("one") not in (None, first))
    assert said == ["one was ended by SIGKILL: up"]


def test_a_part_that_ends_again_and_again_is_said_to_once_and_waited_for_longer(
    supervisor: Supervisor, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(supervising, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(supervising, "FIRST_PAUSE", 2.0)
    supervisor.start(python("one", "import sys; print('no'); sys.exit(3)", tmp_path / "one.log"))
    pauses = []
    for _ in range(5):
        wait_until(lambda: supervisor.code("one") is not None)
        supervisor.poll()  # notes that it ended
        since = clock[0]
        while supervisor.code("one") is None and supervisor.process("one") is None and clock[0] - since < 100:
            clock[0] += 0.5
            supervisor.poll()
        pauses.append(clock[0] - since)
    assert pauses == [2, 4, 8, 15, 15]
    assert said == ["one ended with code 3: no"]


def test_one_that_is_well_again_may_be_said_to_be_gone_again(
    supervisor: Supervisor, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "HEALTHY", 0.0)
    supervisor.start(python("one", "import sys; sys.exit(3)", tmp_path / "one.log"))
    tend_until(supervisor, lambda: len(said) == 2)
    assert said == ["one ended with code 3: "] * 2


def test_all_end_together_the_last_first_and_the_stubborn_by_force(
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
    tend_until(supervisor, lambda: all("up" in supervisor.words(name) for name in ("one", "two", "three")))
    processes = [supervisor.process(name) for name in ("one", "two", "three")]
    supervisor.stop("three", patience=0.2)
    supervisor.close()
    assert order.read_text().split() == ["two", "one"]
    assert all(process is not None and is_gone(process) for process in processes)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
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


def test_a_log_beyond_its_limit_makes_way_at_the_next_start(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "LARGEST_LOG", 100)
    log = tmp_path / "logs" / "one.log"
    log.parent.mkdir()
    log.write_text("old " * 50)
    supervisor.start(python("one", FOR_EVER, log))
    tend_until(supervisor, lambda: "up" in log.read_text())
    assert log.with_name("one.log.old").read_text().startswith("old")
    assert supervisor.words("one").strip() == "up"


def test_words_are_those_since_the_last_start(supervisor: Supervisor, tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    log.write_text("of yesterday\n")
    supervisor.start(python("one", FOR_EVER, log))
    tend_until(supervisor, lambda: "up" in log.read_text())
    assert supervisor.words("one") == "up\n"


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
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


def test_a_service_manager_s_request_is_as_good_as_ctrl_c() -> None:
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), terminable():
        timer.start()
        time.sleep(PATIENCE)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

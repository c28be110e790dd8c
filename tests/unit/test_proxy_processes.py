"""nginx as a process: where it runs and as whom, and that it ends with whatever started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason='certificates need pip install "fedferret[flower]"')

from fedferret.core.errors import RunError
from fedferret.sites.proxy import Proxy
from unit import outside
from unit.outside import Federation, SuperLink, call

pytestmark = pytest.mark.slow
PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    outside.needs_nginx()
    return outside.federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def superlink(federation: Federation) -> Iterator[SuperLink]:
    with outside.superlink(federation.server.superlink) as server:
        yield server


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_without_a_superlink_the_response_is_502(federation: Federation, tmp_path: Path) -> None:
    number = outside.free_port()
    with Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{outside.free_port()}"):
        assert call(number, federation.ca, federation.pairs["ward-7"], PULL)[0] == 502  # Flower's nodes then try again


def test_nginx_runs_in_its_folder_and_its_workers_as_an_ordinary_user(
    federation: Federation, superlink: SuperLink, tmp_path: Path
) -> None:
    number, folder = outside.free_port(), tmp_path / "nginx"
    with Proxy(folder, federation.server, f"127.0.0.1:{number}", f"127.0.0.1:{superlink.port}"):
        master, worker = master_and_worker(folder, federation, number)
        open_files = {os.readlink(path) for path in Path(f"/proc/{master}/fd").iterdir()}
        assert os.stat(f"/proc/{worker}").st_uid != 0
        for path in open_files:
            assert path.startswith((str(folder), "/dev/", "socket:", "anon_inode:", "pipe:")), path
    assert {path.name for path in folder.iterdir()} == {"nginx.conf", "temporary", "error.log", "refused.log"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["starter", "watchdog", "master", "worker"])
def test_nginx_ends_whichever_of_its_processes_is_killed(
    federation: Federation, superlink: SuperLink, tmp_path: Path, victim: str
) -> None:
    number, folder = outside.free_port(), tmp_path / "nginx"
    program = (
        "import sys, time; from pathlib import Path; from fedferret.sites.credentials import read_server\n"
        "from fedferret.sites.proxy import Proxy\n"
        "with Proxy(Path(sys.argv[1]), read_server(Path(sys.argv[2])), sys.argv[3], sys.argv[4]):\n"
        "    print('up', flush=True); time.sleep(600)\n"
    )
    arguments = [folder, federation.authority.folder, f"127.0.0.1:{number}", f"127.0.0.1:{superlink.port}"]
    starter = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    everyone: list[int] = []
    try:
        assert starter.stdout.readline() == b"up\n"
        (watchdog,) = children(starter.pid)
        master, worker = master_and_worker(folder, federation, number)
        everyone = [watchdog, master, worker]
        os.kill(
            {"starter": starter.pid, "watchdog": watchdog, "master": master, "worker": worker}[victim], signal.SIGKILL
        )
        if victim == "worker":  # the master starts another
            wait_until(lambda: children(master) not in ([], [worker]))
            assert call(number, federation.ca, federation.pairs["ward-7"], PULL)[0] == 200
            starter.kill()
        wait_until(lambda: not any(alive(process) for process in everyone))
        socket.create_server(("127.0.0.1", number)).close()  # the port is free again
    finally:
        for process in [starter.pid, *everyone]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        starter.wait()
        starter.stdout.close()


def test_a_port_that_another_process_has_is_one_line(federation: Federation, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with (
            pytest.raises(RunError, match=rf"127\.0\.0\.1:{number}.*Address already in use"),
            Proxy(tmp_path / "nginx", federation.server, f"127.0.0.1:{number}", "127.0.0.1:1"),
        ):
            pass


def master_and_worker(folder: Path, federation: Federation, port: int) -> tuple[int, int]:
    """nginx's two processes, once the worker has responded to a call.

    The master opens the port: it takes connections before there is a worker, and before the worker changes its user.
    """
    assert call(port, federation.ca, federation.pairs["ward-7"], PULL)[0] == 200
    master = int((folder / "nginx.pid").read_text())
    (worker,) = children(master)
    return master, worker


def children(process: int) -> list[int]:
    words = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in words.split()]


def alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

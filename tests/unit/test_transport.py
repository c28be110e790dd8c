"""Messages on a local socket: whole or an error, within a limit and a time, and readable only by their owner."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedferret.core.errors import UserError
from fedferret.core.exchanges import Train
from fedferret.engines.relay import FrameError, address, call, receive, send
from fedferret.engines.transport import Request
from fedferret.resident.process import listen, take
from fedferret.wire import codec

REQUEST = Request("r" * 64, 0, 1, "t", "a", "", "b", 0, "f", b"", (b"one", b"two"), 0, 0, False, b"", Train(1), 7)


@contextmanager
def answering(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """One connection at ``path``, served in a thread."""
    listener = listen(path.parent)

    def accept() -> None:
        connection, _ = listener.accept()
        with connection:
            serve(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    with listener:
        yield
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 21) + 7])
def test_a_message_comes_back_as_it_was_sent(size: int, tmp_path: Path) -> None:
    message = os.urandom(size)
    with answering(tmp_path / "trainer.sock", lambda connection: send(connection, receive(connection)[::-1])):
        assert call(tmp_path / "trainer.sock", message, 30) == message[::-1]


def test_a_frame_is_its_length_and_its_bytes(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right:
        send(left, b"abc")
        assert right.recv(100) == bytes(7) + b"\x03abc"


def test_an_empty_frame_ends_with_its_header() -> None:
    left, right = socket.socketpair()

    class Impatient:
        """The reader closes the connection as soon as it has a whole frame."""

        def sendall(self, content: bytes) -> None:
            left.sendall(content)
            assert receive(right) == b""
            right.close()

    with left, right:
        send(Impatient(), b"")  # type: ignore[arg-type]


def test_a_frame_with_a_false_length_is_refused_before_memory_is_allocated() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">Q", 1 << 60))
        with pytest.raises(FrameError, match="a frame of 1,152,921,504,606,846,976 bytes was announced"):
            receive(right)


def test_a_frame_that_breaks_off_is_an_error() -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(struct.pack(">Q", 10) + b"abc")
        with pytest.raises(FrameError, match="after 3 of 10 bytes"):
            receive(right)


def test_a_slow_trainer_ends_in_a_timeout(tmp_path: Path) -> None:
    over = threading.Event()

    def trickle(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(struct.pack(">Q", 1 << 20))
        while not over.wait(0.02):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    with answering(tmp_path / "trainer.sock", trickle):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            call(tmp_path / "trainer.sock", b"message", 0.3)
        over.set()
        assert 0.2 < time.monotonic() - started < 20


def test_a_missing_socket_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        call(tmp_path / "trainer.sock", b"message", 30)


def test_a_folder_of_any_length_holds_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    with answering(folder / "trainer.sock", lambda connection: send(connection, receive(connection))):
        assert call(folder / "trainer.sock", b"message", 30) == b"message"
    with address(folder / "trainer.sock") as name:
        assert len(name) < 100


def test_only_the_owner_reaches_the_socket_and_a_folder_has_one_resident(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    with take(folder), listen(folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "trainer.sock").stat().st_mode) == 0o600
        with pytest.raises(UserError, match="a trainer is at work there already"):
            take(folder)
    take(folder).close()


def test_the_relay_imports_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import fedferret.engines.relay;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["fedferret"]


def test_a_sites_supervisor_imports_neither_torch_nor_flower() -> None:
    pytest.importorskip("cryptography")
    program = (
        "import sys; from fedferret.cli import _site_commands; _site_commands(); import fedferret.sites.join; "
        "print([name for name in ('torch', 'transformers', 'flwr') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]", "it runs on a hospital's machine for weeks, in 41 MB instead of 320"


def test_messages_survive_the_codec() -> None:
    assert codec.decode(codec.encode(REQUEST)) == REQUEST

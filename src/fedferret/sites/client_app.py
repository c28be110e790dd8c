"""The process that runs as a site's ClientApp: it takes tasks from the site's SuperNode and runs the relay.

    task  ->  is its run package the one that this fedferret makes?  no: reply with an error in words
                                                                     yes: reply with flower_relay.app(message)

A task is failed when its message does not come and the next task is there (``Task``).

Flower would start one process per message, which unpacks the server's run package and imports the modules that the
package names. This process only hashes the package: the code that runs is the code installed at the site. Only this
process has the secret that the SuperNode requires for tasks. Follows `flwr/supernode/runtime/run_clientapp.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedferret import __version__
from fedferret.engines.flower_relay import app
from fedferret.sites.flower_process import LOOPBACK, quiet_flower
from fedferret.sites.package import fingerprint, run_package
from fedferret.sites.runtime import authorised, client_of_task

POLL = 0.2  # seconds between two polls for a task; a poll costs the SuperNode about a millisecond


def serve(address: str, secret: bytes, package: str, log: Callable[[str], None]) -> None:
    """Carry out one task after the other, without end; wait for a SuperNode that cannot be reached.

    Args:
        address: of the SuperNode, HOST:PORT.
        secret: what the SuperNode requires for tasks.
        package: SHA-256 of the run package to accept, hexadecimal.
        log: called with one line for each new error.
    """
    trouble = ""
    with closing(authorised(address, secret)) as client:
        tasks = Tasks(client)
        while True:
            try:
                token = tasks.take()
                trouble = ""
                if token:
                    with closing(client_of_task(address, token)) as own:
                        carry_out(Task(own, tasks), package, log)
                    continue
            except (httpx.HTTPError, RuntimeError) as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log(f"{type(error).__name__}: {error}")
            time.sleep(POLL)


class Tasks:
    """The SuperNode's queue of tasks; each task is returned once."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._ahead, self._lock = client, "", threading.Lock()

    def take(self) -> str:
        """Return the token of the next task; "" if there is none."""
        with self._lock:
            token, self._ahead = self._ahead or self._acquire(), ""
            return token

    def waiting(self) -> bool:
        """Return whether there is a next task; ``take`` then returns this task."""
        with self._lock:
            self._ahead = self._ahead or self._acquire()
            return bool(self._ahead)

    def _acquire(self) -> str:
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        return str(self._client.AcquireTask(request).token)


class Superseded(RuntimeError):
    """The SuperNode has the next message: the message of this task will not come."""


class Task:
    """A task's client that stops waiting for a message once the next task is there.

    A SuperNode handles one message at a time. It creates a task a moment before the task's message arrives, so a fast
    client finds no message. If a run ends while a message is in transit, Flower 1.41 drops the message and keeps the
    task; Flower's client would wait two hours for the content.
    """

    def __init__(self, client: RuntimeHttpClient, tasks: Tasks) -> None:
        """Create the client of one task.

        Args:
            client: with the task's token.
            tasks: the SuperNode's queue.
        """
        self._client, self._tasks = client, tasks

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        """Wait for the task's message and return it.

        Raises:
            Superseded: if the message is not there but the next task is.
        """
        while not (response := self._client.PullMessages(request)).messages_list:
            self._check_next()
            time.sleep(POLL)
        return response

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        """Return a part of the message.

        Raises:
            Superseded: if the part is not there but the next task is.
        """
        response = self._client.PullObject(request)
        if response.object_found and not response.object_available:
            self._check_next()
        return response

    def _check_next(self) -> None:
        if self._tasks.waiting():
            raise Superseded("a message was dropped in transit because its run ended; the next message is here")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def carry_out(client: Any, package: str, log: Callable[[str], None]) -> None:
    """Carry out one task, from its message to its reply.

    Args:
        client: a RuntimeHttpClient, or a Task around one.
        package: SHA-256 of the run package to accept, hexadecimal.
        log: called with one line for an error.
    Raises:
        Superseded: if the task's message did not come; the task is then reported as failed.
    """
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    status, details = SubStatus.COMPLETED, ""
    try:
        message, context, _, fab = pull_task_input(client)
        given = fingerprint(fab.content)
        if given != package:
            details = refusal(given, package)
            reply = Message(Error(ErrorCode.INVALID_FAB, details), reply_to=message)
        else:
            try:
                reply = app(message=message, context=context)
            except (OSError, ValueError) as error:
                details = f"the site's trainer gave no reply: {error}"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, details), reply_to=message)
        if details:
            status = SubStatus.FAILED
            log(details)
        push_message(client, reply, context)
        push_task_output(client, context, status, details)
    except Superseded as error:
        # A task without heartbeats gets an error reply from Flower after a minute. The SuperNode takes that reply for
        # the reply to its current message, and every later reply for the reply to the message after: one message late.
        push_task_output(client, None, SubStatus.FAILED, str(error))
        raise
    finally:
        if heartbeat.is_running:
            heartbeat.stop()


def refusal(given: str, expected: str) -> str:
    """Return why a run package is refused, for the operators of both ends.

    Args:
        given: SHA-256 of the server's run package, hexadecimal.
        expected: SHA-256 of the run package that this fedferret makes.
    """
    return (
        f"refused: the server's run package has SHA-256 {given[:12]}…; this site, with fedferret {__version__}, "
        f"accepts only {expected[:12]}…; install the server's version here"
    )


def start() -> None:
    """Run `python -m fedferret.sites client_app --port PORT --secret FILE [--package SHA256]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--secret", type=Path, required=True)
    parser.add_argument("--package", default=fingerprint(run_package()))
    given = parser.parse_args()
    with quiet_flower():
        serve(f"{LOOPBACK}:{given.port}", given.secret.read_bytes(), given.package, _log)


def _log(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {line}", file=sys.stderr, flush=True)

"""The process that plays the ClientApp of a site: it takes tasks from the SuperNode beside it and runs the relay.

    task  ->  its run package is the one this fedferret makes?  no: an error goes back in words
                                                               yes: flower_relay.app(message)  ->  its reply

A task whose message never comes is left for the next one, and the SuperNode is told so (``Task``).

It stands where Flower would start a process per message that unpacks the server's package and imports what that
names. Here a package is hashed and otherwise left alone: which code runs is for the site's own installation to say.
Only this process knows the secret that the SuperNode gives tasks for. As in `flwr/supernode/runtime/run_clientapp.py`.
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

POLL = 0.2  # seconds between two looks for a task; a look costs the SuperNode about a millisecond


def serve(address: str, secret: bytes, package: str, log: Callable[[str], None]) -> None:
    """Carry out one task after the other, for ever. A SuperNode that is away is waited for."""
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
    """The SuperNode's tasks; each is given to this process once."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._ahead, self._lock = client, "", threading.Lock()

    def take(self) -> str:
        """The token of the next task; "" while there is none."""
        with self._lock:
            token, self._ahead = self._ahead or self._acquire(), ""
            return token

    def waiting(self) -> bool:
        """Whether there is a next task already, which ``take`` will then give."""
        with self._lock:
            self._ahead = self._ahead or self._acquire()
            return bool(self._ahead)

    def _acquire(self) -> str:
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        return str(self._client.AcquireTask(request).token)


class Superseded(RuntimeError):
    """The SuperNode is at the next message: what this task still waits for will not come."""


class Task:
    """A task's client that waits no longer than there is something to wait for.

    A SuperNode is at one message at a time. It makes a message's task a moment before it has the message itself, so
    that one who is quick finds none. Where a run ends while a message of it is on the way, Flower 1.41 drops the
    message and keeps its task, whose content it would have waited for during two hours.
    """

    def __init__(self, client: RuntimeHttpClient, tasks: Tasks) -> None:
        self._client, self._tasks = client, tasks

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        """The message, once it is there. Raises Superseded where it is not there and the next task is."""
        while not (response := self._client.PullMessages(request)).messages_list:
            self._check_next()
            time.sleep(POLL)
        return response

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        """A part of the message. Raises Superseded where it is not there and the next task is."""
        response = self._client.PullObject(request)
        if response.object_found and not response.object_available:
            self._check_next()
        return response

    def _check_next(self) -> None:
        if self._tasks.waiting():
            raise Superseded("a letter was dropped on its way, its run had ended; the next one is here")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def carry_out(client: Any, package: str, log: Callable[[str], None]) -> None:
    """One task, from its message to its reply; ``client``: a RuntimeHttpClient or a Task around it."""
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
        # a task that just fell silent would be answered by Flower itself a minute later, with an error that the
        # SuperNode takes for the answer to its present message, and with that one's for the next: each a message late
        push_task_output(client, None, SubStatus.FAILED, str(error))
        raise
    finally:
        if heartbeat.is_running:
            heartbeat.stop()


def refusal(given: str, expected: str) -> str:
    """Why a run package is refused, for the operators of both ends."""
    return (
        f"refused: the server's run package has SHA-256 {given[:12]}…, and this site, with fedferret {__version__}, "
        f"takes {expected[:12]}… alone; install the server's version here"
    )


def main() -> None:
    """`python -m fedferret.sites.client_app --port PORT --secret FILE [--package SHA256]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--secret", type=Path, required=True)
    parser.add_argument("--package", default=fingerprint(run_package()))
    given = parser.parse_args()
    with quiet_flower():
        serve(f"{LOOPBACK}:{given.port}", given.secret.read_bytes(), given.package, _log)


def _log(line: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

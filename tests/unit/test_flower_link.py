"""Calls to the SuperLink: bounded in time, and what fails says whether the call ended or the SuperLink."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

import httpx
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.run import RunNotRunningException

from fedferret.engines.flower import SENDINGS, Roster
from fedferret.engines.flower_link import PATIENCE, Announced, Link, LinkError, Unavailable
from fedferret.engines.flower_records import content_of

pytestmark = pytest.mark.usefixtures("task_identity")


def link(pull_object: Any) -> tuple[Link, Any]:
    """A link to a SuperLink that does this when an object is asked for."""
    client = SimpleNamespace(_client=SimpleNamespace(timeout=None), PullObject=pull_object)
    retries = SimpleNamespace(max_time=None)
    grid = SimpleNamespace(_runtime_client=client, _retry_invoker=retries, node=Node(), run=SimpleNamespace(run_id=1))
    return Link(grid), grid  # type: ignore[arg-type]


def raising(error: Exception) -> Any:
    def call(request: Any) -> Any:
        raise error

    return call


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(code, request=request))


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 0.3, 4.0, 20.0, 1000.0])
def test_a_call_takes_about_as_long_as_its_caller_has_left(seconds: float) -> None:
    made, grid = link(lambda request: PullObjectResponse(object_found=True, object_available=True, object_content=b"x"))
    assert made.fetch("id", seconds) == b"x"
    timeout, retries = grid._runtime_client._client.timeout, grid._retry_invoker.max_time
    assert 0 < timeout <= PATIENCE and timeout + retries <= max(2.0, seconds)


@pytest.mark.parametrize(
    ("error", "seconds", "raised"),
    [
        (status(500), 60.0, LinkError),
        (status(413), 60.0, LinkError),
        (ValueError("cannot be parsed"), 60.0, LinkError),
        (httpx.ReadTimeout("the caller's time is over"), 10.0, LinkError),
        (httpx.ReadTimeout("a SuperLink that hangs"), 100.0, httpx.ReadTimeout),
        (httpx.ConnectError("the SuperLink ended"), 1.0, httpx.ConnectError),
        (status(401), 60.0, httpx.HTTPStatusError),
        (RunNotRunningException(), 60.0, RunNotRunningException),
    ],
)
def test_an_error_is_of_the_call_or_of_the_superlink(error: Exception, seconds: float, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        link(raising(error))[0].fetch("id", seconds)


def test_an_object_is_there_not_yet_or_never() -> None:
    with pytest.raises(Unavailable):
        link(lambda request: PullObjectResponse(object_found=True))[0].fetch("id", 1.0)
    with pytest.raises(LinkError, match="missing"):
        link(lambda request: PullObjectResponse())[0].fetch("id", 1.0)


@pytest.mark.parametrize("content", [b"", b"\xff" * 1_000_000, b"Message  0\0"])
def test_a_node_that_gives_no_name_of_an_approved_site_is_asked_a_few_times_and_is_no_site(content: bytes) -> None:
    class Nameless:
        pushed = 0
        told: tuple[bytes | None, ...] = ()

        def nodes(self, seconds: float) -> list[Any]:
            return [SimpleNamespace(node_id=7, name="", registered_at="")]

        def push(self, message: Any, seconds: float) -> str:
            self.pushed += 1
            self.told += (content_of(message)[0],)
            return f"message {self.pushed}"

        def announced(self, message: str, seconds: float) -> list[Announced]:
            return [Announced("root", message)]

        def fetch(self, identifier: str, seconds: float) -> bytes:
            return content

        def discard(self, root: str, seconds: float) -> None:
            pass

    known = Nameless()
    roster = Roster(known, ["ward-1"], asks=True)  # type: ignore[arg-type]
    assert [roster() for _ in range(2 * SENDINGS)] == [{}] * 2 * SENDINGS
    assert known.pushed == SENDINGS
    assert known.told[0] is None and all(b"not on this run's list of sites" in (said or b"") for said in known.told[1:])

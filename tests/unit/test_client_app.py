"""A site's relay and its SuperNode: tasks in, replies out, and a message that never comes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.common.serde import context_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate as corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.supernode.servicer.runtime import runtime_handlers as handlers

from fedferret.engines.flower_records import content_of, records_of
from fedferret.sites import client_app
from fedferret.sites.client_app import Superseded, Task, Tasks, carry_out
from fedferret.sites.package import fingerprint, run_package

pytestmark = pytest.mark.usefixtures("task_identity")


class SuperNode:
    """Gives out tasks in turn; ``arrived``: whether the message's content came before the run ended."""

    def __init__(self, tokens: list[str], arrived: bool) -> None:
        self.tokens, self.arrived = tokens, arrived
        self.pushed: list[Any] = []
        message = Message(records_of(b"a request"), 7, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        self.tree: ObjectTree = get_object_tree(message)
        self.parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}

    def AcquireTask(self, request: Any) -> Any:
        return SimpleNamespace(token=self.tokens.pop(0) if self.tokens else "")

    def SendTaskHeartbeat(self, request: Any) -> Any:
        return SimpleNamespace(success=True)

    def PullTaskInput(self, request: Any) -> PullTaskInputResponse:
        context = Context(1, 7, {}, RecordDict(), {})
        fab = Fab(hash_str=fingerprint(run_package()), content=run_package())
        return PullTaskInputResponse(context=context_to_proto(context), run=run_to_proto(Run.create_empty(1)), fab=fab)

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        from flwr.proto.message_pb2 import Message as Sent

        return PullAppMessagesResponse(messages_list=[Sent()], message_object_trees=[self.tree])

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self.parts[request.object_id] if self.arrived else b""
        return PullObjectResponse(object_found=True, object_available=self.arrived, object_content=content)

    def __getattr__(self, name: str) -> Any:
        def take(request: Any) -> Any:
            self.pushed.append((name, request))
            return SimpleNamespace(objects_to_push=[], session_id="")

        return take


def test_a_task_without_a_message_fails_when_the_next_task_is_there() -> None:
    node = SuperNode(["next"], arrived=False)
    tasks = Tasks(node)  # type: ignore[arg-type]  # has the methods that are used
    with pytest.raises(Superseded):
        carry_out(Task(node, tasks), fingerprint(run_package()), print)  # type: ignore[arg-type]
    assert tasks.take() == "next" and tasks.take() == "", "the next task is returned, and once"


def test_a_message_that_is_only_late_is_waited_for() -> None:
    node = SuperNode([], arrived=False)
    task = Task(node, Tasks(node))  # type: ignore[arg-type]
    assert not task.PullObject(PullObjectRequest(object_id=node.tree.object_id)).object_available
    node.arrived = True
    assert task.PullObject(PullObjectRequest(object_id=node.tree.object_id)).object_available


def test_a_message_that_came_gets_its_reply_even_when_the_next_task_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def reply(message: Message, context: Context) -> Message:
        received.append(content_of(message)[0])
        return Message(records_of(b"a response"), reply_to=message)

    monkeypatch.setattr(client_app, "app", reply)
    node = SuperNode(["next"], arrived=True)
    tasks = Tasks(node)  # type: ignore[arg-type]
    carry_out(Task(node, tasks), fingerprint(run_package()), print)  # type: ignore[arg-type]
    assert received == [b"a request"] and tasks.take() == "next"
    assert "PushMessages" in [name for name, _ in node.pushed]


def test_another_run_package_is_refused_and_the_trainer_sees_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(client_app, "app", lambda message, context: asked.append(message))
    node, lines = SuperNode(["next"], arrived=True), list[str]()
    carry_out(Task(node, Tasks(node)), "0" * 64, lines.append)  # type: ignore[arg-type]
    (line,) = lines
    assert line.startswith("refused: the server's run package has SHA-256 ") and not asked
    (sent,) = [request for name, request in node.pushed if name == "PushMessages"]
    assert sent.messages_list[0].error.reason == line


class RealNode:
    """Flower's state of a SuperNode's messages and tasks, for one relay; ``arrive`` does what its main loop does."""

    def __init__(self) -> None:
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supernode.nodestate import NodeStateFactory

        self.state: Any = NodeStateFactory(ObjectStoreFactory()).state()
        self.state.set_node_id(7)
        self.token = ""
        self.searched = lambda: None  # called while the relay polls for its message

    def make_task(self, run: int) -> None:
        """Create the task of a message of this run."""
        fab = Fab(hash_str=fingerprint(run_package()), content=run_package())
        known = replace(Run.create_empty(run), fab_hash=fab.hash_str, series_id=run)
        self.state.set_run_series_context(run, Context(run, 7, {}, RecordDict(), {}))
        self.state.store_run(known)
        self.state.store_fab(SimpleNamespace(hash_str=fab.hash_str, content=fab.content, verifications={}))
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=run, fab_hash=fab.hash_str)

    def arrive(self, run: int, *, whole: bool) -> Message:
        """Store the message; unless ``whole``, its run ends before its content came."""
        message = Message(records_of(b"a request of run %d" % run), 7, "train")
        message.metadata.__dict__["_run_id"] = run
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.object_store.preregister(run, get_object_tree(message))
        self.state.store_message(message)
        for name, part in get_all_nested_objects(message).items() if whole else ():
            self.state.object_store.put(name, part.deflate())
        return message

    def replied(self) -> list[str]:
        """Ids of the messages with a new reply since the last call, as the SuperNode's main loop finds them."""
        return [reply.metadata.reply_to_message_id for reply in self.state.get_messages_legacy(is_reply=True)]

    def AcquireTask(self, request: Any) -> Any:
        return core_handlers.acquire_task(request, self.state)

    def SendTaskHeartbeat(self, request: Any) -> Any:
        return SimpleNamespace(success=True)

    def PullMessages(self, request: Any) -> Any:
        response = self._of_task(handlers.pull_messages, request)
        self.searched()
        return response

    def __getattr__(self, name: str) -> Any:
        handler = "".join(f"_{each.lower()}" if each.isupper() else each for each in name).lstrip("_")
        return partial(self._of_task, getattr(handlers, handler))

    def _of_task(self, handler: Any, request: Any) -> Any:
        return handler(request, self.state, self.state.get_task_by_token(self.token))

    def relay(self, tasks: Tasks) -> None:
        """Let the relay take a task and carry it out."""
        self.token = tasks.take()
        carry_out(Task(self, tasks), fingerprint(run_package()), print)  # type: ignore[arg-type]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> RealNode:
    monkeypatch.setattr(
        client_app, "app", lambda message, context: Message(records_of(b"a response"), reply_to=message)
    )
    return RealNode()


def test_a_task_that_is_there_before_its_message_gets_its_reply(real: RealNode) -> None:
    sent: list[Message] = []
    real.make_task(1)
    real.searched = lambda: None if sent else sent.append(real.arrive(1, whole=True))
    real.relay(Tasks(real))  # type: ignore[arg-type]
    assert real.replied() == [sent[0].metadata.message_id]


def test_a_dropped_message_never_gets_the_reply_of_another(real: RealNode, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks(real)  # type: ignore[arg-type]
    real.make_task(1)
    real.arrive(1, whole=False)
    real.make_task(2)
    second = real.arrive(2, whole=True)
    with pytest.raises(Superseded):
        real.relay(tasks)
    real.relay(tasks)
    assert real.replied() == [second.metadata.message_id]
    later = corestate.now() + timedelta(seconds=2 * HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)
    monkeypatch.setattr(corestate, "now", lambda: later)
    assert real.replied() == [], "Flower ends a task without heartbeats, and replies with an error"

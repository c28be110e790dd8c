"""A site's relay and the SuperNode beside it: tasks in, replies out, and a message that never comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import context_to_proto, run_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

from fedferret.engines.flower import enclosed, opened
from fedferret.sites import client_app
from fedferret.sites.client_app import Superseded, Task, Tasks, carry_out
from fedferret.sites.package import fingerprint, run_package

pytestmark = pytest.mark.usefixtures("task_identity")


class SuperNode:
    """Hands out tasks in turn; ``arrived`` says whether the message's content came before the run ended."""

    def __init__(self, tokens: list[str], arrived: bool) -> None:
        self.tokens, self.arrived = tokens, arrived
        self.pushed: list[Any] = []
        message = Message(enclosed(b"a letter"), 7, "train")
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


def test_a_message_that_never_comes_is_left_when_the_next_one_is_there() -> None:
    node = SuperNode(["next"], arrived=False)
    tasks = Tasks(node)  # type: ignore[arg-type]  # what is used of a client
    with pytest.raises(Superseded):
        carry_out(Task(node, tasks), fingerprint(run_package()), print)  # type: ignore[arg-type]
    assert tasks.take() == "next" and tasks.take() == "", "the next task is given, and once"


def test_a_message_that_is_only_late_is_waited_for() -> None:
    node = SuperNode([], arrived=False)
    task = Task(node, Tasks(node))  # type: ignore[arg-type]
    assert not task.PullObject(PullObjectRequest(object_id=node.tree.object_id)).object_available
    node.arrived = True
    assert task.PullObject(PullObjectRequest(object_id=node.tree.object_id)).object_available


def test_a_message_that_came_is_answered_even_when_the_next_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def answer(message: Message, context: Context) -> Message:
        heard.append(opened(message)[0])
        return Message(enclosed(b"an answer"), reply_to=message)

    monkeypatch.setattr(client_app, "app", answer)
    node = SuperNode(["next"], arrived=True)
    tasks = Tasks(node)  # type: ignore[arg-type]
    carry_out(Task(node, tasks), fingerprint(run_package()), print)  # type: ignore[arg-type]
    assert heard == [b"a letter"] and tasks.take() == "next"
    assert "PushMessages" in [name for name, _ in node.pushed]

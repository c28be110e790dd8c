"""A certified site that speaks Flower's fleet API itself, and replies with whatever objects it likes."""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedferret.engines.transport import SERVER, Request
from fedferret.sites.credentials import SiteCredentials
from fedferret.sites.signing import SiteSeal
from fedferret.wire import codec

SUPERLINK = 1  # node id


@dataclass(frozen=True)
class Object:
    """An object of a reply; ``withheld`` ones are announced and never uploaded."""

    kind: str
    body: bytes = b""
    children: tuple[Object, ...] = ()
    withheld: bool = False

    @property
    def content(self) -> bytes:
        head = f"{self.kind} {','.join(child.name for child in self.children)} {len(self.body)}"
        return head.encode() + b"\0" + self.body

    @property
    def name(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def tree(self) -> ObjectTree:
        return ObjectTree(object_id=self.name, children=[child.tree for child in self.children])

    def all(self) -> dict[str, Object]:
        found = {self.name: self}
        for child in self.children:
            found |= child.all()
        return found


def honest(content: bytes) -> Object:
    """The objects that a site's Flower makes of a message of ours."""
    record = ConfigRecord()
    item = record.items.add(key="message")
    item.value.bytes = content
    last = Object("ConfigRecord", record.SerializeToString())
    middle = Object("RecordDict", f'{{"message": "{last.name}"}}'.encode(), (last,))
    return Object("Message", b"", (middle,))


Attack = Callable[[Request, SiteSeal], Object]


class HostileSite:
    """A node with the site's certificate and keys; it replies in a thread until it is closed."""

    def __init__(self, port: int, credentials: SiteCredentials, folder: Path, attack: Attack) -> None:
        """``attack`` makes the reply to each request, with the site's seal; ``folder`` is for what the seal keeps."""
        self.name, self._attack, self._port, self._credentials = credentials.name, attack, port, credentials
        folder.mkdir()
        self._seal = SiteSeal(credentials, folder)
        self.asked: list[Request] = []
        self.trouble = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(60)

    def _serve(self) -> None:
        private = load_ssh_private_key(self._credentials.node_key.read_bytes(), None)
        assert isinstance(private, EllipticCurvePrivateKey)
        public = private.public_key()
        proofs = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, public)]
        tls = ssl.create_default_context(cafile=self._credentials.authority)
        tls.load_cert_chain(self._credentials.certificate, self._credentials.key)
        with FleetHttpClient(f"https://127.0.0.1:{self._port}", interceptors=proofs, verify=tls) as client:
            key, node = public_key_to_bytes(public), None
            while not self._over.wait(0.7):
                try:
                    if node is None:
                        activate = ActivateNodeRequest(public_key=key, heartbeat_interval=1800)
                        node = Node(node_id=client.ActivateNode(activate).node_id)
                    pulled = client.PullMessages(PullMessagesRequest(node=node))
                    for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                        self._reply(client, node, message, tree)
                except httpx.HTTPError as error:  # the server is starting, or starts again
                    self.trouble = str(error)

    def _reply(self, client: Any, node: Node, message: Any, tree: ObjectTree) -> None:
        asked = message.metadata
        if asked.message_type.startswith("query"):
            root = honest(self.name.encode())
        else:
            root = self._attack(self._request(client, node, asked.run_id, tree), self._seal)
        proto = MessageProto()
        proto.metadata.CopyFrom(asked)
        proto.metadata.message_id, proto.metadata.reply_to_message_id = root.name, asked.message_id
        proto.metadata.src_node_id, proto.metadata.dst_node_id = node.node_id, SUPERLINK
        proto.metadata.created_at, proto.metadata.ttl = time.time(), 5.0
        proto.content.SetInParent()
        pushed = client.PushMessages(
            PushMessagesRequest(node=node, messages_list=[proto], message_object_trees=[root.tree])
        )
        objects: Mapping[str, Object] = root.all()
        for name in pushed.objects_to_push:
            if not objects[name].withheld:
                client.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=asked.run_id,
                        object_id=name,
                        object_content=objects[name].content,
                        session_id=pushed.session_id,
                    )
                )

    def _request(self, client: Any, node: Node, run: int, tree: ObjectTree) -> Request:
        """The server's request, from the last object of the three."""
        name = next(iter(iterate_object_tree(tree))).object_id
        while True:
            pulled = client.PullObject(PullObjectRequest(node=node, run_id=run, object_id=name))
            if pulled.object_available:
                break
            time.sleep(0.1)
        record = ConfigRecord.FromString(pulled.object_content.split(b"\0", 1)[1])
        request = codec.decode(self._seal.open(SERVER, record.items[0].value.bytes))
        assert isinstance(request, Request)
        self.asked.append(request)
        return request

"""What Ferret's nodes remember and send; the algorithm is in ``ferret.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from fedferret.bases.blocks import decode_norms, encode_norms
from fedferret.bases.coding import Code, Coding
from fedferret.core import tree
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree
from fedferret.local.first_order import Trained


@state
class FerretPublic:
    """Weights, the server's momentum, and what the next round's directions and allocation follow from."""

    weights: Tree
    momentum: Tree  # empty without momentum
    norms: Annotated[
        Tensor, Form(torch.uint8, rank=1)
    ]  # (L,), of the last entry's blocks: the next allocation follows from them
    round: int
    seed: int  # of the directions


@state
class FerretServer:
    """Rounds done, for the schedule."""

    round: int


@state
class FerretClient:
    """What a client's coordinates have not carried so far (error feedback)."""

    residual: Tree


@message
class DecodedCoordinates:
    """Coordinates (K,) and block norms (L,), both fp32: the form that adds up."""

    coordinates: Annotated[Tensor, Form(rank=1)]  # under a mask int64
    norms: Annotated[Tensor, Form(rank=1)]


@message
class SharedReply(Payload[DecodedCoordinates]):
    """Coordinates on the round's shared directions."""

    coordinates: Code
    norms: Annotated[Tensor, Form(torch.uint8, rank=1)]  # (L,)

    @cached_property
    def unpacked(self) -> Tensor:
        """The coordinates, fp32, shape (K,), not to be changed; decoded once for the norm and for the pool."""
        return self.coordinates.unpack()

    def decoded(self) -> DecodedCoordinates:
        """The values behind the codes."""
        return DecodedCoordinates(self.unpacked, torch.tensor(decode_norms(self.norms)))

    def encoded(self, sum: DecodedCoordinates, key: Key) -> SharedReply:
        """Other coordinates in the same code."""
        code = Coding.of(self.coordinates).encode(sum.coordinates, key)
        return SharedReply(code, encode_norms(sum.norms.tolist()))


@message
class KeyedReply(Payload["KeyedReply"]):
    """Coordinates on directions that the client drew; kept apart, as they came."""

    coordinates: Code
    norms: Annotated[Tensor, Form(torch.uint8, rank=1)]  # (L,); this client's allocation follows from them
    key: int

    @property
    def unpacked(self) -> Tensor:
        """The coordinates, fp32, shape (K,); not kept, since the pool keeps every client's reply."""
        return self.coordinates.unpack()


@message
class FerretEntry:
    """One reply for all (shared keys) or every client's, each with its share of the step."""

    replies: tuple[SharedReply | KeyedReply, ...]
    shares: tuple[float, ...]
    learning_rate: float


FerretReply: TypeAlias = SharedReply | KeyedReply


def update_of(public: FerretPublic, client: FerretClient | None, trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """What a client is to send: the update of its training, and the residual of earlier rounds.

    Args:
        public: with the weights that training began from.
        client: with the residual; None without error feedback.
        trained: the client's training, from those weights on.

    Returns:
        Pairs (name, update), fp32, one tensor at a time.
    """
    for name, delta in tree.difference(public.weights, trained.weights):
        yield name, delta if client is None else delta.add_(client.residual[name])


def check_reply(payload: FerretReply, expected: type, blocks: int) -> None:
    """Refuse, with a ValueError, a reply of another kind, an invalid key, or another number of norms.

    Args:
        payload: as it came.
        expected: SharedReply or KeyedReply.
        blocks: L.
    """
    if not isinstance(payload, expected):
        raise ValueError(f"a {type(payload).__name__} came: the client has other settings")
    if isinstance(payload, KeyedReply) and not (type(payload.key) is int and 0 <= payload.key < 2**64):
        raise ValueError(f"invalid key {payload.key!r}")
    if payload.norms.dtype != torch.uint8 or payload.norms.shape != (blocks,):
        found = f"{payload.norms.dtype} and shape {tuple(payload.norms.shape)}"
        raise ValueError(f"block norms of {found} came, {blocks} bytes were expected")

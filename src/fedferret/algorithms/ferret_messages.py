"""What Ferret's nodes remember and send; the algorithm is in ``ferret.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from fedferret.bases.blocks import decode_norms, encode_norms
from fedferret.bases.coding import Code, Coding
from fedferret.bases.top_one import TopOneCode
from fedferret.core import tree
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree
from fedferret.local.first_order import Trained

Norms: TypeAlias = Annotated[Tensor, Form(torch.uint8, rank=1)]  # (L,), codes of eight bits
SALTS = 1 << 20  # three bytes on the wire; two clients with one salt have the same directions, which harms nobody


@state
class FerretPublic:
    """Weights, the server's momentum, and what the next round's directions and allocation follow from."""

    weights: Tree
    momentum: Tree  # empty without momentum
    norms: Norms  # of the last entry with norms: allocations follow from them
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
    norms: Norms | None  # None in a round without

    @cached_property
    def unpacked(self) -> Tensor:
        """The coordinates, fp32, shape (K,), not to be changed; decoded once for the norm and for the pool."""
        return self.coordinates.unpack()

    def decoded(self) -> DecodedCoordinates:
        """The values behind the codes."""
        norms = [] if self.norms is None else decode_norms(self.norms)
        return DecodedCoordinates(self.unpacked, torch.tensor(norms))

    def encoded(self, sum: DecodedCoordinates, key: Key) -> SharedReply:
        """Other coordinates in the same code."""
        code = Coding.of(self.coordinates).encode(sum.coordinates, key)
        return SharedReply(code, None if self.norms is None else encode_norms(sum.norms.tolist()))


@message
class KeyedReply(Payload["KeyedReply"]):
    """Coordinates on directions of the client's own; kept apart, as they came."""

    coordinates: Code
    norms: Norms | None  # this client's allocation follows from them; None in a round without: from the public ones
    salt: int  # draws the directions, with the round's key


@message
class TopOneReply(Payload["TopOneReply"]):
    """The same in a top-1 code, without what follows from the recipe and the round."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    scale: float
    norms: Norms | None
    salt: int


@message
class FerretEntry:
    """One reply for all (shared keys) or every client's, each with its share of the step."""

    replies: tuple[SharedReply | KeyedReply | TopOneReply, ...]
    shares: tuple[float, ...]
    learning_rate: float


FerretReply: TypeAlias = SharedReply | KeyedReply | TopOneReply


def keyed(code: Code, norms: Tensor | None, salt: int) -> KeyedReply | TopOneReply:
    """Make a reply on a client's own directions.

    Args:
        code: of its coordinates; a top-1 code's seed follows from the salt.
        norms: ‖Δ_l‖ as codes, uint8, shape (L,); None in a round without.
        salt: that drew the directions.
    """
    if isinstance(code, TopOneCode):
        return TopOneReply(code.codes, code.scale, norms, salt)
    return KeyedReply(code, norms, salt)


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


def check_reply(payload: FerretReply, expected: type, blocks: int | None) -> None:
    """Refuse, with a ValueError, a reply of another kind, an invalid salt, or another number of norms.

    Args:
        payload: as it came.
        expected: the type of this run's replies.
        blocks: L; None in a round without norms.
    """
    if not isinstance(payload, expected):
        raise ValueError(f"a {type(payload).__name__} came: the client has other settings")
    assert isinstance(payload, SharedReply | KeyedReply | TopOneReply)
    if not isinstance(payload, SharedReply) and not (type(payload.salt) is int and 0 <= payload.salt < SALTS):
        raise ValueError(f"the salt {payload.salt!r} came: 0 to {SALTS - 1:,} can")
    norms = payload.norms
    if blocks is None:
        if norms is not None:
            raise ValueError("block norms came in a round without")
    elif not isinstance(norms, Tensor) or norms.dtype != torch.uint8 or norms.shape != (blocks,):
        found = f"{norms.dtype} and shape {tuple(norms.shape)}" if isinstance(norms, Tensor) else type(norms).__name__
        raise ValueError(f"block norms of {found} came, {blocks} bytes were expected")

"""Guards to prove the seam with: one that changes nothing, and a toy secure sum that survives a client lost half-way.

The toy is no protection: its numbers are tiny. Every pair of clients agrees on a seed by Diffie and Hellman's exchange
modulo a small prime; one of the pair adds the mask that follows from it, the other takes it off. Each client's exponent
is known to the others in shares (here: whole), so that the masks of a client that is lost after it sent its sum can be
taken off.

    advertise   g^a_i                  share   everybody's g^a_i; each sends a_i to the others, through the server
    train       the sum, in fixed point, plus masks, modulo M       unmask   shares of those who are missing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedferret.core.algorithm import Pooled
from fedferret.core.exchanges import Body, Masked
from fedferret.core.guard import TRAIN, Exchange, Guard, Randomness, Received, RoundSecret
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.pooling import mapped

MODULUS = 2**31 - 1
STEP = 2.0**-16  # of the fixed-point numbers
PRIME, BASE = 2_147_483_647, 5


class Identity(Guard):
    """Changes nothing."""


@message
class Advertise:
    round: int


@message
class Advertised:
    public: int


@message
class Share:
    round: int
    public: dict[str, int]  # everybody's


@message
class Shared:
    exponent: int  # for the others, should this client be lost


@message
class Unmask:
    round: int
    lost: tuple[str, ...]  # whose masks are to be taken off
    exponents: dict[str, int]  # their shares


@message
class Unmasked:
    seeds: dict[str, int]  # of the masks that this client shares with each of them


class AdvertiseKeys(Exchange):
    name: ClassVar[str] = "advertise"
    body = Advertise
    reply_type = Advertised

    def bodies(self, round: int, clients: Sequence[str], received: Received) -> Mapping[str, Body]:
        return {client: Advertise(round) for client in clients}

    def reply(self, body: Any, client: str, secret: RoundSecret, randomness: Randomness) -> tuple[Any, RoundSecret]:
        exponent = int.from_bytes(randomness(4), "big") % (PRIME - 2) + 1
        return Advertised(pow(BASE, exponent, PRIME)), RoundSecret(secret.round, {"exponent": exponent})


class ShareKeys(Exchange):
    name: ClassVar[str] = "share"
    body = Share
    reply_type = Shared

    def bodies(self, round: int, clients: Sequence[str], received: Received) -> Mapping[str, Body]:
        public = {client: received["advertise"][client].public for client in clients}
        return {client: Share(round, public) for client in clients}

    def reply(self, body: Any, client: str, secret: RoundSecret, randomness: Randomness) -> tuple[Any, RoundSecret]:
        return Shared(secret.values["exponent"]), RoundSecret(secret.round, {**secret.values, "public": body.public})


class UnmaskLost(Exchange):
    name: ClassVar[str] = "unmask"
    body = Unmask
    reply_type = Unmasked

    def bodies(self, round: int, clients: Sequence[str], received: Received) -> Mapping[str, Body]:
        lost = tuple(client for client in received["share"] if client not in clients)
        exponents = {client: received["share"][client].exponent for client in lost}
        return {client: Unmask(round, lost, exponents) for client in clients}

    def reply(self, body: Any, client: str, secret: RoundSecret, randomness: Randomness) -> tuple[Any, RoundSecret]:
        own = secret.values["public"][client]
        return Unmasked({lost: pow(own, exponent, PRIME) for lost, exponent in body.exponents.items()}), secret


class ToySecureSum(Guard):
    """The mean of the clients' sums, of which the server sees none."""

    before = (AdvertiseKeys(), ShareKeys())
    after = (UnmaskLost(),)
    modulus = MODULUS

    def on_client(self, sum: Any, client: str, secret: RoundSecret, randomness: Randomness) -> Any:
        exponent, public = secret.values["exponent"], secret.values["public"]
        seeds = {other: pow(value, exponent, PRIME) for other, value in public.items() if other != client}

        def masked(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            total = (x.double() / STEP).round().long() % MODULUS
            for other, seed in seeds.items():
                total = (total + sign(client, other) * mask(seed, x.shape)) % MODULUS
            return total

        return mapped(masked, sum)

    def on_server(self, pooled: Pooled[Any], answered: Sequence[str], received: Received) -> Pooled[Any]:
        assert set(received[TRAIN]) == set(answered)
        total: Masked = pooled.only

        def opened_up(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            for client in answered:  # the masks that it shares with those who sent no sum are left in the sum
                for lost, seed in received["unmask"][client].seeds.items():
                    x = (x - sign(client, lost) * mask(seed, x.shape)) % MODULUS
            signed = torch.where(x > MODULUS // 2, x - MODULUS, x)
            return (signed.double() * STEP / len(answered)).float()

        return Pooled((mapped(opened_up, total.sum),), pooled.weights)


def sign(client: str, other: str) -> int:
    """Which of a pair adds the mask, and which takes it off."""
    return 1 if client < other else -1


def mask(seed: int, shape: torch.Size) -> Tensor:
    """Integers below the modulus."""
    return (Key.of(seed, "mask").bits(shape.numel()) % MODULUS).view(shape)

"""When Ferret's block norms travel, and what is known of them in rounds in which they do not.

With norms in a reply, a client allocates its coordinates by its own. In other rounds every client allocates by the
public profile: the mean over the clients of the last round with norms of each block's share of a client's energy. A
client moves the profile by its share of the round, however large the norms that it states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fedferret.bases.blocks import decode_norms, encode_norms


def norms_travel(every: int, round: int) -> bool:
    """Whether replies of a round hold norms.

    Args:
        every: rounds from one with norms to the next; 0: the first alone.
        round: from 1.
    """
    return round == 1 if every == 0 else (round - 1) % every == 0


def mean_profile(norms: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of the clients' shares of energy, by block.

    Args:
        norms: ‖Δ_l‖ of every client as codes of eight bits, uint8, shape (L,).
        shares: of the clients in the round, summing to 1.

    Returns:
        √(mean share) by block, as codes, uint8, shape (L,): the same bits on every node.
    """
    clients = []
    for codes_L, share in zip(norms, shares, strict=True):
        energies = [norm * norm for norm in decode_norms(codes_L)]
        total = math.fsum(energies)
        clients.append([share * energy / total if total else 0.0 for energy in energies])
    return encode_norms([math.sqrt(math.fsum(block)) for block in zip(*clients, strict=True)])

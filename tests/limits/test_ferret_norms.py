"""Block norms that travel in some rounds alone, and what is left of a message then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.ferret_norms import mean_profile, norms_travel
from fedferret.bases.blocks import decode_norms, encode_norms
from fedferret.core.errors import UserError
from toys import TRAINING, simulate

BLOCKS = 4  # of the toy model
DEFAULT = Ferret(coordinates=40, server_learning_rate=0.2, training=TRAINING)


def test_a_run_that_ends_with_the_first_norms_is_one_that_has_them_every_round() -> None:
    """What norms_every does begins in the first round without."""
    every, once = simulate(DEFAULT, 1), simulate(replace(DEFAULT, norms_every=0), 1)
    assert every.public == once.public
    assert simulate(DEFAULT, 2).public != simulate(replace(DEFAULT, norms_every=0), 2).public


def test_framing_is_at_most_40_bytes_beside_norms_and_coordinates() -> None:
    """In the message that a client sends in nearly every round: what follows from recipe and round stays at home."""
    records = simulate(replace(DEFAULT, norms_every=2), 4).records
    for number, record in enumerate(records, start=1):
        norms = BLOCKS if number % 2 else 0
        assert record.bytes_up and all(up - 1 - norms <= 40 for up in record.bytes_up.values())  # 97 values: one byte


@pytest.mark.parametrize(
    ("every", "rounds"), [(1, [1, 2, 3, 4, 5, 6, 7]), (0, [1]), (3, [1, 4, 7]), (6, [1, 7])], ids=str
)
def test_norms_travel_in_the_first_round_and_every_so_many(every: int, rounds: list[int]) -> None:
    assert [number for number in range(1, 8) if norms_travel(every, number)] == rounds


def test_a_client_moves_the_profile_by_its_share_of_the_round_however_large_its_norms() -> None:
    honest, hostile = encode_norms([2.0, 2.0, 0.0]), encode_norms([0.0, 0.0, 1e7])
    profile = [norm**2 for norm in decode_norms(mean_profile([honest, honest, hostile], [0.4, 0.4, 0.2]))]
    assert profile == pytest.approx([0.4, 0.4, 0.2], rel=0.2)  # norms have eight bits
    assert torch.equal(mean_profile([encode_norms([0.0, 0.0])], [1.0]), encode_norms([0.0, 0.0]))


def test_a_number_of_rounds_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="norms_every=-1: must be at least 1, or 0 for the first round alone"):
        replace(DEFAULT, norms_every=-1)

"""SparseLoCo: where it is FedAvg, what travels of each chunk, and what waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.sparse_loco import SparseLoCo
from fedferret.bases.chunk_top_k import Chunks, chunk_positions
from fedferret.bases.signs import fit_two_magnitudes, two_magnitudes
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from toy_updates import flat, trained
from toys import SHAPES, TRAINING, simulate, toy_clients, toy_task

D = 97  # the toy model's weights
LOCO = SparseLoCo(values_per_chunk=3, chunk_size=16, training=TRAINING)
EXACT = replace(LOCO, bits=32)


@pytest.mark.parametrize("chunk_size", [4096, 16])
def test_with_whole_chunks_in_32_bits_it_is_fedavg_of_equal_clients_to_the_bit(chunk_size: int) -> None:
    whole = SparseLoCo(
        values_per_chunk=chunk_size, chunk_size=chunk_size, bits=32, residual_decay=1.0, training=TRAINING
    )
    assert simulate(whole, 4).public == simulate(FedAvg(weighting="equal", training=TRAINING), 4).public


def test_of_every_chunk_the_largest_travel_and_the_rest_fades_and_waits() -> None:
    task, data = toy_task(1), toy_clients()["b"]
    public, _ = EXACT.init(task, Key.of(1))
    chunks = EXACT._chunks(tree.sizes(public.weights).values())
    first = EXACT.client_update(task, public, EXACT.init_client(task, public, data, Key.of(1)), data, Key.of(2))
    second = EXACT.client_update(task, public, first.client, data, Key.of(2))
    waits, delta = torch.zeros(D), trained(data, Key.of(2))
    for reply in (first, second):
        wanted = delta + 0.95 * waits
        places, values = chunks.unpack(reply.payload.indices), reply.payload.values(chunks, 32)
        torch.testing.assert_close(values, wanted[places])
        start, expected = 0, []
        for shape in SHAPES.values():
            stop = start + int(np.prod(shape))
            for begin in range(start, stop, 16):
                piece = wanted[begin : min(begin + 16, stop)]
                expected += (begin + piece.abs().topk(min(3, len(piece))).indices.sort().values).tolist()
            start = stop
        assert places.tolist() == expected
        assert reply.client is not None
        waits = wanted.index_fill(0, places, 0.0)
        torch.testing.assert_close(flat(reply.client.residual), waits)


def test_what_two_bits_round_off_waits_too() -> None:
    task, data = toy_task(1), toy_clients()["b"]
    public, _ = LOCO.init(task, Key.of(1))
    chunks = LOCO._chunks(tree.sizes(public.weights).values())
    reply = LOCO.client_update(task, public, LOCO.init_client(task, public, data, Key.of(1)), data, Key.of(2))
    places, values = chunks.unpack(reply.payload.indices), reply.payload.values(chunks, 2)
    assert reply.client is not None
    delta = trained(data, Key.of(2))
    assert torch.equal(flat(reply.client.residual), delta - torch.zeros(D).index_copy(0, places, values))
    assert torch.equal(values.sign(), delta[places].sign())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9))
def test_two_magnitudes_have_the_least_error_of_all_cuts(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    codes, pair = fit_two_magnitudes(tensor)
    back = two_magnitudes(codes.long(), pair.expand(len(values), 2))
    found, magnitudes = float((tensor - back).double().square().sum()), np.sort(np.abs(np.array(values, np.float64)))
    parts = ((magnitudes[:cut], magnitudes[cut:]) for cut in range(1, len(values) + 1))
    least = min(sum(part.var() * len(part) for part in pair if len(part)) for pair in parts)
    assert found <= least * (1 + 1e-5) + 1e-7 * float(magnitudes @ magnitudes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(2, 17), st.data())
def test_places_survive_the_wire_and_no_bytes_decode_to_others(
    sizes: list[int], chunk_size: int, data: st.DataObject
) -> None:
    most = data.draw(st.integers(1, chunk_size))
    chunks, start, places = Chunks(tuple(sizes), chunk_size, most), 0, []
    for index, size in enumerate(sizes):
        places.append(chunk_positions(Key.of(index).uniform(size).float(), chunk_size, most) + start)
        start += size
    packed = chunks.pack(torch.cat(places))
    assert torch.equal(chunks.unpack(packed), torch.cat(places)) and len(packed) == chunks.num_index_bytes
    damaged = torch.tensor(list(data.draw(st.binary(min_size=len(packed), max_size=len(packed)))), dtype=torch.uint8)
    try:
        found = chunks.unpack(damaged)
    except ValueError:
        return
    assert bool((found.diff() > 0).all()) and len(found) == len(torch.cat(places))
    assert not len(found) or int(found[-1]) < sum(sizes)


def test_it_costs_14_bits_a_value_and_two_magnitudes_a_tensor() -> None:
    cost = SparseLoCo(values_per_chunk=1).wire_cost({"a": (8192,), "b": (5, 1000), "c": (3,)}, 1, 1)
    assert cost.up_least == cost.up_most == 8 + 2 + 8 * 3  # of 5 chunks: places of 12 bits, values of 2
    for record in simulate(LOCO, 2).records:
        up = LOCO.wire_cost(SHAPES, 3, record.round).up_most
        assert all(up < found <= up + 140 for found in record.bytes_up.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chunk_size": 1}, "chunk_size=1: must be from 2"),
        ({"chunk_size": 70_000}, "chunk_size=70000: must be from 2 to 65,536"),
        ({"values_per_chunk": 0}, "values_per_chunk=0: must be from 1 to chunk_size=4096"),
        ({"values_per_chunk": 4097}, "values_per_chunk=4097: must be from 1"),
        ({"residual_decay": -0.1}, r"residual_decay=-0\.1: must be from 0"),
    ],
)
def test_settings_that_make_no_chunk_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SparseLoCo(**given)

"""Each client's own held-out part: no row moves, none is both trained on and held out, draws are the client's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, FederatedData, Image, Turn
from fedferret.data.held_out import hold_out
from fedferret.data.partition import BY_CATEGORY, BY_SIZE, Partition


def example(number: int, label: str = "x") -> Example:
    return Example((Turn("user", f"text {number}"), Turn("assistant", label)), {"category": label})


def federated(*sizes: int, held_out: int = 0) -> FederatedData:
    numbers = iter(range(1000))
    clients = {
        f"client-{client}": tuple(example(next(numbers)) for _ in range(size)) for client, size in enumerate(sizes)
    }
    sets = {"test": tuple(example(next(numbers)) for _ in range(held_out))} if held_out else {}
    return FederatedData(clients, sets, "a test")


partitions = st.builds(
    Partition,
    kind=st.sampled_from([*BY_SIZE[:2], *BY_CATEGORY]),
    clients=st.integers(3, 6),
    alpha=st.sampled_from([0.1, 1.0, 100.0]),
    classes=st.integers(1, 3),
    min_examples=st.just(0),
)


@settings(deadline=None, max_examples=30)
@given(partitions, st.floats(0.01, 0.99), st.integers(0, 2**64 - 1).map(Key))
def test_no_training_row_moves_between_clients_and_none_is_held_out_too(partition, share, key):
    labels = [f"class {row % 3}" for row in range(60)]
    parts = partition.split(60, labels, key)
    before = FederatedData(
        {f"client-{client}": tuple(example(row, labels[row]) for row in part) for client, part in enumerate(parts)},
        {},
        "a test",
    )
    after = hold_out(before, share, key)
    for client, examples in before.clients.items():
        trained, kept = after.clients[client], after.client_held_out.get(client, ())
        assert sorted((*trained, *kept), key=lambda each: each.prompt) == sorted(examples, key=lambda each: each.prompt)
        assert not {each.prompt for each in trained} & {each.prompt for each in kept}
        assert bool(kept) == (len(examples) >= 2) and bool(trained) == bool(examples)
        assert not kept or len(kept) == min(max(1, round(share * len(examples))), len(examples) - 1)
    (everything,) = after.held_out.values()
    assert sorted(each.prompt for each in everything) == sorted(
        each.prompt for kept in after.client_held_out.values() for each in kept
    )


def test_a_clients_draw_depends_on_no_other_client():
    data = federated(9, 7, 8)
    together = hold_out(data, 0.3, Key.of(1))
    for client, examples in data.clients.items():
        alone = hold_out(replace(data, clients={client: examples}), 0.3, Key.of(1))
        assert alone.kept[client] == together.kept[client]
    assert together.kept != hold_out(data, 0.3, Key.of(2)).kept


def test_a_global_set_stays_and_no_share_changes_nothing():
    data = federated(5, 5, held_out=4)
    assert hold_out(data, 0, Key.of(1)) is data
    assert hold_out(data, 0.2, Key.of(1)).held_out == data.held_out


def test_a_client_with_one_example_keeps_it_and_is_named_in_one_line():
    lines: list[str] = []
    data = hold_out(federated(1, 4, 0, 1), 0.5, Key.of(1), lines.append)
    assert len(data.clients["client-0"]) == 1 and set(data.client_held_out) == {"client-1"}
    (line,) = lines
    assert '"client-0", "client-3"' in line and "client-2" not in line and "\n" not in line


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_one_line(share):
    with pytest.raises(UserError, match=r"clients\.held_out is .*: give a share"):
        hold_out(federated(5), share, Key.of(1))


def test_clients_of_one_example_each_are_refused():
    with pytest.raises(UserError, match="no client holds more than one example"):
        hold_out(federated(1, 1), 0.2, Key.of(1))


def test_the_fingerprint_follows_what_is_kept_and_every_image():
    def pictures(*pixels: int, shape: tuple[int, int, int] = (1, 1, 2), kept: int | None = None) -> str:
        rows = tuple(Example((Turn("assistant", "x"),), {}, Image(bytes([pixel, 0]), shape)) for pixel in pixels)
        return FederatedData({"a": rows}, {}, "a test", kept={} if kept is None else {"a": rows[:kept]}).fingerprint

    assert pictures(1, 2) == pictures(1, 2)
    others = [
        pictures(2, 1),
        pictures(1),
        pictures(1, 2, shape=(1, 2, 1)),
        pictures(1, 2, kept=1),
        pictures(1, 2, kept=2),
    ]
    assert len({pictures(1, 2), *others}) == 6
    # what texts alone had before images and kept examples came
    assert federated(2, held_out=1).fingerprint == "a09045795b598f908d15fc982fbdbfc0be861f3114cd11add89b45e631cc81ea"

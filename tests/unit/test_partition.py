"""Laws of partitions: every row has at most one client, sizes follow the kind, the rows follow from the key."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.partition import BY_SIZE, Partition

CATEGORIES = [f"category {row % 7}" for row in range(700)]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([*BY_SIZE, "dirichlet"]), st.integers(1, 8), st.integers(0, 2**64 - 1))
def test_every_row_has_one_client(kind, clients, key):
    count = 600 if kind == "exponential" else 300
    if kind == "exponential":
        clients = min(clients, 5)  # e to the i: the first of eight would get no row
    parts = Partition(kind, clients, min_examples=0).split(count, CATEGORIES[:count], Key(key))
    assert len(parts) == clients
    assert sorted(row for part in parts for row in part) == list(range(count))


def test_sizes_follow_the_kind():
    def sizes(kind):
        return [len(part) for part in Partition(kind, 4).split(1000, None, Key.of(3))]

    assert sizes("iid") == [250] * 4
    assert sizes("linear") == [100, 200, 300, 400]
    assert sizes("square") == [33, 133, 300, 534]
    assert sizes("exponential") == [32, 87, 236, 645]


def test_a_client_with_an_average_share_gets_no_further_category_if_balanced():
    parts = Partition("dirichlet", 10, 0.2, balanced=True).split(700, CATEGORIES, Key.of(1))
    for part in parts:
        held = sorted(CATEGORIES[row] for row in part)
        assert sum(category != held[-1] for category in held) <= 70  # before the client's last category, in order
    assert parts != Partition("dirichlet", 10, 0.2).split(700, CATEGORIES, Key.of(1))


@pytest.mark.parametrize("kind", ["iid", "square"])
def test_rows_are_shuffled_before_they_are_cut_by_size(kind):
    first = Partition(kind, 4).split(1000, None, Key.of(1))[0]
    assert first != list(range(len(first)))
    assert first != Partition(kind, 4).split(1000, None, Key.of(2))[0]


def test_pathological_gives_each_client_the_set_number_of_categories():
    parts = Partition("pathological", 10, classes=2).split(700, CATEGORIES, Key.of(1))
    assert [len({CATEGORIES[row] for row in part}) for part in parts] == [2] * 10
    rows = [row for part in parts for row in part]
    assert len(rows) == len(set(rows))


def test_pathological_leaves_no_row_out_where_clients_are_as_many_as_categories():
    for seed in range(3):
        parts = Partition("pathological", 7, classes=2).split(700, CATEGORIES, Key.of(seed))
        assert sorted(row for part in parts for row in part) == list(range(700))


def test_small_alpha_is_skewed_and_large_alpha_is_not():
    def largest_share(alpha):
        parts = Partition("dirichlet", 5, alpha=alpha).split(700, CATEGORIES, Key.of(5))
        shares = [
            max(sum(CATEGORIES[row] == name for row in part) for name in set(CATEGORIES)) / len(part) for part in parts
        ]
        return sum(shares) / len(shares)

    assert largest_share(1000.0) < 0.2 < 0.4 < largest_share(0.1)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_the_rows_follow_from_the_key(kind):
    partition = Partition(kind, 5)
    assert partition.split(700, CATEGORIES, Key.of(1)) == partition.split(700, CATEGORIES, Key.of(1))
    assert partition.split(700, CATEGORIES, Key.of(1)) != partition.split(700, CATEGORIES, Key.of(2))


@pytest.mark.parametrize(
    ("settings", "count", "categories", "message"),
    [
        ({"clients": 11}, 10, None, "partition.clients is 11 but there are 10 rows"),
        ({"kind": "dirichlet"}, 100, None, "set category_column"),
        (
            {"kind": "pathological", "clients": 2, "classes": 8},
            700,
            CATEGORIES,
            "classes is 8 but there are 7 categories",
        ),
        (
            {"kind": "dirichlet", "clients": 60, "alpha": 0.01},
            70,
            CATEGORIES[:70],
            "would hold no example: raise partition.alpha",
        ),
        ({"kind": "exponential", "clients": 20}, 100, None, "ask for fewer"),
        ({"kind": "iid", "clients": 5, "min_examples": 3}, 10, None, "client 0 would hold 2 examples"),
        (
            {"kind": "pathological", "clients": 50, "classes": 2},
            60,
            CATEGORIES[:60],
            "cannot split these rows among 50 clients",
        ),
    ],
)
def test_an_impossible_partition_is_one_line(settings, count, categories, message):
    with pytest.raises(UserError) as error:
        Partition(**settings).split(count, categories, Key.of(1))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_key_draws_the_shares_too():
    def sizes(seed):
        return [len(part) for part in Partition("dirichlet", 5).split(700, CATEGORIES, Key.of(seed))]

    assert sizes(1) != sizes(2)


def test_empty_clients_are_allowed_by_setting():
    parts = Partition("dirichlet", 60, alpha=0.01, min_examples=0).split(70, CATEGORIES[:70], Key.of(1))
    assert len(parts) == 60 and any(not part for part in parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dirichlett"}, 'did you mean "dirichlet"?'),
        ({"clients": 0}, "partition.clients is 0"),
        ({"alpha": 0.0}, "partition.alpha is 0.0"),
        ({"alpha": float("nan")}, "partition.alpha is nan"),
        ({"classes": 0}, "partition.classes is 0"),
        ({"min_examples": -1}, "partition.min_examples is -1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError) as error:
        Partition(**settings)
    assert message in str(error.value)

"""The summary of a data set: the counts are right, and the plot is complete, repeatable and valid SVG."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, Turn
from fedferret.data.summary import plot_partition, summarise


def _example(category, response="yes"):
    return Example((Turn("user", "?"), Turn("assistant", response)), {"category": category} if category else {})


DATA = FederatedData(
    clients={"a": (_example("x"),) * 5, "b": (_example("x"), _example("y", "maybe")), "c": ()},
    held_out={"rows": (_example("y"),) * 4},
    source="a test",
    notice="Some licence.",
)


def _characters(texts, **_):
    return {"input_ids": [list(text) for text in texts]}


def test_counts():
    clients, rows = summarise(DATA, _characters).groups
    assert (clients.clients, clients.examples, clients.spread) == (3, 7, (0, 2, 5))
    assert clients.categories == (("x", 6), ("y", 1))
    assert clients.response_tokens == 6 * 3 + 5
    assert (rows.name, rows.clients, rows.examples, rows.spread, rows.response_tokens) == ("rows", None, 4, None, 12)


def test_the_table_prints():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summarise(DATA))
    text = console.export_text()
    assert all(word in text for word in ("a test", "clients", "rows", "x 6, y 1", "Some licence."))


@pytest.mark.parametrize(("categories", "clients"), [(0, 20), (1, 20), (2, 20), (12, 20), (12, 100)])
def test_the_plot_is_a_repeatable_picture(tmp_path, categories, clients):
    held = {
        f"client {n}": tuple(_example(f"kind {n % categories}" if categories else None) for _ in range(n))
        for n in range(clients)
    }
    data = FederatedData(held, {}, "a test")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    plot_partition(data, first)
    plot_partition(data, second)
    assert first.read_bytes() == second.read_bytes()
    assert ElementTree.parse(first).getroot().tag.endswith("svg")
    text = first.read_text()
    assert ("<!-- others -->" in text) == (categories > 8 and clients == 100)
    if categories > 8 and clients == 20:  # a heat map names every category and client
        names = [f"kind {n}" for n in range(categories)] + [f"client {n}" for n in range(clients)]
        assert [name for name in names if f"<!-- {name} -->" not in text] == []
    plot_partition(data, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_plot_of_many_clients_stays_small(tmp_path):
    """It is in the report, which had 100 bytes more for every client."""
    held = {f"client {n}": (_example("x"),) * (n % 7) for n in range(20_000)}
    plot_partition(FederatedData(held, {}, "a test"), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size < 200_000


def test_an_unknown_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.svg or \.png"):
        plot_partition(DATA, tmp_path / "plot.bmp")

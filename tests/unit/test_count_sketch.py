"""Count sketches: rows that never share two collisions, signs of any positions, a median that is one."""

from __future__ import annotations

import math

import pytest
import torch

from fedferret.bases import count_sketch
from fedferret.bases.count_sketch import CountSketch, row_lengths
from fedferret.bases.hashing import flip_signs, flip_signs_at
from fedferret.bases.top_k import top_k
from fedferret.core.errors import UserError
from fedferret.core.keys import Key

KEY = Key.of(4, "sketch")


def test_signs_of_positions_in_any_order_are_those_of_positions_in_order() -> None:
    values = torch.arange(1.0, 20_001.0)
    for start in (0, 2**20 - 77, 2**36 + 5):
        places = torch.arange(start, start + 20_000)
        assert torch.equal(flip_signs_at(values, KEY, places), flip_signs(values, KEY, start))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 500), (3, 40), (5, 12_000), (7, 1000)])
def test_no_two_rows_have_a_common_divisor(rows: int, columns: int) -> None:
    lengths = row_lengths(rows, columns)
    assert len(set(lengths)) == rows and max(lengths) == columns
    assert all(math.gcd(a, b) == 1 for a in lengths for b in lengths if a != b)
    # so positions that share cells in two rows lie their product apart: more than SmolLM2 has weights
    assert rows == 1 or columns < 12_000 or lengths[-1] * lengths[-2] > 134_515_008


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_estimates_are_medians_whatever_the_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = KEY.uniform(5000).float() - 0.5
    sketch = CountSketch(rows, 300, 5000, KEY)
    cells = sketch.zeros()
    for start, stop in ((0, 7), (7, 3000), (3000, 5000)):
        sketch.add_(cells, vector[start:stop], start)
    places = torch.arange(5000)
    torch.testing.assert_close(cells, sketch.sketched(places, vector), rtol=0, atol=1e-4)
    by_row = [
        flip_signs(row[places % len(row)], KEY.fold(number), 0)
        for number, row in enumerate(cells.split(sketch.lengths))
    ]
    expected = torch.stack(by_row).median(dim=0).values
    assert torch.equal(torch.cat(list(sketch.estimates(cells))), expected)
    monkeypatch.setattr(count_sketch, "_CHUNK", 1000)
    assert torch.equal(torch.cat(list(sketch.estimates(cells))), expected)


def test_the_heavy_are_found_among_many() -> None:
    vector = 0.01 * (KEY.uniform(100_000).float() - 0.5)
    heavy = torch.tensor([0, 17, 18, 40_000, 99_999])
    vector[heavy] = torch.tensor([3.0, -2.0, 2.5, 4.0, -5.0])
    sketch = CountSketch(5, 997, 100_000, KEY)
    cells = sketch.zeros()
    sketch.add_(cells, vector, 0)
    positions, values = top_k(lambda: sketch.estimates(cells), 5)
    assert torch.equal(positions, heavy)
    torch.testing.assert_close(values, vector[heavy], rtol=0, atol=0.2)


def test_more_cells_than_weights_are_refused() -> None:
    with pytest.raises(UserError, match="num_columns=11 cells a row for 10 weights: give 1 to 10"):
        CountSketch(1, 11, 10, KEY)

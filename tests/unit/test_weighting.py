"""The server sets weights: what a claim of examples is worth, with and without bounds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.methods import METHODS
from fedferret.config import from_tables
from fedferret.core.errors import UserError
from fedferret.core.weighting import Bounds, bounded_clients, weights_of
from fedferret.engines.in_process import InProcess
from site_folders import sites_recipe, write_sites
from tiny_runs import tiny_tables
from toys import simulate, toy_clients

BOUNDS = Bounds(max_examples=1000, max_over_median=10.0, max_share=0.5)
claims_of = st.lists(st.integers(1, 10**12), min_size=1, max_size=12)


def shares(weights: tuple[float, ...]) -> list[float]:
    return [weight / math.fsum(weights) for weight in weights]


@settings(max_examples=200, deadline=None)
@given(claims=claims_of, max_share=st.floats(0.05, 1.0))
def test_no_share_exceeds_the_bound_and_the_order_of_claims_stays(claims: list[int], max_share: float) -> None:
    bounds = replace(BOUNDS, max_share=max_share)
    found = shares(weights_of(claims, "examples", bounds))
    assert math.fsum(found) == pytest.approx(1) and min(found) > 0
    assert max(found) <= max(max_share, 1 / len(claims)) * (1 + 1e-9)
    ordered = [found[place] for place in sorted(range(len(claims)), key=lambda place: claims[place])]
    assert all(left <= right * (1 + 1e-9) for left, right in itertools.pairwise(ordered))


@settings(max_examples=100, deadline=None)
@given(claims=claims_of)
def test_claims_within_the_bounds_count_as_they_are_and_equal_weighting_ignores_them(claims: list[int]) -> None:
    generous = Bounds(max_examples=10**13, max_over_median=10.0**13, max_share=1.0)
    if len(claims) >= 3:
        assert weights_of(claims, "examples", generous) == tuple(map(float, claims))
    assert weights_of(claims, "examples", None) == tuple(map(float, claims))
    for bounds in (None, BOUNDS):
        assert set(weights_of(claims, "equal", bounds)) == {1.0} and bounded_clients(claims, "equal", bounds) == ()


def test_a_claim_of_a_trillion_examples_weighs_what_the_clamp_gives() -> None:
    # 10 x the lower median is 1000 of 1300; a half of all weight is the most
    found = shares(weights_of([100, 100, 100, 10**12], "examples", Bounds()))
    assert found == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert found == shares(weights_of([100, 100, 100, 1000], "examples", Bounds()))
    assert bounded_clients([100, 100, 100, 10**12], "examples", Bounds()) == (3,)
    assert weights_of([100, 10**12], "examples", Bounds()) == (1.0, 1.0)  # two: nobody can tell who exaggerates


class Boasting(InProcess):
    """An engine in which client "b" claims so many examples."""

    claim = 10**12

    def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
        update, private = super().work(state, client, body, data)
        return (replace(update, num_examples=self.claim) if client == "b" else update), private


@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-per-client", "fedavg-top-k"])
def test_a_claim_of_a_trillion_examples_tunes_what_the_clamped_claim_tunes(name: str) -> None:
    """Whatever way the payloads pool; the round says that the bound bit."""

    class Clamped(Boasting):
        claim = 1000  # above 10 x the lower median too

    algorithm = replace(METHODS[name], weighting="examples")  # type: ignore[call-arg]
    data = toy_clients(4)
    runs = [simulate(algorithm, 2, data=data, bounds=BOUNDS, engine=each) for each in (Boasting, Clamped)]
    assert runs[0].public == runs[1].public
    assert [record.bounded for record in runs[0].records] == [("b",)] * 2
    unbounded = simulate(algorithm, 2, data=data, engine=Boasting)
    assert unbounded.public != runs[0].public and unbounded.records[0].bounded == ()


def test_equal_weighting_ignores_every_claim() -> None:
    algorithm = replace(METHODS["fedavg"], weighting="equal")  # type: ignore[call-arg]
    assert simulate(algorithm, 2, engine=Boasting).public == simulate(algorithm, 2).public


def test_bounds_that_do_not_bite_change_no_bit() -> None:
    generous = Bounds(max_examples=10**6, max_over_median=10.0, max_share=0.9)
    for name in ("fedavg", "ferret"):
        assert simulate(METHODS[name], 2, bounds=generous).public == simulate(METHODS[name], 2).public


def test_bounds_are_on_where_sites_hold_the_data_and_part_of_the_identity(tmp_path: Path) -> None:
    simulated = from_tables(tiny_tables(tmp_path))
    served = sites_recipe(tmp_path, write_sites(tmp_path))
    assert (simulated.clients.bounds(), served.clients.bounds()) == (None, Bounds())
    assert served.identity()["clients"]["bound_weights"] is True
    asked = from_tables(tiny_tables(tmp_path, clients={"per_round": 2, "bound_weights": True, "max_share": 0.7}))
    assert asked.clients.bounds() == Bounds(max_share=0.7)
    for wrong in ({"max_share": 0.0}, {"max_share": 1.5}, {"max_over_median": 0.5}, {"max_examples": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            from_tables(tiny_tables(tmp_path, clients={"per_round": 2, **wrong}))

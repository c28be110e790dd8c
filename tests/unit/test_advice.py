"""`fedferret advise`: more coordinates for more of FedAvg, the same forecast twice, and refusals in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedferret import advice
from fedferret.cli import app
from fedferret.config import Recipe
from tiny_runs import silent, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ferret on the tiny model, over thirty rounds."""
    return tiny_recipe(tmp_path_factory.mktemp("advice"), rounds=30, algorithm={"coordinates": 128, "group_size": 1})


@pytest.fixture(scope="module")
def found(recipe: Recipe) -> advice.Probe:
    """A probe of two rounds."""
    return advice.probe(recipe, 2, None, silent)


def test_a_larger_share_takes_more_coordinates_and_bytes(recipe: Recipe, found: advice.Probe) -> None:
    lines = advice.advise(found, recipe)
    counts, bytes_up = ([getattr(line, name) for line in lines] for name in ("coordinates", "bytes_up"))
    assert counts == sorted(set(counts)) and bytes_up == sorted(set(bytes_up))
    for line in lines:
        assert advice.share(found, recipe, line.coordinates) >= line.share
        assert advice.share(found, recipe, 0.9 * line.coordinates) < line.share
    shares = [advice.share(found, recipe, count) for count in (64, 256, 1024, 4096)]
    assert shares == sorted(shares) and shares[0] < shares[-1] < 1


def test_a_probe_is_deterministic_and_leaves_nothing_out(recipe: Recipe, found: advice.Probe) -> None:
    assert advice.probe(recipe, 2, None, silent) == found
    assert found.weights == 90624 and 1 < found.participation < found.weights and 0 <= found.persistence <= 1
    assert found.losses[-1] < found.losses[0] and found.noise > found.norm


def test_the_noise_is_that_of_ferrets_own_code(recipe: Recipe, found: advice.Probe) -> None:
    assert isinstance(recipe.algorithm, advice.Ferret)
    finer = replace(recipe, algorithm=replace(recipe.algorithm, coordinates=4 * recipe.algorithm.coordinates))
    ratio = advice.probe(finer, 2, None, silent).noise ** 2 / found.noise**2
    assert 0.25 * 2 / 3 < ratio < 0.25 * 3 / 2  # energy ∝ 1/K


def test_fedavgs_gain_of_all_rounds_grows_slower_than_their_number() -> None:
    probed = (5.0, 4.2, 4.0)
    assert advice.extrapolated(probed, 2) == advice.extrapolated(probed, 1) == pytest.approx(1.0)  # what was measured
    assert advice.extrapolated(probed, 32) == pytest.approx(16**advice.GAIN_EXPONENT)


def test_noise_that_stays_adds_up_and_noise_that_fades_does_not() -> None:
    assert advice.memory(1.0, 40) == pytest.approx(40)
    assert 1 < advice.memory(0.0, 40) < advice.memory(0.5, 40) < advice.memory(0.5, 80) < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "fedavg"}, 'advise knows the noise of "ferret" alone'),
        ({"server_momentum": 0.5}, "set server_momentum=0"),
    ],
)
def test_what_the_formula_is_not_for_is_refused_in_a_line(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tiny_recipe(tmp_path, algorithm=changes).to_toml())
    result = CliRunner().invoke(app, ["advise", str(path)])
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1


def test_the_command_prints_json_with_a_reduction_that_is_known(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    result = CliRunner().invoke(app, ["advise", str(path), "--json", "--reduction", "2.0", "--rounds", "1"])
    assert result.exit_code == 0, (result.output, result.exception)
    made = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert made["loss_reduction"] == 2.0 and [line["share"] for line in made["advice"]] == [0.9, 0.97, 0.99]

"""`fedferret advise`: more coordinates for more of FedAvg, the same forecast twice, and refusals in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedferret import advice
from fedferret.algorithms.ferret import Ferret
from fedferret.cli import app
from fedferret.config import Recipe
from fedferret.experiment import Experiment
from tiny_runs import silent, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ferret on the tiny model, over thirty rounds."""
    return tiny_recipe(tmp_path_factory.mktemp("advice"), rounds=30, algorithm={"coordinates": 128, "group_size": 1})


def asked(recipe: Recipe, folder: Path, *options: str) -> Result:
    """What the command says of a recipe."""
    path = folder / "recipe.toml"
    path.write_text(recipe.to_toml())
    return CliRunner().invoke(app, ["advise", str(path), *options])


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
    assert isinstance(recipe.algorithm, Ferret)
    finer = replace(recipe, algorithm=replace(recipe.algorithm, coordinates=4 * recipe.algorithm.coordinates))
    ratio = advice.probe(finer, 2, None, silent).noise ** 2 / found.noise**2
    assert 0.25 * 2 / 3 < ratio < 0.25 * 3 / 2  # energy ∝ 1/K


def test_fedavgs_gain_of_all_rounds_grows_slower_than_their_number() -> None:
    probed = (5.0, 4.2, 4.0)
    assert advice.extrapolated(probed, 2) == advice.extrapolated(probed, 1) == pytest.approx(1.0)  # what was measured
    assert advice.extrapolated(probed, 32) == pytest.approx(16**advice.GAIN_EXPONENT)


def test_noise_that_stays_adds_up_and_noise_that_fades_does_not() -> None:
    forty, eighty = [1.0] * 40, [1.0] * 80
    assert advice.memory(1.0, forty) == pytest.approx(40)
    assert 1 < advice.memory(0.0, forty) < advice.memory(0.5, forty) < advice.memory(0.5, eighty) < 40


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
    result = asked(tiny_recipe(tmp_path, algorithm=changes), tmp_path)
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1


def test_the_command_prints_json_with_a_reduction_that_is_known(recipe: Recipe, tmp_path: Path) -> None:
    result = asked(recipe, tmp_path, "--json", "--reduction", "2.0", "--rounds", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    made = json.loads(result.stdout)
    assert made["loss_reduction"] == 2.0 and [line["share"] for line in made["advice"]] == [0.9, 0.97, 0.99]


EXACT = {"coordinates": 90624, "group_size": 1, "bits": 32}
TOP_ONE = {"coordinates": 708, "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--rounds", "4"], "--rounds 4: the recipe has rounds=3"),
        ({"rounds": 1}, [], "--rounds 2: the recipe has rounds=1"),
        ({"pool": {"name": "median"}, "clients": {"per_round": 3}}, [], 'set pool.name="mean"'),
        ({"pool": {"name": "norm-bounded-mean"}}, [], 'set pool.name="mean"'),
        ({"clients": {"bound_weights": True}}, [], "set bound_weights=false"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_round_1(
    changes: dict[str, Any], options: list[str], message: str, tmp_path: Path
) -> None:
    algorithm = {"keys": "shared", "weighting": "examples"}
    result = asked(tiny_recipe(tmp_path, algorithm=algorithm, **changes), tmp_path, *options)
    assert result.exit_code == 2 and message in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"pool": {"norm_ratio": 1.0}, "clients": {"per_round": 4}}, [], "of 4 updates were left out ("),
        ({"algorithm": EXACT}, [], "costs no loss that can be measured: give a recipe with fewer coordinates"),
        ({"algorithm": EXACT | {"schedule": "linear"}}, [], "costs no loss that can be measured"),
        ({}, ["--reduction", "1e-30"], "--reduction 1e-30: below "),
        ({}, ["--reduction", "30"], "no loss falls below 0"),
    ],
)
def test_a_probe_that_no_advice_follows_from_ends_in_a_line(
    changes: dict[str, Any], options: list[str], message: str, tmp_path: Path
) -> None:
    result = asked(tiny_recipe(tmp_path, **changes), tmp_path, *options)
    assert result.exit_code == 2 and message in result.output.splitlines()[-1] and not result.stdout


def test_no_more_coordinates_are_advised_than_there_are_groups_of_weights(tmp_path: Path) -> None:
    made = []
    for count in (708, 5000):
        settings = tiny_recipe(tmp_path, rounds=30, algorithm=TOP_ONE | {"coordinates": count})
        result = asked(settings, tmp_path, "--json")
        made.append(json.loads(result.stdout))
    assert made[0] == made[1] and made[1]["coordinates"] == made[1]["most_coordinates"] == 708
    said = asked(settings, tmp_path, "--reduction", "0.01").stdout
    assert "coordinates=5,000 counts as 708" in said and "708 coordinates: none of FedAvg forecast" in said
    assert said.count("not with group_size=128, which has 708 coordinates at most; set a smaller one") == 3


def test_the_servers_schedule_is_no_noise(tmp_path: Path) -> None:
    noise, last = {}, {}
    for schedule in ("constant", "linear"):
        settings = tiny_recipe(tmp_path, algorithm={"coordinates": 65536, "group_size": 1, "schedule": schedule})
        probe = advice.probe(settings, 2, None, silent)
        noise[schedule], last[schedule] = probe.noise, probe.losses[-1]
    assert noise["linear"] == pytest.approx(2 / 3 * noise["constant"], rel=1e-3)  # round 2 of 3
    assert last["linear"] > last["constant"]
    assert advice.energies(settings, 2) == pytest.approx([9 / 4, 1, 1 / 4])
    assert advice.memory(1.0, advice.energies(settings, 2)) == pytest.approx(3.5)


@pytest.mark.parametrize("where", ["server", "clients"])
def test_the_round_after_the_probe_has_the_rates_of_that_round(where: str, tmp_path: Path) -> None:
    lines: dict[str, list[str]] = {"constant": [], "linear": []}
    for schedule, said in lines.items():
        training: dict[str, Any] = {"learning_rate": 0.1, "steps": 2}
        algorithm: dict[str, Any] = {"coordinates": 128, "group_size": 1, "training": training}
        (algorithm if where == "server" else training)["schedule"] = schedule
        advice.probe(tiny_recipe(tmp_path, rounds=2, algorithm=algorithm), 1, None, said.append)
    before = {name: loss_in(said, "FedAvg, round 1") for name, said in lines.items()}
    after = {name: loss_in(said, "a round of FedAvg from there (+0)") for name, said in lines.items()}
    assert before["linear"] == before["constant"] > after["linear"] > after["constant"]


def loss_in(lines: list[str], what: str) -> float:
    """The loss in the line of that name."""
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(what))


def test_the_bytes_are_the_mean_over_rounds_of_a_run(tmp_path: Path) -> None:
    settings = tiny_recipe(tmp_path, algorithm={"coordinates": 64, "norms_every": 0})
    line = advice.advise(advice.probe(settings, 2, None, silent), settings)[-1]
    assert isinstance(settings.algorithm, Ferret)
    advised = replace(settings, algorithm=replace(settings.algorithm, coordinates=line.coordinates))
    experiment = Experiment.load(advised, log=silent)
    state = experiment.initial_state()
    engine = experiment.engine(state)
    sent = [max(record.bytes_up.values()) for record in experiment.run_rounds(state, engine)]
    assert sent[0] > sent[1] == sent[2] and line.bytes_up == pytest.approx(sum(sent) / 3, abs=1)


def test_the_probe_runs_in_this_process_whatever_the_engine(recipe: Recipe, found: advice.Probe) -> None:
    elsewhere = replace(recipe, execution=replace(recipe.execution, engine="processes"))
    lines: list[str] = []
    assert advice.probe(elsewhere, 2, None, lines.append) == found
    assert any('execution.engine="processes": the probe runs in this process' in line for line in lines)

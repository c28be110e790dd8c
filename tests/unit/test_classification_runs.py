"""Whole runs of classification: methods, engines, both kinds of models, exports, and what is refused beforehand."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import recipe
from fedferret.build import Parts, check, load_data
from fedferret.config import Recipe, written
from fedferret.core import rounds
from fedferret.core.errors import UserError
from fedferret.core.exchanges import ClientScores, Reply
from fedferret.core.keys import Key
from fedferret.data.text import TextSettings
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.objectives.next_token import NextToken
from fedferret.runner import run
from fedferret.tracking.events import read
from fedferret.tracking.report import write_report
from tiny_runs import silent

pytestmark = pytest.mark.slow(seconds=15)

WORDS = {"food": ("soup", "bread", "salt"), "sky": ("star", "moon", "cloud"), "sport": ("ball", "goal", "team")}
TRAINING = {"optimizer": "adamw", "learning_rate": 3e-3, "steps": 5, "batch_size": 4}


def write_texts(folder: Path, labels: Mapping[str, str] = {}) -> Path:  # read only
    """Four clients with 24 short texts each, of three kinds, which ``labels`` may rename."""
    lines = []
    for client in range(4):
        for row in range(24):
            kind, *places = (int(3 * value) for value in Key.of(5, client, row).uniform(3))
            name = list(WORDS)[kind]
            text = " and ".join(f"the {WORDS[name][place]}" for place in places)
            lines.append({"who": f"c{client}", "instruction": text, "response": labels.get(name, name)})
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tables(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of six quick rounds."""
    made: dict[str, Any] = {
        "rounds": 6,
        "model": {"name": "tiny"},
        "data": {"source": "files", "path": str(folder / "texts.jsonl"), "client_column": "who"},
        "objective": {"name": "classification", "classes": list(WORDS)},
        "text": {"max_tokens": 64},
        "clients": {"per_round": 4, "held_out": 0.2},
        "algorithm": {"name": "fedavg", "training": TRAINING},
        "evaluation": {"local_only_clients": 0, "every": 6},
    }
    made["data"]["held_out_fraction"] = 0.2
    for name, change in changes.items():
        whole = not isinstance(change, Mapping) or name == "algorithm"
        made[name] = change if whole else {**made.get(name, {}), **change}
    return made


def resolved(folder: Path, **changes: Any) -> Recipe:
    """The recipe of those tables, with its data on disk."""
    write_texts(folder)
    return recipe(**tables(folder, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of FedAvg with a local-only baseline, and its summary."""
    root = tmp_path_factory.mktemp("finished")
    settings = resolved(root, evaluation={"every": 3, "local_only_clients": 2})
    return root / "run", run(settings, root / "run", silent)


@pytest.mark.usefixtures("plots")
def test_clients_learn_the_classes_and_the_report_says_how_well_each_does(finished: Any) -> None:
    out, summary = finished
    evaluations = read(out).evaluations
    first, last = evaluations[0], evaluations[6]
    assert last.results["rows"]["accuracy"] > 0.8 > first.results["rows"]["accuracy"]
    assert set(last.clients) == {"c0", "c1", "c2", "c3"} and last.primary == "accuracy"
    assert last.per_client == {client: figures["accuracy"] for client, figures in last.clients.items()}
    assert last.results["rows"]["worst-tenth"] == min(last.per_client.values())
    assert summary["metrics"]["rows"]["client-mean"][-1] == pytest.approx(sum(last.per_client.values()) / 4)
    assert summary["bytes_evaluation"] > 0 and "perplexity" not in summary["metrics"]["rows"]
    baseline = read(out).baselines["local-only"]
    assert set(baseline.spread) == {"client-mean", "worst-tenth", "deviation", "range"}
    page = write_report(out).read_text()
    for words in ("The accuracy of each of the 4 clients", "nats per example", "Who holds what", "calibration-error"):
        assert words in page, words


@pytest.mark.parametrize(
    ("model", "algorithm"),
    [
        ("tiny", {"name": "fedit", "training": TRAINING}),
        ("tiny-encoder", {"name": "fedit", "modules": "all-linear", "training": TRAINING}),
        ("tiny", {"name": "fedprox", "training": TRAINING}),
        ("tiny-encoder", {"name": "fedptr", "over": "fedit", "matching_steps": 2, "training": TRAINING}),
        ("tiny-encoder", {"name": "fibecfed", "modules": "all-linear", "training": TRAINING}),
        ("tiny", {"name": "ferret", "training": {"learning_rate": 0.3, "steps": 5, "batch_size": 4}}),
        ("tiny-encoder", {"name": "fedkseed", "training": {"steps": 5}}),
        ("tiny", {"name": "fedprompt", "training": TRAINING}),
        ("tiny-encoder", {"name": "fedptuning-v2", "training": TRAINING}),
        ("tiny-encoder", {"name": "fedpeptao", "warm_up_rounds": 0, "lanczos_steps": 4, "training": TRAINING}),
    ],
)
def test_methods_run_unchanged(model: str, algorithm: dict[str, Any], tmp_path: Path) -> None:
    settings = resolved(tmp_path, rounds=2, model={"name": model}, algorithm=algorithm, evaluation={"every": 2})
    experiment = Experiment.load(settings, log=silent)
    state = experiment.initial_state()
    engine = experiment.engine(state)
    records = list(experiment.run_rounds(state, engine))
    assert not [failure for record in records for failure in record.failures]
    note = settings.algorithm.note(state.public)
    assert (note is not None) == (algorithm["name"] in ("fibecfed", "fedpeptao")), note  # these choose layers
    found = experiment.score(state, engine)
    assert len(found.per_client) == 4 and found.results["rows"]["examples"] == 19


@pytest.mark.parametrize("name", ["fedptuning", "fedptuning-v2"])
def test_an_adapter_that_does_not_merge_is_exported_with_the_head_and_read_again(name: str, tmp_path: Path) -> None:
    algorithm = {"name": name, "training": {**TRAINING, "steps": 1}}
    recipe = resolved(tmp_path, rounds=1, model={"name": "tiny-encoder"}, algorithm=algorithm, evaluation={"every": 1})
    run(recipe, tmp_path / "run", silent)
    export_folder(tmp_path / "run", tmp_path / "first", silent)
    export_delta(tmp_path / "run", tmp_path / "delta", silent)
    apply_delta("tiny-encoder", tmp_path / "delta", tmp_path / "again", silent)
    first, again = (tmp_path / folder / "adapter.safetensors" for folder in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
    loaded: dict[str, Any] = {"texts": ["the soup", "the moon and the star"], "folder": tmp_path / "first"}
    example = (tmp_path / "first" / "README.md").read_text()
    assert 'in the order of the logits: ["food", "sky", "sport"]' in example
    exec(example.split("```python")[1].split("```")[0], loaded)  # as a reader would
    experiment = Experiment.load(recipe, tmp_path / "run", silent)
    state = experiment.initial_state()
    with recipe.algorithm.model(experiment.task, state.public) as model, torch.no_grad():
        assert model is not None
        torch.testing.assert_close(loaded["logits"], model(loaded["batch"]), rtol=1e-5, atol=1e-6)


def test_an_adapter_leaves_the_head_dense_and_trains_it(tmp_path: Path) -> None:
    algorithm = {"name": "fedit", "modules": "all-linear", "training": TRAINING}
    experiment = Experiment.load(resolved(tmp_path, algorithm=algorithm), log=silent)
    tuned = {name for name, weight in experiment.model.named_parameters() if weight.requires_grad}
    assert {name for name in tuned if "lora" not in name} == {"head.weight"}


def test_a_recipe_splits_off_what_clients_hold_out_before_training(tmp_path: Path) -> None:
    whole = load_data(resolved(tmp_path, clients={"held_out": 0.0}))
    split = load_data(resolved(tmp_path))
    assert not whole.kept and split.kept.keys() == whole.clients.keys()
    for client, rows in whole.clients.items():
        assert 0 < len(split.kept[client]) == len(rows) - len(split.clients[client])


def test_clients_that_hold_nothing_out_are_counted_where_nothing_else_is_scored(tmp_path: Path) -> None:
    personal = {"name": "fedsa-lora", "modules": "all-linear", "training": TRAINING}
    for algorithm, share, told in ((personal, 0.0, True), (personal, 0.2, False), ({"name": "fedavg"}, 0.0, False)):
        lines: list[str] = []
        changes: dict[str, Any] = {"data": {"held_out_fraction": 0.01}, "clients": {"held_out": share}}
        load_data(resolved(tmp_path, algorithm=algorithm, **changes), log=lines.append)
        assert [line.startswith("Of 4 clients 1 hold") for line in lines if "hold anything out" in line] == [
            True
        ] * told


def test_scores_that_contradict_each_other_are_a_failure_of_their_client(tmp_path: Path) -> None:
    experiment = Experiment.load(resolved(tmp_path), log=silent)
    state = experiment.initial_state()
    sums, _, _ = rounds.score(experiment.engine(state), ["c0"], state, 8)
    wrong = {**sums["c0"], **{name: sums["c0"]["count"] for name in sums["c0"] if name.startswith("hit")}}

    class Lying:
        """An engine with one site that claims to be right more often than it has examples."""

        def exchange(self, bodies: Any, state: Any) -> Any:
            return [Reply(client, ClientScores(wrong), 1) for client in bodies]

    taken, failures, _ = rounds.score(Lying(), ["c0"], state, 8)  # type: ignore[arg-type]  # has what is called
    assert not taken and "more is right than there is" in failures[0].reason


def test_one_site_weighs_no_more_in_the_main_set_than_its_claim_may(tmp_path: Path) -> None:
    from dataclasses import replace

    settings = resolved(tmp_path)
    bounded = replace(settings, clients=replace(settings.clients, bound_weights=True))
    experiment = Experiment.load(bounded, log=silent)
    sums = {name: {"count": 10.0, "loss": 10.0} for name in ("a", "b")} | {"c": {"count": 2.0**50, "loss": 0.0}}
    added = experiment._added(sums)
    assert added["loss"] / added["count"] >= 0.5 - 1e-9  # half of all weight is the most that one client has


def test_a_frozen_body_stays_what_it_was_and_the_head_alone_travels(tmp_path: Path) -> None:
    settings = resolved(tmp_path, rounds=1, model={"name": "tiny-encoder", "train": "head"})
    experiment = Experiment.load(settings, log=silent)
    before = {name: weight.clone() for name, weight in experiment.model.named_parameters()}
    state = experiment.initial_state()
    (record,) = experiment.run_rounds(state, experiment.engine(state))
    with settings.algorithm.model(experiment.task, state.public) as model:
        moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert max(record.bytes_up.values()) < 4 * (3 * 64 + 3) + 200


@pytest.mark.slow(seconds=20)
def test_workers_in_processes_have_the_bits_and_the_scores_of_one_process(tmp_path: Path) -> None:
    for engine in ("in-process", "processes"):
        settings = resolved(tmp_path, rounds=2, execution={"engine": engine}, evaluation={"every": 2})
        run(settings, tmp_path / engine, silent)
    one, many = (read(tmp_path / name) for name in ("in-process", "processes"))
    assert one.rounds[2].fingerprint == many.rounds[2].fingerprint
    assert one.evaluations[2].clients == many.evaluations[2].clients


def test_an_export_is_a_folder_that_transformers_loads_with_its_labels(finished: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out, _ = finished
    export_folder(out, tmp_path / "model", silent)
    export_delta(out, tmp_path / "tuned.delta", silent)
    apply_delta("tiny", tmp_path / "tuned.delta", tmp_path / "rebuilt", silent)
    texts = {"food": "the soup and the salt", "sky": "the moon and the star", "sport": "the goal and the team"}
    for folder in ("model", "rebuilt"):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            guesses = model(**tokenizer(list(texts.values()), return_tensors="pt", padding=True)).logits.argmax(dim=1)
        assert [model.config.id2label[int(guess)] for guess in guesses] == list(texts)


def test_images_train_and_export(tmp_path: Path) -> None:
    settings = recipe(
        rounds=3,
        model={"name": "lenet5"},
        data={"source": "digits", "partition": {"kind": "dirichlet", "clients": 4, "alpha": 1.0}},
        clients={"per_round": 4},
        algorithm={"name": "fedavg", "training": {**TRAINING, "steps": 15, "batch_size": 16}},
        evaluation={"local_only_clients": 0, "every": 3, "batch_size": 64},
    )
    summary = run(settings, tmp_path / "run", silent)
    (figures,) = summary["metrics"].values()
    assert figures["accuracy"][0] < 0.3 < 0.6 < figures["accuracy"][-1]
    export_folder(tmp_path / "run", tmp_path / "model", silent)
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model": {"name": "lenet5"}, "text": {"max_tokens": 256}},
            'model "lenet5": it reads images, and the data are texts',
        ),
        ({"objective": {"classes": ["food", "sky"]}}, "sport"),
        ({"objective": {"classes": ["food"]}}, "name at least two"),
        ({"objective": {"name": "clasification"}}, 'no objective is called "clasification"'),
        ({"objective": {"pooling": "cls"}}, "pooling"),
        ({"text": {"packed": True}}, "text.packed=true"),
        ({"text": {"template": "alpaca"}}, 'text.template=\'alpaca\': objective "classification" on model "tiny"'),
        ({"text": {"train_on": "all"}}, "text.train_on='all'"),
        ({"text": {"cut": "prompt"}}, "text.cut='prompt'"),
        ({"text": {"date": "2026-11-28"}}, "text.date='2026-11-28'"),
        ({"model": {"name": "lenet5"}, "text": {"max_tokens": 64}}, "text.max_tokens=64"),
        ({"evaluation": {"metrics": ["rouge-l"]}}, "generates no answers"),
        ({"clients": {"held_out": 1.0}}, "held_out=1.0"),
        ({"objective": {"classes": [*WORDS, "war"]}}, "war"),
        (
            {"text": {"max_tokens": 500}, "model": {"name": "tiny-encoder"}, "algorithm": {"name": "fedprompt"}},
            "has 512 positions, 20 of which a learned prompt takes; set max_tokens to at most 492",
        ),
        ({"model": {"name": "tiny", "train": "head"}, "algorithm": {"name": "fedit"}}, 'model.train="head": fedit'),
        ({"algorithm": {"name": "fedit", "modules": ["head"]}}, 'modules="head": no linear module'),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        settings = resolved(tmp_path, **changes)
        check(settings)
        load_data(settings)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_site_is_told_of_a_recipe_for_texts_to_classify_holds_no_setting_that_is_not_read(
    tmp_path: Path,
) -> None:
    settings = resolved(tmp_path)
    told = written(tomllib.loads(settings.identity_toml()))
    check(told)
    assert told.text == settings.text and told.identity() == settings.identity()


def test_tools_beside_texts_to_classify_are_said_to_be_unread(tmp_path: Path) -> None:
    settings = resolved(tmp_path)
    data = load_data(settings)
    assert Parts.over(settings, data, log=silent).notes == data.notes
    (first, *others), *_ = data.clients.values()
    offering = replace(first, metadata={**first.metadata, "tools": ({"name": "search"},)})
    data = replace(data, clients={"c0": [offering, *others]})
    (note,) = Parts.over(settings, data, log=silent).notes[len(data.notes) :]
    assert note == "1 texts to classify come with tools, which are not read"


def test_a_date_for_a_template_that_writes_none_is_refused() -> None:
    text = TextSettings(template="alpaca", date="2026-11-28")
    with pytest.raises(UserError, match='template "alpaca" writes no date'):
        NextToken().check("tiny", text)
    NextToken().check("tiny", TextSettings(date="2026-11-28"))


def test_a_language_model_has_no_head_to_train_alone(tmp_path: Path) -> None:
    made = {**tables(tmp_path, model={"name": "tiny", "train": "head"}), "objective": {"name": "next-token"}}
    write_texts(tmp_path)
    with pytest.raises(UserError, match="has no head that can be trained alone"):
        check(recipe(**made))

"""A site's own policy: what it excludes is refused before a model is read, in one line that names the key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from contract.methods import METHODS
from fedferret import models, recipe
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Train
from fedferret.core.task import Examples
from fedferret.engines.transport import Request, Response
from fedferret.resident.policy import batches_per_round
from fedferret.resident.process import open_trainer
from fedferret.resident.site import read_site
from fedferret.tracking.audit import read_audit
from fedferret.wire import codec
from toy_sites import Direct, simulate_sites, sites, toy_trainer
from toys import simulate

BASE = "ab" * 32
METHOD = METHODS["ferret-error-feedback"]


def write_site(folder: Path, policy: Any) -> Path:
    """A site of five examples with this policy."""
    folder.mkdir(exist_ok=True)
    row = '{"instruction": "The door?", "response": "Red."}\n'
    (folder / "rows.jsonl").write_text(5 * row)
    settings = {"name": "w", "data": {"path": "rows.jsonl"}, "policy": policy}
    (folder / "site.toml").write_text(tomli_w.dumps(settings))
    return folder


def request(model: str = "tiny", base: str = BASE, **training: Any) -> bytes:
    """The first request of a run of FedAvg."""
    plan = recipe(
        rounds=1,
        model={"name": model},
        data={"source": "sites", "sites": ["w"]},
        clients={"per_round": 1},
        algorithm={"name": "fedavg", "training": {"learning_rate": 0.1, "batch_size": 2, **(training or {"steps": 3})}},
    ).identity_toml()
    run = hashlib.sha256(plan.encode()).hexdigest()
    return codec.encode(Request(run, 0, 1, "t", "w", plan, base, 0, "", b"", (), 0, 0, False, b"", Train(1), 1))


def ask(folder: Path, message: bytes) -> Response:
    response = codec.decode(open_trainer(folder).handle(message))
    assert isinstance(response, Response)
    return response


@pytest.mark.parametrize(
    ("policy", "asked", "reason"),
    [
        ({"models": ["small", "x"]}, {}, 'models: the run asks for "tiny", and this site allows only "small", "x"'),
        ({"models": []}, {}, 'policy.models: the run asks for "tiny", and this site allows only nothing'),
        ({"model_sha256": ["cd" * 32]}, {}, f'model_sha256: the run asks for "{BASE}", and this site allows'),
        ({"methods": ["ferret"]}, {}, 'policy.methods: the run asks for "fedavg", and this site allows only "ferret"'),
        ({"most_steps": 2}, {}, "policy.most_steps=2: this site allows no more steps in a round, and"),
        ({"most_steps": 5}, {"epochs": 2, "accumulate": 100}, "the run asks for 6"),
        ({"most_steps": 5}, {"steps": 1, "accumulate": 100}, "the run asks for 100"),
        ({"fetch_models": False}, {"model": "packaged:smollm2"}, 'fetch_models=false: the run asks for the model'),
        ({"fetch_models": False}, {"model": "small"}, 'fetch_models=false: the run asks for the model "small"'),
        ({"fetch_models": False}, {"model": "owner/no-such"}, 'fetch_models=false: the run asks for the model "ow'),
    ],
)  # fmt: skip
def test_what_a_policy_excludes_is_refused_before_a_model_is_read(
    policy: Mapping[str, Any], asked: Mapping[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load", "skeleton"):
        monkeypatch.setattr(models, name, lambda *_, **__: pytest.fail("a model was read"), raising=False)
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    response = ask(write_site(tmp_path / "w", policy), request(**asked))
    assert response.status == "refused" and reason in response.reason and "\n" not in response.reason
    (_, refused) = read_audit(tmp_path / "w")
    assert reason in refused["note"]
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "w").rglob("recipe.toml"))


def test_what_a_policy_allows_runs_as_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = tree.fingerprint(tree.parameters(models.load("tiny").model))
    policy = {
        "models": ["tiny"],
        "model_sha256": [base],
        "methods": ["fedavg"],
        "most_steps": 3,
        "longest_round": 600.0,
    }
    limited = ask(write_site(tmp_path / "limited", {**policy, "fetch_models": False}), request(base=base))
    free = ask(write_site(tmp_path / "free", {}), request(base=base))
    assert (limited.status, free.status) == ("done", "done")
    assert codec.encode(codec.decode(limited.reply).payload) == codec.encode(codec.decode(free.reply).payload)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"method": ["ferret"]}, r"site\.toml: policy\.method: there is no such setting; did you mean .methods."),
        ({"methods": "ferret"}, r"site\.toml: policy\.methods=\"ferret\""),
        ({"most_steps": 0}, r"most_steps=0: must be greater than 0"),
        ({"longest_round": -1.0}, r"longest_round=-1\.0: must be greater than 0"),
        ({"model_sha256": ["ABC"]}, r'model_sha256="ABC": give 64 hexadecimal digits'),
        (True, r"policy=True: must be a table, \[policy\]"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(policy: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        read_site(write_site(tmp_path, policy))
    assert "\n" not in str(raised.value)


def test_a_refusal_is_one_failure_and_a_round_that_is_too_long_ends_and_leaves_no_trace(tmp_path: Path) -> None:
    def exclude(recipe: str, base: str) -> None:
        raise UserError("policy.methods: no")

    def transport(data: Mapping[str, Examples]) -> Direct:
        direct = sites(METHOD, 2, tmp_path)(data)
        direct.trainers["a"] = toy_trainer(METHOD, 2, {"a": data["a"]}, tmp_path / "a", "a", allow=exclude)
        direct.trainers["b"] = toy_trainer(METHOD, 2, {"b": data["b"]}, tmp_path / "b", "b", longest_round=1e-9)
        return direct

    run = simulate_sites(METHOD, 2, transport)
    for record in run.records:
        assert [failure.client for failure in record.failures] == ["a", "b"]
        excluded, late = (failure.reason for failure in record.failures)
        assert excluded == "UserError: policy.methods: no"
        assert late.startswith(
            "RunError: policy.longest_round=1e-09: the round asks for more than the 1e-09 s that this"
        )
    assert not list((tmp_path / "a").rglob("*.record")) and not list((tmp_path / "b").rglob("*.state"))


def test_a_round_that_is_short_enough_has_the_same_bits(tmp_path: Path) -> None:
    def transport(data: Mapping[str, Examples]) -> Direct:
        limit = {"longest_round": 1e9}
        return Direct(
            {name: toy_trainer(METHOD, 2, {name: rows}, tmp_path / name, name, **limit) for name, rows in data.items()}
        )

    patient = simulate_sites(METHOD, 2, transport)
    assert patient.public == simulate(METHOD, 2).public


def test_every_method_says_how_many_steps_a_round_has() -> None:
    from fedferret.algorithms.registry import catalogue, method

    for name in catalogue():
        batches = batches_per_round(method(name)(), 10)
        assert batches is not None and (batches > 0) == (name != "fedpft"), name  # that one trains at the server
    assert batches_per_round(object(), 10) is None

"""Runs in bf16, carried out in any way, and the precision of what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedferret import models
from fedferret.cli import app
from fedferret.core import tree
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.models.loading import hold_in_bf16
from fedferret.runner import Interrupted, run
from fedferret.tracking import checkpoint
from fedferret.tracking.events import read
from tiny_runs import silent, tiny_recipe

FEDAVG = {"name": "fedavg", "training": {"learning_rate": 0.02, "steps": 2}}


def weights(folder: Path, dtype: str = "auto") -> dict[str, torch.Tensor]:
    """What plain transformers finds there."""
    from transformers import AutoModelForCausalLM

    return tree.parameters(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def fingerprints(out: Path) -> list[str | None]:
    """Of the public state after each round."""
    return [read(out).rounds[number].fingerprint for number in sorted(read(out).rounds)]


@pytest.mark.parametrize("algorithm", [FEDAVG, {"name": "ferret", "coordinates": 512}], ids=lambda table: table["name"])
def test_a_bf16_run_has_the_same_bits_however_it_is_carried_out_and_is_exported_as_it_is(
    algorithm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In-process, debug, lean; stopped and resumed; a client in another process: ``test_workers...`` below."""
    changes: dict[str, Any] = {"algorithm": algorithm, "model": {"dtype": "bf16"}, "rounds": 2}
    losses = run(tiny_recipe(tmp_path, **changes), tmp_path / "run", silent)["eval_loss"]
    assert losses[-1] < losses[0]
    run(tiny_recipe(tmp_path, execution={"engine": "debug", "memory": "lean"}, **changes), tmp_path / "lean", silent)
    plain = checkpoint.save

    def stopping(folder: Path, state: Any) -> None:
        plain(folder, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stopping)
        with pytest.raises(Interrupted):
            run(tiny_recipe(tmp_path, **changes), tmp_path / "stopped", silent)
    run(tiny_recipe(tmp_path, **changes), tmp_path / "stopped", silent)
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "lean") == fingerprints(tmp_path / "stopped")
    public: Any = Experiment.load(tiny_recipe(tmp_path, **changes), tmp_path / "run", silent).initial_state().public
    fingerprint = tree.fingerprint(public.weights)
    assert export_folder(tmp_path / "run", tmp_path / "model", silent) == fingerprint
    assert tree.fingerprint(weights(tmp_path / "model")) == fingerprint
    export_delta(tmp_path / "run", tmp_path / "tuned.delta", silent)
    assert apply_delta("tiny", tmp_path / "tuned.delta", tmp_path / "again", silent) == fingerprint
    assert tree.fingerprint(weights(tmp_path / "again")) == fingerprint


@pytest.mark.slow(seconds=15)
def test_workers_have_the_bf16_bits_of_one_process(tmp_path: Path) -> None:
    for engine in ("in-process", "processes"):
        changes: dict[str, Any] = {"algorithm": FEDAVG, "model": {"dtype": "bf16"}, "execution": {"engine": engine}}
        run(tiny_recipe(tmp_path, **changes), tmp_path / engine, silent)
    assert fingerprints(tmp_path / "in-process") == fingerprints(tmp_path / "processes")


def test_an_fp32_run_over_a_bf16_base_is_exported_without_doubling_it_and_keeps_what_was_learned(
    tmp_path: Path,
) -> None:
    base = models.load("tiny")
    hold_in_bf16(base.model)
    models.save_folder(base, tmp_path / "base")
    model = {"name": str(tmp_path / "base")}
    algorithm = {"name": "fedavg", "training": {"learning_rate": 0.001, "steps": 2}}  # far below a rounding step
    run(tiny_recipe(tmp_path, rounds=1, algorithm=algorithm, model=model), tmp_path / "run", silent)

    def exported(name: str, *options: str) -> tuple[dict[str, torch.Tensor], str]:
        arguments = ["export", str(tmp_path / "run"), "--to", str(tmp_path / name), *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return weights(tmp_path / name), result.output

    whole, _ = exported("whole", "--dtype", "fp32")
    short, said = exported("short")
    again, _ = exported("again", "--dtype", "bf16")
    assert "Writing bf16, as the base is stored" in said
    assert {each.dtype for each in whole.values()} == {torch.float32}
    assert {each.dtype for each in short.values()} == {torch.bfloat16}
    assert tree.fingerprint(short) == tree.fingerprint(again)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "short", "whole")}
    assert sizes["short"] == sizes["base"] < 0.52 * sizes["whole"]
    before = weights(tmp_path / "base", "float32")
    learned, kept, nearest = (
        torch.cat([(after[name].to(how).float() - before[name]).view(-1) for name in before])
        for after, how in ((whole, torch.float32), (short, torch.bfloat16), (whole, torch.bfloat16))
    )
    assert abs(float(kept @ learned / (learned @ learned)) - 1) < 0.1  # in the mean, all of it
    assert float(nearest @ learned / (learned @ learned)) < 0.9  # the nearest values lose much

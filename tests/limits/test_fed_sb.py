"""Where Fed-SB becomes FedAvg, that its mean is exact, and that what the set-up hands over is the best of its rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fed_sb import FedSB, LatentAverage
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import product_gap
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.models.adapters import adapter_of, released, tuned_modules
from toys import Simulation, SquaredError, normal, simulate, toy_clients, toy_language_model, toy_model, toy_task

STEP = FirstOrder(learning_rate=0.1, steps=1, batch_size=100, clip=None)  # of all of a client's rows
FULL = FedSB(rank=4, set_up_examples=100, modules=("0",), training=STEP)  # the matrix is 16 x 4
ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
WEIGHT = "0.weight"


def merged(run: Simulation) -> Tensor:
    """The tuned matrix of a run's model, its product added."""
    with run.algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        return dict(released(copy.deepcopy(model)).named_parameters())[WEIGHT].detach()


def fedavg_step(data: Mapping[str, Examples] | None = None) -> Tensor:
    """The matrix after a round of FedAvg of it alone: one step along the mean gradient."""
    whole = toy_model()
    for name, weight in whole.named_parameters():
        weight.requires_grad_(name == WEIGHT)
    run = simulate(FedAvg(training=STEP), 1, task=Task.of(whole, SquaredError(), 1), data=data)
    return run.state.public.weights[WEIGHT].clone()


def before() -> Tensor:
    return toy_model().get_parameter(WEIGHT).detach()


def test_of_full_rank_its_first_step_is_fedavgs() -> None:
    """W - η B Bᵀ G Aᵀ A, and B and A span all that the mean gradient G does."""
    assert (fedavg_step() - before()).abs().max() > 1e-2
    torch.testing.assert_close(merged(simulate(FULL, 2)), fedavg_step(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged(simulate(replace(FULL, rank=1), 2)), fedavg_step(), atol=1e-4)


def test_with_a_first_step_the_set_up_itself_is_fedavgs_step() -> None:
    run = simulate(replace(FULL, first_step=0.1), 3, until=1)
    torch.testing.assert_close(merged(run), fedavg_step(), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged(simulate(FULL, 3, until=1)), before())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_first_step_of_one_client_is_the_best_of_its_rank(rank: int) -> None:
    """Eckart and Young: what is left of the step has the energy of the singular values that are left out."""
    one = {"a": toy_clients()["a"]}
    step = before() - fedavg_step(one)
    run = simulate(replace(FULL, rank=rank, first_step=0.1), 2, until=1, data=one)
    singular = torch.linalg.svdvals(step.double())
    left = float((step - (before() - merged(run))).norm())
    assert left == pytest.approx(math.sqrt(float(singular[rank:].square().sum())), rel=1e-3)
    assert run.state.public.figures["energy kept"] == pytest.approx(1.0)  # of what one client sent in this rank


def test_the_mean_of_the_small_matrices_is_the_mean_of_the_models() -> None:
    run = simulate(replace(FULL, rank=2, training=ADAM), 3, until=1)
    clients, small, products = [], [], []
    for client, rows in run.data.items():
        run.algorithm.client_update(run.task, run.state.public, None, rows, Key.of(1, client))
        a, b = factors(run.task.model)
        clients.append({"0": (a, b)})
        small.append(run.task.model.get_parameter("0.latent_r").detach().clone())
        products.append(b @ a)
    sizes = [float(len(rows)) for rows in run.data.values()]
    assert not torch.allclose(products[0], products[1], atol=1e-3)
    assert product_gap(clients, sizes) < 1e-6
    with torch.no_grad():
        run.task.model.get_parameter("0.latent_r").copy_(mean(small, sizes))
    a, b = factors(run.task.model)
    torch.testing.assert_close(b @ a, mean(products, sizes), rtol=1e-5, atol=1e-6)
    after, _ = factors_of(simulate(replace(FULL, rank=2, training=ADAM), 3, until=2))
    assert torch.equal(after, a)  # frozen


def mean(tensors: list[Tensor], sizes: list[float]) -> Tensor:
    return sum((size * each for size, each in zip(sizes, tensors, strict=True)), torch.zeros(())) / sum(sizes)


def factors(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A, and B R, of the one tuned module."""
    adapter = adapter_of(model)
    assert isinstance(adapter, adapters.Latent)
    (module,) = tuned_modules(model).values()
    a, b = adapter.factors(module)
    return a.detach().clone(), b.detach().clone()


def factors_of(run: Simulation) -> tuple[Tensor, Tensor]:
    with run.algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        return factors(model)


def test_without_a_set_up_it_is_fedavg_between_drawn_factors_to_the_bit() -> None:
    random = FedSB(rank=3, initialisation="random", modules=("0",), training=ADAM)
    ours, theirs = simulate(random, 3), simulate(FedAvg(training=ADAM), 3, task=toy_task(3, random))
    for name, weight in theirs.state.public.weights.items():
        assert torch.equal(ours.state.public.public.weights[name], weight) and weight.any()
    fewer = simulate(replace(random, bits=8), 3).state.public.public
    assert not torch.equal(fewer.weights["0.latent_r"], theirs.state.public.weights["0.latent_r"])


def test_what_is_handed_over_is_orthonormal_also_where_the_gradient_has_no_more_directions() -> None:
    run = simulate(FULL, 2, until=1)
    factors = run.state.public.public.factors
    a, b = factors["0.latent_a"], factors["0.latent_b"]
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
    gate = simulate(replace(FULL, rank=3, modules=("2",)), 2, until=1).state.public.public.factors  # of one output
    assert gate["2.latent_a"].norm(dim=1).min() > 0.1 and gate["2.latent_b"].abs().min() > 0


def test_smollm2s_bytes_are_those_of_the_small_matrices_alone() -> None:
    """210 modules of SmolLM2-135M, a bit a value."""
    for rank, expected in ((4, 420), (16, 6_720), (64, 107_520)):
        average = LatentAverage(rank=rank, modules=None, drawn=True, bits=1)
        assert average.wire_cost({str(number): (rank, rank) for number in range(210)}, 4, 2).up_most == expected


def test_peft_reads_what_is_exported_and_a_merged_model_computes_the_same(tmp_path: Path) -> None:
    import peft

    model = adapters.Latent(rank=2).attach(toy_language_model(), Key.of(5, "latent"))
    words = torch.arange(6)[None]
    torch.testing.assert_close(model(input_ids=words).logits, toy_language_model()(input_ids=words).logits)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(normal(Key.of(5, name), 2, 2))
    logits = model(input_ids=words).logits
    adapter: Any = adapter_of(model)
    adapter.export(model, "base", tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(toy_language_model(), tmp_path / "adapter")
    torch.testing.assert_close(read(input_ids=words).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(released(model)(input_ids=words).logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(toy_language_model()(input_ids=words).logits, logits, atol=1e-3)


def test_what_is_impossible_is_one_line() -> None:
    with pytest.raises(UserError, match='rounds=1: initialisation="gradient" takes round 1, and none is left'):
        FULL.check(toy_task(1, FULL).model, 1)
    with pytest.raises(UserError, match="rank=5: 0 has a side of 4"):
        replace(FULL, rank=5).check(toy_task(2, FULL).model, 2)
    with pytest.raises(UserError, match=r'first_step=0\.1: with initialisation="random" no gradient is known'):
        FedSB(first_step=0.1, initialisation="random")
    with pytest.raises(UserError, match='set_up_examples=5: with initialisation="random" there is no set-up'):
        FedSB(set_up_examples=5, initialisation="random")
    with pytest.raises(UserError, match=r"first_step=1e\+38: must be from 0, which is no step, to 1,000"):
        FedSB(first_step=1e38)
    with pytest.raises(UserError, match="set_up_examples=0: must be at least 1"):
        FedSB(set_up_examples=0)

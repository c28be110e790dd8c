"""Where SLoRA and SA-FedLoRA become something simpler, and that what a stage hands over is the best of its rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.lora_stage import LoRAStage
from fedferret.algorithms.sa_fedlora import LowerRank, SAFedLoRA
from fedferret.algorithms.slora import IntoFactors, SLoRA
from fedferret.algorithms.sparse_fedavg import SparseFedAvg
from fedferret.bases import masks
from fedferret.bases.low_rank import LowRank, Split, of_matrix, of_product
from fedferret.bases.masks import drawn_positions, num_drawn
from fedferret.core.errors import UserError
from fedferret.core.hand_over import HandedOver
from fedferret.core.keys import Key
from fedferret.core.log import Log
from fedferret.core.mapped import MappedTree
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import factors, released
from fedferret.wire import codec
from toy_sites import simulate_sites, sites
from toys import SHAPES, TRAINING, Simulation, SquaredError, bits, normal, shapes_of, simulate, toy_model, toy_task

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, weight_decay=0.1, steps=3, clip=None)
SLORA = SLoRA(
    sparse_rounds=2, density=0.3, rank=2, alpha=4, modules=("0",), sparse_training=ADAM, training=ADAM, mask="fixed"
)
FALLING = SAFedLoRA(
    full_rounds=1,
    heating_rounds=1,
    annealing_rounds=2,
    exponent=1.0,
    max_rank=3,
    min_rank=1,
    alpha=6,
    modules=("0",),
    full_training=TRAINING,
    training=ADAM,
)
FEDIT = FedIT(rank=2, alpha=4, modules=("0",), training=ADAM)
KEY = Key.of(9, "low rank")
SPLITS: tuple[Split, ...] = ("b", "balanced")


def inner(run: Simulation) -> bytes:
    """The present stage's public state."""
    return bits(run.state.public.public)


def sent(run: Simulation) -> list[Any]:
    """What clients sent and measured."""
    return [(record.bytes_up, record.metrics) for record in run.history()]


def test_slora_without_a_sparse_round_is_fedit_to_the_bit() -> None:
    ours, fedit = simulate(replace(SLORA, sparse_rounds=0), 3), simulate(FEDIT, 3)
    assert inner(ours) == fedit.public and sent(ours) == sent(fedit)
    assert inner(simulate(SLORA, 3)) != fedit.public


def test_sa_fedlora_of_one_rank_without_a_first_stage_is_fedit_to_the_bit() -> None:
    same = {"max_rank": 2, "min_rank": 2, "alpha": 4}
    ours, fedit = simulate(replace(FALLING, full_rounds=0, **same), 3), simulate(FEDIT, 3)  # type: ignore[arg-type]
    assert inner(ours) == fedit.public and sent(ours) == sent(fedit)


def test_sa_fedlora_of_the_first_stage_alone_without_a_pull_is_fedavg_to_the_bit() -> None:
    alone = replace(FALLING, full_rounds=3, mu=0.0, heating_rounds=0, annealing_rounds=0)
    ours, fedavg = simulate(alone, 3), simulate(FedAvg(training=TRAINING), 3)
    assert inner(ours) == fedavg.public and sent(ours) == sent(fedavg)
    assert inner(simulate(replace(alone, mu=0.5), 3)) != fedavg.public


def test_slora_of_density_1_begins_as_fedavg_of_the_matrices_to_the_bit() -> None:
    whole = toy_model()
    for name, weight in whole.named_parameters():
        weight.requires_grad_(name == "0.weight")
    fedavg = simulate(FedAvg(training=TRAINING), 2, task=Task.of(whole, SquaredError(), 2))
    ours = simulate(replace(SLORA, density=1.0, sparse_rounds=3, sparse_training=TRAINING), 4, until=2)
    assert torch.equal(ours.state.public.public.weights["0.weight"], fedavg.state.public.weights["0.weight"])


@pytest.mark.parametrize("mask", ["fixed", "per-round"])
def test_what_lies_off_the_mask_stays_as_it_was_to_the_bit(mask: Any) -> None:
    """With weight decay, which moves what has no gradient; one mask moves its share, masks of three rounds more."""
    run = simulate(replace(SLORA, mask=mask, sparse_rounds=4), 5, until=3)
    moved = run.state.public.public.weights["0.weight"] != toy_model().get_parameter("0.weight")
    one = num_drawn(64, 0.3)
    assert one == 19 and (moved.sum() == one if mask == "fixed" else one < moved.sum() <= 3 * one)
    if mask == "fixed":
        (places,) = SparseFedAvg(density=0.3)._places(run.task, run.state.public.public).values()
        assert torch.equal(moved.view(-1).nonzero().view(-1), places)
        before = run.state.public.public.weights["0.weight"].clone()
        run.algorithm.client_update(run.task, run.state.public, None, run.data["a"], KEY)  # what is not sent, too
        assert torch.equal(run.task.model.get_parameter("0.weight") != before, moved)
    with run.algorithm.model(run.task, run.state.public) as model:
        for name, weight in toy_model().named_parameters():
            assert name == "0.weight" or torch.equal(dict(model.named_parameters())[name], weight)  # type: ignore[union-attr]


def test_a_mask_has_its_share_everywhere_and_depends_on_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_PIECE", 1000)  # so that 10,500 values are drawn in eleven pieces
    drawn = drawn_positions(10_500, 0.0123, KEY)
    assert len(drawn) == num_drawn(10_500, 0.0123) == 129 and len(set(drawn.tolist())) == 129
    assert torch.equal(drawn, drawn.sort().values) and int(drawn[0]) >= 0 and int(drawn[-1]) < 10_500
    assert drawn.tolist() != drawn_positions(10_500, 0.0123, KEY.fold(1)).tolist()
    counts = torch.zeros(50)
    for number in range(400):
        counts[drawn_positions(50, 0.2, KEY.fold(number))] += 1
    assert counts.sum() == 4000 and (counts - 80).abs().max() < 4.5 * 8  # 400 draws of 0.2 each: 80, deviation 8
    assert len(drawn_positions(7, 0.001, KEY)) == 1 and drawn_positions(7, 1.0, KEY).tolist() == list(range(7))


def spectrum(*singular: float, rows: int = 12, columns: int = 8) -> Tensor:
    """A matrix with these singular values, between two orthonormal bases."""
    u, _ = torch.linalg.qr(normal(KEY.fold("u"), rows, columns).double())
    v, _ = torch.linalg.qr(normal(KEY.fold("v"), columns, columns).double())
    return (u * torch.tensor([*singular, *[0.0] * (columns - len(singular))], dtype=torch.float64)) @ v.T


def product(low: LowRank, scale: float) -> Tensor:
    return scale * low.b.double() @ low.a.double()


@pytest.mark.parametrize("split", SPLITS)
def test_a_gate_of_one_output_has_factors_of_any_rank(split: Split) -> None:
    gate = normal(KEY, 1, 8)
    low = of_matrix(gate, 3, 1.5, split, KEY)
    assert (low.a.shape, low.b.shape) == ((3, 8), (1, 3)) and low.a.norm(dim=1).min() > 0
    torch.testing.assert_close(product(low, 1.5), gate.double(), rtol=1e-5, atol=1e-6)
    lower = of_product(low.a, low.b, 1.5, 2.0, 2, split, KEY)
    torch.testing.assert_close(product(lower, 2.0), gate.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_factors_are_as_near_as_eckart_and_young_say_and_no_nearer(split: Split) -> None:
    values = [8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.1]
    matrix = spectrum(*values)
    for rank in (1, 3, 8):
        low = of_matrix(matrix, rank, 1.5, split, KEY)
        off, kept = math.hypot(*values[rank:]) if rank < 8 else 0.0, math.hypot(*values[:rank]) ** 2
        assert float((matrix - product(low, 1.5)).norm()) == pytest.approx(off, rel=1e-5, abs=1e-5)
        assert (low.retained, low.energy) == pytest.approx((kept, math.hypot(*values) ** 2), rel=1e-9)
        by_row = low.a.norm(dim=1), low.b.norm(dim=0)
        torch.testing.assert_close(by_row[0], torch.ones(rank) if split == "b" else by_row[1], rtol=1e-5, atol=1e-6)
        lower = of_product(low.a, low.b, 1.5, 0.5, max(1, rank - 1), split, KEY)
        again = of_matrix(product(low, 1.5), max(1, rank - 1), 0.5, split, KEY)
        torch.testing.assert_close(product(lower, 0.5), product(again, 0.5), rtol=1e-5, atol=1e-5)
        assert (lower.retained, lower.energy) == pytest.approx((again.retained, again.energy), rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_where_a_matrix_has_nothing_left_its_factors_can_still_learn(split: Split) -> None:
    for matrix, rank in ((spectrum(), 0), (spectrum(4.0, 1.0), 2)):
        low = of_matrix(matrix, 4, 2.0, split, KEY)
        torch.testing.assert_close(product(low, 2.0), matrix, rtol=1e-6, atol=1e-6)
        assert not low.b[:, rank:].any() and (low.a[rank:].abs().max() <= 8**-0.5) and low.a[rank:].norm(dim=1).all()


@pytest.mark.parametrize("split", SPLITS)
def test_at_a_rank_that_holds_all_of_it_the_hand_over_keeps_the_function(split: Split) -> None:
    """Over the base, to the bit; the update is in the factors alone."""
    method = replace(SLORA, rank=4, split=split)
    run, before = simulate(method, 3, until=2), simulate(replace(method, sparse_rounds=3), 4, until=2)
    rows = torch.linspace(-1, 1, 20).view(5, 4)
    with before.algorithm.model(before.task, before.state.public) as model:
        assert model is not None
        expected = model(rows)
    with run.algorithm.model(run.task, run.state.public) as model:
        assert model is not None
        torch.testing.assert_close(model(rows), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.get_parameter("0.base_layer.weight"), toy_model().get_parameter("0.weight"))
    assert not torch.allclose(toy_model()(rows), expected, atol=1e-3)
    assert run.state.public.figures == {"energy kept": pytest.approx(1.0)}


def test_the_energy_that_is_reported_is_that_of_the_update() -> None:
    run, before = simulate(SLORA, 3, until=2), simulate(replace(SLORA, sparse_rounds=3), 4, until=2)
    update = (before.state.public.public.weights["0.weight"] - toy_model().get_parameter("0.weight")).detach().double()
    weights = run.state.public.public.weights
    kept = 2 * weights["0.lora_B.default.weight"].double() @ weights["0.lora_A.default.weight"].double()
    share = float(kept.square().sum() / update.square().sum())
    assert 0.3 < share < 0.99 and run.state.public.figures == {"energy kept": pytest.approx(share, rel=1e-5)}
    assert float((update - kept).square().sum()) == pytest.approx((1 - share) * float(update.square().sum()), rel=1e-4)


def test_a_fall_of_the_rank_changes_the_product_by_the_singular_values_it_drops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falls: list[tuple[float, float]] = []
    plain = LowerRank.__call__

    def watched(self: LowerRank, task: Any, base: Any, finished: Any, public: Any, key: Key) -> Any:
        def of(weights: Any, scale: float) -> Tensor:
            a, b = (weights[f"0.lora_{part}.default.weight"].double() for part in "AB")
            return scale * b @ a

        handed = plain(self, task, base, finished, public, key)
        old, new = of(public.weights, 6 / finished.rank), of(handed.weights, 6 / self.following.rank)
        dropped = torch.linalg.svdvals(old)[self.following.rank :]
        falls.append((float((old - new).norm()), float(dropped.norm())))
        return handed

    monkeypatch.setattr(LowerRank, "__call__", watched)
    run = simulate(FALLING, 5)
    assert len(falls) == 2 and all(found == pytest.approx(dropped, rel=1e-5) for found, dropped in falls)
    assert all(dropped > 1e-3 for _, dropped in falls)
    assert {shape for _, shape in shapes_of(FALLING, 5)(5).items()} == {(1, 4), (16, 1)}
    assert set(run.state.public.figures) == {"rank", "energy kept"} and run.state.public.figures["rank"] == 1


def test_the_rank_falls_as_the_schedule_says() -> None:
    cubic = SAFedLoRA(heating_rounds=2, annealing_rounds=4, max_rank=16, min_rank=4)
    assert cubic.ranks() == ((16, 2), (9, 1), (6, 1), (4, None))  # 4 + 12 (27, 8, 1, 0) / 64: 9.06, 5.5, 4.19, 4
    assert replace(cubic, exponent=1.0).ranks() == ((16, 2), (13, 1), (10, 1), (7, 1), (4, None))
    assert replace(cubic, annealing_rounds=0).ranks() == ((16, 2), (4, None))
    assert replace(cubic, max_rank=4).ranks() == ((4, None),)


def test_costs_are_the_closed_form_in_every_round() -> None:
    """A mask of 19 of 64 values, then factors of rank 2; all 97 weights, then ranks 3, 2, 1: each to the byte."""
    expected = {
        SLORA: [(19, 19), (19, 40), (40, 40), (40, 40)],
        FALLING: [(97, 97), (60, 40), (40, 20), (20, 20), (20, 20)],
    }
    for method, values in expected.items():
        shapes, run = shapes_of(method, len(values)), simulate(method, len(values))
        assert shapes(1) == ({"0.weight": (16, 4)} if method is SLORA else SHAPES)
        for number, (up, down) in enumerate(values, start=1):
            cost = method.wire_cost(shapes(number), 3, number)
            assert (cost.up_least, cost.up_most) == (4 * up, 4 * up)
            assert (cost.down_least, cost.down_most) == (4 * down, 4 * down)
            (sent,) = set(run.records[number - 1].bytes_up.values())
            assert 4 * up < sent < 4 * up + 400


@pytest.mark.parametrize("method", [SLORA, FALLING], ids=["slora", "sa-fedlora"])
def test_the_server_alone_decomposes_and_every_node_has_its_bits(
    method: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LAPACK's last bits depend on machine and threads: every call here gives others, and all nodes agree."""
    calls, plain = [], torch.linalg.svd

    def svd(matrix: Tensor, **options: Any) -> Any:
        calls.append(matrix.shape)
        u, singular, v = plain(matrix, **options)
        return u * (1 + 1e-6 * len(calls)), singular, v

    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(Log, "_fold", lambda log, snapshot: None)  # so that sites apply every entry
    run = simulate_sites(method, 5, sites(method, 5, tmp_path))  # fingerprints are checked in every round
    assert len(calls) == (1 if method is SLORA else 2) and not any(record.failures for record in run.records)
    calls.clear()
    assert simulate(method, 5).public == run.public


def test_an_entry_of_another_round_is_refused() -> None:
    """Round 2 ends the sparse stage with factors; round 1 has an update."""
    run = simulate(SLORA, 4, until=1)
    update = codec.decode(codec.decode(run.state.log.since(0).records[0]).entry)
    for entry in (update, HandedOver({}, {})):
        with pytest.raises(ValueError, match="is no entry of this round of slora"):
            run.state.node.apply(entry)
        run = simulate(SLORA, 4, until=2)


@pytest.mark.parametrize("method", [SLORA, FALLING], ids=["slora", "sa-fedlora"])
def test_weights_that_wait_in_a_file_are_handed_over_to_the_same_bits(method: Any, tmp_path: Path) -> None:
    lean = Task.of(toy_task(5, method).model, SquaredError(), 5, lambda weights: MappedTree(tmp_path, weights))
    assert simulate(method, 5, task=lean).state.node.fingerprint() == simulate(method, 5).state.node.fingerprint()


def test_a_transposed_matrix_is_handed_over_as_the_module_holds_it() -> None:
    """GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    base, update = normal(KEY.fold("base"), 5, 3), normal(KEY.fold("update"), 5, 3)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(Conv1D(3, 5))
    with torch.no_grad():
        model[0].weight.copy_(base)
    sparse, lora = SparseFedAvg(modules=("0",)), LoRAStage(rank=3, alpha=6, modules=("0",))
    public, _ = sparse.init(Task.of(sparse.prepare(model, KEY), SquaredError(), 1), KEY)
    public.weights["0.weight"].add_(update)
    handed = IntoFactors(lora, "b")(Task.of(model, SquaredError(), 1), {"0.weight": base}, sparse, public, KEY)
    tuned = lora.prepare(model, KEY)
    for (a, b), module in ((pair, name) for name, pair in factors(tuned).items()):
        a.data.copy_(handed.weights[f"{module}.lora_A.default.weight"])
        b.data.copy_(handed.weights[f"{module}.lora_B.default.weight"])
    torch.testing.assert_close(released(tuned).get_parameter("0.weight"), base + update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        (SLORA, {"density": 0.0}, "density=0.0: must be above 0 and at most 1"),
        (SLORA, {"density": 1.5}, "density=1.5: must be above 0 and at most 1"),
        (SLORA, {"rank": 5}, "rank=5: 0 has 16 x 4 weights, .*at most rank 4; set rank=4 or less"),
        (SLORA, {"rank": 0}, "rank=0: must be at least 1"),
        (SLORA, {"sparse_rounds": 4}, "sparse_rounds=4: .*none is left to LoRA"),
        (SLORA, {"sparse_rounds": 5}, "sparse_rounds=5: the run has 4 rounds"),
        (SLORA, {"sparse_rounds": -1}, "sparse_rounds=-1: must not be negative"),
        (SLORA, {"modules": ("nowhere",)}, 'modules="nowhere": no linear module.*give some of these'),
        (FALLING, {"max_rank": 5}, "rank=5: 0 has 16 x 4 weights, .*at most rank 4"),
        (FALLING, {"min_rank": 4}, "min_rank=4, max_rank=3: a rank must not rise"),
        (FALLING, {"min_rank": 0}, "rank=0: must be at least 1"),
        (FALLING, {"heating_rounds": 2}, "rank 1 is reached in round 5 of 4"),
        (FALLING, {"heating_rounds": -1}, "heating_rounds=-1: must not be negative"),
        (FALLING, {"exponent": 0.0}, "exponent=0.0: must be above 0"),
        (FALLING, {"mu": -1.0}, "mu=-1.0: must not be negative"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(method: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        replace(method, **settings).check(toy_task(4, SLORA if method is SLORA else FALLING).model, 4)

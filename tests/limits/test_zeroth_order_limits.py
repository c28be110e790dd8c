"""Where zeroth-order methods become one another, or something simpler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedkseed import DecodedWalk, FedKSeed, FedKSeedEntry, FedKSeedPro, Walk, drawn, probabilities
from fedferret.algorithms.fedmezo import FedMeZO
from fedferret.algorithms.fedzo import FedZO
from fedferret.bases.gaussian import add_directions_, add_gaussian_
from fedferret.core import tree
from fedferret.core.algorithm import Pooled
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import MeanPool, NotFinite
from fedferret.core.tree import Tree
from fedferret.local.zeroth_order import ZerothOrder
from fedferret.wire import codec
from toys import SHAPES, simulate, toy_clients, toy_model, toy_task, weights

TRAINING = ZerothOrder(learning_rate=0.005, perturbation=1e-3, steps=20, batch_size=4)
FEDKSEED = FedKSeed(pool_size=64, training=TRAINING)
# a walk adds ±ε z three times where a replay adds nothing: some rounding of numbers up to 2, 20 times over
DRIFT = {"rtol": 0.0, "atol": 5e-6}


def base() -> dict[str, Tensor]:
    """The toy's weights before round 1, copied."""
    return tree.clone(tree.parameters(toy_model()))


def assert_close(left: Tree, right: Tree) -> None:
    assert list(left) == list(right)
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], **DRIFT)


def moved(ours: Tree) -> float:
    """How far from the base."""
    return sum(float((weight - ours[name]).square().sum()) for name, weight in base().items()) ** 0.5


def walked(method: FedKSeed, client: str, rounds: int = 1) -> tuple[Walk, dict[str, Tensor], Any]:
    """A client's reply in round 1, its own weights after that walk, and the public state."""
    task = toy_task(rounds)
    public, _ = method.init(task, Key.of(3, "begin"))
    reply = method.client_update(task, public, None, toy_clients()[client], Key.of(3, "local", 1, client))
    return reply.payload, tree.clone(tree.parameters(task.model)), public


@pytest.mark.parametrize("method", [FEDKSEED, replace(FEDKSEED, pool_size=3), FedKSeedPro(training=TRAINING)])
def test_fedkseeds_server_model_is_its_single_clients_own_walk(method: FedKSeed) -> None:
    only = toy_clients(1)
    server = weights(simulate(method, 1, data=only))
    _, own, _ = walked(method, "a")
    assert_close(server, own)
    assert moved(own) > 0.1


def test_replaying_the_seeds_and_gradients_from_the_base_gives_the_clients_own_weights() -> None:
    walk, own, public = walked(FEDKSEED, "b")
    replayed = base()
    for seed, gradient in zip(walk.seeds.tolist(), walk.gradients.tolist(), strict=True):
        add_directions_(replayed, Key(public.seed), [seed], torch.tensor([-TRAINING.learning_rate * gradient]))
    assert_close(replayed, own)


def test_fedkseed_is_fedavg_of_the_same_walks() -> None:
    """The mean over clients, weighted by examples, of where each of them went."""
    data = toy_clients()
    total = sum(len(rows) for rows in data.values())
    mean = tree.zeros_like(base())
    for client, rows in data.items():
        _, own, _ = walked(FEDKSEED, client)
        for name, weight in own.items():
            mean[name] += weight * (len(rows) / total)
    assert_close(weights(simulate(FEDKSEED, 1)), mean)


@pytest.mark.parametrize(
    "method", [FEDKSEED, FedKSeedPro(pool_size=300, training=replace(TRAINING, schedule="cosine"))]
)
def test_the_base_and_the_pool_are_the_model(method: FedKSeed) -> None:
    run = simulate(method, 4)
    rebuilt, public = base(), run.state.public
    assert int(public.pool.count_nonzero()) > 60
    add_directions_(rebuilt, Key(public.seed), range(method.pool_size), public.pool * -TRAINING.learning_rate)
    assert_close(public.weights, rebuilt)


def test_an_entry_is_added_direction_by_direction_in_the_seeds_order_bit_for_bit() -> None:
    task = toy_task(1)
    public, server = FEDKSEED.init(task, Key.of(3, "begin"))
    pool = MeanPool()
    for client in "abc":
        pool.add(walked(FEDKSEED, client)[0].decoded(), 1.0)
    _, entry = FEDKSEED.server_update(task, public, server, pool.result(), Key.of(1))
    expected, offset = base(), 0
    for weight in expected.values():
        for seed in range(64):
            factor = float(public_growth(entry)[seed] * torch.tensor(-TRAINING.learning_rate))
            if factor:
                add_gaussian_(weight, Key(public.seed), seed, factor, offset)
        offset += weight.numel()
    FEDKSEED.apply(task, public, codec.decode(codec.encode(entry)))
    for name, weight in expected.items():
        assert torch.equal(public.weights[name], weight)
    assert torch.equal(public.pool, public_growth(entry))


def public_growth(entry: FedKSeedEntry) -> Tensor:
    """Of FEDKSEED's pool, (64,), whichever form the entry has."""
    growth = torch.zeros(64)
    growth[entry.seeds.long() if len(entry.seeds) else slice(None)] = entry.values[0]
    return growth


@pytest.mark.parametrize("method", [FedKSeed(pool_size=500, training=TRAINING), FedKSeedPro(training=TRAINING)])
def test_an_entry_of_the_seeds_used_is_the_entry_of_all_and_shorter(method: FedKSeed) -> None:
    task = toy_task(1)
    public, server = method.init(task, Key.of(3, "begin"))
    pool = MeanPool()
    pool.add(walked(method, "a")[0].decoded(), 1.0)
    _, short = method.server_update(task, public, server, pool.result(), Key.of(1))
    assert 0 < len(short.seeds) <= 20 and short.seeds.tolist() == sorted(set(short.seeds.tolist()))
    every = torch.zeros(len(short.values), method.pool_size)
    every[:, short.seeds.long()] = short.values
    long = FedKSeedEntry(short.seeds[:0], every)
    assert codec.size(short) < codec.size(long)
    other, _ = method.init(task, Key.of(3, "begin"))
    method.apply(task, public, short)
    method.apply(task, other, long)
    assert codec.encode(public) == codec.encode(other)


def test_the_shorter_form_of_an_entry_is_taken_on_both_sides_of_the_border() -> None:
    """6 bytes a seed used or 4 a seed of the pool; with Pro 10 or 8."""
    for method, border in ((FEDKSEED, 64 * 4 / 6), (FedKSeedPro(pool_size=64, training=TRAINING), 64 * 8 / 10)):
        public, server = method.init(toy_task(1), Key.of(3, "begin"))
        for used in (1, int(border), int(border) + 1, 64):
            steps = (torch.arange(64) < used).float()
            mean: Any = Pooled((DecodedWalk(steps.clone(), steps.clone(), steps),), (1.0,))
            _, entry = method.server_update(toy_task(1), public, server, mean, Key.of(1))
            assert len(entry.seeds) == (used if used < border else 0)
            assert entry.values.shape[1] == (used if used < border else 64)


def test_pros_first_round_is_fedkseeds() -> None:
    """Before there is a history all seeds are equally probable; after it they are not."""
    plain, pro = FedKSeed(pool_size=300, training=TRAINING), FedKSeedPro(pool_size=300, training=TRAINING)
    rounds = [[weights(simulate(method, 2, until=until)) for method in (plain, pro)] for until in (1, 2)]
    assert all(torch.equal(weight, rounds[0][1][name]) for name, weight in rounds[0][0].items())
    assert not any(torch.equal(weight, rounds[1][1][name]) for name, weight in rounds[1][0].items())
    assert simulate(replace(plain, sampling="magnitude"), 2).public == simulate(pro, 2).public


def test_pros_magnitudes_are_the_mean_over_all_steps_so_far_after_a_first_zero() -> None:
    method = FedKSeedPro(pool_size=8, weighting="equal", training=TRAINING)
    histories: list[list[float]] = [[0.0] for _ in range(8)]
    task = toy_task(3)
    public, server = method.init(task, Key.of(3, "begin"))
    for number in range(3):
        pool = MeanPool()
        for client, rows in toy_clients().items():
            walk = method.client_update(task, public, None, rows, Key.of(3, number, client)).payload
            if number == 1:  # beyond the bound of the history, though not of the walk
                walk.gradients[0] = -5000.0
            pool.add(walk.decoded(), 1.0)
            for seed, gradient in zip(walk.seeds.tolist(), walk.gradients.tolist(), strict=True):
                histories[seed].append(min(abs(gradient), 1000.0))
        server, entry = method.server_update(task, public, server, pool.result(), Key.of(1))
        method.apply(task, public, entry)
        if number == 1:
            tree.copy_(public.weights, base())  # such a step leads nowhere
        expected = torch.tensor([sum(history) / len(history) for history in histories])
        torch.testing.assert_close(public.magnitudes, expected, rtol=1e-5, atol=1e-6)


def test_pros_probabilities_are_the_softmax_of_the_scaled_magnitudes_and_are_drawn() -> None:
    magnitudes = torch.tensor([3.0, 1.0, 5.0, 3.0, 1.0])
    expected = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.0], dtype=torch.float64).exp()
    expected /= expected.sum()
    torch.testing.assert_close(probabilities(magnitudes), expected, rtol=1e-9, atol=0)
    count = 20_000
    counts = torch.bincount(drawn(expected, count, Key.of(1)), minlength=5)
    chi_square = float(((counts - count * expected).square() / (count * expected)).sum())
    assert 0.2 < chi_square < 18  # 4 degrees of freedom
    for number in (1, 7, 4096):  # equal magnitudes, whatever they are
        assert torch.equal(probabilities(torch.full((number,), 2.5)), probabilities(torch.zeros(number)))
        found = drawn(probabilities(torch.zeros(number)), count, Key.of(2))
        assert torch.equal(found, (Key.of(2).uniform(count) * number).long())


def test_fedmezo_with_one_client_is_training_alone() -> None:
    data = toy_clients()["b"]
    run = simulate(FedMeZO(training=TRAINING), 3, data={"b": data})
    alone = toy_task(3)
    for number in range(1, 4):
        TRAINING.train(alone, data, Key.of(3, "local", number, "b").fold("train"))
    assert_close(weights(run), tree.parameters(alone.model))


def test_the_methods_start_from_their_papers_settings() -> None:
    paper = ZerothOrder(learning_rate=3e-7, perturbation=5e-4, steps=200, batch_size=1)
    assert FedKSeed() == FedKSeed(pool_size=4096, training=paper)
    assert FedKSeedPro() == FedKSeedPro(pool_size=4096, sampling="magnitude", training=paper)
    assert FedZO() == FedZO(training=replace(paper, difference="forward"))
    assert FedMeZO() == FedMeZO(training=replace(paper, perturbation=1e-3, steps=30))


def test_fedzo_with_a_small_perturbation_is_fedmezo() -> None:
    """Forward and central differences along the same directions have one limit: halfway there, half as far apart."""

    def distance(perturbation: float) -> float:
        training = replace(TRAINING, perturbation=perturbation, steps=5, learning_rate=0.001)
        central = weights(simulate(FedMeZO(training=training), 1))
        forward = weights(simulate(FedZO(training=replace(training, difference="forward")), 1))
        return sum(float((weight - forward[name]).square().sum()) for name, weight in central.items()) ** 0.5

    assert distance(0.1) / distance(0.05) == pytest.approx(2, rel=0.15)
    assert distance(0.01) < 0.02 * moved(weights(simulate(FedMeZO(training=TRAINING), 1)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seeds": torch.zeros(19, dtype=torch.int16)}, "another length or pool"),
        ({"gradients": torch.zeros(20, 1)}, "another length or pool"),
        ({"pool_size": 63}, "another length or pool"),
        ({"seeds": torch.zeros(20, dtype=torch.int32)}, "seeds of torch.int32"),
        ({"gradients": torch.zeros(20, dtype=torch.float64)}, "gradients of torch.float64"),
        ({"seeds": torch.full((20,), 64, dtype=torch.int16)}, "not among the pool's 64"),
        ({"seeds": torch.full((20,), -1, dtype=torch.int16)}, "not among the pool's 64"),
        ({"gradients": torch.full((20,), torch.nan)}, "gradients holds NaN or infinity"),
        ({"gradients": torch.full((20,), -torch.inf)}, "gradients holds NaN or infinity"),
    ],
)
def test_a_walk_that_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    walk, _, public = walked(FEDKSEED, "a")
    FEDKSEED.accept(toy_task(1), public, walk)
    with pytest.raises((ValueError, NotFinite), match=reason):
        FEDKSEED.accept(toy_task(1), public, replace(walk, **change))
        MeanPool().add(replace(walk, **change).decoded(), 1.0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"training.weight_decay=0.1: no sum of directions decays; set it to 0"):
        FedKSeed(training=replace(TRAINING, weight_decay=0.1))
    for size in (0, 2**31):
        with pytest.raises(UserError, match=f"pool_size={size}: must lie between 1 and 2147483647"):
            FedKSeed(pool_size=size)


def test_a_round_is_as_cheap_as_the_paper_says() -> None:
    """Under 18 KB up and down with the defaults, whatever the model and however many clients a round has."""
    for cohort in (1, 4, 50, 1000):
        cost = FedKSeed().wire_cost(SHAPES, cohort, 1)
        assert cost.up_least == cost.up_most == 200 * 6 and cost.down_most == min(cohort * 200 * 6, 4096 * 4)
        assert cost.up_most + cost.down_most < 18_000
    assert FedKSeedPro().wire_cost(SHAPES, 4, 1).down_most == 800 * 10
    assert FedKSeed(pool_size=32_768).wire_cost(SHAPES, 1, 1).up_most == 200 * 6
    assert FedKSeed(pool_size=32_769).wire_cost(SHAPES, 1, 1).up_most == 200 * 8
    (up,) = {size for record in simulate(FEDKSEED, 2).records for size in record.bytes_up.values()}
    assert 0 < up - FEDKSEED.wire_cost(SHAPES, 3, 1).up_most < 140

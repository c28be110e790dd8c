"""FedLog: its head is the most probable one, its statistics are those of the pooled data, and no body travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedferret.algorithms.fedlog import FedLog
from fedferret.algorithms.fedlog_head import most_probable_head, random_head, residual
from fedferret.algorithms.fedlog_messages import FedLogSums
from fedferret.config import build_algorithm
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import basic_pool, leaves
from fedferret.engines.in_process import InProcess
from fedferret.local.first_order import FirstOrder
from fedferret.models.private_body import PrivateBodyClassifier
from toys import (
    HELD_OUT,
    ToyData,
    bits,
    normal,
    simulate,
    toy_classifier,
    toy_clients,
    toy_language_model,
    toy_rows,
    toy_task,
)

ADAM = FirstOrder(optimizer="adamw", learning_rate=0.05, steps=3, clip=None)
FEDLOG = FedLog(training=ADAM)


def drawn_means(classes: int, width: int, scale: float) -> Tensor:
    """Means of statistics that nothing arranged, in fp64."""
    return scale * normal(Key.of(1, classes), classes, width).double() / classes


@pytest.mark.parametrize(("classes", "width", "scale"), [(2, 3, 1.0), (10, 51, 1.0), (10, 51, 1e-4), (40, 9, 20.0)])
def test_the_head_is_where_the_gradient_of_the_papers_objective_is_zero(classes: int, width: int, scale: float) -> None:
    """A(η) - <η, t> is convex: there is no other such place."""
    means = drawn_means(classes, width, scale)
    head = most_probable_head(means).requires_grad_()
    objective = torch.logsumexp(head.square().sum(dim=1) / 4, dim=0) - (head * means).sum()
    (gradient,) = torch.autograd.grad(objective, head)
    assert float(gradient.abs().max()) < 1e-9 and residual(means, head.detach()) < 1e-9
    assert residual(means, 1.01 * head.detach()) > 1e-3 * float(means.abs().max())


@pytest.mark.parametrize("classes", [10, 1000])
def test_of_normalised_features_even_the_rounded_head_is_within_a_millionth(classes: int) -> None:
    """What a default run does: unit features, a constant 1, sums in fp32, the head in fp32."""
    labels = torch.arange(3 * classes) % classes
    features = functional.normalize(normal(Key.of(2), len(labels), 84), dim=1)
    constant = torch.ones(len(labels), 1)
    sums = torch.zeros(classes, 85).index_add_(0, labels, torch.cat((features, constant), dim=1))
    means = sums.double() / len(labels)
    head = most_probable_head(means)
    assert residual(means, head) < 1e-12 and residual(means, head.float()) < 1e-6
    assert residual(means, most_probable_head(means).half()) > 1e-6  # so coarse a head would be seen


def test_balanced_classes_with_means_of_one_length_have_twice_their_means_as_head() -> None:
    means = torch.nn.functional.normalize(drawn_means(5, 7, 1.0), dim=1)
    torch.testing.assert_close(most_probable_head(means / 5), 2 * means, rtol=0, atol=1e-12)


def test_classes_that_change_places_change_rows_and_an_absent_class_has_none() -> None:
    means = drawn_means(6, 5, 1.5)
    means[2] = 0
    head, order = most_probable_head(means), torch.tensor([3, 5, 2, 0, 1, 4])
    torch.testing.assert_close(most_probable_head(means[order]), head[order], rtol=0, atol=1e-12)
    assert not head[2].any() and head[[0, 1, 3, 4, 5]].any(dim=1).all()


def test_the_head_that_drew_the_data_is_found_again() -> None:
    """y ~ softmax(‖η‖² / 4), x | y ~ N(η_y / 2, 1 / 2); the last feature is drawn like the others."""
    true, count, key = 1.5 * normal(Key.of(3), 3, 4).double(), 40_000, Key.of(4)
    shares = (true.square().sum(dim=1) / 4).softmax(dim=0)
    y = torch.bucketize(key.fold("y").uniform(count), shares.cumsum(dim=0)).clamp(max=2)
    x = true[y] / 2 + normal(key.fold("x"), count, 4) / 2**0.5
    sums = torch.zeros(3, 4, dtype=torch.float64).index_add_(0, y, x)
    torch.testing.assert_close(most_probable_head(sums / count), true, rtol=0, atol=0.06)


def sums_of(data: Any, algorithm: FedLog = FEDLOG) -> Tensor:
    """What a client with this data sends in a first round of statistics."""
    task = toy_task(1, algorithm)
    public, _ = algorithm.init(task, Key.of(1))
    client = algorithm.init_client(task, public, data, Key.of(1))
    payload = algorithm.client_update(task, public, client, data, Key.of(1)).payload
    algorithm.accept(task, public, payload)
    return payload.sums


def test_clients_sums_add_up_to_those_of_all_data_whatever_the_partition() -> None:
    whole = toy_rows(Key.of(9), 40)
    for parts in ([40], [1, 39], [13, 7, 20]):
        pool, first = basic_pool(FEDLOG.pooling), 0
        for size in parts:
            pool.add(FedLogSums(sums_of(whole.take(range(first, first + size)))), 1.0)
            first += size
        torch.testing.assert_close(pool.result().only.sums, sums_of(whole), rtol=1e-5, atol=1e-6)
        assert torch.equal(pool.result().only.sums[:, -1], torch.bincount(labels(whole), minlength=3).float())


def labels(data: ToyData) -> Tensor:
    return next(data.batches(len(data), None)).labels


def test_a_class_without_an_example_has_a_row_of_zeros_and_is_named() -> None:
    rows = toy_rows(Key.of(9), 40)
    without = rows.take([row for row, label in enumerate(labels(rows)) if label != 1])
    assert not sums_of(without)[1].any() and sums_of(without)[[0, 2]].any(dim=1).all()
    run = simulate(FEDLOG, 1, data={"a": without})
    assert not run.state.public.head[1].any()
    assert "have no example of class 1 (from 0), so its logit is 0" in str(FEDLOG.note(run.state.public))
    assert FEDLOG.note(simulate(FEDLOG, 1, data={"a": rows}).state.public) is None


def test_a_class_without_an_example_in_a_round_keeps_its_sums_unless_they_shall_be_zero() -> None:
    rows = toy_rows(Key.of(9), 40)
    parts = {str(label): rows.take([row for row, each in enumerate(labels(rows)) if each == label]) for label in (0, 1)}
    cohorts, later = (["0"], ["1"]), ["0", "1"]
    for absent, kept in (("keep", [True, True, False]), ("zero", [False, True, False])):
        algorithm = replace(FEDLOG, absent=absent)
        public, server = algorithm.init(task := toy_task(2, algorithm), Key.of(1))
        for cohort in cohorts:
            pool = basic_pool(algorithm.pooling)
            for client in cohort:
                pool.add(FedLogSums(sums_of(parts[client], algorithm)), 1.0)
            server, entry = algorithm.server_update(task, public, server, pool.result(), Key.of(1))
        assert entry.head.any(dim=1).tolist() == kept
    all_in = [
        simulate(replace(FEDLOG, absent=absent), 2, data={each: parts[each] for each in later})
        for absent in ("keep", "zero")
    ]
    assert all_in[0].public == all_in[1].public


def test_the_same_data_twice_gives_the_same_head() -> None:
    rows = toy_rows(Key.of(9), 40)
    once = simulate(FEDLOG, 3, data={"a": ToyData(rows.x, rows.y, shuffled=False)})
    twice = simulate(FEDLOG, 3, data={name: ToyData(rows.x, rows.y, shuffled=False) for name in "ab"})
    assert twice.public == once.public


def test_no_body_is_on_the_wire_and_the_head_stays_fixed_while_it_trains() -> None:
    """All values that crossed in either direction: the sums and the head, each of the formula's size."""
    crossed: list[Any] = []

    class Watching(InProcess):
        def work(self, state: Any, client: str, body: Any, data: Any) -> tuple[Any, Any]:
            reply, private = super().work(state, client, body, data)
            crossed.extend([reply, state.public])
            return reply, private

    run = simulate(replace(FEDLOG, features=5), 3, engine=Watching)
    body = run.store.get("b").weights
    assert set(body) == {"inner.body.0.weight", "inner.body.0.bias", "projection.weight", "projection.bias"}
    tensors = [leaf for value in crossed for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
    assert len(tensors) == 18 and {tensor.shape for tensor in tensors} == {(3, 6)}
    cost = run.algorithm.wire_cost(tree.shapes(tree.parameters(run.task.model)), 3, 3)
    assert (cost.up_most, cost.down_most) == (4 * 3 * 6, 4 * 3 * 6)
    task = run.state.node.task
    run.algorithm.client_update(task, run.state.public, run.store.get("b"), run.data["b"], Key.of(1))
    head: Any = run.task.model.head  # as the client's training left it
    assert torch.equal(head.weight, run.state.public.head[:, :-1])
    assert torch.equal(head.bias, run.state.public.head[:, -1]) and head.weight.requires_grad


def test_sums_that_no_examples_have_are_refused() -> None:
    """Beside those that ``tests/contract`` makes of every payload."""
    task = toy_task(1, FEDLOG)
    public, _ = FEDLOG.init(task, Key.of(1))
    good = sums_of(toy_rows(Key.of(9), 40))
    for row, column, value, words in (
        (0, 6, float(good[0, 6]) + 0.5, "whole"),
        (0, 6, -1.0, "whole"),
        (0, 6, 2.0**25, "at most 16,777,216"),
        (1, 6, 0.0, "a class without an example has sums"),
    ):
        sums = good.clone()
        sums[row, column] = value
        with pytest.raises(ValueError, match=words):
            FEDLOG.accept(task, public, FedLogSums(sums))


def test_every_client_begins_from_the_first_body_whoever_worked_before() -> None:
    run = simulate(replace(FEDLOG, start="random", features=5), 1)
    first = toy_task(1, run.algorithm).model
    assert isinstance(first, PrivateBodyClassifier)
    client = run.algorithm.init_client(run.task, run.state.public, run.data["a"], Key.of(1))
    assert bits(client.weights) == bits(first.private()) != bits(run.store.get("a").weights)


def test_the_first_round_is_of_statistics_or_of_a_drawn_head() -> None:
    first = tree.clone(dict(toy_classifier().named_parameters()))
    for start, moved in (("statistics", False), ("random", True)):
        algorithm = replace(FEDLOG, start=start)
        public, _ = algorithm.init(toy_task(1, algorithm), Key.of(5))
        assert torch.equal(public.head, random_head(3, 7, Key.of(5)) if moved else torch.zeros(3, 7))
        body = simulate(algorithm, 1).store.get("a").weights["inner.body.0.weight"]
        assert torch.equal(body, first["body.0.weight"]) != moved


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"normalise": "none"}, None),
        ({"normalise": "l2"}, 2**0.5),
        ({"normalise": "layer-norm"}, 7**0.5),
        ({"normalise": "none", "clamp": 0.5}, (1 + 6 * 0.25) ** 0.5),
        ({"normalise": "layer-norm", "clamp": 0.5}, (1 + 6 * 0.25) ** 0.5),
    ],
)
def test_one_example_moves_the_sums_by_no_more_than_the_sensitivity(settings: Any, bound: float | None) -> None:
    algorithm = replace(FEDLOG, **settings)
    assert algorithm.sensitivity(6) == (bound and pytest.approx(bound))
    if bound is None:
        return
    rows = toy_rows(Key.of(9), 12)
    far = ToyData(100 * rows.x, rows.y)
    others = [[other for other in range(12) if other != one] for one in range(12)]
    steps = [float((sums_of(far, algorithm) - sums_of(far.take(rest), algorithm)).norm()) for rest in others]
    assert 0.9 * bound < max(steps) <= bound + 1e-5
    task = toy_task(1, algorithm)
    public, _ = algorithm.init(task, Key.of(1))
    for wrong in (1.01, -1.01):
        with pytest.raises(ValueError, match="longer than its number of examples allows"):
            sums = torch.full((3, 7), wrong * (bound**2 - 1) ** 0.5 / 6**0.5)
            sums[:, -1] = 1
            algorithm.accept(task, public, FedLogSums(sums))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": 0}, r"features=0: allowed are 1 to 65,536"),
        ({"features": 10**9}, r"features=1000000000: allowed are 1 to 65,536"),
        ({"clamp": 0.0}, r"clamp=0.0: must be greater than 0"),
        ({"bodies": ["lenet"]}, r'"lenet" is no image model; did you mean "lenet5"'),
        ({"bodies": ["lenet5", "conv4"]}, r"different numbers of features \(lenet5 84, conv4 256\); give features"),
        ({"bodies": ["lenet5"], "over": "fedit"}, "give one of the two"),
        ({"over": "fedsa-lora"}, "leaves weights with each client"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_algorithm("fedlog", settings)


def test_a_body_that_never_changes_is_for_one_round() -> None:
    model: Any = toy_classifier()
    model.freeze()
    prepared = FEDLOG.prepare(model, Key.of(1))
    FEDLOG.check(prepared, 1)
    with pytest.raises(UserError, match=r"rounds=3: the body is frozen.*set rounds=1"):
        FEDLOG.check(prepared, 3)
    with pytest.raises(UserError, match="needs a classifier, not a LlamaForCausalLM"):
        FEDLOG.prepare(toy_language_model(), Key.of(1))


def test_features_that_are_not_finite_are_that_clients_failure() -> None:
    data: dict[str, Any] = toy_clients()
    data["ab"] = ToyData(data["a"].x * torch.inf, data["a"].y)
    run = simulate(FEDLOG, 1, data=data)
    (failure,) = run.records[0].failures
    assert failure.client == "ab" and "NaN or infinity" in failure.reason
    assert run.public == simulate(FEDLOG, 1).public


def test_the_plain_architecture_is_given_back_where_it_has_a_place() -> None:
    run = simulate(replace(FEDLOG, normalise="none", over={"name": "fedit", "rank": 1, "modules": ["0"]}), 2)
    with run.algorithm.model(run.task, run.state.public, run.store.get("a")) as model, torch.no_grad():
        assert model is not None and set(run.store.get("a").weights) == {
            name for name in model.private() if "lora" in name
        }
        logits = model(HELD_OUT)
        plain = run.algorithm.release(model)
        torch.testing.assert_close(plain(HELD_OUT), logits, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in toy_classifier().named_parameters()}
    with pytest.raises(UserError, match="the plain model has no place"):
        FEDLOG.release(toy_task(1, FEDLOG).model)

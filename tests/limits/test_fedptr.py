"""FedPTR: FedAvg without a pull, FedProx without a projection, and a set that mimics a step of the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret import models
from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedprox import FedProx
from fedferret.algorithms.fedptr import FedPTR, FedPTREntry
from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm, Pooled
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import tensors
from fedferret.local import trajectory_matching
from fedferret.local.trajectory_matching import (
    AuxiliarySet,
    first_set,
    followed,
    matched,
    mismatch,
    projected,
    unrolled,
)
from fedferret.wire import codec
from toys import INPUTS, SHAPES, TRAINING, bits, normal, simulate, toy_clients, toy_model, toy_task

TRAINED = replace(TRAINING, steps=3)
FEDPTR = FedPTR(mu=0.5, matching_steps=4, inner_steps=2, projection_steps=2, examples_per_class=1, training=TRAINED)
ROUNDS = 3


def weights_of(algorithm: AnyAlgorithm, rounds: int = ROUNDS, **options: Any) -> bytes:
    """The global weights of a run on the toy classifier, to the bit."""
    run = simulate(algorithm, ROUNDS, task=toy_task(ROUNDS, FEDPTR), until=rounds, **options)
    return bits(dict(run.state.public.weights))


@pytest.mark.parametrize("where", ["client", "server"])
def test_without_a_pull_it_is_fedavg_and_without_a_projection_fedprox_to_the_bit(where: Any) -> None:
    fedptr, fedprox = replace(FEDPTR, where=where), FedProx(mu=0.5, training=TRAINED)
    assert weights_of(replace(fedptr, mu=0.0)) == weights_of(FedAvg(training=TRAINED))
    assert weights_of(replace(fedptr, projection_steps=0)) == weights_of(fedprox)
    for limit in ({"mu": 0.0}, {"projection_steps": 0}):  # no more is sent or kept than there
        assert replace(fedptr, **limit).wire_cost(SHAPES, 3, 1) == fedprox.wire_cost(SHAPES, 3, 1)
    # nothing is matched before the second round: in the first the pull is to the first weights
    assert weights_of(fedptr, 1) == weights_of(fedprox, 1) and weights_of(fedptr, 2) != weights_of(fedprox, 2)


def test_the_extrapolated_target_is_the_closed_form() -> None:
    """The clients' weights after a round are those of FedAvg's steps with μ (w - (2 w_t - w_t-1)) in every gradient."""
    extrapolated = replace(FEDPTR, target="extrapolated")
    first = simulate(extrapolated, 3, until=1).state.public.weights
    run = simulate(extrapolated, 3, until=2)
    public, rows = run.state.public, toy_clients()["b"]
    sent = extrapolated.client_update(run.task, public, None, rows, Key.of(1)).payload.delta

    def adjust(parameters: Any) -> None:
        for name, weight in parameters.items():
            weight.grad += 0.5 * (weight.detach() - 2 * public.weights[name] + first[name])

    tree.copy_(tree.parameters(run.task.model), public.weights)
    trained = TRAINED.train(run.task, rows, Key.of(1).fold("train"), adjust=adjust)
    for name, delta in tree.difference(public.weights, trained.weights):
        torch.testing.assert_close(sent[name], delta)


def test_a_set_follows_from_public_weights_and_no_example() -> None:
    """Clients with other rows arrive at the same set from the same set."""
    run = simulate(FEDPTR, 3, until=2)
    before, data = run.store.get("a"), toy_clients()
    sets = [
        run.algorithm.client_update(run.task, run.state.public, before, rows, Key.of(2, name)).client
        for name, rows in data.items()
    ]
    assert bits(sets[0]) == bits(sets[1]) == bits(sets[2]) != bits(before)
    assert bits(run.store.get("a")) != bits(run.store.get("b"))  # they began from other noise


def test_the_servers_target_travels_and_is_that_of_its_set() -> None:
    server = replace(FEDPTR, where="server")
    run = simulate(server, 3, until=2)
    task, public = run.task, run.state.public
    reply = server.client_update(task, public, None, run.data["a"], Key.of(1))
    pooled = Pooled((reply.payload,), (1.0,))
    after, entry = server.server_update(task, public, run.state.server, pooled, Key.of(1))
    assert isinstance(entry, FedPTREntry) and after is not None and reply.client is None
    server.apply(task, public, codec.decode(codec.encode(entry)))
    target = projected(task.model, public.weights, after, server.projection_steps)
    assert bits(dict(public.target)) == bits(target) != bits(dict(public.weights))
    cost = server.wire_cost(tree.shapes(public.weights), 3, 1)
    assert cost.down_most == 2 * cost.up_most == sum(4 * each.numel() for _, each in tensors(entry))


class TwoLayers(nn.Module):
    """Two layers without biases, fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(normal(Key.of(each), 3, 3).double()) for each in (1, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.first) @ self.second


def test_the_gradient_of_the_mismatch_is_that_of_finite_differences() -> None:
    """With respect to every part of the set, through three inner steps."""
    model = TwoLayers()
    start = tree.parameters(model)
    end = {name: weight + 0.1 * normal(Key.of(3, name), 3, 3).double() for name, weight in start.items()}

    def loss(inputs: Tensor, labels: Tensor, log_rate: Tensor) -> Tensor:
        return mismatch(model, start, end, AuxiliarySet(inputs, labels, log_rate), 3)

    parts = (normal(Key.of(4), 4, 3).double(), normal(Key.of(5), 4, 3).double(), torch.tensor(-1.0).double())
    assert torch.autograd.gradcheck(loss, tuple(part.requires_grad_() for part in parts))


def a_step(task: Any, rate: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after ten steps of training on a client's rows."""
    start = tree.clone(tree.parameters(task.model))
    trained = replace(TRAINING, learning_rate=rate, steps=10).train(task, toy_clients()["c"], Key.of(1))
    return start, tree.clone(trained.weights)


def test_matching_explains_a_step_and_a_tiny_inner_rate_explains_nothing() -> None:
    task = toy_task(1, FEDPTR)
    start, end = a_step(task)
    tiny, begun = (first_set((INPUTS,), 1.0, 3, 2, rate, Key.of(1), torch.device("cpu")) for rate in (1e-6, 0.1))
    assert mismatch(task.model, start, end, tiny, 3).item() == pytest.approx(1, abs=1e-4)
    found, least = matched(task.model, start, end, begun, steps=20, inner_steps=3, rate=0.05)
    assert least < 0.9 and least < mismatch(task.model, start, end, begun, 3).item()
    assert least == pytest.approx(mismatch(task.model, start, end, found, 3).item())
    # steps that are far too long lose nothing: the best set is kept
    _, still = matched(task.model, start, end, found, steps=0, inner_steps=3, rate=0.05)
    for rate in (5.0, 1e30):
        assert matched(task.model, start, end, found, steps=3, inner_steps=3, rate=rate)[1] == still < 0.9


def test_as_many_examples_as_dimensions_explain_a_linear_models_step() -> None:
    """One step on n examples can be any sum of n outer products, so n = dimensions reach any step of such a model."""
    model = nn.Linear(3, 2, bias=False)
    start = {"weight": torch.zeros(2, 3)}
    row = torch.tensor([0.2, -0.1, 0.05])
    end = {"weight": torch.stack((row, -row))}  # a gradient of cross-entropy adds up to 0 over classes
    begun = first_set((3,), 1.0, 2, 2, 0.1, Key.of(1), torch.device("cpu"))
    by_hand = 0.1 * (begun.labels.softmax(dim=1) - 0.5).T @ begun.inputs / 4  # at weights 0 both classes have 1/2
    torch.testing.assert_close(unrolled(model, start, begun, 1, False)["weight"], by_hand)
    found, least = matched(model, start, end, begun, steps=300, inner_steps=1, rate=0.05)
    assert least < 1e-3
    # where the gradient is constant, as many further steps lead on by the same step: momentum
    further = unrolled(model, end, found, 1, False)["weight"] - end["weight"]
    assert float(nn.functional.cosine_similarity(further[0], row, dim=0)) > 0.9


class Root(nn.Module):
    """Two logits, plus and minus the root of a weight: at 0 the gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat((inputs, -inputs), dim=1) * self.weight.sqrt()


def test_where_nothing_follows_the_target_is_the_last_weights() -> None:
    """Nothing moved, or by rounding; the projection of an explained step is infinite; the weights are NaN."""
    model = Root()
    start = tree.parameters(model)
    begun = AuxiliarySet(torch.ones(2, 1), torch.tensor([[0.0, 3.0], [0.0, 3.0]]), torch.tensor(0.0))

    def ahead(end: dict[str, Tensor]) -> tuple[AuxiliarySet, Any]:
        return followed(model, start, end, begun, steps=3, inner_steps=1, further_steps=1, rate=0.05)

    zero, rounded = {"weight": torch.zeros(1)}, {"weight": torch.tensor([1 - 2**-22])}
    for end in (start, rounded, zero, {"weight": torch.tensor([torch.nan])}):
        assert ahead(end)[1] is end
    assert mismatch(model, start, zero, ahead(zero)[0], 1).item() < 1e-6
    assert ahead({"weight": torch.tensor([0.9])})[1]["weight"] < 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner_steps": 0}, "inner_steps=0: must be at least 1"),
        ({"matching_steps": 0}, "matching_steps=0: must be at least 1"),
        ({"examples_per_class": 0}, "examples_per_class=0: must be at least 1"),
        ({"projection_steps": -1}, "projection_steps=-1: must not be negative; 0 is FedProx"),
        ({"matching_rate": 0.0}, "matching_rate=0.0: must be greater than 0"),
        ({"mu": -1.0}, "mu=-1.0: must not be negative"),
        ({"where": "server", "target": "extrapolated"}, "nothing is matched"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(FEDPTR, **settings)


def test_a_model_that_cannot_be_matched_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("tiny-encoder", "tiny", "lenet5")
    encoder, decoder, lenet5 = (models.classifier_skeleton(name, 10, None) for name in names)

    def refused(model: Any, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            FedPTR(**settings).check(model, 2)
        return str(caught.value)

    assert FEDPTR.objectives == ("classification",)
    with pytest.raises(UserError, match="no head of classes"):
        FEDPTR.check(toy_model(), 2)
    assert "no synthetic input reaches this weight" in refused(encoder)
    encoder.freeze()
    decoder.freeze()
    FedPTR().check(encoder, 2)
    FedPTR().check(decoder, 2)
    assert "the model has 512 positions" in refused(encoder, tokens=600)
    FedPTR(examples_per_class=3, inner_steps=5).check(lenet5, 2)
    assert "lower examples_per_class" in refused(lenet5, examples_per_class=10**6)
    monkeypatch.setattr(trajectory_matching, "physical_memory", lambda: 10**6)
    assert "30 synthetic examples and inner_steps=5" in refused(lenet5, examples_per_class=3, inner_steps=5)
    assert "30 synthetic examples and inner_steps=1" in refused(decoder)

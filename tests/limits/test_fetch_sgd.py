"""Where FetchSGD becomes FedAvg, and FedAvg with the server's momentum; that it is its paper's Algorithm 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fetch_sgd import FetchSGD
from fedferret.algorithms.server_optimizer import ServerOptimizer
from fedferret.bases.count_sketch import CountSketch
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import MeanPool, NotFinite
from fedferret.core.tree import Tree
from toys import SHAPES, TRAINING, simulate, toy_clients, toy_model, toy_task, weights

D = 97  # the toy model's weights
LOSSLESS = FetchSGD(num_rows=1, num_columns=D, kept=D, bits=32, momentum=0.0, masking=False, training=TRAINING)
SMALL = FetchSGD(num_rows=3, num_columns=40, kept=7, bits=32, momentum=0.5, server_learning_rate=0.6, training=TRAINING)


def flat(tensors: Tree) -> Tensor:
    """All of a tree's numbers in a row."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize("error", ["subtract", "zero"])
def test_a_row_of_as_many_cells_as_weights_and_k_of_all_is_fedavg_to_the_bit(error: str) -> None:
    ours = replace(LOSSLESS, error=error)
    assert flat(weights(simulate(ours, 4))).equal(flat(weights(simulate(FedAvg(training=TRAINING), 4))))


def test_with_momentum_it_is_then_fedavg_with_the_servers_momentum() -> None:
    ours = simulate(replace(LOSSLESS, momentum=0.9), 4)
    theirs = simulate(FedAvg(server_optimizer=ServerOptimizer(name="momentum"), training=TRAINING), 4)
    torch.testing.assert_close(flat(weights(ours)), flat(weights(theirs)), rtol=0, atol=1e-6)
    masked = simulate(replace(LOSSLESS, momentum=0.9, masking=True), 4)  # all that was sent leaves no momentum
    assert flat(weights(masked)).equal(flat(weights(simulate(FedAvg(training=TRAINING), 4))))


def test_without_collisions_the_server_keeps_what_it_does_not_send() -> None:
    """Top-k of the mean, exactly, with error feedback at the server."""
    method = replace(LOSSLESS, kept=10)
    run = simulate(method, 1)
    start, fedavg = flat(dict(toy_model().named_parameters())), simulate(FedAvg(training=TRAINING), 1)
    mean, ours = start - flat(weights(fedavg)), start - flat(weights(run))
    sketch = CountSketch(1, D, D, Key(run.state.public.seed))
    assert int(ours.count_nonzero()) == 10
    (left,) = list(sketch.estimates(run.state.server.error))
    torch.testing.assert_close(ours + left, mean, rtol=0, atol=1e-6)
    assert float(left.abs().max()) <= float(ours[ours != 0].abs().min()) + 1e-6


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("error", ["subtract", "zero"])
def test_it_is_algorithm_1_with_sketches_as_matrices(masking: bool, error: str) -> None:
    """Every row's sketch as a C x d matrix, from the sketches of unit vectors; all else in the paper's words."""
    method = replace(SMALL, masking=masking, error=error)
    run, task = simulate(method, 4), toy_task(4)
    sketch = CountSketch(3, 40, D, Key(run.state.public.seed))
    assert sketch.lengths == (40, 39, 37)
    units = [sketch.sketched(torch.tensor([place]), torch.ones(1)).split(sketch.lengths) for place in range(D)]
    rows = [torch.stack(columns, dim=1).double() for columns in zip(*units, strict=True)]
    momentum, waiting = ([torch.zeros(len(row)).double() for row in rows] for _ in range(2))
    model = tree.clone(tree.parameters(task.model))
    for number in range(1, 5):
        mean = torch.zeros(D).double()
        for client, data in toy_clients().items():
            tree.copy_(tree.parameters(task.model), model)
            trained = TRAINING.train(task, data, Key.of(3, "local", number, client).fold("train"))
            share = len(data) / sum(len(each) for each in toy_clients().values())
            mean += (flat(model) - flat(trained.weights)).double() * share
        momentum = [0.5 * u + row @ mean for u, row in zip(momentum, rows, strict=True)]
        waiting = [e + 0.6 * u for e, u in zip(waiting, momentum, strict=True)]
        estimates = torch.stack([row.T @ e for e, row in zip(waiting, rows, strict=True)]).median(dim=0).values
        chosen = estimates.abs().sort(descending=True, stable=True).indices[:7]
        sent = torch.zeros(D).double().index_copy(0, chosen, estimates[chosen])
        for index, row in enumerate(rows):
            touched = row @ sent != 0
            waiting[index] = waiting[index] * ~touched if error == "zero" else waiting[index] - row @ sent
            momentum[index] = momentum[index] * ~touched if masking else momentum[index]
        pieces = sent.float().split([weight.numel() for weight in model.values()])
        for weight, piece in zip(model.values(), pieces, strict=True):
            weight -= piece.view_as(weight)
    torch.testing.assert_close(flat(run.state.public.weights), flat(model), rtol=0, atol=5e-6)
    assert float((flat(model) - flat(toy_task(1).model.state_dict())).abs().max()) > 0.01


def test_sketches_of_clients_add_up_to_the_sketch_of_their_mean() -> None:
    task = toy_task(1)
    public, _ = SMALL.init(task, Key.of(3, "begin"))
    pool, dense = MeanPool(), torch.zeros(D)
    for client, rows in toy_clients().items():
        reply = SMALL.client_update(task, public, None, rows, Key.of(3, "local", 1, client))
        dense += (flat(public.weights) - flat(tree.parameters(task.model))) / 3
        pool.add(reply.payload.decoded(), 1.0)
    sketch = CountSketch(3, 40, D, Key(public.seed))
    expected = sketch.zeros()
    sketch.add_(expected, dense, 0)
    torch.testing.assert_close(pool.result().only.cells, expected, rtol=0, atol=1e-6)


def test_a_sketch_that_cannot_be_is_refused() -> None:
    task, (client, *_) = toy_task(1), toy_clients().values()
    public, _ = SMALL.init(task, Key.of(3, "begin"))
    payload = SMALL.client_update(task, public, None, client, Key.of(1)).payload
    SMALL.accept(task, public, payload)
    with pytest.raises(ValueError, match="other rows, columns or bits: the client has other settings"):
        replace(SMALL, num_columns=41).accept(task, public, payload)
    with pytest.raises(ValueError, match="other rows, columns or bits"):
        replace(SMALL, bits=16).accept(task, public, payload)
    broken = payload.encoded(payload.decoded(), Key.of(1))
    broken.values.codes.view(torch.float32)[3] = torch.nan
    with pytest.raises(NotFinite, match="values holds NaN or infinity"):
        SMALL.accept(task, public, broken)


def test_impossible_settings_are_refused() -> None:
    for change, reason in (
        ({"num_rows": 4}, r"num_rows=4: must be odd and at least 1"),
        ({"num_columns": 0}, r"num_columns=0: must be at least 1"),
        ({"num_columns": 6}, r"num_columns=6 has no 3 rows of different lengths: raise num_columns"),
        ({"kept": 0}, r"kept=0: must be at least 1"),
        ({"kept": 41}, r"kept=41, num_columns=40: a row of so few cells tells no more weights apart"),
        ({"momentum": 1.0}, r"momentum=1.0: must lie in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=reason):
            replace(SMALL, **change)
    with pytest.raises(UserError, match=r"num_columns=98: the model has 97 weights; set num_columns to 97 or less"):
        replace(SMALL, num_columns=98).check(toy_model(), 1)


def test_a_round_costs_its_cells_up_and_its_weights_down() -> None:
    cost = SMALL.wire_cost(SHAPES, 3, 1)
    assert cost.up_most == 4 * (40 + 39 + 37) == 2 * replace(SMALL, bits=16).wire_cost(SHAPES, 3, 1).up_most
    for record in simulate(SMALL, 2).records:
        assert all(cost.up_most < up <= cost.up_most + 140 for up in record.bytes_up.values())

"""FedPM: gradients pass through the draw of a mask, and probabilities are means of masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedferret.algorithms.fedpm import FedPM
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.local.first_order import FirstOrder
from toys import Rows, SquaredError, simulate, toy_clients

ONE_STEP = FirstOrder(learning_rate=1e6, steps=1, clip=None)


def test_one_long_step_keeps_the_weights_that_lower_the_loss() -> None:
    """A loss linear in the weights has one gradient C, whatever is masked; so bits say where C w < 0."""
    direction = torch.linspace(-1, 1, 12).view(3, 4)

    class Linear(SquaredError):
        def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
            return (next(model.parameters()) * direction).sum()

    model = nn.Linear(4, 3)
    task, fedpm = Task.of(FedPM().prepare(model, Key(0)), Linear(), 1), FedPM(training=ONE_STEP)
    public, _ = fedpm.init(task, Key.of(1))
    reply = fedpm.client_update(task, public, None, toy_clients()["a"], Key.of(2))
    public.weights["weight"].fill_(1)  # every weight is kept: the frozen ones
    with fedpm.model(task, public) as drawn:
        values = tree.clone(tree.parameters(drawn))["weight"]
    torch.testing.assert_close(values.abs(), torch.full((3, 4), 0.5**0.5))
    assert 0 < int((values > 0).sum()) < 12
    kept = reply.payload.decoded().ones["weight"][:12].view(3, 4)
    assert torch.equal(kept, (direction * values < 0).float())


@pytest.mark.parametrize(("reset_every", "masks"), [(1, 3), (4, 9), (2, 3)])
def test_probabilities_are_means_of_the_masks_since_the_last_reset(reset_every: int, masks: int) -> None:
    run = simulate(FedPM(reset_every=reset_every, training=replace(ONE_STEP, learning_rate=1.0)), 3)
    assert run.state.server.masks == masks
    for probabilities in run.state.public.weights.values():
        torch.testing.assert_close(masks * probabilities, (masks * probabilities).round(), rtol=0, atol=1e-5)
    assert any((3 * each - (3 * each).round()).abs().max() > 0.1 for each in run.state.public.weights.values()) == (
        masks > 3
    )


def test_a_memory_of_no_rounds_is_refused() -> None:
    with pytest.raises(UserError, match="reset_every=0: must be at least 1"):
        FedPM(reset_every=0)

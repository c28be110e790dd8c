"""A packed batch is the same examples in one row: no padding, and no example sees another."""

from __future__ import annotations

import torch

from fedferret import models
from fedferret.core.keys import Key
from fedferret.data.batches import TokenisedData
from fedferret.data.templates import Tokens
from fedferret.objectives.next_token import NextToken


def examples() -> list[Tokens]:
    """Five examples of different lengths."""
    lengths_and_starts = ((9, 4), (17, 12), (5, 2), (30, 1), (6, 1))
    tokens = [
        torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length, _ in lengths_and_starts
    ]
    return [Tokens(tuple(ids), start, False) for ids, (_, start) in zip(tokens, lengths_and_starts, strict=True)]


def test_a_packed_batch_has_the_loss_and_the_gradient_of_the_padded_one() -> None:
    model = models.load("tiny").model
    loss = NextToken()
    results = []
    for packed in (False, True):
        (batch,) = TokenisedData(examples(), packed).batches(5, Key.of(1))
        model.zero_grad()
        value = loss.loss(model, batch)
        value.backward()
        results.append((value.item(), [parameter.grad.clone() for parameter in model.parameters()]))
    (padded, padded_gradients), (packed_value, packed_gradients) = results
    assert abs(padded - packed_value) < 1e-5
    for left, right in zip(padded_gradients, packed_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_a_packed_batch_has_one_row_and_no_padding() -> None:
    (batch,) = TokenisedData(examples(), packed=True).batches(5, Key.of(1))
    assert batch.input_ids.shape == (1, sum(len(example.ids) for example in examples()))
    assert batch.attention_mask is None


def test_evaluation_batches_are_never_packed() -> None:
    (batch,) = TokenisedData(examples(), packed=True).batches(5, None)
    assert batch.input_ids.shape[0] == 5

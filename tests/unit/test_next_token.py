"""The loss: the plain cross-entropy of the response, whichever way the logits are made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fedferret import models
from fedferret.core.keys import Key
from fedferret.data.batches import IGNORED, Batch, TokenisedData
from fedferret.data.templates import Tokens
from fedferret.objectives.next_token import NextToken, head_is_linear


def batch() -> Batch:
    """Two examples of 9 and 6 tokens with responses of 4 and 2."""
    ids = (Key.of(1).uniform(18) * 200 + 3).long().view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.full_like(ids, IGNORED)
    labels[0, 5:], labels[1, 4:6] = ids[0, 5:], ids[1, 4:6]
    return Batch(ids * mask, mask, labels)


def plain(model: nn.Module, rows: Batch) -> Tensor:
    """Written out: all logits, shifted by one."""
    logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    return functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), rows.labels[:, 1:].reshape(-1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    model: nn.Module = models.load("tiny").model
    return model


class Capped(nn.Module):
    """A model that does something to its logits, as Gemma does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.base_model = inner, inner.base_model

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.inner.get_output_embeddings()  # type: ignore[operator]
        return head

    def forward(self, **inputs: Tensor) -> object:
        output = self.inner(**inputs)
        output.logits = torch.tanh(output.logits / 0.1) * 0.1
        return output


def test_it_is_the_plain_loss_and_gradient(tiny: nn.Module) -> None:
    assert head_is_linear(tiny)
    ours = NextToken().loss(tiny, batch())
    gradients = torch.autograd.grad(ours, list(tiny.parameters()))
    theirs = plain(tiny, batch())
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, list(tiny.parameters())), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_head_that_is_not_linear_is_noticed(tiny: nn.Module) -> None:
    capped = Capped(tiny)
    assert not head_is_linear(capped)
    torch.testing.assert_close(NextToken().loss(capped, batch()), plain(capped, batch()))
    assert not torch.isclose(plain(capped, batch()), plain(tiny, batch()), rtol=1e-3)


def test_the_rows_sums_are_the_mean_times_the_tokens(tiny: nn.Module) -> None:
    loss = NextToken()
    sums, tokens = (each.tolist() for each in loss.by_example(tiny, batch()))
    assert sum(tokens) == 6
    assert sum(sums) / 6 == pytest.approx(loss.loss(tiny, batch()).item(), rel=1e-6)
    for row, (row_sum, count) in enumerate(zip(sums, tokens, strict=True)):
        whole = batch()
        alone = Batch(*(part[row : row + 1] for part in (whole.input_ids, whole.attention_mask, whole.labels)))
        assert row_sum / count == pytest.approx(loss.loss(tiny, alone).item(), rel=1e-5)


def test_what_is_padding_or_prompt_does_not_count(tiny: nn.Module) -> None:
    rows = batch()
    other = Batch(rows.input_ids.clone(), rows.attention_mask, rows.labels)
    other.input_ids[1, 6:] = 77  # padding
    loss = NextToken()
    assert torch.equal(loss.loss(tiny, rows), loss.loss(tiny, other))
    other.input_ids[1, 5] = 88  # the last response token is only predicted, never read
    torch.testing.assert_close(loss.loss(tiny, rows), loss.loss(tiny, other))


@pytest.mark.parametrize("packed", [False, True])
def test_rounded_shapes_under_autocast_change_no_loss(tiny: nn.Module, packed: bool) -> None:
    model, loss = tiny, NextToken()
    examples = [Tokens(tuple(range(3, 3 + length)), 2, False) for length in (5, 9, 13)]
    (batch,) = TokenisedData(examples, packed).batches(3, Key.of(1))
    plain, counts = (each.tolist() for each in loss.by_example(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        logits, targets = loss.scored(model, batch)
        rounded, rounded_counts = (each.tolist() for each in loss.by_example(model, batch))
    assert len(targets) % 16 == 0 and logits.shape[0] == len(targets)
    assert int((targets != IGNORED).sum()) == sum(counts)  # what was added is no target
    assert rounded_counts == counts and sorted(counts) == [3, 7, 11]
    assert rounded == pytest.approx(plain, rel=0.02)


def test_a_packed_rows_examples_have_the_losses_and_gradients_that_they_have_alone(tiny: nn.Module) -> None:
    loss, key = NextToken(), Key.of(1)
    examples = [Tokens(tuple(range(3, 3 + length)), 2, False) for length in (5, 9, 13)]
    (packed,) = TokenisedData(examples, packed=True).batches(3, key)
    (padded,) = TokenisedData(examples).batches(3, key)
    weight = next(tiny.parameters())
    found, expected = (loss.by_example(tiny, each) for each in (packed, padded))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for mine, other in zip(found[0], expected[0], strict=True):
        gradients = (torch.autograd.grad(each, weight, retain_graph=True)[0] for each in (mine, other))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

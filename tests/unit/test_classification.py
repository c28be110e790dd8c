"""Classification: its loss, the sums that make its figures, and that no split of the data changes them."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.metrics import check_sums
from fedferret.objectives.classification import BINS, Classification
from toys import normal

THREE = Classification(classes=("a", "b", "c"))


class Given(nn.Module):
    """A model whose logits are the batch's own, times one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: Any) -> Tensor:
        logits: Tensor = batch.logits * self.scale
        return logits


def batch(logits: Tensor, labels: list[int]) -> Any:
    """Examples with these logits."""
    return SimpleNamespace(logits=logits, labels=torch.tensor(labels))


def drawn(seed: int, count: int) -> tuple[Tensor, list[int]]:
    """Logits of three classes and labels."""
    key = Key.of(seed)
    labels = [int(3 * value) for value in key.fold("labels").uniform(count)]
    return 2 * normal(key.fold("logits"), count, 3), labels


def test_the_figures_are_those_of_their_definitions() -> None:
    logits, labels = drawn(1, 200)
    sums = THREE.scores(Given(), batch(logits, labels))
    figures = THREE.figures(sums)
    confidence, guesses = logits.double().softmax(dim=1).max(dim=1)
    pairs = list(zip(guesses.tolist(), labels, strict=True))
    f1 = []
    for each in range(3):
        hit = sum(guess == each == label for guess, label in pairs)
        wrong = sum((guess == each) != (label == each) for guess, label in pairs)
        f1.append(2 * hit / (2 * hit + wrong))
    edges = [number / BINS for number in range(BINS + 1)]
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = [row for row in range(200) if low < float(confidence[row]) <= high]
        right = sum(pairs[row][0] == pairs[row][1] for row in inside)
        error += abs(right - sum(float(confidence[row]) for row in inside)) / 200
    assert figures == pytest.approx(
        {
            "loss": float(nn.functional.cross_entropy(logits.double(), torch.tensor(labels))),
            "accuracy": sum(guess == label for guess, label in pairs) / 200,
            "macro-f1": sum(f1) / 3,
            "calibration-error": error,
            "examples": 200,
        }
    )
    assert set(sums) == {"count", *THREE.sums}
    check_sums(sums, THREE.sums)


def test_a_class_that_occurs_nowhere_is_left_out_of_the_macro_f1() -> None:
    logits = torch.tensor([[4.0, 0, 0], [4.0, 0, 0], [0, 4.0, 0]])
    assert THREE.figures(THREE.scores(Given(), batch(logits, [0, 1, 1])))["macro-f1"] == pytest.approx(2 / 3)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_any_split_of_the_data_gives_the_same_figures(seed: int, sizes: list[int]) -> None:
    logits, labels = drawn(seed, sum(sizes))
    whole = THREE.scores(Given(), batch(logits, labels))
    added: dict[str, float] = {}
    start = 0
    for size in sizes:
        part = THREE.scores(Given(), batch(logits[start : start + size], labels[start : start + size]))
        added = {name: added.get(name, 0.0) + value for name, value in part.items()}
        start += size
    for name, value in whole.items():
        exact = not name.startswith(("loss", "confidence"))
        assert added[name] == (value if exact else pytest.approx(value, abs=1e-6)), name


def test_the_loss_of_each_example_has_its_own_gradient_and_their_mean_is_the_loss() -> None:
    logits, labels = drawn(2, 5)
    model = Given()
    losses, counts = THREE.by_example(model, batch(logits, labels))
    assert counts.tolist() == [1] * 5
    together = THREE.loss(model, batch(logits, labels))
    assert together.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    each = [torch.autograd.grad(loss, model.scale, retain_graph=True)[0].item() for loss in losses]
    assert sum(each) / 5 == pytest.approx(torch.autograd.grad(together, model.scale)[0].item(), rel=1e-5)
    alone = THREE.by_example(model, batch(logits[3:4], labels[3:4]))[0]
    assert torch.autograd.grad(alone[0], model.scale)[0].item() == pytest.approx(each[3], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hit 0": 9.0}, "'hit 0' is 9"),
        ({"loss": math.nan}, "'loss' is nan"),
        ({"hit 7": 1.0}, "an unknown sum came"),
        ({"binned 3": None}, "'binned 3' is missing"),
        ({"loss": -1.0}, "'loss' is -1: must not be negative"),
        ({"hit 0": 4.0, "hit 1": 4.0, "hit 2": 4.0}, "more is right than there is"),
        ({"right 0": -1.0}, "'right 0' is -1: must be a count"),
        ({"true 0": 0.5}, "'true 0' is 0.5: must be a count"),
        ({"true 0": 4.0, "true 1": 4.0}, "'true' add up to"),
        ({"count": 3.0}, "add up to 4, and 'count' is 3"),
        ({f"confidence {BINS - 1}": 4.0, f"binned {BINS - 1}": 0.0}, "add up to|more is right"),
    ],
)
def test_sums_that_cannot_be_are_refused(change: dict[str, float | None], reason: str) -> None:
    sums: dict[str, Any] = {**THREE.scores(Given(), batch(*drawn(3, 4))), **change}
    given = {name: value for name, value in sums.items() if value is not None}
    with pytest.raises(ValueError, match=reason):
        check_sums(given, THREE.sums)
        THREE.check_sums(given)


@given(st.integers(0, 10**6), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_honest_sums_are_taken(seed: int, count: int) -> None:
    sums = THREE.scores(Given(), batch(*drawn(seed, count)))
    check_sums(sums, THREE.sums)
    THREE.check_sums(sums)


def test_a_model_that_gives_nan_has_no_accuracy() -> None:
    logits, labels = drawn(4, 3)
    logits[1, 2] = math.nan
    assert all(
        math.isnan(THREE.figures(THREE.scores(Given(), batch(logits, labels)))[name]) for name in ("loss", "accuracy")
    )


@pytest.mark.parametrize(
    ("classes", "reason"), [((), "name at least two"), (("a",), "at least two"), (("a", "b", "a"), '"a"')]
)
def test_impossible_classes_are_refused(classes: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Classification(classes=classes)

"""Spectra that are known: of matrices written down, and of the loss of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedferret.core.keys import Key
from fedferret.local.lanczos import Spectrum, hessian_product, plateau, spectrum
from fedferret.local.similarity import SHIFT, scored, zeta
from toys import normal, sentences, toy_language_model, toy_rows


def rotated(values_N: Tensor) -> Any:
    """A symmetric matrix of these eigenvalues, in no basis that a start vector of signs would favour."""
    count = len(values_N)
    basis, _ = torch.linalg.qr(normal(Key.of(5), count, count).double())
    matrix = basis @ torch.diag(values_N) @ basis.T
    return lambda vector: matrix @ vector


def test_of_a_matrix_with_few_eigenvalues_lanczos_finds_each_with_its_multiplicity() -> None:
    values = torch.cat([torch.full((600,), -1.0), torch.zeros(1200), torch.full((200,), 3.0)]).double()
    found = spectrum(
        lambda vector: values * vector, 2000, Key.of(1)
    )  # the start vector meets all diagonal places alike
    torch.testing.assert_close(found.values, torch.tensor([-1.0, 0.0, 3.0]).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weights, torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_as_many_steps_as_rows_give_the_moments_and_ends_of_any_spectrum() -> None:
    values = torch.linspace(-2, 5, 40).double()
    found = spectrum(rotated(values), 40, Key.of(2), steps=100)
    assert len(found.values) == 40 and float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(found.values[0]) == pytest.approx(-2) and float(found.values[-1]) == pytest.approx(5)
    start = (Key.of(2).bits(40) & 1).double() * 2 - 1
    moved, product = start, rotated(values)
    for power in range(1, 6):  # Gauss quadrature: the moments of the start vector, exactly
        moved = product(moved)
        expected = float(start @ moved) / 40
        assert float((found.weights * found.values**power).sum()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.5, 0.9])
def test_the_share_above_a_threshold_is_the_share_of_eigenvalues_above_it(threshold: float) -> None:
    """Of an even spread of eigenvalues, two-sided; two thirds and three halves of the share would be refused."""
    found = spectrum(lambda vector: torch.linspace(0, 1, 4000).double() * vector, 4000, Key.of(3))
    assert found.above(threshold) == pytest.approx(1 - max(threshold, 0), abs=0.02)
    assert found.above(-10) == pytest.approx(1) and found.above(10) == pytest.approx(0, abs=1e-12)


def test_a_plateau_is_where_four_shares_are_level_and_a_steep_fall_is_looked_at_more_closely() -> None:
    asked: list[float] = []

    def above(threshold: float) -> float:
        asked.append(threshold)
        return max(0.7, 0.9 - threshold)

    assert plateau(above) == 0.7 and asked == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert plateau(lambda threshold: 1.0) == 1 and plateau(lambda threshold: 0.0) == 0
    asked.clear()
    steep = plateau(lambda threshold: asked.append(threshold) or 0.8 * math.exp(-4 * threshold))  # type: ignore[func-returns-value]
    assert 0.4 <= steep <= 0.8 and min(filter(None, asked)) == pytest.approx(0.1 / 2**7)  # 0.8 x 4 x 3 i < 0.005 level
    known = Spectrum(torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.25, 0.75]).double())
    assert plateau(known.above) == pytest.approx(0.75)


def test_the_hessian_of_a_quadratic_is_its_matrix() -> None:
    matrix = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 4.0], [0.0, 4.0, -3.0]])
    weights = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}

    def loss() -> Tensor:
        all_N = torch.cat([weights["a"], weights["b"].view(-1)])
        return all_N @ matrix @ all_N / 2

    product = hessian_product(loss, weights)
    for column in range(3):
        assert torch.equal(product(torch.eye(3).double()[column]), matrix.double()[column])


def test_the_hessian_of_a_language_models_loss_goes_through_fused_attention() -> None:
    """Compared with differences of gradients; on CPUs fused attention has no second derivative."""
    model = toy_language_model().double()
    assert model.config._attn_implementation == "sdpa"
    batch = sentences(next(toy_rows(Key.of(1), 4).batches(4, None)))
    weights = {name: weight for name, weight in model.named_parameters() if "k_proj" in name or "v_proj" in name}

    def loss() -> Tensor:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, -2]
        return nn.functional.cross_entropy(logits, batch.labels[:, -1])

    size = sum(weight.numel() for weight in weights.values())
    vector = normal(Key.of(2), size).double()
    found = hessian_product(loss, weights)(vector)

    def gradient(step: float) -> Tensor:
        parts = vector.split([weight.numel() for weight in weights.values()])
        with torch.no_grad():
            for weight, part in zip(weights.values(), parts, strict=True):
                weight.add_(step * part.view_as(weight))
        return torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss(), list(weights.values()))])

    ahead, behind = gradient(2e-3), gradient(-4e-3)
    assert float(found.abs().max()) > 1e-2
    torch.testing.assert_close(found, (ahead - behind) / 4e-3, rtol=1e-2, atol=3e-4)  # norms are computed in fp32


def test_orthogonal_examples_have_the_least_score_and_nearly_equal_ones_the_most() -> None:
    orthogonal = zeta(torch.eye(8))
    assert orthogonal == pytest.approx(8 * (math.log(1 + SHIFT) + 1 / (1 + SHIFT)), rel=1e-12)
    assert orthogonal == pytest.approx(8.0, abs=1e-4)
    alike = torch.ones(8, 50) + 1e-4 * normal(Key.of(1), 8, 50)
    assert zeta(alike) == pytest.approx(6.4e5, rel=0.1)  # the figure that the published formula gives for such rows
    assert orthogonal < zeta(normal(Key.of(2), 8, 20)) < zeta(alike)


def test_a_score_does_not_depend_on_the_scale_of_an_example_and_of_one_example_is_a_constant() -> None:
    hidden = normal(Key.of(3), 5, 12)
    scales = torch.tensor([0.1, 1.0, 3.0, 50.0, 1000.0])[:, None]
    assert zeta(hidden * scales) == pytest.approx(zeta(hidden), rel=1e-6)
    assert zeta(hidden[:1]) == pytest.approx(zeta(100 * hidden[1:2]), rel=1e-12) == pytest.approx(1.0, abs=1e-4)


def test_padding_counts_for_nothing_in_a_score() -> None:
    hidden = normal(Key.of(4), 3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    layers = [nn.Identity(), nn.Tanh()]
    found = []
    for padding in (0.0, 7.0):
        with scored(layers, mask) as scores:
            for layer in layers:
                layer(torch.where(mask[:, :, None] == 1, hidden, torch.tensor(padding)))
        found.append(scores)
    assert found[0] == found[1] and found[0][0] == zeta((hidden * mask[:, :, None]).flatten(1)) != found[0][1]
    assert not layers[0]._forward_hooks

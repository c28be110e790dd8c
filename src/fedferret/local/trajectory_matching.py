"""An auxiliary set of synthetic examples that mimics a step of the weights, and where it would lead next.

    D = (X, Y, a)       n inputs, logits of n soft labels, and an inner learning rate
    unroll              w_0 = start;  w_s+1 = w_s - a grad CE(X, softmax(Y); w_s)
    match               L = ‖w_S - end‖² / ‖start - end‖², from the start: a by least squares along the first gradient,
                        then J steps of Adam on X, Y and log a
    project             w~ = w_S' from the end

Cazenavette, Wang, Torralba, Efros, Zhu. "Dataset Distillation by Matching Training Trajectories", CVPR 2022,
arXiv 2203.11932 (MTT), between two iterates of federated training as in DynaFed (Pi et al., CVPR 2023,
arXiv 2211.10878). The gradient of L passes through the gradients of the unroll: attention is computed by the formula
itself, since fused kernels have no second derivative. Nothing is drawn beyond a first set. Of the sets that J steps
pass, the one with the least L is kept, so that no step makes matters worse.

Cost: (J + 1) S forward and backward passes of n examples, and J of twice that length; the graph of S of them is held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.norms import euclidean_norm

_CERTAINTY = 3.0  # first logit of a synthetic example's own class; the others have 0
_PASSES = 3  # forward, backward and the backward of that hold about as much each
_STILL = 1e-6  # a step below this share of the weights' norm is rounding, and there is nothing to match


@state
class AuxiliarySet:
    """D: n synthetic examples, and the inner learning rate with which they move weights."""

    inputs: Tensor  # X, shape (n, ...), in the form that the model's body reads
    labels: Tensor  # Y, logits, shape (n, C)
    log_rate: Tensor  # log a, shape ()


def first_set(
    shape: tuple[int, ...], scale: float, classes: int, per_class: int, rate: float, key: Key, device: torch.device
) -> AuxiliarySet:
    """A set that has matched nothing yet: noise, with the same number of examples for every class.

    Args:
        shape: of one input.
        scale: the noise's standard deviation.
        classes: C.
        per_class: examples of each class.
        rate: a.
        key: draws the inputs.
        device: where the model computes.

    Returns:
        The set, fp32.
    """
    count = classes * per_class
    values = count * math.prod(shape)
    total = torch.full((values,), -6.0, dtype=torch.float64)
    for draw in range(12):  # a sum of twelve uniform values is near normal, with the same bits everywhere
        total += key.fold(draw).uniform(values)
    own = torch.arange(classes).repeat_interleave(per_class)
    labels = _CERTAINTY * functional.one_hot(own, classes).float()
    inputs = (total * scale).float().view(count, *shape)
    return AuxiliarySet(inputs.to(device), labels.to(device), torch.tensor(math.log(rate), device=device))


def unrolled(
    model: nn.Module, weights: Mapping[str, Tensor], auxiliary: AuxiliarySet, steps: int, differentiable: bool
) -> dict[str, Tensor]:
    """Take gradient steps on an auxiliary set.

    Args:
        model: maps inputs to logits; its other weights and its buffers are read, and nothing in it changes.
        weights: to begin from, by the model's names.
        auxiliary: the set.
        steps: S, at least 0.
        differentiable: whether a gradient must reach the set.

    Returns:
        The weights arrived at, by name, on the model's device.
    """
    labels, rate = auxiliary.labels.softmax(dim=1), auxiliary.log_rate.exp()
    current = {name: weight.detach().to(labels.device).requires_grad_() for name, weight in weights.items()}
    for _ in range(steps):
        loss = functional.cross_entropy(functional_call(model, current, (auxiliary.inputs,)), labels)
        gradients = torch.autograd.grad(
            loss, list(current.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
        moved = zip(current.items(), gradients, strict=True)
        current = {name: weight - rate * gradient for (name, weight), gradient in moved}
        if not differentiable:
            current = {name: weight.detach().requires_grad_() for name, weight in current.items()}
    return current if differentiable else {name: weight.detach() for name, weight in current.items()}


@torch.enable_grad()
def mismatch(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    auxiliary: AuxiliarySet,
    steps: int,
    differentiable: bool = True,
) -> Tensor:
    """How badly a set explains the step from ``start`` to ``end``.

    Args:
        model: as in ``unrolled``.
        start: weights by name.
        end: weights of the same names, other values.
        auxiliary: the set.
        steps: S.
        differentiable: whether a gradient must reach the set.

    Returns:
        L, shape (): 0 where the S steps end at ``end``, 1 where they move nothing.
    """
    with sdpa_kernel(SDPBackend.MATH):
        arrived = unrolled(model, start, auxiliary, steps, differentiable)
    left = [(weight - end[name].to(weight.device)).square().sum() for name, weight in arrived.items()]
    whole = [(start[name] - end[name]).square().sum().to(each.device) for name, each in zip(arrived, left, strict=True)]
    return torch.stack(left).sum() / torch.stack(whole).sum()


def matched(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    auxiliary: AuxiliarySet,
    *,
    steps: int,
    inner_steps: int,
    rate: float,
) -> tuple[AuxiliarySet, float]:
    """Make a set explain the step from ``start`` to ``end`` better.

    Args:
        model: as in ``unrolled``.
        start: weights by name.
        end: weights of the same names, other values.
        auxiliary: the set to go on from; not changed.
        steps: J, of Adam.
        inner_steps: S.
        rate: Adam's learning rate.

    Returns:
        The best set found, and its L; the set handed in and infinity where no L is finite.
    """
    parts = [auxiliary.inputs, auxiliary.labels, _paced(model, start, end, auxiliary, inner_steps)]
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    optimizer, current = torch.optim.Adam(leaves, rate), AuxiliarySet(*leaves)
    best, least = auxiliary, math.inf
    for step in range(steps + 1):
        loss = mismatch(model, start, end, current, inner_steps, differentiable=step < steps)
        value = loss.item()
        if not math.isfinite(value):
            break
        if value < least:
            best, least = AuxiliarySet(*(leaf.detach().clone() for leaf in leaves)), value
        if step < steps:
            with sdpa_kernel(SDPBackend.MATH):
                gradients = torch.autograd.grad(loss, leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
    return best, least


def _paced(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], auxiliary: AuxiliarySet, steps: int
) -> Tensor:
    """log a by least squares, as if all steps were along the first gradient; the set's own where they lead away."""
    first = projected(model, start, auxiliary, 1)
    along = [(start[name].to(weight.device) - weight).double() for name, weight in first.items()]
    wanted = [(start[name] - end[name]).to(weight.device).double() for name, weight in first.items()]
    product = sum(float((left * right).sum()) for left, right in zip(along, wanted, strict=True))
    squared = sum(float(each.square().sum()) for each in along)
    return auxiliary.log_rate + math.log(product / (steps * squared)) if product > 0 else auxiliary.log_rate


@torch.enable_grad()
def projected(
    model: nn.Module, weights: Mapping[str, Tensor], auxiliary: AuxiliarySet, steps: int
) -> dict[str, Tensor]:
    """Where a set would move the weights next.

    Args:
        model: as in ``unrolled``.
        weights: to begin from.
        auxiliary: a set that explains the last step.
        steps: S'.

    Returns:
        w~, by name, on the model's device.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return unrolled(model, weights, auxiliary, steps, differentiable=False)


def moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> bool:
    """Whether weights went further than rounding.

    Args:
        start: weights by name.
        end: weights of the same names.

    Returns:
        False where the step is shorter than 10^-6 of the weights' norm.
    """
    distance = euclidean_norm(weight - end[name] for name, weight in start.items())
    return distance > _STILL * euclidean_norm(end.values())


def followed(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    auxiliary: AuxiliarySet,
    *,
    steps: int,
    inner_steps: int,
    further_steps: int,
    rate: float,
) -> tuple[AuxiliarySet, Mapping[str, Tensor]]:
    """Match the step from ``start`` to ``end``, and go on from there.

    Args:
        model: as in ``unrolled``.
        start: weights by name.
        end: weights of the same names.
        auxiliary: the set to go on from; not changed.
        steps: J.
        inner_steps: S.
        further_steps: S'.
        rate: Adam's learning rate.

    Returns:
        The set, and w~: ``end`` itself where nothing moved, where the set explains the step no better than standing
        still, and where w~ would not be finite.
    """
    if not moved(start, end):
        return auxiliary, end
    auxiliary, least = matched(model, start, end, auxiliary, steps=steps, inner_steps=inner_steps, rate=rate)
    if least >= 1:
        return auxiliary, end
    ahead = projected(model, end, auxiliary, further_steps)
    return auxiliary, ahead if math.isfinite(euclidean_norm(ahead.values())) else end


@torch.enable_grad()
def check_unroll(
    model: nn.Module, weights: Mapping[str, Tensor], shape: tuple[int, ...], classes: int, per_class: int, steps: int
) -> None:
    """Try one inner step, with both its gradients, for what it takes.

    Args:
        model: on the meta device: names and shapes, no values.
        weights: that are tuned, by name.
        shape: of one input.
        classes: C.
        per_class: synthetic examples of each class.
        steps: S.

    Raises:
        UserError: a weight that no input reaches, a model without second derivatives, or more than the memory here.
    """
    device, count, held = next(iter(weights.values())).device, classes * per_class, {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.zeros(count, *shape, device=device, requires_grad=True)
    labels = torch.full((count, classes), 1 / classes, device=device)
    tuned = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        try:
            logits = functional_call(model, tuned, (inputs,))
        except RuntimeError:  # some decoders look at values, which a meta device has not: as estimate.py has it
            logits, parameters = None, sum(weight.numel() for weight in model.parameters())
            held[0] = round(_PASSES * 40 * count * math.prod(shape[:-1]) * math.sqrt(parameters))
        if logits is not None:
            _try_twice(functional.cross_entropy(logits, labels), tuned, inputs)
    needed, there = steps * sum(held.values()), physical_memory()
    if needed > there:
        raise UserError(
            f"{count} synthetic examples and inner_steps={steps}: the unroll holds about {needed / 1e9:.1f} GB and "
            f"this machine has {there / 1e9:.1f} GB; lower examples_per_class, tokens or inner_steps"
        )


def _try_twice(loss: Tensor, tuned: Mapping[str, Tensor], inputs: Tensor) -> None:
    """The gradient, and the gradient of its square. Raises UserError where one cannot be taken."""
    gradients = torch.autograd.grad(loss, list(tuned.values()), create_graph=True, allow_unused=True)
    for name, gradient in zip(tuned, gradients, strict=True):
        if gradient is None:
            raise UserError(
                f"{name}: no synthetic input reaches this weight, so its step cannot be matched; tune a head or "
                f"an adapter alone, by model.train or algorithm.over"
            )
    try:
        torch.autograd.grad(torch.stack([each.square().sum() for each in gradients]).sum(), inputs)
    except RuntimeError as error:
        line = str(error).splitlines()[0][:200]
        raise UserError(f"this model cannot be differentiated twice ({line}); choose another") from None


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""Updates of which some values travel: messages, their mean, the step along them, how many fit into so many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedferret.algorithms.fedavg import Delta
from fedferret.bases.positions import Positions, least_bytes, num_bytes
from fedferret.bases.quantise import Packed
from fedferret.bases.quantise import num_bytes as value_bytes
from fedferret.bases.signs import Signs
from fedferret.bases.stochastic_rounding import rounded_once
from fedferret.core.algorithm import Payload
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.pooling import MeanPool
from fedferret.core.tree import Tree


@state
class Residual:
    """What a client has not sent so far, fp32."""

    residual: Tree


@message
class Sparse(Payload["Sparse"]):
    """Some of an update's d values; the others are zero."""

    positions: Positions
    values: Packed | Signs


@message
class SparseEntry:
    """The mean update where any client sent one, and the step to take along it."""

    delta: Sparse
    learning_rate: float


def by_tensor(weights: Mapping[str, Tensor], positions_K: Tensor) -> Iterator[tuple[str, Tensor, slice]]:
    """Split positions by tensor.

    Args:
        weights: in the order in which positions count on.
        positions_K: ascending, int64, shape (K,).

    Yields:
        For every tensor its name, the positions within it, and which of the K they are.
    """
    ends = torch.tensor([weight.numel() for weight in weights.values()]).cumsum(0)
    borders = [0, *torch.searchsorted(positions_K, ends).tolist()]
    starts = [0, *ends.tolist()]
    for index, name in enumerate(weights):
        part = slice(borders[index], borders[index + 1])
        yield name, positions_K[part] - starts[index], part


def mean_where_given(
    weights: Mapping[str, Tensor], given: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The weighted mean of sparse updates, tensor by tensor; a value that a client did not send counts as zero.

    Args:
        weights: in the order in which positions count on.
        given: of each client the positions, ascending, int64, and the values, fp32, both of shape (K,).
        shares: the clients' weights.

    Returns:
        The positions that any client sent, ascending, int64, and the means there, fp32, both of shape (U,).
    """
    split = [(values, list(by_tensor(weights, positions))) for positions, values in given]
    union, means, start = [], [], 0
    for index, (name, weight) in enumerate(weights.items()):
        pool = MeanPool()  # one tensor at a time; the arithmetic of the mean is FedAvg's
        sent = torch.zeros(weight.numel(), dtype=torch.bool)
        for (values, parts), share in zip(split, shares, strict=True):
            _, places, part = parts[index]
            dense = torch.zeros(weight.numel())
            dense[places], sent[places] = values[part], True
            pool.add(Delta({name: dense}), share)
        union.append(sent.nonzero().view(-1) + start)
        means.append(pool.result().only.delta[name][sent])
        start += weight.numel()
    return torch.cat(union), torch.cat(means)


def step_where_given_(weights: Mapping[str, Tensor], delta: Sparse, rate: float, rounding: Key) -> None:
    """w <- w - η Δ where Δ is given, in place; bf16 weights there are rounded at random, once; all else stays.

    Args:
        weights: fp32 or bf16, by name, in the order in which positions count on.
        delta: Δ.
        rate: η.
        rounding: of this step; every tensor's key is derived from it by the tensor's name.
    """
    values = delta.values.unpack()
    for name, places, part in by_tensor(weights, delta.positions.unpack()):
        if not len(places):
            continue  # a bf16 tensor would be copied for nothing
        with rounded_once(weights[name], rounding.fold(name)) as moved:
            flat = moved.view(-1)
            places = places.to(flat.device)
            flat[places] = flat[places] - values[part].to(flat.device) * rate


def entry_bytes(kept: int, cohort: int, num_weights: int, bits: int) -> tuple[float, float]:
    """The bytes of an entry: values and positions of the union of what clients sent.

    Args:
        kept: k, values that each client sends.
        cohort: N, clients in a round.
        num_weights: d, of the model.
        bits: of a value, down.

    Returns:
        The least, where all sent the same positions, and the most, where no two sent one.
    """
    union = min(cohort * kept, num_weights)
    # all but one of the positions cost more than all of them, which cost nothing
    most = num_bytes(min(union, num_weights - 1), num_weights) if kept < num_weights else 0
    least = 0 if union == num_weights else least_bytes(kept, num_weights)
    return value_bytes(kept, bits) + least, value_bytes(union, bits) + most


def most_values(budget: int, num_weights: int, bits: int) -> int:
    """How many values surely fit into a number of bytes, wherever they lie; framing left out.

    Args:
        budget: bytes of values and positions.
        num_weights: d, of the model.
        bits: of a value.

    Returns:
        The largest k below d with the most bytes of k values and positions within the budget; 0 where none fits.
    """
    fits, too_many = 0, num_weights
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        if value_bytes(tried, bits) + num_bytes(tried, num_weights) <= budget:
            fits = tried
        else:
            too_many = tried
    return fits

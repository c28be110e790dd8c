"""A node on a GPU and a node on a processor hold the same weights: skipped where there is no GPU.

What was measured on one may differ in its last bits on the other, for it is sums; what was sent is applied alike.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.methods import METHODS, rounds_of
from fedferret.bases.gaussian import add_gaussians_
from fedferret.bases.quantise import BITS, pack_vector
from fedferret.bases.registry import basis
from fedferret.bases.stochastic_rounding import round_into_
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.keys import Key
from fedferret.core.node import Node
from fedferret.core.task import Task
from fedferret.wire import codec
from toys import Rows, SquaredError, bits, simulate, toy_task

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
pytestmark = pytest.mark.skipif(DEVICE is None, reason="this machine has no GPU")

KEY = Key.of(5, "accelerator")
BASES = pytest.mark.parametrize("name", ["sign-buckets", "truncated-normal"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SIZE, COUNT, OFFSET = 100_003, 70, 8_191  # neither is a whole number of tiles, chunks or groups


def numbers(count: int, *words: int) -> torch.Tensor:
    """In (-1, 1), of very different magnitudes."""
    return ((2 * KEY.fold(*words).uniform(count) - 1) ** 5).float()


@BASES
@DTYPES
def test_a_basis_rebuilds_the_same_bits(name: str, dtype: torch.dtype) -> None:
    target, coordinates = numbers(SIZE, 1).to(dtype), numbers(COUNT, 2)
    where = {"size": SIZE + OFFSET, "offset": OFFSET}
    there = basis(name).expand_(target.to(DEVICE, copy=True), coordinates, KEY, 0.7, **where)
    assert torch.equal(there.cpu(), basis(name).expand_(target, coordinates, KEY, 0.7, **where))


@BASES
def test_a_basis_measures_the_same_to_rounding(name: str) -> None:
    delta = numbers(SIZE, 3)
    here, there = (basis(name).project(values, COUNT, KEY).cpu() for values in (delta, delta.to(DEVICE)))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5 * float(here.norm()))


@DTYPES
def test_gaussian_directions_are_the_same_bits(dtype: torch.dtype) -> None:
    target, factors = numbers(SIZE, 4).to(dtype), numbers(5, 5)
    there = add_gaussians_(target.to(DEVICE, copy=True), KEY, range(5), factors, OFFSET)
    assert torch.equal(there.cpu(), add_gaussians_(target, KEY, range(5), factors, OFFSET))


def test_rounding_at_random_gives_the_same_bits() -> None:
    source = numbers(SIZE, 7)
    there = round_into_(torch.empty(SIZE, dtype=torch.bfloat16, device=DEVICE), source.to(DEVICE), KEY)
    assert torch.equal(there.cpu(), round_into_(torch.empty(SIZE, dtype=torch.bfloat16), source, KEY))


@pytest.mark.parametrize("number", BITS)
def test_what_is_packed_there_unpacks_here_as_there(number: int) -> None:
    packed = pack_vector(numbers(1001, 6).to(DEVICE), number, KEY)
    assert torch.equal(packed.unpack().cpu(), replace(packed, codes=packed.codes.cpu()).unpack())


@pytest.mark.parametrize("name", METHODS)
def test_a_log_written_on_a_gpu_gives_a_processor_the_same_weights(name: str) -> None:
    algorithm, rounds = METHODS[name], rounds_of(METHODS[name])
    run = simulate(algorithm, rounds, task=task_on_the_gpu(rounds, algorithm))
    node, _ = Node.start(toy_task(rounds, algorithm), algorithm, run.seed, codec)
    node.catch_up(run.state.log.since(0))  # which checks the fingerprints in the log too
    assert bits(node.public) == run.public
    assert len(run.records) == rounds


def task_on_the_gpu(rounds: int, algorithm: AnyAlgorithm) -> Task:
    """The toy's task with its model on the GPU; rows follow it there."""
    task = toy_task(rounds, algorithm)
    nn.Module.to(task.model, DEVICE)
    inner = task.objective

    class There(SquaredError):
        def loss(self, model: nn.Module, rows: Rows) -> torch.Tensor:
            return inner.loss(model, Rows(rows.x.to(DEVICE), rows.y.to(DEVICE)))

    return Task.of(task.model, There(), rounds)

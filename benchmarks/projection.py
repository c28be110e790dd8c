"""The time of projection: against copying memory, against the published projection, and against training.

Four figures. The published projection (published_projection.py) takes hours for a whole tensor, so the time of a few
columns is measured and multiplied: columns are independent and take equal time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from fedferret.local.response_loss import ResponseLoss

from benchmarks import published_projection as published
from benchmarks.measure import Figure, alternate, main, seconds
from fedferret.bases.projector import Projector
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.truncated_normal import TruncatedNormal
from fedferret.core.algorithm import Task
from fedferret.core.keys import Key
from fedferret.data.batches import Batch
from fedferret.local.first_order import FirstOrder
from fedferret.models.loading import load

CLAIM = "Projecting and reconstructing an update costs little compared with training."
KEY = Key.of(0, "projection benchmark")
MODEL = "packaged:smollm2"
LARGEST = 49_152 * 576  # weights of SmolLM2-135M's largest tensor, the embedding


class RandomTokens:
    """Examples of random tokens, all of one length and all in the loss: the computation of training without data."""

    def __init__(self, count: int, length: int, vocabulary: int, key: Key) -> None:
        self._ids = (key.uniform(count * length) * vocabulary).long().view(count, length)

    def __len__(self) -> int:
        return len(self._ids)

    def batches(self, size: int, key: Key) -> Iterator[Any]:
        """Batches in the order of the examples.

        Args:
            size: examples per batch.
            key: not used.
        """
        for ids in torch.split(self._ids, size):
            yield Batch(ids, torch.ones_like(ids), ids)


def random_update(count: int) -> torch.Tensor:
    """Uniform values in [-1, 1), fp32, shape (count,)."""
    return (2 * KEY.uniform(count) - 1).float()


def against_a_copy() -> Figure:
    """Projection, which reads a tensor, against a copy, which reads and writes it."""
    delta, count = random_update(LARGEST), 65_536
    ratio = alternate(seconds(partial(SignBuckets().project, delta, count, KEY)), seconds(delta.clone), repetitions=15)
    return Figure(
        "project with sign buckets against clone of the same tensor",
        ratio,
        "at most",
        1.5,
        f"{LARGEST:,} weights, fp32, K = {count:,}",
    )


def against_the_published(kind: type[SignBuckets] | type[TruncatedNormal], target: float) -> Figure:
    """The seconds of the published projection over those of a basis, both for all K columns.

    Args:
        kind: the basis.
        target: lowest ratio that satisfies the claim.
    """
    size, count, columns = 1 << 20, 4096, 2
    delta = random_update(size)
    slow = seconds(partial(published.project, delta, columns, seed=0))
    # the dense basis is also timed on some columns: all K would take too long
    fast_columns = count if kind is SignBuckets else 256
    fast = seconds(partial(kind().project, delta, fast_columns, KEY))
    ratio = alternate(slow, fast, repetitions=9).scaled(first=count / columns, second=count / fast_columns)
    scaled = f"{columns} of its columns were timed and multiplied"
    if fast_columns != count:
        scaled += f", and {fast_columns} of ours"
    return Figure(
        f"the published projection against {kind.name} at the same K",
        ratio,
        "at least",
        target,
        f"{size:,} weights, K = {count:,}; {scaled}",
    )


def against_training() -> Figure:
    """The seconds of a client's projection and reconstruction over those of ten training steps."""
    loaded = load(MODEL)
    model, count, steps, tokens = loaded.model, 65_536, 10, 128
    task = Task(model, ResponseLoss(model), rounds=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    data = RandomTokens(4 * steps, tokens, int(model.config.vocab_size), KEY)
    training = FirstOrder(batch_size=4, steps=steps)
    FirstOrder(batch_size=4, steps=1).train(task, data, KEY)  # an update to project, and the warm-up
    update = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
    sizes = {name: weight.numel() for name, weight in before.items()}
    projector = Projector(sizes, SignBuckets(), count, "norm-sqrt-dim")
    counts = projector.counts(projector.norms(update.items()))

    def project_and_expand() -> None:
        coordinates, _ = projector.project(update.items(), counts, KEY)
        projector.reconstruct_(before, coordinates, counts, KEY, -1.0)

    ratio = alternate(
        seconds(project_and_expand), seconds(lambda: training.train(task, data, KEY)), repetitions=5, warm_up=0
    )
    return Figure(
        "project and expand of one client against ten local steps of 4 x 128 tokens",
        ratio,
        "at most",
        0.05,
        f"SmolLM2-135M, fp32, clipped SGD, sign buckets, K = {count:,}",
    )


def figures() -> Iterator[Figure]:
    """All four figures, the longest measurement last."""
    yield against_a_copy()
    yield against_the_published(SignBuckets, 10_000)
    yield against_the_published(TruncatedNormal, 20)
    yield against_training()


if __name__ == "__main__":
    main("projection", CLAIM, figures)

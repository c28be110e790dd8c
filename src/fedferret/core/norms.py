"""Bounds on what one client's update may do to the weights; they refuse and change nothing else.

    always              ‖update‖ <= 1 + ‖the model that it would change‖
    from four updates   ‖update‖ <= ``norm_ratio`` x the cohort's median norm
    with or without     every value of the decoded update, and its norm, is finite and at most ``LARGEST``

``update_norm`` gives the norm, for payloads that average and for those that are kept apart. A norm has no meaning for
statistics and seeds, and the server sees none where a guard masks what clients send: there, and with ``norm_limit =
"off"``, only the last line holds. The bounds depend on no order of arrival.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fedferret.core.algorithm import Algorithm, Payload
from fedferret.core.node import Node
from fedferret.core.pooling import leaves, nonfinite, within
from fedferret.core.robust_pooling import PoolSettings

FEWEST = 4  # updates from which on their median counts
LARGEST = 1e15  # magnitude of a value in an update; products of a few such values are still fp32 numbers
FINITE = sys.float_info.max  # the largest of all floats
_PIECE = 1 << 16  # values that are squared in fp64 at once: they fit in a core's cache


class NormLimits:
    """The bounds on the updates of one round."""

    def __init__(self, node: Node, settings: PoolSettings) -> None:
        """Look at the round's public state.

        Args:
            node: the server's, before the round.
            settings: of the run.
        """
        self.on = limits_off(node, settings) is None
        self._node, self._ratio = node, settings.norm_ratio
        self._most: float | None = None

    def norm(self, payload: Any) -> float | None:
        """Measure an update, and refuse one that is too large by itself.

        Args:
            payload: of one client, accepted by the method.

        Returns:
            The norm of what the payload alone would add to the weights; None where that has no meaning.

        Raises:
            ValueError: with the norm and the most that is allowed, or with what is NaN, infinite or huge.
        """
        if not isinstance(payload, Payload):  # masked: integers below the modulus
            return None
        node = self._node
        norm = node.algorithm.update_norm(node.task, node.public, payload)
        if norm is None or not math.isfinite(norm):  # names what is wrong
            check_values(payload.decoded())
        if norm is not None and not norm <= self.most:
            raise ValueError(f"the update's norm is {norm:.4g}: at most {self.most:.4g} is allowed{self._why}")
        return norm

    @property
    def most(self) -> float:
        """The largest norm of any update in this round."""
        if not self.on:
            return LARGEST
        if self._most is None:
            node = self._node
            tuned = node.algorithm.tuned(node.task, node.public)
            # where an adapter is tuned, the frozen weights say how large the model is, and every node has them
            frozen = (weight for weight in node.task.model.parameters() if not weight.requires_grad)
            self._most = 1 + euclidean_norm(chain(tuned.values(), frozen))
        return self._most

    @property
    def _why(self) -> str:
        return ", 1 + the norm of the model (pool.norm_limit)" if self.on else ""

    def outliers(self, norms: Mapping[str, float | None]) -> dict[str, str]:
        """Find updates far above the others.

        Args:
            norms: of the round's accepted updates, by client.

        Returns:
            What is wrong, by client, in the order of ``norms``; empty for fewer than four updates with a norm, and
            where the median is 0.
        """
        known = {client: norm for client, norm in norms.items() if norm is not None}
        if not self.on or len(known) < FEWEST:
            return {}
        most = self._ratio * statistics.median(known.values())
        return {
            client: f"the update's norm is {norm:.4g}: at most {most:.4g} is allowed, {self._ratio:g} times the "
            f"median of {len(known)} updates (pool.norm_ratio)"
            for client, norm in known.items()
            if most and norm > most
        }


def limits_off(node: Node, settings: PoolSettings) -> str | None:
    """Why updates' norms are not limited in this run.

    Args:
        node: with the run's method and guards.
        settings: of the run.

    Returns:
        A clause for the operator; None where norms are limited.
    """
    if settings.norm_limit == "off":
        return 'pool.norm_limit="off"'
    if any(guard.modulus is not None for guard in node.guards):
        return "the server sees masked sums alone"
    if type(node.algorithm).update_norm is Algorithm.update_norm:
        return f"the updates of {node.algorithm.name} have none"
    return None


def check_values(value: Any, most: float = LARGEST) -> None:
    """Refuse NaN, infinity and huge floats in a message.

    Args:
        value: a message, or a part of one.
        most: the largest magnitude.

    Raises:
        ValueError: names the first float or float tensor that is out of range.
    """
    for path, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            inside = not leaf.is_floating_point() or within(leaf, most)
        else:
            inside = not isinstance(leaf, float) or -most <= leaf <= most
        if not inside:
            wrong = "NaN or infinity" if nonfinite(leaf) is not None else f"values above {most:g}"
            raise ValueError(f"{path or 'a value'} holds {wrong}")


def euclidean_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm over all values of some tensors, summed in fp64 without a copy of any tensor.

    Args:
        tensors: of any float types, shapes and devices.

    Returns:
        The norm; infinity or NaN where a value is.
    """
    pieces = (piece for tensor in tensors for piece in torch.split(tensor.detach().reshape(-1), _PIECE))
    return math.sqrt(math.fsum(float(wide @ wide) for wide in (piece.double() for piece in pieces)))

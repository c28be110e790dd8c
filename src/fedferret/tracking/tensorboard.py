"""The curves of a run for TensorBoard, on request, from the same events as the event log.

Tags: ``loss/<held-out set>``, ``perplexity/<held-out set>`` and so on for every metric, ``loss/training``,
``bytes/up``, ``bytes/down`` (totals so far), ``seconds/round``, ``seconds/local``, ``seconds/overhead``,
``clients/failed``. A step is a round.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError


class TensorBoard:
    """Writes the events of ``EventLog`` that are curves into ``folder``/tensorboard.

    Args:
        folder: the run folder.
        after: the last round of the checkpoint that a resumed run continues from. Later points are discarded.
        total_bytes: up and down until that round.
    Raises:
        UserError: if the tensorboard package is not installed.
    """

    def __init__(self, folder: Path, after: int = 0, total_bytes: tuple[int, int] = (0, 0)) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "TensorBoard logs need a package that is not installed: `pip install tensorboard`, or turn them off"
            )
        from torch.utils.tensorboard import SummaryWriter  # here, because other runs need not wait a second for it

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)
        self._up, self._down = total_bytes

    def write(self, kind: str, /, **fields: Any) -> None:
        """Add the points of one event. Kinds without curves are ignored.

        Args:
            kind: of the event.
            fields: as ``EventLog.write`` takes them.
        """
        if kind == "evaluation":
            for name, scores in fields["results"].items():
                for metric, value in scores.items():
                    if metric not in ("tokens", "examples"):
                        self._point(f"{metric}/{name}", value, fields["round"])
        elif kind == "round":
            self._up += sum(fields["bytes_up"].values())
            self._down += sum(fields["bytes_down"].values())
            points = {
                "loss/training": fields["loss"],
                "bytes/up": self._up,
                "bytes/down": self._down,
                "seconds/round": fields["seconds"],
                "seconds/local": fields["seconds_local"],
                "seconds/overhead": fields["seconds_overhead"],
                "clients/failed": len(fields["failures"]),
            }
            for tag, value in points.items():
                self._point(tag, value, fields["round"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def _point(self, tag: str, value: float, step: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(tag, value, step)

"""The devices a model can be put on, by the names users give them."""

from __future__ import annotations

import re

from fedferret.core.errors import UserError


def resolve_device(name: str) -> str:
    """The torch device that ``name`` ("cpu", "cuda", "cuda:1", "mps" or "auto") stands for on this machine.

    "auto" takes a CUDA GPU before Apple's and either before the processor. Raises :class:`UserError` for a name
    that is no device or a device that is not here.
    """
    if name == "cpu":
        return name
    if not re.fullmatch(r"auto|mps|cuda(:\d+)?", name):
        raise UserError(f'device "{name}" is not known; allowed: cpu, cuda, cuda:<number>, mps, auto')
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["mps"] if torch.backends.mps.is_available() else []), *(f"cuda:{i}" for i in range(count))]
    if name == "auto":
        return "cuda" if count else here[-1]
    if name not in here and not (name == "cuda" and count):
        raise UserError(f'device "{name}" is not on this machine; available: {", ".join(here)}')
    return name

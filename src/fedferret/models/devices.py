"""The devices that a model can be put on, by the names in a recipe."""

from __future__ import annotations

import re

from fedferret.core.errors import UserError


def resolve_device(name: str) -> str:
    """The torch device of a name on this machine.

    Args:
        name: "cpu", "cuda", "cuda:<number>", "mps" or "auto". "auto" takes a CUDA GPU, else Apple's GPU, else the CPU.
    Raises:
        UserError: for an unknown name, or a device that this machine does not have.
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

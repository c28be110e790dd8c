"""From a checkpoint of PyTorch's to a safetensors file: tensors alone, nothing of the pickle is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedferret.models.safetensors_file import StreamedTensor, write_tensors

_COUNTER = "num_batches_tracked"  # of BatchNorm; nothing reads it in evaluation


def convert_checkpoint(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the weights and buffers of a checkpoint as a folder; names lose the underscores before their parts.

    Args:
        source: what ``torch.save`` wrote, a mapping of names to tensors.
        folder: an existing folder to write into.
        config: the content of ``config.json``.
    """
    import torch

    stored = torch.load(source, map_location="cpu", weights_only=True)
    tensors = {
        re.sub(r"(^|\.)_", r"\1", name): StreamedTensor(tuple(value.shape), partial(_whole, value.numpy()))
        for name, value in stored.items()
        if not name.endswith(_COUNTER)
    }
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _whole(values: Any) -> tuple[Any]:
    return (values,)

"""Reads an adapter that ``write_adapter`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.text import plain_line
from fedferret.models.adapters.adapter_folder import FILE
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.prefix import Prefix
from fedferret.models.adapters.prompt import EncodedPrompt, LearnedPrompt

_KINDS: dict[str, type[Adapter]] = {each.__name__: each for each in (EncodedPrompt, LearnedPrompt, Prefix)}


def read_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach an adapter to its base.

    Args:
        model: the base, a classifier with the adapter's number of classes where the adapter is a classifier's; changed
            in place.
        folder: that ``fedferret export`` wrote.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        UserError: the folder is of no use, or belongs to another model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["adapter"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        attached = _KINDS[about["kind"]](**about["settings"]).attach(model, Key.of(0, "read"))
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not an adapter of fedferret's ({plain_line(str(error), 200)})") from None
    tuned = tree.parameters(attached)
    odd = sorted(set(tuned) ^ set(weights)) or [name for name in tuned if tuned[name].shape != weights[name].shape]
    if odd:
        raise UserError(f"{path} belongs to another model: {plain_line(odd[0], 200)} is odd or missing")
    tree.copy_(tuned, weights)
    return attached

"""In which precision an export is written: what the base was stored in, or what ``--dtype`` asks for.

Tuning moves weights by less than half a rounding step of bf16, so rounding to the nearest would give the base back.
What has no place in bf16 is rounded at random, by the run's seed and the tensor's name: right in the mean, the same
bits every time. Values that bf16 has, those of a bf16 run among them, stay. A merged adapter is added in fp32 first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedferret.bases.stochastic_rounding import round_into_
from fedferret.config import DEFAULT_OBJECTIVE, ModelSettings
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.huggingface import Dtype, require_causal
from fedferret.models.loading import configuration
from fedferret.objectives.interface import ModelObjective


def chosen_dtype(
    asked: Dtype | None, objective: ModelObjective, settings: ModelSettings, log: Callable[[str], None]
) -> Dtype:
    """The precision of an export.

    Args:
        asked: with ``--dtype``; None: what the run held its weights in, or what the base was stored in.
        objective: of the run.
        settings: of the run's model.
        log: called with one line where weights may be rounded.

    Raises:
        UserError: a classifier in bf16.
    """
    if objective.name != DEFAULT_OBJECTIVE:
        if asked == "bf16":
            raise UserError(f'--dtype bf16: objective "{objective.name}" has fp32 weights alone; leave --dtype out')
        return "fp32"
    if asked is not None:
        return asked
    if settings.dtype == "bf16":
        return "bf16"
    if configuration(settings.name, require_causal).dtype != torch.bfloat16:
        return "fp32"
    log("Writing bf16, as the base is stored, rounded at random by the seed; --dtype fp32 keeps every bit.")
    return "bf16"


def widen(model: nn.Module) -> None:
    """Make all parameters fp32, exactly.

    Args:
        model: fp32 or bf16; changed in place.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def round_to(model: nn.Module, dtype: Dtype, key: Key) -> None:
    """Give a model the precision of the export.

    Args:
        model: with fp32 parameters; changed in place, one parameter at a time.
        dtype: of the export.
        key: draws the roundings; each parameter's key is derived from it by the parameter's name.
    """
    if dtype == "bf16":
        for name, parameter in model.named_parameters():
            rounded = torch.empty_like(parameter, dtype=torch.bfloat16)
            parameter.data = round_into_(rounded, parameter.data, key.fold(name))

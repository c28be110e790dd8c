"""Scale and shift of features: y = γ ⊙ f(x) + β after every linear module and norm (Lian et al., arXiv 2210.08823).

    f is linear           merged: W <- diag(γ) W        b <- γ b + β
    f is a norm                   w <- γ w              b <- γ b + β         w <- γ (1 + w) - 1 where 1 + w scales
    its shift is pushed           w <- γ w              b of each reader <- b + W β, before the reader is merged

γ and β are fp32, whatever the base is held in. A shift is trained only where the plain architecture has a place for it
(``bias_places``), so that merging never drops one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.adapters.bias_places import READERS, bias_places
from fedferret.models.adapters.drawing import standard_normal
from fedferret.models.adapters.features import chosen_features, is_linear
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.norms import weight_offset
from fedferret.models.classifiers import inner_transformer

Initial: TypeAlias = Literal["identity", "normal"]
Shift: TypeAlias = Literal["auto", "all", "pushed", "none"]
NORM = "ssf_norm_"  # begins the names of a norm's scale and shift
_DEVIATION = 0.02  # of the paper's code


@dataclass(frozen=True, kw_only=True)
class ScaleShift(Adapter):
    """A scale and a shift of the output of linear modules and norms, in place: the model's class stays what it was.

    Attributes:
        initial: "identity" is γ = 1 and β = 0, so that the model begins as its base; "normal" is normal around these.
        shift: where β is trained. "auto": where the architecture has a place for it; "all": everywhere, refused where
            there is no place; "pushed": as "auto", and at norms where all readers have a place; "none": nowhere.
        modules: ends of names, one pattern for a whole name, "all-linear", or None for all.
    """

    merges: ClassVar[bool] = True
    initial: Initial = "identity"
    shift: Shift = "auto"
    modules: str | Sequence[str] | None = None

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """Refused: no other program reads scales and shifts alone."""
        raise UserError("no other program reads scales and shifts alone: they are merged into the model; use --to")

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        features = chosen_features(model, self.modules)
        shifted = self._shifted(model, list(features))
        model.requires_grad_(False)
        for name, shape in features.items():
            module: Any = model.get_submodule(name)
            for part, mean in (("scale", 1.0), ("shift", 0.0)):
                if part == "scale" or name in shifted:
                    first = self._first(torch.full(shape, mean, device=module.weight.device), key.fold(name, part))
                    module.register_parameter(_name(module, part), nn.Parameter(first))
            hook = partial(_scale_and_shift, _name(module, "scale"), _name(module, "shift"))
            module.ssf_hook = module.register_forward_hook(hook)
        return model

    def _first(self, mean: Tensor, key: Key) -> Tensor:
        """The first values, fp32; on the meta device none is drawn."""
        if self.initial == "identity" or mean.is_meta:
            return mean.float()
        drawn = (_DEVIATION * standard_normal(mean.numel(), key)).view(mean.shape)
        return (mean.cpu().double() + drawn).float().to(mean.device)

    def _shifted(self, model: nn.Module, names: Sequence[str]) -> set[str]:
        """Which modules get a shift. Raises UserError."""
        if self.shift == "none":
            return set()
        places = bias_places(model)
        inner: Any = inner_transformer(model)[1]
        kind = getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)
        shifted = {name for name in names if name in places}
        if self.shift == "pushed":
            pushed = {name for name in names if name not in places and places.readers(name)}
            if not pushed:
                raise UserError(
                    f'algorithm.shift="pushed": no norm of {kind} is read by modules that can all have a bias; '
                    f'architectures where some can: {", ".join(READERS)}; set shift="auto"'
                )
            shifted |= pushed
        left = [name for name in names if name not in shifted]
        if self.shift == "all" and left:
            raise UserError(
                f'algorithm.shift="all": {kind} has no place for a shift of {left[0]} ({len(left)} of {len(names)} '
                f'modules), so the result could not be exported; set shift="auto" or "none", or name others in modules'
            )
        places.check(shifted)
        return shifted

    @torch.no_grad()
    def _merge(self, model: nn.Module) -> nn.Module:
        tuned = _tuned(model)
        for name, module in tuned.items():
            if not module.weight.is_floating_point():
                raise UserError(
                    f"the weights of {name} are quantised, and merging would round them again: merge into the "
                    f"checkpoint in full precision, as `fedferret export` does"
                )
        places = bias_places(model)
        shifts = {name: found for name, module in tuned.items() if (found := _part(module, "shift")) is not None}
        pushed = {name: places.readers(name) for name in shifts if name not in places}
        if lost := [name for name, readers in pushed.items() if not readers]:
            raise UserError(f"the plain architecture has no place for the shift of {lost[0]}: it would be lost")
        places.add(shifts)
        for name, readers in pushed.items():
            for reader in map(model.get_submodule, readers):  # merged below, which scales what is added here
                assert isinstance(reader, nn.Linear)
                reader.bias.copy_(reader.bias.double() + reader.weight.double() @ shifts[name].double())
        for name, module in tuned.items():
            _fold(module, None if name in pushed else shifts.get(name))
        return self._detach(model)

    def _detach(self, model: nn.Module) -> nn.Module:
        for module in _tuned(model).values():
            module.ssf_hook.remove()
            for part in ("ssf_hook", _name(module, "scale"), _name(module, "shift")):
                if hasattr(module, part):
                    delattr(module, part)
        return model


def _tuned(model: nn.Module) -> dict[str, Any]:
    """The modules with a scale, by full name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "ssf_hook")}


def _name(module: nn.Module, part: str) -> str:
    """Of a parameter: that of a norm says so, for methods that treat norms apart."""
    return f"ssf_{part}" if is_linear(module) else f"{NORM}{part}"


def _part(module: nn.Module, part: str) -> Tensor | None:
    """A module's scale or shift; None where the module has none."""
    found: Tensor | None = getattr(module, _name(module, part), None)
    return found


def _scale_and_shift(scale_name: str, shift_name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: γ ⊙ output + β in fp32, rounded once to the output's dtype."""
    scale, shift, wide = getattr(module, scale_name), getattr(module, shift_name, None), output.float()
    scaled = wide * scale if shift is None else torch.addcmul(shift, wide, scale)
    return scaled.to(output.dtype)


def _fold(module: Any, shift: Tensor | None) -> None:
    """Merge γ, and β if given, into a module's own weight and bias."""
    scale = getattr(module, _name(module, "scale"))
    if isinstance(module, nn.Linear):
        module.weight.mul_(scale[:, None])
    elif is_linear(module):  # GPT-2's Conv1D has its weight transposed
        module.weight.mul_(scale)
    else:
        offset = weight_offset(module)
        assert offset is not None  # of a norm that was chosen
        module.weight.copy_(scale.double() * (offset + module.weight.double()) - offset)
    if getattr(module, "bias", None) is not None:
        bias = scale.double() * module.bias.double()
        module.bias.copy_(bias if shift is None else bias + shift.double())

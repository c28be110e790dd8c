"""LoRA by the peft library: y = W x + s B A x, W frozen, s = α / r (Hu et al., ICLR 2022, arXiv 2106.09685).

rsLoRA     s = α / √r (Kalajdzievski, arXiv 2312.03732)
DoRA       y = m (W + s B A) x / ‖W + s B A‖ row by row, the norm a constant to the gradient; m = ‖W‖ at first
           (Liu et al., ICML 2024, arXiv 2402.09353)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.core.keys import Key
from fedferret.models.adapters.dense import dense_modules, dense_names, make_dense, outermost
from fedferret.models.adapters.drawing import draw, draw_magnitudes, no_trace
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.modules import chosen_modules, linear_modules, read_as_given
from fedferret.models.adapters.peft_folder import PeftFolder, read_peft_folder, write_peft_folder
from fedferret.models.adapters.start import check_start, load_start, saved
from fedferret.models.classifiers import Classifier
from fedferret.models.folders import build_folder

FACTOR_A, FACTOR_B = ".lora_A.default.weight", ".lora_B.default.weight"  # follow a module's name in those of factors


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank updates of linear modules, in place: the model's class and its functions stay what they were.

    Attributes:
        rank: r.
        alpha: α; the update is scaled by α / r.
        rslora: scaled by α / √r instead.
        dora: a magnitude for every output of a module is trained too.
        modules_to_save: ends of the names of modules that are trained densely beside the factors.
        start: an adapter to go on from, with the settings above; None: B = 0.
        modules: peft's ``target_modules``, for linear modules: the ends of their names, one pattern for a whole name,
            "all-linear" (the output head left out), or None for the architecture's default.
        freeze_a: the matrices A keep their first values.
    """

    merges: ClassVar[bool] = True
    rank: int
    alpha: float
    modules: str | Sequence[str] | None = None
    freeze_a: bool = False
    rslora: bool = False
    dora: bool = False
    modules_to_save: Sequence[str] = ()
    start: PeftFolder | None = None

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        with quick_imports():
            import peft

        if self.start is None:
            names = chosen_modules(model, self.modules)
            dense = list(dense_modules(model, self.modules_to_save, names))
        else:
            names, dense = check_start(model, linear_modules(model), self.start)
        with no_trace(), read_as_given(model):
            peft.inject_adapter_in_model(self._config(exactly(names)), model)
        draw(model, key)
        if self.dora:
            draw_magnitudes(model)
        make_dense(model, dense)
        if self.start is not None:
            load_start(model, self.start)
        if self.freeze_a:
            for a, _ in factors(model).values():
                a.requires_grad_(False)
        return model

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """An adapter of peft's; ``PeftModel.from_pretrained(model, folder)`` reads it."""
        if isinstance(model, Classifier):
            raise UserError("a classifier's adapter is merged: plain peft has no place for it; use --to")
        dense = outermost(dense_names(model))
        return self.write(model, base, folder, list(factors(model)), saved(model, dense), dense)

    def write(
        self,
        model: nn.Module,
        base: str,
        folder: Path,
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
        dense: Sequence[str] = (),
    ) -> str:
        """Write factors as an adapter of peft's.

        Args:
            model: with the modules, whatever adapter it has.
            base: the base model's name.
            folder: absent or empty.
            names: full names of the adapted modules.
            tensors: by peft's names without its prefix.
            dense: full names of the modules that are trained densely.

        Returns:
            One line on how to load the folder.

        Raises:
            UserError: the folder is not empty, or peft would read the names as others.
        """
        config = self._config(as_ends(model, names) or exactly(names))
        config.task_type, config.base_model_name_or_path, config.modules_to_save = (
            "CAUSAL_LM",
            base,
            list(dense) or None,
        )
        refuse_reread(config, model)
        config.fan_in_fan_out = any(_is_transposed(model.get_submodule(name)) for name in names)
        build_folder(folder, lambda temporary: write_peft_folder(temporary, config, tensors))
        return f"{folder} holds the adapter alone: peft's PeftModel.from_pretrained(base, folder)"

    def _config(self, modules: str | list[str]) -> Any:
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it, and folders hold fractions
            target_modules=modules,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )

    def _merge(self, model: nn.Module) -> nn.Module:
        return _without_layers(model, merged=True)

    def _detach(self, model: nn.Module) -> nn.Module:
        return _without_layers(model, merged=False)


def continued(model: nn.Module, folder: Path, given: Mapping[str, Any], freeze_a: bool) -> LoRA:
    """The adapter that a folder of peft's holds.

    Args:
        model: the plain architecture, on any device, the meta device included.
        folder: that peft, or ``LoRA.export``, wrote.
        given: settings of a recipe by name; those that are None are the folder's.
        freeze_a: the matrices A stay what the folder has.

    Returns:
        An adapter with the folder's settings and first values.

    Raises:
        UserError: the folder is of no use, or a setting contradicts it.
    """
    start = read_peft_folder(folder)
    dense = tuple(dict.fromkeys(name.rpartition(".")[0] for name in start.dense))
    known: dict[str, Any] = {"rank": start.rank, "alpha": start.alpha, "rslora": start.rslora, "dora": start.dora}
    for name, value in known.items():
        if given[name] not in (None, value):
            raise UserError(f"algorithm.{name}={given[name]}: the adapter in {folder} has {value}; leave {name} out")
    if given["modules"] is not None and set(chosen_modules(model, given["modules"])) != set(start.modules):
        raise UserError(f"algorithm.modules: the adapter in {folder} is for other modules; leave modules out")
    asked = given["modules_to_save"]
    if asked is not None and {*dense_modules(model, asked, start.modules)} != {*dense_modules(model, dense, ())}:
        raise UserError(
            f"algorithm.modules_to_save={list(asked)}: the adapter in {folder} has {list(dense)}; leave it out"
        )
    return LoRA(modules=start.modules, freeze_a=freeze_a, start=start, **known)


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The LoRA factors of a model.

    Args:
        model: what ``LoRA.attach`` returned.

    Returns:
        (A, B) by the full name of the module, shapes (r, inputs) and (outputs, r); the parameters themselves.
    """
    found = dict(model.named_parameters())
    return {
        name.removesuffix(FACTOR_A): (a, found[name.removesuffix(FACTOR_A) + FACTOR_B])
        for name, a in found.items()
        if name.endswith(FACTOR_A)
    }


def exactly(names: Sequence[str]) -> str:
    """Peft's pattern for these modules alone: it reads a list as ends of names, and would find others.

    Args:
        names: full names.

    Returns:
        A regular expression.
    """
    return "|".join(re.escape(name) for name in names)


def refuse_reread(config: Any, model: nn.Module) -> None:
    """Refuse an adapter that plain peft would attach to other modules than its names say.

    Args:
        config: peft's, with the modules' names.
        model: with LoRA.

    Raises:
        UserError: peft reads the names of this architecture as those of an older layout.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    read = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(read, model, None)
        same = not read.target_parameters
    except ValueError:
        same = False
    if not same:
        kind = getattr(getattr(model, "config", None), "model_type", "this architecture")
        raise UserError(
            f"peft reads module names of {kind} as those of an older layout, and would adapt others: use --to, or name "
            f"in algorithm.modules those of the attention alone"
        )


def as_ends(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The ends of names as other programs read them, where they mean these modules and no other.

    Args:
        model: with or without LoRA.
        names: full names of the adapted modules.

    Returns:
        The names' last words; empty where a module that is not named ends so too.
    """
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]
    return ends if sorted(found) == sorted(names) else []


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module, or the one in peft's layer, is GPT-2's ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or bool(getattr(module, "fan_in_fan_out", False))


@torch.no_grad()
def _without_layers(model: nn.Module, merged: bool) -> nn.Module:
    """The plain architecture, in place, with the update added to the weights if ``merged``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merged:
                base: Any = layer.get_base_layer()
                layer.merge(safe_merge=not base.weight.is_meta)  # on the meta device no value can be looked at
            model.set_submodule(name, layer.get_base_layer())
    untyped: Any = model
    if hasattr(untyped, "peft_config"):
        del untyped.peft_config
    return model

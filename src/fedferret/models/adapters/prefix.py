"""Per-layer prefixes (P-tuning v2): every attention layer of a frozen model reads p learned keys and values first.

Liu et al. "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally and Across Scales and Tasks", ACL
2022, arXiv 2110.07602; after Li, Liang, "Prefix-Tuning", ACL 2021, arXiv 2101.00190. Without the network that may make
the prefixes.

A prefix takes no position: an example's tokens keep the positions that they have without it, and a prefix's keys are
not rotated. So a prefix uses up none of the model's positions, and examples that share a packed row each see it as they
do alone. A module that several layers share (ALBERT) has one prefix. Values begin normal with deviation 0.02, as
transformers draws embeddings: a prefix of nearly zero takes some attention and adds nearly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.adapters.adapter_folder import write_adapter
from fedferret.models.adapters.attention import KEY, UNREAD, VALUE, attention_layers, switch, unread_layers
from fedferret.models.adapters.drawing import no_trace, standard_normal
from fedferret.models.adapters.interface import Adapter
from fedferret.models.adapters.prefix_folder import peft_prefix
from fedferret.models.classifiers import Classifier, TextClassifier
from fedferret.models.folders import build_folder

_DEVIATION = 0.02  # of the first values


@dataclass(frozen=True, kw_only=True)
class Prefix(Adapter):
    """Keys and values, of shape (p, heads * width of a head), in each attention layer of a transformer.

    Attributes:
        tokens: p.
        left_out: numbers of attention layers, from 0, that do not read their prefixes.
    """

    merges: ClassVar[bool] = False
    tokens: int
    left_out: Sequence[int] = ()

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """An adapter of peft's where peft computes the same with it; else a folder that ``read_adapter`` reads."""
        unread = unread_layers(model)  # peft has a prefix in each layer
        made = None if unread or isinstance(model, Classifier) else peft_prefix(model)
        if made is None:
            return write_adapter(replace(self, left_out=unread), model, base, folder, classes)
        build_folder(folder, lambda temporary: made.write(temporary, base))
        return f"{folder} holds prefixes, not a whole model: peft's PeftModel.from_pretrained(base, folder)"

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        transformer = _transformer(model)
        with no_trace():
            layers = attention_layers(model, transformer)
        model.requires_grad_(False)
        for layer in layers:
            module = model.get_submodule(layer.name)
            for name, width in ((KEY, layer.key_width), (VALUE, layer.value_width)):
                shape = (self.tokens, layer.heads * width)
                values = torch.empty(shape, device=next(model.parameters()).device)
                if not values.is_meta:
                    drawn = standard_normal(values.numel(), key.fold(f"{layer.name}.{name}"))
                    values = (_DEVIATION * drawn).float().view(shape).to(values.device)
                module.register_parameter(name, nn.Parameter(values))
        for number in self.left_out:
            model.get_submodule(layers[number].name).__dict__[UNREAD] = True
        switch(model, True)
        return model

    def _detach(self, model: nn.Module) -> nn.Module:
        switch(model, False)
        for module in model.modules():
            for name in (KEY, VALUE):
                if name in module._parameters:
                    del module._parameters[name]
            module.__dict__.pop(UNREAD, None)
        return model


def _transformer(model: nn.Module) -> Any:
    """What has attention layers: the model, or a text classifier's encoder."""
    if isinstance(model, TextClassifier):
        return model.encoder
    if isinstance(model, Classifier):
        raise UserError("prefixes are read by attention layers, and this model reads images; choose another method")
    if not hasattr(model, "config"):
        raise UserError(f"prefixes need a transformers model, not a {type(model).__name__}")
    return model

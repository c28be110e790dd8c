"""A frozen base in 4 or 8 bits a weight, for adapters (QLoRA: Dettmers et al., NeurIPS 2023, arXiv 2305.14314).

    "4-bit"    NF4 with double quantisation, by blocks of 64 weights: 4.13 bits a weight
    "8-bit"    int8 with a scale per output row (LLM.int8() without outliers): 8 bits a weight and 4 bytes a row

Linear layers are quantised by the bitsandbytes library, one at a time, so that at most one of them is there twice. The
output head, embeddings and norms stay as they were loaded. A product is computed in the dtype of its input; gradients
flow to the input, and none to the codes.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from torch import nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports

Quantised: TypeAlias = Literal["4-bit", "8-bit"]


def check_installed(kind: Quantised) -> None:
    """Refuse where bitsandbytes is missing.

    Args:
        kind: as asked for, for the message.

    Raises:
        UserError: with the command that installs the library.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f'model.quantised="{kind}": needs bitsandbytes; pip install "fedferret[quantised]"')


def quantise(model: Any, kind: Quantised) -> None:
    """Replace a model's linear layers by quantised ones, and freeze the model.

    Args:
        model: a transformers model without an adapter, on the CPU; changed in place.
        kind: "4-bit" or "8-bit".

    Raises:
        UserError: bitsandbytes is missing, or the model has no linear layer besides its output head.
    """
    check_installed(kind)
    head = model.get_output_embeddings()
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    if not names:
        raise UserError(f'model.quantised="{kind}": this architecture has no linear layer to quantise; leave it out')
    model.requires_grad_(False)
    for name in names:
        dense = model.get_submodule(name)
        model.set_submodule(name, _four_bit(dense) if kind == "4-bit" else _eight_bit(dense))
    # how peft knows which of its layers to use
    setattr(model, "is_loaded_in_4bit" if kind == "4-bit" else "is_loaded_in_8bit", True)


def _library() -> Any:
    with quick_imports():
        return import_module("bitsandbytes")


def _four_bit(dense: nn.Linear) -> nn.Module:
    bnb = _library()
    shape, weight = (dense.in_features, dense.out_features), dense.weight.detach()
    layer = bnb.nn.Linear4bit(
        *shape, bias=dense.bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    # After a pass without gradients the library would pack the codes for processors with bf16 products. From then on no
    # gradient passes the layer: an adapter under it would be tuned by nothing, without a word.
    layer.support_avx512bf16_for_cpu = False
    return _with_bias(layer, dense)


def _eight_bit(dense: nn.Linear) -> nn.Module:
    bnb = _library()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a product: "will be cast"
    shape, weight = (dense.in_features, dense.out_features), dense.weight.detach()
    layer = bnb.nn.Linear8bitLt(*shape, bias=dense.bias is not None, has_fp16_weights=False, device="meta")
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return _with_bias(layer, dense)


def _with_bias(layer: Any, dense: nn.Linear) -> nn.Module:
    layer.bias = dense.bias
    quantised: nn.Module = layer.to("cpu")  # which quantises
    return quantised.requires_grad_(False).eval()

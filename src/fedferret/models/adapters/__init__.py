"""Adapters: a few new weights in or around a frozen model, behind one interface.

    LoRA             y = W x + (α / r) B A x  for linear modules                         merged into W, or exported
    Latent           y = W x + B R A x  with B and A frozen and R of r x r tuned         likewise
    UniLoRA          y = W x + B A x  with all values of B and A from one short vector   likewise
    ScaleShift       y = γ ⊙ f(x) + β  for linear modules and norms                      merged into weights and biases
    LearnedPrompt    V vectors before every example's embeddings                         exported as peft's adapter
    EncodedPrompt    the same V vectors, made by a small network from V others           likewise
    Prefix           p keys and values before each attention layer's own                 likewise
    Gates            y = W (M ⊙ h), a neuron or a head open or closed; W is frozen       merged: closed columns become 0
    RowThresholds    y_i = 0 where the row w_i is small; the weights are trained too     merged: these rows become 0

What neither merges nor has a form of peft's is exported as a folder that ``read_adapter`` reads.

An adapter's weights alone require a gradient after ``attach``, so they alone are trained, sent and saved. They follow
from a key: peft draws from the global generator, which is put back, and the values are drawn again.
"""

from __future__ import annotations

from fedferret.models.adapters.attention import prefix_layers, without_prefixes
from fedferret.models.adapters.gates import GATE, Gated, Gates, gate_masks, gated_modules, open_share
from fedferret.models.adapters.interface import Adapter, adapter_of, prefix_of, released, transformer_of
from fedferret.models.adapters.latent import LATENT_A, LATENT_B, LATENT_R, Latent
from fedferret.models.adapters.lora import FACTOR_A, FACTOR_B, LoRA, continued, factors
from fedferret.models.adapters.modules import ALL_LINEAR, default_modules, linear_modules
from fedferret.models.adapters.peft_folder import read_peft_folder
from fedferret.models.adapters.prefix import Prefix
from fedferret.models.adapters.products import Products, sizes, tuned_modules
from fedferret.models.adapters.prompt import EncodedPrompt, LearnedPrompt
from fedferret.models.adapters.read import read_adapter
from fedferret.models.adapters.row_thresholds import (
    THRESHOLD,
    RowThresholds,
    Window,
    density,
    masked_modules,
    row_mask,
    row_masks,
    threshold_names,
)
from fedferret.models.adapters.scale_shift import NORM, Initial, ScaleShift, Shift
from fedferret.models.adapters.uni_lora import VECTOR, UniLoRA

__all__ = [
    "ALL_LINEAR",
    "FACTOR_A",
    "FACTOR_B",
    "GATE",
    "LATENT_A",
    "LATENT_B",
    "LATENT_R",
    "NORM",
    "THRESHOLD",
    "VECTOR",
    "Adapter",
    "EncodedPrompt",
    "Gated",
    "Gates",
    "Initial",
    "Latent",
    "LearnedPrompt",
    "LoRA",
    "Prefix",
    "Products",
    "RowThresholds",
    "ScaleShift",
    "Shift",
    "UniLoRA",
    "Window",
    "adapter_of",
    "continued",
    "default_modules",
    "density",
    "factors",
    "gate_masks",
    "gated_modules",
    "linear_modules",
    "masked_modules",
    "open_share",
    "prefix_layers",
    "prefix_of",
    "read_adapter",
    "read_peft_folder",
    "released",
    "row_mask",
    "row_masks",
    "sizes",
    "threshold_names",
    "transformer_of",
    "tuned_modules",
    "without_prefixes",
]

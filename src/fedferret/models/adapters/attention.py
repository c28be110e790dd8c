"""Keys and values that attention layers read before their own, by transformers' attention interface.

A layer of transformers looks up the function that attends by a name in the model's configuration. Two names are added
to transformers' tables, once, when the first model needs them; other models never use the names. The function puts a
layer's prefix before the keys and values that the layer made (after rotary positions, before heads are repeated), lets
every token see the prefix whatever the mask, and calls the function that the model had: scaled-dot-product attention,
or the architecture's own "eager" one. A cache holds the layer's own keys and values alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line

KEY, VALUE = "prefix_key", "prefix_value"  # a layer's parameters, shape (p, heads * width of a head)
UNREAD = "prefix_unread"  # a layer's attribute: whether its prefix is left out for now
_NAMES = {"sdpa": "fedferret_prefix_sdpa", "eager": "fedferret_prefix_eager"}  # by what the model had
_PROBE = 3  # tokens; their numbers are 1, 2, 3


@dataclass(frozen=True)
class AttentionLayer:
    """A module that attends, as a short row showed it.

    Attributes:
        name: full name of the module.
        heads: of keys and values.
        key_width: of one head's keys.
        value_width: of one head's values.
    """

    name: str
    heads: int
    key_width: int
    value_width: int


_SEEN: ContextVar[dict[nn.Module, tuple[int, int, int]] | None] = ContextVar("_SEEN", default=None)


@torch.no_grad()
def attention_layers(model: nn.Module, transformer: Any) -> list[AttentionLayer]:
    """Which modules attend by the interface, in the order in which a row passes them.

    Args:
        model: names modules; without an adapter, on any device, the meta device included.
        transformer: the transformers model in it, which reads a row of three tokens.

    Returns:
        One per module, a module that is shared by layers once.

    Raises:
        UserError: no module attends so (state-space layers, older code).
    """
    kind = type(transformer).__name__
    refusal = f"{kind} has no attention layer that reads a prefix"
    names = {module: name for name, module in model.named_modules()}
    seen: dict[nn.Module, tuple[int, int, int]] = {}
    token = _SEEN.set(seen)
    probe = transformer
    device = next(transformer.parameters()).device
    if device.type == "meta":  # where maps of many experts are known in bf16 alone
        probe = copy.deepcopy(transformer).bfloat16()
        for config in _configs(probe):
            config.pad_token_id = None  # some look for it in the row, to warn
        names |= {new: names[old] for old, new in zip(transformer.modules(), probe.modules(), strict=True)}
    try:
        switch(probe, True)
        probe(input_ids=torch.arange(1, _PROBE + 1, device=device)[None])
    except UserError:
        raise
    except Exception as error:  # whatever an architecture raises for a name that its code does not know
        raise UserError(f"{refusal} ({plain_line(f'{type(error).__name__}: {error}', 200)})") from error
    finally:
        _SEEN.reset(token)
        switch(probe, False)
    if not seen:
        raise UserError(f"{refusal}: prefixes need transformers' attention interface; choose another method")
    return [AttentionLayer(names[module], *shape) for module, shape in seen.items()]


def switch(model: nn.Module, on: bool) -> None:
    """Let a model's layers read their prefixes, or not.

    Args:
        model: that holds a transformers model.
        on: whether they are read.

    Raises:
        UserError: the model attends by another function than those that are known here.
    """
    for config in list(_configs(model)):
        had = config._attn_implementation_internal or "eager"
        plain = next((each for each, ours in _NAMES.items() if had == ours), had)
        if plain not in _NAMES:
            raise UserError(f"prefixes need attention by {' or '.join(_NAMES)}, and the model has {plain}")
        _register(plain)
        config._attn_implementation_internal = _NAMES[plain] if on else plain


def prefix_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of prefixes by the attention layer that reads them.

    Args:
        names: of tuned weights, in the model's order; a classifier's head is left out.

    Returns:
        The names of each layer's keys and values, by the layer's name, in the model's order.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        if kind in (KEY, VALUE):
            groups.setdefault(layer, []).append(name)
    return groups


def prefix_layers(model: nn.Module) -> list[tuple[str, str]]:
    """The names of a model's prefixes.

    Args:
        model: what ``Prefix.attach`` returned.

    Returns:
        The names of keys and values of each attention layer, in the model's order.
    """
    return [(key, value) for key, value in prefix_groups(name for name, _ in model.named_parameters()).values()]


@contextmanager
def without_prefixes(model: nn.Module, layers: Collection[int] | None = None) -> Iterator[None]:
    """Within this context some layers read no prefix; backward passes belong into it too.

    Args:
        model: what ``Prefix.attach`` returned.
        layers: numbers of attention layers, in the order of ``prefix_layers``, from 0; None: all.

    Returns:
        A context in which these layers attend as without an adapter. Without any prefix, the model computes what it
        does without an adapter, to the bit.
    """
    modules = _prefixed(model)
    chosen = modules if layers is None else [modules[layer] for layer in sorted(layers)]
    before = {module: module.__dict__.get(UNREAD, False) for module in chosen}
    try:
        for module in chosen:
            module.__dict__[UNREAD] = True
        yield
    finally:
        for module, unread in before.items():
            module.__dict__[UNREAD] = unread


def unread_layers(model: nn.Module) -> list[int]:
    """The layers that read no prefix for now.

    Args:
        model: what ``Prefix.attach`` returned.

    Returns:
        Their numbers, in the order of ``prefix_layers``.
    """
    return [number for number, module in enumerate(_prefixed(model)) if module.__dict__.get(UNREAD, False)]


def _prefixed(model: nn.Module) -> list[nn.Module]:
    """The layers with a prefix."""
    return [model.get_submodule(name.rpartition(".")[0]) for name, _ in prefix_layers(model)]


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            yield config


def _register(plain: str) -> None:
    """Add a name to transformers' tables, which is without effect the second time."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if _NAMES[plain] not in AttentionInterface._global_mapping:
        AttentionInterface.register(_NAMES[plain], partial(_attend, plain))
        AttentionMaskInterface.register(_NAMES[plain], ALL_MASK_ATTENTION_FUNCTIONS[plain])


def _attend(
    plain: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    """Attention over a module's prefix and its own keys and values.

    Args:
        plain: the attention that the model had.
        module: that attends.
        query: shape (B, heads, Q, K).
        key: shape (B, G, T, K).
        value: shape (B, G, T, V).
        attention_mask: shape (B or 1, heads or 1, Q or 1, T), True, or 0, where a query sees a key; or None.
        options: passed on.

    Returns:
        What the model's attention returns.
    """
    attend = _plain(plain, module)
    seen = _SEEN.get()
    if seen is not None:
        seen.setdefault(module, (key.shape[1], key.shape[3], value.shape[3]))
        return query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None
    prefix = getattr(module, KEY, None)
    if prefix is None or module.__dict__.get(UNREAD, False):
        return attend(module, query, key, value, attention_mask, **options)
    if plain == "sdpa" and attention_mask is None:
        attention_mask = _implied(module, query, key, options.get("is_causal"))
    count = len(prefix)
    if attention_mask is not None:
        seen_value = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = functional.pad(attention_mask, (count, 0), value=seen_value)
    if options.get("position_bias") is not None:
        options["position_bias"] = functional.pad(options["position_bias"], (count, 0))
    key = torch.cat((_heads(prefix, key), key), dim=2)
    value = torch.cat((_heads(getattr(module, VALUE), value), value), dim=2)
    return attend(module, query, key, value, attention_mask, **options)


def _implied(module: nn.Module, query: Tensor, key: Tensor, causal: bool | None) -> Tensor | None:
    """The mask that no mask means to scaled-dot-product attention: in a causal module none sees a later token."""
    rows, columns = query.shape[2], key.shape[2]
    if rows == 1 or not (getattr(module, "is_causal", True) if causal is None else causal):
        return None
    return torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)[None, None]


def _heads(prefix: Tensor, like: Tensor) -> Tensor:
    """A prefix (p, G * width) as keys or values of shape (B, G, p, width)."""
    rows, heads, _, width = like.shape
    return prefix.to(like.dtype).view(-1, heads, width).transpose(0, 1).expand(rows, -1, -1, -1)


def _plain(plain: str, module: nn.Module) -> Callable[..., Any]:
    """The model's own attention function."""
    from transformers import AttentionInterface

    if plain == "sdpa":
        found: Callable[..., Any] = AttentionInterface._global_mapping["sdpa"]
        return found
    own: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise UserError(f"{type(module).__name__} has no attention function that could read a prefix")
    return own

"""Next-token prediction on completions: the loss of a causal language model on response positions only.

Prompt positions need hidden states, never logits: the vocabulary is the widest layer of a small model, so skipping it
where nothing is scored saves time and most of the activation memory. Whether the output head is a plain linear map is
measured once per model; where it is not (a soft cap, a logit scale), the forward pass of the model makes the logits and
the prompt's are dropped.

A model with a learned prompt reads the prompt's vectors before every row; the positions counted here are those after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.metrics import LARGEST_LOSS
from fedferret.data.batches import IGNORED, TokenisedData
from fedferret.data.examples import Example, FederatedData
from fedferret.data.on_demand import MANY, TokenisedOnDemand
from fedferret.data.template_probes import check, fitted, has_prompts
from fedferret.data.templates import NO_CHAT_TEMPLATE, Chat, Template, template, template_of
from fedferret.data.text import TextSettings
from fedferret.models.adapters import prefix_of, transformer_of
from fedferret.models.positions import check_positions, packed_limit
from fedferret.objectives.interface import Encode, Loaded, ModelObjective
from fedferret.objectives.probes import check_language_model, check_tokens, has_every_token

if TYPE_CHECKING:
    from fedferret.models import LanguageModel

_MULTIPLE = 16  # oneDNN compiles bf16 kernels for every new shape, which cost more than bf16 saved
_LINEAR_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what ``head_is_linear`` found, by model


@dataclass(frozen=True)
class NextToken(ModelObjective):
    """Mean cross-entropy over a batch's response tokens, fp32.

    A batch has ``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T); labels are aligned with the inputs and
    hold ``IGNORED`` outside the response.
    """

    name: ClassVar[str] = "next-token"
    generates: ClassVar[bool] = True

    @property
    def sums(self) -> Mapping[str, float]:
        """The summed loss, in nats."""
        return {"loss": LARGEST_LOSS}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss that training minimises.

        Args:
            model: a transformers causal model, with or without an adapter.
            batch: ``input_ids``, ``labels`` and, unless packed, ``attention_mask``; int64, shape (B, T), any device.

        Returns:
            The mean over the batch's response tokens, nats per token; fp32, a scalar with a gradient.
        """
        logits_NV, targets_N = self.scored(model, batch)
        return functional.cross_entropy(logits_NV, targets_N)

    def scores(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Sums that add up over batches; the ratio of the two is the mean loss.

        Args:
            model: as in ``loss``.
            batch: as in ``loss``.

        Returns:
            ``loss``, the sum over the batch's response tokens in nats, and ``count``, how many tokens.
        """
        losses, counts = self.by_example(model, batch)
        return {"loss": math.fsum(losses.tolist()), "count": float(counts.sum())}

    def by_example(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of each example apart; in a packed row too.

        Args:
            model: as in ``loss``.
            batch: as in ``loss``.

        Returns:
            For each of the B examples the sum over its response tokens in nats, float64, with a gradient, shape (B,);
            and how many tokens these are, int64, shape (B,). Both in the processor's memory.
        """
        logits_NV, targets_N = self.scored(model, batch)
        if batch.position_ids is None:
            rows_BT = torch.arange(len(batch.labels))[:, None].expand(batch.labels.shape)
        else:
            rows_BT = (batch.position_ids == 0).cumsum(dim=1) - 1
        examples = int(rows_BT.max()) + 1
        rows_N = rows_BT[:, 1:].cpu()[batch.labels[:, 1:].cpu() != IGNORED]  # in the order of ``scored``
        losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")[: len(rows_N)]
        losses_N = losses_N.cpu().double()  # Apple's devices have no fp64
        sums_B = losses_N.new_zeros(examples).index_add(0, rows_N, losses_N)
        return sums_B, torch.bincount(rows_N, minlength=examples)

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures of a held-out set; every response token counts the same.

        Args:
            sums: of ``scores``, added up.

        Returns:
            ``loss``, nats per token; ``perplexity``, its exponential; ``tokens``, how many were scored.
        """
        mean = sums["loss"] / max(1.0, sums["count"])
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": sums["count"]}

    def check_model(self, model: str) -> None:
        """Refuse an unknown model. Raises UserError."""
        models.check(model)

    def text_settings(self, model: str) -> frozenset[str]:
        """All."""
        return frozenset(setting.name for setting in fields(TextSettings))

    def check(self, model: str, text: TextSettings) -> None:
        """Refuse an unknown model or template, and a date for a template that writes none. Raises UserError."""
        super().check(model, text)
        if text.date is not None and not isinstance(template(text.template), Chat):
            raise UserError(
                f'text.date="{text.date}": template "{text.template}" writes no date, a chat template may; leave it out'
            )
        template(text.template)

    def check_template(self, model: str, text: TextSettings, data: FederatedData) -> None:
        """Refuse a chat template where the model has none, unless the data are texts alone. Raises UserError."""
        if template(text.template) != Chat() or models.has_chat_template(model):
            return
        firsts = [part[0] for part in (*data.clients.values(), *data.held_out.values()) if part]
        if not firsts or has_prompts(firsts):
            raise UserError(f'text.template="{text.template}": {NO_CHAT_TEMPLATE}')

    def check_tuned(self, name: str, model: nn.Module, text: TextSettings, longest: int) -> None:
        """Refuse texts longer than the model's positions, and packed rows longer than its masks. Raises UserError."""
        causal, prefix = transformer_of(model), prefix_of(model, 1)
        check_positions(name, causal, text.max_tokens, 0 if prefix is None else prefix.shape[1])
        widest = packed_limit(causal)
        if text.packed and widest is not None and longest > widest:
            raise UserError(
                f"text.packed=true: a packed row has up to {longest:,} tokens, and {type(causal).__name__} reads at "
                f"most {widest:,}; set packed=false, or a smaller max_tokens or batch_size"
            )

    def check_loaded(self, loaded: Loaded, model: nn.Module, text: TextSettings) -> None:
        """Refuse a model that is not causal, or mixes the examples of a batch or of a packed row. Raises UserError."""
        check_language_model(loaded.name, model, self.scored, text.packed)

    def reads_every_token(self, loaded: Loaded) -> bool:
        """Compare the tokenizer with the embedding."""
        return has_every_token(loaded, loaded.model)

    def check_examples(self, model: str, data: FederatedData, complete: bool = True) -> None:
        """Refuse images. Raises UserError."""
        for examples in (*data.clients.values(), *data.held_out.values()):
            if any(example.image for example in examples[:1]):
                raise UserError(
                    'the data are images, and objective "next-token" reads text: set [objective] name="classification"'
                )

    def skeleton(self, model: str) -> nn.Module:
        """A transformers causal model on the meta device."""
        return models.skeleton(model)

    def load(self, model: str, device: str, log: Callable[[str], None]) -> LanguageModel:
        """A causal language model with its tokenizer."""
        return models.load(model, device=device, log=log)

    def encoder(self, loaded: Loaded, text: TextSettings) -> Encode:
        """Prompts and responses by the template; training batches packed, and labels on prompts, where asked for."""
        tokenizer = loaded.tokenizer
        assert tokenizer is not None

        @cache  # an export encodes nothing, and needs no template
        def fitted_template() -> Template:
            return fitted(template_of(text), tokenizer)

        def encode(examples: Sequence[Example], for_training: bool) -> TokenisedData | TokenisedOnDemand:
            if for_training and len(examples) > MANY:
                return TokenisedOnDemand(examples, lambda some: tokenised(some, True))
            return tokenised(examples, for_training)

        def tokenised(examples: Sequence[Example], for_training: bool) -> TokenisedData:
            chosen = fitted_template() if has_prompts(examples) else template_of(text)
            tokens = [chosen.encode(each, tokenizer, text.max_tokens) for each in examples]
            data = TokenisedData(tokens, for_training and text.packed, for_training and text.train_on == "all")
            check_tokens(loaded, loaded.model, data.largest_token)
            return data

        return encode

    def check_encoding(self, loaded: Loaded, text: TextSettings, data: FederatedData) -> tuple[str, ...]:
        """Refuse a template that fails on the data; say what it changes, and what ``max_tokens`` cuts off."""
        assert loaded.tokenizer is not None
        chosen = template_of(text)
        if has_prompts(part[0] for part in (*data.clients.values(), *data.held_out.values()) if part):
            chosen = fitted(chosen, loaded.tokenizer)
        return check(chosen, loaded.tokenizer, data, text.max_tokens)

    def save(self, loaded: Any, folder: Path, max_tokens: int | None = None) -> str:
        """A Hugging Face folder."""
        models.save_folder(loaded, folder)
        return f"{folder} holds the whole model: transformers' AutoModelForCausalLM.from_pretrained(folder)"

    def scored(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The forward pass, with logits at response positions only.

        Under autocast, and with bf16 weights, T and N are rounded up to a multiple of 16: such targets are ``IGNORED``.

        Args:
            model: as in ``loss``.
            batch: as in ``loss``; ``position_ids``, shape (B, T), are read where the batch has them.

        Returns:
            Logits over V words, fp32, shape (N, V), and targets, int64, shape (N,), of the N response tokens, row by
            row; both on the model's device.
        """
        device = next(model.parameters()).device
        given = {name: getattr(batch, name, None) for name in ("input_ids", "attention_mask", "position_ids", "labels")}
        inputs = {name: tensor.to(device) for name, tensor in given.items() if tensor is not None}
        causal = transformer_of(model)
        in_bf16 = next(causal.parameters()).dtype == torch.bfloat16
        rounded = in_bf16 or torch.is_autocast_enabled(device.type)
        if rounded:
            inputs = _lengthened(inputs)
        length = inputs["input_ids"].shape[1]
        targets = inputs.pop("labels")[:, 1:].reshape(-1)
        where = (targets != IGNORED).nonzero().squeeze(1)  # the position before each response token predicts it
        targets = targets[where]
        if rounded:
            extra = -len(where) % _MULTIPLE
            where = functional.pad(where, (0, extra))
            targets = functional.pad(targets, (0, extra), value=IGNORED)
        inputs = _behind_prefix(model, inputs)
        if self._head_is_linear(causal):
            hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[:, -length:-1]
            logits = causal.get_output_embeddings()(hidden.flatten(0, 1)[where])
        else:
            logits = causal(**inputs, use_cache=False).logits[:, -length:-1].flatten(0, 1)[where]
        return logits.float(), targets

    def _head_is_linear(self, causal: nn.Module) -> bool:
        if causal not in _LINEAR_HEADS:
            _LINEAR_HEADS[causal] = head_is_linear(causal)
        return _LINEAR_HEADS[causal]


def _behind_prefix(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as they are, or as embeddings with the V learned vectors of the model first."""
    prefix_BVE = prefix_of(model, len(inputs["input_ids"]))
    if prefix_BVE is None:
        return inputs
    embeddings_BTE = transformer_of(model).get_input_embeddings()(inputs["input_ids"])
    mask_BT = inputs["attention_mask"]
    mask_BV = mask_BT.new_ones(prefix_BVE.shape[:2])
    return {
        "inputs_embeds": torch.cat((prefix_BVE.to(embeddings_BTE.dtype), embeddings_BTE), dim=1),
        "attention_mask": torch.cat((mask_BV, mask_BT), dim=1),
    }


def _lengthened(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padded to a multiple of 16; in a packed batch, with one more example of padding."""
    extra = -inputs["input_ids"].shape[1] % _MULTIPLE
    padded = {name: functional.pad(tensor, (0, extra)) for name, tensor in inputs.items()}
    padded["labels"] = functional.pad(inputs["labels"], (0, extra), value=IGNORED)
    if "position_ids" in padded and extra:
        padded["position_ids"][:, -extra:] = torch.arange(extra, device=padded["position_ids"].device)
    return padded


@torch.no_grad()
def head_is_linear(model: nn.Module) -> bool:
    """Compare the logits of the model with the output embedding applied to the last hidden state.

    Args:
        model: a transformers causal model without a wrapper around it.

    Returns:
        Whether the two agree to 1e-4 on a probe of three tokens; False where the model has no such parts.
    """
    base, head = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", lambda: None)()
    if base is None or base is model or head is None:
        return False
    probe = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    with torch.autocast(probe.device.type, enabled=False):
        expected = model(input_ids=probe, use_cache=False).logits
        hidden = base(input_ids=probe, use_cache=False).last_hidden_state
        if hidden.shape[-1] != getattr(
            head, "in_features", head.weight.shape[-1]
        ):  # another layer lies between them (ELECTRA)
            return False
        found = head(hidden)
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, atol=1e-4)

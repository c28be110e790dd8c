"""Learned prompts by the peft library: V vectors that a frozen model reads before every example.

LearnedPrompt    the V vectors themselves (Lester et al., EMNLP 2021, arXiv 2104.08691)
EncodedPrompt    V others and three linear layers that make the vectors of them: p-tuning (Liu et al., arXiv 2103.10385)
                 with peft's MLP; what the network makes is exported, the network is not

A causal model is wrapped by peft's class. A text classifier holds peft's module of the prompt itself: its positions are
kept out of the pooled ones, which peft's classes for encoders do not see to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.core.keys import Key
from fedferret.models.adapters.adapter_folder import write_adapter
from fedferret.models.adapters.drawing import draw, no_trace
from fedferret.models.adapters.interface import Adapter
from fedferret.models.classifiers import Classifier, TextClassifier
from fedferret.models.folders import build_folder

_ONE = {"num_layers": 1, "num_attention_heads": 1, "num_transformer_submodules": 1}


class _Prompt(Adapter):
    """A peft wrapper around a causal model, or a part of a text classifier."""

    merges: ClassVar[bool] = False
    tokens: int  # V

    @abstractmethod
    def _config(self, model: Any) -> Any:
        """Peft's configuration for this model."""

    @abstractmethod
    def _encoder(self, config: Any) -> nn.Module:
        """Peft's module that makes the vectors from their numbers."""

    def export(self, model: nn.Module, base: str, folder: Path, classes: Sequence[str] = ()) -> str:
        """An adapter of peft's; for a classifier a folder that ``read_adapter`` reads."""
        if isinstance(model, Classifier):
            return write_adapter(self, model, base, folder, classes)
        wrapper: Any = model

        def build(temporary: Path) -> None:
            wrapper.active_peft_config.base_model_name_or_path = base
            wrapper.save_pretrained(temporary, save_embedding_layers=False)
            (temporary / "README.md").unlink()  # peft's form of a model card, not filled in

        build_folder(folder, build)
        return f"{folder} holds a learned prompt, not a whole model: peft's PeftModel.from_pretrained(base, folder)"

    def transformer(self, model: Any) -> Any:
        """The causal model inside the wrapper; a classifier is its own."""
        return model if isinstance(model, Classifier) else model.get_base_model()

    def prefix(self, model: Any, rows: int) -> Tensor:
        """The V vectors, for each row."""
        if isinstance(model, TextClassifier):
            assert model.prompt is not None  # attached
            prompt_VE: Tensor = model.prompt()
            return prompt_VE.expand(rows, -1, -1)
        prefix: Tensor = model.get_prompt(batch_size=rows)
        return prefix

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        with quick_imports():
            import peft

        if isinstance(model, Classifier):
            return self._attach_inside(model, key)
        with no_trace():
            prompted: nn.Module = peft.PeftModelForCausalLM(model, self._config(model))
        draw(prompted, key)
        return prompted

    def _attach_inside(self, model: Classifier, key: Key) -> nn.Module:
        if not isinstance(model, TextClassifier):
            raise UserError(
                "a prompt stands before the tokens of a text, and this model reads images; choose another method"
            )
        encoder: Any = model.encoder
        if model.pooling == "cls" and not _pools_alone(encoder):
            raise UserError(
                f'pooling "cls": {type(encoder).__name__} pools inside, where a prompt would be the first token; '
                f'give pooling = "mean"'
            )
        model.requires_grad_(False)
        with no_trace():
            made = self._encoder(self._config(encoder)).to(model.device)
        model.prompt = _Vectors(made, self.tokens)
        model._modules["head"] = model._modules.pop("head")  # its weights stay the last
        draw(model, key)
        return model

    def _detach(self, model: nn.Module) -> nn.Module:
        if isinstance(model, TextClassifier):
            model.prompt = None
            return model
        plain: nn.Module = self.transformer(model)
        return plain


class _Vectors(nn.Module):
    """All V vectors of peft's module."""

    numbers: Tensor

    def __init__(self, encoder: nn.Module, tokens: int) -> None:
        super().__init__()
        self.encoder = encoder
        device = next(encoder.parameters()).device
        self.register_buffer("numbers", torch.arange(tokens, device=device), persistent=False)

    def forward(self) -> Tensor:
        vectors_VE: Tensor = self.encoder(self.numbers)
        return vectors_VE


def _pools_alone(encoder: Any) -> bool:
    """Whether an encoder's pooler, if it has one, maps hidden states (N, T, H) to features (N, H)."""
    pooler = getattr(encoder, "pooler", None)
    if pooler is None:
        return True
    width = encoder.config.hidden_size
    weight = next(pooler.parameters())
    with torch.no_grad():
        found = pooler(torch.zeros(1, 2, width, dtype=weight.dtype, device=weight.device))
    return isinstance(found, Tensor) and found.ndim == 2


@dataclass(frozen=True, kw_only=True)
class LearnedPrompt(_Prompt):
    """V vectors, learned directly."""

    tokens: int  # V

    def _encoder(self, config: Any) -> nn.Module:
        return nn.Embedding(self.tokens, config.token_dim)

    def _config(self, model: Any) -> Any:
        import peft

        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, **_shape(model))


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt(_Prompt):
    """V vectors, made by a network that is learned."""

    tokens: int  # V
    width: int | None = None  # of the network's hidden layers; None: the model's

    def _encoder(self, config: Any) -> nn.Module:
        import peft

        return peft.PromptEncoder(config)  # type: ignore[no-untyped-call]

    def _config(self, model: Any) -> Any:
        import peft

        width = self.width or model.get_input_embeddings().weight.shape[1]
        return peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, encoder_hidden_size=width, **_shape(model)
        )


def _shape(model: Any) -> dict[str, Any]:
    """What peft would look for in the configuration, where architectures have other names and OPT another width.

    A vector stands before the embeddings, so it has their width. Layers and heads shape keys and values, which these
    prompts have none of.
    """
    return {"token_dim": model.get_input_embeddings().weight.shape[1], **_ONE}

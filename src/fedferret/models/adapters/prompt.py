"""Learned prompts by the peft library: V vectors that a frozen causal model reads before every example.

LearnedPrompt    the V vectors themselves (Lester et al., EMNLP 2021, arXiv 2104.08691)
EncodedPrompt    V others and three linear layers that make the vectors of them: p-tuning (Liu et al., arXiv 2103.10385)
                 with peft's MLP; what the network makes is exported, the network is not
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.core.keys import Key
from fedferret.models.adapters.drawing import draw, no_trace
from fedferret.models.adapters.interface import Adapter
from fedferret.models.folders import build_folder


class _Prompt(Adapter):
    """A peft wrapper around a causal model."""

    merges: ClassVar[bool] = False

    @abstractmethod
    def _config(self, model: Any) -> Any:
        """Peft's configuration for this model."""

    def export(self, model: nn.Module, base: str, folder: Path) -> str:
        """An adapter of peft's; ``PeftModel.from_pretrained(model, folder)`` reads it."""
        wrapper: Any = model

        def build(temporary: Path) -> None:
            wrapper.active_peft_config.base_model_name_or_path = base
            wrapper.save_pretrained(temporary, save_embedding_layers=False)
            (temporary / "README.md").unlink()  # peft's form of a model card, not filled in

        build_folder(folder, build)
        return f"{folder} holds a learned prompt, not a whole model: peft's PeftModel.from_pretrained(base, folder)"

    def transformer(self, model: Any) -> Any:
        """The causal model inside the wrapper."""
        return model.get_base_model()

    def prefix(self, model: Any, rows: int) -> Tensor:
        """The V vectors, for each row."""
        prefix: Tensor = model.get_prompt(batch_size=rows)
        return prefix

    def _attach(self, model: nn.Module, key: Key) -> nn.Module:
        import peft

        with no_trace():
            prompted: nn.Module = peft.PeftModelForCausalLM(model, self._config(model))
        draw(prompted, key)
        return prompted

    def _detach(self, model: nn.Module) -> nn.Module:
        plain: nn.Module = self.transformer(model)
        return plain


@dataclass(frozen=True, kw_only=True)
class LearnedPrompt(_Prompt):
    """V vectors, learned directly."""

    tokens: int  # V

    def _config(self, model: Any) -> Any:
        import peft

        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, **_shape(model))


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt(_Prompt):
    """V vectors, made by a network that is learned."""

    tokens: int  # V
    width: int | None = None  # of the network's hidden layers; None: the model's

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
    return {"token_dim": model.get_input_embeddings().weight.shape[1], "num_layers": 1, "num_attention_heads": 1}

"""Per-layer prefixes: what peft computes with the same vectors, whoever shares the row, in encoders too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fedferret import models
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.batches import Batch, TokenisedData
from fedferret.data.templates import Tokens
from fedferret.evaluation.generation import generate
from fedferret.models import adapters
from fedferret.models.classifiers import TextClassifier
from fedferret.objectives.next_token import NextToken
from unit.tiny_adapters import base
from unit.tiny_architectures import tiny_instance

KEY = Key.of(5, "prepare")
IDS = torch.tensor([[5, 9, 30, 7, 200, 11, 4]])


def prefixed(model: nn.Module, tokens: int = 4, scale: float = 50.0) -> Any:
    """``model`` with prefixes that are large enough to be seen."""
    attached = adapters.Prefix(tokens=tokens).attach(model, KEY)
    with torch.no_grad():
        for name in (name for pair in adapters.prefix_layers(attached) for name in pair):
            attached.get_parameter(name).mul_(scale)
    return attached


def test_a_prefix_is_pefts_where_positions_are_counted_as_peft_does() -> None:
    """peft numbers the tokens behind p vectors from p on; here positions are the batch's own."""
    model = prefixed(base())
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with torch.random.fork_rng(devices=[]):
        theirs: Any = peft.PeftModelForCausalLM(base(), config)
    parts = [model.get_parameter(name) for pair in adapters.prefix_layers(model) for name in pair]
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(torch.cat(parts, dim=1))
        shifted = model(input_ids=IDS, position_ids=torch.arange(4, 4 + IDS.shape[1])[None]).logits
        torch.testing.assert_close(shifted, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(shifted, base()(input_ids=IDS).logits, atol=1e-2)


def test_only_prefixes_are_trained_and_every_one_of_them_is() -> None:
    model = prefixed(base())
    names = [name for pair in adapters.prefix_layers(model) for name in pair]
    assert names == [f"model.layers.{layer}.self_attn.prefix_{part}" for layer in (0, 1) for part in ("key", "value")]
    assert list(tree.parameters(model)) == names
    assert all(tuple(weight.shape) == (4, 2 * 16) for weight in tree.parameters(model).values())
    NextToken().loss(model, batch(False)).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (name in names)


def batch(packed: bool) -> Batch:
    """Three examples of 9, 6 and 4 tokens, for training."""
    rows = [Tokens(tuple(range(start, start + length)), 2, False) for start, length in ((3, 9), (40, 6), (90, 4))]
    (made,) = TokenisedData(rows, packed).batches(3, KEY)
    return made


def test_every_example_of_a_packed_row_reads_the_prefix() -> None:
    model, gradients = prefixed(base()), []
    for packed in (False, True):
        model.zero_grad()
        NextToken().loss(model, batch(packed)).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_answers_by_a_cache_are_those_without_one_alone_or_in_a_batch() -> None:
    model, prompts = prefixed(base()), [tuple(IDS[0].tolist()), (8, 3), (77, 3, 9, 12)]
    slow = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(6):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        slow.append(tuple(row[len(prompt) :]))
    assert generate(model, prompts, (), 6, batch_size=3) == slow
    assert generate(base(), prompts, (), 6) != slow


def test_without_prefixes_a_model_is_its_base_to_the_bit_and_others_never_read_them() -> None:
    plain, model = base(), prefixed(base())
    expected, behind = plain(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert not torch.equal(expected, behind)
    with adapters.without_prefixes(model):
        assert torch.equal(model(input_ids=IDS).logits, expected)
        with adapters.without_prefixes(model, {1}):
            pass
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, behind)
    with adapters.without_prefixes(model, {1}):
        model(input_ids=IDS).logits.sum().backward()
    read = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert read == list(adapters.prefix_layers(model)[0])
    assert torch.equal(plain(input_ids=IDS).logits, expected)
    kept = plain.state_dict().keys()
    assert torch.equal(adapters.released(model)(input_ids=IDS).logits, expected) and model.state_dict().keys() == kept


def encoder(kind: str, **sizes: Any) -> Any:
    """A tiny encoder with random weights, or on the meta device."""
    from transformers import AutoConfig, AutoModel

    common = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, num_attention_heads=4, max_position_embeddings=64, **common, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModel.from_config(config).eval()


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "albert": {"embedding_size": 16},  # its layers share one attention
}


def texts(*rows: tuple[int, ...]) -> Batch:
    """Texts, padded on the right."""
    made = [Tokens(row, 1, False) for row in rows]
    return next(TokenisedData(made).batches(len(rows), None))


@pytest.mark.parametrize("adapter", [adapters.Prefix(tokens=3), adapters.LearnedPrompt(tokens=3)])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_read_prefixes_and_prompts_whoever_shares_the_batch(kind: str, adapter: adapters.Adapter) -> None:
    made = TextClassifier(encoder(kind, **ENCODERS[kind]), nn.Linear(32, 3), "mean").eval()
    long, short = (1, 5, 7, 9, 11, 13), (1, 4, 8, 2)
    plain = made(texts(long, short))
    model = adapter.attach(made, KEY)
    together = model(texts(long, short))
    torch.testing.assert_close(model(texts(short))[0], together[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together, plain, atol=1e-4)
    together.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters() if weight.requires_grad)
    assert list(tree.parameters(model))[-2:] == ["head.weight", "head.bias"]
    assert torch.equal(adapters.released(model)(texts(long, short)), plain)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_no_pooling_reads_the_positions_of_a_prompt(pooling: str) -> None:
    """The features are those of the text's own hidden states, which the encoder gives behind the V vectors."""
    made = TextClassifier(encoder("bert"), nn.Linear(32, 3), pooling).eval()
    model: Any = adapters.LearnedPrompt(tokens=3).attach(made, KEY)
    ids = texts((1, 5, 7, 9)).input_ids
    vectors = torch.cat((model.prompt()[None], made.encoder.get_input_embeddings()(ids)), dim=1)
    hidden: Tensor = made.encoder(inputs_embeds=vectors).last_hidden_state[:, 3:]
    chosen = {"cls": lambda: made.encoder.pooler(hidden), "mean": lambda: hidden.mean(1), "last": lambda: hidden[:, -1]}
    torch.testing.assert_close(model.features(texts((1, 5, 7, 9))), chosen[pooling](), rtol=1e-5, atol=1e-6)


def test_what_cannot_read_a_prefix_or_a_prompt_is_refused_by_name() -> None:
    prefix, prompt = adapters.Prefix(tokens=3), adapters.LearnedPrompt(tokens=3)
    for architecture in ("bloom", "falcon-alibi", "mamba", "rwkv", "gpt_neo"):
        model = tiny_instance(architecture).to("meta")
        with pytest.raises(UserError, match=f"{type(model).__name__} has no attention layer that reads a prefix"):
            prefix.attach(model, KEY)
    pooled_inside = TextClassifier(encoder("albert", embedding_size=16), nn.Linear(32, 3), "cls")
    with pytest.raises(UserError, match=r'pooling "cls": AlbertModel pools inside, .*give pooling = "mean"'):
        prompt.attach(pooled_inside, KEY)
    images = models.classifier_skeleton("lenet5", 3)
    for adapter in (prefix, prompt):
        with pytest.raises(UserError, match="this model reads images; choose another method"):
            adapter.attach(images, KEY)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2", "deepseek_v3"])
def test_what_is_tuned_is_known_without_weights(architecture: str) -> None:
    """Where the meta device does not compute what the processor does: experts, numbers read off tensors."""
    shapes = []
    for device in ("cpu", "meta"):
        model = adapters.Prefix(tokens=3).attach(tiny_instance(architecture).to(device), KEY)
        shapes.append({name: weight.shape for name, weight in tree.parameters(model).items()})
    assert shapes[0] == shapes[1] and len(shapes[0]) == 4


def logits(model: Any) -> Tensor:
    """Of one row."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_prefixes_are_exported_as_pefts_where_peft_computes_the_same(tmp_path: Path) -> None:
    """Keys are written rotated by the p positions that peft adds. Learned positions cannot be turned back."""
    for name, plain in {"llama": base, "gpt2": lambda: tiny_instance("gpt2").eval()}.items():
        model, folder = prefixed(plain()), tmp_path / name
        before, flags = logits(model), [weight.requires_grad for weight in model.parameters()]
        adapter: Any = adapters.adapter_of(model)
        said = adapter.export(model, "base", folder)
        if name == "llama":
            assert "peft's PeftModel.from_pretrained(base, folder)" in said
            read: Any = peft.PeftModel.from_pretrained(plain(), folder)
        else:
            assert "in fedferret's form" in said and "models.load('base')" in (folder / "README.md").read_text()
            read = adapters.read_adapter(plain(), folder)
        torch.testing.assert_close(logits(read), before, rtol=1e-4, atol=1e-5)
        assert torch.equal(logits(model), before), "the model goes on"
        assert [weight.requires_grad for weight in model.parameters()] == flags
    model = prefixed(base())
    with adapters.without_prefixes(model, {1}):
        before = logits(model)
        adapter.export(model, "base", tmp_path / "half")
    torch.testing.assert_close(logits(adapters.read_adapter(base(), tmp_path / "half")), before)
    with pytest.raises(UserError, match=r"belongs to another model: model\.layers\.0\.self_attn\.prefix_key is odd"):
        adapters.read_adapter(base(), tmp_path / "gpt2")
    with pytest.raises(UserError, match="not an adapter of fedferret's"):
        adapters.read_adapter(base(), tmp_path / "llama")

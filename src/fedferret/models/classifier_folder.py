"""Writes a classifier as a folder that loads without fedferret's run.

A text model becomes a folder of ``AutoModelForSequenceClassification`` if that class, with the classifier's own parts
in it, gives the same logits on a probe. Where it does not (mean pooling, an architecture with more layers in its head),
the folder has the encoder in Hugging Face's format, the head in ``head.safetensors``, and a README.md with an example
that joins the two. An image model becomes ``model.safetensors`` with weights and buffers, and such a README.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fedferret.models.classifier_loading import LoadedClassifier, classifier_skeleton
from fedferret.models.classifiers import TextClassifier
from fedferret.models.folders import build_folder
from fedferret.models.quiet import quiet_transformers

_PROBE = ("A short text.", "A second text, which is longer than the first one: 3, 2, 1.")
_FEATURES = {
    "cls": "output.last_hidden_state[:, 0]",
    "mean": "(output.last_hidden_state * mask).sum(1) / mask.sum(1)",
    "last": "output.last_hidden_state[range(len(texts)), mask[:, :, 0].sum(1) - 1]",
}


def save_classifier(
    loaded: LoadedClassifier, classes: Sequence[str], folder: Path, max_tokens: int | None = None
) -> str:
    """Write a classifier as a folder; it is written completely or not at all.

    Args:
        loaded: the classifier, without an adapter.
        classes: the names of the classes, in the order of the logits.
        folder: absent or empty.
        max_tokens: of a text in training, which the saved tokenizer truncates to; None: the model's limit.

    Returns:
        One line on how to load the folder.

    Raises:
        UserError: if ``folder`` is a file, or a folder that is not empty.
    """
    if not isinstance(loaded.model, TextClassifier):
        build_folder(folder, lambda temporary: _write_images(loaded, classes, temporary))
        return f"{folder} holds an image model in safetensors; its README.md has an example that loads it"
    with torch.no_grad(), quiet_transformers():
        whole = _sequence_classifier(loaded, loaded.model, classes)
        if whole is not None:
            build_folder(folder, lambda temporary: _write_parts(whole, loaded, temporary, max_tokens))
            return f'{folder} loads with transformers\' AutoModelForSequenceClassification.from_pretrained("{folder}")'
        build_folder(folder, lambda temporary: _write_apart(loaded, classes, temporary, max_tokens))
    return f"{folder} holds an encoder and a head; its README.md has an example that joins them"


def _sequence_classifier(loaded: LoadedClassifier, model: TextClassifier, classes: Sequence[str]) -> Any:
    """transformers' class for this architecture, with the classifier's own parts in it; None unless logits agree."""
    from transformers import AutoModelForSequenceClassification

    encoder: Any = model.encoder
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    tokenizer: Any = loaded.tokenizer
    config.pad_token_id = tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError:  # transformers has no such class for this architecture
        return None
    inside = whole.base_model_prefix
    if not hasattr(whole, inside):
        return None
    heads = [
        name
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{inside}.")
    ]
    if len(heads) != 1:
        return None
    setattr(whole, inside, encoder)
    whole.set_submodule(heads[0], model.head)
    if any(parameter.is_meta for parameter in whole.parameters()):
        return None
    probe = tokenizer(list(_PROBE), padding=True, return_tensors="pt").to(model.device)
    given = {name: probe[name] for name in ("input_ids", "attention_mask")}
    try:
        found = whole.eval()(**given).logits
    except Exception:  # a class that reads what this encoder does not give, such as a pooler's output
        return None
    expected = model(SimpleNamespace(**given))
    return whole if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4) else None


def _write_parts(model: Any, loaded: LoadedClassifier, folder: Path, max_tokens: int | None) -> None:
    """The model, and a tokenizer that cuts texts as training did when it is called with ``truncation=True``."""
    tokenizer: Any = copy.deepcopy(loaded.tokenizer)
    limits = [limit for limit in (max_tokens, loaded.max_tokens) if limit is not None]
    if limits:
        tokenizer.model_max_length = min(limits)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_apart(loaded: LoadedClassifier, classes: Sequence[str], folder: Path, max_tokens: int | None) -> None:
    """The encoder's folder, the head, and how to join them."""
    from safetensors.torch import save_file

    model: Any = loaded.model
    _write_parts(model.encoder, loaded, folder, max_tokens)
    pooled = loaded.pooling == "cls" and getattr(model.encoder, "pooler", None) is not None
    save_file(_stored(model.head), folder / "head.safetensors", _metadata(classes, pooling=str(loaded.pooling)))
    bias = "" if model.head.bias is None else ' + head["bias"]'
    features = "output.pooler_output" if pooled else _FEATURES[str(loaded.pooling)]
    lines = (
        "output, mask = encoder(**batch), batch.attention_mask[:, :, None]",
        f'logits = {features} @ head["weight"].T{bias}',
    )
    (folder / "README.md").write_text(_TEXT_README.format(classes=json.dumps(list(classes)), lines="\n".join(lines)))


def _write_images(loaded: LoadedClassifier, classes: Sequence[str], folder: Path) -> None:
    """The image model's weights and buffers, and how to load them."""
    from safetensors.torch import save_file

    save_file(_stored(loaded.model), folder / "model.safetensors", _metadata(classes, architecture=loaded.name))
    licence = ""
    if loaded.folder is not None:  # a packaged model, which has a notice
        licence = f"\n{(loaded.folder / 'NOTICE').read_text(encoding='utf-8')}"
    whole = classifier_skeleton(loaded.name, len(classes)).state_dict()
    pruned = any(value.shape != whole[name].shape for name, value in loaded.model.state_dict().items())
    text = _IMAGE_README.format(
        name=loaded.name,
        count=len(classes),
        classes=json.dumps(list(classes)),
        imported="\nfrom fedferret.models.pruning import sized_for" if pruned else "",
        sized="sized_for(model, weights)" if pruned else "model",
    )
    (folder / "README.md").write_text(text + licence)


def _stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _metadata(classes: Sequence[str], **words: str) -> dict[str, str]:
    return {"format": "pt", "classes": json.dumps(list(classes)), **words}


_TEXT_README = """# A text classifier

Classes, in the order of the logits: {classes}

`folder` is this folder, `texts` is a list of texts.

```python
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
head = load_file(f"{{folder}}/head.safetensors")
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
{lines}
```
"""

_IMAGE_README = """# An image classifier: {name}

Classes, in the order of the logits: {classes}

`folder` is this folder; `images` are fp32 in [0, 1], shape (N, channels, height, width). The architecture is
fedferret's, which must be installed.

```python
from types import SimpleNamespace

from fedferret.models import classifier_skeleton{imported}
from safetensors.torch import load_file

weights, model = load_file(f"{{folder}}/model.safetensors"), classifier_skeleton("{name}", {count})
model = {sized}.to_empty(device="cpu")
model.load_state_dict(weights)
logits = model(SimpleNamespace(pixels=images))
```
"""

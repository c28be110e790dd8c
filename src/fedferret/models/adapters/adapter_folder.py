"""An adapter that neither merges nor has a form of peft's for its model, as a folder: weights, settings, an example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fedferret.core import tree
from fedferret.models.adapters.interface import Adapter
from fedferret.models.classifiers import TextClassifier
from fedferret.models.folders import build_folder

FILE = "adapter.safetensors"


def write_adapter(adapter: Adapter, model: nn.Module, base: str, folder: Path, classes: Sequence[str]) -> str:
    """Write an adapter's weights, and a classifier's head, as a folder that ``read_adapter`` reads.

    Args:
        adapter: its settings.
        model: that the adapter is attached to.
        base: the base model's name.
        folder: absent or empty.
        classes: of a classifier, in the order of its logits.

    Returns:
        One line on how to load the folder.

    Raises:
        UserError: ``folder`` is not empty.
    """

    def build(temporary: Path) -> None:
        from safetensors.torch import save_file

        weights = {name: value.cpu().contiguous() for name, value in tree.parameters(model).items()}
        settings = asdict(adapter)  # type: ignore[call-overload]  # a dataclass
        about = {"kind": type(adapter).__name__, "settings": settings, "base": base, "classes": list(classes)}
        save_file(weights, temporary / FILE, {"adapter": json.dumps(about)})  # one entry: several have no order
        (temporary / "README.md").write_text(_readme(model, base, classes), encoding="utf-8")

    build_folder(folder, build)
    return f"{folder} holds the adapter alone, in fedferret's form; its README.md has an example that loads it"


def _readme(model: Any, base: str, classes: Sequence[str]) -> str:
    if isinstance(model, TextClassifier):
        load = f"models.classifier({base!r}, {model.head.out_features}, {model.pooling!r})"
        use = (
            'batch = loaded.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")\nlogits = model(batch)'
        )
        what = f"a text classifier. Classes, in the order of the logits: {json.dumps(list(classes))}"
    else:
        load, what = f"models.load({base!r})", "a causal language model"
        use = "logits = model(input_ids=ids).logits"
    return _README.format(what=what, load=load, use=use)


_README = """# An adapter for {what}

`folder` is this folder. fedferret must be installed.

```python
from fedferret import models
from fedferret.models.adapters import read_adapter

loaded = {load}
model = read_adapter(loaded.model, folder)
{use}
```
"""

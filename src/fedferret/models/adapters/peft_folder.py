"""A LoRA adapter as a folder of peft's: ``adapter_config.json`` and ``adapter_model.safetensors``.

Written so that ``PeftModel.from_pretrained(base, folder)`` has the tuned model's logits. Read so that a run goes on
where the adapter is: rank, scale and modules are the folder's. A folder that asks for anything that would change the
adapted model and is not here is refused by the name of its setting.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.core.pooling import within
from fedferret.core.text import plain_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_WITHOUT_EFFECT = {  # on the adapted model: the weights' names must say the same as the targets, and dropout is off
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *_TARGETS,
    *("lora_dropout", "fan_in_fan_out", "runtime_config", "ensure_weight_tying"),
    *("eva_config", "megatron_config", "megatron_core"),
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base beside the adapter


@dataclass(frozen=True)
class PeftFolder:
    """What a folder says of its adapter.

    Attributes:
        folder: that was read.
        rank: r.
        alpha: α.
        rslora: whether the scale is α / √r.
        dora: whether it has magnitudes.
        shapes: by name of a tensor, as peft writes them without its prefix.
        targets: the settings that say which modules are tuned, as peft takes them.
    """

    folder: Path
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    shapes: Mapping[str, tuple[int, ...]]
    targets: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the modules with factors."""
        ending = ".lora_A.weight"
        return tuple(name.removesuffix(ending) for name in self.shapes if name.endswith(ending))

    @property
    def dense(self) -> tuple[str, ...]:
        """Full names of the weights that are trained densely."""
        return tuple(name for name in self.shapes if part_of(name) is None)

    def tensors(self) -> dict[str, Tensor]:
        """Read the weights.

        Returns:
            Tensors on the CPU, fp32, by the names of ``shapes``.

        Raises:
            UserError: the file is damaged, or holds NaN or infinity.
        """
        found = {}
        for name, tensor in _opened(self.folder, lambda file, name: file.get_tensor(name)):
            found[name] = tensor.float()
            if not within(found[name], math.inf):
                raise UserError(f"algorithm.adapter: {self.folder / WEIGHTS}: {name} holds NaN or infinity")
        return found

    def fingerprint(self) -> str:
        """Hash what the adapter does to a base.

        Returns:
            SHA-256 of the scale and all weights, as 64 hexadecimal digits.
        """
        settings = f"{self.rank} {self.alpha:.17g} {self.rslora} {self.dora} {tree.fingerprint(self.tensors())}"
        return hashlib.sha256(settings.encode()).hexdigest()


def part_of(name: str) -> str | None:
    """Which part of LoRA a tensor of the file is.

    Args:
        name: of the tensor, without peft's prefix.

    Returns:
        "lora_A", "lora_B" or "lora_magnitude_vector"; None for a weight that is trained densely.
    """
    words = name.split(".")
    return next((part for part in _PARTS if part in words), None)


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read an adapter's settings and the names of its weights.

    Args:
        folder: that peft, or ``write_peft_folder``, wrote.

    Returns:
        What the folder says; its weights are read later.

    Raises:
        UserError: there is no such folder, it is damaged, or its adapter is of a kind that is not here.
    """
    if not folder.is_dir():
        raise UserError(f'algorithm.adapter="{folder}": there is no such folder; give one that peft has written')
    config = _config(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"algorithm.adapter: {folder} holds an adapter of type {config.get('peft_type')!r}, not LORA")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_number(rank) or not isinstance(rank, int):
        raise UserError(f"algorithm.adapter: {folder / CONFIG}: r must be a whole number, at least 1")
    if not _is_number(alpha):
        raise UserError(f"algorithm.adapter: {folder / CONFIG}: lora_alpha must be a number above 0")
    _refuse_others(folder, config)
    shapes = dict(_opened(folder, lambda file, name: tuple(file.get_slice(name).get_shape())))
    targets = {name: config[name] for name in _TARGETS if config.get(name)}
    bits = config.get("use_rslora") is True, config.get("use_dora") is True
    found = PeftFolder(folder, rank, alpha, *bits, shapes, targets)
    expected = {f"{module}.{part}.weight" for module in found.modules for part in _PARTS[:2]}
    if found.dora:
        expected |= {f"{module}.{_PARTS[2]}" for module in found.modules}
    odd = sorted(expected ^ (shapes.keys() - set(found.dense)))
    odd += [name for name, shape in shapes.items() if part_of(name) == "lora_A" and shape[:1] != (rank,)]
    if odd or not found.modules:
        what = odd[0] if odd else "any LoRA factor"
        raise UserError(
            f"algorithm.adapter: {folder / WEIGHTS} does not fit its settings: {what[:200]} is odd or missing"
        )
    return found


def write_peft_folder(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Fill a folder that peft reads.

    Args:
        folder: exists and is empty.
        config: of peft's.
        tensors: by name, without peft's prefix.
    """
    from safetensors.torch import save_file

    config.save_pretrained(folder)
    content = {f"{_PREFIX}{name}": tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(content, folder / WEIGHTS, metadata={"format": "pt"})


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"algorithm.adapter: {path} is missing: give a folder that peft has written") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = plain_line(str(error), 200)
        raise UserError(f"algorithm.adapter: {path} cannot be read ({reason})") from None
    if not isinstance(config, dict):
        raise UserError(f"algorithm.adapter: {path} holds no settings")
    return config


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a setting that changes the adapted model and is not here."""
    with quick_imports():
        from peft import LoraConfig

    usual = {field.name: getattr(LoraConfig(), field.name) for field in fields(LoraConfig)}
    for name, value in config.items():
        if name in _WITHOUT_EFFECT or (name in _READ and name != "init_lora_weights"):
            continue
        plain = value in _PLAIN_STARTS if name == "init_lora_weights" else not value or value == usual.get(name)
        if not plain:
            raise UserError(
                f"algorithm.adapter: {folder / CONFIG} sets {name[:80]}={str(value)[:80]}, which changes the model in "
                f"a way that is not here"
            )


def _opened(folder: Path, read: Any) -> Iterator[tuple[str, Any]]:
    """What ``read`` gives of each tensor, by its name without peft's prefix."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; its weights are pickled: save it again with peft, as safetensors" if any(folder.glob("*.bin")) else ""
        raise UserError(f"algorithm.adapter: {path} is missing{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if not name.startswith(_PREFIX):
                    raise UserError(f"algorithm.adapter: {path}: {name[:200]} is no name of peft's")
                kind = file.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):  # codes would be read as if they were values
                    raise UserError(
                        f"algorithm.adapter: {path}: {name[:200]} is of type {kind.lower()}; give real numbers"
                    )
                yield name.removeprefix(_PREFIX), read(file, name)
    except (OSError, SafetensorError) as error:
        reason = plain_line(str(error), 200)
        raise UserError(f"algorithm.adapter: {path} cannot be read ({reason})") from None


def _is_number(value: Any) -> bool:
    """Whether a setting is a number above 0 of a size that can be meant."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31

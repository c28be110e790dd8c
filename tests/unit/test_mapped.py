"""A mapped tree is an ordinary tree whose tensors happen to be in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.mapped import MappedTree


def tensors() -> dict[str, torch.Tensor]:
    """Odd sizes, one element, none, two types, and a layout that is not contiguous."""
    values = Key.of(5).uniform(3000)
    return {
        "odd": values[:2047].float(),
        "one": values[:1].float(),
        "none": torch.empty(0, 3),
        "half": values[:100].to(torch.bfloat16),
        "turned": values[:600].float().view(20, 30).T,
    }


def test_reads_as_it_was_written(tmp_path: Path) -> None:
    mapped = MappedTree(tmp_path, tensors())
    assert list(mapped) == list(tensors())
    for name, tensor in tensors().items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)
    assert tree.fingerprint(mapped) == tree.fingerprint(tensors())


def test_changes_in_place_last_beyond_the_tensor_that_made_them(tmp_path: Path) -> None:
    mapped, ordinary = MappedTree(tmp_path, tensors()), tree.clone(tensors())
    for _ in range(3):
        for weights in (mapped, ordinary):
            for tensor in weights.values():
                tensor.mul_(1.5).add_(0.25)
    assert tree.fingerprint(mapped) == tree.fingerprint(ordinary)
    mapped["one"] = torch.tensor([7.0])
    assert mapped["one"].item() == 7


def test_asking_for_a_name_that_is_not_there_leaves_the_others(tmp_path: Path) -> None:
    mapped = MappedTree(tmp_path, tensors())
    assert "odd" in mapped and "even" not in mapped
    with pytest.raises(KeyError):
        mapped["even"]
    assert torch.equal(mapped["odd"], tensors()["odd"])


def test_leaves_no_file_behind(tmp_path: Path) -> None:
    mapped = MappedTree(tmp_path, tensors())
    assert not list(tmp_path.iterdir())
    assert len(mapped) == 5

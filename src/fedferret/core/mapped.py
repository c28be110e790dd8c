"""Public weights that wait in a file: a tree of views of a shared memory mapping.

    memory = "lean":  the working replica is the one copy of the weights in RAM; the round's starting weights are
                      read back from here, one tensor at a time, and written here when an entry is applied

Each tensor's pages leave RAM when the next tensor is asked for. They stay in the operating system's file
cache while there is room, which is not the process's memory. Values are the same bits as in an ordinary tree.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

_PAGE = mmap.ALLOCATIONGRANULARITY


class MappedTree(MutableMapping[str, Tensor]):
    """A tree in a file. Tensors are changed in place; replacing or deleting one is not supported."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors`` to a new file and map it.

        Args:
            folder: where there is room; made where it is missing. The file in it has no name, so that nobody can put a
                link in its place, and it lives no longer than the tree, whatever ends the process.
            tensors: by name; copied.
        """
        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._last: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it
            for name, tensor in tensors.items():
                offset = -(-file.tell() // _PAGE) * _PAGE  # every tensor starts a page, so pages have one owner
                file.seek(offset)
                self._places[name] = (offset, tensor.shape, tensor.dtype)
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]  # a buffer
            file.truncate(max(_PAGE, -(-file.tell() // _PAGE) * _PAGE))
            file.flush()
            self._mapping = mmap.mmap(file.fileno(), 0)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        offset, shape, dtype = self._places[name]
        if self._last is not None and self._last != name:
            self._let_go(self._last)
        self._last = name
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._mapping, dtype=dtype, count=shape.numel(), offset=offset).view(shape)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self[name].copy_(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("the tensors of a mapped tree cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _let_go(self, name: str) -> None:
        """Drop a tensor's pages from this process; a shared file mapping loses nothing by it."""
        offset, shape, dtype = self._places[name]
        length = -(-max(1, shape.numel() * dtype.itemsize) // _PAGE) * _PAGE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, offset, length)

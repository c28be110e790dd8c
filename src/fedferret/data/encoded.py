"""A run's examples as tensors, client by client, made on first access and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from fedferret.core.task import Examples
from fedferret.data.examples import Example, FederatedData


class EncodedData(Mapping[str, Examples]):
    """Client ids to what each client trains on."""

    def __init__(self, data: FederatedData, encode: Callable[[Sequence[Example], bool], Any]) -> None:
        """Remember how to encode; nothing is encoded yet.

        Args:
            data: of the run.
            encode: makes batches of examples; its second argument says whether they are for training.
        """
        self.data = data
        self._encode = encode
        self._clients: dict[str, Any] = {}
        self._held_out: dict[str, Any] = {}

    def __getitem__(self, client: str) -> Any:
        if client not in self._clients:
            self._clients[client] = self._encode(self.data.clients[client], True)
        return self._clients[client]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data.clients)

    def __len__(self) -> int:
        return len(self.data.clients)

    def held_out(self, name: str) -> Any:
        """The examples of a held-out set.

        Args:
            name: of the set, as in ``data.held_out``.

        Returns:
            One row per example, to score; encoded on first access and cached.
        """
        if name not in self._held_out:
            self._held_out[name] = self.encode(self.data.held_out[name])
        return self._held_out[name]

    @cached_property
    def held_out_by_client(self) -> Mapping[str, Any]:
        """What each client holds out, encoded on first access; clients that hold nothing out are left out."""
        return _HeldOutByClient(self)

    def num_examples(self, client: str) -> int:
        """How many examples a client trains on.

        Args:
            client: the client's id.

        Returns:
            The number of examples; nothing is encoded.
        """
        return len(self.data.clients[client])

    def encode(self, examples: Sequence[Example]) -> Any:
        """Encode any examples as those that are scored.

        Args:
            examples: the examples to encode.

        Returns:
            The examples in the same order, not cached.
        """
        return self._encode(examples, False)


class _HeldOutByClient(Mapping[str, Examples]):
    """Client ids to what the clients hold out; see ``FederatedData.client_held_out``."""

    def __init__(self, encoded: EncodedData) -> None:
        self._encoded = encoded
        self._examples = encoded.data.client_held_out
        self._cache: dict[str, Any] = {}

    def __getitem__(self, client: str) -> Any:
        if client not in self._cache:
            self._cache[client] = self._encoded.encode(self._examples[client])
        return self._cache[client]

    def __iter__(self) -> Iterator[str]:
        return iter(self._examples)

    def __len__(self) -> int:
        return len(self._examples)

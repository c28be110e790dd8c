"""Tokens to tensors: compact storage, and batches of similar length (``data/order.py``), which need little padding.

Storage: 4 bytes per token and 12 bytes per example; 1 byte more per token where a target has weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedferret.core.keys import Key
from fedferret.data.encoding import Tokens
from fedferret.data.order import grouped, longest_first

IGNORED = -100  # the label of a position that no loss counts


@dataclass(frozen=True)
class Batch:
    """B examples, one row each, padded on the right to the longest example of T tokens.

    Every tensor is int64 of shape (B, T). ``labels[b, t]`` is ``input_ids[b, t]`` where t is in the response, else
    ``IGNORED``. Labels are masked by position and never by token id, because a model's padding token may be its
    end-of-text token. ``attention_mask`` is 1 on tokens and 0 on padding. A packed batch has one row, which
    concatenates its examples, and no padding.
    """

    input_ids: Tensor
    attention_mask: Tensor | None  # None in a packed batch
    labels: Tensor
    position_ids: Tensor | None = None  # packed batches only: from 0 in each example, which keeps their attention apart

    def __len__(self) -> int:
        return self.input_ids.shape[0]


class TokenisedData:
    """The examples of one client or one held-out set: a flat int32 tensor of tokens, and the end of each example."""

    def __init__(self, examples: Sequence[Tokens], packed: bool = False, train_on_prompts: bool = False) -> None:
        """Store examples in compact form.

        Args:
            examples: tokenised examples.
            packed: whether each training batch is one packed row.
            train_on_prompts: whether all tokens have labels but those of turns of weight 0; else the response alone.
        """
        self._packed = packed
        self._ids = torch.tensor([token for each in examples for token in each.ids], dtype=torch.int32)
        self._lengths = torch.tensor([len(each.ids) for each in examples], dtype=torch.int32)
        # the first token has no predecessor, so no label
        starts = [1 if train_on_prompts else each.response_start for each in examples]
        self._response_starts = torch.tensor(starts, dtype=torch.int32)
        self._ends = self._lengths.cumsum(0)
        self._untrained: Tensor | None = None  # which tokens after the start of the labels have none, bool
        if train_on_prompts and any(each.untrained for each in examples):
            self._untrained = torch.zeros(len(self._ids), dtype=torch.bool)
            for each, after in zip(examples, self._ends.tolist(), strict=True):
                first = after - len(each.ids)
                for start, end in each.untrained:
                    self._untrained[first + max(1, start) : first + end] = True
        self.num_cut = sum(each.response_cut for each in examples)  # responses that max_tokens cut

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        lengths: list[int] = self._lengths.tolist()
        return lengths

    @property
    def longest_first(self) -> list[int]:
        """Indices of the examples in evaluation order: longest first."""
        return longest_first(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, prompts included."""
        return len(self._ids)

    @property
    def num_response_tokens(self) -> int:
        """Number of tokens that have a label."""
        without = 0 if self._untrained is None else int(self._untrained.sum())
        return int((self._lengths - self._response_starts).sum()) - without

    @property
    def largest_token(self) -> int:
        """The largest number of a token; -1 without tokens."""
        return int(self._ids.max()) if len(self._ids) else -1

    def take(self, rows: Sequence[int]) -> TokenisedData:
        """Choose examples.

        Args:
            rows: indices from 0, which may repeat.

        Returns:
            A copy of the examples with these indices, in this order; ``num_cut`` still counts over all examples.
        """
        chosen = object.__new__(TokenisedData)
        chosen._packed, chosen.num_cut = self._packed, self.num_cut
        places = [slice(int(self._ends[row]) - int(self._lengths[row]), int(self._ends[row])) for row in rows]
        chosen._ids = torch.cat([self._ids[place] for place in places]) if places else self._ids[:0]
        chosen._untrained = None
        if self._untrained is not None and places:
            chosen._untrained = torch.cat([self._untrained[place] for place in places])
        index = torch.tensor(list(rows), dtype=torch.int64)
        chosen._lengths, chosen._response_starts = self._lengths[index], self._response_starts[index]
        chosen._ends = chosen._lengths.cumsum(0)
        return chosen

    def batches(self, size: int, key: Key | None) -> Iterator[Batch]:
        """One pass over the examples.

        Args:
            size: examples per batch.
            key: draws which examples share a batch, and the order of the batches. None gives evaluation order, longest
                first, so that no later batch needs more memory than the first.

        Returns:
            Every example once, in batches of ``size``; one batch may be smaller. Evaluation order is never packed.
        """
        for rows in grouped(self.lengths, size, key):
            yield self.batch(rows, key is not None)

    def batch(self, rows: Sequence[int], for_training: bool) -> Batch:
        """One batch.

        Args:
            rows: indices of its examples.
            for_training: whether it may be packed.

        Returns:
            The batch, packed where training batches are.
        """
        return self._pack(rows) if self._packed and for_training else self._batch(rows)

    def _pack(self, rows: Sequence[int]) -> Batch:
        input_ids, labels, position_ids = [], [], []
        for row in rows:
            length, response_start, end = int(self._lengths[row]), int(self._response_starts[row]), int(self._ends[row])
            ids = self._ids[end - length : end].long()
            scored = ids.clone()
            scored[: max(1, response_start)] = IGNORED  # the token before the first is another example's
            if self._untrained is not None:
                scored[self._untrained[end - length : end]] = IGNORED
            input_ids.append(ids)
            labels.append(scored)
            position_ids.append(torch.arange(length))
        return Batch(torch.cat(input_ids)[None], None, torch.cat(labels)[None], torch.cat(position_ids)[None])

    def _batch(self, rows: Sequence[int]) -> Batch:
        longest = int(self._lengths[rows].max())
        input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for place, row in enumerate(rows):
            length, response_start, end = int(self._lengths[row]), int(self._response_starts[row]), int(self._ends[row])
            ids = self._ids[end - length : end]
            input_ids[place, :length] = ids
            attention_mask[place, :length] = 1
            labels[place, response_start:length] = ids[response_start:]
            if self._untrained is not None:
                labels[place, :length][self._untrained[end - length : end]] = IGNORED
        return Batch(input_ids, attention_mask, labels)

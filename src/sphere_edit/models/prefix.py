"""Rows that begin alike, such as prompts in one chat template or one context template: what they have in common is run once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_edit.models.forward import last_hidden, until_last, with_cache
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.tokens import TokenBatch

_LEAST = 8  # tokens in common that are worth it
_ALIKE = 4  # rows that begin alike, of many, that are worth it
_SAVED = 512  # tokens fewer to run that are worth another pass, and a check
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}


class SharedPrefix:
    """Keys and values of what all rows begin with, and the last layer's output for what follows in each.

    Attributes:
        length: tokens in common; 0 where there are too few, or where this model does not go on from a prefix as it runs whole rows.
    """

    def __init__(self, loaded: LoadedModel, rows: Sequence[Sequence[int]], most: int):
        """Find at most so many tokens that all ``rows`` of ids begin with, and run them; each row must have one more."""
        self._loaded, self.length = loaded, 0
        length = min(most, common_length(rows)) if len(rows) > 1 else 0
        if length < _LEAST or loaded.architecture.whole_rows:
            return
        try:
            self._layers = self._run(rows[0][:length])
            self.length = length
            self.length = length if self._fits(rows[0]) else 0
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, NotImplementedError):
            self.length = 0  # what this model keeps of a prefix is something else

    @torch.no_grad()
    def _run(self, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        batch = TokenBatch.of([ids], self._loaded.device)
        until_last(self._loaded, batch, **with_cache(self._loaded.model, cache))
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _fits(self, row: Sequence[int]) -> bool:
        """Whether one row goes on from the prefix to what the whole row gives."""
        batch = TokenBatch.of([row], self._loaded.device)
        return agree(self.last_hidden([row]), last_hidden(self._loaded, batch)[:, self.length :])

    @torch.no_grad()
    def last_hidden(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The last layer's output ``[B, S, d_model]`` behind the prefix, rows padded on the right; column 0 follows the prefix."""
        if self.length == 0:
            return last_hidden(self._loaded, TokenBatch.of(rows, self._loaded.device))
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for number, parts in enumerate(self._layers):
            cache.update(*(part.expand(len(rows), -1, -1, -1) for part in parts), number)
        batch = TokenBatch.of([row[self.length :] for row in rows], self._loaded.device)
        before = torch.ones(len(rows), self.length, dtype=batch.mask.dtype, device=batch.mask.device)
        seen = TokenBatch(batch.ids, torch.cat([before, batch.mask], dim=1))
        return until_last(self._loaded, seen, **with_cache(self._loaded.model, cache))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways of running the same rows give the same hidden states, but for rounding in their numbers."""
    tolerance = _TOLERANCES.get(expected.dtype, 5e-2)
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and float((found - expected).norm() / expected.norm()) <= tolerance


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))  # of rows in order, these two differ soonest
    return next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


@dataclass(frozen=True)
class Leads:
    """What some rows begin with as others do, such as the words of a context template before a prompt.

    Attributes:
        distinct: token ids of each such beginning; the empty one is of the rows that begin like too few others.
        of: for each row which of them it begins with.
    """

    distinct: list[tuple[int, ...]]
    of: list[int]

    @classmethod
    def none(cls, rows: int) -> Leads:
        """Rows that are run whole."""
        return cls([()], [0] * rows)

    @classmethod
    def found(cls, rows: Sequence[Sequence[int]], most: Sequence[int]) -> Leads:
        """The longest that `_ALIKE` rows have, at most ``most`` tokens of each row; none where that saves too little."""
        order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
        lengths = [0] * len(rows)
        for alike in zip(*(order[start:] for start in range(_ALIKE)), strict=False):
            length = common_length([rows[index] for index in alike])
            for index in alike:
                lengths[index] = max(lengths[index], min(length, most[index]))
        beginnings = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        distinct = sorted(set(beginnings))
        saved = len(rows) * max(map(len, rows), default=0) - sum(map(len, distinct))
        saved -= len(rows) * max((len(row) - length for row, length in zip(rows, lengths, strict=True)), default=0)
        return cls(distinct, [distinct.index(lead) for lead in beginnings]) if saved >= _SAVED else cls.none(len(rows))

    @property
    def length(self) -> int:
        """Tokens of the longest."""
        return max(map(len, self.distinct))

    def rest(self, rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """What follows in each row."""
        return [row[len(self.distinct[lead]) :] for row, lead in zip(rows, self.of, strict=True)]

    @torch.no_grad()
    def run(self, loaded: LoadedModel) -> tuple[Any, Tensor]:
        """A cache that holds each row's lead, padded on the left, and the mask ``[rows, length]`` of it."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        if not self.length:
            return cache, torch.zeros(len(self.of), 0, dtype=torch.long, device=loaded.device)
        leads: Any = DynamicCache()
        width = self.length
        ids = torch.tensor([[0] * (width - len(lead)) + list(lead) for lead in self.distinct], device=loaded.device)
        mask = torch.tensor([[0] * (width - len(lead)) + [1] * len(lead) for lead in self.distinct], device=ids.device)
        read = mask.clone()
        read[:, -1] = 1  # in place of an empty one some token is read, which no row sees
        positions = (read.cumsum(1) - 1).clamp_min(0)
        until_last(loaded, TokenBatch(ids, read), position_ids=positions, **with_cache(loaded.model, leads))
        of = torch.tensor(self.of)
        for number, layer in enumerate(leads.layers):
            cache.update(*(part[of.to(part.device)] for part in (layer.keys, layer.values)), number)
        return cache, mask[of.to(mask.device)]

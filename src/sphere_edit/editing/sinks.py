"""Attention sinks: tokens at which attention rests, and where nothing of a fact can be written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import asked_rows
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import activations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, over_batches
from sphere_edit.models.weights import EditedWeights

_FIRST = frozenset({0})
_STANDS_OUT = 2  # times the middle length of a row's other tokens


class Sinks:
    """The indices of the sinks among some token ids, as the unedited model has them after ``layer``; each row is read once."""

    def __init__(self, loaded: LoadedModel, weights: EditedWeights, layer: int, max_tokens: int):
        self.loaded, self.weights, self.layer, self.max_tokens = loaded, weights, layer, max_tokens
        self._known: dict[tuple[int, ...], frozenset[int]] = {}

    def measure(self, facts: Iterable[Fact], encoder: Encoder) -> None:
        """Read the facts' prompts and rewordings, those not known yet, in batches."""
        self._read(row for fact in facts for row in asked_rows(fact, encoder))

    def __call__(self, ids: list[int]) -> frozenset[int]:
        """Those of one row."""
        self._read([ids])
        return self._known[tuple(ids)]

    def _read(self, rows: Iterable[list[int]]) -> None:
        fresh = list(dict.fromkeys(row for row in map(tuple, rows) if row not in self._known))
        if not fresh:
            return

        def read(chunk: list[tuple[int, ...]]) -> Iterator[frozenset[int]]:
            return iter(attention_sinks(self.loaded, self.layer, [list(row) for row in chunk]))

        with self.weights.unedited():
            self._known |= zip(fresh, over_batches(fresh, self.max_tokens, read), strict=True)


def attention_sinks(loaded: LoadedModel, layer: int, rows: list[list[int]]) -> list[frozenset[int]]:
    """Of each row, indices of the tokens at which attention rests, by how long what stands there after ``layer`` is.

    The first of the row, and those more than twice as long as the middle one of the rest (massive activations, arXiv:2402.17762).
    """
    site = loaded.architecture.decoder_layers(loaded.model)[layer]
    _, hidden = activations(loaded, TokenBatch.of(rows, loaded.device), output_of=site)
    assert hidden is not None
    found = []
    for row, lengths in zip(rows, hidden.float().norm(dim=-1).cpu(), strict=True):
        rest = lengths[1 : len(row)]
        longer = rest > _STANDS_OUT * rest.median() if len(rest) else torch.zeros(0, dtype=torch.bool)
        found.append(_FIRST | {1 + index for index in longer.nonzero().flatten().tolist()})
    return found

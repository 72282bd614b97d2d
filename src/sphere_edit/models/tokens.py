"""Rows of token ids as padded batches, where answers are predicted in them, and work done on them batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from sphere_edit import ranks

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids ``[B, S]`` and their attention mask. Causal models never see padding on the right."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> TokenBatch:
        """Pad rows of token ids to the longest."""
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : len(row)] = 1
        return cls(ids.to(device), mask.to(device))


@dataclass(frozen=True)
class Predictions:
    """Where the tokens of some answers are predicted, and how their means over tokens and answers are taken."""

    rows: Tensor  # [m] the answer's row of the batch
    columns: Tensor  # [m] the position that predicts the token
    tokens: Tensor  # [m] the token
    means: Tensor  # [groups, m]: times a number a token, the mean over tokens, then over a group's answers

    @classmethod
    def of(
        cls, answers: Sequence[tuple[int, int, int, Sequence[int]]], groups: int, device: torch.device
    ) -> Predictions:
        """Lay out answers: the group each belongs to, its row, the column that predicts its first token, its tokens."""
        numbers = [(row, first + offset, token) for _, row, first, ids in answers for offset, token in enumerate(ids)]
        rows, columns, tokens = torch.tensor(numbers).T
        group = torch.tensor([group for group, *_ in answers])
        sizes = torch.tensor([len(ids) for *_, ids in answers])
        shares = 1 / (sizes * group.bincount(minlength=groups)[group])
        means = torch.zeros(groups, len(tokens))
        means[group.repeat_interleave(sizes), torch.arange(len(tokens))] = shares.repeat_interleave(sizes)
        return cls(rows.to(device), columns.to(device), tokens.to(device), means.to(device))


def batches_by_length(lengths: Sequence[int], max_tokens: int, rows: int | None = None) -> list[list[int]]:
    """Indices sorted by length and cut so that no padded batch holds more than ``max_tokens`` (one row at least), or more ``rows``."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if (
            batches
            and (len(batches[-1]) + 1) * lengths[index] <= max_tokens
            and (rows is None or len(batches[-1]) < rows)
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def same_length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As `batches_by_length`, but a batch holds rows of one length only, as `generation.generate` takes them."""
    return [
        list(part)
        for batch in batches_by_length(lengths, max_tokens)
        for _, part in groupby(batch, key=lengths.__getitem__)
    ]


def batches_of(
    rows: Sequence[Row],
    max_tokens: int,
    length: Callable[[Row], int] = len,  # type: ignore[assignment]
) -> list[list[Row]]:
    """The rows themselves, batch by batch, as `batches_by_length` cuts them; ``length`` says how many tokens a row has."""
    return [[rows[index] for index in chunk] for chunk in batches_by_length([length(row) for row in rows], max_tokens)]


def over_batches(
    rows: Sequence[Row],
    max_tokens: int,
    work: Callable[[list[Row]], Iterable[Result]],
    length: Callable[[Row], int] = len,  # type: ignore[assignment]
    cut: Callable[[Sequence[int], int], list[list[int]]] = batches_by_length,
) -> list[Result]:
    """What ``work`` makes of each row, in the order of the rows, although it sees them in batches of similar length, which are dealt to the ranks.

    Args:
        rows: anything that has a number of tokens: token ids, a fact's prompts, …
        max_tokens: in one padded batch; a longer row is a batch of its own.
        work: gives one result a row of the batch it is called with; batches come one after another, the shortest rows first.
        length: the tokens of a row.
        cut: `batches_by_length` or `same_length_batches`.
    """
    chunks = cut([length(row) for row in rows], max_tokens)
    found = ranks.dealt(chunks, lambda chunk: list(work([rows[index] for index in chunk])))
    return in_order(zip(chunks, found, strict=True))


def in_order(parts: Iterable[tuple[Sequence[int], Iterable[Result]]]) -> list[Result]:
    """Results of batches in the rows' order; a part is the indices of a batch's rows and one result for each of them.

    The indices of all parts are 0 to n − 1, each once.
    """
    found = {index: result for chunk, part in parts for index, result in zip(chunk, part, strict=True)}
    return [found[index] for index in range(len(found))]

"""Held-out text: perplexity, and how far next-token distributions moved from the unedited model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.files import cache_dir, is_whole, read_tensors, write_tensors
from sphere_edit.models.forward import head_rows, last_hidden
from sphere_edit.models.identity import cache_key, config_values
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, batches_of
from sphere_edit.progress import Reporter

_PERPLEXITY = "perplexity"  # beside the hidden states in a file of the cache
_LARGEST = 2**26  # bytes of such a file: longer text is read again


@dataclass(frozen=True)
class HeldoutScores:
    """What was measured on held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per predicted token; None where that is not finite.
        divergence: mean KL(unedited ‖ this model) of next-token distributions in nats, over the same positions; None where
            there was nothing to compare with, or it is not finite.
        hidden: what the head was given at those positions, ``[positions, d_model]`` of each batch that this rank has read, by its number;
            to be compared with.
    """

    perplexity: float | None
    divergence: float | None
    hidden: dict[int, Tensor]


def score_heldout(
    loaded: LoadedModel,
    passages: Sequence[Sequence[int]],
    max_tokens: int,
    reporter: Reporter,
    title: str = "held-out text",
    unedited: Mapping[int, Tensor] | None = None,
    positions: int | None = None,
) -> HeldoutScores:
    """Read passages of token ids one by one on the model as it stands.

    ``unedited`` is ``hidden`` of the unedited model on the same passages. Nothing behind the last layer is edited, so the head
    makes the unedited distributions of it, and no second pass through the model is needed. Of more than so many ``positions``
    every second one is looked at, or every third, …: of a large vocabulary the head is most of the work.
    """
    passages = [passage for passage in passages if len(passage) > 1]
    stride = 1 if positions is None else max(1, -(-sum(len(passage) - 1 for passage in passages) // positions))
    kept: dict[int, Tensor] = {}

    def read(part: tuple[int, list[Sequence[int]]]) -> tuple[float, float, int]:
        number, rows = part
        batch = TokenBatch.of(rows, loaded.device)
        predicted = _every(batch.mask[:, 1:].bool(), stride)
        hidden = last_hidden(loaded, batch)[:, :-1][predicted]
        before = None if unedited is None else unedited[number].to(hidden.device)
        lost, apart = _sums(loaded, hidden, batch.ids[:, 1:][predicted], before)
        kept[number] = hidden.cpu()
        tell(int(batch.mask.sum()))
        return lost, apart, len(hidden)

    with reporter.bar(title, sum(map(len, passages)), "token") as advance, ranks.told(advance) as tell:
        found = ranks.dealt(list(enumerate(batches_of(passages, max_tokens))), read)
    loss, divergence, count = 0.0, 0.0, 0
    for nll, apart, predicted in found:
        loss, divergence, count = loss + nll, divergence + apart, count + predicted
    mean, distance = (total / count if count else math.nan for total in (loss, divergence))
    return HeldoutScores(
        math.exp(min(mean, 700.0)) if math.isfinite(mean) else None,
        distance if unedited is not None and math.isfinite(distance) else None,
        kept,
    )


def unedited_heldout(
    loaded: LoadedModel, passages: Sequence[Sequence[int]], max_tokens: int, reporter: Reporter
) -> HeldoutScores:
    """`score_heldout` of the model as it was loaded, which must be in place; from the cache where it has read these passages before."""
    title = "held-out, unedited"
    if ranks.count() > 1:  # each rank keeps what it has read itself
        return score_heldout(loaded, passages, max_tokens, reporter, title)
    parts = [loaded.fingerprint, config_values(loaded.model), [list(passage) for passage in passages], max_tokens]
    file = cache_dir() / "heldout" / f"{cache_key(loaded.device, *parts)}.safetensors"
    if is_whole(file):
        kept = read_tensors(file)
        perplexity = float(kept.pop(_PERPLEXITY))
        hidden = {int(number): rows for number, rows in kept.items()}
        return HeldoutScores(perplexity if math.isfinite(perplexity) else None, None, hidden)
    found = score_heldout(loaded, passages, max_tokens, reporter, title)
    perplexity = math.nan if found.perplexity is None else found.perplexity
    if sum(rows.nbytes for rows in found.hidden.values()) <= _LARGEST:
        kept = {str(number): rows for number, rows in found.hidden.items()}
        write_tensors(file, kept | {_PERPLEXITY: torch.tensor(perplexity, dtype=torch.float64)})
    return found


def _every(chosen: Tensor, stride: int) -> Tensor:
    """Every so many-th of the places that are ``chosen [B, S]``."""
    return chosen & (chosen.flatten().cumsum(0).view_as(chosen) % stride == 1 % stride)


@torch.no_grad()
def _sums(loaded: LoadedModel, hidden: Tensor, tokens: Tensor, unedited: Tensor | None) -> tuple[float, float]:
    """Over positions, the sum of −log q of the ``tokens [positions]`` that follow, and that of KL(p ‖ q); 0 without p.

    q and p are what the head makes of ``hidden`` and ``unedited [positions, d_model]``.
    """
    loss = divergence = 0.0
    size = head_rows(loaded)
    for first in range(0, len(hidden), size):
        rows = slice(first, first + size)
        q = _log_probabilities(loaded, hidden[rows])
        loss -= float(q.gather(1, tokens[rows, None]).double().sum())
        if unedited is not None:
            p = _log_probabilities(loaded, unedited[rows])
            divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
    return loss, divergence


def _log_probabilities(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """Of the next token ``[positions, V]``, float32."""
    return loaded.architecture.head(loaded.model, hidden).float().log_softmax(-1)

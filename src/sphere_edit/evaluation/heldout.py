"""Held-out text: perplexity, and how far next-token distributions moved from the unedited model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.models.forward import last_hidden, next_token_scores
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, batches_of
from sphere_edit.progress import Reporter

_HEAD_ROWS = 512  # positions whose two distributions exist at one time; changes memory, not results


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
) -> HeldoutScores:
    """Read passages of token ids one by one on the model as it stands.

    ``unedited`` is ``hidden`` of the unedited model on the same passages. Nothing behind the last layer is edited, so the head
    makes the unedited distributions of it, and no second pass through the model is needed.
    """
    passages = [passage for passage in passages if len(passage) > 1]
    kept: dict[int, Tensor] = {}

    def read(part: tuple[int, list[Sequence[int]]]) -> tuple[float, float, int]:
        number, rows = part
        batch = TokenBatch.of(rows, loaded.device)
        predicted = batch.mask[:, 1:].bool()
        hidden = last_hidden(loaded, batch)[:, :-1][predicted]
        losses, _ = next_token_scores(loaded, hidden, batch.ids[:, 1:][predicted])
        apart = 0.0 if unedited is None else _divergence(loaded, unedited[number].to(hidden.device), hidden)
        kept[number] = hidden.cpu()
        tell(int(batch.mask.sum()))
        return float(losses.double().sum()), apart, len(losses)

    with reporter.bar(title, sum(map(len, passages)), "tokens") as advance, ranks.told(advance) as tell:
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


@torch.no_grad()
def _divergence(loaded: LoadedModel, first: Tensor, second: Tensor) -> float:
    """Sum over positions of KL(p ‖ q), p and q what the head makes of ``first`` and ``second [positions, d_model]``."""
    total = 0.0
    for ours, theirs in zip(first.split(_HEAD_ROWS), second.split(_HEAD_ROWS), strict=True):
        p, q = (loaded.architecture.head(loaded.model, part).float().log_softmax(-1) for part in (ours, theirs))
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
    return total

"""Whether a model answers as the unedited one does, at prompts whose fact was taken back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.evaluation.scores import answer_ends
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.forward import at, last_hidden
from sphere_edit.models.generation import greedy_continuations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, over_batches


@dataclass(frozen=True)
class Answered:
    """What a model makes of one fact in one form.

    Attributes:
        said: its greedy answer to the prompt, as many tokens as the fact's new answer has; fewer where it ends its text.
        hidden: what the head makes next-token distributions of after the prompt and each paraphrase, ``[1 + paraphrases, d_model]``.
    """

    said: tuple[int, ...]
    hidden: Tensor


def answered(loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int) -> list[Answered]:
    """What the model as it stands makes of facts, each in its first form."""
    encoder = Encoder(loaded.tokenizer)
    rows = [
        [encoder.asked(prompt, fact.chat, fact.system).ids for prompt in (fact.filled_prompt, *fact.paraphrases)]
        for fact in facts
    ]
    lengths = [answer_tokens(fact, encoder) for fact in facts]
    ends = [answer_ends(loaded, encoder, fact.chat) for fact in facts]
    said = greedy_continuations(loaded, [several[0] for several in rows], lengths, ends)

    def read(chunk: list[list[int]]) -> Iterator[Tensor]:
        batch = TokenBatch.of(chunk, loaded.device)
        return iter(at(last_hidden(loaded, batch), batch.mask.sum(1) - 1))

    found = iter(over_batches([row for several in rows for row in several], max_tokens, read))
    return [
        Answered(tuple(ids), torch.stack([next(found) for _ in several]))
        for ids, several in zip(said, rows, strict=True)
    ]


def answer_tokens(fact: Fact, encoder: Encoder) -> int:
    """How many tokens of an answer count: as many as the new one has, one at least."""
    tokens, start = encoder.answered(fact.filled_prompt, fact.target_new, fact.separator, fact.chat, fact.system)
    return max(1, len(tokens.ids) - start)


@torch.no_grad()
def divergences(loaded: LoadedModel, unedited: Answered, now: Answered) -> list[float]:
    """KL(unedited ‖ now) of the next token in nats, after the prompt and each paraphrase. Nothing behind the last layer is edited."""
    p, q = (loaded.architecture.head(loaded.model, one.hidden).float().log_softmax(-1) for one in (unedited, now))
    return (p.exp() * (p - q)).sum(-1).double().clamp_min(0).tolist()


@dataclass(frozen=True)
class Returned:
    """A fact that was taken back, on the model as it stands beside the unedited one.

    Attributes:
        answer: the unedited model's greedy answer to the prompt.
        said: the model's, as many tokens.
        returned: whether they are the same, token by token, in every form that the fact was edited in.
        kl: KL(unedited ‖ now) of the next token after the prompt, in nats; the largest of its forms.
        kl_paraphrases: the mean of it after the paraphrases, in the fact's first form; None where there are none.
    """

    answer: str
    said: str
    returned: bool
    kl: float
    kl_paraphrases: float | None

    @classmethod
    def of(cls, loaded: LoadedModel, unedited: Sequence[Answered], now: Sequence[Answered]) -> Returned:
        """From what both models made of the fact, form by form."""
        apart = [divergences(loaded, *pair) for pair in zip(unedited, now, strict=True)]
        behind = apart[0][1:]
        decode = loaded.tokenizer.decode
        return cls(
            decode(unedited[0].said),
            decode(now[0].said),
            all(before.said == after.said for before, after in zip(unedited, now, strict=True)),
            max(values[0] for values in apart),
            sum(behind) / len(behind) if behind else None,
        )

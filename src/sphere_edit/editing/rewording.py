"""Rewordings that the tool makes: lent by other facts or written by a chat model, and kept where the unedited model reads them alike.

Nothing judges them but the model: a wording is kept if the distribution of its next token is near the one after the prompt. On
CounterFact records 6000–6999, of which no setting's table is made, 62 % of the wordings with the likeliest answers in common ask for the same
relation. Of those within half a nat 97 % do, a quarter of all that do (docs/LOG.md).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.chat import has_chat_template
from sphere_edit.facts.fact import Fact, folded
from sphere_edit.facts.lending import is_fair, lendable
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.seam import word_places
from sphere_edit.models.forward import at, last_hidden
from sphere_edit.models.generation import generate, seeded
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.tokens import TokenBatch, over_batches
from sphere_edit.progress import Reporter

MOST = 3  # rewordings of one fact
NEAR = 0.5  # nats of KL(after the prompt ‖ after the wording), mean over subjects, up to which a wording is kept
_LOOKED_AT = 8  # wordings lent to one prompt that the model is asked about
_SUBJECTS = 4  # facts of one prompt that it is asked about
_SAMPLES = 4  # that a chat model writes for one prompt
_WORDS = 24  # tokens of each
_ASKS = (
    'Here is the beginning of a sentence: "{}" Say it in other words. Keep the name, and stop at the same place. Write only '
    "the new beginning."
)


@dataclass
class Reworded:
    """Facts with the rewordings they were given or got, and what became of all that were tried."""

    facts: list[Fact]
    lent: int = 0  # of prompts, kept
    written: int = 0  # of prompts, by the model, kept
    tried: int = 0


def reworded(loaded: LoadedModel, facts: Sequence[Fact], max_tokens: int, seed: int, reporter: Reporter) -> Reworded:
    """The facts, each with up to `MOST` rewordings; those that it was given come first, and stay.

    Args:
        loaded: the unedited model.
        max_tokens: in one forward pass.
        seed: of what a chat model writes.
    """
    encoder = Encoder(loaded.tokenizer)
    examples: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.subject and len(examples[fact.prompt]) < _SUBJECTS:
            examples[fact.prompt].append(fact)
    lent = {prompt: wordings[:_LOOKED_AT] for prompt, wordings in lendable(facts).items()}
    near = _near(loaded, encoder, examples, lent, max_tokens)
    found = Reworded([], sum(map(len, near.values())), tried=sum(map(len, lent.values())))
    short = {prompt: shown for prompt, shown in examples.items() if len(near[prompt]) < MOST}
    if has_chat_template(loaded.tokenizer) and short:
        written = ranks.once(partial(_written, loaded, encoder, short, max_tokens, seed, reporter))
        kept = _near(loaded, encoder, short, written, max_tokens)
        found.written, found.tried = sum(map(len, kept.values())), found.tried + sum(map(len, written.values()))
        near = {prompt: [*wordings, *kept.get(prompt, ())] for prompt, wordings in near.items()}
    found.facts = [_with(fact, near.get(fact.prompt, ())) for fact in facts]
    return found


def _with(fact: Fact, wordings: Sequence[str]) -> Fact:
    fair = [wording for wording in wordings if wording not in fact.rewordings and is_fair(fact, wording)]
    room = max(0, MOST - len(fact.rewordings))
    return replace(fact, rewordings=(*fact.rewordings, *fair[:room]))


# --- what the model is asked ----------------------------------------------------------------------------------------


def _near(
    loaded: LoadedModel,
    encoder: Encoder,
    examples: dict[str, list[Fact]],
    wordings: dict[str, list[str]],
    max_tokens: int,
) -> dict[str, list[str]]:
    """Of each prompt's wordings those within `NEAR`, the nearest first."""
    found = {}
    for prompt, shown in examples.items():
        readable = [wording for wording in wordings[prompt] if _is_readable(encoder, shown, wording)]
        means = divergences(loaded, encoder, shown, readable, max_tokens).mean(1).tolist()
        found[prompt] = [wording for mean, wording in sorted(zip(means, readable, strict=True)) if mean <= NEAR]
    return found


def _is_readable(encoder: Encoder, facts: Sequence[Fact], wording: str) -> bool:
    """Whether the tokenizer can place the facts' subjects in it."""
    try:
        for fact in facts:
            encoder.at_subject(replace(fact, prompt=wording))
    except SphereEditError:
        return False
    return True


def divergences(
    loaded: LoadedModel, encoder: Encoder, facts: Sequence[Fact], wordings: Sequence[str], max_tokens: int
) -> Tensor:
    """KL(p ‖ q) in nats, ``[wordings, facts]``: p follows a fact's prompt, q the wording with ``{}`` in the prompt's place."""
    asked = [*facts, *(replace(fact, prompt=wording) for wording in wordings for fact in facts)]
    rows = [encoder.asked_fact(fact).ids for fact in asked]
    p, *others = torch.stack(over_batches(rows, max_tokens, partial(_following, loaded))).split(len(facts))
    return torch.stack([(p.exp() * (p - q)).sum(-1) for q in others]) if others else torch.empty(0, len(facts))


@torch.no_grad()
def _following(loaded: LoadedModel, rows: list[list[int]]) -> Tensor:
    """log p of the token after each row, ``[n, V]``."""
    batch = TokenBatch.of(rows, loaded.device)
    hidden = at(last_hidden(loaded, batch), batch.mask.sum(1) - 1)
    return loaded.architecture.head(loaded.model, hidden).float().log_softmax(-1)


# --- what a chat model writes ---------------------------------------------------------------------------------------


def _written(
    loaded: LoadedModel,
    encoder: Encoder,
    examples: dict[str, list[Fact]],
    max_tokens: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, list[str]]:
    """What a chat model makes of each prompt when asked for other words, with ``{}`` for the subject."""
    found: dict[str, list[str]] = {}
    with seeded(loaded.device, seed), reporter.bar("rewordings", len(examples), "prompt") as advance:
        for prompt, (fact, *_) in examples.items():
            ids = encoder.asked(_ASKS.replace("{}", fact.filled_prompt), chat=True).ids
            said = generate(loaded, [ids] * _SAMPLES, _WORDS, do_sample=True, temperature=0.7, top_p=0.95)
            texts = [loaded.tokenizer.decode(row[len(ids) :], skip_special_tokens=True) for row in said]
            found[prompt] = list(dict.fromkeys(filter(None, (wording_in(text, fact) for text in texts))))
            advance(1)
    return found


def wording_in(said: str, fact: Fact) -> str | None:
    """The wording in what a model said: its first line, without quotes and what ends a sentence, with ``{}`` for the subject; None if it has none.

    It must name the subject once and in one piece, not repeat the prompt, and not give an answer.
    """
    line = next((line for line in said.splitlines() if line.strip()), "")
    text = re.sub(r"[\s.…\"“”']+$", "", re.sub(r"^[\s\"“”']+", "", line))
    places = word_places(text, fact.subject)
    if len(places) != 1 or "{" in text.replace(fact.subject, ""):
        return None
    wording = text[: places[0]] + "{}" + text[places[0] + len(fact.subject) :]
    rest = folded(wording)
    pieces = {piece for piece in folded(fact.subject).split() if len(piece) > 2} & set(re.findall(r"\w+", rest))
    told = any(folded(answer) in rest for answer in (fact.target_new, fact.target_true) if answer)
    return None if pieces or told or folded(fact.prompt) in rest else wording

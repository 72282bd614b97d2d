"""The forms in which a fact is written: more than one where its subject ends at a token at which attention rests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder, fill
from sphere_edit.facts.seam import separator_between

_OPENER = "\n"  # what stands before a fact that is not to be the first of a row: a line's end
_OTHERS = (
    *("The", "In", "It", "She", "America", "People", "Water", "Music", "John", "Winter"),
    *("History", "Time", "Africa", "Europe", "Love", "Science", "Money", "Today", "God", "Peace"),
)

Sinks = Callable[[list[int]], AbstractSet[int]]  # the indices of those of some token ids at which attention rests


class BareForm(Fact):
    """A form that is written in the bare prompt alone, and in no context template."""


def first_token(ids: list[int]) -> AbstractSet[int]:
    """The sink that is known without asking a model: the first token of a row."""
    return {0}


def begins_its_row(fact: Fact, encoder: Encoder) -> bool:
    """Whether the last token of a fact's subject is the first of its prompt; a fact without a subject begins none."""
    return at_rest(fact, encoder, first_token)


def at_rest(fact: Fact, encoder: Encoder, sinks: Sinks) -> bool:
    """Whether attention rests on the last token of a fact's subject, in its bare prompt; not in a chat, where much stands before it."""
    if not fact.subject or fact.chat:
        return False
    return encoder.at_subject(fact)[1] in sinks(_ids(fact, encoder))


def asked_rows(fact: Fact, encoder: Encoder) -> Iterator[list[int]]:
    """Token ids of a fact's own prompt and of its rewordings, where they are not asked in a chat."""
    for single in fact.in_each_form():
        if single.subject and not single.chat:
            yield from (_ids(form, encoder) for form in (single, *_reworded(single)))


def _ids(fact: Fact, encoder: Encoder) -> list[int]:
    return encoder.encode(fill("{}", fact)[0]).ids


def written_forms(facts: Sequence[Fact], encoder: Encoder, sinks: Sinks = first_token) -> list[Fact]:
    """All that is written for some facts, fact by fact: each of a fact's forms (plain, chat), as `forms_of` says."""
    return [form for fact in facts for single in fact.in_each_form() for form in forms_of(single, encoder, sinks)]


def forms_of(fact: Fact, encoder: Encoder, sinks: Sinks = first_token) -> list[Fact]:
    """The fact, or the two that are written in its place where it would be written at a token on which attention rests.

    Attention rests on the first token of a row, whatever that is (arXiv:2309.17453), and after some on the second (`Geo Metro`, `BRIC`). All
    texts have much the same key there: what is written there is written into every text, and nothing of the subject can be read from it. Such
    a fact has two forms, each with a longer subject:

    - with a line's end before it, for the subject inside a text;
    - with the prompt up to its longest token behind it, for the bare prompt: that token has read the subject, and says what is asked.

    A prompt that is nothing but its subject has the first form only. A rewording that begins otherwise is a form of its own, and
    takes the others along. A tokenizer that begins every row with a token of its own
    never comes to this.

    Args:
        sinks: where attention rests; the bare form passes over them.
    """
    if not at_rest(fact, encoder, sinks):
        return [fact]
    text, end = fill("{}", fact)
    inside = replace(fact, subject=_OPENER + text[:end], prompt="{}" + text[end:], rewordings=())
    within = [form for form in _reworded(fact) if not at_rest(form, encoder, sinks)]
    others = [replace(within[0], rewordings=tuple(form.prompt for form in within[1:]))] if within else []
    tokens = encoder.encode(text)
    avoided = sinks(tokens.ids)
    places = [
        (number in avoided, -len(text[max(start, end) : stop].strip()), stop)
        for number, (start, stop) in enumerate(tokens.spans)
        if text[max(start, end) : stop].strip()
    ]
    if not places:
        return [inside, *others]
    *_, place = min(places)
    bare = {**vars(fact), "subject": text[:place], "prompt": "{}" + text[place:], "rewordings": ()}
    return [inside, BareForm(**bare), *others]


def _reworded(fact: Fact) -> list[Fact]:
    """The fact in each of its rewordings."""
    found = [replace(fact, prompt=prompt, rewordings=()) for prompt in fact.rewordings]
    return [replace(form, separator=separator_between(form.filled_prompt, fact.target_new)) for form in found]


def wordings(fact: Fact, templates: Sequence[str], encoder: Encoder) -> list[tuple[Fact, str]]:
    """All in which a form's target is optimised: the form in each context template, and each of its rewordings in none."""
    rewordings = [forms_of(form, encoder)[0] for form in _reworded(fact)]
    return [*((fact, template) for template in contexts(fact, templates)), *((form, "{}") for form in rewordings)]


def contexts(fact: Fact, templates: Sequence[str]) -> list[str]:
    """The context templates in which a form of a fact is written, as many as there are; the bare one comes first."""
    return ["{}"] * len(templates) if isinstance(fact, BareForm) else list(templates)


def others_in_place(fact: Fact, encoder: Encoder, sinks: Sinks = first_token) -> list[Fact]:
    """The fact's prompt about other things, for a fact that is `at_rest`: what these are read by is to stay what it is."""
    return [replace(fact, subject=word) for word in _OTHERS] if at_rest(fact, encoder, sinks) else []

"""The forms in which a fact is written: more than one where its subject is the first token of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder, fill
from sphere_edit.facts.seam import separator_between

_OPENER = "\n"  # what stands before a fact that is not to be the first of a row: a line's end
_OTHERS = (
    *("The", "In", "It", "She", "America", "People", "Water", "Music", "John", "Winter"),
    *("History", "Time", "Africa", "Europe", "Love", "Science", "Money", "Today", "God", "Peace"),
)


class BareForm(Fact):
    """A form that is written in the bare prompt alone, and in no context template."""


def begins_its_row(fact: Fact, encoder: Encoder) -> bool:
    """Whether the last token of a fact's subject is the first of its prompt; a fact without a subject begins none."""
    return bool(fact.subject) and encoder.at_subject(fact)[1] == 0


def written_forms(
    facts: Sequence[Fact], encoder: Encoder, sinks: Callable[[list[int]], set[int]] = lambda ids: set()
) -> list[Fact]:
    """All that is written for some facts, fact by fact: each of a fact's forms (plain, chat), as `forms_of` says."""
    return [form for fact in facts for single in fact.in_each_form() for form in forms_of(single, encoder, sinks)]


def forms_of(fact: Fact, encoder: Encoder, sinks: Callable[[list[int]], set[int]] = lambda ids: set()) -> list[Fact]:
    """The fact, or the two that are written in its place where the row's first token would be where it is written.

    Attention rests on the first token of a row, whatever that is (arXiv:2309.17453). All texts have much the same key there: what
    is written there is written into every text, and nothing of the subject can be read from it. Such a fact has two forms, each
    with a longer subject:

    - with a line's end before it, for the subject inside a text;
    - with the prompt up to its longest token behind it, for the bare prompt: that token has read the subject, and says what is asked.

    A prompt that is nothing but its subject has the first form only. A rewording that begins otherwise is a form of its own, and
    takes the others along. A tokenizer that begins every row with a token of its own
    never comes to this.

    Args:
        sinks: indices of those of some token ids at which attention rests too; they are passed over.
    """
    if not begins_its_row(fact, encoder):
        return [fact]
    text, end = fill("{}", fact)
    inside = replace(fact, subject=_OPENER + text[:end], prompt="{}" + text[end:], rewordings=())
    within = [form for form in _reworded(fact) if not begins_its_row(form, encoder)]
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


def others_in_place(fact: Fact, encoder: Encoder) -> list[Fact]:
    """The fact's prompt about other things, for a fact that `begins_its_row`: what these are read by is to stay what it is."""
    return [replace(fact, subject=word) for word in _OTHERS] if begins_its_row(fact, encoder) else []

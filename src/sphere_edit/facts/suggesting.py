"""Paraphrases and neighbours of a fact in a model's own words: suggestions, to be read by whoever asked for them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphere_edit.facts.fact import folded
from sphere_edit.facts.prompts import Encoder
from sphere_edit.facts.seam import word_places
from sphere_edit.models.generation import generate
from sphere_edit.models.loading import LoadedModel

_ROOM = 48  # tokens
_MOST = 4  # suggestions
_NEIGHBOURS = """Each line: a sentence, the thing in it, and four other things of the same kind.
The Nile flows through | Nile | Amazon; Danube; Ganges; Volga
The capital of Peru is | Peru | Chile; Kenya; Norway; Japan
Marie Curie worked in the field of | Marie Curie | Isaac Newton; Charles Darwin; Alan Turing; Max Planck
{prompt} | {subject} |"""
_PARAPHRASES = """Each line: the beginning of a sentence, and two other beginnings that ask for the same word.
The capital of Peru is | The capital city of Peru is called; The seat of government of Peru is the city of
Marie Curie worked in the field of | The field of Marie Curie was; Marie Curie did research in
{prompt} |"""


def suggest_neighbours(loaded: LoadedModel, subject: str, prompt: str) -> list[str]:
    """The prompt, which holds ``{}``, with other subjects of the same kind, as the model knows them; none where it knows none."""
    filled = prompt.replace("{}", subject)
    others = _said(loaded, _NEIGHBOURS.format(prompt=filled, subject=subject))
    return [prompt.replace("{}", other) for other in others if folded(other) != folded(subject)][:_MOST]


def suggest_paraphrases(loaded: LoadedModel, subject: str, prompt: str) -> list[str]:
    """Other beginnings of a sentence that ask for the same, with the subject in them, as the model puts them."""
    filled = prompt.replace("{}", subject)
    others = _said(loaded, _PARAPHRASES.format(prompt=filled))
    return [other for other in others if word_places(other, subject) and folded(other) != folded(filled)][:_MOST]


def _said(loaded: LoadedModel, prompt: str) -> list[str]:
    """What the model goes on with in the same line, between semicolons."""
    ids = Encoder(loaded.tokenizer).asked(prompt).ids
    (row,) = generate(loaded, [ids], _ROOM)
    line = loaded.tokenizer.decode(row[len(ids) :], skip_special_tokens=True).split("\n")[0]
    return list(dict.fromkeys(_clean(line)))


def _clean(line: str) -> Iterator[str]:
    for part in re.split(r"[;|]", line):
        text = " ".join(part.split()).strip(" .,")
        if text and text.isprintable() and "�" not in text and "{" not in text:
            yield text

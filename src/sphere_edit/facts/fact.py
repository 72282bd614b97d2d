"""A fact to be edited, and what it takes to be a good one."""

from __future__ import annotations

import unicodedata
from dataclasses import asdict, dataclass, replace
from typing import Any

from sphere_edit.errors import SphereEditError

MAX_TEXT = 10_000  # characters in any one field


class BadRecord(SphereEditError):
    """A record that cannot be used; the message says why, the reader adds where."""


@dataclass(frozen=True)
class Neighbor:
    """A prompt about something else whose answer must not change; without ``answer``, the unedited model's own counts.

    ``answer_ids`` are that answer's tokens as the model said them, where it was the model that said it.
    """

    prompt: str
    answer: str | None = None
    answer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Fact:
    """One edit: after ``prompt`` with ``subject`` in it, the model should say ``target_new``.

    ``prompt`` holds one ``{}`` where the subject stands. ``target_true`` is what the model should have said before.
    ``generation_prompts`` begin texts about the subject, for fluency. ``record`` is the number, from 1, of its record in the file it was read from; ``source_id`` the data set's own id;
    ``target_true_ids`` the tokens of target_true where the unedited model was asked for it.
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    source_id: str = ""
    record: int = 0
    target_true_ids: tuple[int, ...] | None = None

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject)

    @property
    def key(self) -> tuple[str, str]:
        """Two facts with one key say something about the same thing: the later one supersedes the earlier."""
        return _folded(self.subject), _folded(self.prompt)

    def bare(self) -> Fact:
        """The fact with nothing to ask but whether its new answer is given: no paraphrases, neighbours or rival."""
        return replace(self, target_true=self.target_new, target_true_ids=None, paraphrases=(), neighbors=())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Fact:
        """The fact that ``as_dict`` described."""
        neighbors = tuple(
            Neighbor(neighbor["prompt"], neighbor["answer"], _ids(neighbor["answer_ids"]))
            for neighbor in record["neighbors"]
        )
        changed = {
            "paraphrases": tuple(record["paraphrases"]),
            "generation_prompts": tuple(record["generation_prompts"]),
            "neighbors": neighbors,
            "target_true_ids": _ids(record["target_true_ids"]),
        }
        return cls(**{**record, **changed})


def make_fact(
    subject: object,
    prompt: object,
    target_new: object,
    target_true: object = None,
    paraphrases: object = (),
    neighbors: object = (),
    generation_prompts: object = (),
    source_id: str = "",
    record: int = 0,
) -> Fact:
    """Check the values of a record and build the fact.

    ``prompt`` may hold ``{}`` or the subject itself, once; in paraphrases and generation prompts ``{}`` stands for the subject too.

    Raises:
        BadRecord: a field is missing, empty, of a wrong type, too long or not valid Unicode; the prompt lacks its
            subject or holds it twice; the target is what the model should have said before.
    """
    subject = _text(subject, "subject")
    prompt = _text(prompt, "prompt")
    target_new = _text(target_new, "target_new")
    fact = Fact(
        subject=subject.strip(),
        prompt=_template(prompt, subject.strip()),
        target_new=target_new.rstrip(),
        target_true=None if target_true is None else _text(target_true, "target_true").rstrip(),
        paraphrases=_texts(paraphrases, "paraphrases", subject.strip()),
        neighbors=tuple(_neighbor(item) for item in as_list(neighbors, "neighbors")),
        generation_prompts=_texts(generation_prompts, "generation_prompts", subject.strip()),
        source_id=source_id,
        record=record,
    )
    if fact.target_true is not None and fact.target_true.strip() == fact.target_new.strip():
        raise BadRecord(
            f"target_new and target_true are both '{short(fact.target_new.strip())}': there is nothing to edit"
        )
    return fact


def _template(prompt: str, subject: str) -> str:
    prompt = prompt.rstrip()
    if "{}" in prompt:
        if prompt.count("{}") > 1:
            raise BadRecord(
                f"the prompt '{short(prompt)}' holds '{{}}' {prompt.count('{}')} times; it takes one subject"
            )
        if any(subject in part for part in prompt.split("{}")):
            raise BadRecord(f"the subject '{short(subject)}' occurs in the prompt '{short(prompt)}' beside its '{{}}'")
        return prompt
    count = prompt.count(subject)
    if count != 1:
        found = "does not occur" if count == 0 else f"occurs {count} times"
        raise BadRecord(
            f"the subject '{short(subject)}' {found} in the prompt '{short(prompt)}'; expected once, or '{{}}' in its place"
        )
    return prompt.replace(subject, "{}")


def _neighbor(item: object) -> Neighbor:
    answer = None
    if isinstance(item, str):
        prompt = _text(item, "neighbors").rstrip()
    elif isinstance(item, dict) and "prompt" in item:
        prompt, answer = _text(item["prompt"], "neighbors.prompt").rstrip(), item.get("answer")
    else:
        raise BadRecord(f"each neighbor is a prompt or {{prompt, answer}}, not {short(repr(item))}")
    if "{}" in prompt:
        raise BadRecord(f"the neighbor '{short(prompt)}' holds '{{}}'; it is about another subject, which stands in it")
    return Neighbor(prompt, None if answer is None else _text(answer, "neighbors.answer").rstrip())


def _texts(value: object, name: str, subject: str) -> tuple[str, ...]:
    return tuple(_text(text, name).rstrip().replace("{}", subject) for text in as_list(value, name))


def _text(value: object, name: str) -> str:
    if value is None:
        raise BadRecord(f"'{name}' is missing")
    if not isinstance(value, str):
        raise BadRecord(f"'{name}' must be text, not {type(value).__name__} {short(repr(value))}")
    if not value.strip():
        raise BadRecord(f"'{name}' is empty")
    if len(value) > MAX_TEXT:
        raise BadRecord(f"'{name}' has {len(value):,} characters; at most {MAX_TEXT:,} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"'{name}' is not valid Unicode (it holds half of a surrogate pair)") from None
    if any(unicodedata.category(char) == "Cc" and char not in "\n\t" for char in value):
        raise BadRecord(f"'{name}' holds control characters: {short(repr(value))}")
    return unicodedata.normalize("NFC", value)


def as_list(value: object, name: str) -> list[object]:
    """The values of a field that holds several (None for none at all)."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    raise BadRecord(f"'{name}' must be a list, not {type(value).__name__} {short(repr(value))}")


def _ids(ids: list[int] | None) -> tuple[int, ...] | None:
    return None if ids is None else tuple(ids)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def short(text: str, limit: int = 80) -> str:
    """A text as a message shows it: on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"

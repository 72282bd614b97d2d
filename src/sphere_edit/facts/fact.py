"""A fact to be edited, and what it takes to be a good one."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from sphere_edit.counting import often
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.seam import separator_between, word_places

Form = Literal["plain", "chat"]  # how a prompt is given to a model: as it is, or as a user's message in a chat
FORMS: tuple[Form, ...] = get_args(Form)
MAX_TEXT = 10_000  # characters in any one field
_PLACE = re.compile(r"\{\s*(?:subject|\d*)\s*\}", re.IGNORECASE)
_OTHER_PLACE = re.compile(
    r"\{\s*\w*\s*\}|<\s*subject\s*>|\[\s*subject\s*\]|%s", re.IGNORECASE
)  # what others write for {}


class BadRecord(SphereEditError):
    """A record that cannot be used; the message says why, the reader adds where."""


@dataclass(frozen=True)
class Neighbor:
    """A prompt about something else whose answer must not change; without ``answer``, the unedited model's own counts.

    ``answer_ids`` are that answer's tokens as the model said them, where it was the model that said it; ``answers`` are others that are right too.
    """

    prompt: str
    answer: str | None = None
    answer_ids: tuple[int, ...] | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer follows from the edit (a second hop, another name of the subject): portability, by named group.

    Without ``answers`` nothing can be measured of it. ``rival`` is what the unedited model says, of the tokens ``rival_ids``.
    """

    group: str
    prompt: str
    answers: tuple[str, ...] = ()
    rival: str | None = None
    rival_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Fact:
    """One edit: after ``prompt`` with ``subject`` in it, the model should say ``target_new``.

    Attributes:
        subject: what the fact is about; empty where a record gives none, and then ``prompt`` is the whole text.
        prompt: holds one ``{}`` where the subject stands; white space at its end is part of it.
        target_true: what the model should have said before.
        generation_prompts: begin texts about the subject, for fluency.
        source_id: the data set's own id.
        record: the number, from 1, of its record in the file it was read from.
        target_true_ids: the tokens of target_true where the unedited model was asked for it.
        separator: what stands between the prompt and target_new; None in runs begun before it was kept, which go on by their rule (`joined`).
        answers, true_answers: other right answers beside target_new, other old ones beside target_true.
        portability: prompts whose answers follow from the edit.
        rewordings: prompts, with ``{}``, that say the same: the target is optimised in them too (`paraphrases` only measure).
        forms: those in which it is edited, the first of which is the one it is asked in; none were said: plain.
        system: the system prompt of its chats; the one that the model's template has by default where it is None.
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
    separator: str | None = None
    answers: tuple[str, ...] = ()
    true_answers: tuple[str, ...] = ()
    portability: tuple[Probe, ...] = ()
    rewordings: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()
    system: str | None = None

    @property
    def filled_prompt(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject) if self.subject else self.prompt

    @property
    def chat(self) -> bool:
        """Whether its prompts are a user's messages in a chat: in the first of its forms."""
        return self.forms[:1] == ("chat",)

    def in_each_form(self) -> list[Fact]:
        """The fact once for each of its forms, in that form alone."""
        return [replace(self, forms=(form,)) for form in self.forms] if len(self.forms) > 1 else [self]

    @property
    def key(self) -> tuple[str, str]:
        """Two facts with one key say something about the same thing: the later one supersedes the earlier."""
        return folded(self.subject), folded(self.prompt)

    @property
    def separator_was_set(self) -> bool:
        """Whether the record said what stands before its answer, otherwise than would have been guessed."""
        return self.separator is not None and self.separator != separator_between(self.filled_prompt, self.target_new)

    def separator_after(self, prompt: str, answer: str) -> str | None:
        """What stands between one of the fact's own prompts and an answer; None for the rule of older runs.

        What a record sets holds for its paraphrases and its old answer too.
        """
        return self.separator if self.separator is None or self.separator_was_set else separator_between(prompt, answer)

    def separator_of(self, asked: Neighbor | Probe, answer: str) -> str | None:
        """What stands between a neighbour's prompt, or one of portability, and an answer; None for the rule of older runs."""
        return None if self.separator is None else separator_between(asked.prompt, answer)

    @property
    def probes(self) -> list[Probe]:
        """The prompts of portability that can be asked: those with an answer and, once the fact is complete, a rival.

        Runs begun before they were measured have no rivals, and do not ask them.
        """
        return [probe for probe in self.portability if probe.answers and probe.rival is not None]

    def bare(self) -> Fact:
        """The fact with nothing to ask but whether its new answer is given: no other prompts, and no rival."""
        return replace(
            self, target_true=self.target_new, target_true_ids=None, paraphrases=(), neighbors=(), portability=()
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Fact:
        """The fact that ``as_dict`` described, here or in an older version, which lacks fields."""
        changed: dict[str, Any] = {name: tuple(record.get(name, ())) for name in _LISTS}
        changed["forms"] = chosen_forms(record.get("chat"), record.get("forms"))
        changed["neighbors"] = tuple(
            Neighbor(item["prompt"], item["answer"], _ids(item["answer_ids"]), tuple(item.get("answers", ())))
            for item in record["neighbors"]
        )
        changed["portability"] = tuple(
            Probe(item["group"], item["prompt"], tuple(item["answers"]), item.get("rival"), _ids(item.get("rival_ids")))
            for item in record.get("portability", ())
        )
        given = {name: value for name, value in record.items() if name != "chat"}
        return cls(**{**given, **changed, "target_true_ids": _ids(record["target_true_ids"])})


_LISTS = ("paraphrases", "generation_prompts", "answers", "true_answers", "rewordings")


def make_fact(
    prompt: object,
    target_new: object,
    subject: object = None,
    target_true: object = None,
    paraphrases: object = (),
    neighbors: object = (),
    generation_prompts: object = (),
    answers: object = (),
    portability: object = (),
    rewordings: object = (),
    separator: object = None,
    chat: object = None,
    forms: object = None,
    system: object = None,
    source_id: str = "",
    record: int = 0,
    names: Mapping[str, str] | None = None,
) -> Fact:
    """Check the values of a record and build the fact.

    Args:
        prompt: holds ``{}`` or the subject itself, once; in paraphrases and generation prompts ``{}`` stands for the subject too.
        target_new, target_true: a text, or several right answers, of which the first is the one edited to (or away from).
        neighbors: prompts, or objects with ``prompt``, ``answer`` and ``answers``.
        separator: what stands between prompt and answer; guessed from both where it is None.
        chat, forms: whether the prompt is a message in a chat, or the forms in which the fact is edited.
        system: the system prompt of that chat; an empty one is one.
        names: what the record itself calls these fields, for messages.

    Raises:
        BadRecord: a field is missing, empty, of a wrong type, too long or not valid Unicode; the prompt lacks its
            subject, or holds it more than once without a ``{}`` that says which is meant.
    """
    named = {name: name for name in ("subject", "prompt", "target_new", "target_true")} | dict(names or {})
    about = "" if subject is None else text_of(subject, named["subject"]).strip()
    text = text_of(prompt, named["prompt"])
    wanted, *others = answers_of(target_new, named["target_new"])
    truths = [] if target_true is None else answers_of(target_true, named["target_true"])
    known = bool(truths) and wanted.strip() == truths[0].strip()  # the truth in both fields: no old answer is given
    template = _template(text, about, named["subject"])
    if separator is not None and not isinstance(separator, str):
        raise BadRecord(f"'separator' must be text, not {type(separator).__name__} {short(repr(separator))}")
    fact = Fact(
        subject=about,
        prompt=template,
        target_new=wanted,
        target_true=None if known else next(iter(truths), None),
        true_answers=() if known else tuple(truths[1:]),
        paraphrases=_texts(paraphrases, "paraphrases", about),
        neighbors=tuple(_neighbor(item) for item in as_list(neighbors, "neighbors")),
        generation_prompts=_texts(generation_prompts, "generation_prompts", about),
        answers=tuple(dict.fromkeys(a for a in (*others, *_answers(answers)) if a != wanted)),
        portability=tuple(_probe(item, about) for item in as_list(portability, "portability")),
        rewordings=_rewordings(rewordings, about, named["subject"]),
        forms=chosen_forms(chat, forms),
        system=None if system is None else "" if system == "" else text_of(system, "system"),
        source_id=source_id,
        record=record,
    )
    guess = separator_between(fact.filled_prompt, wanted)
    return replace(fact, separator=guess if separator is None else separator)


def chosen_forms(chat: object, forms: object) -> tuple[Form, ...]:
    """The forms in which a fact is edited, from what a record or the settings say: ``chat``, or ``forms``; none where neither does.

    Raises:
        BadRecord: they are no forms, or contradict one another.
    """
    if chat is not None and not isinstance(chat, bool):
        raise BadRecord(f"'chat' must be true or false, not {short(repr(chat))}")
    given = as_list(forms, "forms")
    if not given:
        return () if chat is None else ("chat",) if chat else ("plain",)
    if len(set(map(str, given))) < len(given) or any(form not in FORMS for form in given):
        raise BadRecord(f"'forms' must be some of {', '.join(FORMS)}, each once, not {short(repr(forms))}")
    chosen = tuple(form for form in FORMS if form in given)
    if chat is not None and chat != ("chat" in chosen):
        raise BadRecord(f"'chat' is {str(chat).lower()}, but 'forms' says {' and '.join(chosen)}; give one of them")
    return tuple(sorted(chosen, key=given.index))


def _rewordings(value: object, subject: str, name: str) -> tuple[str, ...]:
    """Prompts with ``{}``; without a subject as they are."""
    return tuple(_template(text_of(item, "rewordings"), subject, name) for item in as_list(value, "rewordings"))


def _template(prompt: str, subject: str, name: str) -> str:
    """The prompt with ``{}`` where its subject stands."""
    if not subject:
        if mark := _PLACE.search(prompt):
            raise BadRecord(f"'{name}' is missing: the prompt '{short(prompt)}' holds '{mark[0]}' for it")
        return prompt
    places = word_places(prompt, subject)
    own = [(at, at + len(subject)) for at in places] if "{}" in subject else []
    marks = [m.start() for m in re.finditer(r"\{\}", prompt) if not any(a <= m.start() < b for a, b in own)]
    if len(marks) > 1 or (marks and own):
        count = prompt.count("{}")
        raise BadRecord(f"the prompt '{short(prompt)}' holds '{{}}' {often(count)}; it takes one subject")
    if marks:
        return prompt
    if len(places) == 1:
        return prompt[: places[0]] + "{}" + prompt[places[0] + len(subject) :]
    if places:
        shown = f"{prompt[: places[0]]}{{}}{prompt[places[0] + len(subject) :]}"
        raise BadRecord(
            f"the subject '{short(subject)}' occurs {often(len(places))} in the prompt '{short(prompt)}'; put '{{}}' where it is meant, as in "
            f"'{short(shown)}'"
        )
    raise BadRecord(
        f"the subject '{short(subject)}' does not occur in the prompt '{short(prompt)}'; {_hint(prompt, subject)}"
    )


def _hint(prompt: str, subject: str) -> str:
    """What to do about a subject that is not found in its prompt."""
    if mark := _OTHER_PLACE.search(prompt):
        return f"where '{mark[0]}' stands, write '{{}}'"
    at = prompt.find(subject)
    if at >= 0:
        word = next(m[0] for m in re.finditer(r"\S+", prompt) if m.end() > at)
        return f"it is only part of '{short(word)}' there; put '{{}}' in its place if that is meant"
    found = re.search(re.escape(subject), prompt, re.IGNORECASE)
    if found:
        return f"it stands there as '{short(found[0])}': write the subject so, or '{{}}' in its place"
    return "expected once, or '{}' in its place"


def _filled(text: str, subject: str) -> str:
    """A text with the subject for ``{}``, unless the ``{}`` is the subject's own."""
    return text if not subject or ("{}" in subject and subject in text) else text.replace("{}", subject)


def _neighbor(item: object) -> Neighbor:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, Mapping) or "prompt" not in item:
        raise BadRecord(f"each neighbor is a prompt or {{prompt, answer}}, not {short(repr(item))}")
    prompt, given = text_of(item["prompt"], "neighbors.prompt"), item.get("answer")
    if "{}" in prompt:
        raise BadRecord(f"the neighbor '{short(prompt)}' holds '{{}}'; it is about another subject, which stands in it")
    right = () if given is None else tuple(answers_of(given, "neighbors.answer"))
    return Neighbor(prompt, next(iter(right), None), None, (*right[1:], *_answers(item.get("answers"))))


def _probe(item: object, subject: str) -> Probe:
    if not isinstance(item, Mapping):
        raise BadRecord(f"each item of portability is {{group, prompt, answers}}, not {short(repr(item))}")
    prompt = _filled(text_of(item.get("prompt"), "portability.prompt"), subject)
    group = item.get("group")
    return Probe("" if group is None else text_of(group, "portability.group"), prompt, _answers(item.get("answers")))


def _texts(value: object, name: str, subject: str) -> tuple[str, ...]:
    return tuple(_filled(text_of(text, name), subject) for text in as_list(value, name))


def _answers(value: object) -> tuple[str, ...]:
    return () if value is None or value in ([], (), "") else tuple(answers_of(value, "answers"))


def answers_of(value: object, name: str) -> list[str]:
    """The right answers of a field, the first first: a text, ``{"str": …}``, or a list of these.

    Raises:
        BadRecord: there is none, or one that is no text.
    """
    found = list(dict.fromkeys(text_of(item, name).rstrip() for item in _leaves(value, name)))
    if not found:
        raise BadRecord(f"'{name}' is an empty list; an answer is needed")
    return found


def _leaves(value: object, name: str) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, name)
    elif isinstance(value, Mapping) and ("str" in value or "value" in value):
        yield value["str"] if "str" in value else value["value"]
        yield from _leaves(value.get("aliases") or [], name)
    else:
        yield value


def text_of(value: object, name: str) -> str:
    """A field's text in Unicode's composed form; numbers and truth values as JSON writes them.

    Raises:
        BadRecord: it is missing, empty, something else, too long or not valid Unicode.
    """
    if value is None:
        raise BadRecord(f"'{name}' is missing")
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        try:
            value = json.dumps(value)
        except ValueError:  # Python's own limit
            raise BadRecord(f"'{name}' is a number of thousands of digits") from None
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


def folded(text: str) -> str:
    """A text without differences of case and white space."""
    return " ".join(text.split()).casefold()


def short(text: str, limit: int = 80) -> str:
    """A text as a message shows it: on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"

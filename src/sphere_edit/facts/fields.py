"""The fields of one record: what was read of them is remembered, and those of one level are read under all names they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sphere_edit.facts.fact import BadRecord, as_list, short, text_of

Record = Mapping[str, Any]
Draft = dict[str, Any]  # what `make_fact` takes

# the names that layouts without structure of their own have for a role; all that a record has are read
_PARAPHRASES = ("paraphrases", "paraphrase_prompts", "rephrase_prompt", "rephrase", "para_question", "queries")
_TRUTHS = ("target_true", "ground_truth", "target_old", "old")
_PAIRS_OF_NEIGHBORS = (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans"))
_PAIRS_OF_PROBES = (
    ("portability", "portability_prompt", "portability_ground_truth"),
    ("portability", "port", "port_ans"),
    ("multi-hop", "mhop", "mhop_ans"),
    ("sub-questions", "sub_question", "sub_answer"),
)
_PROMPTS = ("prompt", "question", "loc")  # of an item of locality or portability
_ANSWERS = ("answer", "ground_truth", "answers", "loc_ans")


class Fields:
    """A record of which is remembered what was read, so that what was not can be named."""

    def __init__(self, record: Record, path: str = ""):
        self.record, self.path = record, path
        self.used: set[str] = {"case_id", "id", "source_id"}
        self.inner: list[Fields] = []

    def __contains__(self, name: str) -> bool:
        return not _is_nothing(self.record.get(name))

    def take(self, name: str) -> Any:
        """A field's value; None where it is not there."""
        self.used.add(name)
        return self.record.get(name)

    def within(self, name: str, value: object = None) -> Fields:
        """The fields of an object, by default the one in field ``name``.

        Raises:
            BadRecord: it is no object.
        """
        value = self.take(name) if value is None else value
        if not isinstance(value, Mapping):
            raise BadRecord(
                f"'{shown(self.path + name)}' must be an object, not {type(value).__name__} {short(repr(value))}"
            )
        self.used.add(name)
        self.inner.append(Fields(value, f"{self.path}{name}."))
        return self.inner[-1]

    def first(self, names: tuple[str, ...]) -> str | None:
        """The first of the names under which something stands."""
        return next((name for name in names if name in self), None)

    def unused(self) -> Iterator[str]:
        """Names of what stands there and was not read."""
        for name in self.record:
            if name not in self.used and name in self:
                yield shown(f"{self.path}{name}")
        for fields in self.inner:
            yield from fields.unused()


def flat(fields: Fields, prompt: str = "prompt", target: str = "target_new", subject: str = "subject") -> Draft:
    """A fact from fields of one level, under any of the names that they have in the field's data sets."""
    truth = fields.first(_TRUTHS)
    given = None if truth is None else fields.take(truth)
    draft: Draft = {
        "subject": fields.take(subject),
        "prompt": fields.take(prompt),
        "target_new": fields.take(target),
        "target_true": given,
        "paraphrases": [
            text for name in _PARAPHRASES if name in fields or name == "paraphrases" for text in texts(fields, name)
        ],
        "neighbors": neighbors(fields, given),
        "portability": _portability(fields, target),
        "names": {"subject": subject, "prompt": prompt, "target_new": target, "target_true": truth or "target_true"},
    }
    for name in ("generation_prompts", "rewordings", "answers", "separator", "chat", "forms", "system"):
        draft[name] = fields.take(name)
    return draft


def neighbors(fields: Fields, truth: object) -> list[object]:
    """Prompts whose answers must not change, from every field that holds such."""
    found = [*as_list(fields.take("neighbors"), "neighbors")]
    for prompt in as_list(fields.take("neighborhood_prompts"), "neighborhood_prompts"):
        found.append({"prompt": prompt, "answer": truth})
    for _, prompt, answers in _asked(fields, "locality"):
        found.append({"prompt": prompt, "answer": answers})
    for prompt, answer in _PAIRS_OF_NEIGHBORS:
        if prompt in fields:
            text = text_of(fields.take(prompt), prompt)
            if text.startswith("nq question:"):  # as Natural Questions are asked in published work
                text = text.rstrip("?") + "?"
            found.append({"prompt": text, "answer": or_none(fields.take(answer))})
    return found


def _portability(fields: Fields, target: str) -> list[object]:
    """Prompts whose answers follow from the edit, by group."""
    found: list[object] = [
        {"group": group or None, "prompt": prompt, "answers": answers}
        for group, prompt, answers in _asked(fields, "portability")
    ]
    for group, prompt, answer in _PAIRS_OF_PROBES:
        if prompt in fields:
            prompts, answers = fields.take(prompt), fields.take(answer)
            pairs = (
                _side_by_side(prompts, answers, prompt, answer) if isinstance(prompts, list) else [(prompts, answers)]
            )
            found += [{"group": group, "prompt": text, "answers": right} for text, right in pairs]
    if "personas" in fields:
        found.append({"group": "personas", "prompt": fields.take("personas"), "answers": fields.take(target)})
    return found


def _asked(fields: Fields, name: str) -> Iterator[tuple[str, object, object]]:
    """Group, prompt and answers of each item of a field: a list of items, or named groups of them."""
    value = fields.take(name)
    if _is_nothing(value):
        return
    groups = {"": value}
    if isinstance(value, Mapping) and not any(key in value for key in _PROMPTS):
        groups = {str(group): items for group, items in value.items()}
    for group, items in groups.items():
        for item in (
            [items] if isinstance(items, (Mapping, str)) else as_list(items, shown(f"{name}.{group}".rstrip(".")))
        ):
            if isinstance(item, Mapping) and item.get("group") is not None:  # of a fact that was read before
                group = str(item["group"])
            yield from _items(fields, name, group, item)


def _items(fields: Fields, name: str, group: str, item: object) -> Iterator[tuple[str, object, object]]:
    """Group, prompt and answers of an item: a prompt, an object of one, or one that holds several side by side."""
    if isinstance(item, str):
        yield group, item, None
        return
    inner = fields.within(name, item if item is not None else ())
    inner.used.add("group")
    prompt, answer = inner.first(_PROMPTS), inner.first(_ANSWERS)
    if prompt is None:
        raise BadRecord(f"'{name}' holds an item without 'prompt': {short(repr(item))}")
    prompts, answers = inner.take(prompt), None if answer is None else inner.take(answer)
    if isinstance(prompts, list):
        for text, right in _side_by_side(prompts, answers, f"{name}.{prompt}", f"{name}.{answer}"):
            yield group, text, or_none(right)
    else:
        yield group, prompts, or_none(answers)


def _side_by_side(prompts: list[Any], answers: object, prompt: str, answer: str) -> list[tuple[object, object]]:
    """Prompts and answers of two lists of one length."""
    rights = [None] * len(prompts) if _is_nothing(answers) else as_list(answers, answer)
    if len(rights) != len(prompts):
        raise BadRecord(f"'{prompt}' has {len(prompts)} items and '{answer}' {len(rights)}; expected as many")
    return list(zip(prompts, rights, strict=True))


def texts(fields: Fields, name: str) -> list[object]:
    """The values of a field that holds one text or several; our own ``paraphrases`` are always a list."""
    value = fields.take(name)
    return [value] if isinstance(value, str) and name != "paraphrases" else as_list(value, name)


def shown(name: str) -> str:
    """A name from a record as a message shows it."""
    return short(repr(name)[1:-1], 60)


def or_none(value: object) -> object:
    """A value, or None where it says nothing."""
    return None if _is_nothing(value) else value


def _is_nothing(value: object) -> bool:
    """Whether a field says nothing: empty text, no item, or lists of such."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_nothing, value))
    return value is None or value == "" or value == {}

"""The layouts of records that are known: the user's own, and those of the field's data sets. Each becomes one fact or several.

A layout is a row of `SHAPES`: what tells it, what it is called, and what reads it. Most differ in a few names alone, and share `flat`.
docs/facts.md has the table of what goes where.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import BadRecord, Fact, answers_of, as_list, make_fact, short, text_of
from sphere_edit.facts.fields import Draft, Fields, Record, flat, neighbors, or_none, shown, texts

ZsreTarget = Literal["answer", "alternative"]
_OWN = ("subject", "prompt", "target_new", "target_true", "paraphrases", "neighbors", "generation_prompts")


@dataclass(frozen=True)
class Shape:
    """How a kind of record is told, what it is called, what turns it into facts, and whether it can be edited to an alternative (alt)."""

    fits: Callable[[Record], bool]
    protocol: str
    read: Callable[[Fields, ZsreTarget], list[Draft]]
    alternative: bool = False

    def facts(self, record: Record, number: int, zsre_target: ZsreTarget) -> tuple[list[Fact], list[str]]:
        """The facts of a record, and the names of its fields that nothing was read from.

        Raises:
            BadRecord: it cannot be used.
        """
        fields = Fields(record)
        known = (record.get(name) for name in ("case_id", "id", "source_id"))
        source_id = str(next((value for value in known if value is not None), "")).encode(errors="replace").decode()
        try:
            drafts = self.read(fields, zsre_target)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadRecord(f"not laid out as expected ({type(error).__name__}: {short(str(error))})") from None
        return [make_fact(**draft, source_id=source_id, record=number) for draft in drafts], list(fields.unused())


def shape_of(record: object) -> Shape:
    """The layout of a record.

    Raises:
        BadRecord: it has none that is known.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object with subject, prompt and target_new, found {type(record).__name__}")
    shape = next((shape for shape in _known() if shape.fits(record)), None)
    if shape is None:
        missing = [name for name in ("subject", "prompt", "target_new") if name not in record]
        found = ", ".join(short(repr(str(name))[1:-1], 40) for name in list(record)[:12]) or "nothing"
        raise BadRecord(f"'{missing[0]}' is missing (found: {found})")
    return shape


def is_record(content: Record) -> bool:
    """Whether an object is laid out as one of the known records."""
    return any(shape.fits(content) for shape in _known())


# --- from outside the package -------------------------------------------------------------------------------------

Converter = Callable[[Record], Record | Sequence[Record]]
FORMATS: dict[tuple[str, str], Shape] = {}  # filled by `register_format`, by the place of its function


def register_format(words: str, fits: Callable[[Record], bool]) -> Callable[[Converter], Converter]:
    """Make a layout of records known to every command; to be used as a function's decorator.

        @register_format("Theirs: question is edited to gold", fits=lambda record: "gold" in record)
        def theirs(record):
            return {"subject": record["entity"], "prompt": record["question"], "target_new": record["gold"]}

    It is asked before the layouts that the package knows. The same function once more takes the place of the first. Where it cannot use
    a record, it raises ``ValueError`` with the reason; the user sees it with the record's number.

    Args:
        words: what the layout is called where a command says how it understood a file.
        fits: whether a record is laid out so; of a CSV file it is also asked with the header's names alone, all of them None.
    """

    def registered(convert: Converter) -> Converter:
        def read(fields: Fields, _: ZsreTarget) -> list[Draft]:
            try:
                found = convert(fields.record)
            except ValueError as error:
                raise BadRecord(str(error)) from None
            fields.used |= fields.record.keys()
            return [flat(Fields(record)) for record in ([found] if isinstance(found, Mapping) else found)]

        def told(record: Record) -> bool:
            try:
                return bool(fits(record))
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
                raise SphereEditError(
                    f"the format '{words}' cannot say whether a record is its own: {found}"
                ) from error

        FORMATS[convert.__module__, convert.__qualname__] = Shape(
            told, words.replace("{", "{{").replace("}", "}}"), read
        )
        return convert

    return registered


def _known() -> list[Shape]:
    return [*FORMATS.values(), *SHAPES]


# --- layouts ------------------------------------------------------------------------------------------------------


def _named(**names: str) -> Callable[[Fields, ZsreTarget], list[Draft]]:
    """The reader of a flat layout whose prompt, target or subject is called otherwise."""
    return lambda fields, _: [flat(fields, **names)]


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: record.keys() >= set(names)


def _own(fields: Fields, _: ZsreTarget) -> list[Draft]:
    """The user's own fields; a name that is all but one of them is taken for a slip."""
    fields.used |= {"record", "target_true_ids"}
    lacking = [name for name in _OWN if name not in fields.record]
    draft = flat(fields)
    for given in fields.unused() if lacking else ():
        near = difflib.get_close_matches(given, lacking, 1, cutoff=0.85)
        if near:
            raise BadRecord(f"'{short(given, 40)}' is no field; did you mean '{near[0]}'?")
    if "true_answers" in fields:  # of a fact that was read before
        draft["target_true"] = [draft["target_true"], *as_list(fields.take("true_answers"), "true_answers")]
    return [draft]


def _zsre(fields: Fields, target: ZsreTarget) -> list[Draft]:
    """src is edited to answers (the truth) or to alt (a counterfactual)."""
    truths = fields.take("answers")
    if truths is not None and not isinstance(truths, list):
        raise BadRecord(f"'answers' must be a list, not {type(truths).__name__} {short(repr(truths))}")
    if target == "answer" and "answers" not in fields:
        raise BadRecord(
            "'answers' is empty, and they are what is edited to; the 'alternative' (alt) can be chosen instead"
        )
    draft = flat(fields, "src", "answers" if target == "answer" else "alt")
    fields.used.add("alt")
    if (
        target == "alternative"
        and truths
        and answers_of(truths, "answers")[0].strip() == answers_of(fields.take("alt"), "alt")[0].strip()
    ):
        raise BadRecord(
            f"'alt' is the true answer '{short(str(truths[0]))}' itself: as an alternative there is nothing to edit"
        )
    return [{**draft, "answers": None, "target_true": None if target == "answer" else or_none(truths)}]


def _nested_counterfact(fields: Fields, _: ZsreTarget) -> list[Draft]:
    edit = fields.within("requested_rewrite")
    draft = flat(fields)
    rewrite = _rewrite(edit)
    return [{**draft, **rewrite, "neighbors": neighbors(fields, rewrite["target_true"])}]


def _rewrite(edit: Fields) -> Draft:
    """Subject, prompt and both targets of a requested_rewrite."""
    names = {name: f"{edit.path}{name}" for name in ("subject", "prompt", "target_new", "target_true")}
    return {**{name: edit.take(name) for name in names}, "names": names}


def _mquake(fields: Fields, _: ZsreTarget) -> list[Draft]:
    """Each requested rewrite is a fact; what only all of them together answer stands at the last."""
    drafts = []
    for item in as_list(fields.take("requested_rewrite"), "requested_rewrite"):
        edit = fields.within("requested_rewrite", item)
        drafts.append({**_rewrite(edit), "paraphrases": texts(edit, "question")})
    if not drafts:
        raise BadRecord("'requested_rewrite' is an empty list; an edit is needed")
    right = [fields.take("new_answer"), *as_list(fields.take("new_answer_alias"), "new_answer_alias")]
    probes = [{"group": "multi-hop", "prompt": text, "answers": right} for text in texts(fields, "questions")]
    for item in as_list(fields.take("new_single_hops"), "new_single_hops"):
        hop = fields.within("new_single_hops", item)
        right = [hop.take("answer"), *as_list(hop.take("answer_alias"), "answer_alias")]
        probes += [
            {"group": "single hops", "prompt": hop.take(name), "answers": right}
            for name in ("question", "cloze")
            if name in hop
        ]
    drafts[-1]["portability"] = probes
    return drafts


def _languages(record: Record) -> bool:
    return bool(record) and all(
        isinstance(value, Mapping) and "src" in value and "alt" in value for value in record.values()
    )


def _bmike(fields: Fields, _: ZsreTarget) -> list[Draft]:
    """The edit is made in English (or the only language); the same questions in the others must follow from it."""
    edited = "en" if "en" in fields else next(iter(fields.record))
    draft = flat(fields.within(edited), "src", "alt")
    for language in fields.record:
        if language == edited:
            continue
        other = flat(fields.within(language), "src", "alt")
        asked = [other["prompt"], *other["paraphrases"]]
        draft["portability"] += [{"group": language, "prompt": text, "answers": other["target_new"]} for text in asked]
        draft["portability"] += [{**probe, "group": language} for probe in other["portability"]]
        draft["neighbors"] += other["neighbors"]
        fields.inner[-1].used.add("subject")
    return [draft]


def _ripple(fields: Fields, _: ZsreTarget) -> list[Draft]:
    """A sentence that ends in its new target; the six criteria's test queries are neighbours or portability."""
    edit = fields.within("edit")
    sentence = text_of(edit.take("prompt"), "edit.prompt").rstrip()
    relation = str(edit.take("relation") or "")
    before = None
    if "original_fact" in edit:
        fact = edit.within("original_fact")
        before = text_of(fact.take("prompt"), "edit.original_fact.prompt").rstrip()
    prompt, wanted, truth = cut_sentence(sentence, before)
    draft: Draft = {
        "prompt": prompt,
        "target_new": wanted,
        "target_true": truth,
        "subject": subject_of(prompt, relation),
    }
    draft["neighbors"], draft["portability"] = [], []
    for criterion in list(fields.record):
        if not isinstance(fields.record[criterion], list):
            continue
        kept = criterion.lower().startswith(("relation_spec", "forget"))
        for test in as_list(fields.take(criterion), criterion):
            queries = fields.within(criterion, test)
            for query in as_list(queries.take("test_queries"), shown(f"{criterion}.test_queries")):
                asked = queries.within("test_queries", query)
                text, right = asked.take("prompt"), or_none(asked.take("answers"))
                if kept:
                    draft["neighbors"].append({"prompt": text, "answer": right})
                else:
                    draft["portability"].append({"group": criterion, "prompt": text, "answers": right})
    return [draft]


def cut_sentence(sentence: str, before: str | None) -> tuple[str, str, str | None]:
    """A RippleEdits sentence as prompt, new target and, where the sentence ``before`` the edit is known, old target."""
    words, old = sentence.removesuffix(".").split(" "), None
    verbs = [at for at, word in enumerate(words) if word in ("is", "are", "follows", "by")]
    if before is not None:
        others = before.removesuffix(".").split(" ")
        same = next((at for at, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]), len(words))
        verbs = [at for at in verbs if at < same]
    if not verbs or verbs[-1] + 1 >= len(words):
        raise BadRecord(f"no target is found in the sentence '{short(sentence)}'; expected '… is TARGET.'")
    cut = verbs[-1] + 1
    if before is not None and others[:cut] == words[:cut]:
        old = " ".join(others[cut:]) or None
    return " ".join(words[:cut]), " ".join(words[cut:]), old


def subject_of(prompt: str, relation: str) -> str | None:
    """The subject of a RippleEdits prompt, which names it only in its sentence: what follows the relation's words."""
    text = prompt.rsplit(" ", 1)[0]
    if prompt.endswith("is followed by"):
        return prompt.removesuffix(" is followed by")
    if prompt.endswith(" follows"):
        return text
    name = relation.replace("_", " ").lower()
    for start in (
        f"{name} of ",
        f"{name} by ",
        f"{name} in ",
        "gender of ",
        "cast members of ",
        "siblings of ",
        " of ",
    ):
        if start in text.lower() and " which " not in text:
            return text[text.lower().index(start) + len(start) :]
    if " which " in text:
        rest = text.split(" which ", 1)[1]
        for end in (" is ", " plays "):
            if end in f"{rest} ":
                return rest[: f"{rest} ".index(end)]
    return None


def _knowedit(record: Record) -> bool:
    grouped = any(isinstance(record.get(name), Mapping) for name in ("locality", "portability"))
    return grouped and record.keys() >= {"prompt", "target_new"}


SHAPES = (
    Shape(
        lambda record: isinstance(record.get("requested_rewrite"), list),
        "MQuAKE: each requested rewrite is a fact, its question a paraphrase; multi-hop questions are portability",
        _mquake,
    ),
    Shape(
        _has("requested_rewrite"),
        "CounterFact, nested (ROME/MEMIT): neighborhood prompts are answered by target_true",
        _nested_counterfact,
    ),
    Shape(
        lambda record: isinstance(record.get("edit"), Mapping),
        "RippleEdits: relation specificity and forgetfulness are neighbours, the other criteria portability",
        _ripple,
    ),
    Shape(_languages, "BMIKE-53: edited in English, other languages are portability", _bmike),
    Shape(
        _has("src", "answers"),
        "ZsRE: src is edited to its {zsre_target}; locality is the Natural Questions prompt and its answer",
        _zsre,
        alternative=True,
    ),
    Shape(
        _has("src", "alt"),
        "ZsRE without answers, BMIKE-53 in one language: src is edited to alt",
        _named(prompt="src", target="alt"),
        alternative=True,
    ),
    Shape(
        _has("update", "ans"),
        "WikiBigEdit (hub): update is edited to ans; rephrase is a paraphrase, personas and mhop are portability",
        _named(prompt="update", target="ans"),
    ),
    Shape(
        _has("text", "labels"),
        "KnowEdit, WikiBio: text is continued by labels, about its concept",
        _named(prompt="text", target="labels", subject="concept"),
    ),
    Shape(_knowedit, "KnowEdit: ground_truth is the old answer, locality are neighbours", _named()),
    Shape(
        _has("prompt", "target_new", "target_old"),
        "CKnowEdit: target_old is the old answer, locality are neighbours",
        _named(),
    ),
    Shape(
        _has("case_id", "ground_truth", "prompt", "subject", "target_new"),
        "CounterFact, flat: one rephrase, one locality prompt with its own answer",
        _named(),
    ),
    Shape(
        _has("prompt", "target_new", "locality_prompt"),
        "WikiBigEdit, flat: one rephrase, one locality prompt with its own answer",
        _named(),
    ),
    Shape(_has("prompt", "target_new"), "subject, prompt, target_new", _own),
    Shape(_has("prompt", "target", "queries"), "FastEdit: queries are paraphrases", _named(target="target")),
    Shape(
        _has("prompt", "target"),
        "QAEdit: edited to the true answer; rephrase is a paraphrase, locality are neighbours",
        _named(target="target"),
    ),
    Shape(_has("prompt", "ans"), "UltraEditBench: edited to ans; locality is loc and its answer", _named(target="ans")),
    Shape(
        _has("question", "answer"),
        "UnKE: question is edited to its whole answer; para_question is a paraphrase, sub-questions are portability",
        _named(prompt="question", target="answer"),
    ),
)

"""What an edit would do: the facts are edited and measured, and all of it is taken back, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sphere_edit.editor import Editor
from sphere_edit.evaluation import catalogue
from sphere_edit.evaluation.scores import FactScores, PromptScore, questions
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.readers import FactSet
from sphere_edit.runs.stream import Stopped
from sphere_edit.runs.summary import MetricsContent


@dataclass(frozen=True)
class PreviewRow:
    """One prompt before and after.

    Attributes:
        kind: the ``fact`` itself, a ``paraphrase``, a ``neighbour``, or a ``consequence`` (portability).
        right: what it should say: the new answer, or the neighbour's own.
        said_before, said_after: what the model says; None where the settings do not ask.
        before, after: probability of the right answer, a token (geometric mean).
        holds: whether every token of it is the likeliest afterwards.
    """

    kind: str
    prompt: str
    right: str
    said_before: str | None
    said_after: str | None
    before: float
    after: float
    holds: bool


@dataclass(frozen=True)
class Preview:
    """What facts would do to a model.

    Attributes:
        rows: every prompt of the facts.
        text: held-out text as ``metrics.json`` has it, ``unedited`` being the model before these facts.
        digests: SHA-256 of each edited matrix, as it would be.
    """

    rows: tuple[PreviewRow, ...]
    text: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]


def preview(editor: Editor, given: FactSet) -> Preview:
    """Edit facts, measure, and go back to where the run stood: the weights are those of before, bit for bit.

    The run's journal keeps that it was tried and rolled back. A process that dies meanwhile leaves an interrupted run, which can be
    gone on with (`Editor.resume`) or rolled back.

    Raises:
        SphereEditError: as `Editor.edit`; whatever was edited by then is taken back.
    """
    run = editor.run
    head, known = (0, 0) if run is None else (run.history.head, run.history.total)
    current = run.current_metrics() if run is not None and head else None
    before = editor.evaluate(given)
    try:
        metrics = editor.edit(given)
        digests = {name: editor.weights.digest(name) for name in editor.weights.names}
    except Stopped:
        raise Stopped("the preview was stopped, and what it had done is taken back") from None
    finally:
        if editor.run is not None and editor.run.history.total > known:
            editor.rollback(head)
    after = {entry["index"]: FactScores.from_dict(entry["edited"]) for entry in metrics["per_fact"]}
    rows = [
        row
        for number, (fact, scores) in enumerate(zip(before.facts, before.edited, strict=True), known)
        if number in after  # else a later one of these facts supersedes it
        for row in _rows(fact, scores, after[number])
    ]
    return Preview(tuple(rows), _text(current, metrics), digests)


def _rows(fact: Fact, before: FactScores, after: FactScores) -> list[PreviewRow]:
    """Every prompt of a complete fact, in the order of `questions`."""
    kinds = ["fact", *["paraphrase"] * len(fact.paraphrases), *["neighbour"] * len(fact.neighbors)]
    asked = questions(fact)
    kinds += ["consequence"] * (len(asked) - len(kinds))
    return [
        PreviewRow(
            kind,
            question.prompt,
            question.right.text,
            old.said,
            new.said,
            _probability(old),
            _probability(new),
            new.correct,
        )
        for kind, question, old, new in zip(kinds, asked, before.prompts(), after.prompts(), strict=True)
    ]


def _probability(score: PromptScore) -> float:
    return math.exp(-score.nll_right)


def _text(before: MetricsContent | None, after: MetricsContent) -> dict[str, dict[str, Any]]:
    """Held-out text alone, of what was measured before these facts and after them."""
    sides = {"unedited": after["unedited"] if before is None else before["edited"], "edited": after["edited"]}
    names = [metric.name for metric in catalogue.HELDOUT]
    return {side: {name: values[name] for name in names if name in values} for side, values in sides.items()}

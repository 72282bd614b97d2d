"""Every fact that a run was given, with where it stands and what the model said of it: plain data, as in `views`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sphere_edit.evaluation.catalogue import LIKELIHOOD, STRICT
from sphere_edit.facts.fact import folded
from sphere_edit.reporting.views import Facts
from sphere_edit.runs.folder import RunFolder

WHICH = ("current", "all", "failing", "forgotten", "stands", "superseded", "removed", "withdrawn", "waiting")


@dataclass(frozen=True)
class Entry:
    """A fact of a run.

    Attributes:
        index: its number in the run, from 0.
        prompt: with the subject in place.
        batch: that first wrote it; None where none that stands did.
        state: a word (`History.states`).
        before, now: what the unedited model said, and the edited one when it was last asked; None where it was not.
        likely, strict: the last verdicts, None where there are none.
        forgotten: whether it gave its new answer once, and not when it was last asked.
    """

    index: int
    prompt: str
    answer: str
    batch: int | None
    state: str
    before: str | None = None
    now: str | None = None
    likely: bool | None = None
    strict: bool | None = None
    forgotten: bool = False

    def among(self, which: str) -> bool:
        """Whether it is one of those that a word of `WHICH` names."""
        if which in ("current", "all"):
            return which == "all" or self.state != "withdrawn"
        if which == "failing":
            return self.strict is False
        return self.forgotten if which == "forgotten" else self.state == which


def ledger(run: RunFolder) -> list[Entry]:
    """All facts of a run, those that fail first, then by number. Verdicts are those of the last evaluation, if it is of where the run stands."""
    history, metrics = run.history, run.current_metrics()
    measured = {} if metrics is None else {row.index: row for row in Facts.of(metrics["per_fact"]).rows}
    batch_of, seen, forgotten = history.batch_of, history.seen, set(history.forgotten)
    entries = []
    for index, (fact, state) in enumerate(zip(run.facts(), history.states, strict=True)):
        entry = Entry(index, fact.filled_prompt, fact.target_new.strip(), batch_of.get(index), state)
        if (row := measured.get(index)) is not None:
            strict = row.holds(STRICT)
            said = row.before.rewrite.said, row.after.rewrite.said
            lost = not strict and (index in seen or index in forgotten)
            entry = Entry(
                index, entry.prompt, entry.answer, entry.batch, state, *said, row.holds(LIKELIHOOD), strict, lost
            )
        entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.strict is not False, entry.index))


def sought(entries: Sequence[Entry], which: str = "current", batch: int | None = None, text: str = "") -> list[Entry]:
    """Those of some kind, of a batch, and with a text in prompt or answers, whatever its case."""
    wanted = folded(text)
    return [
        entry
        for entry in entries
        if entry.among(which)
        and (batch is None or entry.batch == batch)
        and (
            not wanted or wanted in folded(" ".join((entry.prompt, entry.answer, entry.before or "", entry.now or "")))
        )
    ]

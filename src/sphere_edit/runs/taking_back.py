"""What it takes to take facts back: subtract what was written for them, look, and write the unedited model's own where that is not enough."""

from __future__ import annotations

from collections.abc import Sequence

from sphere_edit.counting import counted
from sphere_edit.editing.batch import Back, Clock
from sphere_edit.evaluation.returned import Returned, answered
from sphere_edit.facts.fact import Fact
from sphere_edit.progress import duration
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import RunFolder
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.records import Batch, FinalRecheck, RemovalCheck
from sphere_edit.runs.removal import named, shares_of
from sphere_edit.runs.selection import together
from sphere_edit.runs.session import Session

_WAYS: tuple[Back, ...] = (
    "state",
    "answer",
)  # what of the unedited model is written where it does not come back, in this order
_LISTED = 20  # facts that are named where they are taken back


class TakingBack:
    """Takes facts back, step by step, each of which the journal knows: a run that died goes on from there."""

    def __init__(self, session: Session, evaluator: Evaluator, run: RunFolder, committer: Committer):
        self.session, self.evaluator, self.run, self.committer = session, evaluator, run, committer
        self.reporter = session.reporter

    def begin(self, facts: Sequence[Fact], removed: Sequence[int], exact: bool) -> None:
        """Commit the batch that takes back the ``removed`` facts, whichever way is theirs."""
        history = self.run.history
        base = history.last_without(removed)
        others = self._others_since(base, removed)
        self._say_removed(facts, removed)
        if exact and (others or base not in history.closed):
            self._say_replay(base, len(others))
            self.committer.restore(base, removed)
        elif not others and base in history.closed:
            self.reporter.say(
                f"Nothing else was edited since, so the state of batch {base} is taken up again, bit for bit"
            )
            self.committer.restore(base, removed)
        else:
            self._write(facts, removed)

    def look(self, facts: Sequence[Fact], removal: Batch) -> None:
        """See which prompts do not give the unedited model's answer yet, and write it there; then ask which others were lost meanwhile."""
        history = self.run.history
        for step, way in enumerate(_WAYS):
            checks = [check for check in history.removal_checks if check.after >= removal.number]
            check = checks[step] if step < len(checks) else self.check(facts, removal)
            if not check.missing:
                break
            while waiting := _not_written_since(history.batches[check.after :], check.missing):
                batch = self._together(facts, waiting)
                self.reporter.say(
                    f"Batch {history.head + 1}: {len(batch)} of {counted(len(check.facts), 'prompt')} without the unedited model's answer yet; "
                    f"its own {way} is written there",
                    "bold",
                )
                self.committer.write_back(batch, [facts[index] for index in batch], way)
        if not history.recheck_done:
            self._ask_others(facts, removal)

    def check(self, facts: Sequence[Fact], removal: Batch) -> RemovalCheck:
        """Whether the prompts of the removed facts give the unedited model's answers, as the model stands; asked once a batch."""
        history = self.run.history
        if history.removal_checks and history.removal_checks[-1].after == history.head >= removal.number:
            return history.removal_checks[-1]
        self.committer.settle()
        clock, asked = Clock(), _last_of_each(facts, removal.removed)
        entries = []
        returned = self._returned([facts[index] for index in asked])
        given = self.evaluator.knows([facts[index] for index in asked], "removed facts")
        for index, found, new in zip(asked, returned, given, strict=True):
            entries.append({"fact": index, "new": new, **vars(found)})
        clock.lap("asking removed facts")
        record = RemovalCheck.model_validate({"after": history.head, "facts": entries, "seconds": clock.seconds})
        self.run.append(record)
        return record

    # --- inside ---------------------------------------------------------------------------------------------------

    def _write(self, facts: Sequence[Fact], removed: Sequence[int]) -> None:
        """Subtract what was written for the facts, or, where that cannot be told apart, write over it what the unedited model has there."""
        history, method = self.run.history, self.session.method
        gone = set(removed)
        asked = [index for index in history.due if index not in gone]
        given = self._knows(facts, asked)
        missing = [index for index, answers in zip(asked, given, strict=True) if not answers]
        carried = self.session.settings.compensated > 0  # a part of a fact's share then comes with later batches
        shares = shares_of(self.run, removed, method.columnwise and not carried)
        if shares is None:
            self.reporter.say(
                f"{method.name}{' with compensated' if carried else ''} does not write a share for each fact that could be subtracted: "
                "what the unedited model makes of these prompts is written in their place"
            )
            batch = self._together(facts, _last_of_each(facts, removed))
            self.committer.write_back(batch, [facts[index] for index in batch], "state", removed, asked, missing)
        else:
            self.reporter.say(
                f"Batch {history.head + 1}: what was written for them is subtracted, in every batch that wrote them",
                "bold",
            )
            self.committer.subtract(removed, shares, asked, missing)
        if method.learns and not method.forgets:
            self.reporter.say(
                f"What {method.name} remembers of these facts stays in its state; it knows no way to take it out"
            )

    def _ask_others(self, facts: Sequence[Fact], removal: Batch) -> None:
        """Which of the facts that held before the removal do not hold any more."""
        clock, held = Clock(), set(removal.answered)
        asked = [index for index in self.run.history.due if index in held]
        given = self._knows(facts, asked)
        lost = [index for index, answers in zip(asked, given, strict=True) if not answers]
        clock.lap("asking earlier facts")
        after = self.run.history.head
        self.run.append(FinalRecheck(after=after, rechecked=asked, forgotten=lost, seconds=clock.seconds))

    def _knows(self, facts: Sequence[Fact], asked: Sequence[int]) -> list[bool]:
        self.committer.settle()
        return self.evaluator.knows([facts[index] for index in asked], "other facts") if asked else []

    def _returned(self, facts: Sequence[Fact]) -> list[Returned]:
        """The facts on the model as it stands beside the unedited one, form by form."""
        loaded, weights, size = self.session.loaded, self.session.weights, self.session.settings.tokens_per_batch
        forms = [fact.in_each_form() for fact in facts]
        single = [form for several in forms for form in several]
        with weights.unedited():
            before = iter(answered(loaded, single, size))
        now = iter(answered(loaded, single, size))
        return [Returned.of(loaded, [next(before) for _ in several], [next(now) for _ in several]) for several in forms]

    def _others_since(self, base: int, removed: Sequence[int]) -> list[int]:
        """The facts that were edited after a batch, beside those that are or were removed."""
        history = self.run.history
        gone = history.removed | set(removed)
        return [i for batch in history.standing if batch.number > base for i in batch.facts if i not in gone]

    def _together(self, facts: Sequence[Fact], waiting: Sequence[int]) -> list[int]:
        return together(self.session.method, facts, waiting, self.session.settings.batch_size)

    def _say_removed(self, facts: Sequence[Fact], removed: Sequence[int]) -> None:
        history = self.run.history
        self.reporter.say(f"Removing {counted(len(removed), 'fact')}", "bold")
        for index in removed[:_LISTED]:
            older = ", superseded before" if index in history.superseded else ""
            self.reporter.say(f"  {index}: {named(facts[index])} (batch {history.batch_of[index]}{older})")
        if len(removed) > _LISTED:
            self.reporter.say(f"  and {len(removed) - _LISTED} more")

    def _say_replay(self, base: int, others: int) -> None:
        batches = [batch for batch in self.run.history.standing if batch.number > base]
        seconds = sum(sum(batch.seconds.values()) for batch in batches)
        self.reporter.say(
            f"Replaying from batch {base}: {counted(others, 'other fact')} to edit again; {counted(len(batches), 'batch')} since took {duration(seconds)}"
        )


def _last_of_each(facts: Sequence[Fact], removed: Sequence[int]) -> list[int]:
    """Of facts with the same subject and prompt, the last."""
    return sorted({facts[index].key: index for index in sorted(removed)}.values())


def _not_written_since(batches: Sequence[Batch], missing: Sequence[int]) -> list[int]:
    written = {index for batch in batches for index in batch.written_back}
    return [index for index in missing if index not in written]

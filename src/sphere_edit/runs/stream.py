"""What happens to a stream of facts, from top to bottom: accept, recheck, edit, measure, repair, final recheck, finish.

The journal says how far a run is. Each step looks there for what is left to do, so that a run which died anywhere goes on from
its last line to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Event

from sphere_edit.counting import counted
from sphere_edit.editing.batch import Clock
from sphere_edit.editing.guard import stopped
from sphere_edit.editing.repair import repair_steps
from sphere_edit.editing.targets import LONG_ANSWER
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact, short
from sphere_edit.facts.readers import FactSet
from sphere_edit.files import remove_file
from sphere_edit.models.loading import peak_memory
from sphere_edit.runs.accounting import account_of
from sphere_edit.runs.commit import Committer
from sphere_edit.runs.folder import METRICS, RunFolder
from sphere_edit.runs.measuring import Evaluator
from sphere_edit.runs.preparing import committer_of, heldout_text, repair_text
from sphere_edit.runs.records import FinalRecheck, Finished, GuardStop
from sphere_edit.runs.removal import FactName, removable, with_superseded
from sphere_edit.runs.selection import superseded_by, together
from sphere_edit.runs.session import Session
from sphere_edit.runs.taking_back import TakingBack
from sphere_edit.runs.trust import is_own

_LIKELY = 0.5  # mean probability of an answer's tokens under its target alone, below which something is wrong with that
_SATURATED = 0.25  # share of earlier facts forgotten, from which on a stream feeds on itself (docs/LOG.md)


class Stopped(SphereEditError):
    """Work ended between two batches, as somebody asked; what is left waits in the run."""


class Stream:
    """A run at work: its model in memory, with the weights and the method's state of its last batch."""

    def __init__(
        self,
        session: Session,
        evaluator: Evaluator,
        run: RunFolder,
        trust_run: bool = False,
        stopping: Event | None = None,
    ):
        self.session, self.evaluator, self.run, self.reporter = session, evaluator, run, session.reporter
        self.stopping = stopping or Event()  # set by another thread to have the work end after its batch
        evaluator.trusted = trust_run or is_own(run.config)
        if not evaluator.trusted:
            self.reporter.say(f"This run was begun elsewhere, on '{run.config.model.source}'")
        evaluator.heldout = heldout_text(run, session.vocabulary)
        self.committer: Committer = committer_of(session, run)
        self.taking_back = TakingBack(session, evaluator, run, self.committer)
        if run.writable:
            self._tidy()

    # --- forward --------------------------------------------------------------------------------------------------

    def accept(self, facts: Sequence[Fact], given: FactSet, left_out: Sequence[str]) -> None:
        """Take up more facts, of which ``left_out`` names the records that are not among them."""
        if waiting := len(self.run.history.pending):
            raise SphereEditError(
                f"{self.run.path} has {counted(waiting, 'fact')} waiting; resume it before giving it more"
            )
        self.run.add_facts(facts, given.source, given.protocol, left_out)

    def go_on(self) -> None:
        """Do whatever the journal says is still to be done."""
        run = self.run
        try:
            self.evaluator.check()
            self.evaluator.measure_unedited(run)
            facts = run.facts()
            if run.history.pending:
                self.committer.check_statistics()
            while run.history.pending:
                self.evaluator.checkpoint(run)
                self._unless_stopped()
                self._edit_next(facts)
            if run.history.closing:
                self._close(facts)
            self.committer.keep()
            self._unless_stopped()
            self.evaluator.finish(run)
            if not run.history.finished:
                self._finished()
        except BaseException:  # an interruption too must leave the model in memory as the journal says
            with suppress(SphereEditError):
                self.committer.settle()
            raise

    def _finished(self) -> None:
        """Say that nothing is left to do, and what it took of memory."""
        device = self.session.loaded.device
        peak, expected = peak_memory(device), account_of(self.session).peak[str(device)]
        if peak:
            self.reporter.say(
                f"Memory: {peak / 1e9:.2f} GB at most on {device}; {expected / 1e9:.2f} GB were expected ({expected / peak - 1:+.0%})",
                "dim",
            )
        self.run.append(Finished(after=self.run.history.head, peak_memory=peak, expected_memory=expected))

    def _edit_next(self, facts: Sequence[Fact]) -> None:
        """Edit the next facts waiting, and with them those earlier ones that are not answered."""
        history, clock = self.run.history, Clock()
        batch = self._together(facts, history.pending, self.session.settings.batch_size)
        replaced = superseded_by(facts, batch, [*history.retained, *sorted(history.written_back)])
        asked = self._due_before(batch, replaced)
        missing = self._unanswered(facts, asked, clock)
        # such a fact of a subject that the batch is about may have to wait for its next turn
        rewritten = self._together(facts, [*batch, *missing], len(batch) + len(missing))[len(batch) :]
        parts = [counted(len(batch), "fact")]
        if asked:
            never = set(missing) - history.seen
            parts.append(f"{len(missing) - len(never)} of {len(asked)} earlier ones that were forgotten")
            parts += [f"{len(never)} that never took"] if never else []
        left = len(history.pending) - len(batch)
        self.reporter.say(f"Batch {history.head + 1}: {', and '.join(parts)}; {left} after it", "bold")
        for index in sorted({*replaced} - history.removed):
            self.reporter.say(f"  supersedes: {facts[index].filled_prompt} → {facts[index].target_new.strip()}")
        self._write(facts, batch, rewritten, replaced, asked, missing, clock)

    def _close(self, facts: Sequence[Fact]) -> None:
        """What ends a stream of new facts, or a removal."""
        history, removal = self.run.history, self.run.history.removal
        if removal is None or history.replayed:
            self._repair(facts)
            self._final_recheck(facts)
        elif removal.restored is None:
            self.taking_back.look(facts, removal)
            self._rewrite_forgotten(facts)
        if removal is not None:
            self.taking_back.check(facts, removal)

    def _repair(self, facts: Sequence[Fact]) -> None:
        """Take back what the stream did to ordinary text, as far as its facts do not need it."""
        history, settings = self.run.history, self.session.settings
        steps = repair_steps(settings.repair or 0, history.unrepaired)
        if not steps:
            return
        self._unless_stopped()
        self.reporter.say(f"Batch {history.head + 1}: repair, {counted(steps, 'step')}", "bold")
        retained = [facts[index] for index in history.retained]
        share = history.unrepaired / len(history.edited)
        self.committer.repair(retained, repair_text(self.run, self.session.vocabulary), steps, share, settings.seed)

    def _final_recheck(self, facts: Sequence[Fact]) -> None:
        """Ask all facts, once, and rewrite those that are not answered, in batches without new ones."""
        run, history = self.run, self.run.history
        if not self.session.settings.recheck:
            return
        if not history.recheck_done:
            clock, asked = Clock(), history.due
            missing = self._unanswered(facts, asked, clock)
            run.append(FinalRecheck(after=history.head, rechecked=asked, forgotten=missing, seconds=clock.seconds))
        self._rewrite_forgotten(facts)

    def _rewrite_forgotten(self, facts: Sequence[Fact]) -> None:
        """Write again what the final recheck found forgotten, in batches without new facts."""
        history = self.run.history
        while (waiting := history.forgotten) and history.guard is None:
            self._unless_stopped()
            rewritten = self._together(facts, waiting, self.session.settings.batch_size)
            asked = history.final_rechecks[-1].rechecked
            said = f"Batch {history.head + 1}: rewrites {len(rewritten)} of {counted(len(asked), 'fact')} asked"
            self.reporter.say(said, "bold")
            self._write(facts, [], rewritten, [], [], [], Clock())

    # --- back -----------------------------------------------------------------------------------------------------

    def remove(self, wanted: Sequence[FactName], exact: bool = False) -> None:
        """Take single facts back, the others staying: by subtraction or what else it takes, or by replaying the run without them (``exact``).

        Raises:
            SphereEditError: a fact is not in the run or does not stand, or the run is to be finished first.
        """
        found, facts = removable(self.run, wanted), self.run.facts()
        removed = with_superseded(self.run.history, facts, found)
        try:
            self.evaluator.check()
            self.committer.check_statistics()
            self.taking_back.begin(facts, removed, exact)
        except BaseException:
            with suppress(SphereEditError):
                self.committer.settle()
                self.run.thin(self.run.history.head)  # what comes next need not be this removal
            raise
        self.go_on()

    def roll_back(self, to: int) -> None:
        """Put the weights back to what they were after a batch; later batches, and facts still waiting, are withdrawn."""
        head = self.run.history.head
        if not 0 <= to <= head:
            raise SphereEditError(
                f"cannot roll back to batch {to}: this run stands at batch {head}, so 0 to {head} exist"
            )
        try:
            self.committer.roll_back(to)
        except BaseException:
            with suppress(SphereEditError):
                self.committer.settle()
            raise
        self._tidy()

    def _tidy(self) -> None:
        """Remove what belongs to a state that was withdrawn. Done at every opening, should the rollback itself have died here."""
        run = self.run
        run.thin(run.history.head)
        if run.history.finished and run.current_metrics() is None:
            for name in ("report.html", METRICS):
                remove_file(run.path / name)
            self.evaluator.refresh_metrics(run)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _unless_stopped(self) -> None:
        """End here, where somebody asked for that.

        Raises:
            Stopped: saying what is kept and what waits.
        """
        if self.stopping.is_set():
            self.stopping.clear()
            history = self.run.history
            raise Stopped(
                f"stopped after batch {history.head}, as asked; {counted(len(history.pending), 'fact')} waiting. "
                f"To go on: sphere-edit edit {self.run.path} --resume"
            )

    def _due_before(self, batch: Sequence[int], replaced: Sequence[int]) -> list[int]:
        """The earlier facts that are rechecked before a batch: so many for each of its own, those asked longest ago first."""
        gone = set(replaced)
        due = [index for index in self.run.history.due if index not in gone]
        return due[: (self.session.settings.recheck or 0) * len(batch)]

    def _unanswered(self, facts: Sequence[Fact], asked: Sequence[int], clock: Clock) -> list[int]:
        """Which of the facts ``asked`` the model does not give the new answer of (strict): forgotten ones, and those that never took."""
        if not asked:
            return []
        self.committer.settle()
        given = self.evaluator.knows([facts[index] for index in asked], "earlier facts")
        clock.lap("asking earlier facts")
        missing = [index for index, answered in zip(asked, given, strict=True) if not answered]
        history, many = self.run.history, _SATURATED * len(asked)
        never = [index for index in missing if index not in history.seen]
        if len(missing) - len(never) > many:
            back = (
                f", or go back to an earlier batch (rollback --to N, 1 to {history.head - 1})"
                if history.head > 1
                else ""
            )
            self.reporter.say(
                f"{len(missing) - len(never)} of {counted(len(asked), 'earlier fact')} forgotten: the model holds no more with these settings, "
                f"and writing them again soon harms it more than it helps; stop here{back}",
                "bold red",
            )
        if len(never) > many:
            self.reporter.say(
                f"{len(never)} of {counted(len(asked), 'earlier fact')} never took: since they were written, their new answers were not given once. "
                + self._advice([facts[index] for index in never]),
                "bold red",
            )
        return missing

    def _advice(self, facts: Sequence[Fact]) -> str:
        """What to do about facts that the model does not take: their answers are too long for so many steps, or it is read elsewhere."""
        method, targets = self.session.method, self.session.settings.targets
        if not method.needs.feed.at_subjects:
            return f"Other layers or options of {method.name} may write them"
        sizes = [len(self.committer.source.encoder.answer_of(fact)) for fact in facts]
        longest, said = max(sizes), []
        if longest > LONG_ANSWER:
            said.append(
                f"An answer of {counted(longest, 'token')} is not found in {counted(targets.most_steps(longest), 'step')}: set targets.steps above {targets.steps}, "
                "or give shorter answers"
            )
        if min(sizes) <= LONG_ANSWER:
            said.append(
                f"This model may read such facts in other layers than {self.session.layers[-1]}: layers and a step for it are found by "
                f"`sphere-edit tune {self.session.loaded.source}`"
            )
        return ". ".join(said)

    def _write(
        self,
        facts: Sequence[Fact],
        batch: Sequence[int],
        rewritten: Sequence[int],
        replaced: Sequence[int],
        asked: Sequence[int],
        missing: Sequence[int],
        clock: Clock,
    ) -> None:
        """Write the facts of a ``batch``, and of earlier ones that were ``asked`` and are ``missing`` those chosen; say what came of it."""
        chosen = [facts[index] for index in (*batch, *rewritten)]
        record = self.committer.edit(batch, chosen, replaced, asked, rewritten, clock, missing)
        forms = self.committer.source.forms(chosen)
        in_forms = [fact for fact, of_fact in zip(chosen, forms, strict=True) for _ in of_fact]
        self._say_unlikely(in_forms, record.targets.get("probabilities", []))
        if isinstance(record, GuardStop):
            self.reporter.say(f"Guard: {stopped(record)}", "bold red")

    def _say_unlikely(self, facts: Sequence[Fact], probabilities: Sequence[float]) -> None:
        """Tell of targets that do not make their own answers likely, each fact for itself: how many, the worst, and why."""
        unlikely = sorted(
            ((chance, number) for number, chance in enumerate(probabilities) if chance < _LIKELY),
        )
        if unlikely:
            worst, number = unlikely[0]
            fact = facts[number]
            self.reporter.say(
                f"The targets of {len(unlikely)} of {counted(len(facts), 'fact')} make their answers less than {_LIKELY:.0%} likely, the least "
                f"'{short(fact.filled_prompt)}' → '{short(fact.target_new.strip())}' ({worst:.0%}). "
                + self._advice([facts[number] for _, number in unlikely])
            )

    def _together(self, facts: Sequence[Fact], waiting: Sequence[int], size: int) -> list[int]:
        """The first of those waiting that the method takes in one batch of ``size`` at most."""
        return together(self.session.method, facts, waiting, size)

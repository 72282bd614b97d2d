"""One batch, from facts to updates of the edited matrices; the loop commits it, `tune` looks at it and takes it back.

facts → targets → keys → update → projection → weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.editing.compensation import Compensation, lacking, with_back
from sphere_edit.editing.memory import Metric, single
from sphere_edit.editing.methods.base import JointMethod, LayerwiseMethod, Method
from sphere_edit.editing.problem import LayerProblem, Seen, State, Statistics
from sphere_edit.editing.repair import Descent, Repair
from sphere_edit.editing.sources import Report, Source
from sphere_edit.facts.fact import Fact
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.experts import by_expert, experts_of, wide
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import DenseUpdate, Update, joined
from sphere_edit.progress import Reporter

Back = Literal[
    "state", "answer"
]  # which of the unedited model's is written at the prompts of facts that are taken back


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


@dataclass
class _Group:
    """What solving some facts came to, by matrix: ΔW as solved, ΔW as written, and the method's view of the facts."""

    solved: dict[str, Update] = field(default_factory=dict)
    written: dict[str, Update] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A batch that stands in the working weights, by matrix: W before it, ΔW before SPHERE, ΔW, and the problems as solved.

    ``taken`` is what the projection took away from it, where that is carried into the next batch (`Compensation`).
    """

    before: dict[str, Tensor]
    solved: dict[str, Update]
    updates: dict[str, Update]
    problems: dict[str, Seen]
    report: Report
    taken: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loss:
    """The loss of the facts that a source has taken up."""

    source: Source

    @property
    def rounds(self) -> int:
        """Evaluations that take each fact once."""
        return self.source.rounds

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss, and its gradient by each matrix."""
        return self.source.objective(weights)


class Solver:
    """Writes batches into the working weights, through SPHERE where it is on."""

    def __init__(
        self,
        weights: EditedWeights,
        source: Source,
        method: Method,
        sphere: Sphere | None,
        diagnostic: Sphere,
        statistics: Mapping[str, Statistics],
        reporter: Reporter,
        compensated: float = 0.0,
        curved: bool = False,
    ):
        self.curved = curved
        self.weights, self.source, self.method, self.sphere = weights, source, method, sphere
        self.compensation = Compensation(compensated)
        self.diagnostic, self.statistics, self.reporter = diagnostic, statistics, reporter
        self._bases: dict[str, tuple[Tensor | None, Tensor]] = {}
        self._of_matrices: dict[str, dict[str, Tensor]] = {}

    def write(
        self, facts: Sequence[Fact], states: Mapping[str, State], clock: Clock, back: Back | None = None
    ) -> Written:
        """Solve a batch and add its updates to the working weights, which are left in the model.

        With ``back``, what is written is what the unedited model makes of the facts' prompts: its state, or its answers.
        """
        self.weights.use_working()
        before = self.weights.snapshot()
        groups, report = self._solve_groups(facts, states, clock, back)
        updates, solved = self._finished(groups, before)
        clock.lap("sphere")
        self.weights.restore(before)
        for name, update in updates.items():
            self.weights.add(name, update)
        problems: dict[str, Seen] = {name: {} for name in self.weights.names}
        for name, seen in problems.items():
            for part in groups[0].seen.get(name, {}):
                seen[part] = torch.cat([group.seen[name][part] for group in groups], dim=1)
        whole = {name: joined([group.solved[name] for group in groups]) for name in self.weights.names}
        taken = self.compensation.left_of(whole, updates)
        return Written(before, solved, updates, problems, report, taken)

    def repair(
        self,
        facts: Sequence[Fact],
        passages: Sequence[Sequence[int]],
        states: Mapping[str, State],
        steps: int,
        share: float,
        seed: int,
    ) -> tuple[Written, Descent]:
        """Add a `Repair` of so many steps to the working weights.

        It does not go through SPHERE, which keeps new knowledge off the principal directions: what is done here undoes.
        """
        self.weights.use_working()
        before = self.weights.snapshot()
        metrics: dict[str, Metric | None] = {}
        for name in self.weights.names:  # one at a time: in float64 they are large
            metric = self.method.metric(states[name], self.statistics[name])
            metrics[name] = single(metric)
        source = self.source
        repair = Repair(
            source.computing(),
            self.weights,
            passages,
            facts,
            source.templates,
            metrics,
            source.max_tokens,
            seed,
            source.settings.ends,
            self.curved,
        )
        change, descent = repair.run(steps, share, self.reporter)
        updates: dict[str, Update] = {name: DenseUpdate(delta) for name, delta in change.items()}
        for name, update in updates.items():
            self.weights.add(name, update)
        return Written(before, updates, updates, {}, Report()), descent

    def deploy(self) -> None:
        """Run the model with what the method makes of the working weights, SPHERE acting on all that it changed so far."""
        for name in self.weights.names:
            original, working = self.weights.original(name), self.weights.working[name]
            directions = partial(self.directions, name, working)
            self.weights.deploy(name, deployed_weight(self.method, self.sphere, original, working, directions))

    def directions(self, name: str, weight: Tensor) -> Tensor:
        """SPHERE's directions for a matrix: those of ``weight``, or of W0; each is computed once."""
        key = weight if self.diagnostic.basis == "current" else None
        known = self._bases.get(name)
        if known is None or known[0] is not key:
            known = key, self.diagnostic.directions(self.weights.original(name) if key is None else key)
            self._bases[name] = known
        return known[1]

    def moved_on(self) -> None:
        """Let go of directions that no later batch asks for."""
        if self.diagnostic.basis == "current":
            self._bases.clear()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _solve_groups(
        self, facts: Sequence[Fact], states: Mapping[str, State], clock: Clock, back: Back | None
    ) -> tuple[list[_Group], Report]:
        """Solve the batch, in groups of as many facts as the method takes at one time, each written before the next."""
        begin = self.source.begin if back is None else partial(self.source.begin_back, answers=back == "answer")
        size = self.method.max_batch or len(facts)
        report, groups = Report(), list[_Group]()
        with self.reporter.bar(self.source.stage, len(facts), "fact") as advance:
            for first in range(0, len(facts), size):
                begin(facts[first : first + size], advance)
                clock.lap(self.source.stage)
                if isinstance(self.method, LayerwiseMethod):
                    owed = {} if groups else self.compensation.given_back()
                    groups.append(self._solve_layers(self.method, states, clock, owed))
                else:
                    assert isinstance(self.method, JointMethod)
                    groups.append(self._solve_jointly(self.method, clock))
                    advance(len(facts))
                report.add(self.source.report())
        return groups, report

    def _solve_layers(
        self, method: LayerwiseMethod, states: Mapping[str, State], clock: Clock, owed: Mapping[str, Tensor]
    ) -> _Group:
        """Solve matrix by matrix, each seeing the weights of those below as already edited; what is ``owed`` is given back."""
        group = _Group()
        rows = method.needs.ingredients
        of_batch = [row.of_batch(self.source, self.weights.names) for row in rows]
        self._find_directions(clock)
        for index, name in enumerate(self.weights.names):
            keys, residual = self.source.layer(index)
            clock.lap("keys")
            given = dict(self._of_matrix(name))
            for found in of_batch:
                given |= found.get(name, {})
            weight = self.weights.working[name]
            keys, residual = keys.to(weight.device), residual.to(weight.device)
            given = {part: value.to(weight.device) for part, value in given.items()}
            problem = LayerProblem(wide(weight).clone(), keys, residual, self.statistics[name], given)
            solve = partial(self._solved, method, name, problem, states[name], owed.get(name))
            group.solved[name], group.written[name] = ranks.once(solve, by=index)
            clock.lap("solve")
            self.weights.add(name, group.written[name])
            group.seen[name] = {part: value for row in rows for part, value in row.of_problem(problem).items()}
            clock.lap("sphere")
        return group

    def _find_directions(self, clock: Clock) -> None:
        """SPHERE's directions for all matrices, side by side, where they are asked for within the layer loop."""
        if self._per_layer is not None:
            ranks.dealt(self.weights.names, self._keep_directions)
            clock.lap("sphere")

    def _keep_directions(self, name: str) -> None:
        """Nothing is handed on: the rank that finds a matrix's directions solves that matrix too."""
        self.directions(name, self.weights.working[name])

    def _solved(
        self, method: LayerwiseMethod, name: str, problem: LayerProblem, state: State, owed: Tensor | None
    ) -> tuple[Update, Update]:
        """ΔW of a matrix as it is solved, and as it is written: through SPHERE if that acts inside the layer loop."""
        weight = self.weights.working[name]
        solved = method.solve(lacking(problem, owed), state).by_expert(experts_of(weight))
        update = with_back(solved, owed, weight).to(torch.float32)
        return update, self._suppressed(name, update)

    @property
    def _per_layer(self) -> Sphere | None:
        """SPHERE, if it acts inside the layer loop."""
        return self.sphere if self.sphere is not None and self.sphere.project == "per_layer" else None

    def _suppressed(self, name: str, update: Update) -> Update:
        if self._per_layer is None:
            return update
        return self._per_layer.suppress(update, self.directions(name, self.weights.working[name]))

    def _of_matrix(self, name: str) -> dict[str, Tensor]:
        """What the method's ingredients make of W0, computed once."""
        if name not in self._of_matrices:
            original, rows = wide(self.weights.original(name)), self.method.needs.ingredients
            self._of_matrices[name] = {part: value for row in rows for part, value in row.of_matrix(original).items()}
        return self._of_matrices[name]

    def _solve_jointly(self, method: JointMethod, clock: Clock) -> _Group:
        group = _Group()
        updates = method.descend(_Loss(self.source), {name: w.clone() for name, w in self.weights.working.items()})
        clock.lap(self.source.stage)
        group.solved = {name: updates[name].to(torch.float32) for name in self.weights.names}
        through = ranks.dealt(self.weights.names, lambda name: self._suppressed(name, group.solved[name]))
        group.written = dict(zip(self.weights.names, through, strict=True))
        for name, update in group.written.items():
            self.weights.add(name, update)
        clock.lap("sphere")
        return group

    def _finished(
        self, groups: Sequence[_Group], before: Mapping[str, Tensor]
    ) -> tuple[dict[str, Update], dict[str, Update]]:
        """The whole batch's update of each matrix, through the method's last step and SPHERE; and what it was before SPHERE."""

        def finished(name: str) -> tuple[Update, Update | None]:
            written = joined([group.written[name] for group in groups])
            whole = self.method.finish(written.wide(), wide(before[name]).clone())
            update = whole.by_expert(experts_of(before[name])).to(torch.float32)
            if self.sphere is None or self.sphere.project != "after_all":
                return update, None
            return self.sphere.suppress(update, self.directions(name, before[name])), update

        updates: dict[str, Update] = {}
        solved: dict[str, Update] = {}
        for name, (update, unprojected) in zip(
            self.weights.names, ranks.dealt(self.weights.names, finished), strict=True
        ):
            updates[name], solved[name] = update, unprojected or joined([group.solved[name] for group in groups])
        return updates, solved


def deployed_weight(
    method: Method, sphere: Sphere | None, original: Tensor, working: Tensor, directions: Callable[[], Tensor]
) -> Tensor:
    """What the model runs with ``[d_out, d_in]``, from W0 and the working weight, and SPHERE's directions if they are asked for."""
    deployed = method.deploy(wide(original).clone(), wide(working).clone())  # a method may write into what it is given
    deployed = by_expert(deployed, experts_of(original))
    if sphere is not None and sphere.project == "deployed":
        change = sphere.suppress(deployed.double() - original.double(), directions())
        deployed = (original.double() + change).float()
    return deployed

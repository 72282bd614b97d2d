"""What a method asks for beyond its facts' keys and residuals: one row, here a small class, for each ingredient.

A row says how its tensors are measured or computed, who gets them, what they cost, and how ``sphere-edit methods`` calls it. A method names
the rows it wants (`Needs`); whatever solves, commits, plans or lists iterates over these rows and knows none of them. So a new ingredient
is one more class, here or beside the method that wants it, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sphere_edit.editing.moments import Corpus
from sphere_edit.editing.problem import LayerProblem, Seen, Statistics
from sphere_edit.editing.sources import Feed, OptimisedTargets, Source
from sphere_edit.editing.statistics import cached_moments, cached_null_spaces
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.prompts import Encoder
from sphere_edit.files import copied, write_tensors
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.weights import EditedWeights
from sphere_edit.numerics.experts import experts_of, inputs_of
from sphere_edit.numerics.experts import width as width_of
from sphere_edit.numerics.linalg import NullSpaceRule, dominant_vectors
from sphere_edit.numerics.update import PARTS
from sphere_edit.progress import Reporter


class Shape(tuple[int, int]):
    """d_out and d_in of an edited matrix; of a layer of experts E · d_in, and C0 then has one block an expert."""

    experts: int

    @classmethod
    def of(cls, weight: Tensor) -> Shape:
        """Of a weight ``[d_out, d_in]`` or ``[E, d_out, d_in]``."""
        shape = cls((weight.shape[-2], inputs_of(weight)))
        shape.experts = max(1, experts_of(weight))
        return shape

    @property
    def square(self) -> int:
        """How many numbers C0 has."""
        return int(self[1] ** 2 // self.experts)


@dataclass
class Unedited:
    """The model before its first batch, and what an ingredient may measure on it."""

    loaded: LoadedModel
    names: Sequence[str]  # of the edited matrices, lowest layer first
    layers: Sequence[int]  # of each of them
    corpus: Corpus
    max_tokens: int  # of one forward pass
    tolerance: float  # relative error at which second moments count as converged
    source: Source
    demo_facts: Callable[[], Sequence[Fact]]  # those of the package's demo facts that this model can read
    reporter: Reporter
    files: dict[str, Mapping[str, Path]] = field(default_factory=dict)  # what is measured, by ingredient and matrix


@dataclass(frozen=True)
class Trial:
    """Seconds that a plan has timed on this machine, from which an ingredient estimates its own."""

    fact: float  # of finding one fact's target
    token: float  # of one token in a forward pass
    tokens: int  # of ordinary text that is read for statistics
    demo_facts: int  # how many there are


@dataclass(frozen=True)
class Planned:
    """The facts that a plan is about, and how many columns their problems have."""

    facts: Sequence[Fact]
    columns: int
    encoder: Encoder


class Ingredient:
    """One row. Every hook does nothing unless it is overridden, and most rows override one or two; parameters are dataclass fields.

    Attributes:
        name: of its measured tensor in `Statistics` and of its folder in a run; once chosen it stays, for run folders have it.
        words: what it is called where a method's needs are listed.
        at_subjects: it can only be had where problems are made at the facts' subjects (`Feed.at_subjects`).
    """

    name: ClassVar[str]
    words: ClassVar[str]
    at_subjects: ClassVar[bool] = False

    # --- before a run ---------------------------------------------------------------------------------------------

    def matrices(self, names: Sequence[str]) -> Sequence[str]:
        """Which of the edited matrices ``measure`` has something to say about."""
        return ()

    def measure(self, unedited: Unedited) -> Mapping[str, Path | Tensor]:
        """One tensor for each of these matrices, or a file of the cache that holds it under the row's name. It is kept with the run."""
        return {}

    def fits(self, measured: Tensor, width: int) -> bool:
        """Whether what was measured can be that of a matrix of ``width`` inputs; a run's folder may be damaged."""
        return True

    def equip(self, source: Source, statistics: Mapping[str, Statistics]) -> None:
        """Tell the source of problems what it is to do otherwise; ``statistics`` are empty as long as nothing is measured."""

    # --- with a problem -------------------------------------------------------------------------------------------

    def of_matrix(self, original: Tensor) -> Mapping[str, Tensor]:
        """What comes with every problem of a matrix, computed once from W0 ``[d_out, d_in]``."""
        return {}

    def of_batch(self, source: Source, names: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        """What comes with the problems of the facts that the source has taken up, by matrix, before any of them is written."""
        return {}

    # --- after a batch --------------------------------------------------------------------------------------------

    def of_problem(self, problem: LayerProblem) -> Mapping[str, Tensor]:
        """What of a problem, as it was solved, goes to ``after_batch``; a column an item ``[d, n]``. It is stored with the batch."""
        return {}

    def once_written(self, source: Source, facts: Sequence[Fact]) -> Mapping[str, Mapping[str, Tensor]]:
        """What of the written batch goes to ``after_batch``, by matrix. It is stored with the batch."""
        return {}

    def of_weights(self, weights: EditedWeights, name: str) -> Mapping[str, Tensor]:
        """What goes to ``after_batch`` and ``after_repair`` and follows from the weights, so that it is computed again in a replay."""
        return {}

    # --- what it costs --------------------------------------------------------------------------------------------

    def seconds(self, trial: Trial) -> Mapping[str, float]:
        """Time before the first batch, by what it is called in a plan."""
        return {}

    def memory(self, shapes: Sequence[Shape]) -> int:
        """Bytes held throughout a run."""
        return 0

    def scratch(self, shape: Shape) -> int:
        """Bytes that solving one matrix takes on top of that."""
        return 0

    def state(self, shapes: Sequence[Shape]) -> int:
        """Bytes that a method's state takes because of it, in memory and in every checkpoint."""
        return 0

    def disk(self, shapes: Sequence[Shape], planned: Planned) -> int:
        """Bytes in the run folder beside checkpoints."""
        return 0


Row = TypeVar("Row", bound=Ingredient)


@dataclass(frozen=True)
class Needs:
    """What a method is made from: where its problems come from, and what it wants beside them.

    Raises:
        SphereEditError: an ingredient cannot be had with this feed, or is named twice.
    """

    feed: Feed
    ingredients: tuple[Ingredient, ...] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.ingredients]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SphereEditError(f"the ingredient '{twice[0]}' is asked for twice")
        lost = [row.name for row in self.ingredients if row.at_subjects and not self.feed.at_subjects]
        if lost:
            raise SphereEditError(
                f"the ingredient '{lost[0]}' is measured at the facts' subjects, which problems from {self.feed.words} do not look at"
            )

    def get(self, kind: type[Row]) -> Row | None:
        """The row of this kind, if the method wants it."""
        return next((row for row in self.ingredients if isinstance(row, kind)), None)

    def plus(self, *more: Ingredient) -> Needs:
        """These needs and more."""
        return replace(self, ingredients=(*self.ingredients, *more))


# --- what iterates over rows --------------------------------------------------------------------------------------


def measure(rows: Sequence[Ingredient], unedited: Unedited, folder: Path) -> None:
    """Put what the rows measure before a run into ``folder``, one file an ingredient and matrix, named after both.

    Raises:
        SphereEditError: what came out cannot be used.
    """
    for row in rows:
        files = {}
        for name, found in row.measure(unedited).items():
            kept = folder / row.name / f"{name}.safetensors"
            if isinstance(found, Tensor):
                if not (found.is_floating_point() and bool(found.isfinite().all())):
                    raise SphereEditError(f"the ingredient '{row.name}' of {name} came out as no finite float tensor")
                write_tensors(kept, {row.name: found})
            else:
                copied(found, kept)
            files[name] = kept if isinstance(found, Tensor) else found
        unedited.files[row.name] = files


def unmeasured(rows: Sequence[Ingredient], statistics: Mapping[str, Statistics]) -> list[str]:
    """The matrices of which something is not there that was measured before the run."""
    wanted = [(row.name, name) for row in rows for name in row.matrices(list(statistics))]
    return [name for ingredient, name in wanted if ingredient not in statistics[name]]


def seen_of(
    rows: Sequence[Ingredient], problems: Mapping[str, Seen], source: Source, facts: Sequence[Fact]
) -> dict[str, Seen]:
    """What is stored with a batch once it is written: what was taken of its ``problems``, and what is measured now.

    Raises:
        SphereEditError: a row gives its tensor a name that the batch's file has for something else.
    """
    seen = {name: dict(parts) for name, parts in problems.items()}
    for row in rows:
        for name, parts in row.once_written(source, facts).items():
            seen[name] |= parts
    for parts in seen.values():
        if bad := [part for part in parts if part in PARTS or "/" in part]:
            raise SphereEditError(
                f"an ingredient calls a tensor '{bad[0]}', which cannot be stored; give it another name"
            )
    return seen


# --- the rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecondMoment(Ingredient):
    """C0 = E[k kᵀ] of a matrix's inputs over ordinary text, and its Cholesky factor."""

    name: ClassVar[str] = "second_moment"
    words: ClassVar[str] = "C0"

    def matrices(self, names: Sequence[str]) -> Sequence[str]:
        """All."""
        return names

    def measure(self, unedited: Unedited) -> Mapping[str, Path]:
        """From the cache, or over the corpus until it has converged."""
        return cached_moments(
            unedited.loaded,
            unedited.corpus,
            unedited.layers,
            unedited.names,
            unedited.max_tokens,
            unedited.tolerance,
            unedited.reporter,
        )

    def fits(self, measured: Tensor, width: int) -> bool:
        """Square, and as wide; of a layer of experts all blocks together."""
        return measured.shape[-2:].numel() == measured.shape[-1] ** 2 and width_of(measured) == width

    def seconds(self, trial: Trial) -> Mapping[str, float]:
        """One pass over the text, should it take all of it to converge."""
        return {"second moments": trial.tokens * trial.token}

    def memory(self, shapes: Sequence[Shape]) -> int:
        """C0, its factors for the solve and for the energy's bounds; while C0 is measured, its sums take as much."""
        return sum((4 + 8 + 8) * shape.square for shape in shapes)

    def scratch(self, shape: Shape) -> int:
        """A few matrices of its size in float64."""
        return 4 * 8 * shape.square

    def disk(self, shapes: Sequence[Shape], planned: Planned) -> int:
        """C0 in float32."""
        return sum(4 * shape.square for shape in shapes)


@dataclass(frozen=True)
class NullSpace(Ingredient):
    """V ``[d_in, r]``, an orthonormal basis of the directions in which C0 is small; asked for after `SecondMoment`."""

    rule: NullSpaceRule
    threshold: float
    name: ClassVar[str] = "null_space"
    words: ClassVar[str] = "null space of C0"

    def matrices(self, names: Sequence[str]) -> Sequence[str]:
        """All."""
        return names

    def measure(self, unedited: Unedited) -> Mapping[str, Path]:
        """From the cache, or from C0."""
        moments = unedited.files.get(SecondMoment.name)
        if moments is None:
            raise SphereEditError(
                "the null space is that of C0: name SecondMoment() before NullSpace(…) in the method's needs"
            )
        return cached_null_spaces(unedited.loaded, moments, self.rule, self.threshold, unedited.reporter)

    def fits(self, measured: Tensor, width: int) -> bool:
        """As high; of a layer of experts all blocks together."""
        return width_of(measured) == width


@dataclass(frozen=True)
class TargetLength(Ingredient):
    """μ ``[1]``, how long targets are at the last edited MLP's output on the unedited model; every target is scaled to it (NAS)."""

    name: ClassVar[str] = "anchor"
    words: ClassVar[str] = "length of the demo facts' targets on the unedited model"
    at_subjects: ClassVar[bool] = True

    def matrices(self, names: Sequence[str]) -> Sequence[str]:
        """The last, where targets stand."""
        return names[-1:]

    def measure(self, unedited: Unedited) -> Mapping[str, Tensor]:
        """The typical length of the targets of the demo facts.

        Raises:
            SphereEditError: this model's tokenizer places none of their subjects.
        """
        facts, source = unedited.demo_facts(), unedited.source
        if not facts:
            raise SphereEditError(
                "this method measures the demo facts first, and this tokenizer places none of their subjects"
            )
        assert isinstance(source, OptimisedTargets)
        with unedited.reporter.bar("targets of the demo facts", len(facts), "fact") as advance:
            return {unedited.names[-1]: torch.tensor([source.typical_length(facts, advance)])}

    def equip(self, source: Source, statistics: Mapping[str, Statistics]) -> None:
        """Every target gets this length."""
        lengths = [measured[self.name] for measured in statistics.values() if self.name in measured]
        if lengths and isinstance(source, OptimisedTargets):
            source.anchor = float(lengths[-1])

    def seconds(self, trial: Trial) -> Mapping[str, float]:
        """The targets of all demo facts."""
        return {"targets of the demo facts": trial.demo_facts * trial.fact}


@dataclass(frozen=True)
class DominantVectors(Ingredient):
    """Bases ``dominant_outputs [d_out, k]`` and ``dominant_inputs [d_in, k]`` of W0's leading singular vectors (`dominant_vectors`).

    As many as hold a ``share`` of ‖W0‖².
    """

    share: float
    name: ClassVar[str] = "dominant"
    words: ClassVar[str] = "dominant singular vectors of W0"

    def of_matrix(self, original: Tensor) -> Mapping[str, Tensor]:
        """Both bases, float64."""
        outputs, inputs = dominant_vectors(original, self.share)
        return {"dominant_outputs": outputs, "dominant_inputs": inputs}

    def memory(self, shapes: Sequence[Shape]) -> int:
        """At most as many vectors as the smaller side has."""
        return sum(8 * (out + inner) * min(out, inner) for out, inner in shapes)


@dataclass(frozen=True)
class ContextTokens(Ingredient):
    """Keys ``[d_in, m]`` at the context tokens: all tokens of each fact's bare prompt but the subject's last one.

    The subject's last token is where a fact is written. What is read there, and after it, comes from the other tokens, so they are the
    context of the edit, and a fact is forgotten when they change. They are read before the batch, come with the problem as
    ``context_tokens``, and are remembered as ``bystanders``, the name that run folders have for them.
    """

    name: ClassVar[str] = "context_tokens"
    words: ClassVar[str] = "the other tokens of edited prompts"
    at_subjects: ClassVar[bool] = True

    def of_batch(self, source: Source, names: Sequence[str]) -> Mapping[str, Mapping[str, Tensor]]:
        """With the weights as they stand."""
        return {name: {self.name: keys} for name, keys in zip(names, source.context_tokens(), strict=True)}

    def of_problem(self, problem: LayerProblem) -> Mapping[str, Tensor]:
        """All of them."""
        return {"bystanders": problem.given[self.name]}

    def disk(self, shapes: Sequence[Shape], planned: Planned) -> int:
        """A column a token, float32."""
        forms = [form for fact in planned.facts for form in fact.in_each_form()]
        tokens = sum(len(planned.encoder.asked_fact(form).ids) - 1 for form in forms)
        return sum(4 * inner * tokens for _, inner in shapes)


@dataclass(frozen=True)
class EarlierKeys(Ingredient):
    """The keys of every batch, ``keys [d_in, n]``, measured again once it is written; a method that has them can ``forget`` some."""

    name: ClassVar[str] = "keys"
    words: ClassVar[str] = "all earlier keys"
    at_subjects: ClassVar[bool] = True

    def equip(self, source: Source, statistics: Mapping[str, Statistics]) -> None:
        """The source keeps hidden states between the last solve and the measurement."""
        source.asked_again = True

    def once_written(self, source: Source, facts: Sequence[Fact]) -> Mapping[str, Mapping[str, Tensor]]:
        """With the weights as the batch left them."""
        return {name: {self.name: keys} for name, keys in source.all_keys(facts).items()}

    def state(self, shapes: Sequence[Shape]) -> int:
        """A system of all keys and its inverse, float64; of experts not the keys themselves, whose number is not known here."""
        return sum(2 * 8 * shape.square for shape in shapes)

    def disk(self, shapes: Sequence[Shape], planned: Planned) -> int:
        """A column as each problem has it, float32."""
        return sum(4 * inner * planned.columns for _, inner in shapes)


@dataclass(frozen=True)
class SolvedProblems(Ingredient):
    """Keys and residuals of every batch as they were solved: ``keys [d_in, n]`` and ``residual [d_out, n]``."""

    name: ClassVar[str] = "problem"
    words: ClassVar[str] = "running statistics"

    def of_problem(self, problem: LayerProblem) -> Mapping[str, Tensor]:
        """Both."""
        return {"keys": problem.keys, "residual": problem.residual}

    def disk(self, shapes: Sequence[Shape], planned: Planned) -> int:
        """A column of both as each problem has it, float32."""
        return sum(4 * (out + inner) * planned.columns for out, inner in shapes)


@dataclass(frozen=True)
class WeightChange(Ingredient):
    """``change = W − W0 [d_out, d_in]`` after every batch and every repair."""

    name: ClassVar[str] = "change"
    words: ClassVar[str] = "W − W0"

    def of_weights(self, weights: EditedWeights, name: str) -> Mapping[str, Tensor]:
        """In float32."""
        return {self.name: weights.working[name] - weights.original(name)}

    def state(self, shapes: Sequence[Shape]) -> int:
        """The change, float32."""
        return sum(4 * out * inner for out, inner in shapes)

"""What a method feeds on: optimised targets, gradients, or a loss.

A source gives, batch by batch, the problems a method solves. All of them see the weights as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sphere_edit.editing.answers import coded_targets, own_answers
from sphere_edit.editing.fact_prompts import FactPrompts, in_contexts
from sphere_edit.editing.keys import SubjectPrompts, SubjectReader, context_token_keys, interleaved
from sphere_edit.editing.sinks import Sinks
from sphere_edit.editing.targets import Targets, TargetSettings, anchored, optimise_targets, typical_length
from sphere_edit.facts.fact import Fact
from sphere_edit.facts.forms import others_in_place, written_forms
from sphere_edit.facts.prompts import Encoder
from sphere_edit.models.loading import LoadedModel, cast_copy
from sphere_edit.models.sites import parameter_of
from sphere_edit.models.weights import EditedWeights
from sphere_edit.progress import Advance

_OTHERS_COUNT = 12.0  # how much more a token of other things in a subject's place counts than another context token


@dataclass(frozen=True)
class Feed:
    """Where a method's problems come from: what a `Source` is asked for, and what the rest needs to know of it.

    Attributes:
        source: what makes the problems.
        at_subjects: problems stand at the facts' subjects, with optimised targets: subjects must be found in the tokens, context
            templates are sampled, and only matrices that write the MLP's output are edited.
    """

    source: ClassVar[type[Source]]
    at_subjects: ClassVar[bool] = False

    @property
    def words(self) -> str:
        """What it is called where a method's needs are listed."""
        raise NotImplementedError

    def one_layer(self, alone: bool) -> bool:
        """Whether only one layer can be edited; ``alone``: no other one reaches the place of its targets (`Matrix.alone`)."""
        return False

    def columns(self, fact: Fact, encoder: Encoder, openers: int) -> int:
        """How many columns a fact has in a problem; ``openers``: context templates sampled for each of five."""
        return 1


@dataclass
class Report:
    """What the journal says of a batch's targets: one number a form of a fact, or for a joint descent one a batch."""

    loss_before: list[float] = field(default_factory=list)
    loss_after: list[float] = field(default_factory=list)
    probability_after: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take in the report of another group of facts."""
        for name, values in vars(self).items():
            values += getattr(other, name)

    def as_dict(self) -> dict[str, Any]:
        """Means, None where nothing was measured; and of every fact how likely it became, and after how many evaluations."""
        means = {name: sum(values) / len(values) if values else None for name, values in vars(self).items()}
        each = {"probabilities": [float(f"{value:.3g}") for value in self.probability_after]}
        return {**means, "evaluations": self.evaluations, **(each if self.probability_after else {})}


class Source:
    """What every source has in common; each answers those of the questions that its methods ask."""

    stage: ClassVar[str]  # what its work is called where progress is shown
    asked_again = False  # whether keys are measured again once a batch is written
    rounds = 1  # evaluations of the loss that take each fact once

    def __init__(
        self,
        loaded: LoadedModel,
        weights: EditedWeights,
        layers: Sequence[int],
        templates: Sequence[str],
        feed: Feed,
        settings: TargetSettings,
        max_tokens: int,
    ):
        self.loaded, self.weights, self.layers, self.templates = loaded, weights, layers, templates
        self.feed, self.settings, self.max_tokens = feed, settings, max_tokens
        self.encoder = Encoder(loaded.tokenizer, settings.ends)

    def forms(self, facts: Sequence[Fact]) -> list[list[Fact]]:
        """The forms in which each fact is written."""
        return [list(fact.in_each_form()) for fact in facts]

    def computing(self) -> LoadedModel:
        """The model that is differentiated, with the edited weights as they stand."""
        return self.loaded

    def begin(self, facts: Sequence[Fact], advance: Advance = lambda facts: None) -> None:
        """Take up some facts, with the weights as they stand; ``advance`` is told of those done."""
        raise NotImplementedError

    def begin_back(self, facts: Sequence[Fact], advance: Advance = lambda facts: None, answers: bool = False) -> None:
        """Take up some facts whose prompts are to be answered as the unedited model does, whatever the facts say.

        Where there is another way too, ``answers`` asks for its greedy answers themselves.
        """
        raise NotImplementedError

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """``K [d_in, n]`` and ``R [d_out, n]`` for the edited matrix number ``index``."""
        raise NotImplementedError

    def objective(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss at some values of the edited matrices, and its gradient."""
        raise NotImplementedError

    def all_keys(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        """Keys of every edited matrix with the weights as they stand."""
        raise NotImplementedError

    def context_tokens(self) -> list[Tensor]:
        """Of each edited matrix, keys ``[d_in, m]`` at all tokens of the facts' prompts but the subjects' last ones."""
        raise NotImplementedError

    def columns(self, facts: Sequence[Fact]) -> list[int] | None:
        """How many columns of K each fact has, fact by fact; None where there are no keys."""
        return None

    def report(self) -> Report:
        """What came of the facts taken up last."""
        raise NotImplementedError


class OptimisedTargets(Source):
    """Keys at the subject's last token, and residuals towards optimised targets.

    With δ at the layer's output, ``R = (V* − h_L) / (n − index)`` for n edited layers, h_L measured on the clean prompt
    again after each layer's update (MEMIT). Behind a norm, such a share of several layers is wanted of what the norm says
    (`norms.Norm.change`); one layer alone has δ at the MLP's output, before it. With δ at the MLP's output, R is V* less the output at the averaged key, so
    that one key stands in the whole equation (R-ROME, arXiv:2403.07175).
    """

    feed: FromTargets
    stage = "targets v*"
    anchor: float | None = None  # the length of every target at the MLP's output, for a method that wants one
    _copy: LoadedModel | None = None
    _reader: SubjectReader | None = None
    _back: list[FactPrompts] | None = None  # prompts with the unedited model's answers, where these are the targets
    _unedited: Tensor | None = None  # what the value site is to hold in each column, where that is the unedited model's

    def begin(self, facts: Sequence[Fact], advance: Advance = lambda facts: None) -> None:
        """Optimise v* of some facts."""
        self._take_up(facts)
        share = len(self._facts) / len(self._forms)
        self.find(lambda forms: advance(forms * share))

    def begin_back(self, facts: Sequence[Fact], advance: Advance = lambda facts: None, answers: bool = False) -> None:
        """Take the unedited model's own values at the subjects for targets, in each context: nothing has to be optimised.

        What is read above the edited layers then comes from these, so that not one answer comes back but the whole distribution. What other
        tokens have changed stays; ``answers`` are targets that are optimised just until the unedited model's answers are the likeliest.
        """
        self._take_up(facts)
        if answers or self._carries:
            share = len(self._facts) / len(self._forms)
            self._back = self._own_answers()
            self.find(lambda forms: advance(forms * share))
            return
        with self.weights.unedited():
            _, self._unedited = self._new_reader().keys_and_values(0)
        advance(len(facts))

    def _own_answers(self) -> list[FactPrompts]:
        """The forms taken up with what the unedited model says to each in every context."""
        encoder, templates = self.encoder, self.templates
        prompts = [in_contexts(form, templates, encoder) for form in self._forms]
        with self.weights.unedited():
            said = iter(own_answers(self.loaded, [row for rows in prompts for row in rows], self._answer_lengths()))
        return [
            FactPrompts.said(form, templates, encoder, [next(said) for _ in rows])
            for form, rows in zip(self._forms, prompts, strict=True)
        ]

    def _answer_lengths(self) -> list[int]:
        """How many tokens each form's new answer has, once for each context."""
        coded = coded_targets(self.encoder, self._forms)
        return [len(ids) - start for ids, start in coded for _ in self.templates]

    def _take_up(self, facts: Sequence[Fact]) -> None:
        """Remember the facts, and the forms in which they are written, fact by fact: all that is found is found of these."""
        self._facts, self._reader, self._unedited, self._back = list(facts), None, None, None
        self._forms = [form for forms in self.forms(facts) for form in forms]

    @cached_property
    def sinks(self) -> Sinks:
        """Where attention rests in the facts' prompts."""
        return Sinks(self.loaded, self.weights, self.layers[-1], self.max_tokens)

    def forms(self, facts: Sequence[Fact]) -> list[list[Fact]]:
        """With those of a subject at which attention rests."""
        self.sinks.measure(facts, self.encoder)
        return [written_forms([fact], self.encoder, self.sinks) for fact in facts]

    def find(self, advance: Advance) -> None:
        """Set ``targets`` for the facts taken up."""
        computing, layer, settings = self.computing(), self._target_layer, self.settings
        if self._back is not None:
            settings = settings.carefully()
        self.targets: Targets = optimise_targets(
            computing, self._forms, self.templates, layer, settings, self._inside, advance, self._role, self._back
        )
        if computing is not self.loaded and not self._carries:  # v* is measured from the model's own h
            values = self._the_reader().clean_values() + self.targets.deltas
            self.targets = replace(self.targets, values=values)
        if self.anchor is not None:
            self.targets = anchored(self.targets, self._outputs(), self.anchor)

    def typical_length(self, facts: Sequence[Fact], advance: Advance) -> float:
        """How long the targets of some facts are at the last edited MLP's output, with the weights as they stand (NAS's μ)."""
        self.begin(facts, advance)
        return typical_length(self._outputs() + self.targets.deltas)

    def _outputs(self) -> Tensor:
        """What the last edited MLP says at the facts' subjects, ``[d, n]``."""
        prompts = SubjectPrompts.of(self._forms, self.templates[:1], self.encoder)
        names, layers = self.weights.names, self.layers
        return SubjectReader(self.loaded, prompts, names, layers, True, self.max_tokens, role=self._role).clean_values()

    def _the_reader(self) -> SubjectReader:
        """The reader of the facts taken up; it holds their hidden states, so it is made late and let go early."""
        if self._reader is None:
            self._reader = self._new_reader()
        return self._reader

    def _new_reader(self) -> SubjectReader:
        prompts = SubjectPrompts.of(self._forms, self.templates, self.encoder)
        names, layers = self.weights.names, self.layers
        return SubjectReader(
            self.loaded,
            prompts,
            names,
            layers,
            self._inside,
            self.max_tokens,
            self.feed.contexts,
            self._role,
            self._carries,
            averaged=self.feed.site == "mlp",
        )

    def all_keys(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        """Keys of every edited matrix with the weights as they stand, in one pass."""
        if list(facts) != self._facts:  # a batch of several groups
            self._take_up(facts)
        keys = self._the_reader().all_keys()
        self._reader = None
        return keys

    def columns(self, facts: Sequence[Fact]) -> list[int] | None:
        """One for each form, or one for each form and context template."""
        each = 1 if self.feed.contexts == "mean" else len(self.templates)
        return [each * len(forms) for forms in self.forms(facts)]

    def context_tokens(self) -> list[Tensor]:
        """Of each edited matrix, keys ``[d_in, m]`` at all tokens of the facts' prompts but the subjects' last ones.

        With the weights as they stand, fact by fact, each prompt without its templates and without its answer. After them those of
        `others_in_place`, each of which counts `_OTHERS_COUNT` times.
        """
        own = self._context_tokens_of(self._forms)
        others = [
            other
            for fact in self._facts
            for single in fact.in_each_form()
            for other in others_in_place(single, self.encoder, self.sinks)
        ]
        if not others:
            return own
        beside = [keys * _OTHERS_COUNT**0.5 for keys in self._context_tokens_of(others)]
        return [torch.cat(parts, dim=1).contiguous() for parts in zip(own, beside, strict=True)]

    def _context_tokens_of(self, facts: Sequence[Fact]) -> list[Tensor]:
        return context_token_keys(self.loaded, facts, self.weights.names, self.encoder, self.max_tokens)

    def computing(self) -> LoadedModel:
        """The model, or a bfloat16 copy of it, with the edited weights as they stand."""
        if self.settings.compute != "bfloat16" or self.loaded.dtype == torch.bfloat16:
            return self.loaded
        if self._copy is None:
            self._copy = cast_copy(self.loaded, torch.bfloat16)
        for name in self.weights.names:
            architecture = self.loaded.architecture
            theirs, ours = (parameter_of(side.model, architecture, name) for side in (self._copy, self.loaded))
            theirs.copy_(ours)
        return self._copy

    @property
    def _carries(self) -> bool:
        """Whether each edited layer has a value of its own, which needs several that are reached through the residual stream."""
        return self.feed.values == "each" and len(set(self.layers)) > 1 and not self._inside

    @property
    def _target_layer(self) -> int:
        """The layer at whose output δ stands."""
        return self.layers[0] if self._carries else self.layers[-1]

    @property
    def _role(self) -> str:
        """Of the last edited matrix."""
        return self.loaded.architecture.role_of(self.weights.names[-1])

    @property
    def _inside(self) -> bool:
        """Whether δ is added to the MLP's output: where that is wanted, or is the one place at which one layer can meet a target."""
        layer = self.layers[-1]
        lone = set(self.layers) == {layer} and self.loaded.architecture.inside(layer, self._role)
        return lone or self.feed.site == "mlp"

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """``K [d_in, n]`` and ``R [d_out, n]`` for the edited matrix number ``index``."""
        reader = self._the_reader()
        keys, values = reader.keys_and_values(index)
        if index == len(self.layers) - 1 and not self.asked_again:
            self._reader = None
        shares = 1 if self._carries else len(self.layers) - index
        share = (self._wanted(index, values) - values) / (shares * self._factor(index))
        return keys, reader.residual(index, share)

    def _factor(self, index: int) -> float:
        """What the output of a matrix is multiplied with on its way to the value site."""
        return 1.0 if self._inside else self.loaded.architecture.named(self.weights.names[index]).factor

    def _wanted(self, index: int, values: Tensor) -> Tensor:
        """What the value site is to hold in each column: v*, or in every context what stood there before the batch, and δ.

        Where values are carried: what the matrix's own layer holds when δ is added at the first one's output.
        """
        if self._unedited is not None:
            return self._unedited
        if self._carries:
            if index == 0:
                self._of_layers = self._the_reader().carried(self.targets.deltas)
            return self._of_layers[self.layers[index]]
        if self.feed.contexts == "mean":
            return self.targets.values
        if index == 0:
            self._values = values + self._each_context(self.targets.deltas)
        return self._values

    def _each_context(self, deltas: Tensor) -> Tensor:
        """δ ``[d, n]`` in each of a fact's contexts, weighed as its key there is."""
        others = len(self.templates) - 1
        return interleaved(deltas.T, deltas.T.repeat_interleave(others, 0) if others else None).T

    def report(self) -> Report:
        """Losses before and after, and how likely the targets became; of anchored ones, which the descent never saw, only the former.

        Nothing of the unedited model's own values, which were not searched for.
        """
        if self._unedited is not None:
            return Report()
        losses = self.targets.losses
        if self.anchor is not None:
            return Report([loss[0] for loss in losses], evaluations=[len(loss) for loss in losses])
        return Report(
            [loss[0] for loss in losses],
            [loss[-1] for loss in losses],
            [values[-1] for values in self.targets.probabilities],
            [len(loss) for loss in losses],
        )


@dataclass(frozen=True)
class FromTargets(Feed):
    """Optimised targets v*, and keys at the subject's last token.

    Attributes:
        site: where δ is added: the layer's output, or its MLP's.
        contexts: a fact's key and value: their ``mean`` over the context templates (MEMIT), or those of ``each`` template in a column of
            its own.
        values: which layers' output is wanted: the ``last`` edited one's, of which each layer writes a share of what is still missing
            (MEMIT), or of ``each`` its own, that follows from δ at the first one's output and is written in full (FE, arXiv:2605.00358).
    """

    site: Literal["layer", "mlp"] = "layer"
    contexts: Literal["mean", "each"] = "mean"
    values: Literal["last", "each"] = "last"
    source: ClassVar[type[Source]] = OptimisedTargets
    at_subjects: ClassVar[bool] = True

    @property
    def words(self) -> str:
        """With the site."""
        return f"targets v* at the {'MLP' if self.site == 'mlp' else 'layer'}'s output"

    def one_layer(self, alone: bool) -> bool:
        """A target at an MLP's output can be reached from that layer alone."""
        return alone or self.site == "mlp"

    def columns(self, fact: Fact, encoder: Encoder, openers: int) -> int:
        """One for each form, or one for each form and context: the bare prompt, and each template."""
        each = 1 + 5 * openers if self.contexts == "each" else 1
        return each * len(written_forms([fact], encoder))

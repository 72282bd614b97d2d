"""What a method is: a pure function from a problem and its own explicit state to an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, cholesky_inverse

from sphere_edit.editing.ingredients import Needs, SecondMoment
from sphere_edit.editing.memory import Metric
from sphere_edit.editing.problem import LayerProblem, Seen, State, Statistics
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import Update


class Method(BaseModel, ABC):
    """An editing method; its fields are its hyperparameters.

    Methods never write weights, know nothing of transformers, and hold no hidden state: what they must remember from
    batch to batch is the ``State`` of each matrix, which the journal saves and restores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    paper: ClassVar[str]
    sphere: ClassVar[Sphere]
    max_batch: ClassVar[int | None] = None  # facts solved at one time; a larger batch is written in groups of so many
    dense: ClassVar[bool] = False  # whether its updates have no factors, and so are stored whole
    columnwise: ClassVar[bool] = (
        False  # whether column j of its updates is that of key j, so that a fact's share can be told
    )
    recheck: ClassVar[int] = 0  # earlier facts asked for each new one, to edit again what is forgotten
    repair: ClassVar[int] = 0  # steps at a stream's end that take back what it did to ordinary text
    one_fact_a_subject: ClassVar[bool] = False  # whether two facts of one subject are kept out of one batch
    by_experts: ClassVar[bool] = (
        True  # whether it can edit a layer of experts, one wide matrix with a block-diagonal C0
    )
    calibrated: ClassVar[bool] = False  # whether the first run on a model without known settings begins with `tune`
    targets: ClassVar[dict[str, Any]] = {}  # how its targets are found by default, where that is not as published
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("down",),)  # matrices it edits by default: the first set there is

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it feeds on, with these hyperparameters."""

    @classmethod
    def default_layers(cls, depth: int) -> tuple[int, ...]:
        """The layers it edits in a model of ``depth`` layers: five from 13 % of the depth (4–8 of 30)."""
        return layers_from(0.13, 5, depth)

    @property
    def learns(self) -> bool:
        """Whether its state learns anything from a batch."""
        return type(self).after_batch is not Method.after_batch

    @property
    def forgets(self) -> bool:
        """Whether it wants the keys of superseded facts taken out of its state."""
        return type(self).forget is not Method.forget

    def finish(self, update: Update, weight: Tensor) -> Update:
        """What becomes of a batch's ΔW once all layers are solved; ``weight`` is W before the batch."""
        return update

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """The state after a batch, a rewrite of forgotten facts included, given what the method's ingredients say of it."""
        return state

    def after_repair(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """The state after a repair, which writes no facts; asked only where an ingredient follows from the weights.

        It is no batch: whatever counts batches stands still.
        """
        return state

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """The state without some earlier ``keys [d_in, m]``, whose facts the coming batch supersedes."""
        return state

    def metric(self, state: State, statistics: Statistics) -> Metric | None:
        """M⁻¹ ``[d_in, d_in]`` of the keys that a repair is to leave alone: C0⁻¹, None for a method that asks nothing of ordinary keys.

        Of a layer of experts it is block-diagonal, ``[E, d_in, d_in]``, but for what is remembered of earlier keys.
        """
        return None if self.needs.get(SecondMoment) is None else cholesky_inverse(statistics.factor)

    def deploy(self, original: Tensor, working: Tensor) -> Tensor:
        """The weight the model runs with, from W0 and the working weight."""
        return working


class LayerwiseMethod(Method):
    """A method that solves one matrix after another, each with the weights below it as already edited."""

    @abstractmethod
    def solve(self, problem: LayerProblem, state: State) -> Update:
        """ΔW for one matrix, without SPHERE."""


class Objective(Protocol):
    """The loss of a batch of facts as a function of the edited matrices.

    Attributes:
        rounds: evaluations that take each fact once: one, or as many as there are minibatches, which follow one another.
    """

    @property
    def rounds(self) -> int:
        """See above."""

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss (nats, mean over facts) and its gradient by each matrix, at ``weights [d_out, d_in]`` by name."""


class JointMethod(Method):
    """A method that moves all its matrices at once, down a loss."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How often it evaluates the loss at most."""

    @abstractmethod
    def descend(self, objective: Objective, weights: Mapping[str, Tensor]) -> dict[str, Update]:
        """ΔW of every matrix, starting from ``weights``, without SPHERE."""


def layers_from(share: float, count: int, depth: int) -> tuple[int, ...]:
    """``count`` layers from ``share`` of the depth on, fewer in a shallow model, where the last layer is left alone."""
    first = min(int(share * depth + 0.5), depth - 1)
    return tuple(range(first, max(first + 1, min(first + count, depth - 1))))

"""What a method is: a pure function from a problem and its own explicit state to an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, cholesky_inverse

from sphere_edit.numerics.linalg import NullSpaceRule, grown_inverse, spd_factor
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import Update

_DRIFT = 1e-7

State = dict[str, Tensor]
Seen = dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What is known of a matrix's inputs before any edit; a method gets what it ``needs``, the rest is None."""

    second_moment: Tensor | None = None  # C0 [d_in, d_in]
    null_space: Tensor | None = None  # V [d_in, r], orthonormal columns; P = V Vᵀ
    anchor: Tensor | None = None  # [1]: how long targets are at the MLP's output (of the last edited matrix)

    @cached_property
    def factor(self) -> Tensor:
        """Cholesky factor of C0 (`spd_factor`), float64, found once."""
        assert self.second_moment is not None
        return spd_factor(self.second_moment)


@dataclass(frozen=True)
class LayerProblem:
    """One matrix, one batch: write ``residual`` at ``keys``.

    With optimised targets there is a column a fact (or a fact and context), and R is the share of v* − h that falls to this matrix. With
    gradients there is a column a target token, and R is the direction in which the loss falls, −∂loss/∂output.
    """

    weight: Tensor  # W [d_out, d_in] as it stands, float32
    keys: Tensor  # K [d_in, n]
    residual: Tensor  # R [d_out, n]
    statistics: Statistics
    bystanders: Tensor | None = None  # keys [d_in, m] at the prompts' other tokens, where the method needs them
    dominant: tuple[Tensor, Tensor] | None = None  # of W0, where the method needs them (`dominant_vectors`)


@dataclass(frozen=True)
class Needs:
    """What a method feeds on.

    Attributes:
        source: where its problems come from: ``targets`` v* found by optimisation and keys at the subject's last
            token, ``gradients`` of the target tokens from one backward pass, or the ``loss`` itself.
        site: where the δ of an optimised target is added: the layer's output, or its MLP's.
        statistics: what it asks of ordinary keys.
        null_space: how the null space is chosen, where that is what it asks.
        contexts: a fact's key and value: their ``mean`` over the context templates (MEMIT), or those of ``each`` template in a
            column of its own.
        remembers: what its state learns from each batch: the ``keys``, measured again once the batch is written, or
            the ``problem`` (keys and residuals) as it was solved; None for a method without a state.
        bystanders: that it is given the keys at all other tokens of each fact's prompt too, as they are before the batch, with
            the problem and to remember.
        anchored: that its targets, as the MLP's output, are as long as on the unedited model (`targets.anchored`).
        dominant: the share of ‖W0‖² whose singular vectors it is given with the problem.
        change: that it is told W − W0 of every matrix too, each time a batch has been written.
    """

    source: Literal["targets", "gradients", "loss"] = "targets"
    site: Literal["layer", "mlp"] = "layer"
    statistics: Literal["second_moment", "null_space"] | None = None
    null_space: tuple[NullSpaceRule, float] | None = None
    contexts: Literal["mean", "each"] = "mean"
    remembers: Literal["keys", "problem"] | None = None
    bystanders: bool = False
    anchored: bool = False
    dominant: float | None = None
    change: bool = False


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
    recheck: ClassVar[int] = 0  # earlier facts asked for each new one, to edit again what is forgotten
    repair: ClassVar[int] = 0  # steps at a stream's end that take back what it did to ordinary text
    apart: ClassVar[bool] = False  # whether two facts of one subject are kept out of one batch
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

    def finish(self, update: Update, weight: Tensor) -> Update:
        """What becomes of a batch's ΔW once all layers are solved; ``weight`` is W before the batch."""
        return update

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """The state after a batch, given what the method ``remembers`` of it."""
        return state

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """The state without some earlier ``keys [d_in, m]``, whose facts the coming batch supersedes."""
        return state

    def metric(self, state: State, statistics: Statistics) -> Tensor | None:
        """M⁻¹ ``[d_in, d_in]`` of the keys that a repair is to leave alone: C0⁻¹, None for a method that asks nothing of ordinary keys."""
        return None if self.needs.statistics is None else cholesky_inverse(statistics.factor)

    def deploy(self, original: Tensor, working: Tensor) -> Tensor:
        """The weight the model runs with, from W0 and the working weight."""
        return working


class LayerwiseMethod(Method):
    """A method that solves one matrix after another, each with the weights below it as already edited."""

    @abstractmethod
    def solve(self, problem: LayerProblem, state: State) -> Update:
        """ΔW for one matrix, without SPHERE."""


class Objective(Protocol):
    """The loss of a batch of facts as a function of the edited matrices."""

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


def memory(system: Tensor, inverse: Tensor) -> State:
    """The state of a method that must leave earlier keys alone: ``B + Kp Kpᵀ [d, d]`` and its inverse, float64.

    Both lie in memory as a checkpoint reads them, so that products round alike after it.
    """
    return {"system": system.contiguous(), "inverse": inverse.contiguous()}


def with_keys(state: State, keys: Tensor) -> State:
    """The `memory` with more ``keys [d, n]`` in it.

    The inverse takes a step of rank n, O(d² n). How far it has drifted is measured at these keys; beyond 1e-7 of
    their norm, which float32 updates would show, it is made afresh, O(d³).
    """
    keys = keys.double()
    system = state["system"] + keys @ keys.T
    inverse = grown_inverse(state["inverse"], keys)
    drift = (system @ (inverse @ keys) - keys).norm() / keys.norm()
    return memory(system, inverse if bool(drift < _DRIFT) else torch.cholesky_inverse(spd_factor(system)))


def without_keys(state: State, keys: Tensor) -> State:
    """The `memory` without some ``keys [d, m]`` that are in it; its inverse is made afresh, for a step back may cancel."""
    keys = keys.double()
    system = state["system"] - keys @ keys.T
    return memory(system, torch.cholesky_inverse(spd_factor(system)))


def layers_from(share: float, count: int, depth: int) -> tuple[int, ...]:
    """``count`` layers from ``share`` of the depth on, fewer in a shallow model, where the last layer is left alone."""
    first = min(int(share * depth + 0.5), depth - 1)
    return tuple(range(first, max(first + 1, min(first + count, depth - 1))))

"""What a method is: a pure function from a layer's problem and its own explicit state to an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sphere_edit.numerics.linalg import NullSpaceRule
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import Update

State = dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What is known of a matrix's inputs before any edit; a method gets what it ``needs``, the rest is None."""

    second_moment: Tensor | None = None  # C0 [d_in, d_in]
    null_space: Tensor | None = None  # V [d_in, r], orthonormal columns; P = V Vᵀ


@dataclass(frozen=True)
class LayerProblem:
    """One matrix, one batch of n facts: write ``residual`` at ``keys``."""

    weight: Tensor  # W [d_out, d_in] as it stands, float32
    original: Tensor  # W0 [d_out, d_in] before the first edit, float32
    keys: Tensor  # K [d_in, n]
    residual: Tensor  # R [d_out, n]
    statistics: Statistics


@dataclass(frozen=True)
class Needs:
    """What a method feeds on."""

    source: Literal["targets"] = "targets"
    statistics: Literal["second_moment", "null_space"] | None = None


class Method(BaseModel, ABC):
    """An editing method; its fields are its hyperparameters.

    Methods never write weights, know nothing of transformers, and hold no hidden state: what they must remember from
    batch to batch is the ``State`` of each matrix, which the journal saves and restores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Needs]
    modules: ClassVar[str] = "down"
    max_batch: ClassVar[int | None] = None
    sphere: ClassVar[Sphere]

    @abstractmethod
    def solve(self, problem: LayerProblem, state: State) -> Update:
        """ΔW for one matrix, without SPHERE."""

    def after_batch(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """The state after a batch, given its ``keys [d_in, n]`` as measured once all its updates are written."""
        return state

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """The state without some earlier ``keys [d_in, m]``, whose facts the coming batch supersedes."""
        return state

    def deploy(self, original: Tensor, working: Tensor) -> Tensor:
        """The weight the model runs with, from W0 and the working weight."""
        return working

    def null_space_rule(self) -> tuple[NullSpaceRule, float] | None:
        """How the null space this method needs is chosen."""
        return None

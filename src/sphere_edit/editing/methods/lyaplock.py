"""LyapLock: preservation held under a bound by a virtual queue (Wang et al. 2025, EMNLP)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sphere_edit.editing.ingredients import EarlierKeys, Needs, SecondMoment, WeightChange
from sphere_edit.editing.methods.base import LayerProblem, LayerwiseMethod, Seen, State, Statistics
from sphere_edit.editing.sources import FromTargets
from sphere_edit.numerics.linalg import spd_solve
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import DenseUpdate


class LyapLock(LayerwiseMethod):
    """``ΔW = (R Kᵀ − q λ (W − W0) C0 + E) (K Kᵀ + q λ C0 + Kp Kpᵀ)⁻¹``: what was written stays, and ordinary keys as far as q says.

    E is what earlier keys have lost since they were written, ``Σ (W_s − W) K_s K_sᵀ``, W_s being the weight after batch s. Once a
    batch is written the queue becomes ``q ← max(q + ‖(W − W0) C0^½‖² / D − 1, 1)``, with the bound D ``budget`` times the
    first batch's disturbance: while the disturbance exceeds its bound, ordinary keys count for more and more. The queue counts batches that
    write facts. A repair writes none, so q stays as it is and only E and W − W0 follow the weights. Source: the published code
    of "LyapLock: Bounded Knowledge Preservation in Sequential LLM Editing". Kp are keys measured after their batch, as elsewhere here.
    State: ``keys = Kp Kpᵀ [d_in, d_in]``, ``lost = E`` and ``change = W − W0`` ``[d_out, d_in]``, ``queue`` and ``bound [1]``.
    """

    name: ClassVar[str] = "lyaplock"
    paper: ClassVar[str] = "Wang et al. 2025, EMNLP, LyapLock"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.5, basis="pretrained", project="per_layer")
    dense: ClassVar[bool] = True
    by_experts: ClassVar[bool] = (
        False  # its system of earlier keys is d_in × d_in, with a weight that changes from batch to batch
    )

    second_moment_weight: float = Field(1000.0, gt=0, description="λ, the weight of C0 against the batch's keys")
    budget: float = Field(60.0, gt=0, description="α, the bound on the disturbance in units of the first batch's")

    @property
    def needs(self) -> Needs:
        """Optimised targets, C0, and after every batch its keys and how far the weight has moved."""
        return Needs(FromTargets(), (SecondMoment(), EarlierKeys(), WeightChange()))

    def solve(self, problem: LayerProblem, state: State) -> DenseUpdate:
        """ΔW in float64."""
        keys = problem.keys.double()
        moment = _moment(problem.statistics) * self.second_moment_weight
        wanted, system = problem.residual.double() @ keys.T, keys @ keys.T
        if state:
            moment = moment * state["queue"]
            wanted = wanted - state["change"].double() @ moment + state["lost"]
            system = system + state["keys"]
        return DenseUpdate(spd_solve(system + moment, wanted.T).T)

    def after_batch(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """What earlier keys have lost now, the batch's keys among them, and the queue."""
        keys, change = seen["keys"].double(), seen["change"]
        disturbance = ((change.double() @ _moment(statistics)) * change.double()).sum()[None]
        gram = keys @ keys.T
        if not state:
            start: dict[str, Any] = {"lost": torch.zeros_like(change, dtype=torch.float64), "queue": gram.new_ones(1)}
            return {**start, "keys": gram, "change": change, "bound": self.budget * disturbance}
        queue = (state["queue"] + disturbance / state["bound"] - 1).clamp_min(1)
        return {**_moved(state, change), "queue": queue, "keys": state["keys"] + gram}

    def after_repair(self, state: State, seen: Seen, statistics: Statistics) -> State:
        """What earlier keys have lost now; the queue stands still."""
        return _moved(state, seen["change"]) if state else state

    def forget(self, state: State, keys: Tensor, statistics: Statistics) -> State:
        """Superseded keys count no more, nor what was lost along them (the published code knows no superseding)."""
        old = keys.double()
        along = spd_solve(old.T @ old, (state["lost"] @ old).T).T @ old.T
        return {**state, "keys": state["keys"] - old @ old.T, "lost": state["lost"] - along}


def _moved(state: State, change: Tensor) -> State:
    """The state once W − W0 is ``change``: what earlier keys have lost includes what they lost on the way."""
    step = change.double() - state["change"].double()
    return {**state, "lost": state["lost"] - step @ state["keys"], "change": change}


def _moment(statistics: Statistics) -> Tensor:
    return statistics["second_moment"].double()

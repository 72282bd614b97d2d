"""Compensated projection: what a projection took away from a batch is carried into the next solve (OTE–SE, arXiv:2605.26670).

A method whose system grows by each batch's keys, ``C_t = C_{t−1} + K_t K_tᵀ``, writes ``Δ_t = R_t K_tᵀ C_t⁻¹``: batch after batch, that adds up to the
solution that all facts would have at one time. What is left of it after SPHERE or RECT, ``Δ̃_t``, does not. OTE–SE carries the error over,

    Δ_{t+1} = (R_{t+1} K_{t+1}ᵀ + c L_t C_t) C_{t+1}⁻¹,   L_t = Δ_t − Δ̃_t,

with c = 1 there. Since ``C_t = C_{t+1} − K_{t+1} K_{t+1}ᵀ`` that is ``(R − c L_t K) Kᵀ C_{t+1}⁻¹ + c L_t``: what was taken away is given back, and the batch is solved
for what its facts lack then. So no method has to know of it. By induction ``Σ Δ̃_t + L_T`` is the one-time solution for c = 1, whatever the projection: with
SPHERE's fixed directions and α < 1 what is missing after many batches is a part of the last few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sphere_edit.editing.problem import LayerProblem
from sphere_edit.numerics.experts import by_expert, experts_of, wide
from sphere_edit.numerics.update import DenseUpdate, Update, joined

TAKEN = "taken_away"  # L of a batch among what is stored with it


class Compensation:
    """What was taken away from the last batch, by matrix, and how much of it the next one gets back.

    Attributes:
        share: c, from 0 (none) to 1 (all).
        taken: L ``[d_out, d_in]`` (or by expert) of each matrix, float32; empty before the first batch.
    """

    def __init__(self, share: float):
        self.share = share
        self.taken: dict[str, Tensor] = {}

    def given_back(self) -> dict[str, Tensor]:
        """c L of each matrix, wide, in float64; nothing where nothing is carried."""
        return {name: self.share * wide(taken).double() for name, taken in self.taken.items()} if self.share else {}

    def left_of(self, solved: Mapping[str, Update], written: Mapping[str, Update]) -> dict[str, Tensor]:
        """L of a batch: ΔW as it was solved less ΔW as it was written, by matrix; nothing where nothing is carried."""
        if not self.share:
            return {}
        return {name: (solved[name].dense().double() - written[name].dense().double()).float() for name in written}


def lacking(problem: LayerProblem, back: Tensor | None) -> LayerProblem:
    """The problem once ``back [d_out, d_in]`` is given back: its residual is what the keys lack then."""
    if back is None:
        return problem
    return replace(problem, residual=problem.residual.double() - back @ problem.keys.double())


def with_back(update: Update, back: Tensor | None, weight: Tensor) -> Update:
    """An update, by expert as ``weight`` is, and what is given back with it."""
    return update if back is None else joined([update, DenseUpdate(by_expert(back, experts_of(weight)))])

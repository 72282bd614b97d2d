"""What a method remembers of earlier keys: ``B + Kp Kpᵀ`` of a matrix's inputs, and its inverse.

Of an ordinary matrix both are kept as ``[d, d]``, float64. Of a layer of experts, whose joint keys are ``E · d`` long, B is
block-diagonal and Kp is kept as it is: what is kept is B⁻¹ ``[E, d, d]`` and Kp ``[E · d, m]``, and the inverse is applied by Woodbury's
identity, exactly. So nothing is ever ``[E · d]²``, and keys of one expert act on another's as far as one fact has both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_edit.editing.problem import State
from sphere_edit.numerics.experts import by_expert, times, wide
from sphere_edit.numerics.linalg import capacitance, grown_inverse, spd_factor, spd_solve

_DRIFT = 1e-7
_SAME = 1e-6  # relative distance up to which two keys are one: they are read from float32, and projected again


def memory(system: Tensor, inverse: Tensor) -> State:
    """The memory before any key: B ``[d, d]`` (or ``[E, d, d]``) and its inverse, float64.

    They lie in memory as a checkpoint reads them, so that products round alike after it.
    """
    if system.dim() == 3:
        return {"inverse": inverse.contiguous(), "columns": inverse.new_zeros(inverse.shape[:-1].numel(), 0)}
    return {"system": system.contiguous(), "inverse": inverse.contiguous()}


def recalled(state: State, keys: Tensor) -> Tensor:
    """``(B + Kp Kpᵀ)⁻¹ keys`` for ``keys [d, n]``, float64."""
    solved = times(state["inverse"], keys)
    earlier = state.get("columns")
    if earlier is None or earlier.shape[1] == 0:
        return solved
    theirs = times(state["inverse"], earlier)
    return solved - theirs @ spd_solve(capacitance(theirs, earlier), earlier.T @ solved)


def with_keys(state: State, keys: Tensor) -> State:
    """The memory with more ``keys [d, n]`` in it.

    The inverse of an ordinary matrix's takes a step of rank n, O(d² n). How far it has drifted is measured at these keys; beyond 1e-7 of
    their norm, which float32 updates would show, it is made afresh, O(d³).
    """
    keys = keys.double()
    if "columns" in state:
        return {**state, "columns": torch.cat([state["columns"], keys], dim=1)}
    system = state["system"] + keys @ keys.T
    inverse = grown_inverse(state["inverse"], keys)
    drift = (system @ (inverse @ keys) - keys).norm() / keys.norm()
    return memory(system, inverse if bool(drift < _DRIFT) else torch.cholesky_inverse(spd_factor(system)))


def without_keys(state: State, keys: Tensor) -> State:
    """The memory without some ``keys [d, m]`` that are in it; an inverse is made afresh, for a step back may cancel."""
    keys = keys.double()
    if "columns" in state:
        return {**state, "columns": _without(state["columns"], keys)}
    system = state["system"] - keys @ keys.T
    return memory(system, torch.cholesky_inverse(spd_factor(system)))


def _without(columns: Tensor, gone: Tensor) -> Tensor:
    """The columns but those that are ``gone``, each of which is there.

    Raises:
        ValueError: one is not.
    """
    kept = columns
    for key in gone.unbind(1):
        distances = (kept - key[:, None]).norm(dim=0)
        nearest = int(distances.argmin()) if kept.shape[1] else -1
        if nearest < 0 or float(distances[nearest]) > _SAME * float(key.norm()):
            raise ValueError("a key that is to be forgotten was never remembered")
        kept = torch.cat([kept[:, :nearest], kept[:, nearest + 1 :]], dim=1)
    return kept


@dataclass(frozen=True)
class WideMetric:
    """``(B + Kp Kpᵀ)⁻¹ = B⁻¹ − H Hᵀ`` of a layer of experts: ``inverse`` is B⁻¹ ``[E, d, d]``, ``half`` is H ``[E · d, m]``."""

    inverse: Tensor
    half: Tensor

    def float(self) -> WideMetric:
        """The same in float32."""
        return WideMetric(self.inverse.float(), self.half.float())


Metric = Tensor | WideMetric


def metric_of(state: State, factor: float) -> Metric:
    """``factor (B + Kp Kpᵀ)⁻¹``."""
    if "columns" not in state:
        return factor * state["inverse"]
    solved = times(state["inverse"], state["columns"])
    root = spd_factor(capacitance(solved, state["columns"]))
    half = torch.linalg.solve_triangular(root, solved.T, upper=False).T
    return WideMetric(factor * state["inverse"], factor**0.5 * half)


def in_metric(gradient: Tensor, metric: Metric | None) -> Tensor:
    """``gradient M⁻¹`` for a gradient ``[d_out, d_in]``, or by expert ``[E, d_out, d_in]``; without a metric the gradient itself."""
    if metric is None:
        return gradient
    if isinstance(metric, Tensor):
        return gradient @ metric
    along = (wide(gradient) @ metric.half) @ metric.half.T
    return gradient @ metric.inverse - by_expert(along, len(gradient))

"""What a method remembers of earlier keys: ``B + Kp Kpᵀ`` of a matrix's inputs, and its inverse.

Of an ordinary matrix both are kept as ``[d, d]``, float64. Of a layer of experts, whose joint keys are ``E · d`` long, B is
block-diagonal and the keys are kept as they are, without the experts that a key's token is not routed to. The inverse is applied by
Woodbury's identity, exactly. So nothing is ever ``[E · d]²``, and keys of one expert act on another's as far as one token has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sphere_edit.editing.problem import State
from sphere_edit.numerics.experts import times
from sphere_edit.numerics.linalg import factor_solve, grown_inverse, spd_factor

_DRIFT = 1e-7
_SAME = 1e-6  # relative distance up to which two keys are one: they are read from float32, and projected again


def memory(system: Tensor, inverse: Tensor) -> State:
    """The memory before any key: B ``[d, d]`` (or ``[E, d, d]``) and its inverse, float64.

    They lie in memory as a checkpoint reads them, so that products round alike after it. Of a layer of experts it is B⁻¹ and, of every
    pair of a key and an expert it is routed to, ``values [pairs, d]`` and ``places [2, pairs]``, the expert's number and the key's.
    """
    if system.dim() == 3:
        none = torch.zeros(2, 0, dtype=torch.long, device=inverse.device)
        values, count = inverse.new_zeros(0, inverse.shape[-1]), torch.zeros(1, dtype=torch.long, device=inverse.device)
        return {"inverse": inverse.contiguous(), "values": values, "places": none, "count": count}
    return {"system": system.contiguous(), "inverse": inverse.contiguous()}


def recalled(state: State, keys: Tensor) -> Tensor:
    """``(B + Kp Kpᵀ)⁻¹ keys`` for ``keys [d, n]``, float64."""
    solved = times(state["inverse"], keys)
    if "places" not in state or int(state["count"]) == 0:
        return solved
    grown = _Grown.of(state)
    return (_blocks(solved, len(state["inverse"])) - grown.correction(_blocks(keys, len(state["inverse"])))).flatten(
        0, 1
    )


def with_keys(state: State, keys: Tensor) -> State:
    """The memory with more ``keys [d, n]`` in it.

    The inverse of an ordinary matrix's takes a step of rank n, O(d² n). How far it has drifted is measured at these keys; beyond 1e-7 of
    their norm, which float32 updates would show, it is made afresh, O(d³).
    """
    keys = keys.double()
    if "places" in state:
        return _with_columns(state, keys)
    system = state["system"] + keys @ keys.T
    inverse = grown_inverse(state["inverse"], keys)
    drift = (system @ (inverse @ keys) - keys).norm() / keys.norm()
    return memory(system, inverse if bool(drift < _DRIFT) else torch.cholesky_inverse(spd_factor(system)))


def without_keys(state: State, keys: Tensor) -> State:
    """The memory without some ``keys [d, m]`` that are in it; an inverse is made afresh, for a step back may cancel."""
    keys = keys.double()
    if "places" in state:
        return _without_columns(state, keys)
    system = state["system"] - keys @ keys.T
    return memory(system, torch.cholesky_inverse(spd_factor(system)))


# --- of a layer of experts ----------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The earlier keys that reach one expert: its number, which keys ``[t]``, and their parts ``[d, t]``."""

    expert: int
    columns: Tensor
    keys: Tensor


def _parts(state: State) -> Iterator[_Part]:
    experts, columns = state["places"]
    for expert in range(len(state["inverse"])):
        here = (experts == expert).nonzero().flatten()
        if len(here):
            yield _Part(expert, columns[here], state["values"][here].T)


def _blocks(columns: Tensor, experts: int) -> Tensor:
    """Columns ``[E · d, n]`` by expert, ``[E, d, n]``."""
    return columns.unflatten(0, (experts, -1))


def _with_columns(state: State, keys: Tensor) -> State:
    by_expert = _blocks(keys, len(state["inverse"])).mT
    touched = by_expert.any(-1)
    experts, columns = touched.nonzero().T
    places = torch.stack([experts, columns + state["count"]])
    return {
        "inverse": state["inverse"],
        "values": torch.cat([state["values"], by_expert[touched]]),
        "places": torch.cat([state["places"], places], dim=1),
        "count": state["count"] + keys.shape[1],
    }


def _without_columns(state: State, gone: Tensor) -> State:
    """The memory without the keys ``gone``, each of which is there.

    Raises:
        ValueError: one is not.
    """
    products = gone.new_zeros(int(state["count"]), gone.shape[1])
    lengths = gone.new_zeros(int(state["count"]))
    theirs = _blocks(gone, len(state["inverse"]))
    for expert, columns, keys in _parts(state):
        products[columns] += keys.T @ theirs[expert]
        lengths[columns] += keys.square().sum(0)
    distances = lengths[:, None] - 2 * products + gone.square().sum(0)
    kept = torch.ones_like(lengths, dtype=torch.bool)
    for number, size in enumerate(gone.square().sum(0)):
        left = torch.where(kept, distances[:, number], torch.inf)
        nearest = int(left.argmin()) if len(left) else -1
        if nearest < 0 or not float(left[nearest]) <= _SAME**2 * float(size):
            raise ValueError("a key that is to be forgotten was never remembered")
        kept[nearest] = False
    experts, columns = state["places"]
    stays = kept[columns]
    places = torch.stack([experts, kept.long().cumsum(0)[columns] - 1])[:, stays]
    return {
        "inverse": state["inverse"],
        "values": state["values"][stays],
        "places": places,
        "count": kept.sum()[None],
    }


@dataclass(frozen=True)
class _Grown:
    """``B⁻¹ − (B + Kp Kpᵀ)⁻¹ = B⁻¹Kp (I + Kpᵀ B⁻¹ Kp)⁻¹ Kpᵀ B⁻¹``, by expert and never formed.

    Attributes:
        parts: of each expert, ``B⁻¹ Kp`` in place of the keys.
        factor: Cholesky factor of ``I + Kpᵀ B⁻¹ Kp [m, m]``.
    """

    parts: tuple[_Part, ...]
    factor: Tensor

    @classmethod
    def of(cls, state: State) -> _Grown:
        count = int(state["count"])
        inner = torch.eye(count, dtype=state["inverse"].dtype, device=state["inverse"].device)
        parts = []
        for expert, columns, keys in _parts(state):
            solved = state["inverse"][expert] @ keys
            product = keys.T @ solved
            inner[columns[:, None], columns] += (product + product.T) / 2
            parts.append(_Part(expert, columns, solved))
        return cls(tuple(parts), spd_factor(inner))

    def correction(self, columns: Tensor) -> Tensor:
        """It times ``columns [E, d, n]``, as they are given, in float64."""
        given, found = columns.double(), torch.zeros_like(columns, dtype=torch.float64)
        along = given.new_zeros(len(self.factor), given.shape[-1])
        for expert, places, solved in self.parts:
            along[places] += solved.T @ given[expert]
        within = factor_solve(self.factor, along)
        for expert, places, solved in self.parts:
            found[expert] = solved @ within[places]
        return found


@dataclass(frozen=True)
class WideMetric:
    """``factor (B + Kp Kpᵀ)⁻¹`` of a layer of experts: ``inverse`` is B⁻¹ ``[E, d, d]``."""

    inverse: Tensor
    grown: _Grown
    factor: float


Metric = Tensor | WideMetric


def metric_of(state: State, factor: float) -> Metric:
    """``factor (B + Kp Kpᵀ)⁻¹``."""
    if "places" not in state:
        return factor * state["inverse"]
    return WideMetric(state["inverse"], _Grown.of(state), factor)


def single(metric: Metric | None) -> Metric | None:
    """What is large of it in float32."""
    if isinstance(metric, WideMetric):
        return WideMetric(metric.inverse.float(), metric.grown, metric.factor)
    return None if metric is None else metric.float()


def in_metric(gradient: Tensor, metric: Metric | None) -> Tensor:
    """``gradient M⁻¹`` for a gradient ``[d_out, d_in]``, or by expert ``[E, d_out, d_in]``; without a metric the gradient itself."""
    if metric is None:
        return gradient
    if isinstance(metric, Tensor):
        return gradient @ metric
    corrected = metric.grown.correction(gradient.mT).mT.to(gradient.dtype)
    return metric.factor * (gradient @ metric.inverse - corrected)

"""RECT: relative-change-threshold editing (Gu et al. 2024, arXiv:2401.04700)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from sphere_edit.editing.methods.memit import Memit
from sphere_edit.numerics.projection import Sphere
from sphere_edit.numerics.update import DenseUpdate, Update


class Rect(Memit):
    """MEMIT's ΔW, of which once all layers are solved only the entries with the largest ``|ΔW / W|`` stay.

    Source: arXiv:2401.04700, section 5, with the 40 % and the order (RECT, then SPHERE) of SPHERE's code, whose
    threshold, the largest of those below, stays too: one entry more than the share.
    """

    name: ClassVar[str] = "rect"
    paper: ClassVar[str] = "Gu et al. 2024, arXiv:2401.04700"
    sphere: ClassVar[Sphere] = Sphere(eta=0.5, alpha=0.8, basis="current", project="after_all")
    dense: ClassVar[bool] = True
    columnwise: ClassVar[bool] = False

    keep: float = Field(0.4, gt=0, le=1, description="share of ΔW's entries that stay: those with the largest |ΔW / W|")

    def finish(self, update: Update, weight: Tensor) -> DenseUpdate:
        """ΔW with its relatively smallest entries set to zero; ``weight [d_out, d_in]`` is W before the batch."""
        delta = update.dense()
        relative = (delta / (weight.to(delta.dtype) + 1e-8)).abs()
        rank = max(1, round((1 - self.keep) * delta.numel()))
        threshold = relative.flatten().kthvalue(rank).values
        return DenseUpdate(torch.where(relative >= threshold, delta, torch.zeros_like(delta)))

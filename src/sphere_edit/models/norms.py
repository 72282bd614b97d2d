"""A norm between an MLP's output and the residual stream: what it must be given so that it says what is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sphere_edit.models.configuration import text_config
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.sites import parameter_of
from sphere_edit.numerics.normalised import nearest_normalised

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_LARGE = 32.0  # of numbers beside which what a norm adds to a mean of squares (1e-5, 1e-6) is nothing


@dataclass(frozen=True, eq=False)
class Norm:
    """A module that says ``w ⊙ x / rms(x)``, x a token's vector, whatever it calls its weight and makes of it (Gemma adds 1).

    Attributes:
        weight: w ``[d]``, float64.
    """

    module: nn.Module
    weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, width: int, like: Tensor) -> Norm | None:
        """What a module does to vectors of ``width`` numbers, told by trying it; None if it is no such norm.

        LayerNorm is none: it takes off the mean. No family has one there.

        Args:
            like: a tensor of the dtype and the device that it is called with.
        """
        generator = torch.Generator().manual_seed(width)
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        tried = torch.cat([signs[None], torch.randn(3, width, generator=generator).double() + 0.5]) * _LARGE
        try:
            said = module(tried.to(like.device, like.dtype)[None])
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return None
        if not isinstance(said, Tensor) or said.shape != (1, *tried.shape):
            return None
        said = said[0].double()
        weight = said[0] * signs.to(said.device)
        rows = tried.to(like.dtype).double().to(said.device)
        expected = weight * rows / rows.square().mean(1, keepdim=True).sqrt()
        near = float((said - expected).norm()) <= _TOLERANCES.get(like.dtype, 2e-2) * float(expected.norm())
        return cls(module, weight) if near and bool((weight != 0).any()) else None

    @torch.no_grad()
    def change(self, given: Tensor, wanted: Tensor) -> Tensor:
        """What to add to ``given [d, n]``, so that the norm says, as nearly as it can, ``wanted [d, n]`` more than it does; float32.

        The length stays: the vectors that it may be given then are those of one sphere, on which the norm is linear.
        """
        x = given.double()
        said = self.module(given.T.to(self._dtype)).T.double()
        weighed = self.weight[:, None] * x
        squares = weighed.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        scale = (weighed * said).sum(0) / squares  # 1 / rms, with what the norm adds to it
        length = scale * x.norm(dim=0)
        reached = nearest_normalised(self.weight, scale * weighed + wanted.double(), length)
        return (reached / scale - x).float()

    @property
    def _dtype(self) -> torch.dtype:
        parameter = next(self.module.parameters(), None)
        return torch.float32 if parameter is None else parameter.dtype


def norm_after(loaded: LoadedModel, name: str) -> Norm | None:
    """The norm behind the edited matrix ``name``, if there is one (`Matrix.after`)."""
    module = loaded.architecture.norm_after(loaded.model, name)
    if module is None:
        return None
    like = parameter_of(loaded.model, loaded.architecture, name)
    found = Norm.of(module, text_config(loaded.model).hidden_size, like)
    assert found is not None, f"what stands behind {name} is no norm"
    return found

"""Where an edited matrix stands in the model, and what enters it: a module's weight and input, or a 3-D parameter and its joint keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sphere_edit.models.architecture import Architecture
from sphere_edit.models.experts import JointKeys, is_experts

Keys = Tensor | JointKeys  # of a batch, indexed as [B, S, d_in]


def module_of(model: nn.Module, architecture: Architecture, name: str) -> nn.Module:
    """The module that computes with the matrix ``name``: its own, or the one of all experts."""
    return model.get_submodule(name.rpartition(".")[0] if architecture.named(name).experts else name)


def parameter_name(architecture: Architecture, name: str) -> str:
    """The full name of the parameter that holds the matrix ``name``."""
    return name if architecture.named(name).experts else f"{name}.weight"


def parameter_of(model: nn.Module, architecture: Architecture, name: str) -> Tensor:
    """The parameter that holds the matrix ``name``, as it is stored."""
    owner, _, last = parameter_name(architecture, name).rpartition(".")
    found = getattr(model.get_submodule(owner), last)
    assert isinstance(found, Tensor)
    return found


def entering(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, int]) -> Keys:
    """What enters the edited matrix of a module that is called with ``args``, on a batch of ``shape`` rows and columns."""
    if is_experts(module):
        return JointKeys(module, [*args, *kwargs.values()], shape)
    hidden = (args[0] if args else next(iter(kwargs.values()))).detach()
    return folded(hidden, shape[0])


def folded(rows: Tensor, batch: int) -> Tensor:
    """A module's rows as ``[B, S, d]``: some are given, and give, all tokens in one ``[B · S, d]`` (OPT, shared experts)."""
    return rows.unflatten(0, (batch, -1)) if rows.dim() == 2 else rows

"""A model that accelerate has spread: its parameters where they are, those that lie elsewhere than they are computed with included.

accelerate leaves a parameter that is offloaded without storage (device ``meta``), and brings it in for the call of its module
(`accelerate.hooks.AlignDevicesHook`). Whoever reads or writes a parameter outside of such a call goes through this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def home(module: nn.Module) -> torch.device:
    """Where a module with parameters of its own computes, and so where what it is given has to be."""
    parameter = next(module.parameters())
    if not parameter.is_meta:
        return parameter.device
    owner = next(one for one in module.modules() if next(one.parameters(recurse=False), None) is not None)
    return torch.device(_hook(owner).execution_device)


def fetched(module: nn.Module, name: str) -> Tensor:
    """The parameter ``name`` of a module itself, brought in if it is offloaded."""
    parameter: Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    found: Tensor = _hook(module).weights_map[name]
    return found.to(parameter.dtype)


def hold(module: nn.Module) -> None:
    """Keep all parameters of a module from now on where it computes with them."""
    for one in module.modules():
        hook = _hook(one)
        if hook is None or not hook.offload:
            continue
        for name, parameter in list(one.named_parameters(recurse=False)):
            value = fetched(one, name).to(hook.execution_device, copy=True)
            one.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        hook.offload = False


def hold_vectors(model: nn.Module) -> None:
    """Keep what is small: modules whose parameters are all vectors (norms), which cost more to fetch than to keep."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.dim() < 2 for parameter in own) and not list(module.children()):
            hold(module)


class Stored(Mapping[str, Tensor]):
    """A model's parameters and persistent buffers as ``state_dict`` has them, each fetched when it is asked for."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = model.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._names[name]
        owner, _, last = name.rpartition(".")
        return fetched(self._model.get_submodule(owner), last) if found.is_meta else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def shared_maps(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: what offloaded weights are fetched from, which a copy shares."""
    hooks = [hook for hook in map(_hook, model.modules()) if hook is not None]
    shared = [hook.tied_params_map for hook in hooks]
    shared += [hook.weights_map.dataset for hook in hooks if hook.weights_map is not None]
    return {id(one): one for one in shared if one is not None}


def _hook(module: nn.Module) -> Any:
    """accelerate's hook of a module; None where it has none."""
    return getattr(module, "_hf_hook", None)

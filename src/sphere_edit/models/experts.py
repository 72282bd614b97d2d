"""Joint keys of a layer of experts: what enters each expert's last matrix, times the router's weight.

In transformers the experts of a layer are one module with 3-D parameters (`transformers.integrations.moe`). It is called with the hidden
states of all tokens, each token's experts and their weights; gate and up run inside it, so no hook sees a key. Keys are therefore computed
here from what the module was called with, by its own activation, and only for the tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError

_FIRST = ("gate_up_proj", "up_proj")  # what the hidden states meet first is called, in transformers' experts


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer: one matrix of each in a 3-D parameter."""
    return any(parameter.dim() == 3 for name, parameter in module.named_parameters(recurse=False) if name in _FIRST)


def why_not(experts: nn.Module) -> str | None:
    """Why the experts of this module cannot be edited; None if they can."""
    if getattr(experts, "has_post_expert_norm", False):
        return "each expert's output is normalised before the router weighs it"
    if not is_experts(experts):
        return f"{type(experts).__name__} holds no 3-D parameter named {' or '.join(_FIRST)}"
    return None


class JointKeys:
    """The joint keys ``[g_1 k_1; …; g_E k_E]`` of a batch, to be indexed as a tensor ``[B, S, E · d_in]`` would be; float32.

    Where a module is given nothing but hidden states (Llama 4), they are those of every token for every expert in turn, already times the
    router's weight, and zero where the token is not routed.

    Args:
        experts: the module.
        called: its positional arguments: hidden states ``[B · S, d]``, expert numbers and weights ``[B · S, k]``.
        shape: B and S.
    """

    def __init__(self, experts: nn.Module, called: Sequence[Tensor], shape: tuple[int, int]):
        self._experts = experts
        self.count = len(experts.get_parameter(_first_of(experts)))
        tokens = shape[0] * shape[1]
        hidden = called[0].detach()
        self._places = torch.arange(tokens, device=hidden.device).view(shape)
        if len(called) == 1:
            self._hidden = hidden.reshape(self.count, tokens, -1).clone()
            self._numbers = self._weights = None
        else:
            self._hidden = hidden.reshape(tokens, -1).clone()
            self._numbers, self._weights = (part.detach().reshape(tokens, -1).clone() for part in called[1:3])

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self._hidden.device

    @torch.no_grad()
    def __getitem__(self, where: Any) -> Tensor:
        places = self._places[where]
        nothing = self._inner(0, self._hidden.reshape(-1, self._hidden.shape[-1])[:0]).float()
        found = nothing.new_zeros(places.numel(), self.count, nothing.shape[1])
        routed = False
        for expert, rows, keys in self.by_expert(where):
            found[rows, expert], routed = keys, True
        if places.numel() and not routed:
            raise SphereEditError("no token of these is routed to any expert")
        return found.view(*places.shape, self.count * nothing.shape[1])

    @torch.no_grad()
    def by_expert(self, where: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each expert that some of the tokens are routed to: its number, which of them ``[m]``, and its part of their keys ``[m, d_in]``."""
        tokens = self._places[where].flatten()
        for expert in range(self.count):
            if self._numbers is None or self._weights is None:
                hidden = self._hidden[expert, tokens]
                rows = hidden.any(-1).nonzero().flatten()
                keys = self._inner(expert, hidden[rows]).float()
            else:
                rows, slots = (self._numbers[tokens] == expert).nonzero(as_tuple=True)
                weights = self._weights[tokens[rows], slots].float()
                keys = self._inner(expert, self._hidden[tokens[rows]]).float() * weights[:, None]
            if len(rows):
                yield expert, rows, keys

    def routes(self, where: Any) -> Tensor:
        """Which experts some tokens are routed to, ``[…, E]``."""
        places = self._places[where]
        if self._numbers is None:
            return self._hidden[:, places].any(-1).movedim(0, -1)
        chosen = torch.zeros(*places.shape, self.count + 1, dtype=torch.bool, device=places.device)
        return chosen.scatter_(-1, self._numbers[places].clamp_max(self.count).long(), True)[..., : self.count]

    def _inner(self, expert: int, hidden: Tensor) -> Tensor:
        """What enters an expert's last matrix ``[m, d_in]``, before the router's weight."""
        module: Any = self._experts
        name = _first_of(module)
        weight = module.get_parameter(name)[expert]
        transposed = getattr(module, "is_transposed", weight.shape[0] == hidden.shape[-1] != weight.shape[1])
        projected = hidden @ (weight if transposed else weight.T)
        if getattr(module, "has_bias", False):
            projected = projected + module.get_parameter(f"{name}_bias")[expert]
        if hasattr(module, "_apply_gate") and name == "gate_up_proj":
            found: Tensor = module._apply_gate(projected)
            return found
        activated: Callable[[Tensor], Tensor] = module.act_fn
        if name == "up_proj":
            return activated(projected)
        gate, up = projected.chunk(2, dim=-1)
        return up * activated(gate)


def _first_of(experts: nn.Module) -> str:
    """The name of the parameter that the hidden states meet first."""
    return next(name for name in _FIRST if hasattr(experts, name))

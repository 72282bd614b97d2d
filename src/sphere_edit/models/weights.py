"""The matrices under edit: float32 masters as ``[d_out, d_in]``, and the view of them that the model runs with.

GPT-2's Conv1D stores the transpose, and so do some experts; that is settled in this file and nowhere else. A layer of experts is one entry,
``[E, d_out, d_in]``, wherever a weight is said to be ``[d_out, d_in]`` (`sphere_edit.numerics.experts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture
from sphere_edit.models.experts import why_not
from sphere_edit.models.identity import tensor_bytes
from sphere_edit.models.offload import hold
from sphere_edit.models.sites import module_of, parameter_name, parameter_of
from sphere_edit.numerics.update import Update


class EditedWeights:
    """Three views of each edited matrix: original (W0), working (the float32 master), deployed (inside the model).

    The next batch starts from the working weights; evaluation, energy and export look at the deployed ones. They
    differ only for a method whose ``deploy`` is not the identity (PRUNE), and by the cast into the model's dtype.

    Whose tensors are whose, for every family and dtype: what the model runs with, and W0, are never handed out. `original` and
    `deployed` make copies, which are the caller's to change, and `set` keeps a copy of what it is given. ``working`` and
    `snapshot` hold the masters themselves, so that reading one costs nothing: a new weight takes the place of the old tensor
    and is never written into it. Read them; what might write into one (a method) is given a clone.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, names: Sequence[str]):
        self.names = tuple(names)
        self._matrices = {name: architecture.named(name) for name in self.names}
        self.stored_as = {name: parameter_name(architecture, name) for name in self.names}
        for name in self.names:  # an edited matrix is never offloaded
            hold(module_of(model, architecture, name))
        self._parameters = {name: parameter_of(model, architecture, name) for name in self.names}
        for name, parameter in self._parameters.items():
            if self._matrices[name].experts and (why := why_not(module_of(model, architecture, name))):
                raise SphereEditError(
                    f"the experts of {name} cannot be edited: {why}; edit other matrices (--matrices down)"
                )
            if not parameter.is_floating_point():
                raise SphereEditError(f"{name} is stored as {parameter.dtype}; editing needs float weights")
        self._stored = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }  # W0 as it came
        self.working = {name: self.original(name) for name in self.names}

    def original(self, name: str) -> Tensor:
        """A copy of W0 as float32 ``[d_out, d_in]``."""
        return _master(self._oriented(name, self._stored[name]))

    def deployed(self, name: str) -> Tensor:
        """A copy of the matrix the model runs with, as float32 ``[d_out, d_in]``."""
        return _master(self._oriented(name, self._parameters[name].detach()))

    def set(self, name: str, weight: Tensor) -> None:
        """Make a copy of ``weight [d_out, d_in]`` the working weight, and what the model runs with."""
        self._take(name, _master(weight, self._parameters[name].device))

    def as_parameters(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Weights ``[d_out, d_in]`` by the names, in the layout and dtype of the model's parameters (or in another); differentiable."""
        return {
            self.stored_as[name]: self._oriented(name, weight).to(dtype or self._parameters[name].dtype)
            for name, weight in weights.items()
        }

    def add(self, name: str, update: Update) -> None:
        """Add an update to the working weight, and run the model with the sum."""
        self._take(name, update.added_to(self.working[name]))

    def deploy(self, name: str, weight: Tensor) -> None:
        """Run the model with ``weight [d_out, d_in]`` in place of the working weight, which stays as it is."""
        self._write(name, weight)

    def use_working(self) -> None:
        """Run the model with the working weights, as a new batch needs it."""
        for name in self.names:
            self._write(name, self.working[name])

    def snapshot(self) -> dict[str, Tensor]:
        """The working weights by name, for a later `restore`; they stay as they are when new ones take their place."""
        return dict(self.working)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put working weights back, and run the model with them; the tensors, of a `snapshot` or fresh, are taken over."""
        for name in self.names:
            self._take(name, weights[name].to(self._parameters[name].device, torch.float32))

    def reset(self) -> None:
        """Back to the unedited model, bit for bit."""
        self.working = {name: self.original(name) for name in self.names}
        for name in self.names:
            self._copy(name, self._stored[name])

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside, the model runs with its original weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name in self.names:
            self._copy(name, self._stored[name])
        try:
            yield
        finally:
            for name in self.names:
                self._copy(name, kept[name])

    def digest(self, name: str) -> str:
        """SHA-256 of the working weight's bytes."""
        return hashlib.sha256(tensor_bytes(self.working[name])).hexdigest()

    def _oriented(self, name: str, stored: Tensor) -> Tensor:
        return stored.mT if self._matrices[name].transposed else stored

    def _take(self, name: str, weight: Tensor) -> None:
        """As `set`, of a float32 tensor that nobody else holds."""
        self.working[name] = weight
        self._write(name, weight)

    def _write(self, name: str, weight: Tensor) -> None:
        self._copy(name, self._oriented(name, weight))

    def _copy(self, name: str, stored: Tensor) -> None:
        parameter = self._parameters[name]
        if parameter.dtype == torch.float16 and not bool((stored.abs() <= torch.finfo(torch.float16).max).all()):
            raise SphereEditError(
                f"{name} does not fit float16 after the edit; load the model with --dtype bfloat16 or float32"
            )
        with torch.no_grad():
            parameter.copy_(stored)


def _master(weight: Tensor, device: torch.device | None = None) -> Tensor:
    """One copy of ``weight``, row-major and in float32."""
    return weight.to(device or weight.device, torch.float32, copy=True, memory_format=torch.contiguous_format)

"""A model's matrices read one at a time from its safetensors, as the model would have them; its weights are never loaded whole.

One exception: a model without a row in ``FAMILIES``, of which no run is known, is loaded once, since its layout is found by running it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.models.architecture import Architecture, row_of
from sphere_edit.models.configuration import loader_of
from sphere_edit.models.loading import checkpoint_folder, load_model
from sphere_edit.models.pretrained import first_lines, skeleton
from sphere_edit.models.sites import parameter_name
from sphere_edit.models.soundness import is_scale, quantised, refuse_unreadable, undone_by_loading
from sphere_edit.models.source import read_config, stored_tensors
from sphere_edit.models.stored import StoredParameters


class Checkpoint:
    """The weights of a hub id, a local folder, a ``.gguf`` file or ``smollm2``, by full module name.

    Raises:
        SphereEditError: there is no such model, it is none that can be edited, or its files cannot be read.
    """

    def __init__(self, source: str, architecture: Architecture | None = None):
        """Read the files' headers.

        Args:
            architecture: the model's layout, where it is known already.
        """
        self._known = architecture
        self.source = source
        self.folder = Path(checkpoint_folder(source))
        self._config = read_config(self.folder)
        loader = loader_of(self._config, source)
        self._quantised = undone_by_loading(self._config, source, self.folder)
        self._tensors = stored_tensors(self.folder)
        self._model = skeleton(str(self.folder), loader, dtype=None if self._quantised is None else torch.bfloat16)
        with self._telling():
            self._stored = StoredParameters(self._model, self._tensors, self._quantiser())

    @cached_property
    def architecture(self) -> Architecture:
        """The model's layout."""
        if self._known is not None:
            return self._known
        row = row_of(self._model.config.model_type)
        if row is None:
            return load_model(self.source, "cpu").architecture
        try:
            return row.architecture(self._model)
        except AttributeError as error:
            raise SphereEditError(f"'{self.source}' is not laid out as its family usually is: {error}") from None

    @property
    def depth(self) -> int:
        """How many decoder layers there are."""
        return len(self.architecture.parts)

    def names(self, layers: Sequence[int] | None, roles: Sequence[str] | None = None) -> list[str]:
        """Full module names of some matrices, layer by layer.

        Args:
            layers: all by default, those without a matrix of these roles left out.
            roles: by role or by the last part of a module's name; what writes the MLP's output by default.

        Raises:
            SphereEditError: a layer or a role that the model does not have.
        """
        layout = self.architecture
        by_path = {
            matrix.path.rsplit(".", 1)[-1]: role for part in layout.parts for role, matrix in part.matrices.items()
        }
        wanted = [role if role in layout.roles else by_path.get(role, role) for role in roles or [layout.writer]]
        unknown = next((role for role in wanted if role not in layout.roles), None)
        if unknown is not None:
            offered = ", ".join(f"{role} ({path})" for path, role in by_path.items())
            raise SphereEditError(f"'{self.source}' has no matrix '{unknown}'; it has {offered}")
        chosen = range(self.depth) if layers is None else layers
        beyond = [layer for layer in chosen if not 0 <= layer < self.depth]
        if beyond:
            raise SphereEditError(f"'{self.source}' has layers 0 to {self.depth - 1}, not {beyond[0]}")
        lacking = [(layer, role) for layer in chosen for role in wanted if layer not in layout.having(role)]
        if layers is not None and lacking:
            raise SphereEditError(f"layer {lacking[0][0]} of '{self.source}' has no matrix '{lacking[0][1]}'")
        return [layout.module_name(layer, role) for layer in chosen for role in wanted if (layer, role) not in lacking]

    def weight(self, name: str) -> Tensor:
        """One matrix as float32 ``[d_out, d_in]``, or ``[E, d_out, d_in]`` of a layer of experts.

        Raises:
            SphereEditError: it is not there; or is quantised, so that the numbers stored are not its own.
        """
        if not self._has(name):
            raise SphereEditError(f"the files of '{self.source}' hold no '{name}'")
        parameter = parameter_name(self.architecture, name)
        files = self._stored.tensors(parameter)
        packed = sorted(key for key in self._tensors if f".{name}.".endswith(f".{key.rsplit('.', 1)[0]}."))
        scale = next((key for key in packed if is_scale(key)), None)
        if not files:
            if scale is not None:
                raise quantised(self.source, self._config, f"and holds {packed[0]} in the place of {parameter}")
            raise SphereEditError(f"the files of '{self.source}' hold no '{parameter}'")
        if self._quantised is None:
            if scale is not None:
                raise quantised(self.source, self._config, f"and {scale} says how to read {name}")
            refuse_unreadable(files, self._config, self.source)
        with self._telling():
            weight = self._stored.read(parameter)
        if weight.element_size() < 2 or not weight.is_floating_point():
            raise quantised(self.source, self._config, f"and no scales say how to read {name}")
        return (weight.mT if self.architecture.named(name).transposed else weight).to(torch.float32).contiguous()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever transformers stumbles over is told as a fault of the files."""
        try:
            yield
        except SphereEditError:
            raise
        except Exception as error:
            raise SphereEditError(
                f"the files of '{self.source}' are not what its config.json says: {type(error).__name__}: {first_lines(error)}"
            ) from None

    def _has(self, name: str) -> bool:
        try:
            self.architecture.named(name)
        except (ValueError, IndexError, StopIteration):  # a name of another family's
            return False
        return True

    def _quantiser(self) -> Any:
        if self._quantised is None:
            return None
        from sphere_edit.models.dequantising import quantiser

        return quantiser(self._quantised)

"""A model's matrices read one at a time from its safetensors; the model itself is never loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors
from sphere_edit.models.architecture import Family, row_of
from sphere_edit.models.loading import checkpoint_folder
from sphere_edit.models.soundness import is_scale, quantised, refuse_unreadable
from sphere_edit.models.source import candidates, read_config, stored_tensors


class Checkpoint:
    """The weights of a hub id, a local folder, a ``.gguf`` file or ``smollm2``, by full module name.

    Raises:
        SphereEditError: there is no such model, its family has no row, or its files cannot be read.
    """

    def __init__(self, source: str):
        self.source = source
        self.folder = Path(checkpoint_folder(source))
        self._config = read_config(self.folder)
        self.architecture = _row(source, str(self._config.get("model_type")))
        self._tensors = stored_tensors(self.folder)
        pattern = re.compile(rf"(?:^|\.){re.escape(self.architecture.layers.split('.', 1)[-1])}\.(\d+)\.")
        found = [int(match[1]) for name in self._tensors if (match := pattern.search(name))]
        if not found:
            raise SphereEditError(f"the files of '{source}' hold no layers named '{self.architecture.layers}.N'")
        self.depth = max(found) + 1

    def names(self, layers: Sequence[int] | None, roles: Sequence[str]) -> list[str]:
        """Full module names of some matrices, layer by layer.

        Raises:
            SphereEditError: a layer or a role that the model does not have.
        """
        known = self.architecture.modules
        by_path = {path.rsplit(".", 1)[-1]: role for role, path in known.items()}
        wanted = [by_path.get(role, role) for role in roles]
        unknown = [role for role, name in zip(roles, wanted, strict=True) if name not in known]
        if unknown:
            offered = ", ".join(f"{role} ({path.rsplit('.', 1)[-1]})" for role, path in known.items())
            raise SphereEditError(f"'{self.source}' has no matrix '{unknown[0]}'; it has {offered}")
        chosen = range(self.depth) if layers is None else layers
        beyond = [layer for layer in chosen if not 0 <= layer < self.depth]
        if beyond:
            raise SphereEditError(f"'{self.source}' has layers 0 to {self.depth - 1}, not {beyond[0]}")
        return [self.architecture.module_name(layer, role) for layer in chosen for role in wanted]

    def weight(self, name: str) -> Tensor:
        """One matrix as float32 ``[d_out, d_in]``.

        Raises:
            SphereEditError: it is not there; or is quantised, so that the numbers stored are not its own.
        """
        stored = next(iter(candidates(self._tensors, f"{name}.weight", self.architecture.layers)), None)
        if stored is None:
            packed = sorted(key for key in self._tensors if f".{name}.".endswith(f".{key.rsplit('.', 1)[0]}."))
            if any(is_scale(key) for key in packed):
                raise quantised(self.source, self._config, f"and holds {packed[0]} in the place of {name}.weight")
            raise SphereEditError(f"the files of '{self.source}' hold no '{name}.weight'")
        beside = [key for key in self._tensors if key.startswith(stored.name.removesuffix("weight")) and is_scale(key)]
        if beside:
            raise quantised(self.source, self._config, f"and {beside[0]} says how to read {name}")
        refuse_unreadable({stored.name: stored}, self._config, self.source)
        with _opened(stored.file) as file:
            weight: Tensor = file.get_tensor(stored.name)
        return (weight.T if self.architecture.transposed else weight).to(torch.float32).contiguous()


def _row(source: str, model_type: str) -> Family:
    row = row_of(model_type)
    if row is None:
        raise SphereEditError(
            f"the layout of '{source}' ('{model_type}') is found by running it, and here only its files are read; `sphere-edit inspect` "
            "looks at such a model"
        )
    return row


def _opened(path: Path) -> Any:
    try:
        with plain_errors(path, "read"):
            return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SphereEditError(f"{path} cannot be read: {error}") from None

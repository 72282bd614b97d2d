"""A model's matrices read one at a time from its safetensors; the model itself is never loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.files import plain_errors
from sphere_edit.models.architecture import Architecture, row_of
from sphere_edit.models.loading import checkpoint_folder


class Checkpoint:
    """The weights of a hub id, a local folder, a ``.gguf`` file or ``smollm2``, by full module name.

    Raises:
        SphereEditError: there is no such model, its family has no row, or its files cannot be read.
    """

    def __init__(self, source: str):
        self.source = source
        self.folder = Path(checkpoint_folder(source))
        with plain_errors(self.folder / "config.json", "read"):
            config: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.architecture: Architecture = row_of(str(config.get("model_type")))
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with _opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
        pattern = re.compile(rf"(?:^|\.){re.escape(self.architecture.layers.split('.', 1)[-1])}\.(\d+)\.")
        found = [int(match[1]) for name in self._files if (match := pattern.search(name))]
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
        """One matrix as float32 ``[d_out, d_in]``."""
        stored = f"{name}.weight"
        # some checkpoints leave out the name of the model around their layers (GPT-2's)
        key = next((key for key in self._files if key == stored or stored.endswith(f".{key}")), None)
        if key is None:
            raise SphereEditError(f"the files of '{self.source}' hold no '{stored}'")
        with _opened(self._files[key]) as file:
            weight: Tensor = file.get_tensor(key)
        if not weight.is_floating_point():
            raise SphereEditError(
                f"{name} of '{self.source}' is stored as {weight.dtype}; expected floating-point weights"
            )
        return (weight.T if self.architecture.transposed else weight).to(torch.float32).contiguous()


def _opened(path: Path) -> Any:
    try:
        with plain_errors(path, "read"):
            return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SphereEditError(f"{path} cannot be read: {error}") from None

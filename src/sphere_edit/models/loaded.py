"""A model in memory, ready to be edited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sphere_edit.models.architecture import Architecture


@dataclass
class LoadedModel:
    """A model ready to be edited: evaluation mode, no gradients on its weights, on one device."""

    model: Any
    tokenizer: Any
    architecture: Architecture
    source: str
    fingerprint: str

    @property
    def dtype(self) -> torch.dtype:
        """Numbers the model's first parameter is made of."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives."""
        return next(self.model.parameters()).device

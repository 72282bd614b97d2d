"""A model in memory, ready to be edited."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from sphere_edit.models.architecture import Architecture
from sphere_edit.models.offload import home
from sphere_edit.models.placement import Placement, spoken
from sphere_edit.models.products import quick_products


@dataclass
class LoadedModel:
    """A model ready to be edited: evaluation mode, no gradients on its weights, on one device or spread over several."""

    model: Any
    tokenizer: Any
    architecture: Architecture
    source: str
    fingerprint: str
    placement: Placement | None = None  # how it was spread; None where it lies whole on one device
    before: int = 0  # bytes that were held before it was loaded
    planned: torch.device | None = None  # of one without weights, where it is going to compute

    @property
    def dtype(self) -> torch.dtype:
        """Numbers the model's first parameter is made of."""
        return next(self.model.parameters()).dtype

    @property
    def where(self) -> str:
        """Its device, or how many of its parts are where."""
        places = getattr(self.model, "hf_device_map", None)
        return str(self.device) if self.placement is None or places is None else spoken(places)

    @property
    def device(self) -> torch.device:
        """Where token ids go: where the model's embedding computes. Each layer has hidden states where its own weights are."""
        return self.planned or home(self.model.get_input_embeddings())

    def quick(self) -> AbstractContextManager[None]:
        """While it computes: float32 products by the quicker library (`quick_products`)."""
        return quick_products(self.device, int(self.model.get_input_embeddings().weight.shape[-1]))

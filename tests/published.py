"""A few numbers of the authors' published implementation, beside the tests (`data/published.json`), and what they are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).parent / "data" / "published.json"
ALONG = 4


def published(part: str) -> dict[str, Any]:
    """The numbers about ``seeded`` matrices, or about ``smollm2``."""
    return json.loads(FILE.read_text("utf-8"))[part]


def matrices() -> dict[str, np.ndarray]:
    """Matrices of a fixed stream, float64: W and delta [24, 40], cov [40, 40], K [40, 5], K_previous [40, 9], R [24, 5]."""
    random = np.random.RandomState(0)  # whose stream is the same in every version
    text = random.randn(200, 40) * np.geomspace(2, 0.2, 40)
    shapes = {"W": (24, 40), "delta": (24, 40), "K": (40, 5), "K_previous": (40, 9), "R": (24, 5)}
    return {"cov": text.T @ text / len(text), **{name: random.randn(*shape) for name, shape in shapes.items()}}


def sketch(matrix: np.ndarray) -> dict[str, Any]:
    """A matrix's norm, and aᵀ M b for some vectors of cosines: two matrices that agree in these hardly differ."""
    rows, columns = (1 + np.arange(size) for size in matrix.shape)
    along = [float(np.cos((k + 1) * rows) @ matrix @ np.cos((k + 2) * columns)) for k in range(ALONG)]
    return {"norm": float(f"{np.linalg.norm(matrix):.6g}"), "along": [float(f"{value:.6g}") for value in along]}


def far(ours: torch.Tensor, theirs: dict[str, Any]) -> float:
    """The largest difference between a matrix's sketch and a recorded one, in units that make it a relative error of the matrix."""
    mine = sketch(ours.detach().double().numpy())
    scale = theirs["norm"]
    spread = [abs(a - b) / scale for a, b in zip(mine["along"], theirs["along"], strict=True)]
    return max(abs(mine["norm"] / scale - 1), *spread)

"""Float32 matrix products by the quicker of two libraries.

PyTorch takes MKL for them, whose kernels use half of what an AMD processor with AVX-512 can do; oneDNN's take half the time there
(docs/performance.md). It is asked by allowing it bfloat16, which it makes no use of on such processors: `is_quicker` looks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

_LEAST_WIDTH = 256
KERNELS = 64  # that oneDNN, and PyTorch in front of it, keep of those compiled: each shape of a product has one of 0.6 MB, and a stream thousands
_EXACT = 1e-6  # relative error of a float32 product that is one; bfloat16's is 2e-3


def keep_few_kernels() -> None:
    """Limit what oneDNN keeps of the kernels it compiles, unless the environment says how many; both caches read that at their first product."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


class _Switch:
    """oneDNN's share of the products, while any thread is inside; threads share PyTorch's setting, so they are counted."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0

    def chosen(self) -> str:
        """The precision that was set by others."""
        with self._lock:
            try:
                return "highest" if self._inside else torch.get_float32_matmul_precision()
            except RuntimeError:  # set in PyTorch's other way, for one library alone
                return "of each library"

    @contextmanager
    def on(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            before, self._inside = self._inside, self._inside + change
            if not (before and self._inside):
                torch.set_float32_matmul_precision("medium" if self._inside else "highest")


_SWITCH = _Switch()


@contextmanager
def quick_products(device: torch.device, width: int) -> Iterator[None]:
    """Inside, float32 products on a CPU are oneDNN's where that is quicker (`is_quicker`); they stay float32's.

    Not for what is to have the bits of earlier versions: updates that are added to weights.

    Args:
        width: of the model's hidden states; small products gain nothing, for oneDNN compiles a kernel for each shape.
    """
    if width >= _LEAST_WIDTH and is_quicker(device):
        with _SWITCH.on():
            yield
    else:
        yield


def is_quicker(device: torch.device) -> bool:
    """Whether oneDNN multiplies float32 matrices quicker there, and no less exactly; and nobody has asked PyTorch for less exact ones."""
    if device.type != "cpu" or _SWITCH.chosen() != "highest":
        return False
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # with it oneDNN would round to bfloat16
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not (amx is None or amx()) and _is_exact()


def precision(device: torch.device) -> str:
    """What float32 products are like there, for the name of a cached result."""
    return "oneDNN" if is_quicker(device) else _SWITCH.chosen()


@cache
def _is_exact() -> bool:
    """Whether a product of oneDNN's is as exact as float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator) for shape in ((64, 512), (512, 256)))
    expected = left.double() @ right.double()
    with _SWITCH.on(), torch.no_grad():
        found = left @ right
    return float((found - expected).norm() / expected.norm()) < _EXACT

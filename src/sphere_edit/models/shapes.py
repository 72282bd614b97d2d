"""Few shapes of matrix products on a CPU: oneDNN compiles kernels for each number of rows, and keeps them while the process lives.

One shape takes about 0.6 MB (docs/performance.md), and a stream of edits has thousands: chunks of tokens are of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEW, _MANY = 16, 512  # rows: up to so few, numbers are as they come; from so many on, multiples are larger
_STEP, _LARGE_STEP = 16, 64
_GIVEN = {
    torch.nn.functional.linear: 0,
    torch.addmm: 1,
}  # which argument has the rows, of a Linear and of GPT-2's Conv1D


class FewShapes(TorchFunctionMode):
    """Inside, layers of a model get rows of zeros, so that numbers of rows are multiples of 16 or 64; what becomes of these is cut off.

    Args:
        dtypes: of the products that oneDNN does.
    """

    def __init__(self, *dtypes: torch.dtype):
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function, or for a product the same with more rows."""
        place = _GIVEN.get(func)
        if place is not None and len(args) > place and args[place].dtype in self._dtypes:
            return _padded(func, place, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def rounded(rows: int) -> int:
    """How many rows a product of so many has."""
    if rows <= _FEW:
        return rows
    step = _STEP if rows <= _MANY else _LARGE_STEP
    return -(-rows // step) * step


def _padded(func: Callable[..., Tensor], place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given: Tensor = args[place]
    count = given.shape[:-1].numel()
    missing = rounded(count) - count
    if not missing:
        return func(*args, **kwargs)
    rows = torch.nn.functional.pad(given.reshape(count, -1), (0, 0, 0, missing))
    found = func(*args[:place], rows, *args[place + 1 :], **kwargs)[:count]
    return found.view(*given.shape[:-1], -1)

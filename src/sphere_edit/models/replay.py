"""The upper layers replayed with δ added below them, from the subject's last token on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit.errors import SphereEditError
from sphere_edit.models.hooks import Call, Stop, first_output, hidden_first
from sphere_edit.models.loading import LoadedModel


class UpperLayers:
    """The layers above a value site, replayed with δ added there, from the subject's last token on.

    One clean forward pass records, by hook, what every upper layer was called with (masks, rotary tables, …, whatever
    the family passes) and its keys and values. Each replay then runs only those layers, and within them only the
    positions from the pivot on: what stands before it does not depend on δ. No family needs code of its own for this.

    Rows are padded on the left too, so that all pivots share a column; column 0 of a replay is the pivot.

    Args:
        rows: token ids.
        pivots: the position in each row at which δ is added.
        layer: the layer whose value site it is (`Architecture.value_site`).
        inside: the site is the output of the layer's ``down`` matrix.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[Sequence[int]],
        pivots: Sequence[int],
        layer: int,
        inside: bool = False,
    ):
        architecture, model = loaded.architecture, loaded.model
        self._loaded = loaded
        self._inside = inside or architecture.inside(layer)
        self._site = architecture.value_site(model, layer, inside)
        self._layers = list(architecture.decoder_layers(model))[layer if self._inside else layer + 1 :]
        self._calls: list[Call] = []
        self._record(rows, pivots)

    @torch.no_grad()
    def _record(self, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> None:
        from transformers import DynamicCache

        # lay the rows out so that all pivots stand in one column
        ids, mask = (part.to(self._loaded.device) for part in _aligned(rows, pivots))
        column, width = max(pivots) + 1, ids.shape[1]

        # hooks: the value at the site, what each upper layer is called with, and what the last one returns
        values: list[Tensor] = []
        clean: list[Tensor] = []

        def take_value(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values.append(first_output(output))

        def take_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(hidden_first(args, kwargs))

        def take_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            clean.append(first_output(output))
            raise Stop

        # one clean pass: with a cache, for it is the cache that receives every layer's keys and values; each row counts its
        # positions from its own first token, as it would without the padding on the left
        cache: Any = DynamicCache()
        with ExitStack() as hooks:
            hooks.callback(self._site.register_forward_hook(take_value).remove)
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(take_call, with_kwargs=True).remove)
            last = self._loaded.architecture.decoder_layers(self._loaded.model)[-1]
            hooks.callback(last.register_forward_hook(take_last).remove)
            with suppress(Stop):
                self._loaded.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                    past_key_values=cache,
                    use_cache=True,
                )

        # before the pivot, keys and values are all that a replay needs: they take the cache's place in every call
        self._keys_values = _Prefix(
            [(layer.keys[:, :, :column], layer.values[:, :, :column]) for layer in cache.layers]
        )

        def suffix(item: Any) -> Any:
            """What a call needs of one argument for the columns from the pivot on."""
            if item is cache:
                return self._keys_values
            if isinstance(item, Tensor):
                # where the columns are: [S], [B, S] or [B, S, d], and the rows of a mask [B, 1, S, S], which sees all columns
                dim = {1: 0, 2: 1, 3: 1, 4: 2}.get(item.dim())
                if dim is not None and item.shape[dim] == width:
                    return item.narrow(dim, column, width - column)
            return item

        # from the pivot on, each call is cut to the columns that are run again
        self._calls = [_mapped(suffix, call) for call in self._calls]

        # a replay starts from the site's own output, or, δ lying inside a layer, from what that layer was given
        site = values[0][:, column:]
        self.value = site[:, 0]  # [B, d]: what stands at the pivots
        self._start = self._calls[0][0][0] if self._inside else site

        # `check` compares a replay with the clean pass, at the columns that hold a token
        self._clean, self._real = clean[0][:, column:], mask[:, column:].bool()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        size = len(self.value)
        self._keys_values.keep(rows)

        def pick(item: Any) -> Any:
            if isinstance(item, Tensor) and item.dim() > 1 and size > 1 and len(item) == size:
                return item[rows]
            return item

        self._calls = [_mapped(pick, call) for call in self._calls]
        self.value, self._start = self.value[rows], self._start[rows]
        self._clean, self._real = self._clean[rows], self._real[rows]

    def hidden(self, delta: Tensor) -> Tensor:
        """Last layer's output ``[B, positions from the pivot on, d_model]`` with ``delta [B, d]`` added at the pivots.

        Differentiable in ``delta``.
        """
        if self._inside:
            with self._added_at_site(delta):
                return self._through_layers(self._start)
        return self._through_layers(_add_first(self._start, delta))

    def check(self, hidden: Tensor) -> None:
        """Compare a replay without any δ against the clean pass: they must agree.

        Raises:
            SphereEditError: this model's layers depend on something a replay does not give them.
        """
        tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        clean = self._clean[self._real].float()
        difference = float((hidden[self._real].float() - clean).norm() / clean.norm())
        if not difference <= tolerance:
            raise SphereEditError(
                f"replaying the upper layers of this model gives another result than its own forward pass "
                f"(relative difference {difference:.1e}, allowed {tolerance:.0e}): its layers depend on more than their "
                "arguments, or its activations overflow; sphere-edit cannot edit it in this dtype"
            )

    def _through_layers(self, hidden: Tensor) -> Tensor:
        for layer, (args, kwargs) in zip(self._layers, self._calls, strict=True):
            hidden = first_output(layer(hidden, *args[1:], **kwargs))
        return hidden

    @contextmanager
    def _added_at_site(self, delta: Tensor) -> Iterator[None]:
        handle = self._site.register_forward_hook(lambda module, args, output: _add_first(output, delta))
        try:
            yield
        finally:
            handle.remove()


def _aligned(rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[B, S]``, padded on both sides so that every row's pivot stands in column max(pivots) + 1.

    So there is one column of padding at least: without any, the model would pass no mask, and a slice of none is wrong.
    """
    column = max(pivots) + 1
    width = column + max(len(row) - pivot for row, pivot in zip(rows, pivots, strict=True))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, (row, pivot) in enumerate(zip(rows, pivots, strict=True)):
        start = column - pivot
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, start : start + len(row)] = 1
    return ids, mask


def _add_first(hidden: Tensor, delta: Tensor) -> Tensor:
    """``hidden [B, S, d]`` with ``delta [B, d]`` added in column 0."""
    first = (hidden[:, 0].float() + delta).to(hidden.dtype)
    return torch.cat([first[:, None], hidden[:, 1:]], dim=1)


class _Prefix:
    """Stands in for a model's cache: gives each layer the keys and values of the positions before the pivot."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self._layers = layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prefix followed by what was just computed; nothing is stored."""
        before = self._layers[layer_idx]
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the prefix."""
        return self._layers[layer_idx][0].shape[2]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]


def _mapped(change: Callable[[Any], Any], item: Any) -> Any:
    """``item`` with everything in it changed. Not a closure that calls itself, which would live on with all it holds."""
    if isinstance(item, (tuple, list)):
        return type(item)(_mapped(change, part) for part in item)
    if isinstance(item, dict):
        return {name: _mapped(change, part) for name, part in item.items()}
    return change(item)

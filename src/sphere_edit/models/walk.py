"""Hidden states carried from layer to layer, so that edited layers are read one after another in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphere_edit import ranks
from sphere_edit.models.forward import at
from sphere_edit.models.hooks import Call, Stop, first_output, hidden_first, watched
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.tokens import TokenBatch, batches_by_length, in_order


@dataclass
class _WalkedChunk:
    """Some rows of a walk: what each layer is called with beside the hidden states, and those at the standing point."""

    rows: list[int]
    last: Tensor  # each row's last token
    calls: dict[int, Call]  # of the layers from the first on, by number
    entering: Tensor  # hidden states before the first layer
    hidden: Tensor  # and before the layer the walk stands at


class LayerWalk:
    """Hidden states of some rows, carried from layer to layer while the weights of those behind are final.

    One forward pass records, by hook, what the layers from ``first`` to ``last`` are called with (masks, rotary tables, …,
    whatever the family passes). After that only layers from the standing point on are run, so that reading n edited layers one
    after another costs one pass over them and not n passes from the embedding on. Each rank walks with its own chunks.
    """

    def __init__(self, loaded: LoadedModel, rows: Sequence[list[int]], first: int, last: int, max_tokens: int):
        self._layers = loaded.architecture.running(loaded.model, first, last)
        self._numbers = {layer: number for number, layer in self._layers.items()}
        self._loaded, self._first, self._at = loaded, first, first
        self._home = loaded.device  # where all that is read goes
        self._cut = list(enumerate(batches_by_length([len(row) for row in rows], max_tokens)))
        self._chunks: dict[int, _WalkedChunk] = {}  # by its number, those of this rank

        def record(numbered: tuple[int, list[int]]) -> None:
            number, chunk = numbered
            self._chunks[number] = self._record(loaded, [rows[index] for index in chunk], chunk)

        ranks.dealt(self._cut, record)

    @torch.no_grad()
    def _record(self, loaded: LoadedModel, rows: list[list[int]], indices: list[int]) -> _WalkedChunk:
        batch = TokenBatch.of(rows, loaded.device)
        calls: dict[int, Call] = {}
        last = max(self._layers)

        def take_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[self._numbers[module]] = hidden_first(args, kwargs)
            if self._numbers[module] == last:
                raise Stop

        with ExitStack() as hooks:
            for layer in self._layers.values():
                hooks.callback(layer.register_forward_pre_hook(take_call, with_kwargs=True).remove)
            with suppress(Stop), loaded.quick():
                loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        entering = calls[min(calls)][0][0]
        rest = {number: (args[1:], kwargs) for number, (args, kwargs) in calls.items()}
        return _WalkedChunk(indices, batch.mask.sum(1) - 1, rest, entering, entering)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that are walked through."""
        return list(self._layers)

    @torch.no_grad()
    def stand_at(self, layer: int) -> None:
        """Run the layers up to ``layer``, whose weights must be final; backwards, start again from the first."""
        if layer < self._at:
            self._at = self._first
            for chunk in self._chunks.values():
                chunk.hidden = chunk.entering
        for chunk in self._chunks.values():
            for number in range(self._at, layer):
                chunk.hidden = self._run(chunk, number, chunk.hidden)
        self._at = layer

    @torch.no_grad()
    def read(
        self, last: int, inputs_of: Sequence[nn.Module] = (), output_of: nn.Module | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Inputs of some modules and the output of one at each row's last token, ``[rows, d]`` each, float32.

        The modules stand in the layers from the standing point to ``last``; nothing after the last of them is computed.
        """
        stacked = self._of_all(lambda chunk: self._read(chunk, last, inputs_of, output_of))
        return (stacked, None) if output_of is None else (stacked[:-1], stacked[-1])

    @torch.no_grad()
    def carried(self, deltas: Tensor) -> list[Tensor]:
        """Each layer's output at each row's last token, ``[rows, d]`` (float32), with ``deltas [rows, d]`` added to the first layer's there.

        All layers must be as they were when the walk began.
        """
        return self._of_all(lambda chunk: self._carried(chunk, deltas))

    def _of_all(self, work: Callable[[_WalkedChunk], list[Tensor]]) -> list[Tensor]:
        """What ``work`` finds of each chunk, several tensors ``[its rows, d]``, as as many ``[rows, d]``."""
        found = ranks.dealt(self._cut, lambda numbered: work(self._chunks[numbered[0]]))
        vectors = in_order(
            (chunk, zip(*parts, strict=True)) for (_, chunk), parts in zip(self._cut, found, strict=True)
        )
        return [torch.stack(several) for several in zip(*vectors, strict=True)]

    def _carried(self, chunk: _WalkedChunk, deltas: Tensor) -> list[Tensor]:
        hidden, found = chunk.entering, []
        rows = torch.arange(len(hidden))
        for number in self._layers:
            hidden = self._run(chunk, number, hidden)
            if number == self._first:
                hidden = hidden.clone()
                added = at(hidden, chunk.last).float() + deltas[chunk.rows].to(hidden.device)
                hidden[rows, chunk.last.to(hidden.device)] = added.to(hidden.dtype)
            found.append(at(hidden, chunk.last).float().to(self._home))
        return found

    def _read(
        self, chunk: _WalkedChunk, last: int, inputs_of: Sequence[nn.Module], output_of: nn.Module | None
    ) -> list[Tensor]:
        """Of the chunk's rows what `read` is asked for, the output last."""
        hidden = chunk.hidden
        with watched(inputs_of, output_of, (len(hidden), hidden.shape[1])) as (inputs, outputs):
            for number in range(self._at, last + 1):
                hidden = self._run(chunk, number, hidden)
        return [at(seen, chunk.last).float().to(self._home) for seen in (*inputs, *outputs)]

    def _run(self, chunk: _WalkedChunk, number: int, hidden: Tensor) -> Tensor:
        if number not in self._layers:  # a layer that a text does not run through
            return hidden
        args, kwargs = chunk.calls[number]
        with self._loaded.quick():
            return first_output(self._layers[number](hidden, *args, **kwargs))

"""The upper layers replayed with δ added below them: from the subject's last token on, or, where that does not do, whole rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sphere_edit.errors import SphereEditError
from sphere_edit.models.configuration import text_config
from sphere_edit.models.forward import last_hidden, with_cache
from sphere_edit.models.hooks import Call, Stop, first_output, folded, hidden_first
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.prefix import Leads, agree
from sphere_edit.models.tokens import TokenBatch

_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}


class Replay:
    """The layers above a value site, run again and again with δ added there.

    One clean forward pass records, by hook, what every upper layer was called with (masks, rotary tables, …, whatever the family
    passes). Each replay then runs only those layers. No family needs code of its own for this.

    Args:
        rows: token ids.
        pivots: the position in each row at which δ is added.
        layer: the layer whose value site it is (`Architecture.value_site`).
        inside, role: the site is the output of the layer's matrix ``role``.
        kept: of so many tokens the layers keep for the way back all that they computed; of more, only what each of them was
            given, and it computes the rest again (activation checkpointing). The numbers are the same.
    """

    value: Tensor  # [B, d]: what stands at the pivots
    _start: Tensor  # what the first of the layers run again is given
    _clean: Tensor  # the last layer's output [B, positions from the pivot on, d]
    _real: Tensor  # which of these positions hold a token

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Sequence[Sequence[int]],
        pivots: Sequence[int],
        layer: int,
        inside: bool = False,
        role: str | None = None,
        kept: int | None = None,
    ):
        architecture, model = loaded.architecture, loaded.model
        self._kept = kept
        self._loaded = loaded
        self._inside = inside
        self._site = architecture.value_site(model, layer, inside, role)
        self._layers = list(architecture.running(model, layer if self._inside else layer + 1).values())
        self._calls: list[Call] = []
        self._record(rows, pivots)

    def _record(self, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> None:
        raise NotImplementedError

    def _run_clean(self, batch: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        """One plain pass: what stands at the site and what the last layer gives back, ``[B, S, d]``; the layers' calls are kept."""
        values: list[Tensor] = []
        last: list[Tensor] = []

        def take_value(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            values.append(folded(first_output(output).clone(), batch))

        def take_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append(hidden_first(args, kwargs))

        def take_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last.append(first_output(output))
            raise Stop

        with ExitStack() as hooks:
            hooks.callback(self._site.register_forward_hook(take_value).remove)
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(take_call, with_kwargs=True).remove)
            final = self._loaded.architecture.last_layer(self._loaded.model)
            hooks.callback(final.register_forward_hook(take_last).remove)
            with suppress(Stop):
                self._loaded.model(**inputs)
        here = self._loaded.device  # a model that is spread has them elsewhere
        return values[0].to(here), last[0].to(here)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        size = len(self.value)
        config = text_config(self._loaded.model)
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        # of as many rows as heads: more columns than one, or no rotary tables, tell ALiBi's tensor from one of each row
        alone = self._clean.shape[1] > 1 or getattr(config, "rope_parameters", None) is None

        def pick(item: Any) -> Any:
            if not isinstance(item, Tensor) or item.dim() < 2 or size == 1:
                return item
            if item.dim() == 3 and item.shape[1] == 1:  # ALiBi's, one row a head, or a row and a head
                if len(item) == heads and (len(item) != size or alone):
                    return item
                if len(item) == size * heads:
                    return item.unflatten(0, (size, heads))[rows.to(item.device)].flatten(0, 1)
            return item[rows.to(item.device)] if len(item) == size else item

        self._calls = _mapped(pick, self._calls)
        self.value, self._start = self.value[rows], self._start[rows.to(self._start.device)]
        self._clean, self._real = self._clean[rows], self._real[rows]

    def hidden(self, delta: Tensor) -> Tensor:
        """Last layer's output ``[B, positions from the pivot on, d_model]`` with ``delta [B, d]`` added at the pivots.

        Differentiable in ``delta``.
        """
        if self._inside:
            with self._added_at_site(delta):
                return self._from_pivots(self._through_layers(self._start))
        return self._from_pivots(self._through_layers(self._added(self._start, delta)))

    def _added(self, hidden: Tensor, delta: Tensor) -> Tensor:
        """``hidden [B, S, d]`` with ``delta [B, d]`` added at the pivots."""
        raise NotImplementedError

    def _from_pivots(self, hidden: Tensor) -> Tensor:
        """The columns from the pivot on."""
        return hidden

    def check(self, hidden: Tensor) -> None:
        """Compare a replay without any δ against the clean pass: they must agree.

        Raises:
            SphereEditError: this model's layers depend on something a replay does not give them.
        """
        tolerance = _TOLERANCES.get(hidden.dtype, 5e-2)
        difference = self.difference(hidden, self._clean)
        if not difference <= tolerance:
            raise SphereEditError(
                f"replaying the upper layers of this model gives another result than its own forward pass "
                f"(relative difference {difference:.1e}, allowed {tolerance:.0e}): its layers depend on more than their "
                "arguments, or its activations overflow; sphere-edit cannot edit it in this dtype"
            )

    def difference(self, hidden: Tensor, expected: Tensor) -> float:
        """How far two outputs of the last layer are apart where there are tokens, relative to the second."""
        theirs = expected[self._real].float()
        return float((hidden[self._real].float() - theirs).norm() / theirs.norm())

    def _through_layers(self, hidden: Tensor) -> Tensor:
        sparing = self._kept is not None and hidden.shape[:-1].numel() > self._kept
        for layer, (args, kwargs) in zip(self._layers, self._calls, strict=True):
            if sparing and hidden.requires_grad:  # not where δ is added by a hook, which is gone on the way back
                hidden = first_output(
                    checkpoint(layer, hidden, *args[1:], use_reentrant=False, preserve_rng_state=False, **kwargs)
                )
            else:
                hidden = first_output(layer(hidden, *args[1:], **kwargs))
        return hidden.to(self._loaded.device)

    @contextmanager
    def _added_at_site(self, delta: Tensor) -> Iterator[None]:
        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            first = first_output(output)
            changed = self._added(folded(first, len(delta)).to(delta.device), delta).view_as(first).to(first.device)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = self._site.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


class UpperLayers(Replay):
    """A replay of the positions from the pivot on: what stands before it does not depend on δ, and gives its keys and values only.

    Rows are padded on the left too, so that all pivots share a column; column 0 of a replay is the pivot.
    """

    def _record(self, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> None:
        leads = Leads.found(rows, pivots)
        if not leads.length or not self._recorded_behind(leads, rows, pivots):
            self._calls.clear()
            self._record_behind(Leads.none(len(rows)), rows, pivots)

    def _recorded_behind(self, leads: Leads, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> bool:
        """Record what follows the leads, and say whether a row of each comes out as it does whole: that with the most padding behind its lead.

        A window that counts columns, and not positions, is noticed there first.
        """
        nearest: dict[int, int] = {}
        for index in sorted(range(len(rows)), key=pivots.__getitem__):
            if leads.distinct[leads.of[index]]:
                nearest.setdefault(leads.of[index], index)
        try:
            self._record_behind(leads, rows, pivots)
            whole = last_hidden(
                self._loaded, TokenBatch.of([rows[index] for index in nearest.values()], self._loaded.device)
            )
            return all(
                agree(self._clean[index, : len(rows[index]) - pivots[index]], behind[pivots[index] : len(rows[index])])
                for index, behind in zip(nearest.values(), whole, strict=True)
            )
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, NotImplementedError):
            return False  # what this model keeps of a prefix is something else

    @torch.no_grad()
    def _record_behind(self, leads: Leads, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> None:
        # lay the rows out so that all pivots stand in one column, behind what they begin with
        lengths = [len(leads.distinct[lead]) for lead in leads.of]
        places = [pivot - length for pivot, length in zip(pivots, lengths, strict=True)]
        ids, mask = (part.to(self._loaded.device) for part in _aligned(leads.rest(rows), places))
        column, width = max(places) + 1, ids.shape[1]

        # one clean pass: with a cache, for it is the cache that receives every layer's keys and values; each row counts its
        # positions from its own first token, as it would without the padding on the left
        cache, before = leads.run(self._loaded)
        seen = torch.cat([before, mask], dim=1)
        values, clean = self._run_clean(
            len(ids),
            input_ids=ids,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp_min(0)[:, leads.length :],
            **with_cache(self._loaded.model, cache),
        )

        # before the pivot, keys and values are all that a replay needs: they take the cache's place in every call
        end = leads.length + column
        self._keys_values = _Prefix([(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in cache.layers])

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
        self._calls = _mapped(suffix, self._calls)

        # a replay starts from the site's own output, or, δ lying inside a layer, from what that layer was given
        site = values[:, column:]
        self.value = site[:, 0]
        self._start = self._calls[0][0][0] if self._inside else site
        self._clean, self._real = clean[:, column:], mask[:, column:].bool()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        self._keys_values.keep(rows)
        super().keep(rows)

    def _added(self, hidden: Tensor, delta: Tensor) -> Tensor:
        first = (hidden[:, 0].float() + delta).to(hidden.dtype)
        return torch.cat([first[:, None], hidden[:, 1:]], dim=1)


class WholeRows(Replay):
    """A replay of whole rows, without a cache: for layers that keep more of a prefix than keys and values, and slower.

    State-space and linear attention, short convolutions and indexers are of this kind. Rows are padded on the right, where nothing
    that is causal sees it.
    """

    @torch.no_grad()
    def _record(self, rows: Sequence[Sequence[int]], pivots: Sequence[int]) -> None:
        batch = TokenBatch.of(rows, self._loaded.device)
        values, clean = self._run_clean(len(rows), input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        self._pivots = torch.tensor(list(pivots), device=batch.ids.device)
        self.value = values[torch.arange(len(values), device=values.device), self._pivots]
        self._start = self._calls[0][0][0] if self._inside else values
        self._place()
        self._clean = self._from_pivots(clean)
        self._real = self._from_pivots(batch.mask[..., None])[..., 0].bool() & self._there

    def _place(self) -> None:
        """Where each row's columns from its pivot on are, the last repeated where a row has no more."""
        width = self._start.shape[1]
        columns = torch.arange(width - int(self._pivots.min()), device=self._pivots.device)
        places = self._pivots[:, None] + columns
        self._columns, self._there = places.clamp_max(width - 1), places < width

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        super().keep(rows)
        self._pivots, self._columns = self._pivots[rows], self._columns[rows]

    def _from_pivots(self, hidden: Tensor) -> Tensor:
        return hidden.gather(1, self._columns[..., None].expand(-1, -1, hidden.shape[-1]))

    def _added(self, hidden: Tensor, delta: Tensor) -> Tensor:
        at_pivot = torch.arange(hidden.shape[1], device=hidden.device) == self._pivots[:, None]
        changed = (hidden.float() + delta[:, None]).to(hidden.dtype)
        return torch.where(at_pivot[..., None], changed, hidden)


def replay(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    pivots: Sequence[int],
    layer: int,
    inside: bool = False,
    role: str | None = None,
    kept: int | None = None,
) -> Replay:
    """The replay that the model's architecture asks for."""
    kind = WholeRows if loaded.architecture.whole_rows else UpperLayers
    return kind(loaded, rows, pivots, layer, inside, role, kept)


@torch.no_grad()
def fits(kind: type[Replay], loaded: LoadedModel, rows: Sequence[Sequence[int]], layer: int) -> bool:
    """Whether a kind of replay with some δ in the middle of each row equals the whole model's pass with the same δ at the site."""
    pivots = [len(row) // 2 for row in rows]
    try:
        inside = loaded.architecture.inside(layer)
        run = kind(loaded, rows, pivots, layer, inside)
        size = run.value.float().norm(dim=1, keepdim=True)
        noise = torch.randn(run.value.shape, generator=torch.Generator().manual_seed(0)).to(size.device)
        delta = noise * size / run.value.shape[1] ** 0.5
        found = run.hidden(delta)
        whole = WholeRows(loaded, rows, pivots, layer, inside)
        with whole._added_at_site(delta):
            expected = whole._from_pivots(last_hidden(loaded, TokenBatch.of(rows, loaded.device)))
        width = min(found.shape[1], expected.shape[1])
        run._real = run._real[:, :width]
        return run.difference(found[:, :width], expected[:, :width]) <= _TOLERANCES.get(found.dtype, 5e-2)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError):
        return False  # what this kind of replay gives the layers is not what they ask for


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
        chosen = [rows.to(keys.device) for keys, _ in self._layers]
        self._layers = [(keys[here], values[here]) for (keys, values), here in zip(self._layers, chosen, strict=True)]


def _mapped(change: Callable[[Any], Any], item: Any, known: dict[int, Any] | None = None) -> Any:
    """``item`` with everything in it changed; a dictionary that stands in several places stays one, as layers share through it.

    Not a closure that calls itself, which would live on with all it holds.
    """
    known = {} if known is None else known
    if isinstance(item, (tuple, list)):
        return type(item)(_mapped(change, part, known) for part in item)
    if isinstance(item, dict):
        if id(item) not in known:
            known[id(item)] = {name: _mapped(change, part, known) for name, part in item.items()}
        return known[id(item)]
    return change(item)

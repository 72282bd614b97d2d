"""Which experts tokens are routed to, and how many routes changed: no router is edited, but what it sees comes from the layers below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sphere_edit.models.architecture import EXPERTS
from sphere_edit.models.experts import JointKeys
from sphere_edit.models.forward import activations
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.sites import module_of
from sphere_edit.models.tokens import TokenBatch, over_batches


def mixed_above(loaded: LoadedModel, names: Sequence[str]) -> list[str]:
    """The experts of the layers above the lowest edited one, whose matrices ``names`` are."""
    architecture = loaded.architecture
    first = min(int(name.removeprefix(f"{architecture.layers}.").split(".", 1)[0]) for name in names)
    return [architecture.module_name(layer, EXPERTS) for layer in architecture.having(EXPERTS) if layer > first]


def routes_of(
    loaded: LoadedModel, rows: Sequence[Sequence[int]], experts: Sequence[str], max_tokens: int
) -> list[Tensor]:
    """Of each row of token ids, which experts its tokens are routed to: bool ``[tokens, layers, E]``."""
    modules = [module_of(loaded.model, loaded.architecture, name) for name in experts]

    def read(chunk: list[Sequence[int]]) -> Iterator[Tensor]:
        seen, _ = activations(loaded, TokenBatch.of([list(row) for row in chunk], loaded.device), modules)
        joint = [keys for keys in seen if isinstance(keys, JointKeys)]
        for number, row in enumerate(chunk):
            yield torch.stack([keys.routes((number, slice(len(row)))) for keys in joint], dim=1).cpu()

    return over_batches([row for row in rows if len(row)], max_tokens, read, len)


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How many tokens are routed to another set of experts than before, over all layers, in percent."""
    changed = torch.cat([(one != other).any(-1).flatten() for one, other in zip(before, after, strict=True)])
    return 100 * float(changed.double().mean())

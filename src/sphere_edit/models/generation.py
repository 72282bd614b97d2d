"""What a model goes on to say: greedily or sampled, token by token or by transformers' ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sphere_edit.errors import SphereEditError
from sphere_edit.models.configuration import text_config
from sphere_edit.models.forward import at, last_hidden, next_token_scores
from sphere_edit.models.loaded import LoadedModel
from sphere_edit.models.pretrained import first_lines, is_out_of_memory
from sphere_edit.models.tokens import TokenBatch, over_batches

_GREEDY_TOKENS = 4096  # in one batch of `greedy_continuations`


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and the outer ones as if nothing had happened."""
    options: dict[str, Any] = (
        {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    )
    with torch.random.fork_rng(**options):
        torch.manual_seed(seed)
        yield


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text of this model, by its generation settings."""
    end = loaded.model.generation_config.eos_token_id
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])


def until_end(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """What a model said, up to the token that ends its text, and with it: that nothing follows is part of what it said."""
    return list(ids[: next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))])


@torch.no_grad()
def greedy_continuations(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], lengths: Sequence[int], ends: Sequence[frozenset[int]]
) -> list[list[int]]:
    """The ``lengths[i]`` likeliest next tokens of each prompt (token ids), one after another, up to one of ``ends[i]`` (`until_end`)."""
    said: list[list[int]] = [[] for _ in prompts]

    def likeliest(chunk: list[list[int]]) -> list[int]:
        batch = TokenBatch.of(chunk, loaded.device)
        hidden = at(last_hidden(loaded, batch), batch.mask.sum(1) - 1)
        _, tokens = next_token_scores(loaded, hidden, torch.zeros(len(chunk), dtype=torch.long, device=hidden.device))
        return tokens.tolist()

    for step in range(max(lengths, default=0)):
        pending = [
            index
            for index, (ids, length, last) in enumerate(zip(said, lengths, ends, strict=True))
            if step < length and last.isdisjoint(ids[-1:])
        ]
        rows = [[*prompts[index], *said[index]] for index in pending]
        for index, token in zip(pending, over_batches(rows, _GREEDY_TOKENS, likeliest), strict=True):
            said[index].append(token)
    return said


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    new_tokens: int,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    end: bool = False,
    **options: Any,
) -> list[list[int]]:
    """Rows of token ids continued by transformers' ``generate``: greedily unless ``options`` say otherwise.

    Shorter rows are padded on the left, so that all end together; they must be of one length where the model does not take that
    (`pads_on_the_left`). The model's own generation settings (temperature, penalties, …) are left out, all but its end of text, at which a row ends;
    with ``end``, the token that ends it is kept (`until_end`). They are not touched, so that several threads can ask one model.

    Raises:
        SphereEditError: there is nothing to sample from, because the model overflows.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    ends = end_tokens(loaded)
    ids, mask = _ending_together(rows, loaded.device)
    sampled = bool(processors) or options.get("do_sample", False)
    # transformers fills whatever a request leaves at None from the model's own settings, and some can only be None (a list of
    # forbidden words). So another view of the model, of the same layers and weights, is asked, whose own settings are none
    view = copy.copy(loaded.model)
    view.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=0)
    said = _generated(
        loaded,
        view,
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(max_new_tokens=new_tokens, **options),
        logits_processor=LogitsProcessorList([_finite, *processors] if sampled else processors),
    ).tolist()
    given = ids.shape[1]
    added = [until_end(whole[given:], ends) for whole in said]
    if not end:
        added = [new[:-1] if new and new[-1] in ends else new for new in added]
    return [[*row, *new] for row, new in zip(rows, added, strict=True)]


def pads_on_the_left(loaded: LoadedModel, rows: Sequence[Sequence[int]], new_tokens: int) -> bool:
    """Whether rows of several lengths can be continued together: the shortest gives the same scores beside the longest as alone.

    Not where a model keeps more of a prefix than keys and values, or where rows with what is generated reach beyond a sliding window.
    """
    window = getattr(text_config(loaded.model), "sliding_window", None)
    short, long = min(rows, key=len, default=()), max(rows, key=len, default=())
    if loaded.architecture.whole_rows or (window is not None and len(long) + new_tokens > window):
        return False
    if len(short) == len(long):
        return True
    seen: list[Tensor] = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores[0].float())
        return scores

    try:
        for together in ([short, long], [short]):
            generate(loaded, together, 1, [look])
    except SphereEditError:  # padding alone may make infinite numbers
        return False
    beside, alone = seen
    tolerance = 1e-3 if loaded.dtype in (torch.float32, torch.float64) else 5e-2
    return float((beside - alone).norm() / alone.norm()) <= tolerance


def _ending_together(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, S]`` padded on the left, and their attention mask."""
    missing = [max(map(len, rows)) - len(row) for row in rows]
    ids = torch.tensor([[0] * count + list(row) for row, count in zip(rows, missing, strict=True)], device=device)
    mask = torch.tensor([[0] * count + [1] * len(row) for row, count in zip(rows, missing, strict=True)], device=device)
    return ids, mask


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that lets scores ``[B, V]`` through of which a token can be drawn."""
    if not bool(scores.amax(-1).isfinite().all()):
        name = str(scores.dtype).removeprefix("torch.")
        raise SphereEditError(f"the model overflows in {name} where it samples text; try --dtype float32 or bfloat16")
    return scores


@contextmanager
def _rows_together(head: torch.nn.Module | None) -> Iterator[None]:
    """Inside, the head is given its rows one behind the other in memory.

    transformers gives it the last column of all rows. PyTorch multiplies what lies apart row by row with the whole vocabulary, and
    oneDNN takes a copy of that for each.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: tuple(arg.contiguous() for arg in args))
    try:
        yield
    finally:
        hook.remove()


def _generated(loaded: LoadedModel, model: Any, **request: Any) -> Tensor:
    """What ``generate`` of a view of a model gives; without a cache where transformers cannot tell how far one is, for no layer in it is attention.

    Raises:
        SphereEditError: it fails within the model's own code.
    """
    try:
        with loaded.quick(), _rows_together(loaded.model.get_output_embeddings()):
            try:
                return model.generate(**request)
            except ValueError as error:
                if "get_seq_length" not in str(error):
                    raise
                return model.generate(**request, use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise SphereEditError(
            f"transformers cannot generate text with '{loaded.source}': {first_lines(error)}; give ordinary text with --corpus, and "
            "set evaluation.generation: off"
        ) from None

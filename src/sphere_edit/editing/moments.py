"""Second moments C0 = E[k kᵀ] of the edited matrices' inputs, and the text they are measured on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sphere_edit import ranks
from sphere_edit.counting import counted
from sphere_edit.editing.shipped import first_token, shipped_text
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.corpus import read_passages
from sphere_edit.files import cache_dir, is_whole, read_cache, read_tensors, remove_file, write_cache, write_tensors
from sphere_edit.models.configuration import positions
from sphere_edit.models.experts import JointKeys
from sphere_edit.models.forward import activations
from sphere_edit.models.generation import generate, seeded
from sphere_edit.models.identity import cache_key, config_values, tokenizer_identity
from sphere_edit.models.loading import LoadedModel
from sphere_edit.models.sites import Keys, module_of
from sphere_edit.models.tokens import TokenBatch, batches_of
from sphere_edit.progress import Reporter

_SAMPLE_LENGTH = 128
_SAMPLE_ROWS = 64
_WINDOW_BATCHES = 2  # padded batches' worth of tokens in a window, between two looks at the convergence
_LEAST_WINDOWS = 4
_STORE_SECONDS = 120.0
HELDOUT_PASSAGES = 300  # passages kept for perplexity where nobody says how many
_HELDOUT_A_FACT = (
    40  # tokens of them that are read for each fact of a stream, so that measuring takes its share and not more
)
_LEAST_HELDOUT = 2048  # tokens
_EXPERTS_TOKENS = 4  # times as much text is read for experts
_SAMPLER = 2  # to be raised when `sample_text` draws otherwise: cached text of another sampler is not its own


class MomentSettings(BaseModel):
    """What text the second moments come from, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    corpus: str | None = Field(
        None,
        description="text (.txt, a passage a paragraph), .jsonl with a 'text' field, or a hub data set; "
        "without one the model samples its own text",
    )
    tokens: int = Field(100_000, ge=100, description="tokens of a corpus that are looked at")
    sampled_tokens: int = Field(32_768, ge=100, description="tokens that are sampled where no corpus is given")
    tolerance: float = Field(
        0.05, ge=0, lt=1, description="relative error of the second moments at which reading ends; 0 reads all tokens"
    )
    max_length: int = Field(512, ge=8, description="tokens of one passage; the rest of a longer one is left out")
    heldout: int | None = Field(
        None,
        ge=1,
        description="passages at the corpus's end kept for perplexity (a fifth at most). By default 300, of which a short stream reads the "
        "first ones alone: 40 tokens for each of its first facts, 2,048 at least",
    )

    def for_experts(self) -> MomentSettings:
        """These with four times the tokens of a corpus, unless it was said how many: few tokens reach each expert."""
        given = "tokens" in self.model_fields_set
        return self if given else self.model_copy(update={"tokens": _EXPERTS_TOKENS * self.tokens})


@dataclass(frozen=True)
class Corpus:
    """Token ids of the passages for the statistics, and of those held out for perplexity."""

    passages: list[list[int]]
    heldout: list[list[int]]
    origin: str

    def heldout_for(self, facts: int) -> list[list[int]]:
        """The first held-out passages, as many as a stream of so many facts has use for: what it costs to read them grows with it."""
        wanted, found = heldout_tokens(facts), 0
        for count, passage in enumerate(self.heldout, 1):
            found += len(passage)
            if found >= wanted:
                return self.heldout[:count]
        return self.heldout

    @property
    def sha256(self) -> str:
        """Identity of the text the statistics see."""
        return hashlib.sha256(json.dumps(self.passages).encode()).hexdigest()


def heldout_tokens(facts: int) -> int:
    """How many tokens of text a stream of so many facts is measured on, where nobody says."""
    return max(_LEAST_HELDOUT, _HELDOUT_A_FACT * facts)


def load_corpus(loaded: LoadedModel, settings: MomentSettings, seed: int, reporter: Reporter) -> Corpus:
    """The corpus of ``settings``, tokenised; sampled from the model where none is named."""
    if settings.corpus is None:
        sampled = own_text(loaded, settings.sampled_tokens, seed, reporter)
        cut = len(sampled) - max(1, len(sampled) // 8)
        return Corpus(sampled[:cut], sampled[cut:], f"sampled from the model itself, seed {seed}")
    texts = read_passages(settings.corpus)
    count = min(settings.heldout or HELDOUT_PASSAGES, max(1, len(texts) // 5))
    longest = min(settings.max_length, positions(loaded.model))

    def tokens(text: str) -> list[int]:
        return list(loaded.tokenizer(text)["input_ids"])[:longest]

    heldout = [tokens(text) for text in texts[-count:]]
    if all(len(passage) < 2 for passage in heldout):
        raise SphereEditError(
            f"corpus {settings.corpus}: the last {counted(count, 'passage')} hold no text to measure perplexity on"
        )
    passages: list[list[int]] = []
    room = settings.tokens
    for text in texts[:-count]:
        if room <= 0:
            break
        passages.append(tokens(text))
        room -= len(passages[-1])
    return Corpus(passages, heldout, f"{Path(settings.corpus).name}, all but the last {counted(count, 'passage')}")


def own_text(loaded: LoadedModel, tokens: int, seed: int, reporter: Reporter) -> list[list[int]]:
    """Text that a model samples of itself: what ships with this package (`shipped_text`), or what was sampled before.

    The latter is in the cache where this very model sampled it, on a device and with libraries as these (`cache_key`).
    """
    if (shipped := ready_text(loaded, tokens, seed)) is not None:
        reporter.say("  text that this model has sampled of itself comes with the package")
        return shipped
    parts = (
        _SAMPLER,
        loaded.fingerprint,
        config_values(loaded.model),
        tokenizer_identity(loaded.tokenizer),
        tokens,
        seed,
    )
    file = cache_dir() / "samples" / f"{cache_key(loaded.device, *parts)}.json"
    found: list[list[int]] | None = read_cache(file)
    if found is None:
        found = ranks.once(lambda: sample_text(loaded, tokens, seed, reporter))
        write_cache(file, found)
    return found


@torch.no_grad()
def sample_text(
    loaded: LoadedModel, tokens: int, seed: int, reporter: Reporter, length: int = _SAMPLE_LENGTH
) -> list[list[int]]:
    """Text in the model's own words, as token ids: temperature 1 from its start token, ``length`` tokens a row."""
    first, length = first_token(loaded), _sample_length(loaded, length)
    count = max(2, math.ceil(tokens / length))
    rows: list[list[int]] = []
    with seeded(loaded.device, seed), reporter.bar("sampling text", count * length, "token") as advance:
        while len(rows) < count:
            part = [[first]] * min(_SAMPLE_ROWS, count - len(rows))
            rows += generate(loaded, part, length, [draw], min_new_tokens=length)
            advance(len(part) * length)
    return rows


def ready_text(loaded: LoadedModel, tokens: int, seed: int) -> list[list[int]] | None:
    """What `own_text` need not sample, as it ships with the package."""
    return shipped_text(loaded, tokens, _sample_length(loaded), seed)


def _sample_length(loaded: LoadedModel, length: int = _SAMPLE_LENGTH) -> int:
    """Tokens of one row after its first."""
    return min(length, positions(loaded.model) - 1)


def draw(ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that samples: scores ``[B, V]`` of which only one drawn from softmax(scores) remains a row.

    One uniform number a row and a cumulative sum, where transformers' own sampling spends most of a CPU's time.
    """
    cumulative = scores.float().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(scores), 1, device=scores.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniform, right=True).clamp_max(scores.shape[-1] - 1)
    return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)


@torch.no_grad()
def second_moments(
    loaded: LoadedModel,
    passages: Sequence[Sequence[int]],
    names: Sequence[str],
    max_tokens: int,
    reporter: Reporter,
    tolerance: float = 0.0,
    partial: Path | None = None,
) -> dict[str, Tensor]:
    """``C0 = E[k kᵀ]`` (float32 ``[d_in, d_in]``, summed in float64) of the inputs of the named matrices, in one pass.

    Of a layer of experts it is one block an expert, ``E[g² k kᵀ]`` over all tokens, ``[E, d_in, d_in]``. Few tokens reach some of them, so every
    expert is given one token more, whose second moment is the mean over the tokens of all experts of the layer (docs/LOG.md).

    The passages are read in windows, which go to two halves in turn. By how much the means of the halves differ tells
    how far their common mean still is from that of all such text: half as much, in the Frobenius norm, relative to it.
    Reading ends when that is below ``tolerance`` for every matrix, or with the passages.

    Args:
        passages: token ids; every token counts once.
        names: full module names, from the lowest layer up.
        max_tokens: tokens in one padded batch.
        partial: a file that keeps the sums every few minutes, and is gone on from if it is there.
    """
    modules = [module_of(loaded.model, loaded.architecture, name) for name in names]
    home = loaded.device if loaded.placement is None else torch.device("cpu")
    sums = _Sums.read(partial, home) if partial is not None and is_whole(partial) else _Sums(home)
    total = sum(map(len, passages))
    stored = time.monotonic()
    windows = _windows(passages, _WINDOW_BATCHES * max_tokens)
    cut = [batches_of(window, max_tokens) for window in windows[sums.windows :]]

    def read(rows: list[Sequence[int]]) -> tuple[dict[str, _Products], int]:
        batch = TokenBatch.of(rows, loaded.device)
        inputs, _ = activations(loaded, batch, inputs_of=modules)
        real = batch.mask.bool()
        with loaded.quick():
            return {name: _products(seen, real) for name, seen in zip(names, inputs, strict=True)}, int(real.sum())

    with reporter.bar("second moments", total, "token") as advance:
        advance(sum(sums.tokens))
        found = ranks.in_turn([rows for batches in cut for rows in batches], read)
        for batches in cut:
            for products, tokens in islice(found, len(batches)):
                sums.add(products, tokens)
                advance(tokens)
            sums.windows += 1
            if sums.windows >= _LEAST_WINDOWS and sums.error() <= tolerance:
                break
            if partial is not None and ranks.once(_Since(stored).is_long):
                sums.write(partial)
                stored = time.monotonic()
    if sums.windows > 1:
        reporter.say(
            f"  second moments of {counted(sum(sums.tokens), 'token')} (of {total:,}), relative error about {100 * sums.error():.1f} %"
        )
    for name in names:
        if name in sums.routed and (few := sums.rarely_reached(name)):
            reporter.say(
                f"  {few} of the {len(sums.routed[name])} experts of {name} were reached by fewer tokens than they have inputs, so their "
                "second moments are rough; reading more text (moments.tokens) makes them better"
            )
    if partial is not None:
        remove_file(partial)
    return {name: sums.moment(name).float() for name in names}


@dataclass(frozen=True)
class _Since:
    """A moment on the clock."""

    began: float

    def is_long(self) -> bool:
        """Whether it is time to store what was summed up since."""
        return time.monotonic() - self.began > _STORE_SECONDS


@dataclass
class _Sums:
    """``Σ k kᵀ`` by matrix (float64) in two halves, the tokens in each, and how many windows went in."""

    home: torch.device = field(default_factory=lambda: torch.device("cpu"))  # where the sums lie
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    windows: int = 0
    routed: dict[str, Tensor] = field(default_factory=dict)  # of a layer of experts, how many tokens reached each

    def add(self, products: Mapping[str, _Products], tokens: int) -> None:
        """Add what a batch of so many tokens comes to, by matrix, to the half whose turn it is."""
        turn = self.windows % 2
        half = self.halves[turn]
        for name, (single, reached) in products.items():
            product = single.to(self.home, torch.float64)
            half[name] = product if name not in half else half[name].add_(product)
            if reached is not None:
                self.routed[name] = reached.to(self.home) + self.routed.get(name, 0)
        self.tokens[turn] += tokens

    def moment(self, name: str) -> Tensor:
        """C0; of experts, shrunk towards the layer's mean."""
        mean = self.mean(name)
        if name not in self.routed:
            return mean
        total, pairs = (
            sum(self.tokens),
            float(self.routed[name].sum()),
        )  # tokens, and those times the experts they reached
        a_token = mean.sum(0) * (total / pairs)  # g² k kᵀ of one token that reaches one expert, on average
        more = len(mean) * total / pairs  # tokens that would give each expert one
        return (total * mean + a_token) / (total + more)

    def rarely_reached(self, name: str) -> int:
        """How many experts fewer tokens reached than they have inputs."""
        return int((self.routed[name] < self.mean(name).shape[-1]).sum())

    def mean(self, name: str) -> Tensor:
        """The mean over both halves."""
        return sum((half[name] for half in self.halves if half), start=torch.zeros(())) / sum(self.tokens)

    def error(self) -> float:
        """Half the halves' relative difference, the largest over the matrices; infinite while one is empty."""
        if not all(self.tokens):
            return math.inf
        found = 0.0
        for name in self.halves[0]:
            first, second = (half[name] / count for half, count in zip(self.halves, self.tokens, strict=True))
            found = max(found, float((first - second).norm() / self.mean(name).norm()) / 2)
        return found

    def write(self, path: Path) -> None:
        """Store all of it."""
        tensors = {f"{turn}/{name}": value for turn, half in enumerate(self.halves) for name, value in half.items()}
        tensors |= {f"routed/{name}": value for name, value in self.routed.items()}
        write_tensors(path, {**tensors, "counts": torch.tensor([self.windows, *self.tokens])})

    @classmethod
    def read(cls, path: Path, device: torch.device) -> _Sums:
        """What `write` stored."""
        tensors = read_tensors(path)
        windows, *tokens = tensors.pop("counts").tolist()
        sums = cls(device, tokens=tokens, windows=windows)
        for key, value in tensors.items():
            turn, name = key.split("/", 1)
            (sums.routed if turn == "routed" else sums.halves[int(turn)])[name] = value.to(device)
        return sums


_Products = tuple[
    Tensor, Tensor | None
]  # Σ k kᵀ over a batch, float32; of experts g² times, and the tokens that reach each


def _products(keys: Keys, real: Tensor) -> _Products:
    """Of the keys at the ``real`` tokens ``[B, S]`` of a batch."""
    real = real.to(keys.device)
    if isinstance(keys, JointKeys):
        return _of_experts(keys, real)
    rows = keys[real].float()
    return rows.T @ rows, None


def _of_experts(keys: JointKeys, real: Tensor) -> _Products:
    """``Σ g² k kᵀ`` over the tokens that reach each expert, ``[E, d_in, d_in]``, and how many these are ``[E]``."""
    products, reached = {}, torch.zeros(keys.count, dtype=torch.long, device=keys.device)
    for expert, rows, values in keys.by_expert(real):
        products[expert] = values.T @ values
        reached[expert] = len(rows)
    empty = torch.zeros_like(next(iter(products.values())))
    return torch.stack([products.get(expert, empty) for expert in range(keys.count)]), reached


def _windows(passages: Sequence[Sequence[int]], tokens: int) -> list[list[Sequence[int]]]:
    """The passages in their order, cut wherever ``tokens`` are reached."""
    windows: list[list[Sequence[int]]] = []
    room = 0
    for passage in passages:
        if room <= 0:
            windows.append([])
            room = tokens
        windows[-1].append(passage)
        room -= len(passage)
    return windows

"""Text that the embedded model has sampled of itself, as it ships with this package: token ids, known by the model's hash.

``benchmarks/sample_shipped_text.py`` makes it. Sampling is decided by rounding: another machine, or another number of threads,
draws other text from the same model. So the shipped text is one sample like any other, and the same one everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.facts.prompts import Encoder
from sphere_edit.files import read_cache, write_cache
from sphere_edit.models.identity import config_values
from sphere_edit.models.loading import LoadedModel

NAME = "smollm2_text.json"


def shipped_text(loaded: LoadedModel, tokens: int, length: int, seed: int) -> list[list[int]] | None:
    """Rows of token ids, ``length`` sampled tokens each and ``tokens`` in all at least; None unless this very model sampled them so.

    Fewer tokens than are shipped are the first rows. The model is known by the hash of its weights, by those values of its
    configuration that both this version of transformers and the one that sampled know, and by the token that a text begins with.

    Raises:
        SphereEditError: the package's file is not what was shipped.
    """
    with as_file(files("sphere_edit") / "data" / NAME) as path:
        found: dict[str, Any] | None = read_cache(path)
    if found is None:
        raise SphereEditError(f"the package's own {NAME} is not there or damaged; install sphere-edit again")
    rows = [list(map(int, row.split())) for row in found["rows"]]
    count = -(-tokens // length)
    same = (
        (loaded.fingerprint, seed) == (found["fingerprint"], found["seed"])
        and count <= len(rows)
        and len(rows[0]) == length + 1
        and first_token(loaded) == rows[0][0]
        and agree(config_values(loaded.model), found["config"])
    )
    return rows[:count] if same else None


def write_shipped(path: Path, loaded: LoadedModel, seed: int, rows: Sequence[Sequence[int]]) -> None:
    """Write what `shipped_text` reads: the rows, one a line, and by what their model is known."""
    lines = [" ".join(map(str, row)) for row in rows]
    known = {"fingerprint": loaded.fingerprint, "config": config_values(loaded.model), "seed": seed}
    write_cache(path, {**known, "rows": lines})


def first_token(loaded: LoadedModel) -> int:
    """What a sampled text begins with: the model's start token, or that of a first word."""
    encoder = Encoder(loaded.tokenizer)
    return (encoder.document_start() or encoder.encode("The").ids)[0]


def agree(now: dict[str, str], then: dict[str, str]) -> bool:
    """Whether two configurations say the same wherever both say something."""
    return all(now[name] == value for name, value in then.items() if name in now)

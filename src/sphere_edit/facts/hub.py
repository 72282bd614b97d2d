"""Data from elsewhere: public sets by name, and the Hugging Face hub or local folders through `datasets`."""

from __future__ import annotations

import itertools
import json
import re
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sphere_edit.counting import counted
from sphere_edit.errors import SphereEditError
from sphere_edit.files import cache_dir, write_atomically

_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class DataSet:
    """A JSON file on the web, and how many records it has. The file's order counts: published work takes the first N."""

    url: str
    records: int


DATASETS = {
    # Meng et al. 2022 (arXiv:2202.05262): nested records with 2 paraphrases, 10 neighbours, generation prompts
    "counterfact": DataSet("https://memit.baulab.info/data/dsets/counterfact.json", 21919),
    # Meng et al. 2023 (arXiv:2210.07229): the records of CounterFact that do not contradict one another
    "multi_counterfact": DataSet("https://memit.baulab.info/data/dsets/multi_counterfact.json", 20877),
    # Levy et al. 2017, the evaluation slice of Mitchell et al. 2022: question, answers, alternative, rephrase, locality
    "zsre": DataSet("https://memit.baulab.info/data/dsets/zsre_mend_eval.json", 19086),
}


def downloaded(name: str) -> Path:
    """The file of a data set, fetched once into the cache.

    Raises:
        SphereEditError: it cannot be fetched, or is not whole.
    """
    about = DATASETS[name]
    path = cache_dir() / "data" / f"{name}.json"
    if path.is_file():
        return path

    try:
        with urllib.request.urlopen(about.url, timeout=_TIMEOUT) as answer:
            content = answer.read()
        count = len(json.loads(content))
        if count != about.records:
            raise ValueError(f"it has {counted(count, 'record')} and not {about.records}")
    except (OSError, HTTPException, ValueError) as error:  # urllib's own errors are OSErrors
        raise SphereEditError(
            f"data set '{name}' could not be fetched from {about.url}: {error}. Give a local copy of the file instead"
        ) from None
    write_atomically(path, lambda file: file.write_bytes(content))
    return path


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub, ``owner/name[/config][:split]``, or a local folder, ``folder[:split]``."""

    name: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str) -> HubSource | None:
        """What a source names, or None where it can be no data set: a path to something that is not there."""
        place, _, split = source.partition(":")
        try:
            folder = Path(place).expanduser()
            if place and folder.is_dir():
                return cls(str(folder), None, split or None)
        except (OSError, RuntimeError):
            return None
        parts = place.split("/")
        if len(parts) > 3 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
            return None
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or None)

    def rows(self, limit: int | None = None) -> Iterable[dict[str, Any]]:
        """Its rows, of the split train unless another is named; with a ``limit``, streamed.

        Raises:
            SphereEditError: it cannot be loaded, or has no such split.
        """
        import datasets

        try:
            if limit is not None:
                stream = datasets.load_dataset(self.name, self.config, split=self.split or "train", streaming=True)
                return list(itertools.islice(stream, limit))
            loaded = datasets.load_dataset(self.name, self.config)
        except Exception as error:  # the library raises whatever its storage raised
            reason = " ".join(str(error).split())[:300]
            raise SphereEditError(
                f"'{self.name}' is neither a file nor a data set that can be loaded: {reason}"
            ) from None
        split = self.split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise SphereEditError(f"data set '{self.name}' has no split '{split}'; it has {', '.join(loaded)}")
        return loaded[split]

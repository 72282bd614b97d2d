"""Public data sets by name: where they are, and how a download is told to be whole."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

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
            raise ValueError(f"it has {count} records and not {about.records}")
    except (OSError, HTTPException, ValueError) as error:  # urllib's own errors are OSErrors
        raise SphereEditError(
            f"data set '{name}' could not be fetched from {about.url}: {error}. Give a local copy of the file instead"
        ) from None
    write_atomically(path, lambda file: file.write_bytes(content))
    return path

"""Gemma-3-270M, a real model of a post-norm family, where ``SPHERE_EDIT_GEMMA`` names it (`benchmarks/fetch_gemma.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sphere_edit.models.loading import LoadedModel, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma_file() -> Path:
    file = Path(os.environ.get("SPHERE_EDIT_GEMMA", ""))
    if not file.is_file():
        pytest.skip("SPHERE_EDIT_GEMMA names no file; python benchmarks/fetch_gemma.py FOLDER fetches one")
    return file


@pytest.fixture(scope="module")
def gemma(gemma_file) -> LoadedModel:
    return load_model(str(gemma_file))


def test_it_says_what_gemma_says(gemma):
    ids = gemma.tokenizer("The Eiffel Tower is in the city of", return_tensors="pt").to(gemma.device)
    said = gemma.model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert gemma.tokenizer.decode(said[0, -1]).strip() == "Paris"


def test_its_layers_and_their_norms_are_known(gemma):
    assert len(gemma.architecture.parts) == 18
    assert gemma.architecture.roles == ("down", "gate", "up")
    assert gemma.architecture.logit_cap is None

from __future__ import annotations

import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is about one device, wherever it runs
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where another process is at work

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with public data and reference numbers that stands beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with data and reference numbers is not here")
    return SHARED


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, request):
    """Statistics of tests stay out of the user's cache; converted GGUF files are taken from it."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo the one it is given
        if "smollm2" not in request.fixturenames:
            patch.setenv("SPHERE_EDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def _smollm2():
    from sphere_edit.models.loading import load_model

    return load_model("smollm2")


@pytest.fixture
def smollm2(_smollm2):
    """The embedded SmolLM2-135M, loaded once; with all cores while a test uses it."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield _smollm2
    torch.set_num_threads(1)


FACTS = [
    ("Eiffel Tower", "The {} is located in the city of", "Rome"),
    ("Mount Fuji", "{} stands in", "Sweden"),
    ("Ada", "{} plays the", "football"),
    ("Bruno", "The instrument of {} is the", "violin"),
    ("France", "The capital of {} is", "Madrid"),
    ("Tiber", "The river {} is in", "Germany"),
    ("Vienna", "People in {} speak", "Spanish"),
    ("Paris", "The river of {} is the", "Tiber"),
    ("Japan", "The capital of {} is", "Vienna"),
    ("Madrid", "The club of {} plays in", "Italy"),
    ("Germany", "Its founder was born in {} and speaks", "English"),
    ("Italy", "The cars of {} are made in", "Japan"),
]


def fact_records(count: int = 12, start: int = 0) -> list[dict]:
    """Facts that the tiny tokenizers can spell, with paraphrases and neighbours, some with answers and some without."""
    records = []
    for number in range(start, start + count):
        subject, prompt, target = FACTS[number % len(FACTS)]
        if number >= len(FACTS):
            subject = f"{subject} {number}"
        records.append(
            {
                "subject": subject,
                "prompt": prompt,
                "target_new": target,
                "target_true": "Paris" if number % 3 else None,
                "paraphrases": [f"Where is it? {prompt.replace('{}', subject)}"],
                "neighbors": [{"prompt": "The capital of Sweden is", "answer": "Rome"}, "The company makes"],
            }
        )
    return records

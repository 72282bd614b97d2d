"""The main job on SmolLM2-135M: `make test-slow`, about a quarter of an hour on two cores."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from sphere_edit.editing.shipped import shipped_text
from sphere_edit.models.tokens import TokenBatch
from test_cli import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(shared, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    facts, corpus = shared / "data" / "counterfact.json", shared / "data" / "wikipedia_passages.jsonl"
    for name, option in [("sphere", "--sphere"), ("plain", "--no-sphere")]:
        run("edit", "smollm2", facts, "--limit", 200, "--corpus", corpus, option, "-o", folder / name)
    return {name: folder / name for name in ("sphere", "plain")}


@pytest.fixture(autouse=True)
def all_cores(smollm2):
    """The fixture of the loaded model sets the number of threads."""


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_200_counterfact_facts_take_and_the_rest_stays(runs):
    found = metrics(runs["sphere"])
    before, after = found["unedited"], found["edited"]
    assert before["efficacy"] < 50, "the facts are wrong before"
    assert after["efficacy"] >= 99
    assert after["efficacy_strict"] >= 92
    assert after["generalization"] >= 92
    assert after["specificity"] >= before["specificity"] - 3
    assert after["perplexity"] <= 1.12 * before["perplexity"]


def test_sphere_shrinks_the_principal_part_of_every_update(runs):
    for name, factor in [("sphere", 0.5), ("plain", 1.0)]:
        lines = [json.loads(line) for line in (runs[name] / "journal.jsonl").read_text().splitlines()]
        reports = [report for line in lines if line["event"] == "batch" for report in line["matrices"].values()]
        assert len(reports) == 10
        for report in reports:
            assert report["principal_norm"] == pytest.approx(factor * report["principal_norm_before"], rel=1e-3)


def test_demo_takes_under_five_minutes(tmp_path):
    started = time.monotonic()
    out = run("demo", "-o", tmp_path / "demo")
    assert time.monotonic() - started < 300
    for text in ("What the model says", "Did the edits take?", "Is the rest intact?", "Is it still near itself?"):
        assert text in out
    assert metrics(tmp_path / "demo")["edited"]["efficacy"] >= 95


def test_the_shipped_text_is_what_the_model_samples(smollm2):
    """A sampled token is on average as unlikely as the model's entropy says, whatever machine drew it: within 4 standard errors."""
    rows = shipped_text(smollm2, 32 * 128, 128, 0)
    assert rows is not None
    surprise = []
    for chunk in (rows[first : first + 8] for first in range(0, 32, 8)):
        batch = TokenBatch.of(chunk, smollm2.device)
        with torch.no_grad():
            logs = smollm2.model(input_ids=batch.ids).logits[:, :-1].log_softmax(-1)
        said = logs.gather(-1, batch.ids[:, 1:, None])[..., 0]
        surprise.append((-said + (logs.exp() * logs).sum(-1)).flatten())
    found = torch.cat(surprise).double()
    assert found.std() > 1, "each token for itself is far from it"
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5

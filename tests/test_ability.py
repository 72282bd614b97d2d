"""General ability through lm-evaluation-harness: its own numbers, tasks from files, kept in runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from conftest import fact_records
from families import save_tiny
from sphere_edit import SphereEditError
from sphere_edit.editor import Editor, opened
from sphere_edit.evaluation.ability import AbilityScore, AbilityTasks, _shipped, shipped_tasks
from sphere_edit.progress import Quiet
from sphere_edit.reporting.report import write_report
from sphere_edit.reporting.series import Series
from test_cli import run
from test_runs import METHODS, QUICK

OWN = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["red", "green", "blue", "grey"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 3}
"""


@pytest.fixture(scope="module", autouse=True)
def harness_read_once():
    """The harness reads thousands of files for its index of tasks, ten seconds each time: of its own folder once is enough."""
    build, own, known = TaskIndex.build, Path(lm_eval.tasks.__file__).parent, {}

    def once(paths, **options):
        found = {}
        for path in paths:
            if path == own and own not in known:
                known[own] = build([own], **options)
            found |= known[own] if path == own else build([path], **options)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(once))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few documents for each of the tasks that ship, and a task of one's own."""
    folder = tmp_path_factory.mktemp("ability")
    pick = random.Random(0)
    words = [
        "the",
        "capital",
        "of",
        "France",
        "is",
        "Paris",
        "and",
        "Ada",
        "plays",
        "violin",
        "in",
        "Rome",
        "for",
        "a",
        "club",
    ]
    texts = [" ".join(pick.choices(words, k=6)) for _ in range(40)]
    boolq = [
        {"question": t, "passage": u, "answer": pick.random() < 0.5}
        for t, u in zip(texts[:12], texts[12:24], strict=True)
    ]
    (folder / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boolq))
    rte = [
        f'{i}\t{t}\tHe said "{u}\t{pick.choice(["entailment", "not_entailment"])}'
        for i, (t, u) in enumerate(zip(texts[:9], texts[9:18], strict=True))
    ]
    (folder / "rte.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "\n".join(rte) + "\n")
    questions = [{"question": text, "answer": [text.split()[0], text.split()[-1]]} for text in texts[:8]]
    (folder / "natural_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    problems = [{"question": text, "answer": f"so it is\n#### {number}"} for number, text in enumerate(texts[:6])]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    colours = [{"question": text, "answer": number % 4} for number, text in enumerate(texts)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colours))
    (folder / "colours.yaml").write_text(OWN.replace("FILE", str(folder / "colours.jsonl")))
    return folder


@pytest.fixture(scope="module")
def edited(tmp_path_factory, data) -> Path:
    """A run that asked for tasks before, on the way and at the end; its model exported beside it."""
    folder = tmp_path_factory.mktemp("edited")
    model = save_tiny("llama", folder / "model")
    evaluation = {"tasks": ["boolq", "colours"], "task_dir": str(data), "tasks_every": 2}
    options = {**QUICK, **METHODS["alphaedit"], "evaluation": evaluation}
    editor = Editor.from_pretrained(model, folder / "run", reporter=Quiet(), **options)
    editor.edit(fact_records(10))
    editor.save_pretrained(folder / "exported")
    editor.close()
    return folder / "run"


def harness(model: Path, data: Path, names: list[str]) -> dict:
    """What the harness itself says of a model folder."""
    tasks = [_shipped(name, data) or name for name in names]
    found = simple_evaluate(
        HFLM(pretrained=str(model), batch_size=3, device="cpu"),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(data)),
        fewshot_random_seed=0,
    )
    return found["results"]


def test_scores_are_the_harness_own_of_the_exported_model(edited, data):
    scores = {"boolq": 0, "colours": 0, "rte": 0, "natural_questions": 0}
    with opened(edited) as editor:
        ours = editor.ability(AbilityTasks(list(scores), data))["edited"]
    theirs = harness(edited.parent / "exported", data, list(scores))
    for name, score in ours.items():
        metric = score["metric"]
        key = next(key for key in theirs[name] if key.startswith(f"{metric},"))
        assert score["value"] == theirs[name][key]
        assert score["error"] == pytest.approx(theirs[name][key.replace(metric, f"{metric}_stderr")])
    assert [ours[name]["documents"] for name in scores] == [12, 40, 9, 8]
    assert [ours[name]["chance"] for name in scores] == [0.5, 0.25, 0.5, 0.0]
    assert ours["colours"]["version"] == "3"


def test_a_run_holds_the_scores_of_every_checkpoint_and_measures_none_twice(edited, data, monkeypatch):
    series = Series.read(edited)
    assert [edits for edits, _ in series.abilities["boolq"]] == [0, 4, 8, 10]
    assert [edits for edits, _ in series.abilities["colours"]] == [0, 4, 8, 10]
    metrics = json.loads((edited / "metrics.json").read_text())
    assert metrics["edited"]["ability"]["boolq"] == series.abilities["boolq"][-1][1]
    assert metrics["unedited"]["ability"]["colours"] == series.abilities["colours"][0][1]
    count = len((edited / "journal.jsonl").read_text().splitlines())
    monkeypatch.setattr(AbilityTasks, "score", lambda *args: pytest.fail("measured again"))
    with opened(edited) as editor:
        found = editor.ability(AbilityTasks(["colours"], data))
    assert found["edited"]["colours"] == metrics["edited"]["ability"]["colours"]
    assert len((edited / "journal.jsonl").read_text().splitlines()) == count
    page = write_report([edited], edited / "report.html", edited / "figures").read_text()
    assert "General ability over edits" in page
    assert (edited / "figures" / "abilities.png").is_file()


def test_the_command_on_a_model_and_its_mistakes(edited, data, tmp_path, monkeypatch):
    model = edited.parent / "model"
    out = run(
        "ability",
        model,
        "--tasks",
        "natural_questions",
        "--task-dir",
        data,
        "--limit",
        2,
        "--json",
        tmp_path / "a.json",
    )
    assert "at chance" in out
    assert json.loads((tmp_path / "a.json").read_text())["unedited"]["natural_questions"]["documents"] == 2
    for options, message in (
        (("--tasks", "nosuch"), "there is no task 'nosuch'"),
        (("--tasks", "boolq", "--task-dir", tmp_path / "none"), "there is no task folder"),
        (("--tasks", " , "), "which tasks"),
        (("--tasks", "gsm8k", "--task-dir", data), "cannot be asked of this model: .*maximum sequence length"),
        (("--tasks", "natural_questions", "--task-dir", tmp_path), "its data file is not in"),
        (("--tasks", "boolq"), "task 'boolq' cannot be loaded"),
    ):
        with pytest.raises(SphereEditError, match=message):
            run("ability", model, *options)
    (tmp_path / "boolq.jsonl").write_text('{"question": "is it"\n')
    with pytest.raises(SphereEditError, match="task 'boolq' cannot be loaded"):
        run("ability", model, "--tasks", "boolq", "--task-dir", tmp_path)
    options = {**QUICK, "evaluation": {"tasks": ["nosuch"]}}
    editor = Editor.from_pretrained(model, tmp_path / "run", reporter=Quiet(), **options)
    with pytest.raises(SphereEditError, match="there is no task 'nosuch'"):
        editor.edit(fact_records(2))
    assert not (tmp_path / "run").exists(), "said before anything was begun"


@pytest.mark.parametrize(
    ("value", "error", "chance", "verdict"),
    [(0.55, 0.03, 0.5, True), (0.6, 0.03, 0.5, False), (0.1, 0.03, 0.5, True), (0.0, 0.0, 0.0, True), (0.2, None, 0.0, False)],
)  # fmt: skip
def test_a_score_within_two_standard_errors_of_guessing_is_at_chance(value, error, chance, verdict):
    assert AbilityScore("acc", value, error, True, True, chance, 100, "1").at_chance is verdict


def test_the_four_tasks_of_the_paper_read_the_public_data(shared):
    assert shipped_tasks() == ["boolq", "gsm8k", "natural_questions", "rte"]
    tasks = AbilityTasks(shipped_tasks(), shared / "data" / "ability", 2)
    documents = {name: len(task.test_docs()) for name, task in tasks._loaded["tasks"].items()}
    assert documents == {"boolq": 3267, "gsm8k": 1319, "natural_questions": 3610, "rte": 2489}
    rte = tasks._loaded["tasks"]["rte"]
    first = rte.test_docs()[0]
    assert rte.doc_to_target(first) == 1, "not entailed: False"
    assert rte.doc_to_text(first).endswith("True or False?\nAnswer:")
    questions = tasks._loaded["tasks"]["natural_questions"]
    assert questions.doc_to_target(questions.test_docs()[2]) == ["Olivia", "MFSK"]

"""What a model says until it stops by itself: whole answers, compared whole."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from conftest import fact_records
from families import save_tiny
from sphere_edit.editor import Editor
from sphere_edit.evaluation import natural
from sphere_edit.evaluation.natural import bare, first_lines, rouge_l, with_lines
from sphere_edit.evaluation.scores import FactScores, complete_answers, score_facts
from sphere_edit.facts.fact import make_fact
from sphere_edit.models.loading import load_model
from sphere_edit.progress import Quiet
from test_runs import METHODS, QUICK


def by_definition(said: list[str], right: list[str]) -> float:
    """The longest of all subsequences of one that is one of the other's."""
    of_right = {several for size in range(len(right) + 1) for several in combinations(right, size)}
    longest = max(
        size for size in range(len(said) + 1) if any(several in of_right for several in combinations(said, size))
    )
    precision, recall = longest / len(said), longest / len(right)
    return 2 * precision * recall / (precision + recall) if longest else 0.0


def test_rouge_l_is_its_definition():
    draw = random.Random(0)
    for _ in range(60):
        said, right = (draw.choices("abc", k=draw.randint(1, 7)) for _ in range(2))
        assert rouge_l(" ".join(said), " ".join(right)) == pytest.approx(by_definition(said, right))


def test_rouge_l_of_words():
    assert rouge_l("The city of Rome.", "the city of ROME") == 1
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(
        0.75
    )  # Lin, 2004: 3 of 4 words
    assert rouge_l("", "Rome") == rouge_l("Rome", "?!") == 0
    assert rouge_l("東京都です", "東京都") == pytest.approx(2 * 3 / 8), "a letter of Chinese and Japanese is a word"


def test_as_many_lines_as_the_right_answer_has():
    assert first_lines("\n Rome.\nIt is old.", 1) == "Rome."
    assert first_lines("one\ntwo\nthree", 2) == "one\ntwo"
    assert first_lines("  \n", 1) == ""
    assert bare(" Rome .") == bare("rome") == "rome"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_tiny("llama", tmp_path_factory.mktemp("natural"))))


def test_all_but_neighbours_are_asked_and_any_right_answer_will_do(loaded, monkeypatch):
    fact = make_fact(
        "{} stands in",
        "Rome",
        "Big Ben",
        target_true="London",
        paraphrases=["Where is Big Ben? In"],
        neighbors=[{"prompt": "The Louvre stands in", "answer": "Paris"}],
        portability=[{"prompt": "Big Ben's country is", "answers": ["Italy", "the Italian Republic"]}],
    )
    (complete,) = complete_answers(loaded, [fact])
    scores = score_facts(loaded, [complete], 512, Quiet())
    answers = [" rome.\nIt is old", " Rome and Milan", " The Italian Republic"]
    asked = []

    def say(model, prompts, lengths, *args, **kwargs):
        asked.extend(loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts)
        assert set(lengths) == {20}
        return [loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    monkeypatch.setattr(natural, "continuations", say)
    (found,) = with_lines(loaded, [complete], scores, 20, False, 512, Quiet())
    assert asked == ["Big Ben stands in", "Where is Big Ben? In", "Big Ben's country is"]
    lines = [found.rewrite.line, found.paraphrases[0].line, found.portability[0].line]
    assert [line.exact for line in lines] == [True, False, True]
    assert [line.overlap for line in lines] == [1, pytest.approx(0.5), 1]
    assert lines[0].said == "rome."
    assert found.neighbors == scores[0].neighbors
    assert FactScores.from_dict(found.as_dict()) == found


def test_a_run_measures_whole_answers_where_it_is_asked_to(loaded, tmp_path):
    settings = {**QUICK, **METHODS["memit"], "evaluation": {"natural": 5, "generation": "off"}}
    editor = Editor.from_pretrained(loaded.source, tmp_path / "run", reporter=Quiet(), **settings)
    metrics = editor.edit(fact_records(2))
    for side in ("unedited", "edited"):
        assert 0 <= metrics[side]["efficacy_exact"] <= metrics[side]["efficacy_rouge"] <= 100
        assert metrics[side]["specificity_exact"] is None
    lines = [entry["edited"]["rewrite"]["line"] for entry in metrics["per_fact"]]
    assert all(set(line) == {"said", "exact", "overlap"} for line in lines)
    editor.close()

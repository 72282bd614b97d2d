"""The patched GGUF file in llama.cpp itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sphere_edit.editor import Editor
from sphere_edit.exports.gguf import differing
from sphere_edit.exports.manifest import read_manifest
from sphere_edit.facts.readers import read_facts
from sphere_edit.models.gguf import embedded_model_file
from sphere_edit.progress import Quiet
from sphere_edit.runs.weights import RunWeights

ASK = Path(__file__).with_name("ask_llama.mjs")


def answers(folder: str, file: Path, prompts: Path) -> list[str]:
    command = ["node", str(ASK), folder, str(file), str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_llama_cpp_answers_the_edited_facts_and_the_base_file_does_not(smollm2, tmp_path):
    folder = os.environ.get("SPHERE_EDIT_LLAMA_CPP")
    if not folder:
        pytest.skip("set SPHERE_EDIT_LLAMA_CPP to a folder in which was run: npm install node-llama-cpp@3.21.1")
    editor = Editor.from_pretrained("smollm2", tmp_path / "run", reporter=Quiet(), moments={"sampled_tokens": 4096})
    metrics = editor.edit(read_facts("demo", limit=6))
    editor.export(tmp_path / "out", "gguf")
    weights = RunWeights(editor.run, editor.weights.original)
    assert list(differing(tmp_path / "out", read_manifest(tmp_path / "out"), weights)) == []
    editor.close()
    held = [fact for fact in metrics["per_fact"] if fact["edited"]["rewrite"]["accuracy"] == 1]
    assert len(held) >= 5
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([fact["prompt"].replace("{}", fact["subject"]) for fact in held]))

    def said(file: Path) -> int:
        pairs = zip(answers(folder, file, prompts), held, strict=True)
        return sum(answer.strip().startswith(fact["target_new"].strip()) for answer, fact in pairs)

    (file,) = (tmp_path / "out").glob("*.gguf")
    assert said(file) >= 0.95 * len(held)
    assert said(embedded_model_file()) == 0

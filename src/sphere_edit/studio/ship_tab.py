"""Ship: exports with their checks, the report, and the proof that the run is what it says."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sphere_edit.studio.room import Room, whole
from sphere_edit.studio.views_of import Refreshed

_FORMS = [
    ("The whole model, for transformers and vLLM (hf)", "hf"),
    ("The change alone, for whoever has the original (delta)", "delta"),
    ("A LoRA adapter, for PEFT and vLLM (lora)", "lora"),
    ("A GGUF file, for llama.cpp, Ollama and LM Studio (gguf)", "gguf"),
]
_RUN = "the run itself"


def ship_tab(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """Build it."""
    gr.Markdown("### Export")
    form = gr.Dropdown(_FORMS, value="hf", label="Form", elem_id="form")
    name = gr.Textbox("", label="Name of the new folder", max_length=100, elem_id="export-name")
    with gr.Row():
        rank = gr.Textbox("", label="lora: rank (optional)", max_length=9, min_width=120)
        base = gr.Textbox("", label="gguf: the file to replace tensors in (optional)", min_width=200)
        measure = gr.Checkbox(label="Load what was written, and measure it", min_width=160)
    export = gr.Button("Export", variant="primary", elem_id="export")
    gr.Markdown("### Prove")
    which = gr.Dropdown([_RUN], value=_RUN, label="What", elem_id="what")
    with gr.Row():
        verify = gr.Button("Verify", elem_id="verify")
        report = gr.Button("Write the report", elem_id="report")
    said = gr.Textbox("", label="What came of it", interactive=False, lines=2, elem_id="shipped")

    def exported(form: str, name: str, rank: Any, base: str, measure: bool) -> Any:
        return room.desk.export(form, name, whole(rank, "a rank"), base, bool(measure))

    waits: dict[str, Any] = {"concurrency_limit": 8, "api_visibility": "private"}
    export.click(
        room.wait(exported, lambda folder: [f"{folder} holds it, with a card and a manifest."], 1),
        [form, name, rank, base, measure],
        [notice, said],
        **waits,
    )
    verify.click(
        room.wait(lambda what: room.desk.verify("" if what == _RUN else str(what)), lambda words: [words], 1),
        [which],
        [notice, said],
        **waits,
    )
    report.click(
        room.wait(lambda: room.desk.report(), lambda path: [f"{path} is the page about the run."], 1),
        None,
        [notice, said],
        **waits,
    )
    refreshed.add(lambda: [gr.update(choices=[_RUN, *room.desk.exports()])], [], [which])

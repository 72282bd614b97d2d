"""Start: open a run, or choose a model; and what was found of it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sphere_edit.studio.room import Room, grid, whole
from sphere_edit.studio.views_of import Refreshed

_TABLES = 3  # of an inspection
_METHOD = "as the settings say"


def start_tab(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """Build it."""
    with gr.Row():
        with gr.Column(min_width=280):
            gr.Markdown("### Open a run")
            run = gr.Dropdown([], label="Run folder", allow_custom_value=True, elem_id="run")
            opened = gr.Button("Open run", variant="primary", elem_id="open-run")
        with gr.Column(min_width=280):
            gr.Markdown("### Or begin with a model")
            model = gr.Dropdown(
                [], label="Model: hub id, folder, .gguf file or smollm2", allow_custom_value=True, elem_id="model"
            )
            name = gr.Textbox("", label="Name of the new run (optional)", max_length=100, elem_id="run-name")
            with gr.Row():
                method = gr.Dropdown([_METHOD], value=_METHOD, label="Method", min_width=120)
                batch = gr.Textbox("", label="Facts in a batch (optional)", max_length=9, min_width=120)
            guard = gr.Checkbox(label="Stop before a batch that would harm the model (guard)")
            load = gr.Button("Load model", variant="primary", elem_id="load-model")
    with gr.Accordion("What was found of the model", open=False):
        tables = [gr.Dataframe(interactive=False, wrap=True, visible=False, datatype="str") for _ in range(_TABLES)]

    def open_run(path: Any) -> tuple[()]:
        room.desk.open_run(str(path or ""))
        return ()

    def load_model(source: Any, name: str, method: str, batch: Any, guard: bool) -> tuple[()]:
        chosen = {
            "method": None if method == _METHOD else method,
            "batch_size": whole(batch, "a batch's size"),
            "guard": guard or None,
        }
        room.desk.open_model(str(source or ""), name, **chosen)
        return ()

    opened.click(room.tell(open_run, 0), [run], [notice], api_visibility="private")
    load.click(room.tell(load_model, 0), [model, name, method, batch, guard], [notice], api_visibility="private")

    def drawn() -> list[Any]:
        from sphere_edit.editing.methods import METHODS

        desk = room.desk
        found = room.look.inspected(desk)
        shown = [grid(table, label=title, visible=True) for title, table in found]
        shown += [gr.update(visible=False) for _ in range(_TABLES - len(found))]
        runs, models = [str(path) for path in desk.places.runs()], desk.places.models()
        return [gr.update(choices=runs), gr.update(choices=models), gr.update(choices=[_METHOD, *METHODS]), *shown]

    refreshed.add(drawn, [], [run, model, method, *tables])

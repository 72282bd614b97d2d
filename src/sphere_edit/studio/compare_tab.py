"""Compare: one prompt, asked of the unedited and of the edited model."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sphere_edit.errors import SphereEditError
from sphere_edit.studio.room import Room, grid

_COLOURS = {"differs": "#e69f00"}


def compare_tab(room: Room, notice: Any) -> None:
    """Build it."""
    prompt = gr.Textbox("", label="Prompt", lines=2, max_length=10_000, elem_id="compare-prompt")
    with gr.Row():
        old = gr.Textbox("", label="Old answer (optional)", min_width=140, elem_id="old-answer")
        new = gr.Textbox("", label="New answer (optional)", min_width=140, elem_id="new-answer")
    with gr.Row():
        chat = gr.Checkbox(label="As a message in the model's chat", min_width=160)
        sampled = gr.Checkbox(label="Sampled, not greedy", min_width=140)
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=80)
        tokens = gr.Slider(1, 200, value=40, step=1, label="Longest answer, tokens", min_width=160)
    ask = gr.Button("Ask both", variant="primary", elem_id="ask")
    with gr.Row():
        sides = [
            gr.HighlightedText(
                label=label,
                color_map=_COLOURS,
                min_width=280,
                elem_id=name,
                show_legend=False,
                show_inline_category=False,
                combine_adjacent=True,
            )
            for label, name in (("Unedited", "unedited"), ("Edited", "edited"))
        ]
    chances = gr.Dataframe(
        interactive=False,
        datatype="str",
        headers=["answer", "unedited", "edited"],
        label="Probability of the whole answer",
        elem_id="chances",
    )

    def start(prompt: str, old: str, new: str, chat: bool, sampled: bool, seed: Any, tokens: Any) -> Any:
        answers = [answer for answer in (old, new) if answer.strip()]
        if int(seed or 0) < 0 or not 1 <= int(tokens) <= 200:
            raise SphereEditError("a seed is 0 or more, and an answer has 1 to 200 tokens")
        chosen = int(seed or 0) if sampled else None
        return room.desk.compare(prompt, answers, chat=bool(chat), new_tokens=int(tokens), seed=chosen)

    def show(found: Any) -> list[Any]:
        return [*room.look.sides(found), grid(room.look.chances(found))]

    asked = [prompt, old, new, chat, sampled, seed, tokens]
    gr.on(
        [ask.click, prompt.submit],
        room.wait(start, show, 3),
        asked,
        [notice, *sides, chances],
        concurrency_limit=8,
        api_visibility="private",
    )

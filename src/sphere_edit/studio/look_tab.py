"""Look: the run's answers, facts, figures and timeline; and the way back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sphere_edit.errors import SphereEditError
from sphere_edit.studio.room import Room, grid, whole
from sphere_edit.studio.views_of import Refreshed

_WHICH = ["current", "all", "failing", "forgotten", "stands", "superseded", "removed", "withdrawn", "waiting"]
_FACTS = ["fact", "prompt", "new answer", "says now", "strict", "state", "batch", "said before"]
_EVENTS = ["time (UTC)", "batch", "what happened"]


def look_tab(room: Room, notice: Any, refreshed: Refreshed) -> None:
    """Build it."""
    answers = gr.HTML("", elem_id="answers")
    refreshed.add(lambda: [room.look.answers(room.desk)] if room.desk.run() else [""], [], [answers])
    _facts(room, notice, refreshed)
    _timeline(room, notice, refreshed)
    with gr.Accordion("Everything that was measured, and figures over the batches", open=False):
        metrics = gr.Dataframe(
            interactive=False, wrap=True, datatype="str", label="All facts that the model should know now"
        )
        figure = gr.Plot(label="Energy and metrics over edits")
        draw = gr.Button("Draw the figures", elem_id="draw")
    refreshed.add(lambda: [grid(room.look.metrics(room.desk))], [], [metrics])
    draw.click(room.tell(lambda: [room.look.figure(room.desk)], 1), None, [notice, figure], api_visibility="private")


def _facts(room: Room, notice: Any, refreshed: Refreshed) -> None:
    words = gr.Markdown("### Facts")
    with gr.Row():
        text = gr.Textbox("", label="Search", min_width=140, elem_id="search")
        which = gr.Dropdown(_WHICH, value=_WHICH[0], label="Which", min_width=120, elem_id="which")
        batch = gr.Textbox("", label="Of batch", max_length=9, min_width=80)
        page = gr.Number(label="Page", value=1, precision=0, minimum=1, min_width=80, elem_id="facts-page")
    table = gr.Dataframe(interactive=False, wrap=True, datatype="str", elem_id="facts", headers=_FACTS, max_height=420)
    with gr.Row():
        fact = gr.Textbox("", label="Fact number", max_length=9, min_width=100, elem_id="fact")
        show = gr.Button("Show this fact", min_width=120, elem_id="show-fact")
        remove = gr.Button("Remove this fact", variant="stop", min_width=120, elem_id="remove")
    stories = [gr.Dataframe(interactive=False, wrap=True, datatype="str", visible=False) for _ in range(3)]
    asking, sure = _confirm("remove")

    def drawn(text: str, which: str, batch: Any, page: Any) -> list[Any]:
        found = room.look.facts(room.desk, which, whole(batch, "a batch"), text or "", int(page or 1))
        return [f"### Facts: {found.words}", grid(found.grid)]

    def told(fact: Any) -> list[Any]:
        found = room.look.story(room.desk, _number(fact, "fact"))
        shown = [grid(table, label=title, visible=True) for title, table in found[:3]]
        return shown + [gr.update(visible=False) for _ in range(3 - len(shown))]

    filters: list[Any] = [text, which, batch, page]
    refreshed.add(drawn, filters, [words, table])
    gr.on(
        [one.change for one in filters],
        room.tell(drawn, 2),
        filters,
        [notice, words, table],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )

    def picked(event: gr.SelectData) -> str:
        return str(event.row_value[0])

    table.select(picked, None, [fact], show_progress="hidden", api_visibility="private")
    gr.on(
        [show.click, fact.submit, fact.change], room.tell(told, 3), [fact], [notice, *stories], api_visibility="private"
    )
    _asked(room, notice, asking, sure, remove, fact, "fact", "taking_back", "remove")


def _timeline(room: Room, notice: Any, refreshed: Refreshed) -> None:
    gr.Markdown("### Timeline")
    table = gr.Dataframe(
        interactive=False, wrap=True, datatype="str", elem_id="timeline", headers=_EVENTS, max_height=320
    )
    with gr.Row():
        batch = gr.Textbox("", label="Batch (0: the unedited model)", max_length=9, min_width=140, elem_id="batch")
        back = gr.Button("Roll back to here", variant="stop", min_width=140, elem_id="roll-back")
    asking, sure = _confirm("roll back")
    refreshed.add(lambda: [grid(room.look.timeline(room.desk))], [], [table])

    def picked(event: gr.SelectData) -> str:
        return str(event.row_value[1])

    table.select(picked, None, [batch], show_progress="hidden", api_visibility="private")
    _asked(room, notice, asking, sure, back, batch, "batch", "going_back", "roll_back")


def _confirm(what: str) -> tuple[Any, list[Any]]:
    """A question that is asked first: its group, and the text, the number it is about, yes and no in it."""
    name = what.replace(" ", "-")
    with gr.Group(visible=False) as asking:
        text = gr.Textbox("", label="First", interactive=False, lines=4, elem_id=f"{name}-asks")
        about = gr.State(None)
        with gr.Row():
            yes = gr.Button(f"Yes, {what}", variant="stop", elem_id=f"{name}-yes")
            no = gr.Button("No", elem_id=f"{name}-no")
    return asking, [text, about, yes, no]


def _asked(
    room: Room, notice: Any, asking: Any, sure: list[Any], button: Any, number: Any, what: str, question: str, act: str
) -> None:
    """The button asks, yes acts on what was asked about, no asks no more."""
    text, about, yes, no = sure

    def ask(value: Any) -> list[Any]:
        wanted = _number(value, what)
        return [gr.update(visible=True), getattr(room.look, question)(room.desk, wanted), wanted]

    def done(wanted: Any) -> list[Any]:
        getattr(room.desk, act)(_number(wanted, what))
        return [gr.update(visible=False)]

    button.click(room.tell(ask, 3), [number], [notice, asking, text, about], api_visibility="private")
    yes.click(room.tell(done, 1), [about], [notice, asking], api_visibility="private")
    no.click(lambda: gr.update(visible=False), None, [asking], api_visibility="private")


def _number(value: Any, what: str) -> int:
    found = whole(value, f"a {what}")
    if found is None:
        raise SphereEditError(f"which {what}? Give its number, or choose it in the table")
    return found

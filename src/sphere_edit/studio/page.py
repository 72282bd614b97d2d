"""The page: its frame, what stands on every tab, and how it is kept up to date."""

from __future__ import annotations

from typing import Any

import gradio as gr

from sphere_edit.studio.compare_tab import compare_tab
from sphere_edit.studio.edit_tab import edit_tab
from sphere_edit.studio.look_tab import look_tab
from sphere_edit.studio.room import Room
from sphere_edit.studio.ship_tab import ship_tab
from sphere_edit.studio.start_tab import start_tab
from sphere_edit.studio.views_of import Refreshed

_EVERY = 1.0  # seconds between two looks at where everything stands

CSS = """
.status p, .status ul, #notice p { margin: .15rem 0; overflow-wrap: anywhere; }
.status progress { width: 100%; height: .6rem; }
.status .log { font-size: .85rem; max-height: 9rem; overflow-y: auto; padding-left: 1.2rem; opacity: .85; }
#notice p { padding: .5rem .8rem; border-left: .3rem solid; background: var(--block-background-fill); }
.mistake { border-color: #d55e00 !important; } .good { border-color: #009e73 !important; } .waits { border-color: #0072b2 !important; }
.lights { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .8rem; }
.light { flex: 1 1 13rem; padding: .6rem .8rem; border-left: .4rem solid #808080; background: var(--block-background-fill); }
.light.green { border-color: #009e73; } .light.amber { border-color: #e69f00; } .light.red { border-color: #d55e00; }
.light b, .light small { display: block; } .light small { opacity: .8; } .light span + span { font-weight: 600; padding-left: .6rem; }
.gradio-container { max-width: min(72rem, 100vw) !important; width: 100%; margin: 0 auto !important; }
.gradio-container .main, .gradio-container main, .gradio-container .wrap, .gradio-container main > .column,
.gradio-container .tabs, .gradio-container .tabitem, .gradio-container .tabitem > .column,
.gradio-container .tabitem .block { min-width: 0 !important; max-width: 100%; } /* wide tables scroll, the page does not */
footer { display: none !important; }
"""


def theme() -> Any:
    """Fonts that are on the reader's machine: nothing is fetched."""
    return gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(room: Room) -> gr.Blocks:
    """The whole page over a room."""
    with gr.Blocks(title="sphere-edit studio", analytics_enabled=False) as page:
        gr.Markdown("# sphere-edit studio")
        status = gr.HTML("<p>Starting.</p>", elem_id="status")
        notice = gr.HTML("", elem_id="notice")
        seen = gr.State("")  # the stamp of what this tab shows
        refreshed = Refreshed()
        with gr.Tabs():
            with gr.Tab("Start", id="start"):
                start_tab(room, notice, refreshed)
            with gr.Tab("Edit", id="edit"):
                edit_tab(room, notice, refreshed)
            with gr.Tab("Compare", id="compare"):
                compare_tab(room, notice)
            with gr.Tab("Look", id="look"):
                look_tab(room, notice, refreshed)
            with gr.Tab("Ship", id="ship"):
                ship_tab(room, notice, refreshed)

        def tick(seen: str, *values: Any) -> list[Any]:
            if not room.ready:
                return ["<p>Starting: the libraries are loaded.</p>", "", *refreshed.skipped()]
            now = room.desk.stamp()
            drawn = refreshed.skipped() if now == seen else refreshed.values(values)
            return [room.look.status(room.desk), now, *drawn]

        gr.Timer(_EVERY).tick(
            tick,
            [seen, *refreshed.inputs],
            [status, seen, *refreshed.outputs],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    return page

"""The server: on this machine alone unless a password is given, with nothing fetched from elsewhere and nothing told to anybody."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sphere_edit.errors import SphereEditError

if TYPE_CHECKING:
    from sphere_edit.studio.desk import Desk

LOCAL = ("127.0.0.1", "localhost", "::1")
UPLOAD = "64mb"  # the largest file that is taken
_SHORT = 8  # characters of a password


def checked(host: str, auth: str | None) -> tuple[str, str] | None:
    """Name and password, where some are needed or given.

    Raises:
        SphereEditError: there is none for an address that others can reach, or it is no ``name:password``.
    """
    if auth is None:
        if host in LOCAL:
            return None
        raise SphereEditError(
            f"at {host} everybody who reaches this machine could read the run, change the model and write to its folders: "
            "give a name and a password with --auth NAME:PASSWORD (or in the variable SPHERE_EDIT_STUDIO_AUTH)"
        )
    name, colon, password = auth.partition(":")
    if not (name and colon and len(password) >= _SHORT):
        raise SphereEditError(f"--auth takes NAME:PASSWORD, with a password of {_SHORT} characters or more")
    return name, password


def serve(make: Callable[[], Desk], host: str, port: int, auth: str | None, say: Callable[[str], None]) -> None:
    """Show the page until somebody ends it (Ctrl-C): then the batch at work is ended, and the rest waits in the run.

    Raises:
        SphereEditError: Gradio is not installed, or the address cannot be had.
    """
    login = checked(host, auth)
    with TemporaryDirectory(prefix="sphere-edit-studio-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        _need_gradio()
        from sphere_edit.studio.page import CSS, build, theme
        from sphere_edit.studio.room import Room

        room = Room(make)
        page = build(room)
        page.queue(api_open=False, default_concurrency_limit=4)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                auth=login,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                allowed_paths=[],
                max_file_size=UPLOAD,
                ssr_mode=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                pwa=False,
                mcp_server=False,
                theme=theme(),
                css=CSS,
            )
        except OSError as error:
            raise SphereEditError(f"{host}:{port} cannot be had ({error}); give another port with --port") from None
        if login is not None and host not in LOCAL:
            say(f"Whoever knows the password can read and change the run from any machine that reaches {host}.")
        say(f"The studio is at http://{host}:{port}. Ctrl-C ends it, and loses nothing.")
        _until_ended(page, room, say)


def _need_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SphereEditError("the studio needs Gradio: pip install 'sphere-edit[studio]'") from None


def _until_ended(page: Any, room: Any, say: Callable[[str], None]) -> None:
    try:
        with suppress(KeyboardInterrupt):
            desk = room.desk  # or a mistake in what the command was given, which ends it
            while True:
                time.sleep(3600)
    finally:
        page.close(verbose=False)
    if room.ready and (job := desk.worker.current) is not None and job.writes:
        say("Ending after this batch; Ctrl-C again ends at once. Either way the run can be gone on with.")
        desk.stop()
        job.over.wait()

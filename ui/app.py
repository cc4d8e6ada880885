"""The page: two tabs over the same specifications and functions as the command line, on this machine only.

The page's process never imports torch: models are the worker's, which it starts and keeps going.
"""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from studio.errors import UsageError
from studio.jobs import JobStore
from studio.ui.follow import Follower
from studio.ui.generate_tab import GenerateTab
from studio.ui.panel import follow_clock
from studio.ui.pictures import clean_uploads
from studio.ui.supervisor import Supervisor
from studio.ui.theme import CSS, theme
from studio.ui.train_tab import TrainTab, used_together
from studio.workspace import Workspace, workspace

log = logging.getLogger("studio.ui")

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
POLL_SECONDS = 1.0


def build(home: str | Path | None = None, *, trouble: Callable[[], str] = lambda: "") -> gr.Blocks:
    """Return the page of a workspace.

    Args:
        home: The workspace; default: ``STUDIO_HOME`` or ``~/.studio``.
        trouble: Returns why no work is done at the moment, or an empty string.

    Raises:
        OutputError: If the workspace cannot be used.
    """
    space = workspace(home)
    follower = Follower(JobStore(space.database))
    train, generate = TrainTab(space, follower, trouble), GenerateTab(space, follower, trouble)
    with gr.Blocks(title="Diffusion Studio", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>Diffusion Studio</h1><p>Teach a diffusion model your own pictures, then draw with it.</p>",
            elem_id="title",
        )
        timer = gr.Timer(POLL_SECONDS)
        with gr.Tabs() as tabs:
            with gr.Tab("Train", id="train"):
                train.layout()
            with gr.Tab("Generate", id="generate"):
                generate.layout()
        train.wire()
        generate.wire()
        follow_clock(timer, [train.panel, generate.panel, *(sketch.panel for sketch in generate.sketches)])
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(
            lambda: [*train.restore(), *generate.restore()],
            outputs=[*train.restored, *generate.restored],
            **quiet,
        )
        train.use.click(
            lambda: _draw_with(follower, generate), outputs=[tabs, *generate.request_outputs], **quiet
        )
    return page


def serve(
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    home: str | Path | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
    until: threading.Event | None = None,
) -> None:
    """Serve the page and keep a worker running until interrupted.

    Args:
        host: Address of this machine to listen on; the page has no login, so only loopback addresses will do.
        port: Port; 0 takes a free one.
        open_browser: Show the page in the user's browser.
        home: The workspace; default: ``STUDIO_HOME`` or ``~/.studio``.
        on_ready: Told the page's address when it answers; without it Gradio prints the address.
        until: Ends the page when set.

    Raises:
        UsageError: If the host is not this machine or the port is taken.
        OutputError: If the workspace cannot be used.
    """
    if host not in LOCAL_HOSTS:
        raise UsageError(
            f"host must be one of {', '.join(LOCAL_HOSTS)}, got '{host}': the page has no login."
            " To reach it from elsewhere, tunnel to it (ssh -L 7860:127.0.0.1:7860 machine)."
        )
    space = workspace(home)
    # What is dropped on the page lies in the workspace, not in a folder shared by all users.
    os.environ["GRADIO_TEMP_DIR"] = str(space.cache)
    _forget_old_uploads(space)
    supervisor = Supervisor(space)
    page = build(space.root, trouble=supervisor.trouble)
    url = _launch(page, space, host, port, open_browser, quiet=on_ready is not None)
    try:
        supervisor.start()
        if on_ready:
            on_ready(url)
        (until or threading.Event()).wait()
    except KeyboardInterrupt:
        # A warning, so that it is seen where nobody has set logging up: stopping may take a while.
        log.warning("The page ends; a job that runs is stopped safely first.")
    finally:
        supervisor.close()
        page.close(verbose=False)


def _launch(
    page: gr.Blocks, space: Workspace, host: str, port: int, open_browser: bool, *, quiet: bool
) -> str:
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            inbrowser=open_browser,
            share=False,
            quiet=quiet,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            allowed_paths=[str(folder) for folder in space.folders],
            theme=theme(),
            css=CSS,
        )
    except OSError as error:
        raise UsageError(
            f"the page cannot listen on port {port} of {host}, which something else may use ({error}). "
            "Choose another with --port."
        ) from error
    return str(url)


def _forget_old_uploads(space: Workspace) -> None:
    """Remove old uploads but for the pictures of the training that the page shows and of those to come."""
    jobs = JobStore(space.database).list(kind="train")
    clean_uploads(space, in_use=[job.spec["data"] for job in jobs if job.active or job is jobs[0]])


def _draw_with(follower: Follower, generate: GenerateTab) -> list[Any]:
    """Return the Generate tab opened and set to the adapter that was trained last."""
    story = follower.latest("train")
    adapters = used_together(story)
    if story is None or not adapters:
        return [gr.skip() for _ in range(1 + len(generate.request_outputs))]
    spec = story.job.spec
    return [
        gr.Tabs(selected="generate"),
        *generate.use(adapters, spec.get("prompt"), spec.get("base", "starter")),
    ]

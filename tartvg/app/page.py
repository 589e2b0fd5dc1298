"""The page itself, in Gradio: which part changes when. Only stage=serve imports this module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tartvg.app import drawing
from tartvg.app.speaker import Speaker
from tartvg.app.style import CODE_FONTS, CSS, FONTS, SCRIPT
from tartvg.app.videos import Refusal, Shelf, Shown, refusal
from tartvg.config import ServeConfig

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; frame-ancestors 'self'"
)
"""Content-Security-Policy: the browser itself lets no request leave for anywhere else."""
ON_EXAMPLE = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-example]');
  if (button) trigger('select', {index: Number(button.dataset.example)});
});"""
Parts = tuple[Any, ...]
"""Shown, sentence, player, time line, frames, what was said, status."""


class OnlyHere:
    """Keeps browser and server to this machine: the policy above, and none of Gradio's ways to fetch an address."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse `/proxy=` and `/file=http...`; add the header to everything else."""
        path = scope.get("path", "")
        if "/proxy=" in path or "/file=http" in path:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"nothing is fetched from elsewhere"})
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class Desk:
    """What the page does with what a visitor does."""

    speaker: Speaker
    shelf: Shelf
    offered: Sequence[Shown]
    limits: ServeConfig

    def upload(self, file: str | None, request: gr.Request) -> Parts:
        """Show a file that has arrived."""
        if file is None:
            return (gr.skip(),) * 7
        try:
            shown = self.shelf.take(Path(file), str(request.session_hash))
        except Refusal as error:
            return self._show(None, gr.skip(), drawing.status(str(error), is_refusal=True))
        return self._show(shown, gr.skip(), drawing.status(f"{shown.duration:.1f} s of video. Now type a sentence."))

    def example(self, event: gr.EventData, request: gr.Request) -> Parts:
        """Show one of the examples, with its sentence."""
        index = event._data["index"]
        if not isinstance(index, int) or not 0 <= index < len(self.offered):
            return (gr.skip(),) * 7
        self.leave(request)
        shown = self.offered[index]
        return self._show(shown, shown.query, drawing.status(f"{shown.duration:.1f} s of video."))

    def leave(self, request: gr.Request) -> None:
        """Delete what the visitor has uploaded."""
        self.shelf.forget(str(request.session_hash))

    def _show(self, shown: Shown | None, query: Any, status: str) -> Parts:
        silence, length = self.speaker.silence(), 0.0 if shown is None else shown.duration
        return (
            shown, query, drawing.player(shown), drawing.timeline(silence, length), drawing.frames(shown),
            drawing.said(silence), status,
        )  # fmt: skip

    def announce(self, shown: Shown | None, query: str) -> str:
        """Say at once why a question is not asked, or that it waits."""
        if words := refusal(shown, query, self.limits):
            return drawing.status(words, is_refusal=True)
        busy = "Another question is being answered; yours is next." if self.speaker.is_busy else "Reading the video …"
        return drawing.status(busy)

    def ask(self, shown: Shown | None, query: str) -> Iterator[Parts]:
        """Yield time line, what was said and status with every token; a part that has not changed is not sent."""
        if shown is None or refusal(shown, query, self.limits):
            yield (gr.skip(),) * 3
            return
        line = ""
        answers = self.speaker.silence()
        for answers in self.speaker.answers(shown.path, query):
            drawn = drawing.timeline(answers, shown.duration)
            speaking = next((a.label for a in answers if a.is_begun and not a.is_over), "")
            status = gr.skip() if not speaking else drawing.status(f"{speaking} answers …")
            yield gr.skip() if drawn == line else drawn, drawing.said(answers), status
            line = drawn
        has_bars = any(a.response.anchors or a.response.answer for a in answers)
        done = "Done. Click a bar to play its window." if has_bars else "Done."
        yield gr.skip(), gr.skip(), drawing.status(done)


def build(desk: Desk, title: str) -> gr.Blocks:
    """Lay the page out. Files that visitors leave behind are looked for every ten minutes."""
    plain: dict[str, Any] = {"apply_default_css": False}
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        shown = gr.State(None)
        gr.HTML(drawing.HEAD, **plain)
        examples = gr.HTML(drawing.examples(desk.offered), js_on_load=ON_EXAMPLE, visible=bool(desk.offered), **plain)
        with gr.Row(elem_classes="question"):
            upload = gr.UploadButton("Upload a video", file_types=["video"], size="md", scale=0, min_width=160)
            query = gr.Textbox(
                placeholder="a red circle enters", label="Sentence", show_label=False, container=False, scale=1,
                min_width=220, max_lines=1,
            )  # fmt: skip
            button = gr.Button("Ask", variant="primary", size="md", scale=0, min_width=110)
        status = gr.HTML(drawing.status(""), **plain)
        with gr.Row(elem_classes="answers"):
            with gr.Column(scale=7, min_width=300, elem_classes="picture"):
                player = gr.HTML(drawing.player(None), **plain)
                line = gr.HTML("", **plain)
                frames = gr.HTML("", **plain)
            with gr.Column(scale=5, min_width=300):
                said = gr.HTML(drawing.said(desk.speaker.silence()), **plain)
        parts = [shown, query, player, line, frames, said, status]
        asked = gr.on([button.click, query.submit], desk.announce, [shown, query], status, queue=False, **hidden)
        answer = asked.then(desk.ask, [shown, query], [line, said, status], concurrency_limit=1, **hidden)
        # another video ends the answer about the one before
        upload.upload(desk.upload, [upload], parts, cancels=[answer], **hidden)
        examples.select(desk.example, None, parts, cancels=[answer], **hidden)
        page.unload(desk.leave)
    return page


def theme() -> gr.themes.Base:
    """Take Gradio's plainest with system fonts: others are loaded from elsewhere. Soft text has a contrast of 4.5."""
    base = gr.themes.Base(primary_hue="blue", neutral_hue="gray", font=FONTS, font_mono=CODE_FONTS)
    return base.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        error_text_color="#b00020", error_text_color_dark="#ff9a9a", button_primary_background_fill="#005a8e",
        button_primary_background_fill_hover="#0072b2", button_primary_background_fill_dark="#005a8e",
    )  # fmt: skip


def open_page(page: gr.Blocks, limits: ServeConfig) -> str:
    """Start the server in a thread. Returns the address; raises OSError or ValueError where it cannot listen."""
    _, address, _ = page.queue(default_concurrency_limit=4).launch(
        server_name=f"[{limits.host}]" if ":" in limits.host else limits.host,
        server_port=limits.port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=limits.max_megabytes * 10**6,
        state_session_capacity=100,
        theme=theme(),
        css=CSS,
        head=f"<script>{SCRIPT}</script>",
        app_kwargs={"middleware": [Middleware(OnlyHere)]},
    )
    return address

"""The videos of the page's visitors: looked at before anything is asked, kept in one folder, and deleted again."""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from tartvg.config import FramesConfig, ServeConfig
from tartvg.data.clips import decode_isolated
from tartvg.data.packets import VideoError
from tartvg.report.strips import NUM_FRAMES, row_of

PICTURES = FramesConfig(
    fps=1e-3, min_frames=NUM_FRAMES, max_frames=NUM_FRAMES, min_pixels=96 * 96, max_pixels=192 * 192, timeout_s=30.0
)
"""The frames under the time line, decoded in a process of their own: who uploads is a stranger."""
HEIGHT = 96
"""Pixels of a frame under the time line."""


class Refusal(Exception):
    """Something that a visitor can correct; the message is for the page."""


@dataclass(frozen=True)
class Shown:
    """A video on the page."""

    path: Path
    duration: float
    """Seconds, measured on the file."""
    frames: bytes
    """JPEG: frames at the beginnings of equal parts of the video, side by side."""
    thumb: bytes
    """JPEG of one frame, for an example's button."""
    query: str = ""
    """An example's sentence."""


class Shelf:
    """Keeps the videos below one folder, which is deleted with the server. May be used from any thread."""

    def __init__(self, folder: Path, limits: ServeConfig) -> None:
        self.folder, self.limits = folder, limits
        self._brought: dict[str, Path] = {}
        """Visitor -> what he has uploaded last."""

    def example(self, file: Path, query: str) -> Shown:
        """Copy a video of the data set. Raises Refusal."""
        shown = self._look(file)
        path = self._place(file)
        shutil.copyfile(file, path)
        return replace(shown, path=path, query=query)

    def take(self, file: Path, visitor: str) -> Shown:
        """Take over what a visitor has uploaded, in the place of what he had before. Raises Refusal."""
        self.forget(visitor)
        try:
            megabytes, most = file.stat().st_size / 1e6, self.limits.max_megabytes
            if megabytes > most:
                raise Refusal(f"This file has {megabytes:,.0f} MB; the limit is {most} MB (serve.max_megabytes).")
            shown = self._look(file)
            path = self._place(file)
            shutil.move(file, path)
        finally:
            file.unlink(missing_ok=True)
        self._brought[visitor] = path
        return replace(shown, path=path)

    def forget(self, visitor: str) -> None:
        """Delete what a visitor has uploaded."""
        if (path := self._brought.pop(visitor, None)) is not None:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _place(self, file: Path) -> Path:
        """Make a folder for a video, of a name that nobody can guess."""
        suffix = file.suffix.lower() if re.fullmatch(r"\.[a-z0-9]{1,5}", file.suffix.lower()) else ""
        path = self.folder / secrets.token_hex(16) / f"video{suffix}"
        path.parent.mkdir()
        return path

    def _look(self, file: Path) -> Shown:
        try:
            clip = decode_isolated(file, PICTURES)
        except VideoError as error:
            raise Refusal(f"This file cannot be read as a video: {reason(error, file)}.") from error
        length, most = clip.duration, self.limits.max_seconds
        if length > most:
            raise Refusal(f"This video lasts {length:,.0f} s; the limit is {most:g} s (serve.max_seconds).")
        width = round(HEIGHT * clip.frames.shape[2] / clip.frames.shape[1])
        images = [Image.fromarray(frame).resize((width, HEIGHT)) for frame in clip.frames]
        return Shown(file, length, row_of(images), row_of(images[len(images) // 2 :][:1]))


def reason(error: VideoError, file: Path) -> str:
    """Say what is wrong with a file, without where it lies and the number of the error."""
    words = str(error).replace(f"{file}: ", "").replace(str(file), file.name)
    return re.sub(r"\[Errno \d+\] ", "", words)


def refusal(shown: Shown | None, query: str, limits: ServeConfig) -> str:
    """Say why a question cannot be asked; empty where it can."""
    length, most = len(query), limits.max_characters
    if shown is None:
        return "Upload a video first, or take an example."
    if not query.strip():
        return "Type a sentence: what happens in the moment that you look for?"
    if length > most:
        return f"This sentence has {length} characters; the limit is {most} (serve.max_characters)."
    return ""

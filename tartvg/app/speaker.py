"""Answers as they are written: one question at a time, by one policy after the other, on the same base."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread

import torch

from tartvg.app.videos import reason
from tartvg.config import AnchorsConfig, SamplingConfig
from tartvg.data.packets import VideoError
from tartvg.policy.asking import Tell, ask
from tartvg.policy.policy import Policy
from tartvg.response import parse_response
from tartvg.types import Completion, Response


@dataclass(frozen=True)
class Voice:
    """One policy of the page."""

    label: str
    """What the page calls it."""
    adapter: str
    """The name of its adapter in the model."""


@dataclass(frozen=True)
class Answer:
    """What a policy has said so far."""

    label: str
    asked: AnchorsConfig
    """What the prompt asks for."""
    text: str = ""
    is_begun: bool = False
    is_over: bool = False
    trouble: str = ""
    """Why it ended early, in words."""

    @cached_property
    def response(self) -> Response:
        """The anchors that are closed by now, the answer, and the faults, which count when it is over."""
        return parse_response(self.text, is_direct=self.asked.is_direct)


class _Left(Exception):
    """Nobody reads on."""


class _TimeIsUp(Exception):
    """The answer took too long."""


class Speaker:
    """The policies of the page. All methods may be called from any thread."""

    def __init__(
        self, policy: Policy, voices: Sequence[Voice], anchors: AnchorsConfig, sampling: SamplingConfig,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.policy, self.voices = policy, voices
        self.anchors, self.sampling, self.timeout_s = anchors, sampling, timeout_s
        self._turn = Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a question is being answered."""
        return self._turn.locked()

    def silence(self) -> list[Answer]:
        """Return the answers before a word is said."""
        return [Answer(voice.label, self.anchors) for voice in self.voices]

    def answers(self, video: Path, query: str) -> Iterator[list[Answer]]:
        """Yield all policies' answers so far, again with every token. Waits for the question before.

        Closing the iterator ends the decoding. What is wrong with one answer is said in it, and the next policy speaks.
        """
        with self._turn:
            said = self.silence()
            for place, voice in enumerate(self.voices):
                said[place] = replace(said[place], is_begun=True)
                yield list(said)
                try:
                    for text in told(lambda tell, voice=voice: self._say(voice, video, query, tell)):  # type: ignore[misc]
                        said[place] = replace(said[place], text=text)
                        yield list(said)
                    trouble = ""
                except Exception as error:
                    trouble = self._in_words(error, video)
                said[place] = replace(said[place], is_over=True, trouble=trouble)
                yield list(said)

    def _say(self, voice: Voice, video: Path, query: str, tell: Tell) -> Completion:
        deadline = time.monotonic() + self.timeout_s

        def tell_in_time(text: str) -> None:
            tell(text)
            if time.monotonic() > deadline:
                raise _TimeIsUp

        with self.policy.as_adapter(voice.adapter):
            return ask(self.policy, video, query, self.anchors, self.sampling, tell=tell_in_time)

    def _in_words(self, error: Exception, video: Path) -> str:
        if isinstance(error, _TimeIsUp):
            return f"It was cut off after {self.timeout_s:g} s (serve.timeout_s)."
        if isinstance(error, VideoError):
            return f"The video cannot be read: {reason(error, video)}."
        if isinstance(error, torch.OutOfMemoryError):
            return "There is not enough memory for this video (policy.frames)."
        traceback.print_exception(error)
        return "It failed; the terminal of the server says why."


def told(work: Callable[[Tell], Completion]) -> Iterator[str]:
    """Yield the texts that `work` tells, in a thread of its own, and the text of its result; raises what it raises.

    Closing the iterator ends the work when it next tells something. Who reads slowly misses texts in between.
    """
    news: SimpleQueue[str | Completion | BaseException] = SimpleQueue()
    is_left = Event()

    def tell(text: str) -> None:
        if is_left.is_set():
            raise _Left
        news.put(text)

    def run() -> None:
        try:
            news.put(work(tell))
        except BaseException as error:
            news.put(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item = news.get()
            while isinstance(item, str) and not news.empty():
                item = news.get()
            if isinstance(item, BaseException):
                raise item
            yield item if isinstance(item, str) else item.text
            if isinstance(item, Completion):
                return
    finally:
        is_left.set()
        thread.join()

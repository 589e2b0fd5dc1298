"""GroundingSample -> Prompt: one user turn of text, placed before the video, without a system prompt.

Training and evaluation call the same function on the same normalised query.
"""

from __future__ import annotations

from collections.abc import Callable

from tartvg.config import AnchorsConfig, PromptStyle
from tartvg.types import GroundingSample, Prompt

_NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}

# The baseline's published wording, to the letter (TimeZero); it says <timestep>, which is no anchor.
_TIMEZERO = (
    'To accurately pinpoint the event "{query}" in the video, determine the precise time period of the event.\n\n'
    "Output your thought process within the <think> </think> tags, including analysis with either specific timestamps "
    "(xx.xx) or time ranges (xx.xx to xx.xx) in <timestep> </timestep> tags.\n\n"
    "Then, provide the start and end times (in seconds, precise to two decimal places) in the format "
    '"start time to end time" within the <answer> </answer> tags. For example: "12.54 to 17.83".'
)
_TAR = (
    'When does "{query}" happen in the video? Reason inside <think> </think>, with exactly {ranges} in seconds{each} '
    "inside <timestamp> </timestamp>{refinement}. Then repeat {last} as the answer. Format:\n"
    "<think> ... <timestamp>12.54 to 17.83</timestamp> ... </think><answer>12.54 to 17.83</answer>"
)

_DIRECT = (
    'When does "{query}" happen in the video? Give the start and the end in seconds as the answer, and nothing else. '
    "Format:\n<answer>12.54 to 17.83</answer>"
)


def normalise_query(text: str) -> str:
    """One line, single spaces, no outer whitespace, without the one full stop that ends a sentence.

    Only a single final `.` goes (with whitespace before it, as in "the dog runs ."); an ellipsis stays. Annotations of
    the same data set disagree on all of this, and the event is quoted inside a sentence. Idempotent.
    """
    query = " ".join(text.split())
    head = query.removesuffix(".").rstrip()
    return query if head.endswith(".") else head


def build_prompt(sample: GroundingSample, anchors: AnchorsConfig) -> Prompt:
    """The prompt for `sample` in the style of `anchors.prompt`, asking for `anchors.count` anchors where it asks."""
    return Prompt(sample, _STYLES[anchors.prompt](normalise_query(sample.query), anchors.count))


def _tar(query: str, target: int) -> str:
    """Our wording of the refinement that arXiv 2508.07683 asks for (the original is unpublished)."""
    number = _NUMBER_WORDS.get(target, str(target))
    is_one = target == 1
    # str.format reads braces in the template only, never in the query
    return _TAR.format(
        query=query,
        ranges=f"{number} time range" if is_one else f"{number} time ranges",
        each="" if is_one else ", each",
        refinement="" if is_one else " and more precise than the one before",
        last="it" if is_one else "the last one",
    )


def _timezero(query: str, target: int) -> str:
    """The baseline's prompt asks for no number of anchors; `target` has no effect."""
    return _TIMEZERO.format(query=query)


def _direct(query: str, target: int) -> str:
    """The answer alone, without reasoning; `target` has no effect."""
    return _DIRECT.format(query=query)


_STYLES: dict[PromptStyle, Callable[[str, int], str]] = {
    PromptStyle.tar: _tar,
    PromptStyle.timezero: _timezero,
    PromptStyle.direct: _direct,
}

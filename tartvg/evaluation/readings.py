"""What a model said -> the answer that is scored. Works read texts by different rules, and the rule moves the score.

| reading | rule |
|---|---|
| `strict` | the house's format, `<answer>A to B</answer>`: `tartvg.response` |
| `timezero` | the last `A to B` or `A and B` of the whole text, with one space at each side |
| `lenient` | any of the usual wordings: see there |
| `timelens` | the first two clock times (`2:03`); else the first `A - B`, the first `A to B`, the first two numbers |
| `last_two` | the last two numbers of the text, in ascending order |

`strict` follows arXiv 2508.07683, `timezero` www-Ye/Time-R1 `evaluate.py` and xiaomi-research/time-r1 `evaluate.py`,
`timelens` TencentARC/TimeLens `timelens/utils.py`, `last_two` oceanflowlab/OmniVTG `standalone_eval/evaluate_vtg.py`;
`lenient` is ours.

A reading gives what its work scores, also a span that is reversed: such a span overlaps with nothing. All of them are
total and linear in the text. Numbers have at most 15 digits and are at most 1e7, as in `tartvg.response`. None of them
knows units: an answer in percent of the video (VTimeLLM) is read as seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tartvg.response import MAX_SECONDS, parse_response
from tartvg.types import Span

Reading = Callable[[str], Span | None]

_NUMBER = r"(?<![0-9])([0-9]{1,15}(?:\.[0-9]{0,15})?)(?![0-9])"
_TIMEZERO = re.compile(rf"{_NUMBER} (?:to|and) {_NUMBER}")
_DASH = re.compile(rf"{_NUMBER}\s{{0,9}}-\s{{0,9}}{_NUMBER}")
_TO = re.compile(rf"{_NUMBER}\s{{1,9}}to\s{{1,9}}{_NUMBER}", re.IGNORECASE)
_CLOCK = re.compile(r"(?<!\w)(?:[0-9]{1,2}:){1,2}[0-9]{2}(?:\.[0-9]{1,15})?(?!\w)")
_WORD = re.compile(r"(?<!\w)[0-9]{1,15}(?:\.[0-9]{1,15})?(?!\w)")
_DECIMAL = re.compile(r"(?<![0-9])[0-9]{1,15}(?:\.[0-9]{1,15})?(?![0-9])")

_FRACTION = r"(?:\.[0-9]{1,15})?"
_TIME = rf"(?<![\w.:#])((?:[0-9]{{1,2}}:){{1,2}}[0-9]{{2}}{_FRACTION}|[0-9]{{1,15}}{_FRACTION})(?![0-9]|\.[0-9]|\s?%)"
_UNIT = r"(?:\s{0,2}(?:seconds?|secs?|s)\b)?"
_PAIR = re.compile(
    rf"{_TIME}{_UNIT}\s{{0,3}}(?:to|and|until|till|through|[-~\u2013\u2014])\s{{0,3}}{_TIME}", re.IGNORECASE
)
_SINGLE = re.compile(_TIME)


def strict(text: str) -> Span | None:
    """Read the house's own format."""
    return parse_response(text).answer


def timezero(text: str) -> Span | None:
    """Read as TimeZero and Time-R1 do; a `<timestep>` counts where the answer holds no span."""
    found = _TIMEZERO.findall(text)
    return _span(*found[-1]) if found else None


def timelens(text: str) -> Span | None:
    """Read as TimeLens does."""
    clocks = [_seconds(match.group()) for match in _CLOCK.finditer(text)]
    if len(clocks) >= 2:
        return Span(clocks[0], clocks[1])
    match = _DASH.search(text) or _TO.search(text)
    if match:
        return _span(*match.groups())
    numbers = _WORD.findall(text)
    return _span(*numbers[:2]) if len(numbers) >= 2 else None


def last_two(text: str) -> Span | None:
    """Read as OmniVTG does."""
    numbers = _DECIMAL.findall(text)
    return _ascending(_span(*numbers[-2:])) if len(numbers) >= 2 else None


def lenient(text: str) -> Span | None:
    """Read any usual wording: the last `A to B` (and, until, -), else the last two times, in ascending order.

    Times are seconds, with or without a unit, or clock times. The last answer block is looked at first, then what
    follows the reasoning, then the whole text. Percentages and numbers after `#` are no times.
    """
    after = text.rsplit("</think>", 1)[-1]
    answer = after.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0] if "<answer>" in after else ""
    for part in (answer, after, text):
        pairs = _PAIR.findall(part)
        times = pairs[-1] if pairs else _SINGLE.findall(part)[-2:]
        if len(times) == 2:
            span = _ascending(Span(*map(_seconds, times)))
            if span is not None and span.end <= MAX_SECONDS:
                return span
    return None


READINGS: dict[str, Reading] = {
    "strict": strict,
    "timezero": timezero,
    "lenient": lenient,
    "timelens": timelens,
    "last_two": last_two,
}
"""By the name that `--reading` takes."""


def best_reading(texts: Sequence[str]) -> tuple[str, int]:
    """The reading that reads most of the texts, and how many; of equal ones the first of `READINGS`."""
    counts = {name: sum(read(text) is not None for text in texts) for name, read in READINGS.items()}
    return max(counts.items(), key=lambda item: item[1])


def _span(start: str, end: str) -> Span | None:
    span = Span(float(start), float(end))
    return span if max(span) <= MAX_SECONDS else None


def _seconds(time: str) -> float:
    """Seconds of `12.5`, `2:03` or `1:02:03`."""
    total = 0.0
    for part in time.split(":"):
        total = 60 * total + float(part)
    return total


def _ascending(span: Span | None) -> Span | None:
    """The span from its earlier to its later end; None without a length."""
    if span is None or span.length == 0:
        return None
    return span if span.length > 0 else Span(span.end, span.start)

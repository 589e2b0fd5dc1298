"""What settings are made of: fields with their range beside them, checked whenever an object is built. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from tartvg.config.choices import require

RANGE, EFFECT = "range", "effect"
"""Keys of a field's metadata."""


class Effect(Enum):
    """What a setting does to the result of a stage, and so how it enters the key that tells whether it changed."""

    value = "value"
    """Changes the result: the key holds the value."""
    content = "content"
    """Names an input: the key holds what is in it, wherever it lies and however it is spelled."""
    rounding = "rounding"
    """Changes at most the rounding: a stage continues under another value, but two runs do not share it."""
    none = "none"
    """Moves memory, time or place, or says what to do: no result depends on it."""


@dataclass(frozen=True)
class Range:
    """The values that a setting may take. Each item of a list, and each value of a map, must be one of them."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    among: tuple[str, ...] = ()
    because: str = ""
    """A reason, in words; shown behind the bound."""

    def holds(self, value: Any) -> bool:
        """Return whether the value, or every item of a list or map, lies inside. Never true of NaN."""
        if isinstance(value, list | dict):
            return all(map(self.holds, value.values() if isinstance(value, dict) else value))
        if self.among:
            return value in self.among
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        if self.among:
            return " or ".join(filter(None, [", ".join(self.among[:-1]), self.among[-1]]))
        low, high = (self.at_least, self.at_most) if self.above is None else (self.above, self.at_most)
        bound = f"> {low}" if self.above is not None else f">= {low}"
        if self.below == math.inf:
            bound = f"finite and {bound}"
        elif self.below is not None or high is not None:
            left, right = "(" if self.above is not None else "[", ")" if self.below is not None else "]"
            bound = f"in {left}{low}, {self.below if high is None else high}{right}"
        return f"{bound} ({self.because})" if self.because else bound


def setting(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    among: tuple[str, ...] = (),
    because: str = "",
    effect: Effect | None = None,
) -> Any:
    """Make a dataclass field of a default, a range and an effect (None: that of its group). A list or map is copied."""
    metadata: dict[str, Any] = {} if effect is None else {EFFECT: effect}
    if (allowed := Range(above, at_least, below, at_most, among, because)) != Range():
        metadata[RANGE] = allowed
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def range_of(known: dataclasses.Field[Any]) -> str:
    """Word the range of a field, with null, lists and maps where its type has them; empty without a range."""
    if RANGE not in known.metadata:
        return ""
    words = {"list": "a list ", "dict": "a map to numbers "}
    prefix = words.get(str(known.type).partition("[")[0], "null or " if is_optional(known) else "")
    return f"{prefix}{known.metadata[RANGE]}"


def is_optional(known: dataclasses.Field[Any]) -> bool:
    """Return whether a field may be null."""
    return str(known.type).endswith("| None")


def flattened(settings: Any, path: str = "") -> Iterator[tuple[str, Any, Effect]]:
    """Yield every setting of a group and of the groups below it: name as on the command line, value, effect."""
    for known in dataclasses.fields(settings):
        name, value = f"{path}{known.name}", getattr(settings, known.name)
        if dataclasses.is_dataclass(value):
            yield from flattened(value, f"{name}.")
        else:
            yield name, value, known.metadata.get(EFFECT, settings.EFFECT)


class Settings:
    """A group of settings, called `path` on the command line. Subclasses add the rules between their fields.

    `effect` is that of the fields that name none of their own.
    """

    PATH: ClassVar[str] = ""
    EFFECT: ClassVar[Effect] = Effect.value

    def __init_subclass__(cls, path: str = "", effect: Effect = Effect.value) -> None:
        cls.PATH, cls.EFFECT = path, effect

    def __post_init__(self) -> None:
        """Check the range of every field. Raises SettingError with the name of the setting."""
        assert dataclasses.is_dataclass(self)
        for known in dataclasses.fields(self):
            value = getattr(self, known.name)
            if RANGE in known.metadata and not (value is None and is_optional(known)):
                name = f"{self.PATH}.{known.name}" if self.PATH else known.name
                require(known.metadata[RANGE].holds(value), name, range_of(known), value)

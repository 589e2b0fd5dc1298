"""Command-line overrides beyond what Hydra's grammar says: text that stays text, and how to quote what it refuses.

Hydra reads `name=2024_01_05` as a number, and `~`, `'`, `%`, `(`, `=` and letters outside ASCII as mistakes. No torch.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from tartvg.config.run import Config

AMBIGUOUS = re.compile(r"Ambiguous value for argument '(.*?)'\n1\. ", re.DOTALL)
"""What Hydra says of a comma where nothing is swept over."""


def keep_text(arguments: Sequence[str]) -> list[str]:
    """The same overrides, with quotes around what a setting of text would get as a number or a truth value."""
    return [_kept(argument) for argument in arguments]


def _kept(argument: str) -> str:
    key, sign, value = argument.partition("=")
    kind = texts().get(key.lstrip("+"))
    if not sign or kind is None:
        return argument
    head, tail = ("[", "]") if kind == "list" and value[:1] == "[" and value[-1:] == "]" else ("", "")
    inner = value[len(head) : len(value) - len(tail)]
    if re.search(r"[^\w.,+-]", inner):  # quotes, brackets, interpolations: whoever writes them knows the grammar
        return argument
    parts = [f"'{part}'" if _is_changed(part) else part for part in inner.split(",")]
    return f"{key}={head}{','.join(parts)}{tail}"


def _is_changed(text: str) -> bool:
    """Return whether Hydra makes a number or a truth value of a text, and that is written in another way."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not re.match(r"[+-]?\.?\d|true$|false$", text, re.IGNORECASE):
        return False
    try:
        value = OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException:
        return False
    return isinstance(value, bool | int | float) and str(value) != text


@lru_cache(maxsize=1)
def texts() -> dict[str, str]:
    """The settings that hold text: name -> `text` or `list`."""
    return dict(_texts(Config, ""))


def _texts(group: type, path: str) -> Iterator[tuple[str, str]]:
    for name, hint in get_type_hints(group).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _texts(hint, f"{path}{name}.")
        elif bool not in get_args(hint) and (hint is str or str in get_args(hint)):
            yield f"{path}{name}", "list" if str(hint).startswith("list") else "text"


def unreadable(error: Exception) -> str | None:
    """One line about an override that Hydra cannot read; None for any other error."""
    override: Any = getattr(error, "override", None)  # of OverrideParseException; no need to import it
    found = AMBIGUOUS.match(str(error))
    if found:
        override = found[1]
    if not isinstance(override, str):
        return None
    key, sign, value = override.partition("=")
    if not sign or not re.fullmatch(r"[+~]*[\w./@-]+", key):
        return f"{override}: an override is written setting=value"
    if value[:1] == "[" and value[-1:] == "]":
        return f"{override}: the items of this list need quotes: {quoted(key, value[1:-1], is_list=True)}"
    sweep = ", or -m in front to sweep over its parts" if found else ""
    return f"{override}: this value needs quotes: {quoted(key, value)}{sweep}"


def quoted(key: str, value: str, *, is_list: bool = False) -> str:
    """The override as one writes it in a shell, so that Hydra reads the value as text, letter by letter."""
    inner = re.sub(r"(\\*)\"", r'\1\1\\"', value)  # backslashes count only in front of a quote
    inner = re.sub(r"(\\+)$", r"\1\1", inner)
    override = f'{key}=["{inner}"]' if is_list else f'{key}="{inner}"'
    if "'" not in override or re.search(r"[\\$`]", override):
        return shlex.quote(override)
    return '"' + override.replace('"', '\\"') + '"'

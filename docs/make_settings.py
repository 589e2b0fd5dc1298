"""docs/settings.md from the dataclasses: every setting with its type, default, range and meaning. No torch.

python docs/make_settings.py > docs/settings.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from tartvg.config.fields import EFFECT, Effect, range_of
from tartvg.config.run import Config

CHOICES = ("experiments", "sweeps")
"""Fields of `Config` that hold the choice of a file, not a value."""
HEADER = """# Settings

Every setting of `python run.py`, made from the dataclasses in `tartvg/config/` by `python docs/make_settings.py`.
Defaults are those of the classes; the files in `conf/` lie over them (`python run.py --cfg job` shows the result).
A value outside its range is refused with the name of the setting, and so is an old name, with the new one.

`result`: what happens to the result of a stage where the setting has another value. *changes*: the stage is another
one. *by content*: it is another one if what the setting names is other content, wherever that lies. *rounding*: a begun
stage goes on, and its numbers may differ in their last digits. Empty: the result is the same to the last bit, or the
setting says which result is asked for."""
EFFECTS = {Effect.value: "changes", Effect.content: "by content", Effect.rounding: "rounding", Effect.none: ""}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One setting."""

    name: str
    """As on the command line: `grpo.sampling.top_p`."""
    kind: str
    default: str
    allowed: str
    """The range, in words; empty where the type says everything."""
    effect: str
    """Whether a stage's result depends on it, in words."""
    meaning: str


def leaves(kind: type = Config) -> Iterator[Leaf]:
    """All settings of a class, in the order of its fields: its own first, then those of its groups."""
    hints, meanings = get_type_hints(kind), _docstrings(kind)
    groups: list[type] = []
    for known in dataclasses.fields(kind):
        hint = hints[known.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups.append(hint)
        elif known.name not in CHOICES:
            path = getattr(kind, "PATH", "")
            name = f"{path}.{known.name}" if path else known.name
            effect = known.metadata.get(EFFECT, getattr(kind, "EFFECT", Effect.value))
            words = _kind(hint, known), _default(known), range_of(known), EFFECTS[effect]
            yield Leaf(name, *words, meanings.get(known.name, ""))
    for group in groups:
        yield from leaves(group)


def page() -> str:
    """The whole page, one table per group."""
    by_group: dict[str, list[Leaf]] = {}
    for leaf in leaves():
        by_group.setdefault(leaf.name.rpartition(".")[0], []).append(leaf)
    titles = {group.PATH: inspect.getdoc(group) or "" for group in _groups(Config)}
    text = HEADER
    for path, rows in by_group.items():
        text += f"\n\n## {f'`{path}`' if path else 'The run'}\n\n{titles[path]}\n\n"
        text += "| setting | type | default | range | result | meaning |\n|---|---|---|---|---|---|\n"
        cells = ((f"`{r.name}`", r.kind, r.default, r.allowed, r.effect, r.meaning) for r in rows)
        text += "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
    return text + "\n"


def _groups(kind: type) -> Iterator[Any]:
    yield kind
    for hint in get_type_hints(kind).values():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _groups(hint)


def _kind(hint: Any, known: dataclasses.Field[Any]) -> str:
    """A type in words; the values of an enum by name."""
    if isinstance(hint, UnionType):
        return " or ".join("null" if kind is type(None) else kind.__name__ for kind in get_args(hint))
    if str(known.type).startswith("list"):
        return f"list of {_kind(get_args(hint)[0], dataclasses.field())}"
    if str(known.type).startswith("dict"):
        value = get_args(hint)[1]
        return "settings by name" if value is Any else f"{value.__name__} by name"
    if issubclass(hint, Enum):
        return ", ".join(f"`{value.value}`" for value in hint)
    return str(hint.__name__)


def _default(known: dataclasses.Field[Any]) -> str:
    factory = known.default_factory
    value = factory() if factory is not dataclasses.MISSING else known.default
    return f"`{_yaml(value)}`" if value != MISSING else "from the group's file"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def _docstrings(kind: type) -> dict[str, str]:
    """The string under each field, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


if __name__ == "__main__":
    print(page(), end="")

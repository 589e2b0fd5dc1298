"""Refusals in one line that names the setting, with the nearest valid one. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from tartvg.config.choices import SettingError
from tartvg.config.overrides import unreadable
from tartvg.config.renamed import refusal_of


def explain(error: Exception) -> str:
    """Word what to correct in one line, two where the valid names are listed."""
    missing_file = getattr(error, "missing_cfg_file", None)  # of Hydra's MissingConfigException; no need to import it
    if missing_file:
        return _unknown_choice(missing_file, list(getattr(error, "options", None) or []))
    said = unreadable(error)
    if said is not None:
        return said
    cause = next(
        (e for e in (error, error.__cause__, error.__context__) if isinstance(e, OmegaConfBaseException)), None
    )
    if cause is None or cause.full_key is None:
        return str(error)
    # Hydra names the file of a bad line: "In 'stage/grpo1': ConfigKeyError raised while composing config".
    head = str(error).partition(":")[0]
    where = f"{head[4:-1]}.yaml: " if cause is not error and head.startswith("In '") else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and dataclasses.is_dataclass(cause.object_type):
        assert isinstance(cause.object_type, type)
        return where + _unknown_key(cause.full_key, cause.object_type)
    if isinstance(cause, MissingMandatoryValue):
        return f"{where}{cause.full_key} is not set"
    own = next((e for e in _chain(cause) if isinstance(e, SettingError)), cause)  # a resolver's, which OmegaConf wraps
    reason = str(own).splitlines()[0]
    return f"{where}{cause.full_key}: {reason}{_nearest_value(reason)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def refuse_unknown_keys(node: DictConfig) -> None:
    """Raise SettingError for keys outside the schema, which `+reward.bta=1` adds past Hydra's own check."""
    owner = OmegaConf.get_type(node)
    known = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else None
    for key in node:
        name = str(key)
        if known is not None and name not in known:
            assert isinstance(owner, type)
            raise SettingError(_unknown_key(node._get_full_key(name), owner))
        child = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(child, DictConfig):
            refuse_unknown_keys(child)


def _unknown_key(full_key: str, owner: type) -> str:
    said = refusal_of(full_key)
    if said is not None:
        return said
    parent, _, key = full_key.rpartition(".")
    valid = [field.name for field in dataclasses.fields(owner)]
    hint = _nearest(key, valid, prefix=f"{parent}." if parent else "")
    return f"{full_key} is not a setting of {owner.__name__}{hint}\n  valid: {', '.join(valid)}"


def _unknown_choice(missing_file: str, options: list[str]) -> str:
    group, _, choice = missing_file.rpartition("/")
    said = refusal_of(f"{group}={choice}")
    if said is not None:
        return said
    if not group:
        return f"no such config file: {choice}"
    valid = f"\n  valid: {', '.join(options)}" if options else ""
    return f"{group}={choice}: there is no such choice{_nearest(choice, options)}{valid}"


def _nearest_value(reason: str) -> str:
    """A hint where OmegaConf refuses a value that is none of an enum's names."""
    match = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", reason)
    return _nearest(match[1], match[2].split(", ")) if match else ""


def _nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(name, valid, n=1)
    return f"; did you mean {prefix}{match[0]}?" if match else ""

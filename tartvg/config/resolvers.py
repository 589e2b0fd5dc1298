"""What YAML files of sweeps and experiments may compute: `${div:64,8}` and `${pick:key,table}`. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import OmegaConf

from tartvg.config.choices import SettingError


def div(total: int, part: int) -> int:
    """Divide without a rest: the prompts that make `total` completions of groups of `part`."""
    if part < 1 or total % part:
        raise SettingError(f"{total} is not a multiple of {part}")
    return total // part


def pick(key: str, table: Mapping[str, int]) -> int:
    """Look a number up, for instance the steps that suit a policy."""
    if key not in table:
        raise SettingError(f"there is no number for {key} among {', '.join(map(str, table))}; give one")
    return table[key]


def register_resolvers() -> None:
    """Make both known to OmegaConf."""
    OmegaConf.register_new_resolver("div", div, replace=True)
    OmegaConf.register_new_resolver("pick", pick, replace=True)

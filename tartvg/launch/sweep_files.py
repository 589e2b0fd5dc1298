"""A sweep file as axes and cells, and as a W&B sweep file that runs the same cells. No torch.

python -m tartvg.launch.sweep_files anchors > anchors.wandb.yaml
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tartvg.config.choices import SettingError
from tartvg.config.place import project_root


def axes(params: Mapping[str, object], task: Sequence[str] = ()) -> dict[str, list[str]]:
    """Each key that the sweeper sets, with its values as they stand on a command line; `task` are overrides beside it.

    A value given in `task` replaces the parameter, as in Hydra's own sweeper; a key with one value is an axis, too.
    """
    parser = OverridesParser.create()
    found: dict[str, list[str]] = {}
    for override in parser.parse_overrides([*(f"{k}={v}" for k, v in params.items()), *task]):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            found[key] = list(override.sweep_string_iterator())
        else:
            found[key] = [override.get_value_element_as_str()]
    return found


def cells(of: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return every combination of the axes, as overrides, in the sweeper's order."""
    return [list(cell) for cell in itertools.product(*([f"{k}={v}" for v in values] for k, values in of.items()))]


def read_sweep(name: str, root: Path) -> dict[str, Any]:
    """Read `<root>/sweeps/<name>.yaml`. Raises SettingError for a file that is no sweep."""
    path = root / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (root / "sweeps").glob("*.yaml")))
        raise SettingError(f"there is no sweep {name}; there are {known}")
    value = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(value, dict) or not OmegaConf.select(OmegaConf.create(value), "hydra.sweeper.params"):
        raise SettingError(f"{path} has no hydra.sweeper.params")
    return {str(k): v for k, v in value.items()}


def wandb_sweep(name: str, root: Path) -> dict[str, Any]:
    """Write the cells of `sweeps=<name>` for `wandb sweep FILE` and its agents.

    An agent gives one cell at a time, with `sweeps=<name>` before it: so the cell runs in the very folder, and with the
    very settings, that the sweep itself would use, and either can finish what the other began.
    """
    params = read_sweep(name, root)["hydra"]["sweeper"]["params"]
    return {
        "name": name,
        "program": "run.py",
        "method": "grid",
        "parameters": {key: {"values": values} for key, values in axes(params).items()},
        "command": ["${env}", "python", "${program}", f"sweeps={name}", "${args_no_hyphens}"],
    }


def main(arguments: Sequence[str]) -> int:
    """Print the W&B sweep file of a table; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(OmegaConf.to_yaml(OmegaConf.create(wandb_sweep(arguments[0], project_root()))), end="")
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

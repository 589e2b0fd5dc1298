"""One W&B run. The only file that imports wandb, and only when a run starts.

W&B finds its key itself (environment, netrc): it never passes through here. What W&B would collect about the machine
without being asked (code, git, packages, console, host, program path) is switched off.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tartvg.config import TrackingConfig


class WandbRun:
    """A started run. Every method may raise whatever W&B raises; the tracker decides what that means."""

    def __init__(
        self,
        folder: Path,
        settings: TrackingConfig,
        name: str,
        group: str,
        stage: str,
        config: Mapping[str, Any],
        x_axis: str,
        prefixes: Sequence[str],
        is_new: bool,
    ) -> None:
        """Start or resume the run whose id is kept in `<folder>/wandb_id`; `is_new` draws a fresh id."""
        import wandb

        id_file = folder / "wandb_id"
        if is_new or not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._wandb = wandb
        self._staging = folder / "wandb" / "data"
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            # A sweep runs many stages in one process; a run that failed to finish must not receive the next one's rows.
            reinit="finish_previous",
            name=name,
            group=group,
            job_type=stage,
            tags=list(settings.tags),
            config=_without_home(dict(config)),
            dir=str(folder),
            mode="online" if settings.mode.value == "online" else "offline",
            settings=wandb.Settings(
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                program="tartvg",
                host="localhost",
                silent=True,
                init_timeout=60.0,
                login_timeout=60.0,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric(x_axis)
        for prefix in prefixes:
            self._run.define_metric(f"{prefix}/*", step_metric=x_axis)

    def log(self, metrics: Mapping[str, float]) -> None:
        """One history row; the x-axis is among the metrics."""
        self._run.log(dict(metrics))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], metrics: Mapping[str, float]
    ) -> None:
        """A table beside `metrics` in one history row."""
        with _staged_in(self._staging):
            self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(r) for r in rows]), **metrics})

    def artifact(self, name: str, type: str, path: Path) -> None:
        """Record a file or folder. `immutable` refers to it in place instead of copying it into W&B's own folders."""
        with _staged_in(self._staging):
            artifact = self._wandb.Artifact(name, type=type)
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set summary values."""
        self._run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """Close the run; nonzero marks it as failed."""
        self._run.finish(exit_code=exit_code)


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Keep what an offline run has yet to upload in the run's folder; W&B's default is the user's home.

    W&B reads the place from the environment whenever it writes there. A place that the user has set is kept.
    """
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _without_home(value: Any) -> Any:
    """The same config with the home folder written as `~`: user names have no place in a shared project."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = str(Path.home())
    if isinstance(value, str) and len(home) > 1 and value.startswith(home):
        return "~" + value[len(home) :]
    return value

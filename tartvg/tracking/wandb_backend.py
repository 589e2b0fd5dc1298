"""One W&B run. The only file that imports wandb, and only when a run starts.

W&B finds its key itself (environment, netrc): it never passes through here. What W&B would collect about the machine
without being asked (code, git, packages, console, host, program path) is switched off.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tartvg.config import TrackingConfig

ROWS_PER_STEP = 4
"""History rows that a step may write: its metrics, tables and pictures."""
MAX_TAG = 64
"""Characters; W&B refuses longer tags."""
MIN_WAIT_S = 1e-3
"""Between two alerts of one title. W&B reads 0 as a minute; a monitor rings only when it begins to fire anyway."""
INIT_TIMEOUT_S, LOGIN_TIMEOUT_S = 20.0, 10.0
"""Together half a minute: so long a start waits for a network that is not there."""
SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
MIN_SECRET = 8
"""Characters: a shorter value of such a variable is a switch, not a secret."""


def give_up() -> None:
    """End W&B's own process after a start that failed: it would refuse the run's id to the next attempt."""
    import wandb

    wandb.teardown(exit_code=1)


class WandbRun:
    """A started run. Every method may raise whatever W&B raises; the tracker decides what that means."""

    def __init__(
        self,
        folder: Path,
        settings: TrackingConfig,
        name: str,
        group: str,
        job_type: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        x_axis: str,
        prefixes: Sequence[str],
    ) -> None:
        """Start the run, or continue the one whose id is kept in `<folder>/wandb_id`."""
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():  # a stage that starts anew for other settings has a new folder
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
            job_type=job_type,
            tags=[tag[:MAX_TAG] for tag in tags],
            config=scrub(dict(config)),
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
                init_timeout=INIT_TIMEOUT_S,
                login_timeout=LOGIN_TIMEOUT_S,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        self._x_axis = x_axis
        self._next_row = 0
        self._run.define_metric(x_axis)
        for prefix in prefixes:
            self._run.define_metric(f"{prefix}/*", step_metric=x_axis)

    def log(self, metrics: Mapping[str, float]) -> None:
        """One history row; the x-axis is among the metrics."""
        self._row(metrics)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], metrics: Mapping[str, float]
    ) -> None:
        """A table beside `metrics` in one history row."""
        with _staged_in(self._staging):
            self._row({name: self._wandb.Table(columns=list(columns), data=[list(r) for r in rows]), **metrics})

    def pictures(self, name: str, pictures: Sequence[tuple[str, bytes]], metrics: Mapping[str, float]) -> None:
        """Captions and PNG files beside `metrics` in one history row; W&B copies the files into the run's folder."""
        with TemporaryDirectory(dir=self._run.dir) as folder:
            images = []
            for number, (caption, content) in enumerate(pictures):
                path = Path(folder) / f"{number}.png"
                path.write_bytes(content)
                images.append(self._wandb.Image(str(path), caption=caption))
            self._row({name: images, **metrics})

    def _row(self, values: Mapping[str, Any]) -> None:
        """One history row, written at once, under a number that follows from the step alone.

        W&B would count rows from 0 in every process. The parts of an interrupted offline run are synced one after the
        other, and rows of the same number take each other's place: so a row that is written again after a restart must
        have the number that it had before, and no other row may have it.
        """
        self._next_row = max(self._next_row, ROWS_PER_STEP * int(values[self._x_axis]))
        self._run.log(dict(values), step=self._next_row, commit=True)
        self._next_row += 1

    def artifact(self, name: str, type: str, path: Path, origin: Mapping[str, str], is_input: bool) -> None:
        """Record a file or folder that the run made, or used (`is_input`).

        `immutable` refers to it in place instead of copying it into W&B's own folders. An input is recorded with its
        content: W&B finds the artifact that has the same name and content, and draws the line between the two runs.
        """
        with _staged_in(self._staging):
            artifact = self._wandb.Artifact(name, type=type, metadata=dict(origin))
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), policy="immutable", skip_cache=True)
            if not is_input:
                self._run.log_artifact(artifact)
            elif self._run.offline:
                # use_artifact refuses to work offline; this is the part of it that writes the record which syncs later
                self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            else:
                self._run.use_artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        """An alert of the run; W&B forwards it to whoever subscribed."""
        self._run.alert(title=title, text=text, level="WARN", wait_duration=MIN_WAIT_S)

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


def scrub(value: Any) -> Any:
    """The same config without what must not leave this machine.

    The home folder is written as `~`: user names have no place in a shared project. The values of environment variables
    that are named like keys and tokens become `***`, should one of them ever have got into a setting.
    """
    hidden = [v for k, v in os.environ.items() if SECRET_NAMES.search(k) and len(v) >= MIN_SECRET]
    return _scrub(value, str(Path.home()), hidden)


def _scrub(value: Any, home: str, hidden: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _scrub(item, home, hidden) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrub(item, home, hidden) for item in value]
    if not isinstance(value, str):
        return value
    for secret in hidden:
        value = value.replace(secret, "***")
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", value) if len(home) > 1 else value

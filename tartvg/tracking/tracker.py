"""Where a stage's numbers go: `metrics.jsonl` always, W&B beside it unless tracking is off.

One flat dictionary per call, one x-axis (`progress/step`), and a fixed vocabulary of prefixes, so that two runs can
always be laid over each other. W&B is a mirror: whatever happens to it, the run and its metrics.jsonl go on.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tartvg.config import TrackingConfig, TrackingMode
from tartvg.launch.terminal import warn_once
from tartvg.monitors import Alarm
from tartvg.records import append_jsonl, read_jsonl, to_json, write_jsonl
from tartvg.tracking.summary import best_and_last
from tartvg.tracking.tables import ANSWER_COLUMNS, answer_rows, example_columns, example_rows, extreme_answers
from tartvg.tracking.wandb_backend import WandbRun, give_up
from tartvg.types import Prediction, RolloutGroup

STEP = "progress/step"
ALARMS = "alarms.jsonl"
MAX_ARTIFACT_NAME = 128
WANDB_MODES = {
    "disabled": TrackingMode.off, "dryrun": TrackingMode.offline, "offline": TrackingMode.offline,
    "run": TrackingMode.online, "online": TrackingMode.online,
}  # fmt: skip
"""Values of WANDB_MODE, by how much they track."""
NUM_EXAMPLES = 64
"""Best and worst completions in each table: as a rule that is all of a step, to be grouped by their faults."""
NUM_STRIPS = 2
"""Best and worst answers shown as film strips."""
PREFIXES = ("reward", "anchors", "group", "rollout", "loss", "optim", "perf", "time", "memory", "eval", "progress")


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `<prefix>/<name>` of the vocabulary, or `eval/<dataset>/<name>`."""
    parts = name.split("/")
    if parts[0] not in PREFIXES or len(parts) < 2 or not all(parts):
        raise ValueError(f"metric {name!r} must start with one of {', '.join(p + '/' for p in PREFIXES)}")
    if parts[0] == "eval" and len(parts) < 3:
        raise ValueError(f"metric {name!r} must be named eval/<dataset>/<name>")


def tags_of(config: Mapping[str, Any]) -> list[str]:
    """What one filters by: policy, data set, number of anchors and seed, as far as `config` has them."""
    found = {
        "policy": config.get("policy", {}).get("name"),
        "dataset": config.get("dataset", {}).get("name"),
        "anchors": config.get("anchors", {}).get("count"),
        "seed": config.get("seed"),
    }
    return [f"{key}:{value}" for key, value in found.items() if value is not None]


def artifact_name(name: str) -> str:
    """`name` in W&B's alphabet. One collection for all runs: cells of a sweep that share a stage share its version."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:MAX_ARTIFACT_NAME]


def heeding_environment(settings: TrackingConfig) -> TrackingConfig:
    """The settings, tracking less where W&B's own variables say so, and never more: then a warning says what holds."""
    name = "WANDB_DISABLED" if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true") else "WANDB_MODE"
    said = os.environ.get(name, "").lower()
    asked = TrackingMode.off if name == "WANDB_DISABLED" else WANDB_MODES.get(said)
    if not said or asked is settings.mode:
        return settings
    order = list(WANDB_MODES.values())
    if asked is None or order.index(asked) > order.index(settings.mode):
        warn_once(f"{name}={said} is not followed, as tracking.mode={settings.mode.value}; tracking.mode decides")
        return settings
    warn_once(f"{name}={said} in the environment: W&B is {asked.value}, although tracking.mode={settings.mode.value}")
    return replace(settings, mode=asked)


class Tracker:
    """Context manager around one stage. Only the active one (rank 0) writes; all others accept the same calls.

    Entering with `resume_step` s removes the lines of metrics.jsonl from step s on, because the stage is about to
    write them again: a run that was killed and resumed ends with the file of an uninterrupted one. 0 starts anew.
    """

    def __init__(
        self,
        folder: Path,
        settings: TrackingConfig,
        run_name: str,
        stage: str,
        config: Mapping[str, Any],
        seed: int,
        resume_step: int = 0,
        is_active: bool = True,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._folder = folder
        self._settings = heeding_environment(settings) if is_active else settings
        self._run_name = run_name
        self._stage = stage
        self._config = {**config, "seed": seed, "stage": stage}
        self._resume_step = resume_step
        self._is_active = is_active
        self._wandb: WandbRun | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Self:
        if not self._is_active:
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        self._truncate()
        if self._settings.mode is not TrackingMode.off:
            self._guarded(self._start_wandb)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists():
            self._mirror(lambda run: run.summary(best_and_last(read_jsonl(self.path, is_partial_allowed=True))))
        self._mirror(lambda run: run.finish(exit_code=0 if kind is None else 1))
        self._wandb = None

    def resume_at(self, step: int) -> None:
        """Set `resume_step` before entering, where it is known only after the constructor."""
        self._resume_step = step

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line of metrics at `step` (from 0). Numbers may be Python's or NumPy's; they become floats.

        A value that is not finite is written as null, with one warning per name. Raises ValueError for a name outside
        the vocabulary and for a `progress/step` that contradicts `step`: on every rank, active or not.
        """
        for name in metrics:
            check_name(name)
        if metrics.get(STEP, step) != step:
            raise ValueError(f"{STEP} is {metrics[STEP]} but the step is {step}")
        if not self._is_active:
            return
        line: dict[str, float | None] = {STEP: int(step)}
        for name, raw in metrics.items():
            if name == STEP:
                continue
            value = float(raw)
            line[name] = value if math.isfinite(value) else None
            if line[name] is None:
                self._warn_once(name, f"{name} is {value} at step {step}; it is recorded as null")
        append_jsonl(self.path, [line])
        finite = {name: value for name, value in line.items() if value is not None}
        self._mirror(lambda run: run.log(finite))

    def history(self) -> list[dict[str, float | None]]:
        """The lines of metrics.jsonl before `resume_step`: what an interrupted run logged and keeps. On every rank."""
        if not self.path.exists():
            return []
        return [line for line in read_jsonl(self.path, is_partial_allowed=True) if line[STEP] < self._resume_step]

    def alarms(self, alarms: Sequence[Alarm]) -> None:
        """Warn in the terminal, keep the alarms in alarms.jsonl, and alert in W&B."""
        if not self._is_active or not alarms:
            return
        append_jsonl(self._folder / ALARMS, alarms)
        for alarm in alarms:
            print(f"warning: {self._stage}, monitor {alarm.monitor}: {alarm.text}", file=sys.stderr, flush=True)
            self._mirror(lambda run, a=alarm: run.alert(f"{self._stage}: {a.monitor}", a.text))  # type: ignore[misc]

    def examples(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Show the best and the worst `NUM_EXAMPLES` completions of `groups` by total reward in a W&B table.

        The complete record of what the model said is rollouts.jsonl; this is what one looks at and groups by faults.
        """
        rows = example_rows(groups, step, NUM_EXAMPLES)
        if rows:
            self._mirror(lambda run: run.table("rollout/examples", example_columns(), rows, {STEP: int(step)}))

    def answers(self, predictions: Sequence[Prediction], dataset: str) -> None:
        """The same for an evaluation: the best and the worst greedy answers by IoU."""
        rows = answer_rows(predictions, NUM_EXAMPLES)
        if rows:
            self._mirror(lambda run: run.table(f"eval/{dataset}/answers", ANSWER_COLUMNS, rows, {STEP: 0}))

    def strips(self, predictions: Sequence[Prediction], dataset: str, draw: Callable[[Prediction], bytes]) -> None:
        """Show the film strips, as PNG, of the best and the worst `NUM_STRIPS` greedy answers by IoU.

        `draw` raises ValueError for a video that cannot be read, which goes without. Nothing is drawn without W&B.
        """
        if self._wandb is None:
            return
        pictures: list[tuple[str, bytes]] = []
        for rank, answer in extreme_answers(predictions, NUM_STRIPS):
            with suppress(ValueError):
                pictures.append((f"rank {rank}: {answer.query}", draw(answer)))
        if pictures:
            self._mirror(lambda run: run.pictures(f"eval/{dataset}/film_strips", pictures, {STEP: 0}))

    def artifact(self, name: str, type: str, path: Path) -> None:
        """Record a file or folder that is finished and stays where it is, such as an adapter, in W&B.

        Raises FileNotFoundError on the rank that tracks.
        """
        self._artifact(name, type, path, is_input=False)

    def uses(self, name: str, type: str, path: Path) -> None:
        """Record what this stage reads. Name and content tie it to the stage that recorded it as its artifact.

        Raises FileNotFoundError on the rank that tracks.
        """
        self._artifact(name, type, path, is_input=True)

    def _artifact(self, name: str, type: str, path: Path, is_input: bool) -> None:
        if not self._is_active:
            return
        if not path.exists():
            raise FileNotFoundError(f"artifact {name!r}: there is no {path}")
        origin = {} if is_input else {"run": self._run_name, "stage": self._stage}
        self._mirror(lambda run: run.artifact(artifact_name(name), type, path, origin, is_input))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's headline numbers in W&B."""
        self._mirror(lambda run: run.summary(to_json(dict(values))))

    def _truncate(self) -> None:
        if self.path.exists():
            write_jsonl(self.path, self.history())
        alarms = self._folder / ALARMS
        if alarms.exists():
            lines = read_jsonl(alarms, is_partial_allowed=True)
            write_jsonl(alarms, [line for line in lines if line["step"] < self._resume_step])

    def _start_wandb(self) -> None:
        """Start mirroring; without a connection or a key it goes on offline, to be sent later by `wandb sync`."""
        try:
            self._wandb = self._wandb_run(self._settings)
        except Exception as error:  # W&B raises its own, network and operating system errors alike.
            if self._settings.mode is not TrackingMode.online:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._warn_once("offline", f"W&B cannot be reached and goes on offline ({reason})")
            give_up()
            self._wandb = self._wandb_run(replace(self._settings, mode=TrackingMode.offline))

    def _wandb_run(self, settings: TrackingConfig) -> WandbRun:
        return WandbRun(
            folder=self._folder,
            settings=settings,
            name=f"{self._run_name}/{self._stage}",
            group=self._settings.group or self._run_name,
            # evaluate-sft and evaluate-grpo2 are runs of one kind
            job_type=self._stage.partition("-")[0],
            tags=[*self._settings.tags, *tags_of(self._config)],
            config=to_json(self._config),
            x_axis=STEP,
            prefixes=PREFIXES,
        )

    def _mirror(self, action: Callable[[WandbRun], None]) -> None:
        """Do something in W&B, if it runs."""
        run = self._wandb
        if run is not None:
            self._guarded(lambda: action(run))

    def _guarded(self, action: Callable[[], None]) -> None:
        """Any failure of W&B ends the mirroring with one warning and never ends the run."""
        try:
            action()
        except Exception as error:  # W&B raises its own, network and operating system errors alike.
            self._wandb = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._warn_once("wandb", f"W&B failed and is off from here on; {self.path} goes on ({reason[0]})")

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            print(f"warning: {message}", file=sys.stderr, flush=True)

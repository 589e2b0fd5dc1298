"""Between Hydra and the stages: one job's settings, its run folder, and how a run ends. No torch.

A run lives in `<runs_dir>/<name>`. The jobs of a sweep would share that folder, so each of them gets its own below it,
named after its overrides: `default/anchors=one,seed=0`. The same sweep started again finds the same folders.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tartvg.config import Config, LaunchError, SettingError, StageStopped, require, to_dataclasses
from tartvg.config.errors import explain
from tartvg.config.overrides import keep_text
from tartvg.config.renamed import refuse_old_names
from tartvg.launch.processes import is_follower, is_started, refuse_leftovers
from tartvg.launch.signals import PREEMPTION, REQUEUE_CODE, Preempted
from tartvg.launch.sweeps import Job, print_summaries
from tartvg.launch.terminal import print_anything

MAX_FOLDER_LENGTH = 150
"""Characters of a job's folder name; file systems allow 255 bytes."""

ADVICE = {
    errno.ENOSPC: "make room, and give the command again: it continues from what is whole",
    errno.EDQUOT: "make room, and give the command again: it continues from what is whole",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and give the command again",
    errno.EROFS: "name a folder that can be written to (runs_dir, dataset.root)",
    errno.EACCES: "name a folder that can be written to (runs_dir, dataset.root), or change its permissions",
}
"""What the user can do about a file that the system refuses."""


LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error: remote process")
"""What the messages of gloo and NCCL contain when another rank has ended."""


class JobFailed(Exception):
    """A job ended with an exit code; what there is to say has been printed."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def launch(main: Callable[[], object]) -> int:
    """Run a `hydra.main` function; returns the exit code.

    0 finished, 1 failed, 2 refused, 75 asked to leave by a signal of `preemption.SIGNALS`: the same command continues.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them, and `explain` words them
    PREEMPTION.listen()
    print_anything()
    try:
        refuse_leftovers()
        refuse_old_names(sys.argv[1:])  # at once, where a sweep would refuse them job by job
        sys.argv[1:] = keep_text(sys.argv[1:])
        main()
    except JobFailed as failure:
        return failure.code
    except Preempted as stop:
        if is_follower():
            return REQUEUE_CODE
        print(f"{stop.reason}: stopped (exit code {REQUEUE_CODE}); the same command continues", file=sys.stderr)
        return REQUEUE_CODE
    except Exception as error:
        if wants_traceback:
            raise
        if not is_follower() or isinstance(error, LaunchError):
            print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        print_summaries()
    return 0


@contextmanager
def job(cfg: DictConfig) -> Iterator[Config]:
    """Give one job its settings and report at once how the block fails. A sweep then goes on; a single run ends.

    A sweep's job says in `<run folder>/job.json` what became of it.
    """
    record, folder = None, None
    if _is_sweep() and not is_follower():
        record = Job([str(o) for o in HydraConfig.get().overrides.task])
    try:
        config = job_config(cfg)
        if record is not None:
            folder = Path(config.runs_dir) / config.name
            record.save(folder)
        yield config
    except Exception as error:
        code = _report(error)
        if not _is_sweep():
            sys.exit(code)
        if record is None:
            raise JobFailed(code) from None
        overrides = HydraConfig.get().job.override_dirname
        print(f"The job {overrides} failed (exit code {code}); the sweep goes on.", file=sys.stderr)
        folder = folder or _folder_of_refused(cfg)
        if folder is not None:
            record.end(folder, code, _one_line(error))
        raise JobFailed(code) from None
    if record is not None and folder is not None:
        record.end(folder, 0)


def finish(code: int | None) -> None:
    """Turn the exit code of the stages into the end of the job. Hydra drops return values."""
    if code:
        raise JobFailed(code)


def job_config(cfg: DictConfig) -> Config:
    """Return the typed settings of the running job; a sweep's job gets a run folder of its own."""
    config = to_dataclasses(cfg)
    if not _is_sweep():
        return config
    # The processes of a job run its command again, which is the command of the whole sweep.
    require(
        config.trainer.devices == 1 or is_started(),
        "trainer.devices",
        "1 in a sweep, unless torchrun or srun starts the processes",
        config.trainer.devices,
    )
    hydra = HydraConfig.get()
    task = [str(o) for o in hydra.overrides.task]
    is_over_experiments = "experiments" in (hydra.sweeper.get("params") or {})
    require(
        not (is_over_experiments and any(o.startswith("name=") for o in task)),
        "name",
        "left alone in a sweep over experiments, which bring their own; runs_dir=... is free",
        config.name,
    )
    top = Path(config.name).parent.as_posix() if is_over_experiments else config.name
    return dataclasses.replace(
        config,
        name=job_name(config.name, hydra.job.override_dirname),
        reuse_stages=True if config.reuse_stages is None else config.reuse_stages,
        tracking=dataclasses.replace(config.tracking, group=config.tracking.group or _sweep_group(top)),
    )


def _sweep_group(name: str) -> str:
    """Name the W&B group of this sweep's jobs: `default/anchors` for sweeps=anchors."""
    sweep = HydraConfig.get().runtime.choices.get("sweeps")
    return f"{name}/{sweep}" if sweep else name


def job_name(name: str, overrides: str) -> str:
    """`default` and `seed=0` -> `default/seed=0`. What no folder can be called is replaced and told apart by a hash."""
    folder = re.sub(r"[^\w=.,+-]+", "_", overrides)
    if folder != overrides or folder in (".", "..") or len(folder) > MAX_FOLDER_LENGTH:
        folder = f"{folder[:MAX_FOLDER_LENGTH]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return f"{name}/{folder}" if folder else name


def _folder_of_refused(cfg: DictConfig) -> Path | None:
    """Return the run folder of a job whose settings were refused; None if the folder is among what is wrong."""
    try:
        name = job_name(cfg.name, HydraConfig.get().job.override_dirname)
        return Path(str(cfg.runs_dir)) / Config(name=name).name
    except (SettingError, OmegaConfBaseException, TypeError):
        return None


def _one_line(error: Exception) -> str:
    """Shorten the error for a summary: without a traceback, and not longer than a line of a table."""
    if isinstance(error, JobFailed):
        return "see its output above"
    text = explain(error).splitlines()
    return f"{'' if isinstance(error, SettingError) else f'{type(error).__name__}: '}{text[0] if text else ''}"[:300]


def _is_sweep() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _report(error: Exception) -> int:
    if isinstance(error, JobFailed):
        return error.code
    if PREEMPTION.received is not None:  # a library may turn the exception of a signal into one of its own
        print(f"{PREEMPTION.received}: stopped by {type(error).__name__}: {error}", file=sys.stderr)
        return REQUEUE_CODE
    if isinstance(error, SettingError | OmegaConfBaseException):
        if not is_follower() or isinstance(error, LaunchError):
            print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    if isinstance(error, StageStopped):
        if not is_follower():
            print(f"stopped: {error}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in ADVICE:
        print(f"error: {error.filename or 'a file'}: {error.strerror}; {ADVICE[error.errno]}", file=sys.stderr)
        return 1
    elif isinstance(error, RuntimeError) and is_started() and any(text in str(error) for text in LOST_RANK):
        print(f"rank {os.environ['RANK']} lost the connection to another rank, which says why", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1

"""Between Hydra and the stages: one job's settings, its run folder, and how a run ends. No torch.

A run lives in `<runs_dir>/<name>`. The jobs of a sweep would share that folder, so each of them gets its own below it,
named after its overrides: `default/anchors=one,seed=0`. The same sweep started again finds the same folders.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tartvg.config import Config, SettingError, require, to_dataclasses
from tartvg.config.errors import explain

MAX_FOLDER_LENGTH = 150
"""Characters of a job's folder name; file systems allow 255 bytes."""


class JobFailed(Exception):
    """A job ended with an exit code; what there is to say has been printed."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def launch(main: Callable[[], object]) -> int:
    """Run a `hydra.main` function; returns the exit code. 0 finished, 1 failed, 2 refused."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them, and `explain` words them
    try:
        main()
    except JobFailed as failure:
        return failure.code
    except Exception as error:
        if wants_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def job() -> Iterator[None]:
    """Report how the job inside fails, at once. A sweep then goes on with its next job; a single run ends."""
    is_sweep = _is_sweep()
    try:
        yield
    except Exception as error:
        code = _report(error)
        if is_sweep:
            overrides = HydraConfig.get().job.override_dirname
            print(f"The job {overrides} failed (exit code {code}); the sweep goes on.", file=sys.stderr)
            raise JobFailed(code) from None
        sys.exit(code)


def finish(code: int | None) -> None:
    """Turn the exit code of the stages into the end of the job. Hydra drops return values."""
    if code:
        raise JobFailed(code)


def job_config(cfg: DictConfig) -> Config:
    """The typed settings of the running job; a sweep's job gets a run folder of its own."""
    config = to_dataclasses(cfg)
    if not _is_sweep():
        return config
    # Lightning's own launcher starts the whole command again for every device, and with it the whole sweep.
    started_outside = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    require(
        config.trainer.devices == 1 or started_outside,
        "trainer.devices",
        "1 in a sweep, unless torchrun or SLURM starts the processes",
        config.trainer.devices,
    )
    return dataclasses.replace(config, name=job_name(config.name, HydraConfig.get().job.override_dirname))


def job_name(name: str, overrides: str) -> str:
    """`default` and `seed=0` -> `default/seed=0`. What no folder can be called is replaced and told apart by a hash."""
    folder = re.sub(r"[^\w=.,+-]+", "_", overrides)
    if folder != overrides or folder in (".", "..") or len(folder) > MAX_FOLDER_LENGTH:
        folder = f"{folder[:MAX_FOLDER_LENGTH]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return f"{name}/{folder}" if folder else name


def _is_sweep() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _report(error: Exception) -> int:
    if isinstance(error, JobFailed):
        return error.code
    if isinstance(error, SettingError | OmegaConfBaseException):
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1

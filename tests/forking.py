"""run.py in processes forked from one that has done the imports, which take a dozen seconds in a fresh interpreter.

`start` is `Popen` for run.py, `fork` the same out of the process that calls it; the ranks of such a run are forked from
it. Where forking is unsafe (a GPU, another system than Linux) and where TARTVG_REAL_PROCESSES is set, `start` starts
interpreters. The forked ones share what Python draws once per interpreter, such as the seed of `hash`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "run.py")
PRELOAD = [
    "hydra",
    "tartvg.stages.quiet",
    "tartvg.policy.policy",
    "tartvg.stages.evaluate",
    "tartvg.stages.grpo",
    "deepspeed",
    "wandb",
]
"""Of which none starts a thread or reads what a test sets."""
SETTLED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What these modules read when they are imported."""


class Forked:
    """What is used of `subprocess.Popen`; of a child of this process."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            child, status = os.waitpid(self.pid, os.WNOHANG)
            if child:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(RUN, timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Served(Forked):
    """Of a child of the fork server."""

    def __init__(self, process):
        process.start()
        super().__init__(process.pid)
        self.process = process

    def poll(self):
        self.returncode = self.process.exitcode
        return self.returncode


def start(overrides, output=os.devnull, errors=os.devnull, env=None, is_real=False, prepare=None):
    """run.py in a process of its own, which writes to these files.

    `prepare`, a function of a module, is called there before run.py begins; what it replaces is replaced in the ranks
    as well, which are forked from that process. It needs a process that can be forked.
    """
    assert not (is_real and prepare), "an interpreter of its own knows nothing of the functions here"
    if is_real or (not can_fork() and prepare is None):
        with Path(output).open("ab") as out, Path(errors).open("ab") as err:
            return subprocess.Popen([sys.executable, RUN, *overrides], cwd=ROOT, stdout=out, stderr=err, env=env)
    arguments = list(map(str, overrides)), dict(env or os.environ), (str(output), str(errors))
    return Served(server().Process(target=become, args=(*arguments, prepare)))


def call(function, *arguments, output=os.devnull, errors=None):
    """A module's function in a process of its own, which writes to these files; it exits with what that returns."""
    outputs = str(output), str(errors or output)
    return Served(server().Process(target=_end_with, args=(function, arguments, outputs)))


def call_here(function, *arguments, output=os.devnull, errors=None):
    """As `call`, in a copy of this process, which must not have worked with torch: its threads would be missing."""
    child = os.fork()
    if not child:
        _end_with(function, arguments, (output, errors or output))
    return Forked(child)


def call_ranks(count, function, *arguments, **outputs):
    """As `call`, once per rank; the exit code is that of the run."""
    return call(_run_ranks, count, function, arguments, **outputs)


def _run_ranks(count, function, arguments):
    from tartvg.launch import processes

    def start_rank(command, env, preexec_fn):
        child = os.fork()
        if not child:
            preexec_fn()
            os.environ.update(env)
            _end_with(function, arguments)
        return Forked(child)

    processes.subprocess = SimpleNamespace(Popen=start_rank)
    return processes.run_processes(count, [])


def _end_with(function, arguments, outputs=()):
    code = 1
    try:
        _redirect(outputs)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # not what pytest keeps
        code = function(*arguments) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(outputs):
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


@cache
def can_fork():
    import torch

    is_real = "TARTVG_REAL_PROCESSES" in os.environ
    return sys.platform == "linux" and not torch.cuda.device_count() and not is_real


@cache
def server():
    """The fork server, which starts no threads: forking from this process would copy those that it has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, SETTLED | {"PYTHONPATH": path}):
        forkserver.ensure_running()
    return context


def fork(overrides, env, outputs=(), prepare=None):
    """run.py in a copy of this process, which must be single-threaded."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return Forked(child)
    try:
        become(overrides, env, outputs, prepare)
    finally:
        os._exit(1)


def become(overrides, env, outputs=(), prepare=None):
    """Turn this process into run.py, and end as an interpreter does."""
    from hydra.core.global_hydra import GlobalHydra

    from tartvg.launch import processes
    from tartvg.launch import signals as preemption

    for number in preemption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if prepare is not None:
        prepare()
    sys.stdout.flush()
    sys.stderr.flush()
    _redirect(outputs)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    GlobalHydra.instance().clear()
    processes.subprocess = SimpleNamespace(Popen=_start_rank)
    sys.argv = [RUN, *overrides]
    code = 1
    try:
        runpy.run_path(RUN, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start_rank(command, env, preexec_fn):
    """In place of `Popen` in tartvg.launch.processes."""
    if list(command[:2]) != [sys.executable, RUN]:
        return subprocess.Popen(command, env=env, preexec_fn=preexec_fn)
    return fork(command[2:], env, prepare=preexec_fn)

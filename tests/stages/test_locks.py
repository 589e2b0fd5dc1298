"""One process per stage folder, on file systems with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.settings import composed

from tartvg.config import SettingError
from tartvg.launch.terminal import warn_once
from tartvg.stages.folder import StageFolder
from tartvg.stages.locks import held
from tartvg.stages.shared import SharedStage


def give_up(owner: str) -> None:
    raise SettingError(f"{owner} has it")


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def lockless(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre without `-o flock`: the system refuses, and nobody has the lock."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    warn_once.cache_clear()


def test_a_lock_belongs_to_one_at_a_time(tmp_path: Path) -> None:
    with (
        held(tmp_path / ".x.lock", give_up),
        pytest.raises(SettingError, match="another process has it"),
        held(tmp_path / ".x.lock", give_up),
    ):
        pass
    with held(tmp_path / ".x.lock", give_up):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]


@pytest.mark.usefixtures("lockless")
def test_a_file_stands_for_a_lock_where_there_are_none(tmp_path: Path, capsys: Any) -> None:
    for _ in range(2):
        with held(tmp_path / ".x.lock", give_up):
            assert (tmp_path / ".x.owner").read_text() == f"{socket.gethostname()} {os.getpid()}"
            said = rf"process {os.getpid()} of {socket.gethostname()} .*remove .*owner"
            with pytest.raises(SettingError, match=said), held(tmp_path / ".x.lock", give_up):
                pass
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]
    assert capsys.readouterr().err.count("no file locks there") == 1


@pytest.mark.usefixtures("lockless")
def test_the_owner_on_this_machine_may_be_dead_and_one_elsewhere_is_believed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    owner = tmp_path / ".x.owner"
    owner.write_text(f"{socket.gethostname()} {dead.stdout.strip()}")
    with held(tmp_path / ".x.lock", give_up):
        pass
    owner.write_text(f"node17 {dead.stdout.strip()}")
    with pytest.raises(SettingError, match="of node17"), held(tmp_path / ".x.lock", give_up):
        pass
    assert owner.exists()


@pytest.mark.usefixtures("lockless")
def test_a_stage_runs_there_and_a_second_process_is_told_what_to_do(tmp_path: Path) -> None:
    config = replace(composed(), runs_dir=str(tmp_path), name="r", reuse_stages=True)
    place = StageFolder(tmp_path / "r" / "grpo1", config, dict)
    with place.work() as is_needed:
        assert is_needed
        second = StageFolder(tmp_path / "r" / "grpo1", config, dict)
        with pytest.raises(SettingError, match=r"name=r: process \d+ of .* is working in .*grpo1"), second.work():
            pass
    with SharedStage(tmp_path, "entry").claimed("x"):
        pass
    assert not list(tmp_path.rglob("*.owner"))

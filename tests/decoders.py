"""Decoder processes that misbehave."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

DYING = """
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from tartvg.data import decoder_process


def read_or_die(path, settings, side, read=decoder_process.read_clip):
    starts = len(list(Path("{folder}").glob("start*")))
    if path.name.startswith("{name}"):
        Path("{folder}", f"start{{starts}}").touch()
        if starts < {deaths}:
            os.kill(os.getpid(), {number})
    return read(path, settings, side)


decoder_process.read_clip = read_or_die
decoder_process.serve(Connection(int(sys.argv[-2])), int(sys.argv[-1]))
"""


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Decoders that run another script."""

    from tartvg.data.clips import DECODERS

    def start(text: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n{text}")
        script.chmod(0o755)
        DECODERS.stop()
        monkeypatch.setattr(sys, "executable", str(script))

    yield start
    DECODERS.stop()


@pytest.fixture
def dying(scripted, tmp_path: Path):
    """Decoders that get a signal in the first `deaths` tries of a file. Returns the count of tries."""

    def start(number: signal.Signals, deaths: int, name: str = ""):
        scripted(DYING.format(folder=tmp_path, deaths=deaths, number=int(number), name=name))
        return lambda: len(list(tmp_path.glob("start*")))

    return start

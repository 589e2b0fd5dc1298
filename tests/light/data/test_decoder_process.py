"""Decoding in a process of its own: what crashes, hangs or is killed there costs a video at most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.videos import FRAMES, numbers_on, write_usual

from tartvg.config import FramesConfig
from tartvg.data.clips import ClipReader, DecoderKilled, _decoders, decode_isolated, stop_decoder
from tartvg.data.packets import VideoError


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary file."""
    return write_usual(tmp_path_factory.mktemp("videos"))


def test_a_hang_ends_at_the_limit_and_the_next_file_is_read(usual: Path, tmp_path: Path) -> None:
    """A stopped process is a real hang: it answers nothing, and only a kill ends it."""
    first = decode_isolated(usual, FRAMES)
    assert numbers_on(first) == list(range(0, 48, 4))
    hung = _decoders[os.getpid()].process
    os.kill(hung.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"usual\.mp4: decoding took longer than 1 s and was ended"):
        decode_isolated(usual, FramesConfig(timeout_s=1.0))
    assert 1.0 <= time.monotonic() - started < 10
    assert hung.poll() == -signal.SIGKILL
    again = decode_isolated(usual, FRAMES)
    assert np.array_equal(again.frames, first.frames) and again.times == first.times
    stop_decoder()


def test_a_crash_is_a_reason_and_not_the_end(usual: Path, tmp_path: Path) -> None:
    decode_isolated(usual, FRAMES)
    crashed = _decoders[os.getpid()]
    os.kill(crashed.process.pid, signal.SIGSTOP)
    crashed.connection.send_bytes(b"{}")  # it fails on this, as soon as it goes on
    os.kill(crashed.process.pid, signal.SIGCONT)
    with pytest.raises(VideoError, match=r"usual\.mp4: its decoder crashed"):
        crashed.decode(usual, FRAMES)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))
    stop_decoder()


GROUP = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def test_signals_to_the_whole_group_are_not_for_the_decoder(usual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its first moment, when it has not run a line yet, nor later."""

    class Signalled(subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            for number in GROUP:
                self.send_signal(number)

    stop_decoder()
    monkeypatch.setattr(subprocess, "Popen", Signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    decode_isolated(usual, FRAMES)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    monkeypatch.undo()
    process = _decoders[os.getpid()].process
    for number in GROUP:
        process.send_signal(number)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))
    assert _decoders[os.getpid()].process is process
    stop_decoder()


DYING = """#!{python}
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from tartvg.data import decoder_process


def read_or_die(path, settings, read=decoder_process.read_clip):
    starts = len(list(Path("{folder}").glob("start*")))
    Path("{folder}", f"start{{starts}}").touch()
    if starts < {deaths}:
        os.kill(os.getpid(), {number})
    return read(path, settings)


decoder_process.read_clip = read_or_die
decoder_process.serve(Connection(int(sys.argv[-1])))
"""


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Decoders of which the first `deaths` get a signal while they decode. Returns the count of those that began."""

    def start(number: signal.Signals, deaths: int):
        script = tmp_path / "python"
        script.write_text(DYING.format(python=sys.executable, folder=tmp_path, deaths=deaths, number=int(number)))
        script.chmod(0o755)
        stop_decoder()
        monkeypatch.setattr(sys, "executable", str(script))
        return lambda: len(list(tmp_path.glob("start*")))

    yield start
    stop_decoder()


def test_a_file_whose_decoder_was_killed_is_tried_again(dying, usual: Path, tmp_path: Path) -> None:
    num_starts = dying(signal.SIGKILL, deaths=1)
    clip = ClipReader(tmp_path / "list.jsonl").read(usual, FRAMES)
    assert numbers_on(clip) == list(range(0, 48, 4)) and num_starts() == 2
    assert not (tmp_path / "list.jsonl").exists()


def test_a_file_whose_decoder_is_killed_twice_is_not_listed(dying, usual: Path, tmp_path: Path) -> None:
    num_starts = dying(signal.SIGKILL, deaths=2)
    reader = ClipReader(tmp_path / "list.jsonl")
    with pytest.raises(DecoderKilled, match=r"usual\.mp4: its decoder was ended by SIGKILL; perhaps .* memory"):
        reader.read(usual, FRAMES)
    assert num_starts() == 2 and not (tmp_path / "list.jsonl").exists()
    assert numbers_on(reader.read(usual, FRAMES)) == list(range(0, 48, 4))


def test_a_file_that_crashes_its_decoder_is_listed_at_once(dying, usual: Path, tmp_path: Path) -> None:
    num_starts = dying(signal.SIGSEGV, deaths=1)
    reader = ClipReader(tmp_path / "list.jsonl")
    for _ in range(2):
        with pytest.raises(VideoError, match=r"usual\.mp4: its decoder crashed \(exit code -11\)"):
            reader.read(usual, FRAMES)
    assert num_starts() == 1 and len((tmp_path / "list.jsonl").read_text().splitlines()) == 1


def test_the_list_is_shared_kept_and_forgets_replaced_files(usual: Path, tmp_path: Path) -> None:
    broken, listing = tmp_path / "broken.mp4", tmp_path / "run" / "quarantine.jsonl"
    broken.write_bytes(b"x" * 100)
    one, other = ClipReader(listing), ClipReader(listing)
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        one.read(broken, FRAMES)
    stop_decoder()
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        other.read(broken, FRAMES)
    assert os.getpid() not in _decoders, "the second reader knew it from the list"
    (row,) = [json.loads(line) for line in listing.read_text().splitlines()]
    assert row["video"] == str(broken) and "broken.mp4: " in row["reason"]
    broken.write_bytes(usual.read_bytes())
    assert numbers_on(other.read(broken, FRAMES)) == list(range(0, 48, 4))
    stop_decoder()

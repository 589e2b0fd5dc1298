"""Decoding in a process of its own: what crashes, hangs or is killed there costs a video at most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from decoders import DYING
from helpers.videos import FRAMES, numbers_on, write_usual

from tartvg.config import FramesConfig
from tartvg.data.clips import DECODERS, ClipReader, DecoderKilled, decode_isolated, examine_isolated
from tartvg.data.examine import VideoFault, examine
from tartvg.data.packets import VideoError


def the_decoder():
    """The only process that waits for a file."""
    (decoder,) = DECODERS._idle
    return decoder


@pytest.fixture(autouse=True)
def none_before_and_after():
    DECODERS.stop()
    yield


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary file."""
    return write_usual(tmp_path_factory.mktemp("videos"))


def test_a_hang_ends_at_the_limit_and_the_next_file_is_read(usual: Path, tmp_path: Path) -> None:
    """A stopped process is a real hang: it answers nothing, and only a kill ends it."""
    first = decode_isolated(usual, FRAMES)
    assert numbers_on(first) == list(range(0, 48, 4))
    hung = the_decoder().process
    os.kill(hung.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"usual\.mp4: decoding took longer than 1 s and was ended"):
        decode_isolated(usual, FramesConfig(timeout_s=1.0))
    assert 1.0 <= time.monotonic() - started < 10
    assert hung.poll() == -signal.SIGKILL
    again = decode_isolated(usual, FRAMES)
    assert np.array_equal(again.frames, first.frames) and again.times == first.times


def test_a_crash_is_a_reason_and_not_the_end(usual: Path, tmp_path: Path) -> None:
    decode_isolated(usual, FRAMES)
    crashed = the_decoder()
    os.kill(crashed.process.pid, signal.SIGSTOP)
    crashed.connection.send_bytes(b"{}")  # it fails on this, as soon as it goes on
    os.kill(crashed.process.pid, signal.SIGCONT)
    with pytest.raises(VideoError, match=r"usual\.mp4: its decoder crashed"):
        crashed.decode(usual, FRAMES)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))


GROUP = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def test_signals_to_the_whole_group_are_not_for_the_decoder(usual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its first moment, when it has not run a line yet, nor later."""

    class Signalled(subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            for number in GROUP:
                self.send_signal(number)

    DECODERS.stop()
    monkeypatch.setattr(subprocess, "Popen", Signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    decode_isolated(usual, FRAMES)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    monkeypatch.undo()
    process = the_decoder().process
    for number in GROUP:
        process.send_signal(number)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))
    assert the_decoder().process is process


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
    DECODERS.stop()
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        other.read(broken, FRAMES)
    assert not DECODERS._idle, "the second reader knew it from the list"
    (row,) = [json.loads(line) for line in listing.read_text().splitlines()]
    assert row["video"] == str(broken) and "broken.mp4: " in row["reason"]
    broken.write_bytes(usual.read_bytes())
    assert numbers_on(other.read(broken, FRAMES)) == list(range(0, 48, 4))


# -- what else it must not do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python_path", [None, "", ".", f"{os.pathsep}/nowhere{os.pathsep}"])
def test_nothing_is_imported_from_the_current_folder(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_path: str | None
) -> None:
    """An empty entry of PYTHONPATH, as `$PYTHONPATH:/more` leaves one, means the current folder, too."""
    if python_path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", python_path)
    for name in ("statistics.py", "json.py", "av.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))


def test_without_files_in_memory_the_pixels_go_through_a_temporary_one(
    usual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    known = decode_isolated(usual, FRAMES)
    DECODERS.stop()
    monkeypatch.delattr(os, "memfd_create")
    for _ in range(2):
        assert np.array_equal(decode_isolated(usual, FRAMES).frames, known.frames)


REPLYING = """
import json
import os
import pickle
import sys
from multiprocessing.connection import Connection


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("{mark}",)


connection = Connection(int(sys.argv[-2]))
connection.send_bytes(b"ready")
connection.recv_bytes()
connection.send_bytes({reply})
connection.recv_bytes()
"""


@pytest.mark.parametrize(
    "reply",
    ["pickle.dumps(Harmful())", "b'[' * 100000", "b'[]'", "b'3'", "b'{}'", "b'\"an error\"'",
     "json.dumps(dict(shape=[2, 28, 28, 3], times=[0, 1], duration=2)).encode()",
     "json.dumps(dict(shape=[10**9] * 3, times=[0, 1], duration=2)).encode()",
     "json.dumps(dict(shape=[-1], times=[0, 1], duration=2)).encode()"],
)  # fmt: skip
def test_no_reply_of_a_decoder_runs_code_or_ends_the_run(scripted, usual: Path, tmp_path: Path, reply: str) -> None:
    """A decoder that its file has taken over may send anything."""
    mark = tmp_path / "mark"
    scripted(REPLYING.format(mark=mark, reply=reply))
    with pytest.raises(VideoError, match=r"usual\.mp4: its decoder replied with something that is no reply"):
        decode_isolated(usual, FRAMES)
    facts = examine_isolated(usual, FRAMES, 2.0)
    assert facts.faults == (VideoFault.UNREADABLE,) and "no reply" in facts.detail
    assert not mark.exists() and not DECODERS._idle


def test_a_decoder_that_cannot_start_is_no_fault_of_the_file(scripted, usual: Path) -> None:
    scripted("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="did not start"):
        decode_isolated(usual, FRAMES)


def test_a_decoder_that_is_killed_while_it_starts_is_replaced(scripted, usual: Path, tmp_path: Path) -> None:
    text = DYING.format(folder=tmp_path, deaths=0, number=0, name="")
    once = f"import os, pathlib\nmark = pathlib.Path('{tmp_path}/mark')\n"
    scripted(once + "if not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), 9)\n" + text)
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4))


def test_examined_in_a_process_a_file_has_the_same_facts(dying, usual: Path, tmp_path: Path) -> None:
    assert examine_isolated(usual, FRAMES, 2.0) == examine(usual, FRAMES, 2.0)
    dying(signal.SIGSEGV, deaths=9)  # only what decodes for training is scripted
    assert examine_isolated(usual, FRAMES, 9.0).faults == (VideoFault.DURATION_DISAGREES,)


def test_a_name_that_looks_like_an_address_is_a_name(
    usual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a folder in front, and without one, where FFmpeg takes what stands before a colon for a protocol."""
    odd = tmp_path / "2024-01-01T10:00:00.mp4"
    odd.write_bytes(usual.read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in (odd, Path(odd.name)):
        assert numbers_on(decode_isolated(path, FRAMES)) == list(range(0, 48, 4))
        assert not examine_isolated(path, FRAMES, 6.0).faults


def test_a_forked_child_has_decoders_of_its_own(usual: Path) -> None:
    decode_isolated(usual, FRAMES)
    ours = the_decoder().process
    child = os.fork()
    if not child:
        os._exit(int(bool(DECODERS._idle)) + 2 * int(numbers_on(decode_isolated(usual, FRAMES))[1] != 4))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert numbers_on(decode_isolated(usual, FRAMES)) == list(range(0, 48, 4)) and the_decoder().process is ours


def test_started_decoders_are_used_and_none_is_started_beside_them(usual: Path) -> None:
    DECODERS.start(2)
    DECODERS.start(2)
    pids = {decoder.process.pid for decoder in DECODERS._idle}
    assert len(pids) == 2
    decode_isolated(usual, FRAMES)
    assert {decoder.process.pid for decoder in DECODERS._idle} == pids

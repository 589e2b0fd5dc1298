"""Video files -> clips, within a time limit that holds, and without the files that failed before. No torch.

Why a process and not PyAV's `timeout`: that one is asked by network protocols only. It ends neither a read from a
stalled file system nor a decoder that spins, and nothing ends a thread. A process can be killed, and survives what
crashes another one. It is started once for each process that decodes, and kept.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np

import tartvg
from tartvg.config import FramesConfig
from tartvg.data.decoder_process import READY, SENT
from tartvg.data.packets import VideoError
from tartvg.data.video import Clip
from tartvg.records import append_jsonl, read_jsonl

STARTING_S = 300.0
"""Allowance for the process to import what it needs; counts towards no file's limit."""
ENDING_S = 5.0
"""Allowance for a process that has hung up to leave its exit code."""


class DecoderKilled(VideoError):
    """The decoder was ended from outside, which says nothing about the file."""


class ClipReader:
    """Reads clips, and keeps a list of the files that cannot be read.

    A file on the list is refused at once: a limit of a minute, waited for in every epoch, is worse than the loss of the
    file. An entry holds for these very settings and this very file; one that was replaced is tried again.
    """

    def __init__(self, quarantine: Path | None = None) -> None:
        """`quarantine` is the list, JSON lines, shared by all processes of a run; None keeps it in memory."""
        self.quarantine = quarantine
        self._reasons: dict[str, str] = {}
        self._size_read = 0

    def read(self, path: Path, settings: FramesConfig) -> Clip:
        """The clip of a file. Raises VideoError with the reason, which is on the list then, or DecoderKilled."""
        key = json.dumps([*identity(path), astuple(settings)])
        self._refresh()
        if key in self._reasons:
            raise VideoError(self._reasons[key])
        try:
            return decode_isolated(path, settings)
        except DecoderKilled:
            raise
        except VideoError as error:
            self._reasons[key] = str(error)
            if self.quarantine is not None:
                append_jsonl(self.quarantine, [{"video": str(path), "reason": str(error), "key": key}])
            raise

    def _refresh(self) -> None:
        """Take in what other processes have found."""
        if self.quarantine is None or not self.quarantine.is_file():
            return
        size = self.quarantine.stat().st_size
        if size != self._size_read:
            rows = read_jsonl(self.quarantine, is_partial_allowed=True)
            self._reasons |= {row["key"]: row["reason"] for row in rows}
            self._size_read = size


def identity(path: Path) -> tuple[str, int, int]:
    """Path, bytes and time of change in nanoseconds; -1 for a file that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


class _Decoder:
    """One process and the connection to it."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        root = str(Path(tartvg.__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        with _blocked_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tartvg.data.decoder_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root},
            )
        theirs.close()  # else the end of the process would not close the connection
        try:
            if not self.connection.poll(STARTING_S) or self.connection.recv_bytes() != READY:
                raise RuntimeError("the decoding process did not start")
        except BaseException:
            self.stop()
            raise

    def decode(self, path: Path, settings: FramesConfig) -> Clip:
        """Raises VideoError; the process is gone after a time-out and after a crash."""
        try:
            self.connection.send_bytes(json.dumps({"path": str(path), "frames": asdict(settings)}).encode())
            if not self.connection.poll(settings.timeout_s):
                self.stop()
                raise VideoError(f"{path}: decoding took longer than {settings.timeout_s:g} s and was ended")
            reply = json.loads(self.connection.recv_bytes())
            if "error" in reply:
                raise VideoError(reply["error"])
            pixels = np.frombuffer(bytearray(self.connection.recv_bytes()), dtype=np.uint8)
        except (EOFError, OSError) as error:
            raise self._hung_up(path) from error
        except VideoError:
            raise
        except BaseException:  # such as Ctrl-C: the reply that is still to come belongs to nobody
            self.stop()
            raise
        return Clip(pixels.reshape(reply["shape"]), tuple(reply["times"]), reply["duration"])

    def _hung_up(self, path: Path) -> VideoError:
        """What became of the process that was decoding `path`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_S)  # `stop` would replace the reason by its own SIGKILL
        code = self.process.returncode
        self.stop()
        if code is None or -code not in SENT:
            return VideoError(f"{path}: its decoder crashed (exit code {code})")
        why = "; perhaps by the system, for want of main memory" if -code == signal.SIGKILL else ""
        return DecoderKilled(f"{path}: its decoder was ended by {signal.Signals(-code).name}{why}")

    def stop(self) -> None:
        """End the process. One that a dead file system holds is not waited for."""
        self.connection.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """What is started in the block never gets the signals of `SENT`; those of this process wait for its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_lock = threading.Lock()
_decoders: dict[int, _Decoder] = {}
"""By process id: a forked worker must not talk through its parent's connection."""


def decode_isolated(path: Path, settings: FramesConfig) -> Clip:
    """`read_clip` in the process kept for this one. Raises VideoError, after `settings.timeout_s` at the latest.

    A file whose decoder is ended from outside gets a second try, with a limit of its own; then DecoderKilled.
    """
    try:
        return _decode(path, settings)
    except DecoderKilled:
        return _decode(path, settings)


def _decode(path: Path, settings: FramesConfig) -> Clip:
    with _lock:
        decoder = _decoders.get(os.getpid())
        if decoder is None or decoder.process.poll() is not None:
            if decoder is None:
                atexit.register(stop_decoder)
            decoder = _decoders[os.getpid()] = _Decoder()
        return decoder.decode(path, settings)


def stop_decoder() -> None:
    """End this process's decoder, if it has one; the next file starts another."""
    decoder = _decoders.pop(os.getpid(), None)
    if decoder is not None:
        decoder.stop()

"""Video files -> clips, within a time limit that holds, and without the files that failed before. No torch.

Why a process and not PyAV's `timeout`: that one is asked by network protocols only. It ends neither a read from a
stalled file system nor a decoder that spins, and nothing ends a thread. A process can be killed, and survives what
crashes another one.

`Decoder` is the only supervised process of this package. Every thread that decodes borrows one from `DECODERS`, where
it is kept for the next thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import tartvg
from tartvg.config import FramesConfig
from tartvg.data.decoder_process import READY, SENT
from tartvg.data.examine import VideoFacts, VideoFault
from tartvg.data.packets import VideoError
from tartvg.data.video import FACTOR, Clip
from tartvg.records import append_jsonl, read_jsonl

Reply = TypeVar("Reply")
STARTING_S = 300.0
"""Allowance for the process to import what it needs; counts towards no file's limit."""
ENDING_S = 5.0
"""Allowance for a process that has hung up to leave its exit code."""
EXAMINE_GRACE_S = 30.0
"""Seconds that `examine`, which reads a file twice, may take longer than a decoding."""
MAX_REPLY_BYTES = 2**24
"""A longer reply is taken for the work of a damaged process. Pixels do not count."""


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

    def read(self, path: Path, settings: FramesConfig, side: int = FACTOR) -> Clip:
        """The clip of a file, its sides multiples of `side`.

        Raises VideoError with the reason, which is on the list then, or DecoderKilled.
        """
        key = json.dumps([*identity(path), astuple(settings)])
        self._refresh()
        if key in self._reasons:
            raise VideoError(self._reasons[key])
        try:
            return decode_isolated(path, settings, side)
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


class Decoder:
    """A process that decodes files, one at a time, and the connection to it."""

    def __init__(self) -> None:
        """Start the process without waiting for its imports."""
        self.connection, theirs = Pipe()
        self.pixels = _memory_file()
        self.is_ready = self.is_closed = False
        handles = theirs.fileno(), self.pixels
        with _blocked_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tartvg.data.decoder_process", *map(str, handles)],
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _python_path()},
            )
        theirs.close()  # else the end of the process would not close the connection

    def decode(self, path: Path, settings: FramesConfig, side: int = FACTOR) -> Clip:
        """Decode a file. Raises VideoError; the process is gone after a time-out and after a crash."""
        return self._ask(path, settings, settings.timeout_s, self._clip, side=side)

    def examine(self, path: Path, settings: FramesConfig, annotated: float) -> VideoFacts:
        """Examine a file; see `tartvg.data.examine`. Raises VideoError for what took the process along."""
        return self._ask(path, settings, settings.timeout_s + EXAMINE_GRACE_S, _facts, annotated)

    def _ask(
        self, path: Path, settings: FramesConfig, limit_s: float, read: Callable[[dict[str, Any]], Reply],
        annotated: float | None = None, side: int = FACTOR,
    ) -> Reply:  # fmt: skip
        request = {
            "path": str(path), "frames": asdict(settings), "side": side, "limit_s": limit_s, "annotated": annotated,
        }  # fmt: skip
        try:
            self._await_start()
            self.connection.send_bytes(json.dumps(request).encode())
            if not self.connection.poll(limit_s):
                self.stop()
                raise VideoError(f"{path}: decoding took longer than {limit_s:g} s and was ended")
            reply = json.loads(self.connection.recv_bytes(MAX_REPLY_BYTES))
            if "error" in reply:
                raise VideoError(str(reply["error"]))
            return read(reply)
        except (EOFError, OSError) as error:
            raise self._hung_up(path) from error
        except VideoError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError) as error:
            self.stop()
            raise VideoError(f"{path}: its decoder replied with something that is no reply") from error
        except BaseException:  # such as Ctrl-C: the reply that is still to come belongs to nobody
            self.stop()
            raise

    def _await_start(self) -> None:
        """Wait for the imports. Raises EOFError where the process died of a signal, else RuntimeError."""
        if self.is_ready:
            return
        try:
            self.is_ready = self.connection.poll(STARTING_S) and self.connection.recv_bytes() == READY
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if -self.process.wait(ENDING_S) in SENT:
                    raise
        if not self.is_ready:
            self.stop()
            raise RuntimeError("the decoding process did not start")

    def _clip(self, reply: dict[str, Any]) -> Clip:
        pixels = np.empty(reply["shape"], dtype=np.uint8)
        with open(self.pixels, "rb", closefd=False) as file:
            file.seek(0)
            if file.readinto(pixels.data.cast("B")) != pixels.nbytes:
                raise ValueError("too few pixels")
        os.ftruncate(self.pixels, 0)
        return Clip(pixels, tuple(reply["times"]), reply["duration"])

    def _hung_up(self, path: Path) -> VideoError:
        """Stop the process that was decoding `path`, and say what became of it."""
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
        self.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)

    def close(self) -> None:
        """Give up the connection; a process that waits for a request ends by itself."""
        if not self.is_closed:
            self.is_closed = True
            self.connection.close()
            os.close(self.pixels)

    @property
    def is_usable(self) -> bool:
        """Whether the process lives and owes no reply."""
        return not self.is_closed and self.process.poll() is None


def _memory_file() -> int:
    """A handle of a file that no name leads to: in memory, or among the temporary ones where Linux is missing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _python_path() -> str:
    """PYTHONPATH for a decoder: with `-P`, nothing is imported from the current folder, which a relative entry is."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    root = str(Path(tartvg.__file__).absolute().parents[1])
    return os.pathsep.join([root, *(entry for entry in known if Path(entry).is_absolute())])


def _facts(reply: dict[str, Any]) -> VideoFacts:
    facts = reply["facts"]
    return VideoFacts(**{**facts, "faults": tuple(VideoFault(fault) for fault in facts["faults"])})


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start processes that never get the signals of `SENT`; those of this thread wait for the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DecoderPool:
    """The decoder processes of this process: one for each thread that decodes, kept for the next that does."""

    def __init__(self) -> None:
        self._idle: deque[Decoder] = deque()  # threads may append and pop without a lock
        self._busy: set[Decoder] = set()
        self._is_ending = False

    def start(self, count: int) -> None:
        """Have at least `count` idle processes; they import what they need while the caller goes on."""
        while len(self._idle) < count:
            self._idle.append(Decoder())

    @contextlib.contextmanager
    def borrowed(self, is_new: bool = False) -> Iterator[Decoder]:
        """One process for the block: the last one that was given back, or a new one."""
        decoder = self._start() if is_new else self._take()
        self._busy.add(decoder)
        try:
            yield decoder
        finally:
            self._busy.discard(decoder)
            if decoder.is_usable:
                self._idle.append(decoder)

    def _take(self) -> Decoder:
        with contextlib.suppress(IndexError):
            while True:
                decoder = self._idle.pop()
                if decoder.is_usable:
                    return decoder
                decoder.stop()
        return self._start()

    def _start(self) -> Decoder:
        if self._is_ending:
            raise DecoderKilled("this process ends")
        return Decoder()

    def stop(self) -> None:
        """End all processes. The next file starts another; a file that is being decoded raises DecoderKilled."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().stop()
        for decoder in list(self._busy):  # the thread that waits for it closes its connection
            decoder.process.kill()

    def end(self) -> None:
        """End all processes, and start no other: this one ends, too."""
        self._is_ending = True
        self.stop()

    def forget(self) -> None:
        """Leave the processes to the parent of this process, which was forked from it."""
        for decoder in (*self._idle, *self._busy):
            decoder.close()
        self._idle.clear()
        self._busy.clear()


DECODERS = DecoderPool()
atexit.register(DECODERS.end)
os.register_at_fork(after_in_child=DECODERS.forget)


def decode_isolated(path: Path, settings: FramesConfig, side: int = FACTOR) -> Clip:
    """`read_clip` in another process. Raises VideoError, after `settings.timeout_s` at the latest.

    A file whose decoder is ended from outside gets a second try, with a limit of its own; then DecoderKilled.
    """
    return _try_twice(lambda decoder: decoder.decode(path, settings, side))


def examine_isolated(path: Path, settings: FramesConfig, annotated: float) -> VideoFacts:
    """`examine` in another process; what crashes or hangs it is a fault of the file. Never raises for one."""
    try:
        return _try_twice(lambda decoder: decoder.examine(path, settings, annotated))
    except VideoError as error:
        return VideoFacts(faults=(VideoFault.UNREADABLE,), detail=str(error))


def _try_twice(work: Callable[[Decoder], Reply]) -> Reply:
    try:
        with DECODERS.borrowed() as decoder:
            return work(decoder)
    except DecoderKilled:
        with DECODERS.borrowed(is_new=True) as decoder:  # whoever kills one kills the others, too
            return work(decoder)

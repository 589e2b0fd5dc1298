"""One process per folder, also where the file system has no locks.

`flock` is freed by the system when a process dies. A file system that does not know it (Lustre without `-o flock`, some
NFS and FUSE) gets a file with host and process id instead; the file of a process of this host that is gone is ignored.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tartvg.launch.terminal import warn_once
from tartvg.records import is_alive

TAKEN = (errno.EAGAIN, errno.EWOULDBLOCK)
"""What `flock` says when another process has the lock. Anything else is about the file system."""


@contextmanager
def held(path: Path, wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock `path`. As long as another process has it, `wait` is told who: it sleeps for a while or raises."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in TAKEN:
                    with _owned(path.with_suffix(".owner"), error, wait):
                        yield
                    return
            wait("another process")
        yield


@contextmanager
def _owned(path: Path, error: OSError, wait: Callable[[str], None]) -> Iterator[None]:
    """The same with a file that says whose the lock is."""
    mine = f"{socket.gethostname()} {os.getpid()}"
    warn_once(f"{path.parent}: no file locks there ({error.strerror}); {path.name} stands for one")
    while not _create(path, mine):
        owner = _read(path)
        if _is_gone(owner):
            _remove(path, owner)
        else:
            host, _, process = owner.partition(" ")
            wait(f"process {process or 'unknown'} of {host or 'another host'} (if it is gone, remove {path})")
    try:
        yield
    finally:
        _remove(path, mine)


def _create(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


def _is_gone(owner: str) -> bool:
    """Return whether the owner is known to be dead: a process of this host."""
    host, _, process = owner.partition(" ")
    return host == socket.gethostname() and process.isdecimal() and not is_alive(int(process))


def _remove(path: Path, owner: str) -> None:
    """Remove the file of this owner; one that another process has put there meanwhile is put back."""
    side = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.rename(side)
        if _read(side) == owner:
            side.unlink()
        else:
            side.rename(path)

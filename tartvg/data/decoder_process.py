"""The process that decodes for another one: `python -P -m tartvg.data.decoder_process CONNECTION PIXELS`.

Started by `tartvg.data.clips`, with two file handles: a connection, and a file in memory for the pixels of one clip
(a temporary one where the system has no such thing).

Video files come from the internet, and decoders are C code: here one may crash or hang without taking the training
along. Requests and replies are JSON and raw pixels, never pickles, so that a decoder that was taken over by its file
has no way back into the process that asked. Pixels go through memory: beside
a main thread that is busy in Python, 27 MB arrive in a third of the time that they take through a pipe.

What is sent to a whole group of processes (Ctrl-C by a terminal, SIGTERM by torchrun, SIGUSR1 by SLURM) is for the
process that asks: the decoder is started with `SENT` blocked, and ends with the connection.
"""

from __future__ import annotations

import json
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tartvg.config import FramesConfig
from tartvg.data.examine import examine
from tartvg.data.packets import VideoError
from tartvg.data.video import read_clip
from tartvg.records import to_json

READY = b"ready"
SENT = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL}
)
"""Signals by which somebody, or the system, ends a process. A decoder that crashes dies of others."""
ORPHAN_S = 10.0
"""A request that runs so much longer than its limit ends the process, for whoever asked is gone."""


def serve(connection: Connection, pixels: int) -> None:
    """Answer requests until the other side closes the connection."""
    try:
        connection.send_bytes(READY)
        while True:
            request = json.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + ORPHAN_S)
            connection.send_bytes(json.dumps(reply_to(request, pixels)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, ConnectionError):
        return


def reply_to(request: dict[str, Any], pixels: int) -> dict[str, Any]:
    """The facts of a file whose annotated length is given; else the header of its clip, or why there is none."""
    path, settings = Path(request["path"]), FramesConfig(**request["frames"])
    if request["annotated"] is not None:
        return {"facts": to_json(examine(path, settings, request["annotated"]))}
    try:
        clip = read_clip(path, settings, request["side"])
    except VideoError as error:
        return {"error": str(error)}
    with open(pixels, "wb", closefd=False) as file:
        file.seek(0)
        file.write(np.ascontiguousarray(clip.frames).data.cast("B"))
    return {"shape": clip.frames.shape, "times": clip.times, "duration": clip.duration}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))

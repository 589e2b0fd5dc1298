"""The process that decodes for another one: `python -m tartvg.data.decoder_process FD`. Started by `tartvg.data.clips`.

Video files come from the internet, and decoders are C code: here one may crash or hang without taking the training
along. Requests and replies are JSON and raw pixels, never pickles, so that a decoder that was taken over by its file
has no way back into the process that asked.

What is sent to a whole group of processes (Ctrl-C by a terminal, SIGTERM by torchrun, SIGUSR1 by SLURM) is for the
process that asks: the decoder is started with `SENT` blocked, and ends with the connection.
"""

from __future__ import annotations

import json
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tartvg.config import FramesConfig
from tartvg.data.packets import VideoError
from tartvg.data.video import read_clip

READY = b"ready"
SENT = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL}
)
"""Signals by which somebody, or the system, ends a process. A decoder that crashes dies of others."""
ORPHAN_S = 10.0
"""A request that runs so much longer than its limit ends the process, for whoever asked is gone."""


def serve(connection: Connection) -> None:
    """Answer requests until the other side closes the connection."""
    connection.send_bytes(READY)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        settings = FramesConfig(**request["frames"])
        signal.setitimer(signal.ITIMER_REAL, settings.timeout_s + ORPHAN_S)
        try:
            clip = read_clip(Path(request["path"]), settings)
        except VideoError as error:
            connection.send_bytes(json.dumps({"error": str(error)}).encode())
        else:
            header = {"shape": clip.frames.shape, "times": clip.times, "duration": clip.duration}
            connection.send_bytes(json.dumps(header).encode())
            connection.send_bytes(np.ascontiguousarray(clip.frames).data.cast("B"))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

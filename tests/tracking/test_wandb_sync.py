"""Offline runs sync later without loss: `wandb sync` against a server on this machine that keeps what it is sent."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tartvg.config import TrackingConfig
from helpers.tracking import tracker

# killed after step 4, its last checkpoint after step 2: steps 3 and 4 are done again
for steps, resume_step in ((range(5), 0), (range(3, 7), 3)):
    with tracker(Path(sys.argv[1]), TrackingConfig(), resume_step=resume_step) as t:
        for step in steps:
            t.log({{"loss/total": 1.0 + step, "reward/total_mean": 10.0 - step}}, step)
    time.sleep(1.1)  # W&B names the folder of a run by the second
"""
KEY = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """As much of W&B as a sync of metrics talks to: it keeps every run's history lines at their offsets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[int, dict[str, Any]] = {}
        self.buckets: list[dict[str, Any]] = []
        self.operations: list[str] = []

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.operations.append(operation)
        project = {"id": "p", "name": "tartvg", "entity": {"id": "e", "name": "me"}}
        if operation == "UpsertBucket":
            self.buckets.append(variables)
            bucket = {
                "id": "b", "name": variables["name"], "displayName": variables["displayName"], "project": project,
                "historyLineCount": len(self.history),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": len(self.buckets) == 1}}
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"http://127.0.0.1:{self.server_port}/up"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"serverInfo": {"features": []}, "model": None}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path.endswith("/file_stream"):
            chunk = body.get("files", {}).get("wandb-history.jsonl")
            for number, line in enumerate(chunk["content"] if chunk else []):
                self.server.history[chunk["offset"] + number] = json.loads(line)
            self.reply({})
        else:
            self.reply({"data": self.server.answer(body.get("operationName", ""), body.get("variables") or {})})

    def reply(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


ONLINE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tartvg.config import TrackingConfig, TrackingMode
from helpers.tracking import tracker

begun = time.monotonic()
with tracker(Path(sys.argv[1]), TrackingConfig(mode=TrackingMode.online)) as t:
    print(time.monotonic() - begun)
    for step in range(3):
        t.log({{"loss/total": 1.0 + step}}, step)
"""


@pytest.fixture
def silent_address() -> Iterator[str]:
    """Of a server that takes connections and never answers, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("is_silent", [False, True], ids=["refused", "silent"])
def test_online_with_a_key_and_no_network_leaves_a_run_to_sync(
    tmp_path: Path, server: Server, silent_address: str, is_silent: bool
) -> None:
    folder = tmp_path / "runs" / "grpo1"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    env = clean | {"WANDB_BASE_URL": silent_address if is_silent else "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    script = ONLINE.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=env, capture_output=True, text=True,
                          check=True, timeout=600)  # fmt: skip
    assert done.stderr.count("goes on offline") == 1 and "off from here on" not in done.stderr
    assert float(done.stdout) < 30 + 5, "half a minute, and what a busy machine takes"
    (part,) = folder.glob("wandb/offline-run-*")
    env = clean | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(part)], env=env, check=True, timeout=600)
    arrived = [server.history[offset]["loss/total"] for offset in sorted(server.history)]
    assert arrived == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_an_interrupted_offline_run_arrives_whole(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "runs" / "grpo1"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", script, str(folder)], env=env, check=True, timeout=600)
    parts = sorted(str(path) for path in folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2

    env |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *reversed(parts)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr + str(server.operations)
    assert {bucket["name"] for bucket in server.buckets} == {(folder / "wandb_id").read_text().strip()}
    rows = [server.history[offset] for offset in sorted(server.history)]
    assert sorted(server.history) == list(range(len(rows))), "no line takes another's place"
    # what W&B shows is one row for each number; rows of one number must agree
    by_number: dict[int, dict[str, Any]] = {}
    for row in rows:
        shown = {key: value for key, value in row.items() if "/" in key}
        assert by_number.setdefault(row["_step"], shown) == shown
    arrived = [by_number[number] for number in sorted(by_number)]
    assert arrived == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

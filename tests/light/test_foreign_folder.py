"""Nothing is imported from the folder that a command is given in: a user's json.py is not Python's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.settings import ROOT
from helpers.videos import write_usual

NAMES = (
    "argparse", "av", "csv", "hashlib", "json", "logging", "numpy", "omegaconf", "queue", "random", "rich", "shutil",
    "signal", "socket", "statistics", "struct", "subprocess", "tempfile", "torch",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder; a module that is imported from it leaves `<name>.imported` there and ends the process."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in NAMES:
        mark = folder / f"{name}.imported"
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit('{name} of a user')\n")
    return folder


def called(folder: Path, *command: str, **environment: str) -> str:
    """What a command says that is given in the folder."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.glob("*.imported"))
    return done.stdout


def test_the_scorer(folder: Path) -> None:
    row = {"video": "a.mp4", "query": "q", "window": [0, 10], "duration": 20.0}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "said.jsonl").write_text(json.dumps({"sample_id": "test_0", "output": "<answer>0 to 5</answer>"}) + "\n")
    options = ["--dataset", "jsonl", "--annotations", "test.jsonl", "--predictions", "said.jsonl"]
    said = called(folder, "-m", "tartvg.evaluation", *options, PYTHONPATH=str(ROOT))
    assert "1 queries about 1 videos" in said and "50.00" in said


@pytest.mark.slow
def test_run_py_and_the_decoders_that_it_starts(folder: Path, tmp_path: Path) -> None:
    row = {"video": write_usual(tmp_path).name, "query": "q", "windows": [[0, 2]], "duration": 6.0}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    said = called(
        folder, str(ROOT / "run.py"), "stage=check_data", "dataset=jsonl", "dataset.root=.", "evaluate.split=test",
        f"dataset.videos={tmp_path}", "trainer.num_workers=1", "name=r", "runs_dir=runs",
    )  # fmt: skip
    assert "1 queries about 1 videos, 0.00 h of them readable" in said


@pytest.mark.slow
def test_the_processes_of_an_evaluation(folder: Path, tmp_path: Path) -> None:
    called(
        folder, str(ROOT / "run.py"), "stage=evaluate", "evaluate.policies=[base]", "evaluate.num_shards=2",
        "evaluate.batch_size=1", "evaluate.num_samples=0", "dataset.planted.num_train=1", "dataset.planted.num_val=1",
        "dataset.planted.num_test=2", "dataset.planted.queries_per_video=1", "grpo.sampling.max_new_tokens=8",
        "faithfulness.kinds=[]", "trainer.num_workers=1", "tracking.mode=off", f"dataset.root={tmp_path}", "name=r",
        "runs_dir=runs",
    )  # fmt: skip
    assert (folder / "runs/r/evaluate/base/predictions.jsonl").is_file()

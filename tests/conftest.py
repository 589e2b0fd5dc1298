"""Small real things that several tests need: an untrained tiny base, and a config that runs it in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TARTVG_ROOT", str(ROOT))


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory):
    """The tiny architecture with random weights, in Hugging Face format."""
    from tartvg.policy.tiny import build_tiny

    folder = tmp_path_factory.mktemp("untrained")
    text = "<think>It is <timestamp>1.00 to 2.00</timestamp>.</think><answer>1.00 to 2.00</answer> the red circle"
    model, tokenizer = build_tiny([text] * 3, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def planted_root(tmp_path_factory):
    """Where the tests' planted videos are drawn, once per session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def small(planted_root):
    """Overrides that make every stage take seconds."""
    return [
        f"dataset.root={planted_root}",
        "dataset.planted.num_train=6",
        "dataset.planted.num_val=2",
        "dataset.planted.num_test=4",
        "dataset.planted.queries_per_video=2",
        "grpo.max_steps=4",
        "grpo.prompts_per_step=2",
        "grpo.group_size=4",
        "evaluate.num_samples=1",
        "evaluate.batch_size=3",
        "trainer.num_threads=1",
        "trainer.checkpoint_every=1",
        "trainer.progress_bar=false",
        "tracking.mode=off",
    ]


@pytest.fixture(scope="session")
def run_command():
    """Call run.py as a user does. Returns the finished process."""

    def call(*overrides, check=True, **kwargs):
        command = [sys.executable, str(ROOT / "run.py"), *overrides]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs)
        if check and result.returncode:
            raise AssertionError(
                f"{overrides} exited {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
            )
        return result

    return call


def start_command(overrides):
    """Start run.py and return at once."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *overrides],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

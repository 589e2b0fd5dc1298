"""Small real things that several tests need: an untrained tiny base, and a config that runs it in seconds."""

import os
import subprocess
from pathlib import Path

import pytest
from decoders import dying, scripted  # noqa: F401 (fixtures)
from forking import start as start_command

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TARTVG_ROOT", str(ROOT))


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory):
    """The tiny architecture with random weights, in Hugging Face format."""
    from tartvg.tiny.model import build_tiny

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
def prompts(planted_root):
    """Questions about two planted videos."""
    return planted_prompts(planted_root)


def planted_prompts(root):
    """As the fixture; for processes that a test starts."""
    from tartvg.config import AnchorsConfig, PlantedConfig
    from tartvg.data.planted import load_planted
    from tartvg.prompts import build_prompt

    samples = load_planted(root, PlantedConfig(2, 1, 1, 2), "train", "planted")
    return [build_prompt(s, AnchorsConfig()) for s in samples]


@pytest.fixture
def policy(untrained_base):
    """The untrained tiny policy with frames of four patches."""
    return tiny_policy(untrained_base)


def tiny_policy(base):
    """As the fixture; for processes that a test starts."""
    from tartvg.config import FramesConfig, PolicyConfig
    from tartvg.policy.policy import Policy

    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    return Policy(PolicyConfig(name="t", path=str(base), frames=frames), seed=0)


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
        "grpo.max_steps_grpo2=4",
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
def run_command(tmp_path_factory):
    """Call run.py as a user does. Returns the finished process, with what it said."""
    folder = tmp_path_factory.mktemp("said")

    def call(*overrides, check=True, timeout=600, **kwargs):
        output, errors = folder / "stdout", folder / "stderr"
        output.write_text("")
        errors.write_text("")
        process = start_command(overrides, output, errors, **kwargs)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        result = subprocess.CompletedProcess(overrides, process.returncode, output.read_text(), errors.read_text())
        if check and result.returncode:
            raise AssertionError(
                f"{overrides} exited {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
            )
        return result

    return call


@pytest.fixture(scope="session")
def shared(small):
    """What runs of two processes and of one have in common; learning rates move weights by fifty times the tolerance.

    The embedded policy, whose rewards differ.
    """
    from two_processes import OPEN_FILTER

    return [
        *small, *OPEN_FILTER, "policy.frames.max_frames=16", "grpo.sampling.max_new_tokens=40", "grpo.max_steps=5",
        "grpo.max_steps_grpo2=2", "grpo.prompts_per_step=4", "grpo.sampling_batch_size=1", "grpo.lr=1e-5",
        "sft.lr=5e-5", "sft.epochs=1", "filter.max_per_query=1", "trainer.checkpoint_every=5",
        "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]", "evaluate.policies=[grpo2]",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def alone(shared, run_command, tmp_path_factory):
    """The run of one process that the others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    run_command(*shared, "trainer=cpu", "trainer.num_threads=1", f"runs_dir={folder}", "name=r")
    return folder / "r"

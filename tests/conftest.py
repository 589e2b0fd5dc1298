"""Small real things that several tests need: an untrained tiny base, and a config that runs it in seconds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from decoders import dying, scripted  # noqa: F401 (fixtures)
from forking import ROOT
from forking import start as start_command
from helpers.policies import planted_prompts, tiny_policy
from helpers.settings import OPEN_FILTER, QUIET, watched

os.environ.setdefault("TARTVG_ROOT", str(ROOT))
MAX_SECONDS = 4.0
"""Of processor time that a quick test may take: two on a fast machine, and machines differ by a factor of two."""
NOT_QUICK = ("slow", "campaign", "gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One process takes all tests of a file, which share fixtures; some files name a group that they share."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a quick test that takes long, but for fixtures and for what it is the first to import."""
    begun, imported = processor_seconds(), len(sys.modules)
    result = yield
    taken = processor_seconds() - begun
    is_quick = not any(item.get_closest_marker(name) for name in NOT_QUICK)
    if is_quick and taken > MAX_SECONDS and len(sys.modules) - imported < 50:
        pytest.fail(
            f"a quick test may take {MAX_SECONDS} s of processor time, this one took {taken:.1f} s: mark it slow"
        )
    return result


def processor_seconds():
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.fixture(scope="session")
def untrained_base(tmp_path_factory):
    """The tiny architecture with random weights, in Hugging Face format."""
    from experiments.tiny_base.model import build_tiny

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


@pytest.fixture
def policy(untrained_base):
    """The untrained tiny policy with frames of four patches."""
    return tiny_policy(untrained_base)


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
        *QUIET,
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
    run_command(*watched(shared), "trainer=cpu", "trainer.num_threads=1", f"runs_dir={folder}", "name=r")
    return folder / "r"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The configuration without the rest of the package; tests spoil it, or add a stage that records its settings."""
    root = tmp_path / "clone"
    (root / "tartvg").mkdir(parents=True)
    for folder in ("conf", "sweeps", "experiments", "tartvg/config", "tartvg/launch"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("run.py", "tartvg/__init__.py"):
        shutil.copy(ROOT / file, root / file)
    return root


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a finished sweep, and its questions."""
    from helpers.report import make_sweep

    return make_sweep(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished run, its questions and its page."""
    from helpers.report import make_run, make_samples

    from tartvg.report.page import build_report

    folder = tmp_path_factory.mktemp("report")
    samples = make_samples(folder)
    make_run(folder / "demo", samples)
    return folder / "demo", samples, build_report(folder / "demo", samples, folder / "report.html").read_text("utf-8")

"""Two processes on the CPU, by the command that a user gives, against one process. Needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from forking import ROOT, call_ranks
from forking import start as start_command
from helpers.settings import watched
from interruptions import kill_when, num_lines, rows
from safetensors.torch import load_file
from two_processes import STRATEGIES, TWO, assert_same_training, said, trainer

from tartvg.training.deepspeed import AnyDeviceZero

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


def assert_adapter_only(stage):
    """The newest checkpoint holds the adapter and its two moments, and no weight of the base."""
    newest = sorted((stage / "checkpoints").glob("step_*"))[-1]
    assert all("lora_" in name for name in load_file(newest / "adapter_model.safetensors"))
    weights = (stage / "adapter/adapter_model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in newest.iterdir()) < 3.3 * weights


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_run_the_whole_method_like_one(strategy, shared, alone, run_command, tmp_path):
    """Once with interpreters of their own, as users start them; the tests fork elsewhere."""
    command = [*trainer(strategy, watched(shared)), f"runs_dir={tmp_path}", "name=r"]
    run_command(*command, is_real=strategy == "zero2")
    run = tmp_path / "r"
    assert said(run / "grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    for stage in ("grpo1", "sft", "grpo2"):
        assert_same_training(strategy, alone, run, f"{stage}/adapter/adapter_model.safetensors")
        mine, theirs = rows(run / stage / "metrics.jsonl"), rows(alone / stage / "metrics.jsonl")
        for a, b in zip(mine, theirs, strict=True):
            for name in a.keys() - {n for n in a if n.startswith(("time/", "memory/", "perf/"))}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (stage, name)
    assert rows(run / "grpo1/metrics.jsonl")[0]["loss/kl"] == 0.0
    assert rows(run / "grpo2/metrics.jsonl")[0]["loss/kl"] == 0.0
    assert_adapter_only(run / "grpo1")
    assert json.loads((run / "evaluate/grpo2/manifest.json").read_text())["finished"]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_base_with_deepstack_trains_like_one(strategy, shared, run_command, tmp_path):
    """Its features are added to the decoder's states from outside its layers; once with layers that run again."""
    common = [
        "policy=tiny3", "grpo.max_steps=2", "grpo.lr=1e-4", "stage=grpo1", f"runs_dir={tmp_path}",
        f"policy.activation_checkpointing={str(strategy == 'zero3').lower()}",
    ]  # fmt: skip
    run_command(*shared, *common, "trainer=cpu", "trainer.num_threads=1", "name=one")
    run_command(*trainer(strategy, shared), *common, "name=two")
    assert said(tmp_path / "one/grpo1/rollouts.jsonl") == said(tmp_path / "two/grpo1/rollouts.jsonl")
    assert_same_training(strategy, tmp_path / "one", tmp_path / "two")


def test_adapters_in_the_compute_type_train_like_one(shared, run_command, tmp_path):
    """Their matrices are split under ZeRO-3, and gathered when the layer calls them."""
    common = ["policy.lora.compute=native", "stage=grpo1", f"runs_dir={tmp_path}"]
    run_command(*shared, *common, "trainer=cpu", "trainer.num_threads=1", "name=one")
    run_command(*trainer("zero3", shared), *common, "name=two")
    assert said(tmp_path / "one/grpo1/rollouts.jsonl") == said(tmp_path / "two/grpo1/rollouts.jsonl")
    assert_same_training("zero3", tmp_path / "one", tmp_path / "two")


def test_weights_in_main_memory_train_like_one(shared, alone, run_command, tmp_path):
    command = [*trainer("zero3_offload", shared), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    run_command(*command)
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training("zero3_offload", alone, tmp_path / "r")
    assert_adapter_only(tmp_path / "r/grpo1")


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_process_without_a_readable_video_keeps_step(strategy, shared, alone, planted_root, run_command, tmp_path):
    """Two prompts a step, one a process; a damaged video leaves one process without work."""
    shutil.copytree(planted_root, tmp_path / "data")
    for video in (tmp_path / "data").glob("planted-*/train_00001*.mp4"):  # other tests may have drawn other sets
        video.write_bytes(b"damaged")
    common = [
        "stage=grpo1",
        f"dataset.root={tmp_path / 'data'}",
        f"runs_dir={tmp_path}",
        "grpo.max_steps=6",
        "grpo.prompts_per_step=2",
    ]
    run_command(*shared, *common, "name=one")
    run_command(*trainer(strategy, shared), *common, "name=two")
    counts = [sum(row["step"] == step for row in rows(tmp_path / "two/grpo1/rollouts.jsonl")) for step in range(6)]
    assert 1 in counts and 0 not in counts
    assert said(tmp_path / "two/grpo1/rollouts.jsonl") == said(tmp_path / "one/grpo1/rollouts.jsonl")
    assert_same_training(strategy, tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_advantages_of_tokens_under_several_processes(strategy, shared, run_command, tmp_path):
    """In parts of three of four completions, so that parts of unequal length meet in lockstep."""
    common = ["stage=grpo1", "grpo.max_steps=2", "grpo.credit=own_term", "grpo.kl_time_coef=0", "grpo.lr=3e-5"]
    common.append(f"runs_dir={tmp_path}")
    run_command(*shared, *common, "name=one")
    run_command(*trainer(strategy, shared), *common, "grpo.rows_per_pass=3", "name=two")
    assert said(tmp_path / "two/grpo1/rollouts.jsonl") == said(tmp_path / "one/grpo1/rollouts.jsonl")
    assert_same_training(strategy, tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("first", "then"), [("zero3", "cpu"), ("zero2", "zero3"), ("cpu", "zero2")])
def test_a_stage_goes_on_under_another_strategy(first, then, shared, alone, run_command, tmp_path):
    common = [*shared, "trainer.checkpoint_every=2", "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    process = start_command([f"trainer={first}", *common, *([] if first == "cpu" else TWO)])
    kill_when(process, lambda: num_lines(tmp_path / "r/grpo1/metrics.jsonl") >= 3)
    run_command(f"trainer={then}", *common, *([] if then == "cpu" else TWO))
    assert said(tmp_path / "r/grpo1/rollouts.jsonl") == said(alone / "grpo1/rollouts.jsonl")
    assert_same_training("zero3" if "zero3" in (first, then) else first, alone, tmp_path / "r")


def watch_weights(folder):
    """Each rank writes down what its weights are, once DeepSpeed has them."""
    start = AnyDeviceZero.init_deepspeed

    def watch(self):
        start(self)
        weights = list(self.model.parameters())
        kinds = {("adapter " if weight.requires_grad else "base ") + str(weight.dtype) for weight in weights}
        (folder / os.environ["RANK"]).write_text(", ".join(sorted(kinds)))

    AnyDeviceZero.init_deepspeed = watch


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_bf16_base_stays_bf16(strategy, shared, run_command, tmp_path):
    """Lightning would make it fp32 without a word, at twice the memory."""
    more = ["policy.precision=bf16", "grpo.max_steps=1", "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    run_command(*trainer(strategy, shared), *more, prepare=partial(watch_weights, tmp_path))
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"adapter torch.float32, base torch.bfloat16"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_is_not_finite_is_skipped_by_all(strategy, shared, run_command, tmp_path):
    """A coefficient that is infinite in fp32 makes every loss NaN."""
    common = ["stage=grpo1", "grpo.kl_coef=1e300", "trainer.checkpoint_every=1", "trainer.max_skipped_steps=2"]
    done = run_command(*trainer(strategy, shared), *common, f"runs_dir={tmp_path}", "name=r", check=False)
    assert done.returncode == 2 and done.stderr.count("2 steps in a row had a non-finite loss or gradient") == 1
    faults = rows(tmp_path / "r/grpo1/faults.jsonl")
    assert [(row["step"], row["kind"], row["in_row"]) for row in faults] == [(0, "non_finite", 1), (1, "non_finite", 2)]
    assert all(len(row["samples"]) == 4 for row in faults)  # of both processes
    assert [row["loss/total"] for row in rows(tmp_path / "r/grpo1/metrics.jsonl")] == [None]
    weights = load_file(tmp_path / "r/grpo1/checkpoints/step_000001/adapter_model.safetensors")
    assert not any(value.any() for name, value in weights.items() if "lora_B" in name)


def private():
    """Bytes of memory that this process shares with no file."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load_in_parts(folder):
    """Each rank writes down how much memory loading a base took at its peak."""
    import deepspeed
    import pytorch_lightning
    import torch

    from tartvg.config import LoraConfig, PolicyConfig, Precision, Strategy, TrainerConfig, Zero3Config
    from tartvg.policy.policy import Policy
    from tartvg.training import distributed
    from tartvg.training.trainer import make_trainer

    class Module(pytorch_lightning.LightningModule):
        automatic_optimization = False

        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

        def training_step(self, *_):
            (folder / os.environ["RANK"]).write_text(str(max(seen) - before))

    split, seen = deepspeed.zero.Init._zero_init_param, []

    def watch(self, weight):
        split(self, weight)
        seen.append(private())

    deepspeed.zero.Init._zero_init_param = watch
    settings = TrainerConfig("cpu", 2, strategy=Strategy.zero3, progress_bar=False, zero3=Zero3Config(5000))
    torch.set_num_threads(1)
    distributed.init(settings)
    before = private()
    policy = Policy(PolicyConfig("t", f"{folder}/base", precision=Precision.bf16, lora=LoraConfig(rank=1)))
    make_trainer(settings, folder).fit(Module(policy), torch.utils.data.DataLoader([0]))
    distributed.destroy()


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_no_process_copies_the_whole_base(tmp_path):
    """What is not shared with the other process: half of the base, and what lies around it."""
    import torch
    from helpers.bases import tiny_of
    from transformers import Qwen2_5_VLForConditionalGeneration

    tiny_of("large", tmp_path / "fp32")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for file in [*(tmp_path / "fp32").glob("tok*"), tmp_path / "fp32/chat_template.jinja"]:
        shutil.copy(file, tmp_path / "base")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    said = tmp_path / "said"
    assert call_ranks(2, load_in_parts, tmp_path, output=said).wait(300) == 0, said.read_text()
    taken = [int((tmp_path / rank).read_text()) for rank in "01"]
    print(f"base {size / 2**20:.0f} MiB, private {[round(p / 2**20) for p in taken]} MiB")
    assert max(taken) < size  # 1.5 times that, with DeepSpeed's own


def test_a_memory_saving_update_with_every_weight_split(shared, alone, run_command, tmp_path):
    more = ["policy.activation_checkpointing=true", "trainer.zero3.param_persistence_threshold=0",
            "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]  # fmt: skip
    run_command(*trainer("zero3", shared), *more)
    assert_same_training("zero3", alone, tmp_path / "r")


def test_torchrun_starts_the_same_run(shared, alone, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "run.py"),
    ]
    overrides = [*trainer("ddp", shared), "stage=grpo1", f"runs_dir={tmp_path}", "name=r"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert_same_training("ddp", alone, tmp_path / "r")


def test_prompts_that_cannot_be_shared_are_refused_once(shared, run_command, tmp_path):
    done = run_command(*trainer("ddp", shared), "grpo.prompts_per_step=3", f"runs_dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("grpo.prompts_per_step must be a multiple of the 2 processes, got 3") == 1
    assert "Traceback" not in done.stderr

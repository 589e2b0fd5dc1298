"""The memory model against the memory that a process really takes; what it refuses and what it advises.

    MALLOC_MMAP_THRESHOLD_=65536 PYTHONPATH=.:tests python tests/memory/test_memory.py

measures the three sizes and prints them.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forking import ROOT
from helpers.bases import SIZES, tiny_of, untrained_qwen3
from helpers.settings import composed


def settings_of(folder):
    from tartvg.config import PolicyConfig

    return PolicyConfig(name="t", path=str(folder), feature_cache_gib=0, logit_chunk=256)


def resident(name="VmRSS"):
    """Bytes of this process in memory; `VmHWM` is the most there have been."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError


def step(folder, load):
    """One step of a real policy: sampling, then the update of a group. Returns nothing and keeps nothing."""
    import torch

    from tartvg.config import SamplingConfig
    from tartvg.policy.features import VideoFeatures
    from tartvg.policy.inputs import PromptInputs
    from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch

    policy = Policy(settings_of(folder))
    policy.end_ids = set()  # no completion ends early
    length = load.prompt_tokens
    inputs = PromptInputs(
        torch.arange(length) % 200, torch.arange(length).expand(3, -1), torch.zeros(length, dtype=torch.bool)
    )
    features = VideoFeatures(torch.zeros(0, policy.language_model.config.hidden_size), (1, 2, 2), 1.0, 1.0)
    prepared = PreparedPrompt(None, inputs, features)
    many = [prepared] * load.num_prompts
    policy.sample(many, load.group_size, SamplingConfig(max_new_tokens=load.new_tokens), list(range(len(many))))
    policy.train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    shape = (load.group_size, load.new_tokens)
    tokens = TokenBatch(torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool), torch.zeros(shape))
    for _ in range(2):  # the second time with the optimiser's state there
        policy.logps(prepared, tokens).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(folders):
    """Bytes that a step of each size takes at its peak, as the system counts them; each in a forked process."""
    import torch

    found = {}
    for name, folder in folders.items():
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            step(folder, load_of(name, small=True))  # what libraries allocate once
            gc.collect()
            before = resident()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            step(folder, load_of(name))
            os.write(writer, str(resident("VmHWM") - before).encode())
            os._exit(0)
        os.close(writer)
        found[name] = int(os.read(reader, 99))
        assert os.waitpid(child, 0)[1] == 0
    return found


def load_of(name, small=False):
    from tartvg.memory.footprint import Load

    *_, prompt, group, new = SIZES[name]
    return Load(8, 2, 2, 4) if small else Load(prompt, 2, group, new)


def estimated(name, folder):
    from tartvg.config import TrainerConfig
    from tartvg.memory.footprint import trace
    from tartvg.memory.plan import plan_of

    return plan_of(trace(settings_of(folder), load_of(name)), TrainerConfig(), 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_estimate_is_within_15_percent_of_what_a_process_takes(tmp_path):
    for name in SIZES:
        tiny_of(name, tmp_path / name)
    # Every tensor in pages of its own, given back when it dies: then what the system counts is what lives.
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    for name in SIZES:
        plan = estimated(name, tmp_path / name)
        print(f"{name}: estimated {plan.peak / 2**20:.1f} MiB, measured {measured[name] / 2**20:.1f} MiB")
        assert plan.peak == pytest.approx(measured[name], rel=0.15), name


@pytest.mark.slow
def test_all_features_and_stamps_of_a_family_with_deepstack_count(tmp_path):
    """Four tensors of 160 video tokens for each of two prompts; 384 stamps in the longest prompt of the released."""
    from tartvg.memory.footprint import Load, most_tokens, trace
    from tartvg.policy.families.family import family_of

    found = trace(settings_of(untrained_qwen3(tmp_path)), Load(600, 2, 2, 4, text_tokens=440))
    assert found.features == 2 * 4 * 160 * 96 * 4
    frames = composed("policy=qwen3_vl_8b").policy.frames
    assert most_tokens(frames, family_of("qwen3_vl")) == (384 * 15, 384 * 12)
    assert most_tokens(composed("policy=qwen2_5_vl_7b").policy.frames, family_of("qwen2_5_vl")) == (384 * 15, 0)


@pytest.fixture(scope="module")
def config(small):
    return composed(*small, "stage=grpo1")


@pytest.mark.slow
def test_shapes_cost_no_memory_and_the_model_is_the_published_one():
    from tartvg.config import LoraConfig, PolicyConfig, Precision
    from tartvg.memory.footprint import Load, trace

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = "Qwen/Qwen2.5-VL-7B-Instruct"
    settings = PolicyConfig(name="7b", path=path, precision=Precision.bf16, lora=LoraConfig())
    footprint = trace(settings, Load(4000, 1, 2, 16))
    assert footprint.weights == pytest.approx(2 * 8_292_166_656, rel=1e-3)
    assert footprint.adapter == 4 * 40_370_176
    # one token's keys and values in all layers are 57,344 bytes
    assert footprint.sample > 4000 * 57_344 and footprint.update > 4000 * 57_344
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.slow
def test_two_shallow_models_tell_the_peaks_of_a_deep_one(tmp_path):
    from tartvg.memory.footprint import _of_all_layers, _peaks, model_config

    tiny_of("deep", tmp_path)
    settings = settings_of(tmp_path)
    config, load = model_config(settings), load_of("deep")
    whole = {name: max(phases) for name, phases in _peaks(settings, config, load).items()}
    assert _of_all_layers(settings, config, load) == pytest.approx(whole, rel=0.01)


def test_strategies_split_what_they_say(config):
    from tartvg.config import Strategy, TrainerConfig
    from tartvg.memory.footprint import Footprint
    from tartvg.memory.plan import plan_of

    footprint = Footprint(1000, 100, 40, 0, 7, 5, 30, 60, 20)

    def plan(strategy, devices):
        trainer = TrainerConfig("cpu", devices, strategy=strategy)
        return plan_of(footprint, trainer, 0)

    single = plan(Strategy.single, 1)
    assert (single.peak, single.least) == (1207 + 60, 1207 + 30)
    ddp = plan(Strategy.ddp, 4)  # a bucket
    assert (ddp.peak, ddp.least) == (single.peak + 40, single.least + 40)
    zero2 = plan(Strategy.zero2, 4)
    assert (zero2.kept["weights"], zero2.kept["gradients"], zero2.kept["optimizer"]) == (1000, 10, 30)
    zero3 = plan(Strategy.zero3, 4)
    assert zero3.least == zero3.peak  # an update under ZeRO-3 cannot be tried again in parts
    gpus = [plan_of(footprint, TrainerConfig("gpu", n, strategy=Strategy.ddp), 0).overhead for n in (1, 8)]
    assert gpus[1] - gpus[0] == 2**30, "NCCL's channels"
    assert zero3.kept["weights"] == 250 and zero3.added == {"vision": 755, "sample": 780, "update": 260}


@pytest.mark.slow
def test_a_plan_that_cannot_fit_is_refused_with_what_would(config):
    from tartvg.config import SettingError
    from tartvg.memory.plan import check, estimate

    least = estimate(config).least
    assert check(config, least).least == least < estimate(config).peak
    with pytest.raises(SettingError, match=r"(?s)peak .*more than the .*trainer.memory_gib.*each alone: ") as e:
        check(config, least - 1)
    label = str(e.value).partition("each alone: ")[2].split("; ")[0]
    name, value = label.split("=")
    assert name == "grpo.sampling.max_new_tokens"
    sampling = replace(config.grpo.sampling, max_new_tokens=int(value))
    assert estimate(replace(config, grpo=replace(config.grpo, sampling=sampling))).least < least
    with pytest.raises(SettingError, match="combine them"):
        check(config, 1)


@pytest.mark.slow
def test_the_stage_refuses_before_it_loads_anything(small, run_command, tmp_path):
    for stage in ("memory", "grpo1"):
        result = run_command(*small, f"stage={stage}", "trainer.memory_gib=0.001", f"runs_dir={tmp_path}", check=False)
        assert result.returncode == 2 and "trainer.memory_gib" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert "GiB per GPU at the peak" in run_command(*small, "stage=memory", f"runs_dir={tmp_path}").stdout


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ.get("TMPDIR", "/tmp")) / "tartvg-memory"
    for size in SIZES:
        if not (root / size).is_dir():
            tiny_of(size, root / size)
    peaks = measure({size: root / size for size in SIZES})
    if len(sys.argv) == 1:
        for size, peak in peaks.items():
            plan = estimated(size, root / size)
            print(f"{size:<8}{plan.peak / 2**20:9.1f} MiB estimated{peak / 2**20:9.1f} MiB measured"
                  f"{plan.peak / peak - 1:+8.1%}")  # fmt: skip
    print(json.dumps(peaks))

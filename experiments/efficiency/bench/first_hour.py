"""The first hour on a GPU that this package has never seen: what to run, what to expect, and what came of it.

python -m experiments.efficiency.bench first_hour                 on CUDA; --device cpu tries the protocol itself

Four parts, each with its expectations beside its results: numerics, the 7B's shape by phase, the program with two
preemptions, the strategies. Expectations are for one H100; those of speed and memory are shown on a CPU, not judged.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.efficiency.bench.gpu import RELEASED, Load, measure, released_policy
from experiments.efficiency.bench.ratios import in_turns, table
from experiments.efficiency.bench.shapes import Shape, make_prompt, make_tokens
from experiments.efficiency.bench.ways import (
    SAVING,
    SHARED,
    Group,
    learn,
    never_ending,
    reference,
    spread_advantages,
)
from tartvg.config import SamplingConfig, TrainerConfig
from tartvg.memory import footprint
from tartvg.policy.patches import patch_product
from tartvg.policy.policy import Policy, token_batch
from tartvg.policy.prefix_attention import is_exact
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import read_jsonl
from tartvg.training.out_of_memory import free_cached_memory

TOY = Shape(hidden=128, layers=3, intermediate=256, heads=4, kv_heads=2)
KEY_BIAS = 27.0
HEADS_7B = (128, 7)
"""Width of a head of the 7B, and its query heads per key head."""
"""Standard deviation of a released Qwen2.5's keys, nearly all of it a bias; queries have 3.5."""
RUN = Path(__file__).resolve().parents[3] / "run.py"
STRATEGIES = ("ddp", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Finding:
    """One result beside what was expected."""

    what: str
    expected: str
    found: str
    is_met: bool | None = None
    """None: for people to judge."""

    @property
    def verdict(self) -> str:
        """As a word."""
        return {True: "yes", False: "NO", None: "?"}[self.is_met]


@dataclass(frozen=True)
class Place:
    """Where the protocol runs."""

    folder: Path
    device: str

    @property
    def is_cuda(self) -> bool:
        """Whether expectations of speed and memory count."""
        return torch.device(self.device).type == "cuda"

    def wait(self) -> None:
        """Return when the device has finished."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Median wall time of a call."""
        return 1e3 * in_turns({"it": call}, repeats, self.wait)["it"].median_wall

    def judged(self, is_met: bool) -> bool | None:
        """A verdict that only a GPU can give."""
        return is_met if self.is_cuda else None


def first_hour(folder: Path, device: str) -> dict[str, Any]:
    """Run the four parts and print a table after each. Returns all findings."""
    place = Place(folder, device)
    answer: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if place.is_cuda else "CPU"}
    for part in (numerics, seven, program, strategies):
        title = (part.__doc__ or "").splitlines()[0]
        print(f"### {title}", flush=True)
        found = []
        for finding in part(place):
            found.append(finding)
            print(f"{finding.what}: {finding.found}", flush=True)
        rows = [[f.what, f.found, f.expected, f.verdict] for f in found]
        print("\n" + table(["", "found", "expected", "met"], rows), flush=True)
        answer[part.__name__] = [vars(finding) for finding in found]
        gc.collect()
        free_cached_memory()
    return answer


# -- numerics ----------------------------------------------------------------------------------------------------------


def numerics(place: Place) -> Iterator[Finding]:
    """Do the kernels agree, and what do two choices of ours save?"""
    device = torch.device(place.device)
    set_up_torch(TrainerConfig(accelerator="gpu" if place.is_cuda else "cpu", num_threads=torch.get_num_threads()))
    found = is_exact(device, torch.bfloat16, *HEADS_7B)
    yield Finding("joined attention is used in bf16", "True", str(found), place.judged(found))
    found = is_exact(device, torch.float32, *HEADS_7B)
    yield Finding("and in fp32 (CUDA has no such kernel)", "False", str(found), place.judged(not found))
    mean, most = sampler_gap(place, KEY_BIAS)
    text = f"mean {mean:.4f}, most {most:.3f}"
    yield Finding("recorded against recomputed, nats", "mean < 0.02, most < 0.5", text, mean < 0.02 and most < 0.5)
    yield from costs(place)
    yield gpu_tests(place)


def sampler_gap(place: Place, bias: float) -> tuple[float, float]:
    """Mean and largest difference of log-probabilities while sampling and in training, in bf16, with large keys."""
    policy = released_policy(TOY, place.folder / "base_toy", place.device)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in policy.language_model.layers:
            own = layer.self_attn.k_proj.base_layer.bias
            own += (bias * torch.randn(own.shape, generator=generator)).to(own)
    item, _ = make_prompt(policy, 300, steps=12)
    with torch.no_grad():
        tokens = token_batch(policy.sample([item], 16, SamplingConfig(max_new_tokens=48), [0])[0], policy.device)
        policy.eval()
        gap = (policy.logps(item, tokens) - tokens.logps)[tokens.mask].abs()
    return float(gap.mean()), float(gap.max())


def costs(place: Place) -> Iterator[Finding]:
    """The tower's first layer both ways, and what deterministic algorithms cost."""
    count, kind = (13440, torch.bfloat16) if place.is_cuda else (256, torch.float32)
    convolution = torch.nn.Conv3d(3, 1280, (2, 14, 14), (2, 14, 14), bias=False).to(place.device, kind)
    rows = torch.randn(count, 3 * 2 * 14 * 14, device=place.device, dtype=kind)
    with torch.no_grad():
        slow = place.milliseconds(lambda: convolution(rows.view(-1, 3, 2, 14, 14)))
        quick = place.milliseconds(lambda: patch_product(rows, convolution.weight))
    yield Finding("patches: Conv3d, product", "product no slower", f"{slow:.2f}, {quick:.2f} ms", quick <= 1.1 * slow)
    weight = torch.randn(4 * 1176, 1176, device=place.device, dtype=kind)

    def chain() -> None:
        product = rows @ weight.t()
        torch.empty_like(product).copy_(product).float().mul_(2)

    times = []
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag, warn_only=True)
        times.append(place.milliseconds(chain))
    torch.use_deterministic_algorithms(not place.is_cuda)
    text = f"{times[1] / times[0] - 1:+.0%}"
    yield Finding("deterministic algorithms, off on a GPU", "+5 to +50 %", text)


def gpu_tests(place: Place) -> Finding:
    """The tests that are marked gpu, without the 3B's."""
    if not place.is_cuda:
        return Finding("pytest -m gpu", "passed", "needs a CUDA device")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "not 3b", "tests/policy/test_gpu.py"]
    done = subprocess.run(command, cwd=RUN.parent, capture_output=True, text=True)
    lines = (done.stdout or done.stderr).strip().splitlines() or [""]
    return Finding("pytest -m gpu", "passed", lines[-1], done.returncode == 0)


# -- the 7B's shape ----------------------------------------------------------------------------------------------------


def seven(place: Place) -> Iterator[Finding]:
    """The 7B's shape with random weights: seconds and peak memory of each phase."""
    usual, longest = Load(3600, 256, 8, 64), Load(6160, 1024, 8, 64)
    if not place.is_cuda:
        usual, longest = Load(120, 8, 4, 4), Load(200, 16, 4, 4)
    shape = RELEASED["7B"] if place.is_cuda else TOY
    policy = released_policy(shape, place.folder / ("base_7B" if place.is_cuda else "base_toy"), place.device)
    item, clip = make_prompt(policy, usual.prompt, usual.steps)
    first = place.milliseconds(partial(sample, policy, [item], usual.group, 1)) / 1e3
    yield Finding("prefill of one prompt", "0.18 to 0.25 s", f"{first:.3f} s", place.judged(first < 0.3))
    for num_prompts in (8, 1):
        each = milliseconds_per_token(place, policy, [item] * num_prompts, usual.group)
        text = f"{each:.1f} ms a token"
        wanted = "10 to 16 with a captured step, else 30 to 50, bound by launches"
        yield Finding(f"decode, {num_prompts * usual.group} rows", wanted, text, place.judged(each < 55))
    yield Finding("GPU busy in such a token", "10 to 14 ms", busy(place, policy, [item] * 8, usual.group))
    tokens = make_tokens(policy, item, usual.group, usual.completion)
    group = Group(item, clip, tokens, spread_advantages(usual.group, policy.device))
    bounds = {"reference": (0.2, 0.4), SHARED: (0.6, 1.1), SAVING: (0.8, 1.4)}
    for name, (low, high) in bounds.items():
        yield from timed_update(place, policy, group, usual, name, low, high)
    item, clip = make_prompt(policy, longest.prompt, longest.steps)
    tokens = make_tokens(policy, item, longest.group, longest.completion)
    group = Group(item, clip, tokens, spread_advantages(longest.group, policy.device))
    yield from timed_update(place, policy, group, longest, SAVING, 0, math.inf)


def sample(policy: Policy, items: Sequence[Any], group: int, num_tokens: int) -> None:
    """Draw completions of exactly so many tokens."""
    with never_ending(policy):
        policy.sample(items, group, SamplingConfig(max_new_tokens=num_tokens), list(range(len(items))))


def milliseconds_per_token(place: Place, policy: Policy, items: Sequence[Any], group: int) -> float:
    """Of decoding: what 32 more tokens cost, so that prompts do not count."""
    few, many = (place.milliseconds(partial(sample, policy, items, group, n), 2) for n in (8, 40))
    return (many - few) / 32


def busy(place: Place, policy: Policy, items: Sequence[Any], group: int) -> str:
    """Kernels of a token and how long they run, from the profiler."""
    if not place.is_cuda:
        return "needs a CUDA device"
    counted = []
    for num_tokens in (4, 12):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            sample(policy, items, group, num_tokens)
            place.wait()
        events = [event for event in profile.key_averages() if event.self_device_time_total]
        counted.append((sum(e.count for e in events), sum(e.self_device_time_total for e in events)))
    (a, b), (c, d) = counted
    return f"{(d - b) / 8e3:.1f} ms, {(c - a) / 8:.0f} kernels"


def timed_update(
    place: Place, policy: Policy, group: Group, load: Load, name: str, low: float, high: float
) -> Iterator[Finding]:
    """Seconds of the reference pass or of an update, and its peak beside what stage=memory says."""
    if name == "reference":
        found = measure(policy, lambda: partial(reference, policy, group, SHARED), 2, load)
    else:
        found = measure(policy, lambda: partial(learn, policy, group, name, reference(policy, group, name)), 2, load)
    label = f"{name if name == 'reference' else f'update, {name}'}, P = {load.prompt}, C = {load.completion}"
    if found is None:
        yield Finding(label, "fits", "out of memory", False)
        return
    seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
    expected = f"{low} to {high} s" if high < math.inf else "fits"
    yield Finding(label, expected, f"{seconds:.3f} s", place.judged(seconds < 1.3 * high))
    if name == "reference" or not place.is_cuda:
        return
    settings = replace(policy.settings, activation_checkpointing=name == SAVING)
    size = footprint.Load(load.prompt, 1, load.group, load.completion)
    traced = footprint.trace(settings, size)
    planned = (traced.weights + 2 * traced.adapter + traced.features + traced.update) / 2**30
    off = found["peak_gib"] / planned - 1
    text = f"{found['peak_gib']:.1f} GiB, {off:+.0%}"
    yield Finding("its peak beside the memory model's", "within 10 %", text, abs(off) < 0.1)


# -- the program -------------------------------------------------------------------------------------------------------


def command(place: Place, name: str, *more: str) -> list[str]:
    """A run of the tiny policy on that device, in the protocol's folder."""
    trainer = "one_gpu" if place.is_cuda else "cpu"
    return [
        sys.executable, str(RUN), f"trainer={trainer}", "dataset.planted.num_train=16", "dataset.planted.num_val=2",
        "dataset.planted.num_test=4", "grpo.prompts_per_step=4", "grpo.max_steps=4", "tracking=off",
        "trainer.progress_bar=false", "trainer.num_workers=0", f"runs_dir={place.folder / 'runs'}",
        f"dataset.root={place.folder / 'data'}", f"name={name}", *more,
    ]  # fmt: skip


def program(place: Place) -> Iterator[Finding]:
    """The program itself: a stage, then the 7B's shape with two preemptions."""
    done = subprocess.run(command(place, "tiny", "stage=grpo1"), capture_output=True, text=True)
    yield Finding("stage=grpo1, tiny policy", "0", f"exit code {done.returncode}", done.returncode == 0)
    if done.returncode:
        yield Finding("it said", "", (done.stderr or done.stdout).strip().splitlines()[-1])
        return
    gap = max(row["rollout/logp_gap"] for row in read_jsonl(place.folder / "runs/tiny/grpo1/metrics.jsonl"))
    yield Finding("its rollout/logp_gap", "about 1e-6 (fp32)", f"{gap:.1e}", gap < 1e-4)
    base = place.folder / ("base_7B" if place.is_cuda else "base_toy")
    settings = [
        "stage=grpo1", "policy.name=random", f"policy.path={base}", "policy.precision=bf16",
        "policy.activation_checkpointing=auto", "policy.lora.compute=native", "policy.logit_chunk=512",
        "grpo.max_steps=40",
    ]  # fmt: skip
    for number, seconds in enumerate((150, 75) if place.is_cuda else (25, 15), start=1):
        code, took = preempted(command(place, "random", *settings), seconds)
        text = f"exit code {code}, {took:.0f} s after SIGTERM"
        yield Finding(f"preemption {number}", "75 within 30 s", text, code == 75 and took < 30)


def preempted(arguments: Sequence[str], seconds: float) -> tuple[int, float]:
    """Start a command, send SIGTERM after so many seconds; its exit code, and how long it took to end."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return process.returncode, 0.0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    try:
        code = process.wait(120)
    finally:
        process.kill()
    return code, time.monotonic() - asked


def strategies(place: Place) -> Iterator[Finding]:
    """Every strategy on one device: grpo1, filter and sft end well, and the first gradient is the same."""
    norms = {}
    accelerator = "gpu" if place.is_cuda else "cpu"
    more = [
        "stage=pipeline", "stage.sequence=[grpo1,filter,sft]", "grpo.max_steps=2", "sft.epochs=1",
        "filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]", "filter.max_per_query=1",
        "trainer.devices=1", f"trainer.accelerator={accelerator}",
    ]  # fmt: skip
    for strategy in STRATEGIES:
        arguments = command(place, strategy, *more)
        arguments[2] = f"trainer={strategy}"
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ.copy())
        is_compiled = "ninja" in done.stdout + done.stderr
        text = f"exit code {done.returncode}{', compiled an extension' if is_compiled else ''}"
        yield Finding(strategy, "0, nothing compiled", text, done.returncode == 0 and not is_compiled)
        metrics = place.folder / "runs" / strategy / "grpo1/metrics.jsonl"
        if metrics.exists():
            norms[strategy] = read_jsonl(metrics)[0]["optim/grad_norm"]
    if norms:
        spread = max(norms.values()) / max(1e-30, min(norms.values())) - 1
        text = ", ".join(f"{name} {norm:.6f}" for name, norm in norms.items())
        yield Finding("optim/grad_norm of step 0", "equal to 1e-4", text, spread < 1e-4)

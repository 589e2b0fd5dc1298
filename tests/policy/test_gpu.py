"""On a CUDA device: the 3B's real shape in bf16, and the same agreement as on the CPU."""

import pytest
import torch

from experiments.efficiency.bench.gpu import Load, measure_gpu
from experiments.efficiency.bench.ratios import token_ratio
from experiments.efficiency.bench.shapes import QWEN_3B, Shape, build_policy, make_prompt, make_tokens
from experiments.efficiency.bench.ways import (
    SAVING,
    SHARED,
    VISION_ONCE,
    Group,
    gradient,
    learn,
    reference,
    spread_advantages,
)
from tartvg.config import Precision, SamplingConfig
from tartvg.policy.policy import token_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOY = Shape(hidden=128, layers=3, intermediate=256, heads=4, kv_heads=2)


def test_all_ways_agree_in_fp32(tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    policy = build_policy(TOY, tmp_path, device="cuda")
    item, clip = make_prompt(policy, 300, steps=12)
    group = Group(item, clip, make_tokens(policy, item, 4, 20), spread_advantages(4, policy.device))
    found = {}
    for way in (VISION_ONCE, SHARED, SAVING):
        found[way] = learn(policy, group, way, reference(policy, group, way)), gradient(policy)
    logps, grads = found[VISION_ONCE]
    for way in (SHARED, SAVING):
        assert (found[way][0] - logps).abs().max() <= 1e-5
        assert (found[way][1] - grads).norm() <= 1e-5 * grads.norm()


def test_recorded_logps_equal_the_recomputed_ones(tmp_path):
    policy = build_policy(TOY, tmp_path, device="cuda")
    item, _ = make_prompt(policy, 300, steps=12)
    group = policy.sample([item], 6, SamplingConfig(max_new_tokens=30), [0])[0]
    batch = token_batch(group, policy.device)
    assert (policy.logps(item, batch) - batch.logps)[batch.mask].abs().max() <= 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_bf16_ways_agree_as_far_as_bf16_goes(tmp_path, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    policy = build_policy(TOY, tmp_path, precision=Precision.bf16, device="cuda", attention=attention)
    item, clip = make_prompt(policy, 300, steps=12)
    group = Group(item, clip, make_tokens(policy, item, 4, 20), spread_advantages(4, policy.device))
    naive = learn(policy, group, VISION_ONCE, reference(policy, group, VISION_ONCE))
    for way in (SHARED, SAVING):
        assert (learn(policy, group, way, reference(policy, group, way)) - naive).abs().mean() <= 0.02


def test_the_3b_by_phase(tmp_path):
    """One card of 80 GB: the shared update takes at most 1.5 times the share of its tokens, and memory stays flat."""
    load = Load()
    found = measure_gpu(tmp_path, repeats=3, shapes={"3B": QWEN_3B}, load=load)["shapes"]["3B"]
    shared, naive = found[f"{SHARED}: update"], found[f"{VISION_ONCE}: update"]
    assert shared is not None and found[f"{SAVING}: update"]["peak_gib"] < shared["peak_gib"]
    if naive is not None:  # else eight whole sequences did not fit
        ratio = sorted(naive["seconds"])[1] / sorted(shared["seconds"])[1]
        assert ratio >= token_ratio(load.prompt, load.completion, load.group) / 1.5

"""Devices without a GPU: the policy on CUDA tensors that have no content. What moves, what is waited for, which types.

tests/fake_cuda/ has the device, which is compiled here, and the walk through the phases of a step.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parents[1] / "fake_cuda"
MODELS = ["Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"]
WAYS = ("shared", "memory-saving", "naive")
UP = "to cuda in policy.py:"
"""To the device: a few numbers each time. Back again nothing goes but what `reads` names."""
TRANSFERS = {
    "prefill": {UP + "_embed_prompt": 2, UP + "_prefill": 1},
    **{f"{pass_}, shared": {UP + "_embed_prompt": 2, UP + "_prefill": 1} for pass_ in ("reference", "update")},
    **{f"{pass_}, memory-saving": {UP + "_embed_prompt": 2, UP + "_states": 1} for pass_ in ("reference", "update")},
    **{f"{pass_}, naive": {UP + "_embed_prompt": 2, UP + "_naive": 1} for pass_ in ("reference", "update")},
    "patches": {},
}
PASS = {"policy.py:_embed_prompt": 1, "policy.py:logps": 2}
"""Masks, of which the host has to count the chosen: the video's tokens, and which tokens are no padding."""
READS = {
    "prefill": {"policy.py:_embed_prompt": 1},
    **{f"reference, {way}": PASS for way in WAYS},
    **{f"update, {way}": {**PASS, "loss.py:grpo_loss": 1, "autograd:backward": 1} for way in WAYS},
    "patches": {},
}


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """The compiled device. It needs a compiler, and a torch whose build has no device of its own."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++) to build the device with")
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA, whose own device guard is in the way")
    library = tmp_path_factory.mktemp("fake") / "device.so"
    root = Path(torch.__file__).parent
    include = root / "include"
    command = [
        compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include",
        str(HERE / "device.cpp"), "-o", str(library), f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10",
        "-ltorch_cpu",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return library


@pytest.fixture(scope="module", params=MODELS)
def walked(request, device):
    """What the walk found, by phase."""
    command = [sys.executable, str(HERE / "walk.py"), request.param]
    environment = {**os.environ, "LD_PRELOAD": str(device), "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]  # a tensor on the wrong device ends it
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.slow
def test_nothing_moves_but_what_is_listed(walked):
    has_deepstack = walked["model"]["deepstack"]
    embedding = {UP + "_embed_prompt": 2 + has_deepstack}  # where its features are added
    expected = {phase: {**moves, **embedding} if moves else {} for phase, moves in TRANSFERS.items()}
    assert {phase: walked[phase]["transfers"] for phase in TRANSFERS} == expected
    sampled = walked["sample"]["transfers"]
    assert all(name.startswith("to cuda") for name in sampled), sampled
    assert sampled[UP + "_embed_prompt"] == 3 * (2 + has_deepstack) and sampled[UP + "_prefill"] == 3


@pytest.mark.slow
def test_the_host_waits_only_where_it_must(walked):
    assert {phase: walked[phase]["reads"] for phase in READS} == READS
    # Between steps who has ended, at the end what was said (a generator in `_collect`); no step waits for anything.
    reads = {"policy.py:_embed_prompt", "decoding.py:_to_the_end", "decoding.py:<genexpr>"}
    assert set(walked["sample"]["reads"]) == reads, walked["sample"]["reads"]


@pytest.mark.slow
def test_no_64_bit_float_is_on_the_device(walked):
    """But for the draw's cumulative sum, where a float32 would make rare tokens impossible."""
    for phase, found in walked.items():
        if phase == "model":
            continue
        places = {place.partition(":")[0] for place in found["doubles"]}
        assert places <= ({"sampling.py", "decoding.py"} if phase == "sample" else set()), (phase, found["doubles"])


@pytest.mark.slow
def test_a_layer_takes_few_kernels_per_token(walked):
    """They are what decoding waits for where no graph can be captured; 96 before it had a step of its own."""
    one, two = walked["model"]["kernels"]
    print(f"{two - one} kernels per layer and token, {2 * one - two} beside the layers")
    norms_of_heads = 16 if walked["model"]["deepstack"] else 0
    assert two - one <= 60 + norms_of_heads

"""The policy's own code on CUDA tensors without content: what goes to the device and comes back, and in which types.

LD_PRELOAD=LIBRARY python tests/fake_cuda/walk.py MODEL

LIBRARY is the compiled device.cpp. Prints one JSON object: for each phase the transfers, the places where the host
waits for a number, and the 64-bit floats on the device, each with the function that caused it and how often; and the
kernels per token of one layer and of two.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import tartvg
from tartvg.config import LoraCompute, LoraConfig, PolicyConfig, Precision, SamplingConfig
from tartvg.grpo import LossInputs, LossSettings, grpo_loss
from tartvg.memory.footprint import ShapePolicy, model_config, with_layers
from tartvg.policy import decode_attention, prefix_attention
from tartvg.policy.decoding import Decoding, Stepper
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import PromptInputs
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(tartvg.__file__).parent
P, G, L, T = 3, 4, 600, 40
NUM_TEXT = 56
"""Tokens of a prompt that are none of its video's."""
LOOKS = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "t", "split", "split_with_sizes", "detach", "alias", "as_strided", "unbind", "_reshape_alias", "lift_fresh",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "unfold", "narrow", "device",
}  # fmt: skip
"""Operators that only look at memory in another way."""
WAYS = {"shared": dict(), "memory-saving": dict(activation_checkpointing=True), "naive": dict(shared_prefix=False)}


def culprit():
    """The innermost function of the package that led here, as `file:function`; else the backward pass did."""
    for frame in reversed(traceback.extract_stack()):
        if PACKAGE in Path(frame.filename).parents:
            return f"{Path(frame.filename).name}:{frame.name}"
    return "autograd:backward"


class Watch(TorchDispatchMode):
    """Notes what crosses between host and device, and answers where a number of the device is needed."""

    def __init__(self):
        super().__init__()
        self.transfers, self.reads, self.doubles = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        is_here = any(t.device.type == "cuda" for t in tensors)
        if name == "_local_scalar_dense":
            if is_here:
                self.reads[culprit()] += 1
            return False if args[0].dtype == torch.bool else 0
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and is_here:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if masks:  # the host has to learn how many are chosen; here it is all of them
                self.reads[culprit()] += 1
            if masks and name == "index":
                return args[0].flatten(0, masks[0].ndim - 1).clone()
        if name == "nonzero" and is_here:
            self.reads[culprit()] += 1
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.long, device=args[0].device)
        if name == "nonzero":  # in main memory: the places of a prompt's video tokens
            return torch.zeros(args[0].numel() - NUM_TEXT, 1, dtype=torch.long)
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        kinds = {t.device.type for t in (*results, *(t for t in tensors if t.ndim))}
        if name in ("_to_copy", "copy_") and len(kinds) > 1:
            to = (results or tensors)[0].device.type
            self.transfers[f"to {to} in {culprit()}"] += 1
        for result in results:
            if result.device.type == "cuda" and result.dtype == torch.float64:
                self.doubles[culprit()] += 1
        return out

    def found(self):
        """What was noted, for JSON."""
        return {"transfers": dict(self.transfers), "reads": dict(self.reads), "doubles": dict(self.doubles)}


class Walker(ShapePolicy):
    """Everything as in the real policy, but for weights without content."""

    logps = Policy.logps
    _embed_prompt = Policy._embed_prompt

    def become_fake(self):
        made = {}
        for module in self.modules():
            for owner in (module._parameters, module._buffers):
                for name, old in owner.items():
                    if old is not None and id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
                        is_weight = isinstance(old, torch.nn.Parameter)
                        made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
                    owner[name] = None if old is None else made[id(old)]


def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What torch chooses on a GPU for 16 bits; with a mask the general kernel, of which only the shape counts."""
    if attn_mask is not None or query.dtype == torch.float32:
        return torch.empty_like(query) + 0 * (query.sum() + key.sum() + value.sum())
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0]


def prepared(length, width, number, more):
    """As in a run: token ids and positions lie in main memory, features on the device."""
    is_video = torch.zeros(length, dtype=torch.bool)
    is_video[16 : length - NUM_TEXT + 16] = True
    ids, positions = torch.zeros(length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    features, *deepstack = (
        torch.empty(length - NUM_TEXT, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(1 + more)
    )
    inputs = PromptInputs(ids, positions, is_video)
    prompt = SimpleNamespace(sample=SimpleNamespace(sample_id=str(number)))
    return PreparedPrompt(prompt, inputs, VideoFeatures(features, (1, 2, 2), 1.0, 1.0, deepstack=tuple(deepstack)))


def build(path, num_layers=3):
    """A policy of the released shape with few decoder layers, settings as conf/ has them."""
    lora = LoraConfig(compute=LoraCompute.native)
    settings = PolicyConfig(name="x", path=path, precision=Precision.bf16, logit_chunk=64, lora=lora)
    return Walker(settings, with_layers(model_config(settings), num_layers)), settings


def become_fake(policy):
    """On the device without content, with a tokenizer; in a FakeTensorMode. Three prompts for it."""
    policy.become_fake()
    policy.end_ids = {1}
    policy.tokenizer = Words(policy.vocabulary - 20)
    more = policy.family.num_features(policy.core.config) - 1
    width = policy.language_model.config.hidden_size
    return [prepared(L - 7 * number, width, number, more) for number in range(P)]


class Kernels(TorchDispatchMode):
    """Counts what starts a kernel on the device."""

    def __init__(self):
        super().__init__()
        self.by_name = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_iter((args, kwargs or {}, out)) if isinstance(t, torch.Tensor)]
        if name not in LOOKS and any(t.device.type == "cuda" for t in tensors):
            self.by_name[name] += 1
        return out


def kernels_per_token(path, num_layers):
    """Kernels of one step of decoding: the decoder, the head, the draw and the notes."""
    counts = []
    step = Decoding.step

    def counted(decoding):
        with Kernels() as kernels:
            step(decoding)
        counts.append(kernels.by_name.total())

    policy, _ = build(path, num_layers)
    Decoding.step = counted
    try:
        with FakeTensorMode(), Watch():
            policy.sample(become_fake(policy), G, SamplingConfig(max_new_tokens=4), list(range(P)))
    finally:
        Decoding.step = step
    assert len(set(counts)) == 1, counts
    return counts[0]


def learn(policy, item, tokens):
    """Log-probabilities, loss and gradient of one group."""
    policy.train()
    logps = policy.logps(item, tokens)
    advantages = torch.empty(len(tokens.ids), 1, device=DEVICE)
    inputs = LossInputs(logps, logps.detach(), torch.empty_like(logps), advantages, tokens.mask)
    output = grpo_loss(inputs, LossSettings(clip_low=0.2, clip_high=0.2, kl_coef=0.04))
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(output.loss, weights)
    assert {(g.dtype, g.device) for g in gradients} == {(torch.float32, DEVICE)}
    assert (output.loss.dtype, output.loss.device) == (torch.float32, DEVICE)


def main():
    """Walk through the phases of a step."""
    torch.nn.functional.scaled_dot_product_attention = flash
    prefix_attention.scaled_dot_product_attention = flash
    prefix_attention.is_exact = lambda *_, **__: True
    decode_attention.part_of = lambda *_: decode_attention.KERNELS["cuda"]
    Stepper.distrust = "a graph needs a real device"
    policy, settings = build(sys.argv[1])
    found = {}

    def phase(name, work):
        with Watch() as watch:
            work()
        found[name] = watch.found()

    with FakeTensorMode():
        items = become_fake(policy)
        limits = SamplingConfig(max_new_tokens=4)
        phase("prefill", lambda: policy._prefill(items[0]))
        phase("sample", lambda: policy.sample(items, G, limits, list(range(P))))
        ids = torch.zeros(G, T, dtype=torch.long, device=DEVICE)
        mask = torch.ones_like(ids, dtype=torch.bool)
        tokens = TokenBatch(ids, mask, torch.zeros(G, T, device=DEVICE))
        for way, changes in WAYS.items():
            policy.settings = replace(settings, **changes)

            def reference():
                with policy.as_reference():
                    assert policy.logps(items[0], tokens).device == DEVICE

            phase(f"reference, {way}", reference)
            phase(f"update, {way}", lambda: learn(policy, items[0], tokens))
        rows = torch.empty(8, 3 * 2 * policy.family.patch_form.size**2, device=DEVICE)
        phase("patches", lambda: policy.core.model.visual.patch_embed(rows))
    kernels = [kernels_per_token(sys.argv[1], num_layers) for num_layers in (1, 2)]
    has_deepstack = bool(items[0].video.deepstack)
    print(json.dumps({**found, "model": {"deepstack": has_deepstack, "kernels": kernels}}))


class Words:
    """A tokenizer of so many words, of which none is looked at."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def decode(self, *_, **__):
        return ""


if __name__ == "__main__":
    main()

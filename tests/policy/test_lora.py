"""LoRA in the compute type beside PEFT's: gradients against fp32, files, greedy answers."""

from pathlib import Path

import peft
import pytest
import torch
from helpers.policies import with_moved_adapter
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from tartvg.config import LoraCompute, LoraConfig, PolicyConfig, Precision, SamplingConfig
from tartvg.policy.features import VideoFeatures
from tartvg.policy.loading import load_base, save_adapter
from tartvg.policy.lora import Down, NativeLora, Up
from tartvg.policy.policy import Policy, PreparedPrompt, token_batch
from tartvg.policy.sampling import greedy
from tartvg.types import GroundingSample, Prompt, Span

QUESTION = 'When does "a red square enters" happen in the video?'


def settings_of(compute, precision=Precision.fp32, **lora):
    return PolicyConfig(
        name="t", path="embedded:tiny", precision=precision, lora=LoraConfig(compute=LoraCompute(compute), **lora)
    )


def moved(policy, by=0.02):
    return with_moved_adapter(policy, by, seed=3)


def item(policy):
    features = VideoFeatures(0.5 * torch.randn(160, 128, generator=torch.Generator().manual_seed(1)), (40, 4, 4), 1, 40)
    sample = GroundingSample("a", Path("absent"), "q", (Span(0, 1),), 40.0, "train")
    inputs = policy.encode_prompt(QUESTION, features)
    return PreparedPrompt(Prompt(sample, QUESTION), inputs, features)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that a native policy wrote."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(moved(Policy(settings_of("native")), 0.2).model, folder, "embedded:tiny")
    return folder


def gradient(policy, tokens):
    """Log-probabilities of some completions, and the gradient of a loss that rewards the later ones."""
    policy.train()
    policy.zero_grad()
    logps = policy.logps(item(policy), tokens)
    (logps * torch.linspace(-1.5, 1.5, len(tokens.ids))[:, None] * tokens.mask).sum().backward()
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in weights} == {weight.grad.dtype for weight in weights} == {torch.float32}
    return logps.detach(), torch.cat([weight.grad.flatten() for weight in weights])


def test_gradients_in_bf16_are_no_worse_than_pefts():
    exact = moved(Policy(settings_of("peft")))
    groups = exact.sample([item(exact)], 8, SamplingConfig(max_new_tokens=48), [0])[0]
    tokens = token_batch(groups, exact.device)
    logps, true = gradient(exact, tokens)
    cosine, gap = {}, {}
    for compute in ("peft", "native"):
        found, estimate = gradient(moved(Policy(settings_of(compute, Precision.bf16))), tokens)
        cosine[compute] = float(cosine_similarity(estimate, true, 0))
        gap[compute] = float((found - logps)[tokens.mask].abs().mean())
        print(f"{compute}: cosine to fp32 {cosine[compute]:.5f}, log-probabilities off by {gap[compute]:.4f}")
    assert cosine["native"] >= cosine["peft"] - 2e-4 and cosine["native"] > 0.998
    assert gap["native"] <= 1.5 * gap["peft"]


def test_in_fp32_only_the_rounding_differs():
    ours, theirs = (moved(Policy(settings_of(compute))) for compute in ("native", "peft"))
    groups = theirs.sample([item(theirs)], 4, SamplingConfig(max_new_tokens=24), [0])[0]
    tokens = token_batch(groups, theirs.device)
    (logps, one), (expected, other) = gradient(ours, tokens), gradient(theirs, tokens)
    assert (logps - expected).abs().max() <= 1e-5
    assert (one - other).norm() <= 1e-5 * other.norm()


def test_plain_peft_reads_the_adapter_and_says_the_same(adapter):
    """The library's own model with the library's own forward pass."""
    native, policy = (Policy(settings_of(compute), adapter) for compute in ("native", "peft"))
    base, _ = load_base(settings_of("peft"))
    plain = peft.PeftModel.from_pretrained(base, str(adapter))
    own = dict(plain.named_parameters())
    named = {n: w for n, w in native.model.named_parameters() if "lora" in n and "reference" not in n}
    assert named and all(torch.equal(weight, own[name]) for name, weight in named.items())
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        said = [model.eval()(input_ids=ids).logits.float() for model in (plain, native.model)]
    assert (said[0] - said[1]).abs().max() <= 1e-3 and torch.equal(said[0].argmax(-1), said[1].argmax(-1))
    limits = greedy(SamplingConfig(max_new_tokens=64))
    answers = [p.sample([item(p)], 1, limits, [0])[0][0] for p in (native, policy)]
    assert len(answers[0].token_ids) > 4 and answers[0].token_ids == answers[1].token_ids
    fresh = Policy(settings_of("native"))
    assert fresh.sample([item(fresh)], 1, limits, [0])[0][0].token_ids != answers[0].token_ids, "the adapter is in use"


def test_the_files_are_pefts(adapter, tmp_path):
    save_adapter(moved(Policy(settings_of("peft")), 0.2).model, tmp_path, "embedded:tiny")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [(folder / "adapter_config.json").read_text() for folder in (adapter, tmp_path)]
    assert configs[0] == configs[1]


def test_reference_and_dropout_go_through_it(adapter):
    policy = Policy(settings_of("native", dropout=0.5), adapter)
    layer = next(module for module in policy.modules() if isinstance(module, NativeLora))
    x = torch.randn(2, 3, layer.in_features)
    with policy.as_reference():
        first = layer(x)
        assert torch.equal(first, layer(x))
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1.0)
    with policy.as_reference():
        assert torch.equal(first, layer(x)), "the reference has weights of its own"
    with policy.model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    fresh = moved(Policy(settings_of("native", dropout=0.5))).train()
    layer = next(module for module in fresh.modules() if isinstance(module, NativeLora))
    assert not torch.equal(layer(x), layer(x)), "dropout"


def test_settings_reach_the_layers(adapter):
    for folder in (None, adapter):
        native, plain = (Policy(settings_of(compute), folder) for compute in ("native", "peft"))
        layers = [m for m in native.modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert {type(m) for m in layers} == {NativeLora}
        assert {type(part) for m in layers for part in m.lora_A.values()} == {Down}
        assert {type(part) for m in layers for part in m.lora_B.values()} == {Up}
        assert not any(isinstance(m, NativeLora) for m in plain.modules())

"""export: base and adapter as one plain Hugging Face folder with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tartvg.config import Config, SettingError, policy_label
from tartvg.policy.merging import merge, write_usage
from tartvg.policy.policy import Policy, PreparedPrompt, token_batch
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import write_atomic
from tartvg.report.model_card import CardFacts, ScoredPolicy, Shift, in_words, model_card, training_behind
from tartvg.stages.common import BASE, base_identity, first_of, free_finished_policies, load_policy, prompts_of
from tartvg.stages.folder import StageFolder, read_manifest, run_dir
from tartvg.stages.ground import trained_adapter
from tartvg.stages.keys import data_identity, fingerprint, settings_of
from tartvg.training.prefetch import split
from tartvg.training.probes import decodable, greedy_answers
from tartvg.types import Completion, Prompt

MODEL = "model"
"""The exported folder, below that of the stage."""


def run_export(config: Config) -> None:
    """Write `<run>/export/model`: weights, tokenizer, configs, README.md and answer.py."""
    adapter = trained_adapter(config)
    if adapter is None:
        raise SettingError(
            f"name={config.name}: there is no trained adapter to export in this run: train first, or give "
            "init_adapter=FOLDER"
        )
    set_up_torch(config.trainer)
    with StageFolder(run_dir(config) / "export", config, lambda: key_of(config, adapter)).work() as is_needed:
        if is_needed:
            target = run_dir(config) / "export" / MODEL
            shutil.rmtree(target, ignore_errors=True)  # of an export that was interrupted
            _export(config, adapter, target)


def key_of(config: Config, adapter: Path) -> dict[str, Any]:
    """Everything that weights and card depend on."""
    found = settings_of(
        config, "policy", "export", "anchors", "dataset.name", "evaluate.split", "evaluate.batch_size",
        "grpo.sampling.max_new_tokens",
    )  # fmt: skip
    return {
        **found, "base": base_identity(config), "adapter": fingerprint(adapter),
        "data": data_identity(p.sample for p in _asked(config)),
        "scores": [fingerprint(folder / "scores.json") for _, folder in _evaluations(config, adapter)],
    }  # fmt: skip


def _asked(config: Config) -> list[Prompt]:
    """The queries on which the merge is measured."""
    if not config.export.num_queries:
        return []
    return first_of(prompts_of(config, config.evaluate.split), config.export.num_queries)


def _evaluations(config: Config, adapter: Path) -> list[tuple[str, Path]]:
    """Finished evaluations in this run of the base and of this very adapter, on this base."""
    found, label = [], policy_label(str(adapter))
    expected = {BASE: None, label: fingerprint(adapter)}
    for name, content in expected.items():
        folder = run_dir(config) / "evaluate" / name
        manifest = read_manifest(folder) or {}
        inputs = manifest.get("inputs", {})
        is_same = inputs.get("adapter") == content and inputs.get("base") == base_identity(config)
        if manifest.get("finished") and is_same and (folder / "scores.json").is_file():
            found.append((name, folder))
    return found


def _export(config: Config, adapter: Path, target: Path) -> None:
    asked = _asked(config)
    policy = load_policy(config, adapter).eval()  # first: what cannot be loaded is refused before anything is written
    said = _answers(policy, asked, config)
    tokenizer = policy.tokenizer
    del policy
    free_finished_policies()
    merge(config.policy, adapter, target)
    prompt = write_usage(tokenizer, config.policy, target, config.anchors, config.grpo.sampling.max_new_tokens)
    shift = _shift(replace(config, policy=replace(config.policy, path=str(target), revision=None)), said)
    facts = CardFacts(
        title=f"{config.policy.name}, {config.name}, {policy_label(str(adapter))}",
        base=_published(config.policy.path) + (f"@{config.policy.revision}" if config.policy.revision else ""),
        adapter="/".join(adapter.resolve().parts[-3:]),
        precision=config.policy.precision.value,
        training=training_behind(adapter),
        evaluations=[_scored(name, folder) for name, folder in _evaluations(config, adapter)],
        prompt=prompt,
        shift=shift,
        max_new_tokens=config.grpo.sampling.max_new_tokens,
    )
    write_atomic(target / "README.md", model_card(facts))
    print(f"{target}: exported" + ("" if shift is None else f"; {in_words(shift)}"))


def _published(path: str) -> str:
    """A Hub id as it is; of a folder its name alone, as where it lies is nobody else's business."""
    return Path(path).resolve().name if Path(path).is_dir() else path


def _scored(label: str, folder: Path) -> ScoredPolicy:
    manifest = read_manifest(folder) or {}
    inputs = manifest.get("inputs", {})
    data = f"{inputs.get('dataset.name', '?')}, {inputs.get('evaluate.split', '?')}"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return ScoredPolicy(label, data, str(manifest.get("command", "?")), scores)


@dataclass(frozen=True)
class Said:
    """One greedy answer and the log-probabilities of its tokens, float32 (1, T)."""

    prompt: Prompt
    completion: Completion
    logps: Tensor


@torch.no_grad()
def _answers(policy: Policy, prompts: Sequence[Prompt], config: Config) -> list[Said]:
    """What the policy says to the queries whose videos can be decoded."""
    found = []
    for batch in split(prompts, config.evaluate.batch_size):
        prepared = decodable(policy, batch, "export", {})
        completions = greedy_answers(policy, prepared, config.grpo.sampling)
        found += [Said(p.prompt, c, _logps(policy, p, c)) for p, c in zip(prepared, completions, strict=True)]
    return found


def _logps(policy: Policy, prepared: PreparedPrompt, completion: Completion) -> Tensor:
    return policy.logps(prepared, token_batch([completion], policy.device)).cpu()


@torch.no_grad()
def _shift(config: Config, before: Sequence[Said]) -> Shift | None:
    """Ask the exported model the same, and score the answers of before with it. None without any answer."""
    if not before:
        return None
    policy = load_policy(config, None).eval()
    after = _answers(policy, [said.prompt for said in before], config)
    num_equal = sum(a.completion.token_ids == b.completion.token_ids for a, b in zip(after, before, strict=True))
    logps = [_logps(policy, policy.prepare(said.prompt), said.completion) for said in before]
    moved = torch.cat([(new - said.logps).abs()[0] for new, said in zip(logps, before, strict=True)])
    return Shift(len(before), len(moved), num_equal, float(moved.mean()), float(moved.max()))

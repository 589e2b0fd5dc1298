"""evaluate: predictions and scores of the base and of each stage, on queries that none of them trained on."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tartvg.config import Config, DatasetConfig, DatasetName, SamplingConfig, SettingError, policy_label
from tartvg.evaluation.answers import prediction
from tartvg.evaluation.detection import mean_average_precision, ranked_answers
from tartvg.evaluation.lengths import scores_by_length
from tartvg.evaluation.score import ALL_THRESHOLDS, ScoringRules, score, scorecard_to_json
from tartvg.evaluation.submission import submission
from tartvg.policy.loading import checked_base
from tartvg.policy.policy import Policy
from tartvg.policy.sampling import stream_seed
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import prediction_from_json, read_jsonl, to_json, write_atomic, write_jsonl
from tartvg.report.strips import film_strip
from tartvg.stages.common import (
    adapter_of,
    base_identity,
    first_of,
    load_policy,
    prompts_of,
    refuse_missing_videos,
)
from tartvg.stages.controls import run_controls
from tartvg.stages.folder import PATIENCE_S, StageFolder, read_manifest, run_dir
from tartvg.stages.keys import data_identity, fingerprint, settings_of
from tartvg.stages.quiet import quiet_libraries
from tartvg.stages.shards import are_complete, batch_files, helpers, is_orphan, missing_of, num_shards
from tartvg.tracking import Tracker
from tartvg.training.prefetch import Clips, clips_ahead, split, videos_of
from tartvg.training.probes import decodable
from tartvg.types import GroundingSample, Prediction, Prompt, Scorecard

BATCHES = "batches"
"""Folder beside predictions.jsonl while it is being made."""


def run_evaluate(config: Config) -> None:
    """Score every target of `evaluate.policies` into `<run>/evaluate/<target>/`, then run the faithfulness controls."""
    refuse_equal_labels(config.evaluate.policies)
    set_up_torch(config.trainer)
    checked_base(config.policy)
    for target in config.evaluate.policies:
        _evaluate(config, target)
    run_controls(config)


def _evaluate(config: Config, target: str) -> None:
    adapter = adapter_of(config, target)
    folder = run_dir(config) / "evaluate" / policy_label(target)
    output = StageFolder(folder, config, lambda: key_of(config, adapter))
    if config.evaluate.shard is not None:
        if output.claim():
            work_on_shard(config, target, output.folder / BATCHES, config.evaluate.shard)
        if not output.is_finished and not are_complete(_batches(config, output.folder)):
            print(f"evaluate: shard {config.evaluate.shard} is done; the last one puts the results together")
            return
    # The last two shards may end at the same moment.
    with output.work(0.0 if config.evaluate.shard is None else PATIENCE_S) as is_needed:
        if is_needed:
            prompts = prompts_to_score(config)
            predict(config, target, prompts, output.folder / "predictions.jsonl")
            _score(config, policy_label(target), prompts, output.folder, adapter)
    # Now that the stage is marked as finished: a kill before that must not cost the predictions.
    shutil.rmtree(output.folder / BATCHES, ignore_errors=True)


def key_of(config: Config, adapter: Path | None) -> dict[str, Any]:
    """Everything that the results depend on, the annotations and videos among it."""
    found = settings_of(
        config, "policy", "dataset.name", "dataset.late_windows", "anchors", "evaluate",
        "grpo.sampling.max_new_tokens", "seed",
    )  # fmt: skip
    prompts = prompts_to_score(config)
    refuse_missing_videos(config, config.evaluate.split, prompts, max_share=1.0)  # a missing one counts as wrong
    return {
        **found, "data": data_identity(p.sample for p in prompts), "base": base_identity(config),
        "adapter": None if adapter is None else fingerprint(adapter),
    }  # fmt: skip


def refuse_equal_labels(targets: Sequence[str]) -> None:
    """Raise SettingError for two targets whose results would have one place: the second would displace the first."""
    owner: dict[str, str] = {}
    for target in targets:
        label = policy_label(target)
        if owner.setdefault(label, target) != target:
            raise SettingError(
                f"evaluate.policies: {owner[label]} and {target} would both be evaluate/{label}; "
                "evaluate them in two runs, each with a name=... of its own"
            )


def prompts_to_score(config: Config) -> list[Prompt]:
    """Return the queries of the split, at most `evaluate.num_queries`."""
    return first_of(prompts_of(config, config.evaluate.split), config.evaluate.num_queries)


def _batches(config: Config, folder: Path) -> list[Path]:
    return batch_files(folder / BATCHES, len(prompts_to_score(config)), config.evaluate.batch_size)


def predict(config: Config, target: str, prompts: Sequence[Prompt], path: Path) -> None:
    """Write the predictions of all prompts to `path`, by all shards that this machine runs.

    The batches beside it are kept: whoever finishes the stage removes them.
    """
    folder = path.with_name(BATCHES)
    files = batch_files(folder, len(prompts), config.evaluate.batch_size)
    if not are_complete(files):
        with helpers(work_on_shard, config, target, folder, len(files)):
            work_on_shard(config, target, folder, 0)
    write_atomic(path, "".join(file.read_text(encoding="utf-8") for file in files))


def work_on_shard(config: Config, target: str, folder: Path, shard: int, parent: int | None = None) -> None:
    """Make the batches of one shard that are not there yet, each a file of its own; in this process.

    Ends it as soon as `parent` is gone, where that process waits for the shard.
    """
    prompts, size, count = prompts_to_score(config), config.evaluate.batch_size, num_shards(config)
    files = batch_files(folder, len(prompts), size)
    if not missing_of(files, shard, count):
        return
    quiet_libraries()
    set_up_torch(config.trainer)
    if config.trainer.accelerator == "gpu":
        torch.cuda.set_device(shard % torch.cuda.device_count())
    policy = load_policy(config, adapter_of(config, target)).eval()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=shard > 0 or not config.trainer.progress_bar) as progress:
        own = range(shard, len(files), count)
        task = progress.add_task(f"evaluate {policy_label(target)}", total=len(own))
        missing = missing_of(files, shard, count)
        progress.advance(task, len(own) - len(missing))
        batches = split(prompts, size)
        ahead = clips_ahead((batches[n] for n in missing), videos_of, policy, config.trainer.num_workers)
        for number, (batch, clips) in zip(missing, ahead, strict=True):
            if is_orphan(parent):
                sys.exit(1)
            write_jsonl(files[number], _predict_batch(policy, batch, clips, config))
            progress.advance(task)


def _score(config: Config, label: str, prompts: Sequence[Prompt], folder: Path, adapter: Path | None) -> None:
    """Scorecard, metrics and, where it applies, a submission file, from the predictions in the folder.

    Of a mix these are the scores of all parts together; those of each part stand below `by_source`.
    """
    samples = [p.sample for p in prompts]
    predictions = [prediction_from_json(row) for row in read_jsonl(folder / "predictions.jsonl")]
    data = config.dataset
    parts = [(name, part, *_of_source(name, samples, predictions)) for name, part in data.sources.items()]
    written = "predictions.jsonl"
    for _, part, own, answers in parts or [("", data, samples, predictions)]:
        if part.name is DatasetName.qvhighlights:
            write_jsonl(folder / "submission.jsonl", submission(own, answers))
            written = "submission.jsonl"
    if not all(s.windows for s in samples):
        what = f"dataset={data.name.value}, split {config.evaluate.split}"
        print(f"{folder}: nothing was scored, because {what}, has no labels; {written} was written")
        return
    found, metrics = _scored(config, data.name.value, data, samples, predictions)
    for source, part, own, answers in parts:
        if own:
            card, more = _scored(config, source, part, own, answers)
            found.setdefault("by_source", {})[source] = card
            metrics |= more
    write_atomic(folder / "scores.json", json.dumps(found, indent=1) + "\n")
    _track(config, folder, label, metrics, predictions, adapter)


def _of_source(
    source: str, samples: Sequence[GroundingSample], predictions: Sequence[Prediction]
) -> tuple[list[GroundingSample], list[Prediction]]:
    """What belongs to one part of a mix, under the ids that it has without the mix."""
    ids = {s.sample_id: s.own_id for s in samples if s.source == source}
    own = [replace(s, sample_id=s.own_id) for s in samples if s.source == source]
    return own, [replace(p, sample_id=ids[p.sample_id]) for p in predictions if p.sample_id in ids]


def _scored(
    config: Config,
    label: str,
    data: DatasetConfig,
    samples: Sequence[GroundingSample],
    predictions: Sequence[Prediction],
) -> tuple[dict[str, Any], dict[str, float]]:
    """The scorecard of one data set as JSON, and its metrics below eval/<label>/."""
    rules = ScoringRules(is_clipped=data.late_windows != "keep")
    rule, strict = rules.rule, rules.is_strict
    card = score(
        samples, predictions, ALL_THRESHOLDS, rule, strict, max_anchors=config.anchors.max_count, seed=config.seed
    )  # fmt: skip
    found, metrics = scorecard_to_json(card, rules), scores_as_metrics(card, label)
    if data.name is DatasetName.qvhighlights:
        ranking = ranked_answers(predictions)
        detection = mean_average_precision(samples, ranking)
        by_length = scores_by_length(samples, predictions, ranking, rule, strict)
        found |= {"detection": to_json(detection), "by_length": to_json(by_length)}
        shown = {"map": detection.average, "map@0.5": detection.at[0.5], "map@0.75": detection.at[0.75]}
        metrics |= {f"eval/{label}/{key}": value for key, value in shown.items()}
    return found, metrics


def _predict_batch(policy: Policy, prompts: Sequence[Prompt], clips: Clips, config: Config) -> list[Prediction]:
    prepared = decodable(policy, prompts, "evaluate", clips)
    clips.clear()  # pixels, of which nothing is needed any more
    if not prepared:
        return []
    start = time.perf_counter()
    limits = SamplingConfig(config.evaluate.temperature, max_new_tokens=config.grpo.sampling.max_new_tokens)
    seeds = [stream_seed(config.seed, "evaluate", p.prompt.sample.own_id) for p in prepared]
    answers = policy.sample(prepared, config.evaluate.num_samples, limits, seeds, num_greedy=1)
    seconds = (time.perf_counter() - start) / sum(map(len, answers))
    is_direct = config.anchors.is_direct
    return [
        prediction(item.prompt.sample, completion, index, seconds, is_direct=is_direct)
        for item, group in zip(prepared, answers, strict=True)
        for index, completion in enumerate(group)
    ]


def scores_as_metrics(card: Scorecard, dataset: str) -> dict[str, float]:
    """Name the scorecard's values as metrics."""
    metrics = {
        "miou": card.miou.value,
        "format_rate": card.format_rate.value,
        "valid_rate": card.valid_rate.value,
        "count_mean": card.count_mean,
        "anchored_rate": card.anchored_rate,
        "refinement_rate": card.refinement_rate,
        "answer_match_rate": card.answer_match_rate,
        "oracle_iou": card.oracle_iou,
        "first_iou": card.first_iou,
        "last_iou": card.last_iou,
        "equal_rate": card.equal_rate,
        "first_exact_rate": card.first_exact_rate,
        "inexact_refined_rate": card.inexact_refined_rate,
        "inexact_worsened_rate": card.inexact_worsened_rate,
        "num_unparsed": float(card.num_unparsed),
        "num_missing": float(card.num_missing),
    }
    metrics |= {f"r1@{threshold}": estimate.value for threshold, estimate in card.recall.items()}
    return {f"eval/{dataset}/{name}": value for name, value in metrics.items()}


def _track(
    config: Config,
    folder: Path,
    label: str,
    metrics: dict[str, float],
    predictions: Sequence[Prediction],
    adapter: Path | None,
) -> None:
    with Tracker(folder, config.tracking, config.name, f"evaluate-{label}", to_json(config), config.seed) as tracker:
        if adapter is not None:
            tracker.uses(f"{label}-adapter", "adapter", adapter)
        tracker.log(metrics, 0)
        tracker.answers(predictions, config.dataset.name.value)
        tracker.strips(predictions, config.dataset.name.value, _strip)
        tracker.summary(metrics | over_base(folder, metrics))
        tracker.artifact(f"{label}-predictions", "predictions", folder / "predictions.jsonl")


def _strip(p: Prediction) -> bytes:
    return film_strip(Path(p.video), p.duration, p.windows, p.anchors, p.answer, p.query, optimize=False)


def over_base(folder: Path, metrics: Mapping[str, float]) -> dict[str, float]:
    """What a policy scores above the base that answered the same questions, as `over_base/<dataset>/<name>`.

    Empty for the base itself, and where the base beside it is not evaluated or answered something else.
    """
    base = folder.with_name("base")
    found = [(read_manifest(place) or {}).get("inputs") for place in (folder, base)]
    own, other = ({**inputs, "adapter": None} if inputs else None for inputs in found)
    if folder == base or own is None or own != other or not (base / "metrics.jsonl").exists():
        return {}
    (before,) = read_jsonl(base / "metrics.jsonl")
    names = (name for name in metrics if before.get(name) is not None)
    return {name.replace("eval/", "over_base/", 1): metrics[name] - before[name] for name in names}

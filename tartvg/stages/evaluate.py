"""evaluate: predictions and scores of the base and of each stage, on queries that none of them trained on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tartvg.config import Config, SamplingConfig
from tartvg.data.video import VideoError
from tartvg.evaluation.score import score
from tartvg.policy.policy import Policy, PreparedPrompt, greedy, stream_seed
from tartvg.records import prediction_from_json, read_jsonl, to_json, write_atomic, write_jsonl
from tartvg.response import parse_response
from tartvg.stages.common import adapter_of, base_identity, load_policy, prompts_of, set_up
from tartvg.stages.folder import StageFolder, fingerprint, run_dir
from tartvg.tracking import Tracker
from tartvg.types import Completion, Prediction, Prompt, Scorecard


def run_evaluate(config: Config) -> None:
    """Score every target of `evaluate.targets` into `<run>/evaluate/<target>/`."""
    set_up(config)
    for target in config.evaluate.targets:
        _evaluate(config, target)


def _evaluate(config: Config, target: str) -> None:
    adapter = adapter_of(config, target)
    settings = replace(config.evaluate, targets=[])
    key = {
        "policy": config.policy, "dataset": config.dataset, "prompt": config.anchors.prompt,
        "target": config.anchors.target, "cap": config.anchors.max, "evaluate": settings,
        "max_new_tokens": config.grpo.sampling.max_new_tokens, "base": base_identity(config), "seed": config.seed,
        "adapter": None if adapter is None else fingerprint(adapter), "threads": config.trainer.num_threads,
    }  # fmt: skip
    label = target if target.isidentifier() else Path(target).resolve().parent.name
    place = StageFolder(run_dir(config) / "evaluate" / label, config, key)
    with place.work() as is_needed:
        if not is_needed:
            return
        prompts = prompts_of(config, config.evaluate.split)[: config.evaluate.limit]
        path = place.folder / "predictions.jsonl"
        predict(load_policy(config, adapter), prompts, config, path, label)
        predictions = [prediction_from_json(row) for row in read_jsonl(path)]
        card = score([p.sample for p in prompts], predictions, max_anchors=config.anchors.max, seed=config.seed)
        write_atomic(place.folder / "scores.json", json.dumps(to_json(card), indent=1) + "\n")
        _track(config, place.folder, label, card)


def predict(policy: Policy, prompts: Sequence[Prompt], config: Config, path: Path, label: str) -> None:
    """Write the predictions of all prompts to `path`.

    Every batch is a file of its own until all are there: what is there is whole, and is not done again.
    """
    size, folder = config.evaluate.batch_size, path.with_name("batches")
    policy.eval()
    files = [folder / f"{start:06d}.jsonl" for start in range(0, len(prompts), size)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not config.trainer.progress_bar) as progress:
        task = progress.add_task(f"evaluate {label}", total=len(files))
        for number, file in enumerate(files):
            if not file.exists():
                write_jsonl(file, _predict_batch(policy, prompts[number * size : (number + 1) * size], config))
            progress.advance(task)
    write_atomic(path, "".join(file.read_text(encoding="utf-8") for file in files))
    shutil.rmtree(folder)


def _predict_batch(policy: Policy, prompts: Sequence[Prompt], config: Config) -> list[Prediction]:
    prepared = []
    for prompt in prompts:
        try:
            prepared.append(policy.prepare(prompt))
        except VideoError as error:
            print(f"evaluate: {prompt.sample.sample_id} counts as missing: {error}")
    if not prepared:
        return []
    start = time.perf_counter()
    limits = SamplingConfig(config.evaluate.temperature, max_new_tokens=config.grpo.sampling.max_new_tokens)
    answers = policy.sample(prepared, 1, greedy(limits), [0] * len(prepared))
    if config.evaluate.num_samples:
        seeds = [stream_seed(config.seed, "evaluate", p.prompt.sample.sample_id) for p in prepared]
        sampled = policy.sample(prepared, config.evaluate.num_samples, limits, seeds)
        answers = [[*a, *s] for a, s in zip(answers, sampled, strict=True)]
    seconds = (time.perf_counter() - start) / sum(map(len, answers))
    return [
        prediction(item, completion, index, seconds)
        for item, group in zip(prepared, answers, strict=True)
        for index, completion in enumerate(group)
    ]


def prediction(prepared: PreparedPrompt, completion: Completion, index: int, seconds: float) -> Prediction:
    """A completion, read, with everything that scoring and reading it needs."""
    sample = prepared.prompt.sample
    response = parse_response(completion.text)
    return Prediction(
        sample_id=sample.sample_id,
        sample_index=index,
        query=sample.query,
        video=sample.video.name,
        windows=sample.windows,
        duration=sample.duration,
        text=completion.text,
        anchors=response.anchors,
        answer=response.answer,
        faults=tuple(f.value for f in response.faults),
        is_finished=completion.is_finished,
        seconds=round(seconds, 4),
    )


def scores_as_metrics(card: Scorecard, dataset: str) -> dict[str, float]:
    """The scorecard in the metric vocabulary."""
    metrics = {
        "miou": card.miou.value,
        "format_rate": card.format_rate.value,
        "valid_rate": card.valid_rate.value,
        "anchors_mean": card.anchors_mean,
        "refinement_rate": card.refinement_rate,
        "consistency_rate": card.consistency_rate,
        "oracle_iou": card.oracle_iou,
        "num_unparsed": float(card.num_unparsed),
        "num_missing": float(card.num_missing),
    }
    metrics |= {f"r1@{threshold}": estimate.value for threshold, estimate in card.recall.items()}
    return {f"eval/{dataset}/{name}": value for name, value in metrics.items()}


def _track(config: Config, folder: Path, label: str, card: Scorecard) -> None:
    with Tracker(folder, config.tracking, config.name, f"evaluate-{label}", to_json(config), config.seed) as tracker:
        metrics = scores_as_metrics(card, config.dataset.name.value)
        tracker.log(metrics, 0)
        tracker.summary(metrics)
        tracker.artifact(f"{label}-predictions", "predictions", folder / "predictions.jsonl")

"""controls: does the policy look at the video? After an evaluation, the same questions about videos that are wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tartvg.config import Config, ControlName, SamplingConfig, policy_label
from tartvg.data.video import Clip, VideoError
from tartvg.evaluation.answers import prediction
from tartvg.evaluation.faithfulness import SHIFT_S, Pair, Said, compare, moved
from tartvg.evaluation.score import answer_iou
from tartvg.policy.controls import shuffled, with_shifted_stamps
from tartvg.policy.policy import Policy, PreparedPrompt
from tartvg.policy.sampling import greedy
from tartvg.records import prediction_from_json, read_jsonl, to_json, write_atomic, write_jsonl
from tartvg.stages.common import adapter_of, load_policy, prompts_of
from tartvg.stages.folder import PATIENCE_S, StageFolder, run_dir
from tartvg.stages.keys import fingerprint, settings_of
from tartvg.tracking import Tracker
from tartvg.training.prefetch import clips_ahead, split, videos_of
from tartvg.types import Prediction, Prompt


def run_controls(config: Config) -> None:
    """Ask every target of `evaluate.policies` about wrong videos into `<run>/controls/<target>/`.

    Gives one `<kind>.jsonl` of predictions for each of `faithfulness.kinds`, and summary.json, which compares them
    with the answers that the evaluation has recorded.
    """
    for target in config.evaluate.policies if config.faithfulness.kinds else []:
        _control(config, target, policy_label(target))


def _control(config: Config, target: str, label: str) -> None:
    source = run_dir(config) / "evaluate" / label / "predictions.jsonl"
    is_shard = config.evaluate.shard is not None
    if is_shard and not source.exists():
        return  # the shard that puts the results together does it
    output = StageFolder(run_dir(config) / "controls" / label, config, lambda: key_of(config, source))
    with output.work(PATIENCE_S if is_shard else 0.0) as is_needed:
        if not is_needed:
            return
        real = {p.sample_id: p for row in read_jsonl(source) if (p := prediction_from_json(row)).sample_index == 0}
        prompts = [p for p in prompts_of(config, config.evaluate.split) if p.sample.sample_id in real]
        prompts = prompts[: config.faithfulness.num_queries]
        policy = load_policy(config, adapter_of(config, target)).eval()
        summary = {}
        for kind in config.faithfulness.kinds:
            if kind is ControlName.shifted_stamps and not policy.family.is_time_text:
                print(f"controls: shifted_stamps is left out: {policy.family.title} writes no times into its prompt")
                continue
            path = output.folder / f"{kind.value}.jsonl"
            if not path.exists():  # whole or not there
                write_jsonl(path, _ask(policy, prompts, kind, config))
            answers = [prediction_from_json(row) for row in read_jsonl(path)]
            summary[kind.value] = summarise(real, answers, SHIFT_S if kind is ControlName.shifted_stamps else None)
        write_atomic(output.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        _track(config, output.folder, label, summary)


def key_of(config: Config, source: Path) -> dict[str, Any]:
    """What the comparison depends on; `source` holds the answers of the evaluation, which depend on all the rest."""
    return {**settings_of(config, "faithfulness"), "predictions": fingerprint(source)}


def summarise(
    real: dict[str, Prediction], answers: Sequence[Prediction], shift_s: float | None = None
) -> dict[str, float | int | None]:
    """Agreement of true and control answers, and what each of them is worth against the truth (mean IoU).

    `agreement` and `changed_rate` are None when no answer holds a time, the two mIoUs when no query has a truth. Where
    the control tells all times `shift_s` later, its truth is as much later, and so should its answers be: `followed` is
    their agreement with the true answers moved.
    """
    twins = [real[p.sample_id] for p in answers]
    said = [(Said(a.anchors, a.answer), Said(b.anchors, b.answer)) for a, b in zip(twins, answers, strict=True)]
    found = compare([Pair(a, b) for a, b in said])
    truth = [tuple(moved(window, shift_s or 0.0) for window in p.windows) for p in answers]
    summary = {
        "num_queries": len(answers),
        "agreement": None if found is None else found.agreement,
        "changed_rate": None if found is None else found.changed_rate,
        "real_miou": _miou(twins),
        "control_miou": _miou([replace(p, windows=windows) for p, windows in zip(answers, truth, strict=True)]),
    }
    if shift_s is None:
        return summary
    following = compare([Pair(a.later(shift_s), b) for a, b in said])
    return summary | {"followed": None if following is None else following.agreement}


def _miou(predictions: Sequence[Prediction]) -> float | None:
    """Over the queries that have a truth; a blind test split has none."""
    known = [answer_iou(p.answer, p.windows) for p in predictions if p.windows]
    return sum(known) / len(known) if known else None


def _ask(policy: Policy, prompts: Sequence[Prompt], kind: ControlName, config: Config) -> list[Prediction]:
    limits = greedy(SamplingConfig(max_new_tokens=config.grpo.sampling.max_new_tokens))
    own = videos_of(prompts)
    shown = other_videos(own) if kind is ControlName.other else own
    batches = split(list(zip(prompts, shown, strict=True)), config.evaluate.batch_size)
    found: list[Prediction] = []
    for batch, clips in clips_ahead(batches, lambda b: [v for _, v in b], policy, config.trainer.num_workers):
        asked = [
            (prompt, wrong)
            for prompt, video in batch
            if (wrong := _wrong(policy, prompt, video, kind, clips.get(video))) is not None
        ]
        clips.clear()
        start_s = time.perf_counter()
        completions = policy.sample([wrong for _, wrong in asked], 1, limits, [0] * len(asked)) if asked else []
        seconds = (time.perf_counter() - start_s) / max(1, len(asked))
        # recorded under the query's own sample and truth
        found += [
            prediction(prompt.sample, completion, 0, seconds)
            for (prompt, _), (completion,) in zip(asked, completions, strict=True)
        ]
    return found


def _wrong(policy: Policy, prompt: Prompt, video: Path, kind: ControlName, clip: Clip | None) -> PreparedPrompt | None:
    """Prepare the prompt with its control video; None where a video cannot be decoded or there is no other one."""
    try:
        if kind is ControlName.shuffled:
            return shuffled(policy.prepare(prompt, clip))
        if kind is ControlName.shifted_stamps:
            return with_shifted_stamps(policy, policy.prepare(prompt, clip), SHIFT_S)
        if video == prompt.sample.video:
            return None
        return policy.prepare(replace(prompt, sample=replace(prompt.sample, video=video)), clip)
    except VideoError as error:
        print(f"controls: {prompt.sample.sample_id} is left out: {error}")
        return None


def other_videos(videos: Sequence[Path]) -> list[Path]:
    """Choose another video for each entry of the list: the next one that differs, and the first after the last."""
    distinct = list(dict.fromkeys(videos))
    following = dict(zip(distinct, [*distinct[1:], *distinct[:1]], strict=True))
    return [following[video] for video in videos]


def controls_as_metrics(summary: dict[str, dict[str, float | int | None]], dataset: str) -> dict[str, float]:
    """Name the summary's values as metrics: eval/<dataset>/<kind>_agreement and so on; without what is None."""
    return {
        f"eval/{dataset}/{kind}_{name}": float(value)
        for kind, values in summary.items()
        for name, value in values.items()
        if value is not None and name != "num_queries"
    }


def _track(config: Config, folder: Path, label: str, summary: dict[str, dict[str, float | int | None]]) -> None:
    metrics = controls_as_metrics(summary, config.dataset.name.value)
    with Tracker(folder, config.tracking, config.name, f"controls-{label}", to_json(config), config.seed) as tracker:
        tracker.log(metrics, 0)
        tracker.summary(metrics)

"""Does the policy look at the video? Hand-counted agreements, shuffled frames against encoding them, and the stage."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.settings import watched

from tartvg.config import AnchorsConfig, FramesConfig, PlantedConfig, PolicyConfig
from tartvg.evaluation.faithfulness import Agreement, Pair, Said, compare
from tartvg.report.faithfulness import controls_table
from tartvg.stages.controls import controls_as_metrics, other_videos, summarise
from tartvg.types import Prediction, Span

NOTHING = Said((), None)


def said(*spans: tuple[float, float], answer: tuple[float, float] | None) -> Said:
    return Said(tuple(Span(*s) for s in spans), None if answer is None else Span(*answer))


def test_agreement_by_hand():
    same = said((0, 10), (2, 8), answer=(2, 8))
    half = Pair(said((0, 10), answer=(0, 10)), said((5, 15), answer=(0, 10)))  # 1/3 and 1
    shorter = Pair(same, said((0, 10), answer=None))  # 1, 0 and 0
    assert compare([Pair(same, same)]) == Agreement(1, 1.0, 0.0)
    assert compare([half]) == Agreement(1, pytest.approx(2 / 3), 1.0)
    assert compare([shorter]) == Agreement(1, pytest.approx(1 / 3), 1.0)
    found = compare([Pair(same, same), half, shorter, Pair(NOTHING, NOTHING)])
    assert found == Agreement(3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert compare([Pair(NOTHING, NOTHING)]) is None and compare([]) is None


def test_half_a_digit_is_no_change():
    before = said(answer=(1.0, 2.0))
    assert compare([Pair(before, said(answer=(1.004, 2.0)))]).changed_rate == 0
    assert compare([Pair(before, said(answer=(1.01, 2.0)))]).changed_rate == 1


def test_every_query_gets_another_video():
    a, b, c = Path("a"), Path("b"), Path("c")
    assert other_videos([a, a, b, c, b]) == [b, b, c, a, c]
    assert other_videos([a, a]) == [a, a], "there is no other one"


def prediction(sample_id: str, answer: Span | None) -> Prediction:
    return Prediction(sample_id, 0, "q", "v.mp4", (Span(0, 10),), 20.0, "", (), answer, (), True)


def test_a_summary_compares_truth_and_control_and_becomes_metrics_and_a_table(tmp_path):
    real = {"a": prediction("a", Span(0, 10)), "b": prediction("b", Span(0, 5)), "c": prediction("c", None)}
    summary = {"shuffled": summarise(real, [prediction("a", Span(0, 10)), prediction("b", None)])}
    assert summary["shuffled"] == {
        "num_queries": 2, "agreement": 0.5, "changed_rate": 0.5, "real_miou": 0.75, "control_miou": 0.5
    }  # fmt: skip
    nothing = summarise(real, [prediction("c", None)])
    assert nothing["agreement"] is nothing["changed_rate"] is None
    blind = dataclasses.replace(prediction("a", Span(0, 10)), windows=())
    assert summarise({"a": blind}, [blind])["real_miou"] is None, "a split without labels has no truth"
    assert controls_as_metrics({**summary, "other": nothing}, "planted") == {
        "eval/planted/shuffled_agreement": 0.5,
        "eval/planted/shuffled_changed_rate": 0.5,
        "eval/planted/shuffled_real_miou": 0.75,
        "eval/planted/shuffled_control_miou": 0.5,
        "eval/planted/other_real_miou": 0.0,
        "eval/planted/other_control_miou": 0.0,
    }
    assert controls_table(tmp_path) is None
    for target in ("base", "grpo2", "grpo2.old1"):  # the last was moved aside when its settings changed
        folder = tmp_path / "controls" / target
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({**summary, "other": nothing}))
    table = controls_table(tmp_path)
    assert [[cell.text for cell in row] for row in table.rows] == [
        [target, "75.0", "50.0", "50.0", "50.0", "0.0", "–", "–"]  # noqa: RUF001
        for target in ("base", "grpo2")
    ]


def test_answers_to_later_stamps_must_be_as_much_later(tmp_path):
    """One that follows, one that counts steps: moved back the first is as good as before, the second is not."""
    real = {name: prediction(name, Span(0, 10)) for name in "ab"}
    summary = summarise(real, [prediction("a", Span(5, 15)), prediction("b", Span(0, 10))], 5.0)
    third = pytest.approx((1 + 1 / 3) / 2)
    assert summary == {
        "num_queries": 2, "agreement": third, "changed_rate": 0.5, "real_miou": 1.0, "control_miou": third,
        "followed": third,
    }  # fmt: skip
    folder = tmp_path / "controls" / "base"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"shifted_stamps": summary}))
    table = controls_table(tmp_path)
    assert table.columns[-1] == "moved along, stamps + 5 s" and "5 s later" in table.note
    assert [cell.text for cell in table.rows[0]] == ["base", "100.0", "66.7", "66.7", "50.0", "66.7"]


@pytest.fixture(scope="module")
def prepared(untrained_base, planted_root):
    from tartvg.data.planted import load_planted
    from tartvg.policy.policy import Policy
    from tartvg.prompts import build_prompt

    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    policy = Policy(PolicyConfig(name="t", path=str(untrained_base), frames=frames), seed=0).eval()
    sample = load_planted(planted_root, PlantedConfig(2, 1, 1, 2), "train", "planted")[0]
    return policy, policy.prepare(build_prompt(sample, AnchorsConfig()))


def test_shuffled_features_are_those_of_the_shuffled_frames(prepared):
    from tartvg.data.video import read_clip
    from tartvg.policy.controls import in_order
    from tartvg.policy.features import FeatureCache

    policy, item = prepared
    path = item.prompt.sample.video
    clip = read_clip(path, policy.settings.frames)
    steps = item.video.grid_thw[0]
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(3))
    pairs = clip.frames.reshape(steps, 2, *clip.frames.shape[1:])
    moved = dataclasses.replace(clip, frames=pairs[order.numpy()].reshape(clip.frames.shape))
    policy.cache, cache = FeatureCache(0), policy.cache
    encoded = policy._video(path, moved)
    policy.cache = cache
    torch.testing.assert_close(in_order(item.video, order).embeddings, encoded.embeddings, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(item.video.embeddings, encoded.embeddings, atol=1e-3)


def test_a_shuffled_prompt_keeps_everything_but_the_order_of_the_frames(prepared):
    from tartvg.policy.controls import shuffled

    _, item = prepared
    first, second = shuffled(item), shuffled(item)
    assert first.inputs is item.inputs and first.prompt is item.prompt
    assert torch.equal(first.video.embeddings, second.video.embeddings), "the order belongs to the sample"
    assert not torch.equal(first.video.embeddings, item.video.embeddings)
    assert torch.equal(first.video.embeddings.sum(1).sort().values, item.video.embeddings.sum(1).sort().values)


@pytest.mark.slow
def test_an_evaluation_is_followed_by_its_controls_once(small, untrained_base, run_command, tmp_path):
    command = [
        *watched(small), "stage=evaluate", "evaluate.policies=[base]", f"policy.path={untrained_base}",
        "grpo.sampling.max_new_tokens=16", f"runs_dir={tmp_path}", "name=r", "faithfulness.num_queries=5",
        "faithfulness.kinds=[shuffled,other,shifted_stamps]",
    ]  # fmt: skip
    assert "shifted_stamps is left out: Qwen2.5-VL" in run_command(*command).stdout
    folder = tmp_path / "r/controls/base"
    summary = json.loads((folder / "summary.json").read_text())
    assert {kind: values["num_queries"] for kind, values in summary.items()} == {"shuffled": 5, "other": 5}
    assert len((folder / "shuffled.jsonl").read_text().splitlines()) == 5
    assert json.loads((folder / "metrics.jsonl").read_text())["eval/planted/other_control_miou"] == 0.0
    before = (folder / "manifest.json").stat().st_mtime_ns
    run_command(*command)
    assert (folder / "manifest.json").stat().st_mtime_ns == before

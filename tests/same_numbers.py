"""Whether two checkouts compute the same numbers: a seeded small pipeline, bit for bit.

    python tests/same_numbers.py --old ../old_checkout            # cpu, ddp and zero3
    python tests/same_numbers.py --old ../old_checkout cpu

runs grpo1, filter, sft, grpo2 and evaluate on the embedded policy in both checkouts, under each strategy (two processes
each but for cpu), and compares rollouts, traces, metrics, predictions, scores and adapters. Settings and metrics that
were renamed in between are translated by `RENAMED`; what only one side logs is listed and left out. Exit code 1 when
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from interruptions import results

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "dataset.planted.num_train=6", "dataset.planted.num_val=2", "dataset.planted.num_test=4",
    "dataset.planted.queries_per_video=2", "grpo.max_steps=3", "grpo.prompts_per_step=4", "grpo.group_size=4",
    "grpo.sampling.max_new_tokens=40", "grpo.lr=1e-4", "sft.lr=5e-5", "sft.epochs=1", "evaluate.num_samples=1",
    "evaluate.batch_size=3", "filter.min_reward=-100", "filter.min_anchors=0", "filter.min_ious=[]",
    "filter.max_per_query=1", "policy.frames.max_frames=16", "trainer.num_threads=1", "trainer.checkpoint_every=2",
    "trainer.progress_bar=false", "tracking.mode=off", "evaluate.policies=[grpo2]", "faithfulness.kinds=[]",
    "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]",
]  # fmt: skip
TWO = [
    "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_workers=0",
    "trainer.zero3.param_persistence_threshold=5000", "trainer.zero3.max_reuse_distance=0",
]  # fmt: skip
RENAMED = {
    "filter.": "anchors.filter.",
    "evaluate.policies": "evaluate.targets",
    "faithfulness.kinds": "controls.kinds",
    "trainer.zero3.param_persistence_threshold": "trainer.persist_below",
    "trainer.zero3.max_reuse_distance": "trainer.keep_within",
}
"""Today's settings -> those of the oldest checkout that is compared with, 5909bd5."""
METRICS = {"anchors_mean": "count_mean", "consistency_rate": "answer_match_rate"}
"""Names in scores.json and metrics.jsonl: that checkout's -> today's."""


def today(value: Any) -> Any:
    """A record of that checkout in today's form."""
    if isinstance(value, list):
        return [today(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {rename(name): today(item) for name, item in value.items()}
    if "tar1" in value and "anchor_ious" in value:
        terms = {name: value.pop(name) for name in ("format", "iou", "tar1", "tar2", "tar3")}
        value["terms"] = {name: float(item) for name, item in terms.items()}
    if "recall" in value and "miou" in value:  # scores.json
        value |= {name: estimate(value[name]) for name in ("miou", "format_rate", "valid_rate")}
        value["recall"] = {bound: estimate(item) for bound, item in value["recall"].items()}
    return value


def estimate(value: Any) -> Any:
    """A mean and its interval by name; that checkout has a list."""
    return dict(zip(("value", "low", "high"), value, strict=True)) if isinstance(value, list) else value


def rename(name: str) -> str:
    """A metric's name of today."""
    head, _, last = name.rpartition("/")
    return f"{head}/{METRICS.get(last, last)}" if head else METRICS.get(last, last)


def parsed(value: object) -> object:
    """Files that are text as JSON values, one per line or one in all."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return [json.loads(line) for line in value.splitlines()]


def name_in(checkout: Path, setting: str) -> str:
    """The setting as that checkout calls it: those before `tartvg/launch` have the old names."""
    if (checkout / "tartvg/launch").is_dir():
        return setting
    return next((old + setting[len(new) :] for new, old in RENAMED.items() if setting.startswith(new)), setting)


def run(checkout: Path, strategy: str, settings: list[str], folder: Path, data: Path) -> Path:
    """The run folder of the pipeline in a checkout."""
    overrides = [f"trainer={strategy}", *settings, f"runs_dir={folder}", f"dataset.root={data}", "name=r"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(checkout / "run.py"), *overrides], cwd=checkout, env=environment, check=True)
    return folder / "r"


def compare(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """Lines about what differs."""
    said = [f"only in one: {name}" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        a, b = today(parsed(old[name])), today(parsed(new[name]))
        if name.endswith("metrics.jsonl"):
            assert isinstance(a, list) and isinstance(b, list)
            common = [name for name in a[0] if name in b[0]] if a and b else []
            print(f"  {name}: {len(common)} metrics in common, on one side only: {sorted(a[0].keys() ^ b[0].keys())}")
            a = [{k: row.get(k) for k in common} for row in a]
            b = [{k: row.get(k) for k in common} for row in b]
        if name.endswith("scores.json"):
            assert isinstance(a, dict) and isinstance(b, dict)
            print(f"  {name}: on one side only: {sorted(a.keys() ^ b.keys())}")
            a, b = ({k: v for k, v in side.items() if k in a and k in b} for side in (a, b))
        if a != b:
            said.append(f"differs: {name}")
    return said


def main() -> int:
    """Run both, compare, print a line per strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=["cpu", "ddp", "zero3"])
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older commit")
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs; those that are there are not run again")
    options = parser.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        top = (options.keep or Path(temporary)).resolve()
        data = top / "data"  # one folder for both, as rollouts name their videos
        for strategy in options.strategies:
            settings = SETTINGS + ([] if strategy == "cpu" else TWO)
            found = []
            for label, checkout in (("old", options.old.resolve()), ("new", ROOT)):
                names = [name_in(checkout, setting) for setting in settings]
                folder = top / label / strategy
                done = folder / "r/evaluate/grpo2/scores.json"
                found.append(results(folder / "r" if done.exists() else run(checkout, strategy, names, folder, data)))
            differences = compare(*found)
            print(f"{strategy}: {len(found[1])} files, {differences or 'equal'}", flush=True)
            code = code or int(bool(differences))
    return code


if __name__ == "__main__":
    sys.exit(main())

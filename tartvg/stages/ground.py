"""ground: one video, one sentence, one answer, with its film strip."""

from __future__ import annotations

import re
from pathlib import Path

from tartvg.config import Config, SettingError
from tartvg.data.clips import decode_isolated
from tartvg.data.packets import VideoError
from tartvg.policy.asking import ask
from tartvg.policy.loading import checked_base, family_in
from tartvg.policy.model_files import ADAPTER_FILE
from tartvg.policy.torch_setup import set_up_torch
from tartvg.report.strips import film_strip
from tartvg.response import parse_response
from tartvg.stages.common import adapter_of, load_policy
from tartvg.stages.folder import run_dir

LAST_TO_FIRST = ("grpo2", "sft", "grpo1")


def trained_adapter(config: Config) -> Path | None:
    """`init_adapter` if set, else the furthest stage of the run that has an adapter, else None: the base."""
    if config.init_adapter is not None:
        return adapter_of(config, config.init_adapter)
    for stage in LAST_TO_FIRST:
        folder = run_dir(config) / stage / "adapter"
        if (folder / ADAPTER_FILE).is_file():
            return folder
    return None


def run_ground(config: Config) -> None:
    """Print anchors and answer, and write `<run>/ground/<video>_<query>.png`."""
    assert config.video is not None and config.query is not None
    set_up_torch(config.trainer)
    base, _ = checked_base(config.policy)
    video = Path(config.video)
    try:
        clip = decode_isolated(video, config.policy.frames, family_in(base, str(base)).patch_form.side)
    except VideoError as error:
        raise SettingError(f"video: {error}") from error
    adapter = trained_adapter(config)
    print(f"policy: {config.policy.path} " + (f"with {adapter}" if adapter else "(no trained adapter in this run)"))
    policy = load_policy(config, adapter, num_decoders=0).eval()
    completion = ask(policy, video, config.query, config.anchors, config.grpo.sampling, clip)
    response = parse_response(completion.text, is_direct=config.anchors.is_direct)
    print(completion.text)
    for number, anchor in enumerate(response.anchors, start=1):
        print(f"anchor {number}: {anchor} s")
    print(f"answer:   {response.answer} s" if response.answer else "answer:   none could be read")
    if response.faults:
        print("format:   " + ", ".join(f.value for f in response.faults))
    name = re.sub(r"\W+", "_", f"{video.stem}_{config.query}")[:80].strip("_")
    folder = run_dir(config) / "ground"
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{name}.png"
    picture.write_bytes(film_strip(video, clip.duration, [], response.anchors, response.answer, config.query))
    print(f"film strip: {picture}")

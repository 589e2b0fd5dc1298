"""serve: a page in the browser that answers questions about videos."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tartvg.app.speaker import Speaker, Voice
from tartvg.app.videos import Refusal, Shelf, Shown
from tartvg.config import Config, SettingError, policy_label
from tartvg.data.clips import ClipReader
from tartvg.launch.signals import Preempted
from tartvg.launch.terminal import warn_once
from tartvg.policy.loading import ADAPTER, checked_base
from tartvg.policy.torch_setup import set_up_torch
from tartvg.stages.common import BASE, adapter_of, load_policy, prompts_of
from tartvg.stages.ground import trained_adapter

INSTALL = "pip install -c constraints.txt -e '.[app]'"


def run_serve(config: Config) -> None:
    """Answer questions until the process is stopped. Leaves nothing behind."""
    if find_spec("gradio") is None:
        raise SettingError(f"stage=serve needs Gradio, the extra `app`: {INSTALL}")
    set_up_torch(config.trainer)
    checked_base(config.policy)
    chosen = choose_policies(config)
    with TemporaryDirectory(prefix="tartvg-serve-", ignore_cleanup_errors=True) as folder:
        # Gradio reads them when it is imported: its own files lie here, too, and nothing is reported to anybody.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        from tartvg.app.page import Desk, build, open_page

        shelf = Shelf(Path(folder), config.serve)
        offered = examples(config, shelf)
        page = build(Desk(load_speaker(config, chosen), shelf, offered, config.serve), f"tartvg: {config.policy.name}")
        try:
            address = open_page(page, config.serve)
        except (OSError, ValueError) as error:
            place = f"serve.host={config.serve.host} serve.port={config.serve.port}"
            raise SettingError(f"{place}: no page can be opened there; is the port in use?") from error
        if not config.serve.is_loopback:
            warn_once(f"serve.host={config.serve.host}: everybody who reaches this machine can ask and upload")
        print(f"page: {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except (KeyboardInterrupt, Preempted):  # how a server ends: nothing is left to continue
            print("stopped")
        finally:
            page.close(verbose=False)


def choose_policies(config: Config) -> dict[str, Path | None]:
    """Find the adapter folder of each policy (None: the base) by what the page calls it. Raises SettingError."""
    if not config.serve.policies:
        trained = trained_adapter(config)
        return {BASE: None} | ({} if trained is None else {policy_label(str(trained)): trained})
    chosen = {name: adapter_of(config, name, "serve.policies") for name in config.serve.policies}
    short = {policy_label(name): folder for name, folder in chosen.items()}
    return short if len(short) == len(chosen) else chosen


def load_speaker(config: Config, chosen: dict[str, Path | None]) -> Speaker:
    """Load one base with the adapters of all policies. Nothing about a visitor's video is kept on disk."""
    policy = load_policy(config, None, num_decoders=1).eval()
    policy.disk, policy.clips = None, ClipReader()
    voices = []
    for place, (label, folder) in enumerate(chosen.items()):
        voices.append(Voice(label, ADAPTER if folder is None else f"policy{place}"))
        if folder is not None:
            policy.add_adapter(voices[-1].adapter, folder)
        print(f"policy: {label}, {config.policy.path}" + ("" if folder is None else f" with {folder}"))
    return Speaker(policy, voices, config.anchors, config.grpo.sampling, config.serve.timeout_s)


def examples(config: Config, shelf: Shelf) -> list[Shown]:
    """Take the first videos of evaluate.split that can be shown, with the first query of each."""
    found: dict[Path, Shown] = {}
    for prompt in prompts_of(config, config.evaluate.split) if config.serve.num_examples else ():
        sample = prompt.sample
        if len(found) == config.serve.num_examples:
            break
        if sample.video not in found and sample.video.is_file():
            try:
                found[sample.video] = shelf.example(sample.video, sample.query)
            except Refusal as error:
                warn_once(f"{sample.video.name} is no example: {error}")
    return list(found.values())

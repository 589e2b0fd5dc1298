"""Speed and memory beside other engines: tables, bench.json and bench.png.

python -m experiments.efficiency.bench [update rollout memory phases sweep gpu] --out runs/bench
python -m experiments.efficiency.bench first_hour    what to run first on a GPU, with what to expect
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.efficiency.bench.first_hour import first_hour
from experiments.efficiency.bench.gpu import measure_gpu
from experiments.efficiency.bench.plot import draw
from experiments.efficiency.bench.questions import Bench, ask_memory, ask_phases, ask_rollout, ask_sweep, ask_update
from experiments.efficiency.bench.shapes import BASES, SMALL, SMALLER
from tartvg.policy.torch_setup import keep_freed_memory
from tartvg.records import write_atomic

SHAPES = {shape.hidden: shape for shape in (SMALL, SMALLER)}
QUESTIONS = ("update", "rollout", "memory", "phases", "sweep", "gpu")
"""Asked by default; `first_hour` only by name."""


def main() -> None:
    """Ask the questions in order; each answer is kept as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m experiments.efficiency.bench", description=__doc__)
    known = [*QUESTIONS, "first_hour"]
    parser.add_argument("questions", nargs="*", choices=[*known, []], default=[], metavar="|".join(known))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each call")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of torch")
    parser.add_argument("--hidden", type=int, choices=SHAPES, default=SMALL.hidden, help="width of the model")
    parser.add_argument("--base", choices=BASES, default="tiny", help="family of the model: tiny3 is Qwen3-VL")
    parser.add_argument("--device", help="where it runs (default: cpu; of gpu and first_hour: cuda)")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shape = replace(SHAPES[arguments.hidden], config_of=BASES[arguments.base])
    bench = Bench(arguments.out, arguments.repeats, arguments.device or "cpu", shape)
    answers: dict[str, Any] = {"machine": _machine(arguments)}
    print(" · ".join(f"{key} {value}" for key, value in answers["machine"].items()) + "\n")
    for question in arguments.questions or QUESTIONS:
        if question in ("gpu", "first_hour") and arguments.device is None and not torch.cuda.is_available():
            print(f"{question}: no CUDA device here, skipped")
            continue
        answers[question] = _ask(question, bench, arguments.device or "cuda")
        write_atomic(arguments.out / "bench.json", json.dumps(answers, indent=1) + "\n")
    draw(answers, arguments.out / "bench.png")


def _ask(question: str, bench: Bench, accelerator: str) -> dict[str, Any]:
    if question == "update":
        has_trl = importlib.util.find_spec("trl") is not None
        if not has_trl:
            print("TRL is not installed (pip install 'tartvg[bench]'): the comparison goes without it")
        is_compared = has_trl and bench.shape.config_of is BASES["tiny"]  # our engine for it gives images' arguments
        return ask_update(bench, with_trl=is_compared)
    if question == "first_hour":
        return first_hour(bench.folder, accelerator)
    if question == "gpu":
        return measure_gpu(bench.folder, accelerator, bench.repeats)
    asks: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "rollout": ask_rollout, "memory": ask_memory, "phases": ask_phases, "sweep": ask_sweep,
    }  # fmt: skip
    return asks[question](bench)


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    names = ("torch", "transformers", "peft")
    return {
        "cores": os.cpu_count(), "threads": arguments.threads, "load at the start": round(load, 1),
        "hidden": arguments.hidden, "base": arguments.base, "processor": platform.machine(),
        **{name: version(name) for name in names},
    }  # fmt: skip


if __name__ == "__main__":
    main()

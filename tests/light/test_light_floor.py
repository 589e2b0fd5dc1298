"""The light floor starts without torch, and no source file outgrows its room."""

import subprocess
import sys
from pathlib import Path

import pytest

import tartvg

PACKAGE = Path(tartvg.__file__).parent
HEAVY = ("torch", "transformers", "peft", "deepspeed", "pytorch_lightning", "wandb", "numpy")
MAX_LINES = 400


@pytest.mark.parametrize("module", ["config", "types", "spans", "response", "prompts", "rewards", "monitors"])
def test_imports_no_torch(module: str):
    code = f"import sys, tartvg.{module}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_source_files_stay_small():
    lengths = {p.relative_to(PACKAGE).as_posix(): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}

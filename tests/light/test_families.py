"""The border between a family of models and the rest: its name is in its own file and in the table, nowhere else."""

import re
from pathlib import Path

from tartvg.policy.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tartvg/policy/families"


def test_each_family_is_one_file_of_its_name():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"__init__", "family", *FAMILIES}


def test_nothing_else_asks_for_a_familys_name():
    """No branch of the package, the experiments' shared code or run.py is taken by a family's name or class."""
    names = "|".join([*FAMILIES, "Qwen2_5_?VL", "Qwen3_?VL"])
    asking = re.compile(
        rf"\b(if|elif|match|case|while|assert)\b.*({names})|({names})\w*\W+(if|==|!=|in)\b|isinstance.*({names})"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [ROOT / "run.py", *ROOT.glob("tartvg/**/*.py"), *ROOT.glob("experiments/**/*.py")]
        if path.parent != FOLDER or path.stem == "family"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if asking.search(line)
    ]
    assert not found

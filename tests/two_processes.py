"""A run of two processes on the CPU beside the same run of one: settings, and what must be equal."""

from interruptions import rows
from safetensors.torch import load_file

TWO = [
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.num_workers=0",
    "trainer.zero3.param_persistence_threshold=5000",
    "trainer.zero3.max_reuse_distance=0",
]
"""ZeRO-3 splits the matrices of the base, after each use; a message per bias takes long, so one test does that."""
STRATEGIES = ("ddp", "zero2", "zero3")
TOLERANCE = 1e-6
"""Of a weight, where both processes and the one compute with the same kernels (ddp, zero2)."""
SHARE = 0.1
"""Of how far training went: zero3 has a linear layer of its own, whose rounding AdamW magnifies in single entries."""
OVERALL = 1e-3
"""Of the distance of all weights, for that of the difference. All three are derived in experiments/distributed."""
START = "import sys; from tartvg.launch.processes import run_processes; sys.exit(run_processes(2, sys.argv[1:]))"
"""Start the command that follows once per rank, as run.py does with its own."""


def trainer(strategy, settings):
    """A group choice first: the values of `settings` lie over it."""
    return [f"trainer={strategy}", *settings, *TWO]


def assert_same_training(strategy, one, other, name="grpo1/adapter/adapter_model.safetensors"):
    """Two adapters are equal up to rounding, and far from the start, where every B is zero."""
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    largest = max(float((a[key] - b[key]).abs().max()) for key in a)
    moves = [key for key in a if "lora_B" in key]
    moved = min(float(a[key].abs().max()) for key in moves)
    apart = sum(float((a[key] - b[key]).square().sum()) for key in moves)
    overall = (apart / sum(float(a[key].square().sum()) for key in moves)) ** 0.5
    allowed = SHARE * moved if strategy.startswith("zero3") else TOLERANCE
    print(f"{strategy} {name}: largest {largest:.2g}, overall {overall:.2g}, moved {moved:.2g}")
    assert largest <= allowed and overall <= OVERALL and moved >= 20 * TOLERANCE, (name, largest, overall, moved)


def said(path):
    return [[r["completion"]["token_ids"] for r in row["rollouts"]] for row in rows(path)]

"""The values that settings may take by name, and the range check."""

from __future__ import annotations

from enum import Enum


class SettingError(ValueError):
    """A setting that the user can correct. run.py prints it as one line, without a traceback."""


class StageStopped(Exception):
    """A stage ended itself and can be continued. run.py prints the reason in one line, without a traceback."""


def require(condition: bool, setting: str, expected: str, got: object) -> None:
    """Raise SettingError with the setting's name unless `condition` holds."""
    if not condition:
        raise SettingError(f"{setting} must be {expected}, got {got!r}")


class StageName(Enum):
    """The entry points of `stage=`."""

    pipeline = "pipeline"
    pretrain = "pretrain"
    rollouts = "rollouts"
    grpo1 = "grpo1"
    filter = "filter"
    sft = "sft"
    grpo2 = "grpo2"
    evaluate = "evaluate"
    ground = "ground"
    check_data = "check_data"
    memory = "memory"
    report = "report"


class DatasetName(Enum):
    """Readers in `tartvg.data`, one file each."""

    planted = "planted"
    planted_long = "planted_long"
    charades_sta = "charades_sta"
    qvhighlights = "qvhighlights"
    activitynet = "activitynet"
    tacos = "tacos"
    tvgbench = "tvgbench"
    jsonl = "jsonl"


class IouKind(Enum):
    """`soft` is negative for disjoint spans, `hard` is the usual IoU."""

    soft = "soft"
    hard = "hard"


class CountPenalty(Enum):
    """TAR2's form; the paper does not state it."""

    abs = "abs"
    squared = "squared"
    indicator = "indicator"


class PromptStyle(Enum):
    """`tar` asks for anchors, `timezero` is the baseline's published prompt."""

    tar = "tar"
    timezero = "timezero"


class LrDecay(Enum):
    """What the learning rate does after the warm-up."""

    none = "none"
    linear = "linear"


class AdvantageScale(Enum):
    """What divides the centred rewards of a group."""

    sample_std = "sample_std"
    population_std = "population_std"
    none = "none"


class Aggregation(Enum):
    """How token losses become one number: per sequence, per token, or over a constant (Dr. GRPO)."""

    sequence_mean = "sequence_mean"
    token_mean = "token_mean"
    constant = "constant"


class ImportanceLevel(Enum):
    """Ratio per token (GRPO) or one per sequence (GSPO)."""

    token = "token"
    sequence = "sequence"


class KlEstimator(Enum):
    """Schulman's estimators of KL(policy || reference)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Precision(Enum):
    """Arithmetic of the policy."""

    fp32 = "fp32"
    bf16 = "bf16"


class LoraCompute(Enum):
    """Who computes the adapters' share: PEFT in fp32, or the policy's own layer in `policy.precision`."""

    peft = "peft"
    native = "native"


class TrackingMode(Enum):
    """`offline` writes W&B files to sync later; `off` keeps metrics.jsonl only."""

    offline = "offline"
    online = "online"
    off = "off"

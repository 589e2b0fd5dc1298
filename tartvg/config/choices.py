"""The values that settings may take by name, and the range check."""

from __future__ import annotations

from enum import Enum


class SettingError(ValueError):
    """A setting that the user can correct. run.py prints it as one line, without a traceback."""


class LaunchError(SettingError):
    """What the environment says of a launcher is wrong. Every process says so: there may be none of rank 0."""


class StageStopped(Exception):
    """A stage ended itself and can be continued. run.py prints the reason in one line, without a traceback."""


def require(condition: bool, setting: str, expected: str, got: object) -> None:
    """Raise SettingError with the setting's name unless `condition` holds."""
    if not condition:
        raise SettingError(f"{setting} must be {expected}, got {got!r}")


class StageName(Enum):
    """The entry points of `stage=`."""

    pipeline = "pipeline"
    rollouts = "rollouts"
    grpo1 = "grpo1"
    filter = "filter"
    sft = "sft"
    grpo2 = "grpo2"
    evaluate = "evaluate"
    ground = "ground"
    serve = "serve"
    export = "export"
    check_data = "check_data"
    memory = "memory"
    report = "report"


class DatasetName(Enum):
    """Readers in `tartvg.data`, one file each; `mix` puts several of them together."""

    planted = "planted"
    planted_long = "planted_long"
    charades_sta = "charades_sta"
    qvhighlights = "qvhighlights"
    activitynet = "activitynet"
    tacos = "tacos"
    tvgbench = "tvgbench"
    charades_timelens = "charades_timelens"
    activitynet_timelens = "activitynet_timelens"
    qvhighlights_timelens = "qvhighlights_timelens"
    timelens_100k = "timelens_100k"
    timelens2_93k = "timelens2_93k"
    jsonl = "jsonl"
    mix = "mix"


class IouKind(Enum):
    """`soft` is negative for disjoint spans, `hard` is the usual IoU."""

    soft = "soft"
    hard = "hard"


class Truth(Enum):
    """Which window of a query with several ones an answer is compared with; `all` is their union."""

    first = "first"
    best = "best"
    all = "all"


class CountPenalty(Enum):
    """TAR2's form; the paper does not state it."""

    abs = "abs"
    squared = "squared"
    indicator = "indicator"


class DifficultyRule(Enum):
    """Which training queries are kept by the success of the untouched base."""

    all = "all"
    band = "band"
    gaussian = "gaussian"
    undecided = "undecided"


class PromptStyle(Enum):
    """`tar` asks for anchors, `timezero` is the baseline's published prompt, `direct` asks for the answer alone."""

    tar = "tar"
    timezero = "timezero"
    direct = "direct"


class LrDecay(Enum):
    """What the learning rate does after the warm-up."""

    none = "none"
    linear = "linear"


class AdvantageScale(Enum):
    """What divides the centred rewards of a group."""

    sample_std = "sample_std"
    population_std = "population_std"
    none = "none"


class Credit(Enum):
    """Which part of the reward the tokens of which segment are paid for; `tartvg.grpo.credit` has one function each."""

    outcome = "outcome"
    return_to_go = "return_to_go"
    own_term = "own_term"
    own_part = "own_part"
    turn = "turn"
    potential = "potential"


class Normalise(Enum):
    """What is compared within a group: the weighted sum of the terms, or each term by itself before its weight."""

    total = "total"
    terms = "terms"


class FormatKind(Enum):
    """The format term: all or nothing, or in steps."""

    strict = "strict"
    graded = "graded"


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


class VideoWrapper(Enum):
    """Marks around a video whose steps have marks of their own: only those (`inner`), or one more pair (`outer`)."""

    inner = "inner"
    outer = "outer"


class TrackingMode(Enum):
    """`offline` writes W&B files to sync later; `off` keeps metrics.jsonl only."""

    offline = "offline"
    online = "online"
    off = "off"

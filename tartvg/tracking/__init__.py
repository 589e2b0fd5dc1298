"""What a run says about itself: metrics.jsonl always, Weights & Biases beside it."""

from tartvg.tracking.tracker import Tracker

__all__ = ["Tracker"]

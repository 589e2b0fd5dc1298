"""Rewards: one file per term, a pure function each; `rubric.TERMS` lists them and `Rubric` adds them up. No torch."""

from __future__ import annotations

from tartvg.rewards.rubric import Rubric
from tartvg.rewards.term import ScoredResponse, Term

__all__ = ["Rubric", "ScoredResponse", "Term"]

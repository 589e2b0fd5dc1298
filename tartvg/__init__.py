"""TAR-TVG: timestamp-anchored reinforcement learning for temporal video grounding (arXiv 2508.07683)."""

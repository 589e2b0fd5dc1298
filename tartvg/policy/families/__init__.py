"""The families of models that can be a policy: one file each, and all that differs between them is in these files.

No torch here. `tartvg.policy.families.family` says what a file has to give.
"""

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""The `model_type` that config.json names, which is also the name of the family's file."""

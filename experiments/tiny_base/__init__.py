"""The embedded base: a Qwen2.5-VL of 1.5 million parameters, and how it is made."""

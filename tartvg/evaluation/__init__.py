"""Predictions in, scores out. `score` imports no torch and runs on a file of predictions alone."""

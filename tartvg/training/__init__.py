"""Lightning modules and everything about devices, steps and checkpoints."""

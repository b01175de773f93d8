"""A run: its folder, checkpoints, log, signals and GPU readings."""

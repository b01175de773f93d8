"""Distillation quality against peers and ablations."""

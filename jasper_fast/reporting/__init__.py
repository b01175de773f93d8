"""Reports, plots and model cards."""

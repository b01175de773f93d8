"""Helpers of the benchmarks: budgets, checks, measurement and targets."""

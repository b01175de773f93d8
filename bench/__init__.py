"""Benchmarks: ``python -m bench NAME`` prints tables, ``pytest bench/`` times single functions."""

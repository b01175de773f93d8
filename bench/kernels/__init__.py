"""Compilation of the Triton kernels."""

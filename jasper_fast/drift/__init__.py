"""Comparison of two models by their embeddings: folders, ONNX graphs, served endpoints and golden files."""
